//! Power cuts in random histories of a log and its data (WB-40, WB-45).

use super::*;

/// Pages of the data that the random runs touch: some in each of two stripes.
const MODEL_PAGES: u64 = 60;
const MODEL_BASE: u64 = 2 * MIB / PAGE - MODEL_PAGES / 2;
const MODEL_LOG_BYTES: u64 = 2 * MIB;

/// A log of one block a record and pages whose blocks say which record they are of.
struct Run {
    bed: Bed,
    random: SmallRng,
    faults: bool,
    /// The newest record; records are numbered from 1.
    newest: u64,
    /// By block of the model's pages: the numbers that it was stamped with, ascending.
    stamps: Vec<Vec<u64>>,
    /// The log before this number has been given up: every change below must be on the device.
    truncated: u64,
}

type Pending = (BoxedResult<'static>, Promise);

/// What it means when a pending call succeeds.
#[derive(Clone, Copy)]
enum Promise {
    /// The log is durable up to here.
    Log(u64),
    /// Every change below is durable.
    Checkpoint(u64),
}

const BLOCKS: u64 = PAGE / 512;

fn block_of(number: u64) -> [u8; 512] {
    let mut block = [0; 512];
    for chunk in block.chunks_exact_mut(8) {
        chunk.copy_from_slice(&number.to_le_bytes());
    }
    block
}

fn number_in(block: &[u8]) -> u64 {
    let first = u64::from_le_bytes(block[..8].try_into().unwrap());
    assert!(block.chunks_exact(8).all(|chunk| chunk == &block[..8]), "a block is of one record");
    first
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut random = SmallRng::seed_from_u64(seed);
        let shards = random.random_range(1..=3);
        let config = EmulatedConfig {
            mdts: random.random_range(0..4),
            volatile_write_cache: random.random_bool(0.8),
            ..fragile(16 * MIB)
        };
        let options = EngineOptions {
            shards,
            dirty_background_percent: random.random_range(1..40),
            gated_percent: random.random_range(10..60),
            queue_entries: *[8, 16, 64].get(random.random_range(0..3)).unwrap(),
            gate_wait: Duration::from_secs(2),
            pin_wait: Duration::from_secs(2),
            ..options(48 * shards as u64)
        };
        let faults = random.random_bool(0.3);
        let stamps = vec![Vec::new(); (MODEL_PAGES * BLOCKS) as usize];
        Self { bed: Bed::new(config, options), random, faults, newest: 0, stamps, truncated: 0 }
    }

    fn run(&mut self, seed: u64) {
        let gate = self.bed.engine().gate("wal");
        let log = self.bed.open(&MappingOptions { len_bytes: Some(MODEL_LOG_BYTES), ..log_options(&gate) });
        let data = self.bed.open(&MappingOptions { start_bytes: MODEL_LOG_BYTES, ..data_options(&gate) });
        let mut pending: Vec<Pending> = Vec::new();
        for _ in 0..self.random.random_range(20..300) {
            self.step(&gate, &log, &data, &mut pending);
            let (bed, faults, truncated) = (&mut self.bed, self.faults, &mut self.truncated);
            pending.retain_mut(|(future, promise)| match (bed.poll_once(future.as_mut()), *promise) {
                (Poll::Pending, _) => true,
                (Poll::Ready(Ok(())), Promise::Log(lsn)) => {
                    // An earlier sync may end after a later one.
                    let _ = gate.advance_durable_lsn(Lsn(lsn));
                    false
                }
                (Poll::Ready(Ok(())), Promise::Checkpoint(lsn)) => {
                    *truncated = lsn.max(*truncated);
                    false
                }
                (Poll::Ready(Err(Error::Gated { .. })), _) => false,
                (Poll::Ready(Err(error)), _) => {
                    assert!(faults, "{error}");
                    false
                }
            });
        }
        self.bed.assert_consistent();
        drop(pending);
        drop((log, data));
        self.bed.crash(seed);
        self.check();
    }

    fn step(&mut self, gate: &Gate, log: &Mapping, data: &Mapping, pending: &mut Vec<Pending>) {
        match self.random.random_range(0..100) {
            0..50 => self.change(gate, log, data),
            50..58 => {
                let (log, newest) = (log.clone(), self.newest);
                pending.push((Box::pin(async move { log.sync_async().await }), Promise::Log(newest)));
            }
            58..62 => {
                let (data, newest) = (data.clone(), self.newest);
                // Every change up to now is below the next number.
                let sync = Box::pin(async move { data.sync_async().await });
                pending.push((sync, Promise::Checkpoint(newest + 1)));
            }
            62..68 => {
                let lsn = self.random.random_range(0..=self.newest + 1);
                let data = data.clone();
                let flush = Box::pin(async move { data.flush_until_async(Lsn(lsn)).await });
                pending.push((flush, Promise::Checkpoint(lsn)));
            }
            68..74 => {
                let next = self.newest + 1;
                match self.bed.run(data.oldest_dirty_lsn_async()) {
                    Ok(oldest) => {
                        let needed_from = oldest.map_or(next, |oldest| oldest.0.min(next));
                        self.truncated = self.truncated.max(needed_from);
                    }
                    Err(error) => assert!(self.faults, "{error}"),
                }
            }
            74..78 => {
                let page = MODEL_BASE + self.random.random_range(0..MODEL_PAGES);
                let mut bytes = [0; 512];
                match self.bed.run(data.read_at_async(page * PAGE, &mut bytes)) {
                    Ok(()) => drop(number_in(&bytes)),
                    Err(error) => assert!(self.faults || matches!(error, Error::CacheFull { .. }), "{error}"),
                }
            }
            78..84 => {
                let by = self.random.random_range(1..6_000);
                self.bed.advance(Duration::from_millis(by));
            }
            84..87 if self.faults => {
                let (skip, times) = (self.random.random_range(0..4), self.random.random_range(0..3));
                self.bed.fail(NvmOpcode::WRITE, skip, times, fatal());
            }
            87..92 => {
                let (skip, by) = (self.random.random_range(0..4), self.random.random_range(1..500));
                self.bed.fault(NvmOpcode::WRITE, skip, 2, Action::Delay(Duration::from_micros(by)));
            }
            _ => drop(self.bed.step()),
        }
    }

    /// A record, then some blocks of a page that say so.
    fn change(&mut self, gate: &Gate, log: &Mapping, data: &Mapping) {
        let lsn = self.newest + 1;
        if lsn * 512 >= MODEL_LOG_BYTES {
            return;
        }
        match self.bed.run(log.write_at_async(lsn * 512, &block_of(lsn))) {
            Ok(()) => self.newest = lsn,
            Err(error) => return assert!(self.faults, "{error}"),
        }
        let page = self.random.random_range(0..MODEL_PAGES);
        let first = self.random.random_range(0..BLOCKS);
        let count = self.random.random_range(1..=BLOCKS - first);
        let bytes: Vec<u8> = (0..count).flat_map(|_| block_of(lsn)).collect();
        let at = (MODEL_BASE + page) * PAGE + first * 512;
        let in_place = self.random.random_bool(0.3);
        let stamped = self.bed.run(async {
            if !in_place {
                return data.write_at_lsn_async(at, &bytes, Lsn(lsn)).await;
            }
            let mut pin = data.pin_mut_async(MODEL_BASE + page).await?;
            pin.set_lsn(Lsn(lsn))?;
            pin[first as usize * 512..][..bytes.len()].copy_from_slice(&bytes);
            Ok(())
        });
        match stamped {
            Ok(()) => {
                for block in page * BLOCKS + first..page * BLOCKS + first + count {
                    self.stamps[block as usize].push(lsn);
                }
            }
            // Too many pages behind the gate, or the page kept for a sync that waits for it: the owner lets
            // its log on.
            Err(Error::CacheFull { .. } | Error::Gated { .. }) => {
                if self.bed.run(log.sync_async()).is_ok() {
                    let _ = gate.advance_durable_lsn(Lsn(self.newest));
                }
            }
            Err(error) => assert!(self.faults, "{error}"),
        }
    }

    /// What the device holds: no page is newer than the log, and what a checkpoint gave the log up for is
    /// there.
    fn check(&self) {
        let mut records = vec![0; MODEL_LOG_BYTES as usize];
        self.bed.device.read_image(1, 0, &mut records).unwrap();
        let record = |lsn: u64| number_in(&records[lsn as usize * 512..][..512]);
        let mut pages = vec![0; (MODEL_PAGES * PAGE) as usize];
        self.bed.device.read_image(1, MODEL_LOG_BYTES + MODEL_BASE * PAGE, &mut pages).unwrap();
        for (block, (bytes, stamps)) in pages.chunks_exact(512).zip(&self.stamps).enumerate() {
            let found = number_in(bytes);
            assert!(
                found == 0 || stamps.contains(&found),
                "block {block} holds {found}, which was never written"
            );
            for lsn in 1..=found {
                assert_eq!(record(lsn), lsn, "block {block} is of record {found}, and the log lacks {lsn}");
            }
            let promised = stamps.iter().copied().filter(|&lsn| lsn < self.truncated).max().unwrap_or(0);
            assert!(
                found >= promised,
                "block {block} holds {found}, but the log was given up to {}, and it had {promised}",
                self.truncated
            );
        }
    }
}

#[test]
fn wb40_wb45_at_no_power_cut_is_a_page_newer_than_the_log_or_older_than_a_checkpoint() {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().expect("a number"));
    let seeds = match number("FOLIANT_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("FOLIANT_SEEDS").unwrap_or(300),
    };
    for seed in seeds {
        let cut = std::panic::AssertUnwindSafe(|| Run::new(seed).run(seed.wrapping_mul(31)));
        if let Err(panic) = std::panic::catch_unwind(cut) {
            eprintln!("failed with FOLIANT_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}
