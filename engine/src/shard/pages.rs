//! Requests for pages: misses, waits for other holders, grants.
//!
//! A request is a [`Ticket`] while it isn't answered. Each page that it still waits for has an entry in the
//! parked list of that page's folio; misses of one page by many requests thus share one read. Entries are
//! served in the order in which they came, whenever the folio changes hands or its I/O ends.

use std::cell::Cell;
use std::ops::Range;

use super::Shard;
use super::open::OpenMapping;
use super::parked::Parked;
use super::payload::FolioRun;
use super::request::{Pacing, Want};
use crate::cache::balance::Reservation;
use crate::cache::folio::{FolioOrder, FrameId};
use crate::cache::reclaim::Rank;
use crate::cache::shape::{MappingShape, Stability};
use crate::cache::tags::Tag;
use crate::error::Error;
use crate::reply::{GRANTS_MAX, Grants, Hold, SlotId};
use crate::stats::bump;

/// Folios that one attempt to make room looks at: bounds the step.
const EVICT_STEPS: u32 = 1024;

/// A request for pages that isn't answered yet.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub mapping: u16,
    pub first: u64,
    pub count: u32,
    pub want: Want,
    /// Pages that it waits for.
    pub pending: u32,
    /// It stands among the deferred requests, and has nothing of what it asked for: it isn't complete though it waits for no
    /// page.
    pub begins_anew: bool,
    pub grants: Grants,
    pub error: Option<Error>,
    pub since_ns: u64,
    pub pacing: Pacing,
    /// A writer's, from when it is let on ([`balance`](super::balance)).
    pub reservation: Option<Reservation>,
}

impl Ticket {
    pub(crate) fn new(
        mapping: u16,
        first: u64,
        count: u32,
        want: Want,
        pacing: Pacing,
        since_ns: u64,
    ) -> Self {
        let grants = Grants { hold: want.hold(), ..Grants::none() };
        debug_assert!(count as usize <= GRANTS_MAX);
        Self {
            mapping,
            first,
            count,
            want,
            pending: 0,
            begins_anew: false,
            grants,
            error: None,
            since_ns,
            pacing,
            reservation: None,
        }
    }

    /// Grants `pages` pages of one folio that are held together; exclusively, with their reservation.
    fn grant(&mut self, position: usize, frame: FrameId, pages: u64) {
        self.grants.add_joined(position, frame, pages as usize);
        self.hand_over(pages);
    }

    /// Grants the one page of the mapping that is wanted, which all pages of the request belong to.
    fn grant_single(&mut self, position: usize, frame: FrameId) {
        self.grants.add(position, frame);
        self.hand_over(u64::from(self.count));
    }

    /// Pages that may still be made for a writer: whole pages of the mapping, as far as its reservation goes.
    fn creatable(&self, shape: &MappingShape) -> u64 {
        match &self.reservation {
            Some(reservation) if self.want == Want::Create => {
                u64::from(reservation.pages()) / shape.order.pages() * shape.order.pages()
            }
            // Readers, and who wants one page, get what they ask for.
            _ => GRANTS_MAX as u64,
        }
    }

    fn hand_over(&mut self, pages: u64) {
        if let Some(reservation) = &mut self.reservation {
            reservation.hand_over(pages as u32);
            self.grants.reserved += pages as u32;
        }
    }
}

/// What came of beginning a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begun {
    Yes,
    /// It has to wait for frames.
    NoFrames,
    /// It has to wait for a discard of its range.
    Discarding,
    /// It has to wait until fewer pages are dirty behind gates.
    Gated,
    /// It has to wait for room in its mapping's share of the cache.
    ShareFull,
}

impl Shard {
    /// Begins a request for pages, or puts it behind those that wait already.
    pub(super) fn begin_pages(&mut self, slot: SlotId) {
        // Frames go to who came first, but to logs before; who waits for a discard or a gate holds up nobody.
        let queues = self.frames_needed > 0 && !self.is_for_log(slot);
        if queues || self.try_begin_pages(slot) != Begun::Yes {
            self.deferred.push_back(slot);
        }
    }

    /// Begins the requests that were put off, in their order, as far as frames suffice.
    pub(super) fn retry_deferred(&mut self) {
        self.frames_needed = 0;
        self.shares.begin_retry();
        self.gates.writers_wait = false;
        let (mut at, mut needed) = (0, 0);
        while let Some(&slot) = self.deferred.get(at) {
            if needed > 0 && !self.is_for_log(slot) {
                at += 1;
                continue;
            }
            if self.awaits_gate_bound(slot) {
                if self.is_beyond_gate_bound(slot) {
                    self.gates.writers_wait = true;
                    at += 1;
                } else {
                    // It may dirty its pages now as far as its gate goes: is it let on as well?
                    self.deferred.remove(at);
                    self.balance_dirty_pages(slot);
                }
                continue;
            }
            match self.try_begin_pages(slot) {
                Begun::Yes => drop(self.deferred.remove(at)),
                Begun::Discarding | Begun::Gated | Begun::ShareFull => at += 1,
                Begun::NoFrames if !self.gates.has_logs() => return,
                Begun::NoFrames => {
                    needed = needed.max(self.frames_needed);
                    at += 1;
                }
            }
        }
        self.frames_needed = self.frames_needed.max(needed);
    }

    fn try_begin_pages(&mut self, slot: SlotId) -> Begun {
        if self.is_given_up(slot) {
            return Begun::Yes;
        }
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
        if want == Want::Gather {
            return self.try_begin_gather(slot, &mapping);
        }
        if self.waits_for_discard(slot, &mapping) {
            return Begun::Discarding;
        }
        if self.exceeds_gate_bound(&mapping, first, count, want) {
            return self.wait_at_gate_bound(slot);
        }
        // Counted anew only where something was evicted since.
        let counted = Cell::new(Some(self.reshape(&mapping, first, count, want)));
        let missing =
            |shard: &Self| counted.take().unwrap_or_else(|| shard.missing(&mapping.shape, first, count));
        if !self.make_share_room(&mapping, missing) {
            return Begun::ShareFull;
        }
        // All frames at once, or none: a request never holds some while it waits for others.
        if !self.make_room(&mapping, missing) {
            return Begun::NoFrames;
        }
        self.frames_needed = 0;
        self.ticket(slot).begins_anew = false;
        self.install_missing(slot, &mapping, first, count, want);
        self.finish_if_complete(slot);
        Begun::Yes
    }

    /// Makes folios that are there fit what is wanted of them, unless somebody holds them just now: a pin is of one block
    /// only, since whoever holds one must be able to ask for the next; and where the rest of a folio is wanted that was
    /// never filled, that rest goes. Returns how many blocks are not in the cache then.
    pub(super) fn reshape(&mut self, mapping: &OpenMapping, first: u64, count: u32, want: Want) -> usize {
        let shape = &mapping.shape;
        let mut missing = 0;
        let mut page = first;
        while page < first + u64::from(count) {
            if let Some(frame) = self.cache.find(shape, page) {
                let place = self.cache.shared.place(frame);
                let folio = self.cache.shared.folio(place.head);
                let filled = folio.state().filled();
                let unfilled = filled > 0 && place.within >= filled;
                let appends = unfilled && want == Want::Create && place.within == filled;
                let too_large = want.is_pin() && place.order > shape.order;
                if (unfilled && !appends || too_large) && folio.freeze_for_removal() {
                    self.restart_waiters(place.head);
                    // What is filled may have grown before it was frozen.
                    if place.within >= self.cache.shared.folio(place.head).state().filled() {
                        self.cache.trim(shape, place.head);
                    } else {
                        self.cache.isolate(shape, place.head, page, shape.order);
                    }
                    bump(&self.link.counters.folios_split, 1);
                    missing += usize::from(self.cache.find(shape, page).is_none());
                }
            } else {
                missing += 1;
            }
            page += shape.order.pages();
        }
        missing
    }

    /// Blocks of the range that are not in the cache.
    fn missing(&self, shape: &MappingShape, first: u64, count: u32) -> usize {
        let blocks = (first..first + u64::from(count)).step_by(shape.order.pages() as usize);
        blocks.filter(|&page| self.cache.find(shape, page).is_none()).count()
    }

    /// Makes room for the blocks that `missing` counts.
    pub(super) fn make_room(&mut self, mapping: &OpenMapping, missing: impl Fn(&Self) -> usize) -> bool {
        let (shape, kept) = (&mapping.shape, self.frames_kept_from(mapping));
        let block = shape.order.pages() as usize;
        for _ in 0..2 {
            let missing = missing(self);
            if self.has_room(shape, missing, kept) {
                return true;
            }
            // Evicting may hit a page of this very range, hence the second count.
            self.frames_needed = missing * block + kept;
            self.evict_on_demand((shape.order, missing + kept.div_ceil(block)), EVICT_STEPS);
        }
        self.has_room(shape, missing(self), kept)
    }

    /// Whether `blocks` blocks can be installed so that `kept` frames stay free.
    fn has_room(&self, shape: &MappingShape, blocks: usize, kept: usize) -> bool {
        let frames = blocks * shape.order.pages() as usize + kept;
        blocks == 0
            || self.cache.has_room(shape.order, blocks)
                && self.cache.free_frames() >= frames
                && (kept == 0 || self.spares_reserve(shape.order, blocks))
    }

    fn install_missing(&mut self, slot: SlotId, mapping: &OpenMapping, first: u64, count: u32, want: Want) {
        let shape = &mapping.shape;
        let end = first + u64::from(count);
        let mut run: Option<FolioRun> = None;
        let mut page = first;
        while page < end {
            let position = (page - first) as usize;
            if let Some(frame) = self.cache.find(shape, page) {
                page += self.join_present(slot, position, shape, frame, want, end - page);
                continue;
            }
            // Evicting may have hit a page that seemed to be there when the writer was let on: it asks for that again.
            let end = end.min(page + self.ticket(slot).creatable(shape));
            if page == end {
                page += shape.order.pages();
                continue;
            }
            let order = self.order_for_new(shape, page, end, want);
            let pages = order.pages().min(end - page);
            let rank = self.count_refault(shape, page, pages);
            let head =
                self.cache.install(shape, page, (order, rank)).expect("room was made for every missing page");
            let folio = self.cache.shared.folio(head);
            if want == Want::Create {
                folio.publish_exclusive();
                self.ticket(slot).grant(position, head, pages);
                bump(&self.link.counters.pages_created, pages);
            } else {
                folio.publish();
                self.park_new(slot, position, head, pages, want);
                if let Some(full) = run.take_if(|run| run.room_for(shape, page, pages) < pages) {
                    self.reads.push_back(full);
                }
                run.get_or_insert_with(|| self.runs.start(shape, page)).append(shape, page, head, pages);
            }
            bump(&self.link.counters.folios_installed, 1);
            page += pages;
        }
        if let Some(run) = run {
            self.reads.push_back(run);
        }
    }

    /// What a folio has proven that will be installed for somebody who wants its `pages` pages from `first` on.
    pub(super) fn count_refault(&mut self, shape: &MappingShape, first: u64, pages: u64) -> Rank {
        let (rank, refaults) = self.cache.refault(shape, first, pages);
        if refaults > 0 {
            bump(&self.link.counters.refaults, refaults * shape.order.pages());
            let hot = if rank.is_active() { refaults } else { 0 };
            bump(&self.link.counters.refaults_hot, hot * shape.order.pages());
        }
        rank
    }

    /// Parks a request on a folio that is being read in for it.
    fn park_new(&mut self, slot: SlotId, position: usize, head: FrameId, pages: u64, want: Want) {
        // One page is one hold, of a block; what is to be copied is granted page by page.
        let positions = if want == Want::Fill { pages as usize } else { 1 };
        for at in position..position + positions {
            self.park(slot, at, head);
        }
    }

    /// How large the folio shall be that begins at `page`, which is missing: a block where it will be pinned, else as
    /// large as the missing part of the request allows, and larger than that for a writer who appends.
    pub(super) fn order_for_new(
        &mut self,
        shape: &MappingShape,
        page: u64,
        end: u64,
        want: Want,
    ) -> FolioOrder {
        if want.is_single() {
            return shape.order;
        }
        let mut vacant = shape.order.pages();
        while page + vacant < end && self.cache.find(shape, page + vacant).is_none() {
            vacant += shape.order.pages();
        }
        // A folio is read in by one command, or a block by as few as can be.
        let wanted = match want {
            Want::Create => self.appends.order(shape, self.cache.shard, page, vacant),
            _ => FolioOrder::fitting(page, vacant.min(shape.command_pages_max(page))),
        };
        let mut order = wanted.max(shape.order);
        while order > shape.order
            && !(self.affords(shape, page, order) && self.share_affords(shape, order, vacant))
        {
            order = FolioOrder(order.0 - 1);
        }
        if want == Want::Create {
            self.appends.installed(shape, page, order);
        }
        order
    }

    /// Whether a folio larger than what is needed can be had without harm: its place is vacant, and frames are plenty.
    fn affords(&self, shape: &MappingShape, page: u64, order: FolioOrder) -> bool {
        let plenty = 4 * order.pages() as usize + GRANTS_MAX + self.frames_reserved();
        self.cache.is_vacant(shape, page, order.pages())
            && self.cache.has_room(order, 1)
            && self.spares_reserve(order, 1)
            && self.cache.has_room(shape.order, plenty / shape.order.pages() as usize)
    }

    /// A page that is in the cache already, or on its way. Returns how many pages that settles.
    pub(super) fn join_present(
        &mut self,
        slot: SlotId,
        position: usize,
        shape: &MappingShape,
        frame: FrameId,
        want: Want,
        rest: u64,
    ) -> u64 {
        let place = self.cache.shared.place(frame);
        let state = self.cache.shared.folio(place.head).state();
        match want {
            // The page that an appending writer comes to next.
            Want::Create if state.filled() > 0 && state.filled() == place.within => {
                let pages =
                    rest.min(place.order.pages() - place.within).min(self.ticket(slot).creatable(shape));
                let cache = &self.cache.shared;
                if pages > 0
                    && cache.writable_pages(frame, place, (pages, Stability::Stable)) == pages
                    && cache.folio(place.head).grant_append(place.within)
                {
                    self.ticket(slot).grant(position, frame, pages);
                    bump(&self.link.counters.pages_created, pages);
                    return pages;
                }
            }
            Want::Create => {}
            // On its way from the device: share that read. Being filled by a writer, or there: not granted.
            Want::Fill | Want::Gather if state.filled() > 0 || state.exclusive() => {}
            Want::Fill | Want::Gather => {
                self.park(slot, position, place.head);
                return 1;
            }
            Want::Copy | Want::Change | Want::ChangeBesideDevice | Want::Pin | Want::PinMut => {
                self.park(slot, position, place.head);
                self.serve(place.head);
            }
        }
        shape.order.pages()
    }

    pub(super) fn ticket(&mut self, slot: SlotId) -> &mut Ticket {
        self.tickets[slot.0 as usize].as_mut().expect("a request in service has its ticket")
    }

    /// Appends to the folio's parked list.
    pub(super) fn park(&mut self, slot: SlotId, position: usize, head: FrameId) {
        self.ticket(slot).pending += 1;
        self.parked.park(head, slot, position);
        let folio = self.cache.shared.folio(head);
        // The end of a read serves whoever waits for it; holders have to be asked to kick.
        let state = folio.state();
        if state.filled() > 0 || state.exclusive() {
            self.watch_folio(head);
        }
    }

    /// From now on every release of the folio of `frame` kicks the shard. True when it is news: the caller then looks at
    /// the folio once more, since a release may just have passed by.
    pub(super) fn watch_folio(&mut self, frame: FrameId) -> bool {
        let head = self.cache.shared.place(frame).head;
        if self.watched.contains(&head) {
            return false;
        }
        self.cache.shared.folio(head).announce_waiters();
        self.watched.push(head);
        true
    }

    /// Serves the folios whose holders released them, and frees what a dropped request left unfilled.
    pub(super) fn serve_releases(&mut self) -> bool {
        if !self.link.take_kick() {
            return false;
        }
        while let Some(head) = self.link.take_orphan() {
            self.free_orphan(head);
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

    /// A folio was made for a writer who went away before it wrote anything.
    fn free_orphan(&mut self, head: FrameId) {
        let cache = self.cache.shared.clone();
        let folio = cache.folio(head);
        let mapping = self.mapping(folio.key().mapping()).expect("an orphan's mapping is open");
        if folio.freeze_orphan() {
            self.restart_waiters(head);
            self.cache.release(&mapping.shape, head);
        } else {
            let _ = folio.release_exclusive_unchanged();
            self.serve(head);
        }
    }

    /// A folio of one page has been read, for which one request alone waits that wants to share it, as is mostly so: it is
    /// filled and granted by one change of its state. False where that isn't so, or more is to be looked at.
    pub(super) fn fill_for_one(&mut self, head: FrameId) -> bool {
        let folio = self.cache.shared.folio(head);
        if folio.order() != FolioOrder(0) {
            return false;
        }
        let tickets = &self.tickets;
        let parked = self.parked.unpark_only(head, |slot| {
            let ticket = tickets[slot.0 as usize].as_ref().expect("a request in service has its ticket");
            ticket.want.hold() == Hold::Shared && folio.fill_pinned()
        });
        let Some(Parked { slot, position, .. }) = parked else { return false };
        let ticket = self.ticket(slot);
        ticket.grant_single(usize::from(position), head);
        ticket.pending -= 1;
        if ticket.pending == 0 {
            self.finish_if_complete(slot);
        }
        true
    }

    /// Grants a folio to those who wait for it, in their order, as far as it can be granted now.
    pub(super) fn serve(&mut self, head: FrameId) {
        while let Some(Parked { slot, position, .. }) = self.parked.first(head) {
            let Ticket { want, first: first_page, mapping, .. } = *self.ticket(slot);
            let cache = &self.cache.shared;
            let folio = cache.folio(head);
            let page = match want {
                Want::Gather => self.link.replies.list(slot).page(usize::from(position)),
                _ => first_page + u64::from(position),
            };
            let within = page - folio.key().page();
            let frame = FrameId(head.0 + within as u32);
            let open = self.mappings[usize::from(mapping)].as_ref();
            let block = open.map_or(FolioOrder::MAX, |open| open.shape.order);
            let state = folio.state();
            // Not to be granted from this folio as it is: the request begins anew, when nobody has the folio.
            let too_large = want.is_pin() && folio.order() > block;
            let unfit = want.is_single() && state.filled() > 0 && (within >= state.filled() || too_large);
            let granted = match want {
                _ if unfit => false,
                Want::Fill | Want::Gather | Want::Copy | Want::Pin => folio.grant_pin(within),
                // A sync that waits for this page comes before the next writer, or it might never come (WB-03).
                Want::Change | Want::PinMut => {
                    !self.sync_waits_for(head)
                        && !cache.is_marked(frame, Tag::Writeback)
                        && folio.grant_exclusive(within)
                }
                Want::ChangeBesideDevice => {
                    !self.sync_waits_for(head)
                        && cache.writable_pages(frame, cache.place(frame), (1, Stability::Unstable)) > 0
                        && folio.grant_exclusive(within)
                }
                Want::Create => false,
            };
            // Who fills waits for I/O only: where a writer has come in between, it goes without this page.
            let goes_without = matches!(want, Want::Fill | Want::Gather) && state.filled() > 0;
            let restarts = unfit && !folio.is_held();
            if !granted && !goes_without && !restarts {
                // Whoever has it must kick; one that was parked while the folio was read in isn't announced yet. News?
                // Then the holder may have let go before it was asked: once more.
                if self.watch_folio(head) {
                    continue;
                }
                return;
            }
            if granted && folio.take_unused() {
                self.link.hits.first_use(folio.order().pages());
            }
            let _ = self.parked.unpark(head);
            let ticket = self.ticket(slot);
            if granted {
                ticket.grant_single(position as usize, frame);
            }
            ticket.pending -= 1;
            if restarts {
                self.begin_anew(slot);
            } else {
                self.finish_if_complete(slot);
            }
        }
        if !self.sync_waits_for(head) {
            self.unwatch_folio(head);
        }
    }

    /// Serves the folios of pages whose I/O ended, as far as requests, or a sync, wait for them. Mostly none is.
    pub(super) fn serve_waiters_of(&mut self, mapping: u16, pages: Range<u64>) {
        let mut at = self.watched.len();
        while at > 0 {
            at -= 1;
            let Some(&head) = self.watched.get(at) else { continue };
            let folio = self.cache.shared.folio(head);
            let (key, order) = (folio.key(), folio.order());
            let concerned = key.mapping() == mapping
                && key.page() < pages.end
                && pages.start < key.page() + order.pages();
            if concerned {
                self.serve(head);
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
        while let Some(parked) = self.parked.unpark(frame) {
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
        self.cache.shared.folio(frame).freeze_unfilled();
        self.cache.release(&mapping.shape, frame);
    }

    /// A frozen folio leaves the cache: who waits for it begins anew.
    pub(super) fn restart_waiters(&mut self, frame: FrameId) {
        self.unpark_all(frame, |shard, slot| {
            debug_assert_eq!(
                shard.ticket(slot).pending,
                0,
                "who waits for a filled folio waits for it alone"
            );
            shard.begin_anew(slot);
        });
    }

    /// A request that waits for nothing any more, and has got nothing, is begun again in its turn.
    fn begin_anew(&mut self, slot: SlotId) {
        self.ticket(slot).begins_anew = true;
        self.deferred.push_back(slot);
    }

    pub(super) fn finish_if_complete(&mut self, slot: SlotId) {
        let Some(ticket) = &self.tickets[slot.0 as usize] else { return };
        // `try_begin_pages` finishes by itself what is complete at once.
        if ticket.pending > 0 || ticket.begins_anew {
            return;
        }
        if ticket.want.hold() == Hold::Shared {
            self.link.times.read_wait.record_alone(self.now_ns.saturating_sub(ticket.since_ns));
        }
        if let Some(error) = &ticket.error {
            let error = error.clone();
            self.link.give_back(&ticket.grants);
            self.tickets[slot.0 as usize] = None;
            return self.answer(slot, Err(error));
        }
        // Once from where they were collected to where they are read.
        let grants = &ticket.grants;
        self.in_service_count -= usize::from(std::mem::take(&mut self.in_service[slot.0 as usize]));
        let left = self.link.replies.answer_in_place(slot, |place| *place = Some(Ok(grants.clone())));
        if let Some(Ok(grants)) = left {
            self.link.give_back(&grants);
        }
        self.tickets[slot.0 as usize] = None;
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
                let (number, page) = (ticket.mapping, ticket.first);
                let discarded =
                    self.mapping(number).is_ok_and(|mapping| self.waits_for_discard(slot, &mapping));
                self.deferred.remove(at);
                self.tickets[slot.0 as usize] = None;
                if discarded {
                    self.answer(slot, Err(Error::PinnedTooLong { page, waited }));
                    continue;
                }
                if let Some(error) = self.share_full(number, waited) {
                    self.answer(slot, Err(error));
                    continue;
                }
                let frames = self.cache.shared.headers.len();
                let cause = self.write_error.clone().or_else(|| self.gate_cause(waited)).map(Box::new);
                self.answer(slot, Err(Error::CacheFull { waited, frames, cause }));
            } else if ticket.want.is_single() {
                let (number, page) = (ticket.mapping, ticket.first);
                let frame = self.mapping(number).ok().and_then(|open| self.cache.find(&open.shape, page));
                let gated = frame.and_then(|frame| self.gate_keeping(frame, waited));
                self.give_up_waiting(slot, gated.unwrap_or(Error::PinnedTooLong { page, waited }));
            }
        }
        self.check_throttled();
        self.check_pass_deadlines(waited);
    }

    /// Takes a request for one page off the folio that others hold. One that waits for the device goes on
    /// waiting: the device has a deadline of its own.
    fn give_up_waiting(&mut self, slot: SlotId, error: Error) {
        let (number, page) = (self.ticket(slot).mapping, self.ticket(slot).first);
        let Ok(mapping) = self.mapping(number) else { return };
        let Some(frame) = self.cache.find(&mapping.shape, page) else { return };
        let frame = self.cache.shared.place(frame).head;
        let folio = self.cache.shared.folio(frame);
        let under_writeback = self.cache.shared.is_any_marked(frame, Tag::Writeback);
        if folio.state().filled() == 0 && !folio.state().exclusive() || under_writeback {
            return;
        }
        if self.parked.unpark_slot(frame, slot).is_none() {
            return;
        }
        let ticket = self.ticket(slot);
        ticket.pending -= 1;
        ticket.error = Some(error);
        self.finish_if_complete(slot);
        // The next in line may be grantable, and a list that became empty is no longer watched.
        self.serve(frame);
    }
}
