//! What the page cache and the device did during a run, for the reports.

use foliant::{EngineStats, PAGE_BYTES};
use foliant_nvme_emulated::EmulatedStats;
use serde::Serialize;

use crate::table::{Table, count, percent, ratio};

/// What the page cache did, by its own counters.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct CacheActivity {
    /// Pages accessed; each page of a read or a write counts.
    pub(crate) page_accesses: u64,
    pub(crate) page_hits: u64,
    pub(crate) hit_ratio: f64,
    /// Pages brought in from the device.
    pub(crate) pages_read: u64,
    /// Pages made without reading, because they were overwritten whole.
    pub(crate) pages_created: u64,
    pub(crate) pages_written: u64,
    pub(crate) pages_evicted: u64,
}

impl From<&EngineStats> for CacheActivity {
    fn from(stats: &EngineStats) -> Self {
        let page_hits = stats.read_hits + stats.write_hits;
        let page_accesses = page_hits + stats.pages_read + stats.pages_created;
        Self {
            page_accesses,
            page_hits,
            hit_ratio: ratio(page_hits, page_accesses),
            pages_read: stats.pages_read,
            pages_created: stats.pages_created,
            pages_written: stats.pages_written,
            pages_evicted: stats.pages_evicted,
        }
    }
}

impl CacheActivity {
    /// Adds what another engine's cache did.
    pub(crate) fn absorb(&mut self, other: &Self) {
        self.page_accesses += other.page_accesses;
        self.page_hits += other.page_hits;
        self.hit_ratio = ratio(self.page_hits, self.page_accesses);
        self.pages_read += other.pages_read;
        self.pages_created += other.pages_created;
        self.pages_written += other.pages_written;
        self.pages_evicted += other.pages_evicted;
    }

    pub(crate) fn rows(&self, table: Table) -> Table {
        table
            .section("page cache")
            .row("page accesses", count(self.page_accesses))
            .row("hits", format!("{}, {}", count(self.page_hits), percent(self.hit_ratio)))
            .row("pages read", count(self.pages_read))
            .row("pages made without reading", count(self.pages_created))
            .row("pages written back", count(self.pages_written))
            .row("pages evicted", count(self.pages_evicted))
    }
}

/// What the device was asked, as the device counted it.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct DeviceActivity {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) flushes: u64,
    pub(crate) others: u64,
    pub(crate) bytes_read: u64,
    pub(crate) bytes_written: u64,
    /// Pages that a write command moved on average.
    pub(crate) pages_per_write: f64,
    /// I/O commands that the device found by one doorbell on average.
    pub(crate) commands_per_doorbell: f64,
}

impl From<&EmulatedStats> for DeviceActivity {
    fn from(stats: &EmulatedStats) -> Self {
        // Admin commands go out one a doorbell.
        let batches = stats.sq_batches.saturating_sub(stats.admin_commands);
        Self {
            reads: stats.reads,
            writes: stats.writes,
            flushes: stats.flushes,
            others: stats.write_zeroes + stats.deallocates + stats.io_others,
            bytes_read: stats.bytes_read,
            bytes_written: stats.bytes_written,
            pages_per_write: ratio(stats.bytes_written / PAGE_BYTES as u64, stats.writes),
            commands_per_doorbell: ratio(stats.io_commands(), batches),
        }
    }
}

impl DeviceActivity {
    pub(crate) fn rows(&self, table: Table) -> Table {
        table
            .section("device, as it counted itself")
            .row("read commands", count(self.reads))
            .row("write commands", count(self.writes))
            .row("flush commands", count(self.flushes))
            .row("other commands", count(self.others))
            .row("pages a write command", format!("{:.1}", self.pages_per_write))
            .row("commands a doorbell", format!("{:.2}", self.commands_per_doorbell))
    }
}
