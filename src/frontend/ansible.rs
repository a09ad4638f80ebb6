//! Ansible's protocol for binary modules: the arguments are a JSON object in a
//! file, the result is one line of JSON on standard output.
//!
//! Over ssh standard output and standard error are one terminal, so nothing is
//! ever written to the latter. Exit code 255 would make the host unreachable;
//! only 0 and 1 are used, and Ansible reads `failed` alone.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use super::invocation::{Dialect, answer, send};
use crate::report::Report;
use crate::run::Run;

/// Ansible adds names that begin with `_ansible_`; each release has others.
const ARGUMENTS: Dialect = Dialect {
    subject: "the arguments are",
    check: "_ansible_check_mode",
    diff: "_ansible_diff",
    prefix: Some("_ansible_"),
};

/// Runs the module with the arguments in a file; returns the exit code.
///
/// # Errors
/// When the reply cannot be written.
pub fn run(arguments: &Path, out: &mut impl Write, run: Run) -> io::Result<u8> {
    match fs::read(arguments) {
        Ok(text) => answer(&text, &ARGUMENTS, out, run),
        Err(error) => {
            let shown = arguments.display();
            let problem = format!("cannot read the arguments in `{shown}`: {error}");
            send(Report::failure(problem), out)
        }
    }
}
