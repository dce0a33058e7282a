//! The events of writeback, as a subscriber sees them: names, fields, order, and that they agree with what the device
//! was asked and with the engine's counters.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use foliant::{EngineOptions, Lsn, MappingOptions, WRITEBACK_TARGET};
use foliant_nvme_emulated::{Action, EmulatedConfig};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use foliant_tests::{Bed, options};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// An event: its name, and its fields in words.
#[derive(Clone, Debug)]
struct Told {
    name: &'static str,
    fields: BTreeMap<&'static str, String>,
}

impl Told {
    fn text(&self, field: &str) -> &str {
        self.fields.get(field).unwrap_or_else(|| panic!("{} has no {field}: {self:?}", self.name))
    }

    fn number(&self, field: &str) -> u64 {
        self.text(field).parse().unwrap_or_else(|_| panic!("{field} of {self:?} is a number"))
    }

    fn is(&self, field: &str, value: &str) -> bool {
        self.fields.get(field).is_some_and(|is| is == value)
    }
}

impl Visit for Told {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.insert(field.name(), value.to_owned());
    }
}

/// Keeps the events of writeback.
#[derive(Clone, Debug, Default)]
struct Listener(Arc<Mutex<Vec<Told>>>);

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == WRITEBACK_TARGET
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut told = Told { name: event.metadata().name(), fields: BTreeMap::new() };
        event.record(&mut told);
        assert_eq!(told.text("message"), told.name, "a log line shows the name");
        self.0.lock().unwrap().push(told);
    }

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

/// What happens while `run` runs, in order. The bed polls its shards on the thread that calls.
fn told(run: impl FnOnce()) -> Vec<Told> {
    let listener = Listener::default();
    tracing::subscriber::with_default(listener.clone(), run);
    std::mem::take(&mut *listener.0.lock().unwrap())
}

fn of<'a>(told: &'a [Told], name: &'a str) -> impl Iterator<Item = &'a Told> + Clone {
    told.iter().filter(move |event| event.name == name)
}

const MIB: u64 = 1 << 20;

fn beds(frames: u64) -> [Bed; 2] {
    [1, 3].map(|shards| {
        let options = EngineOptions { shards, ..options(frames * shards as u64) };
        Bed::new(EmulatedConfig { volatile_write_cache: true, ..EmulatedConfig::ram(64 * MIB, 512) }, options)
    })
}

#[test]
fn wb01_wb40_each_round_of_a_sync_that_waits_for_a_log_is_a_pass_that_ascends() {
    for mut bed in beds(4096) {
        let gate = bed.engine().gate("wal");
        let mapping = bed.open(&MappingOptions { gate: Some(gate.clone()), ..Default::default() });
        for page in (0..900u64).map(|number| number * 5) {
            // Every third waits for the log.
            let lsn = Lsn(if page % 3 == 0 { 10 } else { 1 });
            bed.run(mapping.write_at_lsn_async(page * 4096, &[1; 4096], lsn)).unwrap();
        }
        gate.advance_durable_lsn(Lsn(1)).unwrap();
        bed.settle();
        let told = told(|| {
            let mut sync = Box::pin(mapping.sync_async());
            assert!(bed.poll_once(sync.as_mut()).is_pending());
            bed.settle();
            gate.advance_durable_lsn(Lsn(10)).unwrap();
            bed.run(sync).unwrap();
        });
        let mut passes: BTreeMap<u64, u64> = BTreeMap::new();
        for issued in of(&told, "block_rq_issue").filter(|issued| issued.is("op", "write")) {
            let (pass, first) = (issued.number("pass"), issued.number("first_page"));
            assert_ne!(pass, 0, "{issued:?} is of a pass that nobody has heard of");
            let before = passes.insert(pass, first);
            assert!(before.is_none_or(|before| before < first), "{issued:?} comes after page {before:?}");
        }
        assert_eq!(passes.len(), 2 * bed.engine().shards());
        let ended = of(&told, "writeback_single_inode").filter(|ended| ended.is("ended", "end"));
        assert_eq!(ended.count(), passes.len());
    }
}

#[test]
fn wb01_wb18_a_sync_tells_its_passes_commands_doorbells_and_commit() {
    for mut bed in beds(4096) {
        let mapping = bed.mapping();
        for page in (0..3000u64).rev().map(|number| number * 5) {
            bed.run(mapping.write_at_async(page * 4096, &[1; 4096])).unwrap();
        }
        bed.settle();
        bed.clear_seen();
        let before = bed.engine().stats();
        let told = told(|| bed.run(mapping.sync_async()).unwrap());
        let after = bed.engine().stats();

        let shards = bed.engine().shards();
        let begun: Vec<_> = of(&told, "writeback_single_inode_start").collect();
        assert_eq!(begun.len(), shards);
        for pass in &begun {
            assert!(
                pass.is("reason", "sync") && pass.is("mode", "all") && pass.number("dirty") > 0,
                "{pass:?}"
            );
            let number = pass.text("pass");
            let commands: Vec<_> =
                of(&told, "block_rq_issue").filter(|command| command.is("pass", number)).collect();
            let ends = |told: &Told| told.number("first_page") + told.number("pages");
            assert!(commands.windows(2).all(|pair| ends(pair[0]) <= pair[1].number("first_page")));
            assert!(commands.iter().all(|command| command.text("shard") == pass.text("shard")));
            let end = of(&told, "writeback_single_inode").find(|end| end.is("pass", number)).unwrap();
            assert_eq!((end.text("ended"), end.number("commands")), ("end", commands.len() as u64));
            assert_eq!(end.number("pages"), commands.iter().map(|told| told.number("pages")).sum::<u64>());
        }
        // As many as the device has seen and the engine has counted.
        let writes = bed.seen(NvmOpcode::WRITE).len();
        assert_eq!(of(&told, "block_rq_issue").count(), writes);
        assert_eq!(
            of(&told, "block_rq_complete").filter(|end| !end.fields.contains_key("error")).count(),
            writes
        );
        let rung: Vec<_> = of(&told, "block_unplug").collect();
        assert_eq!(rung.len() as u64, after.doorbells - before.doorbells);
        let commands: u64 = rung.iter().map(|bell| bell.number("commands")).sum();
        assert_eq!((commands, commands), (writes as u64 + 1, after.commands - before.commands));
        assert!(rung.len() * 2 < writes, "{} doorbells for {writes} writes", rung.len());
        assert_eq!(after.passes_sync - before.passes_sync, shards as u64);

        assert_eq!(of(&told, "sync_file_enter").count(), shards);
        assert_eq!(of(&told, "sync_file_exit").count(), shards);
        let commit = of(&told, "initiate_commit").next().unwrap();
        assert_eq!((commit.number("syncs"), commit.number("namespace")), (1, 1));
        assert_eq!(of(&told, "commit_done").count(), 1);
        // WB-29 in the order of events: the flush comes after every write has ended.
        let place = |name| told.iter().rposition(|event| event.name == name).unwrap();
        assert!(place("block_rq_complete") < place("initiate_commit"));
        assert!(place("initiate_commit") < place("commit_done"));
    }
}

#[test]
fn wb20_each_pass_tells_its_reason_and_is_counted_by_it() {
    let options = EngineOptions { dirty_background_percent: 50, ..options(128) };
    let mut bed = Bed::new(EmulatedConfig::ram(64 * MIB, 512), options);
    let mapping = bed.mapping();
    let reasons = |told: &[Told]| -> Vec<String> {
        of(told, "writeback_single_inode_start").map(|pass| pass.text("reason").to_owned()).collect()
    };
    let write = |bed: &mut Bed, pages: std::ops::Range<u64>| {
        for page in pages {
            bed.run(mapping.write_at_async(page * 4096, &[1; 4096])).unwrap();
        }
        bed.settle();
    };
    let few = told(|| {
        write(&mut bed, 0..10);
        bed.advance(Duration::from_secs(6));
    });
    assert_eq!(reasons(&few), ["expiry"]);
    assert_eq!(of(&few, "writeback_start").next().unwrap().text("reason"), "expiry");
    assert_eq!(of(&few, "writeback_written").next().unwrap().number("pages"), 10);
    let many = told(|| write(&mut bed, 0..80));
    assert_eq!(reasons(&many)[0], "dirty_limit");
    let stats = bed.engine().stats();
    assert_eq!((stats.passes_expiry, stats.passes_sync), (1, 0));
    assert!(stats.passes_dirty_limit > 0);
    let counted = stats.passes_dirty_limit + stats.passes_expiry + stats.passes_reclaim;
    assert_eq!(counted, (reasons(&few).len() + reasons(&many).len()) as u64);
}

#[test]
fn wb02_a_pass_that_is_given_up_tells_so() {
    let config = EmulatedConfig { mdts: 3, ..EmulatedConfig::ram(64 * MIB, 512) };
    let options = EngineOptions { dirty_background_percent: 50, queue_entries: 8, ..options(1024) };
    let mut bed = Bed::new(config, options);
    let mapping = bed.mapping();
    bed.fault(NvmOpcode::WRITE, 0, u64::MAX, Action::Delay(Duration::from_millis(1)));
    let told = told(|| {
        for page in 0..600u64 {
            bed.run(mapping.write_at_async(page * 4096, &[1; 4096])).unwrap();
        }
        (0..200).for_each(|_| bed.advance(Duration::from_millis(1)));
    });
    let ends: Vec<_> = of(&told, "writeback_single_inode").collect();
    assert_eq!(ends.len(), of(&told, "writeback_single_inode_start").count(), "whatever begins ends");
    // Down to half of the limit, and no further.
    assert!(ends.last().unwrap().text("ended").starts_with("given_up"), "{ends:?}");
}

#[test]
fn wb11_a_write_that_fails_is_told_with_its_error_and_is_issued_again() {
    for mut bed in beds(256) {
        let mapping = bed.mapping();
        bed.run(mapping.write_at_async(7 * 4096, &[1; 4096])).unwrap();
        bed.fail(NvmOpcode::WRITE, 0, 1, Status::of(StatusCode::WRITE_FAULT));
        let told = told(|| {
            let _ = bed.run(mapping.sync_async());
            bed.advance(Duration::from_secs(20));
            bed.run(mapping.sync_async()).unwrap();
        });
        let ends: Vec<_> = of(&told, "block_rq_complete").filter(|end| end.is("op", "write")).collect();
        assert!(ends.len() >= 2 && ends.iter().all(|end| end.number("first_page") == 7), "{ends:?}");
        assert!(ends[0].fields.contains_key("error") && !ends.last().unwrap().fields.contains_key("error"));
    }
}

#[test]
fn commands_that_no_pass_issues_are_told_as_what_they_are() {
    let mut bed = Bed::new(EmulatedConfig::ram(64 * MIB, 512), options(256));
    let mapping = bed.mapping();
    let told = told(|| {
        bed.run(mapping.read_at_async(40 * 4096, &mut [0; 8192])).unwrap();
        bed.run(mapping.discard_async(0..64 * 4096)).unwrap();
        for page in 1000..2000u64 {
            bed.run(mapping.read_at_async(page * 4096, &mut [0; 4096])).unwrap();
        }
    });
    let issued = |op| of(&told, "block_rq_issue").filter(move |event| event.is("op", op));
    let read = issued("read").next().unwrap();
    assert_eq!((read.number("first_page"), read.number("pages")), (40, 2));
    assert_eq!(issued("write_zeroes").next().unwrap().number("pages"), 64);
    assert_eq!(issued("write").count(), 0);
    let evicted: u64 = of(&told, "mm_vmscan_lru_shrink_inactive").map(|event| event.number("pages")).sum();
    assert_eq!(evicted, bed.engine().stats().pages_evicted);
    assert!(evicted > 500);
}

#[test]
fn every_command_that_the_device_sees_is_told_and_counted_by_a_doorbell() {
    for mut bed in beds(256) {
        let mapping = bed.mapping();
        bed.settle();
        bed.clear_seen();
        let told = told(|| {
            // Sequential, so that the engine reads ahead; then all kinds of commands, and more than the cache holds.
            for page in 0..600u64 {
                bed.run(mapping.read_at_async(page * 4096, &mut [0; 4096])).unwrap();
            }
            for page in 0..900u64 {
                bed.run(mapping.write_at_async(page * 7 * 4096, &[1; 4096])).unwrap();
            }
            bed.run(mapping.sync_async()).unwrap();
            bed.run(mapping.discard_async(0..100 * 4096)).unwrap();
            bed.run(mapping.sync_async()).unwrap();
            bed.settle();
        });
        let issued = |op: &str| of(&told, "block_rq_issue").filter(|event| event.is("op", op)).count();
        assert!(issued("read_ahead") > 0, "a sequential reader is read ahead for");
        assert_eq!(issued("read") + issued("read_ahead"), bed.seen(NvmOpcode::READ).len());
        assert_eq!(issued("write"), bed.seen(NvmOpcode::WRITE).len());
        assert_eq!(issued("write_zeroes"), bed.seen(NvmOpcode::WRITE_ZEROES).len());
        assert_eq!(of(&told, "initiate_commit").count(), bed.seen(NvmOpcode::FLUSH).len());
        let rung: u64 = of(&told, "block_unplug").map(|bell| bell.number("commands")).sum();
        assert_eq!(rung, bed.all_seen().len() as u64);
    }
}
