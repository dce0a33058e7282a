//! Where the lab keeps what it fetched and built: kernels, QEMU, modules, and the runs' files.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::error::{LabError, Result};

/// The lab's directory: `$FOLIANT_LAB_CACHE`, or `guest-lab` in cargo's target directory.
#[must_use]
pub fn directory() -> PathBuf {
    std::env::var_os("FOLIANT_LAB_CACHE").map_or_else(|| target_directory().join("guest-lab"), PathBuf::from)
}

/// Cargo's target directory of this workspace.
#[must_use]
pub fn target_directory() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), |dir| workspace().join(dir))
}

/// The root of the workspace.
#[must_use]
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).expect("the crate lies two folders deep").to_owned()
}

/// Makes `name` below the cache by `build`, which fills an empty directory, unless it is there already. Processes that
/// want the same wait for the first; what a build left half-done is not taken for the whole.
///
/// # Errors
/// The builder's, or the file system's.
pub(crate) fn once(name: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let root = directory();
    let made = root.join(name);
    let parent = made.parent().unwrap_or(&root).to_owned();
    fs::create_dir_all(&parent).map_err(LabError::io("create", &parent))?;
    let lock_path = beside(&made, "lock");
    let lock = File::create(&lock_path).map_err(LabError::io("create", &lock_path))?;
    lock.lock().map_err(LabError::io("lock", &lock_path))?;
    if !made.exists() {
        tracing::info!("making {}, once", made.display());
        let draft = beside(&made, "draft");
        if draft.exists() {
            fs::remove_dir_all(&draft).map_err(LabError::io("remove", &draft))?;
        }
        fs::create_dir_all(&draft).map_err(LabError::io("create", &draft))?;
        build(&draft)?;
        fs::rename(&draft, &made).map_err(LabError::io("rename", &draft))?;
    }
    Ok(made)
}

/// The path of something that belongs to `path`: its name with an ending more.
pub(crate) fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn what_lies_beside_a_version_keeps_all_of_its_name() {
        assert_eq!(super::beside(Path::new("/c/kernel-6.12"), "lock"), Path::new("/c/kernel-6.12.lock"));
    }

    #[test]
    fn the_workspace_is_where_the_lock_file_lies() {
        assert!(super::workspace().join("Cargo.lock").is_file());
    }
}
