//! What every sector must hold: the number of the last request that wrote it.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::replay::stamp::{Content, SECTOR_BYTES, Stamp, is_zero};

/// Sectors of one entry of the model.
const GROUP_SECTORS: u64 = 8;
/// Mismatches that are described; more are only counted.
const DESCRIBED_MAX: usize = 10;

/// What sectors hold that no request has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unwritten {
    /// The device was new: zeroes.
    Zeroes,
    /// Nobody knows, so nothing is checked.
    Anything,
}

/// The last writer of each sector, from 1; 0 for none. Eight sectors an entry.
#[derive(Debug)]
pub(crate) struct Model {
    groups: BTreeMap<u64, [u32; GROUP_SECTORS as usize]>,
    unwritten: Unwritten,
}

/// What checking sectors came to.
#[derive(Debug, Default)]
pub(crate) struct Checked {
    /// Sectors that hold what their last writer wrote.
    pub(crate) written: u64,
    /// Sectors never written that hold zeroes.
    pub(crate) zeroes: u64,
    /// Sectors that hold something else than they must.
    pub(crate) mismatches: u64,
    /// The first few of them, in words.
    pub(crate) described: Vec<String>,
}

impl Model {
    pub(crate) fn new(unwritten: Unwritten) -> Self {
        Self { groups: BTreeMap::new(), unwritten }
    }

    fn generation(&self, sector: u64) -> u32 {
        let group = self.groups.get(&(sector / GROUP_SECTORS));
        group.map_or(0, |group| group[(sector % GROUP_SECTORS) as usize])
    }

    /// Notes that request `generation` writes `sectors` sectors from `first` on, and fills `data` with what it writes.
    pub(crate) fn write(&mut self, first: u64, generation: u32, data: &mut [u8]) {
        for (sector, bytes) in (first..).zip(data.chunks_exact_mut(SECTOR_BYTES)) {
            self.groups.entry(sector / GROUP_SECTORS).or_default()[(sector % GROUP_SECTORS) as usize] =
                generation;
            Stamp { sector, generation }.fill(bytes);
        }
    }

    /// Checks sectors that were read from `first` on; `place` says where, for the description.
    pub(crate) fn check(&self, first: u64, data: &[u8], place: &str, checked: &mut Checked) {
        for (sector, bytes) in (first..).zip(data.chunks_exact(SECTOR_BYTES)) {
            match (self.generation(sector), self.unwritten) {
                (0, Unwritten::Anything) => {}
                (0, Unwritten::Zeroes) if is_zero(bytes) => checked.zeroes += 1,
                (0, Unwritten::Zeroes) => {
                    checked.mismatch(|| {
                        format!(
                            "{place}: sector {sector} was never written, but holds {}",
                            Content::of(bytes)
                        )
                    });
                }
                (generation, _) if (Stamp { sector, generation }).fills(bytes) => checked.written += 1,
                (generation, _) => {
                    checked.mismatch(|| {
                        let found = Content::of(bytes);
                        format!("{place}: sector {sector} must hold request {generation}, but holds {found}")
                    });
                }
            }
        }
    }

    /// Checks sectors that hold zeroes: only the written ones among them can be wrong.
    pub(crate) fn check_zeroes(&self, sectors: Range<u64>, place: &str, checked: &mut Checked) {
        let before = checked.mismatches;
        let groups = sectors.start / GROUP_SECTORS..sectors.end.div_ceil(GROUP_SECTORS);
        for (group, generations) in self.groups.range(groups) {
            for (sector, generation) in (group * GROUP_SECTORS..).zip(generations) {
                if *generation != 0 && sectors.contains(&sector) {
                    checked.mismatch(|| {
                        format!("{place}: sector {sector} must hold request {generation}, but holds zeroes")
                    });
                }
            }
        }
        if self.unwritten == Unwritten::Zeroes {
            checked.zeroes += sectors.end - sectors.start - (checked.mismatches - before);
        }
    }

    /// The stretches of sectors that were written, in units of eight sectors, ascending.
    pub(crate) fn written_ranges(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for group in self.groups.keys() {
            let sectors = group * GROUP_SECTORS..(group + 1) * GROUP_SECTORS;
            match ranges.last_mut() {
                Some(last) if last.end == sectors.start => last.end = sectors.end,
                _ => ranges.push(sectors),
            }
        }
        ranges
    }

    /// Number of sectors that were written.
    pub(crate) fn written_sectors(&self) -> u64 {
        let written = |group: &[u32; 8]| group.iter().filter(|&&generation| generation != 0).count() as u64;
        self.groups.values().map(written).sum()
    }

    /// Takes over what another model knows of other sectors.
    pub(crate) fn absorb(&mut self, mut other: Self) {
        self.groups.append(&mut other.groups);
    }
}

impl Checked {
    fn mismatch(&mut self, describe: impl FnOnce() -> String) {
        self.mismatches += 1;
        if self.described.len() < DESCRIBED_MAX {
            self.described.push(describe());
        }
    }

    /// Sectors looked at.
    pub(crate) fn sectors(&self) -> u64 {
        self.written + self.zeroes + self.mismatches
    }

    pub(crate) fn absorb(&mut self, other: Self) {
        self.written += other.written;
        self.zeroes += other.zeroes;
        self.mismatches += other.mismatches;
        self.described.extend(other.described);
        self.described.truncate(DESCRIBED_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(model: &mut Model, first: u64, sectors: usize, generation: u32) -> Vec<u8> {
        let mut data = vec![0; sectors * SECTOR_BYTES];
        model.write(first, generation, &mut data);
        data
    }

    #[test]
    fn what_was_written_last_is_right_and_what_was_written_before_is_stale() {
        let mut model = Model::new(Unwritten::Zeroes);
        let old = written(&mut model, 6, 4, 1);
        let new = written(&mut model, 7, 1, 2);
        let mut image = old.clone();
        image[SECTOR_BYTES..2 * SECTOR_BYTES].copy_from_slice(&new);
        let mut checked = Checked::default();
        model.check(6, &image, "image", &mut checked);
        assert_eq!((checked.written, checked.mismatches), (4, 0));
        model.check(6, &old, "image", &mut checked);
        assert_eq!(
            checked.described,
            ["image: sector 7 must hold request 2, but holds sector 7 of request 1"]
        );
    }

    #[test]
    fn sectors_never_written_must_be_zero_unless_nobody_knows() {
        for (unwritten, mismatches) in [(Unwritten::Zeroes, 1), (Unwritten::Anything, 0)] {
            let mut checked = Checked::default();
            Model::new(unwritten).check(0, &[1; SECTOR_BYTES], "cache", &mut checked);
            assert_eq!(checked.mismatches, mismatches, "{unwritten:?}");
        }
    }

    #[test]
    fn a_written_sector_in_a_hole_is_lost() {
        let mut model = Model::new(Unwritten::Zeroes);
        written(&mut model, 9, 2, 1);
        let mut checked = Checked::default();
        model.check_zeroes(0..10, "image", &mut checked);
        assert_eq!((checked.zeroes, checked.mismatches), (9, 1));
        assert_eq!(model.written_sectors(), 2);
    }

    #[test]
    fn mismatches_are_all_counted_and_a_few_described() {
        let mut checked = Checked::default();
        Model::new(Unwritten::Zeroes).check(0, &vec![1; 100 * SECTOR_BYTES], "cache", &mut checked);
        assert_eq!((checked.mismatches, checked.described.len()), (100, DESCRIBED_MAX));
    }
}
