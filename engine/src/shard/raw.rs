//! Commands over memory outside the cache: labels of mirrored ranges, and windows of a resynchronisation.
//!
//! Labels go through one page a shard, one after the other; they are read and written when mappings are opened and
//! closed. A label that can't be read or written is its caller's to judge.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use foliant_nvme::{CommandError, DmaBuffer, Fua, Io, Lba, Segment};

use super::Shard;
use super::payload::{PayloadKind, ShardPayload};
use crate::error::{Error, Operation};
use crate::mirror::label::MirrorLabel;
use crate::mirror::{LabelPlace, StreamId};
use crate::reply::{Grants, SlotId};

/// Memory of a command that is no folio's.
#[derive(Debug)]
pub(crate) struct RawIo {
    pub buffer: DmaBuffer,
    pub len_bytes: u32,
    pub purpose: RawPurpose,
}

/// What such a command is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RawPurpose {
    /// A label is read or written.
    Label,
    /// A window is read from the primary.
    WindowRead,
    /// A window is written to the mirror.
    WindowWrite,
}

impl RawIo {
    pub(super) fn segment(&self) -> Segment {
        Segment { iova: self.buffer.iova(), len_bytes: self.len_bytes }
    }
}

/// What is to be done with a label.
#[derive(Clone, Debug)]
pub(crate) enum LabelAction {
    /// Reads it to here; `None` where there is none.
    Read(Arc<Mutex<Option<MirrorLabel>>>),
    /// Writes it.
    Write(MirrorLabel),
    /// Writes zeros over it.
    Erase,
}

/// The labels' page and who waits for it.
#[derive(Debug)]
pub(super) struct Labels {
    page: Option<DmaBuffer>,
    line: VecDeque<(SlotId, LabelPlace, LabelAction)>,
    current: Option<(SlotId, StreamId, LabelAction)>,
}

impl Labels {
    pub(super) fn new(page: DmaBuffer) -> Self {
        Self { page: Some(page), line: VecDeque::new(), current: None }
    }
}

impl Shard {
    pub(super) fn begin_label(&mut self, slot: SlotId, place: LabelPlace, action: LabelAction) {
        self.labels.line.push_back((slot, place, action));
    }

    /// Submits the next label's command.
    pub(super) fn step_labels(&mut self) -> bool {
        if self.labels.line.is_empty() || self.labels.current.is_some() {
            return false;
        }
        let Some((slot, place, action)) = self.labels.line.pop_front() else { return false };
        let Some(mut page) = self.labels.page.take() else {
            // It went with the queue of a device that was lost.
            self.answer(slot, Err(Error::Closed));
            return true;
        };
        let block_bytes = place.namespace.block_bytes();
        let block = &mut page.as_mut_slice()[..block_bytes as usize];
        match &action {
            LabelAction::Write(label) => label.write_to(block),
            LabelAction::Read(_) | LabelAction::Erase => block.fill(0),
        }
        let lba = Lba((place.start_bytes + place.len_bytes) / u64::from(block_bytes));
        let io = match &action {
            LabelAction::Read(_) => Io::Read { lba, blocks: 1 },
            LabelAction::Write(_) | LabelAction::Erase => Io::Write { lba, blocks: 1, fua: Fua::Yes },
        };
        let raw = RawIo { buffer: page, len_bytes: block_bytes, purpose: RawPurpose::Label };
        match self.submit_raw(place.stream, &place.namespace, io, raw) {
            Ok(()) => self.labels.current = Some((slot, place.stream, action)),
            Err((raw, refusal)) => {
                self.labels.page = Some(raw.buffer);
                match refusal {
                    Refusal::Full => {
                        self.labels.line.push_front((slot, place, action));
                        return false;
                    }
                    Refusal::Failed => self.answer(slot, Err(Error::Closed)),
                }
            }
        }
        true
    }

    /// Puts a command over memory outside the cache into a stream's queue, or gives the memory back.
    pub(super) fn submit_raw(
        &mut self,
        stream: StreamId,
        namespace: &foliant_nvme::Namespace,
        io: Io,
        raw: RawIo,
    ) -> Result<(), (RawIo, Refusal)> {
        let kind = PayloadKind::Raw(raw);
        let (kind, reason) = match stream {
            StreamId::Primary => {
                let payload = ShardPayload::new(kind, &self.watch);
                match self.queue.submit(namespace, io, payload) {
                    Ok(()) => {
                        self.watch.submitted();
                        return Ok(());
                    }
                    Err(rejected) => (rejected.payload.kind, rejected.reason),
                }
            }
            StreamId::Mirror => {
                let Some(mirror) = &mut self.mirror else {
                    let PayloadKind::Raw(raw) = kind else { unreachable!("it was made above") };
                    return Err((raw, Refusal::Failed));
                };
                match mirror.submit(namespace, io, kind) {
                    Ok(()) => return Ok(()),
                    Err(refused) => refused,
                }
            }
        };
        let PayloadKind::Raw(raw) = kind else {
            unreachable!("a rejected payload comes back as it was given")
        };
        let refusal =
            if matches!(reason, foliant_nvme::SubmitError::Full) { Refusal::Full } else { Refusal::Failed };
        Err((raw, refusal))
    }

    /// A command over memory outside the cache has ended.
    pub(super) fn raw_completed(&mut self, raw: RawIo, result: Result<(), CommandError>) {
        if raw.purpose != RawPurpose::Label {
            return self.window_completed(raw, result);
        }
        if let Some((slot, _, action)) = self.labels.current.take() {
            let answer = match (result, &action) {
                (Ok(()), LabelAction::Read(to)) => {
                    let label = MirrorLabel::parse(&raw.buffer.as_slice()[..raw.len_bytes as usize]);
                    *to.lock().unwrap_or_else(PoisonError::into_inner) = label;
                    Ok(Grants::none())
                }
                (Ok(()), _) => Ok(Grants::none()),
                (Err(source), LabelAction::Read(_)) => {
                    Err(Error::Device { operation: Operation::Read, offset: 0, source })
                }
                (Err(source), _) => Err(Error::Device { operation: Operation::Write, offset: 0, source }),
            };
            self.answer(slot, answer);
        }
        self.labels.page = Some(raw.buffer);
    }

    /// The mirror's queue is gone: a label that was on its way there has failed.
    pub(super) fn fail_labels_of_mirror(&mut self, source: CommandError) {
        if let Some((slot, StreamId::Mirror, _)) = self.labels.current {
            self.labels.current = None;
            self.answer(slot, Err(Error::Device { operation: Operation::Write, offset: 0, source }));
        }
    }
}

/// Why a queue doesn't take a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It is full for now.
    Full,
    /// It never will.
    Failed,
}
