//! The claims, by what they are about.

mod administration;
mod data;
mod identity;
mod lifecycle;
mod limits;
mod queues;
mod refusals;

use super::Case;

/// Names the topics, each with the module of its claims. The claims of a module that is named nowhere are dead code, and
/// the compiler says so.
macro_rules! topics {
    ($($(#[$doc:meta])* $topic:ident: $module:ident;)*) => {
        /// What claims are about. A run that must be short takes some topics, and others take the rest.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Topic {
            $($(#[$doc])* $topic,)*
        }

        impl Topic {
            /// Every topic, in the order in which they run: what later ones rely on comes first.
            pub const ALL: &'static [Self] = &[$(Self::$topic),*];

            /// Its name, as arguments give it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$topic => stringify!($module),)*
                }
            }

            /// Its claims, in the order in which they run.
            #[must_use]
            pub const fn cases(self) -> &'static [Case] {
                match self {
                    $(Self::$topic => $module::CASES,)*
                }
            }
        }
    };
}

topics! {
    /// What the controller and its namespaces say of themselves.
    Identity: identity;
    /// What is written, zeroed and deallocated, and read back.
    Data: data;
    /// The sizes at which a request becomes several commands.
    Limits: limits;
    /// Queue pairs: full, in batches, wrapping, closed, and in threads.
    Queues: queues;
    /// From power-on to shutdown, in order and otherwise.
    Lifecycle: lifecycle;
    /// What goes over the admin queue.
    Administration: administration;
    /// What a device must refuse.
    Refusals: refusals;
}

impl Topic {
    /// The topic of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|topic| topic.name() == name)
    }
}

/// Every claim, in the order in which they run.
#[must_use]
pub fn suite() -> Vec<Case> {
    Topic::ALL.iter().flat_map(|topic| topic.cases()).copied().collect()
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

    #[test]
    fn every_topic_is_found_by_its_name() {
        for &topic in Topic::ALL {
            assert_eq!(Topic::named(topic.name()), Some(topic));
            assert!(!topic.cases().is_empty(), "{topic:?}");
        }
        assert_eq!(Topic::named("astrology"), None);
    }
}
