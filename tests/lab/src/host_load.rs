//! How busy the host is with the work of others, for measurements that need it idle.

use std::fs;

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
        // After the name in parentheses, which may hold anything: the state is field 3 of `man proc_pid_stat`.
        let fields: Vec<&str> = process.rsplit_once(')')?.1.split_whitespace().collect();
        let own = (14..=17).map(|field| fields.get(field - 3)?.parse::<u64>().ok()).sum::<Option<u64>>()?;
        Some(Self { all, busy: all - idle, own })
    }
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
}
