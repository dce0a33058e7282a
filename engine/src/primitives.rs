//! The atomics of the lock-free protocols, exchangeable for `loom`'s.
//!
//! `cache::folio`, `cache::index`, `cache::tags`, `free_slots`, `shard::doze` and `writeback::durable` take their atomics
//! from here and nowhere else, so that `RUSTFLAGS="--cfg loom"` model-checks the code that ships and not a
//! copy of it.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
