//! Answers of backends that do not come back through this host.
//!
//! Without a rewritten source a backend answers the client's own address. If that answer
//! does not pass this host, nobody puts the balanced address back in, and the client
//! drops it. The routes of others are not known here. But where clients and
//! backends are reached by the same network, an answer has a shorter way:
//!
//! | clients | backends | answers |
//! |---|---|---|
//! | in the network | in the network | go to the client directly |
//! | over a router, or not known | in the network | follow the backends' routes |
//! | by the network | over a router in it | go on from there |
//!
//! Clients come from the networks of `source`, and by `in_interface`. Without `source` they
//! may come by any network, so only a host with one (or an interface with one) is
//! judged. Where the network of clients and that of backends differ, this host
//! is a router between the two, and nothing is reported.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::neighbours::with_weight;
use crate::explain::{Leaving, Rewriting};
use crate::host::{Link, Routes, Way};
use crate::netfilter::{Endpoint, Family, interfaces_meet, networks_meet, shortest};
use crate::request::{Balancer, Masquerading, Pool, Request, listed};

/// The place of clients in the network by which they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Clients {
    /// Behind a router, or not known.
    Beyond,
    /// In the network.
    Within,
}

/// The reason why answers do not come back.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    /// Client and backend are neighbours.
    Neighbours,
    /// The backends' routes decide.
    TheirRoutes,
    /// The backends are behind this router.
    Router(IpAddr),
}

/// A backend whose answers are not expected to come back through this host.
struct Suspect<'a> {
    endpoint: Endpoint,
    way: &'a Way,
    reason: Reason,
}

/// The sources to ask the host for the ways to.
pub(super) fn clients(balancer: &Balancer) -> impl Iterator<Item = IpAddr> {
    balancer.sources.iter().map(IpNet::addr)
}

/// Returns true if there may be a warning, before the rules of others are known.
pub(super) fn may_be(request: &Request, balancer: &Balancer, pool: &Pool, routes: &Routes) -> bool {
    let mut suspects = suspects(request, balancer, pool, routes);
    suspects.next().is_some()
}

/// One warning for each reason.
pub(super) fn warnings(
    request: &Request,
    balancer: &Balancer,
    pool: &Pool,
    routes: &Routes,
    rewriting: Option<&Rewriting>,
) -> Vec<String> {
    let mut found = BTreeMap::<(Reason, &Link), Vec<String>>::new();
    for suspect in suspects(request, balancer, pool, routes) {
        let link = &suspect.way.link;
        let leaving = Leaving {
            protocol: balancer.protocol.as_str(),
            to: suspect.endpoint,
            interface: &link.interface,
            may_come_from: &|network| may_come_from(balancer, link, routes, network),
        };
        if rewriting.is_some_and(|rules| rules.may_meet(&leaving)) {
            continue;
        }
        let addresses = found.entry((suspect.reason, link)).or_default();
        let address = suspect.endpoint.address.to_string();
        if addresses.last() != Some(&address) {
            addresses.push(address);
        }
    }
    let found = found.into_iter();
    found
        .map(|((reason, link), addresses)| worded(balancer, &reason, link, &addresses))
        .collect()
}

fn worded(balancer: &Balancer, reason: &Reason, link: &Link, addresses: &[String]) -> String {
    let Link { interface, network } = link;
    let network = shortest(network);
    let backends = listed(addresses.iter().map(String::as_str));
    let why = match reason {
        Reason::Neighbours => format!(
            "{backends} and clients are neighbours in {network}, so answers go to the client directly and not through \
             this host, and the client drops them"
        ),
        Reason::TheirRoutes => format!(
            "clients come by the network of {backends} ({network} on `{interface}`), so answers do not pass this host unless \
             the default route of the backends leads here, and clients drop them"
        ),
        Reason::Router(router) => format!(
            "{backends} answer over the router `{router}`, by whose network ({network} on `{interface}`) clients come too, so \
             answers do not pass this host, and clients drop them"
        ),
    };
    let out_interface = balancer.gateway.masquerade.as_ref();
    let way_out = match out_interface.and_then(|one| one.out_interface.as_ref()) {
        None => "`masquerade: balanced` brings them back".to_owned(),
        Some(other) => format!(
            "`masquerade` rewrites only what leaves by `{other}`; leave `out_interface` out"
        ),
    };
    format!("backends: {why}; {way_out}")
}

/// The backends of a pool whose answers are not expected to come back.
fn suspects<'a>(
    request: &'a Request,
    balancer: &'a Balancer,
    pool: &'a Pool,
    routes: &'a Routes,
) -> impl Iterator<Item = Suspect<'a>> {
    let arrivals = arrivals(balancer, pool.family, routes);
    with_weight(pool).filter_map(move |endpoint| {
        let way = routes.ways.get(&endpoint.address)?;
        let clients = arrivals.get(&way.link)?;
        let reason = match (way.router, clients) {
            (Some(router), _) => Reason::Router(router),
            (None, Clients::Within) => Reason::Neighbours,
            (None, Clients::Beyond) => Reason::TheirRoutes,
        };
        let is_rewritten = rewritten(request, balancer, pool.family, &way.link.interface);
        (!is_rewritten).then_some(Suspect {
            endpoint,
            way,
            reason,
        })
    })
}

/// The networks by which the clients of a balancer come, as far as that is known.
fn arrivals<'a>(
    balancer: &Balancer,
    family: Family,
    routes: &'a Routes,
) -> BTreeMap<&'a Link, Clients> {
    let in_interface = balancer.in_interface.as_deref();
    let comes_by = |link: &Link| interfaces_meet(in_interface, Some(&link.interface));
    let links: Vec<&Link> = routes
        .links
        .iter()
        .filter(|link| Family::of(link.network.addr()) == family && comes_by(link))
        .collect();
    let mut arrivals = BTreeMap::new();
    let mut add = |link: &'a Link, clients: Clients| {
        let known = arrivals.entry(link).or_insert(clients);
        *known = (*known).max(clients);
    };
    let sources = sources(balancer, family);
    if sources.is_empty() {
        if let [only] = links.as_slice() {
            add(only, Clients::Beyond);
        }
    }
    for source in sources {
        let within: Vec<&&Link> = links
            .iter()
            .filter(|link| source.contains(&link.network))
            .collect();
        match (within.as_slice(), routes.ways.get(&source.addr())) {
            ([only], _) => add(only, Clients::Within),
            // Of several networks any may be meant.
            ([_, ..], _) => {}
            ([], Some(way)) if comes_by(&way.link) => {
                let clients = match way.router {
                    None => Clients::Within,
                    Some(_) => Clients::Beyond,
                };
                add(&way.link, clients);
            }
            ([], _) => {}
        }
    }
    arrivals
}

/// The sources of a family; none stands for everybody.
fn sources(balancer: &Balancer, family: Family) -> Vec<IpNet> {
    let of_family = |source: &&IpNet| Family::of(source.addr()) == family;
    let sources: Vec<IpNet> = balancer.sources.iter().filter(of_family).copied().collect();
    match sources.iter().any(|source| source.prefix_len() == 0) {
        true => Vec::new(),
        false => sources,
    }
}

/// Returns true if clients that come by a network may have addresses of another one.
fn may_come_from(balancer: &Balancer, link: &Link, routes: &Routes, network: &IpNet) -> bool {
    let sources = sources(balancer, Family::of(network.addr()));
    match sources.as_slice() {
        [] => {
            let mut others = routes.links.iter().filter(|other| *other != link);
            !others.any(|other| other.network.contains(network))
        }
        sources => sources
            .iter()
            .any(|source| networks_meet(Some(*source), Some(*network))),
    }
}

/// Returns true if our own rules rewrite the source of what leaves by an interface: those
/// of the balancer, or those of any other that rewrite everything.
fn rewritten(request: &Request, balancer: &Balancer, family: Family, interface: &str) -> bool {
    let leaves = |masquerade: &Masquerading| {
        interfaces_meet(masquerade.out_interface.as_deref(), Some(interface))
    };
    let has_pool = |one: &Balancer| one.pools.iter().any(|pool| pool.family == family);
    let own = balancer.gateway.masquerade.as_ref();
    own.is_some_and(leaves)
        || request.balancers().iter().any(|one| {
            let masquerade = one.gateway.masquerade.as_ref();
            masquerade.is_some_and(|masquerade| masquerade.all && leaves(masquerade))
                && has_pool(one)
        })
}
