//! A device node, by its name below `/dev` and by its number.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use crate::error::PciError;
use crate::host::{Host, attribute};
use crate::processes::OpenFile;

/// The number of a device node. Unique among nodes of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceNumber {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

impl DeviceNumber {
    /// Reads `259:3`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

/// Numbers of block and character devices are apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NodeKind {
    Block,
    Character,
}

/// A device node that leads to a function, directly or through what the kernel has built on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) kind: NodeKind,
    /// Below `/dev`, as the kernel names it: `nvme0n1p1`, `dm-0`, `vfio/12`.
    pub(crate) name: String,
    pub(crate) number: Option<DeviceNumber>,
    /// What people call it, where that's another name: `vg-root`.
    pub(crate) alias: Option<String>,
}

impl Node {
    /// The node called `name`, whose directory in sysfs holds its number in `dev`.
    pub(crate) fn in_sysfs(kind: NodeKind, name: &str, directory: &Path) -> Result<Self, PciError> {
        let number = attribute(&directory.join("dev"))?.as_deref().and_then(DeviceNumber::parse);
        // Sysfs can't have a slash in a name.
        Ok(Self { kind, name: name.replace('!', "/"), number, alias: None })
    }

    /// The character device at `name` below `/dev`, which has no directory in sysfs that is known.
    pub(crate) fn in_dev(host: &Host, name: &str) -> Self {
        let metadata = std::fs::metadata(host.path("dev").join(name)).ok();
        let number = metadata.filter(|metadata| metadata.file_type().is_char_device()).map(|metadata| {
            let number = metadata.rdev();
            DeviceNumber { major: rustix::fs::major(number), minor: rustix::fs::minor(number) }
        });
        Self { kind: NodeKind::Character, name: name.to_owned(), number, alias: None }
    }

    /// The name for people.
    pub(crate) fn label(&self) -> String {
        match &self.alias {
            Some(alias) => format!("{} ({alias})", self.name),
            None => self.name.clone(),
        }
    }

    /// Whether an absolute path of the host leads to this node, by its number or by its name. Links are followed:
    /// `/dev/mapper/vg-root` is `/dev/dm-0`.
    pub(crate) fn is_at(&self, host: &Host, path: &str) -> bool {
        let Some(below_root) = path.strip_prefix('/') else { return false };
        let here = host.path(below_root);
        let number = std::fs::metadata(&here).ok().and_then(|metadata| {
            let kind = match metadata.file_type() {
                kind if kind.is_block_device() => NodeKind::Block,
                kind if kind.is_char_device() => NodeKind::Character,
                _ => return None,
            };
            let number = metadata.rdev();
            let number = DeviceNumber { major: rustix::fs::major(number), minor: rustix::fs::minor(number) };
            Some((kind, Some(number)))
        });
        let resolved = std::fs::canonicalize(&here).unwrap_or(here);
        number == Some((self.kind, self.number)) || resolved == host.path("dev").join(&self.name)
    }

    /// Whether it's this node that an open file leads to, by its number or by its name.
    pub(crate) fn is_opened_by(&self, file: &OpenFile<'_>) -> bool {
        file.target.strip_prefix("/dev/").is_some_and(|name| name == self.name)
            || matches!((file.device, self.number), (Some(opened), Some(own)) if opened == (self.kind, own))
    }
}
