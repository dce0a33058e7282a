//! Blocks: what is written is what is read, in whatever shape it travels, and nothing else changes.

use foliant_nvme::{Deallocation, Fua, Io, Lba};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::cases;
use crate::conformance::bench::Need;
use crate::conformance::host::{Host, Load};
use crate::conformance::{Bench, pattern};

cases! {
    what_is_written_is_read_back_whatever_its_place_and_length: [];
    the_first_and_the_last_block_can_be_read: [];
    data_goes_to_the_very_bytes_of_a_scattered_buffer: [];
    data_comes_from_the_very_bytes_of_a_scattered_buffer: [];
    a_write_with_fua_and_a_flush_succeed_and_change_nothing_else: [];
    write_zeroes_leaves_zeros_and_touches_nothing_else: [Need::WriteZeroes];
    a_long_write_zeroes_is_one_command: [Need::WriteZeroes];
    deallocated_blocks_read_the_same_each_time_and_others_keep_their_data: [Need::Deallocate];
    namespaces_keep_their_blocks_apart: [Need::Namespaces(2)];
}

/// The part of the area that a random test works in, in bytes.
const PLAYGROUND_BYTES: usize = 2 << 20;

fn what_is_written_is_read_back_whatever_its_place_and_length(bench: &Bench) {
    let mut host = bench.host();
    let block = host.block_bytes();
    let blocks_in_all = PLAYGROUND_BYTES / block;
    let mut random = SmallRng::seed_from_u64(1);
    let mut model = pattern::of(0, PLAYGROUND_BYTES);
    host.write(0, &model, Fua::No);
    for round in 1..=60 {
        let blocks = random.random_range(1..=300_000 / block);
        let lba = random.random_range(0..=blocks_in_all - blocks);
        let data = pattern::of(round, blocks * block);
        model[lba * block..][..data.len()].copy_from_slice(&data);
        host.write(lba as u64, &data, if random.random() { Fua::Yes } else { Fua::No });
        assert!(host.read(lba as u64, blocks as u32) == data, "round {round}: {blocks} blocks from {lba}");
    }
    assert!(host.read(0, blocks_in_all as u32) == model, "the whole of it at the end");
}

fn the_first_and_the_last_block_can_be_read(bench: &Bench) {
    let mut host = bench.host();
    let last = host.namespace.blocks() - 1;
    let block = host.block_bytes() as u64;
    host.read(0, 1);
    let before = host.read(last, 1);
    if bench.area_bytes() / block > last {
        let data = pattern::of(7, block as usize);
        host.write(last, &data, Fua::No);
        assert!(host.read(last, 1) == data);
        host.write(last, &before, Fua::No);
    }
}

/// Shapes of a transfer: an offset into the first page, and the pages that follow it. One page, two pages (both in
/// the command), more (a list), and pages that don't follow each other.
fn shapes(block: usize) -> Vec<Vec<(usize, usize)>> {
    const PAGE: usize = 4096;
    let unit = block.max(PAGE);
    let rest = |offset: usize| (offset, PAGE - offset);
    vec![
        vec![(512 % block, block)],
        vec![(4, block)],
        vec![rest(4), (PAGE, unit - PAGE + 4)],
        vec![rest(2048), (PAGE, 2 * unit - PAGE + 2048)],
        vec![rest(4092), (2 * PAGE, 4 * unit - 2 * PAGE), (12 * PAGE, 2 * PAGE - 4)],
        vec![(9 * PAGE, PAGE), (3 * PAGE, PAGE), (20 * PAGE, 14 * PAGE)],
    ]
    .into_iter()
    .filter(|parts| parts.iter().map(|(_, len)| len).sum::<usize>().is_multiple_of(block))
    .collect()
}

/// Bytes of a buffer that every shape lies in.
const SCATTERED_BYTES: usize = 64 * 4096;

fn data_goes_to_the_very_bytes_of_a_scattered_buffer(bench: &Bench) {
    let mut host = bench.host();
    let block = host.block_bytes();
    for (index, parts) in shapes(block).into_iter().enumerate() {
        let len: usize = parts.iter().map(|(_, len)| len).sum();
        let data = pattern::of(index as u64, len);
        host.write(8, &data, Fua::No);
        let mut buffer = host.controller.arena().allocate(SCATTERED_BYTES).expect("the arena has room");
        buffer.as_mut_slice().fill(0xEE);
        let read = Io::Read { lba: Lba(8), blocks: (len / block) as u32 };
        let load = host.run(read, Load::parts(buffer, parts.clone())).expect("the read succeeds");
        let mut expected = vec![0xEE; SCATTERED_BYTES];
        let mut rest = data.as_slice();
        for &(offset, len) in &parts {
            let (here, after) = rest.split_at(len);
            expected[offset..offset + len].copy_from_slice(here);
            rest = after;
        }
        assert!(load.bytes() == expected, "{parts:?}");
    }
}

fn data_comes_from_the_very_bytes_of_a_scattered_buffer(bench: &Bench) {
    let mut host = bench.host();
    let block = host.block_bytes();
    for (index, parts) in shapes(block).into_iter().enumerate() {
        let mut buffer = host.controller.arena().allocate(SCATTERED_BYTES).expect("the arena has room");
        buffer.as_mut_slice().copy_from_slice(&pattern::of(100 + index as u64, SCATTERED_BYTES));
        let data: Vec<u8> = parts
            .iter()
            .flat_map(|&(offset, len)| buffer.as_slice()[offset..offset + len].to_vec())
            .collect();
        let blocks = (data.len() / block) as u32;
        let write = Io::Write { lba: Lba(8), blocks, fua: Fua::No };
        host.run(write, Load::parts(buffer, parts.clone())).expect("the write succeeds");
        assert!(host.read(8, blocks) == data, "{parts:?}");
    }
}

fn a_write_with_fua_and_a_flush_succeed_and_change_nothing_else(bench: &Bench) {
    let mut host = bench.host();
    let block = host.block_bytes();
    let mut expected = pattern::of(1, 16 * block);
    host.write(0, &expected, Fua::No);
    let changed = pattern::of(2, 4 * block);
    host.write(5, &changed, Fua::Yes);
    expected[5 * block..9 * block].copy_from_slice(&changed);
    host.flush();
    // Nothing is left to flush, which is no error.
    host.flush();
    assert!(host.read(0, 16) == expected);
}

/// Fills 64 blocks and returns them.
fn filled(host: &mut Host, seed: u64) -> Vec<u8> {
    let data = pattern::of(seed, 64 * host.block_bytes());
    host.write(0, &data, Fua::No);
    data
}

fn write_zeroes_leaves_zeros_and_touches_nothing_else(bench: &Bench) {
    let mut host = bench.host();
    let block = host.block_bytes();
    let mut expected = filled(&mut host, 3);
    for (lba, blocks, fua, deallocation) in [
        (3, 5, Fua::No, Deallocation::Keep),
        (20, 9, Fua::No, Deallocation::Allow),
        (40, 1, Fua::Yes, Deallocation::Keep),
    ] {
        let zeroes = Io::WriteZeroes { lba: Lba(lba), blocks, fua, deallocation };
        host.run(zeroes, Load::nothing()).map(drop).expect("the zeroes are written");
        expected[lba as usize * block..][..blocks as usize * block].fill(0);
        assert!(host.read(0, 64) == expected, "{blocks} blocks from {lba}");
    }
}

/// MDTS bounds what is transferred, and Write Zeroes transfers nothing.
fn a_long_write_zeroes_is_one_command(bench: &Bench) {
    let mut host = bench.host();
    let blocks = PLAYGROUND_BYTES / host.block_bytes();
    host.write(0, &pattern::of(4, PLAYGROUND_BYTES), Fua::No);
    let zeroes = Io::WriteZeroes {
        lba: Lba(1),
        blocks: blocks as u32 - 2,
        fua: Fua::No,
        deallocation: Deallocation::Keep,
    };
    host.run(zeroes, Load::nothing()).map(drop).expect("the zeroes are written");
    assert_eq!(host.queue.stats().write_zeroes, 1);
    let data = host.read(0, blocks as u32);
    let block = host.block_bytes();
    let inner = &data[block..PLAYGROUND_BYTES - block];
    assert!(inner.iter().all(|&byte| byte == 0), "all of it is zero");
    let edges = pattern::of(4, PLAYGROUND_BYTES);
    assert!(data[..block] == edges[..block], "the block before");
    assert!(data[PLAYGROUND_BYTES - block..] == edges[PLAYGROUND_BYTES - block..], "the block after");
}

/// A deallocated block reads as DLFEAT says, or keeps its data, since the command is a hint. It reads the same until
/// it is written again (NVM sections 3.3.3.2.1 and 4.1.5.1).
fn deallocated_blocks_read_the_same_each_time_and_others_keep_their_data(bench: &Bench) {
    let behaviour = bench.raw().identify_namespace(bench.facts().namespaces[0].id()).dlfeat.read_behaviour();
    let mut host = bench.host();
    let block = host.block_bytes();
    let mut expected = filled(&mut host, 5);
    host.run(Io::Deallocate { lba: Lba(8), blocks: 16 }, Load::nothing())
        .map(drop)
        .expect("deallocation succeeds");
    let found = host.read(0, 64);
    assert!(host.read(0, 64) == found, "what is read does not change by itself");
    for (index, (found, before)) in found.chunks_exact(block).zip(expected.chunks_exact(block)).enumerate() {
        let is_all = |value: u8| found.iter().all(|&byte| byte == value);
        let may_be_cleared = match behaviour {
            0b001 => is_all(0),
            0b010 => is_all(0xFF),
            _ => is_all(0) || is_all(0xFF),
        };
        let is_right = found == before || ((8..24).contains(&index) && may_be_cleared);
        assert!(is_right, "block {index}, DLFEAT read behaviour {behaviour:#05b}");
    }
    let again = pattern::of(6, 4 * block);
    host.write(10, &again, Fua::No);
    expected[8 * block..24 * block].copy_from_slice(&found[8 * block..24 * block]);
    expected[10 * block..14 * block].copy_from_slice(&again);
    assert!(host.read(0, 64) == expected, "blocks written again");
}

fn namespaces_keep_their_blocks_apart(bench: &Bench) {
    let mut host = bench.host();
    let namespaces = host.controller.namespaces().to_vec();
    let len = 64 << 10;
    for namespace in &namespaces {
        host.namespace = namespace.clone();
        host.write(0, &pattern::of(namespace.id().into(), len), Fua::No);
    }
    host.flush();
    for namespace in &namespaces {
        host.namespace = namespace.clone();
        let blocks = len / host.block_bytes();
        let data = host.read(0, blocks as u32);
        assert!(data == pattern::of(namespace.id().into(), len), "namespace {}", namespace.id());
    }
}
