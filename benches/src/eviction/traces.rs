//! The accesses that `versus eviction` replays: recorded ones and synthetic ones.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::measure::Effort;
use crate::walk::PAGE;

/// Bytes of a sector, in which traces of block requests count.
const SECTOR: u64 = 512;
/// Accesses of a synthetic load.
const SYNTHETIC_ACCESSES: usize = 1_000_000;

/// Accesses to pages, in order. Simulations know a page by its number among those that occur, the device by its place.
#[derive(Debug, Default)]
pub struct Accesses {
    numbers: Vec<u32>,
    /// By number: where the page lies on the device.
    places: Vec<u64>,
}

impl Accesses {
    fn new(places: impl Iterator<Item = u64>) -> Self {
        let mut accesses = Self::default();
        let mut known: HashMap<u64, u32> = HashMap::new();
        for place in places {
            let number = *known.entry(place).or_insert_with(|| {
                accesses.places.push(place);
                accesses.places.len() as u32 - 1
            });
            accesses.numbers.push(number);
        }
        accesses
    }

    /// The numbers of the pages that are accessed.
    pub fn numbers(&self) -> &[u32] {
        &self.numbers
    }

    /// How many different pages are.
    pub fn pages(&self) -> usize {
        self.places.len()
    }

    /// Where the pages lie that are accessed.
    pub fn on_device(&self) -> impl Iterator<Item = u64> {
        self.numbers.iter().map(|&number| self.places[number as usize])
    }

    /// The size of a device that holds all of them.
    pub fn device_bytes(&self) -> u64 {
        let end = self.places.iter().max().map_or(1, |place| place + 1);
        (end * PAGE as u64).next_multiple_of(1 << 20)
    }
}

/// A trace of block requests as libCacheSim publishes those of CloudPhysics: a header line, then `version, time, op, size in
/// bytes, first sector`, separated by commas. Each page that a request touches is one access.
pub fn recorded(path: &Path) -> Result<Accesses> {
    let file = File::open(path).with_context(|| format!("opening the trace {}", path.display()))?;
    let mut places = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate().skip(1) {
        let line = line?;
        let fields = || {
            let mut fields = line.split(',').skip(3).map(str::trim);
            let bytes: u64 = fields.next()?.parse().ok()?;
            let sector: u64 = fields.next()?.parse().ok()?;
            Some((sector * SECTOR, bytes.max(1)))
        };
        let (first, bytes) = fields().with_context(|| {
            format!("{}:{}: not `version,time,op,size,sector`: {line}", path.display(), number + 1)
        })?;
        places.extend(first / PAGE as u64..(first + bytes).div_ceil(PAGE as u64));
    }
    ensure!(!places.is_empty(), "the trace {} has no requests", path.display());
    Ok(Accesses::new(places.into_iter()))
}

/// Loads of the kinds that caches meet, for one of `frames` frames.
pub fn synthetic(frames: usize, effort: Effort) -> Vec<(&'static str, Accesses)> {
    let accesses = if effort.quick { SYNTHETIC_ACCESSES / 10 } else { SYNTHETIC_ACCESSES } as u64;
    let frames = frames as u64;
    let mut random = SmallRng::seed_from_u64(1);
    let mut loads = Vec::new();
    for (name, exponent) in [("Zipf 0.8", 0.8), ("Zipf 1.0", 1.0)] {
        let zipf = Zipf::new(16 * frames, exponent);
        loads.push((name, Accesses::new((0..accesses).map(|_| zipf.page(&mut random)))));
    }
    // Half of it goes to a set one and a half times as large as the cache, some of it more often than other, and
    // half to pages that nobody wants again.
    let (zipf, scan) = (Zipf::new(3 * frames / 2, 0.6), 4 * frames..);
    let places: Vec<u64> = scan
        .take(accesses as usize)
        .map(|next| if random.random() { zipf.page(&mut random) } else { next })
        .collect();
    loads.push(("scan + hot set", Accesses::new(places.into_iter())));
    loads.push(("loop of 1.2", Accesses::new((0..accesses).map(|at| at % (6 * frames / 5)))));
    loads.push(("loop of 2", Accesses::new((0..accesses).map(|at| at % (2 * frames)))));
    // A set one and a half times as large as the cache, all at once another, ten times in all.
    let set = 3 * frames / 2;
    let mut within = move || {
        let at: f64 = random.random();
        (at * at * set as f64) as u64
    };
    let places: Vec<u64> = (0..accesses).map(|at| at / (accesses / 10) * set + within()).collect();
    loads.push(("shifting set", Accesses::new(places.into_iter())));
    // A set of that size that moves on by a page every 40 accesses.
    let places: Vec<u64> = (0..accesses).map(|at| at / 40 + within()).collect();
    loads.push(("drifting set", Accesses::new(places.into_iter())));
    loads
}

/// Pages that are the less popular the later they come: the nth as often as 1 / n to the power of the exponent.
struct Zipf {
    cumulated: Vec<f64>,
}

impl Zipf {
    fn new(pages: u64, exponent: f64) -> Self {
        let mut sum = 0.0;
        let weights = (1..=pages).map(|rank| (rank as f64).powf(-exponent));
        let cumulated = weights
            .map(|weight| {
                sum += weight;
                sum
            })
            .collect();
        Self { cumulated }
    }

    fn page(&self, random: &mut SmallRng) -> u64 {
        let pages = self.cumulated.len() as u64;
        let at = random.random::<f64>() * self.cumulated[pages as usize - 1];
        let rank = self.cumulated.partition_point(|&below| below < at) as u64;
        // Which pages are popular has nothing to do with where they lie. (A prime, that no number of pages here is a
        // multiple of: each rank has its own page.)
        rank * 2_654_435_761 % pages
    }
}
