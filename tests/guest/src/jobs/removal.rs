//! Devices that leave: asked for politely, or cut off in the middle of their work.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use foliant::{Engine, EngineOptions, Mapping, MappingOptions};
use foliant_guest::pattern;
use serde::Deserialize;
use serde_json::json;

use super::Job;
use crate::bind;
use crate::context::Context;
use crate::device;

pub(super) const JOBS: &[(&str, Job)] = &[("unplug", unplug), ("die", die)];

#[derive(Deserialize)]
struct Leaving {
    /// The device that leaves, behind a root port.
    address: String,
    /// The root port's address.
    port: String,
    /// A device that stays.
    other: String,
    seed: u64,
}

const PAGES: u64 = 48;
const PAGE: u64 = foliant::PAGE_BYTES as u64;
const LIMIT: Duration = Duration::from_secs(60);

/// The system wants the device back while a sync is under way: the work ends well, the engine is told, and closing it
/// lets the device go. An engine on another device notices nothing.
fn unplug(context: &Context<'_>) {
    let Leaving { address, other, seed, .. } = context.arguments();
    let (engine, mapping) = open(&address, EngineOptions::default().command_timeout);
    let (other_engine, other_mapping) = open(&other, EngineOptions::default().command_timeout);
    assert!(!engine.is_release_requested());
    dirty(&mapping, seed);
    thread::scope(|scope| {
        let sync = scope.spawn(|| mapping.sync());
        device::wait_until("a write is under way", LIMIT, || engine.stats().write_commands > 0);
        context.ask("unplug", json!({}));
        device::wait_until("the request arrives", LIMIT, || engine.is_release_requested());
        sync.join().expect("no panic").expect("what is under way ends well: the device is still there");
    });
    mapping.close().expect("the mapping closes");
    engine.close().expect("the engine closes");
    device::wait_until("the device leaves", LIMIT, || !bind::function(&address).exists());
    context.ask("unplugged", json!({}));
    use_up(&other_mapping, seed);
    other_engine.close().expect("the other engine closes");
}

/// The device stops answering while commands are in flight: they fail in bounded time, and the process lives.
fn die(context: &Context<'_>) {
    let Leaving { address, port, other, seed } = context.arguments();
    let (engine, mapping) = open(&address, Duration::from_secs(2));
    let (other_engine, other_mapping) = open(&other, Duration::from_secs(2));
    dirty(&mapping, seed);
    let begun = Instant::now();
    let words = thread::scope(|scope| {
        let sync = scope.spawn(|| mapping.sync());
        device::wait_until("a write is under way", LIMIT, || engine.stats().write_commands > 0);
        cut_off(&port);
        sync.join().expect("no panic").expect_err("the device is dead").to_string()
    });
    context.fact("words", words);
    // Whatever waits, ends: a cold page, a sync, a page that was in the cache.
    let cold = mapping.read_at((PAGES + 1000) * PAGE, &mut [0; 8]).expect_err("nothing can be read any more");
    context.fact("cold_words", cold.to_string());
    mapping.sync().expect_err("nothing can be made durable any more");
    assert!(begun.elapsed() < LIMIT, "the process was held up for {:?}", begun.elapsed());
    use_up(&other_mapping, seed);
    drop(mapping);
    let closed = engine.close();
    context.fact("close", format!("{closed:?}"));
    other_engine.close().expect("the other engine closes");
}

fn open(address: &str, command_timeout: Duration) -> (Engine, Mapping) {
    let options = EngineOptions { command_timeout, ..device::engine_options(4, 1) };
    let engine = device::engine(address, &options);
    let mapping = engine.mapping(&MappingOptions::default()).expect("the mapping opens");
    (engine, mapping)
}

/// Dirties pages that lie apart, so that each becomes a command of its own.
fn dirty(mapping: &Mapping, seed: u64) {
    for page in 0..PAGES {
        let offset = page * 2 * PAGE;
        mapping
            .write_at(offset, &pattern::bytes(seed, offset, PAGE as usize))
            .expect("the cache takes a page");
    }
}

/// Shows that a device is well.
fn use_up(mapping: &Mapping, seed: u64) {
    dirty(mapping, seed);
    mapping.sync().expect("the other device is well");
    let mut page = vec![0; PAGE as usize];
    mapping.read_at(1001 * PAGE, &mut page).expect("a cold page of the other device");
}

/// Switches the bridge off behind which the device lies: nothing reaches it, and it reaches nothing.
fn cut_off(port: &str) {
    let config = bind::function(port).join("config");
    let file = File::options().write(true).open(&config).expect("the port's config space opens");
    file.write_all_at(&[0, 0], 4).expect("the port's command register takes zeroes");
}
