//! Cases that failed once. They are run before any others; a new one is pasted here as the failing run printed it.

use foliant::RetryPolicy;

use super::Case;
use super::case::Step::{
    Abandon, Clone, Close, Discard, Drop, Fault, Finish, FlushUntil, Kill, Open, Pin, PinMut, Prefetch, Read,
    Release, Scan, Settle, Shard, Sync, SyncRange, Time, Write, WriteLsn,
};
use super::case::Trouble::{Delay, Lose, Media, WriteFatal, WriteTransient, Zeroes};
use super::case::WriteCache::{None as NoCache, Volatile};
use super::case::{Command, Setup};

const PLAIN: Setup = Setup {
    shards: 1,
    frames: 55,
    mappings: 1,
    queue_entries: 64,
    mdts: 0,
    noiob_blocks: 0,
    awupf_z: 0,
    block_bytes: 512,
    write_cache: Volatile,
    background_percent: 50,
    dirty_percent: 100,
    readahead_bytes_max: 512 << 10,
    retry: RetryPolicy::Hard,
    is_gated: false,
    orders: [0; 2],
};

/// Their names, and the cases.
#[must_use]
pub fn all() -> Vec<(&'static str, Case)> {
    vec![
        ("a sync that fails by a pin takes the event of a failed write with it", failed_write_behind_a_pin()),
        ("a discard that gives up leaves pages as the device last had them", discard_that_gives_up()),
        ("what a killed process left in flight is lost without a write cache", zeroes_in_flight_at_a_kill()),
        ("who waits at the dirty limit goes on when others give up", others_give_up_at_the_dirty_limit()),
        (
            "no sync succeeds over what a discard took out before its shard failed",
            read_lost_beside_a_discard(),
        ),
        ("a checkpoint writes all parts of a page of which one failed", part_of_a_large_page_failed()),
        ("a close beside a second failure", close_beside_a_second_failure()),
        ("a sync past errors beside a discard whose command was lost", sync_beside_a_lost_discard()),
        ("zeroes of two discards that the device ends in the other order", zeroes_in_the_other_order()),
        ("a pin on a page that was zeroed twice", pin_on_a_page_zeroed_twice()),
        ("a read beside a discard whose zeroes fail", read_beside_failed_zeroes()),
        ("a mapping that is opened while its close fails", opened_beside_a_failing_close()),
        ("a sync beside writes that are tried again", sync_beside_retries()),
        ("a writer behind a page of which one command fails", writer_behind_a_page_in_part()),
        ("a retry while a mapping is opened", retry_beside_an_open()),
        ("a soft sync past an error and put-off writes", soft_sync_past_errors()),
        ("a failure that nobody has heard of when a sync ends", failure_not_heard_of_yet()),
        ("a discard that a pin on a poisoned page holds up", pin_on_a_poisoned_page()),
        ("a prefetch of a mapping that stays closed", prefetch_of_what_stays_closed()),
        ("a writer behind a page of another mapping in part", writer_behind_another_mappings_page()),
        ("a handle cloned after a close that told of a page in part", clone_after_a_failed_close()),
    ]
}

fn part_of_a_large_page_failed() -> Case {
    let setup = Setup { mdts: 1, background_percent: 29, readahead_bytes_max: 0, orders: [4, 0], ..PLAIN };
    let steps = [
        Fault(WriteFatal { skip: 0, times: 1, late_us: 0 }),
        WriteLsn { on: 0, at: 0, len: 1 },
        Settle,
        FlushUntil { on: 0, behind: 0 },
    ];
    Case::new(setup, &steps)
}

fn read_lost_beside_a_discard() -> Case {
    let setup = Setup { background_percent: 75, readahead_bytes_max: 0, ..PLAIN };
    Case::new(
        setup,
        &[
            Write { on: 0, at: 139_264, len: 1 },
            Settle,
            Sync { on: 0 },
            Settle,
            Fault(Lose { command: Command::Read, skip: 0 }),
            Write { on: 0, at: 139_264, len: 1 },
            Pin { on: 0, page: 35 },
            Discard { on: 0, at: 139_264, len: 9728 },
            Finish { op: 0 },
            Sync { on: 0 },
        ],
    )
}

fn others_give_up_at_the_dirty_limit() -> Case {
    let setup = Setup {
        frames: 163,
        background_percent: 7,
        dirty_percent: 30,
        readahead_bytes_max: 0,
        orders: [4, 0],
        ..PLAIN
    };
    let late = Write { on: 0, at: 110_592, len: 1 };
    let steps =
        [Pin { on: 0, page: 25 }, Write { on: 0, at: 49152, len: 20480 }, late, late, Finish { op: 0 }];
    Case::new(setup, &steps)
}

fn failed_write_behind_a_pin() -> Case {
    Case::new(
        PLAIN,
        &[
            PinMut { on: 0, page: 19, change: 700 },
            Settle,
            Release { op: 0 },
            Write { on: 0, at: 75264, len: 4096 },
            PinMut { on: 0, page: 19, change: 700 },
            Fault(WriteFatal { skip: 0, times: 1, late_us: 0 }),
            Write { on: 0, at: 0, len: 1 },
            Read { on: 0, at: 0, len: 1 },
            Settle,
            Sync { on: 0 },
            Pin { on: 0, page: 0 },
            Finish { op: 1 },
        ],
    )
}

fn discard_that_gives_up() -> Case {
    Case::new(
        PLAIN,
        &[
            Write { on: 0, at: 253_952, len: 16384 },
            Time { us: 1 },
            PinMut { on: 0, page: 66, change: 1 },
            Sync { on: 0 },
            Settle,
            Write { on: 0, at: 266_240, len: 1 },
            Discard { on: 0, at: 266_240, len: 12288 },
            Finish { op: 0 },
        ],
    )
}

fn close_beside_a_second_failure() -> Case {
    Case::new(
        Setup { mdts: 1, background_percent: 39, readahead_bytes_max: 0, orders: [2, 2], ..PLAIN },
        &[
            Write { on: 0, at: 0, len: 1 },
            Fault(WriteFatal { skip: 0, times: 1, late_us: 0 }),
            Settle,
            Sync { on: 0 },
            Settle,
            Fault(WriteFatal { skip: 1, times: 1, late_us: 0 }),
            Close { on: 0 },
        ],
    )
}

fn sync_beside_a_lost_discard() -> Case {
    Case::new(
        Setup { shards: 3, background_percent: 58, readahead_bytes_max: 0, ..PLAIN },
        &[
            Fault(Lose { command: Command::WriteZeroes, skip: 0 }),
            Discard { on: 0, at: 368_640, len: 1 },
            Write { on: 0, at: 274_432, len: 1 },
            Fault(Media { mapping: 0, page: 67 }),
            Discard { on: 0, at: 376_832, len: 4096 },
            Finish { op: 0 },
            Write { on: 0, at: 368_640, len: 1 },
            PinMut { on: 0, page: 0, change: 1 },
            Settle,
            Sync { on: 0 },
            Shard { shard: 7 },
        ],
    )
}

fn zeroes_in_the_other_order() -> Case {
    Case::new(
        Setup { background_percent: 40, readahead_bytes_max: 0, ..PLAIN },
        &[
            Fault(Delay { command: Command::WriteZeroes, skip: 0, times: 1, us: 1 }),
            Discard { on: 0, at: 94_208, len: 32_768 },
            Settle,
            Discard { on: 0, at: 110_592, len: 4096 },
        ],
    )
}

fn pin_on_a_page_zeroed_twice() -> Case {
    Case::new(
        Setup { background_percent: 38, readahead_bytes_max: 0, ..PLAIN },
        &[
            Fault(Delay { command: Command::WriteZeroes, skip: 0, times: 1, us: 883_184 }),
            Discard { on: 0, at: 204_800, len: 10_844 },
            Settle,
            Discard { on: 0, at: 200_704, len: 20_480 },
            PinMut { on: 0, page: 51, change: 4096 },
            Shard { shard: 0 },
            Time { us: 3_262_603 },
            Sync { on: 0 },
            Settle,
        ],
    )
}

fn read_beside_failed_zeroes() -> Case {
    Case::new(
        Setup { frames: 35, background_percent: 13, readahead_bytes_max: 0, is_gated: true, ..PLAIN },
        &[
            WriteLsn { on: 0, at: 0, len: 1 },
            WriteLsn { on: 0, at: 4096, len: 20_480 },
            Write { on: 0, at: 348_160, len: 7094 },
            Settle,
            Write { on: 0, at: 40_960, len: 1 },
            Settle,
            Write { on: 0, at: 352_256, len: 8192 },
            Fault(Zeroes { skip: 0, times: 1, late_us: 0 }),
            Discard { on: 0, at: 344_064, len: 12_288 },
            Settle,
            Read { on: 0, at: 352_256, len: 1 },
        ],
    )
}

fn opened_beside_a_failing_close() -> Case {
    Case::new(
        Setup { background_percent: 21, readahead_bytes_max: 0, ..PLAIN },
        &[
            Fault(Media { mapping: 11, page: 44 }),
            Write { on: 0, at: 180_224, len: 1 },
            Close { on: 0 },
            Finish { op: 0 },
            Open { mapping: 0 },
        ],
    )
}

fn sync_beside_retries() -> Case {
    Case::new(
        Setup { mdts: 1, background_percent: 44, readahead_bytes_max: 0, ..PLAIN },
        &[
            Write { on: 0, at: 0, len: 4096 },
            Time { us: 6_615_813 },
            Write { on: 0, at: 0, len: 7693 },
            Write { on: 0, at: 19_968, len: 5120 },
            Fault(WriteTransient { skip: 0, times: 3 }),
            Time { us: 5_500_154 },
            Write { on: 0, at: 53_248, len: 1 },
            Settle,
            Sync { on: 0 },
            Write { on: 0, at: 36_864, len: 1 },
        ],
    )
}

fn writer_behind_a_page_in_part() -> Case {
    let setup = Setup {
        noiob_blocks: 16,
        background_percent: 23,
        dirty_percent: 30,
        readahead_bytes_max: 0,
        orders: [4, 0],
        ..PLAIN
    };
    Case::new(
        setup,
        &[
            Write { on: 0, at: 290_816, len: 1 },
            Fault(Media { mapping: 0, page: 71 }),
            PinMut { on: 0, page: 0, change: 0 },
            Write { on: 0, at: 0, len: 1 },
            Finish { op: 0 },
        ],
    )
}

/// The page of which one command fails is another mapping's, and the same shard's.
fn writer_behind_another_mappings_page() -> Case {
    let setup = Setup {
        frames: 112,
        mappings: 2,
        noiob_blocks: 12,
        background_percent: 28,
        dirty_percent: 30,
        readahead_bytes_max: 0,
        orders: [0, 4],
        ..PLAIN
    };
    let first = Write { on: 0, at: 0, len: 1 };
    Case::new(
        setup,
        &[
            PinMut { on: 9, page: 0, change: 700 },
            Clone { on: 0 },
            Discard { on: 0, at: 0, len: 1 },
            first,
            first,
            first,
            Open { mapping: 0 },
            PinMut { on: 0, page: 0, change: 1 },
            Open { mapping: 0 },
            Write { on: 3, at: 77_824, len: 1 },
            Fault(Media { mapping: 0, page: 19 }),
            Write { on: 0, at: 73_728, len: 1 },
            Finish { op: 0 },
        ],
    )
}

/// A close tells of a page of which one command has failed, while its queue still has something else: who is cloned afterwards
/// need not be told of it again.
fn clone_after_a_failed_close() -> Case {
    let setup = Setup {
        frames: 66,
        noiob_blocks: 16,
        background_percent: 26,
        is_gated: true,
        orders: [2, 2],
        ..PLAIN
    };
    Case::new(
        setup,
        &[
            Write { on: 0, at: 61_440, len: 32_768 },
            Read { on: 0, at: 20_480, len: 22_359 },
            Write { on: 0, at: 314_755, len: 15_345 },
            Read { on: 0, at: 0, len: 1 },
            Write { on: 0, at: 262_144, len: 1 },
            Pin { on: 0, page: 30 },
            Fault(Media { mapping: 0, page: 0 }),
            PinMut { on: 0, page: 0, change: 1 },
            Pin { on: 0, page: 0 },
            Settle,
            Abandon { op: 1 },
            Pin { on: 0, page: 35 },
            Close { on: 0 },
            Write { on: 0, at: 110_592, len: 1 },
            Settle,
            Clone { on: 0 },
        ],
    )
}

fn retry_beside_an_open() -> Case {
    Case::new(
        Setup { mappings: 2, background_percent: 35, readahead_bytes_max: 0, ..PLAIN },
        &[
            Write { on: 0, at: 0, len: 1 },
            Fault(WriteTransient { skip: 0, times: 1 }),
            Drop { on: 0 },
            Settle,
            Fault(Lose { command: Command::Read, skip: 0 }),
            Discard { on: 1, at: 0, len: 1 },
        ],
    )
}

fn soft_sync_past_errors() -> Case {
    let setup = Setup {
        queue_entries: 8,
        mdts: 1,
        background_percent: 73,
        readahead_bytes_max: 0,
        retry: RetryPolicy::Soft,
        ..PLAIN
    };
    Case::new(
        setup,
        &[
            Write { on: 0, at: 81_920, len: 1 },
            Write { on: 0, at: 0, len: 1 },
            Write { on: 0, at: 94_208, len: 1 },
            Fault(Media { mapping: 0, page: 0 }),
            Scan { on: 0, at: 32_768, len: 8192 },
            Fault(WriteTransient { skip: 0, times: 10 }),
            Settle,
            Sync { on: 0 },
            Write { on: 0, at: 36_864, len: 27_239 },
        ],
    )
}

/// A discard that gives up waiting for a pin told of the page's failed writes instead, took that for the device's refusal to
/// zero pages, and wrote zeros over all of them.
fn pin_on_a_poisoned_page() -> Case {
    Case::new(
        Setup { background_percent: 37, readahead_bytes_max: 0, ..PLAIN },
        &[
            Write { on: 0, at: 126_976, len: 1 },
            Fault(Media { mapping: 0, page: 31 }),
            Pin { on: 0, page: 31 },
            Discard { on: 0, at: 122_880, len: 23_035 },
            Write { on: 0, at: 131_072, len: 1 },
            Finish { op: 0 },
        ],
    )
}

/// A close whose shard loses a command leaves a mapping that stays closed, and says why to whatever comes.
fn prefetch_of_what_stays_closed() -> Case {
    Case::new(
        Setup { background_percent: 6, readahead_bytes_max: 0, ..PLAIN },
        &[
            Fault(Lose { command: Command::Write, skip: 0 }),
            Close { on: 0 },
            Write { on: 0, at: 0, len: 1 },
            Scan { on: 0, at: 0, len: 1 },
            Prefetch { on: 0, at: 0, len: 1 },
        ],
    )
}

/// A shard that runs short of frames lets the device begin at once with what its doorbell told it of. So the device has failed
/// the write of a page before the shard looks for completions again, in its next step; a sync of another page ends in
/// between, and has nothing to tell yet.
fn failure_not_heard_of_yet() -> Case {
    let setup = Setup {
        frames: 64,
        mdts: 2,
        write_cache: NoCache,
        background_percent: 10,
        dirty_percent: 60,
        readahead_bytes_max: 0,
        orders: [2, 2],
        ..PLAIN
    };
    Case::new(
        setup,
        &[
            Discard { on: 0, at: 77_824, len: 5151 },
            Write { on: 0, at: 307_200, len: 32_768 },
            Read { on: 0, at: 258_048, len: 8192 },
            Write { on: 0, at: 0, len: 1 },
            Write { on: 0, at: 20_480, len: 1 },
            Fault(WriteTransient { skip: 2, times: 18 }),
            Write { on: 0, at: 331_776, len: 22_813 },
            Write { on: 0, at: 139_264, len: 1 },
            Settle,
            Discard { on: 0, at: 372_736, len: 4343 },
            Write { on: 0, at: 176_128, len: 1 },
            Write { on: 0, at: 0, len: 1 },
            Write { on: 0, at: 57_344, len: 1 },
            Finish { op: 0 },
            Fault(WriteFatal { skip: 1, times: 1, late_us: 0 }),
            Finish { op: 0 },
            SyncRange { on: 0, at: 188_416, len: 1 },
            Read { on: 0, at: 45_056, len: 1 },
        ],
    )
}

fn zeroes_in_flight_at_a_kill() -> Case {
    Case::new(
        Setup { write_cache: NoCache, ..PLAIN },
        &[
            PinMut { on: 0, page: 30, change: 4096 },
            Settle,
            Abandon { op: 0 },
            Fault(Zeroes { skip: 0, times: 1, late_us: 1 }),
            Sync { on: 0 },
            Discard { on: 0, at: 110_592, len: 19527 },
            Settle,
            Kill,
        ],
    )
}
