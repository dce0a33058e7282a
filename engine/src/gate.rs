//! The write-ahead gate: which dirty pages have to wait for a log, and how far that log is durable (WB-40).
//!
//! A [`Gate`] is two numbers, the durable one and the one that somebody waits for. The owner of the log moves
//! the first and reads the second; a shard does the opposite. None of the owner's code runs on a shard. What
//! the numbers mean for pages stands in `cache/lsn.rs`, what a pass and a sync do with them in
//! `writeback/gated.rs`.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::cache::lsn::Lsn;
use crate::error::{Error, LsnOf, Result};
use crate::reply::block_on;
use crate::shard::link::ShardLink;
use crate::writeback::durable::DurableLsn;

/// Tasks that wait for one gate before the oldest of them are woken to ask again.
const WAKERS_MAX: usize = 64;

/// How far a write-ahead log is durable: dirty pages of the mappings that it gates are not written before
/// their log.
///
/// The log itself is the embedder's: a mapping of this engine, of another one, or a file. The gate knows its
/// numbers only. [`Engine::gate`](crate::Engine::gate) makes one;
/// [`MappingOptions::gate`](crate::MappingOptions::gate) puts a mapping behind it;
/// [`Mapping::write_at_lsn`](crate::Mapping::write_at_lsn) and
/// [`PagePinMut::set_lsn`](crate::PagePinMut::set_lsn) tell which log record a change of a page stands in.
///
/// # The rules
/// - A page is written only when the gate's durable number has reached the page's last one: in the background
///   it is passed over until then. A page that never got a number is written like any other.
/// - A sync whose pages wait fixes at its start the number that it waits for: the highest of its pages' at
///   that time. When that is durable it writes them. A page that was stamped anew meanwhile is held back from
///   writers then, until its number is durable and it is written; so a sync ends though its pages are changed
///   all the time.
/// - Nobody waits unseen: what is waited for is an event (`tracing`), [`wanted_lsn`](Self::wanted_lsn) and
///   [`next_wanted`](Self::next_wanted), and after
///   [`EngineOptions::gate_wait`](crate::EngineOptions::gate_wait) it is [`Error::Gated`] and the pages are
///   still dirty. Something of the owner's should listen to `next_wanted`: a sync, a full cache or a close
///   may be waiting for a number that no commit is on its way to.
/// - Dirty pages of gated mappings are bounded by
///   [`EngineOptions::gated_percent`](crate::EngineOptions::gated_percent) of the frames: who would dirty one
///   more waits like one who needs a frame.
/// - The log is never behind its own gate, and for mappings that are declared to be one
///   ([`MappingOptions::log_of`](crate::MappingOptions::log_of)) frames are kept in reserve, so that a cache
///   full of gated pages can't keep the log from being written. Gates whose logs wait for each other are
///   refused.
///
/// A gate lives as long as somebody has a handle of it or a mapping is open with it; until then
/// [`Engine::gate`](crate::Engine::gate) finds it by its name. So a gate whose handles are all dropped while somebody
/// waits can be had again; if nobody does, the wait ends by its deadline. When the engine is dropped, or its shards are,
/// everything that waits ends with [`Error::Closed`].
///
/// `docs/write-ahead.md` tells how a database uses all this.
///
/// A [discard](crate::Mapping::discard) has no number of its own: its owner asks for it when the record that
/// frees the range is durable. It waits, like a sync, for pages of the range that are dirty and gated.
///
/// # Commits and checkpoints
/// ```
/// use foliant::{Engine, EngineOptions, Lsn, MappingOptions};
///
/// # fn main() -> Result<(), foliant::Error> {
/// const LOG_BYTES: u64 = 16 << 20;
/// let engine = Engine::open("emu:ram?size=64MiB", &EngineOptions::default())?;
/// let gate = engine.gate("wal");
/// let log = engine.mapping(&MappingOptions {
///     len_bytes: Some(LOG_BYTES),
///     log_of: Some(gate.clone()),
///     ..Default::default()
/// })?;
/// let data = engine.mapping(&MappingOptions {
///     start_bytes: LOG_BYTES,
///     gate: Some(gate.clone()),
///     ..Default::default()
/// })?;
///
/// // A change: first its log record, then the page, with the record's number (here: where the record ends).
/// let record = b"page 3: hello";
/// log.write_at(0, record)?;
/// let lsn = Lsn(record.len() as u64);
/// let mut page = data.pin_mut(3)?;
/// page.set_lsn(lsn)?;
/// page[..5].copy_from_slice(b"hello");
/// drop(page);
///
/// // A commit: the log is made durable, and the gate is told. The page itself may be written much later.
/// log.sync()?;
/// gate.advance_durable_lsn(lsn)?;
///
/// // A checkpoint: from where on is the log needed? Changes that are still being made have to be counted by
/// // their makers: `next` is a number that all changes to come, and those under way, are at or above.
/// let next = Lsn(lsn.0 + 1);
/// let needed_from = data.oldest_dirty_lsn()?.map_or(next, |oldest| oldest.min(next));
/// assert_eq!(needed_from, lsn);
/// // Too far back? Write what is older than some number, and nothing else; then the log before it can go.
/// data.flush_until(next)?;
/// assert_eq!(data.oldest_dirty_lsn()?, None);
/// engine.close()
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Gate {
    inner: Arc<GateInner>,
}

#[derive(Debug)]
pub(crate) struct GateInner {
    name: Arc<str>,
    /// The engine's shards; weak, so that a gate doesn't keep a closed engine's memory.
    links: Box<[Weak<ShardLink>]>,
    durable: DurableLsn,
    /// The highest number that somebody has waited for.
    wanted: AtomicU64,
    /// The engine is closed.
    closed: AtomicBool,
    /// Who waits for `wanted` to rise.
    wakers: Mutex<VecDeque<Waker>>,
}

impl Gate {
    fn new(name: &str, links: &[Arc<ShardLink>]) -> Self {
        let inner = GateInner {
            name: name.into(),
            links: links.iter().map(Arc::downgrade).collect(),
            durable: DurableLsn::new(links.len()),
            wanted: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            wakers: Mutex::new(VecDeque::with_capacity(WAKERS_MAX)),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The gate's name, as events and errors show it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Declares the log durable up to `lsn`, included: pages whose last number is at or below it may be
    /// written from now on. What waits for it goes on at once. After a recovery the owner declares what it
    /// has found in the log. A number beyond all that pages have is fine; with `Lsn(u64::MAX)` the gate is open
    /// for good.
    ///
    /// Never blocks. The number holds for pages: that the log is durable is the caller's promise.
    ///
    /// # Errors
    /// [`Error::LsnBackwards`] when a higher number has been declared before; the gate stays as it is.
    pub fn advance_durable_lsn(&self, lsn: Lsn) -> Result<()> {
        let advanced = self.inner.durable.advance(lsn, |shard| {
            if let Some(link) = self.inner.links[shard].upgrade() {
                link.kick();
            }
        });
        advanced.map_err(|last| Error::LsnBackwards { of: LsnOf::Gate(self.inner.name.clone()), lsn, last })
    }

    /// The number up to which the log is durable; [`Lsn::NONE`] before the first is declared.
    #[must_use]
    pub fn durable_lsn(&self) -> Lsn {
        self.inner.durable.lsn()
    }

    /// The highest number that a sync, a checkpoint, a close or writeback under pressure has found not
    /// durable, unless it is by now.
    #[must_use]
    pub fn wanted_lsn(&self) -> Option<Lsn> {
        let wanted = Lsn(self.inner.wanted.load(Ordering::SeqCst));
        (wanted > self.durable_lsn()).then_some(wanted)
    }

    /// Waits until somebody waits for a number that isn't durable, and returns it; at once, if somebody does
    /// already. The owner writes and syncs its log up to there and [advances](Self::advance_durable_lsn) the
    /// gate:
    ///
    /// ```no_run
    /// # fn log_up_to(_: foliant::Lsn) -> Result<(), foliant::Error> { Ok(()) }
    /// # fn listen(gate: &foliant::Gate) -> Result<(), foliant::Error> {
    /// // A thread of the owner's, or a task with `next_wanted_async`:
    /// while let Ok(lsn) = gate.next_wanted() {
    ///     log_up_to(lsn)?;
    ///     // A commit may have advanced it further meanwhile, which is no error here.
    ///     let _ = gate.advance_durable_lsn(lsn);
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Error::Closed`] when the engine is closed or dropped.
    pub fn next_wanted(&self) -> Result<Lsn> {
        block_on(self.next_wanted_async())
    }

    /// As [`next_wanted`](Self::next_wanted), without blocking the thread.
    ///
    /// # Errors
    /// As `next_wanted`.
    pub fn next_wanted_async(&self) -> impl Future<Output = Result<Lsn>> + Send + use<> {
        let gate = self.clone();
        std::future::poll_fn(move |context| gate.poll_wanted(context))
    }

    fn poll_wanted(&self, context: &Context<'_>) -> Poll<Result<Lsn>> {
        for registered in [false, true] {
            if let Some(wanted) = self.wanted_lsn() {
                return Poll::Ready(Ok(wanted));
            }
            if self.inner.closed.load(Ordering::SeqCst) {
                return Poll::Ready(Err(Error::Closed));
            }
            if !registered {
                self.register(context.waker());
            }
        }
        Poll::Pending
    }

    fn register(&self, waker: &Waker) {
        let waker = waker.clone();
        let mut wakers = self.inner.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        if wakers.iter().any(|known| known.will_wake(&waker)) {
            return;
        }
        // Futures that were dropped leave their wakers behind: the oldest goes, and asks again if it still
        // waits.
        let oldest = if wakers.len() < WAKERS_MAX { None } else { wakers.pop_front() };
        wakers.push_back(waker);
        drop(wakers);
        if let Some(oldest) = oldest {
            oldest.wake();
        }
    }

    fn wake_all(&self) {
        let wakers = || self.inner.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        // Who registers from here on has seen what the others are woken for.
        let known = wakers().len();
        for _ in 0..known {
            // A waker is the user's code: it runs after the lock.
            let next = wakers().pop_front();
            let Some(waker) = next else { return };
            waker.wake();
        }
    }

    /// The shard's side: somebody waits for `lsn`.
    pub(crate) fn want(&self, lsn: Lsn) {
        if self.inner.wanted.fetch_max(lsn.0, Ordering::SeqCst) < lsn.0 {
            self.wake_all();
        }
    }

    /// The shard's side: whether `lsn` is durable. If not, the shard is kicked when the gate has moved.
    pub(crate) fn reached(&self, lsn: Lsn, shard: usize) -> bool {
        self.inner.durable.reached(lsn, shard)
    }

    /// That `lsn` hasn't become durable for `waited`.
    pub(crate) fn error(&self, waits_for: Lsn, waited: Duration) -> Error {
        Error::Gated { gate: self.inner.name.clone(), waits_for, durable: self.durable_lsn(), waited }
    }

    /// Whether the gate is of the engine with these shards.
    fn belongs_to(&self, links: &[Arc<ShardLink>]) -> bool {
        self.inner
            .links
            .first()
            .zip(links.first())
            .is_some_and(|(mine, link)| mine.as_ptr() == Arc::as_ptr(link))
    }
}

/// Two gates are equal when they are clones of each other.
impl PartialEq for Gate {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

impl Eq for Gate {}

/// The gates of an engine, by name; they last as long as a handle or a mapping has them.
#[derive(Debug, Default)]
pub(crate) struct GateTable {
    gates: Mutex<Vec<Weak<GateInner>>>,
}

impl GateTable {
    /// The gate of that name, a new one if there is none.
    pub(crate) fn open(&self, name: &str, links: &[Arc<ShardLink>]) -> Gate {
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        gates.retain(|gate| gate.strong_count() > 0);
        if let Some(inner) = gates.iter().filter_map(Weak::upgrade).find(|inner| &*inner.name == name) {
            return Gate { inner };
        }
        let gate = Gate::new(name, links);
        gates.push(Arc::downgrade(&gate.inner));
        gate
    }

    /// The engine is closed: nobody will want anything any more.
    pub(crate) fn close(&self) {
        let gates = std::mem::take(&mut *self.gates.lock().unwrap_or_else(PoisonError::into_inner));
        for inner in gates.iter().filter_map(Weak::upgrade) {
            inner.closed.store(true, Ordering::SeqCst);
            Gate { inner }.wake_all();
        }
    }
}

/// What a mapping has to do with gates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MappingGates {
    /// Its dirty pages wait for this one.
    pub gate: Option<Gate>,
    /// It holds the log of this one.
    pub log_of: Option<Gate>,
}

impl MappingGates {
    /// Checks the gates of a mapping that is being opened, for their engine and themselves alone.
    pub(crate) fn check(&self, links: &[Arc<ShardLink>]) -> Result<()> {
        let foreign = |gate: &Gate| !gate.belongs_to(links);
        let wrong = |reason: String| Err(Error::Mapping { reason });
        if let Some(gate) = self.gate.as_ref().filter(|gate| foreign(gate)) {
            return wrong(format!(
                "gate {:?} is another engine's; make it by Engine::gate of the engine that has the gated mapping",
                gate.name()
            ));
        }
        // A log beside another engine's data is fine. Gated itself it could be part of a circle that no
        // engine sees whole.
        if let (Some(_), Some(log_of)) = (&self.gate, self.log_of.as_ref().filter(|gate| foreign(gate))) {
            return wrong(format!(
                "the log of gate {:?}, which is another engine's, can't be gated itself; leave out its gate",
                log_of.name()
            ));
        }
        Ok(())
    }

    /// Whether a page with this last number has to stay dirty.
    pub(crate) fn keeps(&self, last: Lsn) -> bool {
        self.gate.as_ref().is_some_and(|gate| last > gate.durable_lsn())
    }

    /// Checks that another handle of a mapping is opened with the gates that it has.
    pub(crate) fn check_same(&self, open: &Self) -> Result<()> {
        if self == open {
            return Ok(());
        }
        let name = |gate: &Option<Gate>| {
            gate.as_ref().map_or("none".to_owned(), |gate| format!("{:?}", gate.name()))
        };
        Err(Error::Mapping {
            reason: format!(
                "the same range is open with gate {} as log of {}; open it with these gates for another handle",
                name(&open.gate),
                name(&open.log_of)
            ),
        })
    }

    /// Checks that no gate waits for itself through the logs that are gated, `self` among them. `open` are
    /// the gates of the mappings that are open.
    pub(crate) fn check_acyclic<'a>(&self, open: impl Iterator<Item = &'a Self> + Clone) -> Result<()> {
        let (Some(gate), Some(log_of)) = (&self.gate, &self.log_of) else { return Ok(()) };
        // From the gate that the log would wait for, along the logs that wait already: does a way lead back?
        let mut way = vec![log_of.clone(), gate.clone()];
        let mut seen = vec![gate.clone()];
        while let Some(at) = way.last().filter(|_| way.len() > 1) {
            if at == log_of {
                return Err(Error::GateCycle {
                    gates: way.iter().map(|gate| gate.inner.name.clone()).collect(),
                });
            }
            let waits_for = open.clone().filter(|other| other.log_of.as_ref() == Some(at));
            let next = waits_for.filter_map(|other| other.gate.as_ref()).find(|next| !seen.contains(next));
            match next.cloned() {
                Some(next) => {
                    seen.push(next.clone());
                    way.push(next);
                }
                None => drop(way.pop()),
            }
        }
        Ok(())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn gate(name: &str) -> Gate {
        Gate::new(name, &[])
    }

    fn log(log_of: &Gate, gate: &Gate) -> MappingGates {
        MappingGates { gate: Some(gate.clone()), log_of: Some(log_of.clone()) }
    }

    #[test]
    fn wb40_gates_that_would_wait_for_each_other_are_refused_with_the_way_round() {
        let [a, b, c, d] = ["a", "b", "c", "d"].map(gate);
        let none: [MappingGates; 0] = [];
        let error = log(&a, &a).check_acyclic(none.iter()).unwrap_err();
        assert!(error.to_string().contains("a → a"), "{error}");
        let open = [log(&a, &b), log(&a, &d), log(&b, &d), log(&b, &c)];
        log(&d, &c).check_acyclic(open.iter()).unwrap();
        log(&a, &c).check_acyclic(open.iter()).unwrap();
        let error = log(&c, &a).check_acyclic(open.iter()).unwrap_err();
        assert!(error.to_string().contains("c → a → b → c"), "{error}");
        // A mapping that is gated or a log, but not both, closes no circle.
        MappingGates { gate: Some(a.clone()), log_of: None }.check_acyclic(open.iter()).unwrap();
        MappingGates { gate: None, log_of: Some(a) }.check_acyclic(open.iter()).unwrap();
    }

    #[test]
    fn wb40_who_listens_hears_of_the_highest_number_that_is_waited_for_until_it_is_durable() {
        let gate = gate("wal");
        let mut wanted = std::pin::pin!(gate.next_wanted_async());
        let context = &mut Context::from_waker(Waker::noop());
        assert!(wanted.as_mut().poll(context).is_pending());
        gate.want(Lsn(7));
        gate.want(Lsn(5));
        assert!(matches!(wanted.as_mut().poll(context), Poll::Ready(Ok(Lsn(7)))));
        assert_eq!(gate.wanted_lsn(), Some(Lsn(7)));
        gate.advance_durable_lsn(Lsn(7)).unwrap();
        assert_eq!(gate.wanted_lsn(), None);
    }

    #[test]
    fn futures_that_are_dropped_leave_a_bounded_number_of_wakers() {
        let gate = gate("wal");
        for _ in 0..3 * WAKERS_MAX {
            let waker = Waker::from(Arc::new(Unique));
            assert!(gate.poll_wanted(&Context::from_waker(&waker)).is_pending());
        }
        assert_eq!(gate.inner.wakers.lock().unwrap().len(), WAKERS_MAX);
    }

    struct Unique;

    impl std::task::Wake for Unique {
        fn wake(self: Arc<Self>) {}
    }

    #[test]
    fn a_name_names_one_gate_as_long_as_somebody_has_it() {
        let table = GateTable::default();
        let first = table.open("wal", &[]);
        first.advance_durable_lsn(Lsn(3)).unwrap();
        assert_eq!(table.open("wal", &[]), first);
        assert_ne!(table.open("other", &[]), first);
        drop(first);
        assert_eq!(table.open("wal", &[]).durable_lsn(), Lsn::NONE);
    }
}
