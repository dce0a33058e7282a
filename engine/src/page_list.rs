//! The pages that a request for scattered pages names: a list of fixed length beside each reply slot.
//!
//! Who asks owns the list from when it has the slot until its message is sent; then the shard reads it, until it answers;
//! then it is the asker's again, until the slot is free. The message and the slot's state word order these three, so
//! plain (relaxed) accesses do. Lists of one message are a chain: so a batch of any size reaches its shard at
//! once, and is one batch for the device, too.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::reply::{GRANTS_MAX, SlotId};

/// No slot follows.
const NO_SLOT: u32 = u32::MAX;

/// Up to [`GRANTS_MAX`] pages, ascending, each with a number of the asker's own.
#[derive(Debug)]
pub(crate) struct PageList {
    count: AtomicU32,
    /// The next slot of the message.
    next: AtomicU32,
    tags: [AtomicU32; GRANTS_MAX],
    /// First pages of 4096 bytes.
    pages: [AtomicU64; GRANTS_MAX],
}

impl PageList {
    pub(crate) fn new() -> Self {
        Self {
            count: AtomicU32::new(0),
            next: AtomicU32::new(NO_SLOT),
            tags: [const { AtomicU32::new(0) }; GRANTS_MAX],
            pages: [const { AtomicU64::new(0) }; GRANTS_MAX],
        }
    }

    /// Empties the list of a slot that was just taken.
    pub(crate) fn clear(&self) {
        self.count.store(0, Ordering::Relaxed);
        self.next.store(NO_SLOT, Ordering::Relaxed);
    }

    pub(crate) fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed) as usize
    }

    /// Adds a page, in its place. There must be room.
    pub(crate) fn insert(&self, page: u64, tag: u32) {
        let count = self.len();
        let (pages, tags) = (&self.pages[..=count], &self.tags[..=count]);
        let mut at = count;
        // Neighbours that end up side by side are one command.
        while let Some(before) = at.checked_sub(1) {
            let listed = pages[before].load(Ordering::Relaxed);
            if listed <= page {
                break;
            }
            pages[at].store(listed, Ordering::Relaxed);
            tags[at].store(tags[before].load(Ordering::Relaxed), Ordering::Relaxed);
            at = before;
        }
        pages[at].store(page, Ordering::Relaxed);
        tags[at].store(tag, Ordering::Relaxed);
        self.count.store(count as u32 + 1, Ordering::Relaxed);
    }

    /// Whether `page` is the next behind the last page, where a page of the mapping has `block` of 4096 bytes, or that itself.
    pub(crate) fn is_followed_by(&self, page: u64, block: u64) -> bool {
        self.len().checked_sub(1).is_some_and(|last| page.wrapping_sub(self.page(last)) <= block)
    }

    pub(crate) fn page(&self, at: usize) -> u64 {
        self.pages[at].load(Ordering::Relaxed)
    }

    pub(crate) fn tag(&self, at: usize) -> u32 {
        self.tags[at].load(Ordering::Relaxed)
    }

    /// The pages; a page that was asked for twice is there twice.
    pub(crate) fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.len()).map(|at| self.page(at))
    }

    /// The slot that follows this one in its message.
    pub(crate) fn next(&self) -> Option<SlotId> {
        let next = self.next.load(Ordering::Relaxed);
        (next != NO_SLOT).then_some(SlotId(next))
    }

    pub(crate) fn set_next(&self, next: Option<SlotId>) {
        self.next.store(next.map_or(NO_SLOT, |slot| slot.0), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_ascend_in_whatever_order_they_come_and_keep_their_tags() {
        let list = PageList::new();
        for (tag, page) in [7, 3, 9, 3, 0, 8].into_iter().enumerate() {
            list.insert(page, tag as u32);
        }
        let listed: Vec<_> = (0..list.len()).map(|at| (list.page(at), list.tag(at))).collect();
        assert_eq!(listed, [(0, 4), (3, 1), (3, 3), (7, 0), (8, 5), (9, 2)]);
        assert_eq!(list.next(), None);
        assert!(list.is_followed_by(10, 1) && list.is_followed_by(9, 1), "the next, and the last itself");
        assert!(!list.is_followed_by(11, 1) && !list.is_followed_by(8, 1) && list.is_followed_by(13, 4));
        list.set_next(Some(SlotId(4)));
        assert_eq!(list.next(), Some(SlotId(4)));
        list.clear();
        assert_eq!((list.len(), list.next()), (0, None));
        assert!(!list.is_followed_by(0, 1), "nothing is in it");
    }
}
