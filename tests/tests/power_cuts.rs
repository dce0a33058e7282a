//! A model of a mapping against the engine, with faults and power cuts.
//!
//! The model keeps for each block of 512 bytes every content that it has had since the last sync that covered
//! it: after a power cut the device must hold one of those, and before it reads must see the newest. That is what
//! the engine promises: what a sync promised is there, and before that a block is old or new, never a mix.
//!
//! `FOLIANT_SEED=n` reruns one seed; `FOLIANT_SEEDS=n` runs that many instead of the default.

use std::future::Future;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use foliant::{EngineOptions, Mapping};
use foliant_nvme_emulated::{Action, EmulatedConfig};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};
use foliant_tests::{Bed, fragile, options};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const BLOCK: u64 = 512;
/// 150 pages, several times the cache, over two stripes so that two shards take part.
const BASE: u64 = 2 * (1 << 20) - 75 * 4096;
const BYTES: u64 = 150 * 4096;
const DEVICE: u64 = 8 << 20;

/// Per block: its contents since it was last known durable, oldest first.
struct Model {
    blocks: Vec<Vec<[u8; BLOCK as usize]>>,
}

impl Model {
    fn new() -> Self {
        Self { blocks: vec![vec![[0; BLOCK as usize]]; (BYTES / BLOCK) as usize] }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (at, &byte) in data.iter().enumerate() {
            let at = offset + at as u64;
            let versions = &mut self.blocks[(at / BLOCK) as usize];
            // One write makes one new version of each block that it touches.
            if at == offset || at.is_multiple_of(BLOCK) {
                versions.push(*versions.last().unwrap());
            }
            versions.last_mut().unwrap()[(at % BLOCK) as usize] = byte;
        }
    }

    fn newest(&self, range: Range<u64>) -> Vec<u8> {
        range.map(|at| self.blocks[(at / BLOCK) as usize].last().unwrap()[(at % BLOCK) as usize]).collect()
    }

    /// How many versions each block has: what a sync that begins now promises the newest of.
    fn mark(&self) -> Vec<usize> {
        self.blocks.iter().map(Vec::len).collect()
    }

    /// A sync that began at `mark` has succeeded. `base` counts versions already dropped since then.
    fn durable(&mut self, mark: &[usize], dropped: &mut [usize]) {
        for (block, (&mark, dropped)) in mark.iter().zip(dropped).enumerate() {
            let keep_from = (mark - 1).saturating_sub(*dropped);
            self.blocks[block].drain(..keep_from);
            *dropped += keep_from;
        }
    }
}

type Sync = (Pin<Box<dyn Future<Output = foliant::Result<()>>>>, Vec<usize>);

fn start_sync(mapping: &Mapping) -> Pin<Box<dyn Future<Output = foliant::Result<()>>>> {
    let handle = mapping.clone();
    Box::pin(async move { handle.sync_async().await })
}

struct Run {
    bed: Bed,
    model: Model,
    /// Versions dropped from the front of each block's list.
    dropped: Vec<usize>,
    syncs: Vec<Sync>,
    random: SmallRng,
    faults: bool,
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut random = SmallRng::seed_from_u64(seed);
        let shards = random.random_range(1..=2);
        let config = EmulatedConfig {
            mdts: random.random_range(0..4),
            awupf_z: *[0, 7].get(random.random_range(0..2)).unwrap(),
            volatile_write_cache: random.random_bool(0.8),
            ..fragile(DEVICE)
        };
        let options = EngineOptions {
            shards,
            dirty_background_percent: random.random_range(5..60),
            queue_entries: *[8, 16, 64].get(random.random_range(0..3)).unwrap(),
            ..options(40 * shards as u64)
        };
        let model = Model::new();
        let dropped = vec![0; model.blocks.len()];
        let faults = random.random_bool(0.3);
        Self { bed: Bed::new(config, options), model, dropped, syncs: Vec::new(), random, faults }
    }

    fn range(&mut self) -> Range<u64> {
        let len = match self.random.random_range(0..3) {
            0 => self.random.random_range(1..600),
            1 => 4096,
            _ => self.random.random_range(1..40_000),
        };
        let start = self.random.random_range(0..BYTES - len);
        let start = if self.random.random_bool(0.5) { start / 4096 * 4096 } else { start };
        start..start + len
    }

    fn step(&mut self, mapping: &Mapping, generation: u32) {
        match self.random.random_range(0..100) {
            0..40 => {
                let range = self.range();
                let data: Vec<u8> = range.clone().map(|at| (generation as u64 * 31 + at / 7) as u8).collect();
                match self.bed.run(mapping.write_at_async(BASE + range.start, &data)) {
                    Ok(()) => self.model.write(range.start, &data),
                    // A read for a partial page can fail: nobody knows then how far the write came.
                    Err(error) => assert!(self.faults, "{error}"),
                }
            }
            40..70 => {
                let range = self.range();
                let mut bytes = vec![0; (range.end - range.start) as usize];
                match self.bed.run(mapping.read_at_async(BASE + range.start, &mut bytes)) {
                    Ok(()) => assert!(bytes == self.model.newest(range.clone()), "read of {range:?}"),
                    Err(error) => assert!(self.faults, "{error}"),
                }
            }
            70..78 => self.syncs.push((start_sync(mapping), self.absolute_mark())),
            78..82 => {
                let range = self.range();
                if self.bed.run(mapping.discard_async(BASE + range.start..BASE + range.end)).is_ok() {
                    self.model.write(range.start, &vec![0; (range.end - range.start) as usize]);
                } else {
                    assert!(self.faults);
                }
            }
            82..86 => self.bed.advance(Duration::from_secs(6)),
            86..90 => {
                let delay = Duration::from_micros(self.random.random_range(1..500));
                let opcode =
                    [NvmOpcode::WRITE, NvmOpcode::READ, NvmOpcode::FLUSH][self.random.random_range(0..3)];
                self.bed.fault(opcode, 0, 3, Action::Delay(delay));
            }
            90..92 if self.faults => {
                self.bed.fail(
                    NvmOpcode::WRITE,
                    self.random.random_range(0..3),
                    1,
                    Status::of(StatusCode::WRITE_FAULT),
                );
            }
            _ => {
                self.bed.step();
            }
        }
        self.poll_syncs();
    }

    fn absolute_mark(&self) -> Vec<usize> {
        self.model.mark().iter().zip(&self.dropped).map(|(len, dropped)| len + dropped).collect()
    }

    fn poll_syncs(&mut self) {
        let mut syncs = std::mem::take(&mut self.syncs);
        syncs.retain_mut(|(future, mark)| match self.bed.poll_once(future.as_mut()) {
            Poll::Pending => true,
            Poll::Ready(result) => {
                match result {
                    Ok(()) => self.model.durable(mark, &mut self.dropped),
                    Err(error) => assert!(self.faults, "{error}"),
                }
                false
            }
        });
        self.syncs = syncs;
    }

    fn cut(&mut self, seed: u64) {
        self.syncs.clear();
        self.bed.crash(seed);
        self.bed.device.clear_faults();
        self.bed.power_on();
        let mut image = vec![0; BYTES as usize];
        self.bed.device.read_image(1, BASE, &mut image).unwrap();
        for (block, bytes) in image.chunks_exact(BLOCK as usize).enumerate() {
            let versions = &mut self.model.blocks[block];
            let found = versions.iter().any(|version| version == bytes);
            assert!(found, "block {block} holds none of its {} possible contents", versions.len());
            versions.clear();
            versions.push(bytes.try_into().unwrap());
            self.dropped[block] = 0;
        }
    }
}

fn run(seed: u64) {
    let mut run = Run::new(seed);
    let mut generation = 0;
    for cut in 0..3 {
        let mapping = run.bed.mapping();
        for _ in 0..run.random.random_range(20..150) {
            generation += 1;
            run.step(&mapping, generation);
        }
        run.bed.assert_consistent();
        drop(mapping);
        run.cut(seed.wrapping_mul(31).wrapping_add(cut));
    }
    // At the end an orderly close: everything is there.
    let mapping = run.bed.mapping();
    run.bed.run(mapping.write_at_async(BASE, &[0x5A; 10_000])).unwrap();
    run.bed.run(mapping.sync_async()).unwrap();
    drop(mapping);
    run.bed.crash(seed);
    let mut image = vec![0; 10_000];
    run.bed.device.read_image(1, BASE, &mut image).unwrap();
    assert!(image.iter().all(|&byte| byte == 0x5A));
}

#[test]
fn after_any_power_cut_each_block_holds_what_a_sync_promised_or_something_newer() {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().expect("a number"));
    let seeds = match number("FOLIANT_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("FOLIANT_SEEDS").unwrap_or(1000),
    };
    for seed in seeds {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(seed))) {
            eprintln!("failed with FOLIANT_SEED={seed}");
            resume_unwind(panic);
        }
    }
}
