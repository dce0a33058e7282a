//! The end of the mapping in a pass (`iomap_writepage_handle_eof`, WB-12).

use super::pass::WritebackPass;
use crate::cache::frames::PAGE_BYTES;
use crate::cache::tags::LeafPages;
use crate::cache::{SharedCache, Written, folio::FrameId};
use crate::stats::bump;

const PAGE: u64 = PAGE_BYTES as u64;

/// Where a mapping ends, in its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LastBlock {
    /// The first page that lies wholly behind the end, in a block that does.
    beyond: u64,
    /// Bytes of the block before it that lie behind the end.
    tail_bytes: u64,
}

impl LastBlock {
    fn of(reach: u64, block_pages: u64) -> Self {
        let end = reach.next_multiple_of(block_pages * PAGE);
        Self { beyond: end / PAGE, tail_bytes: end - reach }
    }
}

impl WritebackPass<'_> {
    /// Of the pages that have just been locked, those behind the end of the mapping are clean instead of written, and the rest of
    /// the block across the end becomes zeros. To be called before any of them is handed out.
    pub(super) fn handle_eof(&mut self) {
        // Only now that the pages are locked: who extends has raised it before taking a page (`cache::eof`).
        let reach = self.end.reach();
        let last = LastBlock::of(reach, self.shape.order.pages());
        let from = last.beyond.saturating_sub(self.first_page).min(64);
        let beyond = if from == 64 { 0 } else { self.locked.pages & (u64::MAX << from) };
        if beyond != 0 {
            self.locked.pages &= !beyond;
            self.drop_beyond_end(LeafPages { pages: beyond, ..self.locked });
        }
        if last.tail_bytes == 0 || last.beyond <= self.first_page || from == 0 {
            return;
        }
        // The block's last page in this leaf; blocks don't reach over leaves.
        let slot = (last.beyond - 1 - self.first_page) as usize;
        if slot < 64 && self.locked.pages >> slot & 1 != 0 {
            self.issuer.cache.shared.zero_before(FrameId(self.frames[slot].0 + 1), last.tail_bytes as usize);
        }
    }

    /// Locked pages behind the end are clean: nobody shall ever see them.
    fn drop_beyond_end(&mut self, batch: LeafPages) {
        let (cache, shape) = (self.issuer.cache, self.shape);
        cache.start_writeback(shape, batch.leaf, batch.pages);
        let mut rest = batch.pages;
        while rest != 0 {
            let slot = rest.trailing_zeros();
            let count = (rest >> slot).trailing_ones();
            cache.end_writeback(shape, self.first_page + u64::from(slot), u64::from(count), Written::Yes);
            rest = rest.checked_shr(slot + count).map_or(0, |above| above << (slot + count));
        }
        bump(&self.issuer.link.counters.pages_discarded, u64::from(batch.pages.count_ones()));
    }
}

impl SharedCache {
    /// Makes zeros of the `count` bytes that end where frame `end` begins, in frames of one block that is locked for
    /// writeback, and that lie behind the end of its mapping.
    fn zero_before(&self, end: FrameId, count: usize) {
        let pages = count.div_ceil(PAGE_BYTES);
        let first = self.frames.address(FrameId(end.0 - pages as u32));
        let skip = pages * PAGE_BYTES - count;
        // SAFETY: a block's frames lie side by side, so the bytes are this block's. Under WRITEBACK nobody holds it exclusively
        // (`cache::exclusion`), and the device isn't told of it before this step is over. Shared pins show no byte behind
        // *reach* (`cache::eof`), and all of these are.
        #[expect(unsafe_code, reason = "the bytes of a locked block behind the end are the pass's")]
        unsafe {
            first.as_ptr().add(skip).write_bytes(0, count);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn wb12_the_end_divides_blocks_exactly() {
        let last = |reach, pages| {
            let LastBlock { beyond, tail_bytes } = LastBlock::of(reach, pages);
            (beyond, tail_bytes)
        };
        assert_eq!(last(0, 1), (0, 0));
        assert_eq!(last(1, 1), (1, 4095));
        assert_eq!(last(4096, 1), (1, 0));
        assert_eq!(last(4097, 4), (4, 4 * 4096 - 4097));
        assert_eq!(last(16_384, 4), (4, 0));
        assert_eq!(last(16_385, 4), (8, 16_383));
    }
}
