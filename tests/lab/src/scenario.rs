//! A scenario is a claim: what must hold, the guest's job that shows it, and what the host looks at afterwards.
//!
//! Claims that need the same machine share a boot, since the boot is most of the time. A fault of the guest itself (a
//! panic, a DMA fault, a time limit) fails every claim of its boot: nobody can say whose it was.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use foliant_guest::pattern::{self, Change};
use foliant_guest::protocol::{BootPlan, FOLIANT, JobPlan, Module, PLAN_PATH};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::cache;
use crate::drive::Image;
use crate::error::{LabError, Result};
use crate::guest::{self, Attend, Echo, Start};
use crate::guest_programs::{self, GuestProgram};
use crate::initramfs::Initramfs;
use crate::kernel::{self, GuestKernel};
use crate::machine::Machine;
use crate::qemu;
use crate::server::ForgetfulServer;
use crate::trace::{self, CommandTrace};

/// A machine, and the claims that are shown on it in one boot.
pub struct Boot {
    /// Its name.
    pub name: &'static str,
    /// The machine.
    pub machine: Machine,
    /// Functions that vfio-pci gets before the first job, as `0000:00:04.0`.
    pub bind: Vec<&'static str>,
    /// Files that the guest gets beside its first process.
    pub files: Vec<GuestFile>,
    /// The claims, in the order in which their jobs run.
    pub claims: Vec<Claim>,
    /// What the host does when a job asks.
    pub attend: Attend,
    /// How long the jobs may take altogether.
    pub limit: Duration,
}

/// A file in the guest's initramfs.
#[derive(Clone, Debug)]
pub enum GuestFile {
    /// A program of this workspace, at a path in the guest (without the leading slash).
    Program(GuestProgram, &'static str),
    /// A file of the host, at a path in the guest.
    Host(PathBuf, String),
}

/// A claim.
#[derive(Clone)]
pub struct Claim {
    /// Its name: what is claimed.
    pub name: &'static str,
    /// What it proves, in a sentence.
    pub proves: &'static str,
    /// The guest's job.
    pub job: &'static str,
    /// The job's arguments.
    pub arguments: Value,
    /// What the host checks when the guest is off; it panics where something is wrong, as tests do.
    pub check: fn(&Evidence<'_>),
}

/// What the host has to judge a claim by, after power-off.
pub struct Evidence<'a> {
    claim: &'a str,
    arguments: &'a Value,
    facts: &'a [(String, String, Value)],
    /// The machine.
    pub machine: &'a Machine,
    /// The run's directory, with the drives' images and logs.
    pub run: &'a Path,
    /// What QEMU's controllers were told, by all jobs of the boot.
    pub trace: &'a CommandTrace,
}

/// What came of a boot.
#[derive(Debug)]
pub struct Report {
    /// Each claim's verdict, in their order.
    pub verdicts: Vec<(&'static str, Verdict)>,
    /// Facts of all jobs, in their order: claim, name, value.
    pub facts: Vec<(String, String, Value)>,
    /// Seconds from QEMU's start until the guest was ready.
    pub ready_s: f64,
    /// Seconds from QEMU's start until it had ended.
    pub total_s: f64,
    /// Seconds of processor time that QEMU had.
    pub cpu_s: f64,
    /// The run's directory, if its files were kept.
    pub run: PathBuf,
    /// What it ran on: QEMU's version and the guest kernel's release.
    pub platform: String,
}

/// Seconds that a boot may take, from power-on to power-off, on a machine that does nothing else.
pub const BOOT_S_MAX: f64 = 10.0;

/// A claim's verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It holds.
    Holds,
    /// It doesn't, or could not be shown: why, with the end of the guest's console.
    Fails(String),
}

/// How a boot is run.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunOptions {
    /// Whether everything that the guest says is shown.
    pub echo: Echo,
    /// Whether the run's files stay.
    pub files: RunFiles,
}

/// Whether a run's images and logs stay after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RunFiles {
    /// They go.
    #[default]
    Remove,
    /// They stay; where, is told.
    Keep,
}

impl Boot {
    /// A boot of `machine` without claims.
    #[must_use]
    pub fn new(name: &'static str, machine: Machine) -> Self {
        Self {
            name,
            machine,
            bind: Vec::new(),
            files: Vec::new(),
            claims: Vec::new(),
            attend: |_, what, _| Err(format!("this boot's host doesn't know how to do {what:?}")),
            limit: Duration::from_secs(120),
        }
    }

    /// The same with functions that vfio-pci gets.
    #[must_use]
    pub fn bind(mut self, addresses: &[&'static str]) -> Self {
        self.bind.extend(addresses);
        self
    }

    /// The same with the command `foliant` in the guest.
    #[must_use]
    pub fn with_foliant(mut self) -> Self {
        self.files.push(GuestFile::Program(GuestProgram::Foliant, FOLIANT.trim_start_matches('/')));
        self
    }

    /// The same with a claim more.
    #[must_use]
    pub fn claim(mut self, claim: Claim) -> Self {
        self.claims.push(claim);
        self
    }
}

impl Report {
    /// Says so if the boot took longer than it should. That is a warning and no failure: other work on the machine makes
    /// any boot long.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        let Self { total_s, cpu_s, .. } = self;
        (*total_s > BOOT_S_MAX).then(|| {
            format!(
                "warning: this boot took {total_s:.1} s, and on an idle machine none should take more than {BOOT_S_MAX} s; \
                 QEMU had {cpu_s:.1} s of processor time, the rest went to the guest's sleep and to other work on this machine"
            )
        })
    }
}

impl Claim {
    /// A claim that the guest's job alone can judge.
    #[must_use]
    pub fn new(name: &'static str, proves: &'static str, job: &'static str, arguments: Value) -> Self {
        Self { name, proves, job, arguments, check: |_| {} }
    }

    /// The same with a check on the host after power-off.
    #[must_use]
    pub fn check(mut self, check: fn(&Evidence<'_>)) -> Self {
        self.check = check;
        self
    }
}

impl Evidence<'_> {
    /// The argument called `name` that the claim's job was given.
    ///
    /// # Panics
    /// When there is none, or it isn't a `T`.
    #[must_use]
    pub fn argument<T: DeserializeOwned>(&self, name: &str) -> T {
        let value = &self.arguments[name];
        serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{name:?} is {value}: {error}"))
    }

    /// The last fact called `name` that the claim's job told.
    ///
    /// # Panics
    /// When there is none, or it isn't a `T`.
    #[must_use]
    pub fn fact<T: DeserializeOwned>(&self, name: &str) -> T {
        let mut all = self.facts(name);
        all.pop().unwrap_or_else(|| panic!("the job told no {name:?}"))
    }

    /// All facts called `name` that the claim's job told.
    ///
    /// # Panics
    /// When one isn't a `T`.
    #[must_use]
    pub fn facts<T: DeserializeOwned>(&self, name: &str) -> Vec<T> {
        let of_name = self.facts.iter().filter(|(claim, given, _)| claim == self.claim && given == name);
        let read = |(_, _, value): &(_, _, Value)| {
            serde_json::from_value(value.clone())
                .unwrap_or_else(|error| panic!("{name:?} is {value}: {error}"))
        };
        of_name.map(read).collect()
    }

    /// The image of the drive called `name` holds the changes that the job told of, and zeroes elsewhere.
    ///
    /// # Panics
    /// Where it doesn't, with the first byte that differs.
    pub fn image_is_as_told(&self, name: &str) {
        self.image_is_as_told_of(name, "changes");
    }

    /// As [`image_is_as_told`](Self::image_is_as_told), where the job told of several drives, by facts of other names.
    ///
    /// # Panics
    /// As there.
    pub fn image_is_as_told_of(&self, name: &str, fact: &str) {
        let changes: Vec<Change> = self.fact(fact);
        let end = changes.iter().map(|change| change.offset + change.len_bytes).max().unwrap_or(0);
        // What lies behind the last change must be untouched as well.
        let len_bytes = (end as usize + (1 << 20)).next_multiple_of(4096);
        let (found, expected) = (self.image(name, 0, len_bytes), pattern::after(&changes, len_bytes));
        if let Some(at) = (0..len_bytes).find(|&at| found[at] != expected[at]) {
            panic!("byte {at:#x} of {name} is {:#04x} and should be {:#04x}", found[at], expected[at]);
        }
    }

    /// `len_bytes` bytes at `offset` of the image of the drive called `name`.
    ///
    /// # Panics
    /// When they can't be read.
    #[must_use]
    pub fn image(&self, name: &str, offset: u64, len_bytes: usize) -> Vec<u8> {
        use std::os::unix::fs::FileExt;
        let path = self.machine.drive_named(name).image_path(self.run);
        let mut bytes = vec![0; len_bytes];
        std::fs::File::open(&path)
            .and_then(|file| file.read_exact_at(&mut bytes, offset))
            .unwrap_or_else(|error| panic!("{} at {offset}: {error}", path.display()));
        bytes
    }
}

/// Runs a boot: builds what it needs, runs the guest, and judges each claim.
///
/// # Errors
/// When the lab can't be set up; what the guest does wrong is in the [`Report`].
pub fn run(boot: &Boot, options: RunOptions) -> Result<Report> {
    let qemu = qemu::qemu()?;
    let kernel = kernel::kernel(boot.machine.kernel)?;
    let runs = cache::directory().join("runs");
    std::fs::create_dir_all(&runs).map_err(LabError::io("create", &runs))?;
    let prefix = format!("{}-", boot.name);
    let mut run = tempfile::Builder::new();
    run.prefix(&prefix).disable_cleanup(options.files == RunFiles::Keep);
    let run = run.tempdir_in(&runs).map_err(LabError::io("create a directory in", &runs))?;
    let run = run.path();
    for drive in &boot.machine.drives {
        drive.create(run)?;
    }
    let with_server = boot.machine.drives.iter().filter(|drive| drive.image == Image::ForgetfulServer);
    let servers = with_server.map(|drive| ForgetfulServer::start(drive, run)).collect::<Result<Vec<_>>>()?;
    let initramfs = run.join("initramfs");
    write_initramfs(boot, &kernel, &initramfs)?;
    let ended = guest::run(
        &Start {
            qemu: &qemu,
            kernel: &kernel.image,
            initramfs: &initramfs,
            machine: &boot.machine,
            run,
            servers: &servers,
            limit: boot.limit,
            echo: options.echo,
        },
        boot.attend,
    )?;
    let trace = CommandTrace::read(&trace::path(run))?;
    let verdicts = boot.claims.iter().map(|claim| {
        let evidence = Evidence {
            claim: claim.name,
            arguments: &claim.arguments,
            facts: &ended.facts,
            machine: &boot.machine,
            run,
            trace: &trace,
        };
        (claim.name, judge(claim, &ended, &evidence))
    });
    Ok(Report {
        verdicts: verdicts.collect(),
        run: run.to_owned(),
        ready_s: ended.ready_s,
        total_s: ended.total_s,
        cpu_s: ended.cpu_s,
        platform: format!("QEMU {}.{}, Linux {}", qemu.version.0, qemu.version.1, kernel.release),
        facts: ended.facts,
    })
}

fn judge(claim: &Claim, ended: &guest::Ended, evidence: &Evidence<'_>) -> Verdict {
    let told = ended.verdicts.iter().find(|(name, _)| name == claim.name).map(|(_, failure)| failure);
    let mut reasons = ended.faults.clone();
    match told {
        None => reasons.push("its job did not come to an end".into()),
        Some(Some(failure)) => reasons.push(format!("in the guest: {failure}")),
        Some(None) if reasons.is_empty() => reasons.extend(check(claim, evidence)),
        Some(None) => {}
    }
    if reasons.is_empty() {
        return Verdict::Holds;
    }
    let console = guest::telling_part(&ended.console);
    Verdict::Fails(format!("{}\n--- the guest's console ---\n{console}", reasons.join("\n")))
}

/// Runs the host's check; returns what it panicked with.
fn check(claim: &Claim, evidence: &Evidence<'_>) -> Option<String> {
    let panic = catch_unwind(AssertUnwindSafe(|| (claim.check)(evidence))).err()?;
    let words = panic.downcast_ref::<String>().cloned();
    let words = words.or_else(|| panic.downcast_ref::<&str>().map(|words| (*words).to_owned()));
    Some(format!("on the host: {}", words.unwrap_or_else(|| "a panic without words".into())))
}

fn write_initramfs(boot: &Boot, kernel: &GuestKernel, path: &Path) -> Result<()> {
    let mut archive = Initramfs::create(path)?;
    archive.add("init", &guest_programs::build(GuestProgram::Init)?)?;
    let mut modules = Vec::new();
    for (number, module) in kernel.modules.iter().enumerate() {
        let inside = format!("lab/modules/{number}.ko");
        archive.add(&inside, &module.path)?;
        modules.push(Module { path: format!("/{inside}"), parameters: module.parameters.clone() });
    }
    for file in &boot.files {
        match file {
            GuestFile::Program(program, inside) => archive.add(inside, &guest_programs::build(*program)?)?,
            GuestFile::Host(host, inside) => archive.add(inside, host)?,
        }
    }
    let job = |claim: &Claim| JobPlan {
        claim: claim.name.into(),
        job: claim.job.into(),
        arguments: claim.arguments.clone(),
    };
    let plan = BootPlan {
        modules,
        hugepages: boot.machine.hugepages,
        bind: boot.bind.iter().map(|address| (*address).to_owned()).collect(),
        jobs: boot.claims.iter().map(job).collect(),
    };
    let plan = serde_json::to_vec(&plan).expect("a plan is plain data");
    archive.add_bytes(PLAN_PATH.trim_start_matches('/'), &plan)?;
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_of_more_than_ten_seconds_is_warned_of() {
        let report = |total_s| Report {
            verdicts: Vec::new(),
            facts: Vec::new(),
            ready_s: 3.0,
            total_s,
            cpu_s: 4.25,
            run: PathBuf::new(),
            platform: String::new(),
        };
        assert_eq!(report(9.9).warning(), None);
        let warning = report(10.4).warning().unwrap();
        assert!(warning.contains("took 10.4 s") && warning.contains("4.2 s of processor time"), "{warning}");
    }
}
