//! From power-on to shutdown, in order and otherwise.

use foliant_nvme::{Controller, DriverError, Fua, Io, Lba};
use foliant_nvme_spec::registers::{Cc, Csts, Register};

use super::cases;
use crate::conformance::abandon::Abandonable;
use crate::conformance::host::{Host, Load};
use crate::conformance::{Bench, pattern};

cases! {
    data_is_there_after_a_shutdown: [];
    a_shutdown_waits_for_the_queue_pairs_and_the_device_goes_on: [];
    a_dropped_controller_is_disabled_and_can_be_opened_again: [];
    a_controller_that_was_left_busy_by_a_dead_process_is_taken_over: [];
    a_controller_can_be_opened_many_times: [];
}

fn data_is_there_after_a_shutdown(bench: &Bench) {
    let mut host = bench.host();
    let len = 16 * host.block_bytes();
    host.write(0, &pattern::of(1, len), Fua::No);
    host.shut_down();
    assert!(bench.host().read(0, 16) == pattern::of(1, len));
}

fn a_shutdown_waits_for_the_queue_pairs_and_the_device_goes_on(bench: &Bench) {
    let Host { controller, namespace, queue } = bench.host();
    let refused = controller.shutdown();
    assert!(matches!(refused, Err(DriverError::QueuePairsInUse { count: 1 })), "{refused:?}");
    // The controller is gone for the caller; its queue pair goes on.
    let mut queue = queue;
    queue.submit(&namespace, Io::Flush, Load::nothing()).expect("there is a slot");
    crate::conformance::host::next_of(&mut queue).result.expect("the flush succeeds");
}

fn a_dropped_controller_is_disabled_and_can_be_opened_again(bench: &Bench) {
    let transport = bench.transport();
    let read = |register: Register| transport.read_u32(register.offset()).expect("the register reads");
    let mut host = Host::open(transport.clone(), &bench.options()).expect("the controller opens");
    let block = host.block_bytes();
    host.write(3, &pattern::of(2, block), Fua::Yes);
    assert!(Cc::from(read(Register::Cc)).en() && Csts::from(read(Register::Csts)).rdy());
    drop(host);
    assert!(!Cc::from(read(Register::Cc)).en() && !Csts::from(read(Register::Csts)).rdy());
    let mut again = Host::open(transport, &bench.options()).expect("the controller opens again");
    assert!(again.read(3, 1) == pattern::of(2, block));
}

/// The device is enabled, has queues, and has been told of commands; then its owner is gone. Whoever opens it next
/// resets it first, and nothing of the old owner's commands shows up in the new one's queues.
fn a_controller_that_was_left_busy_by_a_dead_process_is_taken_over(bench: &Bench) {
    let transport = bench.transport();
    let owner = Abandonable::new(transport.clone());
    let mut host = Host::open(owner.clone(), &bench.options()).expect("the controller opens");
    let block = host.block_bytes();
    let before = pattern::of(3, 8 * block);
    host.write(0, &before, Fua::Yes);
    let commands = host.queue.free_commands();
    for _ in 0..commands {
        let blank = Load::of(host.controller.arena(), &vec![0; block]);
        host.submit(Io::Read { lba: Lba(0), blocks: 1 }, blank).expect("there is a slot");
    }
    host.queue.ring();
    owner.abandon(host);
    drop(owner);
    let cc = Cc::from(transport.read_u32(Register::Cc.offset()).expect("CC reads"));
    assert!(cc.en(), "the device was left enabled");

    let mut host = Host::open(transport, &bench.options()).expect("the controller is taken over");
    assert!(host.read(0, 8) == before);
    for lba in 0..64 {
        host.write(lba, &pattern::of(lba, block), Fua::No);
    }
    for lba in 0..64 {
        assert!(host.read(lba, 1) == pattern::of(lba, block), "block {lba}");
    }
    host.shut_down();
}

fn a_controller_can_be_opened_many_times(bench: &Bench) {
    for round in 0..10 {
        let controller = Controller::open(bench.transport(), &bench.options()).expect("the controller opens");
        if round % 2 == 0 {
            controller.shutdown().expect("the controller shuts down");
        }
    }
}
