//! Plain JSON: one request in, one result out.

use std::io::{self, Write};
use std::mem;

use crate::converge::outcome::RunMode;
use crate::frontend::invocation::Invocation;
use crate::panic::catch_panic;
use crate::report::Report;
use crate::request::UncheckedRequest;

/// Answers the request in `text`; returns the exit code.
///
/// # Errors
/// When the reply cannot be written.
pub fn run(
    text: &[u8],
    out: &mut impl Write,
    perform: impl Fn(UncheckedRequest, RunMode, bool) -> Report,
) -> io::Result<u8> {
    let answer = || {
        let asked = Invocation::parse(text)?;
        Ok(perform(asked.request, asked.run, asked.diff))
    };
    let report = catch_panic(answer)
        .and_then(|answer| answer)
        .unwrap_or_else(Report::failure);
    report.write_json(out)?;
    let code = u8::from(report.failed);
    mem::forget(report); // the program ends
    Ok(code)
}
