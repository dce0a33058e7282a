//! Policies of eviction as plain simulations: pages are numbers below a bound, and nothing is stored.

use std::collections::{BTreeSet, VecDeque};

/// A cache that holds some pages.
pub trait Policy {
    /// Accesses a page, which is in the cache afterwards. True when it was before.
    fn access(&mut self, page: u32) -> bool;
}

/// A list in the order of coming; what was taken out of it stays as a stale entry until it is met.
#[derive(Default)]
struct List {
    entries: VecDeque<(u32, u64)>,
    len: usize,
}

/// Lists of which each page is in one at most.
struct Lists<const N: usize> {
    lists: [List; N],
    /// By page: the list it is in, and when it came there; 0 where it is in none.
    place: Vec<(usize, u64)>,
    now: u64,
}

impl<const N: usize> Lists<N> {
    fn new(pages: usize) -> Self {
        Self { lists: std::array::from_fn(|_| List::default()), place: vec![(0, 0); pages], now: 0 }
    }

    fn len(&self, list: usize) -> usize {
        self.lists[list].len
    }

    fn of(&self, page: u32) -> Option<usize> {
        let (list, since) = self.place[page as usize];
        (since > 0).then_some(list)
    }

    fn push(&mut self, list: usize, page: u32) {
        self.remove(page);
        self.now += 1;
        self.place[page as usize] = (list, self.now);
        self.lists[list].entries.push_back((page, self.now));
        self.lists[list].len += 1;
    }

    fn remove(&mut self, page: u32) {
        if let Some(list) = self.of(page) {
            self.lists[list].len -= 1;
            self.place[page as usize].1 = 0;
        }
    }

    /// Takes the page that has been in a list the longest.
    fn pop(&mut self, list: usize) -> Option<u32> {
        while let Some((page, since)) = self.lists[list].entries.pop_front() {
            if self.place[page as usize] == (list, since) {
                self.remove(page);
                return Some(page);
            }
        }
        None
    }
}

/// Evicts what was used longest ago.
pub struct Lru {
    frames: usize,
    lists: Lists<1>,
}

impl Lru {
    pub fn new(frames: usize, pages: usize) -> Self {
        Self { frames, lists: Lists::new(pages) }
    }
}

impl Policy for Lru {
    fn access(&mut self, page: u32) -> bool {
        let hit = self.lists.of(page).is_some();
        if !hit && self.lists.len(0) == self.frames {
            self.lists.pop(0);
        }
        self.lists.push(0, page);
        hit
    }
}

/// A second chance for what was used since the hand last passed.
pub struct Clock {
    frames: usize,
    lists: Lists<1>,
    used: Vec<bool>,
}

impl Clock {
    pub fn new(frames: usize, pages: usize) -> Self {
        Self { frames, lists: Lists::new(pages), used: vec![false; pages] }
    }
}

impl Policy for Clock {
    fn access(&mut self, page: u32) -> bool {
        if self.lists.of(page).is_some() {
            self.used[page as usize] = true;
            return true;
        }
        while self.lists.len(0) == self.frames {
            let Some(oldest) = self.lists.pop(0) else { break };
            if std::mem::take(&mut self.used[oldest as usize]) {
                self.lists.push(0, oldest);
            }
        }
        self.lists.push(0, page);
        false
    }
}

/// No page.
const NONE: u32 = u32::MAX;

/// A hand that goes from old to new and leaves what was used where it is (Zhang et al., NSDI 2024).
pub struct Sieve {
    frames: usize,
    used: Vec<bool>,
    cached: Vec<bool>,
    /// By page, and at the end the two ends of the list: its neighbours, the older one and the newer one.
    older: Vec<u32>,
    newer: Vec<u32>,
    hand: u32,
    len: usize,
}

impl Sieve {
    pub fn new(frames: usize, pages: usize) -> Self {
        let end = pages as u32;
        let (mut older, mut newer) = (vec![NONE; pages + 1], vec![NONE; pages + 1]);
        (older[pages], newer[pages]) = (end, end);
        Self { frames, used: vec![false; pages], cached: vec![false; pages], older, newer, hand: end, len: 0 }
    }

    fn evict(&mut self) {
        let end = self.used.len() as u32;
        loop {
            if self.hand == end {
                self.hand = self.newer[end as usize];
            }
            if !std::mem::take(&mut self.used[self.hand as usize]) {
                break;
            }
            self.hand = self.newer[self.hand as usize];
        }
        let (older, newer) = (self.older[self.hand as usize], self.newer[self.hand as usize]);
        self.newer[older as usize] = newer;
        self.older[newer as usize] = older;
        self.cached[self.hand as usize] = false;
        self.hand = newer;
        self.len -= 1;
    }
}

impl Policy for Sieve {
    fn access(&mut self, page: u32) -> bool {
        if self.cached[page as usize] {
            self.used[page as usize] = true;
            return true;
        }
        if self.len == self.frames {
            self.evict();
        }
        let end = self.used.len();
        let newest = self.older[end];
        (self.older[page as usize], self.newer[page as usize]) = (newest, end as u32);
        self.newer[newest as usize] = page;
        self.older[end] = page;
        self.cached[page as usize] = true;
        self.len += 1;
        false
    }
}

/// A small queue, a main one and ghosts (Yang et al., SOSP 2023).
pub struct S3Fifo {
    frames: usize,
    small_frames: usize,
    lists: Lists<3>,
    /// By page: uses since it came, at most three.
    uses: Vec<u8>,
}

impl S3Fifo {
    const SMALL: usize = 0;
    const MAIN: usize = 1;
    const GHOSTS: usize = 2;
    /// Uses after which a page of the small queue goes to the main one.
    const PROMOTED: u8 = 2;

    pub fn new(frames: usize, pages: usize) -> Self {
        let small_frames = (frames / 10).max(1);
        Self { frames, small_frames, lists: Lists::new(pages), uses: vec![0; pages] }
    }

    fn evict_main(&mut self) {
        while let Some(page) = self.lists.pop(Self::MAIN) {
            if self.uses[page as usize] == 0 {
                return;
            }
            self.uses[page as usize] -= 1;
            self.lists.push(Self::MAIN, page);
        }
    }

    fn evict_small(&mut self) {
        while let Some(page) = self.lists.pop(Self::SMALL) {
            if self.uses[page as usize] < Self::PROMOTED {
                self.lists.push(Self::GHOSTS, page);
                if self.lists.len(Self::GHOSTS) > self.frames - self.small_frames {
                    self.lists.pop(Self::GHOSTS);
                }
                return;
            }
            self.uses[page as usize] = 0;
            self.lists.push(Self::MAIN, page);
        }
    }
}

impl Policy for S3Fifo {
    fn access(&mut self, page: u32) -> bool {
        let place = self.lists.of(page);
        let uses = &mut self.uses[page as usize];
        if matches!(place, Some(Self::SMALL | Self::MAIN)) {
            *uses = (*uses + 1).min(3);
            return true;
        }
        *uses = 0;
        // A ghost is asked for before what is evicted now can push it out.
        let queue = if place.is_some() { Self::MAIN } else { Self::SMALL };
        self.lists.remove(page);
        while self.lists.len(Self::SMALL) + self.lists.len(Self::MAIN) >= self.frames {
            let main_frames = self.frames - self.small_frames;
            if self.lists.len(Self::MAIN) > main_frames || self.lists.len(Self::SMALL) == 0 {
                self.evict_main();
            } else {
                self.evict_small();
            }
        }
        self.lists.push(queue, page);
        false
    }
}

/// Two LRU lists, whose shares follow the ghosts of both (Megiddo and Modha, FAST 2003).
pub struct Arc {
    frames: usize,
    /// Frames that the list of what was used once should have.
    once_frames: usize,
    lists: Lists<4>,
}

impl Arc {
    const ONCE: usize = 0;
    const AGAIN: usize = 1;
    const ONCE_GHOSTS: usize = 2;
    const AGAIN_GHOSTS: usize = 3;

    pub fn new(frames: usize, pages: usize) -> Self {
        Self { frames, once_frames: 0, lists: Lists::new(pages) }
    }

    fn len(&self, lists: [usize; 2]) -> usize {
        lists.iter().map(|&list| self.lists.len(list)).sum()
    }

    fn demote(&mut self, was_again: bool) {
        let once = self.lists.len(Self::ONCE);
        let too_many = once > self.once_frames || was_again && once == self.once_frames;
        let from_once = once > 0 && (too_many || self.lists.len(Self::AGAIN) == 0);
        let (from, to) =
            if from_once { (Self::ONCE, Self::ONCE_GHOSTS) } else { (Self::AGAIN, Self::AGAIN_GHOSTS) };
        if let Some(page) = self.lists.pop(from) {
            self.lists.push(to, page);
        }
    }
}

impl Policy for Arc {
    fn access(&mut self, page: u32) -> bool {
        let place = self.lists.of(page);
        let full = self.len([Self::ONCE, Self::AGAIN]) >= self.frames;
        let (once_ghosts, again_ghosts) =
            (self.lists.len(Self::ONCE_GHOSTS), self.lists.len(Self::AGAIN_GHOSTS));
        match place {
            Some(Self::ONCE | Self::AGAIN) => {}
            Some(Self::ONCE_GHOSTS) => {
                self.once_frames = (self.once_frames + (again_ghosts / once_ghosts).max(1)).min(self.frames);
            }
            Some(_) => {
                self.once_frames = self.once_frames.saturating_sub((once_ghosts / again_ghosts).max(1));
            }
            None => {
                if self.len([Self::ONCE, Self::ONCE_GHOSTS]) == self.frames {
                    let oldest = if once_ghosts > 0 { Self::ONCE_GHOSTS } else { Self::ONCE };
                    self.lists.pop(oldest);
                } else if full
                    && self.len([Self::ONCE, Self::ONCE_GHOSTS]) + self.len([Self::AGAIN, Self::AGAIN_GHOSTS])
                        >= 2 * self.frames
                {
                    self.lists.pop(Self::AGAIN_GHOSTS);
                }
            }
        }
        let cached = matches!(place, Some(Self::ONCE | Self::AGAIN));
        if !cached && self.len([Self::ONCE, Self::AGAIN]) >= self.frames {
            self.demote(place == Some(Self::AGAIN_GHOSTS));
        }
        self.lists.push(if place.is_some() { Self::AGAIN } else { Self::ONCE }, page);
        cached
    }
}

/// Hits where what is evicted is always what is used last in the future (Belady 1966).
pub fn optimum(accesses: &[u32], pages: usize, frames: usize) -> usize {
    let mut next_use = vec![0; accesses.len()];
    // Never again: behind the end, each at a place of its own.
    let mut upcoming: Vec<usize> = (0..pages).map(|page| accesses.len() + page).collect();
    for (at, &page) in accesses.iter().enumerate().rev() {
        next_use[at] = std::mem::replace(&mut upcoming[page as usize], at);
    }
    // By the next use; a page that is cached is there under the time of this very access when it comes.
    let mut cached: BTreeSet<usize> = BTreeSet::new();
    let mut hits = 0;
    for (at, &next) in next_use.iter().enumerate() {
        if cached.remove(&at) {
            hits += 1;
        } else if cached.len() == frames {
            cached.pop_last();
        }
        cached.insert(next);
    }
    hits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hits(mut policy: impl Policy, accesses: &[u32]) -> usize {
        accesses.iter().filter(|&&page| policy.access(page)).count()
    }

    #[test]
    fn lru_and_the_optimum_agree_with_what_is_worked_out_by_hand() {
        let accesses = [1, 2, 3, 1, 4, 1, 2, 3, 4];
        assert_eq!(hits(Lru::new(3, 5), &accesses), 2);
        assert_eq!(optimum(&accesses, 5, 3), 4);
    }

    #[test]
    fn a_loop_larger_than_the_cache_defeats_lru_and_not_those_that_resist_scans() {
        let accesses: Vec<u32> = (0..100_000).map(|at| at % 1200).collect();
        assert_eq!(hits(Lru::new(1000, 1200), &accesses), 0);
        assert_eq!(hits(Clock::new(1000, 1200), &accesses), 0);
        assert!(hits(S3Fifo::new(1000, 1200), &accesses) > 60_000);
        // All but one frame can hold the same pages all the time.
        let most = optimum(&accesses, 1200, 1000) as f64 / accesses.len() as f64;
        assert!((0.81..0.84).contains(&most), "{most}");
    }

    #[test]
    fn no_policy_beats_the_optimum_or_hits_what_was_never_there() {
        // Popular pages and a scan, from a small generator of its own.
        let mut state = 7u32;
        let mut next = 1000;
        let accesses: Vec<u32> = (0..50_000)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let random = state >> 8;
                if random.is_multiple_of(3) {
                    next += 1;
                    next
                } else {
                    (random % 1000) * (random / 1000 % 1000) / 1000
                }
            })
            .collect();
        let pages = 60_000;
        let most = optimum(&accesses, pages, 200);
        let policies: [Box<dyn Policy>; 5] = [
            Box::new(Lru::new(200, pages)),
            Box::new(Clock::new(200, pages)),
            Box::new(Sieve::new(200, pages)),
            Box::new(S3Fifo::new(200, pages)),
            Box::new(Arc::new(200, pages)),
        ];
        for mut policy in policies {
            let mut seen = vec![false; pages];
            let mut hits = 0;
            for &page in &accesses {
                let hit = policy.access(page);
                assert!(!hit || seen[page as usize]);
                seen[page as usize] = true;
                hits += usize::from(hit);
            }
            assert!(hits > 5000 && hits <= most, "{hits} of at most {most}");
        }
    }
}
