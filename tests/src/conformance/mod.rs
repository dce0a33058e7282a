//! One suite of claims about the driver and the controller beneath it, which runs unchanged on any controller: the
//! emulated one, QEMU's behind VFIO, or hardware.
//!
//! It owns the claims and their verdicts. It knows no kind of controller, injects no faults and looks at no medium;
//! what needs more than a conforming device is tested where there is such a device. What a device lacks makes a
//! case *not applicable*, and that is told, never counted as passed. Where controllers are known to differ,
//! `docs/conformance.md` says how and which is right.
//!
//! ```
//! use foliant_nvme::{ControllerOptions, Hugepages};
//! use foliant_nvme_emulated::{EmulatedConfig, EmulatedController};
//! use foliant_tests::conformance::{Bench, run_suite};
//!
//! let device = EmulatedController::new(EmulatedConfig::ram(16 << 20, 4096))?;
//! let options = ControllerOptions { hugepages: Hugepages::Never, ..Default::default() };
//! let mut bench = Bench::new(move || device.attach().expect("nobody else is attached"), options, 16 << 20)?;
//! let report = run_suite(&mut bench);
//! assert!(report.failed().is_empty());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A failed claim panics, which [`run_suite`] catches: a program that calls it must be built to unwind.

mod abandon;
mod bench;
mod cases;
mod deviation;
mod host;
mod pattern;
mod raw;
mod report;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

pub use bench::{AREA_BYTES_MIN, Bench, BenchError, Facts, Need};
pub use cases::{Topic, suite};
pub use deviation::Deviation;
pub use host::{Host, Load};
pub use report::{Outcome, Report, Verdict};

/// One claim.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// What is claimed, as a name.
    pub name: &'static str,
    /// What the device must offer for the claim to mean anything.
    pub needs: &'static [Need],
    /// Tries it; panics when it doesn't hold.
    pub run: fn(&Bench),
}

/// Runs the whole suite, as [`run_topics`] does.
pub fn run_suite(bench: &mut Bench) -> Report {
    run_topics(bench, Topic::ALL)
}

/// Runs the part of the suite that is about `topics`, and prints a line for each case as soon as it has ended, and one
/// for all at the end. What a line looks like is written on [`Outcome`] and [`Report`].
#[expect(clippy::print_stdout, reason = "where it runs there may be nothing but a console")]
pub fn run_topics(bench: &mut Bench, topics: &[Topic]) -> Report {
    let mut report = Report::default();
    for case in topics.iter().flat_map(|topic| topic.cases()) {
        let outcome = run_case(bench, case);
        println!("{outcome}");
        report.outcomes.push(outcome);
    }
    println!("{report}");
    report
}

/// Runs one case.
pub fn run_case(bench: &mut Bench, case: &Case) -> Outcome {
    let missing: Vec<_> = case.needs.iter().filter_map(|need| need.missing(bench.facts())).collect();
    let verdict = if missing.is_empty() {
        // A case leaves nothing in the bench but the deviations, which are taken either way.
        let result = catch_unwind(AssertUnwindSafe(|| (case.run)(bench)));
        match (result, bench.take_deviations()) {
            (Err(panic), _) => Verdict::Failed(message(&*panic)),
            (Ok(()), deviations) if deviations.is_empty() => Verdict::Passed,
            (Ok(()), deviations) => Verdict::Deviates(deviations),
        }
    } else {
        Verdict::NotApplicable(missing.join("; "))
    };
    Outcome { name: case.name, verdict }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without words")
        .to_owned()
}
