//! Gated pages and logs where memory is short: bounds, reserves, and who waits for whom (WB-40).

use super::*;

#[test]
fn wb40_pages_that_are_dirty_behind_gates_are_bounded_and_writers_wait_there() {
    let small = EngineOptions { gated_percent: 25, pin_wait: Duration::from_secs(2), ..options(128) };
    for mut wal in Wal::each(small) {
        let shards = wal.bed.engine().shards() as u64;
        let limit = 32 * shards;
        // Pages that are cached are bounded like those that are made anew, and pins like writes.
        for page in 0..40 {
            wal.bed.run(wal.data.read_at_async(page * PAGE, &mut [0])).unwrap();
        }
        // By itself, nothing is read ahead for it.
        wal.bed.run(wal.data.read_at_async(470 * PAGE, &mut [0])).unwrap();
        let handle = wal.data.clone();
        let mut lsn = 0;
        let error = loop {
            lsn += 1;
            // A stripe of each shard, and half of its pages cached.
            let page = lsn % shards * 512 + lsn / shards % 400;
            let result = if lsn % 2 == 0 {
                wal.bed.run(handle.write_at_lsn_async(page * PAGE, &[1; 100], Lsn(lsn)))
            } else {
                wal.bed.run(async {
                    let mut pin = handle.pin_mut_async(page).await?;
                    pin.set_lsn(Lsn(lsn))
                })
            };
            assert!(wal.dirty() <= limit, "{} of {limit}", wal.dirty());
            match result {
                Ok(()) => assert!(lsn <= limit + shards),
                Err(error) => break error,
            }
        };
        let Error::CacheFull { cause: Some(cause), .. } = &error else { panic!("{error}") };
        assert!(matches!(**cause, Error::Gated { .. }), "{error}");
        assert!(wal.gate.wanted_lsn().is_some(), "its owner is told");
        assert_eq!(wal.written(), []);
        // A page that is dirty already can be changed again, and others are not concerned.
        let page = 1 % shards * 512 + 1 / shards;
        let last = Lsn(lsn);
        wal.bed.run(wal.data.write_at_lsn_async(page * PAGE, &[2; 100], last)).unwrap();
        wal.bed.run(wal.log.write_at_async(0, &[1; 8192])).unwrap();
        // A change without a number waits, too.
        let mut unnumbered = Box::pin(handle.write_at_async(470 * PAGE, &[1; 100]));
        assert!(wal.bed.poll_once(unnumbered.as_mut()).is_pending());
        drop(unnumbered);
        // Who waits goes on when the log is durable.
        let page = lsn % shards * 512 + 450;
        let mut writer: BoxedResult<'_> =
            Box::pin(handle.write_at_lsn_async(page * PAGE, &[1; 100], Lsn(lsn + 1)));
        assert!(wal.bed.poll_once(writer.as_mut()).is_pending());
        wal.bed.settle();
        assert!(wal.bed.poll_once(writer.as_mut()).is_pending());
        wal.gate.advance_durable_lsn(last).unwrap();
        wal.bed.settle();
        assert!(
            matches!(wal.bed.poll_once(writer.as_mut()), Poll::Ready(Ok(()))),
            "without waiting for a timer"
        );
        assert!(wal.dirty() <= limit);
        wal.bed.assert_consistent();
    }
}

#[test]
fn wb40_a_log_has_frames_when_nobody_else_has() {
    for mut wal in Wal::each(options(64)) {
        let shards = wal.bed.engine().shards() as u64;
        // Pins on everything, until no frame can be had.
        let (data, log) = (wal.data.clone(), wal.log.clone());
        let mut pins = Vec::new();
        for page in (0..shards).flat_map(|stripe| stripe * 512..stripe * 512 + 64) {
            let mut request = Box::pin(data.pin_async(page));
            let mut polled = wal.bed.poll_once(request.as_mut());
            if polled.is_pending() {
                wal.bed.settle();
                polled = wal.bed.poll_once(request.as_mut());
            }
            if let Poll::Ready(pin) = polled {
                pins.push(pin.unwrap());
            }
        }
        assert_eq!(pins.len() as u64, shards * (64 - 8), "an eighth is kept: a request's worth");
        // Others wait already; the log passes them, and is written again and again in the same few frames.
        let mut waiting: Vec<BoxedResult<'_>> =
            (0..shards).map(|i| data.write_at_async((i * 512 + 100) * PAGE, &[1; 4096])).map(boxed).collect();
        for request in &mut waiting {
            assert!(wal.bed.poll_once(request.as_mut()).is_pending());
        }
        wal.bed.settle();
        for round in 0..20 {
            let record = vec![round as u8; 8 * 4096];
            let at = round * record.len() as u64 * 19 % LOG_BYTES;
            let mut write = boxed(log.write_at_async(at, &record));
            if wal.bed.poll_once(write.as_mut()).is_pending() {
                wal.bed.settle();
                assert!(wal.bed.poll_once(write.as_mut()).is_ready(), "round {round}: no frame for the log");
            }
            wal.bed.run(log.sync_async()).unwrap();
        }
        for request in &mut waiting {
            assert!(wal.bed.poll_once(request.as_mut()).is_pending(), "the reserve is the log's");
        }
        pins.clear();
        for request in waiting {
            wal.bed.run(request).unwrap();
        }
    }
}

#[test]
fn wb40_the_reserve_of_a_log_with_large_pages_is_not_broken_up() {
    for shards in [1, 3] {
        let mut bed =
            Bed::new(EmulatedConfig::ram(SIZE, 512), EngineOptions { shards, ..options(64 * shards as u64) });
        let gate = bed.engine().gate("wal");
        let log = bed.open(&MappingOptions { page_bytes: 16_384, ..log_options(&gate) });
        let small = bed.open(&MappingOptions { len_bytes: Some(16 * MIB), ..data_options(&gate) });
        let large = bed.open(&MappingOptions {
            start_bytes: 32 * MIB,
            page_bytes: 8192,
            gate: Some(gate.clone()),
            ..Default::default()
        });
        // Every other page of the first is pinned, so that what is free of the rest are single frames.
        let shards = shards as u64;
        let mut pins = Vec::new();
        for page in (0..shards).flat_map(|stripe| stripe * 512..stripe * 512 + 56) {
            let pin = bed.run(small.pin_async(page)).unwrap();
            if page % 2 == 0 {
                pins.push(pin);
            }
        }
        // Then pages of two frames, as many as can be had.
        let mut held = Vec::new();
        for page in (0..shards).flat_map(|stripe| stripe * 256..stripe * 256 + 16) {
            let mut request = Box::pin(large.pin_async(page));
            let mut polled = bed.poll_once(request.as_mut());
            for _ in 0..3 {
                if polled.is_pending() {
                    bed.settle();
                    polled = bed.poll_once(request.as_mut());
                }
            }
            if let Poll::Ready(pin) = polled {
                held.push(pin.unwrap());
            }
        }
        for round in 0..10 {
            for stripe in 0..shards {
                let at = stripe * 2 * MIB + round * 16_384;
                let record = [round as u8; 16_384];
                let mut write = boxed(log.write_at_async(at, &record));
                if bed.poll_once(write.as_mut()).is_pending() {
                    bed.settle();
                    assert!(bed.poll_once(write.as_mut()).is_ready(), "no frames side by side for the log");
                }
                drop(write);
                bed.run(log.sync_async()).unwrap();
            }
        }
    }
}

#[test]
fn wb40_a_page_that_is_laid_beside_its_neighbour_does_not_break_up_the_reserve() {
    let mut bed = Bed::new(EmulatedConfig::ram(SIZE, 512), options(64));
    let gate = bed.engine().gate("wal");
    let log = bed.open(&MappingOptions { page_bytes: 16_384, ..log_options(&gate) });
    let data = bed.open(&MappingOptions { readahead_bytes_max: 0, ..data_options(&gate) });
    // Frame 55 is free, and the reserve: the two blocks of four behind it.
    let mut pins = Vec::new();
    for page in 0..55 {
        pins.push(bed.run(data.pin_async(page)).unwrap());
    }
    // The frame beside its neighbour's, as the pages lie, would be the first of the reserve.
    pins.push(bed.run(data.pin_async(56)).unwrap());
    let mut records = Vec::new();
    for page in 0..2 {
        let mut pin = Box::pin(log.pin_async(page));
        assert!(bed.poll_once(pin.as_mut()).is_pending());
        bed.settle();
        let Poll::Ready(pin) = bed.poll_once(pin.as_mut()) else {
            panic!("no frames side by side for page {page} of the log")
        };
        records.push(pin.unwrap());
    }
}

#[test]
fn wb40_a_full_cache_of_gated_pages_is_written_as_the_log_moves_on() {
    // Many times the cache in stamped writes, a log that is synced only when somebody asks for it.
    for mut wal in Wal::each(EngineOptions { dirty_background_percent: 10, ..options(64) }) {
        let shards = wal.bed.engine().shards() as u64;
        for lsn in 1..=600 * shards {
            wal.bed.run(wal.log.write_at_async(lsn * 512 % LOG_BYTES, &lsn.to_le_bytes())).unwrap();
            let handle = wal.data.clone();
            let page = lsn * 37 % 3000;
            let data = [lsn as u8; 100];
            let mut write = boxed(handle.write_at_lsn_async(page * PAGE, &data, Lsn(lsn)));
            loop {
                match wal.bed.poll_once(write.as_mut()) {
                    Poll::Ready(result) => break result.unwrap(),
                    Poll::Pending => wal.bed.advance(Duration::from_millis(1)),
                }
                if let Some(wanted) = wal.gate.wanted_lsn() {
                    wal.bed.run(wal.log.sync_async()).unwrap();
                    wal.gate.advance_durable_lsn(wanted).unwrap();
                }
            }
        }
        wal.gate.advance_durable_lsn(Lsn(600 * shards)).unwrap();
        wal.bed.run(wal.data.sync_async()).unwrap();
        wal.bed.run(wal.log.sync_async()).unwrap();
        assert_eq!(wal.dirty(), 0);
        wal.bed.assert_consistent();
    }
}

#[test]
fn wb40_writers_that_wait_at_the_bound_of_a_gate_slow_nobody_else() {
    let small =
        EngineOptions { gated_percent: 10, dirty_background_percent: 20, dirty_percent: 40, ..options(256) };
    for mut wal in Wal::each(small) {
        let shards = wal.bed.engine().shards() as u64;
        let error = (1..).find_map(|lsn| {
            let at = (lsn % shards * 512 + lsn / shards) * PAGE;
            wal.bed.run(wal.data.try_write_at_async(at, &[1; 4096])).err()
        });
        assert!(matches!(error, Some(Error::Throttled { .. })), "{error:?}");
        // No number yet: behind the gate only from here on.
        for page in 0..25 * shards {
            let at = (page % shards * 512 + page / shards) * PAGE;
            wal.bed.run(wal.data.write_at_lsn_async(at, &[1; 4096], Lsn(9))).unwrap_or(());
        }
        let handle = wal.data.clone();
        let data = vec![2; 16 * 4096];
        let mut waiting: Vec<BoxedResult<'_>> = (0..16 * shards)
            .map(|i| (i % shards * 512 + 64 + i / shards * 16) * PAGE)
            .map(|at| boxed(handle.write_at_lsn_async(at, &data, Lsn(20))))
            .collect();
        for write in &mut waiting {
            assert!(wal.bed.poll_once(write.as_mut()).is_pending());
        }
        wal.bed.settle();
        let reserved: u64 = wal.bed.dirty_memory().iter().map(|memory| memory.reserved_pages).sum();
        assert_eq!(reserved, 0, "who waits for a log holds nothing");
        let log = wal.log.clone();
        let plain = wal.bed.run(log.try_write_at_async(0, &[3; 8 * 4096]));
        assert!(plain.is_ok(), "{plain:?}");
        // They go on as the gate does, all of them.
        wal.gate.advance_durable_lsn(Lsn(20)).unwrap();
        for write in waiting {
            wal.bed.run(write).unwrap();
        }
        wal.bed.run(wal.data.sync_async()).unwrap();
        wal.bed.run(wal.log.sync_async()).unwrap();
        assert_eq!(wal.dirty(), 0);
        wal.bed.assert_consistent();
    }
}

#[test]
fn wb40_a_log_is_written_though_dirty_memory_is_at_its_limit_and_try_writes_do_not_wait() {
    let small =
        EngineOptions { dirty_background_percent: 20, dirty_percent: 40, gated_percent: 90, ..options(128) };
    for mut wal in Wal::each(EngineOptions { pin_wait: Duration::from_secs(1), ..small }) {
        let handle = wal.data.clone();
        let shards = wal.bed.engine().shards() as u64;
        let error = (1..)
            .find_map(|lsn| {
                let page = lsn % shards * 512 + lsn / shards * 2;
                let at = page * PAGE;
                wal.bed.run(handle.write_at_lsn_async(at, &[1; 4096], Lsn(lsn))).err()
            })
            .unwrap();
        let Error::DirtyLimit { cause: Some(cause), .. } = &error else { panic!("{error}") };
        assert!(matches!(**cause, Error::Gated { .. }), "{error}");
        for page in 0..8 {
            let log = wal.log.clone();
            let mut write = boxed(log.write_at_async(page * 500 * PAGE % LOG_BYTES, &[1; 4096]));
            // The clock stands still meanwhile.
            let mut polled = wal.bed.poll_once(write.as_mut());
            if polled.is_pending() {
                wal.bed.settle();
                polled = wal.bed.poll_once(write.as_mut());
            }
            assert!(matches!(polled, Poll::Ready(Ok(()))), "the log waits for pages that wait for it");
        }
        let wanted = wal.gate.wanted_lsn().expect("its owner is told");
        wal.bed.run(wal.log.sync_async()).unwrap();
        wal.gate.advance_durable_lsn(wanted).unwrap();
        wal.bed.run(wal.data.sync_async()).unwrap();
        assert_eq!(wal.dirty(), 0);
    }
    let bounded = EngineOptions { gated_percent: 10, ..options(64) };
    for mut wal in Wal::each(bounded) {
        for lsn in 1..=6 {
            wal.write(lsn, lsn);
        }
        let error = wal.bed.run(wal.data.try_write_at_async(50 * PAGE, &[1; 4096])).unwrap_err();
        assert!(matches!(error, Error::Throttled { dirty_pages: 6, limit_pages: 6 }), "{error}");
    }
}
