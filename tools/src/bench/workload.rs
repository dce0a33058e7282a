//! What a measurement accesses, access by access.

use std::time::Duration;

use foliant::Namespace;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use crate::cli::{BenchOptions, Pattern};
use crate::error::Error;
use crate::size::ByteSize;

/// The largest access: what a request of the driver may have in one buffer with room for others.
const BLOCK_BYTES_MAX: u64 = 16 << 20;

/// How hard and how long a device is kept busy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    /// Accesses in flight: commands of the raw driver, threads through the cache.
    pub(crate) depth: u16,
    pub(crate) duration: Duration,
}

/// What is measured, checked against the device.
#[derive(Clone, Debug)]
pub(crate) struct Workload {
    pub(crate) pattern: Pattern,
    pub(crate) read_percent: u8,
    /// Bytes an access.
    pub(crate) block_bytes: u64,
    /// The first bytes of the namespace, which are accessed.
    pub(crate) range_bytes: u64,
    pub(crate) duration: Duration,
    pub(crate) depth: u16,
}

impl Workload {
    pub(crate) fn new(options: &BenchOptions, namespace: &Namespace, load: Load) -> Result<Self, Error> {
        let device_block = u64::from(namespace.block_bytes());
        let device_bytes = namespace.blocks() * device_block;
        let block = options.block.0;
        let wrong =
            |option, size: ByteSize, reason| Err(Error::Option { option, value: size.to_string(), reason });
        if !block.is_multiple_of(device_block) || block > BLOCK_BYTES_MAX {
            let limit = ByteSize(BLOCK_BYTES_MAX);
            return wrong(
                "--block",
                options.block,
                format!("must be a multiple of the device's block of {device_block} bytes, at most {limit}"),
            );
        }
        let range = options.range.unwrap_or(ByteSize(device_bytes));
        if range.0 > device_bytes || range.0 < block {
            let (least, most) = (options.block, ByteSize(device_bytes));
            let option = if options.range.is_some() { "--range" } else { "the namespace of" };
            return wrong(
                option,
                range,
                format!("must be between the block of {least} and the namespace's {most}"),
            );
        }
        Ok(Self {
            pattern: options.pattern,
            read_percent: options.mix,
            block_bytes: block,
            range_bytes: range.0 / block * block,
            duration: load.duration,
            depth: load.depth,
        })
    }

    /// The accesses of one of `parts` threads; sequential ones start at different places.
    pub(crate) fn accesses(&self, part: u64, parts: u64) -> Accesses {
        let blocks = self.range_bytes / self.block_bytes;
        Accesses {
            random: SmallRng::seed_from_u64(part),
            pattern: self.pattern,
            read_percent: self.read_percent,
            blocks,
            next: blocks / parts * part,
        }
    }
}

/// Whether an access reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Direction {
    Read,
    Write,
}

/// An endless sequence of accesses, by block index. The same part of the same workload gives the same sequence.
#[derive(Debug)]
pub(crate) struct Accesses {
    random: SmallRng,
    pattern: Pattern,
    read_percent: u8,
    blocks: u64,
    next: u64,
}

impl Accesses {
    #[inline]
    pub(crate) fn next(&mut self) -> (Direction, u64) {
        let index = match self.pattern {
            Pattern::Random => self.random.random_range(0..self.blocks),
            Pattern::Sequential => {
                let index = self.next;
                self.next = if index + 1 == self.blocks { 0 } else { index + 1 };
                index
            }
        };
        let reads = match self.read_percent {
            100 => true,
            percent => self.random.random_range(0..100) < percent,
        };
        (if reads { Direction::Read } else { Direction::Write }, index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(pattern: Pattern, read_percent: u8) -> Workload {
        let duration = Duration::from_secs(1);
        Workload { pattern, read_percent, block_bytes: 4096, range_bytes: 10 * 4096, duration, depth: 1 }
    }

    #[test]
    fn sequential_accesses_go_round_and_parts_start_apart() {
        let mut accesses = workload(Pattern::Sequential, 100).accesses(1, 2);
        let indices: Vec<u64> = (0..7).map(|_| accesses.next().1).collect();
        assert_eq!(indices, [5, 6, 7, 8, 9, 0, 1]);
    }

    #[test]
    fn random_accesses_stay_in_the_range_and_keep_the_mix() {
        let mut accesses = workload(Pattern::Random, 70).accesses(0, 1);
        let drawn: Vec<_> = (0..10_000).map(|_| accesses.next()).collect();
        assert!(drawn.iter().all(|(_, index)| *index < 10));
        let reads = drawn.iter().filter(|(direction, _)| *direction == Direction::Read).count();
        assert!((6_800..7_200).contains(&reads), "{reads}");
    }
}
