//! The atomics of the lock-free protocols, exchangeable for `loom`'s.
//!
//! `cache::eof`, `cache::folio`, `cache::index`, `cache::tags`, `free_slots`, `shard::doze` and `writeback::durable` take theirs
//! from here and nowhere else, so that `RUSTFLAGS="--cfg loom"` model-checks the code that ships and not a
//! copy of it.

#[cfg(loom)]
pub(crate) use loom::sync::Mutex;
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::Mutex;
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

/// Passes the time between two looks at what another thread is about to change: the processor's pause, and the core to others
/// now and then.
#[cfg(not(loom))]
pub(crate) fn pause(look: u32) {
    if look % 64 == 63 { std::thread::yield_now() } else { std::hint::spin_loop() }
}

/// For models: somebody else has to go on.
#[cfg(loom)]
pub(crate) fn pause(_look: u32) {
    loom::thread::yield_now();
}
