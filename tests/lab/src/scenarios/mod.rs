//! All scenarios, a file a topic.

mod commands;
mod conformance;
mod driver;
mod durability;
mod faults;
mod interfaces;
mod kernel_driver;
mod limits;
mod nodes;
mod processes;
mod refusals;
mod removal;
mod waiting;

use crate::scenario::Boot;

/// Every boot of the lab.
#[must_use]
pub fn all() -> Vec<Boot> {
    let topics = [
        kernel_driver::boots(),
        driver::boots(),
        conformance::boots(),
        limits::boots(),
        nodes::boots(),
        durability::boots(),
        faults::boots(),
        removal::boots(),
        waiting::boots(),
        processes::boots(),
        refusals::boots(),
        commands::boots(),
        interfaces::boots(),
    ];
    topics.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    #[test]
    fn every_scenario_has_a_name_of_its_own() {
        let mut names = BTreeSet::new();
        for boot in super::all() {
            assert!(names.insert(boot.name), "{} is there twice", boot.name);
            for claim in boot.claims {
                assert!(names.insert(claim.name), "{} is there twice", claim.name);
            }
        }
    }
}
