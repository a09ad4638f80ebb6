//! `iptables_balance` spreads new connections over servers with the kernel's
//! iptables, from Ansible, CFEngine, plain JSON or a terminal.
//!
//! Data flows one way. What is asked becomes a checked request, a request the
//! rules there should be; what the host says becomes the rules there are; their
//! difference is data, and one place carries it out.
//!
//! ```text
//! argv, stdin -> front end -> request -> plan -----+
//!                                                  +-> diff -> change -> restore -> host
//! host -- iptables-save -> ruleset ----------------+             +-> report -> front end -> stdout
//! ```
//!
//! What always holds:
//!
//! - nothing but [`host`] starts a process or reads the kernel's files;
//! - nothing but a front end's reply reaches standard output;
//! - [`schedule`], [`plan`], [`diff`] and [`restore`] cannot fail;
//! - in a chain that is not ours a rule number only puts a rule of ours where
//!   one of ours was; what goes there goes by its text;
//! - no float decides anything.
//!
//! In reading order: [`netfilter`] has the terms that all rooms share;
//! [`schedule`], [`request`] and [`plan`] lead from a request to the desired
//! state; [`diff`] compares it with the observed one, [`restore`] turns changes
//! into transactions, [`effects`] does the same for everything that is not a
//! rule. [`preflight`] has refusals and warnings. [`converge`] does it all on a
//! [`host`], [`report`] describes the outcome, [`run`] is one invocation, and
//! [`frontend`] has the protocols, of which none knows another.

pub mod converge;
pub mod diff;
pub mod effects;
pub mod frontend;
pub mod host;
pub mod netfilter;
pub mod panic;
pub mod plan;
pub mod preflight;
pub mod report;
pub mod request;
pub mod restore;
pub mod run;
pub mod schedule;
