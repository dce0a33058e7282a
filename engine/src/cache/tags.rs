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
//! # What tagging touches
//!
//! An integrity pass over a million pages that lie apart begins with a million leaves. Each costs the line in which its DIRTY and
//! its TOWRITE lie, and nothing else: the two words of all nodes are an array of their own, by the node's number. Nodes are
//! made from above, so that in the order of the file a node's leaves have numbers one behind the other; then the array is read
//! from front to back, and no leaf has to be looked up.
//!
//! # The life of a leaf
//!
//! A folio keeps its leaf and all its ancestors alive as long as it is in the cache, so a thread with a pin may
//! follow `parent` links.

use super::table::prefetch;
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
/// Neighbouring nodes of a level, this many, share a cache line of the table by which nodes are found.
const NEIGHBOURS: u64 = 16;
/// For so many children of a node it doesn't pay to load them together.
const FEW: u32 = 2;
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

/// The words of one node with which a pass begins: at a leaf a bit a page, above a bit a child. They lie apart from the
/// node's others, since tagging goes through those of all dirty leaves and touches nothing else.
#[derive(Debug, Default)]
#[cfg_attr(not(loom), derive(FromZeros))]
struct DirtyMarks {
    dirty: AtomicU64,
    to_write: AtomicU64,
}

/// The rest of one node's shared half.
#[derive(Debug, Default)]
#[cfg_attr(not(loom), derive(FromZeros))]
struct TagNode {
    writeback: AtomicU64,
    poisoned: AtomicU64,
    /// The node above, or NONE at the root. Written by the shard before any folio below is published.
    parent: AtomicU32,
    /// This node's bit in its parent's words.
    slot: AtomicU32,
}

/// The mark words of one shard, shared with all threads.
#[derive(Debug)]
pub(crate) struct TagNodes {
    /// Two arrays by the node's number.
    dirty_marks: Box<[DirtyMarks]>,
    nodes: Box<[TagNode]>,
    /// The leaf whose pages a pass has at hand, locked and not submitted yet.
    being_locked: AtomicU32,
}

impl TagNodes {
    /// Nodes 1 to `count`, all without marks.
    fn new(count: usize) -> Self {
        #[cfg(not(loom))]
        let (dirty_marks, nodes) = (
            <[DirtyMarks]>::new_box_zeroed_with_elems(count + 1)
                .expect("a cache's metadata fits into memory"),
            <[TagNode]>::new_box_zeroed_with_elems(count + 1).expect("a cache's metadata fits into memory"),
        );
        #[cfg(loom)]
        let (dirty_marks, nodes) = (
            (0..=count).map(|_| DirtyMarks::default()).collect(),
            (0..=count).map(|_| TagNode::default()).collect(),
        );
        Self { dirty_marks, nodes, being_locked: AtomicU32::new(NONE) }
    }

    /// The word of a node for one mark.
    #[inline]
    fn marks(&self, node: u32, tag: Tag) -> &AtomicU64 {
        match tag {
            Tag::Dirty => &self.dirty_marks[node as usize].dirty,
            Tag::ToWrite => &self.dirty_marks[node as usize].to_write,
            Tag::Writeback => &self.nodes[node as usize].writeback,
            Tag::Poisoned => &self.nodes[node as usize].poisoned,
        }
    }

    /// The node above, if there is one, and this node's bit there.
    #[inline]
    fn above(&self, node: u32) -> Option<(u32, u64)> {
        let node = &self.nodes[node as usize];
        let parent = node.parent.load(Ordering::Relaxed);
        (parent != NONE).then(|| (parent, 1 << node.slot.load(Ordering::Relaxed)))
    }

    /// Sets DIRTY for the pages `pages` of `leaf`, then the summaries up to the root, and returns which of them were
    /// clean. The caller holds the pages' folio (exclusively), or is the shard.
    pub(crate) fn set_dirty(&self, leaf: u32, pages: u64) -> u64 {
        let before = self.marks(leaf, Tag::Dirty).fetch_or(pages, Ordering::AcqRel);
        self.raise_dirty(leaf);
        pages & !before
    }

    /// The pages of `leaf` that carry `tag`.
    #[inline]
    pub(crate) fn marked(&self, leaf: u32, tag: Tag) -> u64 {
        // Sequentially consistent for a holder's look at WRITEBACK after it took the folio (`super::exclusion`); on
        // every machine of interest a load like any other.
        self.marks(leaf, tag).load(Ordering::SeqCst)
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
        let before = self.marks(leaf, Tag::Writeback).fetch_or(pages, Ordering::SeqCst);
        if before == 0
            && let Some((parent, bit)) = self.above(leaf)
        {
            self.set_owned(parent, bit, Tag::Writeback);
        }
    }

    /// Sets the summary bits of everything above `node`.
    fn raise_dirty(&self, node: u32) {
        let mut at = node;
        while let Some((parent, bit)) = self.above(at) {
            self.marks(parent, Tag::Dirty).fetch_or(bit, Ordering::AcqRel);
            at = parent;
        }
    }

    /// Clears DIRTY for the pages `pages` of `leaf`, and the summaries that became empty. The shard only.
    pub(crate) fn clear_dirty(&self, leaf: u32, pages: u64) {
        let (mut node, mut bits) = (leaf, pages);
        let mut before = self.marks(node, Tag::Dirty).fetch_and(!bits, Ordering::AcqRel);
        while before & !bits == 0 {
            let Some((parent, bit)) = self.above(node) else { return };
            bits = bit;
            // The summary first, then a second look: a bit that came back meanwhile is raised again. Each summary
            // bit is cleared once only, since a second time it may already stand for a new mark below.
            before = self.marks(parent, Tag::Dirty).fetch_and(!bits, Ordering::AcqRel);
            if self.marks(node, Tag::Dirty).load(Ordering::Acquire) != 0 {
                self.raise_dirty(node);
                return;
            }
            node = parent;
        }
    }

    /// Sets a mark that only the shard changes (all but DIRTY) for the pages `pages` of `leaf`: plain stores,
    /// and no further up than the first summary that is set already. The shard only.
    pub(crate) fn set_owned(&self, leaf: u32, pages: u64, tag: Tag) {
        debug_assert_ne!(tag, Tag::Dirty, "threads set DIRTY beside the shard");
        let (mut node, mut bits) = (leaf, pages);
        loop {
            let word = self.marks(node, tag);
            let before = word.load(Ordering::Relaxed);
            word.store(before | bits, Ordering::Relaxed);
            if before != 0 {
                return;
            }
            let Some(above) = self.above(node) else { return };
            (node, bits) = above;
        }
    }

    /// Clears a mark that only the shard touches for the pages `pages` of `leaf`, and the summaries that became
    /// empty. The shard only.
    pub(crate) fn clear_owned(&self, leaf: u32, pages: u64, tag: Tag) {
        debug_assert_ne!(tag, Tag::Dirty, "threads set DIRTY beside the shard");
        let (mut node, mut bits) = (leaf, pages);
        loop {
            let word = self.marks(node, tag);
            let before = word.load(Ordering::Relaxed);
            // Release: who sees WRITEBACK gone sees that the device has done with the frame.
            word.store(before & !bits, Ordering::Release);
            // A node that was empty before has told its parent already.
            if before == 0 || before & !bits != 0 {
                return;
            }
            let Some(above) = self.above(node) else { return };
            (node, bits) = above;
        }
    }

    fn word(&self, node: u32, tag: Tag) -> u64 {
        self.marks(node, tag).load(Ordering::Acquire)
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
    /// Above the leaves, where the children are numbered in their order without gaps, the first child's number; else NONE.
    /// That is so where pages came in the order of the file. Then a child is found without the table.
    first: u32,
}

impl NodeLinks {
    /// The number of the child at `slot`, which exists, where that is known without looking at it.
    #[inline]
    fn child(&self, slot: u32) -> Option<u32> {
        (self.first != NONE).then(|| self.first + self.before(slot).count_ones())
    }

    /// The children before `slot`.
    #[inline]
    fn before(&self, slot: u32) -> u64 {
        self.present & ((1 << slot) - 1)
    }

    /// Notes a new child.
    fn adopt(&mut self, slot: u32, child: u32) {
        let is_next = self.present >> slot == 0 && self.first + self.present.count_ones() == child;
        if self.present == 0 {
            self.first = child;
        } else if !is_next {
            self.first = NONE;
        }
        self.present |= 1 << slot;
    }

    /// Forgets a child.
    fn disown(&mut self, slot: u32) {
        self.present &= !(1 << slot);
        let (are_before, are_behind) = (self.before(slot) != 0, self.present >> slot != 0);
        match (are_before, are_behind) {
            (true, true) => self.first = NONE,
            (false, _) if self.first != NONE => self.first += 1,
            _ => {}
        }
    }
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
            buckets: vec![NONE; nodes_max.next_power_of_two().max(NEIGHBOURS as usize)].into_boxed_slice(),
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
    pub(crate) const NODE_BYTES: usize =
        size_of::<DirtyMarks>() + size_of::<TagNode>() + size_of::<NodeLinks>();

    /// The shared half.
    pub(crate) fn nodes(&self) -> &Arc<TagNodes> {
        &self.nodes
    }

    /// Bytes of the table by which nodes are found; the nodes themselves count when they are used.
    pub(crate) fn table_bytes(&self) -> usize {
        size_of_val(&*self.buckets)
    }

    fn bucket(&self, key: u64) -> usize {
        // Fibonacci hashing of the group. Inside it neighbours take different places, and those of other groups others, so
        // that one node in sixteen doesn't meet one place in sixteen.
        let hash = (key / NEIGHBOURS).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let place = (key ^ hash >> 32) % NEIGHBOURS;
        let group = hash >> (64 - self.buckets.len().trailing_zeros()) & !(NEIGHBOURS - 1);
        (group | place) as usize
    }

    fn lookup(&self, key: u64) -> Option<u32> {
        self.follow(self.buckets[self.bucket(key)], key)
    }

    /// Looks for the node of `key` in the chain that begins at `at`.
    #[inline]
    fn follow(&self, mut at: u32, key: u64) -> Option<u32> {
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
        let mut level = 0;
        let mut node = loop {
            let key = tree.node_key(level, local);
            match self.lookup(key) {
                Some(node) => break node,
                None if level + 1 == tree.levels => break self.create(key),
                None => level += 1,
            }
        };
        // From above: in the order of the file a node's children have numbers that follow each other.
        while level > 0 {
            let slot = (local >> (FANOUT_BITS * level)) % FANOUT;
            level -= 1;
            let child = self.create(tree.node_key(level, local));
            self.links[node as usize].adopt(slot as u32, child);
            let shared = &self.nodes.nodes[child as usize];
            shared.parent.store(node, Ordering::Relaxed);
            shared.slot.store(slot as u32, Ordering::Relaxed);
            node = child;
        }
        self.links[node as usize].present |= pages;
        node
    }

    /// The pages of a leaf that are in the cache.
    pub(crate) fn present_in(&self, leaf: u32) -> u64 {
        self.links[leaf as usize].present
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
        self.links[node as usize] = NodeLinks { key, present: 0, next: self.buckets[bucket], first: NONE };
        self.buckets[bucket] = node;
        self.nodes.nodes[node as usize].parent.store(NONE, Ordering::Relaxed);
        node
    }

    /// Takes pages of a leaf out; their marks must be clear, and nobody may hold their folio any more.
    pub(crate) fn remove(&mut self, tree: TreeId, local: u64, pages: u64) {
        for level in 0..tree.levels {
            let key = tree.node_key(level, local);
            let node = self.lookup(key).expect("a cached page has its path of tag nodes");
            let links = &mut self.links[node as usize];
            if level == 0 {
                links.present &= !pages;
            } else {
                links.disown(((local >> (FANOUT_BITS * level)) % FANOUT) as u32);
            }
            if links.present != 0 {
                return;
            }
            self.destroy(node);
        }
    }

    fn destroy(&mut self, node: u32) {
        for tag in [Tag::Dirty, Tag::ToWrite, Tag::Writeback, Tag::Poisoned] {
            debug_assert_eq!(self.nodes.word(node, tag), 0, "{tag:?} outlives its pages");
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

    /// Has the processor load what a pass needs of the leaf in which `local` lies, where the table finds that at once.
    #[inline]
    pub(crate) fn prefetch(&self, tree: TreeId, local: u64) {
        let leaf = self.buckets[self.bucket(tree.node_key(0, local))] as usize;
        prefetch(&self.links[leaf]);
        prefetch(&self.nodes.dirty_marks[leaf]);
        prefetch(&self.nodes.nodes[leaf]);
    }

    /// The first leaf with wanted pages in `range` (shard-local pages), and which pages those are.
    pub(crate) fn next(&self, tree: TreeId, find: Find, range: Range<u64>) -> Option<LeafPages> {
        if range.is_empty() {
            return None;
        }
        self.search(tree, self.root(tree)?, find, &range)
    }

    /// Searches below a node.
    fn search(&self, tree: TreeId, at: Subtree, find: Find, range: &Range<u64>) -> Option<LeafPages> {
        // Who finds dirty pages sets WRITEBACK next.
        prefetch(&self.nodes.nodes[at.node as usize]);
        let present = || self.links[at.node as usize].present;
        let word = match find {
            Find::Present => present(),
            Find::Tagged(tag) if at.level == 0 => self.nodes.word(at.node, tag),
            // A summary may say more than there is.
            Find::Tagged(tag) => self.nodes.word(at.node, tag) & present(),
        };
        let wanted = word & at.children_in(range);
        if at.level == 0 {
            return (wanted != 0).then_some(LeafPages { leaf: at.node, base: at.base, pages: wanted });
        }
        ones(wanted)
            .find_map(|slot| self.search(tree, at.child(slot, self.child(tree, at, slot)), find, range))
    }

    fn root(&self, tree: TreeId) -> Option<Subtree> {
        let level = tree.levels - 1;
        let node = self.lookup(tree.node_key(level, 0))?;
        Some(Subtree { node, level, base: 0 })
    }

    /// Adds TOWRITE to every DIRTY page of `range` (`tag_pages_for_writeback`).
    pub(crate) fn tag_for_writeback(&self, tree: TreeId, range: Range<u64>) {
        if !range.is_empty()
            && let Some(root) = self.root(tree)
        {
            self.tag_below(tree, root, &range);
        }
    }

    /// Tags below a node; true when anything below carries TOWRITE afterwards.
    fn tag_below(&self, tree: TreeId, at: Subtree, range: &Range<u64>) -> bool {
        let dirty = self.nodes.word(at.node, Tag::Dirty) & at.children_in(range);
        if at.level == 0 {
            return self.add_to_write(at.node, dirty);
        }
        // A summary may say more than there is.
        let dirty = dirty & self.links[at.node as usize].present;
        let mut tagged = 0;
        if dirty.count_ones() <= FEW {
            for slot in ones(dirty) {
                let child = at.child(slot, self.child(tree, at, slot));
                tagged |= u64::from(self.tag_below(tree, child, range)) << slot;
            }
        } else if at.level > 1 {
            let children = self.load_children(tree, at, dirty);
            let touch = |slot| self.touch_places_below(tree, at.child(slot, children[slot as usize]));
            std::hint::black_box(ones(dirty).fold(0, |touched, slot| touched | touch(slot)));
            for slot in ones(dirty) {
                let child = at.child(slot, children[slot as usize]);
                tagged |= u64::from(self.tag_below(tree, child, range)) << slot;
            }
        } else {
            tagged = self.tag_leaves(tree, at, dirty, range);
        }
        self.add_to_write(at.node, tagged)
    }

    /// Tags the leaves `dirty` of a node right above leaves, and returns which of them carry TOWRITE afterwards. This is
    /// where tagging spends its time.
    fn tag_leaves(&self, tree: TreeId, at: Subtree, dirty: u64, range: &Range<u64>) -> u64 {
        let is_inside = range.start <= at.base && at.base + FANOUT * FANOUT <= range.end;
        let tag = |slot: u32, leaf: u32| {
            let pages = if is_inside { u64::MAX } else { at.child(slot, leaf).children_in(range) };
            let tagged = self.add_to_write(leaf, self.nodes.word(leaf, Tag::Dirty) & pages);
            u64::from(tagged) << slot
        };
        let links = &self.links[at.node as usize];
        match links.child(0) {
            Some(first) if dirty == links.present => {
                (first..).zip(ones(dirty)).fold(0, |tagged, (leaf, slot)| tagged | tag(slot, leaf))
            }
            _ => {
                let children = self.load_children(tree, at, dirty);
                ones(dirty).fold(0, |tagged, slot| tagged | tag(slot, children[slot as usize]))
            }
        }
    }

    /// Adds TOWRITE to bits of a node; true when it has any then. The shard alone touches TOWRITE, so a load and a store do.
    #[inline]
    fn add_to_write(&self, node: u32, bits: u64) -> bool {
        let word = self.nodes.marks(node, Tag::ToWrite);
        let before = word.load(Ordering::Relaxed);
        if before | bits != before {
            word.store(before | bits, Ordering::Relaxed);
        }
        before | bits != 0
    }

    /// The number of a child that exists.
    #[inline]
    fn child(&self, tree: TreeId, at: Subtree, slot: u32) -> u32 {
        let known = self.links[at.node as usize].child(slot);
        known.unwrap_or_else(|| {
            self.lookup(at.child_key(tree, slot)).expect("a node's children are in the table")
        })
    }

    /// By slot, the numbers of those children of a node that are `wanted`, all of which exist.
    ///
    /// Where they aren't numbered in their order, each is somewhere in the table, and its words somewhere in memory. So all
    /// of that is loaded before any of it is looked at: it comes into the processor's cache together instead of one after the
    /// other.
    fn load_children(&self, tree: TreeId, at: Subtree, wanted: u64) -> [u32; FANOUT as usize] {
        let links = &self.links[at.node as usize];
        let mut children = [NONE; FANOUT as usize];
        if links.first != NONE {
            for slot in ones(wanted) {
                children[slot as usize] = links.first + links.before(slot).count_ones();
            }
            return children;
        }
        for slot in ones(wanted) {
            children[slot as usize] = self.buckets[self.bucket(at.child_key(tree, slot))];
        }
        let mut touched = 0;
        for slot in ones(wanted) {
            let first = children[slot as usize];
            touched |= self.links[first as usize].key | self.nodes.word(first, Tag::ToWrite);
        }
        std::hint::black_box(touched);
        for slot in ones(wanted) {
            let found = self.follow(children[slot as usize], at.child_key(tree, slot));
            children[slot as usize] = found.expect("a node's children are in the table");
        }
        children
    }

    /// Loads the parts of the table that say where the children of a node are, ahead of [`Self::load_children`]: for many nodes
    /// at once.
    fn touch_places_below(&self, tree: TreeId, at: Subtree) -> u32 {
        if self.links[at.node as usize].first != NONE {
            return 0;
        }
        let groups = (0..FANOUT as u32).step_by(NEIGHBOURS as usize);
        groups.fold(0, |touched, slot| touched | self.buckets[self.bucket(at.child_key(tree, slot))])
    }
}

/// A node on the way down, and what lies below it.
#[derive(Clone, Copy, Debug)]
struct Subtree {
    node: u32,
    level: u32,
    /// Its first page.
    base: u64,
}

impl Subtree {
    /// Pages of a child, as a power of two.
    #[inline]
    fn child_bits(self) -> u32 {
        FANOUT_BITS * self.level
    }

    /// The first page of the child at `slot`.
    #[inline]
    fn child_base(self, slot: u32) -> u64 {
        self.base + (u64::from(slot) << self.child_bits())
    }

    #[inline]
    fn child_key(self, tree: TreeId, slot: u32) -> u64 {
        tree.node_key(self.level - 1, self.child_base(slot))
    }

    /// The child at `slot`, whose number is `node`.
    #[inline]
    fn child(self, slot: u32, node: u32) -> Self {
        Self { node, level: self.level - 1, base: self.child_base(slot) }
    }

    /// The bits of the children that overlap `range`; of a leaf, of its pages.
    #[inline]
    fn children_in(self, range: &Range<u64>) -> u64 {
        children_in(range, self.base, self.child_bits())
    }
}

/// The numbers of the bits that are set, ascending.
fn ones(mut bits: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let first = (bits != 0).then(|| bits.trailing_zeros())?;
        bits &= bits - 1;
        Some(first)
    })
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
            steps in prop::collection::vec((0u8..6, 0u16..2, prop::sample::select(vec![0u64, 1, 63, 64, 65, 128, 192, 256, 4095, 4096, 4160, 8191, 70_000, 262_143])), 1..300),
            from in 0u64..5000, len in 1u64..300_000,
        ) {
            let mut trees = TagTree::new(TagTree::nodes_max(28, 2 * 262_144, 2));
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
                        let new: Vec<_> = sets[0].iter().filter(|p| p.0 == mapping && range.contains(&p.1)).copied().collect();
                        trees.tag_for_writeback(tree, range);
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

    proptest! {
        #[test]
        fn wb43_leaves_are_found_in_whatever_order_they_come_and_go(
            in_order in 0u64..8,
            toggled in prop::collection::vec(0u64..8, 0..40),
        ) {
            let tree = TreeId::new(0, 4096);
            let mut trees = TagTree::new(TagTree::nodes_max(8, 4096, 1));
            let mut cached: BTreeMap<u64, u32> = BTreeMap::new();
            for slot in (0..in_order).chain(toggled) {
                let page = 64 * slot;
                if cached.remove(&page).is_some() {
                    trees.remove(tree, page, 1);
                } else {
                    cached.insert(page, trees.insert(tree, page, 1));
                }
                let all: Vec<u64> = cached.keys().copied().collect();
                cached.values().for_each(|&leaf| { trees.nodes().set_dirty(leaf, 1); });
                trees.tag_for_writeback(tree, 0..4096);
                prop_assert_eq!(found(&trees, tree, Find::Tagged(Tag::Dirty), 0..4096), all.clone());
                prop_assert_eq!(found(&trees, tree, Find::Tagged(Tag::ToWrite), 0..4096), all);
                for &leaf in cached.values() {
                    trees.nodes().clear_owned(leaf, 1, Tag::ToWrite);
                    trees.nodes().clear_dirty(leaf, 1);
                }
            }
            prop_assert_eq!(trees.used(), cached.len() + usize::from(!cached.is_empty()));
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
