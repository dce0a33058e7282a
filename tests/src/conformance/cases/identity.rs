//! What the controller says of itself, to the driver and on the wire.

use foliant_nvme_spec::identify::{Cns, Namespace, NamespaceList};
use foliant_nvme_spec::registers::{Csts, Register, Vs};
use foliant_nvme_spec::{Command, Completion};
use zerocopy::IntoBytes;

use super::cases;
use crate::conformance::Bench;

cases! {
    what_the_controller_says_of_itself_can_be_true: [];
    every_namespace_has_blocks_and_limits_that_fit_the_controllers: [];
    registers_and_identify_agree: [];
    identify_answers_the_same_twice: [];
    the_namespace_list_goes_on_after_any_identifier: [];
    an_identifier_without_a_namespace_has_an_empty_structure_or_is_refused: [];
}

fn what_the_controller_says_of_itself_can_be_true(bench: &Bench) {
    let options = bench.options();
    let host = bench.host();
    let identity = host.controller.identity();
    for (what, text, len_max) in [
        ("serial", &identity.serial, 20),
        ("model", &identity.model, 40),
        ("firmware", &identity.firmware, 8),
    ] {
        assert!(text.len() <= len_max, "{what}: {text:?}");
        assert!(text.chars().all(|c| c == ' ' || c.is_ascii_graphic()), "{what}: {text:?}");
    }
    assert!(!identity.model.is_empty(), "a controller has a model");
    assert!(identity.version.starts_with("1.") || identity.version.starts_with("2."), "{}", identity.version);
    assert!((1..=options.io_queue_pairs).contains(&identity.queue_pairs), "{}", identity.queue_pairs);
    assert!((2..=options.io_queue_entries).contains(&identity.queue_entries), "{}", identity.queue_entries);
    assert!(identity.max_transfer_bytes <= options.max_transfer_bytes, "{}", identity.max_transfer_bytes);
    if let Some(mdts) = identity.mdts_bytes {
        assert!(mdts.is_power_of_two() && mdts > 4096, "MDTS {mdts}");
        assert!(identity.max_transfer_bytes <= mdts, "{} of {mdts}", identity.max_transfer_bytes);
    }
    assert!((1..=1 << 16).contains(&identity.atomic_write_blocks_power_fail));
}

fn every_namespace_has_blocks_and_limits_that_fit_the_controllers(bench: &Bench) {
    let host = bench.host();
    let identity = host.controller.identity();
    let mut previous = 0;
    for namespace in host.controller.namespaces() {
        assert!(namespace.id() > previous, "identifiers ascend");
        previous = namespace.id();
        let block = namespace.block_bytes();
        assert!(block.is_power_of_two() && (512..=65_536).contains(&block), "blocks of {block} bytes");
        assert!(namespace.blocks() > 0, "namespace {} is empty", namespace.id());
        let transfer = namespace.max_transfer_bytes();
        assert!(transfer.is_multiple_of(block) && (block..=identity.max_transfer_bytes).contains(&transfer));
        assert!(namespace.atomic_write_blocks_power_fail() >= 1);
    }
}

fn registers_and_identify_agree(bench: &Bench) {
    let mut host = bench.raw();
    let cap = host.cap();
    assert!(cap.mqes_z() >= 1, "a queue has two entries at least");
    assert!(cap.mpsmin() <= cap.mpsmax(), "{} to {}", cap.mpsmin(), cap.mpsmax());
    let (vs, csts) = (Vs::from(host.register(Register::Vs)), Csts::from(host.register(Register::Csts)));
    assert!(csts.rdy() && !csts.cfs(), "{csts:?}");
    let controller = host.identify_controller();
    // VER came with version 1.2.
    assert!(u32::from(controller.ver) == 0 || controller.ver == vs, "{} and {vs}", controller.ver);
    for (entry, exponent) in
        [(controller.sqes, Command::SIZE_EXPONENT), (controller.cqes, Completion::SIZE_EXPONENT)]
    {
        assert!((entry.min()..=entry.max()).contains(&exponent), "2^{} to 2^{}", entry.min(), entry.max());
    }
    let list = host.identify::<NamespaceList>(Cns::ACTIVE_NAMESPACES, 0).expect("the list is mandatory");
    for nsid in list.active() {
        assert!(nsid <= controller.nn, "namespace {nsid} of {}", controller.nn);
        let namespace = host.identify_namespace(nsid);
        let (size, capacity, used) = (namespace.nsze, namespace.ncap, namespace.nuse);
        assert!(used <= capacity && capacity <= size && size > 0, "{used} of {capacity} of {size}");
        assert!(namespace.nlbaf_z < 64, "{} formats", namespace.nlbaf_z);
        let format = namespace.formatted_lba().expect("FLBAS names a format that is there");
        assert!(format.lbads() >= 9, "blocks of 2^{} bytes", format.lbads());
    }
}

fn identify_answers_the_same_twice(bench: &Bench) {
    let mut host = bench.raw();
    let [first, second] = [0; 2].map(|_| host.identify_controller());
    assert!(first.as_bytes() == second.as_bytes(), "Identify Controller");
    let nsid = bench.facts().namespaces[0].id();
    let [first, second] = [0; 2].map(|_| host.identify_namespace(nsid));
    // NUSE may change at any time, even without commands.
    assert!(first.nsze == second.nsze && first.lbaf == second.lbaf && first.flbas == second.flbas);
}

fn the_namespace_list_goes_on_after_any_identifier(bench: &Bench) {
    let mut host = bench.raw();
    let mut after = |nsid| {
        let list =
            host.identify::<NamespaceList>(Cns::ACTIVE_NAMESPACES, nsid).expect("the list is mandatory");
        list.active().collect::<Vec<_>>()
    };
    let all = after(0);
    assert!(all.is_sorted_by(|a, b| a < b), "{all:?}");
    for (index, &nsid) in all.iter().enumerate() {
        assert_eq!(after(nsid), all[index + 1..], "after {nsid}");
    }
}

/// An identifier within the controller's range without a namespace has a structure of zeroes; one out of range is
/// invalid (NVM section 4.1.5.1).
fn an_identifier_without_a_namespace_has_an_empty_structure_or_is_refused(bench: &Bench) {
    use foliant_nvme_spec::StatusCode;
    let mut host = bench.raw();
    let controller = host.identify_controller();
    let list = host.identify::<NamespaceList>(Cns::ACTIVE_NAMESPACES, 0).expect("the list is mandatory");
    let inactive = (1..=controller.nn.min(4096)).find(|nsid| !list.active().any(|active| active == *nsid));
    if let Some(nsid) = inactive {
        let namespace = host.identify_namespace(nsid);
        assert!(namespace.as_bytes().iter().all(|&byte| byte == 0), "inactive namespace {nsid}");
    }
    let past = host.identify::<Namespace>(Cns::NAMESPACE, controller.nn + 1).map(drop);
    let code = past.expect_err("there is no such namespace").code();
    assert_eq!(code, StatusCode::INVALID_NAMESPACE);
}
