//! VFIO's modules with IOMMUFD, character devices and no-IOMMU mode, built from the distribution's own kernel sources.
//!
//! The kernel's configuration leaves the three out, but nothing of them lies in the kernel proper: the sources of
//! the modules, built against the kernel's headers with the three switched on, load into the unchanged kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache;
use crate::command;
use crate::error::{LabError, Result};
use crate::kernel::GuestModule;
use crate::packages;

/// Switched on, as make and as C see them.
const OPTIONS: &[(&str, &str, &str)] = &[
    ("CONFIG_IOMMUFD", "m", "CONFIG_IOMMUFD_MODULE"),
    ("CONFIG_VFIO_DEVICE_CDEV", "y", "CONFIG_VFIO_DEVICE_CDEV"),
    ("CONFIG_VFIO_NOIOMMU", "y", "CONFIG_VFIO_NOIOMMU"),
    ("CONFIG_INTERVAL_TREE_SPAN_ITER", "y", "CONFIG_INTERVAL_TREE_SPAN_ITER"),
];

/// The built modules below the build's directory, in the order in which they are loaded, with their parameters.
const BUILT: &[(&str, &str)] = &[
    ("modules/iommufd/iommufd.ko", ""),
    ("modules/vfio/vfio.ko", "enable_unsafe_noiommu_mode=1"),
    ("modules/vfio/vfio_iommu_type1.ko", ""),
    ("modules/vfio/pci/vfio-pci-core.ko", ""),
    ("modules/vfio/pci/vfio-pci.ko", ""),
];

/// Builds the modules for the kernel `release` (`6.12.…-cloud-amd64`), once.
///
/// # Errors
/// When sources, headers or the compiler can't be had, or the build fails.
pub(crate) fn build(release: &str) -> Result<Vec<GuestModule>> {
    let root = cache::once(&format!("modules-{release}"), |draft| build_in(draft, release))?;
    let module = |(path, parameters): &(&str, &str)| GuestModule {
        path: root.join(path),
        parameters: (*parameters).to_owned(),
    };
    Ok(BUILT.iter().map(module).collect())
}

fn build_in(draft: &Path, release: &str) -> Result<()> {
    for (program, package) in [("make", "make"), ("xz", "xz-utils"), ("gcc-12", "gcc-12")] {
        packages::program(program, package)?;
    }
    let base = release.trim_end_matches("-cloud-amd64");
    let series = base.splitn(3, '.').take(2).collect::<Vec<_>>().join(".");
    let unpacked = draft.join("unpacked");
    packages::unpack(
        &[
            format!("linux-headers-{release}"),
            format!("linux-headers-{base}-common"),
            format!("linux-kbuild-{base}"),
            format!("linux-source-{series}"),
        ],
        &unpacked,
    )?;
    let sources = unpacked.join("usr/src");
    let headers = configure(&sources, release, base)?;
    let modules = lay_out(&sources, draft, &series)?;
    command::output(
        Command::new("make")
            .arg("-C")
            .arg(&headers)
            .arg(format!("M={}", modules.display()))
            .args(["-j2", "modules"]),
    )?;
    for (module, _) in BUILT {
        command::output(Command::new("strip").arg("--strip-debug").arg(draft.join(module)))?;
    }
    fs::remove_dir_all(&unpacked).map_err(LabError::io("remove", &unpacked))
}

/// Points the unpacked headers at themselves and switches the options on.
fn configure(sources: &Path, release: &str, base: &str) -> Result<PathBuf> {
    let headers = sources.join(format!("linux-headers-{release}"));
    let common = sources.join(format!("linux-headers-{base}-common"));
    write(&headers.join("Makefile"), &format!("include {}/Makefile\n", common.display()))?;
    let (make, code) =
        (headers.join("include/config/auto.conf"), headers.join("include/generated/autoconf.h"));
    // Type information for modules takes a tool that a guest doesn't need.
    let mut for_make = read(&make)?.replace("CONFIG_DEBUG_INFO_BTF_MODULES=y\n", "");
    let mut for_code = read(&code)?;
    for (option, value, macro_name) in OPTIONS {
        for_make += &format!("{option}={value}\n");
        for_code += &format!("#define {macro_name} 1\n");
    }
    write(&make, &for_make)?;
    write(&code, &for_code)?;
    Ok(headers)
}

/// Lays the modules' sources out for a build outside the kernel's tree.
fn lay_out(sources: &Path, draft: &Path, series: &str) -> Result<PathBuf> {
    let tree = format!("linux-source-{series}");
    let wanted =
        ["drivers/vfio", "drivers/iommu", "lib/interval_tree.c"].map(|path| format!("{tree}/{path}"));
    command::output(
        Command::new("tar")
            .arg("-C")
            .arg(sources)
            .arg("-xf")
            .arg(sources.join(format!("{tree}.tar.xz")))
            .args(wanted),
    )?;
    let (tree, modules) = (sources.join(tree), draft.join("modules"));
    fs::create_dir_all(&modules).map_err(LabError::io("create", &modules))?;
    let moves = [("drivers/vfio", "vfio"), ("drivers/iommu/iommufd", "iommufd")];
    for (from, to) in moves {
        fs::rename(tree.join(from), modules.join(to)).map_err(LabError::io("move", &tree.join(from)))?;
    }
    for entry in fs::read_dir(tree.join("drivers/iommu")).map_err(LabError::io("read", &tree))?.flatten() {
        if entry.path().extension().is_some_and(|ending| ending == "h") {
            let to = modules.join(entry.file_name());
            fs::copy(entry.path(), &to).map_err(LabError::io("write", &to))?;
        }
    }
    write(&modules.join("Makefile"), "obj-m += iommufd/ vfio/\n")?;
    // The kernel has interval trees, but not the iteration over gaps: it comes into the module, not exported again.
    let body = modules.join("iommufd/interval_tree_body.h");
    fs::rename(tree.join("lib/interval_tree.c"), &body).map_err(LabError::io("move", &body))?;
    write(
        &modules.join("iommufd/interval_tree.c"),
        "#include <linux/export.h>\n#undef EXPORT_SYMBOL_GPL\n#define EXPORT_SYMBOL_GPL(symbol)\n\
         #include \"interval_tree_body.h\"\n",
    )?;
    let makefile = modules.join("iommufd/Makefile");
    write(&makefile, &(read(&makefile)? + "iommufd-y += interval_tree.o\n"))?;
    Ok(modules)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(LabError::io("read", path))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(LabError::io("write", path))
}
