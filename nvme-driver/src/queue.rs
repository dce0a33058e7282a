//! The I/O queue pair: requests in, completions out, by one owner and without a lock.
//!
//! ```text
//!  submit ─► checks ─► split ─► for each command: slot, PRPs, entry in the ring    no device access at all
//!  ring   ─► one store to the tail doorbell for everything submitted since
//!  poll   ◄─ entries whose phase tag is new ─► slot settled ─► payload back        one store to the head doorbell
//! ```
//!
//! Invariants:
//!
//! - **Q1** A payload is with the queue pair from an accepted `submit` until all commands of its request have
//!   completed, or the device has confirmed the queue's deletion, or can't touch memory any more.
//! - **Q2** Outstanding commands ≤ slots = entries − 1, so neither ring overflows and a place in the submission
//!   ring is free when a slot is.
//! - **Q3** A submission that fails leaves no trace: no slot taken, no entry committed.
//! - **Q4** Once the device has named a command that isn't outstanding, nothing it says on this queue is believed.
//!
//! Read `slots.rs`, `ring.rs`, `split.rs` and `prp.rs` for the parts.

mod submit;
#[cfg(test)]
mod tests;

use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use foliant_nvme_spec::{Command, Completion as CompletionEntry, PAGE_BYTES};
use foliant_nvme_transport::{Pumped, QueueDrive, QueueInterrupt};

use self::submit::Staged;
use crate::device::{Deleted, Device};
use crate::error::{CommandError, DriverError, QueueError, Rejected};
use crate::lists::Lists;
use crate::namespace::Namespace;
use crate::payload::Payload;
use crate::prp;
use crate::request::{Completion, Io};
use crate::ring::{CompletionRing, Entry, SubmissionRing};
use crate::sleep::{QueueSleep, Wakeup};
use crate::slots::Slots;
use crate::stats::QueueStats;

/// The size of an I/O queue pair.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueShape {
    /// Entries of each of its two queues.
    pub(crate) entries: u16,
    /// The largest transfer of one command in bytes.
    pub(crate) max_transfer_bytes: u32,
}

impl QueueShape {
    fn slots(self) -> u16 {
        self.entries - 1
    }

    /// Memory of one slot's PRP list, or deallocation range, in bytes.
    fn list_bytes(self) -> usize {
        prp::list_pages(self.max_transfer_bytes) * PAGE_BYTES
    }

    /// Memory that a queue pair of this shape takes from the driver's arena, in bytes: both rings and the lists.
    pub(crate) fn memory_bytes(self) -> usize {
        let entries = usize::from(self.entries);
        (entries * Command::BYTES).next_multiple_of(PAGE_BYTES)
            + (entries * CompletionEntry::BYTES).next_multiple_of(PAGE_BYTES)
            + usize::from(self.slots()) * self.list_bytes()
    }
}

/// An I/O submission queue and its completion queue, with one owner.
///
/// Nothing is shared with other queue pairs but the device, so no call takes a lock or waits, except creation,
/// [`close`](Self::close), drop, and the switching of an interrupt when an owner goes to sleep or has become busy again. `P` is what requests carry; see [`Payload`].
///
/// Dropping a queue pair deletes its queues on the device and then drops the payloads still in flight. If the
/// device can't confirm that, they are kept until the controller is stopped, since it may still write to their
/// memory.
pub struct QueuePair<P: Payload> {
    held: ManuallyDrop<Held<P>>,
    device_id: u64,
    failure: Option<QueueError>,
    qid: u16,
    is_closed: bool,
    drive: Option<Box<dyn QueueDrive>>,
    sleep: QueueSleep,
    stats: QueueStats,
    device: Arc<Device>,
}

/// What the device may touch, or complete into: kept until it no longer can (Q1).
struct Held<P> {
    submissions: SubmissionRing,
    completions: CompletionRing,
    slots: Slots<P>,
    lists: Lists,
}

impl<P: Payload> QueuePair<P> {
    pub(crate) fn create(device: Arc<Device>, shape: QueueShape) -> Result<Self, DriverError> {
        let qid = device.take_queue_id()?;
        let interrupt = match device.transport().queue_interrupt(qid) {
            Ok(interrupt) => interrupt,
            Err(error) => {
                device.return_queue_id(qid, Deleted::Yes);
                return Err(error.into());
            }
        };
        match Self::create_as(&device, qid, shape, interrupt.as_deref().map(QueueInterrupt::vector)) {
            Ok(held) => {
                let drive = device.transport().queue_drive(qid);
                Ok(Self {
                    held: ManuallyDrop::new(held),
                    device_id: device.id(),
                    failure: None,
                    qid,
                    is_closed: false,
                    drive,
                    sleep: QueueSleep::new(interrupt),
                    stats: QueueStats::default(),
                    device,
                })
            }
            Err((error, deleted)) => {
                device.return_queue_id(qid, deleted);
                Err(error)
            }
        }
    }

    /// Allocates the queue pair's memory and creates it on the device. An error says with it whether the device
    /// knows nothing of the queues (any more).
    fn create_as(
        device: &Device,
        qid: u16,
        shape: QueueShape,
        vector: Option<u16>,
    ) -> Result<Held<P>, (DriverError, Deleted)> {
        let nothing_created = |error| (error, Deleted::Yes);
        let (submissions, completions) = device.rings(qid, shape.entries).map_err(nothing_created)?;
        let lists = Lists::new(device.queue_arena(), shape.slots(), shape.list_bytes());
        let lists = lists.map_err(|error| nothing_created(error.into()))?;
        let held =
            ManuallyDrop::new(Held { submissions, completions, slots: Slots::new(shape.slots()), lists });
        let (sq, cq) = (held.submissions.iova(), held.completions.iova());
        let created = device.with_admin(|admin, watch| {
            admin.create_completion_queue(watch, qid, shape.entries, cq, vector)?;
            let Err(refusal) = admin.create_submission_queue(watch, qid, shape.entries, sq) else {
                return Ok(());
            };
            match admin.delete_completion_queue(watch, qid) {
                Ok(()) => Err(refusal),
                Err(deletion) => Err(DriverError::DeviceFault {
                    what: format!("queue {qid} was created by half: {refusal}; then {deletion}"),
                }),
            }
        });
        match created {
            Ok(()) => Ok(ManuallyDrop::into_inner(held)),
            Err(error @ DriverError::Command { .. }) => {
                drop(ManuallyDrop::into_inner(held));
                Err((error, Deleted::Yes))
            }
            // The device may know the queues: their memory and their number stay taken until it is stopped.
            Err(error) => {
                device.bury(ManuallyDrop::into_inner(held));
                Err((error, Deleted::No))
            }
        }
    }

    /// Takes a request; the device learns of it at the next [`ring`](Self::ring).
    ///
    /// A read or write that is longer than [`Namespace::max_transfer_bytes`] or crosses
    /// [`Namespace::optimal_boundary_blocks`] becomes several commands, of which nothing is atomic together; a
    /// Write Zeroes is split only at 65,536 blocks, since MDTS doesn't bound it. The payload comes back once,
    /// from [`poll`](Self::poll). Requests without data (`Flush`, `WriteZeroes`, `Deallocate`) take a payload
    /// without segments.
    ///
    /// # Errors
    /// [`Rejected`] gives the payload back and says why; [`SubmitError::Full`](crate::SubmitError::Full) is the one that passes.
    #[inline]
    pub fn submit(&mut self, namespace: &Namespace, io: Io, payload: P) -> Result<(), Rejected<P>> {
        match self.stage(namespace, io, &payload) {
            Ok(Staged { parent, commands }) => {
                self.held.slots.begin(parent, commands, payload);
                self.held.submissions.commit(u32::from(commands));
                self.stats.requests += 1;
                self.count_commands(io, commands);
                Ok(())
            }
            Err(reason) => Err(Rejected { payload, reason }),
        }
    }

    /// Tells the device of everything submitted since the last call, with one doorbell store. `false` when there
    /// was nothing to tell.
    #[inline]
    pub fn ring(&mut self) -> bool {
        let rung = self.held.submissions.ring();
        self.stats.sq_doorbells += u64::from(rung);
        rung
    }

    /// Drives a device that has no thread of its own; does nothing for hardware. Never blocks.
    #[inline]
    pub fn pump(&mut self) -> Pumped {
        self.drive.as_mut().map_or_else(Pumped::default, |drive| drive.pump())
    }

    /// Consumes completion entries that are ready, at most `budget` of them, and hands the requests that have
    /// ended to `sink`. Returns how many entries were consumed, which for split requests is more than requests
    /// ended. Never blocks, and doesn't [`pump`](Self::pump).
    ///
    /// # Errors
    /// [`QueueError`] when the device has broken the protocol, from then on for ever. Requests that ended before
    /// have been handed out; [`close`](Self::close) gives back the others.
    #[inline]
    pub fn poll(&mut self, budget: u32, mut sink: impl FnMut(Completion<P>)) -> Result<u32, QueueError> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        let mut consumed = 0;
        let mut result = Ok(());
        while consumed < budget
            && let Some(entry) = self.held.completions.peek()
        {
            if let Err(failure) = self.settle(entry, &mut sink) {
                result = Err(failure);
                break;
            }
            consumed += 1;
        }
        self.stats.completions += u64::from(consumed);
        self.stats.cq_doorbells += u64::from(self.held.completions.ring());
        self.sleep.note_polled(consumed);
        result.map(|()| consumed)
    }

    /// Command slots free for [`submit`](Self::submit); a request takes one for each command it's split into.
    #[inline]
    #[must_use]
    pub fn free_commands(&self) -> u32 {
        self.held.slots.free()
    }

    /// Command slots in use: commands submitted whose completion hasn't been polled.
    #[inline]
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.held.slots.len() - self.held.slots.free()
    }

    /// Gets ready for an owner that wants to sleep, and says what will wake it. Interrupts reach the processor from
    /// then on; an owner that comes to poll again switches them off in passing.
    pub fn prepare_to_sleep(&mut self) -> Wakeup {
        if let Some(drive) = &self.drive {
            return drive.wakeup_fd().map_or(Wakeup::Pump, Wakeup::Descriptor);
        }
        let wakeup = self.sleep.prepare();
        // What was completed before the interrupt was armed and drained is seen here.
        let is_ready = self.failure.is_none() && self.held.completions.peek().is_some();
        if is_ready { Wakeup::Ready } else { wakeup }
    }

    /// What the queue pair has done so far.
    #[must_use]
    pub fn stats(&self) -> &QueueStats {
        &self.stats
    }

    /// The queue pair's number on the device, from 1.
    #[must_use]
    pub fn id(&self) -> u16 {
        self.qid
    }

    /// Looks at the controller's status: for an owner whose commands don't complete.
    ///
    /// # Errors
    /// [`DriverError::Gone`] when the device was removed, [`DriverError::ControllerFatal`] when it has failed,
    /// [`DriverError::NotReady`] when it was reset from outside.
    pub fn check(&self) -> Result<(), DriverError> {
        self.device.check()
    }

    /// As [`Controller::is_release_requested`](crate::Controller::is_release_requested).
    #[must_use]
    pub fn is_release_requested(&self) -> bool {
        self.device.is_release_requested()
    }

    /// Deletes the queues on the device and hands every payload still in flight to `sink`: with its result where
    /// the device completed it, otherwise with [`CommandError::Aborted`], or [`CommandError::Gone`] when the
    /// device is gone or has failed.
    ///
    /// # Errors
    /// When the device doesn't confirm the deletion and can't be kept from memory either; payloads in flight are
    /// then kept until the controller is stopped, since the device may still write to their memory.
    pub fn close(mut self, mut sink: impl FnMut(Completion<P>)) -> Result<(), DriverError> {
        let ending = self.delete_queues()?;
        self.drain(ending, &mut sink);
        Ok(())
    }
}

/// Completion and the queue pair's end.
impl<P: Payload> QueuePair<P> {
    /// Checks a completion entry, settles its command and consumes it. A fault is latched (Q4).
    #[inline]
    fn settle(&mut self, entry: Entry, sink: &mut impl FnMut(Completion<P>)) -> Result<(), QueueError> {
        let Held { submissions, completions, slots, .. } = &mut *self.held;
        // Consumed before the caller sees it, so that a panic in `sink` can't make it come twice.
        completions.advance();
        let (dw2, errors) = (entry.dw2, &mut self.stats.errors);
        if dw2.sqid() != self.qid || u32::from(dw2.sqhd()) >= submissions.entries() {
            return Err(self.fail(entry));
        }
        let settled = slots.settle(entry.dw3.cid(), entry.dw3.status(), |payload, status| {
            *errors += u64::from(!status.is_success());
            sink(Completion::new(payload, status));
        });
        settled.map_err(|_| self.fail(entry))
    }

    #[cold]
    fn fail(&mut self, entry: Entry) -> QueueError {
        let (qid, entries) = (self.qid, self.held.submissions.entries());
        let (sqid, sqhd) = (entry.dw2.sqid(), entry.dw2.sqhd());
        let failure = if sqid != qid {
            QueueError::ForeignQueue { qid, sqid }
        } else if u32::from(sqhd) >= entries {
            QueueError::HeadOutOfRange { qid, sqhd, entries }
        } else {
            QueueError::UnknownCommand { qid, cid: entry.dw3.cid() }
        };
        tracing::error!(device = self.device.transport().name(), error = %failure, "I/O queue failed");
        self.failure = Some(failure);
        failure
    }

    /// Makes sure that the device no longer knows the queues: it deletes them, or can't touch memory any more.
    /// Returns how the commands in flight have ended.
    fn delete_queues(&mut self) -> Result<CommandError, DriverError> {
        let Self { device, drive, qid, is_closed, .. } = self;
        let qid = *qid;
        if *is_closed {
            return Ok(CommandError::Aborted);
        }
        if device.is_stopped() {
            // A shutdown waits for the queue pairs, so the device was stopped because it was gone or had failed.
            device.return_queue_id(qid, Deleted::No);
            *is_closed = true;
            return Ok(CommandError::Gone);
        }
        let mut pump = || {
            if let Some(drive) = drive {
                drive.pump();
            }
        };
        let deleted = device.with_admin_pumping(&mut pump, |admin, watch| {
            admin.delete_submission_queue(watch, qid)?;
            admin.delete_completion_queue(watch, qid)
        });
        let ending = match deleted {
            Ok(()) => {
                device.return_queue_id(qid, Deleted::Yes);
                CommandError::Aborted
            }
            // Only a reset helps such a controller, so this takes nothing from its other queues.
            Err(error) if device.is_lost(&error) && device.stop() => {
                device.return_queue_id(qid, Deleted::No);
                CommandError::Gone
            }
            Err(error) => return Err(error),
        };
        *is_closed = true;
        Ok(ending)
    }

    /// Hands out what the device completed before its queues were deleted, then everything else as `ending`.
    fn drain(&mut self, ending: CommandError, sink: &mut impl FnMut(Completion<P>)) {
        // The head doorbell isn't rung: its queue no longer exists.
        while self.failure.is_none()
            && let Some(entry) = self.held.completions.peek()
            && self.settle(entry, sink).is_ok()
        {
            self.stats.completions += 1;
        }
        for payload in self.held.slots.drain() {
            sink(Completion { payload, result: Err(ending) });
        }
    }
}

impl<P: Payload> Drop for QueuePair<P> {
    fn drop(&mut self) {
        match self.delete_queues() {
            Ok(_) => {
                // SAFETY: `held` is dropped here only, and nothing uses it afterwards. The device no longer
                // knows the queues (Q1), so neither rings nor payloads are touched by it.
                #[expect(unsafe_code, reason = "dropped once the device cannot touch it")]
                unsafe {
                    ManuallyDrop::drop(&mut self.held);
                }
            }
            Err(error) => {
                self.device.return_queue_id(self.qid, Deleted::No);
                tracing::error!(
                    device = self.device.transport().name(),
                    qid = self.qid,
                    in_flight = self.in_flight(),
                    %error,
                    "an I/O queue could not be deleted; its payloads in flight are kept until the controller is stopped"
                );
                // SAFETY: `held` is taken here only, and nothing uses it afterwards.
                #[expect(unsafe_code, reason = "moved to where it stays until the device cannot touch it")]
                self.device.bury(unsafe { ManuallyDrop::take(&mut self.held) });
            }
        }
    }
}

impl<P: Payload> fmt::Debug for QueuePair<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueuePair")
            .field("id", &self.qid)
            .field("in_flight", &self.in_flight())
            .field("failure", &self.failure)
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}
