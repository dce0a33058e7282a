//! DMA memory in pieces: [`DmaArena`] hands out [`DmaBuffer`]s, each contiguous for the processor and the device.
//!
//! Allocation is for set-up, not for the data path: it takes a lock. A buffer has one owner; while a command
//! names it, that owner is the queue pair, so nobody can hold a reference into it.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use foliant_nvme_spec::PAGE_BYTES;
use foliant_nvme_transport::Iova;

use crate::error::ArenaError;
use crate::region::{ArenaBacking, Region};

/// A stretch of memory, mapped for DMA once at open, that is handed out in whole 4 KiB pages.
///
/// Clones hand out of the same memory.
#[derive(Clone)]
pub struct DmaArena {
    shared: Arc<Shared>,
}

struct Shared {
    region: Arc<Region>,
    /// The part of the region that this arena hands out, in bytes from the region's start.
    span: Range<usize>,
    free: Mutex<FreeList>,
}

impl DmaArena {
    /// An arena over the pages `span` of `region`.
    ///
    /// # Safety
    /// No other arena hands out any byte of `span`, and `span` lies within the region on page boundaries.
    #[expect(unsafe_code, reason = "only the caller knows that two arenas don't overlap")]
    pub(crate) unsafe fn new(region: Arc<Region>, span: Range<usize>) -> Self {
        let free = Mutex::new(FreeList::new(span.clone()));
        Self { shared: Arc::new(Shared { region, span, free }) }
    }

    /// Allocates `len_bytes` bytes, contiguous for the processor and the device, from a 4 KiB boundary on.
    ///
    /// The contents are whatever was there; fresh memory is zeroed. Whole pages are taken, so that two buffers
    /// never share one.
    ///
    /// # Errors
    /// [`ArenaError::Empty`] for no bytes, [`ArenaError::Exhausted`] when no free stretch is long enough.
    pub fn allocate(&self, len_bytes: usize) -> Result<DmaBuffer, ArenaError> {
        if len_bytes == 0 {
            return Err(ArenaError::Empty);
        }
        let mut free = self.shared.free.lock().unwrap_or_else(PoisonError::into_inner);
        let start = len_bytes
            .checked_next_multiple_of(PAGE_BYTES)
            .and_then(|rounded| free.take(rounded))
            .ok_or_else(|| ArenaError::Exhausted {
                len_bytes,
                free_bytes: free.total(),
                longest_bytes: free.longest(),
                capacity_bytes: self.capacity_bytes(),
            })?;
        let region = &self.shared.region;
        // SAFETY: the free list hands out offsets within `span`, which lies within the region (see `new`).
        #[expect(unsafe_code, reason = "address arithmetic inside the region")]
        let base = unsafe { region.base().byte_add(start) };
        Ok(DmaBuffer {
            base,
            iova: region.iova().offset(start as u64),
            len_bytes,
            arena: Arc::clone(&self.shared),
        })
    }

    /// What kind of memory the arena consists of.
    #[must_use]
    pub fn backing(&self) -> ArenaBacking {
        self.shared.region.backing()
    }

    /// The device address of the arena's first byte. Everything that it hands out lies at the same distance from it for
    /// every device that reaches the arena.
    #[must_use]
    pub fn iova(&self) -> Iova {
        self.shared.region.iova().offset(self.shared.span.start as u64)
    }

    pub(crate) fn region(&self) -> &Arc<Region> {
        &self.shared.region
    }

    /// The arena's size in bytes.
    #[must_use]
    pub fn capacity_bytes(&self) -> usize {
        self.shared.span.len()
    }

    /// Bytes not handed out, over all free stretches.
    #[must_use]
    pub fn free_bytes(&self) -> usize {
        self.shared.free.lock().unwrap_or_else(PoisonError::into_inner).total()
    }
}

impl fmt::Debug for DmaArena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaArena")
            .field("backing", &self.backing())
            .field("capacity_bytes", &self.capacity_bytes())
            .field("free_bytes", &self.free_bytes())
            .finish()
    }
}

/// Memory that both the processor and the device reach, with one owner; it goes back to its arena when dropped.
///
/// The bytes are always initialised: fresh memory is zeroed, and later both sides only write whole bytes.
pub struct DmaBuffer {
    base: NonNull<u8>,
    iova: Iova,
    len_bytes: usize,
    arena: Arc<Shared>,
}

// SAFETY: the buffer is the only owner of its bytes, like a boxed slice.
#[expect(unsafe_code, reason = "an owned stretch of memory moves between threads like a boxed slice")]
unsafe impl Send for DmaBuffer {}
// SAFETY: through `&DmaBuffer` the bytes can only be read; see `base` for raw access.
#[expect(unsafe_code, reason = "shared access only reads, like that of a boxed slice")]
unsafe impl Sync for DmaBuffer {}

impl DmaBuffer {
    /// The first byte. Whoever goes through this pointer rather than the slices answers for exclusive access
    /// while a command may be in flight.
    #[must_use]
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// The device address of the first byte; 4 KiB aligned.
    #[must_use]
    pub fn iova(&self) -> Iova {
        self.iova
    }

    /// The length that was asked for, in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// The bytes, to read. While the buffer can be borrowed, no command names it.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `allocate` handed out `len_bytes` initialised bytes to this owner alone, and a queue pair
        // takes the buffer by value for as long as the device may touch it.
        #[expect(unsafe_code, reason = "an owned stretch of mapped memory becomes a slice")]
        unsafe {
            std::slice::from_raw_parts(self.base.as_ptr(), self.len_bytes)
        }
    }

    /// The bytes, to write. While the buffer can be borrowed, no command names it.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: see `as_slice`; `&mut self` makes the access exclusive.
        #[expect(unsafe_code, reason = "an owned stretch of mapped memory becomes a slice")]
        unsafe {
            std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len_bytes)
        }
    }
}

impl Drop for DmaBuffer {
    fn drop(&mut self) {
        let start = (self.iova.0 - self.arena.region.iova().0) as usize;
        let end = start + self.len_bytes.next_multiple_of(PAGE_BYTES);
        self.arena.free.lock().unwrap_or_else(PoisonError::into_inner).give_back(start..end);
    }
}

impl fmt::Debug for DmaBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaBuffer").field("iova", &self.iova).field("len_bytes", &self.len_bytes).finish()
    }
}

/// The free stretches of an arena, first fit.
///
/// Invariant: stretches are not empty, don't overlap and don't touch; neighbours are merged when given back.
struct FreeList {
    /// Start of a stretch to its end.
    stretches: BTreeMap<usize, usize>,
}

impl FreeList {
    fn new(span: Range<usize>) -> Self {
        let stretches =
            if span.is_empty() { BTreeMap::new() } else { BTreeMap::from([(span.start, span.end)]) };
        Self { stretches }
    }

    /// Takes `len` from the first stretch that has it; returns where it starts.
    fn take(&mut self, len: usize) -> Option<usize> {
        let (start, end) =
            self.stretches.iter().map(|(&start, &end)| (start, end)).find(|(s, e)| e - s >= len)?;
        self.stretches.remove(&start);
        if start + len < end {
            self.stretches.insert(start + len, end);
        }
        Some(start)
    }

    /// Takes back a range that `take` gave out.
    fn give_back(&mut self, Range { mut start, mut end }: Range<usize>) {
        if let Some(next_end) = self.stretches.remove(&end) {
            end = next_end;
        }
        if let Some((&previous_start, previous_end)) = self.stretches.range_mut(..start).next_back()
            && *previous_end == start
        {
            start = previous_start;
        }
        self.stretches.insert(start, end);
    }

    fn total(&self) -> usize {
        self.stretches.iter().map(|(start, end)| end - start).sum()
    }

    fn longest(&self) -> usize {
        self.stretches.iter().map(|(start, end)| end - start).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::Hugepages;
    use crate::fake::FakeTransport;
    use proptest::prelude::*;

    fn arena(pages: usize) -> DmaArena {
        let region =
            Region::new(FakeTransport::healthy(), pages * PAGE_BYTES, Hugepages::Never, &[]).unwrap();
        // SAFETY: the region has no other arena.
        #[expect(unsafe_code, reason = "a test builds an arena without a controller")]
        unsafe {
            DmaArena::new(region, 0..pages * PAGE_BYTES)
        }
    }

    #[test]
    fn a_buffer_is_page_aligned_zeroed_and_as_long_as_asked_for() {
        let arena = arena(4);
        let buffer = arena.allocate(5000).unwrap();
        assert_eq!(buffer.len_bytes(), 5000);
        assert!(buffer.iova().0.is_multiple_of(PAGE_BYTES as u64));
        assert!(buffer.base().addr().get().is_multiple_of(PAGE_BYTES));
        assert!(buffer.as_slice().iter().all(|&byte| byte == 0));
        assert_eq!(arena.free_bytes(), 2 * PAGE_BYTES);
    }

    #[test]
    fn a_dropped_buffer_can_be_allocated_again_whole() {
        let arena = arena(4);
        let buffers: Vec<_> = (0..4).map(|_| arena.allocate(1).unwrap()).collect();
        assert!(matches!(arena.allocate(1), Err(ArenaError::Exhausted { free_bytes: 0, .. })));
        drop(buffers);
        assert_eq!(arena.allocate(4 * PAGE_BYTES).unwrap().len_bytes(), 4 * PAGE_BYTES);
    }

    #[test]
    fn an_exhausted_arena_names_what_is_free() {
        let arena = arena(4);
        let kept = [arena.allocate(1).unwrap(), arena.allocate(1).unwrap(), arena.allocate(1).unwrap()];
        let [first, _middle, last] = kept;
        drop((first, last));
        match arena.allocate(3 * PAGE_BYTES) {
            Err(ArenaError::Exhausted { free_bytes, longest_bytes, capacity_bytes, .. }) => {
                assert_eq!(
                    (free_bytes, longest_bytes, capacity_bytes),
                    (3 * PAGE_BYTES, 2 * PAGE_BYTES, 4 * PAGE_BYTES)
                );
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn no_bytes_and_too_many_bytes_are_refused() {
        assert!(matches!(arena(1).allocate(0), Err(ArenaError::Empty)));
        assert!(matches!(arena(1).allocate(usize::MAX), Err(ArenaError::Exhausted { .. })));
    }

    #[test]
    fn required_hugepages_that_are_not_there_are_an_error() {
        let absurd = 1 << 46;
        let result = Region::new(FakeTransport::healthy(), absurd, Hugepages::Require, &[]);
        assert!(matches!(result.err(), Some(ArenaError::NoHugepages { .. } | ArenaError::HugepagesUnknown)));
    }

    proptest! {
        #[test]
        fn buffers_never_overlap_and_all_memory_comes_back(
            steps in prop::collection::vec((1usize..5, any::<prop::sample::Index>(), any::<bool>()), 1..60)
        ) {
            let arena = arena(16);
            let mut held: Vec<DmaBuffer> = Vec::new();
            for (pages, pick, give_back) in steps {
                if give_back && !held.is_empty() {
                    held.swap_remove(pick.index(held.len()));
                } else if let Ok(buffer) = arena.allocate(pages * PAGE_BYTES) {
                    let (start, end) = (buffer.iova().0, buffer.iova().0 + buffer.len_bytes() as u64);
                    for other in &held {
                        let other_end = other.iova().0 + other.len_bytes() as u64;
                        prop_assert!(end <= other.iova().0 || other_end <= start);
                    }
                    held.push(buffer);
                }
                let held_bytes: usize = held.iter().map(DmaBuffer::len_bytes).sum();
                prop_assert_eq!(arena.free_bytes() + held_bytes, arena.capacity_bytes());
            }
            held.clear();
            prop_assert!(arena.allocate(arena.capacity_bytes()).is_ok());
        }
    }
}
