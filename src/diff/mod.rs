//! The least change from the observed to the desired state.
//!
//! 1. Rules are compared by meaning. A rule that is right is not touched, so it
//!    keeps its counters and its nth position.
//! 2. A deleted rule hands its counters to the first new rule for the same
//!    backend, or else to one that stays.
//! 3. In our own chains rules are edited by number. In a foreign chain a rule
//!    is added at an end, or in the place of one of ours, and deleted by its
//!    text: numbers may have moved since the chain was read.
//! 4. Chains are created before the rules that jump to them, and deleted after.

pub mod change;
mod counters;
mod jumps;
pub mod lcs;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::hash::Hash;
use std::sync::Arc;

use crate::netfilter::rule::Rule;
use crate::netfilter::ruleset::{Chain, Counters, OwnedTable, Ruleset, SavedRule};
use crate::netfilter::{Family, Protocol, Table};
use crate::plan::{Plan, TablePlan};
use change::{Action, Change};
use counters::carry_over;

/// The changes from the observed rules of a family to the planned ones.
#[must_use]
pub fn to_plan(plan: &Plan, family: Family, found: &Ruleset) -> Vec<Change> {
    let nothing = TablePlan::default();
    let in_table = |table| {
        let part = plan.tables.get(&(family, table)).unwrap_or(&nothing);
        let owned = found.owned(table);
        let mut steps = TableDiff::new(family, table);
        let wrong = wrong_units(plan, owned, part);
        if !wrong.is_empty() {
            let is_wrong = |chain: &str| wrong.contains(&plan.part(chain));
            let mut wanted = planned_chains(part, is_wrong);
            let compared = owned.chains.iter().filter(|(name, _)| is_wrong(name));
            let mut matched = matched(compared, &wanted, |chain, rule| {
                Meaning::of(rule, part.protocols.get(chain).copied())
            });
            carry_over(plan, owned, &mut wanted, &mut matched);
            steps.chains(owned, wanted, matched);
        }
        steps.jumps_to_plan(&owned.jumps, &part.jumps, found.forward_refuses_at);
        steps.delete_chains(owned, |name| part.chains.contains_key(name));
        steps.changes
    };
    let planned = plan
        .tables
        .keys()
        .filter(|(used, _)| *used == family)
        .map(|(_, table)| *table);
    joined(tables(planned, found).into_iter().map(in_table))
}

/// The changes that restore the earlier rules of a family: the same texts,
/// counters and positions, unless somebody else has moved them.
#[must_use]
pub fn to_earlier(earlier: &Ruleset, family: Family, found: &Ruleset) -> Vec<Change> {
    let in_table = |table| {
        let (before, now) = (earlier.owned(table), found.owned(table));
        let chain = |(name, chain): (&String, &Chain)| (name.clone(), chain.rules.clone());
        let wanted = before.chains.iter().map(chain).collect();
        let matched = matched(now.chains.iter(), &wanted, |_, rule| {
            (rule.text.clone(), rule.fresh)
        });
        let mut steps = TableDiff::new(family, table);
        steps.chains(now, wanted, matched);
        steps.jumps_to_earlier(&now.jumps, &before.jumps);
        steps.delete_chains(now, |name| before.chains.contains_key(name));
        steps.changes
    };
    let tables = tables(earlier.tables.keys().copied(), found);
    joined(tables.into_iter().map(in_table))
}

/// One list after the other, of which mostly all but one are empty.
#[must_use]
pub fn joined(lists: impl Iterator<Item = Vec<Change>>) -> Vec<Change> {
    lists.fold(Vec::new(), |mut all, mut next| match all.is_empty() {
        true => next,
        false => {
            all.append(&mut next);
            all
        }
    })
}

fn tables(planned: impl Iterator<Item = Table>, found: &Ruleset) -> BTreeSet<Table> {
    planned.chain(found.tables.keys().copied()).collect()
}

/// The units of the plan (see [`Plan::part`]) of which a chain is missing or not right:
/// none in most runs, one of a set where one backend leaves. The others are not compared
/// further (`benches/sets.py runs`). Both sides are sorted by name.
fn wrong_units<'a>(
    plan: &Plan,
    owned: &OwnedTable,
    part: &'a TablePlan,
) -> BTreeSet<Option<&'a str>> {
    let mut chains = owned.chains.iter().peekable();
    let is_wrong = |(name, planned): &(&String, &Vec<Rule>)| {
        while chains.next_if(|(found, _)| found < name).is_some() {}
        let found = chains.next_if(|(found, _)| found == name);
        let protocol = part.protocols.get(*name).copied();
        !found.is_some_and(|(_, chain)| is_right(chain, planned, protocol))
    };
    let wrong = part.chains.iter().filter(is_wrong);
    wrong.map(|(name, _)| plan.part(name)).collect()
}

fn is_right(found: &Chain, planned: &[Rule], protocol: Option<Protocol>) -> bool {
    let is_same_here = |found: &Rule, planned: &Rule| match protocol {
        Some(protocol) => found.clone().among(protocol) == planned.clone().among(protocol),
        None => false,
    };
    let means = |rule: &SavedRule, planned: &Rule| {
        let found = rule.meaning.as_ref();
        found.is_some_and(|found| found == planned || is_same_here(found, planned))
    };
    let mut pairs = found.rules.iter().zip(planned);
    found.rules.len() == planned.len() && pairs.all(|(rule, planned)| means(rule, planned))
}

/// The planned chains, by name.
type Chains = BTreeMap<String, Vec<SavedRule>>;

/// For each chain, pairs of the index of an observed rule and that of a planned one.
type Matched = BTreeMap<String, Vec<(usize, usize)>>;

fn planned_chains(part: &TablePlan, is_among: impl Fn(&str) -> bool) -> Chains {
    part.chains
        .iter()
        .filter(|(name, _)| is_among(name))
        .map(|(name, rules)| (name.clone(), rules.iter().map(written).collect()))
        .collect()
}

/// A planned rule as `iptables-save` will print it.
fn written(rule: &Rule) -> SavedRule {
    const USUAL: usize = 112;
    let mut text = String::with_capacity(USUAL);
    let _ = write!(text, "{rule}");
    SavedRule {
        text: text.into_bytes(),
        counters: Counters::default(),
        meaning: Some(rule.clone()),
        fresh: true,
    }
}

/// The key by which two rules of one chain are compared. A rule that cannot be
/// parsed is its own text, which differs from that of every planned rule.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Meaning {
    Read(Rule),
    Unread(Vec<u8>),
}

impl Meaning {
    fn of(rule: &SavedRule, protocol: Option<Protocol>) -> Self {
        match (rule.meaning.clone(), protocol) {
            (Some(meaning), Some(protocol)) => Self::Read(meaning.among(protocol)),
            (Some(meaning), None) => Self::Read(meaning),
            (None, _) => Self::Unread(rule.text.clone()),
        }
    }
}

fn matched<'a, K: Eq + Hash>(
    found: impl Iterator<Item = (&'a String, &'a Chain)>,
    wanted: &Chains,
    key: impl Fn(&str, &SavedRule) -> K,
) -> Matched {
    let in_chain = |(name, chain): (&String, &Chain)| {
        let keys = |rules: &[SavedRule]| {
            let keys = rules.iter().map(|rule| key(name, rule));
            keys.collect::<Vec<K>>()
        };
        let new = wanted.get(name).map_or(&[][..], Vec::as_slice);
        (name.clone(), lcs::pairs(&keys(&chain.rules), &keys(new)))
    };
    found.map(in_chain).collect()
}

/// The place of a rule, counted from 1.
fn place(index: usize) -> u32 {
    u32::try_from(index + 1).unwrap_or(u32::MAX)
}

/// The steps for one table of one family, in order.
struct TableDiff {
    family: Family,
    table: Table,
    changes: Vec<Change>,
}

impl TableDiff {
    fn new(family: Family, table: Table) -> Self {
        Self {
            family,
            table,
            changes: Vec::new(),
        }
    }

    fn push(&mut self, chain: impl Into<Arc<str>>, action: Action) {
        self.changes.push(Change {
            family: self.family,
            table: self.table,
            chain: chain.into(),
            action,
        });
    }

    /// Edits the chains. New chains are created first, because rules of other
    /// chains may jump to them.
    fn chains(&mut self, found: &OwnedTable, wanted: Chains, mut matched: Matched) {
        let rules: usize = wanted.values().map(Vec::len).sum();
        self.changes.reserve(wanted.len() + rules);
        for name in wanted
            .keys()
            .filter(|name| !found.chains.contains_key(*name))
        {
            self.push(name.as_str(), Action::CreateChain);
        }
        for (name, new) in wanted {
            let old = found
                .chains
                .get(&name)
                .map_or(&[][..], |chain| &chain.rules);
            let pairs = matched.remove(&name).unwrap_or_default();
            self.edits(&name.into(), old, new, pairs);
        }
    }

    /// Edits one chain. Between two rules that stay, old and new rules are
    /// paired in order: a pair is a replacement, the rest is deleted or
    /// inserted.
    fn edits(
        &mut self,
        chain: &Arc<str>,
        old: &[SavedRule],
        new: Vec<SavedRule>,
        mut pairs: Vec<(usize, usize)>,
    ) {
        pairs.push((old.len(), new.len()));
        let (mut from, mut to, mut length) = (0, 0, old.len());
        let mut new = new.into_iter();
        for (kept_old, kept_new) in pairs {
            for rule in new.by_ref().take(kept_new - to) {
                let at = place(to);
                let action = match old[from..kept_old].first() {
                    Some(before) => Action::Replace {
                        at,
                        before: before.clone().into(),
                        rule,
                    },
                    None if to == length => Action::Append(rule),
                    None => Action::Insert(at, rule),
                };
                match action {
                    Action::Replace { .. } => from += 1,
                    _ => length += 1,
                }
                self.push(Arc::clone(chain), action);
                to += 1;
            }
            for gone in &old[from..kept_old] {
                self.push(Arc::clone(chain), Action::DeleteAt(place(to), gone.clone()));
                length -= 1;
            }
            new.next();
            (from, to) = (kept_old + 1, kept_new + 1);
        }
    }

    fn delete_chains(&mut self, found: &OwnedTable, stays: impl Fn(&str) -> bool) {
        for name in found.chains.keys().filter(|name| !stays(name)) {
            self.push(name.as_str(), Action::DeleteChain);
        }
    }
}
