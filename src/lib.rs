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
//! In reading order: [`net`] and [`statistic`] are the words that all use;
//! [`request`], [`schedule`] and [`plan`] lead from what is asked to what
//! should be; [`rule`] and [`ruleset`] from a dump to what is; [`diff`],
//! [`change`] and [`restore`] from both to one transaction, by way of
//! [`align`]. What is not a rule that runs goes the same way through
//! [`besides`], [`saved`] and [`disconnect`]. [`guards`] and [`warnings`] say
//! what would do harm, and what should be known. [`converge`] does it all on a
//! [`host`], which is read by [`glance`], in several [`attempts`] where others
//! write too, with an [`outcome`] of which [`distribution`] and [`report`] tell;
//! [`ansible`], [`cfengine`], [`json`] and [`cli`] are the front ends, of which
//! none knows another.

pub mod align;
pub mod ansible;
pub mod asked;
pub mod attempts;
pub mod besides;
pub mod cfengine;
pub mod change;
pub mod cli;
pub mod converge;
pub mod diff;
pub mod disconnect;
pub mod distribution;
pub mod front;
pub mod glance;
pub mod guard;
pub mod guards;
pub mod host;
pub mod json;
pub mod net;
pub mod outcome;
pub mod perform;
pub mod plan;
pub mod report;
pub mod request;
pub mod restore;
pub mod rule;
pub mod ruleset;
pub mod saved;
pub mod schedule;
pub mod schema;
pub mod statistic;
pub mod text;
pub mod warnings;
