//! What other threads ask of a shard.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::open::OpenMapping;
use super::passes::PassOrder;
use super::raw::LabelAction;
use crate::cache::lsn::Lsn;
use crate::cache::shares::ShareId;
use crate::mirror::LabelPlace;
use crate::reply::{Hold, SlotId};

/// A request and the slot that waits for its answer.
#[derive(Debug)]
pub(crate) struct Message {
    pub slot: SlotId,
    pub request: Request,
}

/// How a request for pages wants them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    /// Bring in what is missing, all of it at once, and grant shared pins on that. Pages that are there already
    /// are not granted: so the request waits for I/O only, never for another holder.
    Fill,
    /// As `Fill`, of the pages that the list of the reply slot names, each pinned by itself.
    Gather,
    /// Make what is missing without reading it, exclusively held, for a writer that will fill all of it. Pages
    /// that are there already are not granted.
    Create,
    /// One page, pinned, to be copied out and released at once: in a folio of any size.
    Copy,
    /// One page, held exclusively, to be changed and released at once: in a folio of any size.
    Change,
    /// As `Change`, also while the device reads the page: in unstable mappings.
    ChangeBesideDevice,
    /// One page, pinned for as long as its holder likes: in a folio of its own.
    Pin,
    /// One page, held exclusively for as long as its holder likes: in a folio of its own.
    PinMut,
}

impl Want {
    /// Whether the page must be a folio by itself, since its holder may ask for the next one.
    pub(crate) fn is_pin(self) -> bool {
        matches!(self, Self::Pin | Self::PinMut)
    }

    /// Whether it is for one page, whoever holds it now.
    pub(crate) fn is_single(self) -> bool {
        !matches!(self, Self::Fill | Self::Gather | Self::Create)
    }

    /// How what is granted is held.
    pub(crate) fn hold(self) -> Hold {
        match self {
            Self::Fill | Self::Gather | Self::Copy | Self::Pin => Hold::Shared,
            Self::Create | Self::Change | Self::ChangeBesideDevice | Self::PinMut => Hold::Exclusive,
        }
    }
}

/// What a writer does where the dirty limits slow it (WB-24).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pacing {
    /// It waits.
    Wait,
    /// It is answered [`Error::Throttled`](crate::Error::Throttled).
    TryAgain,
}

/// What is asked.
#[derive(Clone, Debug)]
pub(crate) enum Request {
    /// A mapping was opened.
    Open(Arc<OpenMapping>),
    /// A mapping is being closed: drop its folios, dirty ones too (it was synced before).
    Close { mapping: u16 },
    /// Pages `first..first + count` of a mapping, all of this shard; at most
    /// [`GRANTS_MAX`](crate::reply::GRANTS_MAX).
    Pages { mapping: u16, first: u64, count: u32, want: Want, pacing: Pacing },
    /// The pages in the lists of the message's reply slots: each slot is answered by itself.
    Gather { mapping: u16 },
    /// Write everything dirty in a page range, and wait for every write in it (WB-03, WB-29).
    Sync { mapping: u16, pages: Range<u64> },
    /// A pass of its own (`struct writeback_control`).
    Writeback { mapping: u16, order: PassOrder },
    /// Write what the log before `lsn` is needed for, of the whole mapping and nothing else, and wait for every write in
    /// it (WB-45).
    FlushUntil { mapping: u16, lsn: Lsn },
    /// Lower `oldest` to the smallest first number among the mapping's pages that are dirty or under
    /// writeback.
    OldestLsn { mapping: u16, oldest: Arc<AtomicU64> },
    /// Flush a namespace's volatile write cache, together with whoever else wants that (WB-21).
    Commit(Arc<OpenMapping>),
    /// The same of its mirror's.
    CommitMirror(Arc<OpenMapping>),
    /// Copy this shard's part of the mapping to its mirror.
    Resync { mapping: u16 },
    /// Evict the cached pages of a range, the dirty ones after they have been written.
    Drop { mapping: u16, pages: Range<u64> },
    /// Wait until a share, or the cache, holds no more than it may; `of` names it.
    AwaitLimit { share: Option<ShareId>, of: Arc<str> },
    /// Read or write the label of a mirrored range.
    Label { place: LabelPlace, action: LabelAction },
    /// Drop the cached pages of a range and zero it on the device (WB-26).
    Discard { mapping: u16, pages: Range<u64> },
    /// Drop the cached pages of a range behind a mapping's new end, and leave the device as it is.
    Truncate { mapping: u16, pages: Range<u64> },
}
