//! What a guest of the lab and its host agree on: the plan of a boot, the lines on the wire, what blocks hold, and what
//! must be left of a database after a power loss.
//!
//! The program itself is the binary `lab-init`; this library is the part that the host needs too. It knows nothing of
//! QEMU.

pub mod generations;
pub mod marked;
pub mod measured;
pub mod pattern;
pub mod protocol;
pub mod transactions;
