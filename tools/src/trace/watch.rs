//! Watching a run: events of writeback are kept with the time at which they were seen, up to a fixed number.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use foliant::WRITEBACK_TARGET;
use tracing::level_filters::{LevelFilter, STATIC_MAX_LEVEL};
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

use super::happening::Happening;

/// Events that are kept; about 50 MB.
const HAPPENINGS_MAX: usize = 1 << 19;

/// Keeps what happens. Clones keep into the same place.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    origin: Instant,
    limit: usize,
    kept: Mutex<Vec<Happening>>,
    dropped: AtomicU64,
}

/// What was seen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// In the order in which it was seen; of a shard, that in which it happened.
    pub(crate) happenings: Vec<Happening>,
    /// Events that came when no room was left: all later than those that were kept.
    pub(crate) dropped: u64,
}

impl Watch {
    pub(crate) fn new() -> Self {
        Self::with_limit(HAPPENINGS_MAX)
    }

    fn with_limit(limit: usize) -> Self {
        let shared =
            Shared { origin: Instant::now(), limit, kept: Mutex::default(), dropped: AtomicU64::new(0) };
        Self { shared: Arc::new(shared) }
    }

    /// The layer that watches: it takes the events of writeback and no other.
    pub(crate) fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(&self) -> impl Layer<S> + use<S> {
        let targets = Targets::new().with_target(WRITEBACK_TARGET, LevelFilter::TRACE);
        Watcher(self.clone()).with_filter(targets)
    }

    /// Whether this program has the events at all: features of `tracing` can leave them out.
    pub(crate) fn is_possible() -> bool {
        STATIC_MAX_LEVEL == LevelFilter::TRACE
    }

    /// Nanoseconds since the watching began.
    pub(crate) fn now_ns(&self) -> u64 {
        u64::try_from(self.shared.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Hands out what was seen since it was asked last.
    pub(crate) fn take(&self) -> Seen {
        let happenings = std::mem::take(&mut *self.kept());
        Seen { happenings, dropped: self.shared.dropped.swap(0, Ordering::Relaxed) }
    }

    fn keep(&self, event: &Event<'_>) {
        let mut kept = self.kept();
        if kept.len() == self.shared.limit {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        } else {
            // The time is taken under the lock, so that it never goes back from one event to the next.
            let at_ns = self.now_ns();
            kept.push(Happening::of(event, at_ns));
        }
    }

    /// A thread that panicked leaves whole events.
    fn kept(&self) -> MutexGuard<'_, Vec<Happening>> {
        self.shared.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Watcher(Watch);

impl<S: Subscriber> Layer<S> for Watcher {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        self.0.keep(event);
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::super::happening::{Kind, Mode, Op, Reason};
    use super::*;

    fn seen(limit: usize, tell: impl FnOnce()) -> Seen {
        let watch = Watch::with_limit(limit);
        let subscriber = tracing_subscriber::registry().with(watch.layer());
        tracing::subscriber::with_default(subscriber, tell);
        watch.take()
    }

    #[test]
    fn events_of_writeback_are_kept_with_their_fields_and_others_are_not() {
        let seen = seen(10, || {
            tracing::trace!(
                name: "block_rq_issue", target: WRITEBACK_TARGET,
                { shard = 3usize, op = "write", mapping = 2u16, pass = 7u64, reason = "sync", mode = "all",
                  first_page = 100u64, pages = 4u64, now_ns = 55u64 }, "block_rq_issue"
            );
            tracing::error!("something else");
            tracing::debug!(
                name: "writeback_single_inode_start", target: WRITEBACK_TARGET,
                { shard = 0usize, mapping = 1u16, pass = 8u64, reason = "expiry", mode = "none",
                  first_page = 0u64, end_page = 9u64, dirty = 5u32, now_ns = 60u64 }, ""
            );
            tracing::trace!(
                name: "block_rq_complete", target: WRITEBACK_TARGET,
                { shard = 3usize, op = "write", mapping = 2u16, first_page = 100u64,
                  error = tracing::field::display("no") }, ""
            );
            tracing::trace!(name: "new_in_some_version", target: WRITEBACK_TARGET, { shard = 1usize }, "");
        });
        let kinds: Vec<Kind> = seen.happenings.iter().map(|happening| happening.kind.clone()).collect();
        assert_eq!(
            kinds,
            [
                Kind::Issued { op: Op::Write, mapping: 2, pages: 100..104, pass: Some(7) },
                Kind::PassBegan {
                    mapping: 1,
                    pass: 8,
                    reason: Reason::Expiry,
                    mode: Mode::Background,
                    pages: 0..9,
                    dirty: 5
                },
                Kind::Completed { op: Op::Write, mapping: 2, first_page: 100, has_failed: true },
                Kind::Other,
            ]
        );
        assert_eq!((seen.happenings[0].shard, seen.happenings[0].step_ns), (3, 55));
        assert!(seen.happenings.is_sorted_by_key(|happening| happening.at_ns));
        assert_eq!(seen.dropped, 0);
    }

    #[test]
    fn what_comes_when_no_room_is_left_is_counted() {
        let seen = seen(2, || {
            for commands in 0..5u64 {
                tracing::trace!(name: "block_unplug", target: WRITEBACK_TARGET, { commands }, "");
            }
        });
        assert_eq!((seen.happenings.len(), seen.dropped), (2, 3));
        assert_eq!(seen.happenings[1].kind, Kind::Rung { commands: 1 });
    }

    #[test]
    fn an_event_without_its_fields_is_one_that_is_not_known() {
        let seen = seen(1, || tracing::trace!(name: "block_unplug", target: WRITEBACK_TARGET, {}, ""));
        assert_eq!(seen.happenings[0].kind, Kind::Other);
    }
}
