//! What a pass has the processor load before it looks at it: where pages are single folios, their headers are most of what a
//! pass touches, and between two of its steps a device has read as much memory as the caches hold.
//!
//! The cache lays the pages of a leaf out in its frames as in the file where it can. So one look-up tells where the headers
//! of a leaf are, and the look-up itself is done for the leaf behind while this one is worked on. Nothing here is ever waited
//! for, and a wrong guess costs the loads.

use crate::cache::SharedCache;
use crate::cache::exclusion::LEAF_PAGES;
use crate::cache::folio::{FolioHeader, FrameId};
use crate::cache::owned::ShardCache;
use crate::cache::shape::MappingShape;
use crate::cache::table::prefetch;

/// A leaf with fewer wanted pages isn't worth it, nor one whose folios are larger than so many pages.
const PAGES_MIN: u32 = 16;
const FOLIO_PAGES_MAX: u64 = 4;

/// Headers in a cache line.
const LINE_HEADERS: usize = 64 / size_of::<FolioHeader>();

/// Whether a pass over such pages goes through their headers one by one.
#[inline]
pub(super) fn is_worth_it(wanted: u64, folio_pages: u64) -> bool {
    folio_pages <= FOLIO_PAGES_MAX && wanted.count_ones() >= PAGES_MIN
}

/// Has the headers of the frames from `first` on loaded that a leaf's pages have where they lie as in the file.
pub(super) fn load_headers(shared: &SharedCache, first: FrameId) {
    let headers = shared.headers.get(first.0 as usize..).unwrap_or_default();
    headers.iter().take(LEAF_PAGES as usize).step_by(LINE_HEADERS).for_each(|header| prefetch(header));
}

/// Has the marks and the headers of the leaf behind the one that begins at the shard-local page `base` and is `first_page` in
/// the file loaded, and the index's part for the leaf behind that.
pub(super) fn load_next(cache: &ShardCache, shape: &MappingShape, base: u64, first_page: u64) {
    let shared = &cache.shared;
    cache.tree.prefetch(shape.tree, base + LEAF_PAGES);
    shared.index.prefetch(shape.key(first_page + 2 * LEAF_PAGES));
    load_headers(shared, shared.index.first_of_chain(shape.key(first_page + LEAF_PAGES)));
}
