//! The seam between the NVMe driver and the bus: what a [`Transport`] gives a driver.
//!
//! A transport hands out **plain memory** for everything that is hot: the doorbell registers are a mapped
//! region that the driver stores to, and queues and data live in memory that the transport has made
//! reachable for the device. Only set-up and recovery go through the trait's methods.
//!
//! The crate owns no device and no memory; the VFIO transport and the emulated controller implement it, the
//! driver (`foliant-nvme`) consumes it. Neither side knows the other, so a mistake in one can't hide in both.

use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

/// An address as the device sees it (an I/O virtual address): what goes into a PRP entry, never dereferenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iova(pub u64);

impl Iova {
    /// The address `bytes` further on.
    #[must_use]
    pub const fn offset(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

impl std::fmt::Display for Iova {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Why a transport could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The device is no longer there: surprise removal, or power was cut.
    #[error("the device is gone")]
    Gone,
    /// A register outside the mapped region was named.
    #[error("register offset {offset:#x} lies outside the device's {len_bytes}-byte register region")]
    RegisterOutOfRange {
        /// Offset asked for, in bytes.
        offset: u32,
        /// Size of the register region in bytes.
        len_bytes: u32,
    },
    /// Memory could not be made reachable for the device.
    #[error("cannot map {len_bytes} bytes for DMA: {reason}")]
    Map {
        /// Length of the refused mapping in bytes.
        len_bytes: usize,
        /// What was refused and what helps.
        reason: String,
    },
    /// The operating system refused an operation.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
}

/// The doorbell registers, mapped: an array of 32-bit registers from offset 1000h of the controller's
/// register region (NVMe over PCIe Transport, section 3.1).
///
/// The driver stores tail and head indices here with plain (release) stores; a device, or the emulated
/// controller when it is next pumped, reads them.
#[derive(Clone, Copy, Debug)]
pub struct Doorbells {
    base: NonNull<AtomicU32>,
    len_bytes: u32,
}

// SAFETY: the region consists of atomics only, and `Doorbells::new` requires it to outlive the transport; a
// copy of the address may go to any thread.
#[expect(unsafe_code, reason = "a mapped register region is shared between queue owners")]
unsafe impl Send for Doorbells {}
// SAFETY: see `Send`; every access goes through atomics.
#[expect(unsafe_code, reason = "a mapped register region is shared between queue owners")]
unsafe impl Sync for Doorbells {}

impl Doorbells {
    /// Describes a mapped doorbell region of `len_bytes` bytes at `base`.
    ///
    /// # Safety
    /// The region must stay mapped, 4-byte aligned, and be accessed through atomics or by the device only, as
    /// long as the transport that hands it out exists.
    #[expect(unsafe_code, reason = "only the transport that mapped the region can vouch for it")]
    #[must_use]
    pub const unsafe fn new(base: NonNull<AtomicU32>, len_bytes: u32) -> Self {
        Self { base, len_bytes }
    }

    /// The register `offset` bytes into the doorbell region (offset 0 is register 1000h).
    ///
    /// Returns `None` when the register lies outside the region or isn't 4-byte aligned. The pointer is valid
    /// as long as the transport lives; who keeps it keeps the transport alive too.
    #[must_use]
    pub fn register(&self, offset: u32) -> Option<NonNull<AtomicU32>> {
        let end = offset.checked_add(4)?;
        if end > self.len_bytes || !offset.is_multiple_of(4) {
            return None;
        }
        // SAFETY: `offset + 4 <= len_bytes` was checked above, and `new`'s contract makes the whole region
        // one mapped object.
        #[expect(unsafe_code, reason = "address arithmetic inside the mapped region")]
        Some(unsafe { self.base.byte_add(offset as usize) })
    }
}

/// Memory that the driver wants the device to reach: page-aligned, and alive until it is unmapped.
#[derive(Clone, Copy, Debug)]
pub struct DmaMemory {
    /// First byte; aligned to 4 KiB at least, to the hugepage size for hugepage memory.
    pub base: NonNull<u8>,
    /// Length in bytes, a multiple of 4 KiB.
    pub len_bytes: usize,
}

/// What [`QueueDrive::pump`] did and what is left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pumped {
    /// Commands fetched from the submission queue in this call.
    pub fetched: u32,
    /// Completions posted to the completion queue in this call.
    pub posted: u32,
    /// Commands that the device holds and has not completed yet.
    pub in_flight: u32,
    /// When the next modelled delay ends, in nanoseconds from now; `None` when nothing waits for time alone.
    pub next_due_ns: Option<u64>,
}

/// Drives one emulated queue pair: a device without a thread of its own makes progress only here.
pub trait QueueDrive: Send {
    /// Lets the device fetch what the doorbell shows, work, and post completions; never blocks.
    fn pump(&mut self) -> Pumped;

    /// A descriptor that polls readable when the device has finished something in the background and another
    /// [`pump`](Self::pump) would post it; `None` when nothing ever happens between pumps. It is level
    /// triggered until the next pump, which drains it.
    fn wakeup_fd(&self) -> Option<RawFd>;
}

/// The interrupt of one queue pair: what lets its owner sleep while the device works.
///
/// It starts disarmed. An owner that polls leaves it so and pays for no interrupt; one that is about to sleep
/// arms it, drains it, looks at its queue a last time, and then waits for [`fd`](Self::fd). Whatever the
/// device completes after the drain makes the descriptor readable.
pub trait QueueInterrupt: Send {
    /// The number that the completion queue is created with (Interrupt Vector, IV).
    fn vector(&self) -> u16;

    /// Polls readable when an interrupt came since the last [`drain`](Self::drain). It stays the same descriptor
    /// as long as `self` lives.
    fn fd(&self) -> RawFd;

    /// Lets interrupts reach the descriptor. One that the device raised while disarmed may come now.
    ///
    /// # Errors
    /// Whatever the system said; the interrupt is disarmed then.
    fn arm(&mut self) -> Result<(), TransportError>;

    /// Keeps interrupts from the processor.
    ///
    /// # Errors
    /// Whatever the system said; the interrupt may still be armed then, which costs time only.
    fn disarm(&mut self) -> Result<(), TransportError>;

    /// Forgets the interrupts that came.
    fn drain(&mut self);
}

/// Access to one NVMe controller.
///
/// # Safety
/// An implementation promises that [`Doorbells`] obey their contract while it lives, that [`map_dma`] makes
/// exactly the given memory reachable and that the device touches none of it after [`unmap_dma`] returned
/// or [`stop_dma`] succeeded.
///
/// [`map_dma`]: Self::map_dma
/// [`unmap_dma`]: Self::unmap_dma
/// [`stop_dma`]: Self::stop_dma
#[expect(unsafe_code, reason = "an implementation vouches for memory that a device writes")]
pub unsafe trait Transport: Send + Sync {
    /// A short name for messages: the device's URI or bus address.
    fn name(&self) -> &str;

    /// Reads the 32-bit register at `offset`. A removed device reads all ones.
    ///
    /// # Errors
    /// [`TransportError::RegisterOutOfRange`] when the register isn't mapped.
    fn read_u32(&self, offset: u32) -> Result<u32, TransportError>;

    /// Reads the 64-bit register at `offset`. A removed device reads all ones.
    ///
    /// # Errors
    /// [`TransportError::RegisterOutOfRange`] when the register isn't mapped.
    fn read_u64(&self, offset: u32) -> Result<u64, TransportError>;

    /// Writes the 32-bit register at `offset`; writes to a removed device vanish.
    ///
    /// # Errors
    /// [`TransportError::RegisterOutOfRange`] when the register isn't mapped.
    fn write_u32(&self, offset: u32, value: u32) -> Result<(), TransportError>;

    /// Writes the 64-bit register at `offset`; writes to a removed device vanish.
    ///
    /// # Errors
    /// [`TransportError::RegisterOutOfRange`] when the register isn't mapped.
    fn write_u64(&self, offset: u32, value: u64) -> Result<(), TransportError>;

    /// The mapped doorbell registers.
    fn doorbells(&self) -> Doorbells;

    /// Makes `memory` reachable for the device and returns its first device address.
    ///
    /// # Errors
    /// [`TransportError::Map`] when the mapping is refused; nothing is mapped then.
    ///
    /// # Safety
    /// The memory must stay allocated until [`unmap_dma`](Self::unmap_dma) has returned or the transport is
    /// gone, and must not be handed out as a Rust reference while a command that names it is in flight in a
    /// way that conflicts with the device's access.
    unsafe fn map_dma(&self, memory: DmaMemory) -> Result<Iova, TransportError>;

    /// Takes back a mapping made by [`map_dma`](Self::map_dma), whole.
    ///
    /// # Errors
    /// [`TransportError::Map`] when no such mapping exists.
    fn unmap_dma(&self, iova: Iova, len_bytes: usize) -> Result<(), TransportError>;

    /// Forbids the device every further DMA (clears bus mastering, or its equivalent). Returns once the
    /// device can no longer touch memory.
    ///
    /// # Errors
    /// Whatever kept the transport from being sure of that.
    fn stop_dma(&self) -> Result<(), TransportError>;

    /// How to drive queue pair `qid` (0 is the admin queue), for a device without a thread of its own; `None`
    /// for hardware, which drives itself.
    fn queue_drive(&self, qid: u16) -> Option<Box<dyn QueueDrive>>;

    /// An interrupt for I/O queue pair `qid`; `None` where there is none, and then polling alone tells. Asked for
    /// once in the life of a queue pair, before the device learns of it.
    ///
    /// # Errors
    /// Whatever kept the interrupt from being set up.
    fn queue_interrupt(&self, qid: u16) -> Result<Option<Box<dyn QueueInterrupt>>, TransportError> {
        let _ = qid;
        Ok(None)
    }

    /// Whether [`map_dma`](Self::map_dma) pins the memory by itself, so that it needn't (and, since the system
    /// counts both, shouldn't) be locked beforehand.
    fn pins_memory(&self) -> bool {
        false
    }

    /// The NUMA node that the device is attached to; `None` where there is one node only, or nobody says.
    fn numa_node(&self) -> Option<u32> {
        None
    }

    /// Whether the system wants the device back (its driver is being unbound, or it is about to be unplugged):
    /// the device works on until the transport is dropped, and who asked waits for that.
    fn is_release_requested(&self) -> bool {
        false
    }
}
