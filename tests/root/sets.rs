//! Sets of balancers on real iptables, with real connections.

use serde_json::{Value, json};

use crate::dice::Dice;
use crate::gateway::{ask, closed, lab, settle};
use crate::lab::{Namespace, VARIANTS};

fn set(variant: &str, more: &Value, balancers: &Value) -> Value {
    let mut request = json!({"name": "EDGE", "variant": variant, "balancers": balancers});
    let object = request.as_object_mut().unwrap();
    object.extend(more.as_object().unwrap().clone());
    request
}

/// Eight services and more, so that the way to each leads through a tree.
fn services() -> Value {
    let mut all = vec![
        json!({"name": "web", "destination_port": [80, 443], "backends": "10.9.0.1:5308,10.9.0.2:5308,[fd09::1]:5308,[fd09::2]:5308"}),
        json!({"name": "api", "destination_port": "8000:8099", "backends": "10.9.0.3:5308,[fd09::3]:5308"}),
        json!({"name": "vip", "destination_port": 8050, "destination": ["10.8.0.1", "fd08::1"], "backends": "10.9.0.8:5308,[fd09::8]:5308"}),
        json!({"name": "filter", "destination_port": 53, "backends": "10.9.0.4:5308,[fd09::4]:5308", "masquerade": "no"}),
    ];
    for number in 0..12 {
        let host = number % 4 + 5;
        all.push(json!({
            "name": format!("s{number}"), "destination_port": 9000 + number * 37,
            "backends": [format!("10.9.0.{host}:5308"), format!("[fd09::{host}]:5308")],
        }));
    }
    all.push(json!({"name": "from", "destination_port": 7000, "source": ["10.8.0.0/24", "fd08::/64"], "backends": "10.9.0.1:5308,[fd09::1]:5308"}));
    all.push(json!({"name": "rest", "destination_port": 7000, "backends": "10.9.0.2:5308,[fd09::2]:5308"}));
    all.push(json!({"name": "none", "destination_port": 7001, "backends": ["10.9.0.1 weight=0", "fd09::1 weight=0"]}));
    Value::Array(all)
}

/// The first answer to a connection to a port of the gateway, of either family.
fn answers(client: &Namespace, kind: &str, port: u16) -> [String; 2] {
    [format!("10.8.0.1:{port}"), format!("[fd08::1]:{port}")]
        .map(|target| ask(client, kind, &target, &[])[0].clone())
}

#[test]
fn each_connection_finds_its_balancer_and_its_way_back() {
    for variant in VARIANTS {
        let lab = lab("tcp");
        let (client, gateway) = (&lab.client, &lab.gateway);
        closed(gateway, variant);
        let more = json!({"masquerade": "balanced", "forward": true});
        let done = settle(gateway, &set(variant, &more, &services()));
        assert!(done["changed"] == json!(true), "{done}");
        let seen = |host: u8| {
            [
                format!("10.9.0.{host} from 10.9.0.254"),
                format!("fd09::{host} from fd09::fe"),
            ]
        };
        // Both ports of a balancer share its turns.
        for (port, host) in [
            (8000, 3),
            (8099, 3),
            (8050, 3),
            (9000, 5),
            (9037, 6),
            (9407, 8),
            (7000, 1),
            (443, 1),
            (80, 1),
        ] {
            assert_eq!(answers(client, "tcp", port), seen(host), "{variant} {port}");
        }
        assert_eq!(ask(client, "tcp", "10.8.0.1:443", &[])[1], seen(2)[0]);
        // Without masquerade, by its own word.
        assert_eq!(
            answers(client, "tcp", 53),
            ["10.9.0.4 from 10.8.0.2", "fd09::4 from fd08::2"]
        );
        // An empty pool refuses; what is nobody's is stopped by the firewall or the gateway.
        for port in [7001, 7002, 8100, 9001] {
            for answer in answers(client, "tcp", port) {
                assert!(
                    answer.contains("ConnectionRefused"),
                    "{variant} {port} {answer}"
                );
            }
        }
        // Foreign connections through the gateway stay stopped.
        assert!(!ask(client, "tcp", "10.9.0.1:5308", &[])[0].starts_with("10.9."));
        gateway.apply(&json!({"name": "EDGE", "variant": variant, "state": "absent"}));
        assert!(!gateway.dump(variant).contains("EDGE"));
    }
}

#[test]
fn a_feature_that_is_off_stays_off_where_balancers_meet() {
    for variant in VARIANTS {
        let lab = lab("tcp");
        let (client, gateway) = (&lab.client, &lab.gateway);
        // Both have the same backend; the first one wins, and does not rewrite.
        let balancers = json!([
            {"name": "off", "destination_port": 8000, "backends": "10.9.0.1:5308", "masquerade": "no", "forward": false},
            {"name": "on", "destination_port": "8000:8010", "backends": "10.9.0.1:5308"},
        ]);
        let more = json!({"masquerade": "balanced", "forward": true});
        settle(gateway, &set(variant, &more, &balancers));
        assert_eq!(
            ask(client, "tcp", "10.8.0.1:8000", &[])[0],
            "10.9.0.1 from 10.8.0.2",
            "{variant}"
        );
        assert_eq!(
            ask(client, "tcp", "10.8.0.1:8001", &[])[0],
            "10.9.0.1 from 10.9.0.254",
            "{variant}"
        );
        closed(gateway, variant);
        settle(gateway, &set(variant, &more, &balancers));
        assert!(
            !ask(client, "tcp", "10.8.0.1:8000", &[])[0].starts_with("10.9."),
            "{variant}"
        );
        assert_eq!(
            ask(client, "tcp", "10.8.0.1:8001", &[])[0],
            "10.9.0.1 from 10.9.0.254",
            "{variant}"
        );
    }
}

/// Two balancers that only the interface parts: it is not known any more when the
/// source is rewritten, and each still gets its own.
#[test]
fn balancers_that_only_the_interface_parts_both_find_their_way_back() {
    for variant in VARIANTS {
        let lab = lab("tcp");
        let balancers = json!([
            {"name": "lan", "destination_port": 8000, "in_interface": "back", "backends": "10.9.0.1:5308"},
            {"name": "wan", "destination_port": 8000, "in_interface": "front", "backends": "10.9.0.2:5308"},
        ]);
        let more = json!({"masquerade": "balanced", "forward": true});
        closed(&lab.gateway, variant);
        settle(&lab.gateway, &set(variant, &more, &balancers));
        assert_eq!(
            ask(&lab.client, "tcp", "10.8.0.1:8000", &[])[0],
            "10.9.0.2 from 10.9.0.254",
            "{variant}"
        );
    }
}

#[test]
fn a_udp_client_moves_when_its_balancer_or_backend_goes() {
    for variant in VARIANTS {
        let lab = lab("udp");
        let (client, gateway) = (&lab.client, &lab.gateway);
        let one = |name: &str, port: u16, backends: &str| json!({"name": name, "destination_port": port, "backends": backends});
        let more = json!({"protocol": "udp"});
        let ask = |port: u16| {
            ask(
                client,
                "udp",
                &format!("10.8.0.1:{port}"),
                &["--from", "4000"],
            )[1]
            .clone()
        };
        let both = json!([one("a", 53, "10.9.0.1:5308"), one("b", 54, "10.9.0.1:5308")]);
        settle(gateway, &set(variant, &more, &both));
        assert!(ask(53).starts_with("10.9.0.1 ") && ask(54).starts_with("10.9.0.1 "));
        // The backend leaves one balancer, and stays with the other.
        let moved = json!([one("a", 53, "10.9.0.2:5308"), one("b", 54, "10.9.0.1:5308")]);
        let done = settle(gateway, &set(variant, &more, &moved));
        let last = done["changes"].as_array().unwrap().last().unwrap().clone();
        assert_eq!(last["action"], "delete_connections", "{done}");
        assert_eq!(
            done["balancers"],
            json!([{"name": "a", "changed": true}, {"name": "b", "changed": false}])
        );
        assert!(ask(53).starts_with("10.9.0.2 ") && ask(54).starts_with("10.9.0.1 "));
        // A balancer that is not listed any more is gone with its connections.
        let done = settle(
            gateway,
            &set(variant, &more, &json!([one("a", 53, "10.9.0.2:5308")])),
        );
        assert!(
            done["msg"].as_str().unwrap().contains("removed `b`"),
            "{done}"
        );
        assert!(!gateway.dump(variant).contains("EDGE/b"), "{variant}");
        assert!(!ask(54).starts_with("10.9."), "{variant}");
    }
}

#[test]
fn connections_of_the_gateway_itself_are_those_of_the_balancers_that_say_so() {
    for variant in VARIANTS {
        let lab = lab("tcp");
        let balancers = json!([
            {"name": "a", "destination_port": 8000, "backends": "10.9.0.1:5308", "local_traffic": true},
            {"name": "b", "destination_port": 8001, "backends": "10.9.0.1:5308"},
        ]);
        settle(&lab.gateway, &set(variant, &json!({}), &balancers));
        assert!(ask(&lab.gateway, "tcp", "10.8.0.1:8000", &[])[0].starts_with("10.9.0.1"));
        assert!(ask(&lab.gateway, "tcp", "10.8.0.1:8001", &[])[0].contains("Refused"));
        assert!(ask(&lab.client, "tcp", "10.8.0.1:8001", &[])[0].starts_with("10.9.0.1"));
    }
}

/// Random sets, one after the other, on real iptables: the rules are those that the
/// set has on an empty host, and foreign ones stay.
#[test]
fn from_every_set_to_every_other() {
    for variant in VARIANTS {
        let mut dice = Dice(7);
        let namespace = Namespace::new("a");
        let theirs = "*nat\n:MINE - [0:0]\n-A PREROUTING -j MINE\n-A MINE -p tcp --dport 99 -j RETURN\nCOMMIT\n*filter\n-A FORWARD -j DROP\nCOMMIT\n";
        let restore = format!("iptables-{variant}-restore");
        namespace.restore(&restore, theirs);
        let rules = |dump: &str, ours: bool| -> Vec<String> {
            let lines = dump
                .lines()
                .filter(|line| line.contains("EDGE") == ours && !line.contains("ACCEPT ["));
            let mut lines: Vec<String> = lines
                .map(|line| {
                    line.rsplit_once("] ")
                        .map_or(line, |(_, rule)| rule)
                        .to_owned()
                })
                .collect();
            // Chains come in the order in which they were made in old releases.
            lines.sort_by_key(|line| line.split(' ').nth(1).map(str::to_owned));
            lines
        };
        let foreign = rules(&namespace.dump(variant), false);
        for step in 0..10 {
            let mut balancers: Vec<Value> = Vec::new();
            for _ in 0..dice.throw(40) {
                let (name, port) = (dice.throw(60), 1 + dice.throw(300));
                let port = match dice.throw(4) {
                    0 => json!(format!("{port}:{}", port + dice.throw(200))),
                    1 => json!([port, port + 1000]),
                    _ => json!(port),
                };
                let mut balancer = json!({
                    "name": format!("b{name}"), "destination_port": port, "protocol": dice.pick(&["tcp", "udp"]),
                    "mode": dice.pick(&["nth", "random"]), "forward": dice.throw(2) == 0, "masquerade": dice.throw(2) == 0,
                    "local_traffic": dice.throw(3) == 0, "when_empty": dice.pick(&["reject", "drop", "pass"]),
                    "backends": (0..=dice.throw(4)).map(|n| json!({"address": format!("10.9.0.{}", n + 1), "weight": dice.throw(3)})).collect::<Vec<_>>(),
                });
                if dice.throw(3) == 0 {
                    balancer["destination"] =
                        json!([format!("198.51.100.{}", dice.throw(20)), "203.0.113.0/25"]);
                }
                if dice.throw(4) == 0 {
                    balancer["in_interface"] = json!(dice.pick(&["eth0", "eth+"]));
                }
                balancers.push(balancer);
                let request = set(variant, &json!({"check": true}), &json!(balancers));
                if namespace.ask(&request)["failed"] == json!(true) {
                    balancers.pop();
                }
            }
            let request = set(variant, &json!({}), &json!(balancers));
            settle(&namespace, &request);
            let dump = namespace.dump(variant);
            assert_eq!(rules(&dump, false), foreign, "{variant} {step}");
            let fresh = Namespace::new("f");
            fresh.restore(&restore, theirs);
            fresh.apply(&request);
            assert_eq!(
                rules(&dump, true),
                rules(&fresh.dump(variant), true),
                "{variant} {step} {request}"
            );
        }
    }
}

#[test]
fn a_set_is_kept_for_the_next_boot() {
    for variant in VARIANTS {
        let gateway = Namespace::new("b");
        let path = |name: &str| gateway.scratch().join(name).to_str().unwrap().to_owned();
        let more = json!({"forward": true, "persist": {"ipv4": path("v4"), "ipv6": path("v6")}});
        settle(&gateway, &set(variant, &more, &services()));
        let rules = gateway.dump(variant);
        let other = Namespace::new("b");
        for (program, file) in [("iptables", "v4"), ("ip6tables", "v6")] {
            let text = std::fs::read_to_string(path(file)).unwrap();
            other.restore(&format!("{program}-{variant}-restore"), &text);
        }
        let lines = |dump: &str| -> Vec<String> {
            let ours = dump.lines().filter(|line| line.contains("EDGE"));
            let mut ours: Vec<_> = ours.map(str::to_owned).collect();
            ours.sort();
            ours
        };
        assert_eq!(lines(&other.dump(variant)), lines(&rules), "{variant}");
        let mut more = more.clone();
        more["persist"] = json!(false);
        assert_eq!(
            other.apply(&set(variant, &more, &services()))["changed"],
            json!(false)
        );
    }
}
