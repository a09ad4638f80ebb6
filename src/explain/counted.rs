//! The counters that can be held against shares.

use std::collections::HashSet;

use super::Explainer;
use super::follow::{Class, Course};

impl Explainer<'_> {
    /// The rules on the way whose counters count this class of connections alone.
    pub(super) fn counted(
        &self,
        root: usize,
        class: &Class,
        course: &Course,
    ) -> HashSet<(usize, usize)> {
        if !self.table.has_counters {
            return HashSet::new();
        }
        let conditions = &self.table.conditions;
        let asked = |by: &[u32]| {
            let covers = |one: &u32| {
                let asked = conditions.get(*one);
                by.iter().any(|by| asked.covers(conditions.get(*by)))
            };
            class.conditions.iter().all(covers)
        };
        // The chains that only these rules lead to, and those that only this class enters.
        let mut own = HashSet::from([root]);
        let mut pure: HashSet<usize> = asked(&class.context).then_some(root).into_iter().collect();
        let mut on_the_way = HashSet::new();
        let mut counted = HashSet::new();
        let mut last = root;
        for step in &course.steps {
            let chain = step.chain;
            let is_entered = std::mem::replace(&mut last, chain) != chain;
            let referrers = &self.referrers[chain];
            if is_entered && referrers.iter().all(|rule| on_the_way.contains(rule)) {
                own.insert(chain);
                if referrers.iter().all(|rule| counted.contains(rule)) {
                    pure.insert(chain);
                }
            }
            if own.contains(&chain) {
                on_the_way.insert((chain, step.at));
                let rule = &self.table.chains[chain].rules[step.at];
                if pure.contains(&chain) || asked(&rule.conditions) {
                    counted.insert((chain, step.at));
                }
            }
        }
        counted
    }
}
