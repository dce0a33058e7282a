//! A fake device for this crate's tests: just enough registers and admin commands to be opened, and I/O queues
//! whose completions the test posts by hand, right or wrong.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foliant_nvme_spec::command::{CreateQueueCdw10, DeleteQueueCdw10, IdentifyCdw10};
use foliant_nvme_spec::completion::{CompletionDw2, CompletionDw3};
use foliant_nvme_spec::feature::NumberOfQueues;
use foliant_nvme_spec::identify::{self, Cns, LbaFormat, NamespaceList, Oncs};
use foliant_nvme_spec::registers::{Aqa, Cap, CapCss, Cc, Csts, Register, Shn, Shst, Vs};
use foliant_nvme_spec::{AdminOpcode, Command, Completion, Status, StatusCode};
use foliant_nvme_transport::{DmaMemory, Doorbells, Iova, Pumped, QueueDrive, Transport, TransportError};
use zerocopy::{FromZeros, IntoBytes};

use crate::wait::Clock;

/// A clock that advances by a millisecond at each rest, and sleeps never.
#[derive(Default)]
pub(crate) struct FakeClock {
    now_ms: AtomicU64,
}

impl Clock for FakeClock {
    fn now(&self) -> Duration {
        Duration::from_millis(self.now_ms.load(Ordering::Relaxed))
    }

    fn rest(&self, _looks: u32) {
        self.now_ms.fetch_add(1, Ordering::Relaxed);
    }
}

/// How the device's registers behave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Health {
    #[default]
    Well,
    /// CSTS.RDY never becomes 1.
    NeverReady,
    /// CSTS.RDY never becomes 0 again.
    NeverStops,
    /// CSTS.SHST never says complete.
    NeverShutsDown,
    /// CSTS.CFS is set as soon as the controller is enabled.
    Fatal,
    /// Every register reads all ones.
    Gone,
    /// Every register reads zero, and writes vanish.
    CutOff,
}

/// What the admin queue does wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum AdminFault {
    #[default]
    None,
    /// Commands of this opcode are never completed.
    Silent(AdminOpcode),
    /// Commands of this opcode complete under another's identifier.
    WrongCid(AdminOpcode),
    /// Commands of this opcode fail.
    Refused(AdminOpcode, StatusCode),
    /// Identify of this kind fails.
    IdentifyRefused(Cns, StatusCode),
    /// Identify of this kind returns bytes without sense, made from the number.
    IdentifyNonsense(Cns, u64),
}

pub(crate) struct FakeState {
    pub(crate) health: Health,
    pub(crate) admin_fault: AdminFault,
    pub(crate) mdts: u8,
    pub(crate) noiob: u16,
    pub(crate) queue_pairs: u16,
    pub(crate) oncs: Oncs,
    pub(crate) fails_stop_dma: bool,
    /// How often its DMA was to be stopped by other means than its own.
    pub(crate) cuts_dma: u32,
    /// What CAP reads, unless it is the fake's own.
    pub(crate) cap: Option<u64>,
    pub(crate) cc: Cc,
    /// Mappings made and not taken back.
    pub(crate) mappings: BTreeMap<u64, (usize, usize)>,
    /// Whether the controller was enabled when memory was mapped.
    pub(crate) mapped_while_enabled: bool,
    /// Whether it was enabled when its memory was unmapped.
    pub(crate) unmapped_while_enabled: bool,
    /// Admin commands seen.
    pub(crate) admin_opcodes: Vec<AdminOpcode>,
    aqa: Aqa,
    queues: BTreeMap<u16, FakeQueue>,
}

#[derive(Clone, Copy, Default)]
struct FakeQueue {
    sq: u64,
    cq: u64,
    entries: u16,
    head: u16,
    cq_tail: u16,
    is_odd_pass: bool,
}

/// The fake transport; clones share the device.
#[derive(Clone)]
pub(crate) struct FakeTransport {
    state: Arc<Mutex<FakeState>>,
    doorbells: Arc<[AtomicU32; 64]>,
}

impl FakeTransport {
    pub(crate) fn new() -> Self {
        let state = FakeState {
            health: Health::Well,
            admin_fault: AdminFault::None,
            mdts: 0,
            noiob: 0,
            queue_pairs: 2,
            oncs: Oncs::new().with_dataset_management(true).with_write_zeroes(true),
            fails_stop_dma: false,
            cuts_dma: 0,
            cap: None,
            cc: Cc::new(),
            mappings: BTreeMap::new(),
            mapped_while_enabled: false,
            unmapped_while_enabled: false,
            admin_opcodes: Vec::new(),
            aqa: Aqa::new(),
            queues: BTreeMap::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            doorbells: Arc::new(std::array::from_fn(|_| AtomicU32::new(0))),
        }
    }

    pub(crate) fn healthy() -> Arc<Self> {
        Arc::new(Self::new())
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, FakeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The commands of submission queue `qid` that its doorbell covers and that weren't fetched before.
    pub(crate) fn fetch(&self, qid: u16) -> Vec<Command> {
        let mut state = self.state();
        let tail = self.doorbells[usize::from(2 * qid)].load(Ordering::Acquire) as u16;
        let Some(mut queue) = state.queues.get(&qid).copied() else { return Vec::new() };
        let mut commands = Vec::new();
        while queue.head != tail {
            let at = state.host(queue.sq + u64::from(queue.head) * 64).cast::<Command>();
            // SAFETY: `host` found the address in mapped memory, and the driver wrote a whole entry there.
            #[expect(unsafe_code, reason = "a fake device reads its submission queue")]
            commands.push(unsafe { at.read_volatile() });
            queue.head = (queue.head + 1) % queue.entries;
        }
        state.queues.insert(qid, queue);
        commands
    }

    /// Completes the command `cid` of queue pair `qid`.
    pub(crate) fn complete(&self, qid: u16, cid: u16, status: Status) {
        let head = self.state().queues[&qid].head;
        self.post(qid, cid, CompletionDw2::new().with_sqid(qid).with_sqhd(head), status, 0);
    }

    /// Posts a completion entry, right or wrong.
    pub(crate) fn post(&self, qid: u16, cid: u16, dw2: CompletionDw2, status: Status, dw0: u32) {
        let mut state = self.state();
        let mut queue = state.queues[&qid];
        let dw3 = CompletionDw3::new().with_cid(cid).with_status(status).with_p(!queue.is_odd_pass);
        let at = state.host(queue.cq + u64::from(queue.cq_tail) * Completion::BYTES as u64);
        // SAFETY: `host` found the address in mapped memory; the phase tag is written last, as a device does.
        #[expect(unsafe_code, reason = "a fake device writes its completion queue")]
        unsafe {
            at.cast::<u32>().write_volatile(dw0);
            at.add(Completion::DW2_OFFSET).cast::<u32>().write_volatile(dw2.into());
            at.add(Completion::DW3_OFFSET).cast::<AtomicU32>().as_ref().store(dw3.into(), Ordering::Release);
        }
        queue.cq_tail += 1;
        if queue.cq_tail == queue.entries {
            queue.cq_tail = 0;
            queue.is_odd_pass = !queue.is_odd_pass;
        }
        state.queues.insert(qid, queue);
    }

    /// The 64-bit words at a device address.
    pub(crate) fn words(&self, iova: u64, count: usize) -> Vec<u64> {
        let at = self.state().host(iova).cast::<u64>();
        // SAFETY: `host` found the address in mapped memory; tests ask for words within one page.
        #[expect(unsafe_code, reason = "a fake device reads host memory")]
        (0..count).map(|index| unsafe { at.add(index).read_volatile() }).collect()
    }

    /// The value of a tail (`2 * qid`) or head (`2 * qid + 1`) doorbell.
    pub(crate) fn doorbell(&self, index: u16) -> u32 {
        self.doorbells[usize::from(index)].load(Ordering::Acquire)
    }

    fn run_admin(&self) {
        if self.state().health == Health::Gone {
            return;
        }
        for command in self.fetch(0) {
            let opcode = AdminOpcode(command.cdw0.opcode());
            let cid = command.cdw0.cid();
            let fault = self.state().admin_fault;
            self.state().admin_opcodes.push(opcode);
            let (cid, status, dw0) = match fault {
                AdminFault::Silent(silent) if silent == opcode => continue,
                AdminFault::WrongCid(wrong) if wrong == opcode => (cid ^ 1, Status::SUCCESS, 0),
                AdminFault::Refused(refused, code) if refused == opcode => (cid, Status::of(code), 0),
                AdminFault::IdentifyRefused(cns, code)
                    if opcode == AdminOpcode::IDENTIFY && IdentifyCdw10::from(command.cdw10).cns() == cns =>
                {
                    (cid, Status::of(code), 0)
                }
                _ => (cid, Status::SUCCESS, self.state().execute(opcode, &command)),
            };
            let head = self.state().queues[&0].head;
            self.post(0, cid, CompletionDw2::new().with_sqhd(head), status, dw0);
        }
    }
}

impl FakeState {
    /// Where a device address lies in this process.
    fn host(&self, iova: u64) -> NonNull<u8> {
        let (&start, &(base, len)) = self.mappings.range(..=iova).next_back().expect("the address is mapped");
        assert!(iova - start < len as u64, "the address is mapped");
        NonNull::new(std::ptr::with_exposed_provenance_mut(base + (iova - start) as usize)).expect("not null")
    }

    /// Carries an admin command out; returns dword 0 of its completion.
    fn execute(&mut self, opcode: AdminOpcode, command: &Command) -> u32 {
        let create = CreateQueueCdw10::from(command.cdw10);
        let qid = DeleteQueueCdw10::from(command.cdw10).qid();
        match opcode {
            AdminOpcode::IDENTIFY => {
                let page = self.identify(command);
                let at = self.host(command.prp1);
                // SAFETY: `host` found the address in mapped memory; the driver's page is 4 KiB long.
                #[expect(unsafe_code, reason = "a fake device writes host memory")]
                unsafe {
                    at.copy_from_nonoverlapping(NonNull::from(&page[..]).cast(), page.len());
                }
            }
            AdminOpcode::SET_FEATURES => {
                let granted = self.queue_pairs - 1;
                return NumberOfQueues::new().with_nsq_z(granted).with_ncq_z(granted).into();
            }
            AdminOpcode::CREATE_IO_COMPLETION_QUEUE => {
                let entries = create.qsize_z() + 1;
                self.queues
                    .insert(create.qid(), FakeQueue { cq: command.prp1, entries, ..FakeQueue::default() });
            }
            AdminOpcode::CREATE_IO_SUBMISSION_QUEUE => {
                self.queues.get_mut(&create.qid()).expect("the completion queue comes first").sq =
                    command.prp1;
            }
            AdminOpcode::DELETE_IO_COMPLETION_QUEUE => {
                self.queues.remove(&qid);
            }
            _ => {}
        }
        0
    }

    fn identify(&self, command: &Command) -> Vec<u8> {
        let cns = IdentifyCdw10::from(command.cdw10).cns();
        if let AdminFault::IdentifyNonsense(broken, seed) = self.admin_fault
            && broken == cns
        {
            let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
            let mut next = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state as u8
            };
            return (0..4096).map(|_| next()).collect();
        }
        match cns {
            Cns::CONTROLLER => {
                let mut controller = identify::Controller::new_zeroed();
                controller.sn = *b"F4KE                ";
                controller.mdts = self.mdts;
                controller.oncs = self.oncs;
                controller.as_bytes().to_vec()
            }
            Cns::ACTIVE_NAMESPACES => {
                let mut list = NamespaceList::new_zeroed();
                list.nsid[0] = 1;
                list.as_bytes().to_vec()
            }
            _ => {
                let mut namespace = identify::Namespace::new_zeroed();
                namespace.nsze = 1 << 20;
                namespace.noiob = self.noiob;
                namespace.lbaf[0] = LbaFormat::new().with_lbads(9);
                namespace.as_bytes().to_vec()
            }
        }
    }

    fn csts(&self) -> Csts {
        let ready = match self.health {
            Health::NeverReady => false,
            Health::NeverStops => true,
            _ => self.cc.en(),
        };
        let is_shut_down = self.cc.shn() != Shn::None && self.health != Health::NeverShutsDown;
        Csts::new()
            .with_rdy(ready)
            .with_cfs(self.health == Health::Fatal && self.cc.en())
            .with_shst(if is_shut_down { Shst::Complete } else { Shst::Normal })
    }
}

// SAFETY: the doorbells are owned by the transport; the fake touches mapped memory only while it's mapped.
#[expect(unsafe_code, reason = "the fake device of the driver's tests")]
unsafe impl Transport for FakeTransport {
    fn name(&self) -> &str {
        "fake"
    }

    fn read_u32(&self, offset: u32) -> Result<u32, TransportError> {
        let state = self.state();
        if state.health == Health::Gone {
            return Ok(u32::MAX);
        }
        if state.health == Health::CutOff {
            return Ok(0);
        }
        Ok(match offset {
            o if o == Register::Vs.offset() => Vs::new().with_mjr(1).with_mnr(4).into(),
            o if o == Register::Cc.offset() => state.cc.into(),
            o if o == Register::Csts.offset() => state.csts().into(),
            _ => 0,
        })
    }

    fn read_u64(&self, _offset: u32) -> Result<u64, TransportError> {
        let state = self.state();
        if state.health == Health::Gone {
            return Ok(u64::MAX);
        }
        if let Some(cap) = state.cap {
            return Ok(cap);
        }
        Ok(Cap::new().with_mqes_z(1023).with_to(2).with_css(CapCss::new().with_nvm(true)).into())
    }

    fn write_u32(&self, offset: u32, value: u32) -> Result<(), TransportError> {
        let mut state = self.state();
        if state.health == Health::CutOff {
            return Ok(());
        }
        if offset == Register::Cc.offset() {
            state.cc = Cc::from(value);
            if !state.cc.en() {
                state.queues.clear();
                self.doorbells.iter().for_each(|doorbell| doorbell.store(0, Ordering::Relaxed));
            }
        } else if offset == Register::Aqa.offset() {
            state.aqa = Aqa::from(value);
        }
        Ok(())
    }

    fn write_u64(&self, offset: u32, value: u64) -> Result<(), TransportError> {
        let mut state = self.state();
        let entries = state.aqa.asqs_z() + 1;
        let queue = state.queues.entry(0).or_default();
        queue.entries = entries;
        if offset == Register::Asq.offset() {
            queue.sq = value;
        } else if offset == Register::Acq.offset() {
            queue.cq = value;
        }
        Ok(())
    }

    fn doorbells(&self) -> Doorbells {
        // SAFETY: the array is atomics only and lives as long as the transport.
        unsafe { Doorbells::new(NonNull::from(&self.doorbells[0]), 64 * 4) }
    }

    unsafe fn map_dma(&self, memory: DmaMemory) -> Result<Iova, TransportError> {
        const FIRST_IOVA: u64 = 0x10_0000_0000;
        let base = memory.base.as_ptr().expose_provenance();
        let mut state = self.state();
        state.mapped_while_enabled |= state.cc.en();
        state.mappings.insert(FIRST_IOVA, (base, memory.len_bytes));
        Ok(Iova(FIRST_IOVA))
    }

    fn unmap_dma(&self, iova: Iova, _len_bytes: usize) -> Result<(), TransportError> {
        let mut state = self.state();
        state.mappings.remove(&iova.0);
        state.unmapped_while_enabled = state.cc.en();
        Ok(())
    }

    fn stop_dma(&self) -> Result<(), TransportError> {
        self.state().cuts_dma += 1;
        if self.state().fails_stop_dma { Err(TransportError::Gone) } else { Ok(()) }
    }

    fn queue_drive(&self, qid: u16) -> Option<Box<dyn QueueDrive>> {
        (qid == 0).then(|| Box::new(FakeAdmin(self.clone())) as Box<dyn QueueDrive>)
    }
}

/// Carries admin commands out when pumped.
struct FakeAdmin(FakeTransport);

impl QueueDrive for FakeAdmin {
    fn pump(&mut self) -> Pumped {
        self.0.run_admin();
        Pumped::default()
    }

    fn wakeup_fd(&self) -> Option<std::os::fd::RawFd> {
        None
    }
}
