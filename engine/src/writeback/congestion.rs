//! When a device has enough to write (`write_congested`, WB-19).
//!
//! Whoever puts writes in front of a device faster than it takes them only makes its queue long, and a foreground read
//! or a small sync then waits behind all of it. So background passes stop when as much is in flight as the device
//! writes in [`TARGET_NS`], and go on when a quarter of that is done. Integrity passes never stop: somebody waits for
//! them.
//!
//! ```text
//!  pages in flight
//!   on  ┤     /\      /\      /\         a pass returns at once from on
//!   off ┤    /  \    /  \    /  \        down to off
//!       │   /    `--'    `--'    `
//!     0 ┼──/───────────────────────▶ time
//! ```
//!
//! Why these thresholds: 20 ms are a hundred times what a sleeping shard needs to wake, so the queue never runs dry
//! between *off* and the next pass, and they are little to who waits. The floor of two of the largest commands keeps one
//! in work while the next is made ready, whatever the estimate says; without it a device whose own latency is longer
//! than the target would be measured as slow, given less, and measured as slower. The cap keeps a wrong estimate from
//! filling the queue. And no more than half of what may be dirty without slowing anybody is in flight: what gathers in
//! the other half meanwhile goes out in large commands instead of page by page.

/// The time for which a device may have writes in front of it.
const TARGET_NS: u64 = 20_000_000;
/// The largest commands that are always allowed.
const COMMANDS_MIN: u64 = 2;
/// Never more than this: 64 MiB.
const PAGES_MAX: u64 = 16_384;

/// Whether background passes are put off, in one shard.
#[derive(Debug)]
pub(crate) struct Congestion {
    floor_pages: u64,
    cap_pages: u64,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Congested,
}

impl Congestion {
    /// For commands of up to `command_pages_max` pages and a shard where `freerun_pages` may be dirty unhindered.
    pub(crate) fn new(command_pages_max: u64, freerun_pages: u64) -> Self {
        let cap_pages = (freerun_pages / 2).clamp(1, PAGES_MAX);
        let floor_pages = (COMMANDS_MIN * command_pages_max).min(cap_pages);
        Self { floor_pages, cap_pages, state: State::Free }
    }

    /// From how many pages in flight passes are put off.
    pub(crate) fn on_pages(&self, pages_per_s: f64) -> u64 {
        let target = pages_per_s * TARGET_NS as f64 / 1e9;
        (target as u64).clamp(self.floor_pages, self.cap_pages)
    }

    /// Down to how many they stay so (as in NFS, a quarter less).
    pub(crate) fn off_pages(&self, pages_per_s: f64) -> u64 {
        let on = self.on_pages(pages_per_s);
        on - on.div_ceil(4)
    }

    /// Half of what may be in flight: no command of a pass carries more, so that a second one is with the device when the
    /// first ends, however small the cache.
    pub(crate) fn half_pages(&self, pages_per_s: f64) -> u64 {
        (self.on_pages(pages_per_s) / 2).max(1)
    }

    /// Whether a background pass has to be put off, with `in_flight_pages` under writeback at a device of this rate.
    pub(crate) fn is_congested(&mut self, in_flight_pages: u64, pages_per_s: f64) -> bool {
        self.state = match self.state {
            State::Free if in_flight_pages >= self.on_pages(pages_per_s) => State::Congested,
            State::Congested if in_flight_pages <= self.off_pages(pages_per_s) => State::Free,
            same => same,
        };
        self.state == State::Congested
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// 200 MiB/s.
    const RATE: f64 = 51_200.0;

    #[test]
    fn wb19_congestion_begins_at_on_and_ends_at_off_only() {
        let mut congestion = Congestion::new(256, 1 << 20);
        assert_eq!((congestion.on_pages(RATE), congestion.off_pages(RATE)), (1024, 768));
        assert!(!congestion.is_congested(1023, RATE));
        assert!(congestion.is_congested(1024, RATE));
        assert!(congestion.is_congested(769, RATE), "not before off");
        assert!(!congestion.is_congested(768, RATE));
        assert!(!congestion.is_congested(1023, RATE), "and not again before on");
    }

    #[test]
    fn a_slow_device_still_has_one_command_in_work_and_one_ready() {
        let congestion = Congestion::new(256, 1 << 20);
        assert_eq!(congestion.on_pages(1.0), 512);
        assert!(congestion.off_pages(1.0) > 256);
        assert_eq!(congestion.half_pages(1.0), 256);
    }

    #[test]
    fn a_fast_device_is_capped_and_a_small_cache_keeps_half() {
        assert_eq!(Congestion::new(256, 1 << 20).on_pages(1e9), PAGES_MAX);
        for freerun in 0..20 {
            let mut congestion = Congestion::new(256, freerun);
            assert_eq!(congestion.on_pages(RATE), (freerun / 2).max(1));
            assert!(congestion.off_pages(RATE) < congestion.on_pages(RATE));
            congestion.is_congested(1 << 20, RATE);
            assert!(!congestion.is_congested(0, RATE), "with nothing in flight there is no congestion");
        }
    }
}
