//! From a failing case to a small one: steps are taken out in ever smaller chunks, then numbers made simpler, as long as
//! the same rule is broken (delta debugging).

use std::time::{Duration, Instant};

use foliant::RetryPolicy;

use super::case::{Case, Notice, Setup, Step, Trouble, WriteCache};
use super::{Violation, run};

/// Runs that shrinking may cost.
const TRIES_MAX: u32 = 3_000;
/// The longest time that it may take.
const TIME_MAX: Duration = Duration::from_secs(60);

/// The smallest failing case found, and how it fails.
#[must_use]
pub fn shrink(case: &Case, violation: &Violation) -> (Case, Violation) {
    let until = Instant::now() + TIME_MAX;
    let mut shrinker = Shrinker { until, case: case.clone(), violation: violation.clone(), tries: 0 };
    // What comes after the step at which it showed has no part in it.
    let shown = (violation.step + 1).min(case.steps.len());
    shrinker.try_steps(case.steps[..shown].to_vec());
    loop {
        let before = shrinker.case.clone();
        shrinker.remove_chunks();
        shrinker.simplify_setup();
        shrinker.simplify_steps();
        if shrinker.case == before || shrinker.is_over() {
            return (shrinker.case, shrinker.violation);
        }
    }
}

struct Shrinker {
    until: Instant,
    case: Case,
    violation: Violation,
    tries: u32,
}

impl Shrinker {
    /// Takes the candidate over if it fails by the same rule.
    fn try_case(&mut self, candidate: Case) -> bool {
        if candidate == self.case || self.is_over() {
            return false;
        }
        self.tries += 1;
        match run(&candidate) {
            Err(violation) if violation.rule == self.violation.rule => {
                (self.case, self.violation) = (candidate, violation);
                true
            }
            _ => false,
        }
    }

    fn is_over(&self) -> bool {
        self.tries >= TRIES_MAX || Instant::now() > self.until
    }

    fn try_steps(&mut self, steps: Vec<Step>) -> bool {
        self.try_case(Case { setup: self.case.setup, steps })
    }

    fn remove_chunks(&mut self) {
        let mut chunk = (self.case.steps.len() / 2).max(1);
        loop {
            let mut at = 0;
            while at < self.case.steps.len() {
                let mut steps = self.case.steps.clone();
                steps.drain(at..(at + chunk).min(steps.len()));
                if !self.try_steps(steps) {
                    at += chunk;
                }
            }
            if chunk == 1 {
                return;
            }
            chunk /= 2;
        }
    }

    fn simplify_setup(&mut self) {
        let plain: [fn(&mut Setup); 14] = [
            |setup| setup.shards = 1,
            |setup| setup.mappings = 1,
            |setup| setup.mdts = 0,
            |setup| setup.noiob_blocks = 0,
            |setup| setup.awupf_z = 0,
            |setup| setup.block_bytes = 512,
            |setup| setup.queue_entries = 64,
            |setup| setup.orders = [0; 2],
            |setup| setup.is_gated = false,
            |setup| setup.dirty_percent = 100,
            |setup| setup.readahead_bytes_max = 0,
            |setup| setup.retry = RetryPolicy::Hard,
            |setup| setup.frames = 55,
            |setup| setup.write_cache = WriteCache::Volatile,
        ];
        for simplify in plain {
            let mut candidate = self.case.clone();
            simplify(&mut candidate.setup);
            self.try_case(candidate);
        }
    }

    fn simplify_steps(&mut self) {
        for at in 0..self.case.steps.len() {
            loop {
                let simpler = simpler(&self.case.steps[at]);
                let taken = simpler.into_iter().any(|step| {
                    let mut steps = self.case.steps.clone();
                    steps[at] = step;
                    self.try_steps(steps)
                });
                if !taken {
                    break;
                }
            }
        }
    }
}

/// Steps like this one, with smaller numbers.
fn simpler(step: &Step) -> Vec<Step> {
    let ons = |on: u8| [0, on / 2].into_iter().filter(move |&other| other < on);
    let ranges = |at: u32, len: u32| {
        let candidates =
            [(0, len), (at / 4096 * 4096, len), (at / 8192 * 4096, len), (at, 1), (at, len / 2), (at, 4096)];
        candidates.into_iter().filter(move |&(a, l)| l > 0 && (a, l) != (at, len) && (a < at || l < len))
    };
    match *step {
        Step::Write { on, at, len } => {
            both(ons(on), ranges(at, len), on, (at, len), |on, (at, len)| Step::Write { on, at, len })
        }
        Step::Read { on, at, len } => {
            both(ons(on), ranges(at, len), on, (at, len), |on, (at, len)| Step::Read { on, at, len })
        }
        Step::WriteLsn { on, at, len } => {
            let mut steps =
                both(ons(on), ranges(at, len), on, (at, len), |on, (at, len)| Step::WriteLsn { on, at, len });
            steps.push(Step::Write { on, at, len });
            steps
        }
        Step::Pass { on, how, budget, put_off } => {
            let pass = |on, (budget, put_off)| Step::Pass { on, how, budget, put_off };
            let others = [(0, put_off), (budget, 0)].into_iter().filter(|&other| other != (budget, put_off));
            both(ons(on), others, on, (budget, put_off), pass)
        }
        Step::Advance { behind } => ons(behind).map(|behind| Step::Advance { behind }).collect(),
        Step::FlushUntil { on, behind } => {
            both(ons(on), ons(behind), on, behind, |on, behind| Step::FlushUntil { on, behind })
        }
        Step::Oldest { on } => ons(on).map(|on| Step::Oldest { on }).collect(),
        Step::TryWrite { on, at, len } => {
            let mut steps =
                both(ons(on), ranges(at, len), on, (at, len), |on, (at, len)| Step::TryWrite { on, at, len });
            steps.push(Step::Write { on, at, len });
            steps
        }
        Step::Scan { on, at, len } => {
            let mut steps =
                both(ons(on), ranges(at, len), on, (at, len), |on, (at, len)| Step::Scan { on, at, len });
            steps.push(Step::Read { on, at, len });
            steps
        }
        Step::Prefetch { on, at, len } => {
            both(ons(on), ranges(at, len), on, (at, len), |on, (at, len)| Step::Prefetch { on, at, len })
        }
        Step::Discard { on, at, len } => {
            both(ons(on), ranges(at, len), on, (at, len), |on, (at, len)| Step::Discard { on, at, len })
        }
        Step::SyncRange { on, at, len } => {
            let mut steps = both(ons(on), ranges(at, len), on, (at, len), |on, (at, len)| Step::SyncRange {
                on,
                at,
                len,
            });
            steps.push(Step::Sync { on });
            steps
        }
        Step::Pin { on, page } => both(ons(on), ons(page), on, page, |on, page| Step::Pin { on, page }),
        Step::PinMut { on, page, change } => {
            both(ons(on), ons(page), on, page, |on, page| Step::PinMut { on, page, change })
        }
        Step::Sync { on } => ons(on).map(|on| Step::Sync { on }).collect(),
        Step::Clone { on } => ons(on).map(|on| Step::Clone { on }).collect(),
        Step::Drop { on } => ons(on).map(|on| Step::Drop { on }).collect(),
        Step::Close { on } => ons(on).map(|on| Step::Close { on }).collect(),
        Step::Open { mapping } => ons(mapping).map(|mapping| Step::Open { mapping }).collect(),
        Step::Release { op } => ons(op).map(|op| Step::Release { op }).collect(),
        Step::Poll { op } => ons(op).map(|op| Step::Poll { op }).collect(),
        Step::Abandon { op } => ons(op).map(|op| Step::Abandon { op }).collect(),
        Step::Finish { op } => ons(op).map(|op| Step::Finish { op }).chain([Step::Settle]).collect(),
        Step::Shard { shard } => ons(shard).map(|shard| Step::Shard { shard }).collect(),
        Step::Time { us } if us > 1 => vec![Step::Time { us: us / 2 }],
        Step::Cut { seed, notice } => {
            let seeds = [0, seed / 2].into_iter().filter(|&other| other < seed);
            let mut steps: Vec<_> = seeds.map(|seed| Step::Cut { seed, notice }).collect();
            if notice == Notice::Yes {
                steps.push(Step::Cut { seed, notice: Notice::No });
            }
            steps
        }
        Step::Fault(trouble) => simpler_trouble(trouble).into_iter().map(Step::Fault).collect(),
        Step::Settle | Step::Mend | Step::Kill | Step::Time { .. } => Vec::new(),
    }
}

/// One number simpler, the other as it is.
fn both<A: Copy, B: Copy>(
    firsts: impl Iterator<Item = A>,
    seconds: impl Iterator<Item = B>,
    first: A,
    second: B,
    step: impl Fn(A, B) -> Step,
) -> Vec<Step> {
    firsts.map(|first| step(first, second)).chain(seconds.map(|second| step(first, second))).collect()
}

fn simpler_trouble(trouble: Trouble) -> Vec<Trouble> {
    use Trouble::{Delay, Flush, Lose, Media, Read, Stop, WriteFatal, WriteTransient, Zeroes};
    let mut simpler = match trouble {
        WriteTransient { times, .. } => {
            vec![WriteTransient { skip: 0, times: 1 }, WriteTransient { skip: 0, times }]
        }
        WriteFatal { skip, times, late_us } => vec![
            WriteFatal { skip: 0, times: 1, late_us: 0 },
            WriteFatal { skip, times: 1, late_us },
            WriteFatal { skip: 0, times, late_us },
            WriteFatal { skip, times, late_us: late_us / 2 },
        ],
        Media { .. } => vec![Media { mapping: 0, page: 0 }],
        Read { times, .. } => vec![Read { skip: 0, times: 1 }, Read { skip: 0, times }],
        Flush { skip, late_us } => vec![
            Flush { skip: 0, late_us: 0 },
            Flush { skip: 0, late_us },
            Flush { skip, late_us: late_us / 2 },
        ],
        Zeroes { skip, times, late_us } => vec![
            Zeroes { skip: 0, times: 1, late_us: 0 },
            Zeroes { skip: 0, times, late_us },
            Zeroes { skip, times: 1, late_us: late_us / 2 },
        ],
        Delay { command, skip, times, us } => vec![
            Delay { command, skip: 0, times, us },
            Delay { command, skip, times: 1, us },
            Delay { command, skip, times, us: us / 2 },
        ],
        Lose { command, .. } => vec![Lose { command, skip: 0 }],
        Stop => Vec::new(),
    };
    simpler.retain(|&other| other != trouble);
    simpler
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::generate;

    #[test]
    fn steps_become_simpler_only_finitely_often() {
        for seed in 0..200 {
            for mut step in generate::case(seed).steps {
                let mut turns = 0;
                while let Some(next) = simpler(&step).pop() {
                    step = next;
                    turns += 1;
                    assert!(turns < 200, "{step:?} comes again and again");
                }
            }
        }
    }
}
