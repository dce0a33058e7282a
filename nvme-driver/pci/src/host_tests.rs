//! What a host shows, on hosts made of files.

use crate::fake::{FakeFunction, FakeHost};
use crate::{Host, KernelNamespace, PciAddress, PciError};

fn address(text: &str) -> PciAddress {
    text.parse().unwrap()
}

fn one_controller() -> FakeHost {
    let fake = FakeHost::new();
    fake.function(FakeFunction::NVME);
    fake.controller("0000:01:00.0", "nvme0");
    fake
}

#[test]
fn a_function_shows_its_ids_driver_group_and_node() {
    let fake = one_controller();
    let function = fake.host().function(address("01:00.0")).unwrap();
    assert!(function.is_nvme() && !function.is_bridge() && !function.noiommu);
    assert_eq!((function.vendor, function.device, function.class), (0x144d, 0xa80a, 0x01_08_02));
    assert_eq!((function.driver.as_deref(), function.driver_override.as_deref()), (Some("nvme"), None));
    assert_eq!((function.iommu_group, function.numa_node), (Some(12), Some(0)));
    assert_eq!(function.group_node(), Some(fake.path("dev/vfio/12").as_path()));
    assert_eq!(function.vfio_cdev, None);
}

#[test]
fn a_function_without_group_or_node_has_none() {
    let fake = FakeHost::new();
    fake.function(FakeFunction { group: None, numa_node: -1, driver: None, ..FakeFunction::NVME });
    let function = fake.host().function(address("01:00.0")).unwrap();
    assert_eq!((function.iommu_group, function.numa_node, function.driver.as_deref()), (None, None, None));
    assert_eq!((function.group_node(), &function.kernel), (None, &None));
}

#[test]
fn the_group_of_a_function_without_an_iommu_has_a_node_of_another_name() {
    let fake = FakeHost::new();
    fake.function(FakeFunction { driver: Some("vfio-pci"), ..FakeFunction::NVME });
    fake.write("sys/kernel/iommu_groups/12/name", "vfio-noiommu\n");
    let function = fake.host().function(address("01:00.0")).unwrap();
    assert!(function.noiommu);
    assert_eq!(function.group_node(), Some(fake.path("dev/vfio/noiommu-12").as_path()));
}

#[test]
fn the_newer_vfio_device_is_named_only_where_the_kernel_gave_it_a_number() {
    let fake = FakeHost::new();
    fake.function(FakeFunction { driver: Some("vfio-pci"), ..FakeFunction::NVME });
    let directory = "sys/bus/pci/devices/0000:01:00.0/vfio-dev/vfio3";
    fake.directory(directory);
    assert_eq!(fake.host().function(address("01:00.0")).unwrap().vfio_cdev, None);
    fake.write(format!("{directory}/dev"), "511:3\n");
    let cdev = fake.host().function(address("01:00.0")).unwrap().vfio_cdev;
    assert_eq!(cdev, Some(fake.path("dev/vfio/devices/vfio3")));
}

#[test]
fn a_missing_function_is_named_with_the_nearest_controllers() {
    let fake = FakeHost::new();
    let missing = |text: &str| fake.host().function(address(text)).unwrap_err().to_string();
    assert!(missing("09:00.0").contains("0000:09:00.0; this host shows no NVMe controller"));
    for place in ["0000:01:00.0", "0000:05:00.0", "10000:01:00.0"] {
        fake.function(FakeFunction { address: place, group: None, ..FakeFunction::NVME });
    }
    fake.function(FakeFunction { address: "0000:04:00.0", class: 0x02_00_00, ..FakeFunction::NVME });
    let message = missing("04:00.1");
    assert!(message.ends_with("are at 0000:05:00.0, 0000:01:00.0, 10000:01:00.0"), "{message}");
}

#[test]
fn a_host_without_pci_says_so() {
    let fake = FakeHost::new();
    fake.remove("sys/bus");
    let host = fake.host();
    assert!(matches!(host.nvme_functions(), Err(PciError::NoBus { .. })));
    assert!(host.function(address("01:00.0")).unwrap_err().to_string().contains("mount -t sysfs"));
}

#[test]
fn only_nvme_controllers_are_listed_and_in_order() {
    let fake = FakeHost::new();
    for (place, class) in
        [("0000:02:00.0", 0x01_08_02), ("0000:01:00.0", 0x01_08_02), ("0000:00:01.0", 0x06_04_00)]
    {
        fake.function(FakeFunction { address: place, class, ..FakeFunction::NVME });
    }
    // NVMe, but the administrative interface (03h), which has no I/O queues.
    fake.function(FakeFunction { address: "0000:03:00.0", class: 0x01_08_03, ..FakeFunction::NVME });
    let host = fake.host();
    let listed: Vec<String> =
        host.nvme_functions().unwrap().iter().map(|function| function.address.to_string()).collect();
    assert_eq!(listed, ["0000:01:00.0", "0000:02:00.0"]);
    let members = host.group_members(12).unwrap();
    assert_eq!(members.len(), 4);
    assert!(members[0].is_bridge());
    assert!(matches!(host.group_members(13), Err(PciError::NoGroup { group: 13 })));
}

#[test]
fn an_unreadable_id_names_file_and_value() {
    let fake = one_controller();
    fake.write("sys/bus/pci/devices/0000:01:00.0/vendor", "0xgggg\n");
    let message = fake.host().nvme_functions().unwrap_err().to_string();
    assert!(message.contains("0000:01:00.0/vendor") && message.contains("`0xgggg`"), "{message}");
}

fn namespaces(host: &Host) -> Vec<KernelNamespace> {
    host.function(address("01:00.0")).unwrap().kernel.unwrap().namespaces
}

#[test]
fn the_kernels_controller_shows_model_and_namespaces() {
    let fake = one_controller();
    fake.namespace("nvme0", "nvme0n1", "259:0");
    fake.namespace("nvme0", "nvme0n2", "259:1");
    fake.write("sys/class/nvme/nvme0/nvme0n2/queue/logical_block_size", "4096\n");
    fake.directory("sys/class/nvme/nvme0/ng0n1");
    fake.directory("sys/class/nvme/nvme0/hwmon1");
    let kernel = fake.host().function(address("01:00.0")).unwrap().kernel.unwrap();
    assert_eq!((kernel.name.as_str(), kernel.model.as_str()), ("nvme0", "Fake SSD 9000"));
    assert_eq!((kernel.serial.as_str(), kernel.firmware.as_str()), ("S0000001", "1.0"));
    let shown: Vec<(u32, &str, u64, u32)> = kernel
        .namespaces
        .iter()
        .map(|namespace| (namespace.id, namespace.name.as_str(), namespace.size_bytes, namespace.block_bytes))
        .collect();
    assert_eq!(shown, [(1, "nvme0n1", 1 << 30, 512), (2, "nvme0n2", 1 << 30, 4096)]);
}

#[test]
fn a_path_of_a_multipath_namespace_is_shown_as_its_head() {
    let fake = one_controller();
    fake.write("sys/class/nvme/nvme0/nvme3c0n2/size", "8\n");
    fake.block_device("sys/devices/virtual/nvme-subsystem/nvme-subsys3/nvme3n2", "nvme3n2", "259:4");
    let shown = namespaces(&fake.host());
    assert_eq!((shown[0].name.as_str(), shown[0].id, shown[0].size_bytes), ("nvme3n2", 2, 1 << 30));
}
