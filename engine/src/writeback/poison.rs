//! Poisoned pages: their write failed for good, so they are dirty, and background passes pass them over (WB-23).
//!
//! They have retries of their own, a round over all poisoned pages of a mapping in a shard at a time:
//!
//! ```text
//! a page is poisoned          round 1      round 2              round 3                          …  round 8
//!         ├─── 100 ms ───────────┼──── 200 ms ────┼──────── 400 ms ───────────────┼──────────── … ──────┤
//! ```
//!
//! Each page goes out as a command of its own, so that one bad block doesn't keep its neighbours dirty. A page that
//! succeeds is clean like any other. A round that had to leave pages out behind their gate isn't the last. After the last round only syncs try what is left, each of them; a page that is
//! poisoned anew begins the rounds anew.

use super::pass::PassState;
use super::ranges::PassRanges;

/// When the first round begins; each further one waits twice as long.
const FIRST_NS: u64 = 100_000_000;
/// Rounds until background writeback gives up.
pub(crate) const ROUNDS_MAX: u32 = 8;

/// The rounds of one mapping in one shard.
#[derive(Debug, Default)]
pub(crate) struct PoisonRetries {
    /// Rounds begun since a page was poisoned anew.
    rounds: u32,
    /// When the next round begins.
    due_ns: Option<u64>,
    /// The round that is under way.
    pub pass: Option<PassState>,
    /// That round has left pages out whose log isn't durable.
    left_out: bool,
}

impl PoisonRetries {
    /// Pages were poisoned that were not before.
    pub(crate) fn note_poisoned(&mut self, now_ns: u64) {
        // A page that comes late joins the round that is due already.
        if self.rounds > 0 || self.due_ns.is_none() {
            self.rounds = 0;
            self.due_ns = Some(now_ns.saturating_add(FIRST_NS));
        }
    }

    /// Whether a step should be made, and begins a round over `pages` shard-local pages that is due.
    pub(crate) fn begin(&mut self, now_ns: u64, pages: u64) -> bool {
        if self.pass.is_none() && self.due_ns.is_some_and(|due| now_ns >= due) {
            self.rounds += 1;
            self.due_ns = (self.rounds < ROUNDS_MAX)
                .then(|| now_ns.saturating_add(FIRST_NS.saturating_mul(1 << self.rounds)));
            self.pass = Some(PassState::of_poisoned(PassRanges::of(0..pages)));
        }
        self.pass.is_some()
    }

    /// The round that is under way leaves pages out whose log isn't durable (WB-40).
    pub(crate) fn leave_out(&mut self) {
        self.left_out = true;
    }

    /// The round that was under way has ended. One that left pages out hasn't tried them, so it isn't the last.
    pub(crate) fn round_ended(&mut self, now_ns: u64) {
        if std::mem::take(&mut self.left_out) && self.due_ns.is_none() {
            self.rounds = ROUNDS_MAX - 1;
            self.due_ns = Some(now_ns.saturating_add(FIRST_NS << self.rounds));
        }
    }

    /// No page is poisoned any more.
    pub(crate) fn rest(&mut self) {
        *self = Self::default();
    }

    /// When it wants to be asked again.
    pub(crate) fn due_ns(&self, now_ns: u64) -> Option<u64> {
        if self.pass.is_some() { Some(now_ns) } else { self.due_ns }
    }

    /// Whether background writeback has given up.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.pass.is_none() && self.due_ns.is_none() && self.rounds >= ROUNDS_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wb23_rounds_are_bounded_and_wait_twice_as_long_each_time() {
        let mut retries = PoisonRetries::default();
        assert_eq!(retries.due_ns(0), None);
        retries.note_poisoned(0);
        let mut began = Vec::new();
        for now in (0..100_000_000_000u64).step_by(50_000_000) {
            if retries.begin(now, 10) {
                began.push(now / 100_000_000);
                retries.pass = None;
            }
        }
        assert_eq!(began, [1, 3, 7, 15, 31, 63, 127, 255]);
        assert!(retries.is_exhausted());
        retries.note_poisoned(1);
        assert_eq!(retries.due_ns(1), Some(1 + FIRST_NS));
    }
}
