//! The plan that the host puts into the initramfs, and the lines that go over the lab's serial port.
//!
//! The port carries one line a message, `LAB ` and a JSON object from the guest, bare JSON from the host. The kernel's
//! console is another port, so that its messages never fall into a line.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Where the plan lies in the guest.
pub const PLAN_PATH: &str = "/lab/plan.json";

/// Where the command `foliant` lies in the guest, if the scenario wants it.
pub const FOLIANT: &str = "/bin/foliant";

/// What each line from the guest begins with.
pub const PREFIX: &str = "LAB ";

/// The guest's serial port that carries the lines.
pub const PORT: &str = "/dev/ttyS1";

/// The I/O port of QEMU's `isa-debug-exit`: writing `code` ends QEMU with the status `2 * code + 1`.
pub const EXIT_PORT: u16 = 0x501;

/// Written to [`EXIT_PORT`] when every job has been run, whatever came of it.
pub const EXIT_DONE: u8 = 0x2A;

/// Written to [`EXIT_PORT`] when the guest could not be set up.
pub const EXIT_SETUP_FAILED: u8 = 0x2B;

/// What QEMU's exit status is after the guest wrote `code`.
#[must_use]
pub const fn exit_status(code: u8) -> i32 {
    code as i32 * 2 + 1
}

/// What a guest is to do, from power-on to power-off.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BootPlan {
    /// Kernel modules, as paths in the guest, in the order in which they are loaded.
    pub modules: Vec<Module>,
    /// Hugepages of 2 MiB to reserve.
    pub hugepages: u32,
    /// Functions, as `0000:00:04.0`, that vfio-pci gets before the first job.
    pub bind: Vec<String>,
    /// The jobs, in order.
    pub jobs: Vec<JobPlan>,
}

/// A kernel module and its parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Module {
    /// Where it lies in the guest.
    pub path: String,
    /// Parameters, as for `insmod`.
    pub parameters: String,
}

/// One job: what a claim needs done in the guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobPlan {
    /// The claim that it serves; its lines carry the name.
    pub claim: String,
    /// Which of the guest's jobs.
    pub job: String,
    /// Its arguments.
    pub arguments: Value,
}

/// A line from the guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "snake_case")]
pub enum Line {
    /// Set-up is done, the first job begins.
    Ready {
        /// Seconds since the kernel started.
        uptime_s: f64,
        /// The kernel's release.
        kernel: String,
    },
    /// A job begins.
    Started {
        /// Its claim.
        claim: String,
    },
    /// Something that a job found, for the host to check.
    Fact {
        /// The job's claim.
        claim: String,
        /// What it is.
        name: String,
        /// What it says.
        value: Value,
    },
    /// A job wants something done by the host and waits for an [`Answer`].
    Ask {
        /// The job's claim.
        claim: String,
        /// What is wanted.
        what: String,
        /// The details.
        arguments: Value,
    },
    /// A job is over.
    Verdict {
        /// Its claim.
        claim: String,
        /// Why it failed; `None` when it passed.
        failure: Option<String>,
        /// How long it took.
        seconds: f64,
    },
    /// Every job has been run; the guest powers off.
    Done,
}

/// The host's answer to [`Line::Ask`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is done.
    Done(Value),
    /// It could not be done.
    Failed(String),
}

impl Line {
    /// The line as it goes over the wire, without the line's end.
    ///
    /// # Panics
    /// Never: every line can be written as JSON.
    #[must_use]
    pub fn encode(&self) -> String {
        format!("{PREFIX}{}", serde_json::to_string(self).expect("a line is plain data"))
    }

    /// Reads what [`encode`](Self::encode) wrote; `None` for any other text.
    #[must_use]
    pub fn decode(text: &str) -> Option<Self> {
        serde_json::from_str(text.trim().strip_prefix(PREFIX)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_survives_the_wire() {
        let line =
            Line::Fact { claim: "a".into(), name: "n".into(), value: serde_json::json!({"x": [1, 2]}) };
        assert_eq!(Line::decode(&format!("{}\r\n", line.encode())), Some(line));
        assert_eq!(Line::decode("[    0.1] LAB-oratory"), None);
    }
}
