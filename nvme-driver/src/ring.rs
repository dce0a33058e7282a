//! The two rings of a queue pair (Base section 3.3.3, PCIe section 3.1.2): the driver writes submission entries
//! and reads completion entries, the device does the opposite.
//!
//! A ring knows nothing of requests. What keeps it from overflowing is the command table: fewer commands are
//! outstanding than the ring has entries.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use foliant_nvme_spec::completion::{CompletionDw2, CompletionDw3};
use foliant_nvme_spec::{Command, Completion};
use foliant_nvme_transport::Iova;

use crate::arena::{DmaArena, DmaBuffer};
use crate::error::ArenaError;

/// A submission queue seen from the driver.
///
/// Invariants: `tail < entries`, `rung < entries`; entries from `rung` to `tail` are written and not told to the
/// device yet.
pub(crate) struct SubmissionRing {
    base: NonNull<Command>,
    entries: u32,
    /// Where the next command goes.
    tail: u32,
    /// The tail that the device knows.
    rung: u32,
    doorbell: NonNull<AtomicU32>,
    memory: DmaBuffer,
}

// SAFETY: the ring owns its memory; the doorbell is an atomic that the transport keeps mapped.
#[expect(unsafe_code, reason = "the raw pointers lead into memory that the ring owns, and to an atomic")]
unsafe impl Send for SubmissionRing {}

impl SubmissionRing {
    /// A ring of `entries` entries in memory of `arena`, whose tail goes to `doorbell`. The doorbell must stay
    /// mapped as long as the ring is used, which the transport guarantees while it lives.
    pub(crate) fn new(
        arena: &DmaArena,
        entries: u16,
        doorbell: NonNull<AtomicU32>,
    ) -> Result<Self, ArenaError> {
        let memory = arena.allocate(usize::from(entries) * Command::BYTES)?;
        let base = memory.base().cast();
        Ok(Self { base, entries: u32::from(entries), tail: 0, rung: 0, doorbell, memory })
    }

    pub(crate) fn iova(&self) -> Iova {
        self.memory.iova()
    }

    pub(crate) fn entries(&self) -> u32 {
        self.entries
    }

    /// Writes a command `ahead` places after the tail, without taking the place.
    ///
    /// The caller keeps fewer commands outstanding than there are entries, so the device has fetched what was
    /// there before.
    #[inline]
    pub(crate) fn write(&mut self, ahead: u32, command: Command) {
        let index = self.wrap(self.tail + ahead);
        // SAFETY: `wrap` keeps the index below `entries` (`ahead < entries`), for which `new` allocated memory,
        // aligned to a page. The device reads only entries that the doorbell has covered, and this isn't one.
        #[expect(unsafe_code, reason = "queue memory is shared with the device and never borrowed")]
        unsafe {
            self.base.add(index as usize).write(command);
        }
    }

    /// Takes the next `count` places, which [`write`](Self::write) has filled.
    #[inline]
    pub(crate) fn commit(&mut self, count: u32) {
        self.tail = self.wrap(self.tail + count);
    }

    /// Tells the device the tail; `false` when it knows already.
    #[inline]
    pub(crate) fn ring(&mut self) -> bool {
        if self.tail == self.rung {
            return false;
        }
        // SAFETY: the transport keeps the register mapped (see `new`). Release: the entries are visible before.
        #[expect(unsafe_code, reason = "a doorbell is a mapped register")]
        unsafe { self.doorbell.as_ref() }.store(self.tail, Ordering::Release);
        self.rung = self.tail;
        true
    }

    #[inline]
    fn wrap(&self, index: u32) -> u32 {
        debug_assert!(index < 2 * self.entries);
        if index >= self.entries { index - self.entries } else { index }
    }
}

/// What the driver needs of a completion queue entry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) dw0: u32,
    pub(crate) dw2: CompletionDw2,
    pub(crate) dw3: CompletionDw3,
}

/// A completion queue seen from the driver.
///
/// Invariants: `head < entries`; entries before `head` have the current phase's opposite once consumed, so an
/// entry is new exactly when its phase tag equals `phase`.
pub(crate) struct CompletionRing {
    base: NonNull<u8>,
    entries: u32,
    /// The entry to look at next.
    head: u32,
    /// The head that the device knows.
    rung: u32,
    /// The phase tag of entries not consumed yet; inverts at each wrap.
    phase: bool,
    doorbell: NonNull<AtomicU32>,
    memory: DmaBuffer,
}

// SAFETY: as for `SubmissionRing`.
#[expect(unsafe_code, reason = "the raw pointers lead into memory that the ring owns, and to an atomic")]
unsafe impl Send for CompletionRing {}

impl CompletionRing {
    /// A ring of `entries` entries in memory of `arena`, whose head goes to `doorbell`; see
    /// [`SubmissionRing::new`] about the doorbell.
    pub(crate) fn new(
        arena: &DmaArena,
        entries: u16,
        doorbell: NonNull<AtomicU32>,
    ) -> Result<Self, ArenaError> {
        let mut memory = arena.allocate(usize::from(entries) * Completion::BYTES)?;
        // Phase tags must start as 0 (Base section 4.2.4), and the memory may have been a queue before.
        memory.as_mut_slice().fill(0);
        let base = memory.base();
        Ok(Self { base, entries: u32::from(entries), head: 0, rung: 0, phase: true, doorbell, memory })
    }

    pub(crate) fn iova(&self) -> Iova {
        self.memory.iova()
    }

    /// The next entry, if the device has written it.
    #[inline]
    pub(crate) fn peek(&self) -> Option<Entry> {
        // SAFETY: `head < entries`, for which `new` allocated memory, aligned to a page. The device may write
        // the entry at any time, so it's never borrowed: dword 3, which the device writes last, is read as an
        // atomic with acquire ordering, the others volatile and only after its phase tag has shown that the
        // device is done with the entry.
        #[expect(unsafe_code, reason = "the device writes completion entries while the driver looks")]
        unsafe {
            let entry = self.base.add(self.head as usize * Completion::BYTES);
            let dw3 = entry.add(Completion::DW3_OFFSET).cast::<AtomicU32>().as_ref().load(Ordering::Acquire);
            let dw3 = CompletionDw3::from(dw3);
            if dw3.p() != self.phase {
                return None;
            }
            let dw0 = entry.cast::<u32>().read_volatile();
            let dw2 = CompletionDw2::from(entry.add(Completion::DW2_OFFSET).cast::<u32>().read_volatile());
            Some(Entry { dw0, dw2, dw3 })
        }
    }

    /// Consumes the entry that [`peek`](Self::peek) returned.
    #[inline]
    pub(crate) fn advance(&mut self) {
        self.head += 1;
        if self.head == self.entries {
            self.head = 0;
            self.phase = !self.phase;
        }
    }

    /// Tells the device the head, so that it may use the consumed entries again; `false` when it knows already.
    #[inline]
    pub(crate) fn ring(&mut self) -> bool {
        if self.head == self.rung {
            return false;
        }
        // SAFETY: the transport keeps the register mapped (see `new`). Release: the entries were read before.
        #[expect(unsafe_code, reason = "a doorbell is a mapped register")]
        unsafe { self.doorbell.as_ref() }.store(self.head, Ordering::Release);
        self.rung = self.head;
        true
    }
}
