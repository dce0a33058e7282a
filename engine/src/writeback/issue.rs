//! From locked folios to commands: contiguous folios go out as one command up to the device's limits (WB-11), and
//! the commands of a step wait in the queue for one doorbell (WB-18).

use foliant_nvme::{Fua, Io, QueuePair};

use super::pass::{Next, PassState, WritebackPass};
use crate::cache::ShardCache;
use crate::cache::folio::FrameId;
use crate::cache::shape::MappingShape;
use crate::shard::device::DeviceWatch;
use crate::shard::payload::{FolioRun, PayloadKind, ShardPayload};

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
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Submitted {
    pub commands: u64,
    pub pages: u64,
}

/// Runs a pass for one step: at most `pages_max` pages, and never into the last `reserve` commands of the queue.
pub(crate) fn issue(
    cache: &ShardCache,
    queue: &mut QueuePair<ShardPayload>,
    shape: &MappingShape,
    state: &mut PassState,
    reserve: u32,
    pages_max: u64,
    watch: &mut DeviceWatch,
) -> (Issued, Submitted) {
    let mut pass = WritebackPass::new(cache, shape, state);
    let mut done = Submitted::default();
    let mut run: Option<FolioRun> = None;
    let mut marked = 0;
    let ended = loop {
        if run.is_none() {
            if marked >= pages_max {
                break Issued::Budget;
            }
            if queue.free_commands() <= reserve {
                break Issued::NoRoom;
            }
        }
        match pass.next() {
            Next::Folio(folio) => {
                let follows = run.as_ref().is_some_and(|run| run.takes(shape, folio.page));
                if !follows && let Some(full) = run.take() {
                    // The next folio opens a run of its own only if there's a command for it.
                    if !submit(cache, queue, shape, full, &mut done, watch) {
                        pass.put_back(folio);
                        break Issued::Refused;
                    }
                    if queue.free_commands() <= reserve || marked >= pages_max {
                        pass.put_back(folio);
                        continue;
                    }
                }
                let (page, frame) = folio.start_writeback();
                marked += 1;
                match &mut run {
                    Some(run) => run.append(shape, page, frame),
                    None => run = Some(FolioRun::new(cache.shared.clone(), shape, page, frame)),
                }
            }
            Next::Blocked(frame) => break Issued::Blocked(frame),
            Next::End => break Issued::End,
        }
    };
    if let Some(run) = run
        && !submit(cache, queue, shape, run, &mut done, watch)
    {
        return (Issued::Refused, done);
    }
    (ended, done)
}

/// Submits one run. When the queue refuses it, its folios end writeback dirty (WB-11, WB-17).
fn submit(
    cache: &ShardCache,
    queue: &mut QueuePair<ShardPayload>,
    shape: &MappingShape,
    run: FolioRun,
    done: &mut Submitted,
    watch: &mut DeviceWatch,
) -> bool {
    let (lba, blocks, pages) = (shape.lba(run.first_page), shape.blocks(&run.range()), run.pages);
    let payload = ShardPayload { kind: PayloadKind::Write(run), watch_epoch: watch.epoch() };
    match queue.submit(&shape.namespace, Io::Write { lba, blocks, fua: Fua::No }, payload) {
        Ok(()) => {
            watch.submitted();
            done.commands += 1;
            done.pages += u64::from(pages);
            true
        }
        Err(rejected) => {
            tracing::error!(reason = %rejected.reason, "the queue refused a write; its folios stay dirty");
            if let PayloadKind::Write(run) = rejected.payload.kind {
                for frame in run.frames() {
                    cache.end_writeback(shape, frame, true);
                }
            }
            false
        }
    }
}
