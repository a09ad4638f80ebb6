//! `status` of real balancers, and its forms.

use std::fs;
use std::process::{Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::lab::{Lab, Namespace, PROGRAM, VARIANTS, shown};
use crate::watch::{Switch, Watcher};

fn order(gateway: &Namespace, arguments: &[&str]) -> Output {
    gateway.feed(&[&[PROGRAM], arguments].concat(), "")
}

fn status(gateway: &Namespace, arguments: &[&str]) -> String {
    let output = order(gateway, &[&["status"], arguments].concat());
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(output.stderr, b"", "{}", shown(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn as_json(gateway: &Namespace, arguments: &[&str]) -> Value {
    let text = status(gateway, &[arguments, &["--format", "json"]].concat());
    let found: Value = serde_json::from_str(&text).unwrap();
    let schema = order(gateway, &["schema", "status"]);
    let schema: Value = serde_json::from_slice(&schema.stdout).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    assert!(validator.is_valid(&found), "{found}");
    found
}

/// Shares, connections and counters are those of the kernel.
#[test]
fn status_tells_who_gets_what_and_why_not() {
    for variant in VARIANTS {
        let mut lab = Lab::new();
        lab.servers
            .serve("tcp", &["10.9.0.1:5308", "10.9.0.2:5308", "[fd09::1]:5308"]);
        let gateway = &lab.gateway;
        gateway.apply(&json!({
            "name": "W", "variant": variant, "destination_port": 5308, "health": {"interval": 0.1, "timeout": 0.2, "fall": 2},
            "backends": [
                "10.9.0.1:5308 weight=3", "10.9.0.2:5308", "10.9.0.3:1", "10.9.0.4:5308 weight=0", "10.9.0.1:80 backup",
                "[fd09::1]:5308",
            ],
        }));
        lab.client.connect("tcp", "10.8.0.1:5308", 8);
        lab.client.connect("tcp", "[fd08::1]:5308", 3);
        let held = order(
            gateway,
            &[
                "hold",
                "W",
                "10.9.0.2:5308",
                "--for",
                "1h",
                "--reason",
                "disk",
            ],
        );
        assert!(held.status.success(), "{}", shown(&held));
        let found = as_json(gateway, &["W"]);
        let balancer = &found["balancers"][0];
        assert_eq!(
            (&balancer["name"], &balancer["balancer"]),
            (&json!("W"), &Value::Null)
        );
        let backends = balancer["backends"].as_array().unwrap();
        let column = |name: &str| {
            backends
                .iter()
                .map(|one| one[name].clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            column("share"),
            [1.0, 0.0, 0.0, 0.0, 0.0, 1.0].map(|share| json!(share)),
            "{variant}"
        );
        assert_eq!(
            column("in_service"),
            [true, false, false, false, false, true].map(|one| json!(one))
        );
        // Counters go with the backend when it leaves service.
        assert_eq!(
            column("packets"),
            [6, 2, 0, 0, 0, 3].map(|one| json!(one)),
            "{variant} {found}"
        );
        let reasons = column("reason");
        assert_eq!(reasons[0], Value::Null);
        assert!(
            reasons[1]
                .as_str()
                .unwrap()
                .starts_with("held for another "),
            "{reasons:?}"
        );
        assert!(
            reasons[1].as_str().unwrap().ends_with("(disk)"),
            "{reasons:?}"
        );
        assert_eq!(
            reasons[2..5],
            ["down when a run checked it", "weight 0", "backup"].map(|one| json!(one))
        );
        assert_eq!(backends[4]["port"], json!(80));

        // Another balancer, which is a set, and all of them.
        gateway.apply(&json!({"name": "EDGE", "variant": variant, "balancers": [
            {"name": "web", "destination_port": 80, "backends": ["10.9.0.5"]},
            {"name": "dns", "protocol": "udp", "destination_port": 53, "backends": ["10.9.0.6", "10.9.0.7"], "mode": "random"},
        ]}));
        let all = as_json(gateway, &[]);
        let names: Vec<_> = all["balancers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| (one["name"].clone(), one["balancer"].clone()))
            .collect();
        assert_eq!(
            names,
            [
                (json!("EDGE"), json!("web")),
                (json!("EDGE"), json!("dns")),
                (json!("W"), Value::Null)
            ]
        );
        let text = status(gateway, &["EDGE"]);
        let wanted = "EDGE/web\nbackend   weight     share  connections  new  state\n10.9.0.5       1  100.00 %            0    0  in service\n";
        assert!(text.starts_with(wanted), "{text}");
        // A foreign hand empties the chain.
        gateway.run(&[
            &format!("iptables-{variant}"),
            "-t",
            "nat",
            "-F",
            "EDGE/web",
        ]);
        let drift = as_json(gateway, &["EDGE"]);
        assert_eq!(
            drift["balancers"][0]["backends"][0]["reason"],
            json!("missing from the rules; apply the request again")
        );
    }
}

fn column(found: &Value, balancer: usize, name: &str) -> Vec<Value> {
    let backends = found["balancers"][balancer]["backends"].as_array().unwrap();
    backends.iter().map(|one| one[name].clone()).collect()
}

/// The status of W, as soon as it is as wanted.
fn once(gateway: &Namespace, is_so: impl Fn(&Value) -> bool) -> Value {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let found = as_json(gateway, &["W"]);
        if is_so(&found) {
            return found;
        }
        assert!(Instant::now() < end, "{found}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// The verdicts are those of a running watcher, with its words.
#[test]
fn status_has_the_verdicts_of_a_watcher() {
    const SERVERS: [&str; 2] = ["10.9.0.1:5308", "10.9.0.2:5308"];
    let lab = Lab::new();
    let gateway = &lab.gateway;
    let mut switch = Switch::new(&lab.servers);
    switch.turn("up", &SERVERS);
    let health = json!({"interval": 0.1, "timeout": 0.2, "fall": 2, "rise": 2});
    let watcher = Watcher::start(
        gateway,
        &json!({"name": "W", "destination_port": 5308, "backends": SERVERS, "health": health}),
    );
    watcher.waits_for("was set up");
    switch.turn("down", &SERVERS[1..]);
    watcher.waits_for("`10.9.0.2:5308` is down");
    let found = once(gateway, |found| {
        column(found, 0, "in_service") == [json!(true), json!(false)]
    });
    assert_eq!(column(&found, 0, "health"), [json!("up"), json!("down")]);
    let reasons = column(&found, 0, "reason");
    assert_eq!(reasons[0], Value::Null);
    let reason = reasons[1].as_str().unwrap();
    assert!(reason.starts_with("down: ") && reason.len() > 8, "{reason}");
    // All are down, so all are in service again.
    switch.turn("down", &SERVERS);
    watcher.waits_for("health is ignored");
    let found = once(gateway, |found| {
        column(found, 0, "in_service") == [json!(true), json!(true)]
    });
    for reason in column(&found, 0, "reason") {
        let reason = reason.as_str().unwrap();
        assert!(
            reason.starts_with("down: ") && reason.ends_with(", and health is ignored"),
            "{reason}"
        );
    }
}

/// The rules of the last run decide, and a hold may be over since.
#[test]
fn a_backend_that_the_rules_keep_out_of_service_says_why() {
    for variant in VARIANTS {
        let lab = Lab::new();
        let gateway = &lab.gateway;
        let nat = format!("iptables-{variant}");
        for (name, port, health) in [
            ("W", 80, None),
            ("H", 81, Some(json!({"interval": 0.1, "timeout": 0.2}))),
        ] {
            let mut request = json!({
                "name": name, "variant": variant, "destination_port": port,
                "backends": ["10.9.0.1:80", "10.9.0.2:80"],
            });
            if let Some(health) = health {
                request["health"] = health;
            }
            gateway.apply(&request);
        }
        let hold = |extra: &[&str]| {
            let held = order(gateway, &[&["hold", "W", "10.9.0.2:80"], extra].concat());
            assert!(held.status.success(), "{}", shown(&held));
        };
        hold(&[]);
        let found = as_json(gateway, &["W"]);
        let reason = column(&found, 0, "reason")[1].clone();
        assert!(reason.as_str().unwrap().starts_with("held"), "{reason}");
        hold(&["--for", "3s"]);
        let over = json!("taken out by the last run; apply the request again");
        once(gateway, |found| column(found, 0, "reason")[1] == over);
        for chain in ["H", "H/drain"] {
            gateway.feed(&[&nat, "-t", "nat", "-F", chain], "");
        }
        let found = as_json(gateway, &["H"]);
        for reason in column(&found, 0, "reason") {
            assert_eq!(
                reason,
                json!("missing from the rules; apply the request again")
            );
        }
    }
}

/// Each balancer has the counters of its own rules, of all of them.
#[test]
fn counters_are_the_sum_over_the_rules_of_a_balancer() {
    for variant in VARIANTS {
        let mut lab = Lab::new();
        lab.servers.serve("tcp", &["10.9.0.1:80", "10.9.0.2:80"]);
        let gateway = &lab.gateway;
        let backends = ["10.9.0.1:80 weight=5", "10.9.0.2:80 weight=3"];
        gateway.apply(&json!({"name": "EDGE", "variant": variant, "balancers": [
            {"name": "web", "destination_port": 80, "backends": backends},
            {"name": "web2", "destination_port": 81, "backends": backends},
        ]}));
        lab.client.connect("tcp", "10.8.0.1:81", 16);
        let found = as_json(gateway, &["EDGE"]);
        assert_eq!(
            column(&found, 0, "packets"),
            [json!(0), json!(0)],
            "{found}"
        );
        assert_eq!(
            column(&found, 1, "packets"),
            [json!(10), json!(6)],
            "{found}"
        );
        // These connections have ended, and the kernel keeps their entries for a while.
        assert_eq!(
            column(&found, 1, "connections"),
            [json!(0), json!(0)],
            "{found}"
        );
        let listed = gateway.run(&["conntrack", "-L", "-p", "tcp"]);
        assert!(listed.contains("TIME_WAIT"), "{listed}");
    }
}

/// One request that cannot be read does not hide the others.
#[test]
fn a_broken_request_is_a_warning_among_others_and_an_error_alone() {
    let gateway = Namespace::new("g");
    for name in ["A", "B"] {
        let port = if name == "A" { 80 } else { 81 };
        gateway.apply(&json!({"name": name, "destination_port": port, "backends": ["10.9.0.1"]}));
    }
    fs::write(gateway.scratch().join("state/A.json"), "{").unwrap();
    let output = order(&gateway, &["status"]);
    assert!(output.status.success(), "{}", shown(&output));
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(text.starts_with("B\n"), "{}", shown(&output));
    assert!(shown(&output).contains("`A`: "), "{}", shown(&output));
    let output = order(&gateway, &["status", "A"]);
    assert_eq!(output.status.code(), Some(1), "{}", shown(&output));
}

#[test]
fn connections_are_those_of_the_balancer_alone() {
    for variant in VARIANTS {
        let mut lab = Lab::new();
        lab.servers.serve("udp", &["10.9.0.1:53", "10.9.0.2:53"]);
        let gateway = &lab.gateway;
        gateway.apply(&json!({
            "name": "DNS", "variant": variant, "protocol": "udp", "destination_port": 53, "destination": "10.8.0.1", "backends": ["10.9.0.1:53", "10.9.0.2:53"],
        }));
        gateway.apply(&json!({
            "name": "DNS2", "variant": variant, "protocol": "udp", "destination_port": 5353, "destination": "10.8.0.1", "backends": ["10.9.0.1:53", "10.9.0.2:53"],
        }));
        lab.client.connect("udp", "10.8.0.1:53", 10);
        // Not through the balancer, and through another one.
        lab.client.connect("udp", "10.8.0.1:5353", 4);
        lab.client.connect("udp", "10.9.0.1:53", 3);
        let found = as_json(gateway, &["DNS"]);
        let backends = found["balancers"][0]["backends"]
            .as_array()
            .unwrap()
            .clone();
        let counted: Vec<_> = backends
            .iter()
            .map(|one| one["connections"].as_u64().unwrap())
            .collect();
        assert_eq!(counted.iter().sum::<u64>(), 10, "{variant} {found}");
        let packets: u64 = backends
            .iter()
            .map(|one| one["packets"].as_u64().unwrap())
            .sum();
        assert_eq!(packets, 10, "{variant}");
    }
}

#[test]
fn prometheus_takes_the_metrics() {
    let gateway = Namespace::new("g");
    gateway.apply(&json!({"name": "EDGE", "balancers": [
        {"name": "web", "destination_port": 80, "backends": ["10.9.0.5:80", "[fd09::5]:80"]},
        {"name": "alt", "destination_port": 81, "backends": ["10.9.0.6 weight=0"]},
    ]}));
    let text = status(&gateway, &["--format", "prometheus"]);
    let line = "iptables_balance_backend_share_ratio{name=\"EDGE\",balancer=\"web\",family=\"ipv6\",backend=\"[fd09::5]:80\"} 1\n";
    assert!(text.contains(line), "{text}");
    let checked = gateway.feed(&["promtool", "check", "metrics"], &text);
    assert!(
        checked.status.success() && checked.stdout.is_empty(),
        "{}",
        shown(&checked)
    );
}

#[test]
fn status_without_a_balancer_says_so() {
    let gateway = Namespace::new("g");
    assert_eq!(status(&gateway, &[]), "no balancer is known on this host\n");
    assert_eq!(as_json(&gateway, &[]), json!({"balancers": []}));
    let output = order(&gateway, &["status", "W"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        shown(&output).contains("no request for `W` is known on this host"),
        "{}",
        shown(&output)
    );
}

#[test]
fn watch_shows_it_again() {
    let gateway = Namespace::new("g");
    gateway.apply(&json!({"name": "W", "destination_port": 80, "backends": ["10.9.0.1"]}));
    let mut command = gateway.command(&[PROGRAM, "status", "W", "--watch", "1"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    thread::sleep(Duration::from_millis(2500));
    child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.matches("10.9.0.1").count() >= 2, "{text}");
}
