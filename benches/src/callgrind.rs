//! Instructions of the driver alone, counted by callgrind.
//!
//! `versus driver` runs itself under `valgrind --tool=callgrind` with the hidden question `driver-callgrind`, which
//! reads from a null device through four functions that are never inlined. Callgrind collects inside these
//! functions only (`--toggle-collect`), so the inclusive cost of each is what the driver, or the emulated
//! controller, spends there; the call itself and moving the payload into it are counted, too.

use std::collections::VecDeque;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use foliant_nvme::{DmaBuffer, Io, Namespace, QueuePair};

use crate::driver::NullBed;

/// Reads counted at each depth.
const READS: usize = 4096;
/// How the child is told the queue depth.
const DEPTH_VARIABLE: &str = "FOLIANT_VERSUS_DEPTH";

/// Instructions an I/O at one queue depth.
#[derive(Clone, Copy, Debug)]
pub struct Instructions {
    pub depth: usize,
    pub submit: f64,
    pub ring: f64,
    pub poll: f64,
    /// The emulated controller's work.
    pub pump: f64,
}

impl Instructions {
    /// The driver's share: everything but the emulated controller.
    pub fn driver(&self) -> f64 {
        self.submit + self.ring + self.poll
    }
}

/// How counting ended.
pub enum Counted {
    Instructions(Vec<Instructions>),
    /// There is no valgrind to count with.
    NoValgrind(String),
}

/// Counts at each of `depths`.
///
/// # Errors
/// When valgrind is there but doesn't finish, or what it writes can't be read.
pub fn count_instructions(depths: &[usize]) -> Result<Counted> {
    if let Err(error) = Command::new("valgrind").arg("--version").output() {
        return Ok(Counted::NoValgrind(format!(
            "valgrind can't be run ({error}); install it to have the figure"
        )));
    }
    let directory = tempfile::tempdir().context("cannot create a temporary directory")?;
    let out = directory.path().join("callgrind.out");
    let counted: Result<_> = depths.iter().map(|&depth| count_at(depth, &out)).collect();
    Ok(Counted::Instructions(counted?))
}

fn count_at(depth: usize, out: &Path) -> Result<Instructions> {
    let depth_word = depth.to_string();
    let question = ("driver-callgrind", DEPTH_VARIABLE, depth_word.as_str());
    let profile = profile(question, &Marker::ALL.map(Marker::function), out)?;
    let reads = (READS / depth * depth) as f64;
    let cost = |marker: Marker| -> Result<f64> {
        let cost = inclusive_cost(&profile, marker.function());
        Ok(cost.with_context(|| format!("callgrind saw no call of {}", marker.function()))? as f64 / reads)
    };
    Ok(Instructions {
        depth,
        submit: cost(Marker::Submit)?,
        ring: cost(Marker::Ring)?,
        poll: cost(Marker::Poll)?,
        pump: cost(Marker::Pump)?,
    })
}

/// What callgrind writes of this program, which is asked a hidden question with a variable in its environment; it collects inside
/// the functions named only.
///
/// # Errors
/// When valgrind can't be run or ends without success.
pub fn profile(
    (question, variable, value): (&str, &str, &str),
    functions: &[&str],
    out: &Path,
) -> Result<String> {
    let program = std::env::current_exe().context("cannot find this program's own path")?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--compress-strings=no", "--compress-pos=no"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .args(functions.iter().map(|function| format!("--toggle-collect=*{function}*")))
        .arg(program)
        .arg(question)
        .env(variable, value)
        .output()
        .context("cannot run valgrind")?;
    if !output.status.success() {
        bail!("valgrind ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    std::fs::read_to_string(out).context("cannot read callgrind's output")
}

/// The functions inside which callgrind collects.
#[derive(Clone, Copy, Debug)]
enum Marker {
    Submit,
    Ring,
    Pump,
    Poll,
}

impl Marker {
    const ALL: [Self; 4] = [Self::Submit, Self::Ring, Self::Pump, Self::Poll];

    /// The function's name in this module, as it is part of the symbol.
    const fn function(self) -> &'static str {
        match self {
            Self::Submit => "marked_submit",
            Self::Ring => "marked_ring",
            Self::Pump => "marked_pump",
            Self::Poll => "marked_poll",
        }
    }
}

/// Sums what a function of callgrind's output spends itself and in what it calls.
///
/// ```text
/// fn=versus::callgrind::marked_ring     a function's own lines follow: LINE COST
/// 120 6
/// cfn=foliant_nvme::…                   it calls another
/// calls=1 40                            so often; the next line's cost is what was spent there
/// 121 30
/// ```
pub fn inclusive_cost(profile: &str, function: &str) -> Option<u64> {
    let mut sum = None;
    let mut inside = false;
    for line in profile.lines() {
        if let Some(name) = line.strip_prefix("fn=") {
            inside = name.contains(function);
        } else if inside && line.starts_with(|first: char| first.is_ascii_digit()) {
            let cost: u64 = line.split_whitespace().nth(1).and_then(|cost| cost.parse().ok())?;
            *sum.get_or_insert(0) += cost;
        }
    }
    sum
}

/// The child's part: reads from a null device, through the marked functions.
///
/// # Errors
/// When a read fails, or it isn't called by [`count_instructions`].
pub fn run_measured_reads() -> Result<()> {
    let depth = std::env::var(DEPTH_VARIABLE).ok().and_then(|depth| depth.parse().ok());
    let depth: usize =
        depth.with_context(|| format!("{DEPTH_VARIABLE} isn't set: run `versus driver` instead"))?;
    let mut bed = NullBed::new(depth)?;
    for _ in 0..READS / depth {
        for _ in 0..depth {
            let io = bed.next_read();
            let buffer = bed.free.pop_front().context("a buffer was lost")?;
            marked_submit(&mut bed.queue, &bed.namespace, io, buffer)?;
        }
        marked_ring(&mut bed.queue);
        marked_pump(&mut bed.queue);
        let taken = marked_poll(&mut bed.queue, depth as u32, &mut bed.free)?;
        if taken as usize != depth {
            bail!("{taken} of {depth} commands had completed after one pump");
        }
    }
    Ok(())
}

#[inline(never)]
fn marked_submit(
    queue: &mut QueuePair<DmaBuffer>,
    namespace: &Namespace,
    io: Io,
    buffer: DmaBuffer,
) -> Result<()> {
    queue.submit(namespace, io, buffer).map_err(|rejected| anyhow!(rejected.reason))
}

#[inline(never)]
fn marked_ring(queue: &mut QueuePair<DmaBuffer>) {
    queue.ring();
}

#[inline(never)]
fn marked_pump(queue: &mut QueuePair<DmaBuffer>) {
    queue.pump();
}

#[inline(never)]
fn marked_poll(queue: &mut QueuePair<DmaBuffer>, budget: u32, free: &mut VecDeque<DmaBuffer>) -> Result<u32> {
    let mut failed = None;
    let taken = queue.poll(budget, |completion| {
        free.push_back(completion.payload);
        failed = failed.or(completion.result.err());
    })?;
    failed.map_or(Ok(taken), |error| Err(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cost_of_a_function_includes_what_it_calls_and_nothing_else() {
        let profile = "events: Ir\n\nfn=versus::callgrind::marked_ring\n120 6\ncfn=other\ncalls=2 40\n121 30\n\n\
                       fn=other\n40 30\nfn=versus::callgrind::marked_ring\n122 1\n";
        assert_eq!(inclusive_cost(profile, "marked_ring"), Some(37));
        assert_eq!(inclusive_cost(profile, "marked_poll"), None);
    }
}
