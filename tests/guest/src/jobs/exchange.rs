//! Data that change hands between the guest kernel's own driver and ours.

use std::fs::File;
use std::os::unix::fs::FileExt;

use foliant::MappingOptions;
use foliant_guest::pattern::{self, Change};
use serde::Deserialize;

use super::Job;
use crate::bind;
use crate::context::Context;
use crate::device;

pub(super) const JOBS: &[(&str, Job)] = &[("exchange", exchange)];

#[derive(Deserialize)]
struct Exchange {
    address: String,
    seed: u64,
}

const LEN_BYTES: usize = 2 << 20;

/// What the kernel's driver writes, the engine reads over VFIO; what the engine writes, the kernel's driver reads.
fn exchange(context: &Context<'_>) {
    let Exchange { address, seed } = context.arguments();
    bind::to_kernel(&address);
    let disk = format!("/dev/{}", bind::kernel_disk(&address, 1));
    let file = File::options().write(true).open(&disk).expect("the disk opens");
    file.write_all_at(&pattern::bytes(seed, 0, LEN_BYTES), 0).expect("the disk takes data");
    file.sync_all().expect("the disk flushes");
    drop(file);

    bind::to_vfio(&address);
    let engine = device::engine(&address, &device::engine_options(4, 2));
    let mapping = engine.mapping(&MappingOptions::default()).expect("the mapping opens");
    let mut found = vec![0; LEN_BYTES];
    mapping.read_at(0, &mut found).expect("the engine reads");
    pattern::compare(seed, 0, &found).unwrap_or_else(|difference| panic!("over VFIO: {difference}"));
    mapping.write_at(0, &pattern::bytes(seed + 1, 0, LEN_BYTES)).expect("the engine writes");
    mapping.sync().expect("the sync succeeds");
    mapping.close().expect("the mapping closes");
    engine.close().expect("the engine closes");

    bind::to_kernel(&address);
    let disk = format!("/dev/{}", bind::kernel_disk(&address, 1));
    let file = File::open(&disk).expect("the disk opens");
    file.read_exact_at(&mut found, 0).expect("the kernel reads");
    pattern::compare(seed + 1, 0, &found).unwrap_or_else(|difference| panic!("by the kernel: {difference}"));
    context.fact("changes", [Change { offset: 0, len_bytes: LEN_BYTES as u64, seed: Some(seed + 1) }]);
}
