//! Which folios are evicted: two queues, as the kernel's inactive and active lists, in the manner of S3-FIFO.
//!
//! A folio that comes in goes to the **inactive** queue, which has a tenth of the frames to itself. Only what proves itself
//! there reaches the **active** one, so a scan passes through that tenth and leaves the rest alone. Both are first in, first
//! out; a hit moves nothing, it sets REFERENCED, and the shard looks at that when a folio's turn has come:
//!
//! ```text
//!   a miss ──► inactive, fresh ──► inactive, old ──► not used ───► evicted, with a shadow entry
//!                   ▲    a use here      │
//!                   │    is noted        └── used ─┬─ and before ───────────┐
//!                   └──────────────────────────────┘ for the first time     ▼
//!   a refault ───────────────────────────────────────────────────────► active ──► evicted
//!                                                 used: hotter by one ▲      │    when its heat
//!                                                 not used: cooler    └──────┘    is spent
//! ```
//!
//! * **Once is not enough.** Uses that follow each other closely are one: the request that brings a page in counts for
//!   nothing, its neighbours that touch the same page again do so in the fresh part. A folio is activated that was used in
//!   two separate times: fresh and old, or in two rounds of the inactive queue.
//! * **A refault is a proof as well** (WB-27): what comes back before as many others were evicted as there are frames would
//!   have been a hit with a larger inactive queue ([`workingset`](super::workingset)). Pages evicted from the active queue leave no
//!   shadow: they had their time there and weren't used in it.
//! * **Heat.** An active folio is spared as often as it was found used, at most [`Rank::HEAT_MAX`] times more.
//!
//! The queues are linked through the heads' headers by one word each. A folio that is discarded in the middle of a queue
//! stays linked as a frame; whoever pops that frame finds it free, or asks it to queue up anew where it has become a folio
//! again. So every operation is O(1), and each folio is looked at a bounded number of times between two uses.

use super::folio::{FolioHeader, FolioKey, FolioOrder, FrameId, NONE, Usage};
use super::owned::{Remembered, ShardCache};
use super::shape::MappingShape;
use crate::primitives::Ordering;

/// One frame of so many belongs to the inactive queue: as long as it holds more, folios are evicted from it.
const INACTIVE_SHARE: u64 = 10;
/// Of so many folios of the inactive queue, [`OLD_FOLIOS`] are old. What is kept depends little on it between a half and three
/// quarters.
const INACTIVE_FOLIOS: u64 = 5;
const OLD_FOLIOS: u64 = 3;
/// Folios that grow old for one that is looked at: more than one, so that the old part gets its share.
const AGED_AT_ONCE: usize = 3;

/// In which queue a folio is, and what it has proven. Kept in the head's header, changed by the shard alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank(pub u32);

impl Rank {
    /// Came in, and hasn't been used again.
    pub(crate) const INACTIVE: Self = Self(0);
    /// Inactive, and was used once.
    const INACTIVE_USED: Self = Self(1);
    /// Has proven itself. Each rank above is spared once more.
    pub(crate) const ACTIVE: Self = Self(2);
    /// How often an active folio can be spared unused.
    const HEAT_MAX: u32 = 2;
    const HOTTEST: Self = Self(Self::ACTIVE.0 + Self::HEAT_MAX);

    pub(crate) fn is_active(self) -> bool {
        self >= Self::ACTIVE
    }

    fn hotter(self) -> Self {
        Self(self.0 + 1).min(Self::HOTTEST)
    }

    fn cooler(self) -> Option<Self> {
        (self > Self::ACTIVE).then(|| Self(self.0 - 1))
    }
}

/// Frames of heads, first in, first out.
#[derive(Debug)]
struct Queue {
    first: u32,
    last: u32,
    len: u64,
}

impl Queue {
    const EMPTY: Self = Self { first: NONE, last: NONE, len: 0 };

    fn push(&mut self, headers: &[FolioHeader], head: FrameId) {
        let folio = &headers[head.0 as usize];
        folio.queue_next.store(NONE, Ordering::Relaxed);
        folio.set_queued();
        match self.last {
            NONE => self.first = head.0,
            last => headers[last as usize].queue_next.store(head.0, Ordering::Relaxed),
        }
        self.last = head.0;
        self.len += 1;
    }

    fn pop(&mut self, headers: &[FolioHeader]) -> Option<FrameId> {
        let folio = headers.get(self.first as usize)?;
        let head = FrameId(self.first);
        self.first = folio.queue_next.load(Ordering::Relaxed);
        if self.first == NONE {
            self.last = NONE;
        }
        self.len -= 1;
        Some(head)
    }
}

/// The queues of one shard.
#[derive(Debug)]
pub(crate) struct Reclaim {
    fresh: Queue,
    old: Queue,
    active: Queue,
    /// Pages of inactive folios.
    inactive_pages: u64,
    /// Inactive pages up to which the active queue is the one that gives way.
    inactive_share: u64,
}

/// What became of a queue's next folio.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shrunk {
    /// It was evicted, in part at least, or the queue moved on.
    Advanced,
    /// It can't be evicted now, or shouldn't be yet: the other queue is asked as well.
    Kept,
}

impl Reclaim {
    pub(crate) fn new(frames: u32) -> Self {
        Self {
            fresh: Queue::EMPTY,
            old: Queue::EMPTY,
            active: Queue::EMPTY,
            inactive_pages: 0,
            inactive_share: (u64::from(frames) / INACTIVE_SHARE).max(1),
        }
    }

    /// A folio has come into the cache, at `rank`.
    pub(crate) fn enter(&mut self, headers: &[FolioHeader], head: FrameId, rank: Rank) {
        let folio = &headers[head.0 as usize];
        self.stay(folio, rank);
        if folio.is_queued() {
            // Its frame stands in a queue yet for another folio, that is gone: it gets a place of its own when that is met.
            folio.set_requeued();
        } else {
            self.queue_of(rank).push(headers, head);
        }
    }

    /// A folio counts with its pages, at `rank`.
    pub(crate) fn stay(&mut self, folio: &FolioHeader, rank: Rank) {
        folio.set_rank(rank);
        if !rank.is_active() {
            self.inactive_pages += folio.order().pages();
        }
    }

    /// A folio leaves the cache, or is made into others. Its frame may stay in a queue.
    pub(crate) fn leave(&mut self, folio: &FolioHeader) {
        if !folio.rank().is_active() {
            self.inactive_pages -= folio.order().pages();
        }
    }

    fn queue_of(&mut self, rank: Rank) -> &mut Queue {
        if rank.is_active() { &mut self.active } else { &mut self.fresh }
    }

    /// The folio at the front of a queue, which it leaves. `None` where that queue is empty or something else stood there.
    fn next(&mut self, active: bool, headers: &[FolioHeader]) -> Option<FrameId> {
        let queue = match active {
            true => &mut self.active,
            false if self.old.len > 0 => &mut self.old,
            false => &mut self.fresh,
        };
        let head = queue.pop(headers)?;
        let folio = &headers[head.0 as usize];
        let requeued = folio.take_queued();
        if folio.state().frozen() {
            return None;
        }
        if requeued || folio.rank().is_active() != active {
            self.queue_of(folio.rank()).push(headers, head);
            return None;
        }
        Some(head)
    }

    /// Folios of the fresh part grow old, as far as the old one lacks its share; whether they were used meanwhile is
    /// noted.
    fn age(&mut self, headers: &[FolioHeader]) {
        for _ in 0..AGED_AT_ONCE {
            let inactive = self.fresh.len + self.old.len;
            if self.old.len * INACTIVE_FOLIOS >= inactive * OLD_FOLIOS {
                return;
            }
            let Some(head) = self.fresh.pop(headers) else { return };
            let folio = &headers[head.0 as usize];
            // Of a frame that is free, or another's by now, it means nothing.
            if !folio.state().frozen() && folio.rank() == Rank::INACTIVE && folio.take_use() {
                folio.set_rank(Rank::INACTIVE_USED);
            }
            self.old.push(headers, head);
        }
    }

    /// Checks that each frame that says so stands in a queue, once, and that inactive pages are counted: for tests.
    ///
    /// # Panics
    /// When that isn't so.
    #[cfg(any(test, debug_assertions))]
    pub(crate) fn assert_consistent(&self, headers: &[FolioHeader], inactive_pages: u64) {
        assert_eq!(self.inactive_pages, inactive_pages, "pages of inactive folios");
        let mut queued = vec![false; headers.len()];
        for queue in [&self.fresh, &self.old, &self.active] {
            let (mut at, mut len, mut last) = (queue.first, 0, NONE);
            while let Some(folio) = headers.get(at as usize) {
                assert!(!std::mem::replace(&mut queued[at as usize], true), "frame {at} is queued twice");
                (last, len, at) = (at, len + 1, folio.queue_next.load(Ordering::Relaxed));
            }
            assert_eq!((queue.last, queue.len), (last, len));
        }
        for (at, (folio, queued)) in headers.iter().zip(queued).enumerate() {
            assert_eq!(folio.is_queued(), queued, "frame {at}");
        }
    }
}

impl ShardCache {
    /// Evicts until there is room for `folios` folios of `order` or `steps_max` folios were looked at. Clean, unpinned
    /// folios are evicted; of one that was never filled whole the rest is taken. `shape_of` finds a folio's mapping.
    pub(crate) fn evict<'s>(
        &mut self,
        (order, folios): (FolioOrder, usize),
        steps_max: u32,
        shape_of: impl Fn(FolioKey) -> Option<&'s MappingShape>,
    ) {
        for _ in 0..steps_max {
            if self.has_room(order, folios) {
                return;
            }
            let from_active = self.reclaim.inactive_pages < self.reclaim.inactive_share;
            if self.shrink(from_active, order, &shape_of) == Shrunk::Kept {
                let _ = self.shrink(!from_active, order, &shape_of);
            }
        }
    }

    /// Looks at the next folio of one queue.
    fn shrink<'s>(
        &mut self,
        active: bool,
        wanted: FolioOrder,
        shape_of: &impl Fn(FolioKey) -> Option<&'s MappingShape>,
    ) -> Shrunk {
        let headers = &self.shared.headers;
        if !active {
            self.reclaim.age(headers);
        }
        let Some(head) = self.reclaim.next(active, headers) else { return Shrunk::Kept };
        let folio = self.shared.folio(head);
        let rank = folio.rank();
        let (rank, shrunk) = match folio.look() {
            Usage::Used if active => (rank.hotter(), Shrunk::Advanced),
            Usage::Used if rank == Rank::INACTIVE => (Rank::INACTIVE_USED, Shrunk::Advanced),
            Usage::Used => {
                self.reclaim.leave(folio);
                (Rank::ACTIVE, Shrunk::Advanced)
            }
            // Spared once; what others have used gives way to it.
            Usage::Ahead | Usage::Held => (rank, Shrunk::Kept),
            Usage::None => match rank.cooler() {
                Some(cooler) => (cooler, Shrunk::Advanced),
                None if self.remove(head, shape_of) => {
                    if self.shared.folio(head).order() < wanted {
                        self.remove_around(head, wanted, shape_of);
                    }
                    return Shrunk::Advanced;
                }
                None => (rank, Shrunk::Kept),
            },
        };
        self.shared.folio(head).set_rank(rank);
        self.reclaim.queue_of(rank).push(&self.shared.headers, head);
        shrunk
    }

    /// Evicts a folio, or what of it was never filled, unless the device lacks bytes of it or somebody has it
    /// (`__remove_mapping`). True when frames were freed.
    pub(crate) fn evict_folio(
        &mut self,
        shape: &MappingShape,
        head: FrameId,
        remembered: Remembered,
    ) -> bool {
        let folio = self.shared.folio(head);
        let in_part = folio.state().filled() < folio.order().pages();
        if self.shared.is_needed(head) && !in_part || !folio.freeze_unused() {
            return false;
        }
        let filled = folio.state().filled();
        // Frozen, it can't be dirtied any more; it may have been between the look at its marks and now (WB-27).
        if !self.shared.is_needed(head) {
            self.evicted += filled;
            if !folio.rank().is_active() && remembered == Remembered::Yes {
                let first = folio.key().page();
                for block in first >> shape.order.0..(first + filled) >> shape.order.0 {
                    self.shadows.remember(shape.slot, block);
                }
            }
            self.release(shape, head);
        } else if filled < folio.order().pages() {
            self.trim(shape, head);
        } else {
            folio.thaw();
            return false;
        }
        true
    }

    /// Evicts the folio of `head` if the share that it belongs to may be taken from.
    fn remove<'s>(
        &mut self,
        head: FrameId,
        shape_of: &impl Fn(FolioKey) -> Option<&'s MappingShape>,
    ) -> bool {
        let shape = shape_of(self.shared.folio(head).key()).expect("a cached folio's mapping is open");
        self.shared.shares.may_take(shape) && self.evict_folio(shape, head, Remembered::Yes)
    }

    /// Evicts what lies beside a frame that was freed, in the block of frames that is wanted: folios here and there free
    /// no large block. Those that were used since somebody looked are spared.
    fn remove_around<'s>(
        &mut self,
        freed: FrameId,
        wanted: FolioOrder,
        shape_of: &impl Fn(FolioKey) -> Option<&'s MappingShape>,
    ) {
        let shared = self.shared.clone();
        let first = freed.0 & !(wanted.pages() as u32 - 1);
        let end = (first + wanted.pages() as u32).min(shared.frames.count());
        let mut at = first;
        while at < end {
            let folio = shared.folio(FrameId(at));
            let open = !folio.state().frozen();
            // A large folio's head lies before the block only where the block is a part of it.
            let pages = if open { folio.order().pages() as u32 } else { 1 };
            if open && folio.look() == Usage::None {
                self.remove(FrameId(at), shape_of);
            }
            at += pages;
        }
    }
}
