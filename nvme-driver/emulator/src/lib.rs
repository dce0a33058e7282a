//! One NVMe controller, emulated in process: real registers, queues, doorbells and statuses over a file, memory, or
//! nothing at all.
//!
//! It serves three ends: a database that runs where there is no spare NVMe device, a bed for fault injection and
//! power-loss tests, and a yardstick that costs nothing itself (`null`). The driver reaches it through
//! [`Transport`](foliant_nvme_transport::Transport) like hardware, and shares nothing with it but the wire format.
//!
//! The device has **no thread**: whoever polls a queue pumps it
//! ([`QueueDrive`](foliant_nvme_transport::QueueDrive)). Register writes act at once, in the writing thread.
//!
//! ```
//! use foliant_nvme_emulated::{EmulatedConfig, EmulatedController};
//!
//! let config = EmulatedConfig::parse_uri("emu:ram?size=1GiB&lba=4096")?;
//! let controller = EmulatedController::new(config)?;
//! let transport = controller.attach()?;
//! assert_eq!(transport.name(), "emu:ram");
//! # Ok::<(), foliant_nvme_emulated::EmulatedError>(())
//! ```
//!
//! # What it implements
//! NVMe 1.4 with the NVM Command Set: the mandatory admin commands and log pages, Read, Write (FUA), Flush, Write
//! Zeroes (DEAC), Dataset Management, PRPs. It has no SGLs, metadata, interrupts, Compare or reservations, and says
//! so in Identify; what it doesn't have it refuses with the status that the specification gives.
//!
//! # Where to read on
//! [`config`] and [`uri`] say what can be asked for; `attachment` holds the registers and the lock order, `queue`
//! the life of an I/O command, `model` the rules of power loss, `backing` where the blocks live.

mod admin;
mod attachment;
mod backing;
pub mod bandwidth;
pub mod clock;
pub mod config;
mod controller;
mod dma;
pub mod fault;
mod features;
mod identify;
mod io;
mod log;
mod model;
pub mod observe;
mod prp;
mod queue;
mod registers;
mod ring;
pub mod stats;
mod sync;
pub mod uri;

#[cfg(test)]
mod tests;

use std::io::Error;
use std::path::PathBuf;

pub use bandwidth::Bandwidth;
pub use clock::{Clock, ManualClock};
pub use config::{Backing, ConfigError, Direct, EmulatedConfig, FileEngine, Latency, NamespaceConfig};
pub use controller::EmulatedController;
pub use fault::{Action, Fault, Match};
pub use model::PowerCut;
pub use observe::{EventObserver, ObservedCommand, ObservedEvent, ObservedSegment, Observer, Turn};
pub use stats::EmulatedStats;

/// Why an emulated controller couldn't do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmulatedError {
    /// The configuration breaks a limit.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The image file doesn't exist, and no size was given to create it with.
    #[error("{} doesn't exist; add size= to create it, for instance ?size=1GiB", path.display())]
    FileMissing {
        /// The path of the image.
        path: PathBuf,
    },
    /// The image file has another size than asked for. It is never shortened or lengthened.
    #[error(
        "{} has {file_bytes} bytes and {size_bytes} were asked for; leave size= out to take the file as it is, or \
         give another path for a new device", path.display()
    )]
    FileSizeDiffers {
        /// The path of the image.
        path: PathBuf,
        /// Its length in bytes.
        file_bytes: u64,
        /// The size of all namespaces together, in bytes.
        size_bytes: u64,
    },
    /// The image file's length isn't a whole number of blocks.
    #[error(
        "{} has {file_bytes} bytes, which is no whole number of {block_bytes}-byte blocks, or none; give the lba= \
         it was made with", path.display()
    )]
    FileSizeUnaligned {
        /// The path of the image.
        path: PathBuf,
        /// Its length in bytes.
        file_bytes: u64,
        /// The block size in bytes.
        block_bytes: u32,
    },
    /// The path names something else than a regular file.
    #[error("{} is no regular file; an emulated device lives in one", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// Another process, or another controller, has the image open.
    #[error("{} is in use by another controller; a device has one owner, close that one first", path.display())]
    FileInUse {
        /// The path of the image.
        path: PathBuf,
    },
    /// O_DIRECT was asked for and the file system refuses it.
    #[error(
        "{} can't be opened with O_DIRECT for {block_bytes}-byte blocks: {source}; use direct=auto, or a larger lba=",
        path.display()
    )]
    DirectRefused {
        /// The path of the image.
        path: PathBuf,
        /// The smallest block in bytes.
        block_bytes: u32,
        /// The system's answer.
        source: Error,
    },
    /// io_uring was asked for and the system refuses it.
    #[error(
        "io_uring isn't available for {}: {source}; allow it (kernel.io_uring_disabled=0, seccomp), or use \
         engine=auto", path.display()
    )]
    IoUringRefused {
        /// The path of the image.
        path: PathBuf,
        /// The system's answer.
        source: Error,
    },
    /// The operating system refused an operation on the image file.
    #[error("cannot {what} {}: {source}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The path of the image.
        path: PathBuf,
        /// The system's answer.
        source: Error,
    },
    /// Memory couldn't be reserved.
    #[error("cannot reserve {len_bytes} bytes of memory: {source}")]
    Memory {
        /// How much was asked for, in bytes.
        len_bytes: u64,
        /// The system's answer.
        source: Error,
    },
    /// A driver is attached already.
    #[error("{name} is attached already; drop the earlier transport first")]
    AlreadyAttached {
        /// The device.
        name: String,
    },
    /// Power can be cut only in the power-loss model.
    #[error("{name} keeps no versions to lose; configure it with power_loss_model (model=1)")]
    NoPowerLossModel {
        /// The device.
        name: String,
    },
    /// A range outside the medium was to be read.
    #[error("namespace {nsid} has no {len_bytes} bytes at {offset}")]
    ImageRange {
        /// The namespace asked for.
        nsid: u32,
        /// First byte asked for.
        offset: u64,
        /// Number of bytes asked for.
        len_bytes: u64,
    },
}
