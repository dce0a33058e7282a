//! Mappings: a range of a namespace as bytes and pages in the cache.

mod advise;
mod batch;
mod checkpoint;
mod gather;
mod hits;
mod length;
pub(crate) mod mirror;
mod near;
pub(crate) mod optimistic;
mod readahead;
mod try_again;
mod vectored;
mod writeback;

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::Poll;

use crate::cache::errseq::ErrorCursor;
use crate::cache::folio::{Access, FolioOrder, FrameId};
use crate::cache::frames::PAGE_BYTES;
use crate::cache::lsn::Lsn;
use crate::cache::published;
use crate::cache::shape::Stability;
use crate::engine::EngineInner;
use crate::error::{Error, Held, Result};
use crate::gate::Gate;
use crate::mirror::MirrorOptions;
use crate::pin::{PagePin, PagePinMut, PinParts};
use crate::reply::{GRANTS_MAX, Grants, Hold, block_on, is_blocking};
use crate::shard::link::{PageFuture, RequestFuture, ShardLink};
use crate::shard::open::OpenMapping;
use crate::shard::request::{Pacing, Request, Want};
use crate::share::CacheShare;
use crate::writeback::control::WritebackOutcome;
pub use advise::Advice;
use advise::HandleAdvice;
pub use batch::ReadAt;
use near::Near;
pub(crate) use readahead::HandleReadahead;

const PAGE: u64 = PAGE_BYTES as u64;

/// What a discard writes where it can't have the device do it.
static ZEROS: [u8; 16 * PAGE_BYTES] = [0; 16 * PAGE_BYTES];

/// Shards that one request is sent to before their answers are waited for: their futures live on the stack.
const ASKED_AT_ONCE: usize = 16;

/// Which part of the device a mapping covers.
#[derive(Clone, Debug)]
pub struct MappingOptions {
    /// Namespace id; namespaces count from 1.
    pub namespace: u32,
    /// First byte within the namespace; a multiple of its block size.
    pub start_bytes: u64,
    /// Length in bytes; `None` for all of its capacity, or without one for the rest of the namespace. Of a mapping that is
    /// open already the length is what it is, whatever stands here.
    pub len_bytes: Option<u64>,
    /// How long it may become ([`set_len`](Mapping::set_len), [`append`](Mapping::append)), and what it occupies of the
    /// device: a multiple of the block size and of `page_bytes`, if that is more than 4096. `None` for its length, which must
    /// be such a multiple then.
    pub capacity_bytes: Option<u64>,
    /// Bytes of a page: what [`pin`](Mapping::pin) pins, in one piece of memory, and what is written as a whole. A power of
    /// two from 4096 to 65,536: a database's own page size.
    pub page_bytes: u32,
    /// The most bytes that this handle, and its clones, read ahead of a sequential reader at once: a multiple of
    /// `page_bytes`, at most 4 MiB; 0 switches readahead off. A window never takes more than an eighth of a shard's frames.
    pub readahead_bytes_max: u32,
    /// Who waits while a command that failed in passing is tried again.
    pub retry: RetryPolicy,
    /// Whether writers wait for pages that the device is reading.
    pub stability: Stability,
    /// Dirty pages of the mapping wait for this gate, of the same engine, before they are written.
    pub gate: Option<Gate>,
    /// The mapping holds the log of this gate: frames are kept in reserve for it. The gate may be another
    /// engine's, unless the mapping is gated itself.
    pub log_of: Option<Gate>,
    /// Which share of the cache its pages are counted in, and compete in; `None` for all of it. One of the same engine's;
    /// every handle of a mapping has the same.
    pub share: Option<CacheShare>,
    /// Its writes go to this range, too. A mirrored mapping leaves a block behind its range for its label, on either
    /// device; `len_bytes: None` does so by itself.
    pub mirror: Option<MirrorOptions>,
}

/// Whether callers wait while the engine tries a command again that failed in passing (WB-22).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RetryPolicy {
    /// They wait: of a failure that a retry mends nobody hears.
    #[default]
    Hard,
    /// They get [`Error::TryAgain`] at once. A read isn't tried again by itself; a write is, and stays dirty or under
    /// writeback meanwhile, so that a later sync covers it.
    Soft,
}

impl MappingOptions {
    /// The smallest folio of the mapping, if its page size is one.
    pub(crate) fn order(&self) -> Option<FolioOrder> {
        let fits = self.page_bytes.is_power_of_two() && (4096..=65_536).contains(&self.page_bytes);
        fits.then(|| FolioOrder((self.page_bytes / 4096).trailing_zeros() as u8))
    }
}

impl Default for MappingOptions {
    fn default() -> Self {
        Self {
            namespace: 1,
            start_bytes: 0,
            len_bytes: None,
            capacity_bytes: None,
            page_bytes: PAGE_BYTES as u32,
            readahead_bytes_max: 512 << 10,
            retry: RetryPolicy::default(),
            stability: Stability::default(),
            gate: None,
            log_of: None,
            share: None,
            mirror: None,
        }
    }
}

/// How something is written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Writing {
    /// What the pages are stamped with.
    lsn: Lsn,
    pacing: Pacing,
    /// Behind this byte nothing is anybody's, and nothing will be meanwhile: a write up to here needn't read the rest of
    /// the last page.
    last: u64,
    /// Whether the device is waited for that reads a page.
    stability: Stability,
}

impl Writing {
    /// How one page is asked for.
    fn want(self) -> Want {
        if self.stability == Stability::Unstable { Want::ChangeBesideDevice } else { Want::Change }
    }
}

/// A handle of an open mapping: a range of a namespace, read and written through the page cache.
///
/// Handles are cheap; every clone is a handle of its own and is told of each writeback error once (WB-23). All
/// methods may be called from any thread at once. Reads and writes of one page are atomic to each other; a call
/// over several pages is not one unit.
///
/// What is written is in the cache, and on the device some time later; [`sync`](Self::sync) waits until it is
/// durable. Each blocking method has an `_async` twin that works on any executor.
pub struct Mapping {
    near: Near,
    engine: Arc<EngineInner>,
    open: Arc<OpenMapping>,
    told: ErrorCursor,
    readahead: HandleReadahead,
    advice: HandleAdvice,
    /// Passes with a budget that this handle began: each asks another shard first.
    passes: AtomicU32,
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape = &self.open.shape;
        f.debug_struct("Mapping")
            .field("namespace", &shape.namespace.id())
            .field("first_lba", &shape.first_lba)
            .field("len_bytes", &self.len())
            .field("capacity_bytes", &shape.capacity_bytes)
            .field("page_bytes", &self.page_bytes())
            .finish_non_exhaustive()
    }
}

impl Clone for Mapping {
    fn clone(&self) -> Self {
        if self.engine.is_here() {
            self.engine.table.add_handle(&self.open);
        }
        let mut clone = Self::new(self.engine.clone(), self.open.clone(), self.readahead.clone());
        clone.advice = self.advice.clone();
        clone
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // In a child process the table may stay locked for ever.
        if self.engine.is_here() {
            self.engine.table.drop_handle(&self.open);
        }
    }
}

impl Mapping {
    pub(crate) fn new(engine: Arc<EngineInner>, open: Arc<OpenMapping>, readahead: HandleReadahead) -> Self {
        let told = open.errors.sample();
        let advice = HandleAdvice::default();
        let near = Near::new(&engine, &open);
        Self { near, engine, open, told, readahead, advice, passes: AtomicU32::new(0) }
    }

    /// Length in bytes, now: others may [change](Self::set_len) it.
    #[must_use]
    #[inline]
    pub fn len(&self) -> u64 {
        self.open.end.len()
    }

    /// Whether its length is 0.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of a page, as the mapping was [opened](MappingOptions::page_bytes).
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.near.page_bytes
    }

    /// Number of pages; the last may be shorter than the others.
    #[must_use]
    #[inline]
    pub fn pages(&self) -> u64 {
        let page_bits = PAGE_BYTES.trailing_zeros() + u32::from(self.open.shape.order.0);
        (self.len() + (1 << page_bits) - 1) >> page_bits
    }

    /// Whether a page is written whole or not at all when power fails: it fits into the device's atomic unit (NAWUPF or
    /// AWUPF), is aligned to it, and goes out as one command. Where it isn't, a page may be torn between blocks of
    /// the atomic unit, and the database has to notice by checksums or write it twice.
    #[must_use]
    pub fn is_page_atomic(&self) -> bool {
        self.open.shape.is_block_atomic()
    }

    /// Reads `buf.len()` bytes from byte `offset` on. Bytes that were never written read as the device has them.
    ///
    /// # Errors
    /// [`Error::OutOfRange`]; [`Error::Device`] when the device can't read a page (`buf` is then in part
    /// changed); [`Error::CacheFull`] and [`Error::PinnedTooLong`] when others hold what is needed.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check_range(offset, buf.len())?;
        let done = self.read_hits(offset, buf);
        if done == buf.len() { Ok(()) } else { block_on(self.read_rest(offset, buf, done)) }
    }

    /// As [`read_at`](Self::read_at), without blocking the thread.
    ///
    /// # Errors
    /// As `read_at`.
    pub async fn read_at_async(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check_range(offset, buf.len())?;
        let done = self.read_hits(offset, buf);
        self.read_rest(offset, buf, done).await
    }

    /// Writes `data` from byte `offset` on, into the cache.
    ///
    /// # Errors
    /// [`Error::OutOfRange`]; [`Error::Device`] when a page that is overwritten in part can't be read;
    /// [`Error::NamespaceFailed`] after a failed flush; [`Error::CacheFull`] and [`Error::PinnedTooLong`] when
    /// others hold what is needed; [`Error::DirtyLimit`] when too much is dirty and the device doesn't write it. After
    /// an error a prefix of `data` may have been written.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.write_at_lsn(offset, data, Lsn::NONE)
    }

    /// As [`write_at`](Self::write_at), without blocking the thread. Dropping the future midway leaves a prefix
    /// of `data` written.
    ///
    /// # Errors
    /// As `write_at`.
    pub async fn write_at_async(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.write_at_lsn_async(offset, data, Lsn::NONE).await
    }

    /// Pins a page for reading in place. A hit takes no lock and sends no message.
    ///
    /// Readers come first: a writer that waits for a page waits until no reader has it, so readers whose pins
    /// overlap without end keep writers out, until their `pin_wait` ends.
    ///
    /// A thread that holds a page and asks for it exclusively, or holds it exclusively and asks for it again, by any blocking
    /// call, would wait for itself: it is refused ([`Error::HeldByThisThread`]), also where it has given its pin to another
    /// thread. Where several pins of one page are held shared, and the last of them isn't this thread's, and in a task,
    /// which may go on by another thread, that isn't known: the engine's `pin_wait` ends the wait with an error.
    ///
    /// In a child process, after a fork, pins that the parent held are not to be used; to ask for any is an error
    /// ([`Error::Forked`]), or ends the process where the system can't wipe memory on fork.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    #[inline(always)]
    pub fn pin(&self, page: u64) -> Result<PagePin<'_>> {
        if let Some(pin) = published::known_thread().and_then(|block| self.pin_in_use(block, page)) {
            return Ok(pin);
        }
        match self.pin_any(page) {
            Ok(parts) => Ok(parts.assemble()),
            Err(error) => Err(error),
        }
    }

    #[inline(never)]
    fn pin_any(&self, page: u64) -> Result<PinParts<'_>> {
        self.check_page(page)?;
        let pin = match self.try_pin(page) {
            Some(pin) => {
                pin.link.hits.read(1);
                self.before_end(page, pin)
            }
            None => block_on(self.pin_slow(page)),
        };
        pin.map(|pin| pin.noted().into_parts())
    }

    /// As [`pin`](Self::pin), without blocking the thread.
    ///
    /// # Errors
    /// As `pin`.
    pub async fn pin_async(&self, page: u64) -> Result<PagePin<'_>> {
        self.check_page(page)?;
        match self.try_pin(page) {
            Some(pin) => {
                pin.link.hits.read(1);
                self.before_end(page, pin)
            }
            None => self.pin_slow(page).await,
        }
    }

    /// Pins a page exclusively, for changing it in place; it is dirty when the pin is released after a change. Where too
    /// much is dirty, this waits as a write does.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    #[inline]
    pub fn pin_mut(&self, page: u64) -> Result<PagePinMut<'_>> {
        self.check_page(page)?;
        self.open.durability.check()?;
        match self.try_pin_mut(page) {
            Some(pin) => {
                pin.link.hits.write(1);
                self.mut_before_end(page, pin)
            }
            None => block_on(self.pin_mut_slow(page, Pacing::Wait)),
        }
        .map(PagePinMut::noted)
    }

    /// As [`pin_mut`](Self::pin_mut), without blocking the thread.
    ///
    /// # Errors
    /// As `pin_mut`.
    pub async fn pin_mut_async(&self, page: u64) -> Result<PagePinMut<'_>> {
        self.check_page(page)?;
        self.open.durability.check()?;
        match self.try_pin_mut(page) {
            Some(pin) => {
                pin.link.hits.write(1);
                self.mut_before_end(page, pin)
            }
            None => self.pin_mut_slow(page, Pacing::Wait).await,
        }
    }

    pub(crate) fn opened(&self) -> &Arc<OpenMapping> {
        &self.open
    }

    /// Throws away what a byte range holds: afterwards it reads as zeros, and the device may reuse the space.
    /// Durable after the next sync. Waits for writeback of what it removes (WB-26).
    ///
    /// # Errors
    /// [`Error::OutOfRange`]; [`Error::PinnedTooLong`] when somebody keeps a page of the range pinned;
    /// [`Error::Gated`] when the log of a dirty page of the range didn't become durable in time; those of
    /// [`write_at`](Self::write_at). After an error parts of the range may be zeroed.
    pub fn discard(&self, range: Range<u64>) -> Result<()> {
        block_on(self.discard_async(range))
    }

    /// As [`discard`](Self::discard), without blocking the thread.
    ///
    /// # Errors
    /// As `discard`.
    pub async fn discard_async(&self, range: Range<u64>) -> Result<()> {
        self.check_open()?;
        self.open.durability.check()?;
        self.pages_of(range.clone())?;
        self.zero(range, self.writing()).await
    }

    /// Makes zeros of a range that may lie behind the end.
    async fn zero(&self, range: Range<u64>, writing: Writing) -> Result<()> {
        // Whole pages go; the ends that are parts of pages are overwritten, and everything where the device has no
        // Write Zeroes.
        let block = self.open.shape.order.pages();
        let first_whole = range.start.div_ceil(PAGE * block) * block;
        let is_last = range.end == self.open.shape.capacity_bytes;
        let end_whole = if is_last { self.open.shape.pages() } else { range.end / (PAGE * block) * block };
        let mut overwrite = [range.start..range.end, 0..0];
        if first_whole < end_whole && self.can_zero() {
            let (slot, whole) = (self.open.shape.slot, first_whole..end_whole);
            let request = || Request::Discard { mapping: slot, pages: whole.clone() };
            match self.ask_shards(|_| true, request).await {
                Ok(_) => {
                    overwrite =
                        [range.start..first_whole * PAGE, (end_whole * PAGE).min(range.end)..range.end]
                }
                // The folios may be gone and the device not zeroed: what must read as zeros is written as such.
                Err(error @ Error::Device { .. }) => tracing::warn!(%error, "overwriting a range instead"),
                Err(error) => return Err(error),
            }
        }
        for part in overwrite {
            let mut at = part.start;
            while at < part.end {
                let count = (part.end - at).min(ZEROS.len() as u64);
                self.write(at, &ZEROS[..count as usize], writing).await?;
                at += count;
            }
        }
        Ok(())
    }

    /// Syncs, then drops the mapping's pages from the cache. Other handles of it get [`Error::Closed`] from then
    /// on. (Dropping handles instead leaves the pages cached; they are written in the background.)
    ///
    /// # Errors
    /// As [`sync`](Self::sync); the mapping stays open then, so that nothing dirty is thrown away. It stays closed where the
    /// last flush failed, since the namespace has failed then, and where a shard has.
    pub fn close(self) -> Result<()> {
        block_on(self.close_async())
    }

    /// As [`close`](Self::close), without blocking the thread. Dropped midway, the mapping may stay closed for its
    /// other handles.
    ///
    /// # Errors
    /// As `close`.
    pub async fn close_async(self) -> Result<()> {
        self.close_handle().await
    }

    pub(crate) async fn close_handle(&self) -> Result<()> {
        self.sync_async().await?;
        self.give_up_resync();
        let _turn = match self.open.mirror {
            Some(_) => Some(self.take_turn().await?),
            None => None,
        };
        let slot = self.open.shape.slot;
        // Of several that close it at once one does: another's failure mustn't open again what has been closed.
        if !self.open.end.close() {
            return Err(Error::Closed);
        }
        let closed = self.ask_shards(|_| true, || Request::Close { mapping: slot }).await;
        match closed {
            Ok(_) => {
                // What was dirtied after the sync was written by the close.
                self.commit_streams().await?;
                self.detach().await;
                self.open.dropped.store(true, Ordering::SeqCst);
                Ok(())
            }
            Err(error) => {
                if !self.open.reopen() {
                    return Err(self.open.why_closed());
                }
                // The shards that have dropped it take it up again. Where one can't any more, it stays closed.
                match self.ask_shards(|_| true, || Request::Open(self.open.clone())).await {
                    Ok(_) => Err(error),
                    Err(gone @ Error::ShardFailed { .. }) => {
                        self.open.fail(&gone);
                        Err(gone)
                    }
                    Err(other) => {
                        self.open.end.close();
                        Err(other)
                    }
                }
            }
        }
    }

    // ---- misses and waits -------------------------------------------------------------------------------

    async fn pin_slow(&self, page: u64) -> Result<PagePin<'_>> {
        let first = self.first(page);
        let (link, count) = (self.link(first), self.open.shape.order.pages());
        self.check_not_held(link, first, Want::Pin)?;
        let request = PageFuture(self.request_pages(link, first, count as u32, Want::Pin, Pacing::Wait));
        let granted = self.ask_and_read_ahead(request, first..first + count, first + count).await?;
        self.read_once(first..first + count);
        self.before_end(
            page,
            self.granted_shared_pin(link, first, granted.frame, self.open.shape.order.pages()),
        )
    }

    async fn pin_mut_slow(&self, page: u64, pacing: Pacing) -> Result<PagePinMut<'_>> {
        let pin = self.acquire_mut(self.first(page), Want::PinMut, pacing).await?;
        self.mut_before_end(page, pin)
    }

    /// A pin of a page that hasn't been cut off since the caller asked for it.
    #[inline]
    fn before_end<'a>(&self, page: u64, pin: PagePin<'a>) -> Result<PagePin<'a>> {
        if pin.len_bytes == 0 { Err(self.outside(page)) } else { Ok(pin) }
    }

    /// As [`before_end`](Self::before_end), and it shows no byte behind the end.
    #[inline]
    fn mut_before_end<'a>(&self, page: u64, mut pin: PagePinMut<'a>) -> Result<PagePinMut<'a>> {
        let rest = self.len().saturating_sub(self.first(page) * PAGE);
        if rest < pin.len_bytes as u64 {
            pin.len_bytes = rest as usize;
        }
        if rest == 0 { Err(self.outside(page)) } else { Ok(pin) }
    }

    /// The page that begins at `first`, held exclusively.
    async fn acquire_mut(&self, first: u64, want: Want, pacing: Pacing) -> Result<PagePinMut<'_>> {
        let (link, frame, reserved) = self.acquire(first, want, pacing).await?;
        Ok(self.granted_pin(link, first, frame, (self.open.shape.order.pages(), reserved)))
    }

    /// The page that begins at `first`, held as wanted, and how many pages are reserved with it.
    async fn acquire(&self, first: u64, want: Want, pacing: Pacing) -> Result<(&ShardLink, FrameId, u32)> {
        let link = self.link(first);
        let count = self.open.shape.order.pages() as u32;
        self.check_not_held(link, first, want)?;
        let granted = PageFuture(self.request_pages(link, first, count, want, pacing)).await?;
        Ok((link, granted.frame, granted.reserved))
    }

    fn request_pages<'a>(
        &self,
        link: &'a ShardLink,
        first: u64,
        count: u32,
        want: Want,
        pacing: Pacing,
    ) -> RequestFuture<'a> {
        link.request(Request::Pages { mapping: self.open.shape.slot, first, count, want, pacing })
    }

    /// How many pages of 4096 bytes from `first` on, up to `end`, one request may name: whole pages of the mapping.
    fn request_count(&self, first: u64, end: u64) -> u32 {
        let block = self.open.shape.order.pages();
        let stripe_end = self.open.shape.striping.run_end(first);
        let most = (GRANTS_MAX as u64).min(self.engine.request_pages_max).max(block) / block * block;
        (end.next_multiple_of(block).min(stripe_end) - first).min(most) as u32
    }

    async fn read_rest(&self, offset: u64, buf: &mut [u8], mut done: usize) -> Result<()> {
        let end = (offset + buf.len() as u64).div_ceil(PAGE);
        let block = self.open.shape.order.pages();
        while done < buf.len() {
            let (wanted, _) = split(offset + done as u64);
            let first = wanted / block * block;
            let link = self.link(first);
            let count = self.request_count(first, end);
            let request = self.request_pages(link, first, count, Want::Fill, Pacing::Wait);
            let grants = self.ask_and_read_ahead(request, first..first + u64::from(count), end).await?;
            // Everything that was granted is copied and released before anything else is waited for.
            let mut covered = (wanted - first) as usize;
            let mut any = false;
            let mut cut_off = false;
            for (position, frame, _) in grants.iter() {
                let page = first + position as u64;
                let pin = self.granted_shared_pin(link, page, frame, 1);
                // A block may begin before, and end behind, what is wanted of it.
                if page < wanted || page >= end {
                    continue;
                }
                let part = overlap(page, offset, buf.len(), pin.len()).filter(|_| !cut_off);
                let Some((from, to, within)) = part else {
                    cut_off = true;
                    continue;
                };
                buf[from..to].copy_from_slice(&pin[within..within + to - from]);
                if position == covered {
                    covered += 1;
                    done = to;
                    any = true;
                }
                // Where the mapping has been shortened meanwhile, what follows isn't there either.
                cut_off = ((page + 1) * PAGE).min(offset + buf.len() as u64) > offset + to as u64;
            }
            self.read_once(first..first + covered as u64);
            if !any {
                // It was there, or came meanwhile, but couldn't be had at once: wait for its holder.
                let (link, frame, _) = self.acquire(first, Want::Copy, Pacing::Wait).await?;
                let pin = self.granted_shared_pin(link, first, frame, block);
                let part = overlap(first, offset, buf.len(), pin.len()).filter(|&(_, to, _)| to > done);
                let Some((from, to, within)) = part else {
                    // The mapping has been shortened meanwhile.
                    return Err(self.outside(first / block));
                };
                let skip = done - from;
                buf[done..to].copy_from_slice(&pin[within + skip..within + to - from]);
                done = to;
            }
            done += self.read_hits(offset + done as u64, &mut buf[done..]);
        }
        Ok(())
    }

    async fn write_rest(&self, offset: u64, data: &[u8], mut done: usize, writing: Writing) -> Result<()> {
        let Writing { lsn, pacing, .. } = writing;
        let block = self.open.shape.order.pages();
        while done < data.len() {
            let at = offset + done as u64;
            let (page, _) = split(at);
            let first = page / block * block;
            let link = self.link(first);
            let mut covered = 0;
            if let (Access::Overwrite, whole) = self.access_for(at, data.len() - done, writing) {
                let count = self.request_count(first, first + whole);
                let grants = self.request_pages(link, first, count, Want::Create, pacing).await?;
                covered = self.fill_created(link, first, &grants, (offset, data), lsn);
                done = ((first + covered as u64) * PAGE - offset).min(data.len() as u64) as usize;
            }
            if covered == 0 {
                let mut pin = self.acquire_mut(first, writing.want(), pacing).await?;
                pin.set_lsn(lsn)?;
                let part = overlap(first, offset, data.len(), pin.len());
                let (from, to, within) = part.expect("what is written lies within the capacity");
                // The first page may be written from its middle, and an earlier part may be done already.
                let skip = done - from;
                pin.store(within + skip, &data[done..to]);
                drop(pin);
                done = to;
            }
            done += self.write_hits(offset + done as u64, &data[done..], writing)?;
        }
        Ok(())
    }

    /// Fills pages that were made for this write; returns how many of them follow `first` without a gap.
    fn fill_created(
        &self,
        link: &ShardLink,
        first: u64,
        grants: &Grants,
        (offset, data): (u64, &[u8]),
        lsn: Lsn,
    ) -> usize {
        let mut covered = 0;
        for (position, frame, pages) in grants.iter() {
            let page = first + position as u64;
            let mut pin = self.granted_pin(link, page, frame, (pages as u64, pages as u32));
            pin.set_lsn(lsn).expect("a page that was just made has no number yet");
            let from = (page * PAGE - offset) as usize;
            // Of the last page what lies behind the end may be anything.
            let count = pin.len().min(data.len() - from);
            pin[..count].copy_from_slice(&data[from..from + count]);
            if position == covered {
                covered += pages;
            }
        }
        covered
    }

    // ---- all shards -------------------------------------------------------------------------------------

    /// Sends a request to every shard concerned, to [`ASKED_AT_ONCE`] at a time, waits for all, and returns what they
    /// did, or the first error.
    async fn ask_shards(
        &self,
        concerned: impl Fn(&ShardLink) -> bool,
        request: impl Fn() -> Request,
    ) -> Result<WritebackOutcome> {
        let mut result = Ok(WritebackOutcome::default());
        for links in self.engine.links.chunks(ASKED_AT_ONCE) {
            let mut pending: [Option<RequestFuture<'_>>; ASKED_AT_ONCE] = [const { None }; ASKED_AT_ONCE];
            for (pending, link) in pending.iter_mut().zip(links) {
                *pending = concerned(link).then(|| link.request(request()));
            }
            std::future::poll_fn(|context| {
                let mut waiting = false;
                for slot in &mut pending {
                    let Some(future) = slot else { continue };
                    match std::pin::Pin::new(future).poll(context) {
                        Poll::Pending => waiting = true,
                        Poll::Ready(reply) => {
                            *slot = None;
                            match (&mut result, reply) {
                                (Ok(outcome), Ok(grants)) => outcome.add(grants.outcome),
                                (Ok(_), Err(error)) => result = Err(error),
                                (Err(_), _) => {}
                            }
                        }
                    }
                }
                if waiting { Poll::Pending } else { Poll::Ready(()) }
            })
            .await;
        }
        result
    }

    async fn commit(&self) -> Result<()> {
        self.commit_link().request(Request::Commit(self.open.clone())).await.map(drop)
    }

    /// All commits of a namespace meet in one shard, to share flushes.
    fn commit_link(&self) -> &ShardLink {
        let namespace = self.open.shape.namespace.id();
        &self.engine.links[namespace as usize % self.engine.links.len()]
    }

    // ---- checks -----------------------------------------------------------------------------------------

    #[inline]
    fn check_open(&self) -> Result<()> {
        if self.open.end.is_closed() { Err(self.open.why_closed()) } else { Ok(()) }
    }

    /// Whether this thread, about to wait for whoever holds a page, would wait for itself.
    fn check_not_held(&self, link: &ShardLink, first: u64, want: Want) -> Result<()> {
        if !is_blocking() {
            return Ok(());
        }
        let wanted = if want.hold() == Hold::Shared { Held::Shared } else { Held::Exclusive };
        let frame = link.cache.index.find(&link.cache.headers, self.open.shape.key(first));
        match frame.and_then(|frame| link.held_by_this_thread(frame)) {
            Some(held) if (held, wanted) != (Held::Shared, Held::Shared) => {
                Err(Error::HeldByThisThread { page: first >> self.open.shape.order.0, held, wanted })
            }
            _ => Ok(()),
        }
    }

    #[inline]
    fn check_range(&self, offset: u64, count: usize) -> Result<()> {
        self.check_open()?;
        match offset.checked_add(count as u64) {
            Some(end) if end <= self.len() => Ok(()),
            _ => Err(Error::OutOfRange { offset, count: count as u64, len_bytes: self.len() }),
        }
    }

    #[inline]
    fn check_write(&self, offset: u64, count: usize) -> Result<()> {
        self.check_range(offset, count)?;
        self.open.durability.check()
    }

    #[inline]
    fn check_page(&self, page: u64) -> Result<()> {
        self.check_open()?;
        if page < self.pages() { Ok(()) } else { Err(self.outside(page)) }
    }

    #[cold]
    fn outside(&self, page: u64) -> Error {
        let count = self.page_bytes() as u64;
        Error::OutOfRange { offset: page.saturating_mul(count), count, len_bytes: self.len() }
    }

    /// Whether every device of the mapping has Write Zeroes.
    fn can_zero(&self) -> bool {
        self.engine.identity.write_zeroes
            && self.open.mirror.as_ref().is_none_or(|mirror| mirror.write_zeroes)
    }

    fn pages_of(&self, range: Range<u64>) -> Result<Range<u64>> {
        if range.start > range.end {
            return Err(Error::InvertedRange { start: range.start, end: range.end });
        }
        if range.end > self.len() {
            let count = range.end - range.start;
            return Err(Error::OutOfRange { offset: range.start, count, len_bytes: self.len() });
        }
        let block = self.open.shape.order.pages();
        let first = range.start / PAGE / block * block;
        // No bytes are no pages, also amid one.
        let end = if range.is_empty() { first } else { range.end.div_ceil(PAGE).next_multiple_of(block) };
        Ok(first..end)
    }
}

/// Page and byte within the page.
#[inline]
fn split(offset: u64) -> (u64, usize) {
    (offset / PAGE, (offset % PAGE) as usize)
}

/// Where `page` (of `page_bytes` bytes) and a buffer of `len` bytes at `offset` overlap, if they do: the buffer's range, and
/// where that begins within the page.
fn overlap(page: u64, offset: u64, len: usize, page_bytes: usize) -> Option<(usize, usize, usize)> {
    let start = (page * PAGE).max(offset);
    let end = (page * PAGE + page_bytes as u64).min(offset + len as u64);
    (start < end)
        .then(|| ((start - offset) as usize, (end - offset) as usize, (start - page * PAGE) as usize))
}
