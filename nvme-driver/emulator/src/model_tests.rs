//! The rules of the model against an independent account of what may survive, over random histories.

use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;

use super::*;
use crate::backing::Zeroing;
use crate::prp::Segment;

const BLOCK: u64 = 512;
const BLOCKS: u64 = 16;

fn model(unit_blocks: u64) -> Model {
    let extent = Extent { offset: 0, len_bytes: BLOCKS * BLOCK };
    let ram = RamStore::new(BLOCKS * BLOCK).unwrap();
    Model::new(ram, vec![Region { extent, block_bytes: BLOCK, unit_bytes: unit_blocks * BLOCK }])
}

fn blocks(first: u64, count: u64) -> Extent {
    Extent { offset: first * BLOCK, len_bytes: count * BLOCK }
}

/// Writes `value` to every byte of the blocks.
fn write(model: &Model, extent: Extent, value: u8, durability: Durability) -> CommandId {
    let mut data = vec![value; extent.len_bytes as usize];
    let host = NonNull::new(data.as_mut_ptr()).unwrap();
    let segments = [Segment { iova: 0, host, len_bytes: data.len() }];
    let (result, command) = model.begin(&Work::Write { extent, segments: &segments, durability });
    assert_eq!(result, Ok(()));
    command.unwrap()
}

fn zero(model: &Model, extent: Extent) -> CommandId {
    let extents = [extent];
    let work = Work::Zero { extents: &extents, zeroing: Zeroing::Deallocate, durability: Durability::Cached };
    model.begin(&work).1.unwrap()
}

fn begin_flush(model: &Model) -> CommandId {
    model.begin(&Work::Flush { extent: blocks(0, BLOCKS) }).1.unwrap()
}

fn value(model: &Model, block: u64) -> u8 {
    let mut data = [0; BLOCK as usize];
    model.ram().read_into(block * BLOCK, &mut data);
    assert!(data.iter().all(|byte| *byte == data[0]), "block {block} is torn");
    data[0]
}

/// All values that block 0 has after cuts of the same history under many seeds.
fn survivors_of_block_0(history: impl Fn(&Model)) -> BTreeSet<u8> {
    let survivor = |seed| {
        let model = model(1);
        history(&model);
        model.cut(seed);
        value(&model, 0)
    };
    (0..300).map(survivor).collect()
}

#[test]
fn rule_1_a_completed_flush_covers_what_completed_before() {
    let survivors = survivors_of_block_0(|model| {
        model.completed(write(model, blocks(0, 1), 1, Durability::Cached));
        model.completed(begin_flush(model));
    });
    assert!(survivors.into_iter().eq([1]));
}

#[test]
fn what_an_ended_command_has_left_visible_survives_where_no_cache_holds_it_back() {
    let survivors = survivors_of_block_0(|model| {
        model.abandoned(write(model, blocks(0, 1), 1, Durability::AtCompletion));
    });
    assert!(survivors.into_iter().eq([1]));
}

#[test]
fn rules_2_and_3_a_write_durable_at_completion_survives_unless_a_newer_one_does() {
    let survivors = survivors_of_block_0(|model| {
        model.completed(write(model, blocks(0, 1), 1, Durability::Cached));
        model.completed(write(model, blocks(0, 1), 2, Durability::AtCompletion));
        model.completed(write(model, blocks(0, 1), 3, Durability::Cached));
    });
    assert!(survivors.into_iter().eq([2, 3]));
    let incomplete = survivors_of_block_0(|model| {
        write(model, blocks(0, 1), 2, Durability::AtCompletion);
    });
    assert!(incomplete.into_iter().eq([0, 2]));
}

#[test]
fn rule_4_a_flush_covers_nothing_that_completed_after_it_was_fetched() {
    let survivors = survivors_of_block_0(|model| {
        let before = write(model, blocks(0, 1), 1, Durability::Cached);
        let flush = begin_flush(model);
        model.completed(before);
        model.completed(flush);
    });
    assert!(survivors.into_iter().eq([0, 1]));
}

#[test]
fn rule_4_a_flush_covers_no_write_fetched_after_it() {
    let survivors = survivors_of_block_0(|model| {
        let flush = begin_flush(model);
        model.completed(write(model, blocks(0, 1), 1, Durability::Cached));
        model.completed(flush);
    });
    assert!(survivors.into_iter().eq([0, 1]));
}

#[test]
fn rule_4_a_flush_that_did_not_complete_covers_nothing() {
    let survivors = survivors_of_block_0(|model| {
        model.completed(write(model, blocks(0, 1), 1, Durability::Cached));
        begin_flush(model);
    });
    assert!(survivors.into_iter().eq([0, 1]));
}

#[test]
fn rule_5_a_command_survives_whole_within_a_unit() {
    let mut seen = BTreeSet::new();
    for seed in 0..300 {
        let model = model(4);
        model.completed(write(&model, blocks(0, 4), 1, Durability::Cached));
        model.completed(write(&model, blocks(2, 4), 2, Durability::Cached));
        model.cut(seed);
        let values: Vec<u8> = (0..8).map(|block| value(&model, block)).collect();
        assert!(values[0] == values[1] && values[2] == values[3], "seed {seed}: {values:?}");
        assert!(values[4] == values[5], "seed {seed}: {values:?}");
        seen.insert(values);
    }
    // The first unit has four states (neither, first, second, both), the second unit two.
    assert_eq!(seen.len(), 8, "{seen:?}");
}

#[test]
fn rule_6_contents_older_than_the_last_flush_never_come_back() {
    let survivors = survivors_of_block_0(|model| {
        for value in 1..=3 {
            model.completed(write(model, blocks(0, 1), value, Durability::Cached));
        }
        model.completed(begin_flush(model));
        model.completed(zero(model, blocks(0, 1)));
        model.completed(write(model, blocks(0, 1), 9, Durability::Cached));
    });
    assert!(survivors.into_iter().eq([0, 3, 9]));
}

#[test]
fn an_older_write_in_flight_never_undoes_a_flushed_newer_one() {
    let survivors = survivors_of_block_0(|model| {
        let slow = write(model, blocks(0, 1), 1, Durability::Cached);
        model.completed(write(model, blocks(0, 1), 2, Durability::Cached));
        model.completed(begin_flush(model));
        model.completed(slow);
    });
    assert!(survivors.into_iter().eq([2]));
}

#[test]
fn what_a_reset_left_unfinished_is_covered_by_the_next_flush() {
    let survivors = survivors_of_block_0(|model| {
        model.abandoned(write(model, blocks(0, 1), 1, Durability::Cached));
        model.completed(begin_flush(model));
    });
    assert!(survivors.into_iter().eq([1]));
}

#[test]
fn versions_are_bounded_and_the_oldest_become_durable() {
    let survivors = survivors_of_block_0(|model| {
        for value in 1..=(VERSIONS_MAX as u8 + 10) {
            model.completed(write(model, blocks(0, 1), value, Durability::Cached));
        }
    });
    assert!(survivors.into_iter().all(|value| value >= 10));
}

/// What may survive of one block, accounted for without looking at the model: the durable value, and the values
/// written since with the numbers of their commands.
#[derive(Debug, Default)]
struct Allowed {
    durable: u8,
    since: Vec<(CommandId, u8)>,
}

impl Allowed {
    fn advance(&mut self, is_durable: impl Fn(CommandId) -> bool) {
        if let Some(last) = self.since.iter().rposition(|(command, _)| is_durable(*command)) {
            self.durable = self.since[last].1;
            self.since.drain(..=last);
        }
    }
}

/// A random history of 60 steps and a power cut; panics when a block holds what it can't.
fn check_history(seed: u64) {
    let mut random = SplitMix64(seed);
    let unit_blocks = 1 << random.below(3);
    let model = model(unit_blocks);
    let mut allowed: BTreeMap<u64, Allowed> = (0..BLOCKS).map(|block| (block, Allowed::default())).collect();
    // Commands in flight: the blocks and durability of a change, or what a Flush doesn't cover.
    let mut changes: BTreeMap<CommandId, (Extent, Durability)> = BTreeMap::new();
    let mut flushes: BTreeMap<CommandId, BTreeSet<CommandId>> = BTreeMap::new();
    for step in 0..60u8 {
        let first = random.below(BLOCKS);
        let extent = blocks(first, 1 + random.below((BLOCKS - first).min(5)));
        match random.below(10) {
            0..=4 => {
                let durability =
                    if random.below(4) == 0 { Durability::AtCompletion } else { Durability::Cached };
                let (command, value, durability) = if random.below(5) == 0 {
                    (zero(&model, extent), 0, Durability::Cached)
                } else {
                    (write(&model, extent, step + 1, durability), step + 1, durability)
                };
                changes.insert(command, (extent, durability));
                for block in extent.offset / BLOCK..extent.end() / BLOCK {
                    allowed.get_mut(&block).unwrap().since.push((command, value));
                }
            }
            5 | 6 => {
                flushes.insert(begin_flush(&model), changes.keys().copied().collect());
            }
            _ => complete_one(&model, &mut random, &mut allowed, &mut changes, &mut flushes),
        }
        for (block, allowed) in &allowed {
            let visible = allowed.since.last().map_or(allowed.durable, |(_, value)| *value);
            assert_eq!(value(&model, *block), visible, "seed {seed}, step {step}: block {block} reads wrong");
        }
    }
    let cut = model.cut(seed ^ 0x5EED);
    assert_eq!(cut.commands_in_flight, changes.len() as u64, "seed {seed}");
    for (block, allowed) in &allowed {
        let found = value(&model, *block);
        let is_allowed = found == allowed.durable || allowed.since.iter().any(|(_, value)| *value == found);
        assert!(is_allowed, "seed {seed}: block {block} holds {found}, allowed is {allowed:?}");
    }
}

fn complete_one(
    model: &Model,
    random: &mut SplitMix64,
    allowed: &mut BTreeMap<u64, Allowed>,
    changes: &mut BTreeMap<CommandId, (Extent, Durability)>,
    flushes: &mut BTreeMap<CommandId, BTreeSet<CommandId>>,
) {
    let in_flight: Vec<CommandId> = changes.keys().chain(flushes.keys()).copied().collect();
    if in_flight.is_empty() {
        return;
    }
    let command = in_flight[random.below(in_flight.len() as u64) as usize];
    model.completed(command);
    if let Some(uncovered) = flushes.remove(&command) {
        for block in allowed.values_mut() {
            block.advance(|version| version < command && !uncovered.contains(&version));
        }
    } else if let Some((extent, Durability::AtCompletion)) = changes.remove(&command) {
        for block in extent.offset / BLOCK..extent.end() / BLOCK {
            allowed.get_mut(&block).unwrap().advance(|version| version == command);
        }
    }
}

#[test]
fn random_histories_leave_nothing_that_is_not_allowed() {
    for seed in 0..500 {
        check_history(seed);
    }
}
