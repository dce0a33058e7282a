//! Media that fail: reads, writes and flushes, by the fault injection of QEMU's block layer.

use foliant_guest::pattern;
use serde_json::json;

use crate::drive::{Drive, FaultOn, FaultTimes, Layer, MediaFault};
use crate::machine::{Machine, NvmeController};
use crate::scenario::{Boot, Claim};

/// The page of each medium that fails.
const PAGE: u64 = 100;
const PAGE_BYTES: usize = 4096;

pub(super) fn boots() -> Vec<Boot> {
    let faults = |name: &str, on, sector, times, count| {
        Drive::new(name, 32).layer(Layer::Faults(vec![MediaFault { on, sector, times }; count]))
    };
    let faulty = |name, on, sector, times| faults(name, on, sector, times, 1);
    let sector = Some(PAGE * 8 + 3);
    let machine = Machine::new()
        .drive(faulty("reads", FaultOn::Read, sector, FaultTimes::Always))
        // The write, and as often as it is tried again.
        .drive(faults("writes", FaultOn::Write, sector, FaultTimes::Once, 6))
        .drive(faulty("passing", FaultOn::Write, sector, FaultTimes::Once))
        .drive(faulty("flushes", FaultOn::Flush, None, FaultTimes::Once))
        .nvme(NvmeController::new("LAB0", "04.0").namespace(1, "reads", 512))
        .nvme(NvmeController::new("LAB1", "05.0").namespace(1, "writes", 512))
        .nvme(NvmeController::new("LAB2", "06.0").namespace(1, "flushes", 512))
        .nvme(NvmeController::new("LAB3", "07.0").namespace(1, "passing", 512));
    let claim =
        |name, proves, job, address| Claim::new(name, proves, job, json!({"address": address, "page": PAGE}));
    let boot = Boot::new("faults", machine.without_kernel_driver())
        .bind(&["0000:00:04.0", "0000:00:05.0", "0000:00:06.0", "0000:00:07.0"])
        .claim(
            claim(
                "a_medium_that_cannot_be_read_is_an_error_for_the_reader_alone",
                "Status 2h/81h reaches who reads the page, each time, with the place; the pages beside it are served.",
                "read_fails",
                "0000:00:04.0",
            )
            .check(|evidence| {
                let words: String = evidence.fact("words");
                assert!(words.contains("Unrecovered Read Error"), "{words}");
                let place = PAGE * PAGE_BYTES as u64;
                pattern::compare(3, place, &evidence.image("reads", place, PAGE_BYTES)).unwrap();
            }),
        )
        .claim(
            claim(
                "a_write_that_fails_is_told_once_to_each_handle_and_tried_again",
                "Status 2h/80h, on the write and on all of its retries, reaches the sync of each handle once; the page stays dirty \
                 and gets down with the next.",
                "write_fails",
                "0000:00:05.0",
            )
            .check(|evidence| {
                let place = (PAGE - 2) * PAGE_BYTES as u64;
                pattern::compare(4, place, &evidence.image("writes", place, 5 * PAGE_BYTES)).unwrap();
            }),
        )
        .claim(
            claim(
                "a_write_that_fails_in_passing_is_tried_again_and_nobody_hears_of_it",
                "Status 2h/80h without Do Not Retry, once: the write is sent again, the sync succeeds, and the data are in \
                 the host's file.",
                "write_fails_in_passing",
                "0000:00:07.0",
            )
            .check(|evidence| {
                let place = PAGE * PAGE_BYTES as u64;
                pattern::compare(7, place, &evidence.image("passing", place, PAGE_BYTES)).unwrap();
            }),
        )
        .claim(
            claim(
                "a_flush_that_fails_stops_all_writes_until_the_device_is_opened_anew",
                "After a failed Flush nobody knows what is durable: writes are refused, and a new open works.",
                "flush_fails",
                "0000:00:06.0",
            )
            .check(|evidence| {
                let place = PAGE * PAGE_BYTES as u64;
                pattern::compare(6, place, &evidence.image("flushes", place, PAGE_BYTES)).unwrap();
            }),
        );
    vec![boot]
}
