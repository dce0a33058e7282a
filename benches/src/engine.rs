//! An engine that the measuring thread drives itself: its shards are polled between the polls of a future, so that
//! one core does all the work and one clock sees it.

use std::future::Future;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use foliant::{Engine, EngineOptions, Mapping, MappingOptions, Pass, Shard, ShardThreads, WritebackControl};
use foliant_nvme_emulated::EmulatedController;

use crate::walk::PAGE;

/// A mapping over the whole of an emulated device, and what it needs.
///
/// The fields are dropped in this order; what is dirty is lost. The device can be attached to again afterwards.
pub struct DrivenEngine {
    pub mapping: Mapping,
    shards: Vec<Shard>,
    pub engine: Engine,
    pub device: Arc<EmulatedController>,
    origin: Instant,
    /// Where `read_page` reads to.
    byte: [u8; 1],
}

impl DrivenEngine {
    /// Opens an engine with `cache_bytes` of cache and `shards` shards, that writes back only when it is asked to:
    /// no timer, no threshold below nine tenths of the cache.
    pub fn open(device: Arc<EmulatedController>, cache_bytes: u64, shards: usize) -> Result<Self> {
        Self::open_with(device, cache_bytes, shards, &MappingOptions::default())
    }

    /// The same with a mapping of one's own choice.
    pub fn open_with(
        device: Arc<EmulatedController>,
        cache_bytes: u64,
        shards: usize,
        mapping: &MappingOptions,
    ) -> Result<Self> {
        let options = EngineOptions { cache_bytes, shards, threads: ShardThreads::Manual, ..quiet_options() };
        let engine = Engine::open_on(device.attach()?, &options)?;
        let mut shards = engine.take_shards();
        let origin = Instant::now();
        let mapping = drive(&mut shards, origin, engine.mapping_async(mapping))?;
        Ok(Self { mapping, shards, engine, device, origin, byte: [0] })
    }

    /// Writes one whole page.
    pub fn write_page(&mut self, page: u64, data: &[u8; PAGE]) -> Result<()> {
        let write = self.mapping.write_at_async(page * PAGE as u64, data);
        Ok(drive(&mut self.shards, self.origin, write)?)
    }

    /// Brings a page into the cache.
    pub fn read_page(&mut self, page: u64) -> Result<()> {
        let read = self.mapping.read_at_async(page * PAGE as u64, &mut self.byte);
        Ok(drive(&mut self.shards, self.origin, read)?)
    }

    /// Begins a pass in the first shard.
    pub fn begin_pass(&mut self, control: WritebackControl) -> Result<Pass> {
        Ok(self.shards[0].begin_pass(&self.mapping, control)?)
    }

    /// Syncs a range of bytes.
    pub fn sync_range(&mut self, range: Range<u64>) -> Result<()> {
        Ok(drive(&mut self.shards, self.origin, self.mapping.sync_range_async(range))?)
    }

    /// Has another thread sync a range of bytes, while this one goes on driving the shards.
    pub fn start_sync(&self, range: Range<u64>) -> Syncing {
        let mapping = self.mapping.clone();
        Syncing(std::thread::spawn(move || mapping.sync_range(range)))
    }

    /// Drives the shards until `is_done`.
    pub fn drive_until(&mut self, mut is_done: impl FnMut() -> bool) {
        let done = std::future::poll_fn(|_| if is_done() { Poll::Ready(()) } else { Poll::Pending });
        drive(&mut self.shards, self.origin, done);
    }

    /// Syncs the mapping.
    pub fn sync(&mut self) -> Result<()> {
        Ok(drive(&mut self.shards, self.origin, self.mapping.sync_async())?)
    }
}

/// A sync that another thread waits for.
pub struct Syncing(JoinHandle<foliant::Result<()>>);

impl Syncing {
    pub fn has_ended(&self) -> bool {
        self.0.is_finished()
    }

    /// What came of it. Its shards must be driven until it [has ended](Self::has_ended).
    pub fn result(self) -> Result<()> {
        self.0.join().map_err(|_| anyhow!("the thread that syncs has panicked"))??;
        Ok(())
    }
}

/// Options under which nothing happens in the background.
pub fn quiet_options() -> EngineOptions {
    EngineOptions {
        dirty_background_percent: 90,
        dirty_percent: 100,
        flush_interval: Duration::from_secs(24 * 3600),
        ..EngineOptions::default()
    }
}

/// Polls the future and the shards in turn until the future has its result.
fn drive<T>(shards: &mut [Shard], origin: Instant, future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(result) = future.as_mut().poll(&mut context) {
            return result;
        }
        for shard in &mut *shards {
            shard.poll(origin.elapsed().as_nanos() as u64);
        }
    }
}
