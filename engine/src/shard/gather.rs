//! Requests for scattered pages: a batch comes as one message, a chain of reply slots with a list of pages each
//! ([`PageList`](crate::page_list::PageList)), and is with the device at one doorbell.
//!
//! Each slot is a request by itself: it takes all frames that it lacks or none, waits for I/O only, and is answered as soon
//! as its own pages are there. So a batch larger than the cache passes through it in pieces, and the pieces never wait
//! for each other while they hold something.

use super::Shard;
use super::open::OpenMapping;
use super::pages::{Begun, Ticket};
use super::payload::FolioRun;
use super::request::{Pacing, Want};
use crate::cache::shape::MappingShape;
use crate::page_list::PageList;
use crate::reply::{GRANTS_MAX, SlotId};
use crate::stats::bump;

// The places of a list are the bits of a word.
const _: () = assert!(GRANTS_MAX <= u32::BITS as usize);

impl Shard {
    /// A batch has come: begins all of it.
    pub(super) fn receive_gather(&mut self, first: SlotId, mapping: u16) {
        let link = self.link.clone();
        let mut at = Some(first);
        while let Some(slot) = at {
            let list = link.replies.list(slot);
            // An answered slot may be somebody else's at once.
            at = list.next();
            if !std::mem::replace(&mut self.in_service[slot.0 as usize], true) {
                self.in_service_count += 1;
            }
            let (page, count) = (list.page(0), list.len() as u32);
            let ticket = Ticket::new(mapping, page, count, Want::Gather, Pacing::Wait, self.now_ns);
            self.tickets[slot.0 as usize] = Some(ticket);
            self.begin_pages(slot);
        }
    }

    /// As [`try_begin_pages`](Self::try_begin_pages), of a list.
    pub(super) fn try_begin_gather(&mut self, slot: SlotId, mapping: &OpenMapping) -> Begun {
        if self.waits_for_discard(slot, mapping) {
            return Begun::Discarding;
        }
        let link = self.link.clone();
        let (list, shape) = (link.replies.list(slot), &mapping.shape);
        let mut absent = self.reshape_listed(mapping, list);
        let released = self.cache.released;
        // Looked up anew only where something was evicted since.
        let missing = |shard: &Self| match shard.cache.released == released {
            true => absent.count_ones() as usize,
            false => shard.absent(shape, list).count_ones() as usize,
        };
        if !self.make_share_room(mapping, missing) {
            return Begun::ShareFull;
        }
        if !self.make_room(mapping, missing) {
            return Begun::NoFrames;
        }
        if self.cache.released != released {
            absent = self.absent(shape, list);
        }
        self.frames_needed = 0;
        self.ticket(slot).begins_anew = false;
        let mut run: Option<FolioRun> = None;
        let (block, mut folios) = (shape.order.pages(), 0);
        for (position, page) in list.pages().enumerate() {
            // What was there may have gone with the rest of a folio that wasn't filled, when its holder let go of it.
            let found = if absent >> position & 1 == 0 { self.cache.find(shape, page) } else { None };
            if let Some(frame) = found {
                self.join_present(slot, position, shape, frame, Want::Gather, block);
                continue;
            }
            let rank = self.count_refault(shape, page, block);
            let installed = self.cache.install(shape, page, (shape.order, rank));
            let head = installed.expect("room was made for every missing page");
            self.cache.shared.folio(head).publish();
            folios += 1;
            self.ticket(slot).pending += 1;
            self.parked.park(head, slot, position);
            if let Some(full) = run.take_if(|run| run.room_for(shape, page, block) < block) {
                self.reads.push_back(full);
            }
            run.get_or_insert_with(|| self.runs.start(shape, page)).append(shape, page, head, block);
        }
        bump(&self.link.counters.folios_installed, folios);
        if let Some(run) = run {
            self.reads.push_back(run);
        }
        self.finish_if_complete(slot);
        Begun::Yes
    }

    /// As [`reshape`](Self::reshape), of a list. Returns the places of the pages that are not in the cache then, of a page that is
    /// listed twice the first.
    fn reshape_listed(&mut self, mapping: &OpenMapping, list: &PageList) -> u32 {
        let (mut last, mut absent) = (None, 0);
        let mut touched = 0;
        for (position, page) in list.pages().enumerate() {
            if last.replace(page) != Some(page) {
                // Mostly it isn't there, and has no shape.
                let is_absent = self.cache.find(&mapping.shape, page).is_none()
                    || self.reshape(mapping, page, 1, Want::Gather) > 0;
                absent |= u32::from(is_absent) << position;
                touched |= self.cache.touch(&mapping.shape, page);
            }
        }
        std::hint::black_box(touched);
        absent
    }

    /// The places in a list of pages that are not in the cache, of a page that is listed twice the first.
    fn absent(&self, shape: &MappingShape, list: &PageList) -> u32 {
        let (mut last, mut absent) = (None, 0);
        for (position, page) in list.pages().enumerate() {
            let is_absent = last.replace(page) != Some(page) && self.cache.find(shape, page).is_none();
            absent |= u32::from(is_absent) << position;
        }
        absent
    }

    /// Whether a discard goes on in what a request names.
    pub(super) fn waits_for_discard(&self, slot: SlotId, mapping: &OpenMapping) -> bool {
        let Some(ticket) = &self.tickets[slot.0 as usize] else { return false };
        let shape = &mapping.shape;
        self.discards.iter().any(|job| match ticket.want {
            Want::Gather => {
                let mut pages = self.link.replies.list(slot).pages();
                pages.any(|page| job.overlaps(shape, page..page + shape.order.pages()))
            }
            _ => job.overlaps(shape, ticket.first..ticket.first + u64::from(ticket.count)),
        })
    }
}
