//! A system that refuses: io_uring that is forbidden, a file system that is full, a limit on the size of files.
//!
//! What is refused to a process is refused to all of it, so each of these tests runs a second time in a process of
//! its own, which its parent has prepared. The child is the same test, told apart by an environment variable; what it
//! prints is what the parent looks at.

#![expect(unsafe_code, reason = "a child process is prepared between fork and exec")]

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use foliant_nvme_spec::{NvmOpcode, StatusCode};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter_all_threads};

use super::file::Scratch;
use super::host::{Host, PAGE, flush, io_command};
use super::io::{exercise, pattern};
use crate::{EmulatedConfig, EmulatedController, EmulatedError};

/// Names the file or directory that a child works in. It's there in children only.
const CHILD: &str = "FOLIANT_EMULATED_TEST_CHILD";
/// What else the child has to know.
const ARGUMENT: &str = "FOLIANT_EMULATED_TEST_ARGUMENT";
/// A file system, or a file, of this size is full.
const SMALL_BYTES: usize = 1 << 20;

/// Where the child works; `None` in the parent. A child's log goes to its standard error.
fn child() -> Option<PathBuf> {
    let path = std::env::var_os(CHILD)?;
    tracing_subscriber::fmt().with_writer(io::stderr).init();
    Some(path.into())
}

/// The test `name` of this module, to be run by itself in a process that works in `path`.
fn child_of(name: &str, path: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("a test runs from a file"));
    command.args(["--exact", &format!("tests::system::{name}"), "--nocapture"]).env(CHILD, path);
    // A filter or a backtrace of the developer's must not change what the child prints.
    command.env_remove("RUST_LOG").env_remove("RUST_TEST_THREADS");
    command
}

/// Runs a child, which must pass and say all of `words`.
#[track_caller]
fn expect_child(mut command: Command, words: &[&str]) -> io::Result<()> {
    let output = command.output()?;
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success() && said.contains("1 passed"), "{}: {said}", output.status);
    for word in words {
        assert!(said.contains(word), "the child should say {word:?}: {said}");
    }
    Ok(())
}

/// Forbids a system call to the whole process, as a container's seccomp profile does.
fn forbid(call: i64) {
    let arch = std::env::consts::ARCH.try_into().expect("seccomp knows this processor");
    let errno = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(BTreeMap::from([(call, vec![])]), SeccompAction::Allow, errno, arch);
    let program: BpfProgram = filter.and_then(TryInto::try_into).expect("the filter is valid");
    apply_filter_all_threads(&program).expect("a process may take rights from itself");
}

#[test]
fn where_io_uring_is_forbidden_plain_calls_do_the_work_and_a_warning_says_how_to_allow_it() {
    let calls = [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];
    let Some(path) = child() else {
        let name = "where_io_uring_is_forbidden_plain_calls_do_the_work_and_a_warning_says_how_to_allow_it";
        let words = ["WARN", "io_uring isn't available", "kernel.io_uring_disabled=0", "engine=plain"];
        for index in 0..calls.len() {
            let scratch = Scratch::new();
            let mut command = child_of(name, scratch.path());
            command.env(ARGUMENT, index.to_string());
            expect_child(command, &words).expect("the child starts");
        }
        return;
    };
    let forbidden: usize = std::env::var(ARGUMENT).unwrap().parse().unwrap();
    let open = |engine| {
        let uri = format!("emu:{}?size=64MiB&lba=512&engine={engine}", path.display());
        EmulatedController::new(EmulatedConfig::parse_uri(&uri).unwrap())
    };
    let has_descriptor = |host: &Host| host.queue.drive.wakeup_fd().is_some();
    assert!(has_descriptor(&Host::attach(open("auto").unwrap())), "io_uring works before it is forbidden");
    forbid(calls[forbidden]);
    let refusal = open("uring").expect_err("what was asked for by name is refused");
    assert!(matches!(refusal, EmulatedError::IoUringRefused { .. }), "{refusal}");
    assert!(refusal.to_string().contains("engine=auto"), "{refusal}");
    let mut host = Host::attach(open("auto").unwrap());
    assert!(!has_descriptor(&host), "plain calls have nothing to wait for");
    exercise(&mut host, 512);
}

/// A directory that is the mount point of a file system of [`SMALL_BYTES`] in the child, and in no other process.
struct SmallDisk {
    mount_point: CString,
    /// What makes the child root in a user namespace of its own, where the parent isn't root: the files of the
    /// namespace and their contents.
    identity: Vec<(CString, String)>,
}

impl SmallDisk {
    fn at(mount_point: &Path) -> Self {
        // SAFETY: these calls have no preconditions.
        let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
        let identity = [
            (c"/proc/self/setgroups", "deny".to_owned()),
            (c"/proc/self/uid_map", format!("0 {user} 1")),
            (c"/proc/self/gid_map", format!("0 {group} 1")),
        ];
        let identity = identity.map(|(path, text)| (path.to_owned(), text));
        Self {
            mount_point: CString::new(mount_point.as_os_str().as_bytes()).expect("a path has no zero byte"),
            identity: if user == 0 { Vec::new() } else { identity.into() },
        }
    }

    /// Mounts it, for this process alone. It runs between fork and exec, so it allocates nothing.
    fn mount(&self) -> io::Result<()> {
        let namespaces = libc::CLONE_NEWNS | if self.identity.is_empty() { 0 } else { libc::CLONE_NEWUSER };
        // SAFETY: the process has one thread, and wants namespaces of its own.
        check(unsafe { libc::unshare(namespaces) })?;
        for (path, text) in &self.identity {
            write_file(path, text)?;
        }
        let mount = |source: &CStr, target: &CStr, kind: &CStr, flags, data: &CStr| {
            // SAFETY: all are strings that outlive the call; tmpfs takes its data as a string.
            check(unsafe {
                libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast())
            })
        };
        // Nothing that is mounted here shows up outside.
        mount(c"none", c"/", c"none", libc::MS_REC | libc::MS_PRIVATE, c"")?;
        mount(c"tmpfs", &self.mount_point, c"tmpfs", 0, c"size=1m")
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Writes a whole short file without allocating.
fn write_file(path: &CStr, text: &str) -> io::Result<()> {
    // SAFETY: the path is a string; the descriptor is used here only; the text is as long as is said.
    unsafe {
        let file = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        check(file)?;
        let written = libc::write(file, text.as_ptr().cast(), text.len());
        let error = io::Error::last_os_error();
        libc::close(file);
        if written == text.len() as isize { Ok(()) } else { Err(error) }
    }
}

/// A directory of its own, removed with it.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("foliant-emulated-{}-disk", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // What is left of it is the next run's problem only by name, and that has this process's number.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn on_a_full_disk_writes_fail_as_capacity_exceeded_and_go_on_when_there_is_room_again() {
    let Some(directory) = child() else {
        let directory = Directory::new();
        let name = "on_a_full_disk_writes_fail_as_capacity_exceeded_and_go_on_when_there_is_room_again";
        let mut command = child_of(name, &directory.0);
        let disk = SmallDisk::at(&directory.0);
        // SAFETY: `mount` makes system calls only, which may be made between fork and exec.
        unsafe { command.pre_exec(move || disk.mount()) };
        let words = ["No space left on device", "the image file failed"];
        if let Err(refused) = expect_child(command, &words) {
            // Neither root nor user namespaces: the nearest thing that needs no rights is a limit on files.
            let is_refusal = [libc::EPERM, libc::EACCES, libc::ENOSYS, libc::ENOSPC].map(Some);
            assert!(is_refusal.contains(&refused.raw_os_error()), "{refused}");
            println!("no file system for the child ({refused}); a size limit stands in for the full disk");
            a_file_that_may_not_grow_fails_as_capacity_exceeded();
        }
        return;
    };
    for engine in ["uring", "plain"] {
        let image = directory.join(engine);
        let uri = format!("emu:{}?size=64MiB&lba=4096&engine={engine}", image.display());
        let mut host = Host::uri(&uri);
        let mut written = 0;
        let full = loop {
            match host.write(written, &pattern(PAGE, written), PAGE) {
                StatusCode::SUCCESS => written += 1,
                code => break code,
            }
        };
        assert_eq!(full, StatusCode::CAPACITY_EXCEEDED, "{engine}, after {written} blocks");
        let most = (SMALL_BYTES / PAGE) as u64;
        assert!((most / 2..=most).contains(&written), "{engine}: {written} blocks on a disk of {most}");
        // The device isn't broken: what was written is there, and stays so through a flush.
        assert_eq!(host.code(flush()), StatusCode::SUCCESS);
        for slba in 0..written {
            assert!(host.read(slba, PAGE, PAGE) == Ok(pattern(PAGE, slba)), "{engine}, block {slba}");
        }
        let mut zeroes = io_command(NvmOpcode::WRITE_ZEROES, 0, 8);
        zeroes.cdw12 |= 1 << 25;
        assert_eq!(host.code(zeroes), StatusCode::SUCCESS, "{engine}: blocks can be given back");
        let data = pattern(PAGE, 99);
        assert_eq!(host.write(written, &data, PAGE), StatusCode::SUCCESS, "{engine}: there is room again");
        assert_eq!(host.read(written, PAGE, PAGE), Ok(data));
        drop(host);
        fs::remove_file(image).unwrap();
    }
}

/// Ignores the signal that would kill the process, and lets no file grow past [`SMALL_BYTES`].
fn limit_file_size() -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: SMALL_BYTES as u64, rlim_max: SMALL_BYTES as u64 };
    // SAFETY: to ignore a signal is a valid disposition, and the limit outlives the call.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        check(libc::setrlimit(libc::RLIMIT_FSIZE, &limit))
    }
}

#[test]
fn a_file_that_may_not_grow_fails_as_capacity_exceeded() {
    let Some(path) = child() else {
        for engine in ["uring", "plain"] {
            let scratch = Scratch::new();
            File::create(scratch.path()).unwrap().set_len(64 << 20).unwrap();
            let name = "a_file_that_may_not_grow_fails_as_capacity_exceeded";
            let mut command = child_of(name, scratch.path());
            command.env(ARGUMENT, engine);
            // SAFETY: `limit_file_size` makes system calls only.
            unsafe { command.pre_exec(limit_file_size) };
            expect_child(command, &["File too large", "the image file failed"]).expect("the child starts");
        }
        return;
    };
    let engine = std::env::var(ARGUMENT).unwrap();
    let mut host = Host::uri(&format!("emu:{}?lba=4096&engine={engine}", path.display()));
    let last = (SMALL_BYTES / PAGE) as u64 - 1;
    let data = pattern(PAGE, 5);
    assert_eq!(host.write(last, &data, PAGE), StatusCode::SUCCESS);
    assert_eq!(host.write(last + 1, &data, PAGE), StatusCode::CAPACITY_EXCEEDED);
    assert_eq!(host.code(flush()), StatusCode::SUCCESS);
    assert_eq!(host.read(last, PAGE, PAGE), Ok(data));
    assert_eq!(host.read(last + 1, PAGE, PAGE), Ok(vec![0; PAGE]));
}
