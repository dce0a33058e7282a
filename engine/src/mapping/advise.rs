//! Hints: what a handle is going to do, and which pages it will or won't need (`posix_fadvise`).
//!
//! A hint changes how fast something goes, never what is read or durable. None of them costs a hit anything: they are looked
//! at where a read has to wait anyway, or meets what was read ahead.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use super::{Mapping, PAGE};
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::reply::block_on;
use crate::shard::request::Request;

/// What is to be expected of a range's, or a handle's, use ([`Mapping::advise`]). The names and what they mean are
/// `posix_fadvise`'s (`mm/fadvise.c`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Advice {
    /// Nothing in particular: takes [`Sequential`](Self::Sequential), [`Random`](Self::Random) and
    /// [`NoReuse`](Self::NoReuse) back. Concerns the handle.
    #[default]
    Normal,
    /// It is going to be read from front to back: the handle reads up to twice as far ahead.
    Sequential,
    /// It is going to be read here and there: the handle reads nothing ahead.
    Random,
    /// It is going to be read once: what the handle's reads bring in is the first to be evicted, and leaves no trace in what is
    /// remembered of evicted pages (WB-27), unless somebody uses it a second time. A read in pieces smaller than a page is such a
    /// second use. Pages that were in the cache before are left as they are.
    NoReuse,
    /// The range is going to be needed soon: as [`prefetch`](Mapping::prefetch). Never waits.
    WillNeed,
    /// The range isn't going to be needed soon: its pages are evicted, the dirty ones after they have been written; nothing is
    /// lost. What is pinned, waits for its log, or can't be written stays. Of pages that lie in the range in part only nothing is
    /// evicted.
    DontNeed,
}

/// A handle's own advice.
#[derive(Debug, Default)]
pub(crate) struct HandleAdvice {
    /// An [`Advice`] about the order of reads.
    order: AtomicU8,
    no_reuse: AtomicBool,
}

const NORMAL: u8 = 0;
const SEQUENTIAL: u8 = 1;
const RANDOM: u8 = 2;

/// A clone begins with what its original was told.
impl Clone for HandleAdvice {
    fn clone(&self) -> Self {
        let order = AtomicU8::new(self.order.load(Ordering::Relaxed));
        Self { order, no_reuse: AtomicBool::new(self.no_reuse.load(Ordering::Relaxed)) }
    }
}

impl HandleAdvice {
    /// How many pages are read ahead at once, where `usual` are without advice and `most` at all.
    pub(super) fn readahead_pages(&self, usual: u64, most: u64) -> u64 {
        match self.order.load(Ordering::Relaxed) {
            SEQUENTIAL => (2 * usual).min(most),
            RANDOM => 0,
            _ => usual,
        }
    }

    fn is_no_reuse(&self) -> bool {
        self.no_reuse.load(Ordering::Relaxed)
    }
}

impl Mapping {
    /// Tells what is to be expected of a range, or of this handle.
    ///
    /// [`Advice::Sequential`], [`Random`](Advice::Random), [`NoReuse`](Advice::NoReuse) and [`Normal`](Advice::Normal)
    /// concern all reads of this handle, whatever the range, as in the kernel; clones made afterwards begin with them, other
    /// handles aren't concerned. `WillNeed` and `DontNeed` concern the range, whoever reads it. `DontNeed` waits for the device to
    /// write the dirty pages of the range, up to the engine's `pin_wait` for one page; it syncs nothing, and a write that
    /// fails is told by the next sync.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] and [`Error::InvertedRange`] for a range that the mapping hasn't, whatever the advice;
    /// [`Error::Closed`]; [`Error::ShardFailed`].
    pub fn advise(&self, range: Range<u64>, advice: Advice) -> Result<()> {
        block_on(self.advise_async(range, advice))
    }

    /// As [`advise`](Self::advise), without blocking the thread.
    ///
    /// # Errors
    /// As `advise`.
    pub async fn advise_async(&self, range: Range<u64>, advice: Advice) -> Result<()> {
        self.check_open()?;
        self.pages_of(range.clone())?;
        let own = &self.advice;
        match advice {
            Advice::Normal => {
                own.order.store(NORMAL, Ordering::Relaxed);
                own.no_reuse.store(false, Ordering::Relaxed);
            }
            Advice::Sequential => own.order.store(SEQUENTIAL, Ordering::Relaxed),
            Advice::Random => own.order.store(RANDOM, Ordering::Relaxed),
            Advice::NoReuse => own.no_reuse.store(true, Ordering::Relaxed),
            Advice::WillNeed => drop(self.prefetch(range)?),
            Advice::DontNeed => return self.drop_cached(range).await,
        }
        Ok(())
    }

    /// Has the whole pages of a range evicted.
    async fn drop_cached(&self, range: Range<u64>) -> Result<()> {
        let shape = &self.open.shape;
        let page_bytes = PAGE * shape.order.pages();
        let first = range.start.div_ceil(page_bytes) * shape.order.pages();
        let is_last = range.end == self.len();
        let end = if is_last { range.end.div_ceil(page_bytes) } else { range.end / page_bytes };
        let end = end * shape.order.pages();
        if first >= end {
            return Ok(());
        }
        let slot = shape.slot;
        let holds = |shard| !shape.striping.local_range(shard, first..end).is_empty();
        self.ask_shards(|link| holds(link.shard), || Request::Drop { mapping: slot, pages: first..end })
            .await
            .map(drop)
    }

    /// A read of this handle has brought in pages of 4096 bytes, all of one shard, or was the first use of some that were
    /// read ahead.
    #[inline]
    pub(super) fn read_once(&self, pages: Range<u64>) {
        if self.advice.is_no_reuse() && !pages.is_empty() {
            self.link(pages.start).used_once.post(self.open.shape.slot, pages);
        }
    }
}
