//! The power-loss model: what a device with a volatile write cache may have on its medium when the power fails.
//!
//! Visible contents live in the RAM store. Beside it the model keeps, for every block written since it was last
//! made durable, the durable contents and every version since:
//!
//! ```text
//!   block 7:   durable ─ v(write 12) ─ v(write 15) ─ v(zeroes 16)        what a Read returns: the last
//!                 ▲
//!                 └── a Flush moves this forward over versions whose command completed before the Flush was
//!                     fetched; a write with forced unit access moves it to its own version when it completes
//! ```
//!
//! A power cut takes, for each atomic unit independently, any one of these states: commands that are still in
//! flight included, newer writes without older ones included, the durable state included. A command's part
//! within one unit survives whole or not at all; its parts in different units are independent.
//!
//! Rules, each with its test:
//! 1. What a completed Flush covers survives.
//! 2. A completed write with forced unit access survives, unless a newer version does.
//! 3. Without a volatile write cache, every completed write survives likewise.
//! 4. A Flush covers nothing that completed after it was fetched.
//! 5. A unit is one of its versions, never a mix of two commands' parts of the same blocks.
//! 6. Durable contents older than the last Flush never come back.
//! 7. The same commands and the same seed leave the same medium.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use crate::backing::ram::RamStore;
use crate::backing::{Durability, Extent, MediaError, Started, Work};
use crate::sync::lock;

/// Versions of one block kept at most. Beyond that the oldest becomes durable, as in a cache that runs full.
const VERSIONS_MAX: usize = 64;

/// What a power cut decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PowerCut {
    /// The seed that decided; the same commands and seed leave the same medium.
    pub seed: u64,
    /// Atomic units that had more than one state to choose from.
    pub units_undecided: u64,
    /// Units among them whose newest state was lost.
    pub units_rolled_back: u64,
    /// Commands that change the medium and had been fetched but not completed.
    pub commands_in_flight: u64,
}

/// A range of the medium with one block size and one size of atomic units.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    pub(crate) extent: Extent,
    pub(crate) block_bytes: u64,
    pub(crate) unit_bytes: u64,
}

/// The model of one medium, shared by its queues.
#[derive(Debug)]
pub(crate) struct Model {
    ram: RamStore,
    regions: Vec<Region>,
    state: Mutex<State>,
}

/// Names a command for the model, ascending in the order of fetching.
type CommandId = u64;

#[derive(Debug, Default)]
struct State {
    /// Blocks with versions that aren't durable, by their offset on the medium.
    blocks: BTreeMap<u64, Block>,
    in_flight: BTreeMap<CommandId, InFlight>,
    next_command: CommandId,
}

#[derive(Debug)]
struct Block {
    durable: Box<[u8]>,
    /// Oldest first; never empty.
    versions: Vec<Version>,
}

#[derive(Debug)]
struct Version {
    command: CommandId,
    data: Box<[u8]>,
}

#[derive(Debug)]
enum InFlight {
    Change {
        extents: Vec<Extent>,
        durability: Durability,
    },
    Flush {
        extent: Extent,
        /// Changes that had not completed when the Flush was fetched.
        incomplete: BTreeSet<CommandId>,
    },
}

impl Model {
    pub(crate) fn new(ram: RamStore, regions: Vec<Region>) -> Self {
        Self { ram, regions, state: Mutex::default() }
    }

    pub(crate) fn ram(&self) -> &RamStore {
        &self.ram
    }

    /// Carries `work` out on the visible contents and remembers what it changed. Returns the command's name when
    /// its completion matters.
    fn begin(&self, work: &Work<'_>) -> (Result<(), MediaError>, Option<CommandId>) {
        let in_flight = match work {
            Work::Read { .. } => return (self.ram.run(work), None),
            Work::Write { extent, durability, .. } => {
                InFlight::Change { extents: vec![*extent], durability: *durability }
            }
            Work::Zero { extents, durability, .. } => {
                InFlight::Change { extents: extents.to_vec(), durability: *durability }
            }
            Work::Flush { extent } => InFlight::Flush { extent: *extent, incomplete: BTreeSet::new() },
        };
        let mut state = lock(&self.state);
        let command = state.next_command;
        state.next_command += 1;
        let (result, in_flight) = match in_flight {
            InFlight::Change { extents, durability } => {
                let result = self.change(&mut state, command, &extents, work);
                (result, InFlight::Change { extents, durability })
            }
            InFlight::Flush { extent, .. } => {
                let is_change = |(_, command): &(_, &InFlight)| matches!(command, InFlight::Change { .. });
                let incomplete = state.in_flight.iter().filter(is_change).map(|(id, _)| *id).collect();
                (Ok(()), InFlight::Flush { extent, incomplete })
            }
        };
        state.in_flight.insert(command, in_flight);
        (result, Some(command))
    }

    fn change(
        &self,
        state: &mut State,
        command: CommandId,
        extents: &[Extent],
        work: &Work<'_>,
    ) -> Result<(), MediaError> {
        for (offset, block_bytes) in extents.iter().flat_map(|extent| self.blocks_of(*extent)) {
            state.blocks.entry(offset).or_insert_with(|| Block {
                durable: self.read_block(offset, block_bytes),
                versions: Vec::new(),
            });
        }
        let result = self.ram.run(work);
        for (offset, block_bytes) in extents.iter().flat_map(|extent| self.blocks_of(*extent)) {
            let data = self.read_block(offset, block_bytes);
            if let Some(block) = state.blocks.get_mut(&offset) {
                block.push(Version { command, data });
            }
        }
        result
    }

    /// The command completes now, as the driver sees it.
    fn completed(&self, command: CommandId) {
        let mut state = lock(&self.state);
        match state.in_flight.remove(&command) {
            Some(InFlight::Change { extents, durability: Durability::AtCompletion }) => {
                for (offset, _) in extents.iter().flat_map(|extent| self.blocks_of(*extent)) {
                    state.make_durable(offset, |version| version == command);
                }
            }
            Some(InFlight::Flush { extent, incomplete }) => {
                let offsets: Vec<u64> =
                    state.blocks.range(extent.offset..extent.end()).map(|(offset, _)| *offset).collect();
                for offset in offsets {
                    state.make_durable(offset, |version| version < command && !incomplete.contains(&version));
                }
            }
            Some(InFlight::Change { durability: Durability::Cached, .. }) | None => {}
        }
    }

    /// The command will never complete: a reset or a queue's deletion ended it. What it changed stays visible, and
    /// the next Flush covers it like anything visible. Where no cache can hold it back it is durable from now on, since
    /// nobody would flush it: what can be read there is on the medium.
    fn abandoned(&self, command: CommandId) {
        let mut state = lock(&self.state);
        if let Some(InFlight::Change { extents, durability: Durability::AtCompletion }) =
            state.in_flight.remove(&command)
        {
            for (offset, _) in extents.iter().flat_map(|extent| self.blocks_of(*extent)) {
                state.make_durable(offset, |version| version == command);
            }
        }
    }

    /// Makes everything durable that isn't in flight.
    pub(crate) fn destage(&self) {
        let mut state = lock(&self.state);
        let offsets: Vec<u64> = state.blocks.keys().copied().collect();
        let incomplete: BTreeSet<CommandId> = state.in_flight.keys().copied().collect();
        for offset in offsets {
            state.make_durable(offset, |version| !incomplete.contains(&version));
        }
    }

    /// Cuts the power: decides for each unit what survives, and makes that the visible and durable contents.
    pub(crate) fn cut(&self, seed: u64) -> PowerCut {
        let mut state = lock(&self.state);
        let is_change = |command: &&InFlight| matches!(command, InFlight::Change { .. });
        let commands_in_flight = state.in_flight.values().filter(is_change).count() as u64;
        state.in_flight.clear();
        let mut random = SplitMix64(seed);
        let mut report = PowerCut { seed, units_undecided: 0, units_rolled_back: 0, commands_in_flight };
        let blocks = std::mem::take(&mut state.blocks);
        let mut units: BTreeMap<u64, Vec<(u64, Block)>> = BTreeMap::new();
        for (offset, block) in blocks {
            units.entry(self.unit_of(offset)).or_default().push((offset, block));
        }
        for unit in units.values() {
            let survivors = choose_survivors(unit, &mut random);
            let mut is_rolled_back = false;
            for (offset, block) in unit {
                let survivor = block.versions.iter().rposition(|v| survivors.contains(&v.command));
                is_rolled_back |= survivor.is_none_or(|index| index + 1 < block.versions.len());
                let data = survivor.map_or(&block.durable, |index| &block.versions[index].data);
                self.ram.write_from(*offset, data);
            }
            report.units_undecided += 1;
            report.units_rolled_back += u64::from(is_rolled_back);
        }
        report
    }

    fn region_of(&self, offset: u64) -> &Region {
        let at = self.regions.partition_point(|region| region.extent.offset <= offset);
        &self.regions[at.saturating_sub(1)]
    }

    /// Offset of the atomic unit that holds the block at `offset`.
    fn unit_of(&self, offset: u64) -> u64 {
        let region = self.region_of(offset);
        offset - (offset - region.extent.offset) % region.unit_bytes
    }

    /// Offset and size of each block of an extent, which lies in one region.
    fn blocks_of(&self, extent: Extent) -> impl Iterator<Item = (u64, u64)> + use<> {
        let block_bytes = self.region_of(extent.offset).block_bytes;
        (extent.offset..extent.end()).step_by(block_bytes as usize).map(move |offset| (offset, block_bytes))
    }

    fn read_block(&self, offset: u64, block_bytes: u64) -> Box<[u8]> {
        let mut data = vec![0; block_bytes as usize].into_boxed_slice();
        self.ram.read_into(offset, &mut data);
        data
    }
}

impl Block {
    fn push(&mut self, version: Version) {
        if self.versions.len() == VERSIONS_MAX {
            self.durable = self.versions.remove(0).data;
        }
        self.versions.push(version);
    }
}

impl State {
    /// Moves the durable state of a block forward to its newest version for which `is_durable` holds. Older
    /// versions go with it, in flight or not: they have been overwritten on the medium.
    fn make_durable(&mut self, offset: u64, is_durable: impl Fn(CommandId) -> bool) {
        let Some(block) = self.blocks.get_mut(&offset) else { return };
        let Some(newest) = block.versions.iter().rposition(|version| is_durable(version.command)) else {
            return;
        };
        if let Some(version) = block.versions.drain(..=newest).next_back() {
            block.durable = version.data;
        }
        if block.versions.is_empty() {
            self.blocks.remove(&offset);
        }
    }
}

/// Chooses which commands' parts of one unit reached the medium: none, or a last one with any subset of the others
/// that doesn't contradict it. For a unit of one block every version is equally likely.
fn choose_survivors(unit: &[(u64, Block)], random: &mut SplitMix64) -> BTreeSet<CommandId> {
    let commands: BTreeSet<CommandId> =
        unit.iter().flat_map(|(_, block)| &block.versions).map(|version| version.command).collect();
    let commands: Vec<CommandId> = commands.into_iter().collect();
    let choice = random.below(commands.len() as u64 + 1) as usize;
    let Some(&last) = choice.checked_sub(1).and_then(|index| commands.get(index)) else {
        return BTreeSet::new();
    };
    let overlaps_last = |command: CommandId| {
        unit.iter().any(|(_, block)| {
            let has = |wanted| block.versions.iter().any(|version| version.command == wanted);
            has(command) && has(last)
        })
    };
    let survives = |command: &CommandId| {
        let coin = random.below(2) == 1;
        *command == last || (coin && (*command < last || !overlaps_last(*command)))
    };
    commands.iter().copied().filter(survives).collect()
}

/// The model's own random numbers (Steele, Lea and Flood's `SplitMix64`), so that a seed means the same for ever.
#[derive(Debug)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is small against 2^64: the bias doesn't matter here.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// One queue's way into the model: it remembers which of its tokens is which command.
#[derive(Debug)]
pub(crate) struct ModelEngine {
    model: Arc<Model>,
    commands: Box<[Option<CommandId>]>,
}

impl ModelEngine {
    pub(crate) fn new(model: Arc<Model>, tokens: u32) -> Self {
        Self { model, commands: vec![None; tokens as usize].into_boxed_slice() }
    }

    pub(crate) fn start(&mut self, token: u32, work: &Work<'_>) -> Started {
        let (result, command) = self.model.begin(work);
        self.commands[token as usize] = command;
        Started::Done(result)
    }

    pub(crate) fn completed(&mut self, token: u32) {
        if let Some(command) = self.commands[token as usize].take() {
            self.model.completed(command);
        }
    }

    pub(crate) fn abandoned(&mut self, token: u32) {
        if let Some(command) = self.commands[token as usize].take() {
            self.model.abandoned(command);
        }
    }
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
