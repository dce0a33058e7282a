//! Building what runs in the guest: static programs of this workspace.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use crate::cache;
use crate::command;
use crate::error::{LabError, Result};

/// A program of the workspace that guests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestProgram {
    /// The first process, with all jobs.
    Init,
    /// The command `foliant`.
    Foliant,
}

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The program on the host, built once a process; cargo sees whether there is anything to do.
///
/// # Errors
/// When cargo fails.
pub fn build(program: GuestProgram) -> Result<PathBuf> {
    static BUILT: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| build_all().map_err(|error| error.to_string()));
    let name = match program {
        GuestProgram::Init => "lab-init",
        GuestProgram::Foliant => "foliant",
    };
    match built {
        Ok(directory) => Ok(directory.join(name)),
        Err(reason) => {
            Err(LabError::Unexpected { what: "the guest's programs".into(), reason: reason.clone() })
        }
    }
}

/// Builds all programs at once: apart from each other, they would ask for other features of what they share, and cargo
/// would build that twice. Returns the directory that they lie in.
fn build_all() -> Result<PathBuf> {
    tracing::info!("building the guest's programs, unless they are there");
    // A directory of its own: other flags would make cargo rebuild the world back and forth.
    let target = cache::target_directory().join("guest");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    command::output(
        Command::new(cargo)
            .current_dir(cache::workspace())
            .args(["build", "--quiet", "--release", "--target", TARGET])
            .args(["-p", "foliant-guest", "-p", "foliant-tools", "--bin", "lab-init", "--bin", "foliant"])
            .env("CARGO_TARGET_DIR", &target)
            // The guest has no libraries; symbols would only make the kernel unpack more.
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "none")
            .env_remove("CARGO_ENCODED_RUSTFLAGS"),
    )?;
    Ok(target.join(TARGET).join("release"))
}
