//! Which shard holds which page of a mapping: stripes of 2 MiB, dealt out in turn.
//!
//! Within a shard pages have *local* numbers, dense and in the same order, so that its tag trees have no holes
//! and ascending local order is ascending file order.
//!
//! ```text
//! two shards, a mapping whose first stripe goes to shard 1:
//! file page   0 ……… 511 │ 512 …… 1023 │ 1024 …… 1535 │ 1536 …… 2047
//! shard           1     │      0      │       1      │       0
//! local page  0 ……… 511 │ 512 …… 1023 │  512 …… 1023 │ 1024 …… 1535
//! ```

use std::ops::Range;

/// Pages a stripe: 2 MiB, so that a pass still makes commands of full size.
pub(crate) const STRIPE_PAGES: u64 = 512;

/// How one mapping is dealt out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Striping {
    shards: u64,
    /// Shard of the first stripe: mappings begin at different shards, so that many small ones spread.
    first: u64,
}

impl Striping {
    pub(crate) fn new(shards: usize, mapping: u16) -> Self {
        Self { shards: shards as u64, first: u64::from(mapping) % shards as u64 }
    }

    #[inline]
    pub(crate) fn shard_of(self, page: u64) -> usize {
        if self.shards == 1 {
            return 0;
        }
        ((page / STRIPE_PAGES + self.first) % self.shards) as usize
    }

    /// The shard-local number of `page`, in the shard that holds it.
    #[inline]
    pub(crate) fn local(self, page: u64) -> u64 {
        if self.shards == 1 {
            return page;
        }
        (page / STRIPE_PAGES + self.first) / self.shards * STRIPE_PAGES + page % STRIPE_PAGES
    }

    /// The page whose local number in `shard` is `local`.
    pub(crate) fn page(self, shard: usize, local: u64) -> u64 {
        if self.shards == 1 {
            return local;
        }
        let stripe = local / STRIPE_PAGES * self.shards + shard as u64 - self.first;
        stripe * STRIPE_PAGES + local % STRIPE_PAGES
    }

    /// The local numbers in `shard` of the pages of `pages`: one range, since the order is kept.
    pub(crate) fn local_range(self, shard: usize, pages: Range<u64>) -> Range<u64> {
        if self.shards == 1 {
            return pages;
        }
        self.lower_bound(shard, pages.start)..self.lower_bound(shard, pages.end)
    }

    /// The local number of the first page at or after `page` that `shard` holds.
    fn lower_bound(self, shard: usize, page: u64) -> u64 {
        let turn = page / STRIPE_PAGES + self.first;
        let (round, holder) = (turn / self.shards, turn % self.shards);
        let round_start = round * STRIPE_PAGES;
        match holder.cmp(&(shard as u64)) {
            std::cmp::Ordering::Less => round_start,
            std::cmp::Ordering::Equal => round_start + page % STRIPE_PAGES,
            std::cmp::Ordering::Greater => round_start + STRIPE_PAGES,
        }
    }

    /// The first page after `page` that lies in another shard, or beyond any file.
    #[inline]
    pub(crate) fn run_end(self, page: u64) -> u64 {
        if self.shards == 1 { u64::MAX } else { (page / STRIPE_PAGES + 1) * STRIPE_PAGES }
    }

    /// Local pages that a shard can need for a mapping of `pages` pages.
    pub(crate) fn local_pages_max(self, pages: u64) -> u64 {
        if self.shards == 1 {
            return pages;
        }
        ((pages.div_ceil(STRIPE_PAGES) + self.first).div_ceil(self.shards) + 1) * STRIPE_PAGES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn local_numbers_are_a_bijection_that_keeps_the_order(
            shards in 1usize..9, mapping in 0u16..9, page in 0u64..1 << 30, other in 0u64..1 << 30,
        ) {
            let striping = Striping::new(shards, mapping);
            let shard = striping.shard_of(page);
            prop_assert!(shard < shards);
            prop_assert_eq!(striping.page(shard, striping.local(page)), page);
            if striping.shard_of(other) == shard {
                prop_assert_eq!(page.cmp(&other), striping.local(page).cmp(&striping.local(other)));
            }
            prop_assert!(striping.local(page) < striping.local_pages_max(page + 1));
        }

        #[test]
        fn a_local_range_holds_exactly_the_shards_pages_of_the_range(
            shards in 1usize..5, mapping in 0u16..5, start in 0u64..4000, len in 0u64..4000,
        ) {
            let striping = Striping::new(shards, mapping);
            for shard in 0..shards {
                let local = striping.local_range(shard, start..start + len);
                let want: Vec<u64> = (start..start + len).filter(|&p| striping.shard_of(p) == shard).collect();
                let got: Vec<u64> = local.map(|l| striping.page(shard, l)).collect();
                prop_assert_eq!(got, want);
            }
        }
    }
}
