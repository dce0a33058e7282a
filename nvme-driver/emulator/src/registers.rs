//! The controller's registers: what they read, and what may be written to them (Base section 3.1.4).
//!
//! This is state and rules only; what a write sets in motion is decided in [`attachment`](crate::attachment).

use foliant_nvme_spec::registers::{Aqa, Cap, CapCss, Cc, Csts, QUEUE_ENTRIES_MIN, Register, Vs};
use foliant_nvme_spec::{Command, Completion};

use crate::config::EmulatedConfig;
use crate::ring::{DSTRD, RingMemory};

/// The version implemented: 1.4, the last whose mandatory commands are the ones this controller has.
pub(crate) const VERSION: Vs = Vs::new().with_mjr(1).with_mnr(4);
/// CAP.TO: ready within 10 s. Enabling is immediate; a reset waits for what the kernel is still doing on the image.
const TIMEOUT_500MS: u8 = 20;

/// The writable registers, and the ones that follow from the configuration.
#[derive(Debug)]
pub(crate) struct RegisterFile {
    cap: Cap,
    pub(crate) cc: Cc,
    intms: u32,
    aqa: Aqa,
    asq: u64,
    acq: u64,
}

/// What a register write asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// Nothing beyond the new value, if that.
    Stored,
    /// CC changed from the value given.
    Configured { before: Cc },
}

impl RegisterFile {
    pub(crate) fn new(config: &EmulatedConfig) -> Self {
        let mqes_z = u16::try_from(config.queue_entries_max - 1).unwrap_or(u16::MAX);
        let cap = Cap::new()
            .with_mqes_z(mqes_z)
            .with_cqr(true)
            .with_to(TIMEOUT_500MS)
            .with_dstrd(DSTRD)
            .with_css(CapCss::new().with_nvm(true));
        Self { cap, cc: Cc::new(), intms: 0, aqa: Aqa::new(), asq: 0, acq: 0 }
    }

    /// The 32-bit half of the register space at `offset`; reserved registers read 0.
    pub(crate) fn read(&self, offset: u32, csts: Csts) -> u32 {
        let high = |value: u64| (value >> 32) as u32;
        match offset {
            o if o == Register::Cap.offset() => u64::from(self.cap) as u32,
            o if o == Register::Cap.offset() + 4 => high(self.cap.into()),
            o if o == Register::Vs.offset() => VERSION.into(),
            o if o == Register::Intms.offset() || o == Register::Intmc.offset() => self.intms,
            o if o == Register::Cc.offset() => self.cc.into(),
            o if o == Register::Csts.offset() => csts.into(),
            o if o == Register::Aqa.offset() => self.aqa.into(),
            o if o == Register::Asq.offset() => self.asq as u32,
            o if o == Register::Asq.offset() + 4 => high(self.asq),
            o if o == Register::Acq.offset() => self.acq as u32,
            o if o == Register::Acq.offset() + 4 => high(self.acq),
            _ => 0,
        }
    }

    /// Writes a 32-bit half; read-only and reserved registers keep their value.
    pub(crate) fn write(&mut self, offset: u32, value: u32) -> Written {
        // Queue addresses are page aligned: their low twelve bits are reserved and read 0.
        let low = |register: u64| register & !0xFFFF_FFFF | u64::from(value & !0xFFF);
        let high = |register: u64| register & 0xFFFF_FFFF | u64::from(value) << 32;
        match offset {
            o if o == Register::Intms.offset() => self.intms |= value,
            o if o == Register::Intmc.offset() => self.intms &= !value,
            o if o == Register::Aqa.offset() => self.aqa = value.into(),
            o if o == Register::Asq.offset() => self.asq = low(self.asq),
            o if o == Register::Asq.offset() + 4 => self.asq = high(self.asq),
            o if o == Register::Acq.offset() => self.acq = low(self.acq),
            o if o == Register::Acq.offset() + 4 => self.acq = high(self.acq),
            o if o == Register::Cc.offset() => {
                let before = self.cc;
                self.cc = value.into();
                return Written::Configured { before };
            }
            _ => {}
        }
        Written::Stored
    }

    /// The admin queues to enable with, or why that can't be done.
    pub(crate) fn admin_queues(&self) -> Result<(RingMemory, RingMemory), &'static str> {
        if self.cc.mps() != 0 {
            return Err("CC.MPS asks for a page size that CAP doesn't offer");
        }
        if self.cc.css() != 0 {
            return Err("CC.CSS asks for a command set that CAP doesn't offer");
        }
        if self.cc.ams() != 0 {
            return Err("CC.AMS asks for an arbitration that CAP doesn't offer");
        }
        let sq = RingMemory { iova: self.asq, entries: u32::from(self.aqa.asqs_z()) + 1 };
        let cq = RingMemory { iova: self.acq, entries: u32::from(self.aqa.acqs_z()) + 1 };
        if sq.entries < QUEUE_ENTRIES_MIN || cq.entries < QUEUE_ENTRIES_MIN {
            return Err("AQA gives an admin queue fewer than two entries");
        }
        Ok((sq, cq))
    }

    /// Whether CC gives the entry sizes of the NVM Command Set, which creating I/O queues needs.
    pub(crate) fn has_io_entry_sizes(cc: Cc) -> bool {
        cc.iosqes() == Command::SIZE_EXPONENT && cc.iocqes() == Completion::SIZE_EXPONENT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> RegisterFile {
        RegisterFile::new(&EmulatedConfig::null(1 << 30, 4096))
    }

    #[test]
    fn queue_addresses_are_written_in_halves_and_drop_their_offset() {
        let mut registers = registers();
        registers.write(Register::Asq.offset(), 0x1234_5FFF);
        registers.write(Register::Asq.offset() + 4, 7);
        assert_eq!(registers.read(Register::Asq.offset(), Csts::new()), 0x1234_5000);
        assert_eq!(registers.read(Register::Asq.offset() + 4, Csts::new()), 7);
    }

    #[test]
    fn read_only_registers_stay() {
        let mut registers = registers();
        let before: Vec<u32> = (0..64).map(|i| registers.read(i * 4, Csts::new())).collect();
        for register in [Register::Cap, Register::Vs, Register::Csts, Register::Cmbsz] {
            registers.write(register.offset(), u32::MAX);
        }
        let after: Vec<u32> = (0..64).map(|i| registers.read(i * 4, Csts::new())).collect();
        assert_eq!(before, after);
    }

    #[test]
    fn the_interrupt_mask_is_set_and_cleared_bit_by_bit() {
        let mut registers = registers();
        registers.write(Register::Intms.offset(), 0b1010);
        registers.write(Register::Intmc.offset(), 0b0010);
        assert_eq!(registers.read(Register::Intms.offset(), Csts::new()), 0b1000);
    }

    #[test]
    fn enabling_needs_admin_queues_of_two_entries_and_offered_settings() {
        let mut registers = registers();
        assert!(registers.admin_queues().is_err());
        registers.write(Register::Aqa.offset(), Aqa::new().with_asqs_z(1).with_acqs_z(1).into());
        assert!(registers.admin_queues().is_ok());
        for cc in [Cc::new().with_mps(1), Cc::new().with_css(7), Cc::new().with_ams(1)] {
            registers.write(Register::Cc.offset(), cc.into());
            assert!(registers.admin_queues().is_err());
        }
    }
}
