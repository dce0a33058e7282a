//! The guest lab: the VFIO path, run for real on every machine that can run QEMU.
//!
//! No hardware is needed: QEMU's software CPU boots a distribution kernel with an emulated IOMMU and NVMe controllers;
//! in it a static program of ours runs jobs over VFIO, and the host looks at what came of them: in the image files, in
//! QEMU's own trace of the commands that its controllers got, and in the logs.
//!
//! ```text
//!  host                                            guest
//!  scenario ─► machine ─► QEMU's command line      kernel ─► /init (crate foliant-guest)
//!           ─► initramfs: init, modules, plan               modules, hugepages, vfio-pci
//!  guest ◄── lines: facts, questions, verdicts ──── jobs, one a claim
//!        ──► answers (unplug, cut the power, …)     power-off by an exit status of its own
//!  checks: images, trace, logs
//! ```
//!
//! [`scenario`] says what a scenario is, [`scenarios`] has them all. The lab never skips: what can't be set up is an
//! error, and a guest that ends in any way but its own is a failure.

pub mod bench;
mod cache;
mod command;
mod drive;
mod error;
mod guest;
mod guest_programs;
mod host_load;
mod initramfs;
mod kernel;
mod kernel_modules;
mod machine;
mod packages;
mod promises;
mod qemu;
mod qmp;
pub mod scenario;
pub mod scenarios;
mod server;
pub mod shell;
mod trace;
mod volatile;
mod write_log;

pub use drive::{Access, Content, Discard, Drive, FaultOn, FaultTimes, Image, Layer, MediaFault};
pub use error::{LabError, Result};
pub use guest::{Attend, Attendant, Echo};
pub use guest_programs::GuestProgram;
pub use kernel::{GuestKernel, GuestModule, KernelNeed};
pub use machine::{Function, Iommu, Machine, Namespace, NvmeController, RunBy};
pub use qmp::Monitor;
pub use trace::{CommandTrace, TracedCommand};
