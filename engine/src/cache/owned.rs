//! The part of a shard's cache that the shard alone changes: which folio is where, how large it is, and which frames
//! are free.
//!
//! The life of a folio here: [`install`](ShardCache::install) gives frames to pages, [`split`](ShardCache::split) makes
//! smaller folios of one, [`release`](ShardCache::release) takes pages out. The latter two need a folio that is frozen, so
//! that nobody holds it; what of it is dirty or under writeback doesn't matter to a split, since marks belong to pages.

use std::sync::Arc;

use super::balance::DirtyBalance;
use super::buddy::FreeFrames;
#[cfg(any(test, debug_assertions))]
use super::exclusion::leaf_bit;
use super::exclusion::{LEAF_PAGES, leaf_bits};
#[cfg(any(test, debug_assertions))]
use super::folio::FolioKey;
use super::folio::{FolioHeader, FolioOrder, FrameId};
use super::frames::FrameMemory;
use super::index::FolioIndex;
use super::lsn::{GatedMappings, PageLsns};
use super::reclaim::{Rank, Reclaim};
use super::shape::MappingShape;
#[cfg(any(test, debug_assertions))]
use super::shares::SHARES_MAX;
use super::shares::ShareAccounts;
use super::table::Table;
use super::tags::{Tag, TagTree};
use super::workingset::Shadows;
use super::{MAPPINGS_MAX, MarkedPages, SharedCache, Written};
use crate::writeback::throttle::DirtyLimits;

/// One of so many frames is left in blocks of a leaf's size or more, for large folios, when single pages are spread over
/// such blocks.
const WHOLE_BLOCKS_SPARED: u32 = 8;

/// The order of folios that occupy a leaf.
const LEAF_ORDER: FolioOrder = FolioOrder(LEAF_PAGES.trailing_zeros() as u8);

/// Whether what is evicted leaves a shadow entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Remembered {
    Yes,
    /// It was said not to be wanted again: its coming back tells nothing.
    No,
}

/// A shard's cache: the shared part and the structure that the shard owns.
#[derive(Debug)]
pub(crate) struct ShardCache {
    pub shared: Arc<SharedCache>,
    pub tree: TagTree,
    pub shard: usize,
    free: FreeFrames,
    /// Blocks of an order that aren't broken up for the sake of a good place: the reserve of logs.
    reserve: (FolioOrder, usize),
    /// In which order folios are evicted.
    pub(super) reclaim: Reclaim,
    /// What was evicted lately.
    pub(super) shadows: Shadows,
    /// Pages evicted since open.
    pub evicted: u64,
    /// Folios split since open.
    pub splits: u64,
    /// Pages that were given frames since open, and pages whose frames were given back.
    pub installed: u64,
    pub released: u64,
}

impl ShardCache {
    /// A cache on `frames`, for at most `local_pages` pages of the device that this shard may ever hold, and with so much
    /// dirty memory.
    ///
    /// # Errors
    /// The system's, when memory can't be had.
    pub(crate) fn new(
        shard: usize,
        frames: FrameMemory,
        local_pages: u64,
        dirty: &DirtyLimits,
    ) -> std::io::Result<Self> {
        let count = frames.count();
        let nodes = TagTree::nodes_max(u64::from(count), local_pages, MAPPINGS_MAX as u64);
        let tree = TagTree::new(nodes);
        let shared = SharedCache {
            headers: Table::new(count as usize, FolioHeader::new)?,
            index: FolioIndex::new(count as usize)?,
            tags: tree.nodes().clone(),
            marked: (0..MAPPINGS_MAX).map(|_| MarkedPages::default()).collect(),
            balance: DirtyBalance::new(dirty),
            lsns: PageLsns::new(count as usize),
            gated: GatedMappings::default(),
            shares: ShareAccounts::new(u64::from(count)),
            frames,
        };
        let free = FreeFrames::new(&shared.headers);
        let (shared, shadows, reclaim) = (Arc::new(shared), Shadows::new(count), Reclaim::new(count));
        let reserve = (FolioOrder(0), 0);
        Ok(Self {
            shared,
            tree,
            shard,
            free,
            reserve,
            reclaim,
            shadows,
            evicted: 0,
            splits: 0,
            installed: 0,
            released: 0,
        })
    }

    /// Bytes beside the frames that don't depend on what is cached; tag nodes in use come on top.
    pub(crate) fn fixed_metadata_bytes(&self) -> usize {
        size_of_val(&*self.shared.headers)
            + self.shared.index.size_bytes()
            + self.tree.table_bytes()
            + self.shadows.bytes()
            + size_of_val(&*self.shared.marked)
    }

    /// Frames that are free and may be used.
    pub(crate) fn free_frames(&self) -> usize {
        self.free.count().saturating_sub(self.shared.shares.withheld() as usize)
    }

    /// Frames that hold pages, filled or not.
    pub(crate) fn used_frames(&self) -> usize {
        self.shared.headers.len() - self.free.count()
    }

    /// Whether `folios` folios of `order` can be installed now.
    pub(crate) fn has_room(&self, order: FolioOrder, folios: usize) -> bool {
        self.free.has(order, folios) && self.free_frames() >= folios * order.pages() as usize
    }

    /// Whether these folios can be installed so that so many blocks of another order are left.
    pub(crate) fn spares(&self, folios: (FolioOrder, usize), kept: (FolioOrder, usize)) -> bool {
        self.free.spares(folios, kept)
    }

    /// From now on so many blocks of an order are kept whole where a folio could as well lie elsewhere.
    pub(crate) fn keep_whole(&mut self, reserve: (FolioOrder, usize)) {
        self.reserve = reserve;
    }

    /// The frame that holds `page`, exactly: filled or not.
    pub(crate) fn find(&self, shape: &MappingShape, page: u64) -> Option<FrameId> {
        self.shared.index.find_exact(&self.shared.headers, shape.key(page))
    }

    /// Loads what bringing in `page` looks at, without looking at it. Many of these overlap; what is brought in one after the
    /// other waits for each.
    pub(crate) fn touch(&self, shape: &MappingShape, page: u64) -> u64 {
        let leaf = self.tree.leaf_of(shape.tree, shape.striping.local(page));
        let present = leaf.map_or(0, |leaf| self.tree.present_in(leaf));
        present | self.shadows.touch(shape.slot, page >> shape.order.0)
    }

    /// Whether no page of `first..first + pages`, which lie in one folio's place, is in the cache.
    pub(crate) fn is_vacant(&self, shape: &MappingShape, first: u64, pages: u64) -> bool {
        let local = shape.striping.local(first);
        self.tree.next(shape.tree, super::tags::Find::Present, local..local + pages).is_none()
    }

    /// Gives free frames to the folio of `order` that begins at `first`, and links it everywhere; eviction has it at `rank`. It
    /// stays frozen: the caller publishes it. `None` without a block of frames that large.
    pub(crate) fn install(
        &mut self,
        shape: &MappingShape,
        first: u64,
        (order, rank): (FolioOrder, Rank),
    ) -> Option<FrameId> {
        debug_assert!(first.is_multiple_of(order.pages()) && self.is_vacant(shape, first, order.pages()));
        if !self.free.has(order, 1) {
            return None;
        }
        let head = if order < LEAF_ORDER {
            let leaf =
                self.tree.insert(shape.tree, shape.striping.local(first), leaf_bits(first, order.pages()));
            let head = self.take_frames_in_leaf(shape, first, (leaf, order));
            self.assign(shape, first..first + order.pages(), (leaf, order, head));
            head
        } else {
            let head = self.free.take(&self.shared.headers, order)?;
            for page in (first..first + order.pages()).step_by(LEAF_PAGES as usize) {
                let leaf = self.tree.insert(shape.tree, shape.striping.local(page), u64::MAX);
                let frame = FrameId(head.0 + (page - first) as u32);
                self.assign(shape, page..page + LEAF_PAGES, (leaf, order, frame));
            }
            head
        };
        self.shared.shares.installed(shape, order.pages());
        self.installed += order.pages();
        self.reclaim.enter(&self.shared.headers, head, rank);
        Some(head)
    }

    /// Says in the headers of frames from `frame` on which pages of a leaf they hold, and makes them found.
    fn assign(
        &self,
        shape: &MappingShape,
        pages: std::ops::Range<u64>,
        (leaf, order, frame): (u32, FolioOrder, FrameId),
    ) {
        for (at, page) in (frame.0..).zip(pages) {
            self.shared.folio(FrameId(at)).assign(shape.key(page), leaf, order);
            self.shared.index.insert(&self.shared.headers, FrameId(at));
        }
    }

    /// Takes free frames, of which there are some, for a folio smaller than a leaf that stands in its leaf already: those
    /// that lie to its neighbours' frames as the pages lie to each other where it can. In whatever order pages came into the cache,
    /// their headers are met one behind the other then, and what a command carries is one piece of memory.
    ///
    /// The first page of a leaf goes to its place in a block of frames as large as the leaf, as long as there are plenty.
    /// Nothing is kept for its neighbours: when no such block is left, others take the frames between. Nor is the reserve
    /// broken up for a better place: whoever counted on fragments gets those.
    fn take_frames_in_leaf(
        &mut self,
        shape: &MappingShape,
        first: u64,
        (leaf, order): (u32, FolioOrder),
    ) -> FrameId {
        let headers = &self.shared.headers;
        let slot = (first % LEAF_PAGES) as u32;
        let neighbours = self.tree.present_in(leaf) & !leaf_bits(first, order.pages());
        let wanted = match nearest(neighbours, slot) {
            Some(neighbour) => {
                let page = first - u64::from(slot) + u64::from(neighbour);
                let frame = self.find(shape, page).expect("a page of the tree is in the cache");
                (frame.0 + slot).checked_sub(neighbour)
            }
            None => {
                let spared = headers.len() as u32 / WHOLE_BLOCKS_SPARED;
                self.free.untouched(LEAF_ORDER, spared).map(|block| block + slot)
            }
        };
        let reserve = self.reserve;
        match wanted.filter(|&at| self.free.take_at(headers, (at, order), reserve)) {
            Some(wanted) => FrameId(wanted),
            None => self.free.take(headers, order).expect("some are free"),
        }
    }

    /// Unlinks a frozen folio without marks and makes its frames free.
    pub(crate) fn release(&mut self, shape: &MappingShape, head: FrameId) {
        let order = self.shared.folio(head).order();
        let first = self.shared.folio(head).key().page();
        self.reclaim.leave(self.shared.folio(head));
        // A leaf's at once: a folio lies in one, or fills some.
        for page in (first..first + order.pages()).step_by(LEAF_PAGES as usize) {
            let bits = leaf_bits(page, order.pages());
            self.tree.remove(shape.tree, shape.striping.local(page), bits);
        }
        for frame in head.0..head.0 + order.pages() as u32 {
            self.shared.index.remove(&self.shared.headers, FrameId(frame));
            self.shared.lsns.forget(shape.slot, FrameId(frame));
            self.shared.folio(FrameId(frame)).scrub_frozen();
        }
        self.free.give(&self.shared.headers, head, order);
        self.shared.shares.released(shape, order.pages());
        self.released += order.pages();
    }

    /// Makes a frozen folio into smaller ones: those that `pieces` names by their first page within it, in ascending
    /// order and without gaps. Pieces of which nothing is filled are released; the others are open afterwards.
    pub(crate) fn split(
        &mut self,
        shape: &MappingShape,
        head: FrameId,
        pieces: impl Iterator<Item = (u64, FolioOrder)>,
    ) {
        let shared = self.shared.clone();
        let (whole, rank) = (shared.folio(head).state(), shared.folio(head).rank());
        self.reclaim.leave(shared.folio(head));
        self.splits += 1;
        for (within, order) in pieces {
            let piece = FrameId(head.0 + within as u32);
            for frame in piece.0..piece.0 + order.pages() as u32 {
                self.shared.folio(FrameId(frame)).set_order(order);
            }
            let filled = whole.filled().saturating_sub(within).min(order.pages());
            let folio = shared.folio(piece);
            folio.become_head(filled, whole.referenced());
            if piece == head && folio.is_queued() {
                self.reclaim.stay(folio, rank);
            } else {
                self.reclaim.enter(&shared.headers, piece, rank);
            }
            if filled > 0 {
                folio.thaw();
            } else {
                self.release(shape, piece);
            }
        }
    }

    /// Splits a frozen folio so that `page` is in one of `order`, and the rest in folios as large as can be.
    pub(crate) fn isolate(&mut self, shape: &MappingShape, head: FrameId, page: u64, order: FolioOrder) {
        let folio = self.shared.folio(head);
        let within = page - folio.key().page();
        self.split(shape, head, pieces_around(folio.order(), within, order));
    }

    /// Splits a frozen folio that was filled in part: what is filled stays, the rest is free.
    pub(crate) fn trim(&mut self, shape: &MappingShape, head: FrameId) {
        let folio = self.shared.folio(head);
        let (order, filled) = (folio.order(), folio.state().filled());
        debug_assert!(filled < order.pages());
        self.split(shape, head, pieces_around(order, filled, shape.order));
    }

    /// What a folio of `pages` pages from `first` on has proven that is brought in for somebody who wants those: half of
    /// them were evicted lately, so they compete with what the cache holds (`workingset_refault`). And how many were.
    pub(crate) fn refault(&mut self, shape: &MappingShape, first: u64, pages: u64) -> (Rank, u64) {
        let blocks = first >> shape.order.0..(first + pages) >> shape.order.0;
        let wanted = blocks.end - blocks.start;
        let refaults = self.shadows.refaults(shape.slot, blocks);
        let rank = if refaults > 0 && 2 * refaults >= wanted { Rank::ACTIVE } else { Rank::INACTIVE };
        (rank, refaults)
    }

    /// Takes DIRTY, and what goes with it, off the pages of a frozen folio; returns how many were dirty.
    pub(crate) fn untag_dirty(&self, shape: &MappingShape, head: FrameId) -> u64 {
        let tags = &self.shared.tags;
        let mut untagged = 0;
        for (first, bits) in self.shared.leaves(head, self.shared.folio(head).order().pages()) {
            let dirty = tags.marked(first.tag_leaf(), Tag::Dirty) & bits;
            if dirty != 0 {
                tags.clear_owned(first.tag_leaf(), dirty, Tag::ToWrite);
                tags.clear_dirty(first.tag_leaf(), dirty);
                let marked = &self.shared.marked[shape.slot as usize];
                marked.cleaned(dirty.count_ones());
                let poisoned = tags.marked(first.tag_leaf(), Tag::Poisoned) & dirty;
                if poisoned != 0 {
                    tags.clear_owned(first.tag_leaf(), poisoned, Tag::Poisoned);
                    marked.recovered(poisoned);
                }
                // Poisoned ones didn't count as memory that writers are slowed by.
                self.shared.balance.cleaned((dirty & !poisoned).count_ones());
                untagged += u64::from(dirty.count_ones());
            }
        }
        untagged
    }

    /// Pages of one leaf that are locked for writeback will be submitted: they are clean from here on.
    pub(crate) fn start_writeback(&self, shape: &MappingShape, leaf: u32, pages: u64) {
        self.shared.tags.clear_owned(leaf, pages, Tag::ToWrite);
        self.shared.tags.clear_dirty(leaf, pages);
        let marked = &self.shared.marked[shape.slot as usize];
        marked.writeback_started(pages.count_ones());
        if marked.poisoned() > 0 {
            marked.recovered(pages & self.shared.tags.marked(leaf, Tag::Poisoned));
        }
    }

    /// The write of `pages` consecutive pages ended; `written` tells whether the device has them now. Returns of how many the
    /// write failed for good that were not poisoned before.
    pub(crate) fn end_writeback(
        &self,
        shape: &MappingShape,
        first: u64,
        pages: u64,
        written: Written,
    ) -> u32 {
        let (tags, marked) = (&self.shared.tags, &self.shared.marked[shape.slot as usize]);
        if written == Written::Yes && self.shared.lsns.is_used(shape.slot) {
            // Before WRITEBACK goes, and the next holder may stamp them.
            for page in first..first + pages {
                let frame = self.find(shape, page).expect("a page under writeback is in the cache");
                self.shared.lsns.written(frame);
            }
        }
        let mut newly_poisoned = 0;
        let mut done = 0;
        while done < pages {
            // As many as share a leaf: their marks change together.
            let bits = leaf_bits(first + done, pages - done);
            let local = shape.striping.local(first + done);
            let leaf = self.tree.leaf_of(shape.tree, local).expect("a page under writeback is in the cache");
            let poisoned_before = tags.marked(leaf, Tag::Poisoned) & bits;
            if written != Written::Refused {
                // Clean, or poisoned: writers aren't slowed by either, and weren't by what was poisoned before.
                self.shared.balance.cleaned((bits & !poisoned_before).count_ones());
            }
            if written == Written::Yes {
                if poisoned_before != 0 {
                    tags.clear_owned(leaf, poisoned_before, Tag::Poisoned);
                }
            } else {
                // Dirty again before WRITEBACK goes: at no moment does a sync find neither.
                let clean = tags.set_dirty(leaf, bits);
                marked.dirtied(clean.count_ones());
                // What was dirtied beside the device is written anew, and that write decides what becomes of it.
                let again = bits & !clean;
                if written == Written::No {
                    newly_poisoned += (bits & !poisoned_before).count_ones();
                    tags.set_owned(leaf, clean, Tag::Poisoned);
                } else {
                    self.shared.balance.cleaned(again.count_ones());
                }
                marked.poison(tags.marked(leaf, Tag::Poisoned) & bits);
            }
            tags.clear_owned(leaf, bits, Tag::Writeback);
            done += u64::from(bits.count_ones());
        }
        marked.writeback_ended(pages);
        newly_poisoned
    }

    /// Checks every folio against its marks (WB-04): for tests. Only meaningful while no thread holds a folio
    /// exclusively.
    ///
    /// # Panics
    /// When they disagree.
    #[cfg(any(test, debug_assertions))]
    pub(crate) fn assert_consistent<'s>(&self, shape_of: impl Fn(FolioKey) -> Option<&'s MappingShape>) {
        let (mut used, mut inactive) = (0, 0);
        let mut counts = vec![(0, 0, 0); MAPPINGS_MAX];
        let mut throttleable = 0;
        let mut shares = [0; SHARES_MAX];
        for (frame, folio) in self.shared.headers.iter().enumerate() {
            if folio.state().frozen() {
                continue;
            }
            let (head, order, first) = (FrameId(frame as u32), folio.order(), folio.key());
            assert_eq!(self.shared.place(head).head, head, "an open folio begins with its head");
            let shape = shape_of(first).expect("a cached folio's mapping is open");
            assert!(order >= shape.order, "{first:?} is smaller than its mapping allows");
            used += order.pages() as usize;
            shares[usize::from(shape.share.0)] += order.pages();
            assert!(folio.is_queued(), "{first:?} is known to eviction");
            inactive += if folio.rank().is_active() { 0 } else { order.pages() };
            for within in 0..order.pages() {
                let (frame, page) = (FrameId(head.0 + within as u32), first.page() + within);
                let header = self.shared.folio(frame);
                assert_eq!((header.key(), header.order()), (shape.key(page), order), "a part of {first:?}");
                assert_eq!(self.find(shape, page), Some(frame), "page {page} is indexed");
                let leaf = header.tag_leaf();
                let local = shape.striping.local(page);
                assert_eq!(self.tree.leaf_of(shape.tree, local), Some(leaf), "page {page} knows its leaf");
                let tagged = |tag| self.shared.tags.marked(leaf, tag) & leaf_bit(page) != 0;
                assert!(!tagged(Tag::ToWrite) || tagged(Tag::Dirty), "TOWRITE without DIRTY on page {page}");
                assert!(
                    within < folio.state().filled() || !tagged(Tag::Dirty) && !tagged(Tag::Writeback),
                    "page {page} is marked and not filled"
                );
                let counts = &mut counts[first.mapping() as usize];
                counts.0 += u32::from(tagged(Tag::Dirty));
                counts.1 += u32::from(tagged(Tag::Writeback));
                counts.2 += u32::from(tagged(Tag::Poisoned) && tagged(Tag::Dirty));
                let in_use = u64::from(tagged(Tag::Dirty)) + u64::from(tagged(Tag::Writeback));
                assert!(!tagged(Tag::Poisoned) || in_use > 0, "page {page} is POISONED and clean");
                // One that was dirtied beside the device is both.
                throttleable += if tagged(Tag::Poisoned) { 0 } else { in_use };
            }
        }
        for (slot, counts) in counts.into_iter().enumerate() {
            let marked = &self.shared.marked[slot];
            let kept = (marked.dirty(), marked.writeback(), marked.poisoned());
            assert_eq!(kept, counts, "counts of mapping {slot}");
        }
        assert_eq!(self.shared.balance.marked(), throttleable, "what writers are slowed by");
        self.shared.shares.assert_counts(&shares);
        assert_eq!(self.installed - self.released, used as u64, "what was installed and not released");
        self.reclaim.assert_consistent(&self.shared.headers, inactive);
        assert_eq!(used + self.free.count(), self.shared.headers.len(), "every frame is used or free");
    }
}

/// The bit of `bits` that is nearest to `slot`, itself not set.
fn nearest(bits: u64, slot: u32) -> Option<u32> {
    let below = (bits & ((1 << slot) - 1)).checked_ilog2();
    let above = (bits >> slot != 0).then(|| slot + (bits >> slot).trailing_zeros());
    match (below, above) {
        (Some(below), Some(above)) => Some(if above - slot < slot - below { above } else { below }),
        (below, above) => below.or(above),
    }
}

/// The pieces of a folio of `order` when the one of `smallest` that holds page `within` is cut out: that one, and on
/// both sides of it folios as large as alignment allows, ascending.
fn pieces_around(
    order: FolioOrder,
    within: u64,
    smallest: FolioOrder,
) -> impl Iterator<Item = (u64, FolioOrder)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = at;
        if first >= order.pages() {
            return None;
        }
        // The largest aligned piece that begins here and doesn't hold the page, or the smallest that does.
        let mut piece = FolioOrder::fitting(first, order.pages() - first);
        while piece > smallest && (first..first + piece.pages()).contains(&within) {
            piece = FolioOrder(piece.0 - 1);
        }
        at += piece.pages();
        Some((first, piece))
    })
}

const _: () = assert!(LEAF_PAGES == 64);

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn pieces(order: u8, within: u64, smallest: u8) -> Vec<(u64, u8)> {
        pieces_around(FolioOrder(order), within, FolioOrder(smallest))
            .map(|(first, piece)| (first, piece.0))
            .collect()
    }

    #[test]
    fn cutting_a_page_out_leaves_the_largest_pieces_beside_it() {
        assert_eq!(pieces(3, 0, 0), [(0, 0), (1, 0), (2, 1), (4, 2)]);
        assert_eq!(pieces(3, 5, 0), [(0, 2), (4, 0), (5, 0), (6, 1)]);
        assert_eq!(pieces(4, 9, 2), [(0, 3), (8, 2), (12, 2)]);
        assert_eq!(pieces(0, 0, 0), [(0, 0)]);
        assert_eq!(pieces(9, 511, 0).len(), 10);
    }

    #[test]
    fn the_nearest_page_is_found_on_either_side() {
        assert_eq!(nearest(0, 5), None);
        assert_eq!(nearest(1 << 63, 0), Some(63));
        assert_eq!(nearest(1, 63), Some(0));
        assert_eq!(nearest(0b1000_0001, 3), Some(0));
        assert_eq!(nearest(0b1000_0001, 5), Some(7));
    }

    #[test]
    fn the_pieces_of_a_folio_have_no_gaps_for_any_page() {
        for order in 0..=9 {
            for smallest in 0..=order.min(4) {
                for within in 0..1 << order {
                    let mut at = 0;
                    for (first, piece) in pieces(order, within, smallest) {
                        assert_eq!(first, at);
                        assert!(first % (1 << piece) == 0 && piece >= smallest);
                        at += 1 << piece;
                    }
                    assert_eq!(at, 1 << order);
                }
            }
        }
    }
}
