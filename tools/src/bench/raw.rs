//! The driver alone: one thread, one queue pair, buffers that go round.

use std::time::{Duration, Instant};

use foliant_nvme::{
    Controller, ControllerOptions, DmaBuffer, Fua, Io, Lba, Namespace, QueuePair, SubmitError,
};

use super::{Measured, workload::Accesses, workload::Direction, workload::Workload};
use crate::cli::BenchOptions;
use crate::error::Error;
use crate::latency::Latencies;
use crate::progress::Progress;
use crate::size::ByteSize;
use crate::target::Target;

/// A device that completes nothing for this long has failed.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Empty polls before the clock is looked at.
const IDLE_POLLS: u32 = 1024;
/// Memory for all buffers together.
const BUFFERS_BYTES_MAX: ByteSize = ByteSize(1 << 30);
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// Depth when none is given.
const DEPTH: u16 = 32;

pub(crate) fn measure(options: &BenchOptions, target: &Target) -> Result<Measured, Error> {
    let depth = options.depth.unwrap_or(DEPTH);
    let controller = open(options, target, depth)?;
    let namespace = controller.namespaces().first().cloned().ok_or_else(|| Error::Option {
        option: "the device",
        value: target.uri().to_owned(),
        reason: "it has no namespace that the driver can serve; RUST_LOG=warn says why".to_owned(),
    })?;
    let workload = Workload::new(options, &namespace, depth)?;
    let mut queue = controller.queue_pair::<DmaBuffer>()?;
    let mut run = Run::new(&controller, &namespace, &workload)?;
    run.measure(&mut queue, &workload).map_err(|error| target.diagnose(error, None))?;
    let measured = Measured {
        reads: run.reads,
        writes: run.writes,
        elapsed: run.elapsed,
        latencies: run.latencies,
        doorbells: Some(queue.stats().sq_doorbells),
        cache: None,
        shards: None,
        workload,
    };
    drop((queue, run.free));
    controller.shutdown()?;
    Ok(measured)
}

fn open(options: &BenchOptions, target: &Target, depth: u16) -> Result<Controller, Error> {
    let buffer_bytes = options.block.0.next_multiple_of(foliant::PAGE_BYTES as u64) as usize;
    let arena_bytes = buffer_bytes.saturating_mul(depth.into());
    if arena_bytes as u64 > BUFFERS_BYTES_MAX.0 {
        let needed = ByteSize(arena_bytes as u64);
        return Err(Error::Option {
            option: "--depth",
            value: format!("{depth} with --block {}", options.block),
            reason: format!(
                "needs {needed} of buffers, and {BUFFERS_BYTES_MAX} is the most; lower one of them"
            ),
        });
    }
    let entries = (depth + 1).max(256).next_power_of_two();
    let options = ControllerOptions {
        io_queue_pairs: 1,
        io_queue_entries: entries,
        arena_bytes,
        ..ControllerOptions::default()
    };
    Ok(Controller::open(target.open()?.attach()?, &options)?)
}

/// A measurement under way.
struct Run<'a> {
    namespace: &'a Namespace,
    blocks: u32,
    accesses: Accesses,
    /// Buffers that no command names.
    free: Vec<DmaBuffer>,
    clock: SubmitTimes,
    latencies: Latencies,
    reads: u64,
    writes: u64,
    elapsed: Duration,
}

impl<'a> Run<'a> {
    fn new(controller: &Controller, namespace: &'a Namespace, workload: &Workload) -> Result<Self, Error> {
        let allocate = |_| {
            let mut buffer = controller.arena().allocate(workload.block_bytes as usize)?;
            // Something that isn't zero, so that a write is a write to any device.
            buffer.as_mut_slice().fill(0xA5);
            Ok(buffer)
        };
        let free = (0..workload.depth).map(allocate).collect::<Result<Vec<_>, Error>>()?;
        Ok(Self {
            namespace,
            blocks: (workload.block_bytes / u64::from(namespace.block_bytes())) as u32,
            accesses: workload.accesses(0, 1),
            clock: SubmitTimes::new(&free),
            free,
            latencies: Latencies::new(),
            reads: 0,
            writes: 0,
            elapsed: Duration::ZERO,
        })
    }

    /// Keeps `depth` accesses in flight until the time is over, then waits for the last.
    fn measure(&mut self, queue: &mut QueuePair<DmaBuffer>, workload: &Workload) -> Result<(), Error> {
        let progress = Progress::time(workload.duration);
        progress.stage("raw driver");
        let begin = Instant::now();
        let (mut now, mut told, mut heard) = (begin, begin, begin);
        while now - begin < workload.duration {
            self.submit_all(queue, now)?;
            now = self.wait(queue, &mut heard)?;
            if now - told >= PROGRESS_INTERVAL {
                told = now;
                progress.set((now - begin).as_millis() as u64);
            }
        }
        self.elapsed = now - begin;
        let (reads, writes, latencies) = (self.reads, self.writes, self.latencies.clone());
        while queue.in_flight() > 0 {
            self.wait(queue, &mut heard)?;
        }
        // What came after the end is waited for, and not counted.
        (self.reads, self.writes, self.latencies) = (reads, writes, latencies);
        Ok(())
    }

    /// Submits with every free buffer and rings once.
    fn submit_all(&mut self, queue: &mut QueuePair<DmaBuffer>, now: Instant) -> Result<(), Error> {
        while let Some(buffer) = self.free.pop() {
            let (direction, index) = self.accesses.next();
            let lba = Lba(index * u64::from(self.blocks));
            let blocks = self.blocks;
            let io = match direction {
                Direction::Read => Io::Read { lba, blocks },
                Direction::Write => Io::Write { lba, blocks, fua: Fua::No },
            };
            self.clock.set(&buffer, direction, now);
            match queue.submit(self.namespace, io, buffer) {
                Ok(()) => {}
                Err(rejected) if rejected.reason == SubmitError::Full && queue.in_flight() > 0 => {
                    self.free.push(rejected.payload);
                    break;
                }
                Err(rejected) => return Err(rejected.reason.into()),
            }
        }
        queue.ring();
        Ok(())
    }

    /// Polls until something has completed; returns when that was.
    fn wait(&mut self, queue: &mut QueuePair<DmaBuffer>, heard: &mut Instant) -> Result<Instant, Error> {
        let mut idle = 0;
        loop {
            queue.pump();
            let mut failure = None;
            let mut ended = 0;
            let Self { free, clock, latencies, reads, writes, .. } = self;
            let mut now = None;
            queue.poll(u32::MAX, |completion| {
                // One look at the clock for all that were found together.
                let now = *now.get_or_insert_with(Instant::now);
                let (direction, submitted) = clock.get(&completion.payload);
                latencies.record(now - submitted);
                *(if direction == Direction::Read { &mut *reads } else { &mut *writes }) += 1;
                ended += 1;
                failure = failure.or(completion.result.err());
                free.push(completion.payload);
            })?;
            if let Some(failure) = failure {
                return Err(failure.into());
            }
            if ended > 0 {
                *heard = now.unwrap_or(*heard);
                return Ok(*heard);
            }
            idle += 1;
            if idle % IDLE_POLLS == 0 && heard.elapsed() > SILENCE_MAX {
                queue.check()?;
                let in_flight = queue.in_flight();
                return Err(Error::DeviceSilent { seconds: SILENCE_MAX.as_secs(), in_flight });
            }
        }
    }
}

/// When each buffer was submitted, by the buffer's place in the arena.
struct SubmitTimes {
    first: u64,
    stride: u64,
    times: Vec<(Direction, Instant)>,
}

impl SubmitTimes {
    fn new(buffers: &[DmaBuffer]) -> Self {
        let iovas = || buffers.iter().map(|buffer| buffer.iova().0);
        let (first, last) = (iovas().min().unwrap_or(0), iovas().max().unwrap_or(0));
        // Buffers take whole pages, so no two share a place.
        let stride = foliant::PAGE_BYTES as u64;
        let places = (last - first) / stride + 1;
        Self { first, stride, times: vec![(Direction::Read, Instant::now()); places as usize] }
    }

    #[inline]
    fn place(&self, buffer: &DmaBuffer) -> usize {
        ((buffer.iova().0 - self.first) / self.stride) as usize
    }

    #[inline]
    fn set(&mut self, buffer: &DmaBuffer, direction: Direction, now: Instant) {
        let place = self.place(buffer);
        self.times[place] = (direction, now);
    }

    #[inline]
    fn get(&self, buffer: &DmaBuffer) -> (Direction, Instant) {
        self.times[self.place(buffer)]
    }
}
