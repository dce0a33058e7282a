//! Where stats pages are: what an embedder chooses, and where a reader looks who was told nothing.

use std::fs::{DirBuilder, Metadata};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;

use crate::error::{Error, Result};

/// Whether, and where, an engine shows what it does to other processes of its user
/// ([`EngineOptions::stats_page`](crate::EngineOptions::stats_page)).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum StatsPage {
    /// Nowhere.
    #[default]
    None,
    /// Where `foliant top` looks: the directory `foliant` in `$XDG_RUNTIME_DIR`, or `/dev/shm/foliant-UID` where that
    /// isn't set. What processes that were killed left there goes.
    Found,
    /// In this file, on tmpfs. One that a process which has ended left there is replaced; one that holds anything else, or
    /// that a running engine has, is an error.
    At(PathBuf),
}

/// The directories in which pages are looked for: the one of this user first, then those of others, which root may
/// read.
#[must_use]
pub fn stats_directories() -> Vec<PathBuf> {
    let own = own_directory(std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from), geteuid().as_raw());
    let children = |of: &str| std::fs::read_dir(of).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut others: Vec<_> = children("/run/user").map(|user| user.join("foliant")).collect();
    others.extend(
        children("/dev/shm").filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("foliant-"))
        }),
    );
    others.retain(|path| *path != own && is_directory(path));
    others.sort();
    std::iter::once(own).chain(others).collect()
}

fn is_directory(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
}

fn own_directory(runtime: Option<PathBuf>, user: u32) -> PathBuf {
    match runtime.filter(|runtime| runtime.is_absolute() && runtime.is_dir()) {
        Some(runtime) => runtime.join("foliant"),
        None => PathBuf::from(format!("/dev/shm/foliant-{user}")),
    }
}

/// This user's directory, made if it isn't there. Refused if others could have put it there, or could change it.
pub(super) fn prepare_directory() -> Result<PathBuf> {
    prepare(own_directory(std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from), geteuid().as_raw()))
}

fn prepare(directory: PathBuf) -> Result<PathBuf> {
    let refused = |reason: String| Error::StatsPage { path: directory.clone(), reason };
    match DirBuilder::new().mode(0o700).create(&directory) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(refused(format!("the directory cannot be made: {error}; name a file on tmpfs")));
        }
        _ => {}
    }
    let metadata = std::fs::symlink_metadata(&directory)
        .map_err(|error| refused(format!("cannot be looked at: {error}")))?;
    if !is_private(&metadata, geteuid().as_raw()) {
        return Err(refused(format!(
            "is no directory that user {} alone may write to; remove it, or name a file on tmpfs",
            geteuid().as_raw()
        )));
    }
    Ok(directory)
}

fn is_private(metadata: &Metadata, user: u32) -> bool {
    metadata.is_dir() && metadata.uid() == user && metadata.mode() & 0o022 == 0
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn without_a_runtime_directory_each_user_has_one_of_its_own() {
        assert_eq!(own_directory(None, 1000), Path::new("/dev/shm/foliant-1000"));
        assert_eq!(own_directory(Some("relative".into()), 7), Path::new("/dev/shm/foliant-7"));
        assert_eq!(own_directory(Some("/dev/shm".into()), 7), Path::new("/dev/shm/foliant"));
    }

    #[test]
    fn a_directory_that_others_may_write_to_or_a_link_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let made = prepare(place.path().join("made")).unwrap();
        assert_eq!(std::fs::metadata(&made).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(prepare(made.clone()).unwrap(), made);
        std::os::unix::fs::symlink(&made, place.path().join("link")).unwrap();
        assert!(prepare(place.path().join("link")).is_err());
        std::fs::set_permissions(&made, PermissionsExt::from_mode(0o777)).unwrap();
        assert!(prepare(made).is_err());
        assert!(prepare(place.path().join("not/there")).is_err());
    }
}
