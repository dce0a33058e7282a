//! How a mirror becomes equal again beside what goes on (WB-15).

use super::*;

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
