//! Real connections through a real gateway: the backend of each, and their
//! order.

use std::collections::BTreeMap;

use serde_json::json;

use crate::lab::{Lab, Namespace, VARIANTS};

fn counted(answers: &[String]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for answer in answers {
        *counts.entry(answer.as_str()).or_insert(0) += 1;
    }
    counts
}

fn serve_all(servers: &mut Namespace, kind: &str) {
    let ipv4 = (1..=8).map(|number| format!("10.9.0.{number}:5308"));
    let ipv6 = (1..=8).map(|number| format!("[fd09::{number}]:5308"));
    let endpoints: Vec<String> = ipv4.chain(ipv6).collect();
    servers.serve(
        kind,
        &endpoints.iter().map(String::as_str).collect::<Vec<_>>(),
    );
}

/// Five standard deviations: a fair choice fails this once in a million runs.
fn assert_about(count: usize, of: usize, share: f64) {
    let mean = of as f64 * share;
    let limit = 5.0 * (of as f64 * share * (1.0 - share)).sqrt();
    assert!(
        (count as f64 - mean).abs() <= limit,
        "{count} of {of} is not {share}"
    );
}

#[test]
fn in_turn_each_server_gets_exactly_its_turns_in_listed_order() {
    for variant in VARIANTS {
        let mut lab = Lab::new();
        serve_all(&mut lab.servers, "tcp");
        lab.gateway.apply(&json!({
            "name": "HUBS", "variant": variant, "destination_port": 5308,
            "backends": "10.9.0.1:5308,10.9.0.2:5308,10.9.0.3:5308,10.9.0.4:5308,[fd09::1]:5308,[fd09::2]:5308",
        }));
        let answers = lab.client.connect("tcp", "10.8.0.1:5308", 400);
        let expected: Vec<String> = (0..400).map(|n| format!("10.9.0.{}", n % 4 + 1)).collect();
        assert_eq!(answers, expected, "{variant}");
        let answers = lab.client.connect("tcp", "[fd08::1]:5308", 40);
        let expected: Vec<String> = (0..40).map(|n| format!("fd09::{}", n % 2 + 1)).collect();
        assert_eq!(answers, expected, "{variant}");
    }
}

#[test]
fn weights_in_turn_are_exact_over_every_round() {
    for variant in VARIANTS {
        let mut lab = Lab::new();
        serve_all(&mut lab.servers, "tcp");
        lab.gateway.apply(&json!({
            "name": "HUBS", "variant": variant, "destination_port": 80,
            "backends": "10.9.0.1:5308 weight=50,10.9.0.2:5308 weight=10,10.9.0.3:5308 weight=10,10.9.0.4 weight=0",
        }));
        let answers = lab.client.connect("tcp", "10.8.0.1:80", 280);
        for round in answers.chunks(7) {
            let counts = counted(round);
            assert_eq!(
                (counts["10.9.0.1"], counts["10.9.0.2"], counts["10.9.0.3"]),
                (5, 1, 1),
                "{variant}"
            );
        }
    }
}

/// Forty backends: too many for one chain to be the shortest way.
#[test]
fn in_a_tree_turns_are_exact_and_in_listed_order_too() {
    for variant in VARIANTS {
        let mut lab = Lab::new();
        let servers: Vec<String> = (0..40)
            .map(|n| format!("10.9.0.{}:{}", n % 8 + 1, 1000 + n / 8))
            .collect();
        lab.servers.serve(
            "tcp",
            &servers.iter().map(String::as_str).collect::<Vec<_>>(),
        );
        for count in [40, 37] {
            let servers = &servers[..count];
            lab.gateway.apply(&json!({"name": "HUBS", "variant": variant, "destination_port": 5308, "backends": servers}));
            assert!(lab.gateway.dump(variant).contains(":HUBS/"), "a tree");
            let answers = lab.client.connect("tcp", "10.8.0.1:5308", 3 * count);
            let expected: Vec<&str> = (0..3 * count)
                .map(|n| servers[n % count].split(':').next().unwrap())
                .collect();
            assert_eq!(answers, expected, "{variant}");
            lab.gateway
                .apply(&json!({"name": "HUBS", "variant": variant, "state": "absent"}));
        }
    }
}

#[test]
fn by_chance_each_server_gets_about_its_share() {
    for variant in VARIANTS {
        let mut lab = Lab::new();
        serve_all(&mut lab.servers, "tcp");
        lab.gateway.apply(&json!({
            "name": "HUBS", "variant": variant, "mode": "random", "destination_port": 5308,
            "backends": "10.9.0.1 weight=30,10.9.0.2 weight=30,10.9.0.3 weight=30,10.9.0.4 weight=10",
        }));
        let answers = lab.client.connect("tcp", "10.8.0.1:5308", 2000);
        let counts = counted(&answers);
        for (server, share) in [
            ("10.9.0.1", 0.3),
            ("10.9.0.2", 0.3),
            ("10.9.0.3", 0.3),
            ("10.9.0.4", 0.1),
        ] {
            assert_about(counts[server], 2000, share);
        }
        assert_eq!(counts.values().sum::<usize>(), 2000);
    }
}

#[test]
fn udp_is_balanced_as_tcp_is() {
    for variant in VARIANTS {
        let mut lab = Lab::new();
        serve_all(&mut lab.servers, "udp");
        lab.gateway.apply(&json!({
            "name": "DNS", "variant": variant, "protocol": "udp", "destination_port": "53", "destination": "local",
            "backends": "10.9.0.1:5308,10.9.0.2:5308,[fd09::1]:5308,[fd09::2]:5308",
        }));
        assert_eq!(
            lab.client.connect("udp", "10.8.0.1:53", 4),
            ["10.9.0.1", "10.9.0.2", "10.9.0.1", "10.9.0.2"]
        );
        assert_eq!(
            lab.client.connect("udp", "[fd08::1]:53", 4),
            ["fd09::1", "fd09::2", "fd09::1", "fd09::2"]
        );
    }
}

#[test]
fn sctp_is_balanced_with_ports_and_checksums_put_right() {
    for variant in VARIANTS {
        let mut lab = Lab::new();
        serve_all(&mut lab.servers, "sctp");
        let request = json!({
            "name": "CORE", "variant": variant, "protocol": "sctp", "destination_port": "2905,2910:2912",
            "backends": "10.9.0.1:5308 weight=2,10.9.0.2:5308,[fd09::1]:5308,[fd09::2]:5308",
        });
        lab.gateway.apply(&request);
        let six = lab.client.connect("sctp", "10.8.0.1:2911", 6);
        let counts = counted(&six);
        assert_eq!((counts["10.9.0.1"], counts["10.9.0.2"]), (4, 2), "{six:?}");
        assert_eq!(
            lab.client.connect("sctp", "[fd08::1]:2905", 4),
            ["fd09::1", "fd09::2", "fd09::1", "fd09::2"]
        );
        let again = lab.gateway.apply(&request);
        assert_eq!(again["changed"], json!(false));
    }
}

/// Four DCCP requests, by RFC 4340, 5.1 and 9.1, from a port each.
const DCCP_REQUESTS: &str = r#"
import socket, struct
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, 33)
addresses = socket.inet_aton("10.8.0.2") + socket.inet_aton("10.8.0.1")
for port in range(4000, 4004):
    request = lambda checksum: struct.pack("!HHBBHBBHII", port, 5308, 5, 0, checksum, 1, 0, 0, 1, 1)
    words = addresses + struct.pack("!HH", 33, 20) + request(0)
    total = sum(struct.unpack(f"!{len(words) // 2}H", words))
    total = (total & 0xFFFF) + (total >> 16)
    raw.sendto(request(~((total & 0xFFFF) + (total >> 16)) & 0xFFFF), ("10.8.0.1", 0))
"#;

/// The kernel itself tells here if it tracks a protocol (Linux 6.18 no longer
/// tracks DCCP): only the first packet of a connection comes through the nat
/// table.
#[test]
fn an_untracked_protocol_is_warned_of() {
    for variant in VARIANTS {
        let lab = Lab::new();
        let request = |protocol: &str| {
            json!({
                "name": "W", "variant": variant, "protocol": protocol, "destination_port": 5308,
                "backends": "10.9.0.1,10.9.0.2",
            })
        };
        for protocol in ["tcp", "udp", "sctp"] {
            let result = lab.gateway.apply(&request(protocol));
            assert_eq!(result["warnings"], json!([]), "{result}");
        }
        let warnings = lab.gateway.apply(&request("dccp"))["warnings"].to_string();
        lab.client.run(&["python3", "-c", DCCP_REQUESTS]);
        let dump = lab
            .gateway
            .run(&[&format!("iptables-{variant}-save"), "-c", "-t", "nat"]);
        let jump = dump.lines().find(|line| line.ends_with("-j W")).unwrap();
        let is_tracked = match jump.split([':', '[']).nth(1) {
            Some("4") => true,
            Some("1") => false,
            other => panic!("{other:?} in {dump}"),
        };
        let is_told = warnings.contains("does not track dccp connections");
        assert_eq!(is_told, !is_tracked, "{warnings}\n{dump}");
    }
}

#[test]
fn matches_limit_the_balanced_traffic() {
    for variant in VARIANTS {
        let mut lab = Lab::new();
        lab.servers.serve(
            "tcp",
            &[
                "10.9.0.1:80",
                "10.9.0.1:81",
                "10.9.0.1:90",
                "10.9.0.2:80",
                "10.9.0.2:81",
                "10.9.0.2:90",
            ],
        );
        lab.client
            .run(&["ip", "address", "add", "10.8.0.3/24", "dev", "wan"]);
        let request = |attributes: serde_json::Value| {
            let mut request = json!({"name": "W", "variant": variant, "destination_port": "80:81", "backends": "10.9.0.2"});
            request
                .as_object_mut()
                .unwrap()
                .extend(attributes.as_object().unwrap().clone());
            request
        };
        let answer = |target: &str| lab.client.connect("tcp", target, 1).remove(0);
        lab.gateway
            .apply(&request(json!({"destination": ["10.9.0.1", "10.8.0.1"]})));
        assert_eq!(
            (
                answer("10.9.0.1:80"),
                answer("10.9.0.1:81"),
                answer("10.9.0.1:90")
            ),
            ("10.9.0.2".into(), "10.9.0.2".into(), "10.9.0.1".into())
        );
        lab.gateway.apply(&request(json!({"destination": "local"})));
        assert_eq!(
            (answer("10.9.0.1:80"), answer("10.8.0.1:80")),
            ("10.9.0.1".into(), "10.9.0.2".into())
        );
        lab.gateway
            .apply(&request(json!({"source": "10.8.0.3/32"})));
        assert_eq!(answer("10.9.0.1:80"), "10.9.0.1");
        lab.gateway
            .apply(&request(json!({"source": "10.8.0.0/24"})));
        assert_eq!(answer("10.9.0.1:80"), "10.9.0.2");
        lab.gateway.apply(&request(json!({"in_interface": "back"})));
        assert_eq!(answer("10.9.0.1:80"), "10.9.0.1");
        lab.gateway
            .apply(&request(json!({"in_interface": "fron+"})));
        assert_eq!(answer("10.9.0.1:80"), "10.9.0.2");
        lab.gateway
            .apply(&json!({"name": "W", "variant": variant, "state": "absent"}));
        assert_eq!(answer("10.9.0.1:80"), "10.9.0.1");
    }
}

/// Jump rules share the turns of the chain: shares are right whatever way a
/// connection came in.
#[test]
fn all_ways_into_the_chain_share_its_turns() {
    for variant in VARIANTS {
        let mut lab = Lab::new();
        serve_all(&mut lab.servers, "tcp");
        let odd: Vec<String> = (0..15)
            .map(|n| format!("{}:{}", 1000 + 10 * n, 1001 + 10 * n))
            .collect();
        lab.gateway.apply(&json!({
            "name": "W", "variant": variant, "destination_port": odd,
            "backends": "10.9.0.1:5308,10.9.0.2:5308",
        }));
        let answers: Vec<String> = [1000, 1141, 1071, 1140]
            .iter()
            .flat_map(|port| lab.client.connect("tcp", &format!("10.8.0.1:{port}"), 1))
            .collect();
        assert_eq!(answers, ["10.9.0.1", "10.9.0.2", "10.9.0.1", "10.9.0.2"]);
    }
}
