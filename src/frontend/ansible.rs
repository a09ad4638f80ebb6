//! Ansible's protocol for binary modules: the arguments are a JSON object in a
//! file, the result is one line of JSON on standard output.
//!
//! Over ssh standard output and standard error are one terminal, so nothing is
//! ever written to the latter. Exit code 255 would make the host unreachable;
//! 0 and 1 are the only ones used, and Ansible goes by `failed` alone.

use std::fs;
use std::io::{self, Write};
use std::mem;
use std::path::Path;

use serde_json::Value;

use crate::converge::outcome::RunMode;
use crate::panic::catch_panic;
use crate::report::Report;
use crate::request::{BadRequest, UncheckedRequest, flag, json};

/// Runs the module with the arguments in that file; returns the exit code.
///
/// # Errors
/// When the reply cannot be written.
pub fn run(
    arguments: &Path,
    out: &mut impl Write,
    perform: impl Fn(UncheckedRequest, RunMode, bool) -> Report,
) -> io::Result<u8> {
    let report = match fs::read(arguments) {
        Ok(text) => catch_panic(|| reply(&text, perform)).unwrap_or_else(Report::failure),
        Err(error) => Report::failure(format!(
            "cannot read the arguments in `{}`: {error}",
            arguments.display()
        )),
    };
    report.write_json(out)?;
    let code = u8::from(report.failed);
    mem::forget(report); // the program ends
    Ok(code)
}

fn reply(text: &[u8], perform: impl Fn(UncheckedRequest, RunMode, bool) -> Report) -> Report {
    let answered =
        arguments(text).map(|arguments| perform(arguments.request, arguments.run, arguments.diff));
    answered.unwrap_or_else(Report::failure)
}

struct Arguments {
    request: UncheckedRequest,
    run: RunMode,
    diff: bool,
}

/// The user's own options stand beside those that Ansible adds, which all
/// begin with `_ansible_` and of which each release has others.
fn arguments(text: &[u8]) -> Result<Arguments, String> {
    let value =
        json::parse(text).map_err(|error| format!("the arguments are not JSON: {error}"))?;
    let Value::Object(object) = value else {
        return Err("the arguments are not a JSON object".to_owned());
    };
    let is_own = |name: &str| name.starts_with("_ansible_");
    let (own, options): (json::Object, json::Object) =
        object.into_iter().partition(|(name, _)| is_own(name));
    let set = |name: &str| own.get(name).map_or(Ok(false), |value| flag(name, value));
    let checked = || -> Result<Arguments, BadRequest> {
        Ok(Arguments {
            run: if set("_ansible_check_mode")? {
                RunMode::Check
            } else {
                RunMode::Apply
            },
            diff: set("_ansible_diff")?,
            request: UncheckedRequest::from_json(options)?,
        })
    };
    checked().map_err(|error| error.to_string())
}
