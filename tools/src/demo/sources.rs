//! The files that the demo takes in, held in memory so that what comes back can be compared byte for byte.

use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::size::ByteSize;

/// All files together may have as many bytes: they are kept in memory, and again on the emulated device.
const TOTAL_BYTES_MAX: ByteSize = ByteSize(256 << 20);
/// What counts as a source of the checkout.
const SOURCE_EXTENSIONS: [&str; 4] = ["rs", "toml", "md", "sh"];

/// One file.
#[derive(Debug)]
pub(crate) struct Source {
    /// As it was named, with what isn't UTF-8 replaced.
    pub(crate) path: String,
    pub(crate) bytes: Vec<u8>,
}

/// Reads the files named, and everything in the directories named; without a name, the sources of the checkout that
/// this program was built from, else those in the working directory.
pub(crate) fn read_sources(named: &[PathBuf]) -> Result<Vec<Source>, Error> {
    let mut reader = Reader { sources: Vec::new(), total_bytes: 0 };
    if named.is_empty() {
        return read_checkout(reader);
    }
    for path in named {
        reader.read(path, &|_| true)?;
    }
    let looked = || {
        let named: Vec<String> = named.iter().map(|path| path.display().to_string()).collect();
        format!("there are none in {}", named.join(", "))
    };
    reader.finish(looked)
}

fn read_checkout(mut reader: Reader) -> Result<Vec<Source>, Error> {
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"));
    let checkout = if built_from.is_dir() { built_from } else { Path::new(".") };
    let is_source = |path: &Path| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|extension| SOURCE_EXTENSIONS.contains(&extension))
    };
    reader.read(checkout, &is_source)?;
    let root = format!("{}/", checkout.display());
    for source in &mut reader.sources {
        if let Some(path) = source.path.strip_prefix(&root) {
            source.path = path.to_owned();
        }
    }
    let wanted = SOURCE_EXTENSIONS.join(", ");
    reader.finish(|| format!("there are no sources ({wanted}) in {}", checkout.display()))
}

struct Reader {
    sources: Vec<Source>,
    total_bytes: u64,
}

impl Reader {
    /// Reads a file, or what `is_wanted` in a directory, by ascending name. Hidden entries, build directories and
    /// links in a directory are passed by.
    fn read(&mut self, path: &Path, is_wanted: &impl Fn(&Path) -> bool) -> Result<(), Error> {
        let metadata = std::fs::metadata(path).map_err(Error::file("read", path))?;
        if metadata.is_file() {
            return self.read_file(path, metadata.len());
        }
        if !metadata.is_dir() {
            return Err(Error::NotAFile { path: path.to_owned() });
        }
        let entries = std::fs::read_dir(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let mut entries = entries.map_err(Error::file("list", path))?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let (path, name) = (entry.path(), entry.file_name());
            let kind = entry.file_type().map_err(Error::file("inspect", &path))?;
            let is_passed_by =
                name.as_encoded_bytes().starts_with(b".") || (kind.is_dir() && name == "target");
            if !is_passed_by && (kind.is_dir() || (kind.is_file() && is_wanted(&path))) {
                self.read(&path, is_wanted)?;
            }
        }
        Ok(())
    }

    fn read_file(&mut self, path: &Path, len_bytes: u64) -> Result<(), Error> {
        // The length is looked at first, so that a file too large isn't read.
        self.check_total(len_bytes)?;
        let bytes = std::fs::read(path).map_err(Error::file("read", path))?;
        self.check_total(bytes.len() as u64)?;
        self.total_bytes += bytes.len() as u64;
        self.sources.push(Source { path: path.display().to_string(), bytes });
        Ok(())
    }

    fn check_total(&self, more_bytes: u64) -> Result<(), Error> {
        if self.total_bytes.saturating_add(more_bytes) > TOTAL_BYTES_MAX.0 {
            return Err(Error::SourcesTooLarge { limit: TOTAL_BYTES_MAX });
        }
        Ok(())
    }

    fn finish(self, looked: impl FnOnce() -> String) -> Result<Vec<Source>, Error> {
        if self.sources.is_empty() {
            return Err(Error::NoSources { looked: looked() });
        }
        Ok(self.sources)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checkout_has_sources_and_none_of_them_is_built() {
        let sources = read_sources(&[]).unwrap();
        assert!(sources.iter().any(|source| source.path == "tools/src/demo/sources.rs"));
        assert!(!sources.iter().any(|source| source.path.contains("target/")));
    }

    #[test]
    fn a_directory_gives_all_its_files_in_order() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("b")).unwrap();
        for (name, text) in [("b/2", "two"), ("a", "one"), ("c", "three"), (".hidden", "no")] {
            std::fs::write(directory.path().join(name), text).unwrap();
        }
        let sources = read_sources(&[directory.path().to_owned()]).unwrap();
        let texts: Vec<&[u8]> = sources.iter().map(|source| &*source.bytes).collect();
        assert_eq!(texts, [&b"one"[..], b"two", b"three"]);
    }

    #[test]
    fn what_cannot_be_taken_in_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let empty = read_sources(&[directory.path().to_owned()]).unwrap_err().to_string();
        assert!(empty.contains("no files to take in") && empty.contains("name files"), "{empty}");
        let missing = read_sources(&["/nowhere/at/all".into()]).unwrap_err().to_string();
        assert!(missing.contains("/nowhere/at/all"), "{missing}");
        let device = read_sources(&["/dev/null".into()]).unwrap_err().to_string();
        assert!(device.contains("/dev/null: neither a regular file"), "{device}");
    }

    #[test]
    fn files_too_large_are_refused_before_they_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("large");
        std::fs::File::create(&path).unwrap().set_len(TOTAL_BYTES_MAX.0 + 1).unwrap();
        let message = read_sources(&[path]).unwrap_err().to_string();
        assert!(message.contains("256 MiB"), "{message}");
    }
}
