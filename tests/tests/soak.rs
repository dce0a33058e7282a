//! Everything at once: eight threads pin, read, write, discard, sync and advise at random on three mappings, while the
//! cache and its shares change their sizes. Every read is checked; at the end, with the engine closed, every byte on the device.
//!
//! A page consists of 8-byte words that are all alike: which page it is, and its *generation*, which counts its changes. Who
//! changes a page says so before and afterwards, so whoever reads it knows between which generations what it meets has to lie.
//! After a discard a page is zeros; its generation is then a multiple of [`ZEROS_EVERY`], which no write leaves behind.
//!
//! `FOLIANT_SOAK_SECONDS` says for how long (60 without it), `FOLIANT_SEED` from which seed; both are printed.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use foliant::{
    Advice, CacheShare, Engine, EngineOptions, EngineStats, Error, Hugepages, Mapping, MappingOptions,
    ShareOptions,
};
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController, Latency};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const THREADS: u64 = 8;
const SHARDS: usize = 3;
const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Bytes of each mapping: several stripes, so that each shard has some of them.
const LEN: u64 = 12 * MIB;
const ZEROS_EVERY: u64 = 1 << 10;
/// Frames that all pins together never need, so that a request always finds some.
const FRAMES_MIN: u64 = 160;
const FRAMES_MAX: u64 = 320;

/// What a page is known to be.
#[derive(Default)]
struct Page {
    /// One changes it at a time. Several are locked in ascending order, before they are pinned.
    writer: Mutex<()>,
    /// The generation that it has at least.
    done: AtomicU64,
    /// The generation that it has at most.
    begun: AtomicU64,
}

impl Page {
    /// The generation that the next write leaves behind, which is announced.
    fn begin_write(&self) -> u64 {
        let next = self.done.load(Ordering::SeqCst) + 1;
        let next = if next.is_multiple_of(ZEROS_EVERY) { next + 1 } else { next };
        self.begun.store(next, Ordering::SeqCst);
        next
    }

    fn begin_discard(&self) -> u64 {
        let next = (self.done.load(Ordering::SeqCst) + 1).next_multiple_of(ZEROS_EVERY);
        self.begun.store(next, Ordering::SeqCst);
        next
    }

    fn end(&self, generation: u64) {
        self.done.store(generation, Ordering::SeqCst);
    }
}

/// A mapping and what is known of it.
struct Subject {
    number: u64,
    mapping: Mapping,
    page_bytes: u64,
    pages: Vec<Page>,
    /// Read by who holds several pins, written by who discards: a discard waits for pins within its range, and who asks for a
    /// page of the range for the discard, so the two would wait for each other.
    several: RwLock<()>,
}

impl Subject {
    fn word(&self, page: u64, generation: u64) -> u64 {
        if generation.is_multiple_of(ZEROS_EVERY) { 0 } else { generation << 24 | self.number << 20 | page }
    }

    fn fill(&self, page: u64, generation: u64, bytes: &mut [u8]) {
        let word = self.word(page, generation).to_le_bytes();
        bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&word));
    }

    /// The word of a page, which isn't torn.
    fn word_of(&self, page: u64, bytes: &[u8]) -> u64 {
        let word = |chunk: &[u8]| u64::from_le_bytes(chunk.try_into().unwrap());
        let first = word(&bytes[..8]);
        let torn = bytes.chunks_exact(8).position(|chunk| word(chunk) != first);
        assert_eq!(torn, None, "page {page} of mapping {} is torn", self.number);
        first
    }

    /// Checks bytes that were read after the page had had generation `least`.
    fn check(&self, page: u64, bytes: &[u8], least: u64) {
        let most = self.pages[page as usize].begun.load(Ordering::SeqCst);
        let (word, at) = (self.word_of(page, bytes), (self.number, page));
        if word == 0 {
            let zeros = least.next_multiple_of(ZEROS_EVERY);
            assert!(zeros <= most, "{at:?} is zeros between generations {least} and {most}");
            return;
        }
        assert_eq!(word, self.word(page, word >> 24), "{at:?} holds another page's bytes: {word:#x}");
        assert!((least..=most).contains(&(word >> 24)), "{at:?} has {}, not {least}..={most}", word >> 24);
    }

    fn least(&self, page: u64) -> u64 {
        self.pages[page as usize].done.load(Ordering::SeqCst)
    }

    fn lock(&self, pages: Range<u64>) -> Vec<MutexGuard<'_, ()>> {
        pages.map(|page| self.pages[page as usize].writer.lock().unwrap()).collect()
    }

    fn bytes(&self, pages: &Range<u64>) -> Range<u64> {
        pages.start * self.page_bytes..pages.end * self.page_bytes
    }
}

/// One thread.
struct Soaker<'a> {
    random: SmallRng,
    engine: &'a Engine,
    subjects: &'a [Subject],
    shares: &'a [CacheShare],
    buffer: Vec<u8>,
    done: u64,
}

impl<'a> Soaker<'a> {
    fn subject(&mut self) -> &'a Subject {
        &self.subjects[self.random.random_range(0..self.subjects.len())]
    }

    /// Some pages are hot, so that threads meet.
    fn page(&mut self, subject: &Subject) -> u64 {
        let pages = subject.pages.len() as u64;
        let hot = self.random.random_bool(0.3);
        self.random.random_range(0..if hot { 16 } else { pages })
    }

    fn range(&mut self, subject: &Subject, most: u64) -> Range<u64> {
        let first = self.page(subject);
        let count = self.random.random_range(1..=most).min(subject.pages.len() as u64 - first);
        first..first + count
    }

    /// Up to three pages of one mapping in ascending order: whoever holds one asks only for those behind it.
    fn ascending(&mut self, subject: &Subject) -> Vec<u64> {
        let count = self.random.random_range(1..=3);
        let mut pages: Vec<_> = (0..count).map(|_| self.page(subject)).collect();
        pages.sort_unstable();
        pages.dedup();
        pages
    }

    /// Keeps what it holds for a while.
    fn hold(&mut self) {
        for _ in 0..self.random.random_range(0..20) {
            std::thread::yield_now();
        }
    }

    fn pins(&mut self) -> foliant::Result<()> {
        let subject = self.subject();
        let _several = subject.several.read().unwrap();
        let mut held = Vec::new();
        for page in self.ascending(subject) {
            let least = subject.least(page);
            held.push((page, least, subject.mapping.pin(page)?));
        }
        self.hold();
        held.iter().for_each(|(page, least, pin)| subject.check(*page, pin, *least));
        Ok(())
    }

    fn exclusive_pins(&mut self) -> foliant::Result<()> {
        let subject = self.subject();
        let _several = subject.several.read().unwrap();
        let mut held = Vec::new();
        for page in self.ascending(subject) {
            let (lock, known) = (subject.lock(page..page + 1), &subject.pages[page as usize]);
            let pin = subject.mapping.pin_mut(page)?;
            subject.check(page, &pin, subject.least(page));
            held.push((lock, page, known, pin));
        }
        self.hold();
        for (lock, page, known, mut pin) in held {
            if self.random.random_bool(0.8) {
                let generation = known.begin_write();
                subject.fill(page, generation, &mut pin);
                drop(pin);
                known.end(generation);
            }
            drop(lock);
        }
        Ok(())
    }

    fn read(&mut self) -> foliant::Result<()> {
        let subject = self.subject();
        let pages = self.range(subject, 40);
        let bytes = subject.bytes(&pages);
        let least: Vec<_> = pages.clone().map(|page| subject.least(page)).collect();
        self.buffer.resize((bytes.end - bytes.start) as usize, 0);
        subject.mapping.read_at(bytes.start, &mut self.buffer)?;
        let read = self.buffer.chunks_exact(subject.page_bytes as usize);
        pages.zip(read).zip(least).for_each(|((page, bytes), least)| subject.check(page, bytes, least));
        Ok(())
    }

    fn write(&mut self) -> foliant::Result<()> {
        let subject = self.subject();
        let pages = self.range(subject, 8);
        let _locks = subject.lock(pages.clone());
        let bytes = subject.bytes(&pages);
        self.buffer.resize((bytes.end - bytes.start) as usize, 0);
        let known = &subject.pages[pages.start as usize..pages.end as usize];
        let generations: Vec<_> = known.iter().map(Page::begin_write).collect();
        let written = self.buffer.chunks_exact_mut(subject.page_bytes as usize);
        for ((page, generation), bytes) in pages.zip(&generations).zip(written) {
            subject.fill(page, *generation, bytes);
        }
        subject.mapping.write_at(bytes.start, &self.buffer)?;
        known.iter().zip(generations).for_each(|(known, generation)| known.end(generation));
        Ok(())
    }

    fn discard(&mut self) -> foliant::Result<()> {
        let subject = self.subject();
        let pages = self.range(subject, 64);
        let _alone = subject.several.write().unwrap();
        let _locks = subject.lock(pages.clone());
        let known = &subject.pages[pages.start as usize..pages.end as usize];
        let generations: Vec<_> = known.iter().map(Page::begin_discard).collect();
        subject.mapping.discard(subject.bytes(&pages))?;
        known.iter().zip(generations).for_each(|(known, generation)| known.end(generation));
        Ok(())
    }

    fn sync(&mut self) -> foliant::Result<()> {
        let subject = self.subject();
        if self.random.random_bool(0.3) {
            return subject.mapping.sync();
        }
        let pages = self.range(subject, 200);
        subject.mapping.sync_range(subject.bytes(&pages))
    }

    fn advise(&mut self) -> foliant::Result<()> {
        const ADVICE: [Advice; 8] = [
            Advice::Normal,
            Advice::Sequential,
            Advice::Random,
            Advice::NoReuse,
            Advice::WillNeed,
            Advice::WillNeed,
            Advice::DontNeed,
            Advice::DontNeed,
        ];
        let subject = self.subject();
        let pages = self.range(subject, 200);
        let advice = ADVICE[self.random.random_range(0..ADVICE.len())];
        subject.mapping.advise(subject.bytes(&pages), advice)
    }

    fn resize(&mut self) -> foliant::Result<()> {
        let frames = self.random.random_range(FRAMES_MIN..=FRAMES_MAX) * SHARDS as u64;
        let which = self.random.random_range(0..=self.shares.len());
        let reached = match self.shares.get(which) {
            None => {
                self.engine.resize_cache(frames * PAGE)?;
                self.random.random_bool(0.3).then(|| self.engine.await_cache_limit())
            }
            Some(share) => {
                // Small ones, too: of pages of 4096 bytes three a thread are pinned at most.
                let least = if which == 0 { 40 } else { FRAMES_MIN };
                let frames = self.random.random_range(least..=FRAMES_MAX / 2 + 40) * SHARDS as u64;
                share.resize(frames * PAGE)?;
                self.random.random_bool(0.3).then(|| share.await_limit())
            }
        };
        match reached {
            // Others may have raised and lowered it meanwhile, and hold pins.
            None | Some(Ok(()) | Err(Error::AboveLimit { .. })) => Ok(()),
            Some(Err(error)) => Err(error),
        }
    }

    fn run(&mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            let (what, result) = match self.random.random_range(0..100) {
                0..35 => ("pins", self.pins()),
                35..58 => ("exclusive pins", self.exclusive_pins()),
                58..72 => ("a read", self.read()),
                72..86 => ("a write", self.write()),
                86..89 => ("a discard", self.discard()),
                89..92 => ("a sync", self.sync()),
                92..96 => ("a hint", self.advise()),
                _ => ("a resize", self.resize()),
            };
            result.unwrap_or_else(|error| panic!("{what}: {error}"));
            self.done += 1;
        }
    }
}

/// Checks that counts agree, those since `opened` that need a beginning: opening a mapping looks for a label behind it.
fn assert_counts(stats: &EngineStats, opened: &EngineStats, engine: &Engine) {
    assert_eq!((stats.dirty_pages, stats.writeback_pages, stats.poisoned_pages), (0, 0, 0), "{stats:?}");
    assert_eq!(stats.pages_installed, stats.pages_released + stats.pages_cached, "{stats:?}");
    assert_eq!(engine.cache_usage().used_bytes, stats.pages_cached * PAGE, "{stats:?}");
    assert!(stats.pages_read + stats.pages_created <= stats.pages_installed, "{stats:?}");
    assert!(stats.pages_evicted <= stats.pages_released, "{stats:?}");
    assert_eq!((stats.command_errors, stats.command_retries), (0, 0), "{stats:?}");
    let commands = stats.read_commands + stats.write_commands + stats.zero_commands + stats.flush_commands;
    assert_eq!(stats.commands - opened.commands, commands, "{stats:?}");
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn eight_threads_on_everything_at_once_lose_nothing_and_all_counts_agree() {
    let (seed, seconds) = (number("FOLIANT_SEED", 7), number("FOLIANT_SOAK_SECONDS", 60));
    println!("FOLIANT_SEED={seed} FOLIANT_SOAK_SECONDS={seconds}");
    let config = EmulatedConfig {
        latency: Latency::uniform(Duration::from_micros(10)),
        ..EmulatedConfig::ram(64 * MIB, 512)
    };
    let device = EmulatedController::new(config).unwrap();
    let options = EngineOptions {
        cache_bytes: FRAMES_MAX * SHARDS as u64 * PAGE,
        shards: SHARDS,
        hugepages: Hugepages::Never,
        flush_interval: Duration::from_millis(20),
        pin_wait: Duration::from_secs(60),
        ..Default::default()
    };
    let engine = Engine::open_on(device.attach().unwrap(), &options).unwrap();
    let share = |name, limit: u64, guaranteed: u64| {
        let bytes = SHARDS as u64 * PAGE;
        let options = ShareOptions { limit_bytes: Some(limit * bytes), guaranteed_bytes: guaranteed * bytes };
        engine.share(name, &options).unwrap()
    };
    let shares = [share("small", 40, 0), share("guaranteed", FRAMES_MIN, 40)];
    let subjects: Vec<_> = [(PAGE, Some(&shares[0])), (4 * PAGE, Some(&shares[1])), (PAGE, None)]
        .into_iter()
        .zip(0..)
        .map(|((page_bytes, share), number)| Subject {
            number,
            mapping: engine
                .mapping(&MappingOptions {
                    start_bytes: number * 16 * MIB,
                    len_bytes: Some(LEN),
                    page_bytes: page_bytes as u32,
                    share: share.cloned(),
                    ..Default::default()
                })
                .unwrap(),
            page_bytes,
            pages: (0..LEN / page_bytes).map(|_| Page::default()).collect(),
            several: RwLock::default(),
        })
        .collect();
    let opened = engine.stats();
    let stop = AtomicBool::new(false);
    let done: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let random = SmallRng::seed_from_u64(seed * THREADS + thread);
                let mut soaker = Soaker {
                    random,
                    engine: &engine,
                    subjects: &subjects,
                    shares: &shares,
                    buffer: Vec::new(),
                    done: 0,
                };
                let stop = &stop;
                scope.spawn(move || {
                    soaker.run(stop);
                    soaker.done
                })
            })
            .collect();
        let end = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < end && threads.iter().all(|thread| !thread.is_finished()) {
            std::thread::sleep(Duration::from_millis(50));
        }
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    subjects.iter().for_each(|subject| subject.mapping.sync().unwrap());
    shares.iter().for_each(|share| share.await_limit().unwrap());
    engine.await_cache_limit().unwrap();
    let stats = engine.stats();
    println!("{done} operations; {stats:?}");
    assert_counts(&stats, &opened, &engine);
    let evicted_and_written = stats.pages_evicted > 0 && stats.pages_written > 0 && stats.zero_commands > 0;
    assert!(evicted_and_written, "{stats:?}");
    // Succeeds only where nobody has a pin any more.
    subjects.iter().for_each(|subject| subject.mapping.clone().close().unwrap());
    let stats = engine.stats();
    assert_counts(&stats, &opened, &engine);
    assert_eq!(stats.pages_cached, 0, "{stats:?}");
    assert!(shares.iter().all(|share| share.usage().used_bytes == 0));
    engine.close().unwrap();
    let mut bytes = vec![0; 4 * PAGE as usize];
    for subject in &subjects {
        for (page, known) in (0..).zip(&subject.pages) {
            let bytes = &mut bytes[..subject.page_bytes as usize];
            device.read_image(1, subject.number * 16 * MIB + page * subject.page_bytes, bytes).unwrap();
            let generation = known.done.load(Ordering::SeqCst);
            assert_eq!(generation, known.begun.load(Ordering::SeqCst));
            assert_eq!(subject.word_of(page, bytes), subject.word(page, generation), "page {page}");
        }
    }
}
