//! Why the lab could not be set up or run. What a scenario found is no error but a [`Verdict`](crate::Verdict).

use std::path::{Path, PathBuf};

/// The lab's errors.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// A program that the lab needs isn't there and could not be installed.
    #[error(
        "the guest lab needs the program `{program}`, of Debian's package `{package}`: {reason}. Install it, or run \
         the tests without the lab: tools/test.sh --no-guest"
    )]
    Program {
        /// What was looked for.
        program: String,
        /// The package that has it.
        package: String,
        /// Why it could not be installed.
        reason: String,
    },
    /// Packages could not be fetched.
    #[error(
        "the guest lab needs the packages `{packages}` from the distribution's sources: {reason}. Or run the tests \
         without the lab: tools/test.sh --no-guest"
    )]
    Packages {
        /// Which.
        packages: String,
        /// What went wrong.
        reason: String,
    },
    /// A command failed.
    #[error("`{command}` failed ({status}): {output}")]
    Command {
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// The last of what it said.
        output: String,
    },
    /// A file or directory of the lab could not be used.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// Something fetched or built isn't as expected.
    #[error("{what}: {reason}")]
    Unexpected {
        /// What was looked at.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// QEMU could not be spoken with.
    #[error("QEMU's monitor: {0}")]
    Monitor(String),
}

/// A result of the lab.
pub type Result<T> = std::result::Result<T, LabError>;

impl LabError {
    /// For `map_err`: an I/O error with what was tried on which path.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}
