//! A transport that can be let go of in the middle, so that the device stays as a killed process leaves it: enabled,
//! with queues and commands, and its owner gone.

#![expect(unsafe_code, reason = "implements the transport's unsafe trait by handing through")]

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};

use foliant_nvme::{Iova, Pumped, Transport};
use foliant_nvme_transport::{DmaMemory, Doorbells, QueueDrive, TransportError};

/// Hands everything through to another transport until it is abandoned.
pub(super) struct Abandonable {
    name: String,
    inner: Mutex<Option<Arc<dyn Transport>>>,
    drives: Arc<Mutex<Vec<Box<dyn QueueDrive>>>>,
}

impl Abandonable {
    pub(super) fn new(inner: Arc<dyn Transport>) -> Arc<Self> {
        Arc::new(Self {
            name: inner.name().to_owned(),
            inner: Mutex::new(Some(inner)),
            drives: Arc::default(),
        })
    }

    /// Lets go of the transport beneath. The controller and the queue pairs that were opened on this one are
    /// `owner`, and are never dropped: a process that was killed doesn't tell the device good-bye either. Their
    /// memory stays allocated, since the device may write to it until somebody resets it.
    pub(super) fn abandon<T>(&self, owner: T) {
        std::mem::forget(owner);
        lock(&self.drives).clear();
        *lock(&self.inner) = None;
    }

    fn inner(&self) -> Result<Arc<dyn Transport>, TransportError> {
        lock(&self.inner).clone().ok_or(TransportError::Gone)
    }
}

// SAFETY: whatever the transport beneath promises holds here too, as long as there is one. Afterwards nothing uses
// the doorbells any more, because their users were forgotten in `abandon`.
unsafe impl Transport for Abandonable {
    fn name(&self) -> &str {
        &self.name
    }

    fn read_u32(&self, offset: u32) -> Result<u32, TransportError> {
        self.inner()?.read_u32(offset)
    }

    fn read_u64(&self, offset: u32) -> Result<u64, TransportError> {
        self.inner()?.read_u64(offset)
    }

    fn write_u32(&self, offset: u32, value: u32) -> Result<(), TransportError> {
        self.inner()?.write_u32(offset, value)
    }

    fn write_u64(&self, offset: u32, value: u64) -> Result<(), TransportError> {
        self.inner()?.write_u64(offset, value)
    }

    fn doorbells(&self) -> Doorbells {
        self.inner().expect("nobody asks for doorbells after the transport was abandoned").doorbells()
    }

    unsafe fn map_dma(&self, memory: DmaMemory) -> Result<Iova, TransportError> {
        // SAFETY: the caller's promise is the one that the transport beneath asks for.
        unsafe { self.inner()?.map_dma(memory) }
    }

    fn unmap_dma(&self, iova: Iova, len_bytes: usize) -> Result<(), TransportError> {
        self.inner()?.unmap_dma(iova, len_bytes)
    }

    fn stop_dma(&self) -> Result<(), TransportError> {
        self.inner()?.stop_dma()
    }

    fn queue_drive(&self, qid: u16) -> Option<Box<dyn QueueDrive>> {
        let drive = self.inner().ok()?.queue_drive(qid)?;
        let mut drives = lock(&self.drives);
        drives.push(drive);
        Some(Box::new(AbandonableDrive { drives: Arc::clone(&self.drives), index: drives.len() - 1 }))
    }

    // An interrupt would keep the device open as long as it lives, and its owner is forgotten: so there is none, and
    // the owner polls.

    fn pins_memory(&self) -> bool {
        self.inner().is_ok_and(|inner| inner.pins_memory())
    }

    fn is_release_requested(&self) -> bool {
        self.inner().is_ok_and(|inner| inner.is_release_requested())
    }
}

/// A drive that is gone once the transport was abandoned.
struct AbandonableDrive {
    drives: Arc<Mutex<Vec<Box<dyn QueueDrive>>>>,
    index: usize,
}

impl QueueDrive for AbandonableDrive {
    fn pump(&mut self) -> Pumped {
        lock(&self.drives).get_mut(self.index).map_or_else(Pumped::default, |drive| drive.pump())
    }

    fn wakeup_fd(&self) -> Option<RawFd> {
        lock(&self.drives).get(self.index)?.wakeup_fd()
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
