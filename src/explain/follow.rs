//! The way of connections through the chains of a table.
//!
//! A chain's effect on the connections that enter it is the same wherever they come
//! from. So two passes are enough, and the time is that of the number of rules: from
//! the last chains up, the part that comes back from each; then from the first chain
//! down, the connections that reach each rule. Only hashes are followed along the way,
//! since a hash gives the same answer twice.

use std::collections::{HashMap, HashSet};

use super::condition::Meaning;
use super::dump::WholeTable;
use super::fraction::Fraction;
use super::rule::{Rule, Way};
use super::selection::Selection;
use crate::netfilter::flow::Flow;
use crate::netfilter::statistic::{Share, Statistic};

/// Connections on their way.
#[derive(Clone, Debug)]
pub struct Stream {
    flow: Flow,
    /// The exact share, as long as it fits and no hash decides.
    exact: Option<Fraction>,
    /// The largest deviation in turn from the share, in connections.
    slack: f64,
    /// The flow is to be doubled so often: connections that come back from a chain may
    /// enter it again, and be more than all then.
    doublings: u32,
}

/// A share of connections.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// In units of 2^-127.
    pub share: Share,
    /// The exact share, if it fits.
    pub exact: Option<Fraction>,
}

impl Stream {
    fn all() -> Self {
        Self {
            flow: Flow::all(),
            exact: Some(Fraction::ALL),
            slack: 0.0,
            doublings: 0,
        }
    }

    fn none() -> Self {
        Self {
            flow: Flow::default(),
            exact: Some(Fraction::NONE),
            slack: 0.0,
            doublings: 0,
        }
    }

    /// The share of all connections.
    #[must_use]
    pub fn part(&self) -> Part {
        Part {
            share: self.flow.share().doubled(self.doublings),
            exact: self.exact,
        }
    }

    fn is_none(&self) -> bool {
        self.flow.share() == Share::NONE
    }

    fn take(&mut self, rule: &Rule) -> Self {
        if rule.is_certain() {
            return std::mem::replace(self, Self::none());
        }
        let flow = self.flow.take(rule.statistic, &rule.hashes);
        let choice = match rule.hashes.is_empty() {
            true => Some(Fraction::of_choice(rule.statistic)),
            false => None,
        };
        let part = |choice: Option<Fraction>| self.exact.and_then(|exact| exact.times(choice?));
        let (taken, left) = (part(choice), part(choice.map(Fraction::rest)));
        let slack = match rule.statistic {
            Statistic::Nth { every, .. } => {
                let every = f64::from(every);
                let taken = self.slack / every + 1.0;
                self.slack = self.slack * (every - 1.0) / every + 1.0;
                taken
            }
            _ => self.slack,
        };
        self.exact = left;
        Self {
            flow,
            exact: taken,
            slack,
            doublings: self.doublings,
        }
    }

    fn join(&mut self, mut other: Self) {
        let doublings = self.doublings.max(other.doublings);
        self.halve(doublings - self.doublings);
        other.halve(doublings - other.doublings);
        if self.flow.share().and(other.flow.share()) > Share::ALL {
            self.halve(1);
            other.halve(1);
        }
        self.exact = self.exact.and_then(|exact| exact.and(other.exact?));
        self.slack += other.slack;
        self.flow.join(other.flow);
    }

    /// Writes the same connections as a smaller flow.
    fn halve(&mut self, times: u32) {
        if times > 0 {
            let flow = std::mem::take(&mut self.flow);
            self.flow = flow.scaled(Share::ALL.halved(times));
            self.doublings += times;
        }
    }

    fn scaled(self, part: Part) -> Self {
        match part.share {
            Share::ALL => self,
            Share::NONE => Self::none(),
            share => Self {
                flow: self.flow.scaled(share),
                exact: self.exact.and_then(|exact| exact.times(part.exact?)),
                slack: self.slack,
                doublings: self.doublings,
            },
        }
    }
}

/// Connections that meet certain conditions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Class {
    /// The numbers of the conditions, ascending.
    pub conditions: Vec<u32>,
    /// The conditions that are met on the way to the chain.
    pub context: Vec<u32>,
}

impl Class {
    /// Returns true if a protocol is among the conditions that are met.
    #[must_use]
    pub fn has_protocol(&self, table: &WholeTable) -> bool {
        self.given()
            .any(|number| matches!(table.conditions.get(number).meaning, Meaning::Protocol(_)))
    }

    /// The conditions that these connections meet.
    pub fn given(&self) -> impl Iterator<Item = u32> {
        self.conditions.iter().chain(&self.context).copied()
    }
}

/// A rule that gives connections a destination.
#[derive(Debug)]
pub struct Arrival {
    /// The chain of the rule.
    pub chain: usize,
    /// Its place in the chain.
    pub at: usize,
    /// The connections.
    pub stream: Stream,
}

/// A rule on the way.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// The chain of the rule.
    pub chain: usize,
    /// Its place in the chain.
    pub at: usize,
    /// The connections that reach it.
    pub arriving: Part,
    /// The connections that it takes.
    pub taken: Part,
}

/// The way of a class of connections from one chain on.
#[derive(Debug)]
pub struct Course {
    /// The rules that give a destination, in the order of the way.
    pub arrivals: Vec<Arrival>,
    /// The rules that are about these connections, in the order of the way.
    pub steps: Vec<Step>,
    /// The chains with the rules that these connections meet, however few of them come
    /// that far.
    pub met: Vec<(usize, Vec<usize>)>,
    /// The rules that are visited on average.
    pub visits: f64,
    /// True if chance decides somewhere.
    pub has_chance: bool,
    /// True if turns decide somewhere.
    pub has_turns: bool,
    /// True if a hash decides somewhere.
    pub has_hash: bool,
}

/// The chains that can be reached from one, each before all that it leads to.
#[must_use]
pub fn reachable(table: &WholeTable, root: usize) -> Vec<usize> {
    let mut seen = HashSet::from([root]);
    let mut order = Vec::new();
    // From the last rule to the first, so that the reversed order is that of the rules.
    let length = |chain: usize| table.chains[chain].rules.len();
    let mut path = vec![(root, length(root))];
    while let Some((chain, at)) = path.last_mut() {
        let Some(next) = at.checked_sub(1) else {
            order.push(*chain);
            path.pop();
            continue;
        };
        *at = next;
        if let Some(to) = table.chains[*chain].rules[next].way.chain() {
            if seen.insert(to) {
                path.push((to, length(to)));
            }
        }
    }
    order.reverse();
    order
}

/// The chains that a class of connections can reach from one, each before all that it
/// leads to, with the rules that these connections meet.
fn reached(table: &WholeTable, root: usize, selection: &Selection<'_>) -> Vec<(usize, Vec<usize>)> {
    let mut seen = HashSet::from([root]);
    let mut order = Vec::new();
    let entered = |chain: usize| {
        let rules = selection.rules(chain);
        (chain, rules.len(), rules)
    };
    let mut path = vec![entered(root)];
    while let Some((chain, left, rules)) = path.last_mut() {
        let Some(next) = left.checked_sub(1) else {
            order.push((*chain, std::mem::take(rules)));
            path.pop();
            continue;
        };
        *left = next;
        if let Some(to) = table.chains[*chain].rules[rules[next]].way.chain() {
            if seen.insert(to) {
                path.push(entered(to));
            }
        }
    }
    order.reverse();
    order
}

/// Follows a class of connections through a chain and all that it leads to.
#[must_use]
pub fn follow(table: &WholeTable, root: usize, selection: &Selection<'_>) -> Course {
    let order = reached(table, root, selection);
    let mut returned: HashMap<usize, Part> = HashMap::new();
    for (chain, places) in order.iter().rev().take(order.len() - 1) {
        let part = comes_back(&table.chains[*chain].rules, places, &returned);
        returned.insert(*chain, part);
    }
    let mut course = Course {
        arrivals: Vec::new(),
        steps: Vec::new(),
        met: Vec::new(),
        visits: 0.0,
        has_chance: false,
        has_turns: false,
        has_hash: false,
    };
    let mut reaching = HashMap::from([(root, Stream::all())]);
    for (chain, places) in &order {
        let Some(mut left) = reaching.remove(chain) else {
            continue;
        };
        let chain = *chain;
        let rules = &table.chains[chain].rules;
        let mut visited = 0;
        for at in places.iter().copied() {
            if left.is_none() && chain != root {
                break;
            }
            course.visit(&left, at + 1 - visited);
            visited = at + 1;
            let rule = &rules[at];
            course.note(rule);
            let arriving = left.part();
            let taken = left.take(rule);
            course.steps.push(Step {
                chain,
                at,
                arriving,
                taken: taken.part(),
            });
            match &rule.way {
                Way::Destination(_) => course.arrivals.push(Arrival {
                    chain,
                    at,
                    stream: taken,
                }),
                Way::Jump(to) => {
                    let back = taken.clone().scaled(returned[to]);
                    add(&mut reaching, *to, taken);
                    left.join(back);
                }
                Way::Goto(to) => add(&mut reaching, *to, taken),
                Way::Pass => left.join(taken),
                Way::End(_) | Way::Return | Way::Named { .. } => {}
            }
        }
        course.visit(&left, rules.len() - visited);
    }
    course.met = order;
    course
}

impl Course {
    /// Counts rules in a row that the same connections visit.
    fn visit(&mut self, stream: &Stream, rules: usize) {
        #[allow(clippy::cast_precision_loss)]
        let rules = rules as f64;
        // Below what a double can hold, even after ten thousand chains that double.
        let doublings = f64::from(stream.doublings.min(900)).exp2();
        self.visits += stream.flow.share().as_f64() * doublings * rules;
    }

    fn note(&mut self, rule: &Rule) {
        if matches!(rule.way, Way::Pass) {
            return;
        }
        self.has_chance |= matches!(rule.statistic, Statistic::Random(_));
        self.has_turns |= matches!(rule.statistic, Statistic::Nth { .. });
        self.has_hash |= !rule.hashes.is_empty();
    }
}

impl Arrival {
    /// The largest deviation from the share in turn, in connections.
    #[must_use]
    pub fn slack(&self) -> f64 {
        self.stream.slack
    }
}

fn add(reaching: &mut HashMap<usize, Stream>, chain: usize, stream: Stream) {
    if !stream.is_none() {
        reaching
            .entry(chain)
            .or_insert_with(Stream::none)
            .join(stream);
    }
}

/// The part of the connections that come back from a chain.
fn comes_back(rules: &[Rule], places: &[usize], returned: &HashMap<usize, Part>) -> Part {
    let mut left = Stream::all();
    let mut back = Stream::none();
    for rule in places.iter().map(|at| &rules[*at]) {
        if left.is_none() {
            break;
        }
        let taken = left.take(rule);
        match &rule.way {
            Way::Jump(to) => left.join(taken.scaled(returned[to])),
            Way::Goto(to) => back.join(taken.scaled(returned[to])),
            Way::Return => back.join(taken),
            Way::Pass => left.join(taken),
            Way::Destination(_) | Way::End(_) | Way::Named { .. } => {}
        }
    }
    back.join(left);
    back.part()
}
