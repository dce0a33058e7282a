//! PCI functions as the host's sysfs, procfs and device nodes show them, NVMe controllers above all: where one is,
//! which driver has it, its IOMMU group, its namespaces, and who uses them.
//!
//! The crate reads. It never writes to sysfs, binds nothing and loads nothing; who moves a controller to another
//! driver (`foliant bind`) asks here first. It knows neither VFIO's ioctls nor the NVMe driver.
//!
//! Everything starts at a [`Host`]: the running one, or a directory that looks like one, which is what tests use.
//! [`PciFunction`] is a snapshot: sysfs changes beneath it, so a snapshot is taken anew before each decision.

#![warn(missing_docs)]

mod address;
mod error;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
mod function;
mod host;
#[cfg(test)]
mod host_tests;
mod kernel;
mod mounts;
mod node;
mod processes;
mod stack;
mod usage;
#[cfg(test)]
mod usage_tests;

pub use address::{AddressError, PciAddress};
pub use error::PciError;
pub use function::PciFunction;
pub use host::Host;
pub use kernel::{KernelController, KernelNamespace};
pub use processes::Process;
pub use usage::{Doubt, Usage, Use};
