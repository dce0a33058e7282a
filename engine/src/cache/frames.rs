//! The frames of one shard: 4 KiB pieces of one DMA buffer, mapped for the device at open and never again.

use foliant_nvme::{DmaBuffer, Segment};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::folio::FrameId;
use super::table::prefetch;

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

    /// As [`address`](Self::address).
    ///
    /// # Safety
    /// There is such a frame.
    #[inline]
    #[expect(unsafe_code, reason = "what stands in front of a page's bytes waits with them")]
    pub(crate) unsafe fn address_unchecked(&self, frame: FrameId) -> NonNull<u8> {
        debug_assert!(frame.0 < self.frames);
        // SAFETY: inside the buffer, as the caller says.
        unsafe { self.base.add(frame.0 as usize * PAGE_BYTES) }
    }

    /// Has the processor begin to fetch the frame's lines into its cache, for who is going to write all of them: to take the folio
    /// and to give it back are locked instructions, and each waits until every store before it has its line. Of a frame
    /// that turns out to be another page's, or somebody's, it costs a little and does nothing.
    #[inline]
    pub(crate) fn prefetch(&self, frame: FrameId) {
        // The best of what was measured: with more, the instructions behind them wait for their turn.
        const LINES: usize = 16;
        for line in 0..LINES {
            self.prefetch_line(frame, line * 64);
        }
    }

    /// Has the processor fetch the line of byte `within` of a frame or those that follow it.
    #[inline]
    pub(crate) fn prefetch_line(&self, frame: FrameId, within: usize) {
        // Not `add`: nobody holds the frame, and a hint may point anywhere.
        prefetch(self.address(frame).as_ptr().wrapping_add(within));
    }

    /// Writes `data` at byte `within` of a frame, which the caller holds exclusively.
    #[inline]
    pub(crate) fn write(&self, frame: FrameId, within: usize, data: &[u8]) {
        assert!(within <= PAGE_BYTES && data.len() <= PAGE_BYTES - within);
        // SAFETY: inside the frame by the assertion; nobody else has a reference to it, by exclusive possession.
        #[expect(unsafe_code, reason = "an exclusively held frame is this holder's memory")]
        unsafe {
            std::ptr::copy_nonoverlapping(
                data.as_ptr(),
                self.address(frame).as_ptr().add(within),
                data.len(),
            );
        }
    }

    /// Writes `data` at byte `within` of a frame and those that follow it, which the caller holds exclusively, though the device
    /// may be reading them.
    ///
    /// What the device makes of a byte that changes meanwhile is its affair: it isn't a part of this program, and each store is
    /// atomic, so no assumption of the compiler's is broken on this side. (The emulated controller is part of it and copies as
    /// a device does, byte by byte as they come; its copy is never looked at but as bytes.)
    pub(crate) fn store_beside_device(&self, frame: FrameId, within: usize, data: &[u8]) {
        assert!(within + data.len() <= (self.frames - frame.0) as usize * PAGE_BYTES);
        // SAFETY: inside the buffer by the assertion.
        #[expect(unsafe_code, reason = "address arithmetic inside the frames' buffer")]
        let at = unsafe { self.address(frame).as_ptr().add(within) };
        let head = at.align_offset(size_of::<u64>()).min(data.len());
        let (first, rest) = data.split_at(head);
        let (words, last) = rest.as_chunks::<8>();
        let byte = |offset: usize, value: u8| {
            // SAFETY: inside `data`'s destination; nobody else in this program accesses it, by exclusive possession.
            #[expect(unsafe_code, reason = "frames are reached by address")]
            unsafe {
                AtomicU8::from_ptr(at.add(offset)).store(value, Ordering::Relaxed);
            }
        };
        first.iter().enumerate().for_each(|(offset, &value)| byte(offset, value));
        for (index, word) in words.iter().enumerate() {
            // SAFETY: as above, and aligned: `head` bytes lie before the first aligned word.
            #[expect(unsafe_code, reason = "frames are reached by address")]
            unsafe {
                let word_at = at.add(head + index * size_of::<u64>()).cast::<u64>();
                AtomicU64::from_ptr(word_at).store(u64::from_ne_bytes(*word), Ordering::Relaxed);
            }
        }
        let done = head + words.len() * size_of::<u64>();
        last.iter().enumerate().for_each(|(offset, &value)| byte(done + offset, value));
    }

    /// The first `len_bytes` bytes of a frame and those that follow it, as the device sees them.
    pub(crate) fn segment(&self, frame: FrameId, len_bytes: u32) -> Segment {
        debug_assert!(frame.0 as usize + (len_bytes as usize).div_ceil(PAGE_BYTES) <= self.frames as usize);
        Segment { iova: self.buffer.iova().offset(u64::from(frame.0) * PAGE_BYTES as u64), len_bytes }
    }
}
