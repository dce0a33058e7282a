//! The driver alone over VFIO, on controllers with blocks of 512 and of 4096 bytes.

use serde_json::json;

use crate::drive::Drive;
use crate::machine::{Machine, NvmeController};
use crate::scenario::{Boot, Claim};

pub(super) fn boots() -> Vec<Boot> {
    let machine = Machine::new()
        .drive(Drive::new("a", 64))
        .drive(Drive::new("b", 64))
        .nvme(NvmeController::new("LAB0", "04.0").namespace(1, "a", 512))
        .nvme(NvmeController::new("LAB1", "05.0").namespace(1, "b", 4096));
    let boot = Boot::new("driver", machine)
        .claim(identify("identify_matches_the_kernel_driver_with_512_byte_blocks", "0000:00:04.0"))
        .claim(identify("identify_matches_the_kernel_driver_with_4096_byte_blocks", "0000:00:05.0"))
        .claim(
            medium("each_command_changes_the_backing_file_as_it_should_with_512_byte_blocks", "0000:00:04.0")
                .check(|evidence| evidence.image_is_as_told("a")),
        )
        .claim(
            medium(
                "each_command_changes_the_backing_file_as_it_should_with_4096_byte_blocks",
                "0000:00:05.0",
            )
            .check(|evidence| evidence.image_is_as_told("b")),
        );
    vec![boot]
}

fn identify(name: &'static str, address: &str) -> Claim {
    Claim::new(
        name,
        "What the driver learns of controller and namespaces is what the guest kernel's own driver reported before.",
        "identify_like_the_kernel",
        json!({"address": address, "nsids": [1]}),
    )
}

/// Every command that changes a medium, on the controller at `address`.
pub(super) fn medium(name: &'static str, address: &str) -> Claim {
    Claim::new(
        name,
        "Writes with and without FUA, zeroes and deallocation are in the host's file, byte for byte, and nothing else.",
        "change_the_medium",
        json!({"address": address, "seed": 100}),
    )
}
