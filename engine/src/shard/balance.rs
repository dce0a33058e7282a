//! Writers and dirty memory (`balance_dirty_pages`, WB-24): who may dirty pages now, who pauses, who waits.
//!
//! Every request that holds pages exclusively comes through here before it gets them. Below the middle of the limits it
//! goes on at once. Above, the requests that would make clean pages dirty stand in one line, and
//! [`Throttle`](crate::writeback::throttle::Throttle) says when its head is let on; at the hard limit the head waits
//! until pages have been written. A request is let on with a reservation for its pages
//! ([`cache::balance`](crate::cache::balance)), so that dirty memory never passes the limit, and pauses before it holds
//! anything, so that nobody waits for a writer that pauses.
//!
//! Four kinds don't wait: readers; who changes a page that is dirty already; who writes a log that pages wait for
//! ([`Gate`](crate::Gate)), which comes on top of the limit; and who asked for [`Error::Throttled`] instead. A wait ends, with an error, when for `pin_wait` neither a page
//! was written nor a writer let on: as long as the device works, waiting is only slow.

use super::Shard;
use super::pages::Begun;
use super::request::Pacing;
use crate::cache::balance::Reservation;
use crate::cache::tags::Tag;
use crate::error::Error;
use crate::reply::{Hold, SlotId};
use crate::writeback::events;
use crate::writeback::throttle::Verdict;

/// The dirty memory of one shard, in pages, and its limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DirtyMemory {
    /// Pages that wait to be written; those whose write failed for good are not among them.
    pub dirty_pages: u64,
    /// Pages on their way to the device.
    pub writeback_pages: u64,
    /// Pages that writers hold exclusively and may make dirty, and those that writers were let on for.
    pub reserved_pages: u64,
    /// Above this many of the first two the flusher writes in the background.
    pub background_pages: u64,
    /// Up to this many, the middle of the limits, no writer is slowed.
    pub freerun_pages: u64,
    /// The first two together never pass this; see [`EngineOptions::dirty_percent`](crate::EngineOptions::dirty_percent).
    pub limit_pages: u64,
}

impl Shard {
    /// What is dirty in this shard, and what may be.
    #[must_use]
    pub fn dirty_memory(&self) -> DirtyMemory {
        let limits = self.throttle.limits;
        let balance = &self.cache.shared.balance;
        let (dirty_pages, _) = self.marked_pages();
        // Without poisoned pages that are tried again.
        let writeback_pages = balance.marked().saturating_sub(dirty_pages);
        DirtyMemory {
            dirty_pages,
            writeback_pages,
            reserved_pages: balance.reserved(),
            background_pages: limits.background,
            freerun_pages: limits.freerun,
            limit_pages: limits.limit,
        }
    }

    /// Pages that are dirty and can be written, and pages under writeback.
    pub(super) fn marked_pages(&self) -> (u64, u64) {
        let marked = &self.cache.shared.marked;
        self.open.iter().map(|open| &marked[open.slot as usize]).fold((0, 0), |(dirty, writeback), marked| {
            (dirty + u64::from(marked.writable()), writeback + u64::from(marked.writeback()))
        })
    }

    /// A request for pages has come: begins it, unless it wants to dirty some and has to wait for that.
    pub(super) fn balance_dirty_pages(&mut self, slot: SlotId) {
        let Some(ticket) = &self.tickets[slot.0 as usize] else { return };
        if ticket.want.hold() == Hold::Shared {
            return self.begin_pages(slot);
        }
        let (count, pacing) = (u64::from(ticket.count), ticket.pacing);
        if self.is_for_log(slot) {
            return self.let_on(slot, count);
        }
        let dirty = self.cache.shared.balance.throttleable();
        if self.throttled.is_empty() && dirty + count <= self.throttle.limits.freerun {
            return self.let_on(slot, count);
        }
        let pages = self.pages_to_dirty(slot);
        if pages == 0 {
            return self.let_on(slot, 0);
        }
        let verdict = match self.throttled.is_empty() {
            true => self.throttle.judge(self.now_ns, dirty, pages, 1),
            // The line's head is judged at the end of this step.
            false => Verdict::Pause { until_ns: self.now_ns },
        };
        if verdict == Verdict::Go {
            self.throttle.let_on(self.now_ns, dirty, pages, 1);
            return self.let_on(slot, pages);
        }
        if pacing == Pacing::TryAgain {
            self.tickets[slot.0 as usize] = None;
            let (dirty_pages, limit_pages) = (dirty, self.throttle.limits.limit);
            return self.answer(slot, Err(Error::Throttled { dirty_pages, limit_pages }));
        }
        self.throttled.push_back(slot);
    }

    /// Lets those on whose time has come, in their order.
    pub(super) fn serve_throttled(&mut self) -> bool {
        let balance = &self.cache.shared.balance;
        balance.open_if_below();
        self.throttle_due_ns = None;
        self.at_dirty_limit = false;
        let mut progressed = false;
        while let Some(&slot) = self.throttled.front() {
            let (dirty, waiting) = (self.cache.shared.balance.throttleable(), self.throttled.len());
            let pages = self.pages_to_dirty(slot);
            match self.throttle.judge(self.now_ns, dirty, pages, waiting) {
                Verdict::Go => {
                    self.throttled.pop_front();
                    self.throttle.let_on(self.now_ns, dirty, pages, waiting);
                    self.pause_ended(slot);
                    self.let_on(slot, pages);
                    progressed = true;
                }
                Verdict::Pause { until_ns } => {
                    self.throttle_due_ns = Some(until_ns);
                    break;
                }
                Verdict::AtLimit => {
                    self.at_dirty_limit = true;
                    break;
                }
            }
        }
        progressed
    }

    /// Begins a writer's request that may dirty `pages` pages.
    fn let_on(&mut self, slot: SlotId, pages: u64) {
        let Some(ticket) = &mut self.tickets[slot.0 as usize] else { return };
        // A page that is dirty now may have been written by the time that it is granted, and become dirty again.
        let pages = if ticket.want.is_single() { u64::from(ticket.count) } else { pages };
        // It has waited for its turn; now it waits for its pages.
        ticket.since_ns = self.now_ns;
        self.throttle_progress_ns = self.now_ns;
        if self.is_beyond_gate_bound(slot) {
            if self.wait_at_gate_bound(slot) == Begun::Gated {
                self.deferred.push_back(slot);
            }
            return;
        }
        let Some(ticket) = &mut self.tickets[slot.0 as usize] else { return };
        ticket.reservation = Some(Reservation::new(&self.cache.shared, pages as u32));
        self.begin_pages(slot);
    }

    /// Pages of a writer's request that are not dirty yet and that it would get.
    fn pages_to_dirty(&self, slot: SlotId) -> u64 {
        let Some(ticket) = &self.tickets[slot.0 as usize] else { return 0 };
        let Some(mapping) = &self.mappings[ticket.mapping as usize] else { return 0 };
        let cache = &self.cache.shared;
        let becomes_dirty = |page: &u64| match self.cache.find(&mapping.shape, *page) {
            None => true,
            Some(frame) if ticket.want.is_single() => !cache.is_marked(frame, Tag::Dirty),
            // Of what is there a writer who creates gets what was never filled, as one who appends.
            Some(frame) => {
                let place = cache.place(frame);
                let filled = cache.folio(place.head).state().filled();
                filled > 0 && place.within >= filled
            }
        };
        (ticket.first..ticket.first + u64::from(ticket.count)).filter(becomes_dirty).count() as u64
    }

    /// Measures the device, once a step.
    pub(super) fn measure_bandwidth(&mut self) {
        let in_flight = if self.queue.in_flight() == 0 { 0 } else { self.marked_pages().1 };
        if self.throttle.bandwidth.advance(self.now_ns, in_flight) {
            let dirty = self.cache.shared.balance.throttleable();
            let bytes_per_s = |pages_per_s: f64| (pages_per_s * crate::PAGE_BYTES as f64) as u64;
            events::bdi_dirty_ratelimit(
                self.link.shard,
                &self.link.counters,
                bytes_per_s(self.throttle.bandwidth.pages_per_s()),
                bytes_per_s(self.throttle.rate_limit(dirty)),
                dirty,
                self.now_ns,
            );
        }
    }

    /// Whether the flusher's pass returns at once, since the device has enough to write (WB-19).
    pub(super) fn skips_for_congestion(&mut self) -> bool {
        let is_congested = self.is_congested();
        let was_counted = std::mem::replace(&mut self.congestion_counted, is_congested);
        if is_congested && !was_counted {
            let position = self.flusher.running.as_ref().map_or(0, |run| run.position);
            let mapping = self.open[position % self.open.len()].slot;
            self.note_congestion(mapping);
        }
        is_congested
    }

    /// Whether the device has enough to write.
    pub(super) fn is_congested(&mut self) -> bool {
        let (_, in_flight) = self.marked_pages();
        self.congestion.is_congested(in_flight, self.throttle.bandwidth.pages_per_s())
    }

    /// A background pass over a mapping returns at once.
    pub(super) fn note_congestion(&self, mapping: u16) {
        let (shard, counters) = (self.link.shard, &self.link.counters);
        events::writeback_congested(shard, counters, mapping, self.marked_pages().1, self.now_ns);
    }

    /// Ends the waits of writers when nothing has moved for too long.
    pub(super) fn check_throttled(&mut self) {
        let (now_ns, limit_ns) = (self.now_ns, self.limits.pin_wait_ns);
        let moved_ns = self.throttle_progress_ns;
        while let Some(&slot) = self.throttled.front() {
            let since_ns = self.tickets[slot.0 as usize].as_ref().map_or(0, |ticket| ticket.since_ns);
            if now_ns.saturating_sub(since_ns.max(moved_ns)) <= limit_ns {
                return;
            }
            // What others gave up in this very step may leave room for it.
            let (dirty, waiting) = (self.cache.shared.balance.throttleable(), self.throttled.len());
            let pages = self.pages_to_dirty(slot);
            if self.throttle.judge(now_ns, dirty, pages, waiting) != Verdict::AtLimit {
                self.throttle_due_ns = Some(now_ns);
                return;
            }
            self.throttled.pop_front();
            self.pause_ended(slot);
            self.tickets[slot.0 as usize] = None;
            let waited = std::time::Duration::from_nanos(now_ns.saturating_sub(since_ns));
            let error = Error::DirtyLimit {
                waited,
                dirty_pages: dirty,
                limit_pages: self.throttle.limits.limit,
                cause: self.write_error.clone().or_else(|| self.gate_cause(waited)).map(Box::new),
            };
            self.answer(slot, Err(error));
        }
    }

    /// A writer has waited for its turn.
    fn pause_ended(&self, slot: SlotId) {
        let Some(ticket) = &self.tickets[slot.0 as usize] else { return };
        events::balance_dirty_pages(
            self.link.shard,
            &self.link.counters,
            ticket.mapping,
            (self.cache.shared.balance.throttleable(), self.throttle.limits.limit),
            self.now_ns.saturating_sub(ticket.since_ns),
            self.now_ns,
        );
    }
}
