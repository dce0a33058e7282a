//! Features: identifiers and the dwords of Get Features and Set Features (Base sections 5.1.11 and 5.1.25).

use bitfield_struct::bitfield;

open_enum! {
    /// Feature Identifier (Base section 5.1.25, figure 385; Error Recovery and Write Atomicity Normal: NVM section
    /// 4.1.3).
    pub struct FeatureId(u8) {
        /// Arbitration.
        ARBITRATION = 0x01, "Arbitration";
        /// Power Management.
        POWER_MANAGEMENT = 0x02, "Power Management";
        /// Temperature Threshold.
        TEMPERATURE_THRESHOLD = 0x04, "Temperature Threshold";
        /// Error Recovery.
        ERROR_RECOVERY = 0x05, "Error Recovery";
        /// Volatile Write Cache.
        VOLATILE_WRITE_CACHE = 0x06, "Volatile Write Cache";
        /// Number of Queues.
        NUMBER_OF_QUEUES = 0x07, "Number of Queues";
        /// Interrupt Coalescing.
        INTERRUPT_COALESCING = 0x08, "Interrupt Coalescing";
        /// Interrupt Vector Configuration.
        INTERRUPT_VECTOR_CONFIGURATION = 0x09, "Interrupt Vector Configuration";
        /// Write Atomicity Normal.
        WRITE_ATOMICITY_NORMAL = 0x0A, "Write Atomicity Normal";
        /// Asynchronous Event Configuration.
        ASYNCHRONOUS_EVENT_CONFIGURATION = 0x0B, "Asynchronous Event Configuration";
        /// Timestamp.
        TIMESTAMP = 0x0E, "Timestamp";
    }
}

/// CDW10 of Get Features (Base section 5.1.11, figure 192).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct GetFeaturesCdw10 {
    /// Feature Identifier: a [`FeatureId`].
    pub fid: u8,
    /// Select: 000b the current value, 001b the default, 010b the saved one, 011b the capabilities.
    #[bits(3)]
    pub sel: u8,
    #[bits(21)]
    __: u32,
}

/// CDW10 of Set Features (Base section 5.1.25, figure 383).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct SetFeaturesCdw10 {
    /// Feature Identifier: a [`FeatureId`].
    pub fid: u8,
    #[bits(23)]
    __: u32,
    /// Save: keep the value across resets and power cycles.
    pub sv: bool,
}

/// Number of Queues: CDW11 of Set Features, where it asks, and dword 0 of the completion, where it grants
/// (Base section 5.1.25.2.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct NumberOfQueues {
    /// Number of I/O Submission Queues, zero-based; FFFFh isn't allowed.
    pub nsq_z: u16,
    /// Number of I/O Completion Queues, zero-based; FFFFh isn't allowed.
    pub ncq_z: u16,
}

/// Volatile Write Cache: CDW11 of Set Features and dword 0 of Get Features' completion
/// (Base section 5.1.25.1.4, figure 390).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct VolatileWriteCache {
    /// Volatile Write Cache Enable.
    pub wce: bool,
    #[bits(31)]
    __: u32,
}

/// Write Atomicity Normal: CDW11 of Set Features and dword 0 of Get Features' completion (NVM section 4.1.3, figure
/// 97).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct WriteAtomicityNormal {
    /// Disable Normal: AWUN and NAWUN don't apply, only the power-fail units do.
    pub dn: bool,
    #[bits(31)]
    __: u32,
}
