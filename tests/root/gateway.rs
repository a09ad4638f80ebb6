//! The gateway around the chain, with real connections: source addresses,
//! FORWARD, refusals, and the end of connections.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::lab::{Lab, Namespace, VARIANTS};

/// A lab whose servers answer with their address and that of who asks, on the
/// port that is balanced and on one that is not.
pub fn lab(kind: &str) -> Lab {
    let mut lab = Lab::new();
    let addresses = (1..=8).map(|n| (format!("10.9.0.{n}"), format!("[fd09::{n}]")));
    let endpoints = addresses.flat_map(|(v4, v6)| {
        [5308, 8080]
            .map(|port| [format!("{v4}:{port}"), format!("{v6}:{port}")])
            .concat()
    });
    let endpoints: Vec<String> = endpoints.collect();
    let mut arguments = vec!["--peer"];
    arguments.extend(endpoints.iter().map(String::as_str));
    lab.servers.serve(kind, &arguments);
    lab
}

/// The usual balancer of both families, with more.
fn balancer(variant: &str, more: &Value) -> Value {
    let mut request = json!({
        "name": "W", "variant": variant, "destination_port": 5308,
        "backends": "10.9.0.1,10.9.0.2,[fd09::1],[fd09::2]",
    });
    let object = request.as_object_mut().unwrap();
    object.extend(more.as_object().unwrap().clone());
    request
}

/// Applies, sees that a second run is silent and that a check predicted it.
pub fn settle(gateway: &Namespace, request: &Value) -> Value {
    let mut check = request.clone();
    check["check"] = json!(true);
    let predicted = gateway.apply(&check);
    let done = gateway.apply(request);
    assert_eq!(done["changes"], predicted["changes"], "{request}");
    let again = gateway.apply(request);
    assert_eq!(again["changed"], json!(false), "{again}");
    done
}

fn actions(result: &Value) -> Vec<String> {
    let changes = result["changes"].as_array().unwrap().iter();
    let action = |change: &Value| change["action"].as_str().unwrap().to_owned();
    changes.map(action).collect()
}

/// The answers to a few connections with a short patience.
pub fn ask(client: &Namespace, kind: &str, target: &str, more: &[&str]) -> Vec<String> {
    let lab = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/lab.py");
    let arguments = ["python3", lab, "ask", kind, target, "2", "--timeout", "0.5"];
    let answers = client.run(&[&arguments, more].concat());
    answers.lines().map(str::to_owned).collect()
}

#[test]
fn masquerade_is_for_the_balanced_connections_alone() {
    for variant in VARIANTS {
        let lab = lab("tcp");
        let (client, gateway) = (&lab.client, &lab.gateway);
        settle(
            gateway,
            &balancer(variant, &json!({"masquerade": "balanced"})),
        );
        assert_eq!(
            ask(client, "tcp", "10.8.0.1:5308", &[]),
            ["10.9.0.1 from 10.9.0.254", "10.9.0.2 from 10.9.0.254"],
            "{variant}"
        );
        assert_eq!(
            ask(client, "tcp", "[fd08::1]:5308", &[]),
            ["fd09::1 from fd09::fe", "fd09::2 from fd09::fe"],
            "{variant}"
        );
        // Not balanced: another port, also of a backend, and the same port sent on by somebody else.
        assert_eq!(
            ask(client, "tcp", "10.9.0.1:8080", &[])[0],
            "10.9.0.1 from 10.8.0.2"
        );
        assert_eq!(
            ask(client, "tcp", "10.9.0.3:8080", &[])[0],
            "10.9.0.3 from 10.8.0.2"
        );
        let theirs = "*nat\n-I PREROUTING -d 10.8.0.1 -p tcp --dport 5308 -j DNAT --to-destination 10.9.0.8\nCOMMIT\n";
        gateway.restore(&format!("iptables-{variant}-restore"), theirs);
        assert_eq!(
            ask(client, "tcp", "10.8.0.1:5308", &[])[0],
            "10.9.0.8 from 10.8.0.2"
        );

        let off = settle(gateway, &balancer(variant, &json!({})));
        assert!(
            actions(&off)
                .iter()
                .all(|action| action.starts_with("delete"))
        );
        assert_eq!(
            ask(client, "tcp", "10.9.0.99:5308", &[])[0],
            "10.9.0.1 from 10.8.0.2"
        );
    }
}

#[test]
fn out_interface_limits_masquerade() {
    for variant in VARIANTS {
        let lab = lab("tcp");
        let (client, gateway) = (&lab.client, &lab.gateway);
        for (interface, seen) in [("front", "10.8.0.2"), ("back", "10.9.0.254")] {
            let more = json!({"masquerade": true, "out_interface": interface});
            settle(gateway, &balancer(variant, &more));
            let answers = ask(client, "tcp", "10.8.0.1:5308", &[]);
            assert!(
                answers[0].ends_with(&format!("from {seen}")),
                "{variant} {answers:?}"
            );
        }
    }
}

#[test]
fn masquerade_all_rewrites_every_packet_that_leaves() {
    for variant in VARIANTS {
        let lab = lab("tcp");
        let (client, gateway) = (&lab.client, &lab.gateway);
        gateway.run(&["ip", "address", "add", "10.9.0.253/24", "dev", "back"]);
        gateway.run(&[
            "ip",
            "address",
            "add",
            "fd09::fd/64",
            "dev",
            "back",
            "nodad",
        ]);
        let more = json!({
            "masquerade": "all", "out_interface": "back", "snat_address": ["10.9.0.253", "fd09::fd"],
        });
        settle(gateway, &balancer(variant, &more));
        for (target, answer) in [
            ("10.8.0.1:5308", "10.9.0.1 from 10.9.0.253"),
            ("10.9.0.3:8080", "10.9.0.3 from 10.9.0.253"),
            ("[fd08::1]:5308", "fd09::1 from fd09::fd"),
            ("[fd09::3]:8080", "fd09::3 from fd09::fd"),
        ] {
            assert_eq!(ask(client, "tcp", target, &[])[0], answer, "{variant}");
        }
    }
}

/// A firewall that accepts nothing.
pub fn closed(gateway: &Namespace, variant: &str) {
    for program in ["iptables", "ip6tables"] {
        let text = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n:MY-DROP - [0:0]\n:MY-LOG - [0:0]\n\
                    -A FORWARD -m conntrack --ctstate INVALID -j DROP\n-A FORWARD -j MY-DROP\n\
                    -A MY-DROP -j REJECT\nCOMMIT\n";
        gateway.restore(&format!("{program}-{variant}-restore"), text);
    }
}

#[test]
fn forward_lets_the_balanced_connections_through_and_no_others() {
    for variant in VARIANTS {
        let lab = lab("tcp");
        let (client, gateway) = (&lab.client, &lab.gateway);
        closed(gateway, variant);
        settle(gateway, &balancer(variant, &json!({})));
        let refused = ["ConnectionRefusedError", "ConnectionRefusedError"];
        assert_eq!(
            ask(client, "tcp", "10.8.0.1:5308", &[]),
            refused,
            "{variant}"
        );

        settle(gateway, &balancer(variant, &json!({"forward": true})));
        let through = ["10.9.0.1 from 10.8.0.2", "10.9.0.2 from 10.8.0.2"];
        let mut answers = ask(client, "tcp", "10.8.0.1:5308", &[]);
        answers.sort();
        assert_eq!(answers, through, "{variant}");
        assert!(ask(client, "tcp", "[fd08::1]:5308", &[])[0].starts_with("fd09::"));
        assert_eq!(
            ask(client, "tcp", "10.9.0.1:8080", &[]),
            refused,
            "{variant}"
        );

        // Somebody puts a rule before ours that drops, and later one that does not.
        let before = |rule: &str| {
            let text = format!("*filter\n-I FORWARD {rule}\nCOMMIT\n");
            gateway.restore(&format!("iptables-{variant}-restore"), &text);
        };
        before("-p tcp -j DROP");
        assert_eq!(ask(client, "tcp", "10.8.0.1:5308", &[])[0], "TimeoutError");
        let seen = json!({"forward": true, "check": true, "diff": true});
        let diff = gateway.apply(&balancer(variant, &seen))["diff"].clone();
        let note = "-j W/forward   # after a rule that drops or rejects";
        assert!(diff["before"].as_str().unwrap().contains(note), "{diff}");
        assert!(!diff["after"].as_str().unwrap().contains(note), "{diff}");
        let moved = settle(gateway, &balancer(variant, &json!({"forward": true})));
        assert_eq!(actions(&moved), ["delete_rule", "insert_rule"], "{variant}");
        before("-p tcp -j MY-LOG");
        assert_eq!(
            ask(client, "tcp", "10.8.0.1:5308", &[])[0].len(),
            through[0].len()
        );

        settle(gateway, &balancer(variant, &json!({})));
        assert_eq!(ask(client, "tcp", "10.8.0.1:5308", &[])[0], "TimeoutError");
        let left = gateway.dump(variant);
        assert!(!left.contains("W/"), "{left}");
    }
}

#[test]
fn local_traffic_is_balanced_but_for_loopback() {
    for variant in VARIANTS {
        let mut lab = lab("tcp");
        lab.gateway.serve("tcp", &["127.0.0.1:5308", "[::1]:5308"]);
        let gateway = &lab.gateway;
        settle(gateway, &balancer(variant, &json!({"local_traffic": true})));
        for (target, answer) in [
            (
                "10.8.0.1:5308",
                ["10.9.0.1 from 10.8.0.1", "10.9.0.2 from 10.8.0.1"],
            ),
            (
                "10.9.0.99:5308",
                ["10.9.0.1 from 10.9.0.254", "10.9.0.2 from 10.9.0.254"],
            ),
            (
                "[fd08::1]:5308",
                ["fd09::1 from fd08::1", "fd09::2 from fd08::1"],
            ),
            ("127.0.0.1:5308", ["127.0.0.1", "127.0.0.1"]),
            ("[::1]:5308", ["::1", "::1"]),
        ] {
            assert_eq!(ask(gateway, "tcp", target, &[]), answer, "{variant}");
        }
        settle(gateway, &balancer(variant, &json!({})));
        assert_eq!(
            ask(gateway, "tcp", "10.8.0.1:5308", &[])[0],
            "ConnectionRefusedError"
        );
    }
}

/// No backend has a weight: answers that come at once, and answers that never
/// come.
#[test]
fn an_empty_pool_refuses_drops_or_passes() {
    for variant in VARIANTS {
        for kind in ["tcp", "udp"] {
            let mut lab = lab(kind);
            lab.gateway.serve(kind, &["127.0.0.1:5308", "[::1]:5308"]);
            lab.gateway
                .serve(kind, &["10.8.0.1:5308", "[fd08::1]:5308", "10.8.0.1:8080"]);
            let (client, gateway) = (&lab.client, &lab.gateway);
            let empty = |when: &str, more: &Value| {
                let backends = "10.9.0.1 weight=0, [fd09::1] weight=0";
                let mut request = balancer(variant, more);
                request["protocol"] = json!(kind);
                request["backends"] = json!(backends);
                request["when_empty"] = json!(when);
                request
            };
            let timed_from = |who: &Namespace, target: &str| {
                let start = Instant::now();
                let answer = ask(who, kind, target, &[])[1].clone();
                (answer, start.elapsed())
            };
            let timed = |target: &str| timed_from(client, target);
            // To the gateway itself and to what lies behind it, of both families.
            let targets = [
                "10.8.0.1:5308",
                "[fd08::1]:5308",
                "10.9.0.3:5308",
                "[fd09::3]:5308",
            ];
            settle(gateway, &empty("reject", &json!({"local_traffic": true})));
            for target in targets {
                let (answer, took) = timed(target);
                assert_eq!(
                    answer, "ConnectionRefusedError",
                    "{variant} {kind} {target}"
                );
                assert!(
                    took < Duration::from_millis(900),
                    "{variant} {kind} {target} {took:?}"
                );
            }
            // A local sender of UDP gets the error from the call that sends.
            let (answer, took) = timed_from(gateway, "10.8.0.1:5308");
            assert!(
                ["ConnectionRefusedError", "PermissionError"].contains(&answer.as_str()),
                "{answer}"
            );
            assert!(took < Duration::from_millis(900), "{took:?}");
            for other in ["10.8.0.1:8080", "10.9.0.3:8080"] {
                assert!(
                    timed(other).0.starts_with("10."),
                    "{variant} {kind} {other}"
                );
            }

            settle(gateway, &empty("drop", &json!({})));
            // Connections of this host to itself are not balanced.
            for itself in ["127.0.0.1:5308", "[::1]:5308", "10.8.0.1:5308"] {
                let answer = ask(gateway, kind, itself, &[])[0].clone();
                assert!(
                    itself.contains(&answer),
                    "{variant} {kind} {itself} {answer}"
                );
            }
            for target in targets {
                let (answer, took) = timed(target);
                assert_eq!(answer, "TimeoutError", "{variant} {kind} {target}");
                assert!(took >= Duration::from_secs(1), "{took:?}");
            }

            settle(gateway, &empty("pass", &json!({})));
            assert_eq!(timed("10.8.0.1:5308").0, "10.8.0.1", "{variant} {kind}");
            assert_eq!(timed("10.9.0.3:5308").0, "10.9.0.3 from 10.8.0.2");

            let mut full = empty("reject", &json!({}));
            full["backends"] = json!("10.9.0.1,[fd09::1]");
            settle(gateway, &full);
            assert_eq!(timed("10.8.0.1:5308").0, "10.9.0.1 from 10.8.0.2");
            settle(
                gateway,
                &json!({"name": "W", "variant": variant, "state": "absent"}),
            );
            assert_eq!(timed("10.8.0.1:5308").0, "10.8.0.1");
        }
    }
}

/// A UDP client that keeps its port, and so its connection.
fn from_4000(lab: &Lab, target: &str) -> String {
    ask(&lab.client, "udp", target, &["--from", "4000"])[1].clone()
}

#[test]
fn a_drained_backend_keeps_its_connections_until_it_is_gone() {
    for variant in VARIANTS {
        let lab = lab("udp");
        let with = |backends: &str, more: Value| {
            let mut request = balancer(variant, &more);
            request["protocol"] = json!("udp");
            request["backends"] = json!(backends);
            settle(&lab.gateway, &request)
        };
        for (target, [one, other]) in [
            ("10.8.0.1:5308", ["10.9.0.1", "10.9.0.2"]),
            ("[fd08::1]:5308", ["fd09::1", "fd09::2"]),
        ] {
            let answers = |expected: &str| {
                let answer = from_4000(&lab, target);
                assert_eq!(
                    answer.split(' ').next(),
                    Some(expected),
                    "{variant} {answer}"
                );
            };
            with(
                &format!("[{one}]:5308").replace("[10.9.0.1]", "10.9.0.1"),
                json!({}),
            );
            answers(one);
            let drained = format!(
                "{{\"0\": {{\"address\": \"{one}\", \"port\": 5308, \"weight\": 0}}, \"1\": {{\"address\": \"{other}\"}}}}"
            );
            with(&drained, json!({}));
            answers(one);
            let fresh = ask(&lab.client, "udp", target, &[]);
            assert!(fresh[0].starts_with(other), "{variant} {fresh:?}");
            // Also when it was the last one, and the rest is refused.
            with(
                &drained
                    .replace(
                        "\"address\": \"10.9.0.2\"",
                        "\"weight\": 0, \"address\": \"10.9.0.2\"",
                    )
                    .replace(
                        "\"address\": \"fd09::2\"",
                        "\"weight\": 0, \"address\": \"fd09::2\"",
                    ),
                json!({}),
            );
            answers(one);

            let gone = with(
                &format!("{{\"0\": {{\"address\": \"{other}\"}}}}"),
                json!({}),
            );
            let last = gone["changes"].as_array().unwrap().last().unwrap();
            assert_eq!(last["action"], "delete_connections", "{variant} {gone}");
            assert_eq!(
                last["rule"],
                format!("-p udp --reply-src {one} --reply-port-src 5308")
            );
            answers(other);
        }
    }
}

/// An accepted connection stays accepted, whatever happens to the list.
#[test]
fn taking_a_backend_off_the_list_cuts_nobody_off() {
    for variant in VARIANTS {
        let lab = lab("udp");
        closed(&lab.gateway, variant);
        let more = json!({"protocol": "udp", "forward": true, "disconnect": "never"});
        let mut request = balancer(variant, &more);
        for backends in [json!("10.9.0.1"), json!("10.9.0.2"), json!([])] {
            request["backends"] = backends;
            settle(&lab.gateway, &request);
            let answer = from_4000(&lab, "10.8.0.1:5308");
            assert_eq!(answer, "10.9.0.1 from 10.8.0.2", "{variant} {request}");
        }
    }
}

#[test]
fn disconnect_ends_only_connections_of_the_removed_backend() {
    let lab = lab("udp");
    let gateway = &lab.gateway;
    let with = |backends: &str, disconnect: &str| {
        let request = json!({
            "name": "W", "protocol": "udp", "destination_port": 5308, "disconnect": disconnect, "backends": backends,
        });
        gateway.apply(&request)
    };
    // Another balancer sends to the same server.
    gateway.apply(&json!({"name": "X", "protocol": "udp", "destination_port": 8080, "backends": "10.9.0.1:5308"}));
    let another = || ask(&lab.client, "udp", "10.8.0.1:8080", &["--from", "4001"])[1].clone();
    assert_eq!(another(), "10.9.0.1 from 10.8.0.2");
    let kept = || {
        let name = lab.gateway.name.as_str();
        let entries =
            crate::lab::sh(&["ip", "netns", "exec", name, "cat", "/proc/net/nf_conntrack"]);
        entries
            .lines()
            .filter(|line| line.contains("sport=4001"))
            .count()
    };
    with("10.9.0.1", "udp");
    assert_eq!(from_4000(&lab, "10.8.0.1:5308"), "10.9.0.1 from 10.8.0.2");
    let never = with("10.9.0.2", "never");
    assert!(!actions(&never).contains(&"delete_connections".to_owned()));
    assert_eq!(from_4000(&lab, "10.8.0.1:5308"), "10.9.0.1 from 10.8.0.2");

    with("10.9.0.1", "udp");
    assert_eq!(from_4000(&lab, "10.8.0.1:5308"), "10.9.0.1 from 10.8.0.2");
    let before = kept();
    let ended = with("10.9.0.2", "udp");
    assert_eq!(actions(&ended).last().unwrap(), "delete_connections");
    assert_eq!(from_4000(&lab, "10.8.0.1:5308"), "10.9.0.2 from 10.8.0.2");
    assert_eq!(kept(), before);
    let gone = gateway.apply(&json!({"name": "W", "state": "absent"}));
    assert_eq!(actions(&gone).last().unwrap(), "delete_connections");
}

#[test]
fn forwarding_is_switched_on_and_left_on() {
    for variant in VARIANTS {
        let lab = lab("tcp");
        let (client, gateway) = (&lab.client, &lab.gateway);
        gateway.forward(false);
        let off = gateway.apply(&balancer(variant, &json!({})));
        let warnings = off["warnings"].to_string();
        assert_eq!(
            warnings.matches("forwarding is off").count(),
            2,
            "{variant} {warnings}"
        );
        assert_eq!(ask(client, "tcp", "10.8.0.1:5308", &[])[0], "TimeoutError");

        let on = settle(gateway, &balancer(variant, &json!({"ip_forward": true})));
        assert_eq!(on["warnings"], json!([]));
        assert_eq!(
            on["changes"],
            json!([
                {"family": "ipv4", "action": "set_sysctl", "rule": "net.ipv4.ip_forward = 1", "before": "net.ipv4.ip_forward = 0"},
                {"family": "ipv6", "action": "set_sysctl", "rule": "net.ipv6.conf.all.forwarding = 1", "before": "net.ipv6.conf.all.forwarding = 0"},
            ])
        );
        assert!(ask(client, "tcp", "10.8.0.1:5308", &[])[0].starts_with("10.9.0."));

        let absent = json!({"name": "W", "variant": variant, "state": "absent"});
        let gone = settle(gateway, &absent);
        assert_eq!(
            gone["warnings"].to_string().matches("was left on").count(),
            2
        );
        assert_eq!(gateway.apply(&absent)["warnings"], json!([]));
        let value = gateway.run(&["cat", "/proc/sys/net/ipv4/ip_forward"]);
        assert_eq!(value, "1\n");
    }
}

/// Docker 28's rules as it writes them, for a container 10.9.0.5 behind a bridge
/// that is `back` here, of which port 8080 is published.
const DOCKER: &str = "*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 10.9.0.5/32 ! -o back -j MASQUERADE
-A DOCKER ! -i back -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.9.0.5:8080
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-BRIDGE - [0:0]
:DOCKER-CT - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A DOCKER -d 10.9.0.5/32 ! -i back -o back -p tcp -m tcp --dport 8080 -j ACCEPT
-A DOCKER ! -i back -o back -j DROP
-A DOCKER-BRIDGE -o back -j DOCKER
-A DOCKER-CT -o back -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -j DOCKER-CT
-A DOCKER-FORWARD -j DOCKER-ISOLATION-STAGE-1
-A DOCKER-FORWARD -j DOCKER-BRIDGE
-A DOCKER-FORWARD -i back -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i back ! -o back -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-2 -o back -j DROP
COMMIT
";

#[test]
fn beside_docker_both_work() {
    for variant in VARIANTS {
        let lab = lab("tcp");
        let (client, gateway) = (&lab.client, &lab.gateway);
        gateway.restore(&format!("iptables-{variant}-restore"), DOCKER);
        let rules = || {
            let dump = gateway.run(&[&format!("iptables-{variant}-save")]);
            let theirs = dump.lines().filter(|line| !line.starts_with('#'));
            let theirs = theirs.filter(|line| !line.contains(" W") && !line.contains(":W"));
            let quiet = theirs.map(|line| line.split(" [").next().unwrap().to_owned());
            quiet.collect::<Vec<_>>()
        };
        let before = rules();
        let mut request = balancer(variant, &json!({"forward": true, "masquerade": true}));
        request["backends"] = json!("10.9.0.1,10.9.0.2");
        for port in [json!(5308), json!("5308,8080")] {
            request["destination_port"] = port;
            settle(gateway, &request);
            assert_eq!(rules(), before, "{variant}");
            let balanced = ask(client, "tcp", "10.8.0.1:5308", &[]);
            assert!(
                balanced.iter().all(|one| one.ends_with("from 10.9.0.254")),
                "{balanced:?}"
            );
            // Published before us: Docker's, and not masqueraded.
            let published = ask(client, "tcp", "10.8.0.1:8080", &[]);
            assert_eq!(published, ["10.9.0.5 from 10.8.0.2"; 2], "{variant}");
            assert_eq!(ask(client, "tcp", "10.9.0.3:80", &[])[0], "TimeoutError");
        }
        settle(
            gateway,
            &json!({"name": "W", "variant": variant, "state": "absent"}),
        );
        assert_eq!(rules(), before, "{variant}");
    }
}
