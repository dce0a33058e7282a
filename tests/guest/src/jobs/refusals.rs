//! Devices that can't be opened: each refusal in its words, in bounded time, with nothing changed.

use foliant::Engine;
use serde::Deserialize;

use super::Job;
use crate::bind;
use crate::context::Context;
use crate::device;

pub(super) const JOBS: &[(&str, Job)] =
    &[("open_fails", open_fails), ("refusals", refusals), ("addresses_are_narrow", addresses_are_narrow)];

#[derive(Deserialize)]
struct Refusal {
    /// Name of the function to bind to vfio-pci before; to be given back afterwards.
    #[serde(default)]
    bind: Option<String>,
    uri: String,
    /// What the refusal must say.
    words: Vec<String>,
}

#[derive(Deserialize)]
struct Refusals {
    all: Vec<Refusal>,
}

/// Opening the device fails, with these words.
fn open_fails(context: &Context<'_>) {
    check(context, &context.arguments());
}

/// Several of them, one after the other.
fn refusals(context: &Context<'_>) {
    let Refusals { all } = context.arguments();
    for refusal in &all {
        check(context, refusal);
    }
}

fn check(context: &Context<'_>, refusal: &Refusal) {
    let Refusal { bind: bound, uri, words } = refusal;
    if let Some(address) = bound {
        bind::to_vfio(address);
    }
    let error = match Engine::open(uri, &device::engine_options(4, 1)) {
        Ok(_) => panic!("{uri} opens, and should not"),
        Err(error) => error.to_string(),
    };
    for word in words {
        assert!(error.contains(word.as_str()), "{word:?} is missing in: {error}");
    }
    context.fact("refusal", error);
    if let Some(address) = bound {
        assert_eq!(bind::driver(address).as_deref(), Some("vfio-pci"), "the function is as it was");
    }
}

#[derive(Deserialize)]
struct Narrow {
    address: String,
    bits: u32,
}

/// Where the IOMMU translates few bits, every address that the device is given lies within them.
fn addresses_are_narrow(context: &Context<'_>) {
    let Narrow { address, bits } = context.arguments();
    let host = device::host(&address);
    let buffers: Vec<_> = std::iter::from_fn(|| host.controller.arena().allocate(1 << 20).ok()).collect();
    assert!(buffers.len() >= 8, "the arena has room");
    for buffer in &buffers {
        let end = buffer.iova().0 + buffer.len_bytes() as u64;
        assert!(end <= 1 << bits, "{end:#x} needs more than {bits} bits");
    }
    drop(buffers);
    host.shut_down();
    context.fact("bits", bits);
}
