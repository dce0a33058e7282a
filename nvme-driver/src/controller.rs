//! Opening a controller, learning what it is, and handing out its queue pairs.

use std::fmt;
use std::sync::Arc;

use foliant_nvme_spec::identify::NamespaceList;
use foliant_nvme_spec::registers::QUEUE_ENTRIES_MIN;
use foliant_nvme_spec::{Command, Completion, PAGE_BYTES, StatusCode};
use foliant_nvme_transport::{Iova, Transport};

use crate::arena::DmaArena;
use crate::device::{Device, MemoryPlan};
use crate::error::DriverError;
use crate::identity::ControllerIdentity;
use crate::namespace::Namespace;
use crate::payload::Payload;
use crate::placement::NodePart;
use crate::queue::{QueuePair, QueueShape};
use crate::slots::SLOTS_MAX;
use crate::wait::{Clock, MonotonicClock};

/// Whether DMA memory should come from hugepages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hugepages {
    /// Hugepages where enough are free, else ordinary pages and one warning a process.
    #[default]
    Prefer,
    /// Ordinary pages.
    Never,
    /// Hugepages or an error.
    Require,
}

/// What to ask a controller for, and how much memory to share with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControllerOptions {
    /// I/O queue pairs wanted, at least 1; the controller may grant fewer.
    pub io_queue_pairs: u16,
    /// Entries of each I/O queue wanted, 2 to 4,096; bounded by what the controller supports (CAP.MQES). A queue
    /// pair holds one command less.
    pub io_queue_entries: u16,
    /// Size of the arena for the caller's data, in bytes, on top of what the driver needs itself.
    pub arena_bytes: usize,
    /// The largest transfer of one command in bytes, a multiple of 4,096, on top of the controller's own limit.
    pub max_transfer_bytes: u32,
    /// Whether DMA memory should come from hugepages.
    pub hugepages: Hugepages,
}

impl Default for ControllerOptions {
    fn default() -> Self {
        Self {
            io_queue_pairs: 4,
            io_queue_entries: 256,
            arena_bytes: 64 << 20,
            max_transfer_bytes: 1 << 20,
            hugepages: Hugepages::Prefer,
        }
    }
}

impl ControllerOptions {
    /// The most entries of an I/O queue, a power of two that leaves room in the command identifier.
    const QUEUE_ENTRIES_MAX: u16 = SLOTS_MAX + 1;

    fn check(&self) -> Result<(), DriverError> {
        let invalid = |option, value, limit: String| Err(DriverError::InvalidOption { option, value, limit });
        if self.io_queue_pairs == 0 || self.io_queue_pairs == u16::MAX {
            return invalid("io_queue_pairs", self.io_queue_pairs.into(), "1 to 65534".to_owned());
        }
        let (entries, max) = (self.io_queue_entries, Self::QUEUE_ENTRIES_MAX);
        if u32::from(entries) < QUEUE_ENTRIES_MIN || entries > max {
            return invalid("io_queue_entries", entries.into(), format!("{QUEUE_ENTRIES_MIN} to {max}"));
        }
        let transfer = self.max_transfer_bytes;
        if transfer == 0 || !(transfer as usize).is_multiple_of(PAGE_BYTES) {
            return invalid("max_transfer_bytes", transfer.into(), format!("a multiple of {PAGE_BYTES}"));
        }
        // A region is a multiple of the hugepage size, and the sum of its parts must not overflow.
        let arena_max = isize::MAX as usize / 2;
        if self.arena_bytes > arena_max {
            return invalid("arena_bytes", self.arena_bytes as u64, format!("at most {arena_max}"));
        }
        Ok(())
    }

    fn queue_shape(&self, entries_max: u32, max_transfer_bytes: u32) -> QueueShape {
        let entries = u32::from(self.io_queue_entries).min(entries_max) as u16;
        QueueShape { entries, max_transfer_bytes }
    }
}

/// An NVMe controller that is enabled and ready.
///
/// It can be used from any thread; admin commands take turns. Queue pairs keep what they need of it: the last of
/// the controller and its queue pairs to be dropped disables the device, and only then is DMA memory unmapped and
/// freed. Dropping doesn't flush the device's write cache; [`shutdown`](Self::shutdown) does.
pub struct Controller {
    device: Arc<Device>,
    identity: ControllerIdentity,
    namespaces: Vec<Namespace>,
    queue_shape: QueueShape,
    /// RTD3 Entry Latency in microseconds, 0 when the controller doesn't say.
    rtd3e_us: u32,
}

impl Controller {
    /// Resets the controller behind `transport`, enables it and learns what it is.
    ///
    /// # Errors
    /// Any [`DriverError`]: the device is gone, doesn't get ready in the time it claims (CAP.TO), refuses a
    /// command it must support, or memory can't be had. Nothing stays mapped then.
    pub fn open(transport: Arc<dyn Transport>, options: &ControllerOptions) -> Result<Self, DriverError> {
        Self::open_placed(transport, options, &[])
    }

    /// As [`open`](Self::open), with parts of the arena on NUMA nodes of the caller's choice, as far as these have memory.
    /// What the driver needs itself then lies on the device's node.
    ///
    /// # Errors
    /// As `open`.
    pub fn open_placed(
        transport: Arc<dyn Transport>,
        options: &ControllerOptions,
        nodes: &[NodePart],
    ) -> Result<Self, DriverError> {
        Self::start(transport, options, nodes, Box::new(MonotonicClock::new()))
    }

    #[cfg(test)]
    pub(crate) fn open_with_clock(
        transport: Arc<dyn Transport>,
        options: &ControllerOptions,
        clock: Box<dyn Clock>,
    ) -> Result<Self, DriverError> {
        Self::start(transport, options, &[], clock)
    }

    fn start(
        transport: Arc<dyn Transport>,
        options: &ControllerOptions,
        nodes: &[NodePart],
        clock: Box<dyn Clock>,
    ) -> Result<Self, DriverError> {
        options.check()?;
        let device = Device::start(transport, clock, |queue_entries_max| {
            let shape = options.queue_shape(queue_entries_max, options.max_transfer_bytes);
            MemoryPlan {
                data_bytes: options.arena_bytes,
                queue_bytes: shape.memory_bytes() * usize::from(options.io_queue_pairs),
                hugepages: options.hugepages,
                nodes,
            }
        })?;
        let (mut identity, rtd3e_us) = identify(&device)?;
        identity.max_transfer_bytes = identity
            .mdts_bytes
            .map_or(options.max_transfer_bytes, |mdts| mdts.min(options.max_transfer_bytes));
        let queue_shape = options.queue_shape(device.queue_entries_max(), identity.max_transfer_bytes);
        identity.queue_entries = queue_shape.entries;
        identity.queue_pairs = negotiate_queues(&device, options.io_queue_pairs)?;
        let namespaces = namespaces(&device, &identity)?;
        tracing::info!(
            device = device.transport().name(),
            model = identity.model,
            firmware = identity.firmware,
            queue_pairs = identity.queue_pairs,
            queue_entries = identity.queue_entries,
            max_transfer_bytes = identity.max_transfer_bytes,
            namespaces = namespaces.len(),
            "controller ready"
        );
        Ok(Self { device: Arc::new(device), identity, namespaces, queue_shape, rtd3e_us })
    }

    /// Who the controller is and what it granted.
    #[must_use]
    pub fn identity(&self) -> &ControllerIdentity {
        &self.identity
    }

    /// The active namespaces that this driver can serve, by ascending identifier; others were told by a warning.
    #[must_use]
    pub fn namespaces(&self) -> &[Namespace] {
        &self.namespaces
    }

    /// The namespace with the identifier `nsid`, if it's one of [`namespaces`](Self::namespaces).
    #[must_use]
    pub fn namespace(&self, nsid: u32) -> Option<&Namespace> {
        self.namespaces.iter().find(|namespace| namespace.id() == nsid)
    }

    /// Memory that the device reaches, for the caller's data.
    #[must_use]
    pub fn arena(&self) -> &DmaArena {
        self.device.data_arena()
    }

    /// Makes the arena of another controller reachable for this one as well, so that one buffer serves commands of both:
    /// what `arena` hands out has, for this controller, the address that is as far from the returned one as its own
    /// [`iova`](crate::DmaBuffer::iova) is from the [arena's](DmaArena::iova). Both keep the memory until both are stopped.
    ///
    /// # Errors
    /// [`DriverError::Arena`] when the transport refuses the mapping, for instance since pinned memory counts once for
    /// each device against the limit of locked memory.
    pub fn map_arena(&self, arena: &DmaArena) -> Result<Iova, DriverError> {
        self.device.map_arena(arena)
    }

    /// Creates an I/O queue pair on the device: its completion queue, then its submission queue.
    ///
    /// # Errors
    /// [`DriverError::QueuePairsTaken`] when all granted pairs are in use; otherwise whatever kept the device
    /// from creating the queues.
    pub fn queue_pair<P: Payload>(&self) -> Result<QueuePair<P>, DriverError> {
        QueuePair::create(Arc::clone(&self.device), self.queue_shape)
    }

    /// Looks at the controller's status: for a caller whose commands don't complete.
    ///
    /// # Errors
    /// [`DriverError::Gone`] when the device was removed, [`DriverError::ControllerFatal`] when it has failed,
    /// [`DriverError::NotReady`] when it was reset from outside.
    pub fn check(&self) -> Result<(), DriverError> {
        self.device.check()
    }

    /// Whether the system wants the device back: its driver is being unbound, or it is about to be unplugged. The
    /// device works on; who asked waits until the controller and its queue pairs are closed.
    #[must_use]
    pub fn is_release_requested(&self) -> bool {
        self.device.is_release_requested()
    }

    /// Shuts the controller down in order: it completes what it has, brings its write cache to the media, and
    /// is disabled (CC.SHN, CSTS.SHST; Base section 3.6.1).
    ///
    /// # Errors
    /// [`DriverError::QueuePairsInUse`] while queue pairs exist; the device then goes on until the last of them
    /// is dropped. [`DriverError::Timeout`] when the controller needs longer than it said (RTD3E), and at least
    /// ten seconds.
    pub fn shutdown(self) -> Result<(), DriverError> {
        self.device.shutdown(self.rtd3e_us)
    }
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller")
            .field("transport", &self.device.transport().name())
            .field("identity", &self.identity)
            .field("namespaces", &self.namespaces)
            .finish_non_exhaustive()
    }
}

/// Identify Controller, and whether its write cache is on. Returns RTD3E with it.
fn identify(device: &Device) -> Result<(ControllerIdentity, u32), DriverError> {
    let vs = device.vs()?;
    device.with_admin(|admin, watch| {
        let identify = admin.identify_controller(watch)?;
        for (queue, size, exponent) in [
            ("submission", identify.sqes, Command::SIZE_EXPONENT),
            ("completion", identify.cqes, Completion::SIZE_EXPONENT),
        ] {
            if size.min() > exponent {
                let what =
                    format!("its {queue} queue entries have 2^{} bytes; 2^{exponent} are needed", size.min());
                return Err(DriverError::Unsupported { what });
            }
        }
        let mut identity = ControllerIdentity::new(&identify, vs, PAGE_BYTES as u32);
        identity.volatile_write_cache = identify.vwc.present()
            && match admin.is_write_cache_enabled(watch) {
                Ok(enabled) => enabled,
                Err(error @ DriverError::Command { .. }) => {
                    tracing::warn!(%error, "can't tell whether the write cache is on; taking it to be");
                    true
                }
                Err(error) => return Err(error),
            };
        Ok((identity, identify.rtd3e))
    })
}

/// Asks for I/O queue pairs; returns how many there are to use.
fn negotiate_queues(device: &Device, wanted: u16) -> Result<u16, DriverError> {
    let granted = device.with_admin(|admin, watch| admin.set_number_of_queues(watch, wanted))?;
    let granted = granted.min(u32::from(wanted)) as u16;
    if granted < wanted {
        tracing::debug!(wanted, granted, "the controller granted fewer queue pairs than wanted");
    }
    device.set_granted(granted);
    Ok(granted)
}

/// Identifies the active namespaces, up to one list of them.
fn namespaces(device: &Device, identity: &ControllerIdentity) -> Result<Vec<Namespace>, DriverError> {
    device.with_admin(|admin, watch| {
        let list = admin.active_namespaces(watch, 0)?;
        let mut namespaces = Vec::new();
        let mut previous = 0;
        for nsid in list.active() {
            if nsid <= previous {
                let what = format!("active namespace {nsid} follows {previous}; the list must ascend");
                return Err(DriverError::DeviceFault { what });
            }
            previous = nsid;
            let identify = match admin.identify_namespace(watch, nsid) {
                Ok(identify) => identify,
                Err(DriverError::Command { status, .. })
                    if status.code() == StatusCode::INVALID_NAMESPACE =>
                {
                    tracing::warn!(nsid, %status, "namespace left out: it was there a moment ago");
                    continue;
                }
                Err(error) => return Err(error),
            };
            match Namespace::new(device.id(), nsid, &identify, identity) {
                Ok(namespace) => namespaces.push(namespace),
                Err(reason) => tracing::warn!(nsid, reason, "namespace left out: not supported"),
            }
        }
        if list.nsid.last() != Some(&0) {
            let limit = NamespaceList::ENTRIES;
            tracing::warn!(limit, "the controller may have more namespaces; only the first are used");
        }
        Ok(namespaces)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{AdminFault, FakeClock, FakeTransport, Health};
    use foliant_nvme_spec::AdminOpcode;
    use foliant_nvme_spec::identify::Cns;
    use proptest::prelude::*;

    fn options() -> ControllerOptions {
        ControllerOptions {
            arena_bytes: 1 << 20,
            hugepages: Hugepages::Never,
            ..ControllerOptions::default()
        }
    }

    fn open(fake: &FakeTransport) -> Result<Controller, DriverError> {
        Controller::open_with_clock(Arc::new(fake.clone()), &options(), Box::new(FakeClock::default()))
    }

    fn open_with_health(health: Health) -> (FakeTransport, Result<Controller, DriverError>) {
        let fake = FakeTransport::new();
        fake.state().health = health;
        let result = open(&fake);
        (fake, result)
    }

    #[test]
    fn an_open_controller_knows_itself_and_its_namespaces() {
        let controller = open(&FakeTransport::new()).unwrap();
        let identity = controller.identity();
        assert_eq!((identity.serial.as_str(), identity.version.as_str()), ("F4KE", "1.4.0"));
        assert_eq!((identity.queue_pairs, identity.queue_entries), (2, 256));
        assert_eq!((identity.mdts_bytes, identity.max_transfer_bytes), (None, 1 << 20));
        assert_eq!(controller.namespace(1).map(Namespace::blocks), Some(1 << 20));
        assert!(controller.namespace(2).is_none());
    }

    #[test]
    fn queue_entries_are_bounded_by_what_the_controller_supports() {
        let options = ControllerOptions { io_queue_entries: 4096, ..options() };
        let controller = Controller::open(FakeTransport::healthy(), &options).unwrap();
        assert_eq!(controller.identity().queue_entries, 1024);
    }

    #[test]
    fn options_out_of_range_are_refused_by_name() {
        let refused = [
            ("io_queue_pairs", ControllerOptions { io_queue_pairs: 0, ..options() }),
            ("io_queue_entries", ControllerOptions { io_queue_entries: 1, ..options() }),
            ("io_queue_entries", ControllerOptions { io_queue_entries: 4097, ..options() }),
            ("max_transfer_bytes", ControllerOptions { max_transfer_bytes: 1000, ..options() }),
            ("arena_bytes", ControllerOptions { arena_bytes: usize::MAX, ..options() }),
        ];
        for (name, options) in refused {
            let error = Controller::open(FakeTransport::healthy(), &options).unwrap_err();
            assert!(matches!(error, DriverError::InvalidOption { option, .. } if option == name), "{error}");
        }
    }

    #[test]
    fn a_controller_that_never_gets_ready_times_out_and_keeps_nothing_mapped() {
        let (fake, result) = open_with_health(Health::NeverReady);
        assert!(matches!(result, Err(DriverError::Timeout { .. })));
        assert!(fake.state().mappings.is_empty());
    }

    #[test]
    fn a_device_that_reads_all_ones_is_gone() {
        assert!(matches!(open_with_health(Health::Gone).1, Err(DriverError::Gone)));
    }

    #[test]
    fn a_controller_that_fails_while_enabled_is_fatal() {
        assert!(matches!(open_with_health(Health::Fatal).1, Err(DriverError::ControllerFatal { .. })));
    }

    #[test]
    fn an_admin_command_without_completion_times_out() {
        let fake = FakeTransport::new();
        fake.state().admin_fault = AdminFault::Silent(AdminOpcode::IDENTIFY);
        assert!(matches!(open(&fake), Err(DriverError::Timeout { .. })));
    }

    /// Opens a controller that says something without sense: whatever comes of it, nothing panics, no wait is without
    /// end, and nothing stays mapped.
    fn open_and_drop(fake: &FakeTransport) {
        match open(fake) {
            Ok(controller) => drop(controller.queue_pair::<()>()),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        assert!(fake.state().mappings.is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_capabilities_are_served_or_refused(cap: u64) {
            let fake = FakeTransport::new();
            fake.state().cap = Some(cap);
            open_and_drop(&fake);
        }

        #[test]
        fn nonsense_in_identify_is_served_or_refused(seed: u64) {
            for cns in [Cns::CONTROLLER, Cns::ACTIVE_NAMESPACES, Cns::NAMESPACE] {
                let fake = FakeTransport::new();
                fake.state().admin_fault = AdminFault::IdentifyNonsense(cns, seed);
                open_and_drop(&fake);
            }
        }
    }

    #[test]
    fn a_namespace_that_vanishes_while_it_is_looked_at_is_left_out() {
        let fake = FakeTransport::new();
        fake.state().admin_fault = AdminFault::IdentifyRefused(Cns::NAMESPACE, StatusCode::INVALID_NAMESPACE);
        assert!(open(&fake).unwrap().namespaces().is_empty());
        fake.state().admin_fault = AdminFault::IdentifyRefused(Cns::NAMESPACE, StatusCode::INVALID_FIELD);
        assert!(matches!(open(&fake), Err(DriverError::Command { .. })));
    }

    #[test]
    fn a_foreign_admin_completion_is_a_fault_that_stays() {
        let fake = FakeTransport::new();
        let controller = open(&fake).unwrap();
        fake.state().admin_fault = AdminFault::WrongCid(AdminOpcode::CREATE_IO_COMPLETION_QUEUE);
        assert!(matches!(controller.queue_pair::<()>(), Err(DriverError::DeviceFault { .. })));
        fake.state().admin_fault = AdminFault::None;
        assert!(matches!(controller.queue_pair::<()>(), Err(DriverError::AdminQueueFailed)));
    }

    #[test]
    fn a_refused_admin_command_names_the_status() {
        let fake = FakeTransport::new();
        fake.state().admin_fault = AdminFault::Refused(AdminOpcode::SET_FEATURES, StatusCode::INVALID_FIELD);
        let error = open(&fake).unwrap_err();
        assert_eq!(error.to_string(), "Set Features failed: Invalid Field in Command (sct 0x0, sc 0x02)");
    }

    #[test]
    fn memory_is_mapped_only_for_a_controller_that_is_disabled() {
        let fake = FakeTransport::new();
        let cc = fake.state().cc;
        fake.state().cc = cc.with_en(true);
        drop(open(&fake).unwrap());
        assert!(
            !fake.state().mapped_while_enabled,
            "what it was told before would be believed of the new memory"
        );
    }

    #[test]
    fn dropping_disables_the_controller_before_its_memory_is_unmapped() {
        let fake = FakeTransport::new();
        let controller = open(&fake).unwrap();
        let queue = controller.queue_pair::<()>().unwrap();
        drop(controller);
        assert!(fake.state().cc.en(), "the queue pair keeps the controller enabled");
        drop(queue);
        assert!(!fake.state().cc.en());
        assert!(fake.state().mappings.is_empty());
        assert!(!fake.state().unmapped_while_enabled);
    }

    #[test]
    fn a_buffer_outlives_the_controller_with_its_memory() {
        let fake = FakeTransport::new();
        let controller = open(&fake).unwrap();
        let mut buffer = controller.arena().allocate(4096).unwrap();
        drop(controller);
        buffer.as_mut_slice().fill(7);
        assert!(!fake.state().mappings.is_empty());
        drop(buffer);
        assert!(fake.state().mappings.is_empty());
    }

    #[test]
    fn memory_is_leaked_when_the_device_can_neither_be_disabled_nor_cut_off() {
        let fake = FakeTransport::new();
        let controller = open(&fake).unwrap();
        fake.state().health = Health::NeverStops;
        fake.state().fails_stop_dma = true;
        drop(controller);
        assert_eq!(fake.state().mappings.len(), 1);
    }

    #[test]
    fn a_device_that_cannot_be_disabled_but_cut_off_gives_the_memory_back() {
        let fake = FakeTransport::new();
        let controller = open(&fake).unwrap();
        fake.state().health = Health::NeverStops;
        drop(controller);
        assert!(fake.state().mappings.is_empty());
    }

    #[test]
    fn a_shutdown_notifies_the_controller_and_waits_for_it() {
        let fake = FakeTransport::new();
        open(&fake).unwrap().shutdown().unwrap();
        assert!(!fake.state().cc.en());
        let controller = open(&fake).unwrap();
        fake.state().health = Health::NeverShutsDown;
        assert!(matches!(controller.shutdown(), Err(DriverError::Timeout { .. })));
    }

    #[test]
    fn a_shutdown_of_a_controller_that_is_cut_off_ends_at_once_and_gives_its_memory_back() {
        let fake = FakeTransport::new();
        let controller = open(&fake).unwrap();
        fake.state().health = Health::CutOff;
        assert!(matches!(controller.shutdown(), Err(DriverError::NotReady)));
        assert!(fake.state().mappings.is_empty());
        assert!(fake.state().cuts_dma > 0, "zeros alone are no proof that it is disabled");
    }

    #[test]
    fn a_shutdown_with_queue_pairs_is_refused() {
        let controller = open(&FakeTransport::new()).unwrap();
        let _queue = controller.queue_pair::<()>().unwrap();
        assert!(matches!(controller.shutdown(), Err(DriverError::QueuePairsInUse { count: 1 })));
    }
}
