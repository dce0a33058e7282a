//! A mapping's syncs and passes: what callers have written, and when (WB-01 to WB-05, WB-23).

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Mapping;
use crate::error::{Error, Result};
#[cfg(doc)]
use crate::gate::Gate;
use crate::reply::block_on;
use crate::shard::link::ShardLink;
use crate::shard::passes::PassOrder;
use crate::shard::request::Request;
use crate::writeback::callback::{self, Callback, WritebackCallback};
use crate::writeback::control::{
    Context, PassEnd, SyncMode, WritebackControl, WritebackOutcome, WritebackRange,
};
use crate::writeback::guard;
#[cfg(doc)]
use crate::writeback::pass::DirtyFolio;

impl Mapping {
    /// Makes everything durable that was written before the call: when it returns `Ok`, power may fail.
    ///
    /// # Errors
    /// [`Error::Device`] when a page couldn't be written, now or in the background since this handle's last
    /// sync; the page stays dirty and the next sync tries again. [`Error::NamespaceFailed`] when the device's
    /// flush failed, now or ever since open. [`Error::PinnedTooLong`] when somebody kept a dirty page
    /// exclusively pinned. [`Error::Gated`] when the log of a page didn't become durable in time ([`Gate`]).
    pub fn sync(&self) -> Result<()> {
        block_on(self.sync_async())
    }

    /// As [`sync`](Self::sync), without blocking the thread.
    ///
    /// # Errors
    /// As `sync`.
    pub async fn sync_async(&self) -> Result<()> {
        // Whatever is in the cache, wherever the end is.
        self.sync_pages(|| Ok(0..self.open.shape.pages())).await
    }

    /// Makes the pages of a byte range durable.
    ///
    /// # Errors
    /// As [`sync`](Self::sync), and [`Error::OutOfRange`].
    pub fn sync_range(&self, range: Range<u64>) -> Result<()> {
        block_on(self.sync_range_async(range))
    }

    /// As [`sync_range`](Self::sync_range), without blocking the thread.
    ///
    /// # Errors
    /// As `sync_range`.
    pub async fn sync_range_async(&self, range: Range<u64>) -> Result<()> {
        self.sync_pages(|| self.pages_of(range)).await
    }

    async fn sync_pages(&self, pages: impl FnOnce() -> Result<Range<u64>>) -> Result<()> {
        let begun = Instant::now();
        self.check_open()?;
        callback::check_outside()?;
        guard::check(Context::Caller, self.open.shape.slot, &self.engine.links[0].counters)?;
        let pages = pages()?;
        self.open.durability.check()?;
        let slot = self.open.shape.slot;
        let request = || Request::Sync { mapping: slot, pages: pages.clone() };
        let written = self.ask_shards(|link| self.concerns(link), request).await;
        let durable = self.make_durable(written).await.map(drop);
        self.engine.record_sync(self.open.shape.namespace.id(), begun);
        durable
    }

    /// Whether a shard has DIRTY or WRITEBACK pages of this mapping; one without has nothing to say. One that failed has:
    /// what a discard had taken out of the cache by then, the device may never have been told.
    pub(super) fn concerns(&self, link: &ShardLink) -> bool {
        link.cache.marked[self.open.shape.slot as usize].any() || link.is_failed() && self.has_pages_in(link)
    }

    fn has_pages_in(&self, link: &ShardLink) -> bool {
        let shape = &self.open.shape;
        !shape.striping.local_range(link.shard, 0..shape.pages()).is_empty()
    }

    /// The end of a sync whose writes have ended: the commit, and what this handle hasn't been told yet.
    pub(super) async fn make_durable(&self, written: Result<WritebackOutcome>) -> Result<WritebackOutcome> {
        let durability = &self.open.durability;
        // Only now the flush: it covers what has completed before it is submitted (WB-29).
        let durable = match &written {
            Ok(_) => self.commit_streams().await.and_then(|()| durability.check()),
            Err(_) => Ok(()),
        };
        match written.and_then(|outcome| durable.map(|()| outcome)) {
            // This says nothing of failed writebacks: what there is to tell of them is left to the next sync (WB-23).
            Err(error) if !matches!(error, Error::Device { .. }) => Err(error),
            result => {
                let earlier = self.open.errors.check_and_advance(&self.told);
                result.and_then(|outcome| earlier.map_or(Ok(outcome), Err))
            }
        }
    }

    /// Runs a writeback pass as `control` says, in every shard that holds dirty pages of this mapping.
    ///
    /// A background pass ([`WritebackControl::background`]) returns when what it takes is with the device; failures of
    /// its writes are told by the next [`sync`](Self::sync). An integrity pass ([`WritebackControl::integrity`]) is a
    /// sync: what it covers is durable when it returns `Ok`. A budget counts all shards together.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] and [`Error::InvertedRange`]; [`Error::Option`] for a budget of 0 or a cyclic integrity
    /// pass; [`Error::ReclaimContext`] (WB-10); [`Error::InsidePass`]; [`Error::Device`] for a background pass when a
    /// write failed while it ran; those of [`sync`](Self::sync) for an integrity pass.
    pub fn writeback(&self, control: &WritebackControl) -> Result<WritebackOutcome> {
        block_on(self.writeback_async(control))
    }

    /// As [`writeback`](Self::writeback), without blocking the thread.
    ///
    /// # Errors
    /// As `writeback`.
    pub async fn writeback_async(&self, control: &WritebackControl) -> Result<WritebackOutcome> {
        self.run_pass(control, None).await
    }

    /// As [`writeback`](Self::writeback), asking `callback` for each folio whether it is written now
    /// (`write_cache_pages`).
    ///
    /// The callback runs on the shard, which does nothing else meanwhile: it must be quick and must not wait for
    /// anything. Requests to the engine from inside it end with [`Error::InsidePass`]; [`DirtyFolio::bytes`] has the
    /// page. The same callback may be asked by several shards at once.
    ///
    /// # Errors
    /// As `writeback`; [`Error::CallbackPanicked`]; [`Error::TryAgain`] when an integrity pass was told "not now" for a
    /// page each time it asked (WB-09).
    pub fn writeback_with(
        &self,
        control: &WritebackControl,
        callback: &WritebackCallback,
    ) -> Result<WritebackOutcome> {
        block_on(self.writeback_with_async(control, callback))
    }

    /// As [`writeback_with`](Self::writeback_with), without blocking the thread.
    ///
    /// # Errors
    /// As `writeback_with`.
    pub async fn writeback_with_async(
        &self,
        control: &WritebackControl,
        callback: &WritebackCallback,
    ) -> Result<WritebackOutcome> {
        self.run_pass(control, Some(Callback(callback.clone()))).await
    }

    /// Asks the flushers of the shards that hold dirty pages of this mapping to write, whatever the limits
    /// (`wakeup_flusher_threads`). Never waits, never fails, and may be called from anywhere: it is what reclaim does
    /// instead of writing (WB-10).
    pub fn request_writeback(&self) {
        self.engine.links.iter().filter(|link| self.concerns(link)).for_each(|link| link.request_writeback());
    }

    async fn run_pass(
        &self,
        control: &WritebackControl,
        callback: Option<Callback>,
    ) -> Result<WritebackOutcome> {
        self.check_open()?;
        let pages = self.pages_of_pass(control)?;
        guard::check(control.context, self.open.shape.slot, &self.engine.links[0].counters)?;
        let mapping = self.open.shape.slot;
        let order = |control| Request::Writeback {
            mapping,
            order: PassOrder { control, pages: pages.clone(), callback: callback.clone() },
        };
        if control.sync_mode == SyncMode::All {
            let written = self.ask_shards(|link| self.concerns(link), || order(control.clone())).await;
            return self.make_durable(written).await;
        }
        let Some(pages_max) = control.pages_max else {
            return self.ask_shards(|link| self.concerns(link), || order(control.clone())).await;
        };
        // One after the other, each with what the others left of the budget; another one first each time.
        let mut outcome = WritebackOutcome::default();
        let links = &self.engine.links;
        let first = self.passes.fetch_add(1, Ordering::Relaxed) as usize;
        for at in 0..links.len() {
            let link = &links[(first + at) % links.len()];
            if !self.concerns(link) {
                continue;
            }
            if outcome.pages_written >= pages_max {
                outcome.ended = outcome.ended.max(PassEnd::Budget);
                break;
            }
            let control = control.clone().pages_max(pages_max - outcome.pages_written);
            outcome.add(link.request(order(control)).await?.outcome);
        }
        Ok(outcome)
    }

    /// Checks what a pass is asked to do, and says which pages of the file that concerns.
    pub(crate) fn pages_of_pass(&self, control: &WritebackControl) -> Result<Range<u64>> {
        callback::check_outside()?;
        control.check()?;
        let pages = match &control.range {
            WritebackRange::Whole | WritebackRange::Cyclic => 0..self.open.shape.pages(),
            WritebackRange::Bytes(bytes) => self.pages_of(bytes.clone())?,
        };
        self.open.durability.check()?;
        Ok(pages)
    }
}
