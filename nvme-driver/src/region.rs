//! The one stretch of memory that a controller and its driver share: allocated once at open, mapped for DMA
//! whole, and freed only when the device can't reach it any more.
//!
//! It never hands out a byte itself; [`DmaArena`](crate::DmaArena) does.

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};

use foliant_nvme_spec::PAGE_BYTES;
use foliant_nvme_transport::{DmaMemory, Iova, Transport};
use memmap2::{Advice, MmapMut, MmapOptions};
use rustix::mm::madvise;

use crate::controller::Hugepages;
use crate::error::ArenaError;
use crate::hugepages;
use crate::placement::{self, NodePart};

/// What kind of memory lies behind an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArenaBacking {
    /// Hugepages: never swapped, one TLB entry for 2 MiB.
    Hugepages,
    /// Ordinary pages, locked into memory.
    OrdinaryLocked,
    /// Ordinary pages that the system may swap; right for a transport that pins memory itself or needs none pinned.
    OrdinaryUnlocked,
}

/// Memory that is mapped for DMA from `new` until it is dropped.
pub(crate) struct Region {
    base: NonNull<u8>,
    len_bytes: usize,
    iova: Iova,
    transport: Arc<dyn Transport>,
    /// The memory itself; `None` once it has been given up in `drop`, and of an alias.
    memory: Option<Memory>,
    /// Of an alias: the region whose memory this is.
    owner: Option<Arc<Region>>,
    /// The device could not be stopped: the mapping and the memory must outlive the process's interest in them.
    abandoned: AtomicBool,
}

// SAFETY: the region only describes memory; handing out exclusive parts of it is the arena's business.
#[expect(unsafe_code, reason = "an address range whose parts have one owner each")]
unsafe impl Send for Region {}
// SAFETY: see `Send`; no method reads or writes the memory through `&self`.
#[expect(unsafe_code, reason = "see Send")]
unsafe impl Sync for Region {}

impl Region {
    /// Allocates at least `len_bytes` and makes them reachable for the device behind `transport`. The memory is
    /// zeroed.
    pub(crate) fn new(
        transport: Arc<dyn Transport>,
        len_bytes: usize,
        hugepages: Hugepages,
        nodes: &[NodePart],
    ) -> Result<Arc<Self>, ArenaError> {
        let locking = if transport.pins_memory() { Locking::ByMapping } else { Locking::Lock };
        let memory = Memory::allocate(len_bytes.next_multiple_of(PAGE_BYTES), hugepages, locking, nodes)?;
        let (base, len_bytes) = (memory.base(), memory.len_bytes());
        // SAFETY: `Region` keeps the memory allocated until `drop` has unmapped it, and the arena hands out no
        // reference to a part that a command names (rule 1 of the crate).
        #[expect(unsafe_code, reason = "the region vouches for the memory it maps")]
        let iova = unsafe { transport.map_dma(DmaMemory { base, len_bytes }) }.map_err(ArenaError::Map)?;
        Ok(Arc::new(Self {
            base,
            len_bytes,
            iova,
            transport,
            memory: Some(memory),
            owner: None,
            abandoned: AtomicBool::new(false),
        }))
    }

    /// Makes the memory of `owner`, another device's, reachable for the device behind `transport` too. It stays
    /// allocated as long as either of them has it.
    pub(crate) fn alias(transport: Arc<dyn Transport>, owner: &Arc<Self>) -> Result<Arc<Self>, ArenaError> {
        let (base, len_bytes) = (owner.base, owner.len_bytes);
        // SAFETY: `owner`, which the alias keeps, keeps the memory allocated until `drop` has unmapped it here. The
        // owner's arena hands out no reference to a part that a command names, on whichever device.
        #[expect(unsafe_code, reason = "the owner vouches for the memory that is mapped a second time")]
        let iova = unsafe { transport.map_dma(DmaMemory { base, len_bytes }) }.map_err(ArenaError::Map)?;
        let owner = Some(Arc::clone(owner));
        Ok(Arc::new(Self {
            base,
            len_bytes,
            iova,
            transport,
            memory: None,
            owner,
            abandoned: AtomicBool::new(false),
        }))
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(crate) fn iova(&self) -> Iova {
        self.iova
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    pub(crate) fn backing(&self) -> ArenaBacking {
        match self.memory {
            Some(Memory::Huge { .. }) => ArenaBacking::Hugepages,
            Some(Memory::Ordinary { locked: true, .. }) => ArenaBacking::OrdinaryLocked,
            Some(Memory::Ordinary { locked: false, .. }) | None => ArenaBacking::OrdinaryUnlocked,
        }
    }

    /// Keeps the memory mapped and allocated for ever, because the device could not be stopped.
    pub(crate) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let memory = (self.memory.take(), self.owner.take());
        if *self.abandoned.get_mut() {
            tracing::error!(
                device = self.transport.name(),
                len_bytes = self.len_bytes,
                "DMA memory leaked on purpose: the device could not be stopped and may still write to it"
            );
            std::mem::forget(memory);
        } else if let Err(error) = self.transport.unmap_dma(self.iova, self.len_bytes) {
            tracing::error!(
                device = self.transport.name(),
                len_bytes = self.len_bytes,
                %error,
                "DMA memory leaked on purpose: it could not be unmapped"
            );
            std::mem::forget(memory);
        }
    }
}

/// Who keeps ordinary pages in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Locking {
    /// We lock them. A limit that forbids it costs a warning.
    Lock,
    /// Mapping them for the device pins them; a lock beside that would count twice against the limit.
    ByMapping,
}

/// Zeroed, page-aligned memory of the process.
enum Memory {
    Huge { base: NonNull<u8>, layout: Layout },
    Ordinary { map: MmapMut, base: NonNull<u8>, locked: bool },
}

impl Memory {
    fn allocate(
        len_bytes: usize,
        hugepages: Hugepages,
        locking: Locking,
        nodes: &[NodePart],
    ) -> Result<Self, ArenaError> {
        let page_bytes = match hugepages {
            Hugepages::Never => return Self::ordinary(len_bytes, locking, nodes),
            Hugepages::Prefer | Hugepages::Require => hugepages::page_bytes(),
        };
        if let Some(memory) = page_bytes.and_then(|page_bytes| Self::huge(len_bytes, page_bytes, nodes)) {
            return Ok(memory);
        }
        match (hugepages, page_bytes) {
            (Hugepages::Require, Some(page_bytes)) => {
                Err(ArenaError::NoHugepages { needed: len_bytes.div_ceil(page_bytes), page_bytes })
            }
            (Hugepages::Require, None) => Err(ArenaError::HugepagesUnknown),
            (Hugepages::Never | Hugepages::Prefer, _) => {
                warn_of_fallback(len_bytes, page_bytes);
                Self::ordinary(len_bytes, locking, nodes)
            }
        }
    }

    /// Hugepages, or `None` when not enough of them are free.
    fn huge(len_bytes: usize, page_bytes: usize, nodes: &[NodePart]) -> Option<Self> {
        let layout = Layout::from_size_align(len_bytes.next_multiple_of(page_bytes), PAGE_BYTES).ok()?;
        // SAFETY: the layout isn't empty: a region holds the admin queue at least.
        #[expect(unsafe_code, reason = "hugepage-rs hands out raw memory")]
        let base = NonNull::new(unsafe { hugepage_rs::alloc(layout) })?;
        // SAFETY: the range is the memory that was just allocated, and the advice changes nothing in this process.
        #[expect(unsafe_code, reason = "advice about raw memory")]
        let kept = unsafe { madvise(base.as_ptr().cast(), layout.size(), rustix::mm::Advice::LinuxDontFork) };
        warn_of_fork(kept.map_err(Into::into));
        placement::prefer(base, layout.size(), page_bytes, nodes);
        Some(Self::Huge { base, layout })
    }

    fn ordinary(len_bytes: usize, locking: Locking, nodes: &[NodePart]) -> Result<Self, ArenaError> {
        let refused = |source| ArenaError::Memory { len_bytes, source };
        let mut map = MmapOptions::new().len(len_bytes).map_anon().map_err(refused)?;
        if let Err(error) = map.advise(Advice::HugePage) {
            tracing::debug!(%error, "no transparent hugepages for the DMA arena");
        }
        warn_of_fork(map.advise(Advice::DontFork));
        let base =
            NonNull::new(map.as_mut_ptr()).ok_or_else(|| refused(std::io::ErrorKind::OutOfMemory.into()))?;
        // Before anything touches it, as locking does.
        placement::prefer(base, len_bytes, PAGE_BYTES, nodes);
        let locked = match locking {
            Locking::ByMapping => true,
            Locking::Lock => map.lock().inspect_err(|error| warn_of_memlock(len_bytes, error)).is_ok(),
        };
        Ok(Self::Ordinary { map, base, locked })
    }

    fn base(&self) -> NonNull<u8> {
        match self {
            Self::Huge { base, .. } | Self::Ordinary { base, .. } => *base,
        }
    }

    fn len_bytes(&self) -> usize {
        match self {
            Self::Huge { layout, .. } => layout.size(),
            Self::Ordinary { map, .. } => map.len(),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Self::Huge { base, layout } = self {
            // SAFETY: `huge` got this memory from `alloc` with this layout, and only this drop gives it back.
            #[expect(unsafe_code, reason = "hugepage-rs takes raw memory back")]
            unsafe {
                hugepage_rs::dealloc(base.as_ptr(), *layout);
            }
        }
    }
}

/// Memory that a device reads and writes must not be shared with a child: after a fork the next store would move it to
/// other frames, while the device keeps the old ones. So a child doesn't get it at all.
fn warn_of_fork(kept: std::io::Result<()>) {
    if let Err(error) = kept {
        tracing::warn!(%error, "the DMA arena can't be kept from child processes; this process must not fork");
    }
}

/// Says once a process that ordinary pages serve instead of hugepages, and how to change that.
fn warn_of_fallback(len_bytes: usize, page_bytes: Option<usize>) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| match page_bytes {
        Some(page_bytes) => {
            let needed = len_bytes.div_ceil(page_bytes);
            tracing::warn!(
                needed,
                "too few free hugepages: the DMA arena uses ordinary pages and will miss the TLB more often; \
                 reserve them with: sysctl vm.nr_hugepages={needed} (more if other programs use hugepages)"
            );
        }
        None => tracing::warn!("this kernel has no hugepages: the DMA arena uses ordinary pages"),
    });
}

/// Says once a process that the arena isn't locked into memory, and how to change that.
fn warn_of_memlock(len_bytes: usize, error: &std::io::Error) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tracing::warn!(
            len_bytes,
            %error,
            "the DMA arena could not be locked into memory; an emulated device works without, hardware does not: \
             raise the limit with `ulimit -l` (LimitMEMLOCK= in a systemd unit) to {} KiB or more",
            len_bytes / 1024
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The flags of the mapping that holds `address` (`VmFlags` of /proc/self/smaps).
    fn mapping_flags(address: usize) -> String {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut is_inside = false;
        for line in smaps.lines() {
            let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
            if let Some((Ok(start), Ok(end))) =
                range.map(|(start, end)| (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16)))
            {
                is_inside = (start..end).contains(&address);
            } else if is_inside && let Some(flags) = line.strip_prefix("VmFlags:") {
                return format!("{flags} ");
            }
        }
        panic!("no mapping holds {address:#x}");
    }

    #[test]
    fn a_child_process_does_not_get_the_memory() {
        let memory = Memory::allocate(1 << 20, Hugepages::Never, Locking::ByMapping, &[]).unwrap();
        let flags = mapping_flags(memory.base().as_ptr().addr());
        assert!(flags.contains(" dc "), "do not copy on fork: {flags}");
    }
}
