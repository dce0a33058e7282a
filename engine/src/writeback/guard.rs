//! The reclaim guard (WB-10): who runs because memory is short must not write, for writing may need memory.

use super::control::Context;
use super::events;
use crate::error::{Error, Result};
use crate::stats::ShardCounters;
use std::cell::Cell;
use std::marker::PhantomData;

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// While it lives, this thread is in the reclaim context (`PF_MEMALLOC`): passes and syncs are refused with
/// [`Error::ReclaimContext`]. Scopes nest.
///
/// Open one around code of an allocator, a cache shrinker or the like that might call into the database. What such code
/// may do is [`Mapping::request_writeback`](crate::Mapping::request_writeback): the flusher then writes.
///
/// ```
/// use foliant::{Engine, EngineOptions, Error, MappingOptions, ReclaimScope};
///
/// # fn main() -> Result<(), Error> {
/// let engine = Engine::open("emu:ram?size=1MiB", &EngineOptions { cache_bytes: 1 << 20, ..Default::default() })?;
/// let mapping = engine.mapping(&MappingOptions::default())?;
/// let scope = ReclaimScope::enter();
/// assert!(matches!(mapping.sync(), Err(Error::ReclaimContext)));
/// mapping.request_writeback();
/// drop(scope);
/// mapping.sync()?;
/// # engine.close()
/// # }
/// ```
#[derive(Debug)]
#[must_use = "the scope ends when it is dropped"]
pub struct ReclaimScope {
    /// It belongs to the thread that entered it.
    thread: PhantomData<*const ()>,
}

impl ReclaimScope {
    /// Enters the reclaim context.
    pub fn enter() -> Self {
        DEPTH.with(|depth| depth.set(depth.get() + 1));
        Self { thread: PhantomData }
    }

    /// Whether this thread is in the reclaim context.
    #[must_use]
    pub fn is_active() -> bool {
        DEPTH.with(|depth| depth.get() > 0)
    }
}

impl Drop for ReclaimScope {
    fn drop(&mut self) {
        DEPTH.with(|depth| depth.set(depth.get() - 1));
    }
}

/// Refuses what would write from the reclaim context; `counters` count it, and the first one is put on record.
pub(crate) fn check(context: Context, mapping: u16, counters: &ShardCounters) -> Result<()> {
    if context != Context::Reclaim && !ReclaimScope::is_active() {
        return Ok(());
    }
    if events::reclaim_guard(counters, mapping) == 1 {
        tracing::warn!(
            "writeback was begun from the reclaim context and refused; ask the flusher by request_writeback instead \
             (told once, counted always)"
        );
    }
    Err(Error::ReclaimContext)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wb10_scopes_nest_and_belong_to_their_thread() {
        let outer = ReclaimScope::enter();
        drop(ReclaimScope::enter());
        assert!(ReclaimScope::is_active());
        assert!(!std::thread::spawn(ReclaimScope::is_active).join().unwrap());
        drop(outer);
        assert!(!ReclaimScope::is_active());
    }
}
