//! Consecutive bytes from and to several buffers (`preadv`, `pwritev`).
//!
//! A page is read and written as one, however many buffers it lies in: where one buffer has all that is wanted of some pages, they
//! take the way of any read or write; a page that several share is had once and copied piece by piece.

use std::io::{IoSlice, IoSliceMut};

use super::{Mapping, Writing};
use crate::cache::folio::Access;
use crate::error::Result;
use crate::pin::{PagePin, PagePinMut};
use crate::reply::block_on;
use crate::shard::request::{Pacing, Want};

/// A place in a list of buffers.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    buffer: usize,
    within: usize,
}

impl Place {
    /// The place without the ends of buffers before it, empty ones among them.
    fn normal(mut self, len_of: impl Fn(usize) -> Option<usize>) -> Self {
        while len_of(self.buffer).is_some_and(|len| self.within == len) {
            self = Self { buffer: self.buffer + 1, within: 0 };
        }
        self
    }
}

/// What comes next: `count` bytes that one buffer has, or that one page has and several buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    OneBuffer { count: usize },
    OnePage { count: usize },
}

/// What to do at byte `at` of the mapping, where a buffer has `in_buffer` more bytes and all together have `left`.
fn next(at: u64, in_buffer: usize, left: usize, page_bytes: usize) -> Next {
    let in_page = (page_bytes - (at % page_bytes as u64) as usize).min(left);
    if in_buffer < in_page {
        return Next::OnePage { count: in_page };
    }
    let whole = in_page + (in_buffer - in_page) / page_bytes * page_bytes;
    // The last page of all may end anywhere.
    Next::OneBuffer { count: if in_buffer == left { left } else { whole } }
}

impl Mapping {
    /// Reads consecutive bytes from byte `offset` on into several buffers, one after the other.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    pub fn read_vectored_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        block_on(self.read_vectored_at_async(offset, bufs))
    }

    /// As [`read_vectored_at`](Self::read_vectored_at), without blocking the thread.
    ///
    /// # Errors
    /// As `read_vectored_at`.
    pub async fn read_vectored_at_async(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let mut left: usize = bufs.iter().map(|buf| buf.len()).sum();
        self.check_range(offset, left)?;
        let end = offset + left as u64;
        let (mut at, mut place, mut is_hinted) = (offset, Place::default(), false);
        while left > 0 {
            place = place.normal(|buffer| bufs.get(buffer).map(|buf| buf.len()));
            let in_buffer = bufs[place.buffer].len() - place.within;
            let count = match next(at, in_buffer, left, self.page_bytes()) {
                Next::OneBuffer { count } => {
                    let buf = &mut bufs[place.buffer][place.within..place.within + count];
                    let done = self.read_hits(at, buf);
                    if done < count {
                        // What follows comes meanwhile.
                        if !std::mem::replace(&mut is_hinted, true) && left > count {
                            self.prefetch(at + done as u64..end)?;
                        }
                        self.read_rest(at, buf, done).await?;
                    }
                    place.within += count;
                    count
                }
                Next::OnePage { count } => {
                    let pin = self.page_to_copy(at, count, (!is_hinted).then_some(end)).await?;
                    is_hinted = true;
                    let mut from = 0;
                    while from < count {
                        place = place.normal(|buffer| bufs.get(buffer).map(|buf| buf.len()));
                        let part = (bufs[place.buffer].len() - place.within).min(count - from);
                        let buf = &mut bufs[place.buffer][place.within..place.within + part];
                        let within = (at % self.page_bytes() as u64) as usize + from;
                        buf.copy_from_slice(&pin[within..within + part]);
                        place.within += part;
                        from += part;
                    }
                    count
                }
            };
            at += count as u64;
            left -= count;
        }
        Ok(())
    }

    /// Writes several buffers, one after the other, as consecutive bytes from byte `offset` on, into the cache. A page that
    /// several of them fill isn't read first.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    pub fn write_vectored_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        block_on(self.write_vectored_at_async(offset, bufs))
    }

    /// As [`write_vectored_at`](Self::write_vectored_at), without blocking the thread. Dropping the future midway leaves a
    /// prefix written.
    ///
    /// # Errors
    /// As `write_vectored_at`.
    pub async fn write_vectored_at_async(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        let mut left: usize = bufs.iter().map(|buf| buf.len()).sum();
        self.check_write(offset, left)?;
        let writing = self.writing();
        let (mut at, mut place) = (offset, Place::default());
        while left > 0 {
            place = place.normal(|buffer| bufs.get(buffer).map(|buf| buf.len()));
            let in_buffer = bufs[place.buffer].len() - place.within;
            let count = match next(at, in_buffer, left, self.page_bytes()) {
                Next::OneBuffer { count } => {
                    let data = &bufs[place.buffer][place.within..place.within + count];
                    self.write(at, data, writing).await?;
                    place.within += count;
                    count
                }
                Next::OnePage { count } => {
                    let mut pin = self.page_to_change(at, count, writing).await?;
                    let mut from = 0;
                    while from < count {
                        place = place.normal(|buffer| bufs.get(buffer).map(|buf| buf.len()));
                        let part = (bufs[place.buffer].len() - place.within).min(count - from);
                        let data = &bufs[place.buffer][place.within..place.within + part];
                        pin.store((at % self.page_bytes() as u64) as usize + from, data);
                        place.within += part;
                        from += part;
                    }
                    count
                }
            };
            at += count as u64;
            left -= count;
        }
        Ok(())
    }

    /// The page around byte `at`, to copy `count` bytes of it. Where it has to be waited for, what follows up to `hint` is
    /// hinted at.
    async fn page_to_copy(&self, at: u64, count: usize, hint: Option<u64>) -> Result<PagePin<'_>> {
        let page_bytes = self.page_bytes() as u64;
        let (page, pages) = (at / page_bytes, self.open.shape.order.pages());
        let (first, end) = (self.first(page), (at % page_bytes) as usize + count);
        if let Some(pin) = self.try_read(first, pages).filter(|pin| pin.len() >= end) {
            pin.link.hits.read(pages);
            return Ok(pin);
        }
        if let Some(hint) = hint.filter(|&hint| hint > (page + 1) * page_bytes) {
            self.prefetch(at..hint)?;
        }
        let (link, frame, _) = self.acquire(first, Want::Copy, Pacing::Wait).await?;
        self.read_once(first..first + pages);
        let pin = self.granted_shared_pin(link, first, frame, pages);
        // Shortened meanwhile?
        if pin.len() >= end { Ok(pin) } else { Err(self.outside(page)) }
    }

    /// The page around byte `at`, exclusively, to change `count` bytes of it.
    async fn page_to_change(&self, at: u64, count: usize, writing: Writing) -> Result<PagePinMut<'_>> {
        let page_bytes = self.page_bytes() as u64;
        let (first, pages) = (self.first(at / page_bytes), self.open.shape.order.pages());
        let (access, whole) = self.access_for(at, count, writing);
        if let Some(pin) = self.try_change(first, (access, writing.stability), pages) {
            if pin.pages == pages {
                pin.link.hits.write(pages);
                return Ok(pin);
            }
            drop(pin);
        }
        if let (Access::Overwrite, true) = (access, whole >= pages) {
            let link = self.link(first);
            let request = self.request_pages(link, first, pages as u32, Want::Create, writing.pacing);
            let grants = request.await?;
            if let Some((0, frame, granted)) = grants.iter().next() {
                let granted = granted as u64;
                return Ok(self.granted_pin(link, first, frame, (granted, granted as u32)));
            }
        }
        self.acquire_mut(first, writing.want(), writing.pacing).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_one_buffer_has_go_together_and_others_one_by_one() {
        // (at, in the buffer, left)
        let of = |at, in_buffer, left| next(at, in_buffer, left, 4096);
        assert_eq!(of(0, 100, 100), Next::OneBuffer { count: 100 });
        assert_eq!(of(0, 100, 200), Next::OnePage { count: 200 });
        assert_eq!(of(0, 100, 9000), Next::OnePage { count: 4096 });
        assert_eq!(of(4000, 96, 9000), Next::OneBuffer { count: 96 });
        assert_eq!(of(4000, 9000, 20_000), Next::OneBuffer { count: 96 + 8192 });
        assert_eq!(of(4000, 9000, 9000), Next::OneBuffer { count: 9000 });
        assert_eq!(of(8191, 1, 2), Next::OneBuffer { count: 1 });
    }
}
