//! `versus metadata`: what a cached 4 KiB page costs beside its frame.
//!
//! Headers, look-up index and free list cost the same whatever is cached. The tag trees don't: a leaf covers 64
//! neighbouring pages and is shared by those of them that are cached. So the figure depends on how far the cached
//! pages lie from each other. Each case fills the cache with pages spread evenly over its device: side by side where
//! the device is no larger than the cache, each under a leaf of its own, and under as many inner nodes as can be,
//! where it is larger by orders of magnitude.

use anyhow::Result;
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController};

use crate::engine::DrivenEngine;
use crate::report::{Answer, Cell, Limit, Row, Table, Target};
use crate::walk::PAGE;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// A configuration: its name, the device's size, the cache's, and whether the limit holds for it.
struct Case {
    name: &'static str,
    device_bytes: u64,
    cache_bytes: u64,
    dense: bool,
}

const fn case(name: &'static str, device_bytes: u64, cache_bytes: u64) -> Case {
    Case { name, device_bytes, cache_bytes, dense: device_bytes == cache_bytes }
}

const CASES: [Case; 7] = [
    case("dense", 256 * MIB, 256 * MIB),
    case("dense, frames just above a power of two", 257 * MIB, 257 * MIB),
    case("every 4th page", GIB, 256 * MIB),
    case("every 64th page: a leaf a page", 16 * GIB, 256 * MIB),
    case("every 4,096th page: two nodes a page", TIB, 256 * MIB),
    case("every 262,144th page", 64 * TIB, 256 * MIB),
    case("sparse worst case: spread over 1 PiB", 1024 * TIB, 256 * MIB),
];

/// Fills a cache a case and reads what the engine says of itself.
pub fn answer() -> Result<Answer> {
    let mut rows = Vec::new();
    let mut targets = Vec::new();
    for case in CASES {
        let device = EmulatedController::new(EmulatedConfig::null(case.device_bytes, 4096))?;
        let mut engine = DrivenEngine::open(device, case.cache_bytes, 1)?;
        let frames = engine.engine.stats().frames;
        let stride = case.device_bytes / PAGE as u64 / frames;
        for position in 0..frames {
            engine.read_page(position * stride)?;
        }
        let stats = engine.engine.stats();
        let cached = stats.pages_read + stats.pages_created - stats.pages_evicted;
        let bytes = stats.metadata_bytes as f64 / cached as f64;
        let cells = vec![Cell::Count(cached), Cell::Count(stats.metadata_bytes), Cell::Figure(bytes)];
        rows.push(Row::new(case.name, cells));
        if case.dense {
            let what = format!("metadata a cached page, {}", case.name);
            targets.push(Target::new(what, "bytes", Limit::AtMost(40.0), Some(bytes)));
        }
    }
    Ok(Answer {
        question: "metadata",
        rounds: 1,
        targets,
        tables: vec![Table {
            title: "metadata beside the frames".into(),
            columns: vec!["cached pages", "bytes", "bytes a page"],
            rows,
        }],
        notes: vec![
            "folio headers, look-up index, free list, table of mappings, and the tag nodes in use, as the engine counts \
             them; the address space for the most tag nodes that can be needed is reserved at open and costs memory \
             only once touched"
                .into(),
            "the driver's rings and PRP lists belong to a queue pair, not to a page, and are not in it".into(),
        ],
    })
}
