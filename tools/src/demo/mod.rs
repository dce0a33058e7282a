//! demo
use crate::{cli::DemoOptions, error::Error, verdict::Verdict};
pub(crate) fn run(_: &DemoOptions) -> Result<Verdict, Error> { Ok(Verdict::Passed) }
