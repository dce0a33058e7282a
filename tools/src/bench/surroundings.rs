//! What a reader needs to know to place a figure: the machine and the drive that it was measured on.

use std::fs;
use std::path::Path;

use foliant::Namespace;
use foliant_nvme::{ArenaBacking, ControllerIdentity};
use foliant_nvme_pci::Host;
use serde::Serialize;

use crate::size::ByteSize;
use crate::target::Target;

/// Named values, as a report shows them.
pub(crate) type Facts = Vec<(&'static str, String)>;

/// The drive, and what the driver was granted.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Drive {
    pub(crate) model: String,
    pub(crate) firmware: String,
    pub(crate) nvme_version: String,
    pub(crate) namespace: u32,
    pub(crate) size_bytes: ByteSize,
    pub(crate) block_bytes: u32,
    /// `None` where the controller has no limit.
    pub(crate) transfer_bytes_max: Option<u32>,
    pub(crate) volatile_write_cache: bool,
    pub(crate) queue_pairs: u16,
    pub(crate) queue_entries: u16,
    pub(crate) memory: &'static str,
    /// Of a controller on PCI, where the system tells.
    pub(crate) numa_node: Option<u32>,
}

impl Drive {
    pub(crate) fn new(
        target: &Target,
        identity: &ControllerIdentity,
        namespace: &Namespace,
        memory: ArenaBacking,
    ) -> Self {
        let function = target.pci_address().and_then(|address| Host::live().function(address).ok());
        Self {
            model: identity.model.clone(),
            firmware: identity.firmware.clone(),
            nvme_version: identity.version.clone(),
            namespace: namespace.id(),
            size_bytes: ByteSize(namespace.blocks() * u64::from(namespace.block_bytes())),
            block_bytes: namespace.block_bytes(),
            transfer_bytes_max: identity.mdts_bytes,
            volatile_write_cache: identity.volatile_write_cache,
            queue_pairs: identity.queue_pairs,
            queue_entries: identity.queue_entries,
            memory: match memory {
                ArenaBacking::Hugepages => "hugepages",
                ArenaBacking::OrdinaryLocked => "ordinary pages, locked",
                ArenaBacking::OrdinaryUnlocked => "ordinary pages, not locked",
            },
            numa_node: function.and_then(|function| function.numa_node),
        }
    }

    pub(crate) fn facts(&self) -> Facts {
        let limit = self.transfer_bytes_max.map_or("none".to_owned(), |max| ByteSize(max.into()).to_string());
        let mut facts = vec![
            ("controller", format!("{}, firmware {}", self.model, self.firmware)),
            ("NVMe version", self.nvme_version.clone()),
            (
                "namespace",
                format!("{}: {} in blocks of {} bytes", self.namespace, self.size_bytes, self.block_bytes),
            ),
            ("largest transfer (MDTS)", limit),
            ("write cache", if self.volatile_write_cache { "on" } else { "off, or none" }.to_owned()),
            ("I/O queue pairs", format!("{}, of {} entries", self.queue_pairs, self.queue_entries)),
            ("memory shared with it", self.memory.to_owned()),
        ];
        facts.extend(self.numa_node.map(|node| ("NUMA node of the drive", node.to_string())));
        facts
    }
}

/// The machine.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    /// Cores that this process may run on.
    pub(crate) cores: usize,
    pub(crate) memory_bytes: ByteSize,
    pub(crate) numa_nodes: usize,
    pub(crate) kernel: String,
    /// The frequency governors of the cores; empty where the system shows none.
    pub(crate) governors: Vec<String>,
    /// Runnable processes on average over the last minute.
    pub(crate) load_average: String,
}

impl Machine {
    /// The machine that this process runs on. What can't be read is left open: a report says `not shown`.
    pub(crate) fn this() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (cpuinfo, meminfo) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
        let memory_kib =
            field(&meminfo, "MemTotal").and_then(|value| value.split_whitespace().next()?.parse().ok());
        let system = rustix::system::uname();
        let (name, release) = (system.sysname().to_string_lossy(), system.release().to_string_lossy());
        let sysfs = Path::new("/sys/devices/system");
        Self {
            processor: processor(&cpuinfo),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: ByteSize(memory_kib.unwrap_or(0u64) * 1024),
            numa_nodes: numbered(&sysfs.join("node"), "node").len(),
            kernel: format!("{name} {release}"),
            governors: governors(&sysfs.join("cpu")),
            load_average: read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned(),
        }
    }

    pub(crate) fn facts(&self) -> Facts {
        let shown = |text: String| if text.is_empty() { "not shown".to_owned() } else { text };
        vec![
            ("processor", shown(self.processor.clone())),
            ("cores", self.cores.to_string()),
            ("memory", self.memory_bytes.to_string()),
            (
                "NUMA nodes",
                shown(if self.numa_nodes == 0 { String::new() } else { self.numa_nodes.to_string() }),
            ),
            ("kernel", self.kernel.clone()),
            ("frequency governor", shown(self.governors.join(", "))),
            ("load when it began", shown(self.load_average.clone())),
        ]
    }
}

/// The value of `name: value`, or of `name<tab>: value`, in the first such line.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim())
}

/// The processor's name as it gives it itself, with family and model, which the names of cloud machines leave out.
fn processor(cpuinfo: &str) -> String {
    let Some(name) = field(cpuinfo, "model name") else { return String::new() };
    match (field(cpuinfo, "cpu family"), field(cpuinfo, "model")) {
        (Some(family), Some(model)) => format!("{name} (family {family}, model {model})"),
        _ => name.to_owned(),
    }
}

/// The directories of `directory` that are called `prefix` and a number.
fn numbered(directory: &Path, prefix: &str) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
    let is_numbered = |name: &str| {
        name.strip_prefix(prefix)
            .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
    };
    entries
        .filter(|entry| entry.file_name().to_str().is_some_and(is_numbered))
        .map(|entry| entry.path())
        .collect()
}

/// The governors of all cores, each once.
fn governors(directory: &Path) -> Vec<String> {
    let cores = numbered(directory, "cpu").into_iter();
    let mut governors: Vec<String> = cores
        .filter_map(|core| fs::read_to_string(core.join("cpufreq/scaling_governor")).ok())
        .map(|governor| governor.trim().to_owned())
        .collect();
    governors.sort();
    governors.dedup();
    governors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_named_with_family_and_model() {
        let cpuinfo = "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Some CPU @ 2 GHz\n";
        assert_eq!(processor(cpuinfo), "Some CPU @ 2 GHz (family 6, model 143)");
        assert_eq!(processor(""), "");
        assert_eq!(field("MemTotal:       24\nMemFree: 3", "MemTotal"), Some("24"));
    }

    #[test]
    fn governors_are_told_once_each_and_other_directories_are_no_cores() {
        let directory = tempfile::tempdir().unwrap();
        for (core, governor) in [("cpu0", "powersave"), ("cpu1", "performance"), ("cpu2", "powersave")] {
            fs::create_dir_all(directory.path().join(core).join("cpufreq")).unwrap();
            fs::write(directory.path().join(core).join("cpufreq/scaling_governor"), format!("{governor}\n"))
                .unwrap();
        }
        fs::create_dir(directory.path().join("cpufreq")).unwrap();
        fs::create_dir(directory.path().join("cpu3")).unwrap();
        assert_eq!(governors(directory.path()), ["performance", "powersave"]);
        assert_eq!(numbered(directory.path(), "cpu").len(), 4);
    }

    #[test]
    fn what_the_system_does_not_show_is_said_to_be_so() {
        let machine = Machine { governors: Vec::new(), ..Machine::this() };
        assert!(machine.facts().contains(&("frequency governor", "not shown".to_owned())));
    }
}
