//! `iptables_balance` spreads new connections over servers with the kernel's
//! iptables, from Ansible, CFEngine, plain JSON or a terminal.
//!
//! Data flows one way. The attributes become a checked request, and the request
//! a plan: the rules that should be there. The dump of the host becomes a
//! ruleset. Their difference is data, and one place applies it.
//!
//! ```text
//! argv, stdin -> front end -> request -> plan -----+
//!                                                  +-> diff -> change -> restore -> host
//! host -- iptables-save -> ruleset ----------------+             +-> report -> front end -> stdout
//! ```
//!
//! Invariants:
//!
//! - only [`host`] starts a process or reads the kernel's files;
//! - only the reply of a frontend reaches standard output;
//! - [`schedule`], [`plan`], [`diff`] and [`restore`] cannot fail;
//! - in a foreign chain a rule number is used only to put an owned rule where
//!   another one was; a rule is deleted there by its text;
//! - no float decides anything.
//!
//! In reading order: [`netfilter`] has the terms that all rooms share;
//! [`schedule`], [`request`] and [`plan`] lead from a request to the desired
//! state, for which [`situation`] tells who is in service, from the files of
//! [`state`] and the checks of [`health`]; [`diff`] compares it with the observed one, [`restore`] turns changes
//! into transactions, [`effects`] does the same for everything that is not a
//! rule. [`preflight`] has refusals and warnings. [`converge`] does it all on a
//! [`host`], [`report`] describes the outcome, and [`run`] is one invocation.
//! [`maintenance`] and [`watch`] invoke it for an operator and for ever.
//! [`frontend`] has the protocols, of which none knows another.

pub mod converge;
pub mod diff;
pub mod effects;
pub mod explain;
pub mod frontend;
pub mod health;
pub mod host;
pub mod maintenance;
pub mod netfilter;
pub mod panic;
pub mod plan;
pub mod preflight;
pub mod report;
pub mod request;
pub mod restore;
pub mod run;
pub mod schedule;
pub mod situation;
pub mod state;
pub mod status;
pub mod watch;
