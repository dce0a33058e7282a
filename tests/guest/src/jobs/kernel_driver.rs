//! The guest kernel's own NVMe driver: what it says of a controller, and data by its hand.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use foliant_guest::pattern;
use serde::Deserialize;

use super::Job;
use crate::bind;
use crate::context::Context;

pub(super) const JOBS: &[(&str, Job)] = &[("kernel_facts", kernel_facts), ("kernel_writes", kernel_writes)];

#[derive(Deserialize)]
struct Place {
    address: String,
    nsid: u32,
}

/// Reports what the kernel's driver says of a controller and a namespace.
fn kernel_facts(context: &Context<'_>) {
    let Place { address, nsid } = context.arguments();
    let name = bind::kernel_disk(&address, nsid);
    let controller = bind::kernel_controller(&address).expect("the kernel has the controller");
    for attribute in ["model", "serial", "firmware_rev"] {
        let text = read(&format!("/sys/class/nvme/{controller}/{attribute}"));
        context.fact(attribute, text);
    }
    let sectors: u64 = read(&format!("/sys/block/{name}/size")).parse().expect("a size in sectors");
    context.fact("size_bytes", sectors * 512);
    let block: u32 = read(&format!("/sys/block/{name}/queue/logical_block_size")).parse().expect("a size");
    context.fact("block_bytes", block);
}

#[derive(Deserialize)]
struct Writing {
    #[serde(flatten)]
    place: Place,
    offset: u64,
    len_bytes: usize,
    seed: u64,
}

/// Writes a pattern through the kernel's driver, brings it to the medium, and reads it back.
fn kernel_writes(context: &Context<'_>) {
    let Writing { place, offset, len_bytes, seed } = context.arguments();
    let disk = Path::new("/dev").join(bind::kernel_disk(&place.address, place.nsid));
    let file = File::options().read(true).write(true).open(&disk).expect("the disk opens");
    file.write_all_at(&pattern::bytes(seed, offset, len_bytes), offset).expect("the disk takes data");
    file.sync_all().expect("the disk flushes");
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}")).trim().to_owned()
}
