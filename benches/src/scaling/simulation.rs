//! The message path as a queueing model: threads that ask, shards that serve, and the way between them.
//!
//! ```text
//!             hits: nobody else takes part
//!            ╭──╮
//! thread ───►│  │──► send ──► on its way ──► inbox of a shard ──► step: serves what waits, 64 at most
//!   ▲        ╰──╯                                                    │
//!   └──────────────── take ◄── on its way ◄──────────────────────────╯  all answers at its end
//! ```
//!
//! A thread has some tasks, of which one is running and the others wait for answers; a task makes hits until one of its
//! accesses misses. Which shard a missed page belongs to is drawn evenly. The costs are measured ones
//! ([`shards`](super::shards)); what the model leaves out is what machines share: memory bandwidth, caches, the
//! device. It runs on a clock of its own from a seed, so the same costs come to the same figures everywhere.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Requests that a shard serves in one step at most.
const STEP_REQUESTS_MAX: usize = 64;

/// What everything takes, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    /// A hit, touched and released.
    pub hit_ns: f64,
    /// The asking thread: from the look-up that finds nothing to the message in the inbox.
    pub send_ns: f64,
    /// From one core to another, one way.
    pub way_ns: f64,
    /// The asking thread: from the answer to the page released.
    pub take_ns: f64,
    /// A shard's step, whatever it serves.
    pub step_ns: f64,
    /// And for each request in it.
    pub request_ns: f64,
}

/// Who takes part.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Threads that ask, each on a core of its own.
    pub threads: usize,
    /// Tasks of each thread; of one task, a thread does nothing while it waits.
    pub tasks: usize,
    /// Shards, each on a core of its own.
    pub shards: usize,
    /// Share of the accesses that miss, from 0 to 1.
    pub misses: f64,
}

/// Accesses a second of processor time of the model's clock.
pub fn accesses_per_second(costs: &Costs, scenario: Scenario, span_ns: u64, seed: u64) -> f64 {
    let mut model = Model::new(costs, scenario, seed);
    model.run(span_ns as f64);
    model.accesses as f64 / (span_ns as f64 / 1e9)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// An answer, or a task's first turn, is with its thread.
    Ready { thread: usize, answered: bool },
    /// The thread can turn to its next task.
    ThreadFree { thread: usize },
    /// A request is in the inbox.
    Arrives { shard: usize, thread: usize },
    /// The shard's step ends.
    StepEnds { shard: usize },
}

#[derive(Clone, Debug, Default)]
struct Thread {
    /// Tasks that can go on, and whether an answer waits to be taken.
    ready: VecDeque<bool>,
    busy: bool,
}

#[derive(Clone, Debug, Default)]
struct Server {
    inbox: VecDeque<usize>,
    /// Whose requests the step serves; empty between steps.
    serving: Vec<usize>,
}

struct Model<'a> {
    costs: &'a Costs,
    scenario: Scenario,
    /// By time, then in the order in which they were made. Times are picoseconds, so that they have an order.
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    made: u64,
    now_ns: f64,
    threads: Vec<Thread>,
    servers: Vec<Server>,
    random: SmallRng,
    accesses: u64,
    end_ns: f64,
}

impl<'a> Model<'a> {
    fn new(costs: &'a Costs, scenario: Scenario, seed: u64) -> Self {
        let mut model = Self {
            costs,
            scenario,
            events: BinaryHeap::new(),
            made: 0,
            now_ns: 0.0,
            threads: vec![Thread::default(); scenario.threads],
            servers: vec![Server::default(); scenario.shards],
            random: SmallRng::seed_from_u64(seed),
            accesses: 0,
            end_ns: 0.0,
        };
        for _ in 0..scenario.tasks {
            for thread in 0..scenario.threads {
                model.after(0.0, Event::Ready { thread, answered: false });
            }
        }
        model
    }

    fn after(&mut self, delay_ns: f64, event: Event) {
        let at_ps = ((self.now_ns + delay_ns) * 1000.0) as u64;
        self.events.push(Reverse((at_ps, self.made, event)));
        self.made += 1;
    }

    fn run(&mut self, span_ns: f64) {
        self.end_ns = span_ns;
        while let Some(Reverse((at_ps, _, event))) = self.events.pop() {
            self.now_ns = at_ps as f64 / 1000.0;
            if self.now_ns >= span_ns {
                return;
            }
            match event {
                Event::Ready { thread, answered } => {
                    self.threads[thread].ready.push_back(answered);
                    if !self.threads[thread].busy {
                        self.turn(thread);
                    }
                }
                Event::ThreadFree { thread } => {
                    self.threads[thread].busy = false;
                    self.turn(thread);
                }
                Event::Arrives { shard, thread } => {
                    self.servers[shard].inbox.push_back(thread);
                    if self.servers[shard].serving.is_empty() {
                        self.step(shard);
                    }
                }
                Event::StepEnds { shard } => {
                    for thread in std::mem::take(&mut self.servers[shard].serving) {
                        self.after(self.costs.way_ns, Event::Ready { thread, answered: true });
                    }
                    self.step(shard);
                }
            }
        }
    }

    /// The thread goes on with a task that can: takes its answer, makes its hits, and sends its next request.
    fn turn(&mut self, thread: usize) {
        let Some(answered) = self.threads[thread].ready.pop_front() else { return };
        let take_ns = if answered { self.costs.take_ns } else { 0.0 };
        self.accesses += u64::from(answered);
        let left_ns = self.end_ns - self.now_ns - take_ns;
        let hits_to_the_end = (left_ns / self.costs.hit_ns).max(0.0) as u64;
        let hits = self.hits_before_a_miss().min(hits_to_the_end);
        self.accesses += hits;
        let busy_ns = take_ns + hits as f64 * self.costs.hit_ns + self.costs.send_ns;
        let shard = self.random.random_range(0..self.scenario.shards);
        self.after(busy_ns + self.costs.way_ns, Event::Arrives { shard, thread });
        self.after(busy_ns, Event::ThreadFree { thread });
        self.threads[thread].busy = true;
    }

    /// How many accesses hit before one misses: a geometric distribution.
    fn hits_before_a_miss(&mut self) -> u64 {
        let misses = self.scenario.misses;
        if misses <= 0.0 {
            return u64::MAX;
        }
        if misses >= 1.0 {
            return 0;
        }
        let draw: f64 = 1.0 - self.random.random::<f64>();
        (draw.ln() / (1.0 - misses).ln()) as u64
    }

    fn step(&mut self, shard: usize) {
        let server = &mut self.servers[shard];
        let count = server.inbox.len().min(STEP_REQUESTS_MAX);
        if count == 0 {
            return;
        }
        server.serving.extend(server.inbox.drain(..count));
        self.after(self.costs.step_ns + count as f64 * self.costs.request_ns, Event::StepEnds { shard });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COSTS: Costs = Costs {
        hit_ns: 50.0,
        send_ns: 100.0,
        way_ns: 200.0,
        take_ns: 100.0,
        step_ns: 300.0,
        request_ns: 400.0,
    };
    const SPAN_NS: u64 = 10_000_000;

    fn rate(threads: usize, tasks: usize, shards: usize, misses: f64) -> f64 {
        accesses_per_second(&COSTS, Scenario { threads, tasks, shards, misses }, SPAN_NS, 1)
    }

    fn is_near(rate: f64, expected: f64) -> bool {
        (rate / expected - 1.0).abs() < 0.01
    }

    #[test]
    fn hits_alone_are_a_matter_of_the_threads() {
        for shards in [1, 7] {
            assert!(is_near(rate(3, 1, shards, 0.0), 3.0 * 1e9 / COSTS.hit_ns));
        }
    }

    #[test]
    fn a_thread_that_only_misses_takes_the_whole_way_each_time() {
        let round_ns = 100.0 + 200.0 + 300.0 + 400.0 + 200.0 + 100.0;
        assert!(is_near(rate(1, 1, 1, 1.0), 1e9 / round_ns));
        assert!(is_near(rate(1, 1, 64, 1.0), 1e9 / round_ns));
    }

    #[test]
    fn some_misses_cost_their_share() {
        let round_ns = 100.0 + 200.0 + 300.0 + 400.0 + 200.0 + 100.0;
        let mean_ns = 0.1 * round_ns + 0.9 * COSTS.hit_ns;
        let scenario = Scenario { threads: 1, tasks: 1, shards: 1, misses: 0.1 };
        // Long enough for what is drawn to come near its mean.
        let rate = accesses_per_second(&COSTS, scenario, 50 * SPAN_NS, 1);
        assert!(is_near(rate, 1e9 / mean_ns), "{}", rate * mean_ns / 1e9);
    }

    #[test]
    fn a_shard_asked_by_many_serves_full_steps() {
        let per_request_ns = COSTS.request_ns + COSTS.step_ns / STEP_REQUESTS_MAX as f64;
        assert!(is_near(rate(200, 1, 1, 1.0), 1e9 / per_request_ns));
    }

    #[test]
    fn a_thread_of_many_tasks_is_limited_by_itself() {
        // Two shards could serve more than one thread can ask.
        assert!(is_near(rate(1, 64, 8, 1.0), 1e9 / (COSTS.send_ns + COSTS.take_ns)));
    }

    #[test]
    fn the_same_seed_comes_to_the_same_figure() {
        assert_eq!(rate(5, 3, 4, 0.3).to_bits(), rate(5, 3, 4, 0.3).to_bits());
    }
}
