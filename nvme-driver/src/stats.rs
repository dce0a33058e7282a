//! Counters of a queue pair.

/// What a queue pair has done since it was created. Plain numbers of its one owner; nothing resets them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Requests accepted by [`submit`](crate::QueuePair::submit).
    pub requests: u64,
    /// Read commands submitted; a request that was split counts once a command.
    pub reads: u64,
    /// Write commands submitted.
    pub writes: u64,
    /// Flush commands submitted.
    pub flushes: u64,
    /// Write Zeroes commands submitted.
    pub write_zeroes: u64,
    /// Dataset Management commands submitted.
    pub deallocates: u64,
    /// Stores to the submission queue's tail doorbell.
    pub sq_doorbells: u64,
    /// Stores to the completion queue's head doorbell.
    pub cq_doorbells: u64,
    /// Completion queue entries consumed, one a command.
    pub completions: u64,
    /// Requests that came back with an error.
    pub errors: u64,
}

impl QueueStats {
    /// Commands submitted, of all kinds.
    #[must_use]
    pub const fn commands(&self) -> u64 {
        self.reads + self.writes + self.flushes + self.write_zeroes + self.deallocates
    }
}
