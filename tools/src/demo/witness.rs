//! What the device's side of the demo sees: where the data of each write lies, and when the power is to be cut.
//!
//! The emulated device shows each command that it is about to carry out. For each page of a write's data the witness
//! asks the engine which page's frame that memory is. When it's the frame of the very page that is written, the
//! payload went to the device from where the database put it; any other byte was copied on the way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use foliant::{Iova, Lba, PAGE_BYTES};
use foliant_nvme_emulated::{ObservedCommand, ObservedSegment, Observer};
use foliant_nvme_spec::NvmOpcode;

use super::session::Event;

const PAGE: u64 = PAGE_BYTES as u64;
/// How long a command is held for the power to be cut.
const CUT_WAIT_MAX: Duration = Duration::from_millis(100);

/// Counters over all observers that were made of it.
#[derive(Debug, Default)]
pub(crate) struct Witness {
    payload_bytes: AtomicU64,
    copied_bytes: AtomicU64,
    /// Commands until the power is to be cut; 0 when it isn't.
    commands_left: AtomicU64,
    /// Whether that command is held up until the power goes.
    holds: AtomicBool,
    power_goes: AtomicBool,
}

impl Witness {
    /// An observer for a device with blocks of `block_bytes`. `locate` tells which page (namespace, first block) the
    /// frame holds that a device address lies in; `events` is told when the power is to be cut.
    pub(crate) fn observer(
        self: &Arc<Self>,
        block_bytes: u64,
        locate: impl Fn(Iova) -> Option<(u32, Lba)> + Send + Sync + 'static,
        events: Sender<Event>,
    ) -> Observer {
        let witness = Arc::clone(self);
        Arc::new(move |command| {
            if command.opcode == NvmOpcode::WRITE {
                witness.note_payload(command, block_bytes, &locate);
            }
            if witness.counts_down() {
                // Nobody listens once the session is over, and then there's nothing to cut.
                drop(events.send(Event::CutPower));
                witness.wait_for_cut();
            }
        })
    }

    /// Asks for a power cut at the `commands`-th command from now, at least 1, and `lag` later. Without a lag the
    /// command is held up, so that it's under way when the power goes.
    pub(crate) fn cut_after(&self, commands: u64, lag: Duration) {
        self.holds.store(lag.is_zero(), Ordering::Relaxed);
        self.power_goes.store(false, Ordering::Release);
        self.commands_left.store(commands, Ordering::Relaxed);
    }

    /// Tells that the power is about to be cut.
    pub(crate) fn power_goes(&self) {
        self.power_goes.store(true, Ordering::Release);
    }

    /// Takes back what [`cut_after`](Self::cut_after) asked for.
    pub(crate) fn forget_cut(&self) {
        self.commands_left.store(0, Ordering::Relaxed);
    }

    /// Where the cut has no lag, holds the device up until the power is about to be cut, or nobody seems to do it.
    fn wait_for_cut(&self) {
        let begin = Instant::now();
        while self.holds.load(Ordering::Relaxed)
            && !self.power_goes.load(Ordering::Acquire)
            && begin.elapsed() < CUT_WAIT_MAX
        {
            std::thread::yield_now();
        }
    }

    /// Payload bytes that write commands moved.
    pub(crate) fn payload_bytes(&self) -> u64 {
        self.payload_bytes.load(Ordering::Relaxed)
    }

    /// Payload bytes that didn't come from the frame of the page written.
    pub(crate) fn copied_bytes(&self) -> u64 {
        self.copied_bytes.load(Ordering::Relaxed)
    }

    /// Counts a command; whether it's the one at which the power is to be cut.
    fn counts_down(&self) -> bool {
        let one_less = |left: u64| left.checked_sub(1);
        self.commands_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less) == Ok(1)
    }

    fn note_payload(
        &self,
        command: &ObservedCommand<'_>,
        block_bytes: u64,
        locate: &impl Fn(Iova) -> Option<(u32, Lba)>,
    ) {
        let mut at = command.slba * block_bytes;
        for &ObservedSegment { iova, len_bytes, .. } in command.segments {
            let mut done = 0;
            while done < len_bytes as u64 {
                let iova = Iova(iova.0 + done);
                let part = (PAGE - iova.0 % PAGE).min(len_bytes as u64 - done);
                // The mapping begins with the namespace, so pages of both begin at the same bytes.
                let page = Lba(at / PAGE * PAGE / block_bytes);
                let is_in_place = at % PAGE == iova.0 % PAGE && locate(iova) == Some((command.nsid, page));
                self.payload_bytes.fetch_add(part, Ordering::Relaxed);
                self.copied_bytes.fetch_add(if is_in_place { 0 } else { part }, Ordering::Relaxed);
                done += part;
                at += part;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows a write of `pages` pages from page 10 on, whose data begins at `iova`, to a witness whose engine has
    /// the frame of page n at device address n pages. Returns payload and copied bytes.
    fn witness_write(iova: u64, pages: usize) -> (u64, u64) {
        let witness = Arc::new(Witness::default());
        let (events, _) = std::sync::mpsc::channel();
        let observer = witness.observer(512, |iova| Some((1, Lba(iova.0 / PAGE * 8))), events);
        let host = std::ptr::null();
        let segments = [ObservedSegment { iova: Iova(iova), host, len_bytes: pages * PAGE_BYTES }];
        observer(&ObservedCommand {
            qid: 1,
            cid: 0,
            nsid: 1,
            opcode: NvmOpcode::WRITE,
            slba: 80,
            blocks: pages as u32 * 8,
            fua: false,
            segments: &segments,
        });
        (witness.payload_bytes(), witness.copied_bytes())
    }

    #[test]
    fn data_in_the_frames_of_its_pages_is_not_copied() {
        assert_eq!(witness_write(10 * PAGE, 3), (3 * PAGE, 0));
    }

    #[test]
    fn data_in_the_frames_of_other_pages_is_copied() {
        assert_eq!(witness_write(11 * PAGE, 3), (3 * PAGE, 3 * PAGE));
    }

    #[test]
    fn data_at_another_place_of_its_frame_is_copied() {
        let (payload, copied) = witness_write(10 * PAGE + 512, 1);
        assert_eq!((payload, copied), (PAGE, PAGE));
    }

    #[test]
    fn the_power_is_cut_once_at_the_command_asked_for() {
        let witness = Witness::default();
        assert!(!witness.counts_down());
        witness.cut_after(2, Duration::ZERO);
        assert_eq!([(); 4].map(|()| witness.counts_down()), [false, true, false, false]);
    }
}
