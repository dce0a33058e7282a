//! The arithmetic of Physical Region Page entries (Base section 4.3.1).

use crate::PAGE_BYTES;

/// Size of one PRP entry in bytes.
pub const ENTRY_BYTES: usize = 8;

/// PRP entries that fit into one whole list page; the last of them points to the next list page where the list
/// goes on.
pub const ENTRIES_PER_PAGE: usize = PAGE_BYTES / ENTRY_BYTES;

/// The offset into its page that a PRP entry or device address has, in bytes.
#[must_use]
pub const fn page_offset(address: u64) -> usize {
    (address % PAGE_BYTES as u64) as usize
}
