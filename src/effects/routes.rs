//! The ways that connections take through the chains of a set to a balancer, as
//! far as their conntrack entries tell.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::conntrack::{Leaving, backend};
use crate::netfilter::rule::{Matches, Rule, Target};
use crate::netfilter::ruleset::{OwnedTable, SavedRule};
use crate::netfilter::{ConntrackEntry, Endpoint, Family, Name, Protocol, Table};
use crate::plan::{Plan, TablePlan};

/// The observed ways, and the planned ones.
#[derive(Debug, PartialEq)]
pub struct Routes {
    pub observed: Ways,
    pub planned: Ways,
}

impl Routes {
    pub fn new(plan: &Plan, family: Family, before: &OwnedTable, leaving: &Leaving) -> Self {
        let nothing = TablePlan::default();
        let planned = plan.tables.get(&(family, Table::Nat)).unwrap_or(&nothing);
        let mut routes = Self {
            observed: Ways::observed(&plan.name, before, leaving),
            planned: Ways::planned(plan, planned),
        };
        let backends = &mut routes.planned.backends;
        backends.retain(|(part, _, endpoint)| !leaving.includes(part, *endpoint));
        routes
    }

    /// Returns true if the planned rules lead the connection to a balancer that has
    /// the backend still.
    pub fn keep(&self, entry: &ConntrackEntry, backend: &Endpoint) -> bool {
        let answers = |(_, protocol, endpoint): &Backend| {
            protocol.number() == entry.protocol
                && endpoint.address == backend.address
                && endpoint
                    .port
                    .is_none_or(|port| port == entry.reply_source.1)
        };
        let mut backends = self.planned.backends.iter();
        backends.any(|kept| answers(kept) && self.planned.lead(entry, &kept.0))
    }
}

/// A backend: its balancer, which is empty where there is no set, the protocol of
/// its connections, its address and port.
pub type Backend = (String, Protocol, Endpoint);

/// The rules between the built-in chains and the balancers, and the backends there.
#[derive(Debug, PartialEq)]
pub struct Ways {
    /// The name of the set; `None` where the jump rules lead to the balancer.
    set: Option<Name>,
    jumps: Vec<Rule>,
    /// The chains of the set itself.
    chains: BTreeMap<String, Vec<Rule>>,
    /// The backends of every balancer.
    pub backends: BTreeSet<Backend>,
}

impl Ways {
    fn observed(name: &Name, nat: &OwnedTable, leaving: &Leaving) -> Self {
        let set = is_set(name, nat).then(|| name.clone());
        let rules = |rules: &[SavedRule]| -> Vec<Rule> {
            rules
                .iter()
                .filter_map(|rule| rule.meaning.clone())
                .collect()
        };
        let jumps = nat.jumps.iter().filter(|jump| is_way_in(&jump.chain));
        let jumps = jumps.filter_map(|jump| jump.rule.meaning.clone()).collect();
        let chains = nat.chains.iter();
        let chains = chains.map(|(name, chain)| (name.clone(), rules(&chain.rules)));
        let mut ways = Self::new(set, jumps, chains.collect());
        let backends = &mut ways.backends;
        backends.retain(|(part, _, endpoint)| leaving.is_meant(name, nat, (part, *endpoint)));
        ways
    }

    fn planned(plan: &Plan, nat: &TablePlan) -> Self {
        let set = plan.is_set.then(|| plan.name.clone());
        let jumps = nat.jumps.iter().filter(|jump| is_way_in(jump.chain));
        let jumps = jumps.map(|jump| jump.rule.clone()).collect();
        Self::new(set, jumps, nat.chains.clone())
    }

    fn new(set: Option<Name>, jumps: Vec<Rule>, all: BTreeMap<String, Vec<Rule>>) -> Self {
        let mut ways = Self {
            set,
            jumps,
            chains: BTreeMap::new(),
            backends: BTreeSet::new(),
        };
        let protocols: BTreeSet<_> = ways.jumps.iter().map(|rule| rule.protocol).collect();
        let arriving = match protocols.first() {
            Some(protocol) if protocols.len() == 1 => *protocol,
            _ => None,
        };
        for (name, rules) in all {
            match ways.part(&name).map(str::to_owned) {
                None => drop(ways.chains.insert(name, rules)),
                Some(part) => {
                    let backends = rules.iter().filter_map(|rule| backend(rule, arriving));
                    let backends =
                        backends.map(|(protocol, endpoint)| (part.clone(), protocol, endpoint));
                    ways.backends.extend(backends);
                }
            }
        }
        ways
    }

    /// The balancer that a chain belongs to; `None` for the chains of the set itself.
    fn part<'a>(&self, chain: &'a str) -> Option<&'a str> {
        match &self.set {
            Some(name) => name.member(chain),
            None => Some(""),
        }
    }

    /// Returns true if the rules may have led the connection to the balancer: the
    /// interface is not in its conntrack entry.
    pub fn lead(&self, entry: &ConntrackEntry, part: &str) -> bool {
        let mut found = false;
        let mut jumps = self.jumps.iter().filter(|jump| led(jump, entry));
        jumps.any(|jump| {
            if let Target::Jump(chain) | Target::Goto(chain) = &jump.target {
                self.follow(chain, entry, part, &mut found, 0);
            }
            found
        });
        found
    }

    /// Follows the rules of a chain. Returns true if one of them took the connection
    /// for certain.
    fn follow(
        &self,
        chain: &str,
        entry: &ConntrackEntry,
        part: &str,
        found: &mut bool,
        depth: usize,
    ) -> bool {
        const DEEPEST: usize = 32;
        if let Some(reached) = self.part(chain) {
            *found |= reached == part;
            return true;
        }
        let rules = self.chains.get(chain).into_iter().flatten();
        let is_of_protocol = |rule: &&Rule| {
            let protocol = rule.protocol;
            protocol.is_none_or(|protocol| protocol.number() == entry.protocol)
        };
        let rules = rules.filter(is_of_protocol);
        for rule in rules
            .filter(|rule| led(rule, entry))
            .take_while(|_| depth < DEEPEST)
        {
            let is_certain = is_certain(rule);
            match &rule.target {
                Target::Goto(next) => {
                    let is_taken = self.follow(next, entry, part, found, depth + 1);
                    if is_certain {
                        return is_taken;
                    }
                }
                Target::Jump(next) if next == "RETURN" && is_certain => return false,
                Target::Jump(next)
                    if self.follow(next, entry, part, found, depth + 1) && is_certain =>
                {
                    return true;
                }
                _ => {}
            }
        }
        false
    }
}

fn is_way_in(chain: &str) -> bool {
    ["PREROUTING", "OUTPUT"].contains(&chain)
}

/// Returns true if the observed rules are those of a set: its main chain leads to
/// other chains, and does not choose among them.
pub fn is_set(name: &Name, nat: &OwnedTable) -> bool {
    let main = nat.chains.get(name.as_str());
    let rules = main.map_or(&[][..], |chain| &chain.rules);
    let mut meanings = rules.iter().filter_map(|rule| rule.meaning.as_ref());
    let leads_on = |rule: &Rule| {
        let is_chain = matches!(rule.target, Target::Goto(_) | Target::Jump(_));
        is_chain && rule.is_certain()
    };
    !rules.is_empty() && meanings.all(leads_on)
}

/// Returns true if the rule matched the first packet of the connection, as far as
/// its conntrack entry tells.
pub fn led(rule: &Rule, entry: &ConntrackEntry) -> bool {
    let Some(matches) = &rule.matches else {
        return true;
    };
    let within = |network: Option<IpNet>, address: &IpAddr| {
        network.is_none_or(|network| network.contains(address))
    };
    within(matches.source, &entry.source)
        && within(matches.destination, &entry.destination)
        && matches.destination_ports.include(entry.port)
}

/// Returns true if a conntrack entry tells all that the rule matches.
fn is_certain(rule: &Rule) -> bool {
    let told = rule.matches.as_deref().map(|matches| Matches {
        source: matches.source,
        destination: matches.destination,
        destination_ports: matches.destination_ports.clone(),
        ..Matches::default()
    });
    rule.is_certain() && rule.matches.as_deref() == told.as_ref()
}
