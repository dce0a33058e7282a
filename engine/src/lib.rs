//! Foliant: a userspace NVMe storage engine that a database embeds.
//!
//! A page cache with the writeback semantics of a kernel, on a polled NVMe driver, in one process: a hit is a
//! memory access and two atomic operations, a flush is a batch of zero-copy commands in ascending order, and
//! `sync` means what it says.
//!
//! ```
//! use foliant::{Engine, EngineOptions, MappingOptions};
//!
//! # fn main() -> Result<(), foliant::Error> {
//! let engine = Engine::open("emu:ram?size=64MiB", &EngineOptions::default())?;
//! let mapping = engine.mapping(&MappingOptions::default())?;
//!
//! mapping.write_at(12_345, b"any offset, any length")?;
//! {
//!     let mut page = mapping.pin_mut(7)?; // exclusive, in place, dirty when released
//!     page[..5].copy_from_slice(b"hello");
//! }
//! mapping.sync()?; // power may fail from here on: both writes are on the device
//!
//! let page = mapping.pin(7)?; // shared, in place, no copy
//! assert_eq!(&page[..5], b"hello");
//! drop(page);
//! engine.close()
//! # }
//! ```
//!
//! # Where to read on
//!
//! [`Engine`] opens a device, [`Mapping`] is a range of it, [`PagePin`] and [`PagePinMut`] are pages in place. With
//! the feature `redb`, `redb_storage` puts the redb database engine on a mapping. How it works inside is told
//! by `ARCHITECTURE.md`.

mod cache;
mod device;
mod engine;
mod error;
mod fork;
mod free_slots;
mod gate;
mod local;
mod mapping;
mod mirror;
mod numa;
mod observe;
mod options;
mod page_list;
mod pin;
mod primitives;
#[cfg(feature = "redb")]
pub mod redb_storage;
mod reply;
mod shard;
mod share;
mod stats;
mod table;
mod writeback;

pub use cache::frames::PAGE_BYTES;
pub use cache::lsn::Lsn;
pub use cache::shape::Stability;
pub use device::transport;
pub use engine::Engine;
pub use error::{Error, Held, LsnOf, Operation, Result};
pub use foliant_nvme::{ArenaBacking, CommandError, ControllerIdentity, Iova, Lba, Namespace, Wakeup};
pub use gate::Gate;
pub use local::{LocalMapping, LocalShards};
pub use mapping::optimistic::PageView;
pub use mapping::{Advice, Mapping, MappingOptions, ReadAt, RetryPolicy};
pub use mirror::{
    LabelState, MirrorCause, MirrorDevice, MirrorLabel, MirrorOptions, MirrorRole, MirrorState, OnDegrade,
};
pub use observe::{
    EngineState, LatencyHistogram, Metric, MetricKind, ShardRecord, StatsPage, StatsReader, StatsSnapshot,
    stats_directories,
};
pub use options::{EngineOptions, Hugepages, ShardThreads};
pub use pin::{PagePin, PagePinMut};
pub use reply::block_until;
pub use shard::balance::DirtyMemory;
pub use shard::{Shard, Step};
pub use share::{CacheShare, ShareOptions, ShareUsage};
pub use stats::EngineStats;
pub use writeback::callback::{Disposition, WritebackCallback};
pub use writeback::control::{
    Context, PassEnd, Reason, SyncMode, WritebackControl, WritebackOutcome, WritebackRange,
};
pub use writeback::events::WRITEBACK_TARGET;
pub use writeback::guard::ReclaimScope;
pub use writeback::pass::{DirtyFolio, LockedFolio, Pass, PassStep, WritebackPass};

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;

/// And that of the stats page.
#[cfg(doctest)]
#[doc = include_str!("../../docs/observing.md")]
struct Observing;

/// So does the one of the write-ahead gate.
#[cfg(doctest)]
#[doc = include_str!("../../docs/write-ahead.md")]
struct WriteAhead;
