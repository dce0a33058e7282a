//! What gates and log sequence numbers mean for a shard: how many pages may be dirty behind gates, which
//! frames are the logs' own, what the flusher need not look at again, and where a checkpoint would begin.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::open::OpenMapping;
use super::pages::{Begun, Ticket};
use super::request::{Pacing, Want};
use super::{Shard, ShardLimits};
use crate::cache::exclusion::LEAF_PAGES;
use crate::cache::folio::{FolioOrder, FrameId};
use crate::cache::lsn::Lsn;
use crate::cache::owned::ShardCache;
use crate::cache::shape::MappingShape;
use crate::cache::tags::{Find, LeafPages, Tag};
use crate::error::Error;
use crate::gate::Gate;
use crate::reply::{Grants, Hold, SlotId};
use crate::stats::bump;
use crate::writeback::gated::{self, LeftOut};
use crate::writeback::pass::PassState;

/// Leaves of marked pages that one step of a search for the oldest number looks at: 1024 pages at most.
const STEP_LEAVES: u32 = 16;
/// How long the flusher leaves a mapping alone whose dirty pages are all gated, unless its gate opens: pages
/// without a number may have been dirtied there meanwhile.
const HOLD_NS: u64 = 50_000_000;

/// A shard's side of gates.
#[derive(Debug)]
pub(super) struct ShardGates {
    wait_ns: u64,
    /// Open mappings that hold a log.
    logs: u32,
    /// Frames that are theirs alone when frames run out.
    reserve_frames: usize,
    /// The largest block of those mappings: the reserve is kept in pieces of that size.
    log_order: FolioOrder,
    /// A writer waits until fewer pages are dirty behind gates.
    pub writers_wait: bool,
    /// Mappings in which the flusher has found gated pages only.
    holds: Vec<HeldMapping>,
    oldest: Vec<OldestSearch>,
    /// What the flusher's pass over one mapping has left out so far.
    left_out: LeftOut,
    /// Whether that pass has written something.
    written: bool,
}

#[derive(Debug)]
struct HeldMapping {
    mapping: u16,
    gate: Gate,
    lowest: Lsn,
    highest: Lsn,
    until_ns: u64,
}

/// A search for the smallest first number among the pages of a mapping that are dirty or under writeback.
#[derive(Debug)]
struct OldestSearch {
    slot: SlotId,
    mapping: u16,
    /// Shard-local pages still to be looked at.
    rest: Range<u64>,
    oldest: Arc<AtomicU64>,
}

/// How far something that a gate stops has come.
#[derive(Debug)]
pub(super) enum Stopped {
    /// Nothing stops it.
    No,
    /// It goes on waiting.
    Waits,
    /// It has waited for too long.
    TooLong(Error),
}

impl ShardGates {
    pub(super) fn new(limits: &ShardLimits) -> Self {
        Self {
            wait_ns: limits.gate_wait_ns,
            logs: 0,
            reserve_frames: limits.log_reserve_frames,
            log_order: FolioOrder(0),
            writers_wait: false,
            holds: Vec::new(),
            oldest: Vec::new(),
            left_out: LeftOut::default(),
            written: false,
        }
    }

    /// The flusher begins a pass over a mapping; false when it need not now.
    pub(super) fn flusher_begins(&mut self, mapping: u16, now_ns: u64) -> bool {
        (self.left_out, self.written) = (LeftOut::default(), false);
        !self.holds.iter().any(|hold| hold.mapping == mapping && now_ns < hold.until_ns)
    }

    /// Whether any log is in this cache, with frames in reserve.
    pub(super) fn has_logs(&self) -> bool {
        self.logs > 0
    }
}

impl Shard {
    // ---- mappings come and go ---------------------------------------------------------------------------

    pub(super) fn gates_opened(&mut self, mapping: &OpenMapping) {
        if mapping.gates.log_of.is_some() {
            self.gates.logs += 1;
            self.gates.log_order = self.gates.log_order.max(mapping.shape.order);
            self.keep_reserve_whole();
        }
        if mapping.gates.gate.is_some() {
            self.cache.shared.gated.insert(mapping.shape.slot);
        }
    }

    pub(super) fn gates_closed(&mut self, mapping: &OpenMapping) {
        let slot = mapping.shape.slot;
        self.gates.logs -= u32::from(mapping.gates.log_of.is_some());
        if self.gates.logs == 0 {
            self.gates.log_order = FolioOrder(0);
        }
        self.keep_reserve_whole();
        self.gates.holds.retain(|hold| hold.mapping != slot);
        self.cache.shared.gated.remove(slot);
        self.cache.shared.lsns.mapping_closed(slot);
        while let Some(at) = self.gates.oldest.iter().position(|search| search.mapping == slot) {
            let search = self.gates.oldest.swap_remove(at);
            self.answer(search.slot, Err(Error::Closed));
        }
    }

    // ---- frames -----------------------------------------------------------------------------------------

    /// Frames that have to stay free when this mapping takes some: the reserve of the logs, for all but them.
    pub(super) fn frames_kept_from(&self, mapping: &OpenMapping) -> usize {
        if mapping.gates.log_of.is_some() { 0 } else { self.frames_reserved() }
    }

    /// Frames in reserve for logs.
    pub(super) fn frames_reserved(&self) -> usize {
        let whole = || self.gates.reserve_frames.next_multiple_of(self.gates.log_order.pages() as usize);
        if self.gates.has_logs() { whole() } else { 0 }
    }

    fn keep_reserve_whole(&mut self) {
        let log = self.gates.log_order;
        self.cache.keep_whole((log, self.frames_reserved() / log.pages() as usize));
    }

    /// Whether somebody else than a log can have these folios without breaking up a block of the reserve: where a log's page
    /// takes several frames, frames here and there are no help to it.
    pub(super) fn spares_reserve(&self, order: FolioOrder, folios: usize) -> bool {
        let log = self.gates.log_order;
        log == FolioOrder(0)
            || self.cache.spares((order, folios), (log, self.frames_reserved() / log.pages() as usize))
    }

    /// Whether a request for pages is a log's, which doesn't queue behind others for frames.
    pub(super) fn is_for_log(&self, slot: SlotId) -> bool {
        self.gates.has_logs()
            && self.tickets[slot.0 as usize].as_ref().is_some_and(|ticket| {
                self.mappings[ticket.mapping as usize]
                    .as_ref()
                    .is_some_and(|open| open.gates.log_of.is_some())
            })
    }

    // ---- the bound --------------------------------------------------------------------------------------

    /// Whether a request would dirty a page more behind a gate than there may be.
    pub(super) fn exceeds_gate_bound(&self, open: &OpenMapping, first: u64, count: u32, want: Want) -> bool {
        let shared = &self.cache.shared;
        let gated = open.gates.gate.is_some() && want.hold() == Hold::Exclusive;
        if !gated || !shared.exceeds_gated(u64::from(count)) {
            return false;
        }
        let mut pages = first..first + u64::from(count);
        pages.any(|page| {
            let Some(frame) = self.cache.find(&open.shape, page) else { return true };
            let place = shared.place(frame);
            // What is there isn't granted to who would create it.
            let granted = want.is_single() || place.within >= shared.folio(place.head).state().filled();
            granted && !shared.is_marked(frame, Tag::Dirty)
        })
    }

    /// As [`exceeds_gate_bound`](Self::exceeds_gate_bound), for the request in `slot`.
    pub(super) fn is_beyond_gate_bound(&self, slot: SlotId) -> bool {
        let Some(ticket) = &self.tickets[slot.0 as usize] else { return false };
        self.mappings[ticket.mapping as usize]
            .as_ref()
            .is_some_and(|open| self.exceeds_gate_bound(open, ticket.first, ticket.count, ticket.want))
    }

    /// Whether a request that was put off waits for fewer pages to be dirty behind gates: only those have nothing reserved.
    pub(super) fn awaits_gate_bound(&self, slot: SlotId) -> bool {
        let awaits = |ticket: &Ticket| ticket.want.hold() == Hold::Exclusive && ticket.reservation.is_none();
        self.tickets[slot.0 as usize].as_ref().is_some_and(awaits)
    }

    /// Why dirty pages can't be written, if a gate is why.
    pub(super) fn gate_cause(&self, waited: Duration) -> Option<Error> {
        let closed = self.gates.holds.iter().find(|hold| hold.gate.durable_lsn() < hold.lowest);
        closed.map(|hold| hold.gate.error(hold.highest, waited))
    }

    /// A request for pages waits until fewer are dirty behind gates, if it may wait.
    pub(super) fn wait_at_gate_bound(&mut self, slot: SlotId) -> Begun {
        let waits = |ticket: &Ticket| ticket.pacing == Pacing::Wait;
        if self.tickets[slot.0 as usize].as_ref().is_none_or(waits) {
            self.gates.writers_wait = true;
            // Who waits for a log has nothing reserved, or writers that don't would be slowed by it.
            if let Some(ticket) = &mut self.tickets[slot.0 as usize] {
                ticket.reservation = None;
            }
            return Begun::Gated;
        }
        self.tickets[slot.0 as usize] = None;
        let limit_pages = u64::from(self.cache.shared.gated.pages_max());
        self.answer(
            slot,
            Err(Error::Throttled { dirty_pages: self.cache.shared.gated_dirty(), limit_pages }),
        );
        Begun::Yes
    }

    // ---- the flusher ------------------------------------------------------------------------------------

    /// What a step of the flusher's pass over a mapping has left out, and whether it has written.
    pub(super) fn flusher_left_out(&mut self, left_out: LeftOut, written: bool) {
        self.gates.left_out.merge(left_out);
        self.gates.written |= written;
    }

    /// The flusher's pass over a mapping has ended that began at `first`. One over all of it that had nothing
    /// but gated pages before it needn't come again until the gate has moved.
    pub(super) fn flusher_passed(&mut self, open: &OpenMapping, first: u64) {
        let left_out = std::mem::take(&mut self.gates.left_out);
        let written = std::mem::take(&mut self.gates.written);
        self.publish_left_out(open, left_out);
        let nothing_else = left_out.pages > 0 && !written && first == 0;
        let Some(gate) = open.gates.gate.as_ref().filter(|_| nothing_else) else { return };
        let (mapping, until_ns) = (open.shape.slot, self.now_ns.saturating_add(HOLD_NS));
        let LeftOut { lowest, highest, .. } = left_out;
        self.gates.holds.retain(|hold| hold.mapping != mapping);
        self.gates.holds.push(HeldMapping { mapping, gate: gate.clone(), lowest, highest, until_ns });
    }

    /// Tells the owner of a gate, the counters and the record what a background pass has left out.
    pub(super) fn publish_left_out(&self, open: &OpenMapping, left_out: LeftOut) {
        if let Some(gate) = open.gates.gate.as_ref().filter(|_| left_out.pages > 0) {
            bump(&self.link.counters.pages_gated, left_out.pages);
            gated::event_pages_left_out(gate, self.link.shard, left_out);
            gate.want(left_out.highest);
        }
    }

    /// Lets the flusher at mappings again whose gate has opened a little.
    pub(super) fn check_gates(&mut self) {
        if self.gates.holds.is_empty() {
            return;
        }
        let (before, shard) = (self.gates.holds.len(), self.link.shard);
        self.gates.holds.retain(|hold| !hold.gate.reached(hold.lowest, shard));
        if self.gates.holds.len() < before {
            self.flusher.gate_opened();
        }
    }

    // ---- deadlines --------------------------------------------------------------------------------------

    /// The error of a pass that has waited for its gate for too long.
    pub(super) fn gate_deadline(&self, state: &PassState) -> Option<Error> {
        let (gate, lsn) = state.lsns.expired(self.now_ns, self.gates.wait_ns)?;
        Some(self.gate_timeout(gate, lsn))
    }

    fn gate_timeout(&self, gate: &Gate, lsn: Lsn) -> Error {
        bump(&self.link.counters.gate_timeouts, 1);
        gated::event_gate_wait_ended(gate, self.link.shard, lsn);
        gate.error(lsn, Duration::from_nanos(self.gates.wait_ns))
    }

    /// Whether the folio of `frame` has dirty pages in `range`, shard-local, whose log isn't durable: then
    /// that is waited for, since `since_ns`. Nothing dirty is thrown away, or overwritten on the device,
    /// before its log is there.
    pub(super) fn gate_stops(
        &self,
        open: &OpenMapping,
        frame: FrameId,
        range: &Range<u64>,
        since_ns: u64,
    ) -> Stopped {
        let Some(gate) = &open.gates.gate else { return Stopped::No };
        let (place, page) = (self.cache.shared.place(frame), self.cache.shared.folio(frame).key().page());
        let frames = place.frames_in(open.shape.striping.local(page), range);
        let last = self.cache.shared.highest_dirty(frames);
        if gate.reached(last, self.link.shard) {
            return Stopped::No;
        }
        gate.want(last);
        if self.now_ns.saturating_sub(since_ns) > self.gates.wait_ns {
            return Stopped::TooLong(self.gate_timeout(gate, last));
        }
        Stopped::Waits
    }

    // ---- checkpoints ------------------------------------------------------------------------------------

    /// Begins the search for the oldest number of a mapping; the smallest is left in `oldest`.
    pub(super) fn begin_oldest(&mut self, slot: SlotId, number: u16, oldest: Arc<AtomicU64>) {
        match self.mapping(number) {
            Err(error) => self.answer(slot, Err(error)),
            Ok(open) => {
                let rest = open.shape.striping.local_range(self.cache.shard, 0..open.shape.pages());
                self.gates.oldest.push(OldestSearch { slot, mapping: number, rest, oldest });
            }
        }
    }

    /// Brings every search on by one step. What is marked doesn't change hands between DIRTY and WRITEBACK
    /// within one; pages that are dirtied behind a search have numbers that were given after it began.
    pub(super) fn step_oldest(&mut self) -> bool {
        let mut progressed = false;
        let mut at = 0;
        while let Some(search) = self.gates.oldest.get_mut(at) {
            progressed = true;
            let open =
                self.mappings[search.mapping as usize].as_ref().expect("a search ends before its mapping");
            let mut leaves = 0;
            while leaves < STEP_LEAVES
                && let Some(leaf) = next_undurable(&self.cache, &open.shape, search.rest.clone())
            {
                let oldest = oldest_of(&self.cache, &open.shape, leaf);
                search.oldest.fetch_min(oldest, Ordering::Relaxed);
                search.rest.start = leaf.base + LEAF_PAGES;
                leaves += 1;
            }
            if leaves == STEP_LEAVES {
                at += 1;
                continue;
            }
            let search = self.gates.oldest.swap_remove(at);
            self.answer(search.slot, Ok(Grants::none()));
        }
        progressed
    }
}

/// The first leaf in `range` with pages that are dirty or under writeback, and which those are.
fn next_undurable(cache: &ShardCache, shape: &MappingShape, range: Range<u64>) -> Option<LeafPages> {
    let next = |tag| cache.tree.next(shape.tree, Find::Tagged(tag), range.clone());
    match (next(Tag::Dirty), next(Tag::Writeback)) {
        (Some(dirty), Some(writeback)) if dirty.base == writeback.base => {
            Some(LeafPages { pages: dirty.pages | writeback.pages, ..dirty })
        }
        (Some(dirty), Some(writeback)) => Some(if dirty.base < writeback.base { dirty } else { writeback }),
        (dirty, writeback) => dirty.or(writeback),
    }
}

/// The smallest first number among `leaf`'s pages; `u64::MAX` if none has one.
fn oldest_of(cache: &ShardCache, shape: &MappingShape, leaf: LeafPages) -> u64 {
    let first_page = shape.striping.page(cache.shard, leaf.base);
    let (mut oldest, mut rest) = (u64::MAX, leaf.pages);
    while rest != 0 {
        let page = first_page + u64::from(rest.trailing_zeros());
        rest &= rest - 1;
        let first = cache.find(shape, page).map_or(Lsn::NONE, |frame| cache.shared.lsns.first(frame));
        if !first.is_none() {
            oldest = oldest.min(first.0);
        }
    }
    oldest
}
