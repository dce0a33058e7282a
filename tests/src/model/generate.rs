//! From a seed to a case.

use foliant::RetryPolicy;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::case::{Case, Command, FRAME, How, Notice, SPAN_FRAMES, Setup, Step, Trouble, WriteCache};

/// The case of a seed.
#[must_use]
pub fn case(seed: u64) -> Case {
    let mut generator = Generator::new(seed);
    let setup = generator.setup();
    let count = generator.random.random_range(20..90);
    let steps = (0..count).flat_map(|_| generator.steps()).collect();
    Case { setup, steps }
}

/// What a run is troubled by: few kinds each, so that they meet in all pairs over many runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Theme {
    WriteTransient,
    WriteFatal,
    Media,
    Read,
    Flush,
    Zeroes,
    Delay,
    Lose,
    Stop,
}

const THEMES: [Theme; 9] = [
    Theme::WriteTransient,
    Theme::WriteFatal,
    Theme::Media,
    Theme::Read,
    Theme::Flush,
    Theme::Zeroes,
    Theme::Delay,
    Theme::Lose,
    Theme::Stop,
];

struct Generator {
    random: SmallRng,
    themes: Vec<Theme>,
    /// Operations that were started are mostly finished at once: in percent.
    patience: u32,
    /// Where most operations of this run are.
    favourite: u32,
}

impl Generator {
    fn new(seed: u64) -> Self {
        let mut random = SmallRng::seed_from_u64(seed);
        let count = random.random_range(0..=3);
        let themes = (0..count).map(|_| THEMES[random.random_range(0..THEMES.len())]).collect();
        let patience = random.random_range(20..90);
        let favourite = random.random_range(0..u32::from(SPAN_FRAMES));
        Self { random, themes, patience, favourite }
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.random.random_range(0..choices.len())]
    }

    fn setup(&mut self) -> Setup {
        let block_bytes = self.one_of(&[512, 512, 512, 4096]);
        let (noiob, awupf): (&[u16], &[u16]) = match block_bytes {
            512 => (&[0, 0, 0, 16, 64, 12], &[0, 1, 7, 31, 127]),
            _ => (&[0, 0, 4], &[0, 1, 3, 15]),
        };
        let orders = self.one_of(&[[0, 0], [0, 0], [0, 2], [2, 0], [2, 2], [4, 0], [0, 4]]);
        // Of large pages about as many as of small ones fit in.
        let (frames, queues): (_, &[u16]) = match orders.into_iter().max() {
            Some(4) => (96..200, &[64]),
            Some(2) => (64..112, &[16, 64]),
            _ => (32..56, &[8, 16, 64]),
        };
        Setup {
            shards: self.one_of(&[1, 3]),
            frames: self.random.random_range(frames),
            mappings: self.one_of(&[1, 1, 2]),
            queue_entries: self.one_of(queues),
            mdts: self.random.random_range(0..4),
            noiob_blocks: self.one_of(noiob),
            awupf_z: self.one_of(awupf),
            block_bytes,
            write_cache: self.one_of(&[
                WriteCache::Volatile,
                WriteCache::Volatile,
                WriteCache::Volatile,
                WriteCache::Volatile,
                WriteCache::None,
            ]),
            background_percent: self.random.random_range(5..80),
            dirty_percent: self.one_of(&[100, 100, 60, 30]),
            readahead_bytes_max: self.one_of(&[0, 64 << 10, 512 << 10]),
            retry: self.one_of(&[RetryPolicy::Hard, RetryPolicy::Hard, RetryPolicy::Soft]),
            is_gated: self.random.random_bool(0.4),
            orders,
        }
    }

    fn page(&mut self) -> u8 {
        if self.random.random_bool(0.5) {
            ((self.favourite + self.random.random_range(0..4)) % u32::from(SPAN_FRAMES)) as u8
        } else {
            self.random.random_range(0..u32::from(SPAN_FRAMES)) as u8
        }
    }

    fn range(&mut self) -> (u32, u32) {
        let at = u32::from(self.page()) * FRAME as u32;
        match self.random.random_range(0..6) {
            0 => (at + self.random.random_range(0..4000), self.random.random_range(1..600)),
            1 => (at, FRAME as u32),
            2 => (at, FRAME as u32 * self.random.random_range(1..9)),
            3 => (at + self.random.random_range(0..4000), self.random.random_range(1..20_000)),
            4 => (at, self.random.random_range(1..40_000)),
            _ => (at + 512 * self.random.random_range(0..8), 512 * self.random.random_range(1..24)),
        }
    }

    fn any(&mut self) -> u8 {
        self.random.random_range(0..12)
    }

    fn microseconds(&mut self) -> u32 {
        match self.random.random_range(0..3) {
            0 => self.random.random_range(1..100),
            1 => self.random.random_range(100..20_000),
            _ => self.random.random_range(20_000..2_000_000),
        }
    }

    /// The next step, and what goes with it.
    fn steps(&mut self) -> Vec<Step> {
        let on = self.any();
        let (at, len) = self.range();
        let step = match self.random.random_range(0..1000) {
            0..160 => Step::Write { on, at, len },
            160..190 => {
                let how = self.one_of(&[How::Cyclic, How::Whole, How::Tagged, How::Integrity]);
                let (budget, put_off) = (self.one_of(&[0, 0, 1, 3, 20]), self.one_of(&[0, 0, 1, 3]));
                let pass = Step::Pass { on, how, budget, put_off };
                // From rest, or in the midst of it all.
                return match self.random.random_range(0..10) {
                    0..4 => vec![pass],
                    4..7 => vec![Step::Settle, pass, Step::Settle],
                    _ => self.cyclic_passes(on),
                };
            }
            190..228 => Step::WriteLsn { on, at, len },
            228..234 => {
                if self.random.random_bool(0.5) {
                    return self.flush_from_rest(on);
                }
                Step::FlushUntil { on, behind: self.one_of(&[0, 0, 1, 3]) }
            }
            234..240 => Step::Oldest { on },
            240..260 => Step::TryWrite { on, at, len },
            260..275 => Step::Scan { on, at, len: 4096 << self.random.random_range(0..3) },
            275..285 => Step::Prefetch { on, at, len },
            285..400 => Step::Read { on, at, len },
            400..440 => Step::Pin { on, page: self.page() },
            440..490 => Step::PinMut { on, page: self.page(), change: self.one_of(&[0, 1, 700, 4096]) },
            490..550 => Step::Sync { on },
            550..580 => Step::SyncRange { on, at, len },
            // From rest, so that all that is seen of it is its own; beside writers, or alone.
            580..620 => {
                let mut steps = vec![Step::Settle, Step::Sync { on }];
                for _ in 0..self.random.random_range(0..4) {
                    let (at, len) = self.range();
                    let turn = self.one_of(&[Step::Shard { shard: on }, Step::Time { us: 1 }]);
                    steps.extend([turn, Step::Write { on, at, len }]);
                }
                steps.push(Step::Finish { op: 0 });
                return steps;
            }
            620..655 => Step::Discard { on, at, len },
            655..675 => Step::Clone { on },
            675..685 => Step::Drop { on },
            685..700 => Step::Open { mapping: self.any() },
            700..708 => Step::Close { on },
            708..740 => return vec![Step::Release { op: self.any() }],
            740..760 => return vec![Step::Poll { op: self.any() }],
            760..785 => return vec![Step::Abandon { op: self.any() }],
            785..805 => return vec![Step::Finish { op: self.any() }],
            805..840 => return vec![Step::Shard { shard: self.any() }],
            840..853 => return vec![Step::Settle],
            853..870 => return vec![Step::Advance { behind: self.one_of(&[0, 0, 1, 2]) }],
            870..895 => return vec![Step::Time { us: self.microseconds() }],
            // The flusher's interval and its pauses.
            895..905 => return vec![Step::Time { us: self.random.random_range(3_000_000..7_000_000) }],
            905..970 => return self.trouble(),
            970..980 => return vec![Step::Mend],
            980..992 => {
                let notice = self.one_of(&[Notice::No, Notice::No, Notice::Yes]);
                return vec![Step::Cut { seed: self.random.random(), notice }];
            }
            _ => return vec![Step::Kill],
        };
        if self.random.random_range(0..100) < self.patience {
            vec![step, self.one_of(&[Step::Settle, Step::Finish { op: 0 }])]
        } else {
            vec![step]
        }
    }

    /// A cyclic pass that stops soon, and one that goes on where it stopped.
    fn cyclic_passes(&mut self, on: u8) -> Vec<Step> {
        let mut steps = Vec::new();
        for _ in 0..3 {
            let (at, len) = self.range();
            steps.push(Step::Write { on, at, len });
        }
        let (first, next) = (self.one_of(&[1, 2]), self.one_of(&[0, 0, 1, 3]));
        for (budget, put_off) in [(first, self.one_of(&[0, 0, 3])), (next, 0)] {
            steps.extend([Step::Settle, Step::Pass { on, how: How::Cyclic, budget, put_off }]);
        }
        steps.push(Step::Settle);
        steps
    }

    /// A `flush_until` from rest, so that all that is written is its own, beside pages that are newer, or have no number.
    fn flush_from_rest(&mut self, on: u8) -> Vec<Step> {
        let mut steps = Vec::new();
        for _ in 0..self.random.random_range(1..4) {
            let (at, len) = self.range();
            steps.push(Step::WriteLsn { on, at, len });
        }
        let (at, len) = self.range();
        let flush = Step::FlushUntil { on, behind: self.one_of(&[0, 0, 1, 3]) };
        let write = Step::Write { on, at, len };
        steps.extend([write, Step::Advance { behind: 0 }, Step::Settle, flush, Step::Finish { op: 0 }]);
        steps
    }

    /// A fault of the run's themes: by itself, or so that it strikes, or several that strike one after the other.
    fn trouble(&mut self) -> Vec<Step> {
        if self.themes.is_empty() {
            return Vec::new();
        }
        let theme = self.themes[self.random.random_range(0..self.themes.len())];
        match self.random.random_range(0..10) {
            0..5 => {
                let (skip, times) = (self.random.random_range(0..3), self.random.random_range(1..4));
                vec![Step::Fault(self.fault(theme, skip, times))]
            }
            5..8 => self.strike(theme),
            _ => {
                let themes = self.themes.clone();
                let mut steps: Vec<Step> = themes.into_iter().flat_map(|theme| self.strike(theme)).collect();
                steps.extend(self.aftermath());
                steps
            }
        }
    }

    fn fault(&mut self, theme: Theme, skip: u8, times: u8) -> Trouble {
        let late_us = if self.random.random_bool(0.5) { 0 } else { self.microseconds() };
        match theme {
            Theme::WriteTransient => {
                // Sometimes more often than it is tried.
                let times = if self.random.random_bool(0.3) { 6 + 4 * times } else { times };
                Trouble::WriteTransient { skip, times }
            }
            Theme::WriteFatal => Trouble::WriteFatal { skip, times, late_us },
            Theme::Media => Trouble::Media { mapping: self.any(), page: self.page() },
            Theme::Read => Trouble::Read { skip, times },
            Theme::Flush => Trouble::Flush { skip, late_us },
            Theme::Zeroes => Trouble::Zeroes { skip, times, late_us },
            Theme::Delay => {
                Trouble::Delay { command: self.one_of(&Command::ALL), skip, times, us: self.microseconds() }
            }
            Theme::Lose => Trouble::Lose { command: self.one_of(&Command::ALL), skip },
            Theme::Stop => Trouble::Stop,
        }
    }

    /// A fault, and something for it to strike.
    fn strike(&mut self, theme: Theme) -> Vec<Step> {
        let (on, page) = (self.any(), self.page());
        let at = u32::from(page) * FRAME as u32;
        let write = Step::Write { on, at, len: FRAME as u32 };
        let read = Step::Read { on, at: u32::from(self.page()) * FRAME as u32, len: 2 * FRAME as u32 };
        let zeroes = Step::Discard { on, at, len: 3 * FRAME as u32 };
        let fault = match theme {
            Theme::Media => Trouble::Media { mapping: 0, page },
            Theme::Lose => {
                Trouble::Lose { command: self.one_of(&[Command::Read, Command::WriteZeroes]), skip: 0 }
            }
            theme => self.fault(theme, 0, 1),
        };
        let fault = Step::Fault(fault);
        match theme {
            Theme::WriteTransient | Theme::WriteFatal | Theme::Media => {
                let (sync, finish) = (Step::Sync { on }, Step::Finish { op: 0 });
                vec![write, fault, Step::Settle, sync, finish, sync, finish]
            }
            // A discard that began before it goes on after it.
            Theme::Flush if self.random.random_bool(0.3) => vec![
                write,
                Step::Pin { on, page },
                Step::Settle,
                zeroes,
                fault,
                Step::Settle,
                Step::Sync { on },
                Step::Settle,
                Step::Release { op: 0 },
                Step::Settle,
            ],
            Theme::Flush => {
                let (at, len) = self.range();
                let late = Step::Write { on, at, len };
                vec![
                    write,
                    fault,
                    Step::Settle,
                    Step::Sync { on },
                    Step::Time { us: 1 },
                    late,
                    Step::Settle,
                    write,
                ]
            }
            Theme::Read => vec![fault, read, Step::Finish { op: 0 }],
            Theme::Zeroes => vec![write, fault, zeroes, Step::Finish { op: 0 }],
            Theme::Delay => vec![write, fault, read, Step::Settle, Step::Sync { on }, Step::Settle],
            Theme::Lose | Theme::Stop => {
                let victim = self.one_of(&[read, zeroes]);
                vec![fault, victim, Step::Settle, Step::Abandon { op: 0 }]
            }
        }
    }

    /// What shows after a fault whether everything is as it should be.
    fn aftermath(&mut self) -> Vec<Step> {
        let on = self.any();
        let mut steps = Vec::new();
        if self.random.random_bool(0.3) {
            // With a page held exclusively while the flusher runs.
            let pin = Step::PinMut { on, page: self.page(), change: 100 };
            steps.extend([pin, Step::Settle, Step::Time { us: 6_000_000 }]);
        }
        match self.random.random_range(0..8) {
            0..2 => steps.extend(self.cyclic_passes(on)),
            2..4 => steps.extend(self.flush_from_rest(on)),
            _ => {}
        }
        for _ in 0..self.random.random_range(0..4) {
            let (at, len) = self.range();
            steps.push(Step::Write { on, at, len });
        }
        steps.extend([Step::Settle, Step::Sync { on }, Step::Time { us: 1 }]);
        let (at, len) = self.range();
        steps.extend([Step::Write { on, at, len }, Step::Settle, Step::Sync { on }, Step::Settle]);
        steps
    }
}
