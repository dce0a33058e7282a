//! A measurement as a document to show around: plots over time and over depth, the spread of latencies, and the
//! machine and drive that the figures belong to. It is one file that needs nothing else, and is readable on light
//! and on dark ground.
//!
//! `figures` draws, `colours` is what it draws with, `page` and `sheet` put the drawings together as HTML and as one
//! picture.

mod axis;
mod colours;
mod figures;
mod page;
mod sheet;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use tempfile::NamedTempFile;

pub(crate) use self::figures::STEPS_PER_OCTAVE;
use super::BenchReport;
use super::surroundings::Machine;
use super::timeline::Window;
use crate::error::Error;

/// What a report is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Document {
    Html,
    Svg,
}

/// Where a report goes; its ending says as what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReportFile {
    path: PathBuf,
    document: Document,
}

impl ReportFile {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl FromStr for ReportFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = PathBuf::from(text);
        let ending = path.extension().map(|ending| ending.to_ascii_lowercase());
        let document = match ending.as_ref().and_then(|ending| ending.to_str()) {
            Some("html" | "htm") => Document::Html,
            Some("svg") => Document::Svg,
            _ => return Err("a report is HTML or SVG; end the name in .html or .svg".to_owned()),
        };
        Ok(Self { path, document })
    }
}

/// Everything that a report tells.
#[derive(Debug)]
pub(crate) struct Findings<'a> {
    pub(crate) bench: &'a BenchReport,
    pub(crate) windows: &'a [Window],
    /// The spread of latencies: the ends of each step in microseconds, and how many accesses lie in it.
    pub(crate) steps: Vec<(f64, f64, u64)>,
    pub(crate) machine: &'a Machine,
    /// When the measurement was over, and by which command line and version it was made.
    pub(crate) made: Vec<(&'static str, String)>,
}

impl Findings<'_> {
    /// What was measured, in a line.
    fn headline(&self) -> String {
        format!("{} on {}", self.bench.path, self.bench.device)
    }
}

/// A report that is to come: its place is taken before anything is measured, so that a wrong path costs no time.
#[derive(Debug)]
pub(crate) struct Reserved {
    file: ReportFile,
    temporary: NamedTempFile,
}

impl Reserved {
    /// Takes the place. A file that is there is replaced only when the report is whole.
    pub(crate) fn new(file: &ReportFile) -> Result<Self, Error> {
        let path = &file.path;
        if path.is_dir() {
            let source = std::io::Error::from(std::io::ErrorKind::IsADirectory);
            return Err(Error::File { what: "write the report", path: path.clone(), source });
        }
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        // As readable as any file that the user makes.
        let everybody = std::fs::Permissions::from_mode(0o666);
        let temporary = tempfile::Builder::new()
            .prefix(".foliant-report-")
            .permissions(everybody)
            .tempfile_in(directory.unwrap_or(Path::new(".")))
            .map_err(Error::file("write the report", path))?;
        Ok(Self { file: file.clone(), temporary })
    }

    /// Writes the report.
    pub(crate) fn write(mut self, findings: &Findings<'_>) -> Result<(), Error> {
        let ReportFile { path, document } = self.file;
        let text = match document {
            Document::Html => page::html(findings)?,
            Document::Svg => sheet::svg(findings)?,
        };
        self.temporary.write_all(text.as_bytes()).map_err(Error::file("write the report", &path))?;
        self.temporary
            .persist(&path)
            .map_err(|error| error.error)
            .map_err(Error::file("write the report", &path))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ending_says_what_a_report_is() {
        let document = |text: &str| text.parse::<ReportFile>().map(|file| file.document);
        assert_eq!(document("a.html"), Ok(Document::Html));
        assert_eq!(document("dir.svg/a.HTM"), Ok(Document::Html));
        assert_eq!(document("a.svg"), Ok(Document::Svg));
        for text in ["report", "a.pdf", "html", ".svg", ""] {
            assert!(document(text).unwrap_err().contains(".html or .svg"), "{text}");
        }
    }

    #[test]
    fn a_report_that_is_never_written_leaves_what_was_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("old.html");
        std::fs::write(&path, "old").unwrap();
        drop(Reserved::new(&path.to_str().unwrap().parse().unwrap()).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
