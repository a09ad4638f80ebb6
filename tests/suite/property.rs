//! Any dump, any request: on the model of iptables it converges in one run,
//! leaves every foreign rule as it was, and the second run does nothing.

use std::collections::BTreeMap;
use std::ops::Range;

use iptables_balance::converge::converge;
use iptables_balance::converge::outcome::{Outcome, RunMode};
use iptables_balance::converge::prefetch::Prefetch;
use iptables_balance::diff::change::Kind;
use iptables_balance::host::Scope;
use iptables_balance::netfilter::shares;
use iptables_balance::netfilter::statistic::Share;
use iptables_balance::netfilter::{Family, Table};
use iptables_balance::request::Request;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::fake::{Broken, Fake, Fault};
use crate::model::{Connection, Model};

pub fn request(value: &Value) -> Request {
    Request::from_json(value.as_object().unwrap().clone()).unwrap()
}

pub fn run(host: &Fake, value: &Value, run: RunMode) -> Outcome {
    let request = request(value);
    let begun = Prefetch::begin(host, &request.name, Scope::Only(Table::Nat), None);
    converge(host, &request, run, &mut begun.finish()).unwrap()
}

/// The lines of a dump that are not the balancer's, without counters.
pub fn foreign(dump: &str) -> Vec<String> {
    let ours = |line: &&str| {
        let mut words = line.split(' ');
        words.any(|word| {
            word == "W" || word.starts_with("W/") || word == ":W" || word.starts_with(":W/")
        })
    };
    dump.lines()
        .filter(|line| !ours(line))
        .map(str::to_owned)
        .collect()
}

fn backends(weights: Range<u32>) -> impl Strategy<Value = Vec<Value>> {
    let ipv4 = (1..9_u8, prop::option::of(1..3_u16), weights.clone())
        .prop_map(|(host, port, weight)| (format!("10.9.0.{host}"), port, weight));
    let ipv6 = (1..5_u8, prop::option::of(1..3_u16), weights)
        .prop_map(|(host, port, weight)| (format!("fd09::{host}"), port, weight));
    let backend = prop_oneof![3 => ipv4, 1 => ipv6];
    let some = prop::collection::vec(backend.clone(), 1..9);
    // Enough for chains below chains, also by chance.
    let many = prop::collection::vec(backend, 24..40);
    prop_oneof![3 => some, 1 => many].prop_map(|mut list| {
        list.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
        list.dedup_by(|a, b| (&a.0, a.1) == (&b.0, b.1));
        let entry = |(address, port, weight): (String, Option<u16>, u32)| json!({"address": address, "port": port, "weight": weight});
        list.into_iter().map(entry).collect()
    })
}

/// The gateway around the chain, each part in some of its forms.
fn gateways() -> impl Strategy<Value = Value> {
    let masquerade = prop::sample::select(vec![
        json!({}),
        json!({"masquerade": "balanced"}),
        json!({"masquerade": "balanced", "out_interface": "lan0"}),
        json!({"masquerade": "all", "out_interface": "lan0"}),
    ]);
    let persist = prop::sample::select(vec![
        json!(null),
        json!(true),
        json!({"ipv4": "/a", "ipv6": "/b"}),
    ]);
    let empty = prop::sample::select(vec!["reject", "drop", "pass"]);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (flags, masquerade, persist, empty).prop_map(
        |((local, forward, ip_forward), mut gateway, persist, empty)| {
            gateway["local_traffic"] = json!(local);
            gateway["forward"] = json!(forward);
            gateway["ip_forward"] = json!(ip_forward);
            gateway["persist"] = persist;
            gateway["when_empty"] = json!(empty);
            gateway["disconnect"] = json!("always");
            gateway
        },
    )
}

/// Requests that the program accepts.
fn requests() -> impl Strategy<Value = Value> {
    requests_with(0..6)
}

/// The same, with these weights.
pub fn requests_with(weights: Range<u32>) -> impl Strategy<Value = Value> {
    let ports = prop_oneof![
        Just(json!(80)),
        Just(json!("80,443")),
        Just(json!("1000:2000")),
        Just(json!("0:65535"))
    ];
    let attributes = (
        backends(weights),
        prop::sample::select(vec!["nth", "random", "hash"]),
        prop::sample::select(vec!["tcp", "udp", "sctp", "dccp"]),
        ports,
        prop::sample::select(vec!["append", "insert"]),
        prop::option::of(prop::sample::select(vec!["eth0", "wan+"])),
        any::<bool>(),
        prop::sample::select(vec!["auto", "flat", "tree"]),
        prop_oneof![1 => Just(json!({})), 1 => gateways()],
    );
    let present = attributes.prop_filter_map("not accepted", |(backends, mode, protocol, port, jump, interface, local, layout, gateway)| {
        let mut value = json!({
            "name": "W", "backends": backends, "mode": mode, "protocol": protocol, "destination_port": port, "jump": jump,
            "in_interface": interface, "layout": layout, "destination": local.then_some("local"),
        });
        value.as_object_mut().unwrap().extend(gateway.as_object().unwrap().clone());
        Request::from_json(value.as_object().unwrap().clone()).is_ok().then_some(value)
    });
    prop_oneof![9 => present, 1 => Just(json!({"name": "W", "state": "absent"}))]
}

/// Foreign rules, some of which look like ours, and hand-made rules in our
/// chain.
fn clutter() -> impl Strategy<Value = Vec<&'static str>> {
    prop::collection::vec(
        prop::sample::select(vec![
            "-A PREROUTING -p tcp -m tcp --dport 80 -j DOCKER",
            "-A PREROUTING -m comment --comment \"to -j W\" -j DOCKER",
            "-A PREROUTING -m comment --comment \"it's \\\"W\\\"\" -j ACCEPT",
            "-I PREROUTING -p udp -m udp --dport 53 -j WX",
            "-A PREROUTING -p tcp -m tcp --dport 80 -j W",
            "-A PREROUTING -p tcp --dport 80 -j W",
            "-A PREROUTING -p 6 -m multiport --dports 80 -m comment --comment mine -j W",
            "-I PREROUTING -p tcp -m multiport --dports 443,80 -j W",
            "-A PREROUTING -p tcp -j W",
            "-A DOCKER -p tcp -g W/old",
            "-A OUTPUT -j W",
            "-A WX -j RETURN",
            "-A W -j RETURN",
            "-I W -p tcp -m conntrack --ctstate NEW -m statistic --mode nth --every 2 --packet 0 -j DNAT --to-destination 10.9.0.1",
            "-A W -m statistic --mode random --probability 0.5 -j DNAT --to-destination 10.9.0.2",
            "-A W -g W/old",
            "-A W/old -j W/older",
        ]),
        0..10,
    )
}

pub fn cluttered(ipv6: bool, lines: &[&str]) -> Model {
    let mut model = Model::new(ipv6);
    model
        .restore(
            "*nat\n:DOCKER - [0:0]\n:WX - [0:0]\nCOMMIT\n*filter\n-A FORWARD -j DROP\nCOMMIT\n",
        )
        .unwrap();
    if !lines.is_empty() {
        let usable = lines.iter().filter(|line| !ipv6 || !line.contains("10.9."));
        let text: String = usable.map(|line| format!("{line}\n")).collect();
        model
            .restore(&format!(
                "*nat\n:W - [0:0]\n:W/old - [0:0]\n:W/older - [0:0]\n{text}COMMIT\n"
            ))
            .unwrap();
    }
    model
}

/// The exact turns of a family, by following connections through the model.
fn assert_exact(host: &Fake, value: &Value, family: Family) {
    let list: Vec<&Value> = value["backends"].as_array().into_iter().flatten().collect();
    let of_family = |backend: &&&Value| {
        backend["address"].as_str().unwrap().contains(':') == (family == Family::Ipv6)
    };
    let pool: Vec<&&Value> = list.iter().filter(of_family).collect();
    let sum: u64 = pool
        .iter()
        .filter_map(|backend| backend["weight"].as_u64())
        .sum();
    let mut turns: BTreeMap<String, u64> = BTreeMap::new();
    let connection = Connection {
        protocol: value["protocol"].as_str().unwrap(),
        port: if value["destination_port"] == "1000:2000" {
            1500
        } else {
            80
        },
    };
    for _ in 0..sum {
        let server = host
            .model(family)
            .lock()
            .unwrap()
            .connect(connection)
            .expect("balanced");
        *turns.entry(server).or_default() += 1;
    }
    for backend in pool {
        let address = backend["address"].as_str().unwrap();
        let server = match (backend["port"].as_u64(), family) {
            (None, _) => address.to_owned(),
            (Some(port), Family::Ipv4) => format!("{address}:{port}"),
            (Some(port), Family::Ipv6) => format!("[{address}]:{port}"),
        };
        assert_eq!(
            turns.get(&server).copied().unwrap_or(0),
            backend["weight"].as_u64().unwrap(),
            "{server} of {value}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: std::env::var("CASES").map_or(600, |cases| cases.parse().unwrap()), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_dump_and_any_request_converge_in_one_run(first in requests(), second in requests(), clutter in clutter()) {
        let host = Fake::new(cluttered(false, &clutter), cluttered(true, &clutter));
        let kept = [("/a", Family::Ipv4), ("/b", Family::Ipv6)].map(|(path, family)| (path, host.model(family).lock().unwrap().save()));
        host.files.lock().unwrap().extend(kept.clone().map(|(path, text)| (path.into(), text.into_bytes())));
        prop_assert_eq!(run(&host, &first, RunMode::Apply).failure, None);
        let others = foreign(&host.dump());

        let predicted = run(&host, &second, RunMode::Check);
        let done = run(&host, &second, RunMode::Apply);
        prop_assert_eq!(done.failure, None);
        prop_assert_eq!(&predicted.steps.changes, &done.steps.changes);
        prop_assert_eq!(&predicted.steps.effects, &done.steps.effects);
        prop_assert_eq!(&foreign(&host.dump()), &others);

        let restores = *host.restores.lock().unwrap();
        let again = run(&host, &second, RunMode::Apply);
        prop_assert!(again.steps.is_empty(), "{:?}", again.steps);
        prop_assert_eq!(*host.restores.lock().unwrap(), restores);

        // The files lose and gain no foreign line.
        for (path, text) in kept {
            let now = String::from_utf8(host.files.lock().unwrap()[std::path::Path::new(path)].clone()).unwrap();
            prop_assert_eq!(foreign(&now), foreign(&text));
        }

        // The shares of the arrangement are those of the rules.
        for (_, pool) in request(&second).pools() {
            let found = shares::shares_of_chain(again.before.rules[&pool.family].owned(Table::Nat), "W");
            let found: Vec<_> = pool.backends.iter().map(|backend| found.get(&backend.endpoint).copied().unwrap_or(Share::NONE)).collect();
            prop_assert_eq!(pool.arrangement.shares(pool.backends.len()), found);
        }

        // The predicted state is the observed one.
        let texts = |state: &iptables_balance::converge::outcome::HostState| {
            let owned = state.rules.values().flat_map(|ruleset| ruleset.tables.values());
            owned.map(|owned| (owned.chains.clone(), owned.jumps.iter().map(|lead| lead.rule.shown()).collect::<Vec<_>>())).map(|(chains, leads)| {
                let chains: Vec<_> = chains.into_iter().map(|(name, chain)| (name, chain.rules.iter().filter_map(|rule| rule.meaning.clone()).collect::<Vec<_>>())).collect();
                (chains, leads.len())
            }).collect::<Vec<_>>()
        };
        prop_assert_eq!(texts(&predicted.after), texts(&again.before));
        if second["state"] == "absent" {
            prop_assert!(!host.dump().contains(" W\n") && !host.dump().contains(":W "), "{}", host.dump());
        }
    }

    #[test]
    fn from_a_fresh_start_turns_are_exact(first in requests(), clutter in clutter()) {
        prop_assume!(first["state"] != "absent");
        let mut first = first;
        first["mode"] = json!("nth");
        first["in_interface"] = Value::Null;
        let quiet: Vec<_> = clutter.into_iter().filter(|line| line.starts_with("-A W") || line.ends_with("-j W")).collect();
        let host = Fake::new(cluttered(false, &quiet), cluttered(true, &quiet));
        prop_assert_eq!(run(&host, &first, RunMode::Apply).failure, None);
        for family in Family::BOTH {
            if first["backends"].as_array().unwrap().iter().any(|backend| backend["address"].as_str().unwrap().contains(':') == (family == Family::Ipv6)) {
                assert_exact(&host, &first, family);
            }
        }
    }

    /// Each restore in turn refused, not done, done but denied, and spoiled; all
    /// else failing or not done.
    #[test]
    fn a_failed_step_is_rolled_back(first in requests(), second in requests(), clutter in clutter(), at in 0..2_usize,
                            fault in prop::sample::select(vec![Fault::Refuse, Fault::Lie, Fault::Deny, Fault::Half, Fault::Spoil]),
                            broken in prop::option::of(prop::sample::select(vec![
                                ("forwarding", Broken::Fails), ("store", Broken::Fails), ("connections", Broken::Fails),
                                ("forwarding", Broken::Lies), ("store", Broken::Lies),
                            ])),
                            forwarding_off in any::<bool>()) {
        let mut host = Fake::new(cluttered(false, &clutter), cluttered(true, &clutter));
        run(&host, &first, RunMode::Apply);
        for family in Family::BOTH {
            let connection = Connection { protocol: "tcp", port: 80 };
            (0..7).for_each(|_| drop(host.model(family).lock().unwrap().connect(connection)));
        }
        if forwarding_off {
            host.forwarding.lock().unwrap().clear();
        }
        let before = host.dump();
        let surroundings = (host.forwarding.lock().unwrap().clone(), host.files.lock().unwrap().clone());
        *host.restores.lock().unwrap() = 0;
        match broken {
            None => host.faults = vec![(at, fault)],
            Some(_) => host.broken = broken,
        }
        let outcome = run(&host, &second, RunMode::Apply);
        if let Some(failure) = outcome.failure {
            prop_assert!(failure.ends_with("; the host is as before"), "{failure}");
            prop_assert_eq!(host.dump(), before);
            prop_assert!(outcome.steps.is_empty());
            let now = (host.forwarding.lock().unwrap().clone(), host.files.lock().unwrap().clone());
            prop_assert_eq!(now, surroundings);
        } else {
            host.faults.clear();
            host.broken = None;
            prop_assert_eq!(run(&host, &second, RunMode::Apply).steps.changes, vec![]);
        }
    }
}

#[test]
fn a_failed_rollback_says_what_is_left() {
    let both = |last: u8| json!({"name": "W", "destination_port": 80, "backends": [format!("10.9.0.{last}"), format!("fd09::{last}")]});
    let mut host = Fake::new(Model::new(false), Model::new(true));
    host.faults = vec![(1, Fault::Refuse), (2, Fault::Refuse)];
    let outcome = run(&host, &both(1), RunMode::Apply);
    assert_eq!(
        outcome.failure.unwrap(),
        "refused; undoing it failed too (refused); rollback is incomplete, still needed: ipv4 nat delete_rule PREROUTING `-p tcp -m tcp --dport 80 -j W`, ipv4 nat delete_chain W"
    );
    assert!(!outcome.steps.changes.is_empty());
    let left = &outcome.after.rules[&Family::Ipv6];
    assert!(left.is_empty(), "{left:?}");
}

/// A prefetch is of an earlier moment: before something is written all is read
/// again.
#[test]
fn a_change_after_the_prefetch_is_seen() {
    let value = json!({"name": "W", "destination_port": 80, "backends": "10.9.0.1"});
    let host = Fake::new(Model::new(false), Model::new(true));
    let wanted = request(&value);
    let mut prefetch = Prefetch::begin(&host, &wanted.name, Scope::Only(Table::Nat), None).finish();
    assert_eq!(run(&host, &value, RunMode::Apply).failure, None);
    let after = host.dump();
    let late = converge(&host, &wanted, RunMode::Apply, &mut prefetch).unwrap();
    assert_eq!(late.failure, None);
    assert!(late.steps.is_empty(), "{:?}", late.steps);
    assert_eq!(host.dump(), after);
}

/// Somebody else writes right after us: the diff is computed again, but not
/// forever.
#[test]
fn concurrent_damage_is_repaired_a_few_times() {
    let request = json!({"name": "W", "destination_port": 80, "backends": "10.9.0.1"});
    let spoiled = |times: usize| {
        let mut host = Fake::new(Model::new(false), Model::new(true));
        host.faults = (0..times).map(|at| (at, Fault::Spoil)).collect();
        (run(&host, &request, RunMode::Apply), host)
    };
    let (mended, host) = spoiled(1);
    assert_eq!(mended.failure, None);
    assert!(run(&host, &request, RunMode::Apply).steps.is_empty());
    // All of that is told: the rule went in twice, since somebody took it out.
    let kinds: Vec<_> = mended
        .steps
        .changes
        .iter()
        .map(|step| (&*step.chain, step.action.kind()))
        .collect();
    let twice = ("W", Kind::AppendRule);
    assert_eq!(
        kinds,
        [
            ("W", Kind::CreateChain),
            twice,
            ("PREROUTING", Kind::AppendRule),
            twice
        ]
    );
    let (given_up, host) = spoiled(2);
    let failure = given_up.failure.unwrap();
    assert!(
        failure.contains("reading them again shows something else"),
        "{failure}"
    );
    assert!(failure.ends_with("; the host is as before"), "{failure}");
    assert!(!host.dump().contains(":W"));
}

/// The first of two jumps that mean the same stays where it is; rules that are
/// right keep their counters and their place in the turns.
#[test]
fn right_rules_are_not_touched() {
    let mut model = Model::new(false);
    model
        .restore(
            "*nat\n:W - [0:0]\n-A PREROUTING -p udp -j ACCEPT\n-A PREROUTING -p tcp -m multiport --dports 80 -m comment --comment \"by hand\" -j W\n\
             -A PREROUTING -j ACCEPT\n-A W -c 7 420 -p tcp -m conntrack --ctstate NEW -m statistic --mode nth --every 2 --packet 0 -j DNAT --to-destination 10.9.0.1\n\
             -A W -c 6 360 -m conntrack --ctstate NEW -m statistic --mode nth --every 1 --packet 0 -j DNAT --to-destination 10.9.0.2\nCOMMIT\n",
        )
        .unwrap();
    let host = Fake::new(model.clone(), Model::new(true));
    let two = json!({"name": "W", "destination_port": 80, "backends": "10.9.0.1,10.9.0.2"});
    assert_eq!(run(&host, &two, RunMode::Apply).steps.changes, []);
    assert_eq!(*host.ipv4.lock().unwrap(), model);

    // A third server: the other two rules stay as they are, or keep their counters.
    let three =
        json!({"name": "W", "destination_port": 80, "backends": "10.9.0.3,10.9.0.1,10.9.0.2"});
    let changes = run(&host, &three, RunMode::Apply).steps.changes;
    assert_eq!(changes.len(), 1, "{changes:?}");
    let dump = host.dump();
    assert!(
        dump.contains("[7:420] -A W -p tcp -m conntrack")
            && dump.contains("[6:360] -A W -m conntrack"),
        "{dump}"
    );

    let weights = json!({"name": "W", "destination_port": 80, "mode": "random", "backends": "10.9.0.3,10.9.0.1,10.9.0.2"});
    run(&host, &weights, RunMode::Apply);
    let dump = host.dump();
    assert!(
        dump.contains("[7:420] -A W -p tcp -m statistic --mode random --probability 0.5"),
        "{dump}"
    );
}
