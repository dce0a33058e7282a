//! The device's address space: what memory it reaches, and at which addresses.
//!
//! It owns the container, or the I/O address space of iommufd, and the allocator of its addresses. Every answer of the
//! kernel to a mapping counts: one that was refused is an error, one that was undone by half is an error too.
//! Without an IOMMU there is nothing to map: device addresses are physical ones, see `physical.rs`.

use std::io;
use std::sync::{Mutex, PoisonError};

use foliant_nvme_transport::{DmaMemory, Iova, TransportError};

use crate::iova::IovaSpace;
use crate::physical;
use crate::uapi::{ContainerFd, IommuFd, IommuInfo};

/// Mappings of at least this size begin at a multiple of it, so that the IOMMU can use its large pages.
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// How memory is mapped.
#[derive(Debug)]
enum Mapper {
    /// A type 1 container.
    Container(ContainerFd),
    /// An I/O address space of iommufd.
    Iommufd { iommufd: IommuFd, ioas: u32 },
    /// Not at all.
    Physical,
}

/// The address space of one device, or of the devices of one group.
#[derive(Debug)]
pub(crate) struct AddressSpace {
    mapper: Mapper,
    page_bytes: u64,
    mappings_left: Option<u32>,
    addresses: Mutex<IovaSpace>,
}

impl AddressSpace {
    /// The address space of a container whose IOMMU is set.
    pub(crate) fn container(container: ContainerFd) -> io::Result<Self> {
        let info = container.iommu_info()?;
        Ok(Self::new(Mapper::Container(container), info))
    }

    /// The address space `ioas`, which a device is attached to.
    pub(crate) fn iommufd(iommufd: IommuFd, ioas: u32) -> io::Result<Self> {
        let info = iommufd.info(ioas)?;
        Ok(Self::new(Mapper::Iommufd { iommufd, ioas }, info))
    }

    /// Physical memory.
    pub(crate) fn physical() -> Self {
        let info = IommuInfo { page_sizes: 4096, valid: Some(Vec::new()), mappings_left: None };
        Self::new(Mapper::Physical, info)
    }

    fn new(mapper: Mapper, info: IommuInfo) -> Self {
        let IommuInfo { page_sizes, valid, mappings_left } = info;
        let page_bytes = 1 << page_sizes.trailing_zeros().min(63);
        let valid = valid.unwrap_or_else(IovaSpace::assumed);
        tracing::debug!(page_bytes, ?valid, ?mappings_left, "address space of the device");
        Self { mapper, page_bytes, mappings_left, addresses: Mutex::new(IovaSpace::new(valid)) }
    }

    /// The I/O address space, if it is one of iommufd.
    pub(crate) fn as_iommufd(&self) -> Option<(&IommuFd, u32)> {
        match &self.mapper {
            Mapper::Iommufd { iommufd, ioas } => Some((iommufd, *ioas)),
            Mapper::Container(_) | Mapper::Physical => None,
        }
    }

    /// Whether the kernel pins what is mapped.
    pub(crate) fn pins_memory(&self) -> bool {
        !matches!(self.mapper, Mapper::Physical)
    }

    /// Makes `memory` reachable, in one piece.
    pub(crate) fn map(&self, memory: DmaMemory) -> Result<Iova, TransportError> {
        let DmaMemory { base, len_bytes } = memory;
        let refused = |reason: String| TransportError::Map { len_bytes, reason };
        let (address, len) = (base.as_ptr().expose_provenance() as u64, len_bytes as u64);
        if len == 0 || !len.is_multiple_of(self.page_bytes) || !address.is_multiple_of(self.page_bytes) {
            let page = self.page_bytes;
            return Err(refused(format!(
                "address {address:#x} and length {len} must be multiples of the IOMMU's page, {page} bytes; a system with \
                 pages larger than 4 KiB isn't supported"
            )));
        }
        if let Mapper::Physical = self.mapper {
            return physical::extent(memory).map_err(refused);
        }
        let align = if len >= LARGE_PAGE_BYTES { LARGE_PAGE_BYTES } else { self.page_bytes };
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(iova) = addresses.take(len, align).or_else(|| addresses.take(len, self.page_bytes)) else {
            let longest = addresses.longest_free_bytes();
            return Err(refused(format!(
                "the IOMMU accepts no free stretch of device addresses that is long enough: the longest has {longest} \
                 bytes; choose a smaller cache"
            )));
        };
        let mapped = match &self.mapper {
            Mapper::Container(container) => container.map_dma(address, iova, len),
            Mapper::Iommufd { iommufd, ioas } => iommufd.map_dma(*ioas, address, iova, len),
            Mapper::Physical => Ok(()),
        };
        mapped.map_err(|error| {
            // Where something is mapped that we don't know of, nothing of ours ever will be.
            if error.raw_os_error() != Some(libc::EEXIST) {
                addresses.give_back(iova, len);
            }
            refused(self.explain(&error, len))
        })?;
        Ok(Iova(iova))
    }

    /// Takes a mapping back, whole.
    pub(crate) fn unmap(&self, iova: Iova, len_bytes: usize) -> Result<(), TransportError> {
        let len = len_bytes as u64;
        let refused = |reason: String| TransportError::Map { len_bytes, reason };
        if let Mapper::Physical = self.mapper {
            return Ok(());
        }
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        if !addresses.is_taken(iova.0, len) {
            return Err(refused(format!("nothing of this length is mapped at {iova}")));
        }
        let unmapped = match &self.mapper {
            Mapper::Container(container) => container.unmap_dma(iova.0, len),
            Mapper::Iommufd { iommufd, ioas } => iommufd.unmap_dma(*ioas, iova.0, len),
            Mapper::Physical => Ok(len),
        };
        match unmapped {
            Ok(bytes) if bytes == len => {
                addresses.give_back(iova.0, len);
                Ok(())
            }
            // The addresses stay taken, so that nothing else is ever mapped there.
            Ok(bytes) => Err(refused(format!("the kernel unmapped {bytes} bytes at {iova} only"))),
            Err(error) => Err(refused(format!("the kernel doesn't unmap {iova}: {error}"))),
        }
    }

    /// What a refusal of the kernel means and what helps.
    fn explain(&self, error: &io::Error, len: u64) -> String {
        let kib = len.div_ceil(1024);
        match error.raw_os_error() {
            Some(libc::ENOMEM) => match memlock_bytes() {
                Some(limit) => format!(
                    "{error}: the locked-memory limit of this process is {limit} bytes, which doesn't bind root, and the arena needs {len} beside \
                     what is locked already; raise it with `ulimit -l {kib}` or more (LimitMEMLOCK= in a systemd unit, or \
                     /etc/security/limits.conf), or choose a smaller cache"
                ),
                None => format!("{error}: the system is out of memory; choose a smaller cache"),
            },
            Some(libc::ENOSPC) => {
                let left = self.mappings_left.map_or_else(String::new, |left| format!(" ({left} at open)"));
                format!(
                    "{error}: the IOMMU's limit of mappings is reached{left}; raise dma_entry_limit of vfio_iommu_type1"
                )
            }
            Some(libc::EEXIST) => {
                format!("{error}: something is mapped at this device address already; nothing was changed")
            }
            _ => format!("the kernel refused the mapping: {error}"),
        }
    }
}

/// The limit of locked memory; `None` when there is none.
fn memlock_bytes() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Memlock).current
}
