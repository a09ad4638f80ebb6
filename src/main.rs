//! The program: see the library's front page for the map.

use std::io::ErrorKind;
use std::process::ExitCode;

fn main() -> ExitCode {
    match iptables_balance::frontend::run(std::env::args_os().skip(1).collect()) {
        Ok(code) => ExitCode::from(code),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
