//! What becomes of failures: tried again, reported, poisoned, latched; and which commits a success needs.

use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use foliant::{EngineOptions, Error, Mapping, MappingOptions, Operation, RetryPolicy, WritebackControl};
use foliant_nvme_emulated::{Action, EmulatedConfig, Fault, Match};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use foliant_tests::{Bed, fragile, options};

const MIB: u64 = 1 << 20;

fn ram() -> EmulatedConfig {
    EmulatedConfig::ram(64 * MIB, 512)
}

/// Every rule's test runs with one shard and with several.
fn beds(config: &EmulatedConfig, frames: u64) -> [Bed; 2] {
    [1, 3].map(|shards| Bed::new(config.clone(), EngineOptions { shards, ..options(frames * shards as u64) }))
}

/// A failure in passing.
fn transient() -> Status {
    Status::of(StatusCode::INTERNAL_ERROR)
}

/// A failure for good.
fn fatal() -> Status {
    Status::of(StatusCode::WRITE_FAULT).with_dnr(true)
}

/// From now on every write that touches this page fails for good.
fn break_page(bed: &Bed, page: u64) {
    let matching = Match::io(NvmOpcode::WRITE).touching(page * 8, page * 8 + 7);
    bed.device.inject(Fault { matching, action: Action::Status(fatal()) });
}

fn dirty(bed: &mut Bed, mapping: &Mapping, pages: impl IntoIterator<Item = u64>) {
    for page in pages {
        bed.run(mapping.write_at_async(page * 4096, &[page as u8 + 1; 4096])).unwrap();
    }
    bed.settle();
    bed.clear_seen();
}

fn writes(bed: &Bed) -> usize {
    bed.seen(NvmOpcode::WRITE).len()
}

#[test]
fn wb17_what_cannot_be_written_stays_dirty_and_is_reported() {
    for mut bed in beds(&fragile(8 * MIB), 64) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..5);
        bed.device.power_cut(1).unwrap();
        for _ in 0..2 {
            assert!(bed.run(mapping.sync_async()).is_err());
        }
        assert!(bed.run(mapping.writeback_async(&WritebackControl::background())).is_err());
        let stats = bed.engine().stats();
        assert_eq!(stats.pages_discarded, 0);
        let mut byte = [0];
        // A page that can be had without the device has what was written.
        assert!(mapping.read_at(2 * 4096, &mut byte).is_err() || byte == [3]);
    }
}

#[test]
fn wb17_only_a_range_that_is_thrown_away_discards_dirty_pages_and_counts_them() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..10);
        bed.run(mapping.discard_async(2 * 4096..6 * 4096)).unwrap();
        assert_eq!(bed.engine().stats().pages_discarded, 4);
        bed.run(mapping.clone().close_async()).unwrap();
        assert_eq!(bed.engine().stats().pages_discarded, 4, "a close writes");
        let mut byte = [0];
        bed.device.read_image(1, 9 * 4096, &mut byte).unwrap();
        assert_eq!(byte, [10]);
    }
}

#[test]
fn wb21_an_expiry_round_waits_for_its_writes_and_ends_with_one_commit() {
    for shards in [1, 3] {
        let mut bed = Bed::new(ram(), EngineOptions { shards, ..options(64 * shards as u64) });
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, [0, 2, 4]);
        bed.fault(NvmOpcode::WRITE, 1, 1, Action::Delay(Duration::from_millis(500)));
        bed.advance(Duration::from_secs(6));
        assert_eq!((writes(&bed), bed.seen(NvmOpcode::FLUSH).len()), (3, 0), "one write is still on its way");
        bed.advance(Duration::from_secs(1));
        assert_eq!((writes(&bed), bed.seen(NvmOpcode::FLUSH).len()), (3, 1));
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!(bed.seen(NvmOpcode::FLUSH).len(), 1, "nothing is left for the sync");
        assert_eq!(bed.engine().stats().passes_expiry, 1);
    }
}

#[test]
fn wb21_a_background_pass_needs_no_commit() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..5);
        bed.run(mapping.writeback_async(&WritebackControl::background())).unwrap();
        bed.advance(Duration::from_secs(20));
        assert_eq!((writes(&bed), bed.seen(NvmOpcode::FLUSH).len()), (1, 0));
    }
}

#[test]
fn wb21_a_sync_of_one_command_is_written_through_instead_of_flushed() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        bed.run(mapping.sync_async()).unwrap();
        // The tail of a log: a few pages in one command.
        dirty(&mut bed, &mapping, 3..6);
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!((writes(&bed), bed.seen(NvmOpcode::FLUSH).len()), (1, 0));
        let stats = bed.engine().stats();
        assert_eq!((stats.fua_commands, bed.device.stats().fua_commands), (1, 1));
        // Two commands take a Flush together.
        dirty(&mut bed, &mapping, [3, 8]);
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!((writes(&bed), bed.seen(NvmOpcode::FLUSH).len()), (2, 1));
        // So does one beside something that awaits a Flush already.
        dirty(&mut bed, &mapping, [3, 100]);
        bed.run(mapping.writeback_async(&WritebackControl::background().bytes(0..4 * 4096))).unwrap();
        bed.settle();
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!((writes(&bed), bed.seen(NvmOpcode::FLUSH).len()), (2, 1));
        assert_eq!(bed.engine().stats().fua_commands, 1);
    }
}

#[test]
fn wb21_another_write_that_completes_beside_a_write_through_is_flushed_before_the_sync_is_answered() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        bed.run(mapping.sync_async()).unwrap();
        dirty(&mut bed, &mapping, [3, 100]);
        // Page 100 is with the device, uncommitted, while page 3 is synced and written through.
        bed.fault(NvmOpcode::WRITE, 0, 1, Action::Delay(Duration::from_millis(1)));
        bed.run(mapping.writeback_async(&WritebackControl::background().bytes(100 * 4096..101 * 4096)))
            .unwrap();
        bed.settle();
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!(bed.engine().stats().fua_commands, 1);
        assert_eq!(bed.seen(NvmOpcode::FLUSH).len(), 1, "page 100 went without FUA");
    }
}

#[test]
fn wb21_without_a_volatile_write_cache_nothing_is_written_through() {
    for mut bed in beds(&EmulatedConfig { volatile_write_cache: false, ..ram() }, 64) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..1);
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!((bed.engine().stats().fua_commands, bed.engine().stats().flush_commands), (0, 0));
    }
}

#[test]
fn wb21_what_was_written_through_survives_a_power_cut() {
    for seed in 0..60u64 {
        let shards = 1 + seed as usize % 3;
        let mut bed = Bed::new(fragile(8 * MIB), EngineOptions { shards, ..options(64 * shards as u64) });
        let mapping = bed.mapping();
        bed.run(mapping.sync_async()).unwrap();
        let mut versions = [0u8; 3];
        for round in 0..6u8 {
            let page = (seed + u64::from(round)) % 3;
            versions[page as usize] = round + 1;
            bed.run(mapping.write_at_async(page * 4096, &[round + 1; 4096])).unwrap();
            // A passing failure of the write through: it is tried again, and through.
            if round == 4 {
                bed.fail(NvmOpcode::WRITE, 0, 2, transient());
            }
            bed.run(mapping.sync_async()).unwrap();
        }
        assert_eq!(bed.engine().stats().fua_commands, 6, "seed {seed}");
        // And something unsynced beside it.
        bed.run(mapping.write_at_async(600 * 4096, &[9; 4096])).unwrap();
        bed.run(mapping.writeback_async(&WritebackControl::background())).unwrap();
        bed.step();
        drop(mapping);
        bed.crash(seed);
        for (page, version) in versions.into_iter().enumerate() {
            let mut bytes = [0; 4096];
            bed.device.read_image(1, page as u64 * 4096, &mut bytes).unwrap();
            assert_eq!(bytes, [version; 4096], "seed {seed}, page {page}");
        }
    }
}

#[test]
fn wb22_what_fails_in_passing_is_tried_again_and_nobody_hears_of_it() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        let other = mapping.clone();
        dirty(&mut bed, &mapping, [0, 2]);
        bed.fail(NvmOpcode::WRITE, 0, 5, transient());
        bed.run(mapping.sync_async()).unwrap();
        bed.run(other.sync_async()).unwrap();
        let stats = bed.engine().stats();
        assert_eq!((stats.command_retries, stats.command_errors, stats.dirty_pages), (5, 5, 0));
        assert_eq!(stats.poisoned_pages, 0);
        bed.fail(NvmOpcode::READ, 0, 5, transient());
        bed.run(mapping.read_at_async(50 * 4096, &mut [0; 9])).unwrap();
        assert_eq!(bed.engine().stats().command_retries, 10);
        bed.assert_consistent();
    }
}

#[test]
fn wb22_retries_are_bounded_and_a_fatal_error_ends_at_once() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, [0]);
        bed.fail(NvmOpcode::WRITE, 0, u64::MAX, transient());
        assert!(matches!(bed.run(mapping.sync_async()), Err(Error::Device { offset: 0, .. })));
        assert_eq!(bed.engine().stats().command_errors, 6, "once, and five times again");
        bed.fail(NvmOpcode::READ, 0, 6, transient());
        assert!(bed.run(mapping.read_at_async(50 * 4096, &mut [0; 9])).is_err());
        assert_eq!(bed.engine().stats().command_errors, 12);
        bed.run(mapping.read_at_async(50 * 4096, &mut [0; 9])).unwrap();
        bed.device.clear_faults();
        bed.run(mapping.sync_async()).unwrap();

        let before = bed.engine().stats();
        dirty(&mut bed, &mapping, [0, 2]);
        bed.fail(NvmOpcode::WRITE, 0, 1, fatal());
        assert!(matches!(bed.run(mapping.sync_async()), Err(Error::Device { offset: 0, .. })));
        let stats = bed.engine().stats();
        assert_eq!(stats.command_errors - before.command_errors, 1);
        assert_eq!(stats.command_retries, before.command_retries);
        assert_eq!(stats.dirty_pages, 1, "the pass went on past it (WB-05)");
    }
}

#[test]
fn wb22_a_command_that_is_tried_again_waits_between_and_its_page_can_be_read() {
    let mut bed = Bed::new(ram(), options(64));
    let mapping = bed.mapping();
    dirty(&mut bed, &mapping, [0]);
    bed.fail(NvmOpcode::WRITE, 0, 3, transient());
    let mut sync = Box::pin(mapping.sync_async());
    assert!(bed.poll_once(sync.as_mut()).is_pending());
    for (wait_ms, errors) in [(0, 1), (1, 2), (1, 2), (1, 3), (3, 3), (1, 3)] {
        bed.advance(Duration::from_millis(wait_ms));
        assert_eq!(bed.engine().stats().command_errors, errors);
        let mut byte = [0];
        bed.run(mapping.read_at_async(0, &mut byte)).unwrap();
        assert_eq!(byte, [1]);
    }
    bed.run(sync).unwrap();
}

#[test]
fn wb22_a_flush_is_tried_again_only_where_it_was_not_carried_out() {
    let interrupted = Status::of(StatusCode::COMMAND_INTERRUPTED);
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, [0, 2]);
        bed.fail(NvmOpcode::FLUSH, 0, 5, interrupted);
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!(bed.engine().stats().command_retries, 5);
        assert_eq!(bed.seen(NvmOpcode::FLUSH).len(), 1, "the sixth was carried out");
        dirty(&mut bed, &mapping, [0, 2]);
        bed.fail(NvmOpcode::FLUSH, 0, 1, transient());
        let error = bed.run(mapping.sync_async()).unwrap_err();
        assert!(matches!(error, Error::NamespaceFailed { .. }), "{error}");
    }
    let mut bed = Bed::new(ram(), options(64));
    let mapping = bed.mapping();
    dirty(&mut bed, &mapping, [0, 2]);
    bed.fail(NvmOpcode::FLUSH, 0, u64::MAX, interrupted);
    assert!(matches!(bed.run(mapping.sync_async()), Err(Error::NamespaceFailed { .. })), "bounded");
    assert_eq!(bed.engine().stats().command_errors, 6);
}

#[test]
fn wb22_a_soft_mapping_gets_try_again_instead_of_waiting() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.open(&MappingOptions { retry: RetryPolicy::Soft, ..Default::default() });
        dirty(&mut bed, &mapping, [0, 2]);
        bed.fail(NvmOpcode::WRITE, 0, 2, transient());
        let mut sync: Pin<Box<dyn Future<Output = foliant::Result<()>>>> = Box::pin(mapping.sync_async());
        assert!(bed.poll_once(sync.as_mut()).is_pending());
        // The clock stands still: nothing was waited for.
        bed.settle();
        let Poll::Ready(Err(error)) = bed.poll_once(sync.as_mut()) else { panic!("it waits") };
        assert!(
            matches!(error, Error::TryAgain { operation: Operation::Write, page: 0, cause: Some(_) }),
            "{error}"
        );
        drop(sync);
        bed.advance(Duration::from_secs(1));
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!(bed.engine().stats().dirty_pages, 0);
        bed.fail(NvmOpcode::READ, 0, 1, transient());
        let error = bed.run(mapping.read_at_async(50 * 4096, &mut [0; 9])).unwrap_err();
        assert!(matches!(error, Error::TryAgain { operation: Operation::Read, page: 50, .. }), "{error}");
        bed.run(mapping.read_at_async(50 * 4096, &mut [0; 9])).unwrap();
        let engine = bed.engine.take().unwrap();
        let error = bed.run(engine.mapping_async(&MappingOptions::default())).unwrap_err().to_string();
        assert!(error.contains("retry: Soft"), "{error}");
    }
}

#[test]
fn wb23_one_bad_block_does_not_keep_its_neighbours_dirty_and_every_sync_over_it_fails() {
    for mut bed in beds(&ram(), 256) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..100);
        break_page(&bed, 50);
        assert!(matches!(bed.run(mapping.sync_async()), Err(Error::Device { offset: 0, .. })));
        let stats = bed.engine().stats();
        assert_eq!((stats.dirty_pages, stats.poisoned_pages), (100, 100), "they went as one command");
        bed.assert_consistent();
        // Page by page, in the background.
        bed.advance(Duration::from_millis(150));
        let stats = bed.engine().stats();
        assert_eq!((stats.dirty_pages, stats.poisoned_pages), (1, 1));
        for _ in 0..3 {
            let error = bed.run(mapping.sync_async()).unwrap_err();
            assert!(matches!(error, Error::Device { offset: 204_800, .. }), "{error}");
            bed.run(mapping.sync_range_async(0..50 * 4096)).unwrap();
        }
        bed.assert_consistent();
        bed.device.clear_faults();
        bed.run(mapping.sync_async()).unwrap();
        let stats = bed.engine().stats();
        assert_eq!((stats.dirty_pages, stats.poisoned_pages), (0, 0));
        bed.assert_consistent();
    }
}

#[test]
fn wb23_a_poisoned_page_goes_alone_in_a_sync_too() {
    for mut bed in beds(&ram(), 256) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, [4]);
        break_page(&bed, 4);
        assert!(bed.run(mapping.sync_async()).is_err());
        dirty(&mut bed, &mapping, 0..10);
        assert!(bed.run(mapping.sync_async()).is_err());
        assert_eq!(bed.engine().stats().dirty_pages, 1, "its neighbours on both sides were written");
        assert_eq!(writes(&bed), 2);
    }
}

#[test]
fn wb23_a_block_of_the_mapping_is_never_torn_by_a_retry() {
    for mut bed in beds(&ram(), 256) {
        let mapping = bed.open(&MappingOptions { page_bytes: 16_384, ..Default::default() });
        bed.run(mapping.write_at_async(0, &[7; 10 * 16_384])).unwrap();
        break_page(&bed, 18);
        bed.run(mapping.sync_async()).unwrap_err();
        assert_eq!(bed.engine().stats().poisoned_pages, 40);
        bed.clear_seen();
        bed.advance(Duration::from_millis(150));
        let lengths: Vec<u32> = bed.seen(NvmOpcode::WRITE).iter().map(|write| write.blocks).collect();
        assert_eq!(lengths, [32; 9], "a block of 16 KiB a command");
        assert_eq!(bed.engine().stats().poisoned_pages, 4);
        // A budget in the middle of a block takes it whole.
        bed.device.clear_faults();
        bed.run(mapping.write_at_async(20 * 16_384, &[7; 2 * 16_384])).unwrap();
        let control = WritebackControl::background().whole().pages_max(2);
        assert_eq!(bed.run(mapping.writeback_async(&control)).unwrap().pages_written, 4);
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!(bed.engine().stats().dirty_pages, 0);
        bed.assert_consistent();
    }
}

#[test]
fn wb23_retries_of_poisoned_pages_are_bounded_and_back_off() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, [4]);
        break_page(&bed, 4);
        bed.run(mapping.sync_async()).unwrap_err();
        let mut tried = Vec::new();
        for tenth in 1..=600u64 {
            let before = bed.engine().stats().poison_retries;
            bed.advance(Duration::from_millis(100));
            if bed.engine().stats().poison_retries > before {
                tried.push(tenth);
            }
        }
        assert_eq!(tried.len(), 8, "{tried:?}");
        assert!(tried.windows(2).all(|pair| pair[1] - pair[0] >= 2), "{tried:?}");
        assert!(tried[7] - tried[6] > 100, "{tried:?}");
        // And the event was told once, though it happened nine times.
        bed.run(mapping.sync_range_async(0..4096)).unwrap();
        assert!(bed.run(mapping.sync_async()).is_err(), "only syncs try it now");
    }
}

#[test]
fn wb23_a_retry_that_succeeds_makes_the_page_clean() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, [4]);
        bed.fail(NvmOpcode::WRITE, 0, 3, fatal());
        bed.run(mapping.sync_async()).unwrap_err();
        bed.advance(Duration::from_millis(150));
        assert_eq!(bed.engine().stats().poisoned_pages, 1);
        for _ in 0..10 {
            bed.advance(Duration::from_millis(100));
        }
        let stats = bed.engine().stats();
        assert_eq!((stats.poisoned_pages, stats.dirty_pages, stats.poison_retries), (0, 0, 3));
        bed.run(mapping.sync_async()).unwrap();
        bed.assert_consistent();
    }
}

#[test]
fn wb23_background_passes_pass_poisoned_pages_over_and_do_not_count_them() {
    let limits = EngineOptions { dirty_background_percent: 10, ..options(64) };
    let mut bed = Bed::new(ram(), limits);
    let mapping = bed.mapping();
    // More than the background limit is poisoned.
    dirty(&mut bed, &mapping, [0, 2, 4, 6]);
    (0..20).for_each(|page| break_page(&bed, page));
    bed.run(mapping.sync_async()).unwrap_err();
    dirty(&mut bed, &mapping, [8, 10, 12, 14]);
    bed.run(mapping.sync_async()).unwrap_err();
    assert_eq!(bed.engine().stats().poisoned_pages, 8);
    for _ in 0..300 {
        bed.advance(Duration::from_millis(100));
    }
    let stats = bed.engine().stats();
    assert_eq!(
        (stats.passes_dirty_limit, stats.passes_expiry),
        (0, 0),
        "nothing that the flusher could write"
    );
    // Others are written as ever.
    dirty(&mut bed, &mapping, [30, 32]);
    let outcome = bed.run(mapping.writeback_async(&WritebackControl::background())).unwrap();
    assert_eq!(outcome.pages_written, 2);
    bed.settle();
    assert_eq!(bed.engine().stats().dirty_pages, 8);
}

#[test]
fn wb23_a_poisoned_page_is_never_evicted_and_a_discard_takes_it_away() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, [4]);
        break_page(&bed, 4);
        bed.run(mapping.sync_async()).unwrap_err();
        for page in 100..600 {
            bed.run(mapping.read_at_async(page * 4096, &mut [0; 8])).unwrap();
        }
        let mut byte = [0];
        bed.run(mapping.read_at_async(4 * 4096, &mut byte)).unwrap();
        assert_eq!(byte, [5]);
        bed.run(mapping.discard_async(0..8 * 4096)).unwrap();
        let stats = bed.engine().stats();
        assert_eq!((stats.dirty_pages, stats.poisoned_pages, stats.pages_discarded), (0, 0, 1));
        bed.run(mapping.sync_async()).unwrap();
        bed.assert_consistent();
    }
}

#[test]
fn wb26_a_discard_that_gives_up_at_a_pinned_page_says_so_though_that_page_is_poisoned() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 4..8);
        break_page(&bed, 5);
        assert!(bed.run(mapping.sync_async()).is_err());
        let pin = bed.run(mapping.pin_async(5)).unwrap();
        bed.clear_seen();
        let began_ns = bed.now_ns();
        let error = bed.run(mapping.discard_async(4 * 4096..8 * 4096)).unwrap_err();
        let waited = Duration::from_nanos(bed.now_ns() - began_ns);
        assert!(matches!(error, Error::PinnedTooLong { page: 5, .. }), "{error}");
        // What came before it is zeroed, and nothing is written instead, which would have to wait for the pin as long again.
        let of =
            |opcode| -> Vec<_> { bed.seen(opcode).iter().map(|seen| (seen.slba, seen.blocks)).collect() };
        assert_eq!(of(NvmOpcode::WRITE_ZEROES), [(4 * 8, 8)]);
        assert!(!of(NvmOpcode::WRITE).contains(&(4 * 8, 8)), "{:?}", of(NvmOpcode::WRITE));
        assert!(waited < Duration::from_secs(11), "{waited:?}");
        drop(pin);
        bed.run(mapping.discard_async(4 * 4096..8 * 4096)).unwrap();
        assert_eq!(bed.engine().stats().dirty_pages, 0);
        bed.run(mapping.sync_async()).unwrap();
    }
}

#[test]
fn wb23_a_mapping_with_a_poisoned_page_does_not_close_and_loses_nothing() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, [4]);
        break_page(&bed, 4);
        for _ in 0..2 {
            let error = bed.run(mapping.clone().close_async()).unwrap_err();
            assert!(matches!(error, Error::Device { operation: Operation::Write, .. }), "{error}");
        }
        bed.device.clear_faults();
        // This handle hasn't been told yet; then it closes.
        assert!(bed.run(mapping.sync_async()).is_err());
        bed.run(mapping.close_async()).unwrap();
        let mut byte = [0];
        bed.device.read_image(1, 4 * 4096, &mut byte).unwrap();
        assert_eq!(byte, [5]);
    }
}

#[test]
fn wb23_each_handle_is_told_once_of_a_failure_in_a_callers_background_pass() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        let other = mapping.clone();
        dirty(&mut bed, &mapping, [4]);
        bed.fail(NvmOpcode::WRITE, 0, 1, fatal());
        let _ = bed.run(mapping.writeback_async(&WritebackControl::background()));
        bed.advance(Duration::from_secs(1));
        assert_eq!(bed.engine().stats().dirty_pages, 0, "the retry succeeded");
        for handle in [&mapping, &other] {
            assert!(matches!(bed.run(handle.sync_async()), Err(Error::Device { .. })));
            bed.run(handle.sync_async()).unwrap();
        }
    }
}
