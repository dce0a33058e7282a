//! The bytes of a stats page, version 1. Numbers are little-endian; all offsets and sizes are in bytes.
//!
//! ```text
//!  0                         80        header_bytes
//!  ├─────────────────────────┼──────────┬──┼───────────────┬───────────────┬───────────────┬──
//!  │ header                  │ texts    │0…│ shard 0, even │ shard 0, odd  │ shard 1, even │ …
//!  └─────────────────────────┴──────────┴──┴───────────────┴───────────────┴───────────────┴──
//!                                          │◄ record_bytes ►│
//!  header
//!   0  magic "FOLISTAT"        8  version = 1 (u32)        12  header_bytes (u32), a multiple of 64
//!  16  shards (u32)           20  record_bytes (u32)       24  words, values of a record (u32)
//!  28  pid (u32)              32  opened, ns since 1970 (u64)
//!  40  device_bytes (u32)     44  program_bytes (u32)      48  catalogue_bytes (u32)   52  0
//!  56  0 (u64)                64  0 (u64)                  72  checksum of the header up to here, and the texts
//!  texts: device, program, catalogue, in UTF-8, one behind the other
//!
//!  record
//!   0  sequence, from 1 on (u64)      8  time (u64)      16  values (u64 each)      …  checksum (u64)
//! ```
//!
//! **Whole records.** A shard writes its records by turns into two places: that of even sequence numbers, and that of odd
//! ones. A reader takes the newer of the two whose checksum is right. So it never waits for a writer, nor the writer for
//! it, and a process that is killed in the middle of a record leaves the one before.
//!
//! Everything here is pure; whoever decodes a page has read it into memory of its own before.

use std::ops::Range;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::catalogue::{self, Metric};

/// The first bytes of a page.
const MAGIC: [u8; 8] = *b"FOLISTAT";
/// The version that this file describes.
const VERSION: u32 = 1;
/// No page is larger.
pub(crate) const PAGE_BYTES_MAX: u64 = 64 << 20;
/// Texts longer than this are cut.
const TEXT_BYTES_MAX: usize = 256;
/// Sequence number, time and checksum.
const RECORD_WORDS_BESIDE: usize = 3;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    header_bytes: U32,
    shards: U32,
    record_bytes: U32,
    words: U32,
    pid: U32,
    opened_unix_ns: U64,
    device_bytes: U32,
    program_bytes: U32,
    catalogue_bytes: U32,
    reserved: [U32; 5],
    checksum: U64,
}

const HEADER_BYTES: usize = size_of::<RawHeader>();
const _: () = assert!(HEADER_BYTES == 80);

/// What a page says of the engine behind it, and how its records are laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub pid: u32,
    pub opened_unix_ns: u64,
    /// The device's name.
    pub device: String,
    /// The program's name.
    pub program: String,
    pub metrics: Vec<Metric>,
    pub shards: usize,
}

impl Header {
    /// Words of a record, with those beside the values.
    pub(crate) fn record_words(&self) -> usize {
        catalogue::words(&self.metrics) + RECORD_WORDS_BESIDE
    }

    fn record_bytes(&self) -> usize {
        self.record_words() * size_of::<u64>()
    }

    fn texts(&self) -> [String; 3] {
        let catalogue = self.metrics.iter().map(ToString::to_string).collect();
        [cut(&self.device), cut(&self.program), catalogue]
    }

    fn header_bytes(&self) -> usize {
        let texts: usize = self.texts().iter().map(String::len).sum();
        (HEADER_BYTES + texts).next_multiple_of(64)
    }

    /// Bytes of the whole page.
    pub(crate) fn page_bytes(&self) -> u64 {
        (self.header_bytes() + 2 * self.shards * self.record_bytes()) as u64
    }

    /// Where its records are.
    pub(crate) fn places(&self) -> RecordPlaces {
        RecordPlaces { first: self.header_bytes(), record_bytes: self.record_bytes() }
    }

    /// The header's bytes, up to the first record.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let [device, program, catalogue] = self.texts();
        let mut raw = RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            header_bytes: (self.header_bytes() as u32).into(),
            shards: (self.shards as u32).into(),
            record_bytes: (self.record_bytes() as u32).into(),
            words: (catalogue::words(&self.metrics) as u32).into(),
            pid: self.pid.into(),
            opened_unix_ns: self.opened_unix_ns.into(),
            device_bytes: (device.len() as u32).into(),
            program_bytes: (program.len() as u32).into(),
            catalogue_bytes: (catalogue.len() as u32).into(),
            reserved: [0.into(); 5],
            checksum: 0.into(),
        };
        let texts = [device, program, catalogue].concat();
        raw.checksum = checksum_of(&raw, texts.as_bytes()).into();
        let mut bytes = [raw.as_bytes(), texts.as_bytes()].concat();
        bytes.resize(self.header_bytes(), 0);
        bytes
    }

    /// What a page's bytes say; what is wrong with them otherwise. Whatever they are, nothing beyond them is touched.
    pub(crate) fn decode(page: &[u8]) -> Result<Self, String> {
        let wrong = |reason: &str| Err(reason.to_owned());
        let Ok((raw, rest)) = RawHeader::read_from_prefix(page) else {
            return wrong("it is shorter than the header of a stats page");
        };
        if raw.magic != MAGIC {
            return wrong("it is no stats page");
        }
        if raw.version.get() != VERSION {
            return Err(format!(
                "it is a stats page of version {}, and this program reads version {VERSION}; use the foliant that \
                 belongs to the engine",
                raw.version
            ));
        }
        let lengths =
            [raw.device_bytes, raw.program_bytes, raw.catalogue_bytes].map(|len| len.get() as usize);
        let mut texts = [""; 3];
        let mut at = 0usize;
        for (text, len) in texts.iter_mut().zip(lengths) {
            let bytes = at.checked_add(len).and_then(|end| rest.get(at..end));
            let Some(Ok(utf8)) = bytes.map(str::from_utf8) else {
                return wrong("its texts reach beyond its end, or aren't UTF-8");
            };
            *text = utf8;
            at += len;
        }
        if raw.checksum.get() != checksum_of(&raw, &rest[..at]) {
            return wrong("the checksum of its header is wrong");
        }
        let header = Self {
            pid: raw.pid.get(),
            opened_unix_ns: raw.opened_unix_ns.get(),
            device: printable(texts[0]),
            program: printable(texts[1]),
            metrics: catalogue::parse(texts[2])?,
            shards: raw.shards.get() as usize,
        };
        let record_bytes = header.record_bytes() as u64;
        let header_bytes = ((HEADER_BYTES + at) as u64).next_multiple_of(64);
        let records = (2 * header.shards as u64).saturating_mul(record_bytes);
        let sizes = (u64::from(raw.words.get()), u64::from(raw.record_bytes.get()));
        if sizes != (catalogue::words(&header.metrics) as u64, record_bytes)
            || u64::from(raw.header_bytes.get()) != header_bytes
            || header_bytes.saturating_add(records) != page.len() as u64
        {
            return wrong("its sizes contradict each other");
        }
        Ok(header)
    }
}

/// Where the records of a page are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecordPlaces {
    first: usize,
    record_bytes: usize,
}

impl RecordPlaces {
    /// The bytes of the record of a shard with this sequence number.
    pub(crate) fn of(&self, shard: usize, sequence: u64) -> Range<usize> {
        let begin = self.first + (2 * shard + (sequence % 2) as usize) * self.record_bytes;
        begin..begin + self.record_bytes
    }
}

/// A text of the page, cut to what there is room for.
fn cut(text: &str) -> String {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

/// A text that can do no harm to a terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect()
}

/// One record of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub sequence: u64,
    pub time_ns: u64,
    pub values: Vec<u64>,
}

/// Makes a record of the words `sequence, time, values…, 0`: the last becomes the checksum. Allocates nothing.
pub(crate) fn seal(words: &mut [U64]) {
    if let Some((last, before)) = words.split_last_mut() {
        *last = checksum(before.as_bytes(), OFFSET).into();
    }
}

/// The record in these bytes; `None` of one that is half written, or none.
pub(crate) fn open_record(bytes: &[u8]) -> Option<Record> {
    let (covered, last) = bytes.split_last_chunk::<8>()?;
    let (words, rest) = covered.as_chunks::<8>();
    let mut words = words.iter().map(|word| u64::from_le_bytes(*word));
    let (sequence, time_ns) = (words.next()?, words.next()?);
    let is_whole = sequence > 0 && rest.is_empty() && u64::from_le_bytes(*last) == checksum(covered, OFFSET);
    is_whole.then(|| Record { sequence, time_ns, values: words.collect() })
}

/// Where a checksum starts (FNV-1a).
const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a over words of eight bytes, each mixed: against bytes that are half written, not against malice.
fn checksum(bytes: &[u8], start: u64) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let mix = |sum: u64, word: u64| {
        let sum = (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3);
        sum ^ sum >> 29
    };
    let sum = words.iter().fold(start, |sum, word| mix(sum, u64::from_le_bytes(*word)));
    rest.iter().fold(sum, |sum, &byte| mix(sum, u64::from(byte)))
}

fn checksum_of(raw: &RawHeader, texts: &[u8]) -> u64 {
    let covered = &raw.as_bytes()[..HEADER_BYTES - size_of::<U64>()];
    checksum(texts, checksum(covered, OFFSET))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header {
            pid: 4711,
            opened_unix_ns: 1_700_000_000_000_000_000,
            device: "emu:ram?size=1GiB".to_owned(),
            program: "postgres".to_owned(),
            metrics: catalogue::catalogue(),
            shards: 3,
        }
    }

    fn page() -> Vec<u8> {
        let header = header();
        let mut page = header.encode();
        page.resize(header.page_bytes() as usize, 0);
        page
    }

    fn record(sequence: u64, values: usize) -> Vec<u8> {
        let mut words = vec![U64::new(0); values + RECORD_WORDS_BESIDE];
        words[0] = sequence.into();
        words.iter_mut().skip(1).enumerate().for_each(|(index, word)| *word = (index as u64 * 7).into());
        seal(&mut words);
        words.as_bytes().to_vec()
    }

    #[test]
    fn a_header_reads_back_as_it_was_written() {
        assert_eq!(Header::decode(&page()).unwrap(), header());
    }

    #[test]
    fn texts_that_are_too_long_are_cut_and_control_characters_never_reach_a_terminal() {
        let long = Header { device: "ä".repeat(300), program: "a\x1b[2J".to_owned(), ..header() };
        let mut page = long.encode();
        page.resize(long.page_bytes() as usize, 0);
        let read = Header::decode(&page).unwrap();
        assert_eq!((read.device.len(), read.program.as_str()), (256, "a\u{FFFD}[2J"));
    }

    #[test]
    fn another_version_and_another_file_are_told_apart() {
        let mut newer = page();
        newer[8] = 2;
        assert!(Header::decode(&newer).unwrap_err().contains("version 2"));
        assert!(Header::decode(b"#!/bin/sh").unwrap_err().contains("shorter"));
        assert!(Header::decode(&[0; 4096]).unwrap_err().contains("no stats page"));
    }

    #[test]
    fn a_record_reads_back_and_no_bit_of_it_can_change_unseen() {
        let bytes = record(9, 5);
        let opened = open_record(&bytes).unwrap();
        assert_eq!((opened.sequence, opened.values.len()), (9, 5));
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open_record(&changed), None, "bit {bit}");
        }
        assert_eq!(open_record(&vec![0; bytes.len()]), None, "a place that nobody has written to");
    }

    #[test]
    fn a_record_that_is_half_old_and_half_new_is_none() {
        let (old, new) = (record(7, 40), record(9, 40));
        for at in (8..old.len()).step_by(8) {
            let torn = [&new[..at], &old[at..]].concat();
            assert!(open_record(&torn).is_none(), "torn at {at}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_whatever_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
            prop_assert!(Header::decode(&bytes).is_err());
            prop_assert!(open_record(&bytes).is_none());
        }

        #[test]
        fn a_page_with_some_bytes_changed_is_refused_or_read_within_its_bounds(
            changes in prop::collection::vec((0usize..9000, any::<u8>()), 1..8), end in 0usize..20_000
        ) {
            let mut page = page();
            let last = page.len() - 1;
            changes.iter().for_each(|(at, byte)| page[(*at).min(last)] = *byte);
            page.truncate(end.max(1));
            if let Ok(header) = Header::decode(&page) {
                prop_assert!(header.shards == 0 || header.places().of(header.shards - 1, 1).end <= page.len());
            }
        }
    }
}
