//! One guest from power-on to power-off: QEMU's process, the lines from the guest, and a verdict that is hard to please.
//!
//! Whatever isn't a clean power-off is a fault: another exit status, a panic, a DMA outside the mapped memory (QEMU's
//! controller gets a success for it, so only the guest's log and QEMU's tell), or a time limit.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use foliant_guest::protocol::{Answer, EXIT_DONE, EXIT_SETUP_FAILED, Line, exit_status};
use serde_json::Value;

use crate::command::tail;
use crate::error::{LabError, Result};
use crate::host_load;
use crate::machine::Machine;
use crate::qemu::Qemu;
use crate::qmp::Monitor;
use crate::server::ForgetfulServer;
use crate::trace;

/// What a guest is started with.
pub(crate) struct Start<'a> {
    pub(crate) qemu: &'a Qemu,
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: &'a Path,
    pub(crate) machine: &'a Machine,
    /// The run's directory: images, logs.
    pub(crate) run: &'a Path,
    /// The servers of its drives that have one.
    pub(crate) servers: &'a [ForgetfulServer],
    /// How long the jobs may take altogether, from the moment that the guest is ready.
    pub(crate) limit: Duration,
    /// Whether everything that the guest says is shown at once.
    pub(crate) echo: Echo,
}

/// Whether a guest's words are shown while it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Echo {
    /// Only when something is wrong.
    #[default]
    Quiet,
    /// All of them, on standard error.
    Show,
    /// The guest's console is this process's terminal, for somebody to type. Faults that only the console tells are
    /// theirs to see.
    Terminal,
}

/// How long a guest may take to get ready. Idle machines need 3 s, loaded ones have been seen to need 18.
const READY_MAX: Duration = Duration::from_secs(90);

/// What came of a guest.
#[derive(Debug, Default)]
pub(crate) struct Ended {
    /// Facts in their order: claim, name, value.
    pub(crate) facts: Vec<(String, String, Value)>,
    /// Claims whose jobs ended, and why they failed if they did.
    pub(crate) verdicts: Vec<(String, Option<String>)>,
    /// What is wrong with the guest itself.
    pub(crate) faults: Vec<String>,
    /// What the guest's console said.
    pub(crate) console: String,
    /// Seconds from QEMU's start until the guest was ready, and until QEMU had ended.
    pub(crate) ready_s: f64,
    pub(crate) total_s: f64,
    /// Seconds of processor time that QEMU had.
    pub(crate) cpu_s: f64,
}

/// The host's side of a running guest: what it can do when a job asks.
pub struct Attendant<'a> {
    /// QEMU's monitor.
    pub monitor: &'a mut Monitor,
    /// The machine.
    pub machine: &'a Machine,
    /// The run's directory.
    pub run: &'a Path,
    /// The servers of its drives that have one.
    pub(crate) servers: &'a [ForgetfulServer],
}

/// Does what a job asks for: the question's name and arguments to its answer.
pub type Attend = fn(&mut Attendant<'_>, &str, &Value) -> std::result::Result<Value, String>;

enum Event {
    Line(Line),
    /// QEMU closed the console or the port: it has ended, or is about to.
    Closed,
}

/// Runs a guest to its end.
///
/// # Errors
/// When QEMU can't be started or spoken with. Whatever the guest does wrong is told in [`Ended`].
pub(crate) fn run(start: &Start<'_>, attend: Attend) -> Result<Ended> {
    let sockets =
        tempfile::tempdir().map_err(LabError::io("create", Path::new("a directory for sockets")))?;
    let begun = Instant::now();
    let mut running = Running::start(start, sockets.path())?;
    let mut ended = Ended::default();
    let over = running.watch(start, attend, begun, &mut ended);
    if over.is_err() {
        running.kill();
    }
    // Once it has been waited for, nobody knows of it any more.
    ended.cpu_s = host_load::cpu_seconds_of_ended(running.process.id())?;
    let status = running.process.wait().map_err(LabError::io("wait for", &start.qemu.program))?;
    ended.total_s = begun.elapsed().as_secs_f64();
    ended.console = read(&console_path(start.run));
    over?;
    let errors = read(&errors_path(start.run));
    running.judge(status, &errors, &mut ended);
    judge_words(&ended.console, &errors, &mut ended.faults);
    Ok(ended)
}

/// A QEMU that runs.
struct Running {
    process: Child,
    monitor: Monitor,
    /// The lab's serial port.
    port: UnixStream,
    events: Receiver<Event>,
    /// Of console and port, those that QEMU hasn't closed yet and that are listened to.
    open: u8,
    done: bool,
}

fn console_path(run: &Path) -> PathBuf {
    run.join("console")
}

fn errors_path(run: &Path) -> PathBuf {
    run.join("errors")
}

fn read(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

impl Running {
    fn start(start: &Start<'_>, sockets: &Path) -> Result<Self> {
        let (port_path, monitor_path) = (sockets.join("port"), sockets.join("monitor"));
        let listen = |path: &Path| UnixListener::bind(path).map_err(LabError::io("listen on", path));
        let (port, monitor) = (listen(&port_path)?, listen(&monitor_path)?);
        let errors = errors_path(start.run);
        let errors_file = File::create(&errors).map_err(LabError::io("create", &errors))?;
        let terminal = start.echo == Echo::Terminal;
        let mut process = command(start, &port_path, &monitor_path)
            .stdin(if terminal { Stdio::inherit() } else { Stdio::null() })
            .stdout(if terminal { Stdio::inherit() } else { Stdio::piped() })
            .stderr(errors_file)
            .spawn()
            .map_err(LabError::io("start", &start.qemu.program))?;
        let connected = accept(&port, &mut process)
            .and_then(|port| Ok((port, Monitor::new(accept(&monitor, &mut process)?)?)));
        let (port, monitor) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                drop(process.kill());
                drop(process.wait());
                let reason = format!("{error}; it says: {}", tail(&read(&errors), 12));
                return Err(LabError::Unexpected { what: "QEMU does not start".into(), reason });
            }
        };
        let (send, events) = mpsc::channel();
        let mut open = 1;
        if let Some(stdout) = process.stdout.take() {
            open += 1;
            copy_console(stdout, &console_path(start.run), start.echo, send.clone())?;
        }
        let lines = port.try_clone().map_err(LabError::io("share", &port_path))?;
        let echo = start.echo;
        std::thread::spawn(move || forward_lines(lines, echo, &send));
        Ok(Self { process, monitor, port, events, open, done: false })
    }

    /// Follows the guest until QEMU has closed both its console and the port.
    fn watch(&mut self, start: &Start<'_>, attend: Attend, begun: Instant, ended: &mut Ended) -> Result<()> {
        let mut deadline = begun + READY_MAX;
        while self.open > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(Event::Closed) => self.open -= 1,
                Err(RecvTimeoutError::Disconnected) => break,
                Ok(Event::Line(line)) => match line {
                    Line::Ready { .. } => {
                        ended.ready_s = begun.elapsed().as_secs_f64();
                        deadline = Instant::now() + start.limit;
                    }
                    Line::Fact { claim, name, value } => ended.facts.push((claim, name, value)),
                    Line::Verdict { claim, failure, .. } => ended.verdicts.push((claim, failure)),
                    Line::Ask { what, arguments, .. } => self.answer(start, attend, &what, &arguments)?,
                    Line::Started { .. } => {}
                    Line::Done => self.done = true,
                },
                Err(RecvTimeoutError::Timeout) => {
                    let what = if ended.ready_s == 0.0 { "not ready" } else { "not over" };
                    let seconds = begun.elapsed().as_secs();
                    ended.faults.push(format!("the guest is {what} {seconds} s after its start: time limit"));
                    self.kill();
                    break;
                }
            }
        }
        Ok(())
    }

    fn answer(&mut self, start: &Start<'_>, attend: Attend, what: &str, arguments: &Value) -> Result<()> {
        let mut attendant = Attendant {
            monitor: &mut self.monitor,
            machine: start.machine,
            run: start.run,
            servers: start.servers,
        };
        let answer = match attend(&mut attendant, what, arguments) {
            Ok(value) => Answer::Done(value),
            Err(reason) => Answer::Failed(reason),
        };
        let text = serde_json::to_string(&answer).expect("an answer is plain data") + "\n";
        self.port
            .write_all(text.as_bytes())
            .map_err(|error| LabError::Monitor(format!("the guest's serial port: {error}")))
    }

    fn kill(&mut self) {
        // A process that is gone already is what is wanted.
        drop(self.process.kill());
    }

    fn judge(&self, status: ExitStatus, errors: &str, ended: &mut Ended) {
        if !ended.faults.is_empty() {
            return;
        }
        if status.code() == Some(exit_status(EXIT_SETUP_FAILED)) {
            ended.faults.push("the guest could not be set up".into());
        } else if let Some(signal) = status.signal() {
            ended.faults.push(format!("QEMU itself died of signal {signal}: {}", tail(errors, 4)));
        } else if status.code() != Some(exit_status(EXIT_DONE)) {
            ended.faults.push(format!("QEMU ended with {status}: the guest crashed, or was reset"));
        } else if !self.done {
            ended.faults.push("the guest powered off before it was done".into());
        }
    }
}

/// QEMU's command line.
fn command(start: &Start<'_>, port: &Path, monitor: &Path) -> Command {
    let mut command = Command::new(&start.qemu.program);
    command
        .args(start.machine.arguments(start.run))
        .args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
        .arg("-chardev")
        .arg(format!("socket,id=port,path={}", port.display()))
        .args(["-serial", "chardev:port", "-chardev"])
        .arg(format!("socket,id=monitor,path={}", monitor.display()))
        .args(["-mon", "chardev=monitor,mode=control"])
        .arg("-D")
        .arg(trace::path(start.run));
    for event in trace::EVENTS {
        command.args(["-trace", event]);
    }
    command.arg("-kernel").arg(start.kernel).arg("-initrd").arg(start.initramfs);
    command.arg("-append").arg(start.machine.kernel_line());
    command
}

/// Waits for QEMU to connect, or to end because it doesn't like its command line.
fn accept(listener: &UnixListener, process: &mut Child) -> Result<UnixStream> {
    listener.set_nonblocking(true).map_err(|error| LabError::Monitor(error.to_string()))?;
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).map_err(|error| LabError::Monitor(error.to_string()))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(LabError::Monitor(error.to_string())),
        }
        if let Ok(Some(status)) = process.try_wait() {
            return Err(LabError::Monitor(format!("it ended with {status}")));
        }
        if Instant::now() > deadline {
            return Err(LabError::Monitor("QEMU doesn't connect within 30 s".into()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn copy_console(
    mut from: impl Read + Send + 'static,
    to: &Path,
    echo: Echo,
    send: Sender<Event>,
) -> Result<()> {
    let mut file = File::create(to).map_err(LabError::io("create", to))?;
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(len) = from.read(&mut buffer)
            && len > 0
        {
            // A console that can't be kept is a console that misses the words that would have been faults; the exit
            // status still tells.
            drop(file.write_all(&buffer[..len]));
            if echo == Echo::Show {
                drop(std::io::stderr().write_all(&buffer[..len]));
            }
        }
        // Nobody listens once the guest has been killed.
        drop(send.send(Event::Closed));
    });
    Ok(())
}

fn forward_lines(port: UnixStream, echo: Echo, send: &Sender<Event>) {
    for text in BufReader::new(port).lines().map_while(std::result::Result::ok) {
        if echo == Echo::Show {
            drop(writeln!(std::io::stderr(), "{text}"));
        }
        if let Some(line) = Line::decode(&text)
            && send.send(Event::Line(line)).is_err()
        {
            return;
        }
    }
    drop(send.send(Event::Closed));
}

/// Words of the guest's console that mean a fault.
const CONSOLE_FAULTS: &[&str] = &[
    "Kernel panic",
    "Oops:",
    "BUG:",
    "general protection fault",
    "WARNING: CPU",
    "DMAR: [DMA",
    "DRHD: handling fault",
];

/// The part of a console that tells most: around its first fault, or the end.
pub(crate) fn telling_part(console: &str) -> String {
    let lines: Vec<&str> = console.lines().map(str::trim_end).collect();
    let end = lines.iter().position(|line| is_fault(line)).map_or(lines.len(), |at| at + 12).min(lines.len());
    lines[end.saturating_sub(40)..end].join("\n")
}

fn is_fault(line: &str) -> bool {
    CONSOLE_FAULTS.iter().any(|word| line.contains(word))
}

fn judge_words(console: &str, errors: &str, faults: &mut Vec<String>) {
    if let Some(line) = console.lines().find(|line| is_fault(line)) {
        faults.push(format!("the guest's console says: {}", line.trim()));
    }
    if let Some(line) = errors.lines().find(|line| line.contains("vtd_")) {
        faults.push(format!("QEMU's IOMMU says: {}", line.trim()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dma_fault_is_a_fault_in_whichever_log_it_shows() {
        let faults = |console: &str, errors: &str| {
            let mut faults = Vec::new();
            judge_words(console, errors, &mut faults);
            faults.len()
        };
        assert_eq!(faults("[ 1.0] DMAR: Host address width 48\n[ 2.0] DMAR: Intel(R) Virtualization", ""), 0);
        assert_eq!(faults("[ 3.1] DMAR: DRHD: handling fault status reg 2\n", ""), 1);
        assert_eq!(faults("[ 3.1] DMAR: [DMA Write NO_PASID] Request device [00:04.0]\n", ""), 1);
        assert_eq!(faults("", "qemu-system-x86_64: vtd_iommu_translate: detected translation failure"), 1);
        assert_eq!(faults("[ 3.1] Kernel panic - not syncing: sysrq triggered crash\n", ""), 1);
    }
}
