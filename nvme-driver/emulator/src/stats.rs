//! Counters of what a device was asked and did.
//!
//! Each queue counts for itself, in plain integers behind its own lock; [`EmulatedController::stats`] adds them up.
//!
//! [`EmulatedController::stats`]: crate::EmulatedController::stats

/// What an emulated controller has been asked and has done since it was made, over all attachments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EmulatedStats {
    /// Read commands fetched.
    pub reads: u64,
    /// Write commands fetched.
    pub writes: u64,
    /// Flush commands fetched.
    pub flushes: u64,
    /// Write Zeroes commands fetched.
    pub write_zeroes: u64,
    /// Dataset Management commands fetched.
    pub deallocates: u64,
    /// I/O commands of any other opcode fetched.
    pub io_others: u64,
    /// Admin commands fetched.
    pub admin_commands: u64,
    /// Commands that forced unit access.
    pub fua_commands: u64,
    /// Bytes that successful Read commands moved (or would have moved, on `null`).
    pub bytes_read: u64,
    /// Bytes that successful Write commands moved.
    pub bytes_written: u64,
    /// Completions posted, admin included.
    pub completions: u64,
    /// Completions with an error status, injected faults included.
    pub errors: u64,
    /// Commands refused as invalid before they reached the backing.
    pub refused: u64,
    /// Commands that named an address without a DMA mapping.
    pub dma_faults: u64,
    /// Batches seen: pumps that found a submission queue doorbell moved.
    pub sq_batches: u64,
    /// Doorbell values refused: past the queue's end, or freeing completions that were never posted.
    pub doorbells_invalid: u64,
    /// Pumps that left commands in the submission queue because the completion queue had no room left.
    pub cq_full: u64,
    /// Commands that an injected fault hit.
    pub faults_injected: u64,
    /// Commands whose data went through a bounce buffer, because it wasn't aligned for O_DIRECT.
    pub bounced: u64,
}

impl EmulatedStats {
    /// Adds the counters of one queue.
    pub(crate) fn add(&mut self, other: &Self) {
        let Self {
            reads,
            writes,
            flushes,
            write_zeroes,
            deallocates,
            io_others,
            admin_commands,
            fua_commands,
            bytes_read,
            bytes_written,
            completions,
            errors,
            refused,
            dma_faults,
            sq_batches,
            doorbells_invalid,
            cq_full,
            faults_injected,
            bounced,
        } = other;
        self.reads += reads;
        self.writes += writes;
        self.flushes += flushes;
        self.write_zeroes += write_zeroes;
        self.deallocates += deallocates;
        self.io_others += io_others;
        self.admin_commands += admin_commands;
        self.fua_commands += fua_commands;
        self.bytes_read += bytes_read;
        self.bytes_written += bytes_written;
        self.completions += completions;
        self.errors += errors;
        self.refused += refused;
        self.dma_faults += dma_faults;
        self.sq_batches += sq_batches;
        self.doorbells_invalid += doorbells_invalid;
        self.cq_full += cq_full;
        self.faults_injected += faults_injected;
        self.bounced += bounced;
    }

    /// I/O commands fetched, of any opcode.
    #[must_use]
    pub const fn io_commands(&self) -> u64 {
        self.reads + self.writes + self.flushes + self.write_zeroes + self.deallocates + self.io_others
    }
}
