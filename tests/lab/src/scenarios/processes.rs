//! Processes: killed ones, second ones, those of an ordinary user, and the guest kernel's own driver before and after.

use serde_json::json;

use crate::machine::Machine;
use crate::scenario::{Boot, Claim};

const ADDRESS: &str = "0000:00:04.0";

pub(super) fn boots() -> Vec<Boot> {
    let boot = Boot::new("processes", Machine::with_one_controller(4096).without_kernel_driver())
        .bind(&[ADDRESS])
        .claim(
            Claim::new(
                "a_process_killed_in_mid_write_leaves_a_device_that_opens_with_all_that_was_synced",
                "SIGKILL three times while pages are written: the controller is found enabled and busy, opens at once, and \
                 each page is of the last synced generation or a newer one, whole.",
                "killed_in_mid_write",
                json!({"address": ADDRESS}),
            )
            .check(|evidence| {
                let newer: Vec<u64> = evidence.facts("pages_newer_than_the_last_sync");
                assert_eq!(newer.len(), 3, "three processes were killed");
            }),
        )
        .claim(
            Claim::new(
                "a_second_process_is_told_who_has_the_device",
                "While a process has the device, another is refused with its number and name; afterwards it is let in.",
                "second_process",
                json!({"address": ADDRESS}),
            ),
        )
        .claim(
            Claim::new(
                "an_ordinary_user_who_owns_the_group_works_as_root_does",
                "Without the node he is told what to ask for, with too little lockable memory which limit to raise; with \
                 both he reads and writes.",
                "ordinary_user",
                json!({"address": ADDRESS, "nsid": 1, "shards": 2, "seed": 21}),
            )
            .check(|evidence| {
                let refusals: Vec<String> = evidence.facts("refusal");
                assert!(refusals.len() == 2, "{refusals:?}");
            }),
        );
    let exchange = Boot::new("exchange", Machine::with_one_controller(512)).claim(
        Claim::new(
            "data_change_hands_between_the_kernel_driver_and_ours_both_ways",
            "What the guest kernel's driver wrote is read over VFIO, and the reverse; the backing file agrees.",
            "exchange",
            json!({"address": ADDRESS, "seed": 31}),
        )
        .check(|evidence| evidence.image_is_as_told("a")),
    );
    vec![boot, exchange]
}
