//! Scatter Gather Lists (Base section 4.3.2).

use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// One SGL descriptor: a piece of data, or a pointer to a segment of further descriptors (Base section 4.3.2,
/// figure 114).
///
/// ```text
/// byte  0        8        12       15
///       | address | length | 0 0 0  | id |
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SglDescriptor {
    /// Address of the data or of the segment; meaningless for a bit bucket.
    pub address: u64,
    /// Length of the data or of the segment, in bytes.
    pub length: u32,
    /// Reserved.
    pub reserved: [u8; 3],
    /// Type and sub type.
    pub id: SglIdentifier,
}

const _: () = assert!(size_of::<SglDescriptor>() == 16);

/// The SGL Identifier byte (Base section 4.3.2, figure 114).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SglIdentifier {
    /// SGL Descriptor Sub Type; 0h is an address, 1h an offset into a capsule.
    #[bits(4)]
    pub subtype: u8,
    /// SGL Descriptor Type: [`SglType`].
    #[bits(4)]
    pub kind: SglType,
}

/// SGL Descriptor Type (Base section 4.3.2, figure 115).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SglType {
    /// A piece of data.
    DataBlock = 0x0,
    /// Source bytes to be thrown away.
    BitBucket = 0x1,
    /// A segment that isn't the last.
    Segment = 0x2,
    /// The last segment.
    LastSegment = 0x3,
    /// A piece of data reached by a key; fabrics only.
    KeyedDataBlock = 0x4,
    /// A piece of data in the transport's own terms; fabrics only.
    TransportDataBlock = 0x5,
    /// Any other value.
    Other = 0xF,
}

impl SglType {
    const fn from_bits(bits: u8) -> Self {
        match bits {
            0x0 => Self::DataBlock,
            0x1 => Self::BitBucket,
            0x2 => Self::Segment,
            0x3 => Self::LastSegment,
            0x4 => Self::KeyedDataBlock,
            0x5 => Self::TransportDataBlock,
            _ => Self::Other,
        }
    }

    const fn into_bits(self) -> u8 {
        self as u8
    }
}
