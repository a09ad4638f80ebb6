//! The JSON object that Ansible and plain JSON send: a request, and beside it the
//! names that the protocol has of its own.

use std::io::{self, Write};
use std::mem;

use serde_json::Value;

use crate::converge::outcome::RunMode;
use crate::panic::catch_panic;
use crate::report::Report;
use crate::request::{BadRequest, UncheckedRequest, flag, json};
use crate::run::{Invocation, Run};

/// The names that a protocol has beside those of a request.
pub struct Dialect {
    /// The object in an error message: `the request is`.
    pub subject: &'static str,
    /// The name of the boolean that asks for check mode.
    pub check: &'static str,
    /// The name of the boolean that asks for a diff.
    pub diff: &'static str,
    /// The prefix of more names that are not the user's.
    pub prefix: Option<&'static str>,
}

/// Plain JSON.
pub const PLAIN: Dialect = Dialect {
    subject: "the request is",
    check: "check",
    diff: "diff",
    prefix: None,
};

/// Reads an invocation.
///
/// # Errors
/// The mistake, in a sentence.
pub fn parse(text: &[u8], dialect: &Dialect) -> Result<Invocation, String> {
    let subject = dialect.subject;
    let value = json::parse(text).map_err(|error| format!("{subject} not JSON: {error}"))?;
    let Value::Object(mut object) = value else {
        return Err(format!("{subject} not a JSON object"));
    };
    let checked = from_object(&mut object, dialect);
    checked.map_err(|error| error.to_string())
}

fn from_object(object: &mut json::Object, dialect: &Dialect) -> Result<Invocation, BadRequest> {
    let mut take = |name: &str| match object.remove(name) {
        Some(value) => flag(name, &value),
        None => Ok(false),
    };
    let (check, diff) = (take(dialect.check)?, take(dialect.diff)?);
    if let Some(prefix) = dialect.prefix {
        object.retain(|name, _| !name.starts_with(prefix));
    }
    Ok(Invocation {
        request: UncheckedRequest::from_json(mem::take(object))?,
        mode: match check {
            true => RunMode::Check,
            false => RunMode::Apply,
        },
        diff,
    })
}

/// Answers an object with one line of JSON; returns the exit code.
///
/// # Errors
/// When the reply cannot be written.
pub fn answer(text: &[u8], dialect: &Dialect, out: &mut impl Write, run: Run) -> io::Result<u8> {
    let report = catch_panic(|| {
        let invocation = parse(text, dialect)?;
        let report = run(&invocation);
        mem::forget(invocation);
        Ok(report)
    });
    send(
        report
            .and_then(|report| report)
            .unwrap_or_else(Report::failure),
        out,
    )
}

/// Writes a report as the last act of the program; returns the exit code.
///
/// Neither the report nor the request is freed: with 10,000 backends that would take a
/// tenth of the run, right before the kernel frees everything at once
/// (`benches/program.py`).
///
/// # Errors
/// When the reply cannot be written.
pub fn send(report: Report, out: &mut impl Write) -> io::Result<u8> {
    report.write_json(out)?;
    let code = u8::from(report.failed);
    mem::forget(report);
    Ok(code)
}
