//! `mode: hash`: the shares, and the clients that move when the pool changes. The
//! rules are followed by an interpreter of their programs; `tests/root/hash.rs` holds it against the
//! kernel.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use iptables_balance::converge::outcome::RunMode;
use iptables_balance::netfilter::bpf::{HashKey, HashMatch, Hasher};
use iptables_balance::netfilter::{Family, Table};
use iptables_balance::plan::Plan;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::bpf::{Chains, Program, packet};
use crate::dice::Dice;
use crate::fake::Fake;
use crate::model::Model;
use crate::property::{request, run};

/// The chains of a request, as the dump of a host would have them.
fn chains(value: &Value, family: Family) -> Chains {
    let plan = Plan::new(&request(value));
    let mut dump = String::new();
    for (chain, rules) in &plan.tables[&(family, Table::Nat)].chains {
        let lines = rules.iter().map(|rule| format!("-A {chain}{rule}\n"));
        dump.extend(lines);
    }
    Chains::read(&dump, "W")
}

fn balancer(backends: &Value) -> Value {
    json!({"name": "W", "mode": "hash", "destination_port": 80, "backends": backends})
}

fn equal(count: usize) -> Vec<String> {
    let server = |number: usize| format!("10.9.{}.{}", number >> 8, number & 255);
    (1..=count).map(server).collect()
}

fn equal_ipv6(count: usize) -> Vec<String> {
    (1..=count)
        .map(|number| format!("fd09::{number:x}"))
        .collect()
}

/// The backend of each client.
fn decisions(value: &Value, clients: &[IpAddr]) -> Vec<String> {
    let family = Family::of(clients[0]);
    let chains = chains(value, family);
    let decide = |client: &IpAddr| chains.decide("W", &packet(*client, 4000)).to_owned();
    clients.iter().map(decide).collect()
}

fn ipv4(number: u32) -> IpAddr {
    Ipv4Addr::from(number).into()
}

fn random(count: usize) -> Vec<IpAddr> {
    let mut dice = Dice(42);
    let mut word = || u32::try_from(dice.throw(1 << 16) << 16 | dice.throw(1 << 16)).unwrap();
    (0..count).map(|_| ipv4(word())).collect()
}

/// Subscribers of a provider, a /56 each, with addresses of SLAAC within their first networks.
fn slaac(count: u64) -> Vec<IpAddr> {
    let mut dice = Dice(7);
    let mut address = |number: u64| {
        let network = 0x2001_0db8_0000_0000_u64 + (number << 8) + (dice.throw(2) as u64);
        let interface = (dice.throw(1 << 24) as u64) << 40 | 0xff_fe00_0000 | number;
        IpAddr::from(Ipv6Addr::from(
            u128::from(network) << 64 | u128::from(interface),
        ))
    };
    (0..count).map(&mut address).collect()
}

/// The limit that chi-square exceeds once in a thousand times, by Wilson and
/// Hilferty.
fn chi_square_limit(degrees: usize) -> f64 {
    let degrees = degrees as f64;
    let third = 2.0 / (9.0 * degrees);
    degrees * (1.0 - third + 3.0902 * third.sqrt()).powi(3)
}

#[test]
fn shares_of_clients_of_any_kind_fit_by_chi_square() {
    let consecutive = |first: u32, count: u32, step: u32| -> Vec<IpAddr> {
        (0..count)
            .map(|number| ipv4(first + number * step))
            .collect()
    };
    let populations = [
        ("random", random(100_000)),
        ("consecutive", consecutive(0x0a00_0000, 65_536, 1)),
        ("one /24", consecutive(0xc0a8_0100, 256, 1)),
        ("steps of 256", consecutive(0x0a00_0001, 65_536, 256)),
        ("slaac", slaac(65_536)),
    ];
    let pools = [
        vec![1; 4],
        vec![30, 30, 30, 10],
        vec![1; 10],
        vec![1; 100],
        vec![5, 3, 1],
    ];
    for weights in &pools {
        for (kind, clients) in &populations {
            let servers = match clients[0] {
                IpAddr::V4(_) => equal(weights.len()),
                IpAddr::V6(_) => equal_ipv6(weights.len()),
            };
            let pairs = servers.iter().zip(weights);
            let backends: Vec<String> = pairs
                .map(|(server, weight)| format!("{server} weight={weight}"))
                .collect();
            let mut counts: HashMap<String, u32> = HashMap::new();
            for decision in decisions(&balancer(&json!(backends)), clients) {
                *counts.entry(decision).or_default() += 1;
            }
            let sum: u32 = weights.iter().sum();
            let term = |(server, weight): (&String, &u32)| {
                let expected = clients.len() as f64 * f64::from(*weight) / f64::from(sum);
                let found = f64::from(counts.get(server).copied().unwrap_or(0));
                (found - expected).powi(2) / expected
            };
            let chi: f64 = servers.iter().zip(weights).map(term).sum();
            let limit = chi_square_limit(weights.len() - 1);
            assert!(
                chi < limit,
                "{kind}, {weights:?}: {chi} is beyond {limit}; {counts:?}"
            );
        }
    }
}

/// The clients that move when each backend in turn gets weight 0, in units of the
/// unavoidable part, on average.
fn movement(servers: &[String], layout: &str, clients: &[IpAddr], leaving: &[usize]) -> f64 {
    let with = |gone: Option<usize>| {
        let backends: Vec<String> = servers
            .iter()
            .enumerate()
            .map(|(at, server)| format!("{server} weight={}", u8::from(Some(at) != gone)))
            .collect();
        let mut value = balancer(&json!(backends));
        value["layout"] = json!(layout);
        decisions(&value, clients)
    };
    let before = with(None);
    let moved: usize = leaving
        .iter()
        .map(|gone| {
            let after = with(Some(*gone));
            let pairs = before.iter().zip(&after);
            pairs.filter(|(before, after)| before != after).count()
        })
        .sum();
    moved as f64 / leaving.len() as f64 / clients.len() as f64 * servers.len() as f64
}

#[test]
fn few_clients_move_when_a_backend_leaves() {
    let all = |count: usize| (0..count).collect::<Vec<_>>();
    let clients = random(10_000);
    for (count, leaving, limit) in [
        (2, all(2), 1.0 + 0.05),
        (4, all(4), 1.6),
        (9, all(9), 2.0),
        (10, all(10), 2.0),
        // 1 + depth/2, with the depth of log2(N) decisions.
        (64, (0..64).step_by(8).collect(), 4.0),
        (1024, (0..1024).step_by(100).collect(), 6.0),
    ] {
        for layout in ["flat", "auto"] {
            if layout == "flat" && count > 64 {
                continue;
            }
            let moved = movement(&equal(count), layout, &clients, &leaving);
            println!("{count} {layout}: {moved:.2}");
            assert!(
                (0.9..limit).contains(&moved),
                "{count} {layout}: {moved} times"
            );
        }
    }
}

/// The limits hold for whatever addresses the backends have.
#[test]
fn few_clients_move_whatever_the_backends_are() {
    let clients = random(3_000);
    for network in 0..40 {
        let servers = |count| -> Vec<String> {
            (1..=count)
                .map(|host| format!("10.{network}.0.{host}:80"))
                .collect()
        };
        for (count, limit) in [(4, 1.6), (10, 2.0)] {
            let leaving: Vec<usize> = (0..count).collect();
            let moved = movement(&servers(count), "auto", &clients, &leaving);
            assert!(moved < limit, "10.{network}.0.0, {count}: {moved}");
        }
    }
}

/// Also where the layout changes from one chain to a tree.
#[test]
fn one_more_backend_moves_few_clients_at_any_number_of_them() {
    let clients = random(4_000);
    let of = |count| decisions(&balancer(&json!(equal(count))), &clients);
    let mut before = of(1);
    for count in 2..=40 {
        let after = of(count);
        let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count();
        let times = moved as f64 * count as f64 / clients.len() as f64;
        let limit = 1.5 + (count as f64).log2();
        assert!(times < limit, "{count}: {times} is beyond {limit}");
        before = after;
    }
}

#[test]
fn a_change_of_weight_moves_few_clients() {
    let clients = random(10_000);
    let with = |weight| {
        let mut backends = equal(9);
        backends.push(format!("10.9.9.9 weight={weight}"));
        decisions(&balancer(&json!(backends)), &clients)
    };
    for (one, other) in [(1, 2), (2, 1), (3, 4), (1, 0), (10, 9)] {
        let (one, other) = (f64::from(one), f64::from(other));
        let least = (one / (9.0 + one) - other / (9.0 + other)).abs();
        let (before, after) = (with(one), with(other));
        let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count();
        let times = moved as f64 / clients.len() as f64 / least;
        assert!(
            (0.7..2.6).contains(&times),
            "{one} to {other}: {times} times"
        );
    }
}

#[test]
fn the_order_of_the_list_and_the_layout_decide_nothing() {
    let clients = random(2_000);
    for count in [3, 7, 8, 9, 30, 100] {
        let servers = equal(count);
        let expected = decisions(&balancer(&json!(servers)), &clients);
        let mut reversed = servers.clone();
        reversed.reverse();
        for layout in ["flat", "tree"] {
            for backends in [&servers, &reversed] {
                let mut value = balancer(&json!(backends));
                value["layout"] = json!(layout);
                assert_eq!(decisions(&value, &clients), expected, "{count} {layout}");
            }
        }
    }
}

#[test]
fn a_backend_that_comes_back_gets_its_clients_back() {
    let clients = random(2_000);
    let mut backends = equal(12);
    let before = decisions(&balancer(&json!(backends)), &clients);
    backends[5] += " weight=0";
    let without = decisions(&balancer(&json!(backends)), &clients);
    assert_ne!(before, without);
    // Weight 0 and absence are the same to everybody.
    backends.remove(5);
    assert_eq!(decisions(&balancer(&json!(backends)), &clients), without);
    backends.insert(0, equal(12)[5].clone());
    assert_eq!(decisions(&balancer(&json!(backends)), &clients), before);
}

#[test]
fn another_seed_is_an_independent_choice() {
    let clients = random(20_000);
    let with = |seed: u32| {
        let mut value = balancer(&json!(equal(4)));
        value["hash_seed"] = json!(seed);
        decisions(&value, &clients)
    };
    let first = with(0);
    for seed in [1, 2, u32::MAX] {
        let other = with(seed);
        let same = first.iter().zip(&other).filter(|(a, b)| a == b).count();
        // A quarter of them, and five standard deviations.
        assert!((4_694..5_306).contains(&same), "{seed}: {same}");
    }
}

#[test]
fn the_bits_beyond_the_prefix_do_not_count() {
    let of = |prefix: Value, clients: &[IpAddr]| {
        let mut value = balancer(&json!([equal(50), equal_ipv6(50)].concat()));
        value["hash_prefix"] = prefix;
        decisions(&value, clients)
    };
    let ipv6 = |network: u64, interface: u64| {
        IpAddr::from(Ipv6Addr::from(
            u128::from(network) << 64 | u128::from(interface),
        ))
    };
    let network = 0x2001_0db8_0001_0002;
    let one = |list: Vec<String>| list.iter().all(|other| *other == list[0]);
    let in_24: Vec<IpAddr> = (0..256).map(|host| ipv4(0x0a01_0200 + host)).collect();
    let in_64: Vec<IpAddr> = (0..256)
        .map(|host| ipv6(network, host << 56 | host))
        .collect();
    let in_56: Vec<IpAddr> = (0..256).map(|net| ipv6(network + net, net)).collect();
    let in_48: Vec<IpAddr> = (0..256)
        .map(|net| ipv6(network & !0xffff | net << 8, 1))
        .collect();
    assert!(one(of(json!({"ipv4": 24}), &in_24)));
    assert!(!one(of(json!({"ipv4": 25}), &in_24)));
    assert!(!one(of(json!({}), &in_24)));
    assert!(one(of(json!({}), &in_64)));
    assert!(!one(of(json!({"ipv6": 128}), &in_64)));
    assert!(!one(of(json!({"ipv6": 65}), &in_64)));
    assert!(!one(of(json!({}), &in_56)));
    assert!(one(of(json!({"ipv6": 48}), &in_48)));
    assert!(one(of(json!({"ipv6": 32}), &in_48)));
    assert!(!one(of(json!({"ipv6": 56}), &in_48)));
}

#[test]
fn a_crowd_behind_one_address_is_spread_by_its_ports() {
    for (servers, address) in [(equal(4), "192.0.2.1"), (equal_ipv6(4), "2001:db8::1")] {
        let address: IpAddr = address.parse().unwrap();
        let mut value = balancer(&json!(servers));
        value["hash_key"] = json!("connection");
        let chains = chains(&value, Family::of(address));
        let mut counts: HashMap<&str, u32> = HashMap::new();
        for port in 1024..=65_535 {
            let backend = chains.decide("W", &packet(address, port));
            *counts.entry(backend).or_default() += 1;
        }
        let expected = 64_512.0 / 4.0;
        let chi: f64 = counts
            .values()
            .map(|count| (f64::from(*count) - expected).powi(2) / expected)
            .sum();
        assert!(chi < chi_square_limit(3), "{chi}: {counts:?}");
    }
}

/// The hash once more, word by word, as the reference has it.
fn hash(words: &[u32], port: Option<u16>, seed: u32) -> u32 {
    let round = |a: u32| {
        let a = a.wrapping_mul(0x9e37_79b1);
        a ^ a >> 15
    };
    let mut a = words[0] ^ seed;
    for word in &words[1..] {
        a = round(a) ^ word;
    }
    if let Some(port) = port {
        a = round(a) ^ u32::from(port);
    }
    a = a.wrapping_mul(0x9e37_79b1);
    a ^= a >> 16;
    a = a.wrapping_mul(0x85eb_ca6b);
    a ^= a >> 13;
    a = a.wrapping_mul(0xc2b2_ae35);
    a ^ a >> 16
}

/// IP options or IPv6 extension headers before the ports.
fn with_header(mut packet: Vec<u8>, family: Family) -> Vec<u8> {
    match family {
        Family::Ipv4 => {
            packet[0] = 0x46;
            packet.splice(20..20, [1, 1, 1, 0]);
        }
        Family::Ipv6 => {
            packet[6] = 60;
            packet.splice(40..40, [6, 0, 1, 4, 0, 0, 0, 0]);
        }
    }
    packet
}

proptest! {
    #[test]
    fn a_program_computes_the_hash(
        source: u128, port: u16, seed: u32, near in 0..3_u32, prefix in 1..=128_u8, is_ipv4: bool, by_port: bool, has_header: bool,
        protocol in prop::sample::select(vec![6, 17, 33, 132, 58]),
    ) {
        let (family, prefix) = match is_ipv4 {
            true => (Family::Ipv4, (prefix - 1) % 32 + 1),
            false => (Family::Ipv6, prefix),
        };
        let masked = source >> (128 - prefix) << (128 - prefix);
        let word = |at: u32| u32::try_from(masked >> (96 - 32 * at) & 0xffff_ffff).unwrap();
        let words: Vec<u32> = (0..u32::from(prefix).div_ceil(32)).map(word).collect();
        let address: IpAddr = match is_ipv4 {
            true => Ipv4Addr::from(u32::try_from(source >> 96).unwrap()).into(),
            false => Ipv6Addr::from(source).into(),
        };
        let mut packet = packet(address, port);
        packet[if is_ipv4 { 9 } else { 6 }] = protocol;
        if has_header {
            packet = with_header(packet, family);
        }
        // The ports after an IPv6 extension header are not looked for, and ICMPv6 has none.
        let seen = if (has_header || protocol == 58) && !is_ipv4 { 0 } else { port };
        let expected = hash(&words, by_port.then_some(seen), seed);
        let key = if by_port { HashKey::Connection } else { HashKey::Source };
        let below = expected.wrapping_add(near).wrapping_sub(1);
        let program = HashMatch { hasher: Hasher { family, key, prefix }, seed, below };
        let found = Program::parse(&program.to_string()).run(&packet);
        prop_assert_eq!(found, u32::from(expected < below));
    }
}

/// The share that the report gives is that of the hash space.
#[test]
fn the_reported_shares_are_those_of_the_weights() {
    for layout in ["flat", "tree"] {
        let backends: Vec<Value> = (1..=60)
            .map(|host| json!({"address": format!("10.9.0.{host}"), "weight": host % 7}))
            .collect();
        let mut value = balancer(&json!(backends));
        value["layout"] = json!(layout);
        let request = request(&value);
        let (_, pool) = request.pools().next().unwrap();
        let shares = pool.arrangement.shares(60);
        let sum: u32 = (1..=60).map(|host| host % 7).sum();
        for (host, share) in (1..=60_u32).zip(shares) {
            let expected = f64::from(host % 7) / f64::from(sum);
            assert!((share.as_f64() - expected).abs() < 1e-9, "{layout} {host}");
        }
    }
}

/// The kernel was seen to hang when it freed tens of thousands of programs at once. A change
/// that makes, keeps or removes so many says it; a run with nothing to do does not.
#[test]
fn a_change_with_more_than_a_thousand_programs_warns() {
    let warned = |host: &Fake, value: &Value, mode: RunMode| {
        let outcome = run(host, value, mode);
        assert_eq!(outcome.failure, None);
        let is_about = |warning: &&String| warning.contains("programs of BPF");
        outcome.warnings.iter().find(is_about).cloned()
    };
    let host = || Fake::new(Model::new(false), Model::new(true));
    // N backends take N - 1 programs, of both families together.
    let mut many = equal(500);
    many.extend(equal_ipv6(503));
    let many = balancer(&json!(many));
    let fewer = balancer(&json!(equal(1001)));
    let absent = json!({"name": "W", "state": "absent"});
    let host = host();
    let warning = warned(&host, &many, RunMode::Check).unwrap();
    assert!(
        warning.starts_with("`mode: hash` has 1001 programs of BPF here; "),
        "{warning}"
    );
    assert!(warning.contains("`mode: random`"), "{warning}");
    assert!(warned(&host, &many, RunMode::Apply).is_some());
    assert_eq!(warned(&host, &many, RunMode::Apply), None);
    assert!(
        warned(&host, &fewer, RunMode::Apply).is_some(),
        "the old ones are freed"
    );
    assert_eq!(warned(&host, &absent, RunMode::Apply), None);
    assert_eq!(warned(&host, &fewer, RunMode::Apply), None);
}
