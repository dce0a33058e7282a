//! The emulated controller as its owner holds it: made once, attached again and again, inspected and broken at will.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use foliant_nvme_transport::Transport;

use crate::EmulatedError;
use crate::attachment::{Attachment, EmulatedTransport};
use crate::backing::file::{FileStore, OpenRequest};
use crate::backing::ram::RamStore;
use crate::backing::{Extent, Medium};
use crate::bandwidth::TransferPath;
use crate::clock::RunningClock;
use crate::config::{ATOMIC_BYTES_MAX, Backing, EmulatedConfig, Latency};
use crate::fault::{Action, Candidate, Fault, FaultTable};
use crate::io::{Limits, Namespace};
use crate::model::{Model, PowerCut, Region};
use crate::observe::{EventObserver, Observer};
use crate::stats::EmulatedStats;
use crate::sync::lock;

/// One emulated NVMe controller with its medium.
///
/// The controller outlives its attachments: what was written is there when the next driver attaches, and after
/// [`power_cut`](Self::power_cut) what survived is.
pub struct EmulatedController {
    shared: Arc<Shared>,
    attached: Mutex<Weak<EmulatedTransport>>,
}

impl fmt::Debug for EmulatedController {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmulatedController").field("name", &self.shared.name).finish_non_exhaustive()
    }
}

/// What all attachments and queues of a controller share.
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) config: EmulatedConfig,
    pub(crate) limits: Limits,
    /// `None` when nothing is delayed, so that the hot path asks for no class.
    pub(crate) latency: Option<Latency>,
    /// `None` when data moves in no time.
    pub(crate) path: Option<TransferPath>,
    pub(crate) medium: Medium,
    clock: RunningClock,
    /// Moves on whenever mappings, faults or the observer change; queues then take new snapshots.
    generation: AtomicU64,
    has_faults: AtomicBool,
    faults: Mutex<FaultTable>,
    observer: Mutex<Option<Observer>>,
    event_observer: Mutex<Option<EventObserver>>,
    /// Counters of queues that no longer exist.
    totals: Mutex<EmulatedStats>,
    power_cycles: AtomicU64,
    power_losses: AtomicU64,
    /// The last attachment was shut down in order, or never enabled.
    is_shut_down: AtomicBool,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("name", &self.name).finish_non_exhaustive()
    }
}

impl EmulatedController {
    /// Makes a controller: checks the configuration and opens or reserves the medium.
    ///
    /// # Errors
    /// [`EmulatedError::Config`] for a broken limit, else what kept the medium from being opened.
    pub fn new(config: EmulatedConfig) -> Result<Arc<Self>, EmulatedError> {
        config.validate()?;
        let (medium, namespaces) = open_medium(&config)?;
        let name = match &config.backing {
            Backing::Null => "emu:null".to_owned(),
            Backing::Ram => "emu:ram".to_owned(),
            Backing::File { path, .. } => format!("emu:{}", path.display()),
        };
        let shared = Shared {
            name,
            limits: Limits::new(namespaces, config.mdts),
            latency: (!config.latency.is_zero()).then_some(config.latency),
            path: (!config.bandwidth.is_unlimited()).then(|| TransferPath::new(config.bandwidth)),
            medium,
            clock: RunningClock::start(&config.clock),
            generation: AtomicU64::new(0),
            has_faults: AtomicBool::new(false),
            faults: Mutex::default(),
            observer: Mutex::default(),
            event_observer: Mutex::default(),
            totals: Mutex::default(),
            power_cycles: AtomicU64::new(0),
            power_losses: AtomicU64::new(0),
            is_shut_down: AtomicBool::new(true),
            config,
        };
        Ok(Arc::new(Self { shared: Arc::new(shared), attached: Mutex::default() }))
    }

    /// Powers the controller on, reset and disabled, and hands out the way to it.
    ///
    /// One attachment exists at a time. It ends when the transport is dropped, or with
    /// [`power_cut`](Self::power_cut).
    ///
    /// # Errors
    /// [`EmulatedError::AlreadyAttached`] while an earlier transport lives; [`EmulatedError::Memory`] when the
    /// doorbell region can't be had.
    pub fn attach(&self) -> Result<Arc<dyn Transport>, EmulatedError> {
        let mut attached = lock(&self.attached);
        if attached.upgrade().is_some_and(|transport| !transport.attachment.is_gone()) {
            return Err(EmulatedError::AlreadyAttached { name: self.shared.name.clone() });
        }
        let attachment = Attachment::new(Arc::clone(&self.shared))
            .map_err(|source| EmulatedError::Memory { len_bytes: 4096, source })?;
        let transport = Arc::new(EmulatedTransport { attachment: Arc::new(attachment) });
        *attached = Arc::downgrade(&transport);
        self.shared.power_cycles.fetch_add(1, Ordering::Relaxed);
        Ok(transport)
    }

    fn attached(&self) -> Option<Arc<EmulatedTransport>> {
        lock(&self.attached).upgrade().filter(|transport| !transport.attachment.is_gone())
    }

    /// Adds a fault, behind the ones already there.
    pub fn inject(&self, fault: Fault) {
        lock(&self.shared.faults).push(fault);
        self.shared.note_faults();
    }

    /// Removes all faults. Commands already delayed stay delayed, lost ones lost.
    pub fn clear_faults(&self) {
        lock(&self.shared.faults).clear();
        self.shared.note_faults();
    }

    /// Cuts the power: `seed` decides for each atomic unit which of its versions survives. The attached transport
    /// is gone from then on, and the next attachment finds what survived.
    ///
    /// # Errors
    /// [`EmulatedError::NoPowerLossModel`] when the controller wasn't configured with `power_loss_model`.
    pub fn power_cut(&self, seed: u64) -> Result<PowerCut, EmulatedError> {
        let Medium::Model(model) = &self.shared.medium else {
            return Err(EmulatedError::NoPowerLossModel { name: self.shared.name.clone() });
        };
        if !self.shared.is_shut_down.swap(true, Ordering::Relaxed) {
            self.shared.power_losses.fetch_add(1, Ordering::Relaxed);
        }
        let cut = || model.cut(seed);
        Ok(match self.attached() {
            Some(transport) => transport.attachment.cut_power(cut),
            None => cut(),
        })
    }

    /// Counters over all attachments.
    #[must_use]
    pub fn stats(&self) -> EmulatedStats {
        let transport = self.attached();
        let mut stats = self.shared.totals();
        if let Some(transport) = transport {
            transport.attachment.add_stats(&mut stats);
        }
        stats
    }

    /// Completions that are posted to I/O completion queue `cqid`, and that the host hasn't taken yet, as its doorbell
    /// says: nobody there can know of them. 0 when there is no such queue.
    #[must_use]
    pub fn completions_untaken(&self, cqid: u16) -> u32 {
        let Some(transport) = self.attached() else { return 0 };
        let Some(group) = transport.attachment.group(cqid) else { return 0 };
        group.as_ref().map_or(0, |group| group.completions_untaken())
    }

    /// Shows every I/O command that is about to be carried out to `observer`; `None` ends that.
    pub fn observe(&self, observer: Option<Observer>) {
        *lock(&self.shared.observer) = observer;
        self.shared.advance_generation();
    }

    /// Tells `observer` what becomes of every I/O command; `None` ends that.
    pub fn observe_events(&self, observer: Option<EventObserver>) {
        *lock(&self.shared.event_observer) = observer;
        self.shared.advance_generation();
    }

    /// Copies what the namespace holds from byte `offset`, as a Read would see it now, into `buffer`.
    ///
    /// # Errors
    /// [`EmulatedError::ImageRange`] when the namespace doesn't exist or ends before; [`EmulatedError::File`] when
    /// the image file can't be read.
    pub fn read_image(&self, nsid: u32, offset: u64, buffer: &mut [u8]) -> Result<(), EmulatedError> {
        let out_of_range = || EmulatedError::ImageRange { nsid, offset, len_bytes: buffer.len() as u64 };
        let namespace = self.shared.limits.namespace(nsid).map_err(|_| out_of_range())?.extent();
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > namespace.len_bytes) {
            return Err(out_of_range());
        }
        self.shared.medium.read_at(namespace.offset + offset, buffer).map_err(|source| {
            let path = self.shared.name.trim_start_matches("emu:").into();
            EmulatedError::File { what: "read", path, source }
        })
    }
}

impl Shared {
    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn advance_generation(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn has_faults(&self) -> bool {
        self.has_faults.load(Ordering::Acquire)
    }

    fn note_faults(&self) {
        let has_faults = !lock(&self.faults).is_empty();
        self.has_faults.store(has_faults, Ordering::Release);
        self.advance_generation();
    }

    pub(crate) fn decide_fault(&self, command: &Candidate) -> Option<Action> {
        lock(&self.faults).decide(command)
    }

    pub(crate) fn observer(&self) -> Option<Observer> {
        lock(&self.observer).clone()
    }

    pub(crate) fn event_observer(&self) -> Option<EventObserver> {
        lock(&self.event_observer).clone()
    }

    pub(crate) fn now_ns(&self) -> u64 {
        self.clock.now_ns()
    }

    pub(crate) fn totals(&self) -> EmulatedStats {
        *lock(&self.totals)
    }

    /// Keeps the counters of a queue that goes away.
    pub(crate) fn fold(&self, stats: &EmulatedStats) {
        lock(&self.totals).add(stats);
    }

    /// Power cycles, and unexpected power losses among them.
    pub(crate) fn power_history(&self) -> (u64, u64) {
        (self.power_cycles.load(Ordering::Relaxed), self.power_losses.load(Ordering::Relaxed))
    }

    pub(crate) fn note_running(&self) {
        self.is_shut_down.store(false, Ordering::Relaxed);
    }

    pub(crate) fn note_clean_shutdown(&self) {
        self.is_shut_down.store(true, Ordering::Relaxed);
    }
}

/// Opens the medium and lays the namespaces out on it.
fn open_medium(config: &EmulatedConfig) -> Result<(Medium, Box<[Namespace]>), EmulatedError> {
    let sizes: Option<Vec<u64>> = config.namespaces.iter().map(|namespace| namespace.size_bytes).collect();
    if let Backing::File { path, direct, engine } = &config.backing {
        let block_bytes = config.namespaces.iter().map(|namespace| namespace.block_bytes).min();
        let request = OpenRequest {
            path,
            size_bytes: sizes.as_ref().map(|sizes| sizes.iter().sum()),
            block_bytes: block_bytes.unwrap_or(512),
            direct: *direct,
            engine: *engine,
        };
        let (store, file_bytes) = FileStore::open(&request)?;
        // A single namespace without a size is as large as the file; the namespaces follow one another closely.
        let (namespaces, _) = lay_out(config, &sizes.unwrap_or(vec![file_bytes]), 1);
        return Ok((Medium::File(Arc::new(store)), namespaces));
    }
    // In memory each namespace starts at a stripe, so that its atomic units lie within stripes.
    let (namespaces, len_bytes) = lay_out(config, &sizes.unwrap_or_default(), ATOMIC_BYTES_MAX);
    if config.backing == Backing::Null {
        return Ok((Medium::Null, namespaces));
    }
    let ram = RamStore::new(len_bytes).map_err(|source| EmulatedError::Memory { len_bytes, source })?;
    if !config.power_loss_model {
        return Ok((Medium::Ram(Arc::new(ram)), namespaces));
    }
    let region = |namespace: &Namespace| {
        let block_bytes = u64::from(namespace.block_bytes);
        let unit_bytes = block_bytes * (u64::from(config.awupf_z) + 1);
        Region { extent: namespace.extent(), block_bytes, unit_bytes }
    };
    let regions = namespaces.iter().map(region).collect();
    Ok((Medium::Model(Arc::new(Model::new(ram, regions))), namespaces))
}

/// The namespaces one after another, each aligned, and where the last one ends.
fn lay_out(config: &EmulatedConfig, sizes: &[u64], align: u64) -> (Box<[Namespace]>, u64) {
    let mut offset = 0;
    let mut end = 0;
    let mut namespaces = Vec::with_capacity(sizes.len());
    for (namespace, size_bytes) in config.namespaces.iter().zip(sizes) {
        namespaces.push(Namespace::new(*namespace, *size_bytes, offset));
        end = Extent { offset, len_bytes: *size_bytes }.end();
        offset = end.next_multiple_of(align);
    }
    (namespaces.into(), end)
}
