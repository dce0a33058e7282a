//! `foliant identify`: what a controller says of itself, and what the driver gets from it.

use foliant_nvme::{ArenaBacking, Controller, ControllerOptions, Namespace};
use foliant_nvme_spec::registers::{Cap, Register};
use serde::Serialize;

use crate::cli::IdentifyOptions;
use crate::error::Error;
use crate::size::ByteSize;
use crate::stdout::{Format, Report, write_report};
use crate::table::{Table, count};
use crate::target::Target;
use crate::verdict::Verdict;

/// Queue pairs asked for: as many as the emulated controller could have. Hardware grants what it has.
const QUEUE_PAIRS_ASKED: u16 = 1024;

pub(crate) fn run(options: &IdentifyOptions) -> Result<Verdict, Error> {
    write_report(&identify(&options.uri)?, Format::of(options.json))?;
    Ok(Verdict::Passed)
}

#[derive(Debug, Serialize)]
struct Identified {
    uri: String,
    model: String,
    serial: String,
    firmware: String,
    vendor_id: u16,
    nvme_version: String,
    /// MDTS; `None` where the controller has no limit.
    transfer_bytes_max: Option<u32>,
    queue_pairs: u16,
    queue_entries_max: u32,
    ready_timeout_ms: u64,
    volatile_write_cache: bool,
    write_zeroes: bool,
    dataset_management: bool,
    atomic_write_blocks_power_fail: u32,
    arena: &'static str,
    namespaces: Vec<IdentifiedNamespace>,
}

#[derive(Debug, Serialize)]
struct IdentifiedNamespace {
    id: u32,
    size_bytes: ByteSize,
    blocks: u64,
    block_bytes: u32,
    /// NOIOB; `None` where there is none.
    optimal_boundary_blocks: Option<u32>,
    atomic_write_blocks_power_fail: u32,
}

fn identify(target: &Target) -> Result<Identified, Error> {
    target.require_existing("identify")?;
    let transport = target.open()?.attach()?;
    let cap = Cap::from(transport.read_u64(Register::Cap.offset()).map_err(foliant_nvme::DriverError::from)?);
    let options = ControllerOptions {
        io_queue_pairs: QUEUE_PAIRS_ASKED,
        // The fewest, since the queues are counted and not created.
        io_queue_entries: 2,
        arena_bytes: 2 << 20,
        ..ControllerOptions::default()
    };
    let controller = Controller::open(transport, &options)?;
    let identity = controller.identity().clone();
    let identified = Identified {
        uri: target.uri().to_owned(),
        model: identity.model,
        serial: identity.serial,
        firmware: identity.firmware,
        vendor_id: identity.vendor_id,
        nvme_version: identity.version,
        transfer_bytes_max: identity.mdts_bytes,
        queue_pairs: identity.queue_pairs,
        queue_entries_max: u32::from(cap.mqes_z()) + 1,
        ready_timeout_ms: u64::from(cap.to()) * 500,
        volatile_write_cache: identity.volatile_write_cache,
        write_zeroes: identity.write_zeroes,
        dataset_management: identity.dataset_management,
        atomic_write_blocks_power_fail: identity.atomic_write_blocks_power_fail,
        arena: match controller.arena().backing() {
            ArenaBacking::Hugepages => "hugepages",
            ArenaBacking::OrdinaryLocked => "ordinary pages, locked",
            ArenaBacking::OrdinaryUnlocked => "ordinary pages, not locked",
        },
        namespaces: controller.namespaces().iter().map(IdentifiedNamespace::new).collect(),
    };
    controller.shutdown()?;
    Ok(identified)
}

impl IdentifiedNamespace {
    fn new(namespace: &Namespace) -> Self {
        Self {
            id: namespace.id(),
            size_bytes: ByteSize(namespace.blocks() * u64::from(namespace.block_bytes())),
            blocks: namespace.blocks(),
            block_bytes: namespace.block_bytes(),
            optimal_boundary_blocks: namespace.optimal_boundary_blocks(),
            atomic_write_blocks_power_fail: namespace.atomic_write_blocks_power_fail(),
        }
    }
}

impl Report for Identified {
    fn table(&self) -> Table {
        let yes = |is: bool| if is { "yes" } else { "no" };
        let limit = self.transfer_bytes_max.map_or("none".to_owned(), |b| ByteSize(b.into()).to_string());
        let table = Table::default()
            .section(format!("controller {}", self.uri))
            .row("model", &self.model)
            .row("serial number", &self.serial)
            .row("firmware", &self.firmware)
            .row("PCI vendor", format!("{:#06x}", self.vendor_id))
            .row("NVMe version", &self.nvme_version)
            .row("largest transfer (MDTS)", limit)
            .row("I/O queue pairs", format!("{} of {QUEUE_PAIRS_ASKED} asked for", self.queue_pairs))
            .row("queue entries (MQES)", count(self.queue_entries_max.into()))
            .row("time to get ready (CAP.TO)", format!("{} ms", self.ready_timeout_ms))
            .row("volatile write cache (VWC)", yes(self.volatile_write_cache))
            .row("Write Zeroes, deallocate", {
                format!("{}, {}", yes(self.write_zeroes), yes(self.dataset_management))
            })
            .row("atomic at power loss (AWUPF)", blocks(self.atomic_write_blocks_power_fail))
            .row("memory shared with it", self.arena);
        self.namespaces.iter().fold(table, |table, namespace| {
            table
                .section(format!("namespace {}", namespace.id))
                .row("size", format!("{} in {} blocks", namespace.size_bytes, count(namespace.blocks)))
                .row("block", format!("{} bytes", namespace.block_bytes))
                .row(
                    "best I/O boundary (NOIOB)",
                    namespace.optimal_boundary_blocks.map_or("none".into(), blocks),
                )
                .row("atomic at power loss (NAWUPF)", blocks(namespace.atomic_write_blocks_power_fail))
        })
    }
}

fn blocks(number: u32) -> String {
    format!("{} {}", count(number.into()), if number == 1 { "block" } else { "blocks" })
}
