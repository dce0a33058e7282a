//! Promises, and a device that may lose what wasn't flushed: generations of pages by `sync`, transactions by redb.
//!
//! Each promise is told to the host as soon as it is made. Some jobs go on until the device has lost its power, which
//! the host sees to while they are at work; what they had been promised must then be on the medium.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use foliant::{Engine, Mapping, MappingOptions};
use foliant_guest::generations;
use foliant_guest::transactions::Transactions;
use foliant_nvme::Transport;
use serde::Deserialize;
use serde_json::json;

use super::Job;
use crate::context::Context;
use crate::device;
use crate::forgetful::Forgetful;

pub(super) const JOBS: &[(&str, Job)] =
    &[("promise_generations", generations), ("promise_transactions", transactions)];

#[derive(Deserialize)]
struct Promises {
    address: String,
    nsid: u32,
    size_bytes: u64,
    flushes: Flushes,
    until: Until,
}

/// What becomes of the engine's flushes.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Flushes {
    /// They reach the device.
    Sent,
    /// They are lost on the way, and the engine is told that they succeeded.
    Lost,
}

/// When a job is over.
#[derive(Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Until {
    /// After so many promises.
    Count(u64),
    /// When the device has lost its power, which the host is asked for after so many promises.
    PowerLoss { drive: String, after: u64 },
}

/// More than any job makes: a device that never fails ends it here.
const PROMISES_MAX: u64 = 100_000;

fn generations(context: &Context<'_>) {
    let promises: Promises = context.arguments();
    let engine = open(&promises);
    let options = MappingOptions { namespace: promises.nsid, ..MappingOptions::default() };
    let mapping = engine.mapping(&options).expect("the mapping opens");
    run(context, &promises.until, |generation| {
        write_generation(&mapping, generation)?;
        mapping.sync()
    });
    drop(mapping);
    end(context, engine, &promises.until);
}

fn write_generation(mapping: &Mapping, generation: u64) -> foliant::Result<()> {
    let all: Vec<u64> = generations::pages().collect();
    thread::scope(|scope| {
        let write = |pages: &[u64]| {
            pages.iter().try_for_each(|&page| {
                mapping
                    .write_at(page * foliant::PAGE_BYTES as u64, &generations::page_bytes(generation, page))
            })
        };
        let (one, other) = all.split_at(all.len() / 2);
        let beside = scope.spawn(move || write(one));
        write(other).and(beside.join().expect("a writer doesn't panic"))
    })
}

fn transactions(context: &Context<'_>) {
    let promises: Promises = context.arguments();
    let engine = open(&promises);
    let transactions =
        Transactions::open(&engine, promises.nsid, promises.size_bytes).expect("the database opens");
    run(context, &promises.until, |number| transactions.commit(number));
    drop(transactions);
    end(context, engine, &promises.until);
}

fn open(promises: &Promises) -> Engine {
    let mut transport = device::transport(&promises.address);
    if let Flushes::Lost = promises.flushes {
        let forgetful: Arc<dyn Transport> = Forgetful::new(transport);
        transport = forgetful;
    }
    // A small cache, two shards, and a flusher that writes what nobody has synced yet.
    let mut options = device::engine_options(2, 2);
    options.dirty_background_percent = 2;
    Engine::open_on(transport, &options).expect("the engine opens")
}

/// Makes promises, one after the other, and tells the host of each before the next begins.
fn run<E: Display>(context: &Context<'_>, until: &Until, promise: impl Fn(u64) -> Result<(), E> + Sync) {
    match until {
        Until::Count(count) => (1..=*count).for_each(|number| {
            promise(number).unwrap_or_else(|error| panic!("promise {number}: {error}"));
            context.fact("promised", number);
        }),
        Until::PowerLoss { drive, after } => {
            let (tell, hear) = mpsc::channel();
            let promise = &promise;
            thread::scope(|scope| {
                let worker = scope.spawn(move || {
                    for number in 1..PROMISES_MAX {
                        if let Err(error) = promise(number) {
                            return (number, error.to_string());
                        }
                        context.fact("promised", number);
                        if number == *after {
                            tell.send(()).expect("the job listens");
                        }
                    }
                    panic!("{PROMISES_MAX} promises, and the device still has power");
                });
                // The worker goes on while the host is asked, and meets the failure wherever it is.
                let had_begun = hear.recv().is_ok();
                if had_begun {
                    context.ask("lose_power", json!({"drive": drive}));
                }
                let (number, error) = worker.join().expect("the worker doesn't panic");
                assert!(had_begun, "promise {number}: {error}");
                context.fact("ended", json!({"number": number, "error": error}));
            });
        }
    }
}

/// Closes the engine, unless its device has failed as it was to.
fn end(context: &Context<'_>, engine: Engine, until: &Until) {
    context.fact("flush_commands", engine.stats().flush_commands);
    if let Until::Count(_) = until {
        engine.close().expect("the engine closes");
    }
}
