//! Jobs that go well or wrong on purpose: by them the lab shows that its verdicts can be believed.

use std::time::Duration;

use foliant_nvme::{Controller, Io, Iova, Lba, Payload, QueuePair, Segment};
use serde_json::Value;

use super::Job;
use crate::context::Context;
use crate::device;

pub(super) const JOBS: &[(&str, Job)] = &[
    ("pass", |context| context.fact("passed", true)),
    ("fail", |_| panic!("this job fails on purpose")),
    ("panic_in_a_thread", |_| drop(std::thread::spawn(|| panic!("a thread's panic, on purpose")).join())),
    ("hang", |_| std::thread::sleep(Duration::from_secs(3600))),
    ("crash_the_kernel", crash_the_kernel),
    ("leave_early", |_| std::process::exit(0)),
    ("read_to_nowhere", read_to_nowhere),
    ("ask_for_the_impossible", |context| drop(context.ask("the impossible", ()))),
];

fn crash_the_kernel(_: &Context<'_>) {
    std::fs::write("/proc/sysrq-trigger", "c").expect("the kernel takes magic requests");
    std::thread::sleep(Duration::from_secs(3600));
}

/// A payload at a device address that was never mapped.
struct Nowhere;

// SAFETY: there is no memory at the address, for the device neither: the IOMMU stops what it writes. That is what the
// job is about.
#[expect(unsafe_code, reason = "a payload vouches for its memory")]
unsafe impl Payload for Nowhere {
    fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        std::iter::once(Segment { iova: Iova(0x7F00_0000), len_bytes: 4096 })
    }
}

/// The device is told to write to an address without a mapping. QEMU's controller says that it succeeded.
fn read_to_nowhere(context: &Context<'_>) {
    let arguments: Value = context.arguments();
    let address = arguments["address"].as_str().expect("an address");
    let controller = Controller::open(device::transport(address), &device::driver_options());
    let controller = controller.expect("the controller opens");
    let namespace = controller.namespace(1).expect("there is a namespace");
    let mut queue: QueuePair<Nowhere> = controller.queue_pair().expect("a queue pair");
    let read = Io::Read { lba: Lba(0), blocks: 4096 / namespace.block_bytes() };
    queue
        .submit(namespace, read, Nowhere)
        .map_err(|rejected| rejected.reason)
        .expect("the driver can't know");
    queue.ring();
    device::wait_until("the read ends", Duration::from_secs(30), || {
        queue
            .poll(1, |ended| context.fact("result", format!("{:?}", ended.result)))
            .expect("the queue is well")
            > 0
    });
}
