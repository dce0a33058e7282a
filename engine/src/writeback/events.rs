//! The events of writeback: what a trace shows, named as in the kernel. Nothing else of the engine names one.
//!
//! Each function is one event with target [`WRITEBACK_TARGET`], the kernel's tracepoint as its name and structured
//! fields. Where the kernel's tracepoint belongs to a file system (`ext4_sync_file_enter`, `nfs_initiate_commit`) the
//! file system's prefix is left out. `docs/tracing.md` lists names, fields and origins.
//!
//! | level | what | how often |
//! |---|---|---|
//! | `DEBUG` | rounds of the flusher, passes, syncs, commits, guard hits, skips, pauses | a pass, a sync |
//! | `TRACE` | commands, doorbells, waits, evictions | a command |
//!
//! **What it costs.** Nothing is an event a page. An event that nobody listens to is one relaxed load of a word that
//! hardly ever changes (`tracing`'s highest level in use), a comparison, and a branch that isn't taken; the fields
//! aren't evaluated. With listeners to other targets at the same level one more load, of the event's own word, says
//! so. An embedder who builds with a `release_max_level_*` feature of `tracing` removes the events from the program;
//! a trace of it then shows nothing.
//!
//! **What has no event.** Dirtying a page (`writeback_dirty_folio`) is a hit: two atomic operations, without a message
//! and without a clock. An event there would cost every writer a load and a branch to say what a pass says better:
//! [`PassSpan`] reports how many pages are dirty and under writeback when it begins and when it ends, from counts that
//! are kept anyway.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use foliant_nvme::CommandError;
use tracing::Level;
use tracing::level_filters::{LevelFilter, STATIC_MAX_LEVEL};

use super::control::{Reason, SyncMode};
use super::issue::{Issued, Issuer};
use crate::cache::MarkedPages;
use crate::cache::shape::MappingShape;
use crate::error::Error;
use crate::shard::payload::FolioRun;
use crate::stats::{ShardCounters, bump};

/// The target of all events of writeback, for filters: `RUST_LOG=foliant::writeback=trace` shows them.
pub const WRITEBACK_TARGET: &str = "foliant::writeback";

/// An event whose message is its name, so that it can be read in a log and found by name in a subscriber. What it takes
/// to tell it lies outside the path that calls it: there, it is the look at the highest level alone.
macro_rules! emit {
    ($level:ident, $highest:ident, $name:literal, { $($fields:tt)* }) => {
        if LevelFilter::$highest <= STATIC_MAX_LEVEL && LevelFilter::$highest <= LevelFilter::current() {
            aside(move || tracing::$level!(name: $name, target: WRITEBACK_TARGET, { $($fields)* }, $name));
        }
    };
}

#[cold]
#[inline(never)]
fn aside(tell: impl FnOnce()) {
    tell();
}

/// What a command is for (`rwbs` of the kernel's block events).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Read,
    /// Of pages that nobody has asked for yet.
    ReadAhead,
    Write,
    WriteZeroes,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::ReadAhead => "read_ahead",
            Self::Write => "write",
            Self::WriteZeroes => "write_zeroes",
        }
    }
}

impl Reason {
    /// As events write it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sync => "sync",
            Self::Close => "close",
            Self::Reclaim => "reclaim",
            Self::DirtyLimit => "dirty_limit",
            Self::Caller => "caller",
            Self::Expiry => "expiry",
            Self::Poisoned => "poisoned",
        }
    }

    fn counter(self, counters: &ShardCounters) -> &AtomicU64 {
        match self {
            Self::Sync => &counters.passes_sync,
            Self::Close => &counters.passes_close,
            Self::Reclaim => &counters.passes_reclaim,
            Self::DirtyLimit => &counters.passes_dirty_limit,
            Self::Caller => &counters.passes_caller,
            Self::Expiry => &counters.passes_expiry,
            Self::Poisoned => &counters.passes_poisoned,
        }
    }
}

impl SyncMode {
    /// As events write it: `none` and `all`, after `WB_SYNC_NONE` and `WB_SYNC_ALL`.
    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::All => "all",
        }
    }
}

/// What a command's pass is known by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PassTag {
    /// Counts passes of this process from 1; 0 when nobody listened as the pass began.
    number: u64,
    mode: SyncMode,
    reason: Reason,
}

/// A pass from its first step to its end, however it ends: begin and end are events
/// (`writeback_single_inode_start`, `writeback_single_inode`), and each pass is counted by its reason (WB-20).
#[derive(Debug)]
pub(crate) struct PassSpan {
    reason: Reason,
    /// Whether it has had a step, and so is counted.
    is_counted: bool,
    begun: Option<BegunPass>,
}

#[derive(Debug)]
struct BegunPass {
    tag: PassTag,
    shard: usize,
    mapping: u16,
    namespace: u32,
    commands: u64,
    pages: u64,
    /// How its last step ended, and when that was.
    last: Option<Issued>,
    now_ns: u64,
}

impl PassSpan {
    /// A pass that hasn't begun.
    pub(crate) fn new(reason: Reason) -> Self {
        Self { reason, is_counted: false, begun: None }
    }

    /// What commands of the pass carry.
    pub(crate) fn tag(&self, mode: SyncMode) -> PassTag {
        let nobody_listened = PassTag { number: 0, mode, reason: self.reason };
        self.begun.as_ref().map_or(nobody_listened, |begun| begun.tag)
    }

    /// A step of the pass begins; with the first one the pass. `rest` is what it has still to look at, shard-local.
    #[inline]
    pub(crate) fn step_begins(
        &mut self,
        issuer: &Issuer<'_>,
        shape: &MappingShape,
        mode: SyncMode,
        rest: &Range<u64>,
    ) {
        if !self.is_counted {
            self.is_counted = true;
            let counters = &issuer.link.counters;
            bump(self.reason.counter(counters), 1);
            bump(
                if mode == SyncMode::All { &counters.passes_integrity } else { &counters.passes_background },
                1,
            );
        }
        if self.begun.is_none() && tracing::enabled!(target: WRITEBACK_TARGET, Level::DEBUG) {
            self.begin(issuer, shape, mode, rest);
        }
        if let Some(begun) = &mut self.begun {
            begun.now_ns = issuer.now_ns;
        }
    }

    #[cold]
    fn begin(&mut self, issuer: &Issuer<'_>, shape: &MappingShape, mode: SyncMode, rest: &Range<u64>) {
        static PASSES: AtomicU64 = AtomicU64::new(0);
        let number = PASSES.fetch_add(1, Ordering::Relaxed) + 1;
        let tag = PassTag { number, mode, reason: self.reason };
        let (shard, now_ns) = (issuer.cache.shard, issuer.now_ns);
        let (mapping, namespace) = (shape.slot, shape.namespace.id());
        let pages = file_pages(shape, shard, rest);
        let marked = &issuer.cache.shared.marked[mapping as usize];
        emit!(debug, DEBUG, "writeback_single_inode_start", {
            shard, mapping, namespace, pass = number, reason = tag.reason.name(), mode = mode.name(),
            first_page = pages.start, end_page = pages.end,
            dirty = marked.dirty(), writeback = marked.writeback(), now_ns
        });
        let (last, commands, pages) = (None, 0, 0);
        self.begun = Some(BegunPass { tag, shard, mapping, namespace, commands, pages, last, now_ns });
    }

    /// A command of `pages` pages was submitted for the pass.
    #[inline]
    pub(crate) fn submitted(&mut self, pages: u64) {
        if let Some(begun) = &mut self.begun {
            begun.commands += 1;
            begun.pages += pages;
        }
    }

    /// A step of the pass ended.
    #[inline]
    pub(crate) fn step_ended(&mut self, issued: Issued, marked: &MarkedPages) {
        let Some(begun) = &mut self.begun else { return };
        let BegunPass { tag: PassTag { number, .. }, shard, mapping, now_ns, .. } = *begun;
        if issued == Issued::Blocked && begun.last != Some(issued) {
            emit!(trace, TRACE, "folio_wait_writeback", { shard, mapping, pass = number, now_ns });
        }
        begun.last = Some(issued);
        if issued == Issued::End {
            self.end(Some(marked));
        }
    }

    /// The pass is over. What ends with work left was given up by who ran it: the pressure was gone, the time was up,
    /// the mapping was closed.
    #[cold]
    fn end(&mut self, marked: Option<&MarkedPages>) {
        let Some(begun) = self.begun.take() else { return };
        let BegunPass { tag, shard, mapping, namespace, commands, pages, last, now_ns } = begun;
        let ended = match last {
            None => "unbegun",
            Some(Issued::End) => "end",
            Some(Issued::Pause) => "given_up",
            Some(Issued::NoRoom) => "given_up_queue_full",
            Some(Issued::Blocked) => "given_up_blocked",
        };
        emit!(debug, DEBUG, "writeback_single_inode", {
            shard, mapping, namespace, pass = tag.number, reason = tag.reason.name(), mode = tag.mode.name(),
            commands, pages, ended,
            dirty = marked.map(MarkedPages::dirty), writeback = marked.map(MarkedPages::writeback), now_ns
        });
    }
}

impl Drop for PassSpan {
    fn drop(&mut self) {
        if self.begun.is_some() {
            self.end(None);
        }
    }
}

/// The file pages from the first to the last of `rest`, which is shard-local.
fn file_pages(shape: &MappingShape, shard: usize, rest: &Range<u64>) -> Range<u64> {
    let all = shape.striping.local_range(shard, 0..shape.pages());
    let (start, end) = (rest.start.max(all.start), rest.end.min(all.end));
    if start >= end {
        return 0..0;
    }
    shape.striping.page(shard, start)..shape.striping.page(shard, end - 1) + 1
}

/// The flusher begins a round over all mappings (`writeback_start`).
#[inline]
pub(crate) fn writeback_start(shard: usize, reason: Reason, dirty: u64, now_ns: u64) {
    emit!(debug, DEBUG, "writeback_start", { shard, reason = reason.name(), dirty, now_ns });
}

/// The flusher ended a round in which it wrote `pages` pages (`writeback_written`).
#[inline]
pub(crate) fn writeback_written(shard: usize, reason: Reason, pages: u64, now_ns: u64) {
    emit!(debug, DEBUG, "writeback_written", { shard, reason = reason.name(), pages, now_ns });
}

/// A write command of a pass is in the queue; the device learns of it with the next doorbell (`block_rq_issue`).
#[inline]
pub(crate) fn write_issued(issuer: &Issuer<'_>, shape: &MappingShape, pages: &Range<u64>, pass: PassTag) {
    emit!(trace, TRACE, "block_rq_issue", {
        shard = issuer.cache.shard, op = Op::Write.name(), mapping = shape.slot, namespace = shape.namespace.id(),
        pass = pass.number, reason = pass.reason.name(), mode = pass.mode.name(),
        first_page = pages.start, pages = pages.end - pages.start, now_ns = issuer.now_ns
    });
}

/// A command that isn't a pass's is in the queue (`block_rq_issue`).
#[inline]
pub(crate) fn block_rq_issue(shard: usize, op: Op, shape: &MappingShape, pages: &Range<u64>, now_ns: u64) {
    emit!(trace, TRACE, "block_rq_issue", {
        shard, op = op.name(), mapping = shape.slot, namespace = shape.namespace.id(),
        first_page = pages.start, pages = pages.end - pages.start, now_ns
    });
}

/// A command over folios has ended (`block_rq_complete`).
#[inline]
pub(crate) fn block_rq_complete(
    shard: usize,
    op: Op,
    run: &FolioRun,
    result: &Result<(), CommandError>,
    now_ns: u64,
) {
    emit!(trace, TRACE, "block_rq_complete", {
        shard, op = op.name(), mapping = run.mapping, first_page = run.first_page, pages = run.pages(),
        error = result.as_ref().err().map(tracing::field::display), now_ns
    });
}

/// The doorbell was rung for all commands since it was rung last (`block_unplug`). `requests` is how many the queue
/// has taken in its life.
#[inline]
pub(crate) fn block_unplug(shard: usize, counters: &ShardCounters, requests: u64, now_ns: u64) {
    let told = counters.commands.load(Ordering::Relaxed);
    let commands = requests - told;
    bump(&counters.commands, commands);
    bump(&counters.doorbells, 1);
    emit!(trace, TRACE, "block_unplug", { shard, commands, now_ns });
}

/// A sync reached a shard (`ext4_sync_file_enter`). `sync` tells a shard's syncs apart while they run.
#[inline]
pub(crate) fn sync_file_enter(
    shard: usize,
    shape: &MappingShape,
    sync: u32,
    pages: &Range<u64>,
    now_ns: u64,
) {
    emit!(debug, DEBUG, "sync_file_enter", {
        shard, mapping = shape.slot, namespace = shape.namespace.id(), sync,
        first_page = pages.start, end_page = pages.end, now_ns
    });
}

/// A sync has no work left in a shard: its writes have ended, or it failed (`ext4_sync_file_exit`).
#[inline]
pub(crate) fn sync_file_exit(shard: usize, mapping: u16, sync: u32, error: Option<&Error>, now_ns: u64) {
    emit!(debug, DEBUG, "sync_file_exit", { shard, mapping, sync, error = error.map(tracing::field::display), now_ns });
}

/// A flush is in the queue; `syncs` wait for it (`nfs_initiate_commit`).
#[inline]
pub(crate) fn initiate_commit(shard: usize, namespace: u32, epoch: u64, syncs: u64, now_ns: u64) {
    emit!(debug, DEBUG, "initiate_commit", { shard, namespace, epoch, syncs, now_ns });
}

/// A flush has ended (`nfs_commit_done`).
#[inline]
pub(crate) fn commit_done(
    shard: usize,
    namespace: u32,
    epoch: u64,
    result: &Result<(), CommandError>,
    now_ns: u64,
) {
    let error = result.as_ref().err().map(tracing::field::display);
    emit!(debug, DEBUG, "commit_done", { shard, namespace, epoch, error, now_ns });
}

/// Folios were evicted to free their frames (`mm_vmscan_lru_shrink_inactive`, `nr_reclaimed`).
#[inline]
pub(crate) fn lru_shrink(shard: usize, counters: &ShardCounters, pages: u64, now_ns: u64) {
    if pages > 0 {
        bump(&counters.pages_evicted, pages);
        emit!(trace, TRACE, "mm_vmscan_lru_shrink_inactive", { shard, pages, now_ns });
    }
}

/// A pass, or a sync, was refused because reclaim began it (WB-10); says how many were. Any thread may call it. The kernel
/// warns here and has no tracepoint.
#[cold]
pub(crate) fn reclaim_guard(counters: &ShardCounters, mapping: u16) -> u64 {
    let refused = counters.reclaim_guard_hits.fetch_add(1, Ordering::Relaxed) + 1;
    emit!(debug, DEBUG, "reclaim_guard", { mapping, refused });
    refused
}

/// A background pass returned at once since the device is congested (WB-19); once a time of congestion. `in_flight`
/// counts pages under writeback. The kernel's tracepoint of this name has gone with its congestion bits.
#[inline]
pub(crate) fn writeback_congested(
    shard: usize,
    counters: &ShardCounters,
    mapping: u16,
    in_flight: u64,
    now_ns: u64,
) {
    bump(&counters.congestion_skips, 1);
    emit!(debug, DEBUG, "writeback_congested", { shard, mapping, in_flight, now_ns });
}

/// A writer has paused for `pause_ns`, since of `limit` pages that may be dirty so many were; `dirty` are now
/// (`balance_dirty_pages`).
#[cold]
pub(crate) fn balance_dirty_pages(
    shard: usize,
    counters: &ShardCounters,
    mapping: u16,
    (dirty, limit): (u64, u64),
    pause_ns: u64,
    now_ns: u64,
) {
    bump(&counters.throttle_pauses, 1);
    bump(&counters.throttle_paused_ns, pause_ns);
    emit!(debug, DEBUG, "balance_dirty_pages", { shard, mapping, dirty, limit, pause_ns, now_ns });
}

/// The device's write bandwidth was measured anew: `write_bw`, in bytes per second; with `dirty` pages dirty, writers
/// may dirty at `ratelimit` (`bdi_dirty_ratelimit`).
#[cold]
pub(crate) fn bdi_dirty_ratelimit(
    shard: usize,
    counters: &ShardCounters,
    write_bw: u64,
    ratelimit: u64,
    dirty: u64,
    now_ns: u64,
) {
    counters.write_bandwidth.store(write_bw, Ordering::Relaxed);
    emit!(trace, TRACE, "bdi_dirty_ratelimit", { shard, write_bw, ratelimit, dirty, now_ns });
}
