//! The guest kernel's own driver on the same controllers: what the lab shows before any VFIO is in play.

use foliant_guest::pattern;
use serde_json::json;

use crate::machine::Machine;
use crate::scenario::{Boot, Claim};

pub(super) fn boots() -> Vec<Boot> {
    let place = json!({"address": "0000:00:04.0", "nsid": 1});
    let writing =
        json!({"address": "0000:00:04.0", "nsid": 1, "offset": 1 << 20, "len_bytes": 192 << 10, "seed": 5});
    vec![
        Boot::new("kernel-driver", Machine::with_one_controller(512))
            .claim(
                Claim::new(
                    "the_kernel_driver_sees_the_machine_as_it_was_described",
                    "The machine that QEMU makes is the one that was described: serial number, size, block size.",
                    "kernel_facts",
                    place,
                )
                .check(|evidence| {
                    assert_eq!(evidence.fact::<String>("serial"), "LAB0");
                    assert_eq!(evidence.fact::<u64>("size_bytes"), evidence.machine.drive_named("a").size_bytes);
                    assert_eq!(evidence.fact::<u32>("block_bytes"), 512);
                }),
            )
            .claim(
                Claim::new(
                    "what_the_kernel_driver_writes_is_in_the_backing_file",
                    "The host's view of the image is the guest's medium, and the trace has each of its commands.",
                    "kernel_writes",
                    writing,
                )
                .check(|evidence| {
                    let found = evidence.image("a", 1 << 20, 192 << 10);
                    pattern::compare(5, 1 << 20, &found).unwrap();
                    assert_eq!(evidence.trace.count(1, 0), 1, "flushes that QEMU saw");
                }),
            ),
    ]
}
