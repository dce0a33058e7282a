//! What a user can get wrong, each answered by an error that says what and what helps, and nothing lost.

use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use foliant::redb_storage::MappingBackend;
use foliant::{Engine, EngineOptions, Error, Hugepages, MappingOptions};
use foliant_nvme_emulated::{Action, EmulatedConfig, EmulatedController};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use foliant_tests::{Bed, fragile, options};
use redb::{ReadableDatabase, ReadableTable, TableDefinition};

fn quick() -> EngineOptions {
    EngineOptions { cache_bytes: 1 << 20, hugepages: Hugepages::Never, ..Default::default() }
}

#[test]
fn each_wrong_uri_is_refused_with_what_would_be_right() {
    let dir = tempfile::tempdir().unwrap();
    let missing = format!("emu:{}", dir.path().join("none").display());
    let small = dir.path().join("small");
    std::fs::write(&small, [0; 1000]).unwrap();
    let small_plain = format!("emu:{}?lba=512", small.display());
    let small_sized = format!("emu:{}?size=1MiB", small.display());
    let cases: [(&str, &[&str]); 15] = [
        ("", &["begins with its scheme"]),
        ("disk.img", &["begins with its scheme", "emu:PATH?size=SIZE"]),
        ("nvme:0000:01:00.0", &["\"nvme\" is not known", "vfio:0000:01:00.0"]),
        ("vfio:0000:ff:1f.7", &["0000:ff:1f.7"]),
        ("vfio:01:00.0?iommu=none", &["iommu=none", "iommu=group"]),
        ("vfio-noiommu:first", &["first", "vfio-noiommu:0000:01:00.0"]),
        ("emu:", &["emu:"]),
        ("emu:ram", &["size"]),
        ("emu:ram?size=12", &["12", "4096"]),
        ("emu:ram?size=1MiB&lba=1000", &["1000", "512", "4096"]),
        ("emu:ram?size=lots", &["lots"]),
        ("emu:ram?size=1MiB&colour=red", &["colour", "lba"]),
        (&missing, &["size="]),
        (&small_plain, &["1000", "512"]),
        (&small_sized, &["1000", "1048576"]),
    ];
    for (uri, words) in cases {
        let error = Engine::open(uri, &quick()).expect_err(uri).to_string();
        for word in words {
            assert!(error.contains(word), "{uri}: {error:?} should say {word:?}");
        }
    }
    assert_eq!(std::fs::read(&small).unwrap(), [0; 1000], "an existing file keeps its length and bytes");
}

#[test]
fn one_image_has_one_owner() {
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("emu:{}?size=1MiB", dir.path().join("image").display());
    let first = Engine::open(&uri, &quick()).unwrap();
    let error = Engine::open(&uri, &quick()).unwrap_err().to_string();
    assert!(error.contains("image"), "{error}");
    first.close().unwrap();
    Engine::open(&uri, &quick()).unwrap().close().unwrap();
}

#[test]
fn hugepages_that_are_required_and_cannot_be_had_are_an_error_with_the_remedy() {
    // More than any machine that runs this has reserved.
    let options = EngineOptions { hugepages: Hugepages::Require, cache_bytes: 3 << 30, ..quick() };
    let error = Engine::open("emu:ram?size=1MiB", &options).unwrap_err().to_string();
    assert!(error.contains("nr_hugepages"), "{error}");
}

#[test]
fn ranges_of_mappings_are_checked_and_overlaps_refused() {
    let engine = Engine::open("emu:ram?size=1MiB&lba=4096", &quick()).unwrap();
    let open = |namespace, start_bytes, len_bytes| {
        engine.mapping(&MappingOptions { namespace, start_bytes, len_bytes, ..Default::default() }).map(drop)
    };
    for (namespace, start, len, word) in [
        (2, 0, None, "no namespace 2"),
        (1, 512, None, "multiples of the 4096-byte block"),
        (1, 0, Some(100), "multiples of the 4096-byte block"),
        (1, 0, Some(0), "or are none"),
        (1, 1 << 20, None, "or are none"),
        (1, 4096, Some(1 << 20), "has 1048576 bytes"),
    ] {
        let error = open(namespace, start, len).unwrap_err().to_string();
        assert!(error.contains(word), "{error:?} should say {word:?}");
    }
    open(1, 0, Some(8192)).unwrap();
    open(1, 0, Some(8192)).unwrap();
    assert!(open(1, 4096, Some(8192)).unwrap_err().to_string().contains("overlap"));
    open(1, 8192, Some(4096)).unwrap();
}

#[test]
fn io_outside_the_mapping_is_refused_and_io_of_nothing_is_nothing() {
    let engine = Engine::open("emu:ram?size=1MiB", &quick()).unwrap();
    let mapping = engine.mapping(&MappingOptions::default()).unwrap();
    mapping.read_at(1 << 20, &mut []).unwrap();
    mapping.write_at(5, &[]).unwrap();
    mapping.sync_range(7..7).unwrap();
    mapping.discard(9..9).unwrap();
    let outside =
        |result: foliant::Result<()>| assert!(matches!(result, Err(Error::OutOfRange { .. })), "{result:?}");
    outside(mapping.read_at(1 << 20, &mut [0]));
    outside(mapping.write_at((1 << 20) - 1, &[0; 2]));
    outside(mapping.write_at(u64::MAX, &[0; 2]));
    outside(mapping.pin(256).map(drop));
    outside(mapping.pin_mut(u64::MAX).map(drop));
    outside(mapping.sync_range(0..(1 << 20) + 1));
    outside(mapping.discard((1 << 20)..(1 << 20) + 1));
    engine.close().unwrap();
    assert!(matches!(mapping.read_at(0, &mut [0]), Err(Error::Closed)));
}

#[test]
fn a_closed_mapping_is_closed_for_all_its_handles_and_can_be_opened_again() {
    let engine = Engine::open("emu:ram?size=1MiB", &quick()).unwrap();
    let mapping = engine.mapping(&MappingOptions::default()).unwrap();
    let other = mapping.clone();
    mapping.write_at(100, b"kept").unwrap();
    mapping.close().unwrap();
    assert!(matches!(other.write_at(0, &[1]), Err(Error::Closed)));
    assert!(matches!(other.sync(), Err(Error::Closed)));
    let again = engine.mapping(&MappingOptions::default()).unwrap();
    let mut bytes = [0; 4];
    again.read_at(100, &mut bytes).unwrap();
    assert_eq!(&bytes, b"kept");
    engine.close().unwrap();
}

#[test]
fn a_full_disk_fails_the_sync_and_loses_nothing() {
    let mut bed = Bed::new(EmulatedConfig::ram(1 << 20, 512), options(64));
    let mapping = bed.mapping();
    bed.run(mapping.write_at_async(0, &[7; 4096])).unwrap();
    bed.fail(NvmOpcode::WRITE, 0, 1, Status::of(StatusCode::CAPACITY_EXCEEDED).with_dnr(true));
    let error = bed.run(mapping.sync_async()).unwrap_err().to_string();
    assert!(error.to_lowercase().contains("capacity"), "{error}");
    bed.run(mapping.sync_async()).unwrap();
    let mut image = [0; 4096];
    bed.device.read_image(1, 0, &mut image).unwrap();
    assert_eq!(image, [7; 4096]);
}

#[test]
fn a_page_that_cannot_be_read_is_an_error_for_all_who_wait_and_is_tried_again() {
    let mut bed = Bed::new(EmulatedConfig::ram(1 << 20, 512), options(64));
    let mapping = bed.mapping();
    bed.fail(NvmOpcode::READ, 0, 1, Status::of(StatusCode::UNRECOVERED_READ_ERROR).with_dnr(true));
    let mut buffer = [0; 8192];
    let mut first = Box::pin(mapping.read_at_async(4096, &mut buffer));
    let mut second = Box::pin(mapping.pin_async(1));
    assert!(bed.poll_once(first.as_mut()).is_pending());
    assert!(bed.poll_once(second.as_mut()).is_pending());
    assert!(matches!(bed.run(first), Err(Error::Device { offset: 4096, .. })));
    assert!(matches!(bed.run(second), Err(Error::Device { offset: 4096, .. })));
    bed.run(mapping.read_at_async(4096, &mut buffer)).unwrap();
    bed.assert_consistent();
}

#[test]
fn a_command_that_never_completes_fails_the_shard_by_deadline_and_every_request_says_so() {
    let timeout = Duration::from_millis(100);
    let mut bed = Bed::new(
        EmulatedConfig::ram(1 << 20, 512),
        EngineOptions { command_timeout: timeout, ..options(64) },
    );
    let mapping = bed.mapping();
    bed.fault(NvmOpcode::READ, 0, 1, Action::Drop);
    for _ in 0..2 {
        let error = bed.run(mapping.read_at_async(0, &mut [0])).unwrap_err();
        assert!(matches!(error, Error::ShardFailed { shard: 0, .. }), "{error}");
        assert!(error.to_string().contains("100ms"), "{error}");
    }
}

#[test]
fn a_device_that_goes_away_fails_requests_and_the_process_lives() {
    let mut bed = Bed::new(fragile(1 << 20), options(64));
    let mapping = bed.mapping();
    bed.run(mapping.write_at_async(0, &[1; 4096])).unwrap();
    bed.device.power_cut(3).unwrap();
    let error = bed.run(mapping.sync_async()).unwrap_err();
    assert!(error.to_string().contains("gone"), "{error}");
    assert!(bed.run(mapping.read_at_async(8192, &mut [0])).is_err());
}

/// Counts how often it was woken: an executor of the simplest kind.
struct Counter(std::sync::atomic::AtomicU32);

impl Wake for Counter {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }
}

#[test]
fn futures_are_plain_they_wake_their_task_and_may_be_dropped_midway() {
    let mut bed = Bed::new(EmulatedConfig::ram(1 << 20, 512), options(64));
    let mapping = bed.mapping();
    let counter = Arc::new(Counter(0.into()));
    let waker = Waker::from(counter.clone());
    let mut pin = Box::pin(mapping.pin_mut_async(3));
    assert!(pin.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    assert_eq!(counter.0.load(std::sync::atomic::Ordering::SeqCst), 0);
    bed.settle();
    assert_eq!(counter.0.load(std::sync::atomic::Ordering::SeqCst), 1);
    assert!(matches!(pin.as_mut().poll(&mut Context::from_waker(&waker)), Poll::Ready(Ok(_))));
    // Dropped before and after the shard has answered: what was granted is given back.
    for settle_first in [false, true] {
        let mut buffer = vec![1; 40 * 4096];
        let mut futures: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>> = vec![
            Box::pin(async { drop(mapping.pin_async(100).await) }),
            Box::pin(async { drop(mapping.pin_mut_async(101).await) }),
            Box::pin(async { drop(mapping.write_at_async(102 * 4096, &[7; 8192]).await) }),
            Box::pin(async { drop(mapping.read_at_async(110 * 4096, &mut buffer).await) }),
        ];
        for future in &mut futures {
            assert!(bed.poll_once(future.as_mut()).is_pending());
        }
        if settle_first {
            bed.settle();
        }
        drop(futures);
        bed.settle();
        let mut pin = bed.run(mapping.pin_mut_async(101)).unwrap();
        pin[0] = 1;
        drop(pin);
        for page in 100..112 {
            drop(bed.run(mapping.pin_mut_async(page)).unwrap());
        }
        bed.run(mapping.discard_async(90 * 4096..160 * 4096)).unwrap();
        bed.assert_consistent();
    }
}

const TABLE: TableDefinition<u64, &[u8]> = TableDefinition::new("t");

#[test]
fn redb_keeps_every_acknowledged_transaction_over_power_cuts() {
    let device = EmulatedController::new(fragile(64 << 20)).unwrap();
    let options = EngineOptions { cache_bytes: 64 * 4096, ..quick() };
    let mut acknowledged = 0u64;
    for cut in 0..6 {
        let engine = Engine::open_on(device.attach().unwrap(), &options).unwrap();
        let backend = MappingBackend::open(engine.mapping(&MappingOptions::default()).unwrap()).unwrap();
        let mut database = redb::Database::builder().create_with_backend(backend).unwrap();
        assert!(database.check_integrity().unwrap() || cut > 0);
        if cut > 0 {
            let read = database.begin_read().unwrap();
            let table = read.open_table(TABLE).unwrap();
            for key in 0..acknowledged {
                let value = table.get(key).unwrap().expect("an acknowledged transaction is there");
                assert_eq!(value.value(), vec![key as u8; 3000]);
            }
            // One more may have made it: the one whose commit the cut interrupted.
            let count = table.iter().unwrap().count() as u64;
            assert!(count == acknowledged || count == acknowledged + 1, "{count} of {acknowledged}");
            acknowledged = count;
        }
        for _ in 0..40 {
            let write = database.begin_write().unwrap();
            write
                .open_table(TABLE)
                .unwrap()
                .insert(acknowledged, vec![acknowledged as u8; 3000].as_slice())
                .unwrap();
            write.commit().unwrap();
            acknowledged += 1;
        }
        let write = database.begin_write().unwrap();
        write
            .open_table(TABLE)
            .unwrap()
            .insert(acknowledged, vec![acknowledged as u8; 3000].as_slice())
            .unwrap();
        device.power_cut(cut).unwrap();
        assert!(write.commit().is_err());
        drop(database);
        drop(engine);
    }
}
