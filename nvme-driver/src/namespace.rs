//! A namespace: its size and limits, as a request needs them.

use foliant_nvme_spec::identify;

use crate::error::SubmitError;
use crate::identity::ControllerIdentity;
use crate::split::Split;

/// A logical block address, counted in blocks of the namespace's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lba(pub u64);

/// The most blocks one Read, Write or Write Zeroes command covers (NVM section 3.3.4: NLB has 16 bits).
pub(crate) const COMMAND_BLOCKS_MAX: u32 = 1 << 16;

/// One namespace of a controller, as it was when the controller was opened.
#[derive(Clone, Debug)]
pub struct Namespace {
    /// The controller it belongs to, so that another one's queue refuses it.
    pub(crate) device_id: u64,
    id: u32,
    block_shift: u8,
    blocks: u64,
    max_transfer_blocks: u32,
    /// 0 for none.
    optimal_boundary_blocks: u16,
    atomic_write_blocks_power_fail: u32,
    pub(crate) supports_write_zeroes: bool,
    pub(crate) supports_dataset_management: bool,
}

impl Namespace {
    /// Reads what Identify said. An `Err` says what of it this driver can't work with.
    pub(crate) fn new(
        device_id: u64,
        id: u32,
        identify: &identify::Namespace,
        identity: &ControllerIdentity,
    ) -> Result<Self, String> {
        let format = identify.formatted_lba().ok_or_else(|| {
            format!("FLBAS names format {}, past NLBAF {}", identify.flbas.index(), identify.nlbaf_z)
        })?;
        if !(9..=16).contains(&format.lbads()) {
            return Err(format!("blocks of 2^{} bytes; 2^9 to 2^16 are supported", format.lbads()));
        }
        if format.ms() != 0 {
            return Err(format!("{} bytes of metadata a block; format it without metadata", format.ms()));
        }
        if identify.dps.pit() != 0 {
            return Err("end-to-end protection is on; format it without".to_owned());
        }
        let block_shift = format.lbads();
        let max_transfer_blocks = (identity.max_transfer_bytes >> block_shift).min(COMMAND_BLOCKS_MAX);
        if max_transfer_blocks == 0 {
            return Err(format!(
                "a block of {} bytes exceeds the largest transfer of {} bytes; raise max_transfer_bytes",
                1u32 << block_shift,
                identity.max_transfer_bytes
            ));
        }
        Ok(Self {
            device_id,
            id,
            block_shift,
            blocks: identify.nsze,
            max_transfer_blocks,
            optimal_boundary_blocks: identify.noiob,
            atomic_write_blocks_power_fail: atomic_blocks(identify, identity),
            supports_write_zeroes: identity.write_zeroes,
            supports_dataset_management: identity.dataset_management,
        })
    }

    /// The namespace identifier (NSID).
    #[inline]
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Size in blocks (NSZE).
    #[inline]
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Size of a block in bytes; a power of two.
    #[inline]
    #[must_use]
    pub fn block_bytes(&self) -> u32 {
        1 << self.block_shift
    }

    /// The most one command transfers, in bytes, a multiple of the block size: the least of MDTS,
    /// [`ControllerOptions::max_transfer_bytes`](crate::ControllerOptions::max_transfer_bytes) and 65,536
    /// blocks. Longer requests are split.
    #[must_use]
    pub fn max_transfer_bytes(&self) -> u32 {
        self.max_transfer_blocks << self.block_shift
    }

    /// The boundary in blocks that reads and writes best don't cross (NOIOB), where the namespace names one.
    /// Requests that cross it are split there.
    #[must_use]
    pub fn optimal_boundary_blocks(&self) -> Option<u32> {
        (self.optimal_boundary_blocks != 0).then_some(u32::from(self.optimal_boundary_blocks))
    }

    /// How many blocks a write may have and still be all old or all new after a power failure (NAWUPF, else
    /// AWUPF; Base section 5.1.13.2.1, NVM section 2.1.4); at least 1.
    #[must_use]
    pub fn atomic_write_blocks_power_fail(&self) -> u32 {
        self.atomic_write_blocks_power_fail
    }

    #[inline]
    pub(crate) fn max_transfer_blocks(&self) -> u32 {
        self.max_transfer_blocks
    }

    /// Whether a run of blocks fits into one command: it isn't too long and crosses no boundary.
    #[inline]
    pub(crate) fn is_single(&self, lba: Lba, blocks: u32) -> bool {
        blocks <= self.max_transfer_blocks
            && (self.optimal_boundary_blocks == 0
                || Split::new(lba, blocks, self.max_transfer_blocks, self.boundary_blocks()).is_single())
    }

    /// The boundary in blocks, 0 for none.
    #[inline]
    pub(crate) fn boundary_blocks(&self) -> u32 {
        u32::from(self.optimal_boundary_blocks)
    }

    /// Size of `blocks` blocks in bytes.
    #[inline]
    pub(crate) fn bytes(&self, blocks: u32) -> u64 {
        u64::from(blocks) << self.block_shift
    }

    /// Checks that there are blocks and that all of them lie in the namespace.
    #[inline]
    pub(crate) fn check(&self, lba: Lba, blocks: u32) -> Result<(), SubmitError> {
        let fits = self.blocks.checked_sub(lba.0).is_some_and(|room| u64::from(blocks) <= room);
        if fits && blocks > 0 {
            return Ok(());
        }
        Err(SubmitError::OutOfRange { lba: lba.0, blocks, namespace_blocks: self.blocks })
    }
}

/// NAWUPF counts when the namespace defines it and it isn't 0, which means "as AWUPF" (NVM section 4.1.5.1).
fn atomic_blocks(identify: &identify::Namespace, identity: &ControllerIdentity) -> u32 {
    if identify.nsfeat.nsabp() && identify.nawupf_z != 0 {
        u32::from(identify.nawupf_z) + 1
    } else {
        identity.atomic_write_blocks_power_fail
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use foliant_nvme_spec::identify::{Dps, Flbas, LbaFormat, Nsfeat};
    use zerocopy::FromZeros;

    fn identify() -> identify::Namespace {
        let mut identify = identify::Namespace::new_zeroed();
        identify.nsze = 1000;
        identify.lbaf[0] = LbaFormat::new().with_lbads(9);
        identify
    }

    fn namespace(identify: &identify::Namespace) -> Result<Namespace, String> {
        let identity = ControllerIdentity {
            max_transfer_bytes: 1 << 20,
            atomic_write_blocks_power_fail: 8,
            ..ControllerIdentity::default()
        };
        Namespace::new(0, 1, identify, &identity)
    }

    #[test]
    fn limits_come_from_the_format_and_the_controller() {
        let namespace = namespace(&identify()).unwrap();
        assert_eq!((namespace.blocks(), namespace.block_bytes()), (1000, 512));
        assert_eq!(namespace.max_transfer_bytes(), 1 << 20);
        assert_eq!(namespace.optimal_boundary_blocks(), None);
    }

    #[test]
    fn a_command_covers_65536_blocks_at_most() {
        let identity = ControllerIdentity { max_transfer_bytes: 1 << 30, ..ControllerIdentity::default() };
        let namespace = Namespace::new(0, 1, &identify(), &identity).unwrap();
        assert_eq!(namespace.max_transfer_bytes(), 65536 * 512);
    }

    #[test]
    fn the_namespaces_own_atomic_unit_counts_only_where_it_is_defined() {
        let mut identify = identify();
        identify.nawupf_z = 31;
        assert_eq!(namespace(&identify).unwrap().atomic_write_blocks_power_fail(), 8);
        identify.nsfeat = Nsfeat::new().with_nsabp(true);
        assert_eq!(namespace(&identify).unwrap().atomic_write_blocks_power_fail(), 32);
        identify.nawupf_z = 0;
        assert_eq!(namespace(&identify).unwrap().atomic_write_blocks_power_fail(), 8);
    }

    #[test]
    fn formats_this_driver_cannot_serve_are_refused_with_a_reason() {
        let mut metadata = identify();
        metadata.lbaf[0] = LbaFormat::new().with_lbads(9).with_ms(8);
        assert!(namespace(&metadata).unwrap_err().contains("8 bytes of metadata"));
        let mut protected = identify();
        protected.dps = Dps::new().with_pit(1);
        assert!(namespace(&protected).unwrap_err().contains("protection"));
        let mut tiny = identify();
        tiny.lbaf[0] = LbaFormat::new().with_lbads(8);
        assert!(namespace(&tiny).unwrap_err().contains("2^8"));
        let mut wrong = identify();
        wrong.flbas = Flbas::new().with_index_low(3);
        assert!(namespace(&wrong).unwrap_err().contains("format 3"));
    }

    #[test]
    fn a_run_must_lie_in_the_namespace_and_not_be_empty() {
        let namespace = namespace(&identify()).unwrap();
        assert!(namespace.check(Lba(992), 8).is_ok());
        assert!(namespace.check(Lba(993), 8).is_err());
        assert!(namespace.check(Lba(u64::MAX), 1).is_err());
        assert!(namespace.check(Lba(0), 0).is_err());
    }
}
