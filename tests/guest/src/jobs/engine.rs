//! The engine over VFIO: pages through the cache and down to the medium, from several threads and on several devices.

use std::fs;
use std::path::PathBuf;
use std::thread;

use foliant::{Engine, EngineOptions, EngineStats, Mapping, MappingOptions, ShardThreads};
use foliant_guest::pattern::{self, Change};
use serde::Deserialize;
use serde_json::json;

use super::Job;
use crate::context::Context;
use crate::device;

pub(super) const JOBS: &[(&str, Job)] = &[
    ("engine_writes", engine_writes),
    ("engines_at_once", engines_at_once),
    ("engine_syncs", engine_syncs),
    ("engine_near_device", engine_near_device),
    ("engine_reads", engine_reads),
];

#[derive(Clone, Deserialize)]
struct Writing {
    address: String,
    #[serde(default = "one")]
    nsid: u32,
    /// Shards asked for.
    shards: usize,
    seed: u64,
}

fn one() -> u32 {
    1
}

/// More than the cache holds, so that eviction takes part.
const CACHE_MIB: u64 = 4;
const WRITTEN_BYTES: u64 = 12 << 20;
/// A piece is no multiple of a page: pieces share pages.
const PIECE_BYTES: u64 = 40 * 1000;

/// Writes more than the cache holds from three threads, syncs, and reads it back through an engine opened anew.
fn engine_writes(context: &Context<'_>) {
    let writing: Writing = context.arguments();
    let engine = open(&writing);
    context.fact("shards", engine.shards());
    let mapping = map(&engine, &writing);
    write(&mapping, writing.seed);
    mapping.sync().expect("the sync succeeds");
    tell_stats(context, &engine.stats());
    mapping.close().expect("the mapping closes");
    engine.close().expect("the engine closes");

    let engine = open(&writing);
    read(&map(&engine, &writing), writing.seed);
    engine.close().expect("the engine closes");
    context.fact("changes", [written(writing.seed)]);
}

#[derive(Deserialize)]
struct Several {
    all: Vec<Named>,
}

#[derive(Deserialize)]
struct Named {
    /// What the host calls the controller's drive.
    name: String,
    #[serde(flatten)]
    writing: Writing,
}

/// Several engines in this process, each on a controller of its own, at work at the same time.
fn engines_at_once(context: &Context<'_>) {
    let Several { all } = context.arguments();
    let engines: Vec<_> = all.iter().map(|named| (open(&named.writing), &named.writing)).collect();
    thread::scope(|scope| {
        for (engine, writing) in &engines {
            scope.spawn(move || {
                let mapping = map(engine, writing);
                write(&mapping, writing.seed);
                mapping.sync().expect("the sync succeeds");
                read(&mapping, writing.seed);
            });
        }
    });
    for (engine, _) in engines {
        engine.close().expect("the engine closes");
    }
    for Named { name, writing } in &all {
        context.fact(name, [written(writing.seed)]);
    }
}

#[derive(Deserialize)]
struct Syncs {
    #[serde(flatten)]
    writing: Writing,
    rounds: u64,
}

/// Writes a page and syncs, again and again; tells how many flushes the engine says that it sent.
fn engine_syncs(context: &Context<'_>) {
    let Syncs { writing, rounds } = context.arguments();
    let engine = open(&writing);
    let mapping = map(&engine, &writing);
    for round in 0..rounds {
        mapping
            .write_at(round * 8192, &pattern::bytes(writing.seed, round * 8192, 4096))
            .expect("a page is written");
        mapping.sync().expect("the sync succeeds");
    }
    context.fact("volatile_write_cache", engine.identity().volatile_write_cache);
    tell_stats(context, &engine.stats());
    mapping.close().expect("the mapping closes");
    engine.close().expect("the engine closes");
}

/// Writes through shards near the device, and tells on which processors their threads may run, and how much of the memory
/// that was to lie on the device's node does.
fn engine_near_device(context: &Context<'_>) {
    let writing: Writing = context.arguments();
    let options = EngineOptions {
        threads: ShardThreads::NearDevice,
        ..device::engine_options(CACHE_MIB, writing.shards)
    };
    let engine = device::engine(&writing.address, &options);
    let mapping = map(&engine, &writing);
    write(&mapping, writing.seed);
    mapping.sync().expect("the sync succeeds");
    let (near_kib, far_kib) = preferred_kib(1);
    context.fact("cores", shard_cores());
    context.fact("near_kib", near_kib);
    context.fact("far_kib", far_kib);
    context.fact("cache_kib", CACHE_MIB << 10);
    mapping.close().expect("the mapping closes");
    engine.close().expect("the engine closes");
    context.fact("changes", [written(writing.seed)]);
}

/// Of the mappings of this process that prefer `node`: how many KiB lie there, and how many on others.
fn preferred_kib(node: u32) -> (u64, u64) {
    let maps = fs::read_to_string("/proc/self/numa_maps").expect("the kernel knows nodes");
    let policy = format!("prefer:{node}");
    let (mut near, mut far) = (0, 0);
    for line in maps.lines().filter(|line| line.split(' ').nth(1) == Some(&policy)) {
        let number = |word: &str| word.parse::<u64>().ok();
        let page_kib = line.split(' ').find_map(|word| number(word.strip_prefix("kernelpagesize_kB=")?));
        for (on, pages) in line.split(' ').filter_map(|word| word.strip_prefix('N')?.split_once('=')) {
            let kib = number(pages).unwrap_or(0) * page_kib.unwrap_or(4);
            *(if on == node.to_string() { &mut near } else { &mut far }) += kib;
        }
    }
    (near, far)
}

/// The processors that each shard's thread may run on.
fn shard_cores() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").expect("/proc is there").flatten().map(|task| task.path());
    let shards = tasks
        .filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("foliant-")));
    let cores = |task: PathBuf| {
        let status = fs::read_to_string(task.join("status")).ok()?;
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        Some(list.trim().to_owned())
    };
    shards.filter_map(cores).collect()
}

/// Reads what another program wrote.
fn engine_reads(context: &Context<'_>) {
    let reading: Writing = context.arguments();
    let engine = open(&reading);
    read(&map(&engine, &reading), reading.seed);
    engine.close().expect("the engine closes");
}

fn open(writing: &Writing) -> Engine {
    device::engine(&writing.address, &device::engine_options(CACHE_MIB, writing.shards))
}

fn map(engine: &Engine, writing: &Writing) -> Mapping {
    let options = MappingOptions { namespace: writing.nsid, ..MappingOptions::default() };
    engine.mapping(&options).unwrap_or_else(|error| panic!("namespace {}: {error}", writing.nsid))
}

fn written(seed: u64) -> Change {
    Change { offset: 0, len_bytes: WRITTEN_BYTES, seed: Some(seed) }
}

fn write(mapping: &Mapping, seed: u64) {
    let pieces =
        |thread: u64| (0..WRITTEN_BYTES).step_by(PIECE_BYTES as usize).skip(thread as usize).step_by(3);
    thread::scope(|scope| {
        for thread in 0..3 {
            scope.spawn(move || {
                for offset in pieces(thread) {
                    let len = PIECE_BYTES.min(WRITTEN_BYTES - offset) as usize;
                    mapping.write_at(offset, &pattern::bytes(seed, offset, len)).expect("a piece is written");
                }
            });
        }
    });
}

fn read(mapping: &Mapping, seed: u64) {
    let mut buffer = vec![0; 64 << 10];
    for offset in (0..WRITTEN_BYTES).step_by(buffer.len()) {
        mapping.read_at(offset, &mut buffer).expect("a piece is read");
        pattern::compare(seed, offset, &buffer).unwrap_or_else(|difference| panic!("{difference}"));
    }
}

fn tell_stats(context: &Context<'_>, stats: &EngineStats) {
    context.fact(
        "stats",
        json!({
            "read_commands": stats.read_commands,
            "write_commands": stats.write_commands,
            "flush_commands": stats.flush_commands,
            "pages_written": stats.pages_written,
            "pages_evicted": stats.pages_evicted,
        }),
    );
}
