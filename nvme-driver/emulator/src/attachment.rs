//! One attachment of a driver to the controller, from power-on to power-off: registers, DMA mappings, queues.
//!
//! # Who runs this code
//! Register writes act in the thread that makes them; commands run in the thread that pumps their queue. Queues
//! don't meet but on the medium and on the slow paths below.
//!
//! # Lock order
//! | order | lock | held for |
//! |---|---|---|
//! | 1 | `registers` | a register write and what it sets in motion |
//! | 2 | `admin` | a pump of the admin queue |
//! | 3 | `groups[n]`, ascending | a pump of that queue |
//! | 4 | `dma`, `error_log`, and those of the device and the medium | moments; none of them with another |
//!
//! # Invariants
//! 1. A group is pumped only while `is_running` was true after its lock was taken; whoever clears `is_running` and
//!    then takes each group's lock once knows that nothing runs any more.
//! 2. Memory is touched only through mappings of the current generation. Unmapping changes the table, moves the
//!    generation, and then takes each queue's lock and waits for its calls in the kernel.

#![expect(unsafe_code, reason = "implements the transport's unsafe trait over memory the driver vouches for")]

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use foliant_nvme_spec::Status;
use foliant_nvme_spec::log::{ErrorInformation, SmartHealth};
use foliant_nvme_spec::registers::{ALL_ONES_U32, ALL_ONES_U64, Cc, Csts, DOORBELL_BASE, Shn, Shst};
use foliant_nvme_transport::{DmaMemory, Doorbells, Iova, Pumped, QueueDrive, Transport, TransportError};

use crate::admin::AdminController;
use crate::backing::{Durability, MediaError};
use crate::controller::Shared;
use crate::dma::{DmaTable, DmaView};
use crate::log::{self, ErrorLog, FailedCommand};
use crate::queue::QueueGroup;
use crate::registers::{RegisterFile, Written};
use crate::ring::{CompletionRing, DoorbellRegion, InvalidDoorbell, SubmissionRing};
use crate::stats::EmulatedStats;
use crate::sync::lock;

/// A queue's lock on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct GroupSlot(Mutex<Option<Box<QueueGroup>>>);

/// The state of one attachment.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) shared: Arc<Shared>,
    pub(crate) doorbells: Arc<DoorbellRegion>,
    /// Enabled, not shut down, not failed, not gone: queues may be pumped.
    is_running: AtomicBool,
    /// The volatile write cache is on (feature 06h).
    has_write_cache: AtomicBool,
    /// Power was cut: registers read all ones.
    is_gone: AtomicBool,
    /// A doorbell was written an invalid value since the admin queue last looked.
    has_invalid_doorbell: AtomicBool,
    cc: AtomicU32,
    csts: AtomicU32,
    registers: Mutex<RegisterFile>,
    admin: Mutex<Option<Box<AdminController>>>,
    /// By completion queue identifier less one.
    groups: Box<[GroupSlot]>,
    dma: Mutex<DmaTable>,
    error_log: Mutex<ErrorLog>,
}

impl Attachment {
    pub(crate) fn new(shared: Arc<Shared>) -> std::io::Result<Self> {
        let queue_pairs = shared.config.queue_pairs_max;
        Ok(Self {
            doorbells: Arc::new(DoorbellRegion::new(queue_pairs)?),
            is_running: AtomicBool::new(false),
            has_write_cache: AtomicBool::new(shared.config.volatile_write_cache),
            is_gone: AtomicBool::new(false),
            has_invalid_doorbell: AtomicBool::new(false),
            cc: AtomicU32::new(0),
            csts: AtomicU32::new(0),
            registers: Mutex::new(RegisterFile::new(&shared.config)),
            admin: Mutex::new(None),
            groups: (0..queue_pairs).map(|_| GroupSlot::default()).collect(),
            dma: Mutex::new(DmaTable::new()),
            error_log: Mutex::default(),
            shared,
        })
    }

    /// CC as last written.
    pub(crate) fn cc(&self) -> Cc {
        self.cc.load(Ordering::Acquire).into()
    }

    fn csts(&self) -> Csts {
        self.csts.load(Ordering::Acquire).into()
    }

    fn set_csts(&self, csts: Csts) {
        self.csts.store(csts.into(), Ordering::Release);
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Acquire)
    }

    /// The group of a completion queue, locked; `None` when its identifier is 0 or out of range.
    pub(crate) fn group(&self, cqid: u16) -> Option<MutexGuard<'_, Option<Box<QueueGroup>>>> {
        let slot = self.groups.get(usize::from(cqid).checked_sub(1)?)?;
        Some(lock(&slot.0))
    }

    pub(crate) fn has_io_queues(&self) -> bool {
        self.groups.iter().any(|slot| lock(&slot.0).is_some())
    }

    pub(crate) fn dma_snapshot(&self) -> DmaView {
        lock(&self.dma).snapshot()
    }

    /// When cached writes become durable.
    #[inline]
    pub(crate) fn cache_durability(&self) -> Durability {
        if self.has_write_cache() { Durability::Cached } else { Durability::AtCompletion }
    }

    #[inline]
    pub(crate) fn has_write_cache(&self) -> bool {
        self.has_write_cache.load(Ordering::Relaxed)
    }

    /// Switches the volatile write cache; what it holds is made durable when it goes off.
    pub(crate) fn set_write_cache(&self, is_on: bool) -> Result<(), MediaError> {
        self.has_write_cache.store(is_on, Ordering::Relaxed);
        if is_on { Ok(()) } else { self.shared.medium.sync() }
    }

    /// Notes a failed command. Returns its status with More set.
    pub(crate) fn log_error(&self, failed: &FailedCommand, status: Status) -> Status {
        lock(&self.error_log).push(failed, status)
    }

    pub(crate) fn error_log_page(&self) -> Vec<ErrorInformation> {
        lock(&self.error_log).page()
    }

    /// The SMART log; `admin` are the counters of the admin queue, whose lock the caller holds.
    pub(crate) fn smart(&self, admin: &EmulatedStats) -> SmartHealth {
        let mut stats = self.shared.totals();
        stats.add(admin);
        self.add_group_stats(&mut stats);
        let (power_cycles, power_losses) = self.shared.power_history();
        log::smart(&stats, lock(&self.error_log).count(), power_cycles, power_losses)
    }

    fn add_group_stats(&self, stats: &mut EmulatedStats) {
        for slot in &self.groups {
            if let Some(group) = lock(&slot.0).as_ref() {
                stats.add(&group.stats);
            }
        }
    }

    /// Adds the counters of every live queue.
    pub(crate) fn add_stats(&self, stats: &mut EmulatedStats) {
        if let Some(admin) = lock(&self.admin).as_ref() {
            stats.add(&admin.stats);
        }
        self.add_group_stats(stats);
    }

    pub(crate) fn doorbell_invalid(&self, invalid: InvalidDoorbell) {
        let InvalidDoorbell { qid, value } = invalid;
        tracing::debug!(qid, value, "invalid doorbell value ignored");
        self.has_invalid_doorbell.store(true, Ordering::Relaxed);
    }

    pub(crate) fn take_invalid_doorbell(&self) -> bool {
        self.has_invalid_doorbell.load(Ordering::Relaxed)
            && self.has_invalid_doorbell.swap(false, Ordering::Relaxed)
    }

    /// Fails the controller: CSTS.CFS, until a reset.
    pub(crate) fn fail(&self, reason: &'static str) {
        tracing::warn!(device = %self.shared.name, reason, "controller fatal status");
        self.is_running.store(false, Ordering::Release);
        self.set_csts(self.csts().with_cfs(true));
    }

    fn register_write(&self, offset: u32, values: &[u32]) {
        let mut registers = lock(&self.registers);
        for (offset, value) in (offset..).step_by(4).zip(values) {
            if offset >= DOORBELL_BASE {
                if let Some(register) = self.doorbells.register(offset - DOORBELL_BASE) {
                    register.store(*value, Ordering::Release);
                }
            } else if let Written::Configured { before } = registers.write(offset, *value) {
                self.configure(&registers, before);
            }
        }
    }

    /// CC was written: enables, resets, shuts down.
    fn configure(&self, registers: &RegisterFile, before: Cc) {
        let cc = registers.cc;
        self.cc.store(cc.into(), Ordering::Release);
        match (before.en(), cc.en()) {
            (false, true) => self.enable(registers),
            (true, false) => self.reset(),
            _ => {}
        }
        let asks_for_shutdown = matches!(cc.shn(), Shn::Normal | Shn::Abrupt) && before.shn() != cc.shn();
        if asks_for_shutdown {
            self.shut_down();
        }
    }

    fn enable(&self, registers: &RegisterFile) {
        let (sq, cq) = match registers.admin_queues() {
            Ok(queues) => queues,
            Err(reason) => return self.fail(reason),
        };
        let mut dma = self.dma_snapshot();
        let sq = SubmissionRing::new(0, sq, &mut dma, &self.doorbells);
        let cq = CompletionRing::new(0, cq, &mut dma, &self.doorbells);
        let (Some(sq), Some(cq)) = (sq, cq) else {
            return self.fail("ASQ or ACQ isn't mapped for DMA");
        };
        *lock(&self.admin) = Some(Box::new(AdminController::new(sq, cq)));
        self.shared.note_running();
        self.is_running.store(true, Ordering::Release);
        self.set_csts(Csts::new().with_rdy(true));
    }

    /// A controller level reset (Base section 3.7.2): queues and features are gone, queue registers stay.
    fn reset(&self) {
        self.end_queues();
        self.has_write_cache.store(self.shared.config.volatile_write_cache, Ordering::Relaxed);
        self.set_csts(Csts::new());
    }

    /// Ends every queue. No command is carried out, no completion posted and no memory touched afterwards.
    fn end_queues(&self) {
        self.is_running.store(false, Ordering::Release);
        if let Some(admin) = lock(&self.admin).take() {
            self.shared.fold(&admin.stats);
        }
        for slot in &self.groups {
            if let Some(mut group) = lock(&slot.0).take() {
                group.end();
                self.shared.fold(&group.stats);
            }
        }
    }

    /// Shutdown (Base section 3.6.1): finishes what the kernel has, and makes everything durable.
    fn shut_down(&self) {
        self.is_running.store(false, Ordering::Release);
        self.quiesce();
        match self.shared.medium.sync() {
            Ok(()) => {
                self.shared.note_clean_shutdown();
                self.set_csts(self.csts().with_shst(Shst::Complete));
            }
            Err(_) => {
                self.set_csts(self.csts().with_shst(Shst::Occurring));
                self.fail("the medium could not be made durable for a shutdown");
            }
        }
    }

    /// Waits until no queue is being pumped and the kernel has none of their calls.
    fn quiesce(&self) {
        drop(lock(&self.admin));
        for slot in &self.groups {
            if let Some(group) = lock(&slot.0).as_mut() {
                group.quiesce(self);
            }
        }
    }

    /// Ends the attachment because power was cut. `before_end` runs while nothing is pumped, and commands in
    /// flight still are.
    pub(crate) fn cut_power<T>(&self, before_end: impl FnOnce() -> T) -> T {
        self.is_gone.store(true, Ordering::Release);
        self.is_running.store(false, Ordering::Release);
        self.quiesce();
        let result = before_end();
        self.end_queues();
        result
    }

    fn pump(&self, qid: u16) -> Pumped {
        if qid == 0 {
            let mut admin = lock(&self.admin);
            return match admin.as_mut() {
                Some(admin) if self.is_running.load(Ordering::Acquire) => admin.pump(self),
                _ => Pumped::default(),
            };
        }
        match self.group(qid).as_deref_mut() {
            Some(Some(group)) if self.is_running.load(Ordering::Acquire) => group.pump(self),
            _ => Pumped::default(),
        }
    }

    fn region_len_bytes(&self) -> u32 {
        DOORBELL_BASE + self.doorbells.len_bytes()
    }

    fn check_register(&self, offset: u32, len_bytes: u32) -> Result<(), TransportError> {
        let region = self.region_len_bytes();
        let is_inside = offset.checked_add(len_bytes).is_some_and(|end| end <= region);
        if is_inside && offset.is_multiple_of(len_bytes) {
            Ok(())
        } else {
            Err(TransportError::RegisterOutOfRange { offset, len_bytes: region })
        }
    }

    fn register_read(&self, offset: u32) -> u32 {
        // What a doorbell reads is vendor specific (PCIe section 3.1.2).
        if offset >= DOORBELL_BASE { 0 } else { lock(&self.registers).read(offset, self.csts()) }
    }
}

/// The transport that a driver holds. Dropping it ends the attachment.
#[derive(Debug)]
pub(crate) struct EmulatedTransport {
    pub(crate) attachment: Arc<Attachment>,
}

impl Drop for EmulatedTransport {
    fn drop(&mut self) {
        self.attachment.end_queues();
    }
}

// SAFETY: the doorbell region lives in the attachment, which the transport holds; the device reaches memory through
// `DmaTable` only, and both ways of taking memory back wait as invariant 2 of this module says.
unsafe impl Transport for EmulatedTransport {
    fn name(&self) -> &str {
        &self.attachment.shared.name
    }

    fn read_u32(&self, offset: u32) -> Result<u32, TransportError> {
        self.attachment.check_register(offset, 4)?;
        if self.attachment.is_gone() {
            return Ok(ALL_ONES_U32);
        }
        Ok(self.attachment.register_read(offset))
    }

    fn read_u64(&self, offset: u32) -> Result<u64, TransportError> {
        self.attachment.check_register(offset, 8)?;
        if self.attachment.is_gone() {
            return Ok(ALL_ONES_U64);
        }
        let (low, high) = (self.attachment.register_read(offset), self.attachment.register_read(offset + 4));
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    fn write_u32(&self, offset: u32, value: u32) -> Result<(), TransportError> {
        self.attachment.check_register(offset, 4)?;
        if !self.attachment.is_gone() {
            self.attachment.register_write(offset, &[value]);
        }
        Ok(())
    }

    fn write_u64(&self, offset: u32, value: u64) -> Result<(), TransportError> {
        self.attachment.check_register(offset, 8)?;
        if !self.attachment.is_gone() {
            self.attachment.register_write(offset, &[value as u32, (value >> 32) as u32]);
        }
        Ok(())
    }

    fn doorbells(&self) -> Doorbells {
        self.attachment.doorbells.doorbells()
    }

    unsafe fn map_dma(&self, memory: DmaMemory) -> Result<Iova, TransportError> {
        if self.attachment.is_gone() {
            return Err(TransportError::Gone);
        }
        let iova = lock(&self.attachment.dma).map(memory)?;
        self.attachment.shared.advance_generation();
        Ok(iova)
    }

    fn unmap_dma(&self, iova: Iova, len_bytes: usize) -> Result<(), TransportError> {
        lock(&self.attachment.dma).unmap(iova, len_bytes)?;
        self.attachment.shared.advance_generation();
        self.attachment.quiesce();
        Ok(())
    }

    fn stop_dma(&self) -> Result<(), TransportError> {
        // Without bus mastering the queues can't be reached either, so the device stands still.
        self.attachment.is_running.store(false, Ordering::Release);
        lock(&self.attachment.dma).stop();
        self.attachment.shared.advance_generation();
        self.attachment.quiesce();
        Ok(())
    }

    fn queue_drive(&self, qid: u16) -> Option<Box<dyn QueueDrive>> {
        if qid > self.attachment.shared.config.queue_pairs_max {
            return None;
        }
        Some(Box::new(Drive { attachment: Arc::clone(&self.attachment), qid }))
    }
}

/// Drives one completion queue and the submission queues bound to it; 0 is the admin queue pair.
#[derive(Debug)]
struct Drive {
    attachment: Arc<Attachment>,
    qid: u16,
}

impl QueueDrive for Drive {
    fn pump(&mut self) -> Pumped {
        self.attachment.pump(self.qid)
    }

    fn wakeup_fd(&self) -> Option<RawFd> {
        self.attachment.group(self.qid)?.as_ref()?.wakeup_fd()
    }
}
