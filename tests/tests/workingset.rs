//! What eviction keeps: a working set against scans, by what it remembers of what it evicted (WB-27).
//!
//! Each pattern runs on the engine and on a plain second-chance clock of as many frames. The printed hit rates are those of `docs/performance.md`.

#![expect(clippy::print_stdout, reason = "the hit rates are what there is to see")]

use std::collections::HashMap;

use foliant::{EngineOptions, Mapping, MappingOptions};
use foliant_nvme_emulated::EmulatedConfig;
use foliant_tests::{Bed, options};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const FRAMES: u64 = 512;
const MIB: u64 = 1 << 20;

/// A second-chance clock without a memory of what it evicted.
#[derive(Default)]
struct PlainClock {
    frames: Vec<(u64, bool)>,
    at: HashMap<u64, usize>,
    hand: usize,
}

impl PlainClock {
    /// Whether it was a hit.
    fn access(&mut self, page: u64) -> bool {
        if let Some(&frame) = self.at.get(&page) {
            self.frames[frame].1 = true;
            return true;
        }
        if self.frames.len() < FRAMES as usize {
            self.at.insert(page, self.frames.len());
            self.frames.push((page, true));
            return false;
        }
        while std::mem::take(&mut self.frames[self.hand].1) {
            self.hand = (self.hand + 1) % self.frames.len();
        }
        self.at.remove(&self.frames[self.hand].0);
        self.at.insert(page, self.hand);
        self.frames[self.hand] = (page, true);
        self.hand = (self.hand + 1) % self.frames.len();
        false
    }
}

/// Hits of 1000 accesses, after the first half of `pattern`: of the pages that `counts` selects.
#[derive(Debug)]
struct Rates {
    engine: u64,
    plain: u64,
}

fn run(name: &str, shards: usize, pattern: &[u64], counts: impl Fn(u64) -> bool) -> Rates {
    let config = EmulatedConfig::ram(256 * MIB, 512);
    let mut bed = Bed::new(config, EngineOptions { shards, ..options(FRAMES) });
    let mapping = bed.open(&MappingOptions { readahead_bytes_max: 0, ..Default::default() });
    let mut plain = PlainClock::default();
    let (mut counted, mut hits, mut plain_hits) = (0, 0, 0);
    for (number, &page) in pattern.iter().enumerate() {
        let before = bed.engine().stats().pages_read;
        read(&mut bed, &mapping, page);
        let hit = bed.engine().stats().pages_read == before;
        let plain_hit = plain.access(page);
        if number >= pattern.len() / 2 && counts(page) {
            counted += 1;
            hits += u64::from(hit);
            plain_hits += u64::from(plain_hit);
        }
    }
    bed.assert_consistent();
    let rates = Rates { engine: hits * 1000 / counted, plain: plain_hits * 1000 / counted };
    println!("{name}, {shards} shards: {rates:?} of 1000 hit; {} refaults", bed.engine().stats().refaults);
    rates
}

fn read(bed: &mut Bed, mapping: &Mapping, page: u64) {
    let mut byte = [0];
    bed.run(mapping.read_at_async(page * 4096, &mut byte)).unwrap();
}

#[test]
fn wb27_a_working_set_is_kept_against_a_scan() {
    for shards in [1, 2] {
        // Between uses of a page of the set the scan passes by more pages than would leave it in a plain clock.
        let mut random = SmallRng::seed_from_u64(1);
        let mut next = 10_000;
        let pattern: Vec<u64> = (0..60_000u64)
            .map(|number| {
                if random.random_range(0..10) < 7 {
                    next += 1;
                    next
                } else {
                    number * 7 % 300 + number % 2 * 512
                }
            })
            .collect();
        let rates = run("a set of 300 pages beside a scan", shards, &pattern, |page| page < 10_000);
        assert!(rates.engine > rates.plain + 150, "{rates:?}");
    }
}

#[test]
fn wb27_a_skewed_load_beside_a_scan_and_alone_is_not_worse_off() {
    for shards in [1, 2] {
        for scan_parts in [0, 5] {
            let mut random = SmallRng::seed_from_u64(9);
            // Zipf's law with exponent 1 over 4096 pages, by inversion.
            let weights: Vec<f64> = (1..=4096u32).map(|rank| 1.0 / f64::from(rank)).collect();
            let sum: f64 = weights.iter().sum();
            let cumulated: Vec<f64> = weights
                .iter()
                .scan(0.0, |so_far, weight| {
                    *so_far += weight / sum;
                    Some(*so_far)
                })
                .collect();
            let mut next = 10_000;
            let pattern: Vec<u64> = (0..60_000)
                .map(|_| {
                    if random.random_range(0..10) < scan_parts {
                        next += 1;
                        return next;
                    }
                    let at: f64 = random.random();
                    let rank = cumulated.partition_point(|&below| below < at) as u64;
                    // Which pages are popular has nothing to do with where they lie.
                    rank * 1237 % 4099
                })
                .collect();
            let name = format!("Zipf with {scan_parts} of 10 accesses by a scan");
            let rates = run(&name, shards, &pattern, |page| page < 10_000);
            assert!(rates.engine + 20 >= rates.plain, "{rates:?}");
        }
    }
}

#[test]
fn wb27_refaults_are_counted_and_hot_only_where_they_are_near() {
    let mut bed = Bed::new(EmulatedConfig::ram(64 * MIB, 512), options(FRAMES));
    let mapping = bed.open(&MappingOptions { readahead_bytes_max: 0, ..Default::default() });
    for page in 0..600 {
        read(&mut bed, &mapping, page);
    }
    let stats = bed.engine().stats();
    assert!(stats.pages_evicted > 80 && stats.refaults == 0, "{stats:?}");
    for page in 0..50 {
        read(&mut bed, &mapping, page);
    }
    let near = bed.engine().stats();
    assert!(near.refaults >= 30 && near.refaults_hot == near.refaults, "{near:?}");
    // So far away that hardly any of them is known yet.
    for page in 1000..2900 {
        read(&mut bed, &mapping, page);
    }
    for page in 1000..1100 {
        read(&mut bed, &mapping, page);
    }
    let far = bed.engine().stats();
    assert!(far.refaults < near.refaults + 10, "{far:?}");
    assert_eq!(far.refaults_hot, far.refaults, "{far:?}");
}

#[test]
fn wb27_what_many_use_at_once_counts_as_used_once() {
    let mut bed = Bed::new(EmulatedConfig::ram(64 * MIB, 512), options(FRAMES));
    let mapping = bed.open(&MappingOptions { readahead_bytes_max: 0, ..Default::default() });
    // Pages that are used twice at once, and never again, pass by pages that are used twice with time between.
    let kept = 0..100;
    for page in kept.clone() {
        read(&mut bed, &mapping, page);
    }
    let mut next = 10_000;
    let mut pass = |bed: &mut Bed, pages: u64| {
        for page in next..next + pages {
            read(bed, &mapping, page);
            read(bed, &mapping, page);
        }
        next += pages;
    };
    for _ in 0..3 {
        pass(&mut bed, 300);
        for page in kept.clone() {
            read(&mut bed, &mapping, page);
        }
    }
    pass(&mut bed, 3000);
    let before = bed.engine().stats().pages_read;
    for page in kept.clone() {
        read(&mut bed, &mapping, page);
    }
    let missed = bed.engine().stats().pages_read - before;
    assert!(missed < 20, "{missed} of 100 pages have gone");
    bed.assert_consistent();
}

#[test]
fn wb27_no_request_waits_for_eviction_under_a_steady_load_of_misses() {
    for shards in [1, 2] {
        let mut bed = Bed::new(
            EmulatedConfig::ram(256 * MIB, 512),
            EngineOptions { shards, ..options(FRAMES * shards as u64) },
        );
        let mapping = bed.open(&MappingOptions { readahead_bytes_max: 0, ..Default::default() });
        let mut bytes = vec![0; 16 * 4096];
        for part in 0..1000u64 {
            // Sixteen pages at once, then a page at a time.
            bed.run(mapping.read_at_async(part * 65536 % (128 * MIB), &mut bytes)).unwrap();
            for page in 0..4 {
                read(&mut bed, &mapping, 40_000 + 4 * part + page);
            }
        }
        let stats = bed.engine().stats();
        assert!(stats.pages_evicted > 10_000, "{stats:?}");
        assert_eq!(stats.evictions_on_demand, 0, "{stats:?}");
        bed.assert_consistent();
    }
}

#[test]
fn wb27_where_too_little_is_clean_the_flusher_is_asked_before_anybody_waits() {
    let mut bed = Bed::new(EmulatedConfig::ram(64 * MIB, 512), options(FRAMES));
    let mapping = bed.open(&MappingOptions { readahead_bytes_max: 0, ..Default::default() });
    // Four fifths are dirty, which the flusher leaves alone by itself, and the rest is pinned.
    for at in 0..FRAMES * 4 / 5 {
        bed.run(mapping.write_at_async(at * 4096, &[7; 4096])).unwrap();
    }
    let pinned: Vec<_> =
        (FRAMES * 4 / 5..FRAMES - 10).map(|page| bed.run(mapping.pin_async(page)).unwrap()).collect();
    for _ in 0..1000 {
        bed.step();
    }
    let stats = bed.engine().stats();
    assert!(stats.pages_written > 0 && stats.pages_evicted > 0, "{stats:?}");
    assert_eq!(stats.evictions_on_demand, 0, "{stats:?}");
    drop(pinned);
}
