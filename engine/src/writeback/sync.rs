//! A sync's part in one shard: tag, write, then wait for every write in the range, whoever submitted it (WB-29).
//! The commit comes after all shards have answered and is the caller's next request.

use std::ops::Range;

use super::pass::PassState;
use crate::cache::folio::FrameId;
use crate::cache::owned::ShardCache;
use crate::cache::shape::MappingShape;
use crate::cache::tags::{Find, Tag};
use crate::error::Error;
use crate::reply::SlotId;

/// One sync in progress.
#[derive(Debug)]
pub(crate) struct SyncJob {
    pub slot: SlotId,
    pub mapping: u16,
    /// The whole range, shard-local.
    pub range: Range<u64>,
    /// The pass, until it is at its end.
    pub pass: Option<PassState>,
    /// Everything before this page has ended writeback.
    waited: u64,
    /// The folio that the pass is blocked on; its release kicks the shard.
    pub blocked: Option<FrameId>,
    /// The first error of a write in the range; kept to the end (WB-05).
    pub error: Option<Error>,
    /// Since when the job has made no progress.
    pub idle_since_ns: u64,
}

impl SyncJob {
    /// Begins a sync: tags at once.
    pub(crate) fn new(
        slot: SlotId,
        cache: &ShardCache,
        shape: &MappingShape,
        pages: Range<u64>,
        now_ns: u64,
    ) -> Self {
        let range = shape.striping.local_range(cache.shard, pages);
        let pass = PassState::integrity(cache, shape, range.clone());
        Self {
            slot,
            mapping: shape.slot,
            waited: range.start,
            range,
            pass: Some(pass),
            blocked: None,
            error: None,
            idle_since_ns: now_ns,
        }
    }

    /// Whether every write in the range has ended. The cursor only moves up, so that pages which the flusher
    /// writes again meanwhile don't hold the sync for ever (`filemap_fdatawait_range`).
    pub(crate) fn writes_have_ended(&mut self, cache: &ShardCache, shape: &MappingShape) -> bool {
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
}
