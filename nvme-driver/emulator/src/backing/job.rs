//! One piece of work on the image file as the sequence of system calls it takes.
//!
//! A job says which [`Call`] comes next and is told its result; who makes the call, and whether it waits for it, is
//! the engine's business. That keeps short transfers, holes that the file system can't make, bounce buffers and
//! errors in one place for io_uring and for plain calls.
//!
//! ```text
//!   Transfer ──────────────(all bytes moved)──────────────► done     (durable writes carry RWF_DSYNC)
//!   Hole ──(next extent)─► Hole ──► Sync, when durable ───► done
//!     └─(not supported)──► Zeroes, chunk by chunk, then the next extent
//!   Sync ─────────────────────────────────────────────────► done
//! ```

#![expect(unsafe_code, reason = "vectors describe memory that the driver mapped, from any thread")]

use std::io;

use memmap2::MmapMut;

use super::file::{FileStore, WorkKind};
use super::{Durability, Extent, MediaError, Work, Zeroing};
use crate::prp::{Segment, copy_from_host, copy_to_host};

/// Segments that one vectored call takes (UIO_MAXIOV).
const IOVECS_MAX: usize = 1024;
/// Interrupted and refused-for-now calls that are made again before the work fails.
const RETRIES_MAX: u32 = 1000;

/// The next system call of a job. The vectors stay valid until its result has been told to the job.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call {
    Read { offset: u64, iovecs: *const libc::iovec, count: u32 },
    Write { offset: u64, iovecs: *const libc::iovec, count: u32, durability: Durability },
    Fallocate { offset: u64, len_bytes: u64, mode: i32 },
    Sync,
}

/// Whether a job goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Again,
    Done(Result<(), MediaError>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Read,
    Write,
    Hole,
    Zeroes,
    Sync,
}

/// Work on the image file under way. Jobs are made once and used for one piece of work after another.
///
/// Invariant: while a call is out, `iovecs`, `bounce` and the memory they describe don't move.
#[derive(Debug)]
pub(crate) struct Job {
    stage: Stage,
    kind: WorkKind,
    durability: Durability,
    zeroing: Zeroing,
    /// Where the current extent goes on.
    offset: u64,
    /// What is left of the current extent, in bytes.
    remaining: u64,
    iovecs: Vec<libc::iovec>,
    /// First vector with bytes left.
    iovec_at: usize,
    /// Extents still to zero after the current one, last first.
    extents: Vec<Extent>,
    bounce: Option<Bounce>,
    retries: u32,
}

// SAFETY: the vectors describe memory mapped for DMA, which any thread may hand to the kernel under `map_dma`'s
// contract, or the job's own bounce buffer and the store's zeroes.
unsafe impl Send for Job {}

/// An aligned stand-in for memory that O_DIRECT doesn't take.
#[derive(Debug)]
struct Bounce {
    buffer: MmapMut,
    segments: Vec<Segment>,
}

impl Job {
    pub(crate) fn new() -> Self {
        Self {
            stage: Stage::Sync,
            kind: WorkKind::Modify,
            durability: Durability::Cached,
            zeroing: Zeroing::Keep,
            offset: 0,
            remaining: 0,
            iovecs: Vec::new(),
            iovec_at: 0,
            extents: Vec::new(),
            bounce: None,
            retries: 0,
        }
    }

    /// Takes on `work`. Returns whether its data goes through a bounce buffer.
    pub(crate) fn begin(&mut self, store: &FileStore, work: &Work<'_>) -> io::Result<bool> {
        self.kind = WorkKind::of(work);
        self.retries = 0;
        self.extents.clear();
        self.bounce = None;
        match work {
            Work::Read { extent, segments } => self.begin_transfer(store, Stage::Read, *extent, segments),
            Work::Write { extent, segments, durability } => {
                self.durability = *durability;
                self.begin_transfer(store, Stage::Write, *extent, segments)
            }
            Work::Zero { extents, zeroing, durability } => {
                self.durability = *durability;
                self.zeroing = *zeroing;
                self.extents.extend(extents.iter().rev().filter(|extent| extent.len_bytes > 0));
                self.next_extent();
                Ok(false)
            }
            Work::Flush { .. } => {
                self.stage = Stage::Sync;
                Ok(false)
            }
        }
    }

    fn begin_transfer(
        &mut self,
        store: &FileStore,
        stage: Stage,
        extent: Extent,
        segments: &[Segment],
    ) -> io::Result<bool> {
        self.stage = stage;
        self.offset = extent.offset;
        self.remaining = extent.len_bytes;
        self.iovec_at = 0;
        self.iovecs.clear();
        if store.needs_bounce(segments) {
            let mut buffer = MmapMut::map_anon(extent.len_bytes as usize)?;
            if stage == Stage::Write {
                copy_from_host(segments, &mut buffer);
            }
            self.iovecs.push(libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() });
            self.bounce = Some(Bounce { buffer, segments: segments.to_vec() });
            return Ok(true);
        }
        self.iovecs.extend(segments.iter().map(|segment| libc::iovec {
            iov_base: segment.host.as_ptr().cast(),
            iov_len: segment.len_bytes,
        }));
        Ok(false)
    }

    /// Moves on to the next extent to zero, to the final sync, or to nothing; true when there is a call to make.
    fn next_extent(&mut self) -> bool {
        if let Some(extent) = self.extents.pop() {
            self.stage = Stage::Hole;
            self.offset = extent.offset;
            self.remaining = extent.len_bytes;
            return true;
        }
        let needs_sync = self.stage != Stage::Sync && self.durability == Durability::AtCompletion;
        self.stage = Stage::Sync;
        needs_sync
    }

    /// The call to make now.
    pub(crate) fn call(&self) -> Call {
        let vectors = &self.iovecs[self.iovec_at..];
        let (iovecs, count) = (vectors.as_ptr(), vectors.len().min(IOVECS_MAX) as u32);
        match self.stage {
            Stage::Read => Call::Read { offset: self.offset, iovecs, count },
            Stage::Write => Call::Write { offset: self.offset, iovecs, count, durability: self.durability },
            Stage::Zeroes => {
                Call::Write { offset: self.offset, iovecs, count, durability: Durability::Cached }
            }
            Stage::Hole => {
                let mode = match self.zeroing {
                    Zeroing::Keep => libc::FALLOC_FL_ZERO_RANGE,
                    Zeroing::Deallocate => libc::FALLOC_FL_PUNCH_HOLE,
                };
                let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
                Call::Fallocate { offset: self.offset, len_bytes: self.remaining, mode }
            }
            Stage::Sync => Call::Sync,
        }
    }

    /// Takes the result of the last call.
    pub(crate) fn advance(&mut self, store: &FileStore, result: io::Result<usize>) -> Step {
        let moved = match result {
            Ok(moved) => moved,
            Err(error) => return self.advance_after_error(store, &error),
        };
        match self.stage {
            Stage::Read | Stage::Write | Stage::Zeroes if moved == 0 => {
                let error = io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the image file is shorter than the device: it was truncated from outside",
                );
                self.finish(Err(store.media_error(self.kind, &error)))
            }
            Stage::Read | Stage::Write | Stage::Zeroes => {
                self.consume(moved);
                match (self.remaining, self.stage) {
                    (0, Stage::Zeroes) => self.step_to_next_extent(),
                    (0, _) => self.finish(Ok(())),
                    (_, Stage::Zeroes) => {
                        self.refill_zeroes(store);
                        Step::Again
                    }
                    _ => Step::Again,
                }
            }
            Stage::Hole => self.step_to_next_extent(),
            Stage::Sync => self.finish(Ok(())),
        }
    }

    fn advance_after_error(&mut self, store: &FileStore, error: &io::Error) -> Step {
        match error.raw_os_error() {
            // ECANCELED: the thread that submitted the call has ended and took its requests with it.
            Some(libc::EINTR | libc::EAGAIN | libc::ECANCELED) if self.retries < RETRIES_MAX => {
                self.retries += 1;
                Step::Again
            }
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) if self.stage == Stage::Hole => {
                self.stage = Stage::Zeroes;
                self.refill_zeroes(store);
                Step::Again
            }
            _ => self.finish(Err(store.media_error(self.kind, error))),
        }
    }

    fn step_to_next_extent(&mut self) -> Step {
        if self.next_extent() { Step::Again } else { self.finish(Ok(())) }
    }

    /// Points the vectors at the next chunk of zeroes.
    fn refill_zeroes(&mut self, store: &FileStore) {
        let zeroes = store.zeroes(self.remaining);
        self.iovecs.clear();
        self.iovec_at = 0;
        self.iovecs.push(libc::iovec { iov_base: zeroes.as_ptr().cast_mut().cast(), iov_len: zeroes.len() });
    }

    /// Takes `moved` bytes off the front of the vectors.
    fn consume(&mut self, moved: usize) {
        self.offset += moved as u64;
        self.remaining = self.remaining.saturating_sub(moved as u64);
        let mut left = moved;
        while let Some(vector) = self.iovecs.get_mut(self.iovec_at) {
            if left < vector.iov_len {
                vector.iov_base = vector.iov_base.wrapping_byte_add(left);
                vector.iov_len -= left;
                return;
            }
            left -= vector.iov_len;
            self.iovec_at += 1;
        }
    }

    fn finish(&mut self, result: Result<(), MediaError>) -> Step {
        if let Some(bounce) = self.bounce.take()
            && self.kind == WorkKind::Read
            && result.is_ok()
        {
            // The segments are still mapped: unmapping waits for jobs.
            copy_to_host(&bounce.buffer, &bounce.segments);
        }
        Step::Done(result)
    }
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;

    use super::*;
    use crate::backing::file::EngineKind;

    const DONE: Step = Step::Done(Ok(()));

    fn store() -> FileStore {
        let file = std::fs::File::open("/dev/null").unwrap();
        FileStore::over(file, std::path::Path::new("/dev/null"), EngineKind::Plain).unwrap()
    }

    fn failure(errno: i32) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(errno))
    }

    /// The call as (name, offset, bytes).
    fn call(job: &Job) -> (&'static str, u64, u64) {
        let len = |iovecs: *const libc::iovec, count: u32| {
            // SAFETY: the job that made the call keeps its vectors.
            let vectors = unsafe { std::slice::from_raw_parts(iovecs, count as usize) };
            vectors.iter().map(|vector| vector.iov_len as u64).sum()
        };
        match job.call() {
            Call::Read { offset, iovecs, count } => ("read", offset, len(iovecs, count)),
            Call::Write { offset, iovecs, count, .. } => ("write", offset, len(iovecs, count)),
            Call::Fallocate { offset, len_bytes, .. } => ("fallocate", offset, len_bytes),
            Call::Sync => ("sync", 0, 0),
        }
    }

    #[test]
    fn short_transfers_go_on_where_they_stopped() {
        let (store, mut job, mut data) = (store(), Job::new(), vec![0u8; 3000]);
        let base = NonNull::new(data.as_mut_ptr()).unwrap();
        let segments = [1000, 2000].map(|len_bytes| Segment { iova: 0, host: base, len_bytes });
        let extent = Extent { offset: 4096, len_bytes: 3000 };
        job.begin(&store, &Work::Read { extent, segments: &segments }).unwrap();
        assert_eq!(call(&job), ("read", 4096, 3000));
        assert_eq!(job.advance(&store, Ok(400)), Step::Again);
        assert_eq!(call(&job), ("read", 4496, 2600));
        assert_eq!(job.advance(&store, Ok(1600)), Step::Again);
        assert_eq!(call(&job), ("read", 6096, 1000));
        assert_eq!(job.advance(&store, failure(libc::EINTR)), Step::Again);
        assert_eq!(call(&job), ("read", 6096, 1000));
        assert_eq!(job.advance(&store, Ok(1000)), DONE);
    }

    #[test]
    fn more_segments_than_one_call_takes_are_several_calls() {
        let (store, mut job, mut page) = (store(), Job::new(), vec![0u8; 512]);
        let host = NonNull::new(page.as_mut_ptr()).unwrap();
        let segments = vec![Segment { iova: 0, host, len_bytes: 512 }; 1500];
        let extent = Extent { offset: 0, len_bytes: 1500 * 512 };
        let durability = Durability::Cached;
        job.begin(&store, &Work::Write { extent, segments: &segments, durability }).unwrap();
        assert_eq!(call(&job), ("write", 0, 1024 * 512));
        assert_eq!(job.advance(&store, Ok(1024 * 512)), Step::Again);
        assert_eq!(call(&job), ("write", 1024 * 512, 476 * 512));
        assert_eq!(job.advance(&store, Ok(476 * 512)), DONE);
    }

    #[test]
    fn without_holes_zeroes_are_written_extent_by_extent_and_synced_when_durable() {
        let (store, mut job) = (store(), Job::new());
        let extents = [(0, 3 << 19), (8192 << 10, 0), (4096 << 10, 4096)]
            .map(|(offset, len_bytes)| Extent { offset, len_bytes });
        let (zeroing, durability) = (Zeroing::Deallocate, Durability::AtCompletion);
        job.begin(&store, &Work::Zero { extents: &extents, zeroing, durability }).unwrap();
        assert_eq!(call(&job), ("fallocate", 0, 3 << 19));
        assert_eq!(job.advance(&store, failure(libc::EOPNOTSUPP)), Step::Again);
        assert_eq!(call(&job), ("write", 0, 1 << 20));
        assert_eq!(job.advance(&store, Ok(1 << 20)), Step::Again);
        assert_eq!(call(&job), ("write", 1 << 20, 1 << 19));
        assert_eq!(job.advance(&store, Ok(1 << 19)), Step::Again);
        assert_eq!(call(&job), ("fallocate", 4096 << 10, 4096));
        assert_eq!(job.advance(&store, Ok(0)), Step::Again);
        assert_eq!(call(&job), ("sync", 0, 0));
        assert_eq!(job.advance(&store, Ok(0)), DONE);
    }

    #[test]
    fn calls_put_off_are_made_again_a_bounded_number_of_times() {
        let (store, mut job) = (store(), Job::new());
        job.begin(&store, &Work::Flush { extent: Extent { offset: 0, len_bytes: 0 } }).unwrap();
        for _ in 0..RETRIES_MAX {
            assert_eq!(job.advance(&store, failure(libc::ECANCELED)), Step::Again);
        }
        assert_eq!(job.advance(&store, failure(libc::ECANCELED)), Step::Done(Err(MediaError::Write)));
    }

    #[test]
    fn errors_keep_their_meaning() {
        let extent = Extent { offset: 0, len_bytes: 0 };
        let read = Work::Read { extent, segments: &[] };
        let write = Work::Write { extent, segments: &[], durability: Durability::Cached };
        for (work, errno, error) in [
            (&read, libc::EIO, MediaError::Read),
            (&read, libc::EFAULT, MediaError::HostMemory),
            (&write, libc::EIO, MediaError::Write),
            (&write, libc::ENOSPC, MediaError::Full),
            (&write, libc::EDQUOT, MediaError::Full),
            (&write, libc::EFBIG, MediaError::Full),
        ] {
            let (store, mut job) = (store(), Job::new());
            job.begin(&store, work).unwrap();
            assert_eq!(job.advance(&store, failure(errno)), Step::Done(Err(error)), "{errno}");
        }
    }

    #[test]
    fn zeroing_nothing_makes_no_change() {
        let (store, mut job) = (store(), Job::new());
        let extents = [Extent { offset: 512, len_bytes: 0 }];
        let (zeroing, durability) = (Zeroing::Keep, Durability::Cached);
        job.begin(&store, &Work::Zero { extents: &extents, zeroing, durability }).unwrap();
        assert_eq!(call(&job), ("sync", 0, 0));
        assert_eq!(job.advance(&store, Ok(0)), DONE);
    }
}
