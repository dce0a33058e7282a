//! Hints: what they do, what they leave alone, and that nothing is lost by them.

use std::ops::Range;
use std::time::Duration;

use foliant::{Advice, EngineOptions, Error, Lsn, Mapping, MappingOptions};
use foliant_nvme_emulated::EmulatedConfig;
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use foliant_tests::{Bed, options};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const ALL: [Advice; 6] =
    [Advice::Normal, Advice::Sequential, Advice::Random, Advice::NoReuse, Advice::WillNeed, Advice::DontNeed];

fn bed(frames: u64, shards: usize) -> Bed {
    let options = EngineOptions { shards, cache_bytes: frames * PAGE * shards as u64, ..options(frames) };
    Bed::new(EmulatedConfig::ram(64 * MIB, 512), options)
}

fn bytes(pages: Range<u64>) -> Range<u64> {
    pages.start * PAGE..pages.end * PAGE
}

fn read(bed: &mut Bed, mapping: &Mapping, pages: Range<u64>) {
    for page in pages {
        bed.run(mapping.read_at_async(page * PAGE, &mut [0; PAGE as usize])).unwrap();
    }
}

/// Pages of the range that have to be brought in.
fn missing(bed: &mut Bed, mapping: &Mapping, pages: Range<u64>) -> u64 {
    let before = bed.engine().stats().pages_read;
    read(bed, mapping, pages);
    bed.engine().stats().pages_read - before
}

fn without_readahead() -> MappingOptions {
    MappingOptions { readahead_bytes_max: 0, ..Default::default() }
}

#[test]
fn a_hint_outside_the_mapping_is_refused_whatever_it_is_and_one_of_nothing_does_nothing() {
    let mut bed = bed(64, 1);
    let mapping = bed.mapping();
    for advice in ALL {
        let error = bed.run(mapping.advise_async(MIB..65 * MIB, advice)).unwrap_err();
        assert!(matches!(error, Error::OutOfRange { offset: MIB, .. }), "{advice:?}: {error}");
        let text = error.to_string();
        for word in ["1048576..68157440", "67108864", "within it"] {
            assert!(text.contains(word), "{text:?} should say {word:?}");
        }
        #[expect(clippy::reversed_empty_ranges, reason = "that is what is refused")]
        let inverted = 8192..4096;
        let error = bed.run(mapping.advise_async(inverted, advice)).unwrap_err();
        assert!(matches!(error, Error::InvertedRange { .. }), "{advice:?}: {error}");
        bed.run(mapping.advise_async(64 * MIB..64 * MIB, advice)).unwrap();
    }
    assert_eq!(bed.engine().stats().pages_read, 0);
    bed.run(mapping.clone().close_async()).unwrap();
    for advice in ALL {
        let error = bed.run(mapping.advise_async(0..PAGE, advice)).unwrap_err();
        assert!(matches!(error, Error::Closed), "{error}");
    }
}

#[test]
fn will_need_starts_reads_and_waits_for_nothing() {
    let mut bed = bed(256, 2);
    let mapping = bed.open(&without_readahead());
    let mut advice = Box::pin(mapping.advise_async(bytes(0..40), Advice::WillNeed));
    assert!(bed.poll_once(advice.as_mut()).is_ready());
    drop(advice);
    bed.settle();
    assert_eq!(bed.engine().stats().pages_read, 40);
    assert_eq!(missing(&mut bed, &mapping, 0..40), 0);
}

#[test]
fn dont_need_evicts_clean_pages_at_once_and_dirty_ones_after_they_were_written() {
    for shards in [1, 2] {
        let mut bed = bed(256, shards);
        let mapping = bed.open(&without_readahead());
        // Around the border of two stripes, so that both shards have some.
        let at = 512 - 40;
        read(&mut bed, &mapping, at..at + 40);
        for page in at + 40..at + 80 {
            let data = [page as u8; PAGE as usize];
            bed.run(mapping.write_at_async(page * PAGE, &data)).unwrap();
        }
        bed.clear_seen();
        bed.run(mapping.advise_async(bytes(at..at + 80), Advice::DontNeed)).unwrap();
        assert!(!bed.seen(NvmOpcode::WRITE).is_empty() && bed.seen(NvmOpcode::FLUSH).is_empty());
        let stats = bed.engine().stats();
        assert_eq!(
            (stats.pages_cached, stats.dirty_pages, stats.writeback_pages),
            (0, 0, 0),
            "{shards} shards"
        );
        let mut page = [0; PAGE as usize];
        for at in at + 40..at + 80 {
            bed.run(mapping.read_at_async(at * PAGE, &mut page)).unwrap();
            assert_eq!(page, [at as u8; PAGE as usize]);
        }
        // Nothing is remembered of what isn't needed.
        assert_eq!(bed.engine().stats().refaults, 0);
        bed.assert_consistent();
    }
}

#[test]
fn dont_need_leaves_pages_that_are_pinned_or_lie_in_the_range_in_part() {
    let mut bed = bed(256, 1);
    let mapping = bed.open(&MappingOptions { start_bytes: MIB, len_bytes: Some(MIB), ..without_readahead() });
    read(&mut bed, &mapping, 0..20);
    let shared = bed.run(mapping.pin_async(5)).unwrap();
    let mut exclusive = bed.run(mapping.pin_mut_async(6)).unwrap();
    exclusive.fill(9);
    let before = bed.now_ns();
    bed.run(mapping.advise_async(100..19 * PAGE + 100, Advice::DontNeed)).unwrap();
    assert!(bed.now_ns() - before < 1_000_000_000, "nobody was waited for");
    drop((shared, exclusive));
    assert_eq!(bed.engine().stats().pages_cached, 4, "the first, the last, and two pinned ones");
    for page in [0, 5, 6, 19] {
        assert_eq!(missing(&mut bed, &mapping, page..page + 1), 0);
    }
    // The last page of all is whole, however long it is.
    let short = bed.open(&MappingOptions {
        len_bytes: Some(PAGE + 100),
        capacity_bytes: Some(MIB),
        ..without_readahead()
    });
    bed.run(short.write_at_async(0, &[1; PAGE as usize + 100])).unwrap();
    bed.run(short.advise_async(0..PAGE + 100, Advice::DontNeed)).unwrap();
    let mut data = [0; PAGE as usize + 100];
    let read_before = bed.engine().stats().pages_read;
    bed.run(short.read_at_async(0, &mut data)).unwrap();
    assert_eq!((data, bed.engine().stats().pages_read - read_before), ([1; PAGE as usize + 100], 2));
}

#[test]
fn dont_need_takes_its_part_of_a_large_folio() {
    let mut bed = bed(1024, 1);
    let mapping = bed.open(&without_readahead());
    bed.run(mapping.write_at_async(0, &vec![7; 256 * PAGE as usize])).unwrap();
    bed.run(mapping.sync_async()).unwrap();
    assert!(bed.engine().stats().folios_installed < 64, "{:?}", bed.engine().stats());
    bed.run(mapping.advise_async(bytes(10..100), Advice::DontNeed)).unwrap();
    bed.assert_consistent();
    assert_eq!(missing(&mut bed, &mapping, 0..10), 0);
    assert_eq!(missing(&mut bed, &mapping, 100..256), 0);
    assert_eq!(missing(&mut bed, &mapping, 10..100), 90);
}

#[test]
fn dont_need_keeps_what_waits_for_its_log_and_what_cannot_be_written() {
    let mut bed = bed(256, 1);
    let gate = bed.engine().gate("log");
    let gated = bed.open(&MappingOptions { len_bytes: Some(MIB), gate: Some(gate), ..without_readahead() });
    bed.run(gated.write_at_lsn_async(0, &[1; PAGE as usize], Lsn(5))).unwrap();
    let before = bed.now_ns();
    bed.run(gated.advise_async(0..MIB, Advice::DontNeed)).unwrap();
    assert!(bed.now_ns() - before < 1_000_000_000, "the log wasn't waited for");
    assert_eq!(missing(&mut bed, &gated, 0..1), 0);
    let other = bed.open(&MappingOptions { start_bytes: MIB, len_bytes: Some(MIB), ..without_readahead() });
    bed.run(other.write_at_async(0, &[2; PAGE as usize])).unwrap();
    bed.fail(NvmOpcode::WRITE, 0, 1, Status::of(StatusCode::CAPACITY_EXCEEDED).with_dnr(true));
    bed.run(other.advise_async(0..MIB, Advice::DontNeed)).unwrap();
    assert_eq!(missing(&mut bed, &other, 0..1), 0);
    let error = bed.run(other.sync_async()).unwrap_err();
    assert!(matches!(error, Error::Device { .. }), "{error}");
}

#[test]
fn dont_need_of_a_page_that_the_device_does_not_write_gives_up_and_keeps_it() {
    let mut bed = bed(64, 1);
    let mapping = bed.open(&without_readahead());
    bed.run(mapping.write_at_async(0, &[3; PAGE as usize])).unwrap();
    bed.fault(NvmOpcode::WRITE, 0, 1, foliant_nvme_emulated::Action::Delay(Duration::from_secs(15)));
    let before = bed.now_ns();
    bed.run(mapping.advise_async(0..MIB, Advice::DontNeed)).unwrap();
    let waited = Duration::from_nanos(bed.now_ns() - before);
    assert!(waited >= Duration::from_secs(10) && waited < Duration::from_secs(12), "{waited:?}");
    assert_eq!(missing(&mut bed, &mapping, 0..1), 0);
}

/// Pages that were read ahead of a sequential reader of 64 pages.
fn read_ahead_of(bed: &mut Bed, mapping: &Mapping, first: u64) -> u64 {
    let before = bed.engine().stats().readahead_pages;
    for page in first..first + 64 {
        read(bed, mapping, page..page + 1);
        bed.settle();
    }
    bed.engine().stats().readahead_pages - before
}

#[test]
fn sequential_reads_further_ahead_random_nothing_and_normal_as_before() {
    let mut bed = bed(4096, 1);
    let mapping = bed.open(&MappingOptions { readahead_bytes_max: 64 << 10, ..Default::default() });
    let mut other = mapping.clone();
    let normal = read_ahead_of(&mut bed, &mapping, 0);
    assert!(normal > 0);
    bed.run(mapping.advise_async(0..0, Advice::Sequential)).unwrap();
    let sequential = read_ahead_of(&mut bed, &mapping, 1000);
    assert!(sequential > normal, "{sequential} and {normal}");
    bed.run(mapping.advise_async(0..0, Advice::Random)).unwrap();
    assert_eq!(read_ahead_of(&mut bed, &mapping, 2000), 0);
    assert_eq!(read_ahead_of(&mut bed, &mapping.clone(), 2500), 0, "a clone begins with it");
    assert_eq!(read_ahead_of(&mut bed, &other, 3000), normal, "another handle doesn't know of it");
    bed.run(mapping.advise_async(0..0, Advice::Normal)).unwrap();
    assert_eq!(read_ahead_of(&mut bed, &mapping, 4000), normal);
    other = mapping.clone();
    assert_eq!(read_ahead_of(&mut bed, &other, 5000), normal);
}

#[test]
fn what_is_read_once_goes_first_and_leaves_no_shadow() {
    for readahead_bytes_max in [0, 64 << 10] {
        let mut bed = bed(256, 1);
        let scan = bed.open(&MappingOptions { readahead_bytes_max, ..Default::default() });
        // Others' pages, used once each.
        let other = scan.clone();
        read(&mut bed, &other, 0..120);
        bed.run(scan.advise_async(0..0, Advice::NoReuse)).unwrap();
        for page in 1000..6000 {
            read(&mut bed, &scan, page..page + 1);
        }
        bed.settle();
        assert_eq!(missing(&mut bed, &other, 0..120), 0, "with readahead {readahead_bytes_max}");
        let before = bed.engine().stats();
        // Those that were evicted last.
        read(&mut bed, &other, 5850..5950);
        let after = bed.engine().stats();
        assert_eq!(after.refaults - before.refaults, 0, "with readahead {readahead_bytes_max}");
        bed.assert_consistent();
    }
}

#[test]
fn what_is_read_once_fills_no_cache_that_has_room_and_pins_count_as_reads() {
    let mut bed = bed(4096, 1);
    let mapping = bed.open(&without_readahead());
    bed.run(mapping.advise_async(0..0, Advice::NoReuse)).unwrap();
    for page in 0..2000 {
        drop(bed.run(mapping.pin_async(page)).unwrap());
    }
    bed.settle();
    let cached = bed.engine().stats().pages_cached;
    assert!(cached <= 4096 / 8 + 1, "{cached}");
}

#[test]
fn what_was_read_once_and_is_used_again_stays() {
    let mut bed = bed(256, 1);
    let mapping = bed.open(&without_readahead());
    let other = mapping.clone();
    bed.run(mapping.advise_async(0..0, Advice::NoReuse)).unwrap();
    read(&mut bed, &mapping, 0..20);
    bed.settle();
    read(&mut bed, &other, 0..10);
    // Pushes all of them out of the line.
    read(&mut bed, &mapping, 1000..1100);
    bed.settle();
    assert_eq!(missing(&mut bed, &other, 0..10), 0);
    assert_eq!(missing(&mut bed, &other, 10..20), 10);
}
