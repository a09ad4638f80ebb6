//! The rules that are about a class of connections.
//!
//! A built-in chain may have thousands of rules, each for another port. An index finds
//! those of one class, so that all classes together take about the time of one pass
//! (`benches/explain.py`).

use std::collections::{HashMap, HashSet};

use super::dump::WholeTable;
use super::follow::Class;

/// The rules of each chain by their rarest condition.
#[derive(Debug, Default)]
pub struct RuleIndex {
    unconditional: Vec<Vec<usize>>,
    by_condition: Vec<HashMap<u32, Vec<usize>>>,
}

impl RuleIndex {
    /// Indexes all chains.
    #[must_use]
    pub fn new(table: &WholeTable) -> Self {
        let mut counts = vec![0_u32; table.conditions.all().len()];
        let rules = table.chains.iter().flat_map(|chain| &chain.rules);
        for number in rules.flat_map(|rule| &rule.conditions) {
            counts[*number as usize] += 1;
        }
        let mut index = Self::default();
        for chain in &table.chains {
            let mut unconditional = Vec::new();
            let mut by_condition: HashMap<u32, Vec<usize>> = HashMap::new();
            for (at, rule) in chain.rules.iter().enumerate() {
                let conditions = rule.conditions.iter();
                match conditions.min_by_key(|number| counts[**number as usize]) {
                    Some(rarest) => by_condition.entry(*rarest).or_default().push(at),
                    None => unconditional.push(at),
                }
            }
            index.unconditional.push(unconditional);
            index.by_condition.push(by_condition);
        }
        index
    }
}

/// The rules that a class of connections meets.
pub struct Selection<'a> {
    table: &'a WholeTable,
    index: &'a RuleIndex,
    met: HashSet<u32>,
}

impl<'a> Selection<'a> {
    /// Selects the rules of a class.
    #[must_use]
    pub fn new(table: &'a WholeTable, index: &'a RuleIndex, class: &Class) -> Self {
        Self {
            table,
            index,
            met: table.conditions.met_by(class.given()),
        }
    }

    /// The places of the rules of one chain, ascending.
    #[must_use]
    pub fn rules(&self, chain: usize) -> Vec<usize> {
        let by_condition = &self.index.by_condition[chain];
        let mut places = self.index.unconditional[chain].clone();
        // The shorter of the two lists is gone through.
        match by_condition.len() < self.met.len() {
            true => places.extend(
                by_condition
                    .iter()
                    .filter(|(rarest, _)| self.met.contains(rarest))
                    .flat_map(|(_, places)| places),
            ),
            false => places.extend(
                self.met
                    .iter()
                    .filter_map(|number| by_condition.get(number))
                    .flatten(),
            ),
        }
        let rules = &self.table.chains[chain].rules;
        let is_met = |at: &usize| {
            let mut conditions = rules[*at].conditions.iter();
            conditions.all(|number| self.met.contains(number))
        };
        places.retain(is_met);
        places.sort_unstable();
        places
    }
}
