//! Completion queue entries.

use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::status::Status;

/// A completion queue entry, 16 bytes (Base section 4.2.1, figure 96).
///
/// ```text
/// byte  0     4     8      10     12    14
///       | DW0 | DW1 | SQHD | SQID | CID | P and status |
/// ```
///
/// The phase tag and the command identifier share [dword 3](CompletionDw3), which the controller writes last:
/// who polls reads that dword, with acquire ordering, before any other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Completion {
    /// Command-specific result.
    pub dw0: u32,
    /// Command-specific result, second dword.
    pub dw1: u32,
    /// Submission queue head and identifier.
    pub dw2: CompletionDw2,
    /// Command identifier, phase tag and status.
    pub dw3: CompletionDw3,
}

const _: () = assert!(size_of::<Completion>() == Completion::BYTES);

impl Completion {
    /// Size of a completion queue entry in bytes.
    pub const BYTES: usize = 16;

    /// CC.IOCQES for this entry size: 2 ^ 4 bytes.
    pub const SIZE_EXPONENT: u8 = 4;

    /// Offset of dword 2 in the entry, in bytes.
    pub const DW2_OFFSET: usize = 8;

    /// Offset of dword 3, with the phase tag, in the entry, in bytes.
    pub const DW3_OFFSET: usize = 12;
}

/// Dword 2 of a completion queue entry (Base section 4.2.1, figure 97).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CompletionDw2 {
    /// SQ Head Pointer: entries before it have been fetched and may be written again.
    #[inline]
    pub sqhd: u16,
    /// SQ Identifier: the submission queue the command came from.
    #[inline]
    pub sqid: u16,
}

/// Dword 3 of a completion queue entry (Base section 4.2.1, figure 98).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CompletionDw3 {
    /// Command Identifier of the command that completed.
    #[inline]
    pub cid: u16,
    /// Phase Tag: inverts each time the queue wraps, 1 on the first pass (Base section 4.2.4).
    #[inline]
    pub p: bool,
    /// The status field.
    #[inline]
    #[bits(15)]
    pub status: Status,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::StatusCode;

    #[test]
    fn dword_3_holds_identifier_phase_and_status() {
        let dw3 = CompletionDw3::from(0x4005_0007 | 1 << 31);
        assert_eq!(dw3.cid(), 7);
        assert!(dw3.p());
        assert_eq!(dw3.status().code(), StatusCode::INVALID_FIELD);
        assert!(dw3.status().dnr() && dw3.status().m());
    }

    #[test]
    fn dword_2_holds_queue_head_and_identifier() {
        let dw2 = CompletionDw2::new().with_sqhd(3).with_sqid(9);
        assert_eq!(u32::from(dw2), 9 << 16 | 3);
    }
}
