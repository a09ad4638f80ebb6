//! `mode: hash` on real kernels: each connection goes where an interpreter of the programs in
//! `iptables-save` says it goes.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::{Value, json};

use crate::bpf::{Chains, packet};
use crate::lab::{Lab, Namespace, PROGRAM, VARIANTS, shown};

/// Connects from each `KIND SOURCE PORT TARGET EXTRA` of its input, and prints the answers. `EXTRA` is `options` for a
/// header between IP's and the ports, or the number of bytes to send.
const CLIENT: &str = r#"
import socket, sys
for line in sys.stdin:
    kind, source, port, target, extra = line.split()
    host, to = target.rsplit(":", 1)
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}[kind]) as client:
        client.settimeout(5)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if extra == "options" and family == socket.AF_INET:
            client.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes([1, 1, 1, 0]))
        if extra == "options" and family == socket.AF_INET6:
            client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, bytes([0, 0, 1, 4, 0, 0, 0, 0]))
        if family == socket.AF_INET6:
            client.setsockopt(socket.IPPROTO_IPV6, 78, 1)  # IPV6_FREEBIND
        client.bind((source, int(port)))
        try:
            client.connect((host, int(to)))
            if kind == "udp":
                client.send(b"?" * (int(extra) if extra.isdigit() else 1))
            print(client.recv(128).decode())
        except OSError as error:
            print(type(error).__name__)
"#;

/// A connection of the client.
#[derive(Clone, Debug)]
struct Attempt {
    kind: &'static str,
    source: IpAddr,
    port: u16,
    target: String,
    extra: &'static str,
}

/// Gives a namespace every address of a network.
fn any_address(namespace: &Namespace, networks: [&str; 2]) {
    namespace.run(&["ip", "route", "add", "local", networks[0], "dev", "lo"]);
    namespace.run(&[
        "ip",
        "-6",
        "route",
        "add",
        "local",
        networks[1],
        "dev",
        "lo",
    ]);
}

/// A laboratory whose client has all addresses of 10.64.0.0/16 and `fd64::/32`, and whose
/// gateway has those of 10.65.0.0/16 and `fd65::/32`.
fn lab(kind: &str) -> Lab {
    let mut lab = Lab::new();
    any_address(&lab.client, ["10.64.0.0/16", "fd64::/32"]);
    any_address(&lab.gateway, ["10.65.0.0/16", "fd65::/32"]);
    for (network, via) in [("10.64.0.0/16", "10.8.0.2"), ("fd64::/32", "fd08::2")] {
        lab.gateway
            .run(&["ip", "route", "add", network, "via", via]);
    }
    let ipv4 = (1..=8).map(|number| format!("10.9.0.{number}:5308"));
    let ipv6 = (1..=8).map(|number| format!("[fd09::{number}]:5308"));
    let endpoints: Vec<String> = ipv4.chain(ipv6).collect();
    let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
    lab.servers.serve(kind, &endpoints);
    lab
}

fn backends() -> Vec<String> {
    let ipv4 = (1..=8).map(|number| format!("10.9.0.{number}:5308 weight={number}"));
    let ipv6 = (1..=8).map(|number| format!("[fd09::{number}]:5308"));
    ipv4.chain(ipv6).collect()
}

fn request(variant: &str, more: &Value) -> Value {
    let mut request = json!({
        "name": "W", "variant": variant, "mode": "hash", "destination_port": 80, "backends": backends(),
    });
    let attributes = request.as_object_mut().unwrap();
    attributes.extend(more.as_object().unwrap().clone());
    request
}

/// Connections from sources of both families, each from a port of its own. Another round has other ports: a
/// packet of UDP from the same port would belong to the earlier connection.
fn attempts(
    kind: &'static str,
    networks: [&str; 2],
    extra: &'static str,
    round: u16,
) -> Vec<Attempt> {
    let mut all = Vec::new();
    for number in 0..16_u16 {
        let last = number * 16 + 1;
        for (source, target) in [
            (format!("{}.{number}.{last}", networks[0]), "10.8.0.1:80"),
            (
                format!("{}:{number:x}:{:x}::{last}", networks[1], number * 977),
                "[fd08::1]:80",
            ),
        ] {
            all.push(Attempt {
                kind,
                source: source.parse().unwrap(),
                port: 10_000 + number * 1_031 + round,
                target: target.to_owned(),
                extra,
            });
        }
    }
    all
}

/// The backend that answered each.
fn connect(from: &Namespace, attempts: &[Attempt]) -> Vec<String> {
    let line = |attempt: &Attempt| {
        let Attempt {
            kind,
            source,
            port,
            target,
            extra,
        } = attempt;
        format!("{kind} {source} {port} {target} {extra}\n")
    };
    let input: String = attempts.iter().map(line).collect();
    let output = from.feed(&["python3", "-c", CLIENT], &input);
    let answers = String::from_utf8(output.stdout.clone()).unwrap();
    let answers: Vec<String> = answers.lines().map(str::to_owned).collect();
    assert_eq!(answers.len(), attempts.len(), "{}", shown(&output));
    answers
}

/// The programs of both families as the kernel has them.
fn programs(gateway: &Namespace, variant: &str) -> [Chains; 2] {
    ["iptables", "ip6tables"].map(|program| {
        let dump = gateway.run(&[&format!("{program}-{variant}-save"), "-t", "nat"]);
        Chains::read(&dump, "W")
    })
}

/// The backend that the programs send each to; a port of 0 stands for one that they do not see.
fn foretold(chains: &[Chains; 2], attempts: &[Attempt], sees_port: bool) -> Vec<String> {
    let backend = |attempt: &Attempt| {
        let port = match sees_port {
            true => attempt.port,
            false => 0,
        };
        let chains = &chains[usize::from(attempt.source.is_ipv6())];
        let target = chains.decide("W", &packet(attempt.source, port));
        let host = target.rsplit_once(':').unwrap().0;
        host.trim_matches(['[', ']']).to_owned()
    };
    attempts.iter().map(backend).collect()
}

/// More than one backend was chosen, so that agreement is no accident.
fn assert_as_foretold(answers: &[String], expected: &[String], context: &str) {
    assert_eq!(answers, expected, "{context}");
    let different: BTreeSet<_> = answers.iter().collect();
    assert!(different.len() >= 5, "{context}: {different:?}");
}

#[test]
fn connections_go_where_the_programs_send_them() {
    for kind in ["tcp", "udp"] {
        let lab = lab(kind);
        let mut round = 0;
        for variant in VARIANTS {
            for layout in ["flat", "tree"] {
                for key in ["source", "connection"] {
                    let more = json!({
                        "protocol": kind, "layout": layout, "hash_key": key, "hash_seed": 5,
                        "local_traffic": true, "hash_prefix": {"ipv4": 31, "ipv6": 63},
                    });
                    let context = format!("{variant} {more}");
                    let applied = lab.gateway.apply(&request(variant, &more));
                    assert_eq!(applied["changed"], json!(true), "{context}");
                    let chains = programs(&lab.gateway, variant);
                    round += 1;
                    let plain = attempts(kind, ["10.64", "fd64:0"], "1", round);
                    let expected = foretold(&chains, &plain, true);
                    let answers = connect(&lab.client, &plain);
                    assert_as_foretold(&answers, &expected, &context);
                    let local = attempts(kind, ["10.65", "fd65:0"], "1", round);
                    let answers = connect(&lab.gateway, &local);
                    let expected = foretold(&chains, &local, true);
                    assert_as_foretold(&answers, &expected, &context);
                }
            }
            lab.gateway
                .apply(&json!({"name": "W", "variant": variant, "state": "absent"}));
        }
    }
}

/// With IP options the ports stand further back, and the program finds them. After an IPv6 extension header it
/// does not look for them. Of fragments the kernel makes a whole packet first.
#[test]
fn unusual_packets_go_where_the_programs_send_them() {
    let lab = lab("udp");
    let mut round = 0;
    for variant in VARIANTS {
        let more = json!({"protocol": "udp", "hash_key": "connection"});
        lab.gateway.apply(&request(variant, &more));
        let chains = programs(&lab.gateway, variant);
        for extra in ["options", "4000"] {
            for family in ["IPv4", "IPv6"] {
                round += 1;
                let mut some = attempts("udp", ["10.64", "fd64:0"], extra, round);
                some.retain(|attempt| attempt.source.is_ipv6() == (family == "IPv6"));
                let sees_port = extra != "options" || family == "IPv4";
                let answers = connect(&lab.client, &some);
                let context = format!("{variant} {extra} {family}");
                assert_as_foretold(&answers, &foretold(&chains, &some, sees_port), &context);
            }
        }
        lab.gateway
            .apply(&json!({"name": "W", "variant": variant, "state": "absent"}));
    }
}

#[test]
fn sctp_goes_where_the_programs_send_it() {
    for variant in VARIANTS {
        let lab = lab("sctp");
        let more = json!({"protocol": "sctp", "hash_key": "connection"});
        lab.gateway.apply(&request(variant, &more));
        let chains = programs(&lab.gateway, variant);
        for (source, target) in [("10.8.0.2", "10.8.0.1:80"), ("fd08::2", "[fd08::1]:80")] {
            let some: Vec<Attempt> = (0..12)
                .map(|number| Attempt {
                    kind: "sctp",
                    source: source.parse().unwrap(),
                    port: 20_000 + 71 * number,
                    target: target.to_owned(),
                    extra: "1",
                })
                .collect();
            let ask = |attempt: &Attempt| {
                let port = attempt.port.to_string();
                let lab_py = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/lab.py");
                let answer = lab.client.run(&[
                    "python3", lab_py, "ask", "sctp", target, "1", "--from", &port,
                ]);
                answer.trim().to_owned()
            };
            let answers: Vec<String> = some.iter().map(ask).collect();
            assert_eq!(answers, foretold(&chains, &some, true), "{variant}");
        }
    }
}

/// The same client, at every connection, after every run, and on another gateway on which the
/// backends are listed in another order.
#[test]
fn a_client_stays_with_its_backend() {
    let lab = lab("tcp");
    let some = attempts("tcp", ["10.64", "fd64:0"], "1", 0);
    let mut answers = Vec::new();
    for variant in VARIANTS {
        let mut request = request(variant, &json!({}));
        lab.gateway.apply(&request);
        answers.push(connect(&lab.client, &some));
        let again = lab.gateway.apply(&request);
        assert_eq!(again["changed"], json!(false), "{again}");
        let other_ports: Vec<Attempt> = some
            .iter()
            .map(|attempt| Attempt {
                port: attempt.port + 1,
                ..attempt.clone()
            })
            .collect();
        answers.push(connect(&lab.client, &other_ports));
        lab.gateway
            .apply(&json!({"name": "W", "variant": variant, "state": "absent"}));
        let mut reversed = backends();
        reversed.reverse();
        request["backends"] = json!(reversed);
        request["layout"] = json!("tree");
        lab.gateway.apply(&request);
        answers.push(connect(&lab.client, &some));
        lab.gateway
            .apply(&json!({"name": "W", "variant": variant, "state": "absent"}));
    }
    assert!(
        answers.iter().all(|other| *other == answers[0]),
        "{answers:?}"
    );
}

/// A backend that goes and comes back: only rules that it is concerned by are written, counters
/// stay, and what was saved and loaded again is right.
#[test]
fn rules_with_programs_are_read_back_and_changed_one_by_one() {
    for variant in VARIANTS {
        let namespace = Namespace::new("h");
        let backends: Vec<String> = (1..=40).map(|number| format!("10.9.0.{number}")).collect();
        let mut request = json!({"name": "W", "variant": variant, "mode": "hash", "destination_port": 80, "backends": backends});
        namespace.apply(&request);
        let program = format!("iptables-{variant}");
        let saved = namespace.run(&[&format!("{program}-save"), "-t", "nat"]);
        namespace.run(&[&program, "-t", "nat", "-F"]);
        namespace.restore(&format!("{program}-restore"), &saved);
        let again = namespace.apply(&request);
        assert_eq!(again["changed"], json!(false), "{again}");
        let shares: f64 = again["distribution"]
            .as_array()
            .unwrap()
            .iter()
            .map(|backend| (backend["share"].as_f64().unwrap() - 1.0 / 40.0).abs())
            .fold(0.0, f64::max);
        assert!(shares < 1e-9, "{shares}");

        request["backends"][7] = json!("10.9.0.8 weight=0");
        let changed = namespace.apply(&request);
        let count = changed["changes"].as_array().unwrap().len();
        assert!((2..40).contains(&count), "{count}: {changed}");
        request["backends"][7] = json!("10.9.0.8");
        namespace.apply(&request);
        let restored = namespace.run(&[&format!("{program}-save"), "-t", "nat"]);
        let rules = |dump: &str| -> Vec<String> {
            let lines = dump.lines().filter(|line| line.starts_with("-A"));
            lines.map(str::to_owned).collect()
        };
        assert_eq!(rules(&restored), rules(&saved), "{variant}");

        // A program that differs in one word is not ours, and is put right.
        let rule = saved
            .lines()
            .find(|line| line.starts_with("-A W ") && line.contains("bpf"))
            .unwrap();
        let wrong = rule.replacen("116 0 0 13,", "116 0 0 12,", 1);
        let first = wrong.replacen("-A W ", "-R W 1 ", 1);
        namespace.restore(
            &format!("{program}-restore"),
            &format!("*nat\n{first}\nCOMMIT\n"),
        );
        let done = namespace.apply(&request);
        assert_eq!(done["changes"].as_array().unwrap().len(), 1, "{done}");
        namespace.apply(&json!({"name": "W", "variant": variant, "state": "absent"}));
        let rest = namespace.run(&[&format!("{program}-save"), "-t", "nat"]);
        assert_eq!(rules(&rest), Vec::<String>::new());
    }
}

/// iptables without the match, as seen with 1.8.9, and a kernel without it.
#[test]
fn a_host_without_the_match_gets_the_way_out() {
    let libraries = "d=$(mktemp -d) && cp /usr/lib/*/xtables/*.so $d && rm $d/libxt_bpf.so && XTABLES_LIBDIR=$d \"$@\"; rm -r $d";
    for variant in VARIANTS {
        let namespace = Namespace::new("n");
        let request = json!({"name": "W", "variant": variant, "mode": "hash", "destination_port": 80, "backends": "10.9.0.1,10.9.0.2"});
        let output = namespace.feed(&["sh", "-c", libraries, "-", PROGRAM], &request.to_string());
        let result: Value = serde_json::from_slice(&output.stdout).unwrap();
        let message = result["msg"].as_str().unwrap();
        assert_eq!(result["failed"], json!(true));
        assert!(
            message.contains("`mode: hash` needs iptables and a kernel with `-m bpf`")
                && message.contains("`mode: random`")
                && message.ends_with("the host is as before"),
            "{message}"
        );
        // The same words where it is the kernel.
        let name = match variant {
            "nft" => "iptables-restore",
            _ => "iptables-legacy-restore",
        };
        let refusing = "#!/bin/sh\necho 'Warning: Extension bpf revision 0 not supported, missing kernel module?' >&2\n\
                        echo 'iptables-restore: line 3 failed' >&2\nexit 1\n";
        let result = namespace.ask_with_stand_ins(&[(name, refusing)], &request);
        let message = result["msg"].as_str().unwrap();
        assert!(message.contains("`mode: random`"), "{message}");
        // Another mistake is not taken for it.
        let result = namespace.ask_with_stand_ins(
            &[(
                name,
                "#!/bin/sh\necho 'iptables-restore: line 3 failed' >&2\nexit 1\n",
            )],
            &request,
        );
        let message = result["msg"].as_str().unwrap();
        assert!(!message.contains("`mode: random`"), "{message}");
    }
}
