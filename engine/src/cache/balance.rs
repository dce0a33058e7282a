//! How much memory of a shard is dirty, and the gate before which writers learn that it is too much (WB-24).
//!
//! # The count
//! *Dirty memory* is pages DIRTY and pages under WRITEBACK, but for poisoned ones: what the device hasn't taken over yet.
//! Beside it stand pages **reserved**: held exclusively by a writer whom the shard has let on, or who hits several at once,
//! so about to be dirty. Only what fits is reserved; a reservation ends with the hold, after its pages have been counted
//! dirty. So dirty memory never passes the limit. (A page that is dirty and reserved to be changed again counts twice.)
//!
//! # The gate
//! A hit must not pay for all that. Below the middle of the limits the gate is open, and a writer that hits a page
//! loads one word that hardly ever changes. Who counts the page that passes the middle closes the gate; from then on
//! pages that would become dirty are had from the shard alone, which makes writers wait
//! ([`shard::balance`](crate::shard::balance)). A page that is dirty already is no news and may be changed through a
//! closed gate, too. The shard opens the gate when dirty memory has fallen to the middle. In a small cache, where between
//! middle and limit there is no room for the largest page of a mapping, the gate closes earlier; the shard still slows
//! nobody below the middle.
//!
//! A writer that has passed the open gate and holds one clean page isn't counted: that comes on top when it is released. The ceiling up to which the shard lets writers on lies below the limit for them
//! ([`DirtyLimits`]).

use std::sync::Arc;

use super::SharedCache;
use super::exclusion::between_announcing_and_looking;
use super::folio::FrameId;
use super::shape::MappingShape;
use super::tags::Tag;
use crate::primitives::{AtomicU32, AtomicU64, Ordering};
use crate::writeback::throttle::DirtyLimits;

const OPEN: u32 = 0;
const CLOSED: u32 = 1;

/// Pages of the largest page that a mapping can have.
pub(crate) const BLOCK_PAGES_MAX: u64 = 16;
/// Pages that a hit may make dirty at once.
const HIT_PAGES_MAX: u64 = 32;

const MARKED: u64 = 1;
const RESERVED: u64 = 1 << 32;

/// A word on a cache line of its own.
#[derive(Debug)]
#[repr(align(64))]
struct Line<T>(T);

/// The dirty memory of one shard.
#[derive(Debug)]
pub(crate) struct DirtyBalance {
    /// Read by every writer that hits; written when dirty memory passes the middle.
    gate: Line<AtomicU32>,
    /// Pages DIRTY or under WRITEBACK in the low half, pages reserved in the high half.
    counts: Line<AtomicU64>,
    /// Up to this many pages the gate is open.
    open_pages: u64,
    /// No more pages are reserved than this, dirty ones included.
    ceiling_pages: u64,
}

impl DirtyBalance {
    pub(crate) fn new(limits: &DirtyLimits) -> Self {
        let (gate, counts) = (Line(AtomicU32::new(OPEN)), Line(AtomicU64::new(0)));
        // A page of a mapping that hits an open gate must fit, whatever its size.
        let open_pages = limits.freerun.min(limits.ceiling.saturating_sub(BLOCK_PAGES_MAX));
        Self { gate, counts, open_pages, ceiling_pages: limits.ceiling }
    }

    /// Whether a writer may make a page dirty that it hits. Any thread; the whole price of throttling for a hit.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.gate.0.load(Ordering::Relaxed) == OPEN
    }

    /// `count` more pages are dirty; by the thread that dirties, before its pin is released. Returns how many were dirty
    /// or under writeback.
    pub(crate) fn dirtied(&self, count: u32) -> u32 {
        self.add(MARKED * u64::from(count)) as u32
    }

    /// `count` pages are neither dirty nor under writeback any more.
    pub(crate) fn cleaned(&self, count: u32) {
        self.counts.0.fetch_sub(MARKED * u64::from(count), Ordering::SeqCst);
    }

    /// Pages that are dirty or under writeback, without those that are poisoned.
    pub(crate) fn marked(&self) -> u64 {
        self.counts.0.load(Ordering::SeqCst) % RESERVED
    }

    /// Pages that writers hold, or will hold, and may make dirty.
    pub(crate) fn reserved(&self) -> u64 {
        self.counts.0.load(Ordering::SeqCst) / RESERVED
    }

    /// What writers are slowed by: dirty memory, and what is about to be.
    ///
    /// Poisoned pages are not in it, since writers can do nothing about them (WB-23): they leave the count when their write
    /// has failed for good, and come back to it, if ever, as clean pages that are dirtied anew.
    pub(crate) fn throttleable(&self) -> u64 {
        let counts = self.counts.0.load(Ordering::SeqCst);
        counts % RESERVED + counts / RESERVED
    }

    /// The shard lets a writer on that holds, or will hold, `pages` pages exclusively.
    pub(crate) fn reserve(&self, pages: u32) {
        self.add(RESERVED * u64::from(pages));
    }

    /// Reserves `pages` pages for a writer that hits, if the gate is open and they fit. Any thread.
    fn try_reserve(&self, pages: u64) -> Option<ReservedPages<'_>> {
        if !self.is_open() {
            return None;
        }
        let reserved = ReservedPages { balance: self, pages: pages as u32 };
        let counts = self.add(RESERVED * pages);
        (counts % RESERVED + counts / RESERVED + pages <= self.ceiling_pages).then_some(reserved)
    }

    /// A writer holds `pages` pages less: after it has counted the dirty ones among them.
    pub(crate) fn unreserve(&self, pages: u32) {
        self.counts.0.fetch_sub(RESERVED * u64::from(pages), Ordering::SeqCst);
    }

    /// The shard's side: opens the gate if dirty memory has fallen to the middle. Returns [`is_open`](Self::is_open).
    pub(crate) fn open_if_below(&self) -> bool {
        if !self.is_open() && self.throttleable() <= self.open_pages {
            self.gate.0.store(OPEN, Ordering::SeqCst);
            between_announcing_and_looking();
            // Who counted before this look may have closed the gate before it was opened; who counts later closes it
            // again.
            if self.throttleable() > self.open_pages {
                self.gate.0.store(CLOSED, Ordering::SeqCst);
            }
        }
        self.is_open()
    }

    fn add(&self, more: u64) -> u64 {
        let before = self.counts.0.fetch_add(more, Ordering::SeqCst);
        let after = before + more;
        between_announcing_and_looking();
        if after % RESERVED + after / RESERVED > self.open_pages {
            self.gate.0.store(CLOSED, Ordering::SeqCst);
        }
        before
    }
}

/// Pages that a request may make dirty once it gets them; dropped, they are given back.
#[derive(Debug)]
pub(crate) struct Reservation {
    cache: Arc<SharedCache>,
    pages: u32,
}

impl Reservation {
    pub(crate) fn new(cache: &Arc<SharedCache>, pages: u32) -> Self {
        cache.balance.reserve(pages);
        Self { cache: cache.clone(), pages }
    }

    /// Pages that are left of it.
    pub(crate) fn pages(&self) -> u32 {
        self.pages
    }

    /// `pages` pages of it go to the requester, with their frames.
    pub(crate) fn hand_over(&mut self, pages: u32) {
        self.pages -= pages;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.cache.balance.unreserve(self.pages);
    }
}

/// The reservation of pages that a pin holds exclusively.
#[derive(Debug)]
pub(crate) struct ReservedPages<'a> {
    balance: &'a DirtyBalance,
    pages: u32,
}

impl<'a> ReservedPages<'a> {
    /// Takes over what the shard reserved for pages that it granted exclusively.
    pub(crate) fn take_over(balance: &'a DirtyBalance, pages: u32) -> Self {
        Self { balance, pages }
    }
}

impl Drop for ReservedPages<'_> {
    fn drop(&mut self) {
        self.balance.unreserve(self.pages);
    }
}

impl SharedCache {
    /// How many of `pages` pages from `frame` on a writer may change that has just taken their folio exclusively without
    /// asking the shard, and the reservation for them, if they need one; `None` when it has to ask (WB-24).
    #[inline]
    pub(crate) fn may_dirty(
        &self,
        frame: FrameId,
        pages: u64,
        shape: &MappingShape,
    ) -> Option<(u64, Option<ReservedPages<'_>>)> {
        let block = shape.order.pages();
        if pages <= block && self.balance.is_open() {
            return Some((pages, None));
        }
        self.may_dirty_many(frame, pages, block)
    }

    fn may_dirty_many(
        &self,
        frame: FrameId,
        pages: u64,
        block: u64,
    ) -> Option<(u64, Option<ReservedPages<'_>>)> {
        if pages > block {
            // Few at a time, so that they fit, and whole blocks.
            let pages = pages.min(HIT_PAGES_MAX.max(block)) / block * block;
            if let Some(reserved) = self.balance.try_reserve(pages) {
                return Some((pages, Some(reserved)));
            }
        }
        // Pages that are dirty already are no news. Blocks are dirty as a whole.
        let mut dirty = 0;
        for (first, bits) in self.leaves(frame, pages) {
            let clean = bits & !self.tags.marked(first.tag_leaf(), Tag::Dirty);
            if clean != 0 {
                dirty += u64::from(clean.trailing_zeros() - bits.trailing_zeros());
                break;
            }
            dirty += u64::from(bits.count_ones());
        }
        let changed = if pages < block { dirty } else { dirty / block * block };
        (changed > 0).then_some((changed, None))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Limits with a middle of `freerun`.
    fn limits(freerun: u64) -> DirtyLimits {
        DirtyLimits { background: 0, freerun, ceiling: freerun + BLOCK_PAGES_MAX, limit: 100 }
    }

    #[test]
    fn the_gate_closes_past_the_middle_and_opens_at_it() {
        let balance = DirtyBalance::new(&limits(2));
        assert_eq!((balance.dirtied(1), balance.dirtied(1)), (0, 1));
        assert!(balance.is_open(), "up to the middle nobody is slowed");
        assert_eq!(balance.dirtied(1), 2);
        assert!(!balance.is_open());
        assert!(!balance.open_if_below());
        balance.cleaned(1);
        assert!(balance.open_if_below());
    }

    #[test]
    fn reserved_pages_close_the_gate_as_dirty_ones_do() {
        let balance = DirtyBalance::new(&limits(2));
        balance.reserve(3);
        assert!(!balance.is_open());
        assert_eq!((balance.marked(), balance.throttleable()), (0, 3));
        balance.dirtied(1);
        balance.unreserve(1);
        assert_eq!((balance.marked(), balance.throttleable()), (1, 3), "the page has changed columns");
        balance.unreserve(2);
        assert!(balance.open_if_below());
    }

    #[test]
    fn hits_of_many_pages_reserve_what_fits_and_nothing_else() {
        let balance = DirtyBalance::new(&limits(10));
        let held = balance.try_reserve(10).unwrap();
        assert!(balance.is_open());
        assert!(balance.try_reserve(17).is_none(), "above the ceiling");
        assert_eq!(balance.throttleable(), 10, "nothing is left of it");
        assert!(balance.open_if_below(), "though it closed the gate");
        let more = balance.try_reserve(16).unwrap();
        assert!(!balance.is_open() && balance.try_reserve(1).is_none());
        drop((held, more));
        assert_eq!(balance.throttleable(), 0);
    }

    #[test]
    fn the_gate_of_a_small_cache_closes_before_a_block_might_not_fit() {
        let balance = DirtyBalance::new(&DirtyLimits { background: 6, freerun: 11, ceiling: 16, limit: 16 });
        balance.dirtied(1);
        assert!(!balance.is_open());
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// However the shard's opening meets threads that count: at rest the gate is closed if there is too much.
    #[test]
    fn the_gate_is_closed_whenever_too_much_is_dirty_at_rest() {
        loom::model(|| {
            let balance = Arc::new(DirtyBalance::new(&DirtyLimits {
                background: 0,
                freerun: 1,
                ceiling: 20,
                limit: 20,
            }));
            balance.dirtied(1);
            balance.dirtied(1);
            let writer = {
                let balance = balance.clone();
                thread::spawn(move || {
                    balance.dirtied(1);
                })
            };
            balance.cleaned(1);
            balance.open_if_below();
            writer.join().unwrap();
            assert_eq!(balance.marked(), 2);
            assert!(!balance.is_open());
        });
    }
}
