//! Mirrors (WB-15): two streams of one writeback, the loss of one, and how it comes back.

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
fn wb15_a_mirror_that_fails_in_passing_is_tried_again() {
    for mut bed in beds(&ram(), &ram(), 64) {
        let mapping = in_sync(&mut bed, &mirrored());
        inject(&bed, NvmOpcode::WRITE, 0, 3, Action::Status(transient()));
        inject(&bed, NvmOpcode::FLUSH, 0, 2, Action::Status(Status::of(StatusCode::COMMAND_INTERRUPTED)));
        for page in 0..20 {
            write(&mut bed, &mapping, page * 3, 77);
        }
        bed.run(mapping.sync_async()).unwrap();
        assert_eq!(mapping.mirror_state(), Some(MirrorState::InSync));
        assert!(bed.engine().stats().command_retries >= 5);
        assert_equal(&bed);
    }
}

#[test]
fn wb15_a_mirror_that_fails_for_good_is_degraded_and_the_primary_goes_on() {
    for opcode in [NvmOpcode::WRITE, NvmOpcode::FLUSH] {
        for mut bed in beds(&ram(), &ram(), 64) {
            let mapping = in_sync(&mut bed, &mirrored());
            inject(&bed, opcode, 0, 1, Action::Status(fatal()));
            for page in 0..20 {
                write(&mut bed, &mapping, page * 3, 77);
            }
            bed.run(mapping.sync_async()).expect("what it covers is durable");
            let operation = if opcode == NvmOpcode::WRITE { Operation::Write } else { Operation::Flush };
            assert!(matches!(cause(&mapping), MirrorCause::Command { operation: of, .. } if of == operation));
            assert_eq!(bed.engine().stats().mirrors_degraded, 1);
            bed.settle();
            bed.clear_seen();
            for page in 0..20 {
                write(&mut bed, &mapping, page * 5, 78);
            }
            bed.run(mapping.sync_async()).unwrap();
            assert!(bed.mirror_seen(NvmOpcode::WRITE).is_empty(), "nothing goes to it any more");
            assert!(bed.mirror_seen(NvmOpcode::FLUSH).is_empty());
            assert_eq!(image(&bed.device, 1, 5 * 4096, 1), [78]);
            assert_eq!(bed.engine().stats().dirty_pages, 0);
            bed.assert_consistent();
        }
    }
}

#[test]
fn wb15_who_wants_to_is_told_of_a_degraded_mirror_once_a_handle_at_a_sync() {
    for mut bed in beds(&ram(), &ram(), 64) {
        let mut options = mirrored();
        options.mirror.as_mut().unwrap().on_degrade = OnDegrade::TellAtSync;
        let mapping = in_sync(&mut bed, &options);
        let other = mapping.clone();
        inject(&bed, NvmOpcode::WRITE, 0, 1, Action::Status(fatal()));
        write(&mut bed, &mapping, 0, 1);
        for handle in [&mapping, &other] {
            let told = bed.run(handle.sync_async()).unwrap_err();
            assert!(matches!(told, Error::MirrorDegraded { .. }), "{told}");
            bed.run(handle.sync_async()).unwrap();
        }
        assert_eq!(image(&bed.device, 1, 0, 1), [1], "it was durable all the same");
    }
}

#[test]
fn wb15_a_mirror_that_is_gone_is_degraded_at_once() {
    for mut bed in beds(&ram(), &fragile(16 * MIB), 64) {
        let mapping = in_sync(&mut bed, &mirrored());
        bed.mirror.as_ref().unwrap().power_cut(3).unwrap();
        for page in (0..20).chain(600..610) {
            write(&mut bed, &mapping, page, 5);
        }
        bed.run(mapping.sync_async()).unwrap();
        assert!(matches!(cause(&mapping), MirrorCause::Lost(_)));
        assert_eq!(bed.engine().stats().mirrors_degraded, 1);
        assert_eq!(image(&bed.device, 1, 600 * 4096, 1), [5]);
        let refused = bed.run(mapping.resync_mirror_async()).unwrap_err().to_string();
        assert!(refused.contains("open it again"), "{refused}");
        bed.assert_consistent();
        bed.close().unwrap();
    }
}

#[test]
fn wb15_a_mirror_that_does_not_answer_is_degraded_after_the_command_timeout() {
    for opcode in [NvmOpcode::WRITE, NvmOpcode::FLUSH] {
        for mut bed in beds(&ram(), &ram(), 64) {
            let mapping = in_sync(&mut bed, &mirrored());
            inject(&bed, opcode, 0, 1, Action::Drop);
            for page in 0..5 {
                write(&mut bed, &mapping, page * 2, 5);
            }
            let before = bed.now_ns();
            bed.run(mapping.sync_async()).unwrap();
            let waited = Duration::from_nanos(bed.now_ns() - before);
            // The default limit is 30 s.
            assert!(waited > Duration::from_secs(29) && waited < Duration::from_secs(600), "{waited:?}");
            assert!(matches!(cause(&mapping), MirrorCause::Lost(_)));
            bed.settle();
            assert_eq!(bed.engine().stats().writeback_pages, 0);
            write(&mut bed, &mapping, 0, 6);
            bed.run(mapping.sync_async()).unwrap();
            bed.assert_consistent();
        }
    }
}

#[test]
fn wb15_a_primary_that_fails_is_told_as_without_a_mirror() {
    for mut bed in beds(&ram(), &ram(), 64) {
        let mapping = in_sync(&mut bed, &mirrored());
        bed.fail(NvmOpcode::WRITE, 0, 1, fatal());
        write(&mut bed, &mapping, 4, 5);
        let error = bed.run(mapping.sync_async()).unwrap_err();
        assert!(matches!(error, Error::Device { operation: Operation::Write, .. }), "{error}");
        assert_eq!(mapping.mirror_state(), Some(MirrorState::InSync));
        bed.run(mapping.sync_async()).unwrap();
        assert_equal(&bed);
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
fn wb15_only_a_clean_close_in_sync_is_believed_when_the_pair_is_opened_again() {
    for mut bed in beds(&ram(), &ram(), 64) {
        let fresh = bed.open(&mirrored());
        assert_eq!(cause(&fresh), MirrorCause::NeverSynced);
        write(&mut bed, &fresh, 0, 1);
        bed.run(fresh.sync_async()).unwrap();
        assert!(bed.mirror_seen(NvmOpcode::WRITE).is_empty(), "what may be somebody's is not written");
        bed.run(fresh.resync_mirror_async()).unwrap();
        drop(fresh);
        for round in 0..3 {
            bed.close().unwrap();
            bed.power_on();
            let mapping = bed.open(&mirrored());
            assert_eq!(mapping.mirror_state(), Some(MirrorState::InSync), "round {round}");
            write(&mut bed, &mapping, 9, round);
        }
        // Closed by itself, and opened in the same engine.
        let mapping = bed.open(&mirrored());
        bed.run(mapping.close_async()).unwrap();
        let mapping = bed.open(&mirrored());
        assert_eq!(mapping.mirror_state(), Some(MirrorState::InSync));
        assert_equal(&bed);
        // Dropped without a close.
        drop(mapping);
        bed.drop_engine();
        bed.power_on();
        let mapping = bed.open(&mirrored());
        assert_eq!(cause(&mapping), MirrorCause::NotClosed);
        // Closed cleanly, but degraded: the mirror was left behind.
        drop(mapping);
        bed.close().unwrap();
        bed.power_on();
        let mapping = bed.open(&mirrored());
        assert!(matches!(cause(&mapping), MirrorCause::LeftBehind | MirrorCause::NotClosed));
        bed.run(mapping.resync_mirror_async()).unwrap();
        assert_equal(&bed);
    }
}

#[test]
fn wb15_a_mirror_that_was_lost_is_never_taken_for_good_after_it_came_back() {
    for mut bed in beds(&ram(), &fragile(16 * MIB), 64) {
        drop(in_sync(&mut bed, &mirrored()));
        bed.close().unwrap();
        bed.power_on();
        let mapping = bed.open(&mirrored());
        assert_eq!(mapping.mirror_state(), Some(MirrorState::InSync));
        // From here on the mirror hears of nothing.
        bed.mirror.as_ref().unwrap().power_cut(1).unwrap();
        write(&mut bed, &mapping, 2, 0xaa);
        bed.run(mapping.sync_async()).unwrap();
        drop(mapping);
        bed.close().unwrap();
        bed.power_on();
        let mapping = bed.open(&mirrored());
        assert!(!matches!(mapping.mirror_state(), Some(MirrorState::InSync)), "{:?}", mapping.mirror_state());
        bed.run(mapping.resync_mirror_async()).unwrap();
        assert_equal(&bed);
    }
}

#[test]
fn wb15_half_of_a_pair_that_is_opened_alone_is_known_to_have_been() {
    let plain = MappingOptions { len_bytes: Some(LEN), ..Default::default() };
    for mut bed in beds(&ram(), &ram(), 64) {
        drop(in_sync(&mut bed, &mirrored()));
        bed.close().unwrap();
        bed.power_on();
        let alone = bed.open(&plain);
        write(&mut bed, &alone, 1, 0x11);
        drop(alone);
        bed.close().unwrap();
        bed.power_on();
        let mapping = bed.open(&mirrored());
        assert_eq!(cause(&mapping), MirrorCause::OpenedAlone(MirrorRole::Primary));
        bed.run(mapping.resync_mirror_async()).unwrap();
        assert_equal(&bed);
    }
}

#[test]
fn wb15_a_mapping_to_the_end_of_a_namespace_finds_the_label_that_it_would_overwrite() {
    let whole = MappingOptions { mirror: Some(MirrorOptions::default()), ..Default::default() };
    for mut bed in beds(&ram(), &EmulatedConfig::ram(20 * MIB, 512), 64) {
        let mapping = in_sync(&mut bed, &whole);
        let len = mapping.len();
        assert_eq!(len, 16 * MIB - (64 << 10), "room for the label is left");
        drop(mapping);
        bed.close().unwrap();
        bed.power_on();
        let error = bed.try_open(&MappingOptions::default()).unwrap_err().to_string();
        assert!(error.contains("label") && error.contains(&format!("len_bytes {len}")), "{error}");
        assert_eq!(bed.open(&whole).mirror_state(), Some(MirrorState::InSync));
    }
}

#[test]
fn wb15_a_mirror_is_read_by_itself_only_if_it_is_in_sync_or_accepted() {
    let of_mirror = MappingOptions { len_bytes: Some(LEN), start_bytes: MIRROR_START, ..Default::default() };
    for (mut bed, is_clean) in beds(&ram(), &ram(), 64).into_iter().zip([true, false]) {
        let mapping = in_sync(&mut bed, &mirrored());
        write(&mut bed, &mapping, 3, 0x33);
        bed.run(mapping.sync_async()).unwrap();
        drop(mapping);
        if is_clean {
            bed.close().unwrap();
        }
        bed.drop_engine();
        // The primary is lost: the mirror is the only device of another engine.
        let primary = bed.device.clone();
        bed.device = bed.mirror.take().unwrap();
        bed.power_on();
        if !is_clean {
            let error = bed.try_open(&of_mirror).unwrap_err();
            assert!(
                matches!(&error, Error::MirrorStale { label } if label.state == LabelState::Open),
                "{error}"
            );
            let engine = bed.engine.take().unwrap();
            let label = bed.run(engine.mirror_label_async(&of_mirror)).unwrap().unwrap();
            assert_eq!((label.role, label.state), (MirrorRole::Mirror, LabelState::Open));
            bed.run(engine.accept_mirror_async(&of_mirror)).unwrap();
            bed.engine = Some(engine);
        }
        let copy = bed.open(&of_mirror);
        let mut byte = [0];
        bed.run(copy.read_at_async(3 * 4096, &mut byte)).unwrap();
        assert_eq!(byte, [0x33]);
        write(&mut bed, &copy, 4, 0x44);
        drop(copy);
        bed.close().unwrap();
        // The primary is back: what the mirror has got meanwhile isn't overwritten.
        bed.mirror = Some(std::mem::replace(&mut bed.device, primary));
        bed.power_on();
        let mapping = bed.open(&mirrored());
        assert_eq!(cause(&mapping), MirrorCause::OpenedAlone(MirrorRole::Mirror));
        let refused = bed.run(mapping.resync_mirror_async()).unwrap_err().to_string();
        assert!(refused.contains("opened alone"), "{refused}");
    }
}

#[test]
fn wb15_a_resynchronised_mirror_is_equal_though_writes_went_on() {
    for seed in 0..6u64 {
        for (number, mut bed) in beds(&ram(), &ram(), 64).into_iter().enumerate() {
            let mut random = seed * 2 + number as u64 + 1;
            let mut next = move || {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                random >> 33
            };
            let mapping = bed.open(&mirrored());
            for page in 0..200 {
                write(&mut bed, &mapping, page * 5, page as u8);
            }
            // Writes that are slow on either side, so that windows meet writes in every stage.
            for device in [&bed.device, bed.mirror.as_ref().unwrap()] {
                for step in 0..20 {
                    let matching = Match::io(NvmOpcode::WRITE).after(7 * step + seed, 2);
                    let action = Action::Delay(Duration::from_micros(300));
                    device.inject(Fault { matching, action });
                }
            }
            let handle = mapping.clone();
            let mut resync = Box::pin(handle.resync_mirror_async());
            let mut rounds = 0;
            let mut seen_progress = false;
            let result = loop {
                if let Poll::Ready(result) = bed.poll_once(resync.as_mut()) {
                    break result;
                }
                rounds += 1;
                assert!(rounds < 200_000, "seed {seed}: it never ends");
                if let Some(MirrorState::Resyncing { done_bytes, total_bytes }) = mapping.mirror_state() {
                    seen_progress |= done_bytes > 0 && done_bytes < total_bytes;
                }
                match next() % 8 {
                    0 | 1 => {
                        let (page, byte) = (next() % (LEN / 4096), next() as u8);
                        write(&mut bed, &mapping, page, byte);
                    }
                    2 => mapping.request_writeback(),
                    3 if next() % 16 == 0 => {
                        let first = next() % 900;
                        bed.run(mapping.discard_async(first * 4096..(first + 10) * 4096)).unwrap();
                    }
                    _ => {
                        bed.step();
                        bed.pass_time(Duration::from_micros(next() % 50));
                    }
                }
            };
            result.unwrap();
            assert!(seen_progress);
            bed.run(mapping.sync_async()).unwrap();
            assert_eq!(mapping.mirror_state(), Some(MirrorState::InSync));
            assert_equal(&bed);
            bed.assert_consistent();
        }
    }
}

#[test]
fn wb15_a_window_awaits_the_writes_that_were_taken_before_it() {
    for mut bed in beds(&ram(), &ram(), 64) {
        let mapping = bed.open(&mirrored());
        write(&mut bed, &mapping, 1023, 1);
        bed.run(mapping.sync_async()).unwrap();
        let handle = mapping.clone();
        let mut resync = Box::pin(handle.resync_mirror_async());
        while !matches!(mapping.mirror_state(), Some(MirrorState::Resyncing { .. })) {
            assert!(bed.poll_once(resync.as_mut()).is_pending());
            bed.step();
        }
        // The mirror has the new page long before the primary, which fails in passing for 15 ms.
        bed.fail(NvmOpcode::WRITE, 0, 4, transient());
        write(&mut bed, &mapping, 1023, 2);
        let mut sync = Box::pin(mapping.sync_async());
        assert!(bed.poll_once(sync.as_mut()).is_pending());
        bed.settle();
        assert!(bed.poll_once(resync.as_mut()).is_pending(), "its last window waits");
        bed.run(resync).unwrap();
        bed.run(sync).unwrap();
        assert_equal(&bed);
    }
}

#[test]
fn wb15_a_resynchronisation_ends_degraded_where_it_cannot_go_on() {
    for mut bed in beds(&ram(), &ram(), 64) {
        let mapping = bed.open(&mirrored());
        // A label, then windows.
        inject(&bed, NvmOpcode::WRITE, 4, 1, Action::Status(fatal()));
        let error = bed.run(mapping.resync_mirror_async()).unwrap_err();
        assert!(matches!(error, Error::MirrorDegraded { .. }), "{error}");
        bed.fail(NvmOpcode::READ, 2, 1, fatal());
        let error = bed.run(mapping.resync_mirror_async()).unwrap_err();
        assert!(
            matches!(error, Error::Device { operation: Operation::Read, .. } | Error::MirrorDegraded { .. }),
            "{error}"
        );
        assert!(matches!(mapping.mirror_state(), Some(MirrorState::Degraded { .. })));
        // In passing: nobody hears of it.
        bed.fail(NvmOpcode::READ, 2, 2, transient());
        inject(&bed, NvmOpcode::WRITE, 3, 2, Action::Status(transient()));
        // Dropped midway, it can be begun anew.
        {
            let mut dropped = Box::pin(mapping.resync_mirror_async());
            for _ in 0..40 {
                assert!(bed.poll_once(dropped.as_mut()).is_pending());
                bed.step();
            }
            assert!(matches!(mapping.mirror_state(), Some(MirrorState::Resyncing { .. })));
        }
        assert_eq!(cause(&mapping), MirrorCause::ResyncGivenUp);
        bed.run(mapping.resync_mirror_async()).unwrap();
        assert_equal(&bed);
        bed.assert_consistent();
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

/// The pair of `mirrored`, elsewhere on both devices.
fn second_pair() -> MappingOptions {
    MappingOptions {
        start_bytes: 5 * MIB,
        mirror: Some(MirrorOptions { start_bytes: 6 * MIB, ..Default::default() }),
        ..mirrored()
    }
}

#[test]
fn wb15_what_one_shard_cannot_write_any_more_is_not_in_sync_for_mappings_that_are_opened_later() {
    let [_, mut bed] = beds(&ram(), &ram(), 64);
    drop(in_sync(&mut bed, &second_pair()));
    bed.close().unwrap();
    bed.power_on();
    let first = in_sync(&mut bed, &mirrored());
    // The second shard loses its queue; the first, which reads and writes labels, has its own still.
    inject(&bed, NvmOpcode::WRITE, 0, 1, Action::Drop);
    write(&mut bed, &first, 512, 1);
    bed.run(first.sync_async()).unwrap();
    assert!(matches!(cause(&first), MirrorCause::Lost(_)));
    let mapping = bed.open(&second_pair());
    assert!(matches!(cause(&mapping), MirrorCause::Lost(_)));
    write(&mut bed, &mapping, 512, 7);
    bed.run(mapping.sync_async()).unwrap();
    drop((first, mapping));
    bed.close().unwrap();
    bed.power_on();
    let mapping = bed.open(&second_pair());
    assert!(matches!(mapping.mirror_state(), Some(MirrorState::Degraded { .. })));
    bed.run(mapping.resync_mirror_async()).unwrap();
    assert_eq!(image(bed.mirror.as_ref().unwrap(), 1, 6 * MIB + 512 * 4096, 1), [7]);
}

#[test]
fn wb15_a_mirror_whose_last_flush_failed_is_not_closed_as_in_sync() {
    for action in [Action::Status(fatal()), Action::Drop] {
        for mut bed in beds(&ram(), &ram(), 64) {
            let mapping = in_sync(&mut bed, &mirrored());
            let other = mapping.clone();
            // What is dirtied after the closer's sync is written, and flushed, when the shards have dropped the mapping.
            let mut pins = [5, 9].map(|page| bed.run(other.pin_mut_async(page)).unwrap());
            let mut close = Box::pin(mapping.close_async());
            for _ in 0..20 {
                assert!(bed.poll_once(close.as_mut()).is_pending());
                bed.settle();
            }
            pins.iter_mut().for_each(|pin| pin[0] = 5);
            drop(pins);
            inject(&bed, NvmOpcode::FLUSH, 0, 1, action);
            bed.run(close).expect("the primary has everything");
            assert!(matches!(other.mirror_state(), Some(MirrorState::Degraded { .. })));
            if action == Action::Drop {
                // The lost queue is still being closed, aside: the device can't be attached anew just yet.
                continue;
            }
            drop(other);
            bed.close().unwrap();
            bed.power_on();
            let mapping = bed.open(&mirrored());
            assert!(matches!(mapping.mirror_state(), Some(MirrorState::Degraded { .. })));
        }
    }
}

#[test]
fn wb15_a_mirror_with_a_failed_flush_is_in_sync_for_no_mapping_that_is_opened_later() {
    for mut bed in beds(&ram(), &ram(), 64) {
        drop(in_sync(&mut bed, &second_pair()));
        bed.close().unwrap();
        bed.power_on();
        let first = in_sync(&mut bed, &mirrored());
        inject(&bed, NvmOpcode::FLUSH, 0, 1, Action::Status(fatal()));
        write(&mut bed, &first, 0, 1);
        write(&mut bed, &first, 5, 1);
        bed.run(first.sync_async()).unwrap();
        assert!(matches!(cause(&first), MirrorCause::Command { operation: Operation::Flush, .. }));
        let mapping = bed.open(&second_pair());
        assert!(matches!(cause(&mapping), MirrorCause::Command { operation: Operation::Flush, .. }));
    }
}

#[test]
fn wb15_a_stale_mirror_is_not_taken_for_the_primary_when_the_two_are_swapped() {
    let swapped = MappingOptions {
        start_bytes: MIRROR_START,
        mirror: Some(MirrorOptions { start_bytes: 0, ..Default::default() }),
        ..mirrored()
    };
    for is_labelled_clean in [false, true] {
        for mut bed in beds(&ram(), &ram(), 64) {
            let mut mapping = in_sync(&mut bed, &mirrored());
            if is_labelled_clean {
                // From the next open on the mirror hears of nothing.
                drop(mapping);
                bed.close().unwrap();
                bed.power_on();
                inject(&bed, NvmOpcode::READ, 0, 1, Action::Status(fatal()));
                mapping = bed.open(&mirrored());
                assert!(matches!(cause(&mapping), MirrorCause::Lost(_)));
            } else {
                inject(&bed, NvmOpcode::WRITE, 0, 1, Action::Status(fatal()));
            }
            write(&mut bed, &mapping, 2, 0xaa);
            bed.run(mapping.sync_async()).unwrap();
            drop(mapping);
            bed.close().unwrap();
            let primary = bed.device.clone();
            bed.device = bed.mirror.replace(primary).unwrap();
            bed.power_on();
            let error = bed.try_open(&swapped).unwrap_err();
            assert!(
                matches!(&error, Error::MirrorStale { label } if label.role == MirrorRole::Mirror),
                "{error}"
            );
            // Somebody who knows better may have it so.
            let engine = bed.engine.take().unwrap();
            bed.run(engine.accept_mirror_async(&swapped)).unwrap();
            bed.engine = Some(engine);
            let mapping = bed.open(&swapped);
            bed.run(mapping.resync_mirror_async()).unwrap();
        }
    }
}

#[test]
fn wb15_halves_that_were_closed_in_sync_may_change_their_roles() {
    let swapped = MappingOptions {
        start_bytes: MIRROR_START,
        mirror: Some(MirrorOptions { start_bytes: 0, ..Default::default() }),
        ..mirrored()
    };
    for mut bed in beds(&ram(), &ram(), 64) {
        let mapping = in_sync(&mut bed, &mirrored());
        write(&mut bed, &mapping, 2, 0xaa);
        drop(mapping);
        bed.close().unwrap();
        let primary = bed.device.clone();
        bed.device = bed.mirror.replace(primary).unwrap();
        bed.power_on();
        let mapping = bed.open(&swapped);
        let mut byte = [0];
        bed.run(mapping.read_at_async(2 * 4096, &mut byte)).unwrap();
        assert_eq!(byte, [0xaa]);
    }
}

#[test]
fn wb15_a_mirror_that_was_used_alone_is_not_overwritten_from_a_new_primary() {
    let of_mirror = MappingOptions { len_bytes: Some(LEN), start_bytes: MIRROR_START, ..Default::default() };
    for (mut bed, mut fresh) in beds(&ram(), &ram(), 64).into_iter().zip(beds(&ram(), &ram(), 64)) {
        drop(in_sync(&mut bed, &mirrored()));
        bed.close().unwrap();
        bed.device = bed.mirror.take().unwrap();
        bed.power_on();
        let alone = bed.open(&of_mirror);
        write(&mut bed, &alone, 1, 0x11);
        drop(alone);
        bed.close().unwrap();
        // In the place of the lost primary there is a new, empty device.
        fresh.close().unwrap();
        bed.mirror = Some(std::mem::replace(&mut bed.device, fresh.device.clone()));
        bed.power_on();
        let mapping = bed.open(&mirrored());
        let refused = bed.run(mapping.resync_mirror_async()).unwrap_err().to_string();
        assert!(refused.contains("opened alone"), "{refused}");
        assert_eq!(image(bed.mirror.as_ref().unwrap(), 1, MIRROR_START + 4096, 1), [0x11]);
    }
}

#[test]
fn wb15_a_mirrored_mapping_that_may_grow_needs_room_for_the_label_behind_its_capacity() {
    let mut bed = Bed::mirrored(ram(), EmulatedConfig::ram(20 * MIB, 512), options(64));
    let wanted = MappingOptions { capacity_bytes: Some(16 * MIB), ..mirrored() };
    let error = bed.try_open(&wanted).unwrap_err().to_string();
    assert!(error.contains("the most that can be mirrored"), "{error}");
}

#[test]
fn wb15_a_sync_that_cannot_ask_for_the_mirrors_flush_does_not_succeed() {
    let durable = EmulatedConfig { volatile_write_cache: false, ..ram() };
    let options = EngineOptions { requests_max: 1, pin_wait: Duration::from_millis(20), ..options(64) };
    let mut bed = Bed::mirrored(durable, ram(), options);
    let mapping = in_sync(&mut bed, &mirrored());
    write(&mut bed, &mapping, 3, 3);
    mapping.request_writeback();
    bed.settle();
    assert_eq!(bed.engine().stats().dirty_pages, 0);
    let holder = mapping.clone();
    let mut forgotten = Box::pin(holder.pin_async(100));
    assert!(bed.poll_once(forgotten.as_mut()).is_pending());
    let error = bed.run(mapping.sync_async()).unwrap_err();
    assert!(matches!(error, Error::TooManyRequests { .. }), "{error}");
    drop(forgotten);
    bed.run(mapping.sync_async()).unwrap();
    assert_eq!(bed.mirror_seen(NvmOpcode::FLUSH).len(), 1);
    assert_eq!(mapping.mirror_state(), Some(MirrorState::InSync));
}
