//! A shard's syncs: what waits, and when it is answered. How they issue is told in [`crate::writeback::sync`].

use std::ops::Range;

use super::Shard;
use crate::error::Error;
use crate::reply::{Grants, SlotId};
use crate::writeback::control::Reason;
use crate::writeback::events;
use crate::writeback::sync::{Stage, SyncJob};

impl Shard {
    pub(super) fn begin_sync(&mut self, slot: SlotId, number: u16, pages: Range<u64>) {
        match self.mapping(number) {
            Err(error) => self.answer(slot, Err(error)),
            Ok(mapping) => {
                events::sync_file_enter(self.link.shard, &mapping.shape, slot.0, &pages, self.now_ns);
                let range = mapping.shape.striping.local_range(self.cache.shard, pages);
                let mut job = SyncJob::new(slot, number, range);
                job.cap = self.cache.shared.lsns.highest(number);
                self.syncs.push(job);
            }
        }
    }

    /// Brings every sync as far as it can go now, and with them all passes more urgent than the flusher.
    pub(super) fn step_syncs(&mut self) -> bool {
        if self.syncs.is_empty() && self.passes.is_empty() {
            return false;
        }
        self.merge_waiting_syncs();
        let mut progressed = self.step_passes(self.flusher.priority()..=u8::MAX);
        if self.syncs.is_empty() {
            return progressed;
        }
        self.update_syncs();
        self.part_gated_syncs();
        let mut jobs = std::mem::take(&mut self.syncs);
        jobs.retain_mut(|job| {
            let is_done = match self.mapping(job.mapping) {
                Ok(mapping) => job.is_done(&self.cache, &mapping.shape),
                Err(_) => {
                    job.error = Some(Error::Closed);
                    true
                }
            };
            if is_done {
                progressed = true;
                let (number, error) = (job.mapping, job.error.as_ref());
                events::sync_file_exit(self.link.shard, number, job.slot.0, error, self.now_ns);
                let reply = job.result().map(Grants::of_pass);
                self.answer(job.slot, reply);
            }
            !is_done
        });
        // A sync that left its pass waits for the next step.
        progressed |= jobs.iter().any(|job| job.stage == Stage::Waiting);
        self.syncs = jobs;
        progressed
    }

    /// Passes that are no more urgent than the flusher's, after it.
    pub(super) fn step_patient_passes(&mut self) -> bool {
        let urgent = self.flusher.priority();
        !self.passes.is_empty() && urgent > Reason::Poisoned.priority() && self.step_passes(0..=urgent - 1)
    }
}
