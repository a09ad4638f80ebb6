//! Ansible's protocol for binary modules: the arguments are a JSON object in a
//! file, the result is one line of JSON on standard output.
//!
//! The action plugin of the collection sends the same arguments on standard
//! input, so that nothing needs to be written to the host.
//!
//! Over ssh standard output and standard error are one terminal, so nothing is
//! ever written to the latter. Exit code 255 would make the host unreachable;
//! only 0 and 1 are used, and Ansible reads `failed` alone.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read, Write};

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

/// Returns true for the argument of a module: the path of a file, which holds a
/// `/`, or `-` for standard input.
#[must_use]
pub fn is_arguments(argument: &OsStr) -> bool {
    argument == "-" || argument.as_encoded_bytes().contains(&b'/')
}

/// Runs the module with the arguments in a file, or in standard input for `-`;
/// returns the exit code.
///
/// # Errors
/// When the reply cannot be written.
pub fn run(arguments: &OsStr, out: &mut impl Write, run: Run) -> io::Result<u8> {
    match read(arguments) {
        Ok(text) => answer(&text, &ARGUMENTS, out, run),
        Err(error) => {
            let shown = arguments.to_string_lossy();
            let problem = format!("cannot read the arguments in `{shown}`: {error}");
            send(Report::failure(problem), out)
        }
    }
}

fn read(arguments: &OsStr) -> io::Result<Vec<u8>> {
    if arguments != "-" {
        return fs::read(arguments);
    }
    let mut text = Vec::new();
    io::stdin().lock().read_to_end(&mut text)?;
    Ok(text)
}
