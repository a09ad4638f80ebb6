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
    let forward = filter.chain("FORWARD")?;
    let mut budget = Budget {
        rules: 100_000,
        depth: 64,
    };
    match walk(filter, forward, packet, &mut budget) {
        Outcome::Stopped(by) => Some(by),
        Outcome::MayPass => None,
        Outcome::Back => {
            let policy = filter.chains[forward].policy.as_deref();
            (policy == Some("DROP")).then(|| "its policy DROP".to_owned())
        }
    }
}

/// The rules that may still be visited, and the depth of chains. Beyond it nothing is
/// reported.
struct Budget {
    rules: u32,
    depth: u32,
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

fn walk(filter: &WholeTable, chain: usize, packet: &Packet<'_>, budget: &mut Budget) -> Outcome {
    for rule in &filter.chains[chain].rules {
        budget.rules = budget.rules.saturating_sub(1);
        if budget.rules == 0 || budget.depth == 0 {
            return Outcome::MayPass;
        }
        let matches = meets(filter, rule, packet);
        let chain_of = rule.way.chain().map(|to| &filter.chains[to].name);
        if matches == Match::No || chain_of.is_some_and(|name| (packet.passes_by)(name)) {
            continue;
        }
        let outcome = match &rule.way {
            Way::End(Verdict::Accept) | Way::Destination(_) | Way::Named { .. } => {
                return Outcome::MayPass;
            }
            Way::End(Verdict::Refuse) => {
                Outcome::Stopped(format!("`-A {} {}`", filter.chains[chain].name, rule.text))
            }
            Way::Return => Outcome::Back,
            Way::Pass => continue,
            Way::Jump(to) | Way::Goto(to) => {
                budget.depth -= 1;
                let outcome = walk(filter, *to, packet, budget);
                budget.depth += 1;
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

fn meets(filter: &WholeTable, rule: &Rule, packet: &Packet<'_>) -> Match {
    let start = match rule.is_certain() {
        true => Match::Yes,
        false => Match::Maybe,
    };
    let conditions = filter.conditions_of(rule);
    conditions.fold(start, |so_far, condition| {
        match (so_far, meets_one(condition, packet)) {
            (Match::No, _) | (_, Match::No) => Match::No,
            (Match::Maybe, _) | (_, Match::Maybe) => Match::Maybe,
            _ => Match::Yes,
        }
    })
}

fn meets_one(condition: &Condition, packet: &Packet<'_>) -> Match {
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
        Meaning::Packet => state(&condition.text),
        Meaning::Source(_) | Meaning::Other => Match::Maybe,
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
