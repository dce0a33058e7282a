//! What was evicted lately (`workingset_refault`, WB-27).
//!
//! The eviction hand can't tell a page that will be wanted again in a moment from one that a scan has left behind: both were used
//! once since it last passed. What tells them apart is whether the page comes back, and how soon. So each evicted block
//! leaves a *shadow entry*: a fingerprint of which it was, and the eviction clock, which counts evicted pages. When a block
//! is brought in again, the clock's difference is its *refault distance*: with that many frames more it would have been a
//! hit. If that is no more than there are frames, it competes with what the cache holds, and its folio is **hot**: the hand
//! passes it a few times more before it is cold ([`FolioHeader::set_hot`](super::folio::FolioHeader::set_hot)).
//!
//! ```text
//!  31           16 15            0
//! ┌───────────────┬───────────────┐   as many entries as frames, up to the next power of two; neighbouring blocks share a
//! │ clock, ticks  │ fingerprint   │   cache line. An entry lasts until another takes its place: about as long as it matters.
//! └───────────────┴───────────────┘
//! ```
//!
//! A fingerprint that fits by chance, one in 65,535, or a mapping that has another's slot now, makes a folio hot that
//! isn't: it costs a few turns of the hand. Nothing is allocated, and a hit pays nothing.

/// Blocks whose entries lie side by side: a cache line of them.
const GROUP: u64 = 16;

/// The shadow entries of one shard.
#[derive(Debug)]
pub(crate) struct Shadows {
    entries: Box<[u32]>,
    frames: u64,
    /// Evicted pages a tick: the clock's 16 bits go round in many times what matters.
    tick_pages: u64,
}

/// What is known of blocks that are brought in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Refault {
    /// Blocks that were evicted not long ago.
    pub blocks: u64,
    /// Of those, blocks whose refault distance is no more than the number of frames.
    pub hot: u64,
}

impl Shadows {
    pub(crate) fn new(frames: u32) -> Self {
        let count = (frames as usize).next_power_of_two().max(GROUP as usize);
        let tick_pages = (u64::from(frames) / 4096).max(1);
        Self { entries: vec![0; count].into_boxed_slice(), frames: u64::from(frames), tick_pages }
    }

    /// Bytes of the table.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&*self.entries)
    }

    /// A block of a mapping was evicted; the clock stands at `evicted` pages.
    pub(crate) fn remember(&mut self, mapping: u16, block: u64, evicted: u64) {
        let (at, fingerprint) = self.place(mapping, block);
        self.entries[at] = u32::from(self.ticks(evicted)) << 16 | u32::from(fingerprint);
    }

    /// A block is brought in: how many pages were evicted since it was, if that is known. Its entry is free.
    pub(crate) fn take(&mut self, mapping: u16, block: u64, evicted: u64) -> Option<u64> {
        let (at, fingerprint) = self.place(mapping, block);
        let entry = self.entries[at];
        if entry as u16 != fingerprint {
            return None;
        }
        self.entries[at] = 0;
        Some(u64::from(self.ticks(evicted).wrapping_sub((entry >> 16) as u16)) * self.tick_pages)
    }

    /// The blocks `blocks` are brought in.
    pub(crate) fn refault(&mut self, mapping: u16, blocks: std::ops::Range<u64>, evicted: u64) -> Refault {
        let frames = self.frames;
        blocks.fold(Refault::default(), |mut refault, block| {
            if let Some(distance) = self.take(mapping, block, evicted) {
                refault.blocks += 1;
                refault.hot += u64::from(distance <= frames);
            }
            refault
        })
    }

    fn ticks(&self, evicted: u64) -> u16 {
        (evicted / self.tick_pages) as u16
    }

    /// Where a block's entry is, and its fingerprint, which is never 0.
    fn place(&self, mapping: u16, block: u64) -> (usize, u16) {
        // Fibonacci hashing: the upper bits of the product are well mixed.
        let key = (block / GROUP) << 16 | u64::from(mapping);
        let hash = key.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let groups = self.entries.len() as u64 / GROUP;
        let group = (hash >> 32) & (groups - 1);
        let fingerprint = ((hash >> 16) as u16 ^ (hash >> 48) as u16).max(1);
        ((group * GROUP + block % GROUP) as usize, fingerprint)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn wb27_the_distance_is_what_was_evicted_since() {
        let mut shadows = Shadows::new(1024);
        shadows.remember(3, 77, 1000);
        assert_eq!(shadows.take(3, 78, 1000), None, "another block");
        assert_eq!(shadows.take(4, 77, 1000), None, "another mapping's");
        assert_eq!(shadows.take(3, 77, 1500), Some(500));
        assert_eq!(shadows.take(3, 77, 1500), None, "a refault is one only once");
    }

    #[test]
    fn wb27_the_distance_counts_in_ticks_of_large_caches_and_over_the_clocks_wrap() {
        let frames = 1 << 20;
        let mut shadows = Shadows::new(frames);
        for evicted in [0u64, 12_345_678, 65_535 * 256, 65_536 * 256 - 1, 1 << 40] {
            for distance in [0u64, 255, 256, 100_000, 1 << 20, 4 << 20] {
                shadows.remember(1, 5, evicted);
                let found = shadows.take(1, 5, evicted + distance).unwrap();
                assert!(found.abs_diff(distance) <= 256, "{found} for {distance} at {evicted}");
            }
        }
    }

    #[test]
    fn wb27_a_refault_is_hot_up_to_the_number_of_frames() {
        let mut shadows = Shadows::new(64);
        for block in 0..16 {
            shadows.remember(1, block, 10 * block);
        }
        assert_eq!(
            shadows.refault(1, 8..20, 190),
            Refault { blocks: 8, hot: 3 },
            "64 evictions ago or fewer"
        );
    }

    #[test]
    fn wb27_entries_of_many_blocks_are_spread_and_seldom_mistaken() {
        let frames = 4096u32;
        let mut shadows = Shadows::new(frames);
        for block in 0..u64::from(frames) {
            shadows.remember(2, block * 37, block);
        }
        let found =
            (0..u64::from(frames)).filter(|block| shadows.take(2, block * 37, 4096).is_some()).count();
        assert!(found > 2000, "{found} of {frames} are remembered");
        for block in 0..u64::from(frames) {
            shadows.remember(2, block, block);
        }
        let mistaken =
            (1 << 30..(1 << 30) + 100_000u64).filter(|&block| shadows.take(2, block, 4096).is_some());
        assert!(mistaken.count() < 20);
    }
}
