//! The admin queue: one command at a time, each waited for with a deadline.
//!
//! Nothing here is fast or concurrent. Data moves through one page of the queue's own, so that a command that
//! times out leaves nobody else's memory with the device; the queue is then unusable for good.

use std::time::Duration;

use foliant_nvme_spec::command::{
    Cdw0, CreateCompletionQueueCdw11, CreateQueueCdw10, CreateSubmissionQueueCdw11, DeleteQueueCdw10,
    IdentifyCdw10,
};
use foliant_nvme_spec::feature::{
    FeatureId, GetFeaturesCdw10, NumberOfQueues, SetFeaturesCdw10, VolatileWriteCache,
};
use foliant_nvme_spec::identify::{self, Cns, NamespaceList};
use foliant_nvme_spec::{AdminOpcode, Command, PAGE_BYTES};
use foliant_nvme_transport::{Iova, QueueDrive};
use zerocopy::{FromBytes, KnownLayout};

use crate::arena::{DmaArena, DmaBuffer};
use crate::error::{ArenaError, DriverError};
use crate::registers::{QueueDoorbells, Registers};
use crate::ring::{CompletionRing, Entry, SubmissionRing};
use crate::wait::{self, Clock};

/// Entries of the admin queue: one command is outstanding at a time, and two is the least a queue may have.
pub(crate) const ENTRIES: u16 = 16;

/// How long an admin command may take. The longest this driver sends, a queue's deletion, waits for that queue's
/// commands.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);

/// The admin queue pair, numbered 0.
pub(crate) struct AdminQueue {
    submissions: SubmissionRing,
    completions: CompletionRing,
    page: DmaBuffer,
    drive: Option<Box<dyn QueueDrive>>,
    next_cid: u16,
    failed: bool,
}

/// What an admin command is waited for with.
pub(crate) struct Watch<'a> {
    pub(crate) registers: &'a Registers,
    pub(crate) clock: &'a dyn Clock,
    /// Drives what else the device needs to make progress, such as an I/O queue that is being deleted.
    pub(crate) pump: &'a mut dyn FnMut(),
}

impl AdminQueue {
    pub(crate) fn new(arena: &DmaArena, doorbells: QueueDoorbells) -> Result<Self, ArenaError> {
        Ok(Self {
            submissions: SubmissionRing::new(arena, ENTRIES, doorbells.submission_tail)?,
            completions: CompletionRing::new(arena, ENTRIES, doorbells.completion_head)?,
            page: arena.allocate(PAGE_BYTES)?,
            drive: None,
            next_cid: 0,
            failed: false,
        })
    }

    /// Memory that the queue takes from its arena, in bytes.
    pub(crate) const fn memory_bytes() -> usize {
        3 * PAGE_BYTES
    }

    pub(crate) fn submission_iova(&self) -> Iova {
        self.submissions.iova()
    }

    pub(crate) fn completion_iova(&self) -> Iova {
        self.completions.iova()
    }

    /// Takes what drives the queue of an emulated device, once the controller is enabled.
    pub(crate) fn set_drive(&mut self, drive: Option<Box<dyn QueueDrive>>) {
        self.drive = drive;
    }

    /// Identify Controller (Base section 5.1.13.2.1).
    pub(crate) fn identify_controller(
        &mut self,
        watch: &mut Watch<'_>,
    ) -> Result<Box<identify::Controller>, DriverError> {
        self.identify(watch, Cns::CONTROLLER, 0)
    }

    /// Identify Namespace of the NVM Command Set (NVM section 4.1.5.1).
    pub(crate) fn identify_namespace(
        &mut self,
        watch: &mut Watch<'_>,
        nsid: u32,
    ) -> Result<Box<identify::Namespace>, DriverError> {
        self.identify(watch, Cns::NAMESPACE, nsid)
    }

    /// The active namespaces with an identifier greater than `after` (Base section 5.1.13.2.2).
    pub(crate) fn active_namespaces(
        &mut self,
        watch: &mut Watch<'_>,
        after: u32,
    ) -> Result<Box<NamespaceList>, DriverError> {
        self.identify(watch, Cns::ACTIVE_NAMESPACES, after)
    }

    /// Asks for `pairs` I/O queue pairs; returns how many were granted, which may be more
    /// (Base section 5.1.25.2.1).
    pub(crate) fn set_number_of_queues(
        &mut self,
        watch: &mut Watch<'_>,
        pairs: u16,
    ) -> Result<u32, DriverError> {
        let wanted = NumberOfQueues::new().with_nsq_z(pairs - 1).with_ncq_z(pairs - 1);
        let command = Command {
            cdw10: SetFeaturesCdw10::new().with_fid(FeatureId::NUMBER_OF_QUEUES.0).into(),
            cdw11: wanted.into(),
            ..Command::default()
        };
        let granted = NumberOfQueues::from(self.execute(watch, AdminOpcode::SET_FEATURES, command)?);
        Ok(u32::from(granted.nsq_z().min(granted.ncq_z())) + 1)
    }

    /// Whether the volatile write cache is enabled (Base section 5.1.25.1.4).
    pub(crate) fn is_write_cache_enabled(&mut self, watch: &mut Watch<'_>) -> Result<bool, DriverError> {
        let command = Command {
            cdw10: GetFeaturesCdw10::new().with_fid(FeatureId::VOLATILE_WRITE_CACHE.0).into(),
            ..Command::default()
        };
        let value = self.execute(watch, AdminOpcode::GET_FEATURES, command)?;
        Ok(VolatileWriteCache::from(value).wce())
    }

    /// Creates I/O completion queue `qid`, with interrupts if there is a `vector` for them (Base section 5.2.1).
    pub(crate) fn create_completion_queue(
        &mut self,
        watch: &mut Watch<'_>,
        qid: u16,
        entries: u16,
        iova: Iova,
        vector: Option<u16>,
    ) -> Result<(), DriverError> {
        let command = Command {
            prp1: iova.0,
            cdw10: CreateQueueCdw10::new().with_qid(qid).with_qsize_z(entries - 1).into(),
            cdw11: CreateCompletionQueueCdw11::new()
                .with_pc(true)
                .with_ien(vector.is_some())
                .with_iv(vector.unwrap_or(0))
                .into(),
            ..Command::default()
        };
        self.execute(watch, AdminOpcode::CREATE_IO_COMPLETION_QUEUE, command).map(drop)
    }

    /// Creates I/O submission queue `qid`, which completes into completion queue `qid` (Base section 5.2.2).
    pub(crate) fn create_submission_queue(
        &mut self,
        watch: &mut Watch<'_>,
        qid: u16,
        entries: u16,
        iova: Iova,
    ) -> Result<(), DriverError> {
        let command = Command {
            prp1: iova.0,
            cdw10: CreateQueueCdw10::new().with_qid(qid).with_qsize_z(entries - 1).into(),
            cdw11: CreateSubmissionQueueCdw11::new().with_pc(true).with_cqid(qid).into(),
            ..Command::default()
        };
        self.execute(watch, AdminOpcode::CREATE_IO_SUBMISSION_QUEUE, command).map(drop)
    }

    /// Deletes I/O submission queue `qid`; its commands have completed or been aborted after that
    /// (Base section 5.2.4).
    pub(crate) fn delete_submission_queue(
        &mut self,
        watch: &mut Watch<'_>,
        qid: u16,
    ) -> Result<(), DriverError> {
        self.delete_queue(watch, AdminOpcode::DELETE_IO_SUBMISSION_QUEUE, qid)
    }

    /// Deletes I/O completion queue `qid`, which has no submission queue any more (Base section 5.2.3).
    pub(crate) fn delete_completion_queue(
        &mut self,
        watch: &mut Watch<'_>,
        qid: u16,
    ) -> Result<(), DriverError> {
        self.delete_queue(watch, AdminOpcode::DELETE_IO_COMPLETION_QUEUE, qid)
    }

    fn delete_queue(
        &mut self,
        watch: &mut Watch<'_>,
        opcode: AdminOpcode,
        qid: u16,
    ) -> Result<(), DriverError> {
        let command = Command { cdw10: DeleteQueueCdw10::new().with_qid(qid).into(), ..Command::default() };
        self.execute(watch, opcode, command).map(drop)
    }

    fn identify<T: FromBytes + KnownLayout>(
        &mut self,
        watch: &mut Watch<'_>,
        cns: Cns,
        nsid: u32,
    ) -> Result<Box<T>, DriverError> {
        const { assert!(size_of::<T>() == PAGE_BYTES, "Identify returns one page") };
        // A command that timed out may still write to the page.
        if self.failed {
            return Err(DriverError::AdminQueueFailed);
        }
        // What a device doesn't write must not look like an earlier answer.
        self.page.as_mut_slice().fill(0);
        let command = Command {
            nsid,
            prp1: self.page.iova().0,
            cdw10: IdentifyCdw10::new().with_cns(cns).into(),
            ..Command::default()
        };
        self.execute(watch, AdminOpcode::IDENTIFY, command)?;
        // The command has completed, so the device no longer writes to the page.
        T::read_from_bytes(self.page.as_slice())
            .map(Box::new)
            .map_err(|_| DriverError::DeviceFault { what: format!("unreadable Identify data, CNS {cns}") })
    }

    /// Sends a command and waits for its completion; returns dword 0 of it.
    fn execute(
        &mut self,
        watch: &mut Watch<'_>,
        opcode: AdminOpcode,
        mut command: Command,
    ) -> Result<u32, DriverError> {
        if self.failed {
            return Err(DriverError::AdminQueueFailed);
        }
        let cid = self.next_cid;
        self.next_cid = (cid + 1) & 0x7FFF;
        command.cdw0 = Cdw0::new().with_opcode(opcode.0).with_cid(cid);
        self.submissions.write(0, command);
        self.submissions.commit(1);
        self.submissions.ring();
        // Until the completion has been seen and found right, the page may be the device's.
        self.failed = true;
        let entry = self.wait(watch)?;
        self.completions.advance();
        self.completions.ring();
        if entry.dw3.cid() != cid || entry.dw2.sqid() != 0 {
            let (sqid, found) = (entry.dw2.sqid(), entry.dw3.cid());
            return Err(DriverError::DeviceFault {
                what: format!(
                    "{opcode} is command {cid:#x} of queue 0, but command {found:#x} of queue {sqid} completed"
                ),
            });
        }
        self.failed = false;
        match entry.dw3.status() {
            status if status.is_success() => Ok(entry.dw0),
            status => Err(DriverError::Command { opcode, status }),
        }
    }

    fn wait(&mut self, watch: &mut Watch<'_>) -> Result<Entry, DriverError> {
        const DURING: &str = "to complete an admin command";
        let Self { completions, drive, .. } = self;
        wait::until(watch.clock, DURING, COMMAND_LIMIT, || {
            if let Some(drive) = drive {
                drive.pump();
            }
            (watch.pump)();
            if let Some(entry) = completions.peek() {
                return Ok(Some(entry));
            }
            let csts = watch.registers.csts()?;
            if csts.cfs() {
                return Err(DriverError::ControllerFatal { during: "while completing an admin command" });
            }
            if !csts.rdy() {
                return Err(DriverError::NotReady);
            }
            Ok(None)
        })
    }
}
