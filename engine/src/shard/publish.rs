//! What a shard shows of itself on the stats page ([`crate::observe`]): now and then, from its own step, one record.
//!
//! A record costs a copy of some hundred words and a `pwrite` of some 4 KiB to memory, so it is written at most every
//! [`BUSY_NS`] while something happens and every [`IDLE_NS`] while nothing does. A shard that has done something and goes
//! to sleep names the time of its next record as the time to wake, and sleeps for longer after that; so what is on the page
//! of a shard that sleeps is what it did last.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use zerocopy::little_endian::U64;

use super::Shard;
use crate::observe::StatsFile;
use crate::stats::bump;

/// Between two records of a shard that works.
const BUSY_NS: u64 = 100_000_000;
/// Between two records of a shard to which nothing happens. Other threads may have hits meanwhile.
const IDLE_NS: u64 = 1_000_000_000;

/// A shard's place on the page.
#[derive(Debug)]
pub(crate) struct Publisher {
    page: Arc<StatsFile>,
    /// Sequence number, time, values, checksum.
    words: Box<[U64]>,
    sequence: u64,
    /// When the last record was written.
    published_ns: Option<u64>,
    /// Something has happened since.
    is_busy: bool,
}

impl Publisher {
    pub(crate) fn new(page: Arc<StatsFile>) -> Self {
        let words = vec![U64::new(0); page.record_words()].into_boxed_slice();
        Self { page, words, sequence: 0, published_ns: None, is_busy: true }
    }

    fn due_ns(&self) -> u64 {
        let interval = if self.is_busy { BUSY_NS } else { IDLE_NS };
        self.published_ns.map_or(0, |published| published.saturating_add(interval))
    }
}

impl Shard {
    /// From now on this shard shows what it does on `page`.
    pub(crate) fn publish_on(&mut self, page: Arc<StatsFile>) {
        self.publisher = Some(Box::new(Publisher::new(page)));
    }

    /// Writes a record if it is time for one.
    pub(super) fn publish(&mut self) {
        if let Some(since_ns) = self.asleep_since_ns.take() {
            bump(&self.link.counters.slept_ns, self.now_ns.saturating_sub(since_ns));
        }
        bump(&self.link.counters.polls, 1);
        if self.publisher.as_ref().is_none_or(|publisher| self.now_ns < publisher.due_ns()) {
            return;
        }
        let Some(mut publisher) = self.publisher.take() else { return };
        publisher.sequence += 1;
        publisher.published_ns = Some(self.now_ns);
        publisher.is_busy = false;
        let head = [publisher.sequence, self.now_ns];
        let counted = self.counted_by_callers().into_iter().chain(self.link.counters.values());
        let values = counted.chain(self.gauges()).chain(self.link.times.words());
        for (word, value) in publisher.words.iter_mut().zip(head.into_iter().chain(values)) {
            *word = value.into();
        }
        match publisher.page.write(self.link.shard, &mut publisher.words) {
            Ok(()) => self.publisher = Some(publisher),
            Err(error) => {
                tracing::warn!(
                    shard = self.link.shard,
                    %error,
                    "the stats page can't be written any more; the shard publishes nothing until the engine is opened anew"
                );
            }
        }
    }

    /// When the next record is due, after a step that did something or didn't.
    pub(super) fn publish_due_ns(&mut self, progressed: bool) -> Option<u64> {
        let publisher = self.publisher.as_mut()?;
        publisher.is_busy |= progressed;
        Some(publisher.due_ns())
    }

    /// In the catalogue's order.
    fn counted_by_callers(&self) -> [u64; 4] {
        let (reads, writes) = self.link.hits.totals();
        [reads, writes, self.link.requests.load(Ordering::Relaxed), self.link.hits.first_uses()]
    }

    /// In the catalogue's order.
    fn gauges(&self) -> [u64; 13] {
        let cache = &self.cache.shared;
        let (mut dirty, mut writeback, mut poisoned) = (0, 0, 0);
        for open in &self.open {
            let marked = &cache.marked[open.slot as usize];
            dirty += u64::from(marked.dirty());
            writeback += u64::from(marked.writeback());
            poisoned += u64::from(marked.poisoned());
        }
        let limits = self.throttle.limits;
        let rate = if cache.balance.is_open() {
            0
        } else {
            (self.throttle.rate_limit(cache.balance.throttleable()) * crate::PAGE_BYTES as f64) as u64
        };
        [
            u64::from(self.failed),
            self.frames(),
            self.cache.free_frames() as u64,
            u64::from(self.queue.in_flight()),
            self.in_service_count as u64,
            dirty,
            writeback,
            poisoned,
            cache.gated_dirty(),
            limits.freerun,
            limits.limit,
            self.throttled.len() as u64,
            rate,
        ]
    }
}
