//! The driver's conformance suite over VFIO, on controllers with blocks of both sizes and through both of the kernel's
//! interfaces. Most of its time the guest sleeps, since the kernel resets a function twice each time that it is opened and
//! closed; so the suite runs in parts, each in a boot of its own, that together are the whole.

use foliant_tests::conformance::Topic;
use serde_json::json;

use crate::kernel::KernelNeed;
use crate::machine::Machine;
use crate::scenario::{Boot, Claim};

/// Departures from the specification that QEMU's controller is known for; `docs/conformance.md` tells of them.
const DEVIATIONS: [&str; 3] = ["log-page-status", "queue-deletion-status", "write-cache-survives-reset"];

const ADDRESS: &str = "0000:00:04.0";

/// A part of the suite: which topics, and what its boot and its claim are called.
type Part = (&'static [Topic], &'static str, &'static str);

const IDENTITY_AND_DATA: &[Topic] = &[Topic::Identity, Topic::Data];
const LIMITS_AND_QUEUES: &[Topic] = &[Topic::Limits, Topic::Queues];
const LIFECYCLE: &[Topic] = &[Topic::Lifecycle];
const ADMINISTRATION_AND_REFUSALS: &[Topic] = &[Topic::Administration, Topic::Refusals];

pub(super) fn boots() -> Vec<Boot> {
    let group = "vfio:0000:00:04.0?iommu=group";
    let iommufd = "vfio:0000:00:04.0?iommu=iommufd";
    let newer = Machine { kernel: KernelNeed::Iommufd, ..Machine::with_one_controller(4096) };
    let suites = [
        suite(&Machine::with_one_controller(512), group, BLOCKS_OF_512),
        suite(&Machine::with_one_controller(4096), group, BLOCKS_OF_4096),
        suite(&newer, iommufd, THROUGH_IOMMUFD),
    ];
    suites.into_iter().flatten().collect()
}

const BLOCKS_OF_512: [Part; 4] = [
    (
        IDENTITY_AND_DATA,
        "conformance-512-data",
        "the_suite_of_identity_and_data_holds_on_qemus_controller_with_512_byte_blocks",
    ),
    (
        LIMITS_AND_QUEUES,
        "conformance-512-queues",
        "the_suite_of_limits_and_queues_holds_on_qemus_controller_with_512_byte_blocks",
    ),
    (
        LIFECYCLE,
        "conformance-512-lifecycle",
        "the_suite_of_the_lifecycle_holds_on_qemus_controller_with_512_byte_blocks",
    ),
    (
        ADMINISTRATION_AND_REFUSALS,
        "conformance-512-administration",
        "the_suite_of_administration_and_refusals_holds_on_qemus_controller_with_512_byte_blocks",
    ),
];

const BLOCKS_OF_4096: [Part; 4] = [
    (
        IDENTITY_AND_DATA,
        "conformance-4096-data",
        "the_suite_of_identity_and_data_holds_on_qemus_controller_with_4096_byte_blocks",
    ),
    (
        LIMITS_AND_QUEUES,
        "conformance-4096-queues",
        "the_suite_of_limits_and_queues_holds_on_qemus_controller_with_4096_byte_blocks",
    ),
    (
        LIFECYCLE,
        "conformance-4096-lifecycle",
        "the_suite_of_the_lifecycle_holds_on_qemus_controller_with_4096_byte_blocks",
    ),
    (
        ADMINISTRATION_AND_REFUSALS,
        "conformance-4096-administration",
        "the_suite_of_administration_and_refusals_holds_on_qemus_controller_with_4096_byte_blocks",
    ),
];

const THROUGH_IOMMUFD: [Part; 4] = [
    (IDENTITY_AND_DATA, "conformance-iommufd-data", "the_suite_of_identity_and_data_holds_through_iommufd"),
    (LIMITS_AND_QUEUES, "conformance-iommufd-queues", "the_suite_of_limits_and_queues_holds_through_iommufd"),
    (LIFECYCLE, "conformance-iommufd-lifecycle", "the_suite_of_the_lifecycle_holds_through_iommufd"),
    (
        ADMINISTRATION_AND_REFUSALS,
        "conformance-iommufd-administration",
        "the_suite_of_administration_and_refusals_holds_through_iommufd",
    ),
];

/// The parts of the suite on the controller of `machine` that `uri` names.
fn suite(machine: &Machine, uri: &str, parts: [Part; 4]) -> [Boot; 4] {
    parts.map(|(topics, boot, claim)| {
        Boot::new(boot, machine.clone().without_kernel_driver())
            .bind(&[ADDRESS])
            .claim(part(claim, uri, topics))
    })
}

/// The part of the suite that is about `topics`, on the controller that `uri` names.
fn part(name: &'static str, uri: &str, topics: &[Topic]) -> Claim {
    let topics: Vec<_> = topics.iter().map(|topic| topic.name()).collect();
    Claim::new(
        name,
        "This part of the suite that runs on the emulated controller holds unchanged over VFIO; departures are those \
         written down.",
        "conformance",
        json!({"address": uri, "area_mib": 16, "topics": topics, "deviations": DEVIATIONS}),
    )
    .check(|evidence| {
        let ran: Vec<String> = evidence.fact("cases");
        let topics: Vec<String> = evidence.argument("topics");
        assert_eq!(ran, cases(&topics), "the part ran as a whole");
    })
}

/// The names of the claims about `topics`.
fn cases(topics: &[String]) -> Vec<&'static str> {
    let topics = topics.iter().map(|name| Topic::named(name).unwrap_or_else(|| panic!("no topic {name:?}")));
    topics.flat_map(|topic| topic.cases()).map(|case| case.name).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use foliant_tests::conformance::{Deviation, suite};

    use super::*;

    /// Looks at what the lab runs, not at how it is put together: on each machine that has a part of the suite, the parts
    /// together are every claim once.
    #[test]
    fn the_parts_of_the_suite_are_the_whole_on_each_machine() {
        let mut ran = BTreeMap::<String, Vec<&str>>::new();
        for boot in crate::scenarios::all() {
            for claim in boot.claims.iter().filter(|claim| claim.job == "conformance") {
                let topics: Vec<String> = serde_json::from_value(claim.arguments["topics"].clone()).unwrap();
                let place = format!("{} of {:?}", claim.arguments["address"], boot.machine);
                ran.entry(place).or_default().extend(cases(&topics));
            }
        }
        let mut whole: Vec<_> = suite().iter().map(|case| case.name).collect();
        whole.sort_unstable();
        assert_eq!(ran.len(), 3, "blocks of both sizes, and iommufd");
        for (place, mut cases) in ran {
            cases.sort_unstable();
            assert_eq!(cases, whole, "{place}");
        }
    }

    #[test]
    fn every_departure_of_qemus_controller_is_one_that_the_suite_knows() {
        for name in DEVIATIONS {
            assert!(Deviation::ALL.iter().any(|deviation| deviation.name() == name), "{name}");
        }
    }
}
