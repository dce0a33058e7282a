//! Whether promises are kept, by what a drive's log or its image shows: generations of pages, and transactions of redb.
//!
//! The guest begins the next generation, or transaction, only after it was promised that the one before is durable. So
//! a prefix of the log in which a write of number *n* + 1 occurs shows by itself that number *n* was promised.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use foliant::{Engine, EngineOptions, Hugepages};
use foliant_guest::transactions::Transactions;
use foliant_guest::{generations, marked};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::volatile::{VolatileDrive, write_image};
use crate::write_log::{Entry, SECTOR, WriteLog};

/// What was looked at, where everything held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Examined {
    /// Moments of power loss.
    pub(crate) moments: usize,
    /// Moments at which something had been written and not flushed.
    pub(crate) with_pending: usize,
    /// The highest number that was seen.
    pub(crate) newest: u64,
}

type Held = Result<Examined, String>;

/// Whether at each moment of `log` the generation before the newest begun one survives a power loss, whatever the
/// drive's cache does with what wasn't flushed.
pub(crate) fn generations_in_log(log: &WriteLog) -> Held {
    let wanted = generations::pages().flat_map(sectors_of);
    let mut sectors: BTreeMap<u64, Kept> = wanted.map(|sector| (sector, Kept::default())).collect();
    let (mut examined, mut promised_holds) = (Examined::default(), 0);
    for (number, &entry) in log.entries().iter().enumerate() {
        if entry == Entry::Flush {
            sectors.values_mut().for_each(Kept::flush);
            promised_holds = sectors.values().map(|kept| kept.durable).min().unwrap_or(0);
        }
        for (sector, source) in log.changes(entry) {
            let generation = generations::generation_of(sector * SECTOR as u64, log.bytes(source))?;
            let kept = sectors.get_mut(&sector).ok_or_else(|| format!("sector {sector} is nobody's"))?;
            kept.pending.push(generation);
            if generation > examined.newest {
                examined.newest = generation;
                // Older contents of this generation's time must not come down after it.
                let stale = |kept: &Kept| kept.pending.iter().any(|&pending| pending + 1 < generation);
                if sectors.values().any(stale) {
                    return Err(format!(
                        "entry {number}: a page older than generation {generation} - 1 isn't flushed"
                    ));
                }
            } else if generation + 1 < examined.newest {
                return Err(format!(
                    "entry {number} writes generation {generation} after {}",
                    examined.newest
                ));
            }
        }
        if promised_holds + 1 < examined.newest {
            return Err(format!(
                "at entry {number} generation {} has begun, and a power loss may leave a page of generation \
                 {promised_holds}",
                examined.newest
            ));
        }
        examined.moments += 1;
        examined.with_pending += usize::from(sectors.values().any(|kept| !kept.pending.is_empty()));
    }
    Ok(examined)
}

/// A sector's generation on the medium, and those that it was given since the last flush.
#[derive(Clone, Debug, Default)]
struct Kept {
    durable: u64,
    pending: Vec<u64>,
}

impl Kept {
    fn flush(&mut self) {
        self.durable = self.pending.pop().unwrap_or(self.durable);
        self.pending.clear();
    }
}

fn sectors_of(page: u64) -> Range<u64> {
    const PAGE_SECTORS: u64 = (foliant::PAGE_BYTES / SECTOR) as u64;
    page * PAGE_SECTORS..(page + 1) * PAGE_SECTORS
}

/// Whether generation `promised` is in the image at `path`, each sector of it or of those up to `begun`.
pub(crate) fn generations_in_image(path: &Path, promised: u64, begun: u64) -> Result<(), String> {
    let image = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    for page in generations::pages() {
        for sector in sectors_of(page) {
            let offset = sector * SECTOR as u64;
            let generation = generations::generation_of(offset, &image[offset as usize..][..SECTOR])?;
            if !(promised..=begun).contains(&generation) {
                return Err(format!(
                    "sector {sector} is of generation {generation}; {promised} was promised, {begun} had begun"
                ));
            }
        }
    }
    Ok(())
}

/// How transactions are looked for in a log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sampling<'a> {
    /// The drive's size.
    pub(crate) size_bytes: u64,
    /// Chooses moments and what survives.
    pub(crate) seed: u64,
    /// Moments between flushes.
    pub(crate) moments: usize,
    /// Where images can be laid.
    pub(crate) directory: &'a Path,
}

/// Whether at the moments just before and after each flush, and at some between, every transaction before the newest
/// begun one survives a power loss, with nothing of what wasn't flushed and with a part of it.
pub(crate) fn transactions_in_log(log: &WriteLog, sampling: &Sampling<'_>) -> Held {
    let mut random = SmallRng::seed_from_u64(sampling.seed);
    let count = log.entries().len();
    let mut chosen = vec![false; count + 1];
    for (number, _) in log.entries().iter().enumerate().filter(|(_, entry)| **entry == Entry::Flush) {
        chosen[number] = true;
        chosen[number + 1] = true;
    }
    (0..sampling.moments).for_each(|_| chosen[random.random_range(0..=count)] = true);
    let mut drive = VolatileDrive::new(log);
    let mut examined = Examined::default();
    for (number, &entry) in log.entries().iter().enumerate() {
        drive.replay(entry);
        examined.newest = examined.newest.max(marked::newest_in(log.data(entry)).unwrap_or(0));
        // Before the first transaction there is no database that anything was promised of.
        if !chosen[number + 1] || examined.newest == 0 {
            continue;
        }
        let share = random.random_range(0.0..1.0);
        let mut some = |_| random.random_bool(share);
        let survivors: [(&str, &mut dyn FnMut(u64) -> bool); 2] =
            [("nothing", &mut |_| false), ("a part", &mut some)];
        for (part, survives) in survivors {
            if drive.pending().is_empty() && part != "nothing" {
                continue;
            }
            let image = sampling.directory.join("replayed.img");
            let held = write_image(log, &drive.after_power_loss(survives), &image, sampling.size_bytes)
                .map_err(|error| error.to_string())
                .and_then(|()| {
                    transactions_in(&image, sampling.size_bytes, examined.newest - 1, examined.newest)
                });
            held.map_err(|reason| {
                format!(
                    "power loss after entry {number} of {count}, {part} of what wasn't flushed survives (seed {}): {reason}",
                    sampling.seed
                )
            })?;
            examined.moments += 1;
        }
        examined.with_pending += usize::from(!drive.pending().is_empty());
    }
    Ok(examined)
}

/// Whether the image at `path` holds every transaction up to `promised`, and none after `begun`. The image is copied:
/// opening it mends it.
pub(crate) fn transactions_in_image(path: &Path, promised: u64, begun: u64) -> Result<(), String> {
    let copy = path.with_extension("copy");
    let size_bytes = fs::copy(path, &copy).map_err(|error| format!("{}: {error}", path.display()))?;
    transactions_in(&copy, size_bytes, promised, begun)
}

fn transactions_in(path: &Path, size_bytes: u64, promised: u64, begun: u64) -> Result<(), String> {
    let look = || -> foliant_guest::transactions::Result<()> {
        let options =
            EngineOptions { cache_bytes: 4 << 20, hugepages: Hugepages::Never, ..EngineOptions::default() };
        let engine = Engine::open(&format!("emu:{}?lba=512&direct=off", path.display()), &options)?;
        let mut transactions = Transactions::open(&engine, 1, size_bytes)?;
        transactions.check(promised, begun)?;
        drop(transactions);
        Ok(engine.close()?)
    };
    // A database that lost what it was built on may do anything.
    let looked = catch_unwind(AssertUnwindSafe(look));
    looked.map_err(|_| "opening it panicked".to_owned())?.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE_SECTORS: u64 = (foliant::PAGE_BYTES / SECTOR) as u64;

    fn generation(log: WriteLog, number: u64) -> WriteLog {
        generations::pages()
            .fold(log, |log, page| log.write(page * PAGE_SECTORS, &generations::page_bytes(number, page)))
    }

    #[test]
    fn generations_that_were_flushed_one_by_one_were_promised_rightly() {
        let log = (1..=3).fold(WriteLog::default(), |log, number| generation(log, number).flush());
        let examined = generations_in_log(&log).unwrap();
        assert_eq!((examined.newest, examined.moments as u64), (3, 3 * (generations::PAGES + 1)));
        generations_in_log(&log.without_flush(2)).unwrap();
        assert!(generations_in_log(&log.without_flush(1)).unwrap_err().contains("generation 3 has begun"));
    }

    #[test]
    fn a_page_that_is_written_after_the_flush_that_should_cover_it_is_found() {
        let page = generations::pages().nth(7).unwrap();
        let late =
            |log: WriteLog, number| log.write(page * PAGE_SECTORS, &generations::page_bytes(number, page));
        let log = generation(generation(WriteLog::default(), 1).flush(), 2).flush();
        assert!(generations_in_log(&late(log.clone(), 3)).is_ok());
        assert!(
            generations_in_log(&late(late(log.clone(), 3), 1)).unwrap_err().contains("writes generation 1")
        );
        let without = WriteLog::default();
        let without = generations::pages()
            .filter(|&other| other != page)
            .fold(without, |log, page| log.write(page * PAGE_SECTORS, &generations::page_bytes(1, page)));
        let log = generation(late(without.flush(), 1), 2);
        assert!(generations_in_log(&log).unwrap_err().contains("may leave a page of generation 0"));
    }
}
