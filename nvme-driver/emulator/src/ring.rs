//! The controller's end of submission and completion queues: ring memory, doorbells, phase.
//!
//! The submission doorbell is loaded with acquire ordering before an entry is read, which makes the driver's stores
//! to that entry visible; the last dword of a completion, with the phase tag, is stored with release ordering after
//! everything else of it and after the command's data (Base sections 3.3.1 and 4.2.4).

#![expect(unsafe_code, reason = "queues live in memory that the driver mapped")]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use foliant_nvme_spec::completion::{CompletionDw2, CompletionDw3};
use foliant_nvme_spec::registers::{completion_head_doorbell, submission_tail_doorbell};
use foliant_nvme_spec::{Command, Completion, Status};
use foliant_nvme_transport::Doorbells;
use memmap2::MmapRaw;

use crate::dma::DmaView;

/// CAP.DSTRD: doorbells lie 32 bytes apart, so that the pair of one queue fills a cache line of its own.
pub(crate) const DSTRD: u8 = 3;

/// The doorbell registers of one attachment, which the driver stores to directly.
#[derive(Debug)]
pub(crate) struct DoorbellRegion {
    map: MmapRaw,
}

impl DoorbellRegion {
    /// Registers for the admin queue and `queue_pairs` I/O queue pairs, all zero.
    pub(crate) fn new(queue_pairs: u16) -> std::io::Result<Self> {
        let len = submission_tail_doorbell(queue_pairs, DSTRD) as usize + 64;
        let map = memmap2::MmapOptions::new().len(len.next_multiple_of(4096)).map_anon()?;
        Ok(Self { map: map.into() })
    }

    pub(crate) fn len_bytes(&self) -> u32 {
        u32::try_from(self.map.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn doorbells(&self) -> Doorbells {
        let base = NonNull::new(self.map.as_mut_ptr().cast::<AtomicU32>());
        let base = base.expect("an anonymous mapping never starts at address zero");
        // SAFETY: the region is page aligned, lives as long as the attachment, which is the transport, and is
        // accessed through atomics only.
        unsafe { Doorbells::new(base, self.len_bytes()) }
    }

    /// The register `offset` bytes into the region; `None` when it's misaligned or outside.
    pub(crate) fn register(&self, offset: u32) -> Option<&AtomicU32> {
        let register = self.doorbells().register(offset)?;
        // SAFETY: the register lies inside the region, which lives as long as `self`.
        Some(unsafe { register.as_ref() })
    }
}

/// A doorbell that the driver moved to where it can't be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InvalidDoorbell {
    pub(crate) qid: u16,
    pub(crate) value: u32,
}

/// One doorbell of the region.
#[derive(Clone, Debug)]
struct Doorbell {
    /// Keeps the register mapped.
    _region: Arc<DoorbellRegion>,
    register: NonNull<AtomicU32>,
}

// SAFETY: the register lies in a region of atomics that the doorbell keeps alive.
unsafe impl Send for Doorbell {}

impl Doorbell {
    /// The doorbell at `offset`, set back to 0 as creating a queue does.
    fn reset(region: &Arc<DoorbellRegion>, offset: u32) -> Option<Self> {
        let register = NonNull::from(region.register(offset)?);
        let doorbell = Self { _region: Arc::clone(region), register };
        doorbell.atomic().store(0, Ordering::Relaxed);
        Some(doorbell)
    }

    #[inline]
    fn atomic(&self) -> &AtomicU32 {
        // SAFETY: `register` was found inside the region that `self` keeps alive.
        unsafe { self.register.as_ref() }
    }
}

/// Where a queue lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingMemory {
    pub(crate) iova: u64,
    pub(crate) entries: u32,
}

/// A submission queue, as its controller sees it.
///
/// Invariant: `head` and `tail` are below `memory.entries`; the entries from `head` up to `tail` are the driver's
/// commands, complete.
#[derive(Debug)]
pub(crate) struct SubmissionRing {
    pub(crate) qid: u16,
    memory: RingMemory,
    base: NonNull<Command>,
    head: u32,
    tail: u32,
    doorbell: Doorbell,
}

// SAFETY: the base address is valid from any thread under `map_dma`'s contract.
unsafe impl Send for SubmissionRing {}

impl SubmissionRing {
    /// A queue in mapped memory; `None` when its memory isn't mapped, or the doorbell doesn't exist.
    pub(crate) fn new(
        qid: u16,
        memory: RingMemory,
        dma: &mut DmaView,
        region: &Arc<DoorbellRegion>,
    ) -> Option<Self> {
        let base = dma.translate(memory.iova, u64::from(memory.entries) * Command::BYTES as u64)?.cast();
        let doorbell = Doorbell::reset(region, submission_tail_doorbell(qid, DSTRD))?;
        Some(Self { qid, memory, base, head: 0, tail: 0, doorbell })
    }

    /// Looks the memory up again after mappings changed; false when it's gone.
    pub(crate) fn rebind(&mut self, dma: &mut DmaView) -> bool {
        let host = dma.translate(self.memory.iova, u64::from(self.memory.entries) * Command::BYTES as u64);
        let Some(host) = host else { return false };
        self.base = host.cast();
        true
    }

    /// Reads the tail doorbell. True when it has moved.
    #[inline]
    pub(crate) fn refresh_tail(&mut self) -> Result<bool, InvalidDoorbell> {
        let value = self.doorbell.atomic().load(Ordering::Acquire);
        if value == self.tail {
            return Ok(false);
        }
        if value >= self.memory.entries {
            // The register is set back, so that one bad write is one event.
            self.doorbell.atomic().store(self.tail, Ordering::Relaxed);
            return Err(InvalidDoorbell { qid: self.qid, value });
        }
        self.tail = value;
        Ok(true)
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    /// The next command, which then is the controller's.
    #[inline]
    pub(crate) fn fetch(&mut self) -> Option<Command> {
        if self.is_empty() {
            return None;
        }
        // SAFETY: `head` is below `entries`, and the whole ring was translated when `base` was set; the acquire
        // load of the doorbell ordered the driver's stores before this read.
        let command = unsafe { self.base.add(self.head as usize).read_volatile() };
        self.head += 1;
        if self.head == self.memory.entries {
            self.head = 0;
        }
        Some(command)
    }

    /// SQHD for a completion posted now.
    #[inline]
    pub(crate) fn head(&self) -> u16 {
        self.head as u16
    }
}

/// A completion queue, as its controller sees it.
///
/// Invariant: `head` and `tail` are below `memory.entries`; the entries from `head` up to `tail` are posted and not
/// yet given back, and there are `memory.entries - 1` of them at most.
#[derive(Debug)]
pub(crate) struct CompletionRing {
    pub(crate) qid: u16,
    memory: RingMemory,
    base: NonNull<Completion>,
    head: u32,
    tail: u32,
    /// Phase tag of the next entry: true on the first pass.
    phase: bool,
    doorbell: Doorbell,
}

// SAFETY: the base address is valid from any thread under `map_dma`'s contract.
unsafe impl Send for CompletionRing {}

impl CompletionRing {
    /// A queue in mapped memory; `None` when its memory isn't mapped, or the doorbell doesn't exist.
    pub(crate) fn new(
        qid: u16,
        memory: RingMemory,
        dma: &mut DmaView,
        region: &Arc<DoorbellRegion>,
    ) -> Option<Self> {
        let base = dma.translate(memory.iova, u64::from(memory.entries) * Completion::BYTES as u64)?.cast();
        let doorbell = Doorbell::reset(region, completion_head_doorbell(qid, DSTRD))?;
        Some(Self { qid, memory, base, head: 0, tail: 0, phase: true, doorbell })
    }

    /// Looks the memory up again after mappings changed; false when it's gone.
    pub(crate) fn rebind(&mut self, dma: &mut DmaView) -> bool {
        let host = dma.translate(self.memory.iova, u64::from(self.memory.entries) * Completion::BYTES as u64);
        let Some(host) = host else { return false };
        self.base = host.cast();
        true
    }

    /// Reads the head doorbell: how far the driver has taken completions.
    #[inline]
    pub(crate) fn refresh_head(&mut self) -> Result<(), InvalidDoorbell> {
        let value = self.doorbell.atomic().load(Ordering::Acquire);
        if value == self.head {
            return Ok(());
        }
        if value >= self.memory.entries
            || self.distance(self.head, value) > self.distance(self.head, self.tail)
        {
            self.doorbell.atomic().store(self.head, Ordering::Relaxed);
            return Err(InvalidDoorbell { qid: self.qid, value });
        }
        self.head = value;
        Ok(())
    }

    #[inline]
    fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from { to - from } else { to + self.memory.entries - from }
    }

    /// Completions posted that the driver hasn't given back, by its doorbell as it is now.
    pub(crate) fn untaken(&self) -> u32 {
        let value = self.doorbell.atomic().load(Ordering::Acquire);
        let head = if value < self.memory.entries { value } else { self.head };
        self.distance(head, self.tail)
    }

    /// Completions that fit before the queue is full.
    #[inline]
    pub(crate) fn free(&self) -> u32 {
        self.memory.entries - 1 - self.distance(self.head, self.tail)
    }

    /// Posts a completion.
    ///
    /// # Panics
    /// When the queue is full: whoever posts has made sure of its room before.
    #[inline]
    pub(crate) fn post(&mut self, dw0: u32, dw2: CompletionDw2, cid: u16, status: Status) {
        assert!(self.free() > 0, "room is reserved before a command is fetched");
        let dw3 = CompletionDw3::new().with_cid(cid).with_p(self.phase).with_status(status);
        // SAFETY: `tail` is below `entries`, and the whole ring was translated when `base` was set. The driver
        // reads dword 3 only, atomically, until its phase tells that the entry is complete.
        unsafe {
            let entry = self.base.add(self.tail as usize).cast::<u32>();
            entry.write_volatile(dw0);
            entry.add(1).write_volatile(0);
            entry.add(2).write_volatile(dw2.into());
            AtomicU32::from_ptr(entry.add(3).as_ptr()).store(dw3.into(), Ordering::Release);
        }
        self.tail += 1;
        if self.tail == self.memory.entries {
            self.tail = 0;
            self.phase = !self.phase;
        }
    }
}
