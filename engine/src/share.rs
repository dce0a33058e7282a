//! Cache shares: named parts of the cache with limits that can be changed while the engine runs.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Poll;

use crate::cache::frames::PAGE_BYTES;
use crate::cache::shares::{SHARES_MAX, ShareId, UNLIMITED};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::options::FRAMES_MIN;
use crate::reply::block_on;
use crate::shard::link::ShardLink;
use crate::shard::request::Request;

const PAGE: u64 = PAGE_BYTES as u64;

/// How a share is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShareOptions {
    /// The most bytes of cache that its mappings occupy together; `None` for as many as there are. At least 128 KiB a
    /// shard, at most the cache as it was opened.
    pub limit_bytes: Option<u64>,
    /// While its mappings occupy no more bytes than this, requests of other shares don't evict their pages. At most its
    /// limit; those of all shares together at most three quarters of the cache.
    pub guaranteed_bytes: u64,
}

/// What a share of the cache, or the cache as a whole, holds and may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShareUsage {
    /// Bytes that its pages occupy now, those that are being read in included.
    pub used_bytes: u64,
    /// Bytes that they may occupy.
    pub limit_bytes: u64,
    /// Bytes that other shares leave to it.
    pub guaranteed_bytes: u64,
    /// Bytes that have yet to go: what shards hold beyond their parts of the limit.
    pub above_bytes: u64,
}

/// A named part of the cache that mappings belong to ([`MappingOptions::share`](crate::MappingOptions::share)), with a
/// limit that can be [changed](Self::resize) at any time. A mapping that names none may use the whole cache.
///
/// A share at its limit makes room by evicting its own pages, those first that weren't used lately; others' aren't touched
/// for it. The limit counts frames, so pages of which a part is used count whole. It is divided evenly among the shards, as
/// the cache is: a mapping shorter than a stripe (2 MiB) lies in one shard and can use that shard's part only. Dirty pages
/// count and are written before they are evicted, so a share that is small beside its writers waits for the device. Pages of
/// a mapping that holds a log ([`MappingOptions::log_of`](crate::MappingOptions::log_of)) count, but may exceed the limit.
///
/// Hits pay nothing for any of this. A share lasts as long as a handle of it, or an open mapping that belongs to it; clones
/// are handles of the same share.
#[derive(Clone)]
pub struct CacheShare {
    inner: Arc<ShareInner>,
}

#[derive(Debug)]
struct ShareInner {
    id: ShareId,
    name: Arc<str>,
    table: Arc<ShareTable>,
}

impl fmt::Debug for CacheShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CacheShare").field("name", &self.inner.name).field("usage", &self.usage()).finish()
    }
}

/// All shares of an engine.
#[derive(Debug)]
pub(crate) struct ShareTable {
    links: Box<[Arc<ShardLink>]>,
    /// Frames of the whole cache.
    frames: u64,
    /// The fewest frames of a shard that the cache can be lowered to.
    frames_min: u64,
    limits: Mutex<Limits>,
}

/// What was asked for, in bytes; shards know their parts of it, in pages.
#[derive(Debug)]
struct Limits {
    cache_bytes: u64,
    /// By share number, the unnamed one left out.
    shares: [Option<Entry>; SHARES_MAX - 1],
}

#[derive(Debug)]
struct Entry {
    share: Weak<ShareInner>,
    options: ShareOptions,
}

fn wrong(option: &'static str, bytes: u64, reason: String) -> Error {
    Error::Option { option, value: bytes.to_string(), reason }
}

impl Limits {
    fn live(&self) -> impl Iterator<Item = &Entry> {
        self.shares.iter().flatten().filter(|entry| entry.share.strong_count() > 0)
    }

    fn guaranteed(&self, except: Option<ShareId>) -> u64 {
        let others = (1..).zip(&self.shares).filter(|&(id, _)| Some(ShareId(id)) != except);
        let live = others.filter_map(|(_, entry)| entry.as_ref()).filter(|e| e.share.strong_count() > 0);
        live.map(|entry| entry.options.guaranteed_bytes).sum()
    }
}

impl ShareTable {
    pub(crate) fn new(links: &[Arc<ShardLink>], frames: u64, frames_min: u64) -> Self {
        let limits = Limits { cache_bytes: frames * PAGE, shares: [const { None }; SHARES_MAX - 1] };
        Self { links: links.into(), frames, frames_min, limits: Mutex::new(limits) }
    }

    fn lock(&self) -> MutexGuard<'_, Limits> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells each shard its part of a limit.
    fn set_limit(&self, share: Option<ShareId>, bytes: Option<u64>) {
        for (shard, link) in self.links.iter().enumerate() {
            link.cache.shares.set_limit(share, bytes.map_or(UNLIMITED, |bytes| self.part(bytes, shard)));
            link.kick();
        }
    }

    fn set_guaranteed(&self, share: ShareId, bytes: u64) {
        for (shard, link) in self.links.iter().enumerate() {
            link.cache.shares.set_guaranteed(share, self.part(bytes, shard));
        }
    }

    /// A shard's part of so many bytes, in pages: the parts add up to all whole pages.
    fn part(&self, bytes: u64, shard: usize) -> u64 {
        let (pages, shards) = (bytes / PAGE, self.links.len() as u64);
        pages / shards + u64::from((shard as u64) < pages % shards)
    }

    fn check(&self, limits: &Limits, id: Option<ShareId>, options: &ShareOptions) -> Result<()> {
        let shards = self.links.len() as u64;
        let (least, most) = (FRAMES_MIN * PAGE * shards, self.frames * PAGE);
        if let Some(bytes) = options.limit_bytes
            && (bytes < least || bytes > most)
        {
            let reason = format!(
                "must lie between {least} bytes, {FRAMES_MIN} pages for each of {shards} shards, and {most}, the cache as it \
                 was opened"
            );
            return Err(wrong("limit_bytes", bytes, reason));
        }
        let limit = options.limit_bytes.unwrap_or(most);
        if options.guaranteed_bytes > limit {
            let reason = format!("must be at most the share's limit, {limit} bytes");
            return Err(wrong("guaranteed_bytes", options.guaranteed_bytes, reason));
        }
        let (others, most) = (limits.guaranteed(id), limits.cache_bytes / 4 * 3);
        if options.guaranteed_bytes.saturating_add(others) > most && options.guaranteed_bytes > 0 {
            let reason = format!(
                "exceeds, with the {others} bytes that are guaranteed to other shares, {most} bytes, three quarters of the \
                 cache; guarantee less, or raise the cache by resize_cache"
            );
            return Err(wrong("guaranteed_bytes", options.guaranteed_bytes, reason));
        }
        Ok(())
    }

    fn open(self: &Arc<Self>, name: &str, options: &ShareOptions) -> Result<CacheShare> {
        self.links[0].birthplace.check()?;
        let mut limits = self.lock();
        for entry in limits.live() {
            // Its last handle may go just now.
            let Some(inner) = entry.share.upgrade().filter(|inner| &*inner.name == name) else { continue };
            if entry.options != *options {
                return Err(Error::Option {
                    option: "share",
                    value: format!("{name:?}, {options:?}"),
                    reason: format!(
                        "it is open with {:?}; ask for those, and change them by resize",
                        entry.options
                    ),
                });
            }
            return Ok(CacheShare { inner });
        }
        self.check(&limits, None, options)?;
        let is_free = |entry: &Option<Entry>| entry.as_ref().is_none_or(|old| old.share.strong_count() == 0);
        let Some(at) = limits.shares.iter().position(is_free) else {
            let reason = format!("{} shares exist, which is the most; drop one first", SHARES_MAX - 1);
            return Err(Error::Option { option: "share", value: format!("{name:?}"), reason });
        };
        let id = ShareId(at as u8 + 1);
        let inner = Arc::new(ShareInner { id, name: name.into(), table: self.clone() });
        limits.shares[at] = Some(Entry { share: Arc::downgrade(&inner), options: *options });
        self.set_limit(Some(id), options.limit_bytes);
        self.set_guaranteed(id, options.guaranteed_bytes);
        Ok(CacheShare { inner })
    }

    fn resize(&self, id: ShareId, change: impl FnOnce(&mut ShareOptions)) -> Result<()> {
        self.links[0].birthplace.check()?;
        let mut limits = self.lock();
        let at = usize::from(id.0) - 1;
        let mut options = limits.shares[at].as_ref().map(|entry| entry.options).unwrap_or_default();
        change(&mut options);
        self.check(&limits, Some(id), &options)?;
        if let Some(entry) = &mut limits.shares[at] {
            entry.options = options;
        }
        self.set_limit(Some(id), options.limit_bytes);
        self.set_guaranteed(id, options.guaranteed_bytes);
        Ok(())
    }

    fn resize_cache(&self, bytes: u64) -> Result<()> {
        self.links[0].birthplace.check()?;
        let mut limits = self.lock();
        let shards = self.links.len() as u64;
        let (least, most) = (self.frames_min * PAGE * shards, self.frames * PAGE);
        if bytes < least || bytes > most {
            let reason = format!(
                "must lie between {least}, {} pages for each of {shards} shards, and {most}, the cache_bytes that the engine \
                 was opened with; open it with more to be able to raise the cache further",
                self.frames_min
            );
            return Err(wrong("resize_cache", bytes, reason));
        }
        let guaranteed = limits.guaranteed(None);
        if guaranteed > bytes / 4 * 3 {
            let reason = format!(
                "three quarters of that are less than the {guaranteed} bytes that are guaranteed to shares; lower those first"
            );
            return Err(wrong("resize_cache", bytes, reason));
        }
        limits.cache_bytes = bytes;
        self.set_limit(None, Some(bytes));
        Ok(())
    }

    fn usage(&self, share: Option<ShareId>) -> ShareUsage {
        let limits = self.lock();
        let options = share.and_then(|id| limits.shares[usize::from(id.0) - 1].as_ref()).map(|e| e.options);
        let accounts = || self.links.iter().map(|link| link.cache.shares.account(share));
        let limit_bytes = match share {
            None => limits.cache_bytes,
            Some(_) => options.and_then(|options| options.limit_bytes).unwrap_or(self.frames * PAGE),
        };
        ShareUsage {
            used_bytes: accounts().map(|account| account.used()).sum::<u64>() * PAGE,
            limit_bytes,
            guaranteed_bytes: options.map_or(0, |options| options.guaranteed_bytes),
            above_bytes: accounts().map(|account| account.excess(0)).sum::<u64>() * PAGE,
        }
    }

    /// Waits until every shard holds no more than its part.
    async fn await_limit(&self, share: Option<ShareId>, of: &Arc<str>) -> Result<()> {
        let request = || Request::AwaitLimit { share, of: of.clone() };
        let mut pending: Vec<_> = self.links.iter().map(|link| Box::pin(link.request(request()))).collect();
        let mut result = Ok(());
        std::future::poll_fn(|context| {
            pending.retain_mut(|request| match request.as_mut().poll(context) {
                Poll::Pending => true,
                Poll::Ready(reply) => {
                    result = std::mem::replace(&mut result, Ok(())).and(reply.map(drop));
                    false
                }
            });
            if pending.is_empty() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        result
    }
}

impl CacheShare {
    pub(crate) fn id(&self) -> ShareId {
        self.inner.id
    }

    /// Whether it is a share of the engine with these shards.
    pub(crate) fn is_of(&self, table: &Arc<ShareTable>) -> bool {
        Arc::ptr_eq(&self.inner.table, table)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// What it holds and may hold.
    #[must_use]
    pub fn usage(&self) -> ShareUsage {
        self.inner.table.usage(Some(self.inner.id))
    }

    /// Changes its limit, at once, and waits for nobody. What is above a lower limit is evicted in the background, a bounded
    /// number of pages at a time: clean pages as soon as the shards get to it, dirty ones when they have been written, for which the
    /// flusher is asked, and pinned ones when they are released. The answer says how much that is
    /// ([`above_bytes`](ShareUsage::above_bytes)); [`await_limit`](Self::await_limit) waits for its end. Meanwhile requests
    /// for further pages of the share wait for room as they do at any limit.
    ///
    /// # Errors
    /// [`Error::Option`] when the limit can't be had, or is below what is guaranteed to the share.
    pub fn resize(&self, limit_bytes: u64) -> Result<ShareUsage> {
        self.inner.table.resize(self.inner.id, |options| options.limit_bytes = Some(limit_bytes))?;
        Ok(self.usage())
    }

    /// Changes what others leave to it, at once.
    ///
    /// # Errors
    /// [`Error::Option`] when that is more than its limit, or than is left of the cache.
    pub fn guarantee(&self, guaranteed_bytes: u64) -> Result<ShareUsage> {
        self.inner.table.resize(self.inner.id, |options| options.guaranteed_bytes = guaranteed_bytes)?;
        Ok(self.usage())
    }

    /// Waits until the share holds no more than its limit.
    ///
    /// # Errors
    /// [`Error::AboveLimit`] when pages stay pinned, or can't be written, for the engine's `pin_wait`; the limit stays, and
    /// they go when they can. [`Error::ShardFailed`]; [`Error::Closed`].
    pub fn await_limit(&self) -> Result<()> {
        block_on(self.await_limit_async())
    }

    /// As [`await_limit`](Self::await_limit), without blocking the thread.
    ///
    /// # Errors
    /// As `await_limit`.
    pub async fn await_limit_async(&self) -> Result<()> {
        self.inner.table.await_limit(Some(self.inner.id), &self.inner.name).await
    }
}

impl Engine {
    /// The share of that name; a new one if nobody has a handle of it and no open mapping belongs to it.
    ///
    /// # Errors
    /// [`Error::Option`] when it exists with other options, the options can't be, or 63 shares exist.
    pub fn share(&self, name: &str, options: &ShareOptions) -> Result<CacheShare> {
        self.inner().shares.open(name, options)
    }

    /// Changes how much of the cache is used, at once, and waits for nobody: up to the
    /// [`cache_bytes`](crate::EngineOptions::cache_bytes) that the engine was opened with. As with
    /// [`CacheShare::resize`], what is above a lower limit goes in the background.
    ///
    /// No memory goes back to the system: the frames are one piece of memory that the device is mapped to as long as the engine
    /// is open. A smaller cache writes and holds less, and leaves the processor's caches and the device alone; who needs the memory
    /// itself opens a smaller engine. The dirty limits stay those of the engine as it was opened: where they are
    /// above the new limit, requests for frames have the flusher write.
    ///
    /// # Errors
    /// [`Error::Option`] when that is more than was reserved, or too little to work with (128 KiB a shard, and twice what
    /// is kept for logs), or too little for what is guaranteed to shares.
    pub fn resize_cache(&self, bytes: u64) -> Result<ShareUsage> {
        self.inner().shares.resize_cache(bytes)?;
        Ok(self.cache_usage())
    }

    /// What the cache holds and may hold.
    #[must_use]
    pub fn cache_usage(&self) -> ShareUsage {
        self.inner().shares.usage(None)
    }

    /// Waits until the cache holds no more than its limit.
    ///
    /// # Errors
    /// As [`CacheShare::await_limit`].
    pub fn await_cache_limit(&self) -> Result<()> {
        block_on(self.await_cache_limit_async())
    }

    /// As [`await_cache_limit`](Self::await_cache_limit), without blocking the thread.
    ///
    /// # Errors
    /// As `await_cache_limit`.
    pub async fn await_cache_limit_async(&self) -> Result<()> {
        let table = self.inner().shares.clone();
        table.await_limit(None, &"the cache".into()).await
    }
}
