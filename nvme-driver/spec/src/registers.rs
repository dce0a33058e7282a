//! Controller properties, which over PCIe are memory-mapped registers (Base section 3.1.4, PCIe section 3.1.2).

use bitfield_struct::bitfield;

/// Offsets of the controller properties in bytes from the start of the register region (Base section 3.1.4, figure
/// 33).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Register {
    /// Controller Capabilities, 64 bits: [`Cap`].
    Cap = 0x00,
    /// Version, 32 bits: [`Vs`].
    Vs = 0x08,
    /// Interrupt Mask Set, 32 bits; for pin-based and MSI interrupts only (Base figure 39).
    Intms = 0x0C,
    /// Interrupt Mask Clear, 32 bits; for pin-based and MSI interrupts only (Base figure 40).
    Intmc = 0x10,
    /// Controller Configuration, 32 bits: [`Cc`].
    Cc = 0x14,
    /// Controller Status, 32 bits: [`Csts`].
    Csts = 0x1C,
    /// NVM Subsystem Reset, 32 bits; writing [`NSSR_RESET`] resets the subsystem.
    Nssr = 0x20,
    /// Admin Queue Attributes, 32 bits: [`Aqa`].
    Aqa = 0x24,
    /// Admin Submission Queue Base Address, 64 bits, page aligned (Base figure 45).
    Asq = 0x28,
    /// Admin Completion Queue Base Address, 64 bits, page aligned (Base figure 46).
    Acq = 0x30,
    /// Controller Memory Buffer Location, 32 bits; reads 0 where there's no such buffer (Base figure 47).
    Cmbloc = 0x38,
    /// Controller Memory Buffer Size, 32 bits; reads 0 where there's no such buffer (Base figure 48).
    Cmbsz = 0x3C,
    /// Controller Ready Timeouts, 32 bits: [`Crto`]; meaningful when one of [`Cap::crms`] is set.
    Crto = 0x68,
}

impl Register {
    /// The register's offset in bytes.
    #[must_use]
    pub const fn offset(self) -> u32 {
        self as u32
    }
}

/// What a 32-bit register reads when the device has been removed (a PCIe master abort reads all ones).
pub const ALL_ONES_U32: u32 = u32::MAX;

/// What a 64-bit register reads when the device has been removed.
pub const ALL_ONES_U64: u64 = u64::MAX;

/// The value that, written to [`Register::Nssr`], resets the NVM subsystem: "NVMe" (Base section 3.1.4.7,
/// figure 43).
pub const NSSR_RESET: u32 = 0x4E56_4D65;

/// Controller Capabilities (Base section 3.1.4.1, figure 36).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cap {
    /// Maximum Queue Entries Supported of an I/O queue, zero-based; at least 1, which means two entries.
    pub mqes_z: u16,
    /// Contiguous Queues Required: I/O queues must be physically contiguous.
    pub cqr: bool,
    /// Arbitration Mechanism Supported: bit 0 weighted round robin, bit 1 vendor specific.
    #[bits(2)]
    pub ams: u8,
    #[bits(5)]
    __: u8,
    /// Timeout: the longest a change of CSTS.RDY takes, in units of 500 ms.
    pub to: u8,
    /// Doorbell Stride: doorbells lie `4 << dstrd` bytes apart.
    #[bits(4)]
    pub dstrd: u8,
    /// NVM Subsystem Reset Supported.
    pub nssrs: bool,
    /// Command Sets Supported, a bit each.
    #[bits(8)]
    pub css: CapCss,
    /// Boot Partition Support.
    pub bps: bool,
    /// Controller Power Scope.
    #[bits(2)]
    pub cps: u8,
    /// Memory Page Size Minimum: the smallest CC.MPS, `2 ^ (12 + mpsmin)` bytes.
    #[bits(4)]
    pub mpsmin: u8,
    /// Memory Page Size Maximum: the largest CC.MPS, `2 ^ (12 + mpsmax)` bytes.
    #[bits(4)]
    pub mpsmax: u8,
    /// Persistent Memory Region Supported.
    pub pmrs: bool,
    /// Controller Memory Buffer Supported.
    pub cmbs: bool,
    /// NVM Subsystem Shutdown Supported.
    pub nsss: bool,
    /// Controller Ready Modes Supported: bit 0 ready with media, bit 1 ready independent of media.
    #[bits(2)]
    pub crms: u8,
    /// NVM Subsystem Shutdown Enhancements Supported.
    pub nsses: bool,
    #[bits(2)]
    __: u8,
}

/// CAP.CSS, the command sets a controller supports (Base section 3.1.4.1, figure 36).
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct CapCss {
    /// The NVM Command Set.
    pub nvm: bool,
    #[bits(5)]
    __: u8,
    /// One or more I/O Command Sets, told by the Identify I/O Command Set data structure.
    pub iocs: bool,
    /// No I/O Command Set: an administrative controller.
    pub noiocs: bool,
}

/// Version of the Base specification a controller implements (Base section 3.1.4.2, figures 37 and 38).
#[bitfield(u32)]
#[derive(
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    zerocopy::FromBytes,
    zerocopy::IntoBytes,
    zerocopy::Immutable,
    zerocopy::KnownLayout,
)]
pub struct Vs {
    /// Tertiary version number.
    pub ter: u8,
    /// Minor version number.
    pub mnr: u8,
    /// Major version number.
    pub mjr: u16,
}

impl core::fmt::Display for Vs {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}.{}.{}", self.mjr(), self.mnr(), self.ter())
    }
}

/// Controller Configuration (Base section 3.1.4.5, figure 41).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cc {
    /// Enable: 0 to 1 enables the controller, 1 to 0 resets it.
    pub en: bool,
    #[bits(3)]
    __: u8,
    /// I/O Command Set Selected: 000b the NVM Command Set, 110b all supported, 111b none.
    #[bits(3)]
    pub css: u8,
    /// Memory Page Size, `2 ^ (12 + mps)` bytes.
    #[bits(4)]
    pub mps: u8,
    /// Arbitration Mechanism Selected: 000b round robin.
    #[bits(3)]
    pub ams: u8,
    /// Shutdown Notification: [`Shn`].
    #[bits(2)]
    pub shn: Shn,
    /// I/O Submission Queue Entry Size as a power of two; 6 (64 bytes) for the NVM Command Set.
    #[bits(4)]
    pub iosqes: u8,
    /// I/O Completion Queue Entry Size as a power of two; 4 (16 bytes) for the NVM Command Set.
    #[bits(4)]
    pub iocqes: u8,
    /// Controller Ready Independent of Media Enable.
    pub crime: bool,
    #[bits(7)]
    __: u8,
}

/// CC.SHN, the kind of shutdown the host asks for (Base section 3.1.4.5, figure 41).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Shn {
    /// No notification; no effect.
    None = 0b00,
    /// Normal shutdown: the controller completes its commands and flushes volatile state.
    Normal = 0b01,
    /// Abrupt shutdown: power is about to go.
    Abrupt = 0b10,
    /// A reserved value.
    Reserved = 0b11,
}

impl Shn {
    const fn from_bits(bits: u8) -> Self {
        match bits {
            0b00 => Self::None,
            0b01 => Self::Normal,
            0b10 => Self::Abrupt,
            _ => Self::Reserved,
        }
    }

    const fn into_bits(self) -> u8 {
        self as u8
    }
}

/// Controller Status (Base section 3.1.4.6, figure 42).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Csts {
    /// Ready: follows CC.EN once the controller has done what that asks for.
    pub rdy: bool,
    /// Controller Fatal Status: only a reset helps.
    pub cfs: bool,
    /// Shutdown Status: [`Shst`].
    #[bits(2)]
    pub shst: Shst,
    /// NVM Subsystem Reset Occurred.
    pub nssro: bool,
    /// Processing Paused.
    pub pp: bool,
    /// Shutdown Type: 0 a controller's, 1 the subsystem's.
    pub st: bool,
    #[bits(25)]
    __: u32,
}

/// CSTS.SHST, how far a shutdown has come (Base section 3.1.4.6, figure 42).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Shst {
    /// Normal operation; no shutdown was asked for.
    Normal = 0b00,
    /// Shutdown processing is under way.
    Occurring = 0b01,
    /// Shutdown processing is complete; power may go.
    Complete = 0b10,
    /// A reserved value; all-ones reads so.
    Reserved = 0b11,
}

impl Shst {
    const fn from_bits(bits: u8) -> Self {
        match bits {
            0b00 => Self::Normal,
            0b01 => Self::Occurring,
            0b10 => Self::Complete,
            _ => Self::Reserved,
        }
    }

    const fn into_bits(self) -> u8 {
        self as u8
    }
}

/// Admin Queue Attributes (Base section 3.1.4.8, figure 44).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Aqa {
    /// Admin Submission Queue Size in entries, zero-based; 1 to 4095.
    #[bits(12)]
    pub asqs_z: u16,
    #[bits(4)]
    __: u8,
    /// Admin Completion Queue Size in entries, zero-based; 1 to 4095.
    #[bits(12)]
    pub acqs_z: u16,
    #[bits(4)]
    __: u8,
}

/// Controller Ready Timeouts, both in units of 500 ms (Base section 3.1.4.21, figure 57).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Crto {
    /// Controller Ready With Media Timeout.
    pub crwmt: u16,
    /// Controller Ready Independent of Media Timeout.
    pub crimt: u16,
}

/// The fewest entries an admin or I/O queue has (Base section 3.3.3.1).
pub const QUEUE_ENTRIES_MIN: u32 = 2;

/// The most entries an admin queue has (Base section 3.1.4.8, figure 44).
pub const ADMIN_QUEUE_ENTRIES_MAX: u32 = 4096;

/// Offset of the first doorbell register from the start of the register region (PCIe section 3.1.2, figure
/// 4).
pub const DOORBELL_BASE: u32 = 0x1000;

/// Offset of the Submission Queue `qid` Tail Doorbell from [`DOORBELL_BASE`], in bytes, under the stride
/// CAP.DSTRD (PCIe section 3.1.2, figure 5).
#[must_use]
pub const fn submission_tail_doorbell(qid: u16, dstrd: u8) -> u32 {
    (2 * qid as u32) * (4 << dstrd)
}

/// Offset of the Completion Queue `qid` Head Doorbell from [`DOORBELL_BASE`], in bytes, under the stride
/// CAP.DSTRD (PCIe section 3.1.2, figure 6).
#[must_use]
pub const fn completion_head_doorbell(qid: u16, dstrd: u8) -> u32 {
    (2 * qid as u32 + 1) * (4 << dstrd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cap_fields_lie_where_the_specification_puts_them() {
        // A QEMU controller's CAP: MQES 2047, CQR, TO 15, CSS NVM and IOCS, MPSMAX 4, CMBS.
        let cap = Cap::from(0x0240_0820_0F01_07FF | 1 << 43);
        assert_eq!(cap.mqes_z(), 2047);
        assert!(cap.cqr());
        assert_eq!(cap.to(), 15);
        assert_eq!(cap.dstrd(), 0);
        assert!(cap.css().nvm() == (u64::from(cap) >> 37 & 1 == 1));
        assert_eq!(u64::from(Cap::new().with_mpsmin(3)), 3 << 48);
        assert_eq!(u64::from(Cap::new().with_mpsmax(3)), 3 << 52);
        assert_eq!(u64::from(Cap::new().with_crms(3)), 3 << 59);
        assert_eq!(u64::from(Cap::new().with_css(CapCss::new().with_noiocs(true))), 1 << 44);
    }

    #[test]
    fn cc_and_csts_fields_lie_where_the_specification_puts_them() {
        let cc = Cc::new().with_en(true).with_iosqes(6).with_iocqes(4).with_shn(Shn::Normal);
        assert_eq!(u32::from(cc), 1 | 6 << 16 | 4 << 20 | 1 << 14);
        let csts = Csts::from(0b1001);
        assert!(csts.rdy() && !csts.cfs());
        assert_eq!(csts.shst(), Shst::Complete);
    }

    #[test]
    fn aqa_holds_both_sizes_zero_based() {
        let aqa = Aqa::new().with_asqs_z(31).with_acqs_z(63);
        assert_eq!(u32::from(aqa), 31 | 63 << 16);
    }

    #[test]
    fn doorbells_alternate_tail_and_head_at_the_stride() {
        assert_eq!(submission_tail_doorbell(0, 0), 0);
        assert_eq!(completion_head_doorbell(0, 0), 4);
        assert_eq!(submission_tail_doorbell(3, 0), 24);
        assert_eq!(completion_head_doorbell(3, 2), 7 * 16);
    }
}
