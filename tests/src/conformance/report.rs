//! What came of a run of the suite: a verdict a case, as lines that a program can read.

use std::fmt;

use super::deviation::Deviation;

/// How a case went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The claim holds.
    Passed,
    /// The claim holds of the driver, and the device departs from the specification in ways that are known.
    Deviates(Vec<Deviation>),
    /// The device lacks what the case needs. Nothing was tried.
    NotApplicable(String),
    /// The claim doesn't hold.
    Failed(String),
}

/// A case and how it went.
///
/// It prints as one line: the word `conformance`, the verdict (`passed`, `deviates`, `not-applicable` or `failed`),
/// the case's name, and, after a colon, the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The case's name.
    pub name: &'static str,
    /// How it went.
    pub verdict: Verdict,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name;
        match &self.verdict {
            Verdict::Passed => write!(f, "conformance passed {name}"),
            Verdict::Deviates(deviations) => {
                let names: Vec<_> = deviations.iter().map(|deviation| deviation.name()).collect();
                write!(f, "conformance deviates {name}: {}", names.join(", "))
            }
            Verdict::NotApplicable(reason) => write!(f, "conformance not-applicable {name}: {reason}"),
            // A line stays a line, whatever the message holds.
            Verdict::Failed(message) => {
                write!(f, "conformance failed {name}: {}", message.replace(['\n', '\r'], " "))
            }
        }
    }
}

/// All cases and how they went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// One outcome a case, in the suite's order.
    pub outcomes: Vec<Outcome>,
}

impl Report {
    /// The cases that failed.
    #[must_use]
    pub fn failed(&self) -> Vec<&'static str> {
        self.names(|verdict| matches!(verdict, Verdict::Failed(_)))
    }

    /// The cases that didn't apply.
    #[must_use]
    pub fn not_applicable(&self) -> Vec<&'static str> {
        self.names(|verdict| matches!(verdict, Verdict::NotApplicable(_)))
    }

    /// Every departure from the specification that was met, once.
    #[must_use]
    pub fn deviations(&self) -> Vec<Deviation> {
        let mut met = Vec::new();
        for outcome in &self.outcomes {
            let Verdict::Deviates(deviations) = &outcome.verdict else { continue };
            met.extend(
                deviations.iter().copied().filter(|deviation| !met.contains(deviation)).collect::<Vec<_>>(),
            );
        }
        met
    }

    fn names(&self, is_wanted: impl Fn(&Verdict) -> bool) -> Vec<&'static str> {
        self.outcomes
            .iter()
            .filter(|outcome| is_wanted(&outcome.verdict))
            .map(|outcome| outcome.name)
            .collect()
    }
}

/// The last line of a run: `conformance summary:` and the number of each verdict.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |is_wanted: fn(&Verdict) -> bool| self.names(is_wanted).len();
        write!(
            f,
            "conformance summary: {} passed, {} deviate, {} not applicable, {} failed",
            count(|verdict| matches!(verdict, Verdict::Passed)),
            count(|verdict| matches!(verdict, Verdict::Deviates(_))),
            self.not_applicable().len(),
            self.failed().len(),
        )
    }
}
