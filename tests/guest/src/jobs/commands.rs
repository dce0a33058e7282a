//! The command `foliant` in the guest, step by step, with what is done around it.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use foliant_guest::protocol::FOLIANT;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde::Deserialize;
use serde_json::json;

use super::Job;
use crate::bind;
use crate::context::Context;

pub(super) const JOBS: &[(&str, Job)] = &[("commands", commands)];

#[derive(Deserialize)]
struct Commands {
    steps: Vec<Step>,
}

/// One step. Steps that name a controller mean its namespace 1, while the kernel's driver has it.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Step {
    /// `foliant` with arguments.
    Foliant(Call),
    /// Writes a file, for a command to read.
    File { path: String, text: String },
    /// Mounts the ext4 file system on a controller's disk.
    Mount { address: String },
    /// Unmounts it.
    Unmount,
    /// Makes a swap area of a controller's disk, and uses it.
    SwapOn { address: String },
    /// Stops using it.
    SwapOff { address: String },
    /// A process has a controller's disk open from here to the end of the job.
    Open { address: String },
    /// The function has this driver now.
    Driver { address: String, name: String },
}

#[derive(Deserialize)]
struct Call {
    arguments: Vec<String>,
    status: i32,
    /// What its output must contain.
    #[serde(default)]
    says: Vec<String>,
}

/// Runs the steps.
fn commands(context: &Context<'_>) {
    let Commands { steps } = context.arguments();
    let mut open = Vec::new();
    for step in steps {
        match step {
            Step::Foliant(call) => foliant(context, &call),
            Step::File { path, text } => fs::write(&path, text).expect("the file is written"),
            Step::Mount { address } => {
                fs::create_dir_all(MOUNTED).expect("a directory is made");
                mount(disk(&address), MOUNTED, "ext4", MountFlags::RDONLY, None)
                    .expect("the disk is mounted");
            }
            Step::Unmount => unmount(MOUNTED, UnmountFlags::empty()).expect("the disk is unmounted"),
            Step::SwapOn { address } => swap_on(&disk(&address)),
            Step::SwapOff { address } => swap_off(&disk(&address)),
            Step::Open { address } => open.push(File::open(disk(&address)).expect("the disk opens")),
            Step::Driver { address, name } => {
                assert_eq!(bind::driver(&address).unwrap_or_default(), name, "the driver of {address}");
            }
        }
    }
}

const MOUNTED: &str = "/tmp/mounted";

fn disk(address: &str) -> String {
    format!("/dev/{}", bind::kernel_disk(address, 1))
}

fn foliant(context: &Context<'_>, call: &Call) {
    let begun = Instant::now();
    let told = Command::new(FOLIANT).args(&call.arguments).output().expect("foliant is in the guest");
    let text = String::from_utf8_lossy(&[told.stdout, told.stderr].concat()).into_owned();
    let line = call.arguments.join(" ");
    context.fact("said", json!({"command": line, "status": told.status.code(), "text": text}));
    context.fact("seconds", begun.elapsed().as_secs_f64());
    assert_eq!(told.status.code(), Some(call.status), "foliant {line}:\n{text}");
    for word in &call.says {
        assert!(text.contains(word.as_str()), "foliant {line} doesn't say {word:?}:\n{text}");
    }
}

/// Writes a swap area's header (`struct swap_header`: version and last page at byte 1024, magic at the page's end), and
/// switches it on.
fn swap_on(disk: &str) {
    let pages = 1024u32;
    let mut header = vec![0; 4096];
    header[1024..1028].copy_from_slice(&1u32.to_le_bytes());
    header[1028..1032].copy_from_slice(&(pages - 1).to_le_bytes());
    header[4086..].copy_from_slice(b"SWAPSPACE2");
    let file = File::options().write(true).open(disk).expect("the disk opens");
    file.write_all_at(&header, 0).and_then(|()| file.sync_all()).expect("the disk takes a header");
    drop(file);
    swap(disk, Switch::On);
    assert!(
        fs::read_to_string("/proc/swaps").is_ok_and(|swaps| swaps.contains(disk)),
        "{disk} is in use as swap"
    );
}

fn swap_off(disk: &str) {
    swap(disk, Switch::Off);
}

enum Switch {
    On,
    Off,
}

#[expect(unsafe_code, reason = "no crate offers these two calls")]
fn swap(disk: &str, switch: Switch) {
    let path = CString::new(disk).expect("a node's path holds no NUL");
    // SAFETY: both calls read the path, which outlives them, and keep nothing.
    let result = unsafe {
        match switch {
            Switch::On => libc::swapon(path.as_ptr(), 0),
            Switch::Off => libc::swapoff(path.as_ptr()),
        }
    };
    assert_eq!(result, 0, "swap on {}: {}", Path::new(disk).display(), std::io::Error::last_os_error());
}
