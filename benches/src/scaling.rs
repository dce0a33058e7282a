//! `versus scaling`: how the cost of tagging and of a pass grows with the size of the file and the number of its dirty
//! pages (WB-43).
//!
//! The emulated device moves no data, so what is timed is the engine's and the driver's own work. Tagging is what an
//! integrity pass does when it begins; a sync is everything: the request, tagging, the writes, their completions and the
//! commit. [`hits`] and [`shards`] add how a hit grows with the number of cached pages, and throughput with the number of
//! shards.

mod curve;
mod folded;
mod hits;
mod instructions;
mod shards;
mod simulation;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use foliant::WritebackControl;
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

use self::curve::{Picture, Series};
pub use self::instructions::run_measured_requests;
use crate::engine::DrivenEngine;
use crate::measure::{Effort, ThreadClock, median};
use crate::report::{Answer, Cell, Limit, Row, Table, Target};
use crate::walk::PAGE;

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// Dirty pages in the comparison of file sizes.
const FEW: u64 = 100;

/// What grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Writeback with the size of the file and the number of its dirty pages.
    Writeback,
    /// A hit with the number of cached pages.
    Hits,
    /// Throughput with the number of shards.
    Shards,
}

/// Measures all parts, or one, and draws their curves into `plots`, if that is a folder's name.
pub fn answer(effort: Effort, plots: Option<&Path>, only: Option<Part>) -> Result<Answer> {
    if let Some(folder) = plots {
        std::fs::create_dir_all(folder).with_context(|| format!("{} can't be made", folder.display()))?;
    }
    let wanted = |part| only.is_none_or(|only| only == part);
    let rounds = effort.rounds(9);
    let mut answer =
        Answer { question: "scaling", rounds, tables: Vec::new(), targets: Vec::new(), notes: Vec::new() };
    if wanted(Part::Writeback) {
        add_writeback(&mut answer, effort, plots)?;
    }
    if wanted(Part::Hits) {
        hits::add_to(&mut answer, effort, plots)?;
    }
    if wanted(Part::Shards) {
        shards::add_to(&mut answer, effort, plots)?;
    }
    Ok(answer)
}

fn add_writeback(answer: &mut Answer, effort: Effort, plots: Option<&Path>) -> Result<()> {
    let rounds = answer.rounds;
    let million: u64 = if effort.quick { 1 << 17 } else { 1_000_000 };
    let mut targets = Vec::new();

    let mut rows = Vec::new();
    for (name, stride, order, limit_ms) in [
        ("dense", 1, Order::OfFile, 0.1),
        ("one page in 8", 8, Order::OfFile, f64::NAN),
        ("one page in 64", 64, Order::OfFile, 5.0),
        ("dense, in random order", 1, Order::Random, f64::NAN),
        ("one page in 8, in random order", 8, Order::Random, f64::NAN),
        ("one page in 64, in random order", 64, Order::Random, f64::NAN),
    ] {
        let tagged_ms = tagging_ms(Spread { count: million, stride, order }, rounds)?;
        let per_page = tagged_ms * 1e6 / million as f64;
        rows.push(Row::new(
            name,
            vec![Cell::Count(million), Cell::Figure(tagged_ms), Cell::Figure(per_page)],
        ));
        if !limit_ms.is_nan() && !effort.quick {
            let what = format!("tagging {million} dirty pages, {name}");
            targets.push(Target::new(what, "ms", Limit::AtMost(limit_ms), Some(tagged_ms)));
        }
    }
    let tagging = Table {
        title: "tagging for an integrity pass".into(),
        columns: vec!["dirty pages", "ms", "ns a page"],
        rows,
    };

    let mut rows = Vec::new();
    let mut by_size = Vec::new();
    for (name, size) in [
        ("1 GiB", GIB),
        ("16 GiB", 16 * GIB),
        ("256 GiB", 256 * GIB),
        ("1 TiB", TIB),
        ("16 TiB", 16 * TIB),
        ("256 TiB", 256 * TIB),
    ] {
        let us = sync_us(FEW, size / PAGE as u64 / FEW, size, rounds)?;
        rows.push(Row::new(name, vec![Cell::Count(FEW), Cell::Figure(us), Cell::Figure(us / FEW as f64)]));
        by_size.push((size as f64 / GIB as f64, us));
    }
    let (smallest, tebibyte) = (by_size[0].1, by_size[3].1);
    targets.push(Target::new(
        "sync of 100 dirty pages in 1 TiB beside 1 GiB",
        "times",
        Limit::AtMost(3.0),
        Some(tebibyte / smallest),
    ));
    let sizes = Table {
        title: "sync of 100 dirty pages, spread evenly, by the size of the file".into(),
        columns: vec!["dirty pages", "µs", "µs a page"],
        rows,
    };

    let mut rows = Vec::new();
    let mut by_count = Vec::new();
    for count in [1, 10, 100, 1_000, 10_000, 100_000] {
        let us = sync_us(count, TIB / PAGE as u64 / count, TIB, rounds)?;
        rows.push(Row::new(
            format!("{count}"),
            vec![Cell::Count(count), Cell::Figure(us), Cell::Figure(us / count as f64)],
        ));
        by_count.push((count as f64, us));
    }
    let counts = Table {
        title: "sync of pages spread evenly over 1 TiB, by their number".into(),
        columns: vec!["dirty pages", "µs", "µs a page"],
        rows,
    };

    if let Some(folder) = plots {
        Picture {
            title: "Sync of 100 dirty pages, by the size of the file",
            across: "GiB",
            up: "µs of processor time",
            series: vec![Series::plain(by_size)],
        }
        .draw(&folder.join("scaling-file-size.svg"))?;
        Picture {
            title: "Sync of pages spread over 1 TiB, by their number",
            across: "dirty pages",
            up: "µs of processor time",
            series: vec![Series::plain(by_count)],
        }
        .draw(&folder.join("scaling-dirty-pages.svg"))?;
    }
    answer.tables.extend([tagging, sizes, counts]);
    answer.targets.extend(targets);
    answer.notes.extend([
        "emu:null, one shard: the device's part is its work on commands, which is the same for every size"
            .into(),
        "pages that lie apart are a command each".into(),
    ]);
    Ok(())
}

/// In which order pages are dirtied, and with that the nodes of their tags made.
#[derive(Clone, Copy, Debug)]
enum Order {
    OfFile,
    Random,
}

/// Dirty pages, each `stride` behind the last.
#[derive(Clone, Copy, Debug)]
struct Spread {
    count: u64,
    stride: u64,
    order: Order,
}

impl Spread {
    /// An engine on a device of `size` bytes with these pages dirty.
    fn on_device_of(self, size: u64) -> Result<DrivenEngine> {
        let device = EmulatedController::new(EmulatedConfig::null(size, PAGE as u32))?;
        let cache_bytes = (self.count * PAGE as u64 / 4 * 5).max(8 << 20);
        let mut engine = DrivenEngine::open(device, cache_bytes, 1)?;
        self.dirty(&mut engine)?;
        Ok(engine)
    }

    fn dirty(self, engine: &mut DrivenEngine) -> Result<()> {
        let page = [7; PAGE];
        let mut positions: Vec<u64> = (0..self.count).collect();
        if matches!(self.order, Order::Random) {
            positions.shuffle(&mut SmallRng::seed_from_u64(42));
        }
        positions.into_iter().try_for_each(|at| engine.write_page(at * self.stride, &page))?;
        let dirty = engine.engine.stats().dirty_pages;
        ensure!(dirty == self.count, "{dirty} of {} pages are dirty", self.count);
        Ok(())
    }
}

/// Processor time in milliseconds that an integrity pass takes to begin, over pages that were dirtied since the last.
fn tagging_ms(spread: Spread, rounds: usize) -> Result<f64> {
    let mut engine = spread.on_device_of(spread.count * spread.stride * PAGE as u64)?;
    let mut figures = Vec::new();
    for round in 0..=rounds {
        let clock = ThreadClock::start();
        let pass = engine.begin_pass(WritebackControl::integrity())?;
        let elapsed_ns = clock.elapsed_ns();
        ensure!(pass.outcome().is_ok(), "the pass has not failed");
        drop(pass);
        if round > 0 {
            figures.push(elapsed_ns / 1e6);
        }
        if round < rounds {
            engine.sync()?;
            spread.dirty(&mut engine)?;
        }
    }
    Ok(median(&figures))
}

/// Processor time in microseconds of a sync of `count` dirty pages.
fn sync_us(count: u64, stride: u64, size: u64, rounds: usize) -> Result<f64> {
    let spread = Spread { count, stride, order: Order::OfFile };
    let mut engine = spread.on_device_of(size)?;
    let mut figures = Vec::new();
    for round in 0..=rounds {
        let clock = ThreadClock::start();
        engine.sync()?;
        let elapsed_ns = clock.elapsed_ns();
        if round > 0 {
            figures.push(elapsed_ns / 1e3);
        }
        spread.dirty(&mut engine)?;
    }
    Ok(median(&figures))
}
