//! What the shortest way to a page needs of its mapping and its shard, side by side in the handle: every load in front of a
//! page's own bytes is one more that the processor has to remember while it waits for them.

use std::sync::Arc;

use crate::cache::folio::{AtHand, FolioKey, FolioOrder, Identity};
use crate::cache::frames::PAGE_BYTES;
use crate::cache::shape::Stability;
use crate::engine::EngineInner;
use crate::shard::link::ShardLink;
use crate::shard::open::OpenMapping;

/// Copies of what never changes.
pub(super) struct Near {
    /// The first shard, which is mostly the only one.
    link: Arc<ShardLink>,
    is_only_shard: bool,
    order: FolioOrder,
    /// The key of the mapping's first page, and its identity as a folio by itself.
    key: FolioKey,
    alone: Identity,
    /// What a page mostly is.
    pub at_hand: AtHand,
    /// Bytes of a page.
    pub page_bytes: usize,
    /// Pages are frames, and who writes waits for no log, but for the device: the shortest way to write is open.
    pub is_plain: bool,
}

/// A page on the shortest way.
pub(super) struct NearPage<'a> {
    pub link: &'a ShardLink,
    pub key: FolioKey,
    /// What the header of its frame says if it is a folio by itself.
    pub alone: Identity,
}

impl Near {
    pub(super) fn new(engine: &EngineInner, open: &OpenMapping) -> Self {
        let link = engine.links[0].clone();
        let (order, key, is_only_shard) = (open.shape.order, open.shape.key(0), engine.links.len() == 1);
        let (alone, at_hand, page_bytes) =
            (Identity::new(key, order), AtHand::new(order), PAGE_BYTES << order.0);
        let is_plain = order.0 == 0 && open.gates.gate.is_none() && open.shape.stability == Stability::Stable;
        Self { link, is_only_shard, order, key, alone, at_hand, page_bytes, is_plain }
    }

    /// Where `page` is, if the mapping has it: the caller looks at the mapping's end once it has the page.
    #[inline(always)]
    pub(super) fn page<'a>(&'a self, engine: &'a EngineInner, open: &OpenMapping, page: u64) -> NearPage<'a> {
        // Far behind the end it may be another page of this mapping's, never another mapping's.
        let first = (page << self.order.0) & (FolioKey::PAGES_MAX - 1);
        let link =
            if self.is_only_shard { &self.link } else { &engine.links[open.shape.striping.shard_of(first)] };
        NearPage { link, key: self.key.wrapping_offset(first), alone: self.alone.wrapping_offset(first) }
    }
}
