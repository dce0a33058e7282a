//! The process of the demo that gets killed: takes orders from its standard input, commits them, and acknowledges each on
//! its standard output.
//!
//! An order is a line with a transaction's number and the index of its source; an acknowledgement is a line with the
//! number, written once the commit has returned. At the end of its input it closes everything in order.

use std::io::Write;

use foliant::redb_storage::MappingBackend;
use foliant::{Engine, EngineOptions, MappingOptions, StatsPage};
use redb::Database;

use super::ledger::TransactionId;
use super::{SHARDS, database, session::REDB_CACHE_BYTES, sources};
use crate::cli::DemoWorkerOptions;
use crate::error::Error;
use crate::target::Target;
use crate::verdict::Verdict;

/// An engine with a database on it. The fields go in this order when it's dropped.
pub(crate) struct Opened {
    pub(crate) database: Database,
    pub(crate) engine: Engine,
}

impl Opened {
    /// Takes the device over and opens engine and database; redb repairs itself if it has to.
    pub(crate) fn open(target: &Target, cache_bytes: u64, stats_page: StatsPage) -> Result<Self, Error> {
        let options = EngineOptions { cache_bytes, shards: SHARDS, stats_page, ..EngineOptions::default() };
        let engine = Engine::open_on(target.open()?.attach()?, &options)?;
        let mapping = engine.mapping(&MappingOptions::default())?;
        let database = Database::builder()
            .set_cache_size(REDB_CACHE_BYTES)
            .create_with_backend(MappingBackend::open(mapping)?)
            .map_err(Error::redb("opening the database"))?;
        Ok(Self { database, engine })
    }

    /// Closes everything in order.
    pub(crate) fn close(self) -> Result<(), Error> {
        drop(self.database);
        Ok(self.engine.close()?)
    }
}

pub(crate) fn run(options: &DemoWorkerOptions) -> Result<Verdict, Error> {
    let sources = sources::read_sources(&options.files)?;
    let opened = Opened::open(&options.device, options.cache.0, options.stats.page())?;
    std::thread::scope(|scope| {
        let commit_all = || {
            while let Some((id, source)) = next_order()? {
                let source = sources.get(source).ok_or_else(|| wrong_order(&format!("{id} {source}")))?;
                commit(&opened.database, id, source).map_err(Error::redb("committing"))?;
                // A parent that no longer listens has been killed itself; what is committed stays committed.
                drop(writeln!(std::io::stdout().lock(), "{id}"));
            }
            Ok(())
        };
        let threads: Vec<_> = (0..options.threads).map(|_| scope.spawn(commit_all)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or(Err(Error::ThreadPanicked { what: "committed" })))
            .collect::<Result<Vec<()>, Error>>()
    })?;
    opened.close()?;
    Ok(Verdict::Passed)
}

fn commit(database: &Database, id: TransactionId, source: &sources::Source) -> Result<(), redb::Error> {
    let mut write = database.begin_write()?;
    database::insert(&mut write, id, source)?;
    Ok(write.commit()?)
}

/// The next line of the input, understood; `None` at its end.
fn next_order() -> Result<Option<(TransactionId, usize)>, Error> {
    let mut line = String::new();
    if std::io::stdin().read_line(&mut line).map_err(Error::file("read", "standard input"))? == 0 {
        return Ok(None);
    }
    let order = line.trim_end().split_once(' ');
    let order = order.and_then(|(id, source)| Some((id.parse().ok()?, source.parse().ok()?)));
    order.map(Some).ok_or_else(|| wrong_order(&line))
}

fn wrong_order(line: &str) -> Error {
    Error::Option {
        option: "standard input",
        value: format!("{line:?}"),
        reason: "an order is a transaction's number and the index of a source".to_owned(),
    }
}
