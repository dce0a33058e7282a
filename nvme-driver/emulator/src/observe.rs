//! The test hook that sees every I/O command which is about to be carried out, with the host memory behind its PRPs.
//!
//! It is how a test proves from the device's side that data was moved in place: each segment's host address must
//! lie in the frame that the test expects.

#![expect(unsafe_code, reason = "an observed segment carries an address that is never dereferenced here")]

use std::sync::Arc;

use foliant_nvme_spec::{NvmOpcode, Status};
use foliant_nvme_transport::Iova;

use crate::fault::Action;
use crate::prp::Segment;

/// An I/O command that passed its checks and is about to be carried out.
#[derive(Clone, Copy, Debug)]
pub struct ObservedCommand<'a> {
    /// The submission queue it was fetched from.
    pub qid: u16,
    /// Its command identifier.
    pub cid: u16,
    /// Its namespace.
    pub nsid: u32,
    /// Its opcode.
    pub opcode: NvmOpcode,
    /// Its first block; 0 for a command without blocks.
    pub slba: u64,
    /// Its number of blocks; 0 for a command without blocks, and for Dataset Management.
    pub blocks: u32,
    /// Whether it forces unit access.
    pub fua: bool,
    /// The memory behind its data pointer, in order, contiguous pages joined.
    pub segments: &'a [ObservedSegment],
}

/// A piece of memory behind a command's data pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObservedSegment {
    /// Its device address, as the PRP entry names it.
    pub iova: Iova,
    /// Its host address, as the emulated IOMMU translates it. For comparing, not for dereferencing.
    pub host: *const u8,
    /// Its length in bytes.
    pub len_bytes: usize,
}

// SAFETY: the address is a value to compare; this crate never dereferences it through this type.
unsafe impl Send for ObservedSegment {}
// SAFETY: see `Send`.
unsafe impl Sync for ObservedSegment {}

impl From<&Segment> for ObservedSegment {
    fn from(segment: &Segment) -> Self {
        Self {
            iova: Iova(segment.iova),
            host: segment.host.as_ptr().cast_const(),
            len_bytes: segment.len_bytes,
        }
    }
}

/// A turn in the life of an I/O command that passed its checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObservedEvent {
    /// The submission queue it was fetched from.
    pub qid: u16,
    /// Its command identifier.
    pub cid: u16,
    /// Its opcode.
    pub opcode: NvmOpcode,
    /// Its first block; what the command's dwords say where it has none.
    pub slba: u64,
    /// Bytes that it reads, writes or zeroes; all of the namespace for a Flush.
    pub len_bytes: u64,
    /// What happened.
    pub turn: Turn,
}

/// What happened to a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// An injected fault hit it, just after it was fetched.
    Struck(Action),
    /// Its completion was posted, with this status.
    Completed(Status),
}

/// A function that is told of each [`ObservedEvent`], under the same conditions as an [`Observer`].
pub type EventObserver = Arc<dyn Fn(&ObservedEvent) + Send + Sync>;

/// A function that is shown every I/O command. It runs inside the pump, holds that queue up, and must not call back
/// into the controller.
pub type Observer = Arc<dyn Fn(&ObservedCommand<'_>) + Send + Sync>;
