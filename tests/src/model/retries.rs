//! Writes that failed in passing: the engine tries each again as the same command, a bounded number of times and a little
//! later each time, and tells nobody unless all of that fails (WB-22).
//!
//! Only of pages that one command writes: where a page takes several, one of them may fail for good beside another that
//! fails in passing, and which of them counts is the engine's.

use super::device_log::Extent;

/// Times that a command is submitted again.
pub const RETRIES_MAX: u8 = 5;

/// How long the first retry waits; each further one twice as long.
const FIRST_NS: u64 = 1_000_000;

/// A write that failed in passing and hasn't ended.
#[derive(Clone, Copy, Debug)]
pub struct PutOff {
    qid: u16,
    /// What it writes.
    pub extent: Extent,
    /// How often it has failed.
    pub failures: u8,
    /// When it last did.
    failed_ns: u64,
    /// Whether it is with the device again.
    is_submitted: bool,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Retries(Vec<PutOff>);

/// What a write is that the device gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// Nothing of it is waiting to be tried again.
    First,
    /// It failed in passing before, and is tried again in time.
    Again,
    /// It is none of these, for this reason.
    Wrong(String),
}

impl Retries {
    /// The device gets a write.
    pub fn attempted(&mut self, qid: u16, extent: Extent, now_ns: u64) -> Attempt {
        let Some(put_off) = self.0.iter_mut().find(|put_off| put_off.overlaps(extent)) else {
            return Attempt::First;
        };
        let wait_ns = FIRST_NS << (put_off.failures - 1);
        if put_off.extent != extent || put_off.qid != qid || put_off.is_submitted {
            return Attempt::Wrong(format!(
                "{extent:?} is written while {put_off:?} is still to be tried again"
            ));
        }
        if now_ns < put_off.failed_ns + wait_ns {
            return Attempt::Wrong(format!(
                "{put_off:?} is tried again at {now_ns}, less than {wait_ns} ns later"
            ));
        }
        put_off.is_submitted = true;
        Attempt::Again
    }

    /// A write failed with a status that lets it be tried again: whether it is.
    pub fn failed(&mut self, qid: u16, extent: Extent, now_ns: u64) -> bool {
        match self.0.iter_mut().find(|put_off| put_off.extent == extent) {
            None => {
                self.0.push(PutOff { qid, extent, failures: 1, failed_ns: now_ns, is_submitted: false });
                true
            }
            Some(put_off) if put_off.failures < RETRIES_MAX => {
                put_off.failures += 1;
                (put_off.failed_ns, put_off.is_submitted) = (now_ns, false);
                true
            }
            Some(_) => {
                self.ended(extent);
                false
            }
        }
    }

    /// A write has succeeded, or failed for good; returns how often it had failed in passing.
    pub fn ended(&mut self, extent: Extent) -> u8 {
        let at = self.0.iter().position(|put_off| put_off.extent == extent);
        at.map_or(0, |at| self.0.swap_remove(at).failures)
    }

    /// Whether a page of `len` bytes at `start` of the device waits to be tried again, or is being.
    #[must_use]
    pub fn has(&self, start: u64, len: u64) -> bool {
        self.0.iter().any(|put_off| put_off.overlaps(Extent { start, len }))
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl PutOff {
    fn overlaps(&self, extent: Extent) -> bool {
        self.extent.start < extent.end() && extent.start < self.extent.end()
    }
}
