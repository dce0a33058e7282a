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
    /// Completions that the host hadn't taken when it was looked last, in their order.
    untaken: Vec<Entry>,
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
        self.take(|_| 0);
        self.in_flight.clear();
    }

    /// What has happened since the last call. A completion happens when the host takes it: until then the engine can't
    /// know of it. `untaken` says how many of a queue's it hasn't taken.
    pub fn take(&mut self, untaken: impl Fn(u16) -> u32) -> Vec<Entry> {
        let mut entries = std::mem::take(&mut self.untaken);
        entries.append(&mut self.entries.lock().expect("nobody panics with it"));
        // The host takes them in the order in which they were posted, so it is the newest that are left.
        let mut left = HashMap::new();
        let mut is_untaken = |entry: &Entry| {
            if !matches!(entry.what, What::Completed(_)) {
                return false;
            }
            let left = left.entry(entry.key.0).or_insert_with(|| untaken(entry.key.0));
            let is_left = *left > 0;
            *left = left.saturating_sub(1);
            is_left
        };
        let mut is_kept: Vec<bool> = entries.iter().rev().map(&mut is_untaken).collect();
        self.untaken = entries.extract_if(.., |_| is_kept.pop().unwrap_or(false)).collect();
        entries
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_happen_when_the_host_takes_them_and_in_their_order() {
        let mut log = DeviceLog::default();
        let started = What::Started { astray_bytes: 0, fua: false };
        let entry = |log: &DeviceLog, key, what| {
            push(&log.entries, key, NvmOpcode::WRITE, Extent { start: 0, len: FRAME }, what);
        };
        let completed = What::Completed(Status::SUCCESS);
        let keys =
            |entries: Vec<Entry>| -> Vec<CommandKey> { entries.iter().map(|entry| entry.key).collect() };
        entry(&log, (1, 0), completed);
        entry(&log, (1, 1), completed);
        entry(&log, (2, 2), completed);
        entry(&log, (1, 3), started);
        // Of the first queue the last one.
        let untaken = |qid| u32::from(qid == 1);
        assert_eq!(keys(log.take(untaken)), [(1, 0), (2, 2), (1, 3)]);
        assert_eq!(keys(log.take(untaken)), []);
        entry(&log, (2, 4), started);
        entry(&log, (1, 5), completed);
        assert_eq!(keys(log.take(untaken)), [(1, 1), (2, 4)]);
        assert_eq!(keys(log.take(|_| 0)), [(1, 5)]);
    }
}
