//! One rule and its meaning. [`parse`] reads it from a dump, [`render`] spells
//! it as `iptables-save` does. Two rules with the same meaning are equal
//! values, however they were typed.

mod parse;
mod render;

use std::net::IpAddr;

use ipnet::IpNet;

use crate::netfilter::bpf::HashMatch;
use crate::netfilter::statistic::Statistic;
use crate::netfilter::{Endpoint, PortRange, Ports, Protocol};
pub use parse::{Unreadable, Words, words};

/// Matches that keep kernel pointers in the data that `iptables -D` compares, so
/// that it never finds a rule that has one (iptables 1.8.9, both variants).
pub const UNDELETABLE: [&str; 2] = ["recent", "connlimit"];

/// Returns true if iptables cannot delete a rule with this text by its text.
#[must_use]
pub fn is_undeletable(text: &str) -> bool {
    let mut is_match = false;
    words(text).any(|word| {
        let found = is_match && UNDELETABLE.contains(&&*word);
        is_match = word == "-m";
        found
    })
}

/// A rule in its simplest form, without parts that match everything.
///
/// So there is no `-m comment`, no network of length 0, no `--every 1`, and in
/// the nat table, which sees only the first packet of a connection, no
/// `--ctstate NEW`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// `-p`
    pub protocol: Option<Protocol>,
    /// All other matches; `None` in most rules, which are many, while this is
    /// large.
    pub matches: Option<Box<Matches>>,
    /// `-m statistic`
    pub statistic: Statistic,
    /// `-m bpf`, with programs of ours that must all match.
    pub hashes: Vec<HashMatch>,
    /// `-j` or `-g`
    pub target: Target,
}

/// The matches of a rule except its protocol.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Matches {
    /// `-s`
    pub source: Option<IpNet>,
    /// `-d`
    pub destination: Option<IpNet>,
    /// `! -d`
    pub not_destination: Option<IpNet>,
    /// `-i`
    pub in_interface: Option<String>,
    /// `! -i`
    pub not_in_interface: Option<String>,
    /// `-o`
    pub out_interface: Option<String>,
    /// `--dport` or `--dports`
    pub destination_ports: Ports,
    /// `-m addrtype --dst-type LOCAL`
    pub to_local: bool,
    /// `-m conntrack`
    pub connection: Connection,
}

/// Matches on the connection of a packet. They hold for packets of both
/// directions, and for ICMP errors about them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Connection {
    /// `--ctstate`
    pub state: Option<ConnectionState>,
    /// `--ctproto`
    pub protocol: Option<Protocol>,
    /// `--ctorigsrc`
    pub original_source: Option<IpNet>,
    /// `--ctorigdst`: where it was addressed to before DNAT.
    pub original_destination: Option<IpNet>,
    /// `--ctorigdstport`: the port it was addressed to before DNAT.
    pub original_port: Option<PortRange>,
    /// `--ctreplsrc`: who answers, which after DNAT is the backend.
    pub reply_source: Option<IpNet>,
}

impl From<Connection> for Matches {
    fn from(connection: Connection) -> Self {
        Self {
            connection,
            ..Self::default()
        }
    }
}

/// The states of a connection that rules distinguish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConnectionState {
    /// `--ctstate DNAT`: its destination was rewritten.
    Translated,
    /// New, and its destination was not rewritten. As one match:
    /// `! --ctstate INVALID,RELATED,ESTABLISHED,UNTRACKED,DNAT`
    Untouched,
    /// `--ctstate RELATED,ESTABLISHED`: it has been answered.
    Established,
}

/// The kinds of REJECT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RejectWith {
    /// With a TCP reset.
    TcpReset,
    /// With ICMP: the port is unreachable.
    IcmpPort,
    /// The same in `ICMPv6`.
    Icmp6Port,
}

impl RejectWith {
    const ALL: [Self; 3] = [Self::TcpReset, Self::IcmpPort, Self::Icmp6Port];

    /// The argument of `--reject-with`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TcpReset => "tcp-reset",
            Self::IcmpPort => "icmp-port-unreachable",
            Self::Icmp6Port => "icmp6-port-unreachable",
        }
    }
}

/// The target of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Its connection goes to this address; to the same port, if none is given.
    Dnat(Endpoint),
    /// It passes.
    Accept,
    /// `-j DROP`: no answer.
    Drop,
    /// It is refused.
    Reject(RejectWith),
    /// Its connection comes from the address of the interface it leaves by.
    Masquerade,
    /// Its connection comes from this address.
    Snat(IpAddr),
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
            protocol: None,
            matches: None,
            statistic: Statistic::Always,
            hashes: Vec::new(),
            target,
        }
    }

    /// Returns true if the rule is about all packets that meet its matches: neither
    /// a statistic nor a hash decides.
    #[must_use]
    pub fn is_certain(&self) -> bool {
        self.statistic == Statistic::Always && self.hashes.is_empty()
    }

    /// The same rule with these matches.
    #[must_use]
    pub fn matching(self, matches: Matches) -> Self {
        let asks = matches != Matches::default();
        Self {
            matches: asks.then(|| matches.into()),
            ..self
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
