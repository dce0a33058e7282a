//! Which machine the figures belong to.

use std::fmt;

use anyhow::{Context, Result};
use serde::Serialize;

/// What a reader needs to know of the machine to place a figure.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's name as it gives it itself, with family and model, which cloud names leave out.
    pub processor: String,
    /// Cores that this process may run on.
    pub cores: usize,
    /// Size of the memory in bytes.
    pub memory_bytes: u64,
    /// Operating system and release.
    pub kernel: String,
    /// Runnable processes, on average over the last minute, when the measurement ended: more than a few say that
    /// the machine was busy with something else, too.
    pub load_average: f64,
}

impl Machine {
    /// The machine that this process runs on.
    ///
    /// # Errors
    /// When `/proc` isn't there.
    pub fn this() -> Result<Self> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
        let field = |name: &str| {
            let line =
                cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
            line.and_then(|line| line.split(':').nth(1)).map_or("?", str::trim)
        };
        let processor =
            format!("{} (family {}, model {})", field("model name"), field("cpu family"), field("model"));
        let meminfo = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
        let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let memory_kib: u64 =
            total.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0);
        let load = std::fs::read_to_string("/proc/loadavg").context("cannot read /proc/loadavg")?;
        let system = rustix::system::uname();
        Ok(Self {
            processor,
            cores: std::thread::available_parallelism()?.get(),
            memory_bytes: memory_kib * 1024,
            kernel: format!("{} {}", system.sysname().to_string_lossy(), system.release().to_string_lossy()),
            load_average: load
                .split_whitespace()
                .next()
                .and_then(|value| value.parse().ok())
                .unwrap_or(f64::NAN),
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processor, cores, memory_bytes, kernel, load_average } = self;
        let gib = *memory_bytes as f64 / f64::from(1 << 30);
        write!(f, "{processor}, {cores} cores, {gib:.0} GiB, {kernel}, load {load_average:.1}")
    }
}
