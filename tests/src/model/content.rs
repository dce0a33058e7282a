//! The plain model: what a page may read as, and what the medium may hold of it.
//!
//! A page has *versions*, numbered from the last start of the engine. Each is in up to three roles:
//!
//! - **visible**: what the engine may return now. Usually one; more while changes are in flight, or after one that
//!   ended nobody knows where. A read settles which it is.
//! - **on the medium, perhaps**: everything that was visible since the last sync that succeeded, and what that sync
//!   promised. A power cut picks one, for each atomic unit by itself.
//! - **in flight**: changes that have begun and not ended may be made at any moment in between, each page at once.

use std::ops::Range;
use std::rc::Rc;

use super::logged::Stamp;

/// Names an operation.
pub type OpId = u32;

/// Counts what happens in a run, so that one thing can be told to have come after another.
pub type Moment = u64;

/// Bytes of which it is known when they were written.
pub const SECTOR: u64 = 512;

/// Changes of one page that may be in flight at once: the orders that they can take effect in are all kept.
pub const CHANGES_MAX: usize = 3;

/// Contents that a page may have while nothing changes it: each change that ends nobody knows where doubles them.
pub const CONTENTS_MAX: usize = 6;

/// Versions that a page had, or may have had, at some time.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    visible: Vec<u32>,
    next: u32,
}

impl Snapshot {
    /// Whether `version` was visible then, or came later.
    fn covers(&self, version: u32) -> bool {
        version >= self.next || self.visible.contains(&version)
    }
}

/// A version that may be the newest, and the changes in flight that it contains.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    version: u32,
    made: Vec<OpId>,
}

/// Whether a page is poisoned: that it fails again is no event of its own then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Poisoned {
    /// It isn't.
    No,
    /// It was, and a discard may have ended that.
    Perhaps,
    /// It is.
    Yes,
}

/// A change in flight.
#[derive(Clone, Debug)]
struct Change {
    op: OpId,
    within: usize,
    data: Rc<[u8]>,
}

/// One page.
#[derive(Clone, Debug)]
pub struct Page {
    versions: Vec<Rc<[u8]>>,
    visible: Vec<Candidate>,
    medium: Vec<u32>,
    changes: Vec<Change>,
    /// The exclusive pin that holds it.
    pub held: Option<OpId>,
    /// When it was last changed perhaps.
    pub touched: Moment,
    /// When the last change began that was surely made.
    pub changed: Moment,
    /// When the last successful write of each of its sectors began.
    pub written: Vec<Moment>,
    /// The same where that was zeroes: several discards of a page may be with the device at once.
    zeroed: Vec<Moment>,
    /// When the last successful write of each of its sectors completed that may have stopped at the device's write
    /// cache; 0 where that was overtaken by one with FUA.
    pub cached: Vec<Moment>,
    /// When a write of it last failed.
    pub write_failed: Moment,
    /// Whether a write of it failed for good, and none has succeeded since.
    pub poisoned: Poisoned,
    /// What it was surely stamped with since the engine was started, until a discard began.
    pub stamps: Vec<Stamp>,
    /// The newest number that it may have been stamped with.
    pub newest_lsn: u64,
    /// The oldest number that it may have been stamped with since it was surely written; 0 for none.
    pub oldest_lsn: u64,
    /// Discards of it in flight.
    discards: Vec<OpId>,
    /// When the last one ended.
    discard_ended: Moment,
    /// It was discarded, and nothing has begun to change it since.
    pub discarded: bool,
}

/// What a successful write consisted of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrote {
    /// The page's bytes.
    Bytes,
    /// Zeroes that the device made: Write Zeroes.
    Zeroes,
}

impl Page {
    /// A page that holds `bytes`, on the medium too.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        let sectors = bytes.len().div_ceil(SECTOR as usize);
        Self {
            versions: vec![bytes.into()],
            visible: vec![Candidate { version: 0, made: Vec::new() }],
            medium: vec![0],
            changes: Vec::new(),
            held: None,
            touched: 0,
            changed: 0,
            written: vec![0; sectors],
            zeroed: vec![0; sectors],
            cached: vec![0; sectors],
            write_failed: 0,
            poisoned: Poisoned::No,
            stamps: Vec::new(),
            newest_lsn: 0,
            oldest_lsn: 0,
            discards: Vec::new(),
            discard_ended: 0,
            discarded: false,
        }
    }

    /// The engine was started anew and reads `bytes`; what the medium may hold stays as open as it was.
    pub fn restarted(&mut self, bytes: &[u8]) {
        self.changes.clear();
        self.discards.clear();
        let version = self.push(bytes.into());
        self.visible = vec![Candidate { version, made: Vec::new() }];
        self.held = None;
        (self.touched, self.changed, self.write_failed) = (0, 0, 0);
        self.written.fill(0);
        self.zeroed.fill(0);
        self.poisoned = Poisoned::No;
        self.stamps.clear();
        (self.newest_lsn, self.oldest_lsn) = (0, 0);
        self.discarded = false;
    }

    /// Whether something is in flight that may change it.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        !self.changes.is_empty() || self.held.is_some()
    }

    /// When the last write of it completed that the device's write cache may still hold; 0 if there is none.
    #[must_use]
    pub fn cached_at(&self) -> Moment {
        self.cached.iter().copied().max().unwrap_or(0)
    }

    /// Whether one more change may be in flight.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.changes.len() < CHANGES_MAX
    }

    /// Whether so many contents are possible that it should be read before more are.
    #[must_use]
    pub fn is_vague(&self) -> bool {
        self.changes.is_empty() && self.visible.len() > CONTENTS_MAX || self.visible.len() > 16 * CONTENTS_MAX
    }

    /// What it may have been from now on.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let mut visible: Vec<u32> = self.visible.iter().map(|candidate| candidate.version).collect();
        visible.sort_unstable();
        visible.dedup();
        Snapshot { visible, next: self.versions.len() as u32 }
    }

    /// A change begins.
    pub fn begin(&mut self, op: OpId, within: usize, data: &[u8], now: Moment) {
        self.changes.push(Change { op, within, data: data.into() });
        self.discarded = false;
        self.touched = now;
        self.close();
    }

    /// The change that has just begun is a discard.
    pub fn begin_discard(&mut self, op: OpId) {
        self.discards.push(op);
        self.stamps.clear();
        // Where its folio goes, so does that mark.
        self.poisoned = self.poisoned.min(Poisoned::Perhaps);
    }

    /// Whether a discard of it has been in flight since then. Its folio may have gone, and with it what was changed,
    /// before the device has zeroed it: a sync beside a discard promises neither.
    #[must_use]
    pub fn was_discarding(&self, since: Moment) -> bool {
        !self.discards.is_empty() || self.discard_ended > since
    }

    /// A change ended. With `began` it was surely made, at that moment or later; else nobody knows whether it was.
    pub fn end(&mut self, op: OpId, began: Option<Moment>, now: Moment) {
        if let Some(began) = began {
            self.visible.retain(|candidate| candidate.made.contains(&op));
            assert!(!self.visible.is_empty(), "a change in flight is always among what may be visible");
            self.changed = self.changed.max(began);
        }
        if let Some(at) = self.discards.iter().position(|&discard| discard == op) {
            self.discards.remove(at);
            self.poisoned = self.poisoned.min(Poisoned::Perhaps);
            self.stamps.clear();
            self.discard_ended = now;
        }
        self.touched = now;
        self.changes.retain(|change| change.op != op);
        self.visible.iter_mut().for_each(|candidate| candidate.made.retain(|&made| made != op));
        self.visible.sort_unstable();
        self.visible.dedup();
    }

    /// A change is made now, at once, by its exclusive holder.
    pub fn change(&mut self, within: usize, data: &[u8], now: Moment) {
        let changed: Vec<(Rc<[u8]>, Vec<OpId>)> = self
            .visible
            .iter()
            .map(|candidate| (patched(self.bytes(candidate.version), within, data), candidate.made.clone()))
            .collect();
        self.visible.clear();
        for (bytes, made) in changed {
            let version = self.number_of(bytes);
            self.visible.push(Candidate { version, made });
        }
        (self.touched, self.changed) = (now, now);
        self.discarded = false;
        self.close();
    }

    /// A discard of it didn't end well: what was changed may be gone, so nothing is sure to be written.
    pub fn thrown_away(&mut self) {
        self.changed = 0;
    }

    /// From now on it may read as `bytes`, too: the discards that `is_to_come` names have taken its folio, and the device has those
    /// bytes. Any other change that is in flight may have been made before, and gone with the folio.
    pub fn may_read_as(&mut self, bytes: &[u8], is_to_come: impl Fn(OpId) -> bool) {
        let version = self.number_of(bytes.into());
        let mut gone = vec![Vec::new()];
        for change in self.changes.iter().filter(|change| !is_to_come(change.op)) {
            let with_it = gone.clone().into_iter().map(|mut made: Vec<OpId>| {
                made.push(change.op);
                made.sort_unstable();
                made
            });
            gone.extend(with_it);
        }
        for made in gone {
            let candidate = Candidate { version, made };
            if !self.visible.contains(&candidate) {
                self.visible.push(candidate);
            }
        }
        self.close();
    }

    /// It reads as `bytes` from `within` on, at this moment. False when it can't.
    pub fn saw(&mut self, within: usize, bytes: &[u8]) -> bool {
        let versions = &self.versions;
        self.visible.retain(|candidate| versions[candidate.version as usize][within..].starts_with(bytes));
        let possible = !self.visible.is_empty();
        self.close();
        possible
    }

    /// Whether it may have read as `bytes` from `within` on, at some time since `since`.
    #[must_use]
    pub fn may_have_been(&self, since: &Snapshot, within: usize, bytes: &[u8]) -> bool {
        let matches = |version: u32| self.bytes(version)[within..].starts_with(bytes);
        (0..self.versions.len() as u32).any(|version| since.covers(version) && matches(version))
    }

    /// A sync that began at `since` has succeeded.
    pub fn promise(&mut self, since: &Snapshot) {
        self.medium.retain(|&version| since.covers(version));
    }

    /// Whether the medium may hold `bytes`, each unit by itself.
    #[must_use]
    pub fn may_be_left(&self, bytes: &[u8], unit_bytes: usize) -> bool {
        bytes.chunks(unit_bytes).enumerate().all(|(unit, bytes)| {
            let at = unit * unit_bytes;
            self.medium.iter().any(|&version| self.bytes(version)[at..at + bytes.len()] == *bytes)
        })
    }

    /// How many contents the medium may hold.
    #[must_use]
    pub fn medium_versions(&self) -> usize {
        self.medium.len()
    }

    /// A write of these sectors has succeeded that began at `started`; at `cached` it came to the device's write cache.
    pub fn wrote(&mut self, what: Wrote, sectors: Range<usize>, started: Moment, cached: Moment) {
        for sector in sectors.clone() {
            let (written, zeroed) = (&mut self.written[sector], &mut self.zeroed[sector]);
            match what {
                // Of two zeroes it doesn't matter which is carried out last.
                Wrote::Zeroes if written == zeroed => *written = started.max(*written),
                _ => *written = started,
            }
            if what == Wrote::Zeroes {
                *zeroed = *written;
            }
        }
        self.cached[sectors].fill(cached);
        let (oldest, cached) = (self.oldest_write(), self.cached_at());
        for stamp in self.stamps.iter_mut().filter(|stamp| stamp.began < oldest) {
            stamp.written.get_or_insert(cached);
        }
        if self.is_clean() {
            self.oldest_lsn = 0;
        }
        // All of it, if it takes several commands.
        if self.oldest_write() > self.write_failed {
            self.poisoned = Poisoned::No;
        }
    }

    /// Whether a discard of it is in flight.
    #[must_use]
    pub fn is_discarding(&self) -> bool {
        !self.discards.is_empty()
    }

    /// Whether a write that covers all that was changed has surely completed.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        !self.is_busy() && (self.touched == 0 || self.oldest_write() > self.touched)
    }

    /// When the oldest began of the last successful writes of its parts.
    #[must_use]
    pub fn oldest_write(&self) -> Moment {
        self.written.iter().copied().min().unwrap_or(0)
    }

    fn bytes(&self, version: u32) -> &[u8] {
        &self.versions[version as usize]
    }

    /// The number of a version that holds `bytes`: a new one, unless it is visible now. (One that is visible no longer
    /// is another version when it comes again: older snapshots must not take it for the old one.)
    fn number_of(&mut self, bytes: Rc<[u8]>) -> u32 {
        let mut visible = self.visible.iter().map(|candidate| candidate.version);
        visible.find(|&version| *self.bytes(version) == *bytes).unwrap_or_else(|| self.push(bytes))
    }

    fn push(&mut self, bytes: Rc<[u8]>) -> u32 {
        let version = self.versions.len() as u32;
        self.versions.push(bytes);
        self.medium.push(version);
        version
    }

    /// Adds what the changes in flight may make of what may be visible, in any order.
    fn close(&mut self) {
        let mut at = 0;
        while at < self.visible.len() {
            for change in 0..self.changes.len() {
                let Change { op, within, data } = self.changes[change].clone();
                let Candidate { version, mut made } = self.visible[at].clone();
                let version = self.number_of(patched(self.bytes(version), within, &data));
                if let Err(place) = made.binary_search(&op) {
                    made.insert(place, op);
                }
                let made = Candidate { version, made };
                if !self.visible.contains(&made) {
                    self.visible.push(made);
                }
            }
            at += 1;
        }
    }
}

fn patched(bytes: &[u8], within: usize, data: &[u8]) -> Rc<[u8]> {
    let mut bytes: Rc<[u8]> = bytes.into();
    if let Some(bytes) = Rc::get_mut(&mut bytes) {
        bytes[within..within + data.len()].copy_from_slice(data);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Page {
        Page::new(&[0; 1024])
    }

    #[test]
    fn a_change_in_flight_may_be_seen_or_not_and_a_read_settles_it_only_one_way() {
        let mut page = page();
        page.begin(1, 10, &[7; 4], 1);
        assert!(page.clone().saw(10, &[0; 4]), "not yet");
        assert!(page.saw(10, &[7; 4]), "made");
        assert!(!page.clone().saw(10, &[0; 4]), "it can't be undone");
        page.end(1, Some(1), 2);
        assert!(page.saw(8, &[0, 0, 7, 7, 7, 7, 0]));
    }

    #[test]
    fn changes_in_flight_take_effect_in_any_order() {
        let mut page = page();
        page.begin(1, 0, &[1; 4], 1);
        page.begin(2, 2, &[2; 4], 2);
        page.end(1, Some(1), 3);
        page.end(2, Some(2), 4);
        assert!(page.clone().saw(0, &[1, 1, 1, 1, 2, 2, 0]));
        assert!(page.clone().saw(0, &[1, 1, 2, 2, 2, 2, 0]));
        assert!(!page.clone().saw(0, &[1, 1, 1, 1, 0, 0, 0]));
    }

    #[test]
    fn a_promise_leaves_what_was_visible_then_and_what_came_later() {
        let mut page = page();
        let write = |page: &mut Page, op, byte| {
            page.begin(op, 0, &[byte; 1024], u64::from(op));
            page.end(op, Some(u64::from(op)), u64::from(op));
        };
        write(&mut page, 1, 1);
        write(&mut page, 2, 2);
        let sync = page.snapshot();
        write(&mut page, 3, 3);
        assert!(page.may_be_left(&[0; 1024], 512) && page.may_be_left(&[1; 1024], 512));
        page.promise(&sync);
        assert!(!page.may_be_left(&[0; 1024], 512) && !page.may_be_left(&[1; 1024], 512));
        assert!(page.may_be_left(&[2; 1024], 512) && page.may_be_left(&[3; 1024], 512));
        let mut mixed = [2; 1024];
        mixed[512..].fill(3);
        assert!(page.may_be_left(&mixed, 512), "each unit by itself");
        assert!(!page.may_be_left(&mixed, 1024), "never a mix within one");
    }

    #[test]
    fn a_change_that_ended_nobody_knows_where_leaves_both() {
        let mut page = page();
        page.begin(1, 0, &[1; 4], 1);
        page.end(1, None, 2);
        assert!(page.clone().saw(0, &[1; 4]) && page.clone().saw(0, &[0; 4]));
        assert!(!page.clone().saw(0, &[1, 1, 0, 0]));
    }
}
