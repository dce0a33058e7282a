//! Published pins: shared holds that cost no atomic read-modify-write.
//!
//! A pin that is counted in the folio's state word is a locked instruction, and so is its release; each waits until every
//! load before it is done. For random hits that is the memory's whole latency an access, where plain loads overlap ten
//! deep. And two readers of one page pass its header's cache line to and fro. So where a folio is *biased* towards readers, a
//! reader doesn't touch the header: it writes the header's address into a slot of its own thread, and looks at the state
//! word (hazard pointers; BRAVO's biased locks, Dice and Kogan 2019).
//!
//! ```text
//!   reader                                    who wants the folio exclusively, or freezes it
//!   1. the folio's address into a slot        1. EXCLUSIVE or FROZEN into the state word
//!      (a compiler's barrier)                    (membarrier: every thread's barrier)
//!   2. state word: still biased, and          2. is the address in any thread's slot? Then step back.
//!      nobody's? else clear the slot             Else BIASED is taken off: the possession is exact
//! ```
//!
//! At least one of them sees the other. The barrier between the reader's store and its load is not executed by the
//! reader: `membarrier(2)` executes it in all threads of the process, some microseconds for who wants the folio
//! exclusively, once, since the folio isn't biased any more then. A folio becomes biased by a counted pin on a page that
//! was used before. What revocations cost is bounded by a debt ([`may_bias`]): after each some hundred counted pins pass before the
//! next folio is biased, so that folios which are written as often as read stay unbiased.
//!
//! **Invariant.** A folio that isn't biased has no published pins. BIASED is set under a counted pin, which excludes both
//! EXCLUSIVE and FROZEN, and taken off only by who has set one of these and then found no slot with the folio.
//!
//! Releasing is the mirror image: clear the slot, compiler's barrier, look at WAITERS. Whoever parks a request announces
//! WAITERS first and tries afterwards, by the steps above.
//!
//! Where the kernel refuses `membarrier` nothing is ever biased, and pins are counted.
//!
//! Beside these slots a thread has others for **notes** of pins that it has in another way: exclusive and counted ones that a
//! blocking call has granted. Nobody but the thread looks at them, where it would wait for a page: one that it has itself it would
//! wait for without end. A task that waits lets its thread go on, and another task of the same thread may release what
//! it waits for: so only blocking calls make notes, and only they ask. A thread with more pins than slots has no notes of
//! the rest, and waits up to `pin_wait`.

use super::folio::FolioHeader;
use crate::primitives::{AtomicU64, Ordering};

/// Pins that a thread can publish at once; more are counted.
pub(crate) const SLOTS: usize = 7;
/// Pins of other kinds that a thread can have notes of.
const NOTES: usize = 16;

/// Where one published pin stands: the address of the folio's head, or 0.
#[derive(Debug)]
pub(crate) struct Slot(AtomicU64);

impl Slot {
    fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    #[inline]
    fn is_free(&self) -> bool {
        // Acquire, and the store of `set` Release: who finds the next pin's address in a slot is behind the last one's end, too.
        self.0.load(Ordering::Acquire) == 0
    }

    /// Publishes a pin on the folio of `head`; the caller looks at its state afterwards. By the slot's thread only.
    #[inline]
    pub(super) fn set(&self, head: &FolioHeader) {
        self.0.store(address(head), Ordering::Release);
        registry::between_announcing_and_looking();
    }

    /// Takes a note off. By any thread.
    #[inline]
    pub(crate) fn forget(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// Takes it back; the caller looks for waiters afterwards. By any thread: a pin may be released by another than
    /// took it.
    #[inline]
    pub(super) fn clear(&self) {
        // Release: this holder's reads are done before whoever finds the slot empty changes or reuses the frame.
        self.0.store(0, Ordering::Release);
        registry::between_announcing_and_looking();
    }
}

fn address(head: &FolioHeader) -> u64 {
    std::ptr::from_ref(head).addr() as u64
}

/// What is kept of each thread that uses an engine: the slots of its published pins, and which lane of the hit counters is
/// its own. Made once, never freed, used again by later threads.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct ThreadBlock {
    slots: [Slot; SLOTS],
    /// No other block in use has this number.
    pub number: usize,
    notes: [Slot; NOTES],
}

impl ThreadBlock {
    fn new(number: usize) -> Self {
        let notes = std::array::from_fn(|_| Slot::new());
        Self { slots: std::array::from_fn(|_| Slot::new()), number, notes }
    }

    /// A slot without a pin, if there is one.
    #[inline]
    pub(super) fn free_slot(&self) -> Option<&Slot> {
        // Mostly the first.
        if self.slots[0].is_free() { Some(&self.slots[0]) } else { self.later_free_slot() }
    }

    #[inline(never)]
    fn later_free_slot(&self) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.is_free())
    }

    #[cfg(not(loom))]
    fn is_empty(&self) -> bool {
        self.slots.iter().chain(&self.notes).all(Slot::is_free)
    }

    fn holds(&self, head: &FolioHeader) -> bool {
        self.slots.iter().any(|slot| slot.0.load(Ordering::Acquire) == address(head))
    }
}

/// Whether any thread holds the folio of `head` by a published pin. EXCLUSIVE or FROZEN is in its state word already, or WAITERS.
#[cold]
pub(super) fn is_held(head: &FolioHeader) -> bool {
    // Where the kernel refuses the barrier nobody can tell: then it stays held.
    !registry::after_announcing() || registry::any_block(|block| block.holds(head))
}

/// Notes that the calling thread has the folio of `head`, until the note is [forgotten](Slot::forget).
#[inline]
pub(crate) fn note(head: &FolioHeader) -> Option<&'static Slot> {
    let note = this_thread()?.notes.iter().find(|note| note.is_free())?;
    note.0.store(address(head), Ordering::Relaxed);
    Some(note)
}

/// Whether the calling thread has the folio of `head`, as far as it knows.
pub(crate) fn is_held_here(head: &FolioHeader) -> bool {
    known_thread().is_some_and(|block| {
        block.holds(head) || block.notes.iter().any(|note| note.0.load(Ordering::Relaxed) == address(head))
    })
}

pub(crate) use registry::{known_thread, may_bias, prepare, this_thread, this_thread_for_good};

#[cfg(not(loom))]
mod registry {
    use std::cell::Cell;
    use std::ptr;
    use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering, compiler_fence, fence};

    use rustix::thread::{MembarrierCommand, membarrier};

    use super::ThreadBlock;

    /// A block in the list of all.
    struct Listed {
        block: ThreadBlock,
        in_use: AtomicBool,
        next: *const Listed,
    }

    /// All blocks there are; only ever added to.
    static FIRST: AtomicPtr<Listed> = AtomicPtr::new(ptr::null_mut());
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    /// Whether the kernel executes barriers for this process.
    static PREPARED: AtomicBool = AtomicBool::new(false);
    /// Counted pins that have to pass before a folio is biased again.
    static DEBT: AtomicU32 = AtomicU32::new(0);
    /// What one revocation adds to it: at 2 µs each, some 4 ns a counted pin.
    const DEBT_STEP: u32 = 512;
    const DEBT_MAX: u32 = 1 << 16;
    /// Pins for which a thread pays at once, so that the debt isn't a cache line that all of them change.
    const PAID_AT_ONCE: u32 = 16;

    thread_local! {
        /// This thread's block, once it has one; dangling when the thread is at its end and has given it back.
        static MINE: Cell<*const ThreadBlock> = const { Cell::new(ptr::null()) };
        static PINS: Cell<u32> = const { Cell::new(0) };
        /// The block was handed out for good: to a handle that may be used while the thread's locals are being destroyed.
        static KEPT: Cell<bool> = const { Cell::new(false) };
        static GIVE_BACK: GiveBack = const { GiveBack(Cell::new(None)) };
    }

    struct GiveBack(Cell<Option<&'static Listed>>);

    impl Drop for GiveBack {
        fn drop(&mut self) {
            if let Some(listed) = self.0.take() {
                MINE.set(ptr::dangling());
                if !KEPT.get() {
                    // Release: the next thread finds the slots as this one left them.
                    listed.in_use.store(false, Ordering::Release);
                }
            }
        }
    }

    /// Asks the kernel to execute barriers for this process, once. Without it pins are counted.
    pub(crate) fn prepare() {
        if !PREPARED.load(Ordering::Acquire) {
            match membarrier(MembarrierCommand::RegisterPrivateExpedited) {
                Ok(()) => PREPARED.store(true, Ordering::Release),
                Err(error) => tracing::debug!(%error, "membarrier is refused: every pin is counted"),
            }
        }
    }

    /// The calling thread's block, if it has one already.
    #[inline]
    pub(crate) fn known_thread() -> Option<&'static ThreadBlock> {
        let mine = MINE.get();
        // SAFETY: blocks are never freed, and `MINE` is null, dangling at its alignment, or one of them.
        #[expect(unsafe_code, reason = "a thread's block is reached by address")]
        (mine.addr() > align_of::<ThreadBlock>()).then(|| unsafe { &*mine })
    }

    /// The calling thread's block. `None` while the thread's locals are being destroyed.
    #[inline]
    pub(crate) fn this_thread() -> Option<&'static ThreadBlock> {
        known_thread().or_else(begin)
    }

    /// As [`this_thread`], and no other thread ever has the block.
    pub(crate) fn this_thread_for_good() -> Option<&'static ThreadBlock> {
        KEPT.set(true);
        this_thread()
    }

    #[cold]
    fn begin() -> Option<&'static ThreadBlock> {
        if !MINE.get().is_null() {
            return None;
        }
        // Not one in which pins or notes of its last thread stand yet: they would be taken for this thread's.
        let free = |listed: &&Listed| listed.block.is_empty() && !listed.in_use.swap(true, Ordering::AcqRel);
        let listed = list().find(free).unwrap_or_else(add);
        let kept = GIVE_BACK.try_with(|give_back| give_back.0.set(Some(listed)));
        if kept.is_err() {
            listed.in_use.store(false, Ordering::Release);
            MINE.set(ptr::dangling());
            return None;
        }
        MINE.set(&listed.block);
        Some(&listed.block)
    }

    fn add() -> &'static Listed {
        let block = ThreadBlock::new(COUNT.fetch_add(1, Ordering::Relaxed));
        let listed = Box::leak(Box::new(Listed { block, in_use: AtomicBool::new(true), next: ptr::null() }));
        let mut first = FIRST.load(Ordering::Relaxed);
        loop {
            listed.next = first;
            match FIRST.compare_exchange_weak(first, listed, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return listed,
                Err(now) => first = now,
            }
        }
    }

    fn list() -> impl Iterator<Item = &'static Listed> {
        let mut at: *const Listed = FIRST.load(Ordering::Acquire);
        std::iter::from_fn(move || {
            // SAFETY: null or a listed block; those are never freed, and `next` doesn't change once it is listed.
            #[expect(unsafe_code, reason = "a list of blocks that are never freed")]
            let listed = unsafe { at.as_ref() }?;
            at = listed.next;
            Some(listed)
        })
    }

    pub(super) fn any_block(is: impl Fn(&ThreadBlock) -> bool) -> bool {
        // A block that isn't in use may hold a pin that its thread handed on.
        list().any(|listed| is(&listed.block))
    }

    /// The reader's half of the barrier.
    #[inline]
    pub(super) fn between_announcing_and_looking() {
        compiler_fence(Ordering::SeqCst);
    }

    /// The other half: a barrier in every thread of the process. False when the kernel refuses it.
    pub(super) fn after_announcing() -> bool {
        fence(Ordering::SeqCst);
        let _ = DEBT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |debt| {
            Some((debt + DEBT_STEP).min(DEBT_MAX))
        });
        match membarrier(MembarrierCommand::PrivateExpedited) {
            Ok(()) => true,
            Err(error) => {
                // A registered process is refused by a filter that came later, or for lack of memory.
                PREPARED.store(false, Ordering::Relaxed);
                tracing::error!(
                    %error,
                    "the kernel refuses membarrier to a process that is registered for it: pages that are in use \
                     can't be changed or evicted until it doesn't"
                );
                false
            }
        }
    }

    /// Whether a folio that is in use may be biased now; called once a counted pin.
    #[inline]
    pub(crate) fn may_bias() -> bool {
        PREPARED.load(Ordering::Relaxed) && (DEBT.load(Ordering::Relaxed) == 0 || pay())
    }

    #[cold]
    fn pay() -> bool {
        let pins = PINS.get() + 1;
        PINS.set(pins % PAID_AT_ONCE);
        if pins == PAID_AT_ONCE {
            let paid = |debt: u32| Some(debt.saturating_sub(PAID_AT_ONCE));
            let _ = DEBT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, paid);
        }
        false
    }
}

#[cfg(loom)]
mod registry {
    //! For models: blocks for two threads, and barriers in the places of both halves.

    use super::ThreadBlock;
    use crate::primitives::{Ordering, fence};

    loom::lazy_static! {
        static ref BLOCKS: [ThreadBlock; 2] = [ThreadBlock::new(0), ThreadBlock::new(1)];
    }

    pub(crate) fn prepare() {}

    pub(crate) fn this_thread() -> Option<&'static ThreadBlock> {
        None
    }

    pub(crate) fn this_thread_for_good() -> Option<&'static ThreadBlock> {
        None
    }

    pub(crate) fn known_thread() -> Option<&'static ThreadBlock> {
        None
    }

    /// The block of a model's thread.
    pub(crate) fn block(number: usize) -> &'static ThreadBlock {
        &BLOCKS[number]
    }

    pub(super) fn any_block(is: impl Fn(&ThreadBlock) -> bool) -> bool {
        BLOCKS.iter().any(is)
    }

    pub(super) fn between_announcing_and_looking() {
        fence(Ordering::SeqCst);
    }

    pub(super) fn after_announcing() -> bool {
        fence(Ordering::SeqCst);
        true
    }

    pub(crate) fn may_bias() -> bool {
        false
    }
}

#[cfg(loom)]
#[cfg_attr(not(test), expect(unused_imports, reason = "models alone choose their blocks"))]
pub(crate) use registry::block;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_its_thread_s_until_it_is_taken_off_by_whoever() {
        let folios = [FolioHeader::new(), FolioHeader::new()];
        let notes = [note(&folios[0]), note(&folios[0]), note(&folios[1])];
        assert!(is_held_here(&folios[0]) && is_held_here(&folios[1]));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert!(!is_held_here(&folios[0]));
                notes[0].unwrap().forget();
                notes[2].unwrap().forget();
            });
        });
        assert!(is_held_here(&folios[0]), "there is another note of it");
        assert!(!is_held_here(&folios[1]));
        notes[1].unwrap().forget();
        assert!(!is_held_here(&folios[0]));
    }

    #[test]
    fn a_thread_s_notes_are_as_many_as_it_has_room_for() {
        let folio = FolioHeader::new();
        let notes: Vec<_> = std::iter::from_fn(|| note(&folio)).take(100).collect();
        assert_eq!(notes.len(), NOTES);
        notes.iter().for_each(|note| note.forget());
        assert!(!is_held_here(&folio));
    }
}
