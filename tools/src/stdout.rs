//! The one place that writes results to standard output.

use std::io::{ErrorKind, Write};

use serde::Serialize;

use crate::error::Error;
use crate::table::Table;

/// How results are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Tables and lines for people.
    Text,
    /// One JSON object, and nothing else.
    Json,
}

impl Format {
    pub(crate) fn of(json: bool) -> Self {
        if json { Self::Json } else { Self::Text }
    }
}

/// A result that can be written in both formats; as JSON it's the serialised value itself.
pub(crate) trait Report: Serialize {
    /// The result for people.
    fn table(&self) -> Table;
}

/// Writes a whole result.
pub(crate) fn write_report(report: &impl Report, format: Format) -> Result<(), Error> {
    match format {
        Format::Text => write_line(report.table().to_string().trim_end()),
        Format::Json => {
            let json = serde_json::to_string_pretty(report).map_err(|error| Error::Stdout(error.into()))?;
            write_line(&json)
        }
    }
}

/// Writes a line. A reader that has left, as in `foliant … | head -1`, is no error.
pub(crate) fn write_line(line: &str) -> Result<(), Error> {
    let mut stdout = std::io::stdout().lock();
    match writeln!(stdout, "{line}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Error::Stdout(error)),
        _ => Ok(()),
    }
}
