//! The engine: a controller, its shards, and the mappings that are open on it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::Instant;

use foliant_nvme::{
    ArenaBacking, Controller, ControllerIdentity, ControllerOptions, Iova, Lba, Namespace, Transport,
};

use crate::cache::eof::FileEnd;
use crate::cache::folio::{FolioHeader, FolioKey, FrameId};
use crate::cache::frames::{FrameMemory, PAGE_BYTES};
use crate::cache::owned::ShardCache;
use crate::cache::published;
use crate::cache::shape::{MappingShape, Stability};
use crate::cache::tags::TagTree;
use crate::device;
use crate::error::{Error, Result};
use crate::gate::{Gate, GateTable, MappingGates};
use crate::mapping::mirror::{self, MirrorPlan};
use crate::mapping::{HandleReadahead, Mapping, MappingOptions};
use crate::mirror::{LabelTurn, MirrorDevice, StreamId};
use crate::numa::{Placement, Topology};
use crate::observe::{PageOwner, StatsFile};
use crate::options::{EngineOptions, FRAMES_MIN, ShardThreads, cores_allowed};
use crate::reply::{GRANTS_MAX, block_on};
use crate::shard::device::DeviceWatch;
use crate::shard::link::ShardLink;
use crate::shard::mirror::MirrorStream;
use crate::shard::open::OpenMapping;
use crate::shard::request::Request;
use crate::shard::resync::WINDOW_PAGES;
use crate::shard::runner;
use crate::shard::{Shard, ShardLimits};
use crate::share::{CacheShare, ShareTable};
use crate::stats::EngineStats;
use crate::table::{Extent, MappingTable};
use crate::writeback::commit::{Durability, WriteCache};
use crate::writeback::throttle::DirtyLimits;

/// What handles and the engine share.
#[derive(Debug)]
pub(crate) struct EngineInner {
    pub links: Box<[Arc<ShardLink>]>,
    pub table: MappingTable,
    gates: GateTable,
    /// Which shares of the cache there are.
    pub shares: Arc<ShareTable>,
    /// How long anything waits for what others hold.
    pub pin_wait: std::time::Duration,
    /// Pages that one request may ask for, so that a few requests never need all frames.
    pub request_pages_max: u64,
    namespaces: Vec<Namespace>,
    pub identity: ControllerIdentity,
    /// Where mirrors are, if anywhere.
    pub mirror: Option<MirrorSide>,
    /// By namespace id.
    durability: BTreeMap<u32, Arc<Durability>>,
    stop: Arc<AtomicBool>,
    fixed_metadata_bytes: u64,
    pub frames: u64,
    arena: ArenaBacking,
}

impl EngineInner {
    /// Whether this is the process that opened the engine.
    pub(crate) fn is_here(&self) -> bool {
        self.links[0].birthplace.is_here()
    }

    /// Why the engine can't serve: this is another process, or a shard has failed.
    fn check(&self) -> Result<()> {
        self.links[0].birthplace.check()?;
        self.links.iter().find_map(|link| link.failure()).map_or(Ok(()), Err)
    }

    /// A page that somebody has exclusively.
    fn exclusively_held(&self) -> Option<Error> {
        self.links.iter().find_map(|link| {
            // One of which nothing is filled was made for a writer that went away.
            let held = |header: &&FolioHeader| header.state().exclusive() && header.state().filled() > 0;
            let key = link.cache.headers.iter().find(held)?.key();
            self.table.with_shape(key.mapping(), |shape| Error::PinnedAtClose {
                page: key.page() / shape.order.pages(),
                first_lba: shape.first_lba,
            })
        })
    }

    /// A sync of a mapping of this namespace has ended that began at `begun`.
    pub(crate) fn record_sync(&self, namespace: u32, begun: Instant) {
        let link = &self.links[namespace as usize % self.links.len()];
        link.times.sync.record(nanoseconds(begun.elapsed()));
    }

    /// The page whose frame a device address lies in.
    fn key_at(&self, iova: Iova) -> Option<FolioKey> {
        self.links.iter().find_map(|link| {
            let frames = &link.cache.frames;
            let offset = iova.0.checked_sub(frames.segment(FrameId(0), 0).iova.0)?;
            let frame =
                u32::try_from(offset / PAGE_BYTES as u64).ok().filter(|&frame| frame < frames.count())?;
            Some(link.cache.folio(FrameId(frame)).key())
        })
    }
}

/// The device of an engine's mirrors.
#[derive(Debug)]
pub(crate) struct MirrorSide {
    pub on: StreamId,
    pub namespaces: Vec<Namespace>,
    pub write_zeroes: bool,
    pub queue_entries: u16,
    /// By namespace id.
    pub durability: BTreeMap<u32, Arc<Durability>>,
    /// What a device address of a frame is more there than on the primary, wrapping.
    iova_offset: u64,
}

/// An open storage engine: a page cache with writeback on one NVMe controller.
///
/// See the [crate's documentation](crate) for an example. Close it with [`close`](Self::close); an engine that
/// is only dropped stops without syncing, as after a crash.
#[derive(Debug)]
pub struct Engine {
    inner: Arc<EngineInner>,
    /// Disabled and freed after the shards' queue pairs are gone.
    controller: Option<Controller>,
    /// The mirror's, where that is another.
    mirror_controller: Option<Controller>,
    threads: Vec<JoinHandle<Shard>>,
    /// With [`ShardThreads::Manual`], until they are taken.
    shards: Mutex<Vec<Shard>>,
    /// Where others see what the shards do.
    stats_page: Option<Arc<StatsFile>>,
}

impl Engine {
    /// Opens the device that `uri` names: `emu:PATH?size=…&lba=…` for an emulated controller on a file,
    /// `emu:ram?size=…` or `emu:null?size=…` for one on memory or on nothing.
    ///
    /// # Errors
    /// [`Error::Uri`] with what is wrong in it; [`Error::Option`]; [`Error::Driver`] when the controller doesn't come
    /// up; [`Error::Os`].
    pub fn open(uri: &str, options: &EngineOptions) -> Result<Self> {
        options.check()?;
        match &options.mirror {
            MirrorDevice::Uri(mirror) if mirror == uri => Err(Error::Option {
                option: "mirror",
                value: mirror.clone(),
                reason:
                    "is the engine's own device; use MirrorDevice::SameDevice, and other ranges or namespaces"
                        .to_owned(),
            }),
            MirrorDevice::Uri(mirror) => {
                Self::open_with(device::transport(uri)?, Some(device::transport(mirror)?), options)
            }
            MirrorDevice::None | MirrorDevice::SameDevice => Self::open_on(device::transport(uri)?, options),
        }
    }

    /// Opens a device through a transport that the caller made.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_on(transport: Arc<dyn Transport>, options: &EngineOptions) -> Result<Self> {
        options.check()?;
        let mirror = match &options.mirror {
            MirrorDevice::Uri(mirror) => Some(device::transport(mirror)?),
            MirrorDevice::None | MirrorDevice::SameDevice => None,
        };
        Self::open_with(transport, mirror, options)
    }

    /// Opens a device, and another one for mirrors whatever [`EngineOptions::mirror`] says, through transports that the
    /// caller made.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_mirrored_on(
        transport: Arc<dyn Transport>,
        mirror: Arc<dyn Transport>,
        options: &EngineOptions,
    ) -> Result<Self> {
        options.check()?;
        Self::open_with(transport, Some(mirror), options)
    }

    fn open_with(
        transport: Arc<dyn Transport>,
        mirror: Option<Arc<dyn Transport>>,
        options: &EngineOptions,
    ) -> Result<Self> {
        let same = mirror.is_none() && options.mirror == MirrorDevice::SameDevice;
        let queues = if same { 2 } else { 1 };
        let window_bytes = if same || mirror.is_some() { WINDOW_PAGES as usize * PAGE_BYTES } else { 0 };
        let device = transport.name().to_owned();
        let frames_bytes = options.cache_bytes / PAGE_BYTES as u64 * PAGE_BYTES as u64;
        let device_node = transport.numa_node();
        let topology = Topology::live();
        let placement =
            Placement::new(&options.threads, options.shards, device_node, &cores_allowed(), &topology);
        let controller = Controller::open_placed(
            transport,
            &ControllerOptions {
                io_queue_pairs: (options.shards * queues) as u16,
                io_queue_entries: options.queue_entries,
                // Beside the frames a page a shard for labels.
                arena_bytes: frames_bytes as usize + options.shards * (PAGE_BYTES + window_bytes),
                max_transfer_bytes: options.transfer_bytes_max,
                hugepages: options.hugepages,
            },
            &placement.parts(frames_bytes as usize / PAGE_BYTES / options.shards * PAGE_BYTES),
        )?;
        let granted = usize::from(controller.identity().queue_pairs);
        if granted < queues {
            return Err(Error::Option {
                option: "mirror",
                value: format!("{:?}", options.mirror),
                reason: format!(
                    "a mirror on the same device needs 2 queue pairs, and the device grants {granted}"
                ),
            });
        }
        let mirror_controller = match mirror {
            Some(transport) => Some(open_mirror(transport, options)?),
            None => None,
        };
        let mirror_granted = mirror_controller
            .as_ref()
            .map_or(usize::MAX, |mirror| usize::from(mirror.identity().queue_pairs));
        let shards = (granted / queues).min(mirror_granted).min(options.shards).max(1);
        if shards < options.shards {
            tracing::warn!(
                wanted = options.shards,
                shards,
                "the device granted fewer queue pairs than shards wanted"
            );
        }
        let of_mirror = mirror_controller.as_ref().or(same.then_some(&controller));
        let mut mirror = of_mirror.map(|of| MirrorSide::new(&controller, of, same)).transpose()?;
        published::prepare();
        let mut shards =
            build_shards(&controller, of_mirror.zip(mirror.as_ref()), (options, &placement), shards)?;
        let durability: BTreeMap<_, _> = durabilities(&controller).collect();
        if let Some(mirror) = mirror.as_mut().filter(|_| same) {
            // Whoever flushes a namespace flushes it for all.
            mirror.durability.clone_from(&durability);
        }
        let frames: u64 = shards.iter().map(Shard::frames).sum();
        let links: Box<[_]> = shards.iter().map(|shard| shard.link().clone()).collect();
        // Beside what is kept for logs there is as much for others.
        let frames_min = 2 * log_reserve_frames(options, frames / shards.len() as u64);
        let inner = Arc::new(EngineInner {
            shares: Arc::new(ShareTable::new(&links, frames, frames_min.max(FRAMES_MIN))),
            links,
            table: MappingTable::new(),
            gates: GateTable::default(),
            pin_wait: options.pin_wait,
            request_pages_max: request_pages_max(frames / shards.len() as u64),
            namespaces: controller.namespaces().to_vec(),
            identity: controller.identity().clone(),
            mirror,
            durability,
            stop: Arc::new(AtomicBool::new(false)),
            fixed_metadata_bytes: shards.iter().map(|shard| shard.fixed_metadata_bytes() as u64).sum(),
            frames,
            arena: controller.arena().backing(),
        });
        let owner = PageOwner { device, shards: shards.len() };
        let stats_page = StatsFile::create(&options.stats_page, owner)?.map(Arc::new);
        if let Some(page) = &stats_page {
            shards.iter_mut().for_each(|shard| shard.publish_on(page.clone()));
        }
        let (threads, shards) = start(shards, &options.threads, &placement, &inner.stop)?;
        Ok(Self {
            inner,
            controller: Some(controller),
            mirror_controller,
            threads,
            shards: Mutex::new(shards),
            stats_page,
        })
    }

    pub(crate) fn inner(&self) -> &EngineInner {
        &self.inner
    }

    /// What the controller says of itself.
    #[must_use]
    pub fn identity(&self) -> &ControllerIdentity {
        &self.inner.identity
    }

    /// The device's namespaces.
    #[must_use]
    pub fn namespaces(&self) -> &[Namespace] {
        &self.inner.namespaces
    }

    /// Shards that serve this engine.
    #[must_use]
    pub fn shards(&self) -> usize {
        self.inner.links.len()
    }

    /// What kind of memory the frames lie on.
    #[must_use]
    pub fn arena_backing(&self) -> ArenaBacking {
        self.inner.arena
    }

    /// The write-ahead gate of that name; a new one, whose durable number begins at none, if nobody has a handle of
    /// it and no mapping is open with it.
    #[must_use]
    pub fn gate(&self, name: &str) -> Gate {
        self.inner.gates.open(name, &self.inner.links)
    }

    /// Opens a range of a namespace as a mapping. The same range opened again gives another handle of the same
    /// mapping; ranges that overlap in part are refused.
    ///
    /// With [`ShardThreads::Manual`] another thread must be polling the shards.
    ///
    /// # Errors
    /// [`Error::Mapping`] when the range or the gate doesn't fit; [`Error::GateCycle`]; [`Error::Closed`].
    pub fn mapping(&self, options: &MappingOptions) -> Result<Mapping> {
        block_on(self.mapping_async(options))
    }

    /// As [`mapping`](Self::mapping), without blocking the thread.
    ///
    /// # Errors
    /// As `mapping`.
    pub async fn mapping_async(&self, options: &MappingOptions) -> Result<Mapping> {
        let inner = &self.inner;
        inner.check()?;
        let wrong = |reason: String| Err(Error::Mapping { reason });
        let Some(namespace) = inner.namespaces.iter().find(|ns| ns.id() == options.namespace) else {
            let known: Vec<u32> = inner.namespaces.iter().map(Namespace::id).collect();
            return wrong(format!("there is no namespace {}; the device has {known:?}", options.namespace));
        };
        let block = u64::from(namespace.block_bytes());
        if block > PAGE_BYTES as u64 {
            return wrong(format!(
                "namespace {} has blocks of {block} bytes; 512 to 4096 are supported",
                options.namespace
            ));
        }
        let capacity = capacity_bytes(namespace);
        let start = options.start_bytes;
        let rest = match options.mirror {
            None => capacity.saturating_sub(start),
            Some(_) => mirror::rest_of(capacity, start, block),
        };
        // How far it may grow: what it occupies of the device.
        let asked = options.capacity_bytes.or(options.len_bytes);
        let capacity_bytes = asked.unwrap_or(rest);
        let len_bytes = options.len_bytes.unwrap_or(capacity_bytes);
        if !start.is_multiple_of(block) || !capacity_bytes.is_multiple_of(block) {
            return wrong(format!(
                "start {start} and length {capacity_bytes} must be multiples of the {block}-byte block; a len_bytes that \
                 isn't one needs a capacity_bytes that is"
            ));
        }
        if len_bytes > capacity_bytes {
            return wrong(format!(
                "its length of {len_bytes} bytes exceeds its capacity of {capacity_bytes}"
            ));
        }
        if capacity_bytes == 0 || start.checked_add(capacity_bytes).is_none_or(|end| end > capacity) {
            return wrong(format!(
                "bytes {start}..{} don't lie within namespace {}, which has {capacity} bytes, or are none",
                start.saturating_add(capacity_bytes),
                options.namespace
            ));
        }
        if options.mirror.is_some() && start + capacity_bytes + block > capacity {
            return wrong(format!(
                "a mirrored mapping needs a block behind its range for its label, and bytes {start}..{} reach the end of \
                 namespace {}; the most that can be mirrored are {} bytes",
                start + capacity_bytes,
                options.namespace,
                mirror::rest_of(capacity, start, block)
            ));
        }
        let first_lba = start / block;
        let Some(order) = options.order() else {
            return wrong(format!(
                "a page of {} bytes can't be: page_bytes is a power of two from 4096 to 65536",
                options.page_bytes
            ));
        };
        let page_bytes = u64::from(options.page_bytes);
        let readahead = HandleReadahead::new(options.readahead_bytes_max, order, inner)?;
        if page_bytes > PAGE_BYTES as u64 && !capacity_bytes.is_multiple_of(page_bytes) {
            return wrong(format!(
                "its length of {capacity_bytes} bytes must be a multiple of its page_bytes, {page_bytes}; the next smaller is {}; \
                 another length needs a capacity_bytes that is one",
                capacity_bytes / page_bytes * page_bytes
            ));
        }
        let shards = inner.links.len();
        let shape = |slot| {
            let kind = (order, options.stability);
            let mut shape =
                MappingShape::new(slot, namespace.clone(), first_lba, capacity_bytes, kind, shards);
            shape.share = options.share.as_ref().map(CacheShare::id).unwrap_or_default();
            shape
        };
        let (needed, had) = (shape(0).block_commands_max(), u32::from(inner.identity.queue_entries) / 2);
        if needed > had {
            return wrong(format!(
                "the device's boundary of {:?} blocks splits a page into {needed} commands, and half of the queue holds \
                 {had}; open the engine with more queue_entries",
                namespace.optimal_boundary_blocks()
            ));
        }
        if options.stability == Stability::Unstable && options.gate.is_some() {
            return wrong(
                "an unstable mapping can't have a gate: its pages are written while they change".to_owned(),
            );
        }
        if let Some(share) = options.share.as_ref().filter(|share| !share.is_of(&inner.shares)) {
            return wrong(format!(
                "the share {:?} is another engine's; make one of this engine",
                share.name()
            ));
        }
        let gates = MappingGates { gate: options.gate.clone(), log_of: options.log_of.clone() };
        gates.check(&inner.links)?;
        let plan = MirrorPlan::new(inner, options, capacity_bytes)?;
        let label = if plan.is_some() { block } else { 0 };
        let bytes = start..start + capacity_bytes + label;
        let own = Extent { on: StreamId::Primary, namespace: options.namespace, bytes };
        let extents: Vec<_> =
            std::iter::once(own).chain(plan.as_ref().map(|plan| plan.extent(capacity_bytes))).collect();
        let mirror = (options.mirror.as_ref(), &extents[..]);
        let opened = inner.table.open(
            options.namespace,
            first_lba,
            capacity_bytes,
            (order, &gates),
            mirror,
            |slot| OpenMapping {
                mirror: plan.as_ref().map(|plan| plan.open(&shape(slot), inner.links.len())),
                labels: LabelTurn::default(),
                shape: shape(slot),
                end: FileEnd::new(len_bytes, order),
                gates: gates.clone(),
                errors: Default::default(),
                durability: inner.durability[&options.namespace].clone(),
                retry: options.retry,
                share: options.share.clone(),
                writeback: inner.links.iter().map(|_| Default::default()).collect(),
                failure: Default::default(),
                dropped: AtomicBool::new(false),
            },
        )?;
        // The handle exists from here on, so that an error below drops it.
        let mapping = Mapping::new(inner.clone(), opened.clone(), readahead);
        if opened.retry != options.retry {
            return wrong(format!(
                "the same range is open with retry: {:?}; every handle of a mapping has the same policy",
                opened.retry
            ));
        }
        let share = options.share.as_ref().map(CacheShare::id).unwrap_or_default();
        if opened.shape.share != share {
            return wrong(format!(
                "the same range is open with share: {:?}; every handle of a mapping has the same",
                opened.share.as_ref().map(CacheShare::name)
            ));
        }
        if opened.shape.stability != options.stability {
            return wrong(format!(
                "the same range is open with stability: {:?}; every handle of a mapping has the same",
                opened.shape.stability
            ));
        }
        if let Err(error) = mapping.attach().await {
            mapping.refuse_open();
            return Err(error);
        }
        // Every handle's opener tells every shard: another one may be on its way still, or have been dropped.
        for link in &inner.links {
            link.request(Request::Open(opened.clone())).await?;
        }
        Ok(mapping)
    }

    /// Whether the system wants the device back: somebody unbinds it from its driver, or is about to unplug it. The
    /// engine works on, and who asked waits until it is [closed](Self::close). A warning goes on record too. Once true it stays so, though who asked may have given up.
    #[must_use]
    pub fn is_release_requested(&self) -> bool {
        self.controller.as_ref().is_some_and(Controller::is_release_requested)
    }

    /// Counters since open.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        let mut stats = EngineStats { frames: self.inner.frames, ..Default::default() };
        for link in &self.inner.links {
            link.counters.add_to(&mut stats);
            let (reads, writes) = link.hits.totals();
            stats.read_hits += reads;
            stats.write_hits += writes;
            stats.readahead_pages_used += link.hits.first_uses();
            stats.readahead_dropped += link.readahead.refused();
            stats.requests += link.requests.load(Ordering::Relaxed);
            for marked in &link.cache.marked {
                stats.dirty_pages += u64::from(marked.dirty());
                stats.writeback_pages += u64::from(marked.writeback());
                stats.poisoned_pages += u64::from(marked.poisoned());
            }
            stats.metadata_bytes += link.cache.lsns.bytes_in_use() as u64;
        }
        stats.metadata_bytes +=
            self.inner.fixed_metadata_bytes + stats.tag_nodes * TagTree::NODE_BYTES as u64;
        stats
    }

    /// Which page's frame a device address lies in: namespace id and first block of the page. For checking from
    /// outside that a command's data pointers are the frames of the pages that it names (WB-41).
    #[must_use]
    pub fn locate(&self, iova: Iova) -> Option<(u32, Lba)> {
        self.locator()(iova)
    }

    /// [`locate`](Self::locate) as a function that can be given away; it keeps the frames' memory allocated.
    pub fn locator(&self) -> impl Fn(Iova) -> Option<(u32, Lba)> + Send + Sync + use<> {
        let inner = self.inner.clone();
        move |iova| {
            let key = inner.key_at(iova)?;
            inner.table.with_shape(key.mapping(), |shape| (shape.namespace.id(), shape.lba(key.page())))
        }
    }

    /// As [`locator`](Self::locator), for the mirror's device: which page of a mirror a device address of that device is
    /// written to.
    pub fn mirror_locator(&self) -> impl Fn(Iova) -> Option<(u32, Lba)> + Send + Sync + use<> {
        let inner = self.inner.clone();
        move |iova| {
            let offset = inner.mirror.as_ref()?.iova_offset;
            let key = inner.key_at(Iova(iova.0.wrapping_sub(offset)))?;
            inner
                .table
                .with_mirror_shape(key.mapping(), |shape| (shape.namespace.id(), shape.lba(key.page())))
        }
    }

    /// With [`ShardThreads::Manual`]: the shards, for the caller to poll. Empty after the first call. In a child process, after a
    /// fork, they are polled to no effect, and mustn't be dropped: their queues are the parent's. A child leaves by `exec` or
    /// `exit`, which drop nothing that lives on the stack.
    pub fn take_shards(&self) -> Vec<Shard> {
        std::mem::take(&mut *self.shards.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// With [`ShardThreads::Manual`]: takes shards back that were [taken](Self::take_shards), so that
    /// [`close`](Self::close) can drive them to the end.
    pub fn return_shards(&self, shards: Vec<Shard>) {
        self.shards.lock().unwrap_or_else(PoisonError::into_inner).extend(shards);
    }

    /// Syncs every open mapping, the logs first, stops the shards and shuts the controller down. Handles get
    /// [`Error::Closed`] from then on. Mirrored mappings are [closed](Mapping::close), so that their labels can say that both
    /// halves are equal: pins of theirs are waited for. Pages behind a [`Gate`] are waited for, up to `gate_wait`. With [`ShardThreads::Manual`] the shards have to be [returned](Self::return_shards) before.
    ///
    /// Pins that are held across it: a shared one shows its page's bytes as long as it is held; an exclusive one is waited for
    /// where its page is dirty, and in any case an error, since what its holder changes afterwards is lost.
    ///
    /// # Errors
    /// [`Error::ShardFailed`] when a shard has failed; [`Error::PinnedAtClose`]; [`Error::Forked`] in a child process, where
    /// nothing is done. The first error of all that; everything is stopped nevertheless, and what couldn't be written is lost, as
    /// the error says.
    pub fn close(mut self) -> Result<()> {
        self.inner.links[0].birthplace.check()?;
        self.inner.table.close();
        let mut shards = self.take_shards();
        if self.threads.is_empty() && shards.len() < self.inner.links.len() {
            return Err(Error::Option {
                option: "threads",
                value: "Manual".to_owned(),
                reason: "the caller still has shards; give them back by return_shards before close"
                    .to_owned(),
            });
        }
        let mappings = self.inner.table.all().into_iter().map(|open| {
            self.inner.table.add_handle(&open);
            Mapping::new(self.inner.clone(), open, HandleReadahead::off())
        });
        let (logs, others): (Vec<_>, Vec<_>) = mappings.partition(Mapping::holds_log);
        let mut result = Ok(());
        for mappings in [logs, others] {
            let synced = close_all(&mappings);
            result =
                result.and(if shards.is_empty() { block_on(synced) } else { drive(&mut shards, synced) });
        }
        let failed = self.inner.check();
        drop(shards);
        self.stop();
        result = result.and(failed).and(self.inner.exclusively_held().map_or(Ok(()), Err));
        let dirty = self.stats().dirty_pages;
        if dirty > 0 {
            tracing::warn!(
                dirty,
                "the engine was closed with pages that could not be written: they are lost"
            );
        }
        if let Some(Err(error)) = self.mirror_controller.take().map(Controller::shutdown) {
            tracing::warn!(%error, "the mirror's controller could not be shut down in order");
        }
        match self.controller.take().map(Controller::shutdown) {
            Some(Err(error)) => result.and(Err(error.into())),
            _ => result,
        }
    }

    fn stop(&mut self) {
        for open in self.inner.table.all() {
            open.end.close();
        }
        self.inner.gates.close();
        self.inner.stop.store(true, Ordering::Release);
        for link in &self.inner.links {
            link.kick();
        }
        for thread in self.threads.drain(..) {
            // The runner catches its shard's panics, so a thread that can't be joined has nothing left to say.
            drop(thread.join());
        }
        for mut shard in self.take_shards() {
            shard.close();
        }
        if let Some(page) = &self.stats_page {
            page.remove();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.controller.is_none() {
            return;
        }
        if !self.inner.is_here() {
            // The device, its queues and the threads are the parent's: a child leaves all of it alone.
            std::mem::forget((self.controller.take(), self.mirror_controller.take(), self.stats_page.take()));
            std::mem::forget((std::mem::take(&mut self.threads), self.take_shards()));
            return;
        }
        let dirty = self.stats().dirty_pages;
        if dirty > 0 {
            tracing::warn!(dirty, "the engine was dropped without close: dirty pages are lost");
        }
        self.stop();
    }
}

/// Syncs mappings at once, so that those behind one gate wait for it together; mirrored ones are closed, so that nothing
/// is written after their labels say that both halves are equal. The first error.
async fn close_all(mappings: &[Mapping]) -> Result<()> {
    let mut pending: Vec<_> = mappings.iter().map(|mapping| Box::pin(mapping.close_with_engine())).collect();
    let mut result = Ok(());
    std::future::poll_fn(|context| {
        pending.retain_mut(|sync| match sync.as_mut().poll(context) {
            Poll::Pending => true,
            Poll::Ready(synced) => {
                result = std::mem::replace(&mut result, Ok(())).and(synced);
                false
            }
        });
        if pending.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    result
}

/// Runs a future on this thread together with the shards that it needs.
fn drive<T>(shards: &mut [Shard], future: impl Future<Output = T>) -> T {
    let start = Instant::now();
    let first_ns = shards.iter().map(Shard::now_ns).max().unwrap_or(0);
    let mut future = std::pin::pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return output;
        }
        let now_ns = first_ns.saturating_add(nanoseconds(start.elapsed()));
        for shard in shards.iter_mut() {
            shard.poll(now_ns);
        }
    }
}

/// Opens the mirror's device: queue pairs, and no memory of its own.
fn open_mirror(transport: Arc<dyn Transport>, options: &EngineOptions) -> Result<Controller> {
    let controller = Controller::open(
        transport,
        &ControllerOptions {
            io_queue_pairs: options.shards as u16,
            io_queue_entries: options.queue_entries,
            arena_bytes: 0,
            max_transfer_bytes: options.transfer_bytes_max,
            hugepages: options.hugepages,
        },
    )?;
    Ok(controller)
}

impl MirrorSide {
    fn new(primary: &Controller, mirror: &Controller, same: bool) -> Result<Self> {
        let identity = mirror.identity();
        let iova_offset = match same {
            true => 0,
            false => mirror.map_arena(primary.arena())?.0.wrapping_sub(primary.arena().iova().0),
        };
        Ok(Self {
            on: if same { StreamId::Primary } else { StreamId::Mirror },
            namespaces: mirror.namespaces().to_vec(),
            write_zeroes: identity.write_zeroes,
            queue_entries: identity.queue_entries,
            durability: durabilities(mirror).collect(),
            iova_offset,
        })
    }
}

/// What is known of the durability of each of a controller's namespaces: nothing yet.
fn durabilities(controller: &Controller) -> impl Iterator<Item = (u32, Arc<Durability>)> {
    let identity = controller.identity();
    let cache = match (identity.volatile_write_cache, identity.force_unit_access) {
        (false, _) => WriteCache::None,
        (true, false) => WriteCache::Flushed,
        (true, true) => WriteCache::FlushedOrPassed,
    };
    controller.namespaces().iter().map(move |ns| (ns.id(), Arc::new(Durability::new(ns.id(), cache))))
}

/// Divides the arena among shards and builds them.
fn build_shards(
    controller: &Controller,
    mirror: Option<(&Controller, &MirrorSide)>,
    (options, placement): (&EngineOptions, &Placement),
    count: usize,
) -> Result<Vec<Shard>> {
    let frames = options.cache_bytes / PAGE_BYTES as u64 / count as u64;
    debug_assert!(frames >= FRAMES_MIN);
    let pages = |ns: &Namespace| capacity_bytes(ns).div_ceil(PAGE_BYTES as u64);
    let device_pages = controller.namespaces().iter().map(pages).fold(0, u64::saturating_add);
    // Of each mapping a shard may hold a stripe more than its share.
    let local_pages = if count == 1 { device_pages } else { device_pages / count as u64 };
    let dirty = DirtyLimits::new(
        frames,
        options.dirty_background_percent,
        options.dirty_percent,
        request_pages_max(frames),
    );
    let limits = ShardLimits {
        pin_wait_ns: nanoseconds(options.pin_wait),
        command_timeout_ns: nanoseconds(options.command_timeout),
        flush_interval_ns: nanoseconds(options.flush_interval),
        dirty,
        command_pages_max: controller.identity().max_transfer_bytes as usize / PAGE_BYTES,
        gate_wait_ns: nanoseconds(options.gate_wait),
        gated_pages_max: (frames * u64::from(options.gated_percent) / 100).clamp(1, u64::from(u32::MAX))
            as u32,
        log_reserve_frames: log_reserve_frames(options, frames) as usize,
    };
    let allocate = |pages: usize| -> Result<_> {
        Ok(controller.arena().allocate(pages * PAGE_BYTES).map_err(foliant_nvme::DriverError::from)?)
    };
    // The frames first: so they keep the alignment of the arena.
    let frame_buffers = (0..count).map(|_| allocate(frames as usize)).collect::<Result<Vec<_>>>()?;
    frame_buffers
        .into_iter()
        .enumerate()
        .map(|(shard, buffer)| {
            let near = placement.prefer(shard);
            let cache = ShardCache::new(shard, FrameMemory::new(buffer), local_pages, &dirty);
            let cache = cache.map_err(|error| Error::Os {
                what: "cannot map memory for the cache's tables (choose a smaller cache)",
                source: Arc::new(error),
            })?;
            drop(near);
            let (link, inbox) =
                ShardLink::new(shard, cache.shared.clone(), options, dirty.background as u32 + 1)?;
            let queue = controller.queue_pair()?;
            let watch = || DeviceWatch::new(limits.command_timeout_ns);
            let mirror = match mirror {
                Some((of, side)) => {
                    let (window, shared) = (allocate(WINDOW_PAGES as usize)?, cache.shared.clone());
                    let sizes = (queue.free_commands() as usize, limits.command_pages_max);
                    let own = (watch(), shared);
                    let stream = MirrorStream::new(of.queue_pair()?, side.iova_offset, window, own, sizes);
                    Some(Box::new(stream))
                }
                None => None,
            };
            let label_page = allocate(1)?;
            Ok(Shard::new(link, inbox, cache, (queue, mirror), label_page, limits.clone(), watch()))
        })
        .collect()
}

/// Frames that a shard of `frames` frames keeps for logs once one is open: at least what one request of theirs may ask for.
fn log_reserve_frames(options: &EngineOptions, frames: u64) -> u64 {
    (frames * u64::from(options.log_reserve_percent) / 100).max(request_pages_max(frames))
}

/// Pages that one request may ask for in a shard of `frames` frames: so that a few requests never need all.
fn request_pages_max(frames: u64) -> u64 {
    (frames / 8).clamp(1, GRANTS_MAX as u64)
}

/// Spawns the shards' threads, unless the caller drives.
fn start(
    shards: Vec<Shard>,
    threads: &ShardThreads,
    placement: &Placement,
    stop: &Arc<AtomicBool>,
) -> Result<(Vec<JoinHandle<Shard>>, Vec<Shard>)> {
    if *threads == ShardThreads::Manual {
        return Ok((Vec::new(), shards));
    }
    let origin = Instant::now();
    let spawn = |shard: Shard| {
        let number = shard.number();
        let core = placement.core(number).map(|id| core_affinity::CoreId { id });
        let stop = stop.clone();
        let body = move || {
            if let Some(core) = core
                && !core_affinity::set_for_current(core)
            {
                tracing::warn!(shard = number, core = core.id, "the shard's thread could not be pinned");
            }
            runner::run(shard, origin, &stop)
        };
        std::thread::Builder::new().name(format!("foliant-{number}")).spawn(body).map_err(|error| Error::Os {
            what: "cannot start a shard's thread (raise the limit of processes)",
            source: Arc::new(error),
        })
    };
    let threads = shards.into_iter().map(spawn).collect::<Result<_>>()?;
    Ok((threads, Vec::new()))
}

/// What the engine uses of a namespace: all of it, up to what page keys can name.
pub(crate) fn capacity_bytes(namespace: &Namespace) -> u64 {
    let limit = PAGE_BYTES as u64 * FolioKey::PAGES_MAX;
    namespace.blocks().saturating_mul(u64::from(namespace.block_bytes())).min(limit)
}

fn nanoseconds(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 2)
}
