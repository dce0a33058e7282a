//! The place of a file that is to come: taken before anything is measured, so that a wrong path costs no time.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::Error;

/// A place that is taken. What is there is replaced only when the new file is whole.
#[derive(Debug)]
pub(crate) struct Reserved {
    path: PathBuf,
    /// What is to be written, for errors: `write the report`.
    what: &'static str,
    temporary: NamedTempFile,
}

impl Reserved {
    /// Takes the place.
    pub(crate) fn new(path: &Path, what: &'static str) -> Result<Self, Error> {
        if path.is_dir() {
            let source = std::io::Error::from(std::io::ErrorKind::IsADirectory);
            return Err(Error::File { what, path: path.to_owned(), source });
        }
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        // As readable as any file that the user makes.
        let everybody = std::fs::Permissions::from_mode(0o666);
        let temporary = tempfile::Builder::new()
            .prefix(".foliant-")
            .permissions(everybody)
            .tempfile_in(directory.unwrap_or(Path::new(".")))
            .map_err(Error::file(what, path))?;
        Ok(Self { path: path.to_owned(), what, temporary })
    }

    /// Writes the file.
    pub(crate) fn write(mut self, text: &str) -> Result<(), Error> {
        self.temporary.write_all(text.as_bytes()).map_err(Error::file(self.what, &self.path))?;
        let persisted = self.temporary.persist(&self.path).map_err(|error| error.error);
        persisted.map(drop).map_err(Error::file(self.what, &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_never_written_leaves_what_was_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("old.html");
        std::fs::write(&path, "old").unwrap();
        drop(Reserved::new(&path, "write the report").unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        Reserved::new(&path, "write the report").unwrap().write("new").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
