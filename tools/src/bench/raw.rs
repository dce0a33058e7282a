//! The driver alone: one thread, one queue pair, buffers that go round.

use std::time::{Duration, Instant};

use foliant_nvme::{
    Controller, ControllerOptions, DmaBuffer, Fua, Io, Lba, Namespace, QueuePair, SubmitError,
};

use super::Measured;
use super::surroundings::Drive;
use super::timeline::{Recorder, Timeline};
use super::workload::{Accesses, Direction, Load, Workload};
use crate::cli::BenchOptions;
use crate::error::Error;
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
pub(crate) const DEPTH: u16 = 32;

pub(crate) fn measure(options: &BenchOptions, target: &Target, load: Load) -> Result<Measured, Error> {
    let controller = open(options, target, load.depth)?;
    let namespace = controller.namespaces().first().cloned().ok_or_else(|| Error::Option {
        option: "the device",
        value: target.uri().to_owned(),
        reason: "it has no namespace that the driver can serve; RUST_LOG=warn says why".to_owned(),
    })?;
    let workload = Workload::new(options, &namespace, load)?;
    let drive = Drive::new(target, controller.identity(), &namespace, controller.arena().backing());
    let mut queue = controller.queue_pair::<DmaBuffer>()?;
    let mut run = Run::new(&controller, &namespace, &workload)?;
    let timeline = Timeline::new(workload.duration);
    let tally =
        run.measure(&mut queue, &workload, &timeline).map_err(|error| target.diagnose(error, None))?;
    let measured = Measured {
        reads: tally.reads,
        writes: tally.writes,
        elapsed: tally.elapsed,
        latencies: timeline.total(),
        windows: timeline.windows(),
        drive,
        doorbells: Some(queue.stats().sq_doorbells),
        cache: None,
        shards: None,
        workload,
    };
    drop((queue, run.free));
    controller.shutdown()?;
    Ok(measured)
}

/// Memory for the buffers of `depth` accesses, in bytes.
fn arena_bytes(options: &BenchOptions, depth: u16) -> u64 {
    options.block.0.next_multiple_of(foliant::PAGE_BYTES as u64).saturating_mul(depth.into())
}

/// Whether there may be buffers for `depth` accesses in flight.
pub(crate) fn has_buffers(options: &BenchOptions, depth: u16) -> bool {
    arena_bytes(options, depth) <= BUFFERS_BYTES_MAX.0
}

fn open(options: &BenchOptions, target: &Target, depth: u16) -> Result<Controller, Error> {
    let arena_bytes = arena_bytes(options, depth);
    if !has_buffers(options, depth) {
        let needed = ByteSize(arena_bytes);
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
        arena_bytes: arena_bytes as usize,
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
}

/// What was counted in the measured time.
struct Tally<'t> {
    recorder: Recorder<'t>,
    reads: u64,
    writes: u64,
}

/// The counts when the measured time was over.
struct Counts {
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
        })
    }

    /// Keeps `depth` accesses in flight until the time is over, then waits for the last.
    fn measure(
        &mut self,
        queue: &mut QueuePair<DmaBuffer>,
        workload: &Workload,
        timeline: &Timeline,
    ) -> Result<Counts, Error> {
        let progress = Progress::time(workload.duration);
        progress.stage(format!("depth {}", workload.depth));
        let mut tally = Tally { recorder: timeline.recorder(), reads: 0, writes: 0 };
        let begin = Instant::now();
        let (mut now, mut told, mut heard) = (begin, begin, begin);
        while now - begin < workload.duration {
            self.submit_all(queue, now)?;
            now = self.wait(queue, &mut heard, Some(&mut tally))?;
            if now - told >= PROGRESS_INTERVAL {
                told = now;
                progress.set((now - begin).as_millis() as u64);
            }
        }
        // What comes after the end is waited for, and not counted.
        while queue.in_flight() > 0 {
            self.wait(queue, &mut heard, None)?;
        }
        Ok(Counts { reads: tally.reads, writes: tally.writes, elapsed: now - begin })
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
    fn wait(
        &mut self,
        queue: &mut QueuePair<DmaBuffer>,
        heard: &mut Instant,
        mut tally: Option<&mut Tally<'_>>,
    ) -> Result<Instant, Error> {
        let mut idle = 0;
        loop {
            queue.pump();
            let mut failure = None;
            let mut ended = 0;
            let Self { free, clock, .. } = self;
            let mut now = None;
            queue.poll(u32::MAX, |completion| {
                // One look at the clock for all that were found together.
                let now = *now.get_or_insert_with(Instant::now);
                if let Some(tally) = &mut tally {
                    let (direction, submitted) = clock.get(&completion.payload);
                    tally.recorder.record(now, now - submitted);
                    *(if direction == Direction::Read { &mut tally.reads } else { &mut tally.writes }) += 1;
                }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    #[test]
    fn depths_whose_buffers_exceed_the_limit_are_left_out_of_a_sweep() {
        let cli = Cli::parse_from(["foliant", "bench", "emu:null?size=1GiB", "--block", "16MiB"]);
        let Command::Bench(options) = cli.command else { panic!("bench was asked for") };
        assert!(has_buffers(&options, 64));
        assert!(!has_buffers(&options, 65));
    }
}
