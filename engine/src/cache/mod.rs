//! The page cache of one shard.
//!
//! [`SharedCache`] is what any thread may touch: frames, folio headers, the look-up index, the mark words. A hit
//! needs nothing else. [`ShardCache`](owned::ShardCache) adds what the shard alone changes: which folio is where, the tag
//! trees' structure, free frames, the queues of eviction.
//!
//! Read next: [`folio`] for the state word and its rules, [`tags`] for the marks.

pub(crate) mod balance;
pub(crate) mod buddy;
pub(crate) mod course;
pub(crate) mod eof;
pub(crate) mod errseq;
pub(crate) mod exclusion;
pub(crate) mod folio;
pub(crate) mod frames;
pub(crate) mod index;
pub(crate) mod lsn;
pub(crate) mod owned;
pub(crate) mod published;
pub(crate) mod readahead;
pub(crate) mod reclaim;
pub(crate) mod shape;
pub(crate) mod shares;
pub(crate) mod stripe;
pub(crate) mod table;
pub(crate) mod tags;
pub(crate) mod workingset;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use balance::DirtyBalance;
use exclusion::{LEAF_PAGES, leaf_bit, leaf_bits};
use folio::{
    Access, AtHand, FolioHeader, FolioKey, FolioOrder, FolioState, FrameId, Identity, ReadAhead, Released,
};
use frames::FrameMemory;
use index::FolioIndex;
use lsn::{GatedMappings, Lsn, PageLsns};
use published::{Slot, ThreadBlock};
use shape::{MappingShape, Stability};
use shares::ShareAccounts;
use table::Table;
use tags::{Tag, TagNodes};

/// Mappings that can be open at once.
pub(crate) const MAPPINGS_MAX: usize = 256;

/// How many pages of one mapping in one shard are DIRTY (low half) and under WRITEBACK (high half): one word, so
/// that a page on its way from one to the other is never missed. And how many of the dirty ones are POISONED.
#[derive(Debug, Default)]
pub(crate) struct MarkedPages {
    counts: AtomicU64,
    poisoned: AtomicU32,
}

impl MarkedPages {
    const DIRTY: u64 = 1;
    const WRITEBACK: u64 = 1 << 32;

    /// Whether a sync has anything to wait for here.
    pub(crate) fn any(&self) -> bool {
        self.counts.load(Ordering::SeqCst) != 0
    }

    /// Pages that are dirty.
    pub(crate) fn dirty(&self) -> u32 {
        self.counts.load(Ordering::Relaxed) as u32
    }

    /// Dirty pages whose last write failed for good.
    pub(crate) fn poisoned(&self) -> u32 {
        self.poisoned.load(Ordering::Relaxed)
    }

    /// Dirty pages that background writeback can make clean: what throttling and the flusher count (WB-23).
    pub(crate) fn writable(&self) -> u32 {
        self.dirty().saturating_sub(self.poisoned())
    }

    /// Pages under writeback.
    pub(crate) fn writeback(&self) -> u32 {
        (self.counts.load(Ordering::Relaxed) >> 32) as u32
    }

    /// `count` more are dirty; by the thread that dirties, before its pin is released.
    fn dirtied(&self, count: u32) {
        self.counts.fetch_add(Self::DIRTY * u64::from(count), Ordering::SeqCst);
    }

    /// `count` dirty ones are clean, or gone.
    fn cleaned(&self, count: u32) {
        self.counts.fetch_sub(Self::DIRTY * u64::from(count), Ordering::SeqCst);
    }

    /// `count` dirty ones have gone under writeback.
    fn writeback_started(&self, count: u32) {
        self.counts.fetch_add((Self::WRITEBACK - Self::DIRTY) * u64::from(count), Ordering::SeqCst);
    }

    /// These dirty ones of a leaf are poisoned.
    fn poison(&self, pages: u64) {
        self.poisoned.fetch_add(pages.count_ones(), Ordering::Relaxed);
    }

    /// These poisoned ones of a leaf are under writeback, or gone.
    fn recovered(&self, pages: u64) {
        self.poisoned.fetch_sub(pages.count_ones(), Ordering::Relaxed);
    }

    /// `count` have ended writeback; those whose write failed were counted dirty before.
    fn writeback_ended(&self, count: u64) {
        self.counts.fetch_sub(Self::WRITEBACK * count, Ordering::SeqCst);
    }
}

/// Whether a write that ended has reached the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// It has.
    Yes,
    /// It has not, or nobody knows: the pages are dirty again, and poisoned.
    No,
    /// It never left: the pages are dirty again.
    Refused,
}

/// The part of a shard's cache that every thread may touch.
#[derive(Debug)]
pub(crate) struct SharedCache {
    pub frames: FrameMemory,
    pub headers: Table<FolioHeader>,
    pub index: FolioIndex,
    pub tags: Arc<TagNodes>,
    /// By mapping slot.
    pub marked: Box<[MarkedPages]>,
    /// All mappings together, and the gate before which writers wait.
    pub balance: DirtyBalance,
    pub lsns: PageLsns,
    pub gated: GatedMappings,
    /// What each share of the cache holds, and may hold.
    pub shares: ShareAccounts,
}

impl SharedCache {
    #[inline]
    pub(crate) fn folio(&self, frame: FrameId) -> &FolioHeader {
        &self.headers[frame.0 as usize]
    }

    /// Where `frame` seems to stand in its folio. Exact for who holds the folio, and for the shard.
    #[inline]
    pub(crate) fn place(&self, frame: FrameId) -> Place {
        let order = self.folio(frame).order();
        let within = u64::from(frame.0) & (order.pages() - 1);
        Place { head: FrameId(frame.0 - within as u32), within, order }
    }

    /// The header that counts for the folio of `frame`.
    pub(crate) fn head(&self, frame: FrameId) -> &FolioHeader {
        self.folio(self.place(frame).head)
    }

    /// Takes a published pin on the page `key`, if its header says that it `is` as expected, a folio by itself, `at_hand` and
    /// biased, and the calling thread has a slot: the shortest way to a page in use. Where it ends early nothing is known.
    #[inline]
    pub(crate) fn pin_published(
        &self,
        block: &'static ThreadBlock,
        key: FolioKey,
        (is, at_hand): (Identity, AtHand),
    ) -> Result<(FrameId, &FolioHeader, &'static Slot), Released> {
        let slot = block.free_slot().ok_or(Released::Quiet)?;
        let found = self.index.walk(&self.headers, key, |folio| folio.identity() == is);
        let (frame, folio) = found.ok_or(Released::Quiet)?;
        // A kick that is due may be another page's by now: it mustn't be left to the longer way, which looks at this one.
        folio.try_publish_at_hand(slot, (is, at_hand))?;
        Ok((frame, folio, slot))
    }

    /// A folio that `is` the page `key` by itself, and `at_hand`, as it was then: for who reads it without holding it.
    #[inline]
    pub(crate) fn look_up(
        &self,
        key: FolioKey,
        (is, at_hand): (Identity, AtHand),
    ) -> Option<(FrameId, &FolioHeader, FolioState)> {
        let (mut seen, mut identity) = (FolioState::NONE, is);
        // In this order: if the frame becomes another page's afterwards, the state's version changes.
        let (frame, folio) = self.index.walk(&self.headers, key, |folio| {
            (seen, identity) = (folio.state(), folio.identity());
            identity.is_same_page(is)
        })?;
        (identity == is && seen.is(at_hand)).then_some((frame, folio, seen))
    }

    /// Takes a shared pin on the folio of `frame`, if that holds the page `key` and may be shared: a published one where the
    /// folio is biased towards readers, else one that is counted.
    #[inline]
    pub(crate) fn try_pin(&self, frame: FrameId, key: FolioKey) -> Result<SharedHold, Released> {
        let (place, own) = (self.place(frame), self.folio(frame));
        let head = self.folio(place.head);
        let holds = || own.identity() == Identity::new(key, place.order);
        let mut undone = Released::Quiet;
        if let Some(slot) = published::this_thread().and_then(|block| block.free_slot()) {
            match head.try_publish(slot, place.within, holds) {
                Ok(()) => return Ok(SharedHold { place, slot: Some(slot), found: ReadAhead::NONE }),
                Err(released) => undone = released,
            }
        }
        let worth_biasing = head.is_worth_biasing();
        // Where this succeeds, its release does the kick that is due.
        let counted = head.try_pin(place.within, holds);
        let found = counted.map_err(|released| if undone == Released::Kick { undone } else { released })?;
        if worth_biasing && published::may_bias() {
            head.bias();
        }
        Ok(SharedHold { place, slot: None, found })
    }

    /// Takes the folio of `frame` exclusively for any thread, if that holds the page `key` and can be had at once.
    #[inline]
    pub(crate) fn try_exclusive(
        &self,
        frame: FrameId,
        key: FolioKey,
        (access, stability): (Access, Stability),
    ) -> Result<Place, Released> {
        let place = self.place(frame);
        let (head, own) = (self.folio(place.head), self.folio(frame));
        match stability {
            Stability::Stable => {
                exclusion::try_exclusive(head, own, &self.tags, key, (place.order, place.within), access)?;
            }
            Stability::Unstable => {
                let at = (place.order, place.within);
                exclusion::try_exclusive_beside_device(head, own, &self.tags, key, at, access)?;
            }
        }
        Ok(place)
    }

    /// As [`try_exclusive`](Self::try_exclusive), of the page `key` where a header says that it `is` a folio by itself: the
    /// shortest way for who writes in it, or writes the `whole` of it. `None` where there is no such header.
    #[inline]
    pub(crate) fn try_exclusive_alone(
        &self,
        key: FolioKey,
        is: Identity,
        whole: bool,
    ) -> Option<Result<Place, Released>> {
        let (frame, folio) = self.index.walk(&self.headers, key, |folio| folio.identity() == is)?;
        if whole {
            self.frames.prefetch(frame);
        }
        let place = Place { head: frame, within: 0, order: FolioOrder(0) };
        let at = (place.order, place.within);
        let taken = exclusion::try_exclusive(folio, folio, &self.tags, key, at, Access::Change);
        Some(taken.map(|()| place))
    }

    /// How many pages from `frame` on, at most `pages`, an exclusive holder may overwrite: those of its folio up to the
    /// first that the device reads, and in an unstable mapping up to the first that mustn't be changed nevertheless.
    pub(crate) fn writable_pages(
        &self,
        frame: FrameId,
        place: Place,
        (pages, stability): (u64, Stability),
    ) -> u64 {
        let pages = pages.min(place.order.pages() - place.within);
        let mut free = 0;
        for (first, bits) in self.leaves(frame, pages) {
            let busy = match stability {
                Stability::Stable => self.tags.marked(first.tag_leaf(), Tag::Writeback),
                Stability::Unstable => exclusion::closed_beside_device(&self.tags, first.tag_leaf()),
            } & bits;
            if busy != 0 {
                return free + u64::from(busy.trailing_zeros() - bits.trailing_zeros());
            }
            free += u64::from(bits.count_ones());
        }
        free
    }

    /// The `pages` pages of one folio from `frame` on, leaf by leaf: the header of the first in each, and their bits.
    pub(crate) fn leaves(&self, frame: FrameId, pages: u64) -> impl Iterator<Item = (&FolioHeader, u64)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let first = (done < pages).then(|| self.folio(FrameId(frame.0 + done as u32)))?;
            let bits = leaf_bits(first.key().page(), pages - done);
            done += u64::from(bits.count_ones());
            Some((first, bits))
        })
    }

    /// Whether the page of `frame`, whose folio can't go away, carries `tag`.
    pub(crate) fn is_marked(&self, frame: FrameId, tag: Tag) -> bool {
        let folio = self.folio(frame);
        self.tags.marked(folio.tag_leaf(), tag) & leaf_bit(folio.key().page()) != 0
    }

    /// Whether any page of the folio whose head is `head` carries `tag`.
    pub(crate) fn is_any_marked(&self, head: FrameId, tag: Tag) -> bool {
        self.marked_pages(head, |leaf| self.tags.marked(leaf, tag))
    }

    /// Whether any page of the folio whose head is `head` has its bit in what `marks` says of its leaf.
    #[inline]
    fn marked_pages(&self, head: FrameId, marks: impl Fn(u32) -> u64) -> bool {
        let folio = self.folio(head);
        let order = folio.order();
        // Most folios lie in one leaf, and most of those are one page.
        if order.pages() <= LEAF_PAGES {
            return marks(folio.tag_leaf()) & leaf_bits(folio.key().page(), order.pages()) != 0;
        }
        self.leaves(head, order.pages()).any(|(first, bits)| marks(first.tag_leaf()) & bits != 0)
    }

    /// Whether the device lacks bytes of this folio, or reads it.
    pub(crate) fn is_needed(&self, head: FrameId) -> bool {
        self.marked_pages(head, |leaf| {
            // In this order: what is about to be written gets WRITEBACK before it loses DIRTY.
            self.tags.marked(leaf, Tag::Dirty) | self.tags.marked(leaf, Tag::Writeback)
        })
    }

    /// Pages that are dirty in gated mappings.
    pub(crate) fn gated_dirty(&self) -> u64 {
        self.gated.slots().map(|slot| u64::from(self.marked[slot].dirty())).sum()
    }

    /// Whether `pages` pages more would be dirty behind gates than may be. A single request goes on when
    /// nothing is.
    #[inline]
    pub(crate) fn exceeds_gated(&self, pages: u64) -> bool {
        let dirty = self.gated_dirty();
        dirty > 0 && dirty + pages > u64::from(self.gated.pages_max())
    }

    /// Whether all `pages` pages from `frame` on, of one folio, carry `tag`.
    pub(crate) fn is_all_marked(&self, frame: FrameId, pages: u64, tag: Tag) -> bool {
        self.leaves(frame, pages).all(|(first, bits)| self.tags.marked(first.tag_leaf(), tag) & bits == bits)
    }

    /// The highest number among those of `frames`, of one folio, whose pages are dirty; none, if none has
    /// one.
    pub(crate) fn highest_dirty(&self, frames: Range<u32>) -> Lsn {
        let dirty = frames.map(FrameId).filter(|&frame| self.is_marked(frame, Tag::Dirty));
        dirty.map(|frame| self.lsns.last(frame)).max().unwrap_or_default()
    }

    /// Stamps `pages` pages from `frame` on, of an exclusively held folio: the blocks of the mapping that
    /// they lie in, since those are written as a whole. `Err` is the highest number of theirs, when that is
    /// higher.
    pub(crate) fn stamp(
        &self,
        frame: FrameId,
        pages: u64,
        shape: &MappingShape,
        lsn: Lsn,
    ) -> Result<(), Lsn> {
        let block = shape.order.pages();
        let first = u64::from(frame.0) / block * block;
        let end = (u64::from(frame.0) + pages).next_multiple_of(block);
        self.lsns.stamp((first as u32..end as u32).map(FrameId), shape.slot, lsn)
    }

    /// Marks `pages` pages from `frame` on, of an exclusively held folio, DIRTY: the blocks of the mapping that they lie
    /// in. Returns how many pages of the shard were dirty or under writeback before, if any of them was clean.
    #[inline]
    pub(crate) fn mark_dirty(&self, frame: FrameId, pages: u64, shape: &MappingShape) -> Option<u32> {
        let block = shape.order.pages();
        let (skip, frame) = (u64::from(frame.0) % block, u64::from(frame.0) / block * block);
        let mut before = None;
        for (first, bits) in self.leaves(FrameId(frame as u32), (pages + skip).next_multiple_of(block)) {
            // The shard takes marks off only when it has found nobody holding the folio. A holder beside the device sets
            // them always: the shard may just be about to take them off, and then sees what was changed before.
            if shape.stability == Stability::Stable
                && self.tags.marked(first.tag_leaf(), Tag::Dirty) & bits == bits
            {
                continue;
            }
            let clean = self.tags.set_dirty(first.tag_leaf(), bits);
            // Before possession is given back: who syncs after a write finds it counted.
            self.marked[shape.slot as usize].dirtied(clean.count_ones());
            let were = self.balance.dirtied(clean.count_ones());
            before.get_or_insert(were);
        }
        before
    }
}

/// A shared pin that was taken.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SharedHold {
    pub place: Place,
    /// Where it is published; a counted one isn't.
    pub slot: Option<&'static Slot>,
    pub found: ReadAhead,
}

/// Where a frame stands in its folio.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The folio's first frame, whose header counts.
    pub head: FrameId,
    /// Pages before this one.
    pub within: u64,
    /// How large the folio is.
    pub order: FolioOrder,
}

impl Place {
    /// The folio's frames whose pages lie in `range`, where the page at this place has the number `local`.
    pub(crate) fn frames_in(self, local: u64, range: &Range<u64>) -> Range<u32> {
        let first = local - self.within;
        let frame = |page: u64| self.head.0 + (page.clamp(first, first + self.order.pages()) - first) as u32;
        frame(range.start)..frame(range.end)
    }
}
