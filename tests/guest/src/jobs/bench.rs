//! The lab's benchmark: the guest kernel's own NVMe driver and Foliant over VFIO on one drive, in turns.
//!
//! Both sides are measured by the programs that a user would take: fio with io_uring, and `foliant bench`. What is
//! buffered is written by the same loop, page by page, through `pwrite` and the kernel's page cache or through ours.

use std::cell::RefCell;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::Command;
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::Instant;

use foliant::{EngineOptions, MappingOptions, Shard, ShardThreads};
use foliant_guest::measured::{FLUSHES, Load, MEASURED, Measured, Order, Pages, Plan, Side};
use foliant_guest::protocol::FOLIANT;
use serde_json::Value;

use super::Job;
use crate::bind;
use crate::context::Context;
use crate::device;

pub(super) const JOBS: &[(&str, Job)] = &[("bench", bench)];

const PAGE: u64 = foliant::PAGE_BYTES as u64;

fn bench(context: &Context<'_>) {
    let plan: Plan = context.arguments();
    bind::to_kernel(&plan.address);
    let disk = Path::new("/dev").join(bind::kernel_disk(&plan.address, 1));
    write_once(&disk, plan.range_mib);
    for _ in 0..plan.rounds {
        for side in [Side::Kernel, Side::Foliant] {
            Bench::new(context, &plan, side).measure_all();
        }
    }
}

/// Fills the range, so that each read finds blocks that were written.
fn write_once(disk: &Path, range_mib: u64) {
    let file = File::options().write(true).open(disk).expect("the disk opens");
    let piece: Vec<u8> = (0..1 << 20).map(|at: u32| (at % 251) as u8).collect();
    for mib in 0..range_mib {
        file.write_all_at(&piece, mib << 20).expect("the disk takes data");
    }
    file.sync_all().expect("the disk flushes");
}

/// One side, with the drive in its hands.
struct Bench<'a> {
    context: &'a Context<'a>,
    plan: &'a Plan,
    side: Side,
    /// The kernel's disk, where it has the drive.
    disk: PathBuf,
}

impl<'a> Bench<'a> {
    fn new(context: &'a Context<'a>, plan: &'a Plan, side: Side) -> Self {
        let disk = match side {
            Side::Kernel => {
                bind::to_kernel(&plan.address);
                Path::new("/dev").join(bind::kernel_disk(&plan.address, 1))
            }
            Side::Foliant => {
                bind::to_vfio(&plan.address);
                PathBuf::new()
            }
        };
        Self { context, plan, side, disk }
    }

    fn measure_all(&self) {
        for depth in [1, 32] {
            self.measure(Load::Reads { depth }, || self.rate("randread", "read", "100", depth));
        }
        for depth in [1, 32] {
            self.measure(Load::Writes { depth }, || self.rate("randwrite", "write", "0", depth));
        }
        for order in [Order::Random, Order::Ascending] {
            match self.side {
                Side::Kernel => self.buffered_by_kernel(order),
                Side::Foliant => self.buffered_by_engine(order),
            }
        }
    }

    /// Measures once and tells the host.
    fn measure(&self, load: Load, rate: impl FnOnce() -> Rate) {
        let before = self.flushes();
        let Rate { per_second, sync_seconds } = rate();
        let flushes = self.flushes() - before;
        self.context.fact(MEASURED, Measured { side: self.side, load, per_second, sync_seconds, flushes });
    }

    /// The Flush commands that the device has got since it was switched on.
    fn flushes(&self) -> u64 {
        self.context.ask(FLUSHES, ()).as_u64().expect("a count")
    }

    fn rate(&self, pattern: &str, direction: &str, read_percent: &str, depth: u16) -> Rate {
        let per_second = match self.side {
            Side::Kernel => self.fio(pattern, direction, depth),
            Side::Foliant => self.foliant(read_percent, depth),
        };
        Rate { per_second, sync_seconds: 0.0 }
    }

    fn fio(&self, pattern: &str, direction: &str, depth: u16) -> f64 {
        let Plan { seconds, range_mib, .. } = self.plan;
        let mut command = Command::new("/usr/bin/fio");
        command
            .args(["--name=lab", "--ioengine=io_uring", "--direct=1", "--bs=4k", "--thread", "--time_based"])
            .args(["--randrepeat=0", "--norandommap", "--output-format=json"])
            .arg(format!("--filename={}", self.disk.display()))
            .arg(format!("--rw={pattern}"))
            .arg(format!("--iodepth={depth}"))
            .arg(format!("--runtime={seconds}"))
            .arg(format!("--size={range_mib}m"));
        let told = json_of(command);
        told["jobs"][0][direction]["iops"].as_f64().unwrap_or_else(|| panic!("fio tells no rate: {told}"))
    }

    fn foliant(&self, read_percent: &str, depth: u16) -> f64 {
        let Plan { seconds, range_mib, address, .. } = self.plan;
        let mut command = Command::new(FOLIANT);
        command
            .args(["bench", &device::uri(address), "--overwrite", "--json", "--mix", read_percent])
            .args(["--depth", &depth.to_string(), "--seconds", &seconds.to_string()])
            .args(["--range", &format!("{range_mib}MiB")]);
        let told = json_of(command);
        told["operations_per_second"].as_f64().unwrap_or_else(|| panic!("the tool tells no rate: {told}"))
    }

    fn buffered_by_kernel(&self, order: Order) {
        fs::write("/proc/sys/vm/drop_caches", "3").expect("the kernel drops its caches");
        let file = File::options().read(true).write(true).open(&self.disk).expect("the disk opens");
        for pages in [Pages::New, Pages::Cached] {
            self.measure(Load::Buffered { order, pages }, || {
                self.buffered(
                    order,
                    |offset, page| file.write_all_at(page, offset).expect("the page cache takes a page"),
                    || file.sync_all().expect("the disk flushes"),
                )
            });
        }
    }

    /// The engine is driven by the thread that writes, as a database does that has a loop of its own: one thread does
    /// all the work, as for the kernel's page cache.
    fn buffered_by_engine(&self, order: Order) {
        let options = EngineOptions {
            // Room for all of it, as the kernel has.
            cache_bytes: (self.plan.buffered_mib + 16) << 20,
            threads: ShardThreads::Manual,
            ..EngineOptions::default()
        };
        let engine = device::engine(&self.plan.address, &options);
        let driver = Driver { shards: RefCell::new(engine.take_shards()), origin: Instant::now() };
        let mapping =
            driver.run(engine.mapping_async(&MappingOptions::default())).expect("the mapping opens");
        for pages in [Pages::New, Pages::Cached] {
            self.measure(Load::Buffered { order, pages }, || {
                self.buffered(
                    order,
                    |offset, page| {
                        driver.run(mapping.write_at_async(offset, page)).expect("the page cache takes a page")
                    },
                    || driver.run(mapping.sync_async()).expect("the sync succeeds"),
                )
            });
        }
        drop(mapping);
        engine.return_shards(driver.shards.into_inner());
        engine.close().expect("the engine closes");
    }

    /// Writes the pages and makes them durable.
    fn buffered(&self, order: Order, write: impl Fn(u64, &[u8]), sync: impl Fn()) -> Rate {
        let count = (self.plan.buffered_mib << 20) / PAGE;
        let numbers = match order {
            Order::Random => shuffled(count),
            Order::Ascending => (0..count).collect(),
        };
        let mut page = [0x5A; PAGE as usize];
        let begin = Instant::now();
        for number in numbers {
            page[..8].copy_from_slice(&number.to_le_bytes());
            write(number * PAGE, &page);
        }
        let written = begin.elapsed();
        sync();
        let durable = begin.elapsed();
        Rate {
            per_second: count as f64 / durable.as_secs_f64(),
            sync_seconds: (durable - written).as_secs_f64(),
        }
    }
}

/// What one measurement found; see [`Measured`].
struct Rate {
    per_second: f64,
    sync_seconds: f64,
}

/// Shards that this thread drives.
struct Driver {
    shards: RefCell<Vec<Shard>>,
    origin: Instant,
}

impl Driver {
    /// Polls the future and the shards in turn until the future has its result.
    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        let mut context = TaskContext::from_waker(Waker::noop());
        loop {
            if let Poll::Ready(result) = future.as_mut().poll(&mut context) {
                return result;
            }
            for shard in &mut *self.shards.borrow_mut() {
                shard.poll(self.origin.elapsed().as_nanos() as u64);
            }
        }
    }
}

/// The numbers below `count` in an order without order, the same each time: Fisher and Yates by a xorshift generator.
fn shuffled(count: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    for at in (1..order.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(at, (state % (at as u64 + 1)) as usize);
    }
    order
}

/// Runs a program that prints one JSON object.
fn json_of(mut command: Command) -> Value {
    let told = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, errors) = (String::from_utf8_lossy(&told.stdout), String::from_utf8_lossy(&told.stderr));
    assert!(told.status.success(), "{command:?}: {}\n{out}\n{errors}", told.status);
    // fio may warn before it prints the object.
    let object = out.find('{').map_or("", |at| &out[at..]);
    serde_json::from_str(object).unwrap_or_else(|error| panic!("{command:?}: {error}\n{out}\n{errors}"))
}
