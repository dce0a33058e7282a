//! A guest's machine as data, and the QEMU command line that it stands for.

use std::path::Path;

use crate::drive::Drive;
use crate::kernel::KernelNeed;

/// A machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    /// Processors.
    pub vcpus: u8,
    /// How the host runs them.
    pub run_by: RunBy,
    /// Memory.
    pub memory_mib: u32,
    /// NUMA nodes, among which processors and memory are divided evenly.
    pub nodes: u8,
    /// What is needed of its kernel.
    pub kernel: KernelNeed,
    /// Its IOMMU.
    pub iommu: Iommu,
    /// Hugepages of 2 MiB that the guest reserves.
    pub hugepages: u32,
    /// More words for the kernel's command line.
    pub kernel_arguments: Vec<String>,
    /// What lies behind its namespaces.
    pub drives: Vec<Drive>,
    /// Its PCI functions, beside those of the chipset.
    pub functions: Vec<Function>,
}

/// How the host runs a guest's processors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RunBy {
    /// One thread runs them in turn: kernels since 6.12 have been seen to lose timers or to crash otherwise. Memory is filled
    /// and copied in the way that is cheap in software.
    #[default]
    OneThread,
    /// A thread each, and a processor as QEMU makes it, as measurements want it.
    ThreadEach,
}

/// The machine's IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Iommu {
    /// None.
    Absent,
    /// Intel's, with an address width of so many bits (39 or 48).
    Intel {
        /// Width of a device address.
        address_bits: u8,
    },
    /// Intel's, which translates addresses but doesn't remap interrupts.
    IntelWithoutInterruptRemapping,
}

/// A PCI function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Function {
    /// An NVMe controller.
    Nvme(NvmeController),
    /// A port of the root complex, behind which a function can be plugged and unplugged.
    RootPort {
        /// What functions call it.
        name: String,
        /// Its slot on bus 0, as `05.0`.
        slot: String,
    },
    /// Another of QEMU's devices, by its name and options.
    Other(String),
}

/// An NVMe controller of QEMU's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvmeController {
    /// Its name in QEMU, and its serial number.
    pub serial: String,
    /// Where it is plugged: the name of a root port; `None` for bus 0.
    pub port: Option<String>,
    /// Its slot and function there, as `04.0`.
    pub slot: String,
    /// More options, as `mdts=1`.
    pub options: Vec<String>,
    /// Its namespaces.
    pub namespaces: Vec<Namespace>,
    /// The subsystem that it belongs to; one of its own where none is named.
    pub subsystem: Option<String>,
}

/// A namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its identifier.
    pub nsid: u32,
    /// The name of its drive.
    pub drive: String,
    /// Its block size.
    pub block_bytes: u32,
    /// More options, as `write-cache=off`.
    pub options: Vec<String>,
}

impl Machine {
    /// Two processors, 512 MiB, Intel's IOMMU, 64 MiB of hugepages, no drives and no controllers.
    #[must_use]
    pub fn new() -> Self {
        Self {
            vcpus: 2,
            run_by: RunBy::OneThread,
            memory_mib: 512,
            nodes: 1,
            kernel: KernelNeed::Groups,
            iommu: Iommu::Intel { address_bits: 48 },
            hugepages: 32,
            kernel_arguments: Vec::new(),
            drives: Vec::new(),
            functions: Vec::new(),
        }
    }

    /// A machine with one controller `LAB0` in slot 4, with one namespace of `block_bytes` blocks on the drive `a`.
    #[must_use]
    pub fn with_one_controller(block_bytes: u32) -> Self {
        let drive = Drive::new("a", 64);
        let controller = NvmeController::new("LAB0", "04.0").namespace(1, "a", block_bytes);
        Self::new().drive(drive).nvme(controller)
    }

    /// The same with a drive more.
    #[must_use]
    pub fn drive(mut self, drive: Drive) -> Self {
        self.drives.push(drive);
        self
    }

    /// The same with a controller more.
    #[must_use]
    pub fn nvme(mut self, controller: NvmeController) -> Self {
        self.functions.push(Function::Nvme(controller));
        self
    }

    /// The same with a root port more.
    #[must_use]
    pub fn root_port(mut self, name: &str, slot: &str) -> Self {
        self.functions.push(Function::RootPort { name: name.into(), slot: slot.into() });
        self
    }

    /// The same with a kernel whose own NVMe driver never starts, for controllers that nobody may touch before us.
    #[must_use]
    pub fn without_kernel_driver(mut self) -> Self {
        self.kernel_arguments.push("initcall_blacklist=nvme_init".into());
        self
    }

    /// The drive called `name`.
    ///
    /// # Panics
    /// When the machine has none.
    #[must_use]
    pub fn drive_named(&self, name: &str) -> &Drive {
        let drive = self.drives.iter().find(|drive| drive.name == name);
        drive.unwrap_or_else(|| panic!("the machine has no drive {name:?}"))
    }

    /// QEMU's arguments for processors, memory, IOMMU, drives and functions.
    pub(crate) fn arguments(&self, run: &Path) -> Vec<String> {
        let mut arguments: Vec<String> = [
            "-M",
            "q35,kernel-irqchip=split",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-device",
            "isa-debug-exit",
        ]
        .map(str::to_owned)
        .into();
        let (threads, processor) = match self.run_by {
            // Software takes a repeated string instruction step by step. Kernel and libc fill and copy by such a one a
            // byte at a time where the processor calls that fast (ERMS), and by words where it doesn't.
            RunBy::OneThread => ("single", "max,erms=off"),
            RunBy::ThreadEach => ("multi", "max"),
        };
        arguments.extend(["-accel".into(), format!("tcg,thread={threads}"), "-cpu".into(), processor.into()]);
        arguments.extend(["-smp".into(), self.vcpus.to_string(), "-m".into(), self.memory_mib.to_string()]);
        arguments.extend(self.node_arguments());
        let iommu = match self.iommu {
            Iommu::Absent => None,
            Iommu::Intel { address_bits } => Some(format!("intel-iommu,intremap=on,aw-bits={address_bits}")),
            Iommu::IntelWithoutInterruptRemapping => Some("intel-iommu,intremap=off".into()),
        };
        arguments.extend(iommu.into_iter().flat_map(|device| ["-device".into(), device]));
        for drive in &self.drives {
            arguments.extend(drive.arguments(run));
        }
        for function in &self.functions {
            for device in function.devices() {
                arguments.extend(["-device".into(), device]);
            }
        }
        arguments
    }

    /// QEMU's arguments for its nodes; none for one.
    fn node_arguments(&self) -> Vec<String> {
        if self.nodes < 2 {
            return Vec::new();
        }
        let (vcpus, memory_mib) = (self.vcpus / self.nodes, self.memory_mib / u32::from(self.nodes));
        let node = |node: u8| {
            let (first, last) = (node * vcpus, (node + 1) * vcpus - 1);
            [
                "-object".to_owned(),
                format!("memory-backend-ram,id=memory{node},size={memory_mib}M"),
                "-numa".to_owned(),
                format!("node,nodeid={node},cpus={first}-{last},memdev=memory{node}"),
            ]
        };
        (0..self.nodes).flat_map(node).collect()
    }

    /// The guest kernel's command line.
    pub(crate) fn kernel_line(&self) -> String {
        let mut words = vec![
            "console=ttyS0".to_owned(),
            "quiet".into(),
            "panic=-1".into(),
            "oops=panic".into(),
            // The check measures timers against each other, and a loaded host makes it fail.
            "no_timer_check".into(),
            "tsc=reliable".into(),
            // Each processor would count its loops for a tenth of a second and more, and again where another runs beside
            // it. This is what one of 5 GHz counts: a slower one waits longer than it is asked to, never shorter.
            "lpj=20000000".into(),
        ];
        if self.iommu != Iommu::Absent {
            words.push("intel_iommu=on".into());
        }
        words.extend(self.kernel_arguments.iter().cloned());
        words.join(" ")
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl NvmeController {
    /// A controller without namespaces on bus 0.
    #[must_use]
    pub fn new(serial: &str, slot: &str) -> Self {
        Self {
            serial: serial.into(),
            port: None,
            slot: slot.into(),
            options: Vec::new(),
            namespaces: Vec::new(),
            subsystem: None,
        }
    }

    /// The same with an option of QEMU's more.
    #[must_use]
    pub fn option(mut self, option: &str) -> Self {
        self.options.push(option.into());
        self
    }

    /// The same with a namespace more.
    #[must_use]
    pub fn namespace(mut self, nsid: u32, drive: &str, block_bytes: u32) -> Self {
        self.namespaces.push(Namespace { nsid, drive: drive.into(), block_bytes, options: Vec::new() });
        self
    }

    /// The same with one more option of QEMU's for its last namespace.
    ///
    /// # Panics
    /// When it has no namespace yet.
    #[must_use]
    pub fn namespace_option(mut self, option: &str) -> Self {
        self.namespaces.last_mut().expect("there is a namespace").options.push(option.into());
        self
    }

    /// The same, plugged into the root port `port`.
    #[must_use]
    pub fn behind(mut self, port: &str) -> Self {
        self.port = Some(port.into());
        self
    }
}

impl Function {
    /// The devices that make it up, as QEMU's options, in the order in which they must be made.
    fn devices(&self) -> Vec<String> {
        match self {
            Self::Nvme(controller) => controller.devices(),
            Self::RootPort { name, slot } => {
                vec![format!("pcie-root-port,id={name},addr={slot}")]
            }
            Self::Other(description) => vec![description.clone()],
        }
    }
}

impl NvmeController {
    fn devices(&self) -> Vec<String> {
        let Self { serial, slot, .. } = self;
        let mut devices = Vec::new();
        let subsystem = self.subsystem.clone().unwrap_or_else(|| format!("{serial}-subsystem"));
        devices.push(format!("nvme-subsys,id={subsystem},nqn={subsystem}"));
        let bus = self.port.as_deref().unwrap_or("pcie.0");
        let mut controller =
            format!("nvme,id={serial},serial={serial},subsys={subsystem},bus={bus},addr={slot}");
        for option in &self.options {
            controller = format!("{controller},{option}");
        }
        devices.push(controller);
        for Namespace { nsid, drive, block_bytes, options } in &self.namespaces {
            let mut namespace = format!(
                "nvme-ns,drive={drive},bus={serial},nsid={nsid},logical_block_size={block_bytes},\
                 physical_block_size={block_bytes}"
            );
            for option in options {
                namespace = format!("{namespace},{option}");
            }
            devices.push(namespace);
        }
        devices
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_says_each_of_its_parts_on_the_command_line() {
        let machine = Machine::with_one_controller(4096);
        let line = machine.arguments(Path::new("/run")).join(" ");
        for part in ["aw-bits=48", "serial=LAB0", "addr=04.0", "logical_block_size=4096", "/run/a.img"] {
            assert!(line.contains(part), "{part} in {line}");
        }
        assert!(machine.kernel_line().contains("intel_iommu=on"));
        assert!(!line.contains("-numa"));
    }

    #[test]
    fn nodes_share_processors_and_memory() {
        let machine = Machine { nodes: 2, vcpus: 4, ..Machine::new() };
        let line = machine.arguments(Path::new("/run")).join(" ");
        for part in ["id=memory1,size=256M", "nodeid=0,cpus=0-1,memdev=memory0", "nodeid=1,cpus=2-3"] {
            assert!(line.contains(part), "{part} in {line}");
        }
    }
}
