//! The thread that drives a shard: spins while there is work, sleeps when there is none.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use foliant_nvme::Wakeup;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

use super::{Shard, Step};
use crate::stats::bump;

/// Steps without progress before a shard with commands in flight sleeps: some tens of microseconds.
const SPINS_IN_FLIGHT: u32 = 500;
/// Steps without progress before a shard without any sleeps: long enough that a thread which has just been answered can
/// ask again without a wake-up, a few microseconds.
const SPINS_IDLE: u32 = 50;

/// Runs `shard` until `stop` is set.
pub(crate) fn run(mut shard: Shard, origin: Instant, stop: &AtomicBool) -> Shard {
    let mut idle = 0;
    while !stop.load(Ordering::Acquire) {
        let step = shard.poll(origin.elapsed().as_nanos() as u64);
        if step.progressed {
            idle = 0;
            continue;
        }
        idle += 1;
        let spins = if step.waiting { SPINS_IN_FLIGHT } else { SPINS_IDLE };
        if idle < spins {
            std::hint::spin_loop();
            continue;
        }
        sleep(&mut shard, step, origin);
        idle = 0;
    }
    shard.close();
    shard
}

/// Sleeps until a message, the device, or the time that the shard named.
fn sleep(shard: &mut Shard, step: Step, origin: Instant) {
    let wakeup = shard.prepare_to_sleep();
    if wakeup == Wakeup::Ready {
        return shard.wake();
    }
    bump(&shard.link().counters.sleeps, 1);
    let now_ns = origin.elapsed().as_nanos() as u64;
    let max_ns = if wakeup == Wakeup::Nothing { POLLED_NAP_NS } else { SLEEP_MAX_NS };
    let wait_ns = step.due_ns.map_or(max_ns, |due| due.saturating_sub(now_ns).min(max_ns));
    let wait = Duration::from_nanos(wait_ns);
    let timeout = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
    let bell = PollFd::from_borrowed_fd(shard.bell(), PollFlags::IN);
    // An interrupted or failed wait only means that the shard looks again earlier.
    let _ = match wakeup {
        Wakeup::Descriptor(fd) => {
            // SAFETY: the descriptor belongs to the shard's queue, which `shard` keeps alive while it is borrowed.
            #[expect(unsafe_code, reason = "the transport names its descriptor by number")]
            let device = unsafe { BorrowedFd::borrow_raw(fd) };
            poll(&mut [bell, PollFd::from_borrowed_fd(device, PollFlags::IN)], Some(&timeout))
        }
        Wakeup::Ready | Wakeup::Pump | Wakeup::Nothing => poll(&mut [bell], Some(&timeout)),
    };
    shard.wake();
}

/// How long a shard naps whose device has no interrupt and holds commands.
const POLLED_NAP_NS: u64 = 20_000;

/// A sleeping shard looks around this often even if nothing calls it, so that `stop` needs no bell of its own.
const SLEEP_MAX_NS: u64 = 1_000_000_000;
