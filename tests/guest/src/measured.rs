//! What the lab's benchmark measures in the guest, as host and guest name it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Who drives the drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The guest kernel's own NVMe driver, with its page cache where one is in play.
    Kernel,
    /// Foliant over VFIO.
    Foliant,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Load {
    /// Random reads of 4 KiB, so many in flight.
    Reads {
        /// Accesses in flight.
        depth: u16,
    },
    /// Random writes of 4 KiB, so many in flight.
    Writes {
        /// Accesses in flight.
        depth: u16,
    },
    /// Pages of 4 KiB written to the page cache, each once, then made durable.
    Buffered {
        /// In which order.
        order: Order,
        /// Where the pages were before.
        pages: Pages,
    },
}

/// In which order pages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Ascending.
    Ascending,
    /// Without order, the same each time.
    Random,
}

/// Where pages are before they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pages {
    /// On the drive alone: writing makes them in the cache.
    New,
    /// In the cache, clean.
    Cached,
}

/// One measurement.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Whose.
    pub side: Side,
    /// Of what.
    pub load: Load,
    /// 4 KiB accesses a second; of a buffered load, from the first write until the last was durable.
    pub per_second: f64,
    /// The seconds of a buffered load that making it durable took, the last part of it.
    pub sync_seconds: f64,
    /// Flush commands that reached the device meanwhile.
    pub flushes: u64,
}

/// What the benchmark's job is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The controller's PCI address.
    pub address: String,
    /// How often each side is measured, in turns.
    pub rounds: u32,
    /// How long each measurement of reads or writes takes.
    pub seconds: u32,
    /// The part of the drive that is accessed.
    pub range_mib: u64,
    /// What is written to the page cache.
    pub buffered_mib: u64,
}

/// What the job asks its host: how many Flush commands the device has got so far.
pub const FLUSHES: &str = "flushes";

/// The job's fact: a [`Measured`].
pub const MEASURED: &str = "measured";

impl Load {
    /// Every load, in the order in which they are measured: new pages are in the cache afterwards.
    pub const ALL: [Self; 8] = [
        Self::Reads { depth: 1 },
        Self::Reads { depth: 32 },
        Self::Writes { depth: 1 },
        Self::Writes { depth: 32 },
        Self::Buffered { order: Order::Random, pages: Pages::New },
        Self::Buffered { order: Order::Random, pages: Pages::Cached },
        Self::Buffered { order: Order::Ascending, pages: Pages::New },
        Self::Buffered { order: Order::Ascending, pages: Pages::Cached },
    ];
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (order, pages) = match self {
            Self::Reads { depth } => return write!(f, "random reads, depth {depth}"),
            Self::Writes { depth } => return write!(f, "random writes, depth {depth}"),
            Self::Buffered { order, pages } => (order, pages),
        };
        let pages = match pages {
            Pages::New => "new pages",
            Pages::Cached => "cached pages",
        };
        match order {
            Order::Random => write!(f, "{pages}, random order"),
            Order::Ascending => write!(f, "{pages}, ascending"),
        }
    }
}
