//! Programs and packages from the distribution's own sources, by apt.
//!
//! Programs are installed, which takes root; packages that only a guest uses are downloaded and unpacked into the
//! lab's cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use crate::cache::beside;
use crate::command;
use crate::error::{LabError, Result};

/// Apt is asked for one thing at a time.
static APT: Mutex<()> = Mutex::new(());

/// Finds `program` in the search path; installs `package` where it isn't there.
///
/// # Errors
/// [`LabError::Program`] when it can't be had.
pub fn program(program: &str, package: &str) -> Result<PathBuf> {
    let _turn = APT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(path) = find(program) {
        return Ok(path);
    }
    let missing =
        |reason: String| LabError::Program { program: program.into(), package: package.into(), reason };
    if find("apt-get").is_none() {
        return Err(missing("it isn't installed, and there is no apt-get here to install it".into()));
    }
    if !rustix::process::geteuid().is_root() {
        return Err(missing(format!("installing takes root: sudo apt-get install {package}")));
    }
    install(package).map_err(|error| missing(error.to_string()))?;
    find(program).ok_or_else(|| missing(format!("{package} was installed and has no such program")))
}

/// Finds `program` in the search path.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let standard = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(standard).map(|dir| dir.join(program)).find(|path| path.is_file())
}

fn install(package: &str) -> Result<()> {
    tracing::info!("installing the package {package}");
    let install = || {
        command::output(
            Command::new("apt-get")
                .args(["install", "--quiet", "--yes", "--no-install-recommends"])
                .args(["-o", "DPkg::Lock::Timeout=300", package])
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )
    };
    install().or_else(|_| update().and_then(|()| install())).map(drop)
}

/// The package that `package` depends on whose name begins with `prefix`: a kernel behind its meta package.
pub(crate) fn dependency(package: &str, prefix: &str) -> Result<String> {
    let wrong = |reason: String| LabError::Packages { packages: package.into(), reason };
    if find("apt-cache").is_none() {
        return Err(wrong("there is no apt-cache here to find them".into()));
    }
    let depends = || {
        let told = command::output(Command::new("apt-cache").args(["depends", package]))?;
        let mut names = told.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        let name = names.find(|name| name.starts_with(prefix)).map(str::to_owned);
        name.ok_or_else(|| wrong(format!("it depends on nothing called {prefix}…")))
    };
    depends().or_else(|_| update().and_then(|()| depends()))
}

/// Downloads `packages` and unpacks them below `into`.
pub(crate) fn unpack(packages: &[String], into: &Path) -> Result<()> {
    let _turn = APT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let missing =
        |error: LabError| LabError::Packages { packages: packages.join(" "), reason: error.to_string() };
    let downloads = beside(into, "packages");
    fs::create_dir_all(&downloads).map_err(LabError::io("create", &downloads))?;
    let download = || {
        // Apt's own user can't write below the cache of whoever runs this.
        let own_user = ["-o", "APT::Sandbox::User=root"];
        let mut command = Command::new("apt-get");
        command.args(own_user).args(["download", "--quiet"]).args(packages).current_dir(&downloads);
        command::output(&mut command).map(drop)
    };
    download().or_else(|_| update().and_then(|()| download())).map_err(missing)?;
    for entry in fs::read_dir(&downloads).map_err(LabError::io("read", &downloads))?.flatten() {
        command::output(Command::new("dpkg").arg("-x").arg(entry.path()).arg(into)).map_err(missing)?;
    }
    fs::remove_dir_all(&downloads).map_err(LabError::io("remove", &downloads))
}

/// Fetches the package lists, which may be missing or older than the archive.
fn update() -> Result<()> {
    command::output(Command::new("apt-get").args(["update", "--quiet"])).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_cannot_be_had_is_an_error_that_names_package_and_way_out() {
        let error = LabError::Program { program: "p".into(), package: "q".into(), reason: "why".into() };
        assert!(error.to_string().contains("`q`") && error.to_string().contains("--no-guest"));
    }
}
