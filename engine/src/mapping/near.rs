//! What the shortest way to a page needs of its mapping and its shard, side by side in the handle: every load in front of a
//! page's own bytes is one more that the processor has to remember while it waits for them.

use std::sync::Arc;

use crate::cache::SharedCache;
use crate::cache::folio::{FolioKey, FolioOrder, Identity};
use crate::cache::frames::PAGE_BYTES;
use crate::engine::EngineInner;
use crate::shard::link::ShardLink;
use crate::shard::open::OpenMapping;

/// Copies of what never changes.
pub(super) struct Near {
    /// The first shard, which is mostly the only one.
    link: Arc<ShardLink>,
    cache: Arc<SharedCache>,
    /// The key of the mapping's first page.
    key: FolioKey,
    order: FolioOrder,
    is_only_shard: bool,
    /// Bytes of a page.
    pub page_bytes: usize,
    /// The last of a page's pages of 4096 bytes.
    pub last: u64,
}

/// A page on the shortest way.
pub(super) struct NearPage<'a> {
    pub link: &'a ShardLink,
    pub cache: &'a SharedCache,
    pub key: FolioKey,
    /// What the header of its frame says if it is a folio by itself.
    pub alone: Identity,
}

impl Near {
    pub(super) fn new(engine: &EngineInner, open: &OpenMapping) -> Self {
        let link = engine.links[0].clone();
        let (cache, order) = (link.cache.clone(), open.shape.order);
        let (key, is_only_shard) = (open.shape.key(0), engine.links.len() == 1);
        let (page_bytes, last) = (PAGE_BYTES << order.0, order.pages() - 1);
        Self { link, cache, key, order, is_only_shard, page_bytes, last }
    }

    /// Where `page` is, if the mapping has it. Far behind the mapping's end the key may be another page's: the caller looks
    /// at the end once it has the page.
    #[inline(always)]
    pub(super) fn page<'a>(&'a self, engine: &'a EngineInner, open: &OpenMapping, page: u64) -> NearPage<'a> {
        let first = page << self.order.0;
        let (link, cache) = if self.is_only_shard {
            (&*self.link, &*self.cache)
        } else {
            let link = &*engine.links[open.shape.striping.shard_of(first)];
            (link, &*link.cache)
        };
        let key = self.key.wrapping_offset(first);
        NearPage { link, cache, key, alone: Identity::new(key, self.order) }
    }
}
