//! Image files: both engines, sizes, locking, errors of the file system.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use foliant_nvme_spec::{NvmOpcode, StatusCode};

use super::host::{DATA, Host, PAGE, flush, io_command};
use super::io::{exercise, pattern};
use crate::backing::file::{EngineKind, FileStore};
use crate::backing::{Durability, Extent, MediaError, Medium, Started, Work, Zeroing};
use crate::prp::Segment;
use crate::{
    Backing, Direct, EmulatedConfig, EmulatedController, EmulatedError, FileEngine, NamespaceConfig,
};

/// A path of its own that is removed with it.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self(std::env::temp_dir().join(format!("foliant-emulated-{}-{number}.img", std::process::id())))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    fn uri(&self, parameters: &str) -> String {
        format!("emu:{}?{parameters}", self.0.display())
    }

    fn open(&self, parameters: &str) -> Result<Arc<EmulatedController>, EmulatedError> {
        EmulatedController::new(EmulatedConfig::parse_uri(&self.uri(parameters))?)
    }

    fn refusal(&self, parameters: &str) -> String {
        self.open(parameters).expect_err(parameters).to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A test that never made the file has nothing to remove.
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn a_file_returns_what_was_written_with_either_engine_direct_or_cached() {
    for engine in ["uring", "plain"] {
        for direct in ["auto", "off"] {
            for (vwc, block) in [(1, 4096), (0, 512)] {
                let scratch = Scratch::new();
                let parameters = format!("size=64MiB&lba={block}&vwc={vwc}&engine={engine}&direct={direct}");
                exercise(&mut Host::uri(&scratch.uri(&parameters)), block);
                assert_eq!(fs::metadata(scratch.path()).unwrap().len(), 64 << 20, "{parameters}");
            }
        }
    }
}

#[test]
fn contents_outlive_the_controller() {
    let scratch = Scratch::new();
    let data = pattern(8192, 9);
    {
        let mut host = Host::uri(&scratch.uri("size=1MiB&lba=512&ns=2"));
        assert_eq!(host.write(11, &data, 512), StatusCode::SUCCESS);
    }
    let mut bytes = vec![0; 8192];
    File::open(scratch.path()).unwrap().read_exact_at(&mut bytes, 11 * 512).unwrap();
    assert!(bytes == data);
    let mut host = Host::uri(&scratch.uri("lba=512"));
    assert_eq!(host.read(11, 8192, 512), Ok(data));
}

#[test]
fn a_batch_of_commands_completes_whole_and_flush_runs_beside_it() {
    for engine in ["uring", "plain"] {
        let scratch = Scratch::new();
        let mut host = Host::uri(&scratch.uri(&format!("size=64MiB&engine={engine}")));
        let data = pattern(60 * PAGE, 77);
        host.fill(DATA, &data);
        for block in 0..60 {
            let write = host.transfer(NvmOpcode::WRITE, 3 * block, 1, DATA + block as usize * PAGE, PAGE);
            host.queue.submit(write);
        }
        host.queue.submit(flush());
        host.queue.ring();
        for _ in 0..61 {
            assert!(host.queue.wait().dw3.status().is_success());
        }
        for block in 0..60u64 {
            let at = block as usize * PAGE;
            assert!(host.read(3 * block, PAGE, PAGE).unwrap() == data[at..at + PAGE], "{engine} {block}");
        }
        assert_eq!(host.controller.stats().sq_batches, host.controller.stats().admin_commands + 61);
    }
}

#[test]
fn unaligned_memory_goes_through_a_bounce_buffer_under_o_direct() {
    for engine in ["uring", "plain"] {
        let scratch = Scratch::new();
        let mut host = Host::uri(&scratch.uri(&format!("size=1MiB&engine={engine}&direct=on")));
        let data = pattern(3 * PAGE, 4);
        host.fill(DATA + 20, &data);
        let write = host.transfer(NvmOpcode::WRITE, 1, 3, DATA + 20, 3 * PAGE);
        assert_eq!(host.code(write), StatusCode::SUCCESS);
        let read = host.transfer(NvmOpcode::READ, 1, 3, DATA + 5 * PAGE + 36, 3 * PAGE);
        assert_eq!(host.code(read), StatusCode::SUCCESS);
        assert!(host.bytes(DATA + 5 * PAGE + 36, 3 * PAGE) == data);
        assert!(host.read(1, 3 * PAGE, PAGE) == Ok(data));
        assert_eq!(host.controller.stats().bounced, 2, "{engine}");
    }
}

#[test]
fn deallocated_blocks_give_their_space_back() {
    let scratch = Scratch::new();
    let mut host = Host::uri(&scratch.uri("size=4MiB"));
    for slba in (0..1024).step_by(256) {
        assert_eq!(host.write(slba, &pattern(256 * PAGE, slba), PAGE), StatusCode::SUCCESS);
    }
    assert_eq!(host.code(flush()), StatusCode::SUCCESS);
    let before = fs::metadata(scratch.path()).unwrap().blocks();
    let mut zeroes = io_command(NvmOpcode::WRITE_ZEROES, 0, 1024);
    zeroes.cdw12 |= 1 << 25;
    assert_eq!(host.code(zeroes), StatusCode::SUCCESS);
    assert!(fs::metadata(scratch.path()).unwrap().blocks() < before / 2);
    assert_eq!(host.read(500, PAGE, PAGE), Ok(vec![0; PAGE]));
}

#[test]
fn the_file_must_be_what_was_asked_for() {
    let scratch = Scratch::new();
    assert!(scratch.refusal("lba=512").contains("add size="));
    assert!(!scratch.path().exists(), "a refusal must not create the file");
    drop(scratch.open("size=1MiB").unwrap());
    let message = scratch.refusal("size=2MiB");
    assert!(
        message.contains("1048576") && message.contains("2097152") && message.contains("leave size= out")
    );
    assert_eq!(fs::metadata(scratch.path()).unwrap().len(), 1 << 20, "an existing file keeps its size");
    assert!(scratch.open("lba=4096").is_ok());
    OpenOptions::new().write(true).open(scratch.path()).unwrap().set_len(5000).unwrap();
    assert!(scratch.refusal("lba=4096").contains("4096-byte blocks"));
    let config = EmulatedConfig::file("/dev/zero", NamespaceConfig::whole_file(512));
    assert!(matches!(EmulatedController::new(config), Err(EmulatedError::NotAFile { .. })));
}

#[test]
fn a_size_that_the_file_system_refuses_leaves_no_file_behind() {
    let scratch = Scratch::new();
    assert!(scratch.refusal("size=4194304T").contains("cannot create"));
    assert!(!scratch.path().exists());
}

#[test]
fn an_image_has_one_owner() {
    let scratch = Scratch::new();
    let owner = scratch.open("size=1MiB").unwrap();
    assert!(scratch.refusal("size=1MiB").contains("in use by another controller"));
    drop(owner);
    assert!(scratch.open("size=1MiB").is_ok());
}

/// A store over a device file of the system, whose failures are always to be had.
fn store_over(path: &str, engine: EngineKind) -> Medium {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    Medium::File(Arc::new(FileStore::over(file, Path::new(path), engine).unwrap()))
}

/// Carries one piece of work out to its end.
fn run(medium: &Medium, work: &Work<'_>) -> Result<(), MediaError> {
    let mut engine = medium.engine(4);
    if let Started::Done(result) = engine.start(0, work) {
        return result;
    }
    let mut results = Vec::new();
    engine.drain(|_, result| results.push(result));
    assert_eq!(results.len(), 1);
    results[0]
}

#[test]
fn a_full_file_system_is_capacity_exceeded_with_either_engine() {
    let mut data = vec![1u8; PAGE];
    let host = std::ptr::NonNull::new(data.as_mut_ptr()).unwrap();
    let segments = [Segment { iova: 0, host, len_bytes: PAGE }];
    let extent = Extent { offset: 0, len_bytes: PAGE as u64 };
    for engine in [EngineKind::IoUring, EngineKind::Plain] {
        let full = store_over("/dev/full", engine);
        let write = Work::Write { extent, segments: &segments, durability: Durability::Cached };
        assert_eq!(run(&full, &write), Err(MediaError::Full), "{engine:?}");
        // No holes on a device file, so zeroes are written, and fail like any write.
        let extents = [extent];
        let zero = Work::Zero { extents: &extents, zeroing: Zeroing::Keep, durability: Durability::Cached };
        assert_eq!(run(&full, &zero), Err(MediaError::Full), "{engine:?}");
        assert_eq!(run(&full, &Work::Flush { extent }), Err(MediaError::Write), "{engine:?}");
        assert_eq!(run(&full, &Work::Read { extent, segments: &segments }), Ok(()), "{engine:?}");
    }
    assert_eq!(MediaError::Full.status(), StatusCode::CAPACITY_EXCEEDED);
}

#[test]
fn a_file_truncated_from_outside_is_an_unrecovered_read_error() {
    for engine in ["uring", "plain"] {
        let scratch = Scratch::new();
        let mut host = Host::uri(&scratch.uri(&format!("size=1MiB&engine={engine}&direct=off")));
        assert_eq!(host.write(10, &pattern(8 * PAGE, 1), PAGE), StatusCode::SUCCESS);
        let file = OpenOptions::new().write(true).open(scratch.path()).unwrap();
        file.set_len(12 * PAGE as u64).unwrap();
        // Two of eight pages are left: a short read, then the end of the file.
        assert_eq!(host.read(10, 8 * PAGE, PAGE), Err(StatusCode::UNRECOVERED_READ_ERROR), "{engine}");
        assert!(host.read(10, 2 * PAGE, PAGE).is_ok());
    }
}

#[test]
fn io_uring_has_a_wakeup_descriptor_and_plain_calls_need_none() {
    for (engine, has_fd) in [(FileEngine::IoUring, true), (FileEngine::Plain, false)] {
        let scratch = Scratch::new();
        let backing = Backing::File { path: scratch.path().to_owned(), direct: Direct::Auto, engine };
        let namespaces = vec![NamespaceConfig::new(1 << 20, 4096)];
        let host = Host::boot(EmulatedConfig { backing, namespaces, ..EmulatedConfig::null(4096, 4096) });
        assert_eq!(host.queue.drive.wakeup_fd().is_some(), has_fd, "{engine:?}");
    }
}

#[test]
fn a_reset_waits_for_what_the_kernel_is_doing() {
    let scratch = Scratch::new();
    let controller = scratch.open("size=64MiB&engine=uring").unwrap();
    let mut host = Host::attach(Arc::clone(&controller));
    let data = pattern(32 * PAGE, 3);
    host.fill(DATA, &data);
    for block in 0..32 {
        let write = host.transfer(NvmOpcode::WRITE, block, 1, DATA + block as usize * PAGE, PAGE);
        host.queue.submit(write);
    }
    host.queue.ring();
    host.queue.pump();
    host.write_u32(foliant_nvme_spec::registers::Register::Cc, 0);
    // Nothing is in the kernel any more: what was fetched is on the medium.
    let mut image = vec![0; data.len()];
    controller.read_image(1, 0, &mut image).unwrap();
    assert!(image == data);
    assert_eq!(host.queue.pump().posted, 0);
}

#[test]
fn more_commands_than_the_ring_holds_all_complete() {
    let scratch = Scratch::new();
    let mut host = Host::uri(&scratch.uri("size=16MiB&entries=4096&engine=uring"));
    let mut queue = host.create_queue_pair(2, 4096);
    for slba in 0..3000 {
        let read = host.transfer(NvmOpcode::READ, slba, 1, DATA + slba as usize * PAGE, PAGE);
        queue.submit(read);
    }
    queue.ring();
    for _ in 0..3000 {
        assert!(queue.wait().dw3.status().is_success());
    }
}

#[test]
fn commands_complete_although_the_thread_that_submitted_them_has_ended() {
    let scratch = Scratch::new();
    let mut host = Host::uri(&scratch.uri("size=64MiB&engine=uring&vwc=0"));
    let data = pattern(32 * PAGE, 8);
    host.fill(DATA, &data);
    for block in 0..32 {
        let write = host.transfer(NvmOpcode::WRITE, block, 1, DATA + block as usize * PAGE, PAGE);
        host.queue.submit(write);
    }
    host.queue.ring();
    let mut drive = host.transport.queue_drive(1).unwrap();
    std::thread::spawn(move || drive.pump()).join().unwrap();
    for _ in 0..32 {
        assert!(host.queue.wait().dw3.status().is_success());
    }
    assert!(host.read(0, data.len(), PAGE) == Ok(data));
}
