//! The label of a mirrored range: one block behind the range, on the primary and on the mirror, that tells after a
//! restart whether the two still hold the same.
//!
//! ```text
//!  byte 0          8       12   13    14   16     24           32      40       48         56
//!       | FOLIANTM | version | role | state | 0 | pair | generation | start | length | checksum | zeros to the block's end
//! ```
//!
//! Numbers are little-endian; the checksum is FNV-1a over the bytes before it. A label is written with FUA and fits into
//! 512 bytes, which every device writes whole or not at all.
//!
//! **The rule.** The mirror is in sync exactly if both labels are there, name each other (pair), have the same generation,
//! and both say [`Clean`](LabelState::Clean). That state is written only by a close after both devices were flushed, and
//! taken away before the first write after it:
//!
//! | what happens | primary's label | mirror's label | in sync at the next open |
//! |---|---|---|---|
//! | opened in sync | Open, generation + 1 | Open, generation + 1 | no |
//! | opened, and the mirror is stale or away | Open, generation + 1 | untouched | no |
//! | closed in sync | Clean | Clean | **yes** |
//! | closed degraded | Clean | untouched: an older generation, or Open | no |
//! | crash, power cut, dropped without close | Open | Open | no |
//! | either range opened as a plain mapping | Alone | or Alone | no |
//!
//! "In sync" is what the mirror's label and the primary's say; a shard that can't write the mirror, or a flush of it that has
//! failed, makes it degraded all the same. A range whose label says that it is a mirror is opened as a primary, with or
//! without a mirror of its own, only where it was in sync or is accepted.
//!
//! So a mirror that was lost needn't be told that it is stale, which it couldn't be: whatever it says, it can't say Clean
//! with the primary's generation.

use std::fmt;

/// Bytes of a label; the rest of its block is zero.
pub(crate) const LABEL_BYTES: usize = 512;
const MAGIC: &[u8; 8] = b"FOLIANTM";
const VERSION: u32 = 1;
const CHECKED_BYTES: usize = 48;

/// Which half of a pair a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorRole {
    /// The half that is read.
    Primary,
    /// The half that is only written.
    Mirror,
}

impl fmt::Display for MirrorRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Primary { "primary" } else { "mirror" })
    }
}

/// What a label says of its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LabelState {
    /// In use, or in use when the machine stopped.
    Open,
    /// Closed with everything on the medium.
    Clean,
    /// Opened without its other half since it was last part of the pair.
    Alone,
}

impl fmt::Display for LabelState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Clean => "clean",
            Self::Alone => "alone",
        })
    }
}

/// What stands on the block behind a mirrored range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MirrorLabel {
    /// Which half it is.
    pub role: MirrorRole,
    /// In which state it was left.
    pub state: LabelState,
    /// The pair's number, drawn when it was first synchronised; the same in both halves.
    pub pair: u64,
    /// Rises with every opening of the pair.
    pub generation: u64,
    /// First byte of the range in its namespace.
    pub start_bytes: u64,
    /// Bytes of the range.
    pub len_bytes: u64,
}

impl MirrorLabel {
    /// Reads a label; `None` for anything else, also for one that is damaged.
    pub(crate) fn parse(block: &[u8]) -> Option<Self> {
        let number = |at: usize| Some(u64::from_le_bytes(block.get(at..at + 8)?.try_into().ok()?));
        if block.get(..8)? != MAGIC || number(CHECKED_BYTES)? != checksum(&block[..CHECKED_BYTES]) {
            return None;
        }
        if u32::from_le_bytes(block[8..12].try_into().ok()?) != VERSION {
            return None;
        }
        Some(Self {
            role: match block[12] {
                0 => MirrorRole::Primary,
                1 => MirrorRole::Mirror,
                _ => return None,
            },
            state: match block[13] {
                0 => LabelState::Open,
                1 => LabelState::Clean,
                2 => LabelState::Alone,
                _ => return None,
            },
            pair: number(16)?,
            generation: number(24)?,
            start_bytes: number(32)?,
            len_bytes: number(40)?,
        })
    }

    /// Writes it over the beginning of a block, and zeros over the rest.
    pub(crate) fn write_to(&self, block: &mut [u8]) {
        block.fill(0);
        block[..8].copy_from_slice(MAGIC);
        block[8..12].copy_from_slice(&VERSION.to_le_bytes());
        block[12] = u8::from(self.role == MirrorRole::Mirror);
        block[13] = match self.state {
            LabelState::Open => 0,
            LabelState::Clean => 1,
            LabelState::Alone => 2,
        };
        for (at, number) in
            [(16, self.pair), (24, self.generation), (32, self.start_bytes), (40, self.len_bytes)]
        {
            block[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        let sum = checksum(&block[..CHECKED_BYTES]);
        block[CHECKED_BYTES..CHECKED_BYTES + 8].copy_from_slice(&sum.to_le_bytes());
    }

    /// Whether it is the label of exactly this range.
    pub(crate) fn is_of(&self, start_bytes: u64, len_bytes: u64) -> bool {
        (self.start_bytes, self.len_bytes) == (start_bytes, len_bytes)
    }
}

/// FNV-1a.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn label() -> MirrorLabel {
        MirrorLabel {
            role: MirrorRole::Mirror,
            state: LabelState::Clean,
            pair: 77,
            generation: 5,
            start_bytes: 4096,
            len_bytes: 1 << 20,
        }
    }

    #[test]
    fn wb15_a_label_is_read_as_it_was_written() {
        let mut block = [0xff; 4096];
        for state in [LabelState::Open, LabelState::Clean, LabelState::Alone] {
            for role in [MirrorRole::Primary, MirrorRole::Mirror] {
                let label = MirrorLabel { role, state, ..label() };
                label.write_to(&mut block);
                assert_eq!(MirrorLabel::parse(&block), Some(label));
            }
        }
        assert!(block[56..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn wb15_a_damaged_label_is_none() {
        let mut block = [0; LABEL_BYTES];
        assert_eq!(MirrorLabel::parse(&block), None);
        label().write_to(&mut block);
        for at in 0..56 {
            for bit in 0..8 {
                block[at] ^= 1 << bit;
                assert_eq!(MirrorLabel::parse(&block), None, "bit {bit} of byte {at}");
                block[at] ^= 1 << bit;
            }
        }
        assert_eq!(MirrorLabel::parse(&block[..20]), None);
    }
}
