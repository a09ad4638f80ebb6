//! A mistake in this program is an answer like any other: a front end that
//! owes a reply gives it also when something panicked.

use std::panic::{self, AssertUnwindSafe};
use std::sync::{Mutex, PoisonError};

/// Where the last panic was, and what it said.
static LAST: Mutex<String> = Mutex::new(String::new());

/// Keeps panics off standard error, which over ssh is the same terminal as
/// standard output. To be called once, at the start.
pub fn silence_panics() {
    panic::set_hook(Box::new(|panic| {
        *LAST.lock().unwrap_or_else(PoisonError::into_inner) = panic.to_string();
    }));
}

/// Runs something that must not end the program.
///
/// # Errors
/// What it panicked with, in a sentence that asks for a report.
pub fn catch_panic<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    panic::catch_unwind(AssertUnwindSafe(work)).map_err(|_| {
        let last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        format!(
            "this is a bug in iptables_balance, please report it: {}",
            last.replace('\n', " ")
        )
    })
}
