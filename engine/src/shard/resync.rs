//! Resynchronisation: copying a mapping from the primary to its mirror while writes go on.
//!
//! A shard copies its part of the mapping window by window, in ascending order, through memory of its own: what is dirty
//! in the cache needs no copy, since it will be written to both. One window:
//!
//! 1. **Announce** it. Writes that were taken before are awaited. Of writes taken from now on the mirror's part waits.
//! 2. When those before have ended on both streams, **read** the window from the primary.
//! 3. **Write** it to the mirror.
//! 4. End it: the parts that waited are fed.
//!
//! So the mirror ends with the newest contents: a write from before the announcement is in what step 2 reads, and one from
//! after it reaches the mirror after step 3, whatever of it step 2 has seen. A discard counts as a write that no window
//! begins beside.

use std::ops::Range;

use foliant_nvme::{CommandError, Fua, Io};

use super::Shard;
use super::raw::{RawIo, RawPurpose, Refusal};
use super::retry::{self, backoff_ns};
use crate::cache::frames::PAGE_BYTES;
use crate::error::{Error, Operation};
use crate::mirror::{MirrorCause, StreamId};
use crate::reply::{Grants, SlotId};
use crate::stats::bump;

/// Pages of a window, and of the memory that it is copied through.
pub(crate) const WINDOW_PAGES: u64 = 64;

/// How far a window has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Writes from before it are awaited.
    Announced,
    /// It is to be read again at this time.
    ReadAgain {
        due_ns: u64,
    },
    Reading,
    /// It is to be written, now or again, at this time.
    Write {
        due_ns: u64,
    },
    Writing,
}

/// A copy under way.
#[derive(Debug)]
pub(crate) struct ResyncJob {
    slot: SlotId,
    mapping: u16,
    /// Shard-local pages that are still to be copied.
    rest: Range<u64>,
    window: Option<(Range<u64>, Stage)>,
    failures: u8,
}

impl ResyncJob {
    /// The mapping and the pages that are being copied now.
    pub(super) fn window(&self) -> Option<(u16, Range<u64>)> {
        self.window.as_ref().map(|(pages, _)| (self.mapping, pages.clone()))
    }
}

impl Shard {
    pub(super) fn begin_resync(&mut self, slot: SlotId, mapping: u16) {
        let open = match self.mapping(mapping) {
            Ok(open) => open,
            Err(error) => return self.answer(slot, Err(error)),
        };
        let rest = open.shape.striping.local_range(self.cache.shard, 0..open.shape.pages());
        match &mut self.mirror {
            Some(mirror) if open.mirror.is_some() => {
                mirror.resyncs.push_back(ResyncJob { slot, mapping, rest, window: None, failures: 0 });
            }
            _ => self.answer(slot, Err(Error::Mirror { reason: "the mapping has no mirror".to_owned() })),
        }
    }

    /// Whether a discard of these pages has to wait for a window.
    pub(super) fn is_copying(&self, mapping: u16, pages: &Range<u64>) -> bool {
        let window = self.mirror.as_ref().and_then(|mirror| mirror.resyncs.front()?.window());
        window.is_some_and(|(slot, window)| {
            slot == mapping && window.start < pages.end && pages.start < window.end
        })
    }

    /// When a window is to be tried again.
    pub(super) fn resync_due_ns(&self) -> Option<u64> {
        match self.mirror.as_ref()?.resyncs.front()?.window.as_ref()?.1 {
            Stage::ReadAgain { due_ns } | Stage::Write { due_ns } => Some(due_ns),
            Stage::Announced | Stage::Reading | Stage::Writing => None,
        }
    }

    /// Brings the copy at work as far as it can go now.
    pub(super) fn step_resync(&mut self) -> bool {
        let Some(mut job) = self.mirror.as_mut().and_then(|mirror| mirror.resyncs.pop_front()) else {
            return false;
        };
        let before = job.window.clone();
        let ended = self.step_resync_job(&mut job);
        let progressed = ended.is_some() || before != job.window;
        match ended {
            None => {
                if let Some(mirror) = &mut self.mirror {
                    mirror.resyncs.push_front(job);
                }
            }
            Some(result) => self.answer(job.slot, result.map(|()| Grants::none())),
        }
        progressed
    }

    fn step_resync_job(&mut self, job: &mut ResyncJob) -> Option<Result<(), Error>> {
        let open = match self.mapping(job.mapping) {
            Ok(open) => open,
            Err(error) => return Some(Err(error)),
        };
        let (of, lost) = (open.mirror.as_ref()?, self.mirror.as_ref().is_none_or(|mirror| mirror.is_lost()));
        let in_flight = matches!(job.window, Some((_, Stage::Reading | Stage::Writing)));
        if lost || !of.is_resyncing() && !in_flight {
            // It was degraded meanwhile; a command that is still on its way with a lost queue brings the memory back.
            if let Some(mirror) = &mut self.mirror {
                mirror.renounce();
            }
            return Some(Err(Error::MirrorDegraded { cause: self.cause_of(job.mapping) }));
        }
        let Some((pages, stage)) = job.window.clone() else {
            if job.rest.is_empty() {
                return Some(Ok(()));
            }
            let first = open.shape.striping.page(self.cache.shard, job.rest.start);
            let most = open.shape.command_pages_max(first).min(of.shape.command_pages_max(first));
            let most = most.min(WINDOW_PAGES).min(job.rest.end - job.rest.start);
            let pages = first..first + most.min(open.shape.pages() - first);
            if self.discards.iter().any(|discard| discard.overlaps(&open.shape, pages.clone())) {
                return None;
            }
            self.mirror.as_mut()?.announce(job.mapping, &pages);
            job.failures = 0;
            job.window = Some((pages, Stage::Announced));
            return None;
        };
        let is_due = match stage {
            Stage::Announced => self.mirror.as_ref()?.is_announced_over(),
            Stage::ReadAgain { due_ns } | Stage::Write { due_ns } => due_ns <= self.now_ns,
            Stage::Reading | Stage::Writing => false,
        };
        // One window at a time leaves the queues to everybody else.
        if !is_due || self.queue.free_commands() <= open.shape.block_commands_max() {
            return None;
        }
        let buffer = self.mirror.as_mut()?.window.take()?;
        let len_bytes =
            (pages.end - pages.start - 1) as u32 * PAGE_BYTES as u32 + open.shape.page_bytes(pages.end - 1);
        let is_write = matches!(stage, Stage::Write { .. });
        let (stream, shape, purpose) = match is_write {
            false => (StreamId::Primary, &open.shape, RawPurpose::WindowRead),
            true => (StreamId::Mirror, &of.shape, RawPurpose::WindowWrite),
        };
        let (lba, blocks) = (shape.lba(pages.start), shape.blocks(&pages));
        let io = if is_write { Io::Write { lba, blocks, fua: Fua::No } } else { Io::Read { lba, blocks } };
        match self.submit_raw(stream, &shape.namespace, io, RawIo { buffer, len_bytes, purpose }) {
            Ok(()) => job.window = Some((pages, if is_write { Stage::Writing } else { Stage::Reading })),
            Err((raw, refusal)) => {
                self.mirror.as_mut()?.window = Some(raw.buffer);
                if refusal == Refusal::Failed && !is_write {
                    self.fail("a read of a resynchronisation was refused");
                }
            }
        }
        None
    }

    fn cause_of(&self, mapping: u16) -> MirrorCause {
        let open = self.mappings[usize::from(mapping)].as_ref();
        match open.and_then(|open| Some(open.mirror.as_ref()?.state())) {
            Some(crate::mirror::MirrorState::Degraded { cause, .. }) => cause,
            _ => MirrorCause::ResyncGivenUp,
        }
    }

    /// A window was read or written.
    pub(super) fn window_completed(&mut self, raw: RawIo, result: Result<(), CommandError>) {
        let now_ns = self.now_ns;
        let Some(mirror) = &mut self.mirror else { return };
        mirror.window = Some(raw.buffer);
        let Some(job) = mirror.resyncs.front_mut() else { return };
        let is_write = raw.purpose == RawPurpose::WindowWrite;
        let Some((pages, stage)) = &mut job.window else { return };
        if *stage != if is_write { Stage::Writing } else { Stage::Reading } {
            return;
        }
        match result {
            Ok(()) if !is_write => *stage = Stage::Write { due_ns: now_ns },
            Ok(()) => {
                let count = pages.end - pages.start;
                job.rest.start += count;
                let mapping = job.mapping;
                job.window = None;
                bump(&self.link.counters.mirror_pages_copied, count);
                if let Some(open) = &self.mappings[usize::from(mapping)]
                    && let Some(of) = &open.mirror
                {
                    of.durability.write_completed();
                    of.note_copied(count);
                }
            }
            Err(cause) if retry::may_retry(cause, job.failures) => {
                let due_ns = now_ns.saturating_add(backoff_ns(job.failures));
                job.failures += 1;
                bump(&self.link.counters.command_retries, 1);
                *stage = if is_write { Stage::Write { due_ns } } else { Stage::ReadAgain { due_ns } };
            }
            Err(source) => {
                let operation = if is_write { Operation::Write } else { Operation::Read };
                let (slot, mapping, offset) = (job.slot, job.mapping, pages.start * PAGE_BYTES as u64);
                mirror.resyncs.pop_front();
                mirror.renounce();
                let cause = match is_write {
                    true => MirrorCause::Command { operation, source },
                    false => MirrorCause::ResyncGivenUp,
                };
                self.degrade_mirror(mapping, cause.clone());
                let error = match is_write {
                    true => Error::MirrorDegraded { cause },
                    false => Error::Device { operation, offset, source },
                };
                self.answer(slot, Err(error));
            }
        }
    }
}
