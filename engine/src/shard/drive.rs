//! Waiting by polling: for a thread that owns its shard.

use std::future::Future;

use super::Shard;
use crate::reply::poll_until_ready;

/// Polls between two looks at the clock: a microsecond or so, while deadlines are milliseconds.
const POLLS_A_LOOK: u32 = 8;

impl Shard {
    /// Runs a future to its end and polls this shard while it waits: a miss on a page of this shard takes no other thread
    /// and no wake-up. `now_ns` is the clock by which the shard is polled elsewhere, too
    /// ([`poll`](Self::poll)).
    ///
    /// The thread spins as long as it waits. What the future needs of other shards comes only if somebody polls them. Every
    /// request of the engine ends by a deadline of its own, so this ends if the future waits for nothing else.
    ///
    /// ```
    /// # use foliant::{Engine, EngineOptions, MappingOptions, ShardThreads};
    /// # fn main() -> foliant::Result<()> {
    /// let options = EngineOptions { threads: ShardThreads::Manual, shards: 1, ..EngineOptions::default() };
    /// let engine = Engine::open("emu:ram?size=16M", &options)?;
    /// let mut shard = engine.take_shards().pop().expect("one shard");
    /// let origin = std::time::Instant::now();
    /// let now_ns = || origin.elapsed().as_nanos() as u64;
    /// let mapping = shard.block_on(now_ns, engine.mapping_async(&MappingOptions::default()))?;
    /// let mut page = [0; 4096];
    /// shard.block_on(now_ns, mapping.read_at_async(8192, &mut page))?;
    /// # engine.return_shards(vec![shard]);
    /// # engine.close()
    /// # }
    /// ```
    pub fn block_on<F: Future>(&mut self, mut now_ns: impl FnMut() -> u64, future: F) -> F::Output {
        let (mut polls, mut now) = (0u32, 0);
        poll_until_ready(future, || {
            if polls.is_multiple_of(POLLS_A_LOOK) {
                now = now_ns().max(self.now_ns());
            }
            polls = polls.wrapping_add(1);
            self.poll(now);
        })
    }
}
