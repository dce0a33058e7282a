//! The host as files show it: the running one, or a directory that looks like one.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::address::PciAddress;
use crate::error::PciError;
use crate::function::PciFunction;

/// A host whose sysfs, procfs and device nodes lie under one root directory. Cheap to clone; holds nothing open.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
}

impl Host {
    /// The running host.
    #[must_use]
    pub fn live() -> Self {
        Self::at(Path::new("/"))
    }

    /// The host whose `sys`, `proc` and `dev` lie under `root`.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The path of something on this host, named from its root without a leading slash: `sys/bus/pci`.
    #[must_use]
    pub fn path(&self, below_root: impl AsRef<Path>) -> PathBuf {
        self.root.join(below_root)
    }

    /// The function at `address`.
    ///
    /// # Errors
    /// [`PciError::NotThere`], which names the NVMe controllers there are; the others when sysfs can't be read.
    pub fn function(&self, address: PciAddress) -> Result<PciFunction, PciError> {
        if !self.functions_path().join(address.to_string()).exists() {
            return Err(PciError::NotThere { address, nearest: self.nearest_nvme(address)? });
        }
        PciFunction::read(self, address)
    }

    /// All NVMe controllers, in the order of their addresses.
    ///
    /// # Errors
    /// [`PciError`] when sysfs can't be read. A function that vanishes meanwhile is left out.
    pub fn nvme_functions(&self) -> Result<Vec<PciFunction>, PciError> {
        let mut functions = Vec::new();
        let directory = self.functions_path();
        let addresses = addresses(&directory)?.ok_or(PciError::NoBus { path: directory })?;
        for address in addresses {
            if let Some(function) = self.unless_gone(address)?
                && function.is_nvme()
            {
                functions.push(function);
            }
        }
        Ok(functions)
    }

    /// All functions of an IOMMU group, bridges included, in the order of their addresses.
    ///
    /// # Errors
    /// [`PciError`] when there's no such group, or sysfs can't be read.
    pub fn group_members(&self, group: u32) -> Result<Vec<PciFunction>, PciError> {
        let directory = self.path(format!("sys/kernel/iommu_groups/{group}/devices"));
        let mut functions = Vec::new();
        for address in addresses(&directory)?.ok_or(PciError::NoGroup { group })? {
            functions.extend(self.unless_gone(address)?);
        }
        Ok(functions)
    }

    /// Whether it's the running host.
    pub(crate) fn is_live(&self) -> bool {
        self.root == Path::new("/")
    }

    pub(crate) fn functions_path(&self) -> PathBuf {
        self.path("sys/bus/pci/devices")
    }

    fn nearest_nvme(&self, address: PciAddress) -> Result<Vec<PciAddress>, PciError> {
        let place = |address: PciAddress| {
            let PciAddress { domain, bus, device, function } = address;
            i64::from(domain) << 16 | i64::from(bus) << 8 | i64::from(device) << 3 | i64::from(function)
        };
        let mut nearest: Vec<PciAddress> = self.nvme_functions()?.iter().map(|nvme| nvme.address).collect();
        nearest.sort_by_key(|nvme| place(*nvme).abs_diff(place(address)));
        Ok(nearest)
    }

    fn unless_gone(&self, address: PciAddress) -> Result<Option<PciFunction>, PciError> {
        match PciFunction::read(self, address) {
            Ok(function) => Ok(Some(function)),
            Err(_) if !self.functions_path().join(address.to_string()).exists() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The functions that a directory lists by their addresses, sorted; whatever else it lists is left out. `None` where
/// there is no such directory.
fn addresses(directory: &Path) -> Result<Option<Vec<PciAddress>>, PciError> {
    let Some(names) = entries(directory)? else { return Ok(None) };
    let mut addresses: Vec<PciAddress> =
        names.iter().filter_map(|name| name.to_str()?.parse().ok()).collect();
    addresses.sort_unstable();
    Ok(Some(addresses))
}

/// The content of a file without the white space around it; `None` where there is no such file, or where the kernel
/// has no answer to give.
pub(crate) fn attribute(path: &Path) -> Result<Option<String>, PciError> {
    match std::fs::read(path) {
        Ok(content) => Ok(Some(String::from_utf8_lossy(&content).trim().to_owned())),
        Err(error) if is_absent(&error) => Ok(None),
        Err(source) => Err(PciError::Read { path: path.to_owned(), source }),
    }
}

/// The names in a directory, sorted; `None` where there is no such directory.
pub(crate) fn entries(directory: &Path) -> Result<Option<Vec<OsString>>, PciError> {
    let read = |source| PciError::Read { path: directory.to_owned(), source };
    let listing = match std::fs::read_dir(directory) {
        Ok(listing) => listing,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(source) => return Err(read(source)),
    };
    let mut names = Vec::new();
    for entry in listing {
        names.push(entry.map_err(read)?.file_name());
    }
    names.sort();
    Ok(Some(names))
}

/// The last part of what a symbolic link names; `None` where there is no such link.
pub(crate) fn link_name(path: &Path) -> Result<Option<String>, PciError> {
    match std::fs::read_link(path) {
        Ok(target) => Ok(target.file_name().map(|name| name.to_string_lossy().into_owned())),
        Err(error) if is_absent(&error) => Ok(None),
        Err(source) => Err(PciError::Read { path: path.to_owned(), source }),
    }
}

/// A number in hexadecimal with `0x`, or in decimal, that a file must hold.
pub(crate) fn number(path: &Path, wanted: &'static str) -> Result<u64, PciError> {
    let missing = || std::io::Error::from(ErrorKind::NotFound);
    let value =
        attribute(path)?.ok_or_else(|| PciError::Read { path: path.to_owned(), source: missing() })?;
    let parsed = match value.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => value.parse(),
    };
    parsed.map_err(|_| PciError::Malformed { path: path.to_owned(), value, wanted })
}

/// Whether an error says that something isn't there, or no longer: files of a device that goes answer `ENODEV`.
fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
        || error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error())
}
