//! Building the data pointer of a command: PRP entries from segments (Base section 4.3.1). Pure: it writes into
//! the list memory it is given and nowhere else.
//!
//! ```text
//!  data:   page 0 (from an offset)   page 1        page 2 …
//!  PRP1 ───┘
//!  PRP2 ─────────────────────────────┘                        when the data ends in its second page
//!  PRP2 ──► list page: [ page 1 | page 2 | … | last entry ]   when it goes on
//!                                              └──► next list page, where the entries don't fit into this one
//! ```
//!
//! Every entry but PRP1 starts on a page, and every entry but the last ends on one.

use foliant_nvme_spec::PAGE_BYTES;
use foliant_nvme_spec::prp::{ENTRIES_PER_PAGE, page_offset};
use foliant_nvme_transport::Iova;

use crate::payload::Segment;

/// What PRP1 is aligned to (Base section 4.3.1).
const DWORD_BYTES: u64 = 4;

/// The two PRP fields of a command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DataPointer {
    pub(crate) prp1: u64,
    pub(crate) prp2: u64,
}

/// Why segments can't be told in PRP entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PrpError {
    /// An address that isn't aligned as its place asks for.
    Misaligned(Iova),
    /// The segments end before the data does.
    Short,
    /// The segments go on after the data has ended.
    Long,
    /// The list memory has too few entries.
    ListFull,
}

/// List pages that a transfer of `transfer_bytes` needs at most, wherever in a page it starts.
///
/// PRP1 covers one page, or less; so the list has an entry for each whole page of the transfer, and each page of
/// the list but the last spends one entry on pointing to the next.
pub(crate) const fn list_pages(transfer_bytes: u32) -> usize {
    let entries = (transfer_bytes as usize).div_ceil(PAGE_BYTES);
    if entries <= ENTRIES_PER_PAGE {
        1
    } else {
        1 + (entries - ENTRIES_PER_PAGE).div_ceil(ENTRIES_PER_PAGE - 1)
    }
}

/// Memory for one command's PRP list: whole pages, contiguous for the device.
pub(crate) struct ListMemory<'a> {
    pub(crate) entries: &'a mut [u64],
    pub(crate) iova: Iova,
}

/// Builds the data pointer of a command that transfers a whole payload of `len_bytes` (at least 1) bytes.
/// `segments` starts over at each call; `list` is asked for memory only when the data spans more than two pages.
#[inline]
pub(crate) fn build<'a, I: Iterator<Item = Segment>>(
    segments: impl Fn() -> I,
    len_bytes: u32,
    list: impl FnOnce() -> ListMemory<'a>,
) -> Result<DataPointer, PrpError> {
    let mut pieces = segments();
    if let (Some(only), None) = (pieces.next(), pieces.next())
        && let Some(pointer) = without_list(only, len_bytes)
    {
        return Ok(pointer);
    }
    build_from_pieces(SegmentCursor::new(segments()), len_bytes, list)
}

/// The data pointer of data that is exactly `segment` and lies on at most two pages; `None` for all other data.
#[inline]
fn without_list(segment: Segment, len_bytes: u32) -> Option<DataPointer> {
    let Segment { iova: Iova(start), len_bytes: segment_bytes } = segment;
    let span_bytes = page_offset(start) + len_bytes as usize;
    if segment_bytes != len_bytes || !start.is_multiple_of(DWORD_BYTES) || span_bytes > 2 * PAGE_BYTES {
        return None;
    }
    let second_page = start - page_offset(start) as u64 + PAGE_BYTES as u64;
    Some(DataPointer { prp1: start, prp2: if span_bytes > PAGE_BYTES { second_page } else { 0 } })
}

/// Out of line, so that the common case stays short.
#[inline(never)]
fn build_from_pieces<'a>(
    mut cursor: SegmentCursor<impl Iterator<Item = Segment>>,
    len_bytes: u32,
    list: impl FnOnce() -> ListMemory<'a>,
) -> Result<DataPointer, PrpError> {
    let pointer = cursor.take(len_bytes, list)?;
    if cursor.advance() { Err(PrpError::Long) } else { Ok(pointer) }
}

/// Walks over the segments of a payload, of which several commands may each take a piece.
pub(crate) struct SegmentCursor<I> {
    rest: I,
    /// The segment begun, without what was taken already; empty between segments.
    current: Segment,
}

impl<I: Iterator<Item = Segment>> SegmentCursor<I> {
    pub(crate) fn new(mut segments: I) -> Self {
        let current = segments.next().unwrap_or(Segment { iova: Iova(0), len_bytes: 0 });
        Self { rest: segments, current }
    }

    /// Builds the data pointer for the next `len_bytes` (at least 1) bytes; `list` is asked for memory only when
    /// the data spans more than two pages.
    pub(crate) fn take<'a>(
        &mut self,
        len_bytes: u32,
        list: impl FnOnce() -> ListMemory<'a>,
    ) -> Result<DataPointer, PrpError> {
        if !self.advance() {
            return Err(PrpError::Short);
        }
        if !self.current.iova.0.is_multiple_of(DWORD_BYTES) {
            return Err(PrpError::Misaligned(self.current.iova));
        }
        let mut left = len_bytes as usize;
        let prp1 = self.current.iova.0;
        let pages = (page_offset(prp1) + left).div_ceil(PAGE_BYTES);
        left -= self.take_page(left)?;
        let prp2 = match pages {
            1 => 0,
            2 => {
                let entry = self.page_start()?;
                left -= self.take_page(left)?;
                entry
            }
            _ => {
                let mut writer = ListWriter::new(list(), pages - 1);
                let first = writer.list.iova.0;
                while left > 0 {
                    let start = self.page_start()?;
                    // Mostly a segment goes on for many pages.
                    let whole = left.min(self.current.len_bytes as usize) / PAGE_BYTES;
                    if whole > 0 {
                        writer.push_pages(start, whole)?;
                        self.consume((whole * PAGE_BYTES) as u32);
                        left -= whole * PAGE_BYTES;
                    } else {
                        writer.push(start)?;
                        left -= self.take_page(left)?;
                    }
                }
                first
            }
        };
        debug_assert_eq!(left, 0, "the pages counted ahead cover the data");
        Ok(DataPointer { prp1, prp2 })
    }

    /// The address at which an entry other than PRP1 may start.
    #[inline]
    fn page_start(&mut self) -> Result<u64, PrpError> {
        if !self.advance() {
            return Err(PrpError::Short);
        }
        match self.current.iova {
            iova if page_offset(iova.0) == 0 => Ok(iova.0),
            iova => Err(PrpError::Misaligned(iova)),
        }
    }

    /// Takes the data of one entry: to the end of its page or `left` bytes, whichever is less. Segments that meet
    /// within the page must follow each other without a gap.
    fn take_page(&mut self, left: usize) -> Result<usize, PrpError> {
        let want = left.min(PAGE_BYTES - page_offset(self.current.iova.0));
        let mut taken = 0;
        while taken < want {
            let end = self.current.iova;
            if !self.advance() {
                return Err(PrpError::Short);
            }
            if self.current.iova != end {
                return Err(PrpError::Misaligned(self.current.iova));
            }
            let piece = (self.current.len_bytes as usize).min(want - taken);
            self.consume(piece as u32);
            taken += piece;
        }
        Ok(taken)
    }

    fn consume(&mut self, len_bytes: u32) {
        self.current.iova = self.current.iova.offset(u64::from(len_bytes));
        self.current.len_bytes -= len_bytes;
    }

    /// Goes on to the next segment when the current one is used up; `false` when none is left.
    fn advance(&mut self) -> bool {
        while self.current.len_bytes == 0 {
            match self.rest.next() {
                Some(segment) => self.current = segment,
                None => return false,
            }
        }
        true
    }
}

/// Writes list entries in order and chains the list's pages.
struct ListWriter<'a> {
    list: ListMemory<'a>,
    /// Index of the next entry, chain pointers included.
    next: usize,
    /// Data entries still to come.
    left: usize,
}

impl<'a> ListWriter<'a> {
    fn new(list: ListMemory<'a>, entries: usize) -> Self {
        Self { list, next: 0, left: entries }
    }

    #[inline]
    fn push(&mut self, entry: u64) -> Result<(), PrpError> {
        let is_last_of_page = self.next % ENTRIES_PER_PAGE == ENTRIES_PER_PAGE - 1;
        if is_last_of_page && self.left > 1 {
            let next_page = self.list.iova.offset(((self.next + 1) * size_of::<u64>()) as u64);
            self.write(next_page.0)?;
        }
        self.write(entry)?;
        self.left -= 1;
        Ok(())
    }

    /// Pushes the entries of `pages` pages that follow each other from `start` on.
    fn push_pages(&mut self, start: u64, pages: usize) -> Result<(), PrpError> {
        (0..pages).try_for_each(|page| self.push(start + (page * PAGE_BYTES) as u64))
    }

    #[inline]
    fn write(&mut self, value: u64) -> Result<(), PrpError> {
        *self.list.entries.get_mut(self.next).ok_or(PrpError::ListFull)? = value;
        self.next += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = PAGE_BYTES as u64;
    const LIST: u64 = 0x4000_0000;

    fn segment(iova: u64, len_bytes: u32) -> Segment {
        Segment { iova: Iova(iova), len_bytes }
    }

    fn build(segments: &[Segment], len_bytes: u32, list: &mut [u64]) -> Result<DataPointer, PrpError> {
        super::build(
            || segments.iter().copied(),
            len_bytes,
            || ListMemory { entries: list, iova: Iova(LIST) },
        )
    }

    /// What a device makes of a data pointer: the address of every byte, by walking the entries.
    fn walk(pointer: DataPointer, len_bytes: usize, list: &[u64]) -> Vec<u64> {
        let mut bytes = Vec::new();
        let page = |entry: u64, bytes: &mut Vec<u64>| {
            let count = (PAGE_BYTES - page_offset(entry)).min(len_bytes - bytes.len());
            bytes.extend((0..count as u64).map(|byte| entry + byte));
        };
        page(pointer.prp1, &mut bytes);
        let left = len_bytes - bytes.len();
        if left == 0 {
            assert_eq!(pointer.prp2, 0);
        } else if left <= PAGE_BYTES {
            assert_eq!(page_offset(pointer.prp2), 0);
            page(pointer.prp2, &mut bytes);
        } else {
            let mut at = pointer.prp2;
            while bytes.len() < len_bytes {
                let entry = list[((at - LIST) / 8) as usize];
                let left = len_bytes - bytes.len();
                assert_eq!(page_offset(entry), 0);
                if page_offset(at) == PAGE_BYTES - 8 && left > PAGE_BYTES {
                    at = entry;
                } else {
                    page(entry, &mut bytes);
                    at += 8;
                }
            }
        }
        bytes
    }

    #[test]
    fn exactly_one_page_needs_only_prp1() {
        assert_eq!(build(&[segment(PAGE, 4096)], 4096, &mut []), Ok(DataPointer { prp1: PAGE, prp2: 0 }));
    }

    #[test]
    fn an_offset_in_the_first_page_stays_in_prp1() {
        let pointer = build(&[segment(PAGE + 512, 3584)], 3584, &mut []);
        assert_eq!(pointer, Ok(DataPointer { prp1: PAGE + 512, prp2: 0 }));
    }

    #[test]
    fn one_page_of_data_from_an_offset_spans_two() {
        let pointer = build(&[segment(PAGE + 512, 4096)], 4096, &mut []);
        assert_eq!(pointer, Ok(DataPointer { prp1: PAGE + 512, prp2: 2 * PAGE }));
    }

    #[test]
    fn two_scattered_pages_need_no_list() {
        let pointer = build(&[segment(9 * PAGE, 4096), segment(3 * PAGE, 4096)], 8192, &mut []);
        assert_eq!(pointer, Ok(DataPointer { prp1: 9 * PAGE, prp2: 3 * PAGE }));
    }

    #[test]
    fn three_pages_need_a_list_of_two() {
        let mut list = [0; ENTRIES_PER_PAGE];
        let pointer = build(&[segment(PAGE, 3 * 4096)], 3 * 4096, &mut list);
        assert_eq!(pointer, Ok(DataPointer { prp1: PAGE, prp2: LIST }));
        assert_eq!(list[..3], [2 * PAGE, 3 * PAGE, 0]);
    }

    #[test]
    fn a_list_that_fills_its_page_exactly_is_not_chained() {
        let pages = 1 + ENTRIES_PER_PAGE as u32;
        let mut list = [0; ENTRIES_PER_PAGE];
        build(&[segment(PAGE, pages * 4096)], pages * 4096, &mut list).unwrap();
        assert_eq!(list[ENTRIES_PER_PAGE - 1], (1 + ENTRIES_PER_PAGE as u64) * PAGE);
        assert_eq!(list_pages(ENTRIES_PER_PAGE as u32 * 4096), 1);
    }

    #[test]
    fn one_entry_more_chains_to_a_second_page() {
        let pages = 2 + ENTRIES_PER_PAGE as u32;
        let mut list = [0; 2 * ENTRIES_PER_PAGE];
        build(&[segment(PAGE, pages * 4096)], pages * 4096, &mut list).unwrap();
        assert_eq!(list[ENTRIES_PER_PAGE - 1], LIST + PAGE);
        assert_eq!(list[ENTRIES_PER_PAGE], (1 + ENTRIES_PER_PAGE as u64) * PAGE);
        assert_eq!(list[ENTRIES_PER_PAGE + 1], (2 + ENTRIES_PER_PAGE as u64) * PAGE);
        assert_eq!(list[ENTRIES_PER_PAGE + 2], 0);
    }

    #[test]
    fn a_first_address_off_a_dword_is_refused() {
        assert_eq!(build(&[segment(PAGE + 2, 512)], 512, &mut []), Err(PrpError::Misaligned(Iova(PAGE + 2))));
    }

    #[test]
    fn a_gap_within_a_page_is_refused() {
        let segments = [segment(PAGE, 512), segment(PAGE + 1024, 512)];
        assert_eq!(build(&segments, 1024, &mut []), Err(PrpError::Misaligned(Iova(PAGE + 1024))));
    }

    #[test]
    fn a_later_segment_off_a_page_boundary_is_refused() {
        let segments = [segment(PAGE, 4096), segment(8 * PAGE + 512, 4096)];
        assert_eq!(build(&segments, 8192, &mut []), Err(PrpError::Misaligned(Iova(8 * PAGE + 512))));
    }

    #[test]
    fn segments_without_a_gap_within_a_page_are_one() {
        let segments = [segment(PAGE, 512), segment(PAGE + 512, 0), segment(PAGE + 512, 3584)];
        assert_eq!(build(&segments, 4096, &mut []), Ok(DataPointer { prp1: PAGE, prp2: 0 }));
    }

    #[test]
    fn segments_that_end_early_are_refused() {
        assert_eq!(build(&[], 512, &mut []), Err(PrpError::Short));
        assert_eq!(build(&[segment(PAGE, 512)], 1024, &mut []), Err(PrpError::Short));
        assert_eq!(build(&[segment(PAGE, 4096)], 8192, &mut []), Err(PrpError::Short));
    }

    #[test]
    fn segments_that_go_on_are_refused() {
        assert_eq!(build(&[segment(PAGE, 1024)], 512, &mut []), Err(PrpError::Long));
        assert_eq!(build(&[segment(PAGE, 512), segment(PAGE + 512, 4)], 512, &mut []), Err(PrpError::Long));
    }

    #[test]
    fn a_list_beyond_its_memory_is_refused_and_not_written() {
        assert_eq!(build(&[segment(PAGE, 16384)], 16384, &mut [0; 2]), Err(PrpError::ListFull));
    }

    /// Segments that PRPs can tell: an offset at the start, then whole pages from anywhere, cut into pieces.
    fn tellable() -> impl Strategy<Value = (Vec<Segment>, u32)> {
        let pages = prop::collection::vec((1u64..1 << 20, 1u32..4096, any::<bool>()), 1..1200);
        (pages, 0u32..1024, 1u32..=4096).prop_map(|(pages, first_dword, last_len)| {
            let mut segments = Vec::new();
            let count = pages.len();
            for (index, (page, cut, is_cut)) in pages.into_iter().enumerate() {
                let from = if index == 0 { first_dword * 4 } else { 0 };
                let to = if index + 1 == count { last_len.max(from + 1) } else { 4096 };
                let cut = from + cut % (to - from);
                if is_cut {
                    segments.push(segment(page * PAGE + u64::from(from), cut - from));
                    segments.push(segment(page * PAGE + u64::from(cut), to - cut));
                } else {
                    segments.push(segment(page * PAGE + u64::from(from), to - from));
                }
            }
            let total = segments.iter().map(|segment| segment.len_bytes).sum();
            (segments, total)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn a_device_that_walks_the_entries_finds_every_byte_in_order((segments, total) in tellable()) {
            let mut list = vec![0; list_pages(total) * ENTRIES_PER_PAGE];
            let pointer = build(&segments, total, &mut list).unwrap();
            let expected: Vec<u64> = segments
                .iter()
                .flat_map(|segment| (0..u64::from(segment.len_bytes)).map(|byte| segment.iova.0 + byte))
                .collect();
            prop_assert_eq!(walk(pointer, total as usize, &list), expected);
        }

        #[test]
        fn pieces_of_a_buffer_continue_where_the_last_ended(
            start in (0u64..1024).prop_map(|dword| PAGE + dword * 4),
            pieces in prop::collection::vec((1u32..64).prop_map(|blocks| blocks * 512), 1..20)
        ) {
            let total = pieces.iter().sum();
            let mut cursor = SegmentCursor::new(std::iter::once(segment(start, total)));
            let mut at = start;
            for piece in pieces {
                let mut list = vec![0; list_pages(piece) * ENTRIES_PER_PAGE];
                let pointer =
                    cursor.take(piece, || ListMemory { entries: &mut list, iova: Iova(LIST) }).unwrap();
                let expected: Vec<u64> = (at..at + u64::from(piece)).collect();
                prop_assert_eq!(walk(pointer, piece as usize, &list), expected);
                at += u64::from(piece);
            }
            prop_assert!(!cursor.advance());
        }
    }
}
