//! The emulated IOMMU: which host memory the device can reach, and under which device address.
//!
//! Device addresses are handed out far away from host addresses and with gaps between mappings, so that a host
//! address in a PRP entry, or a transfer that runs past its mapping, is caught instead of working by luck.
//!
//! ```text
//!   0            1_0000_0000                       +2 MiB steps
//!   | unmapped   | mapping 1 |   gap (unmapped)    | mapping 2 |  gap  | …      addresses are never used again
//! ```
//!
//! [`DmaTable`] is changed by the transport's map and unmap; queues translate through a [`DmaView`], an immutable
//! snapshot that they replace when the device's generation has moved on.

#![expect(unsafe_code, reason = "mappings carry addresses of host memory across threads")]

use std::ptr::NonNull;
use std::sync::Arc;

use foliant_nvme_transport::{DmaMemory, Iova, TransportError};

use crate::config::PAGE_BYTES_MIN;

/// First device address handed out: above 4 GiB, below where Linux maps anything for a process.
const IOVA_FIRST: u64 = 0x1_0000_0000;
/// Mappings start at multiples of this, which keeps hugepages aligned in both address spaces.
const IOVA_ALIGN: u64 = 2 << 20;
/// Unmapped bytes after each mapping, at least.
const IOVA_GUARD: u64 = 64 << 10;
/// Device addresses end here; a 47-bit space as IOMMUs have at least.
const IOVA_END: u64 = 1 << 47;

/// One contiguous piece of host memory that the device reaches under contiguous addresses.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    iova: u64,
    len_bytes: u64,
    host: NonNull<u8>,
}

// SAFETY: a mapping is an address and a length. Whoever dereferences it relies on `Transport::map_dma`'s contract,
// which holds for every thread until the mapping is taken back.
unsafe impl Send for Mapping {}
// SAFETY: see `Send`.
unsafe impl Sync for Mapping {}

/// The mappings of one attached controller, ascending by device address.
#[derive(Debug)]
pub(crate) struct DmaTable {
    mappings: Vec<Mapping>,
    next_iova: u64,
    /// Bus mastering is off: nothing translates any more.
    stopped: bool,
}

impl DmaTable {
    pub(crate) fn new() -> Self {
        Self { mappings: Vec::new(), next_iova: IOVA_FIRST, stopped: false }
    }

    /// Maps `memory` at a fresh address.
    pub(crate) fn map(&mut self, memory: DmaMemory) -> Result<Iova, TransportError> {
        let refuse =
            |reason: &str| TransportError::Map { len_bytes: memory.len_bytes, reason: reason.to_owned() };
        let len_bytes = memory.len_bytes as u64;
        if len_bytes == 0 || !len_bytes.is_multiple_of(PAGE_BYTES_MIN) {
            return Err(refuse("the length must be a multiple of 4096 bytes, and not zero"));
        }
        if !(memory.base.as_ptr() as u64).is_multiple_of(PAGE_BYTES_MIN) {
            return Err(refuse("the memory must be aligned to 4096 bytes"));
        }
        let end = self.next_iova.checked_add(len_bytes).filter(|end| *end <= IOVA_END);
        let end = end.ok_or_else(|| refuse("the device address space is used up"))?;
        let iova = self.next_iova;
        self.mappings.push(Mapping { iova, len_bytes, host: memory.base });
        self.next_iova = (end + IOVA_GUARD).next_multiple_of(IOVA_ALIGN);
        Ok(Iova(iova))
    }

    /// Takes one mapping back, whole.
    pub(crate) fn unmap(&mut self, iova: Iova, len_bytes: usize) -> Result<(), TransportError> {
        let found = self
            .mappings
            .iter()
            .position(|mapping| mapping.iova == iova.0 && mapping.len_bytes == len_bytes as u64);
        let Some(index) = found else {
            return Err(TransportError::Map {
                len_bytes,
                reason: format!("no mapping of this length starts at {iova}; mappings are taken back whole"),
            });
        };
        self.mappings.remove(index);
        Ok(())
    }

    /// Turns bus mastering off: every later snapshot is empty.
    pub(crate) fn stop(&mut self) {
        self.stopped = true;
    }

    pub(crate) fn snapshot(&self) -> DmaView {
        let mappings: &[Mapping] = if self.stopped { &[] } else { &self.mappings };
        DmaView { mappings: mappings.into(), last_hit: 0 }
    }
}

/// A queue's own snapshot of the mappings.
#[derive(Debug)]
pub(crate) struct DmaView {
    mappings: Arc<[Mapping]>,
    /// Index of the mapping that translated last; data of one queue mostly lies in one.
    last_hit: usize,
}

impl DmaView {
    /// A view without mappings.
    pub(crate) fn empty() -> Self {
        Self { mappings: Arc::new([]), last_hit: 0 }
    }

    /// The host address of `len_bytes` bytes at `iova`; `None` unless one mapping holds all of them.
    #[inline]
    pub(crate) fn translate(&mut self, iova: u64, len_bytes: u64) -> Option<NonNull<u8>> {
        if let Some(mapping) = self.mappings.get(self.last_hit)
            && let Some(host) = mapping.host_of(iova, len_bytes)
        {
            return Some(host);
        }
        self.translate_by_search(iova, len_bytes)
    }

    #[cold]
    fn translate_by_search(&mut self, iova: u64, len_bytes: u64) -> Option<NonNull<u8>> {
        let index = self.mappings.partition_point(|mapping| mapping.iova <= iova).checked_sub(1)?;
        let host = self.mappings.get(index)?.host_of(iova, len_bytes)?;
        self.last_hit = index;
        Some(host)
    }
}

impl Mapping {
    #[inline]
    fn host_of(&self, iova: u64, len_bytes: u64) -> Option<NonNull<u8>> {
        let offset = iova.checked_sub(self.iova)?;
        if offset >= self.len_bytes || self.len_bytes - offset < len_bytes {
            return None;
        }
        // SAFETY: `offset` lies inside the mapping, and `map_dma`'s caller vouched that `len_bytes` bytes from
        // `host` are one allocation.
        Some(unsafe { self.host.byte_add(offset as usize) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(pages: usize) -> (memmap2::MmapMut, DmaMemory) {
        let mut map = memmap2::MmapMut::map_anon(pages * 4096).unwrap();
        let base = NonNull::new(map.as_mut_ptr()).unwrap();
        (map, DmaMemory { base, len_bytes: pages * 4096 })
    }

    #[test]
    fn a_mapping_translates_up_to_its_last_byte_and_no_further() {
        let (_map, memory) = memory(2);
        let mut table = DmaTable::new();
        let iova = table.map(memory).unwrap().0;
        let mut view = table.snapshot();
        let host = memory.base.as_ptr() as usize;
        assert_eq!(view.translate(iova, 8192).map(|p| p.as_ptr() as usize), Some(host));
        assert_eq!(view.translate(iova + 8191, 1).map(|p| p.as_ptr() as usize), Some(host + 8191));
        assert_eq!(view.translate(iova + 8191, 2), None);
        assert_eq!(view.translate(iova + 8192, 1), None);
        assert_eq!(view.translate(iova - 1, 1), None);
        assert_eq!(view.translate(u64::MAX, 4096), None);
    }

    #[test]
    fn a_host_address_is_no_device_address() {
        let (_map, memory) = memory(1);
        let mut table = DmaTable::new();
        table.map(memory).unwrap();
        assert_eq!(table.snapshot().translate(memory.base.as_ptr() as u64, 1), None);
    }

    #[test]
    fn neighbours_are_apart_and_addresses_are_never_used_again() {
        let (_first_map, first) = memory(1);
        let (_second_map, second) = memory(512);
        let mut table = DmaTable::new();
        let first_iova = table.map(first).unwrap();
        let second_iova = table.map(second).unwrap();
        assert!(second_iova.0 >= first_iova.0 + 4096 + IOVA_GUARD);
        assert_eq!(table.snapshot().translate(first_iova.0, 8192), None);
        table.unmap(first_iova, 4096).unwrap();
        assert_eq!(table.snapshot().translate(first_iova.0, 1), None);
        assert!(table.map(first).unwrap() > second_iova);
    }

    #[test]
    fn a_mapping_is_taken_back_whole_or_not_at_all() {
        let (_map, memory) = memory(2);
        let mut table = DmaTable::new();
        let iova = table.map(memory).unwrap();
        assert!(table.unmap(iova, 4096).is_err());
        assert!(table.unmap(iova.offset(4096), 4096).is_err());
        assert!(table.unmap(iova, 8192).is_ok());
        assert!(table.unmap(iova, 8192).is_err());
    }

    #[test]
    fn unaligned_and_empty_memory_is_refused() {
        let (_map, memory) = memory(2);
        let mut table = DmaTable::new();
        assert!(table.map(DmaMemory { len_bytes: 0, ..memory }).is_err());
        assert!(table.map(DmaMemory { len_bytes: 4097, ..memory }).is_err());
        // SAFETY: one byte into a two-page mapping.
        let crooked = unsafe { memory.base.byte_add(1) };
        assert!(table.map(DmaMemory { base: crooked, len_bytes: 4096 }).is_err());
    }

    #[test]
    fn nothing_translates_once_bus_mastering_is_off() {
        let (_map, memory) = memory(1);
        let mut table = DmaTable::new();
        let iova = table.map(memory).unwrap();
        table.stop();
        assert_eq!(table.snapshot().translate(iova.0, 1), None);
        assert!(table.unmap(iova, 4096).is_ok());
    }
}
