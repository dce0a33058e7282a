//! The driver on the emulated controller: the conformance suite over every configuration that matters, and beside it
//! what needs more than a conforming device: its image, its counters, and a device that refuses, delays, drops or
//! goes away.

use std::sync::Arc;
use std::time::Duration;

use foliant_nvme::{
    CommandError, Controller, ControllerOptions, Deallocation, DriverError, Fua, Hugepages, Io, Lba,
    QueuePair, SubmitError,
};
use foliant_nvme_emulated::{
    Action, Backing, Clock, Direct, EmulatedConfig, EmulatedController, Fault, FileEngine, ManualClock,
    Match, NamespaceConfig,
};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use foliant_tests::conformance::{Bench, Host, Load, run_suite};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const SIZE: u64 = 32 << 20;

fn host_options() -> ControllerOptions {
    ControllerOptions { io_queue_entries: 32, hugepages: Hugepages::Never, ..ControllerOptions::default() }
}

/// Runs the suite on a device of `config`: nothing fails, nothing deviates, and exactly `not_applicable` doesn't apply.
#[track_caller]
fn conforms(config: EmulatedConfig, not_applicable: &[&str]) {
    let device = EmulatedController::new(config).unwrap();
    let open = move || device.attach().expect("the last case has let go of the device");
    let report = run_suite(&mut Bench::new(open, host_options(), SIZE).unwrap());
    assert_eq!(report.failed(), [""; 0]);
    assert_eq!(report.deviations(), []);
    assert_eq!(report.not_applicable(), not_applicable);
}

const ONE_NAMESPACE: &str = "namespaces_keep_their_blocks_apart";
const NO_LONG_TRANSFER: &str = "a_transfer_of_2_mib_goes_through_chained_prp_lists";
const NO_LIMIT: [&str; 2] =
    ["a_request_is_split_at_mdts_and_one_of_that_size_is_one_command", "the_device_refuses_more_than_mdts"];

fn file(block: u32, engine: FileEngine) -> (tempfile::TempDir, EmulatedConfig) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let backing = Backing::File { path: path.clone(), direct: Direct::Auto, engine };
    let config = EmulatedConfig { backing, ..EmulatedConfig::file(path, NamespaceConfig::new(SIZE, block)) };
    (dir, config)
}

#[test]
fn the_suite_holds_on_memory_in_blocks_of_512() {
    conforms(EmulatedConfig::ram(SIZE, 512), &[ONE_NAMESPACE, NO_LONG_TRANSFER]);
}

#[test]
fn the_suite_holds_on_memory_in_blocks_of_4096_without_a_transfer_limit() {
    let config = EmulatedConfig { mdts: 0, ..EmulatedConfig::ram(SIZE, 4096) };
    conforms(config, &[ONE_NAMESPACE, NO_LIMIT[0], NO_LIMIT[1]]);
}

#[test]
fn the_suite_holds_on_a_file_through_io_uring() {
    let (_dir, config) = file(4096, FileEngine::IoUring);
    conforms(config, &[ONE_NAMESPACE, NO_LONG_TRANSFER]);
}

#[test]
fn the_suite_holds_on_a_file_through_plain_calls() {
    let (_dir, config) = file(512, FileEngine::Plain);
    conforms(config, &[ONE_NAMESPACE, NO_LONG_TRANSFER]);
}

#[test]
fn the_suite_holds_on_the_power_loss_model() {
    let config = EmulatedConfig { power_loss_model: true, ..EmulatedConfig::ram(SIZE, 512) };
    conforms(config, &[ONE_NAMESPACE, NO_LONG_TRANSFER]);
}

#[test]
fn the_suite_holds_with_transfers_of_8_kib_and_an_optimal_boundary() {
    let config = EmulatedConfig { mdts: 1, noiob_blocks: 24, ..EmulatedConfig::ram(SIZE, 512) };
    conforms(config, &[ONE_NAMESPACE, NO_LONG_TRANSFER]);
}

#[test]
fn the_suite_holds_on_a_device_with_one_queue_pair_and_no_write_cache() {
    let one = EmulatedConfig { queue_pairs_max: 1, queue_entries_max: 64, ..EmulatedConfig::ram(SIZE, 4096) };
    let config = EmulatedConfig { volatile_write_cache: false, ..one };
    let not_applicable = [
        ONE_NAMESPACE,
        NO_LONG_TRANSFER,
        "nothing_reaches_the_device_before_the_doorbell",
        "queue_pairs_work_side_by_side_in_threads_of_their_own",
    ];
    conforms(config, &not_applicable);
}

#[test]
fn the_suite_holds_on_three_namespaces_of_both_block_sizes_in_one_file() {
    let (_dir, config) = file(512, FileEngine::Auto);
    let sizes = [(16 << 20, 512), (8 << 20, 4096), (4 << 20, 512)];
    let namespaces = sizes.map(|(size, block)| NamespaceConfig::new(size, block)).to_vec();
    conforms(EmulatedConfig { namespaces, mdts: 10, ..config }, &NO_LIMIT);
}

/// A device, and the driver on it.
fn boot(config: EmulatedConfig, options: &ControllerOptions) -> (Arc<EmulatedController>, Host) {
    let device = EmulatedController::new(config).unwrap();
    let host = Host::open(device.attach().unwrap(), options).unwrap();
    (device, host)
}

fn image(device: &EmulatedController, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    device.read_image(1, offset, &mut bytes).unwrap();
    bytes
}

fn submit(host: &mut Host, io: Io, data: &[u8]) -> Result<(), SubmitError> {
    let load = if data.is_empty() { Load::nothing() } else { Load::of(host.controller.arena(), data) };
    host.submit(io, load).map_err(|rejected| rejected.reason)
}

/// Every backing that keeps data, with blocks of both sizes.
fn each_device(mut check: impl FnMut(EmulatedConfig)) {
    for block in [512, 4096] {
        check(EmulatedConfig::ram(SIZE, block));
        check(EmulatedConfig { power_loss_model: true, ..EmulatedConfig::ram(SIZE, block) });
        for engine in [FileEngine::IoUring, FileEngine::Plain] {
            let (_dir, config) = file(block, engine);
            check(config);
        }
    }
}

#[test]
fn what_is_written_is_on_the_medium() {
    each_device(|config| {
        println!("{:?}, blocks of {}", config.backing, config.namespaces[0].block_bytes);
        let (device, mut host) = boot(config, &host_options());
        let block = host.block_bytes() as u64;
        let mut random = SmallRng::seed_from_u64(1);
        let mut model = vec![0u8; 4 << 20];
        for _ in 0..60 {
            let blocks = random.random_range(1..=(300_000 / block));
            let lba = random.random_range(0..model.len() as u64 / block - blocks);
            let place = (lba * block) as usize..((lba + blocks) * block) as usize;
            let data: Vec<u8> = (0..place.len()).map(|_| random.random()).collect();
            model[place].copy_from_slice(&data);
            host.write(lba, &data, if random.random() { Fua::Yes } else { Fua::No });
        }
        assert!(image(&device, 0, model.len()) == model);
    });
}

#[test]
fn zeroed_and_deallocated_blocks_are_zero_on_the_medium_and_no_others() {
    each_device(|config| {
        let (device, mut host) = boot(config, &host_options());
        let block = host.block_bytes();
        host.write(0, &vec![7; 64 * block], Fua::No);
        let zeroes =
            |lba, blocks, deallocation| Io::WriteZeroes { lba: Lba(lba), blocks, fua: Fua::No, deallocation };
        for io in [
            zeroes(3, 5, Deallocation::Keep),
            zeroes(20, 9, Deallocation::Allow),
            Io::Deallocate { lba: Lba(40), blocks: 8 },
            Io::Flush,
        ] {
            host.run(io, Load::nothing()).map(drop).unwrap();
        }
        for (index, bytes) in image(&device, 0, 64 * block).chunks_exact(block).enumerate() {
            let zeroed = (3..8).contains(&index) || (20..29).contains(&index) || (40..48).contains(&index);
            assert!(bytes.iter().all(|&byte| byte == if zeroed { 0 } else { 7 }), "block {index}");
        }
    });
}

#[test]
fn the_device_sees_as_many_commands_as_the_limits_ask_for() {
    for (mdts, noiob_blocks, lba, blocks, commands) in
        [(3, 0, 0, 256, 4), (3, 0, 5, 65, 2), (0, 64, 0, 256, 4), (0, 64, 60, 8, 2), (2, 48, 40, 100, 5)]
    {
        let config = EmulatedConfig { mdts, noiob_blocks, ..EmulatedConfig::ram(SIZE, 512) };
        let (device, mut host) = boot(config, &host_options());
        let data: Vec<u8> = (0..blocks * 512).map(|at| (at / 100) as u8).collect();
        host.write(lba, &data, Fua::No);
        let limits = format!("mdts {mdts}, boundary {noiob_blocks}, {lba}+{blocks}");
        assert_eq!(device.stats().writes, commands, "{limits}");
        assert_eq!(host.queue.in_flight(), 0);
        assert!(host.read(lba, blocks as u32) == data);
    }
}

#[test]
fn a_transfer_without_a_limit_goes_through_many_chained_prp_lists() {
    let options = ControllerOptions { max_transfer_bytes: 8 << 20, arena_bytes: 32 << 20, ..host_options() };
    let (device, mut host) = boot(EmulatedConfig { mdts: 0, ..EmulatedConfig::ram(SIZE, 4096) }, &options);
    let data: Vec<u8> = (0..8 << 20).map(|at: u32| (at / 4096 * 7 + at) as u8).collect();
    host.write(0, &data, Fua::No);
    assert_eq!(device.stats().writes, 1, "one command of 8 MiB: 2048 entries over five list pages");
    assert!(image(&device, 0, data.len()) == data);
}

#[test]
fn fua_and_flush_reach_the_device_as_such() {
    let (device, mut host) = boot(EmulatedConfig::ram(SIZE, 512), &host_options());
    host.write(0, &[1; 512], Fua::No);
    host.write(0, &[1; 512], Fua::Yes);
    host.flush();
    let stats = device.stats();
    assert_eq!((stats.writes, stats.fua_commands, stats.flushes), (2, 1, 1));
}

#[test]
fn a_batch_is_one_batch_to_the_device_and_each_command_gets_its_own_result() {
    let (device, mut host) = boot(EmulatedConfig::ram(SIZE, 512), &host_options());
    let failing = Status::of(StatusCode::UNRECOVERED_READ_ERROR);
    let matching = Match::io(NvmOpcode::READ).touching(16, 23);
    device.inject(Fault { matching, action: Action::Status(failing) });
    for i in 0..8u64 {
        submit(&mut host, Io::Read { lba: Lba(i * 8), blocks: 8 }, &[i as u8; 4096]).unwrap();
    }
    let batches = device.stats().sq_batches;
    host.queue.ring();
    host.queue.pump();
    assert_eq!(device.stats().sq_batches - batches, 1);
    let mut failed = 0;
    host.queue
        .poll(64, |completion| {
            if let Err(error) = completion.result {
                assert_eq!(error.status().unwrap().code(), StatusCode::UNRECOVERED_READ_ERROR);
                assert!(completion.payload.bytes().iter().all(|&byte| byte == 2), "the buffer of block 16");
                failed += 1;
            }
        })
        .unwrap();
    assert_eq!(failed, 1);
}

#[test]
fn of_a_split_request_the_first_failure_is_told() {
    let config = EmulatedConfig { mdts: 1, ..EmulatedConfig::ram(SIZE, 512) };
    let (device, mut host) = boot(config, &host_options());
    for (block, code) in [(40, StatusCode::WRITE_FAULT), (100, StatusCode::INTERNAL_ERROR)] {
        let matching = Match::io(NvmOpcode::WRITE).touching(block, block);
        device.inject(Fault { matching, action: Action::Status(Status::of(code)) });
    }
    submit(&mut host, Io::Write { lba: Lba(0), blocks: 128, fua: Fua::No }, &[5; 65_536]).unwrap();
    let error = host.await_next().result.expect_err("two of its commands failed");
    assert_eq!(error.status().unwrap().code(), StatusCode::WRITE_FAULT);
    assert_eq!(host.queue.in_flight(), 0);
}

#[test]
fn a_queue_full_of_slow_commands_says_so_and_goes_on_after_a_poll() {
    let clock = ManualClock::new();
    let config = EmulatedConfig { clock: Clock::Manual(clock.clone()), ..EmulatedConfig::ram(SIZE, 512) };
    let (device, mut host) = boot(config, &ControllerOptions { io_queue_entries: 8, ..host_options() });
    let action = Action::Delay(Duration::from_secs(1));
    device.inject(Fault { matching: Match::io(NvmOpcode::FLUSH), action });
    for _ in 0..7 {
        submit(&mut host, Io::Flush, &[]).unwrap();
    }
    assert_eq!(submit(&mut host, Io::Flush, &[]), Err(SubmitError::Full));
    host.queue.ring();
    host.queue.pump();
    assert_eq!(host.queue.poll(64, |_| ()).unwrap(), 0, "all are delayed");
    clock.advance(Duration::from_secs(1));
    host.queue.pump();
    assert_eq!(host.queue.poll(64, |_| ()).unwrap(), 7);
    submit(&mut host, Io::Flush, &[]).unwrap();
}

#[test]
fn what_the_driver_refuses_never_reaches_the_device() {
    let (device, mut host) = boot(EmulatedConfig::ram(SIZE, 512), &host_options());
    let past = submit(&mut host, Io::Read { lba: Lba(SIZE / 512 - 1), blocks: 2 }, &[0; 1024]);
    assert!(matches!(past, Err(SubmitError::OutOfRange { .. })), "{past:?}");
    host.queue.ring();
    host.queue.pump();
    assert_eq!(device.stats().io_commands(), 0);
}

#[test]
fn a_dropped_command_holds_its_buffer_until_the_queue_is_closed() {
    let (device, mut host) = boot(EmulatedConfig::ram(SIZE, 512), &host_options());
    device.inject(Fault { matching: Match::io(NvmOpcode::READ).after(0, 1), action: Action::Drop });
    submit(&mut host, Io::Read { lba: Lba(0), blocks: 8 }, &[0; 4096]).unwrap();
    submit(&mut host, Io::Read { lba: Lba(8), blocks: 8 }, &[1; 4096]).unwrap();
    host.await_next().result.unwrap();
    assert_eq!(host.queue.in_flight(), 1);
    host.queue.check().unwrap();
    let mut results = Vec::new();
    host.queue.close(|completion| results.push(completion.result)).unwrap();
    assert_eq!(results, [Err(CommandError::Aborted)]);
}

#[test]
fn after_a_power_cut_the_device_is_gone_and_no_wait_lasts() {
    let config = EmulatedConfig { power_loss_model: true, ..EmulatedConfig::ram(SIZE, 512) };
    let (device, mut host) = boot(config, &host_options());
    submit(&mut host, Io::Read { lba: Lba(0), blocks: 8 }, &[0; 4096]).unwrap();
    device.power_cut(1).unwrap();
    host.queue.ring();
    host.queue.pump();
    assert_eq!(host.queue.poll(64, |_| ()).unwrap(), 0);
    assert!(matches!(host.queue.check(), Err(DriverError::Gone)));
    assert!(matches!(host.controller.check(), Err(DriverError::Gone)));
    drop(host.queue);
    let again = Controller::open(device.attach().unwrap(), &host_options()).unwrap();
    again.shutdown().unwrap();
}

#[test]
fn the_controller_grants_no_more_queue_pairs_than_it_has_and_says_so() {
    let config = EmulatedConfig { queue_pairs_max: 2, ..EmulatedConfig::ram(SIZE, 512) };
    let device = EmulatedController::new(config).unwrap();
    let options = ControllerOptions { io_queue_pairs: 5, ..host_options() };
    let controller = Controller::open(device.attach().unwrap(), &options).unwrap();
    assert_eq!(controller.identity().queue_pairs, 2);
    let first: QueuePair<()> = controller.queue_pair().unwrap();
    let _second: QueuePair<()> = controller.queue_pair().unwrap();
    assert!(matches!(controller.queue_pair::<()>(), Err(DriverError::QueuePairsTaken { granted: 2 })));
    drop(first);
    controller.queue_pair::<()>().unwrap();
}

#[test]
fn several_namespaces_are_apart_on_the_medium() {
    let namespaces = vec![NamespaceConfig::new(1 << 20, 512), NamespaceConfig::new(2 << 20, 4096)];
    let config = EmulatedConfig { namespaces, ..EmulatedConfig::ram(SIZE, 512) };
    let (device, mut host) = boot(config, &host_options());
    host.write(0, &[1; 4096], Fua::No);
    host.namespace = host.controller.namespace(2).unwrap().clone();
    host.write(0, &[2; 4096], Fua::No);
    let mut bytes = [0; 4096];
    for nsid in 1..=2 {
        device.read_image(nsid, 0, &mut bytes).unwrap();
        assert_eq!(bytes, [nsid as u8; 4096]);
    }
}
