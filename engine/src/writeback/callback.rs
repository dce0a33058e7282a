//! The callback of a pass: asked for each folio, on the shard, whether it is written now (`write_cache_pages`).

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::pass::DirtyFolio;
use crate::error::{Error, Result};

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// What a callback says of a folio.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// Write it.
    Write,
    /// Not now (`AOP_WRITEPAGE_ACTIVATE`): it stays dirty. In a background pass that is no error; an integrity pass asks
    /// again a few times and then ends with [`Error::TryAgain`] (WB-09).
    NotNow,
}

/// A callback as [`Mapping::writeback_with`](crate::Mapping::writeback_with) takes it.
pub type WritebackCallback = Arc<dyn Fn(&DirtyFolio<'_>) -> Disposition + Send + Sync>;

/// A [`WritebackCallback`] on its way to a shard.
#[derive(Clone)]
pub(crate) struct Callback(pub WritebackCallback);

impl std::fmt::Debug for Callback {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Callback")
    }
}

/// Marks this thread as one that runs a callback.
struct Inside;

impl Inside {
    fn enter() -> Self {
        INSIDE.with(|inside| inside.set(true));
        Self
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.with(|inside| inside.set(false));
    }
}

/// Refuses what a callback must not do: the shard that would serve it is running the callback.
#[inline]
pub(crate) fn check_outside() -> Result<()> {
    if INSIDE.with(Cell::get) { Err(Error::InsidePass) } else { Ok(()) }
}

impl Callback {
    /// Asks. A panic of the callback is an error of its pass and of nothing else.
    pub(crate) fn ask(&self, folio: &DirtyFolio<'_>) -> Result<Disposition> {
        let inside = Inside::enter();
        let asked = catch_unwind(AssertUnwindSafe(|| (self.0)(folio)));
        drop(inside);
        asked.map_err(|panic| {
            let text = panic.downcast_ref::<&str>().map(ToString::to_string);
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            Error::CallbackPanicked { page: folio.index(), message: text.unwrap_or_default().into() }
        })
    }
}
