//! An I/O completion queue, the submission queues bound to it, and the commands in flight between them.
//!
//! # The life of a command
//! 1. *Reserved*: a free completion entry is set aside for it; without one it stays in the submission queue.
//! 2. *Fetched*: read from the ring and checked ([`io`]); refused ones complete here.
//! 3. *Struck*, perhaps, by an injected fault ([`fault`](crate::fault)).
//! 4. *Started* on the backing. What finishes there at once and has no delay completes here, without step 5.
//! 5. *In flight*: in the kernel (`Working`), waiting for its time (`Waiting`), or lost by a fault (`Dropped`).
//! 6. *Completed*: posted with the reservation of step 1, which can't fail.
//!
//! The hot path takes one lock a pump (the queue's own, never contended), reads each doorbell once, and allocates
//! nothing.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use foliant_nvme_spec::completion::CompletionDw2;
use foliant_nvme_spec::{Command, NvmOpcode, Status, StatusCode};
use foliant_nvme_transport::Pumped;

use crate::attachment::Attachment;
use crate::backing::{Engine, MediaError, Started};
use crate::clock::duration_ns;
use crate::dma::DmaView;
use crate::fault::{Action, Candidate};
use crate::io::{self, Request, RequestKind, Scratch};
use crate::log::FailedCommand;
use crate::observe::{EventObserver, ObservedCommand, ObservedEvent, ObservedSegment, Observer, Turn};
use crate::ring::{CompletionRing, SubmissionRing};
use crate::stats::EmulatedStats;

/// Commands of one completion queue in flight at most; further ones stay in their submission queue.
const IN_FLIGHT_MAX: u32 = 4096;

/// When to pump again after the kernel took no more calls for now.
const SUBMIT_RETRY_NS: u64 = 100_000;

/// One completion queue with everything that completes to it.
#[derive(Debug)]
pub(crate) struct QueueGroup {
    cq: CompletionRing,
    sqs: Vec<SubmissionRing>,
    engine: Engine,
    pending: PendingTable,
    /// Waiting commands as (due, ticket, token); an entry whose ticket isn't the command's any more is stale.
    timers: BinaryHeap<Reverse<(u64, u64, u32)>>,
    /// What the engine has just reported; kept for its capacity.
    finished: Vec<(u32, Result<(), MediaError>)>,
    scratch: Scratch,
    view: View,
    pub(crate) stats: EmulatedStats,
}

/// What a queue remembers of things that seldom change, until the device's generation moves on.
pub(crate) struct View {
    generation: u64,
    pub(crate) dma: DmaView,
    has_faults: bool,
    observer: Option<Observer>,
    event_observer: Option<EventObserver>,
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View").field("generation", &self.generation).finish_non_exhaustive()
    }
}

impl View {
    /// A view that the first refresh replaces.
    pub(crate) fn stale() -> Self {
        Self {
            generation: u64::MAX,
            dma: DmaView::empty(),
            has_faults: false,
            observer: None,
            event_observer: None,
        }
    }

    /// Takes a new snapshot when the generation has moved on; true when it did.
    #[inline]
    pub(crate) fn refresh(&mut self, device: &Attachment) -> bool {
        let generation = device.shared.generation();
        if generation == self.generation {
            return false;
        }
        *self = Self {
            generation,
            dma: device.dma_snapshot(),
            has_faults: device.shared.has_faults(),
            observer: device.shared.observer(),
            event_observer: device.shared.event_observer(),
        };
        true
    }
}

/// A command in flight.
#[derive(Clone, Copy, Debug)]
struct Pending {
    sqid: u16,
    cid: u16,
    state: PendingState,
    /// Completion isn't due before this time; 0 for no delay.
    due_ns: u64,
    status: Status,
    /// What it completes with though it was carried out: a fault said so.
    late_status: Option<Status>,
    /// Bytes and failure details, for when it completes.
    origin: Origin,
    /// Tells this use of the slot's timers from earlier ones.
    ticket: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PendingState {
    Free,
    Working,
    Waiting,
    Dropped,
}

/// How a request ends once it is carried out.
#[derive(Clone, Copy, Debug)]
struct Ending {
    /// Its completion comes that much later.
    delay_ns: u64,
    /// A fault decides the status.
    status: Option<Status>,
}

/// Where a completion comes from, for counters and the error log.
#[derive(Clone, Copy, Debug)]
struct Origin {
    opcode: NvmOpcode,
    nsid: u32,
    slba: u64,
    len_bytes: u64,
}

impl Origin {
    fn of(command: &Command, len_bytes: u64) -> Self {
        let opcode = NvmOpcode(command.cdw0.opcode());
        Self { opcode, nsid: command.nsid, slba: command.slba(), len_bytes }
    }
}

/// The commands in flight of one group, in slots made when the queue is.
#[derive(Debug)]
struct PendingTable {
    slots: Box<[Pending]>,
    free: Vec<u32>,
    tickets: u64,
}

impl PendingTable {
    fn new(capacity: u32) -> Self {
        let vacant = Pending {
            sqid: 0,
            cid: 0,
            state: PendingState::Free,
            due_ns: 0,
            status: Status::SUCCESS,
            late_status: None,
            origin: Origin { opcode: NvmOpcode::FLUSH, nsid: 0, slba: 0, len_bytes: 0 },
            ticket: 0,
        };
        let slots = vec![vacant; capacity as usize].into_boxed_slice();
        Self { slots, free: (0..capacity).rev().collect(), tickets: 0 }
    }

    fn len(&self) -> u32 {
        (self.slots.len() - self.free.len()) as u32
    }

    fn insert(&mut self, pending: Pending) -> Option<u32> {
        let token = self.free.pop()?;
        self.slots[token as usize] = pending;
        Some(token)
    }

    fn remove(&mut self, token: u32) -> Pending {
        let slot = &mut self.slots[token as usize];
        let pending = *slot;
        slot.state = PendingState::Free;
        self.free.push(token);
        pending
    }

    fn next_ticket(&mut self) -> u64 {
        self.tickets += 1;
        self.tickets
    }

    /// Tokens in use, of one submission queue or of all.
    fn tokens(&self, sqid: Option<u16>) -> Vec<u32> {
        let is_wanted = |p: &Pending| p.state != PendingState::Free && sqid.is_none_or(|sqid| sqid == p.sqid);
        let slots = self.slots.iter().enumerate();
        slots.filter(|(_, pending)| is_wanted(pending)).map(|(token, _)| token as u32).collect()
    }
}

impl QueueGroup {
    /// A group around a new completion queue of `entries` entries.
    pub(crate) fn new(cq: CompletionRing, entries: u32, device: &Attachment) -> Self {
        let in_flight_max = (entries - 1).min(IN_FLIGHT_MAX);
        Self {
            cq,
            sqs: Vec::with_capacity(1),
            engine: device.shared.medium.engine(in_flight_max),
            pending: PendingTable::new(in_flight_max),
            timers: BinaryHeap::with_capacity(in_flight_max as usize),
            finished: Vec::with_capacity(in_flight_max as usize),
            scratch: Scratch::new(),
            view: View::stale(),
            stats: EmulatedStats::default(),
        }
    }

    pub(crate) fn add_submission_queue(&mut self, sq: SubmissionRing) {
        self.sqs.push(sq);
    }

    pub(crate) fn has_submission_queues(&self) -> bool {
        !self.sqs.is_empty()
    }

    /// Completions that are posted and that the driver hasn't taken.
    pub(crate) fn completions_untaken(&self) -> u32 {
        self.cq.untaken()
    }

    pub(crate) fn wakeup_fd(&self) -> Option<std::os::fd::RawFd> {
        self.engine.wakeup_fd()
    }

    /// Fetches, works and completes, as far as that goes without waiting.
    pub(crate) fn pump(&mut self, device: &Attachment) -> Pumped {
        let posted_before = self.stats.completions;
        let mut pumped = Pumped::default();
        if self.view.refresh(device) && !self.rebind() {
            device.fail("the memory of an I/O queue is no longer mapped");
            return pumped;
        }
        if let Err(invalid) = self.cq.refresh_head() {
            self.stats.doorbells_invalid += 1;
            device.doorbell_invalid(invalid);
        }
        self.complete_finished(device);
        for index in 0..self.sqs.len() {
            pumped.fetched += self.fetch(index, device);
        }
        pumped.in_flight = self.pending.len();
        if pumped.in_flight > 0 {
            self.engine.submit();
            self.complete_finished(device);
            // What finished at once may have a next call to make; nobody would wake the queue for it.
            self.engine.submit();
            pumped.in_flight = self.pending.len();
            pumped.next_due_ns = self.next_due_ns(device);
            if self.engine.has_unsubmitted() {
                pumped.next_due_ns = Some(pumped.next_due_ns.unwrap_or(u64::MAX).min(SUBMIT_RETRY_NS));
            }
        }
        pumped.posted = (self.stats.completions - posted_before) as u32;
        pumped
    }

    fn rebind(&mut self) -> bool {
        let Self { cq, sqs, view, .. } = self;
        cq.rebind(&mut view.dma) && sqs.iter_mut().all(|sq| sq.rebind(&mut view.dma))
    }

    /// Takes what the doorbell of one submission queue shows, as far as completions have room.
    fn fetch(&mut self, index: usize, device: &Attachment) -> u32 {
        match self.sqs[index].refresh_tail() {
            Ok(has_moved) => self.stats.sq_batches += u64::from(has_moved),
            Err(invalid) => {
                self.stats.doorbells_invalid += 1;
                device.doorbell_invalid(invalid);
            }
        }
        let mut fetched = 0;
        while !self.sqs[index].is_empty() {
            if self.cq.free() <= self.pending.len() || self.pending.free.is_empty() {
                self.stats.cq_full += 1;
                break;
            }
            let Some(command) = self.sqs[index].fetch() else { break };
            fetched += 1;
            self.execute(index, &command, device);
        }
        fetched
    }

    #[inline]
    fn execute(&mut self, index: usize, command: &Command, device: &Attachment) {
        count_fetched(&mut self.stats, command);
        let limits = &device.shared.limits;
        let request = match io::decode(command, limits, &mut self.view.dma, &mut self.scratch) {
            Ok(request) => request,
            Err(code) => return self.refuse(index, command, code, device),
        };
        self.stats.fua_commands += u64::from(request.fua);
        let mut delay_ns = match device.shared.latency {
            None => 0,
            Some(latency) => duration_ns(match request.kind {
                RequestKind::Read => latency.read,
                RequestKind::Flush => latency.flush,
                _ => latency.write,
            }),
        };
        let mut late_status = None;
        if self.view.has_faults {
            match self.strike(index, command, &request, device) {
                None => {}
                Some(Action::Delay(delay)) => delay_ns = delay_ns.saturating_add(duration_ns(delay)),
                Some(Action::FailLate { delay, status }) => {
                    delay_ns = delay_ns.saturating_add(duration_ns(delay)).max(1);
                    late_status = Some(status);
                }
                Some(Action::Status(status)) => {
                    let origin = Origin::of(command, request.len_bytes());
                    return self.post(self.sqs[index].qid, command.cdw0.cid(), status, origin, device);
                }
                Some(Action::Drop) => return self.hold(index, command, &request),
            }
        }
        if self.view.observer.is_some() {
            self.observe(index, command, &request);
        }
        if let Some(path) = &device.shared.path {
            // Only what is carried out takes the path: a command that a fault ended moves no data.
            delay_ns = delay_ns.saturating_add(match request.kind {
                RequestKind::Read => path.read_ns(request.len_bytes(), device.shared.now_ns()),
                RequestKind::Write => path.write_ns(request.len_bytes(), device.shared.now_ns()),
                _ => 0,
            });
        }
        self.start(index, command, &request, Ending { delay_ns, status: late_status }, device);
    }

    /// Starts the request on the backing; posts it when that was all.
    #[inline]
    fn start(
        &mut self,
        index: usize,
        command: &Command,
        request: &Request,
        ending: Ending,
        device: &Attachment,
    ) {
        let Ending { delay_ns, status: late_status } = ending;
        let sqid = self.sqs[index].qid;
        let cid = command.cdw0.cid();
        let origin = Origin::of(command, request.len_bytes());
        let work = request.work(&self.scratch, device.cache_durability());
        if delay_ns == 0 && !self.engine.needs_token() {
            let started = work.map_or(Started::Done(Ok(())), |work| self.engine.start(0, &work));
            self.stats.bounced += self.engine.take_bounced();
            let Started::Done(result) = started else { return };
            return self.post(sqid, cid, status_of(result), origin, device);
        }
        let due_ns = if delay_ns == 0 { 0 } else { device.shared.now_ns().saturating_add(delay_ns) };
        let ticket = self.pending.next_ticket();
        let pending = Pending {
            sqid,
            cid,
            state: PendingState::Working,
            due_ns,
            status: Status::SUCCESS,
            late_status,
            origin,
            ticket,
        };
        let Some(token) = self.pending.insert(pending) else { return };
        let started = work.map_or(Started::Done(Ok(())), |work| self.engine.start(token, &work));
        self.stats.bounced += self.engine.take_bounced();
        if let Started::Done(result) = started {
            self.finish(token, result, device);
        }
    }

    /// The backing is done with a command: it completes now, or when it is due.
    fn finish(&mut self, token: u32, result: Result<(), MediaError>, device: &Attachment) {
        let pending = &mut self.pending.slots[token as usize];
        pending.status = pending.late_status.unwrap_or(status_of(result));
        if pending.due_ns == 0 {
            return self.complete(token, device);
        }
        pending.state = PendingState::Waiting;
        self.timers.push(Reverse((pending.due_ns, pending.ticket, token)));
    }

    fn complete(&mut self, token: u32, device: &Attachment) {
        self.engine.completed(token);
        let pending = self.pending.remove(token);
        self.post(pending.sqid, pending.cid, pending.status, pending.origin, device);
    }

    /// Completes what the backing has finished and what has become due.
    fn complete_finished(&mut self, device: &Attachment) {
        if self.pending.len() == 0 {
            return;
        }
        let mut finished = std::mem::take(&mut self.finished);
        self.engine.reap(|token, result| finished.push((token, result)));
        for (token, result) in finished.drain(..) {
            self.finish(token, result, device);
        }
        self.finished = finished;
        if !self.timers.is_empty() {
            self.complete_due(device);
        }
    }

    fn complete_due(&mut self, device: &Attachment) {
        let now_ns = device.shared.now_ns();
        while let Some(&Reverse((due_ns, ticket, token))) = self.timers.peek()
            && due_ns <= now_ns
        {
            self.timers.pop();
            let pending = &self.pending.slots[token as usize];
            if pending.state == PendingState::Waiting && pending.ticket == ticket {
                self.complete(token, device);
            }
        }
    }

    /// When the next waiting command is due, in nanoseconds from now.
    fn next_due_ns(&mut self, device: &Attachment) -> Option<u64> {
        while let Some(&Reverse((due_ns, ticket, token))) = self.timers.peek() {
            let pending = &self.pending.slots[token as usize];
            if pending.state == PendingState::Waiting && pending.ticket == ticket {
                return Some(due_ns.saturating_sub(device.shared.now_ns()));
            }
            self.timers.pop();
        }
        None
    }

    /// What the injected faults do to this command.
    #[cold]
    fn strike(
        &mut self,
        index: usize,
        command: &Command,
        request: &Request,
        device: &Attachment,
    ) -> Option<Action> {
        let action = device.shared.decide_fault(&Candidate {
            qid: self.sqs[index].qid,
            opcode: command.cdw0.opcode(),
            nsid: command.nsid,
            slba: request.slba,
            blocks: request.blocks.into(),
        })?;
        self.stats.faults_injected += 1;
        let origin = Origin::of(command, request.len_bytes());
        self.tell(self.sqs[index].qid, command.cdw0.cid(), origin, Turn::Struck(action));
        Some(action)
    }

    /// Keeps a lost command, so that it holds its reservation and can be aborted.
    fn hold(&mut self, index: usize, command: &Command, request: &Request) {
        let ticket = self.pending.next_ticket();
        self.pending.insert(Pending {
            sqid: self.sqs[index].qid,
            cid: command.cdw0.cid(),
            state: PendingState::Dropped,
            due_ns: 0,
            status: Status::SUCCESS,
            late_status: None,
            origin: Origin::of(command, request.len_bytes()),
            ticket,
        });
    }

    #[cold]
    fn observe(&self, index: usize, command: &Command, request: &Request) {
        let Some(observer) = &self.view.observer else { return };
        let segments: Vec<ObservedSegment> = self.scratch.segments.iter().map(Into::into).collect();
        observer(&ObservedCommand {
            qid: self.sqs[index].qid,
            cid: command.cdw0.cid(),
            nsid: command.nsid,
            opcode: NvmOpcode(command.cdw0.opcode()),
            slba: request.slba,
            blocks: request.blocks,
            fua: request.fua,
            segments: &segments,
        });
    }

    #[cold]
    fn tell(&self, qid: u16, cid: u16, origin: Origin, turn: Turn) {
        if let Some(observer) = &self.view.event_observer {
            let Origin { opcode, slba, len_bytes, .. } = origin;
            observer(&ObservedEvent { qid, cid, opcode, slba, len_bytes, turn });
        }
    }

    #[cold]
    fn refuse(&mut self, index: usize, command: &Command, code: StatusCode, device: &Attachment) {
        self.stats.refused += 1;
        self.stats.dma_faults += u64::from(code == StatusCode::DATA_TRANSFER_ERROR);
        let status = Status::of(code).with_dnr(true);
        self.post(self.sqs[index].qid, command.cdw0.cid(), status, Origin::of(command, 0), device);
    }

    /// Posts the completion of a command, into the room reserved for it.
    #[inline]
    fn post(&mut self, sqid: u16, cid: u16, status: Status, origin: Origin, device: &Attachment) {
        let mut status = status;
        if status.is_success() {
            match origin.opcode {
                NvmOpcode::READ => self.stats.bytes_read += origin.len_bytes,
                NvmOpcode::WRITE => self.stats.bytes_written += origin.len_bytes,
                _ => {}
            }
        } else {
            self.stats.errors += 1;
            let Origin { opcode, nsid, slba, .. } = origin;
            let failed = FailedCommand { sqid, cid, opcode: opcode.0, nsid, lba: slba };
            status = device.log_error(&failed, status);
        }
        if self.view.event_observer.is_some() {
            self.tell(sqid, cid, origin, Turn::Completed(status));
        }
        let head = self.sqs.iter().find(|sq| sq.qid == sqid).map_or(0, SubmissionRing::head);
        let dw2 = CompletionDw2::new().with_sqhd(head).with_sqid(sqid);
        self.cq.post(0, dw2, cid, status);
        self.stats.completions += 1;
    }

    /// Aborts a command that is waiting or lost. False when there's none, or the kernel has it.
    pub(crate) fn abort(&mut self, sqid: u16, cid: u16, device: &Attachment) -> bool {
        let mut slots = self.pending.slots.iter().enumerate();
        let found = slots.find(|(_, pending)| {
            matches!(pending.state, PendingState::Waiting | PendingState::Dropped)
                && (pending.sqid, pending.cid) == (sqid, cid)
        });
        let Some((token, _)) = found else { return false };
        self.pending.slots[token].status = Status::of(StatusCode::COMMAND_ABORT_REQUESTED);
        self.complete(token as u32, device);
        true
    }

    /// Waits until the kernel touches no host memory for this group any more.
    pub(crate) fn quiesce(&mut self, device: &Attachment) {
        let mut finished = std::mem::take(&mut self.finished);
        self.engine.drain(|token, result| finished.push((token, result)));
        for (token, result) in finished.drain(..) {
            self.finish(token, result, device);
        }
        self.finished = finished;
    }

    /// Ends a submission queue: what is in flight is ended without a completion (Base section 3.3.1.3).
    pub(crate) fn remove_submission_queue(&mut self, sqid: u16, device: &Attachment) {
        self.quiesce(device);
        self.abandon(Some(sqid));
        self.sqs.retain(|sq| sq.qid != sqid);
    }

    /// Ends everything, for a reset, a power cut or the end of the attachment. No completion is posted and host
    /// memory isn't touched any more, except by what the kernel was already doing, which is waited for.
    pub(crate) fn end(&mut self) {
        self.engine.drain(|_, _| {});
        self.abandon(None);
        self.sqs.clear();
    }

    fn abandon(&mut self, sqid: Option<u16>) {
        for token in self.pending.tokens(sqid) {
            self.engine.abandoned(token);
            self.pending.remove(token);
        }
    }
}

fn status_of(result: Result<(), MediaError>) -> Status {
    result.map_or_else(|error| Status::of(error.status()), |()| Status::SUCCESS)
}

#[inline]
fn count_fetched(stats: &mut EmulatedStats, command: &Command) {
    match NvmOpcode(command.cdw0.opcode()) {
        NvmOpcode::READ => stats.reads += 1,
        NvmOpcode::WRITE => stats.writes += 1,
        NvmOpcode::FLUSH => stats.flushes += 1,
        NvmOpcode::WRITE_ZEROES => stats.write_zeroes += 1,
        NvmOpcode::DATASET_MANAGEMENT => stats.deallocates += 1,
        _ => stats.io_others += 1,
    }
}
