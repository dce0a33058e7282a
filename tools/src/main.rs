//! The command `foliant`: what a newcomer tries first, and what an operator measures with.
//!
//! Each sub-command is a module with a `run` that returns a report and a [`Verdict`]; `cli` says what can be
//! asked for. Results go to standard output, as tables or with `--json` as one object; everything else (progress
//! bars, warnings, errors) goes to standard error. Nothing but this crate prints.
//!
//! | exit status | meaning |
//! |---|---|
//! | 0 | done, and whatever was to be verified is right |
//! | 1 | an error, or the verification failed |
//! | 2 | the command line can't be understood |

mod account;
mod activity;
mod bench;
mod bind;
mod cli;
mod columns;
mod demo;
mod devices;
mod doctor;
mod error;
mod identify;
mod image;
mod latency;
mod mirror;
mod plot;
mod progress;
mod replay;
mod reserved;
mod size;
mod stdout;
mod table;
mod target;
mod top;
mod trace;
mod verdict;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt, registry};

use crate::cli::{Cli, Command};
use crate::error::Error;
use crate::trace::Watch;
use crate::verdict::Verdict;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(cli.command.log_filter()));
    let log = fmt::layer()
        .with_writer(progress::LogWriter::new)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .with_target(false)
        .with_filter(filter);
    // Only who draws events pays for them.
    let watch = Watch::new();
    let is_watched = matches!(cli.command, Command::Trace(_));
    registry().with(log).with(is_watched.then(|| watch.layer())).init();
    match run(&cli.command, &watch) {
        Ok(Verdict::Passed) => ExitCode::SUCCESS,
        Ok(Verdict::Failed) => ExitCode::FAILURE,
        Err(error) => {
            // When standard error is closed, the exit status still tells.
            drop(writeln!(std::io::stderr(), "error: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command, watch: &Watch) -> Result<Verdict, Error> {
    match command {
        Command::Demo(options) => demo::run(options),
        Command::DemoWorker(options) => demo::worker::run(options),
        Command::Mirror(options) => mirror::run(&options.command),
        Command::Replay(options) => replay::run(options),
        Command::Trace(options) => trace::run(options, watch),
        Command::Top(options) => top::run(options),
        Command::Identify(options) => identify::run(options),
        Command::Bench(options) => bench::run(options),
        Command::Devices(options) => devices::run(options),
        Command::Bind(options) => bind::run_bind(options),
        Command::Unbind(options) => bind::run_unbind(options),
        Command::Doctor(options) => doctor::run(options),
    }
}
