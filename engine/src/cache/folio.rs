//! A folio's header: what it holds, who holds it, and the state word on which all of that is decided.
//!
//! Headers are *type-stable*: one a frame, allocated at open, never freed. A thread may therefore touch the
//! header that a stale index entry names; it pins first and checks the identity afterwards.
//!
//! # The state word
//!
//! ```text
//!  63            32 31         22 21 20 19 18 17 16 15             0
//! ┌────────────────┬─────────────┬──┬──┬──┬──┬──┬──┬────────────────┐
//! │ version        │ reserved    │RE│WA│UP│FR│  │EX│ shared pins    │
//! └────────────────┴─────────────┴──┴──┴──┴──┴──┴──┴────────────────┘
//! ```
//!
//! | flag | set by | meaning |
//! |---|---|---|
//! | EXclusive | any thread, or the shard for it | one holder may change the bytes |
//! | FRozen | shard | free, or on its way out; every pin attempt fails |
//! | UPtodate | shard; the holder of EX | the frame holds the page's bytes |
//! | WAiters | shard | a request is parked on this folio: who releases it kicks the shard |
//! | REferenced | any thread | used since the eviction hand last passed |
//!
//! Whether the folio is dirty or under writeback does not stand here but in the marks of its pages
//! ([`super::tags`]), and nowhere else: what a pass finds and what a folio is cannot disagree. How exclusive holders
//! and writeback keep out of each other's way is [`super::exclusion`].
//!
//! Invariants, each kept by the method that could break it:
//! 1. EX excludes FR and held pins.
//! 2. FR excludes held pins and EX.
//! 3. The word is changed by read-modify-write only, never stored: a pin attempt that fails leaves a `+1`
//!    for a moment, which must survive whatever the shard does meanwhile.

use crate::primitives::{AtomicU32, AtomicU64, Ordering};

/// Index of a frame and of its header within a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FrameId(pub u32);

/// "No frame" in links between headers.
pub(crate) const NONE: u32 = u32::MAX;

/// Which page of which mapping a folio holds: the mapping's slot in the top 16 bits, the page index below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FolioKey(pub u64);

impl FolioKey {
    /// Bits of the page index: 2^48 pages of 4 KiB, more than NVMe's largest namespace of practical use.
    pub(crate) const INDEX_BITS: u32 = 48;

    /// Pages that keys can name.
    pub(crate) const PAGES_MAX: u64 = 1 << Self::INDEX_BITS;

    pub(crate) const fn new(mapping: u16, page: u64) -> Self {
        debug_assert!(page < 1 << Self::INDEX_BITS);
        Self((mapping as u64) << Self::INDEX_BITS | page)
    }

    pub(crate) const fn mapping(self) -> u16 {
        (self.0 >> Self::INDEX_BITS) as u16
    }

    pub(crate) const fn page(self) -> u64 {
        self.0 & ((1 << Self::INDEX_BITS) - 1)
    }
}

const PIN: u64 = 1;
const PINS: u64 = 0xFFFF;
/// Past this many shared pins a further one is refused: room is left for the attempts that are undone.
const PINS_MAX: u64 = 0x8000;
const EXCLUSIVE: u64 = 1 << 16;
const FROZEN: u64 = 1 << 18;
const UPTODATE: u64 = 1 << 19;
const WAITERS: u64 = 1 << 20;
const REFERENCED: u64 = 1 << 21;
const VERSION: u64 = 1 << 32;

/// One reading of a folio's state word.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct FolioState(u64);

impl FolioState {
    pub(crate) const fn pins(self) -> u64 {
        self.0 & PINS
    }
    pub(crate) const fn exclusive(self) -> bool {
        self.0 & EXCLUSIVE != 0
    }
    pub(crate) const fn frozen(self) -> bool {
        self.0 & FROZEN != 0
    }
    pub(crate) const fn uptodate(self) -> bool {
        self.0 & UPTODATE != 0
    }
    pub(crate) const fn has_waiters(self) -> bool {
        self.0 & WAITERS != 0
    }
    pub(crate) const fn referenced(self) -> bool {
        self.0 & REFERENCED != 0
    }
    /// Whether a shared pin could be granted now.
    pub(crate) const fn shareable(self) -> bool {
        self.0 & (EXCLUSIVE | FROZEN | UPTODATE) == UPTODATE && self.pins() < PINS_MAX
    }
}

impl std::fmt::Debug for FolioState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pins={} version={}", self.pins(), self.0 >> 32)?;
        for (flag, name) in [
            (EXCLUSIVE, "exclusive"),
            (FROZEN, "frozen"),
            (UPTODATE, "uptodate"),
            (WAITERS, "waiters"),
            (REFERENCED, "referenced"),
        ] {
            if self.0 & flag != 0 {
                write!(f, " {name}")?;
            }
        }
        Ok(())
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

/// The header of one frame. 32 bytes, two a cache line.
#[derive(Debug)]
pub(crate) struct FolioHeader {
    state: AtomicU64,
    /// [`FolioKey`]; written by the shard while FROZEN, checked by threads after they pinned.
    key: AtomicU64,
    /// Next header in the index bucket; written by the shard.
    pub(crate) bucket_next: AtomicU32,
    /// The tag leaf of this page; written by the shard while FROZEN, stable for whoever holds a pin.
    tag_leaf: AtomicU32,
    /// First parked request; the shard's alone.
    pub(crate) waiter_first: AtomicU32,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<FolioHeader>() == 32);

impl FolioHeader {
    /// A header of a free frame.
    pub(crate) fn new() -> Self {
        Self {
            state: AtomicU64::new(FROZEN),
            key: AtomicU64::new(u64::MAX),
            bucket_next: AtomicU32::new(NONE),
            tag_leaf: AtomicU32::new(NONE),
            waiter_first: AtomicU32::new(NONE),
        }
    }

    pub(crate) fn state(&self) -> FolioState {
        FolioState(self.state.load(Ordering::Acquire))
    }

    pub(crate) fn key(&self) -> FolioKey {
        FolioKey(self.key.load(Ordering::Relaxed))
    }

    pub(crate) fn tag_leaf(&self) -> u32 {
        self.tag_leaf.load(Ordering::Relaxed)
    }

    // ---- any thread -------------------------------------------------------------------------------------

    /// Takes a shared pin if the folio holds `key` and may be shared, with one atomic operation on success.
    ///
    /// `Err` says whether undoing the attempt left a kick to do.
    #[inline]
    pub(crate) fn try_pin(&self, key: FolioKey) -> Result<(), Released> {
        // Acquire: whatever the last exclusive holder, or the device, wrote is visible to who pins.
        let before = FolioState(self.state.fetch_add(PIN, Ordering::Acquire));
        if before.shareable() && self.key() == key {
            if !before.referenced() {
                self.state.fetch_or(REFERENCED, Ordering::Relaxed);
            }
            return Ok(());
        }
        Err(self.unpin())
    }

    /// Gives a shared pin back.
    #[inline]
    pub(crate) fn unpin(&self) -> Released {
        // Release: this holder's reads are done before the shard, or a writer, may reuse the frame.
        let before = self.state.fetch_sub(PIN, Ordering::Release);
        debug_assert!(before & PINS != 0, "unpin without a pin: {:?}", FolioState(before));
        if before & WAITERS != 0 && before & PINS == PIN { Released::Kick } else { Released::Quiet }
    }

    /// Takes the folio exclusively if it holds `key` and nobody else holds it. Fails also where requests are
    /// parked already: they came first. What the device reads isn't looked at here: see [`super::exclusion`].
    #[inline]
    pub(crate) fn try_exclusive(&self, key: FolioKey) -> Result<(), Released> {
        const BLOCKERS: u64 = PINS | EXCLUSIVE | FROZEN | WAITERS;
        let mut seen = self.state.load(Ordering::Relaxed);
        loop {
            if seen & BLOCKERS != 0 || seen & UPTODATE == 0 || self.key() != key {
                return Err(Released::Quiet);
            }
            match self.state.compare_exchange_weak(
                seen,
                seen | EXCLUSIVE | REFERENCED,
                // Sequentially consistent for the look at WRITEBACK that follows it.
                Ordering::SeqCst,
                Ordering::Relaxed,
            ) {
                Ok(_) => break,
                Err(now) => seen = now,
            }
        }
        // The key may have changed between the check and the exchange; now it can't any more.
        if self.key() == key { Ok(()) } else { Err(self.release_exclusive_unchanged()) }
    }

    /// Gives exclusive possession back without having changed a byte.
    pub(crate) fn release_exclusive_unchanged(&self) -> Released {
        let before = self.state.fetch_and(!EXCLUSIVE, Ordering::Release);
        debug_assert!(before & EXCLUSIVE != 0);
        if before & WAITERS != 0 { Released::Kick } else { Released::Quiet }
    }

    /// Gives exclusive possession back with changed bytes: the folio is up to date, and the caller has marked it dirty.
    #[inline]
    pub(crate) fn release_exclusive_changed(&self) -> Released {
        // Only the holder of EX changes UPTODATE now, so it cannot move between this load and the addition below.
        let held = self.state.load(Ordering::Relaxed);
        debug_assert!(held & EXCLUSIVE != 0);
        let mut change = VERSION.wrapping_sub(EXCLUSIVE);
        if held & UPTODATE == 0 {
            change = change.wrapping_add(UPTODATE);
        }
        let before = self.state.fetch_add(change, Ordering::Release);
        if before & WAITERS != 0 { Released::Kick } else { Released::Quiet }
    }

    // ---- the shard --------------------------------------------------------------------------------------

    /// Gives a free frame its identity; it stays FROZEN until [`publish`](Self::publish).
    pub(crate) fn assign(&self, key: FolioKey, tag_leaf: u32) {
        debug_assert!(self.state().frozen());
        self.key.store(key.0, Ordering::Relaxed);
        self.tag_leaf.store(tag_leaf, Ordering::Relaxed);
    }

    /// Opens a frame that was assigned: found by look-ups, but not yet up to date.
    pub(crate) fn publish(&self) {
        let before = self.state.fetch_and(!(FROZEN | UPTODATE | REFERENCED), Ordering::Release);
        debug_assert!(before & (FROZEN | EXCLUSIVE | WAITERS) == FROZEN);
    }

    /// Opens a frame that was assigned, exclusively held on behalf of a writer that will fill all of it.
    pub(crate) fn publish_exclusive(&self) {
        // FROZEN is set and EXCLUSIVE isn't (invariant 2), so one addition swaps them.
        let before = self.state.fetch_add(EXCLUSIVE.wrapping_sub(FROZEN), Ordering::Release);
        debug_assert!(before & (FROZEN | EXCLUSIVE | WAITERS | UPTODATE) == FROZEN);
    }

    /// The read from the device succeeded: hits may begin.
    pub(crate) fn mark_uptodate(&self) {
        self.state.fetch_or(UPTODATE, Ordering::Release);
    }

    /// Grants a shared pin on behalf of a parked request. False where it can't be granted now.
    pub(crate) fn grant_pin(&self) -> bool {
        let before = FolioState(self.state.fetch_add(PIN, Ordering::Acquire));
        if before.shareable() {
            self.state.fetch_or(REFERENCED, Ordering::Relaxed);
            return true;
        }
        self.state.fetch_sub(PIN, Ordering::Release);
        false
    }

    /// Grants exclusive possession on behalf of a parked request, when its pages aren't under writeback. False where
    /// it can't be granted now.
    pub(crate) fn grant_exclusive(&self) -> bool {
        self.exchange_if(PINS | EXCLUSIVE | FROZEN, UPTODATE, EXCLUSIVE | REFERENCED)
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

    /// Takes a folio's REFERENCED off. True when it had none and nobody uses it, as far as one look tells.
    pub(crate) fn turns_cold(&self) -> bool {
        let seen = self.state.load(Ordering::Relaxed);
        if seen & REFERENCED != 0 {
            self.state.fetch_and(!REFERENCED, Ordering::Relaxed);
            return false;
        }
        seen & (PINS | EXCLUSIVE | FROZEN | WAITERS) == 0 && seen & UPTODATE != 0
    }

    /// Freezes a folio that nobody uses or waits for, to evict it; the caller looks at its marks then, and
    /// [thaws](Self::thaw) it if it is dirty after all (`__remove_mapping`).
    pub(crate) fn freeze_unused(&self) -> bool {
        // Acquire: who had it has done with it (their releases, their marks) before the frame is reused.
        self.exchange_if(PINS | EXCLUSIVE | FROZEN | WAITERS, UPTODATE, FROZEN)
    }

    /// Freezes a folio that is thrown away (discard, close), though requests may wait for it. False while somebody
    /// holds it or the device fills it.
    pub(crate) fn freeze_for_removal(&self) -> bool {
        // Not up to date: the device is filling it.
        self.exchange_if(PINS | EXCLUSIVE | FROZEN, UPTODATE, FROZEN)
    }

    /// Opens a folio again that was frozen and stays after all.
    pub(crate) fn thaw(&self) {
        let before = self.state.fetch_and(!FROZEN, Ordering::Release);
        debug_assert!(before & FROZEN != 0);
    }

    /// Freezes a folio whose read failed. Nobody can hold it: it was never up to date.
    pub(crate) fn freeze_unread(&self) {
        let before = self.state.fetch_or(FROZEN, Ordering::AcqRel);
        debug_assert!(before & (UPTODATE | EXCLUSIVE | FROZEN) == 0);
    }

    /// Takes the flags off a frozen frame that are about its old content. WAITERS must be gone.
    pub(crate) fn scrub_frozen(&self) {
        let before = self.state.fetch_and(!(UPTODATE | REFERENCED | WAITERS), Ordering::Relaxed);
        debug_assert!(before & FROZEN != 0);
        self.key.store(u64::MAX, Ordering::Relaxed);
    }

    /// Sets `set` if none of `blockers` and all of `wanted` are set. A concurrent pin attempt that is about to
    /// be undone counts as a blocker: the caller comes again.
    fn exchange_if(&self, blockers: u64, wanted: u64, set: u64) -> bool {
        let mut seen = self.state.load(Ordering::Relaxed);
        loop {
            if seen & blockers != 0 || seen & wanted != wanted {
                return false;
            }
            match self.state.compare_exchange_weak(seen, seen | set, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const KEY: FolioKey = FolioKey::new(3, 77);

    fn cached() -> FolioHeader {
        let folio = FolioHeader::new();
        folio.assign(KEY, 0);
        folio.publish();
        folio.mark_uptodate();
        folio
    }

    #[test]
    fn key_keeps_mapping_and_page_apart() {
        let key = FolioKey::new(u16::MAX, (1 << FolioKey::INDEX_BITS) - 1);
        assert_eq!((key.mapping(), key.page()), (u16::MAX, (1 << 48) - 1));
    }

    #[test]
    fn a_free_frame_cannot_be_pinned_and_the_attempt_leaves_no_trace() {
        let folio = FolioHeader::new();
        assert!(folio.try_pin(KEY).is_err());
        assert!(folio.try_exclusive(KEY).is_err());
        assert_eq!(folio.state().pins(), 0);
    }

    #[test]
    fn a_folio_being_read_cannot_be_pinned() {
        let folio = FolioHeader::new();
        folio.assign(KEY, 0);
        folio.publish();
        assert!(folio.try_pin(KEY).is_err());
        folio.mark_uptodate();
        assert!(folio.try_pin(KEY).is_ok());
    }

    #[test]
    fn a_pin_on_another_identity_is_refused() {
        let folio = cached();
        assert!(folio.try_pin(FolioKey::new(3, 78)).is_err());
        assert!(folio.try_exclusive(FolioKey::new(4, 77)).is_err());
        assert_eq!(folio.state().pins(), 0);
        assert!(!folio.state().exclusive());
    }

    #[test]
    fn exclusive_excludes_pins_and_pins_exclude_exclusive() {
        let folio = cached();
        folio.try_pin(KEY).unwrap();
        assert!(folio.try_exclusive(KEY).is_err());
        let _ = folio.unpin();
        folio.try_exclusive(KEY).unwrap();
        assert!(folio.try_pin(KEY).is_err());
        assert!(!folio.freeze_for_removal());
    }

    #[test]
    fn wb27_only_unpinned_unreferenced_folios_freeze() {
        let folio = cached();
        folio.try_pin(KEY).unwrap();
        assert!(!folio.turns_cold(), "referenced: second chance");
        assert!(!folio.turns_cold(), "pinned");
        assert!(!folio.freeze_unused(), "pinned");
        let _ = folio.unpin();
        assert!(folio.turns_cold());
        assert!(folio.freeze_unused());
        assert!(folio.try_pin(KEY).is_err());
        folio.thaw();
        assert!(folio.try_pin(KEY).is_ok());
    }

    #[test]
    fn the_last_release_kicks_when_requests_are_parked() {
        let folio = cached();
        folio.try_pin(KEY).unwrap();
        folio.try_pin(KEY).unwrap();
        folio.announce_waiters();
        assert_eq!(folio.unpin(), Released::Quiet);
        assert_eq!(folio.unpin(), Released::Kick);
        assert!(folio.try_exclusive(KEY).is_err(), "parked requests came first");
        assert!(folio.grant_exclusive());
        assert_eq!(folio.release_exclusive_changed(), Released::Kick);
    }

    #[test]
    fn pins_are_refused_before_their_count_can_overflow() {
        let folio = cached();
        for _ in 0..PINS_MAX {
            folio.try_pin(KEY).unwrap();
        }
        assert!(folio.try_pin(KEY).is_err());
        assert_eq!(folio.state().pins(), PINS_MAX);
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    const OLD: FolioKey = FolioKey::new(1, 1);
    const NEW: FolioKey = FolioKey::new(1, 2);

    struct Frame {
        folio: FolioHeader,
        /// Stands for the frame's bytes: loom fails the model on any access that isn't ordered.
        bytes: UnsafeCell<u64>,
    }

    fn cached() -> Arc<Frame> {
        let frame = Arc::new(Frame { folio: FolioHeader::new(), bytes: UnsafeCell::new(OLD.0) });
        frame.folio.assign(OLD, 0);
        frame.folio.publish();
        frame.folio.mark_uptodate();
        frame
    }

    /// A reader that found the frame in a stale index entry never sees the bytes of another page, and never
    /// sees them change, while the shard evicts and reuses the frame.
    #[test]
    fn loom_a_pinned_folio_is_never_evicted_or_reused() {
        loom::model(|| {
            let frame = cached();
            let reader = {
                let frame = frame.clone();
                thread::spawn(move || {
                    if frame.folio.try_pin(OLD).is_ok() {
                        frame.bytes.with(|bytes| {
                            // SAFETY: a shared pin is held; loom checks that no one writes meanwhile.
                            #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                            let value = unsafe { *bytes };
                            assert_eq!(value, OLD.0);
                        });
                        let _ = frame.folio.unpin();
                    }
                })
            };
            if frame.folio.turns_cold() && frame.folio.freeze_unused() {
                frame.folio.scrub_frozen();
                frame.bytes.with_mut(|bytes| {
                    // SAFETY: the frame is frozen; loom checks that no one reads meanwhile.
                    #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                    unsafe {
                        *bytes = NEW.0;
                    }
                });
                frame.folio.assign(NEW, 0);
                frame.folio.publish();
                frame.folio.mark_uptodate();
                assert!(frame.folio.state().pins() <= 1, "an undone attempt may still show");
            }
            reader.join().unwrap();
            assert_eq!(frame.folio.state().pins(), 0);
        });
    }

    /// Shared and exclusive holders never overlap.
    #[test]
    fn loom_shared_and_exclusive_holders_never_overlap() {
        loom::model(|| {
            let frame = cached();
            let reader = {
                let frame = frame.clone();
                thread::spawn(move || {
                    if frame.folio.try_pin(OLD).is_ok() {
                        // SAFETY: a shared pin is held; loom checks it.
                        #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                        frame
                            .bytes
                            .with(|bytes| assert!(unsafe { *bytes } == OLD.0 || unsafe { *bytes } == 7));
                        let _ = frame.folio.unpin();
                    }
                })
            };
            if frame.folio.try_exclusive(OLD).is_ok() {
                // SAFETY: exclusive possession; loom checks it.
                #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                frame.bytes.with_mut(|bytes| unsafe { *bytes = 7 });
                let _ = frame.folio.release_exclusive_changed();
            }
            reader.join().unwrap();
        });
    }

    /// A request parked on a pinned folio is never forgotten: either the shard sees the pin gone when it looks
    /// again after announcing, or the release kicks.
    #[test]
    fn loom_a_release_beside_an_announcement_is_seen_or_kicks() {
        loom::model(|| {
            let frame = cached();
            frame.folio.try_pin(OLD).unwrap();
            let holder = {
                let frame = frame.clone();
                thread::spawn(move || frame.folio.unpin())
            };
            frame.folio.announce_waiters();
            let granted = frame.folio.grant_exclusive();
            let released = holder.join().unwrap();
            assert!(granted || released == Released::Kick);
        });
    }
}
