//! The matches that recognise the balancer's traffic, before and after its
//! destination is rewritten.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::netfilter::rule::{Connection, ConnectionState, Matches};
use crate::netfilter::{Family, PortRange};
use crate::request::{Balancer, Destination};

/// One match for each combination of source, destination and set of ports that
/// fits into a rule. All jump to the same chain, so that their connections are
/// balanced together.
pub(super) fn from_outside(balancer: &Balancer, family: Family) -> Vec<Matches> {
    let ports = balancer.destination_ports.split_for_multiport();
    let mut found = Vec::new();
    for (source, destination) in pairs(balancer, family) {
        for ports in &ports {
            found.push(Matches {
                source,
                destination,
                in_interface: balancer.in_interface.clone(),
                destination_ports: ports.clone(),
                to_local: balancer.destination == Destination::Local,
                ..Matches::default()
            });
        }
    }
    found
}

/// The same for connections that this host makes: they have no incoming
/// interface. The loopback network is excluded unless it is named, because its
/// addresses mean nothing to a backend elsewhere.
pub(super) fn from_here(balancer: &Balancer, family: Family) -> Vec<Matches> {
    let here = |outside: Matches| Matches {
        in_interface: None,
        not_destination: outside.destination.is_none().then_some(loopback(family)),
        ..outside
    };
    let outside = from_outside(balancer, family);
    outside.into_iter().map(here).collect()
}

/// The addresses of a host that mean itself.
#[must_use]
pub fn loopback(family: Family) -> IpNet {
    match family {
        Family::Ipv4 => IpNet::V4(Ipv4Net::new_assert([127, 0, 0, 0].into(), 8)),
        Family::Ipv6 => IpNet::V6(Ipv6Net::new_assert(1.into(), 128)),
    }
}

/// The same connections after DNAT, in both directions, recognised by their
/// original destination in the conntrack entry.
pub(super) fn translated(balancer: &Balancer, family: Family) -> Vec<Matches> {
    let ranges = balancer.destination_ports.ranges();
    let ports: Vec<Option<PortRange>> = match ranges.is_empty() {
        true => vec![None],
        false => ranges.iter().copied().map(Some).collect(),
    };
    let mut found = Vec::new();
    for (source, destination) in pairs(balancer, family) {
        for port in &ports {
            let connection = Connection {
                state: Some(ConnectionState::Translated),
                protocol: Some(balancer.protocol),
                original_source: source,
                original_destination: destination,
                original_port: *port,
                reply_source: None,
            };
            found.push(connection.into());
        }
    }
    found
}

/// New connections without DNAT.
pub(super) fn untouched(matches: Matches) -> Matches {
    let connection = Connection {
        state: Some(ConnectionState::Untouched),
        ..Connection::default()
    };
    Matches {
        connection,
        ..matches
    }
}

/// Every source with every destination.
pub(super) fn pairs(balancer: &Balancer, family: Family) -> Vec<(Option<IpNet>, Option<IpNet>)> {
    let destinations = match &balancer.destination {
        Destination::Networks(networks) => of_family(networks, family),
        Destination::Any | Destination::Local => vec![None],
    };
    let sources = of_family(&balancer.sources, family);
    let with_sources = |destination: Option<IpNet>| {
        let sources = sources.clone().into_iter();
        sources.map(move |source| (source, destination))
    };
    destinations.into_iter().flat_map(with_sources).collect()
}

/// The networks of one family; `None` is everywhere, and includes the others.
fn of_family(networks: &[IpNet], family: Family) -> Vec<Option<IpNet>> {
    let ours = networks
        .iter()
        .filter(|network| Family::of(network.addr()) == family);
    let found: Vec<_> = ours
        .map(|network| Some(*network).filter(|network| network.prefix_len() > 0))
        .collect();
    match found.is_empty() || found.contains(&None) {
        true => vec![None],
        false => found,
    }
}
