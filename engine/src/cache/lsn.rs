//! Log sequence numbers of cached pages, and how many pages of gated mappings may be dirty.
//!
//! A page has two, as in ARIES: the *last* number it was stamped with (pageLSN: the log must be durable up to
//! it before the page is written) and the *first* since it was last written (recLSN: where the log is needed
//! from, if power fails now). They lie beside the folio headers, 16 bytes a frame, in memory that costs
//! nothing until it is touched: who stamps nothing pays nothing.
//!
//! | number | set by | cleared by |
//! |---|---|---|
//! | last | the exclusive holder | the shard, when the frame is given up |
//! | first | the exclusive holder, if there is none | the shard, when a write of the page succeeded, or with *last* |
//!
//! Both are stored under exclusive possession and read by the shard when it has found nobody holding the
//! folio. That the end of a write clears *first* rests on stable pages (WB-25): nobody stamps a page that the
//! device reads. The *last* number outlives the write, so that a number that goes backwards is noticed as
//! long as the page is cached.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use zerocopy::FromZeros;

use super::MAPPINGS_MAX;
use super::folio::FrameId;

/// A log sequence number: where in the embedder's write-ahead log a change is recorded. Larger is later; 0 is
/// none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// No number: the change is in no log.
    pub const NONE: Self = Self(0);

    /// Whether this is [`NONE`](Self::NONE).
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

impl std::fmt::Display for Lsn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The two numbers of the page in one frame; 0 where there is none.
#[derive(Debug, FromZeros)]
struct Stamps {
    first: AtomicU64,
    last: AtomicU64,
}

/// The numbers of all pages of one shard.
#[derive(Debug)]
pub(crate) struct PageLsns {
    /// By frame.
    stamps: Box<[Stamps]>,
    /// By mapping slot: the highest number that a page of the mapping was stamped with; 0 while none was.
    highest: Box<[AtomicU64]>,
}

impl PageLsns {
    pub(crate) fn new(frames: usize) -> Self {
        let stamps =
            <[Stamps]>::new_box_zeroed_with_elems(frames).expect("a cache's metadata fits into memory");
        Self { stamps, highest: (0..MAPPINGS_MAX).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Bytes that the numbers take, if any page was stamped.
    pub(crate) fn bytes_in_use(&self) -> usize {
        let stamped = self.highest.iter().any(|highest| highest.load(Ordering::Relaxed) != 0);
        if stamped { size_of_val(&*self.stamps) } else { 0 }
    }

    /// Stamps the pages in frames that the caller holds exclusively. `Err` is the highest of their last
    /// numbers, when that is higher; nothing has changed then.
    pub(crate) fn stamp(
        &self,
        frames: impl Iterator<Item = FrameId> + Clone,
        mapping: u16,
        lsn: Lsn,
    ) -> Result<(), Lsn> {
        let pages = frames.map(|frame| &self.stamps[frame.0 as usize]);
        let last = pages.clone().map(|page| page.last.load(Ordering::Relaxed)).max().unwrap_or(0);
        if lsn.0 < last {
            return Err(Lsn(last));
        }
        // Before the pages' own numbers: a sync that finds those knows a cap that covers them.
        self.highest[mapping as usize].fetch_max(lsn.0, Ordering::Relaxed);
        for page in pages {
            page.last.store(lsn.0, Ordering::Relaxed);
            if page.first.load(Ordering::Relaxed) == 0 {
                page.first.store(lsn.0, Ordering::Release);
            }
        }
        Ok(())
    }

    /// Whether a page of the mapping was ever stamped.
    pub(crate) fn is_used(&self, mapping: u16) -> bool {
        !self.highest(mapping).is_none()
    }

    /// The number up to which the log must be durable before the page is written.
    #[inline]
    pub(crate) fn last(&self, frame: FrameId) -> Lsn {
        Lsn(self.stamps[frame.0 as usize].last.load(Ordering::Acquire))
    }

    /// The first number since the page was last written; only of a page that is dirty or under writeback.
    #[inline]
    pub(crate) fn first(&self, frame: FrameId) -> Lsn {
        Lsn(self.stamps[frame.0 as usize].first.load(Ordering::Acquire))
    }

    /// The highest number in a mapping, of pages that are in the cache or were.
    pub(crate) fn highest(&self, mapping: u16) -> Lsn {
        Lsn(self.highest[mapping as usize].load(Ordering::Relaxed))
    }

    /// A page has been written, and is still under writeback. The shard only.
    pub(crate) fn written(&self, frame: FrameId) {
        let first = &self.stamps[frame.0 as usize].first;
        if first.load(Ordering::Relaxed) != 0 {
            first.store(0, Ordering::Relaxed);
        }
    }

    /// A frame is given up. The shard only, with the folio frozen.
    pub(crate) fn forget(&self, mapping: u16, frame: FrameId) {
        if !self.is_used(mapping) {
            return;
        }
        let page = &self.stamps[frame.0 as usize];
        if page.last.load(Ordering::Relaxed) != 0 {
            page.first.store(0, Ordering::Relaxed);
            page.last.store(0, Ordering::Relaxed);
        }
    }

    /// A mapping was closed, and all its frames are given up: its slot may be another's. The shard only.
    pub(crate) fn mapping_closed(&self, mapping: u16) {
        self.highest[mapping as usize].store(0, Ordering::Relaxed);
    }
}

/// Which mappings are gated, and how many of their pages, taken together, may be dirty in this shard.
#[derive(Debug, Default)]
pub(crate) struct GatedMappings {
    /// A bit a mapping slot.
    slots: [AtomicU64; MAPPINGS_MAX / 64],
    pages_max: AtomicU32,
}

impl GatedMappings {
    /// Sets the limit; once, before anything is gated.
    pub(crate) fn limit(&self, pages_max: u32) {
        self.pages_max.store(pages_max, Ordering::Relaxed);
    }

    pub(crate) fn pages_max(&self) -> u32 {
        self.pages_max.load(Ordering::Relaxed)
    }

    /// A gated mapping was opened.
    pub(crate) fn insert(&self, mapping: u16) {
        self.slots[mapping as usize / 64].fetch_or(1 << (mapping % 64), Ordering::Relaxed);
    }

    /// A mapping was closed.
    pub(crate) fn remove(&self, mapping: u16) {
        self.slots[mapping as usize / 64].fetch_and(!(1 << (mapping % 64)), Ordering::Relaxed);
    }

    /// The slots of gated mappings: few.
    #[inline]
    pub(crate) fn slots(&self) -> impl Iterator<Item = usize> + '_ {
        self.slots.iter().enumerate().flat_map(|(word, slots)| {
            let mut rest = slots.load(Ordering::Relaxed);
            std::iter::from_fn(move || {
                let slot = rest.trailing_zeros();
                rest &= rest.wrapping_sub(1);
                (slot < 64).then_some(word * 64 + slot as usize)
            })
        })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const FRAME: FrameId = FrameId(3);
    const FRAME_ALONE: [FrameId; 1] = [FRAME];

    #[test]
    fn wb45_the_first_number_stays_until_the_page_is_written_and_the_last_one_follows() {
        let lsns = PageLsns::new(8);
        lsns.stamp(FRAME_ALONE.into_iter(), 5, Lsn(10)).unwrap();
        lsns.stamp(FRAME_ALONE.into_iter(), 5, Lsn(12)).unwrap();
        assert_eq!((lsns.first(FRAME), lsns.last(FRAME)), (Lsn(10), Lsn(12)));
        lsns.written(FRAME);
        assert_eq!((lsns.first(FRAME), lsns.last(FRAME)), (Lsn::NONE, Lsn(12)));
        lsns.stamp(FRAME_ALONE.into_iter(), 5, Lsn(12)).unwrap();
        assert_eq!((lsns.first(FRAME), lsns.last(FRAME)), (Lsn(12), Lsn(12)));
        assert_eq!(lsns.highest(5), Lsn(12));
        lsns.forget(5, FRAME);
        assert_eq!((lsns.first(FRAME), lsns.last(FRAME)), (Lsn::NONE, Lsn::NONE));
    }

    #[test]
    fn wb40_a_number_that_goes_backwards_is_refused_and_changes_nothing() {
        let lsns = PageLsns::new(8);
        lsns.stamp(FRAME_ALONE.into_iter(), 5, Lsn(10)).unwrap();
        assert_eq!(lsns.stamp(FRAME_ALONE.into_iter(), 5, Lsn(9)), Err(Lsn(10)));
        assert_eq!((lsns.first(FRAME), lsns.last(FRAME)), (Lsn(10), Lsn(10)));
        assert_eq!(lsns.highest(5), Lsn(10));
        let both = [FRAME, FrameId(4)];
        assert_eq!(lsns.stamp(both.into_iter(), 5, Lsn(9)), Err(Lsn(10)));
        assert_eq!(lsns.last(FrameId(4)), Lsn::NONE, "all or none");
    }

    #[test]
    fn gated_mappings_are_found_by_their_slots() {
        let gated = GatedMappings::default();
        for slot in [0, 63, 64, 255] {
            gated.insert(slot);
        }
        assert_eq!(gated.slots().collect::<Vec<_>>(), [0, 63, 64, 255]);
        gated.remove(63);
        assert_eq!(gated.slots().collect::<Vec<_>>(), [0, 64, 255]);
    }
}
