//! How fast writers may dirty pages (`balance_dirty_pages`, WB-24): figures in, pauses out.
//!
//! # The limits
//! ```text
//!                           the middle of
//!                         background and limit          (8th of the way, at most 16 pages)
//!  0        background          freerun         setpoint        ceiling  limit        frames
//!  ├────────────┼──────────────────┼───────────────┼───────────────┼───────┼─────────────┤
//!  │ the flusher│ the flusher writes; nobody is    │ writers are   │ writers wait        │
//!  │ rests      │ slowed below freerun             │ slowed        │                     │
//! ```
//!
//! # The curve
//! Writers above freerun may dirty `write bandwidth · position ratio` pages a second, all together. The position ratio
//! (`wb_position_ratio`) is a cubic of the distance to the setpoint:
//!
//! ```text
//!  position ratio                     d = dirty pages
//!   2 ┤─────────────*                             ⎛ setpoint - d     ⎞³
//!     │             .*                   r(d) = 1+⎜──────────────────⎟
//!     │             .  *                          ⎝ceiling - setpoint⎠
//!   1 ┤             .     * * * * *
//!     │             .             . *
//!     │             .             .   *
//!   0 ┤             .             .    *─────────
//!     └─────────────┴───────┴─────┴────┴─────────▶ d
//!                freerun  setpoint   ceiling
//! ```
//!
//! The properties that it must have, each a test below:
//! 1. r = 1 at the setpoint: there writers are as fast as the device, and dirty memory stays where it is.
//! 2. r falls wherever it isn't clamped: above the setpoint dirty memory shrinks, below it grows; the setpoint attracts.
//! 3. r = 0 at the ceiling, without a step: a writer never runs into a wall.
//! 4. r = 2 at freerun, and below nobody is slowed: a wrong bandwidth, by up to a factor of 2 on the low side, costs no
//!    throughput, since the point where writers are as fast as the device lies on the curve; one that is too high by
//!    any factor only moves that point towards the ceiling.
//! 5. r is flat about the setpoint: small swings of dirty memory hardly change the rate.
//!
//! # Who pauses for how long
//! The kernel keeps a rate a task, since it can't see the tasks together, and estimates how many there are. A shard sees
//! all its slowed writers in one queue, so there is one schedule: a writer is let on when the pages of the one before it
//! are paid for, at the rate of that moment. Writers share the rate evenly, request by request.
//!
//! Time and counts come in from outside; nothing here knows pages, requests or devices.

use crate::cache::balance::BLOCK_PAGES_MAX;

/// Pages kept below the limit, at most, for writers that had passed the gate when it closed.
const STRAGGLERS_MAX: u64 = 16;

/// No writer is paused for longer by the curve alone (`MAX_PAUSE`); those that wait share it.
const PAUSE_NS_MAX: u64 = 200_000_000;
/// So much of the schedule can be caught up on by who is served late.
const LAG_NS_MAX: u64 = 1_000_000;

/// The limits of one shard's dirty memory, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirtyLimits {
    /// The flusher starts above.
    pub background: u64,
    /// Nobody is slowed up to this.
    pub freerun: u64,
    /// Writers are let on up to this.
    pub ceiling: u64,
    /// Dirty memory never passes this.
    pub limit: u64,
}

impl DirtyLimits {
    /// The limits of a shard of `frames` frames, in percent of them. However small they come out, one page may be dirty
    /// beyond the background limit, and a request of `request_pages_max` pages fits below the hard one, as does the largest
    /// page that a mapping can have.
    pub(crate) fn new(
        frames: u64,
        background_percent: u8,
        dirty_percent: u8,
        request_pages_max: u64,
    ) -> Self {
        let share = |percent: u8| frames * u64::from(percent) / 100;
        let background = share(background_percent).min(frames - 1);
        let limit = share(dirty_percent).max(background + 1).max(request_pages_max).max(BLOCK_PAGES_MAX);
        let freerun = (background + limit) / 2;
        let ceiling = limit - ((limit - freerun) / 8).min(STRAGGLERS_MAX);
        Self { background, freerun, ceiling, limit }
    }

    /// How many times the device's rate writers may have with `dirty` pages dirty, 0 to 2 (`wb_position_ratio`).
    pub(crate) fn position_ratio(&self, dirty: u64) -> f64 {
        if dirty >= self.ceiling {
            return 0.0;
        }
        let half_way = (self.ceiling - self.freerun) as f64 / 2.0;
        let setpoint = self.freerun as f64 + half_way;
        let distance = (setpoint - dirty as f64) / half_way;
        (1.0 + distance.powi(3)).clamp(0.0, 2.0)
    }
}

/// The rate at which a device takes dirty pages over, measured (`wb_update_bandwidth`).
///
/// Only time counts in which writes were in flight: an idle device isn't slow. Windows of [`WINDOW_NS`] go through a
/// filter whose memory grows from one window to [`PERIOD_NS`], so that the first one replaces the guess; behind it the
/// average follows by an eighth of the way, and only while the filtered rate goes on in that direction, which keeps a
/// single burst out.
///
/// [`WINDOW_NS`]: Self::WINDOW_NS
/// [`PERIOD_NS`]: Self::PERIOD_NS
#[derive(Debug)]
pub(crate) struct Bandwidth {
    average: f64,
    filtered: f64,
    observed_ns: u64,
    window_ns: u64,
    window_pages: u64,
    polled_ns: u64,
    activity: Activity,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activity {
    Idle,
    Writing,
}

impl Bandwidth {
    /// Before anything is measured: 100 MiB/s in pages of 4 KiB (`INIT_BW`).
    const GUESS: f64 = 25_600.0;
    /// A window of measuring; longer when nothing completes in it.
    const WINDOW_NS: u64 = 50_000_000;
    /// What the filter remembers at most.
    const PERIOD_NS: u64 = 3_000_000_000;

    pub(crate) fn new() -> Self {
        Self {
            average: Self::GUESS,
            filtered: Self::GUESS,
            observed_ns: 0,
            window_ns: 0,
            window_pages: 0,
            polled_ns: 0,
            activity: Activity::Idle,
        }
    }

    /// The estimate, in pages a second; at least 1.
    pub(crate) fn pages_per_s(&self) -> f64 {
        self.average.max(1.0)
    }

    /// The device has taken over `pages` pages.
    pub(crate) fn written(&mut self, pages: u64) {
        self.window_pages += pages;
    }

    /// It is `now_ns`, and from now on `in_flight_pages` are with the device. True when the estimate has moved.
    pub(crate) fn advance(&mut self, now_ns: u64, in_flight_pages: u64) -> bool {
        if self.activity == Activity::Writing {
            self.window_ns += now_ns.saturating_sub(self.polled_ns);
        }
        self.polled_ns = now_ns;
        self.activity = if in_flight_pages > 0 { Activity::Writing } else { Activity::Idle };
        if self.window_ns < Self::WINDOW_NS || self.window_pages == 0 {
            return false;
        }
        let sample = self.window_pages as f64 * 1e9 / self.window_ns as f64;
        let is_first = self.observed_ns == 0;
        self.observed_ns = (self.observed_ns + self.window_ns).min(Self::PERIOD_NS);
        let weight = (self.window_ns as f64 / self.observed_ns as f64).min(1.0);
        let before = self.filtered;
        self.filtered += (sample - before) * weight;
        if is_first {
            self.average = self.filtered;
        } else if (self.average > before && before >= self.filtered)
            || (self.average < before && before <= self.filtered)
        {
            self.average += (before - self.average) / 8.0;
        }
        (self.window_ns, self.window_pages) = (0, 0);
        true
    }
}

/// What becomes of a writer that wants to dirty pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is let on.
    Go,
    /// It pauses until this time; earlier if dirty memory shrinks.
    Pause {
        /// On the shard's clock.
        until_ns: u64,
    },
    /// Its pages don't fit below the ceiling: it waits until some have been written.
    AtLimit,
}

/// The schedule of one shard's writers.
#[derive(Debug)]
pub(crate) struct Throttle {
    pub limits: DirtyLimits,
    pub bandwidth: Bandwidth,
    /// When the last writer was let on, by the schedule.
    last_ns: u64,
    /// Its pages, which are paid for before the next is let on.
    owed_pages: u64,
}

impl Throttle {
    pub(crate) fn new(limits: DirtyLimits) -> Self {
        Self { limits, bandwidth: Bandwidth::new(), last_ns: 0, owed_pages: 0 }
    }

    /// Pages a second that all writers together may dirty with `dirty` pages dirty (`task_ratelimit`).
    pub(crate) fn rate_limit(&self, dirty: u64) -> f64 {
        self.bandwidth.pages_per_s() * self.limits.position_ratio(dirty)
    }

    /// How long `pages` pages take at the rate limit, in nanoseconds. Of `waiting` writers none pauses for more than
    /// [`PAUSE_NS_MAX`] in all.
    pub(crate) fn pause_ns(&self, pages: u64, dirty: u64, waiting: usize) -> u64 {
        let rate = self.rate_limit(dirty);
        let longest = PAUSE_NS_MAX / waiting.max(1) as u64;
        // Not a number when nothing is owed at a rate of 0; both that and infinity become the longest pause.
        let pause = pages as f64 * 1e9 / rate;
        if pause < longest as f64 { pause as u64 } else { longest }
    }

    /// Judges the writer whose turn it is: it will dirty `pages` pages, `dirty` are, and `waiting` writers wait, it
    /// included.
    pub(crate) fn judge(&self, now_ns: u64, dirty: u64, pages: u64, waiting: usize) -> Verdict {
        // With nothing dirty everything goes, or a request could be too large for ever.
        if dirty == 0 {
            return Verdict::Go;
        }
        if dirty + pages > self.limits.ceiling {
            return Verdict::AtLimit;
        }
        let until_ns = self.due_ns(dirty, waiting);
        if dirty <= self.limits.freerun || until_ns <= now_ns {
            Verdict::Go
        } else {
            Verdict::Pause { until_ns }
        }
    }

    /// The writer that was just judged is let on.
    pub(crate) fn let_on(&mut self, now_ns: u64, dirty: u64, pages: u64, waiting: usize) {
        if dirty <= self.limits.freerun {
            (self.last_ns, self.owed_pages) = (now_ns, 0);
            return;
        }
        // Who polls late doesn't make writers slow, nor does a quiet time make them fast later.
        let due_ns = self.due_ns(dirty, waiting);
        self.last_ns = due_ns.clamp(now_ns.saturating_sub(LAG_NS_MAX), now_ns);
        self.owed_pages = pages;
    }

    fn due_ns(&self, dirty: u64, waiting: usize) -> u64 {
        match self.owed_pages {
            0 => self.last_ns,
            owed => self.last_ns.saturating_add(self.pause_ns(owed, dirty, waiting)),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: u64 = 1_000_000;

    /// 200 MiB/s in pages.
    const RATE: f64 = 51_200.0;

    fn limits() -> impl Strategy<Value = DirtyLimits> {
        (32u64..100_000, 0u8..90, 1u8..=60).prop_map(|(frames, background, above)| {
            DirtyLimits::new(frames, background, (background + above).min(100), (frames / 8).clamp(1, 32))
        })
    }

    /// A throttle that has measured `rate`.
    fn measured(limits: DirtyLimits, rate: f64) -> Throttle {
        let mut throttle = Throttle::new(limits);
        let window = Bandwidth::WINDOW_NS;
        throttle.bandwidth.advance(0, 1);
        throttle.bandwidth.written((rate * window as f64 / 1e9) as u64);
        assert!(throttle.bandwidth.advance(window, 1));
        throttle
    }

    proptest! {
        #[test]
        fn the_limits_are_in_order_and_a_request_fits(
            frames in 32u64..1_000_000, background in 0u8..=90, above in 1u8..=100
        ) {
            let request = (frames / 8).clamp(1, 32);
            let all = DirtyLimits::new(frames, background, (background + above).min(100), request);
            let DirtyLimits { background, freerun, ceiling, limit } = all;
            prop_assert!(background <= freerun && freerun < ceiling && ceiling <= limit && limit <= frames, "{all:?}");
            prop_assert!(request <= limit && limit - ceiling <= STRAGGLERS_MAX);
            prop_assert_eq!(freerun, (background + limit) / 2);
        }

        #[test]
        fn the_ratio_is_2_at_freerun_1_at_the_setpoint_and_0_at_the_ceiling(limits in limits()) {
            prop_assert_eq!(limits.position_ratio(limits.freerun), 2.0);
            prop_assert_eq!(limits.position_ratio(limits.ceiling), 0.0);
            prop_assert_eq!(limits.position_ratio(u64::MAX), 0.0);
            if (limits.freerun + limits.ceiling).is_multiple_of(2) {
                prop_assert_eq!(limits.position_ratio((limits.freerun + limits.ceiling) / 2), 1.0);
            }
        }

        #[test]
        fn the_ratio_never_rises_and_has_no_step(limits in limits(), dirty in 0u64..100_000) {
            let (here, next) = (limits.position_ratio(dirty), limits.position_ratio(dirty + 1));
            prop_assert!((0.0..=2.0).contains(&here) && next <= here);
            if (limits.freerun..limits.ceiling - 1).contains(&dirty) {
                prop_assert!(next < here, "the setpoint attracts from both sides");
            }
            // The cubic's slope is nowhere steeper than 3 over half the way.
            let steepest = 6.0 / (limits.ceiling - limits.freerun) as f64;
            prop_assert!(here - next <= steepest.min(2.0) + 1e-9, "{here} to {next}, {steepest}");
        }

        #[test]
        fn below_the_middle_nobody_pauses(limits in limits(), pages in 1u64..32, now_ns in 0u64..1 << 40) {
            let mut throttle = measured(limits, RATE);
            for dirty in [0, limits.freerun / 2, limits.freerun] {
                if dirty + pages <= limits.ceiling {
                    prop_assert_eq!(throttle.judge(now_ns, dirty, pages, 1), Verdict::Go);
                    throttle.let_on(now_ns, dirty, pages, 1);
                }
            }
        }

        #[test]
        fn a_pause_is_what_the_pages_cost_and_never_longer_than_the_longest(
            limits in limits(), dirty in 0u64..100_000, pages in 1u64..32, rate in 1.0f64..1e7, waiting in 1usize..300
        ) {
            let throttle = measured(limits, rate.max(40.0));
            let pause = throttle.pause_ns(pages, dirty, waiting);
            let exact = pages as f64 * 1e9 / throttle.rate_limit(dirty);
            prop_assert!(pause * waiting as u64 <= PAUSE_NS_MAX);
            prop_assert!((pause as f64 - exact).abs() <= 1.0 || pause == PAUSE_NS_MAX / waiting as u64);
        }

        #[test]
        fn nobody_is_let_on_past_the_ceiling(limits in limits(), dirty in 1u64..100_000, pages in 1u64..32) {
            let throttle = measured(limits, RATE);
            let fits = dirty + pages <= limits.ceiling;
            prop_assert_eq!(throttle.judge(0, dirty, pages, 1) == Verdict::AtLimit, !fits);
        }

        /// A device that writes at `device` and a writer at full speed, on a virtual clock: dirty memory stays between
        /// freerun and ceiling, and the writer gets what the device has, though the first estimate is a guess.
        #[test]
        fn a_writer_at_full_speed_settles_at_the_rate_of_the_device(
            device in 2_000f64..500_000.0, frames in 4_096u64..65_536
        ) {
            let limits = DirtyLimits::new(frames, 20, 40, 32);
            let mut throttle = Throttle::new(limits);
            let (mut dirty, mut accepted, mut written, mut credit) = (0u64, 0u64, 0u64, 0f64);
            let (mut last_ns, mut longest_ns) = (0, 0);
            let (step_ns, end_ns) = (100_000u64, 3_000 * MS);
            let mut settled = None;
            throttle.bandwidth.advance(0, 1);
            for now_ns in (0..end_ns).step_by(step_ns as usize) {
                credit += device * step_ns as f64 / 1e9;
                let done = (credit as u64).min(dirty);
                credit -= done as f64;
                dirty -= done;
                written += done;
                throttle.bandwidth.written(done);
                throttle.bandwidth.advance(now_ns, 1);
                while throttle.judge(now_ns, dirty, 1, 1) == Verdict::Go {
                    throttle.let_on(now_ns, dirty, 1, 1);
                    dirty += 1;
                    accepted += 1;
                    longest_ns = longest_ns.max(now_ns - last_ns);
                    last_ns = now_ns;
                }
                prop_assert!(dirty <= limits.ceiling);
                if now_ns > 1_000 * MS {
                    prop_assert!(dirty + 64 + (device / 1e4) as u64 >= limits.freerun, "{dirty} of {limits:?}");
                    settled.get_or_insert((accepted, written));
                }
            }
            let (accepted_0, written_0) = settled.unwrap();
            let (accepted, written) = ((accepted - accepted_0) as f64, (written - written_0) as f64);
            prop_assert!((written / 2.0 / device - 1.0).abs() < 0.01, "the device never idles");
            prop_assert!((accepted / written - 1.0).abs() < 0.5, "{accepted} {written}");
            prop_assert!(longest_ns <= 250 * MS, "{longest_ns}");
        }
    }

    #[test]
    fn writers_are_let_on_one_after_the_other_each_when_the_one_before_is_paid_for() {
        // 1000 frames: background 200, freerun 300, ceiling 388, setpoint 344.
        let mut throttle = measured(DirtyLimits::new(1000, 20, 40, 32), 1000.0);
        let setpoint = 344;
        throttle.let_on(500 * MS, 0, 8, 3);
        throttle.let_on(500 * MS, setpoint, 4, 3);
        assert_eq!(throttle.judge(500 * MS, setpoint, 1, 3), Verdict::Pause { until_ns: 504 * MS });
        assert_eq!(throttle.judge(504 * MS, setpoint, 1, 3), Verdict::Go);
        throttle.let_on(504 * MS, setpoint, 1, 2);
        assert_eq!(throttle.judge(504 * MS, setpoint, 9, 2), Verdict::Pause { until_ns: 505 * MS });
        // Served half a millisecond late: the next one isn't.
        throttle.let_on(505 * MS + MS / 2, setpoint, 9, 1);
        assert_eq!(throttle.judge(506 * MS, setpoint, 1, 1), Verdict::Pause { until_ns: 514 * MS });
        // After a quiet time there is no more to catch up on than a millisecond.
        throttle.let_on(900 * MS, setpoint, 2, 1);
        assert_eq!(throttle.judge(900 * MS, setpoint, 1, 1), Verdict::Pause { until_ns: 901 * MS });
    }

    #[test]
    fn the_first_window_replaces_the_guess_and_idle_time_does_not_count() {
        let mut bandwidth = Bandwidth::new();
        assert_eq!(bandwidth.pages_per_s(), Bandwidth::GUESS);
        bandwidth.advance(0, 0);
        bandwidth.advance(10_000 * MS, 1);
        bandwidth.written(500);
        assert!(!bandwidth.advance(10_020 * MS, 0), "20 ms of writing aren't a window yet");
        bandwidth.advance(20_000 * MS, 1);
        bandwidth.written(500);
        assert!(bandwidth.advance(20_030 * MS, 1));
        assert_eq!(bandwidth.pages_per_s(), 20_000.0);
    }

    #[test]
    fn the_estimate_follows_a_device_that_changes_and_ignores_a_single_burst() {
        let mut bandwidth = Bandwidth::new();
        let mut now_ns = 0;
        let mut run = |bandwidth: &mut Bandwidth, rate: u64, windows: u64| {
            for _ in 0..windows {
                bandwidth.advance(now_ns, 1);
                bandwidth.written(rate / 20);
                now_ns += 50 * MS;
                bandwidth.advance(now_ns, 1);
            }
        };
        run(&mut bandwidth, 10_000, 100);
        assert!((bandwidth.pages_per_s() - 10_000.0).abs() < 1.0);
        run(&mut bandwidth, 1_000_000, 1);
        assert!(bandwidth.pages_per_s() < 10_100.0, "a burst: {}", bandwidth.pages_per_s());
        run(&mut bandwidth, 40_000, 400);
        assert!((bandwidth.pages_per_s() / 40_000.0 - 1.0).abs() < 0.02, "{}", bandwidth.pages_per_s());
    }

    #[test]
    fn a_device_that_writes_nothing_keeps_its_estimate_until_something_completes() {
        let mut throttle = measured(DirtyLimits::new(1000, 20, 40, 32), RATE);
        assert!(!throttle.bandwidth.advance(10_000 * MS, 1));
        assert_eq!(throttle.bandwidth.pages_per_s(), RATE);
    }
}
