//! Mistakes in rules that other tools make, and in rules that look like mistakes.

use std::net::IpAddr;
use std::path::Path;

use iptables_balance::explain::{
    Code, ExplainedChain, Explanation, HostFacts, Packet, blocks, explain, read,
};
use iptables_balance::frontend::seeing;
use iptables_balance::frontend::terminal::Style;
use iptables_balance::netfilter::{Endpoint, Family};

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
pub fn of(lines: &[&str]) -> Explanation {
    let names = ["W", "V", "U"].map(|name| format!(":{name} - [0:0]\n"));
    let (filter, nat): (Vec<&str>, Vec<&str>) =
        lines.iter().partition(|line| line.contains("FORWARD"));
    let text =
        |lines: &[&str]| -> String { lines.iter().map(|line| format!("{line}\n")).collect() };
    explained(&format!(
        "*filter\n:FORWARD DROP [0:0]\n:U - [0:0]\n:FORWARD-U - [0:0]\n{}COMMIT\n*nat\n:PREROUTING ACCEPT [0:0]\n{}{}COMMIT\n",
        text(&filter),
        names.concat(),
        text(&nat)
    ))
}

pub fn chain_codes(lines: &[&str]) -> Vec<(String, Code)> {
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
    // So does the last jump, though the rule below asks for no port.
    let first_of_port = format!(
        "[5:5] -A PREROUTING -p tcp -m tcp --dport 80 {nth} {}",
        TO[0]
    );
    let jump_of_all = "[9:9] -A PREROUTING -p tcp -j V";
    let below_all = format!("[9:9] -A V -p tcp {}", TO[1]);
    let with = [first_of_port.as_str(), jump_of_all, &below_all];
    assert_eq!(packets(&with, "PREROUTING"), [Some(5), None]);
    let jump_of_port = "[9:9] -A PREROUTING -p tcp -m tcp --dport 80 -j V";
    let with = [first_of_port.as_str(), jump_of_port, &below_all];
    assert_eq!(packets(&with, "PREROUTING"), [Some(5), Some(9)]);
    // Another spelling of the same condition.
    let number = format!("[4:4] -A W -p 6 {}", TO[1]);
    let two = "[9:9] -A PREROUTING -p udp -m udp --dport 80 -j W";
    assert_eq!(
        packets(&[jump, two, &first, &number, &below], "W"),
        [Some(5), Some(4)]
    );
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
    // RETURN and goto end the way through FORWARD, if they match for certain.
    for (before, expected) in [
        ("-j RETURN", true),
        ("-s 192.0.2.0/24 -j RETURN", false),
        ("-g U", true),
        ("-s 192.0.2.0/24 -g U", false),
        ("-j U", false),
    ] {
        let rule = format!("-A FORWARD {before}");
        let found = is_blocked(kept, &[&rule, "-A FORWARD -j ACCEPT"]);
        assert_eq!(found, expected, "{before}");
    }
    // With some ports, and with some interfaces, it is not known which.
    let lines = |jump: &str, forward: &str| {
        let nat = nat(kept);
        let (jump, forward) = (
            format!("-A PREROUTING {jump} -j W"),
            format!("-A FORWARD {forward}"),
        );
        chain_codes(&[&jump, &nat[1], &nat[2], &forward])
    };
    let range = "-i eth0 -p tcp -m tcp --dport 80:90";
    assert_eq!(lines(range, "-p tcp -m tcp --dport 85 -j ACCEPT"), []);
    assert_eq!(
        lines("-i eth+ -p tcp -m tcp --dport 80", "-i eth0 -j ACCEPT"),
        []
    );
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
    // The rule that accepts is named, also where it leads to another chain.
    let log = format!("-A FORWARD {} -j LOG", nth(2, 0));
    let [message] = found(&[&log, &chosen, all]).try_into().unwrap();
    assert!(
        message.contains(&format!("the statistic of `{chosen}`")),
        "{message}"
    );
    let jump = format!("-A FORWARD -d 10.0.0.1 {} -j FORWARD-U", nth(2, 0));
    let [message] = found(&[&jump, all, "-A FORWARD-U -j ACCEPT"])
        .try_into()
        .unwrap();
    assert!(
        message.contains(&format!("the statistic of `{jump}`")),
        "{message}"
    );
    // A part that is dropped on purpose.
    let some = format!("-A FORWARD {} -j DROP", nth(10, 0));
    assert!(found(&[&some, "-A FORWARD -p tcp -j ACCEPT"]).is_empty());
}

pub fn random(chance: &str) -> String {
    format!("-m statistic --mode random --probability {chance}")
}

/// Rules of a chain, from matches and numbers of destinations.
pub fn rules<'a>(chain: &str, lines: impl IntoIterator<Item = (&'a str, usize)>) -> Vec<String> {
    let lines = lines.into_iter();
    lines
        .map(|(matches, to)| format!("-A {chain} {matches} {}", TO[to]).replace("  ", " "))
        .collect()
}

pub const JUMP: &str = "-A PREROUTING -p tcp -m tcp --dport 80 -j W";

/// The codes and rules of the findings in chain W behind these lines.
fn found_in_w(lines: &[String]) -> Vec<(Code, String)> {
    let mut all = vec![JUMP];
    all.extend(lines.iter().map(String::as_str));
    let chains = of(&all).chains.into_iter();
    chains
        .filter(|chain| chain.chain == "W")
        .flat_map(|chain| chain.findings)
        .filter(|finding| finding.code != Code::ForwardBlocks)
        .map(|finding| (finding.code, finding.rule))
        .collect()
}

pub fn codes_in_w(lines: &[String]) -> Vec<Code> {
    found_in_w(lines)
        .into_iter()
        .map(|(code, _)| code)
        .collect()
}

#[test]
fn equal_lines_are_a_mistake_where_no_weights_give_them() {
    use Code::{FallsThrough, PacketOutOfTurn, SameEvery, SameProbability, Unreachable};
    let tcp = |statistic: String| format!("-p tcp {statistic}");
    let codes = |statistics: &[String]| {
        let lines: Vec<String> = statistics.iter().cloned().map(tcp).collect();
        let lines = lines.iter().map(String::as_str).zip([0, 1, 2, 3]);
        codes_in_w(&rules("W", lines))
    };
    let (n, r, last) = (nth, random, String::new);
    for (statistics, expected) in [
        (
            vec![n(4, 0), n(4, 1), n(4, 2), n(4, 3)],
            vec![SameEvery, FallsThrough],
        ),
        (
            vec![n(4, 3), n(4, 2), n(4, 1), n(4, 0)],
            vec![SameEvery, FallsThrough],
        ),
        (vec![n(4, 0), n(4, 1), n(4, 2), last()], vec![SameEvery]),
        (vec![n(4, 1), n(4, 2), n(4, 3), last()], vec![SameEvery]),
        (vec![n(4, 2), n(4, 1), n(4, 0), last()], vec![SameEvery]),
        (vec![n(4, 1), n(4, 1), n(4, 1), last()], vec![SameEvery]),
        // 16:12:9:27, as this program writes it.
        (vec![n(4, 1), n(4, 3), n(4, 1), last()], vec![]),
        (vec![n(3, 0), n(3, 1), last()], vec![SameEvery]),
        (vec![n(3, 2), n(3, 1), last()], vec![SameEvery]),
        // 3:2:4
        (vec![n(3, 1), n(3, 1), last()], vec![]),
        // 2:1:1, and others with another sum.
        (vec![n(2, 0), n(2, 0), last()], vec![]),
        (vec![n(5, 0), n(5, 1), n(5, 2), last()], vec![]),
        (vec![n(2, 0), last()], vec![]),
        (vec![n(2, 0)], vec![FallsThrough]),
        (vec![n(4, 0), n(4, 1), n(3, 0), n(3, 1)], vec![FallsThrough]),
        (
            vec![r("0.25"), r("0.25"), r("0.25"), r("0.25")],
            vec![SameProbability, FallsThrough],
        ),
        (
            vec![r("0.25"), r("0.25"), r("0.25"), last()],
            vec![SameProbability],
        ),
        // As typed for three: with all digits it would be 3:2:4.
        (vec![r("0.33"), r("0.33"), last()], vec![SameProbability]),
        (vec![r("0.333"), r("0.333"), last()], vec![SameProbability]),
        (vec![r("0.33"), r("0.34"), last()], vec![SameProbability]),
        (vec![r("0.33333333349"), r("0.33333333349"), last()], vec![]),
        (vec![r("0.35"), r("0.35"), last()], vec![]),
        (vec![r("0.2"), r("0.2"), r("0.2"), last()], vec![]),
        (vec![r("0.5"), last()], vec![]),
        (vec![r("0.5")], vec![FallsThrough]),
        (
            vec![r("0.33"), r("0.33"), r("0.34")],
            vec![SameProbability, FallsThrough],
        ),
        (vec![r("0.30"), r("0.32"), r("0.34")], vec![FallsThrough]),
        (vec![r("0.30"), r("0.32")], vec![FallsThrough]),
        (vec![r("0.30"), r("0.60"), r("0.30")], vec![FallsThrough]),
        (
            vec![r("0"), r("0")],
            vec![FallsThrough, Unreachable, Unreachable],
        ),
        (vec![r("0"), r("0.5"), last()], vec![Unreachable]),
        (vec![n(2, 0), r("0.5"), n(2, 0)], vec![FallsThrough]),
        (vec![n(4, 0), n(3, 0), n(2, 0), last()], vec![]),
        (
            vec![n(4, 0), n(3, 1), n(2, 0), last()],
            vec![PacketOutOfTurn],
        ),
        (
            vec![n(4, 3), n(3, 2), n(2, 1), last()],
            vec![PacketOutOfTurn],
        ),
        (
            vec![n(4, 0), n(3, 0), n(2, 1), last()],
            vec![PacketOutOfTurn],
        ),
        // Other weights.
        (vec![n(5, 1), n(3, 0), n(2, 0), last()], vec![]),
        (vec![n(4, 1), n(2, 0), n(2, 0), last()], vec![]),
        (vec![n(3, 0), n(2, 1), r("0.5"), last()], vec![]),
    ] {
        assert_eq!(codes(&statistics), expected, "{statistics:?}");
    }
}

#[test]
fn lines_about_other_connections_or_of_a_tree_are_no_list() {
    let four = nth(4, 0);
    let of_some = format!("-s 10.0.0.0/8 -p tcp {four}");
    let of_all = format!("-p tcp {four}");
    let lines = [(&*of_some, 0), (&*of_all, 1), (&*of_all, 2), ("-p tcp", 3)];
    assert_eq!(codes_in_w(&rules("W", lines)), []);
    // A destination with two lines: a program chose the turns.
    let numbered = [
        format!("-p tcp {}", nth(3, 1)),
        format!("-p tcp {}", nth(2, 0)),
    ];
    let twice = [(&*numbered[0], 0), (&*numbered[1], 0), ("-p tcp", 1)];
    assert_eq!(codes_in_w(&rules("W", twice)), []);
    let once = [(&*numbered[0], 0), (&*numbered[1], 1), ("-p tcp", 2)];
    assert_eq!(codes_in_w(&rules("W", once)), [Code::PacketOutOfTurn]);
    // A chain below another.
    let mut tree = vec![format!("-A W -p tcp {} -j V", nth(2, 0))];
    tree.extend(rules("W", [("-p tcp", 3)]));
    tree.extend(rules("V", once));
    assert_eq!(codes_in_w(&tree), []);
}

#[test]
fn the_message_has_the_shares_of_the_lines_and_the_advice_all_numbers() {
    let message = |lines: &[String]| {
        let mut all = vec![JUMP];
        all.extend(lines.iter().map(String::as_str));
        let chain = of(&all).chains.into_iter().find(|chain| chain.chain == "W");
        let found = chain.unwrap().findings.into_iter();
        let mut found =
            found.filter(|found| [Code::SameEvery, Code::SameProbability].contains(&found.code));
        found
            .next()
            .map(|found| (found.message, found.advice))
            .unwrap()
    };
    let four = format!("-p tcp {}", nth(4, 0));
    let lines = [(&*four, 0), (&*four, 1), (&*four, 2)];
    let (text, advice) = message(&rules("W", lines));
    assert!(text.ends_with("on 3 lines gives 25 %, 18.8 %, 14.1 %, and 42.2 % of the connections get no destination"), "{text}");
    assert_eq!(
        advice,
        "write `--every 3`, `--every 2` from line to line, `--packet 0` on each, and no statistic on the last; or let \
         `iptables_balance plan` write the rules"
    );
    // In a chain below, of its connections; the rest is not lost.
    let mut tree = vec![format!("-A W -p tcp {} -j V", nth(2, 0))];
    tree.extend(rules("W", [("-p tcp", 3)]));
    tree.extend(rules("V", lines));
    let (text, _) = message(&tree);
    assert!(
        text.ends_with(
            "on 3 lines gives 25 %, 18.8 %, 14.1 %, and 42.2 % of the connections go on after them"
        ),
        "{text}"
    );
    let of_many = |statistic: &str| {
        let matches = format!("-p tcp {statistic}");
        message(&rules("W", (0..7).map(|at| (&*matches, at % 4))))
    };
    let (text, advice) = of_many(&nth(7, 0));
    assert!(
        text.contains(
            "on 7 lines gives 14.3 %, 12.2 %, 10.5 %, 9 %, 7.7 %, 6.6 %, ..., and 34 % of the"
        ),
        "{text}"
    );
    assert!(advice.starts_with("write `--every 7`, `--every 6`, `--every 5`, `--every 4`, ... down to 2 from line to line"), "{advice}");
    let (_, advice) = of_many(&random("0.1429"));
    assert!(advice.starts_with("write `--probability 0.14285714286`, `--probability 0.16666666667`, `--probability 0.20000000000`, \
         `--probability 0.25000000000`, ... up to 0.5 from line to line"), "{advice}");
}

#[test]
fn connections_that_later_rules_take_do_not_fall_through() {
    let first = rules("W", [(&*format!("-p tcp {}", nth(2, 0)), 0)]).remove(0);
    let falls = |before: &[&str], after: &[&str]| {
        let mut lines = before.to_vec();
        lines.push(&first);
        lines.extend(after);
        let chains = of(&lines).chains.into_iter();
        let mut found = chains
            .filter(|chain| chain.chain == "W")
            .flat_map(|chain| chain.findings);
        let found = found.find(|found| found.code == Code::FallsThrough);
        found.map(|found| found.rule)
    };
    let some = "-A PREROUTING -p tcp -m tcp --dport 80";
    let take = format!("{some} {}", TO[3]);
    let take_more = format!("-A PREROUTING -p tcp {}", TO[3]);
    let some_of_more = format!("-A PREROUTING -p tcp {} {}", nth(2, 0), TO[3]);
    let log = format!("{some} -j LOG");
    let goto = format!("{some} -g W");
    let other = "-A PREROUTING -p tcp -m tcp --dport 81 -j W";
    assert_eq!(falls(&[JUMP], &[]), Some(first.clone()));
    assert_eq!(falls(&[JUMP, &take], &[]), None);
    assert_eq!(falls(&[JUMP, &take_more], &[]), None);
    assert_eq!(falls(&[JUMP, &log], &[]), Some(first.clone()));
    assert_eq!(falls(&[JUMP, &some_of_more], &[]), Some(first.clone()));
    assert_eq!(falls(&[&take, JUMP], &[]), Some(first.clone()));
    assert_eq!(falls(&[&goto, &take], &[]), Some(first.clone()));
    assert_eq!(falls(&[JUMP, &take, other], &[]), Some(first.clone()));
    assert_eq!(falls(&[], &[]), Some(first.clone()));
    let rest = format!("-A W -p tcp {}", TO[1]);
    assert_eq!(falls(&[JUMP], &[&rest]), None);
    // The last rule of the chain itself is named, not one below it.
    let deep = format!("-A W -p tcp {} -j V", nth(3, 0));
    let below = rules("V", [(&*format!("-p tcp {}", nth(2, 0)), 1)]).remove(0);
    assert_eq!(falls(&[JUMP], &[&deep, &below]), Some(deep.clone()));
}

#[test]
fn a_chance_of_0_is_named_once_and_where_connections_come() {
    let never = format!("-p tcp {}", random("0"));
    let lines = rules("W", [(&*never, 0), ("-p tcp", 1), (&*never, 2)]);
    assert_eq!(
        found_in_w(&lines),
        [
            (Code::Unreachable, lines[0].clone()),
            (Code::Unreachable, lines[2].clone())
        ]
    );
    let mut chains = of(&[JUMP, &lines[0], &lines[1], &lines[2]])
        .chains
        .into_iter();
    let found = chains.find(|chain| chain.chain == "W").unwrap().findings;
    let messages = found.iter().filter(|found| found.code == Code::Unreachable);
    let messages: Vec<bool> = messages
        .map(|found| found.message.contains("chance is 0"))
        .collect();
    assert_eq!(messages, [true, false]);
    // Nothing leads to the chain, and a rule that leads nowhere.
    assert_eq!(
        chain_codes(&[&lines[0], &lines[1]]),
        [("W".to_owned(), Code::ForwardBlocks)]
    );
    let log = format!("-A W {never} -j LOG");
    let half = format!("-p tcp {}", random("0.5"));
    let mut lines = vec![log];
    lines.extend(rules("W", [(&*half, 0), ("-p tcp", 1)]));
    assert_eq!(codes_in_w(&lines), []);
}

/// The walk through FORWARD is bounded; beyond its bounds nothing is reported.
#[test]
fn deep_and_wide_filter_tables_neither_hang_nor_report() {
    let filter = |depth: usize, jumps: usize| {
        let names: String = (0..=depth).map(|at| format!(":c{at} - [0:0]\n")).collect();
        let rules: String = (0..depth)
            .map(|at| format!("-A c{at} -j c{}\n", at + 1).repeat(jumps))
            .collect();
        format!("*filter\n:FORWARD DROP [0:0]\n{names}-A FORWARD -j c0\n{rules}COMMIT\n")
    };
    let is_blocked = |filter: &str| {
        let tables = read(filter.as_bytes(), None).unwrap();
        let packet = Packet {
            protocol: Some("tcp"),
            to: Endpoint::parse("10.0.0.1:80").unwrap(),
            passes_by: &|_| false,
        };
        blocks(&tables[0], &packet).is_some()
    };
    assert!(is_blocked(&filter(50, 1)));
    assert!(!is_blocked(&filter(100, 1)));
    assert!(is_blocked(&filter(10, 2)));
    assert!(!is_blocked(&filter(40, 2)));
}

/// A chain that is known not to be about the packet is passed by.
#[test]
fn forward_passes_by_the_chains_of_others() {
    let filter =
        "*filter\n:FORWARD DROP [0:0]\n:U - [0:0]\n-A FORWARD -j U\n-A U -j ACCEPT\nCOMMIT\n";
    let tables = read(filter.as_bytes(), None).unwrap();
    let by = |name: &'static str| {
        let packet = Packet {
            protocol: None,
            to: Endpoint::parse("10.0.0.1").unwrap(),
            passes_by: &|chain| chain == name,
        };
        blocks(&tables[0], &packet)
    };
    assert_eq!(by("U").as_deref(), Some("its policy DROP"));
    assert_eq!(by("V"), None);
    // A policy that accepts stops nothing, nor does a table without the chain.
    for (head, is_blocked) in [
        (":FORWARD DROP [0:0]", true),
        (":FORWARD ACCEPT [0:0]", false),
        (":INPUT DROP [0:0]", false),
    ] {
        let tables = read(format!("*filter\n{head}\nCOMMIT\n").as_bytes(), None).unwrap();
        let packet = Packet {
            protocol: None,
            to: Endpoint::parse("10.0.0.1").unwrap(),
            passes_by: &|_| false,
        };
        assert_eq!(blocks(&tables[0], &packet).is_some(), is_blocked, "{head}");
    }
}

/// Facts of the host: backends that are the host itself, and forwarding.
#[test]
fn backends_that_are_the_host_are_named_only_on_the_balanced_port() {
    use Code::{BackendIsHost, ForwardBlocks, ForwardingOff};
    let own: IpAddr = "192.0.2.1".parse().unwrap();
    let codes = |jump: &str, first: &str, second: &str, forwarding: Option<bool>| {
        let dump = format!(
            "*filter\n:FORWARD DROP [0:0]\nCOMMIT\n*nat\n:PREROUTING ACCEPT [0:0]\n:W - [0:0]\n-A PREROUTING {jump} -j W\n\
             -A W -p tcp {} -j DNAT --to-destination {first}\n-A W -p tcp -j DNAT --to-destination {second}\nCOMMIT\n",
            nth(2, 0)
        );
        let tables = read(dump.as_bytes(), None).unwrap();
        let forwarding = forwarding.map(|is_on| (Family::Ipv4, is_on));
        let facts = HostFacts {
            forwarding: forwarding.into_iter().collect(),
            own: vec![own],
            is_live: false,
        };
        let chains = explain(&tables, &[], &facts).chains.into_iter();
        let findings = chains.flat_map(|chain| chain.findings);
        findings
            .map(|found| (found.code, found.message))
            .collect::<Vec<_>>()
    };
    let only =
        |found: Vec<(Code, String)>| found.into_iter().map(|(code, _)| code).collect::<Vec<_>>();
    let port = "-p tcp -m tcp --dport 80";
    let here = "192.0.2.1:8080";
    // The service of the host on another port is no mistake, and is not forwarded.
    assert_eq!(codes(port, here, here, Some(false)), []);
    assert_eq!(codes(port, "127.0.0.1:8080", here, Some(false)), []);
    assert_eq!(
        only(codes(port, "192.0.2.1:80", here, None)),
        [BackendIsHost]
    );
    assert_eq!(only(codes(port, "192.0.2.1", here, None)), [BackendIsHost]);
    let many = "-p tcp -m multiport --dports 79,80:90";
    assert_eq!(
        only(codes(many, "192.0.2.1:85", here, None)),
        [BackendIsHost]
    );
    assert_eq!(codes(many, "192.0.2.1:91", here, None), []);
    // Known by the rule alone.
    let address = "-d 192.0.2.9/32 -p tcp -m tcp --dport 80";
    let network = "-d 192.0.2.8/29 -p tcp -m tcp --dport 80";
    assert_eq!(
        only(codes(address, "192.0.2.9:80", here, None)),
        [ForwardBlocks, BackendIsHost]
    );
    assert_eq!(
        only(codes(address, "192.0.2.9:81", here, None)),
        [ForwardBlocks]
    );
    assert_eq!(
        only(codes(network, "192.0.2.8:80", here, None)),
        [ForwardBlocks]
    );
    // Forwarding is about the others, which are named.
    let [blocked, off] = codes(port, here, "10.0.0.2:80", Some(false))
        .try_into()
        .unwrap();
    assert_eq!((blocked.0, off.0), (ForwardBlocks, ForwardingOff));
    assert_eq!(
        blocked.1,
        "connections to `10.0.0.2:80` are stopped in filter's FORWARD by its policy DROP"
    );
    assert!(
        off.1.ends_with("so nothing reaches `10.0.0.2:80`"),
        "{}",
        off.1
    );
    for forwarding in [None, Some(true)] {
        assert_eq!(
            only(codes(port, here, "10.0.0.2:80", forwarding)),
            [ForwardBlocks]
        );
    }
}
