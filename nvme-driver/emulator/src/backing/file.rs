//! The image file of a device: opening, locking, its alignment rules, and what its errors mean.
//!
//! A file that exists is never shortened or lengthened; one that is created is sparse, and its name is made
//! durable before the device exists. Two engines move its data: [`uring`](super::uring) and [`plain`](super::plain).

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use foliant_nvme_spec::PAGE_BYTES;
use memmap2::MmapMut;
use rustix::fs::{AtFlags, FlockOperation, OFlags, StatxFlags};
use rustix::io::Errno;

use super::uring::UringEngine;
use super::{MediaError, Work};
use crate::EmulatedError;
use crate::config::{Direct, FileEngine};
use crate::prp::Segment;

/// Zeroes written where the file system can't make a hole.
pub(crate) const ZERO_CHUNK_BYTES: usize = 1 << 20;
/// Memory alignment assumed for O_DIRECT where the kernel doesn't report one.
const DIRECT_MEMORY_ALIGN_ASSUMED: usize = 512;

/// An open image file.
#[derive(Debug)]
pub(crate) struct FileStore {
    file: File,
    path: PathBuf,
    /// Alignment that O_DIRECT asks of memory, in bytes; `None` where the host's page cache is used.
    direct_memory_align: Option<usize>,
    engine: EngineKind,
    /// Page-aligned zeroes for file systems without holes.
    zeroes: MmapMut,
    has_warned: AtomicBool,
}

/// The engine that was found to work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EngineKind {
    IoUring,
    Plain,
}

/// What [`FileStore::open`] is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenRequest<'a> {
    pub(crate) path: &'a Path,
    /// Size of all namespaces together; `None` takes the file's.
    pub(crate) size_bytes: Option<u64>,
    /// Smallest block, which is the alignment of offsets.
    pub(crate) block_bytes: u32,
    pub(crate) direct: Direct,
    pub(crate) engine: FileEngine,
}

impl FileStore {
    /// Opens or creates the image, locks it against other processes, and finds out how to move its data. Returns
    /// the store and its size in bytes.
    pub(crate) fn open(request: &OpenRequest<'_>) -> Result<(Self, u64), EmulatedError> {
        let file = open_or_create(request)?;
        lock_exclusively(&file, request.path)?;
        let len_bytes = settle_size(&file, request)?;
        let engine = choose_engine(request)?;
        let mut store = Self::over(file, request.path, engine)?;
        store.enable_direct(request, len_bytes)?;
        Ok((store, len_bytes))
    }

    /// A store over an open file, through the page cache.
    pub(crate) fn over(file: File, path: &Path, engine: EngineKind) -> Result<Self, EmulatedError> {
        let zeroes = MmapMut::map_anon(ZERO_CHUNK_BYTES)
            .map_err(|source| EmulatedError::Memory { len_bytes: ZERO_CHUNK_BYTES as u64, source })?;
        let has_warned = AtomicBool::new(false);
        Ok(Self { file, path: path.to_owned(), direct_memory_align: None, engine, zeroes, has_warned })
    }

    /// Switches O_DIRECT on where it is wanted and works for single blocks.
    fn enable_direct(&mut self, request: &OpenRequest<'_>, len_bytes: u64) -> Result<(), EmulatedError> {
        if request.direct == Direct::Never {
            return Ok(());
        }
        match self.try_direct(request.block_bytes, len_bytes) {
            Ok(memory_align) => {
                self.direct_memory_align = Some(memory_align);
                Ok(())
            }
            Err(source) if request.direct == Direct::Always => Err(EmulatedError::DirectRefused {
                path: request.path.to_owned(),
                block_bytes: request.block_bytes,
                source,
            }),
            Err(reason) => {
                tracing::debug!(path = %request.path.display(), %reason, "image goes through the page cache");
                let flags = rustix::fs::fcntl_getfl(&self.file).map_err(|errno| self.refused(errno))?;
                rustix::fs::fcntl_setfl(&self.file, flags - OFlags::DIRECT)
                    .map_err(|errno| self.refused(errno))
            }
        }
    }

    /// Sets O_DIRECT and reads one block through it. Returns the alignment asked of memory.
    fn try_direct(&self, block_bytes: u32, len_bytes: u64) -> io::Result<usize> {
        let flags = rustix::fs::fcntl_getfl(&self.file)?;
        rustix::fs::fcntl_setfl(&self.file, flags | OFlags::DIRECT)?;
        let mut memory_align = DIRECT_MEMORY_ALIGN_ASSUMED;
        let asked = StatxFlags::from_bits_retain(libc::STATX_DIOALIGN);
        if let Ok(stat) = rustix::fs::statx(&self.file, c"", AtFlags::EMPTY_PATH, asked)
            && stat.stx_mask & libc::STATX_DIOALIGN != 0
        {
            if stat.stx_dio_offset_align == 0 || stat.stx_dio_offset_align > block_bytes {
                return Err(ErrorKind::Unsupported.into());
            }
            memory_align = stat.stx_dio_mem_align.max(1) as usize;
        }
        let mut page = MmapMut::map_anon(PAGE_BYTES)?;
        let block = &mut page[..block_bytes as usize];
        self.file.read_exact_at(block, len_bytes - u64::from(block_bytes))?;
        Ok(memory_align)
    }

    fn refused(&self, errno: Errno) -> EmulatedError {
        EmulatedError::File { what: "switch O_DIRECT for", path: self.path.clone(), source: errno.into() }
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn engine(&self) -> EngineKind {
        self.engine
    }

    /// Whether this memory has to be copied to an aligned buffer first.
    pub(crate) fn needs_bounce(&self, segments: &[Segment]) -> bool {
        let Some(align) = self.direct_memory_align else { return false };
        let is_crooked = |segment: &Segment| {
            !(segment.host.as_ptr() as usize).is_multiple_of(align)
                || !segment.len_bytes.is_multiple_of(align)
        };
        segments.iter().any(is_crooked)
    }

    /// Page-aligned zeroes, at least `len` of them up to [`ZERO_CHUNK_BYTES`].
    pub(crate) fn zeroes(&self, len: u64) -> &[u8] {
        &self.zeroes[..usize::try_from(len).unwrap_or(usize::MAX).min(ZERO_CHUNK_BYTES)]
    }

    pub(crate) fn sync(&self) -> Result<(), MediaError> {
        self.file.sync_data().map_err(|error| {
            self.warn_once(&error);
            MediaError::Write
        })
    }

    /// Reads the image through the engine-independent way, for inspection.
    pub(crate) fn read_into(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if self.direct_memory_align.is_none() {
            return self.file.read_exact_at(buffer, offset);
        }
        // A second descriptor without O_DIRECT reads any alignment, coherently with direct writes.
        File::open(&self.path)?.read_exact_at(buffer, offset)
    }

    /// What an error of the system means for the command, and a warning the first time.
    pub(crate) fn media_error(&self, work: WorkKind, error: &io::Error) -> MediaError {
        self.warn_once(error);
        match (error.raw_os_error(), work) {
            (Some(libc::EFAULT), _) => MediaError::HostMemory,
            (_, WorkKind::Read) => MediaError::Read,
            (Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG), _) => MediaError::Full,
            (_, WorkKind::Modify) => MediaError::Write,
        }
    }

    fn warn_once(&self, error: &io::Error) {
        if !self.has_warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                path = %self.path.display(),
                %error,
                "the image file failed; commands fail with it, and later failures aren't reported here"
            );
        }
    }
}

/// Which way an error has to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WorkKind {
    Read,
    Modify,
}

impl WorkKind {
    pub(crate) const fn of(work: &Work<'_>) -> Self {
        match work {
            Work::Read { .. } => Self::Read,
            Work::Write { .. } | Work::Zero { .. } | Work::Flush { .. } => Self::Modify,
        }
    }
}

fn open_or_create(request: &OpenRequest<'_>) -> Result<File, EmulatedError> {
    let path = request.path.to_owned();
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_CLOEXEC);
    match options.open(&path) {
        Ok(file) => Ok(file),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let Some(size_bytes) = request.size_bytes else {
                return Err(EmulatedError::FileMissing { path });
            };
            create(&path, size_bytes).map_err(|source| EmulatedError::File {
                what: "create",
                path: path.clone(),
                source,
            })
        }
        Err(source) => Err(EmulatedError::File { what: "open", path, source }),
    }
}

/// Creates a sparse image and makes its name durable.
fn create(path: &Path, size_bytes: u64) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    if let Err(error) = file.set_len(size_bytes) {
        // An empty file of that name would be refused for its size next time.
        fs::remove_file(path)?;
        return Err(error);
    }
    file.sync_all()?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(file)
}

/// How long the lock of a process that has ended is waited for: the kernel finishes the io_uring of a killed process,
/// a flush perhaps, after the process is gone, and keeps the file open and locked until then.
const LOCK_WAIT: Duration = Duration::from_secs(10);

/// Locks the image against other controllers, in this process and in others.
fn lock_exclusively(file: &File, path: &Path) -> Result<(), EmulatedError> {
    let begin = Instant::now();
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if begin.elapsed() < LOCK_WAIT && is_lock_left_behind(file) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(Errno::WOULDBLOCK) => return Err(EmulatedError::FileInUse { path: path.to_owned() }),
            Err(errno) => {
                return Err(EmulatedError::File {
                    what: "lock",
                    path: path.to_owned(),
                    source: errno.into(),
                });
            }
        }
    }
}

/// Whether the process that locked the file may have ended (`/proc/locks`: "… FLOCK ADVISORY WRITE pid device:inode …",
/// without the locks of processes that have ended, or aren't in sight).
fn is_lock_left_behind(file: &File) -> bool {
    let Ok(inode) = file.metadata().map(|metadata| format!(":{}", metadata.ino())) else { return false };
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let holder = locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let at = fields.iter().position(|field| *field == "FLOCK")?;
        fields.get(at + 4)?.ends_with(&inode).then(|| fields.get(at + 3)?.parse::<i32>().ok())?
    });
    let Some(process) = holder else { return true };
    // "pid (name) state": the name may hold anything, a parenthesis too.
    match fs::read_to_string(format!("/proc/{process}/stat")) {
        Ok(stat) => stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X'])),
        Err(error) => error.kind() == ErrorKind::NotFound,
    }
}

/// The size of the device, once the file and what was asked for agree.
fn settle_size(file: &File, request: &OpenRequest<'_>) -> Result<u64, EmulatedError> {
    let path = || request.path.to_owned();
    let metadata =
        file.metadata().map_err(|source| EmulatedError::File { what: "stat", path: path(), source })?;
    if !metadata.is_file() {
        return Err(EmulatedError::NotAFile { path: path() });
    }
    let len_bytes = metadata.len();
    match request.size_bytes {
        Some(size_bytes) if size_bytes != len_bytes => {
            Err(EmulatedError::FileSizeDiffers { path: path(), file_bytes: len_bytes, size_bytes })
        }
        None if len_bytes == 0 || !len_bytes.is_multiple_of(request.block_bytes.into()) => {
            Err(EmulatedError::FileSizeUnaligned {
                path: path(),
                file_bytes: len_bytes,
                block_bytes: request.block_bytes,
            })
        }
        _ => Ok(len_bytes),
    }
}

/// The engine asked for, or the best that the system allows.
fn choose_engine(request: &OpenRequest<'_>) -> Result<EngineKind, EmulatedError> {
    if request.engine == FileEngine::Plain {
        return Ok(EngineKind::Plain);
    }
    match UringEngine::probe() {
        Ok(()) => Ok(EngineKind::IoUring),
        Err(source) if request.engine == FileEngine::IoUring => {
            Err(EmulatedError::IoUringRefused { path: request.path.to_owned(), source })
        }
        Err(error) => {
            tracing::warn!(
                path = %request.path.display(),
                %error,
                "io_uring isn't available, so each command is a blocking system call; to allow it set \
                 kernel.io_uring_disabled=0 and permit io_uring_setup, io_uring_enter and io_uring_register in \
                 the container's seccomp profile, or silence this with engine=plain"
            );
            Ok(EngineKind::Plain)
        }
    }
}
