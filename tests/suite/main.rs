//! Everything that is tried from outside: the program as it is built, real
//! iptables, real connections, and a model of iptables for what those are too
//! slow for. It needs root, or the user namespace that `tests/run.sh` makes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_precision_loss,
    clippy::print_stdout
)]
#![allow(
    missing_docs,
    clippy::too_many_lines,
    clippy::naive_bytecount,
    clippy::option_option
)]

mod ansible;
mod cfengine;
mod cli;
mod connections;
mod dice;
mod effects;
mod fake;
mod faults;
mod fronts;
mod fuzz;
mod fuzzed;
mod gateway;
mod golden;
mod host;
mod jumps;
mod kernel;
mod lab;
mod long_run;
mod model;
mod property;
mod releases;
mod spec;
mod tidy;
mod trust;
