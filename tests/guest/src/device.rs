//! A controller over VFIO, as the jobs open it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use foliant::{Engine, EngineOptions};
use foliant_nvme::{ControllerOptions, Transport};
use foliant_tests::conformance::Host;

use crate::bind;

/// The device URI of the function at `address`; a URI stays as it is.
pub(crate) fn uri(address: &str) -> String {
    if address.starts_with("vfio") { address.to_owned() } else { format!("vfio:{address}") }
}

/// As [`uri`], after vfio-pci has got the function, if it hadn't yet.
fn bound(address: &str) -> String {
    let uri = uri(address);
    let function = uri.split_once(':').map_or("", |(_, rest)| rest);
    bind::to_vfio(function.split_once('?').map_or(function, |(function, _)| function));
    uri
}

/// Opens the transport of the function at `address`, or of a URI.
pub(crate) fn transport(address: &str) -> Arc<dyn Transport> {
    let uri = bound(address);
    foliant::transport(&uri).unwrap_or_else(|error| panic!("{error}"))
}

/// Options of the driver that suit a small guest.
pub(crate) fn driver_options() -> ControllerOptions {
    ControllerOptions { io_queue_entries: 64, arena_bytes: 16 << 20, ..ControllerOptions::default() }
}

/// Options of the engine that suit a small guest: `cache_mib` MiB of cache.
pub(crate) fn engine_options(cache_mib: u64, shards: usize) -> EngineOptions {
    EngineOptions { cache_bytes: cache_mib << 20, shards, queue_entries: 64, ..EngineOptions::default() }
}

/// The driver on the controller at `address`.
pub(crate) fn host(address: &str) -> Host {
    Host::open(transport(address), &driver_options()).unwrap_or_else(|error| panic!("{address}: {error}"))
}

/// The engine on the controller at `address`.
pub(crate) fn engine(address: &str, options: &EngineOptions) -> Engine {
    Engine::open(&bound(address), options).unwrap_or_else(|error| panic!("{error}"))
}

/// Waits until `done` says so.
///
/// # Panics
/// When it doesn't within `limit`.
pub(crate) fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
