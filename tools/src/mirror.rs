//! `foliant mirror`: whether a mirror is in sync, making it so, and accepting it when its primary is lost.
//!
//! What it knows stands in the labels behind the ranges; nothing but `resync` and `accept` writes.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use foliant::{Engine, EngineOptions, MappingOptions, MirrorDevice, MirrorLabel, MirrorOptions, MirrorState};
use serde::Serialize;

use crate::cli::{MirrorAccept, MirrorCommand, MirrorRange, MirrorResync, MirrorStatus};
use crate::error::Error;
use crate::progress::Progress;
use crate::size::ByteSize;
use crate::stdout::{Format, Report, write_report};
use crate::table::Table;
use crate::target::Target;
use crate::verdict::Verdict;

/// How often the progress bar moves.
const TICK: Duration = Duration::from_millis(50);

pub(crate) fn run(command: &MirrorCommand) -> Result<Verdict, Error> {
    match command {
        MirrorCommand::Status(options) => status(options),
        MirrorCommand::Resync(options) => resync(options),
        MirrorCommand::Accept(options) => accept(options),
    }
}

impl MirrorRange {
    fn mapping(&self) -> MappingOptions {
        MappingOptions {
            namespace: self.namespace,
            start_bytes: self.start.map_or(0, |start| start.0),
            len_bytes: self.len.map(|len| len.0),
            ..MappingOptions::default()
        }
    }
}

/// A small engine that reads and writes labels.
fn engine(target: &Target) -> Result<Engine, Error> {
    target.require_existing("mirror")?;
    let options = EngineOptions { cache_bytes: 1 << 20, ..EngineOptions::default() };
    Ok(Engine::open_on(target.open()?.attach()?, &options)?)
}

fn label(target: &Target, range: &MappingOptions) -> Result<Option<MirrorLabel>, Error> {
    let engine = engine(target)?;
    let label = engine.mirror_label(range)?;
    engine.close()?;
    Ok(label)
}

#[derive(Debug, Serialize)]
struct Label {
    uri: String,
    /// "primary" or "mirror"; `None` without a label.
    role: Option<String>,
    state: Option<String>,
    pair: Option<String>,
    generation: Option<u64>,
    start_bytes: Option<u64>,
    len_bytes: Option<u64>,
}

impl Label {
    fn new(target: &Target, label: Option<&MirrorLabel>) -> Self {
        Self {
            uri: target.uri().to_owned(),
            role: label.map(|label| label.role.to_string()),
            state: label.map(|label| label.state.to_string()),
            pair: label.map(|label| format!("{:016x}", label.pair)),
            generation: label.map(|label| label.generation),
            start_bytes: label.map(|label| label.start_bytes),
            len_bytes: label.map(|label| label.len_bytes),
        }
    }

    fn rows(&self, table: Table) -> Table {
        let table = table.section(&self.uri);
        let (Some(role), Some(state), Some(pair), Some(generation), Some(start), Some(len)) =
            (&self.role, &self.state, &self.pair, self.generation, self.start_bytes, self.len_bytes)
        else {
            return table.row("label", "none");
        };
        table
            .row("label", format!("{role}, {state}"))
            .row("pair", format!("{pair}, generation {generation}"))
            .row("range", format!("{} from byte {start} on", ByteSize(len)))
    }
}

#[derive(Debug, Serialize)]
struct Status {
    labels: Vec<Label>,
    /// Whether both hold the same; `None` if only one was looked at.
    in_sync: Option<bool>,
    /// Why not.
    cause: Option<String>,
}

impl Report for Status {
    fn table(&self) -> Table {
        let table = self.labels.iter().fold(Table::default(), |table, label| label.rows(table));
        match (self.in_sync, &self.cause) {
            (Some(true), _) => table.section("pair".to_owned()).row("mirror", "in sync"),
            (_, Some(cause)) => table.section("pair".to_owned()).row("mirror", format!("stale: {cause}")),
            _ => table,
        }
    }
}

fn status(options: &MirrorStatus) -> Result<Verdict, Error> {
    let primary = label(&options.uri, &options.range.mapping())?;
    let mut status =
        Status { labels: vec![Label::new(&options.uri, primary.as_ref())], in_sync: None, cause: None };
    let mut verdict = Verdict::Passed;
    if let Some(target) = &options.mirror {
        let mirror = label(target, &options.mirror_mapping(primary.as_ref()))?;
        status.labels.push(Label::new(target, mirror.as_ref()));
        let judged = MirrorLabel::judge(primary.as_ref(), mirror.as_ref());
        status.in_sync = Some(judged.is_ok());
        verdict = if judged.is_ok() { Verdict::Passed } else { Verdict::Failed };
        status.cause = judged.err().map(|cause| cause.to_string());
    }
    write_report(&status, Format::of(options.json))?;
    Ok(verdict)
}

impl MirrorStatus {
    fn mirror_mapping(&self, primary: Option<&MirrorLabel>) -> MappingOptions {
        let len = primary.map(|label| label.len_bytes).or(self.range.len.map(|len| len.0));
        MappingOptions {
            namespace: self.mirror_namespace,
            start_bytes: self.mirror_start.map_or(0, |start| start.0),
            len_bytes: len,
            ..MappingOptions::default()
        }
    }
}

#[derive(Debug, Serialize)]
struct Resynced {
    uri: String,
    mirror: String,
    /// What had to be copied: nothing if it was in sync.
    bytes: u64,
    seconds: f64,
}

impl Report for Resynced {
    fn table(&self) -> Table {
        Table::default()
            .section(format!("mirror of {}", self.uri))
            .row("mirror", format!("{}, in sync", self.mirror))
            .row("copied", format!("{} in {:.1} s", ByteSize(self.bytes), self.seconds))
    }
}

fn resync(options: &MirrorResync) -> Result<Verdict, Error> {
    let (primary, target) = (&options.uri, &options.mirror);
    primary.require_existing("mirror resync")?;
    let of_mirror = MirrorOptions {
        namespace: options.mirror_namespace,
        start_bytes: options.mirror_start.map_or(0, |start| start.0),
        ..MirrorOptions::default()
    };
    let same = primary.uri() == target.uri();
    if !options.overwrite {
        // What is this pair's mirror already may be overwritten, whatever it holds.
        let ours = label(primary, &options.range.mapping())?;
        let known = MappingOptions {
            namespace: of_mirror.namespace,
            start_bytes: of_mirror.start_bytes,
            len_bytes: ours.map(|label| label.len_bytes).or(options.range.len.map(|len| len.0)),
            ..MappingOptions::default()
        };
        let is_ours = target.medium_exists()
            && matches!((ours, label(target, &known)?), (Some(ours), Some(theirs)) if ours.pair == theirs.pair);
        if !is_ours {
            target.require_empty("mirror resync")?;
        }
    }
    let mut engine_options = EngineOptions { cache_bytes: 8 << 20, ..EngineOptions::default() };
    let engine = if same {
        engine_options.mirror = MirrorDevice::SameDevice;
        Engine::open_on(primary.open()?.attach()?, &engine_options)?
    } else {
        Engine::open_mirrored_on(primary.open()?.attach()?, target.open()?.attach()?, &engine_options)?
    };
    let mapping = engine.mapping(&MappingOptions { mirror: Some(of_mirror), ..options.range.mapping() })?;
    let since = Instant::now();
    let bar = Progress::bytes(mapping.len());
    bar.stage("copying");
    let handle = mapping.clone();
    let (sender, receiver) = channel();
    let copied = std::thread::scope(|scope| {
        // Nobody listens only if this thread has panicked.
        scope.spawn(move || drop(sender.send(handle.resync_mirror())));
        loop {
            match receiver.recv_timeout(TICK) {
                Ok(result) => break result,
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(MirrorState::Resyncing { done_bytes, .. }) = mapping.mirror_state() {
                        bar.set(done_bytes);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break Err(foliant::Error::Closed),
            }
        }
    });
    drop(bar);
    drop(mapping);
    let bytes = engine.stats().mirror_pages_copied * foliant::PAGE_BYTES as u64;
    let closed = engine.close();
    copied?;
    closed?;
    let resynced = Resynced {
        uri: primary.uri().to_owned(),
        mirror: target.uri().to_owned(),
        bytes,
        seconds: since.elapsed().as_secs_f64(),
    };
    write_report(&resynced, Format::of(options.json))?;
    Ok(Verdict::Passed)
}

fn accept(options: &MirrorAccept) -> Result<Verdict, Error> {
    let engine = engine(&options.uri)?;
    engine.accept_mirror(&options.range.mapping())?;
    let label = engine.mirror_label(&options.range.mapping())?;
    engine.close()?;
    let status =
        Status { labels: vec![Label::new(&options.uri, label.as_ref())], in_sync: None, cause: None };
    write_report(&status, Format::of(options.json))?;
    Ok(Verdict::Passed)
}
