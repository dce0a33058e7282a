//! I/O commands: data, limits, refusals, queue mechanics.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use foliant_nvme_spec::command::{
    DatasetManagementCdw10, DatasetManagementCdw11, DatasetManagementRange, Psdt, ReadWriteCdw12,
    WriteZeroesCdw12,
};
use foliant_nvme_spec::{Command, NvmOpcode, StatusCode};
use foliant_nvme_transport::Iova;
use zerocopy::IntoBytes;

use super::host::{DATA, Host, PAGE, flush, io_command};
use crate::{EmulatedConfig, NamespaceConfig, ObservedSegment};

/// Bytes that differ from block to block and from seed to seed.
pub(super) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Writes, reads back, overwrites in part, zeroes and deallocates; used on every backing.
pub(super) fn exercise(host: &mut Host, block: usize) {
    for (slba, blocks) in [(0, 1), (7, 1), (16, 2), (100, 40), (1000, 256)] {
        let data = pattern(blocks * block, slba);
        assert_eq!(host.write(slba, &data, block), StatusCode::SUCCESS);
        assert_eq!(host.code(flush()), StatusCode::SUCCESS);
        assert!(host.read(slba, data.len(), block) == Ok(data.clone()), "{blocks} blocks at {slba}");
        let mut image = vec![0; data.len()];
        host.controller.read_image(1, slba * block as u64, &mut image).unwrap();
        assert!(image == data);
    }
    let mut fua = host.transfer(NvmOpcode::WRITE, 3, 1, DATA, block);
    fua.cdw12 = ReadWriteCdw12::new().with_fua(true).into();
    host.fill(DATA, &pattern(block, 33));
    assert_eq!(host.code(fua), StatusCode::SUCCESS);
    assert_eq!(host.read(3, block, block), Ok(pattern(block, 33)));

    zero_some(host, block);
    // Never written: zeroes.
    assert_eq!(host.read(5000, 2 * block, block), Ok(vec![0; 2 * block]));
}

/// Zeroes blocks 1010 to 1019 and deallocates 1030 to 1033 and 1040, of 256 written from 1000.
fn zero_some(host: &mut Host, block: usize) {
    let mut expected = pattern(256 * block, 1000);
    let mut zero = |from: usize, to: usize| expected[from * block..to * block].fill(0);
    let mut zeroes = io_command(NvmOpcode::WRITE_ZEROES, 1010, 10);
    assert_eq!(host.code(zeroes), StatusCode::SUCCESS);
    zero(10, 20);
    zeroes.set_slba(1020);
    zeroes.cdw12 = WriteZeroesCdw12::new().with_nlb_z(1).with_deac(true).with_fua(true).into();
    assert_eq!(host.code(zeroes), StatusCode::SUCCESS);
    zero(20, 22);
    let ranges = [(1030, 4), (1040, 1), (1050, 0)].map(|(slba, length_blocks)| DatasetManagementRange {
        slba,
        length_blocks,
        context_attributes: 0,
    });
    assert_eq!(deallocate(host, &ranges), StatusCode::SUCCESS);
    zero(30, 34);
    zero(40, 41);
    assert!(host.read(1000, expected.len(), block) == Ok(expected));
}

fn deallocate(host: &mut Host, ranges: &[DatasetManagementRange]) -> StatusCode {
    host.fill(DATA, ranges.as_bytes());
    let mut command = io_command(NvmOpcode::DATASET_MANAGEMENT, 0, 0);
    command.cdw10 = DatasetManagementCdw10::new().with_nr_z((ranges.len() - 1) as u8).into();
    command.cdw11 = DatasetManagementCdw11::new().with_ad(true).into();
    command.cdw12 = 0;
    command.prp1 = host.iova + DATA as u64;
    command.prp2 = command.prp1 + PAGE as u64;
    host.code(command)
}

#[test]
fn ram_returns_what_was_written() {
    exercise(&mut Host::uri("emu:ram?size=64MiB&lba=512"), 512);
    exercise(&mut Host::uri("emu:ram?size=64MiB&lba=4096&mdts=0"), 4096);
    exercise(&mut Host::uri("emu:ram?size=64MiB&lba=4096&model=1&vwc=0"), 4096);
}

#[test]
fn null_completes_and_leaves_the_buffer_untouched() {
    let mut host = Host::uri("emu:null?size=1TiB");
    let data = pattern(PAGE, 1);
    assert_eq!(host.write(0, &pattern(PAGE, 2), PAGE), StatusCode::SUCCESS);
    host.fill(DATA, &data);
    let read = host.transfer(NvmOpcode::READ, 99, 1, DATA, PAGE);
    assert_eq!(host.code(read), StatusCode::SUCCESS);
    assert_eq!(host.bytes(DATA, PAGE), data);
}

#[test]
fn chained_prp_lists_carry_a_transfer_of_several_list_pages() {
    let mut host = Host::uri("emu:ram?size=64MiB&lba=512&mdts=8MiB");
    // 1,100 pages and a start inside the first one: three list pages.
    let len = 1100 * PAGE;
    let data = pattern(len, 5);
    host.fill(DATA + 512, &data);
    let write = host.transfer(NvmOpcode::WRITE, 9, len / 512, DATA + 512, len);
    assert_eq!(host.code(write), StatusCode::SUCCESS);
    host.fill(DATA + 512, &vec![0; len]);
    let read = host.transfer(NvmOpcode::READ, 9, len / 512, DATA + 512, len);
    assert_eq!(host.code(read), StatusCode::SUCCESS);
    assert!(host.bytes(DATA + 512, len) == data);
}

#[test]
fn namespaces_are_apart_and_flush_takes_all_of_them() {
    let namespaces = vec![NamespaceConfig::new(1 << 20, 512), NamespaceConfig::new(2 << 20, 4096)];
    let mut host = Host::boot(EmulatedConfig { namespaces, ..EmulatedConfig::ram(4096, 4096) });
    host.fill(DATA, &[1; 512]);
    let first = host.transfer(NvmOpcode::WRITE, 2047, 1, DATA, 512);
    assert_eq!(host.code(first), StatusCode::SUCCESS);
    let mut second = host.transfer(NvmOpcode::READ, 0, 1, DATA, PAGE);
    second.nsid = 2;
    assert_eq!(host.code(second), StatusCode::SUCCESS);
    assert_eq!(host.bytes(DATA, PAGE), vec![0; PAGE]);
    second.set_slba(512);
    assert_eq!(host.code(second), StatusCode::LBA_OUT_OF_RANGE);
    assert_eq!(host.code(Command { nsid: u32::MAX, ..flush() }), StatusCode::SUCCESS);
}

#[test]
fn bad_commands_get_the_status_of_the_specification() {
    let mut host = Host::uri("emu:ram?size=1MiB&lba=512&mdts=8KiB");
    let good = host.transfer(NvmOpcode::READ, 0, 1, DATA, 512);
    let host_address = host.host_address(DATA) as u64;
    let with = |change: &dyn Fn(&mut Command)| {
        let mut command = good;
        change(&mut command);
        command
    };
    let nlb = |nlb_z: u16| u32::from(ReadWriteCdw12::new().with_nlb_z(nlb_z));
    let cases: [(&str, Command, StatusCode); 17] = [
        ("good", good, StatusCode::SUCCESS),
        ("opcode", with(&|c| c.cdw0.set_opcode(0x7F)), StatusCode::INVALID_OPCODE),
        ("compare", with(&|c| c.cdw0.set_opcode(NvmOpcode::COMPARE.0)), StatusCode::INVALID_OPCODE),
        ("sgl", with(&|c| c.cdw0.set_psdt(Psdt::Sgl)), StatusCode::INVALID_FIELD),
        ("fused", with(&|c| c.cdw0.set_fuse(1)), StatusCode::INVALID_FIELD),
        ("namespace 0", with(&|c| c.nsid = 0), StatusCode::INVALID_NAMESPACE),
        ("namespace 2", with(&|c| c.nsid = 2), StatusCode::INVALID_NAMESPACE),
        ("all namespaces", with(&|c| c.nsid = u32::MAX), StatusCode::INVALID_NAMESPACE),
        ("past the end", with(&|c| c.set_slba(2048)), StatusCode::LBA_OUT_OF_RANGE),
        ("slba wraps", with(&|c| c.set_slba(u64::MAX)), StatusCode::LBA_OUT_OF_RANGE),
        ("over mdts", with(&|c| c.cdw12 = nlb(16)), StatusCode::INVALID_FIELD),
        ("prp1 odd", with(&|c| c.prp1 += 2), StatusCode::PRP_OFFSET_INVALID),
        ("host address", with(&|c| c.prp1 = host_address), StatusCode::DATA_TRANSFER_ERROR),
        ("prp1 0", with(&|c| c.prp1 = 0), StatusCode::DATA_TRANSFER_ERROR),
        (
            "prp2 offset",
            with(&|c| {
                c.cdw12 = nlb(15);
                c.prp2 = c.prp1 + 512;
            }),
            StatusCode::PRP_OFFSET_INVALID,
        ),
        (
            "directive",
            {
                let mut write = with(&|c| c.cdw0.set_opcode(NvmOpcode::WRITE.0));
                write.cdw12 = ReadWriteCdw12::new().with_dtype(1).into();
                write
            },
            StatusCode::INVALID_FIELD,
        ),
        ("flush of namespace 9", Command { nsid: 9, ..flush() }, StatusCode::INVALID_NAMESPACE),
    ];
    for (name, command, code) in cases {
        let status = host.io(command);
        assert_eq!(status.code(), code, "{name}");
        assert_eq!(status.dnr(), code != StatusCode::SUCCESS, "{name}");
    }
    let stats = host.controller.stats();
    assert_eq!((stats.refused, stats.errors, stats.dma_faults), (16, 16, 2));
    let over = DatasetManagementRange { slba: 2047, length_blocks: 2, context_attributes: 0 };
    assert_eq!(deallocate(&mut host, &[over]), StatusCode::LBA_OUT_OF_RANGE);
    let zeroes = io_command(NvmOpcode::WRITE_ZEROES, 2000, 49);
    assert_eq!(host.code(zeroes), StatusCode::LBA_OUT_OF_RANGE);
}

#[test]
fn memory_taken_back_is_no_longer_reached() {
    let mut host = Host::uri("emu:ram?size=1MiB&lba=512");
    let mut extra = memmap2::MmapMut::map_anon(PAGE).unwrap();
    let base = std::ptr::NonNull::new(extra.as_mut_ptr()).unwrap();
    let memory = foliant_nvme_transport::DmaMemory { base, len_bytes: PAGE };
    #[expect(unsafe_code, reason = "maps memory as a driver does")]
    // SAFETY: the memory lives to the end of the test and is unmapped before.
    let iova = unsafe { host.transport.map_dma(memory) }.unwrap();
    let mut read = io_command(NvmOpcode::READ, 0, 1);
    read.prp1 = iova.0;
    assert_eq!(host.code(read), StatusCode::SUCCESS);
    host.transport.unmap_dma(iova, PAGE).unwrap();
    assert_eq!(host.code(read), StatusCode::DATA_TRANSFER_ERROR);
}

#[test]
fn phase_and_queue_head_follow_over_many_wraps() {
    let mut host = Host::uri("emu:null?size=1GiB");
    let mut queue = host.create_queue_pair(2, 5);
    let read = host.transfer(NvmOpcode::READ, 0, 1, DATA, PAGE);
    for round in 0..23u32 {
        let batch = round % 4 + 1;
        let cids: Vec<u16> = (0..batch).map(|_| queue.submit(read)).collect();
        queue.ring();
        for cid in cids {
            let completion = queue.wait();
            assert_eq!((completion.dw3.cid(), completion.dw2.sqid()), (cid, 2));
            assert!(u32::from(completion.dw2.sqhd()) < 5);
        }
        assert!(queue.take().is_none());
    }
    assert_eq!(host.controller.stats().reads, (0..23).map(|round| round % 4 + 1).sum::<u64>());
}

#[test]
fn a_full_completion_queue_holds_commands_back_and_loses_none() {
    let mut host = Host::uri("emu:null?size=1GiB");
    let mut queue = host.create_queue_pair(2, 4);
    let read = host.transfer(NvmOpcode::READ, 0, 1, DATA, PAGE);
    let first: Vec<u16> = (0..3).map(|_| queue.submit(read)).collect();
    queue.ring();
    assert_eq!((queue.pump().fetched, queue.pump().fetched), (3, 0));
    // All three entries of completion space are taken, so the next commands stay where they are.
    let second: Vec<u16> = (0..3).map(|_| queue.submit(read)).collect();
    queue.ring();
    assert_eq!((queue.pump().fetched, host.controller.stats().cq_full), (0, 1));
    assert_eq!(queue.take().unwrap().dw3.cid(), first[0]);
    assert_eq!(queue.pump().fetched, 0, "taking without the doorbell frees nothing");
    queue.give_back();
    assert_eq!(queue.pump().fetched, 1);
    let rest: Vec<u16> = (0..5).map(|_| queue.wait().dw3.cid()).collect();
    assert_eq!(rest, [&first[1..], &second].concat());
}

#[test]
fn completions_are_untaken_until_the_doorbell_says_otherwise() {
    let mut host = Host::uri("emu:null?size=1GiB");
    let mut queue = host.create_queue_pair(2, 5);
    let read = host.transfer(NvmOpcode::READ, 0, 1, DATA, PAGE);
    for _ in 0..7 {
        let untaken = || host.controller.completions_untaken(2);
        let _cids: Vec<u16> = (0..3).map(|_| queue.submit(read)).collect();
        queue.ring();
        assert_eq!(untaken(), 0, "nothing is carried out yet");
        assert_eq!((queue.pump().posted, untaken()), (3, 3));
        assert!(queue.take().is_some() && queue.take().is_some());
        assert_eq!(untaken(), 3, "the device doesn't know");
        queue.give_back();
        assert_eq!(untaken(), 1);
        assert!(queue.take().is_some());
        queue.give_back();
        assert_eq!(untaken(), 0);
    }
    queue.head_doorbell().store(64, Ordering::Release);
    assert!(host.controller.completions_untaken(2) < 5, "a doorbell can't point there");
    assert_eq!(
        [0, 3, u16::MAX].map(|cqid| host.controller.completions_untaken(cqid)),
        [0; 3],
        "no such queue"
    );
}

#[test]
fn invalid_doorbell_values_are_ignored_and_counted() {
    let mut host = Host::uri("emu:null?size=1GiB");
    let read = host.transfer(NvmOpcode::READ, 0, 1, DATA, PAGE);
    host.queue.tail_doorbell().store(64, Ordering::Release);
    assert_eq!(host.queue.pump().fetched, 0);
    host.queue.head_doorbell().store(1, Ordering::Release);
    assert_eq!(host.queue.pump().fetched, 0);
    assert_eq!(host.controller.stats().doorbells_invalid, 2);
    assert_eq!(host.code(read), StatusCode::SUCCESS);
    assert_eq!(host.controller.stats().doorbells_invalid, 2);
}

#[test]
fn two_submission_queues_may_share_a_completion_queue() {
    let mut host = Host::uri("emu:null?size=1GiB");
    let list = host.iova + 4 * 1024 * 1024;
    assert_eq!(host.admin(super::host::create_sq(7, 64, list, 1)), Ok(0));
    let mut read = host.transfer(NvmOpcode::READ, 0, 1, DATA, PAGE);
    read.cdw0.set_cid(4242);
    host.fill(4 * 1024 * 1024, read.as_bytes());
    let tail = foliant_nvme_spec::registers::submission_tail_doorbell(7, crate::ring::DSTRD);
    host.transport.write_u32(0x1000 + tail, 1).unwrap();
    let completion = host.queue.wait();
    assert_eq!((completion.dw3.cid(), completion.dw2.sqid(), completion.dw2.sqhd()), (4242, 7, 1));
}

#[test]
fn an_observer_sees_commands_with_the_memory_behind_them() {
    let mut host = Host::uri("emu:ram?size=64MiB&lba=512");
    type Seen = Vec<(NvmOpcode, u64, u32, bool, Vec<ObservedSegment>)>;
    let seen: Arc<Mutex<Seen>> = Arc::default();
    let log = Arc::clone(&seen);
    host.controller.observe(Some(Arc::new(move |command| {
        let segments = command.segments.to_vec();
        let mut log = log.lock().unwrap();
        log.push((command.opcode, command.slba, command.blocks, command.fua, segments));
    })));
    let write = host.transfer(NvmOpcode::WRITE, 5, 24, DATA + 2048, 12288);
    assert_eq!(host.code(write), StatusCode::SUCCESS);
    assert_eq!(host.code(io_command(NvmOpcode::READ, 1 << 40, 1)), StatusCode::LBA_OUT_OF_RANGE);
    host.controller.observe(None);
    assert_eq!(host.code(flush()), StatusCode::SUCCESS);
    let segment = ObservedSegment {
        iova: Iova(host.iova + DATA as u64 + 2048),
        host: host.host_address(DATA + 2048),
        len_bytes: 12288,
    };
    assert_eq!(*seen.lock().unwrap(), [(NvmOpcode::WRITE, 5, 24, false, vec![segment])]);
}

#[test]
fn counters_tell_what_was_moved() {
    let mut host = Host::uri("emu:ram?size=1MiB&lba=512");
    assert_eq!(host.write(0, &[1; 1024], 512), StatusCode::SUCCESS);
    assert!(host.read(0, 512, 512).is_ok());
    assert_eq!(host.code(flush()), StatusCode::SUCCESS);
    let stats = host.controller.stats();
    assert_eq!((stats.writes, stats.reads, stats.flushes, stats.io_commands()), (1, 1, 1, 3));
    assert_eq!((stats.bytes_written, stats.bytes_read, stats.errors), (1024, 512, 0));
    assert_eq!(stats.sq_batches, stats.admin_commands + 3);
}
