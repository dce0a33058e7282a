//! What a request transfers: memory that moves into the queue pair and comes back in the completion.

use foliant_nvme_transport::Iova;

use crate::arena::DmaBuffer;

/// A piece of DMA-mapped memory, as the device sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Device address of the first byte.
    pub iova: Iova,
    /// Length in bytes.
    pub len_bytes: u32,
}

/// The memory of a request, in the order in which it is transferred.
///
/// `()` is the payload of a request without data, such as a Flush.
///
/// # Safety
/// The segments name DMA-mapped memory that stays allocated and mapped, and whose conflicting access is
/// excluded, from the moment the payload is submitted until it comes back or is dropped by the driver. As
/// long as the payload is not touched, each call of [`segments`](Self::segments) names the same memory.
#[expect(unsafe_code, reason = "an implementation vouches for memory that a device writes")]
pub unsafe trait Payload: Send + 'static {
    /// The segments, in order. Two neighbours must meet at 4 KiB page boundaries of their device addresses, or
    /// follow each other without a gap; the first may start on any dword. Empty segments are skipped.
    fn segments(&self) -> impl Iterator<Item = Segment> + '_;
}

// SAFETY: no segment, nothing to vouch for.
#[expect(unsafe_code, reason = "the payload of requests without data")]
unsafe impl Payload for () {
    fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        std::iter::empty()
    }
}

// SAFETY: the buffer owns its part of a mapped region and keeps the region alive; nobody can reach the bytes
// while the queue pair owns the buffer.
#[expect(unsafe_code, reason = "an owned DMA buffer satisfies the contract")]
unsafe impl Payload for DmaBuffer {
    fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        /// Whole pages, so that a buffer beyond a segment's 32-bit length goes on at a page boundary.
        const SEGMENT_BYTES_MAX: usize = 1 << 31;
        let mut done = 0;
        std::iter::from_fn(move || {
            let len_bytes = (self.len_bytes() - done).min(SEGMENT_BYTES_MAX);
            let segment = Segment { iova: self.iova().offset(done as u64), len_bytes: len_bytes as u32 };
            done += len_bytes;
            (len_bytes > 0).then_some(segment)
        })
    }
}
