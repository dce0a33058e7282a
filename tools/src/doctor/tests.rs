//! Each shortfall with its command, on hosts made of files.

use std::os::unix::fs::PermissionsExt;

use foliant_nvme_pci::fake::{FakeFunction, FakeHost};

use super::*;

const ADDRESS: &str = "0000:01:00.0";

/// A machine on which everything is as it should be, and a controller on vfio-pci: each test breaks one thing.
fn ready_host() -> FakeHost {
    let fake = FakeHost::new();
    fake.function(FakeFunction { driver: Some("vfio-pci"), ..FakeFunction::NVME });
    fake.directory("sys/class/iommu/dmar0");
    for module in ["vfio", "vfio_iommu_type1", "iommufd"] {
        fake.directory(format!("sys/module/{module}"));
    }
    fake.write("proc/sys/kernel/osrelease", "6.12.0-test\n");
    fake.write("proc/cmdline", "root=/dev/sda1 quiet\n");
    fake.write("proc/cpuinfo", "vendor_id\t: GenuineIntel\nflags\t\t: fpu sse\n");
    fake.write("proc/interrupts", "  9:  0  IR-IO-APIC    9-fasteoi   acpi\n");
    fake.write("proc/meminfo", "MemAvailable:   16777216 kB\nHugepagesize:       2048 kB\n");
    fake.write("sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages", "1000\n");
    fake.write("sys/devices/system/node/node0/hugepages/hugepages-2048kB/free_hugepages", "600\n");
    fake.write("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n");
    fake.write("proc/self/status", "CapEff:\t000001ffffffffff\n");
    fake.write("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance\n");
    fake.write("sys/devices/system/cpu/isolated", "6-7\n");
    fake.write("sys/devices/system/cpu/nohz_full", "6-7\n");
    fake.write("sys/devices/system/cpu/online", "0-7\n");
    fake.write("etc/passwd", "root:x:0:0::/:/bin/sh\ndb:x:4711:4711::/:/bin/sh\n");
    fake.write("etc/default/grub", "GRUB_CMDLINE_LINUX=\"\"\n");
    fake.write("usr/sbin/update-grub", "");
    fake
}

fn options() -> DoctorOptions {
    DoctorOptions { device: None, user: Some("root".to_owned()), cache: ByteSize(1 << 30), json: false }
}

fn as_user(name: &str) -> DoctorOptions {
    DoctorOptions { user: Some(name.to_owned()), ..options() }
}

fn examined(fake: &FakeHost, options: &DoctorOptions) -> Examination {
    let host = fake.host();
    examine(&Subject::new(&host, options).unwrap()).unwrap()
}

/// All findings but those that are fine.
fn shortfalls(fake: &FakeHost, options: &DoctorOptions) -> Vec<Finding> {
    let findings = examined(fake, options).findings;
    findings.into_iter().filter(|finding| finding.severity != Severity::Fine).collect()
}

/// The only shortfall there is, which must have this severity and say this.
#[track_caller]
fn only_shortfall(fake: &FakeHost, options: &DoctorOptions, severity: Severity, words: &str) -> Finding {
    let mut found = shortfalls(fake, options);
    assert_eq!(found.len(), 1, "{found:#?}");
    let finding = found.remove(0);
    assert_eq!(finding.severity, severity, "{finding:?}");
    assert!(finding.says.contains(words), "{words:?}: {finding:?}");
    finding
}

#[test]
fn a_machine_that_is_ready_has_no_shortfall_and_names_the_next_command() {
    let examination = examined(&ready_host(), &options());
    assert_eq!(examination.verdict, Verdict::Passed, "{examination:#?}");
    assert!(
        examination.findings.iter().all(|finding| finding.severity == Severity::Fine),
        "{examination:#?}"
    );
    assert_eq!(examination.next[0], "foliant identify vfio:0000:01:00.0");
    assert!(examination.table().to_string().contains("Nothing blocks. Next:"));
}

#[test]
fn an_empty_machine_is_told_every_step_to_a_working_device() {
    let examination = examined(&FakeHost::new(), &options());
    assert_eq!(examination.verdict, Verdict::Failed);
    let areas: Vec<&str> = examination
        .findings
        .iter()
        .filter(|finding| finding.severity == Severity::Blocks)
        .map(|finding| finding.area)
        .collect();
    assert_eq!(areas, ["controllers", "IOMMU", "kernel modules"]);
    let text = examination.table().to_string();
    for words in ["add a drive", "foliant bind ADDRESS", "foliant identify vfio:ADDRESS", "foliant bench"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 130), "{text}");
}

#[test]
fn a_host_without_any_pci_bus_is_examined_too() {
    let fake = FakeHost::new();
    fake.remove("sys/bus");
    assert_eq!(examined(&fake, &options()).verdict, Verdict::Failed);
}

#[test]
fn a_device_that_is_not_there_or_no_controller_is_an_error() {
    let fake = ready_host();
    fake.function(FakeFunction { address: "0000:09:00.0", class: 0x02_00_00, ..FakeFunction::NVME });
    let host = fake.host();
    let asked = |text: &str| DoctorOptions { device: Some(text.parse().unwrap()), ..options() };
    let error = |text| Subject::new(&host, &asked(text)).err().unwrap().to_string();
    assert!(error("08:00.0").contains("no PCI function at 0000:08:00.0"));
    assert!(error("09:00.0").contains("no NVMe controller"));
}

/// A ready machine without groups: the controller is back with the kernel.
fn host_without_iommu() -> FakeHost {
    let fake = ready_host();
    fake.remove("sys/kernel/iommu_groups");
    fake.remove("sys/bus/pci/devices/0000:01:00.0/iommu_group");
    fake.bind(ADDRESS.parse().unwrap(), Some("nvme"));
    fake.controller(ADDRESS, "nvme0");
    fake
}

#[track_caller]
fn iommu_shortfall(fake: &FakeHost, words: &str) -> Finding {
    let finding = shortfalls(fake, &options()).into_iter().find(|finding| finding.area == "IOMMU").unwrap();
    assert_eq!(finding.severity, Severity::Blocks);
    assert!(finding.says.contains(words), "{words:?}: {finding:?}");
    finding
}

#[test]
fn an_intel_iommu_that_the_kernel_does_not_use_is_switched_on_by_the_boot_loader_that_is_there() {
    let fake = host_without_iommu();
    fake.write("sys/firmware/acpi/tables/DMAR", "");
    let finding = iommu_shortfall(&fake, "VT-d");
    assert!(finding.reboot);
    assert_eq!(
        finding.commands,
        [
            "echo 'GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX intel_iommu=on iommu=pt\"' >> /etc/default/grub",
            "update-grub"
        ]
    );
    fake.directory("etc/default/grub.d");
    assert!(iommu_shortfall(&fake, "VT-d").commands[0].ends_with(">> /etc/default/grub.d/90-foliant.cfg"));
    fake.write("usr/sbin/grubby", "");
    let commands = iommu_shortfall(&fake, "VT-d").commands;
    assert_eq!(commands, ["grubby --update-kernel=ALL --args=\"intel_iommu=on iommu=pt\""]);
    fake.remove("usr/sbin/grubby");
    fake.remove("etc/default");
    assert_eq!(iommu_shortfall(&fake, "add intel_iommu=on iommu=pt to its").commands, [] as [&str; 0]);
    fake.write("etc/kernel/cmdline", "quiet\n");
    assert_eq!(iommu_shortfall(&fake, "VT-d").commands[1], "kernel-install add-all");
}

#[test]
fn an_iommu_that_was_switched_off_is_switched_on_again() {
    let fake = host_without_iommu();
    fake.write("proc/cmdline", "quiet intel_iommu=off\n");
    let finding = iommu_shortfall(&fake, "booted with intel_iommu=off");
    assert_eq!(finding.commands, ["sed -i 's/\\bintel_iommu=off\\b//' /etc/default/grub", "update-grub"]);
}

#[test]
fn an_iommu_that_was_asked_for_and_is_not_used_is_looked_up_in_the_log() {
    let fake = host_without_iommu();
    fake.write("proc/cmdline", "quiet intel_iommu=on\n");
    assert!(iommu_shortfall(&fake, "its log says why").commands[0].starts_with("dmesg"));
}

#[test]
fn firmware_without_an_iommu_is_named_by_vendor() {
    let fake = host_without_iommu();
    let finding = iommu_shortfall(&fake, "switch on VT-d");
    assert_eq!(finding.commands[0], "systemctl reboot --firmware-setup");
    fake.write("proc/cpuinfo", "vendor_id\t: AuthenticAMD\nflags\t\t: fpu svm\n");
    assert_eq!(iommu_shortfall(&fake, "AMD-Vi").commands, ["systemctl reboot --firmware-setup"]);
    fake.write("sys/firmware/acpi/tables/IVRS", "");
    assert!(iommu_shortfall(&fake, "AMD-Vi").commands[0].starts_with("dmesg"));
    fake.remove("sys/firmware");
    fake.write("proc/cpuinfo", "CPU implementer\t: 0x41\n");
    assert!(iommu_shortfall(&fake, "no groups").commands[0].starts_with("dmesg"));
}

#[test]
fn a_virtual_machine_without_an_iommu_is_told_its_two_ways() {
    let fake = host_without_iommu();
    fake.write("proc/cpuinfo", "vendor_id\t: AuthenticAMD\nflags\t\t: fpu hypervisor\n");
    iommu_shortfall(&fake, "-device intel-iommu");
    let findings = examined(&fake, &options()).findings;
    let way = |findings: &[Finding]| {
        let is_way = |finding: &&Finding| finding.area == "IOMMU" && finding.severity == Severity::Fine;
        findings.iter().find(is_way).unwrap().clone()
    };
    assert_eq!(way(&findings).commands, ["foliant bind 0000:01:00.0 --noiommu"]);
    fake.write("boot/config-6.12.0-test", "# CONFIG_VFIO_NOIOMMU is not set\n");
    assert!(way(&examined(&fake, &options()).findings).says.contains("isn't possible either"));
}

#[test]
fn interrupts_that_are_not_remapped_block_unless_that_was_allowed() {
    let fake = ready_host();
    fake.write("proc/interrupts", "  9:  0  IO-APIC    9-fasteoi   acpi\n");
    let finding = only_shortfall(&fake, &options(), Severity::Blocks, "interrupts aren't remapped");
    assert!(finding.commands[0].contains("allow_unsafe_interrupts=1"));
    fake.write("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n");
    only_shortfall(&fake, &options(), Severity::Slows, "interrupts aren't remapped");
}

#[test]
fn missing_modules_block_with_the_package_that_has_them() {
    let fake = ready_host();
    fake.remove("sys/module/vfio_iommu_type1");
    only_shortfall(&fake, &options(), Severity::Blocks, "no /lib/modules/6.12.0-test");
    fake.write("lib/modules/6.12.0-test/modules.dep", "kernel/drivers/nvme/host/nvme.ko.xz:\n");
    for (distribution, command) in [
        ("ID=debian\n", "apt install linux-image-amd64"),
        ("ID=mint\nID_LIKE=\"ubuntu debian\"\n", "apt install linux-modules-extra-6.12.0-test"),
        ("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n", "dnf install kernel-modules-6.12.0-test"),
    ] {
        fake.write("etc/os-release", distribution);
        let finding =
            only_shortfall(&fake, &options(), Severity::Blocks, "vfio_iommu_type1: not in the kernel");
        assert_eq!(finding.commands, [command]);
    }
    fake.write("etc/os-release", "ID=other\n");
    only_shortfall(&fake, &options(), Severity::Blocks, "CONFIG_VFIO_IOMMU_TYPE1");
}

#[test]
fn modules_that_can_be_loaded_or_are_part_of_the_kernel_are_no_shortfall() {
    let fake = ready_host();
    for module in ["vfio", "vfio_iommu_type1", "iommufd"] {
        fake.remove(format!("sys/module/{module}"));
    }
    let vfio = "kernel/drivers/vfio";
    fake.write(
        "lib/modules/6.12.0-test/modules.dep",
        &format!("{vfio}/vfio_iommu_type1.ko.xz: {vfio}/vfio.ko.xz\n"),
    );
    fake.write("lib/modules/6.12.0-test/modules.builtin", &format!("{vfio}/vfio.ko\n"));
    let finding = only_shortfall(&fake, &options(), Severity::Blocks, "a controller is bound already");
    assert_eq!(finding.commands, ["modprobe vfio_iommu_type1"]);
    fake.bind(ADDRESS.parse().unwrap(), Some("nvme"));
    fake.controller(ADDRESS, "nvme0");
    let examination = examined(&fake, &options());
    let says: Vec<&str> = examination
        .findings
        .iter()
        .filter(|finding| finding.area == "kernel modules" && finding.severity == Severity::Fine)
        .map(|finding| finding.says.as_str())
        .collect();
    assert_eq!(says[0], "vfio, vfio-pci: loaded, or part of the kernel");
    assert_eq!(says[1], "vfio_iommu_type1: there, and loaded by foliant bind");
    assert!(says[2].starts_with("iommufd: not in this kernel"));
}

#[test]
fn too_few_hugepages_on_the_devices_node_slow_and_the_command_names_the_node() {
    let fake = ready_host();
    let large = DoctorOptions { cache: ByteSize(4 << 30), ..options() };
    let finding = only_shortfall(&fake, &large, Severity::Slows, "600 of 2 MiB free on NUMA node 0");
    // 1000 are reserved, 600 of them free, and 2048 + 8 wanted.
    let node = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages";
    assert_eq!(finding.commands[0], format!("echo 2456 > {node}"));
    assert!(finding.commands[1].contains("vm.nr_hugepages=2456"));
}

#[test]
fn more_hugepages_than_there_is_memory_are_not_proposed() {
    let fake = ready_host();
    let huge = DoctorOptions { cache: ByteSize(1 << 40), ..options() };
    let finding = only_shortfall(&fake, &huge, Severity::Slows, "only 16 GiB of memory is available");
    assert_eq!(finding.commands, [] as [&str; 0]);
}

#[test]
fn hugepages_of_the_machine_are_looked_at_where_the_device_has_no_node() {
    let fake = FakeHost::new();
    fake.write("proc/meminfo", "Hugepagesize:       2048 kB\n");
    fake.write("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "7\n");
    let finding =
        shortfalls(&fake, &options()).into_iter().find(|finding| finding.area == "hugepages").unwrap();
    assert_eq!(finding.commands[0], "echo 527 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages");
    fake.write("proc/meminfo", "MemTotal: 1 kB\n");
    assert!(shortfalls(&fake, &options()).iter().any(|finding| finding.says.contains("CONFIG_HUGETLBFS")));
}

#[test]
fn without_an_iommu_one_large_hugepage_is_a_must_and_the_missing_protection_is_said() {
    let fake = ready_host();
    fake.write("sys/kernel/iommu_groups/12/name", "vfio-noiommu\n");
    let small = DoctorOptions { cache: ByteSize(256 << 20), ..options() };
    let blocking =
        shortfalls(&fake, &small).into_iter().find(|finding| finding.severity == Severity::Blocks).unwrap();
    assert!(blocking.says.contains("one physical stretch") && blocking.reboot, "{blocking:?}");
    assert!(blocking.commands[0].contains("default_hugepagesz=1G hugepagesz=1G hugepages=1"), "{blocking:?}");
    fake.write("proc/meminfo", "MemAvailable:   16777216 kB\nHugepagesize:       1048576 kB\n");
    let pool = "sys/devices/system/node/node0/hugepages/hugepages-1048576kB";
    fake.write(format!("{pool}/nr_hugepages"), "1\n");
    fake.write(format!("{pool}/free_hugepages"), "1\n");
    let finding = only_shortfall(&fake, &small, Severity::Slows, "anywhere in this machine's memory");
    assert_eq!(finding.area, "IOMMU");
    assert_eq!(examined(&fake, &options()).next[0], "foliant identify vfio-noiommu:0000:01:00.0");
    let large = DoctorOptions { cache: ByteSize(4 << 30), ..options() };
    let blocking: Vec<Finding> = shortfalls(&fake, &large)
        .into_iter()
        .filter(|finding| finding.severity == Severity::Blocks)
        .collect();
    assert_eq!((blocking.len(), blocking[0].area), (1, "hugepages"));
}

#[test]
fn transparent_hugepages_that_are_off_slow() {
    let fake = ready_host();
    fake.write("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n");
    let finding = only_shortfall(&fake, &options(), Severity::Slows, "transparent ones are off");
    assert_eq!(finding.commands, ["echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"]);
}

/// A ready machine whose nodes everybody may open.
fn host_for_users() -> FakeHost {
    let fake = ready_host();
    set_mode(&fake, 0o666);
    fake.process(50, "db");
    fake.write("proc/50/status", "Name:\tdb\nUid:\t4711\t4711\t4711\t4711\n");
    fake.write(
        "proc/50/limits",
        "Max locked memory         unlimited            unlimited            bytes     \n",
    );
    fake
}

fn set_mode(fake: &FakeHost, mode: u32) {
    std::fs::set_permissions(fake.path("dev/vfio/12"), std::fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_memory_lock_limit_below_cache_and_queues_blocks() {
    let fake = host_for_users();
    assert_eq!(shortfalls(&fake, &as_user("db")), []);
    fake.write(
        "proc/50/limits",
        "Max locked memory         8388608              8388608              bytes     \n",
    );
    let finding = only_shortfall(&fake, &as_user("db"), Severity::Blocks, "db may lock 8 MiB");
    assert!(finding.says.contains("LimitMEMLOCK") && finding.says.contains("CAP_IPC_LOCK"));
    assert_eq!(finding.commands, ["echo 'db - memlock unlimited' > /etc/security/limits.d/90-foliant.conf"]);
    fake.write(
        "proc/50/limits",
        "Max locked memory         2147483648           2147483648           bytes     \n",
    );
    assert_eq!(shortfalls(&fake, &as_user("db")), []);
    fake.remove("proc/50");
    let finding = only_shortfall(&fake, &as_user("db"), Severity::Slows, "can't be seen from here");
    assert!(finding.commands[0].contains("ulimit -l"));
}

#[test]
fn who_runs_the_doctor_is_bound_by_the_own_limit_unless_the_capability_is_held() {
    let fake = ready_host();
    let own = rustix::process::geteuid().as_raw().to_string();
    set_mode(&fake, 0o666);
    // Root in a container often lacks CAP_IPC_LOCK, bit 14.
    fake.write("proc/self/status", "CapEff:\t00000000a80425fb\n");
    fake.write(
        "proc/self/limits",
        "Max locked memory         65536                65536                bytes     \n",
    );
    only_shortfall(&fake, &as_user(&own), Severity::Blocks, "may lock 64 KiB");
    fake.write("proc/self/status", "CapEff:\t0000000000004000\n");
    assert_eq!(shortfalls(&fake, &as_user(&own)), []);
}

#[test]
fn a_node_that_the_user_may_not_open_blocks_with_the_command_that_gives_it() {
    let fake = host_for_users();
    set_mode(&fake, 0o600);
    let finding = only_shortfall(&fake, &as_user("db"), Severity::Blocks, "db may not open");
    assert_eq!(finding.commands, ["foliant bind 0000:01:00.0 --owner db"]);
    assert_eq!(shortfalls(&fake, &options()), []);
    set_mode(&fake, 0o666);
    fake.write("dev/vfio/vfio", "");
    std::fs::set_permissions(fake.path("dev/vfio/vfio"), std::fs::Permissions::from_mode(0o600)).unwrap();
    let finding = only_shortfall(&fake, &as_user("db"), Severity::Blocks, "/dev/vfio/vfio");
    assert_eq!(finding.commands, ["chmod 0666 /dev/vfio/vfio"]);
}

#[test]
fn a_kernel_without_group_nodes_needs_the_devices_node_and_iommufds() {
    let fake = host_for_users();
    fake.remove("dev/vfio/12");
    only_shortfall(&fake, &as_user("db"), Severity::Blocks, "has no node under /dev/vfio");
    fake.write("sys/bus/pci/devices/0000:01:00.0/vfio-dev/vfio3/dev", "511:3\n");
    fake.write("dev/vfio/devices/vfio3", "");
    let all = |node: &str, mode| {
        std::fs::set_permissions(fake.path(node), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    all("dev/vfio/devices/vfio3", 0o600);
    only_shortfall(&fake, &as_user("db"), Severity::Blocks, "dev/vfio/devices/vfio3");
    all("dev/vfio/devices/vfio3", 0o666);
    let finding = only_shortfall(&fake, &as_user("db"), Severity::Blocks, "may not open /dev/iommu");
    assert_eq!(finding.commands, ["setfacl -m u:db:rw /dev/iommu"]);
    fake.write("dev/iommu", "");
    all("dev/iommu", 0o666);
    assert_eq!(shortfalls(&fake, &as_user("db")), []);
}

#[test]
fn a_device_without_an_iommu_is_roots_alone() {
    let fake = host_for_users();
    fake.write("sys/kernel/iommu_groups/12/name", "vfio-noiommu\n");
    let blocking = shortfalls(&fake, &as_user("db"));
    assert!(blocking.iter().any(|finding| finding.says.contains("CAP_SYS_RAWIO")), "{blocking:#?}");
}

#[test]
fn a_governor_that_saves_power_slows() {
    let fake = ready_host();
    fake.write("sys/devices/system/cpu/cpu1/cpufreq/scaling_governor", "powersave\n");
    let finding = only_shortfall(&fake, &options(), Severity::Slows, "1 of 2 have the governor powersave");
    let command = "echo performance | tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor";
    assert_eq!(finding.commands, [command]);
}

#[test]
fn processors_are_proposed_for_isolation_near_the_device_and_only_where_there_are_enough() {
    let fake = ready_host();
    fake.write("sys/devices/system/cpu/isolated", "\n");
    fake.write("sys/bus/pci/devices/0000:01:00.0/local_cpulist", "0-3\n");
    let finding = only_shortfall(&fake, &options(), Severity::Slows, "none is set aside");
    assert!(finding.commands[0].contains("isolcpus=2,3 nohz_full=2,3 rcu_nocbs=2,3"), "{finding:?}");
    assert!(finding.reboot);
    fake.write("sys/bus/pci/devices/0000:01:00.0/local_cpulist", "0-1\n");
    let finding = only_shortfall(&fake, &options(), Severity::Slows, "none is set aside");
    assert!(finding.commands[0].contains("isolcpus=6,7"), "{finding:?}");
    fake.write("sys/devices/system/cpu/online", "0-1\n");
    assert_eq!(shortfalls(&fake, &options()), []);
}

/// A ready machine whose controller is still with the kernel.
fn unbound_host() -> FakeHost {
    let fake = ready_host();
    fake.bind(ADDRESS.parse().unwrap(), Some("nvme"));
    fake.controller(ADDRESS, "nvme0");
    fake.namespace("nvme0", "nvme0n1", "259:0");
    fake
}

#[test]
fn a_controller_that_is_free_blocks_until_it_is_bound() {
    let fake = unbound_host();
    let finding = only_shortfall(&fake, &options(), Severity::Blocks, "nobody uses it");
    assert_eq!(finding.commands, ["foliant bind 0000:01:00.0"]);
    let finding = shortfalls(&fake, &as_user("db")).into_iter().find(|finding| finding.area == "controllers");
    assert_eq!(finding.unwrap().commands, ["foliant bind 0000:01:00.0 --owner db"]);
    assert_eq!(examined(&fake, &options()).next[0], "foliant bind 0000:01:00.0");
}

#[test]
fn of_several_free_controllers_one_is_to_be_bound() {
    let fake = unbound_host();
    fake.function(FakeFunction { address: "0000:02:00.0", group: Some(13), ..FakeFunction::NVME });
    fake.controller("0000:02:00.0", "nvme1");
    only_shortfall(
        &fake,
        &options(),
        Severity::Blocks,
        "0000:01:00.0 (Fake SSD 9000) is with the driver nvme",
    );
}

#[test]
fn a_controller_in_use_blocks_with_what_uses_it() {
    let fake = unbound_host();
    fake.mount("259:0", "/dev/nvme0n1", "/");
    only_shortfall(&fake, &options(), Severity::Blocks, "the system runs from this one");
}

#[test]
fn a_controller_whose_use_is_in_doubt_or_whose_group_is_shared_blocks() {
    let fake = unbound_host();
    fake.link("proc/self/ns/pid", "pid:[4026532999]");
    only_shortfall(&fake, &options(), Severity::Blocks, "can't tell who uses it");
    let fake = ready_host();
    let neighbour = FakeFunction {
        address: "0000:03:00.0",
        class: 0x02_00_00,
        driver: Some("e1000e"),
        ..FakeFunction::NVME
    };
    fake.function(neighbour);
    only_shortfall(&fake, &options(), Severity::Blocks, "0000:03:00.0 of the same IOMMU group");
    let fake = FakeHost::new();
    fake.function(FakeFunction { driver: Some("uio_pci_generic"), ..FakeFunction::NVME });
    assert!(shortfalls(&fake, &options()).iter().any(|finding| finding.says.contains("uio_pci_generic")));
}

#[test]
fn one_controller_that_is_ready_is_enough_unless_another_is_asked_for() {
    let fake = ready_host();
    fake.function(FakeFunction { address: "0000:02:00.0", group: Some(13), ..FakeFunction::NVME });
    fake.controller("0000:02:00.0", "nvme1");
    fake.namespace("nvme1", "nvme1n1", "259:9");
    fake.mount("259:9", "/dev/nvme1n1", "/");
    assert_eq!(shortfalls(&fake, &options()), []);
    let asked = DoctorOptions { device: Some("02:00.0".parse().unwrap()), ..options() };
    only_shortfall(&fake, &asked, Severity::Blocks, "nvme1n1 is mounted at /");
}

#[test]
fn json_says_what_the_table_says() {
    let fake = unbound_host();
    let json = serde_json::to_value(examined(&fake, &options())).unwrap();
    assert_eq!((&json["verdict"], &json["user"]), (&"failed".into(), &"root".into()));
    let findings = json["findings"].as_array().unwrap();
    let blocking = findings.iter().find(|finding| finding["severity"] == "blocks").unwrap();
    assert_eq!(blocking["commands"][0], "foliant bind 0000:01:00.0");
}

/// A ready machine with two nodes; the controller is on the first.
fn host_of_two_nodes() -> FakeHost {
    let fake = ready_host();
    for (node, cpus) in [(0, "0-3"), (1, "4-7")] {
        fake.write(format!("sys/devices/system/node/node{node}/cpulist"), &format!("{cpus}\n"));
        let pool = format!("sys/devices/system/node/node{node}/hugepages/hugepages-2048kB");
        fake.write(format!("{pool}/nr_hugepages"), "1000\n");
        fake.write(format!("{pool}/free_hugepages"), "600\n");
    }
    fake.write("sys/devices/system/cpu/isolated", "2-3\n");
    fake
}

#[test]
fn each_node_and_the_node_of_each_controller_are_told() {
    let findings = examined(&host_of_two_nodes(), &options()).findings;
    let says: Vec<&str> =
        findings.iter().filter(|finding| finding.area == "NUMA").map(|finding| &finding.says[..]).collect();
    assert_eq!(says.len(), 3, "{says:?}");
    assert_eq!(says[0], "node 0: processors 0-3, 600 of 1000 hugepages of 2048kB free");
    assert!(says[1].starts_with("node 1: processors 4-7"));
    assert!(says[2].starts_with("0000:01:00.0 is on node 0") && says[2].contains("0-3"), "{}", says[2]);
    assert!(shortfalls(&host_of_two_nodes(), &options()).is_empty());
}

#[test]
fn processors_set_aside_on_the_wrong_node_cost_speed() {
    let fake = host_of_two_nodes();
    fake.write("sys/devices/system/cpu/isolated", "6-7\n");
    let finding = only_shortfall(&fake, &options(), Severity::Slows, "(6,7) are all on others");
    assert!(finding.commands.iter().any(|command| command.contains("isolcpus=2,3")), "{finding:?}");
    fake.write("sys/devices/system/cpu/isolated", "3,6\n");
    assert!(shortfalls(&fake, &options()).is_empty(), "one near the device is enough");
}

#[test]
fn a_controller_whose_node_nobody_tells_costs_speed_on_a_machine_with_several() {
    let fake = host_of_two_nodes();
    fake.write("sys/bus/pci/devices/0000:01:00.0/numa_node", "-1\n");
    // Hugepages are then counted over the whole machine.
    fake.write("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "2000\n");
    fake.write("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "1200\n");
    let finding = only_shortfall(&fake, &options(), Severity::Slows, "the firmware doesn't say");
    assert_eq!(finding.commands, ["echo 0 > /sys/bus/pci/devices/0000:01:00.0/numa_node"]);
}
