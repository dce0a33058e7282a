//! The image file through plain system calls: what is left where io_uring isn't allowed.
//!
//! Each command is carried out, to its end, inside the pump that fetches it. That is slower, and a pump blocks as
//! long as the disk does; the results are the same.

#![expect(unsafe_code, reason = "vectored calls on memory that the driver mapped")]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::file::{FileStore, WorkKind};
use super::job::{Call, Job, Step};
use super::{Durability, MediaError, Work};

/// Carries work out with one blocking call after another.
#[derive(Debug)]
pub(crate) struct PlainEngine {
    store: Arc<FileStore>,
    job: Job,
    /// Commands that went through a bounce buffer.
    pub(crate) bounced: u64,
}

impl PlainEngine {
    pub(crate) fn new(store: Arc<FileStore>) -> Self {
        Self { store, job: Job::new(), bounced: 0 }
    }

    pub(crate) fn run(&mut self, work: &Work<'_>) -> Result<(), MediaError> {
        let bounced = self.job.begin(&self.store, work);
        self.bounced += u64::from(bounced.map_err(|e| self.store.media_error(WorkKind::of(work), &e))?);
        loop {
            let result = self.make(self.job.call());
            if let Step::Done(result) = self.job.advance(&self.store, result) {
                return result;
            }
        }
    }

    fn make(&self, call: Call) -> io::Result<usize> {
        let fd = self.store.file().as_raw_fd();
        match call {
            Call::Read { offset, iovecs, count } => {
                // SAFETY: the job keeps `count` vectors at `iovecs`, of memory that is the device's to write.
                bytes(unsafe { libc::preadv(fd, iovecs, count.cast_signed(), offset.cast_signed()) })
            }
            Call::Write { offset, iovecs, count, durability } => {
                let flags = match durability {
                    Durability::Cached => 0,
                    Durability::AtCompletion => libc::RWF_DSYNC,
                };
                let (count, offset) = (count.cast_signed(), offset.cast_signed());
                // SAFETY: the job keeps `count` vectors at `iovecs`, of memory that is the device's to read.
                bytes(unsafe { libc::pwritev2(fd, iovecs, count, offset, flags) })
            }
            Call::Fallocate { offset, len_bytes, mode } => {
                // SAFETY: takes no pointer.
                let done =
                    unsafe { libc::fallocate(fd, mode, offset.cast_signed(), len_bytes.cast_signed()) };
                bytes(done as isize)
            }
            Call::Sync => self.store.file().sync_data().map(|()| 0),
        }
    }
}

/// The count of a system call, or the error it left behind.
fn bytes(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}
