//! Changes into the text of one `iptables-restore --noflush`.

use std::collections::BTreeMap;

use crate::change::{Action, Change, Kind};
use crate::net::{Family, Table};
use crate::plan::is_filter_mark;
use crate::ruleset::{Chain, Counters, Owned, Ruleset, SavedRule};

/// The transaction that carries out the changes to what was found of one
/// family, and `None` when there are none. Each table is one atomic
/// `*table ... COMMIT` block.
#[must_use]
pub fn transaction(changes: &[Change], family: Family, found: &Ruleset) -> Option<Vec<u8>> {
    let changes = changes.iter().filter(|change| change.family == family);
    let mut text = Vec::new();
    let replaces = !loses_replacements(found.version.as_deref());
    for (table, changes) in blocks(changes) {
        block(table, &changes, found.owned(table), replaces, &mut text);
    }
    (!text.is_empty()).then_some(text)
}

/// The same for an empty host, where nobody sees what is in between: each table
/// once, as a file that is loaded at boot has to have it.
#[must_use]
pub fn from_nothing(changes: &[Change], family: Family) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    for table in [Table::Filter, Table::Nat] {
        let of_table = |change: &&Change| change.family == family && change.table == table;
        let changes: Vec<&Change> = changes.iter().filter(of_table).collect();
        if !changes.is_empty() {
            block(table, &changes, &Owned::default(), true, &mut text);
        }
    }
    (!text.is_empty()).then_some(text)
}

/// Before 1.8.3 iptables-nft-restore only heeded the first `-R` of a
/// transaction (netfilter bug 1348).
fn loses_replacements(version: Option<&str>) -> bool {
    let numbers = version.and_then(|version| {
        let parts = version.split('.').map(|part| part.parse().ok());
        parts.collect::<Option<Vec<u32>>>()
    });
    numbers.is_some_and(|numbers| numbers < vec![1, 8, 3])
}

/// The changes by table, in an order in which nothing slips through in between
/// and nothing is forgotten if the second table is never reached.
///
/// What filter accepts or refuses for us is there before nat sends connections
/// that way, and goes after. The mark in nat, that there is something in
/// filter, is there before that is, and goes after.
fn blocks<'a>(changes: impl Iterator<Item = &'a Change>) -> Vec<(Table, Vec<&'a Change>)> {
    let mut tables: BTreeMap<Table, Vec<&Change>> = BTreeMap::new();
    for change in changes {
        tables.entry(change.table).or_default().push(change);
    }
    let filter = tables.remove(&Table::Filter).unwrap_or_default();
    let is_mark = |change: &&Change| is_filter_mark(&change.chain);
    let (mark, nat): (Vec<_>, Vec<_>) = tables
        .remove(&Table::Nat)
        .unwrap_or_default()
        .into_iter()
        .partition(is_mark);
    let only_deletes = |changes: &[&Change]| {
        let deletes =
            |change: &&Change| matches!(change.action.kind(), Kind::DeleteRule | Kind::DeleteChain);
        changes.iter().all(deletes)
    };
    let (before, after) = match only_deletes(&mark) {
        true => (Vec::new(), mark),
        false => (mark, Vec::new()),
    };
    let first_filter = !only_deletes(&filter);
    let (one, other) = match first_filter {
        true => ((Table::Filter, filter), (Table::Nat, nat)),
        false => ((Table::Nat, nat), (Table::Filter, filter)),
    };
    let ordered = [(Table::Nat, before), one, other, (Table::Nat, after)];
    tables
        .into_iter()
        .chain(ordered)
        .filter(|(_, changes)| !changes.is_empty())
        .collect()
}

/// Chains that go may lead to each other, so all of them are emptied before
/// the first is deleted.
fn block(table: Table, changes: &[&Change], found: &Owned, replaces: bool, text: &mut Vec<u8>) {
    text.extend(format!("*{}\n", table.as_str()).into_bytes());
    for edits in changes.chunk_by(|one, next| one.chain == next.chain) {
        let chain = &edits[0].chain;
        let refill = found
            .chains
            .get(chain)
            .is_some_and(|found| nothing_stays(found, edits));
        if refill {
            text.extend(format!("-F {chain}\n").into_bytes());
        }
        for change in edits {
            match refill {
                true => fill(chain, &change.action, text),
                false => step(chain, &change.action, replaces, text),
            }
        }
    }
    for change in changes
        .iter()
        .filter(|change| change.action == Action::DeleteChain)
    {
        text.extend(format!("-X {}\n", change.chain).into_bytes());
    }
    text.extend(b"COMMIT\n");
}

/// Whether every rule of a chain is replaced or deleted. It comes to the same
/// then to empty the chain and to fill it, and spares iptables the walk to each
/// number: with 10,000 rules `-R` takes four times as long with iptables-nft,
/// and two and a half times with iptables-legacy (1.8.9, `benches/refill.py`).
fn nothing_stays(found: &Chain, edits: &[&Change]) -> bool {
    let goes =
        |change: &&&Change| matches!(change.action, Action::Replace { .. } | Action::DeleteAt(..));
    !found.rules.is_empty() && edits.iter().filter(goes).count() == found.rules.len()
}

/// What a step leaves in a chain that was emptied: edits come in ascending order.
fn fill(chain: &str, action: &Action, text: &mut Vec<u8>) {
    if let Action::Append(rule) | Action::Insert(_, rule) | Action::Replace { rule, .. } = action {
        line(&format!("-A {chain}"), Some(rule.counters), rule, text);
    }
}

fn step(chain: &str, action: &Action, replaces: bool, text: &mut Vec<u8>) {
    match action {
        Action::Replace { at, rule, .. } if !replaces => {
            text.extend(format!("-D {chain} {at}\n").into_bytes());
            line(&format!("-I {chain} {at}"), Some(rule.counters), rule, text);
        }
        Action::CreateChain => text.extend(format!(":{chain} - [0:0]\n").into_bytes()),
        Action::Append(rule) => line(&format!("-A {chain}"), Some(rule.counters), rule, text),
        Action::Insert(1, rule) => line(&format!("-I {chain}"), Some(rule.counters), rule, text),
        Action::Insert(at, rule) => {
            line(&format!("-I {chain} {at}"), Some(rule.counters), rule, text);
        }
        Action::Replace { at, rule, .. } => {
            line(&format!("-R {chain} {at}"), Some(rule.counters), rule, text);
        }
        Action::DeleteAt(at, _) => text.extend(format!("-D {chain} {at}\n").into_bytes()),
        Action::DeleteFirst(rule) => line(&format!("-D {chain}"), None, rule, text),
        Action::DeleteChain => text.extend(format!("-F {chain}\n").into_bytes()),
    }
}

/// A command, the counters where there are some to carry over, and the rule,
/// whose text begins with a blank.
fn line(command: &str, counters: Option<Counters>, rule: &SavedRule, text: &mut Vec<u8>) {
    text.extend(command.as_bytes());
    if let Some(Counters { packets, bytes }) =
        counters.filter(|counters| *counters != Counters::default())
    {
        text.extend(format!(" -c {packets} {bytes}").into_bytes());
    }
    text.extend(&rule.text);
    text.push(b'\n');
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::change::applied;
    use crate::diff;
    use crate::plan::Plan;
    use crate::request::Request;

    /// What a transaction does to chains, in order, from one request to another.
    fn order(from: &Value, to: &Value) -> Vec<String> {
        let plan = |request: &Value| {
            let object = request.as_object().unwrap().clone();
            Plan::new(&Request::from_json(object).unwrap())
        };
        let found = diff::to_plan(&plan(from), Family::Ipv4, &Ruleset::default());
        let found = applied(&found, Family::Ipv4, &Ruleset::default());
        let changes = diff::to_plan(&plan(to), Family::Ipv4, &found);
        let text = transaction(&changes, Family::Ipv4, &found).unwrap();
        let text = String::from_utf8(text).unwrap();
        let is_step = |line: &&str| line.starts_with(['*', ':']) || line.starts_with("-X");
        text.lines().filter(is_step).map(str::to_owned).collect()
    }

    #[test]
    fn filter_is_ready_before_nat_needs_it_and_the_mark_outlives_it() {
        let plain = json!({"name": "W", "destination_port": 80, "backends": "192.0.2.1"});
        let with = |name: &str, value: Value| {
            let mut request = plain.clone();
            request[name] = value;
            request
        };
        let absent = json!({"name": "W", "state": "absent"});
        let forward = with("forward", json!(true));
        assert_eq!(
            order(&absent, &forward),
            [
                "*nat",
                ":W/filter - [0:0]",
                "*filter",
                ":W/forward - [0:0]",
                "*nat",
                ":W - [0:0]"
            ]
        );
        assert_eq!(
            order(&forward, &absent),
            [
                "*nat",
                "-X W",
                "*filter",
                "-X W/forward",
                "*nat",
                "-X W/filter"
            ]
        );
        let empty = with("backends", json!("192.0.2.1 weight=0"));
        assert_eq!(
            order(&plain, &empty),
            [
                "*nat",
                ":W/filter - [0:0]",
                "*filter",
                ":W/refuse - [0:0]",
                "*nat",
                ":W/drain - [0:0]"
            ]
        );
        assert_eq!(
            order(&empty, &plain),
            [
                "*nat",
                "-X W/drain",
                "*filter",
                "-X W/refuse",
                "*nat",
                "-X W/filter"
            ]
        );
    }

    #[test]
    fn old_versions_are_told_in_other_words() {
        let rule = |text: &str| SavedRule::new(Table::Nat, text.as_bytes(), Counters::default());
        let change = Change {
            family: Family::Ipv4,
            table: Table::Nat,
            chain: "W".to_owned(),
            action: Action::Replace {
                at: 2,
                before: rule(" -j ACCEPT").into(),
                rule: rule(" -j RETURN"),
            },
        };
        let text = |version: Option<&str>| {
            let found = Ruleset {
                version: version.map(str::to_owned),
                ..Ruleset::default()
            };
            let text = transaction(std::slice::from_ref(&change), Family::Ipv4, &found);
            String::from_utf8(text.unwrap()).unwrap()
        };
        let replaced = "*nat\n-R W 2 -j RETURN\nCOMMIT\n";
        for version in [
            None,
            Some("1.8.3"),
            Some("1.8.9"),
            Some("1.8.11"),
            Some("2.0"),
            Some("x"),
        ] {
            assert_eq!(text(version), replaced, "{version:?}");
        }
        for version in ["1.8.2", "1.8.0", "1.6.1", "1.4.21"] {
            let old = "*nat\n-D W 2\n-I W 2 -j RETURN\nCOMMIT\n";
            assert_eq!(text(Some(version)), old, "{version}");
        }
    }
}
