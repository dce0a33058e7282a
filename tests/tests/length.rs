//! Mappings that grow and shrink: what is read, what the device gets, and what a power cut leaves.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use foliant::{Engine, EngineOptions, Error, Hugepages, Mapping, MappingOptions, ShardThreads};
use foliant_nvme_emulated::{Action, EmulatedConfig, EmulatedController, Latency};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use foliant_tests::{Bed, fragile, options};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const MIB: u64 = 1 << 20;
const CAPACITY: u64 = 8 * MIB;
/// What the device holds before a test: nothing of it may ever show.
const OLD: u8 = 0xEE;

/// A bed whose device is full of [`OLD`], and so are the frames of its cache.
fn used(config: &EmulatedConfig, shards: usize, frames: u64) -> Bed {
    let mut bed = Bed::new(config.clone(), EngineOptions { shards, ..options(frames * shards as u64) });
    let mapping = bed.open(&MappingOptions { len_bytes: Some(CAPACITY), ..Default::default() });
    bed.run(mapping.write_at_async(0, &vec![OLD; CAPACITY as usize])).unwrap();
    bed.run(mapping.close_async()).unwrap();
    bed.clear_seen();
    bed
}

fn growing(len_bytes: u64, page_bytes: u32) -> MappingOptions {
    MappingOptions {
        len_bytes: Some(len_bytes),
        capacity_bytes: Some(CAPACITY),
        page_bytes,
        ..Default::default()
    }
}

/// Page sizes and numbers of shards with which most tests run.
const SHAPES: [(u32, usize); 4] = [(4096, 1), (4096, 3), (16_384, 1), (16_384, 3)];

fn ram() -> EmulatedConfig {
    EmulatedConfig::ram(64 * MIB, 512)
}

fn read(bed: &mut Bed, mapping: &Mapping, offset: u64, count: u64) -> Vec<u8> {
    let mut bytes = vec![0x55; count as usize];
    bed.run(mapping.read_at_async(offset, &mut bytes)).unwrap();
    bytes
}

fn image(bed: &Bed, offset: u64, count: u64) -> Vec<u8> {
    let mut bytes = vec![0; count as usize];
    bed.device.read_image(1, offset, &mut bytes).unwrap();
    bytes
}

/// Blocks that writes have named, in bytes.
fn written(bed: &Bed) -> Vec<std::ops::Range<u64>> {
    let writes = bed.seen(NvmOpcode::WRITE);
    writes.iter().map(|seen| seen.slba * 512..(seen.slba + u64::from(seen.blocks)) * 512).collect()
}

#[test]
fn wb12_the_rest_of_the_last_page_is_written_as_zeros_and_nothing_behind_it() {
    for (page_bytes, shards) in SHAPES {
        let mut bed = used(&ram(), shards, 4096);
        let mapping = bed.open(&growing(0, page_bytes));
        assert!(mapping.is_empty() && mapping.capacity() == CAPACITY);
        // Large folios on the way, the last of which is filled in part only.
        let mut len = 0;
        for count in [5000u64, 700_000, 3, 2_100_000, 12_345] {
            assert_eq!(bed.run(mapping.append_async(&vec![1; count as usize])).unwrap(), len);
            len += count;
            assert_eq!(mapping.len(), len);
            bed.clear_seen();
            bed.run(mapping.sync_async()).unwrap();
            let end = len.next_multiple_of(u64::from(page_bytes));
            assert!(written(&bed).iter().all(|range| range.end <= end), "{:?} beyond {end}", written(&bed));
            assert!(image(&bed, 0, len).iter().all(|&byte| byte == 1));
            assert!(image(&bed, len, end - len).iter().all(|&byte| byte == 0), "behind {len}, {page_bytes}");
            assert!(image(&bed, end, 65_536).iter().all(|&byte| byte == OLD));
            bed.assert_consistent();
        }
        let reads: u64 = bed.seen(NvmOpcode::READ).iter().map(|read| u64::from(read.blocks)).sum();
        assert_eq!(reads, 0, "appending reads nothing");
    }
}

#[test]
fn wb12_what_a_mapping_gains_reads_as_zeros_and_what_it_lost_never_comes_back() {
    for (page_bytes, shards) in SHAPES {
        for fails in [false, true] {
            let mut bed = used(&ram(), shards, 1024);
            if fails {
                bed.fail(
                    NvmOpcode::WRITE_ZEROES,
                    0,
                    u64::MAX,
                    Status::of(StatusCode::INVALID_OPCODE).with_dnr(true),
                );
            }
            let mapping = bed.open(&growing(10_000, page_bytes));
            assert_eq!(
                read(&mut bed, &mapping, 0, 10_000),
                [OLD; 10_000],
                "what lies before the end is live"
            );
            bed.run(mapping.set_len_async(3_000_000)).unwrap();
            assert!(read(&mut bed, &mapping, 10_000, 2_990_000).iter().all(|&byte| byte == 0));
            bed.run(mapping.write_at_async(9_000, &vec![7; 2_000_000])).unwrap();
            bed.run(mapping.set_len_async(20_001)).unwrap();
            let error = bed.run(mapping.read_at_async(20_000, &mut [0; 2])).unwrap_err();
            assert!(matches!(error, Error::OutOfRange { len_bytes: 20_001, .. }), "{error}");
            bed.run(mapping.set_len_async(CAPACITY)).unwrap();
            assert_eq!(read(&mut bed, &mapping, 9_000, 11_001), [7; 11_001]);
            assert!(read(&mut bed, &mapping, 20_001, CAPACITY - 20_001).iter().all(|&byte| byte == 0));
            bed.run(mapping.sync_async()).unwrap();
            assert!(image(&bed, 20_001, CAPACITY - 20_001).iter().all(|&byte| byte == 0));
            let error = bed.run(mapping.append_async(&[1])).unwrap_err();
            assert!(matches!(error, Error::Capacity { capacity_bytes: CAPACITY, .. }), "{error}");
            bed.assert_consistent();
        }
    }
}

#[test]
fn wb12_a_page_wholly_behind_the_end_is_not_written_and_is_clean() {
    for (page_bytes, shards) in SHAPES {
        let mut bed = used(&ram(), shards, 4096);
        let page = u64::from(page_bytes);
        let mapping = bed.open(&growing(4 * MIB, page_bytes));
        // A writer that has begun before the mapping is shortened, and comes to most of its pages afterwards.
        let data = vec![1; 4 * MIB as usize];
        let mut late = pin!(mapping.write_at_async(0, &data));
        assert!(bed.poll_once(late.as_mut()).is_pending());
        let mut shrink = pin!(mapping.set_len_async(page + 100));
        let (mut wrote, mut shrunk) = (false, false);
        while !(wrote && shrunk) {
            shrunk = shrunk || bed.poll_once(shrink.as_mut()).map(Result::unwrap).is_ready();
            wrote = wrote || bed.poll_once(late.as_mut()).map(Result::unwrap).is_ready();
            bed.step();
        }
        bed.settle();
        let before = bed.engine().stats();
        assert!(before.dirty_pages > 300, "{} pages, most of them behind the end", before.dirty_pages);
        bed.assert_consistent();
        bed.clear_seen();
        bed.run(mapping.sync_async()).unwrap();
        assert!(written(&bed).iter().all(|range| range.end <= 2 * page), "{:?}", written(&bed));
        let after = bed.engine().stats();
        assert_eq!(after.dirty_pages, 0);
        assert!(after.pages_discarded > before.pages_discarded, "and they are counted");
        assert_eq!(image(&bed, page, 100), [1; 100]);
        assert!(image(&bed, page + 100, page - 100).iter().all(|&byte| byte == 0), "the page across the end");
        assert!(image(&bed, 2 * page, page).iter().all(|&byte| byte == OLD));
        bed.assert_consistent();
        // And it doesn't come back.
        bed.run(mapping.set_len_async(2 * MIB)).unwrap();
        assert!(read(&mut bed, &mapping, page + 100, 2 * MIB - page - 100).iter().all(|&byte| byte == 0));
    }
}

#[test]
fn wb26_shrinking_waits_for_writeback_and_pins_of_what_goes_and_nothing_of_it_is_written_later() {
    for (page_bytes, shards) in SHAPES {
        let mut bed = used(&ram(), shards, 1024);
        let page = u64::from(page_bytes);
        let mapping = bed.open(&growing(8 * page, page_bytes));
        bed.run(mapping.write_at_async(0, &vec![1; 8 * page as usize])).unwrap();
        bed.fault(NvmOpcode::WRITE, 0, 1, Action::Delay(Duration::from_secs(1)));
        bed.advance(Duration::from_secs(6));
        assert_eq!(bed.seen(NvmOpcode::WRITE).len(), 1, "in flight");
        let pin = bed.run(mapping.pin_async(6)).unwrap();
        let mut shrink = pin!(mapping.set_len_async(page + 100));
        assert!(bed.poll_once(shrink.as_mut()).is_pending());
        bed.advance(Duration::from_millis(1));
        assert!(bed.poll_once(shrink.as_mut()).is_pending(), "not before the write has ended");
        assert_eq!(mapping.len(), page + 100);
        assert_eq!(pin[0], 1);
        let error = bed.run(mapping.pin_async(5)).unwrap_err();
        assert!(
            matches!(error, Error::OutOfRange { .. }),
            "from the beginning on nobody gets at what goes: {error}"
        );
        bed.advance(Duration::from_secs(2));
        assert!(bed.poll_once(shrink.as_mut()).is_pending(), "nor while somebody looks at a page");
        drop(pin);
        bed.run(shrink).unwrap();
        bed.clear_seen();
        bed.run(mapping.write_at_async(0, &[2; 10])).unwrap();
        bed.run(mapping.sync_async()).unwrap();
        bed.advance(Duration::from_secs(10));
        assert!(written(&bed).iter().all(|range| range.end <= 2 * page), "{:?}", written(&bed));
        bed.assert_consistent();
    }
}

#[test]
fn wb26_a_shrinking_that_gives_up_has_shortened_the_mapping_and_the_next_change_removes_the_rest() {
    for (page_bytes, shards) in SHAPES {
        let mut bed = used(&ram(), shards, 1024);
        let page = u64::from(page_bytes);
        let mapping = bed.open(&growing(8 * page, page_bytes));
        bed.run(mapping.write_at_async(0, &vec![1; 8 * page as usize])).unwrap();
        // One page behind the new end, then the page across it.
        for held in [6, 1] {
            let pin = bed.run(mapping.pin_async(held)).unwrap();
            let error = bed.run(mapping.set_len_async(page + 100)).unwrap_err();
            assert!(matches!(error, Error::PinnedTooLong { .. }), "{error}");
            assert_eq!(mapping.len(), page + 100);
            assert_eq!(pin[200], 1, "what is pinned stays as it is");
            bed.run(mapping.sync_async()).unwrap();
            assert_eq!(pin[200], 1, "also when it is written");
            let error = bed.run(mapping.append_async(&[3; 10])).unwrap_err();
            assert!(matches!(error, Error::PinnedTooLong { .. }), "{error}");
            drop(pin);
            assert_eq!(bed.run(mapping.append_async(&[3; 10])).unwrap(), page + 100);
            bed.run(mapping.set_len_async(8 * page)).unwrap();
            let bytes = read(&mut bed, &mapping, page, 7 * page);
            assert!(bytes[..100] == [1; 100] && bytes[100..110] == [3; 10]);
            assert!(bytes[110..].iter().all(|&byte| byte == 0));
            bed.run(mapping.write_at_async(0, &vec![1; 8 * page as usize])).unwrap();
            bed.assert_consistent();
        }
    }
}

#[test]
fn wb12_growth_and_appends_that_are_dropped_midway_have_not_happened() {
    for (page_bytes, shards) in SHAPES {
        let mut bed = used(&ram(), shards, 1024);
        let mapping = bed.open(&growing(0, page_bytes));
        bed.run(mapping.append_async(&[1; 5000])).unwrap();
        let data = vec![2; 2_500_000];
        for steps in [1, 3, 6, 20] {
            for grows in [false, true] {
                let mut change: std::pin::Pin<Box<dyn Future<Output = foliant::Result<()>>>> = if grows {
                    Box::pin(mapping.set_len_async(3_000_000))
                } else {
                    Box::pin(async { mapping.append_async(&data).await.map(drop) })
                };
                let mut ended = false;
                for _ in 0..steps {
                    ended = ended || bed.poll_once(change.as_mut()).is_ready();
                    bed.step();
                }
                drop(change);
                if ended {
                    bed.run(mapping.set_len_async(5000)).unwrap();
                }
                assert_eq!(mapping.len(), 5000);
                bed.run(mapping.append_async(&[3; 9000])).unwrap();
                bed.run(mapping.set_len_async(20_000)).unwrap();
                let bytes = read(&mut bed, &mapping, 0, 20_000);
                assert!(bytes[..5000].iter().all(|&byte| byte == 1));
                assert!(bytes[5000..14_000].iter().all(|&byte| byte == 3), "after {steps} steps");
                assert!(bytes[14_000..].iter().all(|&byte| byte == 0));
                bed.run(mapping.set_len_async(5000)).unwrap();
                bed.settle();
                bed.assert_consistent();
            }
        }
    }
}

/// Random changes of a mapping against the bytes that it ought to have, with small caches, so that pages come and go.
#[test]
fn wb12_a_mapping_is_its_bytes_whatever_becomes_of_its_length() {
    for (page_bytes, shards) in SHAPES {
        for seed in 0..6 {
            println!("seed {seed}, pages of {page_bytes}, {shards} shards");
            let mut random = SmallRng::seed_from_u64(seed);
            let mut bed = used(&fragile(16 * MIB), shards, 160);
            let mapping = bed.open(&growing(0, page_bytes));
            let mut bytes: Vec<u8> = Vec::new();
            for step in 0..250u32 {
                let (value, len) = (step as u8 | 1, bytes.len() as u64);
                match random.random_range(0..8) {
                    0 => {
                        let new = random.random_range(0..400_000);
                        bed.run(mapping.set_len_async(new)).unwrap();
                        bytes.resize(new as usize, 0);
                    }
                    1 => {
                        let new = (len + random.random_range(0..9000)).min(CAPACITY);
                        bed.run(mapping.set_len_async(new)).unwrap();
                        bytes.resize(new as usize, 0);
                    }
                    2 | 3 => {
                        let count = random.random_range(1..30_000);
                        assert_eq!(bed.run(mapping.append_async(&vec![value; count])).unwrap(), len);
                        bytes.resize(bytes.len() + count, value);
                    }
                    4 if len > 0 => {
                        let offset = random.random_range(0..len);
                        let count = random.random_range(1..=20_000).min(len - offset) as usize;
                        bed.run(mapping.write_at_async(offset, &vec![value; count])).unwrap();
                        bytes[offset as usize..][..count].fill(value);
                    }
                    5 if len > 0 => {
                        let page = random.random_range(0..mapping.pages());
                        let mut pin = bed.run(mapping.pin_mut_async(page)).unwrap();
                        let start = (page * u64::from(page_bytes)) as usize;
                        assert_eq!(pin.len(), (bytes.len() - start).min(page_bytes as usize));
                        pin.fill(value);
                        bytes[start..].iter_mut().take(page_bytes as usize).for_each(|byte| *byte = value);
                    }
                    6 => {
                        bed.run(mapping.sync_async()).unwrap();
                        assert!(image(&bed, 0, len) == bytes, "the device after step {step}");
                    }
                    _ => {
                        assert!(read(&mut bed, &mapping, 0, len) == bytes, "step {step}");
                    }
                }
                assert_eq!(mapping.len(), bytes.len() as u64);
                bed.assert_consistent();
            }
            bed.run(mapping.sync_async()).unwrap();
            bed.crash(seed);
            bed.power_on();
            let mapping = bed.open(&growing(bytes.len() as u64, page_bytes));
            assert!(read(&mut bed, &mapping, 0, bytes.len() as u64) == bytes, "after a power cut");
        }
    }
}

/// What was synced survives whatever is appended, cut off and grown afterwards, at whatever moment the power fails.
#[test]
fn wb12_a_power_cut_while_a_mapping_grows_leaves_what_was_synced() {
    for (page_bytes, shards) in SHAPES {
        for seed in 0..12 {
            println!("seed {seed}, pages of {page_bytes}, {shards} shards");
            let mut random = SmallRng::seed_from_u64(seed);
            let mut bed = used(&fragile(16 * MIB), shards, 512);
            let mapping = bed.open(&growing(0, page_bytes));
            let synced = random.random_range(1..50_000u64);
            bed.run(mapping.append_async(&vec![1; synced as usize])).unwrap();
            bed.run(mapping.sync_async()).unwrap();
            for _ in 0..random.random_range(1..6) {
                match random.random_range(0..3) {
                    0 => drop(bed.run(mapping.append_async(&vec![2; 9000])).unwrap()),
                    1 => bed.run(mapping.set_len_async(synced + random.random_range(0..200_000))).unwrap(),
                    _ => bed.run(mapping.set_len_async(synced)).unwrap(),
                }
                mapping.request_writeback();
                for _ in 0..random.random_range(0..6) {
                    bed.step();
                }
            }
            bed.crash(seed);
            bed.power_on();
            let mapping = bed.open(&growing(synced, page_bytes));
            assert!(read(&mut bed, &mapping, 0, synced).iter().all(|&byte| byte == 1));
            bed.run(mapping.set_len_async(300_000)).unwrap();
            assert!(read(&mut bed, &mapping, synced, 300_000 - synced).iter().all(|&byte| byte == 0));
        }
    }
}

/// Threads append records beside others that sync and shorten to what they have seen: each record is whole, in order, and
/// on the device afterwards.
#[test]
fn wb12_threads_that_append_beside_syncs_lose_no_byte() {
    const RECORDS: u32 = 3000;
    for (page_bytes, shards) in SHAPES {
        let config = EmulatedConfig { latency: Latency::default(), ..ram() };
        let device = EmulatedController::new(config).unwrap();
        let options = EngineOptions {
            cache_bytes: 1024 * 4096 * shards as u64,
            shards,
            hugepages: Hugepages::Never,
            flush_interval: Duration::from_millis(1),
            threads: ShardThreads::Floating,
            ..Default::default()
        };
        let engine = Engine::open_on(device.attach().unwrap(), &options).unwrap();
        let mapping = engine.mapping(&growing(0, page_bytes)).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let appenders: Vec<_> = (0..2u32)
                .map(|writer| {
                    let mapping = &mapping;
                    scope.spawn(move || {
                        for number in 0..RECORDS {
                            // Lengths that never fit a page: every record dirties the last one again.
                            let record = [number << 1 | writer; 67].map(u32::to_le_bytes);
                            mapping.append(record.as_flattened()).unwrap();
                        }
                    })
                })
                .collect();
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    mapping.sync().unwrap();
                    let len = mapping.len();
                    let mut last = vec![0; len.min(268) as usize];
                    mapping.read_at(len - last.len() as u64, &mut last).unwrap();
                    assert!(
                        last.chunks_exact(4).all(|word| word == &last[..4]),
                        "readers see all of a record"
                    );
                }
            });
            appenders.into_iter().for_each(|thread| thread.join().unwrap());
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(mapping.len(), u64::from(2 * RECORDS) * 268);
        mapping.sync().unwrap();
        let mut bytes = vec![0; mapping.len() as usize];
        device.read_image(1, 0, &mut bytes).unwrap();
        let mut next = [0, 1];
        for record in bytes.chunks_exact(268) {
            let number = u32::from_le_bytes(record[..4].try_into().unwrap());
            assert!(record.chunks_exact(4).all(|word| word == &record[..4]), "a record is whole");
            assert_eq!(number, next[number as usize & 1], "in their order");
            next[number as usize & 1] += 2;
        }
        engine.close().unwrap();
    }
}

#[test]
fn a_length_that_does_not_fit_its_capacity_is_refused_with_what_helps() {
    let mut bed = Bed::new(ram(), options(256));
    let error = bed.try_open(&growing(CAPACITY + 1, 4096)).unwrap_err().to_string();
    assert!(error.contains("8388609") && error.contains("capacity"), "{error}");
    let error = bed
        .try_open(&MappingOptions { len_bytes: Some(1000), ..Default::default() })
        .unwrap_err()
        .to_string();
    assert!(error.contains("capacity_bytes"), "{error}");
    let mapping = bed.open(&growing(1000, 16_384));
    // Another handle of the same mapping: the length is what it is.
    let other = bed.open(&growing(77, 16_384));
    bed.run(mapping.append_async(&[1])).unwrap();
    assert_eq!((other.len(), other.pages()), (1001, 1));
    let error = bed.run(other.set_len_async(CAPACITY + 1)).unwrap_err();
    assert!(matches!(error, Error::Capacity { .. }) && error.to_string().contains("8388608"), "{error}");
}
