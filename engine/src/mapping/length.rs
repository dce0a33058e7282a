//! Mappings that grow and shrink (WB-12, WB-26).
//!
//! One change of a mapping's length goes on at a time, and in an order that [`FileEnd`](crate::cache::eof::FileEnd) argues:
//!
//! ```text
//!   grow:   raise reach ─► zeros behind the old end ─► raise len
//!   append: raise reach ─► the bytes themselves ────► raise len
//!   shrink: lower len ──► remove pages, zero the rest of the one across the end ──► lower reach
//! ```
//!
//! What lay behind an end before, in the cache or on the device, is never seen: growing makes zeros of it. Whole pages become
//! zeros on the device (Write Zeroes; written where it has none); of the page across the old end the rest is overwritten in
//! the cache. Appending overwrites all that it adds, so it costs no I/O.

use std::time::{Duration, Instant};

use super::{Mapping, Writing};
use crate::cache::eof::EndChange;
use crate::cache::lsn::Lsn;
use crate::cache::shape::Stability;
use crate::error::{Error, Result};
use crate::reply::block_on;
use crate::shard::request::{Pacing, Request, Want};
use crate::writeback::callback;

impl Mapping {
    /// How long the mapping may become, in bytes ([`MappingOptions::capacity_bytes`](super::MappingOptions::capacity_bytes)).
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.open.shape.capacity_bytes
    }

    /// Changes the length (`ftruncate`), for all handles.
    ///
    /// Bytes that are added read as zeros. What is cut off is gone from the cache when it returns, waited for where it was
    /// being written or was pinned (WB-26), and is never written later; a later growth doesn't bring it back. On the
    /// device it stays as it was: [`discard`](Self::discard) before gives the space back.
    ///
    /// **The length isn't durable by itself**: who opens the device again says how long the mapping is
    /// ([`MappingOptions::len_bytes`](super::MappingOptions::len_bytes)). Who keeps it makes a longer one durable only
    /// after a [`sync`](Self::sync) of the mapping has made what it adds durable.
    ///
    /// # Errors
    /// [`Error::Capacity`]; [`Error::LengthBusy`]; for growing those of [`write_at`](Self::write_at) and
    /// [`discard`](Self::discard), and the length is as it was. For shrinking those of `discard`: the length is the new one
    /// nevertheless, and the next change of it waits first for what was held.
    pub fn set_len(&self, len_bytes: u64) -> Result<()> {
        block_on(self.set_len_async(len_bytes))
    }

    /// As [`set_len`](Self::set_len), without blocking the thread. A growth that is dropped midway hasn't happened; a
    /// shrinking has, as after an error.
    ///
    /// # Errors
    /// As `set_len`.
    pub async fn set_len_async(&self, len_bytes: u64) -> Result<()> {
        self.check_length(len_bytes)?;
        let change = self.change_end().await?;
        let old = change.len();
        if len_bytes < old {
            change.shrink_to(len_bytes);
            return self.settle(&change).await;
        }
        if len_bytes > old {
            change.extend_to(len_bytes);
            let padded = len_bytes.next_multiple_of(self.page_bytes() as u64).min(self.capacity());
            if let Err(error) = self.zero(old..padded, self.extending(self.capacity())).await {
                change.give_up_extending();
                return Err(error);
            }
            change.publish();
        }
        Ok(())
    }

    /// Writes `data` behind the end and returns where: the length that the mapping had. Appends of several threads don't mix,
    /// and readers see all of one or nothing.
    ///
    /// As with [`set_len`](Self::set_len), the new length isn't durable by itself. A page that only appends have come to is never
    /// read from the device.
    ///
    /// # Errors
    /// [`Error::Capacity`]; [`Error::LengthBusy`]; those of [`write_at`](Self::write_at). After an error the length is as it
    /// was.
    pub fn append(&self, data: &[u8]) -> Result<u64> {
        block_on(self.append_async(data))
    }

    /// As [`append`](Self::append), without blocking the thread. Dropped midway it hasn't happened.
    ///
    /// # Errors
    /// As `append`.
    pub async fn append_async(&self, data: &[u8]) -> Result<u64> {
        // Before it waits: what can't fit now never will, unless others shrink the mapping.
        self.check_length(self.len().saturating_add(data.len() as u64))?;
        let change = self.change_end().await?;
        let old = change.len();
        let new = old + data.len() as u64;
        self.check_length(new)?;
        change.extend_to(new);
        if let Err(error) = self.write(old, data, self.extending(new)).await {
            change.give_up_extending();
            return Err(error);
        }
        change.publish();
        Ok(old)
    }

    /// How things are written unless the caller says more.
    pub(super) fn writing(&self) -> Writing {
        let stability = self.open.shape.stability;
        Writing { lsn: Lsn::NONE, pacing: Pacing::Wait, last: self.capacity(), stability }
    }

    /// How things are written behind the end: in an unstable mapping, too, a pass that makes zeros there and a writer that
    /// extends keep out of each other's way by WRITEBACK.
    fn extending(&self, last: u64) -> Writing {
        Writing { last, stability: Stability::Stable, ..self.writing() }
    }

    /// Writes within the capacity, wherever the end is.
    pub(super) async fn write(&self, offset: u64, data: &[u8], writing: Writing) -> Result<()> {
        let done = self.write_hits(offset, data, writing)?;
        self.write_rest(offset, data, done, writing).await
    }

    fn check_length(&self, len_bytes: u64) -> Result<()> {
        self.check_open()?;
        callback::check_outside()?;
        self.open.durability.check()?;
        let capacity_bytes = self.capacity();
        if len_bytes > capacity_bytes {
            return Err(Error::Capacity { len_bytes, capacity_bytes });
        }
        Ok(())
    }

    /// Waits for the right to change the length, and removes what a change that was given up has left.
    async fn change_end(&self) -> Result<EndChange<'_>> {
        let mut since = None;
        let change = std::future::poll_fn(|context| {
            use std::task::Poll;
            if let Some(change) = self.open.end.try_change() {
                return Poll::Ready(Ok(change));
            }
            // Others hold it for one request's time, mostly for less.
            let waited: Duration = since.get_or_insert_with(Instant::now).elapsed();
            if waited > self.engine.pin_wait {
                return Poll::Ready(Err(Error::LengthBusy { waited }));
            }
            std::thread::yield_now();
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await?;
        if change.reach() > change.len() {
            self.settle(&change).await?;
        }
        Ok(change)
    }

    /// Removes what lies behind the length, and waits for whoever holds bytes of it.
    async fn settle(&self, change: &EndChange<'_>) -> Result<()> {
        let (len, page_bytes) = (change.len(), self.page_bytes() as u64);
        let (first, end) = (len.div_ceil(page_bytes), change.reach().div_ceil(page_bytes));
        if first < end {
            let (mapping, pages) = (self.open.shape.slot, self.first(first)..self.first(end));
            let pages = pages.start..pages.end.min(self.open.shape.pages());
            let request = || Request::Truncate { mapping, pages: pages.clone() };
            self.ask_shards(|_| true, request).await?;
        }
        if !len.is_multiple_of(page_bytes) {
            // Once nobody else has it, nobody shows what lies behind the end of this page.
            let page = len / page_bytes;
            let mut pin = self.acquire_mut(self.first(page), Want::Change, Pacing::Wait).await?;
            let from = (len - page * page_bytes) as usize;
            pin[from..].fill(0);
        }
        change.settle();
        Ok(())
    }
}
