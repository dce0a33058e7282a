//! A controller without the driver: the few steps that bring one up, and commands of any kind. The cases send with
//! it what the driver never sends, and see what the device says.
//!
//! It is slow and simple on purpose, and shares nothing with the driver but the wire format: one command at a time,
//! and one piece of memory.

#![expect(unsafe_code, reason = "memory that a device writes, and doorbells")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use foliant_nvme::{Iova, Status, Transport};
use foliant_nvme_spec::command::{
    Cdw0, CreateCompletionQueueCdw11, CreateQueueCdw10, CreateSubmissionQueueCdw11, DeleteQueueCdw10,
    IdentifyCdw10, ReadWriteCdw12,
};
use foliant_nvme_spec::identify::{self, Cns};
use foliant_nvme_spec::registers::{
    Aqa, Cap, Cc, Csts, Register, Shn, completion_head_doorbell, submission_tail_doorbell,
};
use foliant_nvme_spec::{AdminOpcode, Command, Completion, NvmOpcode, PAGE_BYTES};
use foliant_nvme_transport::{DmaMemory, QueueDrive};
use zerocopy::{FromBytes, KnownLayout};

use super::host::LIMIT;

/// Entries of each queue here; a page holds as many commands.
pub(super) const ENTRIES: u16 = (PAGE_BYTES / Command::BYTES) as u16;

/// Pages of the memory, by what they are for. Queue pair 0 is the admin queue pair, and one I/O queue pair follows.
const fn submission_page(qid: u16) -> usize {
    2 * qid as usize
}
const fn completion_page(qid: u16) -> usize {
    2 * qid as usize + 1
}
const DATA_PAGE: usize = 4;
/// Pages for data: a transfer of any length points at them.
pub(super) const DATA_PAGES: usize = 4;
const PAGES: usize = DATA_PAGE + DATA_PAGES;

/// A controller that was brought up by hand, and is disabled when dropped.
pub(super) struct RawHost {
    memory: Memory,
    admin: RawQueue,
    cap: Cap,
}

impl RawHost {
    /// Resets the controller and enables it with an admin queue.
    pub(super) fn open(transport: Arc<dyn Transport>) -> Self {
        let cap = Cap::from(transport.read_u64(Register::Cap.offset()).expect("CAP reads"));
        let memory = Memory::new(transport);
        assert!(memory.disable(), "the controller cannot be disabled");
        let transport = &*memory.transport;
        let aqa = Aqa::new().with_asqs_z(ENTRIES - 1).with_acqs_z(ENTRIES - 1);
        transport.write_u32(Register::Aqa.offset(), aqa.into()).expect("AQA takes a value");
        transport
            .write_u64(Register::Asq.offset(), memory.page(submission_page(0)))
            .expect("ASQ takes a value");
        transport
            .write_u64(Register::Acq.offset(), memory.page(completion_page(0)))
            .expect("ACQ takes a value");
        let cc = Cc::new()
            .with_iosqes(Command::SIZE_EXPONENT)
            .with_iocqes(Completion::SIZE_EXPONENT)
            .with_en(true);
        transport.write_u32(Register::Cc.offset(), cc.into()).expect("CC takes a value");
        assert!(memory.becomes_ready(true), "the controller does not get ready, CSTS {:?}", memory.csts());
        let admin = RawQueue::new(&memory, cap, 0);
        Self { memory, admin, cap }
    }

    /// Controller Capabilities.
    pub(super) fn cap(&self) -> Cap {
        self.cap
    }

    /// A 32-bit register.
    pub(super) fn register(&self, register: Register) -> u32 {
        self.memory.transport.read_u32(register.offset()).expect("the register reads")
    }

    /// The device address of a page for data.
    pub(super) fn data_iova(&self, page: usize) -> u64 {
        assert!(page < DATA_PAGES);
        self.memory.page(DATA_PAGE + page)
    }

    /// The first page for data.
    pub(super) fn data(&self) -> Vec<u8> {
        let words = self.memory.words(DATA_PAGE);
        words.iter().flat_map(|word| word.load(Ordering::Acquire).to_le_bytes()).collect()
    }

    /// Carries out an admin command: dword 0 of its completion, or the status it failed with.
    pub(super) fn admin(&mut self, opcode: AdminOpcode, command: Command) -> Result<u32, Status> {
        self.admin.submit(&self.memory, opcode.0, command);
        let completion = self.admin.wait(&self.memory);
        let status = completion.dw3.status();
        if status.is_success() { Ok(completion.dw0) } else { Err(status) }
    }

    /// Submits an admin command that may never complete; returns its identifier.
    pub(super) fn admin_begin(&mut self, opcode: AdminOpcode, command: Command) -> u16 {
        self.admin.submit(&self.memory, opcode.0, command)
    }

    /// The next admin completion.
    pub(super) fn admin_next(&mut self) -> Completion {
        self.admin.wait(&self.memory)
    }

    /// Identify, into the first page for data.
    pub(super) fn identify<T: FromBytes + KnownLayout>(
        &mut self,
        cns: Cns,
        nsid: u32,
    ) -> Result<Box<T>, Status> {
        // What the device leaves out must not look like an earlier answer.
        self.memory.words(DATA_PAGE).iter().for_each(|word| word.store(0, Ordering::Relaxed));
        let cdw10 = IdentifyCdw10::new().with_cns(cns).into();
        let command = Command { nsid, prp1: self.data_iova(0), cdw10, ..Command::EMPTY };
        self.admin(AdminOpcode::IDENTIFY, command)?;
        Ok(Box::new(T::read_from_bytes(&self.data()).expect("Identify returns one page")))
    }

    /// Identify Controller.
    pub(super) fn identify_controller(&mut self) -> Box<identify::Controller> {
        self.identify(Cns::CONTROLLER, 0).expect("Identify Controller succeeds")
    }

    /// Identify Namespace.
    pub(super) fn identify_namespace(&mut self, nsid: u32) -> Box<identify::Namespace> {
        self.identify(Cns::NAMESPACE, nsid).expect("Identify Namespace succeeds")
    }

    /// Create I/O Completion Queue for queue pair 1, as `change` has it.
    pub(super) fn create_completion_queue(
        &mut self,
        change: impl FnOnce(&mut Command),
    ) -> Result<u32, Status> {
        let cdw11 = CreateCompletionQueueCdw11::new().with_pc(true).into();
        let mut command = self.queue_command(completion_page(1), cdw11);
        change(&mut command);
        self.admin(AdminOpcode::CREATE_IO_COMPLETION_QUEUE, command)
    }

    /// Create I/O Submission Queue for queue pair 1, as `change` has it.
    pub(super) fn create_submission_queue(
        &mut self,
        change: impl FnOnce(&mut Command),
    ) -> Result<u32, Status> {
        let cdw11 = CreateSubmissionQueueCdw11::new().with_pc(true).with_cqid(1).into();
        let mut command = self.queue_command(submission_page(1), cdw11);
        change(&mut command);
        self.admin(AdminOpcode::CREATE_IO_SUBMISSION_QUEUE, command)
    }

    fn queue_command(&self, page: usize, cdw11: u32) -> Command {
        let cdw10 = CreateQueueCdw10::new().with_qid(1).with_qsize_z(ENTRIES - 1).into();
        Command { prp1: self.memory.page(page), cdw10, cdw11, ..Command::EMPTY }
    }

    /// Deletes a queue of either kind.
    pub(super) fn delete_queue(&mut self, opcode: AdminOpcode, qid: u16) -> Result<u32, Status> {
        let cdw10 = DeleteQueueCdw10::new().with_qid(qid).into();
        self.admin(opcode, Command { cdw10, ..Command::EMPTY })
    }

    /// Creates queue pair 1.
    pub(super) fn queue_pair(&mut self) -> RawQueue {
        self.create_completion_queue(|_| ()).expect("the completion queue is created");
        self.create_submission_queue(|_| ()).expect("the submission queue is created");
        RawQueue::new(&self.memory, self.cap, 1)
    }

    /// Carries out an I/O command.
    pub(super) fn io(&mut self, queue: &mut RawQueue, opcode: NvmOpcode, command: Command) -> Status {
        queue.submit(&self.memory, opcode.0, command);
        queue.wait(&self.memory).dw3.status()
    }

    /// A command for blocks of `nsid` with the first data pages, whatever it transfers.
    pub(super) fn blocks(&self, nsid: u32, slba: u64, blocks_z: u16) -> Command {
        let cdw12 = ReadWriteCdw12::new().with_nlb_z(blocks_z).into();
        let (prp1, prp2) = (self.data_iova(0), self.data_iova(1));
        let mut command = Command { nsid, prp1, prp2, cdw12, ..Command::EMPTY };
        command.set_slba(slba);
        command
    }
}

/// The host's ends of one queue pair.
pub(super) struct RawQueue {
    qid: u16,
    tail: u16,
    head: u16,
    phase: bool,
    next_cid: u16,
    tail_doorbell: NonNull<AtomicU32>,
    head_doorbell: NonNull<AtomicU32>,
    drive: Option<Box<dyn QueueDrive>>,
}

impl RawQueue {
    fn new(memory: &Memory, cap: Cap, qid: u16) -> Self {
        // A queue that was there before has left completions with a phase of its own.
        memory.words(completion_page(qid)).iter().for_each(|word| word.store(0, Ordering::Relaxed));
        let doorbells = memory.transport.doorbells();
        let register = |offset| doorbells.register(offset).expect("the doorbell is mapped");
        Self {
            qid,
            tail: 0,
            head: 0,
            phase: true,
            next_cid: 0x100,
            tail_doorbell: register(submission_tail_doorbell(qid, cap.dstrd())),
            head_doorbell: register(completion_head_doorbell(qid, cap.dstrd())),
            drive: memory.transport.queue_drive(qid),
        }
    }

    fn submit(&mut self, memory: &Memory, opcode: u8, mut command: Command) -> u16 {
        let cid = self.next_cid;
        self.next_cid += 1;
        command.cdw0 = Cdw0::new().with_opcode(opcode).with_cid(cid);
        let words: [u32; Command::BYTES / 4] = zerocopy::transmute!(command);
        let slot = usize::from(self.tail) * words.len();
        for (place, word) in memory.words(submission_page(self.qid))[slot..].iter().zip(words) {
            place.store(word, Ordering::Relaxed);
        }
        self.tail = (self.tail + 1) % ENTRIES;
        // SAFETY: the transport that mapped the doorbells is alive: `memory` holds it.
        unsafe { self.tail_doorbell.as_ref() }.store(self.tail.into(), Ordering::Release);
        cid
    }

    fn wait(&mut self, memory: &Memory) -> Completion {
        let start = Instant::now();
        loop {
            if let Some(drive) = &mut self.drive {
                drive.pump();
            }
            if let Some(completion) = self.take(memory) {
                return completion;
            }
            assert!(start.elapsed() < LIMIT, "queue {} completes nothing in {LIMIT:?}", self.qid);
        }
    }

    fn take(&mut self, memory: &Memory) -> Option<Completion> {
        let slot = usize::from(self.head) * (Completion::BYTES / 4);
        let words = &memory.words(completion_page(self.qid))[slot..];
        // Dword 3 first: the device writes it last.
        let dw3 = words[3].load(Ordering::Acquire);
        let [dw0, dw1, dw2] = [0, 1, 2].map(|at: usize| words[at].load(Ordering::Relaxed));
        let completion: Completion = zerocopy::transmute!([dw0, dw1, dw2, dw3]);
        if completion.dw3.p() != self.phase {
            return None;
        }
        self.head = (self.head + 1) % ENTRIES;
        self.phase ^= self.head == 0;
        // SAFETY: as in `submit`.
        unsafe { self.head_doorbell.as_ref() }.store(self.head.into(), Ordering::Release);
        Some(completion)
    }
}

/// One piece of memory that the device reaches, and the transport that made it so.
struct Memory {
    base: NonNull<AtomicU32>,
    iova: Iova,
    transport: Arc<dyn Transport>,
}

impl Memory {
    const LAYOUT: Layout = match Layout::from_size_align(PAGES * PAGE_BYTES, PAGE_BYTES) {
        Ok(layout) => layout,
        Err(_) => panic!("whole pages are a layout"),
    };

    fn new(transport: Arc<dyn Transport>) -> Self {
        // SAFETY: the layout isn't empty.
        let base = unsafe { alloc_zeroed(Self::LAYOUT) };
        let Some(base) = NonNull::new(base) else { handle_alloc_error(Self::LAYOUT) };
        let memory = DmaMemory { base, len_bytes: Self::LAYOUT.size() };
        // SAFETY: the memory is freed in `drop` only, after the mapping was taken back, and is accessed through
        // atomics.
        let iova = unsafe { transport.map_dma(memory) }.expect("memory can be mapped for the device");
        Self { base: base.cast(), iova, transport }
    }

    fn page(&self, page: usize) -> u64 {
        self.iova.offset((page * PAGE_BYTES) as u64).0
    }

    fn words(&self, page: usize) -> &[AtomicU32] {
        assert!(page < PAGES, "page {page} of {PAGES}");
        const WORDS: usize = PAGE_BYTES / 4;
        // SAFETY: the page lies within the allocation, which lives as long as `self`; it was zeroed, and the device
        // writes whole words of it at most.
        unsafe { std::slice::from_raw_parts(self.base.add(page * WORDS).as_ptr(), WORDS) }
    }

    fn csts(&self) -> Option<Csts> {
        self.transport.read_u32(Register::Csts.offset()).ok().map(Csts::from)
    }

    /// Waits for CSTS.RDY; `false` when it doesn't come, or the controller has failed.
    fn becomes_ready(&self, wanted: bool) -> bool {
        let start = Instant::now();
        while let Some(csts) = self.csts() {
            if csts.rdy() == wanted {
                return true;
            }
            if (wanted && csts.cfs()) || start.elapsed() > LIMIT {
                return false;
            }
            std::thread::yield_now();
        }
        false
    }

    /// Clears CC.EN; `false` when the controller doesn't confirm it.
    fn disable(&self) -> bool {
        let Ok(cc) = self.transport.read_u32(Register::Cc.offset()).map(Cc::from) else { return false };
        let is_told = !cc.en()
            || self
                .transport
                .write_u32(Register::Cc.offset(), cc.with_en(false).with_shn(Shn::None).into())
                .is_ok();
        is_told && self.becomes_ready(false)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A device that may still write to the memory keeps it.
        if self.disable() && self.transport.unmap_dma(self.iova, Self::LAYOUT.size()).is_ok() {
            // SAFETY: allocated in `new` with this layout; the device is disabled and no longer reaches it.
            unsafe { dealloc(self.base.as_ptr().cast(), Self::LAYOUT) };
        }
    }
}
