//! Queue pairs: full, tiny, long, several, closed and created again; no completion lost, none told twice.

use std::collections::HashMap;

use foliant_nvme::{
    CommandError, ControllerOptions, DriverError, Fua, Io, Lba, QueuePair, StatusCode, SubmitError,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::cases;
use crate::conformance::bench::{Need, QUEUE_PAIRS_MAX};
use crate::conformance::host::{Host, Load, next_of};
use crate::conformance::{Bench, pattern};

cases! {
    a_full_queue_says_so_and_goes_on_after_a_poll: [];
    a_batch_rings_once_however_long_it_is: [];
    nothing_reaches_the_device_before_the_doorbell: [Need::QueuePairs(2)];
    many_commands_in_flight_complete_each_with_its_own_data: [];
    no_completion_is_lost_while_tiny_queues_wrap_thousands_of_times: [];
    the_longest_queue_can_be_filled_to_its_last_slot: [];
    every_granted_queue_pair_works_and_one_more_is_refused: [];
    queue_pairs_work_side_by_side_in_threads_of_their_own: [Need::QueuePairs(2)];
    a_queue_pair_can_be_closed_and_created_again_and_again: [];
    a_close_gives_back_every_payload_once: [];
}

/// Writes `count` runs of `blocks` blocks from block 0 on, each with a pattern of its own; returns the runs.
fn runs(host: &mut Host, count: u64, blocks: u64) -> Vec<Vec<u8>> {
    let len = blocks as usize * host.block_bytes();
    let data: Vec<_> = (0..count).map(|run| pattern::of(1000 + run, len)).collect();
    for (run, data) in (0..).zip(&data) {
        host.write(run * blocks, data, Fua::No);
    }
    data
}

fn a_full_queue_says_so_and_goes_on_after_a_poll(bench: &Bench) {
    let mut host = bench.host_with(&ControllerOptions { io_queue_entries: 8, ..bench.options() });
    let slots = host.queue.free_commands();
    assert_eq!(slots, 7, "a queue holds a command less than it has entries");
    for _ in 0..3 {
        for _ in 0..slots {
            host.submit(Io::Flush, Load::nothing()).expect("there is a slot");
        }
        let refused = host.submit(Io::Flush, Load::nothing()).expect_err("there is no slot");
        assert_eq!(refused.reason, SubmitError::Full);
        for left in (0..slots).rev() {
            host.await_next().result.expect("the flush succeeds");
            assert_eq!(host.queue.in_flight(), left);
        }
    }
}

fn a_batch_rings_once_however_long_it_is(bench: &Bench) {
    let mut host = bench.host();
    let commands = host.queue.free_commands();
    let before = host.queue.stats().sq_doorbells;
    for _ in 0..commands {
        host.submit(Io::Flush, Load::nothing()).expect("there is a slot");
    }
    assert!(host.queue.ring());
    assert!(!host.queue.ring(), "there is nothing more to tell");
    assert_eq!(host.queue.stats().sq_doorbells - before, 1);
    for _ in 0..commands {
        host.await_next().result.expect("the flush succeeds");
    }
    assert_eq!(host.queue.stats().sq_doorbells - before, 1);
}

fn nothing_reaches_the_device_before_the_doorbell(bench: &Bench) {
    let mut host = bench.host_with(&ControllerOptions { io_queue_pairs: 2, ..bench.options() });
    let block = host.block_bytes();
    let old = pattern::of(1, block);
    host.write(0, &old, Fua::No);
    let mut other = host.controller.queue_pair().expect("a second queue pair");
    let new = Load::of(host.controller.arena(), &pattern::of(2, block));
    host.submit(Io::Write { lba: Lba(0), blocks: 1, fua: Fua::No }, new).expect("there is a slot");
    host.queue.pump();
    let blank = Load::of(host.controller.arena(), &vec![0; block]);
    other.submit(&host.namespace, Io::Read { lba: Lba(0), blocks: 1 }, blank).expect("there is a slot");
    let completion = next_of(&mut other);
    completion.result.expect("the read succeeds");
    assert!(completion.payload.bytes() == old, "the write has not been rung for");
    host.await_next().result.expect("the write succeeds");
    assert!(host.read(0, 1) == pattern::of(2, block));
}

fn many_commands_in_flight_complete_each_with_its_own_data(bench: &Bench) {
    let mut host = bench.host();
    let (count, blocks) = (64, 4);
    let data = runs(&mut host, count, blocks);
    let mut random = SmallRng::seed_from_u64(2);
    let mut wanted: HashMap<u64, u32> = HashMap::new();
    let (mut submitted, mut completed) = (0, 0);
    while completed < 600 {
        while submitted < 600 {
            let run = random.random_range(0..count);
            let blank = Load::of(host.controller.arena(), &vec![0; data[0].len()]);
            match host.submit(Io::Read { lba: Lba(run * blocks), blocks: blocks as u32 }, blank) {
                Ok(()) => *wanted.entry(run).or_default() += 1,
                Err(refused) if refused.reason == SubmitError::Full => break,
                Err(refused) => panic!("{refused}"),
            }
            submitted += 1;
        }
        let completion = host.await_next();
        completion.result.expect("the read succeeds");
        let run = data
            .iter()
            .position(|data| data == completion.payload.bytes())
            .expect("the data of one run, whole");
        let left = wanted.get_mut(&(run as u64)).filter(|left| **left > 0);
        *left.unwrap_or_else(|| panic!("run {run} was not asked for as often")) -= 1;
        completed += 1;
    }
    assert!(wanted.values().all(|&left| left == 0), "{wanted:?}");
}

fn no_completion_is_lost_while_tiny_queues_wrap_thousands_of_times(bench: &Bench) {
    for entries in [2, 3, 5] {
        let mut host = bench.host_with(&ControllerOptions { io_queue_entries: entries, ..bench.options() });
        let data = runs(&mut host, 8, 1);
        let total = 2000;
        let (mut submitted, mut completed) = (0u64, 0u64);
        while completed < total {
            while submitted < total && host.queue.free_commands() > 0 {
                let load = Load::of(host.controller.arena(), &vec![0; data[0].len()]);
                host.submit(Io::Read { lba: Lba(submitted % 8), blocks: 1 }, load).expect("there is a slot");
                submitted += 1;
            }
            let completion = host.await_next();
            completion.result.expect("the read succeeds");
            assert!(data.iter().any(|data| data == completion.payload.bytes()));
            completed += 1;
        }
        assert_eq!(host.queue.in_flight(), 0);
        let stats = host.queue.stats();
        assert_eq!(stats.completions, stats.commands(), "{entries} entries");
    }
}

fn the_longest_queue_can_be_filled_to_its_last_slot(bench: &Bench) {
    let options = ControllerOptions {
        io_queue_pairs: 1,
        io_queue_entries: 4096,
        // A slot needs no more than one list page.
        max_transfer_bytes: 4096.max(bench.facts().namespaces[0].block_bytes()),
        ..bench.options()
    };
    let mut host = bench.host_with(&options);
    let entries = host.controller.identity().queue_entries;
    for _ in 0..2 {
        let slots = host.queue.free_commands();
        assert_eq!(slots, u32::from(entries) - 1);
        for _ in 0..slots {
            host.submit(Io::Flush, Load::nothing()).expect("there is a slot");
        }
        let refused = host.submit(Io::Flush, Load::nothing()).expect_err("there is no slot");
        assert_eq!(refused.reason, SubmitError::Full);
        for _ in 0..slots {
            host.await_next().result.expect("the flush succeeds");
        }
    }
}

fn every_granted_queue_pair_works_and_one_more_is_refused(bench: &Bench) {
    let options =
        ControllerOptions { io_queue_pairs: QUEUE_PAIRS_MAX, io_queue_entries: 4, ..bench.options() };
    let mut host = bench.host_with(&options);
    let granted = host.controller.identity().queue_pairs;
    assert_eq!(granted, bench.facts().identity.queue_pairs, "as many as the last time");
    let mut others: Vec<QueuePair<Load>> =
        (1..granted).map(|_| host.controller.queue_pair().expect("it was granted")).collect();
    let more = host.controller.queue_pair::<Load>().map(drop);
    assert!(matches!(more, Err(DriverError::QueuePairsTaken { granted: g }) if g == granted), "{more:?}");
    // All at once, each in a place of its own.
    let len = host.block_bytes();
    for (lba, queue) in (1..).zip(&mut others) {
        let load = Load::of(host.controller.arena(), &pattern::of(lba, len));
        queue
            .submit(&host.namespace, Io::Write { lba: Lba(lba), blocks: 1, fua: Fua::No }, load)
            .expect("a slot");
        queue.ring();
    }
    host.write(0, &pattern::of(0, len), Fua::No);
    for queue in &mut others {
        next_of(queue).result.expect("the write succeeds");
    }
    for lba in 0..u64::from(granted) {
        assert!(host.read(lba, 1) == pattern::of(lba, len), "what queue pair {} wrote", lba + 1);
    }
    // A queue pair that was given back can be had again.
    drop(others.pop());
    assert!(granted == 1 || host.controller.queue_pair::<Load>().is_ok());
}

fn queue_pairs_work_side_by_side_in_threads_of_their_own(bench: &Bench) {
    let host = bench.host_with(&ControllerOptions { io_queue_pairs: 4, ..bench.options() });
    let (controller, namespace) = (&host.controller, &host.namespace);
    let threads = controller.identity().queue_pairs.min(4) - 1;
    let len = 4 * namespace.block_bytes() as usize;
    std::thread::scope(|scope| {
        for thread in 0..u64::from(threads) {
            let mut queue = controller.queue_pair::<Load>().expect("it was granted");
            scope.spawn(move || {
                let mut go = |io, load| {
                    queue.submit(namespace, io, load).expect("there is a slot");
                    let completion = next_of(&mut queue);
                    completion.result.expect("the command succeeds");
                    completion.payload
                };
                for round in 0..100u64 {
                    let lba = Lba(thread * 64 + round % 16 * 4);
                    let data = pattern::of(thread << 32 | round, len);
                    go(Io::Write { lba, blocks: 4, fua: Fua::No }, Load::of(controller.arena(), &data));
                    let blank = Load::of(controller.arena(), &vec![0; len]);
                    let read = go(Io::Read { lba, blocks: 4 }, blank);
                    assert!(read.bytes() == data, "thread {thread}, round {round}");
                }
            });
        }
    });
}

fn a_queue_pair_can_be_closed_and_created_again_and_again(bench: &Bench) {
    let Host { controller, namespace, queue } = bench.host();
    let first = queue.id();
    queue.close(|_| panic!("nothing was in flight")).expect("the queues are deleted");
    let block = namespace.block_bytes() as usize;
    for round in 0..20 {
        let mut queue = controller.queue_pair().expect("a queue pair");
        assert_eq!(queue.id(), first, "its number is free again");
        let load = Load::of(controller.arena(), &pattern::of(round, block));
        queue
            .submit(&namespace, Io::Write { lba: Lba(round), blocks: 1, fua: Fua::No }, load)
            .expect("a slot");
        next_of(&mut queue).result.expect("the write succeeds");
    }
    let mut host = Host { queue: controller.queue_pair().expect("a queue pair"), controller, namespace };
    for round in 0..20 {
        assert!(host.read(round, 1) == pattern::of(round, block), "round {round}");
    }
}

fn a_close_gives_back_every_payload_once(bench: &Bench) {
    let Host { controller, namespace, mut queue } = bench.host();
    let block = namespace.block_bytes() as usize;
    let free_bytes = controller.arena().free_bytes();
    let commands = queue.free_commands().min(32);
    for lba in 0..u64::from(commands) {
        let load = Load::of(controller.arena(), &pattern::of(lba, block));
        queue.submit(&namespace, Io::Write { lba: Lba(lba), blocks: 1, fua: Fua::No }, load).expect("a slot");
    }
    queue.ring();
    let mut returned = 0;
    queue
        .close(|completion| {
            // Each either was done, or was ended by the deletion of its queue, in the device's words or the driver's.
            let is_ended = match completion.result {
                Ok(()) | Err(CommandError::Aborted) => true,
                Err(error) => {
                    error.status().is_some_and(|status| status.code() == StatusCode::ABORTED_SQ_DELETION)
                }
            };
            assert!(is_ended, "{:?}", completion.result);
            returned += 1;
        })
        .expect("the queues are deleted");
    assert_eq!(returned, commands);
    assert_eq!(controller.arena().free_bytes(), free_bytes, "every buffer came back");
}
