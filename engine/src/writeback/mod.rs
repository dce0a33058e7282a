//! Writeback: what is written when, in which order, and when it is durable.
//!
//! A [`pass`] walks the tagged folios of one mapping in one shard in ascending order and hands them out locked;
//! [`issue`] turns them into commands, one a contiguous run; [`flusher`] decides about background passes;
//! [`sync`] carries out what a caller's `sync` asks of a shard; [`commit`] makes one device flush serve all who
//! wait; [`events`] is what a trace shows of it all. None of it knows file names; the order of locks and the rules by number stand in ARCHITECTURE.md.

pub(crate) mod commit;
pub(crate) mod events;
pub(crate) mod flusher;
pub(crate) mod issue;
pub(crate) mod pass;
pub(crate) mod sync;
