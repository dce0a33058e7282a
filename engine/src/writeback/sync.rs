//! A sync's part in one shard: tag, write, then wait for every write in the range, whoever submitted it (WB-29).
//! The commit comes after all shards have answered and is the caller's next request.
//!
//! # Who issues when (WB-14)
//!
//! Syncs don't issue: passes do. All syncs of a mapping that wait at the beginning of a step of the shard become **one**
//! integrity pass, over the union of their ranges. Of the passes of a mapping one issues at a time, for one batch; then
//! the next of equal priority has its turn. So
//!
//! - integrity passes exclude each other batch by batch, which is all that exclusion is for: no page is handed out twice,
//!   and runs of neighbours aren't torn by a second pass among them;
//! - a small sync doesn't queue behind a large one. It waits for a batch of each pass that was there before it, and
//!   returns after its own pages' I/O, although gigabytes of another range are being written;
//! - a sync is done with issuing when the cursor of its pass has passed its range, and waits for its writes only;
//! - a pass that comes to a page which somebody holds is waited for by the syncs whose range has that page. The others
//!   leave it at once and become a new pass, so nobody waits for a holder who has nothing to do with him.

use std::ops::Range;

use super::control::WritebackOutcome;
use crate::cache::lsn::Lsn;
use crate::cache::owned::ShardCache;
use crate::cache::shape::MappingShape;
use crate::cache::tags::{Find, Tag};
use crate::error::{Error, Operation, Result};
use crate::reply::SlotId;

/// Counts the passes of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PassId(pub u64);

/// How far a sync has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It waits for a pass.
    Waiting,
    /// This pass issues for it.
    Issuing(PassId),
    /// Everything of its range is in the queue or done; it waits for completions.
    Issued,
}

/// One sync in progress.
#[derive(Debug)]
pub(crate) struct SyncJob {
    pub slot: SlotId,
    pub mapping: u16,
    /// The whole range, shard-local.
    pub range: Range<u64>,
    pub stage: Stage,
    /// The mapping's highest log sequence number when it began: what was stamped higher came later.
    pub cap: Lsn,
    /// Everything before this page has ended writeback.
    waited: u64,
    /// The first error of a write in the range; kept to the end (WB-05).
    pub error: Option<Error>,
    /// It is answered though writes of its range are still tried again: its mapping is soft (WB-22).
    gives_up: bool,
    /// What its pass did, where it had one for itself.
    pub outcome: WritebackOutcome,
}

impl SyncJob {
    /// A sync of the shard-local pages `range`.
    pub(crate) fn new(slot: SlotId, mapping: u16, range: Range<u64>) -> Self {
        Self {
            slot,
            mapping,
            waited: range.start,
            range,
            stage: Stage::Waiting,
            cap: Lsn::NONE,
            error: None,
            gives_up: false,
            outcome: WritebackOutcome::default(),
        }
    }

    /// What is left of a request whose own pass has issued everything.
    pub(crate) fn issued(
        slot: SlotId,
        mapping: u16,
        range: Range<u64>,
        result: Result<WritebackOutcome>,
    ) -> Self {
        let mut job = Self { stage: Stage::Issued, ..Self::new(slot, mapping, range) };
        match result {
            Ok(outcome) => job.outcome = outcome,
            Err(error) => job.error = Some(error),
        }
        job
    }

    /// Whether it can be answered: all of it is issued, and every write in the range has ended.
    pub(crate) fn is_done(&mut self, cache: &ShardCache, shape: &MappingShape) -> bool {
        self.gives_up || self.stage == Stage::Issued && self.writes_have_ended(cache, shape)
    }

    /// Whether every write in the range has ended. The cursor only moves up, so that pages which the flusher
    /// writes again meanwhile don't hold the sync for ever (`filemap_fdatawait_range`).
    fn writes_have_ended(&mut self, cache: &ShardCache, shape: &MappingShape) -> bool {
        let rest = self.waited..self.range.end;
        match cache.tree.next(shape.tree, Find::Tagged(Tag::Writeback), rest) {
            None => {
                self.waited = self.range.end;
                true
            }
            Some(leaf) => {
                self.waited = self.waited.max(leaf.base + u64::from(leaf.pages.trailing_zeros()));
                false
            }
        }
    }

    /// A write of this mapping failed: does it concern this sync?
    pub(crate) fn note_failure(&mut self, mapping: u16, local: u64, error: &Error) {
        if mapping == self.mapping && self.range.contains(&local) && self.error.is_none() {
            self.error = Some(error.clone());
        }
    }

    /// A write of this mapping, which is soft, will be tried again: a sync that it concerns doesn't wait for that.
    pub(crate) fn note_retry(
        &mut self,
        mapping: u16,
        local: &Range<u64>,
        page: u64,
        cause: foliant_nvme::CommandError,
    ) {
        if mapping == self.mapping && self.range.start < local.end && local.start < self.range.end {
            let again = Error::TryAgain { operation: Operation::Write, page, cause: Some(cause) };
            self.error.get_or_insert(again);
            self.gives_up = true;
        }
    }

    /// The answer.
    pub(crate) fn result(&mut self) -> Result<WritebackOutcome> {
        self.error.take().map_or(Ok(self.outcome), Err)
    }
}
