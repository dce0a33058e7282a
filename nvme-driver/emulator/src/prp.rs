//! Walks a command's Physical Region Page entries into host memory segments (Base section 4.3.1).
//!
//! ```text
//!   PRP1 ─► first page, may start inside it (dword aligned)
//!   PRP2 ─► second page                                     when the rest fits one page, or
//!        └► list: | page | page | … | next list |           the last entry of a list page chains while more
//!                                        └► | page | … |    pages are due; it may start inside its first page
//! ```
//!
//! Neighbouring pages that are contiguous in both address spaces become one segment.

#![expect(unsafe_code, reason = "reads PRP lists, and copies data, in memory that the driver mapped")]

use std::ptr::NonNull;

use foliant_nvme_spec::{PAGE_BYTES, StatusCode, prp};

use crate::dma::DmaView;

/// Host memory that holds a part of a command's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) iova: u64,
    pub(crate) host: NonNull<u8>,
    pub(crate) len_bytes: usize,
}

// SAFETY: a segment is an address and a length; `Transport::map_dma`'s contract covers every thread's access.
unsafe impl Send for Segment {}

const PAGE: u64 = PAGE_BYTES as u64;
const ENTRY: u64 = prp::ENTRY_BYTES as u64;

/// Collects the segments of `len_bytes` bytes of data behind `prp1` and `prp2` into `segments`, which is emptied
/// first and keeps its capacity from command to command.
///
/// # Errors
/// The status that the specification gives for the first bad entry: [`StatusCode::PRP_OFFSET_INVALID`], or
/// [`StatusCode::DATA_TRANSFER_ERROR`] for an address that isn't mapped.
pub(crate) fn walk(
    dma: &mut DmaView,
    prp1: u64,
    prp2: u64,
    len_bytes: u64,
    segments: &mut Vec<Segment>,
) -> Result<(), StatusCode> {
    segments.clear();
    if !prp1.is_multiple_of(4) {
        return Err(StatusCode::PRP_OFFSET_INVALID);
    }
    let first = len_bytes.min(PAGE - prp1 % PAGE);
    push(dma, prp1, first, segments)?;
    let rest = len_bytes - first;
    if rest == 0 {
        return Ok(());
    }
    if rest <= PAGE {
        return push_page(dma, prp2, rest, segments);
    }
    walk_list(dma, prp2, rest, segments)
}

/// Walks the chained lists that start at `list` and describe `rest` bytes.
fn walk_list(
    dma: &mut DmaView,
    mut list: u64,
    mut rest: u64,
    segments: &mut Vec<Segment>,
) -> Result<(), StatusCode> {
    if !list.is_multiple_of(ENTRY) {
        return Err(StatusCode::PRP_OFFSET_INVALID);
    }
    loop {
        let slots = (PAGE - list % PAGE) / ENTRY;
        let pages = rest.div_ceil(PAGE);
        let is_last_list = pages <= slots;
        let entries = if is_last_list { pages } else { slots - 1 };
        for index in 0..entries {
            let page = read_entry(dma, list + index * ENTRY)?;
            let len = rest.min(PAGE);
            push_page(dma, page, len, segments)?;
            rest -= len;
        }
        if is_last_list {
            return Ok(());
        }
        // Every list after the first fills its page from the start, so each round moves on by 511 pages at least.
        list = read_entry(dma, list + entries * ENTRY)?;
        if prp::page_offset(list) != 0 {
            return Err(StatusCode::PRP_OFFSET_INVALID);
        }
    }
}

#[inline]
fn read_entry(dma: &mut DmaView, iova: u64) -> Result<u64, StatusCode> {
    let host = dma.translate(iova, ENTRY).ok_or(StatusCode::DATA_TRANSFER_ERROR)?;
    // SAFETY: `translate` found eight mapped bytes, 8-byte aligned because the device address is and mappings
    // start on page boundaries in both address spaces.
    Ok(unsafe { host.cast::<u64>().read_volatile() })
}

#[inline]
fn push_page(
    dma: &mut DmaView,
    iova: u64,
    len_bytes: u64,
    segments: &mut Vec<Segment>,
) -> Result<(), StatusCode> {
    if prp::page_offset(iova) != 0 {
        return Err(StatusCode::PRP_OFFSET_INVALID);
    }
    push(dma, iova, len_bytes, segments)
}

#[inline]
fn push(dma: &mut DmaView, iova: u64, len_bytes: u64, segments: &mut Vec<Segment>) -> Result<(), StatusCode> {
    let host = dma.translate(iova, len_bytes).ok_or(StatusCode::DATA_TRANSFER_ERROR)?;
    let len_bytes = len_bytes as usize;
    if let Some(last) = segments.last_mut()
        && last.iova + last.len_bytes as u64 == iova
        && last.host.as_ptr().wrapping_byte_add(last.len_bytes) == host.as_ptr()
    {
        last.len_bytes += len_bytes;
        return Ok(());
    }
    segments.push(Segment { iova, host, len_bytes });
    Ok(())
}

/// Copies the segments' bytes into `buffer`, which is as long as they are.
pub(crate) fn copy_from_host(segments: &[Segment], buffer: &mut [u8]) {
    let mut rest = buffer;
    for segment in segments {
        let (part, after) = rest.split_at_mut(segment.len_bytes);
        // SAFETY: a segment is mapped memory that the driver leaves alone while the command is in flight; the
        // buffer is this crate's own.
        unsafe { segment.host.as_ptr().copy_to_nonoverlapping(part.as_mut_ptr(), part.len()) };
        rest = after;
    }
}

/// Copies `buffer` to the segments, which together are as long.
pub(crate) fn copy_to_host(buffer: &[u8], segments: &[Segment]) {
    let mut rest = buffer;
    for segment in segments {
        let (part, after) = rest.split_at(segment.len_bytes);
        // SAFETY: a segment is mapped memory that the driver has given to the device for this command; the buffer
        // is this crate's own.
        unsafe { segment.host.as_ptr().copy_from_nonoverlapping(part.as_ptr(), part.len()) };
        rest = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dma::DmaTable;
    use foliant_nvme_transport::DmaMemory;
    use memmap2::MmapMut;

    struct Bench {
        memory: MmapMut,
        iova: u64,
        dma: DmaView,
        segments: Vec<Segment>,
    }

    impl Bench {
        fn new(pages: usize) -> Self {
            let mut memory = MmapMut::map_anon(pages * PAGE_BYTES).unwrap();
            let base = NonNull::new(memory.as_mut_ptr()).unwrap();
            let mut table = DmaTable::new();
            let iova = table.map(DmaMemory { base, len_bytes: memory.len() }).unwrap().0;
            Self { memory, iova, dma: table.snapshot(), segments: Vec::new() }
        }

        fn page(&self, index: u64) -> u64 {
            self.iova + index * PAGE
        }

        fn write_entry(&mut self, offset: usize, value: u64) {
            self.memory[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        }

        /// Walks, and returns each segment as (offset of its device address, length).
        fn walk(&mut self, prp1: u64, prp2: u64, len: u64) -> Result<Vec<(u64, usize)>, StatusCode> {
            walk(&mut self.dma, prp1, prp2, len, &mut self.segments)?;
            Ok(self.segments.iter().map(|s| (s.iova - self.iova, s.len_bytes)).collect())
        }
    }

    #[test]
    fn one_page_needs_prp1_alone() {
        let mut bench = Bench::new(4);
        let at = bench.page(1) + 0x200;
        assert_eq!(bench.walk(at, 0, 512), Ok(vec![(0x1200, 512)]));
        assert_eq!(bench.walk(at + 2, 0, 512), Err(StatusCode::PRP_OFFSET_INVALID));
    }

    #[test]
    fn two_pages_use_prp2_as_an_entry() {
        let mut bench = Bench::new(4);
        let (first, third) = (bench.page(0) + 0xE00, bench.page(2));
        assert_eq!(bench.walk(first, third, 1024), Ok(vec![(0xE00, 512), (0x2000, 512)]));
        assert_eq!(bench.walk(first, third + 8, 1024), Err(StatusCode::PRP_OFFSET_INVALID));
    }

    #[test]
    fn contiguous_pages_become_one_segment() {
        let mut bench = Bench::new(4);
        let (first, second) = (bench.page(0), bench.page(1));
        assert_eq!(bench.walk(first, second, 8192), Ok(vec![(0, 8192)]));
    }

    #[test]
    fn a_list_may_start_inside_its_page_and_chain_at_the_last_entry() {
        let mut bench = Bench::new(16);
        // The list sits in the last two slots of page 0: one page entry, then the chain to page 1.
        let (data, next, list) = (bench.page(10), bench.page(1), bench.page(0) + 4080);
        bench.write_entry(4080, bench.page(12));
        bench.write_entry(4088, next);
        bench.write_entry(4096, bench.page(14));
        bench.write_entry(4104, bench.page(8));
        let expected = vec![(0xA000, 4096), (0xC000, 4096), (0xE000, 4096), (0x8000, 100)];
        assert_eq!(bench.walk(data, list, 3 * 4096 + 100), Ok(expected));
        bench.write_entry(4088, next + 8);
        assert_eq!(bench.walk(data, list, 3 * 4096 + 100), Err(StatusCode::PRP_OFFSET_INVALID));
        assert_eq!(bench.walk(data, list + 4, 3 * 4096), Err(StatusCode::PRP_OFFSET_INVALID));
    }

    #[test]
    fn a_list_that_fits_to_its_last_slot_does_not_chain() {
        let mut bench = Bench::new(8);
        // Two pages are due and two slots are left: both are page entries.
        bench.write_entry(4080, bench.page(4));
        bench.write_entry(4088, bench.page(6));
        let (data, list) = (bench.page(2), bench.page(0) + 4080);
        assert_eq!(
            bench.walk(data, list, 3 * 4096),
            Ok(vec![(0x2000, 4096), (0x4000, 4096), (0x6000, 4096)])
        );
    }

    #[test]
    fn a_list_page_of_a_single_slot_only_chains() {
        let mut bench = Bench::new(8);
        bench.write_entry(4088, bench.page(1));
        bench.write_entry(4096, bench.page(4));
        bench.write_entry(4104, bench.page(6));
        let (data, list) = (bench.page(2), bench.page(0) + 4088);
        assert_eq!(
            bench.walk(data, list, 3 * 4096),
            Ok(vec![(0x2000, 4096), (0x4000, 4096), (0x6000, 4096)])
        );
    }

    #[test]
    fn unmapped_addresses_are_transfer_errors_wherever_they_stand() {
        let mut bench = Bench::new(4);
        let (first, host) = (bench.page(0), bench.memory.as_ptr() as u64);
        assert_eq!(bench.walk(host, 0, 512), Err(StatusCode::DATA_TRANSFER_ERROR));
        assert_eq!(bench.walk(first, 0, 8192), Err(StatusCode::DATA_TRANSFER_ERROR));
        assert_eq!(bench.walk(first, 0, 3 * 4096), Err(StatusCode::DATA_TRANSFER_ERROR));
        bench.write_entry(0, host);
        assert_eq!(bench.walk(first, first, 3 * 4096), Err(StatusCode::DATA_TRANSFER_ERROR));
    }
}
