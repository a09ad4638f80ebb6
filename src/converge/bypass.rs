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

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::neighbours::with_weight;
use crate::explain::{Leaving, Rewriting};
use crate::host::{Link, Routes, Way};
use crate::netfilter::{
    Endpoint, Family, PortRange, Ports, interfaces_meet, networks_meet, shortest,
};
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
    let mut found = BTreeMap::<(Reason, &Link), BTreeSet<IpAddr>>::new();
    for suspect in suspects(request, balancer, pool, routes) {
        let link = &suspect.way.link;
        let port = suspect.endpoint.port.map(|port| {
            Ports::new(vec![PortRange {
                first: port,
                last: port,
            }])
        });
        let leaving = Leaving {
            protocol: balancer.protocol.as_str(),
            to: suspect.endpoint.address,
            ports: port.as_ref().unwrap_or(&balancer.destination_ports),
            interface: &link.interface,
            may_come_from: &|network| may_come_from(balancer, link, routes, network),
        };
        if rewriting.is_some_and(|rules| rules.may_meet(&leaving)) {
            continue;
        }
        let addresses = found.entry((suspect.reason, link)).or_default();
        addresses.insert(suspect.endpoint.address);
    }
    let found = found.into_iter();
    found
        .map(|((reason, link), addresses)| worded(balancer, &reason, link, &addresses))
        .collect()
}

fn worded(
    balancer: &Balancer,
    reason: &Reason,
    link: &Link,
    addresses: &BTreeSet<IpAddr>,
) -> String {
    let Link { interface, network } = link;
    let network = shortest(network);
    let addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
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
            (Some(over), _) => Reason::Router(over),
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
            ([], Some(way)) if comes_by(&way.link) => {
                let clients = match way.router {
                    None => Clients::Within,
                    Some(_) => Clients::Beyond,
                };
                add(&way.link, clients);
            }
            // Nothing is known of it, or any of several networks may be meant.
            _ => {}
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::explain;

    const BACKENDS: [&str; 2] = ["10.9.0.1", "10.7.0.1"];

    /// 10.9.0.0/24 on `edge`, where the default router is; also 10.6.0.0/24 on `inside`.
    fn routes(networks: &[(&str, &str)]) -> Routes {
        let link = |(interface, network): &(&str, &str)| Link {
            interface: (*interface).to_owned(),
            network: network.parse().unwrap(),
        };
        let edge = link(&("edge", "10.9.0.0/24"));
        let router: IpAddr = "10.9.0.253".parse().unwrap();
        let way = |(address, router): (&str, Option<IpAddr>)| {
            let link = edge.clone();
            (address.parse().unwrap(), Way { link, router })
        };
        let ways = [
            ("10.9.0.1", None),
            ("10.9.0.2", None),
            ("10.9.0.0", None),
            ("10.9.0.64", None),
            ("10.7.0.1", Some(router)),
            ("10.8.0.0", Some(router)),
            ("10.0.0.0", Some(router)),
        ];
        Routes {
            links: networks.iter().map(link).collect(),
            ways: ways.into_iter().map(way).collect(),
            ..Routes::default()
        }
    }

    const ONE: &[(&str, &str)] = &[("edge", "10.9.0.0/24")];
    const TWO: &[(&str, &str)] = &[("edge", "10.9.0.0/24"), ("inside", "10.6.0.0/24")];

    fn request(more: &Value) -> Request {
        let mut object = json!({"name": "W", "destination_port": 80, "backends": BACKENDS});
        let attributes = object.as_object_mut().unwrap();
        attributes.extend(more.as_object().unwrap().clone());
        Request::from_json(attributes.clone()).unwrap()
    }

    /// The warnings, shortened to the words of their reasons.
    fn told(more: &Value, networks: &[(&str, &str)], post_routing: &str) -> Vec<&'static str> {
        let request = request(more);
        let dump = format!("*nat\n:POSTROUTING ACCEPT [0:0]\n{post_routing}COMMIT\n");
        let tables = explain::read(dump.as_bytes(), None).unwrap();
        let rewriting = Rewriting::new(&tables[0], |chain| request.name.owns(chain));
        let routes = routes(networks);
        let pools = request.pools();
        let warnings = pools.flat_map(|(balancer, pool)| {
            warnings(&request, balancer, pool, &routes, Some(&rewriting))
        });
        let word = |text: String| {
            let words = ["neighbours", "default route", "router"];
            let mut words = words.into_iter().filter(|word| text.contains(word));
            words.next().unwrap()
        };
        warnings.map(word).collect()
    }

    #[test]
    fn without_sources_only_one_network_is_judged() {
        let both = ["default route", "router"];
        for (more, networks, expected) in [
            (json!({}), ONE, &both[..]),
            (json!({"source": "0.0.0.0/0"}), ONE, &both),
            (json!({}), TWO, &[]),
            (json!({"source": "0.0.0.0/0"}), TWO, &[]),
            (json!({"in_interface": "edge"}), TWO, &both),
            (json!({"in_interface": "e+"}), TWO, &both),
            (json!({"in_interface": "inside"}), TWO, &[]),
            (json!({"in_interface": "elsewhere"}), ONE, &[]),
            (json!({}), &[], &[]),
        ] {
            assert_eq!(told(&more, networks, ""), expected, "{more} {networks:?}");
        }
    }

    #[test]
    fn sources_come_from_their_networks() {
        let near = ["neighbours", "router"];
        let far = ["default route", "router"];
        for (source, expected) in [
            (json!("10.9.0.0/24"), &near[..]),
            (json!("10.9.0.64/26"), &near),
            (json!("10.8.0.0/24"), &far),
            (json!(["10.8.0.0/24", "10.9.0.0/24"]), &near),
            (json!("10.6.0.0/24"), &[]),
            // It has both networks, of which either may be meant.
            (json!("10.0.0.0/8"), &[]),
            // Of this network nothing is known.
            (json!("172.16.0.0/12"), &[]),
        ] {
            assert_eq!(
                told(&json!({"source": source}), TWO, ""),
                expected,
                "{source}"
            );
        }
        assert_eq!(told(&json!({"source": "10.0.0.0/8"}), ONE, ""), near);
        let elsewhere = json!({"source": "10.9.0.0/24", "in_interface": "inside"});
        assert_eq!(told(&elsewhere, TWO, ""), [""; 0]);
    }

    #[test]
    fn a_rewritten_source_brings_answers_back() {
        for more in [
            json!({"masquerade": "balanced"}),
            json!({"masquerade": "balanced", "out_interface": "edge"}),
            json!({"masquerade": "all", "out_interface": "e+"}),
        ] {
            assert_eq!(told(&more, ONE, ""), [""; 0], "{more}");
        }
        let other = json!({"masquerade": "balanced", "out_interface": "inside"});
        assert_eq!(told(&other, ONE, ""), ["default route", "router"]);
        for (rule, expected) in [
            ("-j MASQUERADE", &[][..]),
            ("-o edge -j SNAT --to-source 10.9.0.254", &[]),
            ("-j NETMAP --to 10.5.0.0/24", &[]),
            ("-d 10.7.0.0/16 -j MASQUERADE", &["default route"]),
            ("! -d 10.7.0.0/16 -j MASQUERADE", &["router"]),
            ("-p tcp -m multiport --dports 79:80,443 -j MASQUERADE", &[]),
            (
                "-p tcp -m tcp --dport 443 -j MASQUERADE",
                &["default route", "router"],
            ),
            ("-o inside -j MASQUERADE", &["default route", "router"]),
            ("-s 10.1.0.0/16 -j MASQUERADE", &[]),
            ("-j ACCEPT", &["default route", "router"]),
            ("-j W/masq", &["default route", "router"]),
        ] {
            let rules =
                format!(":W/masq - [0:0]\n-A W/masq -j MASQUERADE\n-A POSTROUTING {rule}\n");
            assert_eq!(told(&json!({}), ONE, &rules), expected, "{rule}");
        }
        // Of containers on this host, such as Docker's, no client is one.
        let containers = "-A POSTROUTING -s 10.6.0.0/24 ! -o docker0 -j MASQUERADE\n";
        let edge = json!({"in_interface": "edge"});
        assert_eq!(told(&edge, TWO, containers), ["default route", "router"]);
        let near = json!({"source": "10.9.0.0/24"});
        assert_eq!(told(&near, TWO, containers), ["neighbours", "router"]);
    }

    #[test]
    fn thousands_of_backends_are_one_warning() {
        let backends: Vec<String> = (0..2000)
            .map(|n| format!("10.9.0.{}:{}", 1 + n % 2, n + 1000))
            .collect();
        let request = request(&json!({"backends": backends}));
        let routes = routes(ONE);
        let (balancer, pool) = request.pools().next().unwrap();
        let warnings = warnings(&request, balancer, pool, &routes, None);
        assert_eq!(
            warnings,
            [
                "backends: clients come by the network of `10.9.0.1` and `10.9.0.2` (10.9.0.0/24 on `edge`), so answers do not pass this host \
              unless the default route of the backends leads here, and clients drop them; \
              `masquerade: balanced` brings them back"
            ]
        );
    }
}
