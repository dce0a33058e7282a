//! The driver alone over VFIO: what it learns, what its commands do to the medium, and the suite of claims that runs
//! on every controller.

use std::fs;
use std::path::Path;

use foliant_guest::pattern::{self, Change};
use foliant_nvme::{Deallocation, Fua, Io, Lba};
use foliant_tests::conformance::{Bench, Host, Load, Topic, Verdict, run_topics};
use serde::Deserialize;

use super::Job;
use crate::bind;
use crate::context::Context;
use crate::device;

pub(super) const JOBS: &[(&str, Job)] = &[
    ("identify_like_the_kernel", identify_like_the_kernel),
    ("change_the_medium", change_the_medium),
    ("conformance", conformance),
];

#[derive(Deserialize)]
struct Controller {
    address: String,
    nsids: Vec<u32>,
}

/// What the kernel's driver says of a controller, then what ours says.
fn identify_like_the_kernel(context: &Context<'_>) {
    let Controller { address, nsids } = context.arguments();
    bind::to_kernel(&address);
    let kernel = KernelView::of(&address, &nsids);
    bind::to_vfio(&address);

    let host = device::host(&address);
    let identity = host.controller.identity();
    assert_eq!(identity.model, kernel.model);
    assert_eq!(identity.serial, kernel.serial);
    assert_eq!(identity.firmware, kernel.firmware);
    assert_eq!(identity.vendor_id, kernel.vendor);
    assert_eq!(identity.volatile_write_cache, kernel.write_cache);
    if let Some(mdts) = identity.mdts_bytes {
        assert_eq!(mdts, kernel.transfer_bytes_max, "the largest transfer");
    }
    let ours = host.controller.namespaces().iter().map(|namespace| {
        (namespace.id(), namespace.blocks() * u64::from(namespace.block_bytes()), namespace.block_bytes())
    });
    let ours: Vec<_> = ours.collect();
    assert_eq!(ours, kernel.namespaces, "namespaces: identifier, size, block size");
    context.fact("identity", format!("{identity:?}"));
    context.fact("namespaces", ours);
    host.shut_down();
}

/// What the kernel's driver says of a controller, by sysfs.
struct KernelView {
    model: String,
    serial: String,
    firmware: String,
    vendor: u16,
    write_cache: bool,
    transfer_bytes_max: u32,
    /// Identifier, size in bytes, block size in bytes.
    namespaces: Vec<(u32, u64, u32)>,
}

impl KernelView {
    fn of(address: &str, nsids: &[u32]) -> Self {
        let disks = nsids.iter().map(|&nsid| (nsid, bind::kernel_disk(address, nsid)));
        let queues: Vec<_> = disks.map(|(nsid, disk)| (nsid, Path::new("/sys/block").join(disk))).collect();
        let namespaces = queues.iter().map(|(nsid, disk)| {
            let sectors: u64 = number(&read(&disk.join("size")));
            (*nsid, sectors * 512, number(&read(&disk.join("queue/logical_block_size"))) as u32)
        });
        let namespaces = namespaces.collect();
        let controller = bind::kernel_controller(address).expect("the kernel has the controller");
        let attribute = |name: &str| read(&Path::new("/sys/class/nvme").join(&controller).join(name));
        let queue = |name: &str| read(&queues[0].1.join("queue").join(name));
        let vendor = read(&bind::function(address).join("vendor"));
        Self {
            model: attribute("model"),
            serial: attribute("serial"),
            firmware: attribute("firmware_rev"),
            vendor: u16::from_str_radix(vendor.trim_start_matches("0x"), 16).expect("a vendor's number"),
            write_cache: queue("write_cache") == "write back",
            transfer_bytes_max: number(&queue("max_hw_sectors_kb")) as u32 * 1024,
            namespaces,
        }
    }
}

fn read(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.trim().to_owned()
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|error| panic!("{text:?}: {error}"))
}

#[derive(Deserialize)]
struct Changes {
    address: String,
    seed: u64,
}

/// Every command that changes a medium, at places of all kinds; each change is told, for the host to look for it.
fn change_the_medium(context: &Context<'_>) {
    let Changes { address, seed } = context.arguments();
    let mut host = device::host(&address);
    let block = host.block_bytes() as u64;
    let mut changes = Vec::new();
    // From one block to more than a command carries, at even and odd places.
    for (number, (lba, blocks)) in
        [(0, 1), (3, 1), (7, 9), (64, 64), (200, 300), (1001, 2047)].into_iter().enumerate()
    {
        let fua = if number % 2 == 0 { Fua::No } else { Fua::Yes };
        let (offset, len_bytes) = (lba * block, (blocks * block) as usize);
        let data = pattern::bytes(seed + number as u64, offset, len_bytes);
        host.write(lba, &data, fua);
        assert!(host.read(lba, blocks as u32) == data, "blocks {lba}+{blocks} read back");
        changes.push(Change { offset, len_bytes: len_bytes as u64, seed: Some(seed + number as u64) });
    }
    let zero = |lba, blocks| Change { offset: lba * block, len_bytes: blocks * block, seed: None };
    for (lba, blocks, deallocation) in [(210, 17, Deallocation::Keep), (1100, 500, Deallocation::Allow)] {
        let zeroes = Io::WriteZeroes { lba: Lba(lba), blocks: blocks as u32, fua: Fua::No, deallocation };
        host.run(zeroes, Load::nothing()).map(drop).expect("the blocks are zeroed");
        changes.push(zero(lba, blocks));
    }
    let (lba, blocks) = (2000, 256);
    host.run(Io::Deallocate { lba: Lba(lba), blocks: blocks as u32 }, Load::nothing())
        .map(drop)
        .expect("the blocks are deallocated");
    changes.push(zero(lba, blocks));
    host.flush();
    context.fact("changes", &changes);
    context.fact("commands", commands_sent(&host));
    host.shut_down();
}

fn commands_sent(host: &Host) -> String {
    format!("{:?}", host.queue.stats())
}

#[derive(Deserialize)]
struct Conformance {
    address: String,
    area_mib: u64,
    /// The part of the suite that runs.
    topics: Vec<String>,
    /// Departures from the specification that are known of this device.
    deviations: Vec<String>,
}

/// The suite of claims about the driver, or a part of it, on this controller.
fn conformance(context: &Context<'_>) {
    let Conformance { address, area_mib, topics, deviations } = context.arguments();
    let topic =
        |name: &String| Topic::named(name).unwrap_or_else(|| panic!("the suite has no topic {name:?}"));
    let topics: Vec<_> = topics.iter().map(topic).collect();
    let open = move || device::transport(&address);
    let mut bench = Bench::new(open, device::driver_options(), area_mib << 20)
        .unwrap_or_else(|error| panic!("the suite can't begin: {error}"));
    let report = run_topics(&mut bench, &topics);
    // A failed claim panicked, and was caught: the report tells of it.
    crate::panics::forget();
    let mut failures = Vec::new();
    for outcome in &report.outcomes {
        match &outcome.verdict {
            Verdict::Passed => {}
            Verdict::Deviates(found) => {
                for deviation in found {
                    let name = deviation.to_string();
                    if !deviations.contains(&name) {
                        failures.push(format!("{}: {name} is not known of this device", outcome.name));
                    }
                    context.fact("deviation", name);
                }
            }
            Verdict::NotApplicable(reason) => {
                context.fact("not_applicable", format!("{}: {reason}", outcome.name))
            }
            Verdict::Failed(reason) => failures.push(format!("{}: {reason}", outcome.name)),
        }
    }
    context.fact("cases", report.outcomes.iter().map(|outcome| outcome.name).collect::<Vec<_>>());
    assert!(
        failures.is_empty(),
        "of {} claims these don't hold:\n{}",
        report.outcomes.len(),
        failures.join("\n")
    );
}
