//! How fast the emulated device moves data: one path between host and medium, which transfers take one after the other.
//!
//! Each transfer takes its bytes divided by the rate of its direction, and begins when the one before it has ended,
//! whatever queue that came from: as on a device whose flash or bus is the bottleneck, several queues share the rate,
//! and a read behind megabytes of writes waits for them. [`Latency`](crate::Latency) comes on top and overlaps: it
//! delays a completion and occupies nothing.
//!
//! ```text
//! fetched        │ W1 W2   R3
//! transfer       ├─W1─┤─W2─┤R3┤
//! completion due │    ├lat──▶W1
//!                │         ├lat──▶W2        ▶ = transfer's end + latency
//! ```

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes per second that the device moves; 0 sets no limit. Both directions share one path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// For Read.
    pub read_bps: u64,
    /// For Write. Write Zeroes and Dataset Management move no data and take no time here.
    pub write_bps: u64,
}

impl Bandwidth {
    /// Largest rate that can be asked for: 1 TiB/s. Beyond, the time of a block is less than a nanosecond.
    pub const BPS_MAX: u64 = 1 << 40;

    /// Whether nothing is limited.
    #[must_use]
    pub const fn is_unlimited(&self) -> bool {
        self.read_bps == 0 && self.write_bps == 0
    }
}

/// The path of one device.
#[derive(Debug)]
pub(crate) struct TransferPath {
    rates: Bandwidth,
    /// When the last transfer ends, on the device's clock.
    busy_until_ns: AtomicU64,
}

impl TransferPath {
    pub(crate) fn new(rates: Bandwidth) -> Self {
        Self { rates, busy_until_ns: AtomicU64::new(0) }
    }

    /// Takes the path for reading `len_bytes` at `now_ns`. Returns how long it is until that has been moved.
    pub(crate) fn read_ns(&self, len_bytes: u64, now_ns: u64) -> u64 {
        self.take_ns(len_bytes, self.rates.read_bps, now_ns)
    }

    /// As [`read_ns`](Self::read_ns), for writing.
    pub(crate) fn write_ns(&self, len_bytes: u64, now_ns: u64) -> u64 {
        self.take_ns(len_bytes, self.rates.write_bps, now_ns)
    }

    fn take_ns(&self, len_bytes: u64, bps: u64, now_ns: u64) -> u64 {
        if bps == 0 {
            return 0;
        }
        let transfer_ns = u128::from(len_bytes) * 1_000_000_000;
        let transfer_ns = u64::try_from(transfer_ns.div_ceil(bps.into())).unwrap_or(u64::MAX);
        let end = |busy_until_ns: u64| busy_until_ns.max(now_ns).saturating_add(transfer_ns);
        // Queues are pumped by different threads: whoever comes first has the path first.
        let before = self
            .busy_until_ns
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |busy| Some(end(busy)))
            .unwrap_or_else(|busy| busy);
        end(before) - now_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn transfers_follow_one_another_and_an_idle_path_starts_at_once() {
        let path = TransferPath::new(Bandwidth { read_bps: 4_096_000, write_bps: 2_048_000 });
        assert_eq!(path.write_ns(4096, 0), 2 * MS);
        assert_eq!(path.write_ns(4096, MS), 3 * MS, "behind the first");
        assert_eq!(path.read_ns(4096, MS), 4 * MS, "behind both, at its own rate");
        assert_eq!(path.read_ns(4096, 100 * MS), MS, "idle since");
    }

    #[test]
    fn a_direction_without_a_limit_doesnt_wait() {
        let path = TransferPath::new(Bandwidth { read_bps: 0, write_bps: 4096 });
        assert_eq!(path.write_ns(4096, 0), 1000 * MS);
        assert_eq!(path.read_ns(1 << 20, 0), 0);
    }

    #[test]
    fn the_time_of_many_transfers_is_never_less_than_the_rate_allows() {
        let bps = 7_000_000_000;
        let path = TransferPath::new(Bandwidth { read_bps: 0, write_bps: bps });
        let last_ns = (0..10_000).map(|_| path.write_ns(4096, 0)).last().unwrap();
        let exact_ns = 10_000 * 4096 * 1_000_000_000u128 / u128::from(bps);
        let last_ns = u128::from(last_ns);
        assert!((exact_ns..exact_ns + 10_000).contains(&last_ns), "{last_ns} for {exact_ns}");
    }
}
