//! A model of mappings against the engine: random operations, faults and power cuts on a clock that only the run moves.
//!
//! A run is data: a [`Case`] is a device, an engine and a list of [`Step`]s, made from a seed or written down. The same
//! case does the same every time, so a failing one can be made [small](shrink) and kept ([`regressions`]).
//!
//! | file | owns |
//! |---|---|
//! | [`case`] | what a run is made of, as data |
//! | [`generate`] | from a seed to a case |
//! | [`content`] | the plain model: what a page may read as, and what the medium may hold of it |
//! | [`telling`] | which errors a handle must, may and must not be told |
//! | [`retries`] | which writes failed in passing and are tried again |
//! | [`device_log`] | what the device was asked, and what became of it |
//! | `world` | runs a case's steps on a bed, beside the model; the end, power cuts and restarts |
//! | `operations` | handles and futures: what is started, polled, dropped |
//! | `driving` | shards and operations take turns until something has ended |
//! | `device` | faults go in; what the device has seen is taken in |
//! | `logged` | the gate, and checkpoints |
//! | `passes` | passes that a run begins itself |
//! | `judge` | the checks of the rules, at the end of operations and after power cuts |
//! | [`rules`] | the rules, the faults, and which of them met |
//! | [`shrink`] | from a failing case to a small one |
//! | [`session`] | many runs, and what they print |
//!
//! To add an operation: a variant of [`Step`], its start in `operations`, its end in `judge`, its odds in [`generate`].
//! To add a fault: a variant of [`case::Trouble`] and of [`rules::Fault`]. To add a rule: a variant of [`rules::Rule`] and
//! a call of `World::met` beside its check.

pub mod case;
pub mod content;
pub(crate) mod device;
pub mod device_log;
pub(crate) mod driving;
pub mod generate;
pub(crate) mod judge;
pub mod logged;
pub(crate) mod operations;
pub(crate) mod passes;
pub mod regressions;
pub mod retries;
pub mod rules;
pub mod session;
pub mod shrink;
pub mod telling;
pub(crate) mod world;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

pub use case::{Case, Setup, Step, Trouble};
use rules::{Met, Rule};

/// A rule that was broken, and how.
#[derive(Clone, Debug)]
pub struct Violation {
    /// The rule; `None` for a panic of the engine's own.
    pub rule: Option<Rule>,
    /// The number of the step at which it showed.
    pub step: usize,
    /// What was seen and what was expected.
    pub text: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rule = self.rule.map_or("a panic", Rule::name);
        write!(f, "{rule} at step {}: {}", self.step, self.text)
    }
}

/// Ends the run with a broken rule; caught by [`run`].
pub(crate) fn violated(rule: Rule, text: String) -> ! {
    resume_unwind(Box::new((rule, text)))
}

/// Runs a case to its end.
///
/// # Errors
/// The first rule that was broken.
pub fn run(case: &Case) -> Result<Met, Violation> {
    let step = std::cell::Cell::new(0);
    let run = || {
        let mut world = world::World::new(&case.setup);
        for (number, one) in case.steps.iter().enumerate() {
            step.set(number);
            world.step(one);
        }
        step.set(case.steps.len());
        world.end()
    };
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| {
        let (rule, text) = match panic.downcast::<(Rule, String)>() {
            Ok(violation) => (Some(violation.0), violation.1),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                (
                    None,
                    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                        .unwrap_or_default(),
                )
            }
        };
        Violation { rule, step: step.get(), text }
    })
}
