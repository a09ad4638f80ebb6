//! The rules before a balancer that leave it nothing.

use super::condition::{Condition, Meaning};
use super::dump::WholeTable;
use super::leads::ending;
use super::order::takes_all;
use crate::netfilter::{Ports, Protocol};

/// The connections of a balancer. Of each list they meet one condition.
#[derive(Clone, Debug)]
pub struct Traffic(Vec<Vec<Condition>>);

impl Traffic {
    /// The connections of a protocol to some ports.
    #[must_use]
    pub fn new(protocol: Protocol, ports: &Ports) -> Self {
        let ports = Condition {
            text: String::new(),
            meaning: Meaning::Ports(ports.clone()),
        };
        Self(vec![vec![ports]]).with("-p", [protocol.as_str().to_owned()])
    }

    /// The part that meets an option with one of the values; no value stands for all
    /// of them.
    #[must_use]
    pub fn with(mut self, option: &str, values: impl IntoIterator<Item = String>) -> Self {
        let conditions = values
            .into_iter()
            .map(|value| Condition::new(false, option, &[value]));
        let conditions: Option<Vec<_>> = conditions.collect();
        self.0.extend(conditions.filter(|all| !all.is_empty()));
        self
    }

    /// The part that does not meet an option with a value.
    #[must_use]
    pub fn without(mut self, option: &str, value: &str) -> Self {
        let condition = Condition::new(true, option, &[value.to_owned()]);
        self.0.extend(condition.map(|one| vec![one]));
        self
    }

    /// Returns true if every connection meets the condition.
    fn meets(&self, condition: &Condition) -> bool {
        let all_meet = |list: &Vec<Condition>| list.iter().all(|one| condition.covers(one));
        condition.meaning != Meaning::Other && self.0.iter().any(all_meet)
    }
}

/// The first rule in a built-in chain that takes all these connections, among the first
/// `count` rules that do not lead to a chain of ours.
#[must_use]
pub fn taken_before(
    nat: &WholeTable,
    chain: &str,
    traffic: &Traffic,
    count: usize,
    is_ours: impl Fn(&str) -> bool,
) -> Option<String> {
    let ending = ending(nat);
    let rules = &nat.chains[nat.chain(chain)?].rules;
    let leads_to_us = |to: usize| is_ours(&nat.chains[to].name);
    let foreign = rules
        .iter()
        .filter(|rule| !rule.way.chain().is_some_and(leads_to_us));
    let mut before = foreign.take(count);
    let taking = before.find(|rule| {
        let mut conditions = nat.conditions_of(rule);
        rule.is_certain()
            && takes_all(&ending, rule)
            && conditions.all(|condition| traffic.meets(condition))
    });
    taking.map(|rule| format!("-A {chain} {}", rule.text))
}
