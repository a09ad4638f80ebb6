//! What has to change so that the host is as planned: the least, and nothing
//! when it is already so.
//!
//! 1. Rules are compared by meaning. One that is right is not touched, so it
//!    keeps its counters and its place in the turns.
//! 2. A rule that goes hands its counters to the first new rule for the same
//!    backend.
//! 3. In our own chains rules are edited by number. In chains of others a rule
//!    is added at an end and deleted by its text: numbers there may have moved
//!    since they were read.
//! 4. Chains come before what leads to them, and go after.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use crate::align;
use crate::change::{Action, Change};
use crate::net::{Family, Protocol, Table};
use crate::plan::{Part, Plan};
use crate::request::Jump;
use crate::rule::Rule;
use crate::ruleset::{Counters, Lead, Owned, Ruleset, SavedRule};

/// The changes that turn what a family has into what is planned for it.
#[must_use]
pub fn to_plan(plan: &Plan, family: Family, found: &Ruleset) -> Vec<Change> {
    let nothing = Part::default();
    let in_table = |table| {
        let part = plan.parts.get(&(family, table)).unwrap_or(&nothing);
        let mut steps = Steps::new(family, table);
        steps.chains(&found.owned(table), planned_chains(part), |rule| {
            Meaning::of(rule, part.protocol)
        });
        steps.leads_to_plan(&found.owned(table).leads, &part.leads);
        steps.delete_chains(&found.owned(table), |name| part.chains.contains_key(name));
        steps.changes
    };
    let planned = plan
        .parts
        .keys()
        .filter(|(used, _)| *used == family)
        .map(|(_, table)| *table);
    tables(planned, found)
        .into_iter()
        .flat_map(in_table)
        .collect()
}

/// The changes that bring back what a family had: the same texts, counters and
/// places, as far as nobody else has moved them.
#[must_use]
pub fn to_earlier(earlier: &Ruleset, family: Family, found: &Ruleset) -> Vec<Change> {
    let in_table = |table| {
        let (before, now) = (earlier.owned(table), found.owned(table));
        let chains = before
            .chains
            .iter()
            .map(|(name, chain)| (name.clone(), chain.rules.clone()))
            .collect();
        let mut steps = Steps::new(family, table);
        steps.chains(&now, chains, |rule| rule.text.clone());
        steps.leads_to_earlier(&now.leads, &before.leads);
        steps.delete_chains(&now, |name| before.chains.contains_key(name));
        steps.changes
    };
    tables(earlier.tables.keys().copied(), found)
        .into_iter()
        .flat_map(in_table)
        .collect()
}

fn tables(planned: impl Iterator<Item = Table>, found: &Ruleset) -> BTreeSet<Table> {
    planned.chain(found.tables.keys().copied()).collect()
}

fn planned_chains(part: &Part) -> BTreeMap<String, Vec<SavedRule>> {
    part.chains
        .iter()
        .map(|(name, rules)| (name.clone(), rules.iter().map(written).collect()))
        .collect()
}

/// A rule of ours as it will be saved.
fn written(rule: &Rule) -> SavedRule {
    SavedRule {
        text: rule.to_string().into_bytes(),
        counters: Counters::default(),
        meaning: Some(rule.clone()),
    }
}

/// What two rules of one chain are compared by. What we cannot read is its own
/// text, which is never that of a rule we would write.
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

/// The steps for one table of one family, in order.
struct Steps {
    family: Family,
    table: Table,
    changes: Vec<Change>,
}

impl Steps {
    fn new(family: Family, table: Table) -> Self {
        Self {
            family,
            table,
            changes: Vec::new(),
        }
    }

    fn push(&mut self, chain: &str, action: Action) {
        self.changes.push(Change {
            family: self.family,
            table: self.table,
            chain: chain.to_owned(),
            action,
        });
    }

    /// Chains that are to be there: the new ones are created first, since rules
    /// of the others may lead to them.
    fn chains<K: Eq + std::hash::Hash>(
        &mut self,
        found: &Owned,
        mut wanted: BTreeMap<String, Vec<SavedRule>>,
        key: impl Fn(&SavedRule) -> K,
    ) {
        for name in wanted
            .keys()
            .filter(|name| !found.chains.contains_key(*name))
        {
            self.push(name, Action::CreateChain);
        }
        let mut matched = BTreeMap::new();
        let mut counted = Counted::default();
        for (name, chain) in &found.chains {
            let new = wanted.get(name).map_or(&[][..], Vec::as_slice);
            let keys = |rules: &[SavedRule]| rules.iter().map(&key).collect::<Vec<K>>();
            let pairs = align::pairs(&keys(&chain.rules), &keys(new));
            let kept: HashSet<usize> = pairs.iter().map(|(old, _)| *old).collect();
            let going = chain
                .rules
                .iter()
                .enumerate()
                .filter(|(at, _)| !kept.contains(at));
            going.for_each(|(_, rule)| counted.take(rule));
            matched.insert(name.clone(), pairs);
        }
        for (name, new) in &mut wanted {
            let pairs = matched.remove(name).unwrap_or_default();
            let kept: HashSet<usize> = pairs.iter().map(|(_, new)| *new).collect();
            let coming = new
                .iter_mut()
                .enumerate()
                .filter(|(at, _)| !kept.contains(at));
            coming.for_each(|(_, rule)| counted.hand_to(rule));
            let old = found
                .chains
                .get(name)
                .map_or(&[][..], |chain| chain.rules.as_slice());
            self.edits(name, old, new, pairs);
        }
    }

    /// Between two rules that stay, what goes and what comes are paired off in
    /// order; what is left over is deleted or inserted.
    fn edits(
        &mut self,
        chain: &str,
        old: &[SavedRule],
        new: &[SavedRule],
        mut pairs: Vec<(usize, usize)>,
    ) {
        pairs.push((old.len(), new.len()));
        let (mut from, mut to, mut length) = (0, 0, old.len());
        for (kept_old, kept_new) in pairs {
            while from < kept_old || to < kept_new {
                let at = u32::try_from(to + 1).unwrap_or(u32::MAX);
                if from < kept_old && to < kept_new {
                    self.push(
                        chain,
                        Action::Replace {
                            at,
                            before: old[from].clone(),
                            rule: new[to].clone(),
                        },
                    );
                    (from, to) = (from + 1, to + 1);
                } else if from < kept_old {
                    self.push(chain, Action::DeleteAt(at, old[from].clone()));
                    (from, length) = (from + 1, length - 1);
                } else {
                    let append = to == length;
                    let rule = new[to].clone();
                    self.push(
                        chain,
                        if append {
                            Action::Append(rule)
                        } else {
                            Action::Insert(at, rule)
                        },
                    );
                    (to, length) = (to + 1, length + 1);
                }
            }
            (from, to) = (kept_old + 1, kept_new + 1);
        }
    }

    /// The first lead that means what is planned stays where it is; all others
    /// go.
    fn leads_to_plan(&mut self, found: &[Lead], planned: &[crate::plan::Lead]) {
        let mut stale: Vec<&Lead> = found.iter().collect();
        let mut missing = Vec::new();
        for lead in planned {
            let fits = |other: &&Lead| {
                other.chain == lead.chain && other.rule.meaning.as_ref() == Some(&lead.rule)
            };
            match stale.iter().position(fits) {
                Some(at) => drop(stale.remove(at)),
                None => missing.push(lead),
            }
        }
        for lead in missing.iter().filter(|lead| lead.jump == Jump::Append) {
            self.push(lead.chain, Action::Append(written(&lead.rule)));
        }
        for lead in missing
            .iter()
            .rev()
            .filter(|lead| lead.jump == Jump::Insert)
        {
            self.push(lead.chain, Action::Insert(1, written(&lead.rule)));
        }
        for lead in stale {
            self.push(&lead.chain, Action::DeleteFirst(lead.rule.clone()));
        }
    }

    /// To undo, a lead goes back to the place that it had. This is the only
    /// use of a number in a chain that is not ours: there is no other way to
    /// say where, and the numbers were read a moment ago.
    fn leads_to_earlier(&mut self, found: &[Lead], earlier: &[Lead]) {
        let mut stale: Vec<&Lead> = found.iter().collect();
        let mut missing = Vec::new();
        for lead in earlier {
            match stale
                .iter()
                .position(|other| other.chain == lead.chain && other.rule == lead.rule)
            {
                Some(at) => drop(stale.remove(at)),
                None => missing.push(lead),
            }
        }
        for lead in stale {
            self.push(&lead.chain, Action::DeleteFirst(lead.rule.clone()));
        }
        for lead in missing {
            self.push(
                &lead.chain,
                Action::Insert(lead.position, lead.rule.clone()),
            );
        }
    }

    fn delete_chains(&mut self, found: &Owned, stays: impl Fn(&str) -> bool) {
        for name in found.chains.keys().filter(|name| !stays(name)) {
            self.push(name, Action::DeleteChain);
        }
    }
}

/// The counters of rules that go, by backend.
#[derive(Default)]
struct Counted(HashMap<(IpAddr, Option<u16>), Counters>);

impl Counted {
    fn take(&mut self, rule: &SavedRule) {
        if let Some(backend) = rule.meaning.as_ref().and_then(Rule::backend) {
            let sum = self.0.entry(backend).or_default();
            sum.packets = sum.packets.saturating_add(rule.counters.packets);
            sum.bytes = sum.bytes.saturating_add(rule.counters.bytes);
        }
    }

    /// A rule that brings counters of its own keeps those.
    fn hand_to(&mut self, rule: &mut SavedRule) {
        let backend = rule.meaning.as_ref().and_then(Rule::backend);
        let counters = backend.and_then(|backend| self.0.remove(&backend));
        if rule.counters == Counters::default() {
            rule.counters = counters.unwrap_or_default();
        }
    }
}
