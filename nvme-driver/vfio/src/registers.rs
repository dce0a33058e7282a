//! BAR 0: the controller's registers and doorbells, mapped as far as the kernel allows.
//!
//! The doorbells must be mapped, since the driver stores to them. The registers before them are mapped too on every
//! machine with pages of 4 KiB; where they aren't, the kernel reads and writes them for us.

use std::fs::File;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use foliant_nvme_transport::{Doorbells, TransportError};
use memmap2::{MmapOptions, MmapRaw};

use crate::access::RegionAccess;
use crate::uapi::{Area, RegionInfo};

/// Where the doorbells begin (NVMe over PCIe Transport, section 3.1).
const DOORBELLS: u64 = 0x1000;

/// A mapped part of the BAR.
#[derive(Debug)]
struct Window {
    /// Where it begins in the BAR.
    offset: u64,
    map: MmapRaw,
}

impl Window {
    fn end(&self) -> u64 {
        self.offset + self.map.len() as u64
    }

    /// The address of the 32-bit register at `offset` of the BAR, if it lies in this window.
    fn register(&self, offset: u64) -> Option<*mut u32> {
        let inside = offset.checked_sub(self.offset)?;
        let fits = offset.is_multiple_of(4) && inside + 4 <= self.map.len() as u64;
        fits.then(|| self.map.as_mut_ptr().wrapping_add(inside as usize).cast())
    }
}

/// The registers of one controller.
#[derive(Debug)]
pub(crate) struct RegisterBar {
    windows: Vec<Window>,
    access: RegionAccess,
}

impl RegisterBar {
    /// Maps what can be mapped of `info`, the BAR 0 of the device behind `device`.
    pub(crate) fn map(device: &File, info: &RegionInfo) -> Result<Self, String> {
        if info.len_bytes <= DOORBELLS {
            return Err(format!(
                "BAR 0 has {} bytes; registers and doorbells need more than {DOORBELLS}",
                info.len_bytes
            ));
        }
        let mut windows = Vec::new();
        for area in &info.mappable {
            let Area { offset, .. } = *area;
            let len = area.len_bytes.min(info.len_bytes.saturating_sub(offset));
            if len == 0 {
                continue;
            }
            let map = MmapOptions::new().offset(info.offset + offset).len(len as usize).map_raw(device);
            let map =
                map.map_err(|error| format!("cannot map {len} bytes at {offset:#x} of BAR 0: {error}"))?;
            windows.push(Window { offset, map });
        }
        let bar =
            Self { windows, access: RegionAccess::new(device, info).map_err(|error| error.to_string())? };
        if bar.doorbell_window().is_none() {
            return Err("the kernel doesn't let the doorbells (BAR 0 from 1000h on) be mapped; a driver that polls needs that".to_owned());
        }
        Ok(bar)
    }

    fn doorbell_window(&self) -> Option<&Window> {
        self.windows.iter().find(|window| window.register(DOORBELLS).is_some())
    }

    pub(crate) fn doorbells(&self) -> Doorbells {
        let window = self.doorbell_window().expect("`map` refuses a BAR without");
        let base = window.register(DOORBELLS).and_then(|register| NonNull::new(register.cast::<AtomicU32>()));
        let len = (window.end() - DOORBELLS).min(u64::from(u32::MAX)) as u32;
        // SAFETY: the window stays mapped as long as the transport that owns `self`, its pages are aligned, and
        // nothing but the driver's atomics and the device touches it from 1000h on.
        #[expect(unsafe_code, reason = "the transport vouches for the region that it mapped")]
        unsafe {
            Doorbells::new(base.expect("a mapping is never at address 0"), len)
        }
    }

    pub(crate) fn read(&self, offset: u32) -> Result<u32, TransportError> {
        self.check(offset)?;
        match self.windows.iter().find_map(|window| window.register(offset.into())) {
            // SAFETY: `register` checked that the register lies in a window that is mapped as long as `self`
            // lives and that it is aligned; a device register may be read at any time.
            #[expect(unsafe_code, reason = "a device register")]
            Some(register) => Ok(unsafe { register.read_volatile() }),
            None => self.access.read_u32(offset.into()).map_err(os("cannot read a register")),
        }
    }

    pub(crate) fn write(&self, offset: u32, value: u32) -> Result<(), TransportError> {
        self.check(offset)?;
        match self.windows.iter().find_map(|window| window.register(offset.into())) {
            // SAFETY: as in `read`; what a write does is the driver's business.
            #[expect(unsafe_code, reason = "a device register")]
            Some(register) => unsafe { register.write_volatile(value) },
            None => self.access.write_u32(offset.into(), value).map_err(os("cannot write a register"))?,
        }
        Ok(())
    }

    fn check(&self, offset: u32) -> Result<(), TransportError> {
        let len = self.access.len_bytes();
        if u64::from(offset) + 4 > len || !offset.is_multiple_of(4) {
            let len_bytes = len.min(u64::from(u32::MAX)) as u32;
            return Err(TransportError::RegisterOutOfRange { offset, len_bytes });
        }
        Ok(())
    }
}

fn os(what: &'static str) -> impl Fn(std::io::Error) -> TransportError {
    move |source| TransportError::Os { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A file in the place of a device, with a BAR of `len` bytes of which `mappable`, offsets and lengths, may be
    /// mapped.
    fn bar(len: u64, mappable: &[(u64, u64)]) -> Result<RegisterBar, String> {
        let mut file = tempfile::tempfile().unwrap();
        let words: Vec<u8> = (0..(4096 + len) / 4).flat_map(|word| (word as u32).to_ne_bytes()).collect();
        file.write_all(&words).unwrap();
        let mappable = mappable.iter().map(|&(offset, len_bytes)| Area { offset, len_bytes }).collect();
        RegisterBar::map(&file, &RegionInfo { offset: 4096, len_bytes: len, mappable })
    }

    #[test]
    fn registers_are_reached_mapped_or_not_and_only_within_the_bar() {
        for mappable in [(0, 0x4000), (0x1000, 0x1000)] {
            let bar = bar(0x4000, &[mappable]).unwrap();
            assert_eq!(bar.read(0x14).unwrap(), 1024 + 5);
            bar.write(0x14, 77).unwrap();
            assert_eq!(bar.read(0x14).unwrap(), 77);
            assert_eq!(bar.read(0x3FFC).unwrap(), 1024 + 0xFFF);
            for wrong in [0x4000, 0x3FFE, 0x15, u32::MAX] {
                assert!(
                    matches!(bar.read(wrong), Err(TransportError::RegisterOutOfRange { .. })),
                    "{wrong:#x}"
                );
                assert!(matches!(bar.write(wrong, 0), Err(TransportError::RegisterOutOfRange { .. })));
            }
        }
    }

    #[test]
    fn doorbells_end_where_their_window_ends() {
        let doorbells = bar(0x4000, &[(0, 0x2000), (0x3000, 0x1000)]).unwrap().doorbells();
        assert!(doorbells.register(0xFFC).is_some());
        assert!(doorbells.register(0x1000).is_none());
    }

    #[test]
    fn a_bar_whose_doorbells_cannot_be_mapped_is_refused() {
        assert!(bar(0x1000, &[(0, 0x1000)]).is_err());
        assert!(bar(0x4000, &[]).is_err());
        for mappable in [(0, 0x1000), (0x2000, 0x2000)] {
            assert!(bar(0x4000, &[mappable]).is_err(), "{mappable:?}");
        }
    }
}
