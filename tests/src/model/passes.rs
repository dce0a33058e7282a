//! Passes that a run begins itself: background ones over the whole mapping, a range, or from where the last one stopped,
//! with budgets, and with callbacks that put pages off (WB-02, WB-05, WB-09).

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
    /// Frames' worth that the callback has put off.
    refused: Arc<Mutex<u64>>,
    /// What pages may show since it began.
    since: Vec<Snapshot>,
    began: Moment,
    /// Nothing else was going on when it began: writes from then on, at this time, are its own.
    pub alone_ns: Option<u64>,
    /// Those writes: queue and range.
    pub writes: Vec<(u16, Extent)>,
    /// Pages that it has to write: dirty, not held, never failed, not behind the gate.
    dirty: Vec<usize>,
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
        let (shown, refused) = (Arc::<Mutex<Shown>>::default(), Arc::<Mutex<u64>>::default());
        let callback: Option<WritebackCallback> = (put_off > 0).then(|| {
            let (shown, refused) = (shown.clone(), refused.clone());
            let callback: WritebackCallback = Arc::new(move |folio| {
                shown.lock().expect("nobody panics with it").push((folio.offset(), folio.bytes().to_vec()));
                if !(folio.offset() / FRAME).is_multiple_of(u64::from(put_off) + 1) {
                    return Disposition::Write;
                }
                *refused.lock().expect("nobody panics with it") += folio.pages();
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
        let is_alone = at_rest && self.ops.is_empty() && self.zombies.is_empty() && !self.life.doomed;
        let is_mine = |page: &usize| {
            let modelled = &self.mappings[mapping].pages[*page];
            !modelled.is_busy() && modelled.poisoned == Poisoned::No && self.is_surely_dirty(mapping, *page)
        };
        // Of pages that take several commands it isn't known which are still to be tried again.
        let vague = self.setup.splits_pages(mapping) && self.life.struck.has(Fault::WriteTransient);
        let dirty = if vague || self.may_wait_for_log(mapping) {
            Vec::new()
        } else {
            pages.filter(is_mine).collect()
        };
        let alone_ns = is_alone.then(|| self.bed.now_ns());
        let budget = u64::from(budget);
        let began = self.now();
        let order = Order { began, how, budget, shown, refused, since, alone_ns, writes: Vec::new(), dirty };
        self.start(self.next_op, mapping, Kind::Pass { order }, future);
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
        let refused = *order.refused.lock().expect("nobody panics with it");
        if outcome.pages_postponed != refused {
            violated(Rule::Wb09, format!("{what} put {refused} pages off and ended with {outcome:?}"));
        }
        if refused > 0 {
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
            if outcome.ended == PassEnd::Budget {
                self.met(Rule::Wb05Budget);
            }
        }
        if order.alone_ns != Some(self.bed.now_ns()) || self.ops.iter().any(|op| op.mapping == mapping) {
            return;
        }
        for (at, (qid, extent)) in order.writes.iter().enumerate() {
            let before = order.writes[..at].iter().rfind(|(other, _)| other == qid);
            if let Some((_, before)) = before
                && before.end() > extent.start
            {
                violated(Rule::Wb02, format!("{what}: {extent:?} was written after {before:?}"));
            }
        }
        if order.writes.len() > 1 {
            self.met_by_writes(Rule::Wb02);
        }
        let covers = order.how != How::Cyclic && outcome.ended == PassEnd::Complete && refused == 0;
        if !covers || self.life.doomed || self.life.is_power_off {
            return;
        }
        // What it took is in the queue now; the device has it soon.
        let began = order.began;
        self.life.passed.extend(order.dirty.iter().map(|&page| (mapping, page, began)));
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
            self.met_by_writes(Rule::Wb02);
        }
    }
}

impl Order {
    pub(crate) fn describe(&self) -> String {
        format!("pass ({:?}, budget {})", self.how, self.budget)
    }
}
