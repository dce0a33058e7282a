//! The background flusher: decides when a shard writes without being asked, and where it goes on.

use super::control::Reason;
use super::events;
use super::pass::PassState;
use super::throttle::DirtyLimits;

/// What the flusher looks at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pressure {
    pub shard: usize,
    /// Dirty pages that it can make clean.
    pub dirty_pages: u64,
    pub writeback_pages: u64,
    /// A request waits for frames, or for pages to be written.
    pub frames_needed: bool,
    pub now_ns: u64,
}

/// The flusher of one shard. It writes mapping by mapping; each mapping's cursor is kept where its last pass
/// ended and begins anew at 0 after the end (WB-02).
#[derive(Debug)]
pub(crate) struct Flusher {
    limits: DirtyLimits,
    interval_ns: u64,
    /// When dirty pages were first seen since all was clean, or since the last pass over everything ended.
    armed_ns: Option<u64>,
    /// After a round that could write nothing, none before this time.
    retry_ns: u64,
    /// Somebody asked for a round (`wakeup_flusher_threads`).
    requested: bool,
    pub running: Option<Run>,
    pub group: ExpiryGroup,
}

/// The writes of expiry rounds: they end together, with one commit that no caller waits for (WB-21).
#[derive(Debug, Default)]
pub(crate) struct ExpiryGroup {
    /// Writes of the group that are with the device.
    pub in_flight: u64,
    /// The round has ended: once its writes have, they are committed.
    is_complete: bool,
}

impl ExpiryGroup {
    /// Whether the group has ended just now, and a commit is due.
    pub(crate) fn ends(&mut self) -> bool {
        self.in_flight == 0 && std::mem::take(&mut self.is_complete)
    }

    /// Its last write has been submitted.
    fn complete(&mut self) {
        self.is_complete = true;
    }
}

/// One round over all open mappings.
#[derive(Debug)]
pub(crate) struct Run {
    pub shard: usize,
    pub reason: Reason,
    /// It goes over everything, though the pressure be gone.
    is_whole: bool,
    /// Position in the shard's list of open mappings.
    pub position: usize,
    /// The pass over the mapping at `position`, once begun.
    pub pass: Option<PassState>,
    /// Mappings whose pass has ended in this round.
    pub finished: usize,
    /// Pages written in this round.
    pub pages: u64,
}

/// How long background passes pause after a round that found nothing it could write.
const HELD_NS: u64 = 1_000_000;

impl Flusher {
    pub(crate) fn new(limits: DirtyLimits, interval_ns: u64) -> Self {
        Self {
            limits,
            interval_ns,
            armed_ns: None,
            retry_ns: 0,
            requested: false,
            running: None,
            group: ExpiryGroup::default(),
        }
    }

    /// Somebody wants clean folios: a round over everything begins as soon as none runs.
    pub(crate) fn request(&mut self) {
        self.requested = true;
    }

    /// A gate that kept pages back has moved: what a round found nothing to write of may be writable now.
    pub(crate) fn gate_opened(&mut self) {
        self.retry_ns = 0;
    }

    /// The priority of the round that runs.
    pub(crate) fn priority(&self) -> u8 {
        self.running.as_ref().map_or(0, |run| run.reason.priority())
    }

    /// Decides whether a round should run now, and starts or stops it.
    pub(crate) fn decide(&mut self, pressure: Pressure) {
        let Pressure { shard, dirty_pages, frames_needed, now_ns, .. } = pressure;
        if dirty_pages == 0 {
            self.armed_ns = None;
            self.requested = false;
            return;
        }
        let armed = *self.armed_ns.get_or_insert(now_ns);
        if let Some(run) = &mut self.running {
            // A round that nobody waited for becomes one that somebody waits for (WB-20).
            if frames_needed && run.reason.priority() < Reason::Reclaim.priority() {
                run.reason = Reason::Reclaim;
            }
            return;
        }
        if now_ns < self.retry_ns {
            return;
        }
        let requested = std::mem::take(&mut self.requested);
        let reason = if frames_needed || requested {
            Reason::Reclaim
        } else if self.is_over(pressure) {
            Reason::DirtyLimit
        } else if now_ns.saturating_sub(armed) >= self.interval_ns {
            Reason::Expiry
        } else {
            return;
        };
        events::writeback_start(shard, reason, dirty_pages, now_ns);
        let is_whole = requested;
        self.running = Some(Run { shard, reason, is_whole, position: 0, pass: None, finished: 0, pages: 0 });
    }

    /// Whether the round that runs has done enough: all mappings seen, or the pressure that started it is gone.
    pub(crate) fn is_done(&self, pressure: Pressure, mappings: usize) -> bool {
        let Some(run) = &self.running else { return true };
        if run.finished >= mappings {
            return true;
        }
        match run.reason {
            // Down to half the limit, so that the flusher doesn't start and stop page by page.
            Reason::DirtyLimit => !self.goes_on(pressure),
            Reason::Reclaim => !pressure.frames_needed && !run.is_whole,
            _ => false,
        }
    }

    /// Whether dirty memory is above the background limit, and there is enough to write for a round.
    fn is_over(&self, pressure: Pressure) -> bool {
        pressure.dirty_pages + pressure.writeback_pages > self.limits.background && self.goes_on(pressure)
    }

    /// Whether a round that the limit started has more to do: always while writers are slowed.
    fn goes_on(&self, Pressure { dirty_pages, writeback_pages, .. }: Pressure) -> bool {
        dirty_pages > self.limits.background / 2 || dirty_pages + writeback_pages > self.limits.freerun
    }

    /// Ends the round that runs, whatever is left of it.
    pub(crate) fn stop(&mut self, now_ns: u64) -> Option<Run> {
        let run = self.running.take()?;
        events::writeback_written(run.shard, run.reason, run.pages, now_ns);
        Some(run)
    }

    /// The round has ended.
    pub(crate) fn end(&mut self, now_ns: u64) {
        if let Some(run) = self.stop(now_ns) {
            if run.finished > 0 && run.pages == 0 {
                // Everything dirty is held by somebody: another round at once would meet the same.
                self.retry_ns = self.retry_ns.max(now_ns + HELD_NS);
            }
            if run.reason == Reason::Expiry {
                self.armed_ns = Some(now_ns);
                self.group.complete();
            }
        }
    }

    /// When the flusher wants to be asked again although nothing happens; `None` while all is clean.
    pub(crate) fn due_ns(&self) -> Option<u64> {
        self.armed_ns.map(|armed| armed.saturating_add(self.interval_ns).max(self.retry_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The background limit; nobody is slowed up to half as many more.
    fn limits(background: u64) -> DirtyLimits {
        let (freerun, ceiling) = (background + background / 2, 2 * background);
        DirtyLimits { background, freerun, ceiling, limit: ceiling }
    }

    fn pressure(dirty_pages: u64, frames_needed: bool, now_ns: u64) -> Pressure {
        Pressure { shard: 0, dirty_pages, writeback_pages: 0, frames_needed, now_ns }
    }

    fn reason(flusher: &Flusher) -> Option<Reason> {
        flusher.running.as_ref().map(|run| run.reason)
    }

    #[test]
    fn a_few_dirty_pages_wait_for_the_interval_and_are_then_written() {
        let mut flusher = Flusher::new(limits(100), 1000);
        flusher.decide(pressure(5, false, 10));
        assert_eq!(reason(&flusher), None);
        assert_eq!(flusher.due_ns(), Some(1010));
        flusher.decide(pressure(5, false, 1009));
        assert_eq!(reason(&flusher), None);
        flusher.decide(pressure(5, false, 1010));
        assert_eq!(reason(&flusher), Some(Reason::Expiry));
    }

    #[test]
    fn more_than_the_limit_starts_at_once_and_stops_at_half() {
        let mut flusher = Flusher::new(limits(100), 1000);
        flusher.decide(pressure(101, false, 0));
        assert_eq!(reason(&flusher), Some(Reason::DirtyLimit));
        assert!(!flusher.is_done(pressure(51, false, 1), 1));
        assert!(flusher.is_done(pressure(50, false, 1), 1));
    }

    #[test]
    fn pages_on_their_way_count_and_writers_that_are_slowed_keep_the_flusher_going() {
        let mut flusher = Flusher::new(limits(100), 1000);
        let both =
            |dirty_pages, writeback_pages| Pressure { writeback_pages, ..pressure(dirty_pages, false, 0) };
        flusher.decide(both(50, 100));
        assert_eq!(reason(&flusher), None, "too little to begin a round for");
        flusher.decide(both(51, 50));
        assert_eq!(reason(&flusher), Some(Reason::DirtyLimit));
        assert!(!flusher.is_done(both(1, 150), 1), "above the middle");
        assert!(flusher.is_done(both(1, 149), 1));
    }

    #[test]
    fn a_request_without_a_frame_starts_at_once() {
        let mut flusher = Flusher::new(limits(100), 1000);
        flusher.decide(pressure(1, true, 0));
        assert_eq!(reason(&flusher), Some(Reason::Reclaim));
    }

    #[test]
    fn a_round_that_could_write_nothing_is_not_repeated_at_once() {
        let mut flusher = Flusher::new(limits(0), 1000);
        flusher.decide(pressure(10, false, 0));
        flusher.running.as_mut().unwrap().finished = 1;
        flusher.end(5);
        flusher.decide(pressure(10, false, 6));
        assert_eq!(reason(&flusher), None);
        flusher.decide(pressure(10, false, 5 + HELD_NS));
        assert!(flusher.running.is_some());
    }

    #[test]
    fn all_clean_disarms_the_timer() {
        let mut flusher = Flusher::new(limits(100), 1000);
        flusher.decide(pressure(5, false, 10));
        flusher.decide(pressure(0, false, 20));
        assert_eq!(flusher.due_ns(), None);
    }
}
