//! How long things took: a histogram, its percentiles, and a drawing of it.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::table::count;

/// The longest time told apart, in nanoseconds: ten minutes.
const TIME_NS_MAX: u64 = 600_000_000_000;
/// Width of the longest bar in characters.
const BAR_CHARS: u64 = 40;

/// Times in nanoseconds, kept with three significant digits.
#[derive(Clone, Debug)]
pub(crate) struct Latencies {
    histogram: Histogram<u64>,
}

impl Latencies {
    pub(crate) fn new() -> Self {
        let histogram = Histogram::new_with_bounds(1, TIME_NS_MAX, 3);
        Self { histogram: histogram.expect("1 ns to ten minutes with three digits are valid bounds") }
    }

    /// Adds one time; beyond ten minutes it counts as ten minutes.
    pub(crate) fn record(&mut self, time: Duration) {
        self.histogram.saturating_record(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Adds all times of another.
    pub(crate) fn merge(&mut self, other: &Self) {
        // Both have the same bounds, so that each value of one fits the other.
        self.histogram.add(&other.histogram).expect("histograms of the same bounds add up");
    }

    /// Forgets all times.
    pub(crate) fn clear(&mut self) {
        self.histogram.reset();
    }

    /// How many times there are in each step of a ladder with `per_octave` steps to a factor of two, from the shortest
    /// time to the longest: the ends of the step in microseconds, and the number.
    pub(crate) fn steps(&self, per_octave: u32) -> Vec<(f64, f64, u64)> {
        if self.histogram.is_empty() {
            return Vec::new();
        }
        let at = |step: i32| (f64::from(step) / f64::from(per_octave)).exp2();
        let step_of = |ns: u64| ((ns.max(1) as f64).log2() * f64::from(per_octave)).floor() as i32;
        let (first, last) = (step_of(self.histogram.min()), step_of(self.histogram.max()));
        let mut counts = vec![0; (last - first + 1) as usize];
        for value in self.histogram.iter_recorded() {
            let index = (step_of(value.value_iterated_to()) - first).clamp(0, last - first);
            counts[index as usize] += value.count_at_value();
        }
        (first..).zip(counts).map(|(step, count)| (at(step) / 1e3, at(step + 1) / 1e3, count)).collect()
    }

    pub(crate) fn summary(&self) -> Summary {
        let at = |quantile| self.histogram.value_at_quantile(quantile) as f64 / 1e3;
        Summary {
            count: self.histogram.len(),
            mean_us: self.histogram.mean() / 1e3,
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: self.histogram.max() as f64 / 1e3,
        }
    }

    /// A bar for each power of two from the shortest time to the longest.
    pub(crate) fn bars(&self) -> Vec<String> {
        if self.histogram.is_empty() {
            return Vec::new();
        }
        let first = self.histogram.min().max(1).ilog2();
        let last = self.histogram.max().max(1).ilog2();
        let in_power = |power: u32| self.histogram.count_between(1 << power, (2 << power) - 1);
        let largest = (first..=last).map(in_power).max().unwrap_or(1).max(1);
        let bar = |power: u32| {
            let number = in_power(power);
            let chars = (number * BAR_CHARS).div_ceil(largest) as usize;
            let (bar, width) = ("#".repeat(chars), BAR_CHARS as usize);
            format!("{:>9} |{bar:<width$}| {}", microseconds((1u64 << power) as f64 / 1e3), count(number))
        };
        (first..=last).map(bar).collect()
    }
}

/// The percentiles that are shown, in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) count: u64,
    pub(crate) mean_us: f64,
    pub(crate) p50_us: f64,
    pub(crate) p90_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    pub(crate) max_us: f64,
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [p50, p90, p99, p999, max] =
            [self.p50_us, self.p90_us, self.p99_us, self.p999_us, self.max_us].map(microseconds);
        write!(f, "p50 {p50}, p90 {p90}, p99 {p99}, p99.9 {p999}, max {max}")
    }
}

/// A time in the unit that suits it.
pub(crate) fn microseconds(us: f64) -> String {
    match us {
        us if us < 1.0 => format!("{:.0} ns", us * 1e3),
        us if us < 1e3 => format!("{us:.1} us"),
        us if us < 1e6 => format!("{:.1} ms", us / 1e3),
        us => format!("{:.1} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_come_in_microseconds() {
        let mut latencies = Latencies::new();
        (1..=1000).for_each(|us| latencies.record(Duration::from_micros(us)));
        let summary = latencies.summary();
        assert_eq!(summary.count, 1000);
        assert!((summary.p50_us - 500.0).abs() < 2.0, "{summary:?}");
        assert!((summary.p99_us - 990.0).abs() < 2.0, "{summary:?}");
    }

    #[test]
    fn every_time_is_in_exactly_one_bar() {
        let mut latencies = Latencies::new();
        for ns in [1, 2, 3, 1000, 1024, 70_000] {
            latencies.record(Duration::from_nanos(ns));
        }
        let bars = latencies.bars();
        let counted: u64 = bars.iter().filter_map(|bar| bar.rsplit(' ').next()?.parse::<u64>().ok()).sum();
        assert_eq!((bars.len(), counted), (17, 6));
    }

    #[test]
    fn every_time_is_in_exactly_one_step_of_the_ladder() {
        let mut latencies = Latencies::new();
        let times = [1, 2, 3, 1000, 1024, 1025, 70_000, 3_000_000];
        times.iter().for_each(|ns| latencies.record(Duration::from_nanos(*ns)));
        let steps = latencies.steps(4);
        assert_eq!(steps.iter().map(|(_, _, count)| count).sum::<u64>(), times.len() as u64);
        assert!(steps.is_sorted_by(|(_, end, _), (begin, ..)| (end - begin).abs() < 1e-9 * end));
        let (begin, end, _) = steps[0];
        assert!(begin <= 0.001 && end > 0.001, "{begin} to {end}");
    }

    #[test]
    fn no_times_make_no_bars_and_no_steps() {
        assert!(Latencies::new().bars().is_empty());
        assert!(Latencies::new().steps(4).is_empty());
    }

    #[test]
    fn times_beyond_the_bounds_are_kept_at_the_bound() {
        let mut latencies = Latencies::new();
        latencies.record(Duration::from_secs(3600));
        latencies.record(Duration::ZERO);
        assert_eq!(latencies.summary().count, 2);
    }
}
