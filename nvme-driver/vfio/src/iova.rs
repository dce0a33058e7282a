//! Which device addresses are taken: an allocator over the ranges that the IOMMU accepts.
//!
//! It owns numbers only, no mapping. It never hands out address 0, which some devices take for "none".

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// Device addresses below this one are left alone: the first page could be taken for a null pointer, and a device
/// that goes astray near zero is caught.
const FIRST: u64 = 1 << 20;

/// The device addresses of one address space.
#[derive(Debug)]
pub(crate) struct IovaSpace {
    /// What the IOMMU accepts, ascending and apart.
    valid: Vec<RangeInclusive<u64>>,
    /// First address → length of what is taken.
    taken: BTreeMap<u64, u64>,
}

impl IovaSpace {
    /// What to assume where the kernel doesn't say (before Linux 5.4): 39 bits, the narrowest IOMMU that is
    /// about, without the window of the interrupt messages.
    pub(crate) fn assumed() -> Vec<RangeInclusive<u64>> {
        const MSI_WINDOW: RangeInclusive<u64> = 0xFEE0_0000..=0xFEEF_FFFF;
        vec![0..=*MSI_WINDOW.start() - 1, *MSI_WINDOW.end() + 1..=(1 << 39) - 1]
    }

    /// A space of the addresses in `valid`.
    pub(crate) fn new(mut valid: Vec<RangeInclusive<u64>>) -> Self {
        valid.retain(|range| !range.is_empty());
        valid.sort_by_key(|range| *range.start());
        Self { valid, taken: BTreeMap::new() }
    }

    /// Takes `len_bytes` addresses whose first is a multiple of `align_bytes` (a power of two), the lowest that
    /// there are.
    pub(crate) fn take(&mut self, len_bytes: u64, align_bytes: u64) -> Option<u64> {
        debug_assert!(align_bytes.is_power_of_two() && len_bytes > 0);
        let first = self.valid.iter().find_map(|range| self.first_fit(range, len_bytes, align_bytes))?;
        self.taken.insert(first, len_bytes);
        Some(first)
    }

    /// Gives back what starts at `first` and is `len_bytes` long. False when that isn't taken.
    pub(crate) fn give_back(&mut self, first: u64, len_bytes: u64) -> bool {
        let known = self.is_taken(first, len_bytes);
        if known {
            self.taken.remove(&first);
        }
        known
    }

    /// Whether exactly this stretch was taken.
    pub(crate) fn is_taken(&self, first: u64, len_bytes: u64) -> bool {
        self.taken.get(&first) == Some(&len_bytes)
    }

    /// The longest stretch that [`take`](Self::take) could give, in bytes.
    pub(crate) fn longest_free_bytes(&self) -> u64 {
        self.valid
            .iter()
            .flat_map(|range| self.gaps(range))
            .map(|gap| gap.end() - gap.start() + 1)
            .max()
            .unwrap_or(0)
    }

    fn first_fit(&self, range: &RangeInclusive<u64>, len_bytes: u64, align_bytes: u64) -> Option<u64> {
        self.gaps(range).find_map(|gap| {
            let first = gap.start().checked_next_multiple_of(align_bytes)?;
            let last = first.checked_add(len_bytes - 1)?;
            (last <= *gap.end()).then_some(first)
        })
    }

    /// The free stretches of `range`, ascending.
    fn gaps<'a>(&'a self, range: &RangeInclusive<u64>) -> impl Iterator<Item = RangeInclusive<u64>> + 'a {
        let (mut at, end) = (Some(FIRST.max(*range.start())), *range.end());
        let inside = self.taken.range(range.clone()).map(|(&first, &len)| (first, first + (len - 1)));
        inside.map(Some).chain([None]).filter_map(move |taken| {
            let start = at?;
            let last = match taken {
                Some((first, last)) => {
                    at = last.checked_add(1);
                    first.checked_sub(1)?
                }
                None => {
                    at = None;
                    end
                }
            };
            (start <= last).then_some(start..=last)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(first: u64, last: u64) -> IovaSpace {
        IovaSpace::new(std::iter::once(first..=last).collect())
    }

    #[test]
    fn the_first_megabyte_and_holes_are_left_alone() {
        let mut space = IovaSpace::new(IovaSpace::assumed());
        assert_eq!(space.take(4096, 4096), Some(FIRST));
        // Three gigabytes fit below the interrupt window, the next ones don't.
        assert_eq!(space.take(3 << 30, 1 << 30), Some(0xFEF0_0000u64.next_multiple_of(1 << 30)));
    }

    #[test]
    fn what_is_too_long_is_refused_and_the_longest_free_stretch_named() {
        let mut space = of(0, (1 << 32) - 1);
        assert_eq!(space.take(1 << 32, 4096), None);
        assert_eq!(space.longest_free_bytes(), (1 << 32) - FIRST);
        assert_eq!(space.take((1 << 32) - FIRST, 4096), Some(FIRST));
        assert_eq!((space.longest_free_bytes(), space.take(4096, 4096)), (0, None));
    }

    #[test]
    fn the_end_of_the_address_space_is_no_overflow() {
        let mut space = of(u64::MAX - 8191, u64::MAX);
        assert_eq!(space.take(4096, 4096), Some(u64::MAX - 8191));
        assert_eq!(space.take(4096, 4096), Some(u64::MAX - 4095));
        assert_eq!((space.take(1, 1), space.longest_free_bytes()), (None, 0));
    }

    #[test]
    fn only_what_was_taken_can_be_given_back_and_once() {
        let mut space = of(0, (1 << 30) - 1);
        let first = space.take(8192, 4096).unwrap();
        assert!(!space.give_back(first, 4096));
        assert!(!space.give_back(first + 4096, 4096));
        assert!(space.give_back(first, 8192));
        assert!(!space.give_back(first, 8192));
    }

    proptest! {
        /// Stretches lie inside the valid ranges, are aligned, and never overlap, whatever the order.
        #[test]
        fn stretches_never_overlap(steps in prop::collection::vec((1u64..2000, 0u32..10, any::<bool>()), 1..80)) {
            let valid = [0..=0x2F_FFFF, 0x40_0000..=0x6F_FFFF];
            let mut space = IovaSpace::new(valid.to_vec());
            let mut live: Vec<(u64, u64)> = Vec::new();
            for (pages, align, free) in steps {
                if free && let Some((first, len)) = live.pop() {
                    prop_assert!(space.give_back(first, len));
                    continue;
                }
                let (len, align) = (pages * 4096, 4096u64 << align);
                let Some(first) = space.take(len, align) else { continue };
                prop_assert!(first.is_multiple_of(align) && first >= FIRST);
                prop_assert!(valid.iter().any(|range| range.contains(&first) && range.contains(&(first + len - 1))));
                prop_assert!(live.iter().all(|&(other, other_len)| first + len <= other || other + other_len <= first));
                live.push((first, len));
            }
        }
    }
}
