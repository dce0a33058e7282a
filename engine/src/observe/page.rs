//! The engine's side of a stats page: a file on tmpfs with a name, a lock, and a place for each shard.
//!
//! The file gets its name once it is whole and locked, so nobody sees one that isn't. Where the name is taken by what a
//! dead process left, that is replaced; the lock on the old file keeps two engines from doing so at once.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags, fallocate, fchmod,
    flock, fstat, fstatfs, open, renameat_with, statat, unlink,
};
use rustix::io::Errno;
use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::catalogue::catalogue;
use super::layout::{self, Header, RecordPlaces};
use super::place::{StatsPage, prepare_directory};
use crate::error::{Error, Result};

/// `TMPFS_MAGIC` and `RAMFS_MAGIC` of `linux/magic.h`: file systems whose files are memory.
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
/// How often the lock of a page is tried that somebody holds.
const LOCK_TRIES: u32 = 16;
/// How pages are called where their names are ours to choose.
pub(super) const EXTENSION: &str = "stats";

/// Whose page it is.
#[derive(Clone, Debug)]
pub(crate) struct PageOwner {
    /// The device's name.
    pub device: String,
    pub shards: usize,
}

/// The page of an engine. It goes with its last owner, or by [`remove`](Self::remove).
#[derive(Debug)]
pub(crate) struct StatsFile {
    /// Locked as long as it is open.
    file: OwnedFd,
    path: PathBuf,
    record_words: usize,
    places: RecordPlaces,
    removed: AtomicBool,
}

impl StatsFile {
    /// Makes the page that `place` asks for, if any.
    pub(crate) fn create(place: &StatsPage, owner: PageOwner) -> Result<Option<Self>> {
        static PAGES: AtomicU64 = AtomicU64::new(0);
        let number = PAGES.fetch_add(1, Ordering::Relaxed);
        let path = match place {
            StatsPage::None => return Ok(None),
            StatsPage::At(path) => path.clone(),
            StatsPage::Found => {
                let directory = prepare_directory()?;
                remove_abandoned(&directory);
                directory.join(format!("{}-{number}.{EXTENSION}", std::process::id()))
            }
        };
        let refused = |reason: String| Error::StatsPage { path: path.clone(), reason };
        let Some(name) = path.file_name() else {
            return Err(refused("names no file; give the path of a file on tmpfs".to_owned()));
        };
        let header = header(owner);
        let new =
            path.with_file_name(format!(".{}.{}-{number}.new", name.to_string_lossy(), std::process::id()));
        let (record_words, places) = (header.record_words(), header.places());
        let file = make(&new, &header).map_err(refused)?;
        // From here on, dropping it removes the file under whichever name it has.
        let mut page = Self { file, path: new, record_words, places, removed: AtomicBool::new(false) };
        give_name(&page.path, &path).map_err(refused)?;
        page.path = path;
        Ok(Some(page))
    }

    /// Words of a record, with those beside the values: sequence number, time, values, checksum.
    pub(crate) fn record_words(&self) -> usize {
        self.record_words
    }

    /// Writes a shard's record, and seals it before. Allocates nothing; only memory is written.
    pub(crate) fn write(&self, shard: usize, words: &mut [U64]) -> std::io::Result<()> {
        layout::seal(words);
        let at = self.places.of(shard, words[0].get()).start as u64;
        let bytes = words.as_bytes();
        let written = rustix::io::pwrite(&self.file, bytes, at)?;
        if written == bytes.len() { Ok(()) } else { Err(std::io::ErrorKind::WriteZero.into()) }
    }

    /// Takes the page's name away, unless it is somebody else's by now.
    pub(crate) fn remove(&self) {
        if !self.removed.swap(true, Ordering::Relaxed) && is_same(&self.file, &self.path) {
            // One that can't be removed is recognised as abandoned by its lock.
            let _ = unlink(&self.path);
        }
    }
}

impl Drop for StatsFile {
    fn drop(&mut self) {
        self.remove();
    }
}

fn header(owner: PageOwner) -> Header {
    let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Header {
        pid: std::process::id(),
        opened_unix_ns: u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX),
        device: owner.device,
        program: std::fs::read_to_string("/proc/self/comm").unwrap_or_default().trim_end().to_owned(),
        metrics: catalogue(),
        shards: owner.shards,
    }
}

/// Makes the file, whole and locked. It is removed if that fails half-way.
fn make(path: &Path, header: &Header) -> std::result::Result<OwnedFd, String> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let file = open(path, flags, mode).map_err(|error| format!("cannot be made: {error}"))?;
    let fill = || {
        let system = fstatfs(&file).map_err(|error| format!("its file system can't be told: {error}"))?;
        if !IN_MEMORY.contains(&(system.f_type as u64)) {
            return Err(
                "lies on a file system on disk, where a store may wait for the disk; name a file on tmpfs, \
                        such as one in $XDG_RUNTIME_DIR, /run or /dev/shm"
                    .to_owned(),
            );
        }
        let filled = fchmod(&file, mode)
            .and_then(|()| flock(&file, FlockOperation::NonBlockingLockExclusive))
            .and_then(|()| fallocate(&file, FallocateFlags::empty(), 0, header.page_bytes()))
            .and_then(|()| rustix::io::pwrite(&file, &header.encode(), 0).map(drop));
        filled.map_err(|error| format!("cannot be filled with {} bytes: {error}", header.page_bytes()))
    };
    let filled = fill();
    if filled.is_err() {
        let _ = unlink(path);
    }
    filled.map(|()| file)
}

/// Renames `new` to `path`, over what a dead process left there, but over nothing else.
fn give_name(new: &Path, path: &Path) -> std::result::Result<(), String> {
    let refused = |error: Errno| format!("cannot get its name: {error}");
    match renameat_with(CWD, new, CWD, path, RenameFlags::NOREPLACE) {
        Err(Errno::EXIST) => {}
        result => return result.map_err(refused),
    }
    // Locked until the new one has taken its place.
    let _old = lock_abandoned(path)?;
    renameat_with(CWD, new, CWD, path, RenameFlags::empty()).map_err(refused)
}

/// Opens and locks a page that a dead process left; says what keeps it from being one.
fn lock_abandoned(path: &Path) -> std::result::Result<OwnedFd, String> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let foreign = || "is there and is no stats page; name another file".to_owned();
    let old = open(path, flags, Mode::empty()).map_err(|_| foreign())?;
    let stat = fstat(&old).map_err(|error| format!("cannot be looked at: {error}"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(foreign());
    }
    let mut file = File::from(old);
    let mut page = Vec::new();
    let read = (&mut file).take(layout::PAGE_BYTES_MAX).read_to_end(&mut page);
    let header = read.ok().and_then(|_| Header::decode(&page).ok()).ok_or_else(foreign)?;
    let taken = || format!("belongs to a running engine (process {}); name another file", header.pid);
    // A reader that asks whether the page's owner lives holds it for a moment.
    let mut tries = 0;
    while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        tries += 1;
        if tries == LOCK_TRIES {
            return Err(taken());
        }
        std::thread::yield_now();
    }
    // Between open and lock somebody else may have replaced it.
    if is_same(&file, path) { Ok(file.into()) } else { Err(taken()) }
}

fn is_same(file: &impl std::os::fd::AsFd, path: &Path) -> bool {
    let (Ok(of_file), Ok(of_path)) = (fstat(file), statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)) else {
        return false;
    };
    (of_file.st_dev, of_file.st_ino) == (of_path.st_dev, of_path.st_ino)
}

/// Removes the pages of dead processes from our own directory.
fn remove_abandoned(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == EXTENSION)
            && let Ok(_locked) = lock_abandoned(&path)
        {
            let _ = unlink(&path);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::observe::{EngineState, StatsReader};
    use std::os::unix::fs::{PermissionsExt, symlink};
    use tempfile::TempDir;

    fn on_tmpfs() -> TempDir {
        tempfile::tempdir_in("/dev/shm").unwrap()
    }

    fn create(path: &Path) -> Result<StatsFile> {
        let owner = PageOwner { device: "emu:ram".to_owned(), shards: 2 };
        Ok(StatsFile::create(&StatsPage::At(path.to_owned()), owner)?.unwrap())
    }

    /// What a process leaves that is killed: the bytes, and nobody's lock.
    fn abandon(page: StatsFile, path: &Path) {
        let bytes = std::fs::read(path).unwrap();
        drop(page);
        std::fs::write(path, bytes).unwrap();
    }

    fn write(page: &StatsFile, shard: usize, sequence: u64, value: u64) {
        let mut words = vec![U64::new(value); page.record_words()];
        words[0] = sequence.into();
        page.write(shard, &mut words).unwrap();
    }

    #[test]
    fn a_page_is_its_owners_alone_and_goes_with_the_engine() {
        let place = on_tmpfs();
        let path = place.path().join("page");
        let page = create(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let reader = StatsReader::open(&path).unwrap();
        assert_eq!((reader.state(), reader.pid()), (EngineState::Running, std::process::id()));
        drop(page);
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
        assert_eq!(reader.state(), EngineState::Ended);
    }

    #[test]
    fn a_reader_gets_the_newest_whole_record_of_each_shard() {
        let place = on_tmpfs();
        let path = place.path().join("page");
        let page = create(&path).unwrap();
        let reader = StatsReader::open(&path).unwrap();
        assert_eq!(reader.read().unwrap().shards, [None, None]);
        for sequence in 1..=5 {
            write(&page, 1, sequence, 100 + sequence);
        }
        let snapshot = reader.read().unwrap();
        let record = snapshot.shards[1].as_ref().unwrap();
        assert_eq!((record.sequence, snapshot.value(record, "read_hits")), (5, Some(105)));
        assert!(snapshot.shards[0].is_none());
        // Half of the next: what a writer that was killed leaves.
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 100], page.places.of(1, 6).start as u64)
            .unwrap();
        assert_eq!(reader.read().unwrap().shards[1].as_ref().unwrap().sequence, 5);
    }

    #[test]
    fn a_page_that_is_truncated_costs_the_engine_nothing_and_its_reader_an_error() {
        let place = on_tmpfs();
        let path = place.path().join("page");
        let page = create(&path).unwrap();
        let reader = StatsReader::open(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        write(&page, 0, 1, 1);
        assert!(reader.read().is_err());
    }

    #[test]
    fn what_a_dead_process_left_is_replaced_and_what_a_live_one_has_is_not() {
        let place = on_tmpfs();
        let path = place.path().join("page");
        abandon(create(&path).unwrap(), &path);
        assert_eq!(StatsReader::open(&path).unwrap().state(), EngineState::Ended);
        let page = create(&path).unwrap();
        let refused = create(&path).unwrap_err().to_string();
        assert!(refused.contains("belongs to a running engine"), "{refused}");
        assert_eq!(StatsReader::open(&path).unwrap().state(), EngineState::Running);
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1, "nothing is left of the refused one");
        drop(page);
    }

    #[test]
    fn what_is_no_stats_page_is_never_touched() {
        let place = on_tmpfs();
        let (precious, link) = (place.path().join("precious"), place.path().join("link"));
        std::fs::write(&precious, "not to be lost").unwrap();
        symlink(&precious, &link).unwrap();
        for path in [&precious, &link, &place.path().to_owned()] {
            let refused = create(path).unwrap_err().to_string();
            assert!(refused.contains("no stats page"), "{refused}");
        }
        assert_eq!(std::fs::read(&precious).unwrap(), b"not to be lost");
        assert!(StatsReader::open(&link).is_err() && StatsReader::open(&precious).is_err());
    }

    #[test]
    fn a_page_that_was_replaced_is_not_removed_by_its_first_owner() {
        let place = on_tmpfs();
        let path = place.path().join("page");
        let first = create(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = create(&path).unwrap();
        drop(first);
        assert_eq!(StatsReader::open(&path).unwrap().state(), EngineState::Running);
        drop(second);
    }

    #[test]
    fn pages_of_dead_processes_are_removed_from_our_directory_and_nothing_else() {
        let place = on_tmpfs();
        let path = |name: &str| place.path().join(name);
        let live = create(&path("1-0.stats")).unwrap();
        abandon(create(&path("2-0.stats")).unwrap(), &path("2-0.stats"));
        std::fs::write(path("3-0.stats"), "something else").unwrap();
        remove_abandoned(place.path());
        let left = ["1-0.stats", "2-0.stats", "3-0.stats"].map(|name| path(name).exists());
        assert_eq!(left, [true, false, true]);
        drop(live);
    }
}
