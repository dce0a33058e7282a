//! A shard's readahead: pages that nobody has asked for yet are brought in beside the demand (WB-28).
//!
//! Requests come by a small mailbox and are answered by nobody. They take what demand leaves: a command only while no
//! read waits for one, and above the reserve that writeback leaves to reads, too; a frame only above half of those kept
//! free for demand, after a bounded step of eviction, and none while a request waits for frames. So a
//! request may be cut short or dropped, and who would have used its pages reads them himself.
//!
//! A folio that is read ahead is marked unused. Until its first use eviction spares it once; after it the folio is
//! cold, unless it is used again. So a scan lives on the frames that it leaves behind: neither the pages in front of
//! it nor those that others use go for it, and what nobody wanted is gone when its turn comes again.
//!
//! When its read fails, the error is nobody's: the folio goes, or, where a request has come to wait for it, it is read
//! again for that request alone.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use foliant_nvme::{CommandError, Io, SubmitError};

use super::Shard;
use super::open::OpenMapping;
use super::payload::{FolioRun, PayloadKind, ShardPayload};
use super::request::Want;
use crate::cache::folio::FrameId;
use crate::cache::readahead::Asked;
use crate::cache::reclaim::Rank;
use crate::reply::SlotId;
use crate::stats::bump;
use crate::writeback::events::{self, Op};

/// Requests that can wait in a shard; further ones are refused.
const MAILBOX_REQUESTS: usize = 64;
/// Pages looked at in a step.
const STEP_PAGES: u64 = 256;
/// What a request costs beside its pages, in pages.
const REQUEST_COST: u64 = 8;
/// Folios that eviction looks at for one request in a step.
const EVICT_STEPS: u32 = 1024;

/// Pages to read ahead.
#[derive(Clone, Debug)]
pub(crate) struct ReadaheadRequest {
    pub mapping: u16,
    /// Pages of 4096 bytes, whole pages of the mapping, all of one shard.
    pub pages: Range<u64>,
    /// Scattered pages instead: the first of a chain of reply slots whose lists name them, and which nobody waits for. The
    /// shard frees them. Then `pages` is what is carried out of them now.
    pub lists: Option<SlotId>,
    /// Entries of the first list that are in `pages` or were.
    pub listed: usize,
    /// The page that becomes the marker, if it is one of these.
    pub marker: Option<u64>,
    /// How many of them are used at a time: folios are made no larger.
    pub used_at_once: u64,
    /// Steps in which eviction went on for it and found too little.
    pub turns: u32,
}

/// Requests for readahead on their way to a shard: bounded, and nobody waits for room.
#[derive(Debug)]
pub(crate) struct Mailbox {
    sender: Sender<ReadaheadRequest>,
    receiver: Receiver<ReadaheadRequest>,
    /// Requests that are posted and not carried out yet.
    waiting: AtomicU64,
    refused: AtomicU64,
}

/// Whether the mailbox took a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Posted {
    Yes,
    /// It is full: the request is forgotten.
    Refused,
}

impl Mailbox {
    pub(crate) fn new() -> Self {
        let (sender, receiver) = bounded(MAILBOX_REQUESTS);
        Self { sender, receiver, waiting: AtomicU64::new(0), refused: AtomicU64::new(0) }
    }

    /// Leaves a request. The sender wakes the shard afterwards.
    pub(crate) fn post(&self, request: ReadaheadRequest) -> Posted {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        if self.sender.try_send(request).is_ok() {
            return Posted::Yes;
        }
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        self.refused.fetch_add(1, Ordering::Relaxed);
        Posted::Refused
    }

    /// Whether requests wait, or are being carried out. Asked before a look-up: where none did, the look-up finds
    /// all pages that were installed for them.
    pub(crate) fn asked(&self) -> Asked {
        if self.waiting.load(Ordering::Acquire) == 0 { Asked::Served } else { Asked::Waiting }
    }

    /// The shard's side: one is over.
    fn served(&self) {
        self.waiting.fetch_sub(1, Ordering::Release);
    }

    /// How many it has refused.
    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

/// What came of a step of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// All of it is on its way or was there.
    Done,
    /// The step's pages, or the commands, are spent: more of it later.
    Later,
    /// Eviction has found too few frames so far: it goes on in the next step.
    Turning,
    /// What is left of it isn't carried out.
    Dropped,
}

impl Shard {
    /// Whether there is readahead to do and room in the queue for it.
    pub(super) fn can_read_ahead(&self) -> bool {
        // Most steps find none, and one load says so.
        self.link.readahead.asked() == Asked::Waiting
            && (self.readahead.is_some() || !self.link.readahead.receiver.is_empty())
            && self.has_spare_commands(1)
    }

    /// Whether `needed` commands are to be had that no demand waits for.
    fn has_spare_commands(&self, needed: u32) -> bool {
        let reserve = (self.queue.in_flight() + self.queue.free_commands()) / 4;
        self.reads.is_empty() && !self.reads_yield && self.queue.free_commands() >= reserve + needed
    }

    /// Carries readahead out as far as it goes now. True when anything was done.
    pub(super) fn step_readahead(&mut self) -> bool {
        let mut budget = STEP_PAGES;
        let mut progressed = false;
        while budget > 0 && self.can_read_ahead() {
            let Some(mut request) =
                self.readahead.take().or_else(|| self.link.readahead.receiver.try_recv().ok())
            else {
                break;
            };
            let before = request.pages.start;
            let outcome = self.read_ahead_scattered(&mut request, &mut budget);
            budget = budget.saturating_sub(REQUEST_COST);
            progressed |= outcome != Outcome::Later || request.pages.start != before;
            if matches!(outcome, Outcome::Later | Outcome::Turning) {
                self.readahead = Some(request);
                break;
            }
            self.end_readahead(request);
            if outcome == Outcome::Dropped {
                bump(&self.link.counters.readahead_dropped, 1);
            }
        }
        progressed
    }

    /// Forgets what waits.
    pub(super) fn drop_readahead(&mut self) {
        while let Some(request) =
            self.readahead.take().or_else(|| self.link.readahead.receiver.try_recv().ok())
        {
            self.end_readahead(request);
        }
    }

    /// A request is over, whatever became of it.
    fn end_readahead(&self, request: ReadaheadRequest) {
        let mut lists = request.lists;
        while let Some(slot) = lists {
            lists = self.link.replies.list(slot).next();
            self.link.replies.release(slot);
        }
        self.link.readahead.served();
    }

    /// Carries a request out list by list, if it has lists: neighbours among their pages together.
    fn read_ahead_scattered(&mut self, request: &mut ReadaheadRequest, budget: &mut u64) -> Outcome {
        if request.lists.is_none() {
            return self.read_ahead(request, budget);
        }
        let Ok(mapping) = self.mapping(request.mapping) else { return Outcome::Dropped };
        let (link, block) = (self.link.clone(), mapping.shape.order.pages());
        while let Some(slot) = request.lists {
            let list = link.replies.list(slot);
            loop {
                if !request.pages.is_empty() {
                    let outcome = self.read_ahead(request, budget);
                    if outcome != Outcome::Done {
                        return outcome;
                    }
                }
                if request.listed == list.len() {
                    break;
                }
                let first = list.page(request.listed);
                let run_end = mapping.shape.striping.run_end(first);
                let mut end = first;
                while request.listed < list.len() && list.page(request.listed) <= end.min(run_end - 1) {
                    end = list.page(request.listed) + block;
                    request.listed += 1;
                }
                request.pages = first..end;
            }
            request.lists = list.next();
            request.listed = 0;
            link.replies.release(slot);
        }
        Outcome::Done
    }

    fn read_ahead(&mut self, request: &mut ReadaheadRequest, budget: &mut u64) -> Outcome {
        // Closed since, and its slot perhaps another mapping's, with other pages, of another size, in this shard.
        let Ok(mapping) = self.mapping(request.mapping) else { return Outcome::Dropped };
        let (shape, first) = (&mapping.shape, request.pages.start);
        let end = request.pages.end.min(shape.pages()).min(shape.striping.run_end(first));
        let block = shape.order.pages();
        let is_whole = first.is_multiple_of(block) && (end - first.min(end)).is_multiple_of(block);
        if first >= end || !is_whole || shape.striping.shard_of(first) != self.cache.shard {
            return Outcome::Dropped;
        }
        if self.frames_needed > 0 || self.discards.iter().any(|job| job.overlaps(shape, first..end)) {
            return Outcome::Dropped;
        }
        let left_to_demand = self.frames_kept_free().div_ceil(2) + self.frames_reserved();
        let wanted = ((end - first).min(*budget) as usize + left_to_demand).div_ceil(block as usize);
        self.evict((shape.order, wanted), EVICT_STEPS);
        let mut run: Option<FolioRun> = None;
        let outcome = loop {
            let page = request.pages.start;
            if page == end {
                break Outcome::Done;
            }
            if *budget == 0 {
                break Outcome::Later;
            }
            let mut pages = block;
            if let Some(frame) = self.cache.find(shape, page) {
                if request.marker == Some(page) {
                    self.cache.shared.head(frame).set_marker();
                }
            } else {
                let most = end.min(page + request.used_at_once.max(pages));
                let order = self.order_for_new(shape, page, most, Want::Fill);
                pages = order.pages();
                if run.as_ref().is_none_or(|run| run.room_for(shape, page, pages) < pages) {
                    run.take().into_iter().for_each(|run| self.submit_ahead(&mapping, run));
                    if !self.has_spare_commands(shape.block_commands_max()) {
                        break Outcome::Later;
                    }
                }
                if self.cache.free_frames() < left_to_demand + pages as usize
                    || !self.cache.has_room(order, 1)
                    || !self.spares_reserve(order, 1)
                    || !self.share_affords_ahead(shape, pages)
                {
                    // Once round: then every folio was seen, and was in use.
                    request.turns += 1;
                    let round = self.cache.shared.headers.len() as u32 / EVICT_STEPS + 1;
                    break if request.turns > round { Outcome::Dropped } else { Outcome::Turning };
                }
                let head = self.cache.install(shape, page, (order, Rank::INACTIVE)).expect("there is room");
                let folio = self.cache.shared.folio(head);
                folio.set_unused();
                if request.marker.is_some_and(|marker| (page..page + pages).contains(&marker)) {
                    folio.set_marker();
                }
                folio.publish();
                bump(&self.link.counters.folios_installed, 1);
                run.get_or_insert_with(|| self.runs.start(shape, page)).append(shape, page, head, pages);
            }
            request.pages.start += pages;
            *budget = budget.saturating_sub(pages);
        };
        run.into_iter().for_each(|run| self.submit_ahead(&mapping, run));
        outcome
    }

    fn submit_ahead(&mut self, mapping: &OpenMapping, run: FolioRun) {
        let (lba, blocks) = (mapping.shape.lba(run.first_page), mapping.shape.blocks(&run.range()));
        let pages = run.range();
        let payload = ShardPayload::new(PayloadKind::ReadAhead(run), &self.watch);
        let Err(rejected) = self.queue.submit(&mapping.shape.namespace, Io::Read { lba, blocks }, payload)
        else {
            self.watch.submitted();
            bump(&self.link.counters.read_commands, 1);
            bump(&self.link.counters.pages_read, pages.end - pages.start);
            bump(&self.link.counters.readahead_pages, pages.end - pages.start);
            events::block_rq_issue(self.link.shard, Op::ReadAhead, &mapping.shape, &pages, self.now_ns);
            return;
        };
        // Full where the driver needs more commands for it than there are: no loss.
        if !matches!(rejected.reason, SubmitError::Full) {
            self.fail(&format!("a read was refused: {}", rejected.reason));
        }
        if let PayloadKind::ReadAhead(run) = rejected.payload.kind {
            run.folios().for_each(|head| self.forget_unread(mapping, head));
            self.runs.end(run);
        }
    }

    /// A read of pages that nobody had asked for ended.
    pub(super) fn readahead_completed(&mut self, run: &FolioRun, result: Result<(), CommandError>) {
        let Err(error) = result else {
            for head in run.folios() {
                let folio = self.cache.shared.folio(head);
                folio.fill_ahead(folio.order().pages());
                self.serve(head);
            }
            return;
        };
        tracing::debug!(%error, pages = ?run.range(), "readahead failed");
        let mapping = self.mapping(run.mapping).expect("a folio being read keeps its mapping open");
        for head in run.folios() {
            let folio = self.cache.shared.folio(head);
            let (page, pages) = (folio.key().page(), folio.order().pages());
            if self.parked.first(head).is_none() {
                self.forget_unread(&mapping, head);
            } else {
                // Another folio of the run may be the bad one: whoever waits for this one gets a read of its own.
                let mut own = self.runs.start(&mapping.shape, page);
                own.append(&mapping.shape, page, head, pages);
                self.reads.push_back(own);
            }
        }
    }

    /// Takes a folio back that was never filled and that nobody waits for.
    fn forget_unread(&mut self, mapping: &OpenMapping, head: FrameId) {
        // A discard may watch it.
        self.serve(head);
        self.cache.shared.folio(head).freeze_unfilled();
        self.cache.release(&mapping.shape, head);
    }
}
