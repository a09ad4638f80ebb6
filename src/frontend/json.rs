//! Plain JSON: one request in, one result out.

use std::io::{self, Write};
use std::mem;

use crate::converge::outcome::Run;
use crate::frontend::invocation::Asked;
use crate::panic::guarded;
use crate::report::Report;
use crate::request::Draft;

/// Answers the request in `text`; returns the exit code.
///
/// # Errors
/// When the reply cannot be written.
pub fn run(
    text: &[u8],
    out: &mut impl Write,
    perform: impl Fn(Draft, Run, bool) -> Report,
) -> io::Result<u8> {
    let answer = || {
        let asked = Asked::parse(text)?;
        Ok(perform(asked.request, asked.run, asked.diff))
    };
    let report = guarded(answer)
        .and_then(|answer| answer)
        .unwrap_or_else(Report::failure);
    report.write_json(out)?;
    let code = u8::from(report.failed);
    mem::forget(report); // the program ends
    Ok(code)
}
