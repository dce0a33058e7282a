//! The claims, by what they are about.

mod administration;
mod data;
mod identity;
mod lifecycle;
mod limits;
mod queues;
mod refusals;

use super::Case;

/// Every claim, in the order in which they run: what later ones rely on comes first.
#[must_use]
pub fn suite() -> Vec<Case> {
    let parts = [
        identity::CASES,
        data::CASES,
        limits::CASES,
        queues::CASES,
        lifecycle::CASES,
        administration::CASES,
        refusals::CASES,
    ];
    parts.concat()
}

/// Lists the claims of a module: functions that take the bench, each with what it needs.
macro_rules! cases {
    ($($run:ident: [$($need:expr),*];)*) => {
        pub(super) const CASES: &[crate::conformance::Case] = &[
            $(crate::conformance::Case { name: stringify!($run), needs: &[$($need),*], run: $run },)*
        ];
    };
}
use cases;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_two_claims_have_the_same_name() {
        let names: HashSet<_> = suite().iter().map(|case| case.name).collect();
        assert_eq!(names.len(), suite().len());
    }
}
