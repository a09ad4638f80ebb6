//! One rule: what it means. [`parse`] reads it from a saved dump, [`render`]
//! spells it as `iptables-save` does, and two rules that mean the same are
//! equal values, however they were typed.

mod parse;
mod render;

use std::net::IpAddr;

use ipnet::IpNet;

use crate::net::{Ports, Protocol};
use crate::statistic::Statistic;
pub use parse::{Unreadable, Words, words};

/// A rule in its simplest form: what changes nothing is left out of it.
///
/// So there is no `-m comment`, no network of length 0, no `--every 1`, and in
/// the nat table, which sees only the first packet of a connection, no
/// `--ctstate NEW`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// `-s`
    pub source: Option<IpNet>,
    /// `-d`
    pub destination: Option<IpNet>,
    /// `-i`
    pub in_interface: Option<String>,
    /// `-p`
    pub protocol: Option<Protocol>,
    /// `--dport` or `--dports`
    pub destination_ports: Ports,
    /// `-m addrtype --dst-type LOCAL`
    pub to_local: bool,
    /// `-m statistic`
    pub statistic: Statistic,
    /// `-j` or `-g`
    pub target: Target,
}

/// What becomes of a packet that matches.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Its connection goes to this address; to the same port, if none is given.
    Dnat {
        /// The backend.
        address: IpAddr,
        /// Its port.
        port: Option<u16>,
    },
    /// On with a chain, and back when that chain has no answer.
    Jump(String),
    /// On with a chain, and not back.
    Goto(String),
}

impl Rule {
    /// A rule that does this to every packet.
    #[must_use]
    pub fn to(target: Target) -> Self {
        Self {
            source: None,
            destination: None,
            in_interface: None,
            protocol: None,
            destination_ports: Ports::default(),
            to_local: false,
            statistic: Statistic::Always,
            target,
        }
    }

    /// The same rule where all packets are of that protocol, so that saying it
    /// or not makes no difference.
    #[must_use]
    pub fn among(mut self, protocol: Protocol) -> Self {
        self.protocol.get_or_insert(protocol);
        self
    }
}
