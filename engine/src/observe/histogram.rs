//! How long things took, counted in buckets: what a shard records, and what a reader makes of it.
//!
//! Buckets are log-linear: four to each power of two, so that a bucket's ends are at most a quarter apart, and fixed,
//! so that recording is an index and an addition, and histograms of shards add up.
//!
//! ```text
//!  bucket      0        1         2         3       4 … 7       8 … 11          100 … 103
//!  from    0        256 ns    512 ns    768 ns     1.02 µs     2.05 µs  …       17.2 s      (up to 34.4 s and above)
//! ```

use std::sync::atomic::{AtomicU64, Ordering};

use crate::stats::bump;

/// Buckets of a histogram.
pub(crate) const BUCKETS: usize = 104;
/// Words of a histogram on a stats page: the sum, and the buckets.
pub(crate) const WORDS: usize = 1 + BUCKETS;

/// Buckets to a power of two, and below the first power.
const STEPS: u64 = 4;
/// The first power of two that is divided: 1,024 ns.
const FIRST_OCTAVE: u32 = 10;

fn bucket_of(ns: u64) -> usize {
    if ns < 1 << FIRST_OCTAVE {
        return (ns >> (FIRST_OCTAVE - 2)) as usize;
    }
    let octave = ns.ilog2();
    let step = (ns >> (octave - 2)) % STEPS;
    let bucket = STEPS + u64::from(octave - FIRST_OCTAVE) * STEPS + step;
    (bucket as usize).min(BUCKETS - 1)
}

/// Where a bucket begins; where the last one ends for `BUCKETS`.
fn begin_ns(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < STEPS {
        return bucket << (FIRST_OCTAVE - 2);
    }
    let octave = u64::from(FIRST_OCTAVE) + (bucket - STEPS) / STEPS;
    (STEPS + (bucket - STEPS) % STEPS) << (octave - 2)
}

/// Times as they are recorded: nothing is allocated, locked or lost.
#[derive(Debug)]
pub(crate) struct RecordedTimes {
    sum_ns: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

impl Default for RecordedTimes {
    fn default() -> Self {
        Self { sum_ns: AtomicU64::new(0), buckets: [const { AtomicU64::new(0) }; BUCKETS] }
    }
}

impl RecordedTimes {
    /// Records a time; by the one thread that records here at all.
    #[inline]
    pub(crate) fn record_alone(&self, ns: u64) {
        bump(&self.sum_ns, ns);
        bump(&self.buckets[bucket_of(ns)], 1);
    }

    /// Records a time; any thread, where all threads that record here use this.
    pub(crate) fn record(&self, ns: u64) {
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
        self.buckets[bucket_of(ns)].fetch_add(1, Ordering::Relaxed);
    }

    /// The words of it on a stats page.
    pub(crate) fn words(&self) -> impl Iterator<Item = u64> + '_ {
        std::iter::once(&self.sum_ns).chain(&self.buckets).map(|word| word.load(Ordering::Relaxed))
    }
}

/// A histogram of times, as a stats page has it: read-only, and made for differences and sums.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LatencyHistogram {
    sum_ns: u64,
    buckets: Box<[u64]>,
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        Self { sum_ns: 0, buckets: vec![0; BUCKETS].into() }
    }
}

impl LatencyHistogram {
    /// From the words of a stats page; `None` unless there are as many as a histogram has.
    pub(crate) fn from_words(words: &[u64]) -> Option<Self> {
        let (sum_ns, buckets) = words.split_first()?;
        (buckets.len() == BUCKETS).then(|| Self { sum_ns: *sum_ns, buckets: buckets.into() })
    }

    /// How many times were recorded.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// All times together, in nanoseconds.
    #[must_use]
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns
    }

    /// The time, in nanoseconds, that the share `quantile` (0 to 1) of all times doesn't exceed: within the bucket, which
    /// is at most a quarter wide, as if its times lay evenly. `None` of no times.
    #[must_use]
    pub fn quantile_ns(&self, quantile: f64) -> Option<u64> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let rank = ((quantile.clamp(0.0, 1.0) * count as f64).ceil() as u64).clamp(1, count);
        let mut below = 0u64;
        for (bucket, &times) in self.buckets.iter().enumerate() {
            if below.saturating_add(times) >= rank {
                let (begin, end) = (begin_ns(bucket), begin_ns(bucket + 1));
                let within = (rank - below) as f64 / times as f64;
                return Some(begin + ((end - begin) as f64 * within) as u64);
            }
            below = below.saturating_add(times);
        }
        None
    }

    /// What was recorded since `earlier`, an older state of the same histogram.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let pairs = self.buckets.iter().zip(&earlier.buckets);
        Self {
            sum_ns: self.sum_ns.saturating_sub(earlier.sum_ns),
            buckets: pairs.map(|(now, before)| now.saturating_sub(*before)).collect(),
        }
    }

    /// Adds the times of another.
    pub fn add(&mut self, other: &Self) {
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine = mine.saturating_add(*theirs);
        }
    }

    /// How many times were below each power of two, from 1,024 ns on: the power in nanoseconds, and the number. The last
    /// bucket, which has no upper end, is in none; see [`count`](Self::count).
    pub fn below_powers(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut below = 0u64;
        self.buckets[..BUCKETS - STEPS as usize].chunks(STEPS as usize).enumerate().map(
            move |(power, steps)| {
                below = steps.iter().fold(below, |sum, count| sum.saturating_add(*count));
                (1 << (FIRST_OCTAVE as usize + power), below)
            },
        )
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(times: &[u64]) -> LatencyHistogram {
        let recorded = RecordedTimes::default();
        times.iter().for_each(|&ns| recorded.record(ns));
        LatencyHistogram::from_words(&recorded.words().collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn buckets_follow_each_other_without_a_gap_and_are_at_most_a_quarter_wide() {
        for bucket in 0..BUCKETS {
            let (begin, end) = (begin_ns(bucket), begin_ns(bucket + 1));
            assert!(begin < end);
            assert_eq!((bucket_of(begin), bucket_of(end - 1)), (bucket, bucket));
            assert!(bucket < 4 || (end - begin) * 4 <= begin, "bucket {bucket}: {begin} to {end}");
        }
        assert_eq!(begin_ns(BUCKETS), 1 << 35);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_of_nothing_are_none_and_of_one_time_its_bucket() {
        assert_eq!(of(&[]).quantile_ns(0.5), None);
        let only = of(&[100_000]).quantile_ns(0.99).unwrap();
        assert!((98_304..=114_688).contains(&only), "{only}");
    }

    #[test]
    fn what_was_recorded_since_and_what_others_recorded_add_up() {
        let (first, both) = (of(&[5_000, 7_000]), of(&[5_000, 7_000, 9_000_000]));
        let since = both.since(&first);
        assert_eq!(since, of(&[9_000_000]));
        let mut sum = first;
        sum.add(&since);
        assert_eq!(sum, both);
    }

    #[test]
    fn powers_count_everything_below_them_and_the_last_bucket_is_beyond_all() {
        let times = of(&[10, 1_023, 1_024, 5_000, u64::MAX]);
        let powers: Vec<_> = times.below_powers().collect();
        assert_eq!((powers[0], powers[1], powers[3]), ((1_024, 2), (2_048, 3), (8_192, 4)));
        assert_eq!((powers.last().unwrap().1, times.count()), (4, 5));
    }

    #[test]
    fn words_of_another_number_are_no_histogram() {
        assert_eq!(LatencyHistogram::from_words(&[]), None);
        assert_eq!(LatencyHistogram::from_words(&[0; WORDS - 1]), None);
    }

    proptest! {
        #[test]
        fn a_quantile_lies_within_a_quarter_of_the_exact_one(
            mut times in prop::collection::vec(1_024u64..10_000_000_000, 1..200), quantile in 0.01f64..1.0
        ) {
            let found = of(&times).quantile_ns(quantile).unwrap() as f64;
            times.sort_unstable();
            let rank = (quantile * times.len() as f64).ceil() as usize;
            let exact = times[rank.clamp(1, times.len()) - 1] as f64;
            prop_assert!(found >= exact * 0.8 && found <= exact * 1.25 + 1.0, "{found} for {exact}");
        }
    }
}
