//! The command `guest-lab`: the scenarios of the guest lab by hand, one or all, and a shell in its guest.
//!
//! `cargo test -p foliant-lab` runs the same scenarios as tests.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use foliant_lab::bench::{self, BenchOptions};
use foliant_lab::scenario::{self, Boot, RunFiles, RunOptions, Verdict};
use foliant_lab::{Echo, KernelNeed, shell};

/// Runs the VFIO path in QEMU guests: no hardware needed. QEMU, a guest kernel and what else is missing are fetched by
/// the distribution's package manager; guests boot in seconds and leave nothing behind.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:
  guest-lab list
  guest-lab run identify_matches_the_kernel_driver --verbose
  guest-lab run --all
  guest-lab bench --rounds 5
  guest-lab shell

Exit status: 0 every claim holds, 1 one doesn't or the lab can't be set up, 2 a wrong command line."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show all scenarios, by the boot that they share.
    List,
    /// Run scenarios, or all that a boot shares.
    Run(RunArguments),
    /// Compare the guest kernel's own NVMe driver with Foliant over VFIO, on one drive in one guest.
    Bench(BenchArguments),
    /// Open a shell in a guest with two NVMe controllers and the command foliant. `exit` powers it off.
    Shell(ShellArguments),
}

#[derive(Args, Debug)]
struct RunArguments {
    /// Names of scenarios or boots.
    #[arg(required_unless_present = "all")]
    names: Vec<String>,
    /// Run all.
    #[arg(long)]
    all: bool,
    /// Show all that the guest says.
    #[arg(long, short)]
    verbose: bool,
    /// Keep the run's images and logs.
    #[arg(long)]
    keep: bool,
}

#[derive(Args, Debug)]
struct BenchArguments {
    /// How often each side is measured; they take turns.
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds for each measurement of reads or writes.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// MiB that are written to the page cache and then made durable.
    #[arg(long, default_value_t = 64, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=256))]
    buffered: u64,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
    /// Show all that the guest says.
    #[arg(long, short)]
    verbose: bool,
}

#[derive(Args, Debug)]
struct ShellArguments {
    /// Take a newer kernel, with iommufd, whose VFIO modules are built on first use.
    #[arg(long)]
    iommufd: bool,
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    // What takes long the first time is told.
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .with_target(false)
        .init();
    let done = match command {
        Command::List => list(),
        Command::Run(arguments) => run(&arguments),
        Command::Bench(arguments) => bench(&arguments),
        Command::Shell(arguments) => shell(&arguments),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // When standard error is closed, the exit status still tells.
            drop(writeln!(std::io::stderr(), "error: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn shell(arguments: &ShellArguments) -> anyhow::Result<bool> {
    let [first, second] = shell::ADDRESSES;
    writeln!(
        std::io::stderr(),
        "NVMe controllers: {first} and {second}. Try: foliant devices; foliant bind {first}; foliant bench vfio:{first}"
    )?;
    shell::run(if arguments.iommufd { KernelNeed::Iommufd } else { KernelNeed::Groups })?;
    Ok(true)
}

fn list() -> anyhow::Result<bool> {
    let mut out = std::io::stdout().lock();
    for boot in foliant_lab::scenarios::all() {
        writeln!(out, "{}", boot.name)?;
        for claim in &boot.claims {
            writeln!(out, "  {}\n      {}", claim.name, claim.proves)?;
        }
    }
    Ok(true)
}

fn run(arguments: &RunArguments) -> anyhow::Result<bool> {
    let boots = chosen(arguments)?;
    let options = RunOptions {
        echo: if arguments.verbose { Echo::Show } else { Echo::Quiet },
        files: if arguments.keep { RunFiles::Keep } else { RunFiles::Remove },
    };
    let mut holds = true;
    for boot in &boots {
        let ran = scenario::run(boot, options);
        let mut out = std::io::stdout().lock();
        let report = match ran {
            Ok(report) => report,
            Err(error) => {
                holds = false;
                writeln!(out, "{}: could not be run: {error}", boot.name)?;
                continue;
            }
        };
        let (ready_s, total_s, cpu_s) = (report.ready_s, report.total_s, report.cpu_s);
        writeln!(
            out,
            "{}: ready after {ready_s:.1} s, off after {total_s:.1} s, {cpu_s:.1} s of processor time ({})",
            boot.name, report.platform
        )?;
        if let Some(warning) = report.warning() {
            writeln!(out, "  {warning}")?;
        }
        for (claim, verdict) in &report.verdicts {
            match verdict {
                Verdict::Holds => writeln!(out, "  holds  {claim}")?,
                Verdict::Fails(reason) => {
                    holds = false;
                    writeln!(out, "  FAILS  {claim}\n{reason}")?;
                }
            }
        }
        if arguments.keep {
            writeln!(out, "  files: {}", report.run.display())?;
        }
    }
    Ok(holds)
}

fn bench(arguments: &BenchArguments) -> anyhow::Result<bool> {
    let report = bench::run(&BenchOptions {
        rounds: arguments.rounds,
        seconds: arguments.seconds,
        buffered_mib: arguments.buffered,
        echo: if arguments.verbose { Echo::Show } else { Echo::Quiet },
    })?;
    let mut out = std::io::stdout().lock();
    if arguments.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        write!(out, "{report}")?;
    }
    Ok(true)
}

/// The boots that were asked for, each with the claims that were asked for.
fn chosen(arguments: &RunArguments) -> anyhow::Result<Vec<Boot>> {
    let mut boots = foliant_lab::scenarios::all();
    if arguments.all {
        return Ok(boots);
    }
    for name in &arguments.names {
        let known =
            boots.iter().any(|boot| boot.name == name || boot.claims.iter().any(|claim| claim.name == name));
        anyhow::ensure!(known, "there is no scenario {name:?}; `guest-lab list` shows all");
    }
    let asked = |name: &str| arguments.names.iter().any(|asked| asked == name);
    for boot in &mut boots {
        if !asked(boot.name) {
            boot.claims.retain(|claim| asked(claim.name));
        }
    }
    boots.retain(|boot| !boot.claims.is_empty());
    Ok(boots)
}
