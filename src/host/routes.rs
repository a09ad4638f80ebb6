//! The addresses of this host's interfaces, and the ways to addresses elsewhere, over
//! netlink.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::ops::ControlFlow;

use ipnet::IpNet;
use rustix::io::Errno;

use super::netlink::{self, Item, Message, Socket, Subsystem, attribute};
use crate::netfilter::Family;

/// The number of the loopback interface in every network namespace.
const LOOPBACK: u32 = 1;

/// An address of an interface.
#[derive(Clone, Debug)]
pub struct InterfaceAddress {
    /// The address.
    pub address: IpAddr,
    /// The network that it is in, or the single address at the other end.
    network: IpNet,
    /// The number of the interface.
    interface: u32,
}

/// A network that an interface of this host is in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Link {
    /// The name of the interface.
    pub interface: String,
    /// The network, reached without a router.
    pub network: IpNet,
}

/// The way of a packet from this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// The network that it leaves by.
    pub link: Link,
    /// The router in that network; `None` if the destination is in it.
    pub router: Option<IpAddr>,
}

/// The ways to some addresses. Where nothing is known of an address, it is neither routed
/// nor unrouted.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    /// The networks of the interfaces, without loopback and link-local ones.
    pub links: BTreeSet<Link>,
    /// The addresses that lead out by a known network.
    pub ways: BTreeMap<IpAddr, Way>,
    /// The addresses without a route.
    pub unrouted: BTreeSet<IpAddr>,
}

impl Routes {
    /// The ways to the addresses. Where rules choose between tables of routes, the way of
    /// a packet depends on more than its destination, so nothing is known; neither is
    /// anything before the network is up.
    #[must_use]
    pub fn to(asked: &[IpAddr], addresses: &[InterfaceAddress]) -> Self {
        let mut routes = Self::default();
        let is_up = addresses.iter().any(|one| !one.address.is_loopback());
        if asked.is_empty() || !is_up {
            return routes;
        }
        let Ok(mut socket) = Socket::open(Subsystem::Routes) else {
            return routes;
        };
        let links = Links::new(&socket, addresses);
        routes.links = links.0.values().flatten().cloned().collect();
        let mut known = Family::BOTH.to_vec();
        known.retain(|family| has_one_table(&mut socket, *family));
        let asked: BTreeSet<IpAddr> = asked.iter().copied().collect();
        for address in asked {
            if !known.contains(&Family::of(address)) {
                continue;
            }
            match route(&mut socket, address) {
                Route::None => {
                    routes.unrouted.insert(address);
                }
                Route::By { interface, router } => {
                    let way = links.way(interface, address, router);
                    routes.ways.extend(way.map(|way| (address, way)));
                }
                Route::Unknown => {}
            }
        }
        routes
    }
}

/// The networks of each interface, by its number.
struct Links(BTreeMap<u32, BTreeSet<Link>>);

impl Links {
    fn new(socket: &Socket, addresses: &[InterfaceAddress]) -> Self {
        let mut links = BTreeMap::<u32, BTreeSet<Link>>::new();
        for one in addresses {
            let network = one.network;
            // An address that stands alone has nobody beside it.
            let is_alone = network == IpNet::from(one.address);
            if one.interface == LOOPBACK || is_alone || is_link_local(network.addr()) {
                continue;
            }
            if let Some(interface) = socket.interface(one.interface) {
                let link = Link { interface, network };
                links.entry(one.interface).or_default().insert(link);
            }
        }
        Self(links)
    }

    /// The way by an interface; `None` where the network is not known that has the router
    /// or, without one, the destination. The address of a router of IPv6 is link-local, so
    /// there the only network of the interface counts.
    fn way(&self, interface: u32, to: IpAddr, router: Option<IpAddr>) -> Option<Way> {
        let next = router.unwrap_or(to);
        let links = self.0.get(&interface)?.iter();
        let mut links = links.filter(|link| Family::of(link.network.addr()) == Family::of(next));
        let link = match is_link_local(next) {
            true => links.next().filter(|_| links.next().is_none()),
            false => links
                .filter(|link| link.network.contains(&next))
                .max_by_key(|link| link.network.prefix_len()),
        };
        Some(Way {
            link: link?.clone(),
            router,
        })
    }
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// The addresses of all interfaces, by `linux/if_addr.h`: `IFA_LOCAL` is our end where the
/// other end has an address too.
pub fn addresses(families: Vec<Family>) -> Vec<InterfaceAddress> {
    const RTM_GETADDR: u16 = 22;
    if families.is_empty() {
        return Vec::new();
    }
    let Ok(mut socket) = Socket::open(Subsystem::Addresses) else {
        return Vec::new();
    };
    let of_family = |family| {
        let message = Message {
            kind: RTM_GETADDR,
            family,
            attributes: &[],
        };
        let found = socket.dump_items(message, &Vec::new(), |found, item| {
            found.extend(interface_address(item));
            ControlFlow::Continue(())
        });
        found.unwrap_or_default()
    };
    families.into_iter().flat_map(of_family).collect()
}

/// The subject is the family, the length of the prefix, flags, a scope, and the number of
/// the interface in four bytes (`struct ifaddrmsg`).
fn interface_address(item: Item) -> Option<InterfaceAddress> {
    const IFA_ADDRESS: u16 = 1;
    const IFA_LOCAL: u16 = 2;
    let of = |kind| attribute(item.attributes, kind).and_then(netlink::address);
    let prefix = *item.subject.get(1)?;
    let interface = item.subject.get(4..8)?.try_into().ok()?;
    let address = of(IFA_LOCAL).or_else(|| of(IFA_ADDRESS))?;
    let other = of(IFA_ADDRESS).unwrap_or(address);
    Some(InterfaceAddress {
        address,
        network: IpNet::new(other, prefix).ok()?.trunc(),
        interface: u32::from_ne_bytes(interface),
    })
}

/// Returns true if only the kernel's own rules choose a table of routes: `local`,
/// `main`, and for IPv4 `default`.
fn has_one_table(socket: &mut Socket, family: Family) -> bool {
    const RTM_GETRULE: u16 = 34;
    let own = match family {
        Family::Ipv4 => 3,
        Family::Ipv6 => 2,
    };
    let message = Message {
        kind: RTM_GETRULE,
        family,
        attributes: &[],
    };
    let count = socket.dump(message, &0, |count, _| {
        *count += 1;
        ControlFlow::Continue(())
    });
    count.is_ok_and(|count| count <= own)
}

/// The answer to the question for a route.
#[derive(Debug, PartialEq)]
enum Route {
    /// The destination is unreachable.
    None,
    /// By the interface of this number, and perhaps over a router.
    By {
        interface: u32,
        router: Option<IpAddr>,
    },
    /// The kernel's answer says nothing of these.
    Unknown,
}

/// The kernel's route to an address.
fn route(socket: &mut Socket, address: IpAddr) -> Route {
    const RTM_GETROUTE: u16 = 26;
    const RTA_DST: u16 = 1;
    let bytes = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let message = Message {
        kind: RTM_GETROUTE,
        family: Family::of(address),
        attributes: &netlink::encoded(RTA_DST, &bytes),
    };
    answered(socket.get(message))
}

/// For IPv6 the kernel says in an answer without an error that a destination is unreachable
/// (`struct rta_cacheinfo`).
fn answered(answer: io::Result<Vec<u8>>) -> Route {
    const RTA_OIF: u16 = 4;
    const RTA_GATEWAY: u16 = 5;
    const RTA_CACHEINFO: u16 = 12;
    const RTA_VIA: u16 = 18;
    let is_unreachable = |code: i32| {
        let known = [Errno::NETUNREACH, Errno::HOSTUNREACH].map(Errno::raw_os_error);
        known.contains(&code)
    };
    let attributes = match answer {
        Ok(attributes) => attributes,
        Err(error) if error.raw_os_error().is_some_and(is_unreachable) => return Route::None,
        Err(_) => return Route::Unknown,
    };
    let four = |bytes: &[u8]| bytes.try_into().ok();
    let error = attribute(&attributes, RTA_CACHEINFO).and_then(|info| info.get(12..16));
    let error = error.and_then(four).map(i32::from_ne_bytes);
    if error.is_some_and(|code| is_unreachable(code.saturating_abs())) {
        return Route::None;
    }
    // A router of another family.
    let is_via = attribute(&attributes, RTA_VIA).is_some();
    let interface = attribute(&attributes, RTA_OIF).and_then(four);
    match interface.map(u32::from_ne_bytes) {
        Some(interface) if !is_via && interface != LOOPBACK => Route::By {
            interface,
            router: attribute(&attributes, RTA_GATEWAY).and_then(netlink::address),
        },
        _ => Route::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(all: &[(u16, &[u8])]) -> Vec<u8> {
        let all = all
            .iter()
            .map(|(kind, value)| netlink::encoded(*kind, value));
        all.collect::<Vec<_>>().concat()
    }

    #[test]
    fn the_kernels_answer_is_an_interface_a_router_or_no_route() {
        let two = 2_u32.to_ne_bytes();
        let lo = LOOPBACK.to_ne_bytes();
        let router = [10, 9, 0, 253];
        let by = |router: Option<&str>| Route::By {
            interface: 2,
            router: router.map(|text| text.parse().unwrap()),
        };
        // `struct rta_cacheinfo`, in which only the error counts.
        let info = |code: i32| [[0; 12].as_slice(), &code.to_ne_bytes(), &[0; 16]].concat();
        for (answer, expected) in [
            (Ok(attributes(&[(4, &two)])), by(None)),
            (
                Ok(attributes(&[(4, &two), (5, &router)])),
                by(Some("10.9.0.253")),
            ),
            (Ok(attributes(&[(4, &two), (18, &router)])), Route::Unknown),
            (Ok(attributes(&[(4, &lo)])), Route::Unknown),
            (Ok(attributes(&[])), Route::Unknown),
            (Ok(attributes(&[(4, &two), (12, &info(0))])), by(None)),
            (Ok(attributes(&[(4, &two), (12, &info(-101))])), Route::None),
            (Ok(attributes(&[(4, &two), (12, &info(-13))])), by(None)),
            (Err(io::Error::from_raw_os_error(113)), Route::None),
            (Err(io::Error::from_raw_os_error(1)), Route::Unknown),
        ] {
            let shown = format!("{answer:?}");
            assert_eq!(answered(answer), expected, "{shown}");
        }
    }

    #[test]
    fn a_way_is_by_the_network_that_has_the_next_hop() {
        let link = |network: &str| Link {
            interface: "edge".to_owned(),
            network: network.parse().unwrap(),
        };
        let links = |all: &[&str]| {
            let all = all.iter().map(|network| link(network)).collect();
            Links(BTreeMap::from([(2, all)]))
        };
        let by = |links: &Links, to: &str, router: Option<&str>| {
            let router = router.map(|text| text.parse().unwrap());
            let way = links.way(2, to.parse().unwrap(), router)?;
            assert_eq!(way.router, router);
            Some(way.link.network.to_string())
        };
        let some = |text: &str| Some(text.to_owned());
        let two = links(&["10.0.0.0/8", "10.9.0.0/24", "fd09::/64"]);
        assert_eq!(by(&two, "10.9.0.1", None), some("10.9.0.0/24"));
        assert_eq!(by(&two, "192.0.2.1", Some("10.1.0.1")), some("10.0.0.0/8"));
        assert_eq!(by(&two, "192.0.2.1", None), None);
        assert_eq!(by(&two, "fd07::1", Some("fe80::1")), some("fd09::/64"));
        let more = links(&["fd09::/64", "2001:db8::/64"]);
        assert_eq!(by(&more, "fd07::1", Some("fe80::1")), None);
        assert_eq!(by(&more, "fd07::1", Some("fd09::fd")), some("fd09::/64"));
        assert_eq!(two.way(3, "10.9.0.1".parse().unwrap(), None), None);
    }

    #[test]
    fn an_address_has_the_network_of_the_other_end() {
        let read = |prefix: u8, all: &[(u16, &[u8])]| {
            let subject = [&[2, prefix, 0, 0], 7_u32.to_ne_bytes().as_slice()].concat();
            let found = interface_address(Item {
                subject: &subject,
                attributes: &attributes(all),
            })?;
            assert_eq!(found.interface, 7);
            Some((found.address.to_string(), found.network.to_string()))
        };
        let (own, other) = ([10, 9, 0, 254], [10, 9, 1, 1]);
        let some = |address: &str, network: &str| Some((address.to_owned(), network.to_owned()));
        assert_eq!(
            read(24, &[(1, &own), (2, &own)]),
            some("10.9.0.254", "10.9.0.0/24")
        );
        assert_eq!(
            read(32, &[(1, &other), (2, &own)]),
            some("10.9.0.254", "10.9.1.1/32")
        );
        assert_eq!(read(24, &[(1, &own)]), some("10.9.0.254", "10.9.0.0/24"));
        assert_eq!(read(24, &[]), None);
        assert_eq!(read(200, &[(1, &own)]), None);
    }
}
