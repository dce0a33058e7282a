//! What a shard writes without being asked: the flusher's rounds, retries of poisoned pages, what a close finds dirty.

use std::ops::Range;

use super::Shard;
use super::open::OpenMapping;
use super::passes::{STEP_PAGES, issuer};
use super::payload::RunGroup;
use crate::error::Error;
use crate::stats::bump;
use crate::writeback::control::{PassEnd, Reason};
use crate::writeback::flusher::Pressure;
use crate::writeback::issue::Issued;
use crate::writeback::pass::{PassState, WritebackPass};
use crate::writeback::poison::PoisonRetries;
use crate::writeback::ranges::PassRanges;

/// A mapping that is open in a shard.
#[derive(Debug)]
pub(super) struct OpenEntry {
    pub slot: u16,
    pub poison: PoisonRetries,
}

impl Shard {
    /// Writes what is dirty in `range`, as far as it can be had at once.
    pub(super) fn write_range(&mut self, mapping: &OpenMapping, reason: Reason, range: Range<u64>) {
        let mut pass = PassState::background(reason, PassRanges::of(range));
        let step = WritebackPass::new(issuer!(self), mapping, &mut pass, STEP_PAGES);
        if step.drive(None) == Issued::NoRoom {
            self.reads_yield |= !self.waits_for_mirror();
        }
        self.publish_left_out(mapping, pass.lsns.take_left_out());
    }

    fn pressure(&self) -> Pressure {
        let (dirty_pages, writeback_pages) = self.marked_pages();
        Pressure {
            shard: self.link.shard,
            dirty_pages,
            writeback_pages,
            frames_needed: self.frames_needed > 0
                || self.at_dirty_limit
                || self.gates.writers_wait
                || self.shares.wants_clean(),
            now_ns: self.now_ns,
        }
    }

    /// Runs the flusher for one step of one mapping.
    pub(super) fn step_flusher(&mut self) -> bool {
        let mut progressed = self.step_poisoned();
        if self.flusher.group.ends() {
            self.commit_expired();
            progressed = true;
        }
        if self.link.take_writeback_request() {
            self.flusher.request();
        }
        self.check_gates();
        let pressure = self.pressure();
        self.flusher.decide(pressure);
        if self.flusher.running.is_none() {
            return progressed;
        }
        if self.flusher.is_done(pressure, self.open.len()) {
            let finished = self.flusher.running.as_ref().map_or(0, |run| run.finished);
            self.end_flusher_pass(PassEnd::Dropped);
            if let Some(run) = &mut self.flusher.running {
                // A pass that was put off, or dropped because the pressure is gone, hasn't found that nothing can be written.
                run.finished = finished;
            }
            self.flusher.end(self.now_ns);
            return progressed;
        }
        if self.skips_for_congestion() {
            return progressed;
        }
        let Some(run) = &self.flusher.running else { return progressed };
        let slot = self.open[run.position % self.open.len()].slot;
        let Ok(mapping) = self.mapping(slot) else { return progressed };
        if self.is_taken(&mapping) {
            // An integrity pass writes what is there; this round goes on to the next mapping (WB-14).
            bump(&self.link.counters.passes_taken, 1);
            self.end_flusher_pass(PassEnd::Taken);
            return true;
        }
        let begins = self.flusher.running.as_ref().is_some_and(|run| run.pass.is_none());
        if begins && !self.gates.flusher_begins(slot, self.now_ns) {
            self.end_flusher_pass(PassEnd::Complete);
            return true;
        }
        self.step_flusher_pass(&mapping) || progressed
    }

    fn step_flusher_pass(&mut self, mapping: &OpenMapping) -> bool {
        let half = self.congestion.half_pages(self.throttle.bandwidth.pages_per_s());
        let Some(run) = &mut self.flusher.running else { return false };
        let pass = run.pass.get_or_insert_with(|| {
            let end = mapping.shape.striping.local_range(self.cache.shard, 0..mapping.shape.pages()).end;
            let index = mapping.in_shard(self.cache.shard).index();
            let mut pass = PassState::background(run.reason, PassRanges::of(0..end)).cyclic(index);
            if run.reason == Reason::Expiry {
                pass.group = RunGroup::Expiry;
            }
            pass
        });
        let (commands, pages) = (pass.commands, pass.outcome().pages_written);
        pass.run_pages_max = half.next_multiple_of(mapping.shape.order.pages());
        WritebackPass::new(issuer!(self), mapping, pass, STEP_PAGES.min(half)).drive(None);
        let written = pass.outcome().pages_written - pages;
        let submitted = pass.commands - commands;
        run.pages += written;
        if pass.group == RunGroup::Expiry {
            self.flusher.group.in_flight += submitted;
        }
        let left_out = pass.lsns.take_left_out();
        let ended = pass.has_ended();
        self.flusher_left_out(left_out, written > 0);
        if ended {
            self.flusher_passed(mapping, mapping.in_shard(self.cache.shard).index());
            self.end_flusher_pass(PassEnd::Complete);
        }
        submitted > 0 || ended || left_out.pages > 0
    }

    /// The flusher's pass over its mapping is over: the next one takes up where it stopped, or begins at 0 (WB-02).
    fn end_flusher_pass(&mut self, end: PassEnd) {
        let Some(run) = &mut self.flusher.running else { return };
        let Some(mut pass) = run.pass.take() else {
            run.position += 1;
            run.finished += 1;
            return;
        };
        pass.end(end);
        let slot = self.open[run.position % self.open.len()].slot;
        if let Some(mapping) = &self.mappings[slot as usize] {
            let kept = mapping.in_shard(self.cache.shard);
            let from_start = kept.index() == 0;
            kept.save_index(&pass);
            // A pass that began amid the file and reached its end is followed by one over the beginning.
            let goes_on = pass.outcome().ended == PassEnd::Complete && !from_start;
            if goes_on {
                return;
            }
        }
        run.position += 1;
        run.finished += 1;
    }

    /// A write failed: the flusher's pass over that mapping stops (WB-05).
    pub(super) fn note_flusher_failure(&mut self, mapping: u16, local: u64, error: &Error) {
        if let Some(run) = &mut self.flusher.running
            && let Some(pass) = &mut run.pass
            && self.open[run.position % self.open.len()].slot == mapping
        {
            pass.note_failure(local, error);
        }
    }

    /// Pages of a mapping were poisoned that were not before: they have retries of their own (WB-23).
    pub(super) fn note_poisoned(&mut self, mapping: u16) {
        if let Some(open) = self.open.iter_mut().find(|open| open.slot == mapping) {
            open.poison.note_poisoned(self.now_ns);
        }
    }

    /// Tries poisoned pages again, those whose time has come.
    fn step_poisoned(&mut self) -> bool {
        let mut progressed = false;
        for at in 0..self.open.len() {
            let slot = self.open[at].slot;
            let marked = &self.cache.shared.marked[slot as usize];
            if marked.poisoned() == 0 {
                if marked.writeback() == 0 {
                    self.open[at].poison.rest();
                }
                continue;
            }
            let Ok(mapping) = self.mapping(slot) else { continue };
            let end = mapping.shape.striping.local_range(self.cache.shard, 0..mapping.shape.pages()).end;
            let retries = &mut self.open[at].poison;
            if !retries.begin(self.now_ns, end) || self.is_taken(&mapping) {
                continue;
            }
            let Some(mut pass) = self.open[at].poison.pass.take() else { continue };
            let commands = pass.commands;
            WritebackPass::new(issuer!(self), &mapping, &mut pass, STEP_PAGES).drive(None);
            let submitted = pass.commands - commands;
            bump(&self.link.counters.poison_retries, submitted);
            progressed |= submitted > 0;
            let left_out = pass.lsns.take_left_out();
            self.publish_left_out(&mapping, left_out);
            let retries = &mut self.open[at].poison;
            if left_out.pages > 0 {
                retries.leave_out();
            }
            if !pass.has_ended() {
                retries.pass = Some(pass);
                continue;
            }
            retries.round_ended(self.now_ns);
            if retries.is_exhausted() {
                let pages = self.cache.shared.marked[slot as usize].poisoned();
                tracing::warn!(
                    mapping = slot,
                    pages,
                    "poisoned pages were tried for the last time; only syncs try them now"
                );
            }
        }
        progressed
    }

    /// When poisoned pages are to be tried again.
    pub(super) fn poison_due_ns(&self) -> Option<u64> {
        self.open.iter().filter_map(|open| open.poison.due_ns(self.now_ns)).min()
    }
}
