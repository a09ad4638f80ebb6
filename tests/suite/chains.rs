//! The chains that are explained, the rules that never match, and the counters that are compared.

use std::fmt::Write as _;

use iptables_balance::explain::{
    Code, ExplainedChain, Explanation, HostFacts, Traffic, explain, read, taken_before,
};
use iptables_balance::netfilter::{Family, PortRange, Ports, Protocol};

use crate::explain::{TO, codes, explained, nth};
use crate::lint::{JUMP, chain_codes, codes_in_w, of, random, rules};

fn names(found: &Explanation) -> Vec<&str> {
    found
        .chains
        .iter()
        .map(|chain| chain.chain.as_str())
        .collect()
}

fn chain(found: Explanation, name: &str) -> ExplainedChain {
    let mut chains = found.chains.into_iter();
    chains.find(|chain| chain.chain == name).unwrap()
}

const TAKE: &str = "-A PREROUTING -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.9";

/// Rules of another table are in the dump, but this one only has nat.
fn nat(lines: &[&str]) -> Explanation {
    let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
    explained(&format!(
        "*nat\n:PREROUTING ACCEPT [0:0]\n:W - [0:0]\n:V - [0:0]\n:U - [0:0]\n{lines}COMMIT\n"
    ))
}

#[test]
fn a_rule_is_hidden_by_one_that_takes_all_its_connections_and_by_no_other() {
    let half = nth(2, 0);
    let some = [
        format!("-A U {half} -j DROP"),
        format!("-A PREROUTING -p tcp {half} -j RETURN"),
    ];
    for (before, is_hidden) in [
        (vec!["-A PREROUTING -p tcp -j RETURN"], true),
        (vec!["-A PREROUTING -p tcp -g V"], true),
        (vec!["-A PREROUTING -p tcp -j V"], false),
        (vec!["-A PREROUTING -p tcp -j DROP"], true),
        (vec!["-A PREROUTING -p tcp -j MARK --set-mark 1"], false),
        (vec![some[1].as_str()], false),
        (
            vec!["-A PREROUTING -p tcp -m limit --limit 5/sec -j ACCEPT"],
            false,
        ),
        (
            vec!["-A PREROUTING -p tcp -m comment --comment all -j ACCEPT"],
            true,
        ),
        (vec!["-A PREROUTING -j U", "-A U -j DROP"], true),
        (vec!["-A PREROUTING -j U", some[0].as_str()], false),
        (vec!["-A PREROUTING -j U", "-A U -p udp -j DROP"], false),
        (
            vec![
                "-A PREROUTING -j U",
                "-A U -s 192.0.2.0/24 -j RETURN",
                "-A U -j DROP",
            ],
            false,
        ),
        (
            vec![
                "-A PREROUTING -j U",
                "-A U -s 192.0.2.0/24 -g V",
                "-A U -j DROP",
            ],
            false,
        ),
        (
            vec![
                "-A PREROUTING -j U",
                "-A U -s 192.0.2.0/24 -j V",
                "-A U -j DROP",
            ],
            true,
        ),
        (
            vec!["-A PREROUTING -j U", "-A U -j DROP", "-A U -j RETURN"],
            true,
        ),
        (
            vec!["-A PREROUTING -p tcp -m tcp --dport 1:80 -j ACCEPT"],
            true,
        ),
        (
            vec!["-A PREROUTING -p tcp -m tcp --dport 81:90 -j ACCEPT"],
            false,
        ),
        (
            vec!["-A PREROUTING -p tcp -m multiport --dports 22,80 -j ACCEPT"],
            true,
        ),
        (vec!["-A PREROUTING -s 0.0.0.0/0 -p tcp -j ACCEPT"], true),
        (vec!["-A PREROUTING -i + -p tcp -j ACCEPT"], true),
        (vec!["-A PREROUTING ! -s 0.0.0.0/0 -p tcp -j ACCEPT"], false),
    ] {
        let mut lines = before.clone();
        lines.push(TAKE);
        let found = codes(&nat(&lines));
        let expected = [(String::new(), Code::Unreachable)];
        assert_eq!(
            found,
            if is_hidden { &expected[..] } else { &[] },
            "{before:?}"
        );
    }
    // Narrower networks.
    let of_source = |wide: &str, narrow: &str| {
        let wide = format!("-A PREROUTING -s {wide} -p tcp -j ACCEPT");
        let narrow = format!("-A PREROUTING -s {narrow} -p tcp -j DNAT --to-destination 10.0.0.9");
        codes(&nat(&[&wide, &narrow])).len()
    };
    assert_eq!(of_source("10.0.0.0/8", "10.1.0.0/16"), 1);
    assert_eq!(of_source("10.1.0.0/16", "10.1.0.0/16"), 1);
    assert_eq!(of_source("10.1.0.0/16", "10.0.0.0/8"), 0);
    assert_eq!(of_source("10.1.0.1/32", "10.1.0.1/32"), 1);
    // The same conditions with a limit are no promise.
    let limit = "-A PREROUTING -p tcp -m limit --limit 5/sec -j DNAT --to-destination 10.0.0.9";
    assert_eq!(codes(&nat(&[limit, limit])), []);
    let upto =
        "-A PREROUTING -p tcp -m connlimit ! --connlimit-upto 5 -j DNAT --to-destination 10.0.0.9";
    assert_eq!(codes(&nat(&[upto, upto])), []);
    // The same words about the packet are, whatever they mean.
    let named = "-A PREROUTING -s host.example -p tcp -j DNAT --to-destination 10.0.0.9";
    assert_eq!(codes(&nat(&[named, named])).len(), 1);
    // Ports that overlap.
    let some = "-A PREROUTING -p tcp -m tcp --dport 80:90 -j ACCEPT";
    let more = TAKE.replace("--dport 80", "--dport 85:95");
    assert_eq!(codes(&nat(&[some, &more])), []);
    // A rule that leads to no destination, and a chain that nothing leads to.
    let accept = "-A PREROUTING -p tcp -j ACCEPT";
    assert_eq!(
        codes(&nat(&[
            accept,
            "-A PREROUTING -p tcp -j LOG",
            "-A PREROUTING -p tcp -j DROP"
        ])),
        []
    );
    let other = TAKE.replace("-p tcp -m tcp", "-p udp -m udp");
    assert_eq!(
        codes(&nat(&[accept, "-A PREROUTING -p tcp -j DROP", &other])),
        []
    );
    let orphan = format!("-A W -p tcp {}", TO[0]);
    assert_eq!(codes(&nat(&[&orphan, &orphan])), []);
    // One of a hundred hides it.
    let mut many: Vec<String> = (0..100)
        .map(|net| format!("-A PREROUTING -s 10.{net}.0.0/16 -p tcp -j ACCEPT"))
        .collect();
    many.push("-A PREROUTING -s 10.5.6.0/24 -p tcp -j DNAT --to-destination 10.0.0.9".to_owned());
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(codes(&nat(&many)).len(), 1);
}

#[test]
fn a_finding_stands_at_its_chain_and_family() {
    let of_family = |command: &str, address: &str| {
        format!(
            "# Generated by {command}-save v1.8.9\n*nat\n:PREROUTING ACCEPT [0:0]\n:W - [0:0]\n-A PREROUTING -p tcp -j W\n\
             -A W -p tcp {} -j DNAT --to-destination {address}1\n-A W -p tcp -j DNAT --to-destination {address}2\nCOMMIT\n",
            nth(2, 0)
        )
    };
    let line = "-A W -p tcp -j DNAT --to-destination fd00::3\nCOMMIT\n";
    let (v4, v6) = (
        of_family("iptables", "10.0.0."),
        of_family("ip6tables", "fd00::"),
    );
    let v6 = v6.replace("COMMIT\n", line);
    let found = explained(&format!("{v4}{v6}"));
    let of = |family| {
        let mut chains = found
            .chains
            .iter()
            .filter(move |chain| chain.family == family);
        let chain = chains.next().unwrap();
        chain
            .findings
            .iter()
            .map(|finding| finding.code)
            .collect::<Vec<_>>()
    };
    assert_eq!(of(Family::Ipv4), []);
    assert_eq!(of(Family::Ipv6), [Code::Unreachable]);
    // FORWARD of the other family stops nothing.
    let filter = "# Generated by ip6tables-save v1.8.9\n*filter\n:FORWARD DROP [0:0]\nCOMMIT\n";
    assert_eq!(codes(&explained(&format!("{filter}{v4}"))), []);
    // Without a comment the addresses tell the family.
    let bare = |text: &str| {
        text.lines()
            .skip(1)
            .fold(String::new(), |all, line| all + line + "\n")
    };
    assert_eq!(explained(&bare(&v6)).chains[0].family, Family::Ipv6);
    assert_eq!(explained(&bare(&v4)).chains[0].family, Family::Ipv4);
    let source = bare(&v4).replace("-A PREROUTING", "-A PREROUTING -s fd00::/64");
    assert_eq!(explained(&source).chains[0].family, Family::Ipv6);
    // The comment tells it where no address does.
    let empty = "# Generated by ip6tables-save v1.8.9\n*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j REDIRECT --to-ports 80\nCOMMIT\n";
    assert_eq!(
        read(empty.as_bytes(), None).unwrap()[0].family,
        Family::Ipv6
    );
}

#[test]
fn only_named_chains_are_shown_with_their_findings() {
    let half = format!("-p tcp {}", nth(2, 0));
    let lines = rules("W", [(&*half, 0), ("-p tcp", 1)]);
    let dump = format!(
        "*nat\n:PREROUTING ACCEPT [0:0]\n:W - [0:0]\n:U - [0:0]\n-A PREROUTING -p tcp -j ACCEPT\n{TAKE}\n{JUMP}\n-A U -j LOG\n{}\nCOMMIT\n",
        lines.join("\n")
    );
    let tables = read(dump.as_bytes(), None).unwrap();
    let of = |only: &[&str]| {
        let only: Vec<String> = only.iter().map(|name| (*name).to_owned()).collect();
        explain(&tables, &only, &HostFacts::default())
    };
    let all = of(&[]);
    assert_eq!(names(&all), ["W"]);
    assert_eq!(
        codes(&all),
        [
            ("W".to_owned(), Code::ShadowedJump),
            (String::new(), Code::Unreachable)
        ]
    );
    let one = of(&["W"]);
    assert_eq!(codes(&one), [("W".to_owned(), Code::ShadowedJump)]);
    let empty = of(&["U"]);
    assert_eq!(names(&empty), ["U"]);
    assert_eq!(codes(&empty), []);
    assert!(empty.chains[0].shares.is_empty() && empty.chains[0].unmatched >= 1.0);
    let both = of(&["PREROUTING", "W"]);
    assert_eq!(names(&both), ["PREROUTING", "W"]);
}

#[test]
fn the_chains_that_share_out_are_shown_once() {
    let half = nth(2, 0);
    let shown = |lines: &[&str]| names(&of(lines)).join(" ");
    let first = format!("-A W -p tcp {half} -j V");
    let last = format!("-A W -p tcp {}", TO[1]);
    let below = format!("-A V -p tcp {}", TO[0]);
    assert_eq!(shown(&[JUMP, &first, &last, &below]), "W");
    // Another rule leads to the chain below, where nothing is shared out.
    let other = "-A PREROUTING -p tcp -m tcp --dport 81 -j V";
    assert_eq!(shown(&[JUMP, other, &first, &last, &below]), "W V");
    // A rule that leads nowhere shares nothing out.
    let log = format!("-A PREROUTING {half} -j LOG");
    assert_eq!(
        shown(&[&log, "-A PREROUTING -j DNAT --to-destination 10.0.0.9"]),
        ""
    );
    // A chain that takes all is shown if something leads there.
    assert_eq!(shown(&[&below]), "");
    assert_eq!(shown(&[other, &below]), "V");
    // The connections of W do not meet the conditions below, so V stands for itself.
    let below = [
        format!("-A V -d 192.0.2.1/32 -p tcp {half} {}", TO[0]),
        format!("-A V -d 192.0.2.1/32 -p tcp {}", TO[1]),
    ];
    assert_eq!(shown(&[JUMP, &first, &below[0], &below[1]]), "V");
    // A log of one protocol makes no class of its own.
    let log = "-A W -p udp -j LOG";
    let found = of(&[
        "-A PREROUTING -j W",
        log,
        &format!("-A W {half} {}", TO[0]),
        &format!("-A W {}", TO[1]),
    ]);
    let conditions: Vec<_> = found
        .chains
        .iter()
        .map(|chain| chain.conditions.as_slice())
        .collect();
    assert_eq!(conditions, [&[] as &[String]]);
}

#[test]
fn conditions_that_are_always_met_are_none() {
    let conditions = |matches: &str| {
        let first = format!("-A W {matches} {} {}", nth(2, 0), TO[0]);
        let last = format!("-A W {matches} {}", TO[1]);
        chain(nat(&["-A PREROUTING -j W", &first, &last]), "W")
            .conditions
            .join(" ")
    };
    for always in [
        "",
        "-s 0.0.0.0/0",
        "-d 0.0.0.0/0",
        "-p all",
        "-p 0",
        "-i +",
        "-o +",
        "--dport 0:65535",
    ] {
        assert_eq!(conditions(always), "", "{always}");
    }
    for some in [
        "! -s 0.0.0.0/0",
        "! -i +",
        "-s 10.0.0.0/8",
        "-i eth+",
        "-p tcp",
        "-p tcp --dport 1:65535",
    ] {
        assert_eq!(conditions(some), some);
    }
    // Rules with wider conditions are about the same connections.
    let first = format!("-A W -s 10.1.0.0/16 -p tcp {} {}", nth(2, 0), TO[0]);
    let last = format!("-A W -s 10.0.0.0/8 -p tcp {}", TO[1]);
    let shares = chain(nat(&["-A PREROUTING -j W", &first, &last]), "W").shares;
    assert_eq!(shares.len(), 2, "{shares:?}");
    assert_eq!(conditions("-m recent --set --name W --rsource"), "");
    assert_eq!(
        conditions("-m recent ! --set --name W --rsource"),
        "-m recent --set --name W --rsource"
    );
    assert_eq!(
        conditions("-m recent --rcheck --name W --rsource"),
        "-m recent --rcheck --name W --rsource"
    );
}

/// `--bytecode` with a hash of this program, in its two senses.
#[test]
fn inverted_choices_are_the_rest() {
    const HASH: &str = "-m bpf --bytecode \"17,32 0 0 12,164 0 0 3779364248,36 0 0 2654435761,7 0 0 0,116 0 0 16,172 0 0 0,\
        36 0 0 2246822507,7 0 0 0,116 0 0 13,172 0 0 0,36 0 0 3266489909,7 0 0 0,116 0 0 16,172 0 0 0,\
        53 0 1 2147483648,6 0 0 0,6 0 0 1\"";
    let of = |matches: &str| {
        let lines = rules("W", [(matches, 0), ("-p tcp", 1)]);
        let lines: Vec<&str> = [JUMP]
            .into_iter()
            .chain(lines.iter().map(String::as_str))
            .collect();
        chain(nat(&lines), "W")
    };
    let share = |matches: &str| of(matches).shares[0].share;
    assert!((share(&format!("-p tcp {}", random("0.25"))) - 0.25).abs() < 1e-9);
    let inverted = random("0.25").replace("--probability", "! --probability");
    assert!((share(&format!("-p tcp {inverted}")) - 0.75).abs() < 1e-9);
    let hash = of(&format!("-p tcp {HASH}"));
    assert!((hash.shares[0].share - 0.5).abs() < 1e-9 && hash.conditions == ["-p tcp"]);
    // iptables has no inverted one, so what it would mean is not known.
    let inverted = HASH.replace("--bytecode", "! --bytecode");
    let both: Vec<String> = rules(
        "W",
        [
            (&*format!("-p tcp {}", nth(2, 0)), 0),
            (&*format!("-p tcp {inverted}"), 2),
            ("-p tcp", 1),
        ],
    );
    let both: Vec<&str> = [JUMP]
        .into_iter()
        .chain(both.iter().map(String::as_str))
        .collect();
    let shares = chain(nat(&both), "W").shares;
    assert_eq!(shares.len(), 2, "{shares:?}");
    // Counters are compared by chance where chance alone decides.
    let counted = |choices: [&str; 2]| {
        let lines = rules(
            "W",
            [
                (&*format!("-p tcp {}", choices[0]), 0),
                (&*format!("-p tcp {}", choices[1]), 1),
                ("-p tcp", 2),
            ],
        );
        let lines: Vec<String> = lines
            .into_iter()
            .map(|line| format!("[99:9] {line}"))
            .collect();
        let jump = format!("[9:9] {JUMP}");
        chain(nat(&[&jump, &lines[0], &lines[1], &lines[2]]), "W")
    };
    let (turn, chance) = (nth(2, 0), random("0.5"));
    let compared = |chain: ExplainedChain| (chain.p_value.is_some(), chain.deviation.is_some());
    assert_eq!(compared(counted([&chance, &chance])), (true, false));
    assert_eq!(compared(counted([&turn, &turn])), (false, true));
    assert_eq!(compared(counted([&turn, &chance])), (false, false));
    assert_eq!(compared(counted([HASH, &chance])), (false, false));
    assert_eq!(compared(counted([HASH, &turn])), (false, false));
    // A log in turn decides nothing.
    let log = format!("[9:9] -A W -p tcp {turn} -j LOG");
    let lines = rules("W", [(&*format!("-p tcp {chance}"), 0), ("-p tcp", 2)]);
    let lines: Vec<String> = lines
        .into_iter()
        .map(|line| format!("[99:9] {line}"))
        .collect();
    let jump = format!("[9:9] {JUMP}");
    assert_eq!(
        compared(chain(nat(&[&jump, &log, &lines[0], &lines[1]]), "W")),
        (true, false)
    );
}

/// By hand: `--every 3` lets at most one connection go before its turn, and so on.
#[test]
fn the_bounds_in_turn_add_up_over_the_ways_to_a_destination() {
    let bound = |lines: &[String]| {
        let lines: Vec<String> = lines.iter().map(|line| format!("[30:30] {line}")).collect();
        let jump = format!("[90:90] {JUMP}");
        let lines: Vec<&str> = [jump.as_str()]
            .into_iter()
            .chain(lines.iter().map(String::as_str))
            .collect();
        let chain = chain(nat(&lines), "W");
        let packets: Vec<_> = chain
            .shares
            .iter()
            .map(|share| share.packets.unwrap())
            .collect();
        (chain.deviation.unwrap().bound, packets)
    };
    let (three, two) = (
        format!("-p tcp {}", nth(3, 0)),
        format!("-p tcp {}", nth(2, 0)),
    );
    let plain = rules("W", [(&*three, 0), (&*two, 1), ("-p tcp", 2)]);
    assert_eq!(bound(&plain), (1.5, vec![30, 30, 30]));
    let twice = rules("W", [(&*three, 0), (&*two, 1), ("-p tcp", 0)]);
    assert_eq!(bound(&twice), (2.5, vec![60, 30]));
    let mut jumps = vec![format!("-A W {three} -j V"), format!("-A W {two} -j V")];
    jumps.extend(rules("W", [("-p tcp", 1)]));
    jumps.extend(rules("V", [("-p tcp", 0)]));
    assert_eq!(bound(&jumps), (2.5, vec![30, 30]));
}

/// A goto does not come back to the chain that it left, and the rules behind one that takes
/// everything are shown all the same.
#[test]
fn a_goto_returns_to_the_chain_before() {
    let half = nth(2, 0);
    let first = format!("-A W -p tcp {half} -j V");
    let last = format!("-A W -p tcp {}", TO[1]);
    let below = [
        format!("-A V -p tcp {half} -g U"),
        format!("-A V -p tcp {}", TO[0]),
    ];
    let found = chain(of(&[JUMP, &first, &last, &below[0], &below[1]]), "W");
    let fractions: Vec<_> = found
        .shares
        .iter()
        .map(|share| share.fraction.as_deref().unwrap())
        .collect();
    assert_eq!(fractions, ["3/4", "1/4"]);
    let hidden = format!("-A W -p tcp {half} {}", TO[2]);
    let found = chain(of(&[JUMP, &last, &hidden]), "W");
    assert_eq!(found.steps.len(), 2);
    assert_eq!(codes_in_w(&[last, hidden]), [Code::Unreachable]);
}

#[test]
fn the_rule_before_a_balancer_takes_all_its_connections_or_is_not_named() {
    let traffic = || {
        let ports = Ports::new(vec![
            PortRange::parse("80").unwrap(),
            PortRange::parse("443").unwrap(),
        ]);
        Traffic::new(Protocol::Tcp, &ports)
            .with("-d", ["192.0.2.1/32".to_owned()])
            .with("-i", ["eth0".to_owned(), "eth1".to_owned()])
    };
    let named = |before: &[&str], count: usize| {
        let lines: String = before
            .iter()
            .map(|line| format!("-A PREROUTING {line}\n"))
            .collect();
        let dump = format!(
            "*nat\n:PREROUTING ACCEPT [0:0]\n:W - [0:0]\n:U - [0:0]\n:V - [0:0]\n{lines}-A U -j DNAT --to-destination 10.0.0.9\n\
             -A W -j DNAT --to-destination 10.0.0.1\nCOMMIT\n"
        );
        let tables = read(dump.as_bytes(), None).unwrap();
        taken_before(&tables[0], "PREROUTING", &traffic(), count, |name| {
            name == "W"
        })
    };
    let half = nth(2, 0);
    for (before, takes) in [
        ("-j ACCEPT", true),
        ("-j U", true),
        ("-g V", true),
        ("-j V", false),
        ("-j LOG", false),
        ("-p tcp -j ACCEPT", true),
        ("-p udp -j ACCEPT", false),
        ("-p tcp -m multiport --dports 80,443 -j ACCEPT", true),
        ("-p tcp -m tcp --dport 80:443 -j ACCEPT", true),
        ("-p tcp -m tcp --dport 80 -j ACCEPT", false),
        ("-d 192.0.2.1/32 -j ACCEPT", true),
        ("-d 192.0.2.0/24 -j ACCEPT", true),
        ("-d 192.0.2.2/32 -j ACCEPT", false),
        ("-s 10.0.0.0/8 -j ACCEPT", false),
        ("-i eth0 -j ACCEPT", false),
        ("-m limit --limit 5/sec -j ACCEPT", false),
        ("-m addrtype --dst-type LOCAL -j ACCEPT", false),
        (&*format!("{half} -j ACCEPT"), false),
        ("-j W", false),
    ] {
        let expected = takes.then(|| format!("-A PREROUTING {before}"));
        assert_eq!(named(&[before], 1), expected, "{before}");
    }
    // The first so many rules, without those that lead to the balancer.
    let accept = Some("-A PREROUTING -j ACCEPT".to_owned());
    assert_eq!(named(&["-j LOG", "-j ACCEPT"], 2), accept);
    assert_eq!(named(&["-j LOG", "-j ACCEPT"], 1), None);
    assert_eq!(named(&["-j W", "-j ACCEPT"], 1), accept);
    // A condition of its own state is not met, even if it is asked for in the same words.
    let limited = traffic().with("--limit", ["5/sec".to_owned()]);
    let dump =
        "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -m limit --limit 5/sec -j ACCEPT\nCOMMIT\n";
    let tables = read(dump.as_bytes(), None).unwrap();
    assert_eq!(
        taken_before(&tables[0], "PREROUTING", &limited, 1, |_| false),
        None
    );
    assert_eq!(chain_codes(&[]), []);
}

/// A connection may come back from a chain and enter it again, so more than all enter it. No
/// share is lost there, and what is lost in rounding is no share of nobody.
#[test]
fn connections_that_enter_a_chain_again_keep_their_shares() {
    let mut lines = vec![JUMP.to_owned()];
    let mut left = 1.0;
    for number in 0..40 {
        let chance = format!("0.{}", 3000 + 37 * number);
        left *= 1.0 - (1.0 - 0.9 * 0.876_544) * chance.parse::<f64>().unwrap();
        lines.push(format!("-A W -p tcp {} -j V", random(&chance)));
    }
    lines.push(format!("-A W -p tcp {}", TO[1]));
    lines.push("-A V -p tcp -j U".to_owned());
    lines.push(format!("-A V -p tcp {} {}", random("0.123456"), TO[0]));
    lines.push(format!("-A U -p tcp {} {}", random("0.1"), TO[2]));
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    let found = chain(nat(&lines), "W");
    let shares: Vec<f64> = found.shares.iter().map(|share| share.share).collect();
    assert!((shares[0] - left).abs() < 1e-8, "{shares:?} {left}");
    assert!(
        (shares.iter().sum::<f64>() - 1.0).abs() < 1e-12,
        "{shares:?}"
    );
    assert!(found.unmatched <= 0.0, "{}", found.unmatched);
    assert_eq!(found.findings, []);
    // As many as the kernel would never visit.
    let mut dump = "*nat\n:PREROUTING ACCEPT [0:0]\n".to_owned();
    for chain in 0..=3000 {
        let _ = writeln!(dump, ":c{chain} - [0:0]");
    }
    dump += "-A PREROUTING -j c0\n";
    for chain in 0..3000 {
        let _ = write!(
            dump,
            "{}",
            format!("-A c{chain} -j c{}\n", chain + 1).repeat(2)
        );
    }
    let _ = writeln!(
        dump,
        "-A c3000 {} {}\n-A c0 {}\nCOMMIT",
        random("0"),
        TO[0],
        TO[1]
    );
    let found = explained(&dump).chains.remove(0);
    assert!(
        found.visits.is_finite() && found.visits > 1e200,
        "{}",
        found.visits
    );
    let (share, fraction) = (found.shares[0].share, found.shares[0].fraction.as_deref());
    assert_eq!((share >= 1.0, fraction), (true, Some("1")));
}
