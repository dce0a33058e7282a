//! The handle by which any thread reaches a shard: its shared cache, its inbox, its reply slots.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;

use super::advise::UsedOnce;
use super::doze::Doze;
use super::readahead::Mailbox;
use super::request::{Message, Request};
use crate::cache::folio::{FrameId, Released};
use crate::cache::lsn::Lsn;
use crate::cache::published;
use crate::cache::shape::MappingShape;
use crate::cache::{Place, SharedCache};
use crate::error::{Error, Held, Result};
use crate::fork::Birthplace;
use crate::observe::ShardTimes;
use crate::options::EngineOptions;
use crate::reply::{GrantedPage, Grants, Hold, Reply, ReplySlots, SlotId};
use crate::stats::{HitCounters, ShardCounters};
use crate::writeback::callback;

/// What every thread shares of one shard.
#[derive(Debug)]
pub(crate) struct ShardLink {
    pub shard: usize,
    pub cache: Arc<SharedCache>,
    pub replies: ReplySlots,
    pub hits: HitCounters,
    pub counters: ShardCounters,
    pub times: ShardTimes,
    pub readahead: Mailbox,
    pub used_once: UsedOnce,
    inbox: Sender<Message>,
    /// The other end, for senders that find the shard closed and have to answer themselves.
    outbox: Receiver<Message>,
    closed: AtomicBool,
    pub doze: Doze,
    /// Where the engine was opened.
    pub birthplace: Birthplace,
    /// Written to wake the sleeping shard.
    pub bell: OwnedFd,
    /// A folio with parked requests was released, or a frame was orphaned: look.
    kick: AtomicBool,
    /// A request was given up that was sent and not answered.
    cancelled: AtomicBool,
    /// Somebody wants the flusher to run.
    writeback_request: AtomicBool,
    /// Folios granted unfilled to a request that was dropped: the shard frees them.
    orphans: Mutex<Vec<FrameId>>,
    /// The step to this many dirty pages wakes the flusher.
    pub dirty_background: u32,
    /// Set once, when the shard can no longer serve.
    failed: OnceLock<Arc<str>>,
    /// How long a request waits for a reply slot.
    pub slot_wait: Duration,
    /// Misses and waits that had to go to the shard.
    pub requests: AtomicU64,
}

impl ShardLink {
    pub(crate) fn new(
        shard: usize,
        cache: Arc<SharedCache>,
        options: &EngineOptions,
        dirty_background: u32,
    ) -> Result<(Arc<Self>, Receiver<Message>)> {
        // As many messages as reply slots: a request that has a slot finds room.
        let (inbox, receiver) = bounded(options.requests_max);
        let bell = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(|error| Error::Os {
            what: "cannot create the eventfd that wakes a shard (raise the limit of open files)",
            source: Arc::new(error.into()),
        })?;
        let birthplace = Birthplace::new()
            .map_err(|error| Error::Os { what: "cannot map a page of memory", source: Arc::new(error) })?;
        let link = Self {
            shard,
            cache,
            replies: ReplySlots::new(options.requests_max),
            hits: HitCounters::default(),
            counters: ShardCounters::default(),
            times: ShardTimes::default(),
            readahead: Mailbox::new(),
            used_once: UsedOnce::new(),
            inbox,
            outbox: receiver.clone(),
            closed: AtomicBool::new(false),
            doze: Doze::new(),
            birthplace,
            bell,
            kick: AtomicBool::new(false),
            cancelled: AtomicBool::new(false),
            writeback_request: AtomicBool::new(false),
            orphans: Mutex::new(Vec::new()),
            dirty_background,
            failed: OnceLock::new(),
            slot_wait: options.pin_wait,
            requests: AtomicU64::new(0),
        };
        Ok((Arc::new(link), receiver))
    }

    /// Wakes the shard if it sleeps. To be called after whatever it is to find: a sequentially consistent fence is between the
    /// two ([`Doze::must_wake`]).
    #[inline]
    pub(crate) fn wake(&self) {
        if self.doze.must_wake() {
            // The counter can't overflow: the shard drains it whenever it wakes. EAGAIN would mean it's readable.
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
    }

    /// Tells the shard that a folio with parked requests was released.
    #[inline]
    pub(crate) fn after_release(&self, released: Released) {
        if released == Released::Kick {
            self.kick();
        }
    }

    #[cold]
    pub(crate) fn kick(&self) {
        self.kick.store(true, Ordering::Release);
        self.wake();
    }

    /// The shard's side: whether it was kicked since it last asked.
    pub(crate) fn take_kick(&self) -> bool {
        self.kick.load(Ordering::Relaxed) && self.kick.swap(false, Ordering::AcqRel)
    }

    /// Whether a kick waits, without taking it.
    pub(crate) fn is_kicked(&self) -> bool {
        self.kick.load(Ordering::Acquire)
    }

    /// Wants the flusher to run, whatever the number of dirty pages. Never waits.
    pub(crate) fn request_writeback(&self) {
        self.writeback_request.store(true, Ordering::Release);
        self.kick();
    }

    /// The shard's side: whether the flusher was wanted since it last asked.
    pub(crate) fn take_writeback_request(&self) -> bool {
        self.writeback_request.load(Ordering::Relaxed) && self.writeback_request.swap(false, Ordering::AcqRel)
    }

    /// The shard's side: one orphaned frame.
    pub(crate) fn take_orphan(&self) -> Option<FrameId> {
        self.orphans.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    /// Releases an exclusively held folio, of which `pages` pages from `frame` on were changed.
    #[inline]
    pub(crate) fn release_dirty(&self, frame: FrameId, place: Place, pages: u64, shape: &MappingShape) {
        // The first dirty page arms the flusher's timer; the one at the threshold starts it.
        let before = self.cache.mark_dirty(frame, pages, shape);
        let released = self.cache.folio(place.head).release_exclusive_changed(place.within + pages);
        let limit = self.dirty_background;
        if before.is_some_and(|before| before == 0 || before < limit && before + pages as u32 >= limit) {
            self.kick();
        }
        self.after_release(released);
    }

    /// Stamps `pages` pages from `frame` on, of an exclusively held folio, which are dirty from then on: a
    /// checkpoint counts them although they are still being changed. `Err` is their last number, when that is
    /// higher.
    pub(crate) fn stamp(
        &self,
        frame: FrameId,
        pages: u64,
        shape: &MappingShape,
        lsn: Lsn,
    ) -> std::result::Result<(), Lsn> {
        self.cache.stamp(frame, pages, shape, lsn)?;
        let before = self.cache.mark_dirty(frame, pages, shape);
        let limit = self.dirty_background;
        if before.is_some_and(|before| before == 0 || before < limit && before + pages as u32 >= limit) {
            self.kick();
        }
        Ok(())
    }

    /// How this thread holds the page in `frame`, as far as it knows. Asked where it would wait for the page's holder.
    pub(crate) fn held_by_this_thread(&self, frame: FrameId) -> Option<Held> {
        let head = self.cache.head(frame);
        let state = head.state();
        let exclusive = state.exclusive() && !state.undecided();
        let held = if exclusive { Held::Exclusive } else { Held::Shared };
        published::is_held_here(head).then_some(held)
    }

    /// Gives back what a reply granted to a request that nobody waits for any more. Any thread.
    pub(crate) fn give_back(&self, grants: &Grants) {
        for (_, frame, _) in grants.iter() {
            let place = self.cache.place(frame);
            let folio = self.cache.folio(place.head);
            match grants.hold {
                Hold::Shared => self.after_release(folio.unpin()),
                Hold::Exclusive if folio.state().filled() > 0 => {
                    self.after_release(folio.release_exclusive_unchanged());
                }
                Hold::Exclusive => {
                    self.orphans.lock().unwrap_or_else(PoisonError::into_inner).push(place.head);
                    self.kick();
                }
            }
        }
        self.cache.balance.unreserve(grants.reserved);
    }

    /// Gives up waiting for an answer; what it granted, if it has come already, is given back.
    pub(crate) fn abandon(&self, slot: SlotId) {
        match self.replies.abandon(slot) {
            Some(Ok(grants)) => self.give_back(&grants),
            Some(Err(_)) => {}
            None => self.cancelled.store(true, Ordering::Release),
        }
    }

    /// The shard's side: whether requests were given up since it last asked.
    pub(crate) fn take_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed) && self.cancelled.swap(false, Ordering::AcqRel)
    }

    /// The shard is polled no more: whatever is in the inbox, or comes, is answered with [`Error::Closed`].
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.answer_closed();
    }

    /// Either the closing shard sees a message in its inbox, or the message's sender sees the shard closed.
    #[cold]
    fn answer_closed(&self) {
        while let Ok(message) = self.outbox.try_recv() {
            self.refuse(&message, &Error::Closed);
        }
    }

    /// Answers a message that was never begun, all of its slots.
    pub(crate) fn refuse(&self, message: &Message, error: &Error) {
        let mut at = Some(message.slot);
        while let Some(slot) = at {
            // An answered slot may be somebody else's at once.
            at = self.replies.list(slot).next();
            self.replies.answer(slot, Err(error.clone()));
        }
    }

    /// Puts a message into the inbox of the shard and sees to it that the shard looks. A refused message's slots are the
    /// sender's to free.
    pub(crate) fn send(&self, slot: SlotId, request: Request) -> Result<()> {
        match self.inbox.try_send(Message { slot, request }) {
            Ok(()) => {
                self.requests.fetch_add(1, Ordering::Relaxed);
                // It fences, as the closing shard does: between the message and the look whether that has closed.
                self.wake();
                if self.closed.load(Ordering::Relaxed) {
                    self.answer_closed();
                }
                Ok(())
            }
            // Never full: a slot is held for each message. Disconnected: the shard was dropped.
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                Err(self.failure().unwrap_or(Error::Closed))
            }
        }
    }

    /// Latches the shard failed; the first reason stays.
    pub(crate) fn fail(&self, reason: &str) {
        self.failed.get_or_init(|| reason.into());
    }

    /// The error of a failed shard.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.failed.get().map(|reason| Error::ShardFailed { shard: self.shard, reason: reason.clone() })
    }

    /// Whether the shard has failed.
    pub(crate) fn is_failed(&self) -> bool {
        self.failed.get().is_some()
    }

    /// Sends a request and waits for its answer. Dropping the future gives the request up: what it was granted is
    /// given back, and pages that it waits for aren't read any more unless they are with the device.
    pub(crate) fn request(&self, request: Request) -> RequestFuture<'_> {
        RequestFuture { link: self, state: State::Unsent(request), refused: None }
    }
}

/// Waits for a shard's answer.
#[must_use = "a request is sent when it is polled"]
pub(crate) struct RequestFuture<'a> {
    link: &'a ShardLink,
    state: State,
    /// When there was no reply slot for it first.
    refused: Option<Instant>,
}

enum State {
    Unsent(Request),
    Waiting(SlotId),
    Finished,
}

/// Waits for a shard's answer to a request for one page.
#[must_use = "a request is sent when it is polled"]
pub(crate) struct PageFuture<'a>(pub(crate) RequestFuture<'a>);

impl Future for PageFuture<'_> {
    type Output = Result<GrantedPage>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll_reading(context, GrantedPage::of)
    }
}

impl Future for RequestFuture<'_> {
    type Output = Reply;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Reply> {
        self.poll_reading(context, Grants::clone)
    }
}

impl RequestFuture<'_> {
    /// Sends the request, or looks whether its answer is there, and lets `read` have of what was granted what it needs.
    #[inline]
    fn poll_reading<R>(
        &mut self,
        context: &mut Context<'_>,
        read: impl FnOnce(&Grants) -> R,
    ) -> Poll<Result<R>> {
        let link = self.link;
        if let State::Unsent(request) = &self.state {
            if let Err(error) = callback::check_outside().and_then(|()| link.birthplace.check()) {
                self.state = State::Finished;
                return Poll::Ready(Err(error));
            }
            let Some(slot) = link.replies.acquire() else {
                // Other requests hold all slots: most for answers that come, some perhaps for tasks that nobody polls.
                let waited = self.refused.get_or_insert_with(Instant::now).elapsed();
                if waited > link.slot_wait {
                    self.state = State::Finished;
                    let requests_max = link.replies.count();
                    return Poll::Ready(Err(Error::TooManyRequests { requests_max, waited }));
                }
                std::thread::yield_now();
                context.waker().wake_by_ref();
                return Poll::Pending;
            };
            if let Err(error) = link.send(slot, request.clone()) {
                link.replies.abandon_unsent(slot);
                self.state = State::Finished;
                return Poll::Ready(Err(error));
            }
            self.state = State::Waiting(slot);
        }
        match self.state {
            State::Waiting(slot) => {
                let poll = link.replies.poll(slot, context.waker(), read);
                if poll.is_ready() {
                    self.state = State::Finished;
                }
                poll
            }
            State::Unsent(_) | State::Finished => panic!("a request was polled after its answer"),
        }
    }
}

impl Drop for RequestFuture<'_> {
    fn drop(&mut self) {
        if let State::Waiting(slot) = self.state {
            self.link.abandon(slot);
        }
    }
}
