//! Readahead (WB-28) on the emulated controller: what the device sees, and who waits.

#![expect(clippy::single_range_in_vec_init, reason = "commands are compared as ranges of pages")]

use std::collections::BTreeSet;
use std::pin::pin;
use std::time::Duration;

use foliant::{EngineOptions, Error, Mapping, MappingOptions};
use foliant_nvme_emulated::{Action, EmulatedConfig, Fault, Latency, Match, NamespaceConfig};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use foliant_tests::{Bed, options};

const MIB: u64 = 1 << 20;
const PAGES: u64 = 4096;
/// A stripe of a mapping, which one shard holds.
const STRIPE_PAGES: u64 = 512;
const LATENCY: Duration = Duration::from_micros(80);

/// Beds with one and with three shards, and a mapping each whose pages carry their numbers and aren't cached.
fn beds(frames: u64, readahead_bytes_max: u32) -> [(Bed, Mapping); 2] {
    [1, 3].map(|shards| {
        let config = EmulatedConfig { latency: Latency { read: LATENCY, ..Latency::default() }, ..ram() };
        let mut bed = Bed::new(config, EngineOptions { shards, ..options(frames * shards as u64) });
        let mapping = fresh(&mut bed, &MappingOptions { readahead_bytes_max, ..Default::default() });
        (bed, mapping)
    })
}

fn ram() -> EmulatedConfig {
    EmulatedConfig::ram(PAGES * 4096, 512)
}

/// Opens a mapping, numbers its pages, and drops them from the cache.
fn fresh(bed: &mut Bed, options: &MappingOptions) -> Mapping {
    let mapping = bed.open(options);
    let mut bytes = vec![0; mapping.len() as usize];
    for (page, bytes) in (0u64..).zip(bytes.chunks_mut(4096)) {
        bytes[..8].copy_from_slice(&page.to_le_bytes());
    }
    bed.run(mapping.write_at_async(0, &bytes)).unwrap();
    bed.run(mapping.close_async()).unwrap();
    let mapping = bed.open(options);
    bed.settle();
    bed.clear_seen();
    mapping
}

/// Reads a page and checks its number; true when the reader had to wait.
fn read(bed: &mut Bed, mapping: &Mapping, page: u64) -> bool {
    let mut number = [0; 8];
    let waited = {
        let mut read = pin!(mapping.read_at_async(page * 4096, &mut number));
        let waited = bed.poll_once(read.as_mut()).is_pending();
        if waited {
            bed.run(read).unwrap();
        }
        waited
    };
    assert_eq!(u64::from_le_bytes(number), page);
    waited
}

/// Page ranges of the reads that the device has seen, in its order.
fn reads(bed: &Bed) -> Vec<std::ops::Range<u64>> {
    let seen = bed.seen(NvmOpcode::READ);
    seen.iter().map(|seen| seen.slba / 8..(seen.slba + u64::from(seen.blocks)).div_ceil(8)).collect()
}

/// The numbers below `count` in an order of no pattern (a multiple of `i` modulo something is full of strides).
fn shuffled(count: u64) -> Vec<u64> {
    let mut numbers: Vec<u64> = (0..count).collect();
    numbers.sort_by_key(|number| {
        // The finalizer of splitmix64.
        let mixed = (number ^ 0x9E37_79B9_7F4A_7C15).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    });
    numbers
}

/// No page was read twice; returns how many were read.
fn pages_read(bed: &Bed) -> u64 {
    let mut pages = BTreeSet::new();
    for page in reads(bed).into_iter().flatten() {
        assert!(pages.insert(page), "page {page} was read twice: {:?}", reads(bed));
    }
    pages.len() as u64
}

#[test]
fn wb28_the_window_opens_small_and_grows_to_the_maximum() {
    for (mut bed, mapping) in beds(2048, 512 << 10) {
        for page in 0..1000 {
            read(&mut bed, &mapping, page);
            bed.settle();
        }
        let seen = reads(&bed);
        // The page that is waited for, the rest of its window of 4, and from then on whole windows.
        assert_eq!(seen[..6], [0..1, 1..4, 4..20, 20..52, 52..116, 116..244]);
        assert_eq!(seen[6], 244..372);
        let ahead = pages_read(&bed) - 1000;
        assert!((1..=256).contains(&ahead), "two windows at most are ahead, not {ahead} pages");
        if bed.engine().shards() > 1 {
            let crosses =
                |range: &std::ops::Range<u64>| range.start / STRIPE_PAGES != (range.end - 1) / STRIPE_PAGES;
            assert!(!seen.iter().any(crosses), "each shard reads its own: {seen:?}");
            assert!(seen.contains(&(500..512)) && seen.contains(&(512..628)), "one window, two shards");
        }
        bed.assert_consistent();
    }
}

#[test]
fn wb28_after_warm_up_a_sequential_reader_at_the_devices_pace_never_waits() {
    for readahead_bytes_max in [512 << 10, 0] {
        for (mut bed, mapping) in beds(2048, readahead_bytes_max) {
            let mut waited = Vec::new();
            for page in 0..3000 {
                if read(&mut bed, &mapping, page) {
                    waited.push(page);
                }
                // The device gives 128 pages in 80 us, this reader takes 80 in that time.
                bed.advance(Duration::from_micros(1));
            }
            if readahead_bytes_max == 0 {
                assert_eq!(waited.len(), 3000, "without readahead every page is waited for");
            } else {
                assert!(waited.len() < 8 && *waited.last().unwrap() < 250, "{waited:?}");
                let stats = bed.engine().stats();
                assert_eq!(stats.readahead_pages_used, 3000 - 1);
                assert_eq!(stats.readahead_pages, pages_read(&bed) - 1);
                assert_eq!(stats.readahead_dropped, 0);
            }
        }
    }
}

#[test]
fn wb28_pins_and_backward_scans_read_ahead_too() {
    for (mut bed, mapping) in beds(2048, 512 << 10) {
        let mut waits = 0;
        for page in (2000..4000).rev() {
            let pin = {
                let mut pinned = pin!(mapping.pin_async(page));
                match bed.poll_once(pinned.as_mut()) {
                    std::task::Poll::Ready(pin) => pin.unwrap(),
                    std::task::Poll::Pending => {
                        waits += 1;
                        bed.run(pinned).unwrap()
                    }
                }
            };
            assert_eq!(pin[..8], page.to_le_bytes());
            drop(pin);
            bed.advance(Duration::from_micros(1));
        }
        assert!(waits < 10, "{waits} waits");
        assert_eq!(reads(&bed)[..4], [3999..4000, 3998..3999, 3995..3998, 3979..3995]);
        pages_read(&bed);
    }
}

#[test]
fn wb28_a_reader_that_outruns_the_shard_keeps_its_window() {
    for (mut bed, mapping) in beds(2048, 512 << 10) {
        // The shard is polled only while a read waits.
        let waits = (0..1000).filter(|&page| read(&mut bed, &mapping, page)).count();
        bed.settle();
        assert!(waits < 20, "{waits} waits");
        let longest = reads(&bed).into_iter().map(|range| range.end - range.start).max();
        assert!(longest >= Some(127), "{:?}", reads(&bed));
        pages_read(&bed);
    }
}

#[test]
fn wb28_random_reads_bring_exactly_their_pages() {
    for (mut bed, mapping) in beds(4096, 512 << 10) {
        let mut wanted = BTreeSet::new();
        for page in shuffled(2048).into_iter().take(1000).map(|page| page * 2 + 1) {
            assert!(read(&mut bed, &mapping, page));
            wanted.insert(page);
        }
        // A read of several pages that stands alone brings those, also where they are more than a request may name.
        let mut bytes = vec![0; 60 * 4096];
        bed.run(mapping.read_at_async(4000 * 4096, &mut bytes)).unwrap();
        wanted.extend(4000..4060);
        let mut bytes = vec![0; 700 * 4096];
        bed.run(mapping.read_at_async(1002 * 4096 + 1, &mut bytes)).unwrap();
        wanted.extend(1002..1703);
        bed.settle();
        let read: BTreeSet<u64> = reads(&bed).into_iter().flatten().collect();
        assert_eq!(read, wanted);
        pages_read(&bed);
    }
}

/// Scans in strides: from a page on, pages of a read, and from read to read; downwards where that is negative.
const STRIDES: [(i64, u64, i64); 6] =
    [(5, 1, 7), (4000, 1, -7), (3, 3, 9), (3900, 2, -11), (1, 1, 2), (4090, 1, -2)];

#[test]
fn wb28_a_scan_in_strides_reads_ahead_what_it_will_read_and_waits_at_its_beginning_only() {
    for (from, pages_each, step) in STRIDES {
        for (mut bed, mapping) in beds(2048, 512 << 10) {
            let at = |i: i64| (from + i * step) as u64;
            let count =
                if step > 0 { (PAGES as i64 - from - pages_each as i64) / step } else { from / -step };
            let count = count.min(1200);
            let (mut waits, mut wanted) = (Vec::new(), BTreeSet::new());
            let mut bytes = vec![0; pages_each as usize * 4096];
            for i in 0..count {
                {
                    let mut read = pin!(mapping.read_at_async(at(i) * 4096, &mut bytes));
                    if bed.poll_once(read.as_mut()).is_pending() {
                        waits.push(i);
                        bed.run(read).unwrap();
                    }
                }
                for (page, bytes) in (at(i)..).zip(bytes.chunks(4096)) {
                    assert_eq!(bytes[..8], page.to_le_bytes());
                }
                wanted.extend(at(i)..at(i) + pages_each);
                // At the device's pace.
                bed.advance(Duration::from_micros(2 * pages_each));
            }
            assert_eq!(waits[..4], [0, 1, 2, 3], "{from} {step}");
            assert!(waits.len() < 12 && *waits.last().unwrap() < 130, "{from} {step}: {waits:?}");
            // Nothing between the strides, and no more ahead than two windows.
            let read: BTreeSet<u64> = reads(&bed).into_iter().flatten().collect();
            assert_eq!(read.len() as u64, pages_read(&bed));
            assert!(wanted.is_subset(&read));
            let ahead: Vec<u64> = read.difference(&wanted).copied().collect();
            assert!(ahead.len() <= 256, "{from} {step}: {} pages", ahead.len());
            let on_the_way = |page: u64| {
                let beyond =
                    if step > 0 { page as i64 - from } else { page as i64 - from - count * step * 2 };
                beyond.rem_euclid(step.abs()) < pages_each as i64
            };
            assert!(ahead.iter().all(|&page| on_the_way(page)), "{from} {step}: {ahead:?}");
            let stats = bed.engine().stats();
            assert_eq!(stats.readahead_pages_used + ahead.len() as u64, stats.readahead_pages);
            assert_eq!(stats.readahead_dropped, 0);
            bed.assert_consistent();
        }
    }
}

#[test]
fn wb28_windows_in_strides_grow_and_collapse_and_cost_one_doorbell_a_shard() {
    let mut bed = Bed::new(ram(), EngineOptions { shards: 1, ..options(2048) });
    let mapping = fresh(&mut bed, &MappingOptions::default());
    let mut windows = Vec::new();
    let scan = |bed: &mut Bed, windows: &mut Vec<usize>, range: std::ops::Range<u64>| {
        for i in range {
            let (before, doorbells) = (reads(bed).len(), bed.engine().stats().doorbells);
            read(bed, &mapping, i * 6);
            bed.settle();
            let commands = reads(bed).len() - before;
            if commands > 0 {
                windows.push(commands);
                let rung = bed.engine().stats().doorbells - doorbells;
                // The page that is waited for may be asked for by itself.
                assert!(rung <= 2 + commands as u64 / 40, "{commands} commands, {rung} doorbells");
            }
        }
    };
    scan(&mut bed, &mut windows, 20..300);
    assert_eq!(windows, [1, 1, 1, 4, 16, 32, 64, 128, 128, 128]);
    // Elsewhere it begins anew.
    windows.clear();
    scan(&mut bed, &mut windows, 560..600);
    assert_eq!(windows[..5], [1, 1, 1, 4, 16]);
}

#[test]
fn wb28_what_strides_read_ahead_in_vain_is_bounded() {
    for (mut bed, mapping) in beds(512, 512 << 10) {
        // Scans in strides that end as soon as they have been seen.
        for scan in 0..60 {
            for i in 0..4 {
                read(&mut bed, &mapping, 600 + scan * 53 + i * 11);
            }
            bed.settle();
        }
        let stats = bed.engine().stats();
        assert!((1..=60 * 3).contains(&stats.readahead_pages), "{stats:?}");
        bed.assert_consistent();
    }
}

#[test]
fn wb28_a_jump_collapses_the_window() {
    for (mut bed, mapping) in beds(2048, 512 << 10) {
        for page in 0..600 {
            read(&mut bed, &mapping, page);
        }
        bed.settle();
        bed.clear_seen();
        for page in 3000..3003 {
            read(&mut bed, &mapping, page);
        }
        bed.settle();
        assert_eq!(reads(&bed), [3000..3001, 3001..3002, 3002..3005, 3005..3021]);
    }
}

#[test]
fn wb28_interleaved_readers_are_recognised_each() {
    for (mut bed, mapping) in beds(2048, 256 << 10) {
        // Two clones, a handle of its own, and two scans by one handle.
        let clone = mapping.clone();
        let options = MappingOptions { readahead_bytes_max: 256 << 10, ..Default::default() };
        let other = bed.open(&options);
        let scans = [(&mapping, 0), (&mapping, 800), (&clone, 1600), (&other, 2400)];
        let mut waited = Vec::new();
        for step in 0..700 {
            for (handle, begin) in scans {
                if read(&mut bed, handle, begin + step) {
                    waited.push((begin, step));
                }
            }
            bed.advance(Duration::from_micros(4));
        }
        assert!(waited.len() < 40 && waited.iter().all(|&(_, step)| step < 110), "{waited:?}");
        pages_read(&bed);
    }
}

#[test]
fn wb28_a_reader_behind_another_lives_on_what_that_one_read() {
    for (mut bed, mapping) in beds(2048, 512 << 10) {
        let behind = mapping.clone();
        for page in 0..1500 {
            read(&mut bed, &mapping, page);
            if page >= 40 {
                assert!(!read(&mut bed, &behind, page - 40), "page {page}");
            }
            bed.advance(Duration::from_micros(1));
        }
        pages_read(&bed);
    }
}

#[test]
fn wb28_windows_end_with_the_mapping() {
    for blocks in [1, 7, 8, 9, 24, 32, 33, 8 * 31, 8 * 32, 8 * 33, 8 * 127 + 3, 8 * 128, 8 * 129, 8 * 513 + 1]
    {
        for shards in [1, 3] {
            let config = EmulatedConfig {
                namespaces: vec![NamespaceConfig::new(8 * MIB, 512)],
                ..EmulatedConfig::ram(8 * MIB, 512)
            };
            let mut bed = Bed::new(config, EngineOptions { shards, ..options(1024 * shards as u64) });
            let len_bytes = Some(blocks * 512);
            let mapping = fresh(&mut bed, &MappingOptions { len_bytes, ..Default::default() });
            for page in 0..mapping.pages() {
                read(&mut bed, &mapping, page);
            }
            bed.settle();
            let seen: u32 = bed.seen(NvmOpcode::READ).iter().map(|seen| seen.blocks).sum();
            assert_eq!(u64::from(seen), blocks, "{:?}", reads(&bed));
            assert_eq!(bed.engine().stats().readahead_dropped, 0);
            // Backwards from its end, which isn't a whole page.
            bed.run(mapping.close_async()).unwrap();
            let mapping = bed.open(&MappingOptions { len_bytes, ..Default::default() });
            bed.clear_seen();
            for page in (0..mapping.pages()).rev() {
                read(&mut bed, &mapping, page);
            }
            bed.settle();
            let seen: u32 = bed.seen(NvmOpcode::READ).iter().map(|seen| seen.blocks).sum();
            assert_eq!(u64::from(seen), blocks, "{:?}", reads(&bed));
            bed.assert_consistent();
        }
    }
}

#[test]
fn wb28_no_window_exceeds_the_maximum_whatever_it_is() {
    for pages_max in [0u64, 1, 2, 3, 4, 5, 7, 8, 31, 32, 33, 127, 128, 256] {
        for (mut bed, mapping) in beds(4096, pages_max as u32 * 4096) {
            for page in 0..1200 {
                read(&mut bed, &mapping, page);
            }
            bed.settle();
            let longest = reads(&bed).into_iter().map(|range| range.end - range.start).max().unwrap();
            assert!(longest <= pages_max.max(1), "{longest} pages with a maximum of {pages_max}");
            if pages_max >= 8 {
                assert_eq!(longest, pages_max, "it is reached");
            }
            assert!(pages_read(&bed) <= 1200 + 2 * pages_max);
        }
    }
}

#[test]
fn wb28_large_pages_are_read_ahead_whole_and_pinned_without_asking() {
    for shards in [1, 3] {
        let config = EmulatedConfig { latency: Latency { read: LATENCY, ..Latency::default() }, ..ram() };
        let mut bed = Bed::new(config, EngineOptions { shards, ..options(2048 * shards as u64) });
        let options = MappingOptions { page_bytes: 16_384, ..Default::default() };
        let mapping = fresh(&mut bed, &options);
        let mut waits = 0;
        for page in 100..700u64 {
            let pin = {
                let mut pinned = pin!(mapping.pin_async(page));
                match bed.poll_once(pinned.as_mut()) {
                    std::task::Poll::Ready(pin) => pin.unwrap(),
                    std::task::Poll::Pending => {
                        waits += 1;
                        bed.run(pinned).unwrap()
                    }
                }
            };
            assert_eq!((&pin[..8], pin.len()), (&(page * 4).to_le_bytes()[..], 16_384));
            drop(pin);
            bed.advance(Duration::from_micros(4));
        }
        assert!(waits < 10, "{waits} waits");
        let seen = reads(&bed);
        // A page by itself, then a window of four whose first is waited for, then one of eight.
        assert_eq!(seen[..4], [400..404, 404..408, 408..420, 420..452]);
        assert!(seen.iter().all(|range| range.start % 4 == 0 && range.end % 4 == 0), "{seen:?}");
        assert!(seen.iter().any(|range| range.end - range.start == 128), "{seen:?}");
        pages_read(&bed);
        assert_eq!(bed.engine().stats().folios_split, 0);
        // Backwards and by copying, from the middle of a page.
        bed.run(mapping.close_async()).unwrap();
        let mapping = bed.open(&options);
        bed.clear_seen();
        for page in (1000..2000).rev() {
            read(&mut bed, &mapping, page);
        }
        pages_read(&bed);
        bed.assert_consistent();
    }
}

#[test]
fn wb28_folios_are_as_large_as_the_reads_that_will_use_them() {
    for (mut bed, mapping) in beds(4096, 1 << 20) {
        let before = bed.engine().stats().folios_installed;
        let mut bytes = vec![0; 32 * 4096];
        for read in 0..32 {
            bed.run(mapping.read_at_async(read * 32 * 4096, &mut bytes)).unwrap();
            assert_eq!(bytes[31 * 4096..][..8], (read * 32 + 31).to_le_bytes());
            bed.settle();
        }
        let stats = bed.engine().stats();
        let (folios, pages) = (stats.folios_installed - before, pages_read(&bed));
        assert!(folios <= pages / 32 + 4, "{folios} folios of {pages} pages");
        // Each by one command and more: folios don't limit commands.
        let longest = reads(&bed).into_iter().map(|range| range.end - range.start).max();
        assert_eq!(longest, Some(256));
        bed.assert_consistent();
    }
}

#[test]
fn wb28_a_large_read_is_on_its_way_at_once() {
    for (mut bed, mapping) in beds(2048, 512 << 10) {
        let mut bytes = vec![0; 96 * 4096];
        let mut read = pin!(mapping.read_at_async(1000 * 4096, &mut bytes));
        assert!(bed.poll_once(read.as_mut()).is_pending());
        bed.settle();
        let on_the_way: u64 = reads(&bed).into_iter().map(|range| range.end - range.start).sum();
        assert_eq!(on_the_way, 96, "{:?}", reads(&bed));
        bed.run(read).unwrap();
        assert_eq!(pages_read(&bed), 96);
    }
}

#[test]
fn wb28_readahead_takes_no_frame_that_a_demand_waits_for() {
    for (mut bed, mapping) in beds(64, 512 << 10) {
        let shards = bed.engine().shards() as u64;
        // All frames of the first stripe's shard but two are pinned.
        let mut pins: Vec<_> = (0..62).map(|i| bed.run(mapping.pin_async(i * 2)).unwrap()).collect();
        bed.settle();
        let before = bed.engine().stats();
        for page in 200..300 {
            read(&mut bed, &mapping, page);
        }
        let after = bed.engine().stats();
        assert!(after.readahead_dropped > before.readahead_dropped, "there were no frames for it");
        // Two frames are free, a demand waits for more, and what is asked for meanwhile isn't carried out.
        let mut bytes = vec![0; 8 * 4096];
        {
            let mut waiting = pin!(mapping.read_at_async(450 * 4096, &mut bytes));
            assert!(bed.poll_once(waiting.as_mut()).is_pending());
            bed.settle();
            bed.clear_seen();
            let dropped = bed.engine().stats().readahead_dropped;
            assert_eq!(mapping.prefetch(300 * 4096..301 * 4096).unwrap(), 4096);
            bed.settle();
            assert_eq!(reads(&bed), []);
            assert_eq!(bed.engine().stats().readahead_dropped, dropped + 1);
            pins.truncate(40);
            bed.run(waiting).unwrap();
        }
        assert_eq!(bytes[7 * 4096..][..8], 457u64.to_le_bytes());
        assert_eq!(reads(&bed), [450..458]);
        drop(pins);
        assert_eq!(shards * 64, bed.engine().stats().frames);
        bed.assert_consistent();
    }
}

#[test]
fn wb28_what_nobody_used_is_evicted_before_what_was() {
    for (mut bed, mapping) in beds(256, 0) {
        let hot: Vec<u64> = (0..32).collect();
        hot.iter().for_each(|&page| assert!(read(&mut bed, &mapping, page) || page < PAGES));
        assert_eq!(mapping.prefetch(100 * 4096..164 * 4096).unwrap(), 64 * 4096);
        bed.advance(LATENCY);
        // New pages of the same stripe, as many as the hand needs to come round; the hot ones are used meanwhile.
        for i in 0..900 {
            read(&mut bed, &mapping, 200 + i % 300);
            read(&mut bed, &mapping, i % 32);
        }
        bed.clear_seen();
        hot.iter().for_each(|&page| assert!(!read(&mut bed, &mapping, page)));
        (100..164).for_each(|page| assert!(read(&mut bed, &mapping, page) || page < PAGES));
        assert!(pages_read(&bed) >= 60, "the unused were gone: {:?}", reads(&bed));
        assert_eq!(bed.engine().stats().readahead_pages, 64);
        assert!(bed.engine().stats().readahead_pages_used <= 4);
    }
}

fn unreadable(page: u64) -> Fault {
    let status = Status::of(StatusCode::UNRECOVERED_READ_ERROR);
    let matching = Match::io(NvmOpcode::READ).touching(page * 8, page * 8 + 7);
    Fault { matching, action: Action::Status(status) }
}

#[test]
fn wb28_an_error_in_the_readahead_range_is_told_to_who_reads_that_page_and_to_nobody_else() {
    for (mut bed, mapping) in beds(1024, 512 << 10) {
        bed.device.inject(unreadable(70));
        for page in 0..200 {
            if page == 70 {
                let error = bed.run(mapping.read_at_async(page * 4096, &mut [0; 8])).unwrap_err();
                assert!(matches!(error, Error::Device { offset, .. } if offset == 70 * 4096), "{error}");
            } else {
                read(&mut bed, &mapping, page);
            }
            bed.assert_consistent();
        }
        bed.advance(LATENCY);
        bed.run(mapping.sync_async()).expect("no error is on record");
        bed.device.clear_faults();
        read(&mut bed, &mapping, 70);
        bed.assert_consistent();
    }
}

#[test]
fn wb28_who_waits_for_a_page_of_a_failed_readahead_gets_a_read_of_its_own() {
    for (mut bed, mapping) in beds(1024, 0) {
        let late = |fault: Fault| match fault.action {
            Action::Status(status) => Fault { action: Action::FailLate { delay: LATENCY, status }, ..fault },
            _ => fault,
        };
        bed.device.inject(late(unreadable(15)));
        mapping.prefetch(10 * 4096..20 * 4096).unwrap();
        bed.settle();
        assert_eq!(bed.engine().stats().readahead_pages, 10, "they are on their way");
        let (mut number, mut across) = ([0; 8], vec![0; 3 * 4096]);
        {
            let mut lost = [0; 8];
            let mut first = pin!(mapping.read_at_async(12 * 4096, &mut number));
            let mut bad = pin!(mapping.read_at_async(15 * 4096, &mut lost));
            let mut pinned = pin!(mapping.pin_mut_async(17));
            let mut across = pin!(mapping.read_at_async(18 * 4096, &mut across));
            assert!(bed.poll_once(first.as_mut()).is_pending());
            assert!(bed.poll_once(bad.as_mut()).is_pending());
            assert!(bed.poll_once(pinned.as_mut()).is_pending());
            assert!(bed.poll_once(across.as_mut()).is_pending());
            bed.run(first).unwrap();
            let error = bed.run(bad).unwrap_err();
            assert!(matches!(error, Error::Device { offset, .. } if offset == 15 * 4096), "{error}");
            assert_eq!(bed.run(pinned).unwrap()[..8], 17u64.to_le_bytes());
            bed.run(across).unwrap();
        }
        assert_eq!((number, &across[4096..4104]), (12u64.to_le_bytes(), &19u64.to_le_bytes()[..]));
        bed.assert_consistent();
        bed.device.clear_faults();
        (10..21).for_each(|page| assert!(read(&mut bed, &mapping, page) || page < PAGES));
    }
}

#[test]
fn wb28_a_mapping_is_closed_or_discarded_while_its_readahead_is_in_flight() {
    for (mut bed, mapping) in beds(1024, 512 << 10) {
        let slow =
            |bed: &Bed| bed.fault(NvmOpcode::READ, 0, u64::MAX, Action::Delay(Duration::from_millis(5)));
        slow(&bed);
        mapping.prefetch(0..200 * 4096).unwrap();
        bed.settle();
        assert!(bed.engine().stats().readahead_pages >= 200);
        // Posted and not yet looked at, too.
        mapping.prefetch(200 * 4096..210 * 4096).unwrap();
        bed.run(mapping.discard_async(100 * 4096..300 * 4096)).unwrap();
        for page in 90..110u64 {
            let mut number = [1; 8];
            bed.run(mapping.read_at_async(page * 4096, &mut number)).unwrap();
            assert_eq!(u64::from_le_bytes(number), if page < 100 { page } else { 0 });
        }
        {
            // The folios are gone and the zeroes are on their way: nothing may come in before they have arrived.
            bed.fault(NvmOpcode::WRITE_ZEROES, 0, u64::MAX, Action::Delay(Duration::from_millis(5)));
            let mut discard = pin!(mapping.discard_async(100 * 4096..300 * 4096));
            assert!(bed.poll_once(discard.as_mut()).is_pending());
            bed.settle();
            bed.clear_seen();
            mapping.prefetch(150 * 4096..160 * 4096).unwrap();
            bed.settle();
            assert_eq!(reads(&bed), []);
            bed.run(discard).unwrap();
        }
        mapping.prefetch(600 * 4096..700 * 4096).unwrap();
        bed.settle();
        mapping.prefetch(700 * 4096..710 * 4096).unwrap();
        let other = mapping.clone();
        bed.run(mapping.close_async()).unwrap();
        assert!(matches!(other.prefetch(0..4096), Err(Error::Closed)));
        drop(other);
        bed.settle();
        bed.assert_consistent();
        // The slot is another mapping's now, whose pages lie elsewhere.
        bed.device.clear_faults();
        let small =
            bed.open(&MappingOptions { start_bytes: MIB, len_bytes: Some(4096), ..Default::default() });
        assert!(!read_number(&mut bed, &small, 256));
        bed.assert_consistent();
    }
}

/// Reads the first page of `mapping`, which is page `number` of the device; true when it was cached.
fn read_number(bed: &mut Bed, mapping: &Mapping, number: u64) -> bool {
    let mut bytes = [0; 8];
    let cached = {
        let mut read = pin!(mapping.read_at_async(0, &mut bytes));
        let cached = bed.poll_once(read.as_mut()).is_ready();
        if !cached {
            bed.run(read).unwrap();
        }
        cached
    };
    let zeroed = (100..300).contains(&number);
    assert_eq!(u64::from_le_bytes(bytes), if zeroed { 0 } else { number });
    cached
}

#[test]
fn wb28_an_engine_is_closed_while_readahead_is_in_flight() {
    for (mut bed, mapping) in beds(1024, 512 << 10) {
        for page in 0..300 {
            read(&mut bed, &mapping, page);
        }
        bed.fault(NvmOpcode::READ, 0, u64::MAX, Action::Delay(Duration::from_secs(60)));
        mapping.prefetch(1000 * 4096..1200 * 4096).unwrap();
        bed.settle();
        mapping.prefetch(1200 * 4096..1300 * 4096).unwrap();
        let engine = bed.engine.take().unwrap();
        engine.return_shards(bed.take_shards());
        engine.close().unwrap();
        assert!(matches!(mapping.prefetch(0..4096), Err(Error::Closed)));
        drop(mapping);
        // The observer keeps the engine's memory.
        bed.device.observe(None);
        // And the device is as good as new.
        bed.device.clear_faults();
        bed.power_on();
        let mapping = bed.mapping();
        read(&mut bed, &mapping, 1100);
    }
}

#[test]
fn wb28_demand_finds_room_in_a_queue_that_readahead_would_fill() {
    for shards in [1, 3] {
        let config = EmulatedConfig { mdts: 1, ..ram() };
        let options = EngineOptions { shards, queue_entries: 16, ..options(2048 * shards as u64) };
        let mut bed = Bed::new(config, options);
        let mapping = fresh(&mut bed, &MappingOptions::default());
        bed.fault(NvmOpcode::READ, 0, u64::MAX, Action::Delay(Duration::from_millis(1)));
        // Two pages a command: hundreds of commands.
        mapping.prefetch(0..400 * 4096).unwrap();
        bed.settle();
        let in_flight = bed.seen(NvmOpcode::READ).len();
        assert!((4..=12).contains(&in_flight), "{in_flight} of 15 commands");
        let mut number = [0; 8];
        let mut demand = pin!(mapping.read_at_async(450 * 4096, &mut number));
        assert!(bed.poll_once(demand.as_mut()).is_pending());
        bed.settle();
        assert_eq!(reads(&bed).last(), Some(&(450..451)), "before the rest of the readahead");
        bed.run(demand).unwrap();
        // The rest comes as room comes.
        for _ in 0..60 {
            bed.advance(Duration::from_millis(1));
        }
        assert_eq!(pages_read(&bed), 401);
    }
}

#[test]
fn a_prefetch_brings_its_range_without_waiting_and_within_bounds() {
    for (mut bed, mapping) in beds(1024, 0) {
        let frames = bed.engine().stats().frames;
        assert_eq!(mapping.prefetch(5..5).unwrap(), 0);
        assert_eq!(mapping.prefetch(4095..4097).unwrap(), 2, "bytes of two pages");
        bed.settle();
        assert_eq!(reads(&bed), [0..2]);
        assert_eq!(mapping.prefetch(500 * 4096..600 * 4096 + 1).unwrap(), 100 * 4096 + 1);
        bed.advance(LATENCY);
        for page in 500..601 {
            assert!(!read(&mut bed, &mapping, page));
        }
        assert_eq!(bed.engine().stats().readahead_pages_used, 101);
        // More than the cache should take at once.
        assert_eq!(mapping.prefetch(0..mapping.len()).unwrap(), frames / 4 * 4096);
        bed.settle();
        bed.advance(LATENCY);
        let small = (0..200).map(|page| mapping.prefetch(page * 4096..page * 4096 + 1).unwrap());
        let asked: u64 = small.sum();
        assert!(asked < 200, "a shard that doesn't look takes only so many: {asked}");
        assert!(bed.engine().stats().readahead_dropped > 0);
        bed.settle();
        pages_read(&bed);
        let beyond = mapping.prefetch(mapping.len() - 1..mapping.len() + 1).unwrap_err();
        assert!(matches!(beyond, Error::OutOfRange { .. }));
        bed.assert_consistent();
    }
}

#[test]
fn a_maximum_that_cannot_be_is_an_error_that_names_the_limit() {
    let mut bed = Bed::new(EmulatedConfig::ram(MIB, 512), options(64));
    for bytes in [1, 4095, 4097, (4 << 20) + 4096, u32::MAX] {
        let options = MappingOptions { readahead_bytes_max: bytes, ..Default::default() };
        let engine = bed.engine.take().unwrap();
        let error = bed.run(engine.mapping_async(&options)).unwrap_err().to_string();
        assert!(error.contains(&format!("readahead_bytes_max = {bytes}")), "{error}");
        assert!(error.contains("4194304") && error.contains("0 switches readahead off"), "{error}");
        bed.engine = Some(engine);
    }
    let mapping = bed.open(&MappingOptions { readahead_bytes_max: 4 << 20, ..Default::default() });
    bed.run(mapping.read_at_async(0, &mut [0; 8])).unwrap();
}

#[test]
fn writers_start_no_readahead() {
    for (mut bed, mapping) in beds(1024, 512 << 10) {
        for page in 0..100u64 {
            bed.run(mapping.write_at_async(page * 4096 + 100, &[1; 10])).unwrap();
            drop(bed.run(mapping.pin_mut_async(1000 + page)).unwrap());
        }
        bed.settle();
        assert_eq!(bed.engine().stats().readahead_pages, 0);
        assert_eq!(pages_read(&bed), 200);
    }
}

#[test]
fn a_page_that_is_being_read_is_not_overwritten_beside_the_device() {
    for (mut bed, mapping) in beds(1024, 0) {
        mapping.prefetch(100 * 4096..110 * 4096).unwrap();
        {
            let mut number = [0; 8];
            let mut demand = pin!(mapping.read_at_async(200 * 4096, &mut number));
            assert!(bed.poll_once(demand.as_mut()).is_pending());
            bed.step();
        }
        // Both reads are with the device now; the writes come before they end.
        let mut first = pin!(mapping.write_at_async(105 * 4096, &[7; 4096]));
        let mut second = pin!(mapping.write_at_async(200 * 4096, &[7; 4096]));
        assert!(bed.poll_once(first.as_mut()).is_pending(), "it is read ahead");
        assert!(bed.poll_once(second.as_mut()).is_pending(), "it was asked for");
        bed.run(first).unwrap();
        bed.run(second).unwrap();
        for page in [105, 200] {
            let mut bytes = [0; 4096];
            bed.run(mapping.read_at_async(page * 4096, &mut bytes)).unwrap();
            assert_eq!(bytes, [7; 4096], "page {page}");
        }
        bed.run(mapping.sync_async()).unwrap();
        bed.assert_consistent();
    }
}
