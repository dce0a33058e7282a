//! Which pages the workload made dirty, and when. The engine has no event for that (a hit must not pay for one), so
//! the threads of the workload note it themselves.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use foliant::PAGE_BYTES;

use super::history::History;
use super::watch::Watch;

/// Notes that are kept; about 16 MB.
const NOTES_MAX: usize = 1 << 19;

/// Pages that a writer has made dirty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dirtied {
    pub(crate) at_ns: u64,
    pub(crate) mapping: u16,
    pub(crate) first_page: u64,
    pub(crate) pages: u32,
}

/// Where the workload's threads note what they have written.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    watch: Watch,
    notes: Mutex<Vec<Dirtied>>,
    dropped: AtomicU64,
}

impl DirtyLog {
    /// A log on the clock of `watch`.
    pub(crate) fn new(watch: &Watch) -> Self {
        Self { watch: watch.clone(), notes: Mutex::default(), dropped: AtomicU64::new(0) }
    }

    /// Bytes of a mapping have been written.
    pub(crate) fn note(&self, mapping: u16, bytes: Range<u64>) {
        let page = PAGE_BYTES as u64;
        let (first_page, end) = (bytes.start / page, bytes.end.div_ceil(page));
        let pages = u32::try_from(end - first_page).unwrap_or(u32::MAX);
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        if notes.len() == NOTES_MAX {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        } else {
            notes.push(Dirtied { at_ns: self.watch.now_ns(), mapping, first_page, pages });
        }
    }

    /// What was noted, in the order of time, and how many notes found no room.
    pub(crate) fn into_notes(self) -> (Vec<Dirtied>, u64) {
        (self.notes.into_inner().unwrap_or_else(PoisonError::into_inner), self.dropped.into_inner())
    }
}

/// Neighbouring pages that were dirty from the same write until the same command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DirtySpan {
    pub(crate) mapping: u16,
    pub(crate) pages: Range<u64>,
    pub(crate) since_ns: u64,
    pub(crate) until_ns: u64,
}

impl DirtySpan {
    fn continues(&self, until_ns: u64, since_ns: u64, page: u64) -> bool {
        (self.until_ns, self.since_ns, self.pages.end) == (until_ns, since_ns, page)
    }
}

/// How long which pages were dirty before they were written. A page that is dirtied between the beginning of its write
/// and the note of it is missed now and then: nothing but the picture depends on it.
pub(crate) fn dirty_spans(notes: &[Dirtied], history: &History) -> Vec<DirtySpan> {
    let mut since: HashMap<(u16, u64), u64> = HashMap::new();
    let notes = with_failures(notes, history);
    let mut notes = notes.iter().peekable();
    let mut spans: Vec<DirtySpan> = Vec::new();
    for command in history.writes() {
        while let Some(note) = notes.next_if(|note| note.at_ns <= command.issued_ns) {
            for page in note.first_page..note.first_page + u64::from(note.pages) {
                since.entry((note.mapping, page)).or_insert(note.at_ns);
            }
        }
        let until_ns = command.issued_ns;
        for page in command.pages.clone() {
            let Some(since_ns) = since.remove(&(command.mapping, page)) else { continue };
            match spans.last_mut() {
                Some(last) if last.continues(until_ns, since_ns, page) => last.pages.end = page + 1,
                _ => {
                    let (mapping, pages) = (command.mapping, page..page + 1);
                    spans.push(DirtySpan { mapping, pages, since_ns, until_ns });
                }
            }
        }
    }
    spans
}

/// The notes, and those of pages that are dirty again because their write failed, in the order of time.
fn with_failures(notes: &[Dirtied], history: &History) -> Vec<Dirtied> {
    let failed = history.writes().filter_map(|command| {
        let end = command.end.filter(|end| end.has_failed)?;
        let pages = u32::try_from(command.pages.end - command.pages.start).unwrap_or(u32::MAX);
        Some(Dirtied { at_ns: end.at_ns, mapping: command.mapping, first_page: command.pages.start, pages })
    });
    let mut all: Vec<Dirtied> = notes.iter().copied().chain(failed).collect();
    all.sort_by_key(|note| note.at_ns);
    all
}

#[cfg(test)]
mod tests {
    use super::super::history::made_up;
    use super::*;

    fn note(at_ns: u64, first_page: u64, pages: u32) -> Dirtied {
        Dirtied { at_ns, mapping: 0, first_page, pages }
    }

    #[test]
    fn a_page_is_dirty_from_its_first_write_until_its_command() {
        let history = History::of(&made_up::run(1));
        let first = history.commands[0].issued_ns;
        // Pages 0 to 3 are written by the first command.
        let notes = [note(1, 0, 2), note(2, 1, 3), note(3, 900, 1)];
        let spans = dirty_spans(&notes, &history);
        let span = |pages, since_ns| DirtySpan { mapping: 0, pages, since_ns, until_ns: first };
        assert_eq!(spans, [span(0..2, 1), span(2..4, 2)]);
    }

    #[test]
    fn a_page_that_is_dirtied_again_has_a_span_for_each_time() {
        let history = History::of(&made_up::run(1));
        let again = history.commands[0].issued_ns + 1;
        let spans = dirty_spans(&[note(1, 0, 1), note(again, 0, 1)], &history);
        assert_eq!(spans.len(), 2);
        assert_eq!((spans[1].since_ns, spans[1].until_ns), (again, history.commands[3].issued_ns));
    }

    #[test]
    fn a_page_whose_write_failed_is_dirty_from_then_until_it_is_written_again() {
        let mut run = made_up::run(1);
        let failed = History::of(&run).commands[5].end.unwrap();
        assert!(failed.has_failed);
        // Another run of the same passes, later.
        let later = made_up::run(1).into_iter().map(|mut happening| {
            happening.at_ns += 1_000_000;
            happening
        });
        run.extend(later);
        let spans = dirty_spans(&[], &History::of(&run));
        assert_eq!((spans[0].pages.clone(), spans[0].since_ns), (200..204, failed.at_ns));
    }
}
