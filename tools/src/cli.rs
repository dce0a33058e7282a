//! The command line: what can be asked for, with examples.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use foliant::StatsPage;
use foliant_nvme_pci::PciAddress;

use crate::bench::ReportFile;
use crate::size::ByteSize;
use crate::target::Target;

/// Foliant: a userspace NVMe storage engine that databases embed.
///
/// DEVICE and URI are vfio:ADDRESS for a drive that is bound to vfio-pci, such as vfio:0000:01:00.0 (with
/// ?iommu=group|iommufd to choose the kernel's interface; vfio-noiommu:ADDRESS without an IOMMU), emu:PATH?size=SIZE
/// for an emulated controller on an image file, emu:ram?size=SIZE for one in memory, emu:null?size=SIZE for one that
/// moves no data. More parameters of emu: lba=512|4096, mdts=SIZE, queues=N,
/// entries=N, vwc=0|1, latency_us=N, read_bps=RATE, write_bps=RATE (200MB/s), noiob=BLOCKS, ns=N,
/// engine=auto|uring|plain, direct=auto|on|off.
///
/// Results go to standard output, everything else to standard error. RUST_LOG=info shows what happens inside.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:
  foliant demo
  foliant identify 'emu:ram?size=1GiB'
  foliant bench 'emu:null?size=1TiB' --seconds 3
  foliant replay trace.csv --device 'emu:disk.img?size=40GiB&lba=512' --cache 256MiB --verify
  foliant trace --out writeback.svg
  foliant top
  foliant devices
  foliant mirror status emu:data.img --mirror emu:copy.img
  foliant doctor

Exit status: 0 done and verified, 1 an error or a failed verification, 2 a wrong command line."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Take files into a redb database on Foliant while the power fails again and again.
    Demo(DemoOptions),
    /// The process of `demo --device` that commits, and gets killed.
    #[command(hide = true)]
    DemoWorker(DemoWorkerOptions),
    /// Replay a block trace through the page cache, and verify every sector.
    Replay(ReplayOptions),
    /// Draw what writeback does while a workload runs, and check it.
    Trace(TraceOptions),
    /// Watch a running engine: shards, hits and misses, queue depth, dirty pages, throttling, latencies.
    Top(TopOptions),
    /// Show what a controller says of itself and its namespaces.
    Identify(IdentifyOptions),
    /// Measure a device, by the driver alone or through the page cache.
    Bench(BenchOptions),
    /// Look at mirrors, make them equal to their primary, accept one whose primary is lost.
    Mirror(MirrorArguments),
    /// List this machine's NVMe controllers, and who uses them.
    Devices(DevicesOptions),
    /// Take an NVMe controller from the kernel and give it to vfio-pci, so that Foliant can open it.
    Bind(BindOptions),
    /// Give an NVMe controller back to the kernel.
    Unbind(UnbindOptions),
    /// Check what this machine needs to drive NVMe hardware, and say what mends each shortfall.
    Doctor(DoctorOptions),
}

impl Command {
    /// What is logged when RUST_LOG doesn't say: warnings; of the demo, which cuts the power itself, only those that
    /// don't come from that.
    pub(crate) fn log_filter(&self) -> &'static str {
        match self {
            Self::Demo(DemoOptions { device: None, .. }) => {
                "warn,foliant=off,foliant_nvme=off,foliant_nvme::region=warn"
            }
            // What there is to warn of, the process that started it has said.
            Self::DemoWorker(_) => "error",
            _ => "warn",
        }
    }
}

/// Takes files into a redb database on Foliant, a transaction a file, from several threads, on an emulated device
/// in memory whose write cache is volatile. The power is cut in mid-transaction; then the database is reopened and
/// checked: every acknowledged transaction must be there byte for byte, any other there whole or not at all.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  foliant demo                                  the sources of this checkout, five power cuts
  foliant demo /usr/share/doc/bash --cuts 20    your own files
  foliant demo --seed 42 --cache 1MiB           choose where the power is cut; a smaller cache
  foliant demo --device vfio:0000:01:00.0 --overwrite   on a drive, where the process is killed instead
  foliant demo --json | jq .verdict")]
pub(crate) struct DemoOptions {
    /// Files, or directories with all that's in them; the sources of the checkout when none are named.
    pub(crate) files: Vec<PathBuf>,
    /// A drive or an image file to run on; the process is then killed instead of the power cut.
    #[arg(long, value_name = "URI")]
    pub(crate) device: Option<Target>,
    /// Allow overwriting the drive, or an image that holds data.
    #[arg(long, requires = "device")]
    pub(crate) overwrite: bool,
    /// How often the power is cut, or the process killed.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub(crate) cuts: u32,
    /// Decides when the power is cut and what survives; random when not given, and always shown. Threads run as the
    /// system lets them, so a run from the same seed is alike, not the same.
    #[arg(long, value_name = "S")]
    pub(crate) seed: Option<u64>,
    /// Size of the page cache.
    #[arg(long, default_value = "2MiB", value_name = "SIZE")]
    pub(crate) cache: ByteSize,
    /// Threads that commit transactions.
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) threads: u16,
    #[command(flatten)]
    pub(crate) stats: StatsOptions,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Commits the transactions that its standard input names; see `demo::worker`.
#[derive(Args, Debug)]
pub(crate) struct DemoWorkerOptions {
    /// As of `demo`.
    pub(crate) files: Vec<PathBuf>,
    /// As of `demo`.
    #[arg(long, value_name = "URI")]
    pub(crate) device: Target,
    /// As of `demo`.
    #[arg(long, value_name = "SIZE")]
    pub(crate) cache: ByteSize,
    /// As of `demo`.
    #[arg(long, value_name = "N")]
    pub(crate) threads: u16,
    #[command(flatten)]
    pub(crate) stats: StatsOptions,
}

/// Replays a block trace (CSV with the columns version,time,op,size,lbn: op 28 reads and 2a writes, size in bytes,
/// lbn in 512-byte sectors) through the page cache, as fast as it goes. Requests that touch the same 2 MiB keep
/// their order.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  foliant replay trace.csv --device 'emu:disk.img?size=40GiB&lba=512' --cache 256MiB --verify
  foliant replay trace.csv --device 'emu:ram?size=2GiB&lba=512' --cache 64MiB --verify --json
  foliant replay trace.csv --device 'emu:null?size=1TiB' --cache 1GiB --shards 2

With --verify each sector written carries its address and generation, every read is checked, and at the end the
image is read without the engine and every sector of it checked.")]
pub(crate) struct ReplayOptions {
    /// The trace.
    pub(crate) trace: PathBuf,
    /// The device, at least as large as the trace needs.
    #[arg(long, value_name = "URI")]
    pub(crate) device: Target,
    /// Size of the page cache.
    #[arg(long, value_name = "SIZE")]
    pub(crate) cache: ByteSize,
    /// Check every read, and at the end every sector of the image.
    #[arg(long)]
    pub(crate) verify: bool,
    /// Shards of the engine.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) shards: u16,
    /// Threads that replay.
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) threads: u16,
    /// Allow overwriting an image that holds data.
    #[arg(long)]
    pub(crate) overwrite: bool,
    #[command(flatten)]
    pub(crate) stats: StatsOptions,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Runs a workload through the page cache, watches the engine's events of writeback, and draws them as SVG: page index
/// over time, a panel a mapping, each write command from submission to completion in the colour of its state, pages
/// that are dirty faint before it; a box around each pass, a band for each flush, a bar for each doorbell. Figures show
/// where the pointer rests. It also checks what the picture shows: that each pass ascends in its shard (WB-01), and that
/// the commands of a batch share one doorbell (WB-18). Without --replay a demonstration runs for about half a second:
/// a log that is appended, a table of random pages, an index of small changes.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  foliant trace                                       the demonstration on a slow device in memory
  foliant trace --shards 2 --cache 8MiB --out two.svg
  foliant trace 'emu:disk.img?size=64MiB' --json | jq .checks
  foliant trace --replay trace.csv --cache 64MiB --out replay.svg
  foliant trace vfio:0000:01:00.0 --overwrite         on a drive

The first 524,288 events are kept, and what is missing is said. RUST_LOG=foliant::writeback=trace shows the same events
as text.")]
pub(crate) struct TraceOptions {
    /// The device; in memory, and slow, when none is named.
    pub(crate) uri: Option<Target>,
    /// Replay this block trace, as of `foliant replay`, instead of the demonstration.
    #[arg(long, value_name = "TRACE.csv")]
    pub(crate) replay: Option<PathBuf>,
    /// Where the picture goes.
    #[arg(long, value_name = "FILE.svg", default_value = "foliant-trace.svg", value_parser = crate::trace::parse_out)]
    pub(crate) out: PathBuf,
    /// Size of the page cache.
    #[arg(long, default_value = "4MiB", value_name = "SIZE")]
    pub(crate) cache: ByteSize,
    /// Shards of the engine.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) shards: u16,
    /// Decides which pages the demonstration touches.
    #[arg(long, default_value_t = 1, value_name = "S", conflicts_with = "replay")]
    pub(crate) seed: u64,
    /// Allow overwriting the drive, or an image that holds data.
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Shows what running engines do, a line a shard: from the stats page that each of them has in memory, which this command
/// only reads. Without PAGE it finds the pages of all engines that this user may see. Figures are of the last interval: state
/// (share of the time awake), page accesses that hit and that missed, commands in flight, requests that wait in the shard,
/// pages dirty, under writeback and behind a write-ahead gate, free frames, writers that are slowed and to which rate, and
/// how long reads waited for pages, write commands took and syncs took. Keys: q quits, p pauses, + and - change the interval,
/// Tab shows the next engine.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  foliant bench 'emu:ram?size=1GiB' --cached --seconds 60 --stats auto &
  foliant top
  foliant top /run/postgres/foliant.stats --interval 0.5
  foliant top --once                        a table, for a terminal that isn't one
  foliant top --json | jq '.engines[0].total.hit_ratio'
  foliant top --prometheus > /var/lib/node_exporter/foliant.prom.new

docs/observing.md tells what a page holds, what each metric means, and how Prometheus gets it.")]
pub(crate) struct TopOptions {
    /// The stats page of an engine; those of all running engines when none is named.
    pub(crate) page: Option<PathBuf>,
    /// Print the figures of one interval as a table, and end.
    #[arg(long)]
    pub(crate) once: bool,
    /// Print the figures of one interval as one JSON object, and end.
    #[arg(long, conflicts_with = "once")]
    pub(crate) json: bool,
    /// Print all metrics in Prometheus's text format, and end.
    #[arg(long, conflicts_with_all = ["once", "json"])]
    pub(crate) prometheus: bool,
    /// Seconds between two readings, 0.1 to 60.
    #[arg(long, default_value = "1", value_name = "SECONDS", value_parser = parse_interval)]
    pub(crate) interval: Duration,
}

impl TopOptions {
    pub(crate) fn interval(&self) -> Duration {
        self.interval
    }
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if (0.1..=60.0).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("must be between 0.1 and 60".to_owned())
    }
}

/// Where a command that runs an engine shows it to `foliant top`.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct StatsOptions {
    /// Show what the engine does to `foliant top` and Prometheus: in this file on tmpfs, or where `foliant top` looks by
    /// itself when PAGE is `auto`.
    #[arg(long = "stats", value_name = "PAGE", value_parser = parse_stats)]
    pub(crate) page: Option<StatsPage>,
}

impl StatsOptions {
    pub(crate) fn page(&self) -> StatsPage {
        self.page.clone().unwrap_or_default()
    }

    /// The arguments that ask another process for the same.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let page = match &self.page {
            None | Some(StatsPage::None) => return Vec::new(),
            Some(StatsPage::Found) => "auto".into(),
            Some(StatsPage::At(path)) => path.clone().into_os_string(),
        };
        vec!["--stats".into(), page]
    }
}

fn parse_stats(text: &str) -> Result<StatsPage, String> {
    match text {
        "" => Err("name a file on tmpfs, or auto".to_owned()),
        "auto" => Ok(StatsPage::Found),
        path => Ok(StatsPage::At(path.into())),
    }
}

/// Shows the controller, its namespaces and limits, and the memory that the driver shares with it. Writes nothing.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  foliant identify 'emu:ram?size=1GiB&lba=512&ns=2'
  foliant identify 'emu:disk.img?lba=512' --json | jq .namespaces")]
pub(crate) struct IdentifyOptions {
    /// The device.
    pub(crate) uri: Target,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A mirrored range has a label behind it, on either device, that tells whether the two hold the same. The range is a whole
/// namespace unless --namespace, --start and --len say otherwise, as the database opens it.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  foliant mirror status emu:data.img --mirror emu:copy.img      exit status 1 if the mirror is stale
  foliant mirror resync emu:data.img --mirror 'emu:copy.img?size=10GiB'
  foliant mirror resync vfio:0000:01:00.0 --mirror vfio:0000:02:00.0 --overwrite
  foliant mirror accept emu:copy.img                            its primary is lost

A database that runs resynchronises by Mapping::resync_mirror, while it reads and writes; this command is for pairs that
nobody has open.")]
pub(crate) struct MirrorArguments {
    #[command(subcommand)]
    pub(crate) command: MirrorCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum MirrorCommand {
    /// Show the label of a range, or whether a pair is in sync. Writes nothing.
    Status(MirrorStatus),
    /// Copy the primary to its mirror, and label both as equal.
    Resync(MirrorResync),
    /// Allow a mirror that may be stale to be opened by itself, since its primary is lost.
    Accept(MirrorAccept),
}

/// Which range of a device.
#[derive(Args, Clone, Debug)]
pub(crate) struct MirrorRange {
    /// Namespace of the range.
    #[arg(long, default_value_t = 1, value_name = "ID")]
    pub(crate) namespace: u32,
    /// First byte of the range in its namespace; 0 when not given.
    #[arg(long, value_name = "SIZE")]
    pub(crate) start: Option<ByteSize>,
    /// Length of the range; the rest of the namespace but for the label when not given.
    #[arg(long, value_name = "SIZE")]
    pub(crate) len: Option<ByteSize>,
}

/// As of `mirror`.
#[derive(Args, Debug)]
pub(crate) struct MirrorStatus {
    /// The device of the range.
    pub(crate) uri: Target,
    /// The mirror's device, to compare.
    #[arg(long, value_name = "URI")]
    pub(crate) mirror: Option<Target>,
    /// The mirror's namespace.
    #[arg(long, default_value_t = 1, value_name = "ID")]
    pub(crate) mirror_namespace: u32,
    /// The mirror's first byte there; 0 when not given.
    #[arg(long, value_name = "SIZE")]
    pub(crate) mirror_start: Option<ByteSize>,
    #[command(flatten)]
    pub(crate) range: MirrorRange,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// As of `mirror`.
#[derive(Args, Debug)]
pub(crate) struct MirrorResync {
    /// The primary's device.
    pub(crate) uri: Target,
    /// The mirror's device; the same URI for another range or namespace of it.
    #[arg(long, value_name = "URI")]
    pub(crate) mirror: Target,
    /// The mirror's namespace.
    #[arg(long, default_value_t = 1, value_name = "ID")]
    pub(crate) mirror_namespace: u32,
    /// The mirror's first byte there; 0 when not given.
    #[arg(long, value_name = "SIZE")]
    pub(crate) mirror_start: Option<ByteSize>,
    #[command(flatten)]
    pub(crate) range: MirrorRange,
    /// Allow overwriting a drive, or an image that holds data and isn't this pair's mirror.
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// As of `mirror`.
#[derive(Args, Debug)]
pub(crate) struct MirrorAccept {
    /// The mirror's device.
    pub(crate) uri: Target,
    #[command(flatten)]
    pub(crate) range: MirrorRange,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// In which order blocks are accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pattern {
    /// Every block equally likely each time.
    Random,
    /// Ascending, from the start again at the end.
    Sequential,
}

/// Reads and writes blocks for a while and shows operations a second, bandwidth, and a histogram of latencies.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  foliant bench 'emu:null?size=1TiB'                                what driver and emulator cost together
  foliant bench 'emu:disk.img?size=8GiB' --mix 70 --block 16KiB     70 % reads; makes the image if it's missing
  foliant bench 'emu:ram?size=1GiB' --cached --cache 256MiB         through the page cache
  foliant bench 'emu:ram?size=1GiB' --pattern sequential --block 128KiB --depth 8 --json
  foliant bench vfio:0000:01:00.0 --seconds 60 --report drive.html  with plots, to show around")]
pub(crate) struct BenchOptions {
    /// The device.
    pub(crate) uri: Target,
    /// Order of the accesses.
    #[arg(long, value_enum, default_value_t = Pattern::Random)]
    pub(crate) pattern: Pattern,
    /// Share of reads in percent; the rest are writes.
    #[arg(long, default_value_t = 100, value_name = "READ%", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) mix: u8,
    /// Bytes an access.
    #[arg(long, default_value = "4KiB", value_name = "SIZE")]
    pub(crate) block: ByteSize,
    /// Accesses in flight: commands of the raw driver (32 when not given), threads through the cache (4).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=2048))]
    pub(crate) depth: Option<u16>,
    /// How long to measure.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=3600))]
    pub(crate) seconds: u16,
    /// Measure the driver alone; this is the default.
    #[arg(long, conflicts_with = "cached")]
    pub(crate) raw: bool,
    /// Measure through the page cache.
    #[arg(long)]
    pub(crate) cached: bool,
    /// Size of the page cache.
    #[arg(long, default_value = "64MiB", value_name = "SIZE", requires = "cached")]
    pub(crate) cache: ByteSize,
    /// Shards of the engine.
    #[arg(long, default_value_t = 1, value_name = "N", requires = "cached",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) shards: u16,
    /// Access only the first SIZE bytes of the namespace.
    #[arg(long, value_name = "SIZE")]
    pub(crate) range: Option<ByteSize>,
    /// Measure at 1, 2, 4, ... 128 accesses in flight as well, a quarter of the time at each and at most 10 s.
    #[arg(long)]
    pub(crate) sweep: bool,
    /// Write a report with plots, machine and drive to FILE, as HTML or, where it ends in .svg, as one picture. Implies
    /// --sweep.
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<ReportFile>,
    /// Allow overwriting an image that holds data.
    #[arg(long)]
    pub(crate) overwrite: bool,
    #[command(flatten)]
    pub(crate) stats: StatsOptions,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Lists the NVMe controllers on PCI: where they are, model and size as the kernel's driver knows them, driver, IOMMU
/// group, NUMA node, and everything that uses them. Changes nothing. Run as root it sees all processes; otherwise it
/// says what it can't tell.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  foliant devices
  foliant devices --json | jq '.controllers[] | select(.used_by == []) | .address'")]
pub(crate) struct DevicesOptions {
    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Takes a controller from the kernel's NVMe driver and gives it to vfio-pci. Refused where any of its namespaces is
/// mounted, swap, held by LVM, RAID or encryption, exported or open, and where that can't be told; and where another
/// device of its IOMMU group has a driver of its own. When it fails half-way, the controller goes back. It lasts until
/// the next boot, or `foliant unbind`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  foliant bind 0000:01:00.0
  foliant bind 01:00.0 --owner postgres     the database may open it without being root
  foliant bind 01:00.0 --noiommu            on a machine without an IOMMU: read what that gives up")]
pub(crate) struct BindOptions {
    /// The controller's PCI address.
    #[arg(value_name = "BDF")]
    pub(crate) address: PciAddress,
    /// Give the nodes by which the controller is opened to this user, by name or number.
    #[arg(long, value_name = "USER")]
    pub(crate) owner: Option<String>,
    /// Do without an IOMMU. The drive, and whatever steers it, can then write anywhere in this machine's memory.
    #[arg(long)]
    pub(crate) noiommu: bool,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Takes a controller from vfio-pci and lets the kernel's NVMe driver have it. Refused while a process has it open.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  foliant unbind 0000:01:00.0")]
pub(crate) struct UnbindOptions {
    /// The controller's PCI address.
    #[arg(value_name = "BDF")]
    pub(crate) address: PciAddress,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Checks IOMMU, kernel modules, permissions, hugepages, locked memory, processors and the controllers themselves, and
/// prints for each shortfall the command that mends it. Changes nothing. Exits with 0 when nothing blocks.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  foliant doctor
  foliant doctor --device 0000:01:00.0 --user postgres --cache 16GiB
  foliant doctor --json | jq '.findings[] | select(.severity == \"blocks\") | .commands'")]
pub(crate) struct DoctorOptions {
    /// The controller to be used; all of them when none is named.
    #[arg(long, value_name = "BDF")]
    pub(crate) device: Option<PciAddress>,
    /// The user who is to run the database; whoever runs this when not given.
    #[arg(long, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// Size of the page cache that memory is checked for.
    #[arg(long, default_value = "1GiB", value_name = "SIZE")]
    pub(crate) cache: ByteSize,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_examples() {
        for command in Cli::command().get_subcommands_mut().filter(|command| !command.is_hide_set()) {
            let help = command.render_long_help().to_string();
            assert!(help.contains("Examples:"), "{help}");
        }
    }
}
