//! The page cache of one shard.
//!
//! [`SharedCache`] is what any thread may touch: frames, folio headers, the look-up index, the mark words. A hit
//! needs nothing else. [`ShardCache`] adds what the shard alone changes: which folio is where, the tag trees'
//! structure, free frames, the eviction hand.
//!
//! Read next: [`folio`] for the state word and its rules, [`tags`] for the marks.

pub(crate) mod errseq;
pub(crate) mod folio;
pub(crate) mod frames;
pub(crate) mod index;
pub(crate) mod shape;
pub(crate) mod stripe;
pub(crate) mod table;
pub(crate) mod tags;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use folio::{FolioHeader, FolioKey, FrameId};
use frames::FrameMemory;
use index::FolioIndex;
use shape::MappingShape;
use table::Table;
use tags::{Tag, TagNodes, TagTree};

/// Mappings that can be open at once.
pub(crate) const MAPPINGS_MAX: usize = 256;

/// How many pages of one mapping in one shard are DIRTY (low half) and under WRITEBACK (high half): one word, so
/// that a page on its way from one to the other is never missed.
#[derive(Debug, Default)]
pub(crate) struct MarkedPages(AtomicU64);

impl MarkedPages {
    const DIRTY: u64 = 1;
    const WRITEBACK: u64 = 1 << 32;

    /// Whether a sync has anything to wait for here.
    pub(crate) fn any(&self) -> bool {
        self.0.load(Ordering::SeqCst) != 0
    }

    /// Pages that are dirty.
    pub(crate) fn dirty(&self) -> u32 {
        self.0.load(Ordering::Relaxed) as u32
    }

    /// One more is dirty; by the thread that dirties, before its pin is released. Returns how many were.
    fn dirtied(&self) -> u32 {
        self.0.fetch_add(Self::DIRTY, Ordering::SeqCst) as u32
    }

    /// `count` dirty ones are clean, or gone.
    fn cleaned(&self, count: u32) {
        self.0.fetch_sub(Self::DIRTY * u64::from(count), Ordering::SeqCst);
    }

    /// `count` dirty ones have gone under writeback.
    fn writeback_started(&self, count: u32) {
        self.0.fetch_add((Self::WRITEBACK - Self::DIRTY) * u64::from(count), Ordering::SeqCst);
    }

    /// `count` have ended writeback; those whose write failed were counted dirty before.
    fn writeback_ended(&self, count: usize) {
        self.0.fetch_sub(Self::WRITEBACK * count as u64, Ordering::SeqCst);
    }
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
}

impl SharedCache {
    #[inline]
    pub(crate) fn folio(&self, frame: FrameId) -> &FolioHeader {
        &self.headers[frame.0 as usize]
    }

    /// Brings the headers of `frames` into the processor's cache: independent loads, which overlap where the work on
    /// one header after the other would wait for each.
    pub(crate) fn touch(&self, frames: &[FrameId]) {
        let pins = frames.iter().map(|&frame| self.folio(frame).state().pins());
        std::hint::black_box(pins.fold(0, |any, pins| any | pins));
    }

    /// Marks a folio's page DIRTY, for `release_exclusive_dirty`: the tag, then the count. Returns the count of
    /// dirty pages before.
    pub(crate) fn mark_dirty(&self, frame: FrameId, shape: &MappingShape) -> u32 {
        let folio = self.folio(frame);
        let local = shape.striping.local(folio.key().page());
        let before = self.marked[shape.slot as usize].dirtied();
        self.tags.set_dirty(folio.tag_leaf(), (local % 64) as u32);
        before
    }
}

/// A shard's cache: the shared part and the structure that the shard owns.
#[derive(Debug)]
pub(crate) struct ShardCache {
    pub shared: Arc<SharedCache>,
    pub tree: TagTree,
    pub shard: usize,
    /// Frozen frames without a page.
    free: Vec<u32>,
    /// Where the eviction clock stands.
    hand: u32,
    /// Folios evicted since open.
    pub evicted: u64,
}

impl ShardCache {
    /// A cache on `frames`, for at most `local_pages` pages of the device that this shard may ever hold.
    ///
    /// # Errors
    /// The system's, when memory can't be had.
    pub(crate) fn new(shard: usize, frames: FrameMemory, local_pages: u64) -> std::io::Result<Self> {
        let count = frames.count();
        let nodes = TagTree::nodes_max(u64::from(count), local_pages, MAPPINGS_MAX as u64);
        let tree = TagTree::new(nodes);
        let shared = SharedCache {
            headers: Table::new(count as usize, FolioHeader::new)?,
            index: FolioIndex::new(count as usize)?,
            tags: tree.nodes().clone(),
            marked: (0..MAPPINGS_MAX).map(|_| MarkedPages::default()).collect(),
            frames,
        };
        let free = (0..count).rev().collect();
        Ok(Self { shared: Arc::new(shared), tree, shard, free, hand: 0, evicted: 0 })
    }

    /// Bytes beside the frames that don't depend on what is cached; tag nodes in use come on top.
    pub(crate) fn fixed_metadata_bytes(&self) -> usize {
        size_of_val(&*self.shared.headers)
            + self.shared.index.size_bytes()
            + self.tree.table_bytes()
            + size_of_val(&*self.shared.marked)
            + self.free.capacity() * size_of::<u32>()
    }

    pub(crate) fn free_frames(&self) -> usize {
        self.free.len()
    }

    /// The folio that holds `page`, exactly.
    pub(crate) fn find(&self, shape: &MappingShape, page: u64) -> Option<FrameId> {
        self.shared.index.find_exact(&self.shared.headers, shape.key(page))
    }

    /// Gives a free frame to `page` and links it everywhere. It stays frozen: the caller publishes it.
    pub(crate) fn install(&mut self, shape: &MappingShape, page: u64) -> Option<FrameId> {
        debug_assert!(self.find(shape, page).is_none());
        let frame = FrameId(self.free.pop()?);
        let leaf = self.tree.insert(shape.tree, shape.striping.local(page));
        self.shared.folio(frame).assign(shape.key(page), leaf);
        self.shared.index.insert(&self.shared.headers, frame);
        Some(frame)
    }

    /// Unlinks a frozen folio without marks and makes its frame free.
    pub(crate) fn release(&mut self, shape: &MappingShape, frame: FrameId) {
        let folio = self.shared.folio(frame);
        self.tree.remove(shape.tree, shape.striping.local(folio.key().page()));
        self.shared.index.remove(&self.shared.headers, frame);
        folio.scrub_frozen();
        self.free.push(frame.0);
    }

    /// Turns the clock until `wanted` frames are free or `steps_max` folios were looked at. Clean, unpinned
    /// folios that weren't used since the hand last passed are evicted. `shape_of` finds a folio's mapping.
    pub(crate) fn evict<'s>(
        &mut self,
        wanted: usize,
        steps_max: u32,
        shape_of: impl Fn(FolioKey) -> Option<&'s MappingShape>,
    ) {
        let frames = self.shared.frames.count();
        for _ in 0..steps_max {
            if self.free.len() >= wanted {
                return;
            }
            let frame = FrameId(self.hand);
            self.hand = if self.hand + 1 == frames { 0 } else { self.hand + 1 };
            let folio = self.shared.folio(frame);
            let key = folio.key();
            if folio.freeze_if_cold() {
                let shape = shape_of(key).expect("a cached folio's mapping is open");
                self.release(shape, frame);
                self.evicted += 1;
            }
        }
    }

    /// Takes DIRTY, and TOWRITE with it, off the page of a frozen folio.
    pub(crate) fn untag_dirty(&self, shape: &MappingShape, frame: FrameId) {
        let folio = self.shared.folio(frame);
        let page = 1 << (shape.striping.local(folio.key().page()) % 64);
        self.shared.tags.clear_owned(folio.tag_leaf(), page, Tag::ToWrite);
        self.shared.tags.clear_dirty(folio.tag_leaf(), page);
        self.shared.marked[shape.slot as usize].cleaned(1);
    }

    /// Moves the tags of pages of one leaf whose folios have gone under writeback in this step.
    pub(crate) fn tag_writeback(&self, shape: &MappingShape, leaf: u32, pages: u64) {
        self.shared.tags.set_owned(leaf, pages, Tag::Writeback);
        self.shared.tags.clear_owned(leaf, pages, Tag::ToWrite);
        self.shared.tags.clear_dirty(leaf, pages);
        self.shared.marked[shape.slot as usize].writeback_started(pages.count_ones());
    }

    /// The write of folios of consecutive pages ended; with `redirty` it failed. True when requests are parked on
    /// any of them.
    pub(crate) fn end_writeback(
        &self,
        shape: &MappingShape,
        first_page: u64,
        frames: &[FrameId],
        redirty: bool,
    ) -> bool {
        let mut parked = false;
        let mut local = shape.striping.local(first_page);
        let mut rest = frames;
        while !rest.is_empty() {
            // As many as share a leaf: their tags change together, and their headers, which the device's work has
            // pushed out of the processor's cache, are fetched together.
            let first_slot = local % 64;
            let (chunk, later) = rest.split_at(rest.len().min((64 - first_slot) as usize));
            self.shared.touch(chunk);
            if redirty {
                for &frame in chunk {
                    self.shared.mark_dirty(frame, shape);
                }
            }
            let pages = u64::MAX >> (64 - chunk.len()) << first_slot;
            self.shared.tags.clear_owned(self.shared.folio(chunk[0]).tag_leaf(), pages, Tag::Writeback);
            for &frame in chunk {
                let folio = self.shared.folio(frame);
                parked |= if redirty { folio.end_writeback_redirty() } else { folio.end_writeback() };
            }
            local += chunk.len() as u64;
            rest = later;
        }
        self.shared.marked[shape.slot as usize].writeback_ended(frames.len());
        parked
    }

    /// Checks every folio against its tags (WB-04): for tests. Only meaningful while no thread holds a folio
    /// exclusively.
    ///
    /// # Panics
    /// When marks and state words disagree.
    #[cfg(any(test, debug_assertions))]
    pub(crate) fn assert_consistent<'s>(&self, shape_of: impl Fn(FolioKey) -> Option<&'s MappingShape>) {
        let mut used = 0;
        for (frame, folio) in self.shared.headers.iter().enumerate() {
            let state = folio.state();
            if state.frozen() {
                continue;
            }
            used += 1;
            let key = folio.key();
            let shape = shape_of(key).expect("a cached folio's mapping is open");
            assert_eq!(self.find(shape, key.page()), Some(FrameId(frame as u32)), "{key:?} is indexed");
            let (leaf, slot) = (folio.tag_leaf(), (shape.striping.local(key.page()) % 64) as u32);
            let tagged = |tag| self.shared.tags.is_set(leaf, slot, tag);
            assert_eq!(tagged(Tag::Dirty), state.dirty(), "DIRTY of {key:?}: {state:?}");
            assert_eq!(tagged(Tag::Writeback), state.writeback(), "WRITEBACK of {key:?}: {state:?}");
            assert!(!tagged(Tag::ToWrite) || state.dirty(), "TOWRITE without DIRTY on {key:?}");
        }
        assert_eq!(used + self.free.len(), self.shared.headers.len(), "every frame is used or free");
    }
}
