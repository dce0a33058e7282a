//! Counters, and the snapshot that an embedder reads.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::cache::published::{self, ThreadBlock};

/// Lanes of a hit counter: each of the first threads has one of its own, and needs no atomic addition; the others share
/// the last.
const LANES: usize = 64;

#[derive(Debug, Default)]
#[repr(align(64))]
struct Lane {
    reads: AtomicU64,
    writes: AtomicU64,
    first_uses: AtomicU64,
}

/// Hits, counted by the threads that have them.
#[derive(Debug)]
pub(crate) struct HitCounters {
    lanes: [Lane; LANES],
}

impl Default for HitCounters {
    fn default() -> Self {
        Self { lanes: std::array::from_fn(|_| Lane::default()) }
    }
}

impl HitCounters {
    #[inline]
    fn add(&self, counter: impl Fn(&Lane) -> &AtomicU64, pages: u64) {
        match published::this_thread() {
            Some(block) => self.add_by(block, counter, pages),
            None => self.add_shared(counter, pages),
        }
    }

    /// As [`add`](Self::add), by the thread whose `block` this is.
    #[inline]
    fn add_by(&self, block: &ThreadBlock, counter: impl Fn(&Lane) -> &AtomicU64, pages: u64) {
        match self.lanes[..LANES - 1].get(block.number) {
            Some(own) => {
                // Nobody else writes to this lane.
                let counter = counter(own);
                counter.store(counter.load(Ordering::Relaxed) + pages, Ordering::Relaxed);
            }
            None => self.add_shared(counter, pages),
        }
    }

    #[cold]
    fn add_shared(&self, counter: impl Fn(&Lane) -> &AtomicU64, pages: u64) {
        counter(&self.lanes[LANES - 1]).fetch_add(pages, Ordering::Relaxed);
    }

    /// As [`read`](Self::read), by the thread whose `block` this is.
    #[inline]
    pub(crate) fn read_by(&self, block: &ThreadBlock, pages: u64) {
        self.add_by(block, |lane| &lane.reads, pages);
    }

    #[inline]
    pub(crate) fn read(&self, pages: u64) {
        self.add(|lane| &lane.reads, pages);
    }

    #[inline]
    pub(crate) fn write(&self, pages: u64) {
        self.add(|lane| &lane.writes, pages);
    }

    /// The first use of a folio of `pages` pages that was read ahead.
    pub(crate) fn first_use(&self, pages: u64) {
        self.add(|lane| &lane.first_uses, pages);
    }

    /// Pages that were read ahead and then used.
    pub(crate) fn first_uses(&self) -> u64 {
        self.sum(|lane| &lane.first_uses)
    }

    fn sum(&self, of: impl Fn(&Lane) -> &AtomicU64) -> u64 {
        self.lanes.iter().map(|lane| of(lane).load(Ordering::Relaxed)).sum()
    }

    pub(crate) fn totals(&self) -> (u64, u64) {
        (self.sum(|lane| &lane.reads), self.sum(|lane| &lane.writes))
    }
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// What a shard counts; written by the shard alone, read by anybody.
        #[derive(Debug, Default)]
        pub(crate) struct ShardCounters { $($(#[doc = $doc])+ pub $name: AtomicU64,)+ }

        /// What has happened since the engine was opened, all shards together.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct EngineStats {
            /// Page accesses for reading that found the page in the cache.
            pub read_hits: u64,
            /// Page accesses for writing that found the page in the cache.
            pub write_hits: u64,
            /// Requests that went to a shard: misses, waits, syncs.
            pub requests: u64,
            /// Pages dirty now.
            pub dirty_pages: u64,
            /// Of those, pages whose last write failed for good.
            pub poisoned_pages: u64,
            /// Pages under writeback now.
            pub writeback_pages: u64,
            /// Frames of the cache.
            pub frames: u64,
            /// Pages read ahead whose folios somebody has read since.
            pub readahead_pages_used: u64,
            /// Bytes of metadata in use beside the frames.
            pub metadata_bytes: u64,
            $($(#[doc = $doc])+ pub $name: u64,)+
        }

        impl ShardCounters {
            pub(crate) fn add_to(&self, stats: &mut EngineStats) {
                $(stats.$name += self.$name.load(Ordering::Relaxed);)+
            }

            /// Name and documentation of each counter, in their order.
            pub(crate) const DOCUMENTED: &[(&str, &str)] = &[$((stringify!($name), concat!($($doc),+)),)+];

            /// The counters, in their order.
            pub(crate) fn values(&self) -> impl Iterator<Item = u64> + '_ {
                [$(&self.$name,)+].into_iter().map(|counter| counter.load(Ordering::Relaxed))
            }
        }
    };
}

counters! {
    /// Pages brought in from the device.
    pages_read,
    /// Pages of those that were brought in before anybody asked for them: readahead and
    /// [`prefetch`](crate::Mapping::prefetch).
    readahead_pages,
    /// Requests for readahead that weren't carried out, or not to their end: the shard had too many of them, or too few
    /// frames that it could free at once.
    readahead_dropped,
    /// Requests for pages, and reads for them, that were taken back since nobody waited for them any more: their futures
    /// were dropped.
    requests_cancelled,
    /// Pages made without reading, because a writer filled them whole.
    pages_created,
    /// Pages written back.
    pages_written,
    /// Pages evicted to free their frames.
    pages_evicted,
    /// Of those, pages that were evicted while a request waited for their frames, since too few were free (`allocstall`).
    evictions_on_demand,
    /// Pages brought in, or made, before as many others were evicted since they were as there are frames
    /// (`workingset_refault`).
    refaults,
    /// Of those, pages whose folios were therefore taken for used ones at once (`workingset_activate`).
    refaults_hot,
    /// Pages that were given frames, filled or not.
    pages_installed,
    /// Pages whose frames were given back, for whatever reason: those in the cache now are the others.
    pages_released,
    /// Pages that occupy frames now.
    pages_cached,
    /// Folios that were given frames: of one page or many.
    folios_installed,
    /// Folios split because a page of theirs was wanted by itself.
    folios_split,
    /// Read commands submitted.
    read_commands,
    /// Write commands submitted.
    write_commands,
    /// Flush commands submitted.
    flush_commands,
    /// Syncs that were answered by somebody else's flush, or needed none.
    commits_shared,
    /// Write Zeroes commands submitted.
    zero_commands,
    /// Doorbell writes for submissions: each rang for a whole batch.
    doorbells,
    /// Requests that doorbells have told the device of: one NVMe command each, several where a boundary of the device
    /// runs through it.
    commands,
    /// Write commands that went through the volatile write cache (FUA), so that no flush was needed.
    fua_commands,
    /// Integrity passes (`SyncMode::All`).
    passes_integrity,
    /// Background passes (`SyncMode::None`).
    passes_background,
    /// Passes for syncs.
    passes_sync,
    /// Passes for what was dirtied while a mapping was being closed.
    passes_close,
    /// Passes since requests waited for frames, or reclaim asked.
    passes_reclaim,
    /// Passes since more pages were dirty than the background limit.
    passes_dirty_limit,
    /// Passes that callers asked for.
    passes_caller,
    /// Passes since pages had been dirty for the flush interval.
    passes_expiry,
    /// Passes over poisoned pages.
    passes_poisoned,
    /// Background passes that gave way to an integrity pass of the same mapping.
    passes_taken,
    /// Passes and syncs refused in the reclaim context.
    reclaim_guard_hits,
    /// Syncs that shared another's pass.
    syncs_merged,
    /// Pages that a pass's user put off.
    pages_postponed,
    /// Commands submitted again after they had failed in passing.
    command_retries,
    /// Write commands for poisoned pages in the background.
    poison_retries,
    /// Dirty pages thrown away by discards.
    pages_discarded,
    /// Background passes that returned at once because the device was congested.
    congestion_skips,
    /// Pauses of writers, because too many pages were dirty.
    throttle_pauses,
    /// Nanoseconds that writers have waited for that, all together.
    throttle_paused_ns,
    /// Times that writeback came to a page whose log was not durable, and left it dirty (WB-40).
    pages_gated,
    /// Times that a sync waited for a gate.
    gate_waits,
    /// Waits for a gate that ended by their deadline.
    gate_timeouts,
    /// The rate at which the device writes, measured: bytes per second; 0 before the first measurement.
    write_bandwidth,
    /// Commands that the device failed.
    command_errors,
    /// Write commands submitted to mirrors.
    mirror_write_commands,
    /// Pages that those carried.
    mirror_pages_written,
    /// Flush commands submitted to mirrors.
    mirror_flush_commands,
    /// Pages copied to mirrors by resynchronisations.
    mirror_pages_copied,
    /// Times that a mirror was degraded.
    mirrors_degraded,
    /// Times that the shard slept.
    sleeps,
    /// Nanoseconds that the shard slept, by the clock that it is polled with.
    slept_ns,
    /// Steps of the shard.
    polls,
    /// Nodes of the tag trees in use now: one for up to 64 neighbouring cached pages, and a few above them.
    tag_nodes,
}

/// Adds to a counter that one thread alone writes: no locked instruction.
pub(crate) fn bump(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed) + by, Ordering::Relaxed);
}
