//! The last check of a replay: every sector of the medium, read without any engine code, and of an emulated device
//! without any driver code either.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use foliant_nvme::{Controller, ControllerOptions, DmaBuffer, Io, Lba, Namespace, QueuePair, Transport};
use foliant_nvme_emulated::EmulatedController;

use crate::error::Error;
use crate::image::{CHUNK_BYTES, data_ranges};
use crate::progress::Progress;
use crate::replay::model::{Checked, Model};
use crate::replay::stamp::SECTOR_BYTES;

const PLACE: &str = "on the image";
const SECTOR: u64 = SECTOR_BYTES as u64;

/// Checks the first `len_bytes` bytes of a raw image file with plain file reads. Holes aren't read: they are zeroes.
pub(crate) fn audit_file(model: &Model, path: &Path, len_bytes: u64) -> Result<Checked, Error> {
    let file = File::open(path).map_err(Error::file("open", path))?;
    let ranges = data_ranges(&file, len_bytes).map_err(Error::file("look for data in", path))?;
    let read =
        |offset, chunk: &mut [u8]| file.read_exact_at(chunk, offset).map_err(Error::file("read back", path));
    audit(model, len_bytes, &ranges, read)
}

/// Checks the first `len_bytes` bytes of namespace 1 of an emulated device in memory, past its queues.
pub(crate) fn audit_memory(
    model: &Model,
    device: &EmulatedController,
    len_bytes: u64,
) -> Result<Checked, Error> {
    audit(model, len_bytes, std::slice::from_ref(&(0..len_bytes)), |offset, chunk| {
        Ok(device.read_image(1, offset, chunk)?)
    })
}

/// Checks what was written to the first `len_bytes` bytes of namespace 1 of a drive, by the driver alone. What was never
/// written isn't read: nobody knows what the drive held.
pub(crate) fn audit_drive(
    model: &Model,
    transport: Arc<dyn Transport>,
    len_bytes: u64,
) -> Result<Checked, Error> {
    let options = ControllerOptions {
        io_queue_pairs: 1,
        // A chunk may have to be split into pages.
        io_queue_entries: 512,
        arena_bytes: CHUNK_BYTES,
        ..ControllerOptions::default()
    };
    let controller = Controller::open(transport, &options)?;
    let namespace = controller.namespace(1).cloned().ok_or_else(|| Error::Option {
        option: "--device",
        value: controller.identity().model.clone(),
        reason: "it has no namespace 1 any more".to_owned(),
    })?;
    let mut queue = controller.queue_pair()?;
    let sectors = model.written_ranges().into_iter();
    let bytes = sectors.map(|sectors| sectors.start * SECTOR..(sectors.end * SECTOR).min(len_bytes));
    let ranges: Vec<_> = bytes.collect();
    let checked = audit(model, len_bytes, &ranges, |offset, chunk| {
        let buffer = controller.arena().allocate(chunk.len())?;
        chunk.copy_from_slice(read_drive(&mut queue, &namespace, offset, buffer)?.as_slice());
        Ok(())
    })?;
    drop(queue);
    controller.shutdown()?;
    Ok(checked)
}

/// Fills `buffer` from byte `offset` of a drive on, both whole blocks, and waits for that.
fn read_drive(
    queue: &mut QueuePair<DmaBuffer>,
    namespace: &Namespace,
    offset: u64,
    buffer: DmaBuffer,
) -> Result<DmaBuffer, Error> {
    const SILENCE_MAX: Duration = Duration::from_secs(30);
    let block = u64::from(namespace.block_bytes());
    let (lba, blocks) = (Lba(offset / block), (buffer.len_bytes() as u64 / block) as u32);
    queue.submit(namespace, Io::Read { lba, blocks }, buffer).map_err(|rejected| rejected.reason)?;
    queue.ring();
    let begin = Instant::now();
    let mut ended = None;
    while ended.is_none() {
        queue.pump();
        queue.poll(1, |completion| ended = Some((completion.payload, completion.result)))?;
        if begin.elapsed() > SILENCE_MAX {
            let in_flight = queue.in_flight();
            return Err(Error::DeviceSilent { seconds: SILENCE_MAX.as_secs(), in_flight });
        }
    }
    let (buffer, result) = ended.expect("the loop ends with it");
    result?;
    Ok(buffer)
}

/// Checks every sector below `len_bytes`: those in `ranges`, which ascend, by reading them, all others as zeroes.
fn audit(
    model: &Model,
    len_bytes: u64,
    ranges: &[Range<u64>],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), Error>,
) -> Result<Checked, Error> {
    let progress = Progress::bytes(ranges.iter().map(|range| range.end - range.start).sum());
    progress.stage("image");
    let mut checked = Checked::default();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut hole_start = 0;
    for range in ranges {
        model.check_zeroes(hole_start / SECTOR..range.start / SECTOR, PLACE, &mut checked);
        hole_start = range.end;
        let mut at = range.start;
        while at < range.end {
            let chunk = &mut chunk[..CHUNK_BYTES.min((range.end - at) as usize)];
            read(at, chunk)?;
            model.check(at / SECTOR, chunk, PLACE, &mut checked);
            at += chunk.len() as u64;
            progress.advance(chunk.len() as u64);
        }
    }
    model.check_zeroes(hole_start / SECTOR..len_bytes / SECTOR, PLACE, &mut checked);
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::model::Unwritten;

    /// A model with sectors 0 and 100 written, and the image that is right for it.
    fn model_and_image() -> (Model, tempfile::NamedTempFile) {
        let mut model = Model::new(Unwritten::Zeroes);
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        for (sector, generation) in [(0, 1), (100, 2)] {
            let mut data = [0; SECTOR_BYTES];
            model.write(sector, generation, &mut data);
            image.as_file().write_all_at(&data, sector * SECTOR).unwrap();
        }
        (model, image)
    }

    #[test]
    fn every_sector_of_a_right_image_is_counted() {
        let (model, image) = model_and_image();
        let checked = audit_file(&model, image.path(), 1 << 20).unwrap();
        assert_eq!((checked.written, checked.zeroes, checked.mismatches), (2, 2046, 0));
    }

    #[test]
    fn a_stray_byte_and_a_lost_sector_are_found() {
        let (model, image) = model_and_image();
        image.as_file().write_all_at(b"x", 900 * SECTOR + 511).unwrap();
        image.as_file().write_all_at(&[0; SECTOR_BYTES], 0).unwrap();
        let checked = audit_file(&model, image.path(), 1 << 20).unwrap();
        assert_eq!((checked.written, checked.mismatches), (1, 2), "{:?}", checked.described);
        assert!(checked.described[0].contains("sector 0 must hold request 1, but holds zeroes"));
    }
}
