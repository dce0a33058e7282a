//! The lab's verdicts can be believed: what goes wrong on purpose, fails, in time and with the reason.

use std::time::{Duration, Instant};

use foliant_lab::Machine;
use foliant_lab::scenario::{self, Boot, Claim, Report, RunOptions, Verdict};
use serde_json::Value;

fn claim(job: &'static str) -> Claim {
    Claim::new(job, "", job, Value::Null)
}

fn boot(jobs: &[&'static str]) -> Boot {
    let machine = Machine { memory_mib: 256, ..Machine::new() };
    jobs.iter().fold(Boot::new("verdicts", machine), |boot, job| boot.claim(claim(job)))
}

fn run(boot: &Boot) -> Report {
    scenario::run(boot, RunOptions::default()).unwrap()
}

fn failure<'a>(report: &'a Report, claim: &str) -> &'a str {
    match &report.verdicts.iter().find(|(name, _)| *name == claim).unwrap().1 {
        Verdict::Fails(reason) => reason,
        Verdict::Holds => panic!("{claim} holds"),
    }
}

#[test]
fn a_job_that_fails_fails_its_claim_and_no_other() {
    let boot = boot(&["pass", "fail", "panic_in_a_thread", "no_such_job", "ask_for_the_impossible"]);
    let boot = boot.claim(Claim { name: "checked", check: |_| panic!("not so"), ..claim("pass") });
    let report = run(&boot);
    assert_eq!(report.verdicts[0], ("pass", Verdict::Holds));
    assert!(failure(&report, "fail").contains("this job fails on purpose"));
    assert!(failure(&report, "panic_in_a_thread").contains("a thread's panic, on purpose"));
    assert!(failure(&report, "no_such_job").contains("no job \"no_such_job\""));
    assert!(failure(&report, "ask_for_the_impossible").contains("doesn't know how to do \"the impossible\""));
    assert!(failure(&report, "checked").contains("on the host: not so"));
}

#[test]
fn a_guest_that_panics_fails_every_claim_of_its_boot() {
    let report = run(&boot(&["pass", "crash_the_kernel"]));
    for (claim, _) in &report.verdicts {
        assert!(failure(&report, claim).contains("Kernel panic"), "{claim}: {}", failure(&report, claim));
    }
}

#[test]
fn a_dma_to_an_address_without_a_mapping_fails_although_the_device_says_that_it_succeeded() {
    let machine = Machine { memory_mib: 384, ..Machine::with_one_controller(4096) }.without_kernel_driver();
    let place = serde_json::json!({"address": "0000:00:04.0"});
    let claim = Claim { arguments: place, ..claim("read_to_nowhere") };
    let report = run(&Boot::new("verdicts", machine).bind(&["0000:00:04.0"]).claim(claim));
    let told: Vec<_> = report.facts.iter().filter(|(_, name, _)| name == "result").collect();
    assert_eq!(told[0].2, "Ok(())", "the device notices nothing");
    let failure = failure(&report, "read_to_nowhere");
    assert!(failure.contains("the guest's console says") && failure.contains("DMAR"), "{failure}");
    assert!(failure.contains("QEMU's IOMMU says: ") && failure.contains("vtd_"), "{failure}");
}

#[test]
fn a_guest_whose_first_process_leaves_early_fails() {
    let report = run(&boot(&["pass", "leave_early"]));
    assert!(failure(&report, "pass").contains("QEMU ended with exit status: 0"));
    assert!(failure(&report, "leave_early").contains("did not come to an end"));
}

#[test]
fn a_guest_that_hangs_fails_when_its_time_is_over() {
    let boot = Boot { limit: Duration::from_secs(3), ..boot(&["pass", "hang"]) };
    let begun = Instant::now();
    let report = run(&boot);
    assert!(failure(&report, "hang").contains("time limit"));
    assert!(failure(&report, "hang").contains("did not come to an end"));
    // The limit counts from the moment that the guest is ready; the rest is the boot, which has a limit of its own.
    assert!(report.total_s - report.ready_s >= 3.0);
    assert!(begun.elapsed() < Duration::from_secs(600), "the run was bounded");
}

#[test]
fn a_machine_that_qemu_refuses_is_an_error_with_its_words() {
    let mut boot = boot(&["pass"]);
    boot.machine.functions.push(foliant_lab::Function::Other("no-such-device".into()));
    let error = scenario::run(&boot, RunOptions::default()).unwrap_err().to_string();
    assert!(error.contains("no-such-device"), "{error}");
}
