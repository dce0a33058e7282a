//! `foliant trace`: what writeback does while a workload runs, as a picture, and checked.
//!
//! 1. A [`Watch`] keeps the engine's events with their times.
//! 2. The [`demonstration`], or a block trace, runs through the page cache; its threads note what they dirty ([`dirty`]).
//! 3. The events become a [`history`] of passes, commands, doorbells and flushes.
//! 4. The [`check`] says whether it keeps the rules that the picture is to show.
//! 5. The [`picture`] is drawn.

mod check;
mod demonstration;
mod dirty;
mod happening;
mod history;
mod picture;
mod watch;

use std::path::{Path, PathBuf};
use std::time::Instant;

use foliant::{Engine, EngineOptions, EngineStats, Mapping, MappingOptions};
use serde::Serialize;

use self::check::Checked;
pub(crate) use self::dirty::DirtyLog;
use self::dirty::{Dirtied, dirty_spans};
use self::happening::Reason;
use self::history::History;
use self::picture::{RECTANGLES_MAX, Scene};
use self::watch::Seen;
pub(crate) use self::watch::Watch;
use crate::cli::TraceOptions;
use crate::error::Error;
use crate::progress::Progress;
use crate::replay::{Replay, Trace, Unwritten};
use crate::reserved::Reserved;
use crate::size::ByteSize;
use crate::stdout::{Format, Report, write_report};
use crate::table::{Table, count};
use crate::target::Target;
use crate::verdict::Verdict;

/// Threads that replay a trace.
const REPLAY_THREADS: u64 = 8;

/// Where the picture goes, if `text` is a name for one.
pub(crate) fn parse_out(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.extension() {
        Some(ending) if ending.eq_ignore_ascii_case("svg") => Ok(path),
        _ => Err("the picture is SVG; end the name in .svg".to_owned()),
    }
}

pub(crate) fn run(options: &TraceOptions, watch: &Watch) -> Result<Verdict, Error> {
    if !Watch::is_possible() {
        return Err(Error::NothingTraced {
            reason: "this program was built without trace events; build it without the features max_level_* and \
                     release_max_level_* of the crate tracing",
        });
    }
    let reserved = Reserved::new(&options.out, "write the picture")?;
    let workload = Workload::new(options)?;
    let run = workload.run(options, watch)?;
    let history = History::of(&run.seen.happenings);
    if history.writes().next().is_none() {
        return Err(run.failure.unwrap_or(Error::NothingTraced {
            reason: "nothing was written back during the run; choose a workload that writes",
        }));
    }
    let report = TraceReport::new(options, &workload, &run, &history);
    let spans = dirty_spans(&run.dirtied, &history);
    let drawn = picture::draw(&report.scene(&workload, &history, &spans))?;
    reserved.write(&drawn.svg)?;
    let picture = Picture {
        path: options.out.clone(),
        bytes: ByteSize(drawn.svg.len() as u64),
        rectangles: drawn.rectangles,
        rectangles_merged_from: drawn.rectangles_of,
    };
    let report = TraceReport { picture: Some(picture), ..report };
    write_report(&report, Format::of(options.json))?;
    // The picture of a run that failed is drawn all the same, since it's the one to look at.
    match run.failure {
        Some(error) => Err(error),
        None => Ok(report.verdict),
    }
}

/// What runs while it is watched, and on which device.
struct Workload {
    target: Target,
    options: EngineOptions,
    /// A trace to replay instead of the demonstration.
    trace: Option<Trace>,
    words: String,
}

/// A run that was watched.
struct Run {
    seen: Seen,
    dirtied: Vec<Dirtied>,
    dirtied_dropped: u64,
    /// What the engine counted meanwhile.
    counted: Counted,
    shards: usize,
    seconds: f64,
    failure: Option<Error>,
}

impl Workload {
    fn new(options: &TraceOptions) -> Result<Self, Error> {
        let trace = options.replay.as_deref().map(Trace::read).transpose()?;
        let default = match &trace {
            None => demonstration::DEVICE.to_owned(),
            Some(trace) => {
                let gibibytes = trace.end_bytes().div_ceil(1 << 30);
                format!("emu:ram?size={gibibytes}GiB&lba=512&read_latency_us=100&write_latency_us=100")
            }
        };
        let target = match &options.uri {
            Some(target) => target.clone(),
            None => default.parse().map_err(|reason| Error::Option {
                option: "the device",
                value: default,
                reason,
            })?,
        };
        let (engine_options, words) = match &trace {
            None => demonstration::options(options.cache, options.shards),
            Some(trace) => {
                let (cache_bytes, shards) = (options.cache.0, options.shards.into());
                let path = options.replay.as_deref().unwrap_or(Path::new("")).display();
                let words = format!(
                    "replay of {path}: {} requests from {REPLAY_THREADS} threads, as fast as it goes",
                    count(trace.requests.len() as u64)
                );
                (EngineOptions { cache_bytes, shards, ..EngineOptions::default() }, words)
            }
        };
        if !options.overwrite {
            target.require_empty("trace")?;
        }
        if let Some(trace) = &trace {
            trace.check_fits(target.namespace_bytes()?)?;
        }
        Ok(Self { target, options: engine_options, trace, words })
    }

    /// The mappings that the picture shows, and what is done in each.
    fn mappings(&self) -> Vec<(u16, String)> {
        match &self.trace {
            None => (0..).zip(demonstration::MAPPINGS.map(str::to_owned)).collect(),
            Some(_) => vec![(0, "the namespace: written by the replay".to_owned())],
        }
    }

    fn run(&self, options: &TraceOptions, watch: &Watch) -> Result<Run, Error> {
        let device = self.target.open()?;
        let engine = Engine::open_on(device.attach()?, &self.options)?;
        let mappings = match &self.trace {
            None => demonstration::mappings(&engine, self.target.uri())?,
            Some(_) => vec![engine.mapping(&MappingOptions::default())?],
        };
        // What was told while the engine was opened isn't the workload's.
        drop(watch.take());
        let before = Counted::of(&engine.stats());
        let dirtied = DirtyLog::new(watch);
        let begin = Instant::now();
        let result = match &self.trace {
            None => demonstration::run(&mappings, options.seed, &dirtied),
            Some(trace) => replay(trace, &mappings[0], &dirtied),
        };
        let seconds = begin.elapsed().as_secs_f64();
        let failure = result.err().map(|error| self.target.diagnose(error, mappings.first()));
        let counted = Counted::of(&engine.stats()).since(before);
        let seen = watch.take();
        let (dirtied, dirtied_dropped) = dirtied.into_notes();
        let shards = engine.shards();
        drop(mappings);
        let closed = engine.close();
        if failure.is_none() {
            closed?;
        }
        Ok(Run { seen, dirtied, dirtied_dropped, counted, shards, seconds, failure })
    }
}

fn replay(trace: &Trace, mapping: &Mapping, dirtied: &DirtyLog) -> Result<(), Error> {
    let progress = Progress::counting(trace.requests.len() as u64, "requests");
    progress.stage("replay");
    let (unwritten, lanes) = (Unwritten::Anything, REPLAY_THREADS);
    Replay { trace, mapping, unwritten, verify: false, lanes, dirtied: Some(dirtied) }.run(&progress)?;
    progress.stage("sync");
    Ok(mapping.sync()?)
}

/// Counters of the engine that events must agree with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Counted {
    write_commands: u64,
    pages_written: u64,
    read_commands: u64,
    flush_commands: u64,
    doorbells: u64,
    commands: u64,
}

impl Counted {
    fn of(stats: &EngineStats) -> Self {
        Self {
            write_commands: stats.write_commands,
            pages_written: stats.pages_written,
            read_commands: stats.read_commands,
            flush_commands: stats.flush_commands,
            doorbells: stats.doorbells,
            commands: stats.commands,
        }
    }

    fn since(self, before: Self) -> Self {
        Self {
            write_commands: self.write_commands - before.write_commands,
            pages_written: self.pages_written - before.pages_written,
            read_commands: self.read_commands - before.read_commands,
            flush_commands: self.flush_commands - before.flush_commands,
            doorbells: self.doorbells - before.doorbells,
            commands: self.commands - before.commands,
        }
    }

    /// The same from what was seen.
    fn seen(history: &History) -> Self {
        let writes = history.writes();
        Self {
            write_commands: writes.clone().count() as u64,
            pages_written: writes.map(|command| command.pages.end - command.pages.start).sum(),
            read_commands: history.reads().count() as u64,
            flush_commands: history.commits.len() as u64,
            doorbells: history.doorbells.len() as u64,
            commands: history.doorbells.iter().map(|doorbell| doorbell.commands).sum(),
        }
    }
}

#[derive(Debug, Serialize)]
struct TraceReport {
    device: String,
    workload: String,
    cache_bytes: ByteSize,
    shards: usize,
    seconds: f64,
    events: Events,
    passes: Passes,
    /// What was seen.
    seen: Counted,
    /// What the engine counted, which is the same unless events were dropped.
    counted: Counted,
    syncs: u64,
    /// Syncs that the flushes served.
    syncs_committed: u64,
    writes_failed: u64,
    pages_evicted: u64,
    checks: Checked,
    /// What ended the workload early.
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<String>,
    verdict: Verdict,
    /// Where the picture is.
    picture: Option<Picture>,
}

#[derive(Debug, Serialize)]
struct Events {
    seen: u64,
    /// Events that found no room; they are the last ones.
    dropped: u64,
    /// Notes of dirtied pages that found no room.
    dirty_notes_dropped: u64,
}

#[derive(Debug, Serialize)]
struct Passes {
    total: u64,
    /// By reason, those that there were.
    reasons: Vec<(&'static str, u64)>,
    /// Passes that wrote nothing.
    idle: u64,
}

#[derive(Debug, Serialize)]
struct Picture {
    path: PathBuf,
    bytes: ByteSize,
    rectangles: usize,
    /// How many they were before neighbours were merged.
    rectangles_merged_from: usize,
}

impl Passes {
    fn of(history: &History) -> Self {
        let all = [
            Reason::Sync,
            Reason::DirtyLimit,
            Reason::Reclaim,
            Reason::Expiry,
            Reason::Close,
            Reason::Caller,
            Reason::Poisoned,
            Reason::Other,
        ];
        let of = |reason| history.passes.iter().filter(|pass| pass.reason == reason).count() as u64;
        let reasons = all.into_iter().map(|reason| (reason.words(), of(reason)));
        Self {
            total: history.passes.len() as u64,
            reasons: reasons.filter(|(_, number)| *number > 0).collect(),
            idle: history.passes.iter().filter(|pass| pass.commands.is_empty()).count() as u64,
        }
    }

    fn words(&self) -> String {
        let reasons = self.reasons.iter().map(|(reason, number)| format!("{reason} {}", count(*number)));
        format!(
            "{} ({}; {} wrote nothing)",
            count(self.total),
            reasons.collect::<Vec<_>>().join(", "),
            count(self.idle)
        )
    }
}

impl TraceReport {
    fn new(options: &TraceOptions, workload: &Workload, run: &Run, history: &History) -> Self {
        let (seen, counted) = (Counted::seen(history), run.counted);
        let mut checks = Checked::of(history);
        let is_complete = run.seen.dropped == 0 && run.failure.is_none();
        if is_complete && seen != counted {
            checks.described.push(format!("the events say {seen:?}, the engine counted {counted:?}"));
            checks.verdict = Verdict::Failed;
        }
        let failure = run.failure.as_ref().map(ToString::to_string);
        let verdict = if failure.is_some() { Verdict::Failed } else { checks.verdict };
        Self {
            device: workload.target.uri().to_owned(),
            workload: workload.words.clone(),
            cache_bytes: options.cache,
            shards: run.shards,
            seconds: run.seconds,
            events: Events {
                seen: run.seen.happenings.len() as u64,
                dropped: run.seen.dropped,
                dirty_notes_dropped: run.dirtied_dropped,
            },
            passes: Passes::of(history),
            seen,
            counted,
            syncs: history.syncs,
            syncs_committed: history.commits.iter().map(|commit| commit.syncs).sum(),
            writes_failed: history
                .writes()
                .filter(|write| write.end.is_some_and(|end| end.has_failed))
                .count() as u64,
            pages_evicted: history.pages_evicted,
            checks,
            failure,
            verdict,
            picture: None,
        }
    }

    /// What the picture shows.
    fn scene<'a>(
        &self,
        workload: &Workload,
        history: &'a History,
        dirty: &'a [dirty::DirtySpan],
    ) -> Scene<'a> {
        let plural = if self.shards == 1 { "" } else { "s" };
        let mut facts = vec![
            format!("{}; cache {}, {} shard{plural}", self.workload, self.cache_bytes, self.shards),
            format!(
                "passes {}; {} write commands with {} pages, {} failed; {} read commands; {}; {} pages evicted",
                self.passes.words(),
                count(self.seen.write_commands),
                count(self.seen.pages_written),
                count(self.writes_failed),
                count(self.seen.read_commands),
                self.flushes(),
                count(self.pages_evicted)
            ),
        ];
        facts.extend(self.dropped());
        facts.extend(self.failure.iter().map(|failure| format!("the workload ended early: {failure}")));
        Scene {
            history,
            dirty,
            mappings: workload.mappings(),
            headline: format!("Writeback on {}", self.device),
            facts,
            verdicts: vec![
                (self.checks.wb01_verdict(), format!("WB-01: {}", self.checks.wb01_words())),
                (self.checks.wb18_verdict(), format!("WB-18: {}", self.checks.wb18_words())),
            ],
        }
    }

    fn flushes(&self) -> String {
        let plural = |number: u64, one: &str, many: &str| match number {
            1 => format!("1 {one}"),
            _ => format!("{} {many}", count(number)),
        };
        let flushes = plural(self.seen.flush_commands, "flush", "flushes");
        format!("{flushes} for {}", plural(self.syncs_committed, "sync", "syncs"))
    }

    /// That something is missing, if it is.
    fn dropped(&self) -> Option<String> {
        let Events { seen, dropped, dirty_notes_dropped } = self.events;
        (dropped + dirty_notes_dropped > 0).then(|| {
            format!(
                "the first {} events are kept; {} later ones are missing, and {} notes of dirtied pages",
                count(seen),
                count(dropped),
                count(dirty_notes_dropped)
            )
        })
    }
}

impl Report for TraceReport {
    fn table(&self) -> Table {
        let seen = &self.seen;
        let mut table = Table::default()
            .section(format!("writeback on {}", self.device))
            .row("workload", &self.workload)
            .row("cache, shards", format!("{}, {}", self.cache_bytes, self.shards))
            .row("elapsed", format!("{:.2} s", self.seconds))
            .row("events", count(self.events.seen))
            .row("passes", self.passes.words())
            .row("write commands", {
                let (commands, pages) = (count(seen.write_commands), count(seen.pages_written));
                format!("{commands} with {pages} pages, {} failed", count(self.writes_failed))
            })
            .row("read commands", count(seen.read_commands))
            .row("commits", self.flushes())
            .row("pages evicted", count(self.pages_evicted));
        table = self.dropped().into_iter().fold(table, Table::line);
        table = table
            .section("what the picture shows, checked")
            .row("WB-01", format!("{}: {}", self.checks.wb01_verdict(), self.checks.wb01_words()))
            .row("WB-18", format!("{}: {}", self.checks.wb18_verdict(), self.checks.wb18_words()));
        table = self.checks.described.iter().fold(table, |table, words| table.line(words));
        if let Some(Picture { path, bytes, rectangles, rectangles_merged_from }) = &self.picture {
            let merged = if rectangles < rectangles_merged_from {
                let (limit, of) = (count(RECTANGLES_MAX as u64), count(*rectangles_merged_from as u64));
                format!("; {of} rectangles are more than {limit}, so neighbours are merged")
            } else {
                String::new()
            };
            table = table.closing(format!("picture: {} ({bytes}{merged})", path.display()));
        }
        match &self.failure {
            Some(_) => table,
            None => table.closing(match self.verdict {
                Verdict::Passed => format!("{}: the run keeps both rules", Verdict::Passed),
                Verdict::Failed => format!("{}: see what is said above", Verdict::Failed),
            }),
        }
    }
}
