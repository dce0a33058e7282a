//! The jobs by name: a file a topic.

mod bench;
mod commands;
mod driver;
mod durability;
mod engine;
mod exchange;
mod faults;
mod kernel_driver;
mod processes;
mod refusals;
mod removal;
mod shell;
mod verdicts;
mod waiting;

use crate::context::Context;

/// A job: it asserts what must hold.
pub(crate) type Job = fn(&Context<'_>);

/// The job called `name`.
pub(crate) fn find(name: &str) -> Option<Job> {
    let all = [
        verdicts::JOBS,
        bench::JOBS,
        commands::JOBS,
        driver::JOBS,
        durability::JOBS,
        exchange::JOBS,
        engine::JOBS,
        faults::JOBS,
        kernel_driver::JOBS,
        processes::JOBS,
        refusals::JOBS,
        removal::JOBS,
        shell::JOBS,
        waiting::JOBS,
    ];
    all.iter().copied().flatten().find(|(known, _)| *known == name).map(|(_, job)| *job)
}
