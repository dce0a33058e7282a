//! What a checkpoint goes by, and what it writes (WB-45).

use super::*;

#[test]
fn wb45_flush_until_beyond_the_newest_number_waits_for_the_pages_own_and_for_no_more() {
    for mut wal in Wal::each(options(64)) {
        wal.bed.run(wal.data.flush_until_async(Lsn(u64::MAX))).unwrap();
        assert_eq!(wal.written(), [], "nothing is older than a number that nobody has given");
        wal.write(0, 10);
        wal.write(1, 20);
        let handle = wal.data.clone();
        let mut flush = boxed(handle.flush_until_async(Lsn(1_000_000)));
        assert!(wal.bed.poll_once(flush.as_mut()).is_pending());
        wal.bed.settle();
        assert_eq!(wal.gate.wanted_lsn(), Some(Lsn(20)), "not a million");
        wal.write(2, 30);
        wal.gate.advance_durable_lsn(Lsn(20)).unwrap();
        wal.bed.run(flush).unwrap();
        assert_eq!((wal.written(), wal.dirty()), (vec![0, 1], 1));
    }
}

#[test]
fn wb45_flush_until_writes_exactly_the_older_pages_and_makes_them_durable() {
    for mut wal in Wal::each(options(256)) {
        wal.gate.advance_durable_lsn(Lsn(1000)).unwrap();
        for i in 0..100 {
            wal.write(i * 67 % 100 * 13, i + 1);
        }
        // A page counts by its first number, and one without a number isn't older than any.
        wal.write(0, 500);
        wal.bed.run(wal.data.write_at_async(9000 * PAGE, &[1; 10])).unwrap();
        wal.bed.clear_seen();
        wal.bed.run(wal.data.flush_until_async(Lsn(41))).unwrap();
        let mut older: Vec<u64> = (0..40).map(|i| i * 67 % 100 * 13).collect();
        older.sort_unstable();
        assert_eq!(wal.written(), older);
        assert_eq!(wal.bed.seen(NvmOpcode::FLUSH).len(), 1);
        assert_eq!(wal.dirty(), 61);
        assert_eq!(wal.bed.run(wal.data.oldest_dirty_lsn_async()).unwrap(), Some(Lsn(41)));
        wal.bed.clear_seen();
        for none in [Lsn::NONE, Lsn(1), Lsn(41)] {
            wal.bed.run(wal.data.flush_until_async(none)).unwrap();
        }
        assert_eq!(wal.written(), [], "nothing is older");
        wal.bed.run(wal.data.flush_until_async(Lsn(u64::MAX))).unwrap();
        assert_eq!(wal.bed.run(wal.data.oldest_dirty_lsn_async()).unwrap(), None);
        assert_eq!(wal.dirty(), 1, "the one without a number");
        wal.bed.assert_consistent();
    }
}

#[test]
fn wb45_flush_until_waits_for_the_gate_like_a_sync() {
    for mut wal in Wal::each(options(64)) {
        wal.write(0, 10);
        wal.write(1, 11);
        wal.write(0, 12);
        let handle = wal.data.clone();
        let mut flush = boxed(handle.flush_until_async(Lsn(11)));
        assert!(wal.bed.poll_once(flush.as_mut()).is_pending());
        wal.bed.settle();
        assert_eq!(wal.gate.wanted_lsn(), Some(Lsn(12)), "page 0's last number");
        wal.gate.advance_durable_lsn(Lsn(12)).unwrap();
        wal.bed.run(flush).unwrap();
        assert_eq!(wal.written(), [0]);
        assert_eq!(wal.dirty(), 1);
    }
}

#[test]
fn wb45_the_oldest_number_holds_through_failures_and_while_writes_are_in_flight() {
    for mut wal in Wal::each(options(64)) {
        wal.gate.advance_durable_lsn(Lsn(1000)).unwrap();
        assert_eq!(wal.bed.run(wal.data.oldest_dirty_lsn_async()).unwrap(), None);
        for i in 0..5 {
            wal.write(spread(i), 10 + i);
        }
        let handle = wal.data.clone();
        let oldest = |wal: &mut Wal| wal.bed.run(handle.oldest_dirty_lsn_async()).unwrap();
        assert_eq!(oldest(&mut wal), Some(Lsn(10)));
        // In flight.
        wal.bed.fault(NvmOpcode::WRITE, 0, 5, Action::Delay(Duration::from_secs(1)));
        let mut sync = boxed(handle.sync_async());
        assert!(wal.bed.poll_once(sync.as_mut()).is_pending());
        wal.bed.settle();
        assert_eq!(wal.dirty(), 0);
        assert_eq!(oldest(&mut wal), Some(Lsn(10)));
        wal.bed.run(sync).unwrap();
        assert_eq!(oldest(&mut wal), None);
        // Failed, and stamped again afterwards.
        wal.write(spread(1), 50);
        wal.bed.fail(NvmOpcode::WRITE, 0, 1, fatal());
        wal.bed.run(handle.sync_async()).unwrap_err();
        assert_eq!(oldest(&mut wal), Some(Lsn(50)));
        wal.write(spread(1), 60);
        wal.write(spread(2), 55);
        assert_eq!(oldest(&mut wal), Some(Lsn(50)));
        wal.bed.run(handle.flush_until_async(Lsn(51))).unwrap();
        assert_eq!(oldest(&mut wal), Some(Lsn(55)));
        // Being changed: from the stamp on.
        let mut pin = wal.bed.run(handle.pin_mut_async(spread(4))).unwrap();
        pin.set_lsn(Lsn(40)).unwrap();
        let mut asked = boxed(handle.oldest_dirty_lsn_async());
        let answer = loop {
            if let Poll::Ready(answer) = wal.bed.poll_once(asked.as_mut()) {
                break answer.unwrap();
            }
            wal.bed.step();
        };
        assert_eq!(answer, Some(Lsn(40)));
        drop(pin);
        // Thrown away.
        wal.bed.run(handle.discard_async(0..5000 * PAGE)).unwrap();
        assert_eq!(oldest(&mut wal), None);
        wal.bed.assert_consistent();
    }
}

#[test]
fn wb45_what_is_below_the_oldest_number_is_durable_and_not_only_written() {
    for shards in [1, 3] {
        let mut wal = Wal::new(fragile(SIZE), EngineOptions { shards, ..options(64 * shards as u64) });
        wal.gate.advance_durable_lsn(Lsn(1000)).unwrap();
        wal.write(7, 10);
        wal.data.request_writeback();
        wal.bed.settle();
        assert_eq!((wal.written(), wal.dirty()), (vec![7], 0), "the flusher wrote it");
        assert_eq!(wal.bed.seen(NvmOpcode::FLUSH).len(), 0);
        assert_eq!(wal.bed.run(wal.data.oldest_dirty_lsn_async()).unwrap(), None);
        assert_eq!(wal.bed.seen(NvmOpcode::FLUSH).len(), 1, "only with this its log can go");
        wal.bed.run(wal.data.oldest_dirty_lsn_async()).unwrap();
        assert_eq!(wal.bed.seen(NvmOpcode::FLUSH).len(), 1, "nothing was written since");
        wal.write(8, 11);
        // Two commands: a single one would be written through.
        wal.write(10, 11);
        wal.bed.run(wal.data.flush_until_async(Lsn(12))).unwrap();
        assert_eq!(wal.bed.seen(NvmOpcode::FLUSH).len(), 2);
        wal.bed.crash(1);
        assert_eq!((wal.byte_on_device(7), wal.byte_on_device(8)), (10, 11));
    }
}

#[test]
fn wb45_a_checkpoint_costs_the_dirty_pages_and_not_the_mapping() {
    // 2 TiB of nothing: a walk over its pages would never end.
    let mut bed = Bed::new(EmulatedConfig::null(2 << 40, 512), options(64));
    let mapping = bed.mapping();
    let pages = mapping.pages();
    for (lsn, page) in [(3, 5), (2, pages / 2), (9, pages - 1)] {
        bed.run(mapping.write_at_lsn_async(page * PAGE, &[1; 4096], Lsn(lsn))).unwrap();
    }
    assert_eq!(bed.run(mapping.oldest_dirty_lsn_async()).unwrap(), Some(Lsn(2)));
    bed.run(mapping.flush_until_async(Lsn(4))).unwrap();
    assert_eq!(bed.run(mapping.oldest_dirty_lsn_async()).unwrap(), Some(Lsn(9)));
    assert_eq!(bed.seen(NvmOpcode::WRITE).len(), 2);
}
