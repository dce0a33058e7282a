//! What was evicted lately (`workingset_refault`, WB-27).
//!
//! When a folio is evicted from the inactive queue, nothing can tell a page that will be wanted again in a moment from one
//! that a scan has left behind: neither was used enough. What tells them apart is whether the page comes back, and how
//! soon. So each evicted block leaves a *shadow entry*: a fingerprint of which it was. There are as many entries as frames;
//! a block that is still known when it is brought in again would have been a hit in a cache of twice the size, so it competes
//! with what the cache holds, and its folio is activated at once ([`reclaim`](super::reclaim)).
//!
//! ```text
//!  ┌────────┬────────┬── … ──┬────────┐   a set of 16 fingerprints of two bytes, in the order of eviction: a new one
//!  │ oldest │        │       │ newest │   pushes the oldest out. The block's hash chooses the set. An entry that was
//!  └────────┴────────┴── … ──┴────────┘   asked for leaves a gap (0) that grows old as if it were there.
//! ```
//!
//! So an entry's age is its place, and needs no clock: a set sees every so many evictions one. A fingerprint that fits by
//! chance, in one of some 4,000 look-ups, or a mapping that has another's slot now, activates a folio that hasn't earned it; it is
//! evicted from there. Nothing is allocated, and a hit pays nothing.

/// Entries of a set: half a cache line.
const SET: usize = 16;

#[derive(Clone, Debug)]
#[repr(align(32))]
struct ShadowSet([u16; SET]);

/// The shadow entries of one shard.
#[derive(Debug)]
pub(crate) struct Shadows {
    sets: Box<[ShadowSet]>,
}

impl Shadows {
    pub(crate) fn new(frames: u32) -> Self {
        let sets = (frames as usize).div_ceil(SET).max(1);
        Self { sets: vec![ShadowSet([0; SET]); sets].into_boxed_slice() }
    }

    /// Bytes of the table.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&*self.sets)
    }

    /// A block of a mapping was evicted.
    pub(crate) fn remember(&mut self, mapping: u16, block: u64) {
        let (at, fingerprint) = self.place(mapping, block);
        let set = &mut self.sets[at].0;
        set.copy_within(1.., 0);
        set[SET - 1] = fingerprint;
    }

    /// A block is brought in: whether it was evicted lately. It is forgotten with that.
    pub(crate) fn take(&mut self, mapping: u16, block: u64) -> bool {
        let (at, fingerprint) = self.place(mapping, block);
        // The newest first, should it be there twice.
        let found = self.sets[at].0.iter_mut().rev().find(|entry| **entry == fingerprint);
        found.is_some_and(|entry| std::mem::take(entry) != 0)
    }

    /// Loads the entries among which a block's may be, without looking at them.
    pub(crate) fn touch(&self, mapping: u16, block: u64) -> u64 {
        u64::from(self.sets[self.place(mapping, block).0].0[0])
    }

    /// The blocks `blocks` are brought in: how many of them were evicted lately.
    pub(crate) fn refaults(&mut self, mapping: u16, blocks: std::ops::Range<u64>) -> u64 {
        blocks.map(|block| u64::from(self.take(mapping, block))).sum()
    }

    /// In which set a block's entry is, and its fingerprint, which is never 0.
    fn place(&self, mapping: u16, block: u64) -> (usize, u16) {
        let mut hash = (block << 16 | u64::from(mapping)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        hash = (hash ^ hash >> 32).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        // The upper half, as a fraction of one, times the number of sets.
        let set = ((hash >> 32) * self.sets.len() as u64) >> 32;
        (set as usize, (hash as u16 ^ (hash >> 16) as u16).max(1))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn wb27_a_refault_is_one_only_once_and_only_of_its_block() {
        let mut shadows = Shadows::new(1024);
        shadows.remember(3, 77);
        assert!(!shadows.take(3, 78), "another block");
        assert!(!shadows.take(4, 77), "another mapping's");
        assert!(shadows.take(3, 77));
        assert!(!shadows.take(3, 77), "a second time");
    }

    #[test]
    fn wb27_what_was_evicted_is_known_for_about_as_many_evictions_as_there_are_frames() {
        for frames in [4096u32, 4096 + 700] {
            let known_after = |others: u64| {
                let mut shadows = Shadows::new(frames);
                (0..1000).for_each(|block| shadows.remember(2, block * 37));
                (0..others).for_each(|block| shadows.remember(2, (1 << 20) + block));
                (0..1000).filter(|block| shadows.take(2, block * 37)).count()
            };
            let frames = u64::from(frames);
            assert!(known_after(0) > 990, "{} at once", known_after(0));
            assert!(known_after(frames / 4) > 950, "{} soon", known_after(frames / 4));
            assert!(known_after(3 * frames) < 20, "{} long after", known_after(3 * frames));
        }
    }

    #[test]
    fn wb27_an_entry_that_was_asked_for_grows_old_as_if_it_were_there() {
        // One set: the seventeenth pushes the first out, whatever was taken between them.
        let mut shadows = Shadows::new(16);
        shadows.remember(1, 1000);
        for block in 0..15 {
            shadows.remember(1, block);
            assert!(shadows.take(1, block));
        }
        shadows.remember(1, 99);
        assert!(!shadows.take(1, 1000));
    }

    #[test]
    fn wb27_strangers_are_seldom_taken_for_what_was_evicted() {
        let mut shadows = Shadows::new(4096);
        (0..8192).for_each(|block| shadows.remember(2, block));
        let mistaken = (1 << 30..(1 << 30) + 100_000u64).filter(|&block| shadows.take(2, block)).count();
        assert!(mistaken < 60, "{mistaken} of 100,000");
    }
}
