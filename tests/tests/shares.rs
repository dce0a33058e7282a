//! Cache shares, and the size of the cache: limits that hold, that can be changed while everything goes on, and that
//! wait for nobody.

use std::task::Poll;
use std::time::Duration;

use foliant::{CacheShare, EngineOptions, Error, Mapping, MappingOptions, ShareOptions};
use foliant_nvme_emulated::EmulatedConfig;
use foliant_nvme_spec::NvmOpcode;
use foliant_tests::{Bed, options};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

fn bed(frames: u64, shards: usize) -> Bed {
    let options = EngineOptions { shards, cache_bytes: frames * PAGE * shards as u64, ..options(frames) };
    Bed::new(EmulatedConfig::ram(64 * MIB, 512), options)
}

fn share(bed: &Bed, name: &str, pages: u64) -> CacheShare {
    let options = ShareOptions { limit_bytes: Some(pages * PAGE), ..Default::default() };
    bed.engine().share(name, &options).unwrap()
}

/// A mapping of 16 MiB, the `at`th, in a share; without readahead.
fn open(bed: &mut Bed, at: u64, share: Option<&CacheShare>) -> Mapping {
    bed.open(&MappingOptions {
        start_bytes: at * 16 * MIB,
        len_bytes: Some(16 * MIB),
        readahead_bytes_max: 0,
        share: share.cloned(),
        ..Default::default()
    })
}

fn read(bed: &mut Bed, mapping: &Mapping, pages: std::ops::Range<u64>) {
    for page in pages {
        bed.run(mapping.read_at_async(page * PAGE, &mut [0; 8])).unwrap();
    }
}

fn write(bed: &mut Bed, mapping: &Mapping, pages: std::ops::Range<u64>) {
    for page in pages {
        bed.run(mapping.write_at_async(page * PAGE, &[page as u8; PAGE as usize])).unwrap();
    }
}

/// Pages that reading them again brings in.
fn missing(bed: &mut Bed, mapping: &Mapping, pages: std::ops::Range<u64>) -> u64 {
    let before = bed.engine().stats().pages_read;
    read(bed, mapping, pages);
    bed.engine().stats().pages_read - before
}

#[test]
fn a_share_at_its_limit_evicts_its_own_pages_and_nobody_elses() {
    for shards in [1, 2] {
        let mut bed = bed(256, shards);
        let scans = share(&bed, "scans", 64 * shards as u64);
        let scan = open(&mut bed, 0, Some(&scans));
        let other = open(&mut bed, 1, None);
        // Each shard has its part.
        for at in 0..8 {
            read(&mut bed, &other, at * 512..at * 512 + 16);
        }
        // Upwards and downwards, so that the search for a victim comes around.
        for at in (0..4096).chain((0..4096).rev()) {
            read(&mut bed, &scan, at..at + 1);
            assert!(scans.usage().used_bytes <= scans.usage().limit_bytes, "{:?}", scans.usage());
        }
        assert_eq!(scans.usage().used_bytes, scans.usage().limit_bytes);
        let missing: u64 = (0..8).map(|at| missing(&mut bed, &other, at * 512..at * 512 + 16)).sum();
        assert_eq!(missing, 0, "{shards} shards");
        bed.assert_consistent();
    }
}

#[test]
fn large_requests_appends_and_readahead_keep_to_the_limit() {
    let mut bed = bed(1024, 1);
    let small = share(&bed, "small", 40);
    let mapping = bed.open(&MappingOptions {
        len_bytes: Some(16 * MIB),
        share: Some(small.clone()),
        ..Default::default()
    });
    let within = |what: &str| assert!(small.usage().used_bytes <= 40 * PAGE, "{what}: {:?}", small.usage());
    let mut buffer = vec![0; 200 * PAGE as usize];
    for at in 0..10 {
        bed.run(mapping.read_at_async(at * 200 * PAGE, &mut buffer)).unwrap();
        within("a read");
    }
    for at in 0..100 {
        bed.run(mapping.write_at_async(at * 30_000, &buffer[..30_000])).unwrap();
        within("an append");
    }
    let scattered: Vec<u64> = (0..100).map(|at| 1000 + at * 17).collect();
    let mut pages = vec![vec![0; PAGE as usize]; scattered.len()];
    let mut reads: Vec<_> =
        scattered.iter().zip(&mut pages).map(|(page, buf)| foliant::ReadAt::new(page * PAGE, buf)).collect();
    bed.run(mapping.read_many_async(&mut reads)).unwrap();
    within("a batch");
    bed.run(mapping.sync_async()).unwrap();
    for page in 2000..3000 {
        read(&mut bed, &mapping, page..page + 1);
        bed.settle();
        within("a sequential read");
    }
    assert!(bed.engine().stats().readahead_pages > 0, "readahead goes on within the share");
    bed.assert_consistent();
}

#[test]
fn what_is_used_again_outlives_a_scan_within_its_share() {
    let mut bed = bed(256, 1);
    let limited = share(&bed, "limited", 64);
    let mapping = open(&mut bed, 0, Some(&limited));
    for round in 0..400 {
        read(&mut bed, &mapping, 0..16);
        read(&mut bed, &mapping, 100 + round * 8..108 + round * 8);
    }
    let missing = missing(&mut bed, &mapping, 0..16);
    assert_eq!(missing, 0);
}

#[test]
fn a_lowered_limit_is_reached_in_the_background_and_a_raised_one_at_once() {
    for shards in [1, 2] {
        let mut bed = bed(256, shards);
        let limited = share(&bed, "limited", 200 * shards as u64);
        let mapping = open(&mut bed, 0, Some(&limited));
        read(&mut bed, &mapping, 0..4096);
        assert_eq!(limited.usage().used_bytes, 200 * PAGE * shards as u64);
        let usage = limited.resize(50 * PAGE * shards as u64).unwrap();
        assert_eq!(usage.above_bytes, 150 * PAGE * shards as u64, "nothing has been waited for");
        bed.run(limited.await_limit_async()).unwrap();
        assert_eq!(limited.usage().used_bytes, 50 * PAGE * shards as u64);
        assert_eq!(limited.usage().above_bytes, 0);
        limited.resize(100 * PAGE * shards as u64).unwrap();
        read(&mut bed, &mapping, 0..4096);
        assert_eq!(limited.usage().used_bytes, 100 * PAGE * shards as u64);
        bed.assert_consistent();
    }
}

#[test]
fn below_what_is_dirty_a_limit_is_reached_when_that_is_written_and_nothing_is_lost() {
    let mut bed = bed(256, 1);
    let limited = share(&bed, "limited", 128);
    let mapping = open(&mut bed, 0, Some(&limited));
    write(&mut bed, &mapping, 0..128);
    assert_eq!(bed.engine().stats().dirty_pages, 128);
    let usage = limited.resize(32 * PAGE).unwrap();
    assert_eq!(usage.above_bytes, 96 * PAGE);
    bed.run(limited.await_limit_async()).unwrap();
    // Folios go whole.
    let used = limited.usage().used_bytes;
    assert!((16 * PAGE..=32 * PAGE).contains(&used), "{used}");
    let mut page = [0; PAGE as usize];
    for at in 0..128 {
        bed.run(mapping.read_at_async(at * PAGE, &mut page)).unwrap();
        assert_eq!(page, [at as u8; PAGE as usize]);
    }
}

#[test]
fn below_what_is_pinned_a_limit_is_an_error_by_deadline_and_reached_when_pins_go() {
    let mut bed = bed(256, 1);
    let limited = share(&bed, "limited", 128);
    let mapping = open(&mut bed, 0, Some(&limited));
    let pins: Vec<_> = (0..60).map(|page| bed.run(mapping.pin_async(page)).unwrap()).collect();
    let exclusive = bed.run(mapping.pin_mut_async(70)).unwrap();
    read(&mut bed, &mapping, 80..100);
    assert_eq!(limited.resize(32 * PAGE).unwrap().above_bytes, 49 * PAGE);
    let error = bed.run(limited.await_limit_async()).unwrap_err();
    assert!(matches!(error, Error::AboveLimit { above_pages: 29, .. }), "{error}");
    assert!(error.to_string().contains("limited held 29 pages more"), "{error}");
    assert!(pins.iter().all(|pin| pin.len() == PAGE as usize));
    // A request for more of the share waits, one for another mapping doesn't.
    let error = bed.run(mapping.read_at_async(300 * PAGE, &mut [0])).unwrap_err();
    assert!(
        matches!(&error, Error::ShareFull { limit_pages: 32, share, .. } if &**share == "limited"),
        "{error}"
    );
    let other = open(&mut bed, 1, None);
    read(&mut bed, &other, 0..64);
    drop((pins, exclusive));
    bed.advance(Duration::from_millis(20));
    assert_eq!(limited.usage().above_bytes, 0);
    read(&mut bed, &mapping, 300..301);
    bed.assert_consistent();
}

#[test]
fn a_share_full_of_pins_holds_up_nobody_else() {
    let mut bed = bed(256, 1);
    let limited = share(&bed, "limited", 32);
    let (mapping, other) = (open(&mut bed, 0, Some(&limited)), open(&mut bed, 1, None));
    let pins: Vec<_> = (0..32).map(|page| bed.run(mapping.pin_async(page)).unwrap()).collect();
    let mut byte = [0];
    let mut first = Box::pin(mapping.read_at_async(50 * PAGE, &mut byte));
    assert!(bed.poll_once(first.as_mut()).is_pending());
    bed.settle();
    read(&mut bed, &other, 0..100);
    drop(pins);
    bed.run(first).unwrap();
}

#[test]
fn what_is_guaranteed_to_a_share_others_leave_to_it() {
    let mut bed = bed(256, 1);
    let options = ShareOptions { limit_bytes: None, guaranteed_bytes: 100 * PAGE };
    let kept = bed.engine().share("kept", &options).unwrap();
    let (mapping, other) = (open(&mut bed, 0, Some(&kept)), open(&mut bed, 1, None));
    read(&mut bed, &mapping, 0..100);
    for round in 0..3 {
        read(&mut bed, &other, 0..2000);
        assert_eq!(kept.usage().used_bytes, 100 * PAGE, "in round {round}");
    }
    assert_eq!(missing(&mut bed, &mapping, 0..100), 0);
    // Beyond that, and without it, they compete.
    kept.guarantee(0).unwrap();
    read(&mut bed, &other, 0..2000);
    assert!(kept.usage().used_bytes < 50 * PAGE, "{:?}", kept.usage());
}

#[test]
fn the_cache_shrinks_and_grows_while_it_is_used() {
    for shards in [1, 2] {
        let mut bed = bed(256, shards);
        let mapping = open(&mut bed, 0, None);
        write(&mut bed, &mapping, 0..64);
        read(&mut bed, &mapping, 0..4096);
        assert!(bed.engine().cache_usage().used_bytes > 200 * PAGE * shards as u64);
        let usage = bed.engine().resize_cache(64 * PAGE * shards as u64).unwrap();
        assert!(usage.above_bytes > 100 * PAGE * shards as u64, "{usage:?}");
        let engine = bed.engine.take().unwrap();
        bed.run(engine.await_cache_limit_async()).unwrap();
        bed.engine = Some(engine);
        for at in 0..64 {
            write(&mut bed, &mapping, at * 64..at * 64 + 1);
            read(&mut bed, &mapping, at * 64..at * 64 + 40);
            let usage = bed.engine().cache_usage();
            assert!(usage.used_bytes <= usage.limit_bytes && usage.above_bytes == 0, "{usage:?}");
        }
        let stats = bed.engine().stats();
        assert_eq!(stats.pages_cached, stats.pages_installed - stats.pages_released);
        assert_eq!(stats.pages_cached * PAGE, bed.engine().cache_usage().used_bytes);
        bed.engine().resize_cache(256 * PAGE * shards as u64).unwrap();
        read(&mut bed, &mapping, 0..4096);
        assert!(bed.engine().cache_usage().used_bytes > 200 * PAGE * shards as u64);
        bed.assert_consistent();
    }
}

#[test]
fn limits_that_cannot_be_are_refused_with_the_value_the_limit_and_what_helps() {
    let mut bed = bed(256, 2);
    let error = |result: foliant::Result<()>, words: &[&str]| {
        let error = result.unwrap_err().to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "{error:?} should say {word:?}"));
    };
    let make = |limit_bytes: Option<u64>, guaranteed_bytes| {
        bed.engine().share("s", &ShareOptions { limit_bytes, guaranteed_bytes }).map(drop)
    };
    error(make(Some(5000), 0), &["limit_bytes = 5000", "262144", "2097152"]);
    error(make(Some(3 * MIB), 0), &["limit_bytes = 3145728", "2097152"]);
    error(make(Some(MIB), 2 * MIB), &["guaranteed_bytes = 2097152", "at most the share's limit, 1048576"]);
    error(
        make(None, 2 * MIB),
        &["guaranteed_bytes = 2097152", "1572864 bytes, three quarters", "resize_cache"],
    );
    error(
        bed.engine().resize_cache(3 * MIB).map(drop),
        &["resize_cache = 3145728", "2097152", "cache_bytes"],
    );
    error(bed.engine().resize_cache(5000).map(drop), &["resize_cache = 5000", "524288"]);
    let kept = ShareOptions { limit_bytes: Some(MIB), guaranteed_bytes: MIB };
    let kept = bed.engine().share("kept", &kept).unwrap();
    error(kept.resize(MIB / 2).map(drop), &["guaranteed_bytes = 1048576", "524288"]);
    error(
        bed.engine().resize_cache(MIB).map(drop),
        &["resize_cache = 1048576", "guaranteed", "lower those first"],
    );
    error(
        bed.engine().share("kept", &ShareOptions::default()).map(drop),
        &["\"kept\"", "it is open with", "resize"],
    );
    let other = Bed::new(EmulatedConfig::ram(MIB, 512), options(64));
    let foreign = other.engine().share("foreign", &ShareOptions::default()).unwrap();
    let foreign = MappingOptions { share: Some(foreign), ..Default::default() };
    error(bed.try_open(&foreign).map(drop), &["\"foreign\"", "another engine's"]);
    let _mapping = open(&mut bed, 0, Some(&kept));
    let again = MappingOptions { len_bytes: Some(16 * MIB), ..Default::default() };
    error(bed.try_open(&again).map(drop), &["open with share: Some(\"kept\")"]);
}

#[test]
fn a_share_lasts_as_long_as_a_handle_or_a_mapping_and_its_number_is_used_again() {
    let mut bed = bed(256, 1);
    for round in 0..200 {
        let limited = share(&bed, "limited", 64 + round % 3);
        let mapping = open(&mut bed, 0, Some(&limited));
        drop(limited);
        let limited = share(&bed, "limited", 64 + round % 3);
        read(&mut bed, &mapping, 0..100);
        assert_eq!(limited.usage().used_bytes, (64 + round % 3) * PAGE);
        bed.run(mapping.close_async()).unwrap();
        assert_eq!(limited.usage().used_bytes, 0);
    }
    let names: Vec<_> = (0..63).map(|at| share(&bed, &format!("share {at}"), 64)).collect();
    let error = bed.engine().share("one more", &ShareOptions::default()).unwrap_err().to_string();
    assert!(error.contains("63 shares exist"), "{error}");
    drop(names);
    share(&bed, "one more", 64);
}

#[test]
fn a_log_passes_the_limit_of_its_share_so_that_what_waits_for_it_can_be_written() {
    let mut bed = bed(256, 1);
    let limited = share(&bed, "limited", 32);
    let gate = bed.engine().gate("log");
    let log = bed.open(&MappingOptions {
        len_bytes: Some(MIB),
        log_of: Some(gate.clone()),
        share: Some(limited.clone()),
        ..Default::default()
    });
    let data = bed.open(&MappingOptions {
        start_bytes: 16 * MIB,
        len_bytes: Some(MIB),
        gate: Some(gate.clone()),
        share: Some(limited.clone()),
        ..Default::default()
    });
    for page in 0..32 {
        let lsn = foliant::Lsn(page + 1);
        bed.run(data.write_at_lsn_async(page * PAGE, &[1; PAGE as usize], lsn)).unwrap();
    }
    let mut byte = [0];
    let mut more = Box::pin(data.read_at_async(100 * PAGE, &mut byte));
    assert!(matches!(bed.poll_once(more.as_mut()), Poll::Pending));
    bed.settle();
    bed.run(log.write_at_async(0, &[2; 3 * PAGE as usize])).unwrap();
    bed.run(log.sync_async()).unwrap();
    gate.advance_durable_lsn(foliant::Lsn(32)).unwrap();
    bed.run(more).unwrap();
    assert!(!bed.seen(NvmOpcode::WRITE).is_empty());
    bed.assert_consistent();
}
