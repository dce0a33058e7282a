//! Opcodes of the Admin Command Set and of the NVM Command Set.

open_enum! {
    /// Opcode of an admin command (Base section 5, figure 141).
    pub struct AdminOpcode(u8) {
        /// Delete I/O Submission Queue.
        DELETE_IO_SUBMISSION_QUEUE = 0x00, "Delete I/O Submission Queue";
        /// Create I/O Submission Queue.
        CREATE_IO_SUBMISSION_QUEUE = 0x01, "Create I/O Submission Queue";
        /// Get Log Page.
        GET_LOG_PAGE = 0x02, "Get Log Page";
        /// Delete I/O Completion Queue.
        DELETE_IO_COMPLETION_QUEUE = 0x04, "Delete I/O Completion Queue";
        /// Create I/O Completion Queue.
        CREATE_IO_COMPLETION_QUEUE = 0x05, "Create I/O Completion Queue";
        /// Identify.
        IDENTIFY = 0x06, "Identify";
        /// Abort.
        ABORT = 0x08, "Abort";
        /// Set Features.
        SET_FEATURES = 0x09, "Set Features";
        /// Get Features.
        GET_FEATURES = 0x0A, "Get Features";
        /// Asynchronous Event Request.
        ASYNCHRONOUS_EVENT_REQUEST = 0x0C, "Asynchronous Event Request";
        /// Namespace Management.
        NAMESPACE_MANAGEMENT = 0x0D, "Namespace Management";
        /// Firmware Commit.
        FIRMWARE_COMMIT = 0x10, "Firmware Commit";
        /// Firmware Image Download.
        FIRMWARE_IMAGE_DOWNLOAD = 0x11, "Firmware Image Download";
        /// Device Self-test.
        DEVICE_SELF_TEST = 0x14, "Device Self-test";
        /// Namespace Attachment.
        NAMESPACE_ATTACHMENT = 0x15, "Namespace Attachment";
        /// Keep Alive.
        KEEP_ALIVE = 0x18, "Keep Alive";
        /// Doorbell Buffer Config.
        DOORBELL_BUFFER_CONFIG = 0x7C, "Doorbell Buffer Config";
        /// Format NVM.
        FORMAT_NVM = 0x80, "Format NVM";
        /// Sanitize.
        SANITIZE = 0x84, "Sanitize";
    }
}

open_enum! {
    /// Opcode of an I/O command of the NVM Command Set (NVM section 3.3, figure 21; Flush: Base section 7.2).
    pub struct NvmOpcode(u8) {
        /// Flush.
        FLUSH = 0x00, "Flush";
        /// Write.
        WRITE = 0x01, "Write";
        /// Read.
        READ = 0x02, "Read";
        /// Write Uncorrectable.
        WRITE_UNCORRECTABLE = 0x04, "Write Uncorrectable";
        /// Compare.
        COMPARE = 0x05, "Compare";
        /// Write Zeroes.
        WRITE_ZEROES = 0x08, "Write Zeroes";
        /// Dataset Management.
        DATASET_MANAGEMENT = 0x09, "Dataset Management";
        /// Verify.
        VERIFY = 0x0C, "Verify";
        /// Copy.
        COPY = 0x19, "Copy";
    }
}
