//! Batches: many scattered reads at once.
//!
//! All pages that are missing are asked for together, each shard by one message, and are with the device before anything
//! is waited for ([`Gather`]). What comes is copied and released as it comes, whatever else is still on its way; pages that
//! others hold are waited for at the end, one by one and with nothing held, as a single read does. So a batch waits for I/O
//! only while it holds pages, and two batches never wait for each other.

use std::time::Instant;

use super::gather::{Added, Gather};
use super::{Mapping, overlap};
use crate::cache::published;
use crate::error::{Error, Result};
use crate::pin::PagePin;
use crate::reply::block_on;
use crate::shard::readahead::Posted;

/// One read of a batch ([`Mapping::read_many`]): any number of bytes anywhere in the mapping.
#[derive(Debug)]
pub struct ReadAt<'a> {
    offset: u64,
    buf: &'a mut [u8],
    /// Bytes that have been copied, each page's once.
    done: usize,
    error: Option<Error>,
}

impl<'a> ReadAt<'a> {
    /// A read of `buf.len()` bytes from byte `offset` on.
    pub fn new(offset: u64, buf: &'a mut [u8]) -> Self {
        Self { offset, buf, done: 0, error: None }
    }

    /// First byte.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// What was read, once it [is done](Self::is_done).
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.buf
    }

    /// Whether all of its bytes have been read.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.done == self.buf.len()
    }

    /// Why it couldn't be read.
    #[must_use]
    pub fn error(&self) -> Option<&Error> {
        self.error.as_ref()
    }

    /// Copies what it wants of a page that is pinned, all of it or nothing.
    fn take(&mut self, first: u64, page_bytes: usize, page: &[u8]) {
        let Some((from, to, within)) = overlap(first, self.offset, self.buf.len(), page_bytes) else {
            return;
        };
        // A page that has been cut off meanwhile shows less.
        if let Some(bytes) = page.get(within..within + to - from) {
            self.buf[from..to].copy_from_slice(bytes);
            self.done += to - from;
        }
    }
}

/// Pages of a batch that are made ready together.
const FETCHED_AT_ONCE: usize = 128;

/// How far a batch has been looked through.
#[derive(Debug, Default)]
struct Cursor {
    read: usize,
    /// Bytes of that read that are done or asked for.
    at: usize,
    /// Reads whose first lines the processor was told to fetch.
    fetched: usize,
}

impl Mapping {
    /// Reads many places at once: everything that is missing goes to the device together, with one doorbell a shard. In any
    /// order, of any length; two of them may name the same page. Afterwards each of `reads` [is done](ReadAt::is_done) or
    /// has an [error](ReadAt::error).
    ///
    /// Pages of a batch are known to be wanted, and only those are: nothing is read ahead for it. A batch may be larger
    /// than the cache.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] and [`Error::Closed`] before anything is read. [`Error::Device`], naming the page, when the
    /// device can't read one: of several the first in the order of `reads`; all others are delivered. After any
    /// other error of [`read_at`](Self::read_at) reads may be neither done nor failed.
    pub fn read_many(&self, reads: &mut [ReadAt<'_>]) -> Result<()> {
        self.begin_many(reads)?;
        let mut cursor = Cursor::default();
        if self.read_many_hits(reads, &mut cursor) {
            Ok(())
        } else {
            block_on(self.read_many_rest(reads, cursor))
        }
    }

    /// As [`read_many`](Self::read_many), without blocking the thread. Dropping the future cancels it: what isn't with
    /// the device yet isn't read any more, and what has come is given back.
    ///
    /// # Errors
    /// As `read_many`.
    pub async fn read_many_async(&self, reads: &mut [ReadAt<'_>]) -> Result<()> {
        self.begin_many(reads)?;
        let mut cursor = Cursor::default();
        if self.read_many_hits(reads, &mut cursor) {
            Ok(())
        } else {
            self.read_many_rest(reads, cursor).await
        }
    }

    /// Pins many pages for reading in place, in any order, a page perhaps twice: everything that is missing is read at
    /// once. The pins are in the order of `pages`.
    ///
    /// While it waits for a page that somebody holds it holds none itself; so batches never wait for each other's
    /// pages in a circle. All of `pages` have to fit into the cache together, beside what else is pinned.
    ///
    /// # Errors
    /// As [`pin`](Self::pin): nothing is pinned then. [`Error::PinnedTooLong`] also when others kept taking one page or the
    /// other for as long as `pin_wait`.
    pub fn pin_many(&self, pages: &[u64]) -> Result<Vec<PagePin<'_>>> {
        self.fetch_together(pages.iter().map(|&page| (page, 0)));
        let pins = self.pin_in_use_first(pages);
        let all = !pages.is_empty() && pins.len() == pages.len();
        if all { Ok(pins) } else { block_on(self.pin_many_rest(pages, pins)) }
    }

    /// Pins pages as far as they are to be had in the shortest way, from the first on.
    fn pin_in_use_first(&self, pages: &[u64]) -> Vec<PagePin<'_>> {
        let mut pins = Vec::with_capacity(pages.len());
        if let Some(block) = published::known_thread() {
            pins.extend(pages.iter().map_while(|&page| self.pin_in_use(block, page)));
        }
        pins
    }

    /// As [`pin_many`](Self::pin_many), without blocking the thread. Dropping the future gives back what it holds.
    ///
    /// # Errors
    /// As `pin_many`.
    pub async fn pin_many_async(&self, pages: &[u64]) -> Result<Vec<PagePin<'_>>> {
        self.fetch_together(pages.iter().map(|&page| (page, 0)));
        self.pin_many_rest(pages, Vec::new()).await
    }

    /// As [`pin_many_async`](Self::pin_many_async), where the first pages are pinned already.
    async fn pin_many_rest<'a>(
        &'a self,
        pages: &[u64],
        pinned: Vec<PagePin<'a>>,
    ) -> Result<Vec<PagePin<'a>>> {
        self.check_open()?;
        pages.iter().try_for_each(|&page| self.check_page(page))?;
        let mut pins: Vec<Option<PagePin<'_>>> = Vec::with_capacity(pages.len());
        let mut since = None;
        pins.extend(pinned.into_iter().map(Some));
        loop {
            let had = pins.len();
            pins.extend(pages[had..].iter().map(|&page| self.try_pin(page)));
            pins[had..].iter().flatten().for_each(|pin| pin.link.hits.read(1));
            self.pin_missing(pages, &mut pins).await?;
            if pins.iter().all(Option::is_some) {
                let pins = pages.iter().zip(pins.into_iter().flatten());
                return pins.map(|(&page, pin)| self.before_end(page, pin)).collect();
            }
            // Held by a writer, or part of a larger folio: had once with nothing else held, it can be had at once.
            let held: Vec<u64> =
                pages.iter().zip(&pins).filter(|(_, pin)| pin.is_none()).map(|(&page, _)| page).collect();
            pins.clear();
            let waited = since.get_or_insert_with(Instant::now).elapsed();
            if waited > self.engine.pin_wait {
                return Err(Error::PinnedTooLong { page: self.first(held[0]), waited });
            }
            for page in held {
                drop(self.pin_async(page).await?);
            }
        }
    }

    /// Brings in the pages that aren't cached, and pins those.
    async fn pin_missing<'a>(&'a self, pages: &[u64], pins: &mut [Option<PagePin<'a>>]) -> Result<()> {
        let (mut at, mut refused) = (0, None);
        let mut gather = Gather::new(self);
        loop {
            while at < pages.len() {
                let is_wanted = pins[at].is_none() && !self.is_cached(pages[at]);
                if is_wanted && gather.add(self.first(pages[at]), at as u32) == Added::NoRoom {
                    break;
                }
                at += 1;
            }
            if gather.is_empty() {
                if at == pages.len() {
                    return Ok(());
                }
                gather.wait_for_slot(&mut refused).await?;
                continue;
            }
            refused = None;
            gather.send()?;
            std::future::poll_fn(|context| {
                gather.poll(context, |_, tag, pin| {
                    // A pin that is kept is of a folio of its own.
                    let order = pin.folio.order();
                    pins[tag as usize] = Some(pin).filter(|_| order == self.open.shape.order);
                })
            })
            .await?;
        }
    }

    fn is_cached(&self, page: u64) -> bool {
        let first = self.first(page);
        let cache = &self.link(first).cache;
        cache.index.find(&cache.headers, self.open.shape.key(first)).is_some()
    }

    /// Asks for scattered pages to be brought into the cache, and returns at once, as [`prefetch`](Self::prefetch)
    /// does; each shard reads its part with one doorbell. Returns how many, from the first on, were asked for: fewer than
    /// all when a quarter of the cache, or too many for the shards to remember.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] when a page lies behind the end, before anything is asked for; [`Error::Closed`].
    pub fn prefetch_many(&self, pages: &[u64]) -> Result<usize> {
        self.check_open()?;
        pages.iter().try_for_each(|&page| self.check_page(page))?;
        let (most, block) = (self.prefetch_pages_max() as usize, self.open.shape.order.pages());
        let mut gather = Gather::new(self);
        // What the shards have, and what has been put into lists since.
        let (mut posted, mut listed) = (0, 0);
        for &page in &pages[..pages.len().min(most)] {
            if gather.add(self.first(page), 0) == Added::NoRoom {
                if gather.is_empty() || gather.post(None, block) == Posted::Refused {
                    return Ok(posted);
                }
                posted = listed;
                if gather.add(self.first(page), 0) == Added::NoRoom {
                    return Ok(posted);
                }
            }
            listed += 1;
        }
        if gather.post(None, block) == Posted::Yes {
            posted = listed;
        }
        Ok(posted)
    }

    fn begin_many(&self, reads: &mut [ReadAt<'_>]) -> Result<()> {
        self.check_open()?;
        reads.iter().try_for_each(|read| self.check_range(read.offset, read.buf.len()))?;
        for read in reads.iter_mut() {
            read.done = 0;
            read.error = None;
        }
        Ok(())
    }

    /// Has the processor fetch what the next reads of a batch begin with.
    fn fetch_ahead(&self, reads: &[ReadAt<'_>], cursor: &mut Cursor) {
        if cursor.read < cursor.fetched {
            return;
        }
        let page_bytes = self.page_bytes() as u64;
        self.fetch_together(
            reads[cursor.read..]
                .iter()
                .map(|read| (read.offset / page_bytes, (read.offset % page_bytes) as usize)),
        );
        cursor.fetched = cursor.read + FETCHED_AT_ONCE;
    }

    /// Has the processor fetch the lines of these bytes (page, and byte within it) and what their look-ups look at, where they are
    /// cached: it comes together instead of one after the other. Of more than a number the first would be gone again.
    fn fetch_together(&self, places: impl Iterator<Item = (u64, usize)>) {
        for (page, within) in places.take(FETCHED_AT_ONCE) {
            self.prefetch_line(page, within);
        }
    }

    /// Copies what is cached, up to the first page that isn't to be had at once; true when that is all.
    fn read_many_hits(&self, reads: &mut [ReadAt<'_>], cursor: &mut Cursor) -> bool {
        loop {
            self.fetch_ahead(reads, cursor);
            let Some(read) = reads.get_mut(cursor.read) else { return true };
            read.done = self.read_hits(read.offset, read.buf);
            if !read.is_done() {
                cursor.at = read.done;
                return false;
            }
            cursor.read += 1;
        }
    }

    async fn read_many_rest(&self, reads: &mut [ReadAt<'_>], mut cursor: Cursor) -> Result<()> {
        let page_bytes = self.page_bytes();
        let mut gather = Gather::of_copies(self);
        let mut refused = None;
        loop {
            let added = self.add_missing(reads, &mut cursor, &mut gather);
            if gather.is_empty() {
                if added == Added::Yes {
                    break;
                }
                gather.wait_for_slot(&mut refused).await?;
                continue;
            }
            refused = None;
            gather.send()?;
            std::future::poll_fn(|context| {
                gather.poll(context, |first, tag, pin| reads[tag as usize].take(first, page_bytes, &pin))
            })
            .await?;
        }
        drop(gather);
        self.read_many_held(reads).await
    }

    /// Copies what is cached from the cursor on, and puts what isn't into lists.
    fn add_missing(&self, reads: &mut [ReadAt<'_>], cursor: &mut Cursor, gather: &mut Gather<'_>) -> Added {
        let page_bytes = self.page_bytes() as u64;
        loop {
            self.fetch_ahead(reads, cursor);
            let Some(read) = reads.get_mut(cursor.read) else { return Added::Yes };
            while cursor.at < read.buf.len() {
                let byte = read.offset + cursor.at as u64;
                let page = byte / page_bytes;
                let to = read.buf.len().min(((page + 1) * page_bytes - read.offset) as usize);
                let part = &mut read.buf[cursor.at..to];
                // A page of which only a part is to be had at once is asked for as a whole.
                if self.read_hits(byte, part) == part.len() {
                    read.done += part.len();
                } else if gather.add(self.first(page), cursor.read as u32) == Added::NoRoom {
                    return Added::NoRoom;
                }
                cursor.at = to;
            }
            cursor.read += 1;
            cursor.at = 0;
        }
    }

    /// What the shards left out, since somebody held it, came meanwhile, or couldn't be read.
    async fn read_many_held(&self, reads: &mut [ReadAt<'_>]) -> Result<()> {
        let mut result = Ok(());
        for read in reads.iter_mut().filter(|read| !read.is_done()) {
            match self.read_at_async(read.offset, read.buf).await {
                Ok(()) => read.done = read.buf.len(),
                Err(error) => {
                    read.error = Some(error.clone());
                    let goes_on = matches!(error, Error::Device { .. } | Error::TryAgain { .. });
                    if result.is_ok() {
                        result = Err(error);
                    }
                    if !goes_on {
                        break;
                    }
                }
            }
        }
        result
    }
}
