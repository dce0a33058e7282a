//! `foliant doctor`: what this machine lacks to drive NVMe hardware, each shortfall with the command that mends it.
//!
//! Each area is a module whose `check` looks at a [`Subject`] and returns [`Finding`]s; none changes anything. The
//! areas stand in the order in which things have to be set up, so whoever follows the findings from top to bottom
//! ends at a device that works.

mod boot;
mod controllers;
mod finding;
mod iommu;
mod memory;
mod modules;
mod numa;
mod permissions;
mod processors;
#[cfg(test)]
mod tests;

use foliant_nvme_pci::{Host, PciFunction};
use serde::Serialize;

use self::finding::{Finding, Severity};
use crate::account::Account;
use crate::bind::BindError;
use crate::cli::DoctorOptions;
use crate::error::Error;
use crate::size::ByteSize;
use crate::stdout::{Format, Report, write_report};
use crate::table::Table;
use crate::verdict::Verdict;

pub(crate) fn run(options: &DoctorOptions) -> Result<Verdict, Error> {
    let host = Host::live();
    let examination = examine(&Subject::new(&host, options)?)?;
    write_report(&examination, Format::of(options.json))?;
    Ok(examination.verdict)
}

/// What is examined: a host, for a user and a cache, and the controllers that matter.
struct Subject<'a> {
    host: &'a Host,
    account: Account,
    /// Whether the account is that of the calling process.
    is_own_account: bool,
    cache: ByteSize,
    /// The controller asked for, or all there are.
    controllers: Vec<PciFunction>,
    /// Whether one was asked for by address.
    is_one_asked_for: bool,
}

impl<'a> Subject<'a> {
    fn new(host: &'a Host, options: &DoctorOptions) -> Result<Self, Error> {
        let controllers = match options.device {
            None => host.nvme_functions().or_else(|error| match error {
                // A machine without PCI is one without controllers; the rest can be examined all the same.
                foliant_nvme_pci::PciError::NoBus { .. } => Ok(Vec::new()),
                error => Err(error),
            })?,
            Some(address) => {
                let function = host.function(address)?;
                if !function.is_nvme() {
                    return Err(BindError::NotNvme { address, class: function.class }.into());
                }
                vec![function]
            }
        };
        let own = Account::current(host)?;
        let account = match &options.user {
            Some(name) => Account::find(host, name)?,
            None => own.clone(),
        };
        Ok(Self {
            host,
            is_own_account: account.user_id == own.user_id,
            account,
            cache: options.cache,
            controllers,
            is_one_asked_for: options.device.is_some(),
        })
    }

    /// The text of a file below the root; `None` where it can't be read.
    fn text(&self, below_root: impl AsRef<std::path::Path>) -> Option<String> {
        let bytes = std::fs::read(self.host.path(below_root)).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    fn exists(&self, below_root: impl AsRef<std::path::Path>) -> bool {
        self.host.path(below_root).exists()
    }

    /// The names in a directory below the root, sorted; none where it can't be read.
    fn names(&self, below_root: impl AsRef<std::path::Path>) -> Vec<String> {
        let listing = std::fs::read_dir(self.host.path(below_root)).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            listing.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Whether a controller is used, or the only ones there are could be used, without an IOMMU.
    fn uses_noiommu(&self) -> bool {
        self.controllers.iter().any(|function| function.noiommu)
    }
}

/// The address of the only controller, or a word in its place, for a command that is to be typed.
fn address_word(subject: &Subject<'_>) -> String {
    match &subject.controllers[..] {
        [only] => only.address.to_string(),
        _ => "ADDRESS".to_owned(),
    }
}

#[derive(Debug, Serialize)]
struct Examination {
    user: String,
    cache_bytes: ByteSize,
    controllers: Vec<String>,
    findings: Vec<Finding>,
    /// Failed when something blocks.
    verdict: Verdict,
    /// What to do once nothing blocks.
    next: Vec<String>,
}

fn examine(subject: &Subject<'_>) -> Result<Examination, Error> {
    let mut findings = Vec::new();
    findings.extend(controllers::check_presence(subject));
    findings.extend(iommu::check(subject));
    findings.extend(modules::check(subject));
    findings.extend(memory::check_hugepages(subject));
    findings.extend(memory::check_transparent(subject));
    findings.extend(memory::check_locked(subject));
    findings.extend(processors::check(subject));
    findings.extend(numa::check(subject));
    findings.extend(controllers::check_state(subject)?);
    findings.extend(permissions::check(subject));
    let blocks = findings.iter().filter(|finding| finding.severity == Severity::Blocks).count();
    Ok(Examination {
        user: subject.account.name.clone(),
        cache_bytes: subject.cache,
        controllers: subject.controllers.iter().map(|function| function.address.to_string()).collect(),
        verdict: if blocks == 0 { Verdict::Passed } else { Verdict::Failed },
        next: controllers::next(subject),
        findings,
    })
}

impl Report for Examination {
    fn table(&self) -> Table {
        let mut table = Table::default();
        let mut area = "";
        for finding in &self.findings {
            if finding.area != area {
                area = finding.area;
                table = table.section(area);
            }
            table = finding.lines().into_iter().fold(table, Table::line);
        }
        let count = |severity| self.findings.iter().filter(|finding| finding.severity == severity).count();
        let (blocks, slows) = (count(Severity::Blocks), count(Severity::Slows));
        table = table.closing(format!(
            "For {} with a cache of {}: {blocks} blocking, {slows} that cost speed or safety.",
            self.user, self.cache_bytes
        ));
        table = match self.verdict {
            Verdict::Passed => table.closing("Nothing blocks. Next:"),
            Verdict::Failed => table.closing(
                "Mend what blocks from top to bottom, as root, and run foliant doctor again. In the end:",
            ),
        };
        self.next.iter().fold(table, |table, command| table.closing(format!("  $ {command}")))
    }
}
