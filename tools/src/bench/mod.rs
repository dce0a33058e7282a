//! `foliant bench`: operations a second, bandwidth and latencies, of the driver alone or through the page cache.

mod cached;
mod raw;
mod report;
mod surroundings;
mod timeline;
mod workload;

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

pub(crate) use self::report::ReportFile;
use self::report::{Findings, STEPS_PER_OCTAVE};
use self::surroundings::{Drive, Machine};
use self::timeline::Window;
use self::workload::{Load, Workload};
use crate::activity::CacheActivity;
use crate::cli::{BenchOptions, Pattern};
use crate::error::Error;
use crate::latency::{Latencies, Summary};
use crate::size::ByteSize;
use crate::stdout::{Format, Report, write_report};
use crate::table::{Table, count};
use crate::verdict::Verdict;

/// The depths of a sweep.
const SWEEP_DEPTHS: [u16; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
/// The longest time at one depth of a sweep.
const SWEEP_STEP_MAX: Duration = Duration::from_secs(10);

pub(crate) fn run(options: &BenchOptions) -> Result<Verdict, Error> {
    let target = &options.uri;
    if options.stats.page.is_some() && !options.cached {
        return Err(Error::Option {
            option: "--stats",
            value: "with --raw".to_owned(),
            reason: "the raw driver has no page cache to show; add --cached".to_owned(),
        });
    }
    if options.mix < 100 && !options.overwrite {
        target.require_empty("bench with writes")?;
    }
    let reserved = options.report.as_ref().map(|file| Ok::<_, Error>((file, file.reserve()?))).transpose()?;
    let machine = Machine::this();
    let depth = options.depth.unwrap_or(if options.cached { cached::DEPTH } else { raw::DEPTH });
    let duration = Duration::from_secs(options.seconds.into());
    let mut measured = measure(options, Load { depth, duration })?;
    let windows = std::mem::take(&mut measured.windows);
    let steps = measured.latencies.steps(STEPS_PER_OCTAVE);
    let sweep = if options.sweep || reserved.is_some() { sweep(options)? } else { Vec::new() };
    let report = BenchReport::new(options, measured, sweep);
    if let Some((file, reserved)) = reserved {
        let findings = Findings { bench: &report, windows: &windows, steps, machine: &machine, made: made() };
        reserved.write(&file.draw(&findings)?)?;
    }
    write_report(&report, Format::of(options.json))?;
    Ok(Verdict::Passed)
}

fn measure(options: &BenchOptions, load: Load) -> Result<Measured, Error> {
    let measure = if options.cached { cached::measure } else { raw::measure };
    measure(options, &options.uri, load)
}

/// Measures at every depth that there is memory for.
fn sweep(options: &BenchOptions) -> Result<Vec<SweepPoint>, Error> {
    let duration = (Duration::from_secs(options.seconds.into()) / 4).min(SWEEP_STEP_MAX);
    let depths = SWEEP_DEPTHS.into_iter().filter(|depth| options.cached || raw::has_buffers(options, *depth));
    depths.map(|depth| Ok(SweepPoint::new(&measure(options, Load { depth, duration })?))).collect()
}

/// By what, and when, a report was made.
fn made() -> Vec<(&'static str, String)> {
    let quoted = |argument: String| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
        if !argument.is_empty() && argument.chars().all(is_plain) {
            argument
        } else {
            format!("'{}'", argument.replace('\'', "'\\''"))
        }
    };
    let arguments = std::env::args().skip(1).map(quoted);
    let command: Vec<String> = std::iter::once("foliant".to_owned()).chain(arguments).collect();
    let now = jiff::Timestamp::now().round(jiff::Unit::Second).unwrap_or_else(|_| jiff::Timestamp::now());
    vec![
        ("command", command.join(" ")),
        ("foliant", env!("CARGO_PKG_VERSION").to_owned()),
        ("date", now.to_string()),
    ]
}

/// What a measurement found.
#[derive(Debug)]
struct Measured {
    workload: Workload,
    reads: u64,
    writes: u64,
    elapsed: Duration,
    latencies: Latencies,
    windows: Vec<Window>,
    drive: Drive,
    /// Submission doorbells, of the raw driver.
    doorbells: Option<u64>,
    /// Through the cache.
    cache: Option<CachedActivity>,
    /// Through the cache.
    shards: Option<usize>,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct CachedActivity {
    #[serde(flatten)]
    cache: CacheActivity,
    /// The sync after the measured time.
    last_sync_seconds: f64,
}

/// What was measured at one depth.
#[derive(Clone, Copy, Debug, Serialize)]
struct SweepPoint {
    depth: u16,
    operations_per_second: f64,
    bytes_per_second: f64,
    latency: Summary,
}

impl SweepPoint {
    fn new(measured: &Measured) -> Self {
        let operations_per_second = measured.operations_per_second();
        Self {
            depth: measured.workload.depth,
            operations_per_second,
            bytes_per_second: operations_per_second * measured.workload.block_bytes as f64,
            latency: measured.latencies.summary(),
        }
    }
}

impl Measured {
    fn operations_per_second(&self) -> f64 {
        (self.reads + self.writes) as f64 / self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE)
    }
}

#[derive(Debug, Serialize)]
struct BenchReport {
    device: String,
    path: &'static str,
    pattern: &'static str,
    read_percent: u8,
    block_bytes: ByteSize,
    range_bytes: ByteSize,
    depth: u16,
    shards: Option<usize>,
    seconds: f64,
    operations: u64,
    reads: u64,
    writes: u64,
    operations_per_second: f64,
    bytes_per_second: f64,
    commands_per_doorbell: Option<f64>,
    cache: Option<CachedActivity>,
    latency: Summary,
    drive: Drive,
    /// Where the report is.
    #[serde(skip_serializing_if = "Option::is_none")]
    report: Option<PathBuf>,
    /// One point a depth, where a sweep was asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    sweep: Vec<SweepPoint>,
    #[serde(skip)]
    bars: Vec<String>,
}

impl BenchReport {
    fn new(options: &BenchOptions, measured: Measured, sweep: Vec<SweepPoint>) -> Self {
        let operations_per_second = measured.operations_per_second();
        let Measured { workload, reads, writes, elapsed, latencies, drive, doorbells, cache, shards, .. } =
            measured;
        let operations = reads + writes;
        Self {
            device: options.uri.uri().to_owned(),
            path: if options.cached { "page cache" } else { "raw driver" },
            pattern: match workload.pattern {
                Pattern::Random => "random",
                Pattern::Sequential => "sequential",
            },
            read_percent: workload.read_percent,
            block_bytes: ByteSize(workload.block_bytes),
            range_bytes: ByteSize(workload.range_bytes),
            depth: workload.depth,
            shards,
            seconds: elapsed.as_secs_f64(),
            operations,
            reads,
            writes,
            operations_per_second,
            bytes_per_second: operations_per_second * workload.block_bytes as f64,
            commands_per_doorbell: doorbells.map(|doorbells| operations as f64 / doorbells.max(1) as f64),
            cache,
            latency: latencies.summary(),
            drive,
            report: options.report.as_ref().map(|file| file.path().to_owned()),
            sweep,
            bars: latencies.bars(),
        }
    }

    /// What was accessed, how, and how much at once.
    fn load(&self) -> String {
        let plural = |number: usize| if number == 1 { "" } else { "s" };
        let depth = self.depth;
        let in_flight = match self.shards {
            Some(shards) => {
                format!("{depth} thread{}, {shards} shard{}", plural(depth.into()), plural(shards))
            }
            None => format!("{depth} access{} in flight", if depth == 1 { "" } else { "es" }),
        };
        let (pattern, block, range) = (self.pattern, self.block_bytes, self.range_bytes);
        format!("{pattern}, {block} of {range}, {} % reads, {in_flight}", self.read_percent)
    }
}

impl Report for BenchReport {
    fn table(&self) -> Table {
        let mut table = Table::default()
            .section(format!("{} on {}", self.path, self.device))
            .row("accesses", self.load())
            .row("operations", {
                let [all, reads, writes] = [self.operations, self.reads, self.writes].map(count);
                format!("{all} in {:.2} s: {reads} reads, {writes} writes", self.seconds)
            })
            .row("operations a second", count(self.operations_per_second as u64))
            .row("bandwidth", format!("{}/s", ByteSize(self.bytes_per_second as u64)))
            .row("time an operation", {
                format!("{:.0} ns (elapsed / operations)", 1e9 / self.operations_per_second.max(1e-9))
            });
        if let Some(commands) = self.commands_per_doorbell {
            table = table.row("accesses a doorbell", format!("{commands:.1}"));
        }
        if let Some(activity) = &self.cache {
            table = activity.cache.rows(table);
            table = table.row("last sync", format!("{:.3} s", activity.last_sync_seconds));
        }
        table = table.section("latency of an access").row("percentiles", self.latency);
        table = self.bars.iter().fold(table, |table, bar| table.line(bar));
        if !self.sweep.is_empty() {
            table = self.sweep.iter().fold(table.section("over depth"), |table, point| {
                let (depth, rate) = (point.depth, count(point.operations_per_second as u64));
                table.row(format!("{depth} at once"), format!("{rate} a second; {}", point.latency))
            });
        }
        match &self.report {
            Some(path) => table.closing(format!("report: {}", path.display())),
            None => table,
        }
    }
}
