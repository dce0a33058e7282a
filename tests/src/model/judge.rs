//! The checks of the rules: when operations end, when the device is asked something, at rest, and after power cuts.

use std::ops::Range;

use foliant::{Error, RetryPolicy};
use foliant_nvme_spec::NvmOpcode;

use super::case::{FLUSH_INTERVAL, FRAME, PIN_WAIT, WriteCache};
use super::content::{Moment, Page, Poisoned, Snapshot};
use super::device_log::Extent;
use super::operations::{HandleId, Kind, Op, Output, PINS_MAX};
use super::rules::{Fault, Rule};
use super::telling::{self, Owed};
use super::violated;
use super::world::{FailedPart, MappingState, Quiet, Unsettled, World};

/// A sync that has ended.
struct Synced {
    began: Moment,
    mapping: usize,
    pages: Range<usize>,
    since: Vec<Snapshot>,
}

impl World {
    // ---- ends of operations -------------------------------------------------------------------------------

    /// A pin has been granted: what it shows is the newest at this moment.
    pub(crate) fn pin_granted(&mut self, at: usize) {
        let op = &self.ops[at];
        let Some(cell) = op.pin_cell().cloned() else { return };
        let (id, mapping, what, after_latch) = (op.id, op.mapping, op.describe(), op.after_latch);
        let (page, exclusive) = match op.kind {
            Kind::PinMut { page, .. } => (page, true),
            Kind::Pin { page, .. } => (page, false),
            _ => return,
        };
        let bytes = cell.granted.borrow().clone().unwrap_or_default();
        let modelled = &mut self.mappings[mapping].pages[page];
        if !modelled.saw(0, &bytes) || bytes.len() as u64 != self.setup.page_bytes(mapping, page) {
            violated(Rule::Wb27, format!("{what} shows what was never its newest content"));
        }
        if let Some(holder) = modelled.held {
            violated(
                Rule::Wb25Stable,
                format!("{what} was granted while operation {holder} holds it exclusively"),
            );
        }
        self.met(Rule::Wb27);
        if exclusive {
            if self.is_in_flight(mapping, page, NvmOpcode::WRITE) {
                violated(Rule::Wb25Stable, format!("{what} was granted while the device writes the page"));
            }
            if after_latch {
                violated(Rule::Wb30, format!("{what} was granted after a failed flush"));
            }
            self.met(Rule::Wb25Stable);
            let modelled = &mut self.mappings[mapping].pages[page];
            modelled.held = Some(id);
            modelled.discarded = false;
            self.note_change(mapping, page);
            if let Some(quiet) = self.quiet.as_mut().filter(|quiet| quiet.mapping == mapping) {
                quiet.held.push(page);
            }
        }
    }

    /// An operation has ended.
    pub(crate) fn ended(&mut self, op: Op, output: Output) {
        let what = op.describe();
        let number = match &op.kind {
            Kind::Write { lsn, .. } => *lsn,
            _ => 0,
        };
        if number > 0 && matches!(output, Output::Done(Ok(()))) {
            let now = self.now();
            self.stamped(&op, number, now);
        }
        let Op { id, kind, mapping, began, after_latch, mut lived, .. } = op;
        let now = self.now();
        let result = match &output {
            Output::Done(result) => result.clone(),
            Output::Bytes(result) => result.as_ref().map(drop).map_err(Clone::clone),
            Output::Lsn(result) => result.as_ref().map(drop).map_err(Clone::clone),
            Output::Pass(result) => result.as_ref().map(drop).map_err(Clone::clone),
            Output::Count(result) => result.as_ref().map(drop).map_err(Clone::clone),
        };
        lived.waited = self.bed.now_ns().saturating_sub(op.began_ns) >= PIN_WAIT.as_nanos() as u64;
        lived.written = self.were_written_lately(mapping, &kind) && !self.has_failed_in_part(mapping, began);
        lived.soft = self.setup.retry == RetryPolicy::Soft;
        lived.gated = self.setup.is_gated && self.log_state.last > 0;
        lived.asks_pages = self.setup.page_len(mapping) / FRAME;
        lived.overtaken = self.is_overtaken(mapping, &kind, number);
        lived.rivals |= op.began_ns < self.life.rival_left_ns;
        // Of a page's parts one may have failed long before the last has ended, and with it the page.
        let parts = self.life.unsettled.iter().filter(|part| part.mapping == mapping);
        parts.for_each(|part| lived.add(part.part));
        // One that failed for good ends its page only after others that are tried again.
        lived.write_failed |= self.setup.splits_pages(mapping) && self.life.struck.has(Fault::WriteTransient);
        lived.latched = self.life.latched;
        lived.doomed |= self.life.doomed;
        lived.closed |= matches!(self.mappings[mapping].state, MappingState::Closing | MappingState::Limbo);
        lived.struck |= self.life.struck != super::rules::Faults::default();
        if let Kind::Sync { handle, .. } = kind {
            lived.owed = self.handle_states[handle].owed;
        }
        if let Err(error) = &result
            && !(telling::is_excused(error, &lived) && self.is_gate_shut(error))
        {
            let rule = match kind {
                Kind::Sync { .. } => Rule::Wb23Told,
                _ => Rule::Bounded,
            };
            violated(rule, format!("{what} ended for no reason: {error} ({lived:?})"));
        }
        if after_latch && !matches!(kind, Kind::Read { .. } | Kind::Pin { .. }) {
            // One that stays closed since a shard is gone says that.
            let is_gone = lived.closed && lived.doomed && matches!(result, Err(Error::ShardFailed { .. }));
            if !is_gone && !matches!(result, Err(Error::NamespaceFailed { .. } | Error::Closed)) {
                violated(Rule::Wb30, format!("{what} began after a failed flush and ended with {result:?}"));
            }
            self.met(Rule::Wb30);
        }
        match (kind, output) {
            (Kind::Read { range, since }, Output::Bytes(result)) => {
                if let Ok(bytes) = result {
                    self.check_read(&what, mapping, &range, &since, &bytes, op.polls == 1);
                }
            }
            (Kind::TryWrite { range }, Output::Count(count)) => {
                let began = count.as_ref().is_ok_and(|&count| count > 0).then_some(began);
                if let Ok(count) = count
                    && count as u64 != range.end - range.start
                {
                    violated(Rule::Wb24, format!("{what}, of a single page, has written {count} bytes"));
                }
                self.end_change(id, mapping, &range, began, now);
                self.met(Rule::Wb24);
            }
            (Kind::Pass { order }, Output::Pass(result)) => self.judge_pass(&what, mapping, &order, &result),
            (Kind::Checkpoint { until, others, wrote }, output) => {
                if let Some(until) = until {
                    self.judge_what_it_wrote(&what, mapping, until, others, &wrote);
                }
                match (until, output) {
                    (Some(until), Output::Done(Ok(()))) => {
                        self.judge_checkpoint(&what, (mapping, began), Some(until));
                    }
                    (None, Output::Lsn(Ok(oldest))) => {
                        self.judge_checkpoint(&what, (mapping, began), oldest.map(|lsn| lsn.0));
                    }
                    _ => {}
                }
                self.check_flushes();
            }
            (Kind::Write { range, .. }, _) => {
                let began = result.is_ok().then_some(began);
                if began.is_some() && op.polls == 1 {
                    self.check_stable(&what, mapping, &range);
                }
                self.end_change(id, mapping, &range, began, now);
            }
            (Kind::Discard { range, zeroes_failed }, _) => {
                let others = self.mappings[mapping].pages[self.setup.pages_of(mapping, &range)].iter();
                let untouched: Vec<bool> = others.map(|page| page.touched < began).collect();
                self.end_change(id, mapping, &range, result.is_ok().then_some(began), now);
                match result {
                    Ok(()) if zeroes_failed => {}
                    Ok(()) => self.note_discarded(mapping, &range, &untouched),
                    Err(_) => self.mappings[mapping].pages[self.setup.pages_of(mapping, &range)]
                        .iter_mut()
                        .for_each(Page::thrown_away),
                }
            }
            (Kind::Pin { page, cell }, _) => {
                if result.is_ok() {
                    if *cell.granted.borrow() != *cell.left.borrow() {
                        violated(Rule::Wb25Stable, format!("{what}: its bytes changed while it was held"));
                    }
                    self.met(Rule::Wb25Stable);
                }
                let _ = page;
            }
            (Kind::PinMut { page, cell }, _) => {
                let modelled = &mut self.mappings[mapping].pages[page];
                if modelled.held == Some(id) {
                    modelled.held = None;
                    if let Some(data) = &*cell.left.borrow() {
                        modelled.change(0, data, now);
                    }
                }
            }
            (Kind::Sync { handle, pages, since, held, closes }, _) => {
                self.judge_telling(&what, (handle, closes), mapping, &result);
                let still_held = self.ops.iter().any(|op| held.contains(&op.id));
                if result.is_ok() {
                    if still_held {
                        violated(
                            Rule::Wb06,
                            format!("{what} succeeded over a dirty page that is held exclusively"),
                        );
                    }
                    if !held.is_empty() {
                        self.met_by_writes(Rule::Wb06);
                    }
                    self.judge_success(&what, Synced { began, mapping, pages, since });
                }
                if self.quiet.as_ref().is_some_and(|quiet| quiet.op == id)
                    && let Some(quiet) = self.quiet.take()
                {
                    self.judge_quiet(&what, &quiet, lived.waited, &result);
                }
                if closes.is_some() {
                    self.closed(mapping, &result);
                }
                self.check_flushes();
            }
            (Kind::Read { .. } | Kind::TryWrite { .. } | Kind::Pass { .. }, _) => {}
        }
    }

    /// Whether pages were written within the last wait in every shard that has a part of what an operation changes.
    fn were_written_lately(&self, mapping: usize, kind: &Kind) -> bool {
        let pages = match kind {
            Kind::Write { range, .. } | Kind::TryWrite { range } => self.setup.pages_of(mapping, range),
            Kind::PinMut { page, .. } => *page..page + 1,
            _ => return false,
        };
        let since_ns = self.bed.now_ns().saturating_sub(PIN_WAIT.as_nanos() as u64);
        pages
            .map(|page| self.setup.stripe_of(mapping, page))
            .all(|stripe| self.life.written_ns.get(&stripe).is_some_and(|&written_ns| written_ns > since_ns))
    }

    /// Whether a write has failed since then, or before and others of its page haven't ended, that may be one of several of
    /// a page: the others may be written time and again, and it stays dirty for that one. In a single shard pages of
    /// either mapping do so.
    fn has_failed_in_part(&self, mapping: usize, since: Moment) -> bool {
        let is_beside = |other: &usize| *other == mapping || self.setup.shards == 1;
        let is_write = |part: &Unsettled| matches!(part.part, FailedPart::Write { .. });
        (0..self.setup.mappings).filter(is_beside).filter(|&other| self.setup.splits_pages(other)).any(
            |other| {
                self.mappings[other].pages.iter().any(|page| page.write_failed > since)
                    || self.life.unsettled.iter().any(|part| part.mapping == other && is_write(part))
            },
        )
    }

    /// Whether a page that a write with this number stamps may have a later one.
    fn is_overtaken(&self, mapping: usize, kind: &Kind, lsn: u64) -> bool {
        let Kind::Write { range, .. } = kind else { return false };
        let mut pages = self.mappings[mapping].pages[self.setup.pages_of(mapping, range)].iter();
        lsn > 0 && pages.any(|page| page.newest_lsn > lsn)
    }

    fn end_change(
        &mut self,
        id: u32,
        mapping: usize,
        range: &Range<u64>,
        began: Option<Moment>,
        now: Moment,
    ) {
        let pages = &mut self.mappings[mapping].pages[self.setup.pages_of(mapping, range)];
        pages.iter_mut().for_each(|page| page.end(id, began, now));
    }

    fn check_read(
        &mut self,
        what: &str,
        mapping: usize,
        range: &Range<u64>,
        since: &[Snapshot],
        bytes: &[u8],
        at_once: bool,
    ) {
        for ((page, within, part), since) in self.setup.parts(mapping, range).zip(since) {
            let modelled = &mut self.mappings[mapping].pages[page];
            let bytes = &bytes[part];
            // What came in one poll is what is there now; else each page was there at some time of the read.
            let possible = if at_once {
                modelled.saw(within, bytes)
            } else {
                modelled.may_have_been(since, within, bytes)
            };
            if !possible {
                violated(
                    Rule::Wb27,
                    format!("{what}: page {page} shows what it never was since the read began"),
                );
            }
        }
        self.met(Rule::Wb27);
        let used = self.bed.engine().stats().readahead_pages_used;
        if std::mem::replace(&mut self.life.readahead_used, used) < used {
            self.met(Rule::Wb28);
        }
    }

    /// A write that came in one poll found none of its pages with the device.
    fn check_stable(&mut self, what: &str, mapping: usize, range: &Range<u64>) {
        for page in self.setup.pages_of(mapping, range) {
            if self.is_in_flight(mapping, page, NvmOpcode::WRITE) {
                violated(Rule::Wb25Stable, format!("{what} changed page {page} while the device writes it"));
            }
        }
        if self.log.in_flight().any(|flight| flight.opcode == NvmOpcode::WRITE) {
            self.met(Rule::Wb25Stable);
        }
    }

    /// Pages that nothing else has changed meanwhile are gone for good.
    fn note_discarded(&mut self, mapping: usize, range: &Range<u64>, untouched: &[bool]) {
        for ((page, within, part), &untouched) in self.setup.parts(mapping, range).zip(untouched) {
            let whole = within == 0 && part.len() as u64 == self.setup.page_bytes(mapping, page);
            let modelled = &mut self.mappings[mapping].pages[page];
            modelled.discarded = whole && untouched && !modelled.is_busy();
        }
        self.met(Rule::Wb26);
    }

    fn closed(&mut self, mapping: usize, result: &foliant::Result<()>) {
        if result.is_ok() {
            self.mappings[mapping].state = MappingState::Shut;
            self.mappings[mapping].unseen = Owed::No;
            self.forget_handles(mapping);
            self.ops.iter_mut().filter(|op| op.mapping == mapping).for_each(|op| op.lived.closed = true);
        } else if self.mappings[mapping].state == MappingState::Closing {
            // Where the flush at its end failed, it is closed; before that it isn't.
            let may_be_closed =
                matches!(result, Err(Error::NamespaceFailed { .. } | Error::ShardFailed { .. }));
            self.mappings[mapping].state =
                if may_be_closed { MappingState::Limbo } else { MappingState::Open };
        }
    }

    // ---- syncs --------------------------------------------------------------------------------------------

    /// Each failed writeback is told once to each handle (WB-23).
    fn judge_telling(
        &mut self,
        what: &str,
        (handle, closes): (HandleId, Option<Owed>),
        mapping: usize,
        result: &foliant::Result<()>,
    ) {
        // A close tells what was owed to it when it began. What fails later, it writes until that succeeds.
        let owed = closes.unwrap_or(self.handle_states[handle].owed);
        match result {
            Ok(()) => {
                if owed == Owed::Yes {
                    violated(
                        Rule::Wb23Told,
                        format!("{what} succeeded, and its handle wasn't told of a failed writeback"),
                    );
                }
                if self.life.latched {
                    violated(Rule::Wb30, format!("{what} succeeded after a failed flush"));
                }
                self.handle_states[handle].owed = Owed::No;
            }
            Err(error) if telling::tells_of_writeback(error) => {
                let now = self.now();
                let state = &mut self.handle_states[handle];
                (state.owed, state.told) = (Owed::No, now);
                let modelled = &mut self.mappings[mapping];
                if closes.is_some() {
                    // Of what failed while it was closing the mapping it tells for itself: others hear of it all the same.
                    // So they may of one that has come to be known by then, though the rest of its page ends later.
                    (modelled.unseen, modelled.told) = (modelled.unseen.min(Owed::Perhaps), now);
                } else {
                    (modelled.unseen, modelled.told) = (Owed::No, now);
                }
            }
            // Whether the engine counts it as told when everything fails anyway is not said anywhere.
            Err(Error::NamespaceFailed { .. } | Error::ShardFailed { .. } | Error::Closed) => {
                let state = &mut self.handle_states[handle];
                state.owed = state.owed.min(Owed::Perhaps);
                let unseen = &mut self.mappings[mapping].unseen;
                *unseen = (*unseen).min(Owed::Perhaps);
            }
            Err(_) => {}
        }
        if self.mappings[mapping].had_event {
            self.met(Rule::Wb23Told);
        }
    }

    /// A sync has succeeded: what was changed before it began is on the device, and behind a flush.
    fn judge_success(&mut self, what: &str, synced: Synced) {
        let Synced { began, mapping, pages, since } = synced;
        let (mut waited, mut failed, mut flushed) = (false, false, false);
        for (page, since) in pages.zip(&since) {
            let modelled = &self.mappings[mapping].pages[page];
            if !modelled.is_busy() && modelled.touched < began {
                if modelled.changed > 0 && modelled.oldest_write() < modelled.changed {
                    let rule =
                        if modelled.write_failed > 0 { Rule::Wb23Undurable } else { Rule::Wb29Written };
                    violated(
                        rule,
                        format!(
                            "{what} succeeded, but page {page} was changed at {} and its last write began at {} (failed: {})",
                            modelled.changed,
                            modelled.oldest_write(),
                            modelled.write_failed
                        ),
                    );
                }
                waited |= modelled.changed > 0;
                failed |= modelled.changed > 0 && modelled.write_failed > 0;
                let cached = modelled.cached_at();
                if self.setup.write_cache == WriteCache::Volatile && cached > 0 {
                    if cached > self.life.flushed {
                        violated(
                            Rule::Wb29Flush,
                            format!(
                                "{what} succeeded, but a write of page {page} completed at {cached} and the last flush began at {}",
                                self.life.flushed
                            ),
                        );
                    }
                    flushed = true;
                }
            }
            // After a power cut nothing more can be promised.
            let modelled = &mut self.mappings[mapping].pages[page];
            if !self.life.is_power_off && !modelled.was_discarding(began) {
                modelled.promise(since);
            }
        }
        for (rule, met) in
            [(Rule::Wb29Written, waited), (Rule::Wb23Undurable, failed), (Rule::Wb29Flush, flushed)]
        {
            if met {
                self.met(rule);
            }
        }
    }

    fn judge_quiet(&mut self, what: &str, quiet: &Quiet, waited: bool, result: &foliant::Result<()>) {
        if self.bed.engine().stats().passes_background != quiet.background_passes
            || self.life.is_power_off
            || self.setup.splits_pages(quiet.mapping) && self.life.struck.has(Fault::WriteTransient)
            || !matches!(result, Ok(()) | Err(Error::Device { .. }))
        {
            return;
        }
        let mut tried = vec![false; self.setup.pages(quiet.mapping)];
        for (at, &(qid, extent)) in quiet.writes.iter().enumerate() {
            let earlier = quiet.writes[..at].iter().rfind(|(other, _)| *other == qid);
            if let Some((_, before)) = earlier
                && before.end() > extent.start
            {
                violated(Rule::Wb01, format!("{what}: {extent:?} was written after {before:?}"));
            }
            for (_, page) in self.pages_at(extent) {
                tried[page] = true;
                if quiet.clean[page] {
                    violated(Rule::Wb03, format!("{what} wrote page {page}, which was clean when it began"));
                }
            }
        }
        if quiet.writes.len() > 1 {
            self.met_by_writes(Rule::Wb01);
        }
        if !quiet.alone {
            let dirtied_since = self.mappings[quiet.mapping].pages.iter().zip(&quiet.clean);
            if dirtied_since.clone().any(|(page, &clean)| clean && page.touched > quiet.began) {
                self.met_by_writes(Rule::Wb03);
            }
        }
        // Who gives up waiting for a holder has come no further in that shard, whichever shard's error is told.
        let shard_of = |page| self.setup.shard_of(quiet.mapping, page);
        let is_behind_held =
            |page| waited && quiet.held.iter().any(|&held| held <= page && shard_of(held) == shard_of(page));
        // A shard that has lost a command ends, and writes nothing any more; another shard's error may be the one that is told.
        // Where nobody waits for what is tried again, a sync ends when its last command is out, which the device may not have yet.
        let put_off = self.setup.retry == RetryPolicy::Soft && self.life.struck.has(Fault::WriteTransient);
        let may_have_ended = (self.life.doomed || put_off) && result.is_err();
        for &page in &quiet.dirty {
            if !tried[page]
                && !is_behind_held(page)
                && !may_have_ended
                && self.mappings[quiet.mapping].pages[page].touched < quiet.began
            {
                violated(
                    Rule::Wb05,
                    format!("{what} ended with {result:?}, and dirty page {page} wasn't written"),
                );
            }
        }
        if !quiet.dirty.is_empty() {
            self.met_by_writes(Rule::Wb05);
        }
        self.check_runs(what, quiet);
    }

    /// Neighbours in one sync share a command, up to the device's limits (WB-11).
    fn check_runs(&mut self, what: &str, quiet: &Quiet) {
        if !quiet.alone || self.setup.splits_pages(quiet.mapping) {
            return;
        }
        let limit = u64::from(self.bed.engine().identity().max_transfer_bytes);
        let boundary = u64::from(self.setup.noiob_blocks) * u64::from(self.setup.block_bytes);
        // Two mappings begin their stripes anew, and no command crosses one.
        let stripe = |byte: u64| byte / (512 * FRAME);
        // Those go out each by itself.
        let is_poisoned = |(_, page): (usize, usize)| quiet.poisoned[page];
        let mut met = false;
        for pair in quiet.writes.windows(2) {
            let [(qid, first), (other, second)] = pair else { continue };
            met = true;
            let at_boundary = boundary > 0 && second.start.is_multiple_of(boundary);
            if qid == other
                && first.end() == second.start
                && stripe(first.start) == stripe(second.start)
                && !at_boundary
                && first.len < limit
                && !self.pages_at(*first).into_iter().chain(self.pages_at(*second)).any(is_poisoned)
            {
                violated(Rule::Wb11, format!("{what}: {first:?} and {second:?} are two commands"));
            }
        }
        if met {
            self.met_by_writes(Rule::Wb11);
        }
    }

    fn check_flushes(&mut self) {
        // Each shard's expiry round ends with one, too, and there is at most a round an interval.
        let intervals = (self.bed.now_ns() - self.life.began_ns) / FLUSH_INTERVAL.as_nanos() as u64;
        let rounds = intervals * self.setup.shards as u64;
        if self.life.flushes > self.life.syncs + rounds {
            let (flushes, syncs) = (self.life.flushes, self.life.syncs);
            violated(Rule::Wb21, format!("{flushes} flushes for {syncs} syncs and {rounds} expiry rounds"));
        }
        self.met(Rule::Wb21);
    }

    // ---- what the device is asked -------------------------------------------------------------------------

    pub(crate) fn check_write_started(&mut self, extent: Extent) {
        let mut any_held = false;
        let pages = self.pages_at(extent);
        self.check_gate(extent);
        if let (Some(&(mapping, first)), Some(&(_, last))) = (pages.first(), pages.last())
            && self.mappings[mapping].is_atomic
        {
            let start = self.setup.device_offset_of(mapping, first);
            let end = self.setup.device_offset_of(mapping, last) + self.setup.page_bytes(mapping, last);
            if (extent.start, extent.end()) != (start, end) {
                violated(Rule::Wb44, format!("{extent:?} is written, a part of atomic pages {pages:?}"));
            }
        }
        if pages.iter().any(|&(mapping, page)| self.mappings[mapping].pages[page].poisoned == Poisoned::Yes) {
            if pages.len() > 1 {
                violated(
                    Rule::Wb23Apart,
                    format!("{pages:?}, some of them poisoned, are written by one command"),
                );
            }
            self.met(Rule::Wb23Apart);
        }
        for (mapping, page) in self.pages_at(extent) {
            let modelled = &self.mappings[mapping].pages[page];
            if let Some(holder) = modelled.held {
                violated(
                    Rule::Wb06,
                    format!("page {page} is written while operation {holder} holds it exclusively"),
                );
            }
            if modelled.discarded {
                violated(
                    Rule::Wb26,
                    format!("page {page} is written, though it was discarded and not changed since"),
                );
            }
            any_held |= self.mappings[mapping].pages.iter().any(|page| page.held.is_some());
        }
        if any_held {
            self.met_by_writes(Rule::Wb06);
        }
    }

    pub(crate) fn check_zeroes_started(&mut self, extent: Extent) {
        self.check_gate(extent);
        for (mapping, page) in self.pages_at(extent) {
            if self.is_in_flight(mapping, page, NvmOpcode::WRITE) {
                violated(Rule::Wb26, format!("page {page} is zeroed while a write of it is with the device"));
            }
        }
        self.met(Rule::Wb26);
    }

    // ---- at rest ------------------------------------------------------------------------------------------

    pub(crate) fn check_at_rest(&mut self) {
        if self.life.is_power_off {
            return;
        }
        self.bed.assert_consistent();
        self.check_dirty_memory();
        self.check_passed();
        self.met(Rule::Wb04);
        let (rung, taken) =
            (self.bed.engine().stats().doorbells, self.bed.device.stats().sq_batches - self.life.sq_batches);
        // What a failed shard has rung for, nobody takes.
        if rung < taken || rung > taken && !self.life.doomed {
            violated(
                Rule::Wb18,
                format!("the device took {taken} batches, and {rung} steps ended with a doorbell"),
            );
        }
        self.met(Rule::Wb18);
    }

    /// Dirty memory stays below its limit, but for what was held exclusively before it came near.
    fn check_dirty_memory(&mut self) {
        let largest = 1 << self.setup.orders.into_iter().max().unwrap_or(0);
        let mut is_near = false;
        for memory in self.bed.dirty_memory() {
            let dirty = memory.dirty_pages + memory.writeback_pages;
            if dirty > memory.limit_pages + PINS_MAX as u64 * largest {
                violated(Rule::Wb24, format!("dirty memory is above its limit: {memory:?}"));
            }
            is_near |= dirty > memory.freerun_pages;
        }
        if is_near {
            self.met(Rule::Wb24);
        }
    }

    // ---- what survives ------------------------------------------------------------------------------------

    /// The power was cut: the medium holds what was promised, or something newer.
    pub(crate) fn check_what_is_left(&mut self) {
        let (mut promised, mut open, mut atomic) = (false, false, false);
        for mapping in 0..self.setup.mappings {
            let is_atomic = self.mappings[mapping].is_atomic;
            let unit_bytes =
                if is_atomic { self.setup.page_len(mapping) } else { self.setup.unit_bytes(mapping) };
            let unit_bytes = unit_bytes as usize;
            for page in 0..self.setup.pages(mapping) {
                let image = self.image(mapping, page);
                let modelled = &self.mappings[mapping].pages[page];
                if !modelled.may_be_left(&image, unit_bytes) {
                    // Is it a mix of what each block may hold, or something else?
                    let block = self.setup.block_bytes as usize;
                    let rule = if modelled.may_be_left(&image, block) {
                        Rule::Wb25OldOrNew
                    } else {
                        Rule::Wb29Durable
                    };
                    let rule = if modelled.may_be_left(&image, self.setup.unit_bytes(mapping) as usize) {
                        Rule::Wb44
                    } else {
                        rule
                    };
                    let count = modelled.medium_versions();
                    violated(
                        rule,
                        format!(
                            "page {page} of mapping {mapping} holds none of its {count} possible contents"
                        ),
                    );
                }
                let settled =
                    self.setup.write_cache == WriteCache::None || modelled.cached_at() < self.life.flushed;
                promised |= modelled.written.iter().any(|&began| began > 0) && settled;
                open |= modelled.medium_versions() > 1;
                atomic |= is_atomic && modelled.medium_versions() > 1;
            }
        }
        for (rule, met) in [(Rule::Wb29Durable, promised), (Rule::Wb25OldOrNew, open), (Rule::Wb44, atomic)] {
            if met {
                self.met(rule);
            }
        }
    }

    /// The process died: each unit on the device is something that it once was.
    pub(crate) fn check_killed(&mut self, mapping: usize, page: usize, image: &[u8]) {
        if !self.mappings[mapping].pages[page].may_be_left(image, self.setup.unit_bytes(mapping) as usize) {
            violated(
                Rule::Wb29Durable,
                format!("after a crash page {page} of mapping {mapping} holds what it never was"),
            );
        }
    }
}
