//! Log sequence numbers at a mapping: writes that carry one, and checkpoints (WB-45).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Mapping, Writing};
use crate::cache::lsn::Lsn;
use crate::cache::shape::Stability;
use crate::error::Result;
use crate::reply::block_on;
use crate::shard::request::Request;
use crate::writeback::callback;
use crate::writeback::control::Context;
use crate::writeback::guard;

impl Mapping {
    /// As [`write_at`](Self::write_at), of a change that stands in a write-ahead log: every page that is
    /// written to is stamped with `lsn` first. Behind a [`Gate`](crate::Gate) it isn't written to the device
    /// before the log is durable up to there. [`Lsn::NONE`] stamps nothing.
    ///
    /// # Errors
    /// As `write_at`; [`Error::LsnBackwards`](crate::Error::LsnBackwards) when a page has a higher number,
    /// and nothing is written to that page then; [`Error::CacheFull`](crate::Error::CacheFull), which names
    /// the gate, when too many pages stayed dirty behind gates.
    pub fn write_at_lsn(&self, offset: u64, data: &[u8], lsn: Lsn) -> Result<()> {
        self.check_write(offset, data.len())?;
        let writing = self.stamping(lsn);
        let done = self.write_hits(offset, data, writing)?;
        if done == data.len() { Ok(()) } else { block_on(self.write_rest(offset, data, done, writing)) }
    }

    /// As [`write_at_lsn`](Self::write_at_lsn), without blocking the thread. Dropping the future midway
    /// leaves a prefix of `data` written.
    ///
    /// # Errors
    /// As `write_at_lsn`.
    pub async fn write_at_lsn_async(&self, offset: u64, data: &[u8], lsn: Lsn) -> Result<()> {
        self.check_write(offset, data.len())?;
        self.write(offset, data, self.stamping(lsn)).await
    }

    /// From where on this mapping needs the log, if power fails now: every change with a number below the
    /// answer is durable on the device; `None` if that holds for all. The number is the smallest that a page
    /// was stamped with since it was last written, of all pages that are dirty or being written. A page that
    /// couldn't be written keeps its number.
    ///
    /// What has been written is made durable first, by one flush of the device unless none is needed: a page
    /// that is written but still in the device's volatile cache needs its log, too. Changes whose pages have
    /// not been stamped yet are not known here: a checkpoint takes the smaller of the answer and a number,
    /// noted before the call, that all changes under way are at or above. Changes without a number
    /// don't count, and a discard counts as done once it has returned. The call costs the dirty pages, not
    /// the mapping.
    ///
    /// # Errors
    /// [`Error::NamespaceFailed`](crate::Error::NamespaceFailed) when the device's flush failed, now or ever
    /// since open; [`Error::Closed`](crate::Error::Closed).
    pub fn oldest_dirty_lsn(&self) -> Result<Option<Lsn>> {
        block_on(self.oldest_dirty_lsn_async())
    }

    /// As [`oldest_dirty_lsn`](Self::oldest_dirty_lsn), without blocking the thread.
    ///
    /// # Errors
    /// As `oldest_dirty_lsn`.
    pub async fn oldest_dirty_lsn_async(&self) -> Result<Option<Lsn>> {
        self.check_checkpoint()?;
        let mapping = self.open.shape.slot;
        let oldest = Arc::new(AtomicU64::new(u64::MAX));
        let request = || Request::OldestLsn { mapping, oldest: oldest.clone() };
        self.ask_shards(|link| self.concerns(link), request).await?;
        // Only now the flush: a page that wasn't found had completed its write before.
        self.commit_what_is_written().await?;
        let oldest = oldest.load(Ordering::Relaxed);
        Ok((oldest != u64::MAX).then_some(Lsn(oldest)))
    }

    /// Makes everything durable that the log before `lsn` is needed for, and writes nothing else: pages whose
    /// first number since they were last written is below `lsn`, as whole pages. Other dirty pages, and those
    /// without a number, stay dirty. Afterwards [`oldest_dirty_lsn`](Self::oldest_dirty_lsn) is at or above
    /// `lsn`, and the log before it isn't needed for this mapping. Costs the dirty pages, not the mapping.
    ///
    /// Behind a gate it waits, like a sync, until the log is durable up to the pages' last numbers.
    ///
    /// What is stamped after the call began is not older, whatever `lsn` is: with a number beyond all that were
    /// given, the call makes durable what has one by now, and ends. Before the first number it writes nothing.
    ///
    /// # Errors
    /// As [`sync`](Self::sync), but that errors of earlier writebacks are left to the next sync: what they
    /// left dirty is written now.
    pub fn flush_until(&self, lsn: Lsn) -> Result<()> {
        block_on(self.flush_until_async(lsn))
    }

    /// As [`flush_until`](Self::flush_until), without blocking the thread.
    ///
    /// # Errors
    /// As `flush_until`.
    pub async fn flush_until_async(&self, lsn: Lsn) -> Result<()> {
        self.check_checkpoint()?;
        // No number is below the smallest.
        if lsn.0 > 1 {
            let mapping = self.open.shape.slot;
            let request = || Request::FlushUntil { mapping, lsn };
            self.ask_shards(|link| self.concerns(link), request).await?;
        }
        self.commit_what_is_written().await
    }

    /// How something is written that has a number. It waits for the device, whatever the mapping's stability: the
    /// numbers of a page change when its write has ended.
    fn stamping(&self, lsn: Lsn) -> Writing {
        let writing = self.writing();
        if lsn.is_none() { writing } else { Writing { lsn, stability: Stability::Stable, ..writing } }
    }

    fn check_checkpoint(&self) -> Result<()> {
        self.check_open()?;
        callback::check_outside()?;
        guard::check(Context::Caller, self.open.shape.slot, &self.engine.links[0].counters)?;
        self.open.durability.check()
    }

    /// Whether the mapping holds a log, which is synced before what is gated by it.
    pub(crate) fn holds_log(&self) -> bool {
        self.open.gates.log_of.is_some()
    }

    /// Flushes the device, unless everything that has completed is durable already.
    async fn commit_what_is_written(&self) -> Result<()> {
        self.commit_streams().await?;
        self.open.durability.check()
    }
}
