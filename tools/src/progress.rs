//! Progress bars on a terminal, and log lines that don't tear them.
//!
//! Bars are drawn on standard error, and only when that is a terminal: in a pipe or a file there's nothing.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use crate::table::count;

/// The bar on the screen, for log lines to step around.
static SHOWN: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// A progress bar, cleared from the screen when it's dropped.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar that counts to `total`; `what` names what is counted.
    pub(crate) fn counting(total: u64, what: &'static str) -> Self {
        let template =
            format!("{{msg:12}} [{{bar:40}}] {{human_pos}}/{{human_len}} {what}  {{rate}}/s  {{eta}} left");
        Self::new(total, &template)
    }

    /// A bar that counts `total` bytes.
    pub(crate) fn bytes(total: u64) -> Self {
        Self::new(
            total,
            "{msg:12} [{bar:40}] {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta} left",
        )
    }

    /// A bar that counts the milliseconds of a run of `duration`.
    pub(crate) fn time(duration: Duration) -> Self {
        Self::new(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX), "{msg:12} [{bar:40}] {elapsed}")
    }

    fn new(total: u64, template: &str) -> Self {
        let bar = ProgressBar::new(total);
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let rate = |state: &ProgressState, text: &mut dyn std::fmt::Write| {
            // A piece of the bar that can't be drawn is left out; there's nobody to tell.
            write!(text, "{}", count(state.per_sec() as u64)).unwrap_or_default();
        };
        bar.set_style(style.with_key("rate", rate).progress_chars("=> "));
        *shown() = Some(bar.clone());
        Self { bar }
    }

    /// Says what is going on.
    pub(crate) fn stage(&self, stage: impl Into<String>) {
        self.bar.set_message(stage.into());
    }

    pub(crate) fn advance(&self, by: u64) {
        self.bar.inc(by);
    }

    pub(crate) fn set(&self, position: u64) {
        self.bar.set_position(position);
    }

    /// Runs `write` with the bar off the screen.
    pub(crate) fn aside<T>(&self, write: impl FnOnce() -> T) -> T {
        self.bar.suspend(write)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        *shown() = None;
    }
}

fn shown() -> std::sync::MutexGuard<'static, Option<ProgressBar>> {
    SHOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Standard error for log lines.
#[derive(Debug)]
pub(crate) struct LogWriter;

impl LogWriter {
    pub(crate) fn new() -> Self {
        Self
    }
}

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let bar = shown().clone();
        match bar {
            Some(bar) => bar.suspend(|| io::stderr().write(line)),
            None => io::stderr().write(line),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
