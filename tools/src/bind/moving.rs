//! A function's way from one driver to another, and back again when it gets stuck.
//!
//! 1. `driver_override` names the only driver that may take the function; an empty line lets any driver that knows
//!    its ids take it.
//! 2. Its address in the old driver's `unbind` takes it from there.
//! 3. Its address in `drivers_probe` offers it to the drivers; the write succeeds whether or not one takes it, so the
//!    link `driver` is looked at.
//!
//! A program that is killed between two steps leaves the function without a driver; the same command, or the opposite
//! one, goes on from there.

use std::fs::File;
use std::path::PathBuf;

use foliant_nvme_pci::{Host, PciAddress, PciFunction};

use super::error::{BindError, PutBack};
use super::hands::Hands;

/// What clears an override.
const NO_OVERRIDE: &str = "\n";

/// A change of a function's driver.
pub(crate) struct Moving<'a> {
    host: &'a Host,
    address: PciAddress,
    from: Option<String>,
    override_before: Option<String>,
    to: &'static str,
    override_after: &'static str,
}

/// How far a move got, and so what has to be undone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reached {
    Start,
    Overridden,
    Unbound,
}

impl<'a> Moving<'a> {
    /// From whatever driver has the function to vfio-pci, and to no other.
    pub(crate) fn to_vfio(host: &'a Host, function: &PciFunction) -> Self {
        Self::new(host, function, "vfio-pci", "vfio-pci")
    }

    /// From whatever driver has the function to the kernel's NVMe driver, by the usual choice.
    pub(crate) fn to_kernel(host: &'a Host, function: &PciFunction) -> Self {
        Self::new(host, function, "nvme", NO_OVERRIDE)
    }

    fn new(host: &'a Host, function: &PciFunction, to: &'static str, override_after: &'static str) -> Self {
        Self {
            host,
            address: function.address,
            from: function.driver.clone(),
            override_before: function.driver_override.clone(),
            to,
            override_after,
        }
    }

    /// Does it. `claims` are held until the old driver has let go, so that nobody can begin to use the function
    /// meanwhile.
    pub(crate) fn carry_out(self, hands: &mut impl Hands, claims: Vec<File>) -> Result<(), BindError> {
        let mut reached = Reached::Start;
        match self.forwards(hands, claims, &mut reached) {
            Ok(()) => Ok(()),
            Err(stuck) => {
                let put_back = self.put_back(hands, reached);
                Err(match stuck {
                    Stuck::Write(path, value, source) => BindError::Write { path, value, source, put_back },
                    Stuck::NotTaken => {
                        BindError::NotTaken { address: self.address, driver: self.to, put_back }
                    }
                })
            }
        }
    }

    fn forwards(
        &self,
        hands: &mut impl Hands,
        claims: Vec<File>,
        reached: &mut Reached,
    ) -> Result<(), Stuck> {
        self.write(hands, self.override_path(), self.override_after)?;
        *reached = Reached::Overridden;
        if let Some(driver) = &self.from {
            self.write(hands, self.unbind_path(driver), &self.address.to_string())?;
        }
        *reached = Reached::Unbound;
        drop(claims);
        self.write(hands, self.probe_path(), &self.address.to_string())?;
        if self.driver().as_deref() == Some(self.to) { Ok(()) } else { Err(Stuck::NotTaken) }
    }

    fn put_back(&self, hands: &mut impl Hands, reached: Reached) -> PutBack {
        if reached == Reached::Start {
            return PutBack::Unchanged;
        }
        let before = self.override_before.as_deref().unwrap_or(NO_OVERRIDE);
        let mut done = self.write(hands, self.override_path(), before).is_ok();
        if reached == Reached::Unbound && self.from.is_some() {
            done &= self.write(hands, self.probe_path(), &self.address.to_string()).is_ok();
        }
        let (found, none) = (self.driver(), || "none".to_owned());
        if done && found == self.from {
            PutBack::Done { driver: found.unwrap_or_else(none) }
        } else {
            PutBack::Failed { address: self.address, wanted: self.from.clone().unwrap_or_else(none), found }
        }
    }

    fn write(&self, hands: &mut impl Hands, path: PathBuf, value: &str) -> Result<(), Stuck> {
        hands.write(&path, value).map_err(|source| Stuck::Write(path, value.trim().to_owned(), source))
    }

    fn driver(&self) -> Option<String> {
        self.host.function(self.address).ok()?.driver
    }

    fn override_path(&self) -> PathBuf {
        self.host.path(format!("sys/bus/pci/devices/{}/driver_override", self.address))
    }

    fn unbind_path(&self, driver: &str) -> PathBuf {
        self.host.path(format!("sys/bus/pci/drivers/{driver}/unbind"))
    }

    fn probe_path(&self) -> PathBuf {
        self.host.path("sys/bus/pci/drivers_probe")
    }
}

/// Where a move got stuck.
enum Stuck {
    Write(PathBuf, String, std::io::Error),
    NotTaken,
}
