//! What ends a command early. Every message names the value, the limit and the remedy.

use std::path::PathBuf;

use foliant_nvme::{ArenaError, CommandError, DriverError, QueueError, Status, SubmitError};
use foliant_nvme_emulated::EmulatedError;
use foliant_nvme_pci::PciError;
use foliant_nvme_vfio::VfioError;

use crate::bind::BindError;
use crate::size::ByteSize;

/// Why a command could not run to its end. A failed verification isn't an error but a
/// [`Verdict`](crate::verdict::Verdict).
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{option} {value}: {reason}")]
    Option { option: &'static str, value: String, reason: String },
    #[error("cannot {what} {}: {source}", path.display())]
    File { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{}, line {line}: {reason}", path.display())]
    TraceLine { path: PathBuf, line: u64, reason: String },
    #[error("{}: {reason}", path.display())]
    Trace { path: PathBuf, reason: String },
    #[error(
        "{} holds data (the first at byte {offset}), which {command} would overwrite; name another file, or add \
         --overwrite if that data may go",
        path.display()
    )]
    ForeignImage { path: PathBuf, offset: u64, command: &'static str },
    #[error(
        "{command} would overwrite the drive {uri}, whatever it holds; add --overwrite if all of it may go"
    )]
    ForeignDrive { uri: String, command: &'static str },
    #[error(
        "{} doesn't exist, and {command} creates nothing; check the path, or make the image first, for instance \
         by replay or bench",
        path.display()
    )]
    ImageMissing { path: PathBuf, command: &'static str },
    #[error(
        "the file system under {} is full (the device says: {status}); free space there and run this again, with \
         --overwrite since the image now holds data",
        path.display()
    )]
    NoSpace { path: PathBuf, status: Status },
    #[error("no files to take in: {looked}; name files or directories: foliant demo FILES...")]
    NoSources { looked: String },
    #[error("the files have more than {limit} together; name fewer of them")]
    SourcesTooLarge { limit: ByteSize },
    #[error("{}: neither a regular file nor a directory; name files that can be read to their end", path.display())]
    NotAFile { path: PathBuf },
    #[error(
        "the device completed nothing for {seconds} s with {in_flight} commands in flight; check the device"
    )]
    DeviceSilent { seconds: u64, in_flight: u32 },
    #[error(
        "{running} threads have said nothing for {seconds} s, though every wait on the device has a limit; please \
         report this with the command line and the seed"
    )]
    Hung { running: u16, seconds: u64 },
    #[error("a command failed: {0}")]
    Command(#[from] CommandError),
    #[error("cannot submit: {0}")]
    Submit(#[from] SubmitError),
    #[error("a thread panicked while it {what}; please report this with the command line")]
    ThreadPanicked { what: &'static str },
    #[error("stats page {}: {reason}", path.display())]
    Stats { path: PathBuf, reason: String },
    #[error(
        "no running engine shows itself in {looked}; open it with EngineOptions::stats_page = StatsPage::Found, run \
         foliant bench, replay or demo with --stats, or name its page: foliant top PAGE"
    )]
    NoStats { looked: String },
    #[error("standard output is no terminal; use foliant top --once, --json or --prometheus there")]
    NoTerminal,
    #[error("there is nothing to show: {reason}")]
    NothingTraced { reason: &'static str },
    #[error("cannot draw {title} of the report: {reason}; please report this with the command line")]
    Plot { title: &'static str, reason: String },
    #[error("cannot write to standard output: {0}")]
    Stdout(#[source] std::io::Error),
    #[error("redb, {what}: {source}")]
    Redb { what: &'static str, source: Box<redb::Error> },
    #[error(
        "there is no user `{name}` in /etc/passwd; for users of a directory service give the number (id -u {name})"
    )]
    NoUser { name: String },
    #[error(transparent)]
    Pci(#[from] PciError),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error(transparent)]
    Engine(#[from] foliant::Error),
    #[error(transparent)]
    Driver(#[from] DriverError),
    #[error(transparent)]
    Arena(#[from] ArenaError),
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Emulated(#[from] EmulatedError),
    #[error(transparent)]
    Vfio(#[from] VfioError),
}

impl Error {
    /// For `map_err` of a file operation: what was tried with which file.
    pub(crate) fn file(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { what, path, source }
    }

    /// For `map_err` of a redb operation: what was tried.
    pub(crate) fn redb<E: Into<redb::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Redb { what, source: Box::new(source.into()) }
    }
}
