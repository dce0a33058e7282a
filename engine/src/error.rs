//! What can go wrong, in the engine's terms.

use crate::cache::lsn::Lsn;
use crate::mirror::{MirrorCause, MirrorLabel};
use foliant_nvme::{CommandError, DriverError};
use std::sync::Arc;
use std::time::Duration;

/// What the engine was doing when the device refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Bringing a page into the cache.
    Read,
    /// Writing a dirty folio back.
    Write,
    /// Making completed writes durable.
    Flush,
    /// Zeroing a discarded range.
    WriteZeroes,
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::WriteZeroes => "write zeroes",
        })
    }
}

/// How a thread holds a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// By a [`PagePin`](crate::PagePin).
    Shared,
    /// By a [`PagePinMut`](crate::PagePinMut).
    Exclusive,
}

impl std::fmt::Display for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Shared => "shared",
            Self::Exclusive => "exclusively",
        })
    }
}

/// What has a log sequence number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LsnOf {
    /// A page: index within the mapping.
    Page(u64),
    /// A gate: its name.
    Gate(Arc<str>),
}

impl std::fmt::Display for LsnOf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Page(page) => write!(f, "page {page} of the mapping"),
            Self::Gate(name) => write!(f, "gate {name:?}"),
        }
    }
}

/// An error of the engine. Cheap to clone: one event may have to be told to several callers.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A stats page can't be made, or can't be read.
    #[error("stats page {}: {reason}", path.display())]
    StatsPage {
        /// The file, or its directory.
        path: std::path::PathBuf,
        /// What is wrong, and what helps.
        reason: String,
    },
    /// The device answered a command with an error status, or stopped answering.
    #[error("the device failed a {operation} at byte {offset} of the mapping: {source}")]
    Device {
        /// What was asked of the device.
        operation: Operation,
        /// First byte of the range concerned, from the mapping's start (0 for a flush).
        offset: u64,
        /// The device's status, intact.
        #[source]
        source: CommandError,
    },
    /// A flush failed earlier, so nobody knows which written pages are durable: the namespace takes no writes
    /// until the engine is opened anew (WB-30).
    #[error(
        "namespace {namespace} has latched failed after a flush that failed ({source}): which completed writes are \
         durable is unknown; close the engine, check the device, and open it again"
    )]
    NamespaceFailed {
        /// The namespace's id.
        namespace: u32,
        /// What the flush ended with.
        #[source]
        source: CommandError,
    },
    /// A page couldn't be had because every frame stayed pinned, or dirty and unwritable, until the deadline.
    #[error(
        "no cache frame became free within {waited:?}: {}",
        match cause {
            Some(cause) => format!("dirty pages cannot be written, since {cause}"),
            None => format!(
                "all {frames} frames of the shard are pinned or dirty; release pins, or open the engine with a larger cache"
            ),
        }
    )]
    CacheFull {
        /// How long the request waited.
        waited: Duration,
        /// Frames of the shard.
        frames: usize,
        /// Why dirty pages can't be written, if the last write failed.
        cause: Option<Box<Error>>,
    },
    /// A page couldn't be had because every page of its mapping's share of the cache stayed pinned, or dirty and unwritable,
    /// until the deadline.
    #[error(
        "the share {share:?} of the cache had no room within {waited:?}: {}",
        match cause {
            Some(cause) => format!("dirty pages cannot be written, since {cause}"),
            None => format!(
                "all {limit_pages} pages that it may hold in the shard are pinned or dirty; release pins, or raise its limit \
                 by resize"
            ),
        }
    )]
    ShareFull {
        /// The share's name.
        share: Arc<str>,
        /// How long the request waited.
        waited: Duration,
        /// Pages that the share may hold in the shard.
        limit_pages: u64,
        /// Why dirty pages can't be written, if the last write failed.
        cause: Option<Box<Error>>,
    },
    /// A share of the cache, or the cache, holds more than a lowered limit allows, and did so until the deadline.
    #[error(
        "{of} held {above_pages} pages more than its limit in one shard after {waited:?}: they are pinned, or can't be \
         written; release pins, sync, or raise the limit"
    )]
    AboveLimit {
        /// The share's name, or "the cache".
        of: Arc<str>,
        /// How long was waited.
        waited: Duration,
        /// Pages above the limit in the shard that answered.
        above_pages: u64,
    },
    /// A writer waited at the dirty limits and nothing was written until the deadline.
    #[error(
        "{dirty_pages} of at most {limit_pages} pages of the shard stayed dirty for {waited:?}: {}",
        match cause {
            Some(cause) => format!("they cannot be written, since {cause}"),
            None => "release pins of dirty pages, look after a device that stands still, or open the engine with a \
                     larger dirty_percent or cache".to_owned(),
        }
    )]
    DirtyLimit {
        /// How long the writer waited.
        waited: Duration,
        /// Pages of the shard that are dirty, under writeback, or held by writers that were let on.
        dirty_pages: u64,
        /// The shard's hard limit.
        limit_pages: u64,
        /// Why dirty pages can't be written, if the last write failed.
        cause: Option<Box<Error>>,
    },
    /// A writer that doesn't want to wait would have been slowed: too much is dirty.
    #[error(
        "{dirty_pages} of at most {limit_pages} pages of the shard are dirty; try again when the device has written \
         some, or use the form that waits"
    )]
    Throttled {
        /// Pages of the shard that are dirty, under writeback, or held by writers that were let on.
        dirty_pages: u64,
        /// The shard's hard limit.
        limit_pages: u64,
    },
    /// All reply slots of a shard stayed taken: by requests that wait, or by futures that were answered and never
    /// polled again.
    #[error(
        "all {requests_max} requests that a shard takes at once stayed unfinished for {waited:?}; poll or drop their \
         futures, or open the engine with a larger requests_max"
    )]
    TooManyRequests {
        /// The option's value.
        requests_max: usize,
        /// How long the request waited.
        waited: Duration,
    },
    /// A holder kept a page pinned until the deadline of a request that needs it.
    #[error(
        "page {page} of the mapping stayed held by another pin for {waited:?}; release the pin that holds it"
    )]
    PinnedTooLong {
        /// Page index within the mapping.
        page: u64,
        /// How long the request waited.
        waited: Duration,
    },
    /// Something isn't done yet and may be when it is asked again: a command failed in passing and the mapping is
    /// [soft](crate::RetryPolicy::Soft), or the callback of an integrity pass put a page off each time it was asked.
    #[error(
        "page {page} of the mapping has not been {} yet: {}; try again",
        if *operation == Operation::Read { "read" } else { "written" },
        match cause {
            Some(cause) => format!("the device failed the command in passing ({cause})"),
            None => "the pass's user put it off each time".to_owned(),
        }
    )]
    TryAgain {
        /// What was to be done.
        operation: Operation,
        /// Page index within the mapping; of several pages the first.
        page: u64,
        /// The device's status, where it was the device.
        #[source]
        cause: Option<CommandError>,
    },
    /// A pass, or a sync, was begun in the reclaim context (WB-10).
    #[error(
        "writeback was begun in the reclaim context, where writing may need the very memory that is short; ask the          flusher by Mapping::request_writeback instead, and write from another context"
    )]
    ReclaimContext,
    /// A request to the engine was made inside a pass's callback, which runs on the shard that would have to serve it.
    #[error(
        "a request to the engine was made inside the callback of a writeback pass; answer the callback from what is at          hand, and make requests from another thread"
    )]
    InsidePass,
    /// The callback of a pass panicked: the pass ended there, and its folio is dirty still.
    #[error("the callback of a writeback pass panicked at page {page} of the mapping: {message}")]
    CallbackPanicked {
        /// Page index within the mapping.
        page: u64,
        /// What the panic said.
        message: Arc<str>,
    },
    /// Something can't be done with a mapping's mirror.
    #[error("the mirror: {reason}")]
    Mirror {
        /// What is wrong and what helps.
        reason: String,
    },
    /// A mirror was degraded. Where a sync says so, what it covers is durable on the primary
    /// ([`OnDegrade::TellAtSync`](crate::OnDegrade::TellAtSync)).
    #[error(
        "the mirror is degraded: {cause}; the primary has everything and goes on alone; call \
         Mapping::resync_mirror when the mirror is well again"
    )]
    MirrorDegraded {
        /// Why.
        cause: MirrorCause,
    },
    /// A range is a mirror that isn't known to hold what its primary holds.
    #[error(
        "bytes {}..{} are a mirror that may be stale: its label, of pair {:016x} and generation {}, says {}; open its \
         primary, or, if that is lost, accept what the mirror holds by Engine::accept_mirror",
        label.start_bytes, label.start_bytes + label.len_bytes, label.pair, label.generation, label.state
    )]
    MirrorStale {
        /// What stands behind the range.
        label: MirrorLabel,
    },
    /// A byte range ends before it begins.
    #[error("the range {start}..{end} ends before it begins; its start comes first")]
    InvertedRange {
        /// Its first byte.
        start: u64,
        /// The byte after its last.
        end: u64,
    },
    /// Pages waited for their log until the deadline; they are still dirty (WB-40).
    #[error(
        "dirty pages wait for log sequence number {waits_for} to be durable, and after {waited:?} gate {gate:?} is at \
         {durable}; sync the log up to {waits_for} and call advance_durable_lsn (next_wanted tells when), or open the \
         engine with a longer gate_wait"
    )]
    Gated {
        /// The gate's name.
        gate: Arc<str>,
        /// The number that has to be durable.
        waits_for: Lsn,
        /// The number that is.
        durable: Lsn,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A log sequence number is below one that was given before.
    #[error("log sequence number {lsn} of {of} goes backwards: it has had {last}; numbers only rise")]
    LsnBackwards {
        /// What the number is of.
        of: LsnOf,
        /// The number given.
        lsn: Lsn,
        /// The highest number before.
        last: Lsn,
    },
    /// Opening a mapping would make gates wait for each other's logs.
    #[error(
        "the gates would wait for each other for ever: {}; open the mapping that holds the log of {:?} without a gate",
        gates.join(" → "),
        gates.first().map_or("", |gate| gate)
    )]
    GateCycle {
        /// The names on the way round; the last is the first.
        gates: Vec<Arc<str>>,
    },
    /// A mapping would become longer than it may.
    #[error(
        "a length of {len_bytes} bytes exceeds the mapping's capacity of {capacity_bytes} (open it with a larger \
         capacity_bytes)"
    )]
    Capacity {
        /// The length that was asked for.
        len_bytes: u64,
        /// The most that the mapping was opened for.
        capacity_bytes: u64,
    },
    /// A thread asked, by a blocking call, for a page that it holds itself, so that it would have waited for itself.
    #[error(
        "this thread holds page {page} {held} already and would wait for itself to have it {wanted}; release that pin \
         first, or use it"
    )]
    HeldByThisThread {
        /// The page's index within the mapping.
        page: u64,
        /// How it holds the page.
        held: Held,
        /// How it wants it.
        wanted: Held,
    },
    /// A page was exclusively pinned when the engine was closed.
    #[error(
        "page {page} of the mapping at block {first_lba} was exclusively pinned while the engine was closed: what its holder \
         changes is lost; release pins before close"
    )]
    PinnedAtClose {
        /// The page's index within its mapping.
        page: u64,
        /// The mapping's first block.
        first_lba: u64,
    },
    /// The engine was opened by this process's parent, and isn't there in a child.
    #[error(
        "the engine was opened by process {opened_by}, and this is its child {process}: open one in the child, on another \
         device, or leave I/O to the parent"
    )]
    Forked {
        /// Who opened it.
        opened_by: u32,
        /// Who asks.
        process: u32,
    },
    /// Other changes of a mapping's length kept this one waiting.
    #[error(
        "the length of the mapping has been changed by others for {waited:?} (a length change that nobody polls keeps \
         others out until it is dropped)"
    )]
    LengthBusy {
        /// How long it waited.
        waited: Duration,
    },
    /// A byte range reaches outside its mapping.
    #[error("bytes {offset}..{} lie outside the mapping of {len_bytes} bytes; choose a range within it, or lengthen it by set_len", offset.saturating_add(*count))]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        count: u64,
        /// Length of the mapping.
        len_bytes: u64,
    },
    /// A mapping could not be opened as asked.
    #[error("cannot open the mapping: {reason}")]
    Mapping {
        /// What is wrong and what helps.
        reason: String,
    },
    /// An option has a value that can't be used.
    #[error("{option} = {value}: {reason}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// Its value.
        value: String,
        /// The limit, and what helps.
        reason: String,
    },
    /// The device's URI can't be opened.
    #[error("cannot open {uri:?}: {reason}")]
    Uri {
        /// The URI as given.
        uri: String,
        /// What is wrong and what helps.
        reason: String,
    },
    /// The driver could not bring the controller up, or lost it.
    #[error(transparent)]
    Driver(Arc<DriverError>),
    /// The engine, or the mapping, has been closed.
    #[error("the engine or the mapping has been closed")]
    Closed,
    /// A shard stopped: its thread panicked, or its queue failed. What was dirty there is not written.
    #[error("shard {shard} has failed: {reason}")]
    ShardFailed {
        /// The shard's number.
        shard: usize,
        /// Why.
        reason: Arc<str>,
    },
    /// The operating system refused something at open.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: Arc<std::io::Error>,
    },
}

impl From<DriverError> for Error {
    fn from(error: DriverError) -> Self {
        Self::Driver(Arc::new(error))
    }
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::OutOfRange { .. }
            | Error::InvertedRange { .. }
            | Error::HeldByThisThread { .. }
            | Error::Capacity { .. }
            | Error::Mapping { .. }
            | Error::Mirror { .. }
            | Error::Option { .. }
            | Error::Uri { .. }
            | Error::LsnBackwards { .. }
            | Error::GateCycle { .. } => std::io::ErrorKind::InvalidInput,
            Error::TryAgain { .. } | Error::Throttled { .. } => std::io::ErrorKind::WouldBlock,
            Error::CacheFull { .. }
            | Error::ShareFull { .. }
            | Error::AboveLimit { .. }
            | Error::DirtyLimit { .. }
            | Error::PinnedTooLong { .. }
            | Error::TooManyRequests { .. }
            | Error::LengthBusy { .. }
            | Error::Gated { .. } => std::io::ErrorKind::TimedOut,
            Error::Closed => std::io::ErrorKind::NotConnected,
            _ => std::io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

/// The engine's results.
pub type Result<T> = std::result::Result<T, Error>;
