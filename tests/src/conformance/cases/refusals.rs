//! I/O commands that a device must refuse, and the status it gives. The driver sends none of them, so these go to the
//! device by themselves.

use foliant_nvme_spec::{Command, NvmOpcode, PAGE_BYTES, StatusCode};

use super::cases;
use crate::conformance::Bench;
use crate::conformance::bench::Need;

cases! {
    blocks_past_the_end_are_refused_as_out_of_range: [Need::BlockBytesMax(PAGE_BYTES as u32)];
    zeroes_past_the_end_are_refused_as_out_of_range: [Need::WriteZeroes, Need::BlockBytesMax(PAGE_BYTES as u32)];
    a_namespace_that_is_not_there_is_refused: [];
    an_unknown_io_command_is_refused: [];
    a_list_entry_off_its_page_is_refused_where_it_is_looked_at: [Need::BlockBytesMax(PAGE_BYTES as u32)];
}

fn blocks_past_the_end_are_refused_as_out_of_range(bench: &Bench) {
    past_the_end(bench, &[NvmOpcode::READ, NvmOpcode::WRITE]);
}

fn zeroes_past_the_end_are_refused_as_out_of_range(bench: &Bench) {
    past_the_end(bench, &[NvmOpcode::WRITE_ZEROES]);
}

fn past_the_end(bench: &Bench, opcodes: &[NvmOpcode]) {
    let namespace = &bench.facts().namespaces[0];
    let (nsid, end) = (namespace.id(), namespace.blocks());
    let mut host = bench.raw();
    let mut queue = host.queue_pair();
    for &opcode in opcodes {
        // The sum of the last one overflows.
        for (slba, blocks_z) in [(end, 0), (end - 1, 1), (u64::MAX, 0), (u64::MAX, 1)] {
            // What straddles the end is only read: a device that gets it wrong must not destroy a block that isn't
            // ours.
            if slba < end && opcode != NvmOpcode::READ {
                continue;
            }
            let status = host.io(&mut queue, opcode, host.blocks(nsid, slba, blocks_z));
            let blocks = u32::from(blocks_z) + 1;
            assert_eq!(
                status.code(),
                StatusCode::LBA_OUT_OF_RANGE,
                "{opcode} of {blocks} from {slba}: {status}"
            );
        }
    }
    let status = host.io(&mut queue, NvmOpcode::READ, host.blocks(nsid, end - 1, 0));
    assert!(status.is_success(), "the last block: {status}");
}

fn a_namespace_that_is_not_there_is_refused(bench: &Bench) {
    let mut host = bench.raw();
    let past = host.identify_controller().nn + 1;
    let mut queue = host.queue_pair();
    for nsid in [0, past] {
        for opcode in [NvmOpcode::READ, NvmOpcode::WRITE, NvmOpcode::FLUSH] {
            let status = host.io(&mut queue, opcode, host.blocks(nsid, 0, 0));
            assert_eq!(
                status.code(),
                StatusCode::INVALID_NAMESPACE,
                "{opcode} of namespace {nsid}: {status}"
            );
        }
    }
}

fn an_unknown_io_command_is_refused(bench: &Bench) {
    let nsid = bench.facts().namespaces[0].id();
    let mut host = bench.raw();
    let mut queue = host.queue_pair();
    for opcode in [NvmOpcode(0x7F), NvmOpcode(0x3C)] {
        let status = host.io(&mut queue, opcode, Command { nsid, ..Command::EMPTY });
        assert_eq!(status.code(), StatusCode::INVALID_OPCODE, "{opcode}: {status}");
    }
    assert!(host.io(&mut queue, NvmOpcode::FLUSH, Command { nsid, ..Command::EMPTY }).is_success());
}

/// Only the first PRP entry may have an offset (Base section 4.3.1). A controller needn't look at it, but what it
/// says when it does is laid down.
fn a_list_entry_off_its_page_is_refused_where_it_is_looked_at(bench: &Bench) {
    let namespace = &bench.facts().namespaces[0];
    // Two pages of data, so that the second entry is a page and no list.
    let blocks = 2 * PAGE_BYTES as u32 / namespace.block_bytes();
    let mut host = bench.raw();
    let mut queue = host.queue_pair();
    let mut command = host.blocks(namespace.id(), 0, (blocks - 1) as u16);
    assert!(host.io(&mut queue, NvmOpcode::READ, command).is_success());
    command.prp2 += 8;
    let status = host.io(&mut queue, NvmOpcode::READ, command);
    assert!(status.is_success() || status.code() == StatusCode::PRP_OFFSET_INVALID, "{status}");
}
