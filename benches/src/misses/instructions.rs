//! Instructions of a miss, counted by callgrind: a figure that no other program's load changes.
//!
//! `versus misses` runs itself under callgrind with the hidden question `misses-callgrind`. Collected is what happens inside
//! one function that is never inlined; the instructions of the raw driver's reads, device included, are counted in the same
//! way, so the difference is the engine's.

use anyhow::{Context, Result, bail};

use super::{BATCH, NULL, OwnShard, PAGES};
use crate::callgrind;
use crate::driver::NullBed;
use crate::report::{Answer, Cell, Row, Table};

/// Reads counted of each kind.
const READS: usize = 4096;
/// How the child is told what to do.
const KIND_VARIABLE: &str = "FOLIANT_VERSUS_MISSES";
/// The function inside which callgrind collects.
const MARKED: &str = "marked_misses";

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Raw,
    Pinned,
    Copied,
    RawBatch,
    ReadMany,
    PinMany,
}

impl Kind {
    const ALL: [Self; 6] =
        [Self::Raw, Self::Pinned, Self::Copied, Self::RawBatch, Self::ReadMany, Self::PinMany];

    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw driver, queue depth 1",
            Self::Pinned => "on the shard, pinned",
            Self::Copied => "on the shard, copied",
            Self::RawBatch => "raw driver, 64 at once",
            Self::ReadMany => "read_many of 64",
            Self::PinMany => "pin_many of 64",
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Pinned => "pinned",
            Self::Copied => "copied",
            Self::RawBatch => "raw-batch",
            Self::ReadMany => "read-many",
            Self::PinMany => "pin-many",
        }
    }

    /// What the raw driver does for the same.
    fn raw(self) -> Self {
        match self {
            Self::Raw | Self::Pinned | Self::Copied => Self::Raw,
            Self::RawBatch | Self::ReadMany | Self::PinMany => Self::RawBatch,
        }
    }
}

/// Adds the table of instructions, or says why there is none.
///
/// # Errors
/// When valgrind is there but doesn't finish, or what it writes can't be read.
pub fn add_table(answer: &mut Answer) -> Result<()> {
    if let Err(error) = std::process::Command::new("valgrind").arg("--version").output() {
        answer.notes.push(format!("no instructions were counted: valgrind can't be run ({error})"));
        return Ok(());
    }
    let directory = tempfile::tempdir().context("cannot create a temporary directory")?;
    let out = directory.path().join("callgrind.out");
    let count = |kind: Kind| -> Result<f64> {
        let question = ("misses-callgrind", KIND_VARIABLE, kind.word());
        let profile = callgrind::profile(question, &[MARKED], &out)?;
        let cost = callgrind::inclusive_cost(&profile, MARKED);
        Ok(cost.with_context(|| format!("callgrind saw no call of {MARKED}"))? as f64 / READS as f64)
    };
    let counted: Vec<(Kind, f64)> =
        Kind::ALL.into_iter().map(|kind| Ok((kind, count(kind)?))).collect::<Result<_>>()?;
    let raw_of = |kind: Kind| counted.iter().find(|(of, _)| *of == kind.raw()).map_or(0.0, |(_, raw)| *raw);
    let row = |&(kind, figure): &(Kind, f64)| {
        Row::new(kind.name(), [figure, figure - raw_of(kind)].map(Cell::Figure).to_vec())
    };
    answer.tables.push(Table {
        title: "instructions a page that misses, null (callgrind)".into(),
        columns: vec!["device included", "beyond the raw driver"],
        rows: counted.iter().map(row).collect(),
    });
    Ok(())
}

/// The child's part: misses of one kind, through the marked function.
///
/// # Errors
/// When a read fails, or it isn't called by [`add_table`].
pub fn run_counted() -> Result<()> {
    let word = std::env::var(KIND_VARIABLE).unwrap_or_default();
    let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.word() == word) else {
        bail!("{KIND_VARIABLE} isn't set: run `versus misses` instead");
    };
    if kind.raw() == kind {
        let mut raw = NullBed::on((NULL.config)(), PAGES, BATCH)?;
        let depth = if kind == Kind::Raw { 1 } else { BATCH };
        raw.read_untimed(depth, READS)?;
        return marked_misses(|| raw.read_untimed(depth, READS));
    }
    let mut own = OwnShard::open(NULL)?;
    marked_misses(|| match kind {
        Kind::Pinned => own.pins(READS),
        Kind::Copied => own.reads(READS),
        Kind::ReadMany => own.batches(READS),
        _ => own.pinned_batches(READS),
    })
}

#[inline(never)]
fn marked_misses(misses: impl FnOnce() -> Result<()>) -> Result<()> {
    misses()
}
