//! The command `foliant` in the guest: setting devices up, refusing to take what is in use, and the engine whole.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use crate::drive::{Content, Drive};
use crate::machine::{Machine, NvmeController};
use crate::scenario::{Boot, Claim};

pub(super) fn boots() -> Vec<Boot> {
    let [demo, replay] = whole();
    vec![binding(), demo, replay]
}

const FREE: &str = "0000:00:04.0";
const FORMATTED: &str = "0000:00:05.0";

pub(super) fn foliant(arguments: &[&str], status: i32, says: &[&str]) -> Value {
    json!({"foliant": {"arguments": arguments, "status": status, "says": says}})
}

fn has_driver(address: &str, name: &str) -> Value {
    json!({"driver": {"address": address, "name": name}})
}

pub(super) fn claim(name: &'static str, proves: &'static str, steps: &[Value]) -> Claim {
    Claim::new(name, proves, "commands", json!({"steps": steps}))
}

fn binding() -> Boot {
    let formatted = Drive { content: Content::Ext4, ..Drive::new("formatted", 32) };
    let machine = Machine::new()
        .drive(Drive::new("free", 32))
        .drive(formatted)
        .nvme(NvmeController::new("LAB0", "04.0").namespace(1, "free", 4096))
        .nvme(NvmeController::new("LAB1", "05.0").namespace(1, "formatted", 512));
    let refused =
        |address: &str, words: &[&str]| [foliant(&["bind", address], 1, words), has_driver(address, "nvme")];
    let on = |what: &str, address: &str| json!({what: {"address": address}});
    let mounted =
        [&[on("mount", FORMATTED)][..], &refused(FORMATTED, &["in use", "mounted"]), &[json!("unmount")]];
    let swap = [
        &[on("swap_on", FORMATTED)][..],
        &refused(FORMATTED, &["in use", "swap"]),
        &[on("swap_off", FORMATTED)],
    ];
    let open = [&[on("open", FORMATTED)][..], &refused(FORMATTED, &["in use", "open"])];
    Boot::new("binding", machine)
        .with_foliant()
        .claim(claim(
            "foliant_lists_binds_and_gives_back_a_controller",
            "`foliant devices` shows both controllers; `bind` gives one to vfio-pci, where `identify` opens it; `unbind` \
             gives it back to the kernel's driver.",
            &[
                foliant(&["devices"], 0, &[FREE, FORMATTED, "QEMU NVMe Ctrl", "nvme"]),
                foliant(&["identify", &format!("vfio:{FREE}")], 1, &["foliant bind"]),
                foliant(&["bind", FREE], 0, &["vfio-pci"]),
                has_driver(FREE, "vfio-pci"),
                foliant(&["devices"], 0, &["vfio-pci"]),
                foliant(&["identify", &format!("vfio:{FREE}")], 0, &["LAB0", "QEMU NVMe Ctrl"]),
                foliant(&["unbind", FREE], 0, &[]),
                has_driver(FREE, "nvme"),
                foliant(&["identify", &format!("vfio:{FREE}")], 1, &["foliant bind"]),
            ],
        ))
        .claim(claim(
            "a_controller_with_a_mounted_namespace_is_not_bound",
            "A file system of the controller is mounted: bind says which, and the controller stays where it is.",
            &mounted.concat(),
        ))
        .claim(claim(
            "a_controller_that_the_kernel_swaps_to_is_not_bound",
            "A namespace of the controller is a swap area: bind says so, and the controller stays where it is.",
            &swap.concat(),
        ))
        .claim(claim(
            "a_controller_whose_disk_a_process_has_open_is_not_bound",
            "A process has the controller's disk open: bind says which, and the controller stays where it is.",
            &open.concat(),
        ))
        .claim(claim(
            "doctor_says_what_is_missing_until_nothing_is",
            "In a guest with IOMMU, modules and hugepages a controller that isn't bound blocks, with the command that \
             binds it; after that nothing does, and the exit status says so.",
            &[
                foliant(&["doctor", "--device", FREE, "--cache", "16MiB"], 1, &[&format!("foliant bind {FREE}")]),
                foliant(&["bind", FREE], 0, &[]),
                foliant(&["doctor", "--device", FREE, "--cache", "16MiB"], 0, &[]),
            ],
        ))
}

/// The engine whole, on a drive of 256 MiB: a database, and a replayed trace. Each has a boot of its own, since either
/// takes seconds.
fn whole() -> [Boot; 2] {
    let uri = format!("vfio:{FREE}");
    let boot = |name| {
        let machine = Machine { memory_mib: 768, hugepages: 48, ..Machine::new() }
            .drive(Drive::new("a", 256))
            .nvme(NvmeController::new("LAB0", "04.0").namespace(1, "a", 4096));
        let boot = Boot::new(name, machine.without_kernel_driver()).with_foliant().bind(&[FREE]);
        Boot { limit: Duration::from_secs(180), ..boot }
    };
    let demo = claim(
        "the_demo_keeps_every_acknowledged_transaction_over_vfio",
        "redb on the engine on VFIO: the process is killed in mid-transaction again and again, and every acknowledged \
         transaction is there byte for byte.",
        &[
            json!({"file": {"path": "/tmp/one", "text": "Some text, to be kept.\n".repeat(5000)}}),
            foliant(
                &["demo", "/tmp/one", "--device", &uri, "--overwrite", "--cuts", "2", "--seed", "7"],
                0,
                &[],
            ),
        ],
    );
    let replay = claim(
        "a_replayed_trace_verifies_over_vfio",
        "A block trace is replayed through a page cache much smaller than what it touches; each read is checked, and in \
         the end each sector.",
        &[
            json!({"file": {"path": "/tmp/trace.csv", "text": trace()}}),
            foliant(
                &["replay", "/tmp/trace.csv", "--device", &uri, "--cache", "4MiB", "--verify", "--overwrite"],
                0,
                &["PASSED"],
            ),
        ],
    );
    [boot("demo").claim(demo), boot("replay").claim(replay)]
}

/// A block trace: reads and writes of 512 bytes to 64 KiB over 96 MiB, some places hotter than others.
fn trace() -> String {
    let mut text = "version,time,op,size,lbn\n".to_owned();
    let mut state = 1u64;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for number in 0..2500 {
        let op = if random(3) == 0 { "28" } else { "2a" };
        let sectors = [1, 8, 8, 8, 16, 128][random(6) as usize];
        let area = if random(2) == 0 { 16_000 } else { 190_000 };
        let lbn = random(area);
        writeln!(text, "1,{number},{op},{},{lbn}", sectors * 512).expect("a string grows");
    }
    text
}
