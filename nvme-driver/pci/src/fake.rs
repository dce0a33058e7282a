//! Hosts made of files in a temporary directory, for tests: sysfs, procfs and device nodes with as much in them as
//! this crate reads, and the two files by which drivers are changed.
//!
//! A new host is one on which root sees everything and nothing is there: a mounted root on another disk, no swap, no
//! PCI function. Tests add what they need; whatever isn't covered by a method is a [`write`](FakeHost::write) or a
//! [`link`](FakeHost::link) away. All methods panic when the directory can't be written.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::address::PciAddress;
use crate::host::Host;

/// A host made of files. The directory goes with the value.
#[derive(Debug)]
pub struct FakeHost {
    root: PathBuf,
    _directory: TempDir,
}

/// A PCI function to put into a [`FakeHost`].
#[derive(Clone, Copy, Debug)]
pub struct FakeFunction {
    /// Its address, such as `0000:01:00.0`.
    pub address: &'static str,
    /// Its class of 24 bits.
    pub class: u32,
    /// Its driver.
    pub driver: Option<&'static str>,
    /// Its IOMMU group.
    pub group: Option<u32>,
    /// Its NUMA node; -1 for none.
    pub numa_node: i32,
}

impl FakeFunction {
    /// An NVMe controller on the kernel's driver, in group 12 and on NUMA node 0.
    pub const NVME: Self = Self {
        address: "0000:01:00.0",
        class: 0x01_08_02,
        driver: Some("nvme"),
        group: Some(12),
        numa_node: 0,
    };
}

impl Default for FakeHost {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeHost {
    /// A host without any PCI function.
    #[must_use]
    pub fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        // Without links above it, as the root of a host has none.
        let root = directory.path().canonicalize().expect("the temporary directory is there");
        let fake = Self { root, _directory: directory };
        for directory in ["sys/bus/pci/devices", "sys/class/block", "sys/class/nvme", "dev/vfio", "proc/1/fd"]
        {
            fake.directory(directory);
        }
        fake.write("sys/bus/pci/drivers_probe", "");
        fake.driver("nvme");
        fake.link("proc/self/ns/pid", "pid:[4026531836]");
        fake.link("proc/self/ns/mnt", "mnt:[4026531841]");
        fake.write("proc/self/mountinfo", "25 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n");
        fake.write("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n");
        fake.process(1, "init");
        fake
    }

    /// The host, to be read.
    #[must_use]
    pub fn host(&self) -> Host {
        Host::at(&self.root)
    }

    /// The path of something below the root.
    #[must_use]
    pub fn path(&self, below_root: impl AsRef<Path>) -> PathBuf {
        self.root.join(below_root)
    }

    /// Makes a directory, and those above it.
    pub fn directory(&self, below_root: impl AsRef<Path>) {
        std::fs::create_dir_all(self.path(below_root)).expect("a directory can be made");
    }

    /// Writes a file, making the directories above it.
    pub fn write(&self, below_root: impl AsRef<Path>, content: &str) {
        let path = self.path(below_root);
        std::fs::create_dir_all(path.parent().expect("a file has a directory"))
            .expect("a directory can be made");
        std::fs::write(path, content).expect("a file can be written");
    }

    /// Adds to a file.
    pub fn append(&self, below_root: impl AsRef<Path>, content: &str) {
        let text = std::fs::read_to_string(self.path(&below_root)).unwrap_or_default();
        self.write(below_root, &(text + content));
    }

    /// Makes a symbolic link with just this text, in place of one that is there.
    pub fn link(&self, below_root: impl AsRef<Path>, target: impl AsRef<Path>) {
        let path = self.path(below_root);
        std::fs::create_dir_all(path.parent().expect("a link has a directory"))
            .expect("a directory can be made");
        drop(std::fs::remove_file(&path));
        std::os::unix::fs::symlink(target, path).expect("a link can be made");
    }

    /// Removes a file, a link or a directory with all that's in it.
    pub fn remove(&self, below_root: impl AsRef<Path>) {
        let path = self.path(below_root);
        let is_directory = path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
        let removed = if is_directory { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
        removed.expect("what is removed is there");
    }

    /// Registers a driver, without any function.
    pub fn driver(&self, name: &str) {
        self.write(format!("sys/bus/pci/drivers/{name}/unbind"), "");
    }

    /// Adds a function.
    pub fn function(&self, function: FakeFunction) {
        let address: PciAddress = function.address.parse().expect("a fake function has an address");
        let directory = format!("sys/devices/pci0000:00/{address}");
        self.write(format!("{directory}/vendor"), "0x144d\n");
        self.write(format!("{directory}/device"), "0xa80a\n");
        self.write(format!("{directory}/class"), &format!("{:#08x}\n", function.class));
        self.write(format!("{directory}/numa_node"), &format!("{}\n", function.numa_node));
        self.write(format!("{directory}/driver_override"), "(null)\n");
        self.write(format!("{directory}/enable"), if function.driver.is_some() { "1\n" } else { "0\n" });
        self.link(format!("sys/bus/pci/devices/{address}"), self.path(&directory));
        if let Some(group) = function.group {
            self.group(address, group);
        }
        if let Some(driver) = function.driver {
            self.driver(driver);
            self.bind(address, Some(driver));
        }
    }

    /// Puts a function into an IOMMU group.
    pub fn group(&self, address: PciAddress, group: u32) {
        let members = format!("sys/kernel/iommu_groups/{group}");
        self.link(
            format!("{members}/devices/{address}"),
            self.path(format!("sys/bus/pci/devices/{address}")),
        );
        self.write(format!("{members}/type"), "DMA\n");
        self.link(format!("sys/bus/pci/devices/{address}/iommu_group"), self.path(members));
    }

    /// Gives a function to a driver, or to none. VFIO's nodes come and go with it.
    pub fn bind(&self, address: PciAddress, driver: Option<&str>) {
        let link = format!("sys/bus/pci/devices/{address}/driver");
        if self.path(&link).symlink_metadata().is_ok() {
            self.remove(&link);
        }
        if let Some(driver) = driver {
            self.link(link, self.path(format!("sys/bus/pci/drivers/{driver}")));
        }
        let group = std::fs::read_link(self.path(format!("sys/bus/pci/devices/{address}/iommu_group"))).ok();
        let group = group.and_then(|group| Some(group.file_name()?.to_str()?.to_owned()));
        if let (Some("vfio-pci"), Some(group)) = (driver, group) {
            self.write(format!("dev/vfio/{group}"), "");
            self.write(format!("sys/bus/pci/devices/{address}/enable"), "0\n");
        }
    }

    /// Adds the kernel's controller `name` (`nvme0`) on a function, of a subsystem of its own.
    pub fn controller(&self, address: &str, name: &str) {
        let directory = format!("sys/bus/pci/devices/{address}/nvme/{name}");
        for (file, content) in [
            ("model", "Fake SSD 9000                           \n"),
            ("serial", "S0000001            \n"),
            ("firmware_rev", "1.0     \n"),
            ("state", "live\n"),
            ("dev", "243:0\n"),
        ] {
            self.write(format!("{directory}/{file}"), content);
        }
        self.write(format!("{directory}/subsysnqn"), &format!("nqn.2026-01.test:{name}\n"));
        self.link(format!("sys/class/nvme/{name}"), self.path(directory));
    }

    /// Adds the namespace `name` (`nvme0n1`) of 1 GiB in blocks of 512 bytes to the controller of that name, with
    /// its block device.
    pub fn namespace(&self, controller: &str, name: &str, device: &str) {
        let directory = format!("sys/class/nvme/{controller}/{name}");
        self.block_device(&directory, name, device);
        self.write(format!("{directory}/nsid"), &format!("{}\n", name.rsplit('n').next().unwrap_or("1")));
        self.write(format!("{directory}/wwid"), &format!("eui.{name}\n"));
    }

    /// Adds the block device `name` of 1 GiB with its directory at `directory` and the number `device` (`259:0`).
    pub fn block_device(&self, directory: &str, name: &str, device: &str) {
        self.write(format!("{directory}/size"), "2097152\n");
        self.write(format!("{directory}/queue/logical_block_size"), "512\n");
        self.write(format!("{directory}/dev"), &format!("{device}\n"));
        self.directory(format!("{directory}/holders"));
        self.write(format!("dev/{name}"), "");
        self.link(format!("sys/class/block/{name}"), self.path(directory));
    }

    /// Adds a partition to a block device.
    pub fn partition(&self, whole: &str, name: &str, device: &str) {
        let directory = format!("sys/class/block/{whole}/{name}");
        self.block_device(&directory, name, device);
        self.write(format!("{directory}/partition"), "1\n");
    }

    /// Adds a block device that the kernel has built on another.
    pub fn holder(&self, held: &str, name: &str, device: &str) {
        let directory = format!("sys/devices/virtual/block/{name}");
        self.block_device(&directory, name, device);
        self.link(format!("sys/class/block/{held}/holders/{name}"), self.path(directory));
    }

    /// Adds a mount to the calling process's table.
    pub fn mount(&self, device: &str, source: &str, at: &str) {
        self.append("proc/self/mountinfo", &format!("90 25 {device} / {at} rw - ext4 {source} rw\n"));
    }

    /// Adds a process that has nothing open.
    pub fn process(&self, id: u32, command: &str) {
        self.directory(format!("proc/{id}/fd"));
        self.write(format!("proc/{id}/comm"), &format!("{command}\n"));
        self.link(format!("proc/{id}/ns/mnt"), "mnt:[4026531841]");
    }

    /// Opens a file in a process: `target` is what the link to it says.
    pub fn open(&self, process: u32, descriptor: u32, target: &str) {
        self.link(format!("proc/{process}/fd/{descriptor}"), target);
        self.write(format!("proc/{process}/fdinfo/{descriptor}"), "pos:\t0\n");
    }
}
