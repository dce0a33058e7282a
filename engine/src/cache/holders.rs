//! Which thread holds a page: so that one that would wait for itself is told instead.
//!
//! Only pins that a *blocking* call has granted are noted, and only a blocking call asks: a task that waits lets its thread
//! go on, and another task of the same thread may release what it waits for. The note lies beside the header, in memory that
//! costs nothing until a page is pinned, and is taken off before the page is released. Shared pins that are published
//! ([`super::published`]) need none: their slots say whose they are, and a hit of that kind pays nothing.
//!
//! Of several counted pins the last one's note stands, and a thread that releases any of its own takes its note off. So
//! a thread's note means that it has the page, and the lack of one means nothing: who isn't known waits, up to `pin_wait`. A
//! shared pin that is released by another thread than took it may leave a note while others have the page.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};

use zerocopy::FromZeros;

use super::folio::{FolioState, FrameId};

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

/// What a pin remembers of its note: the thread that it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Note(u32);

impl Note {
    /// The pin isn't noted.
    pub(crate) const NONE: Self = Self(0);
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

    /// This thread has pinned the page in `frame`.
    #[inline]
    pub(crate) fn note(&self, frame: FrameId) -> Note {
        let thread = this_thread();
        self.threads[frame.0 as usize].0.store(thread, Ordering::Relaxed);
        Note(thread)
    }

    /// The pin that was noted is about to be released.
    #[inline]
    pub(crate) fn forget(&self, frame: FrameId, note: Note) {
        let holder = &self.threads[frame.0 as usize].0;
        // Another's note stays. One that comes in between is lost, which only makes its thread wait.
        if note != Note::NONE && holder.load(Ordering::Relaxed) == note.0 {
            holder.store(0, Ordering::Relaxed);
        }
    }

    /// A counted pin is about to be released, by this thread, of a folio in that state.
    #[inline]
    pub(crate) fn forget_shared(&self, frame: FrameId, state: FolioState) {
        let holder = &self.threads[frame.0 as usize].0;
        let noted = holder.load(Ordering::Relaxed);
        // Where this is the last pin, whosever note it is.
        if noted != 0 && (state.pins() == 1 || noted == this_thread()) {
            holder.store(0, Ordering::Relaxed);
        }
    }

    /// Whether this thread noted that it has the page.
    pub(crate) fn is_this_thread(&self, frame: FrameId) -> bool {
        self.threads[frame.0 as usize].0.load(Ordering::Relaxed) == this_thread()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::cache::folio::FolioHeader;

    #[test]
    fn a_note_is_the_thread_s_that_made_it_until_it_is_taken_off() {
        let holders = Holders::new(4);
        assert!(!holders.is_this_thread(FrameId(2)));
        let note = holders.note(FrameId(2));
        assert!(holders.is_this_thread(FrameId(2)) && !holders.is_this_thread(FrameId(1)));
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(!holders.is_this_thread(FrameId(2))));
        });
        holders.forget(FrameId(2), Note::NONE);
        assert!(holders.is_this_thread(FrameId(2)));
        holders.forget(FrameId(2), note);
        assert!(!holders.is_this_thread(FrameId(2)));
    }

    #[test]
    fn of_shared_pins_the_last_note_stands_until_its_thread_or_the_last_of_all_releases() {
        let (holders, folio) = (Holders::new(4), FolioHeader::new());
        let release = || holders.forget_shared(FrameId(0), folio.state());
        let elsewhere =
            |what: &(dyn Fn() + Sync)| std::thread::scope(|scope| scope.spawn(what).join().unwrap());
        let _ = holders.note(FrameId(0));
        elsewhere(&|| {
            let _ = holders.note(FrameId(0));
        });
        assert!(!holders.is_this_thread(FrameId(0)));
        release();
        let _ = holders.note(FrameId(0));
        elsewhere(&release);
        assert!(holders.is_this_thread(FrameId(0)), "another's release isn't this thread's");
        release();
        assert!(!holders.is_this_thread(FrameId(0)));
    }
}
