//! Where a mapping lies: its slot, its place on the device, how it is dealt out to shards.

use super::folio::FolioKey;
use super::frames::PAGE_BYTES;
use super::stripe::Striping;
use super::tags::TreeId;
use foliant_nvme::{Lba, Namespace};
use std::ops::Range;

/// The fixed geometry of one open mapping. Plain data; every shard and every handle has it.
#[derive(Clone, Debug)]
pub(crate) struct MappingShape {
    /// Index in the engine's table of open mappings.
    pub slot: u16,
    pub namespace: Namespace,
    /// First block of the namespace that belongs to the mapping.
    pub first_lba: u64,
    /// Length in bytes, a multiple of the block size.
    pub len_bytes: u64,
    /// Number of pages; the last may exist in part only.
    pages: u64,
    pub striping: Striping,
    pub tree: TreeId,
}

impl MappingShape {
    pub(crate) fn new(
        slot: u16,
        namespace: Namespace,
        first_lba: u64,
        len_bytes: u64,
        shards: usize,
    ) -> Self {
        let striping = Striping::new(shards, slot);
        let pages = len_bytes.div_ceil(PAGE_BYTES as u64);
        let tree = TreeId::new(slot, striping.local_pages_max(pages));
        Self { slot, namespace, first_lba, len_bytes, pages, striping, tree }
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    #[inline]
    pub(crate) fn key(&self, page: u64) -> FolioKey {
        FolioKey::new(self.slot, page)
    }

    /// Bytes of `page` that exist: a whole page but for the last.
    #[inline]
    pub(crate) fn page_bytes(&self, page: u64) -> u32 {
        if page + 1 < self.pages {
            PAGE_BYTES as u32
        } else {
            (self.len_bytes - page * PAGE_BYTES as u64) as u32
        }
    }

    /// The first block of `page` on the device.
    pub(crate) fn lba(&self, page: u64) -> Lba {
        Lba(self.first_lba + page * (PAGE_BYTES as u64 / u64::from(self.namespace.block_bytes())))
    }

    /// Blocks of the device that pages `pages` occupy.
    pub(crate) fn blocks(&self, pages: &Range<u64>) -> u32 {
        let end = (pages.end * PAGE_BYTES as u64).min(self.len_bytes);
        ((end - pages.start * PAGE_BYTES as u64) / u64::from(self.namespace.block_bytes())) as u32
    }

    /// How many commands the driver may make of one page: more than one where a boundary of the device runs through
    /// pages.
    pub(crate) fn page_commands_max(&self) -> u32 {
        let page_blocks = (PAGE_BYTES as u32 / self.namespace.block_bytes()).max(1);
        match self.namespace.optimal_boundary_blocks() {
            Some(boundary)
                if !(boundary.is_multiple_of(page_blocks)
                    && self.first_lba.is_multiple_of(u64::from(page_blocks))) =>
            {
                page_blocks.div_ceil(boundary) + 1
            }
            _ => 1,
        }
    }

    /// How many pages from `first` on one command may carry, the limits of the device (MDTS, NOIOB) and the
    /// stripe considered. At least 1.
    pub(crate) fn command_pages_max(&self, first: u64) -> u64 {
        let by_size = u64::from(self.namespace.max_transfer_bytes()) / PAGE_BYTES as u64;
        let by_stripe = self.striping.run_end(first) - first;
        let by_boundary = self.namespace.optimal_boundary_blocks().map_or(u64::MAX, |boundary| {
            let boundary = u64::from(boundary);
            let left = boundary - self.lba(first).0 % boundary;
            left * u64::from(self.namespace.block_bytes()) / PAGE_BYTES as u64
        });
        by_size.min(by_stripe).min(by_boundary).max(1)
    }
}
