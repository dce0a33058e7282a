//! Dirty limits and congestion (WB-24, WB-19) on a device with a rate and a clock that the test moves: how writers are
//! slowed, where they wait, how a wait ends, and that dirty memory is never over its limit.

use std::cell::Cell;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use foliant::{EngineOptions, Error, Mapping, MappingOptions};
use foliant_nvme_emulated::{Action, Bandwidth, EmulatedConfig};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use foliant_tests::{Bed, options};

const MIB: u64 = 1 << 20;
/// What the device writes in a second.
const RATE: u64 = 200_000_000;
/// How far the clock moves at a time.
const STEP: Duration = Duration::from_micros(20);
/// Rounds of writes that a writer at full speed has in one step: 13 GB/s.
const ROUNDS: u32 = 64;

/// Options with the default limits, 20 % and 40 %.
fn limited(shards: usize, frames: u64) -> EngineOptions {
    let EngineOptions { dirty_background_percent, dirty_percent, .. } = EngineOptions::default();
    EngineOptions { shards, dirty_background_percent, dirty_percent, ..options(frames * shards as u64) }
}

/// A device that moves no data, but takes its time.
fn device(write_bps: u64) -> EmulatedConfig {
    EmulatedConfig {
        bandwidth: Bandwidth { write_bps, read_bps: 0 },
        ..EmulatedConfig::null(1024 * MIB, 4096)
    }
}

/// A device that begins to write and doesn't get anywhere.
fn stalled() -> EmulatedConfig {
    device(1)
}

fn assert_within_limits(bed: &Bed) {
    for memory in bed.dirty_memory() {
        let dirty = memory.dirty_pages + memory.writeback_pages;
        assert!(dirty <= memory.limit_pages, "{dirty} pages are dirty: {memory:?}");
        // What writers hold has its place below the limit, too; but a page that was dirty before counts twice.
        assert!(dirty + memory.reserved_pages <= memory.limit_pages + 16, "{memory:?}");
    }
}

#[derive(Clone, Copy, Debug)]
enum Pattern {
    Sequential,
    Random,
}

/// One of several writers: it writes page after page and counts.
#[derive(Default)]
struct Writer {
    accepted: Cell<u64>,
    last_ns: Cell<u64>,
    longest_gap_ns: Cell<u64>,
}

impl Writer {
    async fn run(&self, mapping: &Mapping, index: u64, pattern: Pattern, now_ns: &Cell<u64>) {
        let pages = mapping.pages();
        let mut random = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(index + 1);
        let mut next = index * (pages / 8);
        loop {
            let page = match pattern {
                Pattern::Sequential => next % pages,
                Pattern::Random => {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (random >> 20) % pages
                }
            };
            next += 1;
            mapping.write_at_async(page * 4096, &[1; 4096]).await.unwrap();
            self.accepted.set(self.accepted.get() + 1);
            let gap_ns = now_ns.get() - self.last_ns.replace(now_ns.get());
            self.longest_gap_ns.set(self.longest_gap_ns.get().max(gap_ns));
            yield_once().await;
        }
    }
}

async fn yield_once() {
    let mut yielded = false;
    std::future::poll_fn(
        |_| if std::mem::replace(&mut yielded, true) { Poll::Ready(()) } else { Poll::Pending },
    )
    .await;
}

/// Drives writers at full speed for `len` of the device's time, and checks every step that dirty memory is within its
/// limits.
fn drive(
    bed: &mut Bed,
    writers: &mut [Pin<Box<dyn Future<Output = ()> + '_>>],
    now_ns: &Cell<u64>,
    len: Duration,
) {
    let end_ns = now_ns.get() + len.as_nanos() as u64;
    while now_ns.get() < end_ns {
        for _ in 0..ROUNDS {
            for writer in &mut *writers {
                assert!(bed.poll_once(writer.as_mut()).is_pending());
            }
            let progressed = bed.step();
            assert_within_limits(bed);
            if !progressed {
                break;
            }
        }
        bed.pass_time(STEP);
        now_ns.set(now_ns.get() + STEP.as_nanos() as u64);
    }
}

fn a_full_speed_writer_is_slowed_smoothly(shards: usize, frames: u64, writers: u64, pattern: Pattern) {
    let case = format!("{shards} shards of {frames} frames, {writers} writers, {pattern:?}");
    let mut bed = Bed::new(device(RATE), limited(shards, frames));
    let mapping = bed.mapping();
    let now_ns = Cell::new(0);
    let states: Vec<Writer> = (0..writers).map(|_| Writer::default()).collect();
    let mut futures: Vec<Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
    for (index, state) in states.iter().enumerate() {
        futures.push(Box::pin(state.run(&mapping, index as u64, pattern, &now_ns)));
    }
    let accepted = || states.iter().map(|writer| writer.accepted.get()).sum::<u64>();
    drive(&mut bed, &mut futures, &now_ns, Duration::from_millis(500));
    let (accepted_before, stats_before) = (accepted(), bed.engine().stats());
    let (len, len_s) = (Duration::from_millis(1000), 1.0);
    drive(&mut bed, &mut futures, &now_ns, len);
    let stats = bed.engine().stats();
    let share = |pages: u64| pages as f64 * 4096.0 / RATE as f64 / len_s;
    let (taken, written) =
        (share(accepted() - accepted_before), share(stats.pages_written - stats_before.pages_written));
    let longest_ms = states.iter().map(|writer| writer.longest_gap_ns.get()).max().unwrap() / 1_000_000;
    let case = format!("{case}: taken {taken:.3}, written {written:.3}, longest gap {longest_ms} ms");
    assert!((0.95..1.05).contains(&taken), "{case}: writers got {taken:.3} of the device's rate");
    assert!((0.95..1.05).contains(&written), "{case}: the device wrote {written:.3} of its rate");
    assert!(longest_ms <= 250, "{case}: a writer stood still for {longest_ms} ms");
    assert!(stats.throttle_pauses > 0 && stats.throttle_paused_ns > 0, "{case}");
    let measured = stats.write_bandwidth as f64 / RATE as f64;
    assert!((0.9..1.1 * shards as f64).contains(&measured), "{case}: measured {measured:.3} of the rate");
    let fairest = states.iter().map(|writer| writer.accepted.get()).min().unwrap() * writers;
    assert!(fairest * 10 > accepted() * 5, "{case}: somebody got less than half of his share");
    drop(futures);
    bed.run(mapping.sync_async()).unwrap();
    bed.settle();
    bed.assert_consistent();
    let memory = bed.dirty_memory();
    assert!(memory.iter().all(|memory| memory.dirty_pages + memory.writeback_pages == 0));
}

#[test]
fn wb24_a_sequential_writer_is_slowed_smoothly_to_the_rate_of_the_device() {
    for shards in [1, 3] {
        for frames in [256, 8192] {
            for writers in [1, 4] {
                a_full_speed_writer_is_slowed_smoothly(shards, frames, writers, Pattern::Sequential);
            }
        }
    }
}

#[test]
fn wb24_a_random_writer_is_slowed_smoothly_to_the_rate_of_the_device() {
    for shards in [1, 3] {
        for frames in [256, 8192] {
            for writers in [1, 4] {
                a_full_speed_writer_is_slowed_smoothly(shards, frames, writers, Pattern::Random);
            }
        }
    }
}

/// Writes whole pages from `first` on, one a call, until one has to wait; returns how many went through at once.
fn write_until_it_waits(bed: &mut Bed, mapping: &Mapping, first: u64) -> u64 {
    for page in first.. {
        let mut write = pin!(mapping.write_at_async(page * 4096, &[1; 4096]));
        let mut polls = 0;
        while bed.poll_once(write.as_mut()).is_pending() {
            bed.step();
            assert_within_limits(bed);
            polls += 1;
            if polls == 20 {
                return page - first;
            }
        }
    }
    unreachable!("a range without an end")
}

#[test]
fn wb24_below_the_middle_nobody_is_slowed() {
    for shards in [1, 3] {
        let mut bed = Bed::new(stalled(), limited(shards, 1024));
        let mapping = bed.mapping();
        // The clock stands still and the device with it: all that is written stays dirty. Page by page over all shards.
        let freerun = bed.dirty_memory()[0].freerun_pages;
        for page in 0..freerun * shards as u64 {
            let stripe = 2 * MIB / 4096;
            let at = page % shards as u64 * stripe + page / shards as u64;
            bed.run(mapping.write_at_async(at * 4096, &[1; 4096])).unwrap();
        }
        assert_eq!(bed.engine().stats().throttle_pauses, 0);
        assert_within_limits(&bed);
    }
}

#[test]
fn wb24_hits_are_slowed_as_misses_are() {
    for (shards, pages_a_read) in [(1, 500), (3, 500), (1, 1)] {
        let mut bed = Bed::new(stalled(), limited(shards, 1024));
        let mapping = bed.open(&MappingOptions { readahead_bytes_max: 0, ..Default::default() });
        // Pages by themselves are written in a shorter way than those of larger folios.
        let mut cached = vec![0; pages_a_read * 4096];
        for first in (0..500).step_by(pages_a_read) {
            bed.run(mapping.read_at_async(first * 4096, &mut cached)).unwrap();
        }
        let freerun = bed.dirty_memory()[0].freerun_pages;
        assert_eq!(write_until_it_waits(&mut bed, &mapping, 0), freerun + 2);
        assert_eq!(bed.engine().stats().write_hits, freerun + 1, "below the middle without asking the shard");
        // In place, too.
        let mut pin = pin!(mapping.pin_mut_async(freerun + 2));
        for _ in 0..20 {
            assert!(bed.poll_once(pin.as_mut()).is_pending());
            bed.step();
        }
    }
}

#[test]
fn wb24_at_the_hard_limit_writers_wait_until_pages_have_been_written_and_readers_do_not() {
    let mut bed = Bed::new(EmulatedConfig { mdts: 3, ..device(4096 * 10) }, limited(1, 1024));
    let mapping = bed.mapping();
    let memory = bed.dirty_memory()[0];
    let freerun = write_until_it_waits(&mut bed, &mapping, 0);
    // The page that passes the middle goes, and one more, which the next one pays for.
    assert_eq!(freerun, memory.freerun_pages + 2);
    // Pauses are short, whatever the rate; the limit isn't.
    let mut page = 100_000;
    loop {
        let mut write = pin!(mapping.write_at_async(page * 4096, &[1; 4096]));
        let mut waited = Duration::ZERO;
        while bed.poll_once(write.as_mut()).is_pending() && waited < Duration::from_millis(250) {
            bed.step();
            bed.pass_time(Duration::from_millis(1));
            waited += Duration::from_millis(1);
        }
        assert_within_limits(&bed);
        if waited >= Duration::from_millis(250) {
            break;
        }
        page += 1;
    }
    let memory = bed.dirty_memory()[0];
    assert!(memory.dirty_pages + memory.writeback_pages + 16 >= memory.limit_pages, "{memory:?}");
    let mut buffer = [0; 4096];
    let mut read = pin!(mapping.read_at_async(900 * MIB, &mut buffer));
    let mut polls = 0;
    while bed.poll_once(read.as_mut()).is_pending() {
        bed.step();
        polls += 1;
        assert!(polls < 20, "a reader waits for writers");
    }
    // 10 pages a second, eight a command: the wait is long, and it ends.
    bed.run(mapping.write_at_async(page * 4096, &[1; 4096])).unwrap();
    assert_within_limits(&bed);
}

#[test]
fn wb24_one_large_write_stays_below_the_limit_all_the_way() {
    for (shards, frames) in [(1, 32), (1, 256), (3, 64), (3, 1024)] {
        let mut bed = Bed::new(device(RATE), limited(shards, frames));
        let mapping = bed.mapping();
        let data = vec![1; 16 * MIB as usize];
        let mut write = pin!(mapping.write_at_async(100, &data));
        let mut steps = 0u64;
        loop {
            match bed.poll_once(write.as_mut()) {
                Poll::Ready(result) => break result.unwrap(),
                Poll::Pending => bed.step(),
            };
            assert_within_limits(&bed);
            bed.pass_time(Duration::from_micros(10));
            steps += 1;
            assert!(steps < 1_000_000, "the write doesn't end");
        }
        bed.assert_consistent();
    }
}

#[test]
fn wb24_limits_of_the_smallest_caches_let_every_request_through() {
    for (background, limit) in [(0, 1), (0, 100), (1, 2), (20, 40), (89, 90), (90, 100)] {
        for frames in [32, 33, 40, 300] {
            let mut options = limited(1, frames);
            (options.dirty_background_percent, options.dirty_percent) = (background, limit);
            let mut bed = Bed::new(device(RATE), options);
            let mapping = bed.mapping();
            for at in 0..8 {
                let data = vec![1; 200 * 4096];
                bed.run(mapping.write_at_async(at * 900_000 + 77, &data)).unwrap();
                assert_within_limits(&bed);
            }
            bed.run(mapping.discard_async(5000..1_000_000)).unwrap();
            bed.run(mapping.sync_async()).unwrap();
            bed.assert_consistent();
            // 5 MB at 200 MB/s; nobody waited for the flusher's interval.
            let waited = Duration::from_nanos(bed.engine().stats().throttle_paused_ns);
            assert!(
                waited < Duration::from_secs(1),
                "{background} %, {limit} %, {frames} frames: {waited:?}"
            );
        }
    }
}

#[test]
fn wb24_pages_and_folios_of_any_size_stay_below_the_limit() {
    for (shards, frames) in [(1, 64), (1, 300), (3, 128), (2, 2048)] {
        for page_bytes in [4096, 16_384, 65_536] {
            let mut bed = Bed::new(device(RATE), limited(shards, frames));
            let mapping = bed.open(&MappingOptions { page_bytes, ..Default::default() });
            let data = vec![7; 4 * MIB as usize];
            let mut buffer = vec![0; 200 * 1024];
            for round in 0..60u64 {
                let at = round * 77_777 % (8 * MIB);
                let len = [100, 4096, 70_000, 1 << 20, 4 << 20][round as usize % 5];
                // Appended, overwritten in the cache in bulk, and in part; the device takes its time.
                let mut write =
                    Box::pin(mapping.write_at_async(at / 4096 * 4096 + round % 2 * 50, &data[..len]));
                let mut steps = 0;
                while bed.poll_once(write.as_mut()).is_pending() {
                    bed.step();
                    assert_within_limits(&bed);
                    bed.pass_time(Duration::from_micros(10));
                    steps += 1;
                    assert!(steps < 1_000_000, "the write doesn't end");
                }
                drop(write);
                assert_within_limits(&bed);
                bed.run(mapping.read_at_async(at, &mut buffer)).unwrap();
                let mut pin = bed.run(mapping.pin_mut_async(round)).unwrap();
                pin[0] = 1;
                drop(pin);
                assert_within_limits(&bed);
            }
            bed.run(mapping.sync_async()).unwrap();
            bed.assert_consistent();
            assert!(bed.dirty_memory().iter().all(|memory| memory.reserved_pages == 0));
            // All of it is cached and clean: overwritten at once, it doesn't pass the limit.
            bed.run(mapping.read_at_async(0, &mut buffer)).unwrap();
            let mut write = pin!(mapping.write_at_async(0, &data[..buffer.len()]));
            while bed.poll_once(write.as_mut()).is_pending() {
                assert_within_limits(&bed);
                bed.step();
                bed.pass_time(Duration::from_micros(10));
            }
            assert_within_limits(&bed);
        }
    }
}

/// Fills dirty memory of a device that stands still, from page `first` on, so that every further page has to wait;
/// returns the next page.
fn fill_to_the_limit(bed: &mut Bed, mapping: &Mapping, first: u64) -> u64 {
    let mut page = first;
    loop {
        page += write_until_it_waits(bed, mapping, page);
        bed.pass_time(Duration::from_millis(201));
        if write_until_it_waits(bed, mapping, page) == 0 {
            return page;
        }
    }
}

#[test]
fn wb24_a_failing_device_ends_the_wait_with_an_error_that_says_why() {
    for shards in [1, 3] {
        let pin_wait = Duration::from_millis(500);
        let mut bed = Bed::new(device(RATE), EngineOptions { pin_wait, ..limited(shards, 256) });
        let mapping = bed.mapping();
        bed.fail(NvmOpcode::WRITE, 0, u64::MAX, Status::of(StatusCode::WRITE_FAULT));
        let mut page = 0;
        let error = loop {
            match bed.run(mapping.write_at_async(page * 4096, &[1; 4096])) {
                Ok(()) => page += 1,
                Err(error) => break error,
            }
            assert_within_limits(&bed);
            assert!(page < 1000, "more pages are dirty than there are frames");
        };
        // Poisoned pages don't slow writers, who can do nothing about them: it ends where frames end.
        assert!(bed.engine().stats().poisoned_pages > 0);
        let Error::CacheFull { waited, cause, .. } = &error else { panic!("{error}") };
        assert!(*waited >= pin_wait && *waited < 2 * pin_wait, "{waited:?}");
        assert!(matches!(cause.as_deref(), Some(Error::Device { .. })), "{error}");
        assert!(error.to_string().contains("cannot be written, since the device failed a write"), "{error}");
        // The device is well again: so is the writer.
        bed.device.clear_faults();
        bed.run(mapping.sync_async()).unwrap_err();
        bed.run(mapping.sync_async()).unwrap();
        bed.run(mapping.write_at_async(page * 4096, &[1; 4096])).unwrap();
        bed.assert_consistent();
    }
}

#[test]
fn wb24_a_device_that_stands_still_ends_the_wait_with_an_error() {
    let mut bed = Bed::new(stalled(), limited(1, 256));
    let mapping = bed.mapping();
    let page = fill_to_the_limit(&mut bed, &mapping, 0);
    let error = bed.run(mapping.write_at_async(page * 4096, &[1; 4096])).unwrap_err();
    assert!(matches!(error, Error::DirtyLimit { cause: None, .. }), "{error}");
    assert!(error.to_string().contains("dirty_percent"), "{error}");
    assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::TimedOut);
}

#[test]
fn wb24_an_asynchronous_caller_gets_try_again_instead_of_a_wait() {
    let mut bed = Bed::new(EmulatedConfig { mdts: 1, ..device(RATE) }, limited(1, 256));
    bed.fault(NvmOpcode::WRITE, 0, u64::MAX, Action::Delay(Duration::from_secs(10)));
    let mapping = bed.mapping();
    let freerun = bed.dirty_memory()[0].freerun_pages;
    // More than fits: it stops within a request of the middle, and says where.
    let data = vec![1; 1000 * 4096];
    let written = bed.run(mapping.try_write_at_async(0, &data)).unwrap() as u64;
    assert!((freerun * 4096 - 32 * 4096..freerun * 4096 + 32 * 4096).contains(&written), "{written}");
    assert_eq!(bed.engine().stats().throttle_pauses, 0, "it never waited");
    fill_to_the_limit(&mut bed, &mapping, 600);
    let error = bed.run(mapping.try_write_at_async(500 * 4096, &[1; 4096])).unwrap_err();
    let Error::Throttled { dirty_pages, limit_pages } = error else { panic!("{error}") };
    assert!(dirty_pages <= limit_pages && dirty_pages > freerun);
    let error = bed.run(mapping.try_pin_mut_async(500)).unwrap_err();
    assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::WouldBlock);
    // Dirty already: no news.
    let dirty = bed.dirty_memory()[0];
    assert!(dirty.dirty_pages > 0);
    let dirty_page = (0..freerun).rev().find(|&page| {
        let mut write = pin!(mapping.try_write_at_async(page * 4096 + 5, b"again"));
        matches!(bed.poll_once(write.as_mut()), Poll::Ready(Ok(5)))
    });
    assert!(dirty_page.is_some(), "a page that is dirty may be changed at the limit");
    assert_eq!(bed.dirty_memory()[0], dirty);
    // When the device has written some, the next try goes through.
    bed.device.clear_faults();
    bed.pass_time(Duration::from_secs(10));
    for _ in 0..1000 {
        bed.advance(Duration::from_micros(100));
    }
    let mut pin = bed.run(mapping.try_pin_mut_async(500)).unwrap();
    pin[0] = 1;
    drop(pin);
    assert_eq!(bed.run(mapping.try_write_at_async(501 * 4096, &[1; 8192])).unwrap(), 8192);
}

#[test]
fn wb24_writers_that_give_up_take_nothing_with_them() {
    for shards in [1, 3] {
        let mut bed = Bed::new(stalled(), limited(shards, 64));
        let mapping = bed.mapping();
        // Dropped in every state: unsent, sent, paused, at the limit, granted.
        for polls in 0..40u64 {
            for page in 0..8 {
                let data = vec![1; (1 + page as usize % 3) * 4096 + 100];
                let mut write = Box::pin(mapping.write_at_async((polls * 13 + page) * 9000, &data));
                let mut pin = Box::pin(mapping.pin_mut_async(10_000 + polls * 8 + page));
                for _ in 0..polls % 7 {
                    if bed.poll_once(write.as_mut()).is_ready() || bed.poll_once(pin.as_mut()).is_ready() {
                        break;
                    }
                    if polls % 2 == 0 {
                        bed.step();
                    }
                }
                bed.pass_time(Duration::from_millis(polls));
            }
            assert_within_limits(&bed);
        }
        bed.settle();
        for memory in bed.dirty_memory() {
            assert_eq!(memory.reserved_pages, 0, "nobody holds a page: {memory:?}");
        }
        bed.assert_consistent();
    }
}

#[test]
fn wb24_a_pin_that_changes_nothing_gives_its_page_back() {
    let mut bed = Bed::new(stalled(), limited(1, 64));
    let mapping = bed.mapping();
    let memory = bed.dirty_memory()[0];
    for page in 0..1000 {
        drop(bed.run(mapping.pin_mut_async(page)).unwrap());
    }
    // A request that nobody waits for any more, granted or not.
    for page in 1000..1100 {
        let mut pin = Box::pin(mapping.pin_mut_async(page));
        assert!(bed.poll_once(pin.as_mut()).is_pending());
        for _ in 0..page % 4 {
            bed.step();
        }
        drop(pin);
        bed.settle();
    }
    // One that was granted a page to fill.
    for page in 1200..1300 {
        let mut write = Box::pin(mapping.write_at_async(page * 4096, &[1; 4096]));
        assert!(bed.poll_once(write.as_mut()).is_pending());
        for _ in 0..page % 4 {
            bed.step();
        }
        drop(write);
        bed.settle();
    }
    // Pages that are thrown away before they are written.
    bed.run(mapping.write_at_async(1400 * 4096, &[1; 5 * 4096])).unwrap();
    bed.run(mapping.discard_async(1400 * 4096..1410 * 4096)).unwrap();
    bed.assert_consistent();
    assert_eq!(bed.dirty_memory()[0], memory);
    assert_eq!(bed.engine().stats().throttle_pauses, 0);
    assert_eq!(write_until_it_waits(&mut bed, &mapping, 2000), memory.freerun_pages + 2, "nothing is taken");
}

#[test]
fn wb24_pages_held_exclusively_count_before_they_are_dirty() {
    let mut bed = Bed::new(stalled(), limited(1, 256));
    let mapping = bed.mapping();
    let limit = bed.dirty_memory()[0].limit_pages;
    let mut pins = Vec::new();
    // Pauses end, the limit doesn't: the shard grants no more pages than may become dirty.
    for page in 0..limit + 1 {
        let mut pin = pin!(mapping.pin_mut_async(page));
        let mut waited = 0;
        while waited < 300 {
            match bed.poll_once(pin.as_mut()) {
                Poll::Ready(pin) => {
                    pins.push(pin.unwrap());
                    break;
                }
                Poll::Pending => bed.step(),
            };
            bed.pass_time(Duration::from_millis(1));
            waited += 1;
        }
    }
    assert!((limit - 16..=limit).contains(&(pins.len() as u64)), "{} of {limit}", pins.len());
    pins.iter_mut().for_each(|pin| pin[0] = 1);
    drop(pins);
    assert_within_limits(&bed);
    bed.assert_consistent();
}

#[test]
fn wb19_background_passes_leave_a_congested_device_alone_and_a_sync_does_not() {
    // 5 % of 65,536 frames is above what is congestion before anything is measured: 20 ms of 100 MiB/s.
    let mut bed = Bed::new(
        EmulatedConfig { mdts: 6, ..device(RATE) },
        EngineOptions { dirty_background_percent: 5, queue_entries: 256, ..limited(1, 65_536) },
    );
    let mapping = bed.mapping();
    let data = vec![1; 8 * MIB as usize];
    for at in 0..8 {
        bed.run(mapping.write_at_async(at * 8 * MIB, &data)).unwrap();
    }
    bed.settle();
    let mut stats = bed.engine().stats();
    assert!(stats.congestion_skips > 0 && stats.dirty_pages > 10_000, "{stats:?}");
    let in_flight = stats.writeback_pages;
    assert!((384..512 + 256).contains(&in_flight), "a pass ends within its step: {in_flight}");
    bed.settle();
    let later = bed.engine().stats();
    let steps = later.polls - stats.polls;
    assert!(steps > 0);
    stats.polls += steps;
    assert_eq!(later, stats, "nothing is written, and a time of congestion is counted once");
    // Time passes: what is in flight stays between the thresholds, as they follow the measured rate.
    let mut least = u64::MAX;
    for _ in 0..1000 {
        bed.advance(Duration::from_micros(100));
        let stats = bed.engine().stats();
        if stats.dirty_pages > 10_000 {
            least = least.min(stats.writeback_pages);
            // 20 ms of 200 MB/s are 976 pages.
            assert!(stats.writeback_pages < 976 + 256 + 20, "{}", stats.writeback_pages);
        }
    }
    assert!(least > 300, "the device had only {least} pages in front of it");
    assert!(bed.engine().stats().congestion_skips > 3);
    // A sync never skips: all at once, as far as the queue holds it.
    for at in 0..8 {
        bed.run(mapping.write_at_async(at * 8 * MIB, &data)).unwrap();
    }
    let mut sync = pin!(mapping.sync_async());
    assert!(bed.poll_once(sync.as_mut()).is_pending());
    bed.settle();
    let stats = bed.engine().stats();
    assert!(stats.writeback_pages > 5_000, "{} of {}", stats.writeback_pages, stats.dirty_pages);
    bed.run(sync).unwrap();
}

#[test]
fn wb19_a_read_beside_the_flusher_waits_no_longer_than_the_target() {
    let config = EmulatedConfig {
        bandwidth: Bandwidth { write_bps: RATE, read_bps: 8 * RATE },
        ..EmulatedConfig::null(1024 * MIB, 4096)
    };
    let mut bed = Bed::new(config, limited(1, 65_536));
    let mapping = bed.mapping();
    let now_ns = Cell::new(0);
    let writer = Writer::default();
    let mut futures: Vec<Pin<Box<dyn Future<Output = ()>>>> =
        vec![Box::pin(writer.run(&mapping, 0, Pattern::Sequential, &now_ns))];
    drive(&mut bed, &mut futures, &now_ns, Duration::from_millis(600));
    let mut longest = Duration::ZERO;
    for read in 0..20u64 {
        let mut buffer = [0; 4096];
        let mut read = pin!(mapping.read_at_async(900 * MIB + read * 4 * MIB, &mut buffer));
        let mut waited = Duration::ZERO;
        while bed.poll_once(read.as_mut()).is_pending() {
            drive(&mut bed, &mut futures, &now_ns, STEP);
            waited += STEP;
        }
        longest = longest.max(waited);
        drive(&mut bed, &mut futures, &now_ns, Duration::from_millis(3));
    }
    // 20 ms, and one step's worth of pages on top.
    assert!(longest < Duration::from_millis(27), "a read waited for {longest:?}");
}

#[test]
fn wb24_threads_that_block_are_slowed_and_go_on() {
    use foliant::{Engine, ShardThreads};
    for shards in [1, 2] {
        let options = EngineOptions { threads: ShardThreads::Floating, ..limited(shards, 256) };
        let engine = Engine::open("emu:ram?size=64MiB&write_bps=10MB/s", &options).unwrap();
        let mapping = engine.mapping(&MappingOptions::default()).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let mapping = &mapping;
                scope.spawn(move || {
                    for page in 0..300 {
                        let page = thread * 4000 + page;
                        mapping.write_at(page * 4096, &page.to_le_bytes().repeat(512)).unwrap();
                    }
                });
            }
        });
        let stats = engine.stats();
        assert!(stats.throttle_pauses > 0 && stats.throttle_paused_ns > 0, "{stats:?}");
        for page in (0..4u64).flat_map(|thread| (0..300).map(move |page| thread * 4000 + page)) {
            let mut buffer = [0; 8];
            mapping.read_at(page * 4096 + 4088, &mut buffer).unwrap();
            assert_eq!(u64::from_le_bytes(buffer), page);
        }
        drop(mapping);
        engine.close().unwrap();
    }
}
