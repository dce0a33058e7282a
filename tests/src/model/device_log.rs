//! What the device was asked, and what became of it, in the order in which it happened.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use foliant_nvme_emulated::{Action, EmulatedController, ObservedCommand, ObservedEvent, Turn};
use foliant_nvme_spec::{NvmOpcode, Status};

use super::case::FRAME;

/// A range of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

impl Extent {
    /// First byte behind it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// Names a command while it is in flight: its queue and its identifier there.
pub type CommandKey = (u16, u16);

/// One entry.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The command.
    pub key: CommandKey,
    /// What it is.
    pub opcode: NvmOpcode,
    /// Its range.
    pub extent: Extent,
    /// What happened.
    pub what: What,
}

/// What happened to a command.
#[derive(Clone, Copy, Debug)]
pub enum What {
    /// It is being carried out.
    Started {
        /// Bytes of its data that lie outside the frames of the pages that it names.
        astray_bytes: u64,
        /// It reaches the medium before it completes (FUA).
        fua: bool,
    },
    /// A fault hit it.
    Struck(Action),
    /// It completed.
    Completed(Status),
}

/// Where the observers write.
#[derive(Debug, Default)]
pub struct DeviceLog {
    entries: Arc<Mutex<Vec<Entry>>>,
    in_flight: HashMap<CommandKey, Flight>,
}

/// A command that is being carried out.
#[derive(Clone, Copy, Debug)]
pub struct Flight {
    /// What it is.
    pub opcode: NvmOpcode,
    /// Its range.
    pub extent: Extent,
    /// When it began.
    pub started: u64,
    /// It reaches the medium before it completes (FUA).
    pub fua: bool,
}

impl DeviceLog {
    /// Observes a device; `locate` says in which page's frame an address lies.
    pub fn attach(
        &mut self,
        device: &EmulatedController,
        block_bytes: u32,
        locate: impl Fn(foliant::Iova) -> Option<(u32, foliant::Lba)> + Send + Sync + 'static,
    ) {
        let block = u64::from(block_bytes);
        let entries = self.entries.clone();
        device.observe(Some(Arc::new(move |command: &ObservedCommand<'_>| {
            let extent = Extent { start: command.slba * block, len: u64::from(command.blocks) * block };
            let astray_bytes = astray_bytes(command, extent.start, block, &locate);
            push(
                &entries,
                (command.qid, command.cid),
                command.opcode,
                extent,
                What::Started { astray_bytes, fua: command.fua },
            );
        })));
        let entries = self.entries.clone();
        device.observe_events(Some(Arc::new(move |event: &ObservedEvent| {
            let extent = Extent { start: event.slba * block, len: event.len_bytes };
            let what = match event.turn {
                Turn::Struck(action) => What::Struck(action),
                Turn::Completed(status) => What::Completed(status),
            };
            push(&entries, (event.qid, event.cid), event.opcode, extent, what);
        })));
    }

    /// Stops observing, and forgets what was in flight.
    pub fn detach(&mut self, device: &EmulatedController) {
        device.observe(None);
        device.observe_events(None);
        self.take();
        self.in_flight.clear();
    }

    /// What has happened since the last call.
    pub fn take(&mut self) -> Vec<Entry> {
        std::mem::take(&mut *self.entries.lock().expect("nobody panics with it"))
    }

    /// Notes that a command is being carried out.
    pub fn started(&mut self, key: CommandKey, flight: Flight) {
        self.in_flight.insert(key, flight);
    }

    /// Notes that a command has completed; `None` when it was never carried out.
    pub fn completed(&mut self, key: CommandKey) -> Option<Flight> {
        self.in_flight.remove(&key)
    }

    /// Commands that are being carried out.
    pub fn in_flight(&self) -> impl Iterator<Item = &Flight> {
        self.in_flight.values()
    }

    /// Whether a queue has none.
    #[must_use]
    pub fn is_idle(&self, qid: u16) -> bool {
        self.in_flight.keys().all(|key| key.0 != qid)
    }
}

fn push(entries: &Mutex<Vec<Entry>>, key: CommandKey, opcode: NvmOpcode, extent: Extent, what: What) {
    entries.lock().expect("nobody panics with it").push(Entry { key, opcode, extent, what });
}

/// Bytes of a command's data that don't lie in the frame of the page that they belong to (WB-41).
fn astray_bytes(
    command: &ObservedCommand<'_>,
    start: u64,
    block: u64,
    locate: &impl Fn(foliant::Iova) -> Option<(u32, foliant::Lba)>,
) -> u64 {
    let mut at = start;
    let mut astray = 0;
    for segment in command.segments {
        let mut within = 0;
        while within < segment.len_bytes {
            let len = (segment.len_bytes - within).min((FRAME - at % FRAME) as usize);
            let wanted = (command.nsid, foliant::Lba(at / FRAME * FRAME / block));
            if locate(segment.iova.offset(within as u64)) != Some(wanted) {
                astray += len as u64;
            }
            at += len as u64;
            within += len;
        }
    }
    astray
}
