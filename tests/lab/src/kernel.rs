//! The guest's kernel: fetched from the distribution, unpacked, never installed.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cache;
use crate::error::{LabError, Result};
use crate::kernel_modules;
use crate::packages;

/// What a scenario needs of the guest's kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum KernelNeed {
    /// VFIO with groups and containers: the distribution's kernel as it is.
    #[default]
    Groups,
    /// IOMMUFD with VFIO's character devices, and VFIO without an IOMMU. No distribution kernel has them, so these
    /// modules are built from its own sources.
    Iommufd,
}

/// A kernel that can be booted, and the modules that the lab loads.
#[derive(Clone, Debug)]
pub struct GuestKernel {
    /// Its release, as of `uname -r`.
    pub release: String,
    /// The image for QEMU's `-kernel`.
    pub image: PathBuf,
    /// Modules, uncompressed or `.xz`, in the order in which they must be loaded.
    pub modules: Vec<GuestModule>,
}

/// A module on the host, and its parameters in the guest.
#[derive(Clone, Debug)]
pub struct GuestModule {
    /// The file.
    pub path: PathBuf,
    /// Parameters, as for `insmod`.
    pub parameters: String,
}

/// VFIO's modules of a distribution kernel, each after what it needs. A kernel has some of them built in.
const MODULES: &[&str] =
    &["irqbypass", "vfio_virqfd", "vfio", "vfio_iommu_type1", "vfio-pci-core", "vfio-pci"];

/// Finds or fetches a kernel that has what is needed.
///
/// # Errors
/// When packages can't be had, or modules not be built.
pub fn kernel(need: KernelNeed) -> Result<GuestKernel> {
    match need {
        KernelNeed::Groups => distribution_kernel("linux-image-cloud-amd64", "kernel"),
        KernelNeed::Iommufd => {
            let kernel = distribution_kernel("linux-image-6.12-cloud-amd64", "kernel-6.12")?;
            let built = kernel_modules::build(&kernel.release)?;
            let irqbypass =
                kernel.modules.into_iter().filter(|module| module_name(&module.path) == "irqbypass");
            Ok(GuestKernel { modules: irqbypass.chain(built).collect(), ..kernel })
        }
    }
}

/// The kernel that the meta package `package` stands for, kept in the cache as `name`.
fn distribution_kernel(package: &str, name: &str) -> Result<GuestKernel> {
    let root = cache::once(name, |draft| {
        packages::unpack(&[packages::dependency(package, "linux-image-")?], draft)
    })?;
    let wrong =
        |reason: &str| LabError::Unexpected { what: root.display().to_string(), reason: reason.into() };
    let boot = root.join("boot");
    let image =
        first(&boot, |name| name.starts_with("vmlinuz-")).ok_or_else(|| wrong("it holds no kernel"))?;
    let release = file_name(&image).trim_start_matches("vmlinuz-").to_owned();
    let tree = ["lib/modules", "usr/lib/modules"].map(|dir| root.join(dir).join(&release));
    let tree = tree.into_iter().find(|tree| tree.is_dir()).ok_or_else(|| wrong("it holds no modules"))?;
    let mut found = Vec::new();
    collect_modules(&tree, &mut found);
    let modules = MODULES.iter().filter_map(|wanted| found.iter().find(|path| module_name(path) == *wanted));
    let modules = modules.map(|path| GuestModule { path: path.clone(), parameters: String::new() }).collect();
    Ok(GuestKernel { release, image, modules })
}

/// A module's name without its endings.
fn module_name(path: &Path) -> String {
    let name = file_name(path);
    name.trim_end_matches(".xz").trim_end_matches(".ko").to_owned()
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn first(dir: &Path, wanted: impl Fn(&str) -> bool) -> Option<PathBuf> {
    fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path()).find(|path| wanted(&file_name(path)))
}

fn collect_modules(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            collect_modules(&path, found);
        } else if MODULES.contains(&module_name(&path).as_str()) {
            found.push(path);
        }
    }
}
