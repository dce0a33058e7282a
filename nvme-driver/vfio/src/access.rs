//! Reading and writing a region of a device through its descriptor, with lengths and bounds checked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::uapi::RegionInfo;

/// A region of a device, by calls of the kernel.
#[derive(Debug)]
pub(crate) struct RegionAccess {
    device: File,
    offset: u64,
    len_bytes: u64,
}

impl RegionAccess {
    pub(crate) fn new(device: &File, info: &RegionInfo) -> io::Result<Self> {
        Ok(Self { device: device.try_clone()?, offset: info.offset, len_bytes: info.len_bytes })
    }

    pub(crate) fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    pub(crate) fn read_u16(&self, offset: u64) -> io::Result<u16> {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    pub(crate) fn write_u16(&self, offset: u64, value: u16) -> io::Result<()> {
        self.write(offset, &value.to_le_bytes())
    }

    pub(crate) fn read_u32(&self, offset: u64) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub(crate) fn write_u32(&self, offset: u64, value: u32) -> io::Result<()> {
        self.write(offset, &value.to_le_bytes())
    }

    /// A short read or write is an error: half a register is none.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.check(offset, bytes.len())?;
        match self.device.read_at(bytes, self.offset + offset)? {
            read if read == bytes.len() => Ok(()),
            read => Err(short("read", read, bytes.len())),
        }
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check(offset, bytes.len())?;
        match self.device.write_at(bytes, self.offset + offset)? {
            written if written == bytes.len() => Ok(()),
            written => Err(short("wrote", written, bytes.len())),
        }
    }

    fn check(&self, offset: u64, len: usize) -> io::Result<()> {
        if offset.checked_add(len as u64).is_some_and(|end| end <= self.len_bytes) {
            return Ok(());
        }
        let text = format!("{len} bytes at {offset:#x} lie outside the region of {} bytes", self.len_bytes);
        Err(io::Error::new(io::ErrorKind::InvalidInput, text))
    }
}

fn short(did: &str, got: usize, wanted: usize) -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        format!("the kernel {did} {got} of {wanted} bytes of a region"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_is_whole_and_within_the_region_or_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(256 + 4).unwrap();
        let info = RegionInfo { offset: 128, len_bytes: 256, mappable: Vec::new() };
        let region = RegionAccess::new(&file, &info).unwrap();
        region.write_u16(4, 0x0406).unwrap();
        assert_eq!(region.read_u16(4).unwrap(), 0x0406);
        assert_eq!(region.read_u32(254).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(region.write_u32(u64::MAX - 1, 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        // The file ends within the region, as a device that went away would.
        assert_eq!(region.read_u32(130).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
