//! How much of the host's processors somebody had: others, for measurements that need it idle, or a guest, whose time
//! by the clock says little on a busy machine.

use std::fs;
use std::ops::RangeInclusive;

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use crate::error::{LabError, Result};

/// Processor time since some moment, in ticks of the kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostLoad {
    /// All processors' time, busy or not.
    all: u64,
    /// The part of it that wasn't idle, or was taken by a hypervisor.
    busy: u64,
    /// What this process and those that it has waited for used.
    own: u64,
}

impl HostLoad {
    /// The time until now.
    ///
    /// # Errors
    /// When the kernel doesn't tell.
    pub(crate) fn now() -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).map_err(LabError::io("read", path.as_ref()));
        Self::parse(&read("/proc/stat")?, &read("/proc/self/stat")?).ok_or_else(|| LabError::Unexpected {
            what: "/proc/stat".into(),
            reason: "it doesn't tell the processors' time".into(),
        })
    }

    /// The share, between 0 and 1, of all processors' time since `earlier` that others had.
    pub(crate) fn others_since(&self, earlier: &Self) -> f64 {
        let own = self.own - earlier.own;
        let others = (self.busy - earlier.busy).saturating_sub(own);
        others as f64 / (self.all - earlier.all).max(1) as f64
    }

    fn parse(system: &str, process: &str) -> Option<Self> {
        let line = system.lines().next()?.strip_prefix("cpu ")?;
        // User, nice, system, idle, waiting for I/O, interrupts, software interrupts, stolen; guests count as user.
        let ticks: Vec<u64> = line.split_whitespace().take(8).map_while(|text| text.parse().ok()).collect();
        let all = ticks.iter().sum();
        let idle = ticks.get(3)? + ticks.get(4)?;
        // User and system time, and those of the children that were waited for.
        let own = process_ticks(process, 14..=17)?;
        Some(Self { all, busy: all - idle, own })
    }
}

/// The sum of fields of a process's `stat`, numbered as in `man proc_pid_stat`.
fn process_ticks(stat: &str, mut numbers: RangeInclusive<usize>) -> Option<u64> {
    // After the name in parentheses, which may hold anything: the state is field 3.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    numbers.try_fold(0, |sum, number| Some(sum + fields.get(number - 3)?.parse::<u64>().ok()?))
}

/// Waits for the end of the child `id`, and says how many seconds of processor time it had, all its threads together.
/// The child is still to be waited for.
///
/// # Errors
/// When there is no such child, or the kernel doesn't tell.
pub(crate) fn cpu_seconds_of_ended(id: u32) -> Result<f64> {
    let unexpected =
        |reason: String| LabError::Unexpected { what: format!("the child process {id}"), reason };
    let pid =
        i32::try_from(id).ok().and_then(Pid::from_raw).ok_or_else(|| unexpected("no process".into()))?;
    loop {
        match waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(unexpected(error.to_string())),
        }
    }
    let path = format!("/proc/{id}/stat");
    let stat = fs::read_to_string(&path).map_err(LabError::io("read", path.as_ref()))?;
    let ticks =
        process_ticks(&stat, 14..=15).ok_or_else(|| unexpected(format!("{path} doesn't tell its time")))?;
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_have_what_is_busy_and_not_our_own() {
        let at = |user: u64, idle: u64, own: u64| {
            let process = format!("1 (a) b) S 1 1 1 0 -1 0 0 0 0 0 {own} 0 {own} 0 20 0");
            HostLoad::parse(&format!("cpu  {user} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1"), &process).unwrap()
        };
        let share = at(150, 150, 25).others_since(&at(50, 50, 0));
        assert!((share - 0.25).abs() < 1e-9, "{share}");
        HostLoad::now().unwrap();
    }

    #[test]
    fn a_child_that_has_ended_tells_its_time_and_can_still_be_waited_for() {
        let busy = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; exit 7";
        let mut child = std::process::Command::new("sh").args(["-c", busy]).spawn().unwrap();
        let seconds = cpu_seconds_of_ended(child.id()).unwrap();
        assert!((0.0..600.0).contains(&seconds), "{seconds}");
        assert_eq!(child.wait().unwrap().code(), Some(7));
        assert!(cpu_seconds_of_ended(child.id()).is_err(), "nobody knows of it any more");
        assert_eq!(process_ticks("1 (a) b) S 4 5 6 7 8 9 10 11 12 13 14 15 16 17", 14..=15), Some(29));
    }
}
