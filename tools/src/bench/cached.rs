//! Through the page cache: as many threads as accesses in flight, each with a handle of the same mapping.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use foliant::{Engine, EngineOptions, Mapping, MappingOptions};

use super::surroundings::Drive;
use super::timeline::Timeline;
use super::workload::{Direction, Load, Workload};
use super::{CachedActivity, Measured};
use crate::activity::CacheActivity;
use crate::cli::BenchOptions;
use crate::error::Error;
use crate::progress::Progress;
use crate::target::Target;

const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// Threads when no depth is given.
pub(crate) const DEPTH: u16 = 4;

pub(crate) fn measure(options: &BenchOptions, target: &Target, load: Load) -> Result<Measured, Error> {
    let device = target.open()?;
    let engine = Engine::open_on(
        device.attach()?,
        &EngineOptions {
            cache_bytes: options.cache.0,
            shards: options.shards.into(),
            stats_page: options.stats.page(),
            ..EngineOptions::default()
        },
    )?;
    let mapping = engine.mapping(&MappingOptions::default())?;
    let namespace = engine.namespaces().iter().find(|namespace| namespace.id() == 1);
    let namespace = namespace.expect("the mapping of namespace 1 could be opened");
    let workload = Workload::new(options, namespace, load)?;
    let drive = Drive::new(target, engine.identity(), namespace, engine.arena_backing());
    let timeline = Timeline::new(workload.duration);
    let begin = Instant::now();
    let diagnose = |error| target.diagnose(error, Some(&mapping));
    let (reads, writes) = run(&mapping, &workload, &timeline).map_err(diagnose)?;
    let elapsed = begin.elapsed();
    let synced = Instant::now();
    mapping.sync().map_err(|error| diagnose(error.into()))?;
    let cache = CachedActivity {
        cache: CacheActivity::from(&engine.stats()),
        last_sync_seconds: synced.elapsed().as_secs_f64(),
    };
    let shards = Some(engine.shards());
    drop(mapping);
    engine.close()?;
    Ok(Measured {
        reads,
        writes,
        elapsed,
        latencies: timeline.total(),
        windows: timeline.windows(),
        drive,
        doorbells: None,
        cache: Some(cache),
        shards,
        workload,
    })
}

/// Reads and writes of all threads together.
fn run(mapping: &Mapping, workload: &Workload, timeline: &Timeline) -> Result<(u64, u64), Error> {
    let stop = AtomicBool::new(false);
    let progress = Progress::time(workload.duration);
    progress.stage(format!("{} threads", workload.depth));
    let parts = u64::from(workload.depth);
    std::thread::scope(|scope| {
        let stop = &stop;
        let spawn = |part| {
            scope.spawn(move || {
                let result = run_part(mapping, workload, timeline, part, stop);
                stop.fetch_or(result.is_err(), Ordering::Relaxed);
                result
            })
        };
        let threads: Vec<_> = (0..parts).map(spawn).collect();
        let begin = Instant::now();
        while begin.elapsed() < workload.duration && !stop.load(Ordering::Relaxed) {
            std::thread::sleep(PROGRESS_INTERVAL.min(workload.duration.saturating_sub(begin.elapsed())));
            progress.set(begin.elapsed().as_millis() as u64);
        }
        stop.store(true, Ordering::Relaxed);
        let mut all = (0, 0);
        for thread in threads {
            let ended = thread.join().unwrap_or(Err(Error::ThreadPanicked { what: "measured" }));
            let (reads, writes) = ended?;
            all.0 += reads;
            all.1 += writes;
        }
        Ok(all)
    })
}

fn run_part(
    mapping: &Mapping,
    workload: &Workload,
    timeline: &Timeline,
    part: u64,
    stop: &AtomicBool,
) -> Result<(u64, u64), Error> {
    let mut accesses = workload.accesses(part, workload.depth.into());
    let mut buffer = vec![0xA5; workload.block_bytes as usize];
    let mut recorder = timeline.recorder();
    let (mut reads, mut writes) = (0, 0);
    while !stop.load(Ordering::Relaxed) {
        let (direction, index) = accesses.next();
        let offset = index * workload.block_bytes;
        let begin = Instant::now();
        match direction {
            Direction::Read => {
                mapping.read_at(offset, &mut buffer)?;
                reads += 1;
            }
            Direction::Write => {
                mapping.write_at(offset, &buffer)?;
                writes += 1;
            }
        }
        let end = Instant::now();
        recorder.record(end, end - begin);
    }
    Ok((reads, writes))
}
