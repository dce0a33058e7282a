//! Replaying from several threads, with the outcome of one.
//!
//! The device is divided into regions of 2 MiB, and each region belongs to one lane, a thread that replays what
//! the trace does to its regions, in the trace's order. A request over several regions is cut at their borders.
//! So no two lanes ever touch the same sector or page, each lane keeps its own model without a lock, and what
//! every sector holds at each moment of its lane is known.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use foliant::Mapping;

use crate::error::Error;
use crate::progress::Progress;
use crate::replay::model::{Checked, Model, Unwritten};
use crate::replay::stamp::SECTOR_BYTES;
use crate::replay::trace::{Op, Request, Trace};
use crate::trace::DirtyLog;

const REGION_BYTES: u64 = 2 << 20;
/// Finished requests are told to the progress bar in steps.
const PROGRESS_STEP: u64 = 256;

/// What the lanes did.
#[derive(Debug)]
pub(crate) struct Replayed {
    /// What every sector must hold now.
    pub(crate) model: Model,
    /// The reads that were checked.
    pub(crate) checked: Checked,
}

/// How to replay.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Replay<'a> {
    pub(crate) trace: &'a Trace,
    pub(crate) mapping: &'a Mapping,
    /// What sectors hold before they are written.
    pub(crate) unwritten: Unwritten,
    /// Whether sectors are stamped and reads checked.
    pub(crate) verify: bool,
    pub(crate) lanes: u64,
    /// Where it is noted what was written.
    pub(crate) dirtied: Option<&'a DirtyLog>,
}

impl Replay<'_> {
    /// Replays the whole trace. The first error of a lane ends all.
    pub(crate) fn run(&self, progress: &Progress) -> Result<Replayed, Error> {
        let stop = AtomicBool::new(false);
        let run = |lane| {
            let result = Lane::new(self, lane).run(&stop, progress);
            stop.fetch_or(result.is_err(), Ordering::Relaxed);
            result
        };
        let run = &run;
        let ends: Vec<Result<Replayed, Error>> = std::thread::scope(|scope| {
            let lanes: Vec<_> = (0..self.lanes).map(|lane| scope.spawn(move || run(lane))).collect();
            let join = |lane: std::thread::ScopedJoinHandle<'_, _>| {
                lane.join().unwrap_or(Err(Error::ThreadPanicked { what: "replayed the trace" }))
            };
            lanes.into_iter().map(join).collect()
        });
        let mut all = Replayed { model: Model::new(self.unwritten), checked: Checked::default() };
        for end in ends {
            let Replayed { model, checked } = end?;
            all.model.absorb(model);
            all.checked.absorb(checked);
        }
        Ok(all)
    }
}

/// One thread's part.
struct Lane<'a> {
    replay: &'a Replay<'a>,
    number: u64,
    replayed: Replayed,
    buffer: Vec<u8>,
}

impl<'a> Lane<'a> {
    fn new(replay: &'a Replay<'a>, number: u64) -> Self {
        let replayed = Replayed { model: Model::new(replay.unwritten), checked: Checked::default() };
        Self { replay, number, replayed, buffer: Vec::new() }
    }

    fn run(mut self, stop: &AtomicBool, progress: &Progress) -> Result<Replayed, Error> {
        let mut finished = 0;
        for (request, generation) in self.replay.trace.requests.iter().zip(1..) {
            for piece in pieces(request.bytes(), self.replay.lanes, self.number) {
                self.replay_piece(request, generation, piece)?;
            }
            finished += u64::from(lane_of(request.bytes().start, self.replay.lanes) == self.number);
            if finished == PROGRESS_STEP {
                progress.advance(finished);
                finished = 0;
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        }
        progress.advance(finished);
        Ok(self.replayed)
    }

    fn replay_piece(&mut self, request: &Request, generation: u32, bytes: Range<u64>) -> Result<(), Error> {
        let (mapping, verify) = (self.replay.mapping, self.replay.verify);
        let sector = bytes.start / SECTOR_BYTES as u64;
        self.buffer.resize((bytes.end - bytes.start) as usize, 0);
        let Replayed { model, checked } = &mut self.replayed;
        match request.op {
            Op::Read => {
                mapping.read_at(bytes.start, &mut self.buffer)?;
                if verify {
                    model.check(sector, &self.buffer, "read through the cache", checked);
                }
            }
            Op::Write => {
                if verify {
                    model.write(sector, generation, &mut self.buffer);
                }
                mapping.write_at(bytes.start, &self.buffer)?;
                if let Some(dirtied) = self.replay.dirtied {
                    dirtied.note(0, bytes);
                }
            }
        }
        Ok(())
    }
}

/// The lane whose region has this byte. Neighbouring regions go to different lanes.
fn lane_of(byte: u64, lanes: u64) -> u64 {
    byte / REGION_BYTES % lanes
}

/// The parts of a byte range that lie in a lane's regions.
fn pieces(bytes: Range<u64>, lanes: u64, lane: u64) -> impl Iterator<Item = Range<u64>> {
    let regions = bytes.start / REGION_BYTES..bytes.end.div_ceil(REGION_BYTES);
    regions.filter(move |region| region % lanes == lane).map(move |region| {
        let (start, end) = (region * REGION_BYTES, region.saturating_add(1).saturating_mul(REGION_BYTES));
        bytes.start.max(start)..bytes.end.min(end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lanes_together_cover_a_request_without_overlap() {
        for (start, end) in [(512, 1024), (0, REGION_BYTES), (REGION_BYTES - 512, 5 * REGION_BYTES + 512)] {
            for lanes in 1..7 {
                let mut parts: Vec<Range<u64>> =
                    (0..lanes).flat_map(|lane| pieces(start..end, lanes, lane)).collect();
                parts.sort_by_key(|part| part.start);
                assert_eq!((parts[0].start, parts[parts.len() - 1].end), (start, end));
                assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start), "{parts:?}");
            }
        }
    }

    #[test]
    fn two_lanes_never_share_a_page() {
        assert!(REGION_BYTES.is_multiple_of(foliant::PAGE_BYTES as u64));
        let request = 4096 * 500..4096 * 520;
        for lane in 0..3 {
            assert!(pieces(request.clone(), 3, lane).all(|part| lane_of(part.start, 3) == lane));
        }
    }
}
