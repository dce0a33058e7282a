//! How a shard answers: reply slots, fixed in number, and the future that waits on one.
//!
//! A request takes a slot, sends its message, and waits; the shard writes the answer into the slot and wakes it.
//! Nothing is allocated a request. A future that is dropped before its answer came leaves the slot to the
//! shard, which gives back whatever it had granted.

use std::cell::{Cell, UnsafeCell};
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use crate::cache::folio::FrameId;
use crate::error::Result;
use crate::free_slots::FreeSlots;
use crate::page_list::PageList;
use crate::writeback::control::WritebackOutcome;

/// Pages that one request can ask for: what a `read_at` brings in with one message.
pub(crate) const GRANTS_MAX: usize = 32;

const FREE: u32 = 0;
const PENDING: u32 = 1;
const DONE: u32 = 2;
const ABANDONED: u32 = 3;

/// Index of a reply slot within its shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SlotId(pub u32);

/// How the frames of a reply are held for the requester.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// A shared pin each.
    Shared,
    /// Exclusively, and perhaps not yet filled.
    Exclusive,
}

/// What a shard did for a request: the folios that it granted, each held for the requester, who releases it.
#[derive(Clone, Debug)]
pub(crate) struct Grants {
    pub hold: Hold,
    /// Bit *i* set: `frames[i]` is granted for page `first + i` of the request.
    pub mask: u32,
    /// Bit *i* set: that page is held together with the one before it, as a part of the same folio.
    pub joined: u32,
    pub frames: [FrameId; GRANTS_MAX],
    /// What a pass that was asked for came to.
    pub outcome: WritebackOutcome,
    /// Pages reserved for what is granted exclusively ([`cache::balance`](crate::cache::balance)).
    pub reserved: u32,
}

impl Grants {
    pub(crate) fn none() -> Self {
        let outcome = WritebackOutcome::default();
        Self {
            hold: Hold::Shared,
            mask: 0,
            joined: 0,
            frames: [FrameId(0); GRANTS_MAX],
            outcome,
            reserved: 0,
        }
    }

    /// The answer to who asked for a pass.
    pub(crate) fn of_pass(outcome: WritebackOutcome) -> Self {
        Self { outcome, ..Self::none() }
    }

    /// Grants the page at `position`, in `frame`.
    pub(crate) fn add(&mut self, position: usize, frame: FrameId) {
        self.add_joined(position, frame, 1);
    }

    /// Grants `pages` pages of one folio that are held and released together, from `frame` on.
    pub(crate) fn add_joined(&mut self, position: usize, frame: FrameId, pages: usize) {
        self.frames[position] = frame;
        for at in position..position + pages {
            self.mask |= 1 << at;
            self.joined |= u32::from(at > position) << at;
        }
    }

    /// What is granted: position of the first page, its frame, and how many pages are held with it.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, FrameId, usize)> + '_ {
        let first = (0..GRANTS_MAX).filter(|at| (self.mask & !self.joined) >> at & 1 != 0);
        first.map(|at| {
            let joined = (self.joined as u64 >> at >> 1).trailing_ones() as usize;
            (at, self.frames[at], 1 + joined)
        })
    }
}

/// What was granted to who asked for one page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GrantedPage {
    pub frame: FrameId,
    /// Pages reserved for it.
    pub reserved: u32,
}

impl GrantedPage {
    /// The one page of these grants.
    #[inline]
    pub(crate) fn of(grants: &Grants) -> Self {
        debug_assert!(grants.mask.is_power_of_two(), "a request for one page is granted or fails");
        let frame = grants.frames[grants.mask.trailing_zeros() as usize];
        Self { frame, reserved: grants.reserved }
    }
}

/// A shard's answer.
pub(crate) type Reply = Result<Grants>;

#[derive(Debug)]
struct ReplySlot {
    state: AtomicU32,
    waker: Mutex<Option<Waker>>,
    reply: UnsafeCell<Option<Reply>>,
    list: PageList,
}

impl ReplySlot {
    fn take_waker(&self) -> Option<Waker> {
        self.waker.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

// SAFETY: `reply` is written by the shard while the slot is PENDING or ABANDONED and read by the requester after
// it has seen DONE; `state` orders the two.
#[expect(unsafe_code, reason = "the slot's state word passes the reply from the shard to the requester")]
unsafe impl Sync for ReplySlot {}

/// The reply slots of one shard.
#[derive(Debug)]
pub(crate) struct ReplySlots {
    slots: Box<[ReplySlot]>,
    free: FreeSlots,
}

impl ReplySlots {
    pub(crate) fn new(count: usize) -> Self {
        let slot = || ReplySlot {
            state: AtomicU32::new(FREE),
            waker: Mutex::new(None),
            reply: UnsafeCell::new(None),
            list: PageList::new(),
        };
        Self { slots: (0..count).map(|_| slot()).collect(), free: FreeSlots::new(count) }
    }

    pub(crate) fn count(&self) -> usize {
        self.slots.len()
    }

    /// Takes a free slot, PENDING from now on; `None` when all are in use.
    pub(crate) fn acquire(&self) -> Option<SlotId> {
        let index = self.free.take()?;
        let at = &self.slots[index as usize];
        at.list.clear();
        at.state.store(PENDING, Ordering::Relaxed);
        Some(SlotId(index))
    }

    /// The list of pages beside a slot that is taken.
    pub(crate) fn list(&self, slot: SlotId) -> &PageList {
        &self.slots[slot.0 as usize].list
    }

    /// Whether more than half of the slots are free: only then hints take some.
    pub(crate) fn are_plenty(&self) -> bool {
        self.free.count() > self.slots.len() / 2
    }

    /// Frees a slot whose reply has been [looked at](Self::read_done). No waker is left in it: who answers takes it out, or is
    /// about to.
    pub(crate) fn release(&self, slot: SlotId) {
        self.slots[slot.0 as usize].state.store(FREE, Ordering::Relaxed);
        self.free.put(slot.0);
    }

    /// Frees a slot whose message was never sent.
    pub(crate) fn abandon_unsent(&self, slot: SlotId) {
        self.release(slot);
    }

    /// The shard's side: answers. Hands the reply back when nobody waits for it any more, so that the shard
    /// takes back what it granted.
    pub(crate) fn answer(&self, slot: SlotId, reply: Reply) -> Option<Reply> {
        self.answer_in_place(slot, |place| *place = Some(reply))
    }

    /// As [`answer`](Self::answer); `write` writes the reply where it is read from.
    #[inline]
    pub(crate) fn answer_in_place(
        &self,
        slot: SlotId,
        write: impl FnOnce(&mut Option<Reply>),
    ) -> Option<Reply> {
        let at = &self.slots[slot.0 as usize];
        // SAFETY: the slot is PENDING or ABANDONED: the requester doesn't touch the cell before it sees DONE.
        #[expect(unsafe_code, reason = "the shard owns the cell until it publishes DONE")]
        unsafe {
            write(&mut *at.reply.get());
        }
        if at.state.swap(DONE, Ordering::AcqRel) == ABANDONED {
            let reply = self.take(slot);
            // A waker is the user's code: it is dropped after the lock.
            drop(at.take_waker());
            self.release(slot);
            return reply;
        }
        // Where the requester has seen DONE meanwhile, and somebody else has the slot, that one is woken once for nothing.
        if let Some(waker) = at.take_waker() {
            waker.wake();
        }
        None
    }

    /// Whether the requester has gone, and left the slot to the shard.
    pub(crate) fn is_abandoned(&self, slot: SlotId) -> bool {
        self.slots[slot.0 as usize].state.load(Ordering::Acquire) == ABANDONED
    }

    /// Takes the reply out of a slot that is DONE.
    fn take(&self, slot: SlotId) -> Option<Reply> {
        // SAFETY: callers have seen DONE (the requester) or own the abandoned slot (the shard).
        #[expect(unsafe_code, reason = "after DONE the cell belongs to who waits")]
        unsafe {
            (*self.slots[slot.0 as usize].reply.get()).take()
        }
    }

    /// Polls a slot; on DONE `read` looks at what was granted, and the slot is free again. The reply itself isn't copied.
    #[inline]
    pub(crate) fn poll<R>(
        &self,
        slot: SlotId,
        waker: &Waker,
        read: impl FnOnce(&Grants) -> R,
    ) -> Poll<Result<R>> {
        if !self.is_done(slot, waker) {
            return Poll::Pending;
        }
        let reply = self.read_done(slot, read);
        self.release(slot);
        Poll::Ready(reply)
    }

    /// Whether a slot's reply has come; if not, the waker will be called. If so, the slot, and with it its list of pages, is the
    /// caller's, who [looks](Self::read_done) and [releases](Self::release) it.
    pub(crate) fn is_done(&self, slot: SlotId, waker: &Waker) -> bool {
        let at = &self.slots[slot.0 as usize];
        if at.state.load(Ordering::Acquire) != DONE {
            let waker = waker.clone();
            let before = at.waker.lock().unwrap_or_else(PoisonError::into_inner).replace(waker);
            drop(before);
            // The shard may have answered before the waker was there.
            if at.state.load(Ordering::Acquire) != DONE {
                return false;
            }
            // Perhaps before it was there: then nobody else takes it out again.
            drop(at.take_waker());
        }
        true
    }

    /// Looks at the reply in a slot that [is done](Self::is_done), once.
    #[inline]
    pub(crate) fn read_done<R>(&self, slot: SlotId, read: impl FnOnce(&Grants) -> R) -> Result<R> {
        // SAFETY: the caller has seen DONE, and has the slot until it releases it.
        #[expect(unsafe_code, reason = "after DONE the cell belongs to who waits")]
        let place = unsafe { &mut *self.slots[slot.0 as usize].reply.get() };
        let result = match place.as_ref().expect("a done slot has a reply") {
            Ok(grants) => Ok(read(grants)),
            Err(error) => Err(error.clone()),
        };
        *place = None;
        result
    }

    /// Gives up waiting. A reply that has come already is handed back for its grants to be released.
    pub(crate) fn abandon(&self, slot: SlotId) -> Option<Reply> {
        let at = &self.slots[slot.0 as usize];
        if at.state.compare_exchange(PENDING, ABANDONED, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            return None;
        }
        let reply = self.take(slot);
        self.release(slot);
        reply
    }
}

/// Wakes a thread that waits in [`block_on`].
struct ThreadWaker {
    thread: std::thread::Thread,
    woken: AtomicU32,
}

impl Wake for ThreadWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(1, Ordering::Release);
        self.thread.unpark();
    }
}

/// Polls of the wake flag before a waiting thread parks: a few microseconds, the time of a miss on a fast device.
const SPINS: u32 = 2_000;

thread_local! {
    static WAKER: (Arc<ThreadWaker>, Waker) = {
        let thread = Arc::new(ThreadWaker { thread: std::thread::current(), woken: AtomicU32::new(0) });
        (thread.clone(), Waker::from(thread))
    };
}

thread_local! {
    static BLOCKED: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread waits in [`block_on`], and so can't do anything else meanwhile.
pub(crate) fn is_blocking() -> bool {
    BLOCKED.get()
}

/// While it exists, this thread waits.
struct Blocking;

impl Blocking {
    fn begin() -> Self {
        BLOCKED.set(true);
        Self
    }
}

impl Drop for Blocking {
    fn drop(&mut self) {
        BLOCKED.set(false);
    }
}

/// Runs a future on this thread: spins a little, then parks. Allocates once a thread.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    let mut spins = 0;
    run(future, |woken| {
        if woken {
            spins = 0;
        } else if spins < SPINS {
            spins += 1;
            std::hint::spin_loop();
        } else {
            std::thread::park();
        }
        Waiting::GoesOn
    })
    .expect("it waits without end")
}

/// Runs a future on this thread for as long as a deadline allows; `None` when it has passed, and the future is dropped: for
/// the `_async` twin of a blocking method that cancels it.
///
/// ```
/// # use foliant::{Engine, EngineOptions, MappingOptions};
/// # use std::time::{Duration, Instant};
/// # fn main() -> foliant::Result<()> {
/// # let engine = Engine::open("emu:ram?size=16M", &EngineOptions::default())?;
/// # let mapping = engine.mapping(&MappingOptions::default())?;
/// let mut page = [0; 4096];
/// let deadline = Instant::now() + Duration::from_secs(1);
/// match foliant::block_until(deadline, mapping.read_at_async(8192, &mut page)) {
///     Some(read) => read?,
///     None => println!("gave up"),
/// }
/// # engine.close()
/// # }
/// ```
pub fn block_until<F: Future>(deadline: Instant, future: F) -> Option<F::Output> {
    let mut spins = 0;
    run(future, |woken| {
        if !woken && spins < SPINS {
            spins += 1;
            std::hint::spin_loop();
            return Waiting::GoesOn;
        }
        // Looked at after each wake-up as well: some futures wake themselves.
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Waiting::Ends;
        }
        if woken {
            spins = 0;
        } else {
            std::thread::park_timeout(left);
        }
        Waiting::GoesOn
    })
}

/// Runs a future on this thread, which does `step` again and again while it waits.
pub(crate) fn poll_until_ready<F: Future>(future: F, mut step: impl FnMut()) -> F::Output {
    run(future, |_| {
        step();
        Waiting::GoesOn
    })
    .expect("it waits without end")
}

/// Whether a thread goes on waiting.
enum Waiting {
    GoesOn,
    Ends,
}

/// Polls a future whenever its waker was called; before that `wait` is done again and again, at least once, and the first
/// time with `true`.
fn run<F: Future>(future: F, mut wait: impl FnMut(bool) -> Waiting) -> Option<F::Output> {
    let mut future = std::pin::pin!(future);
    let _blocking = Blocking::begin();
    WAKER.with(|(thread, waker)| {
        let mut context = Context::from_waker(waker);
        loop {
            thread.woken.store(0, Ordering::Relaxed);
            if let Poll::Ready(output) = Pin::as_mut(&mut future).poll(&mut context) {
                return Some(output);
            }
            let mut first = true;
            loop {
                if let Waiting::Ends = wait(std::mem::take(&mut first)) {
                    return None;
                }
                if thread.woken.load(Ordering::Acquire) != 0 {
                    break;
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn an_answer_reaches_who_waits_and_frees_the_slot() {
        let slots = ReplySlots::new(1);
        let slot = slots.acquire().unwrap();
        assert!(slots.acquire().is_none(), "bounded");
        assert!(slots.poll(slot, Waker::noop(), Grants::clone).is_pending());
        assert!(slots.answer(slot, Ok(Grants::none())).is_none());
        assert!(slots.poll(slot, Waker::noop(), Grants::clone).is_ready());
        assert!(slots.acquire().is_some());
    }

    #[test]
    fn an_abandoned_request_hands_its_grants_back_to_the_shard() {
        let slots = ReplySlots::new(1);
        let slot = slots.acquire().unwrap();
        assert!(slots.abandon(slot).is_none());
        let mut grants = Grants::none();
        grants.add(3, FrameId(9));
        let back = slots.answer(slot, Ok(grants)).expect("nobody waits").unwrap();
        assert_eq!(back.iter().collect::<Vec<_>>(), [(3, FrameId(9), 1)]);
        assert!(slots.acquire().is_some(), "the slot is free again");
    }

    #[test]
    fn a_reply_that_came_before_the_request_was_dropped_is_handed_back_to_the_dropper() {
        let slots = ReplySlots::new(1);
        let slot = slots.acquire().unwrap();
        slots.answer(slot, Err(Error::Closed));
        assert!(slots.abandon(slot).is_some());
        assert!(slots.acquire().is_some());
    }

    #[test]
    fn block_on_parks_until_another_thread_answers() {
        let slots = Arc::new(ReplySlots::new(1));
        let slot = slots.acquire().unwrap();
        let other = {
            let slots = slots.clone();
            std::thread::spawn(move || slots.answer(slot, Err(Error::Closed)).is_none())
        };
        let reply =
            block_on(std::future::poll_fn(|context| slots.poll(slot, context.waker(), Grants::clone)));
        assert!(matches!(reply, Err(Error::Closed)));
        assert!(other.join().unwrap());
    }
}
