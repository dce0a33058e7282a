//! How an engine is opened.

use crate::cache::frames::PAGE_BYTES;
use crate::error::{Error, Result};
use crate::mirror::MirrorDevice;
use crate::observe::StatsPage;
pub use foliant_nvme::Hugepages;
use std::time::Duration;

/// Who runs the shards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShardThreads {
    /// The engine spawns a thread a shard and lets the system place it.
    Floating,
    /// The engine spawns a thread a shard and pins shard *i* to the *i*-th of these cores. On a machine with several NUMA
    /// nodes the shard's memory is on the core's node.
    Pinned(Vec<usize>),
    /// As [`Pinned`](Self::Pinned), to the first of the cores that this process may run on: those of the device's NUMA
    /// node first, and those of other nodes only where its own are too few.
    NearDevice,
    /// Nobody: [`Engine::take_shards`](crate::Engine::take_shards) hands the shards out and the caller polls
    /// them from its own loop. Blocking calls then wait for ever unless another thread polls.
    Manual,
}

/// Options of [`Engine::open`](crate::Engine::open). The default suits a first try; every field is a limit that is
/// fixed at open.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Bytes of cache, all shards together; rounded down to whole frames. At least 32 frames (128 KiB) a shard.
    pub cache_bytes: u64,
    /// Shards wanted. The device may grant fewer queue pairs, and so fewer shards.
    pub shards: usize,
    /// Entries of each shard's submission and completion queue; the device may allow fewer.
    pub queue_entries: u16,
    /// The largest command in bytes, below the device's own limit (MDTS).
    pub transfer_bytes_max: u32,
    /// Requests that can wait in one shard at once. More wait outside.
    pub requests_max: usize,
    /// Share of a shard's frames, in percent, that may be dirty before the flusher writes in the background.
    pub dirty_background_percent: u8,
    /// Share of a shard's frames, in percent, that may be dirty or on their way to the device at all: above
    /// `dirty_background_percent`, at most 100. Halfway between the two, writers begin to be slowed towards the rate at
    /// which the device writes; at this limit they wait. The limit holds for writes. Pages that an application holds by
    /// [`pin_mut`](crate::Mapping::pin_mut) since before writers were slowed become dirty when it releases them, and
    /// come on top if they are many (more than 16 in a shard, or an eighth of the way to the limit).
    pub dirty_percent: u8,
    /// Dirty pages are written after this time at the latest, whatever their number.
    pub flush_interval: Duration,
    /// How long a request waits for a page that others keep pinned, or for a frame, before it is an error.
    pub pin_wait: Duration,
    /// How long a sync, a checkpoint or a close waits for pages whose log isn't durable (see
    /// [`Gate`](crate::Gate)), before it is an error; anew for each number that it waits for.
    pub gate_wait: Duration,
    /// Share of a shard's frames, in percent, that may be dirty in gated mappings; writers wait at that
    /// limit. Better below the middle of `dirty_background_percent` and `dirty_percent`: else pages that wait for
    /// their log slow writers everywhere. The limit may be exceeded by the clean pages that are exclusively pinned when
    /// it is reached.
    pub gated_percent: u8,
    /// Share of a shard's frames, in percent, that is kept for logs
    /// ([`MappingOptions::log_of`](crate::MappingOptions::log_of)) as long as one is open. A request's worth
    /// of frames is kept in any case.
    pub log_reserve_percent: u8,
    /// How long a command may stay with the device before the device counts as failed.
    pub command_timeout: Duration,
    /// Whether frames must, should or must not lie on hugepages.
    pub hugepages: Hugepages,
    /// Where mirrors of mappings are ([`MappingOptions::mirror`](crate::MappingOptions::mirror)).
    pub mirror: MirrorDevice,
    /// Whether other processes of the same user can see what the engine does, as `foliant top` shows it.
    pub stats_page: StatsPage,
    /// Who runs the shards.
    pub threads: ShardThreads,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            cache_bytes: 64 << 20,
            shards: 1,
            queue_entries: 256,
            transfer_bytes_max: 1 << 20,
            requests_max: 256,
            dirty_background_percent: 20,
            dirty_percent: 40,
            flush_interval: Duration::from_secs(5),
            pin_wait: Duration::from_secs(10),
            gate_wait: Duration::from_secs(10),
            gated_percent: 25,
            log_reserve_percent: 2,
            command_timeout: Duration::from_secs(30),
            hugepages: Hugepages::Prefer,
            mirror: MirrorDevice::None,
            stats_page: StatsPage::None,
            threads: ShardThreads::Floating,
        }
    }
}

/// The fewest frames a shard works with: a request's worth.
pub(crate) const FRAMES_MIN: u64 = 32;

fn wrong<T>(option: &'static str, value: impl ToString, reason: impl Into<String>) -> Result<T> {
    Err(Error::Option { option, value: value.to_string(), reason: reason.into() })
}

impl EngineOptions {
    /// Checks every option against its limit and the machine's memory.
    pub(crate) fn check(&self) -> Result<()> {
        if self.shards == 0 || self.shards > 1024 {
            return wrong("shards", self.shards, "must be between 1 and 1024");
        }
        let least = FRAMES_MIN * PAGE_BYTES as u64 * self.shards as u64;
        if self.cache_bytes < least {
            return wrong(
                "cache_bytes",
                self.cache_bytes,
                format!("{} shards need at least {least} bytes", self.shards),
            );
        }
        if let Some(memory) = memory_bytes()
            && self.cache_bytes > memory
        {
            return wrong(
                "cache_bytes",
                self.cache_bytes,
                format!(
                    "the machine has {memory} bytes of memory; choose a cache that leaves room for the rest"
                ),
            );
        }
        if self.queue_entries < 8 {
            return wrong("queue_entries", self.queue_entries, "must be at least 8");
        }
        if self.transfer_bytes_max < PAGE_BYTES as u32
            || !self.transfer_bytes_max.is_multiple_of(PAGE_BYTES as u32)
        {
            return wrong(
                "transfer_bytes_max",
                self.transfer_bytes_max,
                "must be a multiple of 4096, at least 4096",
            );
        }
        if self.requests_max == 0 || self.requests_max > 1 << 16 {
            return wrong("requests_max", self.requests_max, "must be between 1 and 65536");
        }
        if self.dirty_background_percent > 90 {
            return wrong("dirty_background_percent", self.dirty_background_percent, "must be at most 90");
        }
        if self.dirty_percent > 100 {
            return wrong("dirty_percent", self.dirty_percent, "must be at most 100");
        }
        if self.dirty_percent <= self.dirty_background_percent {
            return wrong(
                "dirty_percent",
                self.dirty_percent,
                format!(
                    "must be above dirty_background_percent = {}, or writers would wait before the flusher writes",
                    self.dirty_background_percent
                ),
            );
        }
        if self.gate_wait.is_zero() {
            return wrong("gate_wait", "0", "must leave the log's owner time to sync its log");
        }
        if self.gated_percent == 0 || self.gated_percent > 90 {
            return wrong("gated_percent", self.gated_percent, "must be between 1 and 90");
        }
        if self.log_reserve_percent > 50 {
            return wrong("log_reserve_percent", self.log_reserve_percent, "must be at most 50");
        }
        if self.command_timeout.is_zero() {
            return wrong(
                "command_timeout",
                "0",
                "must be longer than the device needs for its slowest command",
            );
        }
        if let ShardThreads::Pinned(cores) = &self.threads {
            if cores.len() < self.shards {
                return wrong(
                    "threads",
                    format!("{cores:?}"),
                    format!("{} shards need as many cores", self.shards),
                );
            }
            let known = cores_allowed();
            if let Some(core) = cores.iter().find(|&&core| core >= 1024 || !known.contains(&core)) {
                return wrong("threads", core, format!("this process may run on cores {known:?} only"));
            }
        }
        if self.threads == ShardThreads::NearDevice {
            let known = cores_allowed();
            if known.len() < self.shards {
                return wrong(
                    "threads",
                    "NearDevice",
                    format!(
                        "{} shards need as many cores; this process may run on {known:?} only",
                        self.shards
                    ),
                );
            }
        }
        Ok(())
    }
}

/// The cores that this process may run on.
pub(crate) fn cores_allowed() -> Vec<usize> {
    core_affinity::get_core_ids().unwrap_or_default().into_iter().map(|core| core.id).collect()
}

/// The machine's memory in bytes.
fn memory_bytes() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("MemTotal:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_options_are_valid() {
        EngineOptions::default().check().unwrap();
    }

    #[test]
    fn each_limit_is_named_with_the_value_that_breaks_it() {
        let cases = [
            (EngineOptions { shards: 0, ..Default::default() }, "shards = 0"),
            (EngineOptions { cache_bytes: 4096, ..Default::default() }, "cache_bytes = 4096"),
            (EngineOptions { cache_bytes: 1 << 60, ..Default::default() }, "bytes of memory"),
            (EngineOptions { queue_entries: 2, ..Default::default() }, "queue_entries = 2"),
            (EngineOptions { transfer_bytes_max: 1000, ..Default::default() }, "multiple of 4096"),
            (EngineOptions { requests_max: 0, ..Default::default() }, "requests_max = 0"),
            (EngineOptions { gate_wait: Duration::ZERO, ..Default::default() }, "gate_wait = 0"),
            (EngineOptions { gated_percent: 91, ..Default::default() }, "gated_percent = 91"),
            (EngineOptions { gated_percent: 0, ..Default::default() }, "gated_percent = 0"),
            (EngineOptions { log_reserve_percent: 51, ..Default::default() }, "log_reserve_percent = 51"),
            (EngineOptions { dirty_background_percent: 99, ..Default::default() }, "at most 90"),
            (EngineOptions { dirty_percent: 20, ..Default::default() }, "dirty_percent = 20: must be above"),
            (EngineOptions { dirty_percent: 101, ..Default::default() }, "at most 100"),
            (EngineOptions { threads: ShardThreads::Pinned(vec![5000]), ..Default::default() }, "5000"),
            (EngineOptions { threads: ShardThreads::Pinned(vec![]), ..Default::default() }, "as many cores"),
            (
                EngineOptions {
                    threads: ShardThreads::NearDevice,
                    shards: 1000,
                    cache_bytes: 1 << 27,
                    ..Default::default()
                },
                "as many cores",
            ),
        ];
        for (options, words) in cases {
            let error = options.check().unwrap_err().to_string();
            assert!(error.contains(words), "{error:?} should say {words:?}");
        }
    }
}
