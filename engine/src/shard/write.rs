//! A shard's writeback: syncs, background passes and commits, step by step.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use foliant_nvme::{CommandError, Io, Namespace};

use super::Shard;
use super::open::OpenMapping;
use super::payload::{PayloadKind, ShardPayload};
use crate::cache::folio::FrameId;
use crate::cache::shape::MappingShape;
use crate::cache::tags::Tag;
use crate::error::Error;
use crate::reply::{Grants, SlotId};
use crate::stats::bump;
use crate::writeback::commit::{CommitGroup, CommitStep, Durability};
use crate::writeback::events;
use crate::writeback::flusher::{Pressure, Reason};
use crate::writeback::issue::{Issued, Issuer, Submitted};
use crate::writeback::pass::{PassState, SyncMode};
use crate::writeback::sync::SyncJob;

/// Pages that one pass writes before it gives the core back (WB-07).
const STEP_PAGES: u64 = 256;

/// The parts of a shard that a pass works with: borrowed one by one, so that the pass's own state can stay borrowed.
macro_rules! issuer {
    ($shard:expr) => {
        Issuer {
            // A quarter of the queue is left to reads, so that a flush cannot fill it.
            reserve: ($shard.queue.in_flight() + $shard.queue.free_commands()) / 4,
            cache: &$shard.cache,
            queue: &mut $shard.queue,
            runs: &mut $shard.runs,
            watch: &mut $shard.watch,
            counters: &$shard.link.counters,
            now_ns: $shard.now_ns,
        }
    };
}

/// The commits of one namespace that meet in this shard.
#[derive(Debug)]
pub(super) struct NamespaceCommits {
    group: CommitGroup,
    namespace: Namespace,
    durability: Arc<Durability>,
}

impl Shard {
    pub(super) fn begin_sync(&mut self, slot: SlotId, number: u16, pages: Range<u64>) {
        match self.mapping(number) {
            Err(error) => self.answer(slot, Err(error)),
            Ok(mapping) => {
                bump(&self.link.counters.passes_integrity, 1);
                events::sync_file_enter(self.link.shard, &mapping.shape, slot.0, &pages, self.now_ns);
                self.syncs.push(SyncJob::new(slot, &self.cache, &mapping.shape, pages, self.now_ns));
            }
        }
    }

    /// Brings every sync as far as it can go now.
    pub(super) fn step_syncs(&mut self) -> bool {
        let mut progressed = false;
        let mut jobs = std::mem::take(&mut self.syncs);
        jobs.retain_mut(|job| {
            let ended = self.step_sync(job, &mut progressed);
            if ended {
                progressed = true;
                events::sync_file_exit(
                    self.link.shard,
                    job.mapping,
                    job.slot.0,
                    job.error.as_ref(),
                    self.now_ns,
                );
                let reply = match job.error.take() {
                    None => Ok(Grants::none()),
                    Some(error) => Err(error),
                };
                self.answer(job.slot, reply);
            }
            !ended
        });
        self.syncs = jobs;
        progressed
    }

    /// True when the sync has nothing left to do in this shard.
    fn step_sync(&mut self, job: &mut SyncJob, progressed: &mut bool) -> bool {
        let Ok(mapping) = self.mapping(job.mapping) else {
            job.error = Some(Error::Closed);
            return true;
        };
        job.blocked = None;
        while let Some(pass) = &mut job.pass {
            let before = pass.rest.start;
            let (issued, done) = issuer!(self).step(&mapping.shape, pass, STEP_PAGES);
            self.count_writes(done);
            if done.commands > 0 || pass.rest.start != before {
                *progressed = true;
                job.idle_since_ns = self.now_ns;
            }
            match issued {
                Issued::End => job.pass = None,
                Issued::Budget => return false,
                Issued::NoRoom => {
                    self.reads_yield = true;
                    return false;
                }
                Issued::Refused => {
                    self.fail("its queue refuses commands");
                    return false;
                }
                Issued::Blocked(frame) => {
                    job.blocked = Some(frame);
                    // News? Then the holder may have let go before it was asked to kick: once more.
                    if !self.watch_folio(frame) {
                        return false;
                    }
                }
            }
        }
        job.writes_have_ended(&self.cache, &mapping.shape)
    }

    /// Syncs that are blocked on a holder for too long fail with its page.
    pub(super) fn check_sync_deadlines(&mut self, waited: Duration) {
        let limit = self.limits.pin_wait_ns;
        let mut expired = Vec::new();
        for (at, job) in self.syncs.iter().enumerate() {
            let Some(frame) = job.blocked else { continue };
            let (folio, head) = (self.cache.shared.folio(frame), self.cache.shared.head(frame));
            if head.state().exclusive() && self.now_ns.saturating_sub(job.idle_since_ns) > limit {
                expired.push((at, folio.key().page()));
            }
        }
        for (at, page) in expired.into_iter().rev() {
            let job = self.syncs.swap_remove(at);
            let error = Error::PinnedTooLong { page, waited };
            events::sync_file_exit(self.link.shard, job.mapping, job.slot.0, Some(&error), self.now_ns);
            self.answer(job.slot, Err(error));
        }
    }

    /// Writes what is dirty in `range`, as far as it can be had at once and no write has failed just now.
    pub(super) fn write_range(&mut self, shape: &MappingShape, range: Range<u64>) {
        if self.flusher.pauses(self.now_ns) {
            return;
        }
        let mut pass = PassState::background(Reason::Close, range);
        let (issued, done) = issuer!(self).step(shape, &mut pass, STEP_PAGES);
        self.count_writes(done);
        match issued {
            Issued::Refused => self.fail("its queue refuses commands"),
            Issued::NoRoom => self.reads_yield = true,
            _ => {}
        }
    }

    /// Whether a sync waits for this folio's holder.
    pub(super) fn sync_waits_for(&self, frame: FrameId) -> bool {
        let head = self.cache.shared.place(frame).head;
        self.syncs.iter().any(|job| {
            job.blocked.is_some_and(|blocked| {
                self.cache.shared.place(blocked).head == head
                    && self.cache.shared.is_marked(blocked, Tag::Dirty)
            })
        })
    }

    fn count_writes(&self, done: Submitted) {
        bump(&self.link.counters.write_commands, done.commands);
        bump(&self.link.counters.pages_written, done.pages);
    }

    fn pressure(&self) -> Pressure {
        let marked = &self.cache.shared.marked;
        Pressure {
            shard: self.link.shard,
            dirty_pages: self.open.iter().map(|&(slot, _)| u64::from(marked[slot as usize].dirty())).sum(),
            frames_needed: self.frames_needed > 0,
            now_ns: self.now_ns,
        }
    }

    /// Runs the flusher for one step of one mapping.
    pub(super) fn step_flusher(&mut self) -> bool {
        let pressure = self.pressure();
        self.flusher.decide(pressure);
        if self.flusher.running.is_none() {
            return false;
        }
        if self.flusher.is_done(pressure, self.open.len()) {
            self.save_writeback_index();
            self.flusher.end(self.now_ns);
            return false;
        }
        let Some(run) = &mut self.flusher.running else { return false };
        let position = run.position % self.open.len();
        let (slot, writeback_index) = self.open[position];
        let Some(mapping) = self.mappings[slot as usize].clone() else { return false };
        let reason = run.reason;
        let pass = run.pass.get_or_insert_with(|| {
            let end = mapping.shape.striping.local_range(self.cache.shard, 0..mapping.shape.pages()).end;
            PassState::background(reason, writeback_index..end)
        });
        debug_assert_eq!(pass.mode, SyncMode::None);
        let (issued, done) = issuer!(self).step(&mapping.shape, pass, STEP_PAGES);
        run.pages += done.pages;
        if run.pages > 0 && run.pages == done.pages {
            bump(&self.link.counters.passes_background, 1);
        }
        let ended = issued == Issued::End;
        if ended {
            // The end of the file was reached: the next pass over this mapping begins at 0 (WB-02).
            let from_start = writeback_index == 0;
            self.open[position].1 = 0;
            run.pass = None;
            if from_start {
                run.position += 1;
                run.finished += 1;
            }
        }
        self.count_writes(done);
        if issued == Issued::Refused {
            self.fail("its queue refuses commands");
        }
        done.commands > 0 || ended
    }

    /// A pass that ends early is taken up where it stopped.
    fn save_writeback_index(&mut self) {
        if let Some(run) = &self.flusher.running
            && let Some(pass) = &run.pass
            && !self.open.is_empty()
        {
            let position = run.position % self.open.len();
            self.open[position].1 = pass.rest.start;
        }
    }

    pub(super) fn begin_commit(&mut self, slot: SlotId, open: &OpenMapping) {
        if let Err(error) = open.durability.check() {
            return self.answer(slot, Err(error));
        }
        let (namespace, durability) = (open.shape.namespace.clone(), open.durability.clone());
        match self.commits.iter_mut().find(|commits| commits.namespace.id() == namespace.id()) {
            Some(commits) => commits.group.join(slot),
            None => {
                let mut group = CommitGroup::default();
                group.join(slot);
                self.commits.push(NamespaceCommits { group, namespace, durability });
            }
        }
    }

    /// Submits the flushes that are due. They come last in a step: whatever completed before is covered.
    pub(super) fn step_commits(&mut self) {
        let mut commits = std::mem::take(&mut self.commits);
        for NamespaceCommits { group, namespace, durability } in &mut commits {
            match group.step(durability) {
                CommitStep::Idle => {}
                CommitStep::Settled => {
                    for slot in group.settled() {
                        bump(&self.link.counters.commits_shared, 1);
                        self.answer(slot, Ok(Grants::none()));
                    }
                }
                CommitStep::Flush { epoch } => {
                    if self.queue.free_commands() == 0 {
                        self.reads_yield = true;
                        continue;
                    }
                    let payload = ShardPayload {
                        kind: PayloadKind::Flush { namespace: namespace.id(), epoch },
                        watch_epoch: self.watch.epoch(),
                    };
                    match self.queue.submit(namespace, Io::Flush, payload) {
                        Ok(()) => {
                            let joined = group.submitted();
                            events::initiate_commit(
                                self.link.shard,
                                namespace.id(),
                                epoch,
                                joined,
                                self.now_ns,
                            );
                            bump(&self.link.counters.flush_commands, 1);
                            bump(&self.link.counters.commits_shared, joined.saturating_sub(1));
                            self.watch.submitted();
                        }
                        Err(rejected) => self.fail(&format!("a flush was refused: {}", rejected.reason)),
                    }
                }
            }
        }
        // Nothing joins while the groups are out: requests are taken in another part of the step.
        self.commits = commits;
    }

    /// A flush ended.
    pub(super) fn flush_completed(&mut self, namespace: u32, epoch: u64, result: Result<(), CommandError>) {
        events::commit_done(self.link.shard, namespace, epoch, &result, self.now_ns);
        let mut all = std::mem::take(&mut self.commits);
        if let Some(commits) = all.iter_mut().find(|commits| commits.namespace.id() == namespace) {
            let NamespaceCommits { group, durability, .. } = commits;
            for slot in group.ended(epoch, result, durability) {
                self.answer(slot, durability.check().map(|()| Grants::none()));
            }
            if durability.check().is_err() {
                for slot in group.settled() {
                    self.answer(slot, durability.check().map(|()| Grants::none()));
                }
            }
        }
        self.commits = all;
    }
}
