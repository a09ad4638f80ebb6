//! The rules around the chain: source addresses, forwarding, and the answer of
//! an empty pool.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{JumpPosition, PlannedJump, TablePlan, chain_of, matches};
use crate::netfilter::rule::{Connection, ConnectionState, Matches, RejectWith, Rule, Target};
use crate::netfilter::{Family, Protocol};
use crate::request::{Balancer, Destination, Masquerading, Pool, WhenEmpty};

/// Adds the rules that rewrite source addresses to the nat table.
pub(super) fn masquerade(balancer: &Balancer, pool: &Pool, part: &mut TablePlan) {
    let Some(masquerade) = &balancer.gateway.masquerade else {
        return;
    };
    let target = rewriting(masquerade, pool.family);
    let chain = chain_of(&balancer.chain, "masq");
    let jump = Target::Jump(chain.clone());
    let (jumps, rules) = match masquerade.all {
        true => (vec![Matches::default()], vec![Rule::to(target)]),
        false => (
            matches::translated(balancer, pool.family),
            answered_by_us(pool, &target),
        ),
    };
    if rules.is_empty() {
        return;
    }
    part.chains.insert(chain, rules);
    part.jumps
        .extend(jumps.into_iter().map(|matches| PlannedJump {
            chain: "POSTROUTING",
            rule: Rule::to(jump.clone()).matching(Matches {
                out_interface: masquerade.out_interface.clone(),
                ..matches
            }),
            place: JumpPosition::End,
        }));
}

/// The target that rewrites a source address.
pub(super) fn rewriting(masquerade: &Masquerading, family: Family) -> Target {
    match masquerade.addresses.get(&family) {
        Some(address) => Target::Snat(*address),
        None => Target::Masquerade,
    }
}

/// The filter table.
pub(super) fn filter(balancer: &Balancer, pool: &Pool) -> TablePlan {
    let mut part = TablePlan::default();
    if balancer.gateway.forward {
        forward(balancer, pool, &mut part);
    }
    if pool.is_empty() {
        refuse(balancer, pool.family, &mut part);
    }
    part
}

fn forward(balancer: &Balancer, pool: &Pool, part: &mut TablePlan) {
    let chain = chain_of(&balancer.chain, "forward");
    let jump = Target::Jump(chain.clone());
    part.chains.insert(chain, accepting(pool));
    let jumps = matches::translated(balancer, pool.family);
    part.jumps
        .extend(jumps.into_iter().map(|matches| PlannedJump {
            chain: "FORWARD",
            rule: Rule::to(jump.clone()).matching(matches),
            place: JumpPosition::BeforeRefusals,
        }));
}

/// The rules that accept the connections of a pool, both directions.
pub(super) fn accepting(pool: &Pool) -> Vec<Rule> {
    let mut rules = answered_by_us(pool, &Target::Accept);
    // Connections of removed backends pass too: they were accepted when they
    // were new.
    let established = Connection {
        state: Some(ConnectionState::Established),
        ..Connection::default()
    };
    rules.push(Rule::to(Target::Accept).matching(established.into()));
    rules
}

/// The rule that answers the connections of an empty pool, unless they pass.
pub(super) fn refusal(balancer: &Balancer, family: Family) -> Option<Rule> {
    let protocol = balancer.protocol;
    let target = match (balancer.gateway.when_empty, protocol, family) {
        (WhenEmpty::Pass, ..) => return None,
        (WhenEmpty::Drop, ..) => Target::Drop,
        (WhenEmpty::Reject, Protocol::Tcp, _) => Target::Reject(RejectWith::TcpReset),
        (WhenEmpty::Reject, _, Family::Ipv4) => Target::Reject(RejectWith::IcmpPort),
        (WhenEmpty::Reject, _, Family::Ipv6) => Target::Reject(RejectWith::Icmp6Port),
    };
    Some(Rule {
        protocol: Some(protocol),
        ..Rule::to(target)
    })
}

/// New connections get their answer wherever they are bound for; those that
/// were balanced before go on.
fn refuse(balancer: &Balancer, family: Family, part: &mut TablePlan) {
    let protocol = balancer.protocol;
    let Some(rule) = refusal(balancer, family) else {
        return;
    };
    let chain = chain_of(&balancer.chain, "refuse");
    let jump = Target::Jump(chain.clone());
    part.protocols.insert(chain.clone(), protocol);
    part.chains.insert(chain, vec![rule]);
    let outside = matches::from_outside(balancer, family);
    let mut lead = |chain, entries: &[Matches]| {
        part.jumps.extend(entries.iter().map(|matches| PlannedJump {
            chain,
            rule: Rule {
                protocol: Some(protocol),
                ..Rule::to(jump.clone()).matching(matches::untouched(matches.clone()))
            },
            place: JumpPosition::Head,
        }));
    };
    // Connections of this host to itself arrive on `lo`, and are not balanced.
    let not_from_here: Vec<Matches> = outside
        .iter()
        .map(|matches| Matches {
            not_in_interface: matches.in_interface.is_none().then(|| "lo".to_owned()),
            ..matches.clone()
        })
        .collect();
    lead("INPUT", &not_from_here);
    if balancer.destination != Destination::Local {
        lead("FORWARD", &outside);
    }
    if balancer.gateway.local_traffic {
        lead("OUTPUT", &matches::from_here(balancer, family));
    }
}

/// A rule for each network of backends, by who answers: that holds for both
/// directions of a connection.
pub(super) fn answered_by_us(pool: &Pool, target: &Target) -> Vec<Rule> {
    let answered = |network| Connection {
        reply_source: Some(network),
        ..Connection::default()
    };
    let networks = networks(pool).into_iter();
    networks
        .map(|network| Rule::to(target.clone()).matching(answered(network).into()))
        .collect()
}

/// The networks of a pool's backends.
pub(super) fn networks(pool: &Pool) -> Vec<IpNet> {
    let addresses: Vec<IpAddr> = pool
        .backends
        .iter()
        .map(|one| one.endpoint.address)
        .collect();
    covering(&addresses)
}

/// Networks that cover the addresses. Up to 64 networks cover exactly these;
/// beyond that every new connection would pass too many rules, so the prefixes
/// are shortened until 64 are enough.
fn covering(addresses: &[IpAddr]) -> Vec<IpNet> {
    const MOST: usize = 64;
    let single: Vec<IpNet> = addresses.iter().copied().map(IpNet::from).collect();
    let longest = single.iter().map(IpNet::max_prefix_len).max().unwrap_or(0);
    let of_length = |length: u8| {
        let cut = single
            .iter()
            .filter_map(|network| IpNet::new(network.addr(), length).ok());
        IpNet::aggregate(&cut.map(|network| network.trunc()).collect())
    };
    let mut lengths = (0..=longest).rev().map(of_length);
    let mut networks = lengths
        .find(|networks| networks.len() <= MOST)
        .unwrap_or_default();
    networks.sort();
    networks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(addresses: impl Iterator<Item = String>) -> Vec<String> {
        let addresses: Vec<IpAddr> = addresses.map(|text| text.parse().unwrap()).collect();
        let networks = covering(&addresses);
        assert!(
            addresses
                .iter()
                .all(|address| networks.iter().any(|network| network.contains(address)))
        );
        networks.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn up_to_64_networks_hold_the_backends_and_nobody_else() {
        let few = ["192.0.2.1", "192.0.2.2", "192.0.2.3", "10.0.0.1"].map(str::to_owned);
        assert_eq!(
            networks(few.into_iter()),
            ["10.0.0.1/32", "192.0.2.1/32", "192.0.2.2/31"]
        );
        let odd = |count| (0..count).map(|n: u32| format!("10.0.{}.{}", n >> 7, (n & 127) * 2));
        let exact = networks(odd(64));
        assert_eq!(exact.len(), 64);
        assert!(exact.iter().all(|network| network.ends_with("/32")));
        assert_eq!(networks(odd(65)), ["10.0.0.0/25", "10.0.0.128/31"]);
        assert_eq!(
            networks((0..256).map(|n| format!("fd00::{n:x}"))),
            ["fd00::/120"]
        );
        assert_eq!(networks(std::iter::empty()), Vec::<String>::new());
    }
}
