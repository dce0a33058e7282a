//! Injected faults, modelled latency, Abort.

use std::sync::Arc;
use std::time::Duration;

use foliant_nvme_spec::command::AbortCdw10;
use foliant_nvme_spec::{AdminOpcode, Command, NvmOpcode, Status, StatusCode};

use super::host::{DATA, Host, PAGE, admin_command, flush};
use crate::{
    Action, Bandwidth, Clock, EmulatedConfig, Fault, Latency, ManualClock, Match, ObservedEvent, Turn,
};

fn manual(latency: Latency) -> (Host, Arc<ManualClock>) {
    let clock = ManualClock::new();
    let config = EmulatedConfig {
        clock: Clock::Manual(Arc::clone(&clock)),
        latency,
        ..EmulatedConfig::ram(1 << 20, 4096)
    };
    (Host::boot(config), clock)
}

fn read_of(host: &Host, slba: u64) -> Command {
    host.transfer(NvmOpcode::READ, slba, 1, DATA, PAGE)
}

#[test]
fn a_status_fault_fails_the_chosen_command_and_moves_no_data() {
    let mut host = Host::uri("emu:ram?size=1MiB");
    let status = Status::of(StatusCode::WRITE_FAULT).with_dnr(true);
    let matching = Match::io(NvmOpcode::WRITE).touching(5, 5).after(0, 1);
    host.controller.inject(Fault { matching, action: Action::Status(status) });
    assert_eq!(host.write(4, &[7; PAGE], PAGE), StatusCode::SUCCESS);
    assert_eq!(host.write(5, &[7; PAGE], PAGE), StatusCode::WRITE_FAULT);
    assert_eq!(host.read(5, PAGE, PAGE), Ok(vec![0; PAGE]));
    assert_eq!(host.write(5, &[7; PAGE], PAGE), StatusCode::SUCCESS);
    assert_eq!(host.controller.stats().faults_injected, 1);
}

#[test]
fn a_delayed_command_completes_when_its_time_has_come() {
    let (mut host, clock) = manual(Latency::default());
    let delay = Duration::from_millis(3);
    host.controller.inject(Fault { matching: Match::default().after(0, 1), action: Action::Delay(delay) });
    let (late, soon) = (read_of(&host, 0), read_of(&host, 1));
    let cids = [host.queue.submit(late), host.queue.submit(soon)];
    host.queue.ring();
    let pumped = host.queue.pump();
    assert_eq!((pumped.fetched, pumped.posted, pumped.in_flight), (2, 1, 1));
    assert_eq!(pumped.next_due_ns, Some(3_000_000));
    assert_eq!(host.queue.take().unwrap().dw3.cid(), cids[1]);
    clock.advance(Duration::from_nanos(2_999_999));
    assert_eq!(host.queue.pump().next_due_ns, Some(1));
    clock.advance(Duration::from_nanos(1));
    assert_eq!(host.queue.pump().posted, 1);
    assert_eq!(host.queue.take().unwrap().dw3.cid(), cids[0]);
}

#[test]
fn a_command_that_fails_late_is_carried_out_and_every_turn_of_it_is_told() {
    let (mut host, clock) = manual(Latency::default());
    let (delay, status) = (Duration::from_millis(3), Status::of(StatusCode::WRITE_FAULT));
    let action = Action::FailLate { delay, status };
    host.controller.inject(Fault { matching: Match::default().after(0, 1), action });
    let turns = Arc::new(std::sync::Mutex::new(Vec::new()));
    let told = turns.clone();
    let observer = move |event: &ObservedEvent| told.lock().unwrap().push((event.slba, event.turn));
    host.controller.observe_events(Some(Arc::new(observer)));
    host.fill(DATA, &[9; PAGE]);
    let write = host.transfer(NvmOpcode::WRITE, 1, 1, DATA, PAGE);
    let cid = host.queue.submit(write);
    host.queue.ring();
    assert_eq!(host.queue.pump().posted, 0);
    clock.advance(delay);
    assert_eq!(host.queue.pump().posted, 1);
    let completion = host.queue.take().unwrap();
    assert_eq!(completion.dw3.cid(), cid);
    assert_eq!(completion.dw3.status().code(), StatusCode::WRITE_FAULT);
    host.controller.observe_events(None);
    assert_eq!(host.read(1, PAGE, PAGE), Ok(vec![9; PAGE]));
    let turns = turns.lock().unwrap();
    assert_eq!(turns[0], (1, Turn::Struck(action)));
    assert!(matches!(turns[1], (1, Turn::Completed(told)) if told.code() == status.code()), "{turns:?}");
    assert_eq!(turns.len(), 2);
}

#[test]
fn latency_goes_by_the_class_of_the_command() {
    let us = Duration::from_micros;
    let (mut host, clock) = manual(Latency { read: us(1), write: us(2), flush: us(3) });
    let write = host.transfer(NvmOpcode::WRITE, 1, 1, DATA, PAGE);
    let read = read_of(&host, 0);
    let cids = [host.queue.submit(flush()), host.queue.submit(write), host.queue.submit(read)];
    host.queue.ring();
    assert_eq!(host.queue.pump().in_flight, 3);
    for cid in cids.iter().rev() {
        clock.advance(us(1));
        assert_eq!(host.queue.pump().posted, 1);
        assert_eq!(host.queue.take().unwrap().dw3.cid(), *cid);
    }
    assert_eq!(host.queue.pump().next_due_ns, None);
}

#[test]
fn transfers_share_one_path_and_a_read_waits_behind_writes() {
    let clock = ManualClock::new();
    let config = EmulatedConfig {
        clock: Clock::Manual(Arc::clone(&clock)),
        bandwidth: Bandwidth { read_bps: 4_096_000, write_bps: 2_048_000 },
        latency: Latency { read: Duration::from_micros(100), ..Latency::default() },
        ..EmulatedConfig::ram(1 << 20, 4096)
    };
    let mut host = Host::boot(config);
    let writes = [0, 1].map(|slba| host.transfer(NvmOpcode::WRITE, slba, 1, DATA, PAGE));
    let read = read_of(&host, 2);
    let cids = [writes[0], writes[1], flush(), read].map(|command| host.queue.submit(command));
    host.queue.ring();
    let pumped = host.queue.pump();
    assert_eq!((pumped.posted, pumped.in_flight, pumped.next_due_ns), (1, 3, Some(2_000_000)));
    assert_eq!(host.queue.take().unwrap().dw3.cid(), cids[2], "a flush moves no data");
    for (wait_us, cid) in [(2000, cids[0]), (2000, cids[1]), (1100, cids[3])] {
        clock.advance(Duration::from_micros(wait_us - 1));
        assert_eq!(host.queue.pump().posted, 0);
        clock.advance(Duration::from_micros(1));
        assert_eq!(host.queue.pump().posted, 1);
        assert_eq!(host.queue.take().unwrap().dw3.cid(), cid);
    }
}

#[test]
fn a_dropped_command_never_completes_until_it_is_aborted() {
    let mut host = Host::uri("emu:ram?size=1MiB");
    host.controller.inject(Fault { matching: Match::default().after(0, 1), action: Action::Drop });
    let write = host.transfer(NvmOpcode::WRITE, 1, 1, DATA, PAGE);
    host.fill(DATA, &[9; PAGE]);
    let cid = host.queue.submit(write);
    host.queue.ring();
    for _ in 0..100 {
        let pumped = host.queue.pump();
        assert_eq!((pumped.posted, pumped.in_flight, pumped.next_due_ns), (0, 1, None));
    }
    let abort = |cid| Command {
        cdw10: AbortCdw10::new().with_sqid(1).with_cid(cid).into(),
        ..admin_command(AdminOpcode::ABORT)
    };
    assert_eq!(host.admin(abort(cid + 1)), Ok(1), "there's no such command");
    assert_eq!(host.admin(abort(cid)), Ok(0));
    let completion = host.queue.wait();
    assert_eq!(completion.dw3.cid(), cid);
    assert_eq!(completion.dw3.status().code(), StatusCode::COMMAND_ABORT_REQUESTED);
    assert_eq!(host.read(1, PAGE, PAGE), Ok(vec![0; PAGE]));
}

#[test]
fn an_aborted_delay_completes_once() {
    let (mut host, clock) = manual(Latency::uniform(Duration::from_micros(5)));
    let read = read_of(&host, 0);
    let cid = host.queue.submit(read);
    host.queue.ring();
    host.queue.pump();
    let abort = AbortCdw10::new().with_sqid(1).with_cid(cid).into();
    assert_eq!(host.admin(Command { cdw10: abort, ..admin_command(AdminOpcode::ABORT) }), Ok(0));
    assert_eq!(host.queue.take().unwrap().dw3.cid(), cid);
    let pumped = host.queue.pump();
    assert_eq!((pumped.in_flight, pumped.next_due_ns), (0, None));
    clock.advance(Duration::from_secs(1));
    host.queue.pump();
    assert!(host.queue.take().is_none());
}

#[test]
fn faults_reach_admin_commands_and_can_be_cleared() {
    let mut host = Host::uri("emu:ram?size=1MiB");
    let status = Status::of(StatusCode::INTERNAL_ERROR);
    let matching = Match::admin(AdminOpcode::GET_FEATURES);
    host.controller.inject(Fault { matching, action: Action::Status(status) });
    let get = Command { cdw10: 7, ..admin_command(AdminOpcode::GET_FEATURES) };
    assert_eq!(host.admin(get), Err(StatusCode::INTERNAL_ERROR));
    assert!(host.read(0, PAGE, PAGE).is_ok());
    host.controller.clear_faults();
    assert!(host.admin(get).is_ok());
}
