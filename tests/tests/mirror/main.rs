//! Mirrors (WB-15): two streams of one writeback, the loss of one, and how it comes back.

mod failures;
mod labels;
mod resync;

use std::task::Poll;
use std::time::Duration;

use foliant::{
    EngineOptions, Error, LabelState, Mapping, MappingOptions, MirrorCause, MirrorDevice, MirrorOptions,
    MirrorRole, MirrorState, OnDegrade, Operation,
};
use foliant_nvme_emulated::{Action, EmulatedConfig, EmulatedController, Fault, Match, NamespaceConfig};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use foliant_tests::{Bed, fragile, options};

const MIB: u64 = 1 << 20;
/// Length of the mirrored mapping: two stripes, so that two shards have some of it.
const LEN: u64 = 4 * MIB;
/// Where the mirror begins on its device.
const MIRROR_START: u64 = MIB;

fn ram() -> EmulatedConfig {
    EmulatedConfig::ram(16 * MIB, 512)
}

fn mirrored() -> MappingOptions {
    MappingOptions {
        len_bytes: Some(LEN),
        mirror: Some(MirrorOptions { start_bytes: MIRROR_START, ..Default::default() }),
        ..Default::default()
    }
}

/// A bed a number of shards, on two devices.
fn beds(primary: &EmulatedConfig, mirror: &EmulatedConfig, frames: u64) -> [Bed; 2] {
    [1, 2].map(|shards| {
        let options = EngineOptions { shards, ..options(frames * shards as u64) };
        Bed::mirrored(primary.clone(), mirror.clone(), options)
    })
}

/// Opens the mirrored mapping and makes its mirror equal.
fn in_sync(bed: &mut Bed, options: &MappingOptions) -> Mapping {
    let mapping = bed.open(options);
    bed.run(mapping.resync_mirror_async()).unwrap();
    assert_eq!(mapping.mirror_state(), Some(MirrorState::InSync));
    bed.settle();
    bed.clear_seen();
    mapping
}

fn write(bed: &mut Bed, mapping: &Mapping, page: u64, byte: u8) {
    bed.run(mapping.write_at_async(page * 4096, &[byte; 4096])).unwrap();
}

fn image(device: &EmulatedController, nsid: u32, start: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    device.read_image(nsid, start, &mut bytes).unwrap();
    bytes
}

/// Checks that the mirror holds what the primary holds.
fn assert_equal(bed: &Bed) {
    let mirror = bed.mirror.as_ref().unwrap();
    let (ours, theirs) = (image(&bed.device, 1, 0, LEN), image(mirror, 1, MIRROR_START, LEN));
    let differs = ours.iter().zip(&theirs).position(|(one, other)| one != other);
    assert_eq!(differs, None, "first byte that differs");
}

fn inject(bed: &Bed, opcode: NvmOpcode, skip: u64, times: u64, action: Action) {
    let fault = Fault { matching: Match::io(opcode).after(skip, times), action };
    bed.mirror.as_ref().unwrap().inject(fault);
}

fn transient() -> Status {
    Status::of(StatusCode::INTERNAL_ERROR)
}

fn fatal() -> Status {
    Status::of(StatusCode::WRITE_FAULT).with_dnr(true)
}

fn cause(mapping: &Mapping) -> MirrorCause {
    match mapping.mirror_state() {
        Some(MirrorState::Degraded { cause, .. }) => cause,
        other => panic!("the mirror is {other:?}"),
    }
}

#[test]
fn wb15_what_is_synced_is_on_both_from_the_same_frames_with_a_flush_and_a_doorbell_each() {
    for mut bed in beds(&ram(), &ram(), 128) {
        let mapping = in_sync(&mut bed, &mirrored());
        for page in (0..40).chain(600..620) {
            write(&mut bed, &mapping, page, page as u8 + 1);
        }
        bed.settle();
        bed.clear_seen();
        bed.run(mapping.sync_async()).unwrap();
        assert_equal(&bed);
        let (ours, theirs) = (bed.seen(NvmOpcode::WRITE), bed.mirror_seen(NvmOpcode::WRITE));
        assert!(!theirs.is_empty() && ours.len() == theirs.len());
        for command in ours.iter().chain(&theirs) {
            assert_eq!(
                command.in_frames_bytes, command.bytes,
                "its data are the frames of its pages: {command:?}"
            );
        }
        assert_eq!(bed.seen(NvmOpcode::FLUSH).len(), 1);
        assert_eq!(bed.mirror_seen(NvmOpcode::FLUSH).len(), 1);
        assert_eq!(bed.mirror_seen(NvmOpcode::READ).len(), 0, "a mirror is never read");
        bed.assert_consistent();
    }
}

#[test]
fn wb15_a_sync_of_one_command_is_written_through_on_both() {
    for mut bed in beds(&ram(), &ram(), 64) {
        let mapping = in_sync(&mut bed, &mirrored());
        write(&mut bed, &mapping, 3, 9);
        bed.run(mapping.sync_async()).unwrap();
        bed.clear_seen();
        write(&mut bed, &mapping, 5, 10);
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!((bed.seen(NvmOpcode::FLUSH).len(), bed.mirror_seen(NvmOpcode::FLUSH).len()), (0, 0));
        assert_equal(&bed);
    }
}

#[test]
fn wb15_writeback_ends_when_both_streams_have_ended() {
    for slow_mirror in [true, false] {
        for mut bed in beds(&ram(), &ram(), 64) {
            let mapping = in_sync(&mut bed, &mirrored());
            let delay = Action::Delay(Duration::from_millis(40));
            match slow_mirror {
                true => inject(&bed, NvmOpcode::WRITE, 0, 1, delay),
                false => bed.fault(NvmOpcode::WRITE, 0, 1, delay),
            }
            write(&mut bed, &mapping, 7, 1);
            let sync_of = mapping.clone();
            let mut sync = Box::pin(sync_of.sync_async());
            assert!(bed.poll_once(sync.as_mut()).is_pending());
            bed.settle();
            assert_eq!((bed.seen(NvmOpcode::WRITE).len(), bed.mirror_seen(NvmOpcode::WRITE).len()), (1, 1));
            assert_eq!(bed.engine().stats().writeback_pages, 1, "one of the two has not ended");
            assert!(bed.poll_once(sync.as_mut()).is_pending());
            assert!(bed.seen(NvmOpcode::FLUSH).is_empty());
            {
                let mut writer = Box::pin(mapping.pin_mut_async(7));
                assert!(
                    bed.poll_once(writer.as_mut()).is_pending(),
                    "a page is stable for the slower stream, too"
                );
                bed.settle();
                assert!(bed.poll_once(writer.as_mut()).is_pending());
                bed.advance(Duration::from_millis(41));
                assert!(matches!(bed.poll_once(writer.as_mut()), Poll::Ready(Ok(_))));
            }
            bed.run(sync).unwrap();
            assert_eq!(bed.engine().stats().writeback_pages, 0);
            assert_equal(&bed);
        }
    }
}

#[test]
fn wb15_each_stream_is_cut_at_its_own_limits() {
    let small = EmulatedConfig { mdts: 2, noiob_blocks: 24, ..ram() };
    for (primary, mirror) in [(ram(), small.clone()), (small, ram())] {
        for mut bed in beds(&primary, &mirror, 256) {
            let mapping = in_sync(&mut bed, &mirrored());
            for page in 0..130 {
                write(&mut bed, &mapping, page, page as u8 ^ 0x55);
            }
            bed.settle();
            bed.clear_seen();
            bed.run(mapping.sync_async()).unwrap();
            assert_equal(&bed);
            for (config, seen) in
                [(&primary, bed.seen(NvmOpcode::WRITE)), (&mirror, bed.mirror_seen(NvmOpcode::WRITE))]
            {
                let pages: u64 = seen.iter().map(|seen| seen.bytes / 4096).sum();
                assert_eq!(pages, 130, "each page once");
                for command in &seen {
                    assert!(command.bytes <= 4096 << config.mdts, "{command:?}");
                    let boundary = u64::from(config.noiob_blocks);
                    let last = command.slba + u64::from(command.blocks) - 1;
                    let piece = |lba: u64| lba.checked_div(boundary);
                    assert_eq!(piece(command.slba), piece(last), "{command:?}");
                }
            }
            bed.assert_consistent();
        }
    }
}

#[test]
fn wb15_a_primary_with_smaller_blocks_than_its_mirror_and_the_other_way_round() {
    let large = EmulatedConfig::ram(16 * MIB, 4096);
    for (primary, mirror) in [(ram(), large.clone()), (large, ram())] {
        for mut bed in beds(&primary, &mirror, 64) {
            let mapping = in_sync(&mut bed, &MappingOptions { page_bytes: 16384, ..mirrored() });
            for page in [0, 3, 200] {
                bed.run(mapping.write_at_async(page * 16384 + 100, &[page as u8 + 1; 5000])).unwrap();
            }
            bed.run(mapping.sync_async()).unwrap();
            assert_equal(&bed);
        }
    }
}

#[test]
fn wb15_the_stream_furthest_behind_is_fed_first_and_holds_writeback_up_in_the_end() {
    // The mirror holds seven commands, of a page each, and takes a millisecond for every one.
    let slow = EmulatedConfig { queue_entries_max: 8, mdts: 0, ..ram() };
    for shards in [1, 2] {
        let options = EngineOptions { shards, transfer_bytes_max: 4096, ..options(512 * shards as u64) };
        let mut bed = Bed::mirrored(ram(), slow.clone(), options);
        let mapping = in_sync(&mut bed, &mirrored());
        inject(&bed, NvmOpcode::WRITE, 0, u64::MAX, Action::Delay(Duration::from_millis(1)));
        for page in 0..300 {
            write(&mut bed, &mapping, page, page as u8);
        }
        bed.settle();
        bed.clear_seen();
        let sync_of = mapping.clone();
        let mut sync = Box::pin(sync_of.sync_async());
        assert!(bed.poll_once(sync.as_mut()).is_pending());
        bed.settle();
        let (primary, mirror) = (bed.seen(NvmOpcode::WRITE).len(), bed.mirror_seen(NvmOpcode::WRITE).len());
        assert!(mirror < 8, "{mirror} commands are with a mirror that holds 7");
        assert!(primary > mirror, "the primary doesn't wait for room that the mirror lacks");
        assert!(primary < 300, "but it isn't fed without end: {primary}");
        let mut fed = (primary, mirror);
        for _ in 0..1000 {
            bed.advance(Duration::from_micros(500));
            let now = (bed.seen(NvmOpcode::WRITE).len(), bed.mirror_seen(NvmOpcode::WRITE).len());
            assert!(
                now.1 > fed.1 || now.0 == fed.0 || now.1 == now.0,
                "{fed:?} became {now:?}: the leader was fed"
            );
            fed = now;
            if bed.poll_once(sync.as_mut()).is_ready() {
                break;
            }
        }
        assert_eq!(fed, (300, 300));
        for seen in [bed.seen(NvmOpcode::WRITE), bed.mirror_seen(NvmOpcode::WRITE)] {
            assert!(seen.is_sorted_by_key(|command| command.slba), "each stream ascends");
        }
        assert_equal(&bed);
        bed.assert_consistent();
    }
}

#[test]
fn wb15_neither_reads_nor_other_mappings_wait_for_a_mirror_that_is_behind() {
    let slow = EmulatedConfig { queue_entries_max: 8, ..ram() };
    for shards in [1, 2] {
        let options = EngineOptions { shards, transfer_bytes_max: 4096, ..options(512 * shards as u64) };
        let mut bed = Bed::mirrored(ram(), slow.clone(), options);
        let other =
            bed.open(&MappingOptions { start_bytes: 8 * MIB, len_bytes: Some(MIB), ..Default::default() });
        let mapping = in_sync(&mut bed, &mirrored());
        inject(&bed, NvmOpcode::WRITE, 0, u64::MAX, Action::Delay(Duration::from_secs(5)));
        for page in 0..300 {
            write(&mut bed, &mapping, page, page as u8);
        }
        let sync_of = mapping.clone();
        let mut sync = Box::pin(sync_of.sync_async());
        assert!(bed.poll_once(sync.as_mut()).is_pending());
        bed.settle();
        let mut buffer = [1; 4096];
        {
            let mut read = Box::pin(mapping.read_at_async(900 * 4096, &mut buffer));
            assert!(bed.poll_once(read.as_mut()).is_pending());
            bed.settle();
            assert!(
                bed.poll_once(read.as_mut()).is_ready(),
                "the sync waits for the mirror, the read for nobody"
            );
        }
        write(&mut bed, &other, 3, 1);
        {
            let mut others = Box::pin(other.sync_async());
            // Its write, and then its flush.
            for _ in 0..2 {
                assert!(bed.poll_once(others.as_mut()).is_pending());
                bed.settle();
            }
            assert!(
                matches!(bed.poll_once(others.as_mut()), Poll::Ready(Ok(()))),
                "nor does who has no mirror"
            );
        }
        assert!(bed.poll_once(sync.as_mut()).is_pending());
    }
}

#[test]
fn wb15_a_discard_zeroes_both() {
    for mut bed in beds(&ram(), &ram(), 128) {
        let mapping = in_sync(&mut bed, &mirrored());
        for page in 0..60 {
            write(&mut bed, &mapping, page, 0xee);
        }
        bed.run(mapping.sync_async()).unwrap();
        bed.run(mapping.discard_async(100..50 * 4096 + 7)).unwrap();
        bed.run(mapping.sync_async()).unwrap();
        assert_equal(&bed);
        let mirror = bed.mirror.as_ref().unwrap();
        assert_eq!(image(mirror, 1, MIRROR_START + 20 * 4096, 4096), [0; 4096]);
        assert!(!bed.mirror_seen(NvmOpcode::WRITE_ZEROES).is_empty());
        inject(&bed, NvmOpcode::WRITE_ZEROES, 0, 1, Action::Status(fatal()));
        bed.run(mapping.discard_async(50 * 4096..60 * 4096)).unwrap();
        assert!(matches!(cause(&mapping), MirrorCause::Command { operation: Operation::WriteZeroes, .. }));
    }
}

#[test]
fn wb15_what_was_synced_survives_a_power_cut_on_both_devices() {
    for seed in 0..8 {
        for mut bed in beds(&fragile(16 * MIB), &fragile(16 * MIB), 128) {
            let mapping = in_sync(&mut bed, &mirrored());
            for page in 0..30 {
                write(&mut bed, &mapping, page * 20, 1 + page as u8);
            }
            bed.run(mapping.sync_async()).unwrap();
            for page in 30..50 {
                write(&mut bed, &mapping, page * 20, 1 + page as u8);
            }
            mapping.request_writeback();
            bed.step();
            bed.step();
            drop(mapping);
            bed.mirror.as_ref().unwrap().power_cut(seed + 100).unwrap();
            bed.crash(seed);
            bed.drop_engine();
            let mirror = bed.mirror.clone().unwrap();
            for page in 0..30u64 {
                let wanted = vec![1 + page as u8; 4096];
                assert_eq!(image(&bed.device, 1, page * 20 * 4096, 4096), wanted, "page {page}, seed {seed}");
                let theirs = image(&mirror, 1, MIRROR_START + page * 20 * 4096, 4096);
                assert_eq!(theirs, wanted, "page {page} on the mirror, seed {seed}");
            }
            bed.power_on();
            let mapping = bed.open(&mirrored());
            assert_eq!(cause(&mapping), MirrorCause::NotClosed, "what was in flight may differ");
            bed.run(mapping.resync_mirror_async()).unwrap();
            assert_equal(&bed);
        }
    }
}

#[test]
fn wb15_the_mirror_may_be_another_namespace_of_the_same_device() {
    for shards in [1, 2] {
        let namespace = NamespaceConfig::new(8 * MIB, 512);
        let config = EmulatedConfig { namespaces: vec![namespace; 2], ..ram() };
        let options =
            EngineOptions { shards, mirror: MirrorDevice::SameDevice, ..options(64 * shards as u64) };
        let mut bed = Bed::new(config, options);
        let mirror = MirrorOptions { namespace: 2, start_bytes: 2 * MIB, ..Default::default() };
        let wanted = MappingOptions { len_bytes: Some(LEN), mirror: Some(mirror), ..Default::default() };
        let mapping = in_sync(&mut bed, &wanted);
        for page in (0..40).chain(600..620) {
            write(&mut bed, &mapping, page, page as u8 + 1);
        }
        bed.run(mapping.sync_async()).unwrap();
        assert!(image(&bed.device, 1, 0, LEN) == image(&bed.device, 2, 2 * MIB, LEN), "both are equal");
        assert_eq!(bed.seen(NvmOpcode::FLUSH).len(), 2, "one a namespace");
        let error =
            bed.try_open(&MappingOptions { namespace: 2, ..Default::default() }).unwrap_err().to_string();
        assert!(error.contains("overlap"), "{error}");
        drop(mapping);
        bed.close().unwrap();
        bed.power_on();
        assert_eq!(bed.open(&wanted).mirror_state(), Some(MirrorState::InSync));
    }
}

#[test]
fn wb15_a_mirror_that_cannot_be_is_refused_with_the_value_the_limit_and_the_remedy() {
    let mut bed = Bed::mirrored(ram(), ram(), options(64));
    let at = |namespace, start_bytes, len_bytes| MappingOptions {
        len_bytes,
        mirror: Some(MirrorOptions { namespace, start_bytes, ..Default::default() }),
        ..Default::default()
    };
    for (wanted, words) in [
        (at(2, 0, Some(LEN)), ["namespace 2", "[1]"]),
        (at(1, 100, Some(LEN)), ["100", "512-byte block"]),
        (at(1, 13 * MIB, Some(LEN)), ["13631488", "another start_bytes"]),
        (at(1, u64::MAX - 511, Some(LEN)), ["don't fit", "16777216 bytes"]),
        (at(1, 0, Some(16 * MIB)), ["label", "the most that can be mirrored"]),
    ] {
        let error = bed.try_open(&wanted).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error:?} should say {words:?}");
    }
    let mapping = bed.open(&at(1, 0, Some(LEN)));
    let error = bed.try_open(&at(1, MIB, Some(LEN))).unwrap_err().to_string();
    assert!(error.contains("same mirror"), "{error}");
    let second = MappingOptions { start_bytes: 5 * MIB, ..at(1, 2 * MIB, Some(LEN)) };
    let error = bed.try_open(&second).unwrap_err().to_string();
    assert!(error.contains("overlap"), "{error}");
    bed.open(&MappingOptions { start_bytes: 5 * MIB, ..at(1, 5 * MIB, Some(LEN)) });
    drop(mapping);

    let mut bed = Bed::new(ram(), options(64));
    let error = bed.try_open(&mirrored()).unwrap_err().to_string();
    assert!(error.contains("EngineOptions::mirror"), "{error}");
    let mapping = bed.mapping();
    assert_eq!(mapping.mirror_state(), None);
    let error = bed.run(mapping.resync_mirror_async()).unwrap_err().to_string();
    assert!(error.contains("MappingOptions::mirror"), "{error}");

    let same = EngineOptions { mirror: MirrorDevice::SameDevice, ..options(64) };
    let mut bed = Bed::new(ram(), same.clone());
    let error = bed.try_open(&at(1, MIB, Some(LEN))).unwrap_err().to_string();
    assert!(error.contains("overlap those of its mirror"), "{error}");
    bed.open(&at(1, 8 * MIB, Some(LEN)));

    let one = EmulatedConfig { queue_pairs_max: 1, ..ram() };
    let transport = EmulatedController::new(one).unwrap().attach().unwrap();
    let error = foliant::Engine::open_on(transport, &same).unwrap_err().to_string();
    assert!(error.contains("2 queue pairs"), "{error}");
}
