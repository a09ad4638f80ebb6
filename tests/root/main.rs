//! The tests on the real parts: the program as it is built, real iptables in both
//! variants, real connections, real Ansible and CFEngine. They need root, or the
//! user namespace that `tests/run.sh` makes.

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
mod answers;
#[path = "../suite/bpf.rs"]
mod bpf;
mod cfengine;
mod cli;
mod collection;
mod connections;
#[path = "../suite/dice.rs"]
mod dice;
mod effects;
mod explain;
mod faults;
mod fronts;
mod gateway;
mod ha;
mod hash;
mod health;
mod host;
mod jumps;
mod kernel;
mod lab;
mod long_run;
mod maintenance;
#[path = "../suite/model.rs"]
#[allow(dead_code)]
mod model;
mod neighbours;
mod packages;
mod releases;
mod sets;
mod ssh;
mod status;
mod trust;
mod watch;
mod watch_long_run;
