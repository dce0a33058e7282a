//! Slow devices and idle ones.

use serde_json::json;

use crate::drive::{Drive, Layer};
use crate::machine::{Machine, NvmeController};
use crate::scenario::{Boot, Claim};

/// Requests a second of the device that is used now and then: fast enough that nobody waits long, and slow enough that a
/// shard falls asleep over a read.
const IDLE_IOPS: u32 = 60;

pub(super) fn boots() -> Vec<Boot> {
    let machine = Machine::new()
        .drive(Drive::new("slow", 32).layer(Layer::IopsLimit(60)))
        .drive(Drive::new("idle", 32).layer(Layer::IopsLimit(IDLE_IOPS)))
        .nvme(NvmeController::new("LAB0", "04.0").namespace(1, "slow", 4096))
        .nvme(NvmeController::new("LAB1", "05.0").namespace(1, "idle", 4096));
    let boot = Boot::new("waiting", machine.without_kernel_driver())
        .bind(&["0000:00:04.0", "0000:00:05.0"])
        .claim(Claim::new(
            "a_slow_device_holds_up_nobody_who_does_not_need_it",
            "On a device of 60 requests a second every read and sync ends well, and hits go on beside them unhindered.",
            "slow_device",
            json!({"address": "0000:00:04.0"}),
        ))
        .claim(
            Claim::new(
                "an_idle_engine_uses_no_processor_and_wakes_by_interrupt",
                "With nothing to do both shards sleep and the process uses next to no processor time; then each cold read \
                 wakes a shard, which sleeps again until the device's interrupt.",
                "idle_device",
                json!({"address": "0000:00:05.0"}),
            )
            .check(|evidence| {
                let share: f64 = evidence.fact("cpu_share");
                assert!(share < 0.1, "{share:.3} of a processor is used while idle: somebody polls");
                let (sleeps, interrupts): (u64, u64) = (evidence.fact("sleeps"), evidence.fact("interrupts"));
                let reads: u64 = evidence.fact("reads");
                // The device has rested, and QEMU serves what a tenth of a second allows at once.
                let at_once = u64::from(IDLE_IOPS) / 10;
                assert!(
                    interrupts + at_once >= reads,
                    "{interrupts} interrupts for {reads} reads, of which {at_once} at most are served before the shard sleeps"
                );
                assert!(sleeps >= reads, "{sleeps} sleeps");
            }),
        );
    vec![boot]
}
