//! The kernel's VFIO and iommufd interfaces as typed calls on descriptors. The one place of ioctls.
//!
//! Structures come from `vfio-bindings` and `iommufd-bindings`; the numbers are those of `linux/vfio.h` (type
//! 3Bh, from 100 on) and `linux/iommufd.h` (same type, from 80h on). Nothing here decides anything.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use iommufd_bindings as iommufd;
use vfio_bindings::bindings::vfio;

use crate::capability::Capabilities;

/// A VFIO request: `_IO(VFIO_TYPE, VFIO_BASE + n)`.
const fn vfio_request(n: u32) -> libc::Ioctl {
    (((vfio::VFIO_TYPE as u32) << 8) | (vfio::VFIO_BASE + n)) as libc::Ioctl
}

/// An iommufd request: `_IO(IOMMUFD_TYPE, command)`.
const fn iommufd_request(command: u32) -> libc::Ioctl {
    (((iommufd::IOMMUFD_TYPE as u32) << 8) | command) as libc::Ioctl
}

/// Numbers of the VFIO requests, counted from `VFIO_BASE` (`linux/vfio.h`).
mod request {
    pub(super) const GET_API_VERSION: u32 = 0;
    pub(super) const CHECK_EXTENSION: u32 = 1;
    pub(super) const SET_IOMMU: u32 = 2;
    pub(super) const GROUP_GET_STATUS: u32 = 3;
    pub(super) const GROUP_SET_CONTAINER: u32 = 4;
    pub(super) const GROUP_GET_DEVICE_FD: u32 = 6;
    pub(super) const DEVICE_GET_INFO: u32 = 7;
    pub(super) const DEVICE_GET_REGION_INFO: u32 = 8;
    pub(super) const DEVICE_GET_IRQ_INFO: u32 = 9;
    pub(super) const DEVICE_SET_IRQS: u32 = 10;
    pub(super) const DEVICE_RESET: u32 = 11;
    pub(super) const IOMMU_GET_INFO: u32 = 12;
    pub(super) const IOMMU_MAP_DMA: u32 = 13;
    pub(super) const IOMMU_UNMAP_DMA: u32 = 14;
    pub(super) const DEVICE_BIND_IOMMUFD: u32 = 18;
    pub(super) const DEVICE_ATTACH_IOMMUFD_PT: u32 = 19;
}

/// Calls `request` with a number.
fn with_value(fd: &File, request: libc::Ioctl, value: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: the requests called so take a number, or nothing, and touch no memory of ours.
    #[expect(unsafe_code, reason = "a call of the kernel")]
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), request, value) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

/// Calls `request` with a structure that the kernel reads and writes within the size that it itself names.
fn with_struct<T>(fd: &File, request: libc::Ioctl, argument: &mut T) -> io::Result<i32> {
    // SAFETY: each caller passes the structure that belongs to the request, and its size field says how much of
    // it the kernel may touch.
    #[expect(unsafe_code, reason = "a call of the kernel")]
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

/// Takes over a descriptor that a call has just returned.
fn own(fd: RawFd) -> File {
    // SAFETY: the kernel has just opened this descriptor for us; nobody else has it.
    #[expect(unsafe_code, reason = "a call of the kernel returned the descriptor by number")]
    File::from(unsafe { OwnedFd::from_raw_fd(fd) })
}

const fn size<T>() -> u32 {
    size_of::<T>() as u32
}

/// Calls a request whose structure `T` begins with `argsz` and may be followed by capabilities, until it all
/// fits. Returns the structure and everything, as bytes.
fn with_capabilities<T: Copy + Default>(
    fd: &File,
    request: libc::Ioctl,
    set: impl Fn(&mut T, u32),
    argsz: impl Fn(&T) -> u32,
) -> io::Result<(T, Vec<u8>)> {
    let mut words = vec![0u64; size_of::<T>().div_ceil(8)];
    // Twice is enough; the kernel's answer could grow in between.
    for _ in 0..4 {
        let bytes = words.len() * 8;
        let mut head = T::default();
        set(&mut head, bytes as u32);
        // SAFETY: `words` has room for a `T`, is aligned for it (the kernel's structures need 8 bytes at most),
        // and is written as a whole `T`.
        #[expect(unsafe_code, reason = "the structure is followed by capabilities in the same buffer")]
        let head = unsafe {
            let place = words.as_mut_ptr().cast::<T>();
            place.write(head);
            if libc::ioctl(fd.as_raw_fd(), request, place) < 0 {
                return Err(io::Error::last_os_error());
            }
            place.read()
        };
        let needed = argsz(&head) as usize;
        if needed <= bytes {
            return Ok((head, words.iter().flat_map(|word| word.to_ne_bytes()).collect()));
        }
        words = vec![0; needed.div_ceil(8)];
    }
    Err(io::Error::other("the kernel's answer keeps growing"))
}

/// What an IOMMU accepts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IommuInfo {
    /// The sizes of page that it maps, a bit each.
    pub(crate) page_sizes: u64,
    /// The device addresses that it accepts; `None` when the kernel doesn't say.
    pub(crate) valid: Option<Vec<RangeInclusive<u64>>>,
    /// Mappings that may still be made; `None` when the kernel doesn't say.
    pub(crate) mappings_left: Option<u32>,
}

/// `/dev/vfio/vfio`: an IOMMU address space that groups join.
#[derive(Debug)]
pub(crate) struct ContainerFd(pub(crate) File);

impl ContainerFd {
    pub(crate) fn api_version(&self) -> io::Result<i32> {
        with_value(&self.0, vfio_request(request::GET_API_VERSION), 0)
    }

    pub(crate) fn has_extension(&self, extension: u32) -> io::Result<bool> {
        Ok(with_value(&self.0, vfio_request(request::CHECK_EXTENSION), extension.into())? > 0)
    }

    pub(crate) fn set_iommu(&self, kind: u32) -> io::Result<()> {
        with_value(&self.0, vfio_request(request::SET_IOMMU), kind.into()).map(drop)
    }

    pub(crate) fn iommu_info(&self) -> io::Result<IommuInfo> {
        let (head, bytes) = with_capabilities::<vfio::vfio_iommu_type1_info>(
            &self.0,
            vfio_request(request::IOMMU_GET_INFO),
            |info, argsz| info.argsz = argsz,
            |info| info.argsz,
        )?;
        // Without the flag the field isn't there (before Linux 3.7): every IOMMU maps 4 KiB.
        let page_sizes =
            if head.flags & vfio::VFIO_IOMMU_INFO_PGSIZES != 0 { head.iova_pgsizes } else { 4096 };
        let first = if head.flags & vfio::VFIO_IOMMU_INFO_CAPS != 0 { head.cap_offset } else { 0 };
        let capabilities = Capabilities::new(&bytes, first);
        Ok(IommuInfo {
            page_sizes,
            valid: capabilities.iova_ranges(),
            mappings_left: capabilities.mappings_left(),
        })
    }

    /// Maps `len_bytes` at `address` of this process to the device address `iova`, for reading and writing.
    pub(crate) fn map_dma(&self, address: u64, iova: u64, len_bytes: u64) -> io::Result<()> {
        let mut map = vfio::vfio_iommu_type1_dma_map {
            argsz: size::<vfio::vfio_iommu_type1_dma_map>(),
            flags: vfio::VFIO_DMA_MAP_FLAG_READ | vfio::VFIO_DMA_MAP_FLAG_WRITE,
            vaddr: address,
            iova,
            size: len_bytes,
        };
        with_struct(&self.0, vfio_request(request::IOMMU_MAP_DMA), &mut map).map(drop)
    }

    /// Takes a mapping back; returns how many bytes that were.
    pub(crate) fn unmap_dma(&self, iova: u64, len_bytes: u64) -> io::Result<u64> {
        let mut unmap = vfio::vfio_iommu_type1_dma_unmap {
            argsz: size::<vfio::vfio_iommu_type1_dma_unmap>(),
            iova,
            size: len_bytes,
            ..Default::default()
        };
        with_struct(&self.0, vfio_request(request::IOMMU_UNMAP_DMA), &mut unmap)?;
        Ok(unmap.size)
    }
}

/// `/dev/vfio/N`: a group of devices that the IOMMU can't tell apart.
#[derive(Debug)]
pub(crate) struct GroupFd(pub(crate) File);

impl GroupFd {
    /// Whether every device of the group is bound to VFIO or to nothing.
    pub(crate) fn is_viable(&self) -> io::Result<bool> {
        let mut status =
            vfio::vfio_group_status { argsz: size::<vfio::vfio_group_status>(), ..Default::default() };
        with_struct(&self.0, vfio_request(request::GROUP_GET_STATUS), &mut status)?;
        Ok(status.flags & vfio::VFIO_GROUP_FLAGS_VIABLE != 0)
    }

    pub(crate) fn set_container(&self, container: &ContainerFd) -> io::Result<()> {
        let mut fd = container.0.as_raw_fd();
        with_struct(&self.0, vfio_request(request::GROUP_SET_CONTAINER), &mut fd).map(drop)
    }

    /// Opens the group's device at PCI address `address`.
    pub(crate) fn device(&self, address: &str) -> io::Result<DeviceFd> {
        let name = CString::new(address).map_err(io::Error::other)?;
        // SAFETY: the request reads a string that ends in NUL, which `name` does and which outlives the call.
        #[expect(unsafe_code, reason = "a call of the kernel")]
        let fd = unsafe {
            libc::ioctl(self.0.as_raw_fd(), vfio_request(request::GROUP_GET_DEVICE_FD), name.as_ptr())
        };
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(DeviceFd(own(fd))) }
    }
}

/// What a device is, by VFIO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceInfo {
    pub(crate) is_pci: bool,
    pub(crate) can_reset: bool,
}

/// A part of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    /// Where it begins in the region.
    pub(crate) offset: u64,
    pub(crate) len_bytes: u64,
}

/// A region of a device: a BAR, or its config space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RegionInfo {
    /// Where it lies in the device's descriptor.
    pub(crate) offset: u64,
    pub(crate) len_bytes: u64,
    /// What of it may be mapped; empty for nothing.
    pub(crate) mappable: Vec<Area>,
}

/// An open device.
#[derive(Debug)]
pub(crate) struct DeviceFd(pub(crate) File);

impl DeviceFd {
    pub(crate) fn info(&self) -> io::Result<DeviceInfo> {
        let mut info =
            vfio::vfio_device_info { argsz: size::<vfio::vfio_device_info>(), ..Default::default() };
        with_struct(&self.0, vfio_request(request::DEVICE_GET_INFO), &mut info)?;
        Ok(DeviceInfo {
            is_pci: info.flags & vfio::VFIO_DEVICE_FLAGS_PCI != 0,
            can_reset: info.flags & vfio::VFIO_DEVICE_FLAGS_RESET != 0,
        })
    }

    pub(crate) fn region(&self, index: u32) -> io::Result<RegionInfo> {
        let (head, bytes) = with_capabilities::<vfio::vfio_region_info>(
            &self.0,
            vfio_request(request::DEVICE_GET_REGION_INFO),
            |info, argsz| (info.argsz, info.index) = (argsz, index),
            |info| info.argsz,
        )?;
        let first = if head.flags & vfio::VFIO_REGION_INFO_FLAG_CAPS != 0 { head.cap_offset } else { 0 };
        let mappable = if head.flags & vfio::VFIO_REGION_INFO_FLAG_MMAP == 0 {
            Vec::new()
        } else {
            // No list of areas means that all of it may be mapped.
            Capabilities::new(&bytes, first)
                .sparse_areas()
                .unwrap_or_else(|| vec![Area { offset: 0, len_bytes: head.size }])
        };
        Ok(RegionInfo { offset: head.offset, len_bytes: head.size, mappable })
    }

    /// How many interrupts of the kind `index` the device has.
    pub(crate) fn interrupts(&self, index: u32) -> io::Result<u32> {
        let mut info =
            vfio::vfio_irq_info { argsz: size::<vfio::vfio_irq_info>(), index, ..Default::default() };
        with_struct(&self.0, vfio_request(request::DEVICE_GET_IRQ_INFO), &mut info)?;
        Ok(if info.flags & vfio::VFIO_IRQ_INFO_EVENTFD != 0 { info.count } else { 0 })
    }

    /// Ties the interrupts of the kind `index`, from number `start` on, to `fds`; -1 unties one. A positive
    /// answer is the number of interrupts that the system could give, when that is fewer.
    pub(crate) fn set_interrupts(&self, index: u32, start: u32, fds: &[RawFd]) -> io::Result<i32> {
        let flags = vfio::VFIO_IRQ_SET_DATA_EVENTFD | vfio::VFIO_IRQ_SET_ACTION_TRIGGER;
        let head_bytes = size_of::<vfio::vfio_irq_set>();
        let argsz = head_bytes + size_of_val(fds);
        let mut message: Vec<u32> = vec![argsz as u32, flags, index, start, fds.len() as u32];
        debug_assert_eq!(size_of_val(&message[..]), head_bytes);
        message.extend(fds.iter().map(|&fd| fd as u32));
        // SAFETY: the message is a `vfio_irq_set`, five 32-bit words, followed by one descriptor a word; its
        // first word says how long it is. The kernel only reads it.
        #[expect(unsafe_code, reason = "a call of the kernel")]
        let answer = unsafe {
            libc::ioctl(self.0.as_raw_fd(), vfio_request(request::DEVICE_SET_IRQS), message.as_ptr())
        };
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
    }

    /// Resets the function.
    pub(crate) fn reset(&self) -> io::Result<()> {
        with_value(&self.0, vfio_request(request::DEVICE_RESET), 0).map(drop)
    }

    pub(crate) fn bind_iommufd(&self, iommufd: &IommuFd) -> io::Result<()> {
        let mut bind = vfio::vfio_device_bind_iommufd {
            // The kernel's first version of the structure, without the token: known to all kernels.
            argsz: std::mem::offset_of!(vfio::vfio_device_bind_iommufd, token_uuid_ptr) as u32,
            iommufd: iommufd.0.as_raw_fd(),
            ..Default::default()
        };
        with_struct(&self.0, vfio_request(request::DEVICE_BIND_IOMMUFD), &mut bind).map(drop)
    }

    pub(crate) fn attach(&self, ioas: u32) -> io::Result<()> {
        let mut attach = vfio::vfio_device_attach_iommufd_pt {
            argsz: std::mem::offset_of!(vfio::vfio_device_attach_iommufd_pt, pasid) as u32,
            pt_id: ioas,
            ..Default::default()
        };
        with_struct(&self.0, vfio_request(request::DEVICE_ATTACH_IOMMUFD_PT), &mut attach).map(drop)
    }
}

/// `/dev/iommu`.
#[derive(Debug)]
pub(crate) struct IommuFd(pub(crate) File);

impl IommuFd {
    /// Makes an I/O address space and returns its number.
    pub(crate) fn allocate_ioas(&self) -> io::Result<u32> {
        let mut alloc =
            iommufd::iommu_ioas_alloc { size: size::<iommufd::iommu_ioas_alloc>(), ..Default::default() };
        with_struct(&self.0, iommufd_request(iommufd::IOMMUFD_CMD_IOAS_ALLOC), &mut alloc)?;
        Ok(alloc.out_ioas_id)
    }

    /// What the address space accepts, now that the device is attached.
    pub(crate) fn info(&self, ioas: u32) -> io::Result<IommuInfo> {
        const REQUEST: libc::Ioctl = iommufd_request(iommufd::IOMMUFD_CMD_IOAS_IOVA_RANGES);
        let mut query = iommufd::iommu_ioas_iova_ranges {
            size: size::<iommufd::iommu_ioas_iova_ranges>(),
            ioas_id: ioas,
            ..Default::default()
        };
        // Without room for any, the kernel says how many there are.
        match with_struct(&self.0, REQUEST, &mut query) {
            Err(error) if error.raw_os_error() != Some(libc::EMSGSIZE) => return Err(error),
            _ => {}
        }
        let mut ranges = vec![iommufd::iommu_iova_range::default(); query.num_iovas as usize];
        query.allowed_iovas = ranges.as_mut_ptr().expose_provenance() as u64;
        with_struct(&self.0, REQUEST, &mut query)?;
        ranges.truncate(query.num_iovas as usize);
        Ok(IommuInfo {
            page_sizes: query.out_iova_alignment.max(1),
            valid: Some(ranges.iter().map(|range| range.start..=range.last).collect()),
            mappings_left: None,
        })
    }

    /// As [`ContainerFd::map_dma`].
    pub(crate) fn map_dma(&self, ioas: u32, address: u64, iova: u64, len_bytes: u64) -> io::Result<()> {
        let mut map = iommufd::iommu_ioas_map {
            size: size::<iommufd::iommu_ioas_map>(),
            flags: iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
                | iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE
                | iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
            ioas_id: ioas,
            user_va: address,
            length: len_bytes,
            iova,
            ..Default::default()
        };
        with_struct(&self.0, iommufd_request(iommufd::IOMMUFD_CMD_IOAS_MAP), &mut map).map(drop)
    }

    /// As [`ContainerFd::unmap_dma`].
    pub(crate) fn unmap_dma(&self, ioas: u32, iova: u64, len_bytes: u64) -> io::Result<u64> {
        let mut unmap = iommufd::iommu_ioas_unmap {
            size: size::<iommufd::iommu_ioas_unmap>(),
            ioas_id: ioas,
            iova,
            length: len_bytes,
        };
        with_struct(&self.0, iommufd_request(iommufd::IOMMUFD_CMD_IOAS_UNMAP), &mut unmap)?;
        Ok(unmap.length)
    }
}

/// A new eventfd that never blocks, as a descriptor for interrupts.
pub(crate) fn eventfd() -> io::Result<OwnedFd> {
    use rustix::event::{EventfdFlags, eventfd};
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Whether an eventfd was signalled since it was last asked; forgets that it was.
pub(crate) fn take_signal(fd: BorrowedFd<'_>) -> bool {
    rustix::io::read(fd, &mut [0u8; 8]).is_ok()
}
