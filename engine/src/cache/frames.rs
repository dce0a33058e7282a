//! The frames of one shard: 4 KiB pieces of one DMA buffer, mapped for the device at open and never again.

use foliant_nvme::{DmaBuffer, Segment};
use std::ptr::NonNull;

use super::folio::FrameId;

/// Bytes of a page, and of a frame.
pub const PAGE_BYTES: usize = 4096;

/// The memory of a shard's frames.
///
/// Who may touch a frame's bytes is decided by its folio's state word alone: shared pins read, the exclusive
/// holder writes, the device writes while the folio is being read in and reads while it is under writeback.
#[derive(Debug)]
pub(crate) struct FrameMemory {
    /// Keeps the memory allocated and mapped. Reached through `base` only.
    buffer: DmaBuffer,
    base: NonNull<u8>,
    frames: u32,
}

// SAFETY: the pointer is into `buffer`, which lives as long as this value and is `Send`; access to the bytes is
// ordered by the folios' state words (see the type's documentation), not by this type.
#[expect(unsafe_code, reason = "frames are shared between threads and the device under the folio protocol")]
unsafe impl Send for FrameMemory {}
// SAFETY: see `Send`; `&self` methods hand out addresses only.
#[expect(unsafe_code, reason = "frames are shared between threads and the device under the folio protocol")]
unsafe impl Sync for FrameMemory {}

impl FrameMemory {
    pub(crate) fn new(buffer: DmaBuffer) -> Self {
        let frames =
            u32::try_from(buffer.len_bytes() / PAGE_BYTES).expect("a shard has fewer than 2^32 frames");
        Self { base: buffer.base(), buffer, frames }
    }

    pub(crate) fn count(&self) -> u32 {
        self.frames
    }

    /// First byte of a frame.
    #[inline]
    pub(crate) fn address(&self, frame: FrameId) -> NonNull<u8> {
        assert!(frame.0 < self.frames);
        // SAFETY: the frame lies inside the buffer by the assertion.
        #[expect(unsafe_code, reason = "address arithmetic inside the frames' buffer")]
        unsafe {
            self.base.add(frame.0 as usize * PAGE_BYTES)
        }
    }

    /// The first `len_bytes` bytes of a frame and those that follow it, as the device sees them.
    pub(crate) fn segment(&self, frame: FrameId, len_bytes: u32) -> Segment {
        debug_assert!(frame.0 as usize + (len_bytes as usize).div_ceil(PAGE_BYTES) <= self.frames as usize);
        Segment { iova: self.buffer.iova().offset(u64::from(frame.0) * PAGE_BYTES as u64), len_bytes }
    }
}
