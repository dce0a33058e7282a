//! Why a controller stays with the driver that it has.

use std::fmt;
use std::io::ErrorKind;
use std::path::PathBuf;

use foliant_nvme_pci::{Doubt, PciAddress, Use};

/// What a driver change was refused for, or failed by.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BindError {
    #[error(
        "{address} is no NVMe controller: its PCI class is {class:06x}, and that of NVMe 010802; \
         `foliant devices` lists the controllers"
    )]
    NotNvme { address: PciAddress, class: u32 },
    #[error(
        "{address} belongs to the driver {driver}, which isn't the kernel's nvme: another program has set that up; \
         give the controller back with that program first (SPDK: scripts/setup.sh reset)"
    )]
    ForeignDriver { address: PciAddress, driver: String },
    #[error("{address} is in use and stays where it is: {}", list(uses.iter().map(describe_use)))]
    InUse { address: PciAddress, uses: Vec<Use> },
    #[error(
        "whether {address} is in use can't be told, so it stays where it is: {}",
        list(doubts.iter().map(ToString::to_string))
    )]
    Doubtful { address: PciAddress, doubts: Vec<Doubt> },
    #[error(
        "the IOMMU can't keep {address} apart from {}, of the same group {group}: VFIO opens the group only when \
         all of it is on vfio-pci; {}, or move the drive to another slot",
        list(others.iter().map(|(address, driver)| format!("{address} (driver {driver})"))),
        list(others.iter().map(|(address, driver)| {
            format!("echo {address} > /sys/bus/pci/drivers/{driver}/unbind (if you can do without that device)")
        }))
    )]
    GroupShared { address: PciAddress, group: u32, others: Vec<(PciAddress, String)> },
    #[error(
        "{address} has no IOMMU group: nothing would keep the device out of this machine's memory. Switch the \
         IOMMU on, `foliant doctor --device {address}` says how; or give up that protection: foliant bind \
         {address} --noiommu"
    )]
    NoGroup { address: PciAddress },
    #[error(
        "{address} is in IOMMU group {group}, so --noiommu would give up its protection for nothing; leave it out"
    )]
    NoiommuNotNeeded { address: PciAddress, group: u32 },
    #[error(
        "this kernel can't do VFIO without an IOMMU: {} isn't there, so it was built without CONFIG_VFIO_NOIOMMU; \
         boot a kernel that has it (grep NOIOMMU /boot/config-$(uname -r)), or a machine with an IOMMU",
        parameter.display()
    )]
    NoNoiommu { parameter: PathBuf },
    #[error(
        "a device without an IOMMU can only be opened by root (CAP_SYS_RAWIO), so giving its node to {user} helps \
         nothing; leave --owner out and run the database as root, or use an IOMMU"
    )]
    OwnerWithoutIommu { user: String },
    #[error(
        "the kernel module {module} can't be loaded: {reason}; `foliant doctor` says where it comes from"
    )]
    Module { module: &'static str, reason: String },
    #[error(
        "{} is claimed by something that /proc and /sys don't show (ZFS, for instance), so {address} stays where \
         it is; find it with lsblk {} and let it go",
        node.display(), node.display()
    )]
    Claimed { address: PciAddress, node: PathBuf },
    #[error("cannot open {} to make sure that nobody uses it: {source}; run this as root", node.display())]
    Claim { node: PathBuf, source: std::io::Error },
    #[error("cannot write `{value}` to {}: {source}; {}{put_back}", path.display(), remedy(source))]
    Write { path: PathBuf, value: String, source: std::io::Error, put_back: PutBack },
    #[error("the driver {driver} didn't take {address}; the end of dmesg says why{put_back}")]
    NotTaken { address: PciAddress, driver: &'static str, put_back: PutBack },
    #[error(
        "{address} is on {driver} now, but {} couldn't be given to {user}: {source}; try chown {user} {}",
        node.display(), node.display()
    )]
    Owner { address: PciAddress, driver: &'static str, node: PathBuf, user: String, source: std::io::Error },
}

/// What became of a controller whose driver couldn't be changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PutBack {
    /// Nothing had been changed yet.
    Unchanged,
    /// It's as it was.
    Done { driver: String },
    /// It isn't.
    Failed { address: PciAddress, wanted: String, found: Option<String> },
}

impl fmt::Display for PutBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unchanged => f.write_str(". Nothing was changed"),
            Self::Done { driver } => {
                write!(f, ". What had been changed was put back: the driver is {driver}")
            }
            Self::Failed { address, wanted, found } => {
                let found = found.as_deref().unwrap_or("none");
                write!(
                    f,
                    ". Putting back what had been changed failed too: the driver is {found} where {wanted} was; \
                     try: echo > /sys/bus/pci/devices/{address}/driver_override; \
                     echo {address} > /sys/bus/pci/drivers_probe"
                )
            }
        }
    }
}

fn list(items: impl Iterator<Item = String>) -> String {
    items.collect::<Vec<_>>().join("; ")
}

fn describe_use(known: &Use) -> String {
    format!("{known} ({})", known.remedy())
}

/// What helps when sysfs refuses a write.
fn remedy(error: &std::io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::PermissionDenied => "run this as root",
        ErrorKind::ReadOnlyFilesystem => {
            "sysfs is read-only here, as in most containers: run this on the host"
        }
        _ => "the end of dmesg may say why",
    }
}
