//! A measurement as a document to show around: plots over time and over depth, the spread of latencies, and the
//! machine and drive that the figures belong to. It is one file that needs nothing else, and is readable on light
//! and on dark ground.
//!
//! `figures` draws, `page` and `sheet` put the drawings together as HTML and as one picture.

mod figures;
mod page;
mod sheet;

use std::path::{Path, PathBuf};
use std::str::FromStr;

pub(crate) use self::figures::STEPS_PER_OCTAVE;
use super::BenchReport;
use super::surroundings::Machine;
use super::timeline::Window;
use crate::error::Error;
use crate::reserved::Reserved;

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
pub(super) struct Findings<'a> {
    pub(super) bench: &'a BenchReport,
    pub(super) windows: &'a [Window],
    /// The spread of latencies: the ends of each step in microseconds, and how many accesses lie in it.
    pub(super) steps: Vec<(f64, f64, u64)>,
    pub(super) machine: &'a Machine,
    /// When the measurement was over, and by which command line and version it was made.
    pub(super) made: Vec<(&'static str, String)>,
}

impl Findings<'_> {
    /// What was measured, in a line.
    fn headline(&self) -> String {
        format!("{} on {}", self.bench.path, self.bench.device)
    }
}

impl ReportFile {
    /// Takes the report's place before anything is measured.
    pub(super) fn reserve(&self) -> Result<Reserved, Error> {
        Reserved::new(&self.path, "write the report")
    }

    /// The report.
    pub(super) fn draw(&self, findings: &Findings<'_>) -> Result<String, Error> {
        match self.document {
            Document::Html => page::html(findings),
            Document::Svg => sheet::svg(findings),
        }
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
}
