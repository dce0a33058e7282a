//! A handle's side of readahead: what it remembers of its reads, and how it asks shards for pages without waiting.
//!
//! The decisions are [`Streams`]'; they are made where a read has to wait anyway, or meets a marker. A hit on any other
//! page doesn't come here.

use std::future::Future;
use std::ops::Range;
use std::sync::{Mutex, TryLockError};

use super::gather::{Added, Gather};
use super::{Mapping, PAGE};
use crate::cache::Place;
use crate::cache::course::Stretches;
use crate::cache::folio::{FolioOrder, ReadAhead};
use crate::cache::readahead::{Limits, Streams, Window, split_by_shard};
use crate::engine::EngineInner;
use crate::error::{Error, Result};
use crate::shard::link::ShardLink;
use crate::shard::readahead::{Posted, ReadaheadRequest};

/// The largest `readahead_bytes_max`.
const READAHEAD_BYTES_LIMIT: u32 = 4 << 20;
/// A window takes at most this part of a shard's frames.
const WINDOW_FRAMES_PART: u64 = 8;
/// A prefetch takes at most this part of the cache's frames.
const PREFETCH_FRAMES_PART: u64 = 4;

/// The state of one handle. A clone has the limit and none of the history: it is another reader.
#[derive(Debug)]
pub(crate) struct HandleReadahead {
    /// In pages of the mapping; 0 where readahead is off.
    pages_max: u64,
    /// The most that advice can make of that.
    pages_limit: u64,
    /// Only ever tried: a thread that finds another one deciding goes on without readahead.
    streams: Mutex<Streams>,
}

impl Clone for HandleReadahead {
    fn clone(&self) -> Self {
        Self { pages_max: self.pages_max, pages_limit: self.pages_limit, streams: Mutex::default() }
    }
}

impl HandleReadahead {
    /// Checks the option and fits it to the cache.
    ///
    /// # Errors
    /// [`Error::Option`].
    pub(crate) fn new(bytes_max: u32, order: FolioOrder, engine: &EngineInner) -> Result<Self> {
        let page_bytes = PAGE << order.0;
        if bytes_max > READAHEAD_BYTES_LIMIT || !u64::from(bytes_max).is_multiple_of(page_bytes) {
            return Err(Error::Option {
                option: "readahead_bytes_max",
                value: bytes_max.to_string(),
                reason: format!(
                    "must be a multiple of its page_bytes, {page_bytes}, at most {READAHEAD_BYTES_LIMIT}; 0 switches readahead off"
                ),
            });
        }
        let frames = engine.frames / engine.links.len() as u64;
        let pages = |bytes: u32| (u64::from(bytes) / PAGE).min(frames / WINDOW_FRAMES_PART) >> order.0;
        let (pages_max, pages_limit) = (pages(bytes_max), pages(READAHEAD_BYTES_LIMIT));
        Ok(Self { pages_max, pages_limit, streams: Mutex::default() })
    }

    /// For handles that never read.
    pub(crate) fn off() -> Self {
        Self { pages_max: 0, pages_limit: 0, streams: Mutex::default() }
    }

    fn decide<T>(&self, decision: impl FnOnce(&mut Streams) -> T) -> Option<T> {
        let mut streams = match self.streams.try_lock() {
            Ok(streams) => streams,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(decision(&mut streams))
    }
}

/// Parts of windows that are asked for after the demand: two windows, each perhaps on both sides of it.
#[derive(Debug, Default)]
struct Plan {
    parts: [Option<Window>; 4],
    count: usize,
}

impl Plan {
    /// Adds what `asked` doesn't cover.
    fn add(&mut self, window: &Window, asked: &Range<u64>) {
        let hull = &window.pages.hull;
        let parts = if window.pages.len < hull.end - hull.start {
            [window.pages.clone().without(asked), Stretches::one(0..0)]
        } else {
            let before = hull.start..hull.end.min(asked.start);
            [before, hull.start.max(asked.end)..hull.end].map(Stretches::one)
        };
        for pages in parts.into_iter().filter(|pages| !pages.hull.is_empty()) {
            self.parts[self.count] = Some(Window { pages, ..*window });
            self.count += 1;
        }
    }
}

impl Mapping {
    /// Asks for the pages of a byte range to be brought into the cache, and returns at once: the data
    /// will be needed soon (`POSIX_FADV_WILLNEED`). Returns how many bytes, from the range's start, were asked for.
    ///
    /// It is a hint. At most a quarter of the cache is asked for at once, and less where many requests wait in a
    /// shard; pages for which no frame is free or can be had by evicting clean, cold ones are left out. A read error is
    /// reported to nobody: who reads the page meets it.
    ///
    /// # Errors
    /// [`Error::OutOfRange`]; [`Error::Closed`].
    pub fn prefetch(&self, range: Range<u64>) -> Result<u64> {
        self.check_open()?;
        let order = self.open.shape.order;
        let pages = self.pages_of(range.clone())?;
        if range.is_empty() {
            return Ok(0);
        }
        let most = self.prefetch_pages_max();
        let (first, end) = (pages.start >> order.0, pages.end.div_ceil(order.pages()));
        let pages = Stretches::one(first..end.min(first + most));
        let asked_end = self.post(&Window { pages, marker: None, read: 1 });
        Ok((asked_end * PAGE).clamp(range.start, range.end) - range.start)
    }

    /// The most pages that one call asks for.
    pub(super) fn prefetch_pages_max(&self) -> u64 {
        ((self.engine.frames / PREFETCH_FRAMES_PART) >> self.open.shape.order.0).max(1)
    }

    /// A pin of a page of 4096 bytes met a folio that was read ahead: its first use, the marker, or both.
    #[cold]
    pub(super) fn met(&self, link: &ShardLink, page: u64, place: Place, found: ReadAhead) {
        if found.first_use() {
            self.read_once(page - place.within..page - place.within + place.order.pages());
            link.hits.first_use(place.order.pages());
        }
        if found.marker()
            && let Some(window) = self.after_marker(page >> self.open.shape.order.0)
        {
            self.post(&window);
        }
    }

    /// Sends a request for `asked`, whole pages in pages of 4096 bytes, on behalf of a read that goes on to `end`, and
    /// waits for its answer. What is to be read ahead is decided before, since the shard installs pages at once, and
    /// asked for after it: demand comes first.
    pub(super) async fn ask_and_read_ahead<F: Future>(
        &self,
        request: F,
        asked: Range<u64>,
        end: u64,
    ) -> F::Output {
        let order = self.open.shape.order;
        let mut plan = self.plan(asked.start >> order.0..asked.end >> order.0, end.div_ceil(order.pages()));
        let mut request = std::pin::pin!(request);
        std::future::poll_fn(|context| {
            let polled = request.as_mut().poll(context);
            for part in &mut plan.parts[..std::mem::take(&mut plan.count)] {
                if let Some(window) = part.take() {
                    self.post(&window);
                }
            }
            polled
        })
        .await
    }

    /// What to read ahead of a read that waits for pages of `asked`, asks for them anyway, and goes on to `end`.
    fn plan(&self, asked: Range<u64>, end: u64) -> Plan {
        let mut plan = Plan::default();
        if self.readahead_pages() == 0 {
            return plan;
        }
        for page in asked.clone() {
            let first = self.first(page);
            let (link, key) = (self.link(first), self.open.shape.key(first));
            let (cache, asked_before) = (&link.cache, link.readahead.asked());
            let window = match cache.index.find(&cache.headers, key) {
                // On its way, or held by a writer. Its marker counts now: the reader is at the device's heels.
                Some(frame) if cache.head(frame).take_marker() => self.after_marker(page),
                Some(_) => None,
                None => {
                    let (count, limits) = (end - page, self.limits());
                    self.readahead.decide(|streams| streams.on_miss(page, count, asked_before, limits))
                }
            };
            let Some(window) = window else { continue };
            plan.add(&window, &asked);
            // The reader is at the new marker, too, where the request covers it.
            let marker = window.marker.filter(|marker| asked.contains(marker));
            if let Some(next) = marker.and_then(|marker| self.after_marker(marker)) {
                plan.add(&next, &asked);
            }
            break;
        }
        plan
    }

    /// The window that a marker asks for.
    fn after_marker(&self, page: u64) -> Option<Window> {
        if self.readahead_pages() == 0 {
            return None;
        }
        let is_cached = |page| {
            let first = self.first(page);
            let cache = &self.link(first).cache;
            cache.index.find(&cache.headers, self.open.shape.key(first)).is_some()
        };
        self.readahead.decide(|streams| streams.on_marker(page, self.limits(), is_cached)).flatten()
    }

    fn limits(&self) -> Limits {
        // Not the length: what is remembered of scans counts from a fixed end.
        let pages = self.open.shape.pages().div_ceil(self.open.shape.order.pages());
        Limits { pages, size_max: self.readahead_pages() }
    }

    /// How many pages of the mapping are read ahead at once; 0 where readahead is off.
    fn readahead_pages(&self) -> u64 {
        self.advice.readahead_pages(self.readahead.pages_max, self.readahead.pages_limit)
    }

    /// Asks the shards that hold the window; returns up to which page of 4096 bytes, where one refused.
    fn post(&self, window: &Window) -> u64 {
        let (hull, last) = (&window.pages.hull, self.pages());
        if hull.start >= last {
            return self.first(hull.start);
        }
        if window.pages.len < hull.end - hull.start {
            return self.post_stretches(window);
        }
        let (start, end) = (hull.start, self.first(hull.end.min(last)));
        for pages in split_by_shard(self.open.shape.striping, self.first(start)..end) {
            let (link, first) = (self.link(pages.start), pages.start);
            let request = ReadaheadRequest {
                mapping: self.open.shape.slot,
                pages,
                lists: None,
                listed: 0,
                marker: window.marker.map(|marker| self.first(marker)),
                used_at_once: self.first(window.read),
                turns: 0,
            };
            if link.readahead.post(request) == Posted::Refused {
                return first;
            }
            link.wake();
        }
        end
    }

    /// As [`post`](Self::post), of pages with gaps between them.
    fn post_stretches(&self, window: &Window) -> u64 {
        let (marker, used_at_once) =
            (window.marker.map(|marker| self.first(marker)), self.first(window.read));
        let mut gather = Gather::new(self);
        for page in window.pages.iter().flatten().filter(|&page| page < self.pages()) {
            if gather.add(self.first(page), 0) == Added::NoRoom {
                if gather.is_empty() || gather.post(marker, used_at_once) == Posted::Refused {
                    return self.first(page);
                }
                // What finds no room now is read when it is wanted.
                let _ = gather.add(self.first(page), 0);
            }
        }
        let _ = gather.post(marker, used_at_once);
        self.first(window.pages.hull.end)
    }
}
