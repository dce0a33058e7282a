//! The queue pair against a fake device whose completions the test posts by hand.

use std::sync::Arc;

use foliant_nvme_spec::command::{DatasetManagementCdw11, ReadWriteCdw12};
use foliant_nvme_spec::completion::CompletionDw2;
use foliant_nvme_spec::identify::Oncs;
use foliant_nvme_spec::{AdminOpcode, Command, NvmOpcode, PAGE_BYTES, Status, StatusCode};
use foliant_nvme_transport::Iova;

use super::QueuePair;
use crate::arena::DmaBuffer;
use crate::controller::{Controller, ControllerOptions, Hugepages};
use crate::error::{CommandError, DriverError, QueueError, SubmitError};
use crate::fake::{AdminFault, FakeClock, FakeTransport, Health};
use crate::namespace::Lba;
use crate::payload::{Payload, Segment};
use crate::request::{Completion, Deallocation, Fua, Io};

const QID: u16 = 1;

fn options() -> ControllerOptions {
    ControllerOptions {
        io_queue_pairs: 2,
        io_queue_entries: 8,
        arena_bytes: 4 << 20,
        hugepages: Hugepages::Never,
        ..ControllerOptions::default()
    }
}

fn open(fake: &FakeTransport) -> Controller {
    Controller::open_with_clock(Arc::new(fake.clone()), &options(), Box::new(FakeClock::default())).unwrap()
}

fn controller() -> (FakeTransport, Controller) {
    let fake = FakeTransport::new();
    let controller = open(&fake);
    (fake, controller)
}

fn read(lba: u64, blocks: u32) -> Io {
    Io::Read { lba: Lba(lba), blocks }
}

/// Polls everything; returns the results in order of completion.
fn poll_all<P: Payload>(queue: &mut QueuePair<P>) -> Vec<Completion<P>> {
    let mut completions = Vec::new();
    queue.poll(u32::MAX, |completion| completions.push(completion)).unwrap();
    completions
}

/// Submits reads of one page each and fetches them as the device.
fn submit_reads(
    fake: &FakeTransport,
    controller: &Controller,
    queue: &mut QueuePair<DmaBuffer>,
    count: u64,
) -> Vec<Command> {
    for index in 0..count {
        let buffer = controller.arena().allocate(PAGE_BYTES).unwrap();
        queue.submit(&controller.namespaces()[0], read(index * 8, 8), buffer).unwrap();
    }
    queue.ring();
    fake.fetch(QID)
}

#[test]
fn a_read_carries_its_blocks_and_its_data_pointer() {
    let (fake, controller) = controller();
    let mut queue = controller.queue_pair().unwrap();
    let buffer = controller.arena().allocate(2 * PAGE_BYTES).unwrap();
    let iova = buffer.iova().0;
    queue.submit(&controller.namespaces()[0], read(0x1_2345_0000 % (1 << 20), 16), buffer).unwrap();
    assert!(fake.fetch(QID).is_empty(), "nothing reaches the device before the doorbell");
    assert!(queue.ring());
    let [command] = fake.fetch(QID)[..] else { panic!("one command") };
    assert_eq!(command.cdw0.opcode(), NvmOpcode::READ.0);
    assert_eq!((command.nsid, command.slba()), (1, 0x5_0000));
    assert_eq!(ReadWriteCdw12::from(command.cdw12), ReadWriteCdw12::new().with_nlb_z(15));
    assert_eq!((command.prp1, command.prp2), (iova, iova + 4096));
}

#[test]
fn one_doorbell_tells_of_a_whole_batch() {
    let (fake, controller) = controller();
    let mut queue = controller.queue_pair().unwrap();
    let commands = submit_reads(&fake, &controller, &mut queue, 5);
    assert_eq!(commands.len(), 5);
    assert_eq!(queue.stats().sq_doorbells, 1);
    assert!(!queue.ring(), "nothing is left to tell");
}

#[test]
fn payloads_come_back_with_their_own_commands_in_any_order() {
    let (fake, controller) = controller();
    let mut queue = controller.queue_pair().unwrap();
    let commands = submit_reads(&fake, &controller, &mut queue, 3);
    for index in [2, 0, 1] {
        fake.complete(QID, commands[index].cdw0.cid(), Status::SUCCESS);
    }
    let back: Vec<_> = poll_all(&mut queue).iter().map(|completion| completion.payload.iova().0).collect();
    assert_eq!(back, [commands[2].prp1, commands[0].prp1, commands[1].prp1]);
    assert_eq!(queue.stats().cq_doorbells, 1);
    assert_eq!(queue.in_flight(), 0);
}

#[test]
fn both_rings_wrap_many_times() {
    let (fake, controller) = controller();
    let mut queue = controller.queue_pair().unwrap();
    for _ in 0..40 {
        let commands = submit_reads(&fake, &controller, &mut queue, 5);
        assert_eq!(commands.len(), 5);
        for command in commands {
            fake.complete(QID, command.cdw0.cid(), Status::SUCCESS);
        }
        assert_eq!(poll_all(&mut queue).len(), 5);
    }
    assert_eq!(fake.doorbell(2 * QID), 200 % 8);
    assert_eq!(fake.doorbell(2 * QID + 1), 200 % 8);
    assert_eq!(queue.stats().completions, 200);
}

#[test]
fn a_budget_leaves_the_rest_for_the_next_poll() {
    let (fake, controller) = controller();
    let mut queue = controller.queue_pair().unwrap();
    for command in submit_reads(&fake, &controller, &mut queue, 5) {
        fake.complete(QID, command.cdw0.cid(), Status::SUCCESS);
    }
    assert_eq!(queue.poll(0, drop), Ok(0));
    assert_eq!(queue.poll(2, drop), Ok(2));
    assert_eq!(queue.poll(9, drop), Ok(3));
    assert_eq!(queue.poll(9, drop), Ok(0));
}

#[test]
fn a_full_queue_gives_the_payload_back_and_takes_it_after_a_completion() {
    let (fake, controller) = controller();
    let namespace = &controller.namespaces()[0];
    let mut queue = controller.queue_pair().unwrap();
    let commands = submit_reads(&fake, &controller, &mut queue, 7);
    let buffer = controller.arena().allocate(PAGE_BYTES).unwrap();
    let rejected = queue.submit(namespace, read(0, 8), buffer).unwrap_err();
    assert_eq!(rejected.reason, SubmitError::Full);
    fake.complete(QID, commands[3].cdw0.cid(), Status::SUCCESS);
    poll_all(&mut queue);
    assert_eq!(queue.free_commands(), 1);
    assert!(queue.submit(namespace, read(0, 8), rejected.payload).is_ok());
}

#[test]
fn a_long_read_is_split_at_mdts_and_comes_back_once_with_its_first_failure() {
    let fake = FakeTransport::new();
    fake.state().mdts = 2;
    let controller = open(&fake);
    let namespace = &controller.namespaces()[0];
    assert_eq!(namespace.max_transfer_bytes(), 4 * PAGE_BYTES as u32);
    let mut queue = controller.queue_pair().unwrap();
    let buffer = controller.arena().allocate(10 * PAGE_BYTES).unwrap();
    let iova = buffer.iova().0;
    queue.submit(namespace, read(4, 80), buffer).unwrap();
    queue.ring();
    let commands = fake.fetch(QID);
    let runs: Vec<_> = commands.iter().map(|c| (c.slba(), c.cdw12 as u16 + 1, c.prp1 - iova)).collect();
    assert_eq!(runs, [(4, 32, 0), (36, 32, 16384), (68, 16, 32768)]);
    assert_eq!(fake.words(commands[1].prp2, 3), [iova + 20480, iova + 24576, iova + 28672]);
    let failure = Status::of(StatusCode::UNRECOVERED_READ_ERROR).with_dnr(true);
    fake.complete(QID, commands[1].cdw0.cid(), failure);
    fake.complete(QID, commands[0].cdw0.cid(), Status::SUCCESS);
    assert!(poll_all(&mut queue).is_empty());
    fake.complete(QID, commands[2].cdw0.cid(), Status::of(StatusCode::INTERNAL_ERROR));
    let [completion] = &poll_all(&mut queue)[..] else { panic!("one completion") };
    assert_eq!(completion.result, Err(CommandError::Status(failure)));
    assert_eq!((queue.stats().requests, queue.stats().reads, queue.stats().errors), (1, 3, 1));
}

#[test]
fn a_request_across_the_optimal_boundary_is_split_there() {
    let fake = FakeTransport::new();
    fake.state().noiob = 16;
    let controller = open(&fake);
    let mut queue = controller.queue_pair().unwrap();
    let buffer = controller.arena().allocate(PAGE_BYTES).unwrap();
    let iova = buffer.iova().0;
    let io = Io::Write { lba: Lba(13), blocks: 8, fua: Fua::Yes };
    queue.submit(&controller.namespaces()[0], io, buffer).unwrap();
    queue.ring();
    let commands = fake.fetch(QID);
    let runs: Vec<_> = commands.iter().map(|c| (c.slba(), c.cdw12 & 0xFFFF, c.prp1 - iova)).collect();
    assert_eq!(runs, [(13, 2, 0), (16, 4, 1536)]);
    let forced = |command: &Command| ReadWriteCdw12::from(command.cdw12).fua();
    assert!(commands.iter().all(forced), "each part of a write carries its FUA");
}

#[test]
fn a_request_of_more_commands_than_slots_is_too_large_and_of_more_than_free_ones_waits() {
    let fake = FakeTransport::new();
    fake.state().mdts = 1;
    let controller = open(&fake);
    let namespace = &controller.namespaces()[0];
    let mut queue = controller.queue_pair().unwrap();
    let buffer = controller.arena().allocate(16 * PAGE_BYTES).unwrap();
    let rejected = queue.submit(namespace, read(0, 128), buffer).unwrap_err();
    assert_eq!(rejected.reason, SubmitError::TooLarge { commands: 8, slots: 7 });
    submit_reads(&fake, &controller, &mut queue, 6);
    let buffer = controller.arena().allocate(4 * PAGE_BYTES).unwrap();
    assert_eq!(queue.submit(namespace, read(0, 32), buffer).unwrap_err().reason, SubmitError::Full);
    assert_eq!(queue.free_commands(), 1);
}

/// Segments without memory behind them: the fake device moves no data.
struct Segments(Vec<Segment>);

// SAFETY: no device touches memory through these segments; the fake one only hands out commands.
#[expect(unsafe_code, reason = "a payload for tests that inspect commands")]
unsafe impl Payload for Segments {
    fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        self.0.iter().copied()
    }
}

fn segments(parts: &[(u64, u32)]) -> Segments {
    Segments(parts.iter().map(|&(iova, len_bytes)| Segment { iova: Iova(iova), len_bytes }).collect())
}

#[test]
fn a_refused_request_leaves_no_trace() {
    let fake = FakeTransport::new();
    fake.state().mdts = 1;
    let controller = open(&fake);
    let namespace = &controller.namespaces()[0];
    let mut queue = controller.queue_pair().unwrap();
    let length =
        |expected_bytes, payload_bytes| SubmitError::LengthMismatch { expected_bytes, payload_bytes };
    let range = |lba, blocks| SubmitError::OutOfRange { lba, blocks, namespace_blocks: 1 << 20 };
    let misaligned = |iova| SubmitError::Misaligned { iova: Iova(iova) };
    let refused = [
        (read(0, 8), segments(&[(0x1000, 4097)]), length(4096, 4097)),
        (read(0, 8), segments(&[(0x1000, 4095)]), length(4096, 4095)),
        (read(0, 8), segments(&[]), length(4096, 0)),
        (read(0, 48), segments(&[(0x1000, 4096)]), length(24576, 4096)),
        (read(0, 8), segments(&[(0x1002, 4096)]), misaligned(0x1002)),
        (read(0, 32), segments(&[(0x1000, 12288), (0x9200, 4096)]), misaligned(0x9200)),
        (read(0, 0), segments(&[]), range(0, 0)),
        (read(1 << 20, 1), segments(&[(0x1000, 512)]), range(1 << 20, 1)),
        (read((1 << 20) - 1, 2), segments(&[(0x1000, 1024)]), range((1 << 20) - 1, 2)),
        (read(u64::MAX, 2), segments(&[(0x1000, 1024)]), range(u64::MAX, 2)),
        (Io::Flush, segments(&[(0x1000, 512)]), length(0, 512)),
    ];
    for (io, payload, reason) in refused {
        let rejected = queue.submit(namespace, io, payload).unwrap_err();
        assert_eq!(rejected.reason, reason, "{io:?}");
    }
    assert_eq!(queue.free_commands(), 7);
    assert!(!queue.ring());
    queue.submit(namespace, read(0, 8), segments(&[(0x1000, 4096)])).unwrap();
    queue.ring();
    assert_eq!(fake.fetch(QID).len(), 1);
}

#[test]
fn a_namespace_of_another_controller_is_refused() {
    let (_fake, controller) = controller();
    let (_other_fake, other) = self::controller();
    let mut queue = controller.queue_pair().unwrap();
    let rejected = queue.submit(&other.namespaces()[0], Io::Flush, ()).unwrap_err();
    assert_eq!(rejected.reason, SubmitError::ForeignNamespace);
}

#[test]
fn requests_without_data_carry_what_they_must() {
    let (fake, controller) = controller();
    let namespace = &controller.namespaces()[0];
    let mut queue = controller.queue_pair().unwrap();
    queue.submit(namespace, Io::Flush, ()).unwrap();
    let (lba, blocks) = (Lba(24), 100_000);
    let (fua, deallocation) = (Fua::Yes, Deallocation::Allow);
    queue.submit(namespace, Io::WriteZeroes { lba, blocks, fua, deallocation }, ()).unwrap();
    queue.submit(namespace, Io::Deallocate { lba, blocks }, ()).unwrap();
    queue.ring();
    let [flush, zeroes, more_zeroes, deallocate] = fake.fetch(QID)[..] else { panic!("four commands") };
    assert_eq!((flush.cdw0.opcode(), flush.nsid), (NvmOpcode::FLUSH.0, 1));
    assert_eq!((zeroes.slba(), zeroes.cdw12), (24, 1 << 30 | 1 << 25 | 0xFFFF));
    assert_eq!((more_zeroes.slba(), more_zeroes.cdw12 & 0xFFFF), (24 + 65536, 100_000 - 65536 - 1));
    assert_eq!((deallocate.cdw0.opcode(), deallocate.cdw10), (NvmOpcode::DATASET_MANAGEMENT.0, 0));
    assert!(DatasetManagementCdw11::from(deallocate.cdw11).ad());
    assert_eq!(fake.words(deallocate.prp1, 2), [100_000 << 32, 24]);
}

#[test]
fn a_command_the_controller_does_not_support_is_refused() {
    let fake = FakeTransport::new();
    fake.state().oncs = Oncs::new();
    let controller = open(&fake);
    let namespace = &controller.namespaces()[0];
    let mut queue = controller.queue_pair().unwrap();
    let rejected = queue.submit(namespace, Io::Deallocate { lba: Lba(0), blocks: 1 }, ()).unwrap_err();
    assert_eq!(rejected.reason, SubmitError::Unsupported);
}

/// Posts one wrong completion for a queue with an outstanding command; returns how the queue fails.
fn failure_after(post: impl FnOnce(&FakeTransport, u16)) -> QueueError {
    let (fake, controller) = controller();
    let mut queue = controller.queue_pair().unwrap();
    let commands = submit_reads(&fake, &controller, &mut queue, 2);
    fake.complete(QID, commands[0].cdw0.cid(), Status::SUCCESS);
    post(&fake, commands[0].cdw0.cid());
    let mut ended = 0;
    let failure = queue.poll(u32::MAX, |_| ended += 1).unwrap_err();
    assert_eq!(ended, 1, "what completed before the fault is handed out");
    fake.complete(QID, commands[1].cdw0.cid(), Status::SUCCESS);
    assert_eq!(queue.poll(u32::MAX, |_| ended += 1), Err(failure), "the failure is latched");
    let buffer = controller.arena().allocate(PAGE_BYTES).unwrap();
    let rejected = queue.submit(&controller.namespaces()[0], read(0, 8), buffer).unwrap_err();
    assert_eq!(rejected.reason, SubmitError::Failed);
    let mut results = Vec::new();
    queue.close(|completion| results.push(completion.result)).unwrap();
    assert_eq!(results, [Err(CommandError::Aborted)]);
    failure
}

#[test]
fn a_completion_that_comes_twice_fails_the_queue() {
    let mut stale = 0;
    let failure = failure_after(|fake, cid| {
        stale = cid;
        fake.complete(QID, cid, Status::SUCCESS);
    });
    assert_eq!(failure, QueueError::UnknownCommand { qid: QID, cid: stale });
}

#[test]
fn a_completion_out_of_the_tables_bounds_fails_the_queue() {
    let failure = failure_after(|fake, _| fake.complete(QID, 0xFFFF, Status::SUCCESS));
    assert_eq!(failure, QueueError::UnknownCommand { qid: QID, cid: 0xFFFF });
}

#[test]
fn a_completion_of_another_queue_fails_the_queue() {
    let dw2 = CompletionDw2::new().with_sqid(7);
    let failure = failure_after(|fake, cid| fake.post(QID, cid ^ 1, dw2, Status::SUCCESS, 0));
    assert_eq!(failure, QueueError::ForeignQueue { qid: QID, sqid: 7 });
}

#[test]
fn a_completion_with_an_impossible_head_fails_the_queue() {
    let dw2 = CompletionDw2::new().with_sqid(QID).with_sqhd(8);
    let failure = failure_after(|fake, cid| fake.post(QID, cid ^ 1, dw2, Status::SUCCESS, 0));
    assert_eq!(failure, QueueError::HeadOutOfRange { qid: QID, sqhd: 8, entries: 8 });
}

#[test]
fn closing_gives_back_what_completed_and_aborts_the_rest() {
    let (fake, controller) = controller();
    let mut queue = controller.queue_pair().unwrap();
    let commands = submit_reads(&fake, &controller, &mut queue, 3);
    fake.complete(QID, commands[1].cdw0.cid(), Status::SUCCESS);
    let mut results = Vec::new();
    queue.close(|completion| results.push((completion.payload.iova().0, completion.result))).unwrap();
    let aborted = Err(CommandError::Aborted);
    let expected = [(commands[1].prp1, Ok(())), (commands[0].prp1, aborted), (commands[2].prp1, aborted)];
    assert_eq!(results, expected);
    let deleted = [AdminOpcode::DELETE_IO_SUBMISSION_QUEUE, AdminOpcode::DELETE_IO_COMPLETION_QUEUE];
    assert!(fake.state().admin_opcodes.ends_with(&deleted));
}

#[test]
fn dropping_deletes_the_queues_and_gives_memory_and_number_back() {
    let (fake, controller) = controller();
    let free_bytes = controller.arena().free_bytes();
    for _ in 0..5 {
        let mut queue = controller.queue_pair().unwrap();
        assert_eq!(queue.id(), QID);
        submit_reads(&fake, &controller, &mut queue, 3);
        drop(queue);
        assert_eq!(controller.arena().free_bytes(), free_bytes);
    }
}

#[test]
fn payloads_are_kept_until_the_controller_is_stopped_when_the_deletion_is_not_confirmed() {
    let (fake, controller) = controller();
    let mut queue = controller.queue_pair().unwrap();
    submit_reads(&fake, &controller, &mut queue, 3);
    let free_bytes = controller.arena().free_bytes();
    fake.state().admin_fault = AdminFault::Silent(AdminOpcode::DELETE_IO_SUBMISSION_QUEUE);
    drop(queue);
    assert_eq!(controller.arena().free_bytes(), free_bytes);
    drop(controller);
    assert!(!fake.state().cc.en());
    assert!(fake.state().mappings.is_empty(), "nothing is lost once the controller is disabled");
    assert!(!fake.state().unmapped_while_enabled);
}

#[test]
fn a_queue_that_failed_lets_its_owner_sleep() {
    let (fake, controller) = controller();
    let mut queue = controller.queue_pair().unwrap();
    let commands = submit_reads(&fake, &controller, &mut queue, 2);
    fake.complete(QID, 0x77, Status::SUCCESS);
    fake.complete(QID, commands[0].cdw0.cid(), Status::SUCCESS);
    queue.poll(8, |_| ()).unwrap_err();
    for _ in 0..3 {
        assert_ne!(queue.prepare_to_sleep(), crate::Wakeup::Ready, "nobody will ever take it");
        queue.poll(8, |_| ()).unwrap_err();
    }
}

/// The controller was reset by somebody else, and its admin queue with it.
fn reset_from_outside(fake: &FakeTransport) {
    let cc = fake.state().cc;
    fake.state().cc = cc.with_en(false);
    fake.state().admin_fault = AdminFault::Silent(AdminOpcode::CREATE_IO_COMPLETION_QUEUE);
}

#[test]
fn a_queue_that_could_not_be_created_after_a_reset_keeps_nothing_once_the_controller_is_dropped() {
    let (fake, controller) = controller();
    reset_from_outside(&fake);
    let error = controller.queue_pair::<()>().unwrap_err();
    assert!(matches!(error, DriverError::NotReady), "{error}");
    drop(controller);
    assert!(!fake.state().cc.en());
    assert!(fake.state().mappings.is_empty());
}

#[test]
fn a_queue_beside_one_that_could_not_be_created_after_a_reset_is_closed_as_gone() {
    let (fake, controller) = controller();
    let idle = controller.queue_pair::<()>().unwrap();
    reset_from_outside(&fake);
    assert!(controller.queue_pair::<()>().is_err());
    idle.close(|_| ()).unwrap();
}

#[test]
fn a_device_that_is_gone_gives_its_payloads_back_as_gone() {
    let (fake, controller) = controller();
    let mut queue = controller.queue_pair().unwrap();
    submit_reads(&fake, &controller, &mut queue, 2);
    fake.state().health = Health::Gone;
    assert!(matches!(queue.check(), Err(DriverError::Gone)));
    let mut results = Vec::new();
    queue.close(|completion| results.push(completion.result)).unwrap();
    assert_eq!(results, [Err(CommandError::Gone); 2]);
}

#[test]
fn a_controller_that_has_failed_is_stopped_and_gives_its_payloads_back() {
    let (fake, controller) = controller();
    let mut queue = controller.queue_pair().unwrap();
    let mut other = controller.queue_pair().unwrap();
    submit_reads(&fake, &controller, &mut queue, 2);
    other.submit(&controller.namespaces()[0], Io::Flush, ()).unwrap();
    fake.state().health = Health::Fatal;
    fake.state().admin_fault = AdminFault::Silent(AdminOpcode::DELETE_IO_SUBMISSION_QUEUE);
    assert!(matches!(queue.check(), Err(DriverError::ControllerFatal { .. })));
    let mut results = Vec::new();
    queue.close(|completion| results.push(completion.result)).unwrap();
    other.close(|completion| results.push(completion.result)).unwrap();
    assert_eq!(results, [Err(CommandError::Gone); 3]);
    assert!(!fake.state().cc.en());
}

#[test]
fn a_controller_is_shared_and_a_queue_pair_moves_between_threads() {
    fn assert_shared<T: Send + Sync>() {}
    fn assert_moves<T: Send>() {}
    assert_shared::<Controller>();
    assert_moves::<QueuePair<DmaBuffer>>();
}

#[test]
fn only_granted_queue_pairs_can_be_had() {
    let (_fake, controller) = controller();
    let first = controller.queue_pair::<()>().unwrap();
    let second = controller.queue_pair::<()>().unwrap();
    assert_eq!((first.id(), second.id()), (1, 2));
    assert!(matches!(controller.queue_pair::<()>(), Err(DriverError::QueuePairsTaken { granted: 2 })));
    drop(first);
    assert_eq!(controller.queue_pair::<()>().unwrap().id(), 1);
}

#[test]
fn a_refused_creation_gives_the_number_back() {
    let (fake, controller) = controller();
    for opcode in [AdminOpcode::CREATE_IO_SUBMISSION_QUEUE, AdminOpcode::CREATE_IO_COMPLETION_QUEUE] {
        fake.state().admin_fault = AdminFault::Refused(opcode, StatusCode::INVALID_QUEUE_SIZE);
        for _ in 0..5 {
            let error = controller.queue_pair::<()>().unwrap_err();
            assert!(matches!(error, DriverError::Command { opcode: o, .. } if o == opcode), "{error}");
        }
    }
    fake.state().admin_fault = AdminFault::None;
    assert_eq!(controller.queue_pair::<()>().unwrap().id(), 1);
}
