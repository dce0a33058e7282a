//! Who the controller is and what it granted.

use foliant_nvme_spec::identify;
use foliant_nvme_spec::registers::Vs;

/// How the model number of QEMU's controller begins. It ignores FUA while its write cache is on (seen in the logs of writes that
/// the guest lab takes; `docs/conformance.md`).
const MODEL_WITHOUT_FUA: &str = "QEMU NVMe";

/// What a controller said of itself, and what the driver was granted when it opened it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ControllerIdentity {
    /// PCI vendor identifier (VID).
    pub vendor_id: u16,
    /// Serial number (SN), without padding.
    pub serial: String,
    /// Model number (MN), without padding.
    pub model: String,
    /// Firmware revision (FR), without padding.
    pub firmware: String,
    /// Version of the Base specification the controller implements, such as "1.4.0" (VS).
    pub version: String,
    /// The controller's own limit of a transfer in bytes (MDTS); `None` where it has none.
    pub mdts_bytes: Option<u32>,
    /// The largest transfer of one command in bytes that the driver uses: MDTS or the option, whichever is less.
    pub max_transfer_bytes: u32,
    /// The controller has a volatile write cache and it's enabled: writes need a Flush or FUA to be durable.
    pub volatile_write_cache: bool,
    /// A write with FUA is durable when it completes. The specification asks it of every controller; QEMU's ignores the bit.
    pub force_unit_access: bool,
    /// Write Zeroes is supported (ONCS).
    pub write_zeroes: bool,
    /// Dataset Management, and with it Deallocate, is supported (ONCS).
    pub dataset_management: bool,
    /// Blocks that a write may have and still be atomic over a power failure (AWUPF + 1), where the namespace
    /// says nothing else.
    pub atomic_write_blocks_power_fail: u32,
    /// I/O queue pairs granted.
    pub queue_pairs: u16,
    /// Entries of each I/O queue; a queue pair holds one command less.
    pub queue_entries: u16,
}

impl ControllerIdentity {
    /// Reads Identify Controller. What was granted is filled in by whoever was granted it.
    pub(crate) fn new(identify: &identify::Controller, vs: Vs, mps_bytes: u32) -> Self {
        let mdts_bytes = match identify.mdts {
            0 => None,
            exponent => {
                Some(mps_bytes.checked_shl(u32::from(exponent)).filter(|&b| b != 0).unwrap_or(u32::MAX))
            }
        };
        Self {
            vendor_id: identify.vid,
            force_unit_access: !text(&identify.mn).starts_with(MODEL_WITHOUT_FUA),
            serial: text(&identify.sn),
            model: text(&identify.mn),
            firmware: text(&identify.fr),
            version: vs.to_string(),
            mdts_bytes,
            write_zeroes: identify.oncs.write_zeroes(),
            dataset_management: identify.oncs.dataset_management(),
            atomic_write_blocks_power_fail: u32::from(identify.awupf_z) + 1,
            ..Self::default()
        }
    }
}

/// An ASCII field without its padding; bytes that aren't printable ASCII become `?`.
fn text(field: &[u8]) -> String {
    let printable = |&byte: &u8| if byte == b' ' || byte.is_ascii_graphic() { char::from(byte) } else { '?' };
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    field[..end].iter().map(printable).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    #[test]
    fn text_fields_lose_their_padding_and_what_is_not_printable() {
        assert_eq!(text(b"  Foliant 1   "), "Foliant 1");
        assert_eq!(text(b"abc\0def"), "abc");
        assert_eq!(text(b"a\x1b[2J"), "a?[2J");
    }

    #[test]
    fn the_transfer_limit_is_a_power_of_two_of_pages_and_never_overflows() {
        let mdts_bytes = |mdts| {
            let mut identify = identify::Controller::new_zeroed();
            identify.mdts = mdts;
            ControllerIdentity::new(&identify, Vs::new(), 4096).mdts_bytes
        };
        assert_eq!(mdts_bytes(0), None);
        assert_eq!(mdts_bytes(5), Some(128 << 10));
        assert_eq!(mdts_bytes(20), Some(u32::MAX));
        assert_eq!(mdts_bytes(255), Some(u32::MAX));
    }
}
