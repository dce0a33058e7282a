//! Promises and power loss. A raw image can't show a missing Flush, since QEMU hands every write to the host at once;
//! so one boot writes a log, of which every prefix is replayed, and another has devices that forget their caches.
//!
//! Each claim has a twin without Flush commands, whose promises must be found broken: so it is known that a Flush which
//! is forgotten would be noticed.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::drive::{Drive, Image, Layer};
use crate::guest::Attendant;
use crate::machine::{Machine, NvmeController};
use crate::promises::{self, Examined, Sampling};
use crate::scenario::{Boot, Claim, Evidence};
use crate::write_log::WriteLog;

pub(super) fn boots() -> Vec<Boot> {
    vec![write_log(), power_loss()]
}

const SIZE_MIB: u64 = 32;
const GENERATIONS: u64 = 40;
const TRANSACTIONS: u64 = 40;
const FLUSH: u8 = 0;

const GENERATIONS_JOB: &str = "promise_generations";
const TRANSACTIONS_JOB: &str = "promise_transactions";

/// The controllers: slot, namespace and drive.
const GENERATIONS_SENT: (u8, u32, &str) = (4, 11, "generations");
const TRANSACTIONS_SENT: (u8, u32, &str) = (5, 12, "transactions");
const GENERATIONS_LOST: (u8, u32, &str) = (6, 13, "generations-unflushed");
const TRANSACTIONS_LOST: (u8, u32, &str) = (7, 14, "transactions-unflushed");

fn boot(name: &'static str, drive: fn(&str) -> Drive) -> Boot {
    let mut machine = Machine::new();
    for (slot, nsid, name) in [GENERATIONS_SENT, TRANSACTIONS_SENT, GENERATIONS_LOST, TRANSACTIONS_LOST] {
        let controller = NvmeController::new(&format!("LAB{slot}"), &format!("{slot:02x}.0"));
        machine = machine.drive(drive(name)).nvme(controller.namespace(nsid, name, 512));
    }
    let all = ["0000:00:04.0", "0000:00:05.0", "0000:00:06.0", "0000:00:07.0"];
    Boot::new(name, machine.without_kernel_driver()).bind(&all)
}

fn arguments((slot, nsid, _): (u8, u32, &str), flushes: &str, until: Value) -> Value {
    json!({
        "address": format!("0000:00:{slot:02x}.0"), "nsid": nsid, "size_bytes": SIZE_MIB << 20, "flushes": flushes,
        "until": until,
    })
}

fn write_log() -> Boot {
    let generations = |controller, flushes| arguments(controller, flushes, json!({"count": GENERATIONS}));
    let transactions = |controller, flushes| arguments(controller, flushes, json!({"count": TRANSACTIONS}));
    boot("write-log", |name| Drive::new(name, SIZE_MIB).layer(Layer::LogWrites))
        .claim(
            Claim::new(
                "what_sync_promised_survives_at_each_moment_of_the_write_log",
                "Whenever a page of the next generation is written, all of the one before is flushed; and leaving any \
                 one Flush out of the log would show.",
                GENERATIONS_JOB,
                generations(GENERATIONS_SENT, "sent"),
            )
            .check(|evidence| {
                let log = log_of(evidence, GENERATIONS_SENT);
                let examined = promises::generations_in_log(&log).unwrap_or_else(|broken| panic!("{broken}"));
                expect_examined(evidence, examined, GENERATIONS);
                let is_missed = |flush: &usize| promises::generations_in_log(&log.without_flush(*flush)).is_err();
                let missed = (0..log.flushes()).filter(is_missed).count() as u64;
                assert!(missed >= GENERATIONS - 1, "only {missed} of {} flushes would be missed", log.flushes());
            }),
        )
        .claim(
            Claim::new(
                "every_acknowledged_transaction_survives_at_each_moment_of_the_write_log",
                "Whenever something of redb's next transaction is written, all transactions before it are found in what \
                 a power loss leaves, byte for byte.",
                TRANSACTIONS_JOB,
                transactions(TRANSACTIONS_SENT, "sent"),
            )
            .check(|evidence| {
                let held = transactions_in_log(evidence, &log_of(evidence, TRANSACTIONS_SENT));
                let examined = held.unwrap_or_else(|broken| panic!("{broken}"));
                expect_examined(evidence, examined, TRANSACTIONS);
            }),
        )
        .claim(
            Claim::new(
                "a_sync_without_flush_is_found_out_in_the_write_log",
                "The same job on an engine whose Flush commands are lost on their way breaks its promises, and the replay \
                 says so.",
                GENERATIONS_JOB,
                generations(GENERATIONS_LOST, "lost"),
            )
            .check(|evidence| {
                expect_no_flush(evidence, GENERATIONS_LOST);
                expect_broken(promises::generations_in_log(&log_of(evidence, GENERATIONS_LOST)));
            }),
        )
        .claim(
            Claim::new(
                "a_transaction_without_flush_is_found_out_in_the_write_log",
                "The same of redb's transactions.",
                TRANSACTIONS_JOB,
                transactions(TRANSACTIONS_LOST, "lost"),
            )
            .check(|evidence| {
                expect_no_flush(evidence, TRANSACTIONS_LOST);
                expect_broken(transactions_in_log(evidence, &log_of(evidence, TRANSACTIONS_LOST)));
            }),
        )
}

fn power_loss() -> Boot {
    let until =
        |(_, _, drive): (u8, u32, &str), after: u64| json!({"power_loss": {"drive": drive, "after": after}});
    let job = |name, proves, job, controller, flushes, after| {
        Claim::new(name, proves, job, arguments(controller, flushes, until(controller, after)))
    };
    let drive = |name: &str| Drive { image: Image::ForgetfulServer, ..Drive::new(name, SIZE_MIB) };
    let mut boot = boot("power-loss", drive)
        .claim(
            job(
                "what_sync_promised_survives_a_device_that_forgets_its_cache",
                "A device loses its write cache in the middle of the work: every generation that a sync had promised is on \
                 the medium.",
                GENERATIONS_JOB,
                GENERATIONS_SENT,
                "sent",
                25,
            )
            .check(|evidence| generations_in_image(evidence, GENERATIONS_SENT).unwrap_or_else(|broken| panic!("{broken}"))),
        )
        .claim(
            job(
                "every_acknowledged_transaction_survives_a_device_that_forgets_its_cache",
                "The same of redb's transactions, which are found byte for byte.",
                TRANSACTIONS_JOB,
                TRANSACTIONS_SENT,
                "sent",
                25,
            )
            .check(|evidence| transactions_in_image(evidence, TRANSACTIONS_SENT).unwrap_or_else(|broken| panic!("{broken}"))),
        )
        .claim(
            job(
                "a_sync_without_flush_is_found_out_by_a_device_that_forgets_its_cache",
                "The same job on an engine whose Flush commands are lost on their way leaves less than was promised.",
                GENERATIONS_JOB,
                GENERATIONS_LOST,
                "lost",
                10,
            )
            .check(|evidence| {
                expect_no_flush(evidence, GENERATIONS_LOST);
                expect_broken(generations_in_image(evidence, GENERATIONS_LOST));
            }),
        )
        .claim(
            job(
                "a_transaction_without_flush_is_found_out_by_a_device_that_forgets_its_cache",
                "The same of redb's transactions.",
                TRANSACTIONS_JOB,
                TRANSACTIONS_LOST,
                "lost",
                10,
            )
            .check(|evidence| {
                expect_no_flush(evidence, TRANSACTIONS_LOST);
                expect_broken(transactions_in_image(evidence, TRANSACTIONS_LOST));
            }),
        );
    boot.attend = lose_power;
    boot
}

/// The device whose drive is named has a power failure of its own: its server is killed.
fn lose_power(attendant: &mut Attendant<'_>, what: &str, arguments: &Value) -> Result<Value, String> {
    let drive = arguments["drive"].as_str().unwrap_or_default();
    match attendant.servers.iter().find(|server| server.drive == drive) {
        Some(server) if what == "lose_power" => {
            server.lose_power().map_err(|error| error.to_string())?;
            Ok(Value::Null)
        }
        _ => Err(format!("this boot's host doesn't know how to do {what:?} with {arguments}")),
    }
}

fn log_of(evidence: &Evidence<'_>, (_, _, drive): (u8, u32, &str)) -> WriteLog {
    let path = evidence.machine.drive_named(drive).log_path(evidence.run);
    WriteLog::read(&path).unwrap_or_else(|error| panic!("{error}"))
}

fn transactions_in_log(evidence: &Evidence<'_>, log: &WriteLog) -> Result<Examined, String> {
    let sampling =
        Sampling { size_bytes: SIZE_MIB << 20, seed: seed(), moments: 60, directory: evidence.run };
    promises::transactions_in_log(log, &sampling)
}

/// `$FOLIANT_LAB_SEED`, or another one each time; what goes wrong is told with it.
fn seed() -> u64 {
    let given = std::env::var("FOLIANT_LAB_SEED").ok().and_then(|text| text.parse().ok());
    given.unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::from(since.subsec_nanos()))
    })
}

/// The last promise that the host was told of, and the one that the failure met.
fn promised_and_begun(evidence: &Evidence<'_>) -> (u64, u64) {
    let promised = evidence.facts::<u64>("promised").into_iter().max().expect("there were promises");
    let begun = evidence.fact::<Value>("ended")["number"].as_u64().expect("a number");
    assert!(begun == promised + 1, "promise {begun} failed, and the last that was made is {promised}");
    (promised, begun)
}

fn generations_in_image(evidence: &Evidence<'_>, (_, _, drive): (u8, u32, &str)) -> Result<(), String> {
    let (promised, begun) = promised_and_begun(evidence);
    promises::generations_in_image(
        &evidence.machine.drive_named(drive).image_path(evidence.run),
        promised,
        begun,
    )
}

fn transactions_in_image(evidence: &Evidence<'_>, (_, _, drive): (u8, u32, &str)) -> Result<(), String> {
    let (promised, begun) = promised_and_begun(evidence);
    promises::transactions_in_image(
        &evidence.machine.drive_named(drive).image_path(evidence.run),
        promised,
        begun,
    )
}

/// The log was worth looking at: all of the work is in it, and a cache to lose.
fn expect_examined(evidence: &Evidence<'_>, examined: Examined, newest: u64) {
    assert_eq!(evidence.facts::<u64>("promised").last(), Some(&newest), "the last promise");
    assert_eq!(examined.newest, newest, "the newest in the log");
    assert!(examined.moments as u64 > newest && examined.with_pending as u64 > newest, "{examined:?}");
}

/// The device got no Flush, though the engine sent some.
fn expect_no_flush(evidence: &Evidence<'_>, (_, nsid, _): (u8, u32, &str)) {
    assert!(evidence.fact::<u64>("flush_commands") > 0, "the engine sent flushes");
    assert_eq!(evidence.trace.count(nsid, FLUSH), 0, "flushes that reached the device");
}

fn expect_broken<T>(held: Result<T, String>) {
    assert!(held.is_err(), "the promises were kept without a single Flush: the check would notice nothing");
}
