//! Instructions of a request in an engine of several shards, counted by callgrind.
//!
//! `versus scaling` runs itself under `valgrind --tool=callgrind` with the hidden question `scaling-callgrind`, once for
//! each number of shards. Callgrind collects inside the three functions of [`shards`](super::shards) that send requests, have
//! the shards serve them and take the answers. Unlike a time the count says nothing of caches, and nothing disturbs it.

use std::process::Command;

use anyhow::{Context, Result, bail};

use super::shards::{Bed, REQUESTS_A_SHARD, SHARD_FRAMES};
use crate::callgrind::inclusive_cost;

/// How the child is told the number of shards, and the rounds.
const SHARDS_VARIABLE: &str = "FOLIANT_VERSUS_SHARDS";
const ROUNDS_VARIABLE: &str = "FOLIANT_VERSUS_ROUNDS";
/// The functions inside which callgrind collects.
const MARKED: [&str; 3] = ["marked_send", "marked_serve", "marked_take"];
/// Requests counted, at any number of shards.
const REQUESTS: usize = 1 << 13;

/// Instructions a request in each of the three phases, for each of `shards`; `Err` says why they can't be counted.
///
/// # Errors
/// When valgrind is there but doesn't finish, or what it writes can't be read.
pub fn count(shards: &[usize]) -> Result<Result<Vec<[f64; 3]>, String>> {
    if let Err(error) = Command::new("valgrind").arg("--version").output() {
        return Ok(Err(format!(
            "valgrind can't be run ({error}); install it to have the instructions of a request"
        )));
    }
    shards.iter().map(|&shards| count_with(shards)).collect::<Result<_>>().map(Ok)
}

fn count_with(shards: usize) -> Result<[f64; 3]> {
    let rounds = (REQUESTS / (shards * REQUESTS_A_SHARD)).max(32);
    let requests = (rounds * shards * REQUESTS_A_SHARD) as f64;
    let directory = tempfile::tempdir().context("cannot create a temporary directory")?;
    let out = directory.path().join("callgrind.out");
    let program = std::env::current_exe().context("cannot find this program's own path")?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--compress-strings=no", "--compress-pos=no"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .args(MARKED.map(|function| format!("--toggle-collect=*{function}*")))
        .arg(program)
        .arg("scaling-callgrind")
        .env(SHARDS_VARIABLE, shards.to_string())
        .env(ROUNDS_VARIABLE, rounds.to_string())
        .output()
        .context("cannot run valgrind")?;
    if !output.status.success() {
        bail!("valgrind ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    let profile = std::fs::read_to_string(&out).context("cannot read callgrind's output")?;
    let cost = |function| -> Result<f64> {
        let cost = inclusive_cost(&profile, function);
        Ok(cost.with_context(|| format!("callgrind saw no call of {function}"))? as f64 / requests)
    };
    let [send, serve, take] = MARKED;
    Ok([cost(send)?, cost(serve)?, cost(take)?])
}

/// The child's part.
///
/// # Errors
/// When a request fails, or it isn't called by [`count`].
pub fn run_measured_requests() -> Result<()> {
    let number = |variable: &str| -> Result<usize> {
        let value = std::env::var(variable).ok().and_then(|value| value.parse().ok());
        value.with_context(|| format!("{variable} isn't set: run `versus scaling` instead"))
    };
    let (shards, rounds) = (number(SHARDS_VARIABLE)?, number(ROUNDS_VARIABLE)?);
    Bed::open(shards, SHARD_FRAMES, 0)?.rounds(rounds, shards * REQUESTS_A_SHARD)
}
