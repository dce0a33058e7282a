//! The status field of a completion, and the codes it carries.

use bitfield_struct::bitfield;

/// The status field of a completion queue entry without its phase tag, 15 bits (Base section 4.2.3, figure
/// 100).
#[bitfield(u16)]
#[derive(PartialEq, Eq, Hash)]
pub struct Status {
    /// Status Code, to be read together with [`sct`](Self::sct).
    #[inline]
    pub sc: u8,
    /// Status Code Type: 0h generic, 1h command specific, 2h media and data integrity, 3h path related, 7h vendor
    /// specific.
    #[inline]
    #[bits(3)]
    pub sct: u8,
    /// Command Retry Delay: which of Identify Controller's CRDT times to wait before a retry; 0 for none.
    #[inline]
    #[bits(2)]
    pub crd: u8,
    /// More: the Error Information log has more about this.
    #[inline]
    pub m: bool,
    /// Do Not Retry: the same command would fail again.
    #[inline]
    pub dnr: bool,
    #[bits(1)]
    __: u8,
}

impl Status {
    /// The status of a command that succeeded.
    pub const SUCCESS: Self = Self::new();

    /// A status of the given code, without retry delay, More or Do Not Retry.
    #[inline]
    #[must_use]
    pub const fn of(code: StatusCode) -> Self {
        Self::new().with_sct((code.0 >> 8) as u8).with_sc(code.0 as u8)
    }

    /// Code type and code together.
    #[inline]
    #[must_use]
    pub const fn code(self) -> StatusCode {
        StatusCode((self.sct() as u16) << 8 | self.sc() as u16)
    }

    /// Whether the command succeeded.
    #[inline]
    #[must_use]
    pub const fn is_success(self) -> bool {
        self.sct() == 0 && self.sc() == 0
    }

    /// Whether the same command may succeed when it's submitted again: it failed, and Do Not Retry is clear.
    #[inline]
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        !self.is_success() && !self.dnr()
    }
}

impl core::fmt::Display for Status {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} (sct {:#x}, sc {:#04x}", self.code(), self.sct(), self.sc())?;
        if self.dnr() {
            f.write_str(", do not retry")?;
        }
        f.write_str(")")
    }
}

open_enum! {
    /// Status Code Type and Status Code as one number, `sct << 8 | sc` (Base section 4.2.3, figures 102, 103 and 106;
    /// NVM section 3.1, figures 17 to 19).
    pub struct StatusCode(u16) {
        /// The command completed without error.
        SUCCESS = 0x000, "Successful Completion";
        /// The opcode is not supported.
        INVALID_OPCODE = 0x001, "Invalid Command Opcode";
        /// A field of the command holds an unsupported or reserved value.
        INVALID_FIELD = 0x002, "Invalid Field in Command";
        /// The command identifier is already in use.
        COMMAND_ID_CONFLICT = 0x003, "Command ID Conflict";
        /// Data or metadata could not be moved.
        DATA_TRANSFER_ERROR = 0x004, "Data Transfer Error";
        /// Aborted because power is about to be lost.
        ABORTED_POWER_LOSS = 0x005, "Commands Aborted due to Power Loss Notification";
        /// The controller failed inside.
        INTERNAL_ERROR = 0x006, "Internal Error";
        /// Aborted by an Abort command.
        COMMAND_ABORT_REQUESTED = 0x007, "Command Abort Requested";
        /// Aborted because its submission queue was deleted.
        ABORTED_SQ_DELETION = 0x008, "Command Aborted due to SQ Deletion";
        /// The other command of a fused pair failed.
        ABORTED_FAILED_FUSED = 0x009, "Command Aborted due to Failed Fused Command";
        /// The other command of a fused pair is missing.
        ABORTED_MISSING_FUSED = 0x00A, "Command Aborted due to Missing Fused Command";
        /// The namespace, or the format of one, is invalid.
        INVALID_NAMESPACE = 0x00B, "Invalid Namespace or Format";
        /// A command came out of the order its protocol asks for.
        COMMAND_SEQUENCE_ERROR = 0x00C, "Command Sequence Error";
        /// An SGL segment descriptor is invalid.
        INVALID_SGL_SEGMENT_DESCRIPTOR = 0x00D, "Invalid SGL Segment Descriptor";
        /// The number of SGL descriptors is invalid.
        INVALID_SGL_DESCRIPTOR_COUNT = 0x00E, "Invalid Number of SGL Descriptors";
        /// The SGL describes too little data.
        DATA_SGL_LENGTH_INVALID = 0x00F, "Data SGL Length Invalid";
        /// The metadata SGL has a wrong length.
        METADATA_SGL_LENGTH_INVALID = 0x010, "Metadata SGL Length Invalid";
        /// The SGL descriptor type is not supported.
        SGL_DESCRIPTOR_TYPE_INVALID = 0x011, "SGL Descriptor Type Invalid";
        /// The controller memory buffer was used in an invalid way.
        INVALID_CMB_USE = 0x012, "Invalid Use of Controller Memory Buffer";
        /// A PRP entry's offset is not dword aligned, or not zero where it must be.
        PRP_OFFSET_INVALID = 0x013, "PRP Offset Invalid";
        /// The write is longer than the atomic write unit allows.
        ATOMIC_WRITE_UNIT_EXCEEDED = 0x014, "Atomic Write Unit Exceeded";
        /// The operation was denied.
        OPERATION_DENIED = 0x015, "Operation Denied";
        /// A sanitize operation failed, and no recovery has been made.
        SANITIZE_FAILED = 0x01C, "Sanitize Failed";
        /// A sanitize operation is under way.
        SANITIZE_IN_PROGRESS = 0x01D, "Sanitize In Progress";
        /// The namespace is write protected.
        NAMESPACE_WRITE_PROTECTED = 0x020, "Namespace is Write Protected";
        /// The command was interrupted and should be retried.
        COMMAND_INTERRUPTED = 0x021, "Command Interrupted";
        /// A transport error of passing nature.
        TRANSIENT_TRANSPORT_ERROR = 0x022, "Transient Transport Error";
        /// The media is not ready for admin commands that need it.
        ADMIN_MEDIA_NOT_READY = 0x024, "Admin Command Media Not Ready";
        /// The command addresses blocks past the end of the namespace.
        LBA_OUT_OF_RANGE = 0x080, "LBA Out of Range";
        /// The namespace's capacity has been exceeded.
        CAPACITY_EXCEEDED = 0x081, "Capacity Exceeded";
        /// The namespace is not ready.
        NAMESPACE_NOT_READY = 0x082, "Namespace Not Ready";
        /// The namespace is reserved by another host.
        RESERVATION_CONFLICT = 0x083, "Reservation Conflict";
        /// A Format NVM command is under way.
        FORMAT_IN_PROGRESS = 0x084, "Format In Progress";
        /// The completion queue named does not exist.
        COMPLETION_QUEUE_INVALID = 0x100, "Completion Queue Invalid";
        /// The queue identifier is out of range or in use.
        INVALID_QUEUE_IDENTIFIER = 0x101, "Invalid Queue Identifier";
        /// The queue size is zero or larger than CAP.MQES allows.
        INVALID_QUEUE_SIZE = 0x102, "Invalid Queue Size";
        /// More Abort commands are outstanding than ACL allows.
        ABORT_COMMAND_LIMIT_EXCEEDED = 0x103, "Abort Command Limit Exceeded";
        /// More Asynchronous Event Requests are outstanding than AERL allows.
        ASYNC_EVENT_REQUEST_LIMIT_EXCEEDED = 0x105, "Asynchronous Event Request Limit Exceeded";
        /// The firmware slot is invalid or read only.
        INVALID_FIRMWARE_SLOT = 0x106, "Invalid Firmware Slot";
        /// The firmware image is invalid.
        INVALID_FIRMWARE_IMAGE = 0x107, "Invalid Firmware Image";
        /// The interrupt vector is out of range.
        INVALID_INTERRUPT_VECTOR = 0x108, "Invalid Interrupt Vector";
        /// The log page is not supported.
        INVALID_LOG_PAGE = 0x109, "Invalid Log Page";
        /// The LBA format is not supported.
        INVALID_FORMAT = 0x10A, "Invalid Format";
        /// The completion queue still has submission queues.
        INVALID_QUEUE_DELETION = 0x10C, "Invalid Queue Deletion";
        /// The feature cannot be saved.
        FEATURE_NOT_SAVEABLE = 0x10D, "Feature Identifier Not Saveable";
        /// The feature cannot be changed.
        FEATURE_NOT_CHANGEABLE = 0x10E, "Feature Not Changeable";
        /// The feature belongs to no namespace.
        FEATURE_NOT_NAMESPACE_SPECIFIC = 0x10F, "Feature Not Namespace Specific";
        /// The attributes of a Dataset Management or I/O command conflict.
        CONFLICTING_ATTRIBUTES = 0x180, "Conflicting Attributes";
        /// The protection information is invalid.
        INVALID_PROTECTION_INFORMATION = 0x181, "Invalid Protection Information";
        /// The range is read only.
        ATTEMPTED_WRITE_TO_READ_ONLY_RANGE = 0x182, "Attempted Write to Read Only Range";
        /// The command is larger than a limit of the command's own.
        COMMAND_SIZE_LIMIT_EXCEEDED = 0x183, "Command Size Limit Exceeded";
        /// The write could not be committed to the media.
        WRITE_FAULT = 0x280, "Write Fault";
        /// The data could not be recovered from the media.
        UNRECOVERED_READ_ERROR = 0x281, "Unrecovered Read Error";
        /// The end-to-end guard check failed.
        GUARD_CHECK_ERROR = 0x282, "End-to-end Guard Check Error";
        /// The end-to-end application tag check failed.
        APPLICATION_TAG_CHECK_ERROR = 0x283, "End-to-end Application Tag Check Error";
        /// The end-to-end reference tag check failed.
        REFERENCE_TAG_CHECK_ERROR = 0x284, "End-to-end Reference Tag Check Error";
        /// A Compare found a difference.
        COMPARE_FAILURE = 0x285, "Compare Failure";
        /// Access is denied.
        ACCESS_DENIED = 0x286, "Access Denied";
        /// The block is deallocated or unwritten, and the host asked for an error in that case.
        DEALLOCATED_OR_UNWRITTEN_BLOCK = 0x287, "Deallocated or Unwritten Logical Block";
        /// The path failed inside.
        INTERNAL_PATH_ERROR = 0x300, "Internal Path Error";
        /// The controller met a path problem with the namespace.
        CONTROLLER_PATHING_ERROR = 0x360, "Controller Pathing Error";
        /// The host met a path problem.
        HOST_PATHING_ERROR = 0x370, "Host Pathing Error";
        /// The host aborted the command on this path.
        ABORTED_BY_HOST = 0x371, "Command Aborted By Host";
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::string::ToString;

    #[test]
    fn a_status_is_named_with_its_numbers() {
        let status = Status::of(StatusCode::UNRECOVERED_READ_ERROR).with_dnr(true);
        assert_eq!(status.to_string(), "Unrecovered Read Error (sct 0x2, sc 0x81, do not retry)");
        assert_eq!(Status::of(StatusCode(0x7C5)).to_string(), "0x7c5 (sct 0x7, sc 0xc5)");
    }

    #[test]
    fn only_a_failure_without_do_not_retry_is_retryable() {
        assert!(!Status::SUCCESS.is_retryable());
        assert!(Status::of(StatusCode::INTERNAL_ERROR).is_retryable());
        assert!(!Status::of(StatusCode::INTERNAL_ERROR).with_dnr(true).is_retryable());
    }

    #[test]
    fn more_and_retry_delay_do_not_make_a_success_a_failure() {
        assert!(Status::new().with_m(true).with_crd(2).is_success());
    }
}
