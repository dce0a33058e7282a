//! Which errors a handle must, may and must not be told.
//!
//! Every expectation about the failing of device commands is here, so that a change of what the engine does about
//! them (retries, say) changes this file.

use foliant::{Error, Operation};
use foliant_nvme_spec::Status;

/// Whether a failed writeback is owed to a handle (WB-23).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owed {
    /// It must not be told: it has been, or there is nothing.
    #[default]
    No,
    /// It may be told, and need not be.
    Perhaps,
    /// Its next sync must fail.
    Yes,
}

/// What handles are owed when a write command has failed with `status`.
///
/// The engine tries no command again by itself, so every failure is told at once, retryable or not.
#[must_use]
pub fn owed_after_failed_write(_status: Status) -> Owed {
    Owed::Yes
}

/// Whether a failed flush latches the namespace. Any does (WB-30).
#[must_use]
pub fn latches(_status: Status) -> bool {
    true
}

/// What an operation has lived through, as far as it excuses errors.
#[derive(Clone, Copy, Debug, Default)]
pub struct Circumstances {
    /// A read command of its mapping has failed.
    pub read_failed: bool,
    /// A write command of its mapping has failed.
    pub write_failed: bool,
    /// Its handle was owed a failed writeback.
    pub owed: Owed,
    /// Its handle's mapping is being closed, or was.
    pub closed: bool,
    /// A flush has failed.
    pub latched: bool,
    /// A command was lost, or the device is gone: shards may have failed.
    pub doomed: bool,
    /// It has waited for as long as anything may wait for others.
    pub waited: bool,
    /// Others were in flight, or held pins.
    pub company: bool,
    /// Any fault has struck.
    pub struck: bool,
}

/// Whether it is an error that tells of failed writeback: a sync that ends with another one leaves that to the next.
#[must_use]
pub fn tells_of_writeback(error: &Error) -> bool {
    matches!(error, Error::Device { operation: Operation::Write, .. })
}

/// Whether `error` has a reason.
#[must_use]
pub fn is_excused(error: &Error, lived: &Circumstances) -> bool {
    match error {
        Error::Device { operation: Operation::Read, .. } => lived.read_failed || lived.doomed,
        Error::Device { operation: Operation::Write, .. } => {
            lived.write_failed || lived.owed != Owed::No || lived.doomed
        }
        // A discard that the device fails is carried out as a write.
        Error::Device { .. } => lived.doomed,
        Error::NamespaceFailed { .. } => lived.latched,
        Error::CacheFull { .. } => lived.waited && (lived.company || lived.struck),
        Error::PinnedTooLong { .. } => lived.waited && lived.company,
        Error::Closed => lived.closed,
        Error::ShardFailed { .. } => lived.doomed,
        _ => false,
    }
}
