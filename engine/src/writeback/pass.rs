//! A pass over the dirty folios of one mapping in one shard (`writeback_iter`).
//!
//! [`PassState`] lasts over shard steps; [`WritebackPass`] is the iterator of one step. It hands folios out
//! **locked, in strictly ascending order, never twice, and never wraps** (WB-01). A [`LockedFolio`] that is
//! dropped is unlocked and stays dirty, so no way out of a pass leaves a locked folio behind (WB-08).

use std::ops::Range;

use crate::cache::ShardCache;
use crate::cache::folio::{FrameId, LockRefusal};
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
#[derive(Clone, Debug)]
pub(crate) struct PassState {
    pub mode: SyncMode,
    /// Shard-local pages still to look at; the start is the cursor.
    pub rest: Range<u64>,
}

impl PassState {
    /// An integrity pass over `range`: first tags what is dirty now (WB-03), so that it ends although others
    /// keep dirtying pages of the range.
    pub(crate) fn integrity(cache: &ShardCache, shape: &MappingShape, range: Range<u64>) -> Self {
        cache.tree.tag_for_writeback(shape.tree, range.clone());
        Self { mode: SyncMode::All, rest: range }
    }

    /// A background pass over `range`.
    pub(crate) fn background(range: Range<u64>) -> Self {
        Self { mode: SyncMode::None, rest: range }
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
    Folio(LockedFolio<'a>),
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
    /// Tagged pages of the leaf that was looked up last: folios are found by tag 64 at a time (WB-07).
    batch: LeafPages,
    /// The file page of that leaf's first; a leaf lies within a stripe, so its pages are consecutive in the file, too.
    first_page: u64,
    /// By slot in that leaf: the frames of the pages in `batch`.
    frames: [Option<FrameId>; 64],
    /// Pages of one leaf that went under writeback and whose tags haven't moved yet.
    started: Started,
}

/// Tags that are to move together. Until they do, within the same step, the folios' states are ahead of their tags;
/// nobody but the shard looks at tags, and WRITEBACK keeps threads from setting DIRTY anew.
#[derive(Debug, Default)]
struct Started {
    leaf: u32,
    pages: u64,
}

impl<'a> WritebackPass<'a> {
    pub(crate) fn new(cache: &'a ShardCache, shape: &'a MappingShape, state: &'a mut PassState) -> Self {
        let batch = LeafPages { base: 0, pages: 0 };
        Self { cache, shape, state, batch, first_page: 0, frames: [None; 64], started: Started::default() }
    }

    /// The next folio to write (`folio_prepare_writeback`, WB-06).
    pub(crate) fn next(&mut self) -> Next<'a> {
        loop {
            if self.batch.pages == 0 {
                let find = Find::Tagged(self.state.tag());
                match self.cache.tree.next(self.shape.tree, find, self.state.rest.clone()) {
                    Some(batch) => self.take_batch(batch),
                    None => {
                        self.state.rest.start = self.state.rest.end;
                        return Next::End;
                    }
                }
            }
            let slot = self.batch.pages.trailing_zeros();
            let local = self.batch.base + u64::from(slot);
            self.batch.pages &= self.batch.pages - 1;
            // Whatever becomes of it, a pass doesn't look at a page twice (WB-01).
            self.state.rest.start = local + 1;
            let Some(frame) = self.frames[slot as usize] else { continue };
            let page = self.first_page + u64::from(slot);
            match self.cache.shared.folio(frame).lock_for_writeback(self.shape.key(page)) {
                Ok(()) => {
                    return Next::Folio(LockedFolio { cache: self.cache, frame, page, slot });
                }
                Err(LockRefusal::Exclusive | LockRefusal::InFlight) if self.state.mode == SyncMode::All => {
                    self.state.rest.start = local;
                    self.batch.pages = 0;
                    return Next::Blocked(frame);
                }
                Err(_) => {}
            }
        }
    }

    /// Looks all folios of a batch up before any is worked on: their headers come into the processor's cache
    /// together instead of one after the other.
    fn take_batch(&mut self, batch: LeafPages) {
        self.batch = batch;
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
        let mut pages = batch.pages;
        while pages != 0 {
            let slot = pages.trailing_zeros();
            self.frames[slot as usize] = index.find_exact(headers, key(slot));
            pages &= pages - 1;
        }
    }

    /// A folio that was handed out goes under writeback; its frame is the device's when the command is submitted.
    pub(crate) fn start_writeback(&mut self, locked: LockedFolio<'a>) -> (u64, FrameId) {
        let (page, frame, slot) = (locked.page, locked.frame, locked.slot);
        std::mem::forget(locked);
        let folio = self.cache.shared.folio(frame);
        if folio.tag_leaf() != self.started.leaf {
            self.move_tags();
            self.started.leaf = folio.tag_leaf();
        }
        self.started.pages |= 1 << slot;
        (page, frame)
    }

    /// Moves the tags of all folios that went under writeback. Before anything ends their writeback.
    pub(crate) fn move_tags(&mut self) {
        if self.started.pages != 0 {
            self.cache.tag_writeback(self.shape, self.started.leaf, self.started.pages);
            self.started.pages = 0;
        }
    }

    /// Puts the cursor back to a folio that was handed out and given back.
    pub(crate) fn put_back(&mut self, folio: LockedFolio<'a>) {
        self.state.rest.start = self.shape.striping.local(folio.page);
        self.batch.pages = 0;
        drop(folio);
    }
}

/// A dirty folio that a pass holds locked.
#[derive(Debug)]
#[must_use = "a locked folio that is dropped stays dirty"]
pub(crate) struct LockedFolio<'a> {
    cache: &'a ShardCache,
    pub frame: FrameId,
    pub page: u64,
    /// The page's place in its leaf.
    slot: u32,
}

impl Drop for WritebackPass<'_> {
    fn drop(&mut self) {
        self.move_tags();
    }
}

impl Drop for LockedFolio<'_> {
    fn drop(&mut self) {
        // Nobody parks between lock and unlock: both happen within one step of the shard.
        self.cache.shared.folio(self.frame).unlock_dirty();
    }
}
