//! `foliant bind` and `foliant unbind`: a controller on its way from the kernel to vfio-pci and back.
//!
//! A controller leaves the kernel only when nobody uses it, for certain. What is in doubt is refused; and since
//! somebody could begin between the look and the deed, its block devices are claimed exclusively first and kept until
//! the kernel's driver has let go. Whatever fails on the way is undone.

mod error;
mod hands;
mod moving;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use foliant_nvme_pci::{Host, PciAddress, PciFunction};
use serde::Serialize;

pub(crate) use self::error::BindError;
use self::error::PutBack;
use self::hands::{Hands, LiveHands};
use self::moving::Moving;
use crate::account::Account;
use crate::cli::{BindOptions, UnbindOptions};
use crate::error::Error;
use crate::stdout::{Format, Report, write_report};
use crate::table::Table;
use crate::verdict::Verdict;

/// The switch by which vfio takes functions that no IOMMU watches.
const NOIOMMU_SWITCH: &str = "sys/module/vfio/parameters/enable_unsafe_noiommu_mode";
const NOIOMMU_WARNING: &str = "no IOMMU: a bug in the database, the engine or the drive can now write anywhere in \
     this machine's memory, the kernel's included; the kernel marks itself tainted";

/// Drivers that may have other functions of a group while VFIO uses it: VFIO's own, and those that do no DMA.
const HARMLESS_DRIVERS: [&str; 3] = ["vfio-pci", "pcieport", "pci-stub"];

pub(crate) fn run_bind(options: &BindOptions) -> Result<Verdict, Error> {
    let bound = bind(&Host::live(), &mut LiveHands, options)?;
    write_report(&bound, Format::of(options.json))?;
    Ok(Verdict::Passed)
}

pub(crate) fn run_unbind(options: &UnbindOptions) -> Result<Verdict, Error> {
    let unbound = unbind(&Host::live(), &mut LiveHands, options.address)?;
    write_report(&unbound, Format::of(options.json))?;
    Ok(Verdict::Passed)
}

/// Where a controller is now.
#[derive(Debug, Serialize)]
struct Moved {
    address: String,
    driver: &'static str,
    /// Whether it was there already.
    unchanged: bool,
    /// The node that a program opens, and the newer one where the kernel has it.
    group_node: Option<PathBuf>,
    cdev: Option<PathBuf>,
    owner: Option<String>,
    warning: Option<&'static str>,
    /// What to do next.
    next: String,
}

fn bind(host: &Host, hands: &mut impl Hands, options: &BindOptions) -> Result<Moved, Error> {
    let function = nvme_function(host, options.address)?;
    let owner = options.owner.as_deref().map(|name| Account::find(host, name)).transpose()?;
    if let (true, Some(user)) = (options.noiommu || function.noiommu, &owner) {
        return Err(BindError::OwnerWithoutIommu { user: user.name.clone() }.into());
    }
    let unchanged = function.is_on_vfio();
    if !unchanged {
        refuse_bind(host, &function, options.noiommu)?;
        take_from_kernel(host, hands, &function, options.noiommu)?;
    } else if !function.noiommu {
        ensure_iommu_backend(host, hands)?;
    }
    let function = host.function(options.address)?;
    if let Some(user) = &owner {
        give_nodes(hands, &function, user)?;
    }
    let scheme = if function.noiommu { "vfio-noiommu" } else { "vfio" };
    Ok(Moved {
        address: function.address.to_string(),
        driver: "vfio-pci",
        unchanged,
        group_node: function.group_node().map(ToOwned::to_owned),
        next: format!("foliant identify {scheme}:{}", function.address),
        warning: function.noiommu.then_some(NOIOMMU_WARNING),
        cdev: function.vfio_cdev,
        owner: owner.map(|user| user.name),
    })
}

fn unbind(host: &Host, hands: &mut impl Hands, address: PciAddress) -> Result<Moved, Error> {
    let function = nvme_function(host, address)?;
    let unchanged = function.driver.as_deref() == Some("nvme");
    if !unchanged {
        if let Some(driver) = function.driver.as_ref().filter(|_| !function.is_on_vfio()) {
            return Err(BindError::ForeignDriver { address, driver: driver.clone() }.into());
        }
        refuse_in_use(host, &function)?;
        refuse_open_group(host, hands, &function)?;
        ensure_driver(host, hands, "nvme", "nvme")?;
        Moving::to_kernel(host, &function).carry_out(hands, Vec::new())?;
    }
    Ok(Moved {
        address: address.to_string(),
        driver: "nvme",
        unchanged,
        group_node: None,
        cdev: None,
        owner: None,
        warning: None,
        next: "foliant devices".to_owned(),
    })
}

fn nvme_function(host: &Host, address: PciAddress) -> Result<PciFunction, Error> {
    let function = host.function(address)?;
    if !function.is_nvme() {
        return Err(BindError::NotNvme { address, class: function.class }.into());
    }
    Ok(function)
}

/// Refuses whatever speaks against giving a function to vfio-pci, changing nothing.
fn refuse_bind(host: &Host, function: &PciFunction, noiommu: bool) -> Result<(), Error> {
    let address = function.address;
    if let Some(driver) = function.driver.as_ref().filter(|driver| *driver != "nvme") {
        return Err(BindError::ForeignDriver { address, driver: driver.clone() }.into());
    }
    // First of all, since it's what matters most.
    refuse_in_use(host, function)?;
    match (function.iommu_group.filter(|_| !function.noiommu), noiommu) {
        (Some(group), true) => Err(BindError::NoiommuNotNeeded { address, group }.into()),
        (None, false) => Err(BindError::NoGroup { address }.into()),
        (None, true) => Ok(()),
        (Some(group), false) => match group_obstacles(host, function)? {
            others if others.is_empty() => Ok(()),
            others => Err(BindError::GroupShared { address, group, others }.into()),
        },
    }
}

/// The other functions of a group that keep VFIO from opening it, with their drivers.
pub(crate) fn group_obstacles(
    host: &Host,
    function: &PciFunction,
) -> Result<Vec<(PciAddress, String)>, Error> {
    let Some(group) = function.iommu_group else { return Ok(Vec::new()) };
    let others = host.group_members(group)?.into_iter().filter_map(|other| {
        let driver = other.driver.clone()?;
        let harmless = other.address == function.address
            || other.is_bridge()
            || HARMLESS_DRIVERS.contains(&driver.as_str());
        (!harmless).then_some((other.address, driver))
    });
    Ok(others.collect())
}

fn refuse_in_use(host: &Host, function: &PciFunction) -> Result<(), Error> {
    let address = function.address;
    let usage = host.usage(function)?;
    if !usage.uses.is_empty() {
        return Err(BindError::InUse { address, uses: usage.uses }.into());
    }
    if !usage.doubts.is_empty() {
        return Err(BindError::Doubtful { address, doubts: usage.doubts }.into());
    }
    Ok(())
}

/// The kernel lets a VFIO group be opened once. Taking a function away while a program has it open would wait for
/// that program, without end and without a way to interrupt.
fn refuse_open_group(host: &Host, hands: &mut impl Hands, function: &PciFunction) -> Result<(), Error> {
    let Some(node) = function.group_node().filter(|_| function.is_on_vfio()) else { return Ok(()) };
    match hands.open_group(node) {
        Err(error) if error.kind() == ErrorKind::ResourceBusy => {
            // Somebody has opened it since the look at who uses it.
            refuse_in_use(host, function)?;
            Err(BindError::Claimed { address: function.address, node: node.to_owned() }.into())
        }
        // A node that isn't there, or not for us, tells nothing; the look at who uses it has answered already.
        _ => Ok(()),
    }
}

fn take_from_kernel(
    host: &Host,
    hands: &mut impl Hands,
    function: &PciFunction,
    noiommu: bool,
) -> Result<(), Error> {
    ensure_driver(host, hands, "vfio-pci", "vfio-pci")?;
    if !noiommu {
        ensure_iommu_backend(host, hands)?;
    }
    let switch = host.path(NOIOMMU_SWITCH);
    let before = match noiommu {
        true => Some(
            std::fs::read_to_string(&switch)
                .map_err(|_| BindError::NoNoiommu { parameter: switch.clone() })?,
        ),
        false => None,
    };
    let claims = claim_namespaces(host, hands, function)?;
    // Once more, now that nobody can claim it any more: a process may have opened it since.
    refuse_in_use(host, function)?;
    let Some(before) = before else {
        return Ok(Moving::to_vfio(host, function).carry_out(hands, claims)?);
    };
    set_noiommu(hands, &switch, "Y")?;
    Moving::to_vfio(host, function).carry_out(hands, claims).or_else(|error| {
        set_noiommu(hands, &switch, before.trim())?;
        Err(error.into())
    })
}

fn set_noiommu(hands: &mut impl Hands, switch: &Path, value: &str) -> Result<(), BindError> {
    hands.write(switch, value).map_err(|source| BindError::Write {
        path: switch.to_owned(),
        value: value.to_owned(),
        source,
        put_back: PutBack::Unchanged,
    })
}

/// Loads what maps memory for a group. `modprobe vfio-pci` brings it along, but not everybody's modprobe does. A
/// kernel that has the newer interface instead does without.
fn ensure_iommu_backend(host: &Host, hands: &mut impl Hands) -> Result<(), BindError> {
    const MODULE: &str = "vfio_iommu_type1";
    if host.path("sys/module").join(MODULE).exists() {
        return Ok(());
    }
    match hands.load_module(MODULE) {
        Err(reason) if !host.path("dev/iommu").exists() => Err(BindError::Module { module: MODULE, reason }),
        _ => Ok(()),
    }
}

/// Loads `module` where the driver that it has isn't registered yet.
fn ensure_driver(
    host: &Host,
    hands: &mut impl Hands,
    driver: &str,
    module: &'static str,
) -> Result<(), BindError> {
    let registered = host.path("sys/bus/pci/drivers").join(driver);
    if registered.exists() {
        return Ok(());
    }
    hands.load_module(module).map_err(|reason| BindError::Module { module, reason })?;
    if registered.exists() {
        return Ok(());
    }
    let reason = format!("it was loaded, but {} isn't there", registered.display());
    Err(BindError::Module { module, reason })
}

/// Opens all block devices of a function exclusively.
fn claim_namespaces(host: &Host, hands: &mut impl Hands, function: &PciFunction) -> Result<Vec<File>, Error> {
    let claim = |node: PathBuf| match hands.claim(&node) {
        Ok(file) => Ok(file),
        Err(source) if source.kind() == ErrorKind::ResourceBusy => {
            Err(BindError::Claimed { address: function.address, node }.into())
        }
        Err(source) => Err(BindError::Claim { node, source }.into()),
    };
    host.usage(function)?.block_nodes.into_iter().map(claim).collect()
}

fn give_nodes(hands: &mut impl Hands, function: &PciFunction, user: &Account) -> Result<(), BindError> {
    hands.settle();
    for node in function.group_node().into_iter().chain(function.vfio_cdev.as_deref()) {
        hands.give(node, user.user_id).map_err(|source| BindError::Owner {
            address: function.address,
            driver: "vfio-pci",
            node: node.to_owned(),
            user: user.name.clone(),
            source,
        })?;
    }
    Ok(())
}

impl Report for Moved {
    fn table(&self) -> Table {
        let state = if self.unchanged { "was on" } else { "is now on" };
        let already = if self.unchanged { " already" } else { "" };
        let mut table =
            Table::default().section(format!("{} {state} {}{already}", self.address, self.driver));
        let owner = self.owner.as_deref().map(|user| format!(", now of {user}")).unwrap_or_default();
        for (name, node) in [("group", &self.group_node), ("device", &self.cdev)] {
            if let Some(node) = node {
                table = table.row(name, format!("{}{owner}", node.display()));
            }
        }
        if let Some(warning) = self.warning {
            table = table.line(format!("warning: {warning}"));
        }
        table.closing(format!("next: {}", self.next))
    }
}
