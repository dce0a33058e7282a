//! Every scenario of the lab as a test of its own, named for what it claims. Claims that share a boot share the run.

use std::sync::{Arc, OnceLock};

use foliant_lab::scenario::{self, Boot, Report, RunOptions, Verdict};
use libtest_mimic::{Arguments, Failed, Trial};

/// Guests at a time: software emulation uses a core each.
const GUESTS_MAX: usize = 2;

type Ran = Arc<OnceLock<Result<Report, String>>>;

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(arguments.test_threads.unwrap_or(GUESTS_MAX).min(GUESTS_MAX));
    let mut first = Vec::new();
    let mut others = Vec::new();
    for boot in foliant_lab::scenarios::all() {
        let (boot, ran) = (Arc::new(boot), Ran::default());
        for (number, claim) in boot.claims.iter().enumerate() {
            let (boot, ran) = (boot.clone(), ran.clone());
            let trial = Trial::test(claim.name, move || verdict(&boot, number, &ran));
            if number == 0 { first.push(trial) } else { others.push(trial) }
        }
    }
    // One claim of each boot first: boots then run beside each other instead of waiting for the same one.
    first.append(&mut others);
    libtest_mimic::run(&arguments, first).exit();
}

#[expect(clippy::print_stderr, reason = "a test says how long its boot took")]
fn verdict(boot: &Boot, number: usize, ran: &Ran) -> Result<(), Failed> {
    let report = ran.get_or_init(|| {
        let report = scenario::run(boot, RunOptions::default()).map_err(|error| error.to_string())?;
        eprintln!(
            "boot {}: {} claims, ready after {:.1} s, off after {:.1} s, {:.1} s of processor time ({})",
            boot.name,
            boot.claims.len(),
            report.ready_s,
            report.total_s,
            report.cpu_s,
            report.platform
        );
        if let Some(warning) = report.warning() {
            eprintln!("boot {}: {warning}", boot.name);
        }
        Ok(report)
    });
    match report {
        Err(error) => Err(error.into()),
        Ok(report) => match &report.verdicts[number].1 {
            Verdict::Holds => Ok(()),
            Verdict::Fails(reason) => Err(reason.into()),
        },
    }
}
