//! A guest for people: a shell on the terminal, with the command `foliant` and two controllers to try it on.

use std::time::Duration;

use serde_json::Value;

use crate::drive::Drive;
use crate::error::{LabError, Result};
use crate::guest::Echo;
use crate::kernel::KernelNeed;
use crate::machine::{Machine, NvmeController, RunBy};
use crate::packages;
use crate::scenario::{self, Boot, Claim, GuestFile, RunOptions, Verdict};

/// The controllers' addresses, as the guest sees them.
pub const ADDRESSES: [&str; 2] = ["0000:00:04.0", "0000:00:05.0"];

/// Boots the guest and gives it the terminal, until its shell ends.
///
/// # Errors
/// When the lab can't be set up, or the guest ends in another way.
pub fn run(kernel: KernelNeed) -> Result<()> {
    let busybox = packages::program("busybox", "busybox-static")?;
    let bytes = std::fs::read(&busybox).map_err(LabError::io("read", &busybox))?;
    if bytes.windows(9).any(|window| window == b"/ld-linux") {
        let reason =
            "it needs libraries, which the guest doesn't have; install the package busybox-static".into();
        return Err(LabError::Unexpected { what: busybox.display().to_string(), reason });
    }
    let machine =
        Machine { memory_mib: 1024, hugepages: 128, kernel, run_by: RunBy::ThreadEach, ..Machine::new() };
    let machine = machine
        .drive(Drive::new("a", 1024))
        .drive(Drive::new("b", 1024))
        .nvme(NvmeController::new("LAB0", "04.0").namespace(1, "a", 4096))
        .nvme(NvmeController::new("LAB1", "05.0").namespace(1, "b", 512));
    let mut boot =
        Boot::new("shell", machine).with_foliant().claim(Claim::new("shell", "", "shell", Value::Null));
    boot.files.push(GuestFile::Host(busybox, "bin/busybox".into()));
    boot.limit = Duration::from_secs(24 * 3600);
    let report = scenario::run(&boot, RunOptions { echo: Echo::Terminal, ..RunOptions::default() })?;
    match &report.verdicts[0].1 {
        Verdict::Holds => Ok(()),
        Verdict::Fails(reason) => {
            Err(LabError::Unexpected { what: "the guest".into(), reason: reason.clone() })
        }
    }
}
