//! A transport that eats Flush commands: each becomes a read of one block, which succeeds. What is built on it believes
//! that its data are durable, and they aren't. By this the durability scenarios show that they would notice.
//!
//! The driver rings doorbells of ours; a thread looks at the commands behind them, changes each Flush, and rings the
//! device's.

#![expect(
    unsafe_code,
    reason = "implements the transport's unsafe trait, and looks into the queues beneath the driver"
)]

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use foliant_nvme::{Iova, Transport};
use foliant_nvme_transport::{DmaMemory, Doorbells, QueueDrive, QueueInterrupt, TransportError};

/// Doorbells that are watched: of the admin queue and a few more. The stride of QEMU's controller is 4 bytes.
const DOORBELLS: usize = 32;
const ENTRY_BYTES: u64 = 64;

/// Registers (Base section 3.1): controller configuration, admin queue attributes, admin submission queue.
const CC: u32 = 0x14;
const AQA: u32 = 0x24;
const ASQ: u32 = 0x28;

/// The transport.
pub(crate) struct Forgetful {
    shared: Arc<Shared>,
    forwarder: Option<JoinHandle<()>>,
}

struct Shared {
    inner: Arc<dyn Transport>,
    /// What the driver rings.
    doorbells: Box<[AtomicU32; DOORBELLS]>,
    state: Mutex<State>,
    ended: AtomicBool,
}

#[derive(Default)]
struct State {
    /// What the device was told last, a doorbell.
    told: [u32; DOORBELLS],
    /// Submission queues by identifier: first entry and number of entries.
    queues: BTreeMap<u16, (Iova, u32)>,
    admin_entries: u32,
    /// Mappings by device address: where they lie in this process, and their length.
    mappings: BTreeMap<u64, (usize, usize)>,
    /// A page that the reads go to.
    scratch: Option<Iova>,
}

impl Forgetful {
    /// Stands between a driver and `inner`.
    pub(crate) fn new(inner: Arc<dyn Transport>) -> Arc<Self> {
        let shared = Arc::new(Shared {
            inner,
            doorbells: Box::new([const { AtomicU32::new(0) }; DOORBELLS]),
            state: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let forwarder = {
            let shared = shared.clone();
            std::thread::spawn(move || {
                while !shared.ended.load(Ordering::Acquire) {
                    shared.forward();
                    std::thread::sleep(Duration::from_micros(20));
                }
            })
        };
        Arc::new(Self { shared, forwarder: Some(forwarder) })
    }
}

impl Drop for Forgetful {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        if let Some(forwarder) = self.forwarder.take() {
            forwarder.join().expect("the forwarder doesn't panic");
        }
    }
}

impl Shared {
    /// Tells the device what the driver has rung since the last call.
    fn forward(&self) {
        let mut state = self.state.lock().expect("no panic in between");
        for number in 0..DOORBELLS {
            let value = self.doorbells[number].load(Ordering::Acquire);
            if value == state.told[number] {
                continue;
            }
            let is_tail = number % 2 == 0;
            if is_tail {
                self.look(&mut state, (number / 2) as u16, value);
            }
            state.told[number] = value;
            let offset = 0x1000 + 4 * number as u32;
            self.inner.write_u32(offset, value).expect("doorbells are registers");
        }
    }

    /// Looks at the commands of queue `qid` up to `tail`.
    fn look(&self, state: &mut State, qid: u16, tail: u32) {
        let Some((base, entries)) = state.queues.get(&qid).copied() else { return };
        let mut index = state.told[2 * usize::from(qid)];
        while index != tail {
            let entry = state.pointer(base.offset(u64::from(index) * ENTRY_BYTES));
            // SAFETY: the entry lies in memory that the driver keeps mapped while its queue exists, and the driver
            // doesn't touch it between ringing and completion; the device hasn't been told of it yet.
            unsafe {
                if qid == 0 {
                    self.note_admin(state, entry);
                } else if entry.cast::<u8>().read_volatile() == 0 {
                    forget_flush(state, entry);
                }
            }
            index = (index + 1) % entries;
        }
    }

    /// Learns of queues that are created (Base section 5.4, 5.5).
    ///
    /// # Safety
    /// `entry` is a submission queue entry that nobody changes meanwhile.
    unsafe fn note_admin(&self, state: &mut State, entry: NonNull<u32>) {
        // SAFETY: an entry has 16 dwords.
        let dword = |index: usize| unsafe { entry.add(index).read_volatile() };
        let (opcode, qid) = (dword(0) & 0xFF, (dword(10) & 0xFFFF) as u16);
        if (opcode == 0x01 || opcode == 0x05) && usize::from(qid) * 2 + 1 < DOORBELLS {
            let doorbell = 2 * usize::from(qid) + usize::from(opcode == 0x05);
            self.doorbells[doorbell].store(0, Ordering::Release);
            state.told[doorbell] = 0;
        }
        if opcode == 0x01 {
            let base = u64::from(dword(6)) | u64::from(dword(7)) << 32;
            state.queues.insert(qid, (Iova(base), (dword(10) >> 16) + 1));
        }
    }

    fn reset(&self, state: &mut State) {
        state.queues.retain(|qid, _| *qid == 0);
        state.told = [0; DOORBELLS];
        self.doorbells.iter().for_each(|doorbell| doorbell.store(0, Ordering::Release));
    }
}

/// Makes a Flush a read of block 0.
///
/// # Safety
/// `entry` is a submission queue entry that nobody else looks at yet.
unsafe fn forget_flush(state: &State, entry: NonNull<u32>) {
    let scratch = state.scratch.expect("memory was mapped before a queue was").0;
    // SAFETY: an entry has 16 dwords: 0 opcode, 6 and 7 data pointer, 10 to 12 first block and number of blocks less one.
    unsafe {
        let old = entry.read_volatile();
        entry.write_volatile(old & !0xFF | 0x02);
        for (index, value) in [(6, scratch as u32), (7, (scratch >> 32) as u32), (10, 0), (11, 0), (12, 0)] {
            entry.add(index).write_volatile(value);
        }
    }
}

impl State {
    fn pointer(&self, iova: Iova) -> NonNull<u32> {
        let (start, (host, len)) =
            self.mappings.range(..=iova.0).next_back().expect("queues lie in mapped memory");
        let offset = (iova.0 - start) as usize;
        assert!(offset < *len, "queues lie in mapped memory");
        NonNull::new((host + offset) as *mut u32).expect("memory doesn't lie at 0")
    }
}

// SAFETY: the doorbells belong to `shared`, which lives as long as the transport; memory is mapped and unmapped by the
// transport beneath, which keeps the same promises. The scratch page is part of a mapping that the driver made, whose
// contents nobody relies on: see `map_dma`.
unsafe impl Transport for Forgetful {
    fn name(&self) -> &str {
        self.shared.inner.name()
    }

    fn read_u32(&self, offset: u32) -> Result<u32, TransportError> {
        self.shared.inner.read_u32(offset)
    }

    fn read_u64(&self, offset: u32) -> Result<u64, TransportError> {
        self.shared.inner.read_u64(offset)
    }

    fn write_u32(&self, offset: u32, value: u32) -> Result<(), TransportError> {
        let mut state = self.shared.state.lock().expect("no panic in between");
        match offset {
            AQA => state.admin_entries = (value & 0xFFF) + 1,
            CC if value & 1 == 0 => self.shared.reset(&mut state),
            _ => {}
        }
        self.shared.inner.write_u32(offset, value)
    }

    fn write_u64(&self, offset: u32, value: u64) -> Result<(), TransportError> {
        if offset == ASQ {
            let mut state = self.shared.state.lock().expect("no panic in between");
            let entries = state.admin_entries;
            state.queues.insert(0, (Iova(value), entries));
        }
        self.shared.inner.write_u64(offset, value)
    }

    fn doorbells(&self) -> Doorbells {
        let base = NonNull::from(&self.shared.doorbells[0]);
        // SAFETY: the array lives as long as `shared`, is 4-byte aligned, and consists of atomics.
        unsafe { Doorbells::new(base, (DOORBELLS * 4) as u32) }
    }

    unsafe fn map_dma(&self, memory: DmaMemory) -> Result<Iova, TransportError> {
        // SAFETY: handed through from our caller.
        let iova = unsafe { self.shared.inner.map_dma(memory) }?;
        let mut state = self.shared.state.lock().expect("no panic in between");
        state.mappings.insert(iova.0, (memory.base.as_ptr() as usize, memory.len_bytes));
        if state.scratch.is_none() {
            state.scratch = Some(self.map_scratch()?);
        }
        Ok(iova)
    }

    fn unmap_dma(&self, iova: Iova, len_bytes: usize) -> Result<(), TransportError> {
        self.shared.state.lock().expect("no panic in between").mappings.remove(&iova.0);
        self.shared.inner.unmap_dma(iova, len_bytes)
    }

    fn stop_dma(&self) -> Result<(), TransportError> {
        self.shared.inner.stop_dma()
    }

    fn queue_drive(&self, qid: u16) -> Option<Box<dyn QueueDrive>> {
        self.shared.inner.queue_drive(qid)
    }

    fn queue_interrupt(&self, qid: u16) -> Result<Option<Box<dyn QueueInterrupt>>, TransportError> {
        self.shared.inner.queue_interrupt(qid)
    }

    fn pins_memory(&self) -> bool {
        self.shared.inner.pins_memory()
    }

    fn is_release_requested(&self) -> bool {
        self.shared.inner.is_release_requested()
    }
}

/// A page, aligned as DMA wants it.
#[repr(C, align(4096))]
struct Page([u8; 4096]);

impl Forgetful {
    /// Maps a page for the reads that stand for flushes. It is never freed: the transport ends with the process.
    fn map_scratch(&self) -> Result<Iova, TransportError> {
        let page = NonNull::from(Box::leak(Box::new(Page([0; 4096])))).cast();
        // SAFETY: the page is leaked, so it stays allocated, and nobody has a reference to it.
        unsafe { self.shared.inner.map_dma(DmaMemory { base: page, len_bytes: 4096 }) }
    }
}
