//! The admin queue and its commands (Base section 5).

use std::collections::BTreeMap;

use foliant_nvme_spec::command::{
    AbortCdw10, CreateCompletionQueueCdw11, CreateQueueCdw10, CreateSubmissionQueueCdw11, DeleteQueueCdw10,
    GetLogPageCdw10, GetLogPageCdw11, IdentifyCdw10, Psdt,
};
use foliant_nvme_spec::completion::CompletionDw2;
use foliant_nvme_spec::feature::{
    FeatureId, GetFeaturesCdw10, NumberOfQueues, SetFeaturesCdw10, VolatileWriteCache,
};
use foliant_nvme_spec::identify::Cns;
use foliant_nvme_spec::log::LogPageId;
use foliant_nvme_spec::{AdminOpcode, Command, Status, StatusCode, prp as prp_format};
use foliant_nvme_transport::Pumped;
use zerocopy::IntoBytes;

use crate::attachment::Attachment;
use crate::clock::duration_ns;
use crate::fault::{Action, Candidate};
use crate::features::Features;
use crate::identify;
use crate::log::{self, AsyncEvents, FailedCommand};
use crate::prp::{self, Segment};
use crate::queue::{QueueGroup, View};
use crate::registers::RegisterFile;
use crate::ring::{CompletionRing, RingMemory, SubmissionRing};
use crate::stats::EmulatedStats;

/// Everything behind the admin queue of an enabled controller. A reset makes a new one.
#[derive(Debug)]
pub(crate) struct AdminController {
    sq: SubmissionRing,
    cq: CompletionRing,
    view: View,
    segments: Vec<Segment>,
    features: Features,
    events: AsyncEvents,
    /// Which completion queue each I/O submission queue is bound to.
    sq_to_cq: BTreeMap<u16, u16>,
    /// Completions that an injected fault holds back.
    delayed: Vec<Delayed>,
    pub(crate) stats: EmulatedStats,
}

#[derive(Clone, Copy, Debug)]
struct Delayed {
    due_ns: u64,
    cid: u16,
    dw0: u32,
    status: Status,
}

/// How a command ends.
enum Outcome {
    Completed(Result<u32, StatusCode>),
    /// It completes when there's an event to tell.
    Held,
}

impl AdminController {
    pub(crate) fn new(sq: SubmissionRing, cq: CompletionRing) -> Self {
        Self {
            sq,
            cq,
            view: View::stale(),
            segments: Vec::new(),
            features: Features::default(),
            events: AsyncEvents::default(),
            sq_to_cq: BTreeMap::new(),
            delayed: Vec::new(),
            stats: EmulatedStats::default(),
        }
    }

    /// Fetches and carries out admin commands, as far as completions have room.
    pub(crate) fn pump(&mut self, device: &Attachment) -> Pumped {
        let posted_before = self.stats.completions;
        let mut pumped = Pumped::default();
        if self.view.refresh(device) {
            let Self { sq, cq, view, .. } = self;
            if !(sq.rebind(&mut view.dma) && cq.rebind(&mut view.dma)) {
                device.fail("the memory of the admin queue is no longer mapped");
                return pumped;
            }
        }
        let head = self.cq.refresh_head();
        let tail = self.sq.refresh_tail();
        for invalid in [head.err(), tail.err()].into_iter().flatten() {
            self.stats.doorbells_invalid += 1;
            device.doorbell_invalid(invalid);
        }
        self.stats.sq_batches += u64::from(tail == Ok(true));
        self.post_due(device);
        while self.cq.free() as usize > self.delayed.len()
            && let Some(command) = self.sq.fetch()
        {
            pumped.fetched += 1;
            self.execute(&command, device);
        }
        if device.take_invalid_doorbell() {
            self.events.raise();
        }
        if self.cq.free() as usize > self.delayed.len()
            && let Some((cid, dw0)) = self.events.take()
        {
            self.post(cid, dw0, Status::SUCCESS);
        }
        pumped.in_flight = self.delayed.len() as u32;
        let next_due_ns = self.delayed.iter().map(|delayed| delayed.due_ns).min();
        pumped.next_due_ns = next_due_ns.map(|due_ns| due_ns.saturating_sub(device.shared.now_ns()));
        pumped.posted = (self.stats.completions - posted_before) as u32;
        pumped
    }

    fn post_due(&mut self, device: &Attachment) {
        if self.delayed.is_empty() {
            return;
        }
        let now_ns = device.shared.now_ns();
        let (due, later): (Vec<Delayed>, Vec<Delayed>) =
            self.delayed.iter().partition(|delayed| delayed.due_ns <= now_ns);
        self.delayed = later;
        for Delayed { cid, dw0, status, .. } in due {
            self.post(cid, dw0, status);
        }
    }

    fn post(&mut self, cid: u16, dw0: u32, status: Status) {
        self.stats.errors += u64::from(!status.is_success());
        self.stats.completions += 1;
        self.cq.post(dw0, CompletionDw2::new().with_sqhd(self.sq.head()), cid, status);
    }

    fn execute(&mut self, command: &Command, device: &Attachment) {
        self.stats.admin_commands += 1;
        let cid = command.cdw0.cid();
        let opcode = command.cdw0.opcode();
        let candidate = Candidate { qid: 0, opcode, nsid: command.nsid, slba: 0, blocks: 0 };
        let action = if device.shared.has_faults() { device.shared.decide_fault(&candidate) } else { None };
        self.stats.faults_injected += u64::from(action.is_some());
        let (result, delay) = match action {
            Some(Action::Drop) => return,
            Some(Action::Status(status)) => {
                let status = device.log_error(&failed(command), status);
                return self.post(cid, 0, status);
            }
            Some(Action::Delay(delay)) => (self.dispatch(command, device), Some((delay, None))),
            Some(Action::FailLate { delay, status }) => {
                (self.dispatch(command, device), Some((delay, Some(status))))
            }
            None => (self.dispatch(command, device), None),
        };
        let Outcome::Completed(result) = result else { return };
        let (dw0, status) = match result {
            Ok(dw0) => (dw0, Status::SUCCESS),
            Err(code) => {
                self.stats.refused += 1;
                self.stats.dma_faults += u64::from(code == StatusCode::DATA_TRANSFER_ERROR);
                (0, device.log_error(&failed(command), Status::of(code).with_dnr(true)))
            }
        };
        match delay {
            None => self.post(cid, dw0, status),
            Some((delay, failed)) => {
                let due_ns = device.shared.now_ns().saturating_add(duration_ns(delay));
                let status = failed.unwrap_or(status);
                self.delayed.push(Delayed { due_ns, cid, dw0, status });
            }
        }
    }

    fn dispatch(&mut self, command: &Command, device: &Attachment) -> Outcome {
        if command.cdw0.fuse() != 0 || command.cdw0.psdt() != Psdt::Prp {
            return Outcome::Completed(Err(StatusCode::INVALID_FIELD));
        }
        Outcome::Completed(match AdminOpcode(command.cdw0.opcode()) {
            AdminOpcode::IDENTIFY => self.identify(command, device),
            AdminOpcode::CREATE_IO_COMPLETION_QUEUE => self.create_completion_queue(command, device),
            AdminOpcode::CREATE_IO_SUBMISSION_QUEUE => self.create_submission_queue(command, device),
            AdminOpcode::DELETE_IO_SUBMISSION_QUEUE => self.delete_submission_queue(command, device),
            AdminOpcode::DELETE_IO_COMPLETION_QUEUE => delete_completion_queue(command, device),
            AdminOpcode::SET_FEATURES => self.set_features(command, device),
            AdminOpcode::GET_FEATURES => self.get_features(command, device),
            AdminOpcode::GET_LOG_PAGE => self.log_page(command, device),
            AdminOpcode::ABORT => Ok(self.abort(command, device)),
            AdminOpcode::ASYNCHRONOUS_EVENT_REQUEST if self.events.hold(command.cdw0.cid()) => {
                return Outcome::Held;
            }
            AdminOpcode::ASYNCHRONOUS_EVENT_REQUEST => Err(StatusCode::ASYNC_EVENT_REQUEST_LIMIT_EXCEEDED),
            _ => Err(StatusCode::INVALID_OPCODE),
        })
    }

    /// Moves `data` to the command's data pointer.
    fn send(&mut self, command: &Command, data: &[u8]) -> Result<u32, StatusCode> {
        let (prp1, prp2) = (command.prp1, command.prp2);
        prp::walk(&mut self.view.dma, prp1, prp2, data.len() as u64, &mut self.segments)?;
        prp::copy_to_host(data, &self.segments);
        Ok(0)
    }

    fn identify(&mut self, command: &Command, device: &Attachment) -> Result<u32, StatusCode> {
        let shared = &device.shared;
        let (config, limits, nsid) = (&shared.config, &shared.limits, command.nsid);
        match IdentifyCdw10::from(command.cdw10).cns() {
            Cns::NAMESPACE => {
                let data = identify::namespace(config, limits.namespace(nsid)?, nsid);
                self.send(command, data.as_bytes())
            }
            Cns::CONTROLLER => self.send(command, identify::controller(config, limits).as_bytes()),
            // FFFFFFFEh and FFFFFFFFh have nothing above them to list (Base section 5.1.13.2.2).
            Cns::ACTIVE_NAMESPACES if nsid >= 0xFFFF_FFFE => Err(StatusCode::INVALID_NAMESPACE),
            Cns::ACTIVE_NAMESPACES => {
                self.send(command, identify::active_namespaces(limits, nsid).as_bytes())
            }
            Cns::NAMESPACE_DESCRIPTORS => {
                limits.namespace(nsid)?;
                self.send(command, &identify::descriptors(config, nsid))
            }
            _ => Err(StatusCode::INVALID_FIELD),
        }
    }

    fn create_completion_queue(&mut self, command: &Command, device: &Attachment) -> Result<u32, StatusCode> {
        let (qid, memory) = new_queue(command, device)?;
        let cdw11 = CreateCompletionQueueCdw11::from(command.cdw11);
        if !cdw11.pc() {
            return Err(StatusCode::INVALID_FIELD);
        }
        if cdw11.ien() && cdw11.iv() > device.shared.config.queue_pairs_max {
            return Err(StatusCode::INVALID_INTERRUPT_VECTOR);
        }
        let mut group = device.group(qid).ok_or(StatusCode::INVALID_QUEUE_IDENTIFIER)?;
        if group.is_some() {
            return Err(StatusCode::INVALID_QUEUE_IDENTIFIER);
        }
        let cq = CompletionRing::new(qid, memory, &mut self.view.dma, &device.doorbells);
        let cq = cq.ok_or(StatusCode::DATA_TRANSFER_ERROR)?;
        *group = Some(Box::new(QueueGroup::new(cq, memory.entries, device)));
        Ok(0)
    }

    fn create_submission_queue(&mut self, command: &Command, device: &Attachment) -> Result<u32, StatusCode> {
        let (qid, memory) = new_queue(command, device)?;
        let cdw11 = CreateSubmissionQueueCdw11::from(command.cdw11);
        if self.sq_to_cq.contains_key(&qid) {
            return Err(StatusCode::INVALID_QUEUE_IDENTIFIER);
        }
        if !cdw11.pc() {
            return Err(StatusCode::INVALID_FIELD);
        }
        let cqid = cdw11.cqid();
        let mut group = device.group(cqid).ok_or(StatusCode::INVALID_QUEUE_IDENTIFIER)?;
        let group = group.as_mut().ok_or(StatusCode::COMPLETION_QUEUE_INVALID)?;
        let sq = SubmissionRing::new(qid, memory, &mut self.view.dma, &device.doorbells);
        group.add_submission_queue(sq.ok_or(StatusCode::DATA_TRANSFER_ERROR)?);
        self.sq_to_cq.insert(qid, cqid);
        Ok(0)
    }

    fn delete_submission_queue(&mut self, command: &Command, device: &Attachment) -> Result<u32, StatusCode> {
        let qid = DeleteQueueCdw10::from(command.cdw10).qid();
        let cqid = self.sq_to_cq.remove(&qid).ok_or(StatusCode::INVALID_QUEUE_IDENTIFIER)?;
        if let Some(mut group) = device.group(cqid)
            && let Some(group) = group.as_mut()
        {
            group.remove_submission_queue(qid, device);
        }
        Ok(0)
    }

    fn set_features(&mut self, command: &Command, device: &Attachment) -> Result<u32, StatusCode> {
        let cdw10 = SetFeaturesCdw10::from(command.cdw10);
        if cdw10.sv() {
            return Err(StatusCode::FEATURE_NOT_SAVEABLE);
        }
        match FeatureId(cdw10.fid()) {
            FeatureId::NUMBER_OF_QUEUES => {
                let wanted = NumberOfQueues::from(command.cdw11);
                if wanted.nsq_z() == u16::MAX || wanted.ncq_z() == u16::MAX {
                    return Err(StatusCode::INVALID_FIELD);
                }
                if device.has_io_queues() {
                    return Err(StatusCode::COMMAND_SEQUENCE_ERROR);
                }
                Ok(granted_queues(device).into())
            }
            FeatureId::VOLATILE_WRITE_CACHE if !device.shared.config.volatile_write_cache => {
                Err(StatusCode::INVALID_FIELD)
            }
            FeatureId::VOLATILE_WRITE_CACHE => {
                let is_wanted = VolatileWriteCache::from(command.cdw11).wce();
                device.set_write_cache(is_wanted).map_err(|error| error.status())?;
                Ok(0)
            }
            id => self.features.set(id, command.cdw11).map(|()| 0),
        }
    }

    fn get_features(&mut self, command: &Command, device: &Attachment) -> Result<u32, StatusCode> {
        let cdw10 = GetFeaturesCdw10::from(command.cdw10);
        // Only current values exist (ONCS has no Save and Select).
        if cdw10.sel() != 0 {
            return Err(StatusCode::INVALID_FIELD);
        }
        match FeatureId(cdw10.fid()) {
            FeatureId::NUMBER_OF_QUEUES => Ok(granted_queues(device).into()),
            FeatureId::VOLATILE_WRITE_CACHE if !device.shared.config.volatile_write_cache => {
                Err(StatusCode::INVALID_FIELD)
            }
            FeatureId::VOLATILE_WRITE_CACHE => {
                Ok(VolatileWriteCache::new().with_wce(device.has_write_cache()).into())
            }
            id => self.features.value(id),
        }
    }

    fn log_page(&mut self, command: &Command, device: &Attachment) -> Result<u32, StatusCode> {
        let cdw10 = GetLogPageCdw10::from(command.cdw10);
        let cdw11 = GetLogPageCdw11::from(command.cdw11);
        let dwords = (u64::from(cdw11.numdu()) << 16 | u64::from(cdw10.numdl_z())) + 1;
        let offset = u64::from(command.cdw13) << 32 | u64::from(command.cdw12);
        if dwords * 4 > device.shared.limits.transfer_bytes_max || !offset.is_multiple_of(4) {
            return Err(StatusCode::INVALID_FIELD);
        }
        let page = match LogPageId(cdw10.lid()) {
            LogPageId::ERROR_INFORMATION => {
                if !cdw10.rae() {
                    self.events.log_was_read();
                }
                device.error_log_page().as_bytes().to_vec()
            }
            LogPageId::SMART_HEALTH => device.smart(&self.stats).as_bytes().to_vec(),
            LogPageId::FIRMWARE_SLOT => log::firmware().as_bytes().to_vec(),
            _ => return Err(StatusCode::INVALID_LOG_PAGE),
        };
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = page.get(offset..).filter(|rest| !rest.is_empty()).ok_or(StatusCode::INVALID_FIELD)?;
        let len = usize::try_from(dwords * 4).unwrap_or(usize::MAX).min(rest.len());
        self.send(command, &rest[..len])
    }

    /// Abort (Base section 5.1.1): dword 0 is 0 when the command was ended, 1 when it wasn't.
    fn abort(&mut self, command: &Command, device: &Attachment) -> u32 {
        let cdw10 = AbortCdw10::from(command.cdw10);
        let (sqid, cid) = (cdw10.sqid(), cdw10.cid());
        let was_aborted = if sqid == 0 {
            // One completion for the event request, one for this command.
            let has_room = self.cq.free() as usize > self.delayed.len() + 1;
            let was_held = has_room && self.events.abort(cid);
            if was_held {
                let status = Status::of(StatusCode::COMMAND_ABORT_REQUESTED);
                self.post(cid, 0, status);
            }
            was_held
        } else {
            let group = self.sq_to_cq.get(&sqid).and_then(|cqid| device.group(*cqid));
            group.is_some_and(|mut group| group.as_mut().is_some_and(|group| group.abort(sqid, cid, device)))
        };
        u32::from(!was_aborted)
    }
}

fn failed(command: &Command) -> FailedCommand {
    let (opcode, cid) = (command.cdw0.opcode(), command.cdw0.cid());
    FailedCommand { sqid: 0, cid, opcode, nsid: command.nsid, lba: 0 }
}

fn granted_queues(device: &Attachment) -> NumberOfQueues {
    let granted_z = device.shared.config.queue_pairs_max - 1;
    NumberOfQueues::new().with_nsq_z(granted_z).with_ncq_z(granted_z)
}

/// The identifier and memory of a queue to be created, checked as far as both kinds have in common.
fn new_queue(command: &Command, device: &Attachment) -> Result<(u16, RingMemory), StatusCode> {
    let cdw10 = CreateQueueCdw10::from(command.cdw10);
    if !RegisterFile::has_io_entry_sizes(device.cc()) {
        return Err(StatusCode::INVALID_FIELD);
    }
    if cdw10.qid() == 0 || cdw10.qid() > device.shared.config.queue_pairs_max {
        return Err(StatusCode::INVALID_QUEUE_IDENTIFIER);
    }
    let entries = u32::from(cdw10.qsize_z()) + 1;
    if entries < 2 || entries > device.shared.config.queue_entries_max {
        return Err(StatusCode::INVALID_QUEUE_SIZE);
    }
    if prp_format::page_offset(command.prp1) != 0 {
        return Err(StatusCode::PRP_OFFSET_INVALID);
    }
    Ok((cdw10.qid(), RingMemory { iova: command.prp1, entries }))
}

fn delete_completion_queue(command: &Command, device: &Attachment) -> Result<u32, StatusCode> {
    let qid = DeleteQueueCdw10::from(command.cdw10).qid();
    let mut group = device.group(qid).ok_or(StatusCode::INVALID_QUEUE_IDENTIFIER)?;
    let Some(existing) = group.as_ref() else { return Err(StatusCode::INVALID_QUEUE_IDENTIFIER) };
    if existing.has_submission_queues() {
        return Err(StatusCode::INVALID_QUEUE_DELETION);
    }
    if let Some(mut ended) = group.take() {
        ended.end();
        device.shared.fold(&ended.stats);
    }
    Ok(0)
}
