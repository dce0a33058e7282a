//! Where a mapping ends: the length that readers go by, and the one that writeback goes by (WB-12).
//!
//! A mapping may grow and shrink within its capacity. Bytes past its end are nobody's: a page in the cache that
//! reaches beyond it holds anything there, and writeback makes zeros of that before the device gets it
//! (`iomap_writepage_handle_eof`). So that this never hits live bytes, there are two numbers:
//!
//! | number | what goes by it | growing | shrinking |
//! |---|---|---|---|
//! | *len* | readers, and checks of what callers ask for | raised last, when everything before it holds its bytes | lowered first |
//! | *reach* | writeback | raised first, before any byte behind the old end is written | lowered last, when nobody holds a byte behind the new end |
//!
//! *reach* is never below *len*. Who dirties a byte behind the old end has raised *reach* before it took the page; the shard
//! looks at it after it has set WRITEBACK and found no holder ([`exclusion`](super::exclusion)): either it sees the
//! new *reach*, or the writer comes after it and waits.
//!
//! A shared pin shows a page up to *len* as it was after the pin had been taken. Who shrinks has, after lowering *len*, each
//! page behind the new end removed and the one across it exclusively once: no pin shows a byte behind *reach*, so that writeback
//! may change those bytes beside readers of the same page.
//!
//! One change of the length goes on at a time ([`EndChange`]). Nothing of this is on the device: who needs the length after a
//! restart keeps it elsewhere.

use super::folio::FolioOrder;
use super::frames::PAGE_BYTES;
use crate::primitives::{AtomicBool, AtomicU64, Mutex, Ordering};
use std::sync::PoisonError;

/// The end of one mapping.
#[derive(Debug)]
pub(crate) struct FileEnd {
    len: AtomicU64,
    reach: AtomicU64,
    /// Somebody changes the length.
    changing: AtomicBool,
    /// The mapping is closed: handles refuse.
    closed: AtomicBool,
    /// The pages that exist whole in a mapping that is open: what the shortest way to a page compares with, made of the
    /// two above. Under this lock.
    whole_pages: AtomicU64,
    making_whole_pages: Mutex<()>,
    page_bits: u32,
}

impl FileEnd {
    /// The end of a mapping that is open, with pages of `order`.
    pub(crate) fn new(len_bytes: u64, order: FolioOrder) -> Self {
        let page_bits = PAGE_BYTES.trailing_zeros() + u32::from(order.0);
        Self {
            len: AtomicU64::new(len_bytes),
            reach: AtomicU64::new(len_bytes),
            changing: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            whole_pages: AtomicU64::new(len_bytes >> page_bits),
            making_whole_pages: Mutex::new(()),
            page_bits,
        }
    }

    /// How many pages, from the first on, exist whole; 0 when the mapping is closed. Asked after a page was pinned, as
    /// [`len`](Self::len).
    #[inline]
    pub(crate) fn whole_pages(&self) -> u64 {
        self.whole_pages.load(Ordering::SeqCst)
    }

    /// Sets the length that readers go by.
    fn set_len(&self, len_bytes: u64) {
        self.len.store(len_bytes, Ordering::SeqCst);
        self.make_whole_pages();
    }

    /// After the length, or whether the mapping is closed, has changed: whoever is last here has seen both changes.
    fn make_whole_pages(&self) {
        let _making = self.making_whole_pages.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = if self.is_closed() { 0 } else { self.len() >> self.page_bits };
        self.whole_pages.store(whole, Ordering::SeqCst);
    }

    /// Closes the mapping: handles refuse from now on. False when it is closed already.
    pub(crate) fn close(&self) -> bool {
        let was_closed = self.closed.swap(true, Ordering::SeqCst);
        self.make_whole_pages();
        !was_closed
    }

    /// Opens it again.
    pub(crate) fn reopen(&self) {
        // What was done before a close that this takes back is seen afterwards: who closes may have noted why.
        self.closed.swap(false, Ordering::SeqCst);
        self.make_whole_pages();
    }

    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// The length. Asked after a pin was taken, it is what that pin may show.
    #[inline]
    pub(crate) fn len(&self) -> u64 {
        // Sequentially consistent with the possession of pages: see the module's documentation.
        self.len.load(Ordering::SeqCst)
    }

    /// The length that writeback goes by, asked when a page is locked.
    pub(crate) fn reach(&self) -> u64 {
        self.reach.load(Ordering::SeqCst)
    }

    /// Begins a change of the length, unless another one goes on.
    pub(crate) fn try_change(&self) -> Option<EndChange<'_>> {
        let free = self.changing.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
        free.is_ok().then(|| EndChange { end: self })
    }
}

/// The right to change the length of a mapping. Dropped half way, it leaves the length as it is then and *reach* above it: whoever
/// changes it next has first to remove what lies between.
#[derive(Debug)]
#[must_use = "another change can't begin before this one is dropped"]
pub(crate) struct EndChange<'a> {
    end: &'a FileEnd,
}

impl EndChange<'_> {
    /// The length, which nobody else changes.
    pub(crate) fn len(&self) -> u64 {
        self.end.len()
    }

    /// Up to where bytes may be held behind the length: beyond it where an earlier change couldn't be ended.
    pub(crate) fn reach(&self) -> u64 {
        self.end.reach()
    }

    /// Says that bytes up to `len_bytes` are going to be written: before the first page behind the end is taken.
    pub(crate) fn extend_to(&self, len_bytes: u64) {
        debug_assert!(self.len() <= len_bytes && self.reach() == self.len());
        self.end.reach.store(len_bytes, Ordering::SeqCst);
    }

    /// Everything up to *reach* holds its bytes: it can be read.
    pub(crate) fn publish(self) {
        self.end.set_len(self.reach());
    }

    /// From now on nobody gets at bytes behind `len_bytes`; who has them already may have them still.
    pub(crate) fn shrink_to(&self, len_bytes: u64) {
        debug_assert!(len_bytes <= self.len());
        self.end.set_len(len_bytes);
    }

    /// Nobody has bytes behind the length any more.
    pub(crate) fn settle(&self) {
        self.end.reach.store(self.len(), Ordering::SeqCst);
    }

    /// Gives up an extension that hasn't been published and under which nothing is going on any more: nobody has seen anything of
    /// what was written behind the length.
    pub(crate) fn give_up_extending(&self) {
        self.settle();
    }
}

impl Drop for EndChange<'_> {
    fn drop(&mut self) {
        self.end.changing.store(false, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn wb12_pages_are_whole_up_to_the_end_of_an_open_mapping() {
        let end = FileEnd::new(20_000, FolioOrder(1));
        assert_eq!(end.whole_pages(), 2);
        let change = end.try_change().unwrap();
        change.extend_to(40_960);
        assert_eq!(end.whole_pages(), 2, "not before it is published");
        change.publish();
        assert_eq!(end.whole_pages(), 5);
        let change = end.try_change().unwrap();
        change.shrink_to(32_767);
        assert_eq!(end.whole_pages(), 3, "before who has what is cut off is waited for");
        drop(change);
        assert!(end.close() && !end.close(), "of two that close it one does");
        assert_eq!(end.whole_pages(), 0);
        end.try_change().unwrap().shrink_to(8191);
        assert_eq!(end.whole_pages(), 0, "it is closed still");
        end.reopen();
        assert_eq!(end.whole_pages(), 0, "and short now");
        let change = end.try_change().unwrap();
        change.settle();
        change.extend_to(8192);
        change.publish();
        assert_eq!(end.whole_pages(), 1);
    }

    #[test]
    fn wb12_one_change_at_a_time_and_reach_is_never_below_the_length() {
        let end = FileEnd::new(100, FolioOrder(0));
        let change = end.try_change().unwrap();
        assert!(end.try_change().is_none());
        assert!(end.try_change().is_none(), "who is refused doesn't let others in");
        change.extend_to(300);
        assert_eq!((end.len(), end.reach()), (100, 300));
        change.publish();
        assert_eq!((end.len(), end.reach()), (300, 300));
        let change = end.try_change().unwrap();
        change.shrink_to(50);
        drop(change);
        assert_eq!(
            (end.len(), end.reach()),
            (50, 300),
            "given up midway: the next change sees what is left to do"
        );
        let change = end.try_change().unwrap();
        change.settle();
        change.extend_to(60);
        change.give_up_extending();
        drop(change);
        assert_eq!((end.len(), end.reach()), (50, 50));
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use super::super::exclusion::{leaf_bit, lock_for_writeback, try_exclusive};
    use super::super::folio::{Access, FolioHeader, FolioKey, Released};
    use super::super::tags::{Tag, TagNodes, TagTree, TreeId};
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    const TREE: TreeId = TreeId { mapping: 1, levels: 2 };
    const KEY: FolioKey = FolioKey::new(1, 1);
    /// The byte that the models are about lies behind the short length and before the long one.
    const SHORT: u64 = 4096;
    const LONG: u64 = 8192;

    struct Model {
        end: FileEnd,
        folio: FolioHeader,
        marks: std::sync::Arc<TagNodes>,
        leaf: u32,
        byte: UnsafeCell<u64>,
    }

    fn model(len_bytes: u64) -> Arc<Model> {
        let mut trees = TagTree::new(4);
        let leaf = trees.insert(TREE, 1, leaf_bit(1));
        let marks = trees.nodes().clone();
        let folio = FolioHeader::new();
        folio.assign(KEY, leaf, FolioOrder(0));
        folio.publish();
        folio.fill(1);
        marks.set_dirty(leaf, leaf_bit(1));
        Arc::new(Model {
            end: FileEnd::new(len_bytes, FolioOrder(0)),
            folio,
            marks,
            leaf,
            byte: UnsafeCell::new(7),
        })
    }

    impl Model {
        fn take(&self) -> Result<(), Released> {
            try_exclusive(&self.folio, &self.folio, &self.marks, KEY, (FolioOrder(0), 0), Access::Change)
        }

        fn put(&self, value: u64) {
            self.byte.with_mut(|byte| {
                // SAFETY: exclusive possession, or a lock for writeback and no pin that shows the byte; loom checks it.
                #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                unsafe {
                    *byte = value;
                }
            });
        }

        fn look(&self) -> u64 {
            self.byte.with(|byte| {
                // SAFETY: a pin that shows the byte, or a lock for writeback; loom checks it.
                #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                unsafe {
                    *byte
                }
            })
        }

        /// As a pass does; what the device then has.
        fn write_back(&self) -> Option<u64> {
            let bit = leaf_bit(1);
            if lock_for_writeback(&self.marks, self.leaf, bit, |_| (&self.folio, u64::MAX)).locked == 0 {
                return None;
            }
            if self.end.reach() <= SHORT {
                self.put(0);
            }
            self.marks.clear_dirty(self.leaf, bit);
            let on_device = self.look();
            self.marks.clear_owned(self.leaf, bit, Tag::Writeback);
            Some(on_device)
        }
    }

    /// A writer that extends beside a pass over the last page: what it writes behind the old end stays, and is either in what
    /// the device has or leaves the page dirty.
    #[test]
    fn loom_wb12_a_pass_beside_a_writer_that_extends_never_zeroes_live_bytes() {
        loom::model(|| {
            let model = model(SHORT);
            let writer = {
                let model = model.clone();
                thread::spawn(move || {
                    let change = model.end.try_change().expect("nobody else changes it");
                    change.extend_to(LONG);
                    if model.take().is_err() {
                        return false;
                    }
                    model.put(99);
                    if model.marks.marked(model.leaf, Tag::Dirty) & leaf_bit(1) == 0 {
                        model.marks.set_dirty(model.leaf, leaf_bit(1));
                    }
                    let _ = model.folio.release_exclusive_changed(1);
                    change.publish();
                    true
                })
            };
            let on_device = model.write_back();
            if writer.join().unwrap() {
                assert_eq!(model.look(), 99);
                let dirty = model.marks.marked(model.leaf, Tag::Dirty) != 0;
                assert!(on_device == Some(99) || dirty, "the device lacks what was appended");
            }
        });
    }

    /// A mapping is shortened beside a reader: when a pass makes zeros of what was cut off, nobody reads it any more.
    #[test]
    fn loom_wb12_no_reader_shows_what_a_pass_zeroes() {
        loom::model(|| {
            let model = model(LONG);
            let reader = {
                let model = model.clone();
                thread::spawn(move || {
                    if model.folio.try_pin(0, || model.folio.key() == KEY).is_ok() {
                        // The length after the pin.
                        if model.end.len() > SHORT {
                            assert_eq!(model.look(), 7);
                        }
                        let _ = model.folio.unpin();
                    }
                })
            };
            let change = model.end.try_change().expect("nobody else changes it");
            change.shrink_to(SHORT);
            // The reader has it? Then this change isn't ended, and the pass writes the page as it is.
            if model.take().is_ok() {
                let _ = model.folio.release_exclusive_unchanged();
                change.settle();
            }
            drop(change);
            model.write_back();
            reader.join().unwrap();
        });
    }
}
