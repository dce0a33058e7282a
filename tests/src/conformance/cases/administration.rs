//! Admin commands: the mandatory ones work, and wrong ones are refused with the status that the specification gives.
//! The driver sends none of the wrong ones, so these go to the device by themselves.

use foliant_nvme::Status;
use foliant_nvme_spec::command::{
    AbortCdw10, CreateCompletionQueueCdw11, CreateQueueCdw10, CreateSubmissionQueueCdw11, GetLogPageCdw10,
};
use foliant_nvme_spec::feature::{
    FeatureId, GetFeaturesCdw10, NumberOfQueues, SetFeaturesCdw10, VolatileWriteCache,
};
use foliant_nvme_spec::identify::{Cns, NamespaceList};
use foliant_nvme_spec::log::{LogPageId, SmartHealth};
use foliant_nvme_spec::{AdminOpcode, Command, StatusCode};
use zerocopy::FromBytes;

use super::cases;
use crate::conformance::Bench;
use crate::conformance::bench::Need;
use crate::conformance::deviation::Deviation;
use crate::conformance::raw::{ENTRIES, RawHost};

cases! {
    an_unknown_admin_command_and_an_unknown_structure_are_refused: [];
    a_queue_that_cannot_be_is_not_created: [];
    queues_are_deleted_in_order_and_only_if_they_are_there: [];
    the_number_of_queues_is_asked_for_once_and_within_range: [];
    an_unknown_feature_is_refused: [];
    the_write_cache_can_be_switched_off_and_on: [];
    the_mandatory_log_pages_can_be_read_and_others_are_refused: [];
    event_requests_are_held_up_to_the_limit: [Need::EventRequestsMax(ENTRIES - 2)];
    an_abort_of_nothing_says_that_nothing_was_aborted: [];
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(what: &str, result: Result<T, Status>, code: StatusCode) {
    match result {
        Err(status) => assert_eq!(status.code(), code, "{what}: {status}"),
        Ok(answer) => panic!("{what} succeeded with {answer:?}, and {code} was to be expected"),
    }
}

/// As [`assert_refused`], with a code that a device is known to give in the right one's stead.
#[track_caller]
fn assert_refused_or(
    bench: &Bench,
    what: &str,
    result: Result<u32, Status>,
    code: StatusCode,
    known: (StatusCode, Deviation),
) {
    if result.as_ref().is_err_and(|status| status.code() == known.0) {
        bench.deviates(known.1);
    } else {
        assert_refused(what, result, code);
    }
}

fn an_unknown_admin_command_and_an_unknown_structure_are_refused(bench: &Bench) {
    let mut host = bench.raw();
    let unknown = host.admin(AdminOpcode(0x7F), Command::EMPTY);
    assert_refused("admin command 7Fh", unknown, StatusCode::INVALID_OPCODE);
    let unknown = host.identify::<NamespaceList>(Cns(0xFF), 0).map(drop);
    assert_refused("Identify, CNS FFh", unknown, StatusCode::INVALID_FIELD);
    let past = host.identify::<NamespaceList>(Cns::ACTIVE_NAMESPACES, 0xFFFF_FFFE).map(drop);
    assert_refused("the namespaces after FFFFFFFEh", past, StatusCode::INVALID_NAMESPACE);
    // None of it has disturbed the queue.
    host.identify_controller();
}

fn with_size(qid: u16, entries_z: u16) -> u32 {
    CreateQueueCdw10::new().with_qid(qid).with_qsize_z(entries_z).into()
}

/// What makes a creation impossible, how, and what the device says to it.
type Refusal = (&'static str, fn(&mut Command), StatusCode);

fn a_queue_that_cannot_be_is_not_created(bench: &Bench) {
    let mut host = bench.raw();
    let mqes_z = host.cap().mqes_z();
    let asked = NumberOfQueues::new();
    set_feature(&mut host, FeatureId::NUMBER_OF_QUEUES, asked.into()).expect("one queue pair is granted");
    let is_not_contiguous: u32 = CreateCompletionQueueCdw11::new().into();
    let refusals: [Refusal; 4] = [
        ("queue 0", |c| c.cdw10 = with_size(0, 1), StatusCode::INVALID_QUEUE_IDENTIFIER),
        ("queue FFFFh", |c| c.cdw10 = with_size(0xFFFF, 1), StatusCode::INVALID_QUEUE_IDENTIFIER),
        ("a queue of one entry", |c| c.cdw10 = with_size(1, 0), StatusCode::INVALID_QUEUE_SIZE),
        ("a queue off its page", |c| c.prp1 += 8, StatusCode::PRP_OFFSET_INVALID),
    ];
    for (what, change, code) in refusals {
        assert_refused(what, host.create_completion_queue(change), code);
    }
    if let Some(too_many_z) = mqes_z.checked_add(1) {
        let long = host.create_completion_queue(|c| c.cdw10 = with_size(1, too_many_z));
        assert_refused("a queue longer than CAP.MQES", long, StatusCode::INVALID_QUEUE_SIZE);
    }
    if host.cap().cqr() {
        let scattered = host.create_completion_queue(|c| c.cdw11 = is_not_contiguous);
        assert_refused("a queue in pieces where CAP.CQR is set", scattered, StatusCode::INVALID_FIELD);
    }
    let early = host.create_submission_queue(|_| ());
    assert_refused(
        "a submission queue without its completion queue",
        early,
        StatusCode::COMPLETION_QUEUE_INVALID,
    );
    host.create_completion_queue(|_| ()).expect("a proper queue is created");
    let twice = host.create_completion_queue(|_| ());
    assert_refused("a completion queue that is there", twice, StatusCode::INVALID_QUEUE_IDENTIFIER);
    for (what, change, code) in refusals {
        // For a submission queue, and with the completion queue there.
        let with_queue = |command: &mut Command| {
            change(command);
            command.cdw11 = CreateSubmissionQueueCdw11::new().with_pc(true).with_cqid(1).into();
        };
        assert_refused(what, host.create_submission_queue(with_queue), code);
    }
    host.create_submission_queue(|_| ()).expect("a proper queue is created");
    let twice = host.create_submission_queue(|_| ());
    assert_refused("a submission queue that is there", twice, StatusCode::INVALID_QUEUE_IDENTIFIER);
}

fn queues_are_deleted_in_order_and_only_if_they_are_there(bench: &Bench) {
    let mut host = bench.raw();
    let (submission, completion) =
        (AdminOpcode::DELETE_IO_SUBMISSION_QUEUE, AdminOpcode::DELETE_IO_COMPLETION_QUEUE);
    let absent = |bench, what, result| {
        let known = (StatusCode::COMPLETION_QUEUE_INVALID, Deviation::QueueDeletionStatus);
        assert_refused_or(bench, what, result, StatusCode::INVALID_QUEUE_IDENTIFIER, known);
    };
    for qid in [0, 1] {
        let refused = host.delete_queue(submission, qid);
        assert_refused("a submission queue that is not there", refused, StatusCode::INVALID_QUEUE_IDENTIFIER);
        absent(bench, "a completion queue that is not there", host.delete_queue(completion, qid));
    }
    drop(host.queue_pair());
    let in_use = host.delete_queue(completion, 1);
    assert_refused("a completion queue in use", in_use, StatusCode::INVALID_QUEUE_DELETION);
    host.delete_queue(submission, 1).expect("the submission queue is deleted");
    host.delete_queue(completion, 1).expect("the completion queue is deleted");
    absent(bench, "a completion queue that was deleted", host.delete_queue(completion, 1));
    drop(host.queue_pair());
}

fn set_feature(host: &mut RawHost, id: FeatureId, value: u32) -> Result<u32, Status> {
    let cdw10 = SetFeaturesCdw10::new().with_fid(id.0).into();
    host.admin(AdminOpcode::SET_FEATURES, Command { cdw10, cdw11: value, ..Command::EMPTY })
}

fn feature(host: &mut RawHost, id: FeatureId) -> Result<u32, Status> {
    let cdw10 = GetFeaturesCdw10::new().with_fid(id.0).into();
    host.admin(AdminOpcode::GET_FEATURES, Command { cdw10, ..Command::EMPTY })
}

fn the_number_of_queues_is_asked_for_once_and_within_range(bench: &Bench) {
    let mut host = bench.raw();
    for (nsq_z, ncq_z) in [(0xFFFF, 0), (0, 0xFFFF)] {
        let asked = NumberOfQueues::new().with_nsq_z(nsq_z).with_ncq_z(ncq_z);
        let refused = set_feature(&mut host, FeatureId::NUMBER_OF_QUEUES, asked.into());
        assert_refused("65,536 queues", refused, StatusCode::INVALID_FIELD);
    }
    let asked = NumberOfQueues::new().with_nsq_z(3).with_ncq_z(3);
    let granted =
        set_feature(&mut host, FeatureId::NUMBER_OF_QUEUES, asked.into()).expect("queues are granted");
    assert_eq!(feature(&mut host, FeatureId::NUMBER_OF_QUEUES).expect("the feature is mandatory"), granted);
    drop(host.queue_pair());
    let late = set_feature(&mut host, FeatureId::NUMBER_OF_QUEUES, asked.into());
    assert_refused("a number of queues when there are some", late, StatusCode::COMMAND_SEQUENCE_ERROR);
}

fn an_unknown_feature_is_refused(bench: &Bench) {
    let mut host = bench.raw();
    let unknown = FeatureId(0x70);
    assert_refused("Get Features 70h", feature(&mut host, unknown), StatusCode::INVALID_FIELD);
    assert_refused("Set Features 70h", set_feature(&mut host, unknown, 0), StatusCode::INVALID_FIELD);
}

/// Switched off it stays off until it is switched on, or the controller is reset: the value can't be saved, so a
/// reset brings the default back (Base section 5.1.25).
fn the_write_cache_can_be_switched_off_and_on(bench: &Bench) {
    let id = FeatureId::VOLATILE_WRITE_CACHE;
    // One transport for both, so that nothing but the reset lies between them.
    let transport = bench.transport();
    let mut host = RawHost::open(transport.clone());
    if !host.identify_controller().vwc.present() {
        assert_refused("a write cache that is not there", feature(&mut host, id), StatusCode::INVALID_FIELD);
        return;
    }
    let is_on = |host: &mut RawHost| {
        VolatileWriteCache::from(feature(host, id).expect("the feature goes with the cache")).wce()
    };
    let default = is_on(&mut host);
    for state in [!default, default, !default] {
        let value = VolatileWriteCache::new().with_wce(state).into();
        set_feature(&mut host, id, value).expect("the cache is switched");
        assert_eq!(is_on(&mut host), state);
    }
    drop(host);
    let mut host = RawHost::open(transport);
    if is_on(&mut host) != default {
        bench.deviates(Deviation::WriteCacheSurvivesReset);
        let value = VolatileWriteCache::new().with_wce(default).into();
        set_feature(&mut host, id, value).expect("the cache is switched back");
    }
}

fn log_page(host: &mut RawHost, id: LogPageId, len_bytes: usize) -> Result<u32, Status> {
    let cdw10 = GetLogPageCdw10::new().with_lid(id.0).with_numdl_z((len_bytes / 4 - 1) as u16).into();
    let command = Command { nsid: 0xFFFF_FFFF, prp1: host.data_iova(0), cdw10, ..Command::EMPTY };
    host.admin(AdminOpcode::GET_LOG_PAGE, command)
}

fn the_mandatory_log_pages_can_be_read_and_others_are_refused(bench: &Bench) {
    let mut host = bench.raw();
    log_page(&mut host, LogPageId::ERROR_INFORMATION, 64).expect("the log is mandatory");
    log_page(&mut host, LogPageId::FIRMWARE_SLOT, 512).expect("the log is mandatory");
    log_page(&mut host, LogPageId::SMART_HEALTH, 512).expect("the log is mandatory");
    let (smart, _) = SmartHealth::read_from_prefix(&host.data()).expect("the log is 512 bytes");
    let kelvin = u16::from_le_bytes(smart.composite_temperature_kelvin);
    assert!(kelvin == 0 || (200..500).contains(&kelvin), "{kelvin} K");
    assert!(smart.available_spare_percent <= 100, "{} %", smart.available_spare_percent);
    let known = (StatusCode::INVALID_FIELD, Deviation::LogPageStatus);
    let unknown = log_page(&mut host, LogPageId(0x6F), 512);
    assert_refused_or(bench, "log page 6Fh", unknown, StatusCode::INVALID_LOG_PAGE, known);
}

fn event_requests_are_held_up_to_the_limit(bench: &Bench) {
    let mut host = bench.raw();
    let held = bench.facts().event_requests;
    let requests: Vec<_> = (0..held)
        .map(|_| host.admin_begin(AdminOpcode::ASYNCHRONOUS_EVENT_REQUEST, Command::EMPTY))
        .collect();
    let excess = host.admin_begin(AdminOpcode::ASYNCHRONOUS_EVENT_REQUEST, Command::EMPTY);
    // A device with something to tell answers some of the requests first.
    loop {
        let completion = host.admin_next();
        let (cid, status) = (completion.dw3.cid(), completion.dw3.status());
        if cid == excess {
            assert_eq!(status.code(), StatusCode::ASYNC_EVENT_REQUEST_LIMIT_EXCEEDED, "{status}");
            break;
        }
        assert!(requests.contains(&cid) && status.is_success(), "command {cid:#x}: {status}");
    }
}

fn an_abort_of_nothing_says_that_nothing_was_aborted(bench: &Bench) {
    let mut host = bench.raw();
    let cdw10 = AbortCdw10::new().with_sqid(0).with_cid(0x7777).into();
    let dw0 = host.admin(AdminOpcode::ABORT, Command { cdw10, ..Command::EMPTY }).expect("an Abort succeeds");
    assert_eq!(dw0 & 1, 1, "dword 0 says that no command was aborted");
}
