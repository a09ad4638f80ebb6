//! Plain JSON: one request in, one result out.

use std::io::{self, Write};

use super::invocation::{PLAIN, answer};
use crate::run::Run;

/// Answers the request in `text`; returns the exit code.
///
/// # Errors
/// When the reply cannot be written.
pub fn run(text: &[u8], out: &mut impl Write, run: Run) -> io::Result<u8> {
    answer(text, &PLAIN, out, run)
}
