//! From readings of a stats page to what is shown: rates, ratios, percentiles, a row a shard and their sum.
//!
//! Counters become rates by the shard's own clock, between the two newest records that differ, so it doesn't matter when
//! the page is read. A shard that hasn't published anew keeps its figures, and counts as stalled after a while: one that
//! sleeps publishes once a second.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use foliant::{EngineState, LatencyHistogram, PAGE_BYTES, ShardRecord, StatsSnapshot};
use serde::Serialize;

use crate::latency::microseconds;
use crate::size::ByteSize;
use crate::table::{percent, ratio};

/// A shard that has published nothing for so long does nothing, though its process runs.
const STALLED_AFTER: Duration = Duration::from_secs(4);

/// What a shard does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Activity {
    /// It has published nothing yet.
    #[default]
    New,
    /// It was awake for a part of the time.
    Awake,
    /// It slept for almost all of the time.
    Asleep,
    /// It has published nothing for too long: nobody polls it, or its thread gets no processor.
    Stalled,
    /// It answers with errors only.
    Failed,
    /// Its process has ended.
    Ended,
}

impl Activity {
    const fn word(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Awake => "awake",
            Self::Asleep => "asleep",
            Self::Stalled => "stalled",
            Self::Failed => "FAILED",
            Self::Ended => "ended",
        }
    }
}

/// The figures of one shard, or of all. Rates are of the last interval; what is `None` there was nothing to measure of.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Row {
    pub(crate) activity: Activity,
    /// Share of the time that it slept.
    pub(crate) asleep: f64,
    pub(crate) hits_per_second: f64,
    /// Pages that somebody wanted and that weren't there.
    pub(crate) misses_per_second: f64,
    pub(crate) hit_ratio: f64,
    pub(crate) read_bytes_per_second: f64,
    pub(crate) written_bytes_per_second: f64,
    pub(crate) queue_depth: u64,
    pub(crate) requests_waiting: u64,
    pub(crate) dirty_pages: u64,
    pub(crate) writeback_pages: u64,
    pub(crate) poisoned_pages: u64,
    pub(crate) gated_pages: u64,
    pub(crate) free_frames: u64,
    pub(crate) frames: u64,
    pub(crate) dirty_limit_pages: u64,
    pub(crate) throttled_writers: u64,
    pub(crate) throttle_bytes_per_second: u64,
    pub(crate) command_errors: u64,
    pub(crate) read_wait: Quantiles,
    pub(crate) write_command: Quantiles,
    pub(crate) sync: Quantiles,
}

/// Percentiles of times of the last interval, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Quantiles {
    pub(crate) p50_us: Option<f64>,
    pub(crate) p99_us: Option<f64>,
}

impl Quantiles {
    fn of(times: &LatencyHistogram) -> Self {
        let at = |quantile| times.quantile_ns(quantile).map(|ns| ns as f64 / 1e3);
        Self { p50_us: at(0.5), p99_us: at(0.99) }
    }
}

/// All that is shown of an engine.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figures {
    pub(crate) page: PathBuf,
    pub(crate) pid: u32,
    pub(crate) program: String,
    pub(crate) device: String,
    pub(crate) is_running: bool,
    pub(crate) open_seconds: u64,
    pub(crate) total: Row,
    pub(crate) shards: Vec<Row>,
}

impl Figures {
    pub(crate) fn title(&self) -> String {
        let (program, pid, device) = (&self.program, self.pid, &self.device);
        let seconds = self.open_seconds;
        let since = match seconds {
            0..120 => format!("{seconds} s"),
            120..7200 => format!("{} min", seconds / 60),
            _ => format!("{} h", seconds / 3600),
        };
        let state = if self.is_running { format!("open for {since}") } else { "has ended".to_owned() };
        format!("{program} (process {pid}) on {device}, {state}")
    }
}

/// The times of an interval.
#[derive(Clone, Debug, Default)]
struct Times {
    read_wait: LatencyHistogram,
    write_command: LatencyHistogram,
    sync: LatencyHistogram,
}

/// What was read of one page.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    latest: Option<StatsSnapshot>,
    shards: Vec<WatchedShard>,
}

#[derive(Debug, Default)]
struct WatchedShard {
    record: Option<ShardRecord>,
    row: Row,
    times: Times,
    /// When its record was first seen.
    seen: Option<Instant>,
}

impl Watched {
    /// A reading of `now`.
    pub(crate) fn take(&mut self, snapshot: StatsSnapshot, now: Instant) {
        self.shards.resize_with(snapshot.shards.len(), WatchedShard::default);
        for (shard, record) in self.shards.iter_mut().zip(&snapshot.shards) {
            let Some(record) = record else { continue };
            let before = shard.record.as_ref();
            if before.is_none_or(|before| before.sequence != record.sequence) {
                (shard.row, shard.times) = measure(&snapshot, before, record);
                (shard.record, shard.seen) = (Some(record.clone()), Some(now));
            }
            let is_late = shard.seen.is_some_and(|seen| now.duration_since(seen) > STALLED_AFTER);
            shard.row.activity = match (snapshot.state, snapshot.value(record, "failed")) {
                (EngineState::Ended, _) => Activity::Ended,
                (_, Some(1..)) => Activity::Failed,
                _ if is_late => Activity::Stalled,
                _ if shard.row.asleep > 0.99 => Activity::Asleep,
                _ => Activity::Awake,
            };
        }
        self.latest = Some(snapshot);
    }

    /// What there is to show; `None` before any shard has published.
    pub(crate) fn figures(&self, page: &Path) -> Option<Figures> {
        let latest = self.latest.as_ref().filter(|latest| latest.shards.iter().any(Option::is_some))?;
        let rows: Vec<Row> = self.shards.iter().map(|shard| shard.row).collect();
        let mut times = Times::default();
        for shard in &self.shards {
            times.read_wait.add(&shard.times.read_wait);
            times.write_command.add(&shard.times.write_command);
            times.sync.add(&shard.times.sync);
        }
        let since_1970 =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Some(Figures {
            page: page.to_owned(),
            pid: latest.pid,
            program: latest.program.clone(),
            device: latest.device.clone(),
            is_running: latest.state == EngineState::Running,
            open_seconds: since_1970.as_secs().saturating_sub(latest.opened_unix_ns / 1_000_000_000),
            total: total(&rows, &times),
            shards: rows,
        })
    }
}

/// The figures of a shard from `before` to `now`; since its opening where there is no reading before.
fn measure(snapshot: &StatsSnapshot, before: Option<&ShardRecord>, now: &ShardRecord) -> (Row, Times) {
    let value = |name: &str| snapshot.value(now, name).unwrap_or(0);
    let earlier = |name: &str| before.and_then(|before| snapshot.value(before, name)).unwrap_or(0);
    let since = |name: &str| value(name).saturating_sub(earlier(name));
    let elapsed_ns = now.time_ns.saturating_sub(before.map_or(0, |before| before.time_ns)).max(1);
    let rate = |count: u64| count as f64 * 1e9 / elapsed_ns as f64;
    let bytes = |pages: u64| rate(pages) * PAGE_BYTES as f64;
    let times = |name: &str| {
        let now = snapshot.histogram(now, name).unwrap_or_default();
        match before.and_then(|before| snapshot.histogram(before, name)) {
            Some(before) => now.since(&before),
            None => now,
        }
    };
    let hits = since("read_hits") + since("write_hits");
    let wanted = since("pages_read").saturating_sub(since("readahead_pages"));
    let misses = wanted + since("pages_created");
    let times = Times {
        read_wait: times("read_wait_ns"),
        write_command: times("write_command_ns"),
        sync: times("sync_ns"),
    };
    let row = Row {
        activity: Activity::New,
        asleep: (since("slept_ns") as f64 / elapsed_ns as f64).min(1.0),
        hits_per_second: rate(hits),
        misses_per_second: rate(misses),
        hit_ratio: ratio(hits, hits + misses),
        read_bytes_per_second: bytes(since("pages_read")),
        written_bytes_per_second: bytes(since("pages_written")),
        queue_depth: value("queue_depth"),
        requests_waiting: value("requests_waiting"),
        dirty_pages: value("dirty_pages"),
        writeback_pages: value("writeback_pages"),
        poisoned_pages: value("poisoned_pages"),
        gated_pages: value("gated_pages"),
        free_frames: value("free_frames"),
        frames: value("frames"),
        dirty_limit_pages: value("dirty_limit_pages"),
        throttled_writers: value("throttled_writers"),
        throttle_bytes_per_second: value("throttle_bytes_per_second"),
        command_errors: value("command_errors"),
        read_wait: Quantiles::of(&times.read_wait),
        write_command: Quantiles::of(&times.write_command),
        sync: Quantiles::of(&times.sync),
    };
    (row, times)
}

/// All shards together: sums, and what follows from them.
fn total(rows: &[Row], times: &Times) -> Row {
    let sum = |of: fn(&Row) -> u64| rows.iter().map(of).sum();
    let sum_of_rates = |of: fn(&Row) -> f64| rows.iter().map(of).sum::<f64>();
    let hits_per_second = sum_of_rates(|row| row.hits_per_second);
    let misses_per_second = sum_of_rates(|row| row.misses_per_second);
    let accesses = hits_per_second + misses_per_second;
    // The least usual that any shard is in.
    let rank = |activity: Activity| match activity {
        Activity::New => 0,
        Activity::Asleep => 1,
        Activity::Awake => 2,
        Activity::Stalled => 3,
        Activity::Failed => 4,
        Activity::Ended => 5,
    };
    Row {
        activity: rows.iter().map(|row| row.activity).max_by_key(|row| rank(*row)).unwrap_or_default(),
        asleep: sum_of_rates(|row| row.asleep) / rows.len().max(1) as f64,
        hits_per_second,
        misses_per_second,
        hit_ratio: if accesses > 0.0 { hits_per_second / accesses } else { 0.0 },
        read_bytes_per_second: sum_of_rates(|row| row.read_bytes_per_second),
        written_bytes_per_second: sum_of_rates(|row| row.written_bytes_per_second),
        queue_depth: sum(|row| row.queue_depth),
        requests_waiting: sum(|row| row.requests_waiting),
        dirty_pages: sum(|row| row.dirty_pages),
        writeback_pages: sum(|row| row.writeback_pages),
        poisoned_pages: sum(|row| row.poisoned_pages),
        gated_pages: sum(|row| row.gated_pages),
        free_frames: sum(|row| row.free_frames),
        frames: sum(|row| row.frames),
        dirty_limit_pages: sum(|row| row.dirty_limit_pages),
        throttled_writers: sum(|row| row.throttled_writers),
        throttle_bytes_per_second: sum(|row| row.throttle_bytes_per_second),
        command_errors: sum(|row| row.command_errors),
        read_wait: Quantiles::of(&times.read_wait),
        write_command: Quantiles::of(&times.write_command),
        sync: Quantiles::of(&times.sync),
    }
}

/// The names of the columns.
pub(crate) const COLUMNS: [&str; 15] = [
    "shard",
    "state",
    "hits/s",
    "miss/s",
    "hit %",
    "depth",
    "wait",
    "dirty",
    "wrback",
    "gated",
    "free",
    "throttle",
    "read p50/p99",
    "write p50/p99",
    "sync p50/p99",
];

/// A row's cells, one a column.
pub(crate) fn cells(name: &str, row: &Row) -> [String; 15] {
    let activity = match row.activity {
        Activity::Awake => format!("{:.0} %", (1.0 - row.asleep) * 100.0),
        activity => activity.word().to_owned(),
    };
    let throttle = match (row.throttled_writers, row.throttle_bytes_per_second) {
        (0, 0) => "-".to_owned(),
        (waiting, rate) => format!("{waiting} @ {}/s", ByteSize(rate)),
    };
    let quantiles = |quantiles: Quantiles| match (quantiles.p50_us, quantiles.p99_us) {
        (Some(p50), Some(p99)) => format!("{} / {}", microseconds(p50), microseconds(p99)),
        _ => "-".to_owned(),
    };
    let accesses = row.hits_per_second + row.misses_per_second;
    [
        name.to_owned(),
        activity,
        short(row.hits_per_second),
        short(row.misses_per_second),
        if accesses > 0.0 { percent(row.hit_ratio) } else { "-".to_owned() },
        row.queue_depth.to_string(),
        row.requests_waiting.to_string(),
        short(row.dirty_pages as f64),
        short(row.writeback_pages as f64),
        short(row.gated_pages as f64),
        short(row.free_frames as f64),
        throttle,
        quantiles(row.read_wait),
        quantiles(row.write_command),
        quantiles(row.sync),
    ]
}

/// All rows' cells: a row a shard, and the sum of all.
pub(crate) fn all_cells(figures: &Figures) -> Vec<[String; 15]> {
    let shards = figures.shards.iter().enumerate().map(|(number, row)| cells(&number.to_string(), row));
    shards.chain(std::iter::once(cells("all", &figures.total))).collect()
}

/// As a table of lines, columns aligned.
pub(crate) fn lines(figures: &Figures) -> Vec<String> {
    let rows = all_cells(figures);
    let header = COLUMNS.map(str::to_owned);
    let all: Vec<&[String; 15]> = std::iter::once(&header).chain(&rows).collect();
    let widths: Vec<usize> = (0..COLUMNS.len())
        .map(|column| all.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    let line = |row: &&[String; 15]| {
        let padded = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:>width$}"));
        padded.collect::<Vec<_>>().join("  ")
    };
    let mut lines: Vec<String> = all.iter().map(line).collect();
    lines.push(throughput(&figures.total));
    lines
}

/// What goes over the bus, and what went wrong, in a line.
pub(crate) fn throughput(total: &Row) -> String {
    let bytes = |rate: f64| ByteSize(rate as u64);
    let mut line = format!(
        "reads {}/s, writes {}/s, {} of {} pages may be dirty",
        bytes(total.read_bytes_per_second),
        bytes(total.written_bytes_per_second),
        total.dirty_limit_pages,
        total.frames
    );
    if total.poisoned_pages > 0 {
        line += &format!(", {} can't be written", total.poisoned_pages);
    }
    if total.command_errors > 0 {
        line += &format!(", {} commands failed since it was opened", total.command_errors);
    }
    line
}

/// A number in at most five characters.
pub(crate) fn short(number: f64) -> String {
    match number {
        n if n < 9.95 && n.fract() > 0.0 => format!("{n:.1}"),
        n if n < 9_999.5 => format!("{n:.0}"),
        n if n < 999_500.0 => format!("{:.0}k", n / 1e3),
        n if n < 999_500_000.0 => format!("{:.1}M", n / 1e6),
        n => format!("{:.1}G", n / 1e9),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An engine of two shards, one at work and one asleep.
    pub(crate) fn figures() -> Figures {
        let busy = Row {
            activity: Activity::Awake,
            asleep: 0.25,
            hits_per_second: 1_234_567.0,
            misses_per_second: 4_321.0,
            hit_ratio: 0.9965,
            queue_depth: 17,
            dirty_pages: 800,
            writeback_pages: 64,
            gated_pages: 12,
            free_frames: 33,
            frames: 4096,
            dirty_limit_pages: 1638,
            throttled_writers: 3,
            throttle_bytes_per_second: 200 << 20,
            read_bytes_per_second: 17_000_000.0,
            read_wait: Quantiles { p50_us: Some(81.0), p99_us: Some(420.0) },
            ..Row::default()
        };
        let idle = Row {
            activity: Activity::Asleep,
            asleep: 1.0,
            frames: 4096,
            free_frames: 4096,
            ..Row::default()
        };
        let shards = vec![busy, idle];
        Figures {
            page: "/run/user/1000/foliant/7-0.stats".into(),
            pid: 7,
            program: "postgres".to_owned(),
            device: "vfio:0000:01:00.0".to_owned(),
            is_running: true,
            open_seconds: 7300,
            total: total(&shards, &Times::default()),
            shards,
        }
    }

    #[test]
    fn the_total_is_the_sum_of_all_shards() {
        let figures = figures();
        assert_eq!((figures.total.frames, figures.total.queue_depth), (8192, 17));
        assert!((figures.total.hit_ratio - 0.9965).abs() < 1e-4, "{figures:?}");
        assert_eq!(figures.total.activity, Activity::Awake);
    }

    #[test]
    fn a_shard_that_failed_is_seen_in_the_total() {
        let mut figures = figures();
        figures.shards[1].activity = Activity::Failed;
        assert_eq!(total(&figures.shards, &Times::default()).activity, Activity::Failed);
    }

    #[test]
    fn lines_are_aligned_and_name_what_each_column_is() {
        let lines = lines(&figures());
        assert_eq!(lines.len(), 5);
        let widths: Vec<usize> = lines[..4].iter().map(|line| line.chars().count()).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "{lines:#?}");
        assert!(lines[1].contains("1.2M") && lines[1].contains("75 %") && lines[1].contains("3 @ 200 MiB/s"));
        assert!(lines[2].contains("asleep"));
    }

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0"),
            (0.5, "0.5"),
            (10.0, "10"),
            (9_999.0, "9999"),
            (10_000.0, "10k"),
            (1_234_567.0, "1.2M"),
            (2e9, "2.0G"),
        ];
        for (number, text) in cases {
            assert_eq!(short(number), text);
        }
    }
}
