//! Passes as callers and shard owners ask for them: ranges, budgets, callbacks, priorities, and how they share a mapping.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use foliant::{
    Context, Disposition, EngineOptions, Error, LockedFolio, Mapping, MappingOptions, PassEnd, PassStep,
    Reason, ReclaimScope, WritebackCallback, WritebackControl, WritebackRange,
};
use foliant_nvme_emulated::{Action, EmulatedConfig};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use foliant_tests::{Bed, options};

const MIB: u64 = 1 << 20;

fn ram() -> EmulatedConfig {
    EmulatedConfig::ram(64 * MIB, 512)
}

/// Every rule's test runs with one shard and with several.
fn beds(frames: u64) -> [Bed; 2] {
    [1, 3].map(|shards| Bed::new(ram(), EngineOptions { shards, ..options(frames * shards as u64) }))
}

/// Dirties pages, each a folio of its own: written one after the other they would become larger ones.
fn dirty(bed: &mut Bed, mapping: &Mapping, pages: impl IntoIterator<Item = u64>) {
    for page in pages {
        bed.run(mapping.pin_mut_async(page)).unwrap().fill(1);
    }
    bed.settle();
    bed.clear_seen();
}

/// The pages that were written since the last look.
fn written(bed: &Bed) -> Vec<u64> {
    let writes = bed.seen(NvmOpcode::WRITE);
    bed.clear_seen();
    writes.iter().flat_map(|write| write.slba / 8..(write.slba + u64::from(write.blocks)) / 8).collect()
}

fn background() -> WritebackControl {
    WritebackControl::background()
}

fn callback(ask: impl Fn(u64) -> Disposition + Send + Sync + 'static) -> WritebackCallback {
    Arc::new(move |folio| ask(folio.index()))
}

/// Begins a future: it is polled, and the shards have come to rest.
fn start<'a, T>(
    bed: &mut Bed,
    future: impl Future<Output = T> + 'a,
) -> Pin<Box<dyn Future<Output = T> + 'a>> {
    let mut future: Pin<Box<dyn Future<Output = T>>> = Box::pin(future);
    assert!(bed.poll_once(future.as_mut()).is_pending());
    future
}

#[test]
fn wb02_a_cyclic_pass_goes_on_where_the_last_one_stopped_and_never_wraps() {
    for mut bed in beds(256) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..30);
        let ten = background().pages_max(10);
        for first in [0, 10] {
            let outcome = bed.run(mapping.writeback_async(&ten)).unwrap();
            assert_eq!((outcome.pages_written, outcome.ended), (10, PassEnd::Budget));
            bed.settle();
            assert_eq!(written(&bed), (first..first + 10).collect::<Vec<_>>());
        }
        dirty(&mut bed, &mapping, 0..5);
        let outcome = bed.run(mapping.writeback_async(&background())).unwrap();
        assert_eq!((outcome.pages_written, outcome.ended), (10, PassEnd::Complete), "no wrap");
        bed.settle();
        assert_eq!(written(&bed), (20..30).collect::<Vec<_>>());
        bed.run(mapping.writeback_async(&background())).unwrap();
        bed.settle();
        assert_eq!(written(&bed), (0..5).collect::<Vec<_>>(), "from the start after the end");
        bed.assert_consistent();
    }
}

#[test]
fn wb02_a_pass_covers_the_whole_pages_of_its_byte_range() {
    for mut bed in beds(256) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..6);
        let control = background().bytes(4097..3 * 4096 - 1);
        bed.run(mapping.writeback_async(&control)).unwrap();
        bed.settle();
        assert_eq!(written(&bed), [1, 2]);
        bed.run(mapping.writeback_async(&background())).unwrap();
        bed.settle();
        assert_eq!(written(&bed), [0, 3, 4, 5], "a range leaves the writeback index alone");
    }
}

#[test]
fn wb03_a_pass_that_tags_first_writes_what_was_dirty_when_it_began() {
    let mut bed = Bed::new(ram(), EngineOptions { queue_entries: 8, ..options(256) });
    let mapping = bed.mapping();
    dirty(&mut bed, &mapping, (0..40).step_by(2));
    bed.fault(NvmOpcode::WRITE, 0, u64::MAX, Action::Delay(Duration::from_micros(50)));
    let control = background().whole().tag_first();
    let mut pass = start(&mut bed, mapping.writeback_async(&control));
    bed.step();
    for page in [37, 39] {
        bed.run(mapping.write_at_async(page * 4096, &[2; 4096])).unwrap();
    }
    assert!(bed.poll_once(pass.as_mut()).is_pending(), "it is still under way");
    assert_eq!(bed.run(pass).unwrap().pages_written, 20);
    assert_eq!(bed.engine().stats().dirty_pages, 2);
}

#[test]
fn wb05_a_budget_is_kept_exactly_over_all_shards() {
    for mut bed in beds(256) {
        let mapping = bed.mapping();
        let pages: Vec<u64> = (0..6u64).flat_map(|stripe| stripe * 512..stripe * 512 + 10).collect();
        dirty(&mut bed, &mapping, pages);
        for (budget, left) in [(15, 45), (1, 44), (30, 14)] {
            let outcome = bed.run(mapping.writeback_async(&background().whole().pages_max(budget))).unwrap();
            assert_eq!((outcome.pages_written, outcome.ended), (budget, PassEnd::Budget));
            bed.settle();
            assert_eq!(written(&bed).len() as u64, budget);
            assert_eq!(bed.engine().stats().dirty_pages, left);
        }
        let outcome = bed.run(mapping.writeback_async(&background().whole().pages_max(15))).unwrap();
        assert_eq!((outcome.pages_written, outcome.ended), (14, PassEnd::Complete));
    }
}

#[test]
fn wb05_an_integrity_pass_goes_on_past_its_budget() {
    for mut bed in beds(256) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..20);
        let control = WritebackControl::integrity().pages_max(5);
        assert_eq!(bed.run(mapping.writeback_async(&control)).unwrap().pages_written, 20);
        assert_eq!(bed.engine().stats().dirty_pages, 0);
    }
}

#[test]
fn wb05_a_background_pass_stops_at_the_first_error_and_an_integrity_pass_does_not() {
    let fault = Status::of(StatusCode::WRITE_FAULT).with_dnr(true);
    for control in [background().whole(), WritebackControl::integrity()] {
        let mut bed = Bed::new(ram(), EngineOptions { queue_entries: 8, ..options(256) });
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, (0..80).step_by(2));
        bed.fail(NvmOpcode::WRITE, 1, 1, fault);
        let error = bed.run(mapping.writeback_async(&control)).unwrap_err();
        assert!(matches!(error, Error::Device { offset: 8192, .. }), "{error}");
        bed.settle();
        let commands = bed.engine().stats().write_commands;
        match control.sync_mode {
            foliant::SyncMode::None => assert!((2..40).contains(&commands), "{commands}"),
            foliant::SyncMode::All => assert_eq!(commands, 40),
        }
        bed.assert_consistent();
    }
}

#[test]
fn wb07_a_pass_gives_the_core_back_and_reads_are_served_meanwhile() {
    let mut bed = Bed::new(ram(), EngineOptions { queue_entries: 16, ..options(2048) });
    let mapping = bed.mapping();
    dirty(&mut bed, &mapping, 0..1000);
    let control = WritebackControl::integrity();
    let mut pass = bed.shard(0).begin_pass(&mapping, control).unwrap();
    let mut written = 0;
    let mut steps = 0;
    while !pass.has_ended() {
        let mut taken = 0;
        let mut step = bed.shard(0).resume(&mut pass);
        while let PassStep::Folio(folio) = step.next() {
            taken += folio.pages();
            folio.write();
        }
        drop(step);
        assert!(taken <= 256 + 255, "a run more than the step's pages at most: {taken}");
        bed.run(mapping.read_at_async((3000 + steps) * 4096, &mut [0; 10])).unwrap();
        written += taken;
        steps += 1;
    }
    assert_eq!(written, 1000);
    assert!(steps >= 3, "{steps}");
    assert_eq!(pass.outcome().unwrap().pages_written, 1000);
    drop(pass);
    bed.run(mapping.sync_async()).unwrap();
    assert_eq!(bed.engine().stats().dirty_pages, 0);
}

/// The next folio of an owner's pass, which must be there.
fn next<'p, 'a>(step: &'p mut foliant::WritebackPass<'a>) -> LockedFolio<'p, 'a> {
    match step.next() {
        PassStep::Folio(folio) => folio,
        other => panic!("{other:?}"),
    }
}

#[test]
fn wb08_a_pass_dropped_half_way_leaves_nothing_locked_and_saves_its_index() {
    for mut bed in beds(256) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..10);
        let mut pass = bed.shard(0).begin_pass(&mapping, background()).unwrap();
        let mut step = bed.shard(0).resume(&mut pass);
        next(&mut step).write();
        drop(next(&mut step));
        next(&mut step).write();
        assert_eq!(next(&mut step).index(), 3);
        drop(step);
        assert_eq!(pass.outcome().unwrap().ended, PassEnd::Dropped);
        drop(pass);
        bed.settle();
        bed.assert_consistent();
        assert_eq!(written(&bed), [0, 2]);
        // Every page can be had at once, and the next pass goes on behind the last folio.
        for page in 0..10 {
            drop(bed.run(mapping.pin_mut_async(page)).unwrap());
        }
        bed.run(mapping.writeback_async(&background())).unwrap();
        bed.settle();
        assert_eq!(written(&bed), (4..10).collect::<Vec<_>>());
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!(written(&bed), [1, 3]);
    }
}

#[test]
fn wb08_a_panic_of_who_drives_a_pass_leaves_nothing_locked() {
    let mut bed = Bed::new(ram(), options(256));
    let mapping = bed.mapping();
    dirty(&mut bed, &mapping, 0..10);
    let mut pass = bed.shard(0).begin_pass(&mapping, background()).unwrap();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut step = bed.shard(0).resume(&mut pass);
        next(&mut step).write();
        let folio = next(&mut step);
        panic!("at page {}", folio.index());
    }));
    assert!(panicked.is_err());
    drop(pass);
    bed.settle();
    bed.assert_consistent();
    assert_eq!(written(&bed), [0]);
    bed.run(mapping.sync_async()).unwrap();
    assert_eq!(written(&bed), (1..10).collect::<Vec<_>>());
}

#[test]
fn wb06_an_owners_integrity_pass_waits_for_a_holder_before_the_next_writer() {
    let mut bed = Bed::new(ram(), options(64));
    let mapping = bed.mapping();
    dirty(&mut bed, &mapping, 0..5);
    let mut held = Some(bed.run(mapping.pin_mut_async(3)).unwrap());
    held.as_mut().unwrap()[0] = 9;
    let mut pass = bed.shard(0).begin_pass(&mapping, WritebackControl::integrity()).unwrap();
    let mut waits = 0;
    let mut writer = None;
    while !pass.has_ended() {
        let mut step = bed.shard(0).resume(&mut pass);
        let waiting = loop {
            match step.next() {
                PassStep::Folio(folio) => folio.write(),
                PassStep::Wait { page } => break Some(page),
                PassStep::Pause | PassStep::End => break None,
            }
        };
        drop(step);
        if let Some(page) = waiting {
            assert_eq!(page, 3);
            waits += 1;
        }
        bed.settle();
        if waits == 2 && held.is_some() {
            assert_eq!(written(&bed), [0, 1, 2], "what lies before the page is with the device (WB-18)");
            // Another writer queues up; the pass comes first all the same (WB-03).
            writer = Some(start(&mut bed, mapping.pin_mut_async(3)));
            bed.settle();
            drop(held.take());
            bed.settle();
            assert!(bed.poll_once(writer.as_mut().unwrap().as_mut()).is_pending());
        }
        assert!(waits < 10);
    }
    drop(pass);
    bed.run(writer.unwrap()).map(drop).unwrap();
    let mut byte = [0];
    bed.device.read_image(1, 3 * 4096, &mut byte).unwrap();
    assert_eq!(byte, [9]);
}

#[test]
fn wb09_not_now_is_no_error_in_a_background_pass() {
    for mut bed in beds(256) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..10);
        let even = callback(|page| if page % 2 == 0 { Disposition::Write } else { Disposition::NotNow });
        let outcome = bed.run(mapping.writeback_with_async(&background(), &even)).unwrap();
        assert_eq!(
            (outcome.pages_written, outcome.pages_postponed, outcome.ended),
            (5, 5, PassEnd::Complete)
        );
        bed.settle();
        assert_eq!(written(&bed), [0, 2, 4, 6, 8]);
        assert_eq!(bed.engine().stats().dirty_pages, 5);
        bed.assert_consistent();
        for page in 0..10 {
            drop(bed.run(mapping.pin_mut_async(page)).unwrap());
        }
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!(written(&bed), [1, 3, 5, 7, 9]);
    }
}

#[test]
fn wb04_a_page_that_is_given_back_is_as_dirty_as_before() {
    for mut bed in beds(256) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..10);
        let never = callback(|_| Disposition::NotNow);
        bed.run(mapping.writeback_with_async(&background(), &never)).unwrap();
        bed.settle();
        let stats = bed.engine().stats();
        assert_eq!((stats.dirty_pages, stats.writeback_pages), (10, 0), "who clears DIRTY submits the page");
        bed.assert_consistent();
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!(written(&bed), (0..10).collect::<Vec<u64>>());
    }
}

#[test]
fn wb09_not_now_in_an_integrity_pass_is_asked_again_and_then_try_again_but_never_success() {
    for mut bed in beds(256) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..10);
        let asked = Arc::new(AtomicU64::new(0));
        let count = asked.clone();
        let third_time = callback(move |page| {
            let again = page == 4 && count.fetch_add(1, Ordering::Relaxed) < 2;
            if again { Disposition::NotNow } else { Disposition::Write }
        });
        let integrity = WritebackControl::integrity();
        let outcome = bed.run(mapping.writeback_with_async(&integrity, &third_time)).unwrap();
        assert_eq!((outcome.pages_written, outcome.pages_postponed), (10, 2));
        assert_eq!(asked.load(Ordering::Relaxed), 3);
        assert_eq!(bed.engine().stats().dirty_pages, 0);

        dirty(&mut bed, &mapping, 0..10);
        let never = callback(|page| if page == 7 { Disposition::NotNow } else { Disposition::Write });
        let error = bed.run(mapping.writeback_with_async(&integrity, &never)).unwrap_err();
        assert!(matches!(error, Error::TryAgain { page: 7, cause: None, .. }), "{error}");
        assert_eq!(bed.engine().stats().dirty_pages, 1, "all others are written");
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!(bed.engine().stats().dirty_pages, 0);
    }
}

#[test]
fn wb09_a_callback_sees_the_bytes_that_would_be_written() {
    for mut bed in beds(256) {
        let mapping = bed.mapping();
        // Appended, so that a folio may have several pages.
        for page in 0..10u64 {
            bed.run(mapping.write_at_async(page * 4096, &[page as u8; 4096])).unwrap();
        }
        let seen = Arc::new(Mutex::new(Vec::new()));
        let keep = seen.clone();
        let look: WritebackCallback = Arc::new(move |folio| {
            assert_eq!(folio.offset(), folio.index() * 4096);
            assert_eq!(folio.bytes().len() as u64, folio.pages() * 4096);
            let pages = folio.bytes().chunks(4096).zip(folio.index()..);
            keep.lock().unwrap().extend(pages.map(|(bytes, page)| (page, bytes[17])));
            Disposition::Write
        });
        bed.run(mapping.writeback_with_async(&background(), &look)).unwrap();
        assert_eq!(*seen.lock().unwrap(), (0..10).map(|page| (page, page as u8)).collect::<Vec<_>>());
    }
}

#[test]
fn requests_from_inside_a_callback_are_refused_and_a_panic_ends_its_pass_alone() {
    for mut bed in beds(256) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..10);
        let answers = Arc::new(Mutex::new(Vec::new()));
        let (handle, keep) = (mapping.clone(), answers.clone());
        let curious: WritebackCallback = Arc::new(move |folio| {
            let mut answers = keep.lock().unwrap();
            answers.push(handle.read_at(900 * 4096, &mut [0]).unwrap_err());
            answers.push(handle.pin_mut(folio.index()).map(drop).unwrap_err());
            answers.push(handle.sync().unwrap_err());
            answers.push(handle.writeback(&WritebackControl::background()).unwrap_err());
            answers.push(handle.discard(0..MIB).unwrap_err());
            // What is in the cache may be looked at: nobody has to be asked for it.
            handle.read_at(folio.offset(), &mut [0]).unwrap();
            Disposition::NotNow
        });
        bed.run(mapping.writeback_with_async(&background(), &curious)).unwrap();
        let answers = std::mem::take(&mut *answers.lock().unwrap());
        assert_eq!(answers.len(), 50);
        assert!(answers.iter().all(|error| matches!(error, Error::InsidePass)), "{answers:?}");

        for control in [background(), WritebackControl::integrity()] {
            let broken = callback(|page| {
                assert!(page != 4, "page four");
                Disposition::NotNow
            });
            let error = bed.run(mapping.writeback_with_async(&control, &broken)).unwrap_err();
            assert!(
                matches!(&error, Error::CallbackPanicked { page: 4, message } if message.contains("page four"))
            );
            bed.assert_consistent();
        }
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!(bed.engine().stats().dirty_pages, 0, "the shard lives on");
    }
}

#[test]
fn wb10_a_pass_from_the_reclaim_context_is_refused_counted_and_writes_nothing() {
    for mut bed in beds(256) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..10);
        let refused = |error: Error| {
            assert!(matches!(error, Error::ReclaimContext), "{error}");
            assert!(error.to_string().contains("request_writeback"), "{error}");
        };
        let named = background().context(Context::Reclaim);
        refused(bed.run(mapping.writeback_async(&named)).unwrap_err());
        refused(bed.shard(0).begin_pass(&mapping, named).map(drop).unwrap_err());
        let scope = ReclaimScope::enter();
        refused(bed.run(mapping.writeback_async(&background())).unwrap_err());
        refused(bed.run(mapping.sync_async()).unwrap_err());
        refused(bed.shard(0).begin_pass(&mapping, background()).map(drop).unwrap_err());
        // What reclaim may do: ask the flusher.
        bed.settle();
        let stats = bed.engine().stats();
        assert_eq!((stats.reclaim_guard_hits, stats.write_commands, stats.dirty_pages), (5, 0, 10));
        mapping.request_writeback();
        bed.settle();
        let stats = bed.engine().stats();
        assert_eq!((stats.dirty_pages, stats.passes_reclaim), (0, 1));
        drop(scope);
        bed.run(mapping.sync_async()).unwrap();
    }
}

#[test]
fn wb14_syncs_that_wait_together_become_one_pass() {
    for mut bed in beds(256) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..40);
        let before = bed.engine().stats();
        let mut syncs: Vec<_> =
            (0..8u64).map(|i| Box::pin(mapping.sync_range_async(i * 5 * 4096..(i * 5 + 4) * 4096))).collect();
        for sync in &mut syncs {
            assert!(bed.poll_once(sync.as_mut()).is_pending());
        }
        for sync in syncs {
            bed.run(sync).unwrap();
        }
        let stats = bed.engine().stats();
        assert_eq!(stats.passes_integrity - before.passes_integrity, 1);
        assert_eq!(stats.syncs_merged - before.syncs_merged, 7);
        assert_eq!(stats.dirty_pages, 8, "no page that nobody asked for was written");
    }
}

#[test]
fn wb14_a_small_sync_returns_while_a_large_one_of_the_same_mapping_is_issuing() {
    let mut bed = Bed::new(ram(), EngineOptions { queue_entries: 16, ..options(4096) });
    let mapping = bed.mapping();
    dirty(&mut bed, &mapping, (0..3000).step_by(2));
    bed.fault(NvmOpcode::WRITE, 0, u64::MAX, Action::Delay(Duration::from_micros(100)));
    for small in [3500u64, 1] {
        let mut large = start(&mut bed, mapping.sync_range_async(2 * 4096..3000 * 4096));
        bed.step();
        bed.run(mapping.write_at_async(small * 4096, &[2; 4096])).unwrap();
        bed.clear_seen();
        bed.run(mapping.sync_range_async(small * 4096..(small + 1) * 4096)).unwrap();
        assert!(bed.poll_once(large.as_mut()).is_pending(), "1500 commands through a queue of 16");
        let before = bed.seen(NvmOpcode::WRITE).len();
        assert!(before < 100, "{before} commands went before the small one's answer");
        bed.run(large).unwrap();
        dirty(&mut bed, &mapping, (0..3000).step_by(2));
    }
}

#[test]
fn wb14_a_background_pass_finds_a_mapping_taken_and_a_running_one_gives_way() {
    for mut bed in [1, 3].map(|shards| {
        Bed::new(ram(), EngineOptions { shards, queue_entries: 8, ..options(512 * shards as u64) })
    }) {
        let mapping = bed.mapping();
        let pages: Vec<u64> =
            (0..3u64).flat_map(|stripe| (0..80).map(move |i| stripe * 512 + 2 * i)).collect();
        dirty(&mut bed, &mapping, pages.clone());
        bed.fault(NvmOpcode::WRITE, 0, u64::MAX, Action::Delay(Duration::from_micros(100)));
        let sync = start(&mut bed, mapping.sync_async());
        bed.settle();
        let whole = background().whole();
        let outcome = bed.run(mapping.writeback_async(&whole)).unwrap();
        assert_eq!((outcome.pages_written, outcome.ended), (0, PassEnd::Taken));
        bed.run(sync).unwrap();

        dirty(&mut bed, &mapping, pages);
        let mut running = start(&mut bed, mapping.writeback_async(&whole));
        bed.settle();
        assert!(bed.poll_once(running.as_mut()).is_pending());
        let sync = start(&mut bed, mapping.sync_async());
        let outcome = bed.run(running).unwrap();
        assert_eq!(outcome.ended, PassEnd::Taken);
        assert!((1..240).contains(&outcome.pages_written), "{outcome:?}");
        bed.run(sync).unwrap();
        assert_eq!(bed.engine().stats().dirty_pages, 0);
        assert!(bed.engine().stats().passes_taken >= 2);
    }
}

#[test]
fn wb14_the_flusher_gives_way_to_a_sync_at_its_next_batch() {
    let mut bed =
        Bed::new(ram(), EngineOptions { queue_entries: 8, dirty_background_percent: 10, ..options(512) });
    let mapping = bed.mapping();
    bed.fault(NvmOpcode::WRITE, 0, u64::MAX, Action::Delay(Duration::from_millis(10)));
    for page in (0..400).step_by(2) {
        bed.run(mapping.write_at_async(page * 4096, &[1; 4096])).unwrap();
    }
    bed.settle();
    let passes = bed.engine().stats().passes_taken;
    let sync = start(&mut bed, mapping.sync_async());
    bed.settle();
    assert!(bed.engine().stats().passes_taken > passes);
    bed.run(sync).unwrap();
    assert_eq!(bed.engine().stats().dirty_pages, 0);
}

#[test]
fn wb14_a_held_page_keeps_only_those_syncs_waiting_whose_range_has_it() {
    for shards in [1, 3] {
        let limits =
            EngineOptions { shards, pin_wait: Duration::from_secs(2), ..options(64 * shards as u64) };
        let mut bed = Bed::new(ram(), limits);
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..30);
        let pin = bed.run(mapping.pin_mut_async(5)).unwrap();
        let before = start(&mut bed, mapping.sync_range_async(0..5 * 4096));
        let held = start(&mut bed, mapping.sync_range_async(0..10 * 4096));
        let behind = start(&mut bed, mapping.sync_range_async(20 * 4096..30 * 4096));
        // All three share a pass at first. The clock stands still for the two that nobody holds up.
        let mut held = held;
        for mut other in [before, behind] {
            bed.settle();
            for _ in 0..20 {
                bed.step();
            }
            let mut answer = bed.poll_once(other.as_mut());
            for _ in 0..20 {
                if answer.is_ready() {
                    break;
                }
                bed.settle();
                answer = bed.poll_once(other.as_mut());
            }
            assert!(matches!(answer, Poll::Ready(Ok(()))), "{answer:?}");
        }
        assert!(bed.poll_once(held.as_mut()).is_pending());
        let error = bed.run(held).unwrap_err();
        assert!(matches!(error, Error::PinnedTooLong { page: 5, .. }), "{error}");
        drop(pin);
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!(bed.engine().stats().dirty_pages, 0);
    }
}

#[test]
fn wb16_a_sync_is_not_answered_before_all_of_its_pass_is_queued_and_done() {
    for mut bed in [1, 3].map(|shards| {
        Bed::new(ram(), EngineOptions { shards, queue_entries: 8, ..options(2048 * shards as u64) })
    }) {
        let mapping = bed.mapping();
        // Each page a command, far more than the queue holds; the device answers each at once.
        dirty(&mut bed, &mapping, (0..1200).step_by(2));
        let mut sync = Box::pin(mapping.sync_async());
        while bed.poll_once(sync.as_mut()).is_pending() {
            bed.step();
        }
        assert_eq!(bed.engine().stats().dirty_pages, 0);
        let mut image = vec![0; 1200 * 4096];
        bed.device.read_image(1, 0, &mut image).unwrap();
        assert!(image.chunks(8192).all(|pair| pair[..4096].iter().all(|&byte| byte == 1)));
    }
}

#[test]
fn wb16_a_sync_whose_pass_waits_midway_is_not_answered_when_what_was_queued_has_ended() {
    for mut bed in beds(64) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..8);
        let pin = bed.run(mapping.pin_mut_async(6)).unwrap();
        let mut sync = Box::pin(mapping.sync_async());
        for _ in 0..4 {
            assert!(bed.poll_once(sync.as_mut()).is_pending());
            bed.settle();
        }
        assert_eq!(bed.engine().stats().writeback_pages, 0, "all that was queued has ended");
        drop(pin);
        bed.run(sync).unwrap();
        assert_eq!(written(&bed), (0..8).collect::<Vec<_>>());
    }
}

#[test]
fn wb18_a_pass_that_waits_has_submitted_what_it_took() {
    for mut bed in beds(64) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..8);
        let pin = bed.run(mapping.pin_mut_async(6)).unwrap();
        let sync = start(&mut bed, mapping.sync_async());
        bed.settle();
        assert_eq!(written(&bed), (0..6).collect::<Vec<_>>(), "not held back for a neighbour that may come");
        drop(pin);
        bed.run(sync).unwrap();
    }
}

#[test]
fn wb19_a_background_pass_finds_a_congested_device_and_returns_at_once_and_a_sync_does_not() {
    for mut bed in beds(256) {
        let mapping = bed.mapping();
        bed.fault(NvmOpcode::WRITE, 0, 1, Action::Delay(Duration::from_millis(10)));
        bed.run(mapping.write_at_async(0, &[1; 200 * 4096])).unwrap();
        let outcome = bed.run(mapping.writeback_async(&background())).unwrap();
        assert_eq!(outcome.pages_written, 200);
        bed.run(mapping.write_at_async(300 * 4096, &[1; 4096])).unwrap();
        for _ in 0..2 {
            let outcome = bed.run(mapping.writeback_async(&background())).unwrap();
            assert_eq!((outcome.pages_written, outcome.ended), (0, PassEnd::Congested));
            let pass = bed.shard(0).begin_pass(&mapping, background()).unwrap();
            assert_eq!(pass.outcome().unwrap().ended, PassEnd::Congested);
        }
        assert!(bed.engine().stats().congestion_skips >= 4);
        bed.run(mapping.sync_range_async(300 * 4096..301 * 4096)).unwrap();
        assert_eq!(bed.engine().stats().dirty_pages, 0);
        bed.advance(Duration::from_millis(20));
        dirty(&mut bed, &mapping, [300]);
        assert_eq!(bed.run(mapping.writeback_async(&background())).unwrap().pages_written, 1);
    }
}

#[test]
fn wb20_the_pass_with_the_more_urgent_reason_issues_first() {
    let mut bed = Bed::new(ram(), EngineOptions { queue_entries: 8, ..options(512) });
    let range =
        |at: u64| MappingOptions { start_bytes: at * MIB, len_bytes: Some(MIB), ..Default::default() };
    let [patient, urgent] = [0, 1].map(|at| bed.open(&range(at)));
    for mapping in [&patient, &urgent] {
        dirty(&mut bed, mapping, (0..80).step_by(2));
    }
    bed.fault(NvmOpcode::WRITE, 0, u64::MAX, Action::Delay(Duration::from_micros(50)));
    let (expiry, reclaim) = (background().reason(Reason::Expiry), background().reason(Reason::Reclaim));
    let first = start(&mut bed, patient.writeback_async(&expiry));
    let second = start(&mut bed, urgent.writeback_async(&reclaim));
    bed.run(first).unwrap();
    bed.run(second).unwrap();
    bed.settle();
    let commands: Vec<bool> = bed.seen(NvmOpcode::WRITE).iter().map(|write| write.slba >= 256 * 8).collect();
    assert!(commands[..40].iter().all(|&is_urgent| is_urgent), "{commands:?}");
    let stats = bed.engine().stats();
    assert_eq!((stats.passes_reclaim, stats.passes_expiry), (1, 1));
}

#[test]
fn each_wrong_control_is_refused_with_what_would_be_right() {
    for mut bed in beds(64) {
        let mapping = bed.mapping();
        dirty(&mut bed, &mapping, 0..2);
        let end = mapping.len();
        let mut ask = |control: &WritebackControl| {
            let direct = bed.shard(0).begin_pass(&mapping, control.clone()).map(drop);
            let asked = bed.run(mapping.writeback_async(control));
            assert_eq!(
                direct.map_err(|e| e.to_string()).err(),
                asked.as_ref().map_err(Error::to_string).err()
            );
            asked
        };
        let beyond = ask(&background().bytes(0..end + 1)).unwrap_err();
        assert!(matches!(beyond, Error::OutOfRange { .. }), "{beyond}");
        #[expect(clippy::reversed_empty_ranges, reason = "the very mistake")]
        let inverted = ask(&background().bytes(9..3)).unwrap_err();
        assert!(matches!(inverted, Error::InvertedRange { start: 9, end: 3 }), "{inverted}");
        let nothing = ask(&background().pages_max(0)).unwrap_err().to_string();
        assert!(nothing.contains("at least 1"), "{nothing}");
        let cyclic = WritebackControl { range: WritebackRange::Cyclic, ..WritebackControl::integrity() };
        assert!(ask(&cyclic).unwrap_err().to_string().contains("Whole or Bytes"));
        for empty in [background().bytes(7..7), WritebackControl::integrity().bytes(end..end)] {
            assert_eq!(ask(&empty).unwrap().pages_written, 0);
        }
        #[expect(clippy::reversed_empty_ranges, reason = "the very mistake")]
        let inverted = bed.run(mapping.sync_range_async(9..3)).unwrap_err();
        assert!(matches!(inverted, Error::InvertedRange { .. }));
        assert_eq!(bed.engine().stats().dirty_pages, 2, "nothing of all that wrote anything");
    }
}

#[test]
fn a_pass_over_a_closed_or_foreign_mapping_ends_with_an_error() {
    let mut bed = Bed::new(ram(), EngineOptions { shards: 2, ..options(128) });
    let mut other = Bed::new(ram(), options(64));
    let (mapping, foreign) = (bed.mapping(), other.mapping());
    assert!(matches!(bed.shard(0).begin_pass(&foreign, background()), Err(Error::Closed)));
    dirty(&mut bed, &mapping, [0]);
    let mut pass = bed.shard(0).begin_pass(&mapping, background()).unwrap();
    // Resumed by the wrong shard, it ends there and then.
    assert!(matches!(bed.shard(1).resume(&mut pass).next(), PassStep::End));
    assert!(pass.outcome().is_err());
    let mut pass = bed.shard(0).begin_pass(&mapping, background()).unwrap();
    bed.run(mapping.clone().close_async()).unwrap();
    assert!(matches!(bed.shard(0).resume(&mut pass).next(), PassStep::End));
    assert!(matches!(pass.outcome(), Err(Error::Closed)));
    drop(pass);
    assert!(matches!(bed.run(mapping.writeback_async(&background())), Err(Error::Closed)));
    assert!(matches!(bed.shard(0).begin_pass(&mapping, background()), Err(Error::Closed)));
}

#[test]
fn an_integrity_pass_that_its_owner_forgets_keeps_background_passes_away_for_a_while_only() {
    let mut bed = Bed::new(ram(), EngineOptions { pin_wait: Duration::from_secs(2), ..options(64) });
    let mapping = bed.mapping();
    dirty(&mut bed, &mapping, 0..4);
    let pass = bed.shard(0).begin_pass(&mapping, WritebackControl::integrity()).unwrap();
    let outcome = bed.run(mapping.writeback_async(&background())).unwrap();
    assert_eq!(outcome.ended, PassEnd::Taken);
    std::mem::forget(pass);
    bed.advance(Duration::from_secs(3));
    let outcome = bed.run(mapping.writeback_async(&background())).unwrap();
    assert_eq!((outcome.pages_written, outcome.ended), (4, PassEnd::Complete));
    // Dropped instead, it lets go at once.
    dirty(&mut bed, &mapping, 0..4);
    drop(bed.shard(0).begin_pass(&mapping, WritebackControl::integrity()).unwrap());
    assert_eq!(bed.run(mapping.writeback_async(&background())).unwrap().pages_written, 4);
}
