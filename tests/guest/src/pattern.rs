//! What test blocks hold: bytes that follow from a seed and their place, so that guest and host need no copy of them.

use serde::{Deserialize, Serialize};

/// Fills `buffer` with what belongs at `offset` (in bytes, a multiple of 8) of a medium written with `seed`.
///
/// # Panics
/// When offset or length isn't a multiple of 8.
pub fn fill(seed: u64, offset: u64, buffer: &mut [u8]) {
    assert!(offset.is_multiple_of(8) && buffer.len().is_multiple_of(8), "a pattern is made of 8-byte words");
    for (word, place) in buffer.chunks_exact_mut(8).zip((offset..).step_by(8)) {
        word.copy_from_slice(&word_at(seed, place).to_le_bytes());
    }
}

/// `len_bytes` bytes of the pattern.
#[must_use]
pub fn bytes(seed: u64, offset: u64, len_bytes: usize) -> Vec<u8> {
    let mut buffer = vec![0; len_bytes];
    fill(seed, offset, &mut buffer);
    buffer
}

/// Compares `found`, read at `offset`, with the pattern.
///
/// # Errors
/// The first place that differs, with both words.
pub fn compare(seed: u64, offset: u64, found: &[u8]) -> Result<(), String> {
    for (word, place) in found.chunks_exact(8).zip((offset..).step_by(8)) {
        let expected = word_at(seed, place).to_le_bytes();
        if word != expected {
            return Err(format!(
                "byte {place:#x} of the medium: found {word:02x?}, seed {seed} puts {expected:02x?} there"
            ));
        }
    }
    Ok(())
}

/// A change of a medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub len_bytes: u64,
    /// The seed of the pattern that was written; `None` where zeroes are.
    pub seed: Option<u64>,
}

/// What the first `len_bytes` bytes of a medium hold that was all zeroes before `changes`.
///
/// # Panics
/// When a change lies outside.
#[must_use]
pub fn after(changes: &[Change], len_bytes: usize) -> Vec<u8> {
    let mut medium = vec![0; len_bytes];
    for change in changes {
        let place = &mut medium[change.offset as usize..][..change.len_bytes as usize];
        match change.seed {
            Some(seed) => fill(seed, change.offset, place),
            None => place.fill(0),
        }
    }
    medium
}

/// Splitmix64's output function over the word's place: neighbouring words and seeds have nothing in common.
fn word_at(seed: u64, place: u64) -> u64 {
    let mut z = (seed << 48) ^ (place / 8).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_compares_with_itself_at_its_place_only() {
        let written = bytes(7, 4096, 512);
        compare(7, 4096, &written).unwrap();
        assert!(compare(7, 4608, &written).is_err());
        assert!(compare(8, 4096, &written).is_err());
    }

    #[test]
    fn the_first_difference_is_named() {
        let mut written = bytes(1, 0, 64);
        written[40] ^= 1;
        assert!(compare(1, 0, &written).unwrap_err().contains("0x28"));
    }
}
