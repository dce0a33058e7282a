//! The raw driver as the yardstick: the commands of a drain, prepared beforehand, and nothing else.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use foliant_nvme::{
    Controller, ControllerOptions, DmaBuffer, Fua, Io, Lba, Namespace, Payload, QueuePair, Segment,
};
use foliant_nvme_emulated::EmulatedController;

use crate::measure::ThreadClock;
use crate::walk::PAGE;

/// A queue pair on an emulated device, and memory for every page.
pub struct RawDriver {
    queue: QueuePair<Run>,
    namespace: Namespace,
    memory: Arc<Memory>,
    pages_per_command: u32,
    /// Outlives the queue pair.
    _controller: Controller,
}

/// Pages in DMA memory.
struct Memory {
    buffer: DmaBuffer,
    /// By page: which 4 KiB of the buffer.
    frame_of: Vec<u32>,
    /// By command: its segments, frames that follow each other as one.
    segments: Vec<Vec<Segment>>,
}

/// The payload of a command: what the command of this number writes, or nothing for a flush.
struct Run {
    memory: Arc<Memory>,
    command: Option<u32>,
}

// SAFETY: the segments lie in `memory`'s buffer, which the payload keeps allocated, and `RawDriver::dirty` changes
// the bytes only while it is the only owner of `memory`, when no payload is with the queue pair.
#[expect(unsafe_code, reason = "a payload vouches for the memory that the device reads")]
unsafe impl Payload for Run {
    #[inline]
    fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        let segments = self.command.map(|command| &self.memory.segments[command as usize]);
        segments.into_iter().flatten().copied()
    }
}

impl RawDriver {
    /// Opens the device and prepares the commands that write all pages of `order` in ascending order, each of the largest
    /// size. The pages' memory lies in that order.
    pub fn open(device: &EmulatedController, order: &[u32]) -> Result<Self> {
        let options =
            ControllerOptions { io_queue_pairs: 1, arena_bytes: order.len() * PAGE, ..Default::default() };
        let controller = Controller::open(device.attach()?, &options)?;
        let namespace = controller.namespace(1).context("the device has no namespace 1")?.clone();
        let pages_per_command = namespace.max_transfer_bytes() / PAGE as u32;
        let buffer = controller.arena().allocate(order.len() * PAGE)?;
        let mut frame_of = vec![0; order.len()];
        for (frame, &page) in (0..).zip(order) {
            frame_of[page as usize] = frame;
        }
        let segments =
            frame_of.chunks(pages_per_command as usize).map(|frames| segments(&buffer, frames)).collect();
        let memory = Arc::new(Memory { buffer, frame_of, segments });
        let queue = controller.queue_pair()?;
        Ok(Self { queue, namespace, memory, pages_per_command, _controller: controller })
    }

    /// Commands of a drain, the flush not counted.
    pub fn commands(&self) -> u64 {
        self.memory.segments.len() as u64
    }

    /// Fills the memory of the pages in this order, as their writers would.
    ///
    /// # Panics
    /// While a drain is under way.
    pub fn dirty(&mut self, order: &[u32], fill: &[u8; PAGE]) {
        let memory = Arc::get_mut(&mut self.memory).expect("every command of the last drain has completed");
        for &page in order {
            let start = memory.frame_of[page as usize] as usize * PAGE;
            memory.buffer.as_mut_slice()[start..start + PAGE].copy_from_slice(fill);
        }
    }

    /// Writes everything, `batch` commands a doorbell, then flushes; returns the processor time in nanoseconds.
    pub fn drain(&mut self, batch: u32) -> Result<f64> {
        let batch = batch.min(self.queue.free_commands());
        let clock = ThreadClock::start();
        let commands = self.memory.segments.len() as u32;
        for first in (0..commands).step_by(batch as usize) {
            for command in first..commands.min(first + batch) {
                self.submit_write(command)?;
            }
            self.complete()?;
        }
        self.submit(Io::Flush, None)?;
        self.complete()?;
        Ok(clock.elapsed_ns())
    }

    fn submit_write(&mut self, command: u32) -> Result<()> {
        let first = command * self.pages_per_command;
        let blocks = self.pages_per_command.min(self.memory.frame_of.len() as u32 - first);
        let lba = Lba(u64::from(first));
        self.submit(Io::Write { lba, blocks, fua: Fua::No }, Some(command))
    }

    fn submit(&mut self, io: Io, command: Option<u32>) -> Result<()> {
        let run = Run { memory: self.memory.clone(), command };
        self.queue.submit(&self.namespace, io, run).map_err(|rejected| anyhow!(rejected.reason))
    }

    /// Rings, and waits until everything submitted has completed.
    fn complete(&mut self) -> Result<()> {
        self.queue.ring();
        while self.queue.in_flight() > 0 {
            self.queue.pump();
            let mut failed = None;
            self.queue.poll(u32::MAX, |completion| failed = failed.or(completion.result.err()))?;
            if let Some(error) = failed {
                return Err(error.into());
            }
        }
        Ok(())
    }
}

/// The segments of a command over these frames. A page is a block here.
fn segments(buffer: &DmaBuffer, frames: &[u32]) -> Vec<Segment> {
    let neighbours = frames.chunk_by(|&frame, &next| next == frame + 1);
    let segment = |run: &[u32]| Segment {
        iova: buffer.iova().offset(u64::from(run[0]) * PAGE as u64),
        len_bytes: (run.len() * PAGE) as u32,
    };
    neighbours.map(segment).collect()
}
