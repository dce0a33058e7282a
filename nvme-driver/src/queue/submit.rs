//! Submission: from a request to commands in the ring that the device doesn't know yet.

use foliant_nvme_spec::command::{
    Cdw0, DatasetManagementCdw10, DatasetManagementCdw11, DatasetManagementRange, ReadWriteCdw12,
    WriteZeroesCdw12,
};
use foliant_nvme_spec::{Command, NvmOpcode};

use super::QueuePair;
use crate::error::SubmitError;
use crate::lists::Lists;
use crate::namespace::{COMMAND_BLOCKS_MAX, Lba, Namespace};
use crate::payload::{Payload, Segment};
use crate::prp::{self, DataPointer, PrpError, SegmentCursor};
use crate::request::{Deallocation, Fua, Io};
use crate::split::Split;

/// A request whose commands are written but not committed.
pub(super) struct Staged {
    pub(super) parent: u16,
    pub(super) commands: u16,
}

/// The fields that all commands of a request share.
#[derive(Clone, Copy)]
struct Template {
    opcode: NvmOpcode,
    nsid: u32,
    /// CDW12 without the number of blocks.
    cdw12: ReadWriteCdw12,
}

impl Template {
    #[inline]
    fn new(opcode: NvmOpcode, namespace: &Namespace) -> Self {
        const CDW12: ReadWriteCdw12 = ReadWriteCdw12::new();
        Self { opcode, nsid: namespace.id(), cdw12: CDW12 }
    }

    #[inline]
    fn with_fua(self, fua: Fua) -> Self {
        Self { cdw12: self.cdw12.with_fua(fua == Fua::Yes), ..self }
    }

    /// A command over `blocks` (1 to 65,536) blocks.
    #[inline]
    fn command(self, cid: u16, (lba, blocks): (Lba, u32), data: DataPointer) -> Command {
        let mut command = Command {
            cdw0: Cdw0::plain(self.opcode.0, cid),
            nsid: self.nsid,
            prp1: data.prp1,
            prp2: data.prp2,
            cdw12: self.cdw12.with_nlb_z((blocks - 1) as u16).into(),
            ..Command::EMPTY
        };
        command.set_slba(lba.0);
        command
    }
}

impl<P: Payload> QueuePair<P> {
    /// Checks a request and writes its commands, without committing them; on an error nothing has changed (Q3).
    #[inline]
    pub(super) fn stage(
        &mut self,
        namespace: &Namespace,
        io: Io,
        payload: &P,
    ) -> Result<Staged, SubmitError> {
        if self.failure.is_some() {
            return Err(SubmitError::Failed);
        }
        if namespace.device_id != self.device_id {
            return Err(SubmitError::ForeignNamespace);
        }
        match io {
            Io::Read { lba, blocks } => {
                let template = Template::new(NvmOpcode::READ, namespace);
                self.stage_transfer(namespace, template, (lba, blocks), payload)
            }
            Io::Write { lba, blocks, fua } => {
                let template = Template::new(NvmOpcode::WRITE, namespace).with_fua(fua);
                self.stage_transfer(namespace, template, (lba, blocks), payload)
            }
            Io::Flush => self.stage_flush(namespace, payload),
            Io::WriteZeroes { lba, blocks, fua, deallocation } => {
                let flags = WriteZeroesCdw12::new()
                    .with_fua(fua == Fua::Yes)
                    .with_deac(deallocation == Deallocation::Allow);
                self.stage_write_zeroes(namespace, flags, lba, blocks, payload)
            }
            Io::Deallocate { lba, blocks } => self.stage_deallocate(namespace, lba, blocks, payload),
        }
    }

    /// Stages a Read or Write.
    #[inline]
    fn stage_transfer(
        &mut self,
        namespace: &Namespace,
        template: Template,
        (lba, blocks): (Lba, u32),
        payload: &P,
    ) -> Result<Staged, SubmitError> {
        namespace.check(lba, blocks)?;
        if !namespace.is_single(lba, blocks) {
            return self.stage_split(namespace, template, (lba, blocks), payload);
        }
        let bytes = namespace.bytes(blocks);
        let slot = self.held.slots.next().ok_or(SubmitError::Full)?;
        let data = prp::build(|| payload.segments(), bytes as u32, || self.held.lists.of(slot));
        let data = data.map_err(|error| refusal(error, bytes, payload))?;
        let cid = self.held.slots.issue(slot, slot);
        self.held.submissions.write(0, template.command(cid, (lba, blocks), data));
        Ok(Staged { parent: slot, commands: 1 })
    }

    /// Stages a Read or Write of several commands: all of them or, on an error, none.
    #[inline(never)]
    fn stage_split(
        &mut self,
        namespace: &Namespace,
        template: Template,
        (lba, blocks): (Lba, u32),
        payload: &P,
    ) -> Result<Staged, SubmitError> {
        let split = Split::new(lba, blocks, namespace.max_transfer_blocks(), namespace.boundary_blocks());
        let bytes = namespace.bytes(blocks);
        if payload_bytes(payload) != bytes {
            return Err(length_mismatch(bytes, payload));
        }
        let mut cursor = SegmentCursor::new(payload.segments());
        self.stage_commands(template, split, |lists, slot, blocks| {
            let data = cursor.take(namespace.bytes(blocks) as u32, || lists.of(slot));
            data.map_err(|error| refusal(error, bytes, payload))
        })
    }

    /// Stages one command for each piece of `split`, with the data pointer that `data` makes for it.
    fn stage_commands(
        &mut self,
        template: Template,
        split: Split,
        mut data: impl FnMut(&mut Lists, u16, u32) -> Result<DataPointer, SubmitError>,
    ) -> Result<Staged, SubmitError> {
        let (commands, slots) = (split.commands(), self.held.slots.len());
        if commands > slots {
            return Err(SubmitError::TooLarge { commands, slots });
        }
        if commands > self.held.slots.free() {
            return Err(SubmitError::Full);
        }
        let parent = self.held.slots.next().ok_or(SubmitError::Full)?;
        let mut slot = parent;
        for (ahead, piece) in (0..).zip(split) {
            let cid = self.held.slots.issue(slot, parent);
            match data(&mut self.held.lists, slot, piece.1) {
                Ok(data) => self.held.submissions.write(ahead, template.command(cid, piece, data)),
                Err(error) => {
                    self.held.slots.withdraw(parent);
                    return Err(error);
                }
            }
            slot = self.held.slots.next().unwrap_or(parent);
        }
        Ok(Staged { parent, commands: commands as u16 })
    }

    fn stage_flush(&mut self, namespace: &Namespace, payload: &P) -> Result<Staged, SubmitError> {
        expect_no_data(payload)?;
        let slot = self.held.slots.next().ok_or(SubmitError::Full)?;
        let cid = self.held.slots.issue(slot, slot);
        let command =
            Command { cdw0: Cdw0::plain(NvmOpcode::FLUSH.0, cid), nsid: namespace.id(), ..Command::EMPTY };
        self.held.submissions.write(0, command);
        Ok(Staged { parent: slot, commands: 1 })
    }

    fn stage_write_zeroes(
        &mut self,
        namespace: &Namespace,
        flags: WriteZeroesCdw12,
        lba: Lba,
        blocks: u32,
        payload: &P,
    ) -> Result<Staged, SubmitError> {
        if !namespace.supports_write_zeroes {
            return Err(SubmitError::Unsupported);
        }
        namespace.check(lba, blocks)?;
        expect_no_data(payload)?;
        // Both layouts keep the number of blocks in the same bits (NVM sections 3.3.6 and 3.3.8).
        let cdw12 = ReadWriteCdw12::from(u32::from(flags));
        let template = Template { opcode: NvmOpcode::WRITE_ZEROES, nsid: namespace.id(), cdw12 };
        let split = Split::new(lba, blocks, COMMAND_BLOCKS_MAX, 0);
        self.stage_commands(template, split, |_, _, _| Ok(DataPointer::default()))
    }

    fn stage_deallocate(
        &mut self,
        namespace: &Namespace,
        lba: Lba,
        blocks: u32,
        payload: &P,
    ) -> Result<Staged, SubmitError> {
        if !namespace.supports_dataset_management {
            return Err(SubmitError::Unsupported);
        }
        namespace.check(lba, blocks)?;
        expect_no_data(payload)?;
        let slot = self.held.slots.next().ok_or(SubmitError::Full)?;
        let range = DatasetManagementRange { context_attributes: 0, length_blocks: blocks, slba: lba.0 };
        let prp1 = self.held.lists.write_range(slot, range);
        let cid = self.held.slots.issue(slot, slot);
        let command = Command {
            cdw0: Cdw0::plain(NvmOpcode::DATASET_MANAGEMENT.0, cid),
            nsid: namespace.id(),
            prp1,
            cdw10: DatasetManagementCdw10::new().with_nr_z(0).into(),
            cdw11: DatasetManagementCdw11::new().with_ad(true).into(),
            ..Command::EMPTY
        };
        self.held.submissions.write(0, command);
        Ok(Staged { parent: slot, commands: 1 })
    }

    #[inline]
    pub(super) fn count_commands(&mut self, io: Io, commands: u16) {
        let counter = match io {
            Io::Read { .. } => &mut self.stats.reads,
            Io::Write { .. } => &mut self.stats.writes,
            Io::Flush => &mut self.stats.flushes,
            Io::WriteZeroes { .. } => &mut self.stats.write_zeroes,
            Io::Deallocate { .. } => &mut self.stats.deallocates,
        };
        *counter += u64::from(commands);
    }
}

/// The sum of a payload's segments in bytes.
fn payload_bytes(payload: &impl Payload) -> u64 {
    payload.segments().map(|Segment { len_bytes, .. }| u64::from(len_bytes)).sum()
}

#[cold]
fn length_mismatch(expected_bytes: u64, payload: &impl Payload) -> SubmitError {
    SubmitError::LengthMismatch { expected_bytes, payload_bytes: payload_bytes(payload) }
}

#[cold]
fn refusal(error: PrpError, expected_bytes: u64, payload: &impl Payload) -> SubmitError {
    match error {
        PrpError::Misaligned(iova) => SubmitError::Misaligned { iova },
        // The lists are sized for the largest transfer, so only a payload of another length gets here.
        PrpError::Short | PrpError::Long | PrpError::ListFull => length_mismatch(expected_bytes, payload),
    }
}

fn expect_no_data(payload: &impl Payload) -> Result<(), SubmitError> {
    if payload.segments().all(|segment| segment.len_bytes == 0) {
        Ok(())
    } else {
        Err(length_mismatch(0, payload))
    }
}
