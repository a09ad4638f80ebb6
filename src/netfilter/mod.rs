//! The terms of netfilter that every room shares: families, tables, protocols,
//! ports, matches, rules and rulesets.

pub mod bpf;
mod conntrack;
pub mod dump;
mod endpoint;
mod family;
pub mod flow;
mod name;
mod network;
mod ports;
mod protocol;
pub mod rule;
pub mod ruleset;
pub mod shares;
pub mod statistic;

pub use conntrack::ConntrackEntry;
pub use endpoint::Endpoint;
pub use family::{Family, Table, Variant};
pub use name::{Name, is_target};
pub use network::{interfaces_meet, network, networks_meet, shortest};
pub use ports::{PortRange, Ports};
pub use protocol::Protocol;
