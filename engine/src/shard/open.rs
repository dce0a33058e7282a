//! An open mapping, as shards and handles share it.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::cache::errseq::ErrorSequence;
use crate::cache::shape::MappingShape;
use crate::writeback::commit::Durability;

/// Geometry, errors and durability of one open mapping.
#[derive(Debug)]
pub(crate) struct OpenMapping {
    pub shape: MappingShape,
    /// Writebacks that failed, for each handle to be told (WB-23).
    pub errors: ErrorSequence,
    /// The namespace's durability.
    pub durability: Arc<Durability>,
    /// Set when the mapping is closed: handles refuse from then on.
    pub closed: AtomicBool,
    /// Set when every shard has dropped it: only then its range and, with the last handle, its slot are free.
    pub dropped: AtomicBool,
}
