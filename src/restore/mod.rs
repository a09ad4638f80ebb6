//! Changes into the text of one `iptables-restore --noflush`.

mod nft_1_8_2;

use std::collections::{BTreeMap, BTreeSet};

use crate::diff::change::{Action, Change, Kind};
use crate::netfilter::ruleset::{Chain, Counters, OwnedTable, Ruleset, SavedRule};
use crate::netfilter::{Family, Table};
use crate::plan::may_be_filter_mark;

/// One step of a write.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// The text of one `iptables-restore --noflush`.
    Transaction(Vec<u8>),
    /// The jump rules of a table that iptables cannot delete by their text.
    DeleteJumps(Table),
}

/// The steps that apply the changes of one family, in order. Usually there is
/// one transaction. Jump rules that iptables cannot delete are deleted after
/// it, and after them the chains that they may jump to.
#[must_use]
pub fn steps(changes: &[Change], family: Family, found: &Ruleset) -> Vec<Step> {
    let changes = || changes.iter().filter(|change| change.family == family);
    let is_jump = |change: &&Change| matches!(change.action, Action::DeleteJump(_));
    let tables: BTreeSet<Table> = changes()
        .filter(is_jump)
        .map(|change| change.table)
        .collect();
    let is_late =
        |change: &&Change| tables.contains(&change.table) && change.action == Action::DeleteChain;
    let others = changes().filter(|change| !is_jump(change));
    let (late, early): (Vec<_>, Vec<_>) = others.partition(is_late);
    let early = transactions(early, family, found).into_iter();
    let late = transactions(late, family, found).into_iter();
    early
        .map(Step::Transaction)
        .chain(tables.into_iter().map(Step::DeleteJumps))
        .chain(late.map(Step::Transaction))
        .collect()
}

/// The transactions of one family: one, except for an iptables that needs the
/// changes step by step.
fn transactions(changes: Vec<&Change>, family: Family, found: &Ruleset) -> Vec<Vec<u8>> {
    if !found.is_old_nft {
        return transaction(changes, found).into_iter().collect();
    }
    let steps = nft_1_8_2::transactions(changes, family, found);
    let texts = steps.iter();
    texts
        .filter_map(|changes| transaction(changes, found))
        .collect()
}

/// The transaction that applies changes of one family; `None` when there are
/// none. Each table is one atomic `*table ... COMMIT` block.
#[must_use]
fn transaction<'a>(
    changes: impl IntoIterator<Item = &'a Change>,
    found: &Ruleset,
) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    for (table, changes) in blocks(changes.into_iter(), found.owned(Table::Nat)) {
        block(table, &changes, found.owned(table), Words::Live, &mut text);
    }
    (!text.is_empty()).then_some(text)
}

/// The text for an empty host. It has each table once, as a file that is loaded
/// at boot needs it: there is no intermediate state to protect.
#[must_use]
pub fn from_nothing(changes: &[Change], family: Family) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    for table in [Table::Filter, Table::Nat] {
        let of_table = |change: &&Change| change.family == family && change.table == table;
        let changes: Vec<&Change> = changes.iter().filter(of_table).collect();
        if !changes.is_empty() {
            block(
                table,
                &changes,
                &OwnedTable::default(),
                Words::File,
                &mut text,
            );
        }
    }
    (!text.is_empty()).then_some(text)
}

/// The dialect of the text.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Words {
    /// To one with `--noflush`: `-N` makes a chain, where `:CHAIN` would also
    /// empty one that has come up meanwhile. And iptables-nft-restore 1.8.4
    /// takes the end of such a line for another line.
    Live,
    /// A file, as `iptables-save` writes it.
    File,
}

/// The changes by table, in an order in which no connection slips through, and
/// no rule is forgotten if the second table is never reached.
///
/// The rules in filter exist before nat sends connections to them, and are
/// deleted after. The mark in nat, that filter has rules too, exists before
/// them, and is deleted after.
fn blocks<'a>(
    changes: impl Iterator<Item = &'a Change>,
    found: &OwnedTable,
) -> Vec<(Table, Vec<&'a Change>)> {
    let mut tables: BTreeMap<Table, Vec<&Change>> = BTreeMap::new();
    for change in changes {
        tables.entry(change.table).or_default().push(change);
    }
    let filter = tables.remove(&Table::Filter).unwrap_or_default();
    let nat = tables.remove(&Table::Nat).unwrap_or_default();
    let marks = marks(&nat, found);
    let is_mark = |change: &&Change| marks.contains(&*change.chain);
    let (mark, nat): (Vec<_>, Vec<_>) = nat.into_iter().partition(is_mark);
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

/// The marks among the changed chains: a mark never has a rule of ours, and a
/// balancer's chain with the name of one has.
fn marks<'a>(nat: &[&'a Change], found: &OwnedTable) -> BTreeSet<&'a str> {
    let chains = nat.iter().map(|change| &*change.chain);
    let mut marks: BTreeSet<&str> = chains.filter(|chain| may_be_filter_mark(chain)).collect();
    for change in nat {
        let is_made_or_goes = matches!(change.action, Action::CreateChain | Action::DeleteChain);
        if !is_made_or_goes {
            marks.remove(&*change.chain);
        }
    }
    let is_empty = |chain: &str| {
        let found = found.chains.get(chain);
        found.is_none_or(|chain| chain.rules.is_empty())
    };
    marks.retain(|chain| is_empty(chain));
    marks
}

/// One table. Deleted chains may jump to each other, so all are emptied before
/// the first is deleted. They are emptied before any other line: until 1.8.2
/// iptables-nft-restore lost its unsent rules at each `-F`, and crashed.
fn block(table: Table, changes: &[&Change], found: &OwnedTable, words: Words, text: &mut Vec<u8>) {
    const USUAL_LINE: usize = 128;
    text.reserve(changes.len() * USUAL_LINE);
    write(&["*", table.as_str(), "\n"], text);
    let chains = changes.chunk_by(|one, next| one.chain == next.chain);
    let chains = chains.map(|edits| {
        let chain = &*edits[0].chain;
        let found = found.chains.get(chain);
        let refill = found.is_some_and(|found| nothing_stays(found, edits));
        (chain, edits, refill)
    });
    let chains: Vec<_> = chains.collect();
    let goes = |change: &Change| change.action == Action::DeleteChain;
    for (chain, edits, refill) in &chains {
        if *refill || edits.iter().any(|change| goes(change)) {
            write(&["-F ", chain, "\n"], text);
        }
    }
    for (chain, edits, refill) in chains {
        for change in edits {
            match refill {
                true => fill(chain, &change.action, text),
                false => step(chain, &change.action, words, text),
            }
        }
    }
    for change in changes.iter().filter(|change| goes(change)) {
        write(&["-X ", &change.chain, "\n"], text);
    }
    text.extend(b"COMMIT\n");
}

/// Returns true if every rule of a chain is replaced or deleted. Then the chain
/// is emptied and filled, with the same result, and iptables need not walk to
/// each number: with 10,000 rules `-R` takes four times as long with
/// iptables-nft, and two and a half times with iptables-legacy (1.8.9,
/// `benches/refill.py`).
fn nothing_stays(found: &Chain, edits: &[&Change]) -> bool {
    let goes =
        |change: &&&Change| matches!(change.action, Action::Replace { .. } | Action::DeleteAt(..));
    !found.rules.is_empty() && edits.iter().filter(goes).count() == found.rules.len()
}

/// The rule that a step leaves in an emptied chain. Edits are in ascending
/// order.
fn fill(chain: &str, action: &Action, text: &mut Vec<u8>) {
    if let Action::Append(rule) | Action::Insert(_, rule) | Action::Replace { rule, .. } = action {
        line(&["-A ", chain], Some(rule.counters), rule, text);
    }
}

fn step(chain: &str, action: &Action, words: Words, text: &mut Vec<u8>) {
    let with_counters = |command: &[&str], rule: &SavedRule, text: &mut Vec<u8>| {
        line(command, Some(rule.counters), rule, text);
    };
    match action {
        Action::CreateChain if words == Words::File => write(&[":", chain, " - [0:0]\n"], text),
        Action::CreateChain => write(&["-N ", chain, "\n"], text),
        Action::Append(rule) => with_counters(&["-A ", chain], rule, text),
        Action::Insert(1, rule) => with_counters(&["-I ", chain], rule, text),
        Action::Insert(at, rule) => {
            with_counters(&["-I ", chain, " ", &at.to_string()], rule, text);
        }
        Action::Replace { at, rule, .. } => {
            with_counters(&["-R ", chain, " ", &at.to_string()], rule, text);
        }
        Action::DeleteAt(at, _) => write(&["-D ", chain, " ", &at.to_string(), "\n"], text),
        Action::DeleteFirst(rule) => line(&["-D ", chain], None, rule, text),
        // A chain is emptied before all and deleted after all; such a jump is not
        // deleted by iptables-restore, see [`steps`].
        Action::DeleteChain | Action::DeleteJump(_) => {}
    }
}

/// A command, the counters if there are some to carry over, and the text of the
/// rule, which begins with a blank.
fn line(command: &[&str], counters: Option<Counters>, rule: &SavedRule, text: &mut Vec<u8>) {
    write(command, text);
    if let Some(Counters { packets, bytes }) =
        counters.filter(|counters| *counters != Counters::default())
    {
        text.extend(format!(" -c {packets} {bytes}").into_bytes());
    }
    text.extend_from_slice(&rule.text);
    text.push(b'\n');
}

fn write(parts: &[&str], text: &mut Vec<u8>) {
    parts
        .iter()
        .for_each(|part| text.extend_from_slice(part.as_bytes()));
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::diff;
    use crate::diff::change::applied;
    use crate::plan::Plan;
    use crate::request::{Name, Request};

    /// The steps on chains of the transaction from one request to another, in
    /// order.
    fn order(from: &Value, to: &Value) -> Vec<String> {
        let plan = |request: &Value| {
            let object = request.as_object().unwrap().clone();
            Plan::new(&Request::from_json(object).unwrap())
        };
        let found = diff::to_plan(&plan(from), Family::Ipv4, &Ruleset::default());
        let found = applied(&found, Family::Ipv4, &Ruleset::default());
        let changes = diff::to_plan(&plan(to), Family::Ipv4, &found);
        let text = transaction(&changes, &found).unwrap();
        let text = String::from_utf8(text).unwrap();
        let is_step = |line: &&str| {
            line.starts_with(['*', ':']) || line.starts_with("-N") || line.starts_with("-X")
        };
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
                "-N W/filter",
                "*filter",
                "-N W/forward",
                "*nat",
                "-N W"
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
                "-N W/filter",
                "*filter",
                "-N W/refuse",
                "*nat",
                "-N W/drain"
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

    /// The same changes for an old iptables-nft and for any other.
    #[test]
    fn an_old_nft_is_told_in_other_words() {
        let dump = "*nat\n:W - [0:0]\n[1:2] -A PREROUTING -p udp -j W\n-A PREROUTING -j ACCEPT\n-A PREROUTING -p sctp -j W\n\
                    [3:4] -A W -j ACCEPT\n-A W -j RETURN\nCOMMIT\n";
        let read = |header: &str| {
            let name = Name::new("W").unwrap();
            Ruleset::read(format!("{header}\n{dump}").as_bytes(), &name).unwrap()
        };
        let rule = |text: &str| SavedRule::new(Table::Nat, text.as_bytes(), Counters::default());
        let change = |chain: &str, action| Change {
            family: Family::Ipv4,
            table: Table::Nat,
            chain: chain.into(),
            action,
        };
        let replace = Action::Replace {
            at: 2,
            before: rule(" -j RETURN").into(),
            rule: rule(" -j DROP"),
        };
        let delete = Action::DeleteFirst(rule(" -p udp -j W"));
        let insert = |at, text| change("PREROUTING", Action::Insert(at, rule(text)));
        let changes = |gone: &Change| {
            [
                change("W", replace.clone()),
                gone.clone(),
                insert(1, " -p 1 -j W"),
                insert(2, " -p 2 -j W"),
                insert(4, " -p 3 -j W"),
                insert(5, " -p 4 -j W"),
                change("PREROUTING", Action::Append(rule(" -p 5 -j W"))),
            ]
        };
        let said = |header: &str, changes: &[Change]| {
            let texts = transactions(changes.iter().collect(), Family::Ipv4, &read(header));
            let texts = texts.concat();
            let text = String::from_utf8(texts).unwrap();
            text.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        let usual = changes(&change("PREROUTING", delete.clone()));
        let new = [
            "*nat",
            "-R W 2 -j DROP",
            "-D PREROUTING -p udp -j W",
            "-I PREROUTING -p 1 -j W",
            "-I PREROUTING 2 -p 2 -j W",
            "-I PREROUTING 4 -p 3 -j W",
            "-I PREROUTING 5 -p 4 -j W",
            "-A PREROUTING -p 5 -j W",
            "COMMIT",
        ];
        for header in [
            "",
            "# Generated by xtables-save v1.8.3 on Mon",
            "# Generated by iptables-nft-save v1.8.9 (nf_tables) on Mon",
            "# Generated by iptables-save v1.6.0 on Mon",
            "# Generated by iptables-save v1.8.2 on Mon",
            "# Generated by iptables-save v2.0 on Mon",
        ] {
            assert_eq!(said(header, &usual), new, "{header}");
        }
        let old = "# Generated by xtables-save v1.8.2 on Mon";
        // Places are those of before: udp, ACCEPT, sctp.
        assert_eq!(
            said(old, &usual),
            [
                "*nat",
                "-F W",
                "-A W -c 3 4 -j ACCEPT",
                "-A W -j DROP",
                "-A PREROUTING -p 5 -j W",
                "-I PREROUTING 3 -p 3 -j W",
                "-I PREROUTING 3 -p 4 -j W",
                "-I PREROUTING 2 -p 1 -j W",
                "-I PREROUTING 2 -p 2 -j W",
                "COMMIT",
                "*nat",
                "-D PREROUTING -p udp -j W",
                "COMMIT",
            ]
        );
        // A new rule must not be deleted in the place of an old one with the
        // same text.
        let mut moved = changes(&change("PREROUTING", delete));
        moved[6] = change("PREROUTING", Action::Append(rule(" -p udp -j W")));
        assert_eq!(
            said(old, &moved),
            [
                "*nat",
                "-D PREROUTING -p udp -j W",
                "COMMIT",
                "*nat",
                "-F W",
                "-A W -c 3 4 -j ACCEPT",
                "-A W -j DROP",
                "-A PREROUTING -p udp -j W",
                "-I PREROUTING 2 -p 3 -j W",
                "-I PREROUTING 2 -p 4 -j W",
                "-I PREROUTING -p 2 -j W",
                "-I PREROUTING -p 1 -j W",
                "COMMIT",
            ]
        );
    }
}
