//! `foliant demo`: a database on Foliant that survives power cuts, proven byte by byte.
//!
//! On an emulated device in memory that loses what its volatile write cache held ([`session`]):
//!
//! 1. Several threads take files into a redb database, a transaction a file, under a small page cache, so that
//!    pages are evicted and flushed all the while.
//! 2. The power is cut at a moment that the seed chooses, in mid-transaction. Each block written since the last
//!    flush keeps any one of its versions.
//! 3. Everything is reopened; redb checks itself; the database is compared with the [`ledger`] of what was
//!    acknowledged ([`database`]), and with the files ([`sources`]).
//! 4. The threads go on, until the power has been cut as often as asked and all files are in.
//!
//! On a device of its own, whose power can't be cut, the process is killed instead ([`kills`], [`worker`]).
//!
//! Meanwhile the [`witness`] looks from the device's side at where the data of each write lies.

mod database;
mod kills;
mod ledger;
mod report;
mod session;
mod sources;
mod witness;
pub(crate) mod worker;

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

use foliant::EngineOptions;
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController, Latency};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use self::database::Verified;
use self::ledger::Ledger;
use self::report::{CutReport, DemoReport, FinalCheck, Transactions};
use self::session::{CutMoment, Session, SessionEnd, Times};
use self::sources::Source;
use self::witness::Witness;
use crate::activity::{CacheActivity, DeviceActivity};
use crate::cli::DemoOptions;
use crate::error::Error;
use crate::progress::Progress;
use crate::size::ByteSize;
use crate::stdout::{Format, write_line, write_report};
use crate::verdict::Verdict;

/// Files are taken in again and again until there are as many transactions, and as many for each cut.
const TRANSACTIONS_MIN: usize = 1200;
const TRANSACTIONS_PER_CUT_MIN: usize = 16;
/// But not beyond as many bytes, unless once round has more.
const BYTES_AGAIN_MAX: usize = 64 << 20;
/// The device is sparse; it costs what is written.
const DEVICE_BYTES_MIN: u64 = 256 << 20;
/// Blocks are the units of which a power cut keeps any version: the smallest make the most trouble.
const BLOCK_BYTES: u32 = 512;
/// Device commands between the transaction that arms a cut and the cut: a few transactions' worth.
const COMMANDS_MAX: u64 = 24;
/// Longest time from a command to the cut, where the cut isn't at the command: a commit's length.
const LAG_US_MAX: u64 = 300;
const SHARDS: usize = 2;
/// Seeds that nobody chose are short enough to be typed.
const SEED_LIMIT: u64 = 1_000_000;

pub(crate) fn run(options: &DemoOptions) -> Result<Verdict, Error> {
    let format = Format::of(options.json);
    let seed = options.seed.unwrap_or_else(|| RandomState::new().hash_one(std::process::id()) % SEED_LIMIT);
    if let Some(target) = &options.device {
        return kills::run(options, target, seed);
    }
    let sources = Arc::new(sources::read_sources(&options.files)?);
    let mut demo = Demo::new(options, seed, sources)?;
    if format == Format::Text {
        write_line(&demo.opening())?;
    }
    demo.run_all(format)?;
    let report = demo.into_report();
    write_report(&report, format)?;
    Ok(report.verdict)
}

/// A demo under way.
struct Demo<'a> {
    options: &'a DemoOptions,
    seed: u64,
    random: SmallRng,
    sources: Arc<Vec<Source>>,
    /// Transactions planned: the files, as often as they are taken in.
    planned: usize,
    ledger: Arc<Ledger>,
    device: Arc<EmulatedController>,
    witness: Arc<Witness>,
    times: Times,
    cache: CacheActivity,
    cuts: Vec<CutReport>,
    last: Option<FinalCheck>,
    failures: Vec<String>,
    begin: Instant,
}

impl<'a> Demo<'a> {
    fn new(options: &'a DemoOptions, seed: u64, sources: Arc<Vec<Source>>) -> Result<Self, Error> {
        let bytes: usize = sources.iter().map(|source| source.bytes.len()).sum();
        let wanted = TRANSACTIONS_MIN.max((options.cuts as usize + 1) * TRANSACTIONS_PER_CUT_MIN);
        let rounds = wanted.div_ceil(sources.len()).min(BYTES_AGAIN_MAX / bytes.max(1)).max(1);
        let planned = sources.len() * rounds;
        // redb copies what it changes and rounds up, and a lost transaction is taken in anew.
        let device_bytes = (8 * (bytes * rounds) as u64).next_multiple_of(1 << 20).max(DEVICE_BYTES_MIN);
        let mut config = EmulatedConfig::ram(device_bytes, BLOCK_BYTES);
        config.power_loss_model = true;
        config.volatile_write_cache = true;
        // Long enough for commands to be in flight when the power is cut.
        config.latency = Latency {
            read: Duration::from_micros(10),
            write: Duration::from_micros(15),
            flush: Duration::from_micros(40),
        };
        Ok(Self {
            options,
            seed,
            random: SmallRng::seed_from_u64(seed),
            planned,
            ledger: Arc::new(Ledger::new((0..planned).map(|index| index % sources.len()))),
            sources,
            device: EmulatedController::new(config)?,
            witness: Arc::default(),
            times: Times::new(),
            cache: CacheActivity::default(),
            cuts: Vec::new(),
            last: None,
            failures: Vec::new(),
            begin: Instant::now(),
        })
    }

    /// The command that chooses the same moments again.
    fn rerun(&self) -> String {
        let DemoOptions { files, cuts, cache, threads, .. } = self.options;
        let files: Vec<String> = files.iter().map(|path| format!(" {}", path.display())).collect();
        let cache = cache.0;
        format!(
            "foliant demo --seed {} --cuts {cuts} --cache {cache} --threads {threads}{}",
            self.seed,
            files.concat()
        )
    }

    fn opening(&self) -> String {
        let (files, threads) = (self.sources.len(), self.options.threads);
        let bytes = self.sources.iter().map(|source| source.bytes.len() as u64).sum();
        format!(
            "{files} files, {}, in {} transactions from {threads} threads, under a page cache of {}; seed {}",
            ByteSize(bytes),
            self.planned,
            self.options.cache,
            self.seed
        )
    }

    /// Runs session after session. What goes wrong after the first is a failure of the demo and ends it.
    fn run_all(&mut self, format: Format) -> Result<(), Error> {
        let progress = Progress::counting(self.planned as u64, "transactions");
        let mut session = self.open()?;
        database::create_tables(session.database()).map_err(Error::redb("creating the tables"))?;
        for number in 1..=self.options.cuts {
            progress.stage(format!("cut {number}/{}", self.options.cuts));
            match self.cut_once(session, number, &progress) {
                Ok(reopened) => session = reopened,
                Err(error) => {
                    self.failures.push(format!("cut {number}: {error}"));
                    return Ok(());
                }
            }
            if let (Format::Text, Some(cut)) = (format, self.cuts.last()) {
                progress.aside(|| write_line(&cut.to_string()))?;
            }
            if !self.failures.is_empty() {
                return Ok(());
            }
        }
        progress.stage("the rest");
        if let Err(error) = self.finish(session, &progress) {
            self.failures.push(format!("after the last cut: {error}"));
        }
        Ok(())
    }

    fn engine_options(&self) -> EngineOptions {
        let stats_page = self.options.stats.page();
        let cache_bytes = self.options.cache.0;
        EngineOptions { cache_bytes, shards: SHARDS, stats_page, ..EngineOptions::default() }
    }

    fn open(&self) -> Result<Session, Error> {
        Session::open(&self.device, &self.engine_options(), &self.witness)
    }

    /// Runs a session until its power is cut, reopens everything, and checks it.
    fn cut_once(&mut self, session: Session, number: u32, progress: &Progress) -> Result<Session, Error> {
        let moment = self.next_moment();
        let acknowledged = self.ledger.acknowledged();
        let end = self.run_session(session, Some(moment), progress)?;
        let commands = self.device.stats().io_commands();
        let begin = Instant::now();
        let mut session = self.open()?;
        let reopen_seconds = begin.elapsed().as_secs_f64();
        let verified = self.check(&mut session)?;
        self.cuts.push(CutReport {
            number,
            transactions: self.ledger.acknowledged() - acknowledged,
            commands,
            blocks_undecided: end.cut.map_or(0, |cut| cut.units_undecided),
            blocks_rolled_back: end.cut.map_or(0, |cut| cut.units_rolled_back),
            transactions_under_way: end.under_way,
            commands_in_flight: end.cut.map_or(0, |cut| cut.commands_in_flight),
            reopen_seconds,
            promised_verified: verified.promised,
            bytes_verified: ByteSize(verified.bytes),
            unacknowledged_present: verified.found.len() as u64,
            unacknowledged_absent: verified.absent,
            verdict: Verdict::of(&self.failures),
        });
        Ok(session)
    }

    /// Takes in what is left, closes everything in order, reopens it, and checks it once more.
    fn finish(&mut self, session: Session, progress: &Progress) -> Result<(), Error> {
        self.run_session(session, None, progress)?;
        let mut session = self.open()?;
        let verified = self.check(&mut session)?;
        self.last = Some(FinalCheck {
            transactions_verified: verified.promised,
            bytes_verified: ByteSize(verified.bytes),
        });
        self.run_session(session, None, progress).map(drop)
    }

    fn run_session(
        &mut self,
        session: Session,
        moment: Option<CutMoment>,
        progress: &Progress,
    ) -> Result<SessionEnd, Error> {
        let end = session.run(self.options.threads, (&self.ledger, &self.sources), moment, progress)?;
        self.times.merge(&end.times);
        self.cache.absorb(&end.cache);
        self.failures.extend(end.failures.iter().cloned());
        Ok(end)
    }

    /// redb's own check, then every transaction.
    fn check(&mut self, session: &mut Session) -> Result<Verified, Error> {
        let database = session.database();
        if !database.check_integrity().map_err(Error::redb("checking its integrity"))? {
            self.failures.push("redb's integrity check found damage, and repaired it".to_owned());
        }
        let verified = database::verify(database, &self.ledger, &self.sources)?;
        self.ledger.settle(|id| verified.found.contains(&id));
        self.failures.extend(verified.failures.iter().cloned());
        Ok(verified)
    }

    /// The next moment by the seed, spread over the transactions planned.
    fn next_moment(&mut self) -> CutMoment {
        let share = (self.planned as u64 / (u64::from(self.options.cuts) + 1)).max(2);
        CutMoment {
            transactions: self.random.random_range(share / 2..=share),
            commands: self.random.random_range(1..=COMMANDS_MAX),
            lag: if self.random.random() {
                Duration::ZERO
            } else {
                Duration::from_micros(self.random.random_range(1..=LAG_US_MAX))
            },
            survival_seed: self.random.random(),
        }
    }

    fn into_report(mut self) -> DemoReport {
        if self.witness.copied_bytes() > 0 {
            self.failures.push(format!(
                "{} payload bytes were not written from the frame of their page",
                self.witness.copied_bytes()
            ));
        }
        DemoReport {
            seed: self.seed,
            rerun: self.rerun(),
            files: self.sources.len(),
            bytes: ByteSize(self.sources.iter().map(|source| source.bytes.len() as u64).sum()),
            threads: self.options.threads,
            cache_bytes: self.options.cache,
            shards: SHARDS,
            transactions: Transactions {
                acknowledged: self.ledger.acknowledged(),
                found_after_a_cut: self.cuts.iter().map(|cut| cut.unacknowledged_present).sum(),
                lost_unacknowledged: self.cuts.iter().map(|cut| cut.unacknowledged_absent).sum(),
            },
            transaction_latency: self.times.transaction.summary(),
            commit_latency: self.times.commit.summary(),
            cache: self.cache,
            device: DeviceActivity::from(&self.device.stats()),
            payload_bytes_written: ByteSize(self.witness.payload_bytes()),
            payload_bytes_copied: self.witness.copied_bytes(),
            seconds: self.begin.elapsed().as_secs_f64(),
            cuts: self.cuts,
            last: self.last,
            verdict: Verdict::of(&self.failures),
            failures: self.failures,
        }
    }
}
