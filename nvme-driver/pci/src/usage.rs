//! Who uses a function: what of its namespaces is mounted, swapped to, held or open, and which process has it by
//! VFIO.
//!
//! The answer has two parts, what is known and what can't be told. Nothing is assumed unused because it couldn't be
//! looked at. Three things stay out of sight even for root: a process that has mapped a block device and closed it,
//! one that has registered it with io_uring and closed it, and exclusive holders inside the kernel that leave no
//! trace in sysfs. Whoever takes a device away therefore claims its [`block_nodes`](Usage::block_nodes) with
//! `O_EXCL` first, which the last of these fails.

use std::fmt;
use std::path::PathBuf;

use crate::error::PciError;
use crate::function::PciFunction;
use crate::host::{Host, attribute};
use crate::mounts;
use crate::node::{Node, NodeKind};
use crate::processes::{self, OpenFile, Process};
use crate::stack::Stack;

/// Mounts that a running system can't do without.
const SYSTEM_MOUNTS: [&str; 6] = ["/", "/usr", "/var", "/etc", "/boot", "/boot/efi"];

/// One thing that uses a function.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Use {
    /// A file system on it is mounted.
    Mounted {
        /// The block device that is mounted, such as `nvme0n1p1`.
        node: String,
        /// Where.
        at: String,
        /// A process that sees the mount, when it lies in another mount namespace than ours.
        seen_by: Option<Process>,
    },
    /// The kernel swaps to it.
    Swap {
        /// The block device.
        node: String,
    },
    /// The kernel has built something on it: LVM, RAID, encryption, a loop device, an exported target.
    Held {
        /// The block device beneath.
        node: String,
        /// What holds it.
        by: String,
        /// What makes that let go: a command where there is one.
        release: String,
    },
    /// A process has it open.
    Open {
        /// The node, below `/dev` or in sysfs.
        node: String,
        /// The process.
        by: Process,
    },
}

impl Use {
    /// What ends this use: a command where there is one.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Mounted { at, .. } if SYSTEM_MOUNTS.contains(&at.as_str()) => {
                "take another device, the system runs from this one".to_owned()
            }
            Self::Mounted { at, seen_by: None, .. } => format!("umount {at}"),
            Self::Mounted { at, seen_by: Some(process), .. } => {
                format!("nsenter --target {} --mount umount {at}", process.id)
            }
            Self::Swap { node } => format!("swapoff /dev/{}", node.split(' ').next().unwrap_or(node)),
            Self::Held { release, .. } => release.clone(),
            Self::Open { by: Process { id: 1, .. }, .. } => {
                "make the system's first process close it".to_owned()
            }
            Self::Open { by, .. } => format!("kill {}", by.id),
        }
    }
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { node, at, seen_by: None } => write!(f, "{node} is mounted at {at}"),
            Self::Mounted { node, at, seen_by: Some(process) } => {
                write!(f, "{node} is mounted at {at} as {process} sees it")
            }
            Self::Swap { node } => write!(f, "{node} is swap"),
            Self::Held { node, by, .. } => write!(f, "{node} is held by {by}"),
            Self::Open { node, by } => write!(f, "{node} is open in {by}"),
        }
    }
}

/// Something that couldn't be looked at, so that a use may have been missed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Doubt {
    /// Processes whose open files may not be read.
    #[error(
        "the open files of {first}{} can't be read; run this as root, with CAP_SYS_PTRACE",
        match count { 1 => String::new(), _ => format!(" and {} more", count - 1) }
    )]
    Unreadable {
        /// How many.
        count: usize,
        /// One of them.
        first: Process,
    },
    /// Processes of the host aren't shown at all.
    #[error(
        "not all processes of the host are in sight; run this as root outside of any container, or in one that \
         shares the host's process ids (--pid=host)"
    )]
    Hidden,
    /// The mounts of the calling process can't be read.
    #[error("{} can't be read; mount procfs (mount -t proc proc /proc)", path.display())]
    NoMounts {
        /// What is missing.
        path: PathBuf,
    },
    /// The kernel's driver has it and doesn't show its namespaces.
    #[error(
        "the kernel's driver says that the controller is {state}; wait until it's live, or look into dmesg"
    )]
    NotLive {
        /// The state that the kernel shows.
        state: String,
    },
    /// VFIO has the function switched on, and no process could be named.
    #[error(
        "somebody has it switched on through VFIO{}; find out with fuser -v {} and end that program",
        candidates.iter().map(|process| format!(", maybe {process}")).collect::<String>(),
        node.display()
    )]
    Enabled {
        /// The group's node.
        node: PathBuf,
        /// Processes that have some VFIO device open.
        candidates: Vec<Process>,
    },
}

/// Who uses a function, as far as can be told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// What is known.
    pub uses: Vec<Use>,
    /// What can't be told.
    pub doubts: Vec<Doubt>,
    /// The block devices of the function's namespaces, whole, under every name that leads to one of them: what has
    /// to be claimed before the function is taken from the kernel's driver.
    pub block_nodes: Vec<PathBuf>,
}

impl Usage {
    /// Whether nobody uses it, for certain.
    #[must_use]
    pub fn is_unused(&self) -> bool {
        self.uses.is_empty() && self.doubts.is_empty()
    }
}

impl Host {
    /// Looks who uses a function. The calling process itself doesn't count.
    ///
    /// # Errors
    /// [`PciError`] when sysfs can't be read. What may not be read in procfs isn't an error but a [`Doubt`].
    pub fn usage(&self, function: &PciFunction) -> Result<Usage, PciError> {
        let stack = Stack::of(self, function)?;
        let mut survey = Survey { host: self, function, nodes: stack.nodes(), usage: Usage::default() };
        survey.usage.block_nodes = stack.namespace_paths(self);
        survey.usage.uses.extend_from_slice(stack.holders());
        survey.controller_state();
        survey.swaps()?;
        survey.mounts_and_processes()?;
        survey.usage.uses.dedup();
        Ok(survey.usage)
    }
}

/// A look in progress.
struct Survey<'a> {
    host: &'a Host,
    function: &'a PciFunction,
    nodes: Vec<Node>,
    usage: Usage,
}

impl Survey<'_> {
    fn controller_state(&mut self) {
        let state = match &self.function.kernel {
            Some(controller) => controller.state.as_str(),
            None if self.function.driver.as_deref() == Some("nvme") => "being set up or taken down",
            None => return,
        };
        // A dead controller has no namespaces any more; kernels too old to tell show nothing.
        if !matches!(state, "live" | "dead" | "") {
            self.usage.doubts.push(Doubt::NotLive { state: state.to_owned() });
        }
    }

    fn swaps(&mut self) -> Result<(), PciError> {
        for path in mounts::swaps(self.host)? {
            if let Some(node) = self.node_at(&path) {
                self.usage.uses.push(Use::Swap { node });
            }
        }
        Ok(())
    }

    /// The node that a path names, by its device number or by its name.
    fn node_at(&self, path: &str) -> Option<String> {
        self.nodes.iter().find(|node| node.is_at(self.host, path)).map(Node::label)
    }

    fn mounts_and_processes(&mut self) -> Result<(), PciError> {
        let own = self.host.path("proc/self/mountinfo");
        match attribute(&own)? {
            Some(table) => self.mounts(&table, None),
            None => self.usage.doubts.push(Doubt::NoMounts { path: own }),
        }
        let (host, function) = (self.host, self.function);
        let mut opened: Vec<(String, Process)> = Vec::new();
        let mut vfio_somewhere: Vec<Process> = Vec::new();
        let scan = {
            let nodes = &self.nodes;
            processes::scan(host, &mut |process: &Process, file: &OpenFile<'_>| {
                if let Some(node) = nodes.iter().find(|node| node.is_opened_by(file)) {
                    opened.push((node.label(), process.clone()));
                } else if let Some(path) = file.resource_of(function.address) {
                    opened.push((path.to_owned(), process.clone()));
                } else if file.is_vfio_device() {
                    match file.vfio_device_address() {
                        Some(address) if address == function.address => {
                            opened.push((format!("the VFIO device {address}"), process.clone()));
                        }
                        Some(_) => {}
                        None => vfio_somewhere.push(process.clone()),
                    }
                }
            })?
        };
        for (process, table) in &scan.mount_tables {
            self.mounts(table, Some(process));
        }
        opened.sort_by_key(|(_, process)| process.id);
        opened.dedup();
        self.usage.uses.extend(opened.into_iter().map(|(node, by)| Use::Open { node, by }));
        if let Some(first) = scan.unreadable.first() {
            self.usage.doubts.push(Doubt::Unreadable { count: scan.unreadable.len(), first: first.clone() });
        }
        if !scan.sees_all {
            self.usage.doubts.push(Doubt::Hidden);
        }
        self.vfio_without_a_name(vfio_somewhere)
    }

    fn mounts(&mut self, table: &str, seen_by: Option<&Process>) {
        for mount in mounts::parse(table) {
            let by_number = |node: &&Node| node.kind == NodeKind::Block && node.number == Some(mount.number);
            let node = match self.nodes.iter().find(by_number) {
                Some(node) => Some(node.label()),
                // File systems over several devices have numbers of their own; their source names one device or more.
                None if mount.number.major == 0 => mount.sources().find_map(|path| self.node_at(path)),
                None => None,
            };
            let Some(node) = node else { continue };
            let known = self.usage.uses.iter().any(
                |known| matches!(known, Use::Mounted { node: other, at, .. } if *other == node && *at == mount.at),
            );
            if !known {
                self.usage.uses.push(Use::Mounted { node, at: mount.at, seen_by: seen_by.cloned() });
            }
        }
    }

    /// VFIO switches a function on when it's opened and off when it's closed; a count above zero without a process
    /// that has it open means that one is out of sight.
    fn vfio_without_a_name(&mut self, mut candidates: Vec<Process>) -> Result<(), PciError> {
        let named = self.usage.uses.iter().any(|known| matches!(known, Use::Open { .. }));
        let (false, true, Some(node)) = (named, self.function.is_on_vfio(), self.function.group_node())
        else {
            return Ok(());
        };
        let path = self.host.functions_path().join(self.function.address.to_string()).join("enable");
        if !matches!(attribute(&path)?.as_deref(), None | Some("0")) {
            candidates.dedup();
            self.usage.doubts.push(Doubt::Enabled { node: node.to_owned(), candidates });
        }
        Ok(())
    }
}
