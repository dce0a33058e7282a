//! Which errors a handle must, may and must not be told.
//!
//! Every expectation about the failing of device commands is here, so that a change of what the engine does about
//! them (retries, say) changes this file.

use foliant::{Error, Operation};
use foliant_nvme_spec::{Status, StatusCode};

use super::world::FailedPart;

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

/// Whether a failed flush latches the namespace. Any does (WB-30), but one that was surely not carried out and may be
/// tried again.
#[must_use]
pub fn latches(status: Status) -> bool {
    const NOT_CARRIED_OUT: [StatusCode; 3] = [
        StatusCode::COMMAND_INTERRUPTED,
        StatusCode::TRANSIENT_TRANSPORT_ERROR,
        StatusCode::NAMESPACE_NOT_READY,
    ];
    !(status.is_retryable() && NOT_CARRIED_OUT.contains(&status.code()))
}

/// Pages that one request names at most.
const REQUEST_PAGES_MAX: u64 = 32;

/// What an operation has lived through, as far as it excuses errors.
#[derive(Clone, Copy, Debug, Default)]
pub struct Circumstances {
    /// A read command of its mapping has failed.
    pub read_failed: bool,
    /// A write command of its mapping has failed for good.
    pub write_failed: bool,
    /// A write command of its mapping has failed in passing.
    pub put_off: bool,
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
    /// Its callback puts pages off.
    pub refuses: bool,
    /// It asked not to wait.
    pub tries: bool,
    /// Its mapping is soft.
    pub soft: bool,
    /// Pages may wait for a log.
    pub gated: bool,
    /// It carries a log sequence number, and a page of its range was perhaps stamped with a later one.
    pub overtaken: bool,
    /// Pages of 4096 bytes that it may dirty at once, if it asked not to wait.
    pub asks_pages: u64,
    /// Others were in flight that wait for dirty memory to shrink, or were dropped lately.
    pub rivals: bool,
    /// A page was written lately.
    pub written: bool,
    /// Others were in flight, or held pins.
    pub company: bool,
    /// Any fault has struck.
    pub struck: bool,
}

impl Circumstances {
    /// A command of its mapping has failed.
    pub(crate) fn add(&mut self, part: FailedPart) {
        match part {
            FailedPart::Read => self.read_failed = true,
            FailedPart::Write { put_off, .. } => {
                self.write_failed = true;
                self.put_off |= put_off;
            }
        }
    }
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
        Error::CacheFull { .. } => lived.waited && (lived.company || lived.struck || lived.gated),
        Error::Gated { .. } => lived.waited && lived.gated,
        Error::LsnBackwards { .. } => lived.overtaken,
        Error::PinnedTooLong { .. } => lived.waited && lived.company,
        // Nothing was written all the time, and what the largest request dirties didn't fit.
        Error::DirtyLimit { dirty_pages, limit_pages, .. } => {
            lived.waited
                && (lived.company || lived.struck || lived.gated)
                && !lived.written
                && dirty_pages + REQUEST_PAGES_MAX + limit_pages / 8 >= *limit_pages
        }
        // It doesn't pass those who wait either.
        Error::Throttled { dirty_pages, limit_pages } => {
            lived.tries && (lived.rivals || (dirty_pages + lived.asks_pages) * 2 >= *limit_pages)
        }
        Error::TryAgain { cause: Some(_), .. } => lived.put_off && lived.soft,
        // Of a callback.
        Error::TryAgain { cause: None, .. } => lived.refuses,
        Error::Closed => lived.closed,
        Error::ShardFailed { .. } => lived.doomed,
        _ => false,
    }
}
