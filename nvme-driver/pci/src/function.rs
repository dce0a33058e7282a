//! One PCI function, as sysfs shows it at a moment.

use std::path::{Path, PathBuf};

use crate::address::PciAddress;
use crate::error::PciError;
use crate::host::{Host, attribute, entries, link_name, number};
use crate::kernel::KernelController;

/// Class 01h (mass storage), subclass 08h (non-volatile memory), interface 02h (NVMe I/O controller): NVMe over PCIe
/// Transport Specification, section 3.8.1.2.
const CLASS_NVME: u32 = 0x01_08_02;
/// What the kernel names the groups that it makes for functions without an IOMMU.
const NOIOMMU_GROUP: &str = "vfio-noiommu";

/// A PCI function at the moment when it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PciFunction {
    /// Where it is.
    pub address: PciAddress,
    /// The vendor's PCI id.
    pub vendor: u16,
    /// The device's PCI id.
    pub device: u16,
    /// The class code: class, subclass and programming interface in 24 bits.
    pub class: u32,
    /// The kernel driver that has it.
    pub driver: Option<String>,
    /// What `driver_override` names: the only driver that may take it.
    pub driver_override: Option<String>,
    /// Its IOMMU group.
    pub iommu_group: Option<u32>,
    /// Whether the group was made by VFIO for a function without IOMMU protection.
    pub noiommu: bool,
    /// The NUMA node that it's closest to.
    pub numa_node: Option<u32>,
    /// The character device of VFIO's newer interface (`/dev/vfio/devices/vfioN`), where the kernel has it and
    /// vfio-pci has the function.
    pub vfio_cdev: Option<PathBuf>,
    /// What the kernel's NVMe driver shows of it, while that driver has it.
    pub kernel: Option<KernelController>,
    group_node: Option<PathBuf>,
}

impl PciFunction {
    /// Whether it's an NVMe I/O controller.
    #[must_use]
    pub fn is_nvme(&self) -> bool {
        self.class == CLASS_NVME
    }

    /// Whether it's a bridge (class 06h). Bridges of a group stay with their driver.
    #[must_use]
    pub fn is_bridge(&self) -> bool {
        self.class >> 16 == 0x06
    }

    /// Whether vfio-pci has it.
    #[must_use]
    pub fn is_on_vfio(&self) -> bool {
        self.driver.as_deref() == Some("vfio-pci")
    }

    /// The node of its group: `/dev/vfio/N`, or `/dev/vfio/noiommu-N`. It appears when vfio-pci takes a function of
    /// the group; `None` where there is no group.
    #[must_use]
    pub fn group_node(&self) -> Option<&Path> {
        self.group_node.as_deref()
    }

    /// Reads the function at `address`, which must be there.
    pub(crate) fn read(host: &Host, address: PciAddress) -> Result<Self, PciError> {
        let directory = host.functions_path().join(address.to_string());
        let id = |name| {
            let path = directory.join(name);
            let value = number(&path, "a PCI id of 16 bits")?;
            u16::try_from(value).map_err(|_| PciError::Malformed {
                path,
                value: format!("{value:#x}"),
                wanted: "a PCI id of 16 bits",
            })
        };
        let iommu_group = link_name(&directory.join("iommu_group"))?.and_then(|name| name.parse().ok());
        let noiommu = match iommu_group {
            Some(group) => {
                let name = attribute(&host.path(format!("sys/kernel/iommu_groups/{group}/name")))?;
                name.as_deref() == Some(NOIOMMU_GROUP)
            }
            None => false,
        };
        let prefix = if noiommu { "noiommu-" } else { "" };
        let driver = link_name(&directory.join("driver"))?;
        let nvme = driver.as_deref() == Some("nvme");
        Ok(Self {
            address,
            vendor: id("vendor")?,
            device: id("device")?,
            class: (number(&directory.join("class"), "a PCI class of 24 bits")? & 0xff_ffff) as u32,
            // Without an override the kernel prints a null pointer.
            driver_override: attribute(&directory.join("driver_override"))?
                .filter(|name| !name.is_empty() && name != "(null)"),
            iommu_group,
            noiommu,
            // No node at all is -1.
            numa_node: attribute(&directory.join("numa_node"))?.and_then(|node| node.parse().ok()),
            vfio_cdev: vfio_cdev(host, &directory)?,
            kernel: if nvme { KernelController::of_function(host, &directory)? } else { None },
            group_node: iommu_group.map(|group| host.path(format!("dev/vfio/{prefix}{group}"))),
            driver,
        })
    }
}

fn vfio_cdev(host: &Host, directory: &Path) -> Result<Option<PathBuf>, PciError> {
    let directory = directory.join("vfio-dev");
    for name in entries(&directory)?.unwrap_or_default() {
        // A kernel without the interface lists the device as well, but gives it no device number.
        if directory.join(&name).join("dev").exists() {
            return Ok(Some(host.path("dev/vfio/devices").join(name)));
        }
    }
    Ok(None)
}
