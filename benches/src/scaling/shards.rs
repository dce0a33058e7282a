//! Throughput by the number of shards: measured costs, a simulation that plays them on as many cores as are wanted, and
//! a real engine of as many shards on one core.
//!
//! Two cores show one thread and one shard that don't share a core, and no more. So the parts of a request are measured
//! here, [`simulation`](super::simulation) puts them together for more, and says for what two cores can do what it
//! comes to beside what was measured. What a simulation can't show is whether a request itself costs more with
//! more shards; that a real engine does, with all its shards driven by one thread.

use std::collections::VecDeque;
use std::future::Future;
use std::hint::black_box;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use anyhow::{Result, anyhow, ensure};
use core_affinity::CoreId;
use foliant::{Engine, EngineOptions, Mapping, MappingOptions, PagePin, Shard, ShardThreads};
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::curve::{Picture, Series, Stroke};
use super::instructions;
use super::simulation::{Costs, Scenario, accesses_per_second};
use crate::engine::quiet_options;
use crate::measure::{Effort, median};
use crate::report::{Answer, Cell, Limit, Row, Table, Target};
use crate::walk::PAGE;

/// Numbers of shards that are measured, and simulated.
const SHARDS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
/// Shares of accesses that miss.
const MISSES: [(&str, f64); 4] = [("hits only", 0.0), ("1 % misses", 0.01), ("10 %", 0.1), ("100 %", 1.0)];
/// Requests in each shard at once, where a real engine shows what one costs.
pub const REQUESTS_A_SHARD: usize = 16;
/// Frames of a shard.
pub const SHARD_FRAMES: u64 = 1 << 10;
/// Pages that lie in one shard side by side.
const STRIPE_PAGES: u64 = 512;
/// Pages of the device a shard that are missed in turn: so many that none comes a second time, since a cache keeps a part of
/// whatever comes again.
const SHARD_PAGES: u64 = 1 << 22;
/// Requests of a burst to one shard: fewer than wait outside its inbox.
const BURST: usize = 192;
/// Pages that are hit in the mixed runs, and the frames of the one shard that has them.
const HOT_PAGES: u64 = 1 << 14;
const HOT_FRAMES: u64 = 1 << 15;
/// Of the model's clock.
const SIMULATED_NS: u64 = 20_000_000;
const SEED: u64 = 1;

/// Measures and simulates.
pub fn add_to(answer: &mut Answer, effort: Effort, plots: Option<&Path>) -> Result<()> {
    let rounds = if effort.quick { 200 } else { 2000 };
    ensure!(
        cores().len() >= 2,
        "`scaling` needs two cores for a thread beside a shard; this process may use one"
    );
    let costs = std::thread::scope(|scope| {
        let measuring = scope.spawn(|| {
            // The last core: interrupts and other programs like the first.
            pin_to(cores().last());
            let costs = add_costs(answer, rounds)?;
            add_real_shards(answer, rounds / 8)?;
            Ok::<_, anyhow::Error>(costs)
        });
        measuring.join().map_err(|_| anyhow!("the measuring thread panicked"))?
    })?;
    add_simulated(answer, &costs, plots)
}

/// What a round of requests took, in all.
#[derive(Clone, Copy, Debug, Default)]
struct Phases {
    send_ns: f64,
    serve_ns: f64,
    take_ns: f64,
}

/// An engine whose shards the caller drives, with its cache full.
pub struct Bed {
    mapping: Mapping,
    pub shards: Vec<Shard>,
    engine: Engine,
    origin: Instant,
    missed: Missed,
}

/// Pages that aren't cached, one after the other. The shards have them
/// in turn, so that requests that are a multiple of the shards are as many for each.
#[derive(Clone, Copy, Debug)]
struct Missed {
    /// The first of the device, at a round of stripes.
    first: u64,
    shards: u64,
    at: u64,
}

impl Missed {
    fn next(&mut self) -> u64 {
        let shard = self.at % self.shards;
        let local = self.at / self.shards * 97_003 % SHARD_PAGES;
        self.at += 1;
        self.first + (local / STRIPE_PAGES * self.shards + shard) * STRIPE_PAGES + local % STRIPE_PAGES
    }
}

/// A request that somebody polls.
type Asked<'m> = Pin<Box<dyn Future<Output = foliant::Result<PagePin<'m>>> + 'm>>;

fn ask<'m>(mapping: &'m Mapping, page: u64) -> Asked<'m> {
    Box::pin(mapping.pin_async(page))
}

impl Bed {
    /// `hot` pages that come before those that are missed.
    pub fn open(shards: usize, frames_a_shard: u64, hot: u64) -> Result<Self> {
        let missed = Missed { first: hot, shards: shards as u64, at: 0 };
        let bytes = (hot + SHARD_PAGES * shards as u64) * PAGE as u64;
        let config = EmulatedConfig { queue_pairs_max: 128, ..EmulatedConfig::null(bytes, PAGE as u32) };
        let device = EmulatedController::new(config)?;
        let cache_bytes = frames_a_shard * shards as u64 * PAGE as u64;
        let options = EngineOptions { cache_bytes, shards, threads: ShardThreads::Manual, ..quiet_options() };
        let engine = Engine::open_on(device.attach()?, &options)?;
        let mut owned = engine.take_shards();
        ensure!(owned.len() == shards, "{} shards instead of {shards}", owned.len());
        let origin = Instant::now();
        let options = MappingOptions { readahead_bytes_max: 0, ..MappingOptions::default() };
        let mapping = {
            let mut opening = Box::pin(engine.mapping_async(&options));
            let mut context = Context::from_waker(Waker::noop());
            loop {
                if let Poll::Ready(mapping) = opening.as_mut().poll(&mut context) {
                    break mapping?;
                }
                drive(&mut owned, origin)?;
            }
        };
        let mut bed = Self { mapping, shards: owned, engine, origin, missed };
        let mut context = Context::from_waker(Waker::noop());
        for page in 0..hot {
            let mapping = bed.mapping.clone();
            let mut asked = ask(&mapping, page);
            while asked.as_mut().poll(&mut context).is_pending() {
                drive(&mut bed.shards, origin)?;
            }
        }
        // Every frame in use, and eviction at work.
        for _ in 0..frames_a_shard * 5 / 4 / REQUESTS_A_SHARD as u64 {
            let mapping = bed.mapping.clone();
            let mut asked = bed.ask_missed(&mapping, REQUESTS_A_SHARD * shards);
            send(&mut asked)?;
            drive(&mut bed.shards, origin)?;
            take(&mut asked)?;
        }
        Ok(bed)
    }

    fn ask_missed<'m>(&mut self, mapping: &'m Mapping, requests: usize) -> Vec<Asked<'m>> {
        (0..requests).map(|_| ask(mapping, self.missed.next())).collect()
    }

    /// Sends requests for pages that aren't cached, has the shards serve them, and takes the answers.
    fn round(&mut self, requests: usize) -> Result<Phases> {
        let mapping = self.mapping.clone();
        let mut asked = self.ask_missed(&mapping, requests);
        let start = Instant::now();
        marked_send(&mut asked)?;
        let sent = Instant::now();
        marked_serve(&mut self.shards, self.origin)?;
        let served = Instant::now();
        marked_take(&mut asked)?;
        let taken = Instant::now();
        let ns = |from: Instant, to: Instant| to.duration_since(from).as_nanos() as f64;
        Ok(Phases { send_ns: ns(start, sent), serve_ns: ns(sent, served), take_ns: ns(served, taken) })
    }

    /// Many rounds, for who counts instructions.
    pub fn rounds(&mut self, rounds: usize, requests: usize) -> Result<()> {
        (0..rounds).try_for_each(|_| self.round(requests).map(drop))
    }

    /// Medians of a request's part in each phase.
    fn phases(&mut self, requests: usize, rounds: usize) -> Result<Phases> {
        let measured: Vec<Phases> = (0..rounds).map(|_| self.round(requests)).collect::<Result<_>>()?;
        let of = |part: fn(&Phases) -> f64| {
            median(&measured.iter().map(part).collect::<Vec<_>>()) / requests as f64
        };
        Ok(Phases {
            send_ns: of(|phases| phases.send_ns),
            serve_ns: of(|phases| phases.serve_ns),
            take_ns: of(|phases| phases.take_ns),
        })
    }

    /// A step of a shard that has nothing to do.
    fn idle_step_ns(&mut self, rounds: usize) -> f64 {
        const STEPS: u32 = 64;
        let mut figures = Vec::with_capacity(rounds);
        for _ in 0..rounds {
            let now_ns = self.origin.elapsed().as_nanos() as u64;
            let start = Instant::now();
            for step in 0..STEPS {
                let at = step as usize % self.shards.len();
                black_box(self.shards[at].poll(now_ns));
            }
            figures.push(start.elapsed().as_nanos() as f64 / f64::from(STEPS));
        }
        median(&figures)
    }
}

// What callgrind counts, and filling a cache isn't.

#[inline(never)]
fn marked_send(asked: &mut [Asked<'_>]) -> Result<()> {
    send(asked)
}

#[inline(never)]
fn marked_serve(shards: &mut [Shard], origin: Instant) -> Result<()> {
    drive(shards, origin)
}

#[inline(never)]
fn marked_take(asked: &mut [Asked<'_>]) -> Result<()> {
    take(asked)
}

fn send(asked: &mut [Asked<'_>]) -> Result<()> {
    let mut context = Context::from_waker(Waker::noop());
    for asked in asked {
        ensure!(asked.as_mut().poll(&mut context).is_pending(), "a page that should miss was cached");
    }
    Ok(())
}

fn take(asked: &mut [Asked<'_>]) -> Result<()> {
    let mut context = Context::from_waker(Waker::noop());
    for asked in asked {
        match asked.as_mut().poll(&mut context) {
            Poll::Ready(pin) => drop(pin?),
            Poll::Pending => return Err(anyhow!("the shards rest, and a request isn't answered")),
        }
    }
    Ok(())
}

/// Polls a request that another core serves until it is answered.
fn finish<'m>(asked: &mut Asked<'m>, context: &mut Context<'_>) -> Result<PagePin<'m>> {
    loop {
        if let Poll::Ready(pin) = asked.as_mut().poll(context) {
            return Ok(pin?);
        }
        std::hint::spin_loop();
    }
}

/// Polls the shards until all of them rest.
fn drive(shards: &mut [Shard], origin: Instant) -> Result<()> {
    for _ in 0..100_000 {
        let now_ns = origin.elapsed().as_nanos() as u64;
        let mut rests = true;
        for shard in &mut *shards {
            let step = shard.poll(now_ns);
            rests &= !step.progressed && !step.waiting;
        }
        if rests {
            return Ok(());
        }
    }
    Err(anyhow!("the shards don't come to rest"))
}

/// Measures what a request consists of, and what one thread and one shard on two cores come to.
fn add_costs(answer: &mut Answer, rounds: usize) -> Result<Costs> {
    let mut bed = Bed::open(1, SHARD_FRAMES, 0)?;
    let idle_ns = bed.idle_step_ns(rounds);
    let mut rows = Vec::new();
    let mut served = Vec::new();
    for requests in [1, 4, 16, 64] {
        let phases = bed.phases(requests, rounds)?;
        // Without the step that found nothing to do any more.
        let serve_ns = phases.serve_ns - idle_ns / requests as f64;
        let cells = [phases.send_ns, serve_ns, phases.take_ns].map(Cell::Figure).to_vec();
        rows.push(Row::new(format!("{requests} at once"), cells));
        served.push((requests as f64, serve_ns * requests as f64, phases));
    }
    answer.tables.push(Table {
        title: "measured: a request, one shard, one core".into(),
        columns: vec!["send, ns", "serve, ns", "take, ns"],
        rows,
    });
    drop(bed);
    let (one, many) = (&served[0], &served[served.len() - 1]);
    let request_ns = (many.1 - one.1) / (many.0 - one.0);
    let mut costs = Costs {
        hit_ns: 0.0,
        send_ns: many.2.send_ns,
        way_ns: 0.0,
        take_ns: many.2.take_ns,
        step_ns: (one.1 - request_ns).max(0.0),
        request_ns,
    };
    let beside = Beside::open(1)?;
    // In turns, so that a slow moment isn't the moment of one of them.
    let (mut hits, mut trips, mut bursts) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..9 {
        hits.push(beside.run(0.0, 1, rounds / 200)?.ns);
        trips.push(beside.run(1.0, 1, rounds / 40)?.ns);
        bursts.push(beside.bursts(rounds / 10)?);
    }
    costs.hit_ns = median(&hits);
    let round_trip_ns = median(&trips);
    // On two cores each side waits for lines that the other has changed: that's work of theirs, and no time on the way.
    let of = |part: fn(&Phases) -> f64| median(&bursts.iter().map(part).collect::<Vec<_>>());
    let burst = Phases {
        send_ns: of(|phases| phases.send_ns),
        serve_ns: of(|phases| phases.serve_ns),
        take_ns: of(|phases| phases.take_ns),
    };
    costs.send_ns = costs.send_ns.max(burst.send_ns);
    costs.take_ns = costs.take_ns.max(burst.take_ns);
    costs.request_ns = costs.request_ns.max(burst.serve_ns);
    let own_ns = costs.send_ns + costs.step_ns + costs.request_ns + costs.take_ns;
    costs.way_ns = ((round_trip_ns - own_ns) / 2.0).max(0.0);
    let figures = [
        ("a hit", costs.hit_ns),
        ("send", costs.send_ns),
        ("the way from core to core", costs.way_ns),
        ("a shard's step", costs.step_ns),
        ("and each request in it", costs.request_ns),
        ("take", costs.take_ns),
        ("an idle step", idle_ns),
    ];
    answer.tables.push(Table {
        title: "measured: what the simulation is given".into(),
        columns: vec!["ns"],
        rows: figures.map(|(name, ns)| Row::new(name, vec![Cell::Figure(ns)])).to_vec(),
    });
    let mut rows = vec![];
    let mut check = |beside: &Beside, misses, tasks, name: String| -> Result<()> {
        let run = beside.run(misses, tasks, rounds / 20)?;
        let scenario = Scenario { threads: 1, tasks, shards: 1, misses: run.misses };
        let simulated = 1e9 / accesses_per_second(&costs, scenario, SIMULATED_NS, SEED);
        let cells = [run.misses * 100.0, run.ns, simulated, simulated / run.ns].map(Cell::Figure).to_vec();
        rows.push(Row::new(name, cells));
        Ok(())
    };
    for (name, misses) in MISSES {
        check(&beside, misses, 1, format!("1 shard, {name}"))?;
    }
    for tasks in [4, 16, 64] {
        check(&beside, 1.0, tasks, format!("1 shard, 100 %, {tasks} tasks"))?;
    }
    drop(beside);
    let beside = Beside::open(2)?;
    check(&beside, 0.1, 1, "2 shards on one core, 10 %".into())?;
    check(&beside, 1.0, 1, "2 shards on one core, 100 %".into())?;
    answer.tables.push(Table {
        title: "one thread beside the shards' core".into(),
        columns: vec!["misses, %", "measured, ns an access", "simulated", "simulated ÷ measured"],
        rows,
    });
    Ok(costs)
}

/// Shards polled on the first core, and a thread that asks on the core of who calls.
struct Beside {
    mapping: Mapping,
    engine: Engine,
    missed: std::cell::Cell<Missed>,
    stop: Arc<AtomicBool>,
    polling: Option<std::thread::JoinHandle<()>>,
}

/// What a mixed run came to.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Time of an access.
    ns: f64,
    /// Share of accesses that missed.
    misses: f64,
}

impl Beside {
    fn open(shards: usize) -> Result<Self> {
        let Bed { mapping, mut shards, engine, origin, missed } =
            Bed::open(shards, HOT_FRAMES / shards as u64, HOT_PAGES)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let polling = std::thread::spawn(move || {
            pin_to(cores().first());
            while !stopped.load(Ordering::Relaxed) {
                let now_ns = origin.elapsed().as_nanos() as u64;
                for shard in &mut shards {
                    shard.poll(now_ns);
                }
            }
        });
        Ok(Self { mapping, engine, missed: missed.into(), stop, polling: Some(polling) })
    }

    fn next_missed(&self) -> u64 {
        let mut missed = self.missed.get();
        let page = missed.next();
        self.missed.set(missed);
        page
    }

    /// A request's part in bursts of many: sent as fast as can be, served on the other core, and taken when the last one is
    /// ready. A burst takes as long as its slower side, so what is called serving is the thread's sending where that is slower.
    fn bursts(&self, count: usize) -> Result<Phases> {
        let mut context = Context::from_waker(Waker::noop());
        let mut measured = Vec::with_capacity(count);
        for _ in 0..count {
            let mut asked: Vec<Asked<'_>> =
                (0..BURST).map(|_| ask(&self.mapping, self.next_missed())).collect();
            let (last, mut early) = (asked.pop(), 0);
            let start = Instant::now();
            // An answer may be there at once, where this thread is held up.
            for asked in &mut asked {
                if let Poll::Ready(pin) = asked.as_mut().poll(&mut context) {
                    drop(pin?);
                    *asked = Box::pin(std::future::pending());
                    early += 1;
                }
            }
            let sent = Instant::now();
            if let Some(mut last) = last {
                drop(finish(&mut last, &mut context)?);
            }
            let served = Instant::now();
            if early > 0 {
                // Not the burst that is to be measured.
                continue;
            }
            // One after the other: a step may have ended between their answers.
            for asked in &mut asked {
                drop(finish(asked, &mut context)?);
            }
            let taken = Instant::now();
            let ns = |from: Instant, to: Instant| to.duration_since(from).as_nanos() as f64 / BURST as f64;
            measured.push([ns(start, sent), ns(start, served), ns(served, taken)]);
        }
        ensure!(
            measured.len() * 2 > count,
            "most of {count} bursts were disturbed; measure on a quieter machine"
        );
        let of = |at: usize| median(&measured.iter().map(|phases| phases[at]).collect::<Vec<_>>());
        Ok(Phases { send_ns: of(0), serve_ns: of(1), take_ns: of(2) })
    }

    /// Accesses of which a share misses, in `blocks` blocks; medians of the blocks.
    fn run(&self, misses: f64, tasks: usize, blocks: usize) -> Result<Run> {
        // In use again, whatever came between.
        for page in (0..HOT_PAGES).chain(0..HOT_PAGES) {
            drop(self.mapping.pin(page)?);
        }
        let block = if misses > 0.0 { (256.0 / misses) as usize } else { 1 << 17 };
        let mut rng = SmallRng::seed_from_u64(SEED);
        let read = self.engine.stats().pages_read;
        let blocks = blocks.max(5);
        let mut figures = Vec::with_capacity(blocks);
        for _ in 0..blocks {
            let pages: Vec<(u64, usize)> = (0..block)
                .map(|_| {
                    let is_missed = misses > 0.0 && rng.random_bool(misses);
                    let page = if is_missed { self.next_missed() } else { rng.random_range(0..HOT_PAGES) };
                    (page, rng.random_range(0..PAGE / 8) * 8)
                })
                .collect();
            let start = Instant::now();
            if tasks == 1 {
                self.one_by_one(&pages)?
            } else {
                self.several(&pages, tasks)?
            }
            figures.push(start.elapsed().as_nanos() as f64 / block as f64);
        }
        let missed = self.engine.stats().pages_read - read;
        Ok(Run { ns: median(&figures), misses: missed as f64 / (blocks * block) as f64 })
    }

    fn one_by_one(&self, pages: &[(u64, usize)]) -> Result<()> {
        let mut sum = 0u64;
        for &(page, within) in pages {
            let pin = self.mapping.pin(page)?;
            sum = sum.wrapping_add(u64::from(pin[within]));
        }
        black_box(sum);
        Ok(())
    }

    /// With `tasks` requests on their way, whose answers are taken in their order.
    fn several(&self, pages: &[(u64, usize)], tasks: usize) -> Result<()> {
        let mut context = Context::from_waker(Waker::noop());
        let mut underway: VecDeque<Asked<'_>> = VecDeque::with_capacity(tasks);
        for &(page, _) in pages {
            if underway.len() == tasks
                && let Some(mut oldest) = underway.pop_front()
            {
                drop(finish(&mut oldest, &mut context)?);
            }
            let mut asked = ask(&self.mapping, page);
            if asked.as_mut().poll(&mut context).is_pending() {
                underway.push_back(asked);
            }
        }
        for mut asked in underway {
            drop(finish(&mut asked, &mut context)?);
        }
        Ok(())
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(polling) = self.polling.take() {
            // It can only have panicked, which its own message has told.
            let _ = polling.join();
        }
    }
}

/// What a request costs in a real engine of 1 to 64 shards, all driven by this thread.
fn add_real_shards(answer: &mut Answer, rounds: usize) -> Result<()> {
    let counted = instructions::count(&SHARDS)?;
    if let Err(why) = &counted {
        answer.notes.push(why.clone());
    }
    let mut rows = Vec::new();
    for (index, shards) in SHARDS.into_iter().enumerate() {
        let mut bed = Bed::open(shards, SHARD_FRAMES, 0)?;
        let phases = bed.phases(REQUESTS_A_SHARD * shards, (rounds / shards).max(20))?;
        let idle_ns = bed.idle_step_ns(rounds);
        let total_ns = phases.send_ns + phases.serve_ns + phases.take_ns;
        let counts = counted.as_ref().map_or([Cell::None; 3], |counted| counted[index].map(Cell::Figure));
        let figures = [phases.send_ns, phases.serve_ns, phases.take_ns, total_ns, idle_ns];
        let cells = counts.into_iter().chain(figures.map(Cell::Figure)).collect();
        rows.push(Row::new(format!("{shards} shards"), cells));
    }
    answer.tables.push(Table {
        title: format!(
            "measured: a request in an engine of so many shards, {REQUESTS_A_SHARD} in each at once, one thread for all"
        ),
        columns: vec![
            "send, instr.", "serve, instr.", "take, instr.", "send, ns", "serve, ns", "take, ns", "together, ns", "an idle step, ns"],
        rows,
    });
    let sum = |counted: [f64; 3]| counted.iter().sum::<f64>();
    let grown = counted.ok().map(|counted| sum(counted[counted.len() - 1]) / sum(counted[0]));
    answer.targets.push(Target::new(
        "instructions of a request with 64 shards beside 1",
        "times",
        Limit::AtMost(1.1),
        grown,
    ));
    Ok(())
}

/// Plays the costs for 1 to 64 shards.
fn add_simulated(answer: &mut Answer, costs: &Costs, plots: Option<&Path>) -> Result<()> {
    type Threads = fn(usize) -> usize;
    let arrangements: [(&str, &str, Threads, usize); 3] = [
        ("a thread a shard", "scaling-shards-threads.svg", |shards| shards, 1),
        ("a thread a shard, 16 tasks each", "scaling-shards-tasks.svg", |shards| shards, 16),
        ("64 threads", "scaling-shards-64.svg", |_| 64, 1),
    ];
    for (name, file, threads, tasks) in arrangements {
        let rate = |shards, misses| {
            let scenario = Scenario { threads: threads(shards), tasks, shards, misses };
            accesses_per_second(costs, scenario, SIMULATED_NS, SEED) / 1e6
        };
        let series: Vec<Series> = MISSES
            .into_iter()
            .enumerate()
            .map(|(color, (name, misses))| Series {
                name,
                points: SHARDS.map(|shards| (shards as f64, rate(shards, misses))).to_vec(),
                color,
                stroke: Stroke::Solid,
            })
            .collect();
        let rows = SHARDS.into_iter().enumerate().map(|(index, shards)| {
            let cells = series.iter().map(|series| Cell::Figure(series.points[index].1)).collect();
            Row::new(format!("{shards} shards"), cells)
        });
        answer.tables.push(Table {
            title: format!("simulated: million accesses a second, {name}"),
            columns: MISSES.map(|(name, _)| name).to_vec(),
            rows: rows.collect(),
        });
        if let Some(folder) = plots {
            let title = format!("Simulated: accesses by the number of shards, {name}");
            Picture { title: &title, across: "shards", up: "million accesses a second", series }
                .draw(&folder.join(file))?;
        }
    }
    answer.notes.extend([
        "shards, simulated: every thread and shard has a core of its own, and nothing else is shared: no memory bandwidth, no \
         caches, a device that takes no time (its work on commands is in the shard's)"
            .into(),
        "send, take and a request are those of bursts across two cores; the way from core to core is what a thread measures of a \
         miss beyond them, so 100 % of misses and one task agree by construction"
            .into(),
    ]);
    Ok(())
}

/// The cores that this process may run on, as its first caller finds them: a thread that is pinned, and those that it spawns,
/// see one core only.
fn cores() -> &'static [CoreId] {
    static CORES: OnceLock<Vec<CoreId>> = OnceLock::new();
    CORES.get_or_init(|| core_affinity::get_core_ids().unwrap_or_default())
}

fn pin_to(core: Option<&CoreId>) {
    if let Some(&core) = core {
        core_affinity::set_for_current(core);
    }
}
