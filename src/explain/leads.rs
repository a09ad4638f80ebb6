//! Facts about each chain of a table that need no class of connections.

use super::dump::WholeTable;
use super::rule::{Rule, Way};

/// The rules that lead to each chain, by the chain's number.
pub type Referrers = Vec<Vec<(usize, usize)>>;

pub fn referrers(table: &WholeTable) -> Referrers {
    let mut referrers = vec![Vec::new(); table.chains.len()];
    for (from, chain) in table.chains.iter().enumerate() {
        for (at, rule) in chain.rules.iter().enumerate() {
            if let Some(to) = rule.way.chain() {
                referrers[to].push((from, at));
            }
        }
    }
    referrers
}

/// For each chain: it leads to a destination.
pub fn leading(table: &WholeTable) -> Vec<bool> {
    let mut leading = vec![false; table.chains.len()];
    for chain in &table.order {
        let leads = |rule: &Rule| match &rule.way {
            Way::Destination(_) => true,
            way => way.chain().is_some_and(|to| leading[to]),
        };
        leading[*chain] = table.chains[*chain].rules.iter().any(leads);
    }
    leading
}

/// For each chain: no connection comes back from it. It has a rule without conditions
/// that ends the way, and no rule before it leads back.
pub fn ending(table: &WholeTable) -> Vec<bool> {
    let mut ending = vec![false; table.chains.len()];
    for chain in &table.order {
        let rules = &table.chains[*chain].rules;
        let ends = |rule: &Rule| match &rule.way {
            Way::Destination(_) | Way::End(_) => true,
            way => way.chain().is_some_and(|to| ending[to]),
        };
        let is_end = |rule: &Rule| rule.is_certain() && rule.conditions.is_empty() && ends(rule);
        let may_return = |rule: &Rule| match &rule.way {
            Way::Return => true,
            Way::Goto(to) => !ending[*to],
            _ => false,
        };
        let end = rules.iter().position(is_end);
        ending[*chain] = end.is_some_and(|end| !rules[..end].iter().any(may_return));
    }
    ending
}
