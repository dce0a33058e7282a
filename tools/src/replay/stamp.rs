//! What a replayed write puts into each 512-byte sector, so that a sector tells whose and from when it is.
//!
//! ```text
//! byte  0        8        16            24                                          512
//!       ├ magic ─┼ sector ┼ generation ─┼ 61 words, each a function of both and of its place ┤
//! ```
//!
//! All words are little-endian and 64 bits wide. A sector whose words don't all agree is torn, or was never
//! written by a replay.

use std::fmt;

/// Bytes of a sector of a trace, whatever the device's block size.
pub(crate) const SECTOR_BYTES: usize = 512;

const MAGIC: u64 = u64::from_le_bytes(*b"FOLIANTs");
const WORD_BYTES: usize = 8;
/// An odd multiplier whose bits are well spread (the golden ratio).
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;

/// Which sector holds which write: the sector's address in sectors, and the number of the request that wrote it,
/// from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) sector: u64,
    pub(crate) generation: u32,
}

/// What a sector was found to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Zeroes,
    Stamped(Stamp),
    /// The head of a stamp with a body that isn't its own.
    Torn(Stamp),
    Unknown,
}

impl Stamp {
    /// The words from the first to the last.
    fn words(self) -> impl Iterator<Item = u64> {
        let generation = u64::from(self.generation);
        let mut key = self.sector.wrapping_mul(SPREAD) ^ generation.wrapping_mul(!SPREAD);
        key ^= key >> 31;
        let body = (3..).map(move |place: u64| (key ^ place).wrapping_mul(SPREAD));
        [MAGIC, self.sector, generation].into_iter().chain(body).take(SECTOR_BYTES / WORD_BYTES)
    }

    /// Fills a sector.
    pub(crate) fn fill(self, sector: &mut [u8]) {
        for (bytes, word) in sector.chunks_exact_mut(WORD_BYTES).zip(self.words()) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Whether a sector holds exactly this.
    pub(crate) fn fills(self, sector: &[u8]) -> bool {
        sector.chunks_exact(WORD_BYTES).zip(self.words()).all(|(bytes, word)| bytes == word.to_le_bytes())
    }
}

impl Content {
    /// Looks at a sector.
    pub(crate) fn of(sector: &[u8]) -> Self {
        let mut words = sector.chunks_exact(WORD_BYTES).filter_map(|bytes| bytes.try_into().ok());
        let mut word = || words.next().map_or(0, u64::from_le_bytes);
        let (magic, address, generation) = (word(), word(), word());
        match u32::try_from(generation) {
            _ if is_zero(sector) => Self::Zeroes,
            Ok(generation) if magic == MAGIC => {
                let stamp = Stamp { sector: address, generation };
                if stamp.fills(sector) { Self::Stamped(stamp) } else { Self::Torn(stamp) }
            }
            _ => Self::Unknown,
        }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zeroes => f.write_str("zeroes"),
            Self::Stamped(stamp) => write!(f, "sector {} of request {}", stamp.sector, stamp.generation),
            Self::Torn(stamp) => {
                write!(f, "a torn sector {} of request {}", stamp.sector, stamp.generation)
            }
            Self::Unknown => f.write_str("something that no replay wrote"),
        }
    }
}

/// Whether every byte is zero.
pub(crate) fn is_zero(sector: &[u8]) -> bool {
    sector.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { sector: 42_932_745, generation: 7 };

    fn stamped(stamp: Stamp) -> [u8; SECTOR_BYTES] {
        let mut sector = [0; SECTOR_BYTES];
        stamp.fill(&mut sector);
        sector
    }

    #[test]
    fn a_sector_tells_its_address_and_generation() {
        let sector = stamped(STAMP);
        assert!(STAMP.fills(&sector));
        assert_eq!(Content::of(&sector), Content::Stamped(STAMP));
    }

    #[test]
    fn another_address_or_generation_is_told_apart() {
        let sector = stamped(STAMP);
        assert!(!Stamp { generation: 8, ..STAMP }.fills(&sector));
        assert!(!Stamp { sector: 0, ..STAMP }.fills(&sector));
    }

    #[test]
    fn any_changed_byte_shows() {
        for place in 0..SECTOR_BYTES {
            let mut sector = stamped(STAMP);
            sector[place] ^= 1;
            assert!(!STAMP.fills(&sector), "byte {place}");
            assert_ne!(Content::of(&sector), Content::Stamped(STAMP), "byte {place}");
        }
    }

    #[test]
    fn halves_of_two_writes_are_torn() {
        let mut sector = stamped(STAMP);
        sector[256..].copy_from_slice(&stamped(Stamp { generation: 6, ..STAMP })[256..]);
        assert_eq!(Content::of(&sector), Content::Torn(STAMP));
    }

    #[test]
    fn zeroes_and_foreign_bytes_are_no_stamps() {
        assert_eq!(Content::of(&[0; SECTOR_BYTES]), Content::Zeroes);
        assert_eq!(Content::of(&[7; SECTOR_BYTES]), Content::Unknown);
    }
}
