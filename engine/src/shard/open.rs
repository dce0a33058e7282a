//! An open mapping, as shards and handles share it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::cache::eof::FileEnd;
use crate::cache::errseq::ErrorSequence;
use crate::cache::shape::MappingShape;
use crate::error::Error;
use crate::gate::MappingGates;
use crate::mapping::RetryPolicy;
use crate::mirror::{LabelTurn, OpenMirror};
use crate::share::CacheShare;
use crate::writeback::commit::Durability;
use crate::writeback::control::SyncMode;
use crate::writeback::pass::PassState;

/// Geometry, errors and durability of one open mapping.
#[derive(Debug)]
pub(crate) struct OpenMapping {
    pub shape: MappingShape,
    /// Where it ends now, and whether it is closed.
    pub end: FileEnd,
    /// Which gate its pages wait for, and whose log it holds.
    pub gates: MappingGates,
    /// Writebacks that failed, for each handle to be told (WB-23).
    pub errors: ErrorSequence,
    /// The namespace's durability.
    pub durability: Arc<Durability>,
    /// Who waits while a command is tried again.
    pub retry: RetryPolicy,
    /// Which part of the cache it may use, if not all.
    pub share: Option<CacheShare>,
    /// Its mirror, if it has one.
    pub mirror: Option<OpenMirror>,
    /// Who reads and writes labels now.
    pub labels: LabelTurn,
    /// By shard.
    pub writeback: Box<[MappingWriteback]>,
    /// Why it was closed, where a shard's panic did that.
    pub failure: OnceLock<Error>,
    /// Set when every shard has dropped it: only then its range and, with the last handle, its slot are free.
    pub dropped: AtomicBool,
}

impl OpenMapping {
    /// A shard has panicked, or can't take the mapping up again: handles refuse from now on, hits included.
    pub(crate) fn fail(&self, error: &Error) {
        self.failure.get_or_init(|| error.clone());
        self.end.close();
    }

    /// Handles work again, after a close that failed. Where a shard has panicked it stays closed: false.
    pub(crate) fn reopen(&self) -> bool {
        if self.failure.get().is_none() {
            self.end.reopen();
        }
        // Who fails it notes why, and closes it then: asked afterwards, one of the two has seen the other.
        let has_failed = self.failure.get().is_some();
        if has_failed {
            self.end.close();
        }
        !has_failed
    }

    /// What handles of a closed mapping are told.
    #[cold]
    pub(crate) fn why_closed(&self) -> Error {
        self.failure.get().cloned().unwrap_or(Error::Closed)
    }

    /// What is kept of its writeback in one shard.
    pub(crate) fn in_shard(&self, shard: usize) -> &MappingWriteback {
        &self.writeback[shard]
    }
}

/// What is kept of one mapping's writeback in one shard.
#[derive(Debug, Default)]
pub(crate) struct MappingWriteback {
    /// Shard-local page at which the next cyclic pass begins (`writeback_index`, WB-02).
    index: AtomicU64,
    /// Until when an integrity pass in its owner's hands keeps background passes away; 0 when there is none.
    owned_until_ns: AtomicU64,
}

impl MappingWriteback {
    /// Where the next cyclic pass begins.
    pub(crate) fn index(&self) -> u64 {
        self.index.load(Ordering::Relaxed)
    }

    /// A pass has ended: a cyclic one says where the next begins.
    pub(crate) fn save_index(&self, pass: &PassState) {
        if let Some(index) = pass.writeback_index() {
            self.index.store(index, Ordering::Relaxed);
        }
    }

    /// An owner's integrity pass goes on: background passes keep away, but not for ever, should it be forgotten.
    pub(crate) fn own_until(&self, until_ns: u64) {
        self.owned_until_ns.store(until_ns, Ordering::Relaxed);
    }

    pub(crate) fn is_owned(&self, now_ns: u64) -> bool {
        now_ns < self.owned_until_ns.load(Ordering::Relaxed)
    }

    /// An owner's pass is over.
    pub(crate) fn end_of_owners_pass(&self, pass: &PassState) {
        self.save_index(pass);
        if pass.mode == SyncMode::All {
            self.owned_until_ns.store(0, Ordering::Relaxed);
        }
    }
}
