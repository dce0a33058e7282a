//! Frames without memory of their own: caches larger than the machine's memory, for measurements of what lies beside
//! the frames.
//!
//! Anonymous memory that is read before anything has been written to it is the system's zero page, the same for all
//! addresses. An engine's frames are anonymous memory, a read from `emu:null` writes nothing to them, and a
//! hit only reads. So nothing but the lock stands between an engine and frames that cost no memory; and an engine doesn't
//! lock what its transport says it pins. This transport says so, and hands on everything else.
//!
//! Index, headers, tag trees, address space and page tables are the production ones, as large as they are with
//! memory behind the frames. The words that are touched aren't: they all come from one zero page of 2 MiB, so that the data's own
//! misses of the processor's caches are left out.

use std::sync::Arc;

use foliant_nvme_transport::{
    DmaMemory, Doorbells, Iova, QueueDrive, QueueInterrupt, Transport, TransportError,
};

/// A transport whose arena isn't locked into memory.
pub struct Folded(pub Arc<dyn Transport>);

// SAFETY: everything is handed on to a transport that keeps the contract. The device behind it is in this process, so it
// needs no memory to be pinned.
#[expect(unsafe_code, reason = "a transport vouches for memory that a device writes")]
unsafe impl Transport for Folded {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn read_u32(&self, offset: u32) -> Result<u32, TransportError> {
        self.0.read_u32(offset)
    }

    fn read_u64(&self, offset: u32) -> Result<u64, TransportError> {
        self.0.read_u64(offset)
    }

    fn write_u32(&self, offset: u32, value: u32) -> Result<(), TransportError> {
        self.0.write_u32(offset, value)
    }

    fn write_u64(&self, offset: u32, value: u64) -> Result<(), TransportError> {
        self.0.write_u64(offset, value)
    }

    fn doorbells(&self) -> Doorbells {
        self.0.doorbells()
    }

    unsafe fn map_dma(&self, memory: DmaMemory) -> Result<Iova, TransportError> {
        // SAFETY: the caller's promise is the one that the transport beneath asks for.
        unsafe { self.0.map_dma(memory) }
    }

    fn unmap_dma(&self, iova: Iova, len_bytes: usize) -> Result<(), TransportError> {
        self.0.unmap_dma(iova, len_bytes)
    }

    fn stop_dma(&self) -> Result<(), TransportError> {
        self.0.stop_dma()
    }

    fn queue_drive(&self, qid: u16) -> Option<Box<dyn QueueDrive>> {
        self.0.queue_drive(qid)
    }

    fn queue_interrupt(&self, qid: u16) -> Result<Option<Box<dyn QueueInterrupt>>, TransportError> {
        self.0.queue_interrupt(qid)
    }

    fn pins_memory(&self) -> bool {
        true
    }

    fn numa_node(&self) -> Option<u32> {
        self.0.numa_node()
    }

    fn is_release_requested(&self) -> bool {
        self.0.is_release_requested()
    }
}
