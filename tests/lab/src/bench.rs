//! The lab's benchmark: one drive in one guest, driven by the guest kernel's own NVMe driver and by Foliant in turns.
//!
//! A guest whose processor is software is slower than any machine, and slower at some things than at others: its
//! rates say nothing about hardware. What can be compared is how much work each side makes of an access, which is why
//! ratios are told, medians of rounds that take turns.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use foliant_guest::measured::{FLUSHES, Load, MEASURED, Measured, Plan, Side};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};
use serde::Serialize;
use serde_json::{Value, json};

use crate::command;
use crate::drive::{Access, Drive};
use crate::error::{LabError, Result};
use crate::guest::{Attendant, Echo};
use crate::host_load::HostLoad;
use crate::machine::{Machine, NvmeController, RunBy};
use crate::packages;
use crate::scenario::{self, Boot, Claim, GuestFile, Report, RunFiles, RunOptions, Verdict};
use crate::trace;

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BenchOptions {
    /// How often each side is measured.
    pub rounds: u32,
    /// How long each measurement of reads or writes takes.
    pub seconds: u32,
    /// What is written to the page cache.
    pub buffered_mib: u64,
    /// Whether everything that the guest says is shown.
    pub echo: Echo,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    /// QEMU's version and the guest kernel's release.
    pub platform: String,
    /// Rounds.
    pub rounds: u32,
    /// Seconds a measurement of reads or writes.
    pub seconds: u32,
    /// What was written to the page cache.
    pub buffered_mib: u64,
    /// The share, between 0 and 1, of the host's processor time that other programs had meanwhile.
    pub others: f64,
    /// A comparison a load.
    pub comparisons: Vec<Comparison>,
}

/// One load, by both sides.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The load.
    pub load: Load,
    /// The kernel's accesses a second.
    pub kernel: Spread,
    /// Foliant's.
    pub foliant: Spread,
    /// Foliant's median by the kernel's.
    pub ratio: f64,
    /// What the ratio should be at least.
    pub aim: f64,
    /// The seconds that the kernel's fsync took of a buffered load.
    pub kernel_sync: Spread,
    /// The seconds that our sync took.
    pub foliant_sync: Spread,
    /// Flush commands that the device got from the kernel's side, in each round.
    pub kernel_flushes: Vec<u64>,
    /// From ours.
    pub foliant_flushes: Vec<u64>,
}

/// The figures of all rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The lowest.
    pub low: f64,
    /// The highest.
    pub high: f64,
}

const ADDRESS: &str = "0000:00:04.0";
const RANGE_MIB: u64 = 256;

/// Runs the benchmark.
///
/// # Errors
/// When the lab can't be set up, or the guest's job fails.
pub fn run(options: &BenchOptions) -> Result<BenchReport> {
    let memory = Memory::new()?;
    let boot = boot(options, &memory)?;
    let before = HostLoad::now()?;
    let report = scenario::run(&boot, RunOptions { echo: options.echo, files: RunFiles::Remove })?;
    if let Some((claim, Verdict::Fails(reason))) = report.verdicts.first() {
        return Err(LabError::Unexpected {
            what: format!("the guest's job {claim}"),
            reason: reason.clone(),
        });
    }
    compare(options, report, HostLoad::now()?.others_since(&before))
}

/// The drive's image, in the host's memory: it isn't the host's disk that is to be measured.
struct Memory {
    file: File,
}

impl Memory {
    fn new() -> Result<Self> {
        let name = Path::new("an image in memory");
        let file = memfd_create("foliant-lab", MemfdFlags::CLOEXEC).map(File::from);
        let file = file.map_err(|error| LabError::io("create", name)(error.into()))?;
        file.set_len(RANGE_MIB << 20).map_err(LabError::io("size", name))?;
        Ok(Self { file })
    }

    fn drive(&self) -> Drive {
        let path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()));
        // Older kernels can't go past the page cache where there is nothing but page cache.
        let direct = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
        let access = match rustix::fs::open(&path, direct, Mode::empty()) {
            Ok(_) => Access::Direct,
            Err(_) => Access::Cached,
        };
        Drive { access, file: Some(path), ..Drive::new("a", RANGE_MIB) }
    }
}

fn boot(options: &BenchOptions, memory: &Memory) -> Result<Boot> {
    let drive = memory.drive();
    let machine = Machine {
        run_by: RunBy::ThreadEach,
        // fio's libraries take 84 MB of it, twice while they are unpacked.
        memory_mib: 1024,
        hugepages: (options.buffered_mib / 2 + 32) as u32,
        ..Machine::new().drive(drive).nvme(NvmeController::new("LAB0", "04.0").namespace(1, "a", 4096))
    };
    let plan = Plan {
        address: ADDRESS.into(),
        rounds: options.rounds,
        seconds: options.seconds,
        range_mib: RANGE_MIB,
        buffered_mib: options.buffered_mib.min(RANGE_MIB),
    };
    let claim = Claim::new("bench", "What both sides make of the same drive.", "bench", json!(plan));
    let mut boot = Boot::new("bench", machine).with_foliant().claim(claim);
    boot.files.extend(with_libraries(&packages::program("fio", "fio")?)?);
    boot.attend = attend;
    // Four loads take their time, the buffered ones a few seconds, each by two sides; and four times that, for a
    // loaded machine.
    boot.limit = Duration::from_secs(u64::from(options.rounds) * u64::from(options.seconds * 8 + 40) * 4);
    Ok(boot)
}

/// The program at its place, and the libraries that the loader would look for at theirs.
fn with_libraries(program: &Path) -> Result<Vec<GuestFile>> {
    let told = command::output(Command::new("ldd").arg(program))?;
    // `libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x…)`, and the loader by its path alone.
    let paths = told.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    let paths = paths.map(Path::new).chain([program]);
    Ok(paths
        .map(|path| GuestFile::Host(path.to_owned(), path.display().to_string()[1..].to_owned()))
        .collect())
}

/// Counts Flush commands by QEMU's own account. Other commands aren't traced: a line for each would slow both sides.
fn attend(attendant: &mut Attendant<'_>, what: &str, _: &Value) -> std::result::Result<Value, String> {
    if what != FLUSHES {
        return Err(format!("the benchmark's host doesn't know how to do {what:?}"));
    }
    for (event, enable) in [("pci_nvme_io_cmd", false), (FLUSH_EVENT, true)] {
        let state = json!({"name": event, "enable": enable});
        attendant.monitor.execute("trace-event-set-state", state).map_err(|error| error.to_string())?;
    }
    let path = trace::path(attendant.run);
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(text.lines().filter(|line| line.contains(FLUSH_EVENT)).count().into())
}

/// A share of the host's processors beyond which figures are told with a warning.
const OTHERS_MAX: f64 = 0.05;

/// QEMU's event of a Flush command, one a namespace that is flushed.
const FLUSH_EVENT: &str = "pci_nvme_flush_ns";

fn compare(options: &BenchOptions, report: Report, others: f64) -> Result<BenchReport> {
    let mut figures = BTreeMap::<(Load, Side), Vec<Measured>>::new();
    for (_, _, value) in report.facts.into_iter().filter(|(_, name, _)| name == MEASURED) {
        let measured: Measured = serde_json::from_value(value).map_err(|error| LabError::Unexpected {
            what: "a measurement of the guest's".into(),
            reason: error.to_string(),
        })?;
        figures.entry((measured.load, measured.side)).or_default().push(measured);
    }
    let comparison = |load| {
        let of = |side| {
            figures.get(&(load, side)).ok_or_else(|| LabError::Unexpected {
                what: "the benchmark".into(),
                reason: format!("the guest measured no {load:?} of {side:?}"),
            })
        };
        Ok(Comparison::new(load, of(Side::Kernel)?, of(Side::Foliant)?))
    };
    Ok(BenchReport {
        platform: report.platform,
        rounds: options.rounds,
        seconds: options.seconds,
        buffered_mib: options.buffered_mib,
        others,
        comparisons: Load::ALL.into_iter().map(comparison).collect::<Result<_>>()?,
    })
}

impl Comparison {
    fn new(load: Load, kernel: &[Measured], foliant: &[Measured]) -> Self {
        let flushes = |figures: &[Measured]| figures.iter().map(|figure| figure.flushes).collect();
        let (kernel_flushes, foliant_flushes) = (flushes(kernel), flushes(foliant));
        let rates = |figures| Spread::of(figures, |figure| figure.per_second);
        let syncs = |figures| Spread::of(figures, |figure| figure.sync_seconds);
        let (kernel_sync, foliant_sync) = (syncs(kernel), syncs(foliant));
        let (kernel, foliant) = (rates(kernel), rates(foliant));
        let ratio = foliant.median / kernel.median;
        Self {
            load,
            kernel,
            foliant,
            ratio,
            aim: aim(load),
            kernel_sync,
            foliant_sync,
            kernel_flushes,
            foliant_flushes,
        }
    }
}

/// What our rate should be, as a multiple of the kernel's.
fn aim(load: Load) -> f64 {
    match load {
        Load::Reads { depth: 1 } | Load::Writes { depth: 1 } => 3.0,
        Load::Reads { .. } | Load::Writes { .. } => 4.0,
        Load::Buffered { .. } => 2.0,
    }
}

impl Spread {
    fn of(figures: &[Measured], of: impl Fn(&Measured) -> f64) -> Self {
        let mut rates: Vec<f64> = figures.iter().map(of).collect();
        rates.sort_by(f64::total_cmp);
        let middle = rates.len() / 2;
        let median = if rates.len() % 2 == 1 {
            rates[middle]
        } else {
            f64::midpoint(rates[middle - 1], rates[middle])
        };
        Self { median, low: rates[0], high: rates[rates.len() - 1] }
    }
}

impl fmt::Display for BenchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { platform, rounds, seconds, buffered_mib, others, comparisons } = self;
        let (buffered, direct): (Vec<_>, Vec<_>) =
            comparisons.iter().partition(|comparison| matches!(comparison.load, Load::Buffered { .. }));
        writeln!(
            f,
            "{platform}, default IOMMU, a drive in memory; medians of {rounds} rounds in turns (lowest – highest)"
        )?;
        writeln!(f, "\n4 KiB accesses a second, {seconds} s each")?;
        heading(f, ["", "kernel, fio io_uring", "Foliant over VFIO", "ratio", "aim"])?;
        direct.iter().try_for_each(|comparison| writeln!(f, "{comparison}"))?;
        writeln!(
            f,
            "\n4 KiB pages a second, {buffered_mib} MiB written to the page cache and then made durable"
        )?;
        heading(f, ["", "kernel, write + fsync", "Foliant, write + sync", "ratio", "aim"])?;
        buffered.iter().try_for_each(|comparison| writeln!(f, "{comparison}"))?;
        writeln!(
            f,
            "\nof these seconds, those of fsync or sync; Flush commands that the device got in each round"
        )?;
        for Comparison { load, kernel_sync, foliant_sync, kernel_flushes, foliant_flushes, .. } in buffered {
            let part = |seconds: &Spread, flushes: &[u64]| {
                let flushes: Vec<String> = flushes.iter().map(u64::to_string).collect();
                format!("{:.3} s; {}", seconds.median, flushes.join(", "))
            };
            let (kernel, foliant) = (part(kernel_sync, kernel_flushes), part(foliant_sync, foliant_flushes));
            writeln!(f, "  {:<28}{kernel:<26}{foliant}", load.to_string())?;
        }
        if *others > OTHERS_MAX {
            writeln!(
                f,
                "\nOther programs had {:.0} % of the host's processors meanwhile. QEMU needs two to itself, one for the \
                 guest and one for the device; otherwise each access at depth 1 waits for a turn. Repeat this on an \
                 idle machine.",
                others * 100.0
            )?;
        }
        Ok(())
    }
}

fn heading(f: &mut fmt::Formatter<'_>, [load, kernel, foliant, ratio, aim]: [&str; 5]) -> fmt::Result {
    writeln!(f, "  {load:<28}{kernel:<26}{foliant:<26}{ratio:>7}{aim:>7}")
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { load, kernel, foliant, ratio, aim, .. } = self;
        let missed = if ratio < aim { " missed" } else { "" };
        let (load, kernel, foliant) = (load.to_string(), kernel.to_string(), foliant.to_string());
        write!(f, "  {load:<28}{kernel:<26}{foliant:<26}{ratio:>5.1} ×{aim:>5.0} ×{missed}")
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { median, low, high } = self;
        write!(f, "{median:.0} ({low:.0} – {high:.0})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(side: Side, rates: &[f64]) -> Vec<Measured> {
        let load = Load::Reads { depth: 1 };
        rates
            .iter()
            .map(|&per_second| Measured { side, load, per_second, sync_seconds: 0.0, flushes: 0 })
            .collect()
    }

    #[test]
    fn a_ratio_is_that_of_medians_whatever_the_order_of_rounds() {
        let (kernel, foliant) =
            (figures(Side::Kernel, &[30.0, 10.0, 20.0]), figures(Side::Foliant, &[90.0, 70.0]));
        let comparison = Comparison::new(Load::Reads { depth: 1 }, &kernel, &foliant);
        assert_eq!(
            (comparison.kernel.median, comparison.foliant.median, comparison.ratio),
            (20.0, 80.0, 4.0)
        );
        assert_eq!((comparison.kernel.low, comparison.kernel.high), (10.0, 30.0));
        assert!(!comparison.to_string().contains("missed"));
    }
}
