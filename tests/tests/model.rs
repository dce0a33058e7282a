//! The writeback contract against a plain model, with random operations, faults and power cuts
//! (`foliant_tests::model`).
//!
//! `FOLIANT_SEED=n` reruns one seed, `FOLIANT_RUNS=n` runs as many as that, `FOLIANT_MINUTES=n` runs for a time.

use foliant_tests::model::session::{Extent, run_regressions, run_seeds};

/// Runs unless the environment asks for another number: as many as every cell of the table needs with some to spare, and
/// below a minute in a debug build on two idle processors. `tools/nightly.sh` runs more.
const RUNS: u64 = 2_500;

#[test]
fn model_every_rule_holds_and_every_fault_meets_every_rule() {
    if let Err(failure) = run_regressions() {
        panic!("{failure}");
    }
    let extent = Extent::from_environment(RUNS);
    let begun = std::time::Instant::now();
    match run_seeds(extent) {
        Err(failure) => panic!("{failure}"),
        Ok(coverage) => report(extent, &coverage.to_string(), begun.elapsed(), &coverage.faults()),
    }
}

/// Prints the table, keeps it beside the build, and fails where a fault and a rule never met. One seed alone need not
/// reach everything.
fn report(extent: Extent, table: &str, took: std::time::Duration, unreached: &[String]) {
    #[expect(clippy::print_stdout, reason = "the run's figures are for who asked for them")]
    {
        println!("{extent:?} in {took:.1?}\n{table}");
    }
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("model-coverage.txt");
    std::fs::write(&path, table).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let counts = match extent {
        Extent::One(_) => false,
        Extent::Runs(runs) => runs >= RUNS,
        Extent::For(..) => true,
    };
    assert!(!counts || unreached.is_empty(), "{}", unreached.join("\n"));
}
