//! A userspace NVMe driver: one [`Controller`], its [`Namespace`]s, and polled [`QueuePair`]s with one owner each.
//!
//! The driver owns the rings, the command identifiers and the memory it shares with the device, for as long as
//! the device may touch it. It starts no thread, takes no lock and allocates nothing on the data path, and it
//! knows no transport: registers and DMA mappings come through
//! [`Transport`]. It caches nothing and reorders nothing.
//!
//! ```text
//!  Controller::open ─► registers (reset, enable) ─► admin queue ─► identify, features, namespaces
//!        │
//!        └─ queue_pair() ─► QueuePair ── submit ─► split ─► prp ─► ring ──doorbell──► device
//!                                     ◄─ poll ◄── slots ◄── ring ◄─────────────────────┘
//! ```
//!
//! Reading one block and waiting for it by polling:
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use foliant_nvme::{Controller, ControllerOptions, DmaBuffer, Io, Lba, Transport};
//! # fn example(transport: Arc<dyn Transport>) -> Result<(), Box<dyn std::error::Error>> {
//! let controller = Controller::open(transport, &ControllerOptions::default())?;
//! let namespace = controller.namespace(1).ok_or("no namespace 1")?;
//! let mut queue = controller.queue_pair::<DmaBuffer>()?;
//!
//! let buffer = controller.arena().allocate(namespace.block_bytes() as usize)?;
//! queue.submit(namespace, Io::Read { lba: Lba(0), blocks: 1 }, buffer)?;
//! queue.ring();
//! let mut completion = None;
//! while completion.is_none() {
//!     queue.pump();
//!     queue.poll(1, |ended| completion = Some(ended))?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Four rules hold everywhere:
//!
//! 1. Memory that the device may touch is owned by the driver: a [`Payload`] moves into
//!    [`QueuePair::submit`] and comes back in its [`Completion`], after every command that names it has completed.
//! 2. A device that misbehaves is an error that fails a queue or the controller, never a panic.
//! 3. Every wait has a deadline and takes a register that reads all ones for a device that is gone.
//! 4. DMA memory is unmapped and freed only once the controller is disabled or can't reach memory any more;
//!    where neither can be had, it is leaked on purpose.
//!
//! Read [`Controller`] first, then [`QueuePair`].

mod admin;
mod arena;
mod controller;
mod device;
mod error;
mod hugepages;
mod identity;
mod lists;
mod namespace;
mod payload;
mod placement;
mod prp;
mod queue;
mod region;
mod registers;
mod request;
mod ring;
mod sleep;
mod slots;
mod split;
mod stats;
mod wait;

#[cfg(test)]
mod fake;

pub use arena::{DmaArena, DmaBuffer};
pub use controller::{Controller, ControllerOptions, Hugepages};
pub use error::{ArenaError, CommandError, DriverError, QueueError, Rejected, SubmitError};
pub use identity::ControllerIdentity;
pub use namespace::{Lba, Namespace};
pub use payload::{Payload, Segment};
pub use placement::NodePart;
pub use queue::QueuePair;
pub use region::ArenaBacking;
pub use request::{Completion, Deallocation, Fua, Io};
pub use sleep::Wakeup;
pub use stats::QueueStats;

pub use foliant_nvme_spec::{Status, StatusCode};
pub use foliant_nvme_transport::{Iova, Pumped, Transport};
