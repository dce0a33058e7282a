//! `versus metadata`: what a cached 4 KiB page costs beside its frame.
//!
//! Everything is allocated at open and sized by the worst that can happen, so opening an engine is the whole
//! measurement. The worst depends on how sparse the cached pages may lie: a tag leaf covers 64 neighbouring pages
//! and is shared by those of them that are cached. A device not larger than the cache is the dense case; on one
//! that is larger by orders of magnitude, each cached page may need a leaf of its own, and its own inner nodes
//! up to the level at which the device has fewer nodes than the cache has frames.

use anyhow::Result;
use foliant::Engine;
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController};

use crate::engine::quiet_options;
use crate::report::{Answer, Cell, Limit, Row, Table, Target};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// One configuration: its name, the device's size, and the cache's.
const CASES: [(&str, u64, u64); 7] = [
    ("dense: device = cache = 256 MiB", 256 * MIB, 256 * MIB),
    ("dense, frames just above a power of two", 260 * MIB, 260 * MIB),
    ("device 4 × cache", GIB, 256 * MIB),
    ("device 64 × cache", 16 * GIB, 256 * MIB),
    ("device 4096 × cache", 1024 * GIB, 256 * MIB),
    ("device 262,144 × cache", 64 * 1024 * GIB, 256 * MIB),
    ("sparse worst case: device 1 PiB", 1024 * 1024 * GIB, 256 * MIB),
];

/// Opens an engine a case and reads what it says of itself.
pub fn answer() -> Result<Answer> {
    let mut rows = Vec::new();
    let mut per_page = Vec::new();
    for (name, device_bytes, cache_bytes) in CASES {
        let device = EmulatedController::new(EmulatedConfig::null(device_bytes, 4096))?;
        let options = foliant::EngineOptions { cache_bytes, ..quiet_options() };
        let engine = Engine::open_on(device.attach()?, &options)?;
        let stats = engine.stats();
        engine.close()?;
        let bytes = stats.metadata_bytes as f64 / stats.frames as f64;
        per_page.push(bytes);
        let cells = vec![Cell::Count(stats.frames), Cell::Count(stats.metadata_bytes), Cell::Figure(bytes)];
        rows.push(Row::new(name, cells));
    }
    let target = |case: usize| {
        let what = format!("metadata a cached page, {}", CASES[case].0);
        Target::new(what, "bytes", Limit::AtMost(64.0), Some(per_page[case]))
    };
    Ok(Answer {
        question: "metadata",
        rounds: 1,
        targets: vec![target(0), target(1)],
        tables: vec![Table {
            title: "metadata beside the frames".into(),
            columns: vec!["frames", "bytes", "bytes a page"],
            rows,
        }],
        notes: vec![
            "folio headers, look-up index, tag trees, free list, and the table of mappings; all of it is allocated at \
             open, whatever is cached"
                .into(),
            "the rings and PRP lists of the driver belong to a queue pair, not to a page, and are not in it".into(),
        ],
    })
}
