//! Sets of balancers on the model of iptables: the promises that hold for one
//! balancer hold for all, and each connection comes to the first one that claims it.

use iptables_balance::converge::outcome::{Outcome, RunMode};
use iptables_balance::netfilter::shares;
use iptables_balance::netfilter::statistic::Share;
use iptables_balance::netfilter::{ConntrackEntry, Family, Table};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::fake::{Fake, Fault};
use crate::model::{Connection, Model};
use crate::property::{cluttered, foreign, request, run};

/// Balancers with few ports, so that they overlap; what cannot be is left out.
pub fn sets() -> impl Strategy<Value = Value> {
    let port = prop_oneof![
        5 => (1..60_u16).prop_map(|port| json!(port)),
        2 => (1..50_u16, 0..30_u16).prop_map(|(first, more)| json!(format!("{first}:{}", first + more))),
        1 => (1..50_u16, 60..90_u16).prop_map(|(one, other)| json!([one, other])),
        1 => Just(json!("0:65535")),
    ];
    let gateway = prop::sample::select(vec![
        json!({}),
        json!({"forward": false}),
        json!({"masquerade": "no"}),
        json!({"masquerade": "all", "out_interface": "lan0"}),
        json!({"local_traffic": true}),
        json!({"disconnect": "never"}),
    ]);
    let one = (
        0..30_u8,
        port,
        prop::sample::select(vec!["tcp", "udp"]),
        prop::collection::btree_map(0..12_u8, 0..4_u32, 0..4),
        gateway,
        prop::sample::select(vec!["reject", "drop", "pass"]),
        prop::sample::select(vec!["nth", "nth", "random", "hash"]),
    );
    let defaults = prop::sample::select(vec![
        json!({}),
        json!({"forward": true, "masquerade": "balanced"}),
        json!({"local_traffic": true, "persist": {"ipv4": "/a", "ipv6": "/b"}, "ip_forward": true}),
        json!({"jump": "insert", "disconnect": "always", "layout": "tree"}),
    ]);
    let present = (prop::collection::vec(one, 0..20), defaults).prop_map(|(all, defaults)| {
        let mut set = json!({"name": "W", "balancers": []});
        set.as_object_mut()
            .unwrap()
            .extend(defaults.as_object().unwrap().clone());
        for (name, port, protocol, backends, gateway, empty, mode) in all {
            let backend = |(number, weight): (u8, u32)| match number {
                9.. => json!({"address": format!("fd09::{number}"), "weight": weight}),
                _ => json!({"address": format!("10.9.0.{number}"), "port": 80, "weight": weight}),
            };
            let backends: Vec<Value> = backends.into_iter().map(backend).collect();
            let name = match name {
                29 => "filter".to_owned(),
                name => format!("b{name}"),
            };
            let mut balancer = json!({
                "name": name, "destination_port": port, "protocol": protocol, "backends": backends,
                "when_empty": empty, "mode": mode,
            });
            balancer
                .as_object_mut()
                .unwrap()
                .extend(gateway.as_object().unwrap().clone());
            set["balancers"].as_array_mut().unwrap().push(balancer);
            let object = set.as_object().unwrap().clone();
            if iptables_balance::request::Request::from_json(object).is_err() {
                set["balancers"].as_array_mut().unwrap().pop();
            }
        }
        set
    });
    let single = json!({"name": "W", "destination_port": 80, "backends": "10.9.0.1,10.9.0.2", "forward": true, "layout": "tree"});
    prop_oneof![
        9 => present,
        1 => Just(json!({"name": "W", "state": "absent"})),
        1 => Just(single),
    ]
}

fn clutter() -> impl Strategy<Value = Vec<&'static str>> {
    prop::collection::vec(
        prop::sample::select(vec![
            "-A PREROUTING -p tcp -m tcp --dport 80 -j DOCKER",
            "-I PREROUTING -p udp -m udp --dport 53 -j WX",
            "-A PREROUTING -p tcp -j W",
            "-A DOCKER -p tcp -g W/old",
            "-A OUTPUT -j W",
            "-A W -j RETURN",
            "-A W -g W/old",
            "-A W/old -j W/older",
            "-A W/old -p tcp -j DNAT --to-destination 10.9.0.8:80",
        ]),
        0..6,
    )
}

fn is_of(family: Family, backend: &Value) -> bool {
    backend["address"].as_str().unwrap().contains(':') == (family == Family::Ipv6)
}

/// The balancer that gets a connection, by plain reading of the request.
fn first(set: &Value, family: Family, connection: Connection) -> Option<Value> {
    let ports = |balancer: &Value| -> Vec<String> {
        match &balancer["destination_port"] {
            Value::Array(all) => all.iter().map(ToString::to_string).collect(),
            other => vec![other.as_str().map_or(other.to_string(), str::to_owned)],
        }
    };
    let claims = |balancer: &&Value| {
        let backends = balancer["backends"].as_array().unwrap();
        let of_family: Vec<_> = backends.iter().filter(|one| is_of(family, one)).collect();
        let is_used = backends.is_empty() || !of_family.is_empty();
        let is_empty = of_family.iter().all(|backend| backend["weight"] == 0);
        let is_port = ports(balancer).iter().any(|text| {
            let (first, last) = text.split_once(':').unwrap_or((text, text));
            (first.parse().unwrap()..=last.parse().unwrap()).contains(&connection.port)
        });
        let passes = is_empty && balancer["when_empty"] == "pass";
        is_used && is_port && !passes && balancer["protocol"] == connection.protocol
    };
    set["balancers"]
        .as_array()
        .unwrap()
        .iter()
        .find(claims)
        .cloned()
}

fn balancers(set: &Value) -> usize {
    set["balancers"].as_array().map_or(0, Vec::len)
}

/// Follows connections to every port.
fn assert_first_wins(host: &Fake, set: &Value) {
    for family in Family::BOTH {
        for protocol in ["tcp", "udp"] {
            for port in (0..95).chain([400, 65_535]) {
                let connection = Connection { protocol, port };
                let wanted = first(set, family, connection);
                if wanted
                    .as_ref()
                    .is_some_and(|balancer| balancer["mode"] != "nth")
                {
                    continue;
                }
                let got = host.model(family).lock().unwrap().connect(connection);
                let serving: Vec<String> = wanted
                    .iter()
                    .flat_map(|balancer| balancer["backends"].as_array().unwrap())
                    .filter(|backend| is_of(family, backend) && backend["weight"] != 0)
                    .map(|backend| {
                        let address = backend["address"].as_str().unwrap();
                        match family {
                            Family::Ipv4 => format!("{address}:80"),
                            Family::Ipv6 => address.to_owned(),
                        }
                    })
                    .collect();
                match got {
                    Some(server) => assert!(
                        serving.contains(&server),
                        "{protocol} {port}: {server} is not of {wanted:?} in {set}"
                    ),
                    None => assert!(
                        serving.is_empty(),
                        "{protocol} {port}: nobody, not {wanted:?} in {set}\n{}",
                        host.dump()
                    ),
                }
            }
        }
    }
}

/// One dump and at most one restore for each family.
fn assert_few_programs(host: &Fake, outcome: &Outcome) {
    assert!(*host.restores.lock().unwrap() <= 2, "{:?}", outcome.steps);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: std::env::var("CASES").map_or(150, |cases| cases.parse().unwrap()), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_set_converges_in_one_run_and_the_first_claim_wins(one in sets(), two in sets(), clutter in clutter()) {
        let host = Fake::new(cluttered(false, &clutter), cluttered(true, &clutter));
        prop_assert_eq!(run(&host, &one, RunMode::Apply).failure, None);
        let others = foreign(&host.dump());
        let predicted = run(&host, &two, RunMode::Check);
        *host.restores.lock().unwrap() = 0;
        let done = run(&host, &two, RunMode::Apply);
        prop_assert_eq!(&done.failure, &None);
        assert_few_programs(&host, &done);
        prop_assert_eq!(&predicted.steps.changes, &done.steps.changes);
        prop_assert_eq!(&predicted.steps.effects, &done.steps.effects);
        prop_assert_eq!(&foreign(&host.dump()), &others);

        let again = run(&host, &two, RunMode::Apply);
        prop_assert!(again.steps.is_empty(), "{:?}", again.steps);
let has_rules = foreign(&host.dump()).len() < host.dump().lines().count();
        prop_assert_eq!(has_rules, two["state"] != "absent" && (two["balancers"].is_null() || balancers(&two) > 0));

        for (balancer, pool) in request(&two).pools() {
            let found = shares::shares_of_chain(again.before.rules[&pool.family].owned(Table::Nat), &balancer.chain);
            let found: Vec<_> = pool.backends.iter().map(|backend| found.get(&backend.endpoint).copied().unwrap_or(Share::NONE)).collect();
            prop_assert_eq!(pool.arrangement.shares(pool.backends.len()), found);
        }
        let is_quiet = clutter.iter().all(|line| line.starts_with("-A W") || line.ends_with("-j W"));
        if balancers(&two) > 0 && is_quiet {
            assert_first_wins(&host, &two);
        }
    }

    #[test]
    fn a_failed_step_is_rolled_back_for_all_balancers(one in sets(), two in sets(), clutter in clutter(), at in 0..2_usize,
                            fault in prop::sample::select(vec![Fault::Refuse, Fault::Lie, Fault::Deny, Fault::Half, Fault::Spoil])) {
        let mut host = Fake::new(cluttered(false, &clutter), cluttered(true, &clutter));
        run(&host, &one, RunMode::Apply);
        for port in 0..60 {
            let connection = Connection { protocol: "tcp", port };
            host.model(Family::Ipv4).lock().unwrap().connect(connection);
        }
        let before = host.dump();
        *host.restores.lock().unwrap() = 0;
        host.faults = vec![(at, fault)];
        let outcome = run(&host, &two, RunMode::Apply);
        if let Some(failure) = outcome.failure {
            prop_assert!(failure.ends_with("; the host is as before"), "{failure}");
            prop_assert_eq!(host.dump(), before);
        } else {
            host.faults.clear();
            prop_assert_eq!(run(&host, &two, RunMode::Apply).steps.changes, vec![]);
        }
    }
}

/// A connection of a client to a port of the gateway, answered by a backend.
fn entry(protocol: u8, port: u16, backend: &str) -> (Family, ConntrackEntry) {
    let entry = ConntrackEntry {
        protocol,
        source: "198.51.100.7".parse().unwrap(),
        source_port: 4000,
        destination: "192.0.2.1".parse().unwrap(),
        port,
        reply_source: (backend.parse().unwrap(), 80),
        is_closed: false,
    };
    (Family::Ipv4, entry)
}

/// The connections that are left after a change from one set to another.
fn left(before: &Value, after: &Value, connections: &[(Family, ConntrackEntry)]) -> Vec<u16> {
    let host = Fake::new(Model::new(false), Model::new(true));
    assert_eq!(run(&host, before, RunMode::Apply).failure, None);
    *host.connections.lock().unwrap() = connections.to_vec();
    let predicted = run(&host, after, RunMode::Check);
    let done = run(&host, after, RunMode::Apply);
    assert_eq!(done.failure, None);
    assert_eq!(predicted.steps.effects, done.steps.effects);
    let left = host.connections.lock().unwrap();
    left.iter().map(|(_, entry)| entry.port).collect()
}

#[test]
fn connections_end_as_their_balancer_says() {
    let balancer = |name: &str, port: u16, backends: &str, disconnect: &str| json!({"name": name, "destination_port": port, "backends": backends, "disconnect": disconnect});
    let set = |disconnect: &str, balancers: Value| json!({"name": "W", "disconnect": disconnect, "balancers": balancers});
    let both = "10.9.0.1:80,10.9.0.2:80";
    let before = set(
        "udp",
        json!([
            balancer("a", 80, both, "always"),
            balancer("b", 81, both, "never"),
            balancer("c", 82, both, "always"),
        ]),
    );
    let connections: Vec<_> = [80, 81, 82, 83]
        .map(|port| entry(6, port, "10.9.0.2"))
        .into();
    // The backend leaves two balancers, and stays with the third.
    let after = set(
        "udp",
        json!([
            balancer("a", 80, "10.9.0.1:80", "always"),
            balancer("b", 81, "10.9.0.1:80", "never"),
            balancer("c", 82, both, "always"),
        ]),
    );
    assert_eq!(left(&before, &after, &connections), [81, 82, 83]);
    // Of a balancer that is not listed any more the set decides.
    let gone = json!([balancer("c", 82, both, "always")]);
    assert_eq!(
        left(&before, &set("udp", gone.clone()), &connections),
        [80, 81, 82, 83]
    );
    assert_eq!(left(&before, &set("always", gone), &connections), [82, 83]);
    let absent = json!({"name": "W", "state": "absent", "disconnect": "always"});
    assert_eq!(left(&before, &absent, &connections), [83]);
    // A balancer with another name and the same backends goes on with them.
    let renamed = json!([
        balancer("x", 80, both, "always"),
        balancer("c", 82, both, "always")
    ]);
    assert_eq!(
        left(&before, &set("always", renamed), &connections),
        [80, 82, 83]
    );
    // So does a single balancer that becomes one of a set, and back.
    let single =
        json!({"name": "W", "destination_port": 80, "backends": both, "disconnect": "always"});
    let of_set = set("always", json!([balancer("a", 80, both, "always")]));
    assert_eq!(left(&single, &of_set, &connections), [80, 81, 82, 83]);
    assert_eq!(left(&of_set, &single, &connections), [80, 81, 82, 83]);
    let other = set(
        "always",
        json!([balancer("a", 80, "10.9.0.1:80", "always")]),
    );
    assert_eq!(left(&single, &other, &connections), [81, 82, 83]);
}

/// Of 500 balancers one backend leaves: the others' rules are not touched, and the
/// report says which balancer changed.
#[test]
fn a_change_of_one_balancer_is_told_and_touches_no_other() {
    let set = |odd: &str| {
        let balancer = |number: u16| {
            let backends = if number == 250 {
                odd
            } else {
                "10.9.0.1,10.9.0.2"
            };
            json!({"name": format!("b{number}"), "destination_port": 1000 + number, "backends": backends})
        };
        json!({"name": "W", "balancers": (0..500).map(balancer).collect::<Vec<_>>()})
    };
    let host = Fake::new(Model::new(false), Model::new(true));
    run(&host, &set("10.9.0.1,10.9.0.2"), RunMode::Apply);
    let wanted = set("10.9.0.1");
    let outcome = run(&host, &wanted, RunMode::Apply);
    assert!(
        outcome
            .steps
            .changes
            .iter()
            .all(|change| &*change.chain == "W/b250")
    );
    let report = iptables_balance::report::Report::new(
        request(&wanted),
        outcome,
        iptables_balance::report::Prewriter::default(),
        RunMode::Apply,
    );
    let report = report.with_diff();
    assert_eq!(
        report.msg,
        "the set `W` was updated with 500 balancers over 999 backends: changed `b250`, with 2 changes"
    );
    let changed = report
        .balancers
        .as_ref()
        .unwrap()
        .iter()
        .filter(|one| one.changed);
    assert_eq!(
        changed.map(|one| one.name.as_str()).collect::<Vec<_>>(),
        ["b250"]
    );
    let diff = report.diff.as_ref().unwrap();
    assert!(
        diff.before.lines().count() <= 4 && diff.after.lines().count() <= 3,
        "{diff:?}"
    );
    let value = serde_json::to_value(&report).unwrap();
    assert_eq!(value["distribution"][500]["balancer"], "b250");
    assert_eq!(
        value["balancers"][250],
        json!({"name": "b250", "changed": true})
    );
}

#[test]
fn one_of_two_thousand_balancers_changes_few_rules() {
    let set = |left_out: Option<u16>| {
        let numbers = (0..2000).filter(|number| Some(*number) != left_out);
        let balancer = |number: u16| json!({"name": format!("b{number}"), "destination_port": 1000 + number * 7 % 60_000, "backends": "10.9.0.1"});
        json!({"name": "W", "masquerade": true, "forward": true, "balancers": numbers.map(balancer).collect::<Vec<_>>()})
    };
    let host = Fake::new(Model::new(false), Model::new(true));
    run(&host, &set(None), RunMode::Apply);
    for number in [0, 999, 1999] {
        let gone = run(&host, &set(Some(number)), RunMode::Apply);
        assert!(gone.steps.len() <= 64, "{}", gone.steps.len());
        let back = run(&host, &set(None), RunMode::Apply);
        assert!(back.steps.len() <= 64, "{}", back.steps.len());
    }
}
