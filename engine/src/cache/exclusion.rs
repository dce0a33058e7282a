//! How exclusive holders and writeback keep out of each other's way.
//!
//! Possession stands in a folio's state word, WRITEBACK in the marks of its pages. Each side announces itself first
//! and looks at the other's word afterwards:
//!
//! ```text
//!   who wants the folio exclusively          the shard, for a pass
//!   1. EXCLUSIVE into the state word         1. WRITEBACK into the leaf, for up to 64 pages at once
//!   2. WRITEBACK set? give EXCLUSIVE back    2. EXCLUSIVE set? take WRITEBACK off that page again
//! ```
//!
//! All four accesses are sequentially consistent, so at least one side sees the other; where both do, both step back:
//! the thread asks the shard, which knows what it did. Shared holders do not take part: readers never hold up the device.
//!
//! DIRTY is set under exclusive possession, before it is given back, and cleared by the shard after step 2 has found
//! nobody: a change is in what the device reads, or leaves its page dirty.

use super::folio::{Access, FolioHeader, FolioKey, FolioOrder, Identity, Released};
use super::tags::{Tag, TagNodes};
#[cfg(loom)]
use crate::primitives::{Ordering, fence};

/// Pages a leaf of the marks: a page's place in its leaf is its index modulo this.
pub(crate) const LEAF_PAGES: u64 = 64;

/// The page's bit in the words of its leaf. Stripes are whole leaves, so that a page has the same place in its leaf
/// whether it is counted in the file or in its shard.
#[inline]
pub(crate) fn leaf_bit(page: u64) -> u64 {
    1 << (page % LEAF_PAGES)
}

/// What loom doesn't know of: it takes sequentially consistent accesses for acquire and release.
#[inline]
pub(super) fn between_announcing_and_looking() {
    #[cfg(loom)]
    fence(Ordering::SeqCst);
}

/// The bits of the pages from `page` on, as many as follow within its leaf but at most `pages`.
#[inline]
pub(crate) fn leaf_bits(page: u64, pages: u64) -> u64 {
    let slot = page % LEAF_PAGES;
    let count = pages.min(LEAF_PAGES - slot);
    u64::MAX >> (LEAF_PAGES - count) << slot
}

/// Takes a folio exclusively for any thread, for the page of `own`, if that still is the page `key`, nobody has the
/// folio, and the device doesn't read that page. `head` is the folio's head and `within` the page's place in it.
#[inline]
pub(crate) fn try_exclusive(
    head: &FolioHeader,
    own: &FolioHeader,
    marks: &TagNodes,
    key: FolioKey,
    (order, within): (FolioOrder, u64),
    access: Access,
) -> Result<(), Released> {
    head.try_exclusive(within, access, || own.identity() == Identity::new(key, order))?;
    between_announcing_and_looking();
    if marks.marked(own.tag_leaf(), Tag::Writeback) & leaf_bit(key.page()) == 0 {
        return Ok(());
    }
    Err(head.release_exclusive_unchanged())
}

/// As [`try_exclusive`], also while the device reads the page (WB-25, unstable mappings).
///
/// The page's WRITEBACK may be that of a pass which has just locked it and hasn't submitted it yet: it looks at the bytes then,
/// and may make zeros of some. So the shard names the leaf whose pages it locks, before it sets WRITEBACK, until they are
/// submitted or given back; a page of that leaf isn't taken. Where the write was submitted before, the page is in flight for
/// any later pass, which leaves it alone.
#[inline]
pub(crate) fn try_exclusive_beside_device(
    head: &FolioHeader,
    own: &FolioHeader,
    marks: &TagNodes,
    key: FolioKey,
    (order, within): (FolioOrder, u64),
    access: Access,
) -> Result<(), Released> {
    head.try_exclusive(within, access, || own.identity() == Identity::new(key, order))?;
    between_announcing_and_looking();
    if closed_beside_device(marks, own.tag_leaf()) & leaf_bit(key.page()) == 0 {
        return Ok(());
    }
    Err(head.release_exclusive_unchanged())
}

/// Which pages of a leaf mustn't be changed though their writer doesn't care what the device gets: those that a pass has at hand,
/// and poisoned ones that are tried again, since whether they are poisoned is decided by that write.
pub(crate) fn closed_beside_device(marks: &TagNodes, leaf: u32) -> u64 {
    let under_writeback = marks.marked(leaf, Tag::Writeback);
    if under_writeback == 0 || marks.is_being_locked(leaf) {
        return under_writeback;
    }
    under_writeback & marks.marked(leaf, Tag::Poisoned)
}

/// What came of locking pages of one leaf for writeback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LeafLock {
    /// Locked: WRITEBACK, and nobody changes them.
    pub locked: u64,
    /// Not locked, because somebody holds them exclusively.
    pub held: u64,
    /// Not locked, because an earlier write of them is still in flight.
    pub in_flight: u64,
}

/// Locks the pages `wanted` of `leaf`, as far as they can be had now. `folio_of` finds the folio of a slot of the leaf,
/// and which slots it covers. The shard only.
pub(crate) fn lock_for_writeback<'f>(
    marks: &TagNodes,
    leaf: u32,
    wanted: u64,
    folio_of: impl Fn(u32) -> (&'f FolioHeader, u64),
) -> LeafLock {
    let in_flight = wanted & marks.marked(leaf, Tag::Writeback);
    let tried = wanted & !in_flight;
    if tried == 0 {
        return LeafLock { locked: 0, held: 0, in_flight };
    }
    marks.begin_locking(leaf);
    marks.set_writeback(leaf, tried);
    between_announcing_and_looking();
    let (mut held, mut rest) = (0, tried);
    while rest != 0 {
        let (folio, covered) = folio_of(rest.trailing_zeros());
        if folio.is_exclusive() {
            held |= rest & covered;
        }
        rest &= !covered;
    }
    if held != 0 {
        marks.clear_owned(leaf, held, Tag::Writeback);
    }
    LeafLock { locked: tried & !held, held, in_flight }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::cache::tags::{TagTree, TreeId};

    const TREE: TreeId = TreeId { mapping: 3, levels: 2 };
    const KEY: FolioKey = FolioKey::new(3, 70);

    fn take(folio: &FolioHeader, marks: &TagNodes) -> Result<(), Released> {
        try_exclusive(folio, folio, marks, KEY, (FolioOrder(0), 0), Access::Change)
    }

    fn cached() -> (TagTree, FolioHeader) {
        let mut trees = TagTree::new(8);
        let leaf = trees.insert(TREE, 70, leaf_bit(70));
        let folio = FolioHeader::new();
        folio.assign(KEY, leaf, FolioOrder(0));
        folio.publish();
        folio.fill(1);
        (trees, folio)
    }

    #[test]
    fn wb25_a_folio_under_writeback_can_be_read_but_not_taken_exclusively() {
        let (trees, folio) = cached();
        let marks = trees.nodes();
        let lock = lock_for_writeback(marks, folio.tag_leaf(), leaf_bit(70), |_| (&folio, u64::MAX));
        assert_eq!(lock.locked, leaf_bit(70));
        assert!(take(&folio, marks).is_err());
        assert!(!folio.state().exclusive(), "the attempt leaves no trace");
        assert!(folio.try_pin(0, || true).is_ok());
        let _ = folio.unpin();
        marks.clear_owned(folio.tag_leaf(), leaf_bit(70), Tag::Writeback);
        assert!(take(&folio, marks).is_ok());
    }

    #[test]
    fn wb06_an_exclusive_and_an_in_flight_folio_are_not_locked() {
        let (trees, folio) = cached();
        let (marks, bit) = (trees.nodes(), leaf_bit(70));
        take(&folio, marks).unwrap();
        let lock = lock_for_writeback(marks, folio.tag_leaf(), bit, |_| (&folio, u64::MAX));
        assert_eq!(lock, LeafLock { locked: 0, held: bit, in_flight: 0 });
        assert_eq!(marks.marked(folio.tag_leaf(), Tag::Writeback), 0, "the attempt leaves no trace");
        let _ = folio.release_exclusive_changed(1);
        lock_for_writeback(marks, folio.tag_leaf(), bit, |_| (&folio, u64::MAX));
        let lock = lock_for_writeback(marks, folio.tag_leaf(), bit, |_| (&folio, u64::MAX));
        assert_eq!(lock, LeafLock { locked: 0, held: 0, in_flight: bit });
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use super::*;
    use crate::cache::tags::{TagTree, TreeId};
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    const TREE: TreeId = TreeId { mapping: 1, levels: 2 };
    const KEY: FolioKey = FolioKey::new(1, 1);

    fn take(folio: &FolioHeader, marks: &TagNodes) -> Result<(), Released> {
        try_exclusive(folio, folio, marks, KEY, (FolioOrder(0), 0), Access::Change)
    }

    /// A writer and the shard's writeback: the device reads the bytes only while nobody changes them, and a
    /// change is either in what the device read or leaves the page dirty.
    #[test]
    fn loom_a_change_is_written_or_the_page_stays_dirty() {
        loom::model(|| {
            let mut trees = TagTree::new(4);
            let leaf = trees.insert(TREE, 1, leaf_bit(1));
            let marks = trees.nodes().clone();
            let folio = Arc::new((FolioHeader::new(), UnsafeCell::new(0u64)));
            folio.0.assign(KEY, leaf, FolioOrder(0));
            folio.0.publish();
            folio.0.fill(1);
            marks.set_dirty(leaf, leaf_bit(1));
            let writer = {
                let (folio, marks) = (folio.clone(), marks.clone());
                thread::spawn(move || {
                    if take(&folio.0, &marks).is_err() {
                        return false;
                    }
                    folio.1.with_mut(|bytes| {
                        // SAFETY: exclusive possession; loom checks it.
                        #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                        unsafe {
                            *bytes = 99;
                        }
                    });
                    if marks.marked(leaf, Tag::Dirty) & leaf_bit(1) == 0 {
                        marks.set_dirty(leaf, leaf_bit(1));
                    }
                    let _ = folio.0.release_exclusive_changed(1);
                    true
                })
            };
            let mut on_device = None;
            if lock_for_writeback(&marks, leaf, leaf_bit(1), |_| (&folio.0, u64::MAX)).locked != 0 {
                marks.clear_dirty(leaf, leaf_bit(1));
                folio.1.with(|bytes| {
                    // SAFETY: under writeback nobody changes the bytes; loom checks it.
                    #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                    let value = unsafe { *bytes };
                    on_device = Some(value);
                });
                marks.clear_owned(leaf, leaf_bit(1), Tag::Writeback);
            }
            let changed = writer.join().unwrap();
            if changed {
                assert!(on_device == Some(99) || marks.marked(leaf, Tag::Dirty) != 0);
            }
        });
    }

    /// A writer that doesn't wait for the device beside two passes: nothing changes while a pass has the page at hand, and the
    /// last change is in what the device reads last, or leaves the page dirty.
    #[test]
    fn loom_wb25_a_change_beside_the_device_is_written_or_the_page_stays_dirty() {
        loom::model(|| {
            let mut trees = TagTree::new(4);
            let leaf = trees.insert(TREE, 1, leaf_bit(1));
            let marks = trees.nodes().clone();
            // The header, the bytes as the device reads them, and what a pass's user may look at.
            let bytes = (crate::primitives::AtomicU64::new(0), UnsafeCell::new(0u64));
            let folio = Arc::new((FolioHeader::new(), bytes));
            folio.0.assign(KEY, leaf, FolioOrder(0));
            folio.0.publish();
            folio.0.fill(1);
            marks.set_dirty(leaf, leaf_bit(1));
            let writer = {
                let (folio, marks) = (folio.clone(), marks.clone());
                thread::spawn(move || {
                    let at = (FolioOrder(0), 0);
                    let taken =
                        try_exclusive_beside_device(&folio.0, &folio.0, &marks, KEY, at, Access::Change);
                    if taken.is_err() {
                        return false;
                    }
                    folio.1.1.with_mut(|bytes| {
                        // SAFETY: exclusive possession of what no pass has at hand; loom checks it.
                        #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                        unsafe {
                            *bytes = 99;
                        }
                    });
                    folio.1.0.store(99, Ordering::Relaxed);
                    marks.set_dirty(leaf, leaf_bit(1));
                    let _ = folio.0.release_exclusive_changed(1);
                    true
                })
            };
            let mut on_device = None;
            let bit = leaf_bit(1);
            if lock_for_writeback(&marks, leaf, bit, |_| (&folio.0, u64::MAX)).locked != 0 {
                folio.1.1.with(|bytes| {
                    // SAFETY: at hand, so nobody changes them; loom checks it.
                    #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                    let _seen = unsafe { *bytes };
                });
                marks.clear_dirty(leaf, bit);
                marks.end_locking();
                on_device = Some(folio.1.0.load(Ordering::Relaxed));
                marks.clear_owned(leaf, bit, Tag::Writeback);
            } else {
                marks.end_locking();
            }
            if writer.join().unwrap() {
                assert!(on_device == Some(99) || marks.marked(leaf, Tag::Dirty) != 0);
            }
        });
    }

    /// Eviction looks at the marks after it froze the folio: what a thread dirtied before is seen, and after that nobody
    /// can dirty it.
    #[test]
    fn loom_a_dirtied_folio_is_not_evicted() {
        loom::model(|| {
            let mut trees = TagTree::new(4);
            let leaf = trees.insert(TREE, 1, leaf_bit(1));
            let marks = trees.nodes().clone();
            let folio = Arc::new(FolioHeader::new());
            folio.assign(KEY, leaf, FolioOrder(0));
            folio.publish();
            folio.fill(1);
            let writer = {
                let (folio, marks) = (folio.clone(), marks.clone());
                thread::spawn(move || {
                    let taken = take(&folio, &marks).is_ok();
                    if taken {
                        marks.set_dirty(leaf, leaf_bit(1));
                        let _ = folio.release_exclusive_changed(1);
                    }
                    taken
                })
            };
            let mut evicted = false;
            if folio.freeze_unused() {
                evicted = marks.marked(leaf, Tag::Dirty) == 0;
                if !evicted {
                    folio.thaw();
                }
            }
            let dirtied = writer.join().unwrap();
            assert!(!(evicted && dirtied), "a dirty page is thrown away");
        });
    }
}
