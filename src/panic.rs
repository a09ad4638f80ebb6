//! A mistake in this program is an answer like any other: a front end that
//! owes a reply gives it also when something panicked.

use std::panic::{self, AssertUnwindSafe};
use std::sync::{Mutex, PoisonError};

/// The place and message of the last panic.
static LAST: Mutex<String> = Mutex::new(String::new());

/// Keeps panics off standard error, which over ssh is the same terminal as
/// standard output. To be called once, at the start.
pub fn silence_panics() {
    panic::set_hook(Box::new(|panic| {
        *LAST.lock().unwrap_or_else(PoisonError::into_inner) = panic.to_string();
    }));
}

/// Runs `work`, and turns a panic into an error.
///
/// # Errors
/// The panic's message, in a sentence that asks for a bug report.
pub fn catch_panic<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    panic::catch_unwind(AssertUnwindSafe(work)).map_err(|_| {
        let last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        format!(
            "this is a bug in iptables_balance, please report it: {}",
            last.replace('\n', " ")
        )
    })
}
