//! The gate and checkpoints: writes that carry log sequence numbers, how far the log is durable, and what of it is still
//! needed (WB-40, WB-45).
//!
//! The log itself is only its numbers: every stamped write has the next one, in the order in which they begin.

use std::pin::Pin;
use std::rc::Rc;

use foliant::{Error, Lsn, Mapping};

use super::case::{WriteCache, file_offset};
use super::content::{Moment, Page};
use super::device_log::Extent;
use super::operations::{Kind, Op, Output};
use super::rules::{Fault, Rule};
use super::violated;
use super::world::World;

/// A change that a page was surely stamped for.
#[derive(Clone, Copy, Debug)]
pub struct Stamp {
    /// Its number.
    pub lsn: u64,
    /// When it began.
    pub began: Moment,
    /// When it had surely been made.
    pub ended: Moment,
    /// When the first write of the page completed that may contain it; 0 where that went through the device's cache.
    pub written: Option<Moment>,
}

/// The log, since the run began, and the gate, since the engine was started.
#[derive(Debug, Default)]
pub(crate) struct Log {
    /// The newest number.
    pub last: u64,
    /// The number up to which it is durable, as the gate knows.
    pub durable: u64,
}

impl World {
    /// Whether a mapping is behind the gate.
    pub(crate) fn is_gated(&self, mapping: usize) -> bool {
        self.setup.is_gated && mapping == 0
    }

    /// Whether pages of a mapping may be waiting for the log.
    pub(crate) fn may_wait_for_log(&self, mapping: usize) -> bool {
        let newest = self.mappings[mapping].pages.iter().map(|page| page.newest_lsn).max().unwrap_or(0);
        self.is_gated(mapping) && newest > self.log_state.durable
    }

    pub(super) fn write_lsn(&mut self, on: u8, at: u32, len: u32) {
        let Some((handle_id, handle)) = self.handle(on) else { return };
        let mapping = self.handle_states[handle_id].mapping;
        let range = self.setup.clip(mapping, at, len);
        if !self.make_room(mapping, &self.setup.pages_of(mapping, &range)) {
            return;
        }
        let data = self.data(range.end - range.start);
        let id = self.begin_change(mapping, &range, &data);
        self.log_state.last += 1;
        let lsn = self.log_state.last;
        for page in self.setup.pages_of(mapping, &range) {
            let page = &mut self.mappings[mapping].pages[page];
            page.newest_lsn = lsn;
            if page.oldest_lsn == 0 {
                page.oldest_lsn = lsn;
            }
        }
        if self.quiet.as_ref().is_some_and(|quiet| quiet.mapping == mapping) && self.is_gated(mapping) {
            // What a sync leaves out at first, it writes in a second round.
            self.quiet = None;
        }
        let offset = file_offset(range.start);
        let future = async move { Output::Done(handle.write_at_lsn_async(offset, &data, Lsn(lsn)).await) };
        self.start(id, mapping, Kind::Write { range, lsn }, Box::pin(future));
    }

    /// The log becomes durable but for the newest `behind` numbers.
    pub(crate) fn advance_log(&mut self, behind: u8) {
        let lsn = self.log_state.last.saturating_sub(u64::from(behind));
        let Some(gate) = self.gate.as_ref().filter(|_| lsn > self.log_state.durable) else { return };
        if let Err(error) = gate.advance_durable_lsn(Lsn(lsn)) {
            violated(Rule::Wb40, format!("the gate can't be advanced to {lsn}: {error}"));
        }
        self.log_state.durable = lsn;
    }

    pub(super) fn flush_until(&mut self, on: u8, behind: u8, at_rest: bool) {
        let lsn = (self.log_state.last + 1).saturating_sub(u64::from(behind));
        self.checkpoint(on, Some(lsn), at_rest, |handle| {
            Box::pin(async move { Output::Done(handle.flush_until_async(Lsn(lsn)).await) })
        });
    }

    pub(super) fn oldest_lsn(&mut self, on: u8) {
        self.checkpoint(on, None, false, |handle| {
            Box::pin(async move { Output::Lsn(handle.oldest_dirty_lsn_async().await) })
        });
    }

    fn checkpoint(
        &mut self,
        on: u8,
        until: Option<u64>,
        at_rest: bool,
        future: impl FnOnce(Rc<Mapping>) -> Pin<Box<dyn Future<Output = Output>>>,
    ) {
        let Some((handle_id, handle)) = self.handle(on) else { return };
        let mapping = self.handle_states[handle_id].mapping;
        // It may end with a flush.
        self.life.syncs += 1;
        // Of pages that take several commands it isn't known which are still to be tried again.
        let vague = self.setup.splits_pages(mapping) && self.life.struck.has(Fault::WriteTransient);
        let is_alone = at_rest && !vague && self.ops.is_empty() && self.zombies.is_empty();
        let others = is_alone.then(|| self.flusher_passes());
        let kind = Kind::Checkpoint { until, others, wrote: Vec::new() };
        self.start(self.next_op, mapping, kind, future(handle));
    }

    // ---- judging ------------------------------------------------------------------------------------------

    /// What a checkpoint writes that nothing else runs beside is older than what it was asked for (WB-45).
    pub(crate) fn judge_what_it_wrote(
        &mut self,
        what: &str,
        mapping: usize,
        until: u64,
        others: Option<u64>,
        wrote: &[(usize, u64)],
    ) {
        if others != Some(self.flusher_passes()) || self.life.doomed {
            return;
        }
        if let Some((page, oldest)) = wrote.iter().find(|(_, oldest)| *oldest == 0 || *oldest >= until) {
            violated(
                Rule::Wb45,
                format!("{what} wrote page {page} of mapping {mapping}, whose oldest number is {oldest}"),
            );
        }
        if !wrote.is_empty() && !self.life.latched {
            self.met_by_writes(Rule::Wb45Only);
        }
    }

    /// The device gets a write for the first time: of a checkpoint that is alone, it is the checkpoint's.
    pub(crate) fn note_checkpoint_write(&mut self, extent: Extent) {
        for (mapping, page) in self.pages_at(extent) {
            let oldest = self.mappings[mapping].pages[page].oldest_lsn;
            for op in self.ops.iter_mut().filter(|op| op.mapping == mapping) {
                // Once a page: its first part may be all that it lacked, and then nothing is known of the others.
                if let Kind::Checkpoint { wrote, .. } = &mut op.kind
                    && wrote.iter().all(|(other, _)| *other != page)
                {
                    wrote.push((page, oldest));
                }
            }
        }
    }

    /// A stamped write has succeeded.
    pub(crate) fn stamped(&mut self, op: &Op, lsn: u64, ended: Moment) {
        let Kind::Write { range, .. } = &op.kind else { return };
        let stamp = Stamp { lsn, began: op.began, ended, written: None };
        for page in self.setup.pages_of(op.mapping, range) {
            let page = &mut self.mappings[op.mapping].pages[page];
            if !page.was_discarding(op.began) {
                page.stamps.push(stamp);
            }
        }
    }

    /// The device gets a write or zeroes for an extent: the log of what it holds is durable (WB-40).
    pub(crate) fn check_gate(&mut self, extent: Extent) {
        let mut met = false;
        for (mapping, page) in self.pages_at(extent) {
            if !self.is_gated(mapping) {
                continue;
            }
            let durable = self.log_state.durable;
            let stamps = &self.mappings[mapping].pages[page].stamps;
            if let Some(stamp) = stamps.iter().find(|stamp| stamp.lsn > durable) {
                violated(
                    Rule::Wb40,
                    format!("page {page} is written with {stamp:?}, and the log is durable up to {durable}"),
                );
            }
            // Once a flush has failed, the device gets only what was in the queue.
            met |= !stamps.is_empty() && !self.life.latched;
        }
        if met {
            self.met(Rule::Wb40);
        }
    }

    /// A checkpoint has ended well: what the log is needed for is behind `until`, or behind `oldest`.
    pub(crate) fn judge_checkpoint(
        &mut self,
        what: &str,
        (mapping, began): (usize, Moment),
        bound: Option<u64>,
    ) {
        if self.life.is_power_off {
            return;
        }
        let mut met = false;
        for (number, page) in self.mappings[mapping].pages.iter().enumerate() {
            for stamp in page.stamps.iter().filter(|stamp| stamp.ended < began) {
                met = true;
                if self.is_surely_undurable(page, stamp) && bound.is_none_or(|bound| stamp.lsn < bound) {
                    violated(
                        Rule::Wb45,
                        format!(
                            "{what} says that the log is needed from {bound:?} on, but page {number} has {stamp:?}"
                        ),
                    );
                }
            }
        }
        if met {
            self.met(Rule::Wb45);
        }
    }

    /// Whether a power cut could surely lose it.
    fn is_surely_undurable(&self, page: &Page, stamp: &Stamp) -> bool {
        let is_volatile = self.setup.write_cache == WriteCache::Volatile;
        match stamp.written {
            None => page.oldest_write() < stamp.began,
            Some(written) => is_volatile && written > self.life.flushed,
        }
    }

    /// Whether an error that tells of a gate tells the truth.
    pub(crate) fn is_gate_shut(&self, error: &Error) -> bool {
        match error {
            Error::Gated { waits_for, durable, .. } => {
                durable < waits_for && waits_for.0 <= self.log_state.last
            }
            _ => true,
        }
    }

    /// Opens the gate of a new engine, whose number begins anew.
    pub(super) fn open_gate(&mut self) {
        self.log_state.durable = 0;
        self.gate = self.setup.is_gated.then(|| self.bed.engine().gate("log"));
    }
}
