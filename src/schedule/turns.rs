//! Exact weighted round robin in few rules.
//!
//! A round has as many turns as the sum of the weights, divided by their
//! greatest common divisor. Of the `left` turns that reach a rule it may take
//! any number that divides them: `--every left/takes` then takes exactly that
//! many of any `left` connections in a row, wherever its counter stands, and
//! lets exactly the others pass. So every round of connections in a row is
//! exact, and a backend's weight may be split into several such pieces.
//!
//! The pieces and their order decide the number of rules. They are searched
//! for: first with one rule for each backend, then with one more, and so on. Of
//! the solutions with the fewest rules the smoothest is taken. The phase
//! (`--packet`) of each rule is chosen so that no backend is ever far ahead of
//! its share or behind it. The same weights always give the same rules: the
//! search is bounded by counted steps and not by time.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use super::{Piece, divisor};
use crate::netfilter::statistic::Statistic;

/// The steps that the search for one chain may take: some milliseconds.
pub const EFFORT: usize = 100_000;

/// The rules of a round, in order. Parts of equal weight get their first turns
/// in listed order. The last rule takes everything that reaches it.
///
/// `None` if the weights are so large that the turns of a round, divided by the
/// turns of a rule, do not fit into the 32 bits of `--every`.
///
/// The weights must not all be 0. `effort` bounds the search, in steps.
#[must_use]
pub fn nth(weights: &[u64], effort: usize) -> Option<Vec<Piece>> {
    let divisor = divisor(weights).max(1);
    let present: Vec<usize> = (0..weights.len()).filter(|at| weights[*at] > 0).collect();
    let weights: Vec<u64> = present.iter().map(|at| weights[*at] / divisor).collect();
    let turns = weights.iter().sum();
    let rules = Round { weights, turns }.best(effort);
    let piece = |rule: Rule| {
        let every = u32::try_from(rule.every).ok()?;
        let packet = u32::try_from(rule.packet).ok()?;
        Some(Piece {
            part: present[rule.part],
            takes: Statistic::Nth { every, packet }.simplest(),
        })
    };
    rules.into_iter().map(piece).collect()
}

/// A rule of a round.
#[derive(Clone, Copy, Debug)]
struct Rule {
    part: usize,
    every: u64,
    packet: u64,
}

/// Weights without a common divisor, none of them 0, and their sum.
struct Round {
    weights: Vec<u64>,
    turns: u64,
}

impl Round {
    fn best(&self, effort: usize) -> Vec<Rule> {
        if self.weights.iter().all(|weight| *weight == 1) {
            return self.one_each();
        }
        let mut found = self.fewest(effort);
        if found.is_empty() {
            found.push(self.greedy());
        }
        self.in_listed_order(self.smoothest(found))
    }

    /// Equal weights: 1 of n, 1 of n - 1, ..., the rest.
    fn one_each(&self) -> Vec<Rule> {
        let every = (1..=self.turns).rev();
        let rule = |(part, every)| Rule {
            part,
            every,
            packet: 0,
        };
        every.enumerate().map(rule).collect()
    }

    /// Some of the ways with the fewest rules; none, if the search was given
    /// up before there was one.
    fn fewest(&self, mut effort: usize) -> Vec<Vec<Rule>> {
        const MOST_EXTRA: usize = 24;
        for extra in 0..MOST_EXTRA {
            let mut search = Search {
                left: self.weights.clone(),
                rules: Vec::new(),
                found: Vec::new(),
                hopeless: HashSet::new(),
                effort,
            };
            search.descend(self.turns, self.weights.len() + extra);
            effort = search.effort;
            if !search.found.is_empty() || effort == 0 {
                return search.found;
            }
        }
        Vec::new()
    }

    /// Pieces without a search, for many parts with unlike weights: the largest
    /// whole weight that divides the rest; or else the largest piece after
    /// which one does.
    fn greedy(&self) -> Vec<Rule> {
        let mut left = self.turns;
        let mut rest: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for (part, weight) in self.weights.iter().enumerate().rev() {
            rest.entry(*weight).or_default().push(part);
        }
        let mut rules = Vec::new();
        while let Some((&largest, _)) = rest.last_key_value() {
            let divides = |turns: u64| {
                rest.keys()
                    .rev()
                    .copied()
                    .find(|weight| turns % *weight == 0)
            };
            let (weight, takes) = match divides(left) {
                Some(weight) => (weight, weight),
                None => {
                    let pieces = pieces(left, largest - 1);
                    let then_whole = pieces
                        .iter()
                        .rev()
                        .take(16)
                        .find(|piece| divides(left - **piece).is_some());
                    let takes = then_whole.or(pieces.last()).copied().unwrap_or(1);
                    (largest, takes)
                }
            };
            let part = pop(&mut rest, weight);
            rules.push(Rule {
                part,
                every: left / takes,
                packet: 0,
            });
            left -= takes;
            if weight > takes {
                rest.entry(weight - takes).or_default().push(part);
            }
        }
        rules
    }

    /// Of several ways the one in which the largest deviation of any part
    /// at any moment is smallest. Long rounds are not followed through: their
    /// phases stay as they are.
    fn smoothest(&self, ways: Vec<Vec<Rule>>) -> Vec<Rule> {
        const EFFORT: u64 = 3_000_000;
        let mut effort = EFFORT;
        let mut best: Option<(u64, Vec<Rule>)> = None;
        for mut rules in ways {
            if self.length(&rules) > EFFORT / 16 {
                return rules;
            }
            let deviation = self.choose_phases(&mut rules, &mut effort);
            if best.as_ref().is_none_or(|(least, _)| deviation < *least) {
                best = Some((deviation, rules));
            }
            let near_enough = best
                .as_ref()
                .is_some_and(|(least, _)| *least <= self.turns * 3 / 4);
            if effort == 0 || near_enough {
                break;
            }
        }
        best.map_or_else(Vec::new, |(_, rules)| rules)
    }

    /// Moves one rule's phase after the other to where the deviation is least,
    /// until nothing improves; returns the deviation.
    fn choose_phases(&self, rules: &mut [Rule], effort: &mut u64) -> u64 {
        const PHASES: u64 = 16;
        let cost = self.length(rules);
        let mut least = self.deviation(rules);
        loop {
            let before = least;
            for at in 0..rules.len() {
                let every = rules[at].every;
                let phases = every.min(PHASES);
                let mut best = rules[at].packet;
                for phase in 0..phases {
                    rules[at].packet = phase * every / phases;
                    *effort = effort.saturating_sub(cost);
                    let deviation = self.deviation(rules);
                    if deviation < least {
                        (least, best) = (deviation, rules[at].packet);
                    }
                }
                rules[at].packet = best;
            }
            if least == before || *effort == 0 {
                return least;
            }
        }
    }

    /// About how many steps it takes to follow a round through.
    fn length(&self, rules: &[Rule]) -> u64 {
        self.turns
            .saturating_mul((rules.len() + self.weights.len()) as u64)
            / 2
    }

    /// The largest deviation of a part from its share at any moment of a
    /// round, in connections times [`Self::turns`].
    fn deviation(&self, rules: &[Rule]) -> u64 {
        let mut served = vec![0; self.weights.len()];
        let mut worst = 0;
        for (turn, part) in (1..=self.turns).zip(serve(rules)) {
            served[part] += self.turns;
            for (served, weight) in served.iter().zip(&self.weights) {
                worst = worst.max(u64::abs_diff(*served, turn * weight));
            }
        }
        worst
    }

    /// Parts of equal weight change places so that they are served in listed
    /// order. In the first phase each rule takes the first connection that
    /// reaches it, so the order of first turns is that of the rules, unless
    /// phases were chosen, which is done for rounds short enough to follow.
    fn in_listed_order(&self, mut rules: Vec<Rule>) -> Vec<Rule> {
        let in_phase = rules.iter().all(|rule| rule.packet == 0);
        let by_rule = rules.iter().map(|rule| rule.part);
        let turns = usize::try_from(self.turns).unwrap_or(usize::MAX);
        let order: Vec<usize> = match in_phase {
            true => by_rule.collect(),
            false => serve(&rules).take(turns).collect(),
        };
        let mut listed: HashMap<u64, VecDeque<usize>> = HashMap::new();
        for (part, weight) in self.weights.iter().enumerate() {
            listed.entry(*weight).or_default().push_back(part);
        }
        let mut place: Vec<Option<usize>> = vec![None; self.weights.len()];
        for part in order {
            let next = || {
                listed
                    .get_mut(&self.weights[part])
                    .and_then(VecDeque::pop_front)
            };
            place[part] = place[part].or_else(next);
        }
        for rule in &mut rules {
            rule.part = place[rule.part].unwrap_or(rule.part);
        }
        rules
    }
}

fn pop(rest: &mut BTreeMap<u64, Vec<usize>>, weight: u64) -> usize {
    let equal = rest.entry(weight).or_default();
    let part = equal.pop().unwrap_or_default();
    if equal.is_empty() {
        rest.remove(&weight);
    }
    part
}

/// The parts that get one connection after the other, from a fresh start.
fn serve(rules: &[Rule]) -> impl Iterator<Item = usize> + '_ {
    let mut seen = vec![0; rules.len()];
    std::iter::repeat_with(move || {
        let takes = |(rule, seen): (&Rule, &mut u64)| {
            let place = *seen;
            *seen = if place + 1 == rule.every {
                0
            } else {
                place + 1
            };
            (place == rule.packet).then_some(rule.part)
        };
        rules
            .iter()
            .zip(&mut seen)
            .find_map(takes)
            .unwrap_or_default()
    })
}

/// The numbers up to `most` that divide `turns`, ascending. Of numbers beyond
/// 2^24 those are left out of which neither they nor their quotient are below
/// 4096; and `--every` has 32 bits.
fn pieces(turns: u64, most: u64) -> Vec<u64> {
    const SMALL: u64 = 4096;
    let small = (1..=SMALL).take_while(|small| small * small <= turns);
    let mut pieces: Vec<u64> = small
        .filter(|small| turns % *small == 0)
        .flat_map(|small| [small, turns / small])
        .filter(|piece| *piece <= most && u32::try_from(turns / piece).is_ok())
        .collect();
    pieces.sort_unstable();
    pieces.dedup();
    pieces
}

/// The search for a given number of rules: depth first, without entering a
/// known dead end twice.
struct Search {
    left: Vec<u64>,
    rules: Vec<Rule>,
    found: Vec<Vec<Rule>>,
    hopeless: HashSet<(Vec<u64>, usize)>,
    effort: usize,
}

impl Search {
    /// Returns true if `turns` can be taken in `most` rules, or if the search
    /// was given up.
    fn descend(&mut self, turns: u64, most: usize) -> bool {
        const ENOUGH: usize = 24;
        let mut rest: Vec<u64> = self
            .left
            .iter()
            .copied()
            .filter(|weight| *weight > 0)
            .collect();
        if rest.len() > most {
            return false;
        }
        self.effort = self.effort.saturating_sub(self.left.len());
        if self.effort == 0 || self.found.len() >= ENOUGH {
            return true;
        }
        if rest.len() == 1 {
            let last = self.left.iter().position(|weight| *weight > 0);
            let rest = Rule {
                part: last.unwrap_or_default(),
                every: 1,
                packet: 0,
            };
            self.found
                .push(self.rules.iter().copied().chain([rest]).collect());
            return true;
        }
        rest.sort_unstable();
        let state = (rest, most);
        if self.hopeless.contains(&state) {
            return false;
        }
        let mut leads_on = false;
        for (part, takes) in self.choices(turns, most - state.0.len()) {
            self.left[part] -= takes;
            self.rules.push(Rule {
                part,
                every: turns / takes,
                packet: 0,
            });
            leads_on |= self.descend(turns - takes, most - 1);
            self.rules.pop();
            self.left[part] += takes;
        }
        if !leads_on {
            self.hopeless.insert(state);
        }
        leads_on
    }

    /// The pieces that the next rule may take: whole weights first, then, if
    /// there are `spare` rules, parts of them, the largest first. Parts with
    /// the same rest are equivalent here.
    fn choices(&self, turns: u64, spare: usize) -> Vec<(usize, u64)> {
        let mut different: Vec<usize> = Vec::new();
        for (part, weight) in self.left.iter().enumerate() {
            if *weight > 0 && !different.iter().any(|other| self.left[*other] == *weight) {
                different.push(part);
            }
        }
        different.sort_by_key(|part| std::cmp::Reverse(self.left[*part]));
        let fits = |takes: u64| turns % takes == 0 && u32::try_from(turns / takes).is_ok();
        let whole = different.iter().map(|part| (*part, self.left[*part]));
        let mut choices: Vec<_> = whole.filter(|(_, weight)| fits(*weight)).collect();
        if spare > 0 {
            let largest = different.first().map_or(0, |part| self.left[*part]);
            for piece in pieces(turns, largest).into_iter().rev() {
                let larger = different.iter().filter(|part| self.left[**part] > piece);
                choices.extend(larger.map(|part| (*part, piece)));
            }
        }
        choices
    }
}
