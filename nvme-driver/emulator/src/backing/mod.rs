//! Where the blocks live: one [`Medium`] a controller, and one [`Engine`] a queue that moves data to and from it.
//!
//! The medium is a flat range of bytes with the namespaces laid one after another; what follows knows neither
//! namespaces nor commands, only [`Work`]. An engine either finishes work at once ([`Started::Done`]) or reports
//! it later from [`Engine::reap`] under the token it was started with.

pub(crate) mod file;
pub(crate) mod job;
pub(crate) mod null;
pub(crate) mod plain;
pub(crate) mod ram;
pub(crate) mod uring;

use std::os::fd::RawFd;
use std::sync::Arc;

use foliant_nvme_spec::StatusCode;

use crate::model::{Model, ModelEngine};
use crate::prp::Segment;
use file::FileStore;
use null::NullEngine;
use plain::PlainEngine;
use ram::RamStore;
use uring::UringEngine;

/// A range of bytes of the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) len_bytes: u64,
}

impl Extent {
    pub(crate) const fn end(self) -> u64 {
        self.offset + self.len_bytes
    }
}

/// When written data has to be on the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durability {
    /// By the next Flush.
    Cached,
    /// When the command completes: forced unit access, or no volatile write cache.
    AtCompletion,
}

/// Whether zeroed blocks keep their space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Zeroing {
    /// They stay allocated.
    Keep,
    /// Their space is given back.
    Deallocate,
}

/// What a command asks of the medium.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work<'a> {
    Read { extent: Extent, segments: &'a [Segment] },
    Write { extent: Extent, segments: &'a [Segment], durability: Durability },
    Zero { extents: &'a [Extent], zeroing: Zeroing, durability: Durability },
    Flush { extent: Extent },
}

/// Why work on the medium failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MediaError {
    Read,
    Write,
    /// The file system has no space left for a sparse image.
    Full,
    /// Host memory that was mapped for DMA is no memory any more.
    HostMemory,
}

impl MediaError {
    pub(crate) const fn status(self) -> StatusCode {
        match self {
            Self::Read => StatusCode::UNRECOVERED_READ_ERROR,
            Self::Write => StatusCode::WRITE_FAULT,
            Self::Full => StatusCode::CAPACITY_EXCEEDED,
            Self::HostMemory => StatusCode::DATA_TRANSFER_ERROR,
        }
    }
}

/// The result of [`Engine::start`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Started {
    Done(Result<(), MediaError>),
    Pending,
}

/// The blocks of one controller, shared by its queues and kept over attachments.
#[derive(Debug)]
pub(crate) enum Medium {
    Null,
    Ram(Arc<RamStore>),
    Model(Arc<Model>),
    File(Arc<FileStore>),
}

impl Medium {
    /// The engine of one queue that has `tokens` commands in flight at most.
    pub(crate) fn engine(&self, tokens: u32) -> Engine {
        match self {
            Self::Null => Engine::Null(NullEngine),
            Self::Ram(store) => Engine::Ram(Arc::clone(store)),
            Self::Model(model) => Engine::Model(ModelEngine::new(Arc::clone(model), tokens)),
            Self::File(store) => match UringEngine::for_store(store, tokens) {
                Some(engine) => Engine::Uring(Box::new(engine)),
                None => Engine::Plain(PlainEngine::new(Arc::clone(store))),
            },
        }
    }

    /// Makes everything that has completed durable, before a shutdown or when the write cache is switched off.
    pub(crate) fn sync(&self) -> Result<(), MediaError> {
        match self {
            Self::Null | Self::Ram(_) => Ok(()),
            Self::Model(model) => {
                model.destage();
                Ok(())
            }
            Self::File(store) => store.sync(),
        }
    }

    /// Copies what a Read would return now.
    pub(crate) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        match self {
            Self::Null => {
                buffer.fill(0);
                Ok(())
            }
            Self::Ram(store) => {
                store.read_into(offset, buffer);
                Ok(())
            }
            Self::Model(model) => {
                model.ram().read_into(offset, buffer);
                Ok(())
            }
            Self::File(store) => store.read_into(offset, buffer),
        }
    }
}

/// How one queue moves data.
#[derive(Debug)]
pub(crate) enum Engine {
    Null(NullEngine),
    Ram(Arc<RamStore>),
    Model(ModelEngine),
    Plain(PlainEngine),
    Uring(Box<UringEngine>),
}

impl Engine {
    /// Whether [`start`](Self::start) needs a token, because the work goes on after it or has to be told when it
    /// completes.
    #[inline]
    pub(crate) fn needs_token(&self) -> bool {
        matches!(self, Self::Model(_) | Self::Uring(_))
    }

    /// Starts `work`. `token` is below the engine's number of tokens and in use for nothing else; engines that
    /// need none ignore it.
    #[inline]
    pub(crate) fn start(&mut self, token: u32, work: &Work<'_>) -> Started {
        match self {
            Self::Null(engine) => engine.start(work),
            Self::Ram(store) => Started::Done(store.run(work)),
            Self::Model(engine) => engine.start(token, work),
            Self::Plain(engine) => Started::Done(engine.run(work)),
            Self::Uring(engine) => engine.start(token, work),
        }
    }

    /// Hands everything started to the kernel, with one call.
    #[inline]
    pub(crate) fn submit(&mut self) {
        if let Self::Uring(engine) = self {
            engine.submit();
        }
    }

    /// Whether the kernel didn't take all of it.
    pub(crate) fn has_unsubmitted(&self) -> bool {
        matches!(self, Self::Uring(engine) if engine.has_unsubmitted())
    }

    /// Reports pending work that has finished.
    #[inline]
    pub(crate) fn reap(&mut self, finished: impl FnMut(u32, Result<(), MediaError>)) {
        if let Self::Uring(engine) = self {
            engine.reap(finished);
        }
    }

    /// Waits until the kernel touches no host memory for this queue any more, and reports what finished.
    pub(crate) fn drain(&mut self, finished: impl FnMut(u32, Result<(), MediaError>)) {
        if let Self::Uring(engine) = self {
            engine.drain(finished);
        }
    }

    /// The command behind `token` completes now, as the driver sees it.
    #[inline]
    pub(crate) fn completed(&mut self, token: u32) {
        if let Self::Model(engine) = self {
            engine.completed(token);
        }
    }

    /// The command behind `token` will never complete: its queue went away under it.
    pub(crate) fn abandoned(&mut self, token: u32) {
        if let Self::Model(engine) = self {
            engine.abandoned(token);
        }
    }

    /// Readable when [`reap`](Self::reap) would report something that finished in the background.
    pub(crate) fn wakeup_fd(&self) -> Option<RawFd> {
        match self {
            Self::Uring(engine) => Some(engine.wakeup_fd()),
            _ => None,
        }
    }

    /// Commands that went through a bounce buffer since the last call.
    pub(crate) fn take_bounced(&mut self) -> u64 {
        match self {
            Self::Plain(engine) => std::mem::take(&mut engine.bounced),
            Self::Uring(engine) => std::mem::take(&mut engine.bounced),
            _ => 0,
        }
    }
}
