//! Bytes that say by whom they were written, wherever one looks at them: in a file, in a block, in a piece of a page.
//!
//! ```text
//! byte 0       8        16       24                     128
//!      ┌───────┬────────┬────────┬──────────────────────┐
//!      │ mark  │ number │ place  │ pattern              │  again and again
//!      └───────┴────────┴────────┴──────────────────────┘
//! ```

use crate::pattern;

const MARK: u64 = u64::from_le_bytes(*b"\xF0LIANT\x96\x0F");
const CHUNK: usize = 128;

/// `len_bytes` bytes that belong at `place`, written by number `number`.
#[must_use]
pub fn bytes(number: u64, place: u64, len_bytes: usize) -> Vec<u8> {
    let mut all = vec![0; len_bytes.next_multiple_of(CHUNK)];
    for (chunk, at) in all.chunks_exact_mut(CHUNK).zip((place..).step_by(CHUNK)) {
        pattern::fill(number, at, chunk);
        for (word, value) in chunk.chunks_exact_mut(8).zip([MARK, number, at]) {
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    all.truncate(len_bytes);
    all
}

/// Whose the bytes at `place` are: their number, or `None` where they are zeroes.
///
/// # Errors
/// When they are neither, or not all of one number.
pub fn number_of(place: u64, found: &[u8]) -> Result<Option<u64>, String> {
    if found.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    let number = newest_in(&found[..found.len().min(16)]).ok_or("they carry no mark")?;
    let expected = bytes(number, place, found.len());
    match (0..found.len()).find(|&at| found[at] != expected[at]) {
        None => Ok(Some(number)),
        Some(at) => Err(format!(
            "byte {at} is {:#04x}, and number {number} puts {:#04x} there",
            found[at], expected[at]
        )),
    }
}

/// The highest number of all marks in `data`, at whatever places.
#[must_use]
pub fn newest_in(data: &[u8]) -> Option<u64> {
    let mark = MARK.to_le_bytes();
    let marked = data.windows(16).filter(|window| window[..8] == mark);
    marked.map(|window| u64::from_le_bytes(window[8..].try_into().expect("eight bytes"))).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_found_at_any_place_and_in_pieces() {
        let mut data = vec![7; 100];
        data.extend(bytes(3, 0, 300));
        data.extend(bytes(9, 4096, 130));
        assert_eq!(newest_in(&data), Some(9));
        assert_eq!(newest_in(&data[..400]), Some(3));
        assert_eq!(newest_in(&data[..100]), None);
    }

    #[test]
    fn bytes_of_two_numbers_or_of_another_place_are_no_ones() {
        let mut data = bytes(5, 1024, 512);
        assert_eq!(number_of(1024, &data), Ok(Some(5)));
        assert!(number_of(512, &data).is_err());
        data[384..].copy_from_slice(&bytes(6, 1024 + 384, 128));
        assert!(number_of(1024, &data).unwrap_err().contains("byte 392"));
        assert_eq!(number_of(0, &[0; 64]), Ok(None));
    }
}
