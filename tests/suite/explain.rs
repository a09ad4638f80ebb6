//! Shares and mistakes of any chains: recorded dumps, random chains on the model,
//! everything that this program makes, and dumps that are broken.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use iptables_balance::explain::{Code, ExplainedChain, Explanation, HostFacts, explain, read};
use iptables_balance::frontend::schema::Kind;
use iptables_balance::frontend::seeing;
use iptables_balance::frontend::terminal::Style;
use iptables_balance::netfilter::Family;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::dice::Dice;
use crate::fake::Fake;
use crate::model::{Connection, Model};
use crate::spec::{ROOT, assert_fresh, schema};
use crate::{property, sets};

pub fn explained(dump: &str) -> Explanation {
    let tables = read(dump.as_bytes(), None).unwrap_or_else(|error| panic!("{error}\n{dump}"));
    explain(&tables, &[], &HostFacts::default())
}

pub fn of_rules(rules: &[&str]) -> ExplainedChain {
    let lines: String = rules.iter().map(|rule| format!("-A {rule}\n")).collect();
    let names = ["W", "W/a", "W/b", "W/c"].map(|name| format!(":{name} - [0:0]\n"));
    let dump = format!(
        "*nat\n:PREROUTING ACCEPT [0:0]\n{}-A PREROUTING -p tcp -m tcp --dport 80 -j W\n{lines}COMMIT\n",
        names.concat()
    );
    let mut chains = explained(&dump).chains.into_iter();
    chains.find(|chain| chain.chain == "W").unwrap()
}

fn fractions(rules: &[&str]) -> Vec<String> {
    let chain = of_rules(rules);
    let shares = chain.shares.into_iter();
    shares
        .map(|share| share.fraction.unwrap_or_default())
        .collect()
}

pub fn codes(explanation: &Explanation) -> Vec<(String, Code)> {
    let chains = explanation.chains.iter();
    let of_chains = chains.flat_map(|chain| {
        let findings = chain.findings.iter();
        findings.map(|finding| (chain.chain.clone(), finding.code))
    });
    let others = explanation
        .findings
        .iter()
        .map(|finding| (String::new(), finding.code));
    of_chains.chain(others).collect()
}

pub const TO: [&str; 4] = [
    "-j DNAT --to-destination 10.0.0.1",
    "-j DNAT --to-destination 10.0.0.2",
    "-j DNAT --to-destination 10.0.0.3",
    "-j DNAT --to-destination 10.0.0.4",
];

pub fn nth(every: u32, packet: u32) -> String {
    format!("-m statistic --mode nth --every {every} --packet {packet}")
}

#[test]
fn recorded_dumps_are_explained_as_recorded() {
    let folder = Path::new(ROOT).join("tests/explained");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|ending| ending != "txt") {
            continue;
        }
        let explanation = explained(&std::fs::read_to_string(&path).unwrap());
        let name = path.file_stem().unwrap().to_str().unwrap();
        let text = seeing::explain::text(&explanation, Style::Plain);
        assert_fresh(&format!("tests/explained/{name}.explained"), &text);
        seen += 1;
    }
    assert!(seen >= 9);
}

#[test]
fn known_tools_have_their_known_mistakes() {
    let of = |name: &str| {
        let path = Path::new(ROOT).join("tests/explained").join(name);
        codes(&explained(&std::fs::read_to_string(path).unwrap()))
            .into_iter()
            .map(|(_, code)| code)
            .collect::<Vec<_>>()
    };
    for right in ["kube-proxy.txt", "docker.txt"] {
        assert_eq!(of(right), [], "{right}");
    }
    for wrong in ["tutorial-nth.txt", "tutorial-state-new.txt"] {
        assert_eq!(of(wrong), [Code::SameEvery, Code::FallsThrough], "{wrong}");
    }
    assert_eq!(
        of("tutorial-random.txt"),
        [Code::SameProbability, Code::FallsThrough]
    );
    assert_eq!(of("docker-beside.txt"), [Code::ForwardBlocks]);
}

#[test]
fn shares_are_exact_through_jumps_gotos_and_returns() {
    let every = |n| nth(n, 0);
    let four: Vec<String> = TO.iter().map(|to| format!("W {} {to}", every(4))).collect();
    let four: Vec<&str> = four.iter().map(String::as_str).collect();
    assert_eq!(fractions(&four), ["1/4", "3/16", "9/64", "27/256"]);
    let nested = [
        format!("W {} -j W/a", every(3)),
        format!("W -p tcp {} -g W/b", every(2)),
        format!("W {}", TO[2]),
        format!("W/a {} -j RETURN", every(2)),
        format!("W/a {} -j W/c", every(2)),
        format!("W/a {}", TO[0]),
        "W/c -j LOG --log-prefix \"-j DROP \"".to_owned(),
        format!("W/b {} {}", every(5), TO[1]),
    ];
    let nested: Vec<&str> = nested.iter().map(String::as_str).collect();
    let chain = of_rules(&nested);
    // A third into a: half of it returns, the rest ends. Of 5/6 a half to b.
    let found: BTreeMap<_, _> = chain
        .shares
        .iter()
        .map(|share| (share.destination.as_str(), share.fraction.clone().unwrap()))
        .collect();
    let expected = [
        ("10.0.0.1", "1/6"),
        ("10.0.0.2", "1/12"),
        ("10.0.0.3", "5/12"),
    ];
    let expected = expected.map(|(to, share)| (to, share.to_owned()));
    assert_eq!(found, BTreeMap::from(expected));
    assert!((chain.unmatched - 1.0 / 3.0).abs() < 1e-15);
}

#[test]
fn counters_become_connections_and_are_held_against_the_shares() {
    let dump = |mode: [&str; 2], counts: [u32; 3]| {
        format!(
            "*nat\n:W - [0:0]\n[{}:1] -A W {} {}\n[{}:1] -A W {} {}\n[{}:1] -A W {}\nCOMMIT\n",
            counts[0], mode[0], TO[0], counts[1], mode[1], TO[1], counts[2], TO[2]
        )
    };
    let chance = [
        "-m statistic --mode random --probability 0.33333333349",
        "-m statistic --mode random --probability 0.5",
    ];
    let p_value = |counts| explained(&dump(chance, counts)).chains[0].p_value.unwrap();
    assert!(p_value([1000, 1010, 990]) > 0.5);
    assert!(p_value([1000, 1200, 800]) < 1e-9);
    let (three, two) = (nth(3, 0), nth(2, 0));
    let deviation = |counts| {
        explained(&dump([&three, &two], counts)).chains[0]
            .deviation
            .unwrap()
    };
    assert!(deviation([334, 333, 333]).fits);
    assert!(!deviation([340, 330, 330]).fits);
    let packets: Vec<_> = explained(&dump(chance, [1, 2, 3])).chains[0]
        .shares
        .iter()
        .map(|share| share.packets.unwrap())
        .collect();
    assert_eq!(packets, [1, 2, 3]);
}

#[test]
fn each_mistake_has_its_code_and_its_rule() {
    let of = |rules: &[String]| {
        let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
        let findings = of_rules(&rules).findings.into_iter();
        findings
            .map(|found| (found.code, found.rule))
            .collect::<Vec<_>>()
    };
    let line = |rule: &str| format!("-A W {rule}");
    let all = |statistics: [String; 4]| -> Vec<String> {
        let rules = statistics.iter().zip(TO);
        rules
            .map(|(statistic, to)| format!("W {statistic} {to}").replace("  ", " "))
            .collect()
    };
    let random = |text: &str| format!("-m statistic --mode random --probability {text}");
    // The last rule takes the rest, which helps, but is wrong all the same.
    let rules = all([nth(4, 0), nth(4, 0), nth(4, 0), String::new()]);
    assert_eq!(of(&rules), [(Code::SameEvery, line(&rules[0][2..]))]);
    let rules = all([
        random("0.25"),
        random("0.25"),
        random("0.25"),
        String::new(),
    ]);
    assert_eq!(of(&rules), [(Code::SameProbability, line(&rules[0][2..]))]);
    let rules = all([nth(4, 0), nth(3, 1), nth(2, 1), String::new()]);
    assert_eq!(of(&rules), [(Code::PacketOutOfTurn, line(&rules[1][2..]))]);
    let rules = all([nth(4, 0), nth(3, 0), nth(2, 0), nth(2, 0)]);
    assert_eq!(of(&rules), [(Code::FallsThrough, line(&rules[3][2..]))]);
    let rules = all([nth(4, 0), String::new(), nth(2, 0), String::new()]);
    assert_eq!(
        of(&rules),
        [
            (Code::Unreachable, line(&rules[2][2..])),
            (Code::Unreachable, line(&rules[3][2..]))
        ]
    );
    let right = all([nth(4, 0), nth(3, 0), nth(2, 0), String::new()]);
    assert_eq!(of(&right), []);
}

#[test]
fn a_jump_behind_one_that_takes_everything_is_shadowed() {
    let dump = |first: &str| {
        format!(
            "*nat\n:PREROUTING ACCEPT [0:0]\n:W - [0:0]\n:ALL - [0:0]\n-A PREROUTING {first}\n\
             -A PREROUTING -p tcp -m tcp --dport 80 -j W\n-A W -p tcp {} {}\n-A W -p tcp {}\n\
             -A ALL -j LOG\n-A ALL -j DNAT --to-destination 10.0.0.9\nCOMMIT\n",
            nth(2, 0),
            TO[0],
            TO[1]
        )
    };
    let shadowed = [("W".to_owned(), Code::ShadowedJump)];
    for all in [
        "-p tcp -j ACCEPT",
        "-j ALL",
        "-p tcp -m tcp --dport 1:1000 -j DNAT --to-destination 10.0.0.9",
        "-p tcp -m multiport --dports 22,80 -j ALL",
    ] {
        let found: Vec<_> = codes(&explained(&dump(all)))
            .into_iter()
            .filter(|(chain, _)| chain == "W")
            .collect();
        assert_eq!(found, shadowed, "{all}");
    }
    for some in [
        "-p udp -j ACCEPT",
        "-s 10.0.0.0/8 -j ALL",
        "-p tcp -m tcp --dport 81:1000 -j ACCEPT",
        "-p tcp -m limit --limit 5/sec -j ACCEPT",
        "-p tcp -m statistic --mode random --probability 0.5 -j ACCEPT",
        "-p tcp -j LOG",
    ] {
        let found: Vec<_> = codes(&explained(&dump(some)))
            .into_iter()
            .filter(|(chain, _)| chain == "W")
            .collect();
        assert_eq!(found, [], "{some}");
    }
}

#[test]
fn facts_of_the_host_find_more_mistakes() {
    let dump = format!(
        "*nat\n:PREROUTING ACCEPT [0:0]\n:W - [0:0]\n-A PREROUTING -d 192.0.2.1/32 -p tcp -m tcp --dport 80 -j W\n\
         -A W -p tcp {} -j DNAT --to-destination 192.0.2.1:80\n-A W -p tcp {}\nCOMMIT\n",
        nth(2, 0),
        TO[1]
    );
    assert_eq!(
        codes(&explained(&dump)),
        [("W".to_owned(), Code::BackendIsHost)]
    );
    let tables = read(dump.as_bytes(), None).unwrap();
    let facts = HostFacts {
        forwarding: BTreeMap::from([(Family::Ipv4, false)]),
        own: vec!["192.0.2.1".parse().unwrap()],
        is_live: true,
    };
    let found = explain(&tables, &[], &facts);
    let expected = [Code::ForwardingOff, Code::BackendIsHost];
    assert_eq!(codes(&found), expected.map(|code| ("W".to_owned(), code)));
    assert!(
        found.chains[0]
            .findings
            .iter()
            .all(|finding| finding.line.is_none())
    );
}

#[test]
fn a_broken_dump_is_an_error_with_the_line() {
    for (dump, line, problem) in [
        ("*nat\n:W - [0:0]\n-A W -j W\nCOMMIT\n", 3, "loop"),
        (
            "*nat\n:A - [0:0]\n:B - [0:0]\n-A A -j B\n-A B -g A\nCOMMIT\n",
            5,
            "loop",
        ),
        (
            "*nat\n:W - [0:0]\n-A W -j gone\nCOMMIT\n",
            3,
            "no such chain",
        ),
        ("*nat\n:W - [0:0]\n", 3, "COMMIT is missing"),
        ("*nat\n*filter\nCOMMIT\n", 2, "before COMMIT"),
        ("*nut\nCOMMIT\n", 1, "no table"),
        ("hello\n", 1, "no `iptables-save` writes"),
        ("-A W -j W\n", 1, "no `iptables-save` writes"),
        ("*nat\n-A W -j ACCEPT\nCOMMIT\n", 2, "not declared"),
        (
            "*nat\n:W - [0:0]\n[1:x] -A W -j ACCEPT\nCOMMIT\n",
            3,
            "no rule",
        ),
        (
            "*nat\n:W - [0:0]\n-A W -m statistic --mode nth --every 2 --packet 2 -j ACCEPT\nCOMMIT\n",
            3,
            "below --every",
        ),
        (
            "*nat\n:W - [0:0]\n-A W -m statistic --mode random --probability 2 -j ACCEPT\nCOMMIT\n",
            3,
            "between 0 and 1",
        ),
        (
            "*nat\n:W - [0:0]\n-A W -m statistic --mode nth -j ACCEPT\nCOMMIT\n",
            3,
            "without its number",
        ),
    ] {
        let error = read(dump.as_bytes(), None).unwrap_err();
        assert_eq!(error.line, line, "{error}");
        assert!(error.problem.contains(problem), "{error}");
    }
    assert!(explained("").chains.is_empty());
}

/// A dump of 10,000 nested chains, and chains that double at each step.
#[test]
fn deep_and_wide_nests_neither_hang_nor_overflow() {
    let mut deep = "*nat\n".to_owned();
    let mut wide = "*nat\n".to_owned();
    for chain in 0..=10_000 {
        let _ = writeln!(deep, ":c{chain} - [0:0]");
    }
    for chain in 0..10_000 {
        let _ = writeln!(deep, "-A c{chain} {} -j c{}", nth(10, 0), chain + 1);
    }
    let _ = writeln!(deep, "-A c10000 {}\nCOMMIT", TO[0]);
    for chain in 0..=60 {
        let _ = writeln!(wide, ":c{chain} - [0:0]");
    }
    for chain in 0..60 {
        let _ = writeln!(wide, "-A c{chain} {} -j c{}", nth(2, 0), chain + 1);
        let _ = writeln!(wide, "-A c{chain} -j c{}", chain + 1);
    }
    let _ = writeln!(wide, "-A c60 {}\nCOMMIT", TO[0]);
    let start = Instant::now();
    let chains = [deep, wide].map(|dump| explained(&dump).chains);
    assert!(start.elapsed() < Duration::from_secs(20));
    assert!((chains[1][0].shares[0].share - 1.0).abs() < 1e-12);
}

#[test]
fn ten_thousand_servers_are_exact() {
    for mode in ["nth", "random"] {
        let mut dump = "*nat\n:W - [0:0]\n".to_owned();
        for number in 0..10_000_u32 {
            let left = 10_000 - number;
            let statistic = match (left, mode) {
                (1, _) => String::new(),
                (_, "nth") => nth(left, 0),
                _ => format!(
                    "-m statistic --mode random --probability {:.11}",
                    1.0 / f64::from(left)
                ),
            };
            let _ = writeln!(
                dump,
                "-A W -p tcp {statistic} -j DNAT --to-destination 10.{}.{}.1:80",
                number / 250,
                number % 250
            );
        }
        dump += "COMMIT\n";
        let chain = explained(&dump).chains.remove(0);
        assert_eq!(chain.shares.len(), 10_000);
        for share in &chain.shares {
            let off = (share.share * 10_000.0 - 1.0).abs();
            assert!(off < if mode == "nth" { 1e-15 } else { 1e-5 }, "{share:?}");
        }
        assert!(chain.unmatched <= 0.0);
    }
}

/// Rules of a random chain in turn, and chains below it.
fn random_chains(dice: &mut Dice) -> String {
    let names = ["W", "W/a", "W/b", "W/c", "W/d"];
    let mut dump = "*nat\n:PREROUTING ACCEPT [0:0]\n".to_owned();
    names.iter().for_each(|name| {
        let _ = writeln!(dump, ":{name} - [0:0]");
    });
    dump += "-A PREROUTING -p tcp -m tcp --dport 80 -j W\n";
    for (at, name) in names.iter().enumerate() {
        for _ in 0..=dice.throw(4) {
            let every = 1 + dice.throw(4);
            let statistic = match every {
                1 => String::new(),
                every => format!(
                    " -m statistic --mode nth --every {every} --packet {}",
                    dice.throw(every)
                ),
            };
            let way = match dice.throw(6) {
                0 => "-j RETURN".to_owned(),
                1 => "-j ACCEPT".to_owned(),
                2 if at + 1 < names.len() => {
                    format!("-j {}", names[at + 1 + dice.throw(names.len() - at - 1)])
                }
                3 if at + 1 < names.len() => {
                    format!("-g {}", names[at + 1 + dice.throw(names.len() - at - 1)])
                }
                _ => format!("-j DNAT --to-destination 10.0.0.{}", dice.throw(5)),
            };
            let _ = writeln!(dump, "-A {name} -p tcp{statistic} {way}");
        }
    }
    dump + "COMMIT\n"
}

/// Turns are not independent of each other, so single shares may differ where a chain is
/// entered from several places. Without that they are exact after a whole period.
#[test]
fn random_chains_share_out_as_the_model_does() {
    const CONNECTIONS: u32 = 12 * 12 * 12 * 4;
    let mut dice = Dice(7);
    let mut compared = 0;
    for _ in 0..600 {
        let dump = random_chains(&mut dice);
        let explanation = explained(&dump);
        let Some(chain) = explanation.chains.iter().find(|chain| chain.chain == "W") else {
            continue;
        };
        let entered_twice = ["W/a", "W/b", "W/c", "W/d"].iter().any(|name| {
            let lines = dump
                .lines()
                .filter(|line| line.ends_with(&format!(" {name}")));
            lines.count() > 1
        });
        if entered_twice {
            continue;
        }
        let mut model = Model::new(false);
        model.restore(&dump).unwrap();
        let mut found: BTreeMap<Option<String>, u32> = BTreeMap::new();
        for _ in 0..CONNECTIONS {
            let to = model.connect(Connection {
                protocol: "tcp",
                port: 80,
            });
            *found.entry(to).or_default() += 1;
        }
        for share in &chain.shares {
            let got = found.remove(&Some(share.destination.clone())).unwrap_or(0);
            let expected = share.share * f64::from(CONNECTIONS);
            assert!(
                (f64::from(got) - expected).abs() < 8.0,
                "{dump}\n{share:?} {got}"
            );
        }
        let nobody: u32 = found.values().sum();
        let expected = chain.unmatched * f64::from(CONNECTIONS);
        assert!(
            (f64::from(nobody) - expected).abs() < 8.0,
            "{dump}\n{nobody}"
        );
        compared += 1;
    }
    assert!(compared > 80, "{compared}");
}

/// The set without balancers that another one listed before takes connections from: their
/// jumps are shadowed indeed, and the run warns of it.
fn without_overlaps(mut set: Value) -> Value {
    let Some(balancers) = set["balancers"].as_array_mut() else {
        return set;
    };
    let mut taken: Vec<(Value, Vec<u16>)> = Vec::new();
    balancers.retain(|balancer| {
        let texts = match &balancer["destination_port"] {
            Value::Array(all) => all.iter().map(ToString::to_string).collect(),
            other => vec![other.as_str().map_or(other.to_string(), str::to_owned)],
        };
        let ports: Vec<u16> = texts
            .iter()
            .flat_map(|text| {
                let (first, last) = text.split_once(':').unwrap_or((text, text));
                first.parse::<u16>().unwrap()..=last.parse().unwrap()
            })
            .collect();
        let protocol = balancer["protocol"].clone();
        let is_free = taken.iter().all(|(other, others)| {
            *other != protocol || ports.iter().all(|port| !others.contains(port))
        });
        if is_free {
            taken.push((protocol, ports));
        }
        is_free
    });
    set
}

/// The codes that depend on more than the balancer's own chains.
fn assert_no_mistake(host: &Fake, of: &Value) {
    for family in Family::BOTH {
        let dump = host.model(family).lock().unwrap().save();
        let found = codes(&explained(&dump));
        assert!(found.is_empty(), "{found:?}\n{of}\n{dump}");
    }
}

/// Weights whose rules look most like those of the known mistakes.
#[test]
fn odd_weights_are_no_mistake() {
    use iptables_balance::converge::outcome::RunMode;
    for weights in [
        &[16, 12, 9, 27][..],
        &[3, 2, 4],
        &[27, 9, 12, 16],
        &[1, 2, 3, 6],
        &[8, 4, 2, 1, 1],
        &[4, 3, 2, 4, 5],
        &[9, 6, 4, 8],
    ] {
        for mode in ["nth", "random", "hash"] {
            // By chance these are, to the bit, the rules of the known mistake.
            if mode == "random" && weights.contains(&27) {
                continue;
            }
            for layout in ["flat", "tree"] {
                let backends = weights.iter().enumerate();
                let backends = backends.map(|(at, weight)| json!({"address": format!("10.9.0.{}", at + 1), "weight": weight}));
                let value = json!({"name": "W", "destination_port": 80, "mode": mode, "layout": layout,
                    "backends": backends.collect::<Vec<_>>()});
                let host = Fake::new(Model::new(false), Model::new(true));
                property::run(&host, &value, RunMode::Apply);
                assert_no_mistake(&host, &value);
            }
        }
    }
}

/// Rules that only lead on do not repeat the protocol of the jump rule.
#[test]
fn a_tree_of_this_program_is_explained_once() {
    use iptables_balance::converge::outcome::RunMode;
    let backends = (1..=60).map(|number| json!({"address": format!("10.9.0.{number}")}));
    let value = json!({"name": "W", "destination_port": 80, "layout": "tree", "backends": backends.collect::<Vec<_>>()});
    let host = Fake::new(Model::new(false), Model::new(true));
    property::run(&host, &value, RunMode::Apply);
    let dump = host.model(Family::Ipv4).lock().unwrap().save();
    assert_eq!(explained(&dump).chains.len(), 1, "{dump}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn nothing_that_this_program_makes_is_a_mistake(value in property::requests_with(0..31), set in sets::sets()) {
        use iptables_balance::converge::outcome::RunMode;
        for value in [value, without_overlaps(set)] {
            let host = Fake::new(Model::new(false), Model::new(true));
            property::run(&host, &value, RunMode::Apply);
            assert_no_mistake(&host, &value);
        }
    }

    #[test]
    fn any_text_is_explained_or_refused(text in "(\\*nat\n)?(:W - \\[0:0\\]\n)?([-:*A-Z \"!\\[\\]0-9a-z]{0,40}\n){0,8}(COMMIT\n)?") {
        if let Ok(tables) = read(text.as_bytes(), None) {
            let _ = explain(&tables, &[], &HostFacts::default());
        }
    }
}

#[test]
fn the_command_prints_all_formats_and_exits_with_3() {
    let program = env!("CARGO_BIN_EXE_iptables_balance");
    let run = |arguments: &[&str]| {
        let output = Command::new(program)
            .arg("explain")
            .args(arguments)
            .current_dir(ROOT)
            .output()
            .unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let wrong = "tests/explained/tutorial-nth.txt";
    let (code, text, _) = run(&[wrong, "--exit-code"]);
    assert!(code == 3 && text.contains("same-every"), "{text}");
    assert_eq!(run(&[wrong]).0, 0);
    assert_eq!(run(&["tests/explained/kube-proxy.txt", "--exit-code"]).0, 0);
    let (code, json, _) = run(&["tests/explained/kube-proxy.txt", "--format", "json"]);
    assert_eq!(code, 0);
    let json: Value = serde_json::from_str(&json).unwrap();
    let validator = jsonschema::validator_for(&schema(Kind::Explain)).unwrap();
    assert!(validator.is_valid(&json), "{json}");
    let (code, _, errors) = run(&[wrong, "--chain", "PREROUTNG"]);
    assert!(
        code == 2 && errors.contains("the nearest is `PREROUTING`"),
        "{errors}"
    );
    let (code, _, errors) = run(&["README.md"]);
    assert!(
        code == 2 && errors.contains("line 3 of the dump"),
        "{errors}"
    );
    let (_, html, _) = run(&[wrong, "--format", "html"]);
    assert!(
        html.starts_with("<!DOCTYPE html>")
            && !html.contains("http://")
            && !html.contains("https://")
    );
    let (_, metrics, _) = run(&[wrong, "--format", "prometheus"]);
    assert!(metrics.contains("# TYPE iptables_balance_chain_share_ratio gauge"));
}
