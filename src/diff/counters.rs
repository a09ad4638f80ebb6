//! Counters of deleted rules: a backend keeps its packets and bytes.

use std::collections::{HashMap, HashSet};

use super::{Chains, Matched};
use crate::netfilter::rule::Target;
use crate::netfilter::ruleset::{Counters, OwnedTable, SavedRule};
use crate::plan::Plan;

/// Hands the counters of deleted rules to new ones for the same target of the same
/// balancer. If there is no new one, one that stays is written again with them.
/// The rules that lead to the balancers of a set count for no backend.
pub(super) fn carry_over(
    plan: &Plan,
    found: &OwnedTable,
    wanted: &mut Chains,
    matched: &mut Matched,
) {
    let mut orphaned = OrphanedCounters::default();
    for (name, chain) in &found.chains {
        let (Some(part), Some(pairs)) = (plan.part(name), matched.get(name)) else {
            continue;
        };
        let kept: HashSet<usize> = pairs.iter().map(|(old, _)| *old).collect();
        let going = chain
            .rules
            .iter()
            .enumerate()
            .filter(|(at, _)| !kept.contains(at));
        going.for_each(|(_, rule)| orphaned.take(part, rule));
    }
    if orphaned.is_empty() {
        return;
    }
    for (name, new) in wanted.iter_mut() {
        let Some(part) = plan.part(name) else {
            continue;
        };
        let pairs = matched.get(name).map_or(&[][..], Vec::as_slice);
        let kept: HashSet<usize> = pairs.iter().map(|(_, new)| *new).collect();
        let coming = new
            .iter_mut()
            .enumerate()
            .filter(|(at, _)| !kept.contains(at));
        coming.for_each(|(_, rule)| orphaned.hand_to(part, rule));
    }
    for (name, pairs) in matched {
        let Some(part) = plan.part(name) else {
            continue;
        };
        pairs.retain(
            |(old, new)| match orphaned.left_for(part, &found.chains[name].rules[*old]) {
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

/// The counters of deleted rules, by their part of the plan and their target.
#[derive(Default)]
struct OrphanedCounters(HashMap<(String, Target), Counters>);

impl OrphanedCounters {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take(&mut self, part: &str, rule: &SavedRule) {
        if let Some(meaning) = &rule.meaning {
            let sum = self
                .0
                .entry((part.to_owned(), meaning.target.clone()))
                .or_default();
            *sum = sum.and(rule.counters);
        }
    }

    fn hand_to(&mut self, part: &str, rule: &mut SavedRule) {
        let meaning = rule.meaning.as_ref();
        let counters =
            meaning.and_then(|meaning| self.0.remove(&(part.to_owned(), meaning.target.clone())));
        rule.counters = counters.unwrap_or_default();
    }

    /// The counters that a rule which stays takes over from a deleted one,
    /// because no new rule does.
    fn left_for(&mut self, part: &str, rule: &SavedRule) -> Option<Counters> {
        let key = (part.to_owned(), rule.meaning.as_ref()?.target.clone());
        let counters = self
            .0
            .get(&key)
            .filter(|counters| **counters != Counters::default())?;
        let sum = counters.and(rule.counters);
        self.0.remove(&key);
        Some(sum)
    }
}
