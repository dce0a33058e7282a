//! Why a device could not be opened, each with what helps.

use std::io;
use std::path::PathBuf;

use foliant_nvme_pci::{PciAddress, PciError};

use crate::uri::UriError;

/// Why a device could not be opened through VFIO.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VfioError {
    /// The URI could not be understood.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// There is no such function, or the system's description of it can't be read.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The function is something else.
    #[error("{address} is no NVMe controller: its class is {class:06x}, not 010802; see: foliant devices")]
    NotNvme {
        /// The function.
        address: PciAddress,
        /// Its class code.
        class: u32,
    },
    /// The function is not bound to vfio-pci.
    #[error("{address} is bound to {driver}, not to vfio-pci; bind it with: foliant bind {address}")]
    NotBound {
        /// The function.
        address: PciAddress,
        /// "the driver nvme", say, or "no driver".
        driver: String,
    },
    /// The function has no IOMMU group.
    #[error(
        "{address} is in no IOMMU group: the IOMMU is off or missing; switch it on in the firmware and boot with \
         intel_iommu=on (Intel), see: foliant doctor. Without an IOMMU there is only vfio-noiommu:{address}, \
         which lets the device reach all memory"
    )]
    NoGroup {
        /// The function.
        address: PciAddress,
    },
    /// Another device of the group belongs to another driver.
    #[error(
        "IOMMU group {group} of {address} isn't viable: {others}; the IOMMU can't tell the group's devices apart, so \
         bind all of them to vfio-pci, or to no driver"
    )]
    GroupNotViable {
        /// The function.
        address: PciAddress,
        /// Its group.
        group: u32,
        /// The group's other members and their drivers.
        others: String,
    },
    /// The device is open already.
    #[error("{address} is in use: {holder}; close it there first")]
    InUse {
        /// The function.
        address: PciAddress,
        /// Who has it, as far as can be told.
        holder: String,
    },
    /// A node may not be opened.
    #[error(
        "no permission to open {}; give it to your user with: sudo chown USER {} (the nodes of a device: sudo foliant bind \
         {address} --owner USER)", node.display(), node.display()
    )]
    Permission {
        /// The function.
        address: PciAddress,
        /// The node.
        node: PathBuf,
    },
    /// A node that must be there isn't.
    #[error("there is no {}: {remedy}", node.display())]
    NodeMissing {
        /// The node.
        node: PathBuf,
        /// What makes it appear.
        remedy: String,
    },
    /// The URI's scheme doesn't fit the group.
    #[error("{address}: {reason}")]
    WrongMode {
        /// The function.
        address: PciAddress,
        /// What is wrong, and the right URI.
        reason: String,
    },
    /// The device or the kernel lacks something that is needed.
    #[error("{address}: {what}")]
    Unsupported {
        /// The function.
        address: PciAddress,
        /// What, with the value found and the one needed.
        what: String,
    },
    /// The system refused an operation.
    #[error("{address}: {what}: {source}")]
    Os {
        /// The function.
        address: PciAddress,
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}
