//! Which reply slots are free: a stack, so that the one that is taken is the one whose memory was used last.
//!
//! One word has the stack's top, how many lie on it, and a tag that every change counts up, so that who has looked at the top and
//! the one below it doesn't take them for what they were when others have taken and returned slots meanwhile:
//!
//! ```text
//!   63                33 32            16 15             0
//!  ┌────────────────────┬────────────────┬────────────────┐
//!  │        tag         │ free slots     │ top            │
//!  └────────────────────┴────────────────┴────────────────┘
//! ```

use crate::primitives::{AtomicU32, AtomicU64, Ordering};

const INDEX_BITS: u32 = 16;
const COUNT_BITS: u32 = 17;
const INDEX: u64 = (1 << INDEX_BITS) - 1;
const COUNT: u64 = (1 << COUNT_BITS) - 1;

/// The most slots that a stack holds.
pub(crate) const SLOTS_MAX: usize = 1 << INDEX_BITS;

/// The free ones of a fixed number of slots. Any thread takes and returns; nobody waits for another.
#[derive(Debug)]
pub(crate) struct FreeSlots {
    top: AtomicU64,
    /// By slot: the one below it on the stack.
    below: Box<[AtomicU32]>,
}

fn pack(tag: u64, count: u64, top: u64) -> u64 {
    tag << (INDEX_BITS + COUNT_BITS) | count << INDEX_BITS | top
}

fn unpack(word: u64) -> (u64, u64, u64) {
    (word >> (INDEX_BITS + COUNT_BITS), word >> INDEX_BITS & COUNT, word & INDEX)
}

impl FreeSlots {
    /// `count` slots, all free.
    pub(crate) fn new(count: usize) -> Self {
        assert!((1..=SLOTS_MAX).contains(&count), "options are checked");
        // The first lies on top; below the last is nothing, which the count knows.
        let below = (0..count).map(|index| AtomicU32::new(((index + 1) % count) as u32)).collect();
        Self { top: AtomicU64::new(pack(0, count as u64, 0)), below }
    }

    /// How many are free.
    pub(crate) fn count(&self) -> usize {
        unpack(self.top.load(Ordering::Relaxed)).1 as usize
    }

    /// Takes the slot that was returned last; `None` when all are in use.
    #[inline]
    pub(crate) fn take(&self) -> Option<u32> {
        let mut seen = self.top.load(Ordering::Acquire);
        loop {
            let (tag, count, top) = unpack(seen);
            if count == 0 {
                return None;
            }
            // Another's by now, perhaps; then the tag has moved, and the exchange fails.
            let below = u64::from(self.below[top as usize].load(Ordering::Relaxed));
            let taken = pack(tag.wrapping_add(1), count - 1, below);
            match self.top.compare_exchange_weak(seen, taken, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => return Some(top as u32),
                Err(now) => seen = now,
            }
        }
    }

    /// Returns a slot that was taken.
    #[inline]
    pub(crate) fn put(&self, slot: u32) {
        let mut seen = self.top.load(Ordering::Relaxed);
        loop {
            let (tag, count, top) = unpack(seen);
            debug_assert!((count as usize) < self.below.len(), "a slot is returned once");
            self.below[slot as usize].store(top as u32, Ordering::Relaxed);
            let put = pack(tag.wrapping_add(1), count + 1, u64::from(slot));
            match self.top.compare_exchange_weak(seen, put, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn all_slots_are_taken_once_and_the_one_returned_last_comes_first() {
        for count in [1, 2, 256, SLOTS_MAX] {
            let free = FreeSlots::new(count);
            let mut taken: Vec<u32> = std::iter::from_fn(|| free.take()).collect();
            assert_eq!((taken.len(), free.count()), (count, 0));
            free.put(taken[count / 2]);
            assert_eq!((free.take(), free.take()), (Some(taken[count / 2]), None));
            taken.sort_unstable();
            taken.dedup();
            assert_eq!(taken.len(), count);
            taken.into_iter().for_each(|slot| free.put(slot));
            assert_eq!(free.count(), count);
        }
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    #[test]
    fn loom_no_slot_is_taken_by_two_though_others_take_and_return_some_meanwhile() {
        loom::model(|| {
            let free = Arc::new(FreeSlots::new(3));
            let owners: Arc<[AtomicU32; 3]> = Arc::new(std::array::from_fn(|_| AtomicU32::new(0)));
            let other = {
                let (free, owners) = (free.clone(), owners.clone());
                // The same lies on top afterwards, and another below it.
                thread::spawn(move || take_and_return(&free, &owners, [1, 2, 0]))
            };
            take_and_return(&free, &owners, [0]);
            other.join().unwrap();
            let mut left: Vec<u32> = std::iter::from_fn(|| free.take()).collect();
            left.sort_unstable();
            assert_eq!(left, [0, 1, 2]);
        });
    }

    /// Takes as many as `order` names, where there are so many, and returns them in that order.
    fn take_and_return<const N: usize>(free: &FreeSlots, owners: &[AtomicU32; 3], order: [usize; N]) {
        let taken = order.map(|_| free.take());
        for slot in taken.into_iter().flatten() {
            assert_eq!(owners[slot as usize].fetch_add(1, Ordering::Relaxed), 0, "slot {slot} is another's");
        }
        for slot in order.into_iter().filter_map(|at| taken[at]) {
            owners[slot as usize].fetch_sub(1, Ordering::Relaxed);
            free.put(slot);
        }
    }
}
