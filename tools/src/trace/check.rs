//! Checks what a trace shows: that each pass ascends in its shard (WB-01), and that the commands of a step share one
//! doorbell (WB-18).

use serde::Serialize;

use super::history::{Doorbell, History, Pass};
use crate::table::count;
use crate::verdict::Verdict;

/// Broken rules that are described; all are counted.
const DESCRIBED_MAX: usize = 10;

/// What the checks found.
#[derive(Debug, Serialize)]
pub(crate) struct Checked {
    pub(crate) wb01: Ascending,
    pub(crate) wb18: Doorbells,
    /// Write commands that were still with the device when the watching ended.
    pub(crate) writes_unfinished: u64,
    /// The first few broken rules in words.
    pub(crate) described: Vec<String>,
    pub(crate) verdict: Verdict,
}

/// WB-01: a pass hands folios out in strictly ascending order, never twice, within its range.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Ascending {
    /// Passes that wrote.
    pub(crate) passes: u64,
    /// Write commands of these passes.
    pub(crate) commands: u64,
    /// Commands that don't lie wholly behind the one before them.
    pub(crate) descents: u64,
    /// Commands that don't lie in their pass's range.
    pub(crate) outside: u64,
    /// Passes that counted other commands or pages than were seen.
    pub(crate) miscounted: u64,
}

/// WB-18: the commands of a batch gather, and reach the device with one doorbell.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Doorbells {
    /// Commands of all kinds.
    pub(crate) commands: u64,
    /// Steps of shards in which commands were issued.
    pub(crate) batches: u64,
    pub(crate) doorbells: u64,
    /// Doorbells that told of nothing, or were rung a second time in a step.
    pub(crate) superfluous: u64,
    /// Doorbells that told of commands of an earlier step, or of others than were issued.
    pub(crate) late: u64,
}

impl Ascending {
    fn broken(&self) -> u64 {
        self.descents + self.outside + self.miscounted
    }
}

impl Doorbells {
    fn broken(&self) -> u64 {
        self.superfluous + self.late + self.doorbells.saturating_sub(self.batches)
    }
}

impl Checked {
    /// Checks a run. If events were dropped at its end, what was seen is checked all the same.
    pub(crate) fn of(history: &History) -> Self {
        let mut described = Described::default();
        let wb01 = ascending(history, &mut described);
        let wb18 = doorbells(history, &mut described);
        let writes_unfinished = history.writes().filter(|command| command.end.is_none()).count() as u64;
        let is_broken = wb01.broken() + wb18.broken() > 0;
        let verdict = if is_broken { Verdict::Failed } else { Verdict::Passed };
        Self { wb01, wb18, writes_unfinished, described: described.0, verdict }
    }

    pub(crate) fn wb01_verdict(&self) -> Verdict {
        if self.wb01.broken() == 0 { Verdict::Passed } else { Verdict::Failed }
    }

    /// What was checked for WB-01.
    pub(crate) fn wb01_words(&self) -> String {
        let Ascending { passes, commands, descents, outside, miscounted } = self.wb01;
        let all = format!("{} write commands of {} passes", count(commands), count(passes));
        match self.wb01.broken() {
            0 => format!("{all} ascend within their pass and shard"),
            _ => format!("of {all} {descents} descend, {outside} lie outside, {miscounted} passes miscount"),
        }
    }

    /// What was checked for WB-18.
    pub(crate) fn wb18_words(&self) -> String {
        let Doorbells { commands, batches, doorbells, superfluous, late } = self.wb18;
        let all = format!(
            "{} commands in {} batches by {} doorbells ({:.1} a doorbell)",
            count(commands),
            count(batches),
            count(doorbells),
            commands as f64 / doorbells.max(1) as f64
        );
        match self.wb18.broken() {
            0 => format!("{all}, one a batch"),
            _ => format!("{all}: {superfluous} superfluous, {late} late"),
        }
    }

    pub(crate) fn wb18_verdict(&self) -> Verdict {
        if self.wb18.broken() == 0 { Verdict::Passed } else { Verdict::Failed }
    }
}

#[derive(Debug, Default)]
struct Described(Vec<String>);

impl Described {
    fn add(&mut self, words: impl FnOnce() -> String) {
        if self.0.len() < DESCRIBED_MAX {
            self.0.push(words());
        }
    }
}

fn ascending(history: &History, described: &mut Described) -> Ascending {
    let mut found = Ascending::default();
    for pass in history.passes.iter().filter(|pass| !pass.commands.is_empty()) {
        found.passes += 1;
        check_pass(history, pass, &mut found, described);
    }
    found
}

fn check_pass(history: &History, pass: &Pass, found: &mut Ascending, described: &mut Described) {
    let name = || format!("pass {} over mapping {} in shard {}", pass.number, pass.mapping, pass.shard);
    let mut behind = 0;
    let mut pages_written = 0;
    for command in pass.commands.iter().map(|&index| &history.commands[index]) {
        let pages = &command.pages;
        found.commands += 1;
        pages_written += pages.end - pages.start;
        if pages.start < behind {
            found.descents += 1;
            described
                .add(|| format!("WB-01: {} wrote page {} after page {}", name(), pages.start, behind - 1));
        }
        if pages.start < pass.range.start || pages.end > pass.range.end {
            found.outside += 1;
            described.add(|| format!("WB-01: {} wrote pages {pages:?} outside its {:?}", name(), pass.range));
        }
        behind = pages.end;
    }
    if let Some(end) = pass.ended
        && (end.commands, end.pages) != (pass.commands.len() as u64, pages_written)
    {
        found.miscounted += 1;
        described.add(|| {
            let (commands, seen) = (end.commands, pass.commands.len());
            format!(
                "WB-01: {} counts {commands} commands and {} pages, seen were {seen} and {pages_written}",
                name(),
                end.pages
            )
        });
    }
}

fn doorbells(history: &History, described: &mut Described) -> Doorbells {
    let mut found = Doorbells::default();
    let mut last_step_ns = vec![None; history.shards as usize];
    for doorbell in &history.doorbells {
        let at = || format!("shard {} at {:.3} ms", doorbell.shard, doorbell.at_ns as f64 / 1e6);
        found.doorbells += 1;
        found.commands += doorbell.issued;
        found.batches += doorbell.steps;
        let last = last_step_ns[doorbell.shard as usize].replace(doorbell.step_ns);
        if doorbell.issued == 0 || last == Some(doorbell.step_ns) {
            found.superfluous += 1;
            described.add(|| format!("WB-18: {} rang a doorbell that its step didn't need", at()));
        } else if !doorbell.is_in_step || doorbell.commands != doorbell.issued {
            found.late += 1;
            let Doorbell { commands, issued, steps, .. } = doorbell;
            described.add(|| {
                format!("WB-18: {} told of {commands} commands; {issued} of {steps} steps had gathered", at())
            });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::happening::{Happening, Kind, Op};
    use super::super::history::made_up;
    use super::*;

    fn checked(happenings: &[Happening]) -> Checked {
        Checked::of(&History::of(happenings))
    }

    /// Where the `nth` write command is issued.
    fn issue(happenings: &[Happening], nth: usize) -> usize {
        let mut issues = happenings.iter().enumerate().filter(|(_, h)| matches!(h.kind, Kind::Issued { .. }));
        issues.nth(nth).unwrap().0
    }

    #[test]
    fn a_run_that_keeps_the_rules_passes_with_its_counts() {
        for shards in [1, 4] {
            let checked = checked(&made_up::run(shards));
            assert_eq!(checked.verdict, Verdict::Passed, "{checked:?}");
            let shards = u64::from(shards);
            assert_eq!((checked.wb01.passes, checked.wb01.commands), (2 * shards, 6 * shards));
            assert_eq!((checked.wb18.batches, checked.wb18.doorbells), (2 * shards + 1, 2 * shards + 1));
            assert_eq!(checked.wb18.commands, 6 * shards + 1);
            assert_eq!(checked.writes_unfinished, 0);
        }
    }

    #[test]
    fn wb01_a_command_that_descends_is_found_and_described() {
        let mut run = made_up::run(2);
        let (first, second) = (issue(&run, 0), issue(&run, 1));
        let kind = run[first].kind.clone();
        run[first].kind = run[second].kind.clone();
        run[second].kind = kind;
        let checked = checked(&run);
        assert_eq!((checked.verdict, checked.wb01.descents, checked.wb18.late), (Verdict::Failed, 1, 0));
        assert!(checked.described[0].contains("wrote page 0 after page 103"), "{:?}", checked.described);
        assert_eq!((checked.wb01_verdict(), checked.wb18_verdict()), (Verdict::Failed, Verdict::Passed));
    }

    #[test]
    fn wb01_a_page_that_is_written_twice_or_outside_the_range_is_found() {
        let mut run = made_up::run(1);
        let (first, second) = (issue(&run, 0), issue(&run, 1));
        run[second].kind = run[first].kind.clone();
        assert_eq!(checked(&run).wb01.descents, 1);
        let mut run = made_up::run(1);
        let third = issue(&run, 2);
        if let Kind::Issued { pages, .. } = &mut run[third].kind {
            *pages = 510..514;
        }
        assert_eq!((checked(&run).wb01.outside, checked(&run).wb01.descents), (1, 0));
    }

    #[test]
    fn wb01_a_command_that_was_not_seen_is_missed() {
        let mut run = made_up::run(1);
        run.remove(issue(&run, 1));
        assert_eq!(checked(&run).wb01.miscounted, 1);
    }

    #[test]
    fn wb18_a_doorbell_for_every_command_is_found() {
        let mut run = made_up::run(1);
        let first = issue(&run, 0);
        let mut early = run[first].clone();
        early.kind = Kind::Rung { commands: 1 };
        run.insert(first + 1, early);
        let checked = checked(&run);
        assert_eq!((checked.verdict, checked.wb18.superfluous), (Verdict::Failed, 1), "{checked:?}");
        assert_eq!(checked.wb01_verdict(), Verdict::Passed);
    }

    #[test]
    fn wb18_a_command_that_waits_beyond_its_step_is_found() {
        let mut run = made_up::run(1);
        let bell = run.iter().position(|happening| matches!(happening.kind, Kind::Rung { .. })).unwrap();
        run[bell].step_ns += 1;
        assert_eq!(checked(&run).wb18.late, 1);
    }

    #[test]
    fn a_write_that_never_ends_is_counted() {
        let mut run = made_up::run(1);
        run.retain(|h| !matches!(h.kind, Kind::Completed { op: Op::Write, first_page: 0, .. }));
        // A command for page 0 takes the place of the one before it.
        assert_eq!(checked(&run).writes_unfinished, 2);
    }

    #[test]
    fn only_the_first_few_are_described_and_all_are_counted() {
        let mut run = made_up::run(20);
        run.iter_mut().for_each(|happening| {
            if let Kind::Issued { pages, .. } = &mut happening.kind {
                *pages = 50_000..50_004;
            }
        });
        let checked = checked(&run);
        assert_eq!((checked.described.len(), checked.wb01.outside), (DESCRIBED_MAX, 120));
    }
}
