//! The look-up table of one shard: page key → frame.
//!
//! A fixed array of buckets, chained through the folio headers. The shard alone links and unlinks; any thread
//! walks without a lock. A walk beside a change may *miss* a folio that is there (the chain moved under it)
//! or meet one that isn't wanted any more; it is never wrong in a way that matters, because who finds a
//! frame pins it and checks its identity, and who finds none asks the shard, whose own look-up is exact.

use super::folio::{FolioHeader, FolioKey, FrameId, NONE};
use super::table::{Table, prefetch};
use crate::primitives::{AtomicU32, Ordering};

/// A walk that meets more headers than this gives up: it has been carried into other chains.
const WALK_MAX: usize = 64;

/// Neighbouring pages, this many as a power of two, share a cache line of buckets: a scan reads each once.
const NEIGHBOUR_BITS: u32 = 4;

#[derive(Debug)]
pub(crate) struct FolioIndex {
    groups: Table<Group>,
}

/// The buckets of neighbouring pages.
#[derive(Debug)]
#[repr(align(64))]
struct Group([AtomicU32; 1 << NEIGHBOUR_BITS]);

impl FolioIndex {
    /// A table for `frames` frames, with seven buckets for eight of them.
    ///
    /// # Errors
    /// The system's, when the memory can't be had.
    pub(crate) fn new(frames: usize) -> std::io::Result<Self> {
        let groups = (frames - frames / 8).div_ceil(1 << NEIGHBOUR_BITS).max(1);
        Ok(Self { groups: Table::new(groups, || Group(std::array::from_fn(|_| AtomicU32::new(NONE))))? })
    }

    /// Bytes that the table occupies.
    pub(crate) fn size_bytes(&self) -> usize {
        size_of_val(&*self.groups)
    }

    #[inline]
    fn bucket(&self, key: FolioKey) -> &AtomicU32 {
        // Fibonacci hashing of the group; the low bits stay in order inside the group.
        let hash = (key.0 >> NEIGHBOUR_BITS).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        // The hash's upper half as a fraction of one, of the groups: any number of them will do.
        let group = ((hash >> 32) * self.groups.len() as u64) >> 32;
        // SAFETY: a fraction of one, of what there are; no table has 2^32 groups, since there are no 2^36 frames.
        #[expect(unsafe_code, reason = "what stands in front of a page's bytes waits with them")]
        unsafe {
            std::hint::assert_unchecked((group as usize) < self.groups.len());
        }
        &self.groups[group as usize].0[key.0 as usize % (1 << NEIGHBOUR_BITS)]
    }

    /// The frame that seems to hold `key`. Any thread; the answer is a hint to pin and check.
    #[inline]
    pub(crate) fn find(&self, headers: &[FolioHeader], key: FolioKey) -> Option<FrameId> {
        self.find_entry(headers, key).map(|(frame, _)| frame)
    }

    /// As [`find`](Self::find), and the frame's header.
    #[inline]
    pub(crate) fn find_entry<'h>(
        &self,
        headers: &'h [FolioHeader],
        key: FolioKey,
    ) -> Option<(FrameId, &'h FolioHeader)> {
        self.walk(headers, key, |folio| folio.key() == key)
    }

    /// As [`find_entry`](Self::find_entry), for who knows better what `is_wanted`.
    #[inline]
    pub(super) fn walk<'h>(
        &self,
        headers: &'h [FolioHeader],
        key: FolioKey,
        mut is_wanted: impl FnMut(&FolioHeader) -> bool,
    ) -> Option<(FrameId, &'h FolioHeader)> {
        let mut at = self.bucket(key).load(Ordering::Acquire);
        for _ in 0..WALK_MAX {
            // NONE, too, is out of bounds.
            let folio = headers.get(at as usize)?;
            if is_wanted(folio) {
                return Some((FrameId(at), folio));
            }
            at = folio.bucket_next.load(Ordering::Acquire);
        }
        None
    }

    /// Loads the header that a look-up of `key` meets first, without looking at what it holds. Many of these overlap;
    /// look-ups one after the other wait for each header, since what they do next depends on it.
    #[inline]
    pub(crate) fn touch(&self, headers: &[FolioHeader], key: FolioKey) -> u64 {
        let first = self.bucket(key).load(Ordering::Relaxed);
        headers.get(first as usize).map_or(0, |folio| folio.key().0)
    }

    /// The frame that a look-up of `key` meets first, which may be none.
    #[inline]
    pub(crate) fn first_of_chain(&self, key: FolioKey) -> FrameId {
        FrameId(self.bucket(key).load(Ordering::Relaxed))
    }

    /// Has the bucket of `key` loaded.
    #[inline]
    pub(crate) fn prefetch(&self, key: FolioKey) {
        prefetch(self.bucket(key));
    }

    /// The frame that holds `key`. The shard only: nothing changes beside it, so the answer is exact.
    pub(crate) fn find_exact(&self, headers: &[FolioHeader], key: FolioKey) -> Option<FrameId> {
        let mut at = self.bucket(key).load(Ordering::Relaxed);
        while at != NONE {
            let folio = &headers[at as usize];
            if folio.key() == key {
                return Some(FrameId(at));
            }
            at = folio.bucket_next.load(Ordering::Relaxed);
        }
        None
    }

    /// Links a frame that was assigned its key. The shard only; `key` must not be linked already.
    pub(crate) fn insert(&self, headers: &[FolioHeader], frame: FrameId) {
        let folio = &headers[frame.0 as usize];
        let bucket = self.bucket(folio.key());
        folio.bucket_next.store(bucket.load(Ordering::Relaxed), Ordering::Relaxed);
        bucket.store(frame.0, Ordering::Release);
    }

    /// Unlinks a frozen frame before it loses its key. The shard only.
    pub(crate) fn remove(&self, headers: &[FolioHeader], frame: FrameId) {
        let folio = &headers[frame.0 as usize];
        let next = folio.bucket_next.load(Ordering::Relaxed);
        let mut link = self.bucket(folio.key());
        loop {
            let at = link.load(Ordering::Relaxed);
            assert_ne!(at, NONE, "frame {frame:?} is not in the bucket of its key");
            if at == frame.0 {
                link.store(next, Ordering::Release);
                return;
            }
            link = &headers[at as usize].bucket_next;
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::cache::folio::FolioOrder;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn headers(frames: usize) -> Vec<FolioHeader> {
        (0..frames).map(|_| FolioHeader::new()).collect()
    }

    proptest! {
        #[test]
        fn the_index_agrees_with_a_hash_map(steps in prop::collection::vec((0u16..3, 0u64..64, any::<bool>()), 1..400)) {
            let headers = headers(32);
            let index = FolioIndex::new(32).unwrap();
            let mut free: Vec<u32> = (0..32).collect();
            let mut model: HashMap<u64, FrameId> = HashMap::new();
            for (mapping, page, add) in steps {
                let key = FolioKey::new(mapping, page);
                if add && !model.contains_key(&key.0) {
                    let Some(frame) = free.pop() else { continue };
                    headers[frame as usize].assign(key, 0, FolioOrder(0));
                    index.insert(&headers, FrameId(frame));
                    model.insert(key.0, FrameId(frame));
                } else if !add && let Some(frame) = model.remove(&key.0) {
                    index.remove(&headers, frame);
                    headers[frame.0 as usize].scrub_frozen();
                    free.push(frame.0);
                }
                for mapping in 0..3 {
                    for page in 0..64 {
                        let key = FolioKey::new(mapping, page);
                        prop_assert_eq!(index.find_exact(&headers, key), model.get(&key.0).copied());
                        prop_assert_eq!(index.find(&headers, key), model.get(&key.0).copied());
                    }
                }
            }
        }
    }

    #[test]
    fn a_walk_through_a_chain_that_became_a_loop_ends() {
        let headers = headers(2);
        let index = FolioIndex::new(16).unwrap();
        let key = FolioKey::new(0, 0);
        headers[0].assign(key, 0, FolioOrder(0));
        index.insert(&headers, FrameId(0));
        // What a reader could see for a moment while frames move between chains.
        headers[0].bucket_next.store(0, Ordering::Relaxed);
        headers[0].assign(FolioKey::new(0, 16), 0, FolioOrder(0));
        assert_eq!(index.find(&headers, key), None);
    }
}
