//! Between a shard and its queue pair: reads go in, completions come out, and a device that has stopped
//! answering is noticed.

use foliant_nvme::{Completion, Fua, Io, SubmitError};

use super::payload::{FolioRun, PayloadKind, RunGroup, ShardPayload};
use super::{COMPLETION_BUDGET, Shard};
use crate::cache::Written;
use crate::error::Error;
use crate::stats::bump;
use crate::writeback::events::{self, Op};

/// Failed writes are logged once in this time.
const WARN_NS: u64 = 1_000_000_000;
/// Ticks that a command may stay with the device.
const TICKS_MAX: u64 = 32;
/// Ticks that are told apart.
const TICKS: usize = 2 * TICKS_MAX as usize;

/// Notices commands that never complete, without a list of commands: it counts those of each *tick*, a 32nd
/// of the time limit, and a command carries the tick in which it was submitted.
#[derive(Debug)]
pub(crate) struct DeviceWatch {
    now_ns: u64,
    tick_ns: u64,
    tick: u64,
    in_flight: [u32; TICKS],
}

impl DeviceWatch {
    pub(crate) fn new(command_timeout_ns: u64) -> Self {
        Self { now_ns: 0, tick_ns: (command_timeout_ns / TICKS_MAX).max(1), tick: 0, in_flight: [0; TICKS] }
    }

    /// The shard's step begins.
    pub(crate) fn begin_step(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
    }

    /// The time of the step.
    pub(crate) fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// The tick of now, as commands carry it.
    pub(crate) fn epoch(&self) -> u8 {
        (self.tick % TICKS as u64) as u8
    }

    /// A command was submitted in this tick.
    pub(crate) fn submitted(&mut self) {
        self.in_flight[usize::from(self.epoch())] += 1;
    }

    pub(super) fn completed(&mut self, epoch: u8) {
        self.in_flight[usize::from(epoch)] -= 1;
    }

    /// Moves on while no command is with the device: one that is submitted now is as young as it is.
    pub(crate) fn rest(&mut self, now_ns: u64) {
        self.tick = now_ns / self.tick_ns;
    }

    /// Moves on to the tick of `now_ns`; true when a command has outlived its limit.
    pub(super) fn advance(&mut self, now_ns: u64) -> bool {
        let now = now_ns / self.tick_ns;
        // Ticks in which nobody looked are skipped one by one, at most a round: what is old is old then.
        self.tick = self.tick.max(now.saturating_sub(TICKS_MAX)).min(now);
        let mut expired = false;
        loop {
            let oldest = (self.tick + TICKS as u64 - TICKS_MAX) % TICKS as u64;
            expired |= (0..TICKS_MAX).any(|age| {
                let index = (oldest + TICKS as u64 - age) % TICKS as u64;
                age > 0 && self.in_flight[index as usize] > 0
            });
            if self.tick >= now {
                return expired;
            }
            self.tick += 1;
        }
    }
}

impl Shard {
    /// Submits reads whose folios wait for them, as far as the queue has room.
    pub(super) fn submit_reads(&mut self) {
        if std::mem::take(&mut self.reads_yield) {
            return;
        }
        while let Some(run) = self.reads.pop_front() {
            let mapping = self.mappings[usize::from(run.mapping)].as_ref();
            let mapping = mapping.expect("a folio being read keeps its mapping open");
            if self.queue.free_commands() < mapping.shape.block_commands_max() {
                self.reads.push_front(run);
                return;
            }
            let (lba, blocks) = (mapping.shape.lba(run.first_page), mapping.shape.blocks(&run.range()));
            let pages = run.range();
            let payload = ShardPayload::new(PayloadKind::Read(run), &self.watch);
            match self.queue.submit(&mapping.shape.namespace, Io::Read { lba, blocks }, payload) {
                Ok(()) => {
                    self.watch.submitted();
                    bump(&self.link.counters.read_commands, 1);
                    bump(&self.link.counters.pages_read, pages.end - pages.start);
                    events::block_rq_issue(self.link.shard, Op::Read, &mapping.shape, &pages, self.now_ns);
                }
                Err(rejected) => {
                    if let PayloadKind::Read(run) = rejected.payload.kind {
                        self.reads.push_front(run);
                    }
                    if !matches!(rejected.reason, SubmitError::Full) {
                        self.fail(&format!("a read was refused: {}", rejected.reason));
                    }
                    return;
                }
            }
        }
    }

    /// Lets an emulated device work and takes what has completed.
    pub(super) fn take_completions(&mut self) -> bool {
        let pumped = self.queue.pump();
        self.device_due_ns = pumped.next_due_ns.map(|due| self.now_ns.saturating_add(due));
        let mut completed = std::mem::take(&mut self.completed);
        let polled = self.queue.poll(COMPLETION_BUDGET, |completion| completed.push(completion));
        let progressed = pumped.fetched > 0 || pumped.posted > 0 || !completed.is_empty();
        if !completed.is_empty() {
            completed.drain(..).for_each(|completion| self.complete(completion));
        }
        self.completed = completed;
        if let Err(error) = polled {
            self.fail(&error.to_string());
        }
        progressed
    }

    fn complete(&mut self, completion: Completion<ShardPayload>) {
        let Completion { payload, result } = completion;
        self.watch.completed(payload.watch_epoch);
        let took_ns = self.now_ns.saturating_sub(payload.submitted_ns);
        if result.is_err() {
            bump(&self.link.counters.command_errors, 1);
        }
        match payload.kind {
            PayloadKind::Read(run) => {
                events::block_rq_complete(self.link.shard, Op::Read, &run, &result, self.now_ns);
                let ended = match result {
                    Ok(()) => Some((run, None)),
                    Err(cause) => self.retry_read(run, cause).map(|(run, error)| (run, Some(error))),
                };
                if let Some((run, error)) = ended {
                    self.read_completed(&run, error);
                    self.runs.end(run);
                }
            }
            PayloadKind::ReadAhead(run) => {
                events::block_rq_complete(self.link.shard, Op::ReadAhead, &run, &result, self.now_ns);
                self.readahead_completed(&run, result);
                self.runs.end(run);
            }
            PayloadKind::Write(run) => {
                self.link.times.write_command.record_alone(took_ns);
                events::block_rq_complete(self.link.shard, Op::Write, &run, &result, self.now_ns);
                let ended = match result {
                    Ok(()) => Some((run, None)),
                    Err(cause) => self.retry_write(run, cause).map(|(run, error)| (run, Some(error))),
                };
                if let Some((run, error)) = ended {
                    self.primary_ended(run, error);
                }
            }
            PayloadKind::Flush { namespace, epoch } => {
                self.link.times.flush_command.record_alone(took_ns);
                self.flush_completed(namespace, epoch, result);
            }
            PayloadKind::Zero { slot } => self.zero_completed(slot, result),
            PayloadKind::Raw(raw) => self.raw_completed(raw, result),
        }
    }

    fn read_completed(&mut self, run: &FolioRun, error: Option<Error>) {
        if let Some(error) = &error {
            let mapping = self.mapping(run.mapping).expect("a folio being read keeps its mapping open");
            tracing::warn!(%error, pages = run.pages(), "read failed");
            run.folios().for_each(|head| self.abandon_read(&mapping, head, error));
            return;
        }
        for head in run.folios() {
            if self.fill_for_one(head) {
                continue;
            }
            let folio = self.cache.shared.folio(head);
            folio.fill(folio.order().pages());
            self.serve(head);
            // Whoever waited has it: that is what brought it in, and no proof that it is wanted again.
            self.cache.shared.folio(head).clear_referenced();
        }
    }

    pub(super) fn write_completed(&mut self, run: &FolioRun, error: Option<Error>) {
        let mapping = self.mapping(run.mapping).expect("a folio under writeback keeps its mapping open");
        if run.group == RunGroup::Expiry {
            self.flusher.group.in_flight -= 1;
        }
        match &error {
            None => {
                self.write_error = None;
                self.throttle.bandwidth.written(run.pages());
                self.throttle_progress_ns = self.now_ns;
                // What went through the cache is on the medium: no Flush is needed for it.
                if run.fua == Fua::No {
                    mapping.durability.write_completed();
                }
            }
            Some(error) => {
                self.write_error = Some(error.clone());
                if self.warned_ns.is_none_or(|warned| self.now_ns.saturating_sub(warned) >= WARN_NS) {
                    self.warned_ns = Some(self.now_ns);
                    tracing::warn!(%error, pages = run.pages(), "write failed; its pages stay dirty");
                }
                for page in run.range() {
                    self.note_write_failure(run.mapping, mapping.shape.striping.local(page), error);
                }
            }
        }
        let written = if error.is_none() { Written::Yes } else { Written::No };
        let newly_poisoned = self.cache.end_writeback(&mapping.shape, run.first_page, run.pages(), written);
        if newly_poisoned > 0
            && let Some(error) = error
        {
            // Once an event: that a poisoned page fails again is told to those who sync it, each time (WB-23).
            mapping.errors.record(error);
            self.note_poisoned(run.mapping);
        }
        self.serve_waiters_of(run.mapping, run.range());
    }

    /// Fails the shard when a command has outlived its limit or the device is gone.
    pub(super) fn check_device(&mut self) {
        let expired = self.watch.advance(self.now_ns);
        if self.queue.in_flight() == 0 {
            return;
        }
        if let Err(error) = self.queue.check() {
            self.fail(&error.to_string());
        } else if expired {
            let limit = std::time::Duration::from_nanos(self.limits.command_timeout_ns);
            self.fail(&format!("a command has been with the device for more than {limit:?}"));
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_command_expires_after_its_limit_and_not_before() {
        let mut watch = DeviceWatch::new(32_000);
        assert!(!watch.advance(5_000));
        watch.submitted();
        for now in (5_000..=37_000).step_by(1_000) {
            assert!(!watch.advance(now), "at {now}");
        }
        assert!(watch.advance(38_000));
    }

    #[test]
    fn a_command_that_completed_never_expires_though_nobody_looked_for_long() {
        let mut watch = DeviceWatch::new(32_000);
        watch.submitted();
        watch.completed(0);
        assert!(!watch.advance(1_000_000_000));
        let epoch = watch.epoch();
        watch.submitted();
        assert!(!watch.advance(1_000_010_000));
        watch.completed(epoch);
        assert!(!watch.advance(2_000_000_000));
    }

    #[test]
    fn an_old_command_expires_though_nobody_looked_for_long() {
        let mut watch = DeviceWatch::new(32_000);
        watch.advance(7_000);
        watch.submitted();
        assert!(watch.advance(5_000_000_000));
    }
}
