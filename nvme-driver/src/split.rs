//! Splitting a run of blocks into commands: at the largest transfer, and where it would cross a boundary that the
//! device would rather not have crossed (NOIOB). Pure arithmetic.

use crate::namespace::Lba;

/// The commands that a run of blocks becomes, in order of their addresses.
#[derive(Clone, Debug)]
pub(crate) struct Split {
    next: u64,
    left: u32,
    blocks_max: u32,
    /// Multiples of this many blocks aren't crossed; 0 for no such boundary.
    boundary_blocks: u32,
}

impl Split {
    /// Splits `blocks` blocks from `lba` into commands of at most `blocks_max` (at least 1) blocks.
    pub(crate) fn new(lba: Lba, blocks: u32, blocks_max: u32, boundary_blocks: u32) -> Self {
        debug_assert!(blocks_max > 0, "a command transfers at least one block");
        Self { next: lba.0, left: blocks, blocks_max, boundary_blocks }
    }

    /// Whether the run fits into one command.
    #[inline]
    pub(crate) fn is_single(&self) -> bool {
        self.left <= self.blocks_max && u64::from(self.left) <= self.blocks_to_boundary()
    }

    /// How many commands the run becomes.
    pub(crate) fn commands(&self) -> u32 {
        self.clone().fold(0, |commands, _| commands + 1)
    }

    #[inline]
    fn blocks_to_boundary(&self) -> u64 {
        match u64::from(self.boundary_blocks) {
            0 => u64::MAX,
            boundary => boundary - self.next % boundary,
        }
    }
}

impl Iterator for Split {
    /// First block and number of blocks of a command.
    type Item = (Lba, u32);

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let boundary = u32::try_from(self.blocks_to_boundary()).unwrap_or(u32::MAX);
        let blocks = self.left.min(self.blocks_max).min(boundary);
        let lba = Lba(self.next);
        self.next += u64::from(blocks);
        self.left -= blocks;
        Some((lba, blocks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(lba: u64, blocks: u32, blocks_max: u32, boundary_blocks: u32) -> Vec<(u64, u32)> {
        Split::new(Lba(lba), blocks, blocks_max, boundary_blocks)
            .map(|(lba, blocks)| (lba.0, blocks))
            .collect()
    }

    #[test]
    fn a_run_within_the_limits_is_one_command() {
        assert_eq!(split(7, 8, 8, 0), [(7, 8)]);
        assert!(Split::new(Lba(8), 8, 8, 8).is_single());
    }

    #[test]
    fn the_largest_transfer_splits() {
        assert_eq!(split(0, 20, 8, 0), [(0, 8), (8, 8), (16, 4)]);
    }

    #[test]
    fn a_boundary_splits_where_it_lies_and_not_before() {
        assert_eq!(split(6, 4, 100, 8), [(6, 2), (8, 2)]);
        assert_eq!(split(6, 2, 100, 8), [(6, 2)]);
        assert_eq!(split(8, 8, 100, 8), [(8, 8)]);
    }

    #[test]
    fn boundary_and_largest_transfer_both_hold() {
        assert_eq!(split(5, 14, 3, 8), [(5, 3), (8, 3), (11, 3), (14, 2), (16, 3)]);
    }

    #[test]
    fn the_end_of_the_address_space_does_not_overflow() {
        assert_eq!(split(u64::MAX - 4, 4, 3, 0), [(u64::MAX - 4, 3), (u64::MAX - 1, 1)]);
    }

    proptest! {
        #[test]
        fn commands_cover_the_run_once_within_every_limit(
            lba in 0u64..1 << 40, blocks in 1u32..5000, blocks_max in 1u32..600, boundary in 0u32..700
        ) {
            let run = Split::new(Lba(lba), blocks, blocks_max, boundary);
            let commands: Vec<_> = run.clone().collect();
            prop_assert_eq!(run.commands() as usize, commands.len());
            prop_assert_eq!(run.is_single(), commands.len() == 1);
            let mut next = lba;
            for &(Lba(start), count) in &commands {
                prop_assert_eq!(start, next);
                prop_assert!(count >= 1 && count <= blocks_max);
                if boundary > 0 {
                    let last = start + u64::from(count) - 1;
                    prop_assert_eq!(start / u64::from(boundary), last / u64::from(boundary));
                }
                next += u64::from(count);
            }
            prop_assert_eq!(next, lba + u64::from(blocks));
        }

        #[test]
        fn no_command_could_have_been_longer(
            lba in 0u64..1 << 40, blocks in 1u32..5000, blocks_max in 1u32..600, boundary in 0u32..700
        ) {
            let commands: Vec<_> = Split::new(Lba(lba), blocks, blocks_max, boundary).collect();
            for &(Lba(start), count) in &commands[..commands.len() - 1] {
                let end = start + u64::from(count);
                let at_boundary = boundary > 0 && end.is_multiple_of(u64::from(boundary));
                prop_assert!(count == blocks_max || at_boundary);
            }
        }
    }
}
