//! Hits: pages held without an atomic operation, and read without being held.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use foliant::{
    Engine, EngineOptions, Error, Hugepages, LocalShards, Mapping, MappingOptions, PagePin, ShardThreads,
};
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController};

const PAGE: u64 = 4096;

fn open(frames: u64, pages: u64, shards: usize) -> (Engine, Mapping) {
    let device = EmulatedController::new(EmulatedConfig::ram(pages * PAGE, 4096)).unwrap();
    let options = EngineOptions {
        cache_bytes: frames * PAGE,
        shards,
        hugepages: Hugepages::Never,
        pin_wait: Duration::from_secs(60),
        ..Default::default()
    };
    let engine = Engine::open_on(device.attach().unwrap(), &options).unwrap();
    let mapping = engine.mapping(&MappingOptions { readahead_bytes_max: 0, ..Default::default() }).unwrap();
    (engine, mapping)
}

/// Pins a page until its pins are published: whatever earlier exclusive holders of biased pages, also those of other tests in
/// this process, have left to be paid for is paid after so many.
fn publish(mapping: &Mapping, page: u64) -> PagePin<'_> {
    for _ in 0..1 << 17 {
        drop(mapping.pin(page).unwrap());
    }
    mapping.pin(page).unwrap()
}

#[test]
fn a_page_in_use_is_held_though_its_header_doesnt_say_so() {
    for shards in [1, 2] {
        let (engine, mapping) = open(64 * shards as u64, 1024, shards);
        mapping.write_at(7 * PAGE, &[7; PAGE as usize]).unwrap();
        mapping.sync().unwrap();
        let pin = publish(&mapping, 7);
        assert!(format!("{pin:?}").contains("slot: Some"), "{pin:?}");
        // Everything else goes through the cache several times.
        for page in (0..1024).filter(|&page| page != 7).cycle().take(4096) {
            mapping.read_at(page * PAGE, &mut [0; 8]).unwrap();
        }
        assert!(engine.stats().pages_evicted > 2000, "{:?}", engine.stats());
        assert!(pin.iter().all(|&byte| byte == 7));
        let before = engine.stats().pages_read;
        drop(pin);
        assert!(mapping.pin(7).unwrap().iter().all(|&byte| byte == 7));
        assert_eq!(engine.stats().pages_read, before, "it was cached all the time");
        engine.close().unwrap();
    }
}

#[test]
fn who_wants_a_page_exclusively_waits_for_all_published_pins_also_one_that_another_thread_releases() {
    let (engine, mapping) = open(64, 64, 1);
    mapping.write_at(0, &[1; PAGE as usize]).unwrap();
    let pin = publish(&mapping, 0);
    let written = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (send, receive) = mpsc::channel();
        scope.spawn(|| {
            mapping.write_at(0, &[2; PAGE as usize]).unwrap();
            written.store(true, Ordering::SeqCst);
        });
        let (mapping, written) = (&mapping, &written);
        scope.spawn(move || {
            let pin: PagePin<'_> = receive.recv().unwrap();
            // Whatever of the writer's time passes, it has none with the page.
            for _ in 0..1000 {
                assert!(pin.iter().all(|&byte| byte == 1) && !written.load(Ordering::SeqCst));
            }
            // Readers come first.
            assert_eq!(mapping.pin(0).unwrap()[0], 1);
            drop(pin);
        });
        send.send(pin).unwrap();
    });
    assert!(written.into_inner());
    assert_eq!(mapping.pin(0).unwrap()[0], 2);
    engine.close().unwrap();
}

#[test]
fn who_holds_a_page_gets_it_once_more_while_a_writer_tries_to_have_it() {
    let (engine, mapping) = open(64, 64, 1);
    drop(publish(&mapping, 0));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                mapping.write_at(0, &[2; 8]).unwrap();
            }
        });
        for _ in 0..20_000 {
            let first = mapping.pin(0).unwrap();
            // Neither an error nor a wait for the writer, who waits for the first.
            let second = mapping.pin(0).unwrap();
            assert_eq!(first[0], second[0]);
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
    });
    engine.close().unwrap();
}

#[test]
fn a_thread_that_holds_many_pages_has_them_all() {
    let (engine, mapping) = open(128, 64, 1);
    for page in 0..40u64 {
        mapping.write_at(page * PAGE, &[page as u8; PAGE as usize]).unwrap();
    }
    (0..40).for_each(|page| drop(publish(&mapping, page % 4)));
    let pins: Vec<_> = (0..40).map(|page| mapping.pin(page).unwrap()).collect();
    let again: Vec<_> = (0..40).map(|page| mapping.pin(page).unwrap()).collect();
    for (page, pin) in pins.iter().chain(&again).enumerate() {
        assert!(pin.iter().all(|&byte| byte == (page % 40) as u8));
    }
    // Released in any order.
    drop(pins);
    drop(again);
    for page in 0..40 {
        mapping.pin_mut(page).unwrap()[0] ^= 1;
    }
    engine.close().unwrap();
}

#[test]
fn what_is_read_without_a_pin_is_of_one_moment() {
    let (engine, mapping) = open(64, 16, 1);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for writer in 0..2u8 {
            let (mapping, stop) = (&mapping, &stop);
            scope.spawn(move || {
                for round in 0..30_000u32 {
                    let value = (round << 1 | u32::from(writer)).to_le_bytes();
                    let mut pin = mapping.pin_mut(3).unwrap();
                    pin.chunks_exact_mut(4).for_each(|word| word.copy_from_slice(&value));
                }
                stop.store(true, Ordering::Relaxed);
            });
        }
        scope.spawn(|| {
            let mut looks = 0u64;
            while !stop.load(Ordering::Relaxed) || looks < 1000 {
                let (first, middle, all) = mapping
                    .read_with(3, |page| {
                        looks += 1;
                        let mut all = [0; PAGE as usize];
                        page.copy_to(0, &mut all).unwrap();
                        (page.read::<4>(0).unwrap(), page.read::<4>(2044).unwrap(), all)
                    })
                    .unwrap();
                assert_eq!(first, middle);
                assert!(all.chunks_exact(4).all(|word| word == first));
            }
        });
    });
    engine.close().unwrap();
}

#[test]
fn what_is_read_without_a_pin_is_of_the_page_that_was_asked_for() {
    const PAGES: u64 = 96;
    for shards in [1, 2] {
        let (engine, mapping) = open(64 * shards as u64, 2048, shards);
        // As many pages of the first two stripes, so that each shard has too many of them.
        let offset = |page: u64| (page % 2 * 512 + page / 2) * PAGE;
        for page in 0..PAGES * shards as u64 {
            mapping.write_at(offset(page), &[page as u8; PAGE as usize]).unwrap();
        }
        mapping.sync().unwrap();
        std::thread::scope(|scope| {
            for seed in 1..5u64 {
                let (mapping, offset) = (&mapping, &offset);
                scope.spawn(move || {
                    let mut at = seed;
                    for _ in 0..30_000 {
                        at = at
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1_442_695_040_888_963_407);
                        let page = (at >> 33) % (PAGES * shards as u64);
                        let read = |view: foliant::PageView<'_>| {
                            (view.read::<1>(0), view.read::<1>(PAGE as usize - 1))
                        };
                        let seen = mapping.read_with(offset(page) / PAGE, read).unwrap();
                        assert_eq!(seen, (Some([page as u8]), Some([page as u8])), "page {page}");
                    }
                });
            }
        });
        assert!(engine.stats().pages_evicted > 1000, "{:?}", engine.stats());
        engine.close().unwrap();
    }
}

#[test]
fn reading_without_a_pin_neither_splits_a_folio_nor_misses() {
    let (engine, mapping) = open(1024, 512, 1);
    let data: Vec<u8> = (0..512 * PAGE).map(|at| (at / PAGE) as u8).collect();
    mapping.write_at(0, &data).unwrap();
    // In use: somebody has read it.
    mapping.read_at(0, &mut [0; 8]).unwrap();
    let before = engine.stats();
    assert!(before.folios_installed < 512, "{before:?}");
    for page in 0..512 {
        assert_eq!(mapping.read_with(page, |page| page.read(100)).unwrap(), Some([page as u8]));
    }
    let after = engine.stats();
    assert_eq!((after.folios_split, after.requests), (before.folios_split, before.requests));
    assert_eq!(after.read_hits, before.read_hits + 512);
    engine.close().unwrap();
}

#[test]
fn a_view_ends_where_its_page_ends_and_a_page_where_its_mapping_ends() {
    let (engine, mapping) = open(64, 16, 1);
    mapping.close().unwrap();
    let options =
        MappingOptions { len_bytes: Some(PAGE + 100), readahead_bytes_max: 0, ..Default::default() };
    let options = MappingOptions { capacity_bytes: Some(8 * PAGE), ..options };
    let mapping = engine.mapping(&options).unwrap();
    mapping.write_at(0, &[9; PAGE as usize + 100]).unwrap();
    for _ in 0..3 {
        let first = mapping.read_with(0, |page| (page.len(), page.read::<8>(4088), page.read::<8>(4089)));
        assert_eq!(first.unwrap(), (4096, Some([9; 8]), None));
        let last = mapping.read_with(1, |page| (page.len(), page.read::<4>(96), page.read::<4>(97)));
        assert_eq!(last.unwrap(), (100, Some([9; 4]), None));
        assert_eq!(mapping.read_with(1, |page| page.copy_to(1, &mut [0; 100])).unwrap(), None);
        assert_eq!(mapping.read_with(1, |page| page.read::<1>(usize::MAX)).unwrap(), None);
        let error = mapping.read_with(2, |page| page.len()).unwrap_err();
        assert!(matches!(error, Error::OutOfRange { .. }), "{error}");
        let error = mapping.read_with(u64::MAX, |page| page.len()).unwrap_err();
        assert!(matches!(error, Error::OutOfRange { .. }), "{error}");
    }
    drop(publish(&mapping, 0));
    mapping.set_len(50).unwrap();
    assert_eq!(mapping.read_with(0, |page| page.len()).unwrap(), 50);
    assert_eq!(mapping.pin(0).unwrap().len(), 50);
    let other = mapping.clone();
    mapping.close().unwrap();
    assert!(matches!(other.read_with(0, |page| page.len()), Err(Error::Closed)));
    assert!(matches!(other.pin(0), Err(Error::Closed)));
    engine.close().unwrap();
}

#[test]
fn a_thread_that_polls_its_own_shards_reads_writes_and_syncs_without_another() {
    let device = EmulatedController::new(EmulatedConfig::ram(64 * PAGE, 4096)).unwrap();
    let options = EngineOptions {
        cache_bytes: 64 * 2 * PAGE,
        shards: 2,
        hugepages: Hugepages::Never,
        threads: ShardThreads::Manual,
        ..Default::default()
    };
    let engine = Engine::open_on(device.attach().unwrap(), &options).unwrap();
    let shards = LocalShards::new(engine.take_shards());
    let mapping = shards.block_on(engine.mapping_async(&MappingOptions::default())).unwrap();
    let local = shards.mapping(&mapping);
    for page in 0..64 {
        local.write_at(page * PAGE, &[page as u8; PAGE as usize]).unwrap();
    }
    local.pin_mut(5).unwrap()[0] = 99;
    local.sync().unwrap();
    for _ in 0..3 {
        for page in 0..64 {
            let first = if page == 5 { 99 } else { page as u8 };
            assert_eq!((local.pin(page).unwrap()[0], local.pin(page).unwrap()[9]), (first, page as u8));
            assert_eq!(local.read_with(page, |page| page.read(0)).unwrap(), Some([first]));
        }
    }
    let mut page = [0; PAGE as usize];
    device.read_image(1, 5 * PAGE, &mut page).unwrap();
    assert_eq!((page[0], page[1]), (99, 5));
    assert!(matches!(local.pin(64), Err(Error::OutOfRange { .. })));
    // Another thread uses the mapping as ever, while this one polls.
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            mapping.pin_mut(9).unwrap()[0] = 1;
            mapping.sync()
        });
        while !other.is_finished() {
            shards.poll();
        }
        other.join().unwrap().unwrap();
    });
    assert_eq!(local.pin(9).unwrap()[0], 1);
    engine.return_shards(shards.into_shards());
    engine.close().unwrap();
}

#[test]
fn reading_without_a_pin_by_a_local_handle_splits_no_folio_either() {
    let device = EmulatedController::new(EmulatedConfig::ram(512 * PAGE, 4096)).unwrap();
    let options = EngineOptions {
        cache_bytes: 1024 * PAGE,
        hugepages: Hugepages::Never,
        threads: ShardThreads::Manual,
        ..Default::default()
    };
    let engine = Engine::open_on(device.attach().unwrap(), &options).unwrap();
    let shards = LocalShards::new(engine.take_shards());
    let mapping = shards.block_on(engine.mapping_async(&MappingOptions::default())).unwrap();
    let local = shards.mapping(&mapping);
    let data: Vec<u8> = (0..512 * PAGE).map(|at| (at / PAGE) as u8).collect();
    local.write_at(0, &data).unwrap();
    local.read_at(0, &mut [0; 8]).unwrap();
    let before = engine.stats();
    assert!(before.folios_installed < 512, "{before:?}");
    for page in 0..512 {
        assert_eq!(local.read_with(page, |page| page.read(100)).unwrap(), Some([page as u8]));
    }
    shards.poll();
    let after = engine.stats();
    assert_eq!((after.folios_split, after.requests), (before.folios_split, before.requests));
    engine.return_shards(shards.into_shards());
    engine.close().unwrap();
}

#[test]
fn a_line_is_fetched_of_cached_pages_alone_and_nothing_else_happens() {
    for (shards, page_bytes) in [(1, 4096), (2, 4096), (1, 16384)] {
        let device = EmulatedController::new(EmulatedConfig::ram(1024 * PAGE, 4096)).unwrap();
        let options = EngineOptions {
            cache_bytes: 64 * PAGE * shards as u64,
            shards,
            hugepages: Hugepages::Never,
            ..Default::default()
        };
        let engine = Engine::open_on(device.attach().unwrap(), &options).unwrap();
        let half = 512 * PAGE;
        let of = |start_bytes| MappingOptions {
            start_bytes,
            len_bytes: Some(half),
            page_bytes,
            readahead_bytes_max: 0,
            ..Default::default()
        };
        let (mapping, other) = (engine.mapping(&of(half)).unwrap(), engine.mapping(&of(0)).unwrap());
        let pages = half / u64::from(page_bytes);
        let cached = [3, 4, pages - 1];
        cached.iter().for_each(|&page| drop(mapping.pin(page).unwrap()));
        let before = engine.stats();
        for page in (0..2 * pages).chain([1 << 36, 1 << 48, (1 << 48) + 3, u64::MAX - pages + 1, u64::MAX]) {
            for within in [0, 100, 4095, 4096, 16384, usize::MAX] {
                assert_eq!(
                    mapping.prefetch_line(page, within),
                    cached.contains(&page),
                    "page {page}, {within}"
                );
                assert!(!other.prefetch_line(page, within), "page {page} of the other mapping");
            }
        }
        let after = engine.stats();
        let counters = |stats: &foliant::EngineStats| (stats.read_hits, stats.requests, stats.pages_read);
        assert_eq!(counters(&after), counters(&before));
        mapping.clone().close().unwrap();
        assert!(!mapping.prefetch_line(3, 0), "nothing of a closed mapping is cached");
        engine.close().unwrap();
    }
}

#[test]
fn a_page_number_far_behind_the_end_shows_nobody_another_mapping_s_bytes() {
    let device = EmulatedController::new(EmulatedConfig::ram(512 * PAGE, 4096)).unwrap();
    let options =
        EngineOptions { cache_bytes: 1024 * PAGE, hugepages: Hugepages::Never, ..Default::default() };
    let engine = Engine::open_on(device.attach().unwrap(), &options).unwrap();
    let part = |start_bytes| {
        let options = MappingOptions { start_bytes, len_bytes: Some(64 * PAGE), ..Default::default() };
        engine.mapping(&options).unwrap()
    };
    let (one, other) = (part(0), part(64 * PAGE));
    other.write_at(0, &[0xBB; PAGE as usize]).unwrap();
    for _ in 0..3 {
        drop(other.pin(0).unwrap());
    }
    let mut shown = None;
    let result = one.read_with(1 << 48, |page| shown = page.read::<1>(0));
    assert!(matches!(result, Err(Error::OutOfRange { .. })), "{result:?}");
    assert_eq!(shown, None);
    engine.close().unwrap();
}
