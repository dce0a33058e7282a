//! The driver against a whole controller: what each command does to the medium, limits and how requests are split at
//! them, and a device that refuses, delays, drops or goes away.

use std::sync::Arc;
use std::time::Duration;

use foliant_nvme::{
    CommandError, Controller, ControllerOptions, Deallocation, DmaBuffer, DriverError, Fua, Hugepages, Io,
    Lba, Namespace, Payload, QueuePair, Segment, SubmitError,
};
use foliant_nvme_emulated::{
    Action, Backing, Clock, Direct, EmulatedConfig, EmulatedController, Fault, FileEngine, ManualClock,
    Match, NamespaceConfig,
};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const SIZE: u64 = 32 << 20;

/// Data, or none.
enum Load {
    Data(DmaBuffer),
    Nothing,
}

// SAFETY: the segment is the whole buffer, which is owned here until the completion hands it back.
#[expect(unsafe_code, reason = "a payload vouches for its memory")]
unsafe impl Payload for Load {
    fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        let Self::Data(buffer) = self else { return None.into_iter() };
        let (iova, len_bytes) = (buffer.iova(), buffer.len_bytes() as u32);
        Some(Segment { iova, len_bytes }).into_iter()
    }
}

impl Load {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Data(buffer) => buffer.as_slice(),
            Self::Nothing => &[],
        }
    }
}

struct Host {
    device: Arc<EmulatedController>,
    controller: Controller,
    namespace: Namespace,
    queue: QueuePair<Load>,
}

fn host_options() -> ControllerOptions {
    ControllerOptions { io_queue_entries: 32, hugepages: Hugepages::Never, ..ControllerOptions::default() }
}

impl Host {
    fn new(config: EmulatedConfig, options: &ControllerOptions) -> Self {
        let device = EmulatedController::new(config).unwrap();
        let controller = Controller::open(device.attach().unwrap(), options).unwrap();
        let namespace = controller.namespaces()[0].clone();
        let queue = controller.queue_pair().unwrap();
        Self { device, controller, namespace, queue }
    }

    fn submit(&mut self, io: Io, data: Option<&[u8]>) -> Result<(), SubmitError> {
        let load = match data {
            None => Load::Nothing,
            Some(data) => {
                let mut buffer = self.controller.arena().allocate(data.len()).unwrap();
                buffer.as_mut_slice().copy_from_slice(data);
                Load::Data(buffer)
            }
        };
        self.queue.submit(&self.namespace, io, load).map_err(|rejected| rejected.reason)
    }

    /// The next completion; pumps until it is there.
    fn next(&mut self) -> (Load, Result<(), CommandError>) {
        self.queue.ring();
        for _ in 0..10_000_000 {
            self.queue.pump();
            let mut got = None;
            self.queue.poll(1, |completion| got = Some((completion.payload, completion.result))).unwrap();
            if let Some(got) = got {
                return got;
            }
        }
        panic!("no completion");
    }

    fn go(&mut self, io: Io, data: Option<&[u8]>) -> Result<Load, CommandError> {
        self.submit(io, data).unwrap();
        let (load, result) = self.next();
        result.map(|()| load)
    }

    fn write(&mut self, lba: u64, data: &[u8], fua: Fua) {
        let blocks = (data.len() / self.namespace.block_bytes() as usize) as u32;
        self.go(Io::Write { lba: Lba(lba), blocks, fua }, Some(data)).unwrap();
    }

    fn read(&mut self, lba: u64, blocks: u32) -> Vec<u8> {
        let blank = vec![0xEE; blocks as usize * self.namespace.block_bytes() as usize];
        self.go(Io::Read { lba: Lba(lba), blocks }, Some(&blank)).unwrap().bytes().to_vec()
    }

    fn image(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.device.read_image(1, offset, &mut bytes).unwrap();
        bytes
    }
}

/// Every backing that keeps data, with blocks of both sizes.
fn each_device(mut check: impl FnMut(EmulatedConfig)) {
    for block in [512, 4096] {
        check(EmulatedConfig::ram(SIZE, block));
        check(EmulatedConfig { power_loss_model: true, ..EmulatedConfig::ram(SIZE, block) });
        for engine in [FileEngine::IoUring, FileEngine::Plain] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("image");
            check(EmulatedConfig {
                backing: Backing::File { path: path.clone(), direct: Direct::Auto, engine },
                ..EmulatedConfig::file(path, NamespaceConfig::new(SIZE, block))
            });
        }
    }
}

#[test]
fn what_is_written_is_on_the_medium_and_is_read_back_whatever_its_place_and_length() {
    each_device(|config| {
        println!("{:?}, blocks of {}", config.backing, config.namespaces[0].block_bytes);
        let mut host = Host::new(config, &host_options());
        let block = u64::from(host.namespace.block_bytes());
        let mut random = SmallRng::seed_from_u64(1);
        let mut model = vec![0u8; 4 << 20];
        for _ in 0..60 {
            let blocks = random.random_range(1..=(300_000 / block));
            let lba = random.random_range(0..model.len() as u64 / block - blocks);
            let place = (lba * block) as usize..((lba + blocks) * block) as usize;
            let data: Vec<u8> = (0..place.len()).map(|_| random.random()).collect();
            model[place.clone()].copy_from_slice(&data);
            host.write(lba, &data, if random.random() { Fua::Yes } else { Fua::No });
            assert!(host.read(lba, blocks as u32) == data);
        }
        assert!(host.image(0, model.len()) == model);
    });
}

#[test]
fn write_zeroes_and_deallocate_leave_zeros_and_touch_nothing_else() {
    each_device(|config| {
        let mut host = Host::new(config, &host_options());
        let block = host.namespace.block_bytes() as usize;
        host.write(0, &vec![7; 64 * block], Fua::No);
        let zeroes =
            |lba, blocks, deallocation| Io::WriteZeroes { lba: Lba(lba), blocks, fua: Fua::No, deallocation };
        host.go(zeroes(3, 5, Deallocation::Keep), None).unwrap();
        host.go(zeroes(20, 9, Deallocation::Allow), None).unwrap();
        host.go(Io::Deallocate { lba: Lba(40), blocks: 8 }, None).unwrap();
        host.go(Io::Flush, None).unwrap();
        let image = host.image(0, 64 * block);
        for (index, bytes) in image.chunks_exact(block).enumerate() {
            let zeroed = (3..8).contains(&index) || (20..29).contains(&index) || (40..48).contains(&index);
            assert!(bytes.iter().all(|&byte| byte == if zeroed { 0 } else { 7 }), "block {index}");
        }
    });
}

#[test]
fn a_request_is_split_at_mdts_and_at_the_optimal_boundary_and_comes_back_once() {
    for (mdts, noiob_blocks, lba, blocks, commands) in
        [(3, 0, 0, 256, 4), (3, 0, 5, 65, 2), (0, 64, 0, 256, 4), (0, 64, 60, 8, 2), (2, 48, 40, 100, 5)]
    {
        let mut host = Host::new(
            EmulatedConfig { mdts, noiob_blocks, ..EmulatedConfig::ram(SIZE, 512) },
            &host_options(),
        );
        let data: Vec<u8> = (0..blocks * 512).map(|at| (at / 100) as u8).collect();
        host.write(lba, &data, Fua::No);
        assert_eq!(
            host.device.stats().writes,
            commands,
            "mdts {mdts}, boundary {noiob_blocks}, {lba}+{blocks}"
        );
        assert_eq!(host.queue.in_flight(), 0);
        assert!(host.read(lba, blocks as u32) == data);
    }
}

#[test]
fn a_transfer_without_a_limit_goes_through_chained_prp_lists() {
    let options = ControllerOptions { max_transfer_bytes: 8 << 20, arena_bytes: 32 << 20, ..host_options() };
    let mut host = Host::new(EmulatedConfig { mdts: 0, ..EmulatedConfig::ram(SIZE, 4096) }, &options);
    let data: Vec<u8> = (0..8 << 20).map(|at: u32| (at / 4096 * 7 + at) as u8).collect();
    host.write(0, &data, Fua::No);
    assert_eq!(host.device.stats().writes, 1, "one command of 8 MiB: 2048 entries over five list pages");
    assert!(host.image(0, data.len()) == data);
}

#[test]
fn fua_and_flush_reach_the_device_as_such() {
    let mut host = Host::new(EmulatedConfig::ram(SIZE, 512), &host_options());
    host.write(0, &[1; 512], Fua::No);
    host.write(0, &[1; 512], Fua::Yes);
    host.go(Io::Flush, None).unwrap();
    let stats = host.device.stats();
    assert_eq!((stats.writes, stats.fua_commands, stats.flushes), (2, 1, 1));
}

#[test]
fn a_batch_rings_once_and_each_command_gets_its_own_result() {
    let mut host = Host::new(EmulatedConfig::ram(SIZE, 512), &host_options());
    let failing = Status::of(StatusCode::UNRECOVERED_READ_ERROR);
    host.device.inject(Fault {
        matching: Match::io(NvmOpcode::READ).touching(16, 23),
        action: Action::Status(failing),
    });
    for i in 0..8u64 {
        host.submit(Io::Read { lba: Lba(i * 8), blocks: 8 }, Some(&vec![i as u8; 4096])).unwrap();
    }
    let batches = host.device.stats().sq_batches;
    host.queue.ring();
    host.queue.pump();
    assert_eq!(host.device.stats().sq_batches - batches, 1);
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
    let mut host = Host::new(EmulatedConfig { mdts: 1, ..EmulatedConfig::ram(SIZE, 512) }, &host_options());
    for (block, code) in [(40, StatusCode::WRITE_FAULT), (100, StatusCode::INTERNAL_ERROR)] {
        let matching = Match::io(NvmOpcode::WRITE).touching(block, block);
        host.device.inject(Fault { matching, action: Action::Status(Status::of(code)) });
    }
    let Err(error) = host.go(Io::Write { lba: Lba(0), blocks: 128, fua: Fua::No }, Some(&[5; 65_536])) else {
        panic!("two of its commands failed")
    };
    assert_eq!(error.status().unwrap().code(), StatusCode::WRITE_FAULT);
    assert_eq!(host.queue.in_flight(), 0);
}

#[test]
fn a_full_queue_says_so_and_goes_on_after_a_poll() {
    let clock = ManualClock::new();
    let config = EmulatedConfig { clock: Clock::Manual(clock.clone()), ..EmulatedConfig::ram(SIZE, 512) };
    let mut host = Host::new(config, &ControllerOptions { io_queue_entries: 8, ..host_options() });
    let action = Action::Delay(Duration::from_secs(1));
    host.device.inject(Fault { matching: Match::io(NvmOpcode::FLUSH), action });
    for _ in 0..7 {
        host.submit(Io::Flush, None).unwrap();
    }
    assert_eq!(host.submit(Io::Flush, None), Err(SubmitError::Full));
    host.queue.ring();
    host.queue.pump();
    assert_eq!(host.queue.poll(64, |_| ()).unwrap(), 0, "all are delayed");
    clock.advance(Duration::from_secs(1));
    host.queue.pump();
    assert_eq!(host.queue.poll(64, |_| ()).unwrap(), 7);
    host.submit(Io::Flush, None).unwrap();
}

#[test]
fn requests_that_cannot_be_are_refused_before_they_reach_the_device() {
    let mut host = Host::new(EmulatedConfig::ram(SIZE, 512), &host_options());
    let last = SIZE / 512;
    let past = host.submit(Io::Read { lba: Lba(last - 1), blocks: 2 }, Some(&[0; 1024]));
    assert!(matches!(past, Err(SubmitError::OutOfRange { .. })), "{past:?}");
    let short = host.submit(Io::Read { lba: Lba(0), blocks: 2 }, Some(&[0; 512]));
    assert!(matches!(short, Err(SubmitError::LengthMismatch { .. })), "{short:?}");
    assert!(host.submit(Io::Read { lba: Lba(0), blocks: 0 }, None).is_err());
    assert!(!host.queue.ring(), "nothing to ring for");
    assert_eq!(host.device.stats().io_commands(), 0);
}

#[test]
fn a_dropped_command_holds_its_buffer_until_the_queue_is_closed() {
    let mut host = Host::new(EmulatedConfig::ram(SIZE, 512), &host_options());
    host.device.inject(Fault { matching: Match::io(NvmOpcode::READ).after(0, 1), action: Action::Drop });
    host.submit(Io::Read { lba: Lba(0), blocks: 8 }, Some(&[0; 4096])).unwrap();
    host.submit(Io::Read { lba: Lba(8), blocks: 8 }, Some(&[1; 4096])).unwrap();
    let (_, other) = host.next();
    other.unwrap();
    assert_eq!(host.queue.in_flight(), 1);
    host.queue.check().unwrap();
    let mut results = Vec::new();
    host.queue.close(|completion| results.push(completion.result)).unwrap();
    assert_eq!(results, [Err(CommandError::Aborted)]);
}

#[test]
fn after_a_power_cut_the_device_is_gone_and_no_wait_lasts() {
    let config = EmulatedConfig { power_loss_model: true, ..EmulatedConfig::ram(SIZE, 512) };
    let mut host = Host::new(config, &host_options());
    host.submit(Io::Read { lba: Lba(0), blocks: 8 }, Some(&[0; 4096])).unwrap();
    host.device.power_cut(1).unwrap();
    host.queue.ring();
    host.queue.pump();
    assert_eq!(host.queue.poll(64, |_| ()).unwrap(), 0);
    assert!(matches!(host.queue.check(), Err(DriverError::Gone)));
    assert!(matches!(host.controller.check(), Err(DriverError::Gone)));
    drop(host.queue);
    let again = Controller::open(host.device.attach().unwrap(), &host_options()).unwrap();
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
fn several_namespaces_keep_their_blocks_apart() {
    let namespaces = vec![NamespaceConfig::new(1 << 20, 512), NamespaceConfig::new(2 << 20, 4096)];
    let mut host =
        Host::new(EmulatedConfig { namespaces, ..EmulatedConfig::ram(SIZE, 512) }, &host_options());
    assert_eq!(host.controller.namespaces().len(), 2);
    host.write(0, &[1; 4096], Fua::No);
    host.namespace = host.controller.namespace(2).unwrap().clone();
    assert_eq!((host.namespace.block_bytes(), host.namespace.blocks()), (4096, 512));
    host.write(0, &[2; 4096], Fua::No);
    let mut bytes = [0; 4096];
    for nsid in 1..=2 {
        host.device.read_image(nsid, 0, &mut bytes).unwrap();
        assert_eq!(bytes, [nsid as u8; 4096]);
    }
}
