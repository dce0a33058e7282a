//! A pass over the dirty folios of one mapping in one shard (`writeback_iter`).
//!
//! [`PassState`] lasts over shard steps; [`WritebackPass`] is the iterator of one step. It hands folios out
//! **locked, in strictly ascending order, never twice, and never wraps** (WB-01). What its user says of a folio is
//! [`LockedFolio::write`] or dropping it, which is "not now" (WB-09): so no way out of a pass leaves a locked folio
//! behind (WB-08). The flusher, syncs, callers' passes and who owns the shards all use this one iterator.

use std::sync::Arc;

use super::ahead;
use super::commit::Durability;
use super::control::{PassEnd, Reason, SyncMode, WritebackOutcome};
use super::events::PassSpan;
use super::gated::LsnFilter;
use super::issue::{Issued, Issuer};
use super::ranges::PassRanges;
use crate::cache::SharedCache;
use crate::cache::eof::FileEnd;
use crate::cache::exclusion::{self, LEAF_PAGES, leaf_bits};
use crate::cache::folio::{FolioOrder, FrameId};
use crate::cache::frames::PAGE_BYTES;
use crate::cache::owned::ShardCache;
use crate::cache::shape::MappingShape;
use crate::cache::tags::{Find, LeafPages, Tag};
use crate::error::{Error, Operation, Result};
use crate::shard::open::OpenMapping;
use crate::shard::payload::{FolioRun, RunGroup};

/// Rounds that an integrity pass makes over folios that were put off, before it ends with try-again.
pub(crate) const TRIES_MAX: u8 = 4;

/// Pages that a step passes over at most, beside those of its last leaf.
const LOOK_PAGES: u64 = 512;

/// Where a pass stands.
#[derive(Debug)]
pub(crate) struct PassState {
    pub mode: SyncMode,
    pub reason: Reason,
    /// The mark that it follows.
    tag: Tag,
    /// Shard-local pages.
    ranges: PassRanges,
    /// Everything before this page has been looked at.
    cursor: u64,
    /// Pages that a background pass may still write.
    budget: u64,
    /// Pages that one of its commands may carry, beside the device's own limits: whole pages of the mapping.
    pub run_pages_max: u64,
    /// Whether it begins and ends at the mapping's writeback index.
    is_cyclic: bool,
    /// What waits for its writes, beside syncs of their ranges.
    pub group: RunGroup,
    /// Commands that it has submitted.
    pub commands: u64,
    written: u64,
    postponed: u64,
    /// The first page that was put off in this round over the ranges.
    postponed_page: Option<u64>,
    tries: u8,
    /// The first error of a write in its ranges, or of the pass itself.
    pub error: Option<Error>,
    /// The folio whose holder, or whose earlier write, an integrity pass waits for.
    pub blocked: Option<FrameId>,
    ended: Option<PassEnd>,
    /// Which of the marked pages it is after, by their log sequence numbers, and which it waits for.
    pub lsns: LsnFilter,
    /// What traces show of it.
    span: PassSpan,
}

impl PassState {
    fn new(mode: SyncMode, reason: Reason, tag: Tag, ranges: PassRanges) -> Self {
        Self {
            mode,
            reason,
            tag,
            cursor: ranges.span().start,
            ranges,
            budget: u64::MAX,
            run_pages_max: u64::MAX,
            is_cyclic: false,
            group: RunGroup::None,
            commands: 0,
            written: 0,
            postponed: 0,
            postponed_page: None,
            tries: 0,
            error: None,
            blocked: None,
            ended: None,
            lsns: LsnFilter::default(),
            span: PassSpan::new(reason),
        }
    }

    /// An integrity pass over `ranges`, whose dirty pages have been [tagged](Self::tag) (WB-03).
    pub(crate) fn integrity(reason: Reason, ranges: PassRanges) -> Self {
        Self::new(SyncMode::All, reason, Tag::ToWrite, ranges)
    }

    /// An integrity pass over what is dirty in `ranges` and `lsns` selects. It needs no tags to end, since it never looks at
    /// a page twice.
    pub(crate) fn selecting(reason: Reason, ranges: PassRanges, lsns: LsnFilter) -> Self {
        Self { lsns, ..Self::new(SyncMode::All, reason, Tag::Dirty, ranges) }
    }

    /// A background pass over `ranges`.
    pub(crate) fn background(reason: Reason, ranges: PassRanges) -> Self {
        Self::new(SyncMode::None, reason, Tag::Dirty, ranges)
    }

    /// A background pass that tries poisoned pages of `ranges` once more, and nothing else.
    pub(crate) fn of_poisoned(ranges: PassRanges) -> Self {
        Self::new(SyncMode::None, Reason::Poisoned, Tag::Poisoned, ranges)
    }

    /// The same through a filter.
    pub(crate) fn filtered(self, lsns: LsnFilter) -> Self {
        Self { lsns, ..self }
    }

    /// The same, for what carries TOWRITE only.
    pub(crate) fn tagged(mut self) -> Self {
        self.tag = Tag::ToWrite;
        self
    }

    /// The same with a budget in pages.
    pub(crate) fn with_budget(mut self, pages: u64) -> Self {
        self.budget = pages;
        self
    }

    /// The same from the mapping's writeback index on.
    pub(crate) fn cyclic(mut self, writeback_index: u64) -> Self {
        self.cursor = self.cursor.max(writeback_index);
        self.is_cyclic = true;
        self
    }

    /// Adds TOWRITE to what is dirty in a range now, so that a pass ends although others keep dirtying pages of it
    /// (`tag_pages_for_writeback`, WB-03).
    pub(crate) fn tag(cache: &ShardCache, shape: &MappingShape, range: std::ops::Range<u64>) {
        cache.tree.tag_for_writeback(shape.tree, range);
    }

    /// Whether everything of this range of shard-local pages has been looked at, nothing of it waits for its log, and what
    /// was taken is in the queue (WB-16): true between steps only.
    pub(crate) fn has_passed(
        &self,
        cache: &ShardCache,
        shape: &MappingShape,
        range: &std::ops::Range<u64>,
    ) -> bool {
        let is_behind = self.cursor >= range.end;
        // What was left out keeps its mark.
        let is_left = || cache.tree.next(shape.tree, Find::Tagged(self.tag), range.clone()).is_some();
        self.ended.is_some()
            || match self.lsns.is_strict() {
                false => is_behind && !(self.lsns.has_left_out() && is_left()),
                true => is_behind || !is_left(),
            }
    }

    pub(crate) fn cursor(&self) -> u64 {
        self.cursor
    }

    pub(crate) fn ranges(&self) -> &PassRanges {
        &self.ranges
    }

    /// Narrows the pass to `ranges`, which it covered before; what lies behind the cursor stays behind.
    pub(crate) fn narrow(&mut self, ranges: PassRanges) {
        self.ranges = ranges;
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// Ends the pass, unless it has ended.
    pub(crate) fn end(&mut self, end: PassEnd) {
        self.ended.get_or_insert(end);
    }

    /// A write of the mapping failed at this shard-local page; kept where it is the first in the pass's ranges (WB-05).
    pub(crate) fn note_failure(&mut self, local: u64, error: &Error) {
        if self.error.is_none() && self.ranges.contains(local) {
            self.error = Some(error.clone());
        }
    }

    /// Where the next cyclic pass over this mapping begins, if this one says (WB-02).
    pub(crate) fn writeback_index(&self) -> Option<u64> {
        self.is_cyclic.then_some(if self.ended == Some(PassEnd::Complete) { 0 } else { self.cursor })
    }

    pub(crate) fn outcome(&self) -> WritebackOutcome {
        WritebackOutcome {
            pages_written: self.written,
            pages_postponed: self.postponed,
            ended: self.ended.unwrap_or(PassEnd::Dropped),
        }
    }

    /// What the pass came to, with the first error where there was one.
    pub(crate) fn result(&self) -> Result<WritebackOutcome> {
        self.error.clone().map_or_else(|| Ok(self.outcome()), Err)
    }
}

/// A pass between the steps of its shard, for who polls the shard himself: [`Shard::begin_pass`](crate::Shard::begin_pass)
/// begins it, [`Shard::resume`](crate::Shard::resume) goes on with it.
///
/// Dropping it ends it, wherever it is: what was taken has been submitted, everything else is as dirty as before, a cyclic
/// pass has saved its index, and passes of others may have the mapping (WB-08).
#[derive(Debug)]
#[must_use = "a pass that is dropped ends"]
pub struct Pass {
    pub(crate) open: Arc<OpenMapping>,
    pub(crate) shard: usize,
    pub(crate) state: PassState,
}

impl Pass {
    /// What it has done so far; [`PassEnd::Dropped`] while it hasn't ended.
    ///
    /// # Errors
    /// The first error that stopped a background pass, or that an integrity pass went on past. Writes that are still
    /// with the device aren't known yet: [`Mapping::sync`](crate::Mapping::sync) waits for them.
    pub fn outcome(&self) -> Result<WritebackOutcome> {
        self.state.result()
    }

    /// Whether it has nothing left to do.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.state.has_ended()
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.open.in_shard(self.shard).end_of_owners_pass(&self.state);
    }
}

/// What the iterator says.
#[derive(Debug)]
pub enum PassStep<'p, 'a> {
    /// A dirty folio, locked: [write](LockedFolio::write) it, or drop it for "not now".
    Folio(LockedFolio<'p, 'a>),
    /// An integrity pass has come to a page that somebody holds exclusively, or that the device is still writing; what
    /// lies before it is submitted. Or it has come to its end but for pages behind a [gate](crate::Gate), of which this is
    /// the first. Poll the shard and resume: the page's holder, or its log, comes first.
    Wait {
        /// Page index within the mapping.
        page: u64,
    },
    /// The core has to be given back, or the queue is full: poll the shard, then resume (WB-07).
    Pause,
    /// Nothing is left; [`Pass::outcome`] tells what came of it.
    End,
}

/// What [`WritebackPass::advance`] found; the folio is locked.
enum Advance {
    Folio { slot: u32, pages: u32 },
    Wait { page: u64 },
    Pause,
    End,
}

/// The iterator of one step. Dropping it gives back what was locked and not handed out, and submits what was taken.
#[derive(Debug)]
pub struct WritebackPass<'a> {
    pub(super) issuer: Issuer<'a>,
    pub(super) shape: &'a MappingShape,
    pub(super) end: &'a FileEnd,
    durability: &'a Durability,
    state: &'a mut PassState,
    /// Pages that this step may still take before the core is given back.
    step_pages: u64,
    /// Pages that it may still pass over, where many wait for their log: looking is work, too (WB-07).
    look_pages: u64,
    /// The leaf that was looked up last. Its pages are what this pass has locked and not handed out yet: folios are
    /// found by tag and locked up to 64 at a time (WB-07).
    pub(super) locked: LeafPages,
    /// Bit *i*: the pages of slots *i* and *i* + 1 of that leaf belong to the same folio, or, when nobody looks at single
    /// folios, lie side by side.
    joined: u64,
    /// Wanted pages of that leaf that are folios of their own.
    singles: u64,
    /// Folios are handed out one by one.
    by_folio: bool,
    /// Pages of that leaf whose last write failed: each of the mapping's blocks among them goes out as a command of its
    /// own, so that one bad block doesn't fail its neighbours.
    poisoned: u64,
    /// The folio of that leaf that stops an integrity pass, once all before it are handed out, and its page.
    blocked: Option<(FrameId, u64)>,
    /// The file page of that leaf's first; a leaf lies within a stripe, so its pages are consecutive in the file, too.
    pub(super) first_page: u64,
    /// By slot in that leaf: the frames of the wanted pages.
    pub(super) frames: [FrameId; LEAF_PAGES as usize],
    /// Pages of one leaf that will be submitted and are still marked dirty.
    started: Started,
    /// Taken, and not in the queue yet: it may grow.
    run: Option<FolioRun>,
    /// How the step has ended, if it ended by itself.
    issued: Issued,
}

/// Pages that turn clean together, at the latest at the end of the step; WRITEBACK keeps threads from dirtying them anew.
#[derive(Debug, Default)]
struct Started {
    leaf: u32,
    pages: u64,
}

impl<'a> WritebackPass<'a> {
    pub(crate) fn new(
        issuer: Issuer<'a>,
        open: &'a OpenMapping,
        state: &'a mut PassState,
        step_pages: u64,
    ) -> Self {
        // One that waits for a page's log keeps that page from writers.
        if !state.lsns.is_waiting() {
            state.blocked = None;
        }
        // No pass over a gated mapping goes round its gate, whoever made it.
        state.lsns.ensure(open.gates.gate.as_ref());
        if !state.has_ended() {
            let rest = state.ranges.rest(state.cursor).unwrap_or(state.cursor..state.cursor);
            state.span.step_begins(&issuer, &open.shape, state.mode, &(rest.start..state.ranges.span().end));
        }
        Self {
            issuer,
            shape: &open.shape,
            end: &open.end,
            durability: &open.durability,
            state,
            step_pages,
            look_pages: LOOK_PAGES,
            locked: LeafPages { leaf: 0, base: 0, pages: 0 },
            joined: 0,
            singles: 0,
            by_folio: true,
            poisoned: 0,
            blocked: None,
            first_page: 0,
            frames: [FrameId(0); LEAF_PAGES as usize],
            started: Started::default(),
            run: None,
            issued: Issued::Pause,
        }
    }

    /// The next folio to write (`writeback_iter`).
    #[expect(
        clippy::should_implement_trait,
        reason = "a folio borrows its pass, which an Iterator can't say"
    )]
    pub fn next(&mut self) -> PassStep<'_, 'a> {
        match self.advance() {
            Advance::Folio { slot, pages } => {
                let folio = DirtyFolio {
                    cache: &self.issuer.cache.shared,
                    shape: self.shape,
                    frame: self.frames[slot as usize],
                    page: self.first_page + u64::from(slot),
                    pages: u64::from(pages),
                };
                PassStep::Folio(LockedFolio { folio, pass: self, is_taken: false })
            }
            Advance::Wait { page } => PassStep::Wait { page },
            Advance::Pause => PassStep::Pause,
            Advance::End => PassStep::End,
        }
    }

    /// Goes on to the next folio that can be had (`folio_prepare_writeback`, WB-06).
    fn advance(&mut self) -> Advance {
        loop {
            if self.state.mode == SyncMode::None {
                self.stop_in_time();
            }
            if self.state.has_ended() {
                self.release_locked();
                self.submit_run();
                self.issued = Issued::End;
                return Advance::End;
            }
            if let Some(local) = self.state.lsns.waits(self.issuer.link.shard) {
                self.submit_run();
                self.issued = Issued::Blocked;
                return Advance::Wait { page: self.shape.striping.page(self.issuer.cache.shard, local) };
            }
            if self.locked.pages == 0 {
                if let Some((frame, local)) = self.blocked.take() {
                    self.state.cursor = local;
                    self.state.blocked = Some(frame);
                    self.state.lsns.stopped_at(&self.issuer, frame, local);
                    // What it holds itself must not be what it waits for (WB-18).
                    self.submit_run();
                    self.issued = Issued::Blocked;
                    return Advance::Wait { page: self.shape.striping.page(self.issuer.cache.shard, local) };
                }
                if self.run.is_none() && !self.may_go_on() {
                    return Advance::Pause;
                }
                if self.look_pages == 0 {
                    self.submit_run();
                    self.issued = Issued::Pause;
                    return Advance::Pause;
                }
                match self.next_batch() {
                    Some((batch, end)) => self.lock(batch, end),
                    None if self.begins_second_round() => {
                        if !self.state.lsns.is_waiting() {
                            return Advance::Pause;
                        }
                    }
                    None if self.begins_anew() => {
                        self.submit_run();
                        return Advance::Pause;
                    }
                    None => self.complete(),
                }
                continue;
            }
            let slot = self.locked.pages.trailing_zeros();
            let part = self.part_from(slot);
            let mut fits = self.room_in_run(slot, part);
            if fits == 0 {
                self.submit_run();
                // A folio opens a run of its own only if there is a command for it.
                if !self.may_go_on() {
                    self.release_locked();
                    return Advance::Pause;
                }
                let most = self.shape.command_pages_max(self.first_page + u64::from(slot));
                fits = part.min(most).min(self.state.run_pages_max);
            }
            let pages = self.within_budget(fits) as u32;
            self.locked.pages &= !slots(slot, pages);
            // Whatever becomes of it, a pass doesn't look at a page twice (WB-01).
            self.state.cursor = self.locked.base + u64::from(slot + pages);
            return Advance::Folio { slot, pages };
        }
    }

    /// Background passes stop at a spent budget and at the first error; integrity goes on past both (WB-05).
    fn stop_in_time(&mut self) {
        if self.state.error.is_some() {
            self.state.end(PassEnd::Failed);
        } else if self.state.budget == 0 {
            self.state.end(PassEnd::Budget);
        }
    }

    /// Whether another command may be begun in this step.
    fn may_go_on(&mut self) -> bool {
        let has_room = self.issuer.has_room(self.shape);
        self.issued = if has_room { Issued::Pause } else { Issued::NoRoom };
        has_room && self.step_pages > 0
    }

    /// How many locked pages of one folio follow each other from `slot` on; of poisoned ones a block, and none beside
    /// others.
    fn part_from(&self, slot: u32) -> u64 {
        let locked = (self.locked.pages >> slot).trailing_ones();
        let joined = (self.joined >> slot).trailing_ones() + 1;
        let part = u64::from(locked.min(joined));
        let poisoned = self.poisoned >> slot;
        match poisoned & 1 {
            0 => part.min(u64::from(poisoned.trailing_zeros())),
            _ => part.min(self.shape.order.pages()),
        }
    }

    /// How many of the pages from `slot` of the current leaf on go out with the run that is being gathered.
    fn room_in_run(&self, slot: u32, pages: u64) -> u64 {
        if self.poisoned >> slot & 1 != 0 {
            return 0;
        }
        let page = self.first_page + u64::from(slot);
        self.run.as_ref().map_or(0, |run| {
            let left = self.state.run_pages_max.saturating_sub(run.pages());
            run.room_for(self.shape, page, pages.min(left))
        })
    }

    /// What of `pages` a background pass may still write: whole blocks of the mapping, which are never torn.
    fn within_budget(&self, pages: u64) -> u64 {
        match self.state.mode {
            SyncMode::None => pages.min(
                self.state.budget.div_ceil(self.shape.order.pages()).saturating_mul(self.shape.order.pages()),
            ),
            SyncMode::All => pages,
        }
    }

    /// The next marked pages, and where their part of the range ends.
    fn next_batch(&mut self) -> Option<(LeafPages, u64)> {
        let (cache, state) = (self.issuer.cache, &mut *self.state);
        let some_poisoned = cache.shared.marked[self.shape.slot as usize].poisoned() > 0;
        while let Some(rest) = state.ranges.rest(state.cursor) {
            let Some(mut batch) = cache.tree.next(self.shape.tree, Find::Tagged(state.tag), rest.clone())
            else {
                state.cursor = rest.end;
                continue;
            };
            self.poisoned =
                if some_poisoned { cache.shared.tags.marked(batch.leaf, Tag::Poisoned) } else { 0 };
            // They have retries of their own (WB-23).
            if state.mode == SyncMode::None && state.tag != Tag::Poisoned {
                batch.pages &= !self.poisoned;
            }
            let end = rest.end.min(batch.base + LEAF_PAGES);
            if batch.pages != 0 {
                return Some((batch, end));
            }
            state.cursor = end;
        }
        None
    }

    /// An integrity pass at its end goes back to what it left out, once the log of that is durable (WB-40).
    fn begins_second_round(&mut self) -> bool {
        let first = match self.state.mode {
            SyncMode::All => self.state.lsns.second_round(&self.issuer),
            SyncMode::None => None,
        };
        if let Some(first) = first {
            self.submit_run();
            // Each round ascends: to who looks at it, the second one is another pass (WB-01).
            self.span_ends_step(Issued::End);
            self.state.span = PassSpan::new(self.state.reason);
            self.state.cursor = first;
            self.issued = Issued::Pause;
        }
        first.is_some()
    }

    /// An integrity pass at its end asks again for what was put off, a bounded number of times (WB-09).
    fn begins_anew(&mut self) -> bool {
        let state = &mut *self.state;
        let Some(page) = state.postponed_page else { return false };
        if state.mode == SyncMode::None {
            return false;
        }
        state.tries += 1;
        if state.tries < TRIES_MAX {
            state.cursor = state.ranges.span().start;
            state.postponed_page = None;
            return true;
        }
        let again = Error::TryAgain { operation: Operation::Write, page, cause: None };
        state.error.get_or_insert(again);
        false
    }

    /// The end of the ranges is reached.
    fn complete(&mut self) {
        if let Some(run) = &mut self.run {
            run.fua = self.issuer.fua_of_last(self.state, self.shape, self.durability);
        }
        self.state.end(PassEnd::Complete);
    }

    /// Locks the marked pages of a leaf, those that can be had; an integrity pass stops before the first that can't.
    fn lock(&mut self, batch: LeafPages, end: u64) {
        self.find_frames(batch);
        let (cache, frames) = (&self.issuer.cache.shared, &self.frames);
        let wanted = self.state.lsns.wanted(&cache.lsns, frames, batch);
        let lock = exclusion::lock_for_writeback(&cache.tags, batch.leaf, wanted, |slot| {
            if self.singles >> slot & 1 != 0 {
                debug_assert_eq!(cache.place(frames[slot as usize]).order, FolioOrder(0));
                return (cache.folio(frames[slot as usize]), 1 << slot);
            }
            let place = cache.place(frames[slot as usize]);
            let rest = (place.order.pages() - place.within).min(LEAF_PAGES - u64::from(slot));
            (cache.folio(place.head), slots(slot, rest as u32))
        });
        let locked = LeafPages { pages: lock.locked, ..batch };
        let too_new = self.state.lsns.too_new(&cache.lsns, frames, locked);
        let stops = if self.state.lsns.is_strict() { too_new } else { 0 };
        let refused = lock.held | lock.in_flight | stops;
        self.locked = LeafPages { pages: lock.locked & !too_new, ..batch };
        self.unlock(too_new);
        let passed_over = batch.pages & !wanted | too_new;
        self.look_pages = self.look_pages.saturating_sub(u64::from(passed_over.count_ones()));
        self.state.cursor = end;
        if self.state.mode == SyncMode::All && refused != 0 {
            let slot = refused.trailing_zeros();
            self.blocked = Some((self.frames[slot as usize], batch.base + u64::from(slot)));
            let beyond = self.locked.pages & !((1 << slot) - 1);
            self.locked.pages &= (1 << slot) - 1;
            self.unlock(beyond);
        }
        self.handle_eof();
    }

    /// Gives pages of the current leaf back, dirty as they are.
    fn unlock(&self, pages: u64) {
        if pages != 0 {
            self.issuer.cache.shared.tags.clear_owned(self.locked.leaf, pages, Tag::Writeback);
        }
    }

    /// Gives back what is locked and not handed out: the pass goes on there.
    fn release_locked(&mut self) {
        let pages = std::mem::take(&mut self.locked.pages);
        if pages != 0 {
            self.state.cursor = self.locked.base + u64::from(pages.trailing_zeros());
            self.unlock(pages);
        } else if let Some((_, local)) = self.blocked {
            self.state.cursor = local;
        }
        self.blocked = None;
    }

    /// Finds the folios of the wanted pages of a leaf.
    fn find_frames(&mut self, batch: LeafPages) {
        let shared = &self.issuer.cache.shared;
        let first = self.shape.striping.page(self.issuer.cache.shard, batch.base);
        self.first_page = first;
        (self.joined, self.singles) = (0, 0);
        let mut pages = batch.pages;
        let mut before: Option<(u32, FrameId)> = None;
        let mut are_scattered = false;
        while pages != 0 {
            let slot = pages.trailing_zeros();
            let key = self.shape.key(first + u64::from(slot));
            // The cache lays a leaf's pages out in its frames as in the file where it can; to look there saves the index.
            let beside = before.filter(|_| !are_scattered).map(|(at, frame)| FrameId(frame.0 + slot - at));
            let beside =
                beside.filter(|frame| shared.headers.get(frame.0 as usize).is_some_and(|it| it.key() == key));
            if let (Some((at, _)), Some(frame)) = (before, beside)
                && shared.folio(frame).order() == FolioOrder(0)
            {
                // The most frequent case by far where there are many to look at, and all that is below for a single page.
                self.frames[slot as usize] = frame;
                self.singles |= 1 << slot;
                self.joined |= u64::from(!self.by_folio && at + 1 == slot) << at;
                before = Some((slot, frame));
                pages &= pages - 1;
                continue;
            }
            let frame = beside.unwrap_or_else(|| {
                if before.is_some() && !are_scattered {
                    are_scattered = true;
                    self.touch(pages);
                }
                // A marked page has its folio: dirty ones are not evicted, and who removes one takes its marks off first.
                shared.index.find_exact(&shared.headers, key).expect("a marked page is in the cache")
            });
            self.frames[slot as usize] = frame;
            let place = shared.place(frame);
            if before.is_none() && ahead::is_worth_it(batch.pages, place.order.pages()) {
                ahead::load_headers(shared, frame);
                ahead::load_next(self.issuer.cache, self.shape, batch.base, first);
            }
            self.singles |= u64::from(place.order.pages() == 1) << slot;
            // The folio's other pages in this leaf lie beside it.
            let rest = (place.order.pages() - place.within).min(LEAF_PAGES - u64::from(slot)) as u32;
            for at in 1..rest {
                self.frames[(slot + at) as usize] = FrameId(frame.0 + at);
            }
            self.joined |= slots(slot, rest - 1);
            if !self.by_folio && before.is_some_and(|(at, last)| at + 1 == slot && last.0 + 1 == frame.0) {
                self.joined |= 1 << (slot - 1);
            }
            before = Some((slot + rest - 1, FrameId(frame.0 + rest - 1)));
            pages &= !slots(slot, rest);
        }
    }

    /// Loads the headers of folios that lie here and there before any is worked on: they come into the processor's cache
    /// together instead of one after the other.
    fn touch(&self, mut pages: u64) {
        let shared = &self.issuer.cache.shared;
        let mut touched = 0;
        while pages != 0 {
            let key = self.shape.key(self.first_page + u64::from(pages.trailing_zeros()));
            touched |= shared.index.touch(&shared.headers, key);
            pages &= pages - 1;
        }
        std::hint::black_box(touched);
    }

    /// A folio that was handed out will be submitted; its frame is the device's then.
    fn take(&mut self, page: u64, pages: u64, frame: FrameId) {
        let leaf = self.locked.leaf;
        if leaf != self.started.leaf {
            self.clean_started();
            self.started.leaf = leaf;
        }
        let bits = leaf_bits(page, pages);
        self.started.pages |= bits;
        self.step_pages = self.step_pages.saturating_sub(pages);
        self.state.budget = self.state.budget.saturating_sub(pages);
        self.state.written += pages;
        let run = self.run.get_or_insert_with(|| self.issuer.start_run(self.shape, page, self.state.group));
        run.append(self.shape, page, frame, pages);
        if self.poisoned & bits != 0 {
            self.submit_run();
        }
    }

    /// A folio that was handed out is given back, dirty as it is.
    fn put_off(&mut self, page: u64, pages: u64) {
        // Nobody parks between lock and unlock: both happen within one step of the shard.
        self.unlock(leaf_bits(page, pages));
        self.state.postponed += pages;
        self.state.postponed_page.get_or_insert(page);
        self.issuer.count_postponed(pages);
    }

    /// Puts what was gathered into the queue.
    fn submit_run(&mut self) {
        let Some(run) = self.run.take() else { return };
        let tag = self.state.span.tag(self.state.mode);
        let pages = run.pages();
        if let Err(refused) = self.issuer.submit(self.shape, run, tag) {
            // The queue has failed: these folios end writeback dirty, and the pass is over (WB-11, WB-17).
            self.clean_started();
            self.state.error.get_or_insert(self.issuer.give_up(self.shape, refused));
            self.state.end(PassEnd::Failed);
            return;
        }
        self.state.commands += 1;
        self.state.span.submitted(pages);
    }

    /// Folios that lie side by side may be handed out as if they were one: for a driver that writes whatever it gets.
    pub(crate) fn joins_folios(&mut self) {
        self.by_folio = false;
    }

    /// How the step has ended.
    pub(crate) fn issued(&self) -> Issued {
        self.issued
    }

    /// Takes DIRTY off everything that will be submitted. Before anything ends its writeback.
    fn clean_started(&mut self) {
        if self.started.pages != 0 {
            self.issuer.cache.start_writeback(self.shape, self.started.leaf, self.started.pages);
            self.started.pages = 0;
        }
    }

    /// Tells how the step has ended.
    fn span_ends_step(&mut self, issued: Issued) {
        let marked = &self.issuer.cache.shared.marked[self.shape.slot as usize];
        self.state.span.step_ended(issued, marked);
    }

    /// Ends the pass with an error of its own.
    pub(crate) fn fail(&mut self, error: Error) {
        self.state.error.get_or_insert(error);
        self.state.end(PassEnd::Failed);
    }
}

impl Drop for WritebackPass<'_> {
    fn drop(&mut self) {
        self.release_locked();
        self.submit_run();
        self.clean_started();
        self.issuer.cache.shared.tags.end_locking();
        let issued = if self.state.has_ended() { Issued::End } else { self.issued };
        self.span_ends_step(issued);
    }
}

/// The bits of `count` slots from `slot` on.
fn slots(slot: u32, count: u32) -> u64 {
    if count == 0 { 0 } else { u64::MAX >> (64 - count) << slot }
}

/// A dirty folio that a pass has locked, or the part of it that is dirty without a gap and goes out in one command: nobody
/// changes it, and it is dirty still.
#[derive(Debug)]
pub struct DirtyFolio<'a> {
    cache: &'a SharedCache,
    shape: &'a MappingShape,
    frame: FrameId,
    page: u64,
    pages: u64,
}

impl DirtyFolio<'_> {
    /// Index of its first page within the mapping.
    #[must_use]
    pub fn index(&self) -> u64 {
        self.page
    }

    /// Its pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Its first byte within the mapping.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.page * PAGE_BYTES as u64
    }

    /// Its bytes, as they would be written.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        let last = self.page + self.pages - 1;
        let len_bytes = (self.pages - 1) as usize * PAGE_BYTES + self.shape.page_bytes(last) as usize;
        // SAFETY: the pages of a folio lie side by side. The folio is locked for writeback, so it is up to date, stays where it is, and nobody holds it
        // exclusively until its pass goes on (`cache::exclusion`); a pass that goes on needs this borrow to have ended.
        #[expect(unsafe_code, reason = "a locked frame is readable memory")]
        unsafe {
            std::slice::from_raw_parts(self.cache.frames.address(self.frame).as_ptr(), len_bytes)
        }
    }
}

/// A [`DirtyFolio`] in the hands of who drives the pass. Dropped, it is unlocked and stays dirty: "not now" (WB-09).
#[derive(Debug)]
#[must_use = "a locked folio that is dropped is not written"]
pub struct LockedFolio<'p, 'a> {
    folio: DirtyFolio<'a>,
    pass: &'p mut WritebackPass<'a>,
    is_taken: bool,
}

impl<'a> LockedFolio<'_, 'a> {
    /// Takes the folio along: it is submitted with its neighbours, at the latest when the pass pauses.
    pub fn write(mut self) {
        self.is_taken = true;
        self.pass.take(self.folio.page, self.folio.pages, self.folio.frame);
    }
}

impl<'a> std::ops::Deref for LockedFolio<'_, 'a> {
    type Target = DirtyFolio<'a>;

    fn deref(&self) -> &DirtyFolio<'a> {
        &self.folio
    }
}

impl Drop for LockedFolio<'_, '_> {
    fn drop(&mut self) {
        if !self.is_taken {
            self.pass.put_off(self.folio.page, self.folio.pages);
        }
    }
}
