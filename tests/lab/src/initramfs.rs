//! The guest's first file system: a newc cpio archive, uncompressed, which the kernel unpacks fastest.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Cursor, Write};
use std::path::Path;

use cpio::newc;

use crate::error::{LabError, Result};

/// An archive that is being written.
pub(crate) struct Initramfs {
    out: BufWriter<File>,
    path: std::path::PathBuf,
    directories: std::collections::BTreeSet<String>,
    inode: u32,
}

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

impl Initramfs {
    /// Begins an archive at `path`.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(LabError::io("create", path))?;
        let out = BufWriter::new(file);
        Ok(Self { out, path: path.to_owned(), directories: Default::default(), inode: 0 })
    }

    /// Adds the file `host` as `/guest`, decompressed where its name ends in `.xz`, with the directories above it.
    pub(crate) fn add(&mut self, guest: &str, host: &Path) -> Result<()> {
        let read = LabError::io("read", host);
        if host.extension().is_some_and(|ending| ending == "xz") {
            let mut reader = BufReader::new(File::open(host).map_err(read)?);
            let mut bytes = Vec::new();
            lzma_rs::xz_decompress(&mut reader, &mut bytes).map_err(|error| LabError::Unexpected {
                what: host.display().to_string(),
                reason: format!("not an xz file: {error:?}"),
            })?;
            self.add_bytes(guest, &bytes)
        } else {
            self.add_bytes(guest, &fs::read(host).map_err(read)?)
        }
    }

    /// Adds a file of `bytes` as `/guest`.
    pub(crate) fn add_bytes(&mut self, guest: &str, bytes: &[u8]) -> Result<()> {
        self.add_parents(guest)?;
        self.entry(guest, PROGRAM, bytes)
    }

    /// Ends the archive.
    pub(crate) fn finish(self) -> Result<()> {
        let Self { out, path, .. } = self;
        let mut out = newc::trailer(out).map_err(LabError::io("write", &path))?;
        out.flush().map_err(LabError::io("write", &path))
    }

    fn add_parents(&mut self, guest: &str) -> Result<()> {
        for (at, _) in guest.match_indices('/') {
            let directory = &guest[..at];
            if self.directories.insert(directory.to_owned()) {
                self.entry(directory, DIRECTORY, &[])?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        let write = |error| LabError::io("write", &self.path)(error);
        let len_bytes = u32::try_from(bytes.len()).map_err(|_| LabError::Unexpected {
            what: name.into(),
            reason: "a file of an initramfs has less than 4 GiB".into(),
        })?;
        self.inode += 1;
        let builder = newc::Builder::new(name).mode(mode).ino(self.inode).nlink(1);
        let mut writer = builder.write(&mut self.out, len_bytes);
        std::io::copy(&mut Cursor::new(bytes), &mut writer).map_err(write)?;
        writer.finish().map(drop).map_err(write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_holds_files_and_the_directories_above_them_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("archive");
        let mut archive = Initramfs::create(&path).unwrap();
        archive.add_bytes("lab/a/one", b"1").unwrap();
        archive.add_bytes("lab/a/two", b"22").unwrap();
        archive.finish().unwrap();

        let mut file = File::open(&path).unwrap();
        let mut names = Vec::new();
        loop {
            let reader = newc::Reader::new(file).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            names.push((reader.entry().name().to_owned(), reader.entry().file_size()));
            file = reader.finish().unwrap();
        }
        let expected = [("lab", 0), ("lab/a", 0), ("lab/a/one", 1), ("lab/a/two", 2)];
        assert_eq!(names, expected.map(|(name, size)| (name.to_owned(), size)));
    }
}
