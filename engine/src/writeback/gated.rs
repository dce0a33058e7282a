//! What log sequence numbers mean for a pass and for a sync (WB-40, WB-45).
//!
//! A pass over a gated mapping leaves out the pages whose log isn't durable yet ([`LsnFilter`]). A background
//! pass lets it rest at that. An integrity pass comes in two rounds:
//!
//! 1. The first writes what it may, and learns the highest number among the pages that it left out, as far as
//!    they were stamped before the sync began. That is what it waits for: fixed, and published to the gate's
//!    owner.
//! 2. When that number is durable, the second round writes the rest. A page that is still too new has been
//!    stamped since: the round stops at it, as it does at a page that somebody holds, so that no further
//!    writer gets it; its number is fixed by that, and waited for.
//!
//! Syncs that merged into one pass part at the end of its first round: those of which nothing was left out are done with
//! issuing, and each other range goes on as a pass of its own, so that nobody waits for the log of a page that he hasn't
//! asked for.
//!
//! So a sync waits for one number, and for one more a page that is stamped again and again; each wait has the
//! deadline `gate_wait`. Holding all its pages back from the start would make it one number always, but would
//! stop the very writers whose commits advance the log.

use std::time::Duration;

use super::issue::Issuer;
use crate::cache::folio::FrameId;
use crate::cache::lsn::{Lsn, PageLsns};
use crate::cache::tags::LeafPages;
use crate::error::Error;
use crate::gate::Gate;
use crate::stats::bump;

/// Which of the marked pages a pass is after, by their numbers, and the number that it waits for. The default is all
/// pages.
#[derive(Clone, Debug, Default)]
pub(crate) struct LsnFilter {
    /// Only pages whose first number is below this one, if it isn't none.
    before: Lsn,
    gated: Option<Gated>,
}

#[derive(Clone, Debug)]
struct Gated {
    gate: Gate,
    /// The second round: a page that is too new stops the pass, instead of being left out.
    strict: bool,
    /// Numbers above this one were given after the pass began.
    cap: Lsn,
    left_out: LeftOut,
    waiting: Option<Waiting>,
}

/// What a pass waits for.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    lsn: Lsn,
    since_ns: u64,
    /// The first page that it would write then, shard-local.
    local: u64,
}

/// The pages that a pass has left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LeftOut {
    pub pages: u64,
    /// The lowest number among them: until it is durable, another pass would meet the same.
    pub lowest: Lsn,
    /// The highest number among them that isn't above the cap.
    pub highest: Lsn,
    /// The first of them, shard-local.
    first: u64,
}

impl LeftOut {
    fn add(&mut self, local: u64, last: Lsn, cap: Lsn) {
        let highest = if last <= cap { last } else { Lsn::NONE };
        self.merge(Self { pages: 1, lowest: last, highest, first: local });
    }

    /// Adds what was left out later.
    pub(crate) fn merge(&mut self, later: Self) {
        if self.pages == 0 || later.pages == 0 {
            *self = if self.pages == 0 { later } else { *self };
            return;
        }
        self.pages += later.pages;
        self.lowest = self.lowest.min(later.lowest);
        self.highest = self.highest.max(later.highest);
        self.first = self.first.min(later.first);
    }
}

impl LsnFilter {
    /// For an integrity pass that began when `cap` was the mapping's highest number.
    pub(crate) fn through(gate: Option<&Gate>, cap: Lsn) -> Self {
        let gated = |gate: &Gate| Gated {
            gate: gate.clone(),
            strict: false,
            cap,
            left_out: LeftOut::default(),
            waiting: None,
        };
        Self { before: Lsn::NONE, gated: gate.map(gated) }
    }

    /// The same, for pages alone that the log before `lsn` is needed for.
    pub(crate) fn before(self, lsn: Lsn) -> Self {
        Self { before: lsn, ..self }
    }

    /// Puts a pass behind its mapping's gate that isn't yet.
    #[inline]
    pub(crate) fn ensure(&mut self, gate: Option<&Gate>) {
        if self.gated.is_none() && gate.is_some() {
            self.gated = Self::through(gate, Lsn(u64::MAX)).gated;
        }
    }

    /// Whether a page that is too new stops the pass.
    pub(crate) fn is_strict(&self) -> bool {
        self.gated.as_ref().is_some_and(|gated| gated.strict)
    }

    /// Those of the marked pages of a leaf that the pass tries to lock. `frames` by slot in the leaf.
    pub(crate) fn wanted(&mut self, lsns: &PageLsns, frames: &[FrameId; 64], mut leaf: LeafPages) -> u64 {
        if !self.before.is_none() {
            leaf.pages = only(leaf.pages, |slot| {
                let first = lsns.first(frames[slot]);
                !first.is_none() && first < self.before
            });
        }
        // To lock a page only to find it too new would send its writers to the shard for nothing.
        if self.is_strict() { leaf.pages } else { leaf.pages & !self.too_new(lsns, frames, leaf) }
    }

    /// Those of the locked pages of a leaf whose log isn't durable. Nobody stamps a page that is locked, so that this
    /// look is the one that counts.
    pub(crate) fn too_new(&mut self, lsns: &PageLsns, frames: &[FrameId; 64], leaf: LeafPages) -> u64 {
        let Some(Gated { gate, strict, cap, left_out, .. }) = &mut self.gated else { return 0 };
        let durable = gate.durable_lsn();
        only(leaf.pages, |slot| {
            let last = lsns.last(frames[slot]);
            if last <= durable {
                return false;
            }
            if !*strict {
                left_out.add(leaf.base + slot as u64, last, *cap);
            }
            true
        })
    }

    /// What was left out since the last call: of a background pass.
    pub(crate) fn take_left_out(&mut self) -> LeftOut {
        self.gated.as_mut().map_or(LeftOut::default(), |gated| std::mem::take(&mut gated.left_out))
    }

    /// Whether a pass has left pages out so far.
    pub(crate) fn has_left_out(&self) -> bool {
        self.gated.as_ref().is_some_and(|gated| gated.left_out.pages > 0)
    }

    /// An integrity pass has come to its end. If it has left pages out, its second round begins at the first of them: that
    /// is returned.
    pub(crate) fn second_round(&mut self, issuer: &Issuer<'_>) -> Option<u64> {
        let gated = self.gated.as_mut().filter(|gated| !gated.strict && gated.left_out.pages > 0)?;
        gated.strict = true;
        let LeftOut { pages, highest, first, .. } = gated.left_out;
        bump(&issuer.link.counters.pages_gated, pages);
        gated.wait_for(issuer, highest, first, pages);
        Some(first)
    }

    /// An integrity pass stops at the page `local` in `frame`: if that is because it is too new, and not since somebody holds
    /// it, its log is waited for. Writers are kept from it meanwhile, so that its number stays.
    pub(crate) fn stopped_at(&mut self, issuer: &Issuer<'_>, frame: FrameId, local: u64) {
        let shared = &issuer.cache.shared;
        if let Some(gated) = self.gated.as_mut().filter(|gated| gated.strict)
            && !shared.head(frame).is_exclusive()
        {
            gated.wait_for(issuer, shared.lsns.last(frame), local, 1);
        }
    }

    /// The page from which on a pass waits for its log; none, once that is durable. Else the shard is kicked when that may
    /// have changed.
    #[inline]
    pub(crate) fn waits(&mut self, shard: usize) -> Option<u64> {
        let gated = self.gated.as_mut()?;
        let waiting = gated.waiting?;
        if gated.gate.reached(waiting.lsn, shard) {
            gated.waiting = None;
            return None;
        }
        Some(waiting.local)
    }

    /// Whether it waited for its log when it was last looked at.
    pub(crate) fn is_waiting(&self) -> bool {
        self.gated.as_ref().is_some_and(|gated| gated.waiting.is_some())
    }

    /// That it waits for its log since before `limit_ns` ago. One whose log has become durable since it was last looked at
    /// doesn't wait any more.
    pub(crate) fn expired(&self, now_ns: u64, limit_ns: u64) -> Option<(&Gate, Lsn)> {
        let gated = self.gated.as_ref()?;
        let waiting = gated.waiting.filter(|waiting| now_ns.saturating_sub(waiting.since_ns) > limit_ns)?;
        (gated.gate.durable_lsn() < waiting.lsn).then_some((&gated.gate, waiting.lsn))
    }

    /// The error of who has waited for it for `waited`.
    pub(crate) fn error(&self, waited: Duration) -> Option<Error> {
        let gated = self.gated.as_ref()?;
        Some(gated.gate.error(gated.waiting?.lsn, waited))
    }
}

impl Gated {
    fn wait_for(&mut self, issuer: &Issuer<'_>, lsn: Lsn, local: u64, pages: u64) {
        let (link, gate) = (issuer.link, &self.gate);
        if gate.reached(lsn, link.shard) {
            return;
        }
        bump(&link.counters.gate_waits, 1);
        self.waiting = Some(Waiting { lsn, since_ns: issuer.now_ns, local });
        event_pass_waits(gate, link.shard, lsn, pages);
        gate.want(lsn);
    }
}

/// The bits of `pages` whose numbers `keep` holds for.
fn only(pages: u64, mut keep: impl FnMut(usize) -> bool) -> u64 {
    let (mut kept, mut rest) = (0, pages);
    while rest != 0 {
        let slot = rest.trailing_zeros();
        kept |= u64::from(keep(slot as usize)) << slot;
        rest &= rest - 1;
    }
    kept
}

/// An integrity pass begins to wait for a gate.
fn event_pass_waits(gate: &Gate, shard: usize, waits_for: Lsn, pages: u64) {
    let (name, durable) = (gate.name(), gate.durable_lsn());
    tracing::info!(gate = name, shard, %waits_for, %durable, pages, "a pass waits for a log to be durable");
}

/// Writeback has passed gated pages over.
pub(crate) fn event_pages_left_out(gate: &Gate, shard: usize, left_out: LeftOut) {
    let (name, durable) = (gate.name(), gate.durable_lsn());
    let LeftOut { pages, lowest, highest, .. } = left_out;
    tracing::debug!(gate = name, shard, pages, %lowest, %highest, %durable, "writeback left gated pages out");
}

/// What waits for a gate has waited long enough.
pub(crate) fn event_gate_wait_ended(gate: &Gate, shard: usize, waits_for: Lsn) {
    let (name, durable) = (gate.name(), gate.durable_lsn());
    tracing::warn!(gate = name, shard, %waits_for, %durable, "a log did not become durable in time; pages stay dirty");
}
