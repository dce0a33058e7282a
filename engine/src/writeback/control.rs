//! What is asked of a writeback pass: how far, how hard, and for whom (`struct writeback_control`).

use std::ops::Range;

use crate::error::{Error, Result};

/// What a pass promises (`enum writeback_sync_modes`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncMode {
    /// Background (`WB_SYNC_NONE`): writes what it can have without waiting. It passes over folios that somebody holds
    /// exclusively, that the device is still writing, or whose last write failed; it stops at a spent budget and at the
    /// first error; it does nothing where the device is congested, or where an integrity pass of the same mapping is issuing.
    None,
    /// Integrity (`WB_SYNC_ALL`): writes everything that was dirty when it began, waits where it must, goes on past
    /// errors and a spent budget, and returns the first error at its end.
    All,
}

/// Why a pass runs (`enum wb_reason`): what waits for it decides which pass issues first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// A caller waits for durability (`WB_REASON_SYNC`).
    Sync,
    /// A mapping is being closed (`WB_REASON_SYNC`).
    Close,
    /// Requests wait for frames, or reclaim has asked for clean folios (`WB_REASON_VMSCAN`).
    Reclaim,
    /// More pages are dirty than the background limit (`WB_REASON_BACKGROUND`).
    DirtyLimit,
    /// A caller asked for writeback, for reasons of its own.
    Caller,
    /// Pages have been dirty for longer than the flush interval (`WB_REASON_PERIODIC`).
    Expiry,
    /// Poisoned pages, whose write failed for good, are tried once more.
    Poisoned,
}

impl Reason {
    /// All reasons, the most urgent first.
    pub const ALL: [Self; 7] = [
        Self::Sync,
        Self::Close,
        Self::Reclaim,
        Self::DirtyLimit,
        Self::Caller,
        Self::Expiry,
        Self::Poisoned,
    ];

    /// Which pass of a shard issues first where several could (`wb_priority`): that of the higher number. Passes of equal
    /// priority take turns, batch by batch.
    #[must_use]
    pub const fn priority(self) -> u8 {
        match self {
            Self::Sync | Self::Close => 5,
            Self::Reclaim => 4,
            Self::DirtyLimit => 3,
            Self::Caller => 2,
            Self::Expiry => 1,
            Self::Poisoned => 0,
        }
    }
}

/// From where a pass is begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// Ordinary code of the embedder.
    Caller,
    /// A thread or task whose work is writing back.
    Flusher,
    /// Code that runs because memory is short. It may evict clean folios and ask the flusher, never write: a pass is
    /// refused with [`Error::ReclaimContext`] (WB-10).
    Reclaim,
}

/// Which part of its mapping a pass covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WritebackRange {
    /// All of it.
    Whole,
    /// The whole pages of a byte range (`range_start`, `range_end`).
    Bytes(Range<u64>),
    /// From the saved writeback index of the mapping in each shard to the end (`range_cyclic`). Ending early it saves the
    /// index after its last folio, reaching the end it saves 0; it never wraps (WB-02). Background only.
    Cyclic,
}

/// What is asked of a pass (`struct writeback_control`).
///
/// ```
/// use foliant::{Reason, WritebackControl};
///
/// let control = WritebackControl::background().pages_max(256).reason(Reason::Caller);
/// assert_eq!(control.pages_max, Some(256));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WritebackControl {
    /// What it promises (`sync_mode`).
    pub sync_mode: SyncMode,
    /// What it covers.
    pub range: WritebackRange,
    /// How many pages it may write, all shards together (`nr_to_write`); `None` for as many as there are. An integrity
    /// pass goes on past it.
    pub pages_max: Option<u64>,
    /// Whether a background pass first marks what is dirty and then writes only that (`tagged_writepages`), so that it
    /// ends although others keep dirtying pages of its range. An integrity pass always does.
    pub tag_first: bool,
    /// Why it runs; sets its priority.
    pub reason: Reason,
    /// From where it is begun.
    pub context: Context,
}

impl WritebackControl {
    /// A background pass over a whole mapping, where the last one stopped, without a limit.
    #[must_use]
    pub const fn background() -> Self {
        Self {
            sync_mode: SyncMode::None,
            range: WritebackRange::Cyclic,
            pages_max: None,
            tag_first: false,
            reason: Reason::Caller,
            context: Context::Caller,
        }
    }

    /// An integrity pass over a whole mapping.
    #[must_use]
    pub const fn integrity() -> Self {
        Self {
            sync_mode: SyncMode::All,
            range: WritebackRange::Whole,
            pages_max: None,
            tag_first: true,
            reason: Reason::Sync,
            context: Context::Caller,
        }
    }

    /// The same over the pages of a byte range.
    #[must_use]
    pub fn bytes(mut self, range: Range<u64>) -> Self {
        self.range = WritebackRange::Bytes(range);
        self
    }

    /// The same over the whole mapping, from its start.
    #[must_use]
    pub fn whole(mut self) -> Self {
        self.range = WritebackRange::Whole;
        self
    }

    /// The same with a budget in pages.
    #[must_use]
    pub const fn pages_max(mut self, pages: u64) -> Self {
        self.pages_max = Some(pages);
        self
    }

    /// The same, writing only what is dirty when it begins.
    #[must_use]
    pub const fn tag_first(mut self) -> Self {
        self.tag_first = true;
        self
    }

    /// The same for another reason.
    #[must_use]
    pub const fn reason(mut self, reason: Reason) -> Self {
        self.reason = reason;
        self
    }

    /// The same from another context.
    #[must_use]
    pub const fn context(mut self, context: Context) -> Self {
        self.context = context;
        self
    }

    /// Checks what can be checked without a mapping.
    pub(crate) fn check(&self) -> Result<()> {
        if self.pages_max == Some(0) {
            return Err(Error::Option {
                option: "pages_max",
                value: "0".to_owned(),
                reason:
                    "a pass with a budget of no pages writes nothing; give it at least 1, or None for all"
                        .to_owned(),
            });
        }
        if self.sync_mode == SyncMode::All && self.range == WritebackRange::Cyclic {
            return Err(Error::Option {
                option: "range",
                value: "Cyclic".to_owned(),
                reason: "an integrity pass covers all of its range, wherever the last pass stopped; use Whole or Bytes"
                    .to_owned(),
            });
        }
        Ok(())
    }
}

/// How a pass ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum PassEnd {
    /// It reached the end of its range.
    #[default]
    Complete,
    /// Its budget was spent.
    Budget,
    /// The device had enough to write when it was to begin (WB-19).
    Congested,
    /// An integrity pass of the same mapping is issuing, or came while this one ran: that one writes what is there.
    Taken,
    /// It was dropped by its owner.
    Dropped,
    /// It stopped at an error.
    Failed,
}

/// What became of a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WritebackOutcome {
    /// Pages that were submitted. After an integrity pass they are on the device; after a background pass they may
    /// still be on their way.
    pub pages_written: u64,
    /// Pages put off: "not now" of a callback, or a [`LockedFolio`](crate::LockedFolio) that was dropped.
    pub pages_postponed: u64,
    /// How it ended; of several shards the one that did least.
    pub ended: PassEnd,
}

impl WritebackOutcome {
    /// Adds what another shard did.
    pub(crate) fn add(&mut self, other: Self) {
        self.pages_written += other.pages_written;
        self.pages_postponed += other.pages_postponed;
        self.ended = self.ended.max(other.ended);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wb20_what_somebody_waits_for_has_priority() {
        assert!(Reason::ALL.windows(2).all(|pair| pair[0].priority() >= pair[1].priority()));
        assert!(Reason::Sync.priority() > Reason::Reclaim.priority());
        assert!(Reason::Caller.priority() > Reason::Expiry.priority());
    }

    #[test]
    fn a_budget_of_nothing_and_a_cyclic_integrity_pass_are_refused_with_what_helps() {
        let error = WritebackControl::background().pages_max(0).check().unwrap_err().to_string();
        assert!(error.contains("pages_max = 0") && error.contains("at least 1"), "{error}");
        let cyclic = WritebackControl { range: WritebackRange::Cyclic, ..WritebackControl::integrity() };
        let error = cyclic.check().unwrap_err().to_string();
        assert!(error.contains("Whole or Bytes"), "{error}");
        WritebackControl::background().check().unwrap();
        WritebackControl::integrity().bytes(0..7).check().unwrap();
    }
}
