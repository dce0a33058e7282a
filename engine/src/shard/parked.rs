//! Which requests wait for which folio: the parked lists.
//!
//! Few folios have a list at any time, so it isn't the header of every frame that names the first entry. The lists hang in
//! a small table by the folio's head instead; those whose hashes agree share a chain, in which each list keeps its order.
//! Everything is allocated at open.

use crate::cache::folio::{FrameId, NONE};
use crate::reply::{GRANTS_MAX, SlotId};

/// Chains are a power of two, one for so many entries: seldom more than one of a request's waits at a time.
const ENTRIES_A_CHAIN: usize = 8;

/// A request that waits for a folio.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parked {
    pub slot: SlotId,
    /// Which page of the request waits here.
    pub position: u8,
    /// The folio's head.
    head: FrameId,
    next: u32,
}

/// The entries of all parked lists: a fixed slab, linked by index.
#[derive(Debug)]
pub(crate) struct ParkedLists {
    entries: Box<[Parked]>,
    chains: Box<[u32]>,
    free: u32,
}

impl ParkedLists {
    /// Room for every page of every request that can be in service.
    pub(crate) fn new(requests: usize) -> Self {
        let count = requests * GRANTS_MAX;
        let entry = |index: usize| Parked {
            slot: SlotId(0),
            position: 0,
            head: FrameId(NONE),
            next: if index + 1 == count { NONE } else { index as u32 + 1 },
        };
        let chains = (count / ENTRIES_A_CHAIN).next_power_of_two();
        Self { entries: (0..count).map(entry).collect(), chains: vec![NONE; chains].into(), free: 0 }
    }

    fn chain(&self, head: FrameId) -> usize {
        // Fibonacci hashing: the upper bits of the product are well mixed.
        let hash = u64::from(head.0).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (hash >> 32) as usize & (self.chains.len() - 1)
    }

    /// The entry behind `before`, or the chain's first.
    fn after(&self, chain: usize, before: u32) -> u32 {
        if before == NONE { self.chains[chain] } else { self.entries[before as usize].next }
    }

    /// The place in front of the first entry of the folio's list that `is_wanted`, or of the chain's end.
    fn seek(&self, head: FrameId, is_wanted: impl Fn(&Parked) -> bool) -> (u32, u32) {
        let (chain, mut before) = (self.chain(head), NONE);
        loop {
            let at = self.after(chain, before);
            let found = |entry: &Parked| entry.head == head && is_wanted(entry);
            if self.entries.get(at as usize).is_none_or(found) {
                return (before, at);
            }
            before = at;
        }
    }

    fn link(&mut self, head: FrameId, before: u32, next: u32) {
        let chain = self.chain(head);
        match before {
            NONE => self.chains[chain] = next,
            before => self.entries[before as usize].next = next,
        }
    }

    /// Appends a page of a request to a folio's list.
    pub(super) fn park(&mut self, head: FrameId, slot: SlotId, position: usize) {
        let index = self.free;
        assert_ne!(index, NONE, "parked entries are bounded by requests times pages");
        self.free = self.entries[index as usize].next;
        self.entries[index as usize] = Parked { slot, position: position as u8, head, next: NONE };
        let (last, _) = self.seek(FrameId(head.0), |_| false);
        self.link(head, last, index);
    }

    /// The first who waits for a folio.
    pub(super) fn first(&self, head: FrameId) -> Option<Parked> {
        let (_, at) = self.seek(head, |_| true);
        self.entries.get(at as usize).copied()
    }

    /// All requests that wait for a folio, in their order; one of several pages as often as it does.
    pub(super) fn waiters(&self, head: FrameId) -> impl Iterator<Item = SlotId> {
        let mut at = self.chains[self.chain(head)];
        std::iter::from_fn(move || {
            let entry = self.entries.get(at as usize)?;
            at = entry.next;
            Some(entry)
        })
        .filter(move |entry| entry.head == head)
        .map(|entry| entry.slot)
    }

    /// Takes the first off a folio's list.
    pub(super) fn unpark(&mut self, head: FrameId) -> Option<Parked> {
        self.take(head, |_| true)
    }

    /// Takes a request's first entry off a folio's list.
    pub(super) fn unpark_slot(&mut self, head: FrameId, slot: SlotId) -> Option<Parked> {
        self.take(head, |entry| entry.slot == slot)
    }

    /// Takes the only entry off a folio's list, if it is the only one and `suits`.
    pub(super) fn unpark_only(
        &mut self,
        head: FrameId,
        suits: impl FnOnce(SlotId) -> bool,
    ) -> Option<Parked> {
        let (before, at) = self.seek(head, |_| true);
        let parked = *self.entries.get(at as usize)?;
        let mut next = parked.next;
        while let Some(entry) = self.entries.get(next as usize) {
            if entry.head == head {
                return None;
            }
            next = entry.next;
        }
        suits(parked.slot).then(|| self.unlink(head, before, at))
    }

    /// Takes the entry at `at`, behind `before`, out of its chain.
    fn unlink(&mut self, head: FrameId, before: u32, at: u32) -> Parked {
        let parked = self.entries[at as usize];
        self.link(head, before, parked.next);
        self.entries[at as usize].next = self.free;
        self.free = at;
        parked
    }

    fn take(&mut self, head: FrameId, is_wanted: impl Fn(&Parked) -> bool) -> Option<Parked> {
        let (before, at) = self.seek(head, is_wanted);
        ((at as usize) < self.entries.len()).then(|| self.unlink(head, before, at))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_folios_list_keeps_its_order(steps in prop::collection::vec((0u32..40, 0u8..5), 1..300)) {
            let mut lists = ParkedLists::new(2);
            let mut model: Vec<(u32, u32)> = Vec::new();
            for (number, (head, action)) in steps.into_iter().enumerate() {
                let (frame, slot) = (FrameId(head), SlotId(number as u32));
                let first = model.iter().position(|entry| entry.0 == head);
                match action {
                    0 | 1 if model.len() < 2 * GRANTS_MAX => {
                        lists.park(frame, slot, 7);
                        model.push((head, slot.0));
                    }
                    3 => {
                        let only = model.iter().filter(|entry| entry.0 == head).count() == 1;
                        prop_assert!(lists.unpark_only(frame, |_| false).is_none());
                        let wanted = first.filter(|_| only).map(|at| model.remove(at).1);
                        let taken = lists.unpark_only(frame, |slot| Some(slot.0) == wanted);
                        prop_assert_eq!(taken.map(|entry| entry.slot.0), wanted);
                    }
                    2 if first.is_some() => {
                        // The last of them, out of the middle of a chain.
                        let last = model.iter().rposition(|entry| entry.0 == head).unwrap();
                        let (_, wanted) = model.remove(last);
                        prop_assert_eq!(lists.unpark_slot(frame, SlotId(wanted)).unwrap().slot.0, wanted);
                        prop_assert!(lists.unpark_slot(frame, SlotId(wanted)).is_none());
                    }
                    _ => {
                        let all = model.iter().filter(|entry| entry.0 == head).map(|entry| entry.1);
                        prop_assert!(lists.waiters(frame).map(|slot| slot.0).eq(all));
                        let wanted = first.map(|at| model.remove(at).1);
                        prop_assert_eq!(lists.first(frame).map(|entry| entry.slot.0), wanted);
                        prop_assert_eq!(lists.unpark(frame).map(|entry| entry.slot.0), wanted);
                    }
                }
            }
        }
    }
}
