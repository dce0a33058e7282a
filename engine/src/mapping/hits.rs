//! Hits: pages that are cached, held and copied by the thread that wants them, without the shard.

use super::near::NearPage;
use super::{Mapping, PAGE, Writing, split};
use crate::cache::SharedHold;
use crate::cache::balance::ReservedPages;
use crate::cache::folio::{Access, FolioKey, FolioOrder, FrameId, ReadAhead};
use crate::cache::frames::PAGE_BYTES;
use crate::cache::published::{self, ThreadBlock};
use crate::cache::shape::Stability;
use crate::cache::tags::Tag;
use crate::error::Result;
use crate::pin::{PagePin, PagePinMut};
use crate::shard::link::ShardLink;

/// What came of the shortest way to write.
enum ShortWay {
    Done,
    /// Nothing: the longer way is to be tried.
    Longer,
    /// Somebody has the page, or it is being written: no other way but to ask the shard.
    Refused,
}

impl Mapping {
    #[inline]
    pub(super) fn link(&self, page: u64) -> &ShardLink {
        &self.engine.links[self.open.shape.striping.shard_of(page)]
    }

    /// A page's first page of 4096 bytes.
    #[inline]
    pub(super) fn first(&self, page: u64) -> u64 {
        page << self.open.shape.order.0
    }

    /// Pins a page as most are pinned: a whole one, a folio by itself, in use already. The shortest way; where it ends the
    /// caller goes another. Inlined by force: a pin that is handed over in memory makes the processor wait for the stores
    /// to get there, and so for every load before them.
    #[inline(always)]
    pub(crate) fn pin_in_use(&self, block: &'static ThreadBlock, page: u64) -> Option<PagePin<'_>> {
        let NearPage { link, key, alone } = self.near.page(&self.engine, &self.open, page);
        let (frame, folio, slot) = match link.cache.pin_published(block, key, (alone, self.near.at_hand)) {
            Ok(held) => held,
            Err(released) => {
                link.after_release(released);
                return None;
            }
        };
        // The length as it is now that the page is held, as for any pin; a close waits for whoever came before it.
        if !self.has_whole(page) {
            link.after_release(folio.unpublish(slot));
            return None;
        }
        link.hits.read_by(block, 1);
        let len_bytes = self.near.page_bytes;
        // SAFETY: it was found by its header, and there are as many of these.
        #[expect(unsafe_code, reason = "frames are reached by address")]
        let bytes = unsafe { link.cache.frames.address_unchecked(frame) };
        Some(PagePin { link, folio, bytes, len_bytes, slot: Some(slot), note: None })
    }

    /// Has the processor fetch the cache line of byte `within` of a page, if the page is cached, and goes on: for who knows some
    /// ten accesses ahead what he will touch, as when the keys of a batch are looked up. Each random touch waits for memory;
    /// these waits then overlap, and the `pin` or `read_with` that follows finds its bytes at hand.
    ///
    /// Returns whether the page is cached or on its way; what isn't may be asked for by
    /// [`prefetch_many`](Self::prefetch_many). Nothing is held, counted, or read from the device, and the answer may be
    /// out of date at once: it may also be true of a page just behind the mapping's end, where one is being made or was. A byte
    /// behind the page's end is fetched from nowhere, and on other processors than x86-64 none is.
    ///
    /// ```no_run
    /// # fn sum(mapping: &foliant::Mapping, keys: &[(u64, usize)]) -> foliant::Result<u64> {
    /// const AHEAD: usize = 8;
    /// let mut sum = 0;
    /// for (at, &(page, within)) in keys.iter().enumerate() {
    ///     if let Some(&(page, within)) = keys.get(at + AHEAD) {
    ///         mapping.prefetch_line(page, within);
    ///     }
    ///     sum += u64::from(mapping.pin(page)?[within]);
    /// }
    /// # Ok(sum)
    /// # }
    /// ```
    #[inline]
    pub fn prefetch_line(&self, page: u64, within: usize) -> bool {
        if page >= FolioKey::PAGES_MAX >> self.open.shape.order.0 {
            return false;
        }
        let NearPage { link, key, .. } = self.near.page(&self.engine, &self.open, page);
        let found = link.cache.index.find(&link.cache.headers, key);
        if let Some(frame) = found
            && within < self.near.page_bytes
        {
            link.cache.frames.prefetch_line(frame, within);
        }
        found.is_some()
    }

    /// Pins a page to be kept: only one that is a folio by itself, since its holder may ask for the next one.
    #[inline]
    pub(super) fn try_pin(&self, page: u64) -> Option<PagePin<'_>> {
        let first = self.first(page);
        let (link, key) = (self.link(first), self.open.shape.key(first));
        let frame = link.cache.index.find(&link.cache.headers, key)?;
        match link.cache.try_pin(frame, key) {
            Ok(hold) => {
                if hold.found.any() {
                    self.met(link, first, hold.place, hold.found);
                }
                let pin = self.shared_pin(link, (first, self.open.shape.order.pages()), frame, hold);
                (hold.place.order == self.open.shape.order).then_some(pin)
            }
            Err(released) => {
                link.after_release(released);
                None
            }
        }
    }

    /// As [`try_pin`](Self::try_pin), exclusively.
    #[inline]
    pub(super) fn try_pin_mut(&self, page: u64) -> Option<PagePinMut<'_>> {
        let first = self.first(page);
        let access = (Access::Change, Stability::Stable);
        let pin = self.try_change(first, access, self.open.shape.order.pages())?;
        (pin.place.order == self.open.shape.order).then_some(pin)
    }

    /// Pins pages of one folio from `first` on, up to `pages` of them, to be copied out and released at once.
    #[inline]
    pub(super) fn try_read(&self, first: u64, pages: u64) -> Option<PagePin<'_>> {
        let (link, key) = (self.link(first), self.open.shape.key(first));
        let frame = link.cache.index.find(&link.cache.headers, key)?;
        match link.cache.try_pin(frame, key) {
            Ok(hold) => {
                let place = hold.place;
                if hold.found.any() {
                    self.met(link, first, place, hold.found);
                }
                let filled = || link.cache.folio(place.head).state().filled() - place.within;
                let pages = if place.order == FolioOrder(0) || pages == 1 { 1 } else { pages.min(filled()) };
                Some(self.shared_pin(link, (first, pages), frame, hold))
            }
            Err(released) => {
                link.after_release(released);
                None
            }
        }
    }

    /// Takes pages of one folio exclusively from `first` on, up to `pages` of them, to be changed and released at once.
    #[inline]
    pub(super) fn try_change(
        &self,
        first: u64,
        (access, stability): (Access, Stability),
        pages: u64,
    ) -> Option<PagePinMut<'_>> {
        let (link, key) = (self.link(first), self.open.shape.key(first));
        let frame = link.cache.index.find(&link.cache.headers, key)?;
        if access == Access::Overwrite {
            link.cache.frames.prefetch(frame);
        }
        match link.cache.try_exclusive(frame, key, (access, stability)) {
            Ok(place) => {
                let single = place.order == FolioOrder(0) || pages == 1;
                let pages =
                    if single { 1 } else { link.cache.writable_pages(frame, place, (pages, stability)) };
                // Where too much is dirty, the shard says when these pages may be, too.
                let Some((pages, reserved)) = link.cache.may_dirty(frame, pages, &self.open.shape) else {
                    link.after_release(link.cache.folio(place.head).release_exclusive_unchanged());
                    return None;
                };
                let mut pin = self.exclusive_pin(link, first, frame, pages);
                pin.reserved = reserved;
                // Where more would be dirty behind gates than may be, it lets the writer wait as well.
                let waits = self.open.gates.gate.is_some()
                    && link.cache.exceeds_gated(pages.max(self.open.shape.order.pages()))
                    && !link.cache.is_all_marked(frame, pages, Tag::Dirty);
                (!waits).then_some(pin)
            }
            Err(released) => {
                link.after_release(released);
                None
            }
        }
    }

    /// A pin on `pages` pages of a folio that is held already.
    #[inline]
    pub(super) fn shared_pin<'a>(
        &self,
        link: &'a ShardLink,
        (first, pages): (u64, u64),
        frame: FrameId,
        hold: SharedHold,
    ) -> PagePin<'a> {
        let len_bytes = self.bytes_of(first, pages);
        // The length as it is now that the page is held: whoever shortens the mapping waits for pins that show more.
        let rest = self.len().saturating_sub(first * PAGE);
        let len_bytes = if len_bytes as u64 <= rest { len_bytes } else { rest as usize };
        let folio = link.cache.folio(hold.place.head);
        let bytes = link.cache.frames.address(frame);
        PagePin { link, folio, bytes, len_bytes, slot: hold.slot, note: None }
    }

    /// A pin of pages that the shard granted.
    pub(super) fn granted_shared_pin<'a>(
        &self,
        link: &'a ShardLink,
        first: u64,
        frame: FrameId,
        pages: u64,
    ) -> PagePin<'a> {
        let hold = SharedHold { place: link.cache.place(frame), slot: None, found: ReadAhead::NONE };
        self.shared_pin(link, (first, pages), frame, hold)
    }

    /// As [`shared_pin`](Self::shared_pin), of one that is held exclusively.
    pub(super) fn exclusive_pin<'a>(
        &'a self,
        link: &'a ShardLink,
        first: u64,
        frame: FrameId,
        pages: u64,
    ) -> PagePinMut<'a> {
        let len_bytes = self.bytes_of(first, pages);
        let place = link.cache.place(frame);
        let shape = &self.open.shape;
        let (changed, note, reserved) = (false, None, None);
        PagePinMut { link, shape, place, frame, pages, len_bytes, changed, note, reserved }
    }

    /// A pin of pages that the shard granted exclusively, with `reserved` pages.
    pub(super) fn granted_pin<'a>(
        &'a self,
        link: &'a ShardLink,
        first: u64,
        frame: FrameId,
        (pages, reserved): (u64, u32),
    ) -> PagePinMut<'a> {
        let mut pin = self.exclusive_pin(link, first, frame, pages);
        pin.reserved = Some(ReservedPages::take_over(&link.cache.balance, reserved));
        pin
    }

    /// Bytes that `pages` pages from `first` on have on the device; the last may be shorter.
    #[inline]
    pub(super) fn bytes_of(&self, first: u64, pages: u64) -> usize {
        (pages as usize - 1) * PAGE_BYTES + self.open.shape.page_bytes(first + pages - 1) as usize
    }

    /// Copies cached pages out, up to the first that isn't to be had at once; returns how many bytes.
    #[inline]
    pub(super) fn read_hits(&self, offset: u64, buf: &mut [u8]) -> usize {
        let mut done = 0;
        while done < buf.len() {
            let (page, within) = split(offset + done as u64);
            let is_last = within + buf.len() - done <= PAGE_BYTES;
            if is_last && self.read_plain(page, within, &mut buf[done..]) {
                return buf.len();
            }
            let wanted = (within + buf.len() - done).div_ceil(PAGE_BYTES) as u64;
            let Some(pin) = self.try_read(page, wanted) else { break };
            // Cut off meanwhile?
            let count = pin.len().saturating_sub(within).min(buf.len() - done);
            if count == 0 {
                break;
            }
            buf[done..done + count].copy_from_slice(&pin[within..within + count]);
            pin.link.hits.read((within + count).div_ceil(PAGE_BYTES) as u64);
            done += count;
        }
        done
    }

    /// Reads from one page as most are read: one that is a folio by itself, and in use. The shortest way; false, and nothing is
    /// read, where the caller goes another.
    #[inline]
    fn read_plain(&self, page: u64, within: usize, buf: &mut [u8]) -> bool {
        if self.near.page_bytes != PAGE_BYTES {
            return false;
        }
        let pin = published::known_thread().and_then(|block| self.pin_in_use(block, page));
        let Some(pin) = pin else { return false };
        buf.copy_from_slice(&pin[within..within + buf.len()]);
        true
    }

    /// Copies into cached pages, up to the first that isn't to be had at once; returns how many bytes.
    #[inline]
    pub(super) fn write_hits(&self, offset: u64, data: &[u8], writing: Writing) -> Result<usize> {
        let mut done = 0;
        while done < data.len() {
            let (page, within) = split(offset + done as u64);
            let is_last = within + data.len() - done <= PAGE_BYTES;
            if is_last && writing.lsn.is_none() {
                match self.write_plain(page, within, &data[done..]) {
                    ShortWay::Done => return Ok(data.len()),
                    ShortWay::Refused => break,
                    ShortWay::Longer => {}
                }
            }
            let (access, pages) = self.access_for(offset + done as u64, data.len() - done, writing);
            let Some(mut pin) = self.try_change(page, (access, writing.stability), pages) else { break };
            pin.set_lsn(writing.lsn)?;
            let count = (pin.len() - within).min(data.len() - done);
            pin.store(within, &data[done..done + count]);
            pin.link.hits.write((within + count).div_ceil(PAGE_BYTES) as u64);
            done += count;
        }
        Ok(done)
    }

    /// Writes into one page as most are written: one that is a folio by itself, of a plain mapping, without a number.
    #[inline]
    fn write_plain(&self, page: u64, within: usize, data: &[u8]) -> ShortWay {
        let NearPage { link, key, alone } = self.near.page(&self.engine, &self.open, page);
        if !self.near.is_plain || !link.cache.balance.is_open() {
            return ShortWay::Longer;
        }
        let whole = data.len() == PAGE_BYTES;
        match link.cache.try_exclusive_alone(key, alone, whole) {
            None => ShortWay::Longer,
            Some(Err(released)) => {
                link.after_release(released);
                ShortWay::Refused
            }
            Some(Ok(place)) => {
                link.cache.frames.write(place.head, within, data);
                link.release_dirty(place.head, place, 1, &self.open.shape);
                link.hits.write(1);
                ShortWay::Done
            }
        }
    }

    /// How `count` bytes at `offset` change the page that they begin in, and how many pages they change likewise.
    #[inline]
    pub(super) fn access_for(&self, offset: u64, count: usize, writing: Writing) -> (Access, u64) {
        let page_bytes = self.page_bytes() as u64;
        let end = offset + count as u64;
        let whole_end = if end == writing.last { end.next_multiple_of(page_bytes) } else { end };
        if offset.is_multiple_of(page_bytes) && whole_end - offset >= page_bytes {
            (Access::Overwrite, (whole_end - offset) / page_bytes * (page_bytes / PAGE))
        } else {
            (Access::Change, 1)
        }
    }
}
