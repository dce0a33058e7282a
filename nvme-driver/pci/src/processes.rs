//! The open files and the mount tables of all processes, from procfs.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

use crate::address::PciAddress;
use crate::error::PciError;
use crate::host::{Host, attribute, entries};
use crate::node::{DeviceNumber, NodeKind};

/// The first PID namespace's inode in procfs: `PROC_PID_INIT_INO`, part of the kernel's interface to checkpointing.
const HOST_PID_NAMESPACE: &str = "pid:[4026531836]";
/// What the kernel calls a device that was opened through VFIO.
const VFIO_DEVICE: &str = "anon_inode:[vfio-device]";

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Process {
    /// Its id, as seen from the calling process.
    pub id: u32,
    /// The command that runs in it, as the kernel has it: at most 15 bytes.
    pub command: String,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.id, self.command)
    }
}

/// A file that a process has open.
pub(crate) struct OpenFile<'a> {
    /// What the link in `/proc/PID/fd` says: a path, as the process sees it, or a kind of anonymous file.
    pub(crate) target: &'a str,
    /// The device, where it's a device node.
    pub(crate) device: Option<(NodeKind, DeviceNumber)>,
    info: PathBuf,
}

impl OpenFile<'_> {
    /// Whether it's a device opened through VFIO, which has no node of its own once it's open.
    pub(crate) fn is_vfio_device(&self) -> bool {
        self.target == VFIO_DEVICE
    }

    /// The function behind a device opened through VFIO, where the kernel tells.
    pub(crate) fn vfio_device_address(&self) -> Option<PciAddress> {
        let info = attribute(&self.info).ok().flatten()?;
        let path = info.lines().find_map(|line| line.strip_prefix("vfio-device-syspath:"))?;
        path.trim().rsplit('/').next()?.parse().ok()
    }

    /// The file, where it's one of a function's memory regions as sysfs offers them to drivers in user space.
    pub(crate) fn resource_of(&self, address: PciAddress) -> Option<&str> {
        let (_, file) = self.target.strip_prefix("/sys/devices/")?.split_once(&format!("/{address}/"))?;
        file.starts_with("resource").then_some(self.target)
    }
}

/// What a look at all processes found beside their files.
pub(crate) struct Scan {
    /// Processes whose files may not be read.
    pub(crate) unreadable: Vec<Process>,
    /// Whether all processes of the host are in sight at all.
    pub(crate) sees_all: bool,
    /// The mount table of each mount namespace but the calling process's, with a process in it.
    pub(crate) mount_tables: Vec<(Process, String)>,
}

/// Shows `visit` every file that any other process has open.
pub(crate) fn scan(host: &Host, visit: &mut dyn FnMut(&Process, &OpenFile<'_>)) -> Result<Scan, PciError> {
    let proc = host.path("proc");
    let ids: Vec<u32> = entries(&proc)?.unwrap_or_default().iter().filter_map(process_id).collect();
    let pid_namespace = std::fs::read_link(proc.join("self/ns/pid")).ok();
    let mut scan = Scan {
        unreadable: Vec::new(),
        sees_all: ids.contains(&1) && pid_namespace.is_some_and(|link| link == Path::new(HOST_PID_NAMESPACE)),
        mount_tables: Vec::new(),
    };
    let mut mount_namespaces: BTreeSet<PathBuf> =
        std::fs::read_link(proc.join("self/ns/mnt")).into_iter().collect();
    let own_id = host.is_live().then(std::process::id);
    for id in ids.into_iter().filter(|id| Some(*id) != own_id) {
        let directory = proc.join(id.to_string());
        let command = attribute(&directory.join("comm")).ok().flatten().unwrap_or_default();
        let process = Process { id, command };
        match visit_files(&directory, &process, visit) {
            Ok(()) => {}
            Err(error) if has_ended(&error) => continue,
            Err(_) => scan.unreadable.push(process.clone()),
        }
        let Ok(namespace) = std::fs::read_link(directory.join("ns/mnt")) else { continue };
        if mount_namespaces.insert(namespace)
            && let Ok(table) = std::fs::read(directory.join("mountinfo"))
        {
            scan.mount_tables.push((process, String::from_utf8_lossy(&table).into_owned()));
        }
    }
    Ok(scan)
}

fn process_id(name: &OsString) -> Option<u32> {
    name.to_str().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))?.parse().ok()
}

fn visit_files(
    directory: &Path,
    process: &Process,
    visit: &mut dyn FnMut(&Process, &OpenFile<'_>),
) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory.join("fd"))? {
        let entry = entry?;
        let target = match std::fs::read_link(entry.path()) {
            Ok(target) => target,
            // Closed meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let target = target.to_string_lossy();
        let device = if target.starts_with('/') { device_behind(&entry.path()) } else { None };
        let info = directory.join("fdinfo").join(entry.file_name());
        visit(process, &OpenFile { target: &target, device, info });
    }
    Ok(())
}

/// The device behind a link in `/proc/PID/fd`, whatever the process calls it. No server is asked: a file on a network
/// that doesn't answer must not hold up the look.
fn device_behind(link: &Path) -> Option<(NodeKind, DeviceNumber)> {
    let status = statx(CWD, link, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    let kind = match FileType::from_raw_mode(status.stx_mode.into()) {
        FileType::BlockDevice => NodeKind::Block,
        FileType::CharacterDevice => NodeKind::Character,
        _ => return None,
    };
    Some((kind, DeviceNumber { major: status.stx_rdev_major, minor: status.stx_rdev_minor }))
}

fn has_ended(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_device_that_another_process_has_open_is_seen_on_the_running_host() {
        // It says when it has opened the device, and lives until its input ends.
        let script = "exec 7</dev/full; echo open; read end";
        let mut shell = Command::new("sh");
        let mut child =
            shell.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "open\n");
        let full = (NodeKind::Character, DeviceNumber { major: 1, minor: 7 });
        let mut seen = 0;
        scan(&Host::live(), &mut |process, file| {
            assert_ne!(process.id, std::process::id());
            seen += u32::from(process.id == child.id() && file.device == Some(full));
        })
        .unwrap();
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(seen, 1);
    }
}
