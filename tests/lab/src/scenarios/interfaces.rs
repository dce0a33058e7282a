//! The kernel's interfaces beside groups: a device's own node with iommufd, and no IOMMU at all. They take modules that
//! no distribution builds; see [`KernelNeed::Iommufd`].

use serde_json::json;

use super::commands::{self, foliant};
use crate::kernel::KernelNeed;
use crate::machine::{Iommu, Machine};
use crate::scenario::{Boot, Claim};

const ADDRESS: &str = "0000:00:04.0";

pub(super) fn boots() -> Vec<Boot> {
    let machine = || Machine { kernel: KernelNeed::Iommufd, ..Machine::with_one_controller(4096) };
    let mut without = Machine { iommu: Iommu::Absent, memory_mib: 2560, hugepages: 0, ..machine() };
    // The arena must be one physical stretch there.
    without.kernel_arguments.push("default_hugepagesz=1G hugepagesz=1G hugepages=1".into());
    vec![interfaces(machine()), without_iommu(without)]
}

fn interfaces(machine: Machine) -> Boot {
    let write = |name, proves, uri: &str, seed: u64| {
        Claim::new(name, proves, "engine_writes", json!({"address": uri, "shards": 2, "seed": seed}))
    };
    Boot::new("interfaces", machine.without_kernel_driver())
        .bind(&[ADDRESS])
        .claim(write(
            "an_engine_works_through_a_group_where_there_is_iommufd_too",
            "Asked for by name, the group is used on a kernel that has both.",
            "vfio:0000:00:04.0?iommu=group",
            51,
        ))
        .claim(Claim::new(
            "a_second_process_is_told_who_has_the_device_through_iommufd",
            "While a process has the device by its own node, another is refused with its number and name.",
            "second_process",
            json!({"address": "vfio:0000:00:04.0?iommu=iommufd"}),
        ))
        .claim(
            write(
                "an_engine_takes_iommufd_where_the_kernel_has_it",
                "Not asked for anything, the engine takes the device's own node and iommufd, and data get through.",
                "vfio:0000:00:04.0",
                52,
            )
            .check(|evidence| evidence.image_is_as_told("a")),
        )
}

fn without_iommu(machine: Machine) -> Boot {
    let write = Claim::new(
        "an_engine_works_without_an_iommu_when_asked_for_by_name",
        "Data get through where the device is given physical addresses.",
        "engine_writes",
        json!({"address": "vfio-noiommu:0000:00:04.0", "shards": 2, "seed": 53}),
    );
    Boot::new("noiommu", machine)
        .with_foliant()
        .claim(commands::claim(
            "a_device_without_an_iommu_is_opened_only_when_that_is_said",
            "bind refuses without --noiommu; then the plain URI is refused with the right one, and that opens, with a \
             warning.",
            &[
                foliant(&["bind", ADDRESS], 1, &["no IOMMU group", "--noiommu"]),
                foliant(&["bind", ADDRESS, "--noiommu"], 0, &[]),
                foliant(&["identify", "vfio:0000:00:04.0"], 1, &["vfio-noiommu:0000:00:04.0"]),
                foliant(&["identify", "vfio-noiommu:0000:00:04.0"], 0, &["LAB0", "no IOMMU"]),
            ],
        ))
        .claim(write.check(|evidence| evidence.image_is_as_told("a")))
}
