//! Which thread has a page exclusively: so that one that would wait for itself is told instead.
//!
//! Only pins that a *blocking* call has granted are noted, and only a blocking call asks: a task that waits lets its thread
//! go on, and another task of the same thread may release what it waits for. The note lies beside the header, in memory that
//! costs nothing until a page is pinned exclusively, and is taken off before the page is released; so a page that is held has
//! either its holder's note or none.
//!
//! Shared pins aren't noted, since that would cost each hit.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};

use zerocopy::FromZeros;

use super::folio::FrameId;

/// A thread's number, from 1.
fn this_thread() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    thread_local!(static NUMBER: Cell<u32> = const { Cell::new(0) });
    NUMBER.with(|number| {
        if number.get() == 0 {
            number.set(NEXT.fetch_add(1, Ordering::Relaxed));
        }
        number.get()
    })
}

#[derive(Debug, FromZeros)]
struct Holder(AtomicU32);

/// The notes of one shard, by frame.
#[derive(Debug)]
pub(crate) struct Holders {
    threads: Box<[Holder]>,
}

impl Holders {
    pub(crate) fn new(frames: usize) -> Self {
        let threads =
            <[Holder]>::new_box_zeroed_with_elems(frames).expect("a cache's metadata fits into memory");
        Self { threads }
    }

    /// This thread has the page in `frame` exclusively.
    #[inline]
    pub(crate) fn note(&self, frame: FrameId) {
        self.threads[frame.0 as usize].0.store(this_thread(), Ordering::Relaxed);
    }

    /// The page is about to be released.
    #[inline]
    pub(crate) fn forget(&self, frame: FrameId) {
        self.threads[frame.0 as usize].0.store(0, Ordering::Relaxed);
    }

    /// Whether this thread noted that it has the page.
    pub(crate) fn is_this_thread(&self, frame: FrameId) -> bool {
        self.threads[frame.0 as usize].0.load(Ordering::Relaxed) == this_thread()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_the_thread_s_that_made_it_until_it_is_taken_off() {
        let holders = Holders::new(4);
        assert!(!holders.is_this_thread(FrameId(2)));
        holders.note(FrameId(2));
        assert!(holders.is_this_thread(FrameId(2)) && !holders.is_this_thread(FrameId(1)));
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(!holders.is_this_thread(FrameId(2))));
        });
        holders.forget(FrameId(2));
        assert!(!holders.is_this_thread(FrameId(2)));
    }
}
