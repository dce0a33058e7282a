//! A pass over the dirty folios of one mapping in one shard (`writeback_iter`).
//!
//! [`PassState`] lasts over shard steps; [`WritebackPass`] is the iterator of one step. It hands folios out
//! **locked, in strictly ascending order, never twice, and never wraps** (WB-01). A [`LockedPart`] that is
//! dropped is unlocked and stays dirty, so no way out of a pass leaves a locked folio behind (WB-08).

use std::ops::Range;

use super::events::PassSpan;
use super::flusher::Reason;
use crate::cache::exclusion::{self, leaf_bits};
use crate::cache::folio::FrameId;
use crate::cache::owned::ShardCache;
use crate::cache::shape::MappingShape;
use crate::cache::tags::{Find, LeafPages, Tag};

/// What a pass promises (`enum writeback_sync_modes`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SyncMode {
    /// Background: writes what it can have without waiting.
    None,
    /// Integrity: writes everything that carried TOWRITE when it began; waits where it must.
    All,
}

/// Where a pass stands.
#[derive(Debug)]
pub(crate) struct PassState {
    pub mode: SyncMode,
    /// Shard-local pages still to look at; the start is the cursor.
    pub rest: Range<u64>,
    /// What traces show of it.
    pub span: PassSpan,
}

impl PassState {
    /// An integrity pass over `range`: first tags what is dirty now (WB-03), so that it ends although others
    /// keep dirtying pages of the range.
    pub(crate) fn integrity(cache: &ShardCache, shape: &MappingShape, range: Range<u64>) -> Self {
        cache.tree.tag_for_writeback(shape.tree, range.clone());
        Self { mode: SyncMode::All, rest: range, span: PassSpan::new(Reason::Sync) }
    }

    /// A background pass over `range`.
    pub(crate) fn background(reason: Reason, range: Range<u64>) -> Self {
        Self { mode: SyncMode::None, rest: range, span: PassSpan::new(reason) }
    }

    fn tag(&self) -> Tag {
        match self.mode {
            SyncMode::None => Tag::Dirty,
            SyncMode::All => Tag::ToWrite,
        }
    }
}

/// What the iterator says.
#[derive(Debug)]
pub(crate) enum Next<'a> {
    /// A dirty folio, locked.
    Folio(LockedPart<'a>),
    /// An integrity pass has come to a folio that somebody holds or the device is still writing; the cursor
    /// stays there.
    Blocked(FrameId),
    /// Nothing is left.
    End,
}

/// The iterator of one step.
#[derive(Debug)]
pub(crate) struct WritebackPass<'a> {
    cache: &'a ShardCache,
    shape: &'a MappingShape,
    state: &'a mut PassState,
    /// The leaf that was looked up last. Its pages are what this pass has locked and not handed out yet: folios are
    /// found by tag and locked up to 64 at a time (WB-07).
    locked: LeafPages,
    /// The folio of that leaf that stops an integrity pass, once all before it are handed out, and its page.
    blocked: Option<(FrameId, u64)>,
    /// The file page of that leaf's first; a leaf lies within a stripe, so its pages are consecutive in the file, too.
    first_page: u64,
    /// By slot in that leaf: the frames of the wanted pages.
    frames: [FrameId; 64],
    /// Bit *i*: the pages of slots *i* and *i* + 1 belong to the same folio.
    joined: u64,
    /// Pages of one leaf that will be submitted and are still marked dirty.
    started: Started,
}

/// Pages that turn clean together, at the latest at the end of the step; WRITEBACK keeps threads from dirtying them anew.
#[derive(Debug, Default)]
struct Started {
    leaf: u32,
    pages: u64,
}

impl<'a> WritebackPass<'a> {
    pub(crate) fn new(cache: &'a ShardCache, shape: &'a MappingShape, state: &'a mut PassState) -> Self {
        Self {
            cache,
            shape,
            state,
            locked: LeafPages { leaf: 0, base: 0, pages: 0 },
            blocked: None,
            first_page: 0,
            frames: [FrameId(0); 64],
            joined: 0,
            started: Started::default(),
        }
    }

    /// The next folio to write (`folio_prepare_writeback`, WB-06).
    pub(crate) fn next(&mut self) -> Next<'a> {
        while self.locked.pages == 0 {
            if let Some((frame, local)) = self.blocked.take() {
                self.state.rest.start = local;
                return Next::Blocked(frame);
            }
            let find = Find::Tagged(self.state.tag());
            match self.cache.tree.next(self.shape.tree, find, self.state.rest.clone()) {
                Some(batch) => self.lock(batch),
                None => {
                    self.state.rest.start = self.state.rest.end;
                    return Next::End;
                }
            }
        }
        let slot = self.locked.pages.trailing_zeros();
        let pages = self.part_from(slot);
        self.locked.pages &= !slots(slot, pages);
        // Whatever becomes of it, a pass doesn't look at a page twice (WB-01).
        self.state.rest.start = self.locked.base + u64::from(slot + pages);
        Next::Folio(LockedPart {
            cache: self.cache,
            frame: self.frames[slot as usize],
            page: self.first_page + u64::from(slot),
            pages: u64::from(pages),
            leaf: self.locked.leaf,
        })
    }

    /// How many locked pages of one folio follow each other from `slot` on.
    fn part_from(&self, slot: u32) -> u32 {
        let locked = (self.locked.pages >> slot).trailing_ones();
        let joined = (self.joined >> slot).trailing_ones() + 1;
        locked.min(joined)
    }

    /// Locks the marked pages of a leaf, those that can be had; an integrity pass stops before the first that can't.
    fn lock(&mut self, batch: LeafPages) {
        self.find_frames(batch);
        let (cache, frames) = (&self.cache.shared, &self.frames);
        let lock = exclusion::lock_for_writeback(&cache.tags, batch.leaf, batch.pages, |slot| {
            let place = cache.place(frames[slot as usize]);
            let rest = (place.order.pages() - place.within).min(u64::from(64 - slot));
            (cache.folio(place.head), slots(slot, rest as u32))
        });
        let refused = lock.held | lock.in_flight;
        self.locked = LeafPages { pages: lock.locked, ..batch };
        self.state.rest.start = batch.base + 64;
        if self.state.mode == SyncMode::All && refused != 0 {
            let slot = refused.trailing_zeros();
            self.blocked = Some((self.frames[slot as usize], batch.base + u64::from(slot)));
            let beyond = self.locked.pages & !((1 << slot) - 1);
            self.locked.pages &= (1 << slot) - 1;
            self.unlock(beyond);
        }
    }

    /// Gives pages of the current leaf back, dirty as they are.
    fn unlock(&self, pages: u64) {
        if pages != 0 {
            self.cache.shared.tags.clear_owned(self.locked.leaf, pages, Tag::Writeback);
        }
    }

    /// Looks all folios of a leaf up before any is worked on: their headers come into the processor's cache
    /// together instead of one after the other.
    fn find_frames(&mut self, batch: LeafPages) {
        let first = self.shape.striping.page(self.cache.shard, batch.base);
        self.first_page = first;
        let key = |slot: u32| self.shape.key(first + u64::from(slot));
        let (index, headers) = (&self.cache.shared.index, &self.cache.shared.headers);
        let mut touched = 0;
        let mut pages = batch.pages;
        while pages != 0 {
            touched |= index.touch(headers, key(pages.trailing_zeros()));
            pages &= pages - 1;
        }
        std::hint::black_box(touched);
        self.joined = 0;
        let mut pages = batch.pages;
        while pages != 0 {
            let slot = pages.trailing_zeros();
            // A marked page has its folio: dirty ones are not evicted, and who removes one takes its marks off first.
            let frame = index.find_exact(headers, key(slot)).expect("a marked page is in the cache");
            self.frames[slot as usize] = frame;
            pages &= pages - 1;
            let place = self.cache.shared.place(frame);
            // The folio's other pages in this leaf lie beside it.
            let rest = (place.order.pages() - place.within).min(u64::from(64 - slot)) as u32;
            for at in 1..rest {
                self.frames[(slot + at) as usize] = FrameId(frame.0 + at);
            }
            self.joined |= slots(slot, rest - 1);
            pages &= !slots(slot, rest);
        }
    }

    /// The first `pages` pages of what was handed out will be submitted, and their frames be the device's; the rest is
    /// handed out again.
    pub(crate) fn start_writeback(&mut self, part: LockedPart<'a>, pages: u64) -> (u64, FrameId, u64) {
        debug_assert!((1..=part.pages).contains(&pages));
        if part.leaf != self.started.leaf {
            self.clean_started();
            self.started.leaf = part.leaf;
        }
        self.started.pages |= leaf_bits(part.page, pages);
        let rest = leaf_bits(part.page, part.pages) & !leaf_bits(part.page, pages);
        if rest != 0 {
            self.locked.pages |= rest;
            self.state.rest.start = self.locked.base + u64::from(rest.trailing_zeros());
        }
        let started = (part.page, part.frame, pages);
        std::mem::forget(part);
        started
    }

    /// Takes DIRTY off everything that will be submitted. Before anything ends its writeback.
    pub(crate) fn clean_started(&mut self) {
        if self.started.pages != 0 {
            self.cache.start_writeback(self.shape, self.started.leaf, self.started.pages);
            self.started.pages = 0;
        }
    }

    /// Takes back what was handed out last: it is the next to be handed out again.
    pub(crate) fn put_back(&mut self, part: LockedPart<'a>) {
        let bits = leaf_bits(part.page, part.pages);
        self.locked.pages |= bits;
        self.state.rest.start = self.locked.base + u64::from(bits.trailing_zeros());
        std::mem::forget(part);
    }
}

impl Drop for WritebackPass<'_> {
    fn drop(&mut self) {
        if self.locked.pages != 0 {
            self.state.rest.start = self.locked.base + u64::from(self.locked.pages.trailing_zeros());
            self.unlock(self.locked.pages);
        } else if let Some((_, local)) = self.blocked {
            self.state.rest.start = local;
        }
        self.clean_started();
    }
}

/// The bits of `count` slots from `slot` on.
fn slots(slot: u32, count: u32) -> u64 {
    if count == 0 { 0 } else { u64::MAX >> (64 - count) << slot }
}

/// A dirty folio that a pass holds locked, or the part of it that is dirty without a gap and lies in one leaf of the marks:
/// under WRITEBACK, so that nobody changes it, and dirty still.
#[derive(Debug)]
#[must_use = "what is locked and dropped stays dirty"]
pub(crate) struct LockedPart<'a> {
    cache: &'a ShardCache,
    pub frame: FrameId,
    pub page: u64,
    pub pages: u64,
    leaf: u32,
}

impl Drop for LockedPart<'_> {
    fn drop(&mut self) {
        // Nobody parks between lock and unlock: both happen within one step of the shard.
        let bits = leaf_bits(self.page, self.pages);
        self.cache.shared.tags.clear_owned(self.leaf, bits, Tag::Writeback);
    }
}
