//! What a run is made of, as data: a device, an engine, and steps.
//!
//! Every number in a step is taken modulo what there is (handles, operations in flight, pages), so that any list of
//! steps is a valid run, and stays one when steps are taken out.

use std::ops::Range;
use std::time::Duration;

use foliant::{EngineOptions, MappingOptions, RetryPolicy};
use foliant_nvme_emulated::{EmulatedConfig, NamespaceConfig};

use crate::{fragile, options};

/// Bytes of a frame, and of the smallest page.
pub const FRAME: u64 = 4096;
/// Bytes of each of the two windows of a mapping that the model works on.
pub const WINDOW: u64 = 48 * FRAME;
/// Frames' worth of a mapping that the model works on.
pub const SPAN_FRAMES: u8 = (2 * WINDOW / FRAME) as u8;
/// Where the windows begin in the mapping: about the ends of its first and second stripe of 2 MiB, so that three shards
/// take part, and where pages of every size do.
const WINDOW_STARTS: [u64; 2] = [(512 - 32) * FRAME, (1024 - 32) * FRAME];
/// Bytes between the starts of two mappings.
pub const MAPPING_SPACE: u64 = 8 << 20;
/// Blocks of 512 bytes of which the last page exists where blocks are that small.
const TAIL_BLOCKS: u64 = 3;
/// The longest time that a request waits for what others hold.
pub const PIN_WAIT: Duration = Duration::from_secs(10);
/// The longest time that a command may stay with the device.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest time that a page is dirty before the flusher writes it.
pub const FLUSH_INTERVAL: Duration = Duration::from_secs(5);

/// A run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// Device and engine.
    pub setup: Setup,
    /// What is done with them.
    pub steps: Vec<Step>,
}

impl Case {
    /// A case that was written down.
    #[must_use]
    pub fn new(setup: Setup, steps: &[Step]) -> Self {
        Self { setup, steps: steps.to_vec() }
    }
}

/// Prints the case as it is written in `regressions.rs`.
impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "Case::new(\n    {:?},\n    &[", self.setup)?;
        for step in &self.steps {
            writeln!(f, "        {step:?},")?;
        }
        write!(f, "    ],\n)")
    }
}

/// A device and an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Shards: 1 or 3.
    pub shards: usize,
    /// Frames a shard.
    pub frames: u64,
    /// Mappings: 1 or 2.
    pub mappings: usize,
    /// Entries of each queue.
    pub queue_entries: u16,
    /// MDTS of the device, in powers of two of a page; 0 for none.
    pub mdts: u8,
    /// NOIOB of the device, in blocks; 0 for none.
    pub noiob_blocks: u16,
    /// AWUPF of the device, in blocks, zero-based.
    pub awupf_z: u16,
    /// Bytes a block: 512 or 4096.
    pub block_bytes: u32,
    /// Whether the device has a volatile write cache.
    pub write_cache: WriteCache,
    /// Share of frames, in percent, from which on the flusher writes.
    pub background_percent: u8,
    /// Share of frames, in percent, that may be dirty.
    pub dirty_percent: u8,
    /// Bytes that a handle reads ahead at most.
    pub readahead_bytes_max: u32,
    /// Who waits for retries.
    pub retry: RetryPolicy,
    /// Whether the first mapping is behind a gate.
    pub is_gated: bool,
    /// By mapping: the order of its pages, which have 4096 bytes shifted by it: 0, 2 or 4.
    pub orders: [u8; 2],
}

/// Whether completed writes may be lost with the power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteCache {
    /// They may, until a Flush.
    Volatile,
    /// They may not.
    None,
}

impl Setup {
    pub(crate) fn device(&self) -> EmulatedConfig {
        let size_bytes = MAPPING_SPACE * self.mappings as u64;
        EmulatedConfig {
            namespaces: vec![NamespaceConfig::new(size_bytes, self.block_bytes)],
            mdts: self.mdts,
            noiob_blocks: self.noiob_blocks,
            awupf_z: self.awupf_z,
            volatile_write_cache: self.write_cache == WriteCache::Volatile,
            ..fragile(size_bytes)
        }
    }

    pub(crate) fn engine(&self) -> EngineOptions {
        EngineOptions {
            shards: self.shards,
            queue_entries: self.queue_entries,
            dirty_background_percent: self.background_percent,
            dirty_percent: self.dirty_percent.max(self.background_percent + 1),
            pin_wait: PIN_WAIT,
            gate_wait: PIN_WAIT,
            flush_interval: FLUSH_INTERVAL,
            command_timeout: COMMAND_TIMEOUT,
            requests_max: 64,
            ..options(self.frames * self.shards as u64)
        }
    }

    pub(crate) fn mapping(&self, mapping: usize) -> MappingOptions {
        let last_page = self.pages(mapping) - 1;
        MappingOptions {
            namespace: 1,
            start_bytes: MAPPING_SPACE * mapping as u64,
            len_bytes: Some(self.file_offset_of(mapping, last_page) + self.page_bytes(mapping, last_page)),
            page_bytes: self.page_len(mapping) as u32,
            readahead_bytes_max: self.readahead_bytes_max,
            retry: self.retry,
            ..Default::default()
        }
    }

    /// Bytes from a page of a mapping to the next.
    pub(crate) fn page_len(&self, mapping: usize) -> u64 {
        FRAME << self.orders[mapping]
    }

    /// Pages of a mapping that the model works on.
    pub(crate) fn pages(&self, mapping: usize) -> usize {
        (2 * WINDOW / self.page_len(mapping)) as usize
    }

    /// Bytes of a page of the model: the last of a mapping may be short.
    pub(crate) fn page_bytes(&self, mapping: usize, page: usize) -> u64 {
        let is_short =
            self.orders[mapping] == 0 && self.block_bytes == 512 && page + 1 == self.pages(mapping);
        if is_short { TAIL_BLOCKS * 512 } else { self.page_len(mapping) }
    }

    /// The page of the model in which a step's page lies, which is counted in frames.
    pub(crate) fn page_of(&self, mapping: usize, frame: u8) -> usize {
        usize::from(frame % SPAN_FRAMES) >> self.orders[mapping]
    }

    /// Bytes between whose multiples a page's commands may be cut.
    fn cut_bytes(&self, mapping: usize) -> u64 {
        let boundary = u64::from(self.noiob_blocks) * u64::from(self.block_bytes);
        let boundary = if boundary == 0 { u64::MAX } else { 1 << boundary.trailing_zeros() };
        let transfer = if self.mdts == 0 { u64::MAX } else { FRAME << self.mdts };
        boundary.min(transfer).min(self.page_len(mapping))
    }

    /// Whether a limit of the device runs through pages, so that one page may take several commands.
    pub(crate) fn splits_pages(&self, mapping: usize) -> bool {
        self.cut_bytes(mapping) < self.page_len(mapping)
    }

    /// Bytes that survive a power cut whole or not at all: what one command carries of an atomic unit.
    pub(crate) fn unit_bytes(&self, mapping: usize) -> u64 {
        (u64::from(self.block_bytes) * (u64::from(self.awupf_z) + 1)).min(self.cut_bytes(mapping))
    }

    /// Bytes of the model from `at` on, at most `len` of them, within one window and within the mapping.
    pub(crate) fn clip(&self, mapping: usize, at: u32, len: u32) -> Range<u64> {
        let at = u64::from(at) % (2 * WINDOW);
        let last = self.pages(mapping) - 1;
        let end = last as u64 * self.page_len(mapping) + self.page_bytes(mapping, last);
        let window_end = if at < WINDOW { WINDOW } else { end };
        let at = at.min(window_end - 1);
        at..(at + u64::from(len.max(1))).min(window_end)
    }

    /// Where a page of the model begins in its mapping.
    pub(crate) fn file_offset_of(&self, mapping: usize, page: usize) -> u64 {
        file_offset(page as u64 * self.page_len(mapping))
    }

    /// The stripe in which a page lies, with its mapping; of a single shard all are one.
    pub(crate) fn stripe_of(&self, mapping: usize, page: usize) -> (usize, u64) {
        let stripe = self.file_offset_of(mapping, page) / (512 * FRAME);
        if self.shards == 1 { (0, 0) } else { (mapping, stripe) }
    }

    /// Which shard has a page, counted from the one that has the mapping's first.
    pub(crate) fn shard_of(&self, mapping: usize, page: usize) -> usize {
        (self.file_offset_of(mapping, page) / (512 * FRAME)) as usize % self.shards
    }

    /// The page of the mapping that a page of the model is.
    pub(crate) fn file_page(&self, mapping: usize, page: usize) -> u64 {
        self.file_offset_of(mapping, page) / self.page_len(mapping)
    }

    /// Where a page of the model begins on the device.
    pub(crate) fn device_offset_of(&self, mapping: usize, page: usize) -> u64 {
        MAPPING_SPACE * mapping as u64 + self.file_offset_of(mapping, page)
    }

    /// Mapping and page of the model at a byte of the device; `None` outside.
    pub(crate) fn page_at(&self, device_byte: u64) -> Option<(usize, usize)> {
        let (mapping, byte) = ((device_byte / MAPPING_SPACE) as usize, device_byte % MAPPING_SPACE);
        WINDOW_STARTS.iter().enumerate().find_map(|(window, &start)| {
            let within = byte.checked_sub(start).filter(|&within| within < WINDOW)?;
            Some((mapping, ((window as u64 * WINDOW + within) / self.page_len(mapping)) as usize))
        })
    }

    /// The pages of the model that a range of its bytes touches.
    pub(crate) fn pages_of(&self, mapping: usize, range: &Range<u64>) -> Range<usize> {
        let len = self.page_len(mapping);
        (range.start / len) as usize..range.end.div_ceil(len) as usize
    }

    /// A range of the model's bytes page by page: the page, the first byte within it, and which part of the range that is.
    pub(crate) fn parts(
        &self,
        mapping: usize,
        range: &Range<u64>,
    ) -> impl Iterator<Item = (usize, usize, Range<usize>)> + use<> {
        let (start, end, len) = (range.start, range.end, self.page_len(mapping));
        self.pages_of(mapping, range).map(move |page| {
            let page_start = page as u64 * len;
            let from = page_start.max(start);
            let to = (page_start + len).min(end);
            (page, (from - page_start) as usize, (from - start) as usize..(to - start) as usize)
        })
    }
}

/// Where a byte of the model lies in its mapping.
pub(crate) fn file_offset(at: u64) -> u64 {
    WINDOW_STARTS[(at / WINDOW) as usize] + at % WINDOW
}

/// What a run does next. `on` is a handle, `op` an operation in flight counted from the newest, `at` and `len` are bytes of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "what the fields are is said once, above")]
pub enum Step {
    /// Starts a write.
    Write { on: u8, at: u32, len: u32 },
    /// Starts a write within one frame that would rather fail than wait for dirty memory to shrink.
    TryWrite { on: u8, at: u32, len: u32 },
    /// Four reads, one after the other and side by side.
    Scan { on: u8, at: u32, len: u32 },
    /// Asks for pages to be read ahead.
    Prefetch { on: u8, at: u32, len: u32 },
    /// Starts a pass; `budget` in pages of 4096 bytes, 0 for none; of `put_off` + 1 pages its callback puts one off, 0 for no
    /// callback.
    Pass { on: u8, how: How, budget: u8, put_off: u8 },
    /// Starts a write that carries the next log sequence number.
    WriteLsn { on: u8, at: u32, len: u32 },
    /// Declares the log durable, but for its newest `behind` numbers.
    Advance { behind: u8 },
    /// Starts a `flush_until` of a number that is so far behind the next one.
    FlushUntil { on: u8, behind: u8 },
    /// Asks for the oldest number that is dirty.
    Oldest { on: u8 },
    /// Starts a read.
    Read { on: u8, at: u32, len: u32 },
    /// Asks for a shared pin, held until it is released.
    Pin { on: u8, page: u8 },
    /// Asks for an exclusive pin, held until it is released; its holder changes so many bytes.
    PinMut { on: u8, page: u8, change: u16 },
    /// Starts a sync of the whole mapping.
    Sync { on: u8 },
    /// Starts a sync of a range.
    SyncRange { on: u8, at: u32, len: u32 },
    /// Starts a discard.
    Discard { on: u8, at: u32, len: u32 },
    /// Clones a handle.
    Clone { on: u8 },
    /// Drops a handle.
    Drop { on: u8 },
    /// Opens a mapping, perhaps once more.
    Open { mapping: u8 },
    /// Starts closing a handle's mapping.
    Close { on: u8 },
    /// Lets a pin go, the first that is held from this one on.
    Release { op: u8 },
    /// Polls an operation.
    Poll { op: u8 },
    /// Drops the future of an operation.
    Abandon { op: u8 },
    /// Drives everything until an operation has ended.
    Finish { op: u8 },
    /// One step of one shard.
    Shard { shard: u8 },
    /// Polls shards and operations until nothing happens any more; the clock stands.
    Settle,
    /// Lets time pass.
    Time { us: u32 },
    /// Injects a fault.
    Fault(Trouble),
    /// Takes all faults back. A device that has stopped stays so.
    Mend,
    /// Cuts the power, and goes on with a new engine on what survived.
    Cut { seed: u16, notice: Notice },
    /// The process dies, the device doesn't: goes on with a new engine.
    Kill,
}

/// Kinds of passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// In the background, from where the last one stopped.
    Cyclic,
    /// In the background, over everything.
    Whole,
    /// In the background, over everything that is dirty when it begins.
    Tagged,
    /// A sync.
    Integrity,
}

/// Whether the engine lives on for a while after the power was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// It is gone at once.
    No,
    /// It finds its device gone, and has to end everything with an error.
    Yes,
}

/// Kinds of I/O commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Flush.
    Flush,
    /// Write Zeroes.
    WriteZeroes,
}

impl Command {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Flush, Self::WriteZeroes];
}

/// A fault as a step injects it: after `skip` commands of its kind, on the next `times`; `late_us` says how late a command
/// fails that is carried out, 0 for one that fails at once and isn't.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "what the fields are is said once, above")]
pub enum Trouble {
    /// Writes fail, and may be tried again.
    WriteTransient { skip: u8, times: u8 },
    /// Writes fail for good, at once or, though carried out, after a while.
    WriteFatal { skip: u8, times: u8, late_us: u32 },
    /// A block can't be written, ever.
    Media { mapping: u8, page: u8 },
    /// Reads fail.
    Read { skip: u8, times: u8 },
    /// A flush fails, at once or after a while.
    Flush { skip: u8, late_us: u32 },
    /// Write Zeroes fails, at once or, though carried out, after a while.
    Zeroes { skip: u8, times: u8, late_us: u32 },
    /// Commands take their time.
    Delay { command: Command, skip: u8, times: u8, us: u32 },
    /// A command is lost inside the device.
    Lose { command: Command, skip: u8 },
    /// The device takes commands, and never answers one again.
    Stop,
}
