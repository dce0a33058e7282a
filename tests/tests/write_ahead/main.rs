//! The write-ahead gate and checkpoints: WB-40 and WB-45.

mod checkpoints;
mod memory;
mod power_cuts;

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use foliant::{
    Engine, EngineOptions, Error, Gate, Lsn, LsnOf, Mapping, MappingOptions, PassEnd, PassStep,
    WritebackControl,
};
use foliant_nvme_emulated::{Action, EmulatedConfig};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use foliant_tests::{Bed, fragile};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// The log lies before the data; both over several stripes, so that all shards take part.
const LOG_BYTES: u64 = 8 * MIB;
const SIZE: u64 = 64 * MIB;

/// The bound on pages behind gates keeps out of the way unless a test wants it.
fn options(frames: u64) -> EngineOptions {
    EngineOptions { gated_percent: 75, ..foliant_tests::options(frames) }
}

/// A write fault that no retry mends.
fn fatal() -> Status {
    Status::of(StatusCode::WRITE_FAULT).with_dnr(true)
}

/// A log and the data behind its gate.
struct Wal {
    bed: Bed,
    gate: Gate,
    log: Mapping,
    data: Mapping,
}

fn log_options(gate: &Gate) -> MappingOptions {
    MappingOptions { len_bytes: Some(LOG_BYTES), log_of: Some(gate.clone()), ..Default::default() }
}

fn data_options(gate: &Gate) -> MappingOptions {
    MappingOptions { start_bytes: LOG_BYTES, gate: Some(gate.clone()), ..Default::default() }
}

impl Wal {
    fn new(config: EmulatedConfig, options: EngineOptions) -> Self {
        let mut bed = Bed::new(config, options);
        let gate = bed.engine().gate("wal");
        let log = bed.open(&log_options(&gate));
        let data = bed.open(&data_options(&gate));
        bed.clear_seen();
        Self { bed, gate, log, data }
    }

    /// With one shard and with three, of `frames` frames each.
    fn each(options: EngineOptions) -> impl Iterator<Item = Self> {
        [1, 3].into_iter().map(move |shards| {
            let cache_bytes = options.cache_bytes * shards as u64;
            Self::new(
                EmulatedConfig::ram(SIZE, 512),
                EngineOptions { shards, cache_bytes, ..options.clone() },
            )
        })
    }

    fn write(&mut self, page: u64, lsn: u64) {
        self.bed.run(self.data.write_at_lsn_async(page * PAGE, &[lsn as u8; 100], Lsn(lsn))).unwrap();
    }

    /// Pages of the data that were written to the device since [`Bed::clear_seen`], ascending.
    fn written(&self) -> Vec<u64> {
        let writes = self.bed.seen(NvmOpcode::WRITE);
        let runs = writes.iter().filter_map(|write| {
            let first = (write.slba * 512).checked_sub(LOG_BYTES)? / PAGE;
            Some(first..first + u64::from(write.blocks) / 8)
        });
        let mut pages: Vec<u64> = runs.flatten().collect();
        pages.sort_unstable();
        pages
    }

    fn byte_on_device(&self, page: u64) -> u8 {
        let mut byte = [0];
        self.bed.device.read_image(1, LOG_BYTES + page * PAGE, &mut byte).unwrap();
        byte[0]
    }

    fn dirty(&self) -> u64 {
        self.bed.engine().stats().dirty_pages
    }
}

/// A page in each of ten stripes.
fn spread(i: u64) -> u64 {
    i * 700
}

type BoxedResult<'a, T = ()> = Pin<Box<dyn Future<Output = foliant::Result<T>> + 'a>>;

#[test]
fn wb40_a_background_pass_leaves_out_pages_whose_log_is_not_durable() {
    for mut wal in Wal::each(options(64)) {
        for i in 0..10 {
            wal.write(spread(i), i + 1);
        }
        wal.bed.run(wal.data.write_at_async(spread(3) + 1, b"no number")).unwrap();
        wal.bed.run(wal.data.write_at_async(20 * PAGE, b"no number")).unwrap();
        wal.bed.run(wal.log.write_at_async(0, b"the log itself")).unwrap();
        wal.gate.advance_durable_lsn(Lsn(5)).unwrap();
        wal.bed.advance(Duration::from_secs(6));
        let mut wanted: Vec<u64> = (0..5).map(spread).collect();
        wanted.push(20);
        wanted.sort_unstable();
        assert_eq!(wal.written(), wanted, "what the log covers, and what has no number");
        assert_eq!(wal.gate.wanted_lsn(), Some(Lsn(10)));
        assert!(wal.bed.engine().stats().pages_gated >= 5);
        assert_eq!(wal.dirty(), 5, "the log is not behind its own gate");
        wal.bed.clear_seen();
        wal.gate.advance_durable_lsn(Lsn(10)).unwrap();
        assert_eq!(wal.gate.wanted_lsn(), None);
        wal.bed.advance(Duration::from_secs(6));
        assert_eq!(wal.written(), (5..10).map(spread).collect::<Vec<_>>());
        wal.bed.assert_consistent();
    }
}

#[test]
fn wb40_a_sync_waits_for_the_number_fixed_at_its_start_and_for_no_later_one() {
    for mut wal in Wal::each(options(64)) {
        for i in 0..10 {
            wal.write(spread(i), i + 1);
        }
        let handle = wal.data.clone();
        let mut sync: BoxedResult<'_> = Box::pin(handle.sync_async());
        assert!(wal.bed.poll_once(sync.as_mut()).is_pending());
        wal.bed.settle();
        assert_eq!(wal.gate.wanted_lsn(), Some(Lsn(10)));
        assert_eq!(wal.written(), [], "never early");
        // Others go on dirtying pages of its range, behind later numbers.
        for i in 0..10 {
            wal.write(spread(i) + 3, 100 + i);
        }
        wal.gate.advance_durable_lsn(Lsn(9)).unwrap();
        wal.bed.settle();
        assert!(wal.bed.poll_once(sync.as_mut()).is_pending(), "9 isn't 10");
        assert!(wal.written().iter().all(|&page| page != spread(9)), "never early");
        assert_eq!(wal.gate.wanted_lsn(), Some(Lsn(10)), "the number doesn't move");
        wal.gate.advance_durable_lsn(Lsn(10)).unwrap();
        wal.bed.run(sync).unwrap();
        assert_eq!(wal.written(), (0..10).map(spread).collect::<Vec<_>>());
        assert_eq!((wal.gate.wanted_lsn(), wal.dirty()), (None, 10));
        wal.bed.assert_consistent();
    }
}

#[test]
fn wb40_the_number_is_that_of_the_start_though_the_sync_comes_to_the_page_later() {
    for mut wal in Wal::each(EngineOptions { queue_entries: 8, ..options(128) }) {
        wal.gate.advance_durable_lsn(Lsn(9)).unwrap();
        // More commands than the queue holds lie before the pages that wait.
        for page in 0..50 {
            wal.write(page * 2, 1);
        }
        wal.write(300, 10);
        wal.write(302, 11);
        wal.bed.fault(NvmOpcode::WRITE, 0, 50, Action::Delay(Duration::from_millis(1)));
        let handle = wal.data.clone();
        let mut sync: BoxedResult<'_> = Box::pin(handle.sync_async());
        assert!(wal.bed.poll_once(sync.as_mut()).is_pending());
        wal.bed.settle();
        assert!(wal.written().len() < 50);
        wal.write(302, 50);
        wal.bed.clear_seen();
        while wal.gate.wanted_lsn().is_none() {
            wal.bed.advance(Duration::from_millis(1));
        }
        assert_eq!(wal.gate.wanted_lsn(), Some(Lsn(10)), "50 is of later");
        wal.gate.advance_durable_lsn(Lsn(10)).unwrap();
        wal.bed.settle();
        assert_eq!(wal.byte_on_device(300), 10);
        assert_eq!(wal.gate.wanted_lsn(), Some(Lsn(50)));
        wal.gate.advance_durable_lsn(Lsn(50)).unwrap();
        wal.bed.run(sync).unwrap();
        assert_eq!((wal.byte_on_device(302), wal.dirty()), (50, 0));
    }
}

#[test]
fn wb40_pages_of_one_folio_wait_each_for_its_own_number_and_large_pages_as_a_whole() {
    for mut wal in Wal::each(options(256)) {
        // Written in one go, 32 pages of 4 KiB are one folio.
        wal.bed.run(wal.data.write_at_lsn_async(0, &[1; 32 * 4096], Lsn(5))).unwrap();
        wal.write(7, 20);
        wal.gate.advance_durable_lsn(Lsn(5)).unwrap();
        wal.bed.advance(Duration::from_secs(6));
        assert_eq!(wal.written(), (0..32).filter(|&page| page != 7).collect::<Vec<_>>());
        wal.bed.run(wal.data.discard_async(0..PAGE)).unwrap();
        wal.gate.advance_durable_lsn(Lsn(20)).unwrap();
        wal.bed.run(wal.data.clone().close_async()).unwrap();
        let large = MappingOptions { page_bytes: 16_384, ..data_options(&wal.gate) };
        let data = wal.bed.open(&large);
        wal.bed.clear_seen();
        wal.bed.run(data.write_at_lsn_async(3 * 16_384 + 5000, &[2; 100], Lsn(30))).unwrap();
        wal.bed.run(data.write_at_lsn_async(9 * 16_384, &[2; 16_384], Lsn(31))).unwrap();
        let error = wal.bed.run(data.write_at_lsn_async(3 * 16_384 + 9000, &[2; 100], Lsn(29))).unwrap_err();
        assert!(matches!(error, Error::LsnBackwards { of: LsnOf::Page(3), .. }), "{error}");
        // A change without a number leaves the page behind the gate.
        wal.bed.run(data.write_at_async(3 * 16_384 + 16_000, &[2; 100])).unwrap();
        wal.bed.advance(Duration::from_secs(6));
        assert_eq!(wal.written(), []);
        assert_eq!(wal.bed.run(data.oldest_dirty_lsn_async()).unwrap(), Some(Lsn(30)));
        wal.gate.advance_durable_lsn(Lsn(31)).unwrap();
        wal.bed.run(data.flush_until_async(Lsn(31))).unwrap();
        assert_eq!(wal.written(), [12, 13, 14, 15], "the whole page, and not the younger one");
        let mut pin = wal.bed.run(data.pin_mut_async(9)).unwrap();
        pin.set_lsn(Lsn(40)).unwrap();
        drop(pin);
        assert_eq!(wal.bed.run(data.oldest_dirty_lsn_async()).unwrap(), Some(Lsn(31)));
        wal.bed.assert_consistent();
    }
}

#[test]
fn wb40_a_sync_over_pages_whose_log_is_durable_waits_for_nothing() {
    for mut wal in Wal::each(options(64)) {
        wal.gate.advance_durable_lsn(Lsn(3)).unwrap();
        for page in 0..3 {
            wal.write(page, page + 1);
        }
        wal.write(5000, 9);
        let range = 0..3 * PAGE;
        wal.bed.run(wal.data.sync_range_async(range)).unwrap();
        assert_eq!(wal.written(), [0, 1, 2]);
        assert_eq!((wal.gate.wanted_lsn(), wal.bed.engine().stats().gate_waits), (None, 0));
    }
}

#[test]
fn wb40_a_page_that_is_stamped_again_while_its_sync_waits_is_kept_from_writers_until_it_is_written() {
    for mut wal in Wal::each(options(64)) {
        wal.write(0, 10);
        wal.write(1, 11);
        let handle = wal.data.clone();
        let mut sync: BoxedResult<'_> = Box::pin(handle.sync_async());
        assert!(wal.bed.poll_once(sync.as_mut()).is_pending());
        wal.bed.settle();
        wal.write(0, 20);
        wal.gate.advance_durable_lsn(Lsn(11)).unwrap();
        wal.bed.settle();
        assert!(wal.bed.poll_once(sync.as_mut()).is_pending());
        assert_eq!(wal.gate.wanted_lsn(), Some(Lsn(20)), "the page's number of now");
        // Without this a page that is stamped with every commit would never be written.
        let other = wal.data.clone();
        let mut writer: BoxedResult<'_> = Box::pin(other.write_at_lsn_async(0, &[30; 100], Lsn(30)));
        assert!(wal.bed.poll_once(writer.as_mut()).is_pending());
        let mut byte = [0];
        wal.bed.run(wal.data.read_at_async(0, &mut byte)).unwrap();
        assert_eq!(byte, [20], "readers don't wait");
        wal.gate.advance_durable_lsn(Lsn(20)).unwrap();
        wal.bed.run(sync).unwrap();
        assert_eq!((wal.byte_on_device(0), wal.byte_on_device(1)), (20, 11));
        wal.bed.run(writer).unwrap();
        assert_eq!(wal.dirty(), 1);
        wal.bed.assert_consistent();
    }
}

#[test]
fn wb40_a_sync_ends_by_deadline_with_the_number_that_it_waits_for() {
    for mut wal in Wal::each(EngineOptions { gate_wait: Duration::from_secs(2), ..options(64) }) {
        wal.gate.advance_durable_lsn(Lsn(3)).unwrap();
        wal.write(0, 10);
        let error = wal.bed.run(wal.data.sync_async()).unwrap_err();
        let Error::Gated { gate, waits_for, durable, waited } = &error else { panic!("{error}") };
        assert_eq!(
            (&**gate, *waits_for, *durable, *waited),
            ("wal", Lsn(10), Lsn(3), Duration::from_secs(2))
        );
        assert!(error.to_string().contains("advance_durable_lsn"), "{error}");
        assert_eq!((wal.written(), wal.dirty()), (vec![], 1), "still dirty, and not early");
        // Also where the sync keeps a page from writers: they get it then.
        let handle = wal.data.clone();
        let mut sync: BoxedResult<'_> = Box::pin(handle.sync_async());
        assert!(wal.bed.poll_once(sync.as_mut()).is_pending());
        wal.bed.settle();
        wal.write(0, 20);
        wal.gate.advance_durable_lsn(Lsn(10)).unwrap();
        wal.bed.settle();
        let other = wal.data.clone();
        let mut writer: BoxedResult<'_> = Box::pin(other.write_at_lsn_async(0, &[30; 100], Lsn(30)));
        assert!(wal.bed.poll_once(writer.as_mut()).is_pending());
        assert!(matches!(wal.bed.run(sync), Err(Error::Gated { waits_for: Lsn(20), .. })));
        wal.bed.run(writer).unwrap();
        assert_eq!(wal.bed.engine().stats().gate_timeouts, 2);
        wal.gate.advance_durable_lsn(Lsn(30)).unwrap();
        wal.bed.run(wal.data.sync_async()).unwrap();
        assert_eq!((wal.byte_on_device(0), wal.dirty()), (30, 0));
        wal.bed.assert_consistent();
    }
}

#[test]
fn wb40_a_writer_that_a_waiting_sync_keeps_from_a_page_is_told_of_the_gate() {
    for mut wal in Wal::each(EngineOptions { pin_wait: Duration::from_secs(1), ..options(64) }) {
        wal.write(0, 10);
        let handle = wal.data.clone();
        let mut sync: BoxedResult<'_> = Box::pin(handle.sync_async());
        assert!(wal.bed.poll_once(sync.as_mut()).is_pending());
        wal.bed.settle();
        wal.write(0, 20);
        wal.gate.advance_durable_lsn(Lsn(10)).unwrap();
        wal.bed.settle();
        let error = wal.bed.run(wal.data.write_at_lsn_async(0, &[30; 100], Lsn(30))).unwrap_err();
        assert!(matches!(error, Error::Gated { waits_for: Lsn(20), .. }), "{error}");
        wal.gate.advance_durable_lsn(Lsn(20)).unwrap();
        wal.bed.run(sync).unwrap();
        assert_eq!(wal.byte_on_device(0), 20);
        wal.bed.assert_consistent();
    }
}

#[test]
fn wb40_the_owner_hears_what_is_waited_for_by_its_own_task() {
    for mut wal in Wal::each(options(64)) {
        let mut wanted = pin!(wal.gate.next_wanted_async());
        assert!(wal.bed.poll_once(wanted.as_mut()).is_pending());
        wal.write(spread(2), 10);
        wal.write(spread(3), 12);
        let handle = wal.data.clone();
        let mut sync: BoxedResult<'_> = Box::pin(handle.sync_async());
        assert!(wal.bed.poll_once(sync.as_mut()).is_pending());
        wal.bed.settle();
        let Poll::Ready(Ok(lsn)) = wal.bed.poll_once(wanted.as_mut()) else { panic!("it is told") };
        assert_eq!(lsn, Lsn(12));
        wal.gate.advance_durable_lsn(lsn).unwrap();
        wal.bed.run(sync).unwrap();
        let mut next = pin!(wal.gate.next_wanted_async());
        assert!(wal.bed.poll_once(next.as_mut()).is_pending());
        wal.bed.drop_shards();
        drop(wal.bed.engine.take());
        assert!(matches!(wal.bed.poll_once(next.as_mut()), Poll::Ready(Err(Error::Closed))));
    }
}

#[test]
fn wb40_numbers_only_rise() {
    for mut wal in Wal::each(options(64)) {
        wal.write(7, 10);
        wal.write(7, 10);
        let error = wal.bed.run(wal.data.write_at_lsn_async(7 * PAGE, &[99; 100], Lsn(9))).unwrap_err();
        assert!(
            matches!(error, Error::LsnBackwards { of: LsnOf::Page(7), lsn: Lsn(9), last: Lsn(10) }),
            "{error}"
        );
        let mut byte = [0];
        wal.bed.run(wal.data.read_at_async(7 * PAGE, &mut byte)).unwrap();
        assert_eq!(byte, [10], "nothing was written");
        let mut pin = wal.bed.run(wal.data.pin_mut_async(7)).unwrap();
        assert!(matches!(pin.set_lsn(Lsn(1)), Err(Error::LsnBackwards { .. })));
        pin.set_lsn(Lsn(11)).unwrap();
        drop(pin);
        wal.gate.advance_durable_lsn(Lsn(11)).unwrap();
        let error = wal.gate.advance_durable_lsn(Lsn(10)).unwrap_err();
        assert!(error.to_string().contains("gate \"wal\" goes backwards"), "{error}");
        assert_eq!(wal.gate.durable_lsn(), Lsn(11));
        // Written and still cached, the page keeps its number.
        wal.bed.run(wal.data.sync_async()).unwrap();
        let error = wal.bed.run(wal.data.write_at_lsn_async(7 * PAGE, &[99; 100], Lsn(9))).unwrap_err();
        assert!(matches!(error, Error::LsnBackwards { .. }), "{error}");
    }
}

#[test]
fn wb40_gates_that_would_wait_for_each_other_are_refused_when_they_are_attached() {
    let mut bed = Bed::new(EmulatedConfig::ram(SIZE, 512), options(64));
    let [a, b, c] = ["a", "b", "c"].map(|name| bed.engine().gate(name));
    let mib = |at: u64, gate: Option<&Gate>, log_of: Option<&Gate>| MappingOptions {
        start_bytes: at * MIB,
        len_bytes: Some(MIB),
        gate: gate.cloned(),
        log_of: log_of.cloned(),
        ..Default::default()
    };
    let ab = bed.open(&mib(0, Some(&b), Some(&a)));
    let _bc = bed.open(&mib(1, Some(&c), Some(&b)));
    let engine = bed.engine.take().unwrap();
    let mut open = |options: MappingOptions| bed.run(engine.mapping_async(&options));
    let error = open(mib(2, Some(&a), Some(&c))).unwrap_err();
    assert!(
        matches!(error, Error::GateCycle { .. }) && error.to_string().contains("c → a → b → c"),
        "{error}"
    );
    assert!(matches!(open(mib(2, Some(&a), Some(&a))), Err(Error::GateCycle { .. })));
    // The refused ones have left nothing behind, and what isn't both closes no circle.
    drop(open(mib(2, Some(&a), None)).unwrap());
    // Once the first is closed the way round is open.
    drop(open(mib(3, None, Some(&a))).unwrap());
    assert!(matches!(open(mib(4, Some(&a), Some(&c))), Err(Error::GateCycle { .. })));
    bed.run(ab.close_async()).unwrap();
    drop(bed.run(engine.mapping_async(&mib(4, Some(&a), Some(&c)))).unwrap());
    // Another handle has the same gates, or none is given.
    let error = bed.run(engine.mapping_async(&mib(2, Some(&b), None))).unwrap_err();
    assert!(error.to_string().contains("is open with gate \"a\""), "{error}");
    // A gate is of one engine.
    let other = Bed::new(EmulatedConfig::ram(SIZE, 512), options(64));
    let foreign = other.engine().gate("foreign");
    let error = bed.run(engine.mapping_async(&mib(6, Some(&foreign), None))).unwrap_err();
    assert!(error.to_string().contains("another engine's"), "{error}");
    assert!(bed.run(engine.mapping_async(&mib(6, Some(&a), Some(&foreign)))).is_err());
    drop(bed.run(engine.mapping_async(&mib(6, None, Some(&foreign)))).unwrap());
}

fn boxed<'a, T>(future: impl Future<Output = foliant::Result<T>> + 'a) -> BoxedResult<'a, T> {
    Box::pin(future)
}

#[test]
fn wb40_closing_a_mapping_waits_for_its_gate_and_throws_nothing_away() {
    for mut wal in Wal::each(EngineOptions { gate_wait: Duration::from_secs(1), ..options(64) }) {
        wal.write(3, 10);
        assert!(matches!(wal.bed.run(wal.data.clone().close_async()), Err(Error::Gated { .. })));
        assert_eq!(wal.dirty(), 1);
        let mut byte = [0];
        wal.bed.run(wal.data.read_at_async(3 * PAGE, &mut byte)).unwrap();
        assert_eq!(byte, [10], "it is still open");
        // What is dirtied after the closer's sync waits as well.
        let handle = wal.data.clone();
        let mut close = boxed(handle.close_async());
        assert!(wal.bed.poll_once(close.as_mut()).is_pending());
        wal.bed.settle();
        wal.write(4, 20);
        wal.gate.advance_durable_lsn(Lsn(10)).unwrap();
        // The sync, its flush, and the closing itself.
        for _ in 0..3 {
            wal.bed.settle();
            assert!(wal.bed.poll_once(close.as_mut()).is_pending());
        }
        wal.bed.settle();
        assert_eq!(wal.gate.wanted_lsn(), Some(Lsn(20)));
        assert_eq!(wal.written(), [3]);
        assert!(matches!(wal.bed.run(close), Err(Error::Gated { waits_for: Lsn(20), .. })));
        assert_eq!(wal.dirty(), 1);
        wal.gate.advance_durable_lsn(Lsn(20)).unwrap();
        wal.bed.run(wal.data.clone().close_async()).unwrap();
        assert_eq!((wal.byte_on_device(3), wal.byte_on_device(4)), (10, 20));
        wal.bed.assert_consistent();
    }
}

#[test]
fn wb40_closing_the_engine_ends_by_deadline_when_nobody_advances_the_gate() {
    for mut wal in Wal::each(EngineOptions { gate_wait: Duration::from_millis(50), ..options(64) }) {
        wal.write(3, 10);
        wal.bed.run(wal.log.write_at_async(0, b"record")).unwrap();
        let engine = wal.bed.engine.take().unwrap();
        engine.return_shards(wal.bed.take_shards());
        assert!(matches!(engine.close(), Err(Error::Gated { waits_for: Lsn(10), .. })));
        assert_eq!(wal.byte_on_device(3), 0, "never early, not even at the end");
        let mut record = [0; 6];
        wal.bed.device.read_image(1, 0, &mut record).unwrap();
        assert_eq!(&record, b"record");
        assert!(matches!(wal.gate.next_wanted(), Ok(Lsn(10)) | Err(Error::Closed)));
    }
}

#[test]
fn wb40_a_discard_waits_for_the_log_of_what_it_drops() {
    for mut wal in Wal::each(EngineOptions { gate_wait: Duration::from_secs(1), ..options(64) }) {
        wal.write(3, 10);
        wal.write(900, 5);
        let handle = wal.data.clone();
        assert!(matches!(wal.bed.run(handle.discard_async(0..10 * PAGE)), Err(Error::Gated { .. })));
        assert!(wal.bed.seen(NvmOpcode::WRITE_ZEROES).iter().all(|zeroes| zeroes.blocks == 0), "not early");
        let mut discard = boxed(handle.discard_async(0..10 * PAGE));
        assert!(wal.bed.poll_once(discard.as_mut()).is_pending());
        wal.bed.settle();
        assert_eq!(wal.gate.wanted_lsn(), Some(Lsn(10)));
        wal.gate.advance_durable_lsn(Lsn(10)).unwrap();
        wal.bed.run(discard).unwrap();
        // The frame's next page begins without a number.
        wal.write(3, 2);
        wal.bed.run(wal.data.sync_async()).unwrap();
        assert_eq!(wal.byte_on_device(3), 2);
    }
}

#[test]
fn wb40_passes_of_every_kind_stay_behind_the_gate() {
    for mut wal in Wal::each(options(64)) {
        let shards = wal.bed.engine().shards();
        wal.write(0, 10);
        wal.write(1, 3);
        wal.gate.advance_durable_lsn(Lsn(3)).unwrap();
        // A caller's background pass, and the flusher's when it is asked for.
        let background = WritebackControl::background();
        let outcome = wal.bed.run(wal.data.writeback_async(&background)).unwrap();
        assert_eq!((outcome.pages_written, outcome.ended), (1, PassEnd::Complete));
        wal.data.request_writeback();
        wal.bed.settle();
        assert_eq!(wal.written(), [1]);
        // A caller's integrity pass waits like a sync.
        let handle = wal.data.clone();
        let integrity = WritebackControl::integrity();
        let mut pass = boxed(handle.writeback_async(&integrity));
        assert!(wal.bed.poll_once(pass.as_mut()).is_pending());
        wal.bed.settle();
        assert_eq!(wal.gate.wanted_lsn(), Some(Lsn(10)));
        // Meanwhile background passes have the mapping.
        wal.write(2, 2);
        // Not at once, where the last round found gated pages only.
        wal.bed.advance(Duration::from_millis(60));
        wal.data.request_writeback();
        wal.bed.settle();
        assert_eq!(wal.written(), [1, 2]);
        wal.gate.advance_durable_lsn(Lsn(10)).unwrap();
        wal.bed.run(pass).unwrap();
        assert_eq!(wal.written(), [0, 1, 2]);
        // A page whose write failed, and that was stamped again since, isn't tried again before its log.
        wal.write(0, 11);
        wal.gate.advance_durable_lsn(Lsn(11)).unwrap();
        wal.bed.fail(NvmOpcode::WRITE, 0, 1, fatal());
        wal.bed.run(handle.sync_async()).unwrap_err();
        wal.write(0, 20);
        wal.bed.clear_seen();
        for _ in 0..100 {
            wal.bed.advance(Duration::from_millis(100));
        }
        assert_eq!(wal.written(), []);
        wal.gate.advance_durable_lsn(Lsn(20)).unwrap();
        wal.bed.run(handle.sync_async()).unwrap();
        assert_eq!((wal.byte_on_device(0), wal.dirty()), (20, 0));
        // Who owns the shards drives a pass by hand: it waits, and goes on.
        if shards == 1 {
            wal.write(5, 30);
            let mut pass = wal.bed.shard(0).begin_pass(&wal.data, WritebackControl::integrity()).unwrap();
            for _ in 0..3 {
                assert!(matches!(wal.bed.shard(0).resume(&mut pass).next(), PassStep::Wait { page: 5 }));
                wal.bed.settle();
            }
            wal.gate.advance_durable_lsn(Lsn(30)).unwrap();
            let mut step = wal.bed.shard(0).resume(&mut pass);
            let PassStep::Folio(folio) = step.next() else { panic!("its log is durable") };
            assert_eq!(folio.index(), 5);
            folio.write();
            assert!(matches!(step.next(), PassStep::End));
            drop(step);
            drop(pass);
            wal.bed.settle();
            assert_eq!(wal.byte_on_device(5), 30);
        }
    }
}

#[test]
fn wb40_syncs_that_merge_wait_each_for_its_own_pages_and_number() {
    for mut wal in Wal::each(options(64)) {
        wal.write(0, 10);
        wal.write(1, 1);
        wal.write(2, 20);
        wal.gate.advance_durable_lsn(Lsn(5)).unwrap();
        let handles = [0, 1, 2].map(|_| wal.data.clone());
        let mut syncs: Vec<BoxedResult<'_>> = Vec::new();
        for (page, handle) in (0..).zip(&handles) {
            syncs.push(Box::pin(handle.sync_range_async(page * PAGE..(page + 1) * PAGE)));
        }
        for sync in &mut syncs {
            assert!(wal.bed.poll_once(sync.as_mut()).is_pending());
        }
        // The writes, then the flush.
        wal.bed.settle();
        assert!(wal.bed.poll_once(syncs[1].as_mut()).is_pending());
        wal.bed.settle();
        assert!(wal.bed.poll_once(syncs[1].as_mut()).is_ready(), "its page waits for no log");
        assert_eq!(wal.written(), [1]);
        assert!([0, 2].iter().all(|&at| wal.bed.poll_once(syncs[at].as_mut()).is_pending()));
        assert_eq!(wal.gate.wanted_lsn(), Some(Lsn(20)));
        wal.gate.advance_durable_lsn(Lsn(10)).unwrap();
        // The clock stands still, so that the flusher doesn't write it.
        // The write, then the flush, if it isn't written through.
        let mut polled = Poll::Pending;
        for _ in 0..2 {
            wal.bed.settle();
            if polled.is_pending() {
                polled = wal.bed.poll_once(syncs[0].as_mut());
            }
        }
        assert!(matches!(polled, Poll::Ready(Ok(()))), "its page waits for no higher number: {polled:?}");
        assert_eq!(wal.written(), [0, 1]);
        assert!(wal.bed.poll_once(syncs[2].as_mut()).is_pending());
        wal.gate.advance_durable_lsn(Lsn(20)).unwrap();
        wal.bed.run(syncs.remove(2)).unwrap();
        assert_eq!((wal.written(), wal.dirty()), (vec![0, 1, 2], 0));
        wal.bed.assert_consistent();
    }
}

#[test]
fn wb40_syncs_that_merge_end_by_deadline_only_where_their_own_log_is_late() {
    for mut wal in Wal::each(EngineOptions { gate_wait: Duration::from_secs(2), ..options(64) }) {
        for page in 0..4 {
            wal.write(page, 10 + page);
        }
        let handle = wal.data.clone();
        let ranges = [0..PAGE, 0..4 * PAGE, 2 * PAGE..4 * PAGE, 0..PAGE];
        let mut syncs: Vec<BoxedResult<'_>> =
            ranges.into_iter().map(|range| boxed(handle.sync_range_async(range))).collect();
        for sync in &mut syncs {
            assert!(wal.bed.poll_once(sync.as_mut()).is_pending());
        }
        wal.bed.settle();
        wal.gate.advance_durable_lsn(Lsn(11)).unwrap();
        for at in [3, 0] {
            wal.bed.run(syncs.remove(at)).unwrap();
        }
        for sync in syncs {
            let error = wal.bed.run(sync).unwrap_err();
            assert!(matches!(error, Error::Gated { waits_for: Lsn(13), .. }), "{error}");
        }
        assert_eq!(wal.dirty(), 3, "each writes all or waits: the sync over all of it waited for 13");
        wal.gate.advance_durable_lsn(Lsn(13)).unwrap();
        wal.bed.run(wal.data.sync_async()).unwrap();
        assert_eq!((wal.written(), wal.dirty()), (vec![0, 1, 2, 3], 0));
        wal.bed.assert_consistent();
    }
}

#[test]
fn wb40_a_step_over_many_pages_that_wait_for_their_log_is_bounded() {
    const PAGES: u64 = 2048;
    for mut wal in Wal::each(options(4096)).take(1) {
        for first in (0..PAGES).step_by(32) {
            wal.bed.run(wal.data.write_at_lsn_async(first * PAGE, &[1; 32 * 4096], Lsn(10))).unwrap();
        }
        let handle = wal.data.clone();
        let mut sync = boxed(handle.sync_async());
        assert!(wal.bed.poll_once(sync.as_mut()).is_pending());
        let mut steps = 0;
        while wal.gate.wanted_lsn().is_none() {
            wal.bed.step();
            steps += 1;
        }
        assert!(steps >= PAGES / 640, "{PAGES} pages in {steps} steps");
        wal.gate.advance_durable_lsn(Lsn(10)).unwrap();
        wal.bed.run(sync).unwrap();
        assert_eq!(wal.dirty(), 0);
    }
    // The flusher comes to the end of them, too, without the clock.
    for mut wal in Wal::each(options(4096)).take(1) {
        for first in (0..PAGES).step_by(32) {
            wal.bed.run(wal.data.write_at_lsn_async(first * PAGE, &[1; 32 * 4096], Lsn(10))).unwrap();
        }
        wal.write(PAGES, 0);
        wal.data.request_writeback();
        wal.bed.settle();
        assert_eq!(wal.written(), [PAGES], "it lies behind them");
        assert_eq!(wal.gate.wanted_lsn(), Some(Lsn(10)));
    }
}

#[test]
fn wb40_an_owners_pass_that_waits_for_a_log_keeps_nobody_away_and_ends_by_deadline() {
    let gate_wait = Duration::from_secs(30);
    for mut wal in Wal::each(EngineOptions { gate_wait, ..options(64) }).take(1) {
        wal.write(5, 30);
        let mut pass = wal.bed.shard(0).begin_pass(&wal.data, WritebackControl::integrity()).unwrap();
        for _ in 0..3 {
            assert!(matches!(wal.bed.shard(0).resume(&mut pass).next(), PassStep::Wait { page: 5 }));
            wal.bed.settle();
        }
        wal.bed.run(wal.data.write_at_async(9 * PAGE, b"no number")).unwrap();
        wal.data.request_writeback();
        wal.bed.settle();
        assert_eq!(wal.written(), [9], "background passes have the mapping meanwhile");
        wal.bed.advance(gate_wait + Duration::from_secs(1));
        assert!(matches!(wal.bed.shard(0).resume(&mut pass).next(), PassStep::End));
        assert!(matches!(pass.outcome(), Err(Error::Gated { waits_for: Lsn(30), .. })));
        drop(pass);
        assert_eq!((wal.dirty(), wal.bed.engine().stats().gate_timeouts), (1, 1));
        wal.gate.advance_durable_lsn(Lsn(30)).unwrap();
        wal.bed.run(wal.data.sync_async()).unwrap();
        assert_eq!(wal.byte_on_device(5), 30);
    }
}

#[test]
fn wb40_a_log_that_is_durable_in_time_counts_though_the_shard_looks_late() {
    for mut wal in Wal::each(EngineOptions { gate_wait: Duration::from_secs(2), ..options(64) }) {
        wal.write(0, 10);
        let handle = wal.data.clone();
        let mut sync = boxed(handle.sync_async());
        assert!(wal.bed.poll_once(sync.as_mut()).is_pending());
        wal.bed.settle();
        wal.gate.advance_durable_lsn(Lsn(10)).unwrap();
        wal.bed.pass_time(Duration::from_secs(3));
        wal.bed.run(sync).unwrap();
        assert_eq!((wal.written(), wal.bed.engine().stats().gate_timeouts), (vec![0], 0));
    }
}

#[test]
fn wb40_a_poisoned_page_behind_a_gate_is_tried_again_when_its_log_is_durable_however_late() {
    for mut wal in Wal::each(options(64)) {
        wal.write(0, 10);
        wal.gate.advance_durable_lsn(Lsn(10)).unwrap();
        wal.bed.fail(NvmOpcode::WRITE, 0, 1, fatal());
        wal.bed.run(wal.data.sync_async()).unwrap_err();
        wal.write(0, 20);
        wal.bed.clear_seen();
        for _ in 0..60 {
            wal.bed.advance(Duration::from_secs(1));
        }
        assert_eq!(wal.written(), []);
        assert_eq!(wal.gate.wanted_lsn(), Some(Lsn(20)), "its owner is told");
        wal.gate.advance_durable_lsn(Lsn(20)).unwrap();
        for _ in 0..30 {
            wal.bed.advance(Duration::from_secs(1));
        }
        assert_eq!((wal.byte_on_device(0), wal.dirty()), (20, 0), "without a sync");
    }
}

#[test]
fn wb40_who_lets_the_gate_go_finds_it_again_by_name_while_a_mapping_is_behind_it() {
    for mut wal in Wal::each(EngineOptions { gate_wait: Duration::from_secs(2), ..options(64) }) {
        wal.write(0, 10);
        let handle = wal.data.clone();
        let mut sync = boxed(handle.sync_async());
        assert!(wal.bed.poll_once(sync.as_mut()).is_pending());
        wal.bed.settle();
        // The last handle goes while a sync waits: nobody can advance it now, and the sync ends by its deadline.
        drop(std::mem::replace(&mut wal.gate, wal.bed.engine().gate("another")));
        assert!(matches!(wal.bed.run(sync), Err(Error::Gated { waits_for: Lsn(10), .. })));
        let gate = wal.bed.engine().gate("wal");
        assert_eq!(gate.wanted_lsn(), Some(Lsn(10)), "it is the same");
        gate.advance_durable_lsn(Lsn(10)).unwrap();
        wal.bed.run(wal.data.sync_async()).unwrap();
        assert_eq!(wal.byte_on_device(0), 10);
        // And with its mappings closed it is forgotten.
        drop(gate);
        let (data, log) = (wal.data.clone(), wal.log.clone());
        wal.bed.run(data.close_async()).unwrap();
        wal.bed.run(log.close_async()).unwrap();
    }
}

#[test]
fn wb40_an_engine_that_is_closed_ends_the_waits_for_its_gates() {
    // Polled by the test: the shards are dropped.
    for mut wal in Wal::each(options(64)) {
        wal.write(0, 10);
        let handle = wal.data.clone();
        let mut waits = [
            boxed(handle.sync_async()),
            boxed(handle.flush_until_async(Lsn(11))),
            boxed(handle.discard_async(0..PAGE)),
        ];
        for wait in &mut waits {
            assert!(wal.bed.poll_once(wait.as_mut()).is_pending());
        }
        wal.bed.settle();
        wal.bed.drop_shards();
        for wait in &mut waits {
            assert!(matches!(wal.bed.poll_once(wait.as_mut()), Poll::Ready(Err(Error::Closed))));
        }
        // What is asked of it later is refused, and a gate's numbers are numbers still.
        wal.gate.advance_durable_lsn(Lsn(10)).unwrap();
        assert!(matches!(wal.bed.run(handle.sync_async()), Err(Error::Closed)));
        drop(wal.bed.engine.take());
        assert!(matches!(wal.gate.next_wanted(), Err(Error::Closed)));
    }
    // With threads of its own: it is dropped while a thread waits, long before the deadline.
    let options = EngineOptions {
        cache_bytes: 64 * 4096,
        gate_wait: Duration::from_secs(3600),
        hugepages: foliant::Hugepages::Never,
        ..Default::default()
    };
    let engine = Engine::open("emu:ram?size=64MiB", &options).unwrap();
    let gate = engine.gate("wal");
    let data = engine.mapping(&data_options(&gate)).unwrap();
    data.write_at_lsn(0, &[1; 100], Lsn(10)).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| data.sync());
        assert_eq!(gate.next_wanted().unwrap(), Lsn(10));
        drop(engine);
        assert!(matches!(waiting.join().unwrap(), Err(Error::Closed)));
        assert!(matches!(data.flush_until(Lsn(11)), Err(Error::Closed)));
    });
}

#[test]
fn wb40_threads_that_commit_and_sync_go_on_while_one_listens_for_the_gate() {
    const PAGES: u64 = 200;
    let options = EngineOptions {
        cache_bytes: 128 * 4096,
        shards: 2,
        dirty_background_percent: 10,
        flush_interval: Duration::from_millis(5),
        hugepages: foliant::Hugepages::Never,
        ..Default::default()
    };
    let engine = Engine::open("emu:ram?size=64MiB", &options).unwrap();
    let gate = engine.gate("wal");
    let log = engine.mapping(&log_options(&gate)).unwrap();
    let data = engine.mapping(&data_options(&gate)).unwrap();
    let next = AtomicU64::new(1);
    // A number that the writer's change under way, and all its later ones, are at or above.
    let under_way = [AtomicU64::new(1), AtomicU64::new(1)];
    std::thread::scope(|scope| {
        let listener = scope.spawn(|| {
            let mut times = 0;
            while let Ok(lsn) = gate.next_wanted() {
                if log.sync().is_err() {
                    break;
                }
                // Two may be advancing: the lower number has nothing to add.
                let _ = gate.advance_durable_lsn(lsn);
                times += 1;
            }
            times
        });
        let writers: Vec<_> = (0..2u64)
            .map(|writer| {
                let (log, data, next, under_way) = (&log, &data, &next, &under_way[writer as usize]);
                scope.spawn(move || {
                    for i in 0..2000u64 {
                        // Each writer has pages of its own, so that their numbers rise.
                        let page = i * 31 % (PAGES / 2) * 2 + writer;
                        under_way.store(next.load(Ordering::SeqCst), Ordering::SeqCst);
                        let lsn = next.fetch_add(1, Ordering::SeqCst);
                        log.write_at(lsn * 8 % LOG_BYTES, &lsn.to_le_bytes()).unwrap();
                        data.write_at_lsn(page * PAGE, &lsn.to_le_bytes(), Lsn(lsn)).unwrap();
                    }
                })
            })
            .collect();
        let checkpointer = scope.spawn(|| {
            for _ in 0..20 {
                let until = under_way.iter().map(|number| Lsn(number.load(Ordering::SeqCst))).min().unwrap();
                data.flush_until(until).unwrap();
                let oldest = data.oldest_dirty_lsn().unwrap();
                assert!(
                    oldest.is_none_or(|oldest| oldest >= until),
                    "{oldest:?} after a flush until {until}"
                );
                data.sync().unwrap();
            }
        });
        for writer in writers {
            writer.join().unwrap();
        }
        checkpointer.join().unwrap();
        // The last pages are written because the engine's close is heard of, too; then nobody listens any
        // more.
        engine.close().unwrap();
        assert!(listener.join().unwrap() > 0);
    });
}

/// Not `Send` would keep it from being a task of its own on any executor.
#[test]
fn a_gate_and_its_futures_can_be_given_to_other_threads() {
    fn given<T: Send>(_: T) {}
    let bed = Bed::new(EmulatedConfig::ram(MIB, 512), options(32));
    let gate = bed.engine().gate("wal");
    given(gate.next_wanted_async());
    given(Arc::new(gate));
}
