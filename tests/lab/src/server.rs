//! A network block device whose server caches writes in volatile memory: killed, it has forgotten what wasn't flushed.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::drive::Drive;
use crate::error::{LabError, Result};
use crate::packages;

/// The server of a drive with [`Image::ForgetfulServer`](crate::Image::ForgetfulServer). Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct ForgetfulServer {
    /// The drive's name.
    pub(crate) drive: String,
    process: Child,
}

/// How long a server may take to listen.
const LISTENING_MAX: Duration = Duration::from_secs(30);

impl ForgetfulServer {
    /// Starts the server of `drive`, whose image is there already, and waits until it listens.
    ///
    /// # Errors
    /// When nbdkit can't be had, or doesn't start.
    pub(crate) fn start(drive: &Drive, run: &Path) -> Result<Self> {
        let program = packages::program("nbdkit", "nbdkit")?;
        let (socket, log) = (drive.socket_path(run), run.join(format!("{}.server", drive.name)));
        let errors = File::create(&log).map_err(LabError::io("create", &log))?;
        let process = Command::new(&program)
            .args(["--foreground", "--exit-with-parent", "--unix"])
            .arg(&socket)
            .args(["--filter=cache", "file"])
            .arg(drive.image_path(run))
            .arg("cache=writeback")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .map_err(LabError::io("start", &program))?;
        let mut server = Self { drive: drive.name.clone(), process };
        let deadline = Instant::now() + LISTENING_MAX;
        while UnixStream::connect(&socket).is_err() {
            let ended = server.process.try_wait().map_err(LabError::io("wait for", &program))?;
            if ended.is_some() || Instant::now() > deadline {
                let words = std::fs::read_to_string(&log).unwrap_or_default();
                let what = format!("nbdkit for the drive {}", drive.name);
                return Err(LabError::Unexpected { what, reason: format!("it doesn't listen: {words}") });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    /// Ends the server at once: what it had cached and not written is gone.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn lose_power(&self) -> std::io::Result<()> {
        // It isn't waited for before it is dropped, so the number is still its own.
        let pid = Pid::from_child(&self.process);
        Ok(kill_process(pid, Signal::KILL)?)
    }
}

impl Drop for ForgetfulServer {
    fn drop(&mut self) {
        // A server that has ended already is what is wanted.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}
