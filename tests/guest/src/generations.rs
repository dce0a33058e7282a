//! Generations of pages: the same pages written again and again, a generation only after the sync of the one before.
//!
//! So whoever sees a page of generation *n* + 1 knows, without being told, that all of generation *n* was promised.

use crate::marked;

/// Pages of a generation: every second of them in a row, the others scattered.
pub const PAGES: u64 = 96;
const PAGE: u64 = foliant::PAGE_BYTES as u64;

/// The pages, each once; the last lies below 32 MiB.
pub fn pages() -> impl Iterator<Item = u64> {
    (0..PAGES).map(|number| if number % 2 == 0 { 64 + number / 2 } else { 300 + number * 79 })
}

/// What a page holds in a generation, from 1 on.
#[must_use]
pub fn page_bytes(generation: u64, page: u64) -> Vec<u8> {
    marked::bytes(generation, page * PAGE, PAGE as usize)
}

/// The generation of a piece of a page, found at byte `offset` of the medium: 0 where nothing was written yet.
///
/// # Errors
/// When it is no generation's.
pub fn generation_of(offset: u64, found: &[u8]) -> Result<u64, String> {
    let number =
        marked::number_of(offset, found).map_err(|reason| format!("at byte {offset:#x}: {reason}"))?;
    Ok(number.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn pages_are_different_and_lie_where_they_should() {
        let all: BTreeSet<u64> = pages().collect();
        assert_eq!(all.len() as u64, PAGES);
        assert!(*all.last().unwrap() < (32 << 20) / PAGE);
    }

    #[test]
    fn a_block_of_a_page_has_its_generation() {
        let page = page_bytes(4, 70);
        assert_eq!(generation_of(70 * PAGE + 512, &page[512..1024]), Ok(4));
        assert_eq!(generation_of(0, &[0; 512]), Ok(0));
    }
}
