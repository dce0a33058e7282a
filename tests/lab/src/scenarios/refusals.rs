//! Devices that can't be opened, and machines that lack something: clear words, and nothing changed.

use serde_json::{Value, json};

use super::commands::{self, foliant};
use crate::drive::Drive;
use crate::machine::{Function, Iommu, Machine, NvmeController};
use crate::scenario::{Boot, Claim};

pub(super) fn boots() -> Vec<Boot> {
    vec![refusals(), without_iommu(), without_interrupt_remapping(), narrow_addresses()]
}

fn refuse(uri: &str, words: &[&str]) -> Value {
    json!({"uri": uri, "words": words})
}

fn refusals() -> Boot {
    let mut machine = Machine::with_one_controller(512)
        .drive(Drive::new("b", 32))
        .nvme(NvmeController::new("LAB1", "06.0").namespace(1, "b", 512).option("multifunction=on"));
    machine.functions.push(Function::Other("edu,bus=pcie.0,addr=06.1".into()));
    machine.functions.push(Function::Other("edu,bus=pcie.0,addr=07.0".into()));
    let bound = |address: &str, words: &[&str]| json!({"bind": address, "uri": format!("vfio:{address}"), "words": words});
    let all = [
        refuse("vfio:0000:00:1e.0", &["0000:00:1e.0", "0000:00:04.0"]),
        refuse("vfio:0000:00:04.0", &["bound to the driver nvme", "foliant bind 0000:00:04.0"]),
        refuse("vfio:0000:00:07.0", &["is no NVMe controller", "foliant devices"]),
        bound("0000:00:07.0", &["is no NVMe controller"]),
        refuse("vfio:0000:00:4.99", &["vfio:0000:01:00.0"]),
        refuse("vfio-noiommu:0000:00:06.0", &["bound to the driver nvme"]),
    ];
    let wrong_mode =
        json!({"bind": "0000:00:04.0", "uri": "vfio-noiommu:0000:00:04.0", "words": ["vfio:0000:00:04.0"]});
    let no_cdev = refuse("vfio:0000:00:04.0?iommu=iommufd", &["?iommu=group"]);
    let all: Vec<Value> = all.into_iter().chain([wrong_mode, no_cdev]).collect();
    Boot::new("refusals", machine).claim(
        Claim::new(
            "a_device_that_cannot_be_opened_is_refused_with_the_remedy",
            "A function that isn't there, is no NVMe controller, isn't bound, or is asked for in the wrong way: each is \
             refused in words that say what helps, and stays as it was.",
            "refusals",
            json!({"all": all}),
        )
        .check(|evidence| assert_eq!(evidence.facts::<String>("refusal").len(), 8)),
    )
}

fn without_iommu() -> Boot {
    let machine = Machine { iommu: Iommu::Absent, ..Machine::with_one_controller(512) };
    Boot::new("no-iommu", machine).with_foliant().claim(commands::claim(
        "a_machine_without_an_iommu_is_told_how_to_get_one",
        "identify sends to bind, bind to doctor, and doctor names the words for the kernel's command line; the controller \
         stays with the kernel's driver.",
        &[
            foliant(&["identify", "vfio:0000:00:04.0"], 1, &["foliant bind 0000:00:04.0"]),
            foliant(&["bind", "0000:00:04.0"], 1, &["no IOMMU group", "foliant doctor"]),
            foliant(&["doctor"], 1, &["intel_iommu=on"]),
            foliant(&["bind", "0000:00:04.0", "--noiommu"], 1, &["CONFIG_VFIO_NOIOMMU"]),
            json!({"driver": {"address": "0000:00:04.0", "name": "nvme"}}),
        ],
    ))
}

fn without_interrupt_remapping() -> Boot {
    let iommu = Iommu::IntelWithoutInterruptRemapping;
    let machine = Machine { iommu, ..Machine::with_one_controller(512) }.without_kernel_driver();
    Boot::new("no-interrupt-remapping", machine).bind(&["0000:00:04.0"]).claim(Claim::new(
        "a_machine_that_does_not_remap_interrupts_is_told_what_that_means",
        "The kernel gives no device away where interrupts aren't remapped; the words name both ways out.",
        "open_fails",
        refuse("vfio:0000:00:04.0", &["remap interrupts", "allow_unsafe_interrupts=1"]),
    ))
}

fn narrow_addresses() -> Boot {
    let machine = Machine { iommu: Iommu::Intel { address_bits: 39 }, ..Machine::with_one_controller(4096) };
    Boot::new("narrow-addresses", machine.without_kernel_driver())
        .bind(&["0000:00:04.0"])
        .claim(Claim::new(
            "device_addresses_fit_an_iommu_of_39_bits",
            "The arena's addresses lie within what the IOMMU says that it translates.",
            "addresses_are_narrow",
            json!({"address": "0000:00:04.0", "bits": 39}),
        ))
        .claim(
            Claim::new(
                "an_engine_works_behind_an_iommu_of_39_bits",
                "Data get through to the backing file with narrow device addresses.",
                "engine_writes",
                json!({"address": "0000:00:04.0", "shards": 1, "seed": 39}),
            )
            .check(|evidence| evidence.image_is_as_told("a")),
        )
}
