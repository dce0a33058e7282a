//! Waiting on the device: every wait has a deadline, and time can come from a test.

use std::time::{Duration, Instant};

use crate::error::DriverError;

/// Where the driver's waits take the time from.
pub(crate) trait Clock: Send + Sync {
    /// Time since an arbitrary, fixed moment.
    fn now(&self) -> Duration;

    /// Lets a little time pass between two looks at the device; `looks` counts them, from 0.
    fn rest(&self, looks: u32);
}

/// The system's monotonic clock.
pub(crate) struct MonotonicClock {
    start: Instant,
}

impl MonotonicClock {
    pub(crate) fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Clock for MonotonicClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Most waits end within microseconds, so the first looks follow each other at once.
    fn rest(&self, looks: u32) {
        const SPINS: u32 = 1000;
        if looks < SPINS {
            std::hint::spin_loop();
        } else {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// Looks until `look` finds something or fails, for at most `limit`; `during` completes the sentence "the
/// controller took longer than … ".
///
/// It looks once more after the deadline has passed, so a caller that was descheduled doesn't blame the device.
pub(crate) fn until<T>(
    clock: &dyn Clock,
    during: &'static str,
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<T>, DriverError>,
) -> Result<T, DriverError> {
    let deadline = clock.now() + limit;
    let mut looks = 0u32;
    loop {
        let is_last = clock.now() >= deadline;
        if let Some(found) = look()? {
            return Ok(found);
        }
        if is_last {
            return Err(DriverError::Timeout { during, limit });
        }
        clock.rest(looks);
        looks = looks.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeClock;

    #[test]
    fn a_wait_without_result_ends_at_its_limit() {
        let limit = Duration::from_millis(5);
        let result: Result<(), _> = until(&FakeClock::default(), "to test", limit, || Ok(None));
        assert!(matches!(result, Err(DriverError::Timeout { during: "to test", limit: l }) if l == limit));
    }

    #[test]
    fn a_result_that_is_there_needs_no_time() {
        assert_eq!(until(&FakeClock::default(), "", Duration::ZERO, || Ok(Some(3))).unwrap(), 3);
    }

    #[test]
    fn an_error_ends_the_wait_at_once() {
        let mut looks = 0;
        let result: Result<(), _> = until(&FakeClock::default(), "", Duration::from_secs(1), || {
            looks += 1;
            Err(DriverError::Gone)
        });
        assert!(matches!(result, Err(DriverError::Gone)));
        assert_eq!(looks, 1);
    }
}
