//! Real iptables, both variants: from every state to every other.

use std::collections::BTreeMap;
use std::fs;

use serde_json::{Value, json};

use crate::lab::{Namespace, PROGRAM, VARIANTS, restore_of_ipv6};
use crate::model::Model;

/// Foreign rules in every table: Docker's, kube-proxy's, firewalld's, hand-made
/// ones, and some that look like ours.
const OTHERS: &str = r#"*raw
-A PREROUTING -d 203.0.113.7/32 -j NOTRACK
COMMIT
*mangle
:CFENGINE-MARK - [0:0]
-A PREROUTING -p tcp -m tcp --dport 5308 -j CFENGINE-MARK
-A CFENGINE-MARK -j MARK --set-xmark 0x1/0xffffffff
COMMIT
*nat
:DOCKER - [0:0]
:KUBE-SVC-TCOU7JCQXEZGVUNU - [0:0]
:CFENGINE2 - [0:0]
:KUBE-POSTROUTING - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A PREROUTING -m comment --comment "goes to -j CFENGINE, it's \"said\"" -j KUBE-SVC-TCOU7JCQXEZGVUNU
-A PREROUTING -p tcp -m tcp --dport 5308 -j CFENGINE2
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
-A KUBE-SVC-TCOU7JCQXEZGVUNU -m comment --comment "default/web:http -> 10.1.0.4:80" -m statistic --mode random --probability 0.50000000000 -j RETURN
-A CFENGINE2 -m recent --set --name cfe --mask 255.255.255.255 --rsource -j RETURN
COMMIT
*filter
:INPUT DROP [0:0]
:DOCKER-USER - [0:0]
:DOCKER-FORWARD - [0:0]
:FORWARD_IN_ZONES - [0:0]
:FWDI_public - [0:0]
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT
-A FORWARD -i lo -j ACCEPT
-A FORWARD -j FORWARD_IN_ZONES
-A FORWARD -m conntrack --ctstate INVALID -j DROP
-A FORWARD -j REJECT
-A DOCKER-USER -j RETURN
-A DOCKER-FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -i docker0 -j ACCEPT
-A DOCKER-FORWARD ! -i docker0 -o docker0 -j DROP
-A FORWARD_IN_ZONES -i eth0 -g FWDI_public
-A FWDI_public -p icmp -j ACCEPT
COMMIT
"#;

fn others_for_ipv6() -> String {
    let lines = OTHERS
        .lines()
        .filter(|line| !line.contains(".0.") && !line.contains("203.0.113"));
    lines
        .map(|line| {
            line.replace("255.255.255.255", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff") + "\n"
        })
        .collect()
}

pub fn crowded(variant: &str) -> Namespace {
    let namespace = Namespace::new("k");
    namespace.restore(&format!("iptables-{variant}-restore"), OTHERS);
    namespace.restore(&format!("ip6tables-{variant}-restore"), &others_for_ipv6());
    namespace
}

/// Backends in a network.
fn many(count: usize, network: &str, rest: &str) -> String {
    let separator = if network.contains(':') { ":" } else { "." };
    let backend = |number| format!("{network}{separator}{number} {rest}");
    (1..=count).map(backend).collect::<Vec<_>>().join(",")
}

/// Corner cases of a request.
pub fn states(variant: &str) -> Vec<Value> {
    let states = [
        json!({"destination_port": 5308, "backends": "10.9.0.1:5308,10.9.0.2:5308,10.9.0.3:5308,10.9.0.4:5308"}),
        json!({"destination_port": 5308, "backends": "10.9.0.2:5308 weight=3,10.9.0.1:5308,10.9.0.4:5308 weight=0,fd09::1,[fd09::2]:81 weight=2"}),
        json!({"destination_port": 5308, "mode": "random", "backends": "10.9.0.1:5308 weight=30,10.9.0.2:5308 weight=30,10.9.0.3:5308 weight=30,10.9.0.4:5308 weight=10"}),
        json!({"destination_port": "5308,5309,6000:6010", "mode": "random", "jump": "insert", "backends": "10.9.0.4:5308,fd09::1,fd09::2,fd09::3"}),
        json!({"destination_port": 53, "protocol": "udp", "destination": "198.51.100.1,198.51.100.128/25,2001:db8::/64", "backends": "10.9.0.1,10.9.0.2,fd09::1"}),
        json!({"destination_port": "0:65535", "protocol": "sctp", "in_interface": "eth+", "jump": "insert", "destination": "local", "backends": "10.9.0.1:9"}),
        json!({"destination_port": 5308, "protocol": "dccp", "source": "192.0.2.0/24", "backends": "10.9.0.1:5308,10.9.0.2"}),
        json!({"destination_port": 5308, "backends": "[fd09::1]:5308"}),
        json!({"destination_port": 5308, "layout": "tree", "backends": many(23, "10.9.1", "weight=1")}),
        json!({"destination_port": 5308, "mode": "random", "backends": many(40, "10.9.1", "weight=3") + "," + &many(9, "fd09:", "weight=2")}),
        json!({"destination_port": 5308, "layout": "tree", "backends": many(9, "10.9.1", "weight=3") + "," + &many(4, "10.9.2", "weight=7")}),
        json!({"destination_port": "5308,6000:6010", "masquerade": true, "out_interface": "eth1", "snat_address": ["192.0.2.9", "fd00::9"], "forward": true,
            "local_traffic": true, "source": "192.0.2.0/24,fd00::/64", "backends": many(3, "10.9.1", "weight=2") + ",fd09::1"}),
        json!({"destination_port": 5308, "protocol": "udp", "masquerade": "all", "out_interface": "eth+", "destination": "198.51.100.1",
            "backends": "10.9.0.1 weight=0", "local_traffic": true, "jump": "insert", "forward": true}),
        json!({"destination_port": 5308, "when_empty": "drop", "destination": "local", "backends": []}),
        json!({"state": "absent"}),
    ];
    let named = |mut state: Value| {
        state["name"] = json!("CFENGINE");
        state["variant"] = json!(variant);
        state
    };
    states.into_iter().map(named).collect()
}

fn is_ours(line: &str) -> bool {
    let mut words = line.split([' ', ':']);
    let quoted = line.contains('"');
    !quoted && words.any(|word| word == "CFENGINE" || word.starts_with("CFENGINE/"))
}

/// Our rules without counters. The jump rules have no order among themselves.
pub fn ours(dump: &str) -> (Vec<String>, Vec<String>) {
    let lines = dump.lines().filter(|line| is_ours(line));
    let (mut chain, mut leads): (Vec<_>, Vec<_>) = lines
        .map(|line| {
            line.rsplit_once("] ")
                .map_or(line, |(_, rule)| rule)
                .to_owned()
        })
        .partition(|line| line.starts_with(':') || line.starts_with("-A CFENGINE"));
    leads.sort_unstable();
    // Before 1.8.5 chains came in the order in which they were made.
    chain.sort_by_cached_key(|line| {
        let name = line.split(' ').find(|word| word.contains("CFENGINE"));
        (line.starts_with('-'), name.map(str::to_owned))
    });
    (chain, leads)
}

fn foreign(dump: &str) -> Vec<&str> {
    dump.lines().filter(|line| !is_ours(line)).collect()
}

#[test]
fn from_every_state_to_every_other() {
    std::thread::scope(|scope| {
        for variant in VARIANTS {
            scope.spawn(move || all_pairs(variant));
        }
    });
}

fn all_pairs(variant: &str) {
    let states = states(variant);
    let absent = states.last().unwrap();
    let fresh: Vec<_> = states
        .iter()
        .map(|state| {
            let namespace = crowded(variant);
            namespace.apply(state);
            ours(&namespace.dump(variant))
        })
        .collect();
    let namespace = crowded(variant);
    let untouched = namespace.dump(variant);
    for from in &states {
        for (to, expected) in states.iter().zip(&fresh) {
            let context = format!("{variant}: from {from} to {to}");
            namespace.apply(absent);
            namespace.apply(from);
            let predicted = namespace.ask(&with(to, "check", json!(true)));
            let done = namespace.apply(&with(to, "diff", json!(true)));
            assert_eq!(done["changes"], predicted["changes"], "{context}");
            assert_eq!(done["distribution"], predicted["distribution"], "{context}");
            let dump = namespace.dump(variant);
            assert_eq!(&ours(&dump), expected, "{context}");
            assert_eq!(foreign(&dump), foreign(&untouched), "{context}");

            let again = namespace.apply(&with(to, "diff", json!(true)));
            assert_eq!(
                (&again["changed"], &again["changes"]),
                (&json!(false), &json!([])),
                "{context}"
            );
            assert_eq!(again["diff"]["before"], again["diff"]["after"], "{context}");
            assert_eq!(namespace.dump(variant), dump, "{context}");
            assert_spelled_as_saved(&done["diff"]["after"], &again["diff"]["before"], &context);
        }
    }
}

/// Predicted rules are spelled as the dump spells them; only DCCP is written by
/// number. Foreign chains keep their order.
fn assert_spelled_as_saved(predicted: &Value, found: &Value, context: &str) {
    let sorted = |text: &Value| {
        let mut lines: Vec<_> = text
            .as_str()
            .unwrap()
            .replace("-p 33 ", "-p dccp ")
            .lines()
            .map(str::to_owned)
            .collect();
        lines.sort_unstable();
        lines
    };
    assert_eq!(sorted(predicted), sorted(found), "{context}");
}

fn with(request: &Value, name: &str, value: Value) -> Value {
    let mut request = request.clone();
    request[name] = value;
    request
}

/// Real iptables and the model of it make the same of our transactions.
#[test]
fn the_model_is_like_the_kernel() {
    for variant in VARIANTS {
        let namespace = Namespace::new("m");
        // The table has to exist to be read.
        namespace.run(&[&format!("iptables-{variant}"), "-w", "-t", "nat", "-F"]);
        let mut model = Model::new(false);
        let states: Vec<Value> = states(variant)
            .into_iter()
            .filter(|state| {
                !state["backends"]
                    .as_str()
                    .is_some_and(|list| list.contains("fd09") || list.contains("dccp"))
            })
            .collect();
        for state in states.iter().chain(states.iter().rev()) {
            let dump = namespace.scratch().join("dump");
            fs::write(
                &dump,
                namespace.run(&[&format!("iptables-{variant}-save"), "-c"]),
            )
            .unwrap();
            let planned = namespace.feed(
                &[PROGRAM, "plan", "-", "--current", dump.to_str().unwrap()],
                &state.to_string(),
            );
            let text = String::from_utf8(planned.stdout).unwrap();
            if text.is_empty() {
                continue;
            }
            namespace.restore(&format!("iptables-{variant}-restore"), &text);
            model
                .restore(&text)
                .unwrap_or_else(|why| panic!("{why}\n{text}"));
            let real = namespace.run(&[&format!("iptables-{variant}-save"), "-c", "-t", "nat"]);
            assert_eq!(
                rules_by_chain(&model.save()),
                rules_by_chain(&real),
                "{variant}: {text}"
            );
        }
    }
}

fn rules_by_chain(dump: &str) -> BTreeMap<String, Vec<String>> {
    let nat = dump
        .split("*nat")
        .nth(1)
        .unwrap()
        .split("COMMIT")
        .next()
        .unwrap();
    let mut chains: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in nat.lines().filter(|line| !line.is_empty()) {
        match line.split_once(" -A ") {
            Some((_, rule)) => chains
                .entry(rule.split(' ').next().unwrap().to_owned())
                .or_default()
                .push(rule.to_owned()),
            None => drop(
                chains
                    .entry(line[1..].split(' ').next().unwrap().to_owned())
                    .or_default(),
            ),
        }
    }
    chains
}

/// Typed by hand in the form that the project grew from, it is adopted.
#[test]
fn rules_typed_by_hand_that_mean_the_same_count_as_right() {
    for variant in VARIANTS {
        let namespace = Namespace::new("h");
        let iptables = format!("iptables-{variant}");
        let run = |arguments: &str| {
            let words: Vec<&str> = [iptables.as_str(), "-w"]
                .into_iter()
                .chain(arguments.split(' '))
                .collect();
            namespace.run(&words);
        };
        run("-t nat -N CFENGINE");
        for (every, server) in [(4, 1), (3, 2), (2, 3), (1, 4)] {
            run(&format!(
                "-t nat -A CFENGINE -p tcp -m conntrack --ctstate NEW -m statistic --mode nth --every {every} --packet 0 -j DNAT --to-destination 10.9.0.{server}:5308"
            ));
        }
        run("-t nat -A PREROUTING -p tcp -m tcp --dport 5308 -j CFENGINE");
        let hubs = json!({"name": "CFENGINE", "variant": variant, "destination_port": 5308, "backends": "10.9.0.1:5308,10.9.0.2:5308,10.9.0.3:5308,10.9.0.4:5308"});
        let before = namespace.dump(variant);
        let result = namespace.apply(&hubs);
        assert_eq!(result["changed"], json!(false), "{variant}: {result}");
        assert_eq!(namespace.dump(variant), before);

        run("-t nat -F CFENGINE");
        for (chance, server) in [("0.3000", 1), ("0.42857142857", 2), ("0.7500", 3)] {
            run(&format!(
                "-t nat -A CFENGINE -p tcp -m conntrack --ctstate NEW -m statistic --mode random --probability {chance} -j DNAT --to-destination 10.9.0.{server}:5308"
            ));
        }
        run(
            "-t nat -A CFENGINE -p tcp -m conntrack --ctstate NEW -j DNAT --to-destination 10.9.0.4:5308",
        );
        let random = json!({
            "name": "CFENGINE", "variant": variant, "destination_port": 5308, "mode": "random",
            "backends": "10.9.0.1:5308 weight=30,10.9.0.2:5308 weight=30,10.9.0.3:5308 weight=30,10.9.0.4:5308 weight=10",
        });
        assert_eq!(
            namespace.apply(&random)["changed"],
            json!(false),
            "{variant}"
        );
    }
}

/// Drift is corrected, and nothing else changes.
#[test]
fn drift_is_mended_rule_by_rule() {
    for variant in VARIANTS {
        let namespace = Namespace::new("d");
        let hubs = json!({"name": "W", "variant": variant, "destination_port": 80, "backends": "10.9.0.1,10.9.0.2,10.9.0.3,10.9.0.4"});
        namespace.apply(&hubs);
        let right = namespace.dump(variant);
        let nat = |arguments: &str| {
            let words: Vec<&str> = arguments.split(' ').collect();
            namespace.run(
                &[
                    &[format!("iptables-{variant}").as_str(), "-w", "-t", "nat"],
                    words.as_slice(),
                ]
                .concat(),
            );
        };
        let actions = || {
            let changes = namespace.apply(&hubs)["changes"].clone();
            let actions: Vec<String> = changes
                .as_array()
                .unwrap()
                .iter()
                .map(|change| change["action"].as_str().unwrap().to_owned())
                .collect();
            assert_eq!(namespace.dump(variant), right, "{variant}");
            actions
        };
        nat("-D W 2");
        assert_eq!(actions(), ["insert_rule"]);
        nat("-I W 1 -s 192.0.2.7 -j RETURN");
        assert_eq!(actions(), ["delete_rule"]);
        nat(
            "-R W 3 -p tcp -m statistic --mode nth --every 4 --packet 0 -j DNAT --to-destination 10.9.0.3",
        );
        assert_eq!(actions(), ["replace_rule"]);
        nat("-D W 4");
        assert_eq!(actions(), ["append_rule"]);
        nat("-A PREROUTING -p tcp -m tcp --dport 81 -j W");
        assert_eq!(actions(), ["delete_rule"]);
        nat("-A PREROUTING -p tcp -m multiport --dports 80 -j W");
        assert_eq!(actions(), ["delete_rule"]);
        nat("-D PREROUTING -p tcp -m tcp --dport 80 -j W");
        assert_eq!(actions(), ["append_rule"]);
        nat("-N W/left");
        nat("-A W/left -j RETURN");
        assert_eq!(actions(), ["delete_chain"]);
        nat("-F W");
        assert_eq!(actions(), ["append_rule"; 4]);
    }
}

/// Among rules of others, the jump keeps its place: when it is there twice,
/// when it changes, and when a change is undone.
#[test]
fn the_jump_stays_where_it_is() {
    for variant in VARIANTS {
        let namespace = Namespace::new("j");
        let program = format!("iptables-{variant}-restore");
        let jumps = || {
            let dump = namespace.run(&[&format!("iptables-{variant}-save"), "-c", "-t", "nat"]);
            let rules = dump
                .lines()
                .filter_map(|line| line.split_once(" -A PREROUTING "));
            rules
                .map(|(counters, rule)| format!("{counters} {rule}"))
                .collect::<Vec<_>>()
        };
        let apply = |ports: &str| {
            namespace.apply(&json!({"name": "W", "variant": variant, "destination_port": ports, "backends": "10.9.0.1,10.9.0.2"}))
        };
        apply("80");
        namespace.restore(
            &program,
            "*nat\n-F PREROUTING\n-A PREROUTING -p udp -j ACCEPT\n-A PREROUTING -c 3 30 -p tcp -m tcp --dport 80 -j W\n\
             -A PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 99\n-A PREROUTING -c 5 50 -p tcp -m tcp --dport 80 -j W\n\
             -A PREROUTING -p tcp -m tcp --dport 80 -m comment --comment again -j W\n-A PREROUTING -p sctp -j ACCEPT\nCOMMIT\n",
        );
        let before = jumps();

        // A family that fails: everything is put back, to the place and the counter.
        let refusing = (
            restore_of_ipv6(variant),
            "#!/bin/sh\ncat > /dev/null\nexit 1\n",
        );
        let request = json!({"name": "W", "variant": variant, "destination_port": "80,81", "backends": "10.9.0.2,fd09::1"});
        let said = namespace
            .ask_with_stand_ins(&[refusing], &request)
            .to_string();
        assert!(said.contains("; the host is as before"), "{said}");
        assert_eq!(jumps(), before, "{variant}");

        apply("80");
        assert_eq!(
            jumps(),
            [
                "[0:0] -p udp -j ACCEPT",
                "[3:30] -p tcp -m tcp --dport 80 -j W",
                "[0:0] -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 99",
                "[0:0] -p sctp -j ACCEPT",
            ],
            "{variant}"
        );
        apply("80,443");
        assert_eq!(
            jumps()[1],
            "[0:0] -p tcp -m multiport --dports 80,443 -j W",
            "{variant}"
        );
        assert_eq!(jumps().len(), 4);
    }
}

/// Many runs at once: one after the other changes something, or finds that
/// there is nothing left to do. Nothing is lost, and no jump is there twice.
#[test]
fn runs_at_once_do_not_get_in_each_others_way() {
    for variant in VARIANTS {
        let namespace = Namespace::new("o");
        let request = |backends: &str| json!({"name": "W", "variant": variant, "destination_port": 80, "backends": backends});
        for round in 0..6 {
            let backends = format!("10.9.0.1,10.9.0.{},10.9.0.3", 4 + round);
            let balancers = [80, 81, 90].map(|port| json!({"name": format!("b{port}"), "destination_port": port, "backends": backends}));
            let wanted = match round % 2 {
                0 => request(&backends),
                _ => json!({"name": "W", "variant": variant, "balancers": balancers}),
            };
            let results: Vec<Value> = std::thread::scope(|scope| {
                let runs: Vec<_> = (0..4)
                    .map(|_| scope.spawn(|| namespace.ask(&wanted)))
                    .collect();
                runs.into_iter().map(|run| run.join().unwrap()).collect()
            });
            let changed = results
                .iter()
                .filter(|result| result["changed"] == json!(true))
                .count();
            assert!(
                results
                    .iter()
                    .all(|result| result["failed"] == json!(false)),
                "{results:?}"
            );
            assert_eq!(changed, 1, "{results:?}");
            assert_eq!(namespace.apply(&wanted)["changed"], json!(false));
            assert_eq!(namespace.dump(variant).matches("-A PREROUTING").count(), 1);
        }
    }
}

/// A rule that is replaced for the same backend keeps what it counted.
#[test]
fn counters_are_carried_over() {
    for variant in VARIANTS {
        let namespace = Namespace::new("c");
        let hubs = |backends: &str| json!({"name": "W", "variant": variant, "destination_port": 80, "backends": backends});
        namespace.apply(&hubs("10.9.0.1,10.9.0.2"));
        let counted = "*nat\n-F W\n-A W -c 11 660 -p tcp -m statistic --mode nth --every 2 --packet 0 -j DNAT --to-destination 10.9.0.1\n-A W -c 12 720 -p tcp -j DNAT --to-destination 10.9.0.2\nCOMMIT\n";
        namespace.restore(&format!("iptables-{variant}-restore"), counted);
        let result = namespace.apply(&hubs("10.9.0.2,10.9.0.3,10.9.0.1"));
        let dump = namespace.dump(variant);
        for line in [
            "[12:720] -A W -p tcp -m statistic --mode nth --every 3 --packet 0 -j DNAT --to-destination 10.9.0.2",
            "[0:0] -A W -p tcp -m statistic --mode nth --every 2 --packet 0 -j DNAT --to-destination 10.9.0.3",
            "[11:660] -A W -p tcp -j DNAT --to-destination 10.9.0.1",
        ] {
            assert!(dump.contains(line), "{variant}: {line}\n{dump}\n{result}");
        }
    }
}

/// With chances, one backend of a thousand costs a few rules wherever it
/// stands in the list, and what was counted is not lost.
#[test]
fn in_a_tree_one_backend_changes_few_rules() {
    for variant in VARIANTS {
        let namespace = Namespace::new("w");
        let servers: Vec<String> = (0..1000)
            .map(|n| format!("10.9.{}.{}", n / 200, n % 200 + 1))
            .collect();
        let request = |servers: &[String]| json!({"name": "W", "variant": variant, "mode": "random", "destination_port": 80, "backends": servers});
        namespace.apply(&request(&servers));
        for at in [0, 500, 999] {
            let mut without = servers.clone();
            let gone = without.remove(at);
            let mut heavier = servers.clone();
            heavier[at] = format!("{gone} weight=7");
            for wanted in [&without, &servers, &heavier, &servers] {
                let changes = namespace.apply(&request(wanted))["changes"]
                    .as_array()
                    .unwrap()
                    .len();
                assert!((1..=64).contains(&changes), "{changes} changes at {at}");
                assert_eq!(namespace.apply(&request(wanted))["changed"], json!(false));
            }
        }
    }
}

/// However the weights change, the connections that each backend was given
/// stay counted as long as it has a rule.
#[test]
fn no_change_of_weights_loses_a_count() {
    for variant in VARIANTS {
        let namespace = Namespace::new("v");
        let request = |mode: &str, layout: &str, weights: &str| {
            let weights = weights.split(' ').enumerate();
            let backends: Vec<String> = weights
                .map(|(n, weight)| format!("10.9.0.{} weight={weight}", n + 1))
                .collect();
            json!({"name": "W", "variant": variant, "mode": mode, "layout": layout, "destination_port": 80, "backends": backends})
        };
        let counted = || {
            let mut sums: BTreeMap<String, u64> = BTreeMap::new();
            for line in namespace
                .dump(variant)
                .lines()
                .filter(|line| line.contains("-j DNAT"))
            {
                let packets: u64 = line[1..].split(':').next().unwrap().parse().unwrap();
                *sums
                    .entry(line.rsplit(' ').next().unwrap().to_owned())
                    .or_default() += packets;
            }
            sums
        };
        namespace.apply(&request("nth", "flat", "3 2 2"));
        let dump = namespace.run(&[&format!("iptables-{variant}-save"), "-t", "nat"]);
        let rules = dump.lines().filter_map(|line| line.strip_prefix("-A W "));
        let edits: String = rules
            .enumerate()
            .map(|(at, rule)| format!("-A W -c {} 100 {rule}\n", 10 * (at + 1)))
            .collect();
        namespace.restore(
            &format!("iptables-{variant}-restore"),
            &format!("*nat\n-F W\n{edits}COMMIT\n"),
        );
        let before = counted();
        assert_eq!(before.len(), 3);
        for (mode, layout, weights) in [
            ("nth", "flat", "5 1 1"),
            ("nth", "flat", "33 34 33"),
            ("nth", "flat", "1 1 1"),
            ("nth", "tree", "7 3 5"),
            ("random", "flat", "1 2 3"),
            ("random", "tree", "9 1 1"),
            ("nth", "flat", "97 2 1"),
            ("nth", "flat", "3 2 2"),
        ] {
            let result = namespace.apply(&request(mode, layout, weights));
            assert_eq!(
                counted(),
                before,
                "{variant}: {mode} {layout} {weights}: {result}"
            );
        }
    }
}

#[test]
fn a_mix_of_variants_is_warned_of_and_legacy_is_not_loaded_for_it() {
    let warned = |namespace: &Namespace, variant: &str| {
        let request = json!({"name": "W", "variant": variant, "destination_port": 80, "backends": "10.9.0.1", "check": true});
        namespace.apply(&request)["warnings"].to_string()
    };
    let tables = |namespace: &Namespace| {
        namespace.run(&[
            "cat",
            "/proc/net/ip_tables_names",
            "/proc/net/ip6_tables_names",
        ])
    };
    let legacy = Namespace::new("l");
    assert_eq!(warned(&legacy, "legacy"), "[]");
    assert_eq!(
        (warned(&legacy, "nft"), tables(&legacy)),
        ("[]".into(), String::new())
    );
    legacy.restore(
        "iptables-legacy-restore",
        "*filter\n-A FORWARD -j ACCEPT\nCOMMIT\n",
    );
    assert!(warned(&legacy, "nft").contains("there are rules of iptables-legacy too"));
    legacy.run(&["iptables-legacy", "-w", "-F"]);
    assert_eq!(
        warned(&legacy, "nft"),
        "[]",
        "tables without rules do nothing"
    );

    let nft = Namespace::new("n");
    nft.restore("ip6tables-nft-restore", "*filter\n:X - [0:0]\nCOMMIT\n");
    assert_eq!(
        warned(&nft, "legacy"),
        "[]",
        "chains without rules do nothing"
    );
    nft.restore(
        "ip6tables-nft-restore",
        "*filter\n-A FORWARD -j ACCEPT\nCOMMIT\n",
    );
    assert!(warned(&nft, "legacy").contains("there are rules of iptables-nft too"));
    nft.run(&["nft", "add", "table", "inet", "mine"]);
    nft.run(&["ip6tables-nft", "-F"]);
    assert_eq!(warned(&nft, "legacy"), "[]");
}

/// A table that `nft` made reads as incomprehensible, not as empty.
#[test]
fn a_table_that_iptables_cannot_show_is_refused() {
    let namespace = Namespace::new("i");
    let rules = "table ip nat { chain PREROUTING { type nat hook prerouting priority -100; tcp dport { 80, 81 } dnat to numgen inc mod 2 map { 0 : 10.9.0.1, 1 : 10.9.0.2 }; }; }";
    namespace.run(&["nft", rules]);
    let result = namespace.ask(
        &json!({"name": "W", "variant": "nft", "destination_port": 80, "backends": "10.9.0.1"}),
    );
    assert_eq!(result["failed"], json!(true), "{result}");
    assert!(
        result["msg"]
            .as_str()
            .unwrap()
            .contains("has rules that `nft` made"),
        "{result}"
    );

    // In a table that does not matter it is no reason to refuse, and is said.
    let namespace = Namespace::new("i");
    for table in ["ip filter", "ip6 nat"] {
        let rule = format!("add rule {table} foo meta mark set jhash tcp dport mod 3");
        namespace.run(&[
            "nft",
            &format!("add table {table}; add chain {table} foo; {rule}"),
        ]);
    }
    let request =
        json!({"name": "W", "variant": "nft", "destination_port": 80, "backends": "10.9.0.1"});
    let result = namespace.apply(&request);
    assert!(
        result["warnings"]
            .to_string()
            .contains("IPv6 table `nat` was made by `nft`"),
        "{result}"
    );
    namespace.run(&["nft", "delete table ip6 nat"]);
    let result = namespace.apply(&json!({"name": "W", "variant": "nft", "state": "absent"}));
    assert!(
        result["warnings"]
            .to_string()
            .contains("IPv4 table `filter` was made by `nft`"),
        "{result}"
    );
    assert_eq!(result["changed"], json!(true));
}
