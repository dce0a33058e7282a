//! Many runs: seed after seed on a few threads, the first failure made small, and the coverage of what was run.

use std::fmt::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::rules::Coverage;
use super::{Violation, generate, regressions, run, shrink};

/// How many runs, or for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// The case of this seed alone.
    One(u64),
    /// Seeds from 0 on.
    Runs(u64),
    /// Seeds from this one on, for this time.
    For(u64, Duration),
}

impl Extent {
    /// What the environment asks for: `FOLIANT_SEED=n` reruns one, `FOLIANT_RUNS=n` runs so many, `FOLIANT_MINUTES=n` runs
    /// for a time, from a seed that is printed; else `runs`.
    ///
    /// # Panics
    /// When one of them isn't a number.
    #[must_use]
    pub fn from_environment(runs: u64) -> Self {
        let number = |name: &str| {
            std::env::var(name).ok().map(|value| {
                value.parse::<u64>().unwrap_or_else(|_| panic!("{name}={value}: a number is needed"))
            })
        };
        match (number("FOLIANT_SEED"), number("FOLIANT_RUNS"), number("FOLIANT_MINUTES")) {
            (Some(seed), ..) => Self::One(seed),
            (None, Some(runs), _) => Self::Runs(runs),
            (None, None, Some(minutes)) => {
                let now =
                    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
                Self::For(now.as_secs() << 20, Duration::from_secs(60 * minutes))
            }
            (None, None, None) => Self::Runs(runs),
        }
    }
}

/// Runs everything that failed once.
///
/// # Errors
/// What failed again, in words.
pub fn run_regressions() -> Result<(), String> {
    for (name, case) in regressions::all() {
        run(&case).map_err(|violation| format!("the regression {name} fails again: {violation}\n{case}"))?;
    }
    Ok(())
}

/// Runs cases by seed, on as many threads as the machine has processors, and counts what was covered.
///
/// # Errors
/// The smallest failing seed found, and its case made small, in words.
///
/// # Panics
/// When a thread can't be started.
pub fn run_seeds(extent: Extent) -> Result<Coverage, String> {
    let (first, count, limit) = match extent {
        Extent::One(seed) => (seed, 1, None),
        Extent::Runs(runs) => (0, runs, None),
        Extent::For(first, time) => (first, u64::MAX, Some(time)),
    };
    let (next, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let results: Mutex<(Coverage, Option<(u64, Violation)>)> = Mutex::default();
    let begun = Instant::now();
    let work = &|| {
        let mut coverage = Coverage::default();
        while !failed.load(Ordering::Relaxed) && limit.is_none_or(|limit| begun.elapsed() < limit) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                break;
            }
            let seed = first.wrapping_add(number);
            match run(&generate::case(seed)) {
                Ok(met) => coverage.add(&met),
                Err(violation) => {
                    failed.store(true, Ordering::Relaxed);
                    let mut results = results.lock().expect("no thread panics with it");
                    if results.1.as_ref().is_none_or(|(other, _)| seed < *other) {
                        results.1 = Some((seed, violation));
                    }
                }
            }
        }
        results.lock().expect("no thread panics with it").0.merge(&coverage);
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(count as usize);
    silently(|| {
        std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
        let (coverage, failure) = std::mem::take(&mut *results.lock().expect("no thread panics with it"));
        match failure {
            None => Ok(coverage),
            Some((seed, violation)) => Err(explain(seed, &violation, coverage.runs())),
        }
    })
}

/// A failing seed in words: what was broken, and the smallest case that breaks it.
fn explain(seed: u64, violation: &Violation, passed: u64) -> String {
    #[expect(clippy::print_stdout, reason = "to make it small takes a while")]
    {
        println!(
            "after {passed} runs that passed, FOLIANT_SEED={seed} breaks {violation}; it is made small now"
        );
    }
    let (small, shown) = shrink::shrink(&generate::case(seed), violation);
    let mut text = format!("after {passed} runs that passed, FOLIANT_SEED={seed} breaks {violation}\n");
    let _ = writeln!(
        text,
        "the smallest case found breaks {shown}\nfor tests/src/model/regressions.rs:\n\n{small}"
    );
    text
}

/// Keeps the messages of panics that are caught and told in other words from being printed.
fn silently<T>(work: impl FnOnce() -> T) -> T {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let result = work();
    std::panic::set_hook(hook);
    result
}
