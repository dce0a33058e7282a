//! Departures from the specification that are known of controllers the suite has met.

use std::fmt;

/// A way in which a device departs from the specification and with which the driver lives.
///
/// A case that meets one notes it instead of failing; `docs/conformance.md` tells of each at length. A departure
/// that isn't listed here fails the case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Deviation {
    /// A log page that doesn't exist is refused as Invalid Field in Command, not as Invalid Log Page.
    LogPageStatus,
    /// The deletion of a completion queue that doesn't exist is refused as Completion Queue Invalid, not as Invalid
    /// Queue Identifier.
    QueueDeletionStatus,
    /// The state of the volatile write cache, which can't be saved, survives a reset of the controller.
    WriteCacheSurvivesReset,
}

impl Deviation {
    /// Every one that is known.
    pub const ALL: [Self; 3] =
        [Self::LogPageStatus, Self::QueueDeletionStatus, Self::WriteCacheSurvivesReset];

    /// The name by which reports and `docs/conformance.md` know it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::LogPageStatus => "log-page-status",
            Self::QueueDeletionStatus => "queue-deletion-status",
            Self::WriteCacheSurvivesReset => "write-cache-survives-reset",
        }
    }
}

impl fmt::Display for Deviation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_deviation_is_told_in_the_document() {
        let document = include_str!("../../../docs/conformance.md");
        for deviation in Deviation::ALL {
            assert!(
                document.contains(&format!("`{deviation}`")),
                "{deviation} is missing in docs/conformance.md"
            );
        }
    }
}
