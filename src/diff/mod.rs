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
pub mod lcs;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt::Write;
use std::hash::Hash;
use std::sync::Arc;

use crate::netfilter::rule::{Rule, Target, is_undeletable};
use crate::netfilter::ruleset::{Chain, Counters, JumpRule, OwnedTable, Ruleset, SavedRule};
use crate::netfilter::{Family, Protocol, Table};
use crate::plan::{JumpPosition, Plan, PlannedJump, TablePlan};
use change::{Action, Change};

/// The changes from the observed rules of a family to the planned ones.
#[must_use]
pub fn to_plan(plan: &Plan, family: Family, found: &Ruleset) -> Vec<Change> {
    let nothing = TablePlan::default();
    let in_table = |table| {
        let part = plan.tables.get(&(family, table)).unwrap_or(&nothing);
        let owned = found.owned(table);
        let mut steps = TableDiff::new(family, table);
        if !as_planned(owned, part) {
            let mut wanted = planned_chains(part);
            let mut matched = matched(owned, &wanted, |chain, rule| {
                Meaning::of(rule, part.protocols.get(chain).copied())
            });
            carry_over(owned, &mut wanted, &mut matched);
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
        let matched = matched(now, &wanted, |_, rule| (rule.text.clone(), rule.fresh));
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

/// Returns true if every planned chain exists and is right, as in most runs.
/// Both sides are sorted by name.
fn as_planned(owned: &OwnedTable, part: &TablePlan) -> bool {
    let mut chains = owned.chains.iter();
    let is_right = |(name, planned): (&String, &Vec<Rule>)| {
        let Some((_, found)) = chains.find(|(found, _)| *found == name) else {
            return false;
        };
        let is_same_here = |found: &Rule, planned: &Rule| match part.protocols.get(name) {
            Some(protocol) => found.clone().among(*protocol) == planned.clone().among(*protocol),
            None => false,
        };
        let means = |rule: &SavedRule, planned: &Rule| {
            let found = rule.meaning.as_ref();
            found.is_some_and(|found| found == planned || is_same_here(found, planned))
        };
        let pairs = found.rules.iter().zip(planned);
        found.rules.len() == planned.len()
            && pairs
                .into_iter()
                .all(|(rule, planned)| means(rule, planned))
    };
    part.chains.iter().all(is_right)
}

/// The chains that are to be there, by name.
type Chains = BTreeMap<String, Vec<SavedRule>>;

/// By chain, which rule that is there is which that is to be.
type Matched = BTreeMap<String, Vec<(usize, usize)>>;

fn planned_chains(part: &TablePlan) -> Chains {
    part.chains
        .iter()
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

fn matched<K: Eq + Hash>(
    found: &OwnedTable,
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
    found.chains.iter().map(in_chain).collect()
}

/// Hands the counters of rules that go to new ones for the same target. Where
/// there is no new one, one that stays is written anew to take them over.
fn carry_over(found: &OwnedTable, wanted: &mut Chains, matched: &mut Matched) {
    let mut orphaned = OrphanedCounters::default();
    for (name, chain) in &found.chains {
        let kept: HashSet<usize> = matched[name].iter().map(|(old, _)| *old).collect();
        let going = chain
            .rules
            .iter()
            .enumerate()
            .filter(|(at, _)| !kept.contains(at));
        going.for_each(|(_, rule)| orphaned.take(rule));
    }
    if orphaned.is_empty() {
        return;
    }
    for (name, new) in wanted.iter_mut() {
        let pairs = matched.get(name).map_or(&[][..], Vec::as_slice);
        let kept: HashSet<usize> = pairs.iter().map(|(_, new)| *new).collect();
        let coming = new
            .iter_mut()
            .enumerate()
            .filter(|(at, _)| !kept.contains(at));
        coming.for_each(|(_, rule)| orphaned.hand_to(rule));
    }
    for (name, pairs) in matched {
        pairs.retain(
            |(old, new)| match orphaned.left_for(&found.chains[name].rules[*old]) {
                Some(counters) => {
                    if let Some(rules) = wanted.get_mut(name) {
                        rules[*new].counters = counters;
                    }
                    false
                }
                None => true,
            },
        );
    }
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

    /// The first jump rule with the planned meaning stays where it is. All
    /// others are deleted, and a new one takes the position of a deleted one.
    /// In filter's FORWARD a position after the first rule that refuses is
    /// wrong.
    ///
    /// A rule is deleted by its text, which hits the first rule with that text.
    /// If that one is to stay, all rules with this text are deleted, and it is
    /// inserted again at its position.
    fn jumps_to_plan(
        &mut self,
        found: &[JumpRule],
        planned: &[PlannedJump],
        refused_at: Option<u32>,
    ) {
        let may_stand_at = |lead: &PlannedJump, at: u32| {
            lead.place != JumpPosition::BeforeRefusals
                || refused_at.is_none_or(|refused| at < refused)
        };
        let mut stale: Vec<&JumpRule> = found.iter().collect();
        let (mut kept, mut missing) = (Vec::new(), Vec::new());
        for lead in planned {
            let fits = |other: &&JumpRule| {
                other.chain == lead.chain
                    && other.rule.meaning.as_ref() == Some(&lead.rule)
                    && may_stand_at(lead, other.position)
            };
            match stale.iter().position(fits) {
                Some(at) => kept.push(stale.remove(at)),
                None => missing.push(lead),
            }
        }
        let reads_the_same =
            |one: &JumpRule, other: &JumpRule| one.chain == other.chain && one.rule == other.rule;
        kept.retain(|lead| stale.iter().any(|other| reads_the_same(lead, other)));
        let mut put: Vec<(&JumpRule, SavedRule)> =
            kept.iter().map(|lead| (*lead, lead.rule.clone())).collect();
        let (undeletable, mut stale): (Vec<_>, Vec<_>) = stale
            .into_iter()
            .partition(|jump| is_undeletable(&jump.rule.shown()));
        let mut gone = kept;
        gone.extend(&stale);
        for lead in &gone {
            self.push(lead.chain.as_str(), Action::DeleteFirst(lead.rule.clone()));
        }
        missing.retain(|lead| {
            let free =
                |other: &&JumpRule| other.chain == lead.chain && may_stand_at(lead, other.position);
            match stale.iter().position(free) {
                Some(at) => {
                    put.push((stale.remove(at), written(&lead.rule)));
                    false
                }
                None => true,
            }
        });
        self.put_in_places(put, &gone);
        for lead in missing
            .iter()
            .filter(|lead| lead.place == JumpPosition::End)
        {
            self.push(lead.chain, Action::Append(written(&lead.rule)));
        }
        for lead in missing
            .iter()
            .rev()
            .filter(|lead| lead.place != JumpPosition::End)
        {
            self.push(lead.chain, Action::Insert(1, written(&lead.rule)));
        }
        for jump in undeletable {
            self.push(jump.chain.as_str(), Action::DeleteJump(jump.rule.clone()));
        }
    }

    /// Inserts rules at the positions of deleted ones of ours. This is the only
    /// use of a number in a foreign chain: an insertion cannot hit a foreign
    /// rule, and iptables has no other way to give a position.
    fn put_in_places(&mut self, mut put: Vec<(&JumpRule, SavedRule)>, gone: &[&JumpRule]) {
        put.sort_by(|(one, _), (other, _)| {
            (&one.chain, one.position).cmp(&(&other.chain, other.position))
        });
        for (at, (place, rule)) in put.iter().enumerate() {
            let before =
                |other: &&&JumpRule| other.chain == place.chain && other.position < place.position;
            let gone = gone.iter().filter(before).count();
            let back = put[..at]
                .iter()
                .filter(|(other, _)| other.chain == place.chain)
                .count();
            let gap = u32::try_from(gone - back).unwrap_or(0);
            self.push(
                place.chain.as_str(),
                Action::Insert(place.position - gap, rule.clone()),
            );
        }
    }

    /// Unless all jump rules of a chain are as they were, they are deleted, and
    /// the earlier ones are inserted at their places. One that iptables cannot
    /// delete stays where it is if it was there before.
    fn jumps_to_earlier(&mut self, found: &[JumpRule], earlier: &[JumpRule]) {
        let chains: BTreeSet<&str> = found
            .iter()
            .chain(earlier)
            .map(|jump| jump.chain.as_str())
            .collect();
        for chain in chains {
            let of_chain = |jumps: &[JumpRule]| {
                let jumps = jumps.iter().filter(|jump| jump.chain == chain);
                jumps.cloned().collect::<Vec<_>>()
            };
            let (mut found, mut earlier) = (of_chain(found), of_chain(earlier));
            if found == earlier {
                continue;
            }
            found.retain(|jump| {
                let before = earlier.iter().position(|other| other.rule == jump.rule);
                match before.filter(|_| is_undeletable(&jump.rule.shown())) {
                    Some(at) => drop(earlier.remove(at)),
                    None => return true,
                }
                false
            });
            let (undeletable, found): (Vec<_>, Vec<_>) = found
                .into_iter()
                .partition(|jump| is_undeletable(&jump.rule.shown()));
            for jump in found {
                self.push(chain, Action::DeleteFirst(jump.rule));
            }
            for jump in earlier {
                self.push(chain, Action::Insert(jump.position, jump.rule));
            }
            for jump in undeletable {
                self.push(chain, Action::DeleteJump(jump.rule));
            }
        }
    }

    fn delete_chains(&mut self, found: &OwnedTable, stays: impl Fn(&str) -> bool) {
        for name in found.chains.keys().filter(|name| !stays(name)) {
            self.push(name.as_str(), Action::DeleteChain);
        }
    }
}

/// The counters of rules that go, by where they led.
#[derive(Default)]
struct OrphanedCounters(HashMap<Target, Counters>);

impl OrphanedCounters {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take(&mut self, rule: &SavedRule) {
        if let Some(meaning) = &rule.meaning {
            let sum = self.0.entry(meaning.target.clone()).or_default();
            *sum = sum.and(rule.counters);
        }
    }

    fn hand_to(&mut self, rule: &mut SavedRule) {
        let meaning = rule.meaning.as_ref();
        let counters = meaning.and_then(|meaning| self.0.remove(&meaning.target));
        rule.counters = counters.unwrap_or_default();
    }

    /// The counters that a rule which stays takes over from a deleted one,
    /// because no new rule does.
    fn left_for(&mut self, rule: &SavedRule) -> Option<Counters> {
        let target = &rule.meaning.as_ref()?.target;
        let counters = self
            .0
            .get(target)
            .filter(|counters| **counters != Counters::default())?;
        let sum = counters.and(rule.counters);
        self.0.remove(target);
        Some(sum)
    }
}
