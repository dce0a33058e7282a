//! Remembers the first panic of any thread, so that one in a background thread fails the job too.

use std::sync::Mutex;

static FIRST: Mutex<Option<String>> = Mutex::new(None);

/// From here on panics are remembered, and told on standard error.
pub(crate) fn watch() {
    std::panic::set_hook(Box::new(|panic| {
        let payload = panic.payload();
        let words = payload.downcast_ref::<&str>().copied();
        let words =
            words.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no words)");
        let place = panic.location().map(|place| format!(" ({}:{})", place.file(), place.line()));
        let told = format!("{words}{}", place.unwrap_or_default());
        tracing::error!("panic: {told}");
        first_lock().get_or_insert(told);
    }));
}

/// Forgets what was remembered.
pub(crate) fn forget() {
    *first_lock() = None;
}

/// The words of the first panic since [`forget`].
pub(crate) fn first() -> Option<String> {
    first_lock().clone()
}

fn first_lock() -> std::sync::MutexGuard<'static, Option<String>> {
    FIRST.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
