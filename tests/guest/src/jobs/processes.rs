//! Processes: killed ones, second ones, and those of an ordinary user.

use std::os::unix::fs::chown;
use std::thread;
use std::time::Duration;

use foliant::{Engine, Mapping, MappingOptions};
use foliant_guest::pattern;
use rustix::process::{Resource, Rlimit, setrlimit};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Job;
use crate::bind;
use crate::context::{Context, ORDINARY_UID, User};
use crate::device;

pub(super) const JOBS: &[(&str, Job)] = &[
    ("killed_in_mid_write", killed_in_mid_write),
    ("write_generations", write_generations),
    ("second_process", second_process),
    ("hold", hold),
    ("ordinary_user", ordinary_user),
];

#[derive(Clone, Deserialize, Serialize)]
struct Device {
    address: String,
}

const PAGE: u64 = foliant::PAGE_BYTES as u64;
/// Pages that each generation writes.
const PAGES: u64 = 256;
/// Generations have the seeds from here on.
const FIRST: u64 = 1000;

fn open(address: &str) -> (Engine, Mapping) {
    let engine = device::engine(address, &device::engine_options(4, 2));
    let mapping = engine.mapping(&MappingOptions::default()).expect("the mapping opens");
    (engine, mapping)
}

/// Writes the same pages again and again, each time with another pattern, and says so after each sync.
fn write_generations(context: &Context<'_>) {
    let Device { address } = context.arguments();
    let (_engine, mapping) = open(&address);
    for seed in FIRST.. {
        for page in 0..PAGES {
            let data = pattern::bytes(seed, page * PAGE, PAGE as usize);
            mapping.write_at(page * PAGE, &data).expect("the cache takes a page");
        }
        mapping.sync().expect("the sync succeeds");
        context.fact("synced", seed);
    }
}

/// A process is killed while it writes. The controller it leaves behind, enabled and busy, is taken over at once, and
/// every page is of the last generation that was synced, or a newer one.
fn killed_in_mid_write(context: &Context<'_>) {
    let device: Device = context.arguments();
    for round in 0..3 {
        let mut child = context.child("write_generations", &device, User::Root);
        let mut synced = 0;
        for _ in 0..2 + round {
            synced = child.fact("synced").as_u64().expect("a seed");
        }
        // Somewhere in the next generation; where, differs from run to run.
        thread::sleep(Duration::from_millis(3 + 7 * round));
        child.kill();

        let (engine, mapping) = open(&device.address);
        let mut page = vec![0; PAGE as usize];
        let mut newer = 0;
        for index in 0..PAGES {
            mapping.read_at(index * PAGE, &mut page).expect("the page can be read");
            let of = |seed: &u64| pattern::compare(*seed, index * PAGE, &page).is_ok();
            let generation = (synced..synced + 100).find(of);
            let generation =
                generation.unwrap_or_else(|| panic!("page {index} is of no generation from {synced} on"));
            newer += u64::from(generation > synced);
        }
        context.fact("pages_newer_than_the_last_sync", newer);
        // The engine is as good as any.
        mapping.write_at(0, &page).expect("the cache takes a page");
        mapping.sync().expect("the sync succeeds");
        mapping.close().expect("the mapping closes");
        engine.close().expect("the engine closes");
    }
}

/// Opens the device and keeps it.
fn hold(context: &Context<'_>) {
    let Device { address } = context.arguments();
    let (_engine, _mapping) = open(&address);
    context.fact("open", true);
    thread::sleep(Duration::from_secs(3600));
}

/// A second process that wants the device is told who has it, and gets it when the first is gone.
fn second_process(context: &Context<'_>) {
    let device: Device = context.arguments();
    let mut child = context.child("hold", &device, User::Root);
    child.fact("open");
    let options = device::engine_options(4, 1);
    let refused = Engine::open(&device::uri(&device.address), &options).expect_err("the device is taken");
    let words = refused.to_string();
    assert!(words.contains("in use") && words.contains(&child.id().to_string()), "{words}");
    context.fact("words", words);
    child.kill();
    let (engine, _) = open(&device.address);
    engine.close().expect("the engine closes");
}

/// Root gives an ordinary user the group's node and a memory limit; all else the user does alone.
fn ordinary_user(context: &Context<'_>) {
    let arguments: Value = context.arguments();
    let address = arguments["address"].as_str().expect("an address");
    let refused = context.child(
        "open_fails",
        json!({"uri": device::uri(address), "words": ["no permission"]}),
        User::Ordinary,
    );
    refused.finish();

    let group = bind::group(address).expect("the device has a group");
    let node = format!("/dev/vfio/{group}");
    chown(&node, Some(ORDINARY_UID), Some(ORDINARY_UID)).expect("root gives the node away");

    limit_locked_memory(64 << 10);
    let words = json!(["locked-memory limit", "ulimit -l"]);
    let refused =
        context.child("open_fails", json!({"uri": device::uri(address), "words": words}), User::Ordinary);
    refused.finish();

    limit_locked_memory(256 << 20);
    context.child("engine_writes", &arguments, User::Ordinary).finish();
}

/// Sets how much memory this process and its children may lock, where they aren't privileged.
fn limit_locked_memory(bytes: u64) {
    let limit = Rlimit { current: Some(bytes), maximum: Some(256 << 20) };
    setrlimit(Resource::Memlock, limit).expect("root sets limits");
}
