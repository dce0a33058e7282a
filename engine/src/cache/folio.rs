//! A folio's header: what it holds, who holds it, and the state word on which all of that is decided.
//!
//! A folio is 2^order neighbouring pages of one mapping, aligned to their number, in as many neighbouring frames, aligned
//! likewise. There is one header a frame, allocated at open and never freed (*type-stable*): a thread may touch the header
//! that a stale index entry names; it pins first and checks the identity afterwards. Each header says which page its
//! frame holds, and the folio's order; the one of the first frame, the *head*, is the folio's: its state word is the one
//! that counts. The words of the others are frozen, so that nobody can take a folio by its middle.
//!
//! # The state word
//!
//! ```text
//!  63               33 32         23 22 21 20 19 18 17 16 15             0
//! ┌───────────────────┬─────────────┬──┬──┬──┬──┬──┬──┬──┬────────────────┐
//! │ version           │ filled      │BI│RE│WA│UN│FR│RA│EX│ shared pins    │
//! └───────────────────┴─────────────┴──┴──┴──┴──┴──┴──┴──┴────────────────┘
//! ```
//!
//! | field | set by | meaning |
//! |---|---|---|
//! | filled | shard; the holder of EX | pages from the folio's first on that hold their bytes |
//! | EXclusive | any thread, or the shard for it | one holder may change the bytes |
//! | FRozen | shard | free, or on its way out; every pin attempt fails |
//! | WAiters | shard | a request is parked on this folio: who releases it kicks the shard |
//! | REferenced | any thread | used since eviction last looked at it |
//! | ReadAhead | shard; cleared by any thread | the marker: its next reader asks for the next window (WB-28) |
//! | UNused | shard; cleared by any thread, REferenced with it | read ahead, and nobody has used it yet |
//! | BIased | who has counted a pin; cleared by who has EX or FR | shared pins may be published instead of counted ([`super::published`]) |
//! | version | who gives EX back after a change; the shard when the frame is free | what optimistic readers compare |
//!
//! A folio that was read in is filled whole. One that is made for a writer who appends is filled page by page, from its
//! first on: whoever writes the page behind the last filled one whole may do so without asking the shard. The pages
//! behind that are nobody's yet; a look-up treats them as missing.
//!
//! Whether pages are dirty or under writeback does not stand here but in their marks ([`super::tags`]), and nowhere
//! else: what a pass finds and what a folio is cannot disagree, and a folio that is dirty in part is nothing special. How
//! exclusive holders and writeback keep out of each other's way is [`super::exclusion`].
//!
//! Invariants, each kept by the method that could break it:
//! 1. EX excludes FR and held pins, counted and published.
//! 2. FR excludes held pins, counted and published, and EX.
//! 3. The word is changed by read-modify-write only, never stored: a pin attempt that fails leaves a `+1`
//!    for a moment, which must survive whatever the shard does meanwhile.
//! 4. Order and keys of a folio's headers change only while its head is frozen: who holds a pin finds them stable.

use super::published::{self, Slot};
use super::reclaim::Rank;
use crate::primitives::{AtomicU32, AtomicU64, Ordering, fence, pause};

/// Index of a frame and of its header within a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FrameId(pub u32);

/// "No frame" in links between headers.
pub(crate) const NONE: u32 = u32::MAX;

/// Which page of which mapping a folio holds: the mapping's slot in bits 48 to 59, the page index below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FolioKey(pub u64);

impl FolioKey {
    /// Bits of the page index: 2^48 pages of 4 KiB, more than NVMe's largest namespace of practical use.
    pub(crate) const INDEX_BITS: u32 = 48;

    /// Pages that keys can name.
    pub(crate) const PAGES_MAX: u64 = 1 << Self::INDEX_BITS;

    const BITS: u32 = 60;
    const ALL: u64 = (1 << Self::BITS) - 1;

    #[inline]
    pub(crate) const fn new(mapping: u16, page: u64) -> Self {
        debug_assert!(page < 1 << Self::INDEX_BITS && mapping < 1 << (Self::BITS - Self::INDEX_BITS));
        Self((mapping as u64) << Self::INDEX_BITS | page)
    }

    /// The key `pages` pages further on, of the same mapping if there are so many.
    #[inline]
    pub(crate) const fn wrapping_offset(self, pages: u64) -> Self {
        Self(self.0.wrapping_add(pages))
    }

    pub(crate) const fn mapping(self) -> u16 {
        (self.0 >> Self::INDEX_BITS) as u16
    }

    pub(crate) const fn page(self) -> u64 {
        self.0 & ((1 << Self::INDEX_BITS) - 1)
    }
}

/// What a frame is: a page, and how large the folio is that it is a part of. One word, so that who looks a page up
/// compares both at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity(u64);

impl Identity {
    /// Of a free frame: no page's.
    const FREE: Self = Self(FolioKey::ALL);

    #[inline]
    pub(crate) const fn new(key: FolioKey, order: FolioOrder) -> Self {
        Self(key.0 | (order.0 as u64) << FolioKey::BITS)
    }

    /// The identity of a page `pages` pages further on, of the same mapping if there are so many.
    #[inline]
    pub(crate) const fn wrapping_offset(self, pages: u64) -> Self {
        Self(self.0.wrapping_add(pages))
    }

    /// Whether both are the same page, as parts of whatever folios.
    #[inline]
    pub(crate) const fn is_same_page(self, other: Self) -> bool {
        (self.0 ^ other.0) << (u64::BITS - FolioKey::BITS) == 0
    }

    #[inline]
    pub(crate) const fn key(self) -> FolioKey {
        FolioKey(self.0 & FolioKey::ALL)
    }

    #[inline]
    pub(crate) const fn order(self) -> FolioOrder {
        FolioOrder((self.0 >> FolioKey::BITS) as u8)
    }
}

const PIN: u64 = 1;
const PINS: u64 = 0xFFFF;
/// Past this many shared pins a further one is refused: room is left for the attempts that are undone.
const PINS_MAX: u64 = 0x8000;
const EXCLUSIVE: u64 = 1 << 16;
const FROZEN: u64 = 1 << 18;
const READAHEAD: u64 = 1 << 17;
const UNUSED: u64 = 1 << 19;
const WAITERS: u64 = 1 << 20;
const REFERENCED: u64 = 1 << 21;
const BIASED: u64 = 1 << 22;
/// One page more is filled.
const FILL: u64 = 1 << 23;
const FILLED: u64 = 0x3FF << 23;
const VERSION: u64 = 1 << 33;

/// How large a folio is: 2^order pages, from one page to 512 (2 MiB).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FolioOrder(pub u8);

impl FolioOrder {
    /// The largest: a stripe.
    pub(crate) const MAX: Self = Self(9);
    /// How many orders there are.
    pub(crate) const COUNT: usize = Self::MAX.0 as usize + 1;

    #[inline]
    pub(crate) const fn pages(self) -> u64 {
        1 << self.0
    }

    /// The largest order of a folio that begins at page (or ends at frame) `at` and has at most `pages` pages.
    pub(crate) const fn fitting(at: u64, pages: u64) -> Self {
        let by_alignment = if at == 0 { Self::MAX.0 as u32 } else { at.trailing_zeros() };
        let by_length = pages.ilog2();
        let order = if by_alignment < by_length { by_alignment } else { by_length };
        Self(if order < Self::MAX.0 as u32 { order as u8 } else { Self::MAX.0 })
    }
}

/// What an exclusive holder wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Change a page that is filled.
    Change,
    /// Write a page whole: one that is filled, or the one behind the last that is.
    Overwrite,
}

/// One reading of a folio's state word.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct FolioState(u64);

impl FolioState {
    /// Of no folio.
    pub(crate) const NONE: Self = Self(FROZEN);

    /// Shared pins that are counted.
    #[inline]
    pub(crate) const fn pins(self) -> u64 {
        self.0 & PINS
    }
    pub(crate) const fn exclusive(self) -> bool {
        self.0 & EXCLUSIVE != 0
    }
    pub(crate) const fn frozen(self) -> bool {
        self.0 & FROZEN != 0
    }
    /// EXCLUSIVE or FROZEN is set by somebody who is looking for published pins yet, and steps back if there are any.
    #[inline]
    pub(crate) const fn undecided(self) -> bool {
        self.0 & BIASED != 0 && self.0 & (EXCLUSIVE | FROZEN) != 0
    }
    /// Pages, from the folio's first on, that hold their bytes.
    #[inline]
    pub(crate) const fn filled(self) -> u64 {
        (self.0 & FILLED) >> FILLED.trailing_zeros()
    }
    pub(crate) const fn referenced(self) -> bool {
        self.0 & REFERENCED != 0
    }
    /// Whether a pin on the folio's page `within` may be published, which changes nothing in this word: the folio is in use
    /// already, and nothing is to be told of readahead.
    #[inline]
    const fn publishable(self, within: u64) -> bool {
        const DECISIVE: u64 = EXCLUSIVE | FROZEN | BIASED | REFERENCED | READAHEAD | UNUSED;
        self.0 & DECISIVE == BIASED | REFERENCED && self.filled() > within
    }
    /// Whether the folio is as `at_hand` says: it may be read.
    #[inline]
    pub(crate) const fn is(self, at_hand: AtHand) -> bool {
        self.0 as u32 & AtHand::DECISIVE == at_hand.0
    }
    /// As [`is`](Self::is), and a pin on it may be published.
    #[inline]
    const fn is_biased_and(self, at_hand: AtHand) -> bool {
        const BIAS: u32 = BIASED as u32;
        self.0 as u32 & (AtHand::DECISIVE | BIAS) == at_hand.0 | BIAS
    }
    /// Whether a shared pin on the folio's page `within` could be granted now.
    #[inline]
    pub(crate) const fn shareable(self, within: u64) -> bool {
        self.0 & (EXCLUSIVE | FROZEN) == 0 && self.filled() > within && self.pins() < PINS_MAX
    }
}

impl std::fmt::Debug for FolioState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pins={} filled={} version={}", self.pins(), self.filled(), self.0 / VERSION)?;
        for (flag, name) in [
            (EXCLUSIVE, "exclusive"),
            (FROZEN, "frozen"),
            (WAITERS, "waiters"),
            (REFERENCED, "referenced"),
            (READAHEAD, "readahead"),
            (UNUSED, "unused"),
            (BIASED, "biased"),
        ] {
            if self.0 & flag != 0 {
                write!(f, " {name}")?;
            }
        }
        Ok(())
    }
}

/// What most folios are that are looked up: filled whole, in use, not read ahead, and nobody's exclusively. All of that lies in
/// the lower half of the state word, and is compared at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AtHand(u32);

impl AtHand {
    const DECISIVE: u32 = (EXCLUSIVE | FROZEN | REFERENCED | READAHEAD | UNUSED | FILLED) as u32;

    /// For folios of `order`, which is a mapping's smallest.
    pub(crate) const fn new(order: FolioOrder) -> Self {
        debug_assert!(order.0 < FolioOrder::MAX.0);
        Self((REFERENCED | (order.pages() * FILL)) as u32)
    }
}

/// What a release left to do for the thread that released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Released {
    /// Nothing.
    Quiet,
    /// Requests are parked on this folio: kick its shard.
    Kick,
}

/// What eviction finds of a folio when it looks at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Usage {
    /// It was used since the last look.
    Used,
    /// It was read ahead, and this is the first look at it before its first use.
    Ahead,
    /// Somebody has it, waits for it, or fills it.
    Held,
    /// Nothing of that, as far as one look tells.
    None,
}

/// What a pin found on a folio that was read ahead, and took off it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReadAhead(u64);

impl ReadAhead {
    pub(crate) const NONE: Self = Self(0);

    /// Whether there is anything to do about it.
    #[inline]
    pub(crate) fn any(self) -> bool {
        self != Self::NONE
    }

    /// The marker: the next window is due.
    pub(crate) fn marker(self) -> bool {
        self.0 & READAHEAD != 0
    }

    /// This was its first use.
    pub(crate) fn first_use(self) -> bool {
        self.0 & UNUSED != 0
    }
}

/// The header of one frame. 32 bytes, two a cache line.
#[derive(Debug)]
pub(crate) struct FolioHeader {
    state: AtomicU64,
    /// [`Identity`]; written by the shard while FROZEN, checked by threads after they pinned.
    identity: AtomicU64,
    /// Next header in the index bucket; written by the shard.
    pub(crate) bucket_next: AtomicU32,
    /// The tag leaf of this page; written by the shard while FROZEN, stable for whoever holds a pin. Of a free block's first
    /// frame, the free block in front of it.
    pub(crate) tag_leaf: AtomicU32,
    /// The frame behind this one in its queue of eviction; the shard's alone.
    pub(crate) queue_next: AtomicU32,
    /// What the shard notes of the frame for itself: of the first frame of a free block its order and [`FREE_BLOCK`]; for
    /// eviction the folio's rank, in its head, and whether the frame stands in a queue.
    notes: AtomicU32,
}

const FREE_ORDER: u32 = 0xF;
const FREE_BLOCK: u32 = 1 << 8;
const RANK_SHIFT: u32 = 12;
const RANK: u32 = 0xF << RANK_SHIFT;
/// The frame stands in a queue of eviction.
const QUEUED: u32 = 1 << 16;
/// It does so for a folio that is gone; the one that has the frame now wants a place of its own.
const REQUEUED: u32 = 1 << 17;

#[cfg(not(loom))]
const _: () = assert!(size_of::<FolioHeader>() == 32);

impl FolioHeader {
    /// A header of a free frame.
    pub(crate) fn new() -> Self {
        Self {
            state: AtomicU64::new(FROZEN),
            identity: AtomicU64::new(Identity::FREE.0),
            bucket_next: AtomicU32::new(NONE),
            tag_leaf: AtomicU32::new(NONE),
            queue_next: AtomicU32::new(NONE),
            notes: AtomicU32::new(0),
        }
    }

    #[inline]
    pub(crate) fn state(&self) -> FolioState {
        FolioState(self.state.load(Ordering::Acquire))
    }

    #[inline]
    pub(crate) fn identity(&self) -> Identity {
        Identity(self.identity.load(Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn key(&self) -> FolioKey {
        self.identity().key()
    }

    #[inline]
    pub(crate) fn tag_leaf(&self) -> u32 {
        self.tag_leaf.load(Ordering::Relaxed)
    }

    /// The order of the folio that this frame is a part of; 0 of a free one.
    #[inline]
    pub(crate) fn order(&self) -> FolioOrder {
        self.identity().order()
    }

    // ---- any thread -------------------------------------------------------------------------------------

    /// Takes a shared pin if the folio's page `within` may be shared and `holds` still says that it is the wanted one,
    /// with one atomic operation on success.
    ///
    /// `Err` says whether undoing the attempt left a kick to do.
    #[inline]
    pub(crate) fn try_pin(&self, within: u64, holds: impl Fn() -> bool) -> Result<ReadAhead, Released> {
        // Acquire: whatever the last exclusive holder, or the device, wrote is visible to who pins.
        let mut before = FolioState(self.state.fetch_add(PIN, Ordering::Acquire));
        let mut released = Released::Quiet;
        let mut decided = true;
        while before.undecided() && decided && holds() {
            // Mustn't go to the shard, behind the writer, where somebody holds the folio: that may be this very thread.
            if self.unpin() == Released::Kick {
                released = Released::Kick;
            }
            decided = self.await_decision();
            before = FolioState(self.state.fetch_add(PIN, Ordering::Acquire));
        }
        if before.shareable(within) && holds() {
            // One comparison for all three: a folio in use is referenced, unmarked, and not new.
            if before.0 & (REFERENCED | READAHEAD | UNUSED) == REFERENCED {
                return Ok(ReadAhead::NONE);
            }
            if before.0 & UNUSED != 0 {
                return Ok(self.take(READAHEAD | UNUSED | REFERENCED));
            }
            self.state.fetch_or(REFERENCED, Ordering::Relaxed);
            return Ok(if before.0 & READAHEAD == 0 { ReadAhead::NONE } else { self.take(READAHEAD) });
        }
        Err(if self.unpin() == Released::Kick { Released::Kick } else { released })
    }

    /// Waits until it is known whether who has set EXCLUSIVE or FROZEN keeps it: a membarrier's time, or until that thread
    /// runs again. False when it takes so long that the shard may as well be asked.
    #[cold]
    fn await_decision(&self) -> bool {
        const LOOKS_MAX: u32 = 1 << 20;
        (0..LOOKS_MAX).any(|look| {
            pause(look);
            !self.state().undecided()
        })
    }

    /// Takes `flags` off; says which of the two of readahead were there. Of several threads one is told.
    #[cold]
    fn take(&self, flags: u64) -> ReadAhead {
        ReadAhead(self.state.fetch_and(!flags, Ordering::Relaxed) & flags & (READAHEAD | UNUSED))
    }

    /// Takes the marker off, where somebody waits for the folio instead of pinning it.
    pub(crate) fn take_marker(&self) -> bool {
        self.state().0 & READAHEAD != 0 && self.take(READAHEAD).marker()
    }

    /// Notes the use of a folio that was granted; true when it had been read ahead and this is its first.
    pub(crate) fn take_unused(&self) -> bool {
        self.state().0 & UNUSED != 0 && self.take(UNUSED | REFERENCED).first_use()
    }

    /// Takes a shared pin by publishing it in `slot`, a free one of the calling thread, if the folio is biased and `holds` says
    /// that it is the wanted one. No store to the header.
    ///
    /// `Err` says whether undoing the attempt left a kick to do.
    #[inline]
    pub(crate) fn try_publish(
        &self,
        slot: &Slot,
        within: u64,
        holds: impl FnOnce() -> bool,
    ) -> Result<(), Released> {
        if !self.state().publishable(within) {
            return Err(Released::Quiet);
        }
        slot.set(self);
        // Acquire, as in `try_pin`.
        if self.state().publishable(within) && holds() { Ok(()) } else { Err(self.unpublish(slot)) }
    }

    /// As [`try_publish`](Self::try_publish) for a whole folio that `is` the wanted one and `at_hand`, where that is likely: it
    /// isn't looked at before.
    #[inline]
    pub(crate) fn try_publish_at_hand(
        &self,
        slot: &Slot,
        (is, at_hand): (Identity, AtHand),
    ) -> Result<(), Released> {
        slot.set(self);
        // Acquire, as in `try_pin`.
        let may_have = self.state().is_biased_and(at_hand) && self.identity() == is;
        if may_have { Ok(()) } else { Err(self.unpublish(slot)) }
    }

    /// Gives a published pin back.
    #[inline]
    pub(crate) fn unpublish(&self, slot: &Slot) -> Released {
        slot.clear();
        if self.state.load(Ordering::Relaxed) & WAITERS != 0 { Released::Kick } else { Released::Quiet }
    }

    /// Gives a shared pin back, which was published in `slot` or counted.
    #[inline]
    pub(crate) fn unpin_from(&self, slot: Option<&Slot>) -> Released {
        match slot {
            Some(slot) => self.unpublish(slot),
            None => self.unpin(),
        }
    }

    /// Lets shared pins be published from now on. By who has counted one.
    #[cold]
    pub(crate) fn bias(&self) {
        let before = self.state.fetch_or(BIASED, Ordering::Relaxed);
        debug_assert!(before & PINS != 0 && before & (EXCLUSIVE | FROZEN) == 0);
    }

    /// Whether the folio is in use, and not biased yet.
    #[inline]
    pub(crate) fn is_worth_biasing(&self) -> bool {
        self.state.load(Ordering::Relaxed) & (REFERENCED | BIASED) == REFERENCED
    }

    /// EXCLUSIVE or FROZEN was just set, where the word was `before`: whether there is no published pin either. Then the folio
    /// is biased no more.
    #[inline]
    fn is_alone(&self, before: u64) -> bool {
        before & BIASED == 0 || self.revoke()
    }

    #[cold]
    fn revoke(&self) -> bool {
        if published::is_held(self) {
            return false;
        }
        self.state.fetch_and(!BIASED, Ordering::Relaxed);
        true
    }

    /// Whether anybody holds the folio. WAITERS was announced before, if the answer is to be waited with.
    pub(crate) fn is_held(&self) -> bool {
        let seen = self.state.load(Ordering::Relaxed);
        seen & (PINS | EXCLUSIVE) != 0 || seen & BIASED != 0 && published::is_held(self)
    }

    /// The folio as it is, if its pages up to `last` may be read now without holding it (a sequence lock's read side): what was
    /// read counts if it [is unchanged](Self::is_unchanged) afterwards.
    #[inline]
    pub(crate) fn begin_reading(&self, last: u64) -> Option<FolioState> {
        // Of a folio that was read ahead somebody has to note the first use.
        const DECISIVE: u64 = EXCLUSIVE | FROZEN | REFERENCED | READAHEAD | UNUSED;
        let seen = self.state();
        if seen.0 & DECISIVE != REFERENCED && !self.comes_into_use(seen.0 & DECISIVE) {
            return None;
        }
        (seen.filled() > last).then_some(seen)
    }

    #[cold]
    fn comes_into_use(&self, decisive: u64) -> bool {
        if decisive == 0 {
            self.state.fetch_or(REFERENCED, Ordering::Relaxed);
        }
        decisive == 0
    }

    /// Whether the bytes that were read since the folio was as in `seen` are those of one moment.
    #[inline]
    pub(crate) fn is_unchanged(&self, seen: FolioState) -> bool {
        const STABLE: u64 = EXCLUSIVE | FROZEN | FILLED | VERSION.wrapping_neg();
        // The bytes were read before the word is.
        fence(Ordering::Acquire);
        (self.state.load(Ordering::Relaxed) ^ seen.0) & STABLE == 0
    }

    /// Gives a shared pin back.
    #[inline]
    pub(crate) fn unpin(&self) -> Released {
        // Release: this holder's reads are done before the shard, or a writer, may reuse the frame.
        let before = self.state.fetch_sub(PIN, Ordering::Release);
        debug_assert!(before & PINS != 0, "unpin without a pin: {:?}", FolioState(before));
        if before & WAITERS != 0 && before & PINS == PIN { Released::Kick } else { Released::Quiet }
    }

    /// Takes the folio exclusively for its page `within` if nobody else holds it and `holds` says that it is the wanted
    /// one. Fails also where requests are parked already: they came first. What the device reads isn't looked at here:
    /// see [`super::exclusion`].
    #[inline]
    pub(crate) fn try_exclusive(
        &self,
        within: u64,
        access: Access,
        holds: impl Fn() -> bool,
    ) -> Result<(), Released> {
        const BLOCKERS: u64 = PINS | EXCLUSIVE | FROZEN | WAITERS;
        // Of a folio that nobody holds and of which nothing is filled the device is writing the frames.
        let reach = (within + u64::from(access == Access::Change)).max(1);
        let mut seen = self.state.load(Ordering::Relaxed);
        loop {
            if seen & BLOCKERS != 0 || FolioState(seen).filled() < reach || !holds() {
                return Err(Released::Quiet);
            }
            match self.state.compare_exchange_weak(
                seen,
                (seen | EXCLUSIVE | REFERENCED) & !UNUSED,
                // Sequentially consistent for the look at WRITEBACK that follows it.
                Ordering::SeqCst,
                Ordering::Relaxed,
            ) {
                Ok(_) => break,
                Err(now) => seen = now,
            }
        }
        if !self.is_alone(seen) {
            return Err(self.release_exclusive_unchanged());
        }
        // Who reads without a hold sees EXCLUSIVE before any byte that is changed under it.
        fence(Ordering::Release);
        // The identity may have changed between the check and the exchange; now it can't any more.
        if holds() { Ok(()) } else { Err(self.release_exclusive_unchanged()) }
    }

    /// Gives exclusive possession back without having changed a byte.
    #[inline]
    pub(crate) fn release_exclusive_unchanged(&self) -> Released {
        let before = self.state.fetch_and(!EXCLUSIVE, Ordering::Release);
        debug_assert!(before & EXCLUSIVE != 0);
        if before & WAITERS != 0 { Released::Kick } else { Released::Quiet }
    }

    /// Gives exclusive possession back with changed bytes: the pages before `filled_to` hold theirs, and the caller has
    /// marked what it changed dirty.
    #[inline]
    pub(crate) fn release_exclusive_changed(&self, filled_to: u64) -> Released {
        // Only the holder of EX changes what is filled now, so it cannot move between this load and the addition below.
        let held = self.state.load(Ordering::Relaxed);
        debug_assert!(held & EXCLUSIVE != 0);
        let more = filled_to.saturating_sub(FolioState(held).filled());
        let change = (VERSION + more * FILL).wrapping_sub(EXCLUSIVE);
        let before = self.state.fetch_add(change, Ordering::Release);
        if before & WAITERS != 0 { Released::Kick } else { Released::Quiet }
    }

    // ---- the shard --------------------------------------------------------------------------------------

    /// Gives a frame that is frozen its page and its leaf, as a part of a folio of `order`.
    pub(crate) fn assign(&self, key: FolioKey, tag_leaf: u32, order: FolioOrder) {
        debug_assert!(self.state().frozen());
        self.identity.store(Identity::new(key, order).0, Ordering::Relaxed);
        self.tag_leaf.store(tag_leaf, Ordering::Relaxed);
    }

    /// Makes the frame a part of a folio of `order`; the folio's head is frozen.
    pub(crate) fn set_order(&self, order: FolioOrder) {
        self.identity.store(Identity::new(self.key(), order).0, Ordering::Relaxed);
    }

    /// The shard alone looks at them, so they need no read-modify-write.
    fn change_notes(&self, cleared: u32, set: u32) {
        self.notes.store(self.notes.load(Ordering::Relaxed) & !cleared | set, Ordering::Relaxed);
    }

    /// Makes the frame the first of a free block.
    pub(crate) fn set_free_block(&self, order: FolioOrder) {
        self.change_notes(FREE_ORDER, u32::from(order.0) | FREE_BLOCK);
    }

    /// The free block that began here is none any more.
    pub(crate) fn clear_free_block(&self) {
        self.change_notes(FREE_ORDER | FREE_BLOCK, 0);
    }

    /// Whether the frame is the first of a free block of exactly this order.
    pub(crate) fn is_free_block(&self, order: FolioOrder) -> bool {
        let wanted = u32::from(order.0) | FREE_BLOCK;
        self.notes.load(Ordering::Relaxed) & (FREE_ORDER | FREE_BLOCK) == wanted
    }

    /// Whether the frame holds a page: the shard alone knows.
    pub(crate) fn is_in_use(&self) -> bool {
        self.identity() != Identity::FREE
    }

    /// What the folio, whose head this is, has proven to eviction.
    pub(crate) fn rank(&self) -> Rank {
        Rank((self.notes.load(Ordering::Relaxed) & RANK) >> RANK_SHIFT)
    }

    pub(crate) fn set_rank(&self, rank: Rank) {
        self.change_notes(RANK, rank.0 << RANK_SHIFT);
    }

    /// Whether the frame stands in a queue of eviction.
    pub(crate) fn is_queued(&self) -> bool {
        self.notes.load(Ordering::Relaxed) & QUEUED != 0
    }

    pub(crate) fn set_queued(&self) {
        self.change_notes(0, QUEUED);
    }

    /// The frame stands in a queue for a folio that is gone, and is another's now.
    pub(crate) fn set_requeued(&self) {
        self.change_notes(0, REQUEUED);
    }

    /// The frame has left its queue; true where it stood there for a folio that is gone.
    pub(crate) fn take_queued(&self) -> bool {
        let requeued = self.notes.load(Ordering::Relaxed) & REQUEUED != 0;
        self.change_notes(QUEUED | REQUEUED, 0);
        requeued
    }

    /// Says of a frozen folio, before it is published, that it is read ahead.
    pub(crate) fn set_unused(&self) {
        let before = self.state.fetch_or(UNUSED, Ordering::Relaxed);
        debug_assert!(before & FROZEN != 0);
    }

    /// Makes this folio a marker.
    pub(crate) fn set_marker(&self) {
        self.state.fetch_or(READAHEAD, Ordering::Relaxed);
    }

    /// The read of a folio that is read ahead succeeded. It counts as referenced until its first use, and only from the
    /// second on again: what a scan has in front of it is worth more than what it has behind it, and that gives way
    /// to pages in use.
    pub(crate) fn fill_ahead(&self, pages: u64) {
        self.state.fetch_or(REFERENCED, Ordering::Relaxed);
        self.fill(pages);
    }

    /// Opens a folio that was assigned: found by look-ups, but nothing of it is filled yet.
    pub(crate) fn publish(&self) {
        let before = self.state.fetch_and(!(FROZEN | FILLED | REFERENCED), Ordering::Release);
        debug_assert!(before & (FROZEN | EXCLUSIVE | WAITERS) == FROZEN);
    }

    /// Opens a folio that was assigned, exclusively held on behalf of a writer that will fill pages of it.
    pub(crate) fn publish_exclusive(&self) {
        // FROZEN is set and EXCLUSIVE isn't (invariant 2), so one addition swaps them.
        let before = self.state.fetch_add(EXCLUSIVE.wrapping_sub(FROZEN), Ordering::Release);
        debug_assert!(before & (FROZEN | EXCLUSIVE | WAITERS | FILLED) == FROZEN);
    }

    /// The first `pages` pages hold their bytes: hits may begin. Nothing was filled before.
    pub(crate) fn fill(&self, pages: u64) {
        let before = self.state.fetch_add(pages * FILL, Ordering::Release);
        debug_assert!(FolioState(before).filled() == 0);
    }

    /// As [`fill`](Self::fill) of a folio of one page, and grants a shared pin on it on behalf of a parked request, at once: so nobody
    /// else has it in between, and it counts as unused. False, and nothing is done, where there is more to look at than that.
    pub(crate) fn fill_pinned(&self) -> bool {
        let seen = self.state.load(Ordering::Relaxed);
        debug_assert!(FolioState(seen).filled() == 0 && seen & (EXCLUSIVE | FROZEN | BIASED) == 0);
        // These the shard alone sets. Attempts to pin come and go meanwhile, and find it unfilled or shared.
        if seen & (WAITERS | READAHEAD | UNUSED) != 0 {
            return false;
        }
        self.state.fetch_add(FILL + PIN, Ordering::Release);
        true
    }

    /// Grants a shared pin on the folio's page `within` on behalf of a parked request. False where it can't be granted
    /// now.
    pub(crate) fn grant_pin(&self, within: u64) -> bool {
        let before = FolioState(self.state.fetch_add(PIN, Ordering::Acquire));
        if before.shareable(within) {
            self.state.fetch_or(REFERENCED, Ordering::Relaxed);
            return true;
        }
        self.state.fetch_sub(PIN, Ordering::Release);
        false
    }

    /// Grants exclusive possession on behalf of a parked request, when its pages aren't under writeback. False where
    /// it can't be granted now.
    pub(crate) fn grant_exclusive(&self, within: u64) -> bool {
        self.exchange_if(PINS | EXCLUSIVE | FROZEN, within + 1, EXCLUSIVE | REFERENCED)
    }

    /// Grants exclusive possession to who appends behind the first `filled` pages. False where it can't be granted now.
    pub(crate) fn grant_append(&self, filled: u64) -> bool {
        debug_assert!(filled > 0, "a folio of which nothing is filled is its maker's, or being read");
        self.exchange_if(PINS | EXCLUSIVE | FROZEN | WAITERS, filled, EXCLUSIVE | REFERENCED)
    }

    /// Announces that requests are parked here: every release from now on kicks the shard. The caller looks
    /// at the state again afterwards, since a release may just have passed by.
    pub(crate) fn announce_waiters(&self) {
        self.state.fetch_or(WAITERS, Ordering::AcqRel);
    }

    /// The last parked request has gone.
    pub(crate) fn retract_waiters(&self) {
        self.state.fetch_and(!WAITERS, Ordering::AcqRel);
    }

    /// Whether somebody holds the folio exclusively: the shard's look after it has set WRITEBACK.
    pub(crate) fn is_exclusive(&self) -> bool {
        self.state.load(Ordering::SeqCst) & EXCLUSIVE != 0
    }

    /// Takes a folio's REFERENCED off; says what it, or who has the folio, tells of its use (`folio_test_clear_referenced`).
    pub(crate) fn look(&self) -> Usage {
        let seen = self.state.load(Ordering::Relaxed);
        if seen & REFERENCED != 0 {
            self.clear_referenced();
            return if seen & UNUSED == 0 { Usage::Used } else { Usage::Ahead };
        }
        let held = seen & (PINS | EXCLUSIVE | FROZEN | WAITERS) != 0 || seen & FILLED == 0;
        if held { Usage::Held } else { Usage::None }
    }

    /// Takes REFERENCED off where the folio was used since the last look; what is read ahead and unused stays as it is.
    pub(crate) fn take_use(&self) -> bool {
        let used = self.state.load(Ordering::Relaxed) & (REFERENCED | UNUSED) == REFERENCED;
        if used {
            self.clear_referenced();
        }
        used
    }

    /// What has been done with the folio so far counts as no use of it.
    pub(crate) fn clear_referenced(&self) {
        self.state.fetch_and(!REFERENCED, Ordering::Relaxed);
    }

    /// Freezes a folio that nobody uses or waits for, to evict it; the caller looks at its marks then, and
    /// [thaws](Self::thaw) it if it is dirty after all (`__remove_mapping`).
    pub(crate) fn freeze_unused(&self) -> bool {
        // Acquire: who had it has done with it (their releases, their marks) before the frame is reused.
        self.exchange_if(PINS | EXCLUSIVE | FROZEN | WAITERS, 1, FROZEN)
    }

    /// Freezes a folio that is thrown away (discard, close), though requests may wait for it. False while somebody
    /// holds it or the device fills it.
    pub(crate) fn freeze_for_removal(&self) -> bool {
        // Nothing filled: the device is filling it.
        self.exchange_if(PINS | EXCLUSIVE | FROZEN, 1, FROZEN)
    }

    /// Opens a folio again that was frozen and stays after all.
    pub(crate) fn thaw(&self) {
        let before = self.state.fetch_and(!FROZEN, Ordering::Release);
        debug_assert!(before & FROZEN != 0);
    }

    /// Freezes a folio of which nothing was filled, since its read failed. Nobody can hold it.
    pub(crate) fn freeze_unfilled(&self) {
        let before = self.state.fetch_or(FROZEN, Ordering::AcqRel);
        debug_assert!(before & (FILLED | EXCLUSIVE | FROZEN) == 0);
    }

    /// Freezes an exclusively held folio of which nothing was filled: its writer went away. False when something is
    /// filled; the folio then is as it was.
    pub(crate) fn freeze_orphan(&self) -> bool {
        // The writer is gone and nobody else can have it, so nothing of this moves.
        let seen = self.state();
        debug_assert!(seen.exclusive());
        if seen.filled() > 0 {
            return false;
        }
        self.state.fetch_add(FROZEN.wrapping_sub(EXCLUSIVE), Ordering::AcqRel);
        true
    }

    /// A part of a frozen folio becomes a folio of its own, frozen still, with its first `filled` pages filled.
    pub(crate) fn become_head(&self, filled: u64, referenced: bool) {
        let now = self.state();
        debug_assert!(now.frozen());
        let change = (filled * FILL).wrapping_sub(now.filled() * FILL);
        self.state.fetch_add(change, Ordering::Relaxed);
        if referenced {
            self.state.fetch_or(REFERENCED, Ordering::Relaxed);
        }
    }

    /// Takes the flags off a frozen frame that are about its old content. WAITERS must be gone.
    pub(crate) fn scrub_frozen(&self) {
        let mut seen = self.state.load(Ordering::Relaxed);
        debug_assert!(seen & (FROZEN | BIASED) == FROZEN);
        loop {
            let scrubbed = seen & !(FILLED | REFERENCED | READAHEAD | UNUSED | WAITERS);
            // With another version whoever still reads without holding it finds that its bytes are others'.
            let next = scrubbed.wrapping_add(VERSION);
            match self.state.compare_exchange_weak(seen, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => break,
                Err(now) => seen = now,
            }
        }
        self.identity.store(Identity::FREE.0, Ordering::Relaxed);
    }

    /// Sets `set` if none of `blockers` is set and at least `filled` pages are filled. A concurrent pin attempt that is
    /// about to be undone counts as a blocker: the caller comes again.
    fn exchange_if(&self, blockers: u64, filled: u64, set: u64) -> bool {
        let mut seen = self.state.load(Ordering::Relaxed);
        loop {
            if seen & blockers != 0 || FolioState(seen).filled() < filled {
                return false;
            }
            match self.state.compare_exchange_weak(seen, seen | set, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) if self.is_alone(seen) => return true,
                Ok(_) => {
                    // Nobody else changes these two while one of them is set. Requests that wait here are the caller's, who
                    // has announced them before.
                    self.state.fetch_and(!(set & (EXCLUSIVE | FROZEN)), Ordering::Release);
                    return false;
                }
                Err(now) => seen = now,
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests;

#[cfg(all(test, loom))]
mod loom_models;
