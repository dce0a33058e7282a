//! The rules that runs check, the faults that strike, and which of them met.

use std::fmt::Write as _;

macro_rules! names {
    ($(#[$doc:meta])+ $kind:ident { $($(#[$variant_doc:meta])+ $variant:ident = $name:literal,)+ }) => {
        $(#[$doc])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $kind { $($(#[$variant_doc])+ $variant,)+ }

        impl $kind {
            /// All of them, in the order of the table.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// Its name in the table.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
        }
    };
}

names! {
    /// What is checked. A check counts as exercised only where it could have failed.
    Rule {
        /// A pass writes in ascending order, and no page twice.
        Wb01 = "WB-01 ascending, once",
        /// A background pass ascends, and doesn't end before it has seen everything.
        Wb02 = "WB-02 background passes",
        /// A cyclic pass goes on where the one before has stopped.
        Wb02Index = "WB-02 goes on where it was",
        /// A sync writes only what was dirty when it began.
        Wb03 = "WB-03 dirty at the start only",
        /// Marks and states agree at rest.
        Wb04 = "WB-04 marks agree with states",
        /// A sync tries every dirty page of its range, past errors.
        Wb05 = "WB-05 on past errors",
        /// A background pass stops when its budget is spent.
        Wb05Budget = "WB-05 budgets",
        /// A sync waits for an exclusive holder, and nothing that is held so is written.
        Wb06 = "WB-06 exclusive holders",
        /// What a callback puts off stays dirty; what it is shown is the newest.
        Wb09 = "WB-09 not now",
        /// What is contiguous goes out as one command.
        Wb11 = "WB-11 one command a run",
        /// One doorbell a batch.
        Wb18 = "WB-18 one doorbell a batch",
        /// At most a flush a sync, and none without a volatile write cache.
        Wb21 = "WB-21 flushes",
        /// What fails in passing is tried again, a bounded number of times and later each time, and nobody is told.
        Wb22 = "WB-22 tried again untold",
        /// Each failed write is told once to each handle, and nothing else is told.
        Wb23Told = "WB-23 told once a handle",
        /// A page whose write failed isn't clean: no sync over it succeeds before a write of it has.
        Wb23Undurable = "WB-23 failed is not clean",
        /// A page whose write failed goes out by itself, so that it doesn't fail its neighbours.
        Wb23Apart = "WB-23 poisoned apart",
        /// Dirty memory stays below its limit; who is refused or ends waiting there was above the middle.
        Wb24 = "WB-24 dirty memory bounded",
        /// What a device reads, or somebody has pinned, doesn't change.
        Wb25Stable = "WB-25 stable under I/O",
        /// After a power cut each atomic unit is old or new.
        Wb25OldOrNew = "WB-25 old or new",
        /// Discards wait for writeback, and what was discarded is not written later.
        Wb26 = "WB-26 discard",
        /// A read returns the newest, also of what was evicted and read in again.
        Wb27 = "WB-27 newest is read",
        /// What was read ahead is the newest, too.
        Wb28 = "WB-28 newest is read ahead",
        /// When a sync succeeds, writes of everything changed before it have completed.
        Wb29Written = "WB-29 all writes waited for",
        /// When a sync succeeds, a flush has that began after those writes completed.
        Wb29Flush = "WB-29 flush follows writes",
        /// What a sync promised survives a power cut.
        Wb29Durable = "WB-29 durable after sync",
        /// After a failed flush nothing is written and no sync succeeds.
        Wb30 = "WB-30 failed flush latches",
        /// Behind a gate no page is written before its log is durable.
        Wb40 = "WB-40 log before page",
        /// Every data pointer is its folio's frame.
        Wb41 = "WB-41 data lies in frames",
        /// A page that the engine calls atomic goes out whole, and is old or new after a power cut.
        Wb44 = "WB-44 pages aren't torn",
        /// What a checkpoint calls durable is: changes below the oldest number, and what `flush_until` had to write.
        Wb45 = "WB-45 checkpoints",
        /// `flush_until` writes what is older than it was asked for, and nothing else.
        Wb45Only = "WB-45 older pages only",
        /// Everything ends, within the time that the options allow.
        Bounded = "everything ends",
    }
}

names! {
    /// What strikes.
    Fault {
        /// Nothing so far.
        Nothing = "none",
        /// Writes fail, retryable.
        WriteTransient = "transient",
        /// Writes fail for good.
        WriteFatal = "fatal",
        /// A block can't be written.
        Media = "media",
        /// Reads fail.
        Read = "read",
        /// A flush fails.
        Flush = "flush",
        /// Write Zeroes fails.
        Zeroes = "zeroes",
        /// Commands are slow.
        Delay = "delay",
        /// A command is lost.
        Lost = "lost",
        /// The device stops.
        Stopped = "stopped",
        /// The power was cut.
        PowerCut = "power",
    }
}

/// Why a fault can't meet a check; `None` where it can, and then some run has to show it.
#[must_use]
pub fn out_of_reach(fault: Fault, rule: Rule) -> Option<&'static str> {
    use Fault::{Flush, Lost, Nothing, Stopped};
    match (fault, rule) {
        (Nothing, Rule::Wb22 | Rule::Wb23Told | Rule::Wb23Undurable | Rule::Wb23Apart) => {
            Some("no write has failed")
        }
        (Nothing, Rule::Wb30) => Some("no flush has failed"),
        (Nothing, Rule::Wb25OldOrNew | Rule::Wb29Durable | Rule::Wb44) => {
            Some("it is a power cut that shows it")
        }
        (Flush, Rule::Wb02 | Rule::Wb02Index | Rule::Wb05Budget | Rule::Wb09) => {
            Some("after a failed flush no pass begins")
        }
        (Lost, Rule::Wb02 | Rule::Wb02Index | Rule::Wb45Only) => {
            Some("beside a command that is lost nothing counts as alone")
        }
        (Flush, Rule::Wb45 | Rule::Wb45Only) => Some("after a failed flush no checkpoint succeeds"),
        (Flush, Rule::Wb01 | Rule::Wb03 | Rule::Wb05 | Rule::Wb11) => {
            Some("after a failed flush a sync writes nothing")
        }
        (Flush, Rule::Wb40) => Some("after a failed flush no page is written"),
        (Flush, Rule::Wb29Written | Rule::Wb29Flush | Rule::Wb23Undurable) => {
            Some("after a failed flush no sync succeeds")
        }
        (
            Stopped,
            Rule::Wb01
            | Rule::Wb02
            | Rule::Wb02Index
            | Rule::Wb03
            | Rule::Wb05
            | Rule::Wb06
            | Rule::Wb11
            | Rule::Wb22
            | Rule::Wb23Apart
            | Rule::Wb40
            | Rule::Wb41
            | Rule::Wb45Only,
        ) => Some("a device that has stopped carries no command out"),
        _ => None,
    }
}

/// A set of faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults(u16);

impl Faults {
    /// Adds one.
    pub fn add(&mut self, fault: Fault) {
        self.0 |= 1 << fault as u16;
    }

    /// Whether it has struck.
    #[must_use]
    pub fn has(self, fault: Fault) -> bool {
        self.0 >> fault as u16 & 1 != 0
    }

    /// The faults that a check meets now.
    fn bits(self) -> u16 {
        if self.0 == 0 { 1 << Fault::Nothing as u16 } else { self.0 }
    }
}

/// Which faults met which checks in one run: a bit a fault, a word a rule.
#[derive(Clone, Debug)]
pub struct Met(Vec<u16>);

impl Default for Met {
    fn default() -> Self {
        Self(vec![0; Rule::ALL.len()])
    }
}

impl Met {
    /// A check of `rule` was exercised while `faults` had struck.
    pub fn note(&mut self, rule: Rule, faults: Faults) {
        self.0[rule as usize] |= faults.bits();
    }
}

/// In how many runs each fault met each rule's check.
#[derive(Clone, Debug)]
pub struct Coverage {
    runs: u64,
    cells: Vec<Vec<u64>>,
}

impl Default for Coverage {
    fn default() -> Self {
        Self { runs: 0, cells: vec![vec![0; Fault::ALL.len()]; Rule::ALL.len()] }
    }
}

impl Coverage {
    /// Adds a run.
    pub fn add(&mut self, met: &Met) {
        self.runs += 1;
        for (cells, bits) in self.cells.iter_mut().zip(&met.0) {
            for (fault, cell) in cells.iter_mut().enumerate() {
                *cell += u64::from(bits >> fault & 1);
            }
        }
    }

    /// Adds what others have run.
    pub fn merge(&mut self, other: &Self) {
        self.runs += other.runs;
        for (cells, others) in self.cells.iter_mut().zip(&other.cells) {
            cells.iter_mut().zip(others).for_each(|(cell, other)| *cell += other);
        }
    }

    /// Runs counted.
    #[must_use]
    pub fn runs(&self) -> u64 {
        self.runs
    }

    /// Cells that should have been reached and weren't, and cells that were though they are listed as out of reach.
    #[must_use]
    pub fn faults(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for &rule in Rule::ALL {
            for &fault in Fault::ALL {
                let runs = self.cells[rule as usize][fault as usize];
                match (runs, out_of_reach(fault, rule)) {
                    (0, None) => wrong.push(format!("no run exercised {} × {}", fault.name(), rule.name())),
                    (1.., Some(reason)) => wrong.push(format!(
                        "{runs} runs exercised {} × {}, which is listed as out of reach: {reason}",
                        fault.name(),
                        rule.name()
                    )),
                    _ => {}
                }
            }
        }
        wrong
    }
}

/// The table: runs that exercised a rule's check after a fault had struck. `-` is out of reach.
impl std::fmt::Display for Coverage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{} runs; in how many a rule's check was exercised after a fault had struck:",
            self.runs
        )?;
        let mut line = format!("{:30}", "");
        for fault in Fault::ALL {
            write!(line, "{:>10}", fault.name())?;
        }
        writeln!(f, "{line}")?;
        for &rule in Rule::ALL {
            let mut line = format!("{:30}", rule.name());
            for &fault in Fault::ALL {
                match (self.cells[rule as usize][fault as usize], out_of_reach(fault, rule)) {
                    (0, Some(_)) => write!(line, "{:>10}", "-")?,
                    (runs, _) => write!(line, "{runs:>10}")?,
                }
            }
            writeln!(f, "{line}")?;
        }
        writeln!(f, "\nout of reach:")?;
        for &rule in Rule::ALL {
            for &fault in Fault::ALL {
                if let Some(reason) = out_of_reach(fault, rule) {
                    writeln!(f, "  {} × {}: {reason}", fault.name(), rule.name())?;
                }
            }
        }
        Ok(())
    }
}
