//! What QEMU's controllers were told, by QEMU's own account: one line of its trace a command.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{LabError, Result};

/// The events that are traced.
pub(crate) const EVENTS: &[&str] = &["pci_nvme_io_cmd", "pci_nvme_create_sq"];

/// The commands that the controllers of a machine got in one boot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandTrace {
    commands: Vec<TracedCommand>,
    /// I/O submission queues that were created.
    pub queues_created: usize,
}

/// One I/O command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracedCommand {
    /// Submission queue.
    pub sqid: u16,
    /// Namespace.
    pub nsid: u32,
    /// Opcode.
    pub opcode: u8,
}

/// The trace's file below a run's directory.
pub(crate) fn path(run: &Path) -> PathBuf {
    run.join("trace")
}

impl CommandTrace {
    /// Reads a trace.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(LabError::io("read", path))?;
        Ok(Self::parse(&text))
    }

    /// The I/O commands with `opcode` for namespace `nsid`, of all controllers.
    #[must_use]
    pub fn count(&self, nsid: u32, opcode: u8) -> usize {
        self.commands.iter().filter(|command| command.nsid == nsid && command.opcode == opcode).count()
    }

    /// All I/O commands in their order.
    #[must_use]
    pub fn commands(&self) -> &[TracedCommand] {
        &self.commands
    }

    fn parse(text: &str) -> Self {
        let mut trace = Self::default();
        for line in text.lines() {
            if line.contains("pci_nvme_create_sq ") {
                trace.queues_created += 1;
            } else if line.contains("pci_nvme_io_cmd ") {
                trace.commands.extend(command(line));
            }
        }
        trace
    }
}

/// `…pci_nvme_io_cmd cid 1 nsid 0x1 sqid 2 opc 0x0 opname 'NVME_NVM_CMD_FLUSH'`
fn command(line: &str) -> Option<TracedCommand> {
    let after = |name: &str| {
        let mut words = line.split_whitespace();
        words.find(|word| *word == name)?;
        words.next()
    };
    let hex = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    Some(TracedCommand {
        sqid: after("sqid")?.parse().ok()?,
        nsid: hex(after("nsid")?)?,
        opcode: u8::try_from(hex(after("opc")?)?).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_counted_by_namespace_and_opcode() {
        let trace = CommandTrace::parse(
            "pci_nvme_create_sq create submission queue, addr=0x1, sqid=1, cqid=1, qsize=3, qflags=1\n\
             1@17:pci_nvme_io_cmd cid 7 nsid 0x1 sqid 1 opc 0x0 opname 'NVME_NVM_CMD_FLUSH'\n\
             pci_nvme_io_cmd cid 7 nsid 0xa sqid 1 opc 0x2 opname 'NVME_NVM_CMD_READ'\n",
        );
        assert_eq!((trace.count(1, 0), trace.count(10, 2), trace.count(1, 2)), (1, 1, 0));
        assert_eq!(trace.queues_created, 1);
    }
}
