//! Free frames ahead of demand.
//!
//! A request for pages that are missing shouldn't have to look for frames while its caller waits. So the shard keeps some
//! free: as soon as fewer are free than the **low** watermark, a step's end evicts until as many are as the **high** one says. The
//! work of a step is bounded, and goes to folios that nobody needs: clean ones that no thread holds. No thread of the
//! application evicts, ever.
//!
//! ```text
//!   0 ────────────── low ─────────────── high ──────────────────────────────── all frames
//!   │  requests take  │ steps' ends evict   │
//!   │  these as well  │ up to here ────────►│ and stop; readahead takes no frame below low
//! ```
//!
//! The watermarks are what steps at full load take before the next one's end can make up for it, and no more: a free frame
//! is one that could have held a page. Where steps find nothing that could go, since too much is dirty, the flusher is asked to
//! write (WB-10: eviction itself writes nothing).

use super::Shard;
use crate::cache::folio::FolioOrder;
use crate::reply::GRANTS_MAX;
use crate::stats::bump;
use crate::writeback::events;
use crate::writeback::guard::ReclaimScope;

/// The low watermark is one frame of so many, at least [`GRANTS_MAX`], a large request's,
const LOW_SHARE: usize = 256;
/// but no more than one of so many of a small cache,
const LOW_SHARE_MAX: usize = 16;
/// nor more than this of a large one.
const LOW_MAX: usize = 512;
/// Folios that are looked at before it is asked again whether that helps.
const ROUND_STEPS: u32 = 64;
/// Rounds of a step, as long as each evicts something.
const ROUNDS: usize = 8;

/// What a shard remembers of its eviction ahead of demand.
#[derive(Debug)]
pub(super) struct AheadOfDemand {
    low: usize,
    /// Folios looked at since one could be evicted.
    futile: u64,
    /// Folios that are looked at in vain before the flusher is asked: all of them.
    futile_max: u64,
}

impl AheadOfDemand {
    pub(super) fn new(frames: usize) -> Self {
        let low = (frames / LOW_SHARE).clamp(GRANTS_MAX, LOW_MAX).min(frames / LOW_SHARE_MAX).max(1);
        Self { low, futile: 0, futile_max: frames as u64 }
    }
}

impl Shard {
    /// Evicts until there is room for so many folios of an order, or so many folios were looked at. Returns how many pages
    /// went.
    pub(super) fn evict(&mut self, wanted: (FolioOrder, usize), steps_max: u32) -> u64 {
        // Whatever may come to be called from here: it evicts what is clean and writes nothing (WB-10).
        let _reclaim = ReclaimScope::enter();
        let before = self.cache.evicted;
        self.evict_all_used_once(wanted, steps_max);
        let mappings = &self.mappings;
        self.cache.evict(wanted, steps_max, |key| {
            mappings[key.mapping() as usize].as_ref().map(|open| &open.shape)
        });
        let evicted = self.cache.evicted - before;
        events::lru_shrink(self.link.shard, &self.link.counters, evicted, self.now_ns);
        evicted
    }

    /// Evicts while a request waits for the frames.
    pub(super) fn evict_on_demand(&mut self, wanted: (FolioOrder, usize), steps_max: u32) {
        let evicted = self.evict(wanted, steps_max);
        bump(&self.link.counters.evictions_on_demand, evicted);
    }

    /// Frames up to which are freed ahead of demand: the high watermark.
    pub(super) fn frames_kept_free(&self) -> usize {
        2 * self.ahead.low
    }

    /// Fewer frames than this shall not be free at a step's end.
    fn frames_wanted_free(&self) -> usize {
        (self.ahead.low + self.frames_reserved()).max(self.frames_needed)
    }

    /// The doorbell was rung. A device that has no thread of its own begins with what it was told of before this step
    /// goes on to free frames, as hardware does by itself.
    pub(super) fn start_device(&mut self) {
        if self.cache.free_frames() < self.frames_wanted_free() {
            // What it has to say is heard at the begin of the next step, which follows at once.
            let _ = self.queue.pump();
        }
    }

    /// Frees frames ahead of demand, as far as a step may.
    pub(super) fn evict_ahead(&mut self) {
        let low = self.frames_wanted_free();
        if self.cache.free_frames() >= low {
            return;
        }
        let high = low + self.ahead.low;
        for _ in 0..ROUNDS {
            let evicted = self.evict((FolioOrder(0), high), ROUND_STEPS);
            if self.frames_needed > 0 {
                bump(&self.link.counters.evictions_on_demand, evicted);
            }
            if evicted == 0 {
                self.ahead.futile += u64::from(ROUND_STEPS);
                break;
            }
            self.ahead.futile = 0;
            if self.cache.free_frames() >= high {
                break;
            }
        }
        if self.ahead.futile > self.ahead.futile_max {
            self.ahead.futile = 0;
            self.flusher.request();
        }
    }
}
