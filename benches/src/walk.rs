//! Where the accesses of a measurement go: precomputed, random, and independent of each other.

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// Bytes of a page.
pub const PAGE: usize = foliant::PAGE_BYTES;

/// One access.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Page index.
    pub page: u32,
    /// Byte within the page, at an 8-byte boundary: a touch reads the word there.
    pub within: u32,
}

impl Step {
    /// The byte at which the page begins.
    pub fn page_start(self) -> usize {
        self.page as usize * PAGE
    }

    /// The byte of the word.
    pub fn word_start(self) -> usize {
        self.page_start() + self.within as usize
    }
}

/// A walk that visits each of `pages` pages once, in random order, and does so `passes` times, each time in another
/// order. The word within the page is random, too: words at one place of every page would compete for few cache
/// sets.
pub fn random(pages: u32, passes: usize, seed: u64) -> Vec<Step> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut order: Vec<u32> = (0..pages).collect();
    let mut walk = Vec::with_capacity(pages as usize * passes);
    for _ in 0..passes {
        order.shuffle(&mut rng);
        walk.extend(
            order.iter().map(|&page| Step { page, within: rng.random_range(0..PAGE as u32 / 8) * 8 }),
        );
    }
    walk
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_visits_every_page_once() {
        let mut pages: Vec<u32> = random(1000, 1, 7).iter().map(|step| step.page).collect();
        assert_ne!(pages, (0..1000).collect::<Vec<_>>());
        pages.sort_unstable();
        assert_eq!(pages, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn words_lie_within_their_page_and_are_aligned() {
        assert!(random(64, 3, 1).iter().all(|step| step.within % 8 == 0 && step.within as usize + 8 <= PAGE));
    }
}
