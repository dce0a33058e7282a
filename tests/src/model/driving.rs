//! Driving: shards and operations take turns, and time passes, until something has come to its end.

use std::time::Duration;

use super::case::PIN_WAIT;
use super::operations::{Op, newest};
use super::rules::Rule;
use super::violated;
use super::world::World;

/// Within this much time on the run's clock everything must have ended that nobody's pin holds up.
const ENDS_WITHIN: Duration = Duration::from_secs(300);
/// The clock's largest step while nothing happens.
const IDLE_STEP_US: u64 = 50_000;

impl World {
    /// One step of every shard, and then one poll of every operation; true when anything happened.
    pub(super) fn turn(&mut self) -> bool {
        let mut progressed = self.bed.step();
        if let Some(quiet) = &mut self.quiet {
            quiet.tagged.fill(true);
        }
        self.absorb();
        let mut at = 0;
        while at < self.ops.len() {
            if self.poll(at) {
                progressed = true;
            } else {
                at += 1;
            }
        }
        progressed
    }

    pub(super) fn settle(&mut self) {
        let mut quiet = 0;
        for _ in 0..100_000 {
            quiet = if self.turn() { 0 } else { quiet + 1 };
            if quiet == 3 {
                // A sync that nobody waits for any more ends when nothing holds it up.
                let waits_for_log = (0..self.setup.mappings).any(|mapping| self.may_wait_for_log(mapping));
                self.life.sync_abandoned &=
                    waits_for_log || !self.ops.is_empty() || self.log.in_flight().next().is_some();
                self.at_rest = !self.life.sync_abandoned
                    && self.log.in_flight().next().is_none()
                    // A pass waits for writes that are to be tried again, and goes on after them.
                    && self.life.retries.is_empty()
                    && self.ops.iter().all(Op::is_granted)
                    && self.zombies.is_empty();
                return self.check_at_rest();
            }
        }
        violated(Rule::Bounded, "the shards never come to rest".to_owned());
    }

    /// Takes turns, with time passing faster and faster while nothing happens, until `done`.
    pub(super) fn drive(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let until_ns = self.bed.now_ns() + ENDS_WITHIN.as_nanos() as u64;
        let mut turns = 0;
        while !done(self) {
            if self.turn() {
                self.idle_us = 1;
            } else {
                self.bed.pass_time(Duration::from_micros(self.idle_us));
                self.idle_us = (self.idle_us * 2).min(IDLE_STEP_US);
            }
            turns += 1;
            if self.bed.now_ns() > until_ns || turns > 1_000_000 {
                violated(
                    Rule::Bounded,
                    format!("{what} hasn't ended after {ENDS_WITHIN:?} and {turns} turns"),
                );
            }
        }
        self.met(Rule::Bounded);
    }

    pub(super) fn finish(&mut self, op: u8) {
        if let Some(at) = newest(op, self.ops.len()) {
            self.finish_at(at);
        }
    }

    pub(super) fn finish_at(&mut self, at: usize) {
        if self.ops[at].is_granted() {
            return self.release_at(at);
        }
        let id = self.ops[at].id;
        let what = self.ops[at].describe();
        // Once it is granted, a pin has what it asked for.
        self.drive(&what, |world| world.ops.iter().all(|op| op.id != id || op.is_granted()));
    }

    /// Lets all pins go and drives everything to its end.
    pub(crate) fn quiesce(&mut self) {
        loop {
            self.release_all();
            match self.ops.first() {
                None => break,
                Some(_) => self.finish_at(0),
            }
        }
        if !self.zombies.is_empty() {
            self.end_zombies();
        }
    }

    /// Waits until the shards have surely given up whatever nobody waits for any more.
    pub(super) fn end_zombies(&mut self) {
        let until_ns = self.bed.now_ns() + 2 * PIN_WAIT.as_nanos() as u64;
        self.drive("what was abandoned", |world| {
            world.bed.now_ns() > until_ns && (world.life.doomed || world.log.in_flight().next().is_none())
        });
        let now = self.now();
        for (id, mapping, pages) in std::mem::take(&mut self.zombies) {
            for page in &mut self.mappings[mapping].pages[pages] {
                page.end(id, None, now);
                page.thrown_away();
            }
        }
    }

    pub(super) fn drain_device(&mut self) {
        self.drive("what the device has", |world| {
            world.life.doomed || world.log.in_flight().next().is_none()
        });
    }
}
