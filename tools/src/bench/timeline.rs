//! What happened when: the measured time in windows of one length, with the latencies of each.
//!
//! Whoever measures records into a window of its own and hands it in when it is over, so that threads meet once a
//! window and not once an access.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::latency::{Latencies, Summary};

/// Windows of a long measurement: as many as a plot shows apart.
const WINDOWS_MAX: u32 = 60;
/// A shorter window holds too little to speak of a 99.9th percentile.
const WIDTH_MIN: Duration = Duration::from_millis(50);

/// The windows of one measurement.
#[derive(Debug)]
pub(crate) struct Timeline {
    begin: Instant,
    width: Duration,
    windows: Vec<Mutex<Latencies>>,
}

/// What happened in one window.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    /// The middle of the window, in seconds from the start.
    pub(crate) at_seconds: f64,
    pub(crate) operations_per_second: f64,
    /// `None` when nothing ended in the window.
    pub(crate) latency: Option<Summary>,
}

impl Timeline {
    /// Windows over `duration` from now on.
    pub(crate) fn new(duration: Duration) -> Self {
        let fitting = duration.as_nanos() / WIDTH_MIN.as_nanos();
        let count = u32::try_from(fitting).unwrap_or(u32::MAX).clamp(1, WINDOWS_MAX);
        let windows = (0..count).map(|_| Mutex::new(Latencies::new())).collect();
        Self { begin: Instant::now(), width: duration / count, windows }
    }

    /// One thread's way to record.
    pub(crate) fn recorder(&self) -> Recorder<'_> {
        Recorder { timeline: self, window: Latencies::new(), index: 0, end: self.begin + self.width }
    }

    /// What all windows hold together.
    pub(crate) fn total(&self) -> Latencies {
        let mut total = Latencies::new();
        self.windows.iter().for_each(|window| total.merge(&lock(window)));
        total
    }

    /// Each window.
    pub(crate) fn windows(&self) -> Vec<Window> {
        let width = self.width.as_secs_f64().max(f64::MIN_POSITIVE);
        let window = |(index, window): (usize, &Mutex<Latencies>)| {
            let summary = lock(window).summary();
            Window {
                at_seconds: (index as f64 + 0.5) * width,
                operations_per_second: summary.count as f64 / width,
                latency: (summary.count > 0).then_some(summary),
            }
        };
        self.windows.iter().enumerate().map(window).collect()
    }

    /// The window that `now` lies in; what comes after the end counts for the last.
    fn index_of(&self, now: Instant) -> usize {
        let passed = now.saturating_duration_since(self.begin).as_nanos() / self.width.as_nanos().max(1);
        usize::try_from(passed).unwrap_or(usize::MAX).min(self.windows.len() - 1)
    }
}

/// Records for one thread. What it holds is handed in when a window is over, and when it is dropped.
#[derive(Debug)]
pub(crate) struct Recorder<'a> {
    timeline: &'a Timeline,
    window: Latencies,
    index: usize,
    /// When the window is over.
    end: Instant,
}

impl Recorder<'_> {
    /// An access that took `time` ended at `now`, which never goes back.
    #[inline]
    pub(crate) fn record(&mut self, now: Instant, time: Duration) {
        if now >= self.end {
            self.turn(now);
        }
        self.window.record(time);
    }

    #[cold]
    fn turn(&mut self, now: Instant) {
        self.hand_in();
        self.index = self.timeline.index_of(now);
        let is_last = self.index + 1 == self.timeline.windows.len();
        let past_it = self.timeline.width * (self.index as u32 + 1);
        // The last window takes all that is still to come.
        self.end = if is_last { now + Duration::from_secs(86_400) } else { self.timeline.begin + past_it };
    }

    fn hand_in(&mut self) {
        lock(&self.timeline.windows[self.index]).merge(&self.window);
        self.window.clear();
    }
}

impl Drop for Recorder<'_> {
    fn drop(&mut self) {
        self.hand_in();
    }
}

/// A thread that panicked leaves a histogram that is still one.
fn lock(window: &Mutex<Latencies>) -> MutexGuard<'_, Latencies> {
    window.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_access_is_in_the_window_in_which_it_ended_and_late_ones_in_the_last() {
        let timeline = Timeline::new(Duration::from_secs(6));
        assert_eq!((timeline.windows.len(), timeline.width), (60, Duration::from_millis(100)));
        let at = |ms| timeline.begin + Duration::from_millis(ms);
        let (mut one, mut other) = (timeline.recorder(), timeline.recorder());
        for ms in [1, 99, 100, 350, 5999, 6000, 9000, 9001] {
            one.record(at(ms), Duration::from_micros(ms));
        }
        other.record(at(350), Duration::from_millis(1));
        drop((one, other));
        let counts: Vec<u64> = timeline.windows.iter().map(|window| lock(window).summary().count).collect();
        let expected = |index| match index {
            0 | 3 => 2,
            1 => 1,
            59 => 4,
            _ => 0,
        };
        assert_eq!(counts, (0..60).map(expected).collect::<Vec<_>>());
        assert_eq!(timeline.total().summary().count, 9);
        let windows = timeline.windows();
        assert!(
            (windows[3].at_seconds - 0.35).abs() < 1e-9
                && (windows[3].operations_per_second - 20.0).abs() < 1e-9
        );
        assert!(windows[2].latency.is_none());
    }

    #[test]
    fn a_moment_is_one_window() {
        for duration in [Duration::ZERO, Duration::from_millis(1), Duration::from_millis(99)] {
            let timeline = Timeline::new(duration);
            let mut recorder = timeline.recorder();
            recorder.record(Instant::now(), Duration::from_micros(1));
            drop(recorder);
            assert_eq!((timeline.windows.len(), timeline.total().summary().count), (1, 1));
        }
    }
}
