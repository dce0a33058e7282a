//! Finding QEMU, and knowing which one it is.

use std::path::PathBuf;
use std::process::Command;

use crate::command;
use crate::error::{LabError, Result};
use crate::packages;

/// A QEMU that can run guests.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// The program.
    pub program: PathBuf,
    /// Its version: major, minor.
    pub version: (u32, u32),
}

/// The oldest QEMU whose NVMe controller does what the scenarios ask of it.
const OLDEST: (u32, u32) = (7, 2);

/// Finds QEMU, or installs it.
///
/// # Errors
/// When it can't be had, or is too old.
pub fn qemu() -> Result<Qemu> {
    let program = packages::program("qemu-system-x86_64", "qemu-system-x86")?;
    let told = command::output(Command::new(&program).arg("--version"))?;
    let unexpected = |reason: String| LabError::Unexpected { what: program.display().to_string(), reason };
    let version =
        parse_version(&told).ok_or_else(|| unexpected(format!("it says {told:?}, which is no version")))?;
    if version < OLDEST {
        let (major, minor) = version;
        return Err(unexpected(format!("it is version {major}.{minor}, and at least 7.2 is needed")));
    }
    Ok(Qemu { program, version })
}

fn parse_version(told: &str) -> Option<(u32, u32)> {
    let number = told.split("version ").nth(1)?.split_whitespace().next()?;
    let mut parts = number.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        assert_eq!(parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\n…"), Some((7, 2)));
        assert!(parse_version("QEMU emulator version 10.0.2").unwrap() > OLDEST);
        assert_eq!(parse_version("something else"), None);
    }
}
