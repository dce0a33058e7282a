//! The ranges of one pass: a few, disjoint, ascending, in a fixed array.

use std::ops::Range;

/// Ranges that are kept apart. Where there are more, the two with the smallest gap between them become one: the pass
/// then looks at the gap too, where it finds nothing that was marked for it.
const RANGES_MAX: usize = 4;

/// Disjoint ranges of shard-local pages in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PassRanges {
    /// One place more than is kept, for the moment in which two are joined.
    ranges: [Range<u64>; RANGES_MAX + 1],
    count: usize,
}

impl PassRanges {
    /// One range.
    pub(crate) fn of(range: Range<u64>) -> Self {
        let mut ranges = Self::default();
        ranges.add(range);
        ranges
    }

    /// Adds a range: the union with those that are there.
    pub(crate) fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let mut joined = range;
        // Whatever it touches is swallowed, the rest keeps its order.
        let mut kept = 0;
        for at in 0..self.count {
            let other = self.ranges[at].clone();
            if other.start <= joined.end && joined.start <= other.end {
                joined = joined.start.min(other.start)..joined.end.max(other.end);
            } else {
                self.ranges[kept] = other;
                kept += 1;
            }
        }
        let place = self.ranges[..kept].iter().position(|other| other.start > joined.start).unwrap_or(kept);
        self.ranges[kept] = joined;
        self.ranges[place..=kept].rotate_right(1);
        self.count = kept + 1;
        if self.count > RANGES_MAX {
            self.join_closest();
        }
    }

    fn join_closest(&mut self) {
        let gap = |at: usize| self.ranges[at + 1].start - self.ranges[at].end;
        let closest = (0..self.count - 1).min_by_key(|&at| gap(at)).expect("there are at least two");
        self.ranges[closest].end = self.ranges[closest + 1].end;
        self.ranges[closest + 1..self.count].rotate_left(1);
        self.count -= 1;
    }

    /// What is left of the first range that goes beyond `cursor`.
    pub(crate) fn rest(&self, cursor: u64) -> Option<Range<u64>> {
        let range = self.ranges[..self.count].iter().find(|range| range.end > cursor)?;
        Some(range.start.max(cursor)..range.end)
    }

    /// From the first page to the last.
    pub(crate) fn span(&self) -> Range<u64> {
        match self.count {
            0 => 0..0,
            count => self.ranges[0].start..self.ranges[count - 1].end,
        }
    }

    pub(crate) fn contains(&self, page: u64) -> bool {
        self.ranges[..self.count].iter().any(|range| range.contains(&page))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_cover_what_was_added_and_stay_few_disjoint_and_ascending(
            added in prop::collection::vec((0u64..200, 0u64..30), 0..12),
        ) {
            let mut ranges = PassRanges::default();
            for &(start, len) in &added {
                ranges.add(start..start + len);
            }
            let mut cursor = 0;
            let mut pieces = Vec::new();
            while let Some(range) = ranges.rest(cursor) {
                cursor = range.end;
                pieces.push(range);
            }
            prop_assert!(pieces.len() <= RANGES_MAX);
            prop_assert!(pieces.windows(2).all(|pair| pair[0].end < pair[1].start));
            for page in 0..240 {
                let wanted = added.iter().any(|&(start, len)| (start..start + len).contains(&page));
                prop_assert!(!wanted || ranges.contains(page));
                prop_assert_eq!(ranges.contains(page), pieces.iter().any(|piece| piece.contains(&page)));
            }
            if added.iter().filter(|(_, len)| *len > 0).count() <= RANGES_MAX {
                for page in 0..240 {
                    prop_assert_eq!(
                        ranges.contains(page),
                        added.iter().any(|&(start, len)| (start..start + len).contains(&page))
                    );
                }
            }
        }
    }

    #[test]
    fn the_smallest_gap_is_given_up_first() {
        let mut ranges = PassRanges::default();
        for start in [0, 100, 110, 300, 400] {
            ranges.add(start..start + 5);
        }
        assert_eq!(ranges.rest(50), Some(100..115));
        assert_eq!(ranges.rest(102), Some(102..115));
        assert_eq!(ranges.rest(115), Some(300..305));
        assert_eq!(ranges.span(), 0..405);
        assert_eq!(ranges.rest(405), None);
    }
}
