//! Who uses a function, on hosts made of files: each way of using a device, and each way of not being able to tell.

use crate::fake::{FakeFunction, FakeHost};
use crate::{Doubt, Host, Usage, Use};

const ADDRESS: &str = "0000:01:00.0";

/// One controller on the kernel's driver with one namespace of two partitions.
fn kernel_host() -> FakeHost {
    let fake = FakeHost::new();
    fake.function(FakeFunction::NVME);
    fake.controller(ADDRESS, "nvme0");
    fake.namespace("nvme0", "nvme0n1", "259:0");
    fake.partition("nvme0n1", "nvme0n1p1", "259:1");
    fake.partition("nvme0n1", "nvme0n1p2", "259:2");
    fake
}

/// One controller on vfio-pci.
fn vfio_host() -> FakeHost {
    let fake = FakeHost::new();
    fake.function(FakeFunction { driver: Some("vfio-pci"), ..FakeFunction::NVME });
    fake
}

fn usage_on(host: &Host) -> Usage {
    host.usage(&host.function(ADDRESS.parse().unwrap()).unwrap()).unwrap()
}

/// The uses as people read them; nothing may be in doubt.
#[track_caller]
fn uses(fake: &FakeHost) -> Vec<String> {
    let usage = usage_on(&fake.host());
    assert_eq!(usage.doubts, []);
    usage.uses.iter().map(ToString::to_string).collect()
}

#[test]
fn a_controller_that_nobody_uses_is_unused() {
    let fake = kernel_host();
    let usage = usage_on(&fake.host());
    assert!(usage.is_unused(), "{usage:?}");
    assert_eq!(usage.block_nodes, [fake.path("dev/nvme0n1")]);
    assert!(usage_on(&vfio_host().host()).is_unused());
}

#[test]
fn a_mount_of_a_namespace_or_partition_is_a_use() {
    let fake = kernel_host();
    fake.mount("259:2", "/dev/nvme0n1p2", "/srv/my\\040data");
    fake.mount("8:2", "/dev/sda2", "/other");
    assert_eq!(uses(&fake), ["nvme0n1p2 is mounted at /srv/my data"]);
    fake.mount("259:0", "/dev/nvme0n1", "/whole");
    assert_eq!(uses(&fake).len(), 2);
}

#[test]
fn a_mount_by_way_of_lvm_is_a_use_and_names_the_volume() {
    let fake = kernel_host();
    fake.holder("nvme0n1p1", "dm-0", "254:0");
    fake.write("sys/class/block/dm-0/dm/name", "vg-root\n");
    fake.write("sys/class/block/dm-0/dm/uuid", "LVM-x1y2\n");
    fake.mount("254:0", "/dev/mapper/vg-root", "/data");
    assert_eq!(
        uses(&fake),
        ["nvme0n1p1 is held by the LVM volume vg-root (dm-0)", "dm-0 (vg-root) is mounted at /data"]
    );
}

#[test]
fn holders_upon_holders_are_followed() {
    let fake = kernel_host();
    fake.holder("nvme0n1", "md0", "9:0");
    fake.directory("sys/class/block/md0/md");
    fake.partition("md0", "md0p1", "259:7");
    fake.holder("md0p1", "dm-1", "254:1");
    fake.write("sys/class/block/dm-1/dm/name", "secret\n");
    fake.write("sys/class/block/dm-1/dm/uuid", "CRYPT-LUKS2-y\n");
    fake.append("proc/swaps", "/dev/dm-1 partition 1000 0 -2\n");
    assert_eq!(
        uses(&fake),
        [
            "nvme0n1 is held by the RAID array md0",
            "md0p1 is held by the encrypted device secret (dm-1)",
            "dm-1 (secret) is swap"
        ]
    );
}

#[test]
fn swap_is_a_use_under_any_name_that_leads_to_it() {
    let fake = kernel_host();
    fake.link("dev/disk/by-label/swap", "../../nvme0n1p1");
    fake.append("proc/swaps", "/dev/disk/by-label/swap partition 1000 0 -2\n/swapfile file 8 0 -3\n");
    assert_eq!(uses(&fake), ["nvme0n1p1 is swap"]);
}

#[test]
fn file_systems_over_several_devices_are_found_by_source_and_by_sysfs() {
    let fake = kernel_host();
    // A mount of such a file system has an anonymous number, and for btrfs the name of one device only.
    fake.mount("0:45", "/dev/sdb:/dev/nvme0n1p1", "/cachefs");
    fake.mount("0:46", "/dev/sdb", "/pool");
    fake.write("sys/fs/btrfs/1234-5678/devices/nvme0n1p2", "");
    fake.directory("sys/fs/btrfs/features");
    assert_eq!(
        uses(&fake),
        ["nvme0n1p2 is held by the mounted btrfs 1234-5678", "nvme0n1p1 is mounted at /cachefs"]
    );
}

#[test]
fn a_mount_in_another_mount_namespace_is_a_use_and_names_who_sees_it() {
    let fake = kernel_host();
    fake.process(77, "container");
    fake.link("proc/77/ns/mnt", "mnt:[4026532000]");
    fake.write("proc/77/mountinfo", "1 0 259:1 / /inside rw - xfs /dev/nvme0n1p1 rw\n");
    fake.process(78, "same");
    assert_eq!(uses(&fake), ["nvme0n1p1 is mounted at /inside as process 77 (container) sees it"]);
}

#[test]
fn a_process_that_has_a_node_open_is_a_use() {
    for node in ["nvme0n1", "nvme0n1p2", "nvme0", "ng0n1"] {
        let fake = kernel_host();
        fake.write("sys/class/nvme-generic/ng0n1/dev", "242:0\n");
        fake.process(812, "postgres");
        fake.open(812, 0, "/dev/null");
        fake.open(812, 1, "socket:[123]");
        fake.open(812, 5, &format!("/dev/{node}"));
        fake.open(812, 6, &format!("/dev/{node}"));
        assert_eq!(uses(&fake), [format!("{node} is open in process 812 (postgres)")]);
    }
}

#[test]
fn a_node_opened_under_another_name_is_known_by_its_number() {
    let fake = kernel_host();
    fake.write("sys/class/nvme/nvme0/dev", "1:3\n");
    fake.process(9, "renamed");
    // The link says something that is no path of the host, and leads to a real device node.
    fake.link("proc/9/fd/4", "/dev/./null");
    assert_eq!(uses(&fake), ["nvme0 is open in process 9 (renamed)"]);
}

#[test]
fn multipath_heads_are_looked_at_instead_of_their_hidden_paths() {
    let fake = FakeHost::new();
    fake.function(FakeFunction::NVME);
    fake.controller(ADDRESS, "nvme0");
    fake.write("sys/class/nvme/nvme0/nvme3c0n1/size", "8\n");
    fake.block_device("sys/devices/virtual/nvme-subsystem/nvme-subsys3/nvme3n1", "nvme3n1", "259:4");
    fake.mount("259:4", "/dev/nvme3n1", "/shared");
    assert_eq!(uses(&fake), ["nvme3n1 is mounted at /shared"]);
    assert_eq!(usage_on(&fake.host()).block_nodes, [fake.path("dev/nvme3n1")]);
}

#[test]
fn a_namespace_shared_with_another_controller_is_used_through_that_too() {
    let fake = kernel_host();
    fake.function(FakeFunction { address: "0000:02:00.0", group: Some(13), ..FakeFunction::NVME });
    fake.controller("0000:02:00.0", "nvme1");
    fake.namespace("nvme1", "nvme1n1", "259:9");
    fake.mount("259:9", "/dev/nvme1n1", "/theirs");
    assert_eq!(uses(&fake), [] as [&str; 0]);
    let shared = fake.path("sys/class/nvme/nvme0/subsysnqn");
    fake.write("sys/class/nvme/nvme1/subsysnqn", &std::fs::read_to_string(shared).unwrap());
    fake.write("sys/class/nvme/nvme1/nvme1n1/wwid", "eui.nvme0n1\n");
    assert_eq!(uses(&fake), ["nvme1n1 is mounted at /theirs"]);
    let nodes = usage_on(&fake.host()).block_nodes;
    assert_eq!(nodes, [fake.path("dev/nvme0n1"), fake.path("dev/nvme1n1")]);
}

#[test]
fn loop_devices_and_exported_targets_are_holders() {
    let fake = kernel_host();
    fake.block_device("sys/devices/virtual/block/loop0", "loop0", "7:0");
    fake.write("sys/class/block/loop0/loop/backing_file", "/dev/nvme0n1p1\n");
    fake.mount("7:0", "/dev/loop0", "/looped");
    let target = "sys/kernel/config/nvmet/subsystems/nqn.export/namespaces/1/device_path";
    fake.write(target, "/dev/nvme0n1\n");
    assert_eq!(
        uses(&fake),
        [
            "nvme0n1p1 is held by the loop device loop0",
            "nvme0n1 is held by the NVMe target nqn.export",
            "loop0 is mounted at /looped"
        ]
    );
}

#[test]
fn a_process_that_has_a_vfio_node_open_is_a_use() {
    let fake = vfio_host();
    fake.write("sys/bus/pci/devices/0000:01:00.0/vfio-dev/vfio3/dev", "511:3\n");
    fake.process(30, "qemu");
    fake.open(30, 9, "/dev/vfio/devices/vfio3");
    fake.process(31, "foliant");
    fake.open(31, 4, "/dev/vfio/vfio");
    fake.open(31, 5, "/dev/vfio/12");
    assert_eq!(
        uses(&fake),
        ["vfio/devices/vfio3 is open in process 30 (qemu)", "vfio/12 is open in process 31 (foliant)"]
    );
}

#[test]
fn a_vfio_device_whose_node_was_closed_is_found_by_what_the_kernel_tells_of_it() {
    let fake = vfio_host();
    fake.process(31, "foliant");
    fake.open(31, 7, "anon_inode:[vfio-device]");
    assert_eq!(uses(&fake), [] as [&str; 0]);
    for (path, count) in
        [("/sys/devices/pci0000:00/0000:01:00.0", 1), ("/sys/devices/pci0000:00/0000:05:00.0", 0)]
    {
        fake.write("proc/31/fdinfo/7", &format!("pos:\t0\nvfio-device-syspath: {path}\n"));
        assert_eq!(uses(&fake).len(), count, "{path}");
    }
}

#[test]
fn a_function_switched_on_through_vfio_by_nobody_in_sight_is_in_doubt() {
    let fake = vfio_host();
    fake.process(31, "foliant");
    fake.open(31, 7, "anon_inode:[vfio-device]");
    fake.write("sys/bus/pci/devices/0000:01:00.0/enable", "1\n");
    let usage = usage_on(&fake.host());
    assert_eq!(usage.uses, []);
    let message = usage.doubts[0].to_string();
    assert!(message.contains("process 31 (foliant)") && message.contains("dev/vfio/12"), "{message}");
    fake.open(31, 8, "/dev/vfio/12");
    assert_eq!(uses(&fake), ["vfio/12 is open in process 31 (foliant)"]);
}

#[test]
fn a_driver_in_user_space_is_a_use() {
    let fake = FakeHost::new();
    fake.function(FakeFunction { driver: Some("uio_pci_generic"), ..FakeFunction::NVME });
    fake.directory("sys/bus/pci/devices/0000:01:00.0/uio/uio2");
    fake.process(40, "spdk_tgt");
    fake.open(40, 3, "/dev/uio2");
    fake.open(40, 4, "/sys/devices/pci0000:00/0000:01:00.0/resource0");
    fake.open(40, 5, "/sys/devices/pci0000:00/0000:02:00.0/resource0");
    fake.open(40, 6, "/sys/devices/pci0000:00/0000:01:00.0/config");
    assert_eq!(uses(&fake).len(), 2);
}

#[test]
fn processes_whose_files_cannot_be_read_leave_a_doubt() {
    let fake = kernel_host();
    fake.process(50, "secret");
    // A file in the place of the directory can't be listed, not even by root.
    fake.remove("proc/50/fd");
    fake.link("proc/50/fd", fake.path("proc/50/fd"));
    let doubt = || usage_on(&fake.host()).doubts[0].to_string();
    assert!(doubt().starts_with("the open files of process 50 (secret) can't be read; run this as root"));
    // Nor can one whose directory is shown and whose links aren't.
    fake.process(51, "hidden");
    fake.write("proc/51/fd/3", "no link");
    assert!(doubt().contains("process 50 (secret) and 1 more can't be read"));
}

#[test]
fn processes_that_are_not_shown_leave_a_doubt() {
    let fake = kernel_host();
    fake.link("proc/self/ns/pid", "pid:[4026532999]");
    assert_eq!(usage_on(&fake.host()).doubts, [Doubt::Hidden]);
    let fake = kernel_host();
    fake.remove("proc/1");
    assert_eq!(usage_on(&fake.host()).doubts, [Doubt::Hidden]);
}

#[test]
fn mounts_that_cannot_be_read_leave_a_doubt() {
    let fake = kernel_host();
    fake.remove("proc/self/mountinfo");
    let usage = usage_on(&fake.host());
    assert!(matches!(usage.doubts[..], [Doubt::NoMounts { .. }]), "{usage:?}");
    assert!(usage.uses.is_empty() && !usage.is_unused());
}

#[test]
fn a_controller_that_is_not_live_leaves_a_doubt() {
    let fake = kernel_host();
    fake.write("sys/class/nvme/nvme0/state", "resetting\n");
    assert!(usage_on(&fake.host()).doubts[0].to_string().contains("resetting"));
    fake.write("sys/class/nvme/nvme0/state", "dead\n");
    assert!(usage_on(&fake.host()).is_unused());
    fake.remove("sys/bus/pci/devices/0000:01:00.0/nvme");
    assert!(matches!(usage_on(&fake.host()).doubts[..], [Doubt::NotLive { .. }]));
}

#[test]
fn a_process_that_ends_meanwhile_is_no_doubt() {
    let fake = kernel_host();
    fake.directory("proc/60");
    assert!(usage_on(&fake.host()).is_unused());
}

#[test]
fn unreadable_sysfs_is_an_error_and_never_an_unused_device() {
    let fake = kernel_host();
    let holders = fake.path("sys/class/block/nvme0n1/holders");
    fake.remove("sys/class/block/nvme0n1/holders");
    std::os::unix::fs::symlink(&holders, &holders).unwrap();
    let host = fake.host();
    let function = host.function(ADDRESS.parse().unwrap()).unwrap();
    assert!(host.usage(&function).unwrap_err().to_string().contains("holders"));
}

#[test]
fn each_use_names_what_ends_it() {
    let fake = kernel_host();
    fake.mount("259:1", "/dev/nvme0n1p1", "/data");
    fake.mount("259:0", "/dev/nvme0n1", "/");
    fake.append("proc/swaps", "/dev/nvme0n1p2 partition 1000 0 -2\n");
    for (name, number, kind) in
        [("dm-0", "254:0", "LVM-a"), ("dm-1", "254:1", "CRYPT-a"), ("dm-2", "254:2", "x")]
    {
        fake.holder("nvme0n1", name, number);
        fake.write(format!("sys/class/block/{name}/dm/name"), &format!("named-{name}\n"));
        fake.write(format!("sys/class/block/{name}/dm/uuid"), &format!("{kind}\n"));
    }
    fake.holder("nvme0n1", "md0", "9:0");
    fake.directory("sys/class/block/md0/md");
    fake.holder("nvme0n1", "bcache0", "252:0");
    fake.process(812, "postgres");
    fake.open(812, 5, "/dev/nvme0n1");
    let remedies: Vec<String> = usage_on(&fake.host()).uses.iter().map(Use::remedy).collect();
    assert_eq!(
        remedies,
        [
            "take down bcache0",
            "lvchange --activate n /dev/mapper/named-dm-0",
            "cryptsetup close named-dm-1",
            "dmsetup remove named-dm-2",
            "mdadm --stop /dev/md0",
            "swapoff /dev/nvme0n1p2",
            "umount /data",
            "take another device, the system runs from this one",
            "kill 812"
        ]
    );
}
