//! Where the emulated device reads the time: the machine's monotonic clock, or one that a test turns by hand.
//!
//! Time decides only when a modelled delay ends ([`Latency`](crate::Latency), [`Action::Delay`](crate::Action)).
//! A device without delays never asks for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A clock that stands still until [`advance`](Self::advance) moves it: what makes delays testable without sleeping.
#[derive(Debug, Default)]
pub struct ManualClock {
    now_ns: AtomicU64,
}

impl ManualClock {
    /// A clock that shows zero.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Moves the clock forward. A delay that has ended by then completes at the next pump.
    pub fn advance(&self, by: Duration) {
        self.now_ns.fetch_add(duration_ns(by), Ordering::Release);
    }

    /// The time shown, in nanoseconds since the clock was made.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.now_ns.load(Ordering::Acquire)
    }
}

/// The clock by which modelled delays end.
#[derive(Clone, Debug, Default)]
pub enum Clock {
    /// The machine's monotonic clock.
    #[default]
    Monotonic,
    /// A clock that a test turns.
    Manual(Arc<ManualClock>),
}

/// A [`Clock`] with its origin fixed, so that it can be read as plain nanoseconds.
#[derive(Debug)]
pub(crate) enum RunningClock {
    Monotonic { origin: Instant },
    Manual(Arc<ManualClock>),
}

impl RunningClock {
    pub(crate) fn start(clock: &Clock) -> Self {
        match clock {
            Clock::Monotonic => Self::Monotonic { origin: Instant::now() },
            Clock::Manual(manual) => Self::Manual(Arc::clone(manual)),
        }
    }

    pub(crate) fn now_ns(&self) -> u64 {
        match self {
            Self::Monotonic { origin } => duration_ns(origin.elapsed()),
            Self::Manual(manual) => manual.now_ns(),
        }
    }
}

/// A duration in nanoseconds; 584 years and longer count as 584 years.
pub(crate) fn duration_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manual_clock_moves_only_when_advanced() {
        let manual = ManualClock::new();
        let clock = RunningClock::start(&Clock::Manual(Arc::clone(&manual)));
        assert_eq!(clock.now_ns(), 0);
        manual.advance(Duration::from_micros(3));
        assert_eq!(clock.now_ns(), 3_000);
        assert_eq!(clock.now_ns(), 3_000);
    }

    #[test]
    fn monotonic_clock_never_goes_back() {
        let clock = RunningClock::start(&Clock::Monotonic);
        let first = clock.now_ns();
        assert!(clock.now_ns() >= first);
    }
}
