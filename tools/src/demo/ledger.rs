//! What the demo knows of its transactions, outside of the database and out of the power cut's reach.
//!
//! ```text
//!  waiting ──take──► begun ──commit returned──► promised ────────► must be there, whole, ever after
//!     ▲                │                            ▲
//!     │                └─power failed──► found ─────┘              may be there, but whole
//!     └────────────────────────────────► not found                 or not at all, ever after
//! ```
//!
//! A file whose transaction was lost waits again, and gets a transaction number of its own.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Numbers transactions in the order in which they were taken up; never used twice.
pub(crate) type TransactionId = u64;

/// How far a transaction has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Its commit hasn't returned.
    Begun,
    /// Its commit returned, or it was found after a power cut: it must be there.
    Promised,
}

/// A transaction: the source that it takes in, by index, and how far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) source: usize,
    pub(crate) standing: Standing,
}

#[derive(Debug, Default)]
struct Pages {
    waiting: VecDeque<usize>,
    entries: BTreeMap<TransactionId, Entry>,
    next: TransactionId,
    acknowledged: u64,
}

/// The ledger, shared by the threads that commit.
#[derive(Debug)]
pub(crate) struct Ledger {
    pages: Mutex<Pages>,
}

impl Ledger {
    /// A ledger of the sources by index, waiting in the order given.
    pub(crate) fn new(waiting: impl IntoIterator<Item = usize>) -> Self {
        Self {
            pages: Mutex::new(Pages { waiting: waiting.into_iter().collect(), next: 1, ..Pages::default() }),
        }
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next transaction and its source; `None` when nothing waits.
    pub(crate) fn take(&self) -> Option<(TransactionId, usize)> {
        let mut pages = self.pages();
        let source = pages.waiting.pop_front()?;
        let id = pages.next;
        pages.next += 1;
        pages.entries.insert(id, Entry { source, standing: Standing::Begun });
        Some((id, source))
    }

    /// Notes that the transaction's commit has returned.
    pub(crate) fn acknowledge(&self, id: TransactionId) {
        let mut pages = self.pages();
        pages.acknowledged += 1;
        if let Some(entry) = pages.entries.get_mut(&id) {
            entry.standing = Standing::Promised;
        }
    }

    /// Every transaction that may be in the database.
    pub(crate) fn entries(&self) -> BTreeMap<TransactionId, Entry> {
        self.pages().entries.clone()
    }

    /// Decides over the transactions that were begun and not acknowledged: those `found` are promised from now on,
    /// the others never existed, and their sources wait again.
    pub(crate) fn settle(&self, found: impl Fn(TransactionId) -> bool) {
        let mut pages = self.pages();
        let Pages { waiting, entries, .. } = &mut *pages;
        entries.retain(|id, entry| {
            let keep = entry.standing == Standing::Promised || found(*id);
            if keep {
                entry.standing = Standing::Promised;
            } else {
                waiting.push_front(entry.source);
            }
            keep
        });
    }

    /// Commits that have returned.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.pages().acknowledged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledged_transaction_stays_promised_whether_it_is_found_or_not() {
        let ledger = Ledger::new([0]);
        let (id, _) = ledger.take().unwrap();
        ledger.acknowledge(id);
        ledger.settle(|_| false);
        assert_eq!(ledger.entries()[&id].standing, Standing::Promised);
        assert_eq!((ledger.acknowledged(), ledger.take()), (1, None));
    }

    #[test]
    fn a_begun_transaction_is_promised_once_found_and_else_taken_up_anew() {
        let ledger = Ledger::new([7, 8]);
        let (found, lost) = (ledger.take().unwrap().0, ledger.take().unwrap().0);
        ledger.settle(|id| id == found);
        assert_eq!(ledger.entries().into_keys().collect::<Vec<_>>(), [found]);
        let (again, source) = ledger.take().unwrap();
        assert_eq!(source, 8);
        assert!(again > lost);
    }
}
