//! Operations: handles, the futures that a run starts, polls and drops, and what the model knows of each.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::OnceLock;
use std::task::{Context, Poll, Waker};

use foliant::{Error, Lsn, Mapping, MappingOptions, WritebackOutcome};
use foliant_nvme_spec::NvmOpcode;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::case::{FRAME, PIN_WAIT, file_offset};
use super::content::{Moment, OpId, Page, Poisoned, Snapshot};
use super::passes::{Cyclic, Order};
use super::rules::{Fault, Rule};
use super::telling::{Circumstances, Owed};
use super::violated;
use super::world::{MappingState, Quiet, World};

/// Pins held at once at most: frames must be left for others.
pub(crate) const PINS_MAX: usize = 6;
/// Handles at most.
const HANDLES_MAX: usize = 6;

/// Numbers the handles of an engine's life, dropped ones included.
pub(crate) type HandleId = usize;

/// What is known of a handle, dropped ones included.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HandleState {
    pub mapping: usize,
    pub owed: Owed,
    /// When it was last told of a failed writeback, or another one was before it was opened.
    pub told: Moment,
}

/// What an operation ends with.
pub(crate) enum Output {
    Done(foliant::Result<()>),
    Bytes(foliant::Result<Vec<u8>>),
    Count(foliant::Result<usize>),
    Pass(foliant::Result<WritebackOutcome>),
    Lsn(foliant::Result<Option<Lsn>>),
}

/// What an operation is, and what the model needs at its end.
pub(crate) enum Kind {
    Read {
        range: Range<u64>,
        since: Vec<Snapshot>,
    },
    Write {
        range: Range<u64>,
        /// 0 for none.
        lsn: u64,
    },
    /// A background pass.
    Pass {
        order: Order,
    },
    /// A `flush_until`, or the question for the oldest number.
    Checkpoint {
        until: Option<u64>,
        /// Nothing else was going on when it began, and nothing was asked for since: how many passes of the flushers had
        /// begun then.
        others: Option<u64>,
        /// Pages that the device got writes of since, and the oldest numbers that they may have had.
        wrote: Vec<(usize, u64)>,
    },
    TryWrite {
        range: Range<u64>,
    },
    Discard {
        range: Range<u64>,
        zeroes_failed: bool,
    },
    Pin {
        page: usize,
        cell: Rc<PinCell>,
    },
    PinMut {
        page: usize,
        cell: Rc<PinCell>,
    },
    Sync {
        handle: HandleId,
        pages: Range<usize>,
        since: Vec<Snapshot>,
        held: Vec<OpId>,
        closes: Option<Owed>,
    },
}

impl Kind {
    /// Whether it may stand in line for dirty memory.
    fn dirties(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::TryWrite { .. } | Self::PinMut { .. })
    }
}

/// An operation in flight.
pub(crate) struct Op {
    pub id: OpId,
    pub kind: Kind,
    pub mapping: usize,
    pub future: Pin<Box<dyn Future<Output = Output>>>,
    pub began: Moment,
    pub began_ns: u64,
    /// The namespace had latched failed when it began.
    pub after_latch: bool,
    pub lived: Circumstances,
    pub polls: u32,
}

/// Between a held pin and the run.
#[derive(Default)]
pub(crate) struct PinCell {
    pub granted: RefCell<Option<Vec<u8>>>,
    pub left: RefCell<Option<Vec<u8>>>,
    pub release: Cell<bool>,
}

impl World {
    /// The handle that a step names, opening one if there is none.
    pub(super) fn handle(&mut self, on: u8) -> Option<(HandleId, Rc<Mapping>)> {
        match index(on, self.handles.len()) {
            Some(at) => Some(self.handles[at].clone()),
            None => self.open(usize::from(on) % self.setup.mappings),
        }
    }

    pub(super) fn open(&mut self, mapping: usize) -> Option<(HandleId, Rc<Mapping>)> {
        if self.handles.len() >= HANDLES_MAX
            || matches!(self.mappings[mapping].state, MappingState::Limbo | MappingState::Closing)
        {
            return None;
        }
        let gate = self.gate.clone().filter(|_| self.is_gated(mapping));
        let opened = self.bed.try_open(&MappingOptions { gate, ..self.setup.mapping(mapping) });
        self.life.is_late = true;
        self.absorb();
        self.life.is_late = false;
        match opened {
            Ok(opened) => {
                if self.mappings[mapping].state == MappingState::Shut {
                    self.life.cyclic[mapping] = Some(Cyclic::at_start(self.flusher_passes()));
                }
                self.mappings[mapping].state = MappingState::Open;
                self.mappings[mapping].is_atomic = opened.is_page_atomic();
                let id = self.new_handle_state(mapping);
                self.handles.push((id, Rc::new(opened)));
                self.handles.last().cloned()
            }
            Err(error) => {
                if !self.life.doomed {
                    violated(Rule::Bounded, format!("mapping {mapping} can't be opened: {error}"));
                }
                None
            }
        }
    }

    pub(super) fn new_handle_state(&mut self, mapping: usize) -> HandleId {
        let owed = self.mappings[mapping].unseen;
        let told = self.mappings[mapping].told;
        self.handle_states.push(HandleState { mapping, owed, told });
        self.handle_states.len() - 1
    }

    pub(super) fn clone_handle(&mut self, on: u8) {
        if self.handles.len() < HANDLES_MAX
            && let Some(at) = index(on, self.handles.len())
        {
            let (id, handle) = self.handles[at].clone();
            let id = self.new_handle_state(self.handle_states[id].mapping);
            self.handles.push((id, Rc::new((*handle).clone())));
        }
    }

    /// Room for one more change of each page: operations beyond that are finished first.
    pub(super) fn make_room(&mut self, mapping: usize, pages: &Range<usize>) -> bool {
        while self.mappings[mapping].pages[pages.clone()].iter().any(|page| !page.has_room()) {
            if self.ops.is_empty() {
                // Only what was abandoned is left.
                self.end_zombies();
            } else {
                self.release_all();
                if !self.ops.is_empty() {
                    self.finish_at(0);
                }
            }
        }
        self.settle_contents(mapping, pages)
    }

    /// Reads pages of which too many contents are possible, so that there is one. False when they can't be read.
    fn settle_contents(&mut self, mapping: usize, pages: &Range<usize>) -> bool {
        for page in pages.clone() {
            if !self.mappings[mapping].pages[page].is_vague() {
                continue;
            }
            self.quiesce();
            let states = &self.handle_states;
            let Some(at) = self.handles.iter().position(|(id, _)| states[*id].mapping == mapping) else {
                return false;
            };
            let len = self.setup.page_len(mapping);
            self.read(at as u8, (page as u64 * len) as u32, len as u32);
            self.quiesce();
            if self.mappings[mapping].pages[page].is_vague() {
                return false;
            }
        }
        true
    }

    pub(super) fn data(&mut self, len: u64) -> Vec<u8> {
        static NOISE: OnceLock<Vec<u8>> = OnceLock::new();
        let noise = NOISE.get_or_init(|| {
            let mut noise = vec![0; 512 * 1024];
            SmallRng::seed_from_u64(1).fill(&mut noise[..]);
            noise
        });
        self.generation += 1;
        let start = (self.generation.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 47) as usize;
        noise[start..start + len as usize].to_vec()
    }

    pub(super) fn write(&mut self, on: u8, at: u32, len: u32) {
        let Some((handle_id, handle)) = self.handle(on) else { return };
        let mapping = self.handle_states[handle_id].mapping;
        let range = self.setup.clip(mapping, at, len);
        if !self.make_room(mapping, &self.setup.pages_of(mapping, &range)) {
            return;
        }
        let data = self.data(range.end - range.start);
        let id = self.begin_change(mapping, &range, &data);
        let offset = file_offset(range.start);
        let future = async move { Output::Done(handle.write_at_async(offset, &data).await) };
        self.start(id, mapping, Kind::Write { range, lsn: 0 }, Box::pin(future));
    }

    pub(super) fn try_write(&mut self, on: u8, at: u32, len: u32) {
        let Some((handle_id, handle)) = self.handle(on) else { return };
        let mapping = self.handle_states[handle_id].mapping;
        let range = self.setup.clip(mapping, at, len);
        // All or nothing: of more than one frame a part may be written.
        let range = range.start..range.end.min(range.start / FRAME * FRAME + FRAME);
        if !self.make_room(mapping, &self.setup.pages_of(mapping, &range)) {
            return;
        }
        let data = self.data(range.end - range.start);
        let id = self.begin_change(mapping, &range, &data);
        let offset = file_offset(range.start);
        let future = async move { Output::Count(handle.try_write_at_async(offset, &data).await) };
        self.start(id, mapping, Kind::TryWrite { range }, Box::pin(future));
    }

    pub(super) fn prefetch(&mut self, on: u8, at: u32, len: u32) {
        let Some((handle_id, handle)) = self.handle(on) else { return };
        let mapping = self.handle_states[handle_id].mapping;
        let range = self.setup.clip(mapping, at, len);
        let len = range.end - range.start;
        let offset = file_offset(range.start);
        match handle.prefetch(offset..offset + len) {
            Ok(asked) if asked <= len => {}
            Err(Error::Closed) if self.mappings[mapping].state != MappingState::Open => {}
            // It stays closed since a shard is gone.
            Err(Error::ShardFailed { .. }) if self.mappings[mapping].state == MappingState::Limbo => {}
            other => violated(Rule::Wb28, format!("a prefetch of {len} bytes ended with {other:?}")),
        }
    }

    pub(super) fn discard(&mut self, on: u8, at: u32, len: u32) {
        let Some((handle_id, handle)) = self.handle(on) else { return };
        let mapping = self.handle_states[handle_id].mapping;
        let range = self.setup.clip(mapping, at, len);
        if !self.make_room(mapping, &self.setup.pages_of(mapping, &range)) {
            return;
        }
        let zeroes = vec![0; (range.end - range.start) as usize];
        let id = self.begin_change(mapping, &range, &zeroes);
        let pages = &mut self.mappings[mapping].pages[self.setup.pages_of(mapping, &range)];
        pages.iter_mut().for_each(|page| page.begin_discard(id));
        let offset = file_offset(range.start);
        let bytes = offset..offset + (range.end - range.start);
        let future = async move { Output::Done(handle.discard_async(bytes).await) };
        self.start(id, mapping, Kind::Discard { range, zeroes_failed: false }, Box::pin(future));
    }

    pub(super) fn begin_change(&mut self, mapping: usize, range: &Range<u64>, data: &[u8]) -> OpId {
        let (id, now) = (self.next_op, self.now());
        for (page, within, part) in self.setup.parts(mapping, range) {
            self.mappings[mapping].pages[page].begin(id, within, &data[part], now);
            self.note_change(mapping, page);
        }
        id
    }

    /// A page may change from now on. A sync that not all shards have taken yet may write it.
    pub(crate) fn note_change(&mut self, mapping: usize, page: usize) {
        if let Some(quiet) = &mut self.quiet
            && quiet.mapping == mapping
            && quiet.tagged.contains(&false)
        {
            quiet.clean[page] = false;
        }
    }

    pub(super) fn read(&mut self, on: u8, at: u32, len: u32) {
        let Some((handle_id, handle)) = self.handle(on) else { return };
        let mapping = self.handle_states[handle_id].mapping;
        let range = self.setup.clip(mapping, at, len);
        let since = self.snapshots(mapping, &self.setup.pages_of(mapping, &range));
        let (offset, len) = (file_offset(range.start), (range.end - range.start) as usize);
        let future = async move {
            let mut bytes = vec![0; len];
            let result = handle.read_at_async(offset, &mut bytes).await;
            Output::Bytes(result.map(|()| bytes))
        };
        self.start(self.next_op, mapping, Kind::Read { range, since }, Box::pin(future));
    }

    pub(super) fn snapshots(&self, mapping: usize, pages: &Range<usize>) -> Vec<Snapshot> {
        self.mappings[mapping].pages[pages.clone()].iter().map(Page::snapshot).collect()
    }

    pub(super) fn pins(&self) -> usize {
        self.ops.iter().filter(|op| op.pin_cell().is_some()).count()
    }

    pub(super) fn pin(&mut self, on: u8, page: u8) {
        if self.pins() >= PINS_MAX {
            return self.release(0);
        }
        let Some((handle_id, handle)) = self.handle(on) else { return };
        let mapping = self.handle_states[handle_id].mapping;
        let page = self.setup.page_of(mapping, page);
        let cell = Rc::new(PinCell::default());
        let shared = cell.clone();
        let file_page = self.setup.file_page(mapping, page);
        let future = async move {
            match handle.pin_async(file_page).await {
                Err(error) => Output::Done(Err(error)),
                Ok(pin) => {
                    *shared.granted.borrow_mut() = Some(pin.to_vec());
                    shared.released().await;
                    *shared.left.borrow_mut() = Some(pin.to_vec());
                    drop(pin);
                    Output::Done(Ok(()))
                }
            }
        };
        self.start(self.next_op, mapping, Kind::Pin { page, cell }, Box::pin(future));
    }

    pub(super) fn pin_mut(&mut self, on: u8, page: u8, change: u16) {
        if self.pins() >= PINS_MAX {
            return self.release(0);
        }
        let Some((handle_id, handle)) = self.handle(on) else { return };
        let mapping = self.handle_states[handle_id].mapping;
        let page = self.setup.page_of(mapping, page);
        let cell = Rc::new(PinCell::default());
        let shared = cell.clone();
        let file_page = self.setup.file_page(mapping, page);
        let data = self.data(u64::from(change).min(self.setup.page_bytes(mapping, page)));
        let future = async move {
            match handle.pin_mut_async(file_page).await {
                Err(error) => Output::Done(Err(error)),
                Ok(mut pin) => {
                    *shared.granted.borrow_mut() = Some(pin.to_vec());
                    // Half of the change at once, half at the end: nobody may see or write what lies between.
                    if !data.is_empty() {
                        pin[..data.len() / 2].copy_from_slice(&data[..data.len() / 2]);
                    }
                    shared.released().await;
                    if !data.is_empty() {
                        pin[..data.len()].copy_from_slice(&data);
                        *shared.left.borrow_mut() = Some(data);
                    }
                    drop(pin);
                    Output::Done(Ok(()))
                }
            }
        };
        self.start(self.next_op, mapping, Kind::PinMut { page, cell }, Box::pin(future));
    }

    pub(super) fn sync(&mut self, on: u8, at_rest: bool) {
        if let Some((id, handle)) = self.handle(on) {
            let pages = 0..self.setup.pages(self.handle_states[id].mapping);
            self.start_sync(id, &handle, pages, at_rest);
        }
    }

    pub(super) fn sync_range(&mut self, on: u8, at: u32, len: u32, at_rest: bool) {
        if let Some((id, handle)) = self.handle(on) {
            let mapping = self.handle_states[id].mapping;
            let pages = self.setup.pages_of(mapping, &self.setup.clip(mapping, at, len));
            self.start_sync(id, &handle, pages, at_rest);
        }
    }

    pub(super) fn start_sync(
        &mut self,
        id: HandleId,
        handle: &Rc<Mapping>,
        pages: Range<usize>,
        at_rest: bool,
    ) {
        let mapping = self.handle_states[id].mapping;
        let handle = handle.clone();
        let whole = pages == (0..self.setup.pages(mapping));
        let start = |page| self.setup.file_offset_of(mapping, page);
        let bytes = start(pages.start)..start(pages.end - 1) + self.setup.page_len(mapping);
        let future = async move {
            let bytes = bytes.start..bytes.end.min(handle.len());
            Output::Done(if whole { handle.sync_async().await } else { handle.sync_range_async(bytes).await })
        };
        if at_rest {
            self.begin_quiet(mapping, pages.clone());
        }
        let kind = self.sync_kind(id, mapping, pages);
        self.start(self.next_op, mapping, kind, Box::pin(future));
    }

    pub(super) fn sync_kind(&mut self, handle: HandleId, mapping: usize, pages: Range<usize>) -> Kind {
        self.life.syncs += 1;
        let since = self.snapshots(mapping, &pages);
        let modelled = &self.mappings[mapping];
        let held = pages.clone().filter(|&page| self.is_surely_dirty(mapping, page));
        let held = held.filter_map(|page| modelled.pages[page].held).collect();
        Kind::Sync { handle, pages, since, held, closes: None }
    }

    /// Whether the device surely lacks something that the page has.
    pub(crate) fn is_surely_dirty(&self, mapping: usize, page: usize) -> bool {
        let modelled = &self.mappings[mapping].pages[page];
        modelled.changed > 0
            && modelled.oldest_write() < modelled.changed
            && !modelled.is_discarding()
            && !self.is_in_flight(mapping, page, NvmOpcode::WRITE)
    }

    pub(crate) fn is_in_flight(&self, mapping: usize, page: usize, opcode: NvmOpcode) -> bool {
        let (start, len) = (self.setup.device_offset_of(mapping, page), self.setup.page_len(mapping));
        // What will be tried again is as much the device's as what it has.
        if opcode == NvmOpcode::WRITE && self.life.retries.has(start, len) {
            return true;
        }
        self.log.in_flight().any(|flight| {
            flight.opcode == opcode && flight.extent.start < start + len && start < flight.extent.end()
        })
    }

    pub(super) fn begin_quiet(&mut self, mapping: usize, pages: Range<usize>) {
        let vague = self.setup.splits_pages(mapping) && self.life.struck.has(Fault::WriteTransient);
        if self.life.latched || self.life.is_power_off || vague || self.may_wait_for_log(mapping) {
            return;
        }
        let modelled = &self.mappings[mapping];
        // Where pages take several commands, one that fails leaves pages dirty that another one has written.
        let whole = !self.setup.splits_pages(mapping);
        let clean = modelled.pages.iter().map(|page| whole && page.is_clean());
        let clean = clean.collect();
        let dirty = pages
            .clone()
            .filter(|&page| !modelled.pages[page].is_busy() && self.is_surely_dirty(mapping, page));
        let dirty = dirty.collect();
        let poisoned = modelled.pages.iter().map(|page| page.poisoned != Poisoned::No).collect();
        self.quiet = Some(Quiet {
            op: self.next_op,
            mapping,
            began: self.moment,
            tagged: vec![false; self.setup.shards],
            alone: self.ops.is_empty() && self.zombies.is_empty(),
            background_passes: self.bed.engine().stats().passes_background,
            clean,
            poisoned,
            held: (0..modelled.pages.len()).filter(|&page| modelled.pages[page].held.is_some()).collect(),
            dirty,
            writes: Vec::new(),
        });
    }

    pub(super) fn close(&mut self, on: u8) {
        let Some((id, handle)) = self.handle(on) else { return };
        let mapping = self.handle_states[id].mapping;
        if self.mappings[mapping].state != MappingState::Open {
            return;
        }
        let closer = (*handle).clone();
        let id = self.new_handle_state(mapping);
        let Kind::Sync { handle, pages, since, held, .. } =
            self.sync_kind(id, mapping, 0..self.setup.pages(mapping))
        else {
            return;
        };
        let kind = Kind::Sync { handle, pages, since, held, closes: Some(self.handle_states[handle].owed) };
        // It may ask for a flush of its own at the end.
        self.life.syncs += 1;
        self.mappings[mapping].state = MappingState::Closing;
        self.ops.iter_mut().filter(|op| op.mapping == mapping).for_each(|op| op.lived.closed = true);
        self.start(
            self.next_op,
            mapping,
            kind,
            Box::pin(async move { Output::Done(closer.close_async().await) }),
        );
    }

    pub(super) fn start(
        &mut self,
        id: OpId,
        mapping: usize,
        kind: Kind,
        future: Pin<Box<dyn Future<Output = Output>>>,
    ) {
        debug_assert_eq!(id, self.next_op);
        self.next_op += 1;
        let company = !self.ops.is_empty() || !self.zombies.is_empty();
        if let Some(quiet) = &mut self.quiet {
            quiet.alone &= quiet.op == id && !company;
            if quiet.op != id
                && matches!(kind, Kind::Sync { .. } | Kind::Checkpoint { .. } | Kind::Pass { .. })
            {
                // Whose writes are whose can't be told any more.
                self.quiet = None;
            }
        }
        self.life.tail = None;
        let dirties = kind.dirties();
        let rivals = self.ops.iter().any(|op| op.kind.dirties());
        for op in &mut self.ops {
            op.lived.company = true;
            op.lived.rivals |= dirties;
            match &mut op.kind {
                Kind::Pass { order } => order.alone_ns = None,
                Kind::Checkpoint { others, .. } => *others = None,
                _ => {}
            }
        }
        let lived = Circumstances {
            tries: matches!(kind, Kind::TryWrite { .. }),
            company,
            rivals,
            closed: self.mappings[mapping].state != MappingState::Open,
            ..Circumstances::default()
        };
        let began = self.now();
        let (began_ns, after_latch) = (self.bed.now_ns(), self.life.latched);
        self.ops.push(Op { id, kind, mapping, future, began, began_ns, after_latch, lived, polls: 0 });
        self.poll(self.ops.len() - 1);
    }

    /// Polls the operation at `at`; true when it has ended, and another one may be in its place.
    pub(crate) fn poll(&mut self, at: usize) -> bool {
        self.absorb();
        let op = &mut self.ops[at];
        op.polls += 1;
        let was_granted = op.is_granted();
        let polled = op.future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        if !was_granted && op.is_granted() {
            let id = op.id;
            self.pin_granted(at);
            debug_assert_eq!(self.ops[at].id, id);
        }
        match polled {
            Poll::Pending => false,
            Poll::Ready(output) => {
                let op = self.ops.remove(at);
                self.ended(op, output);
                self.idle_us = 1;
                true
            }
        }
    }

    pub(super) fn release(&mut self, op: u8) {
        let held: Vec<usize> = (0..self.ops.len()).filter(|&at| self.ops[at].is_granted()).collect();
        if let Some(at) = newest(op, held.len()) {
            self.release_at(held[at]);
        }
    }

    pub(super) fn release_at(&mut self, at: usize) {
        if let Some(cell) = self.ops[at].pin_cell() {
            cell.release.set(true);
            let ended = self.poll(at);
            debug_assert!(ended, "a released pin ends at once");
        }
    }

    pub(crate) fn release_all(&mut self) {
        while let Some(at) = self.ops.iter().position(Op::is_granted) {
            self.release_at(at);
        }
    }

    pub(super) fn abandon(&mut self, op: u8) {
        let Some(at) = newest(op, self.ops.len()) else { return };
        if self.ops[at].is_granted() {
            return self.release_at(at);
        }
        self.absorb();
        let Op { id, kind, mapping, future, .. } = self.ops.remove(at);
        drop(future);
        let now = self.now();
        if kind.dirties() {
            self.life.rival_left_ns = self.bed.now_ns() + 2 * PIN_WAIT.as_nanos() as u64;
        }
        match kind {
            Kind::Write { range, .. } | Kind::TryWrite { range } => {
                let pages = &mut self.mappings[mapping].pages[self.setup.pages_of(mapping, &range)];
                pages.iter_mut().for_each(|page| page.end(id, None, now));
            }
            Kind::Discard { range, .. } => {
                self.zombies.push((id, mapping, self.setup.pages_of(mapping, &range)))
            }
            Kind::Sync { closes: Some(_), .. } => self.mappings[mapping].state = MappingState::Limbo,
            Kind::Sync { .. } => self.life.sync_abandoned = true,
            Kind::Checkpoint { .. } => self.life.sync_abandoned = true,
            Kind::Read { .. } | Kind::Pin { .. } | Kind::PinMut { .. } | Kind::Pass { .. } => {}
        }
        if self.quiet.as_ref().is_some_and(|quiet| quiet.op == id) {
            self.quiet = None;
        }
    }

    /// The handles of a mapping that was closed are of no use any more.
    pub(crate) fn forget_handles(&mut self, mapping: usize) {
        let states = &self.handle_states;
        let dead: Vec<_> = self.handles.extract_if(.., |(id, _)| states[*id].mapping == mapping).collect();
        for (_, handle) in dead {
            let mut byte = [0];
            let mut future = Box::pin(handle.read_at_async(0, &mut byte));
            let polled = future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            if !matches!(polled, Poll::Ready(Err(Error::Closed))) {
                violated(Rule::Bounded, format!("a handle of a closed mapping answers {polled:?}"));
            }
        }
    }
}

impl PinCell {
    async fn released(&self) {
        std::future::poll_fn(|_| if self.release.get() { Poll::Ready(()) } else { Poll::Pending }).await;
    }
}

impl Op {
    pub(crate) fn pin_cell(&self) -> Option<&Rc<PinCell>> {
        match &self.kind {
            Kind::Pin { cell, .. } | Kind::PinMut { cell, .. } => Some(cell),
            _ => None,
        }
    }

    /// Whether it is a pin that is held.
    pub(crate) fn is_granted(&self) -> bool {
        self.pin_cell().is_some_and(|cell| cell.granted.borrow().is_some())
    }

    pub(crate) fn describe(&self) -> String {
        let what = match &self.kind {
            Kind::Read { range, .. } => format!("read of {range:?}"),
            Kind::Write { range, lsn: 0 } => format!("write of {range:?}"),
            Kind::Write { range, lsn } => format!("write of {range:?} with number {lsn}"),
            Kind::Pass { order } => order.describe(),
            Kind::Checkpoint { until: Some(lsn), .. } => format!("flush until {lsn}"),
            Kind::Checkpoint { until: None, .. } => "the oldest number's search".to_owned(),
            Kind::TryWrite { range } => format!("impatient write of {range:?}"),
            Kind::Discard { range, .. } => format!("discard of {range:?}"),
            Kind::Pin { page, .. } => format!("pin of page {page}"),
            Kind::PinMut { page, .. } => format!("exclusive pin of page {page}"),
            Kind::Sync { pages, closes: None, .. } => format!("sync of pages {pages:?}"),
            Kind::Sync { closes: Some(_), .. } => "close".to_owned(),
        };
        format!("{what} (mapping {}, operation {})", self.mapping, self.id)
    }
}

/// The `number`th of `count`, counted round.
pub(super) fn index(number: u8, count: usize) -> Option<usize> {
    usize::from(number).checked_rem(count)
}

/// The `number`th of `count` from the newest, counted round.
pub(super) fn newest(number: u8, count: usize) -> Option<usize> {
    index(number, count).map(|number| count - 1 - number)
}
