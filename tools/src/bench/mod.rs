//! `foliant bench`: operations a second, bandwidth and latencies, of the driver alone or through the page cache.

mod cached;
mod raw;
mod workload;

use std::time::Duration;

use serde::Serialize;

use self::workload::Workload;
use crate::activity::CacheActivity;
use crate::cli::{BenchOptions, Pattern};
use crate::error::Error;
use crate::latency::{Latencies, Summary};
use crate::size::ByteSize;
use crate::stdout::{Format, Report, write_report};
use crate::table::{Table, count};
use crate::verdict::Verdict;

pub(crate) fn run(options: &BenchOptions) -> Result<Verdict, Error> {
    let target = &options.uri;
    if options.mix < 100 && !options.overwrite {
        target.require_empty("bench with writes")?;
    }
    let measured =
        if options.cached { cached::measure(options, target)? } else { raw::measure(options, target)? };
    write_report(&BenchReport::new(options, measured), Format::of(options.json))?;
    Ok(Verdict::Passed)
}

/// What a measurement found.
#[derive(Debug)]
struct Measured {
    workload: Workload,
    reads: u64,
    writes: u64,
    elapsed: Duration,
    latencies: Latencies,
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
    #[serde(skip)]
    bars: Vec<String>,
}

impl BenchReport {
    fn new(options: &BenchOptions, measured: Measured) -> Self {
        let Measured { workload, reads, writes, elapsed, latencies, doorbells, cache, shards } = measured;
        let seconds = elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
        let operations = reads + writes;
        let operations_per_second = operations as f64 / seconds;
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
            seconds,
            operations,
            reads,
            writes,
            operations_per_second,
            bytes_per_second: operations_per_second * workload.block_bytes as f64,
            commands_per_doorbell: doorbells.map(|doorbells| operations as f64 / doorbells.max(1) as f64),
            cache,
            latency: latencies.summary(),
            bars: latencies.bars(),
        }
    }
}

impl Report for BenchReport {
    fn table(&self) -> Table {
        let in_flight = match self.shards {
            Some(shards) => format!("{} threads, {shards} shards", self.depth),
            None => format!("{} accesses in flight", self.depth),
        };
        let mut table = Table::default()
            .section(format!("{} on {}", self.path, self.device))
            .row("accesses", {
                let (pattern, block, range) = (self.pattern, self.block_bytes, self.range_bytes);
                format!("{pattern}, {block} of {range}, {} % reads, {in_flight}", self.read_percent)
            })
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
        self.bars.iter().fold(table, |table, bar| table.line(bar))
    }
}
