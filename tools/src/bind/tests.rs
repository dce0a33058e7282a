//! Every refusal, the exact writes of every success in their order, and every way back, on hosts made of files whose
//! drivers change as the kernel's do.

use std::fs::File;
use std::path::Path;

use foliant_nvme_pci::PciAddress;
use foliant_nvme_pci::fake::{FakeFunction, FakeHost};
use rustix::io::Errno;

use super::hands::Hands;
use super::*;

const ADDRESS: &str = "0000:01:00.0";

/// What goes wrong when.
struct Fault {
    /// Part of the line of the log that it meets.
    at: &'static str,
    /// Which of the lines it meets, from 0.
    nth: usize,
    then: Then,
}

enum Then {
    /// The operation fails.
    Fail(Errno),
    /// It succeeds without effect: a driver that doesn't take what it's offered.
    Ignore,
    /// Somebody does something just before it.
    Meanwhile(fn(&FakeHost)),
}

/// Stands in for the kernel: changes the host as a write would, and keeps a log.
struct FakeKernel<'a> {
    fake: &'a FakeHost,
    log: Vec<String>,
    faults: Vec<Fault>,
}

impl<'a> FakeKernel<'a> {
    fn new(fake: &'a FakeHost, faults: Vec<Fault>) -> Self {
        Self { fake, log: Vec::new(), faults }
    }

    /// Notes an operation. Answers whether it's to have an effect.
    fn note(&mut self, line: String) -> std::io::Result<bool> {
        self.log.push(line.clone());
        let mut has_effect = true;
        for fault in self.faults.iter().filter(|fault| line.contains(fault.at)) {
            let met = self.log.iter().filter(|line| line.contains(fault.at)).count() - 1;
            if met == fault.nth {
                match fault.then {
                    Then::Fail(errno) => return Err(errno.into()),
                    Then::Ignore => has_effect = false,
                    Then::Meanwhile(change) => change(self.fake),
                }
            }
        }
        Ok(has_effect)
    }

    fn relative(&self, path: &Path) -> String {
        path.strip_prefix(self.fake.path("")).expect("only the host is touched").display().to_string()
    }

    /// Offers the function to the drivers, as the kernel does.
    fn probe(&self, address: PciAddress) {
        let function = self.fake.host().function(address).unwrap();
        if function.driver.is_some() {
            return;
        }
        let driver = function.driver_override.as_deref().unwrap_or("nvme");
        if !self.fake.path("sys/bus/pci/drivers").join(driver).exists() {
            return;
        }
        let switch = std::fs::read_to_string(self.fake.path(NOIOMMU_SWITCH)).unwrap_or_default();
        if driver == "vfio-pci" && function.iommu_group.is_none() {
            if switch != "Y" {
                return;
            }
            self.fake.group(address, 0);
            self.fake.write("sys/kernel/iommu_groups/0/name", "vfio-noiommu\n");
            self.fake.write("dev/vfio/noiommu-0", "");
        }
        self.fake.bind(address, Some(driver));
    }
}

impl Hands for FakeKernel<'_> {
    fn write(&mut self, path: &Path, value: &str) -> std::io::Result<()> {
        let file = self.relative(path);
        if !self.note(format!("{file} = {}", value.trim()))? {
            return Ok(());
        }
        let (directory, name) = file.rsplit_once('/').unwrap();
        match name {
            "unbind" => {
                let address = value.parse().unwrap();
                let driver = self.fake.host().function(address).unwrap().driver;
                if driver.as_deref() != directory.rsplit('/').next() {
                    return Err(Errno::NODEV.into());
                }
                self.fake.bind(address, None);
            }
            "drivers_probe" => self.probe(value.parse().unwrap()),
            "driver_override" if value.trim().is_empty() => self.fake.write(&file, "(null)\n"),
            _ => self.fake.write(&file, value),
        }
        Ok(())
    }

    fn load_module(&mut self, module: &'static str) -> Result<(), String> {
        let has_effect = self.note(format!("modprobe {module}")).map_err(|error| error.to_string())?;
        match module {
            _ if !has_effect => {}
            "vfio_iommu_type1" => self.fake.directory("sys/module/vfio_iommu_type1"),
            _ => {
                self.fake.driver(module);
                self.fake.write(NOIOMMU_SWITCH, "N");
            }
        }
        Ok(())
    }

    fn claim(&mut self, node: &Path) -> std::io::Result<File> {
        self.note(format!("claim {}", self.relative(node)))?;
        File::open(node)
    }

    fn open_group(&mut self, node: &Path) -> std::io::Result<File> {
        self.note(format!("open {}", self.relative(node)))?;
        File::open(node)
    }

    fn settle(&mut self) {
        self.log.push("settle".to_owned());
    }

    fn give(&mut self, node: &Path, user_id: u32) -> std::io::Result<()> {
        self.note(format!("give {} to {user_id}", self.relative(node))).map(drop)
    }
}

/// A controller that nobody uses, on the kernel's driver, in a group of its own; vfio-pci is loaded.
fn free_host() -> FakeHost {
    let fake = FakeHost::new();
    fake.function(FakeFunction::NVME);
    fake.controller(ADDRESS, "nvme0");
    fake.namespace("nvme0", "nvme0n1", "259:0");
    fake.partition("nvme0n1", "nvme0n1p1", "259:1");
    fake.driver("vfio-pci");
    fake.directory("sys/module/vfio_iommu_type1");
    fake.write("etc/passwd", "db:x:4711:4711::/:/bin/sh\n");
    fake
}

fn bound_host() -> FakeHost {
    let fake = FakeHost::new();
    fake.function(FakeFunction { driver: Some("vfio-pci"), ..FakeFunction::NVME });
    fake.directory("sys/module/vfio_iommu_type1");
    fake.write("sys/bus/pci/devices/0000:01:00.0/driver_override", "vfio-pci\n");
    fake
}

fn options() -> BindOptions {
    BindOptions { address: ADDRESS.parse().unwrap(), owner: None, noiommu: false, json: false }
}

fn driver(fake: &FakeHost) -> Option<String> {
    fake.host().function(ADDRESS.parse().unwrap()).unwrap().driver
}

fn overridden(fake: &FakeHost) -> Option<String> {
    fake.host().function(ADDRESS.parse().unwrap()).unwrap().driver_override
}

/// Binds with these faults; returns the error's words and the log.
#[track_caller]
fn bind_fails(fake: &FakeHost, options: &BindOptions, faults: Vec<Fault>) -> (String, Vec<String>) {
    let mut kernel = FakeKernel::new(fake, faults);
    let error = bind(&fake.host(), &mut kernel, options).expect_err("the bind must fail");
    (error.to_string(), kernel.log)
}

/// A bind that must be refused for a reason with all these words, before anything is touched.
#[track_caller]
fn expect_refusal(fake: &FakeHost, options: &BindOptions, words: &[&str]) {
    let before = (driver(fake), overridden(fake));
    let (message, log) = bind_fails(fake, options, Vec::new());
    for word in words {
        assert!(message.contains(word), "{word:?}: {message}");
    }
    assert_eq!(log, [] as [&str; 0]);
    assert_eq!((driver(fake), overridden(fake)), before);
}

#[test]
fn binding_writes_override_unbind_and_probe_in_this_order_with_the_namespaces_claimed() {
    let fake = free_host();
    let mut kernel = FakeKernel::new(&fake, Vec::new());
    let moved = bind(&fake.host(), &mut kernel, &options()).unwrap();
    assert_eq!(
        kernel.log,
        [
            "claim dev/nvme0n1",
            "sys/bus/pci/devices/0000:01:00.0/driver_override = vfio-pci",
            "sys/bus/pci/drivers/nvme/unbind = 0000:01:00.0",
            "sys/bus/pci/drivers_probe = 0000:01:00.0",
        ]
    );
    assert_eq!(driver(&fake).as_deref(), Some("vfio-pci"));
    assert_eq!(moved.group_node, Some(fake.path("dev/vfio/12")));
    assert_eq!((moved.next.as_str(), moved.unchanged), ("foliant identify vfio:0000:01:00.0", false));
    let text = moved.table().to_string();
    assert!(text.contains("is now on vfio-pci") && text.contains("next: foliant identify"), "{text}");
}

#[test]
fn binding_again_changes_nothing() {
    let fake = bound_host();
    let mut kernel = FakeKernel::new(&fake, Vec::new());
    assert!(bind(&fake.host(), &mut kernel, &options()).unwrap().unchanged);
    assert_eq!(kernel.log, [] as [&str; 0]);
}

#[test]
fn a_controller_without_a_driver_is_bound_without_an_unbind() {
    let fake = free_host();
    fake.bind(ADDRESS.parse().unwrap(), None);
    let mut kernel = FakeKernel::new(&fake, Vec::new());
    bind(&fake.host(), &mut kernel, &options()).unwrap();
    assert_eq!(kernel.log.len(), 2);
    assert_eq!(driver(&fake).as_deref(), Some("vfio-pci"));
}

#[test]
fn the_module_is_loaded_when_its_driver_is_missing() {
    let fake = free_host();
    fake.remove("sys/bus/pci/drivers/vfio-pci");
    let mut kernel = FakeKernel::new(&fake, Vec::new());
    bind(&fake.host(), &mut kernel, &options()).unwrap();
    assert_eq!(kernel.log[0], "modprobe vfio-pci");
}

#[test]
fn a_module_that_cannot_be_loaded_leaves_everything_as_it_was() {
    for then in [Then::Fail(Errno::NOENT), Then::Ignore] {
        let fake = free_host();
        fake.remove("sys/bus/pci/drivers/vfio-pci");
        let (message, log) = bind_fails(&fake, &options(), vec![Fault { at: "modprobe", nth: 0, then }]);
        assert!(
            message.contains("vfio-pci can't be loaded") && message.contains("foliant doctor"),
            "{message}"
        );
        assert_eq!(log, ["modprobe vfio-pci"]);
        assert_eq!((driver(&fake).as_deref(), overridden(&fake)), (Some("nvme"), None));
    }
}

#[test]
fn the_iommu_backend_is_loaded_where_the_driver_did_not_bring_it() {
    for fake in [free_host(), bound_host()] {
        fake.remove("sys/module/vfio_iommu_type1");
        let mut kernel = FakeKernel::new(&fake, Vec::new());
        bind(&fake.host(), &mut kernel, &options()).unwrap();
        assert_eq!(kernel.log[0], "modprobe vfio_iommu_type1");
    }
    let fake = free_host();
    fake.remove("sys/module/vfio_iommu_type1");
    let failing = || vec![Fault { at: "modprobe", nth: 0, then: Then::Fail(Errno::NOENT) }];
    assert!(bind_fails(&fake, &options(), failing()).0.contains("vfio_iommu_type1 can't be loaded"));
    assert_eq!((driver(&fake).as_deref(), overridden(&fake)), (Some("nvme"), None));
    // The newer interface does without.
    fake.write("dev/iommu", "");
    bind(&fake.host(), &mut FakeKernel::new(&fake, failing()), &options()).unwrap();
}

#[test]
fn the_owner_gets_both_nodes_after_the_device_manager_is_done() {
    let fake = bound_host();
    fake.write("etc/passwd", "db:x:4711:4711::/:/bin/sh\n");
    fake.write("sys/bus/pci/devices/0000:01:00.0/vfio-dev/vfio3/dev", "511:3\n");
    let mut kernel = FakeKernel::new(&fake, Vec::new());
    let with_owner = BindOptions { owner: Some("db".to_owned()), ..options() };
    let moved = bind(&fake.host(), &mut kernel, &with_owner).unwrap();
    assert_eq!(kernel.log, ["settle", "give dev/vfio/12 to 4711", "give dev/vfio/devices/vfio3 to 4711"]);
    assert!(moved.table().to_string().contains("dev/vfio/12, now of db"));
}

#[test]
fn an_owner_who_cannot_be_given_the_node_is_an_error_that_says_what_was_done() {
    let fake = free_host();
    let with_owner = BindOptions { owner: Some("db".to_owned()), ..options() };
    let (message, _) =
        bind_fails(&fake, &with_owner, vec![Fault { at: "give", nth: 0, then: Then::Fail(Errno::PERM) }]);
    assert!(message.contains("is on vfio-pci now") && message.contains("chown db"), "{message}");
}

#[test]
fn an_unknown_owner_is_refused_before_anything_is_done() {
    let with_owner = BindOptions { owner: Some("nobody-here".to_owned()), ..options() };
    expect_refusal(&free_host(), &with_owner, &["nobody-here", "id -u"]);
}

#[test]
fn what_is_no_nvme_controller_is_refused() {
    let fake = FakeHost::new();
    fake.function(FakeFunction { class: 0x02_00_00, ..FakeFunction::NVME });
    expect_refusal(&fake, &options(), &[ADDRESS, "no NVMe controller", "020000", "foliant devices"]);
}

#[test]
fn an_address_where_nothing_is_is_refused() {
    let fake = free_host();
    let elsewhere = BindOptions { address: "02:00.0".parse().unwrap(), ..options() };
    expect_refusal(&fake, &elsewhere, &["no PCI function at 0000:02:00.0", "is at 0000:01:00.0"]);
}

#[test]
fn a_mounted_namespace_is_refused() {
    let fake = free_host();
    fake.mount("259:1", "/dev/nvme0n1p1", "/data");
    expect_refusal(&fake, &options(), &["in use", "nvme0n1p1 is mounted at /data", "(umount /data)"]);
}

#[test]
fn swap_is_refused() {
    let fake = free_host();
    fake.append("proc/swaps", "/dev/nvme0n1p1 partition 1000 0 -2\n");
    expect_refusal(&fake, &options(), &["in use", "nvme0n1p1 is swap", "swapoff /dev/nvme0n1p1"]);
}

#[test]
fn a_namespace_held_by_lvm_or_raid_is_refused() {
    let fake = free_host();
    fake.holder("nvme0n1p1", "dm-0", "254:0");
    fake.write("sys/class/block/dm-0/dm/name", "vg-root\n");
    fake.write("sys/class/block/dm-0/dm/uuid", "LVM-a\n");
    fake.holder("nvme0n1", "md0", "9:0");
    fake.directory("sys/class/block/md0/md");
    expect_refusal(
        &fake,
        &options(),
        &["in use", "held by the LVM volume vg-root (dm-0)", "RAID array md0", "mdadm --stop /dev/md0"],
    );
}

#[test]
fn an_open_namespace_is_refused() {
    let fake = free_host();
    fake.process(812, "postgres");
    fake.open(812, 5, "/dev/nvme0n1");
    expect_refusal(&fake, &options(), &["in use", "open in process 812 (postgres)"]);
}

#[test]
fn what_cannot_be_told_is_refused() {
    let fake = free_host();
    fake.link("proc/self/ns/pid", "pid:[4026532999]");
    expect_refusal(&fake, &options(), &["can't be told", "run this as root"]);
}

#[test]
fn a_namespace_that_the_kernel_says_is_claimed_is_refused_though_nothing_shows_it() {
    let fake = free_host();
    let busy = || vec![Fault { at: "claim", nth: 0, then: Then::Fail(Errno::BUSY) }];
    let (message, log) = bind_fails(&fake, &options(), busy());
    assert!(message.contains("claimed by something") && message.contains("nvme0n1"), "{message}");
    assert_eq!(log, ["claim dev/nvme0n1"]);
    let denied = vec![Fault { at: "claim", nth: 0, then: Then::Fail(Errno::ACCESS) }];
    assert!(bind_fails(&fake, &options(), denied).0.contains("run this as root"));
    assert_eq!((driver(&fake).as_deref(), overridden(&fake)), (Some("nvme"), None));
}

#[test]
fn who_begins_to_use_it_between_look_and_claim_is_noticed() {
    let fake = free_host();
    let open = |fake: &FakeHost| {
        fake.process(90, "late");
        fake.open(90, 3, "/dev/nvme0n1p1");
    };
    let (message, log) =
        bind_fails(&fake, &options(), vec![Fault { at: "claim", nth: 0, then: Then::Meanwhile(open) }]);
    assert!(message.contains("open in process 90 (late)"), "{message}");
    assert_eq!(log, ["claim dev/nvme0n1"]);
}

#[test]
fn a_group_shared_with_a_device_in_use_is_refused_and_bridges_are_not_in_the_way() {
    let fake = free_host();
    let neighbour = |address, class, driver| FakeFunction { address, class, driver, ..FakeFunction::NVME };
    fake.function(neighbour("0000:00:1c.0", 0x06_04_00, Some("pcieport")));
    fake.function(neighbour("0000:00:1d.0", 0x06_04_00, Some("shpchp")));
    fake.function(neighbour("0000:01:00.1", 0x01_08_02, Some("vfio-pci")));
    fake.function(neighbour("0000:01:00.2", 0x02_00_00, None));
    assert_eq!(
        group_obstacles(&fake.host(), &fake.host().function(ADDRESS.parse().unwrap()).unwrap()).unwrap(),
        []
    );
    fake.function(neighbour("0000:03:00.0", 0x02_00_00, Some("e1000e")));
    expect_refusal(&fake, &options(), &["0000:03:00.0 (driver e1000e)", "group 12", "e1000e/unbind"]);
    fake.bind("0000:03:00.0".parse().unwrap(), None);
    bind(&fake.host(), &mut FakeKernel::new(&fake, Vec::new()), &options()).unwrap();
}

#[test]
fn a_controller_of_another_program_is_refused() {
    let fake = FakeHost::new();
    fake.function(FakeFunction { driver: Some("uio_pci_generic"), ..FakeFunction::NVME });
    expect_refusal(&fake, &options(), &["uio_pci_generic", "give the controller back"]);
}

fn host_without_iommu() -> FakeHost {
    let fake = FakeHost::new();
    fake.function(FakeFunction { group: None, ..FakeFunction::NVME });
    fake.controller(ADDRESS, "nvme0");
    fake.driver("vfio-pci");
    fake.write(NOIOMMU_SWITCH, "N");
    fake
}

#[test]
fn without_an_iommu_it_is_refused_and_both_ways_on_are_named() {
    let words =
        ["no IOMMU group", "foliant doctor --device 0000:01:00.0", "foliant bind 0000:01:00.0 --noiommu"];
    expect_refusal(&host_without_iommu(), &options(), &words);
}

#[test]
fn without_an_iommu_it_is_bound_when_asked_for_by_name_and_the_loss_is_said() {
    let fake = host_without_iommu();
    let mut kernel = FakeKernel::new(&fake, Vec::new());
    let moved = bind(&fake.host(), &mut kernel, &BindOptions { noiommu: true, ..options() }).unwrap();
    assert_eq!(kernel.log[0], "sys/module/vfio/parameters/enable_unsafe_noiommu_mode = Y");
    assert_eq!(moved.next, "foliant identify vfio-noiommu:0000:01:00.0");
    assert_eq!(moved.group_node, Some(fake.path("dev/vfio/noiommu-0")));
    assert!(moved.table().to_string().contains("warning: no IOMMU"));
}

#[test]
fn a_bind_without_an_iommu_that_fails_switches_that_mode_off_again() {
    let fake = host_without_iommu();
    let fault = Fault { at: "drivers_probe", nth: 0, then: Then::Ignore };
    let (_, log) = bind_fails(&fake, &BindOptions { noiommu: true, ..options() }, vec![fault]);
    assert_eq!(log.last().unwrap(), "sys/module/vfio/parameters/enable_unsafe_noiommu_mode = N");
    assert_eq!((driver(&fake).as_deref(), overridden(&fake)), (Some("nvme"), None));
}

#[test]
fn giving_up_protection_is_refused_where_it_is_not_needed_or_helps_nothing() {
    let noiommu = || BindOptions { noiommu: true, ..options() };
    expect_refusal(&free_host(), &noiommu(), &["group 12", "leave it out"]);
    let fake = host_without_iommu();
    fake.write("etc/passwd", "db:x:4711:4711::/:/bin/sh\n");
    let with_owner = BindOptions { owner: Some("db".to_owned()), ..noiommu() };
    expect_refusal(&fake, &with_owner, &["root", "leave --owner out"]);
    fake.remove(NOIOMMU_SWITCH);
    expect_refusal(&fake, &noiommu(), &["CONFIG_VFIO_NOIOMMU"]);
}

#[test]
fn a_bind_that_gets_stuck_anywhere_puts_everything_back() {
    let refused = || Then::Fail(Errno::ACCESS);
    let stuck = [
        ("driver_override", refused(), "Nothing was changed"),
        ("unbind", refused(), "put back: the driver is nvme"),
        ("drivers_probe", refused(), "put back: the driver is nvme"),
        ("drivers_probe", Then::Ignore, "put back: the driver is nvme"),
    ];
    for (at, then, words) in stuck {
        let fake = free_host();
        let (message, log) = bind_fails(&fake, &options(), vec![Fault { at, nth: 0, then }]);
        assert!(message.contains(words), "{at}: {message}");
        assert_eq!((driver(&fake).as_deref(), overridden(&fake)), (Some("nvme"), None), "{at}: {log:?}");
    }
}

#[test]
fn an_override_that_was_there_before_is_put_back_too() {
    let fake = free_host();
    fake.write("sys/bus/pci/devices/0000:01:00.0/driver_override", "nvme\n");
    bind_fails(&fake, &options(), vec![Fault { at: "drivers_probe", nth: 0, then: Then::Ignore }]);
    assert_eq!(overridden(&fake).as_deref(), Some("nvme"));
    assert_eq!(driver(&fake).as_deref(), Some("nvme"));
}

#[test]
fn a_way_back_that_fails_too_says_where_the_controller_is_and_what_to_try() {
    let fake = free_host();
    let faults = (0..2).map(|nth| Fault { at: "drivers_probe", nth, then: Then::Ignore }).collect();
    let (message, _) = bind_fails(&fake, &options(), faults);
    assert!(message.contains("the driver is none where nvme was"), "{message}");
    assert!(message.contains("echo 0000:01:00.0 > /sys/bus/pci/drivers_probe"), "{message}");
    // What it says to try works.
    let mut kernel = FakeKernel::new(&fake, Vec::new());
    kernel.write(&fake.path("sys/bus/pci/drivers_probe"), ADDRESS).unwrap();
    assert_eq!(driver(&fake).as_deref(), Some("nvme"));
}

#[test]
fn errors_of_sysfs_name_the_remedy_by_their_kind() {
    for (errno, words) in [(Errno::ACCESS, "as root"), (Errno::ROFS, "on the host"), (Errno::IO, "dmesg")] {
        let fault = Fault { at: "driver_override", nth: 0, then: Then::Fail(errno) };
        let (message, _) = bind_fails(&free_host(), &options(), vec![fault]);
        assert!(message.contains(words) && message.contains("driver_override"), "{message}");
    }
}

fn unbind_at(fake: &FakeHost, faults: Vec<Fault>) -> (Result<Moved, Error>, Vec<String>) {
    let mut kernel = FakeKernel::new(fake, faults);
    let result = unbind(&fake.host(), &mut kernel, ADDRESS.parse().unwrap());
    (result, kernel.log)
}

#[test]
fn unbinding_clears_the_override_and_gives_the_controller_to_the_kernel() {
    let fake = bound_host();
    let (moved, log) = unbind_at(&fake, Vec::new());
    assert_eq!(
        log,
        [
            "open dev/vfio/12",
            "sys/bus/pci/devices/0000:01:00.0/driver_override = ",
            "sys/bus/pci/drivers/vfio-pci/unbind = 0000:01:00.0",
            "sys/bus/pci/drivers_probe = 0000:01:00.0",
        ]
    );
    assert_eq!(
        (moved.unwrap().driver, driver(&fake).as_deref(), overridden(&fake)),
        ("nvme", Some("nvme"), None)
    );
    let (again, log) = unbind_at(&fake, Vec::new());
    assert!(again.unwrap().unchanged && log.is_empty());
}

#[test]
fn unbinding_a_controller_without_a_driver_gives_it_to_the_kernel_too() {
    let fake = bound_host();
    fake.bind(ADDRESS.parse().unwrap(), None);
    let (moved, log) = unbind_at(&fake, Vec::new());
    assert!(moved.is_ok() && log.len() == 2, "{log:?}");
    assert_eq!(driver(&fake).as_deref(), Some("nvme"));
}

#[test]
fn unbinding_while_a_process_has_it_open_is_refused() {
    let fake = bound_host();
    fake.process(31, "foliant");
    fake.open(31, 5, "/dev/vfio/12");
    let (result, log) = unbind_at(&fake, Vec::new());
    let message = result.unwrap_err().to_string();
    assert!(
        message.contains("vfio/12 is open in process 31 (foliant)") && message.contains("kill 31"),
        "{message}"
    );
    assert_eq!(log, [] as [&str; 0]);
}

#[test]
fn unbinding_is_refused_when_the_kernel_says_that_the_group_is_open() {
    let fake = bound_host();
    let (result, log) =
        unbind_at(&fake, vec![Fault { at: "open dev", nth: 0, then: Then::Fail(Errno::BUSY) }]);
    assert!(result.unwrap_err().to_string().contains("claimed by something"));
    assert_eq!(log, ["open dev/vfio/12"]);
    assert_eq!(driver(&fake).as_deref(), Some("vfio-pci"));
}

#[test]
fn an_unbind_that_gets_stuck_leaves_the_controller_on_vfio() {
    for (at, then) in [
        ("driver_override", Then::Fail(Errno::ACCESS)),
        ("unbind", Then::Fail(Errno::ACCESS)),
        ("drivers_probe", Then::Ignore),
    ] {
        let fake = bound_host();
        let (result, log) = unbind_at(&fake, vec![Fault { at, nth: 0, then }]);
        assert!(result.is_err());
        assert_eq!(driver(&fake).as_deref(), Some("vfio-pci"), "{at}: {log:?}");
        assert_eq!(overridden(&fake).as_deref(), Some("vfio-pci"), "{at}: {log:?}");
    }
}

#[test]
fn unbinding_what_belongs_to_another_driver_is_refused() {
    let fake = FakeHost::new();
    fake.function(FakeFunction { driver: Some("uio_pci_generic"), ..FakeFunction::NVME });
    let (result, log) = unbind_at(&fake, Vec::new());
    assert!(result.unwrap_err().to_string().contains("uio_pci_generic"));
    assert_eq!(log, [] as [&str; 0]);
}

#[test]
fn reports_of_a_move_are_json_too() {
    let fake = bound_host();
    let moved = bind(&fake.host(), &mut FakeKernel::new(&fake, Vec::new()), &options()).unwrap();
    let json = serde_json::to_value(&moved).unwrap();
    assert_eq!((&json["driver"], &json["unchanged"]), (&"vfio-pci".into(), &true.into()));
    assert_eq!(json["next"], "foliant identify vfio:0000:01:00.0");
}
