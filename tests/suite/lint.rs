//! Mistakes in rules that other tools make, and in rules that look like mistakes.

use std::path::Path;

use iptables_balance::explain::{Code, ExplainedChain, Explanation};
use iptables_balance::frontend::seeing;
use iptables_balance::frontend::terminal::Style;

use crate::explain::{TO, codes, explained, nth, of_rules};
use crate::spec::ROOT;

fn recorded(tool: &str) -> Explanation {
    let path = Path::new(ROOT).join(format!("tests/explained/{tool}.txt"));
    explained(&std::fs::read_to_string(path).unwrap())
}

/// The codes of each chain, by the ports of the connections.
fn by_port(tool: &str) -> Vec<(String, Vec<Code>)> {
    let port = |chain: &ExplainedChain| {
        let mut texts = chain.conditions.iter().chain(&chain.jumps);
        let port = texts
            .find_map(|text| text.split("--dport ").nth(1))
            .unwrap();
        port.split(' ').next().unwrap().to_owned()
    };
    let of = |chain: ExplainedChain| {
        let codes = chain.findings.iter().map(|finding| finding.code);
        (port(&chain), codes.collect())
    };
    recorded(tool).chains.into_iter().map(of).collect()
}

/// The configurations are in tests/explained/record.sh.
#[test]
fn the_mistakes_of_other_tools_are_found_and_no_more() {
    use Code::{FallsThrough, ForwardBlocks, SameEvery, SameProbability};
    let expected = |all: &[(&str, &[Code])]| -> Vec<(String, Vec<Code>)> {
        let all = all.iter();
        all.map(|(port, codes)| ((*port).to_owned(), codes.to_vec()))
            .collect()
    };
    assert_eq!(
        by_port("ferm"),
        expected(&[
            ("80", &[]),
            ("443", &[ForwardBlocks]),
            ("81", &[ForwardBlocks]),
            ("82", &[ForwardBlocks]),
            ("83", &[SameProbability, FallsThrough, ForwardBlocks]),
            ("84", &[]),
        ])
    );
    assert_eq!(
        by_port("firehol"),
        expected(&[
            ("84", &[ForwardBlocks]),
            ("80", &[SameEvery]),
            ("86", &[SameEvery, ForwardBlocks]),
            ("81", &[ForwardBlocks]),
            ("82", &[SameProbability, ForwardBlocks]),
            ("83", &[SameEvery, ForwardBlocks]),
            ("85", &[SameEvery]),
        ])
    );
    assert_eq!(
        by_port("shorewall"),
        expected(&[("80", &[]), ("82", &[ForwardBlocks]), ("83", &[])])
    );
}

/// The kernel's counters of the recordings are the judge.
#[test]
fn the_counters_of_other_tools_fit_what_is_explained() {
    let mut compared = 0;
    for tool in ["ferm", "firehol", "shorewall"] {
        for chain in recorded(tool).chains {
            assert!(
                chain.deviation.is_none_or(|deviation| deviation.fits),
                "{tool} {chain:?}"
            );
            assert!(
                chain.p_value.is_none_or(|p_value| p_value > 0.001),
                "{tool} {chain:?}"
            );
            compared += usize::from(chain.deviation.is_some() || chain.p_value.is_some());
        }
    }
    assert_eq!(compared, 11);
}

/// The findings of rules behind a header of chains.
fn of(lines: &[&str]) -> Explanation {
    let names = ["W", "V", "U"].map(|name| format!(":{name} - [0:0]\n"));
    let (filter, nat): (Vec<&str>, Vec<&str>) =
        lines.iter().partition(|line| line.contains("FORWARD"));
    let text =
        |lines: &[&str]| -> String { lines.iter().map(|line| format!("{line}\n")).collect() };
    explained(&format!(
        "*filter\n:FORWARD DROP [0:0]\n{}COMMIT\n*nat\n:PREROUTING ACCEPT [0:0]\n{}{}COMMIT\n",
        text(&filter),
        names.concat(),
        text(&nat)
    ))
}

fn chain_codes(lines: &[&str]) -> Vec<(String, Code)> {
    codes(&of(lines))
}

#[test]
fn a_range_of_addresses_is_one_destination_and_no_mistake() {
    let range =
        "-A PREROUTING -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.1-10.0.0.4:81";
    let accept = "-A FORWARD -d 10.0.0.0/29 -p tcp -m tcp --dport 81 -j ACCEPT";
    let found = of(&[range, accept]);
    assert_eq!(codes(&found), []);
    let shares = &found.chains[0].shares;
    assert_eq!(shares.len(), 1);
    assert_eq!(shares[0].destination, "10.0.0.1-10.0.0.4:81");
    assert_eq!(shares[0].fraction.as_deref(), Some("1"));
    let note = "a range counts as one destination";
    assert!(seeing::explain::text(&found, Style::Plain).contains(note));
    // FORWARD must accept both ends.
    for some in ["10.0.0.1", "10.0.0.4"] {
        let accept = format!("-A FORWARD -d {some} -p tcp -m tcp --dport 81 -j ACCEPT");
        let found = chain_codes(&[range, &accept]);
        assert_eq!(
            found,
            [("PREROUTING".to_owned(), Code::ForwardBlocks)],
            "{some}"
        );
    }
    // A single address and a range of ports are a forwarded port.
    for single in ["10.0.0.1", "10.0.0.1:81-90"] {
        let rule = range.replace("10.0.0.1-10.0.0.4:81", single);
        assert!(of(&[&rule]).chains.is_empty(), "{single}");
    }
    let single = of_rules(&[
        &format!("W -p tcp {} {}", nth(2, 0), TO[0]),
        &format!("W -p tcp {}", TO[1]),
    ]);
    let single = Explanation {
        chains: vec![single],
        findings: Vec::new(),
    };
    assert!(!seeing::explain::text(&single, Style::Plain).contains(note));
}

/// A rule of PREROUTING that shares out other connections hides no chain.
#[test]
fn a_chain_is_shown_beside_a_rule_that_shares_out_other_connections() {
    let statistic = format!(
        "-A PREROUTING -p tcp -m tcp --dport 81 {} {}",
        nth(2, 0),
        TO[2]
    );
    let range = "-A PREROUTING -p tcp -m tcp --dport 81 -j DNAT --to-destination 10.0.0.1-10.0.0.4";
    let chain = [
        format!("-A W -p tcp {} {}", nth(2, 0), TO[0]),
        format!("-A W -p tcp {}", TO[1]),
    ];
    let jump = "-A PREROUTING -p tcp -m tcp --dport 80 -j W";
    let names = |found: Explanation| -> Vec<String> {
        found.chains.into_iter().map(|chain| chain.chain).collect()
    };
    for other in [&statistic, range] {
        let found = of(&[other, jump, &chain[0], &chain[1]]);
        assert_eq!(names(found), ["PREROUTING", "W"], "{other}");
    }
    // A chain that the same connections go through is a part.
    let jump = format!("-A PREROUTING -p tcp -m tcp --dport 81 {} -j W", nth(2, 0));
    let found = of(&[&jump, range, &chain[0], &chain[1]]);
    assert_eq!(names(found), ["PREROUTING"]);
    // Other connections come in too, so it is shown for itself as well.
    let other = "-A PREROUTING -p tcp -m tcp --dport 82 -j W";
    let found = of(&[&jump, range, other, &chain[0], &chain[1]]);
    assert_eq!(names(found), ["PREROUTING", "W"]);
}

/// Counters of rules that count other connections too say nothing about the shares.
#[test]
fn counters_that_count_other_connections_are_left_out() {
    let packets = |lines: &[&str], chain: &str| -> Vec<Option<u64>> {
        let mut chains = of(lines).chains.into_iter();
        let mut found = chains.find(|found| found.chain == chain).unwrap();
        found
            .shares
            .sort_by(|one, other| one.destination.cmp(&other.destination));
        found.shares.iter().map(|share| share.packets).collect()
    };
    let jump = "[9:9] -A PREROUTING -p tcp -m tcp --dport 80 -j W";
    let nth = nth(2, 0);
    let first = format!("[5:5] -A W -p tcp {nth} -j V");
    let last = format!("[4:4] -A W -p tcp {}", TO[1]);
    let below = format!("[5:5] -A V -p tcp {}", TO[0]);
    let all = [jump, &first, &last, &below];
    assert_eq!(packets(&all, "W"), [Some(5), Some(4)]);
    // Known clients come into V by another rule.
    let recent = "[5:5] -A W -p tcp -m recent --rcheck --name W --rsource -j V";
    let with = [jump, recent, &first, &last, &below];
    assert_eq!(packets(&with, "W"), [None, Some(4)]);
    // Other connections come into V.
    let other = "[5:5] -A PREROUTING -p tcp -m tcp --dport 81 -j V";
    let with = [jump, other, &first, &last, &below];
    assert_eq!(packets(&with, "W"), [None, Some(4)]);
    // The last rule takes the connections to all ports.
    let lines = |last: &str| {
        let first = format!(
            "[5:5] -A PREROUTING -p tcp -m tcp --dport 80 {nth} {}",
            TO[0]
        );
        packets(
            &[&first, &format!("[9:9] -A PREROUTING {last}")],
            "PREROUTING",
        )
    };
    let of_all = format!("-p tcp {}", TO[1]);
    let of_port = format!("-p tcp -m tcp --dport 80 {}", TO[1]);
    let of_some = format!("-s 10.0.0.0/8 -p tcp -m tcp --dport 80 {}", TO[1]);
    assert_eq!(lines(&of_all), [Some(5), None]);
    assert_eq!(lines(&of_port), [Some(5), Some(9)]);
    assert_eq!(lines(&of_some), [Some(5)]);
    // The jump asks for the protocol, so the last rule need not.
    let bare = format!("[4:4] -A W {}", TO[1]);
    assert_eq!(
        packets(&[jump, &first, &bare, &below], "W"),
        [Some(5), Some(4)]
    );
    // With two ways in it has to.
    let two = "[9:9] -A PREROUTING -p udp -m udp --dport 80 -j W";
    assert_eq!(
        packets(&[jump, two, &first, &bare, &below], "W"),
        [Some(5), None]
    );
}

/// A DNAT without a port keeps the port, and the interface is that of the connection.
#[test]
fn forward_is_asked_about_the_rewritten_packet() {
    let nat = |to: [&str; 2]| {
        let jump = "-A PREROUTING -i eth0 -p tcp -m tcp --dport 80 -j W".to_owned();
        let first = format!(
            "-A W -p tcp {} -j DNAT --to-destination {}",
            nth(2, 0),
            to[0]
        );
        [
            jump,
            first,
            format!("-A W -p tcp -j DNAT --to-destination {}", to[1]),
        ]
    };
    let is_blocked = |to, forward: &[&str]| {
        let nat = nat(to);
        let mut lines: Vec<&str> = nat.iter().map(String::as_str).collect();
        lines.extend(forward);
        match chain_codes(&lines).as_slice() {
            [] => false,
            [(chain, Code::ForwardBlocks)] if chain == "W" => true,
            other => panic!("{other:?}"),
        }
    };
    let kept = ["10.0.0.1", "10.0.0.2"];
    let moved = ["10.0.0.1:81", "10.0.0.2:81"];
    let port = |port: u16| format!("-A FORWARD -p tcp -m tcp --dport {port} -j ACCEPT");
    assert!(!is_blocked(kept, &[&port(80)]));
    assert!(is_blocked(kept, &[&port(81)]));
    assert!(!is_blocked(moved, &[&port(81)]));
    assert!(is_blocked(moved, &[&port(80)]));
    for (forward, expected) in [
        ("-i eth0 -j ACCEPT", false),
        ("-i eth1 -j ACCEPT", true),
        ("! -i eth1 -j ACCEPT", false),
        ("! -i eth0 -j ACCEPT", true),
        ("-i eth+ -j ACCEPT", false),
        ("-i ppp+ -j ACCEPT", false),
        ("-o eth1 -j ACCEPT", false),
        ("-p udp -j ACCEPT", true),
        ("-p tcp -j DROP", true),
        ("-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", true),
        ("-m conntrack --ctstate NEW -j ACCEPT", false),
        ("-m conntrack --ctstate DNAT -j ACCEPT", false),
        ("-m conntrack --ctstate SNAT -j ACCEPT", false),
        ("-m conntrack ! --ctstate INVALID -j ACCEPT", false),
        ("-m conntrack ! --ctstate NEW -j ACCEPT", true),
        ("-m limit --limit 5/sec -j ACCEPT", false),
        ("-s 192.0.2.0/24 -j ACCEPT", false),
        ("-d 192.0.2.0/24 -j ACCEPT", true),
        ("-m iprange --dst-range 10.0.0.1-10.0.0.2 -j ACCEPT", false),
        ("-j LOG", true),
    ] {
        let rule = format!("-A FORWARD {forward}");
        assert_eq!(is_blocked(kept, &[&rule]), expected, "{forward}");
    }
    // The way into the chain is not the only one, so the port is not known.
    let all = nat(kept);
    let other = "-A PREROUTING -p tcp -m tcp --dport 81 -j W";
    let forward = port(82);
    let lines = [&all[0], &all[1], &all[2], other, &forward];
    assert_eq!(chain_codes(&lines), []);
}

/// A statistic in FORWARD chooses a second time.
#[test]
fn forward_that_accepts_by_a_statistic_blocks_the_others() {
    let nat = [
        format!(
            "-A PREROUTING -p tcp -m tcp --dport 80 {} {}",
            nth(2, 0),
            TO[0]
        ),
        format!("-A PREROUTING -p tcp -m tcp --dport 80 {}", TO[1]),
    ];
    let found = |forward: &[&str]| {
        let mut lines: Vec<&str> = nat.iter().map(String::as_str).collect();
        lines.extend(forward);
        let chain = of(&lines).chains.remove(0);
        chain
            .findings
            .into_iter()
            .map(|found| found.message)
            .collect::<Vec<_>>()
    };
    let chosen = format!("-A FORWARD -d 10.0.0.1 {} -j ACCEPT", nth(2, 0));
    let all = "-A FORWARD -d 10.0.0.2 -j ACCEPT";
    assert_eq!(
        found(&[&chosen, all]),
        [format!(
            "connections to `10.0.0.1` are stopped in filter's FORWARD by its policy DROP, unless the statistic \
                  of `{chosen}` chooses them too"
        )]
    );
    // Others accept the rest, or all are stopped.
    assert!(found(&[&chosen, all, "-A FORWARD -p tcp -j ACCEPT"]).is_empty());
    assert!(found(&[&chosen, all, "-A FORWARD -s 192.0.2.0/24 -j ACCEPT"]).is_empty());
    let [blocked] = found(&[&chosen]).try_into().unwrap();
    assert_eq!(
        blocked,
        "connections to `10.0.0.2` are stopped in filter's FORWARD by its policy DROP"
    );
    // A part that is dropped on purpose.
    let some = format!("-A FORWARD {} -j DROP", nth(10, 0));
    assert!(found(&[&some, "-A FORWARD -p tcp -j ACCEPT"]).is_empty());
}
