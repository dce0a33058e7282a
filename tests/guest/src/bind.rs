//! Giving PCI functions to vfio-pci and back, by `driver_override`.
//!
//! The lab does this by itself, so that the tool that does it for users (`foliant bind`) can be tested against it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Gives the function at `address` to vfio-pci.
pub(crate) fn to_vfio(address: &str) {
    to_driver(address, "vfio-pci");
}

/// Gives the function at `address` back to the kernel's own driver for it, and waits for its namespaces to show.
pub(crate) fn to_kernel(address: &str) {
    to_driver(address, "");
}

/// The function's directory in sysfs.
pub(crate) fn function(address: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(address)
}

/// The driver that has the function.
pub(crate) fn driver(address: &str) -> Option<String> {
    let link = fs::read_link(function(address).join("driver")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

/// The function's IOMMU group.
pub(crate) fn group(address: &str) -> Option<u32> {
    let link = fs::read_link(function(address).join("iommu_group")).ok()?;
    link.file_name()?.to_str()?.parse().ok()
}

/// The kernel's name of the controller at `address` (`nvme0`), once its driver has set it up.
pub(crate) fn kernel_controller(address: &str) -> Option<String> {
    let entry = fs::read_dir(function(address).join("nvme")).ok()?.next()?.ok()?;
    let state = fs::read_to_string(entry.path().join("state")).ok()?;
    (state.trim() == "live").then(|| entry.file_name().to_string_lossy().into_owned())
}

/// The guest kernel's name (`nvme0n1`) of namespace `nsid` of the controller at `address`. Waits for it.
///
/// # Panics
/// When it doesn't show within ten seconds.
pub(crate) fn kernel_disk(address: &str, nsid: u32) -> String {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(name) = find_disk(address, nsid)
            && Path::new("/dev").join(&name).exists()
        {
            return name;
        }
        assert!(Instant::now() < deadline, "no block device of namespace {nsid} of {address} within 10 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The disk whose sysfs node says that it is namespace `nsid` of the controller (or of its subsystem, where the
/// kernel shows a disk once for all controllers).
fn find_disk(address: &str, nsid: u32) -> Option<String> {
    let controller = kernel_controller(address)?;
    let subsystem = fs::read_to_string(format!("/sys/class/nvme/{controller}/subsysnqn")).ok()?;
    for entry in fs::read_dir("/sys/block").ok()?.flatten() {
        let (name, path) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
        let is_nsid = fs::read_to_string(path.join("nsid")).is_ok_and(|id| id.trim() == nsid.to_string());
        let of_subsystem =
            fs::read_to_string(path.join("device/subsysnqn")).is_ok_and(|nqn| nqn == subsystem);
        // Paths of a multipath disk are hidden and have no node.
        let hidden = fs::read_to_string(path.join("hidden")).is_ok_and(|hidden| hidden.trim() == "1");
        if is_nsid && of_subsystem && !hidden {
            return Some(name);
        }
    }
    None
}

fn to_driver(address: &str, wanted: &str) {
    let function = function(address);
    assert!(function.exists(), "there is no PCI function {address}");
    let write = |path: &Path, text: &str| {
        fs::write(path, text).unwrap_or_else(|error| panic!("{} ← {text:?}: {error}", path.display()));
    };
    let current = driver(address);
    let is_there = |has: &String| if wanted.is_empty() { has != "vfio-pci" } else { has == wanted };
    if current.as_ref().is_some_and(is_there) {
        return;
    }
    write(&function.join("driver_override"), &format!("{wanted}\n"));
    if current.is_some() {
        write(&function.join("driver/unbind"), address);
    }
    write(Path::new("/sys/bus/pci/drivers_probe"), address);
    let got = driver(address);
    assert!(
        got.as_ref().is_some_and(is_there),
        "{address} has the driver {got:?} after it was offered to {wanted:?}"
    );
}
