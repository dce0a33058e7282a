//! A thread's own shards: for engines that run a thread a core and let each serve what lies there.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::time::Instant;

use crate::cache::published::{self, ThreadBlock};
use crate::error::Result;
use crate::mapping::Mapping;
use crate::mapping::optimistic::PageView;
use crate::pin::{PagePin, PagePinMut, PinParts};
use crate::reply::poll_until_ready;
use crate::shard::Shard;

/// Polls between two looks at the clock.
const POLLS_A_LOOK: u32 = 8;

/// Shards that the thread which owns this polls itself, in its own loop and whenever it waits. It stays on its thread, and so
/// do the [handles](LocalMapping) that it gives; any other thread uses a [`Mapping`] of the same range as ever.
///
/// ```
/// # use foliant::{Engine, EngineOptions, LocalShards, MappingOptions, ShardThreads};
/// # fn main() -> foliant::Result<()> {
/// let options = EngineOptions { threads: ShardThreads::Manual, ..EngineOptions::default() };
/// let engine = Engine::open("emu:ram?size=16M", &options)?;
/// let shards = LocalShards::new(engine.take_shards());
/// let mapping = shards.block_on(engine.mapping_async(&MappingOptions::default()))?;
/// let local = shards.mapping(&mapping);
/// local.write_at(0, b"served by this very thread")?;
/// assert_eq!(&local.pin(0)?[..6], b"served");
/// local.sync()?;
/// shards.poll(); // now and then, from the thread's own loop: writeback goes on
/// engine.return_shards(shards.into_shards());
/// engine.close()
/// # }
/// ```
pub struct LocalShards {
    shards: RefCell<Vec<Shard>>,
    origin: Instant,
    /// The block is its thread's, so this is, too.
    on_thread: PhantomData<*const ()>,
}

impl fmt::Debug for LocalShards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalShards").finish_non_exhaustive()
    }
}

impl LocalShards {
    /// Takes over shards that [`Engine::take_shards`](crate::Engine::take_shards) handed out; a thread a core takes one each.
    #[must_use]
    pub fn new(shards: Vec<Shard>) -> Self {
        Self { shards: RefCell::new(shards), origin: Instant::now(), on_thread: PhantomData }
    }

    /// A step of each shard. True when one of them did something, or has commands with the device: worth calling again soon.
    pub fn poll(&self) -> bool {
        let now_ns = self.origin.elapsed().as_nanos() as u64;
        self.poll_at(now_ns)
    }

    fn poll_at(&self, now_ns: u64) -> bool {
        let mut busy = false;
        for shard in &mut *self.shards.borrow_mut() {
            let step = shard.poll(now_ns);
            busy |= step.progressed || step.waiting;
        }
        busy
    }

    /// Runs a future to its end and polls the shards while it waits. Spins; what it needs of shards elsewhere comes from who polls
    /// those.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let (mut polls, mut now_ns) = (0u32, 0);
        poll_until_ready(future, || {
            if polls.is_multiple_of(POLLS_A_LOOK) {
                now_ns = self.origin.elapsed().as_nanos() as u64;
            }
            polls = polls.wrapping_add(1);
            self.poll_at(now_ns);
        })
    }

    /// A handle of `mapping` for this thread.
    pub fn mapping<'s>(&'s self, mapping: &'s Mapping) -> LocalMapping<'s> {
        LocalMapping { mapping, shards: self, block: published::this_thread_for_good() }
    }

    /// Gives the shards back, for [`Engine::return_shards`](crate::Engine::return_shards).
    #[must_use]
    pub fn into_shards(self) -> Vec<Shard> {
        self.shards.into_inner()
    }
}

/// A mapping's handle on the thread that polls its shards: the cheapest hits, and misses without a message to another thread
/// where the page lies in one of them. What it has no method for goes by
/// [`block_on`](LocalShards::block_on) and the mapping's `_async` methods; its blocking ones would wait for this very thread.
#[derive(Clone, Copy)]
pub struct LocalMapping<'s> {
    mapping: &'s Mapping,
    shards: &'s LocalShards,
    block: Option<&'static ThreadBlock>,
}

impl fmt::Debug for LocalMapping<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalMapping").field("mapping", self.mapping).finish_non_exhaustive()
    }
}

impl<'s> LocalMapping<'s> {
    /// As [`Mapping::pin`].
    ///
    /// # Errors
    /// As there.
    #[inline(always)]
    pub fn pin(&self, page: u64) -> Result<PagePin<'s>> {
        if let Some(pin) = self.block.and_then(|block| self.mapping.pin_in_use(block, page)) {
            return Ok(pin);
        }
        match self.pin_any(page) {
            Ok(parts) => Ok(parts.assemble()),
            Err(error) => Err(error),
        }
    }

    #[inline(never)]
    fn pin_any(&self, page: u64) -> Result<PinParts<'s>> {
        Ok(self.shards.block_on(self.mapping.pin_async(page))?.into_parts())
    }

    /// As [`Mapping::prefetch_line`].
    #[inline]
    pub fn prefetch_line(&self, page: u64, within: usize) -> bool {
        self.mapping.prefetch_line(page, within)
    }

    /// As [`Mapping::pin_mut`].
    ///
    /// # Errors
    /// As there.
    pub fn pin_mut(&self, page: u64) -> Result<PagePinMut<'s>> {
        self.shards.block_on(self.mapping.pin_mut_async(page))
    }

    /// As [`Mapping::read_with`].
    ///
    /// # Errors
    /// As there.
    #[inline(always)]
    pub fn read_with<R>(&self, page: u64, mut read: impl FnMut(PageView<'_>) -> R) -> Result<R> {
        match self.mapping.look(page, &mut read) {
            Some(seen) => Ok(seen),
            None => self.look_longer(page, &mut read),
        }
    }

    #[inline(never)]
    fn look_longer<R>(&self, page: u64, read: &mut impl FnMut(PageView<'_>) -> R) -> Result<R> {
        // A part of a larger folio, or one that wasn't in use, is read where it is: a pin would split the folio.
        if let Some(seen) = self.mapping.look_anywhere(page, read) {
            return Ok(seen);
        }
        let pin = self.pin_any(page)?.assemble();
        Ok(read(PageView::of(&pin)))
    }

    /// As [`Mapping::read_at`].
    ///
    /// # Errors
    /// As there.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.shards.block_on(self.mapping.read_at_async(offset, buf))
    }

    /// As [`Mapping::write_at`].
    ///
    /// # Errors
    /// As there.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.shards.block_on(self.mapping.write_at_async(offset, data))
    }

    /// As [`Mapping::sync`].
    ///
    /// # Errors
    /// As there.
    pub fn sync(&self) -> Result<()> {
        self.shards.block_on(self.mapping.sync_async())
    }

    /// The mapping.
    #[must_use]
    pub fn mapping(&self) -> &'s Mapping {
        self.mapping
    }
}
