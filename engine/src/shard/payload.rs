//! What the device holds while a command is in flight: a run of folios, or nothing but the knowledge of what
//! the command was for.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use foliant_nvme::{Fua, Payload, Segment};

use crate::cache::SharedCache;
use crate::cache::folio::FrameId;
use crate::cache::frames::PAGE_BYTES;
use crate::cache::shape::MappingShape;
use crate::reply::SlotId;
use crate::shard::device::DeviceWatch;
use crate::shard::raw::RawIo;
use crate::writeback::streams::PairId;

/// Consecutive pages that travel in one command, in ascending order: whole folios being read in, or dirty parts of
/// folios.
///
/// While a run exists its pages are being read in (not filled, so nobody has them) or under writeback (so nobody changes
/// them): the device's possession.
///
/// It is handed on many times between being made and being ended, so it is a handle; what it holds stays in its place, and is
/// used again for a later run ([`RunPool`]).
#[derive(Debug)]
pub(crate) struct FolioRun(Box<RunBody>);

/// What a run consists of.
#[derive(Debug)]
pub(crate) struct RunBody {
    cache: Arc<SharedCache>,
    pub mapping: u16,
    pub first_page: u64,
    pages: u64,
    extents: Vec<Extent>,
    /// Pages that one command can carry from the first on.
    pages_max: u64,
    /// Bytes of the last page that exist on the device; all before it are whole.
    tail_bytes: u32,
    /// Whether a write of it goes through the volatile write cache.
    pub fua: Fua,
    /// What waits for it, beside syncs of its range.
    pub group: RunGroup,
    /// How often it has failed in passing.
    pub failures: u8,
    /// What counts its counterpart on the mirror, where its mapping has one.
    pub pair: PairId,
}

impl Deref for FolioRun {
    type Target = RunBody;

    #[inline]
    fn deref(&self) -> &RunBody {
        &self.0
    }
}

impl DerefMut for FolioRun {
    #[inline]
    fn deref_mut(&mut self) -> &mut RunBody {
        &mut self.0
    }
}

/// Writes that are waited for together (`nfs_io_completion`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum RunGroup {
    /// Only syncs wait for it.
    #[default]
    None,
    /// The flusher's expiry round, which ends with a commit.
    Expiry,
}

/// Frames that lie side by side, for pages that do.
#[derive(Clone, Copy, Debug)]
struct Extent {
    first: FrameId,
    pages: u32,
}

impl RunBody {
    /// How many of the `pages` pages from `page` on one command can still carry: whole blocks.
    pub(crate) fn room_for(&self, shape: &MappingShape, page: u64, pages: u64) -> u64 {
        if self.mapping != shape.slot || page != self.range().end {
            return 0;
        }
        pages.min(self.pages_max - self.pages)
    }

    /// Appends `pages` pages that follow, in frames from `frame` on; no more than there is [room for](Self::room_for).
    pub(crate) fn append(&mut self, shape: &MappingShape, page: u64, frame: FrameId, pages: u64) {
        debug_assert!(self.pages == 0 || self.room_for(shape, page, pages) == pages);
        match self.extents.last_mut() {
            Some(last) if last.first.0 + last.pages == frame.0 => last.pages += pages as u32,
            _ => self.extents.push(Extent { first: frame, pages: pages as u32 }),
        }
        self.pages += pages;
        self.tail_bytes = shape.page_bytes(page + pages - 1);
    }

    /// The pages of the run.
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        self.first_page..self.first_page + self.pages
    }

    /// How many pages.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// The heads of the folios of a run of whole folios, in page order. Each is looked at before the next is sought.
    pub(crate) fn folios(&self) -> impl Iterator<Item = FrameId> + '_ {
        self.extents.iter().flat_map(move |extent| {
            let mut at = extent.first.0;
            let end = extent.first.0 + extent.pages;
            std::iter::from_fn(move || {
                let head = (at < end).then_some(FrameId(at))?;
                at += self.cache.folio(head).order().pages() as u32;
                Some(head)
            })
        })
    }
}

/// Makes runs, and takes them back to use them again: nothing is allocated a command.
#[derive(Debug)]
pub(crate) struct RunPool {
    cache: Arc<SharedCache>,
    /// Runs that have ended, with their lists and handles of the cache. The last is made use of first: its memory was used last.
    ended: Vec<FolioRun>,
}

impl RunPool {
    /// `count` runs of up to `pages_max` pages. More are made when they are needed, and kept.
    pub(crate) fn new(cache: Arc<SharedCache>, count: usize, pages_max: usize) -> Self {
        let ended = (0..count).map(|_| Self::unused(&cache, Vec::with_capacity(pages_max))).collect();
        Self { cache, ended }
    }

    fn unused(cache: &Arc<SharedCache>, extents: Vec<Extent>) -> FolioRun {
        FolioRun(Box::new(RunBody {
            cache: cache.clone(),
            mapping: 0,
            first_page: 0,
            pages: 0,
            extents,
            pages_max: 0,
            tail_bytes: 0,
            fua: Fua::No,
            group: RunGroup::None,
            failures: 0,
            pair: PairId::NONE,
        }))
    }

    /// An empty run that begins at `page`.
    pub(crate) fn start(&mut self, shape: &MappingShape, page: u64) -> FolioRun {
        let mut run = self.ended.pop().unwrap_or_else(|| Self::unused(&self.cache, Vec::new()));
        let body = &mut *run;
        body.mapping = shape.slot;
        body.first_page = page;
        body.pages = 0;
        body.extents.clear();
        body.pages_max = shape.command_pages_max(page);
        body.tail_bytes = 0;
        body.fua = Fua::No;
        body.group = RunGroup::None;
        body.failures = 0;
        body.pair = PairId::NONE;
        run
    }

    /// The pages `pages` of `run`, in the same frames, to go where `shape` says. It may be longer than a command: what is
    /// submitted is cut from it by this, too.
    pub(crate) fn copy(
        &mut self,
        shape: &MappingShape,
        run: &FolioRun,
        pages: std::ops::Range<u64>,
    ) -> FolioRun {
        let mut copy = self.start(shape, pages.start);
        (copy.pages_max, copy.fua, copy.pair) = (u64::MAX, run.fua, run.pair);
        let mut at = run.first_page;
        for extent in &run.extents {
            let end = at + u64::from(extent.pages);
            let (from, to) = (at.max(pages.start), end.min(pages.end));
            if from < to {
                copy.append(shape, from, FrameId(extent.first.0 + (from - at) as u32), to - from);
            }
            at = end;
        }
        copy
    }

    /// A run has ended.
    pub(crate) fn end(&mut self, run: FolioRun) {
        self.ended.push(run);
    }
}

/// What travels with a command of a shard.
#[derive(Debug)]
pub(crate) struct ShardPayload {
    pub kind: PayloadKind,
    /// When it was submitted, for [`DeviceWatch`].
    pub watch_epoch: u8,
    /// When it was submitted, on the shard's clock.
    pub submitted_ns: u64,
}

impl ShardPayload {
    /// What travels with a command that is submitted now.
    pub(crate) fn new(kind: PayloadKind, watch: &DeviceWatch) -> Self {
        Self { kind, watch_epoch: watch.epoch(), submitted_ns: watch.now_ns() }
    }
}

/// What a shard's command is for.
#[derive(Debug)]
pub(crate) enum PayloadKind {
    /// Folios being read in.
    Read(FolioRun),
    /// Folios being read in that nobody has asked for.
    ReadAhead(FolioRun),
    /// Folios under writeback.
    Write(FolioRun),
    /// A commit; covers the writes that had completed up to `epoch`.
    Flush { namespace: u32, epoch: u64 },
    /// Part of a discard.
    Zero { slot: SlotId },
    /// Memory outside the cache.
    Raw(RawIo),
}

// SAFETY: the segments lie in the frames' DMA buffer, which `cache` keeps allocated. Conflicting access is
// excluded until the shard ends the run: pages being read in are not filled, so no pin is granted; pages under
// WRITEBACK cannot be taken exclusively.
#[expect(unsafe_code, reason = "the folio protocol vouches for the frames of a run")]
unsafe impl Payload for ShardPayload {
    #[inline]
    fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        let run = match &self.kind {
            PayloadKind::Read(run) | PayloadKind::ReadAhead(run) | PayloadKind::Write(run) => Some(run),
            PayloadKind::Flush { .. } | PayloadKind::Zero { .. } | PayloadKind::Raw(_) => None,
        };
        let raw = match &self.kind {
            PayloadKind::Raw(raw) => Some(raw.segment()),
            _ => None,
        };
        let of_run = run.into_iter().flat_map(|run| {
            let last = run.extents.len() - 1;
            run.extents.iter().enumerate().map(move |(index, extent)| {
                let missing = if index == last { PAGE_BYTES as u32 - run.tail_bytes } else { 0 };
                run.cache.frames.segment(extent.first, extent.pages * PAGE_BYTES as u32 - missing)
            })
        });
        of_run.chain(raw)
    }
}

/// What travels with a command for the mirror: the same memory, under the addresses that it has there.
#[derive(Debug)]
pub(crate) struct MirrorPayload {
    pub payload: ShardPayload,
    /// What a device address of the mirror is more than the primary's, wrapping.
    pub iova_offset: u64,
}

// SAFETY: the memory is that of `payload`, mapped for the mirror's device as long as its controller isn't stopped
// (`Controller::map_arena`); whatever keeps others from it is in force until this comes back, since a folio's writeback
// ends with all of its streams.
#[expect(unsafe_code, reason = "the payload of another stream vouches for its memory")]
unsafe impl Payload for MirrorPayload {
    fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        self.payload.segments().map(|segment| Segment {
            iova: foliant_nvme::Iova(segment.iova.0.wrapping_add(self.iova_offset)),
            ..segment
        })
    }
}
