//! What a hit costs by the number of cached pages.
//!
//! Two kinds of frames: real ones, locked into memory, as far as the machine's memory allows; and [`folded`](super::folded)
//! ones beyond, where the engine's own structures are as large as ever and the data costs nothing. Sizes that
//! both can have are measured with both, which says what the data's own misses come to. More pages than one
//! engine may have frames are spread over several engines, each as large as an engine of a quarter of the pages.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use foliant::{Engine, EngineOptions, Hugepages, Mapping, MappingOptions, Shard, ShardThreads};
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::curve::{Picture, Series, Stroke};
use super::folded::Folded;
use crate::engine::quiet_options;
use crate::measure::{Contestant, Effort, Timed, ns_per_step, race};
use crate::report::{Answer, Cell, Row, Table};
use crate::walk::PAGE;

/// Cached pages of each point.
const SIZES: [u64; 11] =
    [1_000, 4_000, 16_000, 64_000, 256_000, 512_000, 1_024_000, 2_048_000, 4_096_000, 8_192_000, 16_384_000];
/// Sizes beyond this have folded frames only: 4 GiB of real ones.
const REAL_PAGES_MAX: u64 = 1_024_000;
/// Pages of one engine at most: its frames are fewer bytes than the machine has memory, which an engine checks.
const ENGINE_PAGES_MAX: u64 = 4_096_000;
/// Accesses of a round.
const STEPS: usize = 1 << 20;
/// Pages asked for at once while a cache is filled.
const BATCH: u64 = 64;

/// Behind the frames lies memory, or doesn't.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Frames {
    Real,
    Folded,
}

/// A page and the byte of the word in it.
#[derive(Clone, Copy)]
struct Access {
    part: u32,
    page: u32,
    within: u32,
}

/// A cache with all of its pages in it.
struct Warm {
    parts: Vec<Part>,
    pages: u64,
}

struct Part {
    mapping: Mapping,
    /// Nobody polls it any more: a hit needs none.
    _shard: Shard,
    engine: Engine,
}

impl Warm {
    fn new(pages: u64, frames: Frames) -> Result<Self> {
        let parts = pages.div_ceil(ENGINE_PAGES_MAX);
        ensure!(pages.is_multiple_of(parts), "{pages} pages don't fall into {parts} equal parts");
        let parts = (0..parts).map(|_| Part::new(pages / parts, frames)).collect::<Result<_>>()?;
        Ok(Self { parts, pages })
    }

    fn metadata_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.engine.stats().metadata_bytes).sum()
    }

    /// Accesses to pages drawn at random.
    fn accesses(&self, count: usize, seed: u64) -> Vec<Access> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let part_pages = (self.pages / self.parts.len() as u64) as u32;
        let parts = self.parts.len() as u32;
        (0..count)
            .map(|_| Access {
                part: rng.random_range(0..parts),
                page: rng.random_range(0..part_pages),
                within: rng.random_range(0..PAGE as u32 / 8) * 8,
            })
            .collect()
    }

    #[inline]
    fn pin(&self, access: Access) -> Result<u64> {
        let page = self.parts[access.part as usize].mapping.pin(u64::from(access.page))?;
        Ok(page[access.within as usize..].first_chunk().map_or(0, |word| u64::from_ne_bytes(*word)))
    }

    #[inline]
    fn read_with(&self, access: Access) -> Result<u64> {
        let mapping = &self.parts[access.part as usize].mapping;
        let seen = mapping.read_with(u64::from(access.page), |page| page.read(access.within as usize))?;
        Ok(seen.map_or(0, u64::from_ne_bytes))
    }
}

impl Part {
    fn new(pages: u64, frames: Frames) -> Result<Self> {
        let device = EmulatedController::new(EmulatedConfig::null(pages * PAGE as u64, PAGE as u32))?;
        // Some more than the pages, so that nothing is evicted.
        let cache_bytes = (pages + pages / 16 + 1024) * PAGE as u64;
        let options = EngineOptions {
            cache_bytes,
            shards: 1,
            threads: ShardThreads::Manual,
            hugepages: Hugepages::Never,
            ..quiet_options()
        };
        let transport = match frames {
            Frames::Real => device.attach()?,
            Frames::Folded => std::sync::Arc::new(Folded(device.attach()?)),
        };
        let engine = Engine::open_on(transport, &options)?;
        let mut shard = engine.take_shards().pop().context("an engine without a shard")?;
        let origin = std::time::Instant::now();
        let now_ns = || origin.elapsed().as_nanos() as u64;
        let options = MappingOptions { readahead_bytes_max: 0, ..MappingOptions::default() };
        let mapping = shard.block_on(now_ns, engine.mapping_async(&options))?;
        // Scattered, so that every page is a folio by itself: 97,003 is a prime that divides no number of pages here.
        let mut page = 0;
        for first in (0..pages).step_by(BATCH as usize) {
            let count = BATCH.min(pages - first);
            let batch: Vec<u64> = (0..count)
                .map(|_| {
                    page = (page + 97_003) % pages;
                    page
                })
                .collect();
            drop(shard.block_on(now_ns, mapping.pin_many_async(&batch))?);
        }
        let stats = engine.stats();
        ensure!(
            stats.pages_read == pages && stats.pages_evicted == 0,
            "of {pages} pages {} were read and {} evicted: the cache isn't what it is to be",
            stats.pages_read,
            stats.pages_evicted
        );
        // In use, all of them, as after a while: what a page's first pins do to it is done.
        for page in (0..pages).chain(0..pages) {
            drop(mapping.pin(page)?);
        }
        Ok(Self { mapping, _shard: shard, engine })
    }
}

/// A line of the table.
struct Point {
    pages: u64,
    frames: Frames,
    metadata_bytes: u64,
    resident_bytes: u64,
    pin: Timed,
    read_with: Timed,
}

/// Measures all sizes; draws the curve into `plots`.
pub fn add_to(answer: &mut Answer, effort: Effort, plots: Option<&Path>) -> Result<()> {
    let rounds = answer.rounds;
    let largest = if effort.quick { 256_000 } else { u64::MAX };
    let mut points = Vec::new();
    for pages in SIZES.into_iter().filter(|&pages| pages <= largest) {
        for frames in [Frames::Real, Frames::Folded] {
            if frames == Frames::Folded || pages <= REAL_PAGES_MAX {
                points.push(point(pages, frames, rounds)?);
            }
        }
    }
    if let Some(folder) = plots {
        draw(&points, folder)?;
    }
    let rows = points.iter().map(|point| {
        let frames = match point.frames {
            Frames::Real => "real frames",
            Frames::Folded => "folded frames",
        };
        let mib = |bytes: u64| Cell::Count(bytes >> 20);
        let cells = vec![
            Cell::Figure(point.pin.median()),
            Cell::Figure(point.pin.best()),
            Cell::Figure(point.read_with.median()),
            Cell::Figure(point.read_with.best()),
            mib(point.pages * PAGE as u64),
            mib(point.metadata_bytes),
            mib(point.resident_bytes),
        ];
        Row::new(format!("{} pages, {frames}", point.pages), cells)
    });
    answer.tables.push(Table {
        title: "a hit by the number of cached pages".into(),
        columns: vec![
            "pin, ns",
            "best",
            "read_with, ns",
            "best",
            "cached, MiB",
            "metadata, MiB",
            "resident, MiB",
        ],
        rows: rows.collect(),
    });
    answer.notes.extend([
        "hits: pages drawn at random, one word of each touched; accesses don't depend on each other".into(),
        "folded frames are address space over the system's zero page: index, headers and page tables are as large as ever, \
         the words touched come from the processor's caches"
            .into(),
        format!("more than {ENGINE_PAGES_MAX} pages are spread over engines of {ENGINE_PAGES_MAX}, all open at once"),
    ]);
    Ok(())
}

fn point(pages: u64, frames: Frames, rounds: usize) -> Result<Point> {
    let warm = Warm::new(pages, frames)?;
    let accesses = warm.accesses(STEPS, pages);
    let mut timed = race(
        rounds,
        &mut [
            Contestant::new("pin", || ns_per_step(&accesses, |access| warm.pin(access))),
            Contestant::new("read_with", || ns_per_step(&accesses, |access| warm.read_with(access))),
        ],
    )?;
    let evicted: u64 = warm.parts.iter().map(|part| part.engine.stats().pages_evicted).sum();
    ensure!(evicted == 0, "{evicted} pages were evicted while hits were measured");
    let read_with = timed.remove(1);
    let pin = timed.remove(0);
    Ok(Point {
        pages,
        frames,
        metadata_bytes: warm.metadata_bytes(),
        resident_bytes: resident_bytes()?,
        pin,
        read_with,
    })
}

/// Bytes of memory that this process occupies.
fn resident_bytes() -> Result<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").context("cannot read /proc/self/statm")?;
    let pages = statm.split_whitespace().nth(1).and_then(|field| field.parse::<u64>().ok());
    Ok(pages.context("/proc/self/statm has no second field")? * rustix::param::page_size() as u64)
}

fn draw(points: &[Point], folder: &Path) -> Result<()> {
    let series = |name, frames, figure: fn(&Point) -> &Timed, color, stroke| Series {
        name,
        points: points
            .iter()
            .filter(|point| point.frames == frames)
            .map(|point| (point.pages as f64, figure(point).median()))
            .collect(),
        color,
        stroke,
    };
    Picture {
        title: "A hit by the number of cached pages",
        across: "cached pages of 4 KiB",
        up: "ns",
        series: vec![
            series("pin, real frames", Frames::Real, |point| &point.pin, 0, Stroke::Solid),
            series("pin, folded frames", Frames::Folded, |point| &point.pin, 0, Stroke::Dashed),
            series("read_with, real frames", Frames::Real, |point| &point.read_with, 1, Stroke::Solid),
            series("read_with, folded frames", Frames::Folded, |point| &point.read_with, 1, Stroke::Dashed),
        ],
    }
    .draw(&folder.join("scaling-hits.svg"))
}
