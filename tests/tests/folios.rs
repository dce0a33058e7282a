//! Folios of several pages: a mapping's page size, folios that grow under an appending writer, folios dirty in part.

use std::time::Duration;

use foliant::{EngineOptions, Error, Mapping, MappingOptions};
use foliant_nvme_emulated::{Action, EmulatedConfig};
use foliant_nvme_spec::NvmOpcode;
use foliant_tests::{Bed, fragile, options};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

const MIB: u64 = 1 << 20;

fn ram() -> EmulatedConfig {
    EmulatedConfig::ram(64 * MIB, 512)
}

fn beds(config: &EmulatedConfig, frames: u64) -> [Bed; 2] {
    [1, 3].map(|shards| Bed::new(config.clone(), EngineOptions { shards, ..options(frames * shards as u64) }))
}

fn paged(bed: &mut Bed, page_bytes: u32) -> Mapping {
    bed.open(&MappingOptions { page_bytes, ..Default::default() })
}

/// Writes and its pages that the device saw, in pages of 4096 bytes.
fn written(bed: &Bed) -> Vec<(u64, u64)> {
    bed.seen(NvmOpcode::WRITE).iter().map(|seen| (seen.slba / 8, u64::from(seen.blocks) / 8)).collect()
}

#[test]
fn an_appending_writer_gets_larger_and_larger_folios_and_stops_asking() {
    for mut bed in beds(&ram(), 4096) {
        let mapping = bed.mapping();
        let before = bed.engine().stats();
        for page in 0..1024u64 {
            bed.run(mapping.write_at_async(page * 4096, &[page as u8; 4096])).unwrap();
        }
        let stats = bed.engine().stats();
        assert!(stats.folios_installed <= 40, "{} folios for 1024 pages", stats.folios_installed);
        assert!(stats.requests - before.requests <= 60, "{} requests", stats.requests - before.requests);
        bed.settle();
        bed.assert_consistent();
        bed.run(mapping.sync_async()).unwrap();
        for page in 0..1024u64 {
            let mut bytes = [0; 4096];
            bed.device.read_image(1, page * 4096, &mut bytes).unwrap();
            assert_eq!(bytes, [page as u8; 4096], "page {page}");
        }
        bed.assert_consistent();
    }
}

#[test]
fn what_an_appender_did_not_reach_reads_as_the_device_has_it() {
    for mut bed in beds(&ram(), 4096) {
        let mapping = bed.mapping();
        bed.run(mapping.write_at_async(0, &[9; 600 * 4096])).unwrap();
        bed.run(mapping.sync_async()).unwrap();
        bed.run(mapping.discard_async(0..1200 * 4096)).unwrap();
        for page in 0..100u64 {
            bed.run(mapping.write_at_async(page * 4096, &[1; 4096])).unwrap();
        }
        // The folio that page 100 would come to is there already; nothing of it may be seen.
        for page in [100u64, 127, 101, 500] {
            let mut bytes = [7; 4096];
            bed.run(mapping.read_at_async(page * 4096, &mut bytes)).unwrap();
            assert_eq!(bytes, [0; 4096], "page {page}");
        }
        bed.run(mapping.write_at_async(103 * 4096, &[3; 10])).unwrap();
        let mut bytes = [7; 20];
        bed.run(mapping.read_at_async(103 * 4096, &mut bytes)).unwrap();
        assert_eq!((&bytes[..10], &bytes[10..]), (&[3; 10][..], &[0; 10][..]));
        bed.settle();
        bed.assert_consistent();
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!(bed.engine().stats().dirty_pages, 0);
    }
}

/// Where a page's bytes are in memory.
fn address(bed: &mut Bed, mapping: &Mapping, page: u64) -> usize {
    bed.run(mapping.pin_async(page)).unwrap().as_ptr().addr()
}

#[test]
fn pages_that_come_in_any_order_lie_in_memory_as_in_the_file() {
    for mut bed in beds(&ram(), 4096) {
        let mapping = bed.mapping();
        let mut order: Vec<u64> = (0..2048).collect();
        order.shuffle(&mut SmallRng::seed_from_u64(5));
        for &page in &order {
            bed.run(mapping.write_at_async(page * 4096, &[page as u8; 4096])).unwrap();
        }
        for first in (0..2048).step_by(64) {
            let start = address(&mut bed, &mapping, first);
            for page in first..first + 64 {
                assert_eq!(address(&mut bed, &mapping, page) - start, (page - first) as usize * 4096);
            }
        }
        bed.assert_consistent();
        bed.run(mapping.sync_async()).unwrap();
        bed.assert_consistent();
    }
}

#[test]
fn sparse_pages_use_every_frame_and_leave_whole_blocks_until_then() {
    for mut bed in beds(&ram(), 4096) {
        let mapping = bed.mapping();
        let frames = 4096 * bed.engine().shards() as u64;
        // If each had a block to itself, there would be more blocks than there are.
        for page in (0..12_288u64).step_by(64) {
            bed.run(mapping.write_at_async(page * 4096, &[page as u8; 4096])).unwrap();
        }
        let before = bed.engine().stats().folios_installed;
        bed.run(mapping.write_at_async(15_360 * 4096, &[1; 512 * 4096])).unwrap();
        let folios = bed.engine().stats().folios_installed - before;
        assert!(folios <= 10, "{folios} folios for 512 pages");
        bed.run(mapping.sync_async()).unwrap();
        for page in 0..frames {
            let mut byte = [0];
            bed.run(mapping.read_at_async(page * 4096, &mut byte)).unwrap();
        }
        bed.assert_consistent();
    }
}

#[test]
fn one_thread_may_pin_neighbouring_pages_of_what_was_one_folio() {
    for mut bed in beds(&ram(), 4096) {
        let mapping = bed.mapping();
        for page in 0..300u64 {
            bed.run(mapping.write_at_async(page * 4096, &[page as u8; 4096])).unwrap();
        }
        let mut first = bed.run(mapping.pin_mut_async(200)).unwrap();
        let mut second = bed.run(mapping.pin_mut_async(201)).unwrap();
        let shared = bed.run(mapping.pin_async(202)).unwrap();
        // A page beside a pinned one can be written, too.
        bed.run(mapping.write_at_async(203 * 4096, &[77; 4096])).unwrap();
        assert_eq!((first[0], second[0], shared[0]), (200, 201, 202));
        (first[0], second[0]) = (1, 2);
        drop((first, second, shared));
        assert!(bed.engine().stats().folios_split > 0);
        bed.settle();
        bed.assert_consistent();
        bed.run(mapping.sync_async()).unwrap();
        let mut bytes = [0; 4 * 4096];
        bed.device.read_image(1, 200 * 4096, &mut bytes).unwrap();
        assert_eq!([bytes[0], bytes[4096], bytes[2 * 4096], bytes[3 * 4096]], [1, 2, 202, 77]);
    }
}

#[test]
fn wb13_of_a_folio_that_is_dirty_in_part_only_the_dirty_pages_are_written() {
    let mut bed = Bed::new(ram(), options(4096));
    let mapping = bed.mapping();
    // Read in by one request: one folio of 16 pages.
    let mut bytes = vec![0; 16 * 4096];
    let installed = bed.engine().stats().folios_installed;
    bed.run(mapping.read_at_async(16 * 4096, &mut bytes)).unwrap();
    assert_eq!(bed.engine().stats().folios_installed - installed, 1);
    bed.run(mapping.write_at_async(17 * 4096 + 5, &[1; 10])).unwrap();
    bed.run(mapping.write_at_async(21 * 4096, &[2; 2 * 4096])).unwrap();
    assert_eq!(bed.engine().stats().dirty_pages, 3);
    bed.clear_seen();
    bed.run(mapping.sync_async()).unwrap();
    assert_eq!(written(&bed), [(17, 1), (21, 2)]);
    bed.assert_consistent();
}

#[test]
fn wb13_a_folio_is_under_writeback_until_all_its_parts_are_complete() {
    for order in [[0, 2], [2, 0]] {
        let mut bed = Bed::new(ram(), options(4096));
        let mapping = bed.mapping();
        bed.run(mapping.read_at_async(16 * 4096, &mut vec![0; 16 * 4096])).unwrap();
        bed.run(mapping.write_at_async(17 * 4096, &[1; 4096])).unwrap();
        bed.run(mapping.write_at_async(21 * 4096, &[2; 4096])).unwrap();
        // The two parts take different times, either way round.
        for (part, delay) in order.into_iter().enumerate() {
            let delay = Action::Delay(Duration::from_millis(1 + delay));
            bed.fault(NvmOpcode::WRITE, part as u64, 1, delay);
        }
        let mut sync = Box::pin(mapping.sync_async());
        assert!(bed.poll_once(sync.as_mut()).is_pending());
        bed.advance(Duration::from_micros(1500));
        assert_eq!(written(&bed).len(), 2, "both are with the device");
        assert!(bed.poll_once(sync.as_mut()).is_pending(), "one part has ended, one hasn't");
        // The folio can't go away meanwhile, though one of its parts is clean (WB-26).
        let mut discard = Box::pin(mapping.discard_async(16 * 4096..32 * 4096));
        assert!(bed.poll_once(discard.as_mut()).is_pending());
        bed.settle();
        let seen = bed.all_seen();
        assert!(bed.seen(NvmOpcode::WRITE_ZEROES).is_empty(), "zeroed under the write, {order:?}: {seen:?}");
        bed.run(sync).unwrap();
        bed.run(discard).unwrap();
        bed.assert_consistent();
    }
}

#[test]
fn wb44_a_page_is_one_piece_of_memory_and_is_written_as_a_whole() {
    for page_bytes in [4096u32, 8192, 16_384, 65_536] {
        for mut bed in beds(&ram(), 1024) {
            let mapping = paged(&mut bed, page_bytes);
            let size = page_bytes as usize;
            assert_eq!((mapping.page_bytes(), mapping.pages()), (size, 64 * MIB / u64::from(page_bytes)));
            let mut pin = bed.run(mapping.pin_mut_async(5)).unwrap();
            assert_eq!(pin.len(), size);
            pin[size - 1] = 8;
            drop(pin);
            // A few bytes make the page dirty as a whole.
            bed.run(mapping.write_at_async(9 * size as u64 + 100, &[1; 3])).unwrap();
            bed.settle();
            bed.assert_consistent();
            bed.clear_seen();
            bed.run(mapping.sync_async()).unwrap();
            let pages = size as u64 / 4096;
            let mut seen = written(&bed);
            seen.sort_unstable();
            assert_eq!(seen, [(5 * pages, pages), (9 * pages, pages)]);
            let mut byte = [0];
            bed.device.read_image(1, 6 * size as u64 - 1, &mut byte).unwrap();
            assert_eq!(byte, [8]);
        }
    }
}

#[test]
fn wb44_no_command_ends_within_a_page() {
    // MDTS of 64 KiB and pages of 16 and 64 KiB; NOIOB of 96 KiB, which is no multiple of 64.
    for (mdts, noiob_blocks, page_bytes) in [(4, 0, 16_384u32), (4, 0, 65_536), (6, 192, 16_384)] {
        for mut bed in beds(&EmulatedConfig { mdts, noiob_blocks, ..ram() }, 4096) {
            let mapping = paged(&mut bed, page_bytes);
            let size = u64::from(page_bytes);
            for page in 3..60u64 {
                bed.run(mapping.write_at_async(page * size, &vec![page as u8; size as usize])).unwrap();
            }
            bed.settle();
            bed.clear_seen();
            bed.run(mapping.sync_async()).unwrap();
            for (first, pages) in written(&bed) {
                assert!(first.is_multiple_of(size / 4096) && pages.is_multiple_of(size / 4096));
            }
        }
    }
}

#[test]
fn wb44_the_engine_tells_whether_the_device_writes_a_page_whole() {
    // AWUPF of 16 KiB in blocks of 512 bytes.
    let config = EmulatedConfig { awupf_z: 31, ..ram() };
    for (page_bytes, atomic) in [(4096, true), (16_384, true), (32_768, false)] {
        let mut bed = Bed::new(config.clone(), options(256));
        assert_eq!(paged(&mut bed, page_bytes).is_page_atomic(), atomic, "{page_bytes}");
    }
    // The page isn't aligned to the atomic unit.
    let mut bed = Bed::new(config.clone(), options(256));
    let shifted =
        MappingOptions { start_bytes: 512, len_bytes: Some(MIB), page_bytes: 16_384, ..Default::default() };
    assert!(!bed.open(&shifted).is_page_atomic());
    // The device can't take a page in one command.
    let mut bed = Bed::new(EmulatedConfig { mdts: 1, ..config }, options(256));
    assert!(!paged(&mut bed, 16_384).is_page_atomic());
}

#[test]
fn wb44_after_a_power_cut_an_atomic_page_is_old_or_new() {
    for seed in 0..60 {
        let config = EmulatedConfig { awupf_z: 31, ..fragile(8 * MIB) };
        let mut bed = Bed::new(config, EngineOptions { shards: 1 + seed as usize % 2, ..options(64) });
        let mapping = paged(&mut bed, 16_384);
        let mut rng = SmallRng::seed_from_u64(seed);
        for _ in 0..200 {
            let page = rng.random_range(0..40u64);
            // A part of the page is written; what is torn would show as two generations within it.
            let mut pin = bed.run(mapping.pin_mut_async(page)).unwrap();
            let generation = pin[0].wrapping_add(1);
            pin.fill(generation);
            drop(pin);
            if rng.random_range(0..30) == 0 {
                bed.advance(Duration::from_secs(6));
            }
        }
        drop(mapping);
        bed.crash(seed);
        bed.power_on();
        let mapping = paged(&mut bed, 16_384);
        for page in 0..40 {
            let pin = bed.run(mapping.pin_async(page)).unwrap();
            assert!(pin.iter().all(|&byte| byte == pin[0]), "page {page} is torn, seed {seed}");
        }
    }
}

#[test]
fn frames_kept_for_an_appender_are_taken_back_when_others_need_them() {
    let mut bed = Bed::new(ram(), options(1024));
    let mapping = bed.mapping();
    // Folios of some hundred pages are made; the last is filled in part only.
    for page in 0..290u64 {
        bed.run(mapping.write_at_async(page * 4096, &[1; 4096])).unwrap();
    }
    // Readers use the whole cache, and more.
    for page in 2000..4000u64 {
        bed.run(mapping.read_at_async(page * 4096, &mut [0; 4096])).unwrap();
    }
    bed.settle();
    bed.assert_consistent();
    bed.run(mapping.sync_async()).unwrap();
    let mut bytes = vec![0; 291 * 4096];
    bed.run(mapping.read_at_async(0, &mut bytes)).unwrap();
    assert!(bytes[..290 * 4096].iter().all(|&byte| byte == 1));
    assert!(bytes[290 * 4096..].iter().all(|&byte| byte == 0));
}

#[test]
fn page_sizes_that_cannot_be_are_refused_with_the_limit() {
    let mut bed = Bed::new(ram(), options(256));
    let engine = bed.engine.take().unwrap();
    for (page_bytes, len_bytes, words) in [
        (2048, None, "a power of two from 4096 to 65536"),
        (131_072, None, "a power of two from 4096 to 65536"),
        (12_288, None, "a power of two from 4096 to 65536"),
        (16_384, Some(20_480), "must be a multiple of its page_bytes, 16384; the next smaller is 16384"),
    ] {
        let wrong = MappingOptions { page_bytes, len_bytes, ..Default::default() };
        let error = bed.run(engine.mapping_async(&wrong)).unwrap_err();
        assert!(matches!(error, Error::Mapping { .. }) && error.to_string().contains(words), "{error}");
    }
    let _open =
        bed.run(engine.mapping_async(&MappingOptions { page_bytes: 8192, ..Default::default() })).unwrap();
    let error = bed.run(engine.mapping_async(&MappingOptions::default())).unwrap_err();
    assert!(error.to_string().contains("8192"), "{error}");
    bed.engine = Some(engine);
}

/// Everything at once against an array of bytes: reads, writes, appends, pins, discards and syncs, of pages of every
/// size, with a cache that is far too small.
#[test]
fn folios_of_all_sizes_agree_with_an_array_of_bytes() {
    const BYTES: u64 = 3 * MIB;
    let seeds: u64 = std::env::var("FOLIANT_SEEDS").ok().map_or(24, |seeds| seeds.parse().unwrap());
    for seed in 0..seeds {
        let mut rng = SmallRng::seed_from_u64(seed);
        let page_bytes = [4096u32, 4096, 8192, 16_384, 65_536][rng.random_range(0..5)];
        let shards = rng.random_range(1..4);
        let frames = shards as u64 * [64, 200, 600][rng.random_range(0..3)];
        println!("seed {seed}: pages of {page_bytes}, {shards} shards, {frames} frames");
        let config = EmulatedConfig { mdts: rng.random_range(0..6), ..EmulatedConfig::ram(4 * MIB, 512) };
        let mut bed = Bed::new(config, EngineOptions { shards, ..options(frames) });
        let start_bytes = 512 * rng.random_range(0..20u64);
        let range = MappingOptions { start_bytes, len_bytes: Some(BYTES), page_bytes, ..Default::default() };
        let mapping = bed.open(&range);
        let mut bytes = vec![0u8; BYTES as usize];
        let mut append_at = 0;
        for step in 0..400 {
            let offset = rng.random_range(0..BYTES);
            let len = [1, 100, 4096, 20_000, 300_000][rng.random_range(0..5)].min(BYTES - offset);
            let (from, to) = (offset as usize, (offset + len) as usize);
            let byte = rng.random();
            match rng.random_range(0..12) {
                0..=2 => {
                    let mut found = vec![0; len as usize];
                    bed.run(mapping.read_at_async(offset, &mut found)).unwrap();
                    assert!(found == bytes[from..to], "read of {from}..{to}, seed {seed}, step {step}");
                }
                3..=4 => {
                    bed.run(mapping.write_at_async(offset, &vec![byte; len as usize])).unwrap();
                    bytes[from..to].fill(byte);
                }
                5..=8 => {
                    // A writer who appends, now and then somewhere else.
                    if rng.random_range(0..8) == 0 {
                        append_at = rng.random_range(0..BYTES / 4096) * 4096;
                    }
                    for _ in 0..rng.random_range(1..40) {
                        let end = (append_at + 4096).min(BYTES);
                        let data = vec![byte; (end - append_at) as usize];
                        bed.run(mapping.write_at_async(append_at, &data)).unwrap();
                        bytes[append_at as usize..end as usize].fill(byte);
                        append_at = if end == BYTES { 0 } else { end };
                    }
                }
                9 => {
                    let page = rng.random_range(0..mapping.pages() - 1);
                    let mut pin = bed.run(mapping.pin_mut_async(page)).unwrap();
                    let next = bed.run(mapping.pin_async(page + 1)).unwrap();
                    pin[7] = byte;
                    let at = page as usize * page_bytes as usize;
                    assert_eq!(next[0], bytes[at + page_bytes as usize], "seed {seed}, step {step}");
                    bytes[at + 7] = byte;
                }
                10 => {
                    bed.run(mapping.discard_async(offset..offset + len)).unwrap();
                    bytes[from..to].fill(0);
                }
                _ => bed.run(mapping.sync_range_async(offset..offset + len)).unwrap(),
            }
            if step % 16 == 0 {
                bed.settle();
                bed.assert_consistent();
            }
        }
        bed.run(mapping.sync_async()).unwrap();
        let mut image = vec![0; BYTES as usize];
        bed.device.read_image(1, start_bytes, &mut image).unwrap();
        assert!(image == bytes, "the device holds what was written, seed {seed}");
    }
}
