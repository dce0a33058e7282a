//! The controllers: whether there are any, and what each still needs before it can be opened.

use foliant_nvme_pci::PciFunction;

use super::finding::{Finding, Severity};
use super::{Subject, address_word};
use crate::bind::group_obstacles;
use crate::error::Error;

const AREA: &str = "controllers";

/// Whether there is anything to drive.
pub(super) fn check_presence(subject: &Subject<'_>) -> Option<Finding> {
    if !subject.controllers.is_empty() {
        return None;
    }
    let finding = Finding::blocks(
        AREA,
        "this machine shows no NVMe controller on PCI: add a drive, or on a virtual machine pass one through (a \
         virtio disk, or NVMe over fabrics, can't be driven from here). Until then emu: URIs do all but be fast",
    );
    Some(finding.run("lspci -nn -d ::0108"))
}

/// How one controller stands.
enum State {
    /// On vfio-pci.
    Ready,
    /// On the kernel's driver, or on none, and nobody uses it.
    Free,
    /// It can't be moved as things are.
    Kept(Vec<String>),
}

/// What each controller needs. One that can be opened is enough, unless one was asked for.
pub(super) fn check_state(subject: &Subject<'_>) -> Result<Vec<Finding>, Error> {
    let mut states = Vec::new();
    for function in &subject.controllers {
        states.push((function, state_of(subject, function)?));
    }
    let is_any_ready = states.iter().any(|(_, state)| matches!(state, State::Ready));
    let first_free = states.iter().position(|(_, state)| matches!(state, State::Free));
    let shortfall = if is_any_ready { Severity::Fine } else { Severity::Blocks };
    Ok(states
        .into_iter()
        .enumerate()
        .map(|(index, (function, state))| {
            let address = function.address;
            let model =
                function.kernel.as_ref().map(|kernel| format!(" ({})", kernel.model)).unwrap_or_default();
            match state {
                State::Ready => Finding::fine(AREA, format!("{address} is on vfio-pci")),
                State::Free => {
                    let mut says =
                        format!("{address}{model} is with {}, and nobody uses it", driver_of(function));
                    if function.iommu_group.is_none() {
                        says += "; it can be bound once an IOMMU watches it";
                    }
                    // One of several is enough.
                    let severity = if first_free == Some(index) { shortfall } else { Severity::Fine };
                    let finding = Finding::new(AREA, severity, says);
                    finding.run(format!("foliant bind {address}{}", owner_option(subject)))
                }
                State::Kept(reasons) => {
                    let severity = if first_free.is_some() { Severity::Fine } else { shortfall };
                    let says = format!(
                        "{address}{model} stays with {}: {}",
                        driver_of(function),
                        reasons.join("; ")
                    );
                    Finding::new(AREA, severity, says)
                }
            }
        })
        .collect())
}

fn state_of(subject: &Subject<'_>, function: &PciFunction) -> Result<State, Error> {
    let others = group_obstacles(subject.host, function)?;
    let mut reasons: Vec<String> = others
        .iter()
        .map(|(address, driver)| {
            format!(
                "{address} of the same IOMMU group has the driver {driver}; another slot may set them apart"
            )
        })
        .collect();
    if function.is_on_vfio() {
        return Ok(if reasons.is_empty() { State::Ready } else { State::Kept(reasons) });
    }
    if let Some(driver) = function.driver.as_ref().filter(|driver| *driver != "nvme") {
        reasons.push(format!("{driver} was put there by another program; give it back with that"));
    }
    let usage = subject.host.usage(function)?;
    reasons.extend(usage.uses.iter().map(|known| format!("{known} ({})", known.remedy())));
    reasons.extend(usage.doubts.iter().map(|doubt| format!("can't tell who uses it: {doubt}")));
    Ok(if reasons.is_empty() { State::Free } else { State::Kept(reasons) })
}

fn driver_of(function: &PciFunction) -> String {
    function.driver.as_deref().map_or("no driver".to_owned(), |driver| format!("the driver {driver}"))
}

fn owner_option(subject: &Subject<'_>) -> String {
    if subject.account.is_root() { String::new() } else { format!(" --owner {}", subject.account.name) }
}

/// What to do once nothing blocks.
pub(super) fn next(subject: &Subject<'_>) -> Vec<String> {
    let ready = subject.controllers.iter().find(|function| function.is_on_vfio());
    let uri = match ready {
        Some(function) if function.noiommu => format!("vfio-noiommu:{}", function.address),
        Some(function) => format!("vfio:{}", function.address),
        None => format!("vfio:{}", address_word(subject)),
    };
    let bind = match ready {
        Some(_) => None,
        None => Some(format!("foliant bind {}{}", address_word(subject), owner_option(subject))),
    };
    bind.into_iter().chain([format!("foliant identify {uri}"), format!("foliant bench {uri}")]).collect()
}
