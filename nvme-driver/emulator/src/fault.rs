//! Faults as data: which commands to hit, and what happens to them.
//!
//! | fault class | how it is expressed |
//! |---|---|
//! | a command fails, transiently or for good | [`Action::Status`] |
//! | a command is slow, or completes after its timeout | [`Action::Delay`] |
//! | a command is carried out, and fails late all the same | [`Action::FailLate`] |
//! | a command is lost inside the device | [`Action::Drop`] |
//!
//! Faults are tried in the order of injection; the first one that matches and is due wins. Power loss isn't a
//! fault but [`power_cut`](crate::EmulatedController::power_cut).

use std::time::Duration;

use foliant_nvme_spec::{AdminOpcode, NvmOpcode, Status};

/// One fault: which commands it hits, and what it does to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which commands are hit.
    pub matching: Match,
    /// What happens to them.
    pub action: Action,
}

/// Which commands a fault hits: those that fulfil every condition given. `Match::default()` hits every I/O command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// The opcode; any when `None`. Opcodes of admin and I/O commands overlap: `qid` tells them apart.
    pub opcode: Option<u8>,
    /// The namespace id; any when `None`.
    pub nsid: Option<u32>,
    /// The submission queue; any I/O queue when `None`, the admin queue when 0.
    pub qid: Option<u16>,
    /// Blocks (first, last) of which the command must touch at least one; a command without blocks, such as
    /// Flush, then never matches.
    pub lbas: Option<(u64, u64)>,
    /// So many matching commands pass unharmed first.
    pub skip: u64,
    /// So many are hit after that; every one when `None`.
    pub times: Option<u64>,
}

impl Match {
    /// Every I/O command of this opcode.
    #[must_use]
    pub fn io(opcode: NvmOpcode) -> Self {
        Self { opcode: Some(opcode.0), ..Self::default() }
    }

    /// Every admin command of this opcode.
    #[must_use]
    pub fn admin(opcode: AdminOpcode) -> Self {
        Self { opcode: Some(opcode.0), qid: Some(0), ..Self::default() }
    }

    /// The same, limited to commands that touch a block from `first` to `last`.
    #[must_use]
    pub const fn touching(mut self, first: u64, last: u64) -> Self {
        self.lbas = Some((first, last));
        self
    }

    /// The same, letting `skip` commands pass and then hitting `times`.
    #[must_use]
    pub const fn after(mut self, skip: u64, times: u64) -> Self {
        self.skip = skip;
        self.times = Some(times);
        self
    }

    fn fits(&self, command: &Candidate) -> bool {
        let queue_fits = self.qid.map_or(command.qid != 0, |qid| qid == command.qid);
        let lbas_fit = self.lbas.is_none_or(|(first, last)| {
            command.blocks > 0 && command.slba <= last && command.slba + (command.blocks - 1) >= first
        });
        queue_fits
            && lbas_fit
            && self.opcode.is_none_or(|opcode| opcode == command.opcode)
            && self.nsid.is_none_or(|nsid| nsid == command.nsid)
    }
}

/// What happens to a command that a fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It completes with this status and isn't carried out.
    Status(Status),
    /// It is carried out, and its completion comes that much later.
    Delay(Duration),
    /// It is carried out, and completes that much later with this status: the driver can't know what it changed.
    FailLate {
        /// Time from fetching it to its completion.
        delay: Duration,
        /// What it completes with.
        status: Status,
    },
    /// It is fetched and then lost: neither carried out nor completed. Abort, queue deletion and reset end it.
    Drop,
}

/// What a fault is matched against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) qid: u16,
    pub(crate) opcode: u8,
    pub(crate) nsid: u32,
    pub(crate) slba: u64,
    /// 0 for a command without blocks.
    pub(crate) blocks: u64,
}

/// The faults injected and how often each was met.
#[derive(Debug, Default)]
pub(crate) struct FaultTable {
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    fault: Fault,
    met: u64,
}

impl FaultTable {
    pub(crate) fn push(&mut self, fault: Fault) {
        self.entries.push(Entry { fault, met: 0 });
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What to do to this command. Every fault that fits counts it, also those that don't win.
    pub(crate) fn decide(&mut self, command: &Candidate) -> Option<Action> {
        let mut decision = None;
        for Entry { fault, met } in &mut self.entries {
            if !fault.matching.fits(command) {
                continue;
            }
            let hit = met.checked_sub(fault.matching.skip);
            *met += 1;
            let is_due = hit.is_some_and(|hit| fault.matching.times.is_none_or(|times| hit < times));
            if is_due && decision.is_none() {
                decision = Some(fault.action);
            }
        }
        decision
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Candidate = Candidate { qid: 1, opcode: NvmOpcode::READ.0, nsid: 1, slba: 100, blocks: 8 };

    fn table(faults: &[(Match, Action)]) -> FaultTable {
        let mut table = FaultTable::default();
        for (matching, action) in faults {
            table.push(Fault { matching: *matching, action: *action });
        }
        table
    }

    #[test]
    fn skip_and_times_count_matching_commands_only() {
        let mut table = table(&[(Match::io(NvmOpcode::READ).after(1, 2), Action::Drop)]);
        let write = Candidate { opcode: NvmOpcode::WRITE.0, ..READ };
        let decisions: Vec<bool> =
            [READ, write, READ, write, READ, READ].iter().map(|c| table.decide(c).is_some()).collect();
        assert_eq!(decisions, [false, false, true, false, true, false]);
    }

    #[test]
    fn lba_ranges_hit_at_both_edges() {
        for (first, last, is_hit) in
            [(0, 99, false), (0, 100, true), (107, 200, true), (108, 200, false), (102, 103, true)]
        {
            let mut table = table(&[(Match::default().touching(first, last), Action::Drop)]);
            assert_eq!(table.decide(&READ).is_some(), is_hit, "{first}..={last}");
            let flush = Candidate { opcode: NvmOpcode::FLUSH.0, blocks: 0, ..READ };
            assert_eq!(table.decide(&flush), None);
        }
    }

    #[test]
    fn the_first_match_wins() {
        let delay = Action::Delay(Duration::from_micros(1));
        let mut table = table(&[(Match::default().after(0, 1), delay), (Match::default(), Action::Drop)]);
        assert_eq!(table.decide(&READ), Some(delay));
        assert_eq!(table.decide(&READ), Some(Action::Drop));
    }

    #[test]
    fn admin_commands_are_hit_only_by_name() {
        let admin = Candidate { qid: 0, ..READ };
        assert_eq!(table(&[(Match::default(), Action::Drop)]).decide(&admin), None);
        let mut named = table(&[(Match::admin(AdminOpcode::GET_LOG_PAGE), Action::Drop)]);
        assert_eq!(named.decide(&admin), Some(Action::Drop));
        assert_eq!(named.decide(&READ), None);
    }
}
