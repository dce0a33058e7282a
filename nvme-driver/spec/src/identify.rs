//! What Identify returns (Base section 5.1.13, NVM section 4.1.5). Every structure fills one 4 KiB page.

use bitfield_struct::bitfield;
use zerocopy::little_endian::U128;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::registers::Vs;

open_enum! {
    /// Controller or Namespace Structure: which structure Identify returns (Base section 5.1.13, figure 310).
    pub struct Cns(u8) {
        /// Identify Namespace data structure of the NVM Command Set: [`Namespace`].
        NAMESPACE = 0x00, "Identify Namespace";
        /// Identify Controller data structure: [`Controller`].
        CONTROLLER = 0x01, "Identify Controller";
        /// Active Namespace ID list: [`NamespaceList`], of the identifiers greater than NSID.
        ACTIVE_NAMESPACES = 0x02, "Active Namespace ID list";
        /// Namespace Identification Descriptor list.
        NAMESPACE_DESCRIPTORS = 0x03, "Namespace Identification Descriptor list";
        /// I/O Command Set specific Identify Namespace data structure.
        NAMESPACE_OF_COMMAND_SET = 0x05, "I/O Command Set specific Identify Namespace";
        /// I/O Command Set specific Identify Controller data structure.
        CONTROLLER_OF_COMMAND_SET = 0x06, "I/O Command Set specific Identify Controller";
    }
}

impl Cns {
    pub(crate) const fn from_bits(bits: u8) -> Self {
        Self(bits)
    }

    pub(crate) const fn into_bits(self) -> u8 {
        self.0
    }
}

/// The Identify Controller data structure, 4096 bytes (Base section 5.1.13.2.1, figure 312).
///
/// ```text
/// byte  0         256       512        768      1024      2048          3072
///       | general | admin   | NVM set  | SUBNQN | fabrics | power states | vendor specific |
/// ```
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Controller {
    /// PCI Vendor ID.
    pub vid: u16,
    /// PCI Subsystem Vendor ID.
    pub ssvid: u16,
    /// Serial Number, ASCII, padded with spaces.
    pub sn: [u8; 20],
    /// Model Number, ASCII, padded with spaces.
    pub mn: [u8; 40],
    /// Firmware Revision, ASCII, padded with spaces.
    pub fr: [u8; 8],
    /// Recommended Arbitration Burst, as a power of two.
    pub rab: u8,
    /// IEEE OUI Identifier, little-endian.
    pub ieee: [u8; 3],
    /// Controller Multi-Path I/O and Namespace Sharing Capabilities.
    pub cmic: u8,
    /// Maximum Data Transfer Size, as a power of two of the minimum memory page size (CAP.MPSMIN); 0 is no limit.
    pub mdts: u8,
    /// Controller ID.
    pub cntlid: u16,
    /// Version; 0 from controllers older than 1.2.
    pub ver: Vs,
    /// RTD3 Resume Latency in microseconds.
    pub rtd3r: u32,
    /// RTD3 Entry Latency in microseconds; how long a shutdown may take, 0 when it isn't reported.
    pub rtd3e: u32,
    /// Optional Asynchronous Events Supported.
    pub oaes: u32,
    /// Controller Attributes.
    pub ctratt: u32,
    /// Read Recovery Levels Supported.
    pub rrls: u16,
    /// Boot partition capabilities, subsystem shutdown latency and power loss signalling: bytes 102 to 110.
    pub reserved_102: [u8; 9],
    /// Controller Type: 1h an I/O controller, 0h unreported.
    pub cntrltype: u8,
    /// FRU Globally Unique Identifier.
    pub fguid: [u8; 16],
    /// Command Retry Delay Times 1 to 3, in units of 100 ms.
    pub crdt: [u16; 3],
    /// Reserved and fields of the management interface: bytes 134 to 255.
    pub reserved_134: [u8; 122],
    /// Optional Admin Command Support.
    pub oacs: Oacs,
    /// Abort Command Limit, zero-based.
    pub acl_z: u8,
    /// Asynchronous Event Request Limit, zero-based.
    pub aerl_z: u8,
    /// Firmware Updates.
    pub frmw: u8,
    /// Log Page Attributes.
    pub lpa: u8,
    /// Error Log Page Entries, zero-based.
    pub elpe_z: u8,
    /// Number of Power States Support, zero-based.
    pub npss_z: u8,
    /// Admin Vendor Specific Command Configuration.
    pub avscc: u8,
    /// Autonomous Power State Transition Attributes.
    pub apsta: u8,
    /// Warning Composite Temperature Threshold, in kelvins.
    pub wctemp: u16,
    /// Critical Composite Temperature Threshold, in kelvins.
    pub cctemp: u16,
    /// Maximum Time for Firmware Activation, in units of 100 ms.
    pub mtfa: u16,
    /// Host Memory Buffer Preferred Size, in 4 KiB units.
    pub hmpre: u32,
    /// Host Memory Buffer Minimum Size, in 4 KiB units.
    pub hmmin: u32,
    /// Total NVM Capacity in bytes.
    pub tnvmcap: U128,
    /// Unallocated NVM Capacity in bytes.
    pub unvmcap: U128,
    /// Replay Protected Memory Block, self-test, keep alive, thermal and sanitize fields: bytes 312 to 511.
    pub reserved_312: [u8; 200],
    /// Submission Queue Entry Size.
    pub sqes: EntrySize,
    /// Completion Queue Entry Size.
    pub cqes: EntrySize,
    /// Maximum Outstanding Commands; 0 when it isn't reported.
    pub maxcmd: u16,
    /// Number of Namespaces: the largest namespace identifier.
    pub nn: u32,
    /// Optional NVM Command Support.
    pub oncs: Oncs,
    /// Fused Operation Support.
    pub fuses: u16,
    /// Format NVM Attributes.
    pub fna: u8,
    /// Volatile Write Cache.
    pub vwc: Vwc,
    /// Atomic Write Unit Normal in logical blocks, zero-based.
    pub awun_z: u16,
    /// Atomic Write Unit Power Fail in logical blocks, zero-based.
    pub awupf_z: u16,
    /// I/O Command Set Vendor Specific Command Configuration.
    pub icsvscc: u8,
    /// Namespace Write Protection Capabilities.
    pub nwpc: u8,
    /// Atomic Compare & Write Unit in logical blocks, zero-based.
    pub acwu_z: u16,
    /// Copy Descriptor Formats Supported.
    pub cdfs: u16,
    /// SGL Support.
    pub sgls: Sgls,
    /// Maximum Number of Allowed Namespaces.
    pub mnan: u32,
    /// Reserved and domain fields: bytes 544 to 767.
    pub reserved_544: [u8; 224],
    /// NVM Subsystem NVMe Qualified Name, UTF-8, ended by a zero byte.
    pub subnqn: [u8; 256],
    /// Reserved, and fields of NVMe over Fabrics: bytes 1024 to 2047.
    pub reserved_1024: [u8; 1024],
    /// Power State Descriptors 0 to 31.
    pub psd: [[u8; 32]; 32],
    /// Vendor specific.
    pub vendor_specific: [u8; 1024],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<Controller>() == crate::PAGE_BYTES);
    assert!(offset_of!(Controller, mdts) == 77);
    assert!(offset_of!(Controller, cntrltype) == 111);
    assert!(offset_of!(Controller, crdt) == 128);
    assert!(offset_of!(Controller, oacs) == 256);
    assert!(offset_of!(Controller, wctemp) == 266);
    assert!(offset_of!(Controller, tnvmcap) == 280);
    assert!(offset_of!(Controller, sqes) == 512);
    assert!(offset_of!(Controller, oncs) == 520);
    assert!(offset_of!(Controller, acwu_z) == 532);
    assert!(offset_of!(Controller, sgls) == 536);
    assert!(offset_of!(Controller, subnqn) == 768);
    assert!(offset_of!(Controller, psd) == 2048);
};

/// Optional Admin Command Support, OACS (Base section 5.1.13.2.1, figure 312).
#[bitfield(u16)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Oacs {
    /// Security Send and Security Receive.
    pub security: bool,
    /// Format NVM.
    pub format: bool,
    /// Firmware Commit and Firmware Image Download.
    pub firmware: bool,
    /// Namespace Management and Attachment.
    pub namespace_management: bool,
    /// Device Self-test.
    pub self_test: bool,
    /// Directives.
    pub directives: bool,
    /// NVMe-MI Send and NVMe-MI Receive.
    pub nvme_mi: bool,
    /// Virtualization Management.
    pub virtualization: bool,
    /// Doorbell Buffer Config.
    pub doorbell_buffer_config: bool,
    /// Get LBA Status.
    pub get_lba_status: bool,
    #[bits(6)]
    __: u8,
}

/// Submission or completion queue entry sizes, both as powers of two (Base section 5.1.13.2.1, figure
/// 312).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EntrySize {
    /// The required, which is the smallest, size.
    #[bits(4)]
    pub min: u8,
    /// The largest size.
    #[bits(4)]
    pub max: u8,
}

/// Optional NVM Command Support, ONCS (Base section 5.1.13.2.1, figure 312).
#[bitfield(u16)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Oncs {
    /// Compare.
    pub compare: bool,
    /// Write Uncorrectable.
    pub write_uncorrectable: bool,
    /// Dataset Management.
    pub dataset_management: bool,
    /// Write Zeroes.
    pub write_zeroes: bool,
    /// A non-zero Save field in Set Features and Select field in Get Features.
    pub save_and_select: bool,
    /// Reservations.
    pub reservations: bool,
    /// Timestamp feature.
    pub timestamp: bool,
    /// Verify.
    pub verify: bool,
    /// Copy.
    pub copy: bool,
    #[bits(7)]
    __: u8,
}

/// Volatile Write Cache, VWC (Base section 5.1.13.2.1, figure 312).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Vwc {
    /// A volatile write cache is present.
    pub present: bool,
    /// Behaviour of Flush with NSID FFFFFFFFh: 10b it fails, 11b it flushes all namespaces.
    #[bits(2)]
    pub flush_all: u8,
    #[bits(5)]
    __: u8,
}

/// SGL Support, SGLS (Base section 5.1.13.2.1, figure 312).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Sgls {
    /// 00b no SGLs in NVM commands, 01b supported, 10b supported with dword alignment and granularity.
    #[bits(2)]
    pub support: u8,
    #[bits(14)]
    __: u16,
    /// SGL Bit Bucket descriptors.
    pub bit_bucket: bool,
    #[bits(15)]
    __: u16,
}

/// The Identify Namespace data structure of the NVM Command Set, 4096 bytes (NVM section 4.1.5.1, figure
/// 114).
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Namespace {
    /// Namespace Size in logical blocks; 0 for an inactive namespace.
    pub nsze: u64,
    /// Namespace Capacity in logical blocks.
    pub ncap: u64,
    /// Namespace Utilization in logical blocks.
    pub nuse: u64,
    /// Namespace Features.
    pub nsfeat: Nsfeat,
    /// Number of LBA Formats, zero-based.
    pub nlbaf_z: u8,
    /// Formatted LBA Size.
    pub flbas: Flbas,
    /// Metadata Capabilities.
    pub mc: u8,
    /// End-to-end Data Protection Capabilities.
    pub dpc: u8,
    /// End-to-end Data Protection Type Settings.
    pub dps: Dps,
    /// Namespace Multi-path I/O and Namespace Sharing Capabilities.
    pub nmic: u8,
    /// Reservation Capabilities.
    pub rescap: u8,
    /// Format Progress Indicator.
    pub fpi: u8,
    /// Deallocate Logical Block Features.
    pub dlfeat: Dlfeat,
    /// Namespace Atomic Write Unit Normal in logical blocks, zero-based; valid when NSFEAT says so.
    pub nawun_z: u16,
    /// Namespace Atomic Write Unit Power Fail in logical blocks, zero-based; valid when NSFEAT says so.
    pub nawupf_z: u16,
    /// Namespace Atomic Compare & Write Unit in logical blocks, zero-based; valid when NSFEAT says so.
    pub nacwu_z: u16,
    /// Namespace Atomic Boundary Size Normal in logical blocks, zero-based unless 0, which is no boundary.
    pub nabsn_z: u16,
    /// Namespace Atomic Boundary Offset in logical blocks.
    pub nabo: u16,
    /// Namespace Atomic Boundary Size Power Fail in logical blocks, zero-based unless 0, which is no boundary.
    pub nabspf_z: u16,
    /// Namespace Optimal I/O Boundary in logical blocks; 0 is none. Not zero-based.
    pub noiob: u16,
    /// NVM Capacity in bytes.
    pub nvmcap: U128,
    /// Namespace Preferred Write Granularity in logical blocks, zero-based; valid when NSFEAT says so.
    pub npwg_z: u16,
    /// Namespace Preferred Write Alignment in logical blocks, zero-based; valid when NSFEAT says so.
    pub npwa_z: u16,
    /// Namespace Preferred Deallocate Granularity in logical blocks, zero-based; valid when NSFEAT says so.
    pub npdg_z: u16,
    /// Namespace Preferred Deallocate Alignment in logical blocks, zero-based; valid when NSFEAT says so.
    pub npda_z: u16,
    /// Namespace Optimal Write Size in logical blocks, zero-based; valid when NSFEAT says so.
    pub nows_z: u16,
    /// Maximum Single Source Range Length of Copy, in logical blocks.
    pub mssrl: u16,
    /// Maximum Copy Length in logical blocks.
    pub mcl: u32,
    /// Maximum Source Range Count of Copy, zero-based.
    pub msrc_z: u8,
    /// Key per I/O status and further fields: bytes 81 to 91.
    pub reserved_81: [u8; 11],
    /// ANA Group Identifier.
    pub anagrpid: u32,
    /// Reserved.
    pub reserved_96: [u8; 3],
    /// Namespace Attributes; bit 0: write protected.
    pub nsattr: u8,
    /// NVM Set Identifier.
    pub nvmsetid: u16,
    /// Endurance Group Identifier.
    pub endgid: u16,
    /// Namespace Globally Unique Identifier, big-endian; zeroes for none.
    pub nguid: [u8; 16],
    /// IEEE Extended Unique Identifier, big-endian; zeroes for none.
    pub eui64: [u8; 8],
    /// LBA Formats; the first `nlbaf_z + 1` are valid.
    pub lbaf: [LbaFormat; 64],
    /// Vendor specific.
    pub vendor_specific: [u8; 3712],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<Namespace>() == crate::PAGE_BYTES);
    assert!(offset_of!(Namespace, nawun_z) == 34);
    assert!(offset_of!(Namespace, noiob) == 46);
    assert!(offset_of!(Namespace, npwg_z) == 64);
    assert!(offset_of!(Namespace, nows_z) == 72);
    assert!(offset_of!(Namespace, anagrpid) == 92);
    assert!(offset_of!(Namespace, nguid) == 104);
    assert!(offset_of!(Namespace, lbaf) == 128);
};

impl Namespace {
    /// The LBA format in use; `None` when FLBAS names one past the valid ones, which only a faulty device does.
    #[must_use]
    pub fn formatted_lba(&self) -> Option<LbaFormat> {
        let index = self.flbas.index();
        (index <= self.nlbaf_z).then(|| self.lbaf.get(usize::from(index)).copied()).flatten()
    }
}

/// Namespace Features, NSFEAT (NVM section 4.1.5.1, figure 114).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Nsfeat {
    /// Thin Provisioning.
    pub thinp: bool,
    /// NAWUN, NAWUPF and NACWU are defined and to be used instead of the controller's.
    pub nsabp: bool,
    /// The Deallocated or Unwritten Logical Block error is supported.
    pub dae: bool,
    /// NGUID and EUI64 are never reused.
    pub uidreuse: bool,
    /// The preferred write and deallocate fields are defined; 00b none.
    #[bits(2)]
    pub optperf: u8,
    /// Multiple Atomicity Mode.
    pub mam: bool,
    /// Optional Read Performance.
    pub optrperf: bool,
}

/// Formatted LBA Size, FLBAS (NVM section 4.1.5.1, figure 114).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Flbas {
    /// Low four bits of the format's index.
    #[bits(4)]
    pub index_low: u8,
    /// Metadata is transferred at the end of the data, as an extended LBA.
    pub extended: bool,
    /// High two bits of the format's index.
    #[bits(2)]
    pub index_high: u8,
    #[bits(1)]
    __: u8,
}

impl Flbas {
    /// Index into [`Namespace::lbaf`] of the format in use.
    #[must_use]
    pub const fn index(self) -> u8 {
        self.index_high() << 4 | self.index_low()
    }
}

/// End-to-end Data Protection Type Settings, DPS (NVM section 4.1.5.1, figure 114).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Dps {
    /// Protection Information Type; 000b none.
    #[bits(3)]
    pub pit: u8,
    /// Protection information lies in the first bytes of the metadata.
    pub pip: bool,
    #[bits(4)]
    __: u8,
}

/// Deallocate Logical Block Features, DLFEAT (NVM section 4.1.5.1, figure 114).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Dlfeat {
    /// What a deallocated block reads: 000b unreported, 001b zeroes, 010b ones.
    #[bits(3)]
    pub read_behaviour: u8,
    /// Write Zeroes supports the Deallocate bit.
    pub write_zeroes_deallocates: bool,
    /// The guard field of a deallocated block is a CRC of what it reads.
    pub guard_crc: bool,
    #[bits(3)]
    __: u8,
}

/// One LBA format, 4 bytes (NVM section 4.1.5.1, figure 116).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LbaFormat {
    /// Metadata Size in bytes a block.
    pub ms: u16,
    /// LBA Data Size as a power of two; at least 9, or 0 for a format that isn't available.
    pub lbads: u8,
    /// Relative Performance: 00b the best.
    #[bits(2)]
    pub rp: u8,
    #[bits(6)]
    __: u8,
}

/// The Active Namespace ID list, 4096 bytes (Base section 5.1.13.2.2): ascending identifiers, ended by a 0 unless
/// all entries are used.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NamespaceList {
    /// The identifiers.
    pub nsid: [u32; Self::ENTRIES],
}

const _: () = assert!(size_of::<NamespaceList>() == crate::PAGE_BYTES);

impl NamespaceList {
    /// Identifiers that fit into one list.
    pub const ENTRIES: usize = crate::PAGE_BYTES / size_of::<u32>();

    /// The identifiers up to the end mark.
    pub fn active(&self) -> impl Iterator<Item = u32> + '_ {
        self.nsid.iter().copied().take_while(|&nsid| nsid != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    #[test]
    fn the_formatted_lba_index_spans_two_fields() {
        let mut namespace = Namespace::new_zeroed();
        namespace.nlbaf_z = 17;
        namespace.flbas = Flbas::new().with_index_low(1).with_index_high(1);
        namespace.lbaf[17] = LbaFormat::new().with_lbads(12);
        assert_eq!(namespace.formatted_lba().map(|format| format.lbads()), Some(12));
    }

    #[test]
    fn a_format_index_past_the_valid_ones_is_refused() {
        let mut namespace = Namespace::new_zeroed();
        namespace.flbas = Flbas::new().with_index_low(1);
        assert!(namespace.formatted_lba().is_none());
    }

    #[test]
    fn the_namespace_list_ends_at_the_first_zero() {
        let mut list = NamespaceList::new_zeroed();
        list.nsid[..3].copy_from_slice(&[1, 5, 9]);
        assert!(list.active().eq([1, 5, 9]));
    }
}
