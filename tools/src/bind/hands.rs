//! The few things by which a driver change touches the system, so that tests can stand in for it.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::OFlags;

/// What changes a system's drivers.
pub(crate) trait Hands {
    /// Writes a value to a file of sysfs, in one write.
    fn write(&mut self, path: &Path, value: &str) -> std::io::Result<()>;

    /// Loads a kernel module. The error is for people.
    fn load_module(&mut self, module: &'static str) -> Result<(), String>;

    /// Opens a block device for this process alone: while the file is open nobody can mount it, swap to it or build
    /// anything on it, and it fails with `EBUSY` where somebody has.
    fn claim(&mut self, node: &Path) -> std::io::Result<File>;

    /// Opens the node of a VFIO group, which fails with `EBUSY` while somebody has a device of it open.
    fn open_group(&mut self, node: &Path) -> std::io::Result<File>;

    /// Waits until the system's device manager has done what it does with new nodes: it would undo a change of
    /// owner that came before.
    fn settle(&mut self);

    /// Gives a node to a user.
    fn give(&mut self, node: &Path, user_id: u32) -> std::io::Result<()>;
}

/// The running system.
#[derive(Debug)]
pub(crate) struct LiveHands;

impl Hands for LiveHands {
    fn write(&mut self, path: &Path, value: &str) -> std::io::Result<()> {
        // Never created: a path that isn't there is an error, not a file.
        OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
    }

    fn load_module(&mut self, module: &'static str) -> Result<(), String> {
        // An ordinary user's PATH may lack the directories of system programs.
        let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin:/usr/bin:/bin";
        let output = Command::new("modprobe").arg(module).env("PATH", path).stdin(Stdio::null()).output();
        match output {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err("there is no program modprobe (package kmod)".to_owned())
            }
            Err(error) => Err(format!("modprobe: {error}")),
        }
    }

    fn claim(&mut self, node: &Path) -> std::io::Result<File> {
        // Reading alone: closing a block device that was open for writing makes udev look at it anew.
        OpenOptions::new().read(true).custom_flags(OFlags::EXCL.bits().cast_signed()).open(node)
    }

    fn open_group(&mut self, node: &Path) -> std::io::Result<File> {
        OpenOptions::new().read(true).write(true).open(node)
    }

    fn settle(&mut self) {
        // Systems without udev have nobody who changes nodes behind our back.
        let udevadm = Command::new("udevadm").args(["settle", "--timeout=10"]).stdin(Stdio::null()).output();
        if let Err(error) = udevadm {
            tracing::debug!(%error, "no udevadm to wait for");
        }
    }

    fn give(&mut self, node: &Path, user_id: u32) -> std::io::Result<()> {
        std::os::unix::fs::chown(node, Some(user_id), None)
    }
}
