//! What a run was, put together from its events: passes with their commands, doorbells, commits.

use std::collections::HashMap;
use std::ops::Range;

use super::happening::{Happening, Kind, Mode, Op, Reason};

/// A run.
#[derive(Debug, Default)]
pub(crate) struct History {
    pub(crate) passes: Vec<Pass>,
    pub(crate) commands: Vec<Command>,
    pub(crate) doorbells: Vec<Doorbell>,
    pub(crate) commits: Vec<Commit>,
    pub(crate) shards: u32,
    pub(crate) syncs: u64,
    pub(crate) pages_evicted: u64,
    /// Completions of commands that weren't seen to be issued.
    pub(crate) strays: u64,
}

/// A pass over one mapping in one shard.
#[derive(Debug)]
pub(crate) struct Pass {
    pub(crate) number: u64,
    pub(crate) shard: u32,
    pub(crate) mapping: u16,
    pub(crate) reason: Reason,
    pub(crate) mode: Mode,
    /// What it was to look at.
    pub(crate) range: Range<u64>,
    /// Dirty pages of the mapping in the shard when it began.
    pub(crate) dirty: u64,
    pub(crate) began_ns: u64,
    /// By index, in the order in which they were issued.
    pub(crate) commands: Vec<usize>,
    pub(crate) ended: Option<PassEnd>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct PassEnd {
    pub(crate) at_ns: u64,
    /// As the pass itself counted them.
    pub(crate) commands: u64,
    pub(crate) pages: u64,
    /// It came to the end of its range; otherwise whoever ran it gave it up.
    pub(crate) is_whole: bool,
}

/// A command over pages.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) op: Op,
    pub(crate) shard: u32,
    pub(crate) mapping: u16,
    pub(crate) pages: Range<u64>,
    /// By index.
    pub(crate) pass: Option<usize>,
    pub(crate) issued_ns: u64,
    /// `None` while it is with the device.
    pub(crate) end: Option<CommandEnd>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CommandEnd {
    pub(crate) at_ns: u64,
    pub(crate) has_failed: bool,
}

/// A doorbell that was rung.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Doorbell {
    pub(crate) shard: u32,
    pub(crate) at_ns: u64,
    pub(crate) step_ns: u64,
    /// Commands that it told the device of, by the shard's count.
    pub(crate) commands: u64,
    /// Commands that were seen to be issued since the doorbell before it.
    pub(crate) issued: u64,
    /// Those of them that write pages back.
    pub(crate) writes: u64,
    /// In how many steps of the shard they were.
    pub(crate) steps: u64,
    /// Whether they were all issued in the step in which it was rung.
    pub(crate) is_in_step: bool,
}

/// A flush.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Commit {
    pub(crate) namespace: u32,
    pub(crate) began_ns: u64,
    pub(crate) end: Option<CommandEnd>,
    /// Syncs that it served.
    pub(crate) syncs: u64,
}

/// Commands of a shard that wait for its doorbell.
#[derive(Clone, Copy, Debug, Default)]
struct Plug {
    issued: u64,
    writes: u64,
    steps: u64,
    last_step_ns: u64,
}

impl Plug {
    fn issue(&mut self, step_ns: u64) {
        self.steps += u64::from(self.issued == 0 || self.last_step_ns != step_ns);
        self.issued += 1;
        self.last_step_ns = step_ns;
    }
}

impl History {
    /// Puts a run together.
    pub(crate) fn of(happenings: &[Happening]) -> Self {
        let mut history = Self::default();
        let mut passes: HashMap<u64, usize> = HashMap::new();
        let mut in_flight: HashMap<(Op, u16, u64), usize> = HashMap::new();
        let mut flushes: HashMap<(u32, u32), usize> = HashMap::new();
        let mut plugs: HashMap<u32, Plug> = HashMap::new();
        for &Happening { at_ns, shard, step_ns, ref kind } in happenings {
            history.shards = history.shards.max(shard + 1);
            match kind.clone() {
                Kind::PassBegan { mapping, pass: number, reason, mode, pages: range, dirty } => {
                    passes.insert(number, history.passes.len());
                    let (began_ns, commands, ended) = (at_ns, Vec::new(), None);
                    let pass = Pass {
                        number,
                        shard,
                        mapping,
                        reason,
                        mode,
                        range,
                        dirty,
                        began_ns,
                        commands,
                        ended,
                    };
                    history.passes.push(pass);
                }
                Kind::PassEnded { pass, commands, pages, is_whole } => {
                    if let Some(&pass) = passes.get(&pass) {
                        history.passes[pass].ended = Some(PassEnd { at_ns, commands, pages, is_whole });
                    }
                }
                Kind::Issued { op, mapping, pages, pass } => {
                    let pass = pass.and_then(|number| passes.get(&number).copied());
                    let index = history.commands.len();
                    if let Some(pass) = pass {
                        history.passes[pass].commands.push(index);
                    }
                    in_flight.insert((op, mapping, pages.start), index);
                    let plug = plugs.entry(shard).or_default();
                    plug.issue(step_ns);
                    plug.writes += u64::from(op == Op::Write);
                    let issued_ns = at_ns;
                    let command = Command { op, shard, mapping, pages, pass, issued_ns, end: None };
                    history.commands.push(command);
                }
                Kind::Completed { op, mapping, first_page, has_failed } => {
                    match in_flight.remove(&(op, mapping, first_page)) {
                        Some(index) => history.commands[index].end = Some(CommandEnd { at_ns, has_failed }),
                        None => history.strays += 1,
                    }
                }
                Kind::Rung { commands } => {
                    let Plug { issued, writes, steps, last_step_ns } =
                        plugs.remove(&shard).unwrap_or_default();
                    let is_in_step = issued > 0 && steps == 1 && last_step_ns == step_ns;
                    history.doorbells.push(Doorbell {
                        shard,
                        at_ns,
                        step_ns,
                        commands,
                        issued,
                        writes,
                        steps,
                        is_in_step,
                    });
                }
                Kind::CommitBegan { namespace, syncs } => {
                    plugs.entry(shard).or_default().issue(step_ns);
                    flushes.insert((shard, namespace), history.commits.len());
                    history.commits.push(Commit { namespace, began_ns: at_ns, end: None, syncs });
                }
                Kind::CommitEnded { namespace, has_failed } => {
                    if let Some(index) = flushes.remove(&(shard, namespace)) {
                        history.commits[index].end = Some(CommandEnd { at_ns, has_failed });
                    }
                }
                Kind::SyncBegan => history.syncs += 1,
                Kind::Evicted { pages } => history.pages_evicted += pages,
                Kind::SyncEnded { .. } | Kind::Other => {}
            }
        }
        history
    }

    /// The write commands.
    pub(crate) fn writes(&self) -> impl Iterator<Item = &Command> + Clone {
        self.commands.iter().filter(|command| command.op == Op::Write)
    }

    /// The read commands, those ahead of demand among them.
    pub(crate) fn reads(&self) -> impl Iterator<Item = &Command> {
        self.commands.iter().filter(|command| matches!(command.op, Op::Read | Op::ReadAhead))
    }

    /// How a command's pass writes; background where the pass isn't known.
    pub(crate) fn mode(&self, command: &Command) -> Mode {
        command.pass.map_or(Mode::Background, |pass| self.passes[pass].mode)
    }
}

/// Runs made up for tests.
#[cfg(test)]
pub(crate) mod made_up {
    use super::*;

    /// A run of `shards` shards, each with two passes over mapping 0, background and sync, with their doorbells and
    /// completions, and a commit at the end. The last write of shard 0 fails.
    pub(crate) fn run(shards: u32) -> Vec<Happening> {
        let mut happenings = Vec::new();
        let mut at_ns = 0;
        for shard in 0..shards {
            let base = u64::from(shard) * 512;
            for (number, mode, reason) in
                [(1, Mode::Background, Reason::DirtyLimit), (2, Mode::Integrity, Reason::Sync)]
            {
                let pass = u64::from(shard) * 2 + number;
                let mut tell = |kind, step_ns: u64| {
                    at_ns += 10_000;
                    happenings.push(Happening { at_ns, shard, step_ns, kind });
                };
                let step_ns = pass * 1000;
                let range = base..base + 512;
                tell(Kind::PassBegan { mapping: 0, pass, reason, mode, pages: range, dirty: 12 }, step_ns);
                for place in 0..3u64 {
                    let pages = base + 100 * place..base + 100 * place + 4;
                    tell(Kind::Issued { op: Op::Write, mapping: 0, pages, pass: Some(pass) }, step_ns);
                }
                tell(Kind::PassEnded { pass, commands: 3, pages: 12, is_whole: true }, step_ns);
                tell(Kind::Rung { commands: 3 }, step_ns);
                for place in 0..3u64 {
                    let has_failed = pass == 2 && place == 2;
                    let first_page = base + 100 * place;
                    tell(
                        Kind::Completed { op: Op::Write, mapping: 0, first_page, has_failed },
                        step_ns + 500,
                    );
                }
            }
        }
        let end = [
            Kind::CommitBegan { namespace: 1, syncs: 2 },
            Kind::Rung { commands: 1 },
            Kind::CommitEnded { namespace: 1, has_failed: false },
        ];
        for kind in end {
            at_ns += 10_000;
            happenings.push(Happening { at_ns, shard: 0, step_ns: 1_000_000, kind });
        }
        happenings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_belong_to_their_passes_and_end_when_they_completed() {
        let history = History::of(&made_up::run(2));
        assert_eq!((history.passes.len(), history.commands.len(), history.shards), (4, 12, 2));
        let sync = &history.passes[1];
        assert_eq!((sync.reason, sync.commands.len()), (Reason::Sync, 3));
        let failed: Vec<_> =
            history.commands.iter().filter(|c| c.end.is_some_and(|e| e.has_failed)).collect();
        assert_eq!(failed.len(), 1);
        assert_eq!((failed[0].pages.clone(), history.mode(failed[0])), (200..204, Mode::Integrity));
        assert!(history.commands.iter().all(|command| command.end.unwrap().at_ns > command.issued_ns));
        assert_eq!(history.strays, 0);
    }

    #[test]
    fn a_doorbell_knows_what_was_issued_since_the_one_before_it() {
        let history = History::of(&made_up::run(1));
        let issued: Vec<u64> = history.doorbells.iter().map(|doorbell| doorbell.issued).collect();
        assert_eq!(issued, [3, 3, 1]);
        assert!(
            history
                .doorbells
                .iter()
                .all(|doorbell| doorbell.is_in_step && doorbell.commands == doorbell.issued)
        );
    }
}
