//! Power cuts through the whole controller: queues, Flush, FUA, in-flight commands, the next attachment.

use std::sync::Arc;
use std::time::Duration;

use foliant_nvme_spec::command::ReadWriteCdw12;
use foliant_nvme_spec::registers::{ALL_ONES_U32, ALL_ONES_U64, Cc, Register, Shn};
use foliant_nvme_spec::{NvmOpcode, StatusCode};
use foliant_nvme_transport::{Pumped, TransportError};

use super::host::{DATA, Host, PAGE, flush};
use crate::{Clock, EmulatedConfig, EmulatedController, EmulatedError, Latency, ManualClock, PowerCut};

const SEEDS: std::ops::Range<u64> = 0..200;

fn model() -> Arc<EmulatedController> {
    let config = EmulatedConfig { power_loss_model: true, ..EmulatedConfig::ram(1 << 20, 4096) };
    EmulatedController::new(config).unwrap()
}

fn image(controller: &EmulatedController, slba: u64) -> u8 {
    let mut page = vec![0; PAGE];
    controller.read_image(1, slba * PAGE as u64, &mut page).unwrap();
    assert!(page.iter().all(|byte| *byte == page[0]), "block {slba} is torn");
    page[0]
}

/// Runs `before` on a fresh device for many seeds, cuts the power, and returns what blocks 0 to 3 hold each time.
fn cut_after(before: impl Fn(&mut Host)) -> Vec<([u8; 4], PowerCut)> {
    let outcome = |seed| {
        let controller = model();
        let mut host = Host::attach(Arc::clone(&controller));
        before(&mut host);
        let cut = controller.power_cut(seed).unwrap();
        ([0, 1, 2, 3].map(|slba| image(&controller, slba)), cut)
    };
    SEEDS.map(outcome).collect()
}

fn put(host: &mut Host, slba: u64, byte: u8) {
    assert_eq!(host.write(slba, &[byte; PAGE], PAGE), StatusCode::SUCCESS);
}

#[test]
fn what_was_flushed_survives_and_what_was_not_may_not() {
    let outcomes = cut_after(|host| {
        put(host, 0, 1);
        assert_eq!(host.code(flush()), StatusCode::SUCCESS);
        put(host, 1, 2);
    });
    assert!(outcomes.iter().all(|(blocks, _)| blocks[0] == 1));
    let survived = outcomes.iter().filter(|(blocks, _)| blocks[1] == 2).count();
    assert!((50..150).contains(&survived), "{survived} of 200");
    for (blocks, cut) in outcomes {
        assert_eq!((cut.units_undecided, cut.units_rolled_back), (1, u64::from(blocks[1] == 0)));
    }
}

#[test]
fn forced_unit_access_survives_without_a_flush() {
    let outcomes = cut_after(|host| {
        put(host, 0, 1);
        host.fill(DATA, &[2; PAGE]);
        let mut write = host.transfer(NvmOpcode::WRITE, 0, 1, DATA, PAGE);
        write.cdw12 = ReadWriteCdw12::new().with_fua(true).into();
        assert_eq!(host.code(write), StatusCode::SUCCESS);
    });
    assert!(outcomes.iter().all(|(blocks, cut)| blocks[0] == 2 && cut.units_undecided == 0));
}

#[test]
fn blocks_survive_independently_newer_ones_without_older_ones() {
    let outcomes = cut_after(|host| {
        put(host, 0, 1);
        put(host, 1, 2);
    });
    for wanted in [[0, 0], [0, 2], [1, 0], [1, 2]] {
        assert!(outcomes.iter().any(|(blocks, _)| blocks[..2] == wanted), "{wanted:?} never happened");
    }
}

#[test]
fn a_device_that_was_shut_down_loses_nothing() {
    let outcomes = cut_after(|host| {
        put(host, 0, 1);
        let cc = Cc::new().with_en(true).with_iosqes(6).with_iocqes(4).with_shn(Shn::Normal);
        host.write_u32(Register::Cc, cc.into());
    });
    assert!(outcomes.iter().all(|(blocks, cut)| blocks[0] == 1 && cut.units_undecided == 0));
}

#[test]
fn switching_the_write_cache_off_makes_its_contents_durable() {
    let outcomes = cut_after(|host| {
        put(host, 0, 1);
        let mut command = super::host::admin_command(foliant_nvme_spec::AdminOpcode::SET_FEATURES);
        command.cdw10 = 6;
        assert_eq!(host.admin(command), Ok(0));
        put(host, 1, 2);
    });
    assert!(outcomes.iter().all(|(blocks, _)| blocks[..2] == [1, 2]));
}

#[test]
fn in_flight_commands_may_survive_and_a_flush_in_flight_promises_nothing() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in SEEDS {
        let clock = ManualClock::new();
        let config = EmulatedConfig {
            power_loss_model: true,
            clock: Clock::Manual(Arc::clone(&clock)),
            latency: Latency::uniform(Duration::from_micros(10)),
            ..EmulatedConfig::ram(1 << 20, 4096)
        };
        let controller = EmulatedController::new(config).unwrap();
        let mut host = Host::attach(Arc::clone(&controller));
        host.fill(DATA, &[1; PAGE]);
        let write = host.transfer(NvmOpcode::WRITE, 0, 1, DATA, PAGE);
        host.queue.submit(write);
        host.queue.ring();
        host.queue.pump();
        clock.advance(Duration::from_micros(10));
        assert_eq!(host.queue.pump().posted, 1);
        // The first write has completed; neither the Flush nor the second write will.
        host.fill(DATA, &[2; PAGE]);
        host.queue.submit(flush());
        host.queue.submit(write);
        host.queue.ring();
        assert_eq!(host.queue.pump().in_flight, 2);
        let cut = controller.power_cut(seed).unwrap();
        assert_eq!(cut.commands_in_flight, 1);
        seen.insert(image(&controller, 0));
    }
    assert!(seen.into_iter().eq([0, 1, 2]));
}

#[test]
fn a_cut_device_is_gone_until_it_is_attached_again() {
    let controller = model();
    let mut host = Host::attach(Arc::clone(&controller));
    put(&mut host, 0, 1);
    let read = host.transfer(NvmOpcode::READ, 0, 1, DATA, PAGE);
    controller.power_cut(7).unwrap();
    assert_eq!(host.transport.read_u32(Register::Csts.offset()).unwrap(), ALL_ONES_U32);
    assert_eq!(host.transport.read_u64(Register::Cap.offset()).unwrap(), ALL_ONES_U64);
    host.queue.submit(read);
    host.queue.ring();
    assert_eq!(host.queue.pump(), Pumped::default());
    let base = std::ptr::NonNull::dangling();
    let memory = foliant_nvme_transport::DmaMemory { base, len_bytes: PAGE };
    #[expect(unsafe_code, reason = "calls the refused mapping of a gone device")]
    // SAFETY: nothing is mapped, because the device is gone.
    let mapped = unsafe { host.transport.map_dma(memory) };
    assert!(matches!(mapped, Err(TransportError::Gone)));
    // The gone transport may live on beside the new one.
    let mut again = Host::attach(Arc::clone(&controller));
    assert!(again.read(0, PAGE, PAGE).is_ok());
}

#[test]
fn the_same_seed_leaves_the_same_medium() {
    let run = || {
        cut_after(|host| {
            for round in 0..12u8 {
                put(host, u64::from(round % 4), round + 1);
            }
        })
    };
    assert!(run() == run());
}

#[test]
fn only_the_model_can_lose_power() {
    let controller = EmulatedController::new(EmulatedConfig::ram(1 << 20, 512)).unwrap();
    assert!(matches!(controller.power_cut(1), Err(EmulatedError::NoPowerLossModel { .. })));
}
