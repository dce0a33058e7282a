//! What a child process may do with an engine that its parent opened: nothing, and it is told so.
//!
//! A fork copies neither the shards' threads nor, on purpose, the arena (`MADV_DONTFORK`: the device would write to pages that
//! are only one process's). So a child that asked a shard would wait for ever, and one that touched a frame would be killed.
//! Both are kept from happening without a look at anything on a hit: the look-up index and the folio headers are wiped in a
//! child (`MADV_WIPEONFORK`), so that every look-up misses, and what misses asks here first.
//!
//! [`Birthplace`] is a page of memory that says 1 and is wiped likewise. Where the system can't do that, process ids are compared:
//! a system call for each request.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::cache::table::Table;
use crate::error::{Error, Result};

/// The process in which an engine was opened.
#[derive(Debug)]
pub(crate) struct Birthplace {
    /// 1 there, 0 in its children; `None` where memory can't be wiped.
    marker: Option<Table<AtomicU32>>,
    process: u32,
}

impl Birthplace {
    /// This process.
    ///
    /// # Errors
    /// The system's, when memory can't be had.
    pub(crate) fn new() -> std::io::Result<Self> {
        let marker = Table::new(1, || AtomicU32::new(1))?;
        let marker = marker.is_wiped_on_fork().then_some(marker);
        Ok(Self { marker, process: std::process::id() })
    }

    /// Whether this is that process.
    pub(crate) fn is_here(&self) -> bool {
        match &self.marker {
            Some(marker) => marker[0].load(Ordering::Relaxed) == 1,
            None => self.process == std::process::id(),
        }
    }

    /// # Errors
    /// [`Error::Forked`] in another process.
    pub(crate) fn check(&self) -> Result<()> {
        if self.is_here() { Ok(()) } else { Err(self.error()) }
    }

    #[cold]
    fn error(&self) -> Error {
        Error::Forked { opened_by: self.process, process: std::process::id() }
    }
}
