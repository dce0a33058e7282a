//! Runs a case's steps on a bed, beside the model.
//!
//! Operations are futures that the run polls when a step says so. Between two steps nothing happens, and what the
//! device saw is taken in before any future is polled, so that the model knows at every poll what has happened.

use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use foliant::{Gate, Mapping};

use super::case::{COMMAND_TIMEOUT, Notice, Setup, Step, Trouble};
use super::content::{Moment, OpId, Page};
use super::device_log::{DeviceLog, Extent};
use super::logged::Log;
use super::operations::{HandleId, HandleState, Op, index, newest};
use super::passes::{Cyclic, Tail};
use super::retries::Retries;
use super::rules::{Fault, Faults, Met, Rule};
use super::telling::Owed;
use crate::Bed;

/// Operations in flight at most.
const OPS_MAX: usize = 10;

/// One mapping, in the model.
#[derive(Debug)]
pub(crate) struct Modelled {
    pub pages: Vec<Page>,
    pub state: MappingState,
    /// The engine says that no power cut tears its pages.
    pub is_atomic: bool,
    /// What a handle is owed that is opened now.
    pub unseen: Owed,
    /// When any handle was last told of a failed writeback.
    pub told: Moment,
    /// A failed writeback has been recorded since the engine was started.
    pub had_event: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MappingState {
    /// Nobody has opened it since the engine was started, or since it was closed.
    Shut,
    Open,
    /// It is being closed.
    Closing,
    /// A close was abandoned: nobody knows whether it is closed, until the engine is started anew.
    Limbo,
}

/// A sync that began when everything was at rest, while the flusher keeps out of the way: all writes are its own.
pub(crate) struct Quiet {
    pub op: OpId,
    pub mapping: usize,
    pub began: Moment,
    /// By shard: it has taken the sync, and so marked what it will write.
    pub tagged: Vec<bool>,
    /// Nothing else was in flight from its beginning to its end.
    pub alone: bool,
    pub background_passes: u64,
    /// By page: surely clean when it began.
    pub clean: Vec<bool>,
    /// By page: perhaps poisoned when it began.
    pub poisoned: Vec<bool>,
    /// Pages that were held exclusively at any time since it began.
    pub held: Vec<usize>,
    /// Surely dirty when it began, and held by nobody.
    pub dirty: Vec<usize>,
    /// Writes: queue, range, and whether a fault failed it at once.
    pub writes: Vec<(u16, Extent)>,
}

/// A command that failed and was a part of what one page takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unsettled {
    pub qid: u16,
    pub mapping: usize,
    pub part: FailedPart,
    pub extent: Extent,
    pub failed: Moment,
}

/// What such a command was.
#[derive(Clone, Copy, Debug)]
pub(crate) enum FailedPart {
    Read,
    /// A write, whether that may be tried again, and what its failure is worth.
    Write {
        put_off: bool,
        owed: Owed,
    },
}

/// What is true since the engine was started.
#[derive(Debug, Default)]
pub(crate) struct Life {
    pub began_ns: u64,
    /// When a page was last written, by its stripe.
    pub written_ns: HashMap<(usize, u64), u64>,
    /// Until when a write that was dropped may stand in line for dirty memory.
    pub rival_left_ns: u64,
    pub struck: Faults,
    pub latched: bool,
    pub doomed: bool,
    pub is_power_off: bool,
    pub syncs: u64,
    pub flushes: u64,
    /// When the last successful flush was fetched.
    pub flushed: Moment,
    /// Everything that the device answers no more is on purpose.
    pub stopped: bool,
    pub sq_batches: u64,
    /// A shard may still be working on a sync whose future was dropped.
    pub sync_abandoned: bool,
    /// Commands that failed where a page takes several: what the page ends with shows when the queue is idle at the latest.
    pub unsettled: Vec<Unsettled>,
    /// Pages that complete passes had to write: mapping, page, and when the pass began.
    pub passed: Vec<(usize, usize, Moment)>,
    /// Pages that were read ahead and had been read by somebody after the last read.
    pub readahead_used: u64,
    /// The last pass, if nothing has been asked for since: the device gets some of its writes only now.
    pub tail: Option<Tail>,
    /// By mapping: where its next cyclic pass begins, if that is known.
    pub cyclic: [Option<Cyclic>; 2],
    /// Writes that failed in passing.
    pub retries: Retries,
    /// What the device has seen is taken in late: time has passed since, nobody knows how much.
    pub is_late: bool,
}

/// A run.
pub(crate) struct World {
    // Operations before handles, and those before the bed: dropped in this order.
    pub ops: Vec<Op>,
    pub handles: Vec<(HandleId, Rc<Mapping>)>,
    pub bed: Bed,
    pub setup: Setup,
    pub log: DeviceLog,
    pub mappings: Vec<Modelled>,
    pub handle_states: Vec<HandleState>,
    /// Discards whose futures were dropped: shards may still carry them out.
    pub zombies: Vec<(OpId, usize, Range<usize>)>,
    pub quiet: Option<Quiet>,
    pub log_state: Log,
    pub gate: Option<Gate>,
    pub life: Life,
    pub met: Met,
    pub ever_cut: bool,
    pub moment: Moment,
    pub next_op: OpId,
    pub generation: u64,
    pub idle_us: u64,
    /// Nothing was in flight or in progress after the last step.
    pub at_rest: bool,
}

impl World {
    pub(crate) fn new(setup: &Setup) -> Self {
        let bed = Bed::new(setup.device(), setup.engine());
        let empty = |mapping, page| Page::new(&vec![0; setup.page_bytes(mapping, page) as usize]);
        let modelled = |mapping| Modelled {
            pages: (0..setup.pages(mapping)).map(|page| empty(mapping, page)).collect(),
            state: MappingState::Shut,
            is_atomic: false,
            unseen: Owed::No,
            told: 0,
            had_event: false,
        };
        let mut world = Self {
            ops: Vec::new(),
            handles: Vec::new(),
            bed,
            setup: *setup,
            log: DeviceLog::default(),
            mappings: (0..setup.mappings).map(modelled).collect(),
            handle_states: Vec::new(),
            zombies: Vec::new(),
            quiet: None,
            log_state: Log::default(),
            gate: None,
            life: Life::default(),
            met: Met::default(),
            ever_cut: false,
            moment: 0,
            next_op: 0,
            generation: 0,
            idle_us: 1,
            at_rest: false,
        };
        world.observe();
        world
    }

    pub(super) fn observe(&mut self) {
        let locate = self.bed.engine().locator();
        self.log.attach(&self.bed.device, self.setup.block_bytes, locate);
        self.open_gate();
        self.life.began_ns = self.bed.now_ns();
        self.life.sq_batches = self.bed.device.stats().sq_batches;
    }

    /// A check of `rule` was exercised.
    pub(crate) fn met(&mut self, rule: Rule) {
        let mut faults = self.life.struck;
        if self.ever_cut {
            faults.add(Fault::PowerCut);
        }
        self.met.note(rule, faults);
    }

    /// A check of `rule` was exercised by writes. A device that has stopped did those before.
    pub(crate) fn met_by_writes(&mut self, rule: Rule) {
        if !self.life.struck.has(Fault::Stopped) {
            self.met(rule);
        }
    }

    pub(crate) fn now(&mut self) -> Moment {
        self.moment += 1;
        self.moment
    }

    // ---- steps --------------------------------------------------------------------------------------------

    pub(crate) fn step(&mut self, step: &Step) {
        let was_at_rest = std::mem::take(&mut self.at_rest);
        match *step {
            Step::Write { on, at, len } => self.write(on, at, len),
            Step::TryWrite { on, at, len } => self.try_write(on, at, len),
            Step::Pass { on, how, budget, put_off } => self.pass(on, how, budget, put_off, was_at_rest),
            Step::WriteLsn { on, at, len } => self.write_lsn(on, at, len),
            Step::Advance { behind } => {
                self.advance_log(behind);
                self.at_rest = was_at_rest && !self.setup.is_gated;
            }
            Step::FlushUntil { on, behind } => self.flush_until(on, behind, was_at_rest),
            Step::Oldest { on } => self.oldest_lsn(on),
            Step::Read { on, at, len } => self.read(on, at, len),
            Step::Scan { on, at, len } => {
                for part in 0..4 {
                    self.read(on, at.wrapping_add(part * len), len);
                    self.finish(0);
                }
            }
            Step::Prefetch { on, at, len } => self.prefetch(on, at, len),
            Step::Pin { on, page } => self.pin(on, page),
            Step::PinMut { on, page, change } => self.pin_mut(on, page, change),
            Step::Sync { on } => self.sync(on, was_at_rest),
            Step::SyncRange { on, at, len } => self.sync_range(on, at, len, was_at_rest),
            Step::Discard { on, at, len } => self.discard(on, at, len),
            Step::Clone { on } => self.clone_handle(on),
            Step::Drop { on } => {
                if let Some(at) = index(on, self.handles.len()) {
                    self.handles.remove(at);
                }
                self.at_rest = was_at_rest;
            }
            Step::Open { mapping } => {
                self.open(usize::from(mapping) % self.setup.mappings);
            }
            Step::Close { on } => self.close(on),
            Step::Release { op } => self.release(op),
            Step::Poll { op } => {
                if let Some(at) = newest(op, self.ops.len()) {
                    self.poll(at);
                }
            }
            Step::Abandon { op } => self.abandon(op),
            Step::Finish { op } => self.finish(op),
            Step::Shard { shard } => {
                let shard = usize::from(shard) % self.setup.shards;
                self.bed.step_shard(shard);
                if let Some(quiet) = &mut self.quiet {
                    quiet.tagged[shard] = true;
                }
                self.absorb();
            }
            Step::Settle => self.settle(),
            Step::Time { us } => {
                // The emulated device works only while somebody polls: a shard left alone for longer than a command
                // may take would find its commands overdue.
                let mut rest = Duration::from_micros(u64::from(us));
                while !rest.is_zero() {
                    let part = rest.min(COMMAND_TIMEOUT / 8);
                    self.bed.pass_time(part);
                    self.turn();
                    rest -= part;
                }
            }
            Step::Fault(trouble) => {
                self.inject(trouble);
                self.at_rest = was_at_rest;
            }
            Step::Mend => {
                self.bed.device.clear_faults();
                if self.life.stopped {
                    self.inject(Trouble::Stop);
                }
                self.at_rest = was_at_rest;
            }
            Step::Cut { seed, notice } => self.cut(seed, notice),
            Step::Kill => self.kill(),
        }
        if self.ops.len() > OPS_MAX {
            self.finish_at(0);
        }
    }

    /// Ends the run: everything comes to its end, is synced if that can be, and survives a last power cut.
    pub(crate) fn end(mut self) -> Met {
        self.advance_log(0);
        self.quiesce();
        self.bed.device.clear_faults();
        if !self.life.doomed && !self.life.latched {
            self.drain_device();
            self.settle();
            self.check_at_rest();
        }
        if !self.life.doomed && !self.life.latched {
            for mapping in 0..self.setup.mappings {
                if self.mappings[mapping].state == MappingState::Limbo {
                    continue;
                }
                // Every handle twice: first it is told what it is owed, then everything is well.
                let mut handles: Vec<_> = self
                    .handles
                    .iter()
                    .filter(|(id, _)| self.handle_states[*id].mapping == mapping)
                    .cloned()
                    .collect();
                if handles.is_empty()
                    && let Some(opened) = self.open(mapping)
                {
                    handles.push(opened);
                }
                for (id, handle) in handles {
                    for _ in 0..2 {
                        self.settle();
                        let at_rest = std::mem::take(&mut self.at_rest);
                        self.start_sync(id, &handle, 0..self.setup.pages(mapping), at_rest);
                        self.quiesce();
                    }
                }
            }
        }
        self.cut(0x5EED, Notice::No);
        self.met
    }

    // ---- power and death ----------------------------------------------------------------------------------

    pub(super) fn cut(&mut self, seed: u16, notice: Notice) {
        self.absorb();
        self.bed.device.power_cut(u64::from(seed)).expect("the device models power loss");
        self.ever_cut = true;
        self.life.struck.add(Fault::PowerCut);
        self.check_what_is_left();
        if notice == Notice::Yes {
            (self.life.doomed, self.life.is_power_off) = (true, true);
            self.ops.iter_mut().for_each(|op| op.lived.doomed = true);
            self.quiesce();
        }
        self.start_anew();
        for mapping in 0..self.setup.mappings {
            for page in 0..self.setup.pages(mapping) {
                self.mappings[mapping].pages[page] = Page::new(&self.image(mapping, page));
            }
        }
    }

    pub(super) fn kill(&mut self) {
        self.absorb();
        self.start_anew();
        for mapping in 0..self.setup.mappings {
            for page in 0..self.setup.pages(mapping) {
                let image = self.image(mapping, page);
                self.check_killed(mapping, page, &image);
                self.mappings[mapping].pages[page].restarted(&image);
            }
        }
    }

    /// Drops engine and handles, and opens an engine on the same device.
    pub(super) fn start_anew(&mut self) {
        self.bed.device.clear_faults();
        self.log.detach(&self.bed.device);
        self.bed.drop_shards();
        self.bed.engine = None;
        self.ops.clear();
        self.handles.clear();
        self.handle_states.clear();
        self.zombies.clear();
        self.quiet = None;
        self.gate = None;
        self.life = Life { flushed: self.life.flushed, ..Life::default() };
        for mapping in &mut self.mappings {
            (mapping.state, mapping.unseen, mapping.had_event) = (MappingState::Shut, Owed::No, false);
        }
        self.bed.power_on();
        self.observe();
    }
}
