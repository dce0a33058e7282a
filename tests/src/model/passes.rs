//! Passes that a run begins itself: background ones over the whole mapping, a range, or from where the last one stopped,
//! with budgets, and with callbacks that put pages off (WB-02, WB-05, WB-09).

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use foliant::{Disposition, PassEnd, WritebackCallback, WritebackControl, WritebackOutcome};
use foliant_nvme_spec::NvmOpcode;

use super::case::{FRAME, How, MAPPING_SPACE};
use super::content::{Moment, Poisoned, Snapshot};
use super::device_log::Extent;
use super::operations::{Kind, Output};
use super::rules::{Fault, Rule};
use super::violated;
use super::world::World;

/// What a callback was shown: the byte of the mapping at which it begins, and the bytes.
type Shown = Vec<(u64, Vec<u8>)>;

/// A pass in flight, in the model.
#[derive(Debug)]
pub(crate) struct Order {
    how: How,
    /// In frames' worth; 0 for no budget.
    budget: u64,
    shown: Arc<Mutex<Shown>>,
    /// What the callback has put off, in bytes of the mapping.
    refused: Arc<Mutex<Vec<Range<u64>>>>,
    /// What pages may show since it began.
    since: Vec<Snapshot>,
    began: Moment,
    /// Nothing else was going on when it began: writes from then on, at this time, are its own.
    pub alone_ns: Option<u64>,
    /// Those writes: queue and range.
    pub writes: Vec<(u16, Extent)>,
    /// Pages that it has to write: dirty, not held, never failed, not behind the gate.
    dirty: Vec<usize>,
    /// Where it begins, if it is a cyclic one and that is known.
    cyclic: Option<Cyclic>,
    /// Passes that the flushers had begun when it began.
    others: u64,
}

/// Where the next cyclic pass over a mapping begins, of one shard, in bytes of the mapping.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cyclic {
    /// Not before this one.
    lowest: u64,
    /// Nor behind this one.
    highest: u64,
    /// Passes that the flushers had begun when that became known: one more, and it isn't any longer.
    others: u64,
}

impl Cyclic {
    /// At the mapping's first byte.
    pub(crate) fn at_start(others: u64) -> Self {
        Self { lowest: 0, highest: 0, others }
    }
}

/// A pass that was alone and has ended. What it took is in the queue, and the device gets it next.
#[derive(Debug)]
pub(crate) struct Tail {
    what: String,
    mapping: usize,
    at_ns: u64,
    others: u64,
    /// What its callback put off, in bytes of the mapping.
    put_off: Vec<Range<u64>>,
    /// Where it began at the earliest.
    lowest: u64,
    /// What it wrote last, by queue.
    last: HashMap<u16, Extent>,
    /// Frames' worth of writes that the device hasn't got yet.
    left: u64,
    /// A cyclic one has stopped at its budget, behind this byte as far as is known; and what was dirty when it began.
    stopped: Option<(u64, Vec<usize>)>,
}

impl World {
    pub(super) fn pass(&mut self, on: u8, how: How, budget: u8, put_off: u8, at_rest: bool) {
        let Some((handle_id, handle)) = self.handle(on) else { return };
        let mapping = self.handle_states[handle_id].mapping;
        let pages = 0..self.setup.pages(mapping);
        let mut control = match how {
            How::Cyclic => WritebackControl::background(),
            How::Whole => WritebackControl::background().whole(),
            How::Tagged => WritebackControl::background().whole().tag_first(),
            How::Integrity => WritebackControl::integrity(),
        };
        if budget > 0 {
            control = control.pages_max(u64::from(budget));
        }
        let (shown, refused) = (Arc::<Mutex<Shown>>::default(), Arc::<Mutex<Vec<Range<u64>>>>::default());
        let callback: Option<WritebackCallback> = (put_off > 0).then(|| {
            let (shown, refused) = (shown.clone(), refused.clone());
            let callback: WritebackCallback = Arc::new(move |folio| {
                shown.lock().expect("nobody panics with it").push((folio.offset(), folio.bytes().to_vec()));
                if !(folio.offset() / FRAME).is_multiple_of(u64::from(put_off) + 1) {
                    return Disposition::Write;
                }
                let end = folio.offset() + FRAME * folio.pages();
                refused.lock().expect("nobody panics with it").push(folio.offset()..end);
                Disposition::NotNow
            });
            callback
        });
        let future = Box::pin(async move {
            Output::Pass(match callback {
                Some(callback) => handle.writeback_with_async(&control, &callback).await,
                None => handle.writeback_async(&control).await,
            })
        });
        let since = self.snapshots(mapping, &pages);
        if how == How::Integrity {
            if at_rest && put_off == 0 {
                self.begin_quiet(mapping, pages.clone());
            }
            let kind = self.sync_kind(handle_id, mapping, pages);
            let id = self.next_op;
            self.start(id, mapping, kind, future);
            if let Some(op) = self.ops.iter_mut().find(|op| op.id == id) {
                op.lived.refuses = put_off > 0;
            }
            return;
        }
        let others = self.flusher_passes();
        let cyclic = match how {
            How::Cyclic => self.life.cyclic[mapping].take().filter(|cyclic| cyclic.others == others),
            _ => None,
        };
        // Of pages that take several commands it isn't known which are still to be tried again.
        let vague = self.setup.splits_pages(mapping) && self.life.struck.has(Fault::WriteTransient);
        let is_idle = at_rest && self.ops.is_empty() && self.zombies.is_empty();
        let is_alone = is_idle && !vague && !self.life.doomed;
        let is_mine = |page: &usize| {
            let modelled = &self.mappings[mapping].pages[*page];
            !modelled.is_busy() && modelled.poisoned == Poisoned::No && self.is_surely_dirty(mapping, *page)
        };
        let dirty = if vague || self.may_wait_for_log(mapping) {
            Vec::new()
        } else {
            pages.filter(is_mine).collect()
        };
        let alone_ns = is_alone.then(|| self.bed.now_ns());
        let budget = u64::from(budget);
        let began = self.now();
        let writes = Vec::new();
        let order =
            Order { began, how, budget, shown, refused, since, alone_ns, writes, dirty, cyclic, others };
        self.start(self.next_op, mapping, Kind::Pass { order }, future);
    }

    /// Passes that the flushers have begun.
    pub(crate) fn flusher_passes(&self) -> u64 {
        let stats = self.bed.engine().stats();
        stats.passes_reclaim
            + stats.passes_dirty_limit
            + stats.passes_expiry
            + stats.passes_poisoned
            + stats.passes_close
    }

    /// The device gets a write for the first time: of a pass that is alone, it is the pass's.
    pub(crate) fn note_pass_write(&mut self, qid: u16, extent: Extent) {
        let now_ns = self.bed.now_ns();
        for op in &mut self.ops {
            let mapping = op.mapping as u64;
            if let Kind::Pass { order } = &mut op.kind
                && order.alone_ns == Some(now_ns)
                && extent.start / MAPPING_SPACE == mapping
            {
                order.writes.push((qid, extent));
            }
        }
        let others = self.flusher_passes();
        if let Some(mut tail) = self.life.tail.take()
            && !self.life.doomed
            && tail.at_ns == now_ns
            && tail.others == others
        {
            tail.note(self, qid, extent);
            self.life.tail = Some(tail);
        }
    }

    /// A background pass has ended.
    pub(crate) fn judge_pass(
        &mut self,
        what: &str,
        mapping: usize,
        order: &Order,
        result: &foliant::Result<WritebackOutcome>,
    ) {
        for (offset, bytes) in order.shown.lock().expect("nobody panics with it").iter() {
            let frames = bytes.chunks(FRAME as usize).enumerate();
            for (at, bytes) in frames.map(|(index, bytes)| (offset + index as u64 * FRAME, bytes)) {
                let Some((_, page)) = self.setup.page_at(MAPPING_SPACE * mapping as u64 + at) else {
                    continue;
                };
                let within = (at - self.setup.file_offset_of(mapping, page)) as usize;
                if !self.mappings[mapping].pages[page].may_have_been(&order.since[page], within, bytes) {
                    violated(
                        Rule::Wb09,
                        format!("{what} was shown what page {page} never was since it began"),
                    );
                }
            }
        }
        let Ok(outcome) = result else { return };
        let put_off = std::mem::take(&mut *order.refused.lock().expect("nobody panics with it"));
        let refused: u64 = put_off.iter().map(|range| (range.end - range.start) / FRAME).sum();
        if outcome.pages_postponed != refused {
            violated(Rule::Wb09, format!("{what} put {refused} pages off and ended with {outcome:?}"));
        }
        if refused > 0 && !self.life.latched {
            self.met(Rule::Wb09);
        }
        let block = self.setup.page_len(mapping) / FRAME;
        if order.budget > 0 {
            if outcome.pages_written > order.budget.next_multiple_of(block) {
                violated(
                    Rule::Wb05Budget,
                    format!("{what} had {} pages to spend: {outcome:?}", order.budget),
                );
            }
            if outcome.ended == PassEnd::Budget && !self.life.latched {
                self.met(Rule::Wb05Budget);
            }
        }
        if order.alone_ns != Some(self.bed.now_ns()) || self.ops.iter().any(|op| op.mapping == mapping) {
            return;
        }
        self.follow(what, mapping, order, outcome, put_off);
        let first = match order.how {
            How::Cyclic => order.cyclic.map(|cyclic| cyclic.highest),
            _ => Some(0),
        };
        let covers = outcome.ended == PassEnd::Complete && refused == 0;
        let Some(first) = first.filter(|_| covers && !self.life.doomed && !self.life.is_power_off) else {
            return;
        };
        // What it took is in the queue now; the device has it soon.
        let began = order.began;
        let pages = order.dirty.iter().filter(|&&page| self.setup.file_offset_of(mapping, page) >= first);
        self.life.passed.extend(pages.map(|&page| (mapping, page, began)));
    }

    /// A pass that was alone has ended: its writes that the device gets only now are looked at, too, and where a cyclic
    /// one has stopped, the next one goes on.
    fn follow(
        &mut self,
        what: &str,
        mapping: usize,
        order: &Order,
        outcome: &WritebackOutcome,
        put_off: Vec<Range<u64>>,
    ) {
        let others = self.flusher_passes();
        if others != order.others || self.life.is_power_off || self.life.doomed {
            return;
        }
        let lowest = order.cyclic.map_or(0, |cyclic| cyclic.lowest);
        let is_single = order.how == How::Cyclic && self.setup.shards == 1;
        let mut stopped = None;
        if is_single && outcome.ended == PassEnd::Complete {
            // Where nothing is dirty, no shard is asked, and nothing changes.
            let is_asked = !order.dirty.is_empty() || lowest == 0 && order.cyclic.is_some();
            self.life.cyclic[mapping] = is_asked.then(|| Cyclic::at_start(others));
        } else if is_single && outcome.ended == PassEnd::Budget {
            let last = put_off.iter().map(|range| range.end).max().unwrap_or(0);
            stopped = Some((last.max(lowest), order.dirty.clone()));
        }
        if let Some(range) = put_off.iter().find(|range| range.start < lowest) {
            violated(
                Rule::Wb02,
                format!("{what} came upon {range:?}, and the one before had come to {lowest}"),
            );
        }
        let (what, at_ns, left) = (what.to_owned(), self.bed.now_ns(), outcome.pages_written);
        let last = HashMap::new();
        let mut tail = Tail { what, mapping, at_ns, others, put_off, lowest, last, left, stopped };
        for &(qid, extent) in &order.writes {
            tail.note(self, qid, extent);
        }
        self.life.tail = Some(tail);
    }

    /// Everything rests: what complete passes had to write has been with the device since they began.
    pub(crate) fn check_passed(&mut self) {
        for (mapping, page, began) in std::mem::take(&mut self.life.passed) {
            let modelled = &self.mappings[mapping].pages[page];
            let tried = modelled.oldest_write().max(modelled.write_failed);
            let is_excused = modelled.touched >= began
                || modelled.was_discarding(began)
                || self.life.doomed
                || self.life.latched
                || self.is_in_flight(mapping, page, NvmOpcode::WRITE);
            if tried < began && !is_excused {
                violated(Rule::Wb02, format!("a pass was complete, and dirty page {page} wasn't written"));
            }
            if !self.life.doomed {
                self.met_by_writes(Rule::Wb02);
            }
        }
    }
}

impl Tail {
    /// The device gets a write of the pass.
    fn note(&mut self, world: &mut World, qid: u16, extent: Extent) {
        let Some(start) = extent.start.checked_sub(MAPPING_SPACE * self.mapping as u64) else { return };
        if start >= MAPPING_SPACE {
            return;
        }
        let end = start + extent.len;
        if let Some(before) = self.last.insert(qid, extent) {
            if before.end() > extent.start {
                violated(Rule::Wb02, format!("{}: {extent:?} was written after {before:?}", self.what));
            }
            world.met_by_writes(Rule::Wb02);
        }
        if let Some(put_off) = self.put_off.iter().find(|range| start < range.end && range.start < end) {
            violated(
                Rule::Wb09,
                format!("{} was told not to write {put_off:?} now, and {extent:?} was written", self.what),
            );
        }
        if start < self.lowest {
            violated(
                Rule::Wb02,
                format!(
                    "{}: {extent:?} was written, and the one before had come to {}",
                    self.what, self.lowest
                ),
            );
        }
        if self.lowest > 0 {
            world.met_by_writes(Rule::Wb02Index);
        }
        let frames = extent.len.div_ceil(FRAME);
        self.left = self.left.saturating_sub(frames);
        let Some((last, dirty)) = &mut self.stopped else { return };
        *last = end.next_multiple_of(FRAME).max(*last);
        if self.left > 0 {
            return;
        }
        let (lowest, setup) = (*last, &world.setup);
        let next = dirty.iter().map(|&page| setup.file_offset_of(self.mapping, page));
        // What was dirty, and comes behind, is where it can have stopped at the latest.
        let highest = next.filter(|&start| start >= lowest).min().unwrap_or(u64::MAX);
        world.life.cyclic[self.mapping] = Some(Cyclic { lowest, highest, others: self.others });
    }
}

impl Order {
    pub(crate) fn describe(&self) -> String {
        format!("pass ({:?}, budget {})", self.how, self.budget)
    }
}
