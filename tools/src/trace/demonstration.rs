//! The built-in workload: three mappings, each dirtied in a way of its own, on a cache that is too small for them.
//!
//! | mapping | dirtied | shows |
//! |---|---|---|
//! | log | appended in bursts, a sync after each | integrity passes that write large commands; flushes |
//! | table | random pages in bursts by two threads, one syncs now and then | passes that climb through the file |
//! | index | random small changes of one in four pages, never synced | background passes, by limit and by interval |

use std::time::Duration;

use foliant::{Engine, EngineOptions, Mapping, MappingOptions, PAGE_BYTES};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::dirty::DirtyLog;
use crate::error::Error;
use crate::progress::Progress;
use crate::size::ByteSize;

/// The device when none is named: slow, so that what happens takes time that can be seen.
pub(super) const DEVICE: &str =
    "emu:ram?size=64MiB&read_latency_us=200&write_latency_us=2500&flush_latency_us=4000";
/// Entries of a queue: few, so that a pass takes a while.
const QUEUE_ENTRIES: u16 = 16;
const COMMAND_BYTES_MAX: u32 = 64 << 10;
const FLUSH_INTERVAL: Duration = Duration::from_millis(150);
/// Bytes of each mapping, or a third of a smaller device.
const MAPPING_BYTES_MAX: u64 = 16 << 20;
const MAPPING_BYTES_MIN: u64 = 1 << 20;
/// Bursts of each thread.
const ROUNDS: u64 = 5;
/// What each thread does, in which mapping.
const THREADS: [(Habit, u16); 4] =
    [(Habit::Append, 0), (Habit::Scatter, 1), (Habit::Checkpoint, 1), (Habit::Patch, 2)];
const PAGE: u64 = PAGE_BYTES as u64;

/// The mappings, as they are opened, and what is done in them.
pub(super) const MAPPINGS: [&str; 3] = [
    "log: appended in bursts, a sync after each",
    "table: random pages by two threads, of which one syncs now and then",
    "index: small changes of random pages, left to the flusher",
];

/// The options of the engine, in words.
pub(super) fn options(cache: ByteSize, shards: u16) -> (EngineOptions, String) {
    let options = EngineOptions {
        cache_bytes: cache.0,
        shards: shards.into(),
        queue_entries: QUEUE_ENTRIES,
        transfer_bytes_max: COMMAND_BYTES_MAX,
        flush_interval: FLUSH_INTERVAL,
        ..EngineOptions::default()
    };
    let words = format!(
        "demonstration: {} threads on {} mappings; queues of {QUEUE_ENTRIES} entries, commands of at most {}, \
         background limit {} %, flush interval {FLUSH_INTERVAL:?}",
        THREADS.len(),
        MAPPINGS.len(),
        ByteSize(COMMAND_BYTES_MAX.into()),
        options.dirty_background_percent,
    );
    (options, words)
}

/// Opens the mappings: a third of the device each.
pub(super) fn mappings(engine: &Engine, uri: &str) -> Result<Vec<Mapping>, Error> {
    let namespace = engine.namespaces().iter().find(|namespace| namespace.id() == 1);
    let bytes = namespace.map_or(0, |namespace| namespace.blocks() * u64::from(namespace.block_bytes()));
    let each = (bytes / MAPPINGS.len() as u64 / PAGE * PAGE).min(MAPPING_BYTES_MAX);
    if each < MAPPING_BYTES_MIN {
        return Err(Error::Option {
            option: "the device",
            value: uri.to_owned(),
            reason: format!(
                "its namespace 1 has {}, and the demonstration needs {}; name a larger one",
                ByteSize(bytes),
                ByteSize(MAPPING_BYTES_MIN * MAPPINGS.len() as u64)
            ),
        });
    }
    let open = |number| {
        let (start_bytes, len_bytes) = (number * each, Some(each));
        let options = MappingOptions { start_bytes, len_bytes, ..MappingOptions::default() };
        Ok(engine.mapping(&options)?)
    };
    (0..MAPPINGS.len() as u64).map(open).collect()
}

/// Runs all threads to their end, and syncs what they have left.
pub(super) fn run(mappings: &[Mapping], seed: u64, dirtied: &DirtyLog) -> Result<(), Error> {
    let progress = Progress::counting(ROUNDS * THREADS.len() as u64, "bursts");
    progress.stage("demonstration");
    let (mappings, progress) = (&mappings, &progress);
    let ends: Vec<Result<(), Error>> = std::thread::scope(|scope| {
        let spawn = |(thread, (habit, number)): (u64, (Habit, u16))| {
            scope.spawn(move || {
                let rng = SmallRng::seed_from_u64(seed ^ (thread + 1));
                let mapping = mappings[usize::from(number)].clone();
                let mut actor = Actor { mapping, number, rng, dirtied };
                (0..ROUNDS).try_for_each(|round| {
                    progress.advance(1);
                    actor.burst(habit, round)
                })
            })
        };
        let threads: Vec<_> = (0..).zip(THREADS).map(spawn).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or(Err(Error::ThreadPanicked { what: "ran the demonstration" }))
        };
        threads.into_iter().map(join).collect()
    });
    ends.into_iter().collect::<Result<(), Error>>()?;
    progress.stage("last syncs");
    mappings.iter().try_for_each(|mapping| Ok(mapping.sync()?))
}

/// How a thread dirties its mapping.
#[derive(Clone, Copy, Debug)]
enum Habit {
    Append,
    Scatter,
    Checkpoint,
    Patch,
}

/// A thread, with its mapping.
struct Actor<'a> {
    mapping: Mapping,
    number: u16,
    rng: SmallRng,
    dirtied: &'a DirtyLog,
}

impl Actor<'_> {
    fn burst(&mut self, habit: Habit, round: u64) -> Result<(), Error> {
        match habit {
            Habit::Append => self.append(round),
            Habit::Scatter => self.scatter(),
            Habit::Checkpoint => self.checkpoint(round),
            Habit::Patch => self.patch(),
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.mapping.write_at(offset, bytes)?;
        self.dirtied.note(self.number, offset..offset + bytes.len() as u64);
        Ok(())
    }

    fn random_page(&mut self, part: u64) -> u64 {
        self.rng.random_range(0..(self.mapping.pages() / part).max(1))
    }

    /// A burst of an eighth of the file in records of four pages, with a sync behind it.
    fn append(&mut self, round: u64) -> Result<(), Error> {
        let (pages, record) = (self.mapping.pages(), [0x11; 4 * PAGE_BYTES]);
        let burst = (pages / 8).min(256) / 4;
        for number in 0..burst {
            let first = (round * burst + number) * 4 % (pages - 3);
            self.write(first * PAGE, &record)?;
            if number % 8 == 7 {
                pause(1);
            }
        }
        self.mapping.sync()?;
        pause(50);
        Ok(())
    }

    /// Many random pages at once, left to the flusher.
    fn scatter(&mut self) -> Result<(), Error> {
        for _ in 0..160 {
            let page = self.random_page(1);
            self.write(page * PAGE, &[0x22; PAGE_BYTES])?;
        }
        pause(60);
        Ok(())
    }

    /// Fewer random pages one after another, with a sync after every other burst.
    fn checkpoint(&mut self, round: u64) -> Result<(), Error> {
        for number in 0..60 {
            let page = self.random_page(1);
            self.write(page * PAGE, &[0x33; PAGE_BYTES])?;
            if number % 10 == 9 {
                pause(2);
            }
        }
        if round % 2 == 1 {
            self.mapping.sync()?;
        }
        pause(45);
        Ok(())
    }

    /// Small changes of every fourth page: pages are read, and some are dirtied again and again.
    fn patch(&mut self) -> Result<(), Error> {
        for number in 0..40 {
            let page = self.random_page(4) * 4 % self.mapping.pages();
            self.write(page * PAGE + 512, &[0x44; 512])?;
            if number % 4 == 3 {
                pause(3);
            }
        }
        pause(25);
        Ok(())
    }
}

/// What the writer would do between writes.
fn pause(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}
