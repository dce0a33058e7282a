//! The device's side: faults are injected, and what the device has seen is taken in.

use std::ops::Range;
use std::time::Duration;

use foliant_nvme_emulated::{Action, Fault as DeviceFault, Match};
use foliant_nvme_spec::{NvmOpcode, Status, StatusCode};

use super::case::{Command, MAPPING_SPACE, Trouble, WriteCache};
use super::content::{Moment, Page, Poisoned, SECTOR, Wrote};
use super::device_log::{Entry, Extent, Flight, What};
use super::operations::Kind;
use super::retries::Attempt;
use super::rules::{Fault, Rule};
use super::telling::{self, Owed};
use super::violated;
use super::world::{FailedPart, Unsettled, World};

impl World {
    pub(super) fn inject(&mut self, trouble: Trouble) {
        let status = |code| Status::of(code);
        let io = |opcode, skip: u8, times: u8| Match::io(opcode).after(u64::from(skip), u64::from(times));
        let failing = |status: Status, late_us: u32| match late_us {
            0 => Action::Status(status),
            late_us => Action::FailLate { delay: Duration::from_micros(u64::from(late_us)), status },
        };
        let (matching, action) = match trouble {
            Trouble::WriteTransient { skip, times } => {
                (io(NvmOpcode::WRITE, skip, times), Action::Status(status(StatusCode::COMMAND_INTERRUPTED)))
            }
            Trouble::WriteFatal { skip, times, late_us } => (
                io(NvmOpcode::WRITE, skip, times),
                failing(status(StatusCode::INTERNAL_ERROR).with_dnr(true), late_us),
            ),
            Trouble::Media { mapping, page } => {
                let mapping = usize::from(mapping) % self.setup.mappings;
                let byte = self.setup.device_offset_of(mapping, self.setup.page_of(mapping, page));
                let lba = byte / u64::from(self.setup.block_bytes);
                let matching = Match::io(NvmOpcode::WRITE).touching(lba, lba);
                (matching, Action::Status(status(StatusCode::WRITE_FAULT).with_dnr(true)))
            }
            Trouble::Read { skip, times } => (
                io(NvmOpcode::READ, skip, times),
                Action::Status(status(StatusCode::UNRECOVERED_READ_ERROR).with_dnr(true)),
            ),
            Trouble::Flush { skip, late_us } => (
                io(NvmOpcode::FLUSH, skip, 1),
                failing(status(StatusCode::INTERNAL_ERROR).with_dnr(true), late_us),
            ),
            Trouble::Zeroes { skip, times, late_us } => (
                io(NvmOpcode::WRITE_ZEROES, skip, times),
                failing(status(StatusCode::INTERNAL_ERROR).with_dnr(true), late_us),
            ),
            Trouble::Delay { command, skip, times, us } => {
                (io(opcode(command), skip, times), Action::Delay(Duration::from_micros(u64::from(us))))
            }
            Trouble::Lose { command, skip } => (io(opcode(command), skip, 1), Action::Drop),
            Trouble::Stop => {
                self.bed.device.clear_faults();
                self.life.stopped = true;
                (Match::default(), Action::Drop)
            }
        };
        self.bed.device.inject(DeviceFault { matching, action });
    }

    /// Takes in what the device has seen.
    pub(crate) fn absorb(&mut self) {
        for entry in self.log.take(|qid| self.bed.device.completions_untaken(qid)) {
            let now = self.now();
            match entry.what {
                What::Struck(action) => self.struck(&entry, action),
                What::Started { astray_bytes, fua } => self.started(&entry, astray_bytes, fua, now),
                What::Completed(status) => self.completed(&entry, status, now),
            }
        }
        let log = &self.log;
        let settled: Vec<_> = self.life.unsettled.extract_if(.., |part| log.is_idle(part.qid)).collect();
        for Unsettled { mapping, part, extent, failed, .. } in settled {
            if let FailedPart::Write { .. } = part {
                // The page's other parts, which may have begun after this one had failed, were of the same attempt.
                let now = self.now();
                self.each_page(extent, |page, _| page.write_failed = now);
            }
            let ops = self.ops.iter_mut().filter(|op| op.mapping == mapping);
            ops.for_each(|op| op.lived.add(part));
            let FailedPart::Write { owed, .. } = part else { continue };
            // Who has been told of something meanwhile may have been told of this one.
            let owed_since = |told: Moment| if told > failed { owed.min(Owed::Perhaps) } else { owed };
            let modelled = &mut self.mappings[mapping];
            modelled.unseen = modelled.unseen.max(owed_since(modelled.told));
            for handle in self.handle_states.iter_mut().filter(|handle| handle.mapping == mapping) {
                handle.owed = handle.owed.max(owed_since(handle.told));
            }
        }
    }

    pub(super) fn struck(&mut self, entry: &Entry, action: Action) {
        let fault = match (action, entry.opcode) {
            (Action::Delay(_), _) => Fault::Delay,
            (Action::Drop, _) if self.life.stopped => Fault::Stopped,
            (Action::Drop, _) => Fault::Lost,
            (_, NvmOpcode::READ) => Fault::Read,
            (_, NvmOpcode::FLUSH) => Fault::Flush,
            (_, NvmOpcode::WRITE_ZEROES) => Fault::Zeroes,
            (Action::Status(status) | Action::FailLate { status, .. }, _) => match status.code() {
                StatusCode::COMMAND_INTERRUPTED => Fault::WriteTransient,
                StatusCode::WRITE_FAULT => Fault::Media,
                _ => Fault::WriteFatal,
            },
        };
        // A flush fails when it ends; a sync that needs none may succeed until then.
        if fault != Fault::Flush {
            self.life.struck.add(fault);
        }
        self.ops.iter_mut().for_each(|op| op.lived.struck = true);
        self.life.doomed |= action == Action::Drop;
        if entry.opcode == NvmOpcode::FLUSH {
            self.life.flushes += u64::from(!matches!(action, Action::Delay(_) | Action::FailLate { .. }));
        }
        if entry.opcode == NvmOpcode::WRITE && matches!(action, Action::Status(_) | Action::Drop) {
            self.note_write(entry);
        }
        if entry.opcode == NvmOpcode::WRITE_ZEROES && !matches!(action, Action::Delay(_)) {
            self.zeroes_struck(entry.extent);
        }
    }

    /// A Write Zeroes isn't carried out, or nobody learns that it was: pages whose folios are gone may read as the device
    /// has them, until they are overwritten.
    pub(super) fn zeroes_struck(&mut self, extent: Extent) {
        let mapping = (extent.start / MAPPING_SPACE) as usize;
        let (mut pages, mut discards) = (Vec::new(), Vec::new());
        for op in &mut self.ops {
            if let Kind::Discard { range, zeroes_failed } = &mut op.kind
                && op.mapping == mapping
            {
                *zeroes_failed = true;
                discards.push(op.id);
                pages.extend(self.setup.pages_of(mapping, range));
            }
        }
        discards.extend(self.zombies.iter().map(|zombie| zombie.0));
        pages.extend(
            self.zombies.iter().filter(|zombie| zombie.1 == mapping).flat_map(|zombie| zombie.2.clone()),
        );
        for page in pages {
            let image = self.image(mapping, page);
            self.mappings[mapping].pages[page].may_read_as(&image, |op| discards.contains(&op));
        }
    }

    /// What the device holds of a page, as a read would see it.
    pub(crate) fn image(&self, mapping: usize, page: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.setup.page_bytes(mapping, page) as usize];
        let start = self.setup.device_offset_of(mapping, page);
        self.bed.device.read_image(1, start, &mut bytes).expect("the page lies on the device");
        bytes
    }

    pub(super) fn started(&mut self, entry: &Entry, astray_bytes: u64, fua: bool, now: Moment) {
        let Entry { key, opcode, extent, .. } = *entry;
        // Whoever opens a mapping looks for a label on the block behind it.
        let options = self.setup.mapping((extent.start / MAPPING_SPACE) as usize);
        let is_label = opcode == NvmOpcode::READ
            && options.len_bytes.is_some_and(|len| extent.start == options.start_bytes + len);
        if matches!(opcode, NvmOpcode::READ | NvmOpcode::WRITE) && !is_label {
            if astray_bytes > 0 {
                violated(
                    Rule::Wb41,
                    format!("{opcode:?} of {extent:?}: {astray_bytes} bytes lie in no frame of its pages"),
                );
            }
            self.met(Rule::Wb41);
        }
        match opcode {
            NvmOpcode::WRITE => {
                self.check_write_started(extent);
                self.note_write(entry);
            }
            NvmOpcode::WRITE_ZEROES => self.check_zeroes_started(extent),
            NvmOpcode::FLUSH => {
                self.life.flushes += 1;
                if self.setup.write_cache == WriteCache::None {
                    violated(Rule::Wb21, "a flush, though there is no volatile write cache".to_owned());
                }
            }
            _ => {}
        }
        self.log.started(key, Flight { opcode, extent, started: now, fua });
    }

    pub(super) fn note_write(&mut self, entry: &Entry) {
        let now_ns = if self.life.is_late { u64::MAX } else { self.bed.now_ns() };
        match self.life.retries.attempted(entry.key.0, entry.extent, now_ns) {
            Attempt::First => {}
            Attempt::Again => return,
            Attempt::Wrong(text) => violated(Rule::Wb22, text),
        }
        self.note_pass_write(entry.key.0, entry.extent);
        self.note_checkpoint_write(entry.extent);
        if let Some(quiet) = &mut self.quiet
            && entry.extent.start / MAPPING_SPACE == quiet.mapping as u64
        {
            quiet.writes.push((entry.key.0, entry.extent));
        }
    }

    pub(super) fn completed(&mut self, entry: &Entry, status: Status, now: Moment) {
        let flight = self.log.completed(entry.key);
        let mapping = (entry.extent.start / MAPPING_SPACE) as usize;
        match entry.opcode {
            NvmOpcode::FLUSH if status.is_success() => {
                self.life.flushed = self.life.flushed.max(flight.map_or(0, |flight| flight.started));
            }
            NvmOpcode::FLUSH => {
                self.life.struck.add(Fault::Flush);
                self.life.latched |= telling::latches(status);
            }
            NvmOpcode::READ if !status.is_success() => {
                let ops = self.ops.iter_mut().filter(|op| op.mapping == mapping);
                ops.for_each(|op| op.lived.add(FailedPart::Read));
                if self.setup.splits_pages(mapping) {
                    let (qid, part) = (entry.key.0, FailedPart::Read);
                    self.life.unsettled.push(Unsettled {
                        qid,
                        mapping,
                        part,
                        extent: entry.extent,
                        failed: now,
                    });
                }
            }
            NvmOpcode::WRITE | NvmOpcode::WRITE_ZEROES if status.is_success() => {
                let started = flight.map_or(0, |flight| flight.started);
                if entry.opcode == NvmOpcode::WRITE {
                    let now_ns = self.bed.now_ns();
                    for (mapping, page) in self.pages_at(entry.extent) {
                        self.life.written_ns.insert(self.setup.stripe_of(mapping, page), now_ns);
                    }
                }
                let cached = if flight.is_some_and(|flight| flight.fua) { 0 } else { now };
                let what = if entry.opcode == NvmOpcode::WRITE { Wrote::Bytes } else { Wrote::Zeroes };
                self.each_page(entry.extent, |page, sectors| {
                    page.wrote(what, sectors, started, cached);
                });
                if entry.opcode == NvmOpcode::WRITE && self.life.retries.ended(entry.extent) > 0 {
                    self.met(Rule::Wb22);
                }
            }
            NvmOpcode::WRITE => {
                self.each_page(entry.extent, |page, _| page.write_failed = now);
                self.write_failed(mapping, entry, status, now);
            }
            _ => {}
        }
    }

    /// Calls `each` with every page of the model in an extent, and with which sectors of it.
    pub(super) fn each_page(&mut self, extent: Extent, mut each: impl FnMut(&mut Page, Range<usize>)) {
        let mapping = (extent.start / MAPPING_SPACE) as usize;
        let len = self.setup.page_len(mapping);
        let mut at = extent.start;
        while at < extent.end() {
            let end = (at / len + 1) * len;
            if let Some((mapping, page)) = self.setup.page_at(at) {
                let sectors = at % len / SECTOR..(end.min(extent.end()) - 1) % len / SECTOR + 1;
                each(&mut self.mappings[mapping].pages[page], sectors.start as usize..sectors.end as usize);
            }
            at = end;
        }
    }

    pub(crate) fn pages_at(&self, extent: Extent) -> Vec<(usize, usize)> {
        let len = self.setup.page_len((extent.start / MAPPING_SPACE) as usize);
        let pages = extent.start / len..extent.end().div_ceil(len);
        pages.filter_map(|page| self.setup.page_at(page * len)).collect()
    }

    /// A write command has failed.
    fn write_failed(&mut self, mapping: usize, entry: &Entry, status: Status, now: Moment) {
        let qid = entry.key.0;
        let failed_ns = if self.life.is_late { 0 } else { self.bed.now_ns() };
        if status.is_retryable() {
            self.ops.iter_mut().filter(|op| op.mapping == mapping).for_each(|op| op.lived.put_off = true);
        }
        if self.setup.splits_pages(mapping) {
            // Which of a page's failures counts, and whether they are tried again, is the engine's.
            let vague = status.is_retryable() || self.life.struck.has(Fault::WriteTransient);
            let owed = if vague { Owed::Perhaps } else { self.poisoned(entry.extent) };
            // The run's other commands may still be on their way; its end is what is told.
            self.event(mapping, owed.min(Owed::Perhaps));
            let part = FailedPart::Write { put_off: status.is_retryable(), owed };
            self.life.unsettled.push(Unsettled { qid, mapping, part, extent: entry.extent, failed: now });
        } else if status.is_retryable() && self.life.retries.failed(qid, entry.extent, failed_ns) {
            self.mappings[mapping].had_event = true;
        } else {
            self.life.retries.ended(entry.extent);
            let owed = self.poisoned(entry.extent);
            self.event(mapping, owed);
        }
    }

    /// What handles are owed for an extent whose write failed for good: that pages fail again whose failure was an event
    /// is none (WB-23), and told only to syncs that tried them.
    fn poisoned(&mut self, extent: Extent) -> Owed {
        let mut least = Poisoned::Yes;
        self.each_page(extent, |page, _| {
            least = least.min(page.poisoned);
            page.poisoned = if page.is_discarding() { Poisoned::Perhaps } else { Poisoned::Yes };
        });
        match least {
            Poisoned::No => Owed::Yes,
            Poisoned::Perhaps => Owed::Perhaps,
            Poisoned::Yes => Owed::No,
        }
    }

    /// A writeback of a mapping failed for good: every handle is owed it.
    fn event(&mut self, mapping: usize, owed: Owed) {
        for handle in self.handle_states.iter_mut().filter(|handle| handle.mapping == mapping) {
            handle.owed = handle.owed.max(owed);
        }
        let modelled = &mut self.mappings[mapping];
        modelled.unseen = modelled.unseen.max(owed);
        modelled.had_event = true;
        self.ops.iter_mut().filter(|op| op.mapping == mapping).for_each(|op| op.lived.write_failed = true);
    }
}

fn opcode(command: Command) -> NvmOpcode {
    match command {
        Command::Read => NvmOpcode::READ,
        Command::Write => NvmOpcode::WRITE,
        Command::Flush => NvmOpcode::FLUSH,
        Command::WriteZeroes => NvmOpcode::WRITE_ZEROES,
    }
}
