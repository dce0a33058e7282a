//! Requests for pages that nobody waits for any more: their futures were dropped.
//!
//! What such a request hasn't submitted isn't submitted: one that has nothing yet isn't begun, wherever it waits for its turn, and
//! a read that waits for room in the queue is taken back, unless somebody else has joined it. What is with the device
//! comes to its end, and stays in the cache. Pins that were granted meanwhile are given back by the answer that nobody takes
//! ([`ReplySlots::answer`](crate::reply::ReplySlots::answer)).

use super::Shard;
use super::payload::FolioRun;
use crate::cache::folio::FrameId;
use crate::error::Error;
use crate::reply::SlotId;
use crate::stats::bump;

impl Shard {
    /// Whether nobody waits any more for a request that has nothing yet. Then it is over.
    pub(super) fn is_given_up(&mut self, slot: SlotId) -> bool {
        let given_up = self.link.replies.is_abandoned(slot);
        if given_up {
            bump(&self.link.counters.requests_cancelled, 1);
            // A writer's reservation goes with it.
            self.tickets[slot.0 as usize] = None;
            self.answer(slot, Err(Error::Closed));
        }
        given_up
    }

    /// Takes back what was given up since the last step.
    pub(super) fn drop_cancelled(&mut self) {
        if !self.link.take_cancelled() {
            return;
        }
        let mut at = 0;
        while let Some(&slot) = self.deferred.get(at) {
            if self.is_given_up(slot) {
                self.deferred.remove(at);
            } else {
                at += 1;
            }
        }
        for _ in 0..self.reads.len() {
            let Some(run) = self.reads.pop_front() else { break };
            if run.folios().all(|head| self.is_wanted_by_nobody(head)) {
                self.take_read_back(run);
            } else {
                self.reads.push_back(run);
            }
        }
    }

    /// Whether all who wait for a folio have gone. A folio that nobody has waited for is none of them: it may be
    /// readahead that is tried again.
    fn is_wanted_by_nobody(&self, head: FrameId) -> bool {
        self.parked.first(head).is_some()
            && self.parked.waiters(head).all(|slot| self.link.replies.is_abandoned(slot))
    }

    fn take_read_back(&mut self, run: FolioRun) {
        let mapping = self.mapping(run.mapping).expect("a folio being read keeps its mapping open");
        for head in run.folios() {
            self.abandon_read(&mapping, head, &Error::Closed);
        }
        bump(&self.link.counters.requests_cancelled, 1);
        self.runs.end(run);
    }
}
