//! The NVM Command Set: checks a command and says what it asks of the medium.
//!
//! Checks run in the order opcode independent fields, opcode, namespace, size, range, data pointer, so that a
//! command with several mistakes gets the status a device would give (NVM section 3, Base section 4.2.3).

use foliant_nvme_spec::command::{
    DatasetManagementCdw10, DatasetManagementCdw11, DatasetManagementRange, Psdt, ReadWriteCdw12,
    WriteZeroesCdw12,
};
use foliant_nvme_spec::{Command, NSID_ALL, NvmOpcode, StatusCode};
use zerocopy::{FromZeros, IntoBytes};

use crate::backing::{Durability, Extent, Work, Zeroing};
use crate::config::{NamespaceConfig, PAGE_BYTES_MIN};
use crate::dma::DmaView;
use crate::prp::{self, Segment};

/// A namespace as I/O commands need it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Namespace {
    pub(crate) blocks: u64,
    pub(crate) block_bytes: u32,
    block_shift: u32,
    /// Where it starts on the medium, in bytes.
    pub(crate) offset: u64,
}

impl Namespace {
    pub(crate) fn new(config: NamespaceConfig, size_bytes: u64, offset: u64) -> Self {
        let block_shift = config.block_bytes.trailing_zeros();
        Self { blocks: size_bytes >> block_shift, block_bytes: config.block_bytes, block_shift, offset }
    }

    pub(crate) const fn extent(&self) -> Extent {
        Extent { offset: self.offset, len_bytes: self.blocks << self.block_shift }
    }

    /// The bytes of `blocks` blocks from `slba`.
    fn range(&self, slba: u64, blocks: u64) -> Result<Extent, StatusCode> {
        let end = slba.checked_add(blocks).filter(|end| *end <= self.blocks);
        end.ok_or(StatusCode::LBA_OUT_OF_RANGE)?;
        let offset = self.offset + (slba << self.block_shift);
        Ok(Extent { offset, len_bytes: blocks << self.block_shift })
    }
}

/// What every queue knows about the device, unchanging.
#[derive(Debug)]
pub(crate) struct Limits {
    pub(crate) namespaces: Box<[Namespace]>,
    /// Largest transfer in bytes; `u64::MAX` for none.
    pub(crate) transfer_bytes_max: u64,
}

impl Limits {
    pub(crate) fn new(namespaces: Box<[Namespace]>, mdts: u8) -> Self {
        let transfer_bytes_max = if mdts == 0 { u64::MAX } else { PAGE_BYTES_MIN << mdts };
        Self { namespaces, transfer_bytes_max }
    }

    /// The namespace with this id.
    pub(crate) fn namespace(&self, nsid: u32) -> Result<&Namespace, StatusCode> {
        let index = nsid.checked_sub(1).ok_or(StatusCode::INVALID_NAMESPACE)?;
        self.namespaces.get(index as usize).ok_or(StatusCode::INVALID_NAMESPACE)
    }
}

/// Memory that decoding reuses from command to command.
#[derive(Debug)]
pub(crate) struct Scratch {
    pub(crate) segments: Vec<Segment>,
    extents: Vec<Extent>,
}

impl Scratch {
    /// For commands of up to 1 MiB whose pages lie apart; a larger one makes it grow.
    const PAGES: usize = 257;

    pub(crate) fn new() -> Self {
        Self { segments: Vec::with_capacity(Self::PAGES), extents: Vec::new() }
    }
}

/// A command that passed its checks. Its data segments are in the scratch that it was decoded with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) kind: RequestKind,
    pub(crate) slba: u64,
    /// 0 for a command without a range of its own.
    pub(crate) blocks: u32,
    pub(crate) fua: bool,
    extent: Extent,
}

/// What a request is, for counting and for its latency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestKind {
    Read,
    Write,
    Flush,
    WriteZeroes(Zeroing),
    Deallocate,
    /// Dataset Management that deallocates nothing: a hint.
    Hint,
}

impl Request {
    /// What the request asks of the medium; `None` when there's nothing to do.
    #[inline]
    pub(crate) fn work<'a>(&self, scratch: &'a Scratch, cache: Durability) -> Option<Work<'a>> {
        let durability = if self.fua { Durability::AtCompletion } else { cache };
        let (extent, segments) = (self.extent, scratch.segments.as_slice());
        Some(match self.kind {
            RequestKind::Read => Work::Read { extent, segments },
            RequestKind::Write => Work::Write { extent, segments, durability },
            RequestKind::Flush if cache == Durability::AtCompletion => return None,
            RequestKind::Flush => Work::Flush { extent },
            RequestKind::WriteZeroes(zeroing) => {
                Work::Zero { extents: &scratch.extents, zeroing, durability }
            }
            RequestKind::Deallocate => {
                Work::Zero { extents: &scratch.extents, zeroing: Zeroing::Deallocate, durability }
            }
            RequestKind::Hint => return None,
        })
    }

    /// Bytes that the request's data takes.
    #[inline]
    pub(crate) const fn len_bytes(&self) -> u64 {
        self.extent.len_bytes
    }
}

/// Checks `command`.
///
/// # Errors
/// The status the command is refused with.
#[inline]
pub(crate) fn decode(
    command: &Command,
    limits: &Limits,
    dma: &mut DmaView,
    scratch: &mut Scratch,
) -> Result<Request, StatusCode> {
    // Neither fused operations nor SGLs are supported (FUSES = 0, SGLS = 0).
    if command.cdw0.fuse() != 0 || command.cdw0.psdt() != Psdt::Prp {
        return Err(StatusCode::INVALID_FIELD);
    }
    scratch.segments.clear();
    match NvmOpcode(command.cdw0.opcode()) {
        NvmOpcode::READ => decode_transfer(command, RequestKind::Read, limits, dma, scratch),
        NvmOpcode::WRITE => decode_transfer(command, RequestKind::Write, limits, dma, scratch),
        NvmOpcode::FLUSH => decode_flush(command, limits),
        NvmOpcode::WRITE_ZEROES => decode_write_zeroes(command, limits, scratch),
        NvmOpcode::DATASET_MANAGEMENT => decode_dataset_management(command, limits, dma, scratch),
        _ => Err(StatusCode::INVALID_OPCODE),
    }
}

#[inline]
fn decode_transfer(
    command: &Command,
    kind: RequestKind,
    limits: &Limits,
    dma: &mut DmaView,
    scratch: &mut Scratch,
) -> Result<Request, StatusCode> {
    let namespace = limits.namespace(command.nsid)?;
    let cdw12 = ReadWriteCdw12::from(command.cdw12);
    let blocks = u32::from(cdw12.nlb_z()) + 1;
    if u64::from(blocks) << namespace.block_shift > limits.transfer_bytes_max {
        return Err(StatusCode::INVALID_FIELD);
    }
    // Directives aren't supported (OACS), so a directive type is a reserved value.
    if kind == RequestKind::Write && cdw12.dtype() != 0 {
        return Err(StatusCode::INVALID_FIELD);
    }
    let extent = namespace.range(command.slba(), blocks.into())?;
    prp::walk(dma, command.prp1, command.prp2, extent.len_bytes, &mut scratch.segments)?;
    Ok(Request { kind, slba: command.slba(), blocks, fua: cdw12.fua(), extent })
}

/// Flush (Base section 7.2): of one namespace, or with NSID FFFFFFFFh of all (VWC says so).
fn decode_flush(command: &Command, limits: &Limits) -> Result<Request, StatusCode> {
    let extent = if command.nsid == NSID_ALL {
        Extent { offset: 0, len_bytes: limits.namespaces.last().map_or(0, |last| last.extent().end()) }
    } else {
        limits.namespace(command.nsid)?.extent()
    };
    Ok(Request { kind: RequestKind::Flush, slba: 0, blocks: 0, fua: false, extent })
}

fn decode_write_zeroes(
    command: &Command,
    limits: &Limits,
    scratch: &mut Scratch,
) -> Result<Request, StatusCode> {
    let namespace = limits.namespace(command.nsid)?;
    let cdw12 = WriteZeroesCdw12::from(command.cdw12);
    if cdw12.nsz() {
        return Err(StatusCode::INVALID_FIELD);
    }
    let blocks = u32::from(cdw12.nlb_z()) + 1;
    let extent = namespace.range(command.slba(), blocks.into())?;
    scratch.extents.clear();
    scratch.extents.push(extent);
    let zeroing = if cdw12.deac() { Zeroing::Deallocate } else { Zeroing::Keep };
    let kind = RequestKind::WriteZeroes(zeroing);
    Ok(Request { kind, slba: command.slba(), blocks, fua: cdw12.fua(), extent })
}

fn decode_dataset_management(
    command: &Command,
    limits: &Limits,
    dma: &mut DmaView,
    scratch: &mut Scratch,
) -> Result<Request, StatusCode> {
    let namespace = limits.namespace(command.nsid)?;
    let count = usize::from(DatasetManagementCdw10::from(command.cdw10).nr_z()) + 1;
    let len_bytes = (count * size_of::<DatasetManagementRange>()) as u64;
    prp::walk(dma, command.prp1, command.prp2, len_bytes, &mut scratch.segments)?;
    let mut ranges = [DatasetManagementRange::new_zeroed(); 256];
    prp::copy_from_host(&scratch.segments, ranges[..count].as_mut_bytes());
    scratch.extents.clear();
    for range in &ranges[..count] {
        scratch.extents.push(namespace.range(range.slba, range.length_blocks.into())?);
    }
    let deallocates = DatasetManagementCdw11::from(command.cdw11).ad();
    let kind = if deallocates { RequestKind::Deallocate } else { RequestKind::Hint };
    Ok(Request { kind, slba: 0, blocks: 0, fua: false, extent: namespace.extent() })
}
