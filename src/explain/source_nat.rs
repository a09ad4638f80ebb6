//! The nat table's POSTROUTING, asked if it may rewrite the source of a connection that
//! leaves for a backend. Then its answers come back to this host.
//!
//! A rule that may match counts as the author's intention.

use std::net::IpAddr;

use ipnet::IpNet;

use super::condition::{Condition, Meaning};
use super::dump::WholeTable;
use super::rule::{Rule, Way};
use crate::netfilter::{Ports, interfaces_meet, network, rule::words};

/// A connection that leaves for a backend.
pub struct Leaving<'a> {
    /// Its protocol.
    pub protocol: &'a str,
    /// Its destination, after DNAT.
    pub to: IpAddr,
    /// The ports that it may have there.
    pub ports: &'a Ports,
    /// The interface that it leaves by.
    pub interface: &'a str,
    /// Returns true if its source may be in a network.
    pub may_come_from: &'a dyn Fn(&IpNet) -> bool,
}

/// The rules that rewrite sources, each with the conditions on the way to it.
pub struct Rewriting<'a> {
    ways: Vec<Vec<&'a Condition>>,
    /// There are too many rules to visit.
    is_beyond: bool,
}

impl<'a> Rewriting<'a> {
    /// The rewriting rules of a nat table, but for those in chains that are `known`.
    #[must_use]
    pub fn new(nat: &'a WholeTable, known: impl Fn(&str) -> bool) -> Self {
        const MOST: usize = 10_000;
        const DEPTH: usize = 64;
        let mut found = Self {
            ways: Vec::new(),
            is_beyond: false,
        };
        let mut open: Vec<(usize, Vec<&Condition>, usize)> = Vec::new();
        open.extend(nat.chain("POSTROUTING").map(|chain| (chain, Vec::new(), 0)));
        let mut visited = 0;
        while let Some((chain, conditions, depth)) = open.pop() {
            for rule in &nat.chains[chain].rules {
                visited += 1;
                if visited > MOST || depth > DEPTH {
                    found.is_beyond = true;
                    return found;
                }
                let way = || {
                    let own = nat.conditions_of(rule);
                    conditions.iter().copied().chain(own).collect::<Vec<_>>()
                };
                match rule.way.chain() {
                    Some(to) if !known(&nat.chains[to].name) => open.push((to, way(), depth + 1)),
                    None if rewrites(rule) => found.ways.push(way()),
                    _ => {}
                }
            }
        }
        found
    }

    /// Returns true if a rule may rewrite the source of the connection.
    #[must_use]
    pub fn may_meet(&self, leaving: &Leaving<'_>) -> bool {
        let may_meet = |way: &Vec<&Condition>| way.iter().all(|one| leaving.may_meet(one));
        self.is_beyond || self.ways.iter().any(may_meet)
    }
}

fn rewrites(rule: &Rule) -> bool {
    let target = || {
        let mut words = words(&rule.text).skip_while(|word| word != "-j");
        words.nth(1)
    };
    match &rule.way {
        Way::End(_) => {
            target().is_some_and(|target| ["MASQUERADE", "SNAT", "SAME"].contains(&&*target))
        }
        // In POSTROUTING it rewrites the source.
        Way::Destination(to) => to.starts_with("NETMAP"),
        _ => false,
    }
}

impl Leaving<'_> {
    fn may_meet(&self, condition: &Condition) -> bool {
        match &condition.meaning {
            Meaning::Protocol(name) => name == self.protocol,
            Meaning::Destination(network) => network.contains(&self.to),
            Meaning::Ports(ports) => self.ports.meet(ports),
            Meaning::Source(network) => (self.may_come_from)(network),
            Meaning::Packet | Meaning::Other => self.may_meet_text(&condition.text),
        }
    }

    fn may_meet_text(&self, text: &str) -> bool {
        let (is_inverted, text) = match text.strip_prefix("! ") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let met = match text.split_once(' ') {
            Some(("-o", name)) => interfaces_meet(Some(name), Some(self.interface)),
            Some(("-d", to)) => match network(to) {
                Some(network) => network.contains(&self.to),
                None => return true,
            },
            // The client and the backend are other hosts.
            Some(("--src-type" | "--dst-type", "LOCAL")) => false,
            _ => return true,
        };
        met != is_inverted
    }
}
