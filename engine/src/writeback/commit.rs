//! Commits: one NVMe Flush makes the completed writes of everybody who waits durable (WB-21, WB-29, WB-30).
//!
//! A Flush covers the writes that had *completed* when it was submitted. [`Durability`] therefore counts
//! completed writes of a namespace, all shards together, and remembers up to which count a Flush that succeeded
//! was submitted. A sync that finds nothing newer needs none; others that wait while one is in flight share
//! the next.

use std::collections::VecDeque;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use foliant_nvme::CommandError;

use crate::error::{Error, Result};
use crate::reply::SlotId;

/// Whether what a write completed may be lost with the power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteCache {
    /// It may not.
    None,
    /// Until a Flush.
    Flushed,
    /// Until a Flush, but for writes with FUA.
    FlushedOrPassed,
}

/// What is known of a namespace's durability; shared by all shards and handles.
#[derive(Debug)]
pub(crate) struct Durability {
    namespace: u32,
    cache: WriteCache,
    /// Writes that completed.
    written: AtomicU64,
    /// All writes up to this count are durable.
    flushed: AtomicU64,
    failed: OnceLock<CommandError>,
}

impl Durability {
    pub(crate) fn new(namespace: u32, cache: WriteCache) -> Self {
        // A sync before the first write still flushes: whoever had the device before may have left writes.
        let (written, flushed) = (AtomicU64::new(1), AtomicU64::new(0));
        Self { namespace, cache, written, flushed, failed: OnceLock::new() }
    }

    /// A write without FUA completed. Called before its folios leave WRITEBACK, so that whoever sees them clean counts it.
    pub(crate) fn write_completed(&self) {
        self.written.fetch_add(1, Ordering::SeqCst);
    }

    /// The writes that a Flush submitted now would cover.
    fn epoch(&self) -> u64 {
        self.written.load(Ordering::SeqCst)
    }

    /// Whether everything that has completed by now is durable already.
    pub(crate) fn is_settled(&self) -> bool {
        self.cache == WriteCache::None || self.flushed.load(Ordering::SeqCst) >= self.epoch()
    }

    /// Whether a write with FUA takes the place of a write and a Flush: there is a cache that it passes, and nothing else
    /// in it.
    pub(crate) fn prefers_fua(&self) -> bool {
        self.cache == WriteCache::FlushedOrPassed && self.is_settled()
    }

    fn settle(&self, epoch: u64) {
        self.flushed.fetch_max(epoch, Ordering::SeqCst);
    }

    /// Latches the namespace failed: a Flush failed, so what is durable is unknown.
    pub(crate) fn fail(&self, source: CommandError) {
        if self.failed.set(source).is_ok() {
            tracing::error!(namespace = self.namespace, %source, "a flush failed: the namespace takes no more writes");
        }
    }

    /// Fails for ever after a Flush has failed.
    pub(crate) fn check(&self) -> Result<()> {
        match self.failed.get() {
            None => Ok(()),
            Some(&source) => Err(Error::NamespaceFailed { namespace: self.namespace, source }),
        }
    }
}

/// What the shard should do about a namespace's commits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CommitStep {
    /// Nothing now.
    Idle,
    /// Everybody who waits is served: nothing newer than the last Flush.
    Settled,
    /// Submit a Flush; it covers `epoch`.
    Flush { epoch: u64 },
}

/// The commits of one namespace, at the shard that submits its Flushes.
#[derive(Debug, Default)]
pub(crate) struct CommitGroup {
    /// Served by the next Flush.
    waiting: VecDeque<SlotId>,
    /// Served by the Flush in flight.
    covered: Vec<SlotId>,
    in_flight: bool,
    /// The flusher's expiry round wants the next Flush, and nobody waits for it.
    is_wanted: bool,
    /// How often the Flush has failed in passing.
    failures: u8,
    /// After such a failure, no Flush before this time.
    retry_ns: u64,
}

impl CommitGroup {
    pub(crate) fn join(&mut self, slot: SlotId) {
        self.waiting.push_back(slot);
    }

    /// The flusher wants what has completed to be durable some time.
    pub(crate) fn want(&mut self) {
        self.is_wanted = true;
    }

    pub(crate) fn step(&self, durability: &Durability, now_ns: u64) -> CommitStep {
        if self.in_flight || self.waiting.is_empty() && !self.is_wanted || now_ns < self.retry_ns {
            CommitStep::Idle
        } else if durability.is_settled() {
            CommitStep::Settled
        } else {
            CommitStep::Flush { epoch: durability.epoch() }
        }
    }

    /// A Flush was submitted for everybody who waits now; later ones wait for the next.
    ///
    /// Returns how many it serves.
    pub(crate) fn submitted(&mut self) -> u64 {
        debug_assert!(!self.in_flight);
        self.in_flight = true;
        self.is_wanted = false;
        self.covered.extend(self.waiting.drain(..));
        self.covered.len() as u64
    }

    /// The Flush wasn't carried out and is to be tried again at `retry_ns`, for everybody who waits by then.
    pub(crate) fn put_off(&mut self, retry_ns: u64) {
        self.in_flight = false;
        self.is_wanted = true;
        self.failures += 1;
        self.retry_ns = retry_ns;
        while let Some(slot) = self.covered.pop() {
            self.waiting.push_front(slot);
        }
    }

    /// How often the Flush that is in flight, or put off, has failed in passing.
    pub(crate) fn failures(&self) -> u8 {
        self.failures
    }

    /// When a Flush that was put off is due.
    pub(crate) fn due_ns(&self) -> Option<u64> {
        (self.failures > 0 && !self.in_flight).then_some(self.retry_ns)
    }

    /// The Flush ended: who was waiting for it.
    pub(crate) fn ended(
        &mut self,
        epoch: u64,
        result: std::result::Result<(), CommandError>,
        durability: &Durability,
    ) -> std::vec::Drain<'_, SlotId> {
        self.in_flight = false;
        (self.failures, self.retry_ns) = (0, 0);
        match result {
            Ok(()) => durability.settle(epoch),
            Err(error) => durability.fail(error),
        }
        self.covered.drain(..)
    }

    /// The queue is gone, and with it the Flush in flight: everybody who waits.
    pub(crate) fn give_up(&mut self) -> Vec<SlotId> {
        (self.in_flight, self.is_wanted) = (false, false);
        self.covered.drain(..).chain(self.waiting.drain(..)).collect()
    }

    /// Everybody who waits, when no Flush is needed.
    pub(crate) fn settled(&mut self) -> std::collections::vec_deque::Drain<'_, SlotId> {
        self.is_wanted = false;
        (self.failures, self.retry_ns) = (0, 0);
        self.waiting.drain(..)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn wb21_syncs_that_wait_together_share_one_flush() {
        let durability = Durability::new(1, WriteCache::FlushedOrPassed);
        let mut group = CommitGroup::default();
        group.join(SlotId(0));
        group.join(SlotId(1));
        let CommitStep::Flush { epoch } = group.step(&durability, 0) else { panic!("a flush is due") };
        group.submitted();
        assert_eq!(group.step(&durability, 0), CommitStep::Idle);
        assert_eq!(group.ended(epoch, Ok(()), &durability).count(), 2);
        assert!(durability.is_settled());
    }

    #[test]
    fn wb29_a_sync_that_arrives_during_a_flush_is_not_served_by_it_if_a_write_completed_since() {
        let durability = Durability::new(1, WriteCache::FlushedOrPassed);
        let mut group = CommitGroup::default();
        group.join(SlotId(0));
        let CommitStep::Flush { epoch } = group.step(&durability, 0) else { panic!("a flush is due") };
        group.submitted();
        durability.write_completed();
        group.join(SlotId(1));
        assert_eq!(group.ended(epoch, Ok(()), &durability).collect::<Vec<_>>(), [SlotId(0)]);
        assert!(matches!(group.step(&durability, 0), CommitStep::Flush { .. }));
    }

    #[test]
    fn wb29_no_flush_is_sent_when_a_later_one_has_succeeded() {
        let durability = Durability::new(1, WriteCache::FlushedOrPassed);
        let mut group = CommitGroup::default();
        group.join(SlotId(0));
        let CommitStep::Flush { epoch } = group.step(&durability, 0) else { panic!("a flush is due") };
        group.submitted();
        group.join(SlotId(1));
        assert_eq!(group.ended(epoch, Ok(()), &durability).count(), 1);
        assert_eq!(group.step(&durability, 0), CommitStep::Settled);
    }

    #[test]
    fn wb21_a_device_without_a_volatile_write_cache_needs_no_flush() {
        let durability = Durability::new(1, WriteCache::None);
        durability.write_completed();
        assert!(durability.is_settled());
    }
}
