//! From power-on to the next power cut: an engine, a database on it, and threads that commit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use foliant::redb_storage::MappingBackend;
use foliant::{Engine, EngineOptions, Mapping, MappingOptions};
use foliant_nvme_emulated::{EmulatedController, PowerCut};
use redb::{Database, WriteTransaction};

use super::database;
use super::ledger::{Ledger, TransactionId};
use super::sources::Source;
use super::witness::Witness;
use crate::activity::CacheActivity;
use crate::error::Error;
use crate::latency::Latencies;
use crate::progress::Progress;

/// Longest time without any news from the threads.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(60);
/// redb's own cache is kept small, so that Foliant's does the work.
pub(crate) const REDB_CACHE_BYTES: usize = 256 << 10;

/// What the threads of a session tell.
#[derive(Debug)]
pub(crate) enum Event {
    /// The moment that the seed chose has come.
    CutPower,
    /// A transaction was acknowledged.
    Acknowledged,
    /// A thread has ended.
    Ended(Box<ThreadEnd>),
}

/// How a committing thread ended.
#[derive(Debug)]
pub(crate) struct ThreadEnd {
    times: Times,
    /// An error that no power cut explains.
    failure: Option<String>,
}

/// How long transactions took.
#[derive(Clone, Debug)]
pub(crate) struct Times {
    /// From asking redb for the transaction to the acknowledgement: with the wait for other writers.
    pub(crate) transaction: Latencies,
    /// The commit alone.
    pub(crate) commit: Latencies,
}

impl Times {
    pub(crate) fn new() -> Self {
        Self { transaction: Latencies::new(), commit: Latencies::new() }
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        self.transaction.merge(&other.transaction);
        self.commit.merge(&other.commit);
    }
}

/// When to cut the power, as the seed chose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CutMoment {
    /// Acknowledged transactions of the session that it waits for, at least 1.
    pub(crate) transactions: u64,
    /// And then device commands, at least 1.
    pub(crate) commands: u64,
    /// And then time: none cuts while that command is under way, some reaches the moments when no command is.
    pub(crate) lag: Duration,
    /// Decides what survives.
    pub(crate) survival_seed: u64,
}

/// How a session ended.
#[derive(Debug)]
pub(crate) struct SessionEnd {
    /// `None` when all files were taken in and the engine was closed in order.
    pub(crate) cut: Option<PowerCut>,
    /// Transactions that redb had begun and whose commit hadn't returned when the power was cut: mostly 1, 0 between
    /// two, and 2 while one returns and the next begins.
    pub(crate) under_way: u32,
    pub(crate) times: Times,
    pub(crate) cache: CacheActivity,
    /// What went wrong that no power cut explains.
    pub(crate) failures: Vec<String>,
}

/// An engine with a database on it. The fields go in this order when it's dropped.
pub(crate) struct Session {
    database: Database,
    mapping: Mapping,
    engine: Engine,
    device: Arc<EmulatedController>,
    witness: Arc<Witness>,
    events: (Sender<Event>, Receiver<Event>),
}

impl Session {
    /// Powers the device on and opens engine and database; redb repairs itself if it has to.
    pub(crate) fn open(
        device: &Arc<EmulatedController>,
        options: &EngineOptions,
        witness: &Arc<Witness>,
    ) -> Result<Self, Error> {
        let events = channel();
        let engine = Engine::open_on(device.attach()?, options)?;
        let mapping = engine.mapping(&MappingOptions::default())?;
        let namespace = engine.namespaces().first().map_or(512, |ns| u64::from(ns.block_bytes()));
        device.observe(Some(witness.observer(namespace, engine.locator(), events.0.clone())));
        let backend = MappingBackend::open(mapping.clone())?;
        let database = Database::builder()
            .set_cache_size(REDB_CACHE_BYTES)
            .create_with_backend(backend)
            .map_err(Error::redb("opening the database"))?;
        Ok(Self {
            database,
            mapping,
            engine,
            device: Arc::clone(device),
            witness: Arc::clone(witness),
            events,
        })
    }

    pub(crate) fn database(&mut self) -> &mut Database {
        &mut self.database
    }

    /// Lets `threads` threads commit what waits in the ledger, until the power is cut or nothing waits any more;
    /// without a moment to cut, the engine is closed in order.
    pub(crate) fn run(
        self,
        threads: u16,
        (ledger, sources): (&Arc<Ledger>, &Arc<Vec<Source>>),
        moment: Option<CutMoment>,
        progress: &Progress,
    ) -> Result<SessionEnd, Error> {
        let Self { database, mapping, engine, device, witness, events: (sender, receiver) } = self;
        let database = Arc::new(database);
        let power_is_off = Arc::new(AtomicBool::new(false));
        let under_way = Arc::new(AtomicU32::new(0));
        let until_cut = Arc::new(AtomicU64::new(moment.map_or(0, |moment| moment.transactions)));
        for _ in 0..threads {
            let committer = Committer {
                database: Arc::clone(&database),
                ledger: Arc::clone(ledger),
                sources: Arc::clone(sources),
                witness: Arc::clone(&witness),
                power_is_off: Arc::clone(&power_is_off),
                under_way: Arc::clone(&under_way),
                until_cut: Arc::clone(&until_cut),
                moment,
                events: sender.clone(),
            };
            thread::spawn(move || committer.run());
        }
        let cut_power = |survival_seed| {
            power_is_off.store(true, Ordering::Release);
            witness.power_goes();
            Ok::<_, Error>(Some(device.power_cut(survival_seed)?))
        };
        let mut end = SessionEnd {
            cut: None,
            under_way: 0,
            times: Times::new(),
            cache: CacheActivity::default(),
            failures: Vec::new(),
        };
        let mut running = threads;
        while running > 0 {
            match (receiver.recv_timeout(SILENCE_MAX), moment) {
                (Ok(Event::CutPower), Some(moment)) if end.cut.is_none() => {
                    let begin = Instant::now();
                    while begin.elapsed() < moment.lag {
                        std::hint::spin_loop();
                    }
                    end.under_way = under_way.load(Ordering::Acquire);
                    end.cut = cut_power(moment.survival_seed)?;
                }
                (Ok(Event::CutPower), _) => {}
                (Ok(Event::Acknowledged), _) => progress.advance(1),
                (Ok(Event::Ended(thread)), _) => {
                    running -= 1;
                    end.times.merge(&thread.times);
                    end.failures.extend(thread.failure);
                }
                (Err(_), _) => {
                    // Dropping the engine would wait for what hangs.
                    std::mem::forget((database, mapping, engine));
                    return Err(Error::Hung { running, seconds: SILENCE_MAX.as_secs() });
                }
            }
        }
        witness.forget_cut();
        // The moment may lie past the last file; then it's now.
        if let (Some(moment), None) = (moment, &end.cut) {
            end.cut = cut_power(moment.survival_seed)?;
        }
        if end.cut.is_some() {
            end.failures.extend(check_is_dead(&mapping));
        }
        // Of a database whose device is gone nothing is left to close.
        drop((database, mapping));
        end.cache = CacheActivity::from(&engine.stats());
        device.observe(None);
        match end.cut {
            Some(_) => drop(engine),
            None => engine.close()?,
        }
        Ok(end)
    }
}

/// Without power nothing can be durable: says so when a sync claims it is.
fn check_is_dead(mapping: &Mapping) -> Option<String> {
    let offset = mapping.len() - 1;
    let synced = mapping.write_at(offset, &[1]).and_then(|()| mapping.sync());
    synced.is_ok().then(|| "a sync after the power cut claimed success".to_owned())
}

/// A thread that commits one transaction after the other.
struct Committer {
    database: Arc<Database>,
    ledger: Arc<Ledger>,
    sources: Arc<Vec<Source>>,
    witness: Arc<Witness>,
    power_is_off: Arc<AtomicBool>,
    /// Transactions that redb has begun and not committed.
    under_way: Arc<AtomicU32>,
    /// Acknowledgements until the power cut is armed.
    until_cut: Arc<AtomicU64>,
    moment: Option<CutMoment>,
    events: Sender<Event>,
}

impl Committer {
    fn run(self) {
        let mut times = Times::new();
        let mut failure = None;
        while failure.is_none() && !self.power_is_off.load(Ordering::Acquire) {
            let Some((id, source)) = self.ledger.take() else { break };
            match self.commit(id, &self.sources[source], &mut times) {
                Ok(()) => self.acknowledge(id),
                Err(_) if self.power_is_off.load(Ordering::Acquire) => break,
                Err(error) => failure = Some(format!("transaction {id} failed with the power on: {error}")),
            }
        }
        // The database goes before the news of it, so that nothing of it is left when all threads have ended.
        let Self { database, events, .. } = self;
        drop(database);
        drop(events.send(Event::Ended(Box::new(ThreadEnd { times, failure }))));
    }

    fn commit(&self, id: TransactionId, source: &Source, times: &mut Times) -> Result<(), redb::Error> {
        let begin = Instant::now();
        let write = self.database.begin_write()?;
        self.under_way.fetch_add(1, Ordering::AcqRel);
        let committed = self.fill_and_commit(write, id, source, times);
        self.under_way.fetch_sub(1, Ordering::AcqRel);
        if committed.is_ok() {
            times.transaction.record(begin.elapsed());
        }
        committed
    }

    fn fill_and_commit(
        &self,
        mut write: WriteTransaction,
        id: TransactionId,
        source: &Source,
        times: &mut Times,
    ) -> Result<(), redb::Error> {
        database::insert(&mut write, id, source)?;
        let begin = Instant::now();
        write.commit()?;
        times.commit.record(begin.elapsed());
        Ok(())
    }

    fn acknowledge(&self, id: TransactionId) {
        self.ledger.acknowledge(id);
        if let Some(moment) = self.moment
            && self.until_cut.fetch_sub(1, Ordering::Relaxed) == 1
        {
            self.witness.cut_after(moment.commands, moment.lag);
        }
        drop(self.events.send(Event::Acknowledged));
    }
}
