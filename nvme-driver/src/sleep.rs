//! How a queue pair's owner sleeps: when its interrupt is armed, and when it is switched off again.
//!
//! Arming and disarming are calls of the kernel that cost as much as many interrupts, and an interrupt that nobody waits
//! for costs a little each time. So the interrupt is armed by the first sleep, stays armed while the owner keeps
//! sleeping now and then, and is switched off once the owner has polled many completions without sleeping.

use std::os::fd::RawFd;

use foliant_nvme_transport::QueueInterrupt;

/// Completions polled since the last sleep after which an owner counts as busy.
const BUSY_COMPLETIONS: u32 = 256;

/// What wakes the owner of a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wakeup {
    /// Completions are there already: don't sleep.
    Ready,
    /// This descriptor polls readable when there may be completions. It belongs to the queue pair.
    Descriptor(RawFd),
    /// Only [`pump`](crate::QueuePair::pump) moves the device: nothing happens before the time that the last one named.
    Pump,
    /// Nothing: only polling tells whether commands in flight have completed.
    Nothing,
}

/// The interrupt of a queue pair and what has been polled beside it.
pub(crate) struct QueueSleep {
    interrupt: Option<Box<dyn QueueInterrupt>>,
    is_armed: bool,
    polled: u32,
}

impl QueueSleep {
    pub(crate) fn new(interrupt: Option<Box<dyn QueueInterrupt>>) -> Self {
        Self { interrupt, is_armed: false, polled: 0 }
    }

    /// Arms the interrupt and forgets those that came. Whoever calls this looks at the queue afterwards.
    pub(crate) fn prepare(&mut self) -> Wakeup {
        let Some(interrupt) = &mut self.interrupt else { return Wakeup::Nothing };
        if let Err(error) = interrupt.arm() {
            tracing::warn!(%error, "an interrupt can't be armed; the queue is polled from now on");
            (self.interrupt, self.is_armed) = (None, false);
            return Wakeup::Nothing;
        }
        interrupt.drain();
        (self.is_armed, self.polled) = (true, 0);
        Wakeup::Descriptor(interrupt.fd())
    }

    /// Counts completions that were polled; who polls many without sleeping needs no interrupt.
    #[inline]
    pub(crate) fn note_polled(&mut self, completions: u32) {
        if self.is_armed {
            self.note_polled_armed(completions);
        }
    }

    #[cold]
    fn note_polled_armed(&mut self, completions: u32) {
        self.polled = self.polled.saturating_add(completions);
        if self.polled < BUSY_COMPLETIONS {
            return;
        }
        if let Some(interrupt) = &mut self.interrupt
            && let Err(error) = interrupt.disarm()
        {
            tracing::debug!(%error, "an interrupt stays armed");
        }
        self.is_armed = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use foliant_nvme_transport::TransportError;
    use std::sync::{Arc, Mutex};

    struct Recorder {
        calls: Arc<Mutex<Vec<&'static str>>>,
        fails: bool,
    }

    impl Recorder {
        fn call(&self, name: &'static str) -> Result<(), TransportError> {
            self.calls.lock().unwrap().push(name);
            if self.fails { Err(TransportError::Gone) } else { Ok(()) }
        }
    }

    impl QueueInterrupt for Recorder {
        fn vector(&self) -> u16 {
            1
        }

        fn fd(&self) -> RawFd {
            42
        }

        fn arm(&mut self) -> Result<(), TransportError> {
            self.call("arm")
        }

        fn disarm(&mut self) -> Result<(), TransportError> {
            self.call("disarm")
        }

        fn drain(&mut self) {
            let _ = self.call("drain");
        }
    }

    fn recorded(fails: bool) -> (QueueSleep, Arc<Mutex<Vec<&'static str>>>) {
        let calls = Arc::new(Mutex::new(Vec::new()));
        (QueueSleep::new(Some(Box::new(Recorder { calls: calls.clone(), fails }))), calls)
    }

    #[test]
    fn the_interrupt_is_armed_and_drained_before_the_last_look() {
        let (mut sleep, calls) = recorded(false);
        assert_eq!(sleep.prepare(), Wakeup::Descriptor(42));
        assert_eq!(*calls.lock().unwrap(), ["arm", "drain"]);
    }

    #[test]
    fn who_polls_without_sleeping_switches_the_interrupt_off_once() {
        let (mut sleep, calls) = recorded(false);
        sleep.note_polled(10 * BUSY_COMPLETIONS);
        assert!(calls.lock().unwrap().is_empty(), "it was never armed");
        sleep.prepare();
        sleep.note_polled(BUSY_COMPLETIONS - 1);
        sleep.prepare();
        sleep.note_polled(BUSY_COMPLETIONS - 1);
        assert!(!calls.lock().unwrap().contains(&"disarm"), "a sleep begins the count again");
        sleep.note_polled(1);
        sleep.note_polled(BUSY_COMPLETIONS);
        assert_eq!(calls.lock().unwrap().iter().filter(|call| **call == "disarm").count(), 1);
    }

    #[test]
    fn without_an_interrupt_that_works_only_polling_tells() {
        assert_eq!(QueueSleep::new(None).prepare(), Wakeup::Nothing);
        let (mut sleep, calls) = recorded(true);
        assert_eq!((sleep.prepare(), sleep.prepare()), (Wakeup::Nothing, Wakeup::Nothing));
        assert_eq!(*calls.lock().unwrap(), ["arm"]);
    }
}
