//! What is asked of a namespace, and how it comes back.

use foliant_nvme_spec::Status;

use crate::error::CommandError;
use crate::namespace::Lba;

/// Whether a write must be on non-volatile media when it completes (Force Unit Access).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Fua {
    /// It may be in the controller's volatile write cache.
    #[default]
    No,
    /// It must be on the media.
    Yes,
}

/// Whether Write Zeroes may deallocate the blocks it zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Deallocation {
    /// The blocks stay allocated.
    #[default]
    Keep,
    /// The controller should deallocate them where it can.
    Allow,
}

/// A request to a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    /// Reads blocks into the payload.
    Read {
        /// First block.
        lba: Lba,
        /// Number of blocks.
        blocks: u32,
    },
    /// Writes blocks from the payload.
    Write {
        /// First block.
        lba: Lba,
        /// Number of blocks.
        blocks: u32,
        /// Whether it must be on the media when it completes.
        fua: Fua,
    },
    /// Brings every write that completed before to non-volatile media.
    Flush,
    /// Makes blocks read as zeroes.
    WriteZeroes {
        /// First block.
        lba: Lba,
        /// Number of blocks.
        blocks: u32,
        /// Whether it must be on the media when it completes.
        fua: Fua,
        /// Whether the blocks may be deallocated.
        deallocation: Deallocation,
    },
    /// Tells the device that the blocks' contents aren't needed any more (Dataset Management).
    Deallocate {
        /// First block.
        lba: Lba,
        /// Number of blocks.
        blocks: u32,
    },
}

/// A request that has ended, with its payload.
#[derive(Debug)]
pub struct Completion<P> {
    /// What was submitted; for a read that succeeded, filled with data.
    pub payload: P,
    /// How it went. Of a request that was split, the first failure.
    pub result: Result<(), CommandError>,
}

impl<P> Completion<P> {
    #[inline]
    pub(crate) fn new(payload: P, status: Status) -> Self {
        let result = if status.is_success() { Ok(()) } else { Err(CommandError::Status(status)) };
        Self { payload, result }
    }
}
