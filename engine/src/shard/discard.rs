//! Dropping ranges of a mapping: `discard`, truncation, and the end of `close`.
//!
//! First the cached folios go, each once nobody holds it and the device doesn't write it (WB-26); then the
//! range is zeroed on the device, but for truncation. Requests for pages of the range wait until all of that is over, so that no
//! new folio can be overtaken by the zeroes.

use std::ops::Range;

use foliant_nvme::{CommandError, Deallocation, Fua, Io};

use super::Shard;
use super::gates::Stopped;
use super::open::OpenMapping;
use super::payload::{PayloadKind, ShardPayload};
use crate::cache::MAPPINGS_MAX;
use crate::cache::folio::FrameId;
use crate::cache::shape::MappingShape;
use crate::cache::tags::{Find, Tag};
use crate::error::{Error, Operation};
use crate::reply::{Grants, SlotId};
use crate::stats::bump;
use crate::writeback::control::Reason;
use crate::writeback::events::{self, Op};

/// Blocks that one Write Zeroes command can name: a 16-bit zero-based count.
pub(super) const ZERO_BLOCKS_MAX: u64 = 1 << 16;

/// Folios dropped in a step: the core is given back in between.
const STEP_FOLIOS: u32 = 1024;

/// How far a step dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dropped {
    /// Some; there may be more.
    Some,
    /// All of the job's range.
    All,
}

/// What is removed, and what becomes of it on the device.
#[derive(Debug)]
pub(crate) enum Removal {
    /// The whole mapping is closed; nothing dirty is thrown away.
    Close,
    /// These pages, which read as zeros afterwards.
    Discard(Range<u64>),
    /// These pages, which lie behind the mapping's end.
    Truncate(Range<u64>),
}

/// A discard, a truncation, or the closing of a mapping, in progress.
#[derive(Debug)]
pub(crate) struct DiscardJob {
    pub slot: SlotId,
    pub mapping: u16,
    /// Shard-local pages whose folios are still to be dropped.
    drop_rest: Range<u64>,
    /// It begins when the earlier jobs in its range have ended: one of them may have been given up by who asked for it.
    is_truncation: bool,
    /// Shard-local pages still to be zeroed, none for a truncation; `None` for a close.
    zero_rest: Option<Range<u64>>,
    /// File pages of the whole job.
    pages: Range<u64>,
    in_flight: u32,
    /// Others come first in this step.
    waits: bool,
    /// The same on the mirror, where there is one.
    pub mirror_rest: Range<u64>,
    pub mirror_in_flight: u32,
    error: Option<Error>,
    since_ns: u64,
}

impl DiscardJob {
    /// Whether requests for `pages` must wait.
    pub(crate) fn overlaps(&self, shape: &MappingShape, pages: Range<u64>) -> bool {
        shape.slot == self.mapping && pages.start < self.pages.end && self.pages.start < pages.end
    }

    /// Whether both concern the same pages.
    fn meets(&self, other: &Self) -> bool {
        let (mine, others) = (&self.pages, &other.pages);
        self.mapping == other.mapping && mine.start < others.end && others.start < mine.end
    }
}

impl Shard {
    /// Begins the removal of pages.
    pub(super) fn begin_discard(&mut self, slot: SlotId, number: u16, removal: Removal) {
        let mapping = match self.mapping(number) {
            Ok(mapping) => mapping,
            Err(error) => return self.answer(slot, Err(error)),
        };
        let is_truncation = matches!(removal, Removal::Truncate(_));
        let (range, zeroed) = match removal {
            Removal::Close => (0..mapping.shape.pages(), None),
            Removal::Discard(pages) => (pages.clone(), Some(pages)),
            Removal::Truncate(pages) => (pages.clone(), Some(pages.end..pages.end)),
        };
        let striping = mapping.shape.striping;
        let local = striping.local_range(self.cache.shard, range.clone());
        self.discards.push(DiscardJob {
            slot,
            mapping: number,
            drop_rest: local,
            is_truncation,
            mirror_rest: match (&zeroed, &mapping.mirror) {
                (Some(pages), Some(_)) => striping.local_range(self.cache.shard, pages.clone()),
                _ => 0..0,
            },
            mirror_in_flight: 0,
            zero_rest: zeroed.map(|pages| striping.local_range(self.cache.shard, pages)),
            pages: range,
            in_flight: 0,
            waits: false,
            error: None,
            since_ns: self.now_ns,
        });
    }

    pub(super) fn step_discards(&mut self) -> bool {
        if self.discards.is_empty() {
            return false;
        }
        let mut progressed = false;
        let mut jobs = std::mem::take(&mut self.discards);
        // A mapping is closed after its discards have ended: their commands name the device, not the mapping.
        let mut discarding = [false; MAPPINGS_MAX];
        jobs.iter()
            .filter(|job| job.zero_rest.is_some())
            .for_each(|job| discarding[job.mapping as usize] = true);
        for at in 0..jobs.len() {
            let (earlier, rest) = jobs.split_at_mut(at);
            let job = &mut rest[0];
            job.waits = match job.zero_rest {
                None => discarding[job.mapping as usize],
                Some(_) => job.is_truncation && earlier.iter().any(|other| other.meets(job)),
            };
            if job.waits {
                job.since_ns = self.now_ns;
            }
        }
        jobs.retain_mut(|job| {
            let ended = !job.waits && self.step_discard(job);
            if ended {
                progressed = true;
                self.end_discard(job);
            }
            !ended
        });
        jobs.append(&mut self.discards);
        self.discards = jobs;
        progressed
    }

    fn step_discard(&mut self, job: &mut DiscardJob) -> bool {
        let Ok(mapping) = self.mapping(job.mapping) else {
            job.error = Some(Error::Closed);
            return true;
        };
        let held = match self.drop_folios(&mapping, job) {
            Ok(Dropped::All) => None,
            Ok(Dropped::Some) => return false,
            Err(held) => Some(held),
        };
        if let Some(held) = held {
            // What was dirtied after the closer's sync is written, not thrown away.
            let head = self.cache.shared.place(held).head;
            if job.zero_rest.is_none() && self.cache.shared.is_any_marked(head, Tag::Dirty) {
                self.write_range(&mapping, Reason::Close, job.drop_rest.clone());
            }
            let waits = self.now_ns.saturating_sub(job.since_ns) <= self.limits.pin_wait_ns;
            let error = match self.gate_stops(&mapping, held, &job.drop_rest, job.since_ns) {
                Stopped::Waits => return false,
                Stopped::No if waits => return false,
                Stopped::TooLong(error) => error,
                Stopped::No => {
                    let page = self.cache.shared.folio(held).key().page();
                    let waited = std::time::Duration::from_nanos(self.limits.pin_wait_ns);
                    // Nobody holds a page that stays at a close since it can't be written: its error is the reason. Who
                    // throws pages away needs no write.
                    let unwritten =
                        job.zero_rest.is_none() && self.cache.shared.is_marked(held, Tag::Poisoned);
                    let unwritable = self.write_error.clone().filter(|_| unwritten);
                    unwritable.unwrap_or(Error::PinnedTooLong { page, waited })
                }
            };
            job.error = Some(error);
            // Pages whose folios are gone already must not read as what the device has of them: they are zeroed.
            let Some(zero_rest) = &mut job.zero_rest else { return true };
            zero_rest.end = job.drop_rest.start;
            job.mirror_rest.end = job.mirror_rest.end.min(zero_rest.end).max(job.mirror_rest.start);
            job.drop_rest.end = job.drop_rest.start;
        }
        let device_failed =
            matches!(job.error, Some(Error::Device { operation: Operation::WriteZeroes, .. }));
        if self.is_copying(job.mapping, &job.pages) {
            return false;
        }
        if !device_failed {
            self.submit_zeroes(&mapping.shape, job);
        }
        self.submit_mirror_zeroes(&mapping, job);
        let all_submitted = device_failed || job.zero_rest.as_ref().is_none_or(Range::is_empty);
        all_submitted && job.in_flight == 0 && job.mirror_rest.is_empty() && job.mirror_in_flight == 0
    }

    /// Drops cached folios of the job's range; the one that is held stops it.
    fn drop_folios(&mut self, open: &OpenMapping, job: &mut DiscardJob) -> Result<Dropped, FrameId> {
        let shape = &open.shape;
        let mut dropped = 0;
        while let Some(leaf) = self.cache.tree.next(shape.tree, Find::Present, job.drop_rest.clone()) {
            let local = leaf.base + u64::from(leaf.pages.trailing_zeros());
            let page = shape.striping.page(self.cache.shard, local);
            let frame = self.cache.find(shape, page).expect("a present page is indexed");
            let cache = self.cache.shared.clone();
            let place = cache.place(frame);
            let folio = cache.folio(place.head);
            let closing = job.zero_rest.is_none();
            // What the device reads stays until it has done so (WB-26), and so does what is behind a gate; a close throws
            // nothing dirty away.
            let stays = || {
                cache.is_any_marked(place.head, Tag::Writeback)
                    || closing && cache.is_any_marked(place.head, Tag::Dirty)
                    || open.gates.gate.is_some()
                        && open.gates.keeps(cache.highest_dirty(place.frames_in(local, &job.drop_rest)))
            };
            let mut frozen = !stays() && folio.freeze_for_removal();
            if frozen && stays() {
                folio.thaw();
                frozen = false;
            }
            if !frozen {
                // News? Then its holder may have let go before it was asked to kick: once more.
                if self.watch_folio(frame) {
                    continue;
                }
                return Err(frame);
            }
            self.restart_waiters(place.head);
            // A folio that reaches beyond the range stays with that part.
            let (first, end) = (local - place.within, local - place.within + place.order.pages());
            if first < job.drop_rest.start && place.within > 0 {
                self.cache.isolate(shape, place.head, page, shape.order);
                continue;
            }
            if end > job.drop_rest.end {
                let beyond = page + (job.drop_rest.end - local);
                self.cache.isolate(shape, place.head, beyond, shape.order);
                continue;
            }
            bump(&self.link.counters.pages_discarded, self.cache.untag_dirty(shape, place.head));
            self.cache.release(shape, place.head);
            job.drop_rest.start = end;
            dropped += 1;
            if dropped == STEP_FOLIOS {
                return Ok(Dropped::Some);
            }
        }
        job.drop_rest.start = job.drop_rest.end;
        Ok(Dropped::All)
    }

    fn submit_zeroes(&mut self, shape: &MappingShape, job: &mut DiscardJob) {
        let Some(rest) = &mut job.zero_rest else { return };
        let pages_max = (ZERO_BLOCKS_MAX * u64::from(shape.namespace.block_bytes()) / 4096).max(1);
        self.reads_yield |= !rest.is_empty() && self.queue.free_commands() == 0;
        while !rest.is_empty() && self.queue.free_commands() > 0 {
            let first = shape.striping.page(self.cache.shard, rest.start);
            let stripe_end = shape.striping.run_end(first);
            let count = (rest.end - rest.start).min(stripe_end - first).min(pages_max);
            let (lba, blocks) = (shape.lba(first), shape.blocks(&(first..first + count)));
            let zeroes = Io::WriteZeroes { lba, blocks, fua: Fua::No, deallocation: Deallocation::Allow };
            let payload = ShardPayload::new(PayloadKind::Zero { slot: job.slot }, &self.watch);
            match self.queue.submit(&shape.namespace, zeroes, payload) {
                Ok(()) => {
                    events::block_rq_issue(
                        self.link.shard,
                        Op::WriteZeroes,
                        shape,
                        &(first..first + count),
                        self.now_ns,
                    );
                    rest.start += count;
                    job.in_flight += 1;
                    self.watch.submitted();
                    bump(&self.link.counters.zero_commands, 1);
                }
                Err(rejected) => {
                    if !matches!(rejected.reason, foliant_nvme::SubmitError::Full) {
                        self.link.fail(&format!("write zeroes was refused: {}", rejected.reason));
                    }
                    return;
                }
            }
        }
    }

    pub(super) fn zero_completed(&mut self, slot: SlotId, result: Result<(), CommandError>) {
        let Some(job) = self.discards.iter_mut().find(|job| job.slot == slot) else { return };
        job.in_flight -= 1;
        if let Err(source) = result {
            let offset = job.pages.start * 4096;
            // This one is the caller's to mend, whatever else went wrong.
            if !matches!(job.error, Some(Error::Device { .. })) {
                job.error = Some(Error::Device { operation: Operation::WriteZeroes, offset, source });
            }
        }
        if let Some(mapping) = &self.mappings[job.mapping as usize] {
            mapping.durability.write_completed();
        }
    }

    /// Ends what still waits for a mapping that is closed: its slot may be another mapping's in the next step.
    fn end_requests_of(&mut self, mapping: u16) {
        for slot in 0..self.tickets.len() {
            if self.tickets[slot].as_ref().is_some_and(|ticket| ticket.mapping == mapping) {
                let slot = SlotId(slot as u32);
                self.deferred.retain(|&deferred| deferred != slot);
                self.throttled.retain(|&throttled| throttled != slot);
                self.tickets[slot.0 as usize] = None;
                self.answer(slot, Err(Error::Closed));
            }
        }
        while let Some(at) = self.syncs.iter().position(|job| job.mapping == mapping) {
            let job = self.syncs.remove(at);
            events::sync_file_exit(self.link.shard, mapping, job.slot.0, Some(&Error::Closed), self.now_ns);
            self.answer(job.slot, Err(Error::Closed));
        }
        self.end_drops_of(mapping);
        // Passes that were asked for end by themselves in the next step: their mapping isn't open any more.
        for pass in &mut self.passes {
            pass.end_if_of(mapping);
        }
    }

    fn end_discard(&mut self, job: &mut DiscardJob) {
        if job.zero_rest.is_none() && job.error.is_none() {
            if let Some(mapping) = self.mappings[job.mapping as usize].take() {
                self.gates_closed(&mapping);
                if let Some(mirror) = &mut self.mirror {
                    mirror.unmap(job.mapping);
                }
            }
            self.open.retain(|open| open.slot != job.mapping);
            self.flusher.stop(self.now_ns);
            self.end_requests_of(job.mapping);
            debug_assert_eq!(self.cache.shared.marked[job.mapping as usize].dirty(), 0);
        }
        let reply = match job.error.take() {
            None => Ok(Grants::none()),
            Some(error) => Err(error),
        };
        self.answer(job.slot, reply);
    }
}
