//! Cache shares at work: a share at its limit evicts its own folios first, and what is above a lowered limit goes.
//!
//! The queues of eviction hold the folios of all shares; looking there for those of a small one would cost the whole cache. So a
//! share has a hand of its own, which goes over the pages of its mappings in their order, by the trees of their marks: what
//! it costs depends on the share alone. It passes a folio that was used since it last came by.
//!
//! Above a limit that was lowered, a step evicts a bounded number of folios and waits for nobody. What is pinned stays
//! until it isn't, what is dirty until the flusher, which is asked, has written it; the shard looks again every
//! [`CHECK_NS`].
//!
//! Requests for pages of a share that has no room wait in the line of those that wait for frames, and hold up nobody but
//! each other. A log's own writers pass the limit: pages behind a gate can't be written before the log is.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::open::OpenMapping;
use super::{CHECK_NS, Shard};
use crate::cache::folio::{FolioOrder, Usage};
use crate::cache::owned::Remembered;
use crate::cache::shape::MappingShape;
use crate::cache::shares::{SHARES_MAX, ShareId, UNLIMITED};
use crate::cache::tags::Find;
use crate::error::Error;
use crate::reply::{GRANTS_MAX, Grants, SlotId};
use crate::writeback::events;
use crate::writeback::guard::ReclaimScope;

/// Folios that one attempt to make room in a share looks at: bounds the step.
const SHARE_STEPS: u32 = 512;
/// When so many times all that is cached was looked at in vain, nothing can go for now.
const ROUNDS: u64 = 6;

/// Where a share's hand stands.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    /// Mapping slot.
    slot: u16,
    /// Shard-local page.
    local: u64,
}

/// Somebody waits until no more is held than may be.
#[derive(Debug)]
struct LimitWait {
    slot: SlotId,
    share: Option<ShareId>,
    of: Arc<str>,
    since_ns: u64,
}

/// What a shard knows of its shares beside their accounts.
#[derive(Debug)]
pub(crate) struct ShardShares {
    cursors: [Cursor; SHARES_MAX],
    /// Shares that a request waits for room in.
    waited_for: u64,
    /// Shares above their limit when that was last looked at.
    above: u64,
    cache_above: bool,
    /// Clean folios would help.
    wants_clean: bool,
    /// Folios that were looked at in vain since one went: once round often enough, only time helps.
    in_vain: u64,
    waits: Vec<LimitWait>,
    due_ns: Option<u64>,
}

impl ShardShares {
    pub(crate) fn new() -> Self {
        Self {
            cursors: [Cursor::default(); SHARES_MAX],
            waited_for: 0,
            above: 0,
            cache_above: false,
            wants_clean: false,
            in_vain: 0,
            waits: Vec::new(),
            due_ns: None,
        }
    }

    /// Before the requests that wait are tried again, each in its turn.
    pub(super) fn begin_retry(&mut self) {
        self.waited_for = 0;
    }

    /// Whether a request waits for room in that share.
    pub(super) fn is_waited_for(&self, share: ShareId) -> bool {
        self.waited_for & share.bit() != 0
    }

    /// Whether the flusher could help.
    pub(super) fn wants_clean(&self) -> bool {
        self.wants_clean
    }

    /// When to look again, while something is above its limit.
    pub(super) fn due_ns(&self) -> Option<u64> {
        self.due_ns
    }
}

impl Shard {
    /// Makes room in a mapping's share for the blocks that are `missing`; false where the request has to wait for that.
    pub(super) fn make_share_room(
        &mut self,
        mapping: &OpenMapping,
        missing: impl Fn(&Self) -> usize,
    ) -> bool {
        let share = mapping.shape.share;
        if self.cache.shared.shares.account(Some(share)).limit() == UNLIMITED
            || mapping.gates.log_of.is_some()
        {
            return true;
        }
        // Who came first goes first.
        if self.shares.is_waited_for(share) {
            return false;
        }
        for _ in 0..2 {
            // Evicting may hit a page of this very range, hence the second count.
            let excess = self.share_excess(mapping, &missing);
            if excess == 0 {
                return true;
            }
            self.evict_share(share, excess, SHARE_STEPS);
        }
        if self.share_excess(mapping, &missing) == 0 {
            return true;
        }
        self.shares.waited_for |= share.bit();
        false
    }

    fn share_excess(&self, mapping: &OpenMapping, missing: impl Fn(&Self) -> usize) -> u64 {
        let shape = &mapping.shape;
        let missing = missing(self) as u64 * shape.order.pages();
        if missing == 0 { 0 } else { self.cache.shared.shares.account(Some(shape.share)).excess(missing) }
    }

    /// Whether a folio of `order` that is larger than the `vacant` pages that were asked for leaves its share room for other
    /// requests.
    pub(super) fn share_affords(&self, shape: &MappingShape, order: FolioOrder, vacant: u64) -> bool {
        let account = self.cache.shared.shares.account(Some(shape.share));
        order.pages() <= vacant || account.excess(order.pages() + GRANTS_MAX as u64) == 0
    }

    /// Whether `pages` pages may be read ahead; where there is no room, the share's own cold folios make some.
    pub(super) fn share_affords_ahead(&mut self, shape: &MappingShape, pages: u64) -> bool {
        let excess = |shard: &Self| shard.cache.shared.shares.account(Some(shape.share)).excess(pages);
        match excess(self) {
            0 => true,
            _ if self.shares.is_waited_for(shape.share) => false,
            more => {
                self.evict_share(shape.share, more, SHARE_STEPS);
                excess(self) == 0
            }
        }
    }

    /// Why a request of that mapping has waited, where it is its share that has no room.
    pub(super) fn share_full(&self, mapping: u16, waited: Duration) -> Option<Error> {
        let mapping = self.mapping(mapping).ok()?;
        let share = mapping.share.as_ref().filter(|share| self.shares.is_waited_for(share.id()))?;
        let limit_pages = self.cache.shared.shares.account(Some(share.id())).limit();
        let cause = self.write_error.clone().or_else(|| self.gate_cause(waited)).map(Box::new);
        Some(Error::ShareFull { share: share.name().into(), waited, limit_pages, cause })
    }

    /// Evicts folios of one share until `pages` pages have gone or `steps_max` folios were looked at. Returns how many of
    /// those there were.
    fn evict_share(&mut self, share: ShareId, pages: u64, steps_max: u32) -> u32 {
        // Whatever may come to be called from here: it evicts what is clean and writes nothing (WB-10).
        let _reclaim = ReclaimScope::enter();
        let (evicted, released) = (self.cache.evicted, self.cache.released);
        let mut cursor = self.shares.cursors[usize::from(share.0)];
        let (mut steps, mut at_wrap) = (0, None);
        while steps < steps_max && self.cache.released - released < pages {
            let Some(mapping) = self.next_of_share(share, cursor.slot) else {
                // Round once more, unless the last round has met nothing.
                if at_wrap.replace(steps) == Some(steps) {
                    break;
                }
                cursor = Cursor::default();
                continue;
            };
            let shape = &mapping.shape;
            if shape.slot != cursor.slot {
                cursor = Cursor { slot: shape.slot, local: 0 };
            }
            let end = shape.striping.local_range(self.cache.shard, 0..shape.pages()).end;
            while steps < steps_max && self.cache.released - released < pages {
                let rest = cursor.local..end;
                let Some(leaf) = self.cache.tree.next(shape.tree, Find::Present, rest) else {
                    cursor = Cursor { slot: shape.slot + 1, local: 0 };
                    break;
                };
                steps += 1;
                let local = leaf.base + u64::from(leaf.pages.trailing_zeros());
                let page = shape.striping.page(self.cache.shard, local);
                let frame = self.cache.find(shape, page).expect("a present page is indexed");
                let place = self.cache.shared.place(frame);
                cursor.local = local - place.within + place.order.pages();
                if self.cache.shared.folio(place.head).look() == Usage::None {
                    self.cache.evict_folio(shape, place.head, Remembered::Yes);
                }
            }
        }
        self.shares.cursors[usize::from(share.0)] = cursor;
        events::lru_shrink(self.link.shard, &self.link.counters, self.cache.evicted - evicted, self.now_ns);
        steps
    }

    /// The open mapping of that share with the lowest slot from `slot` on.
    fn next_of_share(&self, share: ShareId, slot: u16) -> Option<Arc<OpenMapping>> {
        let slots = self.open.iter().map(|open| open.slot).filter(|&open| open >= slot);
        let of_share = slots.filter_map(|slot| self.mappings[usize::from(slot)].as_ref());
        of_share.filter(|open| open.shape.share == share).min_by_key(|open| open.shape.slot).cloned()
    }

    /// Whether something of that share could be written.
    fn has_dirty(&self, share: ShareId) -> bool {
        let open = self.open.iter().filter_map(|open| self.mappings[usize::from(open.slot)].as_ref());
        open.filter(|open| open.shape.share == share)
            .any(|open| self.cache.shared.marked[usize::from(open.shape.slot)].writable() > 0)
    }

    /// Evicts what is above a limit, a bounded number of folios a step, and answers who waits for that. True while more
    /// can be done at once.
    pub(super) fn step_shares(&mut self) -> bool {
        if self.cache.shared.shares.take_changed() {
            self.shares.in_vain = 0;
            let above = |share: &u8| self.cache.shared.shares.account(Some(ShareId(*share))).excess(0) > 0;
            self.shares.above =
                (0..SHARES_MAX as u8).filter(above).fold(0, |all, at| all | ShareId(at).bit());
            self.shares.cache_above = self.cache.shared.shares.account(None).excess(0) > 0;
        }
        self.shares.due_ns = None;
        self.shares.wants_clean = self.shares.waited_for != 0 && self.any_dirty(self.shares.waited_for);
        if self.shares.above == 0 && !self.shares.cache_above && self.shares.waits.is_empty() {
            return false;
        }
        let released = self.cache.released;
        let steps = self.lower_shares() + self.lower_cache();
        let in_vain = if self.cache.released > released { 0 } else { self.shares.in_vain + u64::from(steps) };
        self.shares.in_vain = in_vain;
        let answered = self.answer_limit_waits();
        if self.shares.above != 0 || self.shares.cache_above || !self.shares.waits.is_empty() {
            self.shares.due_ns = Some(self.now_ns.saturating_add(CHECK_NS));
        }
        let all_seen = in_vain >= ROUNDS * self.cache.used_frames() as u64;
        answered || steps > 0 && !all_seen
    }

    fn any_dirty(&self, shares: u64) -> bool {
        (0..SHARES_MAX as u8).map(ShareId).any(|share| shares & share.bit() != 0 && self.has_dirty(share))
    }

    /// Evicts from shares above their limits. Returns how many folios were looked at.
    fn lower_shares(&mut self) -> u32 {
        let mut steps = 0;
        for share in (0..SHARES_MAX as u8).map(ShareId) {
            if self.shares.above & share.bit() == 0 {
                continue;
            }
            let accounts = self.cache.shared.clone();
            let account = accounts.shares.account(Some(share));
            steps += self.evict_share(share, account.excess(0), SHARE_STEPS);
            if account.excess(0) == 0 {
                self.shares.above &= !share.bit();
            } else {
                self.shares.wants_clean |= self.has_dirty(share);
            }
        }
        steps
    }

    /// Evicts while the cache is above its limit. Returns how many folios were looked at, at most.
    fn lower_cache(&mut self) -> u32 {
        if !self.shares.cache_above {
            return 0;
        }
        self.evict((FolioOrder(0), 1), SHARE_STEPS);
        if self.cache.shared.shares.account(None).excess(0) == 0 {
            self.shares.cache_above = false;
        } else {
            self.shares.wants_clean |= self.any_dirty(u64::MAX);
        }
        SHARE_STEPS
    }

    /// Makes known what the cache holds.
    pub(super) fn publish_counts(&self) {
        let counters = &self.link.counters;
        counters.pages_installed.store(self.cache.installed, Ordering::Relaxed);
        counters.pages_released.store(self.cache.released, Ordering::Relaxed);
        counters.pages_cached.store(self.cache.used_frames() as u64, Ordering::Relaxed);
    }

    /// Somebody wants to know when no more is held than may be.
    pub(super) fn begin_limit_wait(&mut self, slot: SlotId, share: Option<ShareId>, of: Arc<str>) {
        self.shares.waits.push(LimitWait { slot, share, of, since_ns: self.now_ns });
    }

    fn answer_limit_waits(&mut self) -> bool {
        let mut waits = std::mem::take(&mut self.shares.waits);
        let before = waits.len();
        waits.retain(|wait| {
            let above_pages = self.cache.shared.shares.account(wait.share).excess(0);
            let waited_ns = self.now_ns.saturating_sub(wait.since_ns);
            if above_pages == 0 {
                self.answer(wait.slot, Ok(Grants::none()));
            } else if waited_ns > self.limits.pin_wait_ns {
                let (of, waited) = (wait.of.clone(), Duration::from_nanos(waited_ns));
                self.answer(wait.slot, Err(Error::AboveLimit { of, waited, above_pages }));
            } else {
                return true;
            }
            false
        });
        let answered = waits.len() < before;
        self.shares.waits = waits;
        answered
    }
}
