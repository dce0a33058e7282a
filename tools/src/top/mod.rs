//! `foliant top`: what running engines do, from their stats pages.
//!
//! It opens the pages read-only and talks to no engine; see `foliant`'s module `observe` for how they come to be. Figures
//! are made from two readings ([`figures`]), and shown on a terminal ([`screen`], driven by [`live`]), as a table, as one
//! JSON object, or for Prometheus ([`prometheus`]).

mod figures;
mod live;
mod prometheus;
mod screen;

use std::path::Path;
use std::time::{Duration, Instant};

use foliant::{EngineState, StatsReader, StatsSnapshot, stats_directories};
use serde::Serialize;

use self::figures::{Figures, Watched};
use crate::cli::TopOptions;
use crate::error::Error;
use crate::stdout::{Format, Report, write_line, write_report};
use crate::table::Table;
use crate::verdict::Verdict;

/// Longest time that a shard needs to publish something while it sleeps.
const PUBLISHED_WITHIN: Duration = Duration::from_millis(1100);

pub(crate) fn run(options: &TopOptions) -> Result<Verdict, Error> {
    let mut pages = open(options.page.as_deref())?;
    if options.prometheus {
        let snapshots = pages.iter().map(Page::read).collect::<Result<Vec<_>, Error>>()?;
        let named = pages.iter().map(|page| page.reader.path()).zip(&snapshots);
        write_line(prometheus::text(named).trim_end())?;
        return Ok(Verdict::Passed);
    }
    if !options.once && !options.json {
        live::run(&mut pages, options)?;
        return Ok(Verdict::Passed);
    }
    pages.iter_mut().try_for_each(Page::watch)?;
    // A shard that sleeps publishes once a second: a shorter look would see nothing of it.
    std::thread::sleep(options.interval().max(PUBLISHED_WITHIN));
    let engines =
        pages.iter_mut().map(|page| page.watch().and_then(|()| page.figures())).collect::<Result<_, _>>()?;
    write_report(&TopReport { engines }, Format::of(options.json))?;
    Ok(Verdict::Passed)
}

/// A page, and what was read of it until now.
#[derive(Debug)]
struct Page {
    reader: StatsReader,
    watched: Watched,
}

impl Page {
    fn new(reader: StatsReader) -> Self {
        Self { reader, watched: Watched::default() }
    }

    fn read(&self) -> Result<StatsSnapshot, Error> {
        Ok(self.reader.read()?)
    }

    /// Reads it once more. Where its engine has ended and another has its page in the same place, that is watched.
    fn watch(&mut self) -> Result<(), Error> {
        if self.reader.state() == EngineState::Ended
            && let Ok(successor) = StatsReader::open(self.reader.path())
            && successor.state() == EngineState::Running
        {
            *self = Self::new(successor);
        }
        let snapshot = self.read()?;
        self.watched.take(snapshot, Instant::now());
        Ok(())
    }

    fn figures(&self) -> Result<Figures, Error> {
        let path = self.reader.path();
        self.watched.figures(path).ok_or_else(|| Error::Stats {
            path: path.to_owned(),
            reason: "its shards have published nothing yet; try again in a second".to_owned(),
        })
    }
}

/// The page asked for, or those of all running engines.
fn open(page: Option<&Path>) -> Result<Vec<Page>, Error> {
    if let Some(path) = page {
        return Ok(vec![Page::new(StatsReader::open(path)?)]);
    }
    let mut found = StatsReader::find();
    found.retain(|reader| reader.state() == EngineState::Running);
    if found.is_empty() {
        let looked: Vec<_> = stats_directories().iter().map(|path| path.display().to_string()).collect();
        return Err(Error::NoStats { looked: looked.join(", ") });
    }
    Ok(found.into_iter().map(Page::new).collect())
}

#[derive(Debug, Serialize)]
struct TopReport {
    engines: Vec<Figures>,
}

impl Report for TopReport {
    fn table(&self) -> Table {
        self.engines.iter().fold(Table::default(), |table, figures| {
            let lines = figures::lines(figures);
            lines.into_iter().fold(table.section(figures.title()), Table::line)
        })
    }
}
