//! `versus misses`: what the engine adds to a read that has to go to the device, and what a batch of such reads comes to
//! beside the raw driver at the same depth.
//!
//! Every read is of a page that isn't cached, in a cache that is full: so each takes a frame from the eviction hand, as it
//! does in the long run. On the shard, the thread that asks polls the shard itself, and driver, engine and emulated
//! device share its core. From another thread the shard spins on a core of its own. Parked, it sleeps when the
//! request comes, and so does the thread that waits, if the answer takes long enough.

pub mod instructions;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use core_affinity::CoreId;
use foliant::{Engine, EngineOptions, Mapping, MappingOptions, ReadAt, Shard, ShardThreads};
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController, Latency};

use crate::driver::NullBed;
use crate::engine::quiet_options;
use crate::measure::{Contestant, Effort, ThreadClock, Timed, median, race};
use crate::report::{Answer, Cell, Limit, Row, Table, Target};
use crate::walk::PAGE;

/// Pages of a device; far more than the cache has frames.
const PAGES: u64 = 1 << 16;
const CACHE_BYTES: u64 = 32 << 20;
/// Frames of the cache.
const CACHE_PAGES: usize = CACHE_BYTES as usize / PAGE;
/// From one page to the next: no scan, and no page again before all others.
const STEP: u64 = 97_003;
/// Pages of a batch.
const BATCH: usize = 64;
/// Device time of the slow device.
const SLOW: Duration = Duration::from_micros(80);

/// A device that is measured.
#[derive(Clone, Copy)]
struct Below {
    name: &'static str,
    config: fn() -> EmulatedConfig,
}

const NULL: Below = Below { name: "null", config: || EmulatedConfig::null(PAGES * PAGE as u64, PAGE as u32) };
const RAM: Below = Below { name: "ram", config: || EmulatedConfig::ram(PAGES * PAGE as u64, PAGE as u32) };
const SLOW_RAM: Below = Below {
    name: "ram, 80 µs",
    config: || EmulatedConfig {
        latency: Latency::uniform(SLOW),
        ..EmulatedConfig::ram(PAGES * PAGE as u64, PAGE as u32)
    },
};

/// Measures single misses and batches.
pub fn answer(effort: Effort) -> Result<Answer> {
    // Before any thread is pinned.
    let _ = cores();
    let rounds = effort.rounds(11);
    let count = if effort.quick { 1 << 12 } else { 1 << 15 };
    let mut answer =
        Answer { question: "misses", rounds, tables: Vec::new(), targets: Vec::new(), notes: Vec::new() };
    let measured = std::thread::scope(|scope| {
        let measuring = scope.spawn(|| {
            // The last core: interrupts and other programs like the first.
            pin_to(Core::Last);
            add_single(&mut answer, rounds, count)?;
            add_batches(&mut answer, rounds, count)
        });
        measuring.join().map_err(|_| anyhow!("the measuring thread panicked"))?
    });
    measured?;
    instructions::add_table(&mut answer)?;
    answer.notes.push(
        "the raw driver reads into memory of its own; a pin shows the bytes in place, a read copies them"
            .into(),
    );
    answer.notes.push(
        "the emulated device copies by the processor. The raw driver's few buffers stay in its cache; frames can't, since they \
         hold what was read before: with as many buffers as frames, by turns in random order, the raw driver reads as a \
         cache does, and what we add is judged against that"
            .into(),
    );
    answer
        .notes
        .push("from another thread, and parked: time on the wall, since two threads take part".into());
    Ok(answer)
}

fn add_single(answer: &mut Answer, rounds: usize, count: usize) -> Result<()> {
    for below in [NULL, RAM] {
        let mut raw = NullBed::on((below.config)(), PAGES, 1)?;
        raw.reads(1, PAGES as usize)?;
        let mut spread = NullBed::with_buffers((below.config)(), PAGES, CACHE_PAGES)?;
        spread.scatter_buffers();
        spread.reads(1, PAGES as usize)?;
        let mut pinning = OwnShard::open(below)?;
        let mut reading = OwnShard::open(below)?;
        let timed = race(
            rounds,
            &mut [
                Contestant::new("raw driver", || raw.reads(1, count)),
                Contestant::new("on the shard, pinned", || timed(count, |count| pinning.pins(count))),
                Contestant::new("raw driver, as many buffers as frames", || spread.reads(1, count)),
                Contestant::new("on the shard, copied", || timed(count, |count| reading.reads(count))),
            ],
        )?;
        drop((pinning, reading));
        // One after the other: what spins in the background takes a core from the others.
        let beside = BesideShard::open(below, ShardSleeps::Never)?;
        let mut elsewhere = race(rounds, &mut [Contestant::new("another thread", || beside.pins(count))])?;
        drop(beside);
        let parked = BesideShard::open(below, ShardSleeps::WhenIdle)?;
        let awake =
            race(rounds.min(3), &mut [Contestant::new("parked", || parked.pins_after_rests(count / 64))])?;
        drop(parked);
        let (raw_ns, spread_ns) = (timed[0].median(), timed[2].median());
        elsewhere[0].name = "from another thread, shard spinning";
        let all = [&timed[0], &timed[2], &timed[1], &timed[3], &elsewhere[0], &awake[0]];
        let row = |timed: &&Timed| {
            let ns = timed.median();
            Row::new(timed.name, [ns, timed.best(), ns - raw_ns, ns - spread_ns].map(Cell::Figure).to_vec())
        };
        answer.tables.push(Table {
            title: format!("4 KiB reads that miss, one at a time, {}", below.name),
            columns: vec!["ns", "best", "beyond the raw driver", "with as many buffers"],
            rows: all.iter().map(row).collect(),
        });
        let mut target = |what: &str, most: f64, timed: &Timed| {
            let what =
                format!("a miss {what} beyond the raw driver's read with as many buffers, {}", below.name);
            let beyond = timed.median() - spread_ns;
            answer.targets.push(Target::new(what, "ns", Limit::AtMost(most), Some(beyond)));
        };
        target("on the shard", 1000.0, &timed[1]);
        target("from another thread, both spinning,", 3000.0, &elsewhere[0]);
    }
    Ok(())
}

fn add_batches(answer: &mut Answer, rounds: usize, count: usize) -> Result<()> {
    let mut rows = Vec::new();
    for below in [NULL, RAM, SLOW_RAM] {
        let count = if below.name == SLOW_RAM.name { count / 8 } else { count };
        let mut raw = NullBed::on((below.config)(), PAGES, BATCH)?;
        raw.reads(BATCH, PAGES as usize)?;
        let mut spread = NullBed::with_buffers((below.config)(), PAGES, CACHE_PAGES)?;
        spread.scatter_buffers();
        spread.reads(BATCH, PAGES as usize)?;
        let mut copying = OwnShard::open(below)?;
        let mut pinning = OwnShard::open(below)?;
        let timed = race(
            rounds,
            &mut [
                Contestant::new("raw", || raw.reads(BATCH, count)),
                Contestant::new("read_many", || timed(count, |count| copying.batches(count))),
                Contestant::new("raw, spread", || spread.reads(BATCH, count)),
                Contestant::new("pin_many", || timed(count, |count| pinning.pinned_batches(count))),
            ],
        )?;
        let per_doorbell = copying.commands_per_doorbell();
        let [raw, read, spread, pinned] = &timed[..] else { unreachable!("four take part") };
        let judged = spread.ratio_to(read);
        let figures = [
            raw.median(),
            spread.median(),
            read.median(),
            raw.ratio_to(read),
            judged,
            pinned.median(),
            raw.ratio_to(pinned),
            spread.ratio_to(pinned),
            per_doorbell,
        ];
        rows.push(Row::new(below.name, figures.map(Cell::Figure).to_vec()));
        // Nothing that keeps a page is nearly as cheap as the null device's 46 ns a read.
        if below.name != NULL.name {
            answer.targets.push(Target::new(
                format!(
                    "read_many of {BATCH} scattered pages beside the raw driver with as many buffers, {}",
                    below.name
                ),
                "times",
                Limit::AtLeast(0.9),
                Some(judged),
            ));
        }
    }
    answer.tables.push(Table {
        title: format!("{BATCH} scattered pages at once, on the shard"),
        columns: vec![
            "raw, ns a page",
            "as many buffers as frames",
            "read_many",
            "of the raw rate",
            "with as many buffers",
            "pin_many",
            "of the raw rate",
            "with as many buffers",
            "commands a doorbell",
        ],
        rows,
    });
    Ok(())
}

/// The pages that are read, one after the other: each is long out of the cache when it comes again.
#[derive(Debug, Default)]
struct Walk(u64);

impl Walk {
    fn next(&mut self) -> u64 {
        self.0 = (self.0 + STEP) % PAGES;
        self.0
    }
}

/// The processor time of one of `count` reads, in nanoseconds.
fn timed(count: usize, reads: impl FnOnce(usize) -> Result<()>) -> Result<f64> {
    let clock = ThreadClock::start();
    reads(count)?;
    Ok(clock.elapsed_ns() / count as f64)
}

fn options(threads: ShardThreads) -> EngineOptions {
    EngineOptions { cache_bytes: CACHE_BYTES, shards: 1, threads, ..quiet_options() }
}

/// An engine whose one shard belongs to the thread that asks.
struct OwnShard {
    mapping: Mapping,
    shard: Shard,
    engine: Engine,
    _device: Arc<EmulatedController>,
    origin: Instant,
    walk: Walk,
    buffers: Vec<[u8; PAGE]>,
}

impl OwnShard {
    fn open(below: Below) -> Result<Self> {
        let device = EmulatedController::new((below.config)())?;
        let engine = Engine::open_on(device.attach()?, &options(ShardThreads::Manual))?;
        let mut shard = engine.take_shards().pop().ok_or_else(|| anyhow!("an engine without a shard"))?;
        let origin = Instant::now();
        let now_ns = || origin.elapsed().as_nanos() as u64;
        let mapping = shard.block_on(now_ns, engine.mapping_async(&MappingOptions::default()))?;
        let buffers = vec![[0; PAGE]; BATCH];
        let mut own =
            Self { mapping, shard, engine, _device: device, origin, walk: Walk::default(), buffers };
        // The cache is full from here on, and the device's memory there.
        own.pinned_batches(PAGES as usize)?;
        Ok(own)
    }

    fn pins(&mut self, count: usize) -> Result<()> {
        let origin = self.origin;
        for _ in 0..count {
            let pinned = self.mapping.pin_async(self.walk.next());
            drop(self.shard.block_on(|| origin.elapsed().as_nanos() as u64, pinned)?);
        }
        Ok(())
    }

    fn reads(&mut self, count: usize) -> Result<()> {
        let origin = self.origin;
        for _ in 0..count {
            let read = self.mapping.read_at_async(self.walk.next() * PAGE as u64, &mut self.buffers[0]);
            self.shard.block_on(|| origin.elapsed().as_nanos() as u64, read)?;
        }
        Ok(())
    }

    /// Reads pages in batches.
    fn batches(&mut self, count: usize) -> Result<()> {
        let origin = self.origin;
        for _ in 0..count / BATCH {
            let walk = &mut self.walk;
            let mut reads =
                self.buffers.iter_mut().map(|buffer| ReadAt::new(walk.next() * PAGE as u64, buffer));
            let mut reads: [ReadAt<'_>; BATCH] =
                std::array::from_fn(|_| reads.next().expect("a buffer each"));
            let read = self.mapping.read_many_async(&mut reads);
            self.shard.block_on(|| origin.elapsed().as_nanos() as u64, read)?;
        }
        Ok(())
    }

    fn pinned_batches(&mut self, count: usize) -> Result<()> {
        let origin = self.origin;
        for _ in 0..count / BATCH {
            let pages: [u64; BATCH] = std::array::from_fn(|_| self.walk.next());
            let pinned = self.mapping.pin_many_async(&pages);
            drop(self.shard.block_on(|| origin.elapsed().as_nanos() as u64, pinned)?);
        }
        Ok(())
    }

    fn commands_per_doorbell(&self) -> f64 {
        let stats = self.engine.stats();
        stats.commands as f64 / stats.doorbells as f64
    }
}

/// When the thread of a shard sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ShardSleeps {
    Never,
    WhenIdle,
}

/// An engine whose one shard has another thread.
struct BesideShard {
    mapping: Mapping,
    _engine: Engine,
    _device: Arc<EmulatedController>,
    stop: Arc<AtomicBool>,
    spinning: Option<std::thread::JoinHandle<()>>,
    walk: std::cell::Cell<u64>,
}

impl BesideShard {
    fn open(below: Below, sleeps: ShardSleeps) -> Result<Self> {
        let device = EmulatedController::new((below.config)())?;
        let stop = Arc::new(AtomicBool::new(false));
        let threads = match sleeps {
            ShardSleeps::Never => ShardThreads::Manual,
            ShardSleeps::WhenIdle => ShardThreads::Floating,
        };
        // Threads of the engine's begin where their maker may run: not on the core that measures.
        let open = || {
            pin_to(Core::First);
            Ok::<_, anyhow::Error>(Engine::open_on(device.attach()?, &options(threads))?)
        };
        let opened = std::thread::scope(|scope| scope.spawn(open).join());
        let engine =
            opened.map_err(|_| anyhow::anyhow!("the thread that opens an engine has panicked"))??;
        let spinning = (sleeps == ShardSleeps::Never).then(|| {
            let (mut shards, stop) = (engine.take_shards(), stop.clone());
            std::thread::spawn(move || {
                pin_to(Core::First);
                let origin = Instant::now();
                while !stop.load(Ordering::Relaxed) {
                    for shard in &mut shards {
                        shard.poll(origin.elapsed().as_nanos() as u64);
                    }
                }
            })
        });
        let mapping = engine.mapping(&MappingOptions::default())?;
        let walk = std::cell::Cell::new(0);
        let beside = Self { mapping, _engine: engine, _device: device, stop, spinning, walk };
        for _ in 0..PAGES / BATCH as u64 {
            let pages: [u64; BATCH] = std::array::from_fn(|_| beside.next());
            drop(beside.mapping.pin_many(&pages)?);
        }
        Ok(beside)
    }

    fn next(&self) -> u64 {
        let mut walk = Walk(self.walk.get());
        let page = walk.next();
        self.walk.set(page);
        page
    }

    fn pins(&self, count: usize) -> Result<f64> {
        let start = Instant::now();
        for _ in 0..count {
            drop(self.mapping.pin(self.next())?);
        }
        Ok(start.elapsed().as_nanos() as f64 / count as f64)
    }

    /// The median of misses before each of which everything has come to rest.
    fn pins_after_rests(&self, count: usize) -> Result<f64> {
        let mut figures = Vec::with_capacity(count);
        for _ in 0..count.max(3) {
            std::thread::sleep(Duration::from_millis(2));
            let start = Instant::now();
            drop(self.mapping.pin(self.next())?);
            figures.push(start.elapsed().as_nanos() as f64);
        }
        Ok(median(&figures))
    }
}

impl Drop for BesideShard {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(spinning) = self.spinning.take() {
            // It can only have panicked, which its own message has told.
            let _ = spinning.join();
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Core {
    First,
    Last,
}

/// The cores that this process may run on, as its first caller finds them: a thread that is pinned, and those that it spawns,
/// see one core only.
fn cores() -> &'static [CoreId] {
    static CORES: OnceLock<Vec<CoreId>> = OnceLock::new();
    CORES.get_or_init(|| core_affinity::get_core_ids().unwrap_or_default())
}

fn pin_to(core: Core) {
    let cores = cores();
    let core = match core {
        Core::First => cores.first(),
        Core::Last => cores.last(),
    };
    if let Some(&core) = core {
        core_affinity::set_for_current(core);
    }
}
