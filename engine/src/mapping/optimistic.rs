//! Reading a page where it is, without holding it.

use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Mapping;
use super::near::NearPage;
use crate::cache::folio::{FolioHeader, FolioState, FrameId, Identity};
use crate::error::Result;
use crate::shard::link::ShardLink;

/// Looks at a page that fail before it is pinned after all: its writers are too busy.
const LOOKS: u32 = 3;

/// A page's bytes as they are while somebody may be changing them: what [`Mapping::read_with`] shows.
///
/// Bytes are copied out of it, never borrowed. Each method answers `None` where the page ends before what is asked for, so that
/// a position that was computed from torn bytes is no error.
#[derive(Clone, Copy)]
pub struct PageView<'a> {
    first: NonNull<u8>,
    len_bytes: usize,
    page: PhantomData<&'a [u8]>,
}

impl fmt::Debug for PageView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageView").field("len_bytes", &self.len_bytes).finish_non_exhaustive()
    }
}

impl<'a> PageView<'a> {
    /// The view of bytes that nobody changes.
    pub(crate) fn of(bytes: &'a [u8]) -> Self {
        Self { first: NonNull::from(bytes).cast(), len_bytes: bytes.len(), page: PhantomData }
    }

    /// Bytes of the page.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        self.len_bytes
    }

    /// Whether it has none; a page has some.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// The `N` bytes from byte `at` on: `u64::from_le_bytes(view.read(at)?)`.
    #[must_use]
    #[inline]
    pub fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        if at > self.len_bytes || N > self.len_bytes - at {
            return None;
        }
        // SAFETY: as below; aligned. The usual case in one load, where a volatile array is read byte by byte.
        #[expect(unsafe_code, reason = "frames are reached by address")]
        unsafe {
            let first = self.first.add(at).as_ptr();
            if N == size_of::<u64>() && first.cast::<u64>().is_aligned() {
                let word = AtomicU64::from_ptr(first.cast()).load(Ordering::Relaxed);
                return word.to_ne_bytes().first_chunk().copied();
            }
        }
        // SAFETY: inside the frames that the view is of by the test above; they are mapped as long as the mapping that the
        // view's lifetime is of. A volatile read is what it is at the machine, a load: nothing is assumed of bytes that
        // another thread may be storing to, and any of them make a `[u8; N]`. Whether they count is decided afterwards.
        #[expect(unsafe_code, reason = "frames are reached by address")]
        Some(unsafe { self.first.add(at).cast::<[u8; N]>().read_volatile() })
    }

    /// Fills `into` with the bytes from byte `at` on.
    #[must_use]
    pub fn copy_to(&self, at: usize, into: &mut [u8]) -> Option<()> {
        if at > self.len_bytes || into.len() > self.len_bytes - at {
            return None;
        }
        let mut at = at;
        let (lines, rest) = into.as_chunks_mut::<64>();
        for line in lines {
            *line = self.read(at)?;
            at += line.len();
        }
        for byte in rest {
            [*byte] = self.read(at)?;
            at += 1;
        }
        Some(())
    }
}

impl Mapping {
    /// Reads a page in place without holding it: no store to memory that others see, so any number of threads read one
    /// page as fast as one does. `read` copies out what it wants; if the page was changed meanwhile its answer is thrown away
    /// and it is called again, so it must have no other effect. A page whose writers don't let it be is
    /// [pinned](Self::pin) in the end, and `read` called a last time: what comes back are always bytes of one moment.
    ///
    /// A page that isn't in the cache is brought in as by `pin`. One that is part of a larger folio is read there.
    ///
    /// ```no_run
    /// # fn sum(mapping: &foliant::Mapping) -> foliant::Result<Option<u64>> {
    /// // The pointer at byte 8, and the word that it points to; None where it points outside.
    /// mapping.read_with(7, |page| {
    ///     let at = u64::from_le_bytes(page.read(8)?);
    ///     Some(u64::from_le_bytes(page.read(usize::try_from(at).ok()?)?))
    /// })
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`pin`](Self::pin).
    #[inline(always)]
    pub fn read_with<R>(&self, page: u64, mut read: impl FnMut(PageView<'_>) -> R) -> Result<R> {
        match self.look(page, &mut read) {
            Some(seen) => Ok(seen),
            None => self.look_longer(page, &mut read),
        }
    }

    #[inline(never)]
    fn look_longer<R>(&self, page: u64, read: &mut impl FnMut(PageView<'_>) -> R) -> Result<R> {
        for _ in 1..LOOKS {
            if let Some(seen) = self.look_anywhere(page, read) {
                return Ok(seen);
            }
        }
        let (first, pages) = (self.first(page), self.open.shape.order.pages());
        let pin = match self.has_whole(page).then(|| self.try_read(first, pages)).flatten() {
            Some(pin) if pin.len() == self.page_bytes() => pin,
            _ => self.pin(page)?,
        };
        Ok(read(PageView::of(&pin)))
    }

    /// One look at a page that is cached, and exists whole: one that is a folio by itself, and in use.
    #[inline(always)]
    pub(crate) fn look<R>(&self, page: u64, read: &mut impl FnMut(PageView<'_>) -> R) -> Option<R> {
        let NearPage { link, key, alone } = self.near.page(&self.engine, &self.open, page);
        let found = link.cache.look_up(key, (alone, self.near.at_hand))?;
        self.read_unheld(link, page, found, read)
    }

    /// As [`look`](Self::look), at any page: also one that is a part of a larger folio, or wasn't in use.
    pub(crate) fn look_anywhere<R>(&self, page: u64, read: &mut impl FnMut(PageView<'_>) -> R) -> Option<R> {
        let NearPage { link, key, .. } = self.near.page(&self.engine, &self.open, page);
        let (frame, own) = link.cache.index.find_entry(&link.cache.headers, key)?;
        let place = link.cache.place(frame);
        let head = link.cache.folio(place.head);
        let seen = head.begin_reading(place.within + self.open.shape.order.pages() - 1)?;
        // Looked at after that: should the frame become another page's, or another folio's, the head's version changes, or
        // what is filled of it.
        if own.identity() != Identity::new(key, place.order) {
            return None;
        }
        self.read_unheld(link, page, (frame, head, seen), read)
    }

    /// Reads the page in `frame`, of a folio with this head, that was so when the frame was that page's.
    #[inline(always)]
    fn read_unheld<R>(
        &self,
        link: &ShardLink,
        page: u64,
        (frame, head, seen): (FrameId, &FolioHeader, FolioState),
        read: &mut impl FnMut(PageView<'_>) -> R,
    ) -> Option<R> {
        // SAFETY: it was found by its header, and there are as many of these.
        #[expect(unsafe_code, reason = "frames are reached by address")]
        let first = unsafe { link.cache.frames.address_unchecked(frame) };
        // Behind the mapping's end, or of a mapping that was closed, this shows bytes that aren't its own, and counts for nothing.
        let answer = read(PageView { first, len_bytes: self.near.page_bytes, page: PhantomData });
        if !head.is_unchanged(seen) || !self.has_whole(page) {
            return None;
        }
        link.hits.read(1);
        Some(answer)
    }

    /// Whether all of a page exists, now, in a mapping that is open. Behind the end a frame's bytes may become zeros beside
    /// anybody who doesn't hold it.
    #[inline]
    pub(super) fn has_whole(&self, page: u64) -> bool {
        page < self.open.end.whole_pages()
    }
}
