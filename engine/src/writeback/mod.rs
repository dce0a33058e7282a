//! Writeback: what is written when, in which order, and when it is durable.
//!
//! [`control`] says what is asked of a pass. A [`pass`] walks the tagged folios of one mapping in one shard in
//! ascending order and hands them out locked; [`issue`] turns them into commands, one a contiguous run; a [`callback`]
//! may put folios off. [`flusher`] decides about background passes, [`poison`] about pages whose write failed; [`sync`]
//! is what a caller's `sync` waits for in a shard; [`commit`] makes one device flush serve all who wait; [`guard`]
//! keeps reclaim from writing; [`throttle`] slows writers to the device's rate and [`congestion`] keeps its queue short;
//! [`gated`] keeps pages back whose log isn't [`durable`]; [`eof`] keeps what lies behind a mapping's end from the device;
//! [`streams`] feeds a mirror beside the device;
//! [`events`] is what a trace shows of it all. None of it knows requests or file names; the rules by number stand in
//! ARCHITECTURE.md.

mod ahead;
pub(crate) mod callback;
pub(crate) mod commit;
pub(crate) mod congestion;
pub(crate) mod control;
pub(crate) mod durable;
mod eof;
pub(crate) mod events;
pub(crate) mod flusher;
pub(crate) mod gated;
pub(crate) mod guard;
pub(crate) mod issue;
pub(crate) mod pass;
pub(crate) mod poison;
pub(crate) mod ranges;
pub(crate) mod streams;
pub(crate) mod sync;
pub(crate) mod throttle;
