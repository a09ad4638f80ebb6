//! Warnings about what is around the balancers: foreign rules that take or stop their
//! connections, and backends to which there is no route.

use serde_json::{Value, json};

use crate::gateway::{ask, lab};
use crate::lab::{Namespace, VARIANTS};

/// A balancer of both families, with more.
fn balancer(variant: &str, more: &Value) -> Value {
    let mut request = json!({
        "name": "W", "variant": variant, "destination_port": 5308,
        "backends": ["10.9.0.1", "10.9.0.2", "fd09::1", "fd09::2"],
    });
    let object = request.as_object_mut().unwrap();
    object.extend(more.as_object().unwrap().clone());
    request
}

pub fn warnings(result: &Value) -> Vec<String> {
    let warnings = result["warnings"].as_array().unwrap().iter();
    warnings
        .map(|text| text.as_str().unwrap().to_owned())
        .collect()
}

/// The warnings of a check, which a run that changes something gives too, and one that
/// changes nothing does not.
fn told(gateway: &Namespace, request: &Value) -> Vec<String> {
    let mut check = request.clone();
    check["check"] = json!(true);
    let checked = warnings(&gateway.apply(&check));
    let applied = gateway.apply(request);
    assert_eq!(applied["changed"], json!(true), "{applied}");
    assert_eq!(warnings(&applied), checked, "{request}");
    assert_eq!(warnings(&gateway.apply(request)), [""; 0], "{request}");
    assert_eq!(warnings(&gateway.apply(&check)), checked, "{request}");
    let absent = json!({"name": request["name"], "variant": request["variant"], "state": "absent"});
    gateway.apply(&absent);
    checked
}

/// Loads rules of a table into both families, in the place of those that are there.
fn load(gateway: &Namespace, variant: &str, table: &str, lines: &str) {
    for (program, here) in [("iptables", "10.9.0.8"), ("ip6tables", "fd09::8")] {
        let lines = lines.replace("HERE", here);
        let text = format!("*{table}\n{lines}\nCOMMIT\n");
        let output = gateway.feed(
            &[&format!("{program}-{variant}-restore"), "-w", "10"],
            &text,
        );
        assert!(output.status.success(), "{output:?}");
    }
}

#[test]
fn a_rule_before_the_balancer_that_takes_everything_is_named() {
    for variant in VARIANTS {
        let lab = lab("tcp");
        let gateway = &lab.gateway;
        let chains =
            ":PREROUTING ACCEPT [0:0]\n:ALL - [0:0]\n-A ALL -j DNAT --to-destination HERE\n";
        for (rule, more) in [
            (
                "-p tcp -m tcp --dport 5000:6000 -j DNAT --to-destination HERE",
                json!({}),
            ),
            ("-j ALL", json!({})),
            (
                "-i front -p tcp -j ACCEPT",
                json!({"in_interface": "front"}),
            ),
            (
                "-m addrtype --dst-type LOCAL -j ALL",
                json!({"destination": "local"}),
            ),
            (
                "-p tcp -m tcp --dport 5308 -j RETURN",
                json!({"source": ["10.8.0.0/24", "fd08::/64"]}),
            ),
        ] {
            load(
                gateway,
                variant,
                "nat",
                &format!("{chains}-A PREROUTING {rule}"),
            );
            let told = told(gateway, &balancer(variant, &more));
            assert_eq!(told.len(), 2, "{variant} {rule} {told:?}");
            for (text, here) in told.iter().zip(["10.9.0.8", "fd09::8"]) {
                let rule = rule.replace("HERE", here);
                assert!(
                    text.starts_with(&format!("`-A PREROUTING {rule}` in IPv")),
                    "{text}"
                );
            }
        }
        let insert = told(gateway, &balancer(variant, &json!({"jump": "insert"})));
        assert_eq!(insert, [""; 0], "{variant}");
        for (rule, more) in [
            ("-p tcp -m tcp --dport 5309:6000 -j ALL", json!({})),
            ("-p udp -j ALL", json!({})),
            ("-i front -j ALL", json!({})),
            ("-m limit --limit 5/sec -j ALL", json!({})),
            ("-m addrtype --dst-type LOCAL -j ALL", json!({})),
            (
                "-p tcp -m tcp --dport 5308 -j ALL",
                json!({"destination_port": [5308, 80]}),
            ),
        ] {
            load(
                gateway,
                variant,
                "nat",
                &format!("{chains}-A PREROUTING {rule}"),
            );
            let told = told(gateway, &balancer(variant, &more));
            assert_eq!(told, [""; 0], "{variant} {rule}");
        }
    }
}

#[test]
fn a_rule_in_output_that_takes_the_connections_of_this_host_is_named() {
    for variant in VARIANTS {
        let lab = lab("tcp");
        let gateway = &lab.gateway;
        let ask_here = || ask(gateway, "tcp", "10.8.0.1:5308", &[])[0].clone();
        let chains = ":OUTPUT ACCEPT [0:0]\n:ALL - [0:0]\n-A ALL -j DNAT --to-destination HERE\n";
        let local = json!({"local_traffic": true});
        for (rule, more) in [
            (
                "-p tcp -m tcp --dport 5000:6000 -j DNAT --to-destination HERE",
                json!({}),
            ),
            ("! -d SELF -p tcp -j ALL", json!({})),
            (
                "-m addrtype --dst-type LOCAL -j ALL",
                json!({"destination": "local"}),
            ),
            (
                "-d OURS -j RETURN",
                json!({"destination": ["10.8.0.1", "fd08::1"]}),
            ),
        ] {
            load_output(gateway, variant, &format!("{chains}-A OUTPUT {rule}"));
            let mut with = local.clone();
            with.as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            let found = told(gateway, &balancer(variant, &with));
            assert_eq!(found.len(), 2, "{variant} {rule} {found:?}");
            for text in &found {
                assert!(text.starts_with("`-A OUTPUT "), "{text}");
                assert!(
                    text.contains("takes all its connections of this host"),
                    "{text}"
                );
            }
            // Without `local_traffic` there is no jump rule in OUTPUT.
            assert_eq!(
                told(gateway, &balancer(variant, &more)),
                [""; 0],
                "{variant} {rule}"
            );
        }
        let taken = format!("{chains}-A OUTPUT -p tcp -m tcp --dport 5000:6000 -j ALL");
        load_output(gateway, variant, &taken);
        gateway.apply(&balancer(variant, &local));
        assert_eq!(ask_here(), "10.9.0.8 from 10.8.0.1", "{variant}");
        gateway.apply(&json!({"name": "W", "variant": variant, "state": "absent"}));
        let insert = balancer(variant, &json!({"local_traffic": true, "jump": "insert"}));
        assert_eq!(told(gateway, &insert), [""; 0], "{variant}");
        gateway.apply(&insert);
        assert_eq!(ask_here(), "10.9.0.1 from 10.8.0.1", "{variant}");
        gateway.apply(&json!({"name": "W", "variant": variant, "state": "absent"}));
        for rule in [
            "-p tcp -m tcp --dport 5309 -j ALL",
            "-o back -p tcp -j ALL",
            "-s OURS -p tcp -j ALL",
            "! -d OURS -p tcp -j ALL",
            "-m addrtype --dst-type LOCAL -j ALL",
        ] {
            load_output(gateway, variant, &format!("{chains}-A OUTPUT {rule}"));
            assert_eq!(
                told(gateway, &balancer(variant, &local)),
                [""; 0],
                "{variant} {rule}"
            );
        }
    }
}

/// Loads rules of nat with addresses of this host in them.
fn load_output(gateway: &Namespace, variant: &str, lines: &str) {
    for (program, [here, ours, own]) in [
        ("iptables", ["10.9.0.8", "10.8.0.1", "127.0.0.0/8"]),
        ("ip6tables", ["fd09::8", "fd08::1", "::1"]),
    ] {
        let lines = lines
            .replace("HERE", here)
            .replace("OURS", ours)
            .replace("SELF", own);
        let text = format!("*nat\n{lines}\nCOMMIT\n");
        let program = format!("{program}-{variant}-restore");
        let output = gateway.feed(&[&program, "-w", "10"], &text);
        assert!(output.status.success(), "{output:?}");
    }
}

#[test]
fn a_forward_chain_that_stops_what_is_balanced_is_named() {
    for variant in VARIANTS {
        let lab = lab("tcp");
        let (client, gateway) = (&lab.client, &lab.gateway);
        let established = "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT";
        for (policy, rules, by) in [
            ("DROP", established, "its policy DROP"),
            ("ACCEPT", "-A FORWARD -j DROP", "`-A FORWARD -j DROP`"),
        ] {
            load(
                gateway,
                variant,
                "filter",
                &format!(":FORWARD {policy} [0:0]\n{rules}"),
            );
            let told = told(gateway, &balancer(variant, &json!({})));
            assert_eq!(told.len(), 2, "{variant} {told:?}");
            assert!(
                told[0].contains(&format!(
                    "to `10.9.0.1` and 1 more by {by}; `forward: true`"
                )),
                "{told:?}"
            );
            assert!(
                told[1].contains(&format!("to `fd09::1` and 1 more by {by}; `forward: true`")),
                "{told:?}"
            );
        }
        load(
            gateway,
            variant,
            "filter",
            &format!(":FORWARD DROP [0:0]\n{established}"),
        );
        gateway.apply(&balancer(variant, &json!({})));
        assert_eq!(ask(client, "tcp", "10.8.0.1:5308", &[])[0], "TimeoutError");
        let accepted = gateway.apply(&balancer(variant, &json!({"forward": true})));
        assert_eq!(accepted["warnings"], json!([]));
        assert!(ask(client, "tcp", "10.8.0.1:5308", &[])[0].starts_with("10.9.0."));
        gateway.apply(&json!({"name": "W", "variant": variant, "state": "absent"}));

        for rule in [
            "-i front -j ACCEPT",
            "-p tcp -m tcp --dport 5308 -j ACCEPT",
            "-m mark --mark 0x1 -j ACCEPT",
        ] {
            load(
                gateway,
                variant,
                "filter",
                &format!(":FORWARD DROP [0:0]\n-A FORWARD {rule}"),
            );
            let told = told(gateway, &balancer(variant, &json!({})));
            assert_eq!(told, [""; 0], "{variant} {rule}");
        }
    }
}

#[test]
fn a_backend_without_a_route_is_named() {
    let lab = lab("tcp");
    let gateway = &lab.gateway;
    let lost = json!({"backends": ["10.9.0.1", "10.77.0.1", "10.77.0.2", "fd09::1", "fd77::1"]});
    let lost = balancer("nft", &lost);
    let expected = ["`10.77.0.1` and `10.77.0.2`", "`fd77::1`"];
    let told_of = told(gateway, &lost);
    assert_eq!(told_of.len(), 2, "{told_of:?}");
    for (text, addresses) in told_of.iter().zip(expected) {
        let start = format!("backends: no route to {addresses}, ");
        assert!(text.starts_with(&start), "{text}");
    }
    let drained = json!({"backends": ["10.9.0.1", "10.77.0.1 weight=0", "fd09::1"]});
    assert_eq!(told(gateway, &balancer("nft", &drained)), [""; 0]);

    // With rules of their own, others may have a table for what comes in by an interface.
    for family in ["-4", "-6"] {
        gateway.run(&["ip", family, "rule", "add", "iif", "front", "table", "100"]);
    }
    assert_eq!(told(gateway, &lost), [""; 0]);
    for family in ["-4", "-6"] {
        gateway.run(&["ip", family, "rule", "del", "iif", "front", "table", "100"]);
    }
    gateway.run(&["ip", "route", "add", "10.77.0.0/24", "via", "10.9.0.1"]);
    gateway.run(&["ip", "route", "add", "fd77::/64", "via", "fd09::1"]);
    assert_eq!(told(gateway, &lost), [""; 0]);
}

#[test]
fn in_a_set_the_warnings_name_the_balancers() {
    let lab = lab("tcp");
    let gateway = &lab.gateway;
    load(
        gateway,
        "nft",
        "nat",
        ":PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -m tcp --dport 80 -j ACCEPT",
    );
    load(gateway, "nft", "filter", ":FORWARD DROP [0:0]");
    let set = json!({"name": "EDGE", "variant": "nft", "balancers": [
        {"name": "web", "destination_port": 80, "backends": "10.9.0.1, fd09::1", "forward": true},
        {"name": "alt", "destination_port": 8080, "backends": "10.9.0.2, fd09::2"},
    ]});
    let told = told(gateway, &set);
    assert_eq!(told.len(), 4, "{told:?}");
    let about = |name: &str, part: &str| {
        let start = format!("balancer `{name}`: ");
        told.iter()
            .filter(|text| text.starts_with(&start) && text.contains(part))
            .count()
    };
    assert_eq!(
        (
            about("web", "takes all its connections"),
            about("alt", "FORWARD")
        ),
        (2, 2),
        "{told:?}"
    );
}
