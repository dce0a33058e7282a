//! A running engine, seen from outside: the stats page.
//!
//! # Why a file in memory
//! Nobody in an engine has a thread for a socket, and a shard must not wait for whoever listens. So each shard writes
//! what it counts into a small file on tmpfs, from its own step, and whoever looks reads the file:
//!
//! - **Nothing on hot paths.** Counters stay where they are. A shard that works copies its own about ten times a second,
//!   by one `pwrite` of some 4 KiB to memory (`shard/publish.rs`); one that sleeps does so once a second, when it looks
//!   around anyway. So the hits that other threads have while it sleeps are seen too, a second late at most.
//! - **`pwrite` rather than a mapping.** A mapping that somebody truncates kills its process by SIGBUS. A file that is
//!   truncated costs a warning.
//! - **A reader can do nothing.** It opens the file read-only, and the engine never reads it. The engine doesn't get any
//!   slower by being looked at.
//! - **A page can do nothing to its reader**, whatever bytes it holds: it is copied, and all of it is checked
//!   (`layout.rs`).
//! - **Who is dead is recognised.** The owner holds a lock (`flock`) on the page from before it has its name until the process
//!   ends, however that happens. What is left of a process that was killed is the last it published.
//! - **Only its owner may read it**: mode 0600, and the directory that we make has 0700.
//!
//! Only tmpfs will do: a store to a file on disk can wait for the disk, and a shard must not.
//!
//! | file | owns |
//! |---|---|
//! | `catalogue` | which metrics there are, and what they mean |
//! | `histogram` | how long things take, in buckets |
//! | `layout` | the bytes of a page |
//! | `page` | the engine's side: the file, its name, its lock |
//! | `reader` | the other side |
//! | `place` | where pages are |

mod catalogue;
pub(crate) mod histogram;
mod layout;
mod page;
mod place;
mod reader;

pub use catalogue::{Metric, MetricKind};
pub use histogram::LatencyHistogram;
pub(crate) use histogram::RecordedTimes;
pub(crate) use page::{PageOwner, StatsFile};
pub use place::{StatsPage, stats_directories};
pub use reader::{EngineState, ShardRecord, StatsReader, StatsSnapshot};

/// What a shard records of how long things take; see the catalogue for what each is.
#[derive(Debug, Default)]
pub(crate) struct ShardTimes {
    pub read_wait: RecordedTimes,
    pub write_command: RecordedTimes,
    pub flush_command: RecordedTimes,
    /// Recorded by callers.
    pub sync: RecordedTimes,
}

impl ShardTimes {
    /// The words of all, in the catalogue's order.
    pub(crate) fn words(&self) -> impl Iterator<Item = u64> + '_ {
        [&self.read_wait, &self.write_command, &self.flush_command, &self.sync]
            .into_iter()
            .flat_map(RecordedTimes::words)
    }
}
