use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;

use super::*;
use crate::netfilter::PortRange;
use crate::netfilter::rule::{Connection, Matches, Target};

/// The first packet of a connection.
#[derive(Clone, Debug)]
struct Packet {
    protocol: Protocol,
    port: u16,
    source: IpAddr,
    destination: IpAddr,
    interface: &'static str,
}

fn fits_interface(name: &str, interface: &str) -> bool {
    match name.strip_suffix('+') {
        Some(stem) => interface.starts_with(stem),
        None => name == interface,
    }
}

impl Packet {
    fn fits(&self, rule: &Rule) -> bool {
        let matches = rule.matches.as_deref().cloned().unwrap_or_default();
        let within = |network: Option<IpNet>, address: &IpAddr| {
            network.is_none_or(|network| network.contains(address))
        };
        let Connection {
            protocol,
            original_source,
            original_destination,
            original_port,
            ..
        } = matches.connection;
        let is_port = |range: PortRange| (range.first..=range.last).contains(&self.port);
        let is_protocol = |protocol: Protocol| protocol == self.protocol;
        rule.protocol.is_none_or(is_protocol)
            && protocol.is_none_or(is_protocol)
            && matches.destination_ports.include(self.port)
            && original_port.is_none_or(is_port)
            && within(matches.source, &self.source)
            && within(original_source, &self.source)
            && within(matches.destination, &self.destination)
            && within(original_destination, &self.destination)
            && matches
                .in_interface
                .is_none_or(|name| fits_interface(&name, self.interface))
    }

    /// The same for a claim, by its own words.
    fn is_of(&self, claim: &Claim) -> bool {
        let within = |network: Option<IpNet>, address: &IpAddr| {
            network.is_none_or(|network| network.contains(address))
        };
        let interface = claim.rest.in_interface.as_deref();
        claim.protocol == self.protocol
            && claim.ports.include(self.port)
            && within(claim.source, &self.source)
            && within(claim.destination, &self.destination)
            && interface.is_none_or(|name| fits_interface(name, self.interface))
    }
}

/// The verdict of chains for a packet, and the rules that it visited.
#[derive(Default)]
struct Walk {
    visited: usize,
    chains: usize,
    taken_by: Option<String>,
}

impl Walk {
    fn through(chains: &Chains, packet: &Packet) -> Self {
        let mut walk = Self::default();
        walk.chain(chains, "S", packet, 1);
        walk
    }

    /// Returns true if the packet got an answer.
    fn chain(&mut self, chains: &Chains, name: &str, packet: &Packet, depth: usize) -> bool {
        self.chains = self.chains.max(depth);
        for rule in &chains[name] {
            self.visited += 1;
            if !packet.fits(rule) {
                continue;
            }
            let (next, is_goto) = match &rule.target {
                Target::Goto(next) => (next, true),
                Target::Jump(next) if next == "RETURN" => return false,
                Target::Jump(next) => (next, false),
                other => panic!("{other:?}"),
            };
            if !chains.contains_key(next) {
                // A balancer may let it pass; then it is at the end of a goto.
                if next.starts_with("off") {
                    assert!(is_goto);
                    return false;
                }
                self.taken_by = Some(next.clone());
                return true;
            }
            if self.chain(chains, next, packet, depth + 1) {
                return true;
            }
            if is_goto {
                return false;
            }
        }
        false
    }
}

fn claim(at: usize, ports: &[(u16, u16)], destination: Option<&str>) -> Claim {
    let range = |(first, last): &(u16, u16)| PortRange {
        first: *first,
        last: *last,
    };
    Claim {
        protocol: Protocol::Tcp,
        ports: Ports::new(ports.iter().map(range).collect()),
        source: None,
        destination: destination.map(|text| text.parse().unwrap()),
        rest: Matches::default(),
        target: Target::Goto(format!("S/{at}")),
        falls_through: false,
    }
}

fn chains_of(claims: &[Claim], style: Style, family: Family) -> Chains {
    let tree = Tree {
        set: "S",
        main: "S",
        letter: 'p',
        family,
        style,
    };
    let (chains, protocols) = tree.chains(claims);
    assert!(chains.keys().all(|name| name == "S" || name.len() <= 11));
    // A chain of one protocol is reached by that protocol alone.
    for (name, rules) in &chains {
        let of_chain = protocols.get(name);
        assert!(rules.iter().all(|rule| {
            let protocol = rule.protocol;
            protocol.is_none() || of_chain.is_none() || protocol == of_chain.copied()
        }));
    }
    chains
}

fn packet(port: u16, destination: &str) -> Packet {
    Packet {
        protocol: Protocol::Tcp,
        port,
        source: "198.51.100.1".parse().unwrap(),
        destination: destination.parse().unwrap(),
        interface: "eth0",
    }
}

/// The first claim by plain reading.
fn first(claims: &[Claim], packet: &Packet) -> Option<String> {
    let claim = claims.iter().find(|claim| packet.is_of(claim))?;
    match &claim.target {
        Target::Goto(name) if !claim.falls_through => Some(name.clone()),
        _ => None,
    }
}

fn networks() -> impl Strategy<Value = Option<IpNet>> {
    let address = prop_oneof![
        Just([10, 0, 0, 1]),
        Just([10, 0, 0, 2]),
        Just([10, 0, 1, 0]),
        any::<[u8; 4]>().prop_map(|bytes| [10, 0, bytes[2] & 3, bytes[3]]),
    ];
    let length = prop::sample::select(vec![8_u8, 16, 23, 24, 25, 31, 32]);
    let network = (address, length)
        .prop_map(|(address, length)| IpNet::new(IpAddr::from(address), length).unwrap().trunc());
    prop::option::of(network)
}

fn port_ranges() -> impl Strategy<Value = Vec<PortRange>> {
    let port = prop_oneof![4 => 0..64_u16, 2 => 0..2000_u16, 1 => any::<u16>()];
    let range = (
        port,
        prop_oneof![3 => Just(0_u16), 2 => 0..40_u16, 1 => any::<u16>()],
    )
        .prop_map(|(first, more)| PortRange {
            first,
            last: first.saturating_add(more),
        });
    prop_oneof![
        9 => prop::collection::vec(range, 1..4),
        1 => Just(vec![PortRange::ALL]),
    ]
}

fn claims(off: bool) -> impl Strategy<Value = Vec<Claim>> {
    let one = (
        prop::sample::select(vec![Protocol::Tcp, Protocol::Tcp, Protocol::Udp]),
        port_ranges(),
        networks(),
        networks(),
        prop::option::of(prop::sample::select(vec!["eth0", "eth1", "eth+", "wan0"])),
        any::<bool>(),
    );
    prop::collection::vec(one, 1..60).prop_map(move |all| {
        let claim = |(at, (protocol, ports, source, destination, interface, passes))| {
            let falls_through = off && passes;
            let target = match falls_through {
                true if at % 2 == 0 => Target::Jump("RETURN".to_owned()),
                true => Target::Goto(format!("off{at}")),
                false => Target::Goto(format!("S/{at}")),
            };
            let in_interface: Option<&str> = interface;
            Claim {
                protocol,
                ports: Ports::new(ports),
                source,
                destination,
                rest: Matches {
                    in_interface: in_interface.map(str::to_owned),
                    ..Matches::default()
                },
                target,
                falls_through,
            }
        };
        all.into_iter().enumerate().map(claim).collect()
    })
}

fn packets(claims: &[Claim]) -> Vec<Packet> {
    let mut found = Vec::new();
    let ports = claims.iter().flat_map(|claim| claim.ports.all_ranges());
    let ports = ports.flat_map(|range| {
        [
            range.first.saturating_sub(1),
            range.first,
            range.last,
            range.last.saturating_add(1),
        ]
    });
    let ports: std::collections::BTreeSet<u16> = ports.collect();
    let edge =
        |network: Option<IpNet>| network.map(|network| [network.network(), network.broadcast()]);
    let mut addresses: std::collections::BTreeSet<IpAddr> = claims
        .iter()
        .flat_map(|claim| [edge(claim.destination), edge(claim.source)])
        .flatten()
        .flatten()
        .collect();
    addresses.insert("192.0.2.1".parse().unwrap());
    let addresses: Vec<IpAddr> = addresses.into_iter().collect();
    let mut turn = 0;
    for port in ports {
        for _ in 0..6 {
            turn += 7;
            found.push(Packet {
                protocol: [Protocol::Tcp, Protocol::Udp, Protocol::Tcp, Protocol::Sctp][turn % 4],
                port,
                source: addresses[turn * 31 % addresses.len()],
                destination: addresses[turn * 17 % addresses.len()],
                interface: ["eth0", "eth1", "wan0", "lan0"][turn / 7 % 4],
            });
        }
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_first_claim_gets_the_connection(claims in claims(false)) {
        let by_packet = chains_of(&claims, Style::Packet, Family::Ipv4);
        let by_connection = chains_of(&claims, Style::Connection, Family::Ipv4);
        for packet in packets(&claims) {
            let wanted = first(&claims, &packet);
            prop_assert_eq!(&Walk::through(&by_packet, &packet).taken_by, &wanted, "{:?}\n{:#?}", packet, by_packet);
            prop_assert_eq!(&Walk::through(&by_connection, &packet).taken_by, &wanted, "{:?}", packet);
        }
    }

    #[test]
    fn a_claim_that_lets_pass_is_the_last_one(claims in claims(true)) {
        let chains = chains_of(&claims, Style::Packet, Family::Ipv4);
        for packet in packets(&claims) {
            prop_assert_eq!(Walk::through(&chains, &packet).taken_by, first(&claims, &packet), "{:?}\n{:#?}", packet, chains);
        }
    }
}

/// Ports as people choose them: dense, spread, doubled, in pairs and in ranges.
fn gateways(count: u32) -> Vec<(&'static str, Vec<Claim>)> {
    let port = |number: u32| u16::try_from(number % 65_536).unwrap();
    let each = |ports: &dyn Fn(u32) -> Vec<(u16, u16)>| {
        let claim = |at: u32| claim(at as usize, &ports(at), None);
        (0..count).map(claim).collect::<Vec<_>>()
    };
    let spread = |at: u32| port(at.wrapping_mul(40_503) % 64_500 + 1);
    let vip = |at: u32| format!("10.{}.{}.{}/32", at * 7 % 3, at / 256, at % 256);
    vec![
        (
            "dense",
            each(&|at| vec![(port(10_000 + at), port(10_000 + at))]),
        ),
        ("spread", each(&|at| vec![(spread(at), spread(at))])),
        (
            "pairs",
            each(&|at| {
                vec![
                    (port(1000 + at), port(1000 + at)),
                    (port(30_000 + at), port(30_000 + at)),
                ]
            }),
        ),
        (
            "ranges",
            each(&|at| vec![(port(100 + 30 * at), port(109 + 30 * at))]),
        ),
        (
            "one port",
            (0..count)
                .map(|at| claim(at as usize, &[(443, 443)], Some(&vip(at))))
                .collect(),
        ),
        (
            "a wide range behind all",
            each(&|at| match at {
                last if last == count - 1 => vec![(1024, 65_535)],
                _ => vec![(spread(at), spread(at))],
            }),
        ),
    ]
}

#[test]
fn a_connection_visits_about_as_many_rules_as_the_logarithm() {
    for count in [500, 2000] {
        for (shape, claims) in gateways(count) {
            let chains = chains_of(&claims, Style::Packet, Family::Ipv4);
            let log = f64::from(count).log2();
            let (mut sum, mut most) = (0, 0);
            for claim in &claims {
                let destination = claim
                    .destination
                    .map_or("192.0.2.1".parse().unwrap(), |network| network.addr());
                let walk = Walk::through(
                    &chains,
                    &packet(claim.ports.all_ranges()[0].first, &destination.to_string()),
                );
                assert!(walk.taken_by.is_some() && walk.chains <= 1 + DEPTH);
                sum += walk.visited;
                most = most.max(walk.visited);
            }
            let mean = f64::from(u32::try_from(sum).unwrap()) / f64::from(count);
            let strangers =
                (0..6554_u16).map(|at| Walk::through(&chains, &packet(at * 10, "203.0.113.9")));
            let strangers = strangers.filter(|walk| walk.taken_by.is_none());
            let lost = strangers.map(|walk| walk.visited).max().unwrap_or(0);
            assert!(mean <= 1.5 * log, "{shape}: {mean}");
            assert!(
                most.max(lost) <= 2 * (count.ilog2() as usize + 1),
                "{shape}: {most}, {lost}"
            );
        }
    }
}

/// The changes from one set of chains to another: chains and rules that come, go
/// or are replaced.
fn distance(before: &Chains, after: &Chains) -> usize {
    let names: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let none = Vec::new();
    let in_chain = |name: &&String| {
        let (old, new) = (before.get(*name), after.get(*name));
        let moved = usize::from(old.is_some() != new.is_some());
        let (old, new) = (old.unwrap_or(&none), new.unwrap_or(&none));
        let kept = old.iter().filter(|rule| new.contains(rule)).count();
        moved + old.len().max(new.len()) - kept
    };
    names.iter().map(in_chain).sum()
}

#[test]
fn one_of_two_thousand_changes_few_rules() {
    for (shape, claims) in gateways(2000) {
        let whole = chains_of(&claims, Style::Packet, Family::Ipv4);
        let mut most = 0;
        for at in (0..claims.len()).step_by(37).chain([claims.len() - 1]) {
            let mut fewer = claims.clone();
            fewer.remove(at);
            most = most.max(distance(
                &whole,
                &chains_of(&fewer, Style::Packet, Family::Ipv4),
            ));
        }
        assert!(most <= 64, "{shape}: {most}");
    }
}

#[test]
fn a_few_claims_are_a_list() {
    let claims = [
        claim(0, &[(80, 80), (443, 443)], None),
        claim(1, &[(1000, 2000)], Some("10.0.0.0/8")),
    ];
    let texts: Vec<String> = chains_of(&claims, Style::Packet, Family::Ipv4)["S"]
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        texts,
        [
            " -p tcp -m multiport --dports 80,443 -g S/0",
            " -d 10.0.0.0/8 -p tcp -m tcp --dport 1000:2000 -g S/1",
        ]
    );
}

/// Nested networks on nested ports: the worst that a request can ask for.
#[test]
fn no_way_is_longer_than_nftables_allows() {
    let claims: Vec<Claim> = (0..16_u32)
        .flat_map(|bits| (0..60).map(move |host| (bits, host)))
        .map(|(bits, host)| {
            let at = (bits * 60 + host) as usize;
            let network = IpNet::new(
                IpAddr::from([10, 9, 8, u8::try_from(host).unwrap()]),
                u8::try_from(8 + host % 25).unwrap(),
            );
            let port = 1_u16 << bits;
            claim(
                at,
                &[(port, port + 1)],
                Some(&network.unwrap().trunc().to_string()),
            )
        })
        .collect();
    let chains = chains_of(&claims, Style::Packet, Family::Ipv4);
    for claim in &claims {
        let network = claim.destination.unwrap();
        let packet = packet(
            claim.ports.ranges()[0].first,
            &network.network().to_string(),
        );
        let walk = Walk::through(&chains, &packet);
        assert_eq!(walk.taken_by, first(&claims, &packet));
        assert!(walk.chains <= 1 + DEPTH);
    }
}
