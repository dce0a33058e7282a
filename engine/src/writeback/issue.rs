//! From locked folios to commands: contiguous folios go out as one command up to the device's limits (WB-11), and
//! the commands of a step wait in the queue for one doorbell (WB-18).

use foliant_nvme::{Fua, Io, QueuePair};

use super::callback::{Callback, Disposition};
use super::commit::Durability;
use super::control::SyncMode;
use super::events::{self, PassTag};
use super::pass::{PassState, PassStep, WritebackPass};
use crate::cache::Written;
use crate::cache::owned::ShardCache;
use crate::cache::shape::MappingShape;
use crate::error::Error;
use crate::mirror::StreamId;
use crate::shard::device::DeviceWatch;
use crate::shard::link::ShardLink;
use crate::shard::mirror::MirrorStream;
use crate::shard::payload::{FolioRun, PayloadKind, RunGroup, RunPool, ShardPayload};
use crate::stats::bump;

/// How a step of a pass ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Issued {
    /// The pass is at its end.
    End,
    /// The step was long enough; there may be more.
    Pause,
    /// The queue has no room above the reserve for reads.
    NoRoom,
    /// An integrity pass waits for the folio that its state names.
    Blocked,
}

/// What a pass works with: one shard's cache and queue.
#[derive(Debug)]
pub(crate) struct Issuer<'a> {
    pub cache: &'a ShardCache,
    pub queue: &'a mut QueuePair<ShardPayload>,
    pub runs: &'a mut RunPool,
    pub watch: &'a mut DeviceWatch,
    pub link: &'a ShardLink,
    pub now_ns: u64,
    /// Commands of the queue that writeback leaves to reads.
    pub reserve: u32,
    /// The second stream, where the engine has one.
    pub mirror: Option<&'a mut MirrorStream>,
}

impl Issuer<'_> {
    /// Whether there is room for the commands of another run.
    pub(super) fn has_room(&self, shape: &MappingShape) -> bool {
        // Where a block takes several commands, there must be room for all of them.
        self.queue.free_commands() >= self.reserve + shape.block_commands_max()
            && self.mirror.as_ref().is_none_or(|mirror| mirror.has_room(shape.slot))
    }

    pub(super) fn start_run(&mut self, shape: &MappingShape, page: u64, group: RunGroup) -> FolioRun {
        let mut run = self.runs.start(shape, page);
        run.group = group;
        run
    }

    /// Whether the last command of a pass is better written through: where it is the only one, and nothing else awaits a
    /// Flush, a single command with FUA takes the place of a write and a Flush after it (WB-21).
    ///
    /// That nothing else awaits one is only a reason to choose FUA, never a promise: whoever waits for durability looks
    /// again when all writes of its range have ended, and other writes that completed meanwhile were counted then.
    pub(super) fn fua_of_last(
        &self,
        state: &PassState,
        shape: &MappingShape,
        durability: &Durability,
    ) -> Fua {
        let is_single = state.mode == SyncMode::All && state.commands == 0 && shape.block_commands_max() == 1;
        if is_single && durability.prefers_fua() { Fua::Yes } else { Fua::No }
    }

    /// Puts a run into the queue. `Err` gives it back: the queue has failed.
    pub(super) fn submit(
        &mut self,
        shape: &MappingShape,
        mut run: FolioRun,
        pass: PassTag,
    ) -> Result<(), FolioRun> {
        let (pages, fua) = (run.range(), run.fua);
        let own_pages = self.mirror.as_mut().map_or(0, |mirror| mirror.begin(&mut run));
        self.feed_mirror(own_pages);
        let pair = run.pair;
        if let Err(run) = submit_write(self.queue, self.watch, shape, run) {
            if let Some(mirror) = &mut self.mirror {
                mirror.withdraw(pair);
            }
            return Err(run);
        }
        if own_pages > 0 {
            self.feed_mirror(0);
        }
        let counters = &self.link.counters;
        bump(&counters.write_commands, 1);
        bump(&counters.pages_written, pages.end - pages.start);
        bump(&counters.fua_commands, u64::from(fua == Fua::Yes));
        events::write_issued(self, shape, &pages, pass);
        Ok(())
    }

    /// Feeds the mirror while it is further behind than the primary, for which `own_pages` pages wait (WB-15).
    fn feed_mirror(&mut self, own_pages: u64) {
        if let Some(mirror) = &mut self.mirror {
            while mirror.next(own_pages) == Some(StreamId::Mirror) && mirror.feed(self.link) {}
        }
    }

    /// The queue refused a run, whose marks are those of a write in flight: its folios end writeback dirty.
    pub(super) fn give_up(&mut self, shape: &MappingShape, run: FolioRun) -> Error {
        self.cache.end_writeback(shape, run.first_page, run.pages(), Written::Refused);
        self.runs.end(run);
        self.link.fail("its queue refuses commands");
        self.link.failure().unwrap_or(Error::Closed)
    }

    pub(super) fn count_postponed(&self, pages: u64) {
        bump(&self.link.counters.pages_postponed, pages);
    }
}

/// Submits the write of a run, the first time or again. `Err` gives it back: the queue has no room, or has failed.
pub(crate) fn submit_write(
    queue: &mut QueuePair<ShardPayload>,
    watch: &mut DeviceWatch,
    shape: &MappingShape,
    run: FolioRun,
) -> Result<(), FolioRun> {
    let range = run.range();
    let write = Io::Write { lba: shape.lba(range.start), blocks: shape.blocks(&range), fua: run.fua };
    let payload = ShardPayload::new(PayloadKind::Write(run), watch);
    let Err(rejected) = queue.submit(&shape.namespace, write, payload) else {
        watch.submitted();
        return Ok(());
    };
    tracing::error!(reason = %rejected.reason, "the queue refused a write; its folios stay dirty");
    match rejected.payload.kind {
        PayloadKind::Write(run) => Err(run),
        _ => unreachable!("a rejected payload comes back as it was given"),
    }
}

impl WritebackPass<'_> {
    /// Drives the pass to the end of its step: every folio is written, or as `callback` says.
    pub(crate) fn drive(mut self, callback: Option<&Callback>) -> Issued {
        if callback.is_none() {
            self.joins_folios();
        }
        loop {
            let folio = match self.next() {
                PassStep::Folio(folio) => folio,
                PassStep::Wait { .. } => return Issued::Blocked,
                PassStep::Pause => break,
                PassStep::End => return Issued::End,
            };
            match callback.map_or(Ok(Disposition::Write), |callback| callback.ask(&folio)) {
                Ok(Disposition::Write) => folio.write(),
                Ok(Disposition::NotNow) => drop(folio),
                Err(panicked) => {
                    drop(folio);
                    self.fail(panicked);
                }
            }
        }
        self.issued()
    }
}
