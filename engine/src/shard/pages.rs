//! Requests for pages: misses, waits for other holders, grants.
//!
//! A request is a [`Ticket`] while it isn't answered. Each page that it still waits for has an entry in the
//! parked list of that page's folio; misses of one page by many requests thus share one read. Entries are
//! served in the order in which they came, whenever the folio changes hands or its I/O ends.

use std::sync::atomic::Ordering;

use super::Shard;
use super::open::OpenMapping;
use super::payload::FolioRun;
use super::request::Want;
use crate::cache::folio::{FrameId, NONE};
use crate::cache::tags::Tag;
use crate::error::Error;
use crate::reply::{GRANTS_MAX, Grants, Hold, SlotId};
use crate::stats::bump;

/// Folios that one attempt to make room looks at: bounds the step.
const EVICT_STEPS: u32 = 1024;
/// Folios that eviction ahead of demand looks at in a step.
const AHEAD_STEPS: u32 = 64;

/// A request for pages that isn't answered yet.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub mapping: u16,
    pub first: u64,
    pub count: u32,
    pub want: Want,
    /// Pages that it waits for.
    pub pending: u32,
    pub grants: Grants,
    pub error: Option<Error>,
    pub since_ns: u64,
}

impl Ticket {
    pub(crate) fn new(mapping: u16, first: u64, count: u32, want: Want, since_ns: u64) -> Self {
        let hold = match want {
            Want::Fill | Want::Shared => Hold::Shared,
            Want::Create | Want::Exclusive => Hold::Exclusive,
        };
        let grants = Grants { hold, ..Grants::none() };
        debug_assert!(count as usize <= GRANTS_MAX);
        Self { mapping, first, count, want, pending: 0, grants, error: None, since_ns }
    }
}

/// The entries of all parked lists: a fixed slab, linked by index.
#[derive(Debug)]
pub(crate) struct ParkedList {
    entries: Box<[Parked]>,
    free: u32,
}

#[derive(Clone, Copy, Debug)]
struct Parked {
    slot: SlotId,
    /// Which page of the request waits here.
    position: u8,
    next: u32,
}

impl ParkedList {
    /// Room for every page of every request that can be in service.
    pub(crate) fn new(requests: usize) -> Self {
        let count = requests * GRANTS_MAX;
        let entry = |index: usize| Parked {
            slot: SlotId(0),
            position: 0,
            next: if index + 1 == count { NONE } else { index as u32 + 1 },
        };
        Self { entries: (0..count).map(entry).collect(), free: 0 }
    }

    fn allocate(&mut self, slot: SlotId, position: usize) -> u32 {
        let index = self.free;
        assert_ne!(index, NONE, "parked entries are bounded by requests times pages");
        self.free = self.entries[index as usize].next;
        self.entries[index as usize] = Parked { slot, position: position as u8, next: NONE };
        index
    }

    fn release(&mut self, index: u32) -> Parked {
        let parked = self.entries[index as usize];
        self.entries[index as usize].next = self.free;
        self.free = index;
        parked
    }
}

/// What came of beginning a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begun {
    Yes,
    /// It has to wait for frames.
    NoFrames,
    /// It has to wait for a discard of its range.
    Discarding,
}

impl Shard {
    /// Begins a request for pages, or puts it behind those that wait already.
    pub(super) fn begin_pages(&mut self, slot: SlotId) {
        // Frames go to who came first; who waits for a discard holds up nobody.
        if self.frames_needed > 0 || self.try_begin_pages(slot) != Begun::Yes {
            self.deferred.push_back(slot);
        }
    }

    /// Begins the requests that were put off, in their order, as far as frames suffice.
    pub(super) fn retry_deferred(&mut self) {
        self.frames_needed = 0;
        let mut at = 0;
        while let Some(&slot) = self.deferred.get(at) {
            match self.try_begin_pages(slot) {
                Begun::Yes => drop(self.deferred.remove(at)),
                Begun::Discarding => at += 1,
                Begun::NoFrames => return,
            }
        }
    }

    fn try_begin_pages(&mut self, slot: SlotId) -> Begun {
        let Some(ticket) = &self.tickets[slot.0 as usize] else { return Begun::Yes };
        let (number, first, count, want) = (ticket.mapping, ticket.first, ticket.count, ticket.want);
        let mapping = match self.mapping(number) {
            Ok(mapping) => mapping,
            Err(error) => {
                self.tickets[slot.0 as usize] = None;
                self.answer(slot, Err(error));
                return Begun::Yes;
            }
        };
        if self.discards.iter().any(|job| job.overlaps(&mapping.shape, first..first + u64::from(count))) {
            return Begun::Discarding;
        }
        // All frames at once, or none: a request never holds some while it waits for others.
        if !self.make_room(&mapping, first, count) {
            return Begun::NoFrames;
        }
        self.frames_needed = 0;
        self.install_missing(slot, &mapping, first, count, want);
        self.finish_if_complete(slot);
        Begun::Yes
    }

    fn missing(&self, mapping: &OpenMapping, first: u64, count: u32) -> usize {
        let pages = first..first + u64::from(count);
        pages.filter(|&page| self.cache.find(&mapping.shape, page).is_none()).count()
    }

    fn make_room(&mut self, mapping: &OpenMapping, first: u64, count: u32) -> bool {
        for _ in 0..2 {
            let missing = self.missing(mapping, first, count);
            if self.cache.free_frames() >= missing {
                return true;
            }
            // Evicting may hit a page of this very range, hence the second count.
            self.frames_needed = missing;
            self.evict(missing, EVICT_STEPS);
        }
        self.cache.free_frames() >= self.missing(mapping, first, count)
    }

    fn evict(&mut self, wanted: usize, steps_max: u32) {
        let before = self.cache.evicted;
        let mappings = &self.mappings;
        self.cache.evict(wanted, steps_max, |key| {
            mappings[key.mapping() as usize].as_ref().map(|open| &open.shape)
        });
        bump(&self.link.counters.pages_evicted, self.cache.evicted - before);
    }

    /// Keeps a few frames free, so that a miss seldom has to look for one.
    pub(super) fn evict_ahead(&mut self) {
        let ahead = (self.cache.shared.headers.len() / 64).clamp(1, 1024).max(self.frames_needed);
        if self.cache.free_frames() < ahead {
            self.evict(ahead, AHEAD_STEPS);
        }
    }

    fn install_missing(&mut self, slot: SlotId, mapping: &OpenMapping, first: u64, count: u32, want: Want) {
        let shape = &mapping.shape;
        let mut run: Option<FolioRun> = None;
        for position in 0..count as usize {
            let page = first + position as u64;
            if let Some(frame) = self.cache.find(shape, page) {
                self.join_present(slot, position, frame, want);
                continue;
            }
            let frame = self.cache.install(shape, page).expect("room was made for every missing page");
            let folio = self.cache.shared.folio(frame);
            if want == Want::Create {
                folio.publish_exclusive();
                bump(&self.link.counters.pages_created, 1);
                self.ticket(slot).grants.add(position, frame);
                continue;
            }
            folio.publish();
            self.park(slot, position, frame);
            match &mut run {
                Some(run) if run.takes(shape, page) => run.append(shape, page, frame),
                _ => {
                    let next = self.runs.start(shape, page, frame);
                    self.reads.extend(run.replace(next));
                }
            }
        }
        self.reads.extend(run);
    }

    /// A page that is in the cache already, or on its way.
    fn join_present(&mut self, slot: SlotId, position: usize, frame: FrameId, want: Want) {
        let state = self.cache.shared.folio(frame).state();
        match want {
            Want::Create => {}
            // On its way from the device: share that read. Being filled by a writer, or there: not granted.
            Want::Fill if state.uptodate() || state.exclusive() => {}
            Want::Fill => self.park(slot, position, frame),
            Want::Shared | Want::Exclusive => {
                self.park(slot, position, frame);
                self.serve(frame);
            }
        }
    }

    fn ticket(&mut self, slot: SlotId) -> &mut Ticket {
        self.tickets[slot.0 as usize].as_mut().expect("a request in service has its ticket")
    }

    /// Appends to the folio's parked list.
    fn park(&mut self, slot: SlotId, position: usize, frame: FrameId) {
        self.ticket(slot).pending += 1;
        let entry = self.parked.allocate(slot, position);
        let folio = self.cache.shared.folio(frame);
        let mut last = folio.waiter_first.load(Ordering::Relaxed);
        if last == NONE {
            folio.waiter_first.store(entry, Ordering::Relaxed);
        } else {
            while self.parked.entries[last as usize].next != NONE {
                last = self.parked.entries[last as usize].next;
            }
            self.parked.entries[last as usize].next = entry;
        }
        // The end of a read serves whoever waits for it; holders have to be asked to kick.
        let state = folio.state();
        if state.uptodate() || state.exclusive() {
            self.watch_folio(frame);
        }
    }

    /// From now on every release of this folio kicks the shard. True when it is news: the caller then looks at
    /// the folio once more, since a release may just have passed by.
    pub(super) fn watch_folio(&mut self, frame: FrameId) -> bool {
        if self.watched.contains(&frame) {
            return false;
        }
        self.cache.shared.folio(frame).announce_waiters();
        self.watched.push(frame);
        true
    }

    /// Serves the folios whose holders released them, and reads in what a dropped request left unfilled.
    pub(super) fn serve_releases(&mut self) -> bool {
        if !self.link.take_kick() {
            return false;
        }
        while let Some(frame) = self.link.take_orphan() {
            let folio = self.cache.shared.folio(frame);
            let key = folio.key();
            let mapping = self.mapping(key.mapping()).expect("an orphan's mapping is open");
            let _ = folio.release_exclusive_unchanged();
            self.reads.push_back(self.runs.start(&mapping.shape, key.page(), frame));
        }
        // `serve` takes a folio off the list when nobody waits for it any more.
        let mut at = self.watched.len();
        while at > 0 {
            at -= 1;
            if let Some(&frame) = self.watched.get(at) {
                self.serve(frame);
            }
        }
        true
    }

    /// Grants a folio to those who wait for it, in their order, as far as it can be granted now.
    pub(super) fn serve(&mut self, frame: FrameId) {
        let cache = self.cache.shared.clone();
        let folio = cache.folio(frame);
        loop {
            let first = folio.waiter_first.load(Ordering::Relaxed);
            if first == NONE {
                break;
            }
            let Parked { slot, position, next } = self.parked.entries[first as usize];
            let want = self.ticket(slot).want;
            let granted = match want {
                Want::Fill | Want::Shared => folio.grant_pin(),
                // A sync that waits for this page comes before the next writer, or it might never come (WB-03).
                Want::Exclusive => {
                    !self.sync_waits_for(frame)
                        && !cache.is_marked(frame, Tag::Writeback)
                        && folio.grant_exclusive()
                }
                Want::Create => false,
            };
            // A `Fill` waits for I/O only: where a writer has come in between, it goes without this page.
            if !granted && (want != Want::Fill || !folio.state().uptodate()) {
                // Whoever has it must kick; one that was parked while the folio was read in isn't announced yet. News?
                // Then the holder may have let go before it was asked: once more.
                if self.watch_folio(frame) {
                    continue;
                }
                return;
            }
            folio.waiter_first.store(next, Ordering::Relaxed);
            self.parked.release(first);
            let ticket = self.ticket(slot);
            if granted {
                ticket.grants.add(position as usize, frame);
            }
            ticket.pending -= 1;
            self.finish_if_complete(slot);
        }
        if !self.sync_waits_for(frame) {
            self.unwatch_folio(frame);
        }
    }

    /// Serves those of `frames` that requests, or a sync, wait for. Mostly none is, and no header is looked at.
    pub(super) fn serve_waiters_of(&mut self, frames: &[FrameId]) {
        if self.watched.is_empty() {
            return;
        }
        for &frame in frames {
            if self.cache.shared.folio(frame).state().has_waiters() {
                self.serve(frame);
            }
        }
    }

    fn unwatch_folio(&mut self, frame: FrameId) {
        if let Some(at) = self.watched.iter().position(|&watched| watched == frame) {
            self.watched.swap_remove(at);
            self.cache.shared.folio(frame).retract_waiters();
        }
    }

    /// Takes everybody off a folio's parked list.
    fn unpark_all(&mut self, frame: FrameId, mut each: impl FnMut(&mut Self, SlotId)) {
        let cache = self.cache.shared.clone();
        let folio = cache.folio(frame);
        loop {
            let first = folio.waiter_first.load(Ordering::Relaxed);
            if first == NONE {
                break;
            }
            folio.waiter_first.store(self.parked.entries[first as usize].next, Ordering::Relaxed);
            let parked = self.parked.release(first);
            self.ticket(parked.slot).pending -= 1;
            each(self, parked.slot);
        }
        self.unwatch_folio(frame);
    }

    /// The read of a folio failed: everybody who waits for it is told, and the frame is free again.
    pub(super) fn abandon_read(&mut self, mapping: &OpenMapping, frame: FrameId, error: &Error) {
        self.unpark_all(frame, |shard, slot| {
            shard.ticket(slot).error.get_or_insert_with(|| error.clone());
            shard.finish_if_complete(slot);
        });
        self.cache.shared.folio(frame).freeze_unread();
        self.cache.release(&mapping.shape, frame);
    }

    /// A frozen folio leaves the cache: who waits for it begins anew.
    pub(super) fn restart_waiters(&mut self, frame: FrameId) {
        self.unpark_all(frame, |shard, slot| {
            debug_assert_eq!(
                shard.ticket(slot).pending,
                0,
                "who waits for an up-to-date folio waits for it alone"
            );
            shard.deferred.push_back(slot);
        });
    }

    fn finish_if_complete(&mut self, slot: SlotId) {
        let Some(ticket) = &self.tickets[slot.0 as usize] else { return };
        // `try_begin_pages` finishes by itself what is complete at once.
        if ticket.pending > 0 {
            return;
        }
        let Some(ticket) = self.tickets[slot.0 as usize].take() else { return };
        let reply = match ticket.error {
            None => Ok(ticket.grants),
            Some(error) => {
                self.link.give_back(&ticket.grants);
                Err(error)
            }
        };
        self.answer(slot, reply);
    }

    /// Ends requests that have waited longer than they may for what others hold.
    pub(super) fn check_deadlines(&mut self) {
        let waited = std::time::Duration::from_nanos(self.limits.pin_wait_ns);
        let (now, limit) = (self.now_ns, self.limits.pin_wait_ns);
        let expired = |since_ns: u64| now.saturating_sub(since_ns) > limit;
        for slot in 0..self.tickets.len() {
            let Some(ticket) = &self.tickets[slot] else { continue };
            if !expired(ticket.since_ns) {
                continue;
            }
            let slot = SlotId(slot as u32);
            if let Some(at) = self.deferred.iter().position(|&deferred| deferred == slot) {
                let (number, page, count) = (ticket.mapping, ticket.first, u64::from(ticket.count));
                let discarded = self.mapping(number).is_ok_and(|mapping| {
                    self.discards.iter().any(|job| job.overlaps(&mapping.shape, page..page + count))
                });
                self.deferred.remove(at);
                self.tickets[slot.0 as usize] = None;
                if discarded {
                    self.answer(slot, Err(Error::PinnedTooLong { page, waited }));
                    continue;
                }
                let frames = self.cache.shared.headers.len();
                let cause = self.write_error.clone().map(Box::new);
                self.answer(slot, Err(Error::CacheFull { waited, frames, cause }));
            } else if matches!(ticket.want, Want::Shared | Want::Exclusive) {
                let page = ticket.first;
                self.give_up_waiting(slot, Error::PinnedTooLong { page, waited });
            }
        }
        self.check_sync_deadlines(waited);
    }

    /// Takes a request for one page off the folio that others hold. One that waits for the device goes on
    /// waiting: the device has a deadline of its own.
    fn give_up_waiting(&mut self, slot: SlotId, error: Error) {
        let (number, page) = (self.ticket(slot).mapping, self.ticket(slot).first);
        let Ok(mapping) = self.mapping(number) else { return };
        let Some(frame) = self.cache.find(&mapping.shape, page) else { return };
        let folio = self.cache.shared.folio(frame);
        let under_writeback = self.cache.shared.is_marked(frame, Tag::Writeback);
        if !folio.state().uptodate() && !folio.state().exclusive() || under_writeback {
            return;
        }
        let (mut before, mut at) = (NONE, folio.waiter_first.load(Ordering::Relaxed));
        while at != NONE && self.parked.entries[at as usize].slot != slot {
            (before, at) = (at, self.parked.entries[at as usize].next);
        }
        if at == NONE {
            return;
        }
        let next = self.parked.entries[at as usize].next;
        if before == NONE {
            folio.waiter_first.store(next, Ordering::Relaxed);
        } else {
            self.parked.entries[before as usize].next = next;
        }
        self.parked.release(at);
        let ticket = self.ticket(slot);
        ticket.pending -= 1;
        ticket.error = Some(error);
        self.finish_if_complete(slot);
        // The next in line may be grantable, and a list that became empty is no longer watched.
        self.serve(frame);
    }
}
