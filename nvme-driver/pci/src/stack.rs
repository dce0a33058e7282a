//! Everything that leads to a function's data: its namespaces under all their names, their partitions, and what the
//! kernel has built on those.

use std::collections::{BTreeSet, VecDeque};
use std::path::{Path, PathBuf};

use crate::error::PciError;
use crate::function::PciFunction;
use crate::host::{Host, attribute, entries};
use crate::kernel::{KernelController, KernelNamespace};
use crate::node::{Node, NodeKind};
use crate::usage::Use;

/// The nodes that lead to a function, and what holds them.
#[derive(Debug)]
pub(crate) struct Stack {
    /// The namespaces whole, by name.
    namespaces: BTreeSet<String>,
    block: Vec<Node>,
    character: Vec<Node>,
    held: Vec<Use>,
}

impl Stack {
    /// Finds all that leads to `function`.
    pub(crate) fn of(host: &Host, function: &PciFunction) -> Result<Self, PciError> {
        let mut stack =
            Self { namespaces: BTreeSet::new(), block: Vec::new(), character: Vec::new(), held: Vec::new() };
        stack.add_user_drivers(host, function)?;
        if let Some(controller) = &function.kernel {
            stack.add_controller(host, controller)?;
        }
        Ok(stack)
    }

    /// All nodes, in the order in which they were found: from the device upwards.
    pub(crate) fn nodes(&self) -> Vec<Node> {
        self.block.iter().chain(&self.character).cloned().collect()
    }

    /// What the kernel has built on the nodes.
    pub(crate) fn holders(&self) -> &[Use] {
        &self.held
    }

    /// The block devices of the namespaces, whole.
    pub(crate) fn namespace_paths(&self, host: &Host) -> Vec<PathBuf> {
        self.namespaces.iter().map(|name| host.path("dev").join(name)).collect()
    }

    /// What programs open to drive the function themselves.
    fn add_user_drivers(&mut self, host: &Host, function: &PciFunction) -> Result<(), PciError> {
        let below_dev = |path: &Path| path.strip_prefix(host.path("dev")).ok()?.to_str().map(str::to_owned);
        if let Some(name) = function.group_node().and_then(below_dev) {
            self.character.push(Node::in_dev(host, &name));
        }
        if let Some(name) = function.vfio_cdev.as_deref().and_then(below_dev) {
            self.character.push(Node::in_dev(host, &name));
        }
        let uio = host.functions_path().join(function.address.to_string()).join("uio");
        for name in entries(&uio)?.unwrap_or_default() {
            self.character.push(Node::in_dev(host, &name.to_string_lossy()));
        }
        Ok(())
    }

    fn add_controller(&mut self, host: &Host, controller: &KernelController) -> Result<(), PciError> {
        let class = host.path("sys/class/nvme").join(&controller.name);
        self.character.push(Node::in_sysfs(NodeKind::Character, &controller.name, &class)?);
        let mut namespaces = controller.namespaces.clone();
        // Without multipath a namespace that two controllers share has a block device through each of them.
        for other in KernelController::all(host)? {
            if other.name != controller.name {
                namespaces.extend(
                    other
                        .namespaces
                        .iter()
                        .filter(|theirs| {
                            let shared =
                                |ours: &KernelNamespace| !ours.wwid.is_empty() && ours.wwid == theirs.wwid;
                            let same_subsystem = other.subsystem_nqn == controller.subsystem_nqn;
                            same_subsystem
                                && !other.subsystem_nqn.is_empty()
                                && controller.namespaces.iter().any(shared)
                        })
                        .cloned(),
                );
            }
        }
        for namespace in &namespaces {
            self.namespaces.insert(namespace.name.clone());
            for name in namespace.character_names() {
                let directory = host.path("sys/class/nvme-generic").join(&name);
                if directory.exists() {
                    self.character.push(Node::in_sysfs(NodeKind::Character, &name, &directory)?);
                }
            }
        }
        self.walk(host)?;
        self.add_file_systems(host)?;
        self.add_targets(host)
    }

    /// Goes from the namespaces over partitions and holders to all that is built on them.
    fn walk(&mut self, host: &Host) -> Result<(), PciError> {
        let loops = loop_devices(host)?;
        let mut seen = self.namespaces.clone();
        let mut next: VecDeque<String> = seen.iter().cloned().collect();
        while let Some(name) = next.pop_front() {
            let directory = host.path("sys/class/block").join(&name);
            let mut node = Node::in_sysfs(NodeKind::Block, &name, &directory)?;
            node.alias = attribute(&directory.join("dm/name"))?.filter(|alias| *alias != name);
            for entry in entries(&directory)?.unwrap_or_default() {
                let entry = entry.to_string_lossy().into_owned();
                if directory.join(&entry).join("partition").exists() && seen.insert(entry.clone()) {
                    next.push_back(entry);
                }
            }
            let mut holders: Vec<String> = entries(&directory.join("holders"))?
                .unwrap_or_default()
                .iter()
                .map(|holder| holder.to_string_lossy().into_owned())
                .collect();
            holders.extend(
                loops.iter().filter(|(_, file)| node.is_at(host, file)).map(|(name, _)| name.clone()),
            );
            for holder in holders {
                let (by, release) = description(host, &holder)?;
                self.held.push(Use::Held { node: node.label(), by, release });
                if seen.insert(holder.clone()) {
                    next.push_back(holder);
                }
            }
            self.block.push(node);
        }
        Ok(())
    }

    /// File systems over several devices: the mount table names only one of them.
    fn add_file_systems(&mut self, host: &Host) -> Result<(), PciError> {
        let directory = host.path("sys/fs/btrfs");
        for id in entries(&directory)?.unwrap_or_default() {
            for device in entries(&directory.join(&id).join("devices"))?.unwrap_or_default() {
                if let Some(node) = self.block.iter().find(|node| device.to_str() == Some(&node.name)) {
                    let by = format!("the mounted btrfs {}", id.to_string_lossy());
                    let release = "umount that file system".to_owned();
                    self.held.push(Use::Held { node: node.label(), by, release });
                }
            }
        }
        Ok(())
    }

    /// Namespaces that the kernel's NVMe target exports: it opens them without claiming them.
    fn add_targets(&mut self, host: &Host) -> Result<(), PciError> {
        let directory = host.path("sys/kernel/config/nvmet/subsystems");
        for subsystem in entries(&directory)?.unwrap_or_default() {
            let namespaces = directory.join(&subsystem).join("namespaces");
            for namespace in entries(&namespaces)?.unwrap_or_default() {
                let path = attribute(&namespaces.join(namespace).join("device_path"))?.unwrap_or_default();
                if let Some(node) = self.block.iter().find(|node| node.is_at(host, &path)) {
                    let by = format!("the NVMe target {}", subsystem.to_string_lossy());
                    let release = "take it out of that target (nvmetcli)".to_owned();
                    self.held.push(Use::Held { node: node.label(), by, release });
                }
            }
        }
        Ok(())
    }
}

/// The loop devices that have a file, with its path.
fn loop_devices(host: &Host) -> Result<Vec<(String, String)>, PciError> {
    let class = host.path("sys/class/block");
    let mut devices = Vec::new();
    for name in entries(&class)?.unwrap_or_default() {
        if let Some(file) = attribute(&class.join(&name).join("loop/backing_file"))? {
            devices.push((name.to_string_lossy().into_owned(), file));
        }
    }
    Ok(devices)
}

/// What people call a holder, `the LVM volume vg-root (dm-0)`, and the command that takes it down.
fn description(host: &Host, name: &str) -> Result<(String, String), PciError> {
    let directory = host.path("sys/class/block").join(name);
    if let Some(alias) = attribute(&directory.join("dm/name"))? {
        let id = attribute(&directory.join("dm/uuid"))?.unwrap_or_default();
        let (kind, release) = match id.split('-').next().unwrap_or_default() {
            "LVM" => ("the LVM volume", format!("lvchange --activate n /dev/mapper/{alias}")),
            "CRYPT" => ("the encrypted device", format!("cryptsetup close {alias}")),
            "mpath" => ("the multipath device", format!("multipath -f {alias}")),
            _ => ("the device mapper's", format!("dmsetup remove {alias}")),
        };
        return Ok((format!("{kind} {alias} ({name})"), release));
    }
    Ok(if directory.join("md").exists() {
        (format!("the RAID array {name}"), format!("mdadm --stop /dev/{name}"))
    } else if directory.join("loop").exists() {
        (format!("the loop device {name}"), format!("losetup --detach /dev/{name}"))
    } else {
        (name.to_owned(), format!("take down {name}"))
    })
}
