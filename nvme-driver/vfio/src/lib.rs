//! An NVMe controller on PCIe that this process owns through VFIO: the [`Transport`] of hardware, and of QEMU.
//!
//! It owns the device's descriptor, its mapped registers, its address space and its interrupts, for as long as the
//! transport lives; then bus mastering goes off and the kernel takes the device back and resets it. It knows nothing of
//! NVMe beyond where the doorbells begin, never writes to sysfs (binding is `foliant bind`), and touches no device that
//! isn't bound to VFIO already.
//!
//! | module | owns |
//! |---|---|
//! | `uri` | what names a device |
//! | `open` | the kernel's nodes in their order; what each refusal means |
//! | `space`, `iova`, `physical` | what memory the device reaches, at which addresses |
//! | `registers`, `access` | BAR 0 mapped; regions read and written through the kernel |
//! | `interrupts` | messages (MSI-X) as eventfds, armed only for an owner that sleeps |
//! | `uapi`, `capability` | the kernel's structures and calls |
//!
//! Sources: `Documentation/driver-api/vfio.rst`, `linux/vfio.h`, `linux/iommufd.h`; PCI Local Bus section 6.2 (the
//! command register).

mod access;
mod capability;
mod error;
mod interrupts;
mod iova;
mod open;
mod physical;
mod registers;
mod space;
mod uapi;
mod uri;

use std::sync::Arc;

use foliant_nvme_pci::{Host, PciAddress};
use foliant_nvme_transport::{
    DmaMemory, Doorbells, Iova, QueueDrive, QueueInterrupt, Transport, TransportError,
};
use vfio_bindings::bindings::vfio;

use access::RegionAccess;
pub use error::VfioError;
use interrupts::{BusSignals, Messages};
use open::{Claim, GroupSpace};
use registers::RegisterBar;
use uapi::{DeviceFd, DeviceInfo};
pub use uri::{Interface, UriError, VfioUri};

/// Opens the device that `uri` names: `vfio:0000:01:00.0[?iommu=group|iommufd]`, or `vfio-noiommu:0000:01:00.0`.
///
/// # Errors
/// [`VfioError`] says what is missing and what helps. Nothing is changed then: the device stays bound as it was.
pub fn open(uri: &str) -> Result<Arc<VfioTransport>, VfioError> {
    VfioTransport::open(&uri.parse()?)
}

/// The command register in config space (PCI Local Bus section 6.2.2) and its bits.
mod command {
    pub(super) const OFFSET: u64 = 4;
    pub(super) const MEMORY_SPACE: u16 = 1 << 1;
    pub(super) const BUS_MASTER: u16 = 1 << 2;
    pub(super) const INTERRUPT_DISABLE: u16 = 1 << 10;
}

/// One NVMe controller, open through VFIO. Dropping it gives the device back to the kernel.
#[derive(Debug)]
pub struct VfioTransport {
    // In the order of dropping: what needs the device before the device, the claim last.
    name: String,
    registers: RegisterBar,
    config: RegionAccess,
    messages: Messages,
    signals: BusSignals,
    device: Arc<DeviceFd>,
    can_reset: bool,
    space: Arc<GroupSpace>,
    numa_node: Option<u32>,
    _claim: Claim,
}

impl VfioTransport {
    /// Opens the device that `uri` names.
    ///
    /// # Errors
    /// As [`open`].
    pub fn open(uri: &VfioUri) -> Result<Arc<Self>, VfioError> {
        let address = uri.address;
        if uri.interface == Interface::NoIommu {
            tracing::warn!(
                device = %address,
                "no IOMMU: a fault of the device, its firmware or this program can overwrite any memory of the machine, and \
                 so can commands in flight when this process is killed"
            );
        }
        // In this order, so that the claim is the last to go when something below fails.
        let open::OpenDevice { claim, space, device } = open::open(&Host::live(), uri)?;
        let os = |what| move |source| VfioError::Os { address, what, source };
        let DeviceInfo { is_pci, can_reset } = device.info().map_err(os("cannot ask what the device is"))?;
        if !is_pci {
            return Err(VfioError::Unsupported {
                address,
                what: "VFIO says that it is no PCI device".to_owned(),
            });
        }
        let config = device.region(vfio::VFIO_PCI_CONFIG_REGION_INDEX);
        let config = config
            .and_then(|info| RegionAccess::new(&device.0, &info))
            .map_err(os("cannot reach the config space"))?;
        let bar = device.region(vfio::VFIO_PCI_BAR0_REGION_INDEX).map_err(os("cannot ask for BAR 0"))?;
        let registers =
            RegisterBar::map(&device.0, &bar).map_err(|what| VfioError::Unsupported { address, what })?;
        let signals = BusSignals::new(&device);
        let device = Arc::new(device);
        let transport = Self {
            name: uri.to_string(),
            registers,
            config,
            messages: Messages::new(device.clone()),
            signals,
            device,
            can_reset,
            space,
            // Where it can't be read, memory and processors are only less well chosen.
            numa_node: Host::live().function(address).ok().and_then(|function| function.numa_node),
            _claim: claim,
        };
        // Bus mastering comes with the first mapping: what the device was told before us stays without effect.
        let (set, clear) = (command::MEMORY_SPACE | command::INTERRUPT_DISABLE, command::BUS_MASTER);
        transport.change_command(set, clear).map_err(|error| VfioError::Unsupported {
            address,
            what: format!("its registers can't be switched on: {error}"),
        })?;
        tracing::debug!(device = transport.name, can_reset, "opened through VFIO");
        Ok(Arc::new(transport))
    }

    /// The controller's PCI address.
    ///
    /// # Panics
    /// Never: the name is the URI that the transport was opened with.
    #[must_use]
    pub fn address(&self) -> PciAddress {
        self.name.parse::<VfioUri>().expect("the name is a URI").address
    }

    /// Sets and clears bits of the command register, and makes sure that they took.
    fn change_command(&self, set: u16, clear: u16) -> Result<(), TransportError> {
        let os = |source| TransportError::Os { what: "cannot change the PCI command register", source };
        let before = self.config.read_u16(command::OFFSET).map_err(os)?;
        if before == u16::MAX {
            return Err(TransportError::Gone);
        }
        let wanted = (before | set) & !clear;
        self.config.write_u16(command::OFFSET, wanted).map_err(os)?;
        match self.config.read_u16(command::OFFSET).map_err(os)? {
            u16::MAX => Err(TransportError::Gone),
            after if after & (set | clear) == wanted & (set | clear) => Ok(()),
            after => Err(os(std::io::Error::other(format!(
                "it reads {after:#06x} after {wanted:#06x} was written"
            )))),
        }
    }
}

impl Drop for VfioTransport {
    fn drop(&mut self) {
        if let Err(error) = self.change_command(0, command::BUS_MASTER) {
            tracing::debug!(device = self.name, %error, "bus mastering stays on until the kernel resets the device");
        }
    }
}

// SAFETY: the doorbells lie in a mapping that `registers` owns. `map_dma` has the kernel map exactly the given memory,
// at addresses that `space` hands out once, and pins it; `unmap_dma` returns success only after the kernel has
// taken the whole mapping back, and `stop_dma` only after bus mastering was seen to be off.
#[expect(unsafe_code, reason = "the transport vouches for memory that a device writes")]
unsafe impl Transport for VfioTransport {
    fn name(&self) -> &str {
        &self.name
    }

    fn read_u32(&self, offset: u32) -> Result<u32, TransportError> {
        if self.signals.has_failed(&self.name) {
            return Ok(u32::MAX);
        }
        self.registers.read(offset)
    }

    /// Two reads of 32 bits, the lower first: not every device takes one of 64 bits.
    fn read_u64(&self, offset: u32) -> Result<u64, TransportError> {
        let halves = || Ok::<_, TransportError>([self.read_u32(offset)?, self.read_u32(offset + 4)?]);
        let mut read = halves()?;
        // A device that goes away between the two must read all ones as a whole.
        if read.contains(&u32::MAX) {
            read = halves()?;
        }
        Ok(u64::from(read[0]) | u64::from(read[1]) << 32)
    }

    fn write_u32(&self, offset: u32, value: u32) -> Result<(), TransportError> {
        self.registers.write(offset, value)
    }

    fn write_u64(&self, offset: u32, value: u64) -> Result<(), TransportError> {
        self.write_u32(offset, value as u32)?;
        self.write_u32(offset + 4, (value >> 32) as u32)
    }

    fn doorbells(&self) -> Doorbells {
        self.registers.doorbells()
    }

    unsafe fn map_dma(&self, memory: DmaMemory) -> Result<Iova, TransportError> {
        let iova = self.space.space.map(memory)?;
        self.change_command(command::BUS_MASTER, 0).inspect_err(|_| {
            if let Err(error) = self.space.space.unmap(iova, memory.len_bytes) {
                tracing::debug!(device = self.name, %error, "a mapping stays until the device is closed");
            }
        })?;
        Ok(iova)
    }

    fn unmap_dma(&self, iova: Iova, len_bytes: usize) -> Result<(), TransportError> {
        self.space.space.unmap(iova, len_bytes)
    }

    /// Bus mastering off, and the function reset, so that it starts from nothing when it is opened again. A device
    /// that is no longer on the bus reaches nothing.
    fn stop_dma(&self) -> Result<(), TransportError> {
        match self.change_command(0, command::BUS_MASTER) {
            Err(TransportError::Gone) => return Ok(()),
            changed => changed?,
        }
        if self.can_reset
            && let Err(error) = self.device.reset()
        {
            tracing::warn!(device = self.name, %error, "the function could not be reset; its bus mastering is off");
        }
        Ok(())
    }

    fn queue_drive(&self, _qid: u16) -> Option<Box<dyn QueueDrive>> {
        None
    }

    fn queue_interrupt(&self, qid: u16) -> Result<Option<Box<dyn QueueInterrupt>>, TransportError> {
        self.messages.queue(qid)
    }

    fn numa_node(&self) -> Option<u32> {
        self.numa_node
    }

    fn pins_memory(&self) -> bool {
        self.space.space.pins_memory()
    }

    fn is_release_requested(&self) -> bool {
        self.signals.is_requested(&self.name)
    }
}
