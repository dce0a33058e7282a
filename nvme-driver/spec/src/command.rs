//! Submission queue entries and the command-specific dwords of the commands this project speaks.

use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::identify::Cns;
use crate::sgl::{SglDescriptor, SglIdentifier};

/// A submission queue entry, 64 bytes (Base section 4.1.1, figure 92).
///
/// ```text
/// byte  0      4      8      12     16     24     32     40
///       | CDW0 | NSID | CDW2 | CDW3 | MPTR | PRP1 | PRP2 | CDW10 .. CDW15 |
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Command {
    /// Command Dword 0: opcode, data pointer type and command identifier.
    pub cdw0: Cdw0,
    /// Namespace Identifier; 0 where the command uses none.
    pub nsid: u32,
    /// Command Dword 2.
    pub cdw2: u32,
    /// Command Dword 3.
    pub cdw3: u32,
    /// Metadata Pointer.
    pub mptr: u64,
    /// PRP Entry 1: the first page of the data, with an offset into it; or the first half of an SGL descriptor.
    pub prp1: u64,
    /// PRP Entry 2: the second page of the data, or a pointer to a PRP list; or the second half of an SGL
    /// descriptor.
    pub prp2: u64,
    /// Command Dword 10.
    pub cdw10: u32,
    /// Command Dword 11.
    pub cdw11: u32,
    /// Command Dword 12.
    pub cdw12: u32,
    /// Command Dword 13.
    pub cdw13: u32,
    /// Command Dword 14.
    pub cdw14: u32,
    /// Command Dword 15.
    pub cdw15: u32,
}

const _: () = assert!(size_of::<Command>() == Command::BYTES);
const _: () = assert!(core::mem::offset_of!(Command, prp1) == 24);
const _: () = assert!(core::mem::offset_of!(Command, cdw10) == 40);

impl Command {
    /// Size of a submission queue entry in bytes.
    pub const BYTES: usize = 64;

    /// CC.IOSQES for this entry size: 2 ^ 6 bytes.
    pub const SIZE_EXPONENT: u8 = 6;

    /// An entry of zeroes, to fill in by struct update.
    pub const EMPTY: Self = Self {
        cdw0: Cdw0::new(),
        nsid: 0,
        cdw2: 0,
        cdw3: 0,
        mptr: 0,
        prp1: 0,
        prp2: 0,
        cdw10: 0,
        cdw11: 0,
        cdw12: 0,
        cdw13: 0,
        cdw14: 0,
        cdw15: 0,
    };

    /// The starting LBA of a Read, Write or Write Zeroes: CDW11 and CDW10 (NVM figures 52, 69 and 81).
    #[must_use]
    #[inline]
    pub const fn slba(&self) -> u64 {
        (self.cdw11 as u64) << 32 | self.cdw10 as u64
    }

    /// Sets the starting LBA of a Read, Write or Write Zeroes.
    #[inline]
    pub const fn set_slba(&mut self, slba: u64) {
        self.cdw10 = slba as u32;
        self.cdw11 = (slba >> 32) as u32;
    }

    /// The data pointer read as an SGL descriptor, which it is when [`Cdw0::psdt`] says so.
    #[must_use]
    #[inline]
    pub const fn sgl1(&self) -> SglDescriptor {
        let [.., r0, r1, r2, id] = self.prp2.to_le_bytes();
        SglDescriptor {
            address: self.prp1,
            length: self.prp2 as u32,
            reserved: [r0, r1, r2],
            id: SglIdentifier::from_bits(id),
        }
    }
}

/// Command Dword 0 (Base section 4.1.1, figure 91).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Cdw0 {
    /// Opcode: an [`AdminOpcode`](crate::AdminOpcode) or [`NvmOpcode`](crate::NvmOpcode), by the queue.
    #[inline]
    pub opcode: u8,
    /// Fused Operation: 00b a normal one.
    #[inline]
    #[bits(2)]
    pub fuse: u8,
    #[bits(4)]
    __: u8,
    /// PRP or SGL for Data Transfer.
    #[inline]
    #[bits(2)]
    pub psdt: Psdt,
    /// Command Identifier, unique among the commands outstanding in the queue.
    #[inline]
    pub cid: u16,
}

impl Cdw0 {
    /// A plain command, with PRPs where it has data.
    #[inline]
    #[must_use]
    pub const fn plain(opcode: u8, cid: u16) -> Self {
        const PLAIN: Cdw0 = Cdw0::new();
        PLAIN.with_opcode(opcode).with_cid(cid)
    }
}

/// CDW0.PSDT: how the data pointer is to be read (Base section 4.1.1, figure 91).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Psdt {
    /// PRPs.
    Prp = 0b00,
    /// An SGL; MPTR, where used, is one contiguous buffer.
    Sgl = 0b01,
    /// An SGL; MPTR, where used, points to an SGL segment.
    SglWithMetadataSgl = 0b10,
    /// A reserved value.
    Reserved = 0b11,
}

impl Psdt {
    const fn from_bits(bits: u8) -> Self {
        match bits {
            0b00 => Self::Prp,
            0b01 => Self::Sgl,
            0b10 => Self::SglWithMetadataSgl,
            _ => Self::Reserved,
        }
    }

    const fn into_bits(self) -> u8 {
        self as u8
    }
}

/// CDW12 of Read (NVM section 3.3.4, figure 53) and of Write (NVM section 3.3.6, figure 70).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct ReadWriteCdw12 {
    /// Number of Logical Blocks, zero-based.
    #[inline]
    pub nlb_z: u16,
    #[bits(4)]
    __: u8,
    /// Directive Type; writes only.
    #[inline]
    #[bits(4)]
    pub dtype: u8,
    /// Storage Tag Check.
    #[inline]
    pub stc: bool,
    #[bits(1)]
    __: u8,
    /// Protection Information Field.
    #[inline]
    #[bits(4)]
    pub prinfo: u8,
    /// Force Unit Access: the data is on, or comes from, non-volatile media when the command completes.
    #[inline]
    pub fua: bool,
    /// Limited Retry.
    #[inline]
    pub lr: bool,
}

/// CDW12 of Write Zeroes (NVM section 3.3.8, figure 82).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct WriteZeroesCdw12 {
    /// Number of Logical Blocks, zero-based.
    #[inline]
    pub nlb_z: u16,
    #[bits(7)]
    __: u8,
    /// Namespace Zeroes; zeroes the whole namespace where supported.
    #[inline]
    pub nsz: bool,
    /// Storage Tag Check.
    #[inline]
    pub stc: bool,
    /// Deallocate: the host asks that the blocks be deallocated as well.
    #[inline]
    pub deac: bool,
    /// Protection Information Field.
    #[inline]
    #[bits(4)]
    pub prinfo: u8,
    /// Force Unit Access.
    #[inline]
    pub fua: bool,
    /// Limited Retry.
    #[inline]
    pub lr: bool,
}

/// CDW10 of Dataset Management (NVM section 3.3.3, figure 44).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct DatasetManagementCdw10 {
    /// Number of Ranges, zero-based.
    pub nr_z: u8,
    #[bits(24)]
    __: u32,
}

/// CDW11 of Dataset Management (NVM section 3.3.3, figure 45).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct DatasetManagementCdw11 {
    /// Attribute – Integral Dataset for Read.
    pub idr: bool,
    /// Attribute – Integral Dataset for Write.
    pub idw: bool,
    /// Attribute – Deallocate.
    pub ad: bool,
    #[bits(29)]
    __: u32,
}

/// One range of a Dataset Management command, 16 bytes (NVM section 3.3.3, figure 46).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DatasetManagementRange {
    /// Context Attributes; hints, 0 for none.
    pub context_attributes: u32,
    /// Length in logical blocks; not zero-based.
    pub length_blocks: u32,
    /// Starting LBA.
    pub slba: u64,
}

const _: () = assert!(size_of::<DatasetManagementRange>() == 16);

/// The most ranges one Dataset Management command carries (NVM section 3.3.3, figure 46).
pub const DATASET_MANAGEMENT_RANGES_MAX: usize = 256;

/// CDW10 of Create I/O Completion Queue (Base section 5.2.1, figure 474) and of Create I/O Submission Queue (Base
/// section 5.2.2, figure 478).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CreateQueueCdw10 {
    /// Queue Identifier; not 0, which is the admin queue.
    pub qid: u16,
    /// Queue Size in entries, zero-based.
    pub qsize_z: u16,
}

/// CDW11 of Create I/O Completion Queue (Base section 5.2.1, figure 475).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CreateCompletionQueueCdw11 {
    /// Physically Contiguous: PRP1 is the queue itself, not a list of its pages.
    pub pc: bool,
    /// Interrupts Enabled.
    pub ien: bool,
    #[bits(14)]
    __: u16,
    /// Interrupt Vector.
    pub iv: u16,
}

/// CDW11 of Create I/O Submission Queue (Base section 5.2.2, figure 479).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CreateSubmissionQueueCdw11 {
    /// Physically Contiguous: PRP1 is the queue itself, not a list of its pages.
    pub pc: bool,
    /// Queue Priority; for weighted round robin only.
    #[bits(2)]
    pub qprio: u8,
    #[bits(13)]
    __: u16,
    /// Completion Queue Identifier: where completions of this queue go.
    pub cqid: u16,
}

/// CDW10 of Delete I/O Submission Queue and Delete I/O Completion Queue (Base sections 5.2.3 and 5.2.4).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct DeleteQueueCdw10 {
    /// Queue Identifier.
    pub qid: u16,
    #[bits(16)]
    __: u16,
}

/// CDW10 of Abort (Base section 5.1.1, figure 143).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct AbortCdw10 {
    /// Submission Queue Identifier of the command to abort.
    pub sqid: u16,
    /// Command Identifier of the command to abort.
    pub cid: u16,
}

/// CDW10 of Identify (Base section 5.1.13, figure 307).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct IdentifyCdw10 {
    /// Controller or Namespace Structure: which structure is asked for.
    #[bits(8)]
    pub cns: Cns,
    #[bits(8)]
    __: u8,
    /// Controller Identifier, where the structure asks for one.
    pub cntid: u16,
}

/// CDW11 of Identify (Base section 5.1.13, figure 308).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct IdentifyCdw11 {
    /// CNS Specific Identifier.
    pub cnssid: u16,
    #[bits(8)]
    __: u8,
    /// Command Set Identifier; 0 is the NVM Command Set.
    pub csi: u8,
}

/// CDW10 of Get Log Page (Base section 5.1.12, figure 197).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct GetLogPageCdw10 {
    /// Log Page Identifier: a [`LogPageId`](crate::log::LogPageId).
    pub lid: u8,
    /// Log Specific Parameter.
    #[bits(7)]
    pub lsp: u8,
    /// Retain Asynchronous Event.
    pub rae: bool,
    /// Number of Dwords Lower, zero-based together with [`GetLogPageCdw11::numdu`].
    pub numdl_z: u16,
}

/// CDW11 of Get Log Page (Base section 5.1.12, figure 198).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct GetLogPageCdw11 {
    /// Number of Dwords Upper.
    pub numdu: u16,
    /// Log Specific Identifier.
    pub lsi: u16,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sgl::SglType;

    #[test]
    fn cdw0_holds_opcode_pointer_type_and_identifier() {
        let cdw0 = Cdw0::new().with_opcode(2).with_psdt(Psdt::Sgl).with_cid(0xABCD);
        assert_eq!(u32::from(cdw0), 0xABCD_4002);
    }

    #[test]
    fn the_starting_lba_spans_two_dwords() {
        let mut command = Command::default();
        command.set_slba(0x1234_5678_9ABC_DEF0);
        assert_eq!((command.cdw11, command.cdw10), (0x1234_5678, 0x9ABC_DEF0));
        assert_eq!(command.slba(), 0x1234_5678_9ABC_DEF0);
    }

    #[test]
    fn read_write_flags_lie_in_the_top_bits() {
        assert_eq!(u32::from(ReadWriteCdw12::new().with_nlb_z(7).with_fua(true)), 1 << 30 | 7);
        assert_eq!(u32::from(ReadWriteCdw12::new().with_lr(true)), 1 << 31);
        assert_eq!(u32::from(WriteZeroesCdw12::new().with_deac(true)), 1 << 25);
        assert_eq!(u32::from(DatasetManagementCdw11::new().with_ad(true)), 4);
    }

    #[test]
    fn the_data_pointer_reads_as_an_sgl_descriptor() {
        let descriptor = Command { prp1: 0x1000, prp2: 0x2000_0000_0000_0200, ..Command::default() }.sgl1();
        assert_eq!((descriptor.address, descriptor.length), (0x1000, 0x200));
        assert_eq!(descriptor.id.kind(), SglType::Segment);
    }
}
