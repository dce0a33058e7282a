//! Blocks in sparse anonymous memory.
//!
//! The memory is reserved without swap accounting, so a large device costs only what is written to it. Stripes of
//! 64 KiB are locked while they are copied: a command that stays within one is atomic for all others, which is
//! what lets the device report an atomic unit of up to a stripe.

#![expect(unsafe_code, reason = "copies between the store's mapping and memory that the driver mapped")]

use std::io;
use std::ptr::NonNull;
use std::sync::Mutex;

use memmap2::{MmapOptions, MmapRaw, UncheckedAdvice};

use super::{Extent, MediaError, Work, Zeroing};
use crate::config::{ATOMIC_BYTES_MAX, PAGE_BYTES_MIN};
use crate::prp::Segment;
use crate::sync::lock;

const STRIPE_BYTES: u64 = ATOMIC_BYTES_MAX;
/// Locks that the stripes share; a power of two, several times the cores of a large machine.
const LOCKS: usize = 256;

/// The memory of one device.
///
/// Invariant: a byte of `map` is read or written only while the lock of its stripe is held.
#[derive(Debug)]
pub(crate) struct RamStore {
    map: MmapRaw,
    stripe_locks: Box<[Mutex<()>]>,
}

impl RamStore {
    /// Reserves `len_bytes` bytes, all zero.
    pub(crate) fn new(len_bytes: u64) -> io::Result<Self> {
        let len = usize::try_from(len_bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        let map = MmapOptions::new().len(len).no_reserve_swap().map_anon()?;
        let stripe_locks = (0..LOCKS).map(|_| Mutex::new(())).collect();
        Ok(Self { map: map.into(), stripe_locks })
    }

    #[inline]
    pub(crate) fn run(&self, work: &Work<'_>) -> Result<(), MediaError> {
        match work {
            Work::Read { extent, segments } => self.transfer(*extent, segments, Direction::ToHost),
            Work::Write { extent, segments, .. } => self.transfer(*extent, segments, Direction::FromHost),
            Work::Zero { extents, zeroing, .. } => {
                for extent in *extents {
                    self.zero(*extent, *zeroing);
                }
            }
            Work::Flush { .. } => {}
        }
        Ok(())
    }

    /// Copies what the medium holds at `offset` into `buffer`.
    pub(crate) fn read_into(&self, offset: u64, buffer: &mut [u8]) {
        let Some(host) = NonNull::new(buffer.as_mut_ptr()) else { return };
        let segments = [Segment { iova: 0, host, len_bytes: buffer.len() }];
        let extent = Extent { offset, len_bytes: buffer.len() as u64 };
        self.transfer(extent, &segments, Direction::ToHost);
    }

    /// Puts `data` onto the medium at `offset`.
    pub(crate) fn write_from(&self, offset: u64, data: &[u8]) {
        let Some(host) = NonNull::new(data.as_ptr().cast_mut()) else { return };
        let segments = [Segment { iova: 0, host, len_bytes: data.len() }];
        let extent = Extent { offset, len_bytes: data.len() as u64 };
        self.transfer(extent, &segments, Direction::FromHost);
    }

    /// Copies between `extent` and `segments`, which describe as many bytes, stripe by stripe.
    fn transfer(&self, extent: Extent, segments: &[Segment], direction: Direction) {
        assert!(extent.end() <= self.map.len() as u64, "the queue checks every range against its namespace");
        let mut host = SegmentCursor { segments, done_in_first: 0 };
        for stripe in stripes(extent) {
            let _guard = lock(self.stripe_lock(stripe.offset));
            let mut at = stripe.offset;
            while at < stripe.end()
                && let Some((host, len)) = host.advance((stripe.end() - at) as usize)
            {
                // SAFETY: `at + len` stays within the extent, which the assertion holds inside the map; the
                // stripe's lock is held. The host side is mapped for DMA, or the caller's own buffer, and by
                // `map_dma`'s contract nobody accesses it in conflict while the command is in flight. The two
                // can't overlap: nobody but this store has the address of its map.
                unsafe {
                    let medium = self.map.as_mut_ptr().byte_add(at as usize);
                    match direction {
                        Direction::ToHost => medium.copy_to_nonoverlapping(host.as_ptr(), len),
                        Direction::FromHost => medium.copy_from_nonoverlapping(host.as_ptr(), len),
                    }
                }
                at += len as u64;
            }
        }
    }

    /// Makes `extent` read as zeroes, and gives whole pages back when asked to.
    pub(crate) fn zero(&self, extent: Extent, zeroing: Zeroing) {
        assert!(extent.end() <= self.map.len() as u64, "the queue checks every range against its namespace");
        for stripe in stripes(extent) {
            let _guard = lock(self.stripe_lock(stripe.offset));
            let is_whole_pages = stripe.offset.is_multiple_of(PAGE_BYTES_MIN)
                && stripe.len_bytes.is_multiple_of(PAGE_BYTES_MIN);
            if zeroing == Zeroing::Deallocate && is_whole_pages && self.discard(stripe) {
                continue;
            }
            // SAFETY: the stripe lies inside the map by the assertion, and its lock is held.
            unsafe {
                self.map
                    .as_mut_ptr()
                    .byte_add(stripe.offset as usize)
                    .write_bytes(0, stripe.len_bytes as usize);
            }
        }
    }

    /// Gives whole pages back to the system; they read as zeroes afterwards. False when the system refused.
    fn discard(&self, pages: Extent) -> bool {
        // SAFETY: discarding private anonymous pages is a write of zeroes to them; they lie inside the map, their
        // stripe's lock is held by the caller, and no reference into the map exists anywhere.
        let advised = unsafe {
            self.map.unchecked_advise_range(
                UncheckedAdvice::DontNeed,
                pages.offset as usize,
                pages.len_bytes as usize,
            )
        };
        advised.is_ok()
    }

    fn stripe_lock(&self, offset: u64) -> &Mutex<()> {
        &self.stripe_locks[(offset / STRIPE_BYTES) as usize % LOCKS]
    }
}

#[derive(Clone, Copy)]
enum Direction {
    ToHost,
    FromHost,
}

/// The parts of an extent by stripe.
fn stripes(extent: Extent) -> impl Iterator<Item = Extent> {
    let mut at = extent.offset;
    std::iter::from_fn(move || {
        let end = (at / STRIPE_BYTES + 1).saturating_mul(STRIPE_BYTES).min(extent.end());
        let stripe = Extent { offset: at, len_bytes: end.checked_sub(at).filter(|len| *len > 0)? };
        at = end;
        Some(stripe)
    })
}

/// Walks segments in pieces.
struct SegmentCursor<'a> {
    segments: &'a [Segment],
    done_in_first: usize,
}

impl SegmentCursor<'_> {
    /// The next piece of at most `len_max` bytes; `None` at the end.
    #[inline]
    fn advance(&mut self, len_max: usize) -> Option<(NonNull<u8>, usize)> {
        let first = self.segments.first()?;
        let len = len_max.min(first.len_bytes - self.done_in_first);
        // SAFETY: `done_in_first` is below the segment's length.
        let host = unsafe { first.host.byte_add(self.done_in_first) };
        self.done_in_first += len;
        if self.done_in_first == first.len_bytes {
            self.segments = &self.segments[1..];
            self.done_in_first = 0;
        }
        Some((host, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Durability;

    fn segments_of(parts: &mut [Vec<u8>]) -> Vec<Segment> {
        let segment = |part: &mut Vec<u8>| Segment {
            iova: 0,
            host: NonNull::new(part.as_mut_ptr()).unwrap(),
            len_bytes: part.len(),
        };
        parts.iter_mut().map(segment).collect()
    }

    #[test]
    fn a_transfer_over_stripes_and_segments_keeps_every_byte_in_place() {
        let store = RamStore::new(1 << 20).unwrap();
        let mut parts: Vec<Vec<u8>> = [512usize, 70_000, 4096, 100_000]
            .iter()
            .scan(0u8, |seed, len| {
                *seed += 1;
                Some((0..*len).map(|i| (i % 251) as u8 ^ *seed).collect())
            })
            .collect();
        let expected: Vec<u8> = parts.concat();
        let extent = Extent { offset: 60_000, len_bytes: expected.len() as u64 };
        let segments = segments_of(&mut parts);
        store.run(&Work::Write { extent, segments: &segments, durability: Durability::Cached }).unwrap();
        let mut read = vec![0; expected.len()];
        store.read_into(60_000, &mut read);
        assert!(read == expected);

        let mut back = vec![vec![0u8; 100_000], vec![0; 74_608]];
        let segments = segments_of(&mut back);
        store.run(&Work::Read { extent, segments: &segments }).unwrap();
        assert!(back.concat() == expected);
    }

    #[test]
    fn zeroing_reaches_its_range_and_not_its_neighbours() {
        for zeroing in [Zeroing::Keep, Zeroing::Deallocate] {
            let store = RamStore::new(1 << 20).unwrap();
            store.write_from(0, &vec![0xAA; 1 << 20]);
            store.zero(Extent { offset: 512, len_bytes: 512 }, zeroing);
            store.zero(Extent { offset: 8192, len_bytes: 200 * 1024 }, zeroing);
            let mut all = vec![1; 1 << 20];
            store.read_into(0, &mut all);
            for (at, byte) in all.iter().enumerate() {
                let is_zeroed = (512..1024).contains(&at) || (8192..8192 + 200 * 1024).contains(&at);
                assert_eq!(*byte, if is_zeroed { 0 } else { 0xAA }, "byte {at}, {zeroing:?}");
            }
        }
    }

    #[test]
    fn a_store_larger_than_memory_costs_nothing_until_written() {
        let store = RamStore::new(1 << 40).unwrap();
        store.write_from((1 << 40) - 4096, &[7; 4096]);
        let mut read = [0; 4096];
        store.read_into((1 << 40) - 4096, &mut read);
        assert_eq!(read, [7; 4096]);
    }

    #[test]
    fn a_stripe_is_written_and_read_whole_by_several_threads() {
        let store = RamStore::new(1 << 20).unwrap();
        let len = STRIPE_BYTES as usize;
        std::thread::scope(|scope| {
            for value in 1..=2u8 {
                let store = &store;
                scope.spawn(move || (0..3000).for_each(|_| store.write_from(0, &vec![value; len])));
            }
            let mut read = vec![0; len];
            for _ in 0..3000 {
                store.read_into(0, &mut read);
                assert!(read.iter().all(|byte| *byte == read[0]), "a torn stripe");
            }
        });
    }
}
