//! One event of writeback, with the fields that a picture needs, as it is kept while a run is watched.
//!
//! Events are found by name (`docs/tracing.md` in the sources lists them). One whose name or fields aren't known is
//! counted and otherwise left out, so that engine and picture may differ by a version.

use std::fmt::Debug;
use std::ops::Range;

use tracing::Event;
use tracing::field::{Field, Visit};

/// Something that happened, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Happening {
    /// Nanoseconds since the watching began.
    pub(crate) at_ns: u64,
    pub(crate) shard: u32,
    /// The time of the shard's step, on the engine's clock: what has the same was done in one step.
    pub(crate) step_ns: u64,
    pub(crate) kind: Kind,
}

/// Why a pass ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reason {
    Sync,
    DirtyLimit,
    Reclaim,
    Expiry,
    Close,
    Caller,
    Poisoned,
    /// One that this program doesn't know.
    Other,
}

impl Reason {
    fn of(name: &str) -> Self {
        match name {
            "sync" => Self::Sync,
            "dirty_limit" => Self::DirtyLimit,
            "reclaim" => Self::Reclaim,
            "expiry" => Self::Expiry,
            "caller" => Self::Caller,
            "poisoned" => Self::Poisoned,
            "close" => Self::Close,
            _ => Self::Other,
        }
    }

    /// In words.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Sync => "sync",
            Self::DirtyLimit => "dirty limit",
            Self::Reclaim => "frames needed",
            Self::Expiry => "expiry",
            Self::Caller => "caller",
            Self::Poisoned => "poisoned pages",
            Self::Close => "close",
            Self::Other => "another reason",
        }
    }
}

/// What a pass promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Background,
    Integrity,
}

/// What a command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Op {
    Read,
    ReadAhead,
    Write,
    WriteZeroes,
    /// One that this program doesn't know.
    Other,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    PassBegan {
        mapping: u16,
        pass: u64,
        reason: Reason,
        mode: Mode,
        pages: Range<u64>,
        dirty: u64,
    },
    PassEnded {
        pass: u64,
        commands: u64,
        pages: u64,
        is_whole: bool,
    },
    /// A command is in the queue; of a pass, if it is a write.
    Issued {
        op: Op,
        mapping: u16,
        pages: Range<u64>,
        pass: Option<u64>,
    },
    Completed {
        op: Op,
        mapping: u16,
        first_page: u64,
        has_failed: bool,
    },
    /// The doorbell told the device of this many commands.
    Rung {
        commands: u64,
    },
    CommitBegan {
        namespace: u32,
        syncs: u64,
    },
    CommitEnded {
        namespace: u32,
        has_failed: bool,
    },
    SyncBegan,
    SyncEnded {
        has_failed: bool,
    },
    Evicted {
        pages: u64,
    },
    /// A round of the flusher, a wait, or an event that this program doesn't know.
    Other,
}

impl Happening {
    /// The event, which happened at `at_ns`.
    pub(crate) fn of(event: &Event<'_>, at_ns: u64) -> Self {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let kind = fields.kind(event.metadata().name()).unwrap_or(Kind::Other);
        Self { at_ns, shard: fields.shard, step_ns: fields.now_ns, kind }
    }
}

/// The fields of an event, whichever it has.
#[derive(Debug, Default)]
struct Fields {
    shard: u32,
    now_ns: u64,
    mapping: Option<u16>,
    namespace: Option<u32>,
    pass: Option<u64>,
    first_page: Option<u64>,
    end_page: Option<u64>,
    pages: Option<u64>,
    commands: Option<u64>,
    syncs: Option<u64>,
    dirty: Option<u64>,
    op: Option<Op>,
    reason: Option<Reason>,
    mode: Option<Mode>,
    is_whole: bool,
    has_failed: bool,
}

impl Fields {
    /// What the event of this name says; `None` where the name isn't known or a field is missing.
    fn kind(&self, name: &str) -> Option<Kind> {
        let pages = || Some(self.first_page?..self.first_page?.checked_add(self.pages?)?);
        let has_failed = self.has_failed;
        Some(match name {
            "writeback_single_inode_start" => Kind::PassBegan {
                mapping: self.mapping?,
                pass: self.pass?,
                reason: self.reason?,
                mode: self.mode?,
                pages: self.first_page?..self.end_page?,
                dirty: self.dirty.unwrap_or(0),
            },
            "writeback_single_inode" => Kind::PassEnded {
                pass: self.pass?,
                commands: self.commands?,
                pages: self.pages?,
                is_whole: self.is_whole,
            },
            "block_rq_issue" => {
                // Number 0 is a pass that began before anybody listened.
                let pass = self.pass.filter(|&pass| pass > 0);
                Kind::Issued { op: self.op?, mapping: self.mapping?, pages: pages()?, pass }
            }
            "block_rq_complete" => Kind::Completed {
                op: self.op?,
                mapping: self.mapping?,
                first_page: self.first_page?,
                has_failed,
            },
            "block_unplug" => Kind::Rung { commands: self.commands? },
            "initiate_commit" => Kind::CommitBegan { namespace: self.namespace?, syncs: self.syncs? },
            "commit_done" => Kind::CommitEnded { namespace: self.namespace?, has_failed },
            "sync_file_enter" => Kind::SyncBegan,
            "sync_file_exit" => Kind::SyncEnded { has_failed },
            "mm_vmscan_lru_shrink_inactive" => Kind::Evicted { pages: self.pages? },
            _ => return None,
        })
    }
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "shard" => self.shard = u32::try_from(value).unwrap_or(u32::MAX),
            "now_ns" => self.now_ns = value,
            "mapping" => self.mapping = u16::try_from(value).ok(),
            "namespace" => self.namespace = u32::try_from(value).ok(),
            "pass" => self.pass = Some(value),
            "first_page" => self.first_page = Some(value),
            "end_page" => self.end_page = Some(value),
            "pages" => self.pages = Some(value),
            "commands" => self.commands = Some(value),
            "syncs" => self.syncs = Some(value),
            "dirty" => self.dirty = Some(value),
            _ => {}
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "op" => {
                self.op = match value {
                    "read" => Some(Op::Read),
                    "read_ahead" => Some(Op::ReadAhead),
                    "write" => Some(Op::Write),
                    "write_zeroes" => Some(Op::WriteZeroes),
                    _ => Some(Op::Other),
                }
            }
            "reason" => self.reason = Some(Reason::of(value)),
            "mode" => {
                self.mode = match value {
                    "none" => Some(Mode::Background),
                    "all" => Some(Mode::Integrity),
                    _ => None,
                }
            }
            "ended" => self.is_whole = value == "end",
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, _value: &dyn Debug) {
        // An error is there only if something has failed; what it says is in the log.
        self.has_failed |= field.name() == "error";
    }
}
