//! Mistakes in the order of rules: those that come after one that takes everything.

use std::collections::HashMap;

use super::condition::{Condition, Meaning};
use super::lint::finding;
use super::rule::{Rule, Way};
use super::{Code, Explainer, Explanation, Finding};

/// The mistakes between the rules of each chain, whoever they are about: rules after
/// one that takes everything. They go to the chain that they stand in or lead to.
pub(super) fn of_table(explainer: &Explainer<'_>, only: &[String], all: &mut Explanation) {
    for chain in 0..explainer.table.chains.len() {
        let is_used = explainer.table.chains[chain].policy.is_some()
            || !explainer.referrers[chain].is_empty();
        if !is_used || !explainer.leading[chain] {
            continue;
        }
        for (at, by) in hidden(explainer, chain) {
            let rules = &explainer.table.chains[chain].rules;
            let to = rules[at].way.chain();
            let message = format!(
                "it never matches: `-A {} {}` takes all its connections before",
                explainer.name(chain),
                rules[by].text
            );
            let (code, advice) = match to {
                Some(_) => (
                    Code::ShadowedJump,
                    "put the jump before that rule, or narrow that rule",
                ),
                None => (Code::Unreachable, "delete it, or put it before that rule"),
            };
            let found = finding(explainer, code, (chain, at), message, advice);
            store(explainer, only, (chain, to), found, all);
        }
    }
}

fn store(
    explainer: &Explainer<'_>,
    only: &[String],
    (chain, to): (usize, Option<usize>),
    found: Finding,
    all: &mut Explanation,
) {
    let family = explainer.table.family;
    let names = [to.unwrap_or(chain), chain].map(|chain| explainer.name(chain));
    for name in names {
        let mut chains = all.chains.iter_mut();
        if let Some(known) = chains.find(|known| known.family == family && known.chain == name) {
            known.findings.push(found);
            return;
        }
    }
    if only.is_empty() {
        all.findings.push(found);
    }
}

/// The rules that lead to destinations and come after one that takes all their connections,
/// each with that one.
fn hidden(explainer: &Explainer<'_>, chain: usize) -> Vec<(usize, usize)> {
    const MOST_WIDE: usize = 64;
    let table = explainer.table;
    let mut hidden = Vec::new();
    let mut same: HashMap<&[u32], usize> = HashMap::new();
    let mut wide: Vec<(usize, Vec<&Condition>)> = Vec::new();
    for (at, rule) in table.chains[chain].rules.iter().enumerate() {
        let conditions: Vec<&Condition> = table.conditions_of(rule).collect();
        if explainer.leads(rule) {
            let covers = |by: &[&Condition]| {
                by.iter()
                    .all(|wide| conditions.iter().any(|narrow| wide.covers(narrow)))
            };
            let by = same.get(rule.conditions.as_slice()).copied();
            let by = by.or_else(|| wide.iter().find(|(_, by)| covers(by)).map(|(by, _)| *by));
            hidden.extend(by.map(|by| (at, by)));
        }
        let is_pure = conditions
            .iter()
            .all(|condition| condition.meaning != Meaning::Other);
        if rule.is_certain() && is_pure && takes_all(&explainer.ending, rule) {
            same.entry(&rule.conditions).or_insert(at);
            let is_wide = |condition: &&Condition| condition.meaning.is_wide();
            let is_wide = conditions.len() < 2 || conditions.iter().any(is_wide);
            if is_wide && wide.len() < MOST_WIDE {
                wide.push((at, conditions));
            }
        }
    }
    hidden
}

/// Returns true if no connection that the rule matches comes back.
pub(super) fn takes_all(ending: &[bool], rule: &Rule) -> bool {
    match &rule.way {
        Way::Destination(_) | Way::End(_) | Way::Return | Way::Goto(_) => true,
        Way::Jump(to) => ending[*to],
        Way::Pass | Way::Named { .. } => false,
    }
}
