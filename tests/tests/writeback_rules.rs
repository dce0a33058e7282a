//! The rules of the writeback contract that hold from the first path on, each on the emulated controller.

use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use foliant::{EngineOptions, Error, MappingOptions};
use foliant_nvme_emulated::{Action, EmulatedConfig, Latency, NamespaceConfig};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use foliant_tests::{Bed, options};

const MIB: u64 = 1 << 20;

/// A failure for good: it is not tried again by itself.
fn write_fault() -> Status {
    Status::of(StatusCode::WRITE_FAULT).with_dnr(true)
}

/// Every rule's test runs with one shard and with several.
fn beds(config: &EmulatedConfig, frames: u64) -> [Bed; 2] {
    [1, 3].map(|shards| Bed::new(config.clone(), EngineOptions { shards, ..options(frames * shards as u64) }))
}

fn ram() -> EmulatedConfig {
    EmulatedConfig::ram(64 * MIB, 512)
}

#[test]
fn wb01_a_sync_writes_in_ascending_order_and_no_page_twice() {
    for mut bed in beds(&ram(), 4096) {
        let mapping = bed.mapping();
        // Dirtied backwards and scattered.
        let pages: Vec<u64> = (0..2000).rev().map(|i| i * 7 % 5000 * 3 % 16_000).collect();
        for &page in &pages {
            bed.run(mapping.write_at_async(page * 4096, &[1; 4096])).unwrap();
        }
        bed.settle();
        bed.clear_seen();
        bed.run(mapping.sync_async()).unwrap();
        let writes = bed.seen(NvmOpcode::WRITE);
        for qid in 1..=3 {
            let mine: Vec<_> = writes.iter().filter(|write| write.qid == qid).collect();
            for pair in mine.windows(2) {
                assert!(pair[0].slba + u64::from(pair[0].blocks) <= pair[1].slba, "{pair:?} on queue {qid}");
            }
        }
        let mut wanted = pages.clone();
        wanted.sort_unstable();
        wanted.dedup();
        let blocks: u64 = writes.iter().map(|write| u64::from(write.blocks)).sum();
        assert_eq!(blocks, wanted.len() as u64 * 8);
        bed.assert_consistent();
    }
}

#[test]
fn wb02_a_background_pass_that_ends_early_goes_on_where_it_stopped() {
    let mut bed = Bed::new(
        EmulatedConfig { mdts: 3, ..ram() },
        EngineOptions { dirty_background_percent: 50, queue_entries: 8, ..options(1024) },
    );
    let mapping = bed.mapping();
    bed.fault(NvmOpcode::WRITE, 0, u64::MAX, Action::Delay(Duration::from_millis(1)));
    for page in 0..600u64 {
        bed.run(mapping.write_at_async(page * 4096, &[1; 4096])).unwrap();
    }
    for _ in 0..200 {
        bed.advance(Duration::from_millis(1));
    }
    let first: Vec<u64> = bed.seen(NvmOpcode::WRITE).iter().map(|write| write.slba).collect();
    assert!(first.is_sorted() && first[0] == 0, "ascending from the start");
    let stopped = first.last().unwrap() / 8 + 8;
    assert!((200..600).contains(&stopped), "half of the limit stays dirty: stopped at {stopped}");
    bed.clear_seen();
    // Dirty the beginning again, beyond the limit: the next pass begins where the last one stopped.
    for page in 0..400u64 {
        bed.run(mapping.write_at_async(page * 4096, &[2; 4096])).unwrap();
    }
    bed.advance(Duration::from_millis(1));
    assert_eq!(bed.seen(NvmOpcode::WRITE)[0].slba / 8, stopped);
}

#[test]
fn wb03_a_sync_ends_though_pages_of_its_range_keep_being_dirtied() {
    for mut bed in beds(&ram(), 1024) {
        let mapping = bed.mapping();
        // Every other page: 256 commands, several times what the queue holds.
        for page in (0..512u64).step_by(2) {
            bed.run(mapping.write_at_async(page * 4096, &[1; 4096])).unwrap();
        }
        bed.fault(NvmOpcode::WRITE, 0, u64::MAX, Action::Delay(Duration::from_micros(5)));
        bed.clear_seen();
        let mut sync = pin!(mapping.sync_async());
        let mut dirtied = 0u64;
        let result = loop {
            if let Poll::Ready(result) = bed.poll_once(sync.as_mut()) {
                break result;
            }
            // A writer that never stops: always another page of the range, ahead of the pass and behind it.
            bed.run(mapping.write_at_async((511 - dirtied * 2 % 512) * 4096, &[2; 4096])).unwrap();
            bed.advance(Duration::from_micros(1));
            dirtied += 1;
            assert!(dirtied < 100_000, "the sync doesn't end");
        };
        result.unwrap();
        let synced: u64 = bed.seen(NvmOpcode::WRITE).iter().map(|write| u64::from(write.blocks) / 8).sum();
        assert_eq!(synced, 256, "exactly what was dirty when the sync began");
        bed.settle();
        bed.assert_consistent();
    }
}

#[test]
fn wb04_marks_and_states_agree_through_writes_failures_and_evictions() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        bed.fail(NvmOpcode::WRITE, 3, 4, write_fault());
        for round in 0..400u64 {
            let page = round * 31 % 300;
            // Writes into a full cache may meet the failing device; what they leave must be consistent.
            let _ = bed.run(mapping.write_at_async(page * 4096 + 7, &[round as u8; 100]));
            if round % 50 == 0 {
                let _ = bed.run(mapping.sync_async());
            }
            bed.assert_consistent();
        }
        bed.run(mapping.sync_async()).ok();
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!(bed.engine().stats().dirty_pages, 0);
    }
}

#[test]
fn wb06_a_sync_waits_for_an_exclusive_holder_and_writes_what_it_left() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        bed.run(mapping.write_at_async(0, &[1; 3 * 4096])).unwrap();
        let mut pin = bed.run(mapping.pin_mut_async(1)).unwrap();
        pin[0] = 9;
        bed.clear_seen();
        let mut sync = pin!(mapping.sync_async());
        assert!(bed.poll_once(sync.as_mut()).is_pending());
        bed.settle();
        assert!(bed.poll_once(sync.as_mut()).is_pending(), "page 1 is held");
        // The shard itself doesn't wait: other requests are served meanwhile.
        bed.run(mapping.read_at_async(40 * 4096, &mut [0; 10])).unwrap();
        drop(pin);
        bed.run(sync).unwrap();
        let mut byte = [0];
        bed.device.read_image(1, 4096, &mut byte).unwrap();
        assert_eq!(byte, [9]);
    }
}

#[test]
fn wb06_a_background_pass_skips_an_exclusively_held_folio() {
    let mut bed = Bed::new(ram(), options(64));
    let mapping = bed.mapping();
    bed.run(mapping.write_at_async(0, &[1; 3 * 4096])).unwrap();
    let mut pin = bed.run(mapping.pin_mut_async(1)).unwrap();
    pin[0] = 9;
    bed.clear_seen();
    bed.advance(Duration::from_secs(6));
    let written: Vec<u64> = bed.seen(NvmOpcode::WRITE).iter().map(|write| write.slba / 8).collect();
    assert_eq!(written, [0, 2]);
    drop(pin);
    bed.advance(Duration::from_secs(6));
    assert_eq!(bed.engine().stats().dirty_pages, 0);
}

#[test]
fn wb06_a_sync_over_a_page_that_stays_held_fails_by_deadline_and_names_it() {
    let mut bed = Bed::new(ram(), EngineOptions { pin_wait: Duration::from_secs(2), ..options(64) });
    let mapping = bed.mapping();
    bed.run(mapping.write_at_async(5 * 4096, &[1; 4096])).unwrap();
    let pin = bed.run(mapping.pin_mut_async(5)).unwrap();
    let error = bed.run(mapping.sync_async()).unwrap_err();
    assert!(matches!(error, Error::PinnedTooLong { page: 5, .. }), "{error}");
    drop(pin);
    bed.run(mapping.sync_async()).unwrap();
    assert_eq!(bed.engine().stats().dirty_pages, 0);
}

#[test]
fn wb11_commands_are_exactly_the_dirty_runs_over_the_smallest_limit() {
    // MDTS 64 KiB = 16 pages; NOIOB 32 KiB = 8 pages; neither.
    for (mdts, noiob_blocks, limit) in [(4, 0, 16), (0, 64, 8), (0, 0, 256)] {
        let config = EmulatedConfig { mdts, noiob_blocks, ..ram() };
        let mut bed = Bed::new(config, options(4096));
        let mapping = bed.mapping();
        // Runs that begin at multiples of every limit, of lengths around it.
        let runs =
            [(0u64, 1u64), (256, 7), (512, 8), (768, 9), (1024, 16), (1280, 17), (1536, 300), (2304, 512)];
        for (first, pages) in runs {
            for page in first..first + pages {
                bed.run(mapping.write_at_async(page * 4096, &[1; 4096])).unwrap();
            }
        }
        bed.settle();
        bed.clear_seen();
        bed.run(mapping.sync_async()).unwrap();
        let wanted: u64 = runs.iter().map(|(_, pages)| pages.div_ceil(limit)).sum();
        assert_eq!(bed.seen(NvmOpcode::WRITE).len() as u64, wanted, "limit {limit}");
        assert_eq!(bed.engine().stats().write_commands, wanted);
    }
}

#[test]
fn wb11_a_failed_write_leaves_its_folios_dirty_and_the_next_sync_writes_them() {
    for mut bed in beds(&ram(), 256) {
        let mapping = bed.mapping();
        bed.run(mapping.write_at_async(0, &[3; 20 * 4096])).unwrap();
        bed.fail(NvmOpcode::WRITE, 0, 1, write_fault());
        let error = bed.run(mapping.sync_async()).unwrap_err();
        assert!(matches!(error, Error::Device { offset: 0, .. }), "{error}");
        assert_eq!(bed.engine().stats().dirty_pages, 20);
        bed.assert_consistent();
        bed.run(mapping.sync_async()).unwrap();
        let mut image = vec![0; 20 * 4096];
        bed.device.read_image(1, 0, &mut image).unwrap();
        assert!(image.iter().all(|&byte| byte == 3));
    }
}

#[test]
fn wb05_a_sync_goes_on_past_an_error_and_returns_the_first() {
    // A small queue, so that the error is known while there is more to issue.
    let mut bed = Bed::new(ram(), EngineOptions { queue_entries: 8, ..options(256) });
    let mapping = bed.mapping();
    for page in (0..40u64).step_by(2) {
        bed.run(mapping.write_at_async(page * 4096, &[1; 4096])).unwrap();
    }
    bed.fail(NvmOpcode::WRITE, 4, 2, write_fault());
    bed.clear_seen();
    let error = bed.run(mapping.sync_async()).unwrap_err();
    assert!(matches!(error, Error::Device { offset: 32_768, .. }), "{error}");
    assert_eq!(bed.engine().stats().write_commands, 20, "all were tried");
    assert_eq!(bed.seen(NvmOpcode::WRITE).len(), 18, "all but two were carried out");
    assert_eq!(bed.engine().stats().dirty_pages, 2);
}

#[test]
fn wb18_the_commands_of_a_sync_share_doorbells() {
    let mut bed = Bed::new(ram(), EngineOptions { queue_entries: 256, ..options(1024) });
    let mapping = bed.mapping();
    for page in (0..200u64).step_by(2) {
        bed.run(mapping.write_at_async(page * 4096, &[1; 4096])).unwrap();
    }
    bed.settle();
    let before = bed.engine().stats();
    let batches = bed.device.stats().sq_batches;
    bed.run(mapping.sync_async()).unwrap();
    let after = bed.engine().stats();
    assert_eq!(after.write_commands - before.write_commands, 100);
    // One for the writes, one for the flush.
    assert_eq!(after.doorbells - before.doorbells, 2);
    assert_eq!(bed.device.stats().sq_batches - batches, 2, "the device saw as many");
}

#[test]
fn wb21_concurrent_syncs_share_flushes() {
    for mut bed in beds(&ram(), 256) {
        let mappings: Vec<_> = (0..8u64)
            .map(|i| {
                bed.open(&MappingOptions { start_bytes: i * MIB, len_bytes: Some(MIB), ..Default::default() })
            })
            .collect();
        for mapping in &mappings {
            bed.run(mapping.write_at_async(0, &[1; 4096])).unwrap();
        }
        bed.clear_seen();
        bed.fault(NvmOpcode::FLUSH, 0, u64::MAX, Action::Delay(Duration::from_millis(1)));
        let mut syncs: Vec<_> = mappings.iter().map(|mapping| Box::pin(mapping.sync_async())).collect();
        for sync in &mut syncs {
            assert!(bed.poll_once(sync.as_mut()).is_pending());
        }
        for sync in syncs {
            bed.run(sync).unwrap();
        }
        let flushes = bed.seen(NvmOpcode::FLUSH).len();
        assert!((1..=2).contains(&flushes), "8 syncs made {flushes} flushes");
    }
}

#[test]
fn wb21_without_a_volatile_write_cache_no_flush_is_sent() {
    for mut bed in beds(&EmulatedConfig { volatile_write_cache: false, ..ram() }, 64) {
        let mapping = bed.mapping();
        bed.run(mapping.write_at_async(0, &[1; 4096])).unwrap();
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!(bed.seen(NvmOpcode::FLUSH), []);
        assert_eq!(bed.seen(NvmOpcode::WRITE).len(), 1);
    }
}

#[test]
fn wb29_the_flush_follows_writes_that_somebody_else_submitted() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        bed.run(mapping.write_at_async(0, &[1; 4096])).unwrap();
        // The flusher writes the page, and the device takes long over it.
        bed.fault(NvmOpcode::WRITE, 0, 1, Action::Delay(Duration::from_secs(1)));
        bed.advance(Duration::from_secs(6));
        assert_eq!(bed.seen(NvmOpcode::WRITE).len(), 1);
        assert_eq!(bed.engine().stats().dirty_pages, 0, "under writeback, not dirty");
        let mut sync = pin!(mapping.sync_async());
        for _ in 0..10 {
            assert!(bed.poll_once(sync.as_mut()).is_pending());
            bed.settle();
        }
        assert_eq!(bed.seen(NvmOpcode::FLUSH), [], "the write is still with the device");
        bed.advance(Duration::from_secs(2));
        bed.run(sync).unwrap();
        assert_eq!(bed.seen(NvmOpcode::FLUSH).len(), 1);
    }
}

#[test]
fn wb29_a_sync_that_writes_nothing_still_flushes_what_the_flusher_wrote() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        bed.run(mapping.write_at_async(0, &[1; 4096])).unwrap();
        mapping.request_writeback();
        bed.settle();
        assert_eq!((bed.seen(NvmOpcode::WRITE).len(), bed.seen(NvmOpcode::FLUSH).len()), (1, 0));
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!((bed.seen(NvmOpcode::WRITE).len(), bed.seen(NvmOpcode::FLUSH).len()), (1, 1));
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!(bed.seen(NvmOpcode::FLUSH).len(), 1, "nothing was written since");
    }
}

#[test]
fn wb29_one_flush_serves_all_shards_after_all_their_writes() {
    let latency = Latency { write: Duration::from_micros(50), ..Latency::default() };
    let mut bed = Bed::new(EmulatedConfig { latency, ..ram() }, EngineOptions { shards: 4, ..options(8192) });
    let mapping = bed.mapping();
    for stripe in 0..16u64 {
        bed.run(mapping.write_at_async(stripe * 2 * MIB, &[stripe as u8; 65_536])).unwrap();
    }
    bed.clear_seen();
    bed.run(mapping.sync_async()).unwrap();
    let seen = bed.all_seen();
    let flush = seen.iter().position(|seen| seen.opcode == NvmOpcode::FLUSH).expect("a flush");
    assert_eq!(flush, seen.len() - 1, "the flush is the last command");
    assert_eq!(seen.len(), 17);
    let queues: std::collections::BTreeSet<u16> = seen[..16].iter().map(|seen| seen.qid).collect();
    assert_eq!(queues.len(), 4, "all shards wrote");
}

#[test]
fn wb30_after_a_failed_flush_every_write_and_sync_says_so_until_reopened() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        bed.run(mapping.write_at_async(0, &[1; 4096])).unwrap();
        bed.fail(NvmOpcode::FLUSH, 0, 1, Status::of(StatusCode::INTERNAL_ERROR));
        for _ in 0..3 {
            let error = bed.run(mapping.sync_async()).unwrap_err();
            assert!(matches!(error, Error::NamespaceFailed { namespace: 1, .. }), "{error}");
        }
        assert!(bed.run(mapping.write_at_async(0, &[2])).is_err());
        assert!(bed.run(mapping.pin_mut_async(0)).is_err());
        let mut byte = [0];
        bed.run(mapping.read_at_async(0, &mut byte)).unwrap();
        assert_eq!(byte, [1], "reads go on");
    }
}

#[test]
fn wb23_an_error_of_a_background_write_reaches_every_handle_once() {
    let mut bed = Bed::new(ram(), options(64));
    let mapping = bed.mapping();
    let other = mapping.clone();
    bed.run(mapping.write_at_async(0, &[1; 4096])).unwrap();
    bed.fail(NvmOpcode::WRITE, 0, 1, write_fault());
    bed.advance(Duration::from_secs(6));
    // The flusher has tried again since, and succeeded; the event is told all the same.
    bed.advance(Duration::from_secs(6));
    for handle in [&mapping, &other] {
        assert!(matches!(bed.run(handle.sync_async()), Err(Error::Device { .. })));
        bed.run(handle.sync_async()).unwrap();
    }
    let late = mapping.clone();
    bed.run(late.sync_async()).unwrap();
}

#[test]
fn wb23_a_sync_that_fails_for_another_reason_leaves_a_failed_writeback_to_the_next() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        bed.run(mapping.write_at_async(0, &[1; 4096])).unwrap();
        bed.fail(NvmOpcode::WRITE, 0, 1, write_fault());
        bed.advance(Duration::from_secs(6));
        bed.advance(Duration::from_secs(6));
        bed.run(mapping.write_at_async(4096, &[1; 4096])).unwrap();
        let pin = bed.run(mapping.pin_mut_async(1)).unwrap();
        assert!(matches!(bed.run(mapping.sync_async()), Err(Error::PinnedTooLong { page: 1, .. })));
        drop(pin);
        assert!(matches!(bed.run(mapping.sync_async()), Err(Error::Device { offset: 0, .. })));
        bed.run(mapping.sync_async()).unwrap();
    }
}

#[test]
fn wb29_no_sync_succeeds_over_what_a_discard_took_out_before_its_shard_failed() {
    for shards in [1, 3] {
        let command_timeout = Duration::from_secs(5);
        let mut bed = Bed::new(ram(), EngineOptions { shards, command_timeout, ..options(192) });
        let mapping = bed.mapping();
        bed.run(mapping.write_at_async(0, &[1; 4096])).unwrap();
        bed.run(mapping.sync_async()).unwrap();
        bed.run(mapping.write_at_async(0, &[2; 4096])).unwrap();
        // The discard drops the dirty page 0, and waits for the read of page 1, which never ends.
        bed.fault(NvmOpcode::READ, 0, 1, Action::Drop);
        let mut pin = pin!(mapping.pin_async(1));
        assert!(bed.poll_once(pin.as_mut()).is_pending());
        let mut discard = pin!(mapping.discard_async(0..2 * 4096));
        assert!(bed.poll_once(discard.as_mut()).is_pending());
        bed.settle();
        assert_eq!(bed.engine().stats().dirty_pages, 0);
        let error = bed.run(discard).unwrap_err();
        assert!(matches!(error, Error::ShardFailed { .. }), "{error}");
        assert_eq!(bed.seen(NvmOpcode::WRITE_ZEROES), [], "the device has what the first sync wrote");
        for _ in 0..2 {
            let error = bed.run(mapping.sync_async()).unwrap_err();
            assert!(matches!(error, Error::ShardFailed { .. }), "{error}");
        }
    }
}

#[test]
fn wb26_a_discard_waits_for_writeback_and_nothing_is_written_after_it() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        bed.run(mapping.write_at_async(0, &[1; 8 * 4096])).unwrap();
        bed.fault(NvmOpcode::WRITE, 0, 1, Action::Delay(Duration::from_secs(1)));
        bed.advance(Duration::from_secs(6));
        assert_eq!(bed.seen(NvmOpcode::WRITE).len(), 1, "in flight");
        let mut discard = pin!(mapping.discard_async(4096..8 * 4096));
        assert!(bed.poll_once(discard.as_mut()).is_pending());
        bed.settle();
        assert_eq!(bed.seen(NvmOpcode::WRITE_ZEROES), [], "not before the write has ended");
        bed.run(discard).unwrap();
        assert_eq!(bed.seen(NvmOpcode::WRITE_ZEROES).len(), 1);
        let mut bytes = vec![9; 8 * 4096];
        bed.run(mapping.read_at_async(0, &mut bytes)).unwrap();
        assert!(bytes[..4096].iter().all(|&byte| byte == 1) && bytes[4096..].iter().all(|&byte| byte == 0));
        bed.run(mapping.sync_async()).unwrap();
        bed.assert_consistent();
    }
}

#[test]
fn wb26_a_discard_that_gives_up_leaves_no_page_as_it_was_before_its_last_change() {
    for mut bed in beds(&ram(), 64) {
        let mapping = bed.mapping();
        bed.run(mapping.write_at_async(0, &[1; 3 * 4096])).unwrap();
        bed.run(mapping.sync_async()).unwrap();
        bed.run(mapping.write_at_async(0, &[2; 3 * 4096])).unwrap();
        let pin = bed.run(mapping.pin_async(1)).unwrap();
        let error = bed.run(mapping.discard_async(0..3 * 4096)).unwrap_err();
        assert!(matches!(error, Error::PinnedTooLong { page: 1, .. }), "{error}");
        drop(pin);
        let mut bytes = [0; 3 * 4096];
        bed.run(mapping.read_at_async(0, &mut bytes)).unwrap();
        let pages: Vec<u8> = bytes.chunks(4096).map(|page| page[0]).collect();
        assert_eq!(pages, [0, 2, 2], "zeroed, or as it was: never what an earlier sync left");
        bed.run(mapping.sync_async()).unwrap();
        bed.assert_consistent();
    }
}

#[test]
fn wb27_clean_folios_are_evicted_and_dirty_or_pinned_ones_are_not() {
    let mut bed = Bed::new(ram(), EngineOptions { dirty_background_percent: 90, ..options(64) });
    let mapping = bed.mapping();
    bed.run(mapping.write_at_async(0, &[7; 10 * 4096])).unwrap();
    let pin = bed.run(mapping.pin_async(20)).unwrap();
    bed.clear_seen();
    for page in 100..400u64 {
        bed.run(mapping.read_at_async(page * 4096, &mut [0; 8])).unwrap();
    }
    bed.clear_seen();
    let mut bytes = [0; 10 * 4096];
    bed.run(mapping.read_at_async(0, &mut bytes)).unwrap();
    drop(pin);
    bed.run(mapping.read_at_async(20 * 4096, &mut [0; 8])).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 7));
    assert_eq!(bed.seen(NvmOpcode::READ), [], "both were still cached");
    assert!(bed.engine().stats().pages_evicted > 200);
}

#[test]
fn wb41_every_data_pointer_lies_in_the_frame_of_its_folio() {
    for mut bed in beds(&EmulatedConfig { mdts: 5, ..ram() }, 512) {
        let mapping = bed.mapping();
        // Opening looks for a label, which is no page.
        bed.clear_seen();
        for round in 0..300u64 {
            let offset = round * 7919 * 512 % (48 * MIB) + 13;
            bed.run(mapping.write_at_async(offset, &[round as u8; 9000])).unwrap();
        }
        bed.run(mapping.sync_async()).unwrap();
        let seen = bed.all_seen();
        for opcode in [NvmOpcode::WRITE, NvmOpcode::READ] {
            let commands: Vec<_> = seen.iter().filter(|seen| seen.opcode == opcode).collect();
            assert!(commands.len() > 50);
            for command in commands {
                assert_eq!(command.bytes, u64::from(command.blocks) * 512);
                assert_eq!(command.in_frames_bytes, command.bytes, "{command:?}");
            }
        }
    }
}

#[test]
fn a_last_page_that_is_not_whole_is_read_and_written_to_its_end_only() {
    let size = 10 * 4096 + 3 * 512;
    for shards in [1, 2] {
        let config = EmulatedConfig {
            namespaces: vec![NamespaceConfig::new(size, 512), NamespaceConfig::new(MIB, 4096)],
            ..EmulatedConfig::ram(MIB, 512)
        };
        let mut bed = Bed::new(config, EngineOptions { shards, ..options(64 * shards as u64) });
        let mapping = bed.mapping();
        assert_eq!((mapping.len(), mapping.pages()), (size, 11));
        bed.run(mapping.write_at_async(9 * 4096, &vec![5; 4096 + 1536])).unwrap();
        assert_eq!(bed.run(mapping.pin_async(10)).unwrap().len(), 1536);
        bed.run(mapping.sync_async()).unwrap();
        let last = bed.seen(NvmOpcode::WRITE).pop().unwrap();
        assert_eq!(last.slba + u64::from(last.blocks), size / 512);
        let beyond = bed.run(mapping.write_at_async(size - 1, &[1, 2])).unwrap_err();
        assert!(matches!(beyond, Error::OutOfRange { .. }));
    }
}
