//! What a running engine shows of itself to other processes: right, in time, and at no cost while it is idle.

use std::path::PathBuf;
use std::time::Duration;

use foliant::{
    Engine, EngineOptions, EngineState, Hugepages, MappingOptions, Shard, ShardRecord, ShardThreads,
    StatsPage, StatsReader, StatsSnapshot, Step,
};
use foliant_nvme_emulated::{Action, EmulatedConfig, EmulatedController, Latency};
use foliant_nvme_spec::NvmOpcode;
use foliant_tests::{Bed, options};
use tempfile::TempDir;

/// A bed whose engine has a stats page.
struct Shown {
    bed: Bed,
    reader: StatsReader,
    path: PathBuf,
    _place: TempDir,
}

fn shown(config: EmulatedConfig, wanted: EngineOptions) -> Shown {
    let place = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = place.path().join("page");
    let bed = Bed::new(config, EngineOptions { stats_page: StatsPage::At(path.clone()), ..wanted });
    let reader = StatsReader::open(&path).unwrap();
    Shown { bed, reader, path, _place: place }
}

/// The sum of a metric over all shards.
fn sum(snapshot: &StatsSnapshot, name: &str) -> u64 {
    let of = |record: &ShardRecord| snapshot.value(record, name).expect("the page has it");
    snapshot.shards.iter().flatten().map(of).sum()
}

#[test]
fn what_shards_publish_is_what_the_engine_counts() {
    for shards in [1, 2, 4] {
        let wanted = EngineOptions { shards, ..options(256 * shards as u64) };
        let mut shown = shown(EmulatedConfig::ram(64 << 20, 512), wanted);
        let bed = &mut shown.bed;
        let mapping = bed.mapping();
        let data = vec![7; 3 << 20];
        bed.run(mapping.write_at_async(4096, &data[..400_000])).unwrap();
        bed.run(mapping.sync_async()).unwrap();
        let mut buffer = data;
        bed.run(mapping.read_at_async(8 << 20, &mut buffer[..1 << 20])).unwrap();
        bed.run(mapping.write_at_async(32 << 20, &buffer[..100_000])).unwrap();
        bed.advance(Duration::from_millis(100));
        let (stats, snapshot) = (bed.engine().stats(), shown.reader.read().unwrap());
        assert_eq!(snapshot.state, EngineState::Running);
        let expected = [
            ("read_hits", stats.read_hits),
            ("write_hits", stats.write_hits),
            ("requests", stats.requests),
            ("pages_read", stats.pages_read),
            ("pages_written", stats.pages_written),
            ("read_commands", stats.read_commands),
            ("flush_commands", stats.flush_commands),
            ("dirty_pages", stats.dirty_pages),
            ("frames", stats.frames),
            ("doorbells", stats.doorbells),
        ];
        for (name, value) in expected {
            assert_eq!(sum(&snapshot, name), value, "{name} with {shards} shards");
        }
        assert!(stats.dirty_pages > 0 && stats.read_commands > 0);
        let syncs =
            snapshot.shards.iter().flatten().filter_map(|record| snapshot.histogram(record, "sync_ns"));
        assert_eq!(syncs.map(|times| times.count()).sum::<u64>(), 1);
        drop(mapping);
        bed.close().unwrap();
        assert!(!shown.path.exists(), "a page goes with its engine");
        assert_eq!(shown.reader.state(), EngineState::Ended);
    }
}

#[test]
fn times_are_those_of_the_device() {
    let latency = Latency {
        read: Duration::from_micros(100),
        write: Duration::from_micros(400),
        flush: Duration::from_millis(3),
    };
    let config = EmulatedConfig { latency, volatile_write_cache: true, ..EmulatedConfig::ram(16 << 20, 512) };
    let mut shown = shown(config, options(512));
    let bed = &mut shown.bed;
    let mapping = bed.mapping();
    let mut page = [1; 4096];
    for number in 0..20u64 {
        // At distances that grow, so that nothing is read ahead.
        let at = number * number * 7;
        bed.run(mapping.read_at_async(at * 4096, &mut page)).unwrap();
        bed.run(mapping.write_at_async(at * 4096, &page)).unwrap();
        bed.run(mapping.write_at_async((at + 5) * 4096, &page)).unwrap();
        bed.run(mapping.sync_async()).unwrap();
    }
    bed.advance(Duration::from_millis(200));
    let snapshot = shown.reader.read().unwrap();
    let record = snapshot.shards[0].as_ref().unwrap();
    let times = |name: &str| snapshot.histogram(record, name).unwrap();
    for (name, exact_us) in [("read_wait_ns", 100), ("write_command_ns", 400), ("flush_command_ns", 3000)] {
        let (count, median_us) = (times(name).count(), times(name).quantile_ns(0.5).unwrap() / 1000);
        assert!(count >= 20, "{name}: {count}");
        // The bed moves its clock by more than a microsecond while it waits, and a bucket is a quarter wide.
        assert!((exact_us * 3 / 4..exact_us * 3 / 2).contains(&median_us), "{name}: {median_us} us");
    }
}

/// Polls a shard as its owner must: at once while it does something, and then when it says. Returns the number of steps.
fn poll_until(shard: &mut Shard, now_ns: &mut u64, until_ns: u64) -> u64 {
    let mut steps = 0;
    loop {
        steps += 1;
        let Step { progressed, due_ns, .. } = shard.poll(*now_ns);
        if progressed {
            continue;
        }
        let due_ns = due_ns.unwrap_or(u64::MAX).max(*now_ns + 1);
        if due_ns >= until_ns {
            *now_ns = until_ns;
            return steps;
        }
        *now_ns = due_ns;
    }
}

const SECOND: u64 = 1_000_000_000;

#[test]
fn an_idle_shard_asks_for_no_step_at_all_and_one_a_second_with_a_page() {
    const HOUR: u64 = 3600 * SECOND;
    let place = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = place.path().join("page");
    for (stats_page, steps_max) in [(StatsPage::None, 20), (StatsPage::At(path.clone()), 3620)] {
        for shards in [1, 3] {
            let wanted =
                EngineOptions { shards, stats_page: stats_page.clone(), ..options(256 * shards as u64) };
            let mut bed = Bed::new(EmulatedConfig::ram(16 << 20, 512), wanted);
            let mapping = bed.mapping();
            bed.run(mapping.write_at_async(0, &[1; 100_000])).unwrap();
            bed.run(mapping.sync_async()).unwrap();
            bed.settle();
            let begin_ns = bed.now_ns();
            let mut all = bed.take_shards();
            for shard in &mut all {
                let steps = poll_until(shard, &mut begin_ns.clone(), begin_ns + HOUR);
                assert!(steps <= steps_max, "{steps} steps in an idle hour, with {stats_page:?}");
            }
            // Who drives shards keeps them for as long as handles may ask.
            drop((mapping, all));
        }
    }
}

#[test]
fn a_shard_that_goes_to_sleep_shows_within_a_tenth_of_a_second_what_it_did_last() {
    let mut shown = shown(EmulatedConfig::ram(16 << 20, 512), options(256));
    let mapping = shown.bed.mapping();
    shown.bed.advance(Duration::from_secs(3));
    let before = sum(&shown.reader.read().unwrap(), "pages_read");
    shown.bed.run(mapping.read_at_async(1 << 20, &mut [0; 4096])).unwrap();
    shown.bed.settle();
    let mut now_ns = shown.bed.now_ns();
    let mut shards = shown.bed.take_shards();
    let until_ns = now_ns + SECOND / 10 + 1;
    poll_until(&mut shards[0], &mut now_ns, until_ns);
    shards[0].poll(now_ns);
    let snapshot = shown.reader.read().unwrap();
    assert_eq!(sum(&snapshot, "pages_read"), before + 1);
}

#[test]
fn hits_that_others_have_while_a_shard_sleeps_show_within_a_second() {
    let mut shown = shown(EmulatedConfig::ram(16 << 20, 512), options(256));
    let mapping = shown.bed.mapping();
    shown.bed.run(mapping.read_at_async(0, &mut [0; 4096])).unwrap();
    shown.bed.advance(Duration::from_secs(2));
    let before = sum(&shown.reader.read().unwrap(), "read_hits");
    for _ in 0..100 {
        // No shard is polled for these.
        mapping.read_at(0, &mut [0; 4096]).unwrap();
    }
    let mut now_ns = shown.bed.now_ns();
    let mut shards = shown.bed.take_shards();
    let until_ns = now_ns + SECOND;
    poll_until(&mut shards[0], &mut now_ns, until_ns);
    shards[0].poll(now_ns);
    assert_eq!(sum(&shown.reader.read().unwrap(), "read_hits"), before + 100);
}

#[test]
fn a_shard_counts_the_time_that_it_sleeps() {
    let mut shown = shown(EmulatedConfig::ram(16 << 20, 512), options(256));
    let _mapping = shown.bed.mapping();
    shown.bed.settle();
    let mut now_ns = shown.bed.now_ns();
    let mut shards = shown.bed.take_shards();
    let shard = &mut shards[0];
    shard.poll(now_ns);
    for _ in 0..10 {
        shard.prepare_to_sleep();
        now_ns += SECOND;
        shard.wake();
        shard.poll(now_ns);
    }
    assert_eq!(sum(&shown.reader.read().unwrap(), "slept_ns"), 10 * SECOND);
}

#[test]
fn writers_that_are_slowed_show_on_the_page() {
    let latency = Latency { write: Duration::from_secs(1), ..Latency::default() };
    let config = EmulatedConfig { latency, ..EmulatedConfig::ram(16 << 20, 512) };
    let wanted = EngineOptions { dirty_background_percent: 10, dirty_percent: 30, ..options(128) };
    let mut shown = shown(config, wanted);
    let bed = &mut shown.bed;
    let mapping = bed.mapping();
    let data = [1; 4096 * 100];
    let mut write = Box::pin(mapping.write_at_async(0, &data));
    assert!(bed.poll_once(write.as_mut()).is_pending());
    for _ in 0..150 {
        bed.settle();
        bed.pass_time(Duration::from_millis(1));
        assert!(bed.poll_once(write.as_mut()).is_pending());
    }
    bed.settle();
    let snapshot = shown.reader.read().unwrap();
    let [writers, dirty, writeback, freerun, limit] =
        ["throttled_writers", "dirty_pages", "writeback_pages", "dirty_freerun_pages", "dirty_limit_pages"]
            .map(|name| sum(&snapshot, name));
    assert_eq!(writers, 1, "{dirty} dirty, {writeback} under writeback, limit {limit}");
    assert!(dirty + writeback > freerun && dirty + writeback <= limit);
    bed.run(write).unwrap();
}

#[test]
fn a_shard_that_has_failed_says_so() {
    let wanted = EngineOptions { command_timeout: Duration::from_secs(1), ..options(256) };
    let mut shown = shown(EmulatedConfig::ram(16 << 20, 512), wanted);
    let mapping = shown.bed.mapping();
    shown.bed.fault(NvmOpcode::READ, 0, 1, Action::Drop);
    let read = shown.bed.run(mapping.read_at_async(0, &mut [0; 4096]));
    assert!(read.is_err());
    shown.bed.advance(Duration::from_secs(2));
    assert_eq!(sum(&shown.reader.read().unwrap(), "failed"), 1);
}

#[test]
fn an_engine_whose_page_cannot_be_had_does_not_open() {
    let place = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = place.path().join("taken");
    std::fs::write(&path, "by something else").unwrap();
    let wanted = EngineOptions { stats_page: StatsPage::At(path), ..options(256) };
    let error = Engine::open("emu:ram?size=16MiB", &wanted).unwrap_err().to_string();
    assert!(error.contains("no stats page") && error.contains("taken"), "{error}");
}

/// Real threads: how often they step while nothing happens is bounded by what they sleep, not by the machine's speed.
#[test]
fn threads_of_an_idle_engine_sleep() {
    let device = EmulatedController::new(EmulatedConfig::ram(16 << 20, 512)).unwrap();
    let wanted = EngineOptions {
        cache_bytes: 4 << 20,
        shards: 2,
        hugepages: Hugepages::Never,
        threads: ShardThreads::Floating,
        ..Default::default()
    };
    let engine = Engine::open_on(device.attach().unwrap(), &wanted).unwrap();
    let mapping = engine.mapping(&MappingOptions::default()).unwrap();
    mapping.write_at(0, &[1; 100_000]).unwrap();
    mapping.sync().unwrap();
    let before = engine.stats();
    for round in 1..=100u64 {
        mapping.read_at(round * 37 % 3000 * 4096, &mut [0; 4096]).unwrap();
        // Whoever was asked goes back to sleep by itself.
        while engine.stats().sleeps < before.sleeps + round {
            std::thread::yield_now();
        }
    }
    let after = engine.stats();
    let events = (after.requests - before.requests)
        + (after.sleeps - before.sleeps)
        + (after.commands - before.commands)
        + (after.readahead_pages - before.readahead_pages);
    let polls = after.polls - before.polls;
    assert!(polls <= 1500 * (events + 4), "{polls} steps for {events} requests, commands and sleeps");
}
