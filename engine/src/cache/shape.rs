//! Where a mapping lies: its slot, its place on the device, how it is dealt out to shards.

use super::folio::{FolioKey, FolioOrder};
use super::frames::PAGE_BYTES;
use super::shares::ShareId;
use super::stripe::Striping;
use super::tags::TreeId;
use foliant_nvme::{Lba, Namespace};
use std::ops::Range;

/// What a writer does that meets a page while the device reads it (WB-25).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stability {
    /// It waits: what a device is reading does not change, so after a power cut each of the device's atomic units is as it
    /// was before a write to it, or as it was after one.
    #[default]
    Stable,
    /// [`write_at`](crate::Mapping::write_at) doesn't wait. The page is dirty again and written once more; **until that has
    /// been synced, a power cut may leave any mixture of its bytes**, and a checksum of the device's or of a mirror's that is
    /// computed beside the transfer may not fit them. For what is rebuilt anyway: caches, scratch files, temporary tables. Pins,
    /// writes with a log sequence number and changes of the length wait nevertheless; a gate can't be attached.
    Unstable,
}

/// The fixed geometry of one open mapping. Plain data; every shard and every handle has it.
#[derive(Clone, Debug)]
pub(crate) struct MappingShape {
    /// Index in the engine's table of open mappings.
    pub slot: u16,
    pub namespace: Namespace,
    /// First block of the namespace that belongs to the mapping.
    pub first_lba: u64,
    /// How long it may become ([`FileEnd`](super::eof::FileEnd) has the length), in bytes: a multiple of the block size.
    pub capacity_bytes: u64,
    /// Number of pages, of all its capacity; the last may exist in part only.
    pages: u64,
    /// Blocks of the namespace that make a page.
    page_blocks: u64,
    /// A block of the namespace has two to this power bytes.
    block_shift: u32,
    /// Pages that one command can carry, as far as only MDTS has to do with it.
    transfer_pages_max: u64,
    /// See [`block_commands_max`](Self::block_commands_max).
    block_commands_max: u32,
    pub striping: Striping,
    pub tree: TreeId,
    /// The smallest folio: the mapping's block, which is pinned, marked and written as a whole.
    pub order: FolioOrder,
    /// Whether writers leave alone what the device reads.
    pub stability: Stability,
    /// Which share of the cache its pages are counted in.
    pub share: ShareId,
}

impl MappingShape {
    pub(crate) fn new(
        slot: u16,
        namespace: Namespace,
        first_lba: u64,
        capacity_bytes: u64,
        (order, stability): (FolioOrder, Stability),
        shards: usize,
    ) -> Self {
        let striping = Striping::new(shards, slot);
        let pages = capacity_bytes.div_ceil(PAGE_BYTES as u64);
        let tree = TreeId::new(slot, striping.local_pages_max(pages));
        let share = ShareId::UNNAMED;
        // What a command asks of the geometry is divided here, once.
        let block_bytes = namespace.block_bytes();
        let transfer_pages_max = u64::from(namespace.max_transfer_bytes()) / PAGE_BYTES as u64;
        let block_commands_max = commands_of_a_block(&namespace, order, first_lba);
        Self {
            slot,
            namespace,
            first_lba,
            capacity_bytes,
            pages,
            page_blocks: PAGE_BYTES as u64 / u64::from(block_bytes),
            block_shift: block_bytes.trailing_zeros(),
            transfer_pages_max,
            block_commands_max,
            striping,
            tree,
            order,
            stability,
            share,
        }
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
            (self.capacity_bytes - page * PAGE_BYTES as u64) as u32
        }
    }

    /// The first block of `page` on the device.
    #[inline]
    pub(crate) fn lba(&self, page: u64) -> Lba {
        Lba(self.first_lba + page * self.page_blocks)
    }

    /// Blocks of the device that pages `pages` occupy.
    pub(crate) fn blocks(&self, pages: &Range<u64>) -> u32 {
        let end = (pages.end * PAGE_BYTES as u64).min(self.capacity_bytes);
        ((end - pages.start * PAGE_BYTES as u64) >> self.block_shift) as u32
    }

    /// How many commands the driver may make of one block: more than one where a boundary of the device runs through
    /// blocks, or a command can't carry a block.
    #[inline]
    pub(crate) fn block_commands_max(&self) -> u32 {
        self.block_commands_max
    }

    /// Whether the device writes a block of the mapping whole or not at all when power fails: it fits into the atomic unit
    /// (NAWUPF or AWUPF), is aligned to it, and goes out as one command (WB-44).
    pub(crate) fn is_block_atomic(&self) -> bool {
        let lbas = self.order.pages() * (PAGE_BYTES as u64 / u64::from(self.namespace.block_bytes()));
        lbas <= u64::from(self.namespace.atomic_write_blocks_power_fail())
            && self.first_lba.is_multiple_of(lbas)
            && self.block_commands_max() == 1
    }

    /// How many pages from `first` on one command may carry, the limits of the device (MDTS, NOIOB) and the
    /// stripe considered: whole blocks, and at least one.
    pub(crate) fn command_pages_max(&self, first: u64) -> u64 {
        let block = self.order.pages();
        let by_size = self.transfer_pages_max;
        let by_stripe = self.striping.run_end(first) - first;
        let by_boundary = self.namespace.optimal_boundary_blocks().map_or(u64::MAX, |boundary| {
            let boundary = u64::from(boundary);
            let left = boundary - self.lba(first).0 % boundary;
            left * u64::from(self.namespace.block_bytes()) / PAGE_BYTES as u64
        });
        // A block is a power of two.
        (by_size.min(by_stripe).min(by_boundary) & !(block - 1)).max(block)
    }
}

fn commands_of_a_block(namespace: &Namespace, order: FolioOrder, first_lba: u64) -> u32 {
    let block_bytes = order.pages() as u32 * PAGE_BYTES as u32;
    let by_size = block_bytes.div_ceil(namespace.max_transfer_bytes().max(1));
    let lbas = (block_bytes / namespace.block_bytes()).max(1);
    let by_boundary = match namespace.optimal_boundary_blocks() {
        Some(boundary) if !(boundary.is_multiple_of(lbas) && first_lba.is_multiple_of(u64::from(lbas))) => {
            lbas.div_ceil(boundary)
        }
        _ => 0,
    };
    by_size + by_boundary
}
