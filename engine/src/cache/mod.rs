//! The page cache of one shard.
//!
//! [`SharedCache`] is what any thread may touch: frames, folio headers, the look-up index, the mark words. A hit
//! needs nothing else. [`ShardCache`] adds what the shard alone changes: which folio is where, the tag trees'
//! structure, free frames, the eviction hand.
//!
//! Read next: [`folio`] for the state word and its rules, [`tags`] for the marks.

pub(crate) mod errseq;
pub(crate) mod exclusion;
pub(crate) mod folio;
pub(crate) mod frames;
pub(crate) mod index;
pub(crate) mod shape;
pub(crate) mod stripe;
pub(crate) mod table;
pub(crate) mod tags;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use exclusion::leaf_bit;
use folio::{FolioHeader, FolioKey, FrameId, Released};
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

    /// Pages under writeback.
    pub(crate) fn writeback(&self) -> u32 {
        (self.0.load(Ordering::Relaxed) >> 32) as u32
    }

    /// `count` more are dirty; by the thread that dirties, before its pin is released. Returns how many were.
    fn dirtied(&self, count: u32) -> u32 {
        self.0.fetch_add(Self::DIRTY * u64::from(count), Ordering::SeqCst) as u32
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

/// Whether a write that ended has reached the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// It has.
    Yes,
    /// It has not, or nobody knows: the pages are dirty again.
    No,
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

    /// Whether the page of a folio that can't go away carries `tag`.
    pub(crate) fn is_marked(&self, frame: FrameId, tag: Tag) -> bool {
        let folio = self.folio(frame);
        self.tags.marked(folio.tag_leaf(), tag) & leaf_bit(folio.key().page()) != 0
    }

    /// Whether the device lacks bytes of this folio, or reads it.
    pub(crate) fn is_needed(&self, frame: FrameId) -> bool {
        self.is_marked(frame, Tag::Dirty) || self.is_marked(frame, Tag::Writeback)
    }

    /// Takes a folio exclusively for any thread, if it can be had at once.
    #[inline]
    pub(crate) fn try_exclusive(&self, frame: FrameId, key: FolioKey) -> Result<(), Released> {
        exclusion::try_exclusive(self.folio(frame), &self.tags, key)
    }

    /// Marks an exclusively held folio's page DIRTY if it isn't. Returns how many pages of the mapping were dirty in this
    /// shard before, if it wasn't.
    #[inline]
    pub(crate) fn mark_dirty(&self, frame: FrameId, mapping: u16) -> Option<u32> {
        let folio = self.folio(frame);
        let (leaf, bit) = (folio.tag_leaf(), leaf_bit(folio.key().page()));
        // The shard takes the mark off only when it has found nobody holding the folio.
        if self.tags.marked(leaf, Tag::Dirty) & bit != 0 {
            return None;
        }
        let clean = self.tags.set_dirty(leaf, bit);
        // Before possession is given back: who syncs after a write finds it counted.
        Some(self.marked[mapping as usize].dirtied(clean.count_ones()))
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
            if !folio.turns_cold() || self.shared.is_needed(frame) || !folio.freeze_unused() {
                continue;
            }
            // Frozen, it can't be dirtied any more; it may have been between the look at its marks and now (WB-27).
            if self.shared.is_needed(frame) {
                folio.thaw();
                continue;
            }
            let shape = shape_of(folio.key()).expect("a cached folio's mapping is open");
            self.release(shape, frame);
            self.evicted += 1;
        }
    }

    /// Takes DIRTY, and TOWRITE with it, off the page of a frozen folio.
    pub(crate) fn untag_dirty(&self, shape: &MappingShape, frame: FrameId) {
        let folio = self.shared.folio(frame);
        let page = leaf_bit(folio.key().page());
        self.shared.tags.clear_owned(folio.tag_leaf(), page, Tag::ToWrite);
        self.shared.tags.clear_dirty(folio.tag_leaf(), page);
        self.shared.marked[shape.slot as usize].cleaned(1);
    }

    /// Pages of one leaf that are locked for writeback will be submitted: they are clean from here on.
    pub(crate) fn start_writeback(&self, shape: &MappingShape, leaf: u32, pages: u64) {
        self.shared.tags.clear_owned(leaf, pages, Tag::ToWrite);
        self.shared.tags.clear_dirty(leaf, pages);
        self.shared.marked[shape.slot as usize].writeback_started(pages.count_ones());
    }

    /// The write of folios of consecutive pages ended; `written` tells whether the device has them now.
    pub(crate) fn end_writeback(
        &self,
        shape: &MappingShape,
        first_page: u64,
        frames: &[FrameId],
        written: Written,
    ) {
        let mut page = first_page;
        let mut rest = frames;
        while !rest.is_empty() {
            // As many as share a leaf: their marks change together.
            let first_slot = page % exclusion::LEAF_PAGES;
            let (chunk, later) = rest.split_at(rest.len().min((exclusion::LEAF_PAGES - first_slot) as usize));
            let pages = u64::MAX >> (64 - chunk.len()) << first_slot;
            let leaf = self.shared.folio(chunk[0]).tag_leaf();
            if written == Written::No {
                // Dirty again before WRITEBACK goes: at no moment does a sync find neither.
                let clean = self.shared.tags.set_dirty(leaf, pages);
                self.shared.marked[shape.slot as usize].dirtied(clean.count_ones());
            }
            self.shared.tags.clear_owned(leaf, pages, Tag::Writeback);
            page += chunk.len() as u64;
            rest = later;
        }
        self.shared.marked[shape.slot as usize].writeback_ended(frames.len());
    }

    /// Checks every folio against its tags (WB-04): for tests. Only meaningful while no thread holds a folio
    /// exclusively.
    ///
    /// # Panics
    /// When marks and state words disagree.
    #[cfg(any(test, debug_assertions))]
    pub(crate) fn assert_consistent<'s>(&self, shape_of: impl Fn(FolioKey) -> Option<&'s MappingShape>) {
        let mut used = 0;
        let mut counts = vec![(0, 0); MAPPINGS_MAX];
        for (frame, folio) in self.shared.headers.iter().enumerate() {
            let state = folio.state();
            if state.frozen() {
                continue;
            }
            used += 1;
            let key = folio.key();
            let shape = shape_of(key).expect("a cached folio's mapping is open");
            assert_eq!(self.find(shape, key.page()), Some(FrameId(frame as u32)), "{key:?} is indexed");
            let (leaf, local) = (folio.tag_leaf(), shape.striping.local(key.page()));
            assert_eq!(self.tree.leaf_of(shape.tree, local), Some(leaf), "{key:?} knows its leaf");
            let tagged = |tag| self.shared.tags.marked(leaf, tag) & leaf_bit(key.page()) != 0;
            assert!(!tagged(Tag::ToWrite) || tagged(Tag::Dirty), "TOWRITE without DIRTY on {key:?}");
            let counts = &mut counts[key.mapping() as usize];
            counts.0 += u32::from(tagged(Tag::Dirty));
            counts.1 += u32::from(tagged(Tag::Writeback));
        }
        for (slot, (dirty, writeback)) in counts.into_iter().enumerate() {
            let marked = &self.shared.marked[slot];
            assert_eq!((marked.dirty(), marked.writeback()), (dirty, writeback), "counts of mapping {slot}");
        }
        assert_eq!(used + self.free.len(), self.shared.headers.len(), "every frame is used or free");
    }
}
