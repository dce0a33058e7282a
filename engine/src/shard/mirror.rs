//! A shard's queue on the mirror's device: what it is fed, what comes back, and what becomes of it when the device is lost.
//!
//! Nothing here fails the shard. A command that fails in passing is tried again as the primary's are (WB-22); one that
//! fails for good degrades the mirror of its mapping; a queue that fails, a device that is gone or doesn't answer in
//! `command_timeout` degrades all of them. What was in flight then is still the device's: the queue is closed by a
//! thread of its own, since a device that doesn't answer is waited for, and only when that is over do the folios end
//! their writeback, as their other stream has ended.

use std::collections::VecDeque;
use std::sync::Arc;

use crossbeam_channel::{Receiver, bounded};
use foliant_nvme::{
    CommandError, Completion, Deallocation, DmaBuffer, DriverError, Fua, Io, Namespace, QueuePair,
    SubmitError, Wakeup,
};

use super::Shard;
use super::commits::NamespaceCommits;
use super::device::DeviceWatch;
use super::discard::{DiscardJob, ZERO_BLOCKS_MAX};
use super::open::OpenMapping;
use super::payload::{FolioRun, MirrorPayload, PayloadKind, RunPool, ShardPayload};
use super::resync::ResyncJob;
use super::retry::{self, backoff_ns};
use super::{CHECK_NS, COMPLETION_BUDGET};
use crate::cache::MAPPINGS_MAX;
use crate::cache::shape::MappingShape;
use crate::error::{Error, Operation};
use crate::mirror::{MirrorCause, OnDegrade, OpenMirror, StreamId, check_flushes};
use crate::reply::{Grants, SlotId};
use crate::shard::link::ShardLink;
use crate::stats::bump;
use crate::writeback::commit::{CommitGroup, CommitStep};
use crate::writeback::streams::{PairId, Streams};

/// Commands of the mirror's queue that are left to flushes, labels and discards.
const RESERVE: u32 = 2;

/// A part that failed in passing.
#[derive(Debug)]
struct PutOff {
    due_ns: u64,
    run: FolioRun,
}

/// What the thread that closed a lost queue gives back.
type Closed = Vec<Completion<MirrorPayload>>;

/// One shard's queue on the mirror's device.
#[derive(Debug)]
pub(crate) struct MirrorStream {
    /// `None` once the device is lost.
    queue: Option<QueuePair<MirrorPayload>>,
    iova_offset: u64,
    watch: DeviceWatch,
    runs: RunPool,
    streams: Streams,
    /// By mapping slot: the mirrored ones.
    mapped: Box<[Option<Arc<OpenMapping>>]>,
    retries: Vec<PutOff>,
    commits: Vec<NamespaceCommits>,
    /// Reused every step.
    completed: Vec<Completion<MirrorPayload>>,
    checked_ns: u64,
    /// When an emulated device's next modelled delay ends.
    device_due_ns: Option<u64>,
    /// While a lost queue is being closed.
    closing: Option<Receiver<Closed>>,
    /// Copies under way; the first is at work.
    pub(super) resyncs: VecDeque<ResyncJob>,
    /// What a window is copied through.
    pub(super) window: Option<DmaBuffer>,
}

impl MirrorStream {
    /// `commands` is how many the primary's queue holds, `pages_max` how many pages each of them carries.
    pub(crate) fn new(
        queue: QueuePair<MirrorPayload>,
        iova_offset: u64,
        window: DmaBuffer,
        (watch, shared): (DeviceWatch, Arc<crate::cache::SharedCache>),
        (commands, pages_max): (usize, usize),
    ) -> Self {
        let own = queue.free_commands() as usize;
        let pairs = commands + own;
        Self {
            runs: RunPool::new(shared, pairs + own + 1, pages_max),
            streams: Streams::new(pairs),
            queue: Some(queue),
            iova_offset,
            watch,
            mapped: (0..MAPPINGS_MAX).map(|_| None).collect(),
            retries: Vec::with_capacity(own),
            commits: Vec::new(),
            completed: Vec::with_capacity(COMPLETION_BUDGET as usize),
            checked_ns: 0,
            device_due_ns: None,
            closing: None,
            resyncs: VecDeque::new(),
            window: Some(window),
        }
    }

    /// Whether passes over this mapping may take another run.
    #[inline]
    pub(crate) fn has_room(&self, mapping: u16) -> bool {
        self.mapped[usize::from(mapping)].is_none() || self.streams.has_room()
    }

    /// Whether it is the mirror that writeback waits for.
    pub(super) fn is_full(&self) -> bool {
        !self.streams.has_room()
    }

    /// A run of this mapping is about to be submitted to the primary: it gets a pair where the mapping is mirrored.
    #[inline]
    pub(crate) fn begin(&mut self, run: &mut FolioRun) -> u64 {
        let Some(open) = &self.mapped[usize::from(run.mapping)] else { return 0 };
        let Some(mirror) = &open.mirror else { return 0 };
        let pages = run.range();
        let is_fed = mirror.is_fed() && self.queue.is_some();
        let copy = is_fed.then(|| self.runs.copy(&mirror.shape, run, pages.clone()));
        run.pair = self.streams.begin(run.mapping, pages, copy);
        run.pages()
    }

    /// The primary refused a run that was begun.
    pub(crate) fn withdraw(&mut self, pair: PairId) {
        if pair.is_some() {
            self.streams.withdraw(pair);
            self.reuse();
        }
    }

    /// Which stream is fed next, if `own_pages` of a run wait for the primary.
    pub(crate) fn next(&self, own_pages: u64) -> Option<StreamId> {
        self.streams.next(own_pages, self.may_feed())
    }

    fn may_feed(&self) -> bool {
        let needed = RESERVE + self.retries.len() as u32;
        self.queue.as_ref().is_some_and(|queue| queue.free_commands() > needed)
    }

    /// Feeds the oldest part that may be fed; false when there is none, or no room for it.
    pub(crate) fn feed(&mut self, link: &ShardLink) -> bool {
        let (mapped, window) = (&self.mapped, self.resyncs.front().and_then(ResyncJob::window));
        let oldest = self.streams.oldest_unfed(|mapping, pages, is_awaited| {
            // What was taken after a window was announced must overwrite it, so it waits for its end.
            is_awaited
                || window.as_ref().is_none_or(|(slot, window)| {
                    *slot != mapping || pages.end <= window.start || window.end <= pages.start
                })
        });
        let Some((pair, slot, rest, run)) = oldest else { return false };
        let open = mapped[usize::from(slot)].as_ref().expect("a pair keeps its mapping open");
        let mirror = open.mirror.as_ref().expect("a pair is of a mirrored mapping");
        let Some(queue) = self.queue.as_mut().filter(|_| mirror.is_fed()) else {
            self.streams.drop_unfed(pair);
            self.reuse();
            return true;
        };
        let reserve = RESERVE + self.retries.len() as u32;
        if queue.free_commands() < reserve + mirror.shape.block_commands_max() {
            return false;
        }
        let end = rest.end.min(rest.start + mirror.shape.command_pages_max(rest.start));
        let mut part = self.runs.copy(&mirror.shape, run, rest.start..end);
        part.pair = pair;
        part.fua = if run.fua == Fua::Yes && mirror.durability.prefers_fua() { Fua::Yes } else { Fua::No };
        let pages = part.pages();
        if let Err(part) = submit_part(queue, &mut self.watch, (&mirror.shape, self.iova_offset), part) {
            // A queue that has failed says so at its next poll.
            self.runs.end(part);
            return false;
        }
        bump(&link.counters.mirror_write_commands, 1);
        bump(&link.counters.mirror_pages_written, pages);
        self.streams.fed(pair, end);
        self.reuse();
        true
    }

    /// Gives lists of frames back that pairs don't need any more.
    fn reuse(&mut self) {
        while let Some(run) = self.streams.unused.pop() {
            self.runs.end(run);
        }
    }

    /// Puts a command into the queue, or gives back what it carries.
    pub(super) fn submit(
        &mut self,
        namespace: &Namespace,
        io: Io,
        kind: PayloadKind,
    ) -> Result<(), (PayloadKind, SubmitError)> {
        let Some(queue) = &mut self.queue else { return Err((kind, SubmitError::Failed)) };
        let payload = ShardPayload::new(kind, &self.watch);
        let payload = MirrorPayload { payload, iova_offset: self.iova_offset };
        match queue.submit(namespace, io, payload) {
            Ok(()) => {
                self.watch.submitted();
                Ok(())
            }
            Err(rejected) => Err((rejected.payload.payload.kind, rejected.reason)),
        }
    }

    pub(super) fn announce(&mut self, mapping: u16, pages: &std::ops::Range<u64>) {
        self.streams.announce(mapping, pages);
    }

    pub(super) fn is_announced_over(&self) -> bool {
        self.streams.is_announced_over()
    }

    pub(super) fn renounce(&mut self) {
        self.streams.renounce();
    }

    pub(super) fn is_lost(&self) -> bool {
        self.queue.is_none()
    }

    pub(super) fn in_flight(&self) -> u32 {
        self.queue.as_ref().map_or(0, QueuePair::in_flight)
    }

    pub(super) fn ring(&mut self) -> bool {
        self.queue.as_mut().is_some_and(QueuePair::ring)
    }

    pub(super) fn prepare_to_sleep(&mut self) -> Wakeup {
        match &mut self.queue {
            Some(queue) if queue.in_flight() > 0 => queue.prepare_to_sleep(),
            _ => Wakeup::Pump,
        }
    }

    pub(super) fn due_ns(&self) -> Option<u64> {
        let retries = self.retries.iter().map(|put_off| put_off.due_ns);
        let commits = self.commits.iter().filter_map(|commits| commits.group.due_ns());
        retries.chain(commits).chain(self.device_due_ns).min()
    }

    pub(super) fn map(&mut self, open: &Arc<OpenMapping>) {
        if open.mirror.is_some() {
            self.mapped[usize::from(open.shape.slot)] = Some(open.clone());
        }
    }

    pub(super) fn unmap(&mut self, mapping: u16) {
        self.mapped[usize::from(mapping)] = None;
    }

    fn mirror_of(&self, mapping: u16) -> Option<&OpenMirror> {
        self.mapped[usize::from(mapping)].as_ref()?.mirror.as_ref()
    }
}

/// Submits a part, the first time or again. `Err` gives it back.
fn submit_part(
    queue: &mut QueuePair<MirrorPayload>,
    watch: &mut DeviceWatch,
    (shape, iova_offset): (&MappingShape, u64),
    part: FolioRun,
) -> Result<(), FolioRun> {
    let range = part.range();
    let write = Io::Write { lba: shape.lba(range.start), blocks: shape.blocks(&range), fua: part.fua };
    let payload = ShardPayload::new(PayloadKind::Write(part), watch);
    let Err(rejected) = queue.submit(&shape.namespace, write, MirrorPayload { payload, iova_offset }) else {
        watch.submitted();
        return Ok(());
    };
    match rejected.payload.payload.kind {
        PayloadKind::Write(part) => Err(part),
        _ => unreachable!("a rejected payload comes back as it was given"),
    }
}

impl Shard {
    /// A mapping was opened. What this shard can't write isn't in sync, whatever the labels say, which another shard reads.
    pub(super) fn map_mirror(&mut self, open: &Arc<OpenMapping>) {
        let Some(mirror) = &mut self.mirror else { return };
        mirror.map(open);
        if mirror.is_lost() {
            let cause = MirrorCause::Lost("a shard lost it before the mapping was opened".into());
            self.degrade_mirror(open.shape.slot, cause);
        }
    }

    /// The mirror's part of a step: completions, retries, and whatever the mirror lacks.
    pub(super) fn step_mirror(&mut self) -> bool {
        let progressed = self.take_mirror_completions();
        self.check_mirror();
        let Some(mirror) = &mut self.mirror else { return progressed };
        mirror.resubmit(self.now_ns);
        while mirror.next(0) == Some(StreamId::Mirror) && mirror.feed(&self.link) {}
        self.end_finished_pairs() || progressed
    }

    /// A write command of the primary has ended for good: so has its folios' writeback, unless the mirror is still at it.
    pub(super) fn primary_ended(&mut self, run: FolioRun, error: Option<Error>) {
        match &mut self.mirror {
            Some(mirror) if run.pair.is_some() => {
                mirror.streams.primary_ended(run, error);
                self.end_finished_pairs();
            }
            _ => {
                self.write_completed(&run, error);
                self.runs.end(run);
            }
        }
    }

    /// Ends the writeback of runs all of whose streams have ended.
    fn end_finished_pairs(&mut self) -> bool {
        let mut progressed = false;
        while let Some((run, error)) = self.mirror.as_mut().and_then(|mirror| mirror.streams.finished.pop()) {
            self.write_completed(&run, error);
            self.runs.end(run);
            progressed = true;
        }
        progressed
    }

    fn take_mirror_completions(&mut self) -> bool {
        let Some(mirror) = &mut self.mirror else { return false };
        let Some(queue) = &mut mirror.queue else { return self.take_closed() };
        let pumped = queue.pump();
        mirror.device_due_ns = pumped.next_due_ns.map(|due| self.now_ns.saturating_add(due));
        let mut completed = std::mem::take(&mut mirror.completed);
        let polled = queue.poll(COMPLETION_BUDGET, |completion| completed.push(completion));
        if queue.in_flight() == 0 {
            mirror.watch.rest(self.now_ns);
        }
        let progressed = pumped.fetched > 0 || pumped.posted > 0 || !completed.is_empty();
        for completion in completed.drain(..) {
            if let Some(mirror) = &mut self.mirror {
                mirror.watch.completed(completion.payload.payload.watch_epoch);
            }
            self.complete_mirror(completion);
        }
        if let Some(mirror) = &mut self.mirror {
            mirror.completed = completed;
        }
        if let Err(error) = polled {
            self.lose_mirror(&error.to_string());
        }
        progressed
    }

    fn complete_mirror(&mut self, completion: Completion<MirrorPayload>) {
        let Completion { payload, result } = completion;
        if result.is_err() {
            bump(&self.link.counters.command_errors, 1);
        }
        match payload.payload.kind {
            PayloadKind::Write(part) => self.part_completed(part, result),
            PayloadKind::Flush { namespace, epoch } => self.mirror_flush_completed(namespace, epoch, result),
            PayloadKind::Zero { slot } => self.mirror_zero_completed(slot, result),
            PayloadKind::Raw(raw) => self.raw_completed(raw, result),
            PayloadKind::Read(_) | PayloadKind::ReadAhead(_) => unreachable!("a mirror is never read"),
        }
    }

    fn part_completed(&mut self, mut part: FolioRun, result: Result<(), CommandError>) {
        let now_ns = self.now_ns;
        let Some(mirror) = &mut self.mirror else { return };
        match result {
            Ok(()) => {
                if let Some(open) = mirror.mirror_of(part.mapping)
                    && part.fua == Fua::No
                {
                    open.durability.write_completed();
                }
            }
            Err(cause) if retry::may_retry(cause, part.failures) && !mirror.is_lost() => {
                let due_ns = now_ns.saturating_add(backoff_ns(part.failures));
                part.failures += 1;
                bump(&self.link.counters.command_retries, 1);
                mirror.retries.push(PutOff { due_ns, run: part });
                return;
            }
            Err(source) => {
                self.degrade_mirror(
                    part.mapping,
                    MirrorCause::Command { operation: Operation::Write, source },
                );
            }
        }
        let Some(mirror) = &mut self.mirror else { return };
        mirror.streams.part_ended(part.pair);
        mirror.runs.end(part);
        self.end_finished_pairs();
    }

    /// Nothing goes to this mapping's mirror any more.
    pub(super) fn degrade_mirror(&mut self, mapping: u16, cause: MirrorCause) {
        let Some(mirror) = &mut self.mirror else { return };
        let Some(open) = mirror.mapped[usize::from(mapping)].clone() else { return };
        let Some(of_mapping) = &open.mirror else { return };
        if of_mapping.degrade(cause.clone(), self.now_ns) {
            bump(&self.link.counters.mirrors_degraded, 1);
            tracing::error!(
                mapping,
                namespace = of_mapping.shape.namespace.id(),
                first_lba = of_mapping.shape.first_lba,
                %cause,
                "a mirror is degraded: writes go to the primary alone until it is resynchronised"
            );
            if of_mapping.options.on_degrade == OnDegrade::TellAtSync {
                open.errors.record(Error::MirrorDegraded { cause });
            }
        }
        mirror.streams.drop_all_unfed(|slot| slot == mapping);
        mirror.reuse();
        self.end_finished_pairs();
    }

    /// Notices a device that is gone or has stopped answering.
    fn check_mirror(&mut self) {
        let now_ns = self.now_ns;
        let Some(mirror) = &mut self.mirror else { return };
        if now_ns.saturating_sub(mirror.checked_ns) < CHECK_NS {
            return;
        }
        mirror.checked_ns = now_ns;
        let expired = mirror.watch.advance(now_ns);
        let Some(queue) = mirror.queue.as_ref().filter(|queue| queue.in_flight() > 0) else { return };
        if let Err(error) = queue.check() {
            self.lose_mirror(&error.to_string());
        } else if expired {
            let limit = std::time::Duration::from_nanos(self.limits.command_timeout_ns);
            self.lose_mirror(&format!("a command has been with it for more than {limit:?}"));
        }
    }

    /// The mirror's device can't be used any more.
    fn lose_mirror(&mut self, reason: &str) {
        let Some(mirror) = &mut self.mirror else { return };
        let Some(queue) = mirror.queue.take() else { return };
        mirror.device_due_ns = None;
        mirror.closing = Some(close_aside(queue, self.link.clone()));
        let put_off = std::mem::take(&mut mirror.retries);
        let waiting: Vec<SlotId> =
            mirror.commits.iter_mut().flat_map(|commits| commits.group.give_up()).collect();
        let cause = MirrorCause::Lost(reason.into());
        for mapping in 0..MAPPINGS_MAX as u16 {
            self.degrade_mirror(mapping, cause.clone());
        }
        for PutOff { run, .. } in put_off {
            if let Some(mirror) = &mut self.mirror {
                mirror.streams.part_ended(run.pair);
                mirror.runs.end(run);
            }
        }
        for slot in waiting {
            self.answer(slot, Err(Error::MirrorDegraded { cause: cause.clone() }));
        }
        self.fail_labels_of_mirror(CommandError::Gone);
        self.end_finished_pairs();
    }

    /// Takes what a lost queue gives back once it is closed.
    fn take_closed(&mut self) -> bool {
        let closed = self.mirror.as_ref().and_then(|mirror| mirror.closing.as_ref()?.try_recv().ok());
        let Some(closed) = closed else { return false };
        for completion in closed {
            self.complete_mirror(completion);
        }
        for job in &mut self.discards {
            job.mirror_in_flight = 0;
        }
        if let Some(mirror) = &mut self.mirror {
            mirror.closing = None;
            // Where the device didn't even confirm that it forgets the queue, nobody drives that any more. A device that
            // goes on by itself reads frames that may change meanwhile, into a mirror that nobody reads.
            mirror.streams.end_all_parts();
        }
        self.end_finished_pairs();
        true
    }

    // ---- commits ----------------------------------------------------------------------------------------

    /// Flushes the mirror's cache for whoever waits (WB-21). What fails here degrades the mirror and nobody else. Who asked
    /// is told, since a mapping that is being closed isn't known here any more.
    pub(super) fn begin_mirror_commit(&mut self, slot: SlotId, open: &OpenMapping) {
        let Some(of_mapping) = open.mirror.as_ref().filter(|mirror| mirror.needs_commit()) else {
            return self.answer(slot, Ok(Grants::none()));
        };
        if let Err(error) = of_mapping.check_flushes() {
            return self.answer(slot, Err(error));
        }
        match &mut self.mirror {
            Some(mirror) if !mirror.is_lost() => mirror.commits_of(of_mapping).group.join(slot),
            _ => {
                let cause = MirrorCause::Lost("a shard has lost it".into());
                self.answer(slot, Err(Error::MirrorDegraded { cause }));
            }
        }
    }

    /// The writes of an expiry round have ended.
    pub(super) fn want_mirror_commit(&mut self, open: &OpenMapping) {
        let of_mapping = open.mirror.as_ref().filter(|mirror| mirror.needs_commit());
        if let (Some(mirror), Some(of_mapping)) = (&mut self.mirror, of_mapping)
            && !mirror.is_lost()
        {
            mirror.commits_of(of_mapping).group.want();
        }
    }

    /// Submits the mirror's flushes that are due, and rings.
    pub(super) fn end_mirror_step(&mut self) -> bool {
        let Some(mirror) = &mut self.mirror else { return false };
        let mut commits = std::mem::take(&mut mirror.commits);
        for NamespaceCommits { group, namespace, durability } in &mut commits {
            match group.step(durability, self.now_ns) {
                CommitStep::Idle => {}
                CommitStep::Settled => {
                    for slot in group.settled() {
                        self.answer(slot, check_flushes(durability).map(|()| Grants::none()));
                    }
                }
                CommitStep::Flush { epoch } => {
                    let Some(mirror) = &mut self.mirror else { continue };
                    let flush = PayloadKind::Flush { namespace: namespace.id(), epoch };
                    if mirror.submit(namespace, Io::Flush, flush).is_ok() {
                        group.submitted();
                        bump(&self.link.counters.mirror_flush_commands, 1);
                    }
                }
            }
        }
        let Some(mirror) = &mut self.mirror else { return false };
        mirror.commits = commits;
        mirror.ring()
    }

    fn mirror_flush_completed(&mut self, namespace: u32, epoch: u64, result: Result<(), CommandError>) {
        let Some(mirror) = &mut self.mirror else { return };
        if mirror.is_lost() {
            // Who waited has been answered.
            return;
        }
        let mut all = std::mem::take(&mut mirror.commits);
        if let Some(commits) = all.iter_mut().find(|commits| commits.namespace.id() == namespace) {
            let group = &mut commits.group;
            if let Err(error) = result
                && retry::may_retry_flush(error, group.failures())
            {
                bump(&self.link.counters.command_retries, 1);
                group.put_off(self.now_ns.saturating_add(backoff_ns(group.failures())));
            } else {
                if let Err(source) = result {
                    let cause = MirrorCause::Command { operation: Operation::Flush, source };
                    for mapping in 0..MAPPINGS_MAX as u16 {
                        let of_mapping = self.mirror.as_ref().and_then(|mirror| mirror.mirror_of(mapping));
                        if of_mapping.is_some_and(|of| of.shape.namespace.id() == namespace) {
                            self.degrade_mirror(mapping, cause.clone());
                        }
                    }
                }
                for slot in group.ended(epoch, result, &commits.durability) {
                    self.answer(slot, check_flushes(&commits.durability).map(|()| Grants::none()));
                }
            }
            if let Err(error) = check_flushes(&commits.durability) {
                for slot in group.settled() {
                    self.answer(slot, Err(error.clone()));
                }
            }
        }
        if let Some(mirror) = &mut self.mirror {
            mirror.commits = all;
        }
    }

    // ---- discards ---------------------------------------------------------------------------------------

    /// Zeroes on the mirror what a discard zeroes on the primary.
    pub(super) fn submit_mirror_zeroes(&mut self, open: &OpenMapping, job: &mut DiscardJob) {
        let Some(of_mapping) = &open.mirror else { return };
        let Some(mirror) = self.mirror.as_mut().filter(|mirror| of_mapping.is_fed() && !mirror.is_lost())
        else {
            job.mirror_rest.start = job.mirror_rest.end;
            return;
        };
        let shape = &of_mapping.shape;
        let pages_max = (ZERO_BLOCKS_MAX * u64::from(shape.namespace.block_bytes()) / 4096).max(1);
        while !job.mirror_rest.is_empty() {
            let rest = &mut job.mirror_rest;
            let first = shape.striping.page(self.cache.shard, rest.start);
            let stripe_end = shape.striping.run_end(first);
            let count = (rest.end - rest.start).min(stripe_end - first).min(pages_max);
            let (lba, blocks) = (shape.lba(first), shape.blocks(&(first..first + count)));
            let zeroes = Io::WriteZeroes { lba, blocks, fua: Fua::No, deallocation: Deallocation::Allow };
            if mirror.submit(&shape.namespace, zeroes, PayloadKind::Zero { slot: job.slot }).is_err() {
                // Full for now, or failed, which the next poll tells.
                return;
            }
            rest.start += count;
            job.mirror_in_flight += 1;
        }
    }

    fn mirror_zero_completed(&mut self, slot: SlotId, result: Result<(), CommandError>) {
        let Some(job) = self.discards.iter_mut().find(|job| job.slot == slot) else { return };
        job.mirror_in_flight = job.mirror_in_flight.saturating_sub(1);
        let mapping = job.mapping;
        match result {
            Ok(()) => {
                if let Some(of) = self.mirror.as_ref().and_then(|mirror| mirror.mirror_of(mapping)) {
                    of.durability.write_completed();
                }
            }
            Err(source) => {
                self.degrade_mirror(
                    mapping,
                    MirrorCause::Command { operation: Operation::WriteZeroes, source },
                );
            }
        }
    }
}

impl MirrorStream {
    /// Submits again what failed in passing and is due.
    fn resubmit(&mut self, now_ns: u64) {
        let mut at = 0;
        while at < self.retries.len() {
            if self.retries[at].due_ns > now_ns {
                at += 1;
                continue;
            }
            let PutOff { due_ns, run } = self.retries.swap_remove(at);
            let open = self.mapped[usize::from(run.mapping)].as_ref();
            let of = open.and_then(|open| open.mirror.as_ref()).expect("a pair keeps its mapping open");
            if !of.is_fed() {
                self.streams.part_ended(run.pair);
                self.runs.end(run);
                continue;
            }
            let Some(queue) = &mut self.queue else { return };
            if let Err(run) = submit_part(queue, &mut self.watch, (&of.shape, self.iova_offset), run) {
                self.retries.push(PutOff { due_ns, run });
                return;
            }
        }
    }

    fn commits_of(&mut self, of: &OpenMirror) -> &mut NamespaceCommits {
        let namespace = &of.shape.namespace;
        let known = self.commits.iter().position(|commits| commits.namespace.id() == namespace.id());
        let at = known.unwrap_or_else(|| {
            let (namespace, durability) = (namespace.clone(), of.durability.clone());
            self.commits.push(NamespaceCommits { group: CommitGroup::default(), namespace, durability });
            self.commits.len() - 1
        });
        &mut self.commits[at]
    }
}

/// Closes a queue on a thread of its own, which kicks the shard when it has; here if there can't be one.
fn close_aside(queue: QueuePair<MirrorPayload>, link: Arc<ShardLink>) -> Receiver<Closed> {
    let (sender, receiver) = bounded(1);
    let close = move |queue: QueuePair<MirrorPayload>| {
        let mut back = Vec::new();
        let closed: Result<(), DriverError> = queue.close(|completion| back.push(completion));
        if let Err(error) = closed {
            tracing::warn!(%error, "the queue of a lost mirror can't be deleted; what it holds is kept");
        }
        // Nobody listens any more once the shard is dropped.
        let _ = sender.send(back);
        link.kick();
    };
    let shared = Arc::new(std::sync::Mutex::new(Some((queue, close))));
    let run = {
        let shared = shared.clone();
        move || {
            let taken = shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            if let Some((queue, close)) = taken {
                close(queue);
            }
        }
    };
    if std::thread::Builder::new().name("foliant-mirror".to_owned()).spawn(run.clone()).is_err() {
        run();
    }
    receiver
}
