//! Changes into the text of one `iptables-restore --noflush`.

use std::collections::BTreeMap;

use crate::change::{Action, Change};
use crate::net::{Family, Table};
use crate::ruleset::{Counters, SavedRule};

/// The transaction that carries out the changes to one family, and `None`
/// when there are none. Each table is one atomic `*table ... COMMIT` block.
#[must_use]
pub fn transaction(changes: &[Change], family: Family) -> Option<Vec<u8>> {
    let mut tables: BTreeMap<Table, Vec<&Change>> = BTreeMap::new();
    for change in changes.iter().filter(|change| change.family == family) {
        tables.entry(change.table).or_default().push(change);
    }
    let blocks: Vec<u8> = tables
        .into_iter()
        .flat_map(|(table, changes)| block(table, &changes))
        .collect();
    (!blocks.is_empty()).then_some(blocks)
}

/// Chains that go may lead to each other, so all of them are emptied before
/// the first is deleted.
fn block(table: Table, changes: &[&Change]) -> Vec<u8> {
    let mut text = format!("*{}\n", table.as_str()).into_bytes();
    for change in changes {
        step(&change.chain, &change.action, &mut text);
    }
    for change in changes
        .iter()
        .filter(|change| change.action == Action::DeleteChain)
    {
        text.extend(format!("-X {}\n", change.chain).into_bytes());
    }
    text.extend(b"COMMIT\n");
    text
}

fn step(chain: &str, action: &Action, text: &mut Vec<u8>) {
    match action {
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
