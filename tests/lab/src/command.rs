//! Running a program to its end and keeping what it said.

use std::process::Command;

use crate::error::{LabError, Result};

/// Runs `command` and returns its standard output.
///
/// # Errors
/// [`LabError::Command`], with the last lines of what it said, when it can't be started or fails.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let told = command.output();
    let failed = |status: String, output: String| {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
        LabError::Command { command: words.join(" "), status, output }
    };
    let told = told.map_err(|error| failed("it could not be started".into(), error.to_string()))?;
    let out = String::from_utf8_lossy(&told.stdout).into_owned();
    if told.status.success() {
        return Ok(out);
    }
    Err(failed(told.status.to_string(), tail(&(out + &String::from_utf8_lossy(&told.stderr)), 12)))
}

/// The last `lines` lines of `text`.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
