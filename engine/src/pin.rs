//! Pins: direct access to a page in the cache.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::cache::Place;
use crate::cache::balance::ReservedPages;
use crate::cache::folio::{FolioHeader, FrameId};
use crate::cache::lsn::Lsn;
use crate::cache::published::{self, Slot};
use crate::cache::shape::{MappingShape, Stability};
use crate::error::{Error, LsnOf, Result};
use crate::shard::link::ShardLink;

/// A page held shared: its bytes can be read in place, and it stays where it is. Others may hold it shared too,
/// and it may be written back meanwhile; nobody can change it. Dropping releases it.
///
/// The bytes are those of the page that exist in the mapping: all, fewer for a last page that isn't whole, as long as the
/// mapping was when the page was pinned.
#[derive(Debug)]
#[must_use = "a pin that is dropped at once pins nothing"]
pub struct PagePin<'a> {
    pub(crate) link: &'a ShardLink,
    /// The header of its folio's head.
    pub(crate) folio: &'a FolioHeader,
    /// Its first byte, in its frame.
    pub(crate) bytes: NonNull<u8>,
    pub(crate) len_bytes: usize,
    /// Where it is published, unless it is counted.
    pub(crate) slot: Option<&'static Slot>,
    /// Its thread's note of it.
    pub(crate) note: Option<&'static Slot>,
}

/// A pin taken apart. What a call that isn't inlined hands over as a whole pin lies in memory that this call has written to; so
/// would then the pins of the short way, and to be read back from there costs more than all the rest of them. The parts
/// are put together in registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PinParts<'a> {
    link: &'a ShardLink,
    folio: &'a FolioHeader,
    bytes: NonNull<u8>,
    len_bytes: usize,
    slot: Option<&'static Slot>,
    note: Option<&'static Slot>,
}

impl<'a> PinParts<'a> {
    /// The pin that was taken apart; to be called once.
    #[inline(always)]
    pub(crate) fn assemble(self) -> PagePin<'a> {
        let Self { link, folio, bytes, len_bytes, slot, note } = self;
        PagePin { link, folio, bytes, len_bytes, slot, note }
    }
}

impl<'a> PagePin<'a> {
    /// Takes the pin apart: its parts hold the page until they are put together.
    pub(crate) fn into_parts(self) -> PinParts<'a> {
        let Self { link, folio, bytes, len_bytes, slot, note } = &self;
        let parts = PinParts { link, folio, bytes: *bytes, len_bytes: *len_bytes, slot: *slot, note: *note };
        std::mem::forget(self);
        parts
    }
}

// SAFETY: the address is of bytes that any thread may read as long as the pin exists, and whatever else it has is `Send`.
#[expect(unsafe_code, reason = "a pinned frame is readable memory")]
unsafe impl Send for PagePin<'_> {}
// SAFETY: see `Send`.
#[expect(unsafe_code, reason = "a pinned frame is readable memory")]
unsafe impl Sync for PagePin<'_> {}

impl PagePin<'_> {
    /// Notes that this thread has the page: it was granted by a blocking call. A published pin is its own note.
    #[inline]
    pub(crate) fn noted(mut self) -> Self {
        if self.slot.is_none() {
            self.note = published::note(self.folio);
        }
        self
    }
}

impl Deref for PagePin<'_> {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: the shared pin keeps the frame's folio up to date, in place, and free of exclusive holders
        // and device writes until `drop` (folio state word, invariants 1 and 2).
        #[expect(unsafe_code, reason = "a pinned frame is readable memory")]
        unsafe {
            std::slice::from_raw_parts(self.bytes.as_ptr(), self.len_bytes)
        }
    }
}

impl Drop for PagePin<'_> {
    #[inline]
    fn drop(&mut self) {
        if let Some(note) = self.note {
            note.forget();
        }
        let released = self.folio.unpin_from(self.slot);
        self.link.after_release(released);
    }
}

/// A page held exclusively: its bytes can be changed in place. If they were borrowed mutably, dropping the pin
/// marks the page dirty, also while a panic unwinds: the page then holds what was written until that point.
#[derive(Debug)]
#[must_use = "a pin that is dropped at once pins nothing"]
pub struct PagePinMut<'a> {
    pub(crate) link: &'a ShardLink,
    pub(crate) shape: &'a MappingShape,
    pub(crate) place: Place,
    pub(crate) frame: FrameId,
    /// Its pages of 4096 bytes, all of them: of a last one fewer bytes may be shown.
    pub(crate) pages: u64,
    pub(crate) len_bytes: usize,
    pub(crate) changed: bool,
    /// Of its thread as the page's holder.
    pub(crate) note: Option<&'static Slot>,
    /// Given back after the pages have been counted dirty; `None` for a hit below the middle of the dirty limits.
    pub(crate) reserved: Option<ReservedPages<'a>>,
}

impl PagePinMut<'_> {
    /// Notes that this thread has the page: it was granted by a blocking call.
    #[inline]
    pub(crate) fn noted(mut self) -> Self {
        self.note = published::note(self.link.cache.folio(self.place.head));
        self
    }

    /// Says that a panic has released the page amid a change.
    #[cold]
    fn released_by_panic(&self) {
        let page = self.link.cache.folio(self.frame).key().page() / self.shape.order.pages();
        tracing::warn!(
            mapping = self.shape.slot,
            namespace = self.shape.namespace.id(),
            page,
            "a panic released an exclusive pin: the page holds, and writes, what was changed until then"
        );
    }

    /// Stamps the page with the log sequence number of the change that is about to be made: behind a
    /// [gate](crate::Gate) it isn't written before the log is durable up to there, and a checkpoint counts it
    /// from now on. To be called before the bytes are changed, so that a panic in between leaves no change
    /// without its number. The page counts as changed. [`Lsn::NONE`] does nothing.
    ///
    /// # Errors
    /// [`Error::LsnBackwards`] when the page, as long as it is cached, has had a higher number; nothing has
    /// changed then.
    pub fn set_lsn(&mut self, lsn: Lsn) -> Result<()> {
        if lsn.is_none() {
            return Ok(());
        }
        let stamped = self.link.stamp(self.frame, self.pages, self.shape, lsn);
        stamped.map_err(|last| {
            let page = self.link.cache.folio(self.frame).key().page() / self.shape.order.pages();
            Error::LsnBackwards { of: LsnOf::Page(page), lsn, last }
        })?;
        self.changed = true;
        Ok(())
    }
}

impl PagePinMut<'_> {
    /// Writes `data` at byte `within` of the page: in an unstable mapping also while the device reads it.
    pub(crate) fn store(&mut self, within: usize, data: &[u8]) {
        if self.shape.stability == Stability::Stable {
            return self[within..within + data.len()].copy_from_slice(data);
        }
        assert!(within + data.len() <= self.len_bytes);
        self.changed = true;
        self.link.cache.frames.store_beside_device(self.frame, within, data);
    }
}

impl Deref for PagePinMut<'_> {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: exclusive possession: nobody else reads or writes the frame until `drop`.
        #[expect(unsafe_code, reason = "an exclusively held frame is this holder's memory")]
        unsafe {
            std::slice::from_raw_parts(self.link.cache.frames.address(self.frame).as_ptr(), self.len_bytes)
        }
    }
}

impl DerefMut for PagePinMut<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        self.changed = true;
        // SAFETY: exclusive possession: nobody else reads or writes the frame until `drop`, and `&mut self`
        // makes this the only slice.
        #[expect(unsafe_code, reason = "an exclusively held frame is this holder's memory")]
        unsafe {
            std::slice::from_raw_parts_mut(
                self.link.cache.frames.address(self.frame).as_ptr(),
                self.len_bytes,
            )
        }
    }
}

impl Drop for PagePinMut<'_> {
    #[inline]
    fn drop(&mut self) {
        if let Some(note) = self.note {
            note.forget();
        }
        if self.changed {
            if std::thread::panicking() {
                self.released_by_panic();
            }
            self.link.release_dirty(self.frame, self.place, self.pages, self.shape);
        } else {
            let released = self.link.cache.folio(self.place.head).release_exclusive_unchanged();
            self.link.after_release(released);
        }
    }
}
