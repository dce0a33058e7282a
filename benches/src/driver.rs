//! `versus driver`: what a 4 KiB read costs from submission to completion, without a device that takes time.
//!
//! The emulated controller with the `null` backing checks each command, walks its PRPs and posts its completion, but
//! moves no data. Driver and controller share one pinned thread, so the time is what both together take; how it
//! divides between them is told by the instructions that [`callgrind`] counts.

use std::collections::VecDeque;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use foliant_nvme::{Controller, ControllerOptions, DmaBuffer, Io, Lba, Namespace, QueuePair};
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::callgrind::{self, Counted};
use crate::measure::{Contestant, Effort, ThreadClock, race};
use crate::report::{Answer, Cell, Limit, Row, Table, Target};

/// Blocks of the null device: 64 GiB in blocks of 4 KiB.
const BLOCKS: u64 = 1 << 24;
/// Random block addresses, used round and round.
const LBAS: usize = 1 << 16;
/// Queue depths and the most that an I/O may take at each, in nanoseconds.
const DEPTHS: [(usize, &str, f64); 3] =
    [(1, "queue depth 1", 400.0), (32, "queue depth 32", 150.0), (128, "queue depth 128", 150.0)];
/// The most instructions that the driver may spend on submission and completion of one read.
const INSTRUCTIONS_MAX: f64 = 350.0;

/// A queue pair on a null device, with buffers to read into.
pub struct NullBed {
    pub queue: QueuePair<DmaBuffer>,
    pub namespace: Namespace,
    /// Buffers that no command holds.
    pub free: VecDeque<DmaBuffer>,
    lbas: Vec<Lba>,
    next: usize,
    /// Outlives the queue pair.
    _controller: Controller,
    device: Arc<EmulatedController>,
}

impl NullBed {
    /// A bed for queue depths up to `depth`.
    pub fn new(depth: usize) -> Result<Self> {
        Self::on(EmulatedConfig::null(BLOCKS * 4096, 4096), BLOCKS, depth)
    }

    /// The same on any device of `blocks` blocks of 4 KiB.
    pub fn on(config: EmulatedConfig, blocks: u64, depth: usize) -> Result<Self> {
        Self::with_buffers(config, blocks, depth)
    }

    /// The same with any number of buffers, which are used by turns: so much memory is read into.
    pub fn with_buffers(config: EmulatedConfig, blocks: u64, buffers: usize) -> Result<Self> {
        let device = EmulatedController::new(config)?;
        let options =
            ControllerOptions { io_queue_pairs: 1, arena_bytes: buffers * 4096, ..Default::default() };
        let controller = Controller::open(device.attach()?, &options)?;
        let namespace = controller.namespace(1).context("the null device has no namespace 1")?.clone();
        let queue = controller.queue_pair()?;
        let free = (0..buffers).map(|_| controller.arena().allocate(4096)).collect::<Result<_, _>>()?;
        let mut rng = SmallRng::seed_from_u64(1);
        let lbas = (0..LBAS).map(|_| Lba(rng.random_range(0..blocks))).collect();
        Ok(Self { queue, namespace, free, lbas, next: 0, _controller: controller, device })
    }

    /// From now on the buffers' turns are in random order, as a cache's frames come to be read into.
    pub fn scatter_buffers(&mut self) {
        self.free.make_contiguous().shuffle(&mut SmallRng::seed_from_u64(2));
    }

    /// The next read of the sequence.
    pub fn next_read(&mut self) -> Io {
        let lba = self.lbas[self.next % LBAS];
        self.next += 1;
        Io::Read { lba, blocks: 1 }
    }

    /// Reads `count` blocks with `depth` commands in flight, a doorbell for each `depth` of them; returns the
    /// processor time of one in nanoseconds.
    pub fn reads(&mut self, depth: usize, count: usize) -> Result<f64> {
        let clock = ThreadClock::start();
        self.read_untimed(depth, count)?;
        Ok(clock.elapsed_ns() / (count / depth * depth) as f64)
    }

    /// The same without a look at the clock, for callgrind.
    pub fn read_untimed(&mut self, depth: usize, count: usize) -> Result<()> {
        for _ in 0..count / depth {
            for _ in 0..depth {
                let io = self.next_read();
                let buffer = self.free.pop_front().context("a buffer was lost")?;
                self.queue
                    .submit(&self.namespace, io, buffer)
                    .map_err(|rejected| anyhow!(rejected.reason))?;
            }
            self.queue.ring();
            while self.queue.in_flight() > 0 {
                self.queue.pump();
                let free = &mut self.free;
                let mut failed = None;
                self.queue.poll(depth as u32, |completion| {
                    free.push_back(completion.payload);
                    failed = failed.or(completion.result.err());
                })?;
                if let Some(error) = failed {
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }
}

/// Times reads at each depth and counts the driver's instructions.
pub fn answer(effort: Effort) -> Result<Answer> {
    let rounds = effort.rounds(15);
    let count = if effort.quick { 1 << 16 } else { 1 << 18 };
    let (timed, commands_per_doorbell) = std::thread::scope(|scope| {
        let timing = scope.spawn(|| {
            // The last core: interrupts and other programs like the first.
            if let Some(&core) = core_affinity::get_core_ids().unwrap_or_default().last() {
                core_affinity::set_for_current(core);
            }
            time_depths(rounds, count)
        });
        timing.join().map_err(|_| anyhow!("the measuring thread panicked"))?
    })?;
    let mut targets = Vec::new();
    let mut rows = Vec::new();
    for ((&(_, name, most), timed), per_doorbell) in DEPTHS.iter().zip(&timed).zip(commands_per_doorbell) {
        let ns = timed.median();
        rows.push(Row::new(
            name,
            vec![
                Cell::Figure(ns),
                Cell::Figure(timed.best()),
                Cell::Figure(most),
                Cell::Figure(1e3 / ns),
                Cell::Figure(per_doorbell),
            ],
        ));
        targets.push(Target::new(format!("4 KiB read, {name}"), "ns", Limit::AtMost(most), Some(ns)));
    }
    let times = Table {
        title: "driver and emulated controller (null), one core".into(),
        columns: vec!["ns an I/O", "best", "target", "M I/O a s", "commands a doorbell"],
        rows,
    };
    let mut answer = Answer { question: "driver", rounds, tables: vec![times], targets, notes: Vec::new() };
    add_instructions(&mut answer)?;
    Ok(answer)
}

/// The timings of all depths, and the commands that each doorbell rang for, as the device counted them.
fn time_depths(rounds: usize, count: usize) -> Result<(Vec<crate::measure::Timed>, Vec<f64>)> {
    let mut beds = DEPTHS.iter().map(|&(depth, ..)| NullBed::new(depth)).collect::<Result<Vec<_>>>()?;
    let mut contestants: Vec<Contestant<'_>> = DEPTHS
        .iter()
        .zip(&mut beds)
        .map(|(&(depth, name, _), bed)| Contestant::new(name, move || bed.reads(depth, count)))
        .collect();
    let timed = race(rounds, &mut contestants)?;
    drop(contestants);
    let batches = beds.iter().map(|bed| {
        let stats = bed.device.stats();
        stats.reads as f64 / stats.sq_batches as f64
    });
    Ok((timed, batches.collect()))
}

/// Adds the table of instructions, or says why there is none.
fn add_instructions(answer: &mut Answer) -> Result<()> {
    let what = |depth| format!("driver's instructions for submission and completion, queue depth {depth}");
    let target =
        |depth, figure| Target::new(what(depth), "instructions", Limit::AtMost(INSTRUCTIONS_MAX), figure);
    let counted = match callgrind::count_instructions(&[1, 32])? {
        Counted::Instructions(counted) => counted,
        Counted::NoValgrind(reason) => {
            answer.targets.push(target(1, None));
            answer.notes.push(format!("no instructions were counted: {reason}"));
            return Ok(());
        }
    };
    let mut rows = Vec::new();
    for at in &counted {
        answer.targets.push(target(at.depth, Some(at.driver())));
        let cells = [at.submit, at.ring, at.poll, at.driver(), at.pump].map(Cell::Figure).to_vec();
        rows.push(Row::new(format!("queue depth {}", at.depth), cells));
    }
    answer.tables.push(Table {
        title: "instructions an I/O (callgrind)".into(),
        columns: vec!["submit", "ring", "poll", "driver", "emulator's pump"],
        rows,
    });
    Ok(())
}
