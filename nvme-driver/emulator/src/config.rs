//! What an emulated controller is made of: its backing, namespaces, limits and modelled behaviour.
//!
//! [`EmulatedConfig`] is plain data; [`validate`](EmulatedConfig::validate) holds every limit in one place, so a
//! configuration from a URI and one built by hand are refused with the same words. URIs are read in
//! [`uri`](crate::uri).

use std::path::PathBuf;
use std::time::Duration;

use crate::bandwidth::Bandwidth;
use crate::clock::Clock;

/// Smallest memory page of the controller (CAP.MPSMIN = 0) and the unit of MDTS, in bytes.
pub(crate) const PAGE_BYTES_MIN: u64 = 4096;
/// Entries that CAP.MQES can express at most.
pub(crate) const QUEUE_ENTRIES_LIMIT: u32 = 65_536;
/// I/O queue pairs that the doorbell region has room for.
pub(crate) const QUEUE_PAIRS_LIMIT: u16 = 1024;
/// Namespaces that one Identify active list (1,024 entries) names without paging.
pub(crate) const NAMESPACES_LIMIT: usize = 1024;
/// Largest MDTS: 4 KiB << 16 is 256 MiB, what 65,536 blocks of 4 KiB come to.
pub(crate) const MDTS_LIMIT: u8 = 16;
/// Largest power-fail atomic unit in bytes: the RAM store keeps a write whole within this span.
pub(crate) const ATOMIC_BYTES_MAX: u64 = 64 * 1024;

/// Everything that [`EmulatedController::new`](crate::EmulatedController::new) needs to know.
///
/// Start from [`null`](Self::null), [`ram`](Self::ram), [`file`](Self::file) or [`parse_uri`](Self::parse_uri) and
/// change fields from there.
#[derive(Clone, Debug)]
pub struct EmulatedConfig {
    /// Where the blocks live.
    pub backing: Backing,
    /// The namespaces, with ids 1, 2, … in this order; at least one.
    pub namespaces: Vec<NamespaceConfig>,
    /// Identify Controller MDTS: a command moves at most 4 KiB << `mdts`; 0 reports no limit.
    pub mdts: u8,
    /// I/O queue pairs that Set Features Number of Queues grants at most, 1–1,024.
    pub queue_pairs_max: u16,
    /// Entries that a queue may have at most (CAP.MQES + 1), 2–65,536.
    pub queue_entries_max: u32,
    /// Whether the device has a volatile write cache, switched on. Feature 06h switches it off and on.
    pub volatile_write_cache: bool,
    /// How long commands take, on top of what the backing takes.
    pub latency: Latency,
    /// How fast data moves, transfer after transfer.
    pub bandwidth: Bandwidth,
    /// Optimal I/O boundary reported in Identify Namespace NOIOB, in blocks; 0 reports none.
    pub noiob_blocks: u16,
    /// AWUPF: blocks written atomically across a power failure, zero-based, in units aligned to their size.
    pub awupf_z: u16,
    /// Keep every version since the last Flush, so that [`power_cut`](crate::EmulatedController::power_cut) can
    /// decide what survives. Needs the RAM backing.
    pub power_loss_model: bool,
    /// The clock by which delays end.
    pub clock: Clock,
    /// Serial number in Identify Controller, 1–20 printable ASCII characters.
    pub serial: String,
}

/// One namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceConfig {
    /// Size in bytes, a multiple of `block_bytes`. `None` takes the whole of an existing image file, and is
    /// allowed only for the single namespace of a file.
    pub size_bytes: Option<u64>,
    /// Logical block size in bytes: 512 or 4096.
    pub block_bytes: u32,
}

impl NamespaceConfig {
    /// A namespace of `size_bytes` bytes in blocks of `block_bytes`.
    #[must_use]
    pub const fn new(size_bytes: u64, block_bytes: u32) -> Self {
        Self { size_bytes: Some(size_bytes), block_bytes }
    }

    /// A namespace as large as the existing image file.
    #[must_use]
    pub const fn whole_file(block_bytes: u32) -> Self {
        Self { size_bytes: None, block_bytes }
    }
}

/// Where the blocks of an emulated device live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Nowhere: commands are checked and completed, and no data moves. For measuring everything above.
    Null,
    /// Sparse anonymous memory, lost when the controller is dropped.
    Ram,
    /// A raw image file, namespaces one after another. It is created sparse when it is missing and every
    /// namespace has a size; an existing file is never shortened or lengthened.
    File {
        /// Path of the image.
        path: PathBuf,
        /// Whether the host's page cache is passed by.
        direct: Direct,
        /// How the file is read and written.
        engine: FileEngine,
    },
}

/// Whether a file backing bypasses the host's page cache (`O_DIRECT`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direct {
    /// Where the file system allows it for the namespaces' block size.
    #[default]
    Auto,
    /// Always; opening fails where the file system refuses.
    Always,
    /// Never.
    Never,
}

/// How a file backing reads and writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileEngine {
    /// io_uring where the system allows it, else plain calls, with a warning.
    #[default]
    Auto,
    /// io_uring; opening fails where the system refuses.
    IoUring,
    /// `preadv`, `pwritev`, `fdatasync`: each command is carried out inside the pump that fetches it.
    Plain,
}

/// Modelled time from fetching a command to its completion becoming due; zero completes as soon as the work is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// For Read.
    pub read: Duration,
    /// For Write, Write Zeroes and Dataset Management.
    pub write: Duration,
    /// For Flush.
    pub flush: Duration,
}

impl Latency {
    /// The same latency for every class of command.
    #[must_use]
    pub const fn uniform(latency: Duration) -> Self {
        Self { read: latency, write: latency, flush: latency }
    }

    /// Whether nothing is delayed.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }
}

/// Why a configuration or its URI was refused. Every message names the value, the limit and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The URI isn't one of an emulated device.
    #[error("`{uri}` names no emulated device: write emu:null, emu:ram or emu:PATH, then ?parameter=value&…")]
    NotEmulated {
        /// The URI as given.
        uri: String,
    },
    /// A URI parameter that doesn't exist.
    #[error("unknown parameter `{name}`; known are {known}")]
    UnknownParameter {
        /// The parameter as given.
        name: String,
        /// All parameters, separated by commas.
        known: String,
    },
    /// A URI parameter given twice.
    #[error("parameter `{name}` is given twice; keep one")]
    RepeatedParameter {
        /// The parameter.
        name: String,
    },
    /// A URI parameter whose value can't be read.
    #[error("{name}={value}: {expected}")]
    Unreadable {
        /// The parameter.
        name: &'static str,
        /// The value as given.
        value: String,
        /// What would be accepted.
        expected: String,
    },
    /// A namespace's size is needed and missing.
    #[error("an emulated device over {backing} needs a size: add size=, for instance size=1GiB")]
    SizeMissing {
        /// The kind of backing.
        backing: &'static str,
    },
    /// Only a block size of 512 or 4096 bytes exists.
    #[error("lba={block_bytes}: a logical block has 512 or 4096 bytes")]
    BlockBytes {
        /// The block size asked for.
        block_bytes: u32,
    },
    /// A size is zero or no multiple of the block size.
    #[error(
        "size={size_bytes} is no multiple of the {block_bytes}-byte block; the nearest are {below} and {above}"
    )]
    SizeUnaligned {
        /// The size asked for, in bytes.
        size_bytes: u64,
        /// The block size in bytes.
        block_bytes: u32,
        /// The multiple below it (one block at least).
        below: u64,
        /// The multiple above it.
        above: u64,
    },
    /// A number outside its range.
    #[error("{name}={value} is out of range: {min} to {max} are allowed")]
    OutOfRange {
        /// The parameter.
        name: &'static str,
        /// The value asked for.
        value: u64,
        /// Smallest value allowed.
        min: u64,
        /// Largest value allowed.
        max: u64,
    },
    /// Options that exclude each other.
    #[error("{what}; {remedy}")]
    Conflict {
        /// What can't go together.
        what: &'static str,
        /// What to change.
        remedy: &'static str,
    },
}

impl EmulatedConfig {
    fn over(backing: Backing, namespace: NamespaceConfig) -> Self {
        Self {
            backing,
            namespaces: vec![namespace],
            mdts: 8,
            queue_pairs_max: 64,
            queue_entries_max: 1024,
            volatile_write_cache: true,
            latency: Latency::default(),
            bandwidth: Bandwidth::default(),
            noiob_blocks: 0,
            awupf_z: 0,
            power_loss_model: false,
            clock: Clock::Monotonic,
            serial: "FOLIANT0".to_owned(),
        }
    }

    /// A device that moves no data, with one namespace.
    #[must_use]
    pub fn null(size_bytes: u64, block_bytes: u32) -> Self {
        Self::over(Backing::Null, NamespaceConfig::new(size_bytes, block_bytes))
    }

    /// A device over sparse anonymous memory, with one namespace.
    #[must_use]
    pub fn ram(size_bytes: u64, block_bytes: u32) -> Self {
        Self::over(Backing::Ram, NamespaceConfig::new(size_bytes, block_bytes))
    }

    /// A device over an image file, with one namespace.
    #[must_use]
    pub fn file(path: impl Into<PathBuf>, namespace: NamespaceConfig) -> Self {
        let backing =
            Backing::File { path: path.into(), direct: Direct::default(), engine: FileEngine::default() };
        Self::over(backing, namespace)
    }

    /// Checks every limit.
    ///
    /// # Errors
    /// The first limit that is broken.
    pub fn validate(&self) -> Result<(), ConfigError> {
        in_range("ns", self.namespaces.len() as u64, 1, NAMESPACES_LIMIT as u64)?;
        in_range("queues", self.queue_pairs_max.into(), 1, QUEUE_PAIRS_LIMIT.into())?;
        in_range("entries", self.queue_entries_max.into(), 2, QUEUE_ENTRIES_LIMIT.into())?;
        in_range("mdts", self.mdts.into(), 0, MDTS_LIMIT.into())?;
        in_range("read_bps", self.bandwidth.read_bps, 0, Bandwidth::BPS_MAX)?;
        in_range("write_bps", self.bandwidth.write_bps, 0, Bandwidth::BPS_MAX)?;
        for namespace in &self.namespaces {
            self.validate_namespace(*namespace)?;
        }
        self.validate_total_size()?;
        let serial_is_printable = self.serial.bytes().all(|byte| (0x20..0x7f).contains(&byte));
        if self.serial.is_empty() || self.serial.len() > 20 || !serial_is_printable {
            return Err(ConfigError::Unreadable {
                name: "serial",
                value: self.serial.clone(),
                expected: "a serial number has 1 to 20 printable ASCII characters".to_owned(),
            });
        }
        if self.power_loss_model && self.backing != Backing::Ram {
            return Err(ConfigError::Conflict {
                what: "the power-loss model keeps its versions in memory",
                remedy: "use it with emu:ram",
            });
        }
        Ok(())
    }

    fn validate_namespace(&self, namespace: NamespaceConfig) -> Result<(), ConfigError> {
        let block_bytes = namespace.block_bytes;
        if !matches!(block_bytes, 512 | 4096) {
            return Err(ConfigError::BlockBytes { block_bytes });
        }
        let block = u64::from(block_bytes);
        match (namespace.size_bytes, &self.backing) {
            (None, Backing::Null) => return Err(ConfigError::SizeMissing { backing: "nothing" }),
            (None, Backing::Ram) => return Err(ConfigError::SizeMissing { backing: "RAM" }),
            (None, Backing::File { .. }) if self.namespaces.len() > 1 => {
                return Err(ConfigError::SizeMissing { backing: "a file with several namespaces" });
            }
            (Some(size_bytes), _) if size_bytes == 0 || !size_bytes.is_multiple_of(block) => {
                let below = (size_bytes / block * block).max(block);
                let above = (size_bytes / block + 1).saturating_mul(block);
                return Err(ConfigError::SizeUnaligned { size_bytes, block_bytes, below, above });
            }
            _ => {}
        }
        self.validate_atomic_unit(block)
    }

    fn validate_atomic_unit(&self, block: u64) -> Result<(), ConfigError> {
        let unit_blocks = u64::from(self.awupf_z) + 1;
        if unit_blocks > 1 && matches!(self.backing, Backing::File { .. }) {
            return Err(ConfigError::Conflict {
                what: "a file can't promise that more than one block survives a power failure whole",
                remedy: "leave awupf at 0, or use emu:ram",
            });
        }
        if !unit_blocks.is_power_of_two() || unit_blocks * block > ATOMIC_BYTES_MAX {
            return Err(ConfigError::Unreadable {
                name: "awupf",
                value: self.awupf_z.to_string(),
                expected: format!(
                    "zero-based, so awupf + 1 blocks are atomic: a power of two, at most {} blocks of {block} bytes",
                    ATOMIC_BYTES_MAX / block
                ),
            });
        }
        Ok(())
    }

    /// A file's offsets are signed: the namespaces together must stay below 2^62 bytes.
    fn validate_total_size(&self) -> Result<(), ConfigError> {
        let limit = 1u64 << 62;
        let mut total: u64 = 0;
        for namespace in &self.namespaces {
            total = total.saturating_add(namespace.size_bytes.unwrap_or(0));
        }
        in_range("size", total, 0, limit)
    }
}

fn in_range(name: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) { Ok(()) } else { Err(ConfigError::OutOfRange { name, value, min, max }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_configuration_is_valid() {
        assert_eq!(EmulatedConfig::ram(1 << 30, 4096).validate(), Ok(()));
        assert_eq!(EmulatedConfig::null(1 << 40, 512).validate(), Ok(()));
    }

    #[test]
    fn an_unaligned_size_names_its_neighbours() {
        let error = EmulatedConfig::ram(5000, 4096).validate().unwrap_err();
        assert_eq!(
            error,
            ConfigError::SizeUnaligned { size_bytes: 5000, block_bytes: 4096, below: 4096, above: 8192 }
        );
    }

    #[test]
    fn each_limit_is_enforced_on_both_sides() {
        let valid = EmulatedConfig::ram(1 << 20, 4096);
        let too_fast = Bandwidth { write_bps: Bandwidth::BPS_MAX + 1, read_bps: 0 };
        let broken: [(&str, EmulatedConfig); 8] = [
            ("queues", EmulatedConfig { queue_pairs_max: 0, ..valid.clone() }),
            ("queues", EmulatedConfig { queue_pairs_max: 1025, ..valid.clone() }),
            ("entries", EmulatedConfig { queue_entries_max: 1, ..valid.clone() }),
            ("entries", EmulatedConfig { queue_entries_max: 65_537, ..valid.clone() }),
            ("mdts", EmulatedConfig { mdts: 17, ..valid.clone() }),
            ("write_bps", EmulatedConfig { bandwidth: too_fast, ..valid.clone() }),
            ("ns", EmulatedConfig { namespaces: vec![], ..valid.clone() }),
            ("awupf", EmulatedConfig { awupf_z: 2, ..valid.clone() }),
        ];
        for (name, config) in broken {
            let message = config.validate().unwrap_err().to_string();
            assert!(message.starts_with(&format!("{name}=")), "{message}");
        }
        assert_eq!(EmulatedConfig { queue_entries_max: 65_536, awupf_z: 15, ..valid }.validate(), Ok(()));
    }

    #[test]
    fn the_model_and_atomic_units_need_ram() {
        let file = EmulatedConfig::file("x", NamespaceConfig::new(1 << 20, 4096));
        let modelled = EmulatedConfig { power_loss_model: true, ..file.clone() };
        assert!(matches!(modelled.validate(), Err(ConfigError::Conflict { .. })));
        let atomic = EmulatedConfig { awupf_z: 3, ..file };
        assert!(matches!(atomic.validate(), Err(ConfigError::Conflict { .. })));
    }

    #[test]
    fn only_a_single_file_namespace_may_go_without_a_size() {
        let file = EmulatedConfig::file("x", NamespaceConfig::whole_file(512));
        assert_eq!(file.validate(), Ok(()));
        let two = EmulatedConfig { namespaces: vec![NamespaceConfig::whole_file(512); 2], ..file.clone() };
        assert!(matches!(two.validate(), Err(ConfigError::SizeMissing { .. })));
        let ram = EmulatedConfig { backing: Backing::Ram, ..file };
        assert!(matches!(ram.validate(), Err(ConfigError::SizeMissing { backing: "RAM" })));
    }
}
