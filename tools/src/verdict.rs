//! How a command ended that ran to its end.

use std::fmt;

use serde::Serialize;

/// Whether what a command verified is right. A command that verifies nothing passes when it gets to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    Passed,
    Failed,
}

impl Verdict {
    /// Passed if `failures` is empty.
    pub(crate) fn of<T>(failures: &[T]) -> Self {
        if failures.is_empty() { Self::Passed } else { Self::Failed }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passed => "PASSED",
            Self::Failed => "FAILED",
        })
    }
}
