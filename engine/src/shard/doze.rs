//! How a shard goes to sleep without missing a message.
//!
//! The sender pushes its message, fences, and looks whether the shard sleeps; the shard announces sleep, fences,
//! and looks at its inbox once more. The two fences are in one total order, so at least one side sees the
//! other. The loom model runs this code with a flag for the inbox.

use crate::primitives::{AtomicBool, Ordering, fence};

/// The sleep flag of one shard.
#[derive(Debug)]
pub(crate) struct Doze {
    asleep: AtomicBool,
}

impl Doze {
    pub(crate) fn new() -> Self {
        Self { asleep: AtomicBool::new(false) }
    }

    /// The sender's side, after its message is in the inbox: true when the shard must be woken. Only one of
    /// several senders is told so.
    #[inline]
    pub(crate) fn must_wake(&self) -> bool {
        fence(Ordering::SeqCst);
        self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed)
    }

    /// The shard's side, before its last look at the inbox. Found something? Then [`rouse`](Self::rouse).
    pub(crate) fn announce(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The shard is awake again.
    pub(crate) fn rouse(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    #[test]
    fn loom_a_message_is_seen_before_sleep_or_wakes_the_sleeper() {
        loom::model(|| {
            let doze = Arc::new(Doze::new());
            let inbox = Arc::new(AtomicBool::new(false));
            let sender = {
                let (doze, inbox) = (doze.clone(), inbox.clone());
                thread::spawn(move || {
                    inbox.store(true, Ordering::Release);
                    doze.must_wake()
                })
            };
            doze.announce();
            let seen = inbox.load(Ordering::Acquire);
            let woken = sender.join().unwrap();
            assert!(seen || woken, "the shard would sleep on a message");
        });
    }

    #[test]
    fn loom_one_of_two_senders_wakes() {
        loom::model(|| {
            let doze = Arc::new(Doze::new());
            doze.announce();
            let other = {
                let doze = doze.clone();
                thread::spawn(move || doze.must_wake())
            };
            let mine = doze.must_wake();
            assert!(mine || other.join().unwrap());
        });
    }
}
