//! Devices that are slow, and devices that nobody uses: what the engine does meanwhile.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use foliant::MappingOptions;
use foliant_guest::pattern;
use rustix::time::{ClockId, clock_gettime};
use serde::Deserialize;

use super::Job;
use crate::context::Context;
use crate::device;

pub(super) const JOBS: &[(&str, Job)] = &[("slow_device", slow_device), ("idle_device", idle_device)];

#[derive(Deserialize)]
struct Device {
    address: String,
}

const PAGE: u64 = foliant::PAGE_BYTES as u64;

/// A device that takes its time: everything ends well, and who finds his pages in the cache doesn't wait for it.
fn slow_device(context: &Context<'_>) {
    let Device { address } = context.arguments();
    let engine = device::engine(&address, &device::engine_options(4, 1));
    let mapping = engine.mapping(&MappingOptions::default()).expect("the mapping opens");
    mapping.write_at(0, &pattern::bytes(9, 0, PAGE as usize)).expect("the cache takes a page");
    let (done, hits) = (AtomicBool::new(false), AtomicU64::new(0));
    let misses_begun = engine.stats().read_commands;
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut page = vec![0; PAGE as usize];
            while !done.load(Ordering::Relaxed) {
                mapping.read_at(0, &mut page).expect("the page is in the cache");
                hits.fetch_add(1, Ordering::Relaxed);
            }
        });
        for page in 0..12 {
            mapping.read_at((1000 + page * 50) * PAGE, &mut [0; 8]).expect("a cold page");
        }
        for page in 100..130 {
            let offset = page * 3 * PAGE;
            mapping
                .write_at(offset, &pattern::bytes(9, offset, PAGE as usize))
                .expect("the cache takes a page");
        }
        mapping.sync().expect("the sync succeeds");
        done.store(true, Ordering::Relaxed);
    });
    let misses = engine.stats().read_commands - misses_begun;
    context.fact("hits", hits.load(Ordering::Relaxed));
    context.fact("misses", misses);
    assert!(hits.load(Ordering::Relaxed) > 100 * misses, "hits went on beside {misses} slow reads");
    engine.close().expect("the engine closes");
}

/// Reads that find the shard asleep.
const READS_ASLEEP: u64 = 20;

/// A device that nobody uses costs nothing: the shard sleeps until an interrupt, or a request, wakes it.
fn idle_device(context: &Context<'_>) {
    let Device { address } = context.arguments();
    let engine = device::engine(&address, &device::engine_options(4, 2));
    let mapping = engine.mapping(&MappingOptions::default()).expect("the mapping opens");
    for page in 0..64 {
        mapping.read_at(page * PAGE, &mut [0; 8]).expect("a cold page");
    }
    device::wait_until("every shard sleeps", Duration::from_secs(30), || engine.stats().sleeps >= 2);
    let (begun, cpu) = (Instant::now(), cpu_time());
    thread::sleep(Duration::from_secs(2));
    let share = (cpu_time() - cpu).as_secs_f64() / begun.elapsed().as_secs_f64();
    context.fact("cpu_share", share);

    // The device serves the next read only some milliseconds after it was asked, so that the shard is asleep by then: an
    // interrupt that comes before would not be needed, nor sent.
    let before = interrupts();
    for page in 0..READS_ASLEEP {
        thread::sleep(Duration::from_millis(5));
        mapping.read_at((1000 + page * 7) * PAGE, &mut [0; 8]).expect("a cold page");
    }
    context.fact("reads", READS_ASLEEP);
    context.fact("interrupts", interrupts() - before);
    context.fact("sleeps", engine.stats().sleeps);
    engine.close().expect("the engine closes");
}

/// Processor time of this process so far.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Interrupts that VFIO's devices raised so far, of all vectors.
fn interrupts() -> u64 {
    let table = fs::read_to_string("/proc/interrupts").expect("the kernel counts interrupts");
    let of_vfio = table.lines().filter(|line| line.contains("vfio"));
    let counts =
        of_vfio.flat_map(|line| line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()));
    counts.sum()
}
