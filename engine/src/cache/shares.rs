//! The accounts of cache shares in one shard: how many pages each holds, how many it may hold, and how many nobody else
//! takes from it.
//!
//! A share is a named part of the cache that mappings belong to ([`CacheShare`](crate::CacheShare)). Its pages are
//! counted where folios are installed and released, by the shard alone; limits are set by any thread. A hit knows nothing
//! of all this: it neither moves nor counts a page.
//!
//! | number | set by | meaning |
//! |---|---|---|
//! | used | the shard | pages that the share's folios occupy, filled or not |
//! | limit | any thread | the shard installs no page beyond it, but for logs |
//! | guaranteed | any thread | while the share holds no more, requests of other shares don't take its folios |
//!
//! Beside the shares the cache as a whole has a limit, in the same terms. What it keeps back of the frames is counted
//! as if it weren't free ([`ShardCache::free_frames`](super::owned::ShardCache::free_frames)).
//!
//! What is evicted for a share, and when, is told in `shard/shares.rs`.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::shape::MappingShape;

/// Shares that can exist at once, the one without a name included.
pub(crate) const SHARES_MAX: usize = 64;

/// No limit: as many pages as there are frames.
pub(crate) const UNLIMITED: u64 = u64::MAX;

/// A share's number within its engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ShareId(pub u8);

impl ShareId {
    /// The one without a name: of mappings that name none.
    pub(crate) const UNNAMED: Self = Self(0);

    /// The share's bit in a set of shares.
    pub(crate) const fn bit(self) -> u64 {
        1 << self.0
    }
}

/// One share, or the cache as a whole, in one shard; in pages of 4096 bytes.
#[derive(Debug)]
pub(crate) struct Account {
    used: AtomicU64,
    limit: AtomicU64,
    guaranteed: AtomicU64,
}

impl Account {
    fn new(limit: u64) -> Self {
        Self { used: AtomicU64::new(0), limit: AtomicU64::new(limit), guaranteed: AtomicU64::new(0) }
    }

    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(crate) fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// How many pages more than its limit it would hold with `more` pages more.
    pub(crate) fn excess(&self, more: u64) -> u64 {
        (self.used() + more).saturating_sub(self.limit())
    }

    /// The shard alone counts: no locked instruction.
    fn count(&self, pages: i64) {
        self.used.store(self.used().wrapping_add_signed(pages), Ordering::Relaxed);
    }
}

/// The accounts of one shard.
#[derive(Debug)]
pub(crate) struct ShareAccounts {
    shares: Box<[Account]>,
    cache: Account,
    frames: u64,
    /// Some limit is another since the shard last looked.
    changed: AtomicBool,
}

impl ShareAccounts {
    pub(crate) fn new(frames: u64) -> Self {
        Self {
            shares: (0..SHARES_MAX).map(|_| Account::new(UNLIMITED)).collect(),
            cache: Account::new(frames),
            frames,
            changed: AtomicBool::new(false),
        }
    }

    // ---- any thread -------------------------------------------------------------------------------------

    /// The account of a share, or of the cache as a whole.
    pub(crate) fn account(&self, share: Option<ShareId>) -> &Account {
        share.map_or(&self.cache, |share| &self.shares[usize::from(share.0)])
    }

    /// Sets what a share, or the cache, may hold. The caller kicks the shard.
    pub(crate) fn set_limit(&self, share: Option<ShareId>, pages: u64) {
        self.account(share).limit.store(pages, Ordering::Relaxed);
        self.changed.store(true, Ordering::Release);
    }

    /// Sets what others leave to a share.
    pub(crate) fn set_guaranteed(&self, share: ShareId, pages: u64) {
        self.account(Some(share)).guaranteed.store(pages, Ordering::Relaxed);
    }

    // ---- the shard --------------------------------------------------------------------------------------

    /// Whether limits were changed since this was last asked.
    pub(crate) fn take_changed(&self) -> bool {
        self.changed.load(Ordering::Relaxed) && self.changed.swap(false, Ordering::Acquire)
    }

    /// A folio was given frames.
    pub(crate) fn installed(&self, shape: &MappingShape, pages: u64) {
        self.shares[usize::from(shape.share.0)].count(pages as i64);
        self.cache.count(pages as i64);
    }

    /// A folio's frames are free again.
    pub(crate) fn released(&self, shape: &MappingShape, pages: u64) {
        self.shares[usize::from(shape.share.0)].count(-(pages as i64));
        self.cache.count(-(pages as i64));
    }

    /// Whether a folio of that mapping may be evicted for whoever needs frames: its share holds more than it is
    /// guaranteed.
    pub(crate) fn may_take(&self, shape: &MappingShape) -> bool {
        let account = &self.shares[usize::from(shape.share.0)];
        account.used() > account.guaranteed.load(Ordering::Relaxed)
    }

    /// Frames that the limit of the cache keeps back, free or not.
    pub(crate) fn withheld(&self) -> u64 {
        self.frames.saturating_sub(self.cache.limit())
    }

    /// Checks the counts against what is in the cache: pages by share. For tests.
    ///
    /// # Panics
    /// When they disagree.
    #[cfg(any(test, debug_assertions))]
    pub(crate) fn assert_counts(&self, pages: &[u64; SHARES_MAX]) {
        for (share, &pages) in pages.iter().enumerate() {
            assert_eq!(self.shares[share].used(), pages, "pages of share {share}");
        }
        assert_eq!(self.cache.used(), pages.iter().sum::<u64>(), "pages in the cache");
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn excess_counts_from_the_limit_and_never_below_it() {
        let account = Account::new(10);
        account.count(8);
        assert_eq!([0, 2, 3, 10].map(|more| account.excess(more)), [0, 0, 1, 8]);
        account.limit.store(5, Ordering::Relaxed);
        assert_eq!(account.excess(0), 3);
        account.limit.store(UNLIMITED, Ordering::Relaxed);
        assert_eq!(account.excess(1 << 40), 0);
    }

    #[test]
    fn a_lowered_cache_keeps_frames_back_and_a_raised_one_gives_them_again() {
        let accounts = ShareAccounts::new(64);
        assert_eq!((accounts.withheld(), accounts.take_changed()), (0, false));
        accounts.set_limit(None, 40);
        assert_eq!(
            (accounts.withheld(), accounts.take_changed(), accounts.take_changed()),
            (24, true, false)
        );
        accounts.set_limit(None, 64);
        assert_eq!(accounts.withheld(), 0);
    }
}
