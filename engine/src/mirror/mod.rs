//! Mirrors: a second stream of a mapping's writeback, on another namespace or another device (WB-15).
//!
//! A mirror is only written. Every write command of a mirrored mapping has its counterpart there, cut to the mirror's own
//! limits and with the same frames as its data; a folio's writeback ends when both have ended. Losing the mirror costs
//! nothing but the mirror: it is *degraded*, which is put on record, and nothing is written to it any more until
//! [`Mapping::resync_mirror`](crate::Mapping::resync_mirror) has made it equal again.
//!
//! | file | owns |
//! |---|---|
//! | this one | what is asked for, what is known of one mapping's mirror |
//! | [`label`] | what stands on the devices, and when a mirror is in sync after a restart |
//! | [`writeback::streams`](crate::writeback::streams) | which writes have a counterpart under way, and which stream is fed next |
//! | [`shard::mirror`](crate::shard::mirror) | the mirror's queue: parts, completions, retries, flushes, its loss |
//! | [`shard::resync`](crate::shard::resync) | copying, beside writes |
//! | [`shard::raw`](crate::shard::raw) | labels and windows of a copy, outside the cache |
//! | [`mapping::mirror`](crate::mapping::mirror) | opening, closing and resynchronising, step by step |

pub(crate) mod label;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use foliant_nvme::{CommandError, Namespace};

use crate::cache::frames::PAGE_BYTES;
use crate::cache::shape::MappingShape;
use crate::error::{Error, Operation, Result};
use crate::writeback::commit::Durability;

/// Where an engine's mirrors are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum MirrorDevice {
    /// Nowhere: its mappings can't be mirrored.
    #[default]
    None,
    /// On the engine's own device, in other ranges or namespaces. Each shard has a second queue pair there.
    SameDevice,
    /// On another device, by its URI. Each shard has a queue pair there, and the frames are mapped for both devices.
    Uri(String),
}

/// The mirror of a mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorOptions {
    /// Namespace on the engine's [mirror device](crate::EngineOptions::mirror).
    pub namespace: u32,
    /// First byte there; the range is as long as the mapping, and a block more for its label.
    pub start_bytes: u64,
    /// Whether syncs tell when the mirror is degraded.
    pub on_degrade: OnDegrade,
}

impl Default for MirrorOptions {
    fn default() -> Self {
        Self { namespace: 1, start_bytes: 0, on_degrade: OnDegrade::default() }
    }
}

/// What a sync says of a mirror that was degraded. Either way what it covers is durable on the primary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnDegrade {
    /// Nothing: it succeeds. [`Mapping::mirror_state`](crate::Mapping::mirror_state), the counter
    /// [`mirrors_degraded`](crate::EngineStats::mirrors_degraded) and an event at level ERROR tell. A mirror is there so
    /// that a database goes on when a device is lost, and most stop at a sync that fails.
    #[default]
    GoOn,
    /// The next sync of each handle ends with [`Error::MirrorDegraded`], once.
    TellAtSync,
}

/// What is known of a mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MirrorState {
    /// Everything that is durable on the primary is durable on the mirror.
    InSync,
    /// It isn't written any more, and holds nothing that may be relied on.
    Degraded {
        /// When, in nanoseconds on the clock by which the shards are polled; 0 since it was opened.
        since_ns: u64,
        /// Why.
        cause: MirrorCause,
    },
    /// It is written again, and what it lacks is being copied.
    Resyncing {
        /// Bytes that have been copied.
        done_bytes: u64,
        /// Bytes to copy.
        total_bytes: u64,
    },
}

/// Why a mirror is degraded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MirrorCause {
    /// The pair was never synchronised, or a label is damaged.
    #[error("it was never synchronised with this range")]
    NeverSynced,
    /// The mirror belongs to another pair.
    #[error("it is the mirror of another pair")]
    OtherPair,
    /// The engine stopped without closing the mapping: the devices may differ in what was in flight.
    #[error("the pair was not closed cleanly")]
    NotClosed,
    /// The primary was written while the mirror was away or degraded.
    #[error("the primary was written without it")]
    LeftBehind,
    /// One half was opened as a plain mapping.
    #[error("the {0} was opened alone since")]
    OpenedAlone(MirrorRole),
    /// A command failed for good.
    #[error("a {operation} failed: {source}")]
    Command {
        /// What was asked of the mirror.
        operation: Operation,
        /// Its status.
        source: CommandError,
    },
    /// The device is gone, has failed or doesn't answer.
    #[error("its device is lost: {0}")]
    Lost(Arc<str>),
    /// A resynchronisation didn't come to its end.
    #[error("its resynchronisation was given up")]
    ResyncGivenUp,
}

/// What a mirror counts as, beside its progress.
#[derive(Clone, Debug)]
enum Standing {
    InSync,
    Degraded { since_ns: u64, cause: MirrorCause },
    Resyncing,
}

/// The pair as its labels know it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PairNumbers {
    pub pair: u64,
    pub generation: u64,
    /// The mirror was opened alone, so it may hold what the primary doesn't.
    pub mirror_was_alone: bool,
}

/// The mirror of one open mapping, as shards and handles share it.
#[derive(Debug)]
pub(crate) struct OpenMirror {
    /// The mapping's geometry on the mirror: the same slot and pages, its own namespace and limits.
    pub shape: MappingShape,
    /// The mirror's namespace.
    pub durability: Arc<Durability>,
    pub options: MirrorOptions,
    pub write_zeroes: bool,
    /// The device that its namespace is of.
    pub on: StreamId,
    /// Whether writes go to it.
    is_fed: AtomicBool,
    standing: Mutex<Standing>,
    numbers: Mutex<PairNumbers>,
    copied_pages: AtomicU64,
}

impl OpenMirror {
    pub(crate) fn new(
        shape: MappingShape,
        durability: Arc<Durability>,
        options: MirrorOptions,
        write_zeroes: bool,
        on: StreamId,
    ) -> Self {
        let standing = Standing::Degraded { since_ns: 0, cause: MirrorCause::NeverSynced };
        Self {
            shape,
            durability,
            options,
            write_zeroes,
            on,
            is_fed: AtomicBool::new(false),
            standing: Mutex::new(standing),
            numbers: Mutex::default(),
            copied_pages: AtomicU64::new(0),
        }
    }

    /// Whether writes go to it: it is in sync, or being made so.
    #[inline]
    pub(crate) fn is_fed(&self) -> bool {
        self.is_fed.load(Ordering::SeqCst)
    }

    pub(crate) fn is_in_sync(&self) -> bool {
        matches!(*lock(&self.standing), Standing::InSync)
    }

    pub(crate) fn is_resyncing(&self) -> bool {
        matches!(*lock(&self.standing), Standing::Resyncing)
    }

    pub(crate) fn numbers(&self) -> PairNumbers {
        *lock(&self.numbers)
    }

    pub(crate) fn set_numbers(&self, numbers: PairNumbers) {
        *lock(&self.numbers) = numbers;
    }

    pub(crate) fn state(&self) -> MirrorState {
        match &*lock(&self.standing) {
            Standing::InSync => MirrorState::InSync,
            Standing::Degraded { since_ns, cause } => {
                MirrorState::Degraded { since_ns: *since_ns, cause: cause.clone() }
            }
            Standing::Resyncing => {
                let done = self.copied_pages.load(Ordering::Relaxed) * PAGE_BYTES as u64;
                let total_bytes = self.shape.capacity_bytes;
                MirrorState::Resyncing { done_bytes: done.min(total_bytes), total_bytes }
            }
        }
    }

    /// At open: how the labels found it.
    pub(crate) fn attach(&self, found: std::result::Result<(), MirrorCause>) {
        let mut standing = lock(&self.standing);
        self.is_fed.store(found.is_ok(), Ordering::SeqCst);
        *standing = match found {
            Ok(()) => Standing::InSync,
            Err(cause) => Standing::Degraded { since_ns: 0, cause },
        };
    }

    /// Nothing goes to it any more; true for the first who finds that out.
    pub(crate) fn degrade(&self, cause: MirrorCause, now_ns: u64) -> bool {
        let mut standing = lock(&self.standing);
        if matches!(*standing, Standing::Degraded { .. }) {
            return false;
        }
        self.is_fed.store(false, Ordering::SeqCst);
        *standing = Standing::Degraded { since_ns: now_ns, cause };
        true
    }

    /// Writes go to it again, beside a copy of everything. False when it isn't degraded.
    pub(crate) fn begin_resync(&self) -> bool {
        let mut standing = lock(&self.standing);
        if !matches!(*standing, Standing::Degraded { .. }) {
            return false;
        }
        self.copied_pages.store(0, Ordering::Relaxed);
        *standing = Standing::Resyncing;
        self.is_fed.store(true, Ordering::SeqCst);
        true
    }

    pub(crate) fn note_copied(&self, pages: u64) {
        self.copied_pages.fetch_add(pages, Ordering::Relaxed);
    }

    /// Everything is copied and durable. False when it was degraded meanwhile.
    pub(crate) fn end_resync(&self) -> bool {
        let mut standing = lock(&self.standing);
        let is_resyncing = matches!(*standing, Standing::Resyncing);
        if is_resyncing {
            *standing = Standing::InSync;
        }
        is_resyncing
    }

    /// Whether its device can be relied on to keep what it is flushed.
    pub(crate) fn check_flushes(&self) -> Result<()> {
        check_flushes(&self.durability)
    }

    /// Whether it holds completed writes that may be in a volatile cache.
    pub(crate) fn needs_commit(&self) -> bool {
        self.is_fed() && !self.durability.is_settled()
    }
}

/// Fails for ever after a Flush of a mirror's namespace has failed: of what it held then nobody knows what is durable.
pub(crate) fn check_flushes(durability: &Durability) -> Result<()> {
    durability.check().map_err(|error| match error {
        Error::NamespaceFailed { source, .. } => {
            Error::MirrorDegraded { cause: MirrorCause::Command { operation: Operation::Flush, source } }
        }
        error => error,
    })
}

/// Where a label lies: on the block behind its range.
#[derive(Clone, Debug)]
pub(crate) struct LabelPlace {
    pub stream: StreamId,
    pub namespace: Namespace,
    pub start_bytes: u64,
    pub len_bytes: u64,
}

impl LabelPlace {
    pub(crate) fn of(stream: StreamId, shape: &MappingShape) -> Self {
        let start_bytes = shape.first_lba * u64::from(shape.namespace.block_bytes());
        Self { stream, namespace: shape.namespace.clone(), start_bytes, len_bytes: shape.capacity_bytes }
    }

    /// The byte after its block.
    pub(crate) fn end_bytes(&self) -> u64 {
        self.start_bytes + self.len_bytes + u64::from(self.namespace.block_bytes())
    }
}

/// One of the streams that writeback feeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamId {
    Primary,
    Mirror,
}

/// What one caller does at a time with an open mapping that has a mirror: read and write its labels, resynchronise, close.
#[derive(Debug, Default)]
pub(crate) struct LabelTurn {
    is_taken: AtomicBool,
    /// The labels have been read, and marked as in use.
    is_attached: AtomicBool,
}

impl LabelTurn {
    pub(crate) fn is_attached(&self) -> bool {
        self.is_attached.load(Ordering::Acquire)
    }

    pub(crate) fn set_attached(&self) {
        self.is_attached.store(true, Ordering::Release);
    }

    /// Waits for its turn, at most for `patience`: who has it may never be polled again. Turns are rare, so who waits asks
    /// again instead of being woken.
    pub(crate) async fn take(&self, patience: Duration) -> Result<TakenTurn<'_>> {
        let since = Instant::now();
        std::future::poll_fn(|context| {
            if !self.is_taken.swap(true, Ordering::Acquire) {
                return Poll::Ready(Ok(TakenTurn(self)));
            }
            if since.elapsed() > patience {
                return Poll::Ready(refuse(format!(
                    "another handle has been opening, closing or resynchronising the mapping for more than \
                     {patience:?}; poll its future, or drop it"
                )));
            }
            std::thread::yield_now();
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await
    }
}

/// Gives the turn back when it is dropped.
#[derive(Debug)]
pub(crate) struct TakenTurn<'a>(&'a LabelTurn);

impl Drop for TakenTurn<'_> {
    fn drop(&mut self) {
        self.0.is_taken.store(false, Ordering::Release);
    }
}

pub use label::{LabelState, MirrorLabel, MirrorRole};

impl fmt::Display for MirrorState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InSync => f.write_str("in sync"),
            Self::Degraded { cause, .. } => write!(f, "degraded: {cause}"),
            Self::Resyncing { done_bytes, total_bytes } => {
                write!(f, "resynchronising: {done_bytes} of {total_bytes} bytes")
            }
        }
    }
}

impl MirrorLabel {
    /// Whether the labels of a pair say that its mirror is in sync: both are there, of one pair and generation, and clean.
    ///
    /// # Errors
    /// Why it isn't.
    pub fn judge(primary: Option<&Self>, mirror: Option<&Self>) -> std::result::Result<(), MirrorCause> {
        let (Some(primary), Some(mirror)) = (primary, mirror) else { return Err(MirrorCause::NeverSynced) };
        if primary.role != MirrorRole::Primary || mirror.role != MirrorRole::Mirror {
            return Err(MirrorCause::NeverSynced);
        }
        if primary.pair != mirror.pair {
            return Err(MirrorCause::OtherPair);
        }
        for label in [mirror, primary] {
            if label.state == LabelState::Alone {
                return Err(MirrorCause::OpenedAlone(label.role));
            }
        }
        if primary.generation != mirror.generation {
            return Err(MirrorCause::LeftBehind);
        }
        if primary.state != LabelState::Clean || mirror.state != LabelState::Clean {
            return Err(MirrorCause::NotClosed);
        }
        Ok(())
    }
}

impl MirrorLabel {
    /// Whether this is the label of a mirror that isn't known to hold what its primary holds, and that nobody has accepted;
    /// `other` is the label of the range that is going to be its other half.
    pub(crate) fn is_stale_mirror(&self, other: Option<&Self>) -> bool {
        let knows_more = |other: &Self| {
            (other.role, other.pair) == (MirrorRole::Primary, self.pair)
                && Self::judge(Some(other), Some(self)).is_err()
        };
        self.role == MirrorRole::Mirror
            && match self.state {
                LabelState::Open => true,
                LabelState::Clean => other.is_some_and(knows_more),
                LabelState::Alone => false,
            }
    }
}

/// The error that a mapping of a mirror gets when that may be stale.
pub(crate) fn stale(label: &MirrorLabel) -> Error {
    Error::MirrorStale { label: *label }
}

/// An error of a mirror that has to be told to who asked.
pub(crate) fn refuse<T>(reason: impl Into<String>) -> Result<T> {
    Err(Error::Mirror { reason: reason.into() })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn wb15_only_two_clean_labels_of_one_pair_and_generation_are_in_sync() {
        let primary = MirrorLabel {
            role: MirrorRole::Primary,
            state: LabelState::Clean,
            pair: 7,
            generation: 3,
            start_bytes: 0,
            len_bytes: 4096,
        };
        let mirror = MirrorLabel { role: MirrorRole::Mirror, start_bytes: 8192, ..primary };
        assert_eq!(MirrorLabel::judge(Some(&primary), Some(&mirror)), Ok(()));
        let stale = [
            (None, Some(mirror)),
            (Some(primary), None),
            (Some(primary), Some(primary)),
            (Some(primary), Some(MirrorLabel { pair: 8, ..mirror })),
            (Some(primary), Some(MirrorLabel { generation: 2, ..mirror })),
            (Some(primary), Some(MirrorLabel { state: LabelState::Open, ..mirror })),
            (Some(MirrorLabel { state: LabelState::Open, ..primary }), Some(mirror)),
            (Some(MirrorLabel { state: LabelState::Alone, ..primary }), Some(mirror)),
            (Some(primary), Some(MirrorLabel { state: LabelState::Alone, ..mirror })),
        ];
        for (primary, mirror) in stale {
            assert!(
                MirrorLabel::judge(primary.as_ref(), mirror.as_ref()).is_err(),
                "{primary:?} and {mirror:?}"
            );
        }
    }
}
