//! Controllers with limits and extras: small and boundless transfers, one queue pair, memory of their own, several
//! namespaces, no write cache.

use serde_json::json;

use super::driver::medium;
use crate::drive::Drive;
use crate::machine::{Machine, NvmeController};
use crate::scenario::{Boot, Claim};

pub(super) fn boots() -> Vec<Boot> {
    vec![limits(), several_controllers(), namespaces(), write_cache()]
}

const FLUSH: u8 = 0;
const WRITE: u8 = 1;

fn limits() -> Boot {
    let addresses = ["0000:00:04.0", "0000:00:05.0", "0000:00:06.0", "0000:00:07.0"];
    let machine =
        ["a", "b", "c", "d"].into_iter().fold(Machine::new(), |all, name| all.drive(Drive::new(name, 64)));
    let machine = machine
        .nvme(NvmeController::new("LAB0", "04.0").namespace(11, "a", 512).option("mdts=1"))
        .nvme(NvmeController::new("LAB1", "05.0").namespace(12, "b", 512).option("mdts=0"))
        .nvme(NvmeController::new("LAB2", "06.0").namespace(13, "c", 4096).option("max_ioqpairs=1"))
        .nvme(NvmeController::new("LAB3", "07.0").namespace(14, "d", 4096).option("cmb_size_mb=16"));
    Boot::new("limits", machine.without_kernel_driver())
        .bind(&addresses)
        .claim(medium("requests_are_split_where_a_transfer_has_8_kib", addresses[0]).check(|evidence| {
            evidence.image_is_as_told("a");
            // Six writes of 1, 1, 9, 64, 300 and 2047 blocks of 512 bytes, in commands of at most 8 KiB.
            assert_eq!(evidence.trace.count(11, WRITE), 1 + 1 + 1 + 4 + 19 + 128);
        }))
        .claim(medium("a_request_is_one_command_where_transfers_have_no_limit", addresses[1]).check(|evidence| {
            evidence.image_is_as_told("b");
            assert_eq!(evidence.trace.count(12, WRITE), 6);
        }))
        .claim(
            Claim::new(
                "an_engine_that_asks_for_more_shards_than_queue_pairs_has_one_a_pair",
                "A controller with one I/O queue pair serves an engine that was asked to have four shards.",
                "engine_writes",
                json!({"address": addresses[2], "nsid": 13, "shards": 4, "seed": 7}),
            )
            .check(|evidence| {
                assert_eq!(evidence.fact::<usize>("shards"), 1);
                evidence.image_is_as_told("c");
            }),
        )
        .claim(
            Claim::new(
                "a_controller_with_memory_of_its_own_works_as_any_other",
                "A Controller Memory Buffer is left alone and disturbs nothing; four shards have four queue pairs.",
                "engine_writes",
                json!({"address": addresses[3], "nsid": 14, "shards": 4, "seed": 8}),
            )
            .check(|evidence| {
                assert_eq!(evidence.fact::<usize>("shards"), 4);
                evidence.image_is_as_told("d");
            }),
        )
}

fn several_controllers() -> Boot {
    let places = [("a", 4, 11), ("b", 5, 12), ("c", 6, 13)];
    let mut machine = Machine::new();
    for (drive, slot, nsid) in places {
        let controller = NvmeController::new(&format!("LAB{slot}"), &format!("{slot:02x}.0"));
        machine = machine.drive(Drive::new(drive, 64)).nvme(controller.namespace(nsid, drive, 4096));
    }
    let all = places.map(|(drive, slot, nsid)| {
        json!({"address": format!("0000:00:{slot:02x}.0"), "nsid": nsid, "shards": 1, "seed": nsid, "name": drive})
    });
    Boot::new("several-controllers", machine.without_kernel_driver())
        .bind(&["0000:00:04.0", "0000:00:05.0", "0000:00:06.0"])
        .claim(
            Claim::new(
                "one_process_drives_several_controllers_at_once",
                "Three engines in one process, each on a controller of its own, don't meet each other's data.",
                "engines_at_once",
                json!({"all": all}),
            )
            .check(|evidence| ["a", "b", "c"].into_iter().for_each(|drive| evidence.image_is_as_told_of(drive, drive))),
        )
}

fn namespaces() -> Boot {
    let machine =
        ["a", "b", "c"].into_iter().fold(Machine::new(), |all, name| all.drive(Drive::new(name, 32)));
    let controller = NvmeController::new("LAB0", "04.0")
        .namespace(1, "a", 512)
        .namespace(2, "b", 4096)
        .namespace(7, "c", 512);
    let write = |name, nsid: u32| {
        Claim::new(
            name,
            "Data of each namespace of a subsystem lands in its own backing file, and in no other.",
            "engine_writes",
            json!({"address": "0000:00:04.0", "nsid": nsid, "shards": 2, "seed": 60 + nsid}),
        )
    };
    Boot::new("namespaces", machine.nvme(controller))
        .claim(Claim::new(
            "every_namespace_of_a_subsystem_is_found_as_the_kernel_driver_finds_it",
            "Namespaces 1, 2 and 7, of different block sizes, are found with their sizes.",
            "identify_like_the_kernel",
            json!({"address": "0000:00:04.0", "nsids": [1, 2, 7]}),
        ))
        .claim(write("namespace_1_keeps_its_data_apart", 1).check(|evidence| evidence.image_is_as_told("a")))
        .claim(write("namespace_2_keeps_its_data_apart", 2).check(|evidence| evidence.image_is_as_told("b")))
        .claim(write("namespace_7_keeps_its_data_apart", 7).check(|evidence| evidence.image_is_as_told("c")))
}

fn write_cache() -> Boot {
    let machine = ["a", "b"].into_iter().fold(Machine::new(), |all, name| all.drive(Drive::new(name, 32)));
    let machine = machine.nvme(NvmeController::new("LAB0", "04.0").namespace(1, "a", 4096)).nvme(
        NvmeController::new("LAB1", "05.0").namespace(2, "b", 4096).namespace_option("write-cache=off"),
    );
    let sync = |name, proves, address, nsid: u32| {
        let arguments = json!({"address": address, "nsid": nsid, "shards": 1, "seed": 1, "rounds": 20});
        Claim::new(name, proves, "engine_syncs", arguments)
    };
    Boot::new("write-cache", machine.without_kernel_driver())
        .bind(&["0000:00:04.0", "0000:00:05.0"])
        .claim(
            sync(
                "each_sync_sends_one_flush_where_there_is_a_write_cache",
                "QEMU's own trace of the controller has as many flushes as there were syncs, and the engine counts alike.",
                "0000:00:04.0",
                1,
            )
            .check(|evidence| {
                assert!(evidence.fact::<bool>("volatile_write_cache"));
                let stats: serde_json::Value = evidence.fact("stats");
                assert_eq!(stats["flush_commands"], 20);
                assert_eq!(evidence.trace.count(1, FLUSH), 20);
            }),
        )
        .claim(
            sync(
                "no_flush_is_sent_where_the_write_cache_is_off",
                "A controller whose write cache is off gets no Flush, by QEMU's own trace; its data are there all the same.",
                "0000:00:05.0",
                2,
            )
            .check(|evidence| {
                assert!(!evidence.fact::<bool>("volatile_write_cache"));
                assert_eq!(evidence.trace.count(2, FLUSH), 0);
                assert!(evidence.trace.count(2, WRITE) >= 20);
            }),
        )
}
