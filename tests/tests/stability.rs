//! Stable pages, and mappings that do without them (WB-25).

use std::pin::pin;
use std::time::Duration;

use foliant::{EngineOptions, Error, Mapping, MappingOptions, Stability};
use foliant_nvme_emulated::{Action, EmulatedConfig};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use foliant_tests::{Bed, fragile, options};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

fn beds(config: &EmulatedConfig) -> impl Iterator<Item = Bed> {
    [1, 3]
        .into_iter()
        .map(|shards| Bed::new(config.clone(), EngineOptions { shards, ..options(512 * shards as u64) }))
}

fn ram() -> EmulatedConfig {
    EmulatedConfig::ram(16 * MIB, 512)
}

fn open(bed: &mut Bed, stability: Stability, page_bytes: u32) -> Mapping {
    let (len_bytes, capacity_bytes) = (Some(4 * MIB), Some(8 * MIB));
    bed.open(&MappingOptions { stability, page_bytes, len_bytes, capacity_bytes, ..Default::default() })
}

/// Dirties the first pages and lets the flusher begin a write of them that takes a second.
fn write_in_flight(bed: &mut Bed, mapping: &Mapping) {
    bed.run(mapping.write_at_async(0, &[1; 8 * PAGE as usize])).unwrap();
    bed.fault(NvmOpcode::WRITE, 0, 1, Action::Delay(Duration::from_secs(1)));
    bed.advance(Duration::from_secs(6));
    assert_eq!(bed.seen(NvmOpcode::WRITE).len(), 1, "in flight");
    assert_eq!(bed.engine().stats().writeback_pages, 8);
}

fn byte_on_device(bed: &Bed, page: u64) -> u8 {
    let mut byte = [0];
    bed.device.read_image(1, page * PAGE, &mut byte).unwrap();
    byte[0]
}

#[test]
fn wb25_a_writer_waits_for_a_page_that_the_device_reads() {
    for mut bed in beds(&ram()) {
        let mapping = open(&mut bed, Stability::Stable, 4096);
        write_in_flight(&mut bed, &mapping);
        let mut write = pin!(mapping.write_at_async(PAGE, &[2; 100]));
        for _ in 0..10 {
            assert!(bed.poll_once(write.as_mut()).is_pending());
            bed.advance(Duration::from_millis(50));
        }
        // The device takes the bytes when it gets the command, or later: here they are looked at when it has ended.
        bed.run(write).unwrap();
        assert_eq!(byte_on_device(&bed, 1), 1, "written as it was when its write began");
        bed.settle();
        bed.assert_consistent();
    }
}

#[test]
fn wb25_in_an_unstable_mapping_a_writer_does_not_wait_and_its_page_stays_dirty() {
    for page_bytes in [4096, 16_384] {
        for mut bed in beds(&ram()) {
            let mapping = open(&mut bed, Stability::Unstable, page_bytes);
            write_in_flight(&mut bed, &mapping);
            // Some bytes of a page, and pages as a whole; twice, so that it meets what is dirty and in flight.
            for value in [2, 3] {
                let data = [value; 4 * PAGE as usize];
                let mut part = pin!(mapping.write_at_async(PAGE + 3, &data[..100]));
                assert!(bed.poll_once(part.as_mut()).is_ready(), "at once, without asking the shard");
                let mut whole = pin!(mapping.write_at_async(4 * PAGE, &data));
                assert!(bed.poll_once(whole.as_mut()).is_ready());
            }
            let stats = bed.engine().stats();
            let dirty = if page_bytes == 4096 { 5 } else { 8 };
            assert_eq!((stats.dirty_pages, stats.writeback_pages), (dirty, 8), "dirty again in flight");
            bed.assert_consistent();
            // A pin isn't for changes beside the device.
            let mut pinned = pin!(mapping.pin_mut_async(0));
            assert!(bed.poll_once(pinned.as_mut()).is_pending());
            bed.settle();
            assert!(bed.poll_once(pinned.as_mut()).is_pending());
            bed.advance(Duration::from_secs(2));
            drop(bed.run(pinned).unwrap());
            let stats = bed.engine().stats();
            assert_eq!(
                (stats.dirty_pages, stats.writeback_pages),
                (dirty, 0),
                "the end of writeback leaves DIRTY"
            );
            bed.assert_consistent();
            bed.run(mapping.sync_async()).unwrap();
            let mut bytes = [0; 8 * PAGE as usize];
            bed.device.read_image(1, 0, &mut bytes).unwrap();
            let mut wanted = [1; 8 * PAGE as usize];
            wanted[PAGE as usize + 3..][..100].fill(3);
            wanted[4 * PAGE as usize..].fill(3);
            assert!(bytes == wanted);
            assert_eq!(bed.engine().stats().dirty_pages, 0);
            bed.assert_consistent();
        }
    }
}

#[test]
fn wb25_a_page_dirtied_beside_a_write_that_fails_is_told_of_and_written_anew() {
    for mut bed in beds(&ram()) {
        for dnr in [true, false] {
            let mapping = open(&mut bed, Stability::Unstable, 4096);
            bed.run(mapping.write_at_async(0, &[1; 2 * PAGE as usize])).unwrap();
            bed.device.clear_faults();
            let status = Status::of(StatusCode::WRITE_FAULT).with_dnr(dnr);
            bed.fault(NvmOpcode::WRITE, 0, 1, Action::FailLate { delay: Duration::from_secs(1), status });
            mapping.request_writeback();
            bed.settle();
            bed.run(mapping.write_at_async(0, &[2; 10])).unwrap();
            assert_eq!(bed.engine().stats().writeback_pages, 2, "in flight");
            bed.assert_consistent();
            bed.advance(Duration::from_secs(2));
            bed.assert_consistent();
            let told = bed.run(mapping.sync_async());
            assert!(dnr == told.is_err(), "{told:?}");
            bed.run(mapping.sync_async()).unwrap();
            assert_eq!((byte_on_device(&bed, 0), byte_on_device(&bed, 1)), (2, 1));
            assert_eq!(bed.engine().stats().dirty_pages, 0);
            bed.assert_consistent();
            bed.run(mapping.close_async()).unwrap();
        }
    }
}

#[test]
fn wb25_an_unstable_mapping_grows_and_shrinks_as_any_other() {
    for mut bed in beds(&fragile(16 * MIB)) {
        let mapping = open(&mut bed, Stability::Unstable, 16_384);
        bed.run(mapping.set_len_async(20_000)).unwrap();
        bed.run(mapping.write_at_async(0, &[1; 20_000])).unwrap();
        bed.fault(NvmOpcode::WRITE, 0, 1, Action::Delay(Duration::from_secs(1)));
        bed.advance(Duration::from_secs(6));
        // Appending to a page that the device reads waits: a pass makes zeros behind the end.
        let mut append = pin!(mapping.append_async(&[2; 100]));
        assert!(bed.poll_once(append.as_mut()).is_pending());
        bed.settle();
        assert!(bed.poll_once(append.as_mut()).is_pending());
        assert_eq!(bed.run(append).unwrap(), 20_000);
        bed.run(mapping.sync_async()).unwrap();
        bed.crash(7);
        bed.power_on();
        let mapping = open(&mut bed, Stability::Unstable, 16_384);
        let mut bytes = vec![9; 32_768];
        bed.run(mapping.read_at_async(0, &mut bytes)).unwrap();
        assert!(bytes[..20_000].iter().all(|&byte| byte == 1) && bytes[20_000..20_100] == [2; 100]);
        assert!(bytes[20_100..].iter().all(|&byte| byte == 0));
        bed.assert_consistent();
    }
}

#[test]
fn an_unstable_mapping_has_no_gate_and_all_its_handles_are_unstable() {
    let mut bed = Bed::new(ram(), options(256));
    let gate = bed.engine().gate("log");
    let gated = MappingOptions { gate: Some(gate), stability: Stability::Unstable, ..Default::default() };
    let error = bed.try_open(&gated).unwrap_err();
    assert!(matches!(error, Error::Mapping { .. }) && error.to_string().contains("gate"), "{error}");
    let _mapping = open(&mut bed, Stability::Unstable, 4096);
    let stable = MappingOptions { len_bytes: Some(8 * MIB), ..Default::default() };
    let error = bed.try_open(&stable).unwrap_err();
    assert!(error.to_string().contains("Unstable"), "{error}");
}
