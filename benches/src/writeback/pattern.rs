//! Which pages are dirtied, in which order, and how many commands that should come to.

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// A pattern of dirty pages.
#[derive(Clone, Copy, Debug)]
pub enum Pattern {
    /// Every page, in sequence.
    All,
    /// Every page, in random order.
    Shuffled,
    /// Every second page.
    EveryOther,
    /// Each page with probability one half, in random order.
    RandomHalf,
    /// Runs of 1 to 700 pages with gaps of 1 to 40 between them.
    Runs,
}

impl Pattern {
    /// The pages in the order in which they are dirtied.
    pub fn order(self, pages: u32) -> Vec<u32> {
        let mut rng = SmallRng::seed_from_u64(42);
        match self {
            Self::All => (0..pages).collect(),
            Self::Shuffled => {
                let mut order: Vec<u32> = (0..pages).collect();
                order.shuffle(&mut rng);
                order
            }
            Self::EveryOther => (0..pages).step_by(2).collect(),
            Self::RandomHalf => {
                let mut order: Vec<u32> = (0..pages).filter(|_| rng.random_bool(0.5)).collect();
                order.shuffle(&mut rng);
                order
            }
            Self::Runs => {
                let mut order = Vec::new();
                let mut at = 0;
                while at < pages {
                    let end = pages.min(at + rng.random_range(1..=700));
                    order.extend(at..end);
                    at = end + rng.random_range(1..=40);
                }
                order
            }
        }
    }
}

/// What one command may carry.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most pages of a command (MDTS, or the engine's own limit).
    pub command_pages: u64,
    /// No command crosses a multiple of this many pages (stripe, NOIOB).
    pub boundary_pages: u64,
}

impl Limits {
    /// The sum over the dirty runs of ⌈run ÷ command_pages⌉, runs ending at boundaries.
    pub fn commands(self, dirty: &[u32]) -> u64 {
        let mut dirty: Vec<u64> = dirty.iter().map(|&page| u64::from(page)).collect();
        dirty.sort_unstable();
        let runs =
            dirty.chunk_by(|&page, &next| next == page + 1 && !next.is_multiple_of(self.boundary_pages));
        runs.map(|run| (run.len() as u64).div_ceil(self.command_pages)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Limits = Limits { command_pages: 4, boundary_pages: u64::MAX };

    #[test]
    fn a_run_takes_as_many_commands_as_its_length_needs() {
        assert_eq!(FREE.commands(&[0, 1, 2, 3]), 1);
        assert_eq!(FREE.commands(&[4, 3, 2, 1, 0]), 2);
        assert_eq!(FREE.commands(&[0, 2, 4]), 3);
        assert_eq!(FREE.commands(&[]), 0);
    }

    #[test]
    fn no_command_crosses_a_boundary() {
        let limits = Limits { boundary_pages: 8, ..FREE };
        assert_eq!(limits.commands(&[6, 7, 8, 9]), 2);
        assert_eq!(limits.commands(&(0..16).collect::<Vec<_>>()), 4);
    }
}
