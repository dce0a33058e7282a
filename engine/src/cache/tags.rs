//! The marks of writeback: DIRTY, TOWRITE, WRITEBACK and POISONED a page, as bitmaps under a summarising radix tree.
//!
//! A leaf covers 64 pages with one word a mark; an inner node has one bit a child, set when anything below it
//! may carry the mark. A pass therefore costs the marked pages that it meets, not the pages that the file
//! spans (WB-43), and marks move 64 at a time.
//!
//! The tree is over *shard-local* page numbers (see [`super::stripe`]). Its structure, nodes and links, belongs
//! to the shard ([`TagTree`]); the mark words ([`TagNodes`]) are shared, because the thread that releases a
//! changed folio sets DIRTY itself ([`TagNodes::set_dirty`]).
//!
//! # No dirty page is lost between the two
//!
//! The thread sets the leaf's bit first, then the summary bits upwards, all with read-modify-writes. The
//! shard, having emptied a node, clears its summary bit **first and then reads the node again**, and sets the
//! summary anew where a bit has come back. Both touch the summary word by read-modify-write, so one comes
//! first: was it the thread, the shard's clear acquires its leaf bit and the second look finds it; was it the
//! shard, the thread's summary bit stays. No shortcut is taken upwards when a bit is already set: the
//! thread that set it may not have arrived further up yet. The loom model runs this code.
//!
//! A folio keeps its leaf and all its ancestors alive as long as it is in the cache, so a thread with a pin may
//! follow `parent` links.

use crate::primitives::{AtomicU32, AtomicU64, Ordering};
use std::ops::Range;
use std::sync::Arc;
#[cfg(not(loom))]
use zerocopy::FromZeros;

/// No node: numbers count from 1, so that a pool of nodes that was never used is all zeros and costs no memory yet.
const NONE: u32 = 0;
/// Pages a leaf, children a node: the bits of a word.
const FANOUT_BITS: u32 = 6;
const FANOUT: u64 = 1 << FANOUT_BITS;
/// A tree over 2^48 pages has eight levels.
const LEVELS_MAX: u32 = 8;

/// A mark that a page can carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tag {
    /// The cache has bytes that the device lacks (`PAGECACHE_TAG_DIRTY`).
    Dirty = 0,
    /// An integrity pass has still to write it (`PAGECACHE_TAG_TOWRITE`). Only together with DIRTY (WB-04).
    ToWrite = 1,
    /// The device is reading it (`PAGECACHE_TAG_WRITEBACK`).
    Writeback = 2,
    /// Its last write failed for good (WB-23). Only together with DIRTY, or with WRITEBACK while it is tried again.
    Poisoned = 3,
}

/// Kinds of marks.
const TAGS: usize = 4;

/// One node's shared half.
#[derive(Debug)]
#[cfg_attr(not(loom), derive(FromZeros))]
struct TagNode {
    /// A word a [`Tag`]: at a leaf a bit a page, above a bit a child.
    marks: [AtomicU64; TAGS],
    /// The node above, or NONE at the root. Written by the shard before any folio below is published.
    parent: AtomicU32,
    /// This node's bit in its parent's words.
    slot: AtomicU32,
}

/// The mark words of one shard, shared with all threads.
#[derive(Debug)]
pub(crate) struct TagNodes {
    nodes: Box<[TagNode]>,
    /// The leaf whose pages a pass has at hand, locked and not submitted yet.
    being_locked: AtomicU32,
}

impl TagNodes {
    /// Nodes 1 to `count`, all without marks.
    fn new(count: usize) -> Self {
        #[cfg(not(loom))]
        let nodes =
            <[TagNode]>::new_box_zeroed_with_elems(count + 1).expect("a cache's metadata fits into memory");
        #[cfg(loom)]
        let nodes = {
            let word = || AtomicU64::new(0);
            let node = |_| TagNode {
                marks: std::array::from_fn(|_| word()),
                parent: AtomicU32::new(NONE),
                slot: AtomicU32::new(0),
            };
            (0..=count).map(node).collect()
        };
        Self { nodes, being_locked: AtomicU32::new(NONE) }
    }

    /// Sets DIRTY for the pages `pages` of `leaf`, then the summaries up to the root, and returns which of them were
    /// clean. The caller holds the pages' folio (exclusively), or is the shard.
    pub(crate) fn set_dirty(&self, leaf: u32, pages: u64) -> u64 {
        let before = self.nodes[leaf as usize].marks[Tag::Dirty as usize].fetch_or(pages, Ordering::AcqRel);
        self.raise_dirty(leaf);
        pages & !before
    }

    /// The pages of `leaf` that carry `tag`.
    #[inline]
    pub(crate) fn marked(&self, leaf: u32, tag: Tag) -> u64 {
        // Sequentially consistent for a holder's look at WRITEBACK after it took the folio (`super::exclusion`); on
        // every machine of interest a load like any other.
        self.nodes[leaf as usize].marks[tag as usize].load(Ordering::SeqCst)
    }

    /// From now on the pages of `leaf` that are locked are at hand of a pass, and those of no other leaf. The shard only.
    pub(crate) fn begin_locking(&self, leaf: u32) {
        if self.being_locked.load(Ordering::Relaxed) != leaf {
            self.being_locked.store(leaf, Ordering::SeqCst);
            #[cfg(loom)]
            crate::primitives::fence(Ordering::SeqCst);
        }
    }

    /// What was locked is submitted, or given back. The shard only.
    pub(crate) fn end_locking(&self) {
        self.being_locked.store(NONE, Ordering::Release);
    }

    /// Whether a pass has pages of `leaf` at hand: asked by who has found them under WRITEBACK.
    pub(crate) fn is_being_locked(&self, leaf: u32) -> bool {
        self.being_locked.load(Ordering::SeqCst) == leaf
    }

    /// Sets WRITEBACK for the pages `pages` of `leaf`, before the look at who holds them. The shard only.
    pub(crate) fn set_writeback(&self, leaf: u32, pages: u64) {
        let node = &self.nodes[leaf as usize];
        let before = node.marks[Tag::Writeback as usize].fetch_or(pages, Ordering::SeqCst);
        let parent = node.parent.load(Ordering::Relaxed);
        if before == 0 && parent != NONE {
            self.set_owned(parent, 1 << node.slot.load(Ordering::Relaxed), Tag::Writeback);
        }
    }

    /// Sets the summary bits of everything above `node`.
    fn raise_dirty(&self, node: u32) {
        let mut at = &self.nodes[node as usize];
        loop {
            let parent = at.parent.load(Ordering::Relaxed);
            if parent == NONE {
                return;
            }
            let bit = 1 << at.slot.load(Ordering::Relaxed);
            at = &self.nodes[parent as usize];
            at.marks[Tag::Dirty as usize].fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// Clears DIRTY for the pages `pages` of `leaf`, and the summaries that became empty. The shard only.
    pub(crate) fn clear_dirty(&self, leaf: u32, pages: u64) {
        const DIRTY: usize = Tag::Dirty as usize;
        let mut node = &self.nodes[leaf as usize];
        let mut bits = pages;
        let mut before = node.marks[DIRTY].fetch_and(!bits, Ordering::AcqRel);
        let mut number = leaf;
        while before & !bits == 0 {
            let parent = node.parent.load(Ordering::Relaxed);
            if parent == NONE {
                return;
            }
            bits = 1 << node.slot.load(Ordering::Relaxed);
            // The summary first, then a second look: a bit that came back meanwhile is raised again. Each summary
            // bit is cleared once only, since a second time it may already stand for a new mark below.
            let above = &self.nodes[parent as usize];
            before = above.marks[DIRTY].fetch_and(!bits, Ordering::AcqRel);
            if node.marks[DIRTY].load(Ordering::Acquire) != 0 {
                self.raise_dirty(number);
                return;
            }
            (node, number) = (above, parent);
        }
    }

    /// Sets a mark that only the shard changes (all but DIRTY) for the pages `pages` of `leaf`: plain stores,
    /// and no further up than the first summary that is set already. The shard only.
    pub(crate) fn set_owned(&self, leaf: u32, pages: u64, tag: Tag) {
        debug_assert_ne!(tag, Tag::Dirty, "threads set DIRTY beside the shard");
        let (mut node, mut bits) = (leaf, pages);
        loop {
            let at = &self.nodes[node as usize];
            let word = &at.marks[tag as usize];
            let before = word.load(Ordering::Relaxed);
            word.store(before | bits, Ordering::Relaxed);
            let parent = at.parent.load(Ordering::Relaxed);
            if before != 0 || parent == NONE {
                return;
            }
            bits = 1 << at.slot.load(Ordering::Relaxed);
            node = parent;
        }
    }

    /// Clears a mark that only the shard touches for the pages `pages` of `leaf`, and the summaries that became
    /// empty. The shard only.
    pub(crate) fn clear_owned(&self, leaf: u32, pages: u64, tag: Tag) {
        debug_assert_ne!(tag, Tag::Dirty, "threads set DIRTY beside the shard");
        let (mut node, mut bits) = (leaf, pages);
        loop {
            let at = &self.nodes[node as usize];
            let word = &at.marks[tag as usize];
            let before = word.load(Ordering::Relaxed);
            // Release: who sees WRITEBACK gone sees that the device has done with the frame.
            word.store(before & !bits, Ordering::Release);
            let parent = at.parent.load(Ordering::Relaxed);
            // A node that was empty before has told its parent already.
            if before == 0 || before & !bits != 0 || parent == NONE {
                return;
            }
            bits = 1 << at.slot.load(Ordering::Relaxed);
            node = parent;
        }
    }

    fn word(&self, node: u32, tag: Tag) -> u64 {
        self.nodes[node as usize].marks[tag as usize].load(Ordering::Acquire)
    }
}

/// What a search looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Find {
    /// Pages in the cache.
    Present,
    /// Pages that carry a mark.
    Tagged(Tag),
}

/// Some of the 64 pages of one leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LeafPages {
    /// The leaf.
    pub leaf: u32,
    /// Shard-local number of the leaf's first page.
    pub base: u64,
    /// Bit *i* stands for page `base + i`.
    pub pages: u64,
}

/// The tree of one mapping in one shard: its number and its height.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TreeId {
    pub mapping: u16,
    pub levels: u32,
}

impl TreeId {
    /// The tree for a mapping of which this shard holds `local_pages` pages.
    pub(crate) fn new(mapping: u16, local_pages: u64) -> Self {
        let mut levels = 1;
        while levels < LEVELS_MAX && local_pages > 1 << (FANOUT_BITS * levels) {
            levels += 1;
        }
        Self { mapping, levels }
    }

    fn node_key(self, level: u32, local: u64) -> u64 {
        let index = local >> (FANOUT_BITS * (level + 1));
        u64::from(self.mapping) << 48 | u64::from(level) << 44 | index
    }
}

/// One node's private half.
#[derive(Clone, Debug, Default)]
#[cfg_attr(not(loom), derive(FromZeros))]
struct NodeLinks {
    /// Mapping, level and index: [`TreeId::node_key`].
    key: u64,
    /// A leaf: the pages in the cache. Above: the children that exist.
    present: u64,
    /// Next node in the hash bucket, or in the free list.
    next: u32,
}

/// The structure of a shard's trees. Owned by the shard.
#[derive(Debug)]
pub(crate) struct TagTree {
    nodes: Arc<TagNodes>,
    links: Box<[NodeLinks]>,
    buckets: Box<[u32]>,
    /// First node that was used and is free again.
    free: u32,
    /// First node that was never used.
    fresh: u32,
    used: usize,
}

impl TagTree {
    /// Nodes that can be needed at once for `frames` cached pages, somewhere among `local_pages` pages of the
    /// device, in at most `mappings_max` mappings: at each level a node a page, but no more than exist.
    pub(crate) fn nodes_max(frames: u64, local_pages: u64, mappings_max: u64) -> usize {
        let levels = TreeId::new(0, local_pages).levels;
        let of_level = |level| frames.min((local_pages >> (FANOUT_BITS * (level + 1))) + 2 * mappings_max);
        (0..levels).map(of_level).sum::<u64>() as usize
    }

    pub(crate) fn new(nodes_max: usize) -> Self {
        Self {
            nodes: Arc::new(TagNodes::new(nodes_max)),
            #[cfg(not(loom))]
            links: <[NodeLinks]>::new_box_zeroed_with_elems(nodes_max + 1)
                .expect("metadata fits into memory"),
            #[cfg(loom)]
            links: vec![NodeLinks::default(); nodes_max + 1].into_boxed_slice(),
            buckets: vec![NONE; nodes_max.next_power_of_two()].into_boxed_slice(),
            free: NONE,
            fresh: 1,
            used: 0,
        }
    }

    /// Nodes in use.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// Bytes of one node, both halves.
    pub(crate) const NODE_BYTES: usize = size_of::<TagNode>() + size_of::<NodeLinks>();

    /// The shared half.
    pub(crate) fn nodes(&self) -> &Arc<TagNodes> {
        &self.nodes
    }

    /// Bytes of the table by which nodes are found; the nodes themselves count when they are used.
    pub(crate) fn table_bytes(&self) -> usize {
        size_of_val(&*self.buckets)
    }

    fn bucket(&self, key: u64) -> usize {
        let bits = self.buckets.len().trailing_zeros();
        if bits == 0 { 0 } else { (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - bits)) as usize }
    }

    fn lookup(&self, key: u64) -> Option<u32> {
        let mut at = self.buckets[self.bucket(key)];
        while at != NONE {
            let node = &self.links[at as usize];
            if node.key == key {
                return Some(at);
            }
            at = node.next;
        }
        None
    }

    /// Adds the pages `pages` of the leaf in which `local` lies to their tree and returns the leaf. The shard calls this
    /// before it publishes their folio.
    pub(crate) fn insert(&mut self, tree: TreeId, local: u64, pages: u64) -> u32 {
        let mut bits = pages;
        let mut bit = 0;
        let mut child = NONE;
        let mut leaf = NONE;
        for level in 0..tree.levels {
            let key = tree.node_key(level, local);
            let (node, created) = match self.lookup(key) {
                Some(node) => (node, false),
                None => (self.create(key), true),
            };
            if level == 0 {
                leaf = node;
            }
            if child != NONE {
                let shared = &self.nodes.nodes[child as usize];
                shared.parent.store(node, Ordering::Relaxed);
                shared.slot.store(bit as u32, Ordering::Relaxed);
            }
            self.links[node as usize].present |= bits;
            if !created {
                break;
            }
            child = node;
            bit = (local >> (FANOUT_BITS * (level + 1))) % FANOUT;
            bits = 1 << bit;
        }
        leaf
    }

    fn create(&mut self, key: u64) -> u32 {
        let node = if self.free == NONE {
            self.fresh += 1;
            self.fresh - 1
        } else {
            let next = self.links[self.free as usize].next;
            std::mem::replace(&mut self.free, next)
        };
        assert!((node as usize) < self.links.len(), "the tag tree was sized below its need");
        self.used += 1;
        let bucket = self.bucket(key);
        self.links[node as usize] = NodeLinks { key, present: 0, next: self.buckets[bucket] };
        self.buckets[bucket] = node;
        self.nodes.nodes[node as usize].parent.store(NONE, Ordering::Relaxed);
        node
    }

    /// Takes pages of a leaf out; their marks must be clear, and nobody may hold their folio any more.
    pub(crate) fn remove(&mut self, tree: TreeId, local: u64, pages: u64) {
        let mut bits = pages;
        for level in 0..tree.levels {
            let key = tree.node_key(level, local);
            let node = self.lookup(key).expect("a cached page has its path of tag nodes");
            let links = &mut self.links[node as usize];
            links.present &= !bits;
            if links.present != 0 {
                return;
            }
            self.destroy(node);
            bits = 1 << ((local >> (FANOUT_BITS * (level + 1))) % FANOUT);
        }
    }

    fn destroy(&mut self, node: u32) {
        for mark in &self.nodes.nodes[node as usize].marks {
            debug_assert_eq!(mark.load(Ordering::Relaxed), 0, "a tag outlives its pages");
        }
        let (key, next) = (self.links[node as usize].key, self.links[node as usize].next);
        let bucket = self.bucket(key);
        if self.buckets[bucket] == node {
            self.buckets[bucket] = next;
        } else {
            let mut at = self.buckets[bucket];
            while self.links[at as usize].next != node {
                at = self.links[at as usize].next;
            }
            self.links[at as usize].next = next;
        }
        self.links[node as usize].next = self.free;
        self.nodes.nodes[node as usize].parent.store(NONE, Ordering::Relaxed);
        self.free = node;
        self.used -= 1;
    }

    /// The leaf of a page, if any page of it is in the cache.
    pub(crate) fn leaf_of(&self, tree: TreeId, local: u64) -> Option<u32> {
        self.lookup(tree.node_key(0, local))
    }

    /// Which pages of the leaf in which `local` lies are in the cache.
    pub(crate) fn present(&self, tree: TreeId, local: u64) -> u64 {
        self.leaf_of(tree, local).map_or(0, |leaf| self.links[leaf as usize].present)
    }

    /// The first leaf with wanted pages in `range` (shard-local pages), and which pages those are.
    pub(crate) fn next(&self, tree: TreeId, find: Find, range: Range<u64>) -> Option<LeafPages> {
        if range.is_empty() {
            return None;
        }
        self.search(tree, tree.levels - 1, 0, find, &range)
    }

    /// Searches the node of `level` that begins at page `base`.
    fn search(
        &self,
        tree: TreeId,
        level: u32,
        base: u64,
        find: Find,
        range: &Range<u64>,
    ) -> Option<LeafPages> {
        let node = self.lookup(tree.node_key(level, base))?;
        let child_bits = FANOUT_BITS * level;
        let word = match find {
            Find::Present => self.links[node as usize].present,
            Find::Tagged(tag) => self.nodes.word(node, tag),
        };
        let mut wanted = word & children_in(range, base, child_bits);
        if level == 0 {
            return (wanted != 0).then_some(LeafPages { leaf: node, base, pages: wanted });
        }
        while wanted != 0 {
            let child = base + (u64::from(wanted.trailing_zeros()) << child_bits);
            if let Some(found) = self.search(tree, level - 1, child, find, range) {
                return Some(found);
            }
            wanted &= wanted - 1;
        }
        None
    }

    /// Adds TOWRITE to every DIRTY page of `range` and returns how many carry it now that did not before
    /// (`tag_pages_for_writeback`).
    pub(crate) fn tag_for_writeback(&self, tree: TreeId, range: Range<u64>) -> u64 {
        let top = tree.levels - 1;
        let mut tagged = 0;
        if !range.is_empty()
            && let Some(root) = self.lookup(tree.node_key(top, 0))
        {
            self.tag_below(tree, (root, top, 0), &range, &mut tagged);
        }
        tagged
    }

    /// Tags below the node that begins at page `base`; true when anything below carries TOWRITE afterwards.
    fn tag_below(
        &self,
        tree: TreeId,
        (node, level, base): (u32, u32, u64),
        range: &Range<u64>,
        tagged: &mut u64,
    ) -> bool {
        let child_bits = FANOUT_BITS * level;
        let mut dirty = self.nodes.word(node, Tag::Dirty) & children_in(range, base, child_bits);
        let mut gained = 0;
        if level == 0 {
            gained = dirty & !self.nodes.word(node, Tag::ToWrite);
            *tagged += u64::from(gained.count_ones());
        } else {
            let mut siblings = Siblings::default();
            while dirty != 0 {
                let slot = dirty.trailing_zeros();
                let child_base = base + (u64::from(slot) << child_bits);
                let key = || tree.node_key(level - 1, child_base);
                if let Some(child) = self.next_sibling(&mut siblings, (node, slot), key)
                    && self.tag_below(tree, (child, level - 1, child_base), range, tagged)
                {
                    gained |= 1 << slot;
                }
                dirty &= dirty - 1;
            }
        }
        let marks = &self.nodes.nodes[node as usize].marks[Tag::ToWrite as usize];
        // The shard alone touches TOWRITE, so a load and a store do.
        let now = marks.load(Ordering::Relaxed) | gained;
        marks.store(now, Ordering::Relaxed);
        now != 0
    }

    /// The child of `parent` at a slot behind those that `siblings` has seen; `key` is its key. Where pages came in the order
    /// of the file, the next child is the next number, and neither the table nor its chains need to be read.
    #[inline]
    fn next_sibling(
        &self,
        siblings: &mut Siblings,
        (parent, slot): (u32, u32),
        key: impl FnOnce() -> u64,
    ) -> Option<u32> {
        if siblings.wrong < Siblings::WRONG_MAX && siblings.last != NONE && siblings.last + 1 < self.fresh {
            let guess = siblings.last + 1;
            let node = &self.nodes.nodes[guess as usize];
            // One that is free has no parent.
            if node.parent.load(Ordering::Relaxed) == parent && node.slot.load(Ordering::Relaxed) == slot {
                siblings.last = guess;
                return Some(guess);
            }
            siblings.wrong += 1;
        }
        let found = self.lookup(key())?;
        siblings.last = found;
        Some(found)
    }
}

/// Children of one node, visited in ascending order.
#[derive(Debug, Default)]
struct Siblings {
    last: u32,
    /// Guesses that were wrong; after a few no more are made, since each costs as much as a look-up.
    wrong: u32,
}

impl Siblings {
    const WRONG_MAX: u32 = 3;
}

/// The bits of a node at `base` whose children (of `1 << child_bits` pages each) overlap `range`.
fn children_in(range: &Range<u64>, base: u64, child_bits: u32) -> u64 {
    let first = range.start.saturating_sub(base) >> child_bits;
    let last = match (range.end - 1).checked_sub(base) {
        Some(last) => (last >> child_bits).min(FANOUT - 1),
        None => return 0,
    };
    if first > last {
        return 0;
    }
    (u64::MAX << first) & (u64::MAX >> (FANOUT - 1 - last))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn found(trees: &TagTree, tree: TreeId, find: Find, range: Range<u64>) -> Vec<u64> {
        let mut out = Vec::new();
        let mut from = range.start;
        while let Some(leaf) = trees.next(tree, find, from..range.end) {
            out.extend((0..64).filter(|bit| leaf.pages >> bit & 1 != 0).map(|bit| leaf.base + bit));
            from = leaf.base + 64;
        }
        out
    }

    #[test]
    fn masks_cover_exactly_the_children_of_a_range() {
        assert_eq!(children_in(&(0..64), 0, 0), u64::MAX);
        assert_eq!(children_in(&(3..5), 0, 0), 0b11000);
        assert_eq!(children_in(&(70..71), 64, 0), 1 << 6);
        assert_eq!(children_in(&(0..1), 64, 0), 0);
        assert_eq!(children_in(&(63..65), 0, 6), 0b11);
        assert_eq!(children_in(&(0..u64::MAX), 4096, 6), u64::MAX);
        assert_eq!(children_in(&(128..200), 0, 0), 0);
    }

    #[test]
    fn heights_follow_the_number_of_pages() {
        for (pages, levels) in [(1, 1), (64, 1), (65, 2), (4096, 2), (4097, 3), (1 << 28, 5)] {
            assert_eq!(TreeId::new(0, pages).levels, levels, "{pages} pages");
        }
    }

    proptest! {
        #[test]
        fn wb43_trees_agree_with_sets_over_any_history(
            steps in prop::collection::vec((0u8..6, 0u16..2, prop::sample::select(vec![0u64, 1, 63, 64, 65, 4095, 4096, 8191, 70_000, 262_143])), 1..300),
            from in 0u64..5000, len in 1u64..300_000,
        ) {
            let mut trees = TagTree::new(TagTree::nodes_max(20, 2 * 262_144, 2));
            let mut leaves: BTreeMap<(u16, u64), u32> = BTreeMap::new();
            let mut sets: [BTreeSet<(u16, u64)>; 3] = Default::default();
            for (step, mapping, local) in steps {
                let tree = TreeId::new(mapping, 262_144);
                let page = (mapping, local);
                match (step, leaves.get(&page).copied()) {
                    (0 | 1, None) => { leaves.insert(page, trees.insert(tree, local, 1 << (local % 64))); }
                    (1..=2, Some(leaf)) => {
                        trees.nodes().set_dirty(leaf, 1 << (local % 64));
                        sets[0].insert(page);
                    }
                    (3, Some(leaf)) => {
                        trees.nodes().clear_owned(leaf, 1 << (local % 64), Tag::ToWrite);
                        trees.nodes().clear_dirty(leaf, 1 << (local % 64));
                        sets[0].remove(&page);
                        sets[1].remove(&page);
                    }
                    (4, _) => {
                        let range = from..from + len;
                        let new: Vec<_> = sets[0].iter().filter(|p| p.0 == mapping && range.contains(&p.1) && !sets[1].contains(p)).copied().collect();
                        prop_assert_eq!(trees.tag_for_writeback(tree, range), new.len() as u64);
                        sets[1].extend(new);
                    }
                    (5, Some(leaf)) => {
                        trees.nodes().clear_owned(leaf, 1 << (local % 64), Tag::ToWrite);
                        trees.nodes().clear_dirty(leaf, 1 << (local % 64));
                        sets.iter_mut().for_each(|set| { set.remove(&page); });
                        trees.remove(tree, local, 1 << (local % 64));
                        leaves.remove(&page);
                    }
                    _ => {}
                }
                for mapping in 0..2 {
                    let tree = TreeId::new(mapping, 262_144);
                    for range in [0..262_144, from..from + len] {
                        for (find, set) in [(Find::Tagged(Tag::Dirty), &sets[0]), (Find::Tagged(Tag::ToWrite), &sets[1])] {
                            let want: Vec<u64> = set.iter().filter(|p| p.0 == mapping && range.contains(&p.1)).map(|p| p.1).collect();
                            prop_assert_eq!(found(&trees, tree, find, range.clone()), want);
                        }
                        let want: Vec<u64> = leaves.keys().filter(|p| p.0 == mapping && range.contains(&p.1)).map(|p| p.1).collect();
                        prop_assert_eq!(found(&trees, tree, Find::Present, range.clone()), want);
                    }
                }
            }
        }
    }

    #[test]
    fn the_pool_is_enough_for_the_sparsest_pages() {
        let frames = 1000;
        let pages = 1u64 << 30;
        let mut trees = TagTree::new(TagTree::nodes_max(frames, pages, 1));
        let tree = TreeId::new(0, pages);
        for page in 0..frames {
            let local = page * (pages / frames);
            trees.insert(tree, local, 1 << (local % 64));
        }
        for page in 0..frames {
            let local = page * (pages / frames);
            trees.remove(tree, local, 1 << (local % 64));
        }
        assert_eq!(trees.used(), 0, "every node went back");
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use super::*;
    use loom::thread;

    /// Three levels, so that a summary of summaries takes part.
    const TREE: TreeId = TreeId { mapping: 0, levels: 3 };

    fn dirty(trees: &TagTree) -> Vec<u64> {
        let mut out = Vec::new();
        let mut from = 0;
        while let Some(leaf) = trees.next(TREE, Find::Tagged(Tag::Dirty), from..1 << 18) {
            out.extend((0..64).filter(|bit| leaf.pages >> bit & 1 != 0).map(|bit| leaf.base + bit));
            from = leaf.base + 64;
        }
        out
    }

    /// A page dirtied by a thread while the shard empties the same leaf is found by the next pass.
    #[test]
    fn loom_a_page_dirtied_beside_a_clearing_shard_is_found_from_the_root() {
        loom::model(|| {
            let mut trees = TagTree::new(8);
            let leaf = trees.insert(TREE, 0, 1);
            trees.insert(TREE, 1, 1 << 1);
            let nodes = trees.nodes().clone();
            nodes.set_dirty(leaf, 1 << 0);
            let writer = {
                let nodes = nodes.clone();
                thread::spawn(move || nodes.set_dirty(leaf, 1 << 1))
            };
            nodes.clear_dirty(leaf, 1);
            writer.join().unwrap();
            assert_eq!(dirty(&trees), [1]);
        });
    }

    /// Two threads dirty pages of two leaves under one parent while the shard empties one of them. Whichever
    /// thread has *finished* is found from the root, though the other is still on its way up.
    #[test]
    fn loom_a_finished_mark_is_found_though_another_thread_is_on_its_way_up() {
        loom::model(|| {
            let mut trees = TagTree::new(8);
            let left = trees.insert(TREE, 0, 1);
            trees.insert(TREE, 1, 1 << 1);
            let nodes = trees.nodes().clone();
            let first = {
                let nodes = nodes.clone();
                thread::spawn(move || nodes.set_dirty(left, 1 << 0))
            };
            nodes.set_dirty(left, 1 << 1);
            assert!(dirty(&trees).contains(&1));
            first.join().unwrap();
            assert_eq!(dirty(&trees), [0, 1]);
        });
    }
}
