//! The other side of a stats page: reading what a running engine, or one that has ended, shows of itself.
//!
//! The page is opened read-only and copied before it is looked at, so that nothing which happens to it meanwhile, and no
//! byte that it holds, can do anything but make it unreadable.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, FlockOperation, Mode, OFlags, flock, fstat, open};

use super::catalogue::{Metric, MetricKind};
use super::histogram::{self, LatencyHistogram};
use super::layout::{self, Header};
use super::page::EXTENSION;
use super::place::stats_directories;
use crate::error::{Error, Result};

/// Whether the engine behind a page runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineState {
    /// Its process has it open.
    Running,
    /// Its process has ended without closing it, or it was closed since the page was opened.
    Ended,
}

/// An open stats page.
#[derive(Debug)]
pub struct StatsReader {
    file: File,
    path: PathBuf,
    header: Header,
}

impl StatsReader {
    /// Opens a page for reading.
    ///
    /// # Errors
    /// [`Error::StatsPage`] when it can't be read, or isn't one.
    pub fn open(path: &Path) -> Result<Self> {
        let refused = |reason: String| Error::StatsPage { path: path.to_owned(), reason };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = open(path, flags, Mode::empty())
            .map_err(|error| refused(format!("cannot be opened: {error}")))?;
        let file = File::from(file);
        let header = read_whole(&file).and_then(|page| Header::decode(&page)).map_err(refused)?;
        Ok(Self { file, path: path.to_owned(), header })
    }

    /// The pages that there are in the [places](stats_directories) where engines with
    /// [`StatsPage::Found`](super::StatsPage::Found) have theirs, and that this process may read; what isn't one is left
    /// out.
    #[must_use]
    pub fn find() -> Vec<Self> {
        let in_directory = |directory: PathBuf| {
            let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
            let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
            paths.retain(|path| path.extension().is_some_and(|extension| extension == EXTENSION));
            paths.sort();
            paths
        };
        let paths = stats_directories().into_iter().flat_map(in_directory);
        paths.filter_map(|path| Self::open(&path).ok()).collect()
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The process that made it.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.header.pid
    }

    /// Whether the engine runs: its process holds a lock on the page.
    #[must_use]
    pub fn state(&self) -> EngineState {
        match flock(&self.file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => {
                // Not to keep a successor from replacing it.
                let _ = flock(&self.file, FlockOperation::Unlock);
                EngineState::Ended
            }
            Err(_) => EngineState::Running,
        }
    }

    /// What it holds now.
    ///
    /// # Errors
    /// [`Error::StatsPage`] when it can't be read any more, or was damaged.
    pub fn read(&self) -> Result<StatsSnapshot> {
        let refused = |reason: String| Error::StatsPage { path: self.path.clone(), reason };
        // Before the records: what an engine that has ended published last is read after that.
        let state = self.state();
        let page = read_whole(&self.file).map_err(refused)?;
        let header = Header::decode(&page).map_err(refused)?;
        let places = header.places();
        let record = |shard: usize| {
            let records = [0, 1].map(|turn| page.get(places.of(shard, turn)).and_then(layout::open_record));
            records.into_iter().flatten().max_by_key(|record| record.sequence)
        };
        let shards = (0..header.shards).map(|shard| {
            record(shard).map(|record| ShardRecord {
                sequence: record.sequence,
                time_ns: record.time_ns,
                values: record.values,
            })
        });
        let shards = shards.collect();
        let Header { pid, opened_unix_ns, device, program, metrics, .. } = header;
        Ok(StatsSnapshot { pid, opened_unix_ns, device, program, state, metrics, shards })
    }
}

fn read_whole(file: &File) -> std::result::Result<Vec<u8>, String> {
    let stat = fstat(file).map_err(|error| format!("cannot be looked at: {error}"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err("is no regular file, and so no stats page".to_owned());
    }
    let len = u64::try_from(stat.st_size).unwrap_or(0);
    if len > layout::PAGE_BYTES_MAX {
        return Err(format!("has {len} bytes; no stats page has more than {}", layout::PAGE_BYTES_MAX));
    }
    let mut page = vec![0; len as usize];
    file.read_exact_at(&mut page, 0).map_err(|error| format!("cannot be read: {error}"))?;
    Ok(page)
}

/// What a page held at one moment.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StatsSnapshot {
    /// The process that made it.
    pub pid: u32,
    /// When the engine was opened, in nanoseconds since 1970.
    pub opened_unix_ns: u64,
    /// The device's name.
    pub device: String,
    /// The program's name.
    pub program: String,
    /// Whether the engine runs.
    pub state: EngineState,
    /// Which metrics each record has.
    pub metrics: Vec<Metric>,
    /// The newest whole record of each shard; `None` before its first.
    pub shards: Vec<Option<ShardRecord>>,
}

impl StatsSnapshot {
    /// The value of a counter or a gauge in a record of this page; `None` where the page has no such metric.
    #[must_use]
    pub fn value(&self, record: &ShardRecord, name: &str) -> Option<u64> {
        let metric = self.metric(name).filter(|metric| metric.kind != MetricKind::Histogram)?;
        record.values.get(metric.at).copied()
    }

    /// A histogram in a record of this page.
    #[must_use]
    pub fn histogram(&self, record: &ShardRecord, name: &str) -> Option<LatencyHistogram> {
        let metric = self.metric(name).filter(|metric| metric.kind == MetricKind::Histogram)?;
        LatencyHistogram::from_words(record.values.get(metric.at..metric.at + histogram::WORDS)?)
    }

    fn metric(&self, name: &str) -> Option<&Metric> {
        self.metrics.iter().find(|metric| metric.name == name)
    }
}

/// What one shard published at one moment of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShardRecord {
    /// Counts the shard's records from 1 on: one that stays the same has published nothing.
    pub sequence: u64,
    /// The shard's clock, in nanoseconds: what differences of counters are to be divided by.
    pub time_ns: u64,
    values: Vec<u64>,
}
