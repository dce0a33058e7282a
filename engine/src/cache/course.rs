//! The way that a scan takes through a mapping: forwards, backwards, or in strides. On its way a scan's pages have
//! positions that count from 0 and ascend, whatever the pages do.
//!
//! ```text
//!     strides of `step` pages with `len` pages read in each, forwards from `origin`:
//!
//!     │◄─ len ─►│             │◄─ len ─►│             │◄─ len ─►│
//!     ├─────────┼─────────────┼─────────┼─────────────┼─────────┤
//!     ^ origin: position 0    ^ position len          ^ position 2 · len
//!     │◄─────── step ────────►│
//! ```

use std::ops::Range;

/// The longest step of a scan in strides, in pages: beyond, two equal distances are mostly chance.
pub(crate) const STRIDE_PAGES_MAX: u64 = 1024;

/// A scan's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Course {
    /// Page after page.
    Forward,
    /// The same from the end.
    Backward,
    /// Stretches of pages at equal distances.
    Strided(Stride),
}

/// Stretches at equal distances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stride {
    /// First page of the first stretch.
    pub origin: u64,
    /// From the first page of a stretch to that of the next, upwards or downwards.
    pub step: Step,
    /// Pages of a stretch; fewer than the step has.
    pub len: u64,
}

/// A distance with its direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Up(u64),
    Down(u64),
}

impl Step {
    /// From one page to another one.
    pub(crate) fn between(from: u64, to: u64) -> Self {
        if to >= from { Self::Up(to - from) } else { Self::Down(from - to) }
    }

    pub(crate) fn pages(self) -> u64 {
        match self {
            Self::Up(pages) | Self::Down(pages) => pages,
        }
    }
}

/// Pages at equal distances, ascending: whole stretches from the first page on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stretches {
    /// From the first page of the lowest stretch to the end of the highest.
    pub hull: Range<u64>,
    /// From stretch to stretch; of one stretch alone at least its length.
    pub step: u64,
    /// Pages of a stretch.
    pub len: u64,
}

impl Stretches {
    /// Pages without gaps.
    pub(crate) fn one(pages: Range<u64>) -> Self {
        let len = pages.end.saturating_sub(pages.start).max(1);
        Self { hull: pages, step: len, len }
    }

    /// The stretches in ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let len = self.len;
        self.hull.clone().step_by(self.step as usize).map(move |first| first..first + len)
    }

    /// Without the stretch at either end that `asked` covers.
    pub(crate) fn without(mut self, asked: &Range<u64>) -> Self {
        let covered = |first: u64, len| asked.start <= first && first + len <= asked.end;
        if !self.hull.is_empty() && covered(self.hull.start, self.len) {
            self.hull.start = (self.hull.start + self.step).min(self.hull.end);
        } else if !self.hull.is_empty() && covered(self.hull.end - self.len, self.len) {
            self.hull.end -= self.step;
        }
        self
    }
}

impl Course {
    /// Positions that it has in a mapping of `pages` pages.
    pub(crate) fn end(self, pages: u64) -> u64 {
        let Self::Strided(Stride { origin, step, len }) = self else { return pages };
        let further = match step {
            Step::Up(step) => pages.saturating_sub(origin + len) / step,
            Step::Down(step) => origin / step,
        };
        (further + 1) * len
    }

    /// The position of a page, if it lies on the way.
    pub(crate) fn position(self, page: u64, pages: u64) -> Option<u64> {
        match self {
            Self::Forward => Some(page),
            Self::Backward => Some(pages - 1 - page),
            Self::Strided(Stride { origin, step, len }) => {
                let (stretch, within) = match step {
                    Step::Up(step) => {
                        let beyond = page.checked_sub(origin)?;
                        (beyond / step, beyond % step)
                    }
                    Step::Down(step) => {
                        let stretch = origin.saturating_sub(page).div_ceil(step);
                        let first = origin.checked_sub(stretch * step)?;
                        (stretch, page - first)
                    }
                };
                (within < len).then_some(stretch * len + within)
            }
        }
    }

    /// The lowest position of a read. One in strides reads a stretch from its beginning.
    pub(crate) fn position_of_read(self, read: &Range<u64>, pages: u64) -> Option<u64> {
        match self {
            Self::Forward => Some(read.start),
            Self::Backward => Some(pages - read.end),
            Self::Strided(Stride { len, .. }) => {
                let position = self.position(read.start, pages)?;
                (position.is_multiple_of(len) && read.end - read.start <= len).then_some(position)
            }
        }
    }

    /// The page at a position.
    pub(crate) fn page(self, position: u64, pages: u64) -> u64 {
        match self {
            Self::Forward => position,
            Self::Backward => pages - 1 - position,
            Self::Strided(Stride { origin, step, len }) => {
                let (stretch, within) = (position / len, position % len);
                match step {
                    Step::Up(step) => origin + stretch * step + within,
                    Step::Down(step) => origin - stretch * step + within,
                }
            }
        }
    }

    /// The pages at positions that are whole stretches.
    pub(crate) fn stretches(self, positions: Range<u64>, pages: u64) -> Stretches {
        let Self::Strided(Stride { step, len, .. }) = self else {
            let (one, other) = (self.page(positions.start, pages), self.page(positions.end - 1, pages));
            return Stretches::one(one.min(other)..one.max(other) + 1);
        };
        let (one, other) = (self.page(positions.start, pages), self.page(positions.end - len, pages));
        Stretches { hull: one.min(other)..one.max(other) + len, step: step.pages(), len }
    }

    /// Pages that are read together: sizes and starts of windows are multiples of them.
    pub(crate) fn unit(self) -> u64 {
        if let Self::Strided(Stride { len, .. }) = self { len } else { 1 }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 1000;

    fn strided(origin: u64, step: Step, len: u64) -> Course {
        Course::Strided(Stride { origin, step, len })
    }

    #[test]
    fn strides_end_with_the_last_whole_stretch() {
        assert_eq!(strided(0, Step::Up(10), 2).end(20), 4);
        assert_eq!(strided(0, Step::Up(10), 2).end(21), 4);
        assert_eq!(strided(0, Step::Up(10), 2).end(22), 6);
        assert_eq!(strided(25, Step::Down(10), 2).end(1000), 6);
        assert_eq!(Course::Backward.end(7), 7);
    }

    #[test]
    fn what_is_asked_for_anyway_is_left_out_at_either_end() {
        let stretches = Stretches { hull: 10..32, step: 10, len: 2 };
        let without = |asked: Range<u64>| stretches.clone().without(&asked).iter().collect::<Vec<_>>();
        assert_eq!(without(10..12), [20..22, 30..32]);
        assert_eq!(without(30..32), [10..12, 20..22]);
        assert_eq!(without(11..12).len(), 3);
        assert_eq!(Stretches::one(4..9).without(&(4..9)).iter().count(), 0);
    }

    proptest! {
        #[test]
        fn positions_and_pages_are_each_others_inverse(
            origin in 0u64..900, up in any::<bool>(), step in 2u64..60, len in 1u64..30, kind in 0..3,
        ) {
            let step = if up { Step::Up(step) } else { Step::Down(step) };
            let course = match kind {
                0 => Course::Forward,
                1 => Course::Backward,
                _ => strided(origin, step, len.min(step.pages() - 1)),
            };
            let mut seen = 0;
            for position in 0..course.end(PAGES) {
                let page = course.page(position, PAGES);
                prop_assert!(page < PAGES);
                prop_assert_eq!(course.position(page, PAGES), Some(position));
                seen += 1;
            }
            let on_course = (0..PAGES).filter(|&page| {
                course.position(page, PAGES).is_some_and(|position| position < course.end(PAGES))
            });
            prop_assert_eq!(on_course.count(), seen);
            let unit = course.unit();
            let whole: Vec<u64> = course.stretches(0..course.end(PAGES), PAGES).iter().flatten().collect();
            prop_assert_eq!(whole.len() as u64, course.end(PAGES));
            prop_assert!(whole.iter().all(|&page| course.position(page, PAGES).is_some()));
            prop_assert_eq!(course.end(PAGES) % unit, 0);
        }
    }
}
