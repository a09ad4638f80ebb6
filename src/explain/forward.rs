//! The filter table's FORWARD, asked about a new connection to a backend.
//!
//! Interfaces, marks and sources are not known. A rule that may match counts as
//! the author's intention: only what is stopped on every way is reported.

use super::condition::{Condition, Meaning};
use super::dump::WholeTable;
use super::rule::{Rule, Verdict, Way};
use crate::netfilter::Endpoint;

/// The first packet of a connection, after DNAT.
pub struct Packet<'a> {
    /// Its protocol, if it is known.
    pub protocol: Option<&'a str>,
    /// Its destination.
    pub to: Endpoint,
    /// The chains that are known not to be about it.
    pub passes_by: &'a dyn Fn(&str) -> bool,
}

/// Returns the rule or policy that stops the packet, if nothing may accept it before.
#[must_use]
pub fn blocks(filter: &WholeTable, packet: &Packet<'_>) -> Option<String> {
    let question = Question {
        filter,
        packet,
        input: None,
    };
    Some(question.stopped(false)?.1)
}

/// A packet in a filter table.
#[derive(Clone, Copy)]
pub struct Question<'a> {
    /// The table.
    pub filter: &'a WholeTable,
    /// The packet.
    pub packet: &'a Packet<'a>,
    /// The interface that it came from, if it is known.
    pub input: Option<&'a str>,
}

impl Question<'_> {
    /// Returns the rule or policy that stops the packet, if nothing may accept it before.
    ///
    /// An unlucky packet is not chosen by any statistic. The first rule that would accept
    /// it by one is returned too.
    #[must_use]
    pub fn stopped(self, is_unlucky: bool) -> Option<(Option<String>, String)> {
        let mut walk = Walk {
            of: self,
            rules: 100_000,
            depth: 64,
            is_unlucky,
            chosen: None,
        };
        let by = walk.stopped()?;
        Some((walk.chosen, by))
    }
}

/// Returns true if a rule accepts or leads on by a statistic.
#[must_use]
pub fn has_choices(filter: &WholeTable) -> bool {
    let mut rules = filter.chains.iter().flat_map(|chain| &chain.rules);
    rules.any(chooses)
}

fn chooses(rule: &Rule) -> bool {
    let is_way_on = rule.way == Way::End(Verdict::Accept) || rule.way.chain().is_some();
    !rule.is_certain() && is_way_on
}

/// One walk through the rules. Beyond its limits nothing is reported.
struct Walk<'a> {
    of: Question<'a>,
    /// The rules that may still be visited.
    rules: u32,
    /// The depth of chains that is left.
    depth: u32,
    /// No statistic chooses the packet.
    is_unlucky: bool,
    /// The first rule that would have accepted it by a statistic.
    chosen: Option<String>,
}

enum Outcome {
    MayPass,
    Stopped(String),
    Back,
}

#[derive(Clone, Copy, PartialEq)]
enum Match {
    Yes,
    Maybe,
    No,
}

impl Walk<'_> {
    fn stopped(&mut self) -> Option<String> {
        let filter = self.of.filter;
        let forward = filter.chain("FORWARD")?;
        match self.visit(forward) {
            Outcome::Stopped(by) => Some(by),
            Outcome::MayPass => None,
            Outcome::Back => {
                let policy = filter.chains[forward].policy.as_deref();
                (policy == Some("DROP")).then(|| "its policy DROP".to_owned())
            }
        }
    }

    fn visit(&mut self, chain: usize) -> Outcome {
        let chain = &self.of.filter.chains[chain];
        let shown = |rule: &Rule| format!("`-A {} {}`", chain.name, rule.text);
        for rule in &chain.rules {
            self.rules = self.rules.saturating_sub(1);
            if self.rules == 0 || self.depth == 0 {
                return Outcome::MayPass;
            }
            let matches = self.of.meets(rule);
            let chain_of = rule.way.chain().map(|to| &self.of.filter.chains[to].name);
            let passes_by = self.of.packet.passes_by;
            if matches == Match::No || chain_of.is_some_and(|name| passes_by(name)) {
                continue;
            }
            if self.is_unlucky && chooses(rule) {
                self.chosen.get_or_insert_with(|| shown(rule));
                continue;
            }
            let outcome = match &rule.way {
                Way::End(Verdict::Accept) | Way::Destination(_) | Way::Named { .. } => {
                    return Outcome::MayPass;
                }
                Way::End(Verdict::Refuse) => Outcome::Stopped(shown(rule)),
                Way::Return => Outcome::Back,
                Way::Pass => continue,
                Way::Jump(to) | Way::Goto(to) => {
                    self.depth -= 1;
                    let outcome = self.visit(*to);
                    self.depth += 1;
                    outcome
                }
            };
            match (outcome, matches, &rule.way) {
                (Outcome::MayPass, _, _) => return Outcome::MayPass,
                (Outcome::Stopped(by), Match::Yes, _) => return Outcome::Stopped(by),
                (Outcome::Back, Match::Yes, Way::Return | Way::Goto(_)) => return Outcome::Back,
                _ => {}
            }
        }
        Outcome::Back
    }
}

impl Question<'_> {
    fn meets(self, rule: &Rule) -> Match {
        let start = match rule.is_certain() {
            true => Match::Yes,
            false => Match::Maybe,
        };
        let conditions = self.filter.conditions_of(rule);
        conditions.fold(start, |so_far, condition| {
            match (so_far, self.meets_one(condition)) {
                (Match::No, _) | (_, Match::No) => Match::No,
                (Match::Maybe, _) | (_, Match::Maybe) => Match::Maybe,
                _ => Match::Yes,
            }
        })
    }

    fn meets_one(self, condition: &Condition) -> Match {
        let packet = self.packet;
        let is = |met: bool| if met { Match::Yes } else { Match::No };
        match &condition.meaning {
            Meaning::Protocol(name) => packet
                .protocol
                .map_or(Match::Maybe, |known| is(known == name)),
            Meaning::Destination(network) => is(network.contains(&packet.to.address)),
            Meaning::Ports(ports) => packet
                .to
                .port
                .map_or(Match::Maybe, |port| is(ports.include(port))),
            Meaning::Packet => match condition.text.split_once("-i ") {
                Some((sign, name)) if sign.is_empty() || sign == "! " => {
                    let input = self.input.filter(|_| !name.ends_with('+'));
                    input.map_or(Match::Maybe, |input| is((input == name) == sign.is_empty()))
                }
                _ => state(&condition.text),
            },
            Meaning::Source(_) | Meaning::Other => Match::Maybe,
        }
    }
}

/// The packet is the first of its connection.
fn state(text: &str) -> Match {
    let (is_inverted, text) = match text.strip_prefix("! ") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let states = text
        .strip_prefix("--ctstate ")
        .or_else(|| text.strip_prefix("--state "));
    let Some(states) = states else {
        return Match::Maybe;
    };
    let has = |names: &[&str]| states.split(',').any(|state| names.contains(&state));
    match has(&["NEW", "DNAT"]) != is_inverted {
        true => Match::Yes,
        // SNAT is decided later.
        false if has(&["SNAT"]) => Match::Maybe,
        false => Match::No,
    }
}
