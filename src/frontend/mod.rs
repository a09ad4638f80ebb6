//! The choice of a frontend from the arguments and standard input.

pub mod ansible;
pub mod cfengine;
pub mod cli;
pub mod invocation;
pub mod json;
pub mod schema;
pub mod seeing;
pub mod status;
pub mod terminal;

use std::ffi::OsString;
use std::io::{self, BufRead, IsTerminal, Write};

use crate::panic;
use crate::run::{Session, on_this_host};

/// Runs the front end that the arguments and standard input call for; returns
/// the exit code.
///
/// # Errors
/// When standard input cannot be read or the reply cannot be written.
pub fn run(arguments: Vec<OsString>) -> io::Result<u8> {
    panic::silence_panics();
    let stdin = io::stdin();
    let mut out = io::stdout().lock();
    match arguments.as_slice() {
        [one] if ansible::is_arguments(one) => ansible::run(one, &mut out, &on_this_host),
        [] if stdin.is_terminal() => out.write_all(cli::help().as_bytes()).map(|()| 0),
        [] => from_stdin(stdin.lock(), &mut out),
        _ => cli::run(arguments, &mut out, &mut io::stderr().lock(), &on_this_host),
    }
}

fn from_stdin(mut input: impl BufRead, out: &mut impl Write) -> io::Result<u8> {
    let mut text = Vec::new();
    input.read_until(b'\n', &mut text)?;
    if text.starts_with(cfengine::GREETING) {
        let session = Session::default();
        return cfengine::run(input, out, &|invocation| session.run(invocation));
    }
    input.read_to_end(&mut text)?;
    json::run(&text, out, &on_this_host)
}
