//! A driver played by hand: it writes submission entries into mapped memory, rings doorbells and reads completions.
//!
//! Every wait is bounded; background work is waited for on the wakeup descriptor, never by sleeping.

#![expect(unsafe_code, reason = "plays a driver, which shares memory with the device")]

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use foliant_nvme_spec::command::{
    Cdw0, CreateCompletionQueueCdw11, CreateQueueCdw10, CreateSubmissionQueueCdw11, ReadWriteCdw12,
};
use foliant_nvme_spec::completion::{CompletionDw2, CompletionDw3};
use foliant_nvme_spec::registers::{
    Aqa, Cap, Cc, Csts, Register, completion_head_doorbell, submission_tail_doorbell,
};
use foliant_nvme_spec::{AdminOpcode, Command, Completion, NvmOpcode, Status, StatusCode};
use foliant_nvme_transport::{DmaMemory, Doorbells, Pumped, QueueDrive, Transport};
use memmap2::MmapRaw;
use zerocopy::IntoBytes;

use crate::{EmulatedConfig, EmulatedController};

pub(crate) const PAGE: usize = 4096;
/// Memory of the host that is mapped for the device.
const MEMORY_BYTES: usize = 24 << 20;
/// Where data starts; queues lie before it.
pub(crate) const DATA: usize = 8 << 20;
/// Pumps before a command counts as lost.
const PUMPS_MAX: u32 = 10_000;

pub(crate) struct Host {
    pub(crate) controller: Arc<EmulatedController>,
    pub(crate) transport: Arc<dyn Transport>,
    memory: Arc<MmapRaw>,
    pub(crate) iova: u64,
    next_queue_page: usize,
    admin: Queue,
    pub(crate) queue: Queue,
}

/// The host's end of a queue pair.
pub(crate) struct Queue {
    pub(crate) qid: u16,
    entries: u32,
    sq: NonNull<Command>,
    cq: NonNull<u32>,
    sq_tail: u32,
    cq_head: u32,
    phase: bool,
    doorbells: Doorbells,
    dstrd: u8,
    next_cid: u16,
    pub(crate) drive: Box<dyn QueueDrive>,
    _memory: Arc<MmapRaw>,
}

impl Queue {
    fn doorbell(&self, offset: u32) -> &AtomicU32 {
        // SAFETY: the host keeps the transport, whose doorbells these are, for as long as its queues.
        unsafe { self.doorbells.register(offset).unwrap().as_ref() }
    }

    pub(crate) fn tail_doorbell(&self) -> &AtomicU32 {
        self.doorbell(submission_tail_doorbell(self.qid, self.dstrd))
    }

    pub(crate) fn head_doorbell(&self) -> &AtomicU32 {
        self.doorbell(completion_head_doorbell(self.qid, self.dstrd))
    }

    /// Writes an entry, with a command identifier of its own, without ringing.
    #[inline]
    pub(crate) fn submit(&mut self, mut command: Command) -> u16 {
        let cid = self.next_cid;
        self.next_cid = (self.next_cid + 1) % 30_000;
        command.cdw0.set_cid(cid);
        // SAFETY: the tail is below the number of entries of this ring.
        unsafe { self.sq.add(self.sq_tail as usize).write_volatile(command) };
        self.sq_tail = (self.sq_tail + 1) % self.entries;
        cid
    }

    #[inline]
    pub(crate) fn ring(&self) {
        self.tail_doorbell().store(self.sq_tail, Ordering::Release);
    }

    /// The next completion without telling the device that it was taken.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<Completion> {
        // SAFETY: the head is below the number of entries of this ring, of four dwords each.
        let completion = unsafe {
            let entry = self.cq.add(self.cq_head as usize * 4);
            let dw3 = CompletionDw3::from(AtomicU32::from_ptr(entry.add(3).as_ptr()).load(Ordering::Acquire));
            if dw3.p() != self.phase {
                return None;
            }
            Completion {
                dw0: entry.read(),
                dw1: entry.add(1).read(),
                dw2: CompletionDw2::from(entry.add(2).read()),
                dw3,
            }
        };
        self.cq_head += 1;
        if self.cq_head == self.entries {
            self.cq_head = 0;
            self.phase = !self.phase;
        }
        Some(completion)
    }

    #[inline]
    pub(crate) fn give_back(&self) {
        self.head_doorbell().store(self.cq_head, Ordering::Release);
    }

    pub(crate) fn pump(&mut self) -> Pumped {
        self.drive.pump()
    }

    /// Pumps until the next completion, waiting for background work where there is some.
    pub(crate) fn wait(&mut self) -> Completion {
        for _ in 0..PUMPS_MAX {
            if let Some(completion) = self.take() {
                self.give_back();
                return completion;
            }
            let pumped = self.pump();
            if pumped.posted == 0
                && pumped.in_flight > 0
                && let Some(fd) = self.drive.wakeup_fd()
            {
                // SAFETY: the queue owns the descriptor and isn't deleted meanwhile.
                let fd = unsafe { BorrowedFd::borrow_raw(fd) };
                let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
                let limit = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
                match rustix::event::poll(&mut fds, Some(&limit)) {
                    Ok(0) => panic!("queue {} has had nothing to say for ten seconds", self.qid),
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(errno) => panic!("poll: {errno}"),
                }
            }
        }
        panic!("no completion on queue {} after {PUMPS_MAX} pumps", self.qid);
    }

    /// Carries one command out and returns its completion.
    pub(crate) fn run(&mut self, command: Command) -> Completion {
        let cid = self.submit(command);
        self.ring();
        let completion = self.wait();
        assert_eq!(completion.dw3.cid(), cid);
        completion
    }
}

impl Host {
    /// A new controller, enabled, with I/O queue pair 1 of 64 entries.
    pub(crate) fn boot(config: EmulatedConfig) -> Self {
        Self::attach(EmulatedController::new(config).unwrap())
    }

    pub(crate) fn uri(uri: &str) -> Self {
        Self::boot(EmulatedConfig::parse_uri(uri).unwrap())
    }

    /// Attaches to a controller, enables it, and creates I/O queue pair 1 of 64 entries.
    pub(crate) fn attach(controller: Arc<EmulatedController>) -> Self {
        let mut host = Self::attach_disabled(controller);
        host.enable();
        host.queue = host.create_queue_pair(1, 64);
        host
    }

    /// Attaches with the admin queues written, but not enabled.
    pub(crate) fn attach_disabled(controller: Arc<EmulatedController>) -> Self {
        let transport = controller.attach().unwrap();
        let memory: Arc<MmapRaw> = Arc::new(memmap2::MmapMut::map_anon(MEMORY_BYTES).unwrap().into());
        let base = NonNull::new(memory.as_mut_ptr()).unwrap();
        // SAFETY: the memory outlives the transport's use of it: both live in the host, whose drop unmaps first.
        let iova = unsafe { transport.map_dma(DmaMemory { base, len_bytes: MEMORY_BYTES }) }.unwrap().0;
        let queue = |qid| Self::queue_ends(&*transport, &memory, qid, 0, 64);
        let (admin, queue) = (queue(0), queue(1));
        let mut host = Self { controller, transport, memory, iova, next_queue_page: 4, admin, queue };
        let aqa = Aqa::new().with_asqs_z(63).with_acqs_z(63);
        host.write_u32(Register::Aqa, aqa.into());
        host.transport.write_u64(Register::Asq.offset(), iova).unwrap();
        host.transport.write_u64(Register::Acq.offset(), iova + 2 * PAGE as u64).unwrap();
        host.admin = Self::queue_ends(&*host.transport, &host.memory, 0, 0, 64);
        host
    }

    /// The host's end of a queue whose submission entries start at `page` and whose completions follow two pages on
    /// (or as far as the entries ask).
    fn queue_ends(
        transport: &dyn Transport,
        memory: &Arc<MmapRaw>,
        qid: u16,
        page: usize,
        entries: u32,
    ) -> Queue {
        let sq_offset = page * PAGE;
        let cq_offset = sq_offset + cq_distance(entries);
        let at = |offset: usize| NonNull::new(memory.as_mut_ptr().wrapping_byte_add(offset)).unwrap();
        // SAFETY: zeroing memory that no queue uses yet.
        unsafe { at(cq_offset).write_bytes(0, entries as usize * 16) };
        let cap = Cap::from(transport.read_u64(Register::Cap.offset()).unwrap());
        Queue {
            qid,
            entries,
            sq: at(sq_offset).cast(),
            cq: at(cq_offset).cast(),
            sq_tail: 0,
            cq_head: 0,
            phase: true,
            doorbells: transport.doorbells(),
            dstrd: cap.dstrd(),
            next_cid: 100,
            drive: transport.queue_drive(qid).unwrap(),
            _memory: Arc::clone(memory),
        }
    }

    pub(crate) fn enable(&mut self) {
        let cc = Cc::new().with_en(true).with_iosqes(6).with_iocqes(4);
        self.write_u32(Register::Cc, cc.into());
        assert!(self.csts().rdy(), "{:?}", self.csts());
        self.admin = Self::queue_ends(&*self.transport, &self.memory, 0, 0, 64);
    }

    pub(crate) fn write_u32(&self, register: Register, value: u32) {
        self.transport.write_u32(register.offset(), value).unwrap();
    }

    pub(crate) fn csts(&self) -> Csts {
        self.transport.read_u32(Register::Csts.offset()).unwrap().into()
    }

    /// Creates completion queue and submission queue `qid`.
    pub(crate) fn create_queue_pair(&mut self, qid: u16, entries: u32) -> Queue {
        let page = self.next_queue_page;
        self.next_queue_page +=
            (cq_distance(entries) + (entries as usize * 16).next_multiple_of(PAGE)) / PAGE;
        let at = self.iova + (page * PAGE) as u64;
        assert_eq!(self.admin(create_cq(qid, entries, at + cq_distance(entries) as u64)), Ok(0));
        assert_eq!(self.admin(create_sq(qid, entries, at, qid)), Ok(0));
        Self::queue_ends(&*self.transport, &self.memory, qid, page, entries)
    }

    pub(crate) fn admin_queue(&mut self) -> &mut Queue {
        &mut self.admin
    }

    /// Carries an admin command out: dword 0, or the status code it failed with.
    pub(crate) fn admin(&mut self, command: Command) -> Result<u32, StatusCode> {
        let completion = self.admin.run(command);
        let status = completion.dw3.status();
        if status.is_success() { Ok(completion.dw0) } else { Err(status.code()) }
    }

    /// Carries an I/O command out on queue 1.
    pub(crate) fn io(&mut self, command: Command) -> Status {
        self.queue.run(command).dw3.status()
    }

    /// Carries an I/O command out on queue 1 and returns the code it completed with.
    pub(crate) fn code(&mut self, command: Command) -> StatusCode {
        self.io(command).code()
    }

    /// Writes blocks from `data` through the page-aligned data area.
    pub(crate) fn write(&mut self, slba: u64, data: &[u8], block: usize) -> StatusCode {
        self.fill(DATA, data);
        let command = self.transfer(NvmOpcode::WRITE, slba, data.len() / block, DATA, data.len());
        self.code(command)
    }

    /// Reads blocks through the page-aligned data area.
    pub(crate) fn read(&mut self, slba: u64, len: usize, block: usize) -> Result<Vec<u8>, StatusCode> {
        let command = self.transfer(NvmOpcode::READ, slba, len / block, DATA, len);
        match self.code(command) {
            StatusCode::SUCCESS => Ok(self.bytes(DATA, len)),
            code => Err(code),
        }
    }

    /// A Read or Write of namespace 1 with PRPs for `len` bytes at `offset` of the host's memory. A list, where one
    /// is needed, is built in the pages before the data area.
    pub(crate) fn transfer(
        &self,
        opcode: NvmOpcode,
        slba: u64,
        blocks: usize,
        offset: usize,
        len: usize,
    ) -> Command {
        let first = (PAGE - offset % PAGE).min(len);
        let pages: Vec<u64> =
            (offset + first..offset + len).step_by(PAGE).map(|page| self.iova + page as u64).collect();
        let mut command = io_command(opcode, slba, blocks);
        command.prp1 = self.iova + offset as u64;
        command.prp2 = match pages.as_slice() {
            [] => 0,
            [page] => *page,
            pages => {
                let list = DATA - 64 * PAGE;
                let chained = chain(pages, self.iova + list as u64);
                self.fill(list, chained.as_bytes());
                self.iova + list as u64
            }
        };
        command
    }

    pub(crate) fn host_address(&self, offset: usize) -> *const u8 {
        self.memory.as_ptr().wrapping_byte_add(offset)
    }

    pub(crate) fn fill(&self, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= MEMORY_BYTES);
        // SAFETY: inside the host's memory, and no command names it while the test writes.
        unsafe {
            self.memory.as_mut_ptr().byte_add(offset).copy_from_nonoverlapping(data.as_ptr(), data.len());
        }
    }

    pub(crate) fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= MEMORY_BYTES);
        let mut data = vec![0; len];
        // SAFETY: as in `fill`.
        unsafe { self.memory.as_ptr().byte_add(offset).copy_to_nonoverlapping(data.as_mut_ptr(), len) };
        data
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // A gone transport has no mappings to take back.
        let _ = self.transport.unmap_dma(foliant_nvme_transport::Iova(self.iova), MEMORY_BYTES);
    }
}

/// Splits page addresses over list pages that start at `list`, chained at each last slot.
fn chain(pages: &[u64], list: u64) -> Vec<u64> {
    let slots = PAGE / 8;
    let mut entries = Vec::new();
    let mut rest = pages;
    while rest.len() > slots {
        let (here, after) = rest.split_at(slots - 1);
        entries.extend_from_slice(here);
        entries.push(list + (entries.len() as u64 + 1) * 8);
        rest = after;
    }
    entries.extend_from_slice(rest);
    entries
}

fn cq_distance(entries: u32) -> usize {
    (entries as usize * 64).next_multiple_of(PAGE).max(2 * PAGE)
}

/// A command of namespace 1 without data pointer.
pub(crate) fn io_command(opcode: NvmOpcode, slba: u64, blocks: usize) -> Command {
    let mut command = Command { cdw0: Cdw0::new().with_opcode(opcode.0), nsid: 1, ..Command::default() };
    command.set_slba(slba);
    let nlb_z = u16::try_from(blocks.saturating_sub(1)).unwrap();
    command.cdw12 = ReadWriteCdw12::new().with_nlb_z(nlb_z).into();
    command
}

pub(crate) fn flush() -> Command {
    Command { cdw0: Cdw0::new().with_opcode(NvmOpcode::FLUSH.0), nsid: 1, ..Command::default() }
}

pub(crate) fn admin_command(opcode: AdminOpcode) -> Command {
    Command { cdw0: Cdw0::new().with_opcode(opcode.0), ..Command::default() }
}

pub(crate) fn create_cq(qid: u16, entries: u32, iova: u64) -> Command {
    Command {
        prp1: iova,
        cdw10: CreateQueueCdw10::new().with_qid(qid).with_qsize_z((entries - 1) as u16).into(),
        cdw11: CreateCompletionQueueCdw11::new().with_pc(true).into(),
        ..admin_command(AdminOpcode::CREATE_IO_COMPLETION_QUEUE)
    }
}

pub(crate) fn create_sq(qid: u16, entries: u32, iova: u64, cqid: u16) -> Command {
    Command {
        prp1: iova,
        cdw10: CreateQueueCdw10::new().with_qid(qid).with_qsize_z((entries - 1) as u16).into(),
        cdw11: CreateSubmissionQueueCdw11::new().with_pc(true).with_cqid(cqid).into(),
        ..admin_command(AdminOpcode::CREATE_IO_SUBMISSION_QUEUE)
    }
}
