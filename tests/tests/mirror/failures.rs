//! Mirrors whose device fails, is gone or does not answer (WB-15).

use super::*;

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
