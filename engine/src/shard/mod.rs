//! A shard: the state machine that owns the structure of its part of the cache and one I/O queue pair.
//!
//! It has no thread and no clock: [`Shard::poll`] takes the time, does a bounded step and says what is left. One
//! step, in this order: completions, releases that others wait for, new requests, requests that wait for
//! frames, retries, reads, syncs and urgent passes, discards, readahead, background writeback, other passes, commits,
//! **one doorbell**, eviction ahead of demand.
//!
//! | file | owns |
//! |---|---|
//! | [`link`] | what other threads share of a shard; how they send requests |
//! | [`balance`] | which writers may dirty pages now, which wait |
//! | [`pages`] | requests for pages: misses, waits for holders, grants |
//! | [`gather`] | requests for scattered pages |
//! | [`cancel`] | requests for pages that nobody waits for any more |
//! | [`appends`] | how large the folios are that are made for writers |
//! | [`device`] | submitting reads, taking completions, watching for a device that stopped answering |
//! | [`readahead`] | what is read before it is asked for |
//! | [`retry`] | commands that failed in passing |
//! | [`syncs`] | syncs: what waits, and when it is answered |
//! | [`passes`] | passes that were asked for, and whose turn it is |
//! | [`flush`] | the flusher's rounds, retries of poisoned pages |
//! | [`gates`] | write-ahead gates: bounds, the logs' frames, checkpoints |
//! | [`commits`] | flushes of the device |
//! | [`mirror`] | the second stream: the mirror's queue |
//! | [`resync`] | copying to a mirror beside writes |
//! | [`raw`] | labels, and other memory outside the cache |
//! | [`advise`] | hints: ranges that aren't needed, pages read once |
//! | [`shares`] | cache shares: room in them, and what is above their limits |
//! | [`discard`] | dropping ranges; closing mappings |
//! | [`drive`] | waiting by polling |
//! | [`publish`] | what others see of it |
//! | [`runner`] | the thread that polls a shard and sleeps when there is nothing to do |

pub(crate) mod advise;
pub(crate) mod appends;
pub(crate) mod balance;
pub(crate) mod cancel;
pub(crate) mod commits;
pub(crate) mod device;
pub(crate) mod discard;
pub(crate) mod doze;
pub(crate) mod drive;
pub(crate) mod flush;
pub(crate) mod gates;
pub(crate) mod gather;
pub(crate) mod link;
pub(crate) mod mirror;
pub(crate) mod open;
pub(crate) mod pages;
mod parked;
pub(crate) mod passes;
pub(crate) mod payload;
pub(crate) mod publish;
pub(crate) mod raw;
pub(crate) mod readahead;
pub(crate) mod reclaim;
pub(crate) mod request;
pub(crate) mod resync;
pub(crate) mod retry;
pub(crate) mod runner;
pub(crate) mod shares;
pub(crate) mod syncs;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::Receiver;
use foliant_nvme::{Completion, DmaBuffer, QueuePair, Wakeup};

use crate::cache::MAPPINGS_MAX;
use crate::cache::folio::FrameId;
use crate::cache::owned::ShardCache;
use crate::error::{Error, Result};
use crate::reply::{GRANTS_MAX, Grants, Reply, SlotId};
use crate::writeback::congestion::Congestion;
use crate::writeback::events;
use crate::writeback::flusher::Flusher;
use crate::writeback::poison::PoisonRetries;
use crate::writeback::sync::SyncJob;
use crate::writeback::throttle::{DirtyLimits, Throttle};
use advise::ShardAdvice;
use appends::Appends;
use commits::NamespaceCommits;
use device::DeviceWatch;
use discard::{DiscardJob, Removal};
use flush::OpenEntry;
use gates::ShardGates;
use link::ShardLink;
use mirror::MirrorStream;
use open::OpenMapping;
use pages::Ticket;
use parked::ParkedLists;
use passes::ShardPass;
use payload::{FolioRun, RunPool, ShardPayload};
use publish::Publisher;
use raw::Labels;
use readahead::ReadaheadRequest;
use reclaim::AheadOfDemand;
use request::{Message, Request};
use retry::RetryQueue;
use shares::ShardShares;

/// Requests taken in a step.
const INBOX_BUDGET: usize = 64;
/// Completions taken in a step.
const COMPLETION_BUDGET: u32 = 256;
/// Deadlines and the device's health are looked at this often.
const CHECK_NS: u64 = 10_000_000;

/// What a step did and what is left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Something was done; more may be ready now.
    pub progressed: bool,
    /// Commands are with the device, or requests wait for something: poll again soon.
    pub waiting: bool,
    /// Poll again at this time at the latest (nanoseconds on the caller's clock), whatever happens.
    pub due_ns: Option<u64>,
}

/// The earlier of two times, where there are any.
#[inline]
fn earlier(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

/// Limits of a shard, fixed at open.
#[derive(Clone, Debug)]
pub(crate) struct ShardLimits {
    pub pin_wait_ns: u64,
    pub command_timeout_ns: u64,
    pub flush_interval_ns: u64,
    pub dirty: DirtyLimits,
    /// The most pages that one command can carry.
    pub command_pages_max: usize,
    pub gate_wait_ns: u64,
    /// Pages that may be dirty behind gates.
    pub gated_pages_max: u32,
    /// Frames in reserve for logs, once one is open.
    pub log_reserve_frames: usize,
}

/// One shard. The engine's threads drive it, or the embedding application does
/// ([`ShardThreads::Manual`](crate::ShardThreads::Manual)).
#[derive(Debug)]
pub struct Shard {
    link: Arc<ShardLink>,
    inbox: Receiver<Message>,
    cache: ShardCache,
    queue: QueuePair<ShardPayload>,
    runs: RunPool,
    limits: ShardLimits,
    /// By mapping slot.
    mappings: Box<[Option<Arc<OpenMapping>>]>,
    open: Vec<OpenEntry>,
    /// By reply slot: requests for pages that are not answered yet.
    tickets: Box<[Option<Ticket>]>,
    /// By reply slot: taken from the inbox and not answered yet.
    in_service: Box<[bool]>,
    /// How many those are.
    in_service_count: usize,
    parked: ParkedLists,
    appends: Appends,
    /// Folios whose releases kick this shard.
    watched: Vec<FrameId>,
    /// Requests that wait for frames or for a discard to end, first come first served.
    deferred: VecDeque<SlotId>,
    /// Writers that wait to be let on, first come first served.
    throttled: VecDeque<SlotId>,
    throttle: Throttle,
    /// When the first of them is let on, if time is all that it waits for.
    throttle_due_ns: Option<u64>,
    /// The first of them waits for pages to be written.
    at_dirty_limit: bool,
    /// When a writer was last let on, or a page written.
    throttle_progress_ns: u64,
    congestion: Congestion,
    /// A background pass was put off, and counted, in this time of congestion.
    congestion_counted: bool,
    /// Frames that the first deferred request lacks.
    frames_needed: usize,
    /// Free frames ahead of demand.
    ahead: AheadOfDemand,
    /// Reads whose folios are installed, waiting for room in the queue.
    reads: VecDeque<FolioRun>,
    /// What is left of the readahead that is carried out.
    readahead: Option<ReadaheadRequest>,
    /// Commands that failed in passing and will be submitted again.
    retries: RetryQueue,
    syncs: Vec<SyncJob>,
    passes: Vec<ShardPass>,
    /// Passes begun for requests and syncs.
    pass_count: u64,
    /// Turns that those have had.
    turns: u64,
    /// Folios that owners' integrity passes wait for, and until when that is remembered.
    owners_wait: Vec<(FrameId, u64)>,
    discards: Vec<DiscardJob>,
    /// A group a namespace; few.
    commits: Vec<NamespaceCommits>,
    flusher: Flusher,
    gates: ShardGates,
    shares: ShardShares,
    advice: ShardAdvice,
    /// The second stream, where the engine has one.
    mirror: Option<Box<MirrorStream>>,
    labels: Labels,
    watch: DeviceWatch,
    /// Reused every step.
    completed: Vec<Completion<ShardPayload>>,
    checked_ns: u64,
    now_ns: u64,
    /// The error of the last write, unless it succeeded.
    write_error: Option<Error>,
    /// When a failed write was last put on record; others of the same second are only counted.
    warned_ns: Option<u64>,
    /// When an emulated device's next modelled delay ends.
    device_due_ns: Option<u64>,
    /// A sync, a flush or a discard found no room in the queue: reads let it go first.
    reads_yield: bool,
    failed: bool,
    /// Its place on the stats page, where there is one.
    publisher: Option<Box<Publisher>>,
    /// When it said that it would sleep.
    asleep_since_ns: Option<u64>,
}

impl Drop for Shard {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shard {
    pub(crate) fn new(
        link: Arc<ShardLink>,
        inbox: Receiver<Message>,
        cache: ShardCache,
        (queue, mirror): (QueuePair<ShardPayload>, Option<Box<MirrorStream>>),
        label_page: DmaBuffer,
        limits: ShardLimits,
        watch: DeviceWatch,
    ) -> Self {
        let requests = link.replies.count();
        let commands = (queue.free_commands() + queue.in_flight()) as usize;
        let runs = RunPool::new(cache.shared.clone(), commands + 1, limits.command_pages_max);
        cache.shared.gated.limit(limits.gated_pages_max);
        let frames = cache.shared.headers.len();
        Self {
            inbox,
            queue,
            runs,
            mappings: (0..MAPPINGS_MAX).map(|_| None).collect(),
            open: Vec::with_capacity(MAPPINGS_MAX),
            tickets: (0..requests).map(|_| None).collect(),
            in_service: vec![false; requests].into_boxed_slice(),
            in_service_count: 0,
            parked: ParkedLists::new(requests),
            appends: Appends::new(),
            watched: Vec::with_capacity(requests.min(frames)),
            deferred: VecDeque::with_capacity(requests),
            throttled: VecDeque::with_capacity(requests),
            throttle: Throttle::new(limits.dirty),
            throttle_due_ns: None,
            at_dirty_limit: false,
            throttle_progress_ns: 0,
            congestion: Congestion::new(limits.command_pages_max as u64, limits.dirty.freerun),
            congestion_counted: false,
            frames_needed: 0,
            ahead: AheadOfDemand::new(frames),
            reads: VecDeque::with_capacity(requests * GRANTS_MAX / 2),
            readahead: None,
            retries: Vec::with_capacity(commands),
            syncs: Vec::with_capacity(requests),
            passes: Vec::with_capacity(requests),
            pass_count: 0,
            turns: 0,
            owners_wait: Vec::new(),
            discards: Vec::new(),
            commits: Vec::new(),
            flusher: Flusher::new(limits.dirty, limits.flush_interval_ns),
            gates: ShardGates::new(&limits),
            shares: ShardShares::new(),
            advice: ShardAdvice::new(frames),
            mirror,
            labels: Labels::new(label_page),
            watch,
            completed: Vec::with_capacity(COMPLETION_BUDGET as usize),
            checked_ns: 0,
            now_ns: 0,
            write_error: None,
            warned_ns: None,
            device_due_ns: None,
            reads_yield: false,
            failed: false,
            publisher: None,
            asleep_since_ns: None,
            limits,
            link,
            cache,
        }
    }

    /// The shard's number.
    #[must_use]
    pub fn number(&self) -> usize {
        self.link.shard
    }

    /// The time of the last step.
    pub(crate) fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Frames of this shard.
    pub(crate) fn frames(&self) -> u64 {
        self.cache.shared.headers.len() as u64
    }

    /// Bytes that the cache keeps beside its frames, without its tag nodes.
    pub(crate) fn fixed_metadata_bytes(&self) -> usize {
        self.cache.fixed_metadata_bytes()
    }

    /// Does a bounded step at time `now_ns` (nanoseconds, any origin, never going back). Never blocks, and never unwinds: a
    /// panic, which is a defect of the engine's or of a transport's, fails the shard and with it all mappings, and everything
    /// that waits is answered with [`Error::ShardFailed`].
    pub fn poll(&mut self, now_ns: u64) -> Step {
        self.now_ns = now_ns;
        match catch_unwind(AssertUnwindSafe(|| self.step())) {
            Ok(step) => step,
            Err(panic) => self.fail_by_panic(&*panic),
        }
    }

    fn step(&mut self) -> Step {
        let now_ns = self.now_ns;
        if !self.link.birthplace.is_here() {
            return self.fail_in_a_child();
        }
        self.publish();
        if self.failed {
            return self.poll_failed();
        }
        self.watch.begin_step(now_ns);
        let mut progressed = self.take_completions();
        if self.queue.in_flight() == 0 {
            self.watch.rest(now_ns);
        }
        if self.mirror.is_some() {
            progressed |= self.step_mirror();
        }
        progressed |= self.serve_releases();
        progressed |= self.take_requests();
        progressed |= self.serve_throttled();
        self.retry_deferred();
        if now_ns.saturating_sub(self.checked_ns) >= CHECK_NS {
            self.checked_ns = now_ns;
            self.check_deadlines();
            self.check_device();
            if self.link.shard == 0 {
                // The transport puts it on record; what to do is the embedding application's decision.
                let _ = self.queue.is_release_requested();
            }
        }
        progressed |= self.step_retries();
        self.drop_cancelled();
        self.submit_reads();
        progressed |= self.step_syncs();
        progressed |= self.step_oldest();
        progressed |= self.step_discards();
        progressed |= self.step_labels();
        progressed |= self.step_readahead();
        progressed |= self.step_shares();
        progressed |= self.step_advice();
        progressed |= self.step_flusher();
        progressed |= self.step_patient_passes();
        self.measure_bandwidth();
        self.step_commits();
        if self.mirror.is_some() {
            progressed |= self.step_resync();
            progressed |= self.end_mirror_step();
        }
        if self.queue.ring() {
            events::block_unplug(self.link.shard, &self.link.counters, self.queue.stats().requests, now_ns);
            progressed = true;
            self.start_device();
        }
        // It submits nothing: the device is at work meanwhile.
        self.evict_ahead();
        self.publish_counts();
        self.link.counters.tag_nodes.store(self.cache.tree.used() as u64, Ordering::Relaxed);
        if self.link.is_failed() {
            self.failed = true;
            progressed = true;
        }
        let mirror_in_flight = self.mirror.as_ref().map_or(0, |mirror| mirror.in_flight());
        let waiting = self.queue.in_flight() + mirror_in_flight > 0
            || !self.reads.is_empty()
            || self.in_service_count > 0;
        let check_ns = waiting.then(|| now_ns.saturating_add(CHECK_NS));
        let publish_ns = self.publish_due_ns(progressed);
        let mut due_ns = earlier(check_ns, publish_ns);
        due_ns = earlier(due_ns, self.flusher.due_ns());
        due_ns = earlier(due_ns, self.retries_due_ns());
        due_ns = earlier(due_ns, self.poison_due_ns());
        due_ns = earlier(due_ns, self.commits_due_ns());
        due_ns = earlier(due_ns, self.device_due_ns);
        due_ns = earlier(due_ns, self.throttle_due_ns);
        due_ns = earlier(due_ns, self.shares.due_ns());
        if let Some(mirror) = &self.mirror {
            due_ns = earlier(due_ns, mirror.due_ns());
            due_ns = earlier(due_ns, self.resync_due_ns());
        }
        Step { progressed, waiting, due_ns }
    }

    /// Gets ready to sleep, and says by what the device will wake the sleeper: [`Wakeup::Ready`] when there is
    /// something to do at once, [`Wakeup::Pump`] when only the time that the last [`Step`] named has to be kept. Other
    /// threads wake the sleeper by the [`bell`](Self::bell). Whoever sleeps waits for all three, and calls
    /// [`wake`](Self::wake) before it polls again.
    pub fn prepare_to_sleep(&mut self) -> Wakeup {
        self.asleep_since_ns = Some(self.now_ns);
        self.link.doze.announce();
        // What was sent before the announcement is seen here, what comes after it rings. A kernel's call for the
        // device's interrupt is only made once there is nothing else.
        if self.has_messages() || self.link.is_kicked() {
            return Wakeup::Ready;
        }
        if self.failed {
            return Wakeup::Pump;
        }
        let primary = if self.queue.in_flight() == 0 { Wakeup::Pump } else { self.queue.prepare_to_sleep() };
        let mirror = self.mirror.as_mut().map_or(Wakeup::Pump, |mirror| mirror.prepare_to_sleep());
        match (primary, mirror) {
            (Wakeup::Ready, _) | (_, Wakeup::Ready) => Wakeup::Ready,
            (one, Wakeup::Pump) | (Wakeup::Pump, one) => one,
            // Two descriptors: naps are short, and both streams at work at once is not when a shard sleeps.
            _ => Wakeup::Nothing,
        }
    }

    /// Whether it is the mirror, not the device, that keeps writeback from going on.
    fn waits_for_mirror(&self) -> bool {
        self.mirror.as_ref().is_some_and(|mirror| mirror.is_full())
    }

    /// A descriptor that polls readable when another thread wants a shard that sleeps.
    #[must_use]
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.link.bell.as_fd()
    }

    /// The sleeper is awake: nobody has to ring any more.
    pub fn wake(&mut self) {
        self.link.doze.rouse();
        let _ = rustix::io::read(&self.link.bell, &mut [0u8; 8]);
    }

    fn take_requests(&mut self) -> bool {
        for taken in 0..INBOX_BUDGET {
            // To be told by a channel that it is empty takes a fence; to look doesn't.
            if self.inbox.is_empty() {
                return taken > 0;
            }
            let Ok(message) = self.inbox.try_recv() else { return taken > 0 };
            self.in_service[message.slot.0 as usize] = true;
            self.in_service_count += 1;
            self.receive(message);
        }
        true
    }

    fn receive(&mut self, Message { slot, request }: Message) {
        match request {
            Request::Open(mapping) => {
                if mapping.end.is_closed() {
                    return self.answer(slot, Err(Error::Closed));
                }
                let number = mapping.shape.slot;
                if self.mappings[number as usize].replace(mapping.clone()).is_none() {
                    self.gates_opened(&mapping);
                    self.map_mirror(&mapping);
                    self.open.push(OpenEntry { slot: number, poison: PoisonRetries::default() });
                }
                self.answer(slot, Ok(Grants::none()));
            }
            Request::Close { mapping } => self.begin_discard(slot, mapping, Removal::Close),
            Request::Pages { mapping, first, count, want, pacing } => {
                let ticket = Ticket::new(mapping, first, count, want, pacing, self.now_ns);
                self.tickets[slot.0 as usize] = Some(ticket);
                self.balance_dirty_pages(slot);
            }
            Request::Gather { mapping } => self.receive_gather(slot, mapping),
            Request::Sync { mapping, pages } => self.begin_sync(slot, mapping, pages),
            Request::Writeback { mapping, order } => self.begin_requested_pass(slot, mapping, order),
            Request::FlushUntil { mapping, lsn } => self.begin_flush_until(slot, mapping, lsn),
            Request::OldestLsn { mapping, oldest } => self.begin_oldest(slot, mapping, oldest),
            Request::Commit(mapping) => self.begin_commit(slot, &mapping),
            Request::CommitMirror(mapping) => self.begin_mirror_commit(slot, &mapping),
            Request::Resync { mapping } => self.begin_resync(slot, mapping),
            Request::Drop { mapping, pages } => self.begin_drop(slot, mapping, pages),
            Request::AwaitLimit { share, of } => self.begin_limit_wait(slot, share, of),
            Request::Label { place, action } => self.begin_label(slot, place, action),
            Request::Discard { mapping, pages } => {
                self.begin_discard(slot, mapping, Removal::Discard(pages));
            }
            Request::Truncate { mapping, pages } => {
                self.begin_discard(slot, mapping, Removal::Truncate(pages));
            }
        }
    }

    /// Answers a request; what nobody waits for any more is given back.
    fn answer(&mut self, slot: SlotId, reply: Reply) {
        if std::mem::take(&mut self.in_service[slot.0 as usize]) {
            self.in_service_count -= 1;
        }
        if let Some(Ok(grants)) = self.link.replies.answer(slot, reply) {
            self.link.give_back(&grants);
        }
    }

    fn mapping(&self, slot: u16) -> Result<Arc<OpenMapping>> {
        self.mappings[slot as usize].clone().ok_or(Error::Closed)
    }

    /// Latches the shard failed: everything that waits, and everything that comes, is answered with the reason.
    /// What the device holds stays the device's.
    pub(crate) fn fail(&mut self, reason: &str) {
        tracing::error!(shard = self.link.shard, reason, "shard failed");
        self.link.fail(reason);
        self.failed = true;
    }

    /// A child process has the shard's memory and nothing of its device's.
    #[cold]
    fn fail_in_a_child(&mut self) -> Step {
        if let Err(error) = self.link.birthplace.check() {
            self.fail(&error.to_string());
        }
        self.poll_failed()
    }

    /// What the shard knows may be wrong by now: it fails, and its mappings do at once, hits included.
    #[cold]
    fn fail_by_panic(&mut self, panic: &(dyn std::any::Any + Send)) -> Step {
        let text = panic.downcast_ref::<&str>().map(ToString::to_string);
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        let was_failed = self.failed;
        self.fail(&format!("it panicked: {}", text.as_deref().unwrap_or("no message")));
        if let Some(error) = self.link.failure() {
            self.mappings.iter().flatten().for_each(|open| open.fail(&error));
        }
        if was_failed {
            // Not even answering works: whoever sends from now on answers itself.
            self.link.close();
            return Step::default();
        }
        catch_unwind(AssertUnwindSafe(|| self.poll_failed())).unwrap_or_default();
        Step { progressed: true, waiting: false, due_ns: None }
    }

    /// Stops serving for good: everything that waits is answered with [`Error::Closed`], and so is whatever is
    /// sent later, by its own sender.
    pub(crate) fn close(&mut self) {
        self.link.close();
        for slot in 0..self.in_service.len() {
            if self.in_service[slot] {
                if let Some(ticket) = self.tickets[slot].take() {
                    self.link.give_back(&ticket.grants);
                }
                self.answer(SlotId(slot as u32), Err(Error::Closed));
            }
        }
    }

    /// A failed shard only answers.
    fn poll_failed(&mut self) -> Step {
        let error = self.link.failure().unwrap_or(Error::Closed);
        // Nothing else takes it, and a kick that waits keeps the thread from sleeping.
        let mut progressed = self.link.take_kick();
        for slot in 0..self.in_service.len() {
            if self.in_service[slot] {
                if let Some(ticket) = self.tickets[slot].take() {
                    self.link.give_back(&ticket.grants);
                }
                self.answer(SlotId(slot as u32), Err(error.clone()));
                progressed = true;
            }
        }
        self.drop_readahead();
        while let Ok(message) = self.inbox.try_recv() {
            self.link.refuse(&message, &error);
            progressed = true;
        }
        Step { progressed, waiting: false, due_ns: self.publish_due_ns(progressed) }
    }

    /// Whether a sleeping shard would miss something: asked after sleep was announced.
    pub(crate) fn has_messages(&self) -> bool {
        !self.inbox.is_empty() || self.can_read_ahead()
    }

    pub(crate) fn link(&self) -> &Arc<ShardLink> {
        &self.link
    }

    /// Checks that marks and state words agree (WB-04): for tests, while no thread holds a folio exclusively.
    ///
    /// # Panics
    /// When they don't.
    #[cfg(any(test, debug_assertions))]
    pub fn assert_consistent(&self) {
        self.cache
            .assert_consistent(|key| self.mappings[key.mapping() as usize].as_ref().map(|open| &open.shape));
    }
}
