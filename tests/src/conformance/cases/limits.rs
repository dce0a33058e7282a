//! The sizes at which a request becomes several commands, and what one command can carry.

use foliant_nvme::{ControllerOptions, Fua, Io, Lba, SubmitError};
use foliant_nvme_spec::NvmOpcode;
use foliant_nvme_spec::StatusCode;

use super::cases;
use crate::conformance::bench::Need;
use crate::conformance::host::{Host, Load};
use crate::conformance::{Bench, pattern};

cases! {
    a_request_is_split_at_the_limit_it_was_given_and_comes_back_once: [];
    a_request_is_split_at_mdts_and_one_of_that_size_is_one_command:
        [Need::TransferLimitBytes(MDTS_TRIED_MAX)];
    the_device_refuses_more_than_mdts: [Need::TransferLimitBytes(MDTS_TRIED_MAX)];
    a_transfer_of_2_mib_goes_through_chained_prp_lists:
        [Need::TransferBytes(LONG_BYTES as u32), Need::AreaBytes(LONG_BYTES as u64)];
    requests_that_cannot_be_are_refused_before_they_reach_the_device: [];
}

/// The largest MDTS that a case tries to exceed, in bytes.
const MDTS_TRIED_MAX: u32 = 2 << 20;

/// A list page holds 512 entries, so this needs the first one to point to a second.
const LONG_BYTES: usize = (2 << 20) + (128 << 10);

/// How many commands `blocks` blocks from `lba` become: none crosses the namespace's boundary, none is longer than
/// `max`.
fn commands(host: &Host, lba: u64, blocks: u64) -> u64 {
    let max = u64::from(host.namespace.max_transfer_bytes() / host.namespace.block_bytes());
    let boundary = host.namespace.optimal_boundary_blocks().map_or(u64::MAX, u64::from);
    let (mut at, end, mut count) = (lba, lba + blocks, 0);
    while at < end {
        let to_boundary = boundary - at % boundary;
        at += max.min(to_boundary).min(end - at);
        count += 1;
    }
    count
}

fn write_and_count(host: &mut Host, lba: u64, len: usize) {
    let blocks = (len / host.block_bytes()) as u64;
    let data = pattern::of(lba + blocks, len);
    let before = *host.queue.stats();
    let write = Io::Write { lba: Lba(lba), blocks: blocks as u32, fua: Fua::No };
    host.run(write, Load::of(host.controller.arena(), &data)).map(drop).expect("the write succeeds");
    let expected = commands(host, lba, blocks);
    assert_eq!(host.queue.stats().writes - before.writes, expected, "{blocks} blocks from {lba}");
    assert_eq!(host.queue.stats().requests - before.requests, 1);
    assert_eq!(host.queue.in_flight(), 0);
    assert!(host.read(lba, blocks as u32) == data, "{blocks} blocks from {lba}");
}

fn a_request_is_split_at_the_limit_it_was_given_and_comes_back_once(bench: &Bench) {
    let options = ControllerOptions { max_transfer_bytes: 8192, ..bench.options() };
    let mut host = bench.host_with(&options);
    let block = host.block_bytes();
    assert!(host.namespace.max_transfer_bytes() <= 8192.max(block as u32));
    for (lba, len) in [(0, 8192), (0, 65_536), (5, 8192), (5, 40_960), (1, block)] {
        write_and_count(&mut host, lba, len.max(block));
    }
}

fn a_request_is_split_at_mdts_and_one_of_that_size_is_one_command(bench: &Bench) {
    let mdts = bench.facts().identity.mdts_bytes.expect("the case needs a limit");
    let options = ControllerOptions {
        max_transfer_bytes: 2 * MDTS_TRIED_MAX,
        arena_bytes: 4 * MDTS_TRIED_MAX as usize,
        io_queue_entries: 8,
        ..bench.options()
    };
    let mut host = bench.host_with(&options);
    let block = host.block_bytes();
    assert_eq!(host.namespace.max_transfer_bytes(), mdts.min((block as u32) << 16), "the device's own limit");
    for (lba, len) in
        [(0, mdts as usize), (3, mdts as usize), (0, mdts as usize + block), (1, 2 * mdts as usize - block)]
    {
        if (lba as usize + len / block) as u64 <= bench.area_bytes() / block as u64 {
            write_and_count(&mut host, lba, len);
        }
    }
}

fn the_device_refuses_more_than_mdts(bench: &Bench) {
    let mdts = bench.facts().identity.mdts_bytes.expect("the case needs a limit");
    let namespace = &bench.facts().namespaces[0];
    let mut host = bench.raw();
    let mut queue = host.queue_pair();
    // The data pointer doesn't matter: the command is refused for its length before any of it moves. Should it not
    // be, a list of zeroes leads nowhere.
    let blocks_z = (mdts / namespace.block_bytes()) as u16;
    let status = host.io(&mut queue, NvmOpcode::READ, host.blocks(namespace.id(), 0, blocks_z));
    assert_eq!(status.code(), StatusCode::INVALID_FIELD, "{} blocks, one more than MDTS", blocks_z + 1);
}

fn a_transfer_of_2_mib_goes_through_chained_prp_lists(bench: &Bench) {
    let options = ControllerOptions {
        max_transfer_bytes: LONG_BYTES as u32,
        arena_bytes: 4 * LONG_BYTES,
        io_queue_entries: 8,
        ..bench.options()
    };
    let mut host = bench.host_with(&options);
    write_and_count(&mut host, 0, LONG_BYTES);
    // From the middle of a page, so that the last entry of the list isn't a whole page either.
    let block = host.block_bytes();
    let buffer = host.controller.arena().allocate(LONG_BYTES + 4096).expect("the arena has room");
    let read = Io::Read { lba: Lba(0), blocks: (LONG_BYTES / block) as u32 };
    let load = host.run(read, Load::parts(buffer, vec![(2048, LONG_BYTES)])).expect("the read succeeds");
    let expected = pattern::of((LONG_BYTES / block) as u64, LONG_BYTES);
    assert!(load.bytes()[2048..2048 + LONG_BYTES] == expected);
}

fn requests_that_cannot_be_are_refused_before_they_reach_the_device(bench: &Bench) {
    let mut host = bench.host();
    let block = host.block_bytes();
    let end = host.namespace.blocks();
    let mut refusal = |io, len: usize| {
        let load = if len == 0 { Load::nothing() } else { Load::of(host.controller.arena(), &vec![0; len]) };
        host.submit(io, load).expect_err("the driver refuses the request").reason
    };
    for (lba, blocks) in [(end - 1, 2), (end, 1), (u64::MAX, 1), (0, 0)] {
        let reason = refusal(Io::Read { lba: Lba(lba), blocks }, blocks as usize * block);
        assert!(matches!(reason, SubmitError::OutOfRange { .. }), "{blocks} blocks from {lba}: {reason:?}");
    }
    let short = refusal(Io::Read { lba: Lba(0), blocks: 2 }, block);
    assert!(matches!(short, SubmitError::LengthMismatch { .. }), "{short:?}");
    assert!(!host.queue.ring(), "there is nothing to ring for");
    assert_eq!(host.queue.stats().commands(), 0);
}
