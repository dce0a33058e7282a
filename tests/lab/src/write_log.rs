//! The log of QEMU's `blklogwrites`: every write, flush and discard that a drive completed, in order, with its data.
//!
//! The format is that of Linux's dm-log-writes, in sectors of 512 bytes, all numbers little-endian:
//!
//! ```text
//! byte     0          8         16         24         32        512
//! sector 0 │ magic    │ version │ entries  │ sector size        │
//! an entry │ sector   │ sectors │ flags    │ 0        │ zeroes  │ data, unless it's a discard
//! ```
//!
//! Sector 0 is written by flushes only, so it may be behind, or zeroes where nothing was flushed yet: the log is read up
//! to the first sector of zeroes where an entry would be. No entry consists of zeroes.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::Path;

use crate::error::{LabError, Result};

/// The unit of the log, and of the model of what survives.
pub(crate) const SECTOR: usize = 512;

const MAGIC: u64 = 0x006A_7366_7773_6872;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;

/// A log, in memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct WriteLog {
    entries: Vec<Entry>,
    data: Vec<u8>,
}

/// What a drive completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// A write of whole sectors.
    Write {
        /// The first sector.
        sector: u64,
        /// How many.
        sectors: u64,
        /// Where their data begin in the log.
        data: usize,
    },
    /// Sectors that read as zeroes from then on.
    Discard {
        /// The first sector.
        sector: u64,
        /// How many.
        sectors: u64,
    },
    /// What was completed before is durable.
    Flush,
}

/// Where a sector's bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// From this place in the log's data.
    Log(usize),
    /// They are zeroes.
    Zeroes,
}

impl WriteLog {
    /// Reads the log at `path`.
    ///
    /// # Errors
    /// When it can't be read, or isn't one.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let mut file = BufReader::new(File::open(path).map_err(LabError::io("open", path))?);
        let mut log = Self::default();
        let wrong = |reason: String| LabError::Unexpected { what: path.display().to_string(), reason };
        let mut header = [0; SECTOR];
        file.read_exact(&mut header).map_err(LabError::io("read", path))?;
        let is_header = word(&header, 0) == MAGIC && word(&header, 1) == 1;
        if !is_header && header.iter().any(|&byte| byte != 0) {
            return Err(wrong("it doesn't begin as a log of writes".into()));
        }
        loop {
            match file.read_exact(&mut header) {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(log),
                other => other.map_err(LabError::io("read", path))?,
            }
            if header.iter().all(|&byte| byte == 0) {
                return Ok(log);
            }
            let (sector, sectors, flags) = (word(&header, 0), word(&header, 1), word(&header, 2));
            let entry = match flags {
                FLUSH => Entry::Flush,
                DISCARD => Entry::Discard { sector, sectors },
                0 => {
                    let data = log.data.len();
                    log.data.resize(data + sectors as usize * SECTOR, 0);
                    file.read_exact(&mut log.data[data..]).map_err(LabError::io("read", path))?;
                    Entry::Write { sector, sectors, data }
                }
                flags => return Err(wrong(format!("entry {} has flags {flags:#x}", log.entries.len()))),
            };
            log.entries.push(entry);
        }
    }

    /// The entries, in the order in which they were completed.
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// How many of them are flushes.
    pub(crate) fn flushes(&self) -> usize {
        self.entries.iter().filter(|entry| **entry == Entry::Flush).count()
    }

    /// The same without flush number `left_out`, as if it had never been sent.
    pub(crate) fn without_flush(&self, left_out: usize) -> Self {
        let mut log = self.clone();
        let mut flushes = 0;
        log.entries.retain(|entry| {
            flushes += usize::from(*entry == Entry::Flush);
            *entry != Entry::Flush || flushes != left_out + 1
        });
        log
    }

    /// The sectors that an entry changes, each with where its new bytes are.
    pub(crate) fn changes(&self, entry: Entry) -> impl Iterator<Item = (u64, Source)> + use<> {
        let (sector, sectors, data) = match entry {
            Entry::Write { sector, sectors, data } => (sector, sectors, Some(data)),
            Entry::Discard { sector, sectors } => (sector, sectors, None),
            Entry::Flush => (0, 0, None),
        };
        let source =
            move |at: u64| data.map_or(Source::Zeroes, |data| Source::Log(data + at as usize * SECTOR));
        (0..sectors).map(move |at| (sector + at, source(at)))
    }

    /// The data of an entry; none but writes have any.
    pub(crate) fn data(&self, entry: Entry) -> &[u8] {
        match entry {
            Entry::Write { sectors, data, .. } => &self.data[data..][..sectors as usize * SECTOR],
            Entry::Discard { .. } | Entry::Flush => &[],
        }
    }

    /// The bytes of a sector.
    pub(crate) fn bytes(&self, source: Source) -> &[u8] {
        match source {
            Source::Log(at) => &self.data[at..][..SECTOR],
            Source::Zeroes => &[0; SECTOR],
        }
    }
}

#[cfg(test)]
impl WriteLog {
    /// The same with a write of whole sectors more.
    pub(crate) fn write(mut self, sector: u64, data: &[u8]) -> Self {
        assert!(data.len().is_multiple_of(SECTOR));
        let sectors = (data.len() / SECTOR) as u64;
        self.entries.push(Entry::Write { sector, sectors, data: self.data.len() });
        self.data.extend_from_slice(data);
        self
    }

    /// The same with a flush more.
    pub(crate) fn flush(mut self) -> Self {
        self.entries.push(Entry::Flush);
        self
    }
}

fn word(bytes: &[u8], index: usize) -> u64 {
    u64::from_le_bytes(bytes[index * 8..][..8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sector(words: &[u64]) -> Vec<u8> {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.resize(SECTOR, 0);
        bytes
    }

    #[test]
    fn a_log_is_read_beyond_what_its_first_sector_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut file = sector(&[MAGIC, 1, 1, 512]);
        file.extend(sector(&[7, 2, 0]));
        file.extend([1; SECTOR]);
        file.extend([2; SECTOR]);
        file.extend(sector(&[0, 0, FLUSH]));
        file.extend(sector(&[100, 8, DISCARD]));
        file.extend([0; 4 * SECTOR]);
        std::fs::write(&path, &file).unwrap();
        let log = WriteLog::read(&path).unwrap();
        assert_eq!(log.entries().len(), 3);
        let changes: Vec<_> = log.changes(log.entries()[0]).collect();
        assert_eq!(changes, [(7, Source::Log(0)), (8, Source::Log(SECTOR))]);
        assert_eq!(log.bytes(changes[1].1), [2; SECTOR]);
        assert_eq!(log.entries()[2], Entry::Discard { sector: 100, sectors: 8 });
        assert_eq!(
            (log.flushes(), log.without_flush(0).flushes(), log.without_flush(1).flushes()),
            (1, 0, 1)
        );

        file[SECTOR + 16] = 64;
        std::fs::write(&path, &file).unwrap();
        assert!(WriteLog::read(&path).unwrap_err().to_string().contains("0x40"));
    }
}
