//! What a drive with a volatile cache may hold after a power loss: the model by which a log of writes is replayed.
//!
//! What was completed before the last flush is there. Of what was completed after it, each sector may have any of the
//! contents that it was given since, or still the one before: a cache writes back what it likes, in any order.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::write_log::{Entry, SECTOR, Source, WriteLog};

/// A drive, replayed up to some entry of its log.
#[derive(Clone, Debug)]
pub(crate) struct VolatileDrive<'a> {
    log: &'a WriteLog,
    durable: BTreeMap<u64, Source>,
    pending: Vec<(u64, Source)>,
}

impl<'a> VolatileDrive<'a> {
    /// The drive before the first entry: zeroes.
    pub(crate) fn new(log: &'a WriteLog) -> Self {
        Self { log, durable: BTreeMap::new(), pending: Vec::new() }
    }

    /// Replays one more entry.
    pub(crate) fn replay(&mut self, entry: Entry) {
        match entry {
            Entry::Flush => self.durable.extend(self.pending.drain(..)),
            Entry::Write { .. } | Entry::Discard { .. } => self.pending.extend(self.log.changes(entry)),
        }
    }

    /// What sectors were given since the last flush, in that order.
    pub(crate) fn pending(&self) -> &[(u64, Source)] {
        &self.pending
    }

    /// What may be left: of the pending sectors those that `survives` says, which is asked in their order.
    pub(crate) fn after_power_loss(&self, mut survives: impl FnMut(u64) -> bool) -> BTreeMap<u64, Source> {
        let mut left = self.durable.clone();
        left.extend(self.pending.iter().copied().filter(|(sector, _)| survives(*sector)));
        left
    }
}

/// Writes sectors to a new image of `size_bytes` bytes at `path`.
///
/// # Errors
/// The file system's.
pub(crate) fn write_image(
    log: &WriteLog,
    sectors: &BTreeMap<u64, Source>,
    path: &Path,
    size_bytes: u64,
) -> io::Result<()> {
    let file = File::create(path)?;
    file.set_len(size_bytes)?;
    let mut run: Vec<u8> = Vec::new();
    let mut begin = 0;
    for (&sector, &source) in sectors {
        if sector != begin + (run.len() / SECTOR) as u64 {
            file.write_all_at(&run, begin * SECTOR as u64)?;
            run.clear();
            begin = sector;
        }
        run.extend_from_slice(log.bytes(source));
    }
    file.write_all_at(&run, begin * SECTOR as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flushed_sectors_survive_and_of_the_others_those_that_are_chosen() {
        let log = WriteLog::default().write(1, &[1; 2 * SECTOR]).flush().write(2, &[2; 2 * SECTOR]);
        let mut drive = VolatileDrive::new(&log);
        log.entries().iter().for_each(|&entry| drive.replay(entry));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let left = |survives: fn(u64) -> bool| {
            write_image(&log, &drive.after_power_loss(survives), &path, 5 * SECTOR as u64).unwrap();
            std::fs::read(&path).unwrap().chunks(SECTOR).map(|sector| sector[0]).collect::<Vec<_>>()
        };
        assert_eq!(left(|_| false), [0, 1, 1, 0, 0]);
        assert_eq!(left(|sector| sector == 3), [0, 1, 1, 2, 0]);
        assert_eq!(left(|_| true), [0, 1, 2, 2, 0]);
    }
}
