//! The least that a cache does in front of a touch: the yardstick between bare memory and a real cache.

use std::hint::black_box;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use anyhow::Result;
use memmap2::{Advice, MmapMut};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::walk::{PAGE, Step};

/// Pages in frames of their own, in random order, whose content can change at any time: a look-up asks where the page is, and what that place
/// holds before and after the touch. Each is one load from an array. There is no hash, no end of a file, no hold, no count, and
/// neither shards nor sizes of folios.
pub struct LeastCache {
    /// By page: its frame.
    frames: Vec<AtomicU32>,
    headers: Vec<Header>,
    memory: MmapMut,
}

/// As large as the engine's.
#[repr(align(32))]
struct Header {
    state: AtomicU64,
    page: AtomicU64,
}

const AT_HAND: u64 = 3;

impl LeastCache {
    pub fn new(pages: u32) -> Result<Self> {
        let mut memory = MmapMut::map_anon(pages as usize * PAGE)?;
        // Only advice, as for the engine's frames.
        let _ = memory.advise(Advice::HugePage);
        SmallRng::seed_from_u64(3).fill(&mut memory[..]);
        let mut frames: Vec<u32> = (0..pages).collect();
        frames.shuffle(&mut SmallRng::seed_from_u64(4));
        let header = |_| Header { state: AtomicU64::new(AT_HAND), page: AtomicU64::new(u64::MAX) };
        let headers: Vec<Header> = (0..pages).map(header).collect();
        for (page, &frame) in frames.iter().enumerate() {
            headers[frame as usize].page.store(page as u64, Ordering::Relaxed);
        }
        // The compiler mustn't know what it will find.
        Ok(black_box(Self { frames: frames.into_iter().map(AtomicU32::new).collect(), headers, memory }))
    }

    /// The word of a step; `None` where the page isn't there, or changed.
    #[inline]
    pub fn touch(&self, step: Step) -> Option<u64> {
        let frame = self.frames.get(step.page as usize)?.load(Ordering::Acquire) as usize;
        let header = self.headers.get(frame)?;
        let before = header.state.load(Ordering::Acquire);
        if before & 0xFF != AT_HAND || header.page.load(Ordering::Relaxed) != u64::from(step.page) {
            return None;
        }
        let word = self.memory.get(frame * PAGE + step.within as usize..)?.first_chunk()?;
        let word = u64::from_ne_bytes(*word);
        (header.state.load(Ordering::Acquire) == before).then_some(word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_found_where_its_header_says() {
        let cache = LeastCache::new(64).unwrap();
        for page in 0..64 {
            let frame = cache.frames[page as usize].load(Ordering::Relaxed) as usize;
            let at = frame * PAGE + 8;
            let word = u64::from_ne_bytes(*cache.memory[at..].first_chunk().unwrap());
            assert_eq!(cache.touch(Step { page, within: 8 }), Some(word));
        }
        cache.headers[0].state.fetch_add(1, Ordering::Relaxed);
        let touched = (0..64).filter(|&page| cache.touch(Step { page, within: 0 }).is_none()).count();
        assert_eq!(touched, 1, "one whose header says that it isn't at hand");
    }
}
