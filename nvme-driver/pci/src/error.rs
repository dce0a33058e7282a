//! What ends a look at the host early.

use std::path::PathBuf;

use crate::address::PciAddress;

/// Why the host could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PciError {
    /// No function has this address.
    #[error("there is no PCI function at {address}; {}", remedy(nearest))]
    NotThere {
        /// The address asked for.
        address: PciAddress,
        /// The NVMe controllers of the host, nearest address first.
        nearest: Vec<PciAddress>,
    },
    /// The host shows no PCI bus.
    #[error(
        "{} isn't there: this host shows no PCI bus; mount sysfs (mount -t sysfs sysfs /sys), or use a host or \
         virtual machine that has PCI devices",
        path.display()
    )]
    NoBus {
        /// Where the functions would be listed.
        path: PathBuf,
    },
    /// No IOMMU group has this number.
    #[error(
        "there is no IOMMU group {group} any more: the function left it; look again with `foliant devices`"
    )]
    NoGroup {
        /// The group asked for.
        group: u32,
    },
    /// A file or directory couldn't be read.
    #[error("cannot read {}: {source}; check that it may be read, or run this as root", path.display())]
    Read {
        /// What was read.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A file has a content that nothing can be made of.
    #[error("{} says `{value}` where {wanted} belongs; this kernel isn't understood", path.display())]
    Malformed {
        /// What was read.
        path: PathBuf,
        /// What it says.
        value: String,
        /// What it should say.
        wanted: &'static str,
    },
}

fn remedy(nearest: &[PciAddress]) -> String {
    let names: Vec<String> = nearest.iter().take(4).map(ToString::to_string).collect();
    match (names.len(), nearest.len()) {
        (0, _) => "this host shows no NVMe controller at all (lspci -nn -d ::0108 lists them)".to_owned(),
        (shown, all) if shown < all => {
            format!("NVMe controllers are at {} and {} more places", names.join(", "), all - shown)
        }
        (1, _) => format!("an NVMe controller is at {}", names.join("")),
        _ => format!("NVMe controllers are at {}", names.join(", ")),
    }
}
