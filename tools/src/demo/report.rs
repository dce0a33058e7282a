//! What the demo tells when it's over, and after each power cut.

use std::fmt;

use serde::Serialize;

use crate::activity::{CacheActivity, DeviceActivity};
use crate::latency::Summary;
use crate::size::ByteSize;
use crate::stdout::Report;
use crate::table::{Table, count};
use crate::verdict::Verdict;

/// One power cut and what was found after it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct CutReport {
    /// From 1.
    pub(crate) number: u32,
    /// Acknowledged since the last power-on.
    pub(crate) transactions: u64,
    /// I/O commands that the device had been given since the demo began.
    pub(crate) commands: u64,
    /// Blocks that had several versions, of which any one could survive.
    pub(crate) blocks_undecided: u64,
    /// Of those, blocks whose newest version was lost.
    pub(crate) blocks_rolled_back: u64,
    /// Transactions that redb was in the midst of: mostly 1, 0 between two, 2 while one returns and the next begins.
    pub(crate) transactions_under_way: u32,
    /// Commands that change the medium, not completed yet.
    pub(crate) commands_in_flight: u64,
    /// From power-on to the open database.
    pub(crate) reopen_seconds: f64,
    /// Transactions that must be there, all so far, and are, byte for byte.
    pub(crate) promised_verified: u64,
    pub(crate) bytes_verified: ByteSize,
    /// Transactions whose commit didn't return and that are there, whole.
    pub(crate) unacknowledged_present: u64,
    /// Transactions whose commit didn't return and that aren't there.
    pub(crate) unacknowledged_absent: u64,
    pub(crate) verdict: Verdict,
}

impl fmt::Display for CutReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (present, absent) = (self.unacknowledged_present, self.unacknowledged_absent);
        let midst = match self.transactions_under_way {
            0 => "between two".to_owned(),
            _ => format!("in the midst of the next (changes in flight: {})", self.commands_in_flight),
        };
        writeln!(
            f,
            "cut {}: after {} transactions, {midst}; {} of {} unflushed blocks lost their newest version",
            self.number, self.transactions, self.blocks_rolled_back, self.blocks_undecided
        )?;
        write!(
            f,
            "       reopened in {:.1} ms; all {} acknowledged so far are there ({}); of {} unacknowledged, {present} \
             whole and {absent} gone: {}",
            self.reopen_seconds * 1e3,
            self.promised_verified,
            self.bytes_verified,
            present + absent,
            self.verdict
        )
    }
}

/// The check after the orderly close.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct FinalCheck {
    pub(crate) transactions_verified: u64,
    pub(crate) bytes_verified: ByteSize,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Transactions {
    /// Their commit returned.
    pub(crate) acknowledged: u64,
    /// Begun or waiting for their turn at a cut, and there afterwards.
    pub(crate) found_after_a_cut: u64,
    /// Begun or waiting for their turn at a cut, and gone afterwards.
    pub(crate) lost_unacknowledged: u64,
}

/// The whole demo.
#[derive(Debug, Serialize)]
pub(crate) struct DemoReport {
    pub(crate) seed: u64,
    /// The command that chooses the same moments again.
    pub(crate) rerun: String,
    pub(crate) files: usize,
    pub(crate) bytes: ByteSize,
    pub(crate) threads: u16,
    pub(crate) cache_bytes: ByteSize,
    pub(crate) shards: usize,
    pub(crate) cuts: Vec<CutReport>,
    pub(crate) transactions: Transactions,
    /// With the wait for other writers.
    pub(crate) transaction_latency: Summary,
    pub(crate) commit_latency: Summary,
    pub(crate) cache: CacheActivity,
    pub(crate) device: DeviceActivity,
    pub(crate) payload_bytes_written: ByteSize,
    /// Bytes that a write command took from elsewhere than the frame of the page written.
    pub(crate) payload_bytes_copied: u64,
    /// `None` when the demo failed before.
    #[serde(rename = "final_check")]
    pub(crate) last: Option<FinalCheck>,
    pub(crate) seconds: f64,
    pub(crate) failures: Vec<String>,
    pub(crate) verdict: Verdict,
}

impl Report for DemoReport {
    fn table(&self) -> Table {
        let Transactions { acknowledged, found_after_a_cut, lost_unacknowledged } = self.transactions;
        let mut table = Table::default()
            .section("\ntransactions")
            .row("acknowledged", count(acknowledged))
            .row("unacknowledged at a power cut", {
                format!("{found_after_a_cut} there afterwards, {lost_unacknowledged} not")
            });
        if let Some(last) = self.last {
            let (number, bytes) = (count(last.transactions_verified), last.bytes_verified);
            table = table.row("verified at the end", format!("{number} byte for byte, {bytes}"));
        }
        table = table
            .row("begin to acknowledgement", self.transaction_latency)
            .row("commit alone", self.commit_latency);
        table = self.device.rows(self.cache.rows(table));
        table = table
            .row("payload written", self.payload_bytes_written)
            .row("payload bytes copied on the way", count(self.payload_bytes_copied));
        table = self.failures.iter().fold(table, |table, failure| table.closing(format!("wrong: {failure}")));
        let survived = self.cuts.iter().filter(|cut| cut.verdict == Verdict::Passed).count();
        let verdict = match self.verdict {
            Verdict::Passed => format!(
                "{}: {survived} power cuts survived, no acknowledged transaction lost, none by half ({:.1} s)",
                self.verdict, self.seconds
            ),
            Verdict::Failed => format!("{}: {survived} power cuts survived", self.verdict),
        };
        table
            .closing(verdict)
            .closing(format!("The same moments again (threads may meet otherwise): {}", self.rerun))
    }
}
