//! Two streams of one pass: the writes that go to the device and to a mirror, and which stream is fed next (WB-15).
//!
//! What a pass takes is a run, one command of the primary. Where the mapping has a mirror, a run has a **pair**: it counts
//! the parts that the mirror is fed, and remembers how the primary's command ended. The folios' writeback ends when the
//! primary's command, and every part, has ended (`netfs_write_folio`, `netfs_write_collection`).
//!
//! Each stream has a position, in pages of the order in which passes took them. Of the streams that have room the one
//! furthest behind is fed first. The primary is never behind, since passes begin a run only where it has room for it, so
//! what the mirror hasn't been fed is a line of pairs, the oldest first:
//!
//! ```text
//!   pages taken   ──────────────────────────────────▶
//!   primary       ████████████████████████████▒▒▒▒     ▒ the run that is being submitted
//!   mirror        ███████████████░░░░░░░░░░░░░         ░ fed before that, as far as its queue has room
//! ```
//!
//! The line is bounded: passes stop while no pair is free, so a mirror slower than the primary slows writeback down to its
//! own rate, and reads don't notice.

use std::collections::VecDeque;
use std::ops::Range;

use crate::error::Error;
use crate::mirror::StreamId;
use crate::shard::payload::FolioRun;

/// Index of a pair in its shard's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PairId(u32);

impl PairId {
    /// Of a run that goes to one stream only.
    pub(crate) const NONE: Self = Self(u32::MAX);

    pub(crate) fn is_some(self) -> bool {
        self != Self::NONE
    }
}

/// One run under way.
#[derive(Debug)]
struct Pair {
    mapping: u16,
    pages: Range<u64>,
    /// What the mirror hasn't been fed: its first page, and the frames of the whole run.
    unfed: Option<(u64, FolioRun)>,
    /// Parts that the mirror has been fed and that haven't ended.
    parts: u32,
    primary: Primary,
    /// It was taken before the window of a resynchronisation that waits for it.
    is_awaited: bool,
}

/// The primary's command of a pair.
#[derive(Debug)]
enum Primary {
    /// There is no such pair.
    Free,
    InFlight,
    Ended(Ended),
}

/// A run whose primary command has ended, and with what.
pub(crate) type Ended = (FolioRun, Option<Error>);

/// The pairs of one shard.
#[derive(Debug)]
pub(crate) struct Streams {
    pairs: Box<[Pair]>,
    free: Vec<u32>,
    /// Pairs that aren't fed whole, oldest first.
    line: VecDeque<u32>,
    /// Pages that passes took.
    taken: u64,
    /// Pages in the line.
    unfed: u64,
    /// Runs all of whose streams have ended, for the shard to end their folios' writeback.
    pub finished: Vec<Ended>,
    /// Pairs that the window of a resynchronisation waits for.
    awaited: u32,
    /// Frames' lists that aren't needed any more.
    pub unused: Vec<FolioRun>,
}

impl Streams {
    /// For at most `count` runs under way.
    pub(crate) fn new(count: usize) -> Self {
        let pair = |_| Pair {
            mapping: 0,
            pages: 0..0,
            unfed: None,
            parts: 0,
            primary: Primary::Free,
            is_awaited: false,
        };
        Self {
            pairs: (0..count).map(pair).collect(),
            free: (0..count as u32).rev().collect(),
            line: VecDeque::with_capacity(count),
            taken: 0,
            unfed: 0,
            finished: Vec::with_capacity(count),
            awaited: 0,
            unused: Vec::with_capacity(count),
        }
    }

    /// Whether another run can be begun.
    #[inline]
    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// A run that the primary is about to be fed; `copy` is what the mirror gets, if it is fed.
    pub(crate) fn begin(&mut self, mapping: u16, pages: Range<u64>, copy: Option<FolioRun>) -> PairId {
        let at = self.free.pop().expect("a run of a mirrored mapping begins where there is room");
        self.taken += pages.end - pages.start;
        if copy.is_some() {
            self.line.push_back(at);
            self.unfed += pages.end - pages.start;
        }
        self.pairs[at as usize] = Pair {
            mapping,
            unfed: copy.map(|copy| (pages.start, copy)),
            pages,
            parts: 0,
            primary: Primary::InFlight,
            is_awaited: false,
        };
        PairId(at)
    }

    /// The primary refused the run that was begun last: there is no pair.
    pub(crate) fn withdraw(&mut self, pair: PairId) {
        self.drop_unfed_of(pair.0);
        self.pairs[pair.0 as usize].primary = Primary::Free;
        self.free.push(pair.0);
    }

    /// Which stream is fed next, if `own_pages` of what was taken last wait for the primary: the one that is further
    /// behind of those that have room.
    pub(crate) fn next(&self, own_pages: u64, mirror_has_room: bool) -> Option<StreamId> {
        let (primary, mirror) = (self.taken - own_pages, self.taken - self.unfed);
        let mirror_waits = self.unfed > 0 && mirror_has_room;
        match own_pages > 0 {
            true if mirror_waits && mirror < primary => Some(StreamId::Mirror),
            true => Some(StreamId::Primary),
            false => mirror_waits.then_some(StreamId::Mirror),
        }
    }

    /// The oldest pair that the mirror lacks pages of, that `may` be fed: its mapping, what is left of it, and its
    /// frames.
    pub(crate) fn oldest_unfed(
        &self,
        mut may: impl FnMut(u16, &Range<u64>, bool) -> bool,
    ) -> Option<(PairId, u16, Range<u64>, &FolioRun)> {
        self.line.iter().find_map(|&at| {
            let pair = &self.pairs[at as usize];
            let (first, run) = pair.unfed.as_ref()?;
            may(pair.mapping, &pair.pages, pair.is_awaited).then_some((
                PairId(at),
                pair.mapping,
                *first..pair.pages.end,
                run,
            ))
        })
    }

    /// The mirror was fed a part, up to page `end`.
    pub(crate) fn fed(&mut self, pair: PairId, end: u64) {
        let entry = &mut self.pairs[pair.0 as usize];
        entry.parts += 1;
        let Some((first, _)) = &mut entry.unfed else { return };
        self.unfed -= end - *first;
        *first = end;
        if end == entry.pages.end {
            self.unused.extend(entry.unfed.take().map(|(_, run)| run));
            self.line.retain(|&at| at != pair.0);
        }
    }

    /// What this pair's mirror part lacks isn't fed any more: the mirror is degraded.
    pub(crate) fn drop_unfed(&mut self, pair: PairId) {
        self.drop_unfed_of(pair.0);
        self.finish(pair.0);
    }

    /// As [`drop_unfed`](Self::drop_unfed), of all pairs whose mapping is `gone`.
    pub(crate) fn drop_all_unfed(&mut self, gone: impl Fn(u16) -> bool) {
        for at in 0..self.pairs.len() as u32 {
            let pair = &self.pairs[at as usize];
            if pair.unfed.is_some() && gone(pair.mapping) {
                self.drop_unfed(PairId(at));
            }
        }
    }

    fn drop_unfed_of(&mut self, at: u32) {
        let pair = &mut self.pairs[at as usize];
        if let Some((first, run)) = pair.unfed.take() {
            self.unfed -= pair.pages.end - first;
            self.unused.push(run);
            self.line.retain(|&other| other != at);
        }
    }

    /// A part has ended.
    pub(crate) fn part_ended(&mut self, pair: PairId) {
        self.pairs[pair.0 as usize].parts -= 1;
        self.finish(pair.0);
    }

    /// The mirror's queue is gone, and no part comes back.
    pub(crate) fn end_all_parts(&mut self) {
        for at in 0..self.pairs.len() as u32 {
            if !matches!(self.pairs[at as usize].primary, Primary::Free) {
                self.pairs[at as usize].parts = 0;
                self.finish(at);
            }
        }
    }

    /// The primary's command has ended.
    pub(crate) fn primary_ended(&mut self, run: FolioRun, error: Option<Error>) {
        let at = run.pair.0;
        self.pairs[at as usize].primary = Primary::Ended((run, error));
        self.finish(at);
    }

    /// Ends the pair if both its streams have ended.
    fn finish(&mut self, at: u32) {
        let pair = &mut self.pairs[at as usize];
        if pair.parts > 0 || pair.unfed.is_some() || !matches!(pair.primary, Primary::Ended(_)) {
            return;
        }
        let Primary::Ended(ended) = std::mem::replace(&mut pair.primary, Primary::Free) else { return };
        self.awaited -= u32::from(std::mem::take(&mut pair.is_awaited));
        self.free.push(at);
        self.finished.push(ended);
    }

    /// A resynchronisation is about to copy these pages: it waits for the pairs among them that are under way now.
    pub(crate) fn announce(&mut self, mapping: u16, pages: &Range<u64>) {
        debug_assert_eq!(self.awaited, 0, "one window at a time");
        for pair in &mut self.pairs {
            let overlaps = pair.pages.start < pages.end && pages.start < pair.pages.end;
            if !matches!(pair.primary, Primary::Free) && pair.mapping == mapping && overlaps {
                pair.is_awaited = true;
                self.awaited += 1;
            }
        }
    }

    /// Whether those pairs have ended.
    pub(crate) fn is_announced_over(&self) -> bool {
        self.awaited == 0
    }

    /// The window was given up: nothing is waited for.
    pub(crate) fn renounce(&mut self) {
        self.pairs.iter_mut().for_each(|pair| pair.is_awaited = false);
        self.awaited = 0;
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn wb15_the_stream_furthest_behind_is_fed_first_if_it_has_room() {
        let mut streams = Streams::new(4);
        // Eight pages that both lack: the primary leads.
        streams.taken = 8;
        streams.unfed = 8;
        assert_eq!(streams.next(8, true), Some(StreamId::Primary), "neither is behind");
        assert_eq!(streams.next(0, true), Some(StreamId::Mirror));
        assert_eq!(streams.next(0, false), None, "its queue is full");
        // Four more are taken while the mirror still lacks two of the first eight.
        streams.taken = 12;
        streams.unfed = 6;
        assert_eq!(streams.next(4, true), Some(StreamId::Mirror), "the mirror is at 6, the primary at 8");
        assert_eq!(streams.next(4, false), Some(StreamId::Primary), "nobody waits for who has no room");
        streams.unfed = 4;
        assert_eq!(streams.next(4, true), Some(StreamId::Primary));
        streams.unfed = 0;
        assert_eq!(streams.next(0, true), None);
    }
}
