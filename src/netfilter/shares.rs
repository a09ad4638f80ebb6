//! The share of each backend, computed from the rules.

use std::collections::{HashMap, HashSet};

use crate::netfilter::Endpoint;
use crate::netfilter::flow::Flow;
use crate::netfilter::rule::Target;
use crate::netfilter::ruleset::{OwnedTable, SavedRule};
use crate::netfilter::statistic::Share;

/// The share of each backend of the connections that reach `chain`.
///
/// The computation follows the rules: each takes its part of the connections
/// that the rules above it let pass. It ends at a rule that cannot be parsed,
/// and at a jump, because the connections that return from it are not known.
#[must_use]
pub fn shares_of_chain(owned: &OwnedTable, chain: &str) -> HashMap<Endpoint, Share> {
    let mut shares = HashMap::new();
    let mut reaching = HashMap::from([(chain, Flow::all())]);
    for name in in_order(owned, chain) {
        let mut left = reaching.remove(name).unwrap_or_default();
        for rule in &owned.chains[name].rules {
            let Some(meaning) = &rule.meaning else {
                break;
            };
            let taken = left.take(meaning.statistic, &meaning.hashes);
            match &meaning.target {
                Target::Dnat(endpoint) => {
                    let sum = shares.entry(*endpoint).or_insert(Share::NONE);
                    *sum = sum.and(taken.share());
                }
                Target::Goto(next) => reaching.entry(next).or_default().join(taken),
                Target::Jump(_) => break,
                Target::Accept
                | Target::Drop
                | Target::Reject(_)
                | Target::Masquerade
                | Target::Snat(_) => {}
            }
        }
    }
    shares
}

/// The chains that can be reached, each after all chains that lead to it. In a
/// cycle the order is arbitrary.
fn in_order<'a>(owned: &'a OwnedTable, chain: &'a str) -> Vec<&'a str> {
    let mut order = Vec::new();
    let mut seen = HashSet::new();
    let mut path = vec![(chain, 0)];
    while let Some((name, at)) = path.pop() {
        let rules = owned.chains.get(name).map_or(&[][..], |chain| &chain.rules);
        if at == 0 && (!owned.chains.contains_key(name) || !seen.insert(name)) {
            continue;
        }
        let goto = |rule: &'a SavedRule| match &rule.meaning.as_ref()?.target {
            Target::Goto(next) => Some(next.as_str()),
            _ => None,
        };
        let next = rules
            .iter()
            .enumerate()
            .skip(at)
            .find_map(|(at, rule)| Some((at, goto(rule)?)));
        match next {
            Some((at, next)) => path.extend([(name, at + 1), (next, 0)]),
            None => order.push(name),
        }
    }
    order.reverse();
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netfilter::Table;
    use crate::netfilter::ruleset::Ruleset;
    use crate::request::Name;

    fn shares_of(rules: &[&str]) -> Vec<(String, f64)> {
        let lines: String = rules.iter().map(|rule| format!("-A {rule}\n")).collect();
        let dump = format!("*nat\n:W - [0:0]\n{lines}COMMIT\n");
        let owned = Ruleset::read(dump.as_bytes(), &Name::new("W").unwrap())
            .unwrap()
            .owned(Table::Nat)
            .clone();
        let mut shares: Vec<_> = shares_of_chain(&owned, "W")
            .into_iter()
            .map(|(endpoint, share)| (endpoint.address.to_string(), share.as_f64()))
            .collect();
        shares.sort_by(|a, b| a.0.cmp(&b.0));
        shares
    }

    #[test]
    fn every_four_on_all_lines_is_not_a_quarter_each() {
        let rules = [1, 2, 3, 4].map(|n| format!("W -m statistic --mode nth --every 4 --packet 0 -j DNAT --to-destination 192.0.2.{n}"));
        let shares = shares_of(&rules.each_ref().map(String::as_str));
        let values: Vec<f64> = shares.iter().map(|(_, share)| *share).collect();
        assert_eq!(values, [0.25, 0.1875, 0.140_625, 0.105_468_75]);
    }

    #[test]
    fn thirds_are_the_nearest_double() {
        let shares = shares_of(&[
            "W -m statistic --mode nth --every 3 --packet 0 -j DNAT --to-destination 192.0.2.1",
            "W -m statistic --mode nth --every 2 --packet 0 -j DNAT --to-destination 192.0.2.2",
            "W -j DNAT --to-destination 192.0.2.3",
        ]);
        assert!(
            shares
                .iter()
                .all(|(_, share)| share.to_bits() == (1.0_f64 / 3.0).to_bits()),
            "{shares:?}"
        );
    }

    #[test]
    fn sub_chains_are_followed_and_loops_end() {
        let shares = shares_of(&[
            "W -m statistic --mode nth --every 2 --packet 0 -g W/a",
            "W -m statistic --mode random --probability 0.5 -g W/b",
            "W -j DNAT --to-destination 192.0.2.9",
            "W/a -j DNAT --to-destination 192.0.2.1",
            "W/b -m statistic --mode random --probability 0.5 -j DNAT --to-destination 192.0.2.2",
            "W/b -g W/a",
        ]);
        let expected = [
            ("192.0.2.1", 0.625),
            ("192.0.2.2", 0.125),
            ("192.0.2.9", 0.25),
        ];
        assert_eq!(
            shares,
            expected.map(|(address, share)| (address.to_owned(), share))
        );
        assert_eq!(shares_of(&["W -g W"]), []);
        assert_eq!(shares_of(&["W -g W/a", "W/a -g W"]), []);
    }

    #[test]
    fn shares_end_at_an_unreadable_rule() {
        assert_eq!(
            shares_of(&[
                "W -m mark --mark 0x1 -j DROP",
                "W -j DNAT --to-destination 192.0.2.1"
            ]),
            []
        );
    }
}
