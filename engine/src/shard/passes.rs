//! Passes that somebody asked for, and whose turn it is (WB-14, WB-20): those of syncs, those of callers, those of who
//! owns the shard.

use std::cmp::Reverse;
use std::ops::{Range, RangeInclusive};

use super::Shard;
use super::open::OpenMapping;
use crate::cache::MAPPINGS_MAX;
use crate::cache::folio::FrameId;
use crate::cache::lsn::Lsn;
use crate::cache::tags::Tag;
use crate::error::{Error, Result};
use crate::mapping::Mapping;
use crate::reply::{Grants, SlotId};
use crate::stats::bump;
use crate::writeback::callback::Callback;
use crate::writeback::control::{PassEnd, Reason, SyncMode, WritebackControl, WritebackRange};
use crate::writeback::events;
use crate::writeback::gated::LsnFilter;
use crate::writeback::guard;
use crate::writeback::issue::Issued;
use crate::writeback::pass::{Pass, PassState, WritebackPass};
use crate::writeback::ranges::PassRanges;
use crate::writeback::sync::{PassId, Stage, SyncJob};

/// Pages that one pass writes before it gives the core back (WB-07).
pub(super) const STEP_PAGES: u64 = 256;

/// The parts of a shard that a pass works with: borrowed one by one, so that the pass's own state can stay borrowed.
macro_rules! issuer {
    ($shard:expr) => {
        $crate::writeback::issue::Issuer {
            // A quarter of the queue is left to reads, so that a flush cannot fill it, and what will be tried again has
            // its places.
            reserve: ($shard.queue.in_flight() + $shard.queue.free_commands()) / 4
                + $shard.retries.len() as u32,
            cache: &$shard.cache,
            queue: &mut $shard.queue,
            runs: &mut $shard.runs,
            watch: &mut $shard.watch,
            link: &$shard.link,
            now_ns: $shard.now_ns,
            mirror: $shard.mirror.as_deref_mut(),
        }
    };
}
pub(super) use issuer;

/// For whom a pass issues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PassOwner {
    /// The syncs whose stage names it.
    Syncs,
    /// A request for this very pass.
    Request(SlotId),
}

/// A pass that is issuing, or waits for its turn.
#[derive(Debug)]
pub(super) struct ShardPass {
    pub id: PassId,
    mapping: u16,
    owner: PassOwner,
    pub state: PassState,
    callback: Option<Callback>,
    /// When it last had its turn, counted in turns of the shard.
    turn: u64,
    /// Since when it has made no progress.
    idle_since_ns: u64,
}

impl ShardPass {
    /// Ends it if it is this mapping's, which is closed.
    pub(super) fn end_if_of(&mut self, mapping: u16) {
        if self.mapping == mapping {
            self.state.error.get_or_insert(Error::Closed);
            self.state.end(PassEnd::Failed);
        }
    }
}

/// What a request asks of a pass.
#[derive(Clone, Debug)]
pub(crate) struct PassOrder {
    pub control: WritebackControl,
    /// Pages of the file.
    pub pages: Range<u64>,
    pub callback: Option<Callback>,
}

/// Some mappings, by slot.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MappingSet([u64; MAPPINGS_MAX / 64]);

impl MappingSet {
    pub(super) fn insert(&mut self, mapping: u16) {
        self.0[usize::from(mapping) / 64] |= 1 << (mapping % 64);
    }

    pub(super) fn contains(&self, mapping: u16) -> bool {
        self.0[usize::from(mapping) / 64] >> (mapping % 64) & 1 != 0
    }
}

impl Shard {
    fn push_pass(
        &mut self,
        mapping: u16,
        owner: PassOwner,
        state: PassState,
        callback: Option<Callback>,
    ) -> PassId {
        let id = PassId(self.pass_count);
        self.pass_count += 1;
        let (turn, idle_since_ns) = (self.turns, self.now_ns);
        self.passes.push(ShardPass { id, mapping, owner, state, callback, turn, idle_since_ns });
        id
    }

    /// All syncs of a mapping that wait become one pass over the union of their ranges (WB-14).
    pub(super) fn merge_waiting_syncs(&mut self) {
        while let Some(first) = self.syncs.iter().find(|job| job.stage == Stage::Waiting) {
            let number = first.mapping;
            let mut ranges = PassRanges::default();
            let (mut merged, mut cap) = (0, Lsn::NONE);
            let id = PassId(self.pass_count);
            for job in
                self.syncs.iter_mut().filter(|job| job.stage == Stage::Waiting && job.mapping == number)
            {
                if let Some(mapping) = &self.mappings[number as usize] {
                    PassState::tag(&self.cache, &mapping.shape, job.range.clone());
                }
                ranges.add(job.range.clone());
                cap = cap.max(job.cap);
                job.stage = Stage::Issuing(id);
                merged += 1;
            }
            bump(&self.link.counters.syncs_merged, merged - 1);
            self.push_sync_pass(number, ranges, cap);
        }
    }

    /// Begins the pass that a request asks for.
    pub(super) fn begin_requested_pass(&mut self, slot: SlotId, number: u16, order: PassOrder) {
        let mapping = match self.mapping(number) {
            Ok(mapping) => mapping,
            Err(error) => return self.answer(slot, Err(error)),
        };
        let mut state = self.pass_state(&mapping, &order.control, order.pages);
        self.keep_away(&mapping, &mut state);
        self.push_pass(number, PassOwner::Request(slot), state, order.callback);
    }

    /// Begins the pass of a checkpoint: over what the log before `lsn` is needed for.
    pub(super) fn begin_flush_until(&mut self, slot: SlotId, number: u16, lsn: Lsn) {
        let mapping = match self.mapping(number) {
            Ok(mapping) => mapping,
            Err(error) => return self.answer(slot, Err(error)),
        };
        let local = mapping.shape.striping.local_range(self.cache.shard, 0..mapping.shape.pages());
        let cap = self.cache.shared.lsns.highest(number);
        // What is dirtied from now on isn't older, whatever `lsn` is: this ends though others go on.
        let before = lsn.min(Lsn(cap.0.saturating_add(1)));
        let filter = LsnFilter::through(mapping.gates.gate.as_ref(), cap).before(before);
        let state = PassState::selecting(Reason::Sync, PassRanges::of(local), filter);
        self.push_pass(number, PassOwner::Request(slot), state, None);
    }

    /// A pass as `control` wants it, over pages of the file; tags where it follows TOWRITE.
    fn pass_state(&self, mapping: &OpenMapping, control: &WritebackControl, pages: Range<u64>) -> PassState {
        let local = mapping.shape.striping.local_range(self.cache.shard, pages);
        let ranges = PassRanges::of(local.clone());
        if control.sync_mode == SyncMode::All {
            PassState::tag(&self.cache, &mapping.shape, local);
            let cap = self.cache.shared.lsns.highest(mapping.shape.slot);
            let filter = LsnFilter::through(mapping.gates.gate.as_ref(), cap);
            return PassState::integrity(control.reason, ranges).filtered(filter);
        }
        let mut state = PassState::background(control.reason, ranges);
        if control.tag_first {
            PassState::tag(&self.cache, &mapping.shape, local);
            state = state.tagged();
        }
        if control.range == WritebackRange::Cyclic {
            state = state.cyclic(mapping.in_shard(self.cache.shard).index());
        }
        state.with_budget(control.pages_max.unwrap_or(u64::MAX))
    }

    /// A background pass ends before it begins where an integrity pass has the mapping (WB-14), or the device has enough
    /// to write (WB-19).
    fn keep_away(&mut self, mapping: &OpenMapping, state: &mut PassState) {
        if state.mode == SyncMode::All {
            return;
        }
        if self.is_taken(mapping) {
            state.end(PassEnd::Taken);
        } else if self.is_congested() {
            self.note_congestion(mapping.shape.slot);
            state.end(PassEnd::Congested);
        }
    }

    /// Mappings of which an integrity pass issues, or is about to; not one that waits for a log, which may take long.
    fn mappings_with_integrity(&self) -> MappingSet {
        let mut set = MappingSet::default();
        let issues = |state: &PassState| state.mode == SyncMode::All && !state.lsns.is_waiting();
        let passes = self.passes.iter().filter(|pass| issues(&pass.state));
        passes.for_each(|pass| set.insert(pass.mapping));
        self.syncs.iter().filter(|job| job.stage == Stage::Waiting).for_each(|job| set.insert(job.mapping));
        set
    }

    /// Whether background passes keep away from a mapping, since an integrity pass has it (WB-14).
    pub(super) fn is_taken(&self, mapping: &OpenMapping) -> bool {
        mapping.in_shard(self.cache.shard).is_owned(self.now_ns)
            || self.mappings_with_integrity().contains(mapping.shape.slot)
    }

    /// Gives every pass of these priorities a turn: the more urgent first, of equal ones who has waited longest, and of
    /// the passes of a mapping one.
    pub(super) fn step_passes(&mut self, priorities: RangeInclusive<u8>) -> bool {
        let concerned = |pass: &ShardPass| priorities.contains(&pass.state.reason.priority());
        if !self.passes.iter().any(concerned) {
            return false;
        }
        let integrity = self.mappings_with_integrity();
        let mut passes = std::mem::take(&mut self.passes);
        passes.sort_unstable_by_key(|pass| (Reverse(pass.state.reason.priority()), pass.turn, pass.id.0));
        for pass in passes.iter_mut().filter(|pass| pass.state.mode == SyncMode::None) {
            let open = self.mappings[usize::from(pass.mapping)].as_ref();
            let owned = open.is_some_and(|open| open.in_shard(self.cache.shard).is_owned(self.now_ns));
            if owned || integrity.contains(pass.mapping) {
                pass.state.end(PassEnd::Taken);
            }
        }
        let is_congested = self.is_congested();
        let mut served = MappingSet::default();
        let mut progressed = false;
        for pass in passes.iter_mut().filter(|pass| concerned(pass)) {
            if pass.state.has_ended() || served.contains(pass.mapping) {
                continue;
            }
            // Once begun, it waits for the device instead of running ahead of it.
            if pass.state.mode == SyncMode::None && is_congested {
                continue;
            }
            let before = (pass.state.commands, pass.state.cursor());
            let issued = self.step_pass(pass);
            if pass.state.lsns.is_waiting() {
                pass.idle_since_ns = self.now_ns;
            }
            if before != (pass.state.commands, pass.state.cursor()) {
                progressed = true;
                pass.idle_since_ns = self.now_ns;
                self.turns += 1;
                pass.turn = self.turns;
                served.insert(pass.mapping);
            }
            if issued == Issued::NoRoom && self.waits_for_mirror() {
                // Those without a mirror needn't wait for it.
                continue;
            }
            if issued == Issued::NoRoom {
                // Syncs have their turn before reads: a full queue can't keep them out (see `submit_reads`).
                self.reads_yield |= pass.state.mode == SyncMode::All;
                break;
            }
        }
        passes.retain_mut(|pass| {
            if pass.state.has_ended() {
                progressed = true;
                self.end_pass(pass);
            }
            !pass.state.has_ended()
        });
        debug_assert!(self.passes.is_empty(), "requests are taken in another part of the step");
        self.passes = passes;
        progressed
    }

    fn step_pass(&mut self, pass: &mut ShardPass) -> Issued {
        let mapping = match self.mapping(pass.mapping) {
            Ok(mapping) => mapping,
            Err(error) => {
                pass.state.error.get_or_insert(error);
                pass.state.end(PassEnd::Failed);
                return Issued::End;
            }
        };
        loop {
            let step = WritebackPass::new(issuer!(self), &mapping, &mut pass.state, STEP_PAGES);
            let issued = step.drive(pass.callback.as_ref());
            let Some(frame) = pass.state.blocked else { return issued };
            self.detach_syncs_behind(pass);
            // News? Then the holder may have let go before it was asked to kick: once more.
            if !self.watch_folio(frame) {
                return issued;
            }
        }
    }

    /// The pass waits for a holder at its cursor: syncs that begin beyond that page need not.
    fn detach_syncs_behind(&mut self, pass: &mut ShardPass) {
        if pass.owner != PassOwner::Syncs {
            return;
        }
        let blocked = pass.state.cursor();
        let mut kept = PassRanges::default();
        for job in self.syncs.iter_mut().filter(|job| job.stage == Stage::Issuing(pass.id)) {
            if job.range.start > blocked {
                job.stage = Stage::Waiting;
            } else {
                kept.add(job.range.clone());
            }
        }
        pass.state.narrow(kept);
    }

    /// A pass has nothing left to issue.
    fn end_pass(&mut self, pass: &mut ShardPass) {
        if let Some(mapping) = &self.mappings[pass.mapping as usize] {
            mapping.in_shard(self.cache.shard).save_index(&pass.state);
        }
        let PassOwner::Request(slot) = pass.owner else { return };
        let result = pass.state.result();
        if let Ok(outcome) = &result
            && outcome.ended == PassEnd::Taken
        {
            bump(&self.link.counters.passes_taken, 1);
        }
        match pass.state.mode {
            SyncMode::None => {
                if let Some(mapping) = self.mappings[pass.mapping as usize].clone() {
                    self.publish_left_out(&mapping, pass.state.lsns.take_left_out());
                }
                self.answer(slot, result.map(Grants::of_pass));
            }
            SyncMode::All => {
                let range = pass.state.ranges().span();
                self.syncs.push(SyncJob::issued(slot, pass.mapping, range, result));
            }
        }
    }

    /// Brings the stage of every sync up to where its pass is (WB-16).
    pub(super) fn update_syncs(&mut self) {
        for job in &mut self.syncs {
            let Stage::Issuing(id) = job.stage else { continue };
            let pass = self.passes.iter().find(|pass| pass.id == id);
            let shape = self.mappings[usize::from(job.mapping)].as_ref().map(|open| &open.shape);
            let passed = |pass: &ShardPass, shape| pass.state.has_passed(&self.cache, shape, &job.range);
            if pass.zip(shape).is_none_or(|(pass, shape)| passed(pass, shape)) {
                job.stage = Stage::Issued;
            }
        }
    }

    /// Syncs that merged, and whose pass has come to pages that wait for their log, go on apart, one pass a range: nobody
    /// waits for the log of pages that he hasn't asked for (WB-40).
    pub(super) fn part_gated_syncs(&mut self) {
        let mut at = 0;
        while let Some(pass) = self.passes.get(at) {
            let id = pass.id;
            let mut ranges = self.syncs.iter().filter(|job| job.stage == Stage::Issuing(id));
            let first = ranges.next().map(|job| &job.range);
            if !pass.state.lsns.is_strict() || ranges.all(|job| Some(&job.range) == first) {
                at += 1;
                continue;
            }
            let pass = self.passes.swap_remove(at);
            while let Some(job) = self.syncs.iter().find(|job| job.stage == Stage::Issuing(id)) {
                let range = job.range.clone();
                let (parted, mut cap) = (PassId(self.pass_count), Lsn::NONE);
                let same = |job: &&mut SyncJob| job.stage == Stage::Issuing(id) && job.range == range;
                for job in self.syncs.iter_mut().filter(same) {
                    job.stage = Stage::Issuing(parted);
                    cap = cap.max(job.cap);
                }
                self.push_sync_pass(pass.mapping, PassRanges::of(range), cap);
            }
            // Writers that the pass kept from a page may have it.
            if let Some(frame) = pass.state.blocked {
                self.serve(frame);
            }
        }
    }

    fn push_sync_pass(&mut self, mapping: u16, ranges: PassRanges, cap: Lsn) {
        let gate = self.mappings[usize::from(mapping)].as_ref().and_then(|open| open.gates.gate.as_ref());
        let pass = PassState::integrity(Reason::Sync, ranges).filtered(LsnFilter::through(gate, cap));
        self.push_pass(mapping, PassOwner::Syncs, pass, None);
    }

    /// A write of a mapping failed for good: every pass whose ranges have the page knows it (WB-05).
    pub(super) fn note_write_failure(&mut self, mapping: u16, local: u64, error: &Error) {
        self.syncs.iter_mut().for_each(|job| job.note_failure(mapping, local, error));
        let requested = self.passes.iter_mut().filter(|pass| pass.mapping == mapping);
        requested.for_each(|pass| pass.state.note_failure(local, error));
        self.note_flusher_failure(mapping, local, error);
    }

    /// Whether an integrity pass waits for the holder of this frame's folio.
    pub(super) fn sync_waits_for(&self, frame: FrameId) -> bool {
        let cache = &self.cache.shared;
        let head = cache.place(frame).head;
        let waits = |waiting| cache.place(waiting).head == head && cache.is_marked(waiting, Tag::Dirty);
        self.passes.iter().filter_map(|pass| pass.state.blocked).any(waits)
            || self.owners_wait.iter().any(|&(waiting, _)| waits(waiting))
    }

    /// Passes that are blocked on a holder for too long: whoever needs that page fails with it, the others go on.
    pub(super) fn check_pass_deadlines(&mut self, waited: std::time::Duration) {
        let limit = self.limits.pin_wait_ns;
        let mut at = 0;
        while let Some(pass) = self.passes.get(at) {
            if let Some(error) = self.gate_deadline(&pass.state) {
                let pass = self.passes.swap_remove(at);
                self.fail_gated(&pass, error);
                continue;
            }
            let expired = pass.state.blocked.filter(|&frame| {
                let head = self.cache.shared.head(frame);
                head.state().exclusive() && self.now_ns.saturating_sub(pass.idle_since_ns) > limit
            });
            let Some(frame) = expired else {
                at += 1;
                continue;
            };
            let page = self.cache.shared.folio(frame).key().page();
            let error = Error::PinnedTooLong { page, waited };
            let pass = self.passes.swap_remove(at);
            match pass.owner {
                PassOwner::Request(slot) => self.answer(slot, Err(error)),
                PassOwner::Syncs => self.fail_syncs_at(&pass, &error),
            }
            // Nobody waits for that holder any more: writers that stood back may have it.
            self.serve(frame);
        }
        // Owners' passes have no deadline of their own here; what they wait for is only remembered as long.
        let mut at = 0;
        while let Some(&(frame, until_ns)) = self.owners_wait.get(at) {
            let is_dirty = self.cache.shared.is_marked(frame, Tag::Dirty);
            if is_dirty && self.now_ns < until_ns {
                at += 1;
                continue;
            }
            self.owners_wait.swap_remove(at);
            self.serve(frame);
        }
    }

    /// The syncs of a pass that need the page at its cursor fail; the others wait for a new pass.
    fn fail_syncs_at(&mut self, pass: &ShardPass, error: &Error) {
        let blocked = pass.state.cursor();
        let mut at = 0;
        while let Some(job) = self.syncs.get_mut(at) {
            if job.stage == Stage::Issuing(pass.id) {
                if job.range.contains(&blocked) {
                    let job = self.syncs.swap_remove(at);
                    events::sync_file_exit(
                        self.link.shard,
                        job.mapping,
                        job.slot.0,
                        Some(error),
                        self.now_ns,
                    );
                    self.answer(job.slot, Err(error.clone()));
                    continue;
                }
                let open = self.mappings[usize::from(job.mapping)].as_ref();
                let passed = |open: &std::sync::Arc<OpenMapping>| {
                    pass.state.has_passed(&self.cache, &open.shape, &job.range)
                };
                job.stage = if open.is_none_or(passed) { Stage::Issued } else { Stage::Waiting };
            }
            at += 1;
        }
    }

    /// A pass has waited for its gate for too long: its syncs, which are of one range, fail.
    fn fail_gated(&mut self, pass: &ShardPass, error: Error) {
        match pass.owner {
            PassOwner::Request(slot) => self.answer(slot, Err(error)),
            PassOwner::Syncs => {
                while let Some(at) = self.syncs.iter().position(|job| job.stage == Stage::Issuing(pass.id)) {
                    let job = self.syncs.swap_remove(at);
                    let (shard, now_ns) = (self.link.shard, self.now_ns);
                    events::sync_file_exit(shard, job.mapping, job.slot.0, Some(&error), now_ns);
                    self.answer(job.slot, Err(error.clone()));
                }
            }
        }
        // Writers that the pass kept from a page may have it.
        if let Some(frame) = pass.state.blocked {
            self.serve(frame);
        }
    }

    /// Why a request for a page is kept waiting: by a pass that waits for the page's log, if that is so.
    pub(super) fn gate_keeping(&self, frame: FrameId, waited: std::time::Duration) -> Option<Error> {
        let head = |frame| self.cache.shared.place(frame).head;
        let keeps = |pass: &&ShardPass| pass.state.blocked.is_some_and(|kept| head(kept) == head(frame));
        self.passes.iter().find(keeps)?.state.lsns.error(waited)
    }

    /// Begins a pass over the pages of `mapping` that this shard holds, for who polls the shard himself
    /// ([`ShardThreads::Manual`](crate::ShardThreads::Manual)). The pass goes on with [`resume`](Self::resume). A budget
    /// is this shard's own.
    ///
    /// A background pass ends at once, [`Taken`](PassEnd::Taken), where an integrity pass of the mapping is issuing, or
    /// [`Congested`](PassEnd::Congested), where the device has enough to write; and an integrity pass keeps background passes away until it ends, is dropped, or hasn't been resumed for the engine's
    /// `pin_wait`.
    ///
    /// # Errors
    /// [`Error::Closed`] for a mapping that is closed, or another engine's; [`Error::OutOfRange`] and
    /// [`Error::InvertedRange`]; [`Error::Option`] for a budget of 0 or a cyclic integrity pass;
    /// [`Error::ReclaimContext`] (WB-10); [`Error::InsidePass`] in a callback; [`Error::NamespaceFailed`];
    /// [`Error::ShardFailed`].
    pub fn begin_pass(&mut self, mapping: &Mapping, control: WritebackControl) -> Result<Pass> {
        let open = mapping.opened();
        if let Some(failure) = self.link.failure() {
            return Err(failure);
        }
        let known = self.mappings.get(usize::from(open.shape.slot)).and_then(Option::as_ref);
        if !known.is_some_and(|known| std::sync::Arc::ptr_eq(known, open)) {
            return Err(Error::Closed);
        }
        let pages = mapping.pages_of_pass(&control)?;
        guard::check(control.context, open.shape.slot, &self.link.counters)?;
        let mut state = self.pass_state(open, &control, pages);
        if state.mode == SyncMode::All {
            self.own(open, &state);
        }
        self.keep_away(open, &mut state);
        Ok(Pass { open: open.clone(), shard: self.number(), state })
    }

    /// The next step of a pass that this shard [began](Self::begin_pass). What it takes is with the device after the next
    /// [`poll`](Self::poll), which is also what a pass that pauses or waits needs. An integrity pass that has waited for a
    /// [gate](crate::Gate) for `gate_wait` ends, with [`Error::Gated`] as its [outcome](Pass::outcome).
    pub fn resume<'a>(&'a mut self, pass: &'a mut Pass) -> WritebackPass<'a> {
        let is_known = pass.shard == self.number()
            && self.mappings[usize::from(pass.open.shape.slot)]
                .as_ref()
                .is_some_and(|known| std::sync::Arc::ptr_eq(known, &pass.open));
        if let Some(failure) = self.link.failure() {
            pass.state.error.get_or_insert(failure);
            pass.state.end(PassEnd::Failed);
        } else if !is_known {
            // Closed since, or another shard's.
            pass.state.error.get_or_insert(Error::Closed);
            pass.state.end(PassEnd::Failed);
        } else if pass.state.mode == SyncMode::None && self.is_taken(&pass.open) {
            pass.state.end(PassEnd::Taken);
        } else if let Some(error) = self.gate_deadline(&pass.state) {
            pass.state.error.get_or_insert(error);
            pass.state.end(PassEnd::Failed);
        }
        if pass.state.mode == SyncMode::All && !pass.state.has_ended() {
            self.own(&pass.open, &pass.state);
        }
        if let Some(frame) = pass.state.blocked {
            // It has waited once: from now on this page's next turn is the pass's.
            let until_ns = self.now_ns.saturating_add(self.limits.pin_wait_ns);
            if !self.owners_wait.iter().any(|&(waiting, _)| waiting == frame) {
                self.owners_wait.push((frame, until_ns));
            }
            self.watch_folio(frame);
        }
        WritebackPass::new(issuer!(self), &pass.open, &mut pass.state, STEP_PAGES)
    }

    /// An owner's integrity pass keeps background passes away, unless it waits for a log, which may take long.
    fn own(&self, open: &OpenMapping, state: &PassState) {
        let until_ns = self.now_ns.saturating_add(self.limits.pin_wait_ns).max(1);
        open.in_shard(self.cache.shard).own_until(if state.lsns.is_waiting() { 0 } else { until_ns });
    }
}
