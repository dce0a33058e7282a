//! Interrupts as eventfds: a message (MSI-X) for each queue pair, and two of the bus.
//!
//! A queue's message reaches the processor only while it is armed: the kernel keeps a vector without an eventfd
//! masked, and the device remembers what it would have sent. Arming and disarming are a call of the kernel each,
//! so an owner does neither while it is busy.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use foliant_nvme_transport::{QueueInterrupt, TransportError};
use vfio_bindings::bindings::vfio;

use crate::uapi::{self, DeviceFd};

/// The most vectors asked for: the admin queue's, and one for each of twice as many queue pairs as there are cores. Vectors
/// are scarce where there are many drives.
fn vectors_max() -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    2 * cores.min(1 << 15) as u32 + 1
}

/// The messages of one device.
#[derive(Debug)]
pub(crate) struct Messages {
    device: Arc<DeviceFd>,
    /// How many vectors the system gave; set by the first queue that asks.
    vectors: OnceLock<u32>,
}

impl Messages {
    pub(crate) fn new(device: Arc<DeviceFd>) -> Self {
        Self { device, vectors: OnceLock::new() }
    }

    /// The interrupt of queue pair `qid`, which has the vector of the same number; `None` when there is no such vector.
    pub(crate) fn queue(&self, qid: u16) -> Result<Option<Box<dyn QueueInterrupt>>, TransportError> {
        if u32::from(qid) >= *self.vectors.get_or_init(|| self.enable()) {
            return Ok(None);
        }
        let event = uapi::eventfd()
            .map_err(|source| TransportError::Os { what: "cannot make an eventfd", source })?;
        Ok(Some(Box::new(Message { device: self.device.clone(), vector: qid, event, is_armed: false })))
    }

    /// Enables the device's messages, none of them armed. Returns how many there are, 0 when there are none: then
    /// polling has to do.
    fn enable(&self) -> u32 {
        const MSIX: u32 = vfio::VFIO_PCI_MSIX_IRQ_INDEX;
        let mut wanted = match self.device.interrupts(MSIX) {
            Ok(count) => count.min(vectors_max()),
            Err(error) => {
                tracing::warn!(%error, "the device's interrupts can't be told; its queues are polled");
                return 0;
            }
        };
        // The system says how many it could give when those are fewer; they may become fewer still.
        while wanted > 0 {
            match self.device.set_interrupts(MSIX, 0, &vec![-1; wanted as usize]) {
                Ok(0) => break,
                Ok(possible) => wanted = (possible as u32).min(wanted - 1),
                Err(error) => {
                    tracing::warn!(%error, wanted, "the device's interrupts can't be enabled; its queues are polled");
                    return 0;
                }
            }
        }
        wanted
    }
}

/// A queue pair's message.
struct Message {
    device: Arc<DeviceFd>,
    vector: u16,
    event: OwnedFd,
    is_armed: bool,
}

impl Message {
    fn tie(&self, fd: RawFd) -> Result<(), TransportError> {
        let set = self.device.set_interrupts(vfio::VFIO_PCI_MSIX_IRQ_INDEX, self.vector.into(), &[fd]);
        set.map(drop).map_err(|source| TransportError::Os { what: "cannot change an interrupt", source })
    }
}

impl QueueInterrupt for Message {
    fn vector(&self) -> u16 {
        self.vector
    }

    fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn arm(&mut self) -> Result<(), TransportError> {
        if !self.is_armed {
            self.tie(self.event.as_raw_fd())?;
            self.is_armed = true;
        }
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), TransportError> {
        if self.is_armed {
            self.tie(-1)?;
            self.is_armed = false;
        }
        Ok(())
    }

    fn drain(&mut self) {
        uapi::take_signal(self.event.as_fd());
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        if let Err(error) = self.disarm() {
            tracing::debug!(vector = self.vector, %error, "an interrupt stays armed until the device is closed");
        }
    }
}

/// What the bus has to say: an error that the device can't be trusted after, and that the system wants it back.
#[derive(Debug)]
pub(crate) struct BusSignals {
    error: Option<OwnedFd>,
    request: Option<OwnedFd>,
    has_failed: AtomicBool,
    is_requested: AtomicBool,
}

impl BusSignals {
    pub(crate) fn new(device: &DeviceFd) -> Self {
        let tied = |index| match tie_signal(device, index) {
            Ok(event) => event,
            Err(error) => {
                tracing::debug!(%error, index, "a signal of the bus can't be had");
                None
            }
        };
        Self {
            error: tied(vfio::VFIO_PCI_ERR_IRQ_INDEX),
            request: tied(vfio::VFIO_PCI_REQ_IRQ_INDEX),
            has_failed: AtomicBool::new(false),
            is_requested: AtomicBool::new(false),
        }
    }

    /// Whether the bus reported an uncorrectable error of the device (AER).
    pub(crate) fn has_failed(&self, device: &str) -> bool {
        latch(&self.has_failed, self.error.as_ref(), || {
            tracing::error!(
                device,
                "the bus reports an uncorrectable error of the device; it is taken to be gone"
            );
        })
    }

    /// Whether the system waits for the device to be closed.
    pub(crate) fn is_requested(&self, device: &str) -> bool {
        latch(&self.is_requested, self.request.as_ref(), || {
            tracing::warn!(device, "the system wants the device back: it waits until the device is closed");
        })
    }
}

/// An eventfd for the signal `index`; `None` when the device hasn't got it.
fn tie_signal(device: &DeviceFd, index: u32) -> std::io::Result<Option<OwnedFd>> {
    if device.interrupts(index)? == 0 {
        return Ok(None);
    }
    let event = uapi::eventfd()?;
    device.set_interrupts(index, 0, &[event.as_raw_fd()])?;
    Ok(Some(event))
}

/// Looks whether `event` was signalled, which `latched` remembers; `first` runs when it is seen first.
fn latch(latched: &AtomicBool, event: Option<&OwnedFd>, first: impl FnOnce()) -> bool {
    if !latched.load(Ordering::Relaxed)
        && event.is_some_and(|event| uapi::take_signal(event.as_fd()))
        && !latched.swap(true, Ordering::Relaxed)
    {
        first();
    }
    latched.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_told_once_and_remembered() {
        let (event, latched) = (uapi::eventfd().unwrap(), AtomicBool::new(false));
        let mut told = 0;
        assert!(!latch(&latched, Some(&event), || told += 1));
        rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
        for _ in 0..3 {
            assert!(latch(&latched, Some(&event), || told += 1));
        }
        assert!(!latch(&AtomicBool::new(false), None, || told += 1));
        assert_eq!(told, 1);
    }
}
