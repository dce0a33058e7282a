//! Memory that commands point to besides their data, a fixed part for each slot of the command table.

use foliant_nvme_spec::PAGE_BYTES;
use foliant_nvme_spec::command::DatasetManagementRange;
use foliant_nvme_spec::prp::ENTRIES_PER_PAGE;

use crate::arena::{DmaArena, DmaBuffer};
use crate::error::ArenaError;
use crate::prp::ListMemory;

/// A few pages for each slot, for what a command points to besides its data: a PRP list, or deallocation ranges.
/// A slot's pages are the device's while the slot's command is outstanding.
pub(crate) struct Lists {
    memory: DmaBuffer,
    slot_bytes: usize,
}

impl Lists {
    /// Lists of `slot_bytes` (whole pages) for each of `slots` slots, in memory of `arena`.
    pub(crate) fn new(arena: &DmaArena, slots: u16, slot_bytes: usize) -> Result<Self, ArenaError> {
        debug_assert!(slot_bytes.is_multiple_of(PAGE_BYTES));
        Ok(Self { memory: arena.allocate(usize::from(slots) * slot_bytes)?, slot_bytes })
    }

    /// The pages of a slot whose command isn't outstanding.
    pub(crate) fn of(&mut self, slot: u16) -> ListMemory<'_> {
        let offset = usize::from(slot) * self.slot_bytes;
        assert!(offset + self.slot_bytes <= self.memory.len_bytes(), "slot {slot} has no list memory");
        // SAFETY: the memory has `slot_bytes` for each slot; they are page aligned and initialised. `&mut self`
        // keeps the driver from a second reference, and the device reads only pages of outstanding commands.
        #[expect(unsafe_code, reason = "a slot's part of the list memory becomes a slice")]
        let entries = unsafe {
            let start = self.memory.base().byte_add(offset).cast::<u64>();
            std::slice::from_raw_parts_mut(start.as_ptr(), self.slot_bytes / PAGE_BYTES * ENTRIES_PER_PAGE)
        };
        ListMemory { entries, iova: self.memory.iova().offset(offset as u64) }
    }

    /// Writes one deallocation range into a slot's pages; returns its device address.
    pub(crate) fn write_range(&mut self, slot: u16, range: DatasetManagementRange) -> u64 {
        let list = self.of(slot);
        let words: [u64; 2] = zerocopy::transmute!(range);
        list.entries[..2].copy_from_slice(&words);
        list.iova.0
    }
}
