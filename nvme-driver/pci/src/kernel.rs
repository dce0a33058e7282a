//! What the kernel's own NVMe driver shows of a controller while it has it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::error::PciError;
use crate::host::{Host, attribute, entries, number};

/// Sysfs counts sizes of block devices in sectors of this many bytes, whatever the device's own blocks.
const SECTOR_BYTES: u64 = 512;

/// A controller of the kernel's NVMe driver.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelController {
    /// The kernel's name: `nvme0`.
    pub name: String,
    /// The model number.
    pub model: String,
    /// The serial number.
    pub serial: String,
    /// The firmware revision.
    pub firmware: String,
    /// The NVMe qualified name of the subsystem that the controller belongs to; empty where the kernel shows none.
    pub subsystem_nqn: String,
    /// What the kernel says of its state: `live` for one that works.
    pub state: String,
    /// Its namespaces.
    pub namespaces: Vec<KernelNamespace>,
}

/// A namespace of the kernel's NVMe driver.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelNamespace {
    /// The name under which programs open it: `nvme0n1`. With multipath it's the name of the namespace as a whole.
    pub name: String,
    /// The namespace's id.
    pub id: u32,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its logical block in bytes.
    pub block_bytes: u32,
    /// What the kernel makes of its identifiers, the same for each path to one namespace; empty where it shows none.
    pub wwid: String,
    /// The name under which its controller lists it: the path to it, where the kernel does multipath.
    pub(crate) listed: String,
}

impl KernelController {
    /// The controller of the function whose directory in sysfs this is; `None` while the driver sets it up.
    pub(crate) fn of_function(host: &Host, function: &Path) -> Result<Option<Self>, PciError> {
        let classes = function.join("nvme");
        match entries(&classes)?.unwrap_or_default().first() {
            Some(name) => Self::read(host, &classes.join(name)).map(Some),
            None => Ok(None),
        }
    }

    /// All controllers of the kernel's NVMe driver, those on other transports included.
    pub(crate) fn all(host: &Host) -> Result<Vec<Self>, PciError> {
        let class = host.path("sys/class/nvme");
        entries(&class)?.unwrap_or_default().iter().map(|name| Self::read(host, &class.join(name))).collect()
    }

    fn read(host: &Host, directory: &Path) -> Result<Self, PciError> {
        let text = |name: &str| Ok(attribute(&directory.join(name))?.unwrap_or_default());
        let mut namespaces = Vec::new();
        for name in entries(directory)?.unwrap_or_default() {
            if let Some(name) = name.to_str().filter(|name| is_namespace(name)) {
                namespaces.extend(KernelNamespace::read(host, directory, name)?);
            }
        }
        Ok(Self {
            name: directory.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            model: text("model")?,
            serial: text("serial")?,
            firmware: text("firmware_rev")?,
            subsystem_nqn: text("subsysnqn")?,
            state: text("state")?,
            namespaces,
        })
    }
}

impl KernelNamespace {
    /// The names that its character devices would have: `ng0n1` and, with multipath, `ng0c1n1` of the path.
    pub(crate) fn character_names(&self) -> BTreeSet<String> {
        [&self.name, &self.listed].into_iter().map(|name| name.replacen("nvme", "ng", 1)).collect()
    }

    /// The namespace that a controller lists as `listed`; `None` when it vanishes meanwhile.
    fn read(host: &Host, controller: &Path, listed: &str) -> Result<Option<Self>, PciError> {
        let mut directory = controller.join(listed);
        let mut name = listed.to_owned();
        // With multipath the controller lists a hidden path, nvme0c1n2, and programs open its head, nvme0n2.
        if let Some(head) = head_of_path(listed) {
            directory = host.path("sys/class/block").join(&head);
            name = head;
        }
        let Some(sectors) = attribute(&directory.join("size"))? else { return Ok(None) };
        let malformed = |path: PathBuf, value: String, wanted| PciError::Malformed { path, value, wanted };
        let sectors: u64 =
            sectors.parse().map_err(|_| malformed(directory.join("size"), sectors, "a size in sectors"))?;
        let id = attribute(&directory.join("nsid"))?.or_else(|| id_in_name(&name));
        let block_path = directory.join("queue/logical_block_size");
        let block_bytes = number(&block_path, "a block size in bytes")?;
        let block_bytes = u32::try_from(block_bytes)
            .map_err(|_| malformed(block_path, block_bytes.to_string(), "a block size in bytes"))?;
        Ok(Some(Self {
            id: id.and_then(|id| id.parse().ok()).unwrap_or(0),
            size_bytes: sectors.saturating_mul(SECTOR_BYTES),
            block_bytes,
            wwid: attribute(&directory.join("wwid"))?.unwrap_or_default(),
            name,
            listed: listed.to_owned(),
        }))
    }
}

/// Whether an entry of a controller's directory is a namespace (`nvme0n1`) or a path to one (`nvme0c1n2`).
fn is_namespace(name: &str) -> bool {
    head_of_path(name).is_some() || id_in_name(name).is_some()
}

/// `2` of `nvme0n2`.
fn id_in_name(name: &str) -> Option<String> {
    let (controller, id) = name.strip_prefix("nvme")?.split_once('n')?;
    (is_digits(controller) && is_digits(id)).then(|| id.to_owned())
}

/// `nvme0n2` of `nvme0c1n2`.
fn head_of_path(name: &str) -> Option<String> {
    let (subsystem, rest) = name.strip_prefix("nvme")?.split_once('c')?;
    let (controller, id) = rest.split_once('n')?;
    [subsystem, controller, id].into_iter().all(is_digits).then(|| format!("nvme{subsystem}n{id}"))
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}
