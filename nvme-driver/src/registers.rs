//! Typed access to the controller's registers. All-ones reads become [`DriverError::Gone`] here, once.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use foliant_nvme_spec::registers::{
    ALL_ONES_U32, ALL_ONES_U64, Aqa, Cap, Cc, Crto, Csts, Register, Vs, completion_head_doorbell,
    submission_tail_doorbell,
};
use foliant_nvme_transport::{Iova, Transport};

use crate::error::DriverError;

/// The registers of one controller.
pub(crate) struct Registers {
    transport: Arc<dyn Transport>,
}

impl Registers {
    pub(crate) fn new(transport: Arc<dyn Transport>) -> Self {
        Self { transport }
    }

    pub(crate) fn cap(&self) -> Result<Cap, DriverError> {
        match self.transport.read_u64(Register::Cap.offset())? {
            ALL_ONES_U64 => Err(DriverError::Gone),
            cap => Ok(Cap::from(cap)),
        }
    }

    pub(crate) fn vs(&self) -> Result<Vs, DriverError> {
        Ok(Vs::from(self.read_u32(Register::Vs)?))
    }

    pub(crate) fn cc(&self) -> Result<Cc, DriverError> {
        Ok(Cc::from(self.read_u32(Register::Cc)?))
    }

    pub(crate) fn set_cc(&self, cc: Cc) -> Result<(), DriverError> {
        Ok(self.transport.write_u32(Register::Cc.offset(), cc.into())?)
    }

    pub(crate) fn csts(&self) -> Result<Csts, DriverError> {
        Ok(Csts::from(self.read_u32(Register::Csts)?))
    }

    pub(crate) fn crto(&self) -> Result<Crto, DriverError> {
        Ok(Crto::from(self.read_u32(Register::Crto)?))
    }

    /// Tells a disabled controller where its admin queues are and how many entries each has.
    pub(crate) fn set_admin_queues(&self, entries: u16, sq: Iova, cq: Iova) -> Result<(), DriverError> {
        let aqa = Aqa::new().with_asqs_z(entries - 1).with_acqs_z(entries - 1);
        self.transport.write_u32(Register::Aqa.offset(), aqa.into())?;
        self.transport.write_u64(Register::Asq.offset(), sq.0)?;
        self.transport.write_u64(Register::Acq.offset(), cq.0)?;
        Ok(())
    }

    /// The tail doorbell of submission queue `qid` and the head doorbell of completion queue `qid`.
    pub(crate) fn doorbells(&self, qid: u16, cap: Cap) -> Result<QueueDoorbells, DriverError> {
        let doorbells = self.transport.doorbells();
        let register = |offset| {
            doorbells.register(offset).ok_or_else(|| DriverError::Unsupported {
                what: format!(
                    "the doorbell of queue {qid} at offset {offset:#x} lies outside the mapped doorbells"
                ),
            })
        };
        Ok(QueueDoorbells {
            submission_tail: register(submission_tail_doorbell(qid, cap.dstrd()))?,
            completion_head: register(completion_head_doorbell(qid, cap.dstrd()))?,
        })
    }

    fn read_u32(&self, register: Register) -> Result<u32, DriverError> {
        match self.transport.read_u32(register.offset())? {
            ALL_ONES_U32 => Err(DriverError::Gone),
            value => Ok(value),
        }
    }
}

/// The two doorbell registers of a queue pair; valid as long as the transport lives.
#[derive(Clone, Copy)]
pub(crate) struct QueueDoorbells {
    pub(crate) submission_tail: NonNull<AtomicU32>,
    pub(crate) completion_head: NonNull<AtomicU32>,
}
