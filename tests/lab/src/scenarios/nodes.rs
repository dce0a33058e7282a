//! A machine with two NUMA nodes, and the controller on the second.

use serde_json::json;

use crate::drive::Drive;
use crate::machine::{Function, Machine, NvmeController};
use crate::scenario::{Boot, Claim};

pub(super) fn boots() -> Vec<Boot> {
    let mut machine = Machine { nodes: 2, ..Machine::new() }.drive(Drive::new("a", 64));
    // A root complex of the second node's, with one port.
    let far =
        ["pxb-pcie,id=far,bus_nr=128,numa_node=1,bus=pcie.0", "pcie-root-port,id=far-port,bus=far,chassis=9"];
    machine.functions.extend(far.map(|device| Function::Other(device.to_owned())));
    let machine =
        machine.nvme(NvmeController::new("LAB0", "00.0").namespace(1, "a", 4096).behind("far-port"));
    let address = "0000:81:00.0";
    let boot = Boot::new("two-nodes", machine.without_kernel_driver()).bind(&[address]).claim(
        Claim::new(
            "a_shard_near_the_device_runs_on_its_node_with_its_memory_there",
            "ShardThreads::NearDevice pins the shard to a processor of the device's node, and the pages of the arena lie there.",
            "engine_near_device",
            json!({"address": address, "shards": 1, "seed": 5}),
        )
        .check(|evidence| {
            // Two processors, of which the second is the second node's.
            assert_eq!(evidence.fact::<Vec<String>>("cores"), ["1"]);
            let (near_kib, far_kib): (u64, u64) = (evidence.fact("near_kib"), evidence.fact("far_kib"));
            let cache_kib: u64 = evidence.fact("cache_kib");
            assert!(near_kib >= cache_kib, "{near_kib} KiB on the device's node, for a cache of {cache_kib}");
            assert_eq!(far_kib, 0, "of what was to lie on the device's node");
            evidence.image_is_as_told("a");
        }),
    );
    vec![boot]
}
