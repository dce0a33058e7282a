//! Labels: which half of a pair is believed when it is opened again (WB-15).

use super::*;

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
