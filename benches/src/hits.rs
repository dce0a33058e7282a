//! `versus hits`: what it costs to use a page that is in the cache already.
//!
//! Three races over the same 256 MiB, each access random and independent of the one before: touching one word of a
//! page in place, copying a page out, copying a page in. Beside the engine run what a database would use instead:
//! the kernel's page cache by calls and by mapping, cache crates, and the bare memory that the engine's own
//! frames are, which nobody can beat. A fourth race has two threads at once.

mod least;
mod peers;

use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::Barrier;
use std::thread::ScopedJoinHandle;

use anyhow::{Context, Result, anyhow};
use foliant::{
    Engine, EngineOptions, LocalShards, Mapping, MappingOptions, PagePin, PagePinMut, ReadAt, ShardThreads,
};
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController};

use self::least::LeastCache;
use self::peers::{CacheCrates, WarmFile};
use crate::engine::quiet_options;
use crate::measure::{Contestant, Effort, Timed, ns_per_step, race};
use crate::report::{Answer, Cell, Limit, Row, Table, Target};
use crate::walk::{self, PAGE, Step};

/// Pages of the working set: 256 MiB.
pub const PAGES: u32 = 1 << 16;
/// Times that a round of touches visits every page; a round of copies does it once.
const TOUCH_PASSES: usize = 4;

/// How far ahead the rows with `prefetch_line` name a word that they will touch.
const STEPS_AHEAD: usize = 10;

/// Words that a `read_many` names.
const BATCH: usize = 64;

/// Everything that takes part, warm.
struct Bed {
    mapping: Mapping,
    engine: Engine,
    file: WarmFile,
    crates: CacheCrates,
    touches: Vec<Step>,
    copies: Vec<Step>,
}

impl Bed {
    fn new() -> Result<Self> {
        let device = EmulatedController::new(EmulatedConfig::null(u64::from(PAGES) * PAGE as u64, 4096))?;
        // A quarter more than the working set, so that neither eviction nor the flusher has a reason to act.
        let cache_bytes = u64::from(PAGES) * PAGE as u64 / 4 * 5;
        let engine = Engine::open_on(device.attach()?, &EngineOptions { cache_bytes, ..quiet_options() })?;
        let mapping = engine.mapping(&MappingOptions::default())?;
        for page in 0..u64::from(PAGES) {
            mapping.write_at(page * PAGE as u64, &[page as u8; PAGE])?;
        }
        mapping.sync()?;
        Ok(Self {
            mapping,
            engine,
            file: WarmFile::new(PAGES as usize)?,
            crates: CacheCrates::new(PAGES),
            touches: walk::random(PAGES, TOUCH_PASSES, 1),
            copies: walk::random(PAGES, 1, 2),
        })
    }

    /// Shared pins of all pages, in page order: while they exist the frames are plain memory.
    fn pin_all(&self) -> Result<Vec<PagePin<'_>>> {
        (0..u64::from(PAGES)).map(|page| Ok(self.mapping.pin(page)?)).collect()
    }

    fn pin_all_mut(&self) -> Result<Vec<PagePinMut<'_>>> {
        (0..u64::from(PAGES)).map(|page| Ok(self.mapping.pin_mut(page)?)).collect()
    }
}

/// The same pages in an engine whose shard the measuring thread polls itself.
struct LocalBed {
    mapping: Mapping,
    shards: LocalShards,
    /// Goes last: it closes the device.
    _engine: Engine,
}

impl LocalBed {
    fn new() -> Result<Self> {
        let device = EmulatedController::new(EmulatedConfig::null(u64::from(PAGES) * PAGE as u64, 4096))?;
        let cache_bytes = u64::from(PAGES) * PAGE as u64 / 4 * 5;
        let options = EngineOptions { cache_bytes, threads: ShardThreads::Manual, ..quiet_options() };
        let engine = Engine::open_on(device.attach()?, &options)?;
        let shards = LocalShards::new(engine.take_shards());
        let mapping = shards.block_on(engine.mapping_async(&MappingOptions::default()))?;
        let local = shards.mapping(&mapping);
        for page in 0..u64::from(PAGES) {
            local.write_at(page * PAGE as u64, &[page as u8; PAGE])?;
        }
        local.sync()?;
        Ok(Self { mapping, shards, _engine: engine })
    }
}

/// Runs the races.
pub fn answer(effort: Effort) -> Result<Answer> {
    let bed = Bed::new()?;
    let rounds = effort.rounds(9);
    let touches = touch_race(&bed, &LocalBed::new()?, rounds)?;
    let dependent = dependent_race(&bed, rounds)?;
    let reads = read_race(&bed, rounds)?;
    let writes = write_race(&bed, rounds)?;
    let beside = |race: &[Timed], one: &str, other: &str| -> Result<Option<f64>> {
        Ok(Some(named(race, one)?.ratio_to(named(race, other)?)))
    };
    let bare = "bare memory (our frames)";
    let (read_at, write_at) = ("foliant read_at", "foliant write_at, page dirty already");
    let memcpy = ["memcpy (our frames)", "memcpy to our frames"];
    let times = "times as long";
    let mut targets = vec![
        Target::new(
            "pin, touch, release beside the bare touch",
            times,
            Limit::AtMost(2.5),
            beside(&touches, "foliant pin", bare)?,
        ),
        Target::new(
            "the same by the shard's thread",
            times,
            Limit::AtMost(2.0),
            beside(&touches, "foliant pin, by the shard's thread", bare)?,
        ),
        Target::new(
            "read_with beside the bare touch",
            times,
            Limit::AtMost(1.7),
            beside(&touches, "foliant read_with", bare)?,
        ),
        Target::new(
            "quick_cache get beside pin",
            times,
            Limit::AtLeast(2.0),
            beside(&touches, "quick_cache get", "foliant pin")?,
        ),
        Target::new(
            "foyer get beside pin",
            times,
            Limit::AtLeast(10.0),
            beside(&touches, "foyer get", "foliant pin")?,
        ),
        Target::new(
            "moka get beside pin",
            times,
            Limit::AtLeast(10.0),
            beside(&touches, "moka get", "foliant pin")?,
        ),
        Target::new("read_at beside memcpy", times, Limit::AtMost(1.25), beside(&reads, read_at, memcpy[0])?),
        Target::new("pread beside read_at", times, Limit::AtLeast(1.7), beside(&reads, "pread", read_at)?),
        Target::new(
            "write_at beside memcpy",
            times,
            Limit::AtMost(1.25),
            beside(&writes, write_at, memcpy[1])?,
        ),
        Target::new(
            "pwrite beside write_at",
            times,
            Limit::AtLeast(1.7),
            beside(&writes, "pwrite", write_at)?,
        ),
    ];
    let mut tables = vec![
        table("touch one word of a page, in place", &touches),
        table("the same, each page named by the word before", &dependent),
        table("copy a page out", &reads),
        table("copy a page in", &writes),
    ];
    let mut notes = vec![
        format!("the file of pread, pwrite and mmap lies on {} and is in the page cache", bed.file.filesystem),
        format!("the engine's frames are {:?}", bed.engine.arena_backing()),
        "`ratio` is the line's time over ours, the first line: above 1, ours is faster".into(),
        "the least look-up is no cache: three loads from arrays (page to frame, the frame's header before and after) \
                and the touch, which is what any cache has to do at least whose pages can change"
            .into(),
        format!(
            "the rows with the line fetched ahead call prefetch_line for the word that they touch {STEPS_AHEAD} accesses later"
        ),
        format!("read_many copies words out, {BATCH} a call; the time is a word's"),
        "quick_cache, foyer and moka hold an Arc<[u8]> a page; a get hands out a reference and copies nothing".into(),
    ];
    if std::thread::available_parallelism()?.get() >= 2 {
        let (table, scaling) = two_threads(&bed, rounds)?;
        tables.push(table);
        targets.extend(scaling);
        notes.push(
            "two threads: 2.0 is perfect scaling; threads are pinned to two cores, and a core that other \
                    programs use at the same time hides contention"
                .into(),
        );
    } else {
        notes.push("two threads were not measured: this process may use one core only".into());
    }
    Ok(Answer { question: "hits", rounds, tables, targets, notes })
}

fn touch_race(bed: &Bed, own: &LocalBed, rounds: usize) -> Result<Vec<Timed>> {
    let steps = &bed.touches[..];
    let least = LeastCache::new(PAGES)?;
    let map = bed.file.map();
    let crates = &bed.crates;
    race(
        rounds,
        &mut [
            Contestant::new("foliant pin", || ns_per_step(steps, |step| pin_word(&bed.mapping, step))),
            Contestant::new("foliant pin, by the shard's thread", || {
                let local = own.shards.mapping(&own.mapping);
                ns_per_step(steps, |step| {
                    let page = local.pin(u64::from(step.page))?;
                    Ok(word(&page, step.within as usize))
                })
            }),
            Contestant::new("foliant read_with", || {
                ns_per_step(steps, |step| read_with_word(&bed.mapping, step))
            }),
            Contestant::new("foliant pin, line fetched ahead", || {
                ahead(bed, steps, |step| pin_word(&bed.mapping, step))
            }),
            Contestant::new("foliant read_with, line fetched ahead", || {
                ahead(bed, steps, |step| read_with_word(&bed.mapping, step))
            }),
            Contestant::new("foliant read_many, words by the batch", || many_words(bed, steps)),
            Contestant::new("quick_cache get", || {
                ns_per_step(steps, |step| {
                    let page = crates.quick.get(&step.page).ok_or_else(lost)?;
                    Ok(word(&page, step.within as usize))
                })
            }),
            Contestant::new("foyer get", || {
                ns_per_step(steps, |step| {
                    let entry = crates.foyer.get(&step.page).ok_or_else(lost)?;
                    Ok(word(entry.value(), step.within as usize))
                })
            }),
            Contestant::new("moka get", || {
                ns_per_step(steps, |step| {
                    let page = crates.moka.get(&step.page).ok_or_else(lost)?;
                    Ok(word(&page, step.within as usize))
                })
            }),
            Contestant::new("mmap of the file", || {
                ns_per_step(steps, |step| Ok(word(map, step.word_start())))
            }),
            Contestant::new("the least look-up", || {
                ns_per_step(steps, |step| least.touch(step).ok_or_else(lost))
            }),
            Contestant::new("bare memory (our frames)", || {
                let pins = bed.pin_all()?;
                let words: Vec<&u8> =
                    steps.iter().map(|s| &pins[s.page as usize][s.within as usize]).collect();
                ns_per_step(&words, |&word| Ok(u64::from(word)))
            }),
        ],
    )
}

/// As [`ns_per_step`], for one who knows his next accesses.
fn ahead(bed: &Bed, steps: &[Step], mut touch: impl FnMut(Step) -> Result<u64>) -> Result<f64> {
    let mut coming = steps.iter().skip(STEPS_AHEAD);
    ns_per_step(steps, |step| {
        if let Some(next) = coming.next() {
            bed.mapping.prefetch_line(u64::from(next.page), next.within as usize);
        }
        touch(step)
    })
}

/// The words of `steps`, copied out in batches; ns a word.
fn many_words(bed: &Bed, steps: &[Step]) -> Result<f64> {
    let batches: Vec<&[Step]> = steps.chunks_exact(BATCH).collect();
    let mut words = [[0; 8]; BATCH];
    let batch_ns = ns_per_step(&batches, |batch| {
        let reads = batch.iter().zip(&mut words);
        let mut reads: Vec<ReadAt<'_>> =
            reads.map(|(step, word)| ReadAt::new(step.word_start() as u64, word)).collect();
        bed.mapping.read_many(&mut reads)?;
        Ok(words.iter().fold(0, |sum, word| sum ^ u64::from_ne_bytes(*word)))
    })?;
    Ok(batch_ns / BATCH as f64)
}

fn read_race(bed: &Bed, rounds: usize) -> Result<Vec<Timed>> {
    let steps = &bed.copies[..];
    let (map, crates) = (bed.file.map(), &bed.crates);
    let copy_out = |read: &mut dyn FnMut(Step, &mut [u8]) -> Result<()>| {
        let mut buffer = [0; PAGE];
        ns_per_step(steps, |step| {
            read(step, &mut buffer)?;
            Ok(u64::from(black_box(&buffer)[0]))
        })
    };
    race(
        rounds,
        &mut [
            Contestant::new("foliant read_at", || {
                copy_out(&mut |step, buffer| Ok(bed.mapping.read_at(step.page_start() as u64, buffer)?))
            }),
            Contestant::new("pread", || {
                copy_out(&mut |step, buffer| {
                    Ok(bed.file.file.read_exact_at(buffer, step.page_start() as u64)?)
                })
            }),
            Contestant::new("mmap and copy", || {
                copy_out(&mut |step, buffer| {
                    buffer.copy_from_slice(&map[step.page_start()..][..PAGE]);
                    Ok(())
                })
            }),
            Contestant::new("quick_cache get and copy", || {
                copy_out(&mut |step, buffer| {
                    buffer.copy_from_slice(&crates.quick.get(&step.page).ok_or_else(lost)?);
                    Ok(())
                })
            }),
            Contestant::new("memcpy (our frames)", || {
                let pins = bed.pin_all()?;
                let pages: Vec<&[u8]> = pins.iter().map(|pin| &**pin).collect();
                copy_out(&mut |step, buffer| {
                    buffer.copy_from_slice(pages[step.page as usize]);
                    Ok(())
                })
            }),
        ],
    )
}

fn write_race(bed: &Bed, rounds: usize) -> Result<Vec<Timed>> {
    let steps = &bed.copies[..];
    let data = [0x5A; PAGE];
    let mut writable = bed.file.map_mut()?;
    let copy_in = |write: &mut dyn FnMut(Step, &[u8]) -> Result<()>| {
        ns_per_step(steps, |step| {
            write(step, black_box(&data))?;
            Ok(0)
        })
    };
    race(
        rounds,
        &mut [
            Contestant::new("foliant write_at, page dirty already", || {
                bed.pin_all_mut()?.iter_mut().for_each(|pin| pin[0] ^= 1);
                copy_in(&mut |step, data| Ok(bed.mapping.write_at(step.page_start() as u64, data)?))
            }),
            Contestant::new("foliant write_at, page clean", || {
                bed.mapping.sync()?;
                copy_in(&mut |step, data| Ok(bed.mapping.write_at(step.page_start() as u64, data)?))
            }),
            Contestant::new("pwrite", || {
                copy_in(&mut |step, data| Ok(bed.file.file.write_all_at(data, step.page_start() as u64)?))
            }),
            Contestant::new("copy into mmap", || {
                copy_in(&mut |step, data| {
                    writable[step.page_start()..][..PAGE].copy_from_slice(data);
                    Ok(())
                })
            }),
            Contestant::new("memcpy to our frames", || {
                let mut pins = bed.pin_all_mut()?;
                let mut pages: Vec<&mut [u8]> = pins.iter_mut().map(|pin| &mut **pin).collect();
                copy_in(&mut |step, data| {
                    pages[step.page as usize].copy_from_slice(data);
                    Ok(())
                })
            }),
        ],
    )
}

/// The same call by one thread and by two at once, and what the two are to reach.
fn two_threads(bed: &Bed, rounds: usize) -> Result<(Table, Vec<Target>)> {
    let mapping = &bed.mapping;
    let touches = [&bed.touches[..], &walk::random(PAGES, TOUCH_PASSES, 3)[..]];
    let copies = [&bed.copies[..], &walk::random(PAGES, 1, 4)[..]];
    let hot: Vec<Step> = touches[0].iter().map(|step| Step { page: 7, ..*step }).collect();
    let hot = [&hot[..], &hot[..]];
    let pin = |step: Step| pin_word(mapping, step);
    let look = |step: Step| read_with_word(mapping, step);
    let read_at = |step: Step| {
        let mut buffer = [0; PAGE];
        mapping.read_at(step.page_start() as u64, &mut buffer)?;
        Ok(u64::from(black_box(&buffer)[0]))
    };
    let pread = |step: Step| {
        let mut buffer = [0; PAGE];
        bed.file.file.read_exact_at(&mut buffer, step.page_start() as u64)?;
        Ok(u64::from(black_box(&buffer)[0]))
    };
    let timed = race(
        rounds,
        &mut [
            Contestant::new("foliant pin", || on_cores([touches[0]], pin)),
            Contestant::new("foliant pin, two threads", || on_cores(touches, pin)),
            Contestant::new("foliant read_at", || on_cores([copies[0]], read_at)),
            Contestant::new("foliant read_at, two threads", || on_cores(copies, read_at)),
            Contestant::new("pread", || on_cores([copies[0]], pread)),
            Contestant::new("pread, two threads", || on_cores(copies, pread)),
            Contestant::new("foliant read_with", || on_cores([touches[0]], look)),
            Contestant::new("foliant read_with, two threads", || on_cores(touches, look)),
            Contestant::new("foliant pin, one page for all", || on_cores([hot[0]], pin)),
            Contestant::new("foliant pin, one page for all, two threads", || on_cores(hot, pin)),
            Contestant::new("foliant read_with, one page for all", || on_cores([hot[0]], look)),
            Contestant::new("foliant read_with, one page for all, two threads", || on_cores(hot, look)),
        ],
    )?;
    let scaling = |pair: &[Timed]| 2.0 * pair[0].ratio_to(&pair[1]);
    let rows = timed.chunks_exact(2).map(|pair| {
        let cells = [pair[0].median(), pair[1].median(), scaling(pair)];
        Row::new(pair[0].name, cells.map(Cell::Figure).to_vec())
    });
    let table = Table {
        title: "two threads".into(),
        columns: vec!["ns, one thread", "ns, each of two", "scaling"],
        rows: rows.collect(),
    };
    let wanted =
        [("foliant pin", 1.8), ("foliant read_with", 1.8), ("foliant read_with, one page for all", 1.7)];
    let targets = wanted.map(|(name, least)| {
        let measured = timed.chunks_exact(2).find(|pair| pair[0].name == name).map(scaling);
        Target::new(format!("two threads, {name}"), "times one", Limit::AtLeast(least), measured)
    });
    Ok((table, targets.to_vec()))
}

/// Touches of which each takes its place from the value before it: the whole latency of an access, nothing overlaps.
fn dependent_race(bed: &Bed, rounds: usize) -> Result<Vec<Timed>> {
    let steps = &bed.copies[..];
    let map = bed.file.map();
    // Nobody but us knows that it is always 0.
    let none = black_box(0);
    let chase = |touch: &mut dyn FnMut(Step) -> Result<u64>| {
        let mut at = 0;
        ns_per_step(steps, |_| {
            let value = touch(steps[at])?;
            at += 1 + (value as usize & none);
            Ok(value)
        })
    };
    race(
        rounds,
        &mut [
            Contestant::new("foliant pin", || chase(&mut |step| pin_word(&bed.mapping, step))),
            Contestant::new("foliant read_with", || chase(&mut |step| read_with_word(&bed.mapping, step))),
            Contestant::new("quick_cache get", || {
                chase(&mut |step| {
                    let page = bed.crates.quick.get(&step.page).ok_or_else(lost)?;
                    Ok(word(&page, step.within as usize))
                })
            }),
            Contestant::new("mmap of the file", || chase(&mut |step| Ok(word(map, step.word_start())))),
            Contestant::new("bare memory (our frames)", || {
                let pins = bed.pin_all()?;
                let pages: Vec<&[u8]> = pins.iter().map(|pin| &**pin).collect();
                chase(&mut |step| Ok(word(pages[step.page as usize], step.within as usize)))
            }),
        ],
    )
}

/// Walks each of `walks` on a core of its own, all at once; returns the mean processor time of a step.
fn on_cores<const N: usize>(walks: [&[Step]; N], visit: impl Fn(Step) -> Result<u64> + Sync) -> Result<f64> {
    let cores = core_affinity::get_core_ids().context("cannot tell the cores of this process")?;
    let (start, visit) = (&Barrier::new(N), &visit);
    let figures = std::thread::scope(|scope| {
        let measure = |(walk, core)| {
            scope.spawn(move || {
                core_affinity::set_for_current(core);
                start.wait();
                ns_per_step(walk, visit)
            })
        };
        let threads: Vec<_> = walks.into_iter().zip(cores.into_iter().rev()).map(measure).collect();
        let join =
            |thread: ScopedJoinHandle<'_, _>| thread.join().map_err(|_| anyhow!("a thread panicked"))?;
        threads.into_iter().map(join).collect::<Result<Vec<f64>>>()
    })?;
    Ok(figures.iter().sum::<f64>() / N as f64)
}

#[inline]
fn read_with_word(mapping: &Mapping, step: Step) -> Result<u64> {
    let seen = mapping.read_with(u64::from(step.page), |page| page.read(step.within as usize))?;
    Ok(seen.map_or(0, u64::from_ne_bytes))
}

#[inline]
fn pin_word(mapping: &Mapping, step: Step) -> Result<u64> {
    let page = mapping.pin(u64::from(step.page))?;
    Ok(word(&page, step.within as usize))
}

/// The word at byte `at`.
#[inline]
fn word(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |word| u64::from_ne_bytes(*word))
}

fn lost() -> anyhow::Error {
    anyhow!("a cache evicted a page, though it has room for all")
}

fn named<'t>(timed: &'t [Timed], name: &str) -> Result<&'t Timed> {
    timed.iter().find(|timed| timed.name == name).with_context(|| format!("{name} was not measured"))
}

/// A table whose first line is ours.
fn table(title: &str, timed: &[Timed]) -> Table {
    let rows = timed.iter().map(|line| {
        let cells = vec![
            Cell::Figure(line.median()),
            Cell::Figure(line.best()),
            Cell::Figure(line.ratio_to(&timed[0])),
        ];
        Row::new(line.name, cells)
    });
    Table { title: title.into(), columns: vec!["ns", "best", "ratio"], rows: rows.collect() }
}
