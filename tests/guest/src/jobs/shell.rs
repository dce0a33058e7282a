//! A shell for people, on the guest's console.

use std::fs::File;
use std::process::Command;

use super::Job;
use crate::context::Context;

pub(super) const JOBS: &[(&str, Job)] = &[("shell", shell)];

const CONSOLE: &str = "/dev/ttyS0";
const BUSYBOX: &str = "/bin/busybox";

/// Runs busybox's shell until it ends.
fn shell(_: &Context<'_>) {
    let installed =
        Command::new(BUSYBOX).args(["--install", "-s", "/bin"]).status().expect("busybox is in the guest");
    assert!(installed.success(), "busybox makes its links: {installed}");
    let console = || File::options().read(true).write(true).open(CONSOLE).expect("the console opens");
    // With the console as its controlling terminal (setsid): that lets ^C reach what runs in it.
    // Whatever the last command in it came to, the shell has done its work.
    Command::new(BUSYBOX)
        .args(["setsid", "-c", BUSYBOX, "sh"])
        .env("PATH", "/bin")
        .env("PS1", "guest# ")
        .env("HOME", "/tmp")
        .current_dir("/tmp")
        .stdin(console())
        .stdout(console())
        .stderr(console())
        .status()
        .map(drop)
        .expect("the shell starts");
}
