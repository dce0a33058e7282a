//! redb on a mapping: a storage backend for the [redb](https://docs.rs/redb) database engine.
//!
//! ```
//! use foliant::{Engine, EngineOptions, MappingOptions, redb_storage::MappingBackend};
//! use redb::{ReadableDatabase, TableDefinition};
//!
//! const TABLE: TableDefinition<&str, u64> = TableDefinition::new("numbers");
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let engine = Engine::open("emu:ram?size=64MiB", &EngineOptions::default())?;
//! let backend = MappingBackend::open(engine.mapping(&MappingOptions::default())?)?;
//! let database = redb::Database::builder().create_with_backend(backend)?;
//!
//! let write = database.begin_write()?;
//! write.open_table(TABLE)?.insert("answer", 42)?;
//! write.commit()?; // durable on the device
//!
//! let read = database.begin_read()?;
//! assert_eq!(read.open_table(TABLE)?.get("answer")?.unwrap().value(), 42);
//! # drop(read);
//! # drop(database);
//! # engine.close()?;
//! # Ok(())
//! # }
//! ```
//!
//! # Layout
//!
//! The mapping's first page is the header, in which the length of redb's storage is durable; redb's byte 0 is the
//! first byte of the second page. The header has two slots in sectors of their own, written in turn, so that a
//! length which is torn by a power cut leaves the one before:
//!
//! ```text
//! byte    0         8        16        24       32            512            1024     4096
//!         ┌─────────┬─────────┬─────────┬────────┬─────────────┬──────────────┬────────┐
//! page 0  │ magic   │ sequence│ length  │ crc64  │ zeros       │ second slot  │ zeros  │
//!         └─────────┴─────────┴─────────┴────────┴─────────────┴──────────────┴────────┘
//! ```
//!
//! All fields are little-endian; the checksum (CRC-64/NVME) is over the 24 bytes before it.
//!
//! A length is written only after what lies below it is durable: zeros where the storage grew, the data that was
//! written into it. After a power cut the storage therefore never shows bytes that were neither written nor
//! zeroed.

use std::io;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::PoisonError;

use crc_fast::{CrcAlgorithm, checksum};
use redb::StorageBackend;

use crate::cache::frames::PAGE_BYTES;
use crate::error::{Error, Result};
use crate::mapping::Mapping;

const HEADER_BYTES: u64 = PAGE_BYTES as u64;
const SLOT_BYTES: usize = 512;
const MAGIC: u64 = u64::from_le_bytes(*b"FOLIREDB");

/// A redb storage backend on a [`Mapping`]; see the [module's documentation](self).
///
/// It takes the mapping for itself: other handles must not write to it meanwhile. redb's `sync_data` is
/// [`Mapping::sync`], so a transaction that redb reports as committed is on the device.
#[derive(Debug)]
pub struct MappingBackend {
    mapping: Mapping,
    state: Mutex<Length>,
}

/// The storage's length, as it is and as it is on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Length {
    current: u64,
    durable: u64,
    /// Of the slot that holds `durable`; the next goes to the other slot.
    sequence: u64,
}

impl MappingBackend {
    /// Opens the storage on `mapping`, with the length that its header says. An all-zero header page is a new
    /// storage of length 0.
    ///
    /// # Errors
    /// [`Error::Mapping`] when the mapping is smaller than three pages, or its first page holds something else: it
    /// isn't overwritten. Errors of [`Mapping::read_at`].
    pub fn open(mapping: Mapping) -> Result<Self> {
        if mapping.len() < 3 * HEADER_BYTES {
            return Err(Error::Mapping {
                reason: format!(
                    "{} bytes are too few for a redb storage; it needs at least 12288",
                    mapping.len()
                ),
            });
        }
        let mut page = [0; PAGE_BYTES];
        mapping.read_at(0, &mut page)?;
        let slots = [parse_slot(&page[..SLOT_BYTES]), parse_slot(&page[SLOT_BYTES..2 * SLOT_BYTES])];
        let newest = slots.into_iter().flatten().max_by_key(|slot| slot.sequence);
        let limit = mapping.len() - HEADER_BYTES;
        let length = match newest {
            Some(slot) if slot.durable > limit => {
                return Err(Error::Mapping {
                    reason: format!(
                        "its redb storage has {} bytes, but the mapping holds only {limit}; open all of the range that \
                         it was made on",
                        slot.durable
                    ),
                });
            }
            Some(slot) => slot,
            None if page.iter().all(|&byte| byte == 0) => Length { current: 0, durable: 0, sequence: 0 },
            None => {
                return Err(Error::Mapping {
                    reason:
                        "its first page holds something that is neither zeros nor a redb storage of Foliant; \
                             discard the range first if it is no longer wanted"
                            .to_owned(),
                });
            }
        };
        Ok(Self { mapping, state: Mutex::new(length) })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Length> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mapping's offset of the storage's bytes `offset..offset + count`.
    fn place(&self, offset: u64, count: usize) -> io::Result<u64> {
        let length = self.lock().current;
        match offset.checked_add(count as u64) {
            Some(end) if end <= length => Ok(offset + HEADER_BYTES),
            _ => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!(
                    "bytes {offset}..{} lie past the storage's end at {length}",
                    offset.saturating_add(count as u64)
                ),
            )),
        }
    }

    /// Makes `range` of the storage read as zeros.
    fn zero(&self, range: Range<u64>) -> Result<()> {
        self.mapping.discard(range.start + HEADER_BYTES..range.end + HEADER_BYTES)
    }

    fn write_length(&self, length: &mut Length) -> Result<()> {
        let next = Length { durable: length.current, current: length.current, sequence: length.sequence + 1 };
        let offset = next.sequence % 2 * SLOT_BYTES as u64;
        self.mapping.write_at(offset, &format_slot(next))?;
        self.mapping.sync_range(0..HEADER_BYTES)?;
        *length = next;
        Ok(())
    }
}

fn format_slot(length: Length) -> [u8; 32] {
    let mut slot = [0; 32];
    slot[..8].copy_from_slice(&MAGIC.to_le_bytes());
    slot[8..16].copy_from_slice(&length.sequence.to_le_bytes());
    slot[16..24].copy_from_slice(&length.durable.to_le_bytes());
    let crc = checksum(CrcAlgorithm::Crc64Nvme, &slot[..24]);
    slot[24..].copy_from_slice(&crc.to_le_bytes());
    slot
}

fn parse_slot(slot: &[u8]) -> Option<Length> {
    let word = |at: usize| Some(u64::from_le_bytes(slot.get(at..at + 8)?.try_into().ok()?));
    let intact = word(0)? == MAGIC && word(24)? == checksum(CrcAlgorithm::Crc64Nvme, slot.get(..24)?);
    let length = word(16)?;
    intact.then_some(Length { current: length, durable: length, sequence: word(8)? })
}

impl StorageBackend for MappingBackend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().current)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let offset = self.place(offset, out.len())?;
        Ok(self.mapping.read_at(offset, out)?)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut length = self.lock();
        let limit = self.mapping.len() - HEADER_BYTES;
        if len > limit {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!(
                    "the database wants {len} bytes, but its mapping holds {limit}; open it on a larger one"
                ),
            ));
        }
        // What is beyond the old end may be anything: the device's old bytes, or what a shrink has left.
        if len > length.current {
            self.zero(length.current..len)?;
        }
        length.current = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.mapping.sync()?;
        let mut length = self.lock();
        if length.current != length.durable {
            self.write_length(&mut length)?;
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let offset = self.place(offset, data.len())?;
        Ok(self.mapping.write_at(offset, data)?)
    }

    fn close(&self) -> io::Result<()> {
        self.sync_data()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::{Engine, EngineOptions, MappingOptions};

    fn engine() -> Engine {
        Engine::open("emu:ram?size=16MiB", &EngineOptions { cache_bytes: 1 << 20, ..Default::default() })
            .unwrap()
    }

    fn backend(engine: &Engine) -> MappingBackend {
        MappingBackend::open(engine.mapping(&MappingOptions::default()).unwrap()).unwrap()
    }

    #[test]
    fn a_slot_that_was_torn_is_not_taken_for_one() {
        let length = Length { current: 77, durable: 77, sequence: 5 };
        let mut slot = format_slot(length);
        assert_eq!(parse_slot(&slot), Some(length));
        for byte in 0..slot.len() {
            slot[byte] ^= 1;
            assert_eq!(parse_slot(&slot), None, "byte {byte}");
            slot[byte] ^= 1;
        }
    }

    #[test]
    fn the_length_survives_reopening_and_alternates_slots() {
        let engine = engine();
        for length in [8192, 1 << 20, 4096] {
            let backend = backend(&engine);
            backend.set_len(length).unwrap();
            backend.sync_data().unwrap();
            drop(backend);
            assert_eq!(self::backend(&engine).len().unwrap(), length);
        }
    }

    #[test]
    fn growth_reads_as_zeros_though_the_device_and_an_earlier_length_held_other_bytes() {
        let engine = engine();
        let mapping = engine.mapping(&MappingOptions::default()).unwrap();
        mapping.write_at(HEADER_BYTES, &[0xAA; 100_000]).unwrap();
        let backend = backend(&engine);
        backend.set_len(50_000).unwrap();
        let mut bytes = vec![1; 50_000];
        backend.read(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|&byte| byte == 0));
        backend.write(0, &[7; 50_000]).unwrap();
        backend.set_len(10_000).unwrap();
        backend.set_len(50_000).unwrap();
        backend.read(0, &mut bytes).unwrap();
        assert!(bytes[..10_000].iter().all(|&byte| byte == 7));
        assert!(bytes[10_000..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_mapping_that_holds_something_else_is_refused_and_untouched() {
        let engine = engine();
        let mapping = engine.mapping(&MappingOptions::default()).unwrap();
        mapping.write_at(0, b"somebody's data").unwrap();
        let error = MappingBackend::open(mapping.clone()).unwrap_err().to_string();
        assert!(error.contains("neither zeros nor a redb storage"), "{error}");
        let mut bytes = [0; 15];
        mapping.read_at(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"somebody's data");
    }

    #[test]
    fn access_past_the_end_and_growth_past_the_mapping_are_errors() {
        let engine = engine();
        let backend = backend(&engine);
        backend.set_len(4096).unwrap();
        assert_eq!(backend.read(4000, &mut [0; 97]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(backend.write(u64::MAX, &[0]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(backend.set_len(16 << 20).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
