//! What can go wrong, an enum for each place where it does: opening and administering a controller, the arena,
//! a submission, a queue, and a single command.

use std::fmt;
use std::time::Duration;

use foliant_nvme_spec::{AdminOpcode, Status};
use foliant_nvme_transport::{Iova, TransportError};

/// Why a controller could not be opened, administered or shut down.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    /// The device is no longer there: a register read all ones.
    #[error("the device is gone: its registers read all ones")]
    Gone,
    /// The controller reports a fatal error (CSTS.CFS); only a reset helps.
    #[error("the controller reports a fatal status (CSTS.CFS) {during}; reset it by opening it again")]
    ControllerFatal {
        /// What the driver was doing.
        during: &'static str,
    },
    /// The controller is no longer ready though nobody disabled it (CSTS.RDY): it was reset from outside, or its
    /// registers are no longer reached. What it held is lost.
    #[error(
        "the controller is no longer ready (CSTS.RDY = 0): it was reset from outside or is cut off; open it again"
    )]
    NotReady,
    /// The controller didn't do in time what it had to.
    #[error("the controller took longer than {limit:?} {during}")]
    Timeout {
        /// What the driver was waiting for.
        during: &'static str,
        /// How long it waited.
        limit: Duration,
    },
    /// The controller lacks something this driver needs.
    #[error("unsupported controller: {what}")]
    Unsupported {
        /// What is missing, with the value found and the one needed.
        what: String,
    },
    /// An option has a value the driver can't work with.
    #[error("option {option} is {value}, but must be {limit}")]
    InvalidOption {
        /// Name of the field of [`ControllerOptions`](crate::ControllerOptions).
        option: &'static str,
        /// The value given.
        value: u64,
        /// What would be accepted.
        limit: String,
    },
    /// An admin command failed.
    #[error("{opcode} failed: {status}")]
    Command {
        /// The command's opcode.
        opcode: AdminOpcode,
        /// The device's answer.
        status: Status,
    },
    /// The device broke the protocol.
    #[error("the device broke the protocol: {what}")]
    DeviceFault {
        /// What it did.
        what: String,
    },
    /// An earlier failure has left the admin queue unusable.
    #[error("the admin queue failed earlier; open the controller again")]
    AdminQueueFailed,
    /// All I/O queue pairs that the controller granted are in use.
    #[error("all {granted} I/O queue pairs that the controller granted are in use")]
    QueuePairsTaken {
        /// Pairs granted.
        granted: u16,
    },
    /// A shutdown was asked for while queue pairs still exist.
    #[error("{count} I/O queue pairs still exist; drop or close them before the shutdown")]
    QueuePairsInUse {
        /// Pairs that exist.
        count: u16,
    },
    /// DMA memory could not be had.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The transport failed.
    #[error("transport: {0}")]
    Transport(#[source] TransportError),
}

impl From<TransportError> for DriverError {
    fn from(error: TransportError) -> Self {
        match error {
            TransportError::Gone => Self::Gone,
            other => Self::Transport(other),
        }
    }
}

/// Why DMA memory could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArenaError {
    /// An allocation of no bytes was asked for.
    #[error("an allocation must have at least one byte")]
    Empty,
    /// There's no free stretch that is long enough.
    #[error(
        "no free stretch of {len_bytes} bytes in the arena: {free_bytes} of {capacity_bytes} bytes are free, \
         {longest_bytes} in one piece; raise ControllerOptions::arena_bytes"
    )]
    Exhausted {
        /// Bytes asked for.
        len_bytes: usize,
        /// Bytes free in all.
        free_bytes: usize,
        /// The longest free stretch in bytes.
        longest_bytes: usize,
        /// The arena's size in bytes.
        capacity_bytes: usize,
    },
    /// Hugepages were required and couldn't be had.
    #[error(
        "{needed} free hugepages of {page_bytes} bytes are required; reserve them: sysctl vm.nr_hugepages={needed}"
    )]
    NoHugepages {
        /// Hugepages needed.
        needed: usize,
        /// Size of a hugepage in bytes.
        page_bytes: usize,
    },
    /// The kernel has no hugepages at all.
    #[error("hugepages are required, but this kernel offers none (no Hugepagesize in /proc/meminfo)")]
    HugepagesUnknown,
    /// The system refused ordinary memory.
    #[error("cannot map {len_bytes} bytes of memory: {source}")]
    Memory {
        /// Bytes asked for.
        len_bytes: usize,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The transport could not make the memory reachable for the device.
    #[error("cannot make the arena reachable for the device: {0}")]
    Map(#[source] TransportError),
}

/// A submission that didn't take place: the payload comes back with the reason.
pub struct Rejected<P> {
    /// The payload as it was given.
    pub payload: P,
    /// Why it was refused.
    pub reason: SubmitError,
}

/// Says the reason; any payload may be within.
impl<P> fmt::Debug for Rejected<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rejected").field("reason", &self.reason).finish_non_exhaustive()
    }
}

impl<P> fmt::Display for Rejected<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason.fmt(f)
    }
}

impl<P> std::error::Error for Rejected<P> {}

/// Why a request was refused before any of it reached the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// Not enough free command slots right now; poll completions and try again.
    #[error("the queue pair has too few free command slots; poll and try again")]
    Full,
    /// The blocks don't lie in the namespace, or there are none.
    #[error("{blocks} blocks from {lba} don't lie within the namespace's {namespace_blocks} blocks")]
    OutOfRange {
        /// First block asked for.
        lba: u64,
        /// Blocks asked for.
        blocks: u32,
        /// Size of the namespace in blocks.
        namespace_blocks: u64,
    },
    /// The payload's segments don't add up to what the request transfers.
    #[error("the payload has {payload_bytes} bytes where the request transfers {expected_bytes}")]
    LengthMismatch {
        /// Bytes the request transfers.
        expected_bytes: u64,
        /// Sum of the segments' lengths.
        payload_bytes: u64,
    },
    /// A segment can't be told in PRP entries: the first must start on a dword, and data that goes on in
    /// another page must do so at that page's start (Base section 4.3.1).
    #[error(
        "device address {iova} can't be a PRP entry here: segments must meet at 4 KiB page boundaries, and the first start on a dword"
    )]
    Misaligned {
        /// The address that doesn't fit.
        iova: Iova,
    },
    /// The request needs more commands than the queue pair has slots, so it never fits.
    #[error(
        "the request needs {commands} commands, and the queue pair has only {slots} slots; ask for less at once"
    )]
    TooLarge {
        /// Commands the request splits into.
        commands: u32,
        /// Command slots of the queue pair.
        slots: u32,
    },
    /// The controller doesn't support this command.
    #[error("the controller doesn't support this command (ONCS)")]
    Unsupported,
    /// The namespace belongs to another controller.
    #[error("the namespace belongs to another controller")]
    ForeignNamespace,
    /// The queue pair has failed; its error comes from [`QueuePair::poll`](crate::QueuePair::poll).
    #[error("the queue pair has failed")]
    Failed,
}

/// Why a queue pair failed. It stays failed: every later call answers the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// A completion names a command identifier that isn't outstanding: never issued, or completed already.
    #[error("queue {qid}: a completion names command {cid:#06x}, which isn't outstanding")]
    UnknownCommand {
        /// The queue pair.
        qid: u16,
        /// The identifier in the completion.
        cid: u16,
    },
    /// A completion names a submission queue that doesn't complete here.
    #[error("queue {qid}: a completion names submission queue {sqid}")]
    ForeignQueue {
        /// The queue pair.
        qid: u16,
        /// The submission queue in the completion.
        sqid: u16,
    },
    /// A completion names a submission queue head past the queue's end.
    #[error(
        "queue {qid}: a completion names submission queue head {sqhd}, but the queue has {entries} entries"
    )]
    HeadOutOfRange {
        /// The queue pair.
        qid: u16,
        /// The head in the completion.
        sqhd: u16,
        /// Entries of the submission queue.
        entries: u32,
    },
}

/// Why a request failed on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    /// The device's own answer, unchanged: of a request that was split, the first failure.
    #[error("{0}")]
    Status(Status),
    /// The queue pair was closed before the command completed; it may or may not have taken effect.
    #[error("the queue pair was closed before the command completed")]
    Aborted,
    /// The device went away, or failed and was stopped, before the command completed; it may or may not have
    /// taken effect.
    #[error("the device went away or failed before the command completed")]
    Gone,
}

impl CommandError {
    /// The device's status, where the device answered.
    #[must_use]
    pub const fn status(self) -> Option<Status> {
        match self {
            Self::Status(status) => Some(status),
            Self::Aborted | Self::Gone => None,
        }
    }

    /// Whether the same request may succeed on the same queue when it's submitted again.
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        match self {
            Self::Status(status) => status.is_retryable(),
            Self::Aborted | Self::Gone => false,
        }
    }
}
