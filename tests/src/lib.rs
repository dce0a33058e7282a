//! The bed on which cross-layer tests lie: an engine whose shards the test polls itself, on an emulated
//! controller with a clock that the test moves. Nothing happens between two steps, and nothing sleeps.
//!
//! [`model`] runs random operations, faults and power cuts on it against a plain model of what must hold.
//! [`conformance`] lies beside it: the driver alone, on any controller.

pub mod conformance;
pub mod model;

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use foliant::{DirtyMemory, Engine, EngineOptions, Hugepages, Mapping, MappingOptions, Shard, ShardThreads};
use foliant_nvme_emulated::{
    Action, Clock, EmulatedConfig, EmulatedController, Fault, ManualClock, Match, ObservedCommand,
};
use foliant_nvme_spec::{NvmOpcode, Status};

/// One I/O command as the controller fetched it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The submission queue.
    pub qid: u16,
    /// What it was.
    pub opcode: NvmOpcode,
    /// First block.
    pub slba: u64,
    /// Blocks; 0 where the command has none.
    pub blocks: u32,
    /// Bytes of its data that lie in the frame of the very page that the command names.
    pub in_frames_bytes: u64,
    /// All bytes of its data.
    pub bytes: u64,
}

/// An engine, its shards in the test's hands, and the device below.
pub struct Bed {
    /// The device.
    pub device: Arc<EmulatedController>,
    /// The engine; `None` after [`Bed::crash`].
    pub engine: Option<Engine>,
    shards: Vec<Shard>,
    clock: Arc<ManualClock>,
    seen: Arc<Mutex<Vec<Seen>>>,
    /// The device of mirrors, of a bed that has one.
    pub mirror: Option<Arc<EmulatedController>>,
    mirror_seen: Arc<Mutex<Vec<Seen>>>,
    options: EngineOptions,
}

/// Options for an engine that the test polls: `frames` pages of cache.
#[must_use]
pub fn options(frames: u64) -> EngineOptions {
    EngineOptions {
        cache_bytes: frames * 4096,
        threads: ShardThreads::Manual,
        hugepages: Hugepages::Never,
        queue_entries: 64,
        // The flusher and the limits keep out of the way unless a test wants them.
        dirty_background_percent: 90,
        dirty_percent: 100,
        ..Default::default()
    }
}

/// A memory device of `size_bytes` in blocks of 512 bytes that can lose power.
#[must_use]
pub fn fragile(size_bytes: u64) -> EmulatedConfig {
    EmulatedConfig {
        power_loss_model: true,
        volatile_write_cache: true,
        ..EmulatedConfig::ram(size_bytes, 512)
    }
}

/// The observers keep the frames of the engine that they locate, and those keep the device: a circle.
impl Drop for Bed {
    fn drop(&mut self) {
        self.device.observe(None);
        self.device.observe_events(None);
        if let Some(mirror) = &self.mirror {
            mirror.observe(None);
        }
    }
}

impl Bed {
    /// Builds a device of `config` and an engine on it.
    ///
    /// # Panics
    /// When either can't be had.
    #[must_use]
    pub fn new(config: EmulatedConfig, options: EngineOptions) -> Self {
        Self::on(config, None, options)
    }

    /// As [`new`](Self::new), with a second device for mirrors, by the same clock.
    ///
    /// # Panics
    /// When any of them can't be had.
    #[must_use]
    pub fn mirrored(config: EmulatedConfig, mirror: EmulatedConfig, options: EngineOptions) -> Self {
        Self::on(config, Some(mirror), options)
    }

    fn on(config: EmulatedConfig, mirror: Option<EmulatedConfig>, options: EngineOptions) -> Self {
        let clock = ManualClock::new();
        let device = |config| {
            let config = EmulatedConfig { clock: Clock::Manual(clock.clone()), ..config };
            EmulatedController::new(config).expect("the device is valid")
        };
        let mut bed = Self {
            device: device(config),
            mirror: mirror.map(device),
            engine: None,
            shards: Vec::new(),
            seen: Arc::default(),
            mirror_seen: Arc::default(),
            options,
            clock,
        };
        bed.power_on();
        bed
    }

    /// Attaches to the device (again) and opens an engine on it.
    ///
    /// # Panics
    /// When that fails.
    pub fn power_on(&mut self) {
        self.try_power_on().expect("the engine opens");
    }

    /// As [`power_on`](Self::power_on).
    ///
    /// # Errors
    /// The engine's.
    ///
    /// # Panics
    /// When the device is attached already.
    pub fn try_power_on(&mut self) -> foliant::Result<()> {
        let transport = self.device.attach().expect("nobody else is attached");
        let engine = match &self.mirror {
            None => Engine::open_on(transport, &self.options)?,
            Some(mirror) => {
                let second = mirror.attach().expect("nobody else is attached");
                Engine::open_mirrored_on(transport, second, &self.options)?
            }
        };
        if let Some(mirror) = &self.mirror {
            let (seen, locate) = (self.mirror_seen.clone(), engine.mirror_locator());
            mirror.observe(Some(Arc::new(move |command: &ObservedCommand<'_>| {
                let seen_command = seen_command(command, &locate);
                seen.lock().unwrap().push(seen_command);
            })));
        }
        self.shards = engine.take_shards();
        let (seen, locate) = (self.seen.clone(), engine.locator());
        self.device.observe(Some(Arc::new(move |command: &ObservedCommand<'_>| {
            let seen_command = seen_command(command, &locate);
            seen.lock().unwrap().push(seen_command);
        })));
        self.engine = Some(engine);
        Ok(())
    }

    /// The engine.
    ///
    /// # Panics
    /// After a crash.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        self.engine.as_ref().expect("the engine is open")
    }

    /// Opens the whole of namespace 1.
    ///
    /// # Panics
    /// When that fails.
    pub fn mapping(&mut self) -> Mapping {
        self.open(&MappingOptions::default())
    }

    /// Opens a mapping.
    ///
    /// # Panics
    /// When that fails.
    pub fn open(&mut self, options: &MappingOptions) -> Mapping {
        self.try_open(options).expect("the mapping opens")
    }

    /// As [`open`](Self::open).
    ///
    /// # Errors
    /// The engine's.
    ///
    /// # Panics
    /// After a crash.
    pub fn try_open(&mut self, options: &MappingOptions) -> foliant::Result<Mapping> {
        let engine = self.engine.take().expect("the engine is open");
        let mapping = self.run(engine.mapping_async(options));
        self.engine = Some(engine);
        mapping
    }

    /// One step of every shard; true when any did something.
    pub fn step(&mut self) -> bool {
        let now_ns = self.clock.now_ns();
        let progressed = self.shards.iter_mut().map(|shard| shard.poll(now_ns).progressed);
        progressed.fold(false, |any, one| any | one)
    }

    /// Steps until nothing happens any more without the clock moving.
    ///
    /// # Panics
    /// When that takes for ever.
    pub fn settle(&mut self) {
        let mut quiet = 0;
        for _ in 0..1_000_000 {
            quiet = if self.step() { 0 } else { quiet + 1 };
            if quiet == 4 {
                return;
            }
        }
        panic!("the shards never come to rest");
    }

    /// One step of one shard; true when it did something. Shards are counted round.
    pub fn step_shard(&mut self, shard: usize) -> bool {
        let now_ns = self.clock.now_ns();
        let count = self.shards.len();
        self.shards.get_mut(shard % count.max(1)).is_some_and(|shard| shard.poll(now_ns).progressed)
    }

    /// The time, in nanoseconds since the bed was made.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.clock.now_ns()
    }

    /// Moves the clock while nobody polls.
    pub fn pass_time(&mut self, by: Duration) {
        self.clock.advance(by);
    }

    /// The shards, for somebody else to poll.
    pub fn take_shards(&mut self) -> Vec<Shard> {
        std::mem::take(&mut self.shards)
    }

    /// One of the shards, for its owner's own passes.
    ///
    /// # Panics
    /// When there is no such shard.
    pub fn shard(&mut self, number: usize) -> &mut Shard {
        &mut self.shards[number]
    }

    /// Drops the shards, as an application does whose loop has ended.
    pub fn drop_shards(&mut self) {
        self.shards.clear();
    }

    /// What is dirty in each shard, and what may be.
    #[must_use]
    pub fn dirty_memory(&self) -> Vec<DirtyMemory> {
        self.shards.iter().map(Shard::dirty_memory).collect()
    }

    /// Settles, moves the clock, and settles again.
    pub fn advance(&mut self, by: Duration) {
        self.settle();
        self.clock.advance(by);
        self.settle();
    }

    /// Polls `future`, and the shards in between, until it is ready. The clock moves by a microsecond a step, so
    /// that modelled delays end.
    ///
    /// # Panics
    /// When it isn't ready after a very long (modelled) time.
    pub fn run<T>(&mut self, future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        for round in 0..20_000_000u64 {
            if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                return output;
            }
            if !self.step() {
                // Idle: let time pass faster and faster, up to the longest deadline.
                self.clock.advance(Duration::from_micros(1 + round / 64));
            }
        }
        panic!("the future never becomes ready");
    }

    /// Polls `future` once.
    pub fn poll_once<T>(
        &mut self,
        future: std::pin::Pin<&mut (impl Future<Output = T> + ?Sized)>,
    ) -> Poll<T> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    /// The commands of one kind seen since the last call of [`clear_seen`](Self::clear_seen).
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn seen(&self, opcode: NvmOpcode) -> Vec<Seen> {
        self.seen.lock().unwrap().iter().filter(|seen| seen.opcode == opcode).cloned().collect()
    }

    /// As [`seen`](Self::seen), of the mirror's device.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn mirror_seen(&self, opcode: NvmOpcode) -> Vec<Seen> {
        self.mirror_seen.lock().unwrap().iter().filter(|seen| seen.opcode == opcode).cloned().collect()
    }

    /// All commands in the order in which they were fetched.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn all_seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Forgets what was seen.
    ///
    /// # Panics
    /// Never.
    pub fn clear_seen(&self) {
        self.seen.lock().unwrap().clear();
        self.mirror_seen.lock().unwrap().clear();
    }

    /// Cuts the power and drops the engine. What the device kept shows after [`power_on`](Self::power_on).
    ///
    /// # Panics
    /// When the device has no power-loss model.
    pub fn crash(&mut self, seed: u64) {
        self.device.power_cut(seed).expect("the device models power loss");
        self.shards.clear();
        self.engine = None;
    }

    /// Closes the engine in order; afterwards [`power_on`](Self::power_on) opens it again.
    ///
    /// # Errors
    /// The engine's.
    ///
    /// # Panics
    /// After a crash.
    pub fn close(&mut self) -> foliant::Result<()> {
        let engine = self.engine.take().expect("the engine is open");
        engine.return_shards(std::mem::take(&mut self.shards));
        // Observers keep the frames.
        self.device.observe(None);
        if let Some(mirror) = &self.mirror {
            mirror.observe(None);
        }
        engine.close()
    }

    /// Drops the engine without closing it; the devices keep their power.
    pub fn drop_engine(&mut self) {
        self.device.observe(None);
        if let Some(mirror) = &self.mirror {
            mirror.observe(None);
        }
        self.shards.clear();
        self.engine = None;
    }

    /// Injects a fault on I/O commands of one kind: `skip` pass, then `times` are hit.
    pub fn fault(&self, opcode: NvmOpcode, skip: u64, times: u64, action: Action) {
        self.device.inject(Fault { matching: Match::io(opcode).after(skip, times), action });
    }

    /// Makes `times` commands of one kind fail with `status`, after `skip` that pass.
    pub fn fail(&self, opcode: NvmOpcode, skip: u64, times: u64, status: Status) {
        self.fault(opcode, skip, times, Action::Status(status));
    }

    /// Checks that every folio's marks and state agree.
    ///
    /// # Panics
    /// When they don't.
    pub fn assert_consistent(&self) {
        #[cfg(debug_assertions)]
        self.shards.iter().for_each(Shard::assert_consistent);
    }
}

fn seen_command(
    command: &ObservedCommand<'_>,
    locate: &impl Fn(foliant::Iova) -> Option<(u32, foliant::Lba)>,
) -> Seen {
    let mut at = 0;
    let mut in_frames_bytes = 0;
    // Segments may be merged by the observer: look at each page of the data by itself.
    for segment in command.segments {
        let mut within = 0;
        while within < segment.len_bytes {
            let len = (segment.len_bytes - within).min(4096 - (at % 4096) as usize);
            let wanted = (command.nsid, foliant::Lba(command.slba + at / 4096 * 8));
            if locate(segment.iova.offset(within as u64)) == Some(wanted) {
                in_frames_bytes += len as u64;
            }
            at += len as u64;
            within += len;
        }
    }
    Seen {
        qid: command.qid,
        opcode: command.opcode,
        slba: command.slba,
        blocks: command.blocks,
        in_frames_bytes,
        bytes: at,
    }
}
