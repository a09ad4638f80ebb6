//! Lines that all ask for the same number, and turns in another order than the lines.
//!
//! Shares alone do not show a mistake: `--every 2` on two lines is right for the weights
//! 2:1:1. So a pattern counts as a mistake only where no weights that a person would
//! choose give the same rules.

use std::collections::HashSet;

use super::follow::Step;
use super::lint::{Code, OfClass, percent, place};
use super::rule::Way;
use super::{ExplainedChain, Finding};
use crate::netfilter::statistic::{Probability, Statistic};

impl OfClass<'_> {
    /// The steps of one chain that lead to destinations: those with a choice, and the first
    /// without one.
    fn lines(&self, chain: usize) -> (Vec<&Step>, Option<&Step>) {
        let steps = self.course.steps.iter();
        let mut steps =
            steps.filter(|step| step.chain == chain && self.explainer.leads(self.rule(step)));
        let mut choosing = Vec::new();
        let last = steps.find(|step| {
            let is_certain = self.rule(step).is_certain();
            if !is_certain {
                choosing.push(*step);
            }
            is_certain
        });
        (choosing, last)
    }

    /// The same number on each line, and turns in another order.
    pub(super) fn patterns(&self, explained: &ExplainedChain) -> Vec<Finding> {
        let mut chains: Vec<usize> = self.course.steps.iter().map(|step| step.chain).collect();
        chains.dedup();
        let patterns = chains.into_iter().filter_map(|chain| {
            let (choosing, last) = self.lines(chain);
            let conditions = |step: &Step| &self.rule(step).conditions;
            // Lines about other connections are no lines of the same list.
            if choosing
                .iter()
                .any(|step| conditions(step) != conditions(choosing[0]))
            {
                return None;
            }
            let same_every = || self.same_every(&choosing, last, explained);
            let same_probability = || self.same_probability(&choosing, last, explained);
            same_every()
                .or_else(same_probability)
                .or_else(|| self.out_of_turn(&choosing, last))
        });
        patterns.collect()
    }

    fn same_every(
        &self,
        choosing: &[&Step],
        last: Option<&Step>,
        chain: &ExplainedChain,
    ) -> Option<Finding> {
        let nth: Option<Vec<(u32, u32)>> = choosing
            .iter()
            .map(|step| match self.rule(step).statistic {
                Statistic::Nth { every, packet } => Some((every, packet)),
                _ => None,
            })
            .collect();
        let nth = nth?;
        let (every, _) = *nth.first()?;
        if nth.len() < 2 || nth.iter().any(|(other, _)| *other != every) {
            return None;
        }
        let lines = nth.len() + usize::from(last.is_some());
        let is_mistake = match last {
            None => true,
            // With three lines, weights such as 3:2:4 give the same rules, and with four
            // 16:12:9:27, but for `--packet`, which a program chooses and a person numbers.
            Some(_) => {
                lines == every as usize && (is_numbered(&nth) || lines >= 4 && is_equal(&nth))
            }
        };
        if !is_mistake {
            return None;
        }
        let message = format!(
            "each rule counts only the connections that the rules before it let pass, so `--every {every}` on {} lines \
             gives {}",
            nth.len(),
            self.figures(choosing, last, chain)
        );
        let numbers: Vec<String> = (2..=lines)
            .rev()
            .take(4)
            .map(|number| number.to_string())
            .collect();
        let more = if lines > 5 { ", ... down to 2" } else { "" };
        let advice = format!(
            "write `--every {}`{more} from line to line, `--packet 0` on each, and no statistic on the last",
            numbers.join("`, `--every ")
        );
        Some(self.finding(
            Code::SameEvery,
            place(choosing[0]),
            message,
            &with_request(&advice),
        ))
    }

    fn same_probability(
        &self,
        choosing: &[&Step],
        last: Option<&Step>,
        chain: &ExplainedChain,
    ) -> Option<Finding> {
        let chances: Option<Vec<u32>> = choosing
            .iter()
            .map(|step| match self.rule(step).statistic {
                Statistic::Random(chance) => Some(chance.units()),
                _ => None,
            })
            .collect();
        let chances = chances?;
        let first = *chances.first()?;
        if chances.len() < 2 || first == 0 || chances.iter().any(|other| !is_near(first, *other)) {
            return None;
        }
        let lines = chances.len() + usize::from(last.is_some());
        let one = f64::from(Probability::ONE);
        #[allow(clippy::cast_precision_loss)]
        let equal = one / lines as f64;
        let chance = f64::from(first);
        // Typed with a few digits, it is no program's.
        let is_typed = (chance - equal).abs() > 0.6 && (chance - equal).abs() < equal * 0.02;
        let is_equal = (chance - equal).abs() <= 0.6;
        let is_mistake = match last {
            None => true,
            Some(_) => is_typed || (is_equal && lines >= 4),
        };
        if !is_mistake {
            return None;
        }
        let shown = chance / one;
        let message = format!(
            "each rule sees only the connections that the rules before it let pass, so `--probability {shown:.4}` on {} lines \
             gives {}",
            chances.len(),
            self.figures(choosing, last, chain)
        );
        let numbers: Vec<String> = (2..=lines)
            .rev()
            .take(4)
            .map(|number| {
                #[allow(clippy::cast_precision_loss)]
                let chance = 1.0 / number as f64;
                format!("{chance:.11}")
            })
            .collect();
        let more = if lines > 5 { ", ... up to 0.5" } else { "" };
        let advice = format!(
            "write `--probability {}`{more} from line to line, and no statistic on the last",
            numbers.join("`, `--probability ")
        );
        Some(self.finding(
            Code::SameProbability,
            place(choosing[0]),
            message,
            &with_request(&advice),
        ))
    }

    /// The shares of the lines in words: `25 %, 18.8 %, 14.1 %, 10.5 %, and 31.6 % of the connections get no
    /// destination`.
    fn figures(&self, choosing: &[&Step], last: Option<&Step>, chain: &ExplainedChain) -> String {
        const MOST: usize = 6;
        let all = choosing[0].arriving.share.as_f64();
        let share = |step: &Step| step.taken.share.as_f64() / all;
        let lines = || choosing.iter().copied().chain(last);
        let shares: Vec<String> = lines()
            .take(MOST)
            .map(|step| percent(share(step)))
            .collect();
        let more = if lines().count() > MOST { ", ..." } else { "" };
        let rest = match (
            last,
            choosing[0].chain == self.root && chain.unmatched > 0.0,
        ) {
            (Some(_), _) => String::new(),
            (None, is_nobodys) => {
                let rest = percent(1.0 - lines().map(share).sum::<f64>());
                let end = match is_nobodys {
                    true => "get no destination",
                    false => "go on after them",
                };
                format!(", and {rest} of the connections {end}")
            }
        };
        format!("{}{more}{rest}", shares.join(", "))
    }

    /// Equal shares in turn whose `--packet` changes the order of the lines.
    fn out_of_turn(&self, choosing: &[&Step], last: Option<&Step>) -> Option<Finding> {
        // In a tree, and where a destination has several lines, `--packet` is a choice.
        let lines = choosing.iter().copied().chain([last?]);
        let mut seen = HashSet::new();
        let is_plain = |step: &Step| match &self.rule(step).way {
            Way::Destination(to) => step.chain == self.root && seen.insert(to),
            _ => false,
        };
        if !lines.into_iter().all(is_plain) {
            return None;
        }
        let mut first = None;
        let count = u32::try_from(choosing.len()).ok()?;
        for (step, every) in choosing.iter().zip((2..=count + 1).rev()) {
            match self.rule(step).statistic {
                Statistic::Nth {
                    every: found,
                    packet,
                } if found == every => {
                    first = first.or((packet != 0).then_some((*step, packet)));
                }
                _ => return None,
            }
        }
        let (step, packet) = first?;
        let message = format!(
            "the rule lets {packet} {} pass before it takes one, so the turns are not in the order of the lines; the shares are right",
            if packet == 1 {
                "connection"
            } else {
                "connections"
            }
        );
        Some(self.finding(
            Code::PacketOutOfTurn,
            place(step),
            message,
            "write `--packet 0` on each line: the rules do not share a counter, so it is not the number of the line",
        ))
    }
}

/// Returns true if `--packet` counts the lines, up or down.
fn is_numbered(nth: &[(u32, u32)]) -> bool {
    let steps = || nth.iter().zip(&nth[1..]);
    steps().all(|((_, one), (_, next))| one + 1 == *next)
        || steps().all(|((_, one), (_, next))| *one == next + 1)
}

/// Returns true if `--packet` is the same on each line.
fn is_equal(nth: &[(u32, u32)]) -> bool {
    nth.iter().all(|(_, packet)| *packet == nth[0].1)
}

/// Returns true if two chances mean the same to a person: 0.33 and 0.34.
fn is_near(one: u32, other: u32) -> bool {
    one.abs_diff(other) <= one / 20
}

fn with_request(advice: &str) -> String {
    format!("{advice}; or let `iptables_balance plan` write the rules")
}
