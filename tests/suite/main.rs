//! The tests that need no root: recorded cases, properties and fuzz bodies on a
//! model of iptables, the schemas, and the tidiness of the sources.

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

mod bpf;
mod browser;
mod chains;
mod dice;
mod explain;
mod fake;
mod fuzz;
mod fuzzed;
mod golden;
mod hash;
mod lint;
mod manual;
mod model;
mod page;
mod property;
mod sets;
mod spec;
mod tidy;
