//! What would wait for itself, or for what isn't there any more, is refused; and whatever panics leaves neither a hang nor
//! silence behind.

use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use foliant::{Advice, Engine, EngineOptions, Error, Held, Hugepages, Mapping, MappingOptions, ShareOptions};
use foliant_nvme_emulated::{Action, EmulatedConfig, EmulatedController, ObservedCommand};
use foliant_nvme_spec::NvmOpcode;
use foliant_tests::{Bed, options};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

const PAGE: u64 = 4096;

fn threads(shards: usize) -> EngineOptions {
    EngineOptions { shards, cache_bytes: 1 << 20, hugepages: Hugepages::Never, ..Default::default() }
}

fn plain() -> MappingOptions {
    MappingOptions { readahead_bytes_max: 0, ..Default::default() }
}

// ---- a thread that would wait for itself ----------------------------------------------------------------------

#[test]
fn a_thread_that_has_a_page_exclusively_is_refused_it_a_second_time_and_not_hung() {
    for page_bytes in [4096u32, 16384] {
        let engine = Engine::open("emu:ram?size=8MiB", &threads(1)).unwrap();
        let mapping = engine.mapping(&MappingOptions { page_bytes, ..plain() }).unwrap();
        let other = mapping.clone();
        let bytes = u64::from(page_bytes);
        // Once a page that the shard grants, once a hit.
        for _ in 0..2 {
            let pin = mapping.pin_mut(3).unwrap();
            let refused = |result: foliant::Result<()>, wanted| {
                let error = result.unwrap_err();
                assert!(
                    matches!(error, Error::HeldByThisThread { page: 3, held: Held::Exclusive, wanted: is } if is == wanted),
                    "{error}"
                );
                assert!(error.to_string().contains("holds page 3 exclusively already"), "{error}");
            };
            refused(mapping.pin(3).map(drop), Held::Shared);
            refused(other.pin_mut(3).map(drop), Held::Exclusive);
            refused(other.read_at(3 * bytes + 5, &mut [0; 10]), Held::Shared);
            refused(mapping.read_at(2 * bytes, &mut vec![0; 2 * bytes as usize]), Held::Shared);
            refused(mapping.write_at(3 * bytes + 5, &[0; 10]), Held::Exclusive);
            refused(mapping.write_at(3 * bytes, &vec![0; bytes as usize]), Held::Exclusive);
            drop(mapping.pin_mut(4).unwrap());
            drop(pin);
            drop(mapping.pin(3).unwrap());
        }
        engine.close().unwrap();
    }
}

#[test]
fn a_thread_that_has_a_page_shared_is_refused_it_exclusively_and_may_have_it_shared_again() {
    let engine = Engine::open("emu:ram?size=8MiB", &threads(1)).unwrap();
    let mapping = engine.mapping(&plain()).unwrap();
    for _ in 0..2 {
        let pin = mapping.pin(3).unwrap();
        for result in [
            mapping.pin_mut(3).map(drop),
            mapping.write_at(3 * PAGE + 5, &[0; 10]),
            mapping.write_at(2 * PAGE, &[0; 3 * PAGE as usize]),
        ] {
            let error = result.unwrap_err();
            assert!(
                matches!(
                    error,
                    Error::HeldByThisThread { page: 3, held: Held::Shared, wanted: Held::Exclusive }
                ),
                "{error}"
            );
            assert!(error.to_string().contains("release that pin first"), "{error}");
        }
        mapping.read_at(3 * PAGE, &mut [0; 10]).unwrap();
        drop(mapping.pin(3).unwrap());
        drop(pin);
        drop(mapping.pin_mut(3).unwrap());
    }
    engine.close().unwrap();
}

#[test]
fn a_thread_that_has_released_its_pin_waits_for_others_shared_ones() {
    let engine = Engine::open("emu:ram?size=8MiB", &threads(1)).unwrap();
    let mapping = engine.mapping(&plain()).unwrap();
    for first_is_mine in [false, true].into_iter().cycle().take(40) {
        let mine = first_is_mine.then(|| mapping.pin(3).unwrap());
        let (has, go_on) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let pin = mapping.pin(3).unwrap();
                has.store(true, Ordering::SeqCst);
                while !go_on.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                drop(pin);
            });
            while !has.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            drop(mine.unwrap_or_else(|| mapping.pin(3).unwrap()));
            go_on.store(true, Ordering::SeqCst);
            drop(mapping.pin_mut(3).unwrap());
        });
    }
    engine.close().unwrap();
}

#[test]
fn another_thread_waits_for_the_holder_and_gets_the_page() {
    let engine = Engine::open("emu:ram?size=8MiB", &threads(1)).unwrap();
    let mapping = engine.mapping(&plain()).unwrap();
    for _ in 0..50 {
        let mut pin = mapping.pin_mut(3).unwrap();
        let asked = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                asked.store(true, Ordering::SeqCst);
                mapping.pin(3).map(|pin| pin[0])
            });
            while !asked.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            pin[0] = pin[0].wrapping_add(1);
            let now = pin[0];
            drop(pin);
            assert_eq!(waiting.join().unwrap().unwrap(), now);
        });
    }
    engine.close().unwrap();
}

#[test]
fn tasks_of_one_thread_wait_for_each_other() {
    let mut bed = Bed::new(EmulatedConfig::ram(1 << 20, 512), options(64));
    let mapping = bed.mapping();
    let pin = bed.run(mapping.pin_mut_async(3)).unwrap();
    let mut other = Box::pin(mapping.pin_mut_async(3));
    assert!(bed.poll_once(other.as_mut()).is_pending());
    bed.settle();
    assert!(bed.poll_once(other.as_mut()).is_pending());
    drop(pin);
    drop(bed.run(other).unwrap());
}

// ---- panics ---------------------------------------------------------------------------------------------------

/// Keeps the messages and fields of warnings.
#[derive(Clone, Debug, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

impl Visit for &Warnings {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.lock().unwrap().push(format!("{}={value:?}", field.name()));
    }
}

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }
    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _span: &Id, _values: &Record<'_>) {}
    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}
    fn event(&self, event: &Event<'_>) {
        event.record(&mut &*self);
    }
    fn enter(&self, _span: &Id) {}
    fn exit(&self, _span: &Id) {}
}

/// Ends the thread's work by a panic without its message on the test's output.
fn panicking(what: impl FnOnce()) {
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(what));
    assert!(result.is_err());
}

#[test]
fn a_panic_that_releases_an_exclusive_pin_leaves_the_page_usable_dirty_and_says_so() {
    let device = EmulatedController::new(EmulatedConfig::ram(1 << 20, 512)).unwrap();
    let engine = Engine::open_on(device.attach().unwrap(), &threads(1)).unwrap();
    let mapping = engine.mapping(&plain()).unwrap();
    let warnings = Warnings::default();
    tracing::subscriber::with_default(warnings.clone(), || {
        panicking(|| {
            let mut pin = mapping.pin_mut(5).unwrap();
            pin[..100].fill(7);
            panic!("planted");
        });
        // One that changed nothing has nothing to tell.
        panicking(|| {
            let _pin = mapping.pin_mut(6).unwrap();
            panic!("planted");
        });
    });
    let told = warnings.0.lock().unwrap().join(" ");
    assert!(told.contains("a panic released an exclusive pin") && told.contains("page=5"), "{told}");
    assert!(!told.contains("page=6"), "{told}");
    assert_eq!(engine.stats().dirty_pages, 1);
    let mut pin = mapping.pin_mut(5).unwrap();
    assert_eq!((pin[99], pin[100]), (7, 0));
    pin[100] = 8;
    drop(pin);
    mapping.sync().unwrap();
    engine.close().unwrap();
    let mut page = [0; PAGE as usize];
    device.read_image(1, 5 * PAGE, &mut page).unwrap();
    assert_eq!((page[99], page[100], page[101]), (7, 8, 0));
}

/// From now on the first read of block `slba` panics, in whoever drives the device.
fn plant(device: &EmulatedController, slba: u64) {
    device.observe(Some(Arc::new(move |command: &ObservedCommand<'_>| {
        assert!(command.opcode != NvmOpcode::READ || command.slba != slba, "planted in a shard");
    })));
}

/// Every kind of call fails with the shard's error.
fn assert_failed(engine: &Engine, mapping: &Mapping, cached: u64) {
    let failed = |what: &str, result: foliant::Result<()>| {
        let error = result.expect_err(what);
        assert!(matches!(error, Error::ShardFailed { .. }), "{what}: {error}");
        assert!(error.to_string().contains("planted in a shard"), "{what}: {error}");
    };
    failed("a hit", mapping.pin(cached).map(drop));
    failed("an exclusive hit", mapping.pin_mut(cached).map(drop));
    failed("a read of what is cached", mapping.read_at(cached * PAGE, &mut [0]));
    failed("a miss", mapping.read_at(200 * PAGE, &mut [0]));
    failed("a write", mapping.write_at(201 * PAGE, &[1; PAGE as usize]));
    failed("a sync", mapping.sync());
    failed("a discard", mapping.discard(0..PAGE));
    failed("a hint", mapping.advise(0..PAGE, Advice::DontNeed));
    failed("a prefetch", mapping.prefetch(0..PAGE).map(drop));
    failed("opening again", engine.mapping(&plain()).map(drop));
}

#[test]
fn a_shard_whose_thread_panics_fails_everything_that_waits_and_everything_that_comes() {
    for shards in [1, 2] {
        let device = EmulatedController::new(EmulatedConfig::ram(8 << 20, 512)).unwrap();
        let engine = Engine::open_on(device.attach().unwrap(), &threads(shards)).unwrap();
        let mapping = engine.mapping(&plain()).unwrap();
        mapping.write_at(7 * PAGE, &[1; PAGE as usize]).unwrap();
        plant(&device, 100 * 8);
        std::thread::scope(|scope| {
            let waiting: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| mapping.read_at(100 * PAGE, &mut [0; 10]).unwrap_err()))
                .collect();
            for thread in waiting {
                let error = thread.join().unwrap();
                assert!(matches!(error, Error::ShardFailed { .. }), "{error}");
            }
        });
        assert_failed(&engine, &mapping, 7);
        device.observe(None);
        let error = engine.close().unwrap_err();
        assert!(matches!(error, Error::ShardFailed { .. }), "{error}");
        let error = mapping.pin(7).unwrap_err();
        assert!(matches!(error, Error::ShardFailed { .. }), "for ever: {error}");
    }
}

#[test]
fn a_shard_that_panics_in_its_applications_loop_fails_likewise_and_the_loop_goes_on() {
    let mut bed = Bed::new(EmulatedConfig::ram(8 << 20, 512), options(64));
    let mapping = bed.open(&plain());
    bed.run(mapping.write_at_async(7 * PAGE, &[1; PAGE as usize])).unwrap();
    plant(&bed.device, 100 * 8);
    let mut byte = [0];
    let mut waiting = Box::pin(mapping.read_at_async(100 * PAGE, &mut byte));
    assert!(bed.poll_once(waiting.as_mut()).is_pending());
    // Polling the shard doesn't unwind.
    bed.settle();
    let Poll::Ready(Err(error)) = bed.poll_once(waiting.as_mut()) else { panic!("who waited is answered") };
    assert!(matches!(error, Error::ShardFailed { .. }), "{error}");
    let engine = bed.engine.take().unwrap();
    let error = bed.run(mapping.pin_async(7)).unwrap_err();
    assert!(matches!(error, Error::ShardFailed { .. }), "{error}");
    let error = bed.run(engine.mapping_async(&plain())).unwrap_err();
    assert!(matches!(error, Error::ShardFailed { .. }), "{error}");
    bed.engine = Some(engine);
    drop(waiting);
    let error = bed.close().unwrap_err();
    assert!(matches!(error, Error::ShardFailed { .. }), "{error}");
}

/// How a shard goes in a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gone {
    /// It panics.
    Panicked,
    /// The device loses a command of it, and its time comes.
    CommandLost,
}

#[test]
fn a_mapping_that_can_not_be_closed_since_a_shard_is_gone_stays_closed_and_says_why() {
    for gone in [Gone::Panicked, Gone::CommandLost] {
        let command_timeout = Duration::from_secs(1);
        let options = EngineOptions { shards: 2, command_timeout, ..options(64) };
        let mut bed = Bed::new(EmulatedConfig::ram(8 << 20, 512), options);
        let mapping = bed.open(&plain());
        let other = mapping.clone();
        // A page of either shard, and what the second one ends by.
        let (first, second, last) = (7, 512 + 7, 512 + 100);
        for page in [first, second] {
            bed.run(other.write_at_async(page * PAGE, &[1; PAGE as usize])).unwrap();
        }
        bed.run(other.sync_async()).unwrap();
        match gone {
            Gone::Panicked => plant(&bed.device, last * 8),
            Gone::CommandLost => bed.fault(NvmOpcode::READ, 0, 1, Action::Drop),
        }
        let reader = other.clone();
        let mut byte = [0];
        let mut read = Box::pin(reader.read_at_async(last * PAGE, &mut byte));
        assert!(bed.poll_once(read.as_mut()).is_pending());
        let mut close = Box::pin(mapping.close_async());
        let mut closed = bed.poll_once(close.as_mut());
        while closed.is_pending() {
            let hit = bed.poll_once(Box::pin(other.pin_async(second)).as_mut());
            // Where a shard panics, no call comes through any more, however far the close is.
            assert!(gone == Gone::CommandLost || matches!(hit, Poll::Ready(Err(_))), "{hit:?}");
            drop(hit);
            bed.step();
            bed.pass_time(Duration::from_millis(10));
            closed = bed.poll_once(close.as_mut());
        }
        let is_shards = |error: &Error| matches!(error, Error::ShardFailed { shard: 1, .. });
        let Poll::Ready(Err(error)) = closed else { panic!("{closed:?}, {gone:?}") };
        assert!(is_shards(&error), "{error}, {gone:?}");
        bed.settle();
        // The first shard is well and could serve: nothing is opened again.
        let mut byte = [0];
        for page in [first, second] {
            let error = bed.run(other.read_at_async(page * PAGE, &mut byte)).unwrap_err();
            assert!(is_shards(&error), "page {page}: {error}, {gone:?}");
            let error = bed.run(other.write_at_async(page * PAGE, &byte)).unwrap_err();
            assert!(is_shards(&error), "page {page}: {error}, {gone:?}");
        }
        for error in [bed.run(other.sync_async()), bed.run(other.clone().close_async())] {
            let error = error.unwrap_err();
            assert!(is_shards(&error), "{error}, {gone:?}");
        }
        let error = bed.try_open(&plain()).unwrap_err();
        assert!(is_shards(&error), "{error}, {gone:?}");
    }
}

// ---- the end of mapping, engine and process ------------------------------------------------------------------

#[test]
fn a_mapping_is_not_closed_under_a_pin_of_another_handle() {
    let mut bed = Bed::new(EmulatedConfig::ram(1 << 20, 512), options(64));
    let mapping = bed.mapping();
    let other = mapping.clone();
    let pin = bed.run(mapping.pin_async(3)).unwrap();
    let error = bed.run(other.close_async()).unwrap_err();
    assert!(matches!(error, Error::PinnedTooLong { page: 3, .. }), "{error}");
    // It is open as before.
    assert_eq!(pin[0], 0);
    drop(pin);
    bed.run(mapping.write_at_async(0, &[1])).unwrap();
    bed.run(mapping.close_async()).unwrap();
}

#[test]
fn a_shared_pin_shows_its_page_after_the_engine_was_closed() {
    for shards in [1, 2] {
        let engine = Engine::open("emu:ram?size=8MiB", &threads(shards)).unwrap();
        let mapping = engine.mapping(&plain()).unwrap();
        mapping.write_at(3 * PAGE, &[7; PAGE as usize]).unwrap();
        let pin = mapping.pin(3).unwrap();
        engine.close().unwrap();
        assert_eq!(&pin[..], [7; PAGE as usize]);
        drop(pin);
        assert!(matches!(mapping.pin(3), Err(Error::Closed)));
    }
}

#[test]
fn an_exclusive_pin_that_is_held_across_the_engines_close_is_an_error_of_it() {
    let options = EngineOptions { pin_wait: Duration::from_millis(20), ..threads(1) };
    for dirty in [false, true] {
        let engine = Engine::open("emu:ram?size=8MiB", &options).unwrap();
        let mapping = engine.mapping(&plain()).unwrap();
        if dirty {
            mapping.write_at(3 * PAGE, &[7; PAGE as usize]).unwrap();
        }
        let mut pin = mapping.pin_mut(3).unwrap();
        let error = engine.close().unwrap_err();
        if dirty {
            assert!(matches!(error, Error::PinnedTooLong { page: 3, .. }), "{error}");
        } else {
            assert!(matches!(error, Error::PinnedAtClose { page: 3, .. }), "{error}");
            assert!(error.to_string().contains("is lost"), "{error}");
        }
        pin[0] = 9;
    }
}

#[test]
fn in_a_child_process_every_call_is_an_error_that_says_so_and_the_parent_goes_on() {
    use std::os::unix::process::CommandExt;
    let dir = tempfile::tempdir().unwrap();
    let told = dir.path().join("told");
    let device = EmulatedController::new(EmulatedConfig::ram(8 << 20, 512)).unwrap();
    let engine = Engine::open_on(device.attach().unwrap(), &threads(2)).unwrap();
    let mapping = engine.mapping(&plain()).unwrap();
    let share = engine.share("some", &ShareOptions::default()).unwrap();
    mapping.write_at(0, &[1; 3 * PAGE as usize]).unwrap();
    drop(mapping.pin_mut(0).unwrap());
    let parents = Arc::new(Mutex::new(Some((engine, mapping.clone()))));
    let (of_child, path) = (parents.clone(), told.clone());
    let mut command = std::process::Command::new("true");
    let in_child = move || {
        let Some((engine, mapping)) = of_child.lock().unwrap().take() else { return Ok(()) };
        let mut lines = String::new();
        let mut tell = |what: &str, result: foliant::Result<()>| {
            let line = match result {
                Err(Error::Forked { opened_by, process }) if opened_by != process => "forked".to_owned(),
                other => format!("{other:?}"),
            };
            lines += &format!("{what}: {line}\n");
        };
        tell("hit", mapping.read_at(0, &mut [0; 10]));
        tell("pin of a hit", mapping.pin(1).map(drop));
        tell("exclusive pin of a hit", mapping.pin_mut(1).map(drop));
        tell("write to a hit", mapping.write_at(0, &[9; 10]));
        tell("miss", mapping.read_at(100 * PAGE, &mut [0; 10]));
        tell("write", mapping.write_at(101 * PAGE, &[9; PAGE as usize]));
        tell("sync", mapping.clone().sync());
        tell("discard", mapping.discard(0..PAGE));
        tell("hint", mapping.advise(0..PAGE, Advice::DontNeed));
        tell("mapping", engine.mapping(&plain()).map(drop));
        tell("share", engine.share("another", &ShareOptions::default()).map(drop));
        tell("resize", share.resize(1 << 20).map(drop));
        tell("mapping's close", mapping.close());
        tell("close", engine.close());
        std::fs::write(&path, lines)
    };
    // SAFETY: the child allocates, which the C library allows after a fork of a process with threads, takes no lock that
    // another thread of the parent could hold, and writes one file.
    #[expect(unsafe_code, reason = "what a child may do is what is tested")]
    unsafe {
        command.pre_exec(in_child);
    }
    assert!(command.status().unwrap().success());
    let told = std::fs::read_to_string(told).unwrap();
    assert_eq!(told.lines().count(), 14, "{told}");
    assert!(told.lines().all(|line| line.ends_with(": forked")), "{told}");
    let mut data = [0; 3 * PAGE as usize];
    mapping.read_at(0, &mut data).unwrap();
    assert_eq!(data, [1; 3 * PAGE as usize]);
    mapping.write_at(0, &[2; PAGE as usize]).unwrap();
    mapping.sync().unwrap();
    let (engine, _other) = parents.lock().unwrap().take().unwrap();
    engine.close().unwrap();
    let mut page = [0; PAGE as usize];
    device.read_image(1, 0, &mut page).unwrap();
    assert_eq!(page, [2; PAGE as usize]);
}
