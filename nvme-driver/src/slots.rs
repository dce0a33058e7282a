//! The command table of a queue pair: who waits for which command identifier.
//!
//! Its size is fixed. A request occupies one slot a command; the first of them, the **parent**, also holds the
//! payload, counts the commands left and keeps the first failure. The parent's slot stays occupied until the
//! request's last command has completed; the others are free again as soon as their own has.
//!
//! ```text
//!  bit  15        12 11                     0
//!       | generation |  slot index            |   command identifier
//! ```
//!
//! The generation changes each time a slot is freed, so a completion that comes twice is recognised even when
//! the slot has been taken again. Slot indices stay below 0FFFh, so no identifier is FFFFh, which the error log
//! reserves (Base section 4.1).

use foliant_nvme_spec::Status;

const INDEX_BITS: u32 = 12;
const INDEX_MASK: u16 = (1 << INDEX_BITS) - 1;
const GENERATION_STEP: u16 = 1 << INDEX_BITS;

/// The most slots a table has.
pub(crate) const SLOTS_MAX: u16 = INDEX_MASK;

/// Link of the last free slot.
const NONE: u16 = u16::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// On the free list; `link` is the next free slot.
    Free,
    /// Its command is outstanding; `link` is the parent.
    Issued,
    /// A parent whose own command has completed while others of its request are outstanding.
    Settled,
}

struct Slot<P> {
    /// The identifier of the command in this slot, or of the next one while it's free.
    cid: u16,
    link: u16,
    /// In a parent: commands of its request that are outstanding.
    outstanding: u16,
    state: State,
    /// In a parent: the first failure, or success.
    status: Status,
    /// In a parent: what comes back with the completion.
    payload: Option<P>,
}

/// A command identifier that isn't outstanding: never issued, or completed already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotOutstanding;

/// The command table.
///
/// Invariant: `free` slots are on the list that starts at `first_free`, most recently freed first, so that the
/// same few cache lines are used again.
pub(crate) struct Slots<P> {
    slots: Box<[Slot<P>]>,
    first_free: u16,
    free: u16,
}

impl<P> Slots<P> {
    /// A table of `count` free slots.
    ///
    /// # Panics
    /// When `count` is 0 or more than [`SLOTS_MAX`].
    pub(crate) fn new(count: u16) -> Self {
        assert!((1..=SLOTS_MAX).contains(&count), "{count} slots asked for, 1 to {SLOTS_MAX} are possible");
        let slots = (0..count)
            .map(|index| Slot {
                cid: index,
                link: if index + 1 == count { NONE } else { index + 1 },
                outstanding: 0,
                state: State::Free,
                status: Status::SUCCESS,
                payload: None,
            })
            .collect();
        Self { slots, first_free: 0, free: count }
    }

    pub(crate) fn len(&self) -> u32 {
        self.slots.len() as u32
    }

    pub(crate) fn free(&self) -> u32 {
        u32::from(self.free)
    }

    /// The slot that [`issue`](Self::issue) takes next; `None` when all are taken.
    #[inline]
    pub(crate) fn next(&self) -> Option<u16> {
        (self.first_free != NONE).then_some(self.first_free)
    }

    /// Takes the [`next`](Self::next) slot, `index`, for a command of the request of `parent`, which is `index`
    /// itself for a request's first command. Returns the command identifier.
    #[inline]
    pub(crate) fn issue(&mut self, index: u16, parent: u16) -> u16 {
        debug_assert_eq!(self.first_free, index);
        let slot = &mut self.slots[usize::from(index)];
        self.first_free = slot.link;
        self.free -= 1;
        slot.link = parent;
        slot.state = State::Issued;
        slot.cid
    }

    /// Completes the issue of a request: its `commands` commands are outstanding, and `payload` comes back
    /// after the last of them.
    #[inline]
    pub(crate) fn begin(&mut self, parent: u16, commands: u16, payload: P) {
        let slot = &mut self.slots[usize::from(parent)];
        slot.outstanding = commands;
        slot.status = Status::SUCCESS;
        slot.payload = Some(payload);
    }

    /// Frees every slot issued for `parent`, whose request wasn't begun and whose commands the device never saw.
    #[cold]
    pub(crate) fn withdraw(&mut self, parent: u16) {
        for index in 0..self.slots.len() as u16 {
            let slot = &self.slots[usize::from(index)];
            if slot.state == State::Issued && slot.link == parent {
                self.release(index);
            }
        }
    }

    /// Settles the command `cid` with the device's answer. Hands the payload and the request's status to `ended`
    /// when it was the last command of its request.
    // Inlined for certain: `ended` then takes the payload straight out of the slot.
    #[inline(always)]
    pub(crate) fn settle(
        &mut self,
        cid: u16,
        status: Status,
        ended: impl FnOnce(P, Status),
    ) -> Result<(), NotOutstanding> {
        let index = cid & INDEX_MASK;
        let slot = self.slots.get_mut(usize::from(index)).ok_or(NotOutstanding)?;
        if slot.cid != cid || slot.state != State::Issued {
            return Err(NotOutstanding);
        }
        if slot.link == index && slot.outstanding == 1 {
            let status = if slot.status.is_success() { status } else { slot.status };
            let payload = slot.payload.take();
            self.release(index);
            if let Some(payload) = payload {
                ended(payload, status);
            }
        } else if let Some((payload, status)) = self.settle_part(index, status) {
            ended(payload, status);
        }
        Ok(())
    }

    /// Settles one of several commands of a request; returns what [`settle`](Self::settle) hands out.
    #[inline(never)]
    fn settle_part(&mut self, index: u16, status: Status) -> Option<(P, Status)> {
        let slot = &mut self.slots[usize::from(index)];
        let parent = slot.link;
        if parent == index {
            slot.state = State::Settled;
        } else {
            self.release(index);
        }
        let slot = &mut self.slots[usize::from(parent)];
        slot.outstanding -= 1;
        if slot.status.is_success() {
            slot.status = status;
        }
        if slot.outstanding > 0 {
            return None;
        }
        let (payload, status) = (slot.payload.take(), slot.status);
        self.release(parent);
        payload.map(|payload| (payload, status))
    }

    /// Takes every payload out of the table, whose commands the device no longer knows.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = P> + '_ {
        self.slots.iter_mut().filter_map(|slot| slot.payload.take())
    }

    #[inline]
    fn release(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        slot.cid = slot.cid.wrapping_add(GENERATION_STEP);
        slot.state = State::Free;
        slot.link = self.first_free;
        self.first_free = index;
        self.free += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use foliant_nvme_spec::StatusCode;

    /// Settles a command; returns what comes back.
    fn settle(
        slots: &mut Slots<u32>,
        cid: u16,
        status: Status,
    ) -> Result<Option<(u32, Status)>, NotOutstanding> {
        let mut back = None;
        slots.settle(cid, status, |payload, status| back = Some((payload, status)))?;
        Ok(back)
    }

    fn issue_one(slots: &mut Slots<u32>, payload: u32) -> u16 {
        let index = slots.next().unwrap();
        let cid = slots.issue(index, index);
        slots.begin(index, 1, payload);
        cid
    }

    /// Issues a request of `count` commands; returns their identifiers.
    fn issue_many(slots: &mut Slots<u32>, count: u16, payload: u32) -> Vec<u16> {
        let parent = slots.next().unwrap();
        let cids = (0..count)
            .map(|_| {
                let index = slots.next().unwrap();
                slots.issue(index, parent)
            })
            .collect();
        slots.begin(parent, count, payload);
        cids
    }

    #[test]
    fn a_payload_comes_back_with_its_command() {
        let mut slots = Slots::new(4);
        let first = issue_one(&mut slots, 1);
        let second = issue_one(&mut slots, 2);
        assert_eq!(settle(&mut slots, second, Status::SUCCESS), Ok(Some((2, Status::SUCCESS))));
        assert_eq!(settle(&mut slots, first, Status::SUCCESS), Ok(Some((1, Status::SUCCESS))));
        assert_eq!(slots.free(), 4);
    }

    #[test]
    fn a_full_table_has_no_next_slot() {
        let mut slots = Slots::new(2);
        issue_many(&mut slots, 2, 0);
        assert_eq!(slots.next(), None);
    }

    #[test]
    fn an_identifier_out_of_bounds_is_not_outstanding() {
        let mut slots = Slots::new(4);
        assert_eq!(settle(&mut slots, 4, Status::SUCCESS), Err(NotOutstanding));
        assert_eq!(settle(&mut slots, 0xFFFF, Status::SUCCESS), Err(NotOutstanding));
    }

    #[test]
    fn an_identifier_never_issued_is_not_outstanding() {
        assert_eq!(settle(&mut Slots::new(4), 0, Status::SUCCESS), Err(NotOutstanding));
    }

    #[test]
    fn a_completion_that_comes_twice_is_recognised_after_the_slot_was_taken_again() {
        let mut slots = Slots::new(1);
        let stale = issue_one(&mut slots, 1);
        settle(&mut slots, stale, Status::SUCCESS).unwrap();
        let fresh = issue_one(&mut slots, 2);
        assert_ne!(stale, fresh);
        assert_eq!(settle(&mut slots, stale, Status::SUCCESS), Err(NotOutstanding));
        assert_eq!(settle(&mut slots, fresh, Status::SUCCESS), Ok(Some((2, Status::SUCCESS))));
    }

    #[test]
    fn a_parent_that_completes_twice_is_recognised_while_its_request_is_outstanding() {
        let mut slots = Slots::new(3);
        let cids = issue_many(&mut slots, 3, 9);
        assert_eq!(settle(&mut slots, cids[0], Status::SUCCESS), Ok(None));
        assert_eq!(settle(&mut slots, cids[0], Status::SUCCESS), Err(NotOutstanding));
    }

    #[test]
    fn a_split_request_comes_back_once_with_its_first_failure() {
        let (first, second) = (Status::of(StatusCode::WRITE_FAULT), Status::of(StatusCode::INTERNAL_ERROR));
        for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]] {
            let mut slots = Slots::new(3);
            let cids = issue_many(&mut slots, 3, 9);
            assert_eq!(settle(&mut slots, cids[order[0]], Status::SUCCESS), Ok(None));
            assert_eq!(settle(&mut slots, cids[order[1]], first), Ok(None));
            assert_eq!(settle(&mut slots, cids[order[2]], second), Ok(Some((9, first))));
            assert_eq!(slots.free(), 3);
        }
    }

    #[test]
    fn a_failure_before_the_parents_own_completion_is_kept() {
        let failure = Status::of(StatusCode::WRITE_FAULT);
        let mut slots = Slots::new(2);
        let cids = issue_many(&mut slots, 2, 9);
        assert_eq!(settle(&mut slots, cids[1], failure), Ok(None));
        assert_eq!(settle(&mut slots, cids[0], Status::SUCCESS), Ok(Some((9, failure))));
    }

    #[test]
    fn a_withdrawn_request_frees_its_slots_and_no_other() {
        let mut slots = Slots::new(4);
        let kept = issue_one(&mut slots, 1);
        let parent = slots.next().unwrap();
        for _ in 0..2 {
            let index = slots.next().unwrap();
            slots.issue(index, parent);
        }
        slots.withdraw(parent);
        assert_eq!(slots.free(), 3);
        assert_eq!(settle(&mut slots, kept, Status::SUCCESS), Ok(Some((1, Status::SUCCESS))));
    }

    #[test]
    fn no_identifier_is_the_reserved_one() {
        let mut slots = Slots::new(SLOTS_MAX);
        for _ in 0..16 {
            let cids = issue_many(&mut slots, SLOTS_MAX, 0);
            assert!(cids.iter().all(|&cid| cid != 0xFFFF));
            for cid in cids {
                settle(&mut slots, cid, Status::SUCCESS).unwrap();
            }
        }
    }
}
