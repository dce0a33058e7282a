//! Registers, enabling, Identify, queue management, features, logs, shutdown.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use foliant_nvme_spec::command::{DeleteQueueCdw10, GetLogPageCdw10, IdentifyCdw10, Psdt};
use foliant_nvme_spec::feature::{FeatureId, NumberOfQueues};
use foliant_nvme_spec::identify::{Cns, Controller, Namespace, NamespaceList};
use foliant_nvme_spec::log::{AsynchronousEvent, ErrorInformation, FirmwareSlot, LogPageId, SmartHealth};
use foliant_nvme_spec::registers::{Cap, Cc, Register, Shn, Shst, Vs};
use foliant_nvme_spec::{AdminOpcode, Command, NvmOpcode, StatusCode};
use foliant_nvme_transport::TransportError;
use zerocopy::FromBytes;

use super::host::{DATA, Host, PAGE, admin_command, create_cq, create_sq, io_command};
use crate::{EmulatedConfig, EmulatedController, EmulatedError, NamespaceConfig};

fn identify(host: &Host, cns: Cns, nsid: u32) -> Command {
    Command {
        nsid,
        prp1: host.iova + DATA as u64,
        cdw10: IdentifyCdw10::new().with_cns(cns).into(),
        ..admin_command(AdminOpcode::IDENTIFY)
    }
}

fn identified<T: FromBytes>(host: &mut Host, cns: Cns, nsid: u32) -> Result<T, StatusCode> {
    let command = identify(host, cns, nsid);
    host.admin(command)?;
    Ok(T::read_from_bytes(&host.bytes(DATA, PAGE)).unwrap())
}

fn log_page<T: FromBytes>(host: &mut Host, lid: LogPageId) -> T {
    let numdl_z = (size_of::<T>() / 4 - 1) as u16;
    let command = Command {
        prp1: host.iova + DATA as u64,
        cdw10: GetLogPageCdw10::new().with_lid(lid.0).with_numdl_z(numdl_z).into(),
        ..admin_command(AdminOpcode::GET_LOG_PAGE)
    };
    assert_eq!(host.admin(command), Ok(0));
    T::read_from_bytes(&host.bytes(DATA, size_of::<T>())).unwrap()
}

fn feature(opcode: AdminOpcode, id: FeatureId, cdw11: u32) -> Command {
    Command { cdw10: id.0.into(), cdw11, ..admin_command(opcode) }
}

#[test]
fn registers_tell_what_the_configuration_allows() {
    let host = Host::uri("emu:null?size=1GiB&entries=512");
    let cap = Cap::from(host.transport.read_u64(Register::Cap.offset()).unwrap());
    assert_eq!((cap.mqes_z(), cap.cqr(), cap.mpsmin(), cap.mpsmax()), (511, true, 0, 0));
    assert!(cap.css().nvm() && cap.to() > 0);
    let vs = Vs::from(host.transport.read_u32(Register::Vs.offset()).unwrap());
    assert_eq!(vs.to_string(), "1.4.0");
    let outside = host.transport.read_u32(0x10_0000);
    assert!(matches!(outside, Err(TransportError::RegisterOutOfRange { .. })));
    assert!(host.transport.read_u32(2).is_err() && host.transport.read_u64(4).is_err());
}

#[test]
fn ready_follows_enable_and_a_reset_forgets_queues() {
    let mut host = Host::uri("emu:ram?size=1MiB");
    let read = host.transfer(NvmOpcode::READ, 0, 1, DATA, PAGE);
    assert!(host.csts().rdy());
    host.write_u32(Register::Cc, 0);
    assert!(!host.csts().rdy());
    host.queue.submit(read);
    host.queue.ring();
    assert_eq!(host.queue.pump(), foliant_nvme_transport::Pumped::default());
    host.enable();
    assert_eq!(host.queue.pump().fetched, 0, "queue 1 doesn't exist any more");
    host.queue = host.create_queue_pair(1, 16);
    assert_eq!(host.code(read), StatusCode::SUCCESS);
}

#[test]
fn enabling_over_unmapped_admin_queues_is_fatal_until_a_reset() {
    let controller = EmulatedController::new(EmulatedConfig::null(1 << 20, 4096)).unwrap();
    let mut host = Host::attach_disabled(controller);
    host.transport.write_u64(Register::Asq.offset(), 0x5000).unwrap();
    host.write_u32(Register::Cc, Cc::new().with_en(true).into());
    assert!(host.csts().cfs() && !host.csts().rdy());
    host.write_u32(Register::Cc, 0);
    assert!(!host.csts().cfs());
    host.transport.write_u64(Register::Asq.offset(), host.iova).unwrap();
    host.enable();
}

#[test]
fn identify_describes_controller_and_namespaces() {
    let config = EmulatedConfig {
        namespaces: vec![NamespaceConfig::new(1 << 20, 512), NamespaceConfig::new(1 << 21, 4096)],
        noiob_blocks: 64,
        awupf_z: 7,
        mdts: 5,
        serial: "S123".to_owned(),
        ..EmulatedConfig::ram(4096, 4096)
    };
    let mut host = Host::boot(config);
    let controller: Controller = identified(&mut host, Cns::CONTROLLER, 0).unwrap();
    assert_eq!(&controller.sn[..5], b"S123 ");
    assert_eq!((controller.mdts, controller.nn, controller.awupf_z), (5, 2, 7));
    assert!(controller.vwc.present() && controller.oncs.write_zeroes() && !controller.oncs.compare());
    let second: Namespace = identified(&mut host, Cns::NAMESPACE, 2).unwrap();
    assert_eq!((second.nsze, second.noiob), (512, 64));
    assert_eq!(second.formatted_lba().unwrap().lbads(), 12);
    let list: NamespaceList = identified(&mut host, Cns::ACTIVE_NAMESPACES, 1).unwrap();
    assert!(list.active().eq([2]));
    let descriptors: [u8; 4096] = identified(&mut host, Cns::NAMESPACE_DESCRIPTORS, 1).unwrap();
    assert_eq!(descriptors[..2], [2, 16]);
    for (cns, nsid, code) in [
        (Cns::NAMESPACE, 3, StatusCode::INVALID_NAMESPACE),
        (Cns::NAMESPACE, u32::MAX, StatusCode::INVALID_NAMESPACE),
        (Cns::ACTIVE_NAMESPACES, u32::MAX, StatusCode::INVALID_NAMESPACE),
        (Cns(0x77), 0, StatusCode::INVALID_FIELD),
    ] {
        let command = identify(&host, cns, nsid);
        assert_eq!(host.admin(command), Err(code), "{cns} {nsid}");
    }
}

#[test]
fn queue_commands_are_refused_with_the_right_status() {
    let mut host = Host::uri("emu:null?size=1GiB&queues=4&entries=128");
    let at = host.iova + 6 * 1024 * 1024;
    let delete = |opcode, qid| Command {
        cdw10: DeleteQueueCdw10::new().with_qid(qid).into(),
        ..admin_command(opcode)
    };
    let (delete_sq, delete_cq) =
        (AdminOpcode::DELETE_IO_SUBMISSION_QUEUE, AdminOpcode::DELETE_IO_COMPLETION_QUEUE);
    let scattered = Command { cdw11: 0, ..create_cq(2, 16, at) };
    let cases: [(&str, Command, StatusCode); 17] = [
        ("cq 0", create_cq(0, 16, at), StatusCode::INVALID_QUEUE_IDENTIFIER),
        ("cq 5", create_cq(5, 16, at), StatusCode::INVALID_QUEUE_IDENTIFIER),
        ("cq twice", create_cq(1, 16, at), StatusCode::INVALID_QUEUE_IDENTIFIER),
        ("cq of one", create_cq(2, 1, at), StatusCode::INVALID_QUEUE_SIZE),
        ("cq too large", create_cq(2, 129, at), StatusCode::INVALID_QUEUE_SIZE),
        ("cq crooked", create_cq(2, 16, at + 64), StatusCode::PRP_OFFSET_INVALID),
        ("cq unmapped", create_cq(2, 16, 0x4000), StatusCode::DATA_TRANSFER_ERROR),
        ("cq scattered", scattered, StatusCode::INVALID_FIELD),
        ("sq twice", create_sq(1, 16, at, 1), StatusCode::INVALID_QUEUE_IDENTIFIER),
        ("sq of one", create_sq(2, 1, at, 1), StatusCode::INVALID_QUEUE_SIZE),
        ("sq to cq 3", create_sq(2, 16, at, 3), StatusCode::COMPLETION_QUEUE_INVALID),
        ("sq to cq 9", create_sq(2, 16, at, 9), StatusCode::INVALID_QUEUE_IDENTIFIER),
        ("delete sq 2", delete(delete_sq, 2), StatusCode::INVALID_QUEUE_IDENTIFIER),
        ("delete cq 2", delete(delete_cq, 2), StatusCode::INVALID_QUEUE_IDENTIFIER),
        ("delete cq 1 first", delete(delete_cq, 1), StatusCode::INVALID_QUEUE_DELETION),
        ("opcode", admin_command(AdminOpcode::FORMAT_NVM), StatusCode::INVALID_OPCODE),
        (
            "sgl",
            {
                let mut command = identify(&host, Cns::CONTROLLER, 0);
                command.cdw0.set_psdt(Psdt::Sgl);
                command
            },
            StatusCode::INVALID_FIELD,
        ),
    ];
    for (name, command, code) in cases {
        assert_eq!(host.admin(command), Err(code), "{name}");
    }
    assert_eq!(host.admin(delete(delete_sq, 1)), Ok(0));
    assert_eq!(host.admin(delete(delete_cq, 1)), Ok(0));
    host.queue = host.create_queue_pair(1, 128);
    let read = host.transfer(NvmOpcode::READ, 0, 1, DATA, PAGE);
    assert_eq!(host.code(read), StatusCode::SUCCESS);
}

#[test]
fn features_answer_and_refuse() {
    let mut host = Host::uri("emu:ram?size=1MiB&queues=4");
    let (get, set) = (AdminOpcode::GET_FEATURES, AdminOpcode::SET_FEATURES);
    let granted = NumberOfQueues::new().with_nsq_z(3).with_ncq_z(3);
    assert_eq!(host.admin(feature(get, FeatureId::NUMBER_OF_QUEUES, 0)), Ok(granted.into()));
    let wanted = NumberOfQueues::new().with_nsq_z(99).with_ncq_z(99).into();
    let set_queues = feature(set, FeatureId::NUMBER_OF_QUEUES, wanted);
    assert_eq!(host.admin(set_queues), Err(StatusCode::COMMAND_SEQUENCE_ERROR));
    host.write_u32(Register::Cc, 0);
    host.enable();
    assert_eq!(host.admin(set_queues), Ok(granted.into()));
    let all_ones = feature(set, FeatureId::NUMBER_OF_QUEUES, u32::MAX);
    assert_eq!(host.admin(all_ones), Err(StatusCode::INVALID_FIELD));

    let cache = FeatureId::VOLATILE_WRITE_CACHE;
    assert_eq!(host.admin(feature(get, cache, 0)), Ok(1));
    assert_eq!(host.admin(feature(set, cache, 0)), Ok(0));
    assert_eq!(host.admin(feature(get, cache, 0)), Ok(0));
    let mut saved = feature(set, cache, 1);
    saved.cdw10 |= 1 << 31;
    assert_eq!(host.admin(saved), Err(StatusCode::FEATURE_NOT_SAVEABLE));
    assert_eq!(host.admin(feature(set, FeatureId::ARBITRATION, 5)), Ok(0));
    assert_eq!(host.admin(feature(get, FeatureId::ARBITRATION, 0)), Ok(5));
    assert_eq!(host.admin(feature(get, FeatureId(0xEE), 0)), Err(StatusCode::INVALID_FIELD));

    let mut without = Host::uri("emu:ram?size=1MiB&vwc=0");
    assert_eq!(without.admin(feature(get, cache, 0)), Err(StatusCode::INVALID_FIELD));
    let controller: Controller = identified(&mut without, Cns::CONTROLLER, 0).unwrap();
    assert!(!controller.vwc.present());
}

#[test]
fn logs_hold_errors_counters_and_firmware() {
    let mut host = Host::uri("emu:ram?size=1MiB&lba=512");
    assert_eq!(host.write(0, &[1; 1024], 512), StatusCode::SUCCESS);
    let status = host.io(io_command(NvmOpcode::READ, 5000, 1));
    assert!(status.m());
    let errors: [ErrorInformation; 64] = log_page(&mut host, LogPageId::ERROR_INFORMATION);
    assert_eq!((errors[0].error_count, errors[0].lba, errors[0].sqid), (1, 5000, 1));
    assert_eq!(errors[1].error_count, 0);
    let smart: SmartHealth = log_page(&mut host, LogPageId::SMART_HEALTH);
    assert_eq!((smart.host_write_commands.get(), smart.error_log_entries.get()), (1, 1));
    assert_eq!((smart.data_units_written.get(), smart.power_cycles.get()), (1, 1));
    let firmware: FirmwareSlot = log_page(&mut host, LogPageId::FIRMWARE_SLOT);
    assert_eq!(&firmware.frs[0], b"1.0     ");
    let unknown = Command { cdw10: 0xC0, ..admin_command(AdminOpcode::GET_LOG_PAGE) };
    assert_eq!(host.admin(unknown), Err(StatusCode::INVALID_LOG_PAGE));
}

#[test]
fn an_event_request_is_held_until_a_doorbell_goes_wrong() {
    let mut host = Host::uri("emu:null?size=1GiB");
    let request = admin_command(AdminOpcode::ASYNCHRONOUS_EVENT_REQUEST);
    let cid = host.admin_queue().submit(request);
    host.admin_queue().ring();
    assert_eq!(host.admin_queue().pump().posted, 0);
    host.queue.tail_doorbell().store(9999, Ordering::Release);
    host.queue.pump();
    let completion = host.admin_queue().wait();
    assert_eq!(completion.dw3.cid(), cid);
    let event = AsynchronousEvent::from(completion.dw0);
    assert_eq!((event.event_type(), event.event_information()), (0, 1));
    assert_eq!(event.lid(), LogPageId::ERROR_INFORMATION.0);
}

#[test]
fn a_shutdown_completes_and_stops_the_queues() {
    let mut host = Host::uri("emu:ram?size=1MiB");
    let cc = Cc::new().with_en(true).with_iosqes(6).with_iocqes(4);
    host.write_u32(Register::Cc, cc.with_shn(Shn::Normal).into());
    assert_eq!(host.csts().shst(), Shst::Complete);
    let read = host.transfer(NvmOpcode::READ, 0, 1, DATA, PAGE);
    host.queue.submit(read);
    host.queue.ring();
    assert_eq!(host.queue.pump().fetched, 0);
    host.write_u32(Register::Cc, 0);
    assert_eq!(host.csts().shst(), Shst::Normal);
}

#[test]
fn one_attachment_at_a_time_and_contents_stay() {
    let controller = EmulatedController::new(EmulatedConfig::ram(1 << 20, 4096)).unwrap();
    let mut host = Host::attach(Arc::clone(&controller));
    assert!(matches!(controller.attach(), Err(EmulatedError::AlreadyAttached { .. })));
    assert_eq!(host.write(3, &[5; PAGE], PAGE), StatusCode::SUCCESS);
    drop(host);
    let mut host = Host::attach(controller);
    assert_eq!(host.read(3, PAGE, PAGE), Ok(vec![5; PAGE]));
    assert_eq!(host.controller.stats().writes, 1);
}

#[test]
fn without_bus_mastering_the_device_stands_still() {
    let mut host = Host::uri("emu:ram?size=1MiB");
    let read = host.transfer(NvmOpcode::READ, 0, 1, DATA, PAGE);
    host.queue.submit(read);
    host.queue.ring();
    host.transport.stop_dma().unwrap();
    assert_eq!(host.queue.pump().fetched, 0);
    assert!(host.queue.take().is_none());
}
