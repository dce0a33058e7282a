//! The image file through io_uring: one ring a queue, one system call for everything a pump has fetched.
//!
//! The ring's own descriptor is the wakeup descriptor: it polls readable while completions wait in the ring and
//! stops when they have been reaped, without an eventfd to be written and drained.
//!
//! Nothing here asks for a single issuer: a queue may be pumped by one thread and later by another.

#![expect(unsafe_code, reason = "hands memory that the driver mapped to the kernel")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{EnterFlags, IoUring, Probe, opcode, squeue};

use super::file::{EngineKind, FileStore, WorkKind};
use super::job::{Call, Job, Step};
use super::{Durability, MediaError, Started, Work};

/// Entries of a queue's ring at most; more commands in flight wait their turn in `unqueued`.
const RING_ENTRIES_MAX: u32 = 1024;

/// The io_uring of one queue.
///
/// Invariant: `in_kernel` is the number of calls that the kernel may be working on, and their jobs aren't touched.
pub(crate) struct UringEngine {
    ring: IoUring,
    store: Arc<FileStore>,
    /// One a token.
    jobs: Box<[Job]>,
    in_kernel: u32,
    /// Calls in the ring that the kernel hasn't been told of.
    unsubmitted: u32,
    /// Tokens whose next call didn't find room in the ring.
    unqueued: Vec<u32>,
    /// Commands that went through a bounce buffer.
    pub(crate) bounced: u64,
}

impl std::fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringEngine")
            .field("in_kernel", &self.in_kernel)
            .field("unsubmitted", &self.unsubmitted)
            .finish_non_exhaustive()
    }
}

impl UringEngine {
    /// Whether this process may use io_uring, and the kernel knows every operation needed.
    pub(crate) fn probe() -> io::Result<()> {
        let ring = IoUring::new(2)?;
        // A seccomp profile may allow one of the three calls and forbid another.
        ring.submit()?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed =
            [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        if needed.iter().all(|code| probe.is_supported(*code)) {
            Ok(())
        } else {
            Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel's io_uring lacks operations (needs 5.6)",
            ))
        }
    }

    /// The engine of a queue with `tokens` commands in flight at most; `None` when the store uses plain calls, or
    /// when this one ring is refused (a limit on locked memory or descriptors), which is warned of.
    pub(crate) fn for_store(store: &Arc<FileStore>, tokens: u32) -> Option<Self> {
        if store.engine() == EngineKind::Plain {
            return None;
        }
        match build_ring(tokens.clamp(2, RING_ENTRIES_MAX)) {
            Ok(ring) => Some(Self {
                ring,
                store: Arc::clone(store),
                jobs: (0..tokens).map(|_| Job::new()).collect(),
                in_kernel: 0,
                unsubmitted: 0,
                unqueued: Vec::with_capacity(tokens as usize),
                bounced: 0,
            }),
            Err(error) => {
                tracing::warn!(
                    %error,
                    "no io_uring for this queue, it uses plain calls; raise the limits on open files and locked \
                     memory, or ask for fewer queues"
                );
                None
            }
        }
    }

    pub(crate) fn start(&mut self, token: u32, work: &Work<'_>) -> Started {
        let job = &mut self.jobs[token as usize];
        match job.begin(&self.store, work) {
            Ok(bounced) => {
                self.bounced += u64::from(bounced);
                self.enqueue(token);
                Started::Pending
            }
            Err(error) => Started::Done(Err(self.store.media_error(WorkKind::of(work), &error))),
        }
    }

    /// Puts the job's next call into the ring.
    fn enqueue(&mut self, token: u32) {
        let entry = self.entry(token);
        // SAFETY: the call's vectors and their memory stay where they are until its completion is reaped: the job
        // isn't touched before, and `drain` waits for it before DMA memory goes away or the ring is dropped.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_ok() {
            self.unsubmitted += 1;
        } else {
            self.unqueued.push(token);
        }
    }

    fn entry(&self, token: u32) -> squeue::Entry {
        let fd = Fd(self.store.file().as_raw_fd());
        let entry = match self.jobs[token as usize].call() {
            Call::Read { offset, iovecs, count } => {
                opcode::Readv::new(fd, iovecs, count).offset(offset).build()
            }
            Call::Write { offset, iovecs, count, durability } => {
                let flags = match durability {
                    Durability::Cached => 0,
                    Durability::AtCompletion => libc::RWF_DSYNC,
                };
                opcode::Writev::new(fd, iovecs, count).offset(offset).rw_flags(flags).build()
            }
            Call::Fallocate { offset, len_bytes, mode } => {
                opcode::Fallocate::new(fd, len_bytes).offset(offset).mode(mode).build()
            }
            Call::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        };
        entry.user_data(token.into())
    }

    /// Hands everything in the ring to the kernel, with one call unless more was waiting than fits the ring.
    pub(crate) fn submit(&mut self) {
        while self.unsubmitted > 0 {
            match self.ring.submit() {
                Ok(0) => return,
                Ok(taken) => self.note_submitted(taken),
                Err(error) => {
                    // Whatever it was, the entries stay in the ring and the next pump tries again.
                    tracing::debug!(%error, "io_uring submission put off");
                    return;
                }
            }
            while !self.ring.submission().is_full()
                && let Some(token) = self.unqueued.pop()
            {
                self.enqueue(token);
            }
        }
    }

    /// Whether calls wait that the kernel hasn't taken.
    pub(crate) fn has_unsubmitted(&self) -> bool {
        self.unsubmitted > 0 || !self.unqueued.is_empty()
    }

    fn note_submitted(&mut self, taken: usize) {
        let taken = u32::try_from(taken).unwrap_or(u32::MAX).min(self.unsubmitted);
        self.unsubmitted -= taken;
        self.in_kernel += taken;
    }

    /// Takes what the kernel has finished, puts follow-up calls into the ring, and reports finished work.
    pub(crate) fn reap(&mut self, mut finished: impl FnMut(u32, Result<(), MediaError>)) {
        if self.in_kernel == 0 {
            return;
        }
        let has_kernel_work = {
            let flags = self.ring.submission();
            flags.taskrun() || flags.cq_overflow()
        };
        if has_kernel_work {
            // SAFETY: no argument is passed that the kernel would read.
            let entered = unsafe {
                self.ring.submitter().enter::<libc::sigset_t>(0, 0, EnterFlags::GETEVENTS.bits(), None)
            };
            if let Err(error) = entered {
                tracing::debug!(%error, "io_uring completions put off");
            }
        }
        loop {
            let Some(completion) = self.ring.completion().next() else { break };
            self.in_kernel -= 1;
            let token = u32::try_from(completion.user_data()).unwrap_or(u32::MAX);
            let Some(job) = self.jobs.get_mut(token as usize) else {
                tracing::error!(token, "io_uring completed a call that was never made");
                continue;
            };
            let result = usize::try_from(completion.result())
                .map_err(|_| io::Error::from_raw_os_error(-completion.result()));
            match job.advance(&self.store, result) {
                Step::Done(result) => finished(token, result),
                Step::Again => self.enqueue(token),
            }
        }
    }

    /// Waits until nothing is in the kernel and nothing is left to hand over.
    pub(crate) fn drain(&mut self, mut finished: impl FnMut(u32, Result<(), MediaError>)) {
        while self.in_kernel > 0 || self.has_unsubmitted() {
            self.submit();
            if self.in_kernel > 0 {
                match self.ring.submit_and_wait(1) {
                    Ok(taken) => self.note_submitted(taken),
                    Err(error) => {
                        tracing::debug!(%error, "io_uring wait put off");
                        std::thread::yield_now();
                    }
                }
            }
            self.reap(&mut finished);
        }
    }

    pub(crate) fn wakeup_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        self.drain(|_, _| {});
    }
}

/// A ring whose completions don't interrupt a thread that polls; older kernels (before 5.19) get a plain one.
fn build_ring(entries: u32) -> io::Result<IoUring> {
    match IoUring::builder().setup_coop_taskrun().setup_taskrun_flag().build(entries) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(entries),
        built => built,
    }
}
