//! Steady state allocates nothing: not on a hit, a miss, an eviction, a write to the device or a flush.
//!
//! The one test here has the process to itself, since the allocator counts for all threads.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::IoSlice;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use foliant::{EngineOptions, Lsn, MappingOptions, MirrorOptions, ReadAt, StatsPage, StatsReader};
use foliant_nvme_emulated::EmulatedConfig;
use foliant_tests::{Bed, options};

/// The system's allocator, counting.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
#[expect(unsafe_code, reason = "a global allocator is an unsafe trait")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What the mapping has beside pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Setup {
    Plain,
    Gated,
    Mirrored,
}

#[test]
fn wb42_steady_state_allocates_nothing() {
    let place = tempfile::tempdir_in("/dev/shm").unwrap();
    let setups = [Setup::Plain, Setup::Gated, Setup::Mirrored];
    for (shards, setup) in [1, 2].into_iter().flat_map(|shards| setups.map(|setup| (shards, setup))) {
        let gated = setup == Setup::Gated;
        let ram = || EmulatedConfig::ram(64 << 20, 512);
        let path = place.path().join(format!("{shards}-{setup:?}"));
        let stats_page = StatsPage::At(path.clone());
        let wanted = EngineOptions { shards, stats_page, ..options(128 * shards as u64) };
        let mut bed = match setup {
            Setup::Plain | Setup::Gated => Bed::new(ram(), wanted),
            Setup::Mirrored => Bed::mirrored(ram(), ram(), wanted),
        };
        let gate = bed.engine().gate("wal");
        let mapping = bed.open(&MappingOptions {
            gate: gated.then(|| gate.clone()),
            mirror: (setup == Setup::Mirrored).then(MirrorOptions::default),
            ..Default::default()
        });
        if setup == Setup::Mirrored {
            bed.run(mapping.resync_mirror_async()).unwrap();
        }
        // The bed's own observers allocate.
        bed.device.observe(None);
        bed.mirror.iter().for_each(|mirror| mirror.observe(None));
        let mut buffer = vec![0; 100_000];
        let mut work = |bed: &mut Bed, round: u64| {
            let offset = round * 7919 * 4096 % (60 << 20) + round % 4096;
            // Behind a gate the log is a round late, and what a sync waits for becomes durable while it
            // waits.
            let lsn = Lsn(round + 1);
            bed.run(mapping.write_at_lsn_async(offset, &buffer[..20_000], lsn)).unwrap();
            gate.advance_durable_lsn(Lsn(round)).unwrap();
            bed.run(mapping.read_at_async(offset / 2, &mut buffer)).unwrap();
            drop(bed.run(mapping.pin_async(offset / 4096)).unwrap());
            drop(bed.run(mapping.pin_mut_async(offset / 8192)).unwrap());
            // A scan, forwards and backwards, and a hint: windows of readahead on their way all the time.
            for page in 0..20 {
                let page = 15_000 - round % 300 * 20 - page;
                bed.run(mapping.read_at_async(page * 4096, &mut buffer[..4096])).unwrap();
                bed.run(mapping.read_at_async((page - 9000) * 4096, &mut buffer[..4096])).unwrap();
            }
            mapping.prefetch(offset / 3..offset / 3 + 100_000).unwrap();
            // In strides, scattered, and in several buffers.
            for at in 0..20 {
                let page = 200 + round % 60 * 250 + at * 11;
                bed.run(mapping.read_at_async(page * 4096, &mut buffer[..4096])).unwrap();
            }
            let mut chunks = buffer.chunks_mut(500);
            let mut reads: [ReadAt<'_>; 64] = std::array::from_fn(|at| {
                ReadAt::new((round * 211 + at as u64 * 977) % 16_000 * 4096, chunks.next().unwrap())
            });
            bed.run(mapping.read_many_async(&mut reads)).unwrap();
            let hints: [u64; 40] = std::array::from_fn(|at| (round * 307 + at as u64 * 1201) % 16_000);
            mapping.prefetch_many(&hints).unwrap();
            let (one, other) = buffer.split_at(5000);
            let slices = [IoSlice::new(one), IoSlice::new(&other[..9000])];
            let place = (round * 131 % 100) * 4096 + (60 << 20);
            if setup != Setup::Gated {
                bed.run(mapping.write_vectored_at_async(place, &slices)).unwrap();
            }
            if round.is_multiple_of(10) {
                let mut sync = pin!(mapping.sync_async());
                assert!(bed.poll_once(sync.as_mut()).is_pending());
                bed.settle();
                gate.advance_durable_lsn(lsn).unwrap();
                bed.run(sync).unwrap();
            }
            if round % 10 == 5 {
                bed.run(mapping.flush_until_async(Lsn(round))).unwrap();
            }
            if round.is_multiple_of(50) {
                bed.advance(Duration::from_secs(6));
            }
        };
        for round in 0..300 {
            work(&mut bed, round);
        }
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        for round in 300..1300 {
            work(&mut bed, round);
        }
        let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
        let stats = bed.engine().stats();
        assert!(stats.pages_evicted > 1000 && stats.flush_commands > 100 && stats.pages_written > 1000);
        assert!(stats.readahead_pages_used > 10_000, "{stats:?}");
        assert!(!gated || stats.gate_waits > 50, "{stats:?}");
        assert!(setup != Setup::Mirrored || stats.mirror_pages_written > 1000, "{stats:?}");
        let records = StatsReader::open(&path).unwrap().read().unwrap().shards;
        assert!(records.iter().flatten().all(|record| record.sequence > 20), "{records:?}");
        assert_eq!(allocations, 0, "with {shards} shards, {setup:?}");
    }
}
