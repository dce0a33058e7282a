//! From locked folios to commands: contiguous folios go out as one command up to the device's limits (WB-11), and
//! the commands of a step wait in the queue for one doorbell (WB-18).

use foliant_nvme::{Fua, Io, QueuePair};

use super::events::{self, PassTag};
use super::pass::{Next, PassState, WritebackPass};
use crate::cache::Written;
use crate::cache::folio::FrameId;
use crate::cache::owned::ShardCache;
use crate::cache::shape::MappingShape;
use crate::shard::device::DeviceWatch;
use crate::shard::payload::{FolioRun, PayloadKind, RunPool, ShardPayload};
use crate::stats::ShardCounters;

/// How a step of a pass ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Issued {
    /// The pass is at its end.
    End,
    /// The budget of this step is spent; there may be more.
    Budget,
    /// The queue has no room above the reserve for reads.
    NoRoom,
    /// An integrity pass waits for this folio.
    Blocked(FrameId),
    /// The queue refused a command: its folios are dirty again. The queue has failed.
    Refused,
}

/// What one step submitted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Submitted {
    pub pass: PassTag,
    pub commands: u64,
    pub pages: u64,
}

/// What a pass works with: one shard's cache and queue.
pub(crate) struct Issuer<'a> {
    pub cache: &'a ShardCache,
    pub queue: &'a mut QueuePair<ShardPayload>,
    pub runs: &'a mut RunPool,
    pub watch: &'a mut DeviceWatch,
    pub counters: &'a ShardCounters,
    pub now_ns: u64,
    /// Commands of the queue that writeback leaves to reads.
    pub reserve: u32,
}

impl Issuer<'_> {
    /// Runs a pass for one step: about `pages_max` pages, and never into the reserve of the queue.
    pub(crate) fn step(
        &mut self,
        shape: &MappingShape,
        state: &mut PassState,
        pages_max: u64,
    ) -> (Issued, Submitted) {
        state.span.step_begins(self, shape, state.mode, &state.rest);
        let (issued, done) = self.walk(shape, state, pages_max);
        state.span.step_ended(issued, &done, &self.cache.shared.marked[shape.slot as usize]);
        (issued, done)
    }

    fn walk(&mut self, shape: &MappingShape, state: &mut PassState, pages_max: u64) -> (Issued, Submitted) {
        let mut done = Submitted { pass: state.span.tag(state.mode), commands: 0, pages: 0 };
        // Where a block takes several commands, there must be room for all of them.
        let reserve = self.reserve + shape.block_commands_max() - 1;
        let mut pass = WritebackPass::new(self.cache, shape, state);
        let mut run: Option<FolioRun> = None;
        let mut marked = 0;
        let ended = loop {
            if run.is_none() {
                if marked >= pages_max {
                    break Issued::Budget;
                }
                if self.queue.free_commands() <= reserve {
                    break Issued::NoRoom;
                }
            }
            match pass.next() {
                Next::Folio(part) => {
                    let fits =
                        run.as_ref().map_or(u64::MAX, |run| run.room_for(shape, part.page, part.pages));
                    if fits == 0 {
                        let full = run.take().expect("what has no room is a run");
                        if let Err(refused) = self.submit(shape, full, &mut done) {
                            pass.put_back(part);
                            self.give_up(&mut pass, shape, refused);
                            break Issued::Refused;
                        }
                        // What follows opens a run of its own; only if there's a command for it.
                        pass.put_back(part);
                        continue;
                    }
                    let run = run.get_or_insert_with(|| self.runs.start(shape, part.page));
                    let fits = run.room_for(shape, part.page, part.pages);
                    let (page, frame, pages) = pass.start_writeback(part, fits);
                    run.append(shape, page, frame, pages);
                    marked += pages;
                }
                Next::Blocked(frame) => break Issued::Blocked(frame),
                Next::End => break Issued::End,
            }
        };
        if let Some(run) = run
            && let Err(refused) = self.submit(shape, run, &mut done)
        {
            self.give_up(&mut pass, shape, refused);
            return (Issued::Refused, done);
        }
        (ended, done)
    }

    fn submit(&mut self, shape: &MappingShape, run: FolioRun, done: &mut Submitted) -> Result<(), FolioRun> {
        let range = run.range();
        let (lba, blocks) = (shape.lba(range.start), shape.blocks(&range));
        let payload = ShardPayload { kind: PayloadKind::Write(run), watch_epoch: self.watch.epoch() };
        let Err(rejected) =
            self.queue.submit(&shape.namespace, Io::Write { lba, blocks, fua: Fua::No }, payload)
        else {
            self.watch.submitted();
            done.commands += 1;
            done.pages += range.end - range.start;
            events::write_issued(self, shape, &range, done.pass);
            return Ok(());
        };
        tracing::error!(reason = %rejected.reason, "the queue refused a write; its folios stay dirty");
        match rejected.payload.kind {
            PayloadKind::Write(run) => Err(run),
            _ => unreachable!("a rejected payload comes back as it was given"),
        }
    }

    /// The queue refused a run: its folios end writeback dirty (WB-11, WB-17).
    fn give_up(&mut self, pass: &mut WritebackPass<'_>, shape: &MappingShape, run: FolioRun) {
        pass.clean_started();
        self.cache.end_writeback(shape, run.first_page, run.pages(), Written::No);
        self.runs.end(run);
    }
}
