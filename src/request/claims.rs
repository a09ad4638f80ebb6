//! The claims of the balancers of a set: two of the same traffic are an error,
//! and where two meet in part the first one listed wins.

use std::collections::{BTreeMap, HashMap};

use ipnet::IpNet;

use super::balancer::{Balancer, Destination};
use super::coerce::{BadRequest, Mistakes};
use crate::netfilter::{Family, PortRange, Protocol, interfaces_meet, networks_meet};

/// Checks that no two balancers claim the same; returns a warning for each that
/// others take traffic from.
///
/// # Errors
/// The balancers that claim the same traffic.
pub(super) fn check(balancers: &[Balancer]) -> Result<Vec<String>, BadRequest> {
    check_equal(balancers)?;
    let mut beaten = BTreeMap::<usize, Vec<usize>>::new();
    for family in Family::BOTH {
        for (first, second) in meeting(balancers, family) {
            let winners = beaten.entry(second).or_default();
            if !winners.contains(&first) {
                winners.push(first);
            }
        }
    }
    let warning = |(loser, winners): (usize, Vec<usize>)| {
        let name = |at: usize| balancers[at].name.as_deref().unwrap_or_default();
        format!(
            "balancer `{}`: it claims traffic that {} claim{} too; the first one listed gets it",
            name(loser),
            listed(winners.iter().map(|at| name(*at))),
            if winners.len() == 1 { "s" } else { "" },
        )
    };
    Ok(beaten.into_iter().map(warning).collect())
}

/// Names in backticks, ten at most.
#[must_use]
pub fn listed<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    const MOST: usize = 10;
    let count = names.len();
    let shown: Vec<String> = names.take(MOST).map(|name| format!("`{name}`")).collect();
    match (count.saturating_sub(MOST), shown.as_slice()) {
        (0, [all @ .., last]) if !all.is_empty() => format!("{} and {last}", all.join(", ")),
        (0, shown) => shown.concat(),
        (more, shown) => format!("{} and {more} more", shown.join(", ")),
    }
}

/// The traffic of a balancer in one family, in a form in which equal traffic is
/// an equal value.
#[derive(PartialEq, Eq, Hash)]
struct Claim<'a> {
    family: Family,
    protocol: Protocol,
    ports: &'a [PortRange],
    is_local: bool,
    destinations: Vec<IpNet>,
    sources: Vec<IpNet>,
    in_interface: Option<&'a str>,
}

fn check_equal(balancers: &[Balancer]) -> Result<(), BadRequest> {
    let mut known = HashMap::new();
    let mut mistakes = Mistakes::default();
    for (at, balancer) in balancers.iter().enumerate() {
        let families = balancer.pools.iter().map(|pool| pool.family);
        let mut claims = families.map(|family| Claim {
            family,
            protocol: balancer.protocol,
            ports: balancer.destination_ports.all_ranges(),
            is_local: balancer.destination == Destination::Local,
            destinations: aggregated(&destinations(balancer), family),
            sources: aggregated(&balancer.sources, family),
            in_interface: balancer.in_interface.as_deref(),
        });
        let earlier = claims.find_map(|claim| known.insert(claim, at));
        if let Some(earlier) = earlier {
            let name = |at: usize| balancers[at].name.as_deref().unwrap_or_default();
            let problem = format!(
                "`{}` claims the same traffic as `{}`, balancers[{earlier}]; say with `destination_port`, `destination`, \
                 `source` or `in_interface` which is whose",
                name(at),
                name(earlier)
            );
            mistakes.add(BadRequest::new(format!("balancers[{at}]"), problem));
        }
    }
    mistakes.or(Some(()))
}

/// The networks of a family; none for everywhere.
fn aggregated(networks: &[IpNet], family: Family) -> Vec<IpNet> {
    let of_family = networks
        .iter()
        .filter(|network| Family::of(network.addr()) == family);
    let networks = IpNet::aggregate(&of_family.copied().collect());
    match networks.iter().any(|network| network.prefix_len() == 0) {
        true => Vec::new(),
        false => networks,
    }
}

fn destinations(balancer: &Balancer) -> Vec<IpNet> {
    match &balancer.destination {
        Destination::Networks(networks) => networks.clone(),
        Destination::Any | Destination::Local => Vec::new(),
    }
}

/// The pairs of balancers that a connection of the family can be of, in the order
/// of the list. Their ranges of ports are swept from below.
fn meeting(balancers: &[Balancer], family: Family) -> Vec<(usize, usize)> {
    let is_used = |balancer: &Balancer| balancer.pools.iter().any(|pool| pool.family == family);
    let networks: Vec<[Vec<IpNet>; 2]> = balancers
        .iter()
        .map(|balancer| {
            [&destinations(balancer), &balancer.sources].map(|all| aggregated(all, family))
        })
        .collect();
    let mut ranges: Vec<(Protocol, PortRange, usize)> = Vec::new();
    for (at, balancer) in balancers.iter().enumerate().filter(|(_, one)| is_used(one)) {
        let of_balancer = balancer.destination_ports.all_ranges().iter();
        ranges.extend(of_balancer.map(|range| (balancer.protocol, *range, at)));
    }
    ranges.sort_unstable();
    let meet = |one: usize, other: usize| {
        let interface = |at: usize| balancers[at].in_interface.as_deref();
        let [one_to, one_from] = &networks[one];
        let [other_to, other_from] = &networks[other];
        interfaces_meet(interface(one), interface(other))
            && any_meet(one_to, other_to)
            && any_meet(one_from, other_from)
    };
    let mut found = Vec::new();
    let mut open: Vec<(Protocol, PortRange, usize)> = Vec::new();
    for (protocol, range, at) in ranges {
        open.retain(|(of, earlier, _)| *of == protocol && earlier.last >= range.first);
        let others = open.iter().map(|(_, _, other)| *other);
        let others = others.filter(|other| *other != at && meet(*other, at));
        found.extend(others.map(|other| (other.min(at), other.max(at))));
        open.push((protocol, range, at));
    }
    found.sort_unstable();
    found.dedup();
    found
}

fn any_meet(ones: &[IpNet], others: &[IpNet]) -> bool {
    let meets = |one: &IpNet| {
        let mut others = others.iter();
        others.any(|other| networks_meet(Some(*one), Some(*other)))
    };
    ones.is_empty() || others.is_empty() || ones.iter().any(meets)
}
