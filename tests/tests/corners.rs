//! Corners in which requests meet: held pages and passes, closes and writes, discards and misses, full queues, long idle
//! times. Each is a sequence that once went wrong, or easily could.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use foliant::{Engine, EngineOptions, Error, Hugepages, Mapping, MappingOptions};
use foliant_nvme_emulated::{Action, EmulatedConfig, Fault, Match};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use foliant_tests::{Bed, options};

const MIB: u64 = 1 << 20;

fn ram() -> EmulatedConfig {
    EmulatedConfig::ram(64 * MIB, 512)
}

fn range(start_bytes: u64, len_bytes: u64) -> MappingOptions {
    MappingOptions { start_bytes, len_bytes: Some(len_bytes), ..Default::default() }
}

fn once<T>(future: Pin<&mut (impl Future<Output = T> + ?Sized)>) -> Poll<T> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

fn start<'a, T>(
    bed: &mut Bed,
    future: impl Future<Output = T> + 'a,
) -> Pin<Box<dyn Future<Output = T> + 'a>> {
    let mut future: Pin<Box<dyn Future<Output = T>>> = Box::pin(future);
    for _ in 0..4 {
        assert!(once(future.as_mut()).is_pending());
        bed.settle();
    }
    future
}

fn first_byte(bed: &mut Bed, mapping: &Mapping) -> u8 {
    let mut byte = [0];
    bed.run(mapping.read_at_async(0, &mut byte)).unwrap();
    byte[0]
}

#[test]
fn wb01_a_background_pass_ends_though_the_last_dirty_page_is_held() {
    let mut bed = Bed::new(ram(), options(64));
    let mapping = bed.mapping();
    bed.run(mapping.write_at_async(0, &[1; 4096])).unwrap();
    let pin = bed.run(mapping.pin_mut_async(0)).unwrap();
    bed.advance(Duration::from_secs(6));
    bed.run(mapping.read_at_async(40 * 4096, &mut [0])).unwrap();
    drop(pin);
    bed.advance(Duration::from_secs(6));
    assert_eq!(bed.engine().stats().dirty_pages, 0);
}

#[test]
fn wb03_a_sync_has_its_turn_before_the_next_writer_of_the_same_page() {
    let mut bed = Bed::new(ram(), EngineOptions { pin_wait: Duration::from_secs(1), ..options(64) });
    let mapping = bed.mapping();
    bed.run(mapping.write_at_async(0, &[1; 4096])).unwrap();
    let mut held = bed.run(mapping.pin_mut_async(0)).unwrap();
    let mut sync = Box::pin(mapping.sync_async());
    for round in 0..100 {
        if let Poll::Ready(result) = once(sync.as_mut()) {
            return result.unwrap();
        }
        let next = start(&mut bed, mapping.pin_mut_async(0));
        held[0] = round;
        drop(held);
        held = bed.run(next).unwrap();
        bed.advance(Duration::from_millis(2));
    }
    panic!("each of 100 writers kept the page for 2 ms, and the sync has not ended");
}

#[test]
fn who_waits_behind_another_for_a_page_that_is_read_in_is_woken_by_its_release() {
    let mut bed = Bed::new(ram(), options(64));
    let mapping = bed.mapping();
    let mut writer = Box::pin(mapping.pin_mut_async(7));
    let mut reader = Box::pin(mapping.pin_async(7));
    assert!(once(writer.as_mut()).is_pending() && once(reader.as_mut()).is_pending());
    bed.settle();
    let Poll::Ready(pin) = once(writer.as_mut()) else { panic!("the writer came first") };
    bed.settle();
    assert!(once(reader.as_mut()).is_pending());
    drop(pin);
    bed.settle();
    assert!(once(reader.as_mut()).is_ready());
}

#[test]
fn wb05_a_bad_block_of_one_mapping_does_not_keep_the_flusher_from_others() {
    let mut bed = Bed::new(ram(), options(256));
    let bad = bed.open(&range(0, MIB));
    let good = bed.open(&range(MIB, MIB));
    let matching = Match::io(NvmOpcode::WRITE).touching(0, 7);
    let action = Action::Status(Status::of(StatusCode::WRITE_FAULT).with_dnr(true));
    bed.device.inject(Fault { matching, action });
    bed.run(bad.write_at_async(0, &[1; 4096])).unwrap();
    bed.run(good.write_at_async(0, &[1; 4096])).unwrap();
    for _ in 0..200 {
        bed.advance(Duration::from_millis(100));
    }
    assert_eq!(bed.engine().stats().dirty_pages, 1, "only the bad one");
}

#[test]
fn reads_without_end_do_not_starve_a_sync() {
    let mut bed = Bed::new(ram(), EngineOptions { queue_entries: 8, ..options(256) });
    let mapping = bed.mapping();
    bed.run(mapping.write_at_async(16_000 * 4096, &[1; 4096])).unwrap();
    let mut page = 0;
    let mut next = || {
        page = (page + 3) % 15_000;
        let (mapping, page) = (mapping.clone(), page);
        Box::pin(async move { mapping.pin_async(page).await.map(drop).unwrap() })
    };
    let mut reads: Vec<_> = (0..32).map(|_| next()).collect();
    let mut sync = Box::pin(mapping.sync_async());
    for _ in 0..1000 {
        for read in &mut reads {
            while once(read.as_mut()).is_ready() {
                *read = next();
            }
        }
        if let Poll::Ready(result) = once(sync.as_mut()) {
            return result.unwrap();
        }
        bed.step();
    }
    panic!("{} pages were read meanwhile", bed.engine().stats().pages_read);
}

#[test]
fn a_boundary_that_splits_pages_does_not_break_a_short_queue() {
    let config = EmulatedConfig { noiob_blocks: 4, ..ram() };
    let mut bed = Bed::new(config, EngineOptions { queue_entries: 8, ..options(128) });
    let mapping = bed.mapping();
    bed.fault(NvmOpcode::WRITE, 0, u64::MAX, Action::Delay(Duration::from_micros(100)));
    for page in 0..40 {
        bed.run(mapping.write_at_async(page * 2 * 4096, &[1; 4096])).unwrap();
    }
    bed.run(mapping.sync_async()).unwrap();
    let config = EmulatedConfig { noiob_blocks: 1, ..ram() };
    let engine = Bed::new(config, EngineOptions { queue_entries: 8, ..options(128) }).engine.take().unwrap();
    let opened = once(std::pin::pin!(engine.mapping_async(&MappingOptions::default())));
    let Poll::Ready(Err(error)) = opened else { panic!("9 commands a page don't go through half of 7") };
    assert!(error.to_string().contains("queue_entries"), "{error}");
}

#[test]
fn a_close_writes_what_was_changed_after_its_sync_and_throws_nothing_away() {
    let mut bed = Bed::new(ram(), options(64));
    let mapping = bed.mapping();
    bed.run(mapping.write_at_async(0, &[1; 4096])).unwrap();
    bed.run(mapping.sync_async()).unwrap();
    let mut pin = bed.run(mapping.pin_mut_async(0)).unwrap();
    let close = start(&mut bed, mapping.clone().close_async());
    pin[0] = 9;
    drop(pin);
    bed.run(close).unwrap();
    let mut byte = [0];
    bed.device.read_image(1, 0, &mut byte).unwrap();
    assert_eq!(byte, [9]);
    assert!(bed.seen(NvmOpcode::FLUSH).len() >= 2, "and it is durable");
}

#[test]
fn a_close_that_fails_leaves_the_mapping_open_in_every_shard() {
    let mut bed = Bed::new(ram(), EngineOptions { shards: 2, ..options(128) });
    let mapping = bed.mapping();
    let pin = bed.run(mapping.pin_async(0)).unwrap();
    let result = bed.run(mapping.clone().close_async());
    assert!(matches!(result, Err(Error::PinnedTooLong { page: 0, .. })), "{result:?}");
    drop(pin);
    for page in [1, 512] {
        bed.run(mapping.pin_async(page)).map(drop).unwrap();
    }
}

#[test]
fn a_range_that_is_being_closed_cannot_be_opened_a_second_time() {
    let mut bed = Bed::new(ram(), options(128));
    let mapping = bed.mapping();
    let pin = bed.run(mapping.pin_async(0)).unwrap();
    let close = start(&mut bed, mapping.clone().close_async());
    let engine = bed.engine.take().unwrap();
    let error = bed.run(engine.mapping_async(&MappingOptions::default())).unwrap_err();
    assert!(error.to_string().contains("being closed"), "{error}");
    drop(pin);
    bed.run(close).unwrap();
    bed.run(engine.mapping_async(&MappingOptions::default())).unwrap();
}

#[test]
fn a_close_waits_for_zeroes_that_are_with_the_device() {
    let mut bed = Bed::new(ram(), options(64));
    let mapping = bed.mapping();
    bed.fault(NvmOpcode::WRITE_ZEROES, 0, 1, Action::Delay(Duration::from_secs(1)));
    let discard = start(&mut bed, mapping.discard_async(0..4096));
    let close = start(&mut bed, mapping.clone().close_async());
    bed.run(close).unwrap();
    assert!(once(Box::pin(discard).as_mut()).is_ready(), "the discard ended first");
}

#[test]
fn two_that_open_a_range_at_once_can_both_use_it_and_one_that_gives_up_breaks_nothing() {
    let mut bed = Bed::new(ram(), EngineOptions { shards: 2, ..options(128) });
    let engine = bed.engine.take().unwrap();
    let whole = MappingOptions::default();
    let mut first = Box::pin(engine.mapping_async(&whole));
    assert!(once(first.as_mut()).is_pending());
    let second = bed.run(engine.mapping_async(&whole)).unwrap();
    drop(first);
    bed.settle();
    for page in [0, 512] {
        bed.run(second.pin_async(page)).map(drop).unwrap();
    }
}

#[test]
fn a_discard_that_waits_holds_up_no_pages_outside_its_range() {
    let mut bed = Bed::new(ram(), EngineOptions { pin_wait: Duration::from_secs(2), ..options(256) });
    let mapping = bed.mapping();
    let pin = bed.run(mapping.pin_async(5)).unwrap();
    let _discard = start(&mut bed, mapping.discard_async(0..10 * 4096));
    let mut byte = [0];
    let inside = start(&mut bed, mapping.read_at_async(6 * 4096, &mut byte));
    let mut outside = Box::pin(mapping.pin_async(1000));
    assert!(once(outside.as_mut()).is_pending());
    bed.settle();
    assert!(once(outside.as_mut()).is_ready());
    // The discard gives up by its deadline; who waited for it either goes on or is told of the pin.
    let result = bed.run(inside);
    assert!(
        matches!(result, Ok(()) | Err(Error::PinnedTooLong { .. })),
        "frames are not the reason: {result:?}"
    );
    drop(pin);
}

#[test]
fn a_discard_that_the_device_fails_leaves_zeros_and_never_older_bytes() {
    let mut bed = Bed::new(ram(), options(64));
    let mapping = bed.mapping();
    bed.run(mapping.write_at_async(0, &[1; 4096])).unwrap();
    bed.run(mapping.sync_async()).unwrap();
    bed.run(mapping.write_at_async(0, &[2; 4096])).unwrap();
    bed.fail(NvmOpcode::WRITE_ZEROES, 0, 1, Status::of(StatusCode::WRITE_FAULT));
    bed.run(mapping.discard_async(0..4096)).unwrap();
    assert_eq!(first_byte(&mut bed, &mapping), 0);
}

#[test]
fn a_shard_that_was_idle_for_long_does_not_take_its_next_command_for_lost() {
    let mut bed = Bed::new(ram(), EngineOptions { command_timeout: Duration::from_secs(1), ..options(64) });
    let mapping = bed.mapping();
    for page in 0..5 {
        bed.pass_time(Duration::from_secs(60));
        bed.run(mapping.pin_async(page)).map(drop).unwrap();
    }
}

#[test]
fn a_request_to_a_shard_that_was_dropped_ends_with_an_error() {
    let mut bed = Bed::new(ram(), options(64));
    let mapping = bed.mapping();
    let waiting = start_unsettled(&mapping);
    bed.drop_shards();
    assert!(matches!(bed.run(waiting), Err(Error::Closed)));
    assert!(matches!(bed.run(mapping.read_at_async(0, &mut [0])), Err(Error::Closed)));
}

fn start_unsettled(mapping: &Mapping) -> Pin<Box<dyn Future<Output = foliant::Result<()>> + '_>> {
    let mut future: Pin<Box<dyn Future<Output = foliant::Result<()>>>> =
        Box::pin(async move { mapping.pin_async(3).await.map(drop) });
    assert!(once(future.as_mut()).is_pending());
    future
}

#[test]
fn an_engine_with_manual_shards_is_closed_by_its_owner_and_then_its_handles_refuse() {
    let device = "emu:ram?size=4MiB";
    let engine = Engine::open(device, &options(64)).unwrap();
    let shards = engine.take_shards();
    let error = engine.close().unwrap_err().to_string();
    assert!(error.contains("return_shards"), "{error}");
    drop(shards);

    let mut bed = Bed::new(ram(), options(64));
    let mapping = bed.mapping();
    bed.run(mapping.write_at_async(0, &[7; 4096])).unwrap();
    let engine = bed.engine.take().unwrap();
    engine.return_shards(bed.take_shards());
    engine.close().unwrap();
    let mut byte = [0];
    bed.device.read_image(1, 0, &mut byte).unwrap();
    assert_eq!(byte, [7]);
    assert!(matches!(mapping.write_at(0, &[1]), Err(Error::Closed)));
}

#[test]
fn a_future_that_nobody_polls_keeps_others_waiting_until_a_deadline_only() {
    let limits = EngineOptions {
        requests_max: 1,
        pin_wait: Duration::from_millis(20),
        cache_bytes: 1 << 20,
        hugepages: Hugepages::Never,
        ..Default::default()
    };
    let engine = Engine::open("emu:ram?size=4MiB&latency_us=1000", &limits).unwrap();
    let mapping = engine.mapping(&MappingOptions::default()).unwrap();
    let mut forgotten = Box::pin(mapping.pin_async(0));
    assert!(once(forgotten.as_mut()).is_pending());
    let error = mapping.read_at(100 * 4096, &mut [0]).unwrap_err();
    assert!(matches!(error, Error::TooManyRequests { requests_max: 1, .. }), "{error}");
    drop(forgotten);
    mapping.read_at(100 * 4096, &mut [0]).unwrap();
}

#[test]
fn the_longest_flush_interval_is_no_overflow() {
    let mut bed =
        Bed::new(ram(), EngineOptions { flush_interval: Duration::from_nanos(u64::MAX), ..options(64) });
    let mapping = bed.mapping();
    bed.run(mapping.write_at_async(0, &[1; 4096])).unwrap();
    bed.advance(Duration::from_secs(1000));
    bed.run(mapping.sync_async()).unwrap();
}

#[test]
fn a_mapping_that_two_handles_close_at_once_is_closed_once_and_stays_closed() {
    for shards in [1, 2] {
        let mut bed = Bed::new(ram(), EngineOptions { shards, ..options(64 * shards as u64) });
        let mapping = bed.open(&range(0, 8 * MIB));
        bed.run(mapping.write_at_async(0, &[7; 4096])).unwrap();
        let mut closes: Vec<_> = (0..2).map(|_| Some(Box::pin(mapping.clone().close_async()))).collect();
        let mut results = Vec::new();
        for _ in 0..1000 {
            for close in &mut closes {
                if let Some(Poll::Ready(result)) = close.as_mut().map(|close| once(close.as_mut())) {
                    results.push(result);
                    *close = None;
                }
            }
            bed.step();
        }
        assert_eq!(results.len(), 2);
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
        let again = bed.open(&range(0, 8 * MIB));
        let error = bed.run(mapping.write_at_async(0, &[8; 4096])).unwrap_err();
        assert!(matches!(error, Error::Closed), "two caches of the same range: {error}");
        assert_eq!(first_byte(&mut bed, &again), 7);
    }
}
