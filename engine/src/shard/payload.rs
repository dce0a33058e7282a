//! What the device holds while a command is in flight: a run of folios, or nothing but the knowledge of what
//! the command was for.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use foliant_nvme::{Payload, Segment};

use crate::cache::SharedCache;
use crate::cache::folio::{FrameId, NONE};
use crate::cache::frames::PAGE_BYTES;
use crate::cache::shape::MappingShape;
use crate::reply::SlotId;

/// Folios of consecutive pages that travel in one command, chained through their headers in ascending order.
///
/// While a run exists its folios are being read in (not up to date, so nobody has them) or under writeback (so
/// nobody changes them): the device's possession.
#[derive(Debug)]
pub(crate) struct FolioRun {
    cache: Arc<SharedCache>,
    pub mapping: u16,
    pub first_page: u64,
    pub pages: u32,
    head: FrameId,
    tail: FrameId,
    /// Bytes of the last page that exist on the device; all before it are whole.
    tail_bytes: u32,
}

impl FolioRun {
    pub(crate) fn new(cache: Arc<SharedCache>, shape: &MappingShape, page: u64, frame: FrameId) -> Self {
        cache.folio(frame).run_next.store(NONE, Ordering::Relaxed);
        let tail_bytes = shape.page_bytes(page);
        Self { cache, mapping: shape.slot, first_page: page, pages: 1, head: frame, tail: frame, tail_bytes }
    }

    /// Whether `page` follows directly and one command can still carry it.
    pub(crate) fn takes(&self, shape: &MappingShape, page: u64) -> bool {
        self.mapping == shape.slot
            && page == self.first_page + u64::from(self.pages)
            && u64::from(self.pages) < shape.command_pages_max(self.first_page)
    }

    /// Appends the folio of the page that follows.
    pub(crate) fn append(&mut self, shape: &MappingShape, page: u64, frame: FrameId) {
        debug_assert!(self.takes(shape, page));
        self.cache.folio(frame).run_next.store(NONE, Ordering::Relaxed);
        self.cache.folio(self.tail).run_next.store(frame.0, Ordering::Relaxed);
        self.tail = frame;
        self.tail_bytes = shape.page_bytes(page);
        self.pages += 1;
    }

    /// The pages of the run.
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        self.first_page..self.first_page + u64::from(self.pages)
    }

    /// The frames in page order. The next link is read before a frame is handed out, so the receiver may
    /// release it.
    pub(crate) fn frames(&self) -> impl Iterator<Item = FrameId> + use<'_> {
        let mut at = self.head.0;
        std::iter::from_fn(move || {
            if at == NONE {
                return None;
            }
            let frame = FrameId(at);
            at = self.cache.folio(frame).run_next.load(Ordering::Relaxed);
            Some(frame)
        })
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
            run.frames().map(|frame| {
                let len_bytes = if frame == run.tail { run.tail_bytes } else { PAGE_BYTES as u32 };
                run.cache.frames.segment(frame, len_bytes)
            })
        })
    }
}
