//! The chains that are explained for themselves, and those that are a part of others.

use std::collections::HashSet;

use super::condition::Meaning;
use super::follow::Course;
use super::rule::{Rule, Way};
use super::{Explainer, is_range};

/// The connections that a chain gives to destinations.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Shares {
    Nothing,
    /// All of a protocol, to one.
    Whole,
    /// Parts.
    Parts,
}

impl Explainer<'_> {
    /// Returns true if the rule leaves a part of the connections for others, or leads
    /// them to a range.
    pub(super) fn shares_out(&self, rule: &Rule) -> bool {
        match &rule.way {
            Way::Destination(to) => !rule.is_certain() || is_range(to),
            _ => !rule.is_certain() && self.leads(rule),
        }
    }

    /// Returns true if all connections of a protocol get a destination in the chain.
    fn is_simple(&self, chain: usize) -> bool {
        let is_protocol = |number: &u32| {
            matches!(
                self.table.conditions.get(*number).meaning,
                Meaning::Protocol(_)
            )
        };
        let rules = &self.table.chains[chain].rules;
        !self.referrers[chain].is_empty()
            && rules.iter().any(|rule| {
                rule.is_certain() && self.leads(rule) && rule.conditions.iter().all(is_protocol)
            })
    }

    /// For each chain: it shares out connections.
    pub(super) fn sharing(&self) -> Vec<Shares> {
        let shares = |chain: usize| {
            let mut rules = self.table.chains[chain].rules.iter();
            if rules.any(|rule| self.shares_out(rule)) {
                Shares::Parts
            } else if self.leading[chain] && self.is_simple(chain) {
                Shares::Whole
            } else {
                Shares::Nothing
            }
        };
        (0..self.table.chains.len()).map(shares).collect()
    }

    /// Returns true if a rule that the connections meet has a destination, however few of
    /// them come that far.
    pub(super) fn has_destination(&self, course: &Course) -> bool {
        let has = |(chain, places): &(usize, Vec<usize>)| {
            let rules = &self.table.chains[*chain].rules;
            let mut places = places.iter();
            places.any(|at| matches!(rules[*at].way, Way::Destination(_)))
        };
        course.met.iter().any(has)
    }

    /// Returns true if the chain is shown as a part of those that lead to it.
    pub(super) fn is_part(
        &self,
        chain: usize,
        shares: &[Shares],
        is_part: &[bool],
        met: &HashSet<(usize, usize)>,
    ) -> bool {
        let referrers = &self.referrers[chain];
        let is_within =
            |(from, _): &(usize, usize)| shares[*from] != Shares::Nothing || is_part[*from];
        let is_shown = |rule: &(usize, usize)| met.contains(rule);
        !referrers.is_empty()
            && referrers.iter().all(is_within)
            && match shares[chain] {
                // `-m recent` may lead here too.
                Shares::Whole => referrers.iter().any(is_shown),
                _ => referrers.iter().all(is_shown),
            }
    }
}
