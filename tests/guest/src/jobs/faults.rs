//! Devices whose medium fails, by the fault injection of the host's block layer: what the engine makes of it.

use foliant::{CommandError, Engine, Error, Mapping, MappingOptions, Operation};
use foliant_guest::pattern;
use foliant_nvme_spec::StatusCode;
use serde::Deserialize;

use super::Job;
use crate::context::Context;
use crate::device;

pub(super) const JOBS: &[(&str, Job)] = &[
    ("read_fails", read_fails),
    ("write_fails", write_fails),
    ("write_fails_in_passing", write_fails_in_passing),
    ("flush_fails", flush_fails),
];

#[derive(Deserialize)]
struct Faulty {
    address: String,
    /// The page that can't be read, or not be written.
    page: u64,
}

const PAGE: u64 = foliant::PAGE_BYTES as u64;

fn open(address: &str) -> (Engine, Mapping) {
    let engine = device::engine(address, &device::engine_options(4, 1));
    let mapping = engine.mapping(&MappingOptions::default()).expect("the mapping opens");
    (engine, mapping)
}

fn expect_device_error(error: &Error, operation: Operation, status: StatusCode) {
    match error {
        Error::Device { operation: found, source: CommandError::Status(given), .. } => {
            assert_eq!(*found, operation, "{error}");
            assert_eq!(given.code(), status, "{error}");
        }
        other => panic!("not the device's error but: {other}"),
    }
}

/// A page that can't be read is an error for who wants it, each time, and for nobody else.
fn read_fails(context: &Context<'_>) {
    let Faulty { address, page } = context.arguments();
    let (engine, mapping) = open(&address);
    let mut bytes = [1; PAGE as usize];
    for neighbour in [page - 1, page + 1] {
        mapping.read_at(neighbour * PAGE, &mut bytes).expect("the neighbours can be read");
    }
    for _ in 0..2 {
        let error = mapping.read_at(page * PAGE, &mut bytes).expect_err("the page can't be read");
        expect_device_error(&error, Operation::Read, StatusCode::UNRECOVERED_READ_ERROR);
    }
    context.fact("words", mapping.pin(page).expect_err("the page can't be pinned").to_string());
    mapping.read_at((page - 1) * PAGE, &mut bytes).expect("the neighbour is still there");
    // Written whole, the page needs no read.
    mapping
        .write_at(page * PAGE, &pattern::bytes(3, page * PAGE, PAGE as usize))
        .expect("the page can be filled");
    mapping.sync().expect("writes don't fail here");
    engine.close().expect("the engine closes");
}

/// A page that can't be written once: it is tried again, and the sync succeeds.
fn write_fails_in_passing(context: &Context<'_>) {
    let Faulty { address, page } = context.arguments();
    let (engine, mapping) = open(&address);
    mapping
        .write_at(page * PAGE, &pattern::bytes(7, page * PAGE, PAGE as usize))
        .expect("the cache takes a page");
    mapping.sync().expect("the second try succeeds");
    let stats = engine.stats();
    assert_eq!((stats.command_retries, stats.dirty_pages), (1, 0));
    engine.close().expect("the engine closes");
}

/// A page that can't be written, however often it is tried: the sync says so, the page stays, and the next sync brings it
/// down.
fn write_fails(context: &Context<'_>) {
    let Faulty { address, page } = context.arguments();
    let (engine, mapping) = open(&address);
    let other = mapping.clone();
    for written in page - 2..page + 3 {
        let data = pattern::bytes(4, written * PAGE, PAGE as usize);
        mapping.write_at(written * PAGE, &data).expect("the cache takes a page");
    }
    let error = mapping.sync().expect_err("a page couldn't be written");
    context.fact("words", error.to_string());
    expect_device_error(&error, Operation::Write, StatusCode::WRITE_FAULT);
    mapping.sync().expect("the medium has recovered, and this handle has been told");
    other.sync().expect_err("the other handle hasn't been told");
    other.sync().expect("now it has");
    assert!(engine.stats().command_errors >= 1);
    engine.close().expect("the engine closes");
}

/// A flush that fails leaves unknown what is durable: nothing is written any more until the device is opened anew.
fn flush_fails(context: &Context<'_>) {
    let Faulty { address, page } = context.arguments();
    let (engine, mapping) = open(&address);
    mapping
        .write_at(page * PAGE, &pattern::bytes(5, page * PAGE, PAGE as usize))
        .expect("the cache takes a page");
    let error = mapping.sync().expect_err("the flush fails");
    context.fact("words", error.to_string());
    match &error {
        Error::NamespaceFailed { source: CommandError::Status(status), .. } => {
            assert_eq!(status.code(), StatusCode::WRITE_FAULT, "{error}");
        }
        other => panic!("not the flush's error but: {other}"),
    }
    let again =
        mapping.write_at(0, b"no").and_then(|()| mapping.sync()).expect_err("the namespace is latched");
    assert!(matches!(again, Error::NamespaceFailed { .. }), "{again}");
    drop(mapping);
    drop(engine.close());

    let (engine, mapping) = open(&address);
    mapping
        .write_at(page * PAGE, &pattern::bytes(6, page * PAGE, PAGE as usize))
        .expect("the cache takes a page");
    mapping.sync().expect("opened anew, the device flushes");
    engine.close().expect("the engine closes");
}
