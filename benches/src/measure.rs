//! How things are timed.
//!
//! Three habits keep the figures honest on a machine that others use, too:
//!
//! 1. The clock is the **processor time of the measuring thread**, not the time on the wall: being put off the core
//!    doesn't count. None of the timed loops sleeps, so on an idle machine the two are the same.
//! 2. Contestants **take turns**, round by round ([`race`]), so that a slow minute is slow for all of them.
//! 3. A figure is the **median** of its rounds, and a ratio the median of the ratios within each round. The first
//!    round warms up and isn't counted.

use std::hint::black_box;

use anyhow::Result;
use rustix::time::{ClockId, clock_gettime};

/// How much work a measurement may be.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Rounds asked for; `None` leaves it to the question.
    pub rounds: Option<usize>,
    /// A first look only.
    pub quick: bool,
}

impl Effort {
    /// Measured rounds: what was asked for, else three for a quick look and `usual` otherwise.
    pub fn rounds(self, usual: usize) -> usize {
        self.rounds.unwrap_or(if self.quick { 3 } else { usual })
    }
}

/// Measures the processor time of the thread that started it.
#[derive(Debug)]
pub struct ThreadClock {
    started_ns: f64,
}

impl ThreadClock {
    pub fn start() -> Self {
        Self { started_ns: thread_time_ns() }
    }

    /// Processor time since the start in nanoseconds.
    pub fn elapsed_ns(&self) -> f64 {
        thread_time_ns() - self.started_ns
    }
}

fn thread_time_ns() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 * 1e9 + now.tv_nsec as f64
}

/// Calls `visit` for each step and returns the mean processor time of a call in nanoseconds. The calls' results are
/// used, so that the compiler can't leave the work out.
#[inline]
pub fn ns_per_step<S: Copy>(steps: &[S], mut visit: impl FnMut(S) -> Result<u64>) -> Result<f64> {
    let clock = ThreadClock::start();
    let mut sum = 0u64;
    for &step in steps {
        sum = sum.wrapping_add(visit(step)?);
    }
    let elapsed_ns = clock.elapsed_ns();
    black_box(sum);
    Ok(elapsed_ns / steps.len() as f64)
}

/// One of several things that are measured beside each other.
pub struct Contestant<'a> {
    pub name: &'static str,
    /// Does one round and returns its figure.
    run: Box<dyn FnMut() -> Result<f64> + 'a>,
}

impl<'a> Contestant<'a> {
    pub fn new(name: &'static str, run: impl FnMut() -> Result<f64> + 'a) -> Self {
        Self { name, run: Box::new(run) }
    }
}

/// What a contestant's rounds came to.
#[derive(Clone, Debug)]
pub struct Timed {
    pub name: &'static str,
    /// A figure a round, in the order of the rounds.
    pub rounds: Vec<f64>,
}

impl Timed {
    pub fn median(&self) -> f64 {
        median(&self.rounds)
    }

    /// The smallest figure: what it comes to when nothing disturbs.
    pub fn best(&self) -> f64 {
        self.rounds.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// The median of this contestant's figure over `other`'s in the same round.
    pub fn ratio_to(&self, other: &Self) -> f64 {
        let ratios: Vec<f64> =
            self.rounds.iter().zip(&other.rounds).map(|(ours, theirs)| ours / theirs).collect();
        median(&ratios)
    }
}

/// Runs all contestants in turn, one uncounted round and then `rounds` counted ones.
///
/// # Errors
/// The first error of a contestant.
pub fn race(rounds: usize, contestants: &mut [Contestant<'_>]) -> Result<Vec<Timed>> {
    let mut timed: Vec<Timed> =
        contestants.iter().map(|c| Timed { name: c.name, rounds: Vec::with_capacity(rounds) }).collect();
    for round in 0..=rounds {
        for (contestant, timed) in contestants.iter_mut().zip(&mut timed) {
            let figure = (contestant.run)()?;
            if round > 0 {
                timed.rounds.push(figure);
            }
        }
    }
    Ok(timed)
}

/// The middle value, or the mean of the two in the middle.
///
/// # Panics
/// When there are no values.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), 2.5);
        assert_eq!(median(&[9.0, 1.0, 3.0]), 3.0);
    }

    #[test]
    fn a_ratio_compares_within_rounds() {
        let ours = Timed { name: "ours", rounds: vec![10.0, 100.0, 1000.0] };
        let theirs = Timed { name: "theirs", rounds: vec![5.0, 50.0, 500.0] };
        assert_eq!(ours.ratio_to(&theirs), 2.0);
    }

    #[test]
    fn the_warm_up_round_is_not_counted() {
        let mut calls = 0;
        let timed = race(
            3,
            &mut [Contestant::new("one", || {
                calls += 1;
                Ok(f64::from(calls))
            })],
        );
        assert_eq!(timed.unwrap()[0].rounds, [2.0, 3.0, 4.0]);
    }
}
