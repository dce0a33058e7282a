//! Batches: scattered reads and hints, what the device sees of them, and what becomes of those that are given up.

use std::io::{IoSlice, IoSliceMut};
use std::pin::pin;
use std::time::Duration;

use foliant::{EngineOptions, Error, Mapping, MappingOptions, ReadAt};
use foliant_nvme_emulated::{Action, EmulatedConfig, Fault, Latency, Match};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use foliant_tests::{Bed, options};

const PAGES: u64 = 4096;

fn ram() -> EmulatedConfig {
    EmulatedConfig::ram(PAGES * 4096, 512)
}

/// Beds with one and with three shards, and a mapping each whose pages carry their numbers and aren't cached.
fn beds(frames: u64) -> [(Bed, Mapping); 2] {
    beds_of(frames, &MappingOptions::default())
}

fn beds_of(frames: u64, mapped: &MappingOptions) -> [(Bed, Mapping); 2] {
    [1, 3].map(|shards| {
        let config = EmulatedConfig { latency: Latency::uniform(Duration::from_micros(80)), ..ram() };
        let mut bed = Bed::new(config, EngineOptions { shards, ..options(frames * shards as u64) });
        let mapping = fresh(&mut bed, mapped);
        (bed, mapping)
    })
}

/// Opens a mapping, numbers its pages of 4096 bytes, and drops them from the cache.
fn fresh(bed: &mut Bed, mapped: &MappingOptions) -> Mapping {
    let mapping = bed.open(mapped);
    let mut bytes = vec![0; mapping.len() as usize];
    for (page, bytes) in (0u64..).zip(bytes.chunks_mut(4096)) {
        bytes[..8].copy_from_slice(&page.to_le_bytes());
        bytes[4088..].copy_from_slice(&(!page).to_le_bytes());
    }
    bed.run(mapping.write_at_async(0, &bytes)).unwrap();
    bed.run(mapping.close_async()).unwrap();
    let mapping = bed.open(mapped);
    bed.settle();
    bed.clear_seen();
    mapping
}

/// Scattered pages, each once, in no order.
fn scattered(count: u64) -> Vec<u64> {
    (0..count).map(|i| (i * 1201 + 17) % (PAGES / 2) * 2).collect()
}

/// Whole pages of 4096 bytes, and which they are to be.
struct Pages {
    pages: Vec<u64>,
    bytes: Vec<[u8; 4096]>,
}

impl Pages {
    fn new(pages: Vec<u64>) -> Self {
        let bytes = vec![[0xEE; 4096]; pages.len()];
        Self { pages, bytes }
    }

    fn reads(&mut self) -> Vec<ReadAt<'_>> {
        let reads = self.pages.iter().zip(&mut self.bytes);
        reads.map(|(page, bytes)| ReadAt::new(page * 4096, bytes)).collect()
    }

    fn is_read(&self, at: usize) -> bool {
        let (page, bytes) = (self.pages[at], &self.bytes[at]);
        bytes[..8] == page.to_le_bytes() && bytes[4088..] == (!page).to_le_bytes()
    }

    fn check(&self) {
        for at in 0..self.pages.len() {
            assert!(self.is_read(at), "page {}: {:?}", self.pages[at], &self.bytes[at][..8]);
        }
    }
}

fn read_commands(bed: &Bed) -> usize {
    bed.seen(NvmOpcode::READ).len()
}

fn read_all(bed: &mut Bed, mapping: &Mapping, pages: Vec<u64>) {
    let mut wanted = Pages::new(pages);
    bed.run(mapping.read_many_async(&mut wanted.reads())).unwrap();
    wanted.check();
}

#[test]
fn a_batch_of_scattered_pages_is_with_the_device_at_one_doorbell_a_shard() {
    for (mut bed, mapping) in beds(256) {
        let shards = bed.engine().shards() as u64;
        let before = bed.engine().stats();
        let mut wanted = Pages::new(scattered(48));
        {
            let mut reads = wanted.reads();
            let mut batch = pin!(mapping.read_many_async(&mut reads));
            assert!(bed.poll_once(batch.as_mut()).is_pending());
            bed.step();
            bed.step();
            assert_eq!(read_commands(&bed), 48, "all of it, before anything has come back");
            bed.run(batch).unwrap();
        }
        wanted.check();
        let stats = bed.engine().stats();
        assert_eq!(stats.doorbells - before.doorbells, shards);
        assert_eq!(stats.requests - before.requests, shards, "a message a shard");
        assert_eq!((stats.read_commands - before.read_commands, stats.pages_read), (48, 48));
        assert_eq!(stats.readahead_pages, 0, "only what was asked for");
        // Now they are hits.
        read_all(&mut bed, &mapping, wanted.pages);
        assert_eq!(read_commands(&bed), 48);
        bed.assert_consistent();
    }
}

#[test]
fn neighbours_in_a_batch_are_one_command_in_whatever_order_they_are_named() {
    for (mut bed, mapping) in beds(256) {
        read_all(&mut bed, &mapping, vec![103, 7, 101, 200, 100, 102]);
        let mut seen: Vec<_> =
            bed.seen(NvmOpcode::READ).iter().map(|seen| (seen.slba / 8, seen.blocks / 8)).collect();
        seen.sort_unstable();
        assert_eq!(seen, [(7, 1), (100, 4), (200, 1)]);
    }
}

#[test]
fn pages_named_twice_and_reads_of_any_length_are_delivered_and_read_once() {
    for (mut bed, mapping) in beds(256) {
        let image: Vec<u8> = {
            let mut image = vec![0; (PAGES * 4096) as usize];
            bed.device.read_image(1, 0, &mut image).unwrap();
            image
        };
        let places = [
            (5, 3),
            (4090, 12),
            (4095, 8200),
            (40_960, 4096),
            (40_961, 10),
            (2_000_000, 0),
            (3_000_001, 300_000),
        ];
        let mut buffers: Vec<Vec<u8>> = places.iter().map(|&(_, len)| vec![0xEE; len]).collect();
        let mut reads: Vec<ReadAt<'_>> =
            places.iter().zip(&mut buffers).map(|(&(offset, _), buf)| ReadAt::new(offset, buf)).collect();
        bed.run(mapping.read_many_async(&mut reads)).unwrap();
        for (read, (offset, len)) in reads.iter().zip(places) {
            assert!(read.is_done() && read.error().is_none());
            assert!(
                read.bytes() == &image[offset as usize..offset as usize + len],
                "{len} bytes at {offset}"
            );
        }
        let pages: u64 = bed.seen(NvmOpcode::READ).iter().map(|seen| u64::from(seen.blocks / 8)).sum();
        assert_eq!(pages, 4 + 1 + 74);
        bed.run(mapping.read_many_async(&mut [])).unwrap();
    }
}

#[test]
fn large_pages_come_whole() {
    let mapped = MappingOptions { page_bytes: 16_384, ..Default::default() };
    for (mut bed, mapping) in beds_of(256, &mapped) {
        // Parts of pages of 16 KiB: each is brought in as a whole, by one command.
        read_all(&mut bed, &mapping, vec![401, 9, 10, 2001, 402]);
        let mut seen: Vec<_> =
            bed.seen(NvmOpcode::READ).iter().map(|seen| (seen.slba / 8, seen.blocks / 8)).collect();
        seen.sort_unstable();
        assert_eq!(seen, [(8, 4), (400, 4), (2000, 4)]);
        read_all(&mut bed, &mapping, vec![400, 403, 8, 11, 2003]);
        assert_eq!(read_commands(&bed), 3);
        bed.assert_consistent();
    }
}

#[test]
fn a_batch_larger_than_the_cache_and_the_queue_passes_through_in_pieces() {
    for frames in [32, 40, 130] {
        for (mut bed, mapping) in beds(frames) {
            for _ in 0..2 {
                read_all(&mut bed, &mapping, scattered(1000));
            }
            assert_eq!(bed.engine().stats().command_errors, 0);
            bed.assert_consistent();
        }
    }
}

#[test]
fn batches_that_compete_for_few_frames_and_few_slots_all_end() {
    for (shards, requests_max) in [(1, 3), (3, 3), (1, 64)] {
        let wanted = EngineOptions { shards, requests_max, ..options(48 * shards as u64) };
        let mut bed = Bed::new(ram(), wanted);
        let mapping = fresh(&mut bed, &MappingOptions::default());
        let mut wanted: Vec<Pages> = (0..4).map(|at| Pages::new(scattered(300 + 50 * at))).collect();
        {
            let mut reads: Vec<_> = wanted.iter_mut().map(Pages::reads).collect();
            let batches = reads.iter_mut().map(|reads| Box::pin(mapping.read_many_async(reads)));
            let mut batches: Vec<_> = batches.map(Some).collect();
            let all = std::future::poll_fn(|context| {
                for batch in &mut batches {
                    if batch
                        .as_mut()
                        .is_some_and(|running| running.as_mut().poll(context).map(Result::unwrap).is_ready())
                    {
                        *batch = None;
                    }
                }
                if batches.iter().all(Option::is_none) {
                    std::task::Poll::Ready(())
                } else {
                    std::task::Poll::Pending
                }
            });
            bed.run(all);
        }
        wanted.iter().for_each(Pages::check);
        bed.assert_consistent();
    }
}

#[test]
fn a_page_that_cannot_be_read_is_named_and_all_others_are_delivered() {
    for (mut bed, mapping) in beds(256) {
        let pages = scattered(64);
        let bad = [pages[20], pages[41]];
        for page in bad {
            let matching = Match::io(NvmOpcode::READ).touching(page * 8, page * 8 + 7);
            let status = Status::of(StatusCode::UNRECOVERED_READ_ERROR).with_dnr(true);
            bed.device.inject(Fault { matching, action: Action::Status(status) });
        }
        let mut wanted = Pages::new(pages.clone());
        {
            let mut reads = wanted.reads();
            let error = bed.run(mapping.read_many_async(&mut reads)).unwrap_err();
            assert!(matches!(error, Error::Device { offset, .. } if offset == bad[0] * 4096), "{error}");
            for read in &reads {
                let failed = bad.contains(&(read.offset() / 4096));
                assert_eq!((read.is_done(), read.error().is_some()), (!failed, failed));
                if let Some(error) = read.error() {
                    assert!(matches!(error, Error::Device { offset, .. } if *offset == read.offset()));
                }
            }
        }
        for (at, page) in pages.iter().enumerate() {
            assert_eq!(wanted.is_read(at), !bad.contains(page));
        }
        bed.assert_consistent();
        // The medium is well again: so are the pages.
        bed.device.clear_faults();
        read_all(&mut bed, &mapping, pages);
    }
}

#[test]
fn a_batch_beyond_the_end_or_of_a_closed_mapping_is_refused_before_anything_is_done() {
    for (mut bed, mapping) in beds(256) {
        let mut wanted = Pages::new(vec![5, 7, PAGES]);
        let error = bed.run(mapping.read_many_async(&mut wanted.reads())).unwrap_err();
        assert!(matches!(error, Error::OutOfRange { offset, .. } if offset == PAGES * 4096), "{error}");
        assert!(matches!(mapping.prefetch_many(&[5, PAGES, 6]), Err(Error::OutOfRange { .. })));
        bed.settle();
        assert_eq!((read_commands(&bed), wanted.bytes[0][0]), (0, 0xEE));
        let other = mapping.clone();
        bed.run(mapping.close_async()).unwrap();
        assert!(matches!(bed.run(other.read_many_async(&mut wanted.reads())), Err(Error::Closed)));
        assert!(matches!(other.pin_many(&[]), Err(Error::Closed)));
        assert!(matches!(other.prefetch_many(&[5]), Err(Error::Closed)));
    }
}

#[test]
fn a_batch_beside_a_close_ends_with_its_data_or_with_the_error() {
    for (mut bed, mapping) in beds(256) {
        let other = mapping.clone();
        let mut wanted = Pages::new(scattered(200));
        let read = {
            let mut reads = wanted.reads();
            let mut batch = pin!(other.read_many_async(&mut reads));
            assert!(bed.poll_once(batch.as_mut()).is_pending());
            bed.step();
            let mut close = pin!(mapping.close_async());
            assert!(bed.poll_once(close.as_mut()).is_pending());
            let read = bed.run(batch);
            bed.run(close).unwrap();
            read
        };
        match read {
            Ok(()) => wanted.check(),
            Err(error) => assert!(matches!(error, Error::Closed), "{error}"),
        }
        bed.assert_consistent();
    }
}

#[test]
fn pages_that_others_hold_keep_only_themselves_waiting() {
    for (mut bed, mapping) in beds(256) {
        let pages = scattered(64);
        let held = bed.run(mapping.pin_mut_async(pages[30])).unwrap();
        // One that is being made by a writer, too.
        let mut wanted = Pages::new(pages.clone());
        {
            let mut reads = wanted.reads();
            let mut batch = pin!(mapping.read_many_async(&mut reads));
            assert!(bed.poll_once(batch.as_mut()).is_pending());
            bed.advance(Duration::from_millis(1));
            assert!(bed.poll_once(batch.as_mut()).is_pending());
            // It holds nothing meanwhile: every other page can be had exclusively.
            for &page in pages.iter().filter(|&&page| page != pages[30]) {
                drop(mapping.pin_mut(page).unwrap());
            }
            drop(held);
            bed.run(batch).unwrap();
        }
        wanted.check();
        bed.assert_consistent();
    }
}

#[test]
fn a_batch_that_is_dropped_reads_no_more_and_gives_back_what_it_got() {
    for steps in [0, 1, 2, 3, 4, 6, 9, 13, 20, 40] {
        for (mut bed, mapping) in beds(200) {
            let shards = bed.engine().shards() as u64;
            {
                let mut wanted = Pages::new(scattered(400));
                let mut reads = wanted.reads();
                let mut batch = pin!(mapping.read_many_async(&mut reads));
                for step in 0..steps {
                    if bed.poll_once(batch.as_mut()).is_ready() {
                        break;
                    }
                    bed.step();
                    if step % 4 == 3 {
                        bed.pass_time(Duration::from_micros(40));
                    }
                }
            }
            let submitted = bed.engine().stats().read_commands;
            bed.advance(Duration::from_millis(2));
            bed.assert_consistent();
            let stats = bed.engine().stats();
            assert_eq!(stats.read_commands, submitted, "after {steps} steps");
            assert_eq!((stats.pages_read, read_commands(&bed) as u64), (submitted, submitted));
            // Every frame can be had, so no pin is left; and every slot.
            for page in 0..190 * shards / 3 {
                take(&mut bed, &mapping, page * 3);
            }
            read_all(&mut bed, &mapping, scattered(400));
            bed.run(mapping.close_async()).unwrap();
        }
    }
}

/// Has a page exclusively once.
fn take(bed: &mut Bed, mapping: &Mapping, page: u64) {
    drop(bed.run(mapping.pin_mut_async(page)).unwrap());
}

#[test]
fn a_read_that_is_dropped_before_it_is_submitted_is_not_submitted_and_one_that_others_joined_is() {
    for (mut bed, mapping) in beds(256) {
        // Still in the inbox.
        let installed = bed.engine().stats().folios_installed;
        for page in [1, 900, 1800] {
            let mut buf = [0; 4096];
            let mut read = pin!(mapping.read_at_async(page * 4096, &mut buf));
            assert!(bed.poll_once(read.as_mut()).is_pending());
        }
        bed.settle();
        let stats = bed.engine().stats();
        assert_eq!((read_commands(&bed), stats.requests_cancelled), (0, 3));
        assert_eq!(stats.folios_installed, installed);
        // In line behind a full queue: the device holds as many commands as it takes.
        let mut first = Pages::new((0..63).map(|at| at * 8).collect());
        let mut second = Pages::new(vec![8001 / 8, 9001 / 8]);
        let mut buf = [0; 4096];
        {
            let mut reads = first.reads();
            let mut full = pin!(mapping.read_many_async(&mut reads));
            assert!(bed.poll_once(full.as_mut()).is_pending());
            bed.step();
            let submitted = bed.engine().stats().read_commands;
            let mut joins = pin!(mapping.read_at_async(second.pages[1] * 4096, &mut buf));
            {
                let mut reads = second.reads();
                let mut given_up = pin!(mapping.read_many_async(&mut reads));
                assert!(bed.poll_once(given_up.as_mut()).is_pending());
                bed.step();
                assert!(bed.poll_once(joins.as_mut()).is_pending());
                bed.step();
            }
            if bed.engine().shards() == 1 {
                assert_eq!(bed.engine().stats().read_commands, submitted, "the queue is full");
            }
            bed.run(joins).unwrap();
            bed.run(full).unwrap();
        }
        first.check();
        assert_eq!(buf[..8], second.pages[1].to_le_bytes());
        bed.settle();
        let read_given_up = bed.seen(NvmOpcode::READ).iter().any(|seen| seen.slba / 8 == second.pages[0]);
        assert_eq!(read_given_up, bed.engine().shards() > 1, "where there was room it was submitted at once");
        bed.assert_consistent();
    }
}

#[test]
fn many_pins_are_had_with_one_doorbell_a_shard_in_the_order_in_which_they_are_named() {
    for (mut bed, mapping) in beds(256) {
        let shards = bed.engine().shards() as u64;
        let before = bed.engine().stats().doorbells;
        let mut pages = scattered(48);
        pages.extend([pages[3], pages[9] + 1, pages[9]]);
        let pins = bed.run(mapping.pin_many_async(&pages)).unwrap();
        assert_eq!(bed.engine().stats().doorbells - before, shards);
        for (pin, page) in pins.iter().zip(&pages) {
            assert_eq!((pin.len(), &pin[..8]), (4096, &page.to_le_bytes()[..]));
        }
        // They can be had beside each other, and their neighbours exclusively.
        let again = mapping.pin_many(&pages).unwrap();
        assert_eq!(again.len(), pages.len());
        take(&mut bed, &mapping, pages[4] + 1);
        drop((pins, again));
        pages.iter().for_each(|&page| take(&mut bed, &mapping, page));
        let beyond = bed.run(mapping.pin_many_async(&[1, PAGES]));
        assert!(matches!(beyond, Err(Error::OutOfRange { .. })));
        bed.assert_consistent();
    }
}

#[test]
fn many_pins_out_of_large_folios_are_each_of_their_page_alone() {
    for (mut bed, mapping) in beds(256) {
        let mut buf = vec![0; 32 * 4096];
        bed.run(mapping.read_at_async(64 * 4096, &mut buf)).unwrap();
        let pages: Vec<u64> = (64..96).rev().collect();
        let pins = bed.run(mapping.pin_many_async(&pages)).unwrap();
        for (pin, page) in pins.iter().zip(&pages) {
            assert_eq!(pin[..8], page.to_le_bytes());
        }
        drop(pins);
        assert_eq!(read_commands(&bed), 1);
        bed.assert_consistent();
    }
}

#[test]
fn who_waits_for_one_of_many_pins_holds_none_of_the_others() {
    for (mut bed, mapping) in beds(256) {
        let pages = scattered(40);
        let held = bed.run(mapping.pin_mut_async(pages[30])).unwrap();
        {
            let mut many = pin!(mapping.pin_many_async(&pages));
            for _ in 0..50 {
                assert!(bed.poll_once(many.as_mut()).is_pending());
                bed.step();
                bed.pass_time(Duration::from_micros(20));
            }
            for &page in pages.iter().filter(|&&page| page != pages[30]) {
                drop(mapping.pin_mut(page).unwrap());
            }
            drop(held);
            assert_eq!(bed.run(many).unwrap().len(), 40);
        }
        // Given up midway it holds nothing.
        {
            bed.run(mapping.discard_async(0..PAGES * 4096)).unwrap();
            let mut many = pin!(mapping.pin_many_async(&pages));
            assert!(bed.poll_once(many.as_mut()).is_pending());
            bed.advance(Duration::from_millis(1));
        }
        pages.iter().for_each(|&page| take(&mut bed, &mapping, page));
        bed.assert_consistent();
    }
}

#[test]
fn many_pins_that_do_not_fit_into_the_cache_end_with_an_error_and_pin_nothing() {
    let mut bed = Bed::new(ram(), EngineOptions { shards: 1, ..options(64) });
    let mapping = fresh(&mut bed, &MappingOptions::default());
    let error = bed.run(mapping.pin_many_async(&scattered(70))).unwrap_err();
    assert!(matches!(error, Error::CacheFull { .. }), "{error}");
    assert_eq!(bed.run(mapping.pin_many_async(&scattered(60))).unwrap().len(), 60);
}

#[test]
fn several_buffers_are_read_and_written_as_one() {
    for page_bytes in [4096, 16_384] {
        for (mut bed, mapping) in beds_of(256, &MappingOptions { page_bytes, ..Default::default() }) {
            let mut image = vec![0; (PAGES * 4096) as usize];
            bed.device.read_image(1, 0, &mut image).unwrap();
            let lens = [1, 0, 4095, 5000, 3, 100, 0, 12_288, 40_000, 1, 1, 1, 8191, 0];
            let total: usize = lens.iter().sum();
            for (round, offset) in
                [0, 1, 4095, 4096, 100_000, PAGES as usize * 4096 - total].into_iter().enumerate()
            {
                let data: Vec<u8> = (0..total).map(|at| (at * 7 + round + 1) as u8).collect();
                let mut rest = &data[..];
                let slices = lens.map(|len| {
                    let (slice, after) = rest.split_at(len);
                    rest = after;
                    IoSlice::new(slice)
                });
                bed.run(mapping.write_vectored_at_async(offset as u64, &slices)).unwrap();
                image[offset..offset + total].copy_from_slice(&data);
                let from = offset.saturating_sub(5000);
                let mut buffers = lens.map(|len| vec![0xEE; len]);
                let mut slices = buffers.each_mut().map(|buffer| IoSliceMut::new(buffer));
                bed.run(mapping.read_vectored_at_async(from as u64, &mut slices)).unwrap();
                assert!(buffers.concat() == image[from..from + total], "round {round}");
                // From the device, too.
                bed.run(mapping.clone().sync_async()).unwrap();
                let mut kept = vec![0; total];
                bed.device.read_image(1, offset as u64, &mut kept).unwrap();
                assert!(kept == data, "round {round}");
            }
            let beyond = bed.run(
                mapping.write_vectored_at_async(PAGES * 4096 - 1, &[IoSlice::new(&[1]), IoSlice::new(&[1])]),
            );
            assert!(matches!(beyond, Err(Error::OutOfRange { .. })));
            bed.assert_consistent();
        }
    }
}

#[test]
fn a_page_that_several_buffers_fill_is_not_read_and_one_that_several_read_is_read_once() {
    for (mut bed, mapping) in beds(256) {
        let data = [7; 4096];
        let slices = [
            IoSlice::new(&data[..1000]),
            IoSlice::new(&data[1000..]),
            IoSlice::new(&data),
            IoSlice::new(&data),
        ];
        bed.run(mapping.write_vectored_at_async(20 * 4096, &slices)).unwrap();
        assert_eq!((read_commands(&bed), bed.engine().stats().pages_created), (0, PAGES + 3));
        let mut buffers = [[0; 1024]; 64];
        let mut slices = buffers.each_mut().map(|buffer| IoSliceMut::new(buffer));
        bed.run(mapping.read_vectored_at_async(101 * 4096, &mut slices)).unwrap();
        for (page, buffers) in (101u64..).zip(buffers.chunks(4)) {
            assert_eq!(buffers[0][..8], page.to_le_bytes());
        }
        let pages: u64 = bed.seen(NvmOpcode::READ).iter().map(|seen| u64::from(seen.blocks / 8)).sum();
        assert_eq!(pages, 16);
        assert!(read_commands(&bed) <= 3, "{:?}", bed.seen(NvmOpcode::READ));
    }
}

#[test]
fn a_scattered_hint_reads_its_pages_with_one_doorbell_a_shard_and_nobody_waits() {
    for (mut bed, mapping) in beds(512) {
        let shards = bed.engine().shards() as u64;
        let before = bed.engine().stats();
        let mut pages = scattered(40);
        pages.extend([301, 303, 302, 301]);
        assert_eq!(mapping.prefetch_many(&pages).unwrap(), pages.len());
        bed.advance(Duration::from_millis(1));
        let stats = bed.engine().stats();
        assert_eq!(stats.doorbells - before.doorbells, shards);
        assert_eq!(stats.readahead_pages, 43);
        assert_eq!(read_commands(&bed), 41, "neighbours are one command");
        let mut wanted = Pages::new(pages);
        mapping.read_many(&mut wanted.reads()).unwrap();
        wanted.check();
        assert_eq!(read_commands(&bed), 41);
        bed.assert_consistent();
    }
}

#[test]
fn hints_are_bounded_and_leave_reply_slots_to_demand() {
    for (mut bed, mapping) in beds(256) {
        let pages = scattered(2000);
        let asked = mapping.prefetch_many(&pages).unwrap();
        let frames = bed.engine().stats().frames;
        assert!(asked > 0 && asked as u64 <= frames / 4, "{asked} of {frames}");
        // Nobody polls the shards: hints are refused in the end, and demand isn't.
        while mapping.prefetch_many(&pages[..64]).unwrap() > 0 {}
        read_all(&mut bed, &mapping, scattered(100));
        bed.advance(Duration::from_millis(2));
        assert!(mapping.prefetch_many(&pages[200..210]).unwrap() == 10, "the slots are free again");
        mapping.prefetch_many(&pages[300..330]).unwrap();
        bed.run(mapping.close_async()).unwrap();
        bed.assert_consistent();
    }
}

#[test]
fn who_owns_the_shard_waits_for_a_miss_by_polling_it() {
    let mut bed = Bed::new(ram(), EngineOptions { shards: 1, ..options(64) });
    let mapping = fresh(&mut bed, &MappingOptions::default());
    let mut buf = [0; 8];
    let mut now_ns = bed.now_ns();
    let mut clock = || {
        now_ns += 100;
        now_ns
    };
    let shard = bed.shard(0);
    shard.block_on(&mut clock, mapping.read_at_async(77 * 4096, &mut buf)).unwrap();
    assert_eq!(buf, 77u64.to_le_bytes());
    let pin = shard.block_on(&mut clock, mapping.pin_async(78)).unwrap();
    assert_eq!(pin[..8], 78u64.to_le_bytes());
    drop(pin);
    shard.block_on(&mut clock, mapping.sync_async()).unwrap();
}

#[test]
fn a_deadline_gives_a_blocking_read_up() {
    let mut bed = Bed::new(ram(), EngineOptions { shards: 1, ..options(64) });
    let mapping = fresh(&mut bed, &MappingOptions::default());
    let mut buf = [0; 8];
    // Nobody polls the shard.
    let deadline = std::time::Instant::now() + Duration::from_millis(1);
    assert!(foliant::block_until(deadline, mapping.read_at_async(9 * 4096, &mut buf)).is_none());
    bed.settle();
    assert_eq!((read_commands(&bed), bed.engine().stats().requests_cancelled), (0, 1));
    bed.run(mapping.read_at_async(4096, &mut buf)).unwrap();
    let deadline = std::time::Instant::now();
    assert!(
        foliant::block_until(deadline, mapping.read_at_async(4096, &mut buf)).is_some(),
        "a hit waits for nothing"
    );
    assert_eq!(buf, 1u64.to_le_bytes());
}
