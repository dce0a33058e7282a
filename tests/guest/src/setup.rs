//! From a bare kernel to a guest in which jobs can run.

use std::ffi::CString;
use std::fs;

use foliant_guest::protocol::{BootPlan, Module, PLAN_PATH};
use rustix::mount::{MountFlags, mount};
use rustix::system::finit_module;

use crate::bind;

/// The plan that the host put into the initramfs.
pub(crate) fn plan() -> BootPlan {
    let text = fs::read_to_string(PLAN_PATH).unwrap_or_else(|error| panic!("{PLAN_PATH}: {error}"));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{PLAN_PATH}: {error}"))
}

/// File systems, modules, hugepages, and the functions that vfio-pci gets.
pub(crate) fn prepare(plan: &BootPlan) {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")] {
        mount_at(kind, place);
    }
    mount_at("hugetlbfs", "/dev/hugepages");
    if plan.hugepages > 0 {
        reserve_hugepages(plan.hugepages);
    }
    for module in &plan.modules {
        load(module);
    }
    for address in &plan.bind {
        bind::to_vfio(address);
    }
}

/// Seconds since the kernel started.
pub(crate) fn uptime_s() -> f64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split(' ').next().and_then(|seconds| seconds.parse().ok()).unwrap_or(f64::NAN)
}

/// The kernel's release, as of `uname -r`.
pub(crate) fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn mount_at(kind: &str, place: &str) {
    fs::create_dir_all(place).unwrap_or_else(|error| panic!("{place}: {error}"));
    match mount(kind, place, kind, MountFlags::empty(), None) {
        Ok(()) | Err(rustix::io::Errno::BUSY) => {}
        Err(error) => panic!("cannot mount {kind} at {place}: {error}"),
    }
}

fn reserve_hugepages(wanted: u32) {
    let path = "/proc/sys/vm/nr_hugepages";
    fs::write(path, wanted.to_string()).unwrap_or_else(|error| panic!("{path}: {error}"));
    let got = fs::read_to_string(path).unwrap_or_default();
    assert_eq!(got.trim().parse(), Ok(wanted), "hugepages reserved; give the guest more memory");
}

fn load(module: &Module) {
    let Module { path, parameters } = module;
    let file = fs::File::open(path).unwrap_or_else(|error| panic!("module {path}: {error}"));
    let parameters = CString::new(parameters.as_str()).expect("parameters hold no NUL");
    match finit_module(&file, &parameters, 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(error) => panic!("cannot load {path}: {error}"),
    }
}
