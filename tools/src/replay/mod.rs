//! `foliant replay`: a block trace through the page cache, with every sector verified.
//!
//! 1. The whole trace is read and checked, and so is the device, before anything is written.
//! 2. The lanes replay it through one mapping of namespace 1 ([`lanes`]).
//! 3. Sync, and the engine is closed.
//! 4. With `--verify` every sector of the medium is checked without the engine ([`audit`]) against what the lanes
//!    know they wrote ([`model`], [`stamp`]).

mod audit;
mod lanes;
mod model;
mod stamp;
mod trace;

use std::time::Instant;

use foliant::{Engine, EngineOptions, MappingOptions};
use serde::Serialize;

pub(crate) use self::lanes::Replay;
use self::lanes::Replayed;
use self::model::Checked;
pub(crate) use self::model::Unwritten;
use self::stamp::SECTOR_BYTES;
use self::trace::Op;
pub(crate) use self::trace::Trace;
use crate::activity::{CacheActivity, DeviceActivity};
use crate::cli::ReplayOptions;
use crate::error::Error;
use crate::progress::Progress;
use crate::size::ByteSize;
use crate::stdout::{Format, Report, write_report};
use crate::table::{Table, count};
use crate::target::Medium;
use crate::verdict::Verdict;

pub(crate) fn run(options: &ReplayOptions) -> Result<Verdict, Error> {
    let report = replay(options)?;
    write_report(&report, Format::of(options.json))?;
    Ok(report.verdict)
}

fn replay(options: &ReplayOptions) -> Result<ReplayReport, Error> {
    let target = &options.device;
    if options.verify && target.medium() == Medium::Nothing {
        return Err(Error::Option {
            option: "--device",
            value: target.uri().to_owned(),
            reason: "it keeps no data, so there is nothing to verify; use emu:ram or emu:PATH, or leave --verify out"
                .to_owned(),
        });
    }
    let trace = Trace::read(&options.trace)?;
    // Before a drive is taken over to ask for its size.
    if !options.overwrite {
        target.require_empty("replay")?;
    }
    let namespace_bytes = target.namespace_bytes()?;
    trace.check_fits(namespace_bytes)?;
    let unwritten = if target.is_blank()? { Unwritten::Zeroes } else { Unwritten::Anything };

    let device = target.open()?;
    let engine = Engine::open_on(
        device.attach()?,
        &EngineOptions {
            cache_bytes: options.cache.0,
            shards: options.shards.into(),
            stats_page: options.stats.page(),
            ..EngineOptions::default()
        },
    )?;
    let shards = engine.shards();
    let mapping = engine.mapping(&MappingOptions::default())?;
    let progress = Progress::counting(trace.requests.len() as u64, "requests");
    progress.stage("replay");
    let begin = Instant::now();
    let lanes = u64::from(options.threads);
    let verify = options.verify;
    let replay = Replay { trace: &trace, mapping: &mapping, unwritten, verify, lanes, dirtied: None };
    let replayed = replay.run(&progress).and_then(|replayed| {
        progress.stage("sync");
        mapping.sync()?;
        Ok(replayed)
    });
    let replayed = replayed.map_err(|error| target.diagnose(error, Some(&mapping)))?;
    let replay_seconds = begin.elapsed().as_secs_f64();
    drop(progress);
    let engine_stats = engine.stats();
    drop(mapping);
    engine.close()?;
    let commands = device.emulated().map(|device| DeviceActivity::from(&device.stats()));

    let Replayed { model, checked } = replayed;
    let begin = Instant::now();
    let verified = match target.medium() {
        _ if !options.verify => None,
        Medium::Image(path) => {
            // The audit shares nothing with the engine, not even the device's open file.
            drop(device);
            Some(audit::audit_file(&model, path, namespace_bytes)?)
        }
        Medium::Drive => Some(audit::audit_drive(&model, device.attach()?, namespace_bytes)?),
        Medium::Memory | Medium::Nothing => {
            let controller = device.emulated().expect("memory belongs to an emulated device");
            Some(audit::audit_memory(&model, controller, namespace_bytes)?)
        }
    };
    let verification =
        verified.map(|image| Verification::new(checked, image, model.written_sectors(), begin));
    let verdict = verification.as_ref().map_or(Verdict::Passed, Verification::verdict);
    Ok(ReplayReport {
        trace: options.trace.display().to_string(),
        device: target.uri().to_owned(),
        cache_bytes: options.cache,
        shards,
        threads: options.threads,
        requests: Requests::of(&trace),
        cache: CacheActivity::from(&engine_stats),
        commands,
        replay_seconds,
        verification,
        verdict,
    })
}

#[derive(Debug, Serialize)]
struct ReplayReport {
    trace: String,
    device: String,
    cache_bytes: ByteSize,
    shards: usize,
    threads: u16,
    requests: Requests,
    cache: CacheActivity,
    /// As an emulated device counted them.
    commands: Option<DeviceActivity>,
    /// Replay and last sync.
    replay_seconds: f64,
    verification: Option<Verification>,
    verdict: Verdict,
}

#[derive(Debug, Serialize)]
struct Requests {
    total: u64,
    reads: u64,
    writes: u64,
    bytes_read: ByteSize,
    bytes_written: ByteSize,
}

#[derive(Debug, Serialize)]
struct Verification {
    /// Sectors of reads through the cache that held what they must.
    sectors_verified_in_cache: u64,
    /// Written sectors that the image holds as written.
    sectors_verified_on_image: u64,
    /// Sectors written by the trace.
    sectors_written: u64,
    /// Sectors of the image that were never written and are zero.
    sectors_untouched_on_image: u64,
    mismatches: u64,
    /// The first few, in words.
    mismatches_described: Vec<String>,
    audit_seconds: f64,
}

impl Requests {
    fn of(trace: &Trace) -> Self {
        let of = |op| trace.requests.iter().filter(move |request| request.op == op);
        let bytes = |op| ByteSize(of(op).map(|request| request.sectors * SECTOR_BYTES as u64).sum());
        Self {
            total: trace.requests.len() as u64,
            reads: of(Op::Read).count() as u64,
            writes: of(Op::Write).count() as u64,
            bytes_read: bytes(Op::Read),
            bytes_written: bytes(Op::Write),
        }
    }
}

impl Verification {
    fn new(mut checked: Checked, image: Checked, sectors_written: u64, begin: Instant) -> Self {
        let in_cache = checked.sectors() - checked.mismatches;
        let (on_image, untouched) = (image.written, image.zeroes);
        checked.absorb(image);
        Self {
            sectors_verified_in_cache: in_cache,
            sectors_verified_on_image: on_image,
            sectors_written,
            sectors_untouched_on_image: untouched,
            mismatches: checked.mismatches,
            mismatches_described: checked.described,
            audit_seconds: begin.elapsed().as_secs_f64(),
        }
    }

    fn verdict(&self) -> Verdict {
        // The count guards against an audit that has looked at too little.
        let is_complete = self.sectors_verified_on_image == self.sectors_written;
        if self.mismatches == 0 && is_complete { Verdict::Passed } else { Verdict::Failed }
    }
}

impl Report for ReplayReport {
    fn table(&self) -> Table {
        let requests = &self.requests;
        let per_second = requests.total as f64 / self.replay_seconds.max(1e-9);
        let table = Table::default()
            .section(format!("replay of {}", self.trace))
            .row("device", &self.device)
            .row("cache, shards, threads", {
                format!("{}, {}, {}", self.cache_bytes, self.shards, self.threads)
            })
            .row("requests", count(requests.total))
            .row("reads", format!("{}, {}", count(requests.reads), requests.bytes_read))
            .row("writes", format!("{}, {}", count(requests.writes), requests.bytes_written))
            .row("elapsed", format!("{:.2} s, {per_second:.0} requests/s", self.replay_seconds));
        let table = self.cache.rows(table);
        let table = match &self.commands {
            Some(commands) => commands.rows(table),
            None => table,
        };
        match &self.verification {
            None => table.closing("replayed; nothing was verified (--verify does)"),
            Some(verification) => verification.rows(table),
        }
    }
}

impl Verification {
    fn rows(&self, table: Table) -> Table {
        let table = table
            .section("verification, by 512-byte sector")
            .row("read through the cache", count(self.sectors_verified_in_cache))
            .row("written by the trace", count(self.sectors_written))
            .row("of those right on the image", count(self.sectors_verified_on_image))
            .row("never written and zero", count(self.sectors_untouched_on_image))
            .row("wrong", count(self.mismatches))
            .row("time to read the image", format!("{:.2} s", self.audit_seconds));
        let table = self.mismatches_described.iter().fold(table, |table, mismatch| table.line(mismatch));
        table.closing(match self.verdict() {
            Verdict::Passed => format!("{}: every sector holds what was written last", Verdict::Passed),
            Verdict::Failed => format!("{}: the sectors above don't hold what they must", Verdict::Failed),
        })
    }
}
