//! The demo on a device of its own, whose power can't be cut: the process is killed instead.
//!
//! 1. A process of this program (`worker`) opens the device and commits transactions from several threads.
//! 2. It is killed (SIGKILL) in mid-transaction, with commands on their way to the device.
//! 3. This process takes the device over, as it is; redb checks itself; the database is compared with the ledger of what
//!    was acknowledged, and with the files.
//! 4. The next process goes on, until it was killed as often as asked and all files are in.
//!
//! That shows that nothing acknowledged depends on the process, and that a device which was left enabled and busy can be
//! taken over. What it can't show is a power loss: the device keeps its cache.

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use foliant::{Engine, EngineOptions, MappingOptions, PAGE_BYTES};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use super::database::{self, Verified};
use super::ledger::{Ledger, TransactionId};
use super::session::SILENCE_MAX;
use super::sources::{self, Source};
use super::worker::Opened;
use crate::cli::DemoOptions;
use crate::error::Error;
use crate::progress::Progress;
use crate::size::ByteSize;
use crate::stdout::{Format, Report, write_line, write_report};
use crate::table::{Table, count};
use crate::target::{Medium, Target};
use crate::verdict::Verdict;

/// Longest time from the acknowledgement that arms a kill to the kill: some commits' length.
const LAG_US_MAX: u64 = 2_000;
/// Transactions for each kill, at least.
const TRANSACTIONS_PER_KILL_MIN: usize = 16;

pub(crate) fn run(options: &DemoOptions, target: &Target, seed: u64) -> Result<Verdict, Error> {
    if matches!(target.medium(), Medium::Memory | Medium::Nothing) {
        return Err(Error::Option {
            option: "--device",
            value: target.uri().to_owned(),
            reason:
                "what it holds ends with the process that opened it, and this demo kills that process; use \
                     vfio:ADDRESS or emu:PATH?size=SIZE, or leave --device out"
                    .to_owned(),
        });
    }
    if target.uri().starts_with("vfio-noiommu:") {
        return Err(Error::Option {
            option: "--device",
            value: target.uri().to_owned(),
            reason: "this demo kills a process with commands in flight, and without an IOMMU those may overwrite memory \
                     that belongs to somebody else by then; leave --device out"
                .to_owned(),
        });
    }
    if !options.overwrite {
        target.require_empty("demo")?;
    }
    let format = Format::of(options.json);
    let mut demo = Demo::new(options, target, seed)?;
    if format == Format::Text {
        write_line(&demo.opening())?;
    }
    demo.blank()?;
    demo.run_all(format)?;
    let report = demo.into_report();
    write_report(&report, format)?;
    Ok(report.verdict)
}

struct Demo<'a> {
    options: &'a DemoOptions,
    target: &'a Target,
    seed: u64,
    random: SmallRng,
    sources: Vec<Source>,
    planned: usize,
    ledger: Ledger,
    kills: Vec<KillReport>,
    last: Option<Verified>,
    failures: Vec<String>,
    begin: Instant,
}

impl<'a> Demo<'a> {
    fn new(options: &'a DemoOptions, target: &'a Target, seed: u64) -> Result<Self, Error> {
        let sources = sources::read_sources(&options.files)?;
        let planned = sources.len().max((options.cuts as usize + 1) * TRANSACTIONS_PER_KILL_MIN);
        Ok(Self {
            options,
            target,
            seed,
            random: SmallRng::seed_from_u64(seed),
            planned,
            ledger: Ledger::new((0..planned).map(|index| index % sources.len())),
            sources,
            kills: Vec::new(),
            last: None,
            failures: Vec::new(),
            begin: Instant::now(),
        })
    }

    fn opening(&self) -> String {
        let bytes = self.sources.iter().map(|source| source.bytes.len() as u64).sum();
        format!(
            "{} files, {}, in {} transactions from {} threads of a process that gets killed, on {}; seed {}",
            self.sources.len(),
            ByteSize(bytes),
            self.planned,
            self.options.threads,
            self.target.uri(),
            self.seed
        )
    }

    /// Makes the device hold an empty database.
    fn blank(&self) -> Result<(), Error> {
        let options =
            EngineOptions { cache_bytes: self.options.cache.0, shards: 1, ..EngineOptions::default() };
        let engine = Engine::open_on(self.target.open()?.attach()?, &options)?;
        let mapping = engine.mapping(&MappingOptions::default())?;
        mapping.write_at(0, &[0; PAGE_BYTES])?;
        mapping.sync()?;
        drop(mapping);
        engine.close()?;
        let opened = self.open()?;
        database::create_tables(&opened.database).map_err(Error::redb("creating the tables"))?;
        opened.close()
    }

    fn open(&self) -> Result<Opened, Error> {
        Opened::open(self.target, self.options.cache.0, self.options.stats.page())
    }

    fn run_all(&mut self, format: Format) -> Result<(), Error> {
        let progress = Progress::counting(self.planned as u64, "transactions");
        for number in 1..=self.options.cuts {
            progress.stage(format!("kill {number}/{}", self.options.cuts));
            self.kill_once(number, &progress)?;
            if let (Format::Text, Some(kill)) = (format, self.kills.last()) {
                progress.aside(|| write_line(&kill.to_string()))?;
            }
            if !self.failures.is_empty() {
                return Ok(());
            }
        }
        progress.stage("the rest");
        let waiting = usize::MAX;
        self.work(waiting, None, &progress)?;
        self.last = Some(self.check()?.1);
        Ok(())
    }

    fn kill_once(&mut self, number: u32, progress: &Progress) -> Result<(), Error> {
        let share = (self.planned as u64 / (u64::from(self.options.cuts) + 1)).max(2);
        let transactions = self.random.random_range(share / 2..=share).max(1);
        let lag = Duration::from_micros(self.random.random_range(0..=LAG_US_MAX));
        let acknowledged = self.ledger.acknowledged();
        // Enough orders that the process is busy when it is killed.
        let orders = transactions as usize + 4 * usize::from(self.options.threads);
        self.work(orders, Some((transactions, lag)), progress)?;
        let (reopen_seconds, verified) = self.check()?;
        self.kills.push(KillReport {
            number,
            transactions: self.ledger.acknowledged() - acknowledged,
            reopen_seconds,
            promised_verified: verified.promised,
            bytes_verified: ByteSize(verified.bytes),
            unacknowledged_present: verified.found.len() as u64,
            unacknowledged_absent: verified.absent,
            verdict: Verdict::of(&self.failures),
        });
        Ok(())
    }

    /// Has a process commit up to `orders` transactions, and kills it so long after so many acknowledgements.
    fn work(
        &mut self,
        orders: usize,
        kill: Option<(u64, Duration)>,
        progress: &Progress,
    ) -> Result<(), Error> {
        let mut worker = Worker(self.spawn()?);
        let input = worker.0.stdin.take().expect("it was piped");
        let output = worker.0.stdout.take().expect("it was piped");
        let lines: Vec<String> = std::iter::from_fn(|| self.ledger.take())
            .take(orders)
            .map(|(id, source)| format!("{id} {source}\n"))
            .collect();
        // A process that is killed reads no further; nobody waits for it to.
        std::thread::spawn(move || {
            let mut input = input;
            lines.iter().try_for_each(|line| input.write_all(line.as_bytes()))
        });
        let (sender, acknowledgements) = channel();
        std::thread::spawn(move || {
            let lines = BufReader::new(output).lines().map_while(Result::ok);
            lines.map_while(|line| line.parse().ok()).try_for_each(|id: TransactionId| sender.send(id))
        });
        let mut acknowledged = 0;
        loop {
            let id = match acknowledgements.recv_timeout(SILENCE_MAX) {
                Ok(id) => id,
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Error::Hung {
                        running: self.options.threads,
                        seconds: SILENCE_MAX.as_secs(),
                    });
                }
            };
            self.ledger.acknowledge(id);
            acknowledged += 1;
            progress.advance(1);
            if let Some((transactions, lag)) = kill
                && acknowledged == transactions
            {
                std::thread::sleep(lag);
                worker.0.kill().map_err(Error::file("kill", "the working process"))?;
            }
        }
        let status = worker.0.wait().map_err(Error::file("wait for", "the working process"))?;
        const SIGKILL: i32 = 9;
        match kill {
            Some(_) if status.signal() != Some(SIGKILL) => {
                self.failures
                    .push(format!("the working process was to be killed, but ended by itself: {status}"));
            }
            None if !status.success() => {
                self.failures.push(format!("the working process failed: {status}"));
            }
            _ => {}
        }
        Ok(())
    }

    fn spawn(&self) -> Result<Child, Error> {
        let program = std::env::current_exe().map_err(Error::file("find", "this program"))?;
        let DemoOptions { files, cache, threads, .. } = self.options;
        Command::new(&program)
            .arg("demo-worker")
            .args(["--device", self.target.uri()])
            .args(["--cache", &cache.0.to_string()])
            .args(["--threads", &threads.to_string()])
            .args(self.options.stats.arguments())
            .args(files)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(Error::file("start", program))
    }

    /// Takes the device over; redb's own check, then every transaction. Returns how long opening took.
    fn check(&mut self) -> Result<(f64, Verified), Error> {
        let begin = Instant::now();
        let mut opened = self.open()?;
        let reopen_seconds = begin.elapsed().as_secs_f64();
        if !opened.database.check_integrity().map_err(Error::redb("checking its integrity"))? {
            self.failures.push("redb's integrity check found damage, and repaired it".to_owned());
        }
        let verified = database::verify(&opened.database, &self.ledger, &self.sources)?;
        opened.close()?;
        self.ledger.settle(|id| verified.found.contains(&id));
        self.failures.extend(verified.failures.iter().cloned());
        Ok((reopen_seconds, verified))
    }

    fn into_report(self) -> KillsReport {
        let DemoOptions { files, cuts, cache, threads, .. } = self.options;
        let files: Vec<String> = files.iter().map(|path| format!(" {}", path.display())).collect();
        KillsReport {
            seed: self.seed,
            rerun: format!(
                "foliant demo --device '{}' --overwrite --seed {} --cuts {cuts} --cache {} --threads {threads}{}",
                self.target.uri(),
                self.seed,
                cache.0,
                files.concat()
            ),
            device: self.target.uri().to_owned(),
            acknowledged: self.ledger.acknowledged(),
            verified: self.last.as_ref().map_or(0, |verified| verified.promised),
            bytes_verified: ByteSize(self.last.as_ref().map_or(0, |verified| verified.bytes)),
            seconds: self.begin.elapsed().as_secs_f64(),
            verdict: Verdict::of(&self.failures),
            kills: self.kills,
            failures: self.failures,
        }
    }
}

/// A working process that doesn't outlive the demo.
struct Worker(Child);

impl Drop for Worker {
    fn drop(&mut self) {
        // It has ended already, unless something went wrong; then it is not to go on alone.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One kill and what was found after it.
#[derive(Clone, Debug, Serialize)]
struct KillReport {
    /// From 1.
    number: u32,
    /// Acknowledged since the last kill.
    transactions: u64,
    /// From taking the device over to the open database.
    reopen_seconds: f64,
    /// Transactions that must be there, all so far, and are, byte for byte.
    promised_verified: u64,
    bytes_verified: ByteSize,
    /// Transactions whose commit wasn't acknowledged and that are there, whole.
    unacknowledged_present: u64,
    /// Transactions whose commit wasn't acknowledged and that aren't there.
    unacknowledged_absent: u64,
    verdict: Verdict,
}

impl fmt::Display for KillReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (present, absent) = (self.unacknowledged_present, self.unacknowledged_absent);
        write!(
            f,
            "kill {}: after {} transactions; taken over in {:.1} ms; all {} acknowledged so far are there ({}); of {} \
             unacknowledged, {present} whole and {absent} gone: {}",
            self.number,
            self.transactions,
            self.reopen_seconds * 1e3,
            self.promised_verified,
            self.bytes_verified,
            present + absent,
            self.verdict
        )
    }
}

#[derive(Debug, Serialize)]
struct KillsReport {
    seed: u64,
    /// The command that chooses the same moments again.
    rerun: String,
    device: String,
    kills: Vec<KillReport>,
    acknowledged: u64,
    /// Transactions verified after the last close.
    verified: u64,
    bytes_verified: ByteSize,
    seconds: f64,
    failures: Vec<String>,
    verdict: Verdict,
}

impl Report for KillsReport {
    fn table(&self) -> Table {
        let survived = self.kills.iter().filter(|kill| kill.verdict == Verdict::Passed).count();
        let table =
            Table::default().section("\ntransactions").row("acknowledged", count(self.acknowledged)).row(
                "verified at the end",
                format!("{} byte for byte, {}", count(self.verified), self.bytes_verified),
            );
        let table =
            self.failures.iter().fold(table, |table, failure| table.closing(format!("wrong: {failure}")));
        table
            .closing(format!(
                "{}: {survived} kills survived on {}{} ({:.1} s)",
                self.verdict,
                self.device,
                if self.verdict == Verdict::Passed {
                    ", no acknowledged transaction lost, none by half"
                } else {
                    ""
                },
                self.seconds
            ))
            .closing(format!("The same moments again (processes may meet otherwise): {}", self.rerun))
    }
}
