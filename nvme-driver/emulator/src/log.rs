//! Log pages, and asynchronous events that point to them (Base sections 5.1.12 and 5.1.2).

use std::collections::VecDeque;

use foliant_nvme_spec::Status;
use foliant_nvme_spec::log::{AsynchronousEvent, ErrorInformation, FirmwareSlot, LogPageId, SmartHealth};
use zerocopy::FromZeros;
use zerocopy::little_endian::U128;

use crate::identify::FIRMWARE;
use crate::stats::EmulatedStats;

/// Entries of the Error Information log (ELPE + 1).
pub(crate) const ERROR_ENTRIES: usize = 64;
/// Asynchronous Event Requests held at most (AERL + 1).
pub(crate) const EVENT_REQUESTS: usize = 4;

/// A command that failed, as the log describes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FailedCommand {
    pub(crate) sqid: u16,
    pub(crate) cid: u16,
    pub(crate) opcode: u8,
    pub(crate) nsid: u32,
    pub(crate) lba: u64,
}

/// The Error Information log: the last failures, newest first.
#[derive(Debug, Default)]
pub(crate) struct ErrorLog {
    entries: VecDeque<ErrorInformation>,
    count: u64,
}

impl ErrorLog {
    /// Notes a failure. Returns the status with More set, because the log now has more about it.
    pub(crate) fn push(&mut self, failed: &FailedCommand, status: Status) -> Status {
        let status = status.with_m(true);
        self.count += 1;
        self.entries.truncate(ERROR_ENTRIES - 1);
        self.entries.push_front(ErrorInformation {
            error_count: self.count,
            sqid: failed.sqid,
            cid: failed.cid,
            status_info: u16::from(status) << 1,
            parameter_error_location: u16::MAX,
            lba: failed.lba,
            nsid: failed.nsid,
            opcode: failed.opcode,
            ..ErrorInformation::default()
        });
        status
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The log page: all entries, unused ones zero.
    pub(crate) fn page(&self) -> Vec<ErrorInformation> {
        let mut page: Vec<ErrorInformation> = self.entries.iter().copied().collect();
        page.resize(ERROR_ENTRIES, ErrorInformation::default());
        page
    }
}

/// The SMART / Health Information log: a healthy device at room temperature with these counters.
pub(crate) fn smart(
    stats: &EmulatedStats,
    errors: u64,
    power_cycles: u64,
    unexpected_power_losses: u64,
) -> SmartHealth {
    let thousands_of_sectors = |bytes: u64| U128::new(u128::from(bytes.div_ceil(512_000)));
    let mut smart = SmartHealth::new_zeroed();
    smart.composite_temperature_kelvin = 298u16.to_le_bytes();
    smart.available_spare_percent = 100;
    smart.available_spare_threshold_percent = 10;
    smart.data_units_read = thousands_of_sectors(stats.bytes_read);
    smart.data_units_written = thousands_of_sectors(stats.bytes_written);
    smart.host_read_commands = U128::new(stats.reads.into());
    smart.host_write_commands = U128::new(stats.writes.into());
    smart.power_cycles = U128::new(power_cycles.into());
    smart.unexpected_power_losses = U128::new(unexpected_power_losses.into());
    smart.error_log_entries = U128::new(errors.into());
    smart
}

/// The Firmware Slot Information log: one slot, running.
pub(crate) fn firmware() -> FirmwareSlot {
    let mut page = FirmwareSlot::new_zeroed();
    page.afi = 1;
    page.frs[0] = *FIRMWARE;
    page
}

/// Asynchronous Event Requests waiting for something to tell, and what is to be told.
#[derive(Debug, Default)]
pub(crate) struct AsyncEvents {
    /// Command identifiers of the requests held, oldest first.
    held: VecDeque<u16>,
    is_due: bool,
    /// The last event's log hasn't been read: events of the kind stay back until it is.
    is_masked: bool,
}

impl AsyncEvents {
    /// Holds a request; false when AERL is exceeded.
    pub(crate) fn hold(&mut self, cid: u16) -> bool {
        if self.held.len() == EVENT_REQUESTS {
            return false;
        }
        self.held.push_back(cid);
        true
    }

    /// A doorbell was written an invalid value.
    pub(crate) fn raise(&mut self) {
        self.is_due |= !self.is_masked;
    }

    /// The log that clears the event was read.
    pub(crate) fn log_was_read(&mut self) {
        self.is_masked = false;
    }

    /// The event to tell now: the request to complete, and dword 0 of its completion.
    pub(crate) fn take(&mut self) -> Option<(u16, u32)> {
        if !self.is_due {
            return None;
        }
        let cid = self.held.pop_front()?;
        self.is_due = false;
        self.is_masked = true;
        // Error status, Invalid Doorbell Write Value (Base section 5.1.2.1).
        let event = AsynchronousEvent::new()
            .with_event_type(0)
            .with_event_information(1)
            .with_lid(LogPageId::ERROR_INFORMATION.0);
        Some((cid, event.into()))
    }

    /// Ends a held request that is aborted; true when it was there.
    pub(crate) fn abort(&mut self, cid: u16) -> bool {
        let len = self.held.len();
        self.held.retain(|held| *held != cid);
        self.held.len() < len
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use foliant_nvme_spec::StatusCode;

    #[test]
    fn the_error_log_keeps_the_newest_first_and_is_bounded() {
        let mut log = ErrorLog::default();
        for cid in 0..100 {
            let failed = FailedCommand { sqid: 1, cid, opcode: 2, nsid: 1, lba: 7 };
            assert!(log.push(&failed, Status::of(StatusCode::LBA_OUT_OF_RANGE)).m());
        }
        let page = log.page();
        assert_eq!(page.len(), ERROR_ENTRIES);
        assert_eq!((page[0].cid, page[0].error_count), (99, 100));
        assert_eq!(page[63].cid, 36);
        assert_eq!(log.count(), 100);
    }

    #[test]
    fn an_event_is_told_once_until_its_log_is_read() {
        let mut events = AsyncEvents::default();
        events.raise();
        assert_eq!(events.take(), None);
        assert!(events.hold(5) && events.hold(6));
        assert_eq!(events.take().map(|(cid, _)| cid), Some(5));
        events.raise();
        assert_eq!(events.take(), None);
        events.log_was_read();
        events.raise();
        assert_eq!(events.take().map(|(cid, _)| cid), Some(6));
    }

    #[test]
    fn requests_beyond_the_limit_are_refused() {
        let mut events = AsyncEvents::default();
        assert!((0..4).all(|cid| events.hold(cid)));
        assert!(!events.hold(4));
        assert!(events.abort(2) && !events.abort(2));
        assert!(events.hold(4));
    }
}
