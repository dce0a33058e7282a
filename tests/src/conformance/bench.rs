//! The bench on which a controller lies while the suite runs: how to reach it, what it offers, and what may be
//! written. It knows no kind of controller; whoever makes the bench brings the transport.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

use foliant_nvme::{Controller, ControllerIdentity, ControllerOptions, DriverError, Namespace, Transport};

use super::deviation::Deviation;
use super::host::Host;
use super::raw::RawHost;

/// The fewest bytes of a namespace that the suite needs to itself.
pub const AREA_BYTES_MIN: u64 = 4 << 20;

/// I/O queue pairs that the suite asks for at most.
pub(super) const QUEUE_PAIRS_MAX: u16 = 16;

/// A controller, as the suite works with it.
///
/// Each case opens the controller afresh and has let go of it when it returns.
pub struct Bench {
    open: Box<dyn Fn() -> Arc<dyn Transport>>,
    options: ControllerOptions,
    area_bytes: u64,
    facts: Facts,
    deviations: RefCell<Vec<Deviation>>,
}

/// What the controller offers, as it said when the bench was made.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Who it is, and what it grants when it is asked for many queue pairs.
    pub identity: ControllerIdentity,
    /// Its namespaces; at least one.
    pub namespaces: Vec<Namespace>,
    /// Bytes that may be written at the start of each namespace.
    pub area_bytes: u64,
    /// Asynchronous Event Requests that it holds at once (AERL + 1).
    pub event_requests: u16,
}

/// Why a controller can't be laid on the bench.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// The driver can't open the controller.
    #[error("the controller does not open: {0}")]
    Driver(#[from] DriverError),
    /// There is nothing to write to.
    #[error("the controller has no namespace that the driver can serve; give it one of at least 4 MiB")]
    NoNamespace,
    /// Too little may be written.
    #[error(
        "{area_bytes} bytes of the first namespace may be written, and the suite needs {AREA_BYTES_MIN}; allow \
         more, or use a larger namespace"
    )]
    SmallArea {
        /// What may be written, in bytes.
        area_bytes: u64,
    },
}

impl Bench {
    /// A bench for the controller that `open` reaches. `open` is called again and again, never while a transport of
    /// an earlier call is alive; it panics when it can't open one.
    ///
    /// `options` are those of an ordinary case, with an arena of at least 8 MiB; a case that is about queues or
    /// limits changes them.
    /// The first `area_bytes` bytes of **every namespace are overwritten**.
    ///
    /// # Errors
    /// [`BenchError`] when the controller can't be opened, or offers nothing to write to.
    pub fn new(
        open: impl Fn() -> Arc<dyn Transport> + 'static,
        options: ControllerOptions,
        area_bytes: u64,
    ) -> Result<Self, BenchError> {
        let many = ControllerOptions { io_queue_pairs: QUEUE_PAIRS_MAX, ..options };
        let transport = open();
        let controller = Controller::open(transport.clone(), &many)?;
        let (identity, namespaces) = (controller.identity().clone(), controller.namespaces().to_vec());
        controller.shutdown()?;
        let first = namespaces.first().ok_or(BenchError::NoNamespace)?;
        let area_bytes = area_bytes.min(first.blocks() * u64::from(first.block_bytes()));
        if area_bytes < AREA_BYTES_MIN {
            return Err(BenchError::SmallArea { area_bytes });
        }
        let event_requests = u16::from(RawHost::open(transport).identify_controller().aerl_z) + 1;
        let facts = Facts { identity, namespaces, area_bytes, event_requests };
        Ok(Self { open: Box::new(open), options, area_bytes, facts, deviations: RefCell::default() })
    }

    /// What the controller offers.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The options of an ordinary case.
    pub(super) fn options(&self) -> ControllerOptions {
        self.options
    }

    /// Bytes at the start of each namespace that may be written.
    pub(super) fn area_bytes(&self) -> u64 {
        self.area_bytes
    }

    /// The way to the controller, opened afresh.
    pub(super) fn transport(&self) -> Arc<dyn Transport> {
        (self.open)()
    }

    /// The driver on the controller, with a queue pair.
    pub(super) fn host(&self) -> Host {
        self.host_with(&self.options)
    }

    /// As [`host`](Self::host), with options of the case's own.
    pub(super) fn host_with(&self, options: &ControllerOptions) -> Host {
        Host::open(self.transport(), options).expect("the controller opens")
    }

    /// The controller without the driver: commands that the driver would never send.
    pub(super) fn raw(&self) -> RawHost {
        RawHost::open(self.transport())
    }

    /// Notes that the device departs from the specification in a way that is known and listed.
    pub(super) fn deviates(&self, deviation: Deviation) {
        let mut deviations = self.deviations.borrow_mut();
        if !deviations.contains(&deviation) {
            deviations.push(deviation);
        }
    }

    /// What was noted since the last call.
    pub(super) fn take_deviations(&self) -> Vec<Deviation> {
        self.deviations.take()
    }
}

impl fmt::Debug for Bench {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bench")
            .field("facts", &self.facts)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// What a case asks of the controller beyond what every controller has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The Write Zeroes command.
    WriteZeroes,
    /// Dataset Management, and with it Deallocate.
    Deallocate,
    /// So many namespaces.
    Namespaces(usize),
    /// So many I/O queue pairs.
    QueuePairs(u16),
    /// One command that moves so many bytes.
    TransferBytes(u32),
    /// A limit of a transfer (MDTS) that is no more than so many bytes.
    TransferLimitBytes(u32),
    /// So many bytes at the start of the first namespace that may be written.
    AreaBytes(u64),
    /// Blocks, in the first namespace, of at most so many bytes.
    BlockBytesMax(u32),
    /// A limit of Asynchronous Event Requests (AERL) that is no more than so many.
    EventRequestsMax(u16),
}

impl Need {
    /// Why the case doesn't apply to a controller of these facts; `None` when it does.
    #[must_use]
    pub fn missing(self, facts: &Facts) -> Option<String> {
        let identity = &facts.identity;
        let mdts = identity.mdts_bytes;
        let limit = || mdts.map_or_else(|| "none".to_owned(), |bytes| format!("{bytes} bytes"));
        let (is_met, reason) = match self {
            Self::WriteZeroes => {
                (identity.write_zeroes, "the controller has no Write Zeroes (ONCS)".to_owned())
            }
            Self::Deallocate => {
                (identity.dataset_management, "the controller has no Dataset Management (ONCS)".to_owned())
            }
            Self::Namespaces(needed) => {
                let found = facts.namespaces.len();
                (found >= needed, format!("{needed} namespaces are needed, the controller has {found}"))
            }
            Self::QueuePairs(needed) => {
                let granted = identity.queue_pairs;
                let reason = format!("{needed} I/O queue pairs are needed, the controller grants {granted}");
                (granted >= needed, reason)
            }
            Self::TransferBytes(needed) => {
                let reason = format!("a transfer of {needed} bytes is needed, MDTS is {}", limit());
                (mdts.is_none_or(|bytes| bytes >= needed), reason)
            }
            Self::TransferLimitBytes(max) => {
                let reason = format!("a limit of at most {max} bytes is needed, MDTS is {}", limit());
                (mdts.is_some_and(|bytes| bytes <= max), reason)
            }
            Self::AreaBytes(needed) => {
                let area = facts.area_bytes;
                (area >= needed, format!("{needed} bytes to write to are needed, {area} are allowed"))
            }
            Self::BlockBytesMax(max) => {
                let block = facts.namespaces.first().map_or(0, Namespace::block_bytes);
                (block <= max, format!("blocks of at most {max} bytes are needed, the namespace has {block}"))
            }
            Self::EventRequestsMax(max) => {
                let held = facts.event_requests;
                (
                    held <= max,
                    format!("at most {max} event requests can be tried, the controller holds {held}"),
                )
            }
        };
        (!is_met).then_some(reason)
    }
}
