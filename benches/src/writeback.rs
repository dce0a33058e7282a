//! `versus writeback`: what draining dirty pages costs beyond the commands themselves.
//!
//! The engine syncs a mapping full of dirty pages on an emulated RAM device; the raw driver issues the very same
//! commands: the same sizes in the same order, as many a doorbell, from memory that was dirtied just as recently and lies
//! in the order of the file, the best that it can do. The raw time over ours is the share of the drain that is not the
//! engine's own work. Both run on one thread, which drives the emulated device, too.
//!
//! A third row has the raw driver's memory where a pool of buffers has it that hands them out as they are asked for:
//! scattered, when pages come in random order. The engine's frames lie by the file there as well.
//!
//! Beside that, exactly: how many write commands the device saw for several patterns of dirty pages, against the sum
//! over the dirty runs of ⌈run ÷ the most that a command may carry⌉.

mod pattern;
mod raw;

use std::sync::Arc;

use anyhow::{Result, ensure};
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController};

use self::pattern::{Limits, Pattern};
use self::raw::RawDriver;
use crate::engine::DrivenEngine;
use crate::measure::{Effort, ThreadClock, Timed};
use crate::report::{Answer, Cell, Limit, Row, Table, Target};
use crate::walk::PAGE;

/// The least share of the raw driver's speed.
const SPEED_MIN: f64 = 0.95;

const IN_SEQUENCE: &str = "dirtied in sequence";
const IN_RANDOM_ORDER: &str = "dirtied in random order";
const SCATTERED: &str = "dirtied in random order, raw memory scattered";

/// Times the drains and counts the commands.
pub fn answer(effort: Effort) -> Result<Answer> {
    let rounds = effort.rounds(9);
    let pages: u32 = if effort.quick { 1 << 16 } else { 1 << 18 };
    let mut targets = Vec::new();
    let mut rows = Vec::new();
    let ram = EmulatedConfig::ram as fn(u64, u32) -> EmulatedConfig;
    let null = EmulatedConfig::null as fn(u64, u32) -> EmulatedConfig;
    for (name, device, pattern, raw_placed) in [
        (IN_SEQUENCE, ram, Pattern::All, Pattern::All),
        (IN_RANDOM_ORDER, ram, Pattern::Shuffled, Pattern::All),
        (SCATTERED, ram, Pattern::Shuffled, Pattern::Shuffled),
        ("dirtied in sequence, device copies nothing", null, Pattern::All, Pattern::All),
        ("dirtied in random order, device copies nothing", null, Pattern::Shuffled, Pattern::All),
    ] {
        let drain = Drain::measure(device, pattern, raw_placed, pages, rounds)?;
        let speed = drain.raw.ratio_to(&drain.ours);
        let per_page = |timed: &Timed| Cell::Figure(timed.median() / f64::from(pages));
        rows.push(Row::new(
            name,
            vec![
                Cell::Figure(drain.ours.median() / 1e6),
                Cell::Figure(drain.raw.median() / 1e6),
                per_page(&drain.ours),
                per_page(&drain.raw),
                Cell::Figure(speed),
                Cell::Count(drain.commands),
                Cell::Figure(drain.commands as f64 / drain.doorbells as f64),
            ],
        ));
        if [IN_SEQUENCE, IN_RANDOM_ORDER].contains(&name) {
            let what = format!("speed of a sync beside the raw driver, {name}");
            targets.push(Target::new(what, "of it", Limit::AtLeast(SPEED_MIN), Some(speed)));
        }
    }
    let drains = Table {
        title: format!("drain {} MiB of dirty pages", (pages as usize * PAGE) >> 20),
        columns: vec![
            "ours ms",
            "raw ms",
            "ours ns a page",
            "raw ns a page",
            "raw ÷ ours",
            "commands",
            "commands a doorbell",
        ],
        rows,
    };
    let (counts, wrong) = count_commands()?;
    let what = "patterns whose number of write commands differs from the sum over their runs";
    targets.push(Target::new(what, "patterns", Limit::AtMost(0.0), Some(wrong as f64)));
    Ok(Answer {
        question: "writeback",
        rounds,
        tables: vec![drains, counts],
        targets,
        notes: vec![
            "raw: the same commands by the driver alone, PRP lists included, and one flush, from memory of the same kind"
                .into(),
            "emu:ram copies the data in both cases; emu:null copies none, which leaves the work of engine, driver and \
             controller"
                .into(),
            "a run ends where a stripe, or the device's optimal boundary (NOIOB), ends".into(),
        ],
    })
}

/// One timed pattern.
struct Drain {
    ours: Timed,
    raw: Timed,
    /// Write commands of one sync.
    commands: u64,
    doorbells: u64,
}

impl Drain {
    /// Dirties and drains in turn with the engine and with the raw driver, on the same device: where its memory lies
    /// decides how fast it copies, by more than what is measured here.
    fn measure(
        device: fn(u64, u32) -> EmulatedConfig,
        pattern: Pattern,
        raw_placed: Pattern,
        pages: u32,
        rounds: usize,
    ) -> Result<Self> {
        let (order, placed) = (pattern.order(pages), raw_placed.order(pages));
        let device = EmulatedController::new(device(u64::from(pages) * PAGE as u64, 4096))?;
        let mut drain = Self {
            ours: Timed { name: "ours", rounds: Vec::new() },
            raw: Timed { name: "raw", rounds: Vec::new() },
            commands: 0,
            doorbells: 0,
        };
        for round in 0..=rounds {
            let fill = [round as u8; PAGE];
            let ours_ns = drain.engine_round(&device, &order, &fill)?;
            let mut raw = RawDriver::open(&device, &placed)?;
            raw.dirty(&order, &fill);
            let batch = drain.commands.div_ceil(drain.doorbells) as u32;
            let raw_ns = raw.drain(batch)?;
            ensure!(
                raw.commands() == drain.commands,
                "the raw driver issues {} commands, the engine issued {}",
                raw.commands(),
                drain.commands
            );
            if round > 0 {
                drain.ours.rounds.push(ours_ns);
                drain.raw.rounds.push(raw_ns);
            }
        }
        Ok(drain)
    }

    /// Fills the cache of a fresh engine with dirty pages and times its sync.
    fn engine_round(
        &mut self,
        device: &Arc<EmulatedController>,
        order: &[u32],
        fill: &[u8; PAGE],
    ) -> Result<f64> {
        let pages = order.len() as u64;
        // Room for all pages to be dirty below the flusher's threshold of nine tenths.
        let mut engine = DrivenEngine::open(device.clone(), pages * PAGE as u64 / 4 * 5, 1)?;
        for &page in order {
            engine.write_page(u64::from(page), fill)?;
        }
        let (before, stats) = (device.stats(), engine.engine.stats());
        ensure!(stats.dirty_pages == pages, "{} of {pages} pages are dirty", stats.dirty_pages);
        let clock = ThreadClock::start();
        engine.sync()?;
        let elapsed_ns = clock.elapsed_ns();
        self.commands = device.stats().writes - before.writes;
        self.doorbells = engine.engine.stats().doorbells - stats.doorbells;
        Ok(elapsed_ns)
    }
}

/// Pages of the mapping in which commands are counted: 64 MiB.
const COUNTED_PAGES: u32 = 1 << 14;
/// Pages of a stripe, the piece of a mapping that one of several shards holds (2 MiB).
const STRIPE_PAGES: u64 = 512;

/// Counts the write commands of a sync for each pattern and each set of limits; also returns how many counts are
/// not what the runs say.
fn count_commands() -> Result<(Table, usize)> {
    let devices = [
        ("MDTS 1 MiB", EmulatedConfig { mdts: 8, ..counted_device() }, 1),
        ("MDTS 128 KiB", EmulatedConfig { mdts: 5, ..counted_device() }, 1),
        ("NOIOB 256 KiB", EmulatedConfig { mdts: 8, noiob_blocks: 64, ..counted_device() }, 1),
        ("two shards, stripes of 2 MiB", EmulatedConfig { mdts: 8, ..counted_device() }, 2),
    ];
    let patterns = [
        ("all", Pattern::All),
        ("all, shuffled", Pattern::Shuffled),
        ("every other", Pattern::EveryOther),
        ("random half", Pattern::RandomHalf),
        ("runs of 1 to 700", Pattern::Runs),
    ];
    let mut rows = Vec::new();
    let mut wrong = 0;
    for (device_name, config, shards) in devices {
        let limits = Limits {
            command_pages: 1 << config.mdts,
            boundary_pages: match (config.noiob_blocks, shards) {
                (0, 1) => u64::MAX,
                (0, _) => STRIPE_PAGES,
                (blocks, _) => u64::from(blocks),
            },
        };
        for (pattern_name, pattern) in &patterns {
            let order = pattern.order(COUNTED_PAGES);
            let cache_bytes = u64::from(COUNTED_PAGES) * PAGE as u64 * 2;
            let mut engine =
                DrivenEngine::open(EmulatedController::new(config.clone())?, cache_bytes, shards)?;
            for &page in &order {
                engine.write_page(u64::from(page), &[1; PAGE])?;
            }
            let device = engine.device.stats();
            engine.sync()?;
            let counted = engine.device.stats().writes - device.writes;
            let doorbells = engine.device.stats().sq_batches - device.sq_batches;
            let expected = limits.commands(&order);
            wrong += usize::from(counted != expected);
            rows.push(Row::new(
                format!("{device_name}: {pattern_name}"),
                vec![
                    Cell::Count(order.len() as u64),
                    Cell::Count(counted),
                    Cell::Count(expected),
                    Cell::Figure(order.len() as f64 / counted as f64),
                    Cell::Figure(counted as f64 / doorbells as f64),
                ],
            ));
        }
    }
    let table = Table {
        title: "write commands of a sync".into(),
        columns: vec!["dirty pages", "commands", "expected", "pages a command", "commands a doorbell"],
        rows,
    };
    Ok((table, wrong))
}

fn counted_device() -> EmulatedConfig {
    EmulatedConfig::ram(u64::from(COUNTED_PAGES) * PAGE as u64, 4096)
}
