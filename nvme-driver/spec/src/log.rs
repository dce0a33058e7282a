//! Log pages (Base section 5.1.12) and what an asynchronous event says (Base section 5.1.2).

use bitfield_struct::bitfield;
use zerocopy::little_endian::U128;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_enum! {
    /// Log Page Identifier (Base section 5.1.12, figure 202).
    pub struct LogPageId(u8) {
        /// Supported Log Pages.
        SUPPORTED_LOG_PAGES = 0x00, "Supported Log Pages";
        /// Error Information: [`ErrorInformation`] entries, newest first.
        ERROR_INFORMATION = 0x01, "Error Information";
        /// SMART / Health Information: [`SmartHealth`].
        SMART_HEALTH = 0x02, "SMART / Health Information";
        /// Firmware Slot Information: [`FirmwareSlot`].
        FIRMWARE_SLOT = 0x03, "Firmware Slot Information";
        /// Changed Attached Namespace List.
        CHANGED_NAMESPACES = 0x04, "Changed Attached Namespace List";
        /// Commands Supported and Effects.
        COMMANDS_SUPPORTED = 0x05, "Commands Supported and Effects";
    }
}

/// One entry of the Error Information log, 64 bytes (Base section 5.1.12.1.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ErrorInformation {
    /// Error Count: a number that identifies this error, from 1; 0 marks an unused entry.
    pub error_count: u64,
    /// Submission Queue ID of the command.
    pub sqid: u16,
    /// Command ID of the command.
    pub cid: u16,
    /// The completion's status field with its phase tag, as in the upper half of its dword 3.
    pub status_info: u16,
    /// Parameter Error Location: byte in bits 7:0, bit in bits 10:8; FFFFh when none applies.
    pub parameter_error_location: u16,
    /// First LBA that failed.
    pub lba: u64,
    /// Namespace of the command.
    pub nsid: u32,
    /// Vendor Specific Information Available; a log page identifier, or 0.
    pub vendor_log_page: u8,
    /// Transport Type.
    pub trtype: u8,
    /// Command Set Indicator.
    pub csi: u8,
    /// Opcode of the command.
    pub opcode: u8,
    /// Command Specific Information.
    pub command_specific: u64,
    /// Transport Type Specific Information.
    pub trtype_specific: u16,
    /// Reserved.
    pub reserved: [u8; 21],
    /// Log Page Version.
    pub log_page_version: u8,
}

const _: () = assert!(size_of::<ErrorInformation>() == 64);

/// The SMART / Health Information log, 512 bytes (Base section 5.1.12.1.3, figure 206).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SmartHealth {
    /// Critical Warning.
    pub critical_warning: CriticalWarning,
    /// Composite Temperature in kelvins, little-endian.
    pub composite_temperature_kelvin: [u8; 2],
    /// Available Spare, percent.
    pub available_spare_percent: u8,
    /// Available Spare Threshold, percent.
    pub available_spare_threshold_percent: u8,
    /// Percentage Used; may pass 100.
    pub percentage_used: u8,
    /// Endurance Group Critical Warning Summary.
    pub endurance_group_warning: u8,
    /// Reserved.
    pub reserved_7: [u8; 25],
    /// Data Units Read, in thousands of 512-byte units, rounded up.
    pub data_units_read: U128,
    /// Data Units Written, in thousands of 512-byte units, rounded up.
    pub data_units_written: U128,
    /// Host Read Commands.
    pub host_read_commands: U128,
    /// Host Write Commands.
    pub host_write_commands: U128,
    /// Controller Busy Time, in minutes.
    pub controller_busy_minutes: U128,
    /// Power Cycles.
    pub power_cycles: U128,
    /// Power On Hours.
    pub power_on_hours: U128,
    /// Unexpected Power Losses.
    pub unexpected_power_losses: U128,
    /// Media and Data Integrity Errors.
    pub media_errors: U128,
    /// Number of Error Information Log Entries over the controller's life.
    pub error_log_entries: U128,
    /// Warning Composite Temperature Time, in minutes.
    pub warning_temperature_minutes: u32,
    /// Critical Composite Temperature Time, in minutes.
    pub critical_temperature_minutes: u32,
    /// Temperature Sensors 1 to 8 in kelvins; 0 where there's none.
    pub temperature_sensors_kelvin: [u16; 8],
    /// Thermal management temperature transition counts and times, and reserved bytes.
    pub rest: [u8; 296],
}

const _: () = assert!(size_of::<SmartHealth>() == 512);
const _: () = assert!(core::mem::offset_of!(SmartHealth, data_units_read) == 32);
const _: () = assert!(core::mem::offset_of!(SmartHealth, warning_temperature_minutes) == 192);

/// Critical Warning bits of the SMART / Health log (Base section 5.1.12.1.3, figure 206).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CriticalWarning {
    /// The available spare has fallen below its threshold.
    pub spare_low: bool,
    /// A temperature is beyond its threshold.
    pub temperature: bool,
    /// The subsystem's reliability is degraded by media errors.
    pub reliability_degraded: bool,
    /// The media is read only.
    pub read_only: bool,
    /// The volatile memory backup has failed.
    pub backup_failed: bool,
    /// The Persistent Memory Region is read only or unreliable.
    pub pmr_unreliable: bool,
    #[bits(2)]
    __: u8,
}

/// The Firmware Slot Information log, 512 bytes (Base section 5.1.12.1.4).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FirmwareSlot {
    /// Active Firmware Info: the running slot in bits 2:0, the next one in bits 6:4.
    pub afi: u8,
    /// Reserved.
    pub reserved_1: [u8; 7],
    /// Firmware revisions of slots 1 to 7, ASCII; zeroes for an empty slot.
    pub frs: [[u8; 8]; 7],
    /// Reserved.
    pub reserved_64: [u8; 448],
}

const _: () = assert!(size_of::<FirmwareSlot>() == 512);

/// Dword 0 of the completion of an Asynchronous Event Request (Base section 5.1.2, figure 147).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct AsynchronousEvent {
    /// Asynchronous Event Type: 000b error, 001b SMART / Health, 010b notice, 011b immediate.
    #[bits(3)]
    pub event_type: u8,
    #[bits(5)]
    __: u8,
    /// Asynchronous Event Information, to be read together with the type.
    pub event_information: u8,
    /// Log Page Identifier: the log that reading clears the event.
    pub lid: u8,
    #[bits(8)]
    __: u8,
}
