//! What the device holds while a command is in flight: a run of folios, or nothing but the knowledge of what
//! the command was for.

use std::sync::Arc;

use foliant_nvme::{Payload, Segment};

use crate::cache::SharedCache;
use crate::cache::folio::FrameId;
use crate::cache::frames::PAGE_BYTES;
use crate::cache::shape::MappingShape;
use crate::reply::SlotId;

/// Folios of consecutive pages that travel in one command, in ascending order.
///
/// While a run exists its folios are being read in (not up to date, so nobody has them) or under writeback (so
/// nobody changes them): the device's possession.
#[derive(Debug)]
pub(crate) struct FolioRun {
    cache: Arc<SharedCache>,
    pub mapping: u16,
    pub first_page: u64,
    frames: Vec<FrameId>,
    /// Pages that one command can carry from the first on.
    pages_max: u64,
    /// Bytes of the last page that exist on the device; all before it are whole.
    tail_bytes: u32,
}

impl FolioRun {
    /// Whether `page` follows directly and one command can still carry it.
    pub(crate) fn takes(&self, shape: &MappingShape, page: u64) -> bool {
        self.mapping == shape.slot && page == self.range().end && (self.frames.len() as u64) < self.pages_max
    }

    /// Appends the folio of the page that follows.
    pub(crate) fn append(&mut self, shape: &MappingShape, page: u64, frame: FrameId) {
        debug_assert!(self.takes(shape, page));
        self.frames.push(frame);
        self.tail_bytes = shape.page_bytes(page);
    }

    /// The pages of the run.
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        self.first_page..self.first_page + self.frames.len() as u64
    }

    /// The frames in page order.
    pub(crate) fn frames(&self) -> &[FrameId] {
        &self.frames
    }
}

/// Makes runs, and takes their lists of frames back to use them again: nothing is allocated a command.
#[derive(Debug)]
pub(crate) struct RunPool {
    cache: Arc<SharedCache>,
    lists: Vec<Vec<FrameId>>,
}

impl RunPool {
    /// Lists for `count` runs of up to `pages_max` pages. More are made when they are needed, and kept.
    pub(crate) fn new(cache: Arc<SharedCache>, count: usize, pages_max: usize) -> Self {
        Self { cache, lists: (0..count).map(|_| Vec::with_capacity(pages_max)).collect() }
    }

    /// A run of one folio.
    pub(crate) fn start(&mut self, shape: &MappingShape, page: u64, frame: FrameId) -> FolioRun {
        let mut frames = self.lists.pop().unwrap_or_default();
        frames.push(frame);
        FolioRun {
            cache: self.cache.clone(),
            mapping: shape.slot,
            first_page: page,
            frames,
            pages_max: shape.command_pages_max(page),
            tail_bytes: shape.page_bytes(page),
        }
    }

    /// A run has ended.
    pub(crate) fn end(&mut self, run: FolioRun) {
        let mut frames = run.frames;
        frames.clear();
        self.lists.push(frames);
    }
}

/// What travels with a command of a shard.
#[derive(Debug)]
pub(crate) struct ShardPayload {
    pub kind: PayloadKind,
    /// When it was submitted, for [`DeviceWatch`](super::device::DeviceWatch).
    pub watch_epoch: u8,
}

/// What a shard's command is for.
#[derive(Debug)]
pub(crate) enum PayloadKind {
    /// Folios being read in.
    Read(FolioRun),
    /// Folios under writeback.
    Write(FolioRun),
    /// A commit; covers the writes that had completed up to `epoch`.
    Flush { namespace: u32, epoch: u64 },
    /// Part of a discard.
    Zero { slot: SlotId },
}

// SAFETY: the segments lie in the frames' DMA buffer, which `cache` keeps allocated. Conflicting access is
// excluded by the folios' state words until the shard ends the run: frames being read in are not UPTODATE, so
// no pin is granted; frames under WRITEBACK cannot be taken exclusively.
#[expect(unsafe_code, reason = "the folio protocol vouches for the frames of a run")]
unsafe impl Payload for ShardPayload {
    #[inline]
    fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        let run = match &self.kind {
            PayloadKind::Read(run) | PayloadKind::Write(run) => Some(run),
            PayloadKind::Flush { .. } | PayloadKind::Zero { .. } => None,
        };
        run.into_iter().flat_map(|run| {
            let last = run.frames.len() - 1;
            run.frames.iter().enumerate().map(move |(index, &frame)| {
                let len_bytes = if index == last { run.tail_bytes } else { PAGE_BYTES as u32 };
                run.cache.frames.segment(frame, len_bytes)
            })
        })
    }
}
