//! From an address to an open device: the checks, the kernel's nodes in their order, and what each refusal means.
//!
//! ```text
//!  group    /dev/vfio/N ─ viable? ─ /dev/vfio/vfio ─ join ─ set the IOMMU ─ get the device
//!  iommufd  /dev/vfio/devices/vfioN ─ /dev/iommu ─ bind ─ new address space ─ attach
//! ```
//!
//! A group belongs to one owner in the whole system, so devices of one group that are opened in one process share what
//! owns it, a container or an iommufd, and with it their address space.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use foliant_nvme_pci::{Host, PciAddress, PciFunction};
use vfio_bindings::bindings::vfio;

use crate::error::VfioError;
use crate::space::AddressSpace;
use crate::uapi::{ContainerFd, DeviceFd, GroupFd, IommuFd};
use crate::uri::{Interface, VfioUri};

/// A device that is open, with its address space.
#[derive(Debug)]
pub(crate) struct OpenDevice {
    pub(crate) device: DeviceFd,
    pub(crate) space: Arc<GroupSpace>,
    /// Dropped last: from then on the address may be opened again.
    pub(crate) claim: Claim,
}

/// An address space, and what must stay open beside it.
#[derive(Debug)]
pub(crate) struct GroupSpace {
    pub(crate) space: AddressSpace,
    /// The group belongs to this process as long as this is open.
    group: Option<GroupFd>,
    /// The container of a group without an IOMMU.
    _container: Option<ContainerFd>,
}

/// Opens the device that `uri` names.
pub(crate) fn open(host: &Host, uri: &VfioUri) -> Result<OpenDevice, VfioError> {
    let function = host.function(uri.address)?;
    check(&function, uri)?;
    let claim = Claim::take(uri.address)?;
    let opening = Opening { host, function };
    let (device, space) = match uri.interface {
        Interface::Group | Interface::NoIommu => opening.by_group()?,
        Interface::Iommufd => opening.by_iommufd()?,
        Interface::Automatic => opening.automatically()?,
    };
    Ok(OpenDevice { device, space, claim })
}

/// What can be told before anything is opened.
fn check(function: &PciFunction, uri: &VfioUri) -> Result<(), VfioError> {
    let address = function.address;
    if !function.is_nvme() {
        return Err(VfioError::NotNvme { address, class: function.class });
    }
    // Drivers for a device of their own have names such as mlx5_vfio_pci.
    if !function.driver.as_ref().is_some_and(|driver| driver.contains("vfio")) {
        let driver =
            function.driver.as_ref().map_or("no driver".to_owned(), |driver| format!("the driver {driver}"));
        return Err(VfioError::NotBound { address, driver });
    }
    if function.iommu_group.is_none() {
        return Err(VfioError::NoGroup { address });
    }
    let wrong = |reason: String| Err(VfioError::WrongMode { address, reason });
    match (function.noiommu, uri.interface == Interface::NoIommu) {
        (true, false) => wrong(format!(
            "there is no IOMMU before it, so the device can reach all memory; if that is acceptable, say so by name: \
             vfio-noiommu:{address}"
        )),
        (false, true) => wrong(format!("there is an IOMMU before it; use it: vfio:{address}")),
        _ => Ok(()),
    }
}

struct Opening<'a> {
    host: &'a Host,
    function: PciFunction,
}

type Opened = (DeviceFd, Arc<GroupSpace>);

impl Opening<'_> {
    /// As the rest of the group, where some of it is open here; else by iommufd where the kernel offers it and lets us;
    /// else by the group.
    fn automatically(&self) -> Result<Opened, VfioError> {
        if let Some(space) = self.shared(&lock(&GROUPS))? {
            return if space.group.is_some() { self.by_group() } else { self.by_iommufd() };
        }
        let nodes = [self.function.vfio_cdev.clone(), Some(self.iommu_node())];
        let is_usable = |node: &Option<PathBuf>| node.as_deref().is_some_and(|node| open_node(node).is_ok());
        if nodes.iter().all(is_usable) { self.by_iommufd() } else { self.by_group() }
    }

    /// What owns the function's group already in this process.
    fn shared(&self, groups: &Groups) -> Result<Option<Arc<GroupSpace>>, VfioError> {
        Ok(groups.get(&self.group_number()?).and_then(Weak::upgrade))
    }

    fn by_group(&self) -> Result<Opened, VfioError> {
        let mut groups = lock(&GROUPS);
        let number = self.group_number()?;
        let space = match self.shared(&groups)? {
            Some(space) => space,
            None => Arc::new(self.open_group(number)?),
        };
        let Some(group) = &space.group else {
            return Err(self.unsupported(
                "its group is open by iommufd in this process; leave ?iommu=group out".to_owned(),
            ));
        };
        let device = group.device(&self.function.address.to_string());
        let device = device.map_err(self.os("cannot get the device from its group"))?;
        remember(&mut groups, number, &space);
        Ok((device, space))
    }

    fn open_group(&self, number: u32) -> Result<GroupSpace, VfioError> {
        let address = self.function.address;
        let node = self.function.group_node().map(Path::to_path_buf).unwrap_or_default();
        let remedy =
            format!("load the driver and bind the device: modprobe vfio-pci; foliant bind {address}");
        let group = GroupFd(self.node(&node, remedy)?);
        if !group.is_viable().map_err(self.os("cannot ask for the group's status"))? {
            return Err(VfioError::GroupNotViable { address, group: number, others: self.others(number) });
        }
        let remedy = "load the module: modprobe vfio_iommu_type1".to_owned();
        let container = ContainerFd(self.node(&self.host.path("dev/vfio/vfio"), remedy)?);
        let version = container.api_version().map_err(self.os("cannot ask for VFIO's version"))?;
        if version != vfio::VFIO_API_VERSION as i32 {
            return Err(self
                .unsupported(format!("the kernel speaks version {version} of VFIO; this program speaks 0")));
        }
        let kind = if self.function.noiommu { vfio::VFIO_NOIOMMU_IOMMU } else { vfio::VFIO_TYPE1v2_IOMMU };
        if !container.has_extension(kind).map_err(self.os("cannot ask for VFIO's extensions"))? {
            return Err(self.unsupported(format!(
                "the kernel has no IOMMU backend of kind {kind} (type 1 v2 is 3, none is 8); load it: modprobe vfio_iommu_type1"
            )));
        }
        group.set_container(&container).map_err(self.os("cannot join the group to a container"))?;
        container.set_iommu(kind).map_err(|error| self.attach_refused(error))?;
        if self.function.noiommu {
            let space = AddressSpace::physical();
            return Ok(GroupSpace { space, group: Some(group), _container: Some(container) });
        }
        let space = AddressSpace::container(container);
        let space = space.map_err(self.os("cannot ask what the IOMMU accepts"))?;
        Ok(GroupSpace { space, group: Some(group), _container: None })
    }

    fn by_iommufd(&self) -> Result<Opened, VfioError> {
        let address = self.function.address;
        let Some(node) = &self.function.vfio_cdev else {
            return Err(self.unsupported(
                "it has no node of its own under /dev/vfio/devices: that needs Linux 6.6 with CONFIG_VFIO_DEVICE_CDEV; \
                 use ?iommu=group"
                    .to_owned(),
            ));
        };
        let device = DeviceFd(self.node(node, format!("bind the device: foliant bind {address}"))?);
        let bind = |iommufd: &IommuFd| {
            device.bind_iommufd(iommufd).map_err(|error| match error.raw_os_error() {
                // The kernel lets several open the node, but one bind it.
                Some(libc::EINVAL | libc::EBUSY) => VfioError::InUse { address, holder: self.holder(node) },
                Some(libc::EPERM) => self.unsupported(
                    "the kernel doesn't give it to iommufd: another process has a device of its group, or the machine \
                     doesn't remap interrupts (switch that on in the firmware, or, where every user of the machine is \
                     trusted: modprobe iommufd allow_unsafe_interrupts=1)"
                        .to_owned(),
                ),
                _ => self.os("cannot bind the device to iommufd")(error),
            })
        };
        let attach = |ioas| device.attach(ioas).map_err(|error| self.attach_refused(error));
        let mut groups = lock(&GROUPS);
        let number = self.group_number()?;
        if let Some(space) = self.shared(&groups)? {
            let Some((iommufd, ioas)) = space.space.as_iommufd() else {
                return Err(
                    self.unsupported("its group is open in this process; use ?iommu=group".to_owned())
                );
            };
            bind(iommufd)?;
            attach(ioas)?;
            return Ok((device, space));
        }
        let remedy = "load the module: modprobe iommufd; or use ?iommu=group".to_owned();
        let iommufd = IommuFd(self.node(&self.iommu_node(), remedy)?);
        bind(&iommufd)?;
        let ioas = iommufd.allocate_ioas().map_err(self.os("cannot make an I/O address space"))?;
        attach(ioas)?;
        let space =
            AddressSpace::iommufd(iommufd, ioas).map_err(self.os("cannot ask what the IOMMU accepts"))?;
        let space = Arc::new(GroupSpace { space, group: None, _container: None });
        remember(&mut groups, number, &space);
        Ok((device, space))
    }

    fn iommu_node(&self) -> PathBuf {
        self.host.path("dev/iommu")
    }

    fn group_number(&self) -> Result<u32, VfioError> {
        self.function.iommu_group.ok_or(VfioError::NoGroup { address: self.function.address })
    }

    /// Opens a node of the kernel, and says what a refusal means.
    fn node(&self, node: &Path, remedy: String) -> Result<File, VfioError> {
        let address = self.function.address;
        open_node(node).map_err(|error| match (error.kind(), error.raw_os_error()) {
            (io::ErrorKind::NotFound, _) | (_, Some(libc::ENODEV)) => {
                VfioError::NodeMissing { node: node.to_owned(), remedy }
            }
            (io::ErrorKind::PermissionDenied, _) if self.function.noiommu => self.unsupported(
                "without an IOMMU the kernel gives a device only to a process with CAP_SYS_RAWIO; run it as root".to_owned(),
            ),
            (io::ErrorKind::PermissionDenied, _) => VfioError::Permission { address, node: node.to_owned() },
            (_, Some(libc::EBUSY)) => VfioError::InUse { address, holder: self.holder(node) },
            _ => self.os("cannot open a node of VFIO")(error),
        })
    }

    /// Who has the device open, as far as can be told.
    fn holder(&self, node: &Path) -> String {
        let uses = self.host.usage(&self.function).map(|usage| usage.uses).unwrap_or_default();
        if uses.is_empty() {
            return format!(
                "another process has {} open (which one, root can see: foliant devices)",
                node.display()
            );
        }
        uses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    }

    /// The members of the group that belong to other drivers.
    fn others(&self, group: u32) -> String {
        let members = self.host.group_members(group).unwrap_or_default();
        let others: Vec<String> = members
            .iter()
            .filter(|member| !member.is_bridge())
            .filter_map(|member| {
                let driver = member.driver.as_ref().filter(|driver| !driver.contains("vfio"))?;
                Some(format!("{} has the driver {driver}", member.address))
            })
            .collect();
        if others.is_empty() { "some member has a driver of its own".to_owned() } else { others.join(", ") }
    }

    fn attach_refused(&self, error: io::Error) -> VfioError {
        match error.raw_os_error() {
            Some(libc::EPERM) => self.unsupported(
                "the machine doesn't remap interrupts, so the kernel doesn't give devices away; switch interrupt \
                 remapping on in the firmware, or, where every user of the machine is trusted: modprobe vfio_iommu_type1 \
                 allow_unsafe_interrupts=1"
                    .to_owned(),
            ),
            _ => self.os("cannot attach the device to an IOMMU address space")(error),
        }
    }

    fn unsupported(&self, what: String) -> VfioError {
        VfioError::Unsupported { address: self.function.address, what }
    }

    fn os(&self, what: &'static str) -> impl Fn(io::Error) -> VfioError + use<> {
        let address = self.function.address;
        move |source| VfioError::Os { address, what, source }
    }
}

fn open_node(node: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(node)
}

type Groups = BTreeMap<u32, Weak<GroupSpace>>;

/// The groups that this process has open.
static GROUPS: Mutex<Groups> = Mutex::new(BTreeMap::new());

/// Lets others of the group find what owns it; forgets groups that are closed.
fn remember(groups: &mut Groups, number: u32, space: &Arc<GroupSpace>) {
    groups.retain(|_, space| space.strong_count() > 0);
    groups.insert(number, Arc::downgrade(space));
}

/// The devices that this process has open: the kernel would give a device of an open group out twice.
static CLAIMED: Mutex<Vec<PciAddress>> = Mutex::new(Vec::new());

/// The right to open a device in this process.
#[derive(Debug)]
pub(crate) struct Claim(PciAddress);

impl Claim {
    fn take(address: PciAddress) -> Result<Self, VfioError> {
        let mut claimed = lock(&CLAIMED);
        if claimed.contains(&address) {
            return Err(VfioError::InUse { address, holder: "this process has it open already".to_owned() });
        }
        claimed.push(address);
        Ok(Self(address))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&CLAIMED).retain(|address| *address != self.0);
    }
}

/// A panic while one of the lists was held leaves it whole: each change is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
