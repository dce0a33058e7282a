//! `versus latency`: what somebody who waits notices of a flush at full speed.
//!
//! The device has a modelled latency of 80 µs and moves no data, so that what is measured is how the engine shares its core
//! and its queue between who reads, who syncs, and writeback. One thread drives everything; the clock is the one on the wall,
//! since waiting for the device is a part of it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController, Latency};

use crate::engine::DrivenEngine;
use crate::measure::{Effort, median};
use crate::report::{Answer, Cell, Limit, Row, Table, Target};
use crate::walk::PAGE;

const DEVICE_US: u64 = 80;
const GIB: u64 = 1 << 30;

/// Measures reads and small syncs with and without a drain beside them.
pub fn answer(effort: Effort) -> Result<Answer> {
    let rounds = effort.rounds(5);
    let dirty_pages: u64 = if effort.quick { 1 << 15 } else { GIB / PAGE as u64 };
    let (mut quiet, mut busy, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let (mut alone, mut beside, mut whole) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let mut bed = Bed::open(dirty_pages)?;
        let calm = bed.reads(4000)?;
        bed.dirty()?;
        let (busy_reads, _) = bed.reads_beside_a_sync()?;
        ratios.push(percentile(&busy_reads, 0.99) / percentile(&calm, 0.99));
        quiet.push(calm);
        busy.push(busy_reads);

        alone.push(bed.small_sync_us()?);
        bed.dirty()?;
        let (small_us, drain_us) = bed.small_sync_beside_a_sync()?;
        beside.push(small_us);
        whole.push(drain_us);
    }
    let row = |name: &str, samples: &[Vec<f64>]| {
        let of = |part: f64| {
            let figures: Vec<f64> = samples.iter().map(|round| percentile(round, part)).collect();
            Cell::Figure(median(&figures))
        };
        let count = samples.iter().map(Vec::len).sum::<usize>() as u64;
        Row::new(name, vec![Cell::Count(count), of(0.5), of(0.9), of(0.99), of(0.999)])
    };
    let reads = Table {
        title: format!("4 KiB reads that miss, one at a time, device of {DEVICE_US} µs"),
        columns: vec!["reads", "p50 µs", "p90 µs", "p99 µs", "p99.9 µs"],
        rows: vec![
            row("nothing else happens", &quiet),
            row("beside a sync of dirty pages at full speed", &busy),
        ],
    };
    let sync = |name: &str, figures: &[f64]| Row::new(name, vec![Cell::Figure(median(figures))]);
    let syncs = Table {
        title: format!("sync of one dirty page, {} MiB dirty elsewhere", (dirty_pages * PAGE as u64) >> 20),
        columns: vec!["µs"],
        rows: vec![
            sync("nothing else dirty", &alone),
            sync("while the rest is being drained", &beside),
            sync("(the drain itself)", &whole),
        ],
    };
    let small = median(&beside) / median(&alone);
    Ok(Answer {
        question: "latency",
        rounds,
        tables: vec![reads, syncs],
        targets: vec![
            Target::new(
                "p99 of reads under a flush at full speed beside none",
                "times",
                Limit::AtMost(3.0),
                Some(median(&ratios)),
            ),
            Target::new(
                "sync of one page beside a drain, beside the same alone",
                "times",
                Limit::AtMost(10.0),
                Some(small),
            ),
        ],
        notes: vec![
            "emu:null with a latency: commands complete on time, whatever their size; no data is copied"
                .into(),
        ],
    })
}

/// An engine with pages to dirty in the first part of its device, and pages to read that are in no cache behind them.
struct Bed {
    engine: DrivenEngine,
    dirty_pages: u64,
    next_read: u64,
}

impl Bed {
    fn open(dirty_pages: u64) -> Result<Self> {
        let config = EmulatedConfig {
            latency: Latency::uniform(Duration::from_micros(DEVICE_US)),
            ..EmulatedConfig::null(16 * GIB, PAGE as u32)
        };
        let cache_bytes = dirty_pages * PAGE as u64 / 2 * 3;
        let engine = DrivenEngine::open(EmulatedController::new(config)?, cache_bytes, 1)?;
        Ok(Self { engine, dirty_pages, next_read: dirty_pages + 64 })
    }

    fn dirty(&mut self) -> Result<()> {
        let page = [3; PAGE];
        (0..self.dirty_pages).try_for_each(|at| self.engine.write_page(at, &page))
    }

    /// A page that nobody has read yet, far from the last one.
    fn read_us(&mut self) -> Result<f64> {
        self.next_read += 97;
        let start = Instant::now();
        self.engine.read_page(self.next_read)?;
        Ok(micros(start))
    }

    fn reads(&mut self, count: usize) -> Result<Vec<f64>> {
        (0..count).map(|_| self.read_us()).collect()
    }

    /// Reads, one after the other, until a sync of everything has ended; and how long that took.
    fn reads_beside_a_sync(&mut self) -> Result<(Vec<f64>, f64)> {
        let start = Instant::now();
        let drain = self.engine.start_sync(0..self.dirty_pages * PAGE as u64);
        let mut reads = Vec::new();
        while !drain.has_ended() {
            reads.push(self.read_us()?);
        }
        let elapsed_us = micros(start);
        drain.result()?;
        ensure!(reads.len() >= 10, "only {} reads beside a drain of {elapsed_us} µs", reads.len());
        Ok((reads, elapsed_us))
    }

    fn small_sync_us(&mut self) -> Result<f64> {
        self.engine.write_page(self.dirty_pages, &[5; PAGE])?;
        let start = Instant::now();
        let at = self.dirty_pages * PAGE as u64;
        self.engine.sync_range(at..at + PAGE as u64)?;
        Ok(micros(start))
    }

    /// The small sync, begun when the large one is under way; and how long the large one took.
    fn small_sync_beside_a_sync(&mut self) -> Result<(f64, f64)> {
        let start = Instant::now();
        let drain = self.engine.start_sync(0..self.dirty_pages * PAGE as u64);
        for _ in 0..4 {
            self.read_us()?;
        }
        let small_us = self.small_sync_us()?;
        ensure!(!drain.has_ended(), "the drain has ended before the small sync");
        self.engine.drive_until(|| drain.has_ended());
        let drain_us = micros(start);
        drain.result()?;
        Ok((small_us, drain_us))
    }
}

fn micros(start: Instant) -> f64 {
    start.elapsed().as_nanos() as f64 / 1e3
}

fn percentile(samples: &[f64], part: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() as f64 * part) as usize).min(sorted.len() - 1)]
}
