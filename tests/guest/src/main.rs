//! The first process of a guest, and every job that the lab's scenarios run in it.
//!
//! Started by the kernel as `/init` it sets the guest up, runs the jobs of the plan one after the other, tells the
//! host what came of each over the lab's serial port, and powers off by an exit status that nothing else gives. It
//! is a static program: the guest holds nothing but it, the modules, and what a scenario adds.
//!
//! Jobs are written as tests are: what must hold is asserted, and a panic, in whatever thread, fails the job.
//! `/init child …` runs one job in a process of its own; see [`context`].

mod bind;
mod context;
mod device;
mod exit;
mod forgetful;
mod jobs;
mod panics;
mod port;
mod setup;

use std::time::Instant;

use foliant_guest::protocol::{EXIT_DONE, EXIT_SETUP_FAILED, JobPlan, Line};
use serde_json::Value;

use crate::context::Context;
use crate::port::Port;

fn main() {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .init();
    panics::watch();
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, claim, job, arguments] = &arguments[..]
        && role == "child"
    {
        let plan = JobPlan {
            claim: claim.clone(),
            job: job.clone(),
            arguments: serde_json::from_str(arguments).unwrap_or(Value::Null),
        };
        run(&Port::stdout(), &plan);
        return;
    }
    let ended = std::panic::catch_unwind(first_process);
    let code = if ended.is_ok() { EXIT_DONE } else { EXIT_SETUP_FAILED };
    exit::power_off(code);
}

/// Everything between the kernel's start of this process and power-off.
fn first_process() {
    let plan = setup::plan();
    setup::prepare(&plan);
    let port = Port::serial();
    port.send(&Line::Ready { uptime_s: setup::uptime_s(), kernel: setup::kernel_release() });
    for job in &plan.jobs {
        port.send(&Line::Started { claim: job.claim.clone() });
        run(&port, job);
    }
    port.send(&Line::Done);
    port.drain();
}

/// Runs one job and sends its verdict.
fn run(port: &Port, plan: &JobPlan) {
    let start = Instant::now();
    panics::forget();
    let context = Context::new(port, plan);
    let job = jobs::find(&plan.job);
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let job = job.unwrap_or_else(|| panic!("the guest has no job {:?}", plan.job));
        job(&context);
    }));
    let told = panics::first();
    let failure = match ended {
        Ok(()) => told.map(|words| format!("a thread panicked: {words}")),
        Err(_) => Some(told.unwrap_or_else(|| "it panicked without words".into())),
    };
    let seconds = start.elapsed().as_secs_f64();
    port.send(&Line::Verdict { claim: plan.claim.clone(), failure, seconds });
}
