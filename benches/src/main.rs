//! `versus`: Foliant beside its peers, a question a file.
//!
//! ```text
//! cargo run --release -p foliant-benches --bin versus -- QUESTION [--json] [--rounds N] [--quick] [--check]
//! ```
//!
//! Each question module measures and returns an [`Answer`]: tables, notes, and targets with their
//! verdicts. Only `report` prints. How the timing is done is told by [`measure`].

mod callgrind;
mod driver;
mod engine;
mod eviction;
mod hits;
mod latency;
mod machine;
mod measure;
mod metadata;
mod misses;
mod report;
mod scaling;
mod walk;
mod writeback;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};

use crate::machine::Machine;
use crate::measure::Effort;
use crate::report::{Answer, Output};

/// Measures Foliant beside its peers, in one run, as ratios.
#[derive(Debug, Parser)]
#[command(
    name = "versus",
    after_help = "Examples:\n  versus driver\n  versus hits --rounds 15\n  versus writeback --quick --json\n  versus scaling --plots target/plots\n  \
                  versus all --check"
)]
struct Arguments {
    /// What to measure.
    question: Question,
    /// Print one JSON object instead of tables.
    #[arg(long)]
    json: bool,
    /// Measured rounds; every figure is a median over them. The default depends on the question.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
    /// Fewer rounds and smaller data: a first look, not a figure to quote.
    #[arg(long)]
    quick: bool,
    /// Folder into which `scaling` draws its curves, as SVG.
    #[arg(long, value_name = "FOLDER")]
    plots: Option<PathBuf>,
    /// The one part of `scaling` to measure; all of them without it.
    #[arg(long)]
    part: Option<scaling::Part>,
    /// A trace of block requests that `eviction` replays: lines of `version,time,op,size,sector`, as libCacheSim publishes
    /// those of CloudPhysics.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Exit with status 1 when a target is missed, or could not be measured.
    #[arg(long)]
    check: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Question {
    /// 4 KiB reads through driver and emulated controller on one core; the driver's own instructions.
    Driver,
    /// Cache hits beside pread, mmap, cache crates and bare memory.
    Hits,
    /// Draining dirty pages beside the raw driver issuing the same commands; the number of commands.
    Writeback,
    /// Tagging and passes by the size of the file and the number of its dirty pages.
    Scaling,
    /// Reads and small syncs beside a flush at full speed.
    Latency,
    /// Reads that miss, one at a time and in batches, beside the raw driver.
    Misses,
    /// Bytes of metadata a cached page.
    Metadata,
    /// Hit ratios beside other policies of eviction, on synthetic loads and, with --trace, on a recorded one.
    Eviction,
    /// All of them, one after the other.
    All,
    /// What `driver` runs under callgrind.
    #[value(hide = true)]
    DriverCallgrind,
    /// What `scaling` runs under callgrind.
    #[value(hide = true)]
    ScalingCallgrind,
    /// What `misses` runs under callgrind.
    #[value(hide = true)]
    MissesCallgrind,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let effort = Effort { rounds: arguments.rounds.map(usize::from), quick: arguments.quick };
    let (plots, trace) = (arguments.plots.as_deref(), arguments.trace.as_deref());
    let answers = match arguments.question {
        Question::Driver => vec![driver::answer(effort)?],
        Question::Hits => vec![hits::answer(effort)?],
        Question::Writeback => vec![writeback::answer(effort)?],
        Question::Scaling => vec![scaling::answer(effort, plots, arguments.part)?],
        Question::Latency => vec![latency::answer(effort)?],
        Question::Misses => vec![misses::answer(effort)?],
        Question::Metadata => vec![metadata::answer()?],
        Question::Eviction => vec![eviction::answer(effort, trace)?],
        Question::All => {
            vec![
                driver::answer(effort)?,
                hits::answer(effort)?,
                writeback::answer(effort)?,
                scaling::answer(effort, plots, arguments.part)?,
                latency::answer(effort)?,
                misses::answer(effort)?,
                metadata::answer()?,
                eviction::answer(effort, trace)?,
            ]
        }
        Question::ScalingCallgrind => {
            scaling::run_measured_requests()?;
            return Ok(ExitCode::SUCCESS);
        }
        Question::DriverCallgrind => {
            callgrind::run_measured_reads()?;
            return Ok(ExitCode::SUCCESS);
        }
        Question::MissesCallgrind => {
            misses::instructions::run_counted()?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    let passed = answers.iter().all(Answer::meets_its_targets);
    let output = Output { machine: Machine::this()?, answers };
    if arguments.json {
        output.print_json()?
    } else {
        output.print_tables()
    }
    Ok(if arguments.check && !passed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
