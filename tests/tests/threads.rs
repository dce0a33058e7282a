//! Threads at work on one engine: pages stay whole, no change is lost, whatever is evicted, written or waited for
//! meanwhile.
//!
//! Each page is 512 copies of one number: how often it was changed. A reader that meets two numbers in a page has
//! seen a torn page; a sum that is short at the end has lost a change.

#![expect(clippy::print_stdout, reason = "a randomised test prints its seed")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use foliant::{Engine, EngineOptions, Error, Hugepages, MappingOptions, ShardThreads};
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController, Latency, NamespaceConfig};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const PAGES: u64 = 1500;
const CHANGES: u64 = 6000;

fn number(page: &[u8]) -> u64 {
    let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    let first = word(0);
    for at in (0..4096).step_by(8) {
        assert_eq!(word(at), first, "a torn page");
    }
    first
}

fn stress(config: EmulatedConfig, shards: usize, frames: u64, seed: u64) {
    println!("seed {seed}, {shards} shards");
    let device = EmulatedController::new(config).unwrap();
    let options = EngineOptions {
        cache_bytes: frames * 4096 * shards as u64,
        shards,
        hugepages: Hugepages::Never,
        flush_interval: Duration::from_millis(5),
        threads: ShardThreads::Floating,
        ..Default::default()
    };
    let engine = Engine::open_on(device.attach().unwrap(), &options).unwrap();
    let mapping =
        engine.mapping(&MappingOptions { len_bytes: Some(PAGES * 4096), ..Default::default() }).unwrap();
    let stop = AtomicBool::new(false);
    let changes = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3)
            .map(|writer| {
                let (mapping, changes) = (&mapping, &changes);
                scope.spawn(move || {
                    let mut random = SmallRng::seed_from_u64(seed + writer);
                    for _ in 0..CHANGES / 3 {
                        // Some pages are hot, so that writers meet.
                        let page = if random.random_bool(0.3) {
                            random.random_range(0..8)
                        } else {
                            random.random_range(0..PAGES)
                        };
                        let mut pin = mapping.pin_mut(page).unwrap();
                        let next = number(&pin) + 1;
                        pin.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&next.to_le_bytes()));
                        drop(pin);
                        changes.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            let mut random = SmallRng::seed_from_u64(seed + 100);
            let mut buffer = vec![0; 40 * 4096];
            while !stop.load(Ordering::Relaxed) {
                let pages = random.random_range(1..40);
                let first = random.random_range(0..PAGES - pages);
                let bytes = &mut buffer[..(pages * 4096) as usize];
                mapping.read_at(first * 4096, bytes).unwrap();
                bytes.chunks_exact(4096).for_each(|page| assert!(number(page) <= CHANGES));
                let pin = mapping.pin(random.random_range(0..PAGES)).unwrap();
                number(&pin);
                // Hot pages, which writers take as well: held by a published pin, or not held at all.
                for page in (0..8).cycle().take(64) {
                    number(&mapping.pin(page).unwrap());
                    let seen = mapping.read_with(page, |page| {
                        let mut copy = [0; 4096];
                        page.copy_to(0, &mut copy).expect("a whole page");
                        copy
                    });
                    number(&seen.unwrap());
                }
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                mapping.sync().unwrap();
            }
        });
        for writer in writers {
            writer.join().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(changes.into_inner(), CHANGES);
    let stats = engine.stats();
    assert!(stats.pages_evicted > 0 && stats.pages_written > 0, "{stats:?}");
    engine.close().unwrap();
    let mut page = [0; 4096];
    let mut sum = 0;
    for index in 0..PAGES {
        device.read_image(1, index * 4096, &mut page).unwrap();
        sum += number(&page);
    }
    assert_eq!(sum, CHANGES, "changes were lost");
}

fn seed() -> u64 {
    std::env::var("FOLIANT_SEED").map_or(7, |seed| seed.parse().expect("a number"))
}

#[test]
fn no_change_is_lost_and_no_page_torn_on_memory_with_one_shard() {
    stress(EmulatedConfig::ram(8 << 20, 512), 1, 64, seed());
}

#[test]
fn no_change_is_lost_and_no_page_torn_on_memory_with_three_shards() {
    stress(EmulatedConfig::ram(8 << 20, 4096), 3, 64, seed());
}

#[test]
fn no_change_is_lost_and_no_page_torn_on_a_slow_device_with_short_queues() {
    let latency = Latency::uniform(Duration::from_micros(20));
    let config =
        EmulatedConfig { latency, queue_entries_max: 8, mdts: 1, ..EmulatedConfig::ram(8 << 20, 512) };
    stress(config, 2, 40, seed());
}

#[test]
fn no_change_is_lost_and_no_page_torn_on_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let config = EmulatedConfig::file(dir.path().join("image"), NamespaceConfig::new(8 << 20, 512));
    stress(config, 2, 64, seed());
}

/// Pieces that end in the middle of pages, each thread's beside the others': one appends to the folio whose next page another
/// wants to change.
#[test]
fn threads_that_append_beside_each_other_are_all_served() {
    const PIECE: usize = 40_000;
    const LEN: u64 = 6 << 20;
    for round in 0..40u8 {
        let device = EmulatedController::new(EmulatedConfig::ram(16 << 20, 512)).unwrap();
        let options = EngineOptions { cache_bytes: 8 << 20, shards: 1, ..EngineOptions::default() };
        let engine = Engine::open_on(device.attach().unwrap(), &options).unwrap();
        let mapping = engine.mapping(&MappingOptions::default()).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let mapping = &mapping;
                scope.spawn(move || {
                    for offset in (0..LEN).step_by(PIECE).skip(thread).step_by(3) {
                        let len = PIECE.min((LEN - offset) as usize);
                        mapping
                            .write_at(offset, &vec![round.wrapping_add((offset % 251) as u8); len])
                            .unwrap();
                    }
                });
            }
        });
        let mut piece = vec![0; PIECE];
        for offset in (0..LEN).step_by(PIECE) {
            let len = PIECE.min((LEN - offset) as usize);
            mapping.read_at(offset, &mut piece[..len]).unwrap();
            assert!(
                piece[..len].iter().all(|&byte| byte == round.wrapping_add((offset % 251) as u8)),
                "at {offset}"
            );
        }
        drop(mapping);
        engine.close().unwrap();
    }
}

#[test]
fn a_cache_full_of_pins_is_an_error_by_deadline_and_recovers() {
    let options = EngineOptions {
        cache_bytes: 32 * 4096,
        hugepages: Hugepages::Never,
        pin_wait: Duration::from_millis(50),
        ..Default::default()
    };
    let engine = Engine::open("emu:ram?size=8MiB", &options).unwrap();
    let mapping = engine.mapping(&MappingOptions::default()).unwrap();
    let pins: Vec<_> = (0..32).map(|page| mapping.pin(page).unwrap()).collect();
    let error = mapping.read_at(100 * 4096, &mut [0; 1]).unwrap_err();
    assert!(matches!(error, Error::CacheFull { frames: 32, .. }), "{error}");
    drop(pins);
    mapping.read_at(100 * 4096, &mut [0; 1]).unwrap();
    engine.close().unwrap();
}

#[test]
fn an_exclusive_request_behind_a_pin_that_stays_is_an_error_that_names_the_page() {
    let options = EngineOptions {
        pin_wait: Duration::from_millis(50),
        hugepages: Hugepages::Never,
        ..Default::default()
    };
    let engine = Engine::open("emu:ram?size=8MiB", &options).unwrap();
    let mapping = engine.mapping(&MappingOptions::default()).unwrap();
    let pin = mapping.pin(3).unwrap();
    let error = std::thread::scope(|scope| scope.spawn(|| mapping.pin_mut(3).unwrap_err()).join().unwrap());
    assert!(matches!(error, Error::PinnedTooLong { page: 3, .. }), "{error}");
    drop(pin);
    mapping.pin_mut(3).unwrap()[0] = 1;
    engine.close().unwrap();
}

#[test]
fn requests_that_wait_when_the_engine_is_dropped_end_with_an_error() {
    for _ in 0..20 {
        let device = EmulatedController::new(EmulatedConfig {
            latency: Latency::uniform(Duration::from_millis(2)),
            ..EmulatedConfig::ram(8 << 20, 512)
        })
        .unwrap();
        let options = EngineOptions { hugepages: Hugepages::Never, ..Default::default() };
        let engine = Engine::open_on(device.attach().unwrap(), &options).unwrap();
        let mapping = Arc::new(engine.mapping(&MappingOptions::default()).unwrap());
        let waiting: Vec<_> = (0..4u64)
            .map(|thread| {
                let mapping = mapping.clone();
                std::thread::spawn(move || {
                    (0..500).find_map(|i| mapping.read_at((thread * 500 + i) * 4096, &mut [0; 1]).err())
                })
            })
            .collect();
        drop(engine);
        for thread in waiting {
            assert!(matches!(thread.join().unwrap(), Some(Error::Closed)));
        }
    }
}
