//! Which failed commands are tried again, and when (WB-22).
//!
//! A read or a write whose status leaves Do Not Retry clear is submitted again as the same run, a bounded number of
//! times and a little later each time. Its folios stay what they are meanwhile: being read in, or under writeback, so
//! nobody sees the failure but the counters. What fails for good ends at once.
//!
//! **A Flush is another matter.** A device that fails one may have thrown away what it should have brought to the medium,
//! and a second Flush that succeeds would hide that. It is tried again only where the status itself says that the command
//! was not carried out: Command Interrupted, Transient Transport Error, Namespace Not Ready. Anything else latches
//! the namespace failed (WB-30).

use foliant_nvme::{CommandError, StatusCode};

use super::Shard;
use super::payload::FolioRun;
use crate::cache::Written;
use crate::error::{Error, Operation};
use crate::mapping::RetryPolicy;
use crate::stats::bump;
use crate::writeback::events::{self, Op};
use crate::writeback::issue::submit_write;

/// Times that a command is submitted again.
pub(crate) const RETRIES_MAX: u8 = 5;

/// How long the first retry waits; each further one twice as long: 31 ms in all.
const FIRST_NS: u64 = 1_000_000;

/// How long a command that has failed so many times waits before it is tried again.
pub(super) fn backoff_ns(failures: u8) -> u64 {
    FIRST_NS << failures.min(RETRIES_MAX)
}

pub(super) fn may_retry(error: CommandError, failures: u8) -> bool {
    error.is_retryable() && failures < RETRIES_MAX
}

/// Whether a Flush that failed so is known not to have been carried out, and may be tried again.
pub(super) fn may_retry_flush(error: CommandError, failures: u8) -> bool {
    const NOT_CARRIED_OUT: [StatusCode; 3] = [
        StatusCode::COMMAND_INTERRUPTED,
        StatusCode::TRANSIENT_TRANSPORT_ERROR,
        StatusCode::NAMESPACE_NOT_READY,
    ];
    may_retry(error, failures)
        && error.status().is_some_and(|status| NOT_CARRIED_OUT.contains(&status.code()))
}

/// A run whose command failed in passing.
#[derive(Debug)]
pub(super) struct PutOff {
    /// When it is submitted again.
    due_ns: u64,
    command: PutOffCommand,
    run: FolioRun,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PutOffCommand {
    Read,
    Write,
}

/// All of those of a shard. About as many as the queue has commands: writeback keeps their places free.
pub(super) type RetryQueue = Vec<PutOff>;

impl Shard {
    /// A read of `run` failed: keeps it for later and returns `None`, or says how it ended.
    pub(super) fn retry_read(&mut self, run: FolioRun, cause: CommandError) -> Option<(FolioRun, Error)> {
        let page = run.first_page;
        let is_soft = self.mapping(run.mapping).is_ok_and(|mapping| mapping.retry == RetryPolicy::Soft);
        if may_retry(cause, run.failures) {
            if is_soft {
                let operation = Operation::Read;
                return Some((run, Error::TryAgain { operation, page, cause: Some(cause) }));
            }
            self.put_off(PutOffCommand::Read, run);
            return None;
        }
        let offset = page * crate::cache::frames::PAGE_BYTES as u64;
        Some((run, Error::Device { operation: Operation::Read, offset, source: cause }))
    }

    /// A write of `run` failed: keeps it for later and returns `None`, or says how it ended. Syncs of a soft mapping don't
    /// wait for what is kept.
    pub(super) fn retry_write(&mut self, run: FolioRun, cause: CommandError) -> Option<(FolioRun, Error)> {
        if !may_retry(cause, run.failures) {
            let offset = run.first_page * crate::cache::frames::PAGE_BYTES as u64;
            return Some((run, Error::Device { operation: Operation::Write, offset, source: cause }));
        }
        if let Ok(mapping) = self.mapping(run.mapping)
            && mapping.retry == RetryPolicy::Soft
        {
            let first = mapping.shape.striping.local(run.first_page);
            let local = first..first + run.pages();
            for job in &mut self.syncs {
                job.note_retry(run.mapping, &local, run.first_page, cause);
            }
        }
        self.put_off(PutOffCommand::Write, run);
        None
    }

    /// Keeps a run until it is due again.
    fn put_off(&mut self, command: PutOffCommand, mut run: FolioRun) {
        let due_ns = self.now_ns.saturating_add(backoff_ns(run.failures));
        run.failures += 1;
        bump(&self.link.counters.command_retries, 1);
        self.retries.push(PutOff { due_ns, command, run });
    }

    /// When the next retry is due.
    pub(super) fn retries_due_ns(&self) -> Option<u64> {
        self.retries.iter().map(|put_off| put_off.due_ns).min()
    }

    /// Submits what is due again, as far as the queue has room.
    pub(super) fn step_retries(&mut self) -> bool {
        let mut progressed = false;
        let mut at = 0;
        while let Some(put_off) = self.retries.get(at) {
            if put_off.due_ns > self.now_ns {
                at += 1;
                continue;
            }
            let mapping = self.mapping(put_off.run.mapping);
            let mapping = mapping.expect("pages that the device has keep their mapping open");
            let is_write = put_off.command == PutOffCommand::Write;
            if is_write && self.queue.free_commands() < mapping.shape.block_commands_max() {
                self.reads_yield = true;
                return progressed;
            }
            let run = self.retries.swap_remove(at).run;
            let pages = run.range();
            progressed = true;
            if !is_write {
                self.reads.push_front(run);
                continue;
            }
            if let Err(run) = submit_write(&mut self.queue, &mut self.watch, &mapping.shape, run) {
                self.cache.end_writeback(&mapping.shape, run.first_page, run.pages(), Written::Refused);
                self.runs.end(run);
                self.fail("its queue refuses commands");
                return true;
            }
            bump(&self.link.counters.write_commands, 1);
            events::block_rq_issue(self.link.shard, Op::Write, &mapping.shape, &pages, self.now_ns);
        }
        progressed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use foliant_nvme::Status;

    #[test]
    fn wb22_what_fails_in_passing_is_retried_and_a_flush_only_where_it_was_not_carried_out() {
        let error = |code| CommandError::Status(Status::of(code));
        let fatal = |code| CommandError::Status(Status::of(code).with_dnr(true));
        assert!(may_retry(error(StatusCode::INTERNAL_ERROR), RETRIES_MAX - 1));
        assert!(!may_retry(error(StatusCode::INTERNAL_ERROR), RETRIES_MAX), "bounded");
        assert!(!may_retry(fatal(StatusCode::WRITE_FAULT), 0));
        assert!(!may_retry(CommandError::Gone, 0));
        assert!(may_retry_flush(error(StatusCode::COMMAND_INTERRUPTED), 0));
        assert!(may_retry_flush(error(StatusCode::NAMESPACE_NOT_READY), 0));
        assert!(!may_retry_flush(error(StatusCode::INTERNAL_ERROR), 0), "it may have lost what it held");
        assert!(!may_retry_flush(fatal(StatusCode::COMMAND_INTERRUPTED), 0));
    }
}
