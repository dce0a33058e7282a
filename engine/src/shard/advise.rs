//! What shards make of hints: pages that aren't needed any more go, and those that are read once go first.
//!
//! **Dropping a range** ([`Advice::DontNeed`](crate::Advice::DontNeed)) goes over its pages once, a bounded number a step.
//! Clean folios are evicted, without a shadow entry; a dirty one is written, with what is dirty behind it, and awaited, up to
//! `pin_wait`. What somebody holds, waits for its log or can't be written is passed by. Nobody waits for the range
//! meanwhile: a page that is read again while it is dropped comes back.
//!
//! **Pages read once** ([`Advice::NoReuse`](crate::Advice::NoReuse)) are named by their readers, after they have been copied or
//! pinned, in a box that never makes anybody wait. The shard takes their use off them and keeps them in a line of its own:
//! whoever needs frames gets theirs first, the oldest before the others. Who uses one a second time takes it out of that, since
//! it is referenced then. The line is bounded: what is pushed out at its front is evicted at once, so that a scan doesn't fill
//! a cache that has room either.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::Shard;
use super::open::OpenMapping;
use crate::cache::folio::{FolioKey, FolioOrder, FrameId};
use crate::cache::owned::Remembered;
use crate::cache::tags::{Find, Tag};
use crate::error::Error;
use crate::reply::{Grants, SlotId};
use crate::writeback::control::Reason;
use crate::writeback::events;
use crate::writeback::guard::ReclaimScope;

/// Folios looked at in a step.
const STEP_FOLIOS: u32 = 1024;
/// Notes of pages read once that can wait in a shard; further ones are forgotten.
const NOTES_MAX: usize = 256;
/// The most folios that a shard remembers to have been read once.
const LINE_MAX: usize = 4096;
/// That is at most this part of its frames.
const LINE_FRAMES_PART: usize = 8;

/// Pages that their readers have read once, on their way to the shard: bounded, and nobody waits for room.
#[derive(Debug)]
pub(crate) struct UsedOnce {
    sender: Sender<(u16, Range<u64>)>,
    receiver: Receiver<(u16, Range<u64>)>,
    /// A note was left since the shard last took them.
    posted: AtomicBool,
}

impl UsedOnce {
    pub(crate) fn new() -> Self {
        let (sender, receiver) = bounded(NOTES_MAX);
        Self { sender, receiver, posted: AtomicBool::new(false) }
    }

    /// Leaves a note; where there are too many, the pages are as any others. The shard finds it when it next has something to
    /// do: nobody needs to wake it for this.
    #[cold]
    pub(crate) fn post(&self, mapping: u16, pages: Range<u64>) {
        if self.sender.try_send((mapping, pages)).is_ok() {
            self.posted.store(true, Ordering::Release);
        }
    }

    /// The shard's side: whether notes were left since it last asked.
    fn take_posted(&self) -> bool {
        self.posted.load(Ordering::Relaxed) && self.posted.swap(false, Ordering::AcqRel)
    }
}

/// A range that is dropped from the cache.
#[derive(Debug)]
struct DropJob {
    slot: SlotId,
    mapping: u16,
    /// Shard-local pages still to be looked at.
    rest: Range<u64>,
    /// When it came to the first of them.
    since_ns: u64,
}

/// Hints that a shard is working on.
#[derive(Debug)]
pub(crate) struct ShardAdvice {
    drops: Vec<DropJob>,
    /// Folios that were read once, the oldest first.
    once: VecDeque<(FrameId, FolioKey)>,
    once_max: usize,
}

impl ShardAdvice {
    pub(crate) fn new(frames: usize) -> Self {
        let once_max = (frames / LINE_FRAMES_PART).min(LINE_MAX);
        Self { drops: Vec::new(), once: VecDeque::with_capacity(once_max + 1), once_max }
    }
}

/// What became of the folio that a job has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dropped {
    /// It has gone, was split, or stays: on to the next.
    Next,
    /// It is being written.
    Waits,
}

impl Shard {
    // ---- ranges that aren't needed ----------------------------------------------------------------------

    /// Begins to drop the pages of a range.
    pub(super) fn begin_drop(&mut self, slot: SlotId, number: u16, pages: Range<u64>) {
        let mapping = match self.mapping(number) {
            Ok(mapping) => mapping,
            Err(error) => return self.answer(slot, Err(error)),
        };
        let rest = mapping.shape.striping.local_range(self.cache.shard, pages);
        self.advice.drops.push(DropJob { slot, mapping: number, rest, since_ns: self.now_ns });
    }

    /// Ends what is left of a mapping that is closed.
    pub(super) fn end_drops_of(&mut self, mapping: u16) {
        while let Some(at) = self.advice.drops.iter().position(|job| job.mapping == mapping) {
            let job = self.advice.drops.remove(at);
            self.answer(job.slot, Err(Error::Closed));
        }
    }

    pub(super) fn step_advice(&mut self) -> bool {
        self.take_used_once();
        if self.advice.drops.is_empty() {
            return false;
        }
        let before = self.cache.released;
        let mut jobs = std::mem::take(&mut self.advice.drops);
        jobs.retain_mut(|job| !self.step_drop(job));
        jobs.append(&mut self.advice.drops);
        self.advice.drops = jobs;
        self.cache.released > before
    }

    /// One step of one job; true when it has ended.
    fn step_drop(&mut self, job: &mut DropJob) -> bool {
        let Ok(mapping) = self.mapping(job.mapping) else {
            self.answer(job.slot, Err(Error::Closed));
            return true;
        };
        let shape = &mapping.shape;
        let evicted = self.cache.evicted;
        let mut ended = false;
        for _ in 0..STEP_FOLIOS {
            let Some(leaf) = self.cache.tree.next(shape.tree, Find::Present, job.rest.clone()) else {
                ended = true;
                break;
            };
            let local = leaf.base + u64::from(leaf.pages.trailing_zeros());
            let page = shape.striping.page(self.cache.shard, local);
            let frame = self.cache.find(shape, page).expect("a present page is indexed");
            if local > job.rest.start {
                (job.rest.start, job.since_ns) = (local, self.now_ns);
            }
            if self.drop_folio(&mapping, frame, job) == Dropped::Waits {
                break;
            }
        }
        events::lru_shrink(self.link.shard, &self.link.counters, self.cache.evicted - evicted, self.now_ns);
        if ended {
            self.answer(job.slot, Ok(Grants::none()));
        }
        ended
    }

    /// Drops the folio of `frame`, which holds the first page of the job's rest, if that can be.
    fn drop_folio(&mut self, mapping: &OpenMapping, frame: FrameId, job: &mut DropJob) -> Dropped {
        let shape = &mapping.shape;
        let cache = self.cache.shared.clone();
        let place = cache.place(frame);
        let folio = cache.folio(place.head);
        let first = job.rest.start - place.within;
        let end = first + place.order.pages();
        let is_within = place.within == 0 && end <= job.rest.end;
        if !is_within && place.order > shape.order && folio.freeze_unused() {
            // A folio that reaches beyond the range stays with that part.
            let local = if place.within > 0 { job.rest.start } else { job.rest.end };
            self.cache.isolate(shape, place.head, shape.striping.page(self.cache.shard, local), shape.order);
            return Dropped::Next;
        }
        let poisoned = || cache.is_any_marked(place.head, Tag::Poisoned);
        let gated = || {
            mapping.gates.gate.is_some()
                && mapping.gates.keeps(cache.highest_dirty(place.frames_in(job.rest.start, &job.rest)))
        };
        let late = self.now_ns.saturating_sub(job.since_ns) > self.limits.pin_wait_ns;
        let written_first =
            cache.is_needed(place.head) && !folio.state().exclusive() && !poisoned() && !gated();
        if is_within && written_first && !late {
            if cache.is_any_marked(place.head, Tag::Dirty) && !self.is_taken(mapping) && !self.is_congested()
            {
                self.write_range(mapping, Reason::Caller, job.rest.clone());
            }
            return Dropped::Waits;
        }
        if is_within {
            self.cache.evict_folio(shape, place.head, Remembered::No);
        }
        (job.rest.start, job.since_ns) = (end.min(job.rest.end), self.now_ns);
        Dropped::Next
    }

    // ---- pages read once --------------------------------------------------------------------------------

    /// Takes the notes of pages that were read once.
    fn take_used_once(&mut self) {
        if !self.link.used_once.take_posted() {
            return;
        }
        for _ in 0..NOTES_MAX {
            let Ok((number, pages)) = self.link.used_once.receiver.try_recv() else { return };
            // Closed since, and its slot perhaps another mapping's: at worst pages of that lose a use.
            let Ok(mapping) = self.mapping(number) else { continue };
            let mut page = pages.start;
            while page < pages.end.min(mapping.shape.pages()) {
                let of_shard = mapping.shape.striping.shard_of(page) == self.cache.shard;
                let Some(frame) = of_shard.then(|| self.cache.find(&mapping.shape, page)).flatten() else {
                    page += mapping.shape.order.pages();
                    continue;
                };
                let place = self.cache.shared.place(frame);
                let folio = self.cache.shared.folio(place.head);
                folio.clear_referenced();
                let key = folio.key();
                self.advice.once.push_back((place.head, key));
                if self.advice.once.len() > self.advice.once_max {
                    self.evict_used_once();
                }
                page += place.order.pages() - place.within;
            }
        }
    }

    /// Evicts folios that were read once, the oldest first, until there is room or `steps_max` were looked at.
    pub(super) fn evict_all_used_once(&mut self, (order, folios): (FolioOrder, usize), steps_max: u32) {
        // Once round: to look at a folio that somebody has by a published pin costs a membarrier.
        for _ in 0..steps_max.min(self.advice.once.len() as u32) {
            if self.advice.once.is_empty() || self.cache.has_room(order, folios) {
                return;
            }
            self.evict_used_once();
        }
    }

    fn evict_used_once(&mut self) {
        let _reclaim = ReclaimScope::enter();
        let Some((head, key)) = self.advice.once.pop_front() else { return };
        let cache = self.cache.shared.clone();
        let folio = cache.folio(head);
        if folio.state().frozen() || folio.key() != key || cache.place(head).head != head {
            return;
        }
        // Used a second time. Asked first: the other question may cost a membarrier.
        if folio.state().referenced() {
            return;
        }
        if folio.is_held() && self.advice.once.len() < self.advice.once_max {
            // Its reader has it still.
            self.advice.once.push_back((head, key));
        } else if let Ok(mapping) = self.mapping(key.mapping())
            && cache.shares.may_take(&mapping.shape)
        {
            self.cache.evict_folio(&mapping.shape, head, Remembered::No);
        }
    }
}
