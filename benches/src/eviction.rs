//! `versus eviction`: which share of accesses finds its page in the cache, beside other policies.
//!
//! The engine's figure is the real engine's: one shard on a device without data, one page an access, readahead off, so
//! that what is counted is demand. The others are plain simulations ([`policies`]) that are given the same accesses, and the
//! optimum, which knows the future, says how much there was to gain. Nothing is timed, so the figures are the same on every
//! machine and in every run.
//!
//! The loads are synthetic ([`traces`]), and with `--trace FILE` a recorded one. A trace of block requests is replayed
//! page by page: each 4 KiB page that a request touches is one access, in order, whether it reads or writes.

mod policies;
mod traces;

use std::path::Path;

use anyhow::Result;
use foliant::MappingOptions;
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController};

use self::policies::{Arc, Clock, Lru, Policy, S3Fifo, Sieve, optimum};
use self::traces::Accesses;
use crate::engine::DrivenEngine;
use crate::measure::Effort;
use crate::report::{Answer, Cell, Limit, Row, Table, Target};
use crate::walk::PAGE;

const MIB: u64 = 1 << 20;

/// Sizes of the cache for a recorded trace.
const TRACE_MIB: [u64; 5] = [16, 64, 128, 256, 512];
/// Size of the cache for the synthetic loads, which are made to measure.
const SYNTHETIC_MIB: u64 = 16;
/// How far under S3-FIFO's the engine's ratio may lie at a single size, in points.
const UNDER_MAX: f64 = 0.5;

/// Makes a policy of so many frames, for so many different pages.
type Make = fn(usize, usize) -> Box<dyn Policy>;

const POLICIES: [(&str, Make); 5] = [
    ("LRU", |frames, pages| Box::new(Lru::new(frames, pages))),
    ("CLOCK", |frames, pages| Box::new(Clock::new(frames, pages))),
    ("SIEVE", |frames, pages| Box::new(Sieve::new(frames, pages))),
    (S3_FIFO, |frames, pages| Box::new(S3Fifo::new(frames, pages))),
    ("ARC", |frames, pages| Box::new(Arc::new(frames, pages))),
];
const S3_FIFO: &str = "S3-FIFO";

/// Runs every load through every policy.
pub fn answer(effort: Effort, trace: Option<&Path>) -> Result<Answer> {
    let mut tables = Vec::new();
    let mut targets = Vec::new();
    if let Some(path) = trace {
        let accesses = traces::recorded(path)?;
        let runs: Vec<(&Accesses, u64)> = TRACE_MIB.iter().map(|&mib| (&accesses, mib)).collect();
        let mut table = compare(
            format!("hits of 100 accesses, {} by the size of the cache", path.display()),
            vec!["16 MiB", "64 MiB", "128 MiB", "256 MiB", "512 MiB", "mean"],
            &runs,
        )?;
        for row in &mut table.rows {
            row.cells.push(Cell::Figure(mean(&figures(row))));
        }
        let [engine, peer] = ["Foliant", S3_FIFO].map(|name| {
            figures(table.rows.iter().find(|row| row.name == name).expect("every policy has its row"))
        });
        let above = engine.last().zip(peer.last()).map(|(engine, peer)| engine - peer);
        let what = "mean ratio on the trace, above S3-FIFO's";
        targets.push(Target::new(what, "points", Limit::AtLeast(0.0), above));
        let least = engine.iter().zip(&peer).map(|(engine, peer)| engine - peer).reduce(f64::min);
        let what = "ratio on the trace beside S3-FIFO's, at the size where it is least";
        targets.push(Target::new(what, "points", Limit::AtLeast(-UNDER_MAX), least));
        tables.push(table);
    }
    let frames = (SYNTHETIC_MIB * MIB) as usize / PAGE;
    let loads = traces::synthetic(frames, effort);
    let runs: Vec<(&Accesses, u64)> = loads.iter().map(|(_, load)| (load, SYNTHETIC_MIB)).collect();
    let columns = loads.iter().map(|&(name, _)| name).collect();
    tables.push(compare(
        format!("hits of 100 accesses, synthetic loads on {SYNTHETIC_MIB} MiB"),
        columns,
        &runs,
    )?);
    Ok(Answer {
        question: "eviction",
        rounds: 1,
        targets,
        tables,
        notes: vec![
            "Foliant: the engine itself, one shard, readahead off; the others: simulations without anything around them, \
             S3-FIFO with a small queue of a tenth and as many ghosts as the main queue has pages"
                .into(),
            "optimum: evicts what is used last in the future (Belady)".into(),
        ],
    })
}

/// The ratios of all policies on some runs: accesses and the size of the cache.
fn compare(title: String, columns: Vec<&'static str>, runs: &[(&Accesses, u64)]) -> Result<Table> {
    let frames = |mib: u64| (mib * MIB) as usize / PAGE;
    let mut rows = Vec::new();
    let cells = runs.iter().map(|&(accesses, mib)| Ok(Cell::Figure(engine_ratio(accesses, mib * MIB)?)));
    rows.push(Row::new("Foliant", cells.collect::<Result<_>>()?));
    for (name, make) in POLICIES {
        let cells = runs.iter().map(|&(accesses, mib)| {
            let mut policy = make(frames(mib), accesses.pages());
            let hits = accesses.numbers().iter().filter(|&&page| policy.access(page)).count();
            Cell::Figure(percent(hits, accesses))
        });
        rows.push(Row::new(name, cells.collect()));
    }
    let cells = runs.iter().map(|&(accesses, mib)| {
        Cell::Figure(percent(optimum(accesses.numbers(), accesses.pages(), frames(mib)), accesses))
    });
    rows.push(Row::new("optimum", cells.collect()));
    Ok(Table { title, columns, rows })
}

/// The engine's share of hits, in percent.
fn engine_ratio(accesses: &Accesses, cache_bytes: u64) -> Result<f64> {
    let device = EmulatedController::new(EmulatedConfig::null(accesses.device_bytes(), 4096))?;
    let options = MappingOptions { readahead_bytes_max: 0, ..MappingOptions::default() };
    let mut engine = DrivenEngine::open_with(device, cache_bytes, 1, &options)?;
    for page in accesses.on_device() {
        engine.read_page(page)?;
    }
    let misses = engine.engine.stats().pages_read as usize;
    Ok(percent(accesses.numbers().len() - misses, accesses))
}

fn percent(hits: usize, accesses: &Accesses) -> f64 {
    100.0 * hits as f64 / accesses.numbers().len() as f64
}

fn figures(row: &Row) -> Vec<f64> {
    let figure = |cell: &Cell| if let Cell::Figure(figure) = cell { Some(*figure) } else { None };
    row.cells.iter().filter_map(figure).collect()
}

fn mean(figures: &[f64]) -> f64 {
    figures.iter().sum::<f64>() / figures.len() as f64
}
