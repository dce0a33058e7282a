//! The error state of a mapping: each failed writeback is told once to each handle (WB-23; `errseq_t`).
//!
//! One counter a mapping, one remembered value a handle. The lowest bit of the counter says whether anybody
//! has seen the newest error; a handle opened while nobody has remembers 0, and so sees it too.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Error;

const SEEN: u64 = 1;
const ONE: u64 = 2;

/// The counter and the newest error of one mapping.
#[derive(Debug, Default)]
pub(crate) struct ErrorSequence {
    count: AtomicU64,
    newest: Mutex<Option<Error>>,
}

/// How much of an [`ErrorSequence`] one handle has been told.
#[derive(Debug)]
pub(crate) struct ErrorCursor(AtomicU64);

impl ErrorSequence {
    /// Records a failed writeback (`mapping_set_error`).
    pub(crate) fn record(&self, error: Error) {
        let mut newest = self.newest.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *newest = Some(error);
        let count = self.count.load(Ordering::Relaxed);
        self.count.store((count & !SEEN).wrapping_add(ONE), Ordering::Release);
    }

    /// The cursor of a handle that is being opened (`errseq_sample`).
    pub(crate) fn sample(&self) -> ErrorCursor {
        let count = self.count.load(Ordering::Acquire);
        ErrorCursor(AtomicU64::new(if count & SEEN == 0 { 0 } else { count }))
    }

    /// The newest error if `cursor` hasn't been told of it; afterwards it has (`errseq_check_and_advance`).
    pub(crate) fn check_and_advance(&self, cursor: &ErrorCursor) -> Option<Error> {
        if self.count.load(Ordering::Acquire) == cursor.0.load(Ordering::Relaxed) {
            return None;
        }
        let newest = self.newest.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let seen = self.count.fetch_or(SEEN, Ordering::AcqRel) | SEEN;
        if cursor.0.swap(seen, Ordering::AcqRel) == seen || seen == SEEN {
            return None;
        }
        newest.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wb23_each_handle_is_told_once_of_each_event() {
        let errors = ErrorSequence::default();
        let (first, second) = (errors.sample(), errors.sample());
        assert!(errors.check_and_advance(&first).is_none());
        errors.record(Error::Closed);
        assert!(errors.check_and_advance(&first).is_some());
        assert!(errors.check_and_advance(&first).is_none());
        assert!(errors.check_and_advance(&second).is_some());
        errors.record(Error::Closed);
        assert!(errors.check_and_advance(&first).is_some());
    }

    #[test]
    fn wb23_a_handle_opened_after_an_unseen_error_sees_it_and_after_a_seen_one_does_not() {
        let errors = ErrorSequence::default();
        errors.record(Error::Closed);
        let late = errors.sample();
        assert!(errors.check_and_advance(&late).is_some());
        let later = errors.sample();
        assert!(errors.check_and_advance(&later).is_none());
    }
}
