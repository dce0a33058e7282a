//! The running controller as its handle and its queue pairs share it: registers, admin queue and DMA memory, and
//! the order in which they come and go.
//!
//! 1. `start` checks the capabilities, maps the memory, resets the controller and enables it with an admin queue.
//! 2. Queue pairs are created and deleted through the admin queue, one caller at a time.
//! 3. `shutdown`, where asked for, lets the controller bring its volatile state to the media.
//! 4. The last reference disables the controller; only then is the memory unmapped and freed. A controller that
//!    doesn't obey is cut off from memory (bus mastering); where that fails too, the memory is leaked on purpose.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foliant_nvme_spec::registers::{Cap, Cc, Csts, Shn, Shst, Vs};
use foliant_nvme_spec::{Command, Completion, PAGE_BYTES};
use foliant_nvme_transport::{Iova, Transport};

use crate::admin::{self, AdminQueue, Watch};
use crate::arena::DmaArena;
use crate::controller::Hugepages;
use crate::error::DriverError;
use crate::placement::NodePart;
use crate::region::Region;
use crate::registers::Registers;
use crate::ring::{CompletionRing, SubmissionRing};
use crate::wait::{self, Clock};

/// CAP.TO and CRTO count in this unit (Base section 3.1.4.1).
const TIMEOUT_UNIT: Duration = Duration::from_millis(500);

/// How long a shutdown may take where the controller doesn't say (RTD3E = 0).
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);

/// How much memory a controller and its driver share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MemoryPlan<'a> {
    /// The caller's arena, in bytes.
    pub(crate) data_bytes: usize,
    /// All I/O queue pairs' rings and PRP lists, in bytes.
    pub(crate) queue_bytes: usize,
    pub(crate) hugepages: Hugepages,
    /// Where parts of the arena should lie.
    pub(crate) nodes: &'a [NodePart],
}

/// See the module.
pub(crate) struct Device {
    /// Unique in the process.
    id: u64,
    transport: Arc<dyn Transport>,
    registers: Registers,
    clock: Box<dyn Clock>,
    cap: Cap,
    /// How long CSTS.RDY may take to follow CC.EN.
    ready_limit: Duration,
    admin: Mutex<AdminQueue>,
    queue_ids: Mutex<QueueIds>,
    data_arena: DmaArena,
    queue_arena: DmaArena,
    region: Arc<Region>,
    /// Memory of other devices' arenas that this one reaches, too.
    aliases: Mutex<Vec<Arc<Region>>>,
    /// The controller is being stopped, or was.
    stopping: AtomicBool,
    /// The controller can't touch memory any more.
    stopped: AtomicBool,
    /// What queue pairs left behind whose queues the controller may still know.
    buried: Mutex<Vec<Box<dyn Any + Send>>>,
}

impl Device {
    /// Resets and enables the controller behind `transport`. `plan` is asked once the largest possible queue, in
    /// entries, is known.
    pub(crate) fn start<'a>(
        transport: Arc<dyn Transport>,
        clock: Box<dyn Clock>,
        plan: impl FnOnce(u32) -> MemoryPlan<'a>,
    ) -> Result<Self, DriverError> {
        let registers = Registers::new(Arc::clone(&transport));
        let cap = registers.cap()?;
        check_capabilities(cap)?;
        let ready_limit = ready_limit(&registers, cap)?;
        // Before any memory is mapped: a controller that somebody left enabled may still use the addresses that it
        // was given, and they are given out again.
        disable(&registers, &*clock, ready_limit, transport.name())?;
        let plan = plan(queue_entries_max(cap));
        let data_bytes = plan.data_bytes.next_multiple_of(PAGE_BYTES);
        let own_bytes = plan.queue_bytes.next_multiple_of(PAGE_BYTES) + AdminQueue::memory_bytes();
        let mut nodes = plan.nodes.to_vec();
        if let Some(node) = transport.numa_node().filter(|_| !nodes.is_empty()) {
            nodes.push(NodePart { bytes: data_bytes..data_bytes + own_bytes, node });
        }
        let region = Region::new(Arc::clone(&transport), data_bytes + own_bytes, plan.hugepages, &nodes)?;
        // The driver takes what hugepages round up to, so the caller's arena is as large as it asked for.
        let (data_span, own_span) = (0..data_bytes, data_bytes..region.len_bytes());
        // SAFETY: the two spans split the region in two, on page boundaries.
        #[expect(unsafe_code, reason = "the region is divided between two arenas")]
        let (data_arena, queue_arena) = unsafe {
            (DmaArena::new(Arc::clone(&region), data_span), DmaArena::new(Arc::clone(&region), own_span))
        };
        let admin = AdminQueue::new(&queue_arena, registers.doorbells(0, cap)?)?;
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        // From here on, dropping the device stops the controller before the memory goes.
        let device = Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            transport,
            registers,
            clock,
            cap,
            ready_limit,
            admin: Mutex::new(admin),
            queue_ids: Mutex::new(QueueIds::default()),
            data_arena,
            queue_arena,
            region,
            aliases: Mutex::new(Vec::new()),
            stopping: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            buried: Mutex::new(Vec::new()),
        };
        device.enable()?;
        Ok(device)
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn transport(&self) -> &dyn Transport {
        &*self.transport
    }

    pub(crate) fn vs(&self) -> Result<Vs, DriverError> {
        self.registers.vs()
    }

    /// The most entries an I/O queue can have (CAP.MQES).
    pub(crate) fn queue_entries_max(&self) -> u32 {
        queue_entries_max(self.cap)
    }

    pub(crate) fn data_arena(&self) -> &DmaArena {
        &self.data_arena
    }

    /// Makes the memory of another device's arena reachable for this one until the controller is stopped; returns the
    /// device address of the arena's first byte.
    pub(crate) fn map_arena(&self, arena: &DmaArena) -> Result<Iova, DriverError> {
        let alias = Region::alias(Arc::clone(&self.transport), arena.region())?;
        let start = arena.iova().0 - arena.region().iova().0;
        let iova = alias.iova().offset(start);
        lock(&self.aliases).push(alias);
        Ok(iova)
    }

    pub(crate) fn queue_arena(&self) -> &DmaArena {
        &self.queue_arena
    }

    /// Whether the controller can't touch memory any more.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Looks whether the controller is there and well.
    pub(crate) fn check(&self) -> Result<(), DriverError> {
        let csts = self.registers.csts()?;
        if csts.cfs() {
            return Err(DriverError::ControllerFatal { during: "in operation" });
        }
        // Nobody but this driver disables it: it was reset behind our back, or no longer answers at all.
        if !csts.rdy() && !self.stopping.load(Ordering::Acquire) {
            return Err(DriverError::NotReady);
        }
        Ok(())
    }

    /// Whether `error` of an admin command means that only a reset helps the controller: it says so itself, or its
    /// registers do.
    pub(crate) fn is_lost(&self, error: &DriverError) -> bool {
        match error {
            DriverError::Gone | DriverError::ControllerFatal { .. } | DriverError::NotReady => true,
            DriverError::AdminQueueFailed | DriverError::Timeout { .. } => self.check().is_err(),
            _ => false,
        }
    }

    /// Whether the system wants the device back.
    pub(crate) fn is_release_requested(&self) -> bool {
        self.transport.is_release_requested()
    }

    /// Runs admin commands, with the queue to themselves.
    pub(crate) fn with_admin<T>(
        &self,
        run: impl FnOnce(&mut AdminQueue, &mut Watch<'_>) -> Result<T, DriverError>,
    ) -> Result<T, DriverError> {
        self.with_admin_pumping(&mut || (), run)
    }

    /// As [`with_admin`](Self::with_admin), and drives something else with `pump` while it waits.
    pub(crate) fn with_admin_pumping<T>(
        &self,
        pump: &mut dyn FnMut(),
        run: impl FnOnce(&mut AdminQueue, &mut Watch<'_>) -> Result<T, DriverError>,
    ) -> Result<T, DriverError> {
        let mut watch = Watch { registers: &self.registers, clock: &*self.clock, pump };
        run(&mut lock(&self.admin), &mut watch)
    }

    /// Notes how many I/O queue pairs the controller granted.
    pub(crate) fn set_granted(&self, granted: u16) {
        *lock(&self.queue_ids) = QueueIds { granted, free: (1..=granted).rev().collect(), in_use: 0 };
    }

    /// Takes a free queue pair's number.
    pub(crate) fn take_queue_id(&self) -> Result<u16, DriverError> {
        let mut ids = lock(&self.queue_ids);
        let qid = ids.free.pop().ok_or(DriverError::QueuePairsTaken { granted: ids.granted })?;
        ids.in_use += 1;
        Ok(qid)
    }

    /// Ends the use of a queue pair's number, which may be taken again if the controller has deleted the queues.
    pub(crate) fn return_queue_id(&self, qid: u16, deleted: Deleted) {
        let mut ids = lock(&self.queue_ids);
        ids.in_use -= 1;
        match deleted {
            Deleted::Yes => ids.free.push(qid),
            Deleted::No => {}
        }
    }

    /// Rings for I/O queue pair `qid`, in memory of the driver's own.
    pub(crate) fn rings(
        &self,
        qid: u16,
        entries: u16,
    ) -> Result<(SubmissionRing, CompletionRing), DriverError> {
        let doorbells = self.registers.doorbells(qid, self.cap)?;
        let submissions = SubmissionRing::new(&self.queue_arena, entries, doorbells.submission_tail)?;
        let completions = CompletionRing::new(&self.queue_arena, entries, doorbells.completion_head)?;
        Ok((submissions, completions))
    }

    /// Lets the controller bring its volatile state to the media and then disables it
    /// (Base section 3.6.1, normal shutdown). `rtd3e_us` is how long it says that takes, in microseconds, 0
    /// when it doesn't say.
    pub(crate) fn shutdown(&self, rtd3e_us: u32) -> Result<(), DriverError> {
        const DURING: &str = "to shut down";
        let count = lock(&self.queue_ids).in_use;
        if count > 0 {
            return Err(DriverError::QueuePairsInUse { count });
        }
        let limit = Duration::from_micros(rtd3e_us.into()).max(SHUTDOWN_LIMIT);
        self.stopping.store(true, Ordering::Release);
        self.registers.set_cc(self.registers.cc()?.with_shn(Shn::Normal))?;
        self.wait_for_status(DURING, limit, |csts| {
            if csts.cfs() {
                return Err(DriverError::ControllerFatal { during: "while shutting down" });
            }
            // One that was reset from outside, or isn't reached any more, never says that it has shut down.
            if !csts.rdy() && csts.shst() == Shst::Normal {
                return Err(DriverError::NotReady);
            }
            Ok(csts.shst() == Shst::Complete)
        })?;
        self.disable()?;
        self.stopped.store(true, Ordering::Release);
        Ok(())
    }

    /// Makes sure that the controller can't touch memory any more: disables it, or else cuts it off. Returns
    /// whether that's certain.
    pub(crate) fn stop(&self) -> bool {
        if self.is_stopped() {
            return true;
        }
        self.stopping.store(true, Ordering::Release);
        let name = self.transport.name();
        let stopped = match self.disable() {
            Ok(WasEnabled::Yes) => true,
            // Reset from outside, or its registers only seem to say so: what can't be reached reads zeros.
            Ok(WasEnabled::No) => self.cut_off(),
            Err(error) => {
                tracing::warn!(device = name, %error, "the controller can't be disabled; cutting it off from memory");
                self.cut_off()
            }
        };
        // Somebody else may have been surer.
        self.stopped.fetch_or(stopped, Ordering::AcqRel) || stopped
    }

    /// Keeps the device from memory by other means than its own. Returns whether that's certain.
    fn cut_off(&self) -> bool {
        let name = self.transport.name();
        let report = |error: &_| tracing::error!(device = name, %error, "the device's DMA can't be stopped");
        self.transport.stop_dma().inspect_err(report).is_ok()
    }

    /// Keeps what the device may still touch until it no longer can.
    pub(crate) fn bury(&self, held: impl Send + 'static) {
        lock(&self.buried).push(Box::new(held));
    }

    fn disable(&self) -> Result<WasEnabled, DriverError> {
        disable(&self.registers, &*self.clock, self.ready_limit, self.transport.name())
    }

    /// Enables the controller with its admin queue (Base section 3.5.1, initialisation over PCIe).
    fn enable(&self) -> Result<(), DriverError> {
        /// CC.CSS for "all supported command sets" (Base section 3.1.4.5).
        const ALL_COMMAND_SETS: u8 = 0b110;
        let mut admin = lock(&self.admin);
        self.registers.set_admin_queues(admin::ENTRIES, admin.submission_iova(), admin.completion_iova())?;
        let css = if self.cap.css().nvm() { 0 } else { ALL_COMMAND_SETS };
        let cc = Cc::new()
            .with_css(css)
            .with_iosqes(Command::SIZE_EXPONENT)
            .with_iocqes(Completion::SIZE_EXPONENT)
            .with_en(true);
        self.registers.set_cc(cc)?;
        self.wait_for_status("to become ready (CSTS.RDY = 1)", self.ready_limit, |csts| {
            if csts.cfs() {
                return Err(DriverError::ControllerFatal { during: "while becoming ready" });
            }
            Ok(csts.rdy())
        })?;
        admin.set_drive(self.transport.queue_drive(0));
        Ok(())
    }

    /// Waits until the controller's status is what `is_reached` looks for.
    fn wait_for_status(
        &self,
        during: &'static str,
        limit: Duration,
        is_reached: impl Fn(Csts) -> Result<bool, DriverError>,
    ) -> Result<(), DriverError> {
        wait_for_status(&self.registers, &*self.clock, during, limit, is_reached)
    }
}

/// Whether a controller that was to be disabled had been enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WasEnabled {
    Yes,
    No,
}

/// Clears CC.EN and waits until the controller is no longer ready (Base section 3.7.2, controller reset).
fn disable(
    registers: &Registers,
    clock: &dyn Clock,
    ready_limit: Duration,
    name: &str,
) -> Result<WasEnabled, DriverError> {
    let cc = registers.cc()?;
    if cc.en() {
        await_ready_before_disable(registers, clock, ready_limit, name)?;
        registers.set_cc(cc.with_en(false).with_shn(Shn::None))?;
    }
    wait_for_status(registers, clock, "to become disabled (CSTS.RDY = 0)", ready_limit, |csts| {
        Ok(!csts.rdy())
    })?;
    Ok(if cc.en() { WasEnabled::Yes } else { WasEnabled::No })
}

/// A controller that was enabled must have become ready before it's disabled (Base section 3.1.4.5), unless
/// it has failed. One that doesn't get there is disabled nevertheless: nothing else is left to try.
fn await_ready_before_disable(
    registers: &Registers,
    clock: &dyn Clock,
    ready_limit: Duration,
    name: &str,
) -> Result<(), DriverError> {
    let result = wait_for_status(registers, clock, "to become ready before a reset", ready_limit, |csts| {
        Ok(csts.rdy() || csts.cfs() || csts.shst() != Shst::Normal)
    });
    match result {
        Err(DriverError::Timeout { .. }) => {
            tracing::warn!(device = name, "resetting a controller that never became ready");
            Ok(())
        }
        other => other,
    }
}

/// Waits until the controller's status is what `is_reached` looks for.
fn wait_for_status(
    registers: &Registers,
    clock: &dyn Clock,
    during: &'static str,
    limit: Duration,
    is_reached: impl Fn(Csts) -> Result<bool, DriverError>,
) -> Result<(), DriverError> {
    wait::until(clock, during, limit, || Ok(is_reached(registers.csts()?)?.then_some(())))
}

impl Drop for Device {
    fn drop(&mut self) {
        if !self.stop() {
            self.region.abandon();
            lock(&self.aliases).iter().for_each(|alias| alias.abandon());
            // The memory stays; so must whoever believes to own it.
            std::mem::forget(std::mem::take(&mut *lock(&self.buried)));
        }
    }
}

/// Whether the controller has confirmed the deletion of a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deleted {
    Yes,
    No,
}

/// The numbers of the I/O queue pairs that the controller granted.
#[derive(Default)]
struct QueueIds {
    granted: u16,
    /// Highest first, so that the lowest is taken first.
    free: Vec<u16>,
    in_use: u16,
}

fn queue_entries_max(cap: Cap) -> u32 {
    u32::from(cap.mqes_z()) + 1
}

fn check_capabilities(cap: Cap) -> Result<(), DriverError> {
    let unsupported = |what: String| Err(DriverError::Unsupported { what });
    if !cap.css().nvm() && !cap.css().iocs() {
        return unsupported("it doesn't offer the NVM Command Set (CAP.CSS)".to_owned());
    }
    if cap.mpsmin() != 0 {
        return unsupported(format!(
            "its smallest memory page is {} bytes (CAP.MPSMIN); {PAGE_BYTES} are needed",
            PAGE_BYTES << cap.mpsmin()
        ));
    }
    if cap.mqes_z() == 0 {
        return unsupported("its queues have one entry (CAP.MQES); two are needed".to_owned());
    }
    Ok(())
}

/// How long CSTS.RDY may take: CAP.TO, or CRTO.CRWMT where it's there and longer (Base section 3.5.1); at least
/// one unit.
fn ready_limit(registers: &Registers, cap: Cap) -> Result<Duration, DriverError> {
    let mut units = u32::from(cap.to()).max(1);
    if cap.crms() != 0 {
        units = units.max(u32::from(registers.crto()?.crwmt()));
    }
    Ok(TIMEOUT_UNIT * units)
}

/// A panic while the lock was held leaves data that is still right: each change is made whole or not at all.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
