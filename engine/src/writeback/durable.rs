//! How far a log is durable, and which shards want to hear of it.
//!
//! The owner of the log advances a number; a shard that has found it too low goes on with something else.
//! Neither waits for the other, and no advance is missed:
//!
//! ```text
//!   the shard                                the owner of the log
//!   1. sets its flag                         1. advances the number
//!   2. number high enough? go on             2. takes each flag that is set: that shard is kicked
//! ```
//!
//! All four accesses are sequentially consistent, so the shard sees the number or the owner sees the flag.

use crate::cache::lsn::Lsn;
#[cfg(loom)]
use crate::primitives::fence;
use crate::primitives::{AtomicBool, AtomicU64, Ordering};

/// What loom doesn't know of: it takes sequentially consistent accesses for acquire and release.
#[inline]
fn between_announcing_and_looking() {
    #[cfg(loom)]
    fence(Ordering::SeqCst);
}

/// A log's durable number and a flag a shard.
#[derive(Debug)]
pub(crate) struct DurableLsn {
    durable: AtomicU64,
    waiting: Box<[AtomicBool]>,
}

impl DurableLsn {
    pub(crate) fn new(shards: usize) -> Self {
        Self { durable: AtomicU64::new(0), waiting: (0..shards).map(|_| AtomicBool::new(false)).collect() }
    }

    /// Everything up to here is durable.
    #[inline]
    pub(crate) fn lsn(&self) -> Lsn {
        Lsn(self.durable.load(Ordering::SeqCst))
    }

    /// The shard's side: whether `lsn` is durable. If not, the shard will be kicked when the number has
    /// changed.
    pub(crate) fn reached(&self, lsn: Lsn, shard: usize) -> bool {
        if self.lsn() >= lsn {
            return true;
        }
        self.waiting[shard].store(true, Ordering::SeqCst);
        between_announcing_and_looking();
        self.lsn() >= lsn
    }

    /// The owner's side: advances, and calls `kick` for each shard that waits. `Err` is the number of now,
    /// when that is higher.
    pub(crate) fn advance(&self, lsn: Lsn, mut kick: impl FnMut(usize)) -> Result<(), Lsn> {
        let mut now = self.durable.load(Ordering::Relaxed);
        loop {
            if lsn.0 < now {
                return Err(Lsn(now));
            }
            match self.durable.compare_exchange_weak(now, lsn.0, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => break,
                Err(changed) => now = changed,
            }
        }
        between_announcing_and_looking();
        for (shard, waiting) in self.waiting.iter().enumerate() {
            // Mostly nobody waits: a load keeps the flag's line shared.
            if waiting.load(Ordering::SeqCst) && waiting.swap(false, Ordering::SeqCst) {
                kick(shard);
            }
        }
        Ok(())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn wb40_an_advance_kicks_who_waits_once_and_never_goes_backwards() {
        let durable = DurableLsn::new(3);
        assert!(durable.reached(Lsn::NONE, 0));
        assert!(!durable.reached(Lsn(5), 2));
        let mut kicked = Vec::new();
        durable.advance(Lsn(4), |shard| kicked.push(shard)).unwrap();
        durable.advance(Lsn(5), |shard| kicked.push(shard)).unwrap();
        assert_eq!(kicked, [2], "who wants to hear of more announces itself again");
        assert!(durable.reached(Lsn(5), 2));
        assert_eq!(durable.advance(Lsn(4), |_| ()), Err(Lsn(5)));
        durable.advance(Lsn(5), |_| ()).unwrap();
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// A shard that finds the number too low is kicked after the advance, however the two interleave.
    #[test]
    fn loom_wb40_an_advance_is_seen_or_kicks() {
        loom::model(|| {
            let durable = Arc::new(DurableLsn::new(1));
            let owner = {
                let durable = durable.clone();
                thread::spawn(move || {
                    let mut kicked = false;
                    durable.advance(Lsn(7), |_| kicked = true).unwrap();
                    kicked
                })
            };
            let reached = durable.reached(Lsn(7), 0);
            let kicked = owner.join().unwrap();
            assert!(reached || kicked);
        });
    }
}
