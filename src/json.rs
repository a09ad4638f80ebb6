//! Plain JSON: one request in, one result out.

use std::io::{self, Write};

use serde_json::Value;

use crate::converge::Run;
use crate::report::Report;
use crate::request::{BadRequest, Request, flag, json};

/// Answers the request in `text`; returns the exit code.
///
/// # Errors
/// When the reply cannot be written.
pub fn run(
    text: &[u8],
    out: &mut impl Write,
    perform: impl Fn(&Request, Run) -> Report,
) -> io::Result<u8> {
    let report = Asked::parse(text).map_or_else(Report::failure, |asked| {
        perform(&asked.request, asked.run).with_diff(asked.diff)
    });
    write_line(&report, out)?;
    Ok(u8::from(report.failed))
}

/// A request with the two names that stand beside it in plain JSON.
pub(crate) struct Asked {
    pub request: Request,
    pub run: Run,
    pub diff: bool,
}

impl Asked {
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let value =
            json::parse(text).map_err(|error| format!("the request is not JSON: {error}"))?;
        let Value::Object(mut object) = value else {
            return Err("the request is not a JSON object".to_owned());
        };
        let mut set = |name: &str| {
            object
                .remove(name)
                .map_or(Ok(false), |value| flag(name, &value))
        };
        let flags = set("check").and_then(|check| Ok((check, set("diff")?)));
        let checked = flags.and_then(|(check, diff)| -> Result<Self, BadRequest> {
            Ok(Self {
                run: if check { Run::Check } else { Run::Apply },
                diff,
                request: Request::from_json(object)?,
            })
        });
        checked.map_err(|error| error.to_string())
    }
}

/// A report on one line.
pub(crate) fn write_line(report: &Report, out: &mut impl Write) -> io::Result<()> {
    serde_json::to_writer(&mut *out, report)?;
    out.write_all(b"\n")?;
    out.flush()
}
