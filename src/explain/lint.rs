//! Known mistakes in chains that share out connections.
//!
//! Shares alone do not show a mistake: `--every 2` on two lines is right for the weights
//! 2:1:1. So a pattern counts as a mistake only where no weights that a person would
//! choose give the same rules.

use std::collections::HashSet;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::Serialize;

use super::condition::{Condition, Meaning};
use super::follow::{Class, Course, Step};
use super::rule::{Rule, Way};
use super::{ExplainedChain, Explainer, Finding, forward};
use crate::host::forwarding_sysctl;
use crate::netfilter::statistic::{Probability, Share, Statistic};
use crate::netfilter::{Endpoint, Family, Ports};

/// The kinds of mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The same `--every` on each line.
    SameEvery,
    /// The same `--probability` on each line.
    SameProbability,
    /// Connections that get no destination.
    FallsThrough,
    /// A rule that can never match.
    Unreachable,
    /// A jump that comes after a rule that takes everything.
    ShadowedJump,
    /// `--packet` that gives turns in another order than that of the lines.
    PacketOutOfTurn,
    /// FORWARD stops the connections.
    ForwardBlocks,
    /// The host does not forward.
    ForwardingOff,
    /// A backend that is the balanced address itself.
    BackendIsHost,
}

impl Code {
    /// The code as it stands in results.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SameEvery => "same-every",
            Self::SameProbability => "same-probability",
            Self::FallsThrough => "falls-through",
            Self::Unreachable => "unreachable",
            Self::ShadowedJump => "shadowed-jump",
            Self::PacketOutOfTurn => "packet-out-of-turn",
            Self::ForwardBlocks => "forward-blocks",
            Self::ForwardingOff => "forwarding-off",
            Self::BackendIsHost => "backend-is-host",
        }
    }
}

/// A share in per cent, as people write it.
fn percent(share: f64) -> String {
    let text = format!("{:.1}", share * 100.0);
    format!("{} %", text.strip_suffix(".0").unwrap_or(&text))
}

/// The shares in words: `25 %, 18.8 %, 14.1 % and 10.5 %, and 31.6 % of the connections get no destination`.
fn figures(chain: &ExplainedChain) -> String {
    const MOST: usize = 6;
    let shares: Vec<String> = chain
        .shares
        .iter()
        .take(MOST)
        .map(|share| percent(share.share))
        .collect();
    let more = if chain.shares.len() > MOST {
        ", ..."
    } else {
        ""
    };
    let nobody = match chain.unmatched > 0.0 {
        true => format!(
            ", and {} of the connections get no destination",
            percent(chain.unmatched)
        ),
        false => String::new(),
    };
    format!("{}{more}{nobody}", shares.join(", "))
}

/// The mistakes in a chain, for one class of connections.
pub(super) fn of_class(
    explainer: &Explainer<'_>,
    root: usize,
    class: &Class,
    course: &Course,
    chain: &mut ExplainedChain,
) {
    let context = OfClass {
        explainer,
        root,
        class,
        course,
    };
    let mut findings = context.patterns(chain);
    findings.extend(context.falls_through(chain));
    findings.extend(context.never(chain));
    findings.extend(context.forward());
    findings.extend(context.forwarding_off());
    findings.extend(context.backend_is_host());
    chain.findings = findings;
}

struct OfClass<'a> {
    explainer: &'a Explainer<'a>,
    root: usize,
    class: &'a Class,
    course: &'a Course,
}

impl OfClass<'_> {
    fn rule(&self, step: &Step) -> &Rule {
        &self.explainer.table.chains[step.chain].rules[step.at]
    }

    fn finding(
        &self,
        code: Code,
        (chain, at): (usize, usize),
        message: String,
        advice: &str,
    ) -> Finding {
        finding(self.explainer, code, (chain, at), message, advice)
    }

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
    fn patterns(&self, explained: &ExplainedChain) -> Vec<Finding> {
        let mut chains: Vec<usize> = self.course.steps.iter().map(|step| step.chain).collect();
        chains.dedup();
        let patterns = chains.into_iter().filter_map(|chain| {
            let (choosing, last) = self.lines(chain);
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
            // With three lines, weights such as 3:2:4 give the same rules. With four,
            // 16:12:9:27 do, but for `--packet`, which a program chooses and a person numbers.
            Some(_) => lines == every as usize && lines >= 4 && is_numbered(&nth),
        };
        if !is_mistake {
            return None;
        }
        let message = format!(
            "each rule counts only the connections that the rules before it let pass, so `--every {every}` on {} lines \
             gives {}",
            nth.len(),
            figures(chain)
        );
        let numbers: Vec<String> = (2..=lines)
            .rev()
            .take(4)
            .map(|number| number.to_string())
            .collect();
        let more = if lines > 5 { ", ... down to 2" } else { "" };
        let advice = format!(
            "write `--every {}{more}` from line to line, `--packet 0` on each, and no statistic on the last",
            numbers.join("`, `--every ")
        )
        .replace("`, ...", "`, ...");
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
                Statistic::Random(chance) if self.rule(step).hashes.is_empty() => {
                    Some(chance.units())
                }
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
            figures(chain)
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

    fn falls_through(&self, chain: &ExplainedChain) -> Option<Finding> {
        if chain.unmatched <= 0.0 || chain.shares.is_empty() || self.is_caught() {
            return None;
        }
        let last = self.course.steps.iter().rev();
        let last = last
            .filter(|step| step.chain == self.root)
            .find(|step| self.explainer.leads(self.rule(step)))?;
        let message = format!(
            "{} of the connections that reach `{}` get no destination, and go where they were addressed to",
            percent(chain.unmatched),
            chain.chain
        );
        Some(self.finding(
            Code::FallsThrough,
            place(last),
            message,
            "leave the statistic out of the last rule, so that it takes the rest",
        ))
    }

    /// Returns true if later rules of each chain that leads here take the rest.
    fn is_caught(&self) -> bool {
        let referrers = &self.explainer.referrers[self.root];
        let is_caught = |(from, at): &(usize, usize)| {
            let rules = &self.explainer.table.chains[*from].rules;
            let is_jump = matches!(rules[*at].way, Way::Jump(_));
            let class = Class {
                conditions: rules[*at].conditions.clone(),
                context: self.class.conditions.clone(),
            };
            let takes = |later: usize| {
                let rule = &rules[later];
                rule.is_certain() && self.explainer.leads(rule)
            };
            let places = self.explainer.selection(&class).rules(*from);
            is_jump && places.into_iter().any(|later| later > *at && takes(later))
        };
        !referrers.is_empty() && referrers.iter().all(is_caught)
    }

    /// Rules of chance 0, and rules that come after one that takes everything.
    fn never(&self, chain: &ExplainedChain) -> Vec<Finding> {
        if chain.jumps.is_empty() && self.explainer.table.chains[self.root].policy.is_none() {
            return Vec::new();
        }
        let steps = self.course.steps.iter();
        let never = steps.filter(|step| {
            let is_impossible = step.taken.share == Share::NONE && step.arriving.share != Share::NONE;
            is_impossible && !self.rule(step).is_certain() && self.explainer.leads(self.rule(step))
                && matches!(self.rule(step).statistic, Statistic::Random(chance) if chance.units() == 0)
        });
        never
            .map(|step| {
                self.finding(
                    Code::Unreachable,
                    place(step),
                    "its chance is 0, so it never matches".to_owned(),
                    "give it a `--probability` above 0, or delete it",
                )
            })
            .collect()
    }

    /// The destinations that are addresses, with the first rule that leads to each.
    fn backends(&self) -> Vec<(Endpoint, (usize, usize))> {
        let mut backends: Vec<(Endpoint, (usize, usize))> = Vec::new();
        let mut seen = HashSet::new();
        for arrival in &self.course.arrivals {
            let rule = &self.explainer.table.chains[arrival.chain].rules[arrival.at];
            let Way::Destination(to) = &rule.way else {
                continue;
            };
            if let Some(endpoint) = Endpoint::parse(to) {
                if seen.insert(endpoint) {
                    backends.push((endpoint, (arrival.chain, arrival.at)));
                }
            }
        }
        let own = &self.explainer.facts.own;
        backends.retain(|(endpoint, _)| {
            !endpoint.address.is_loopback()
                && endpoint.address.is_ipv4() == (self.explainer.table.family == Family::Ipv4)
        });
        backends.retain(|(endpoint, _)| {
            !own.contains(&endpoint.address) || self.is_balanced_port(endpoint.port)
        });
        backends
    }

    fn forward(&self) -> Option<Finding> {
        let filter = self.explainer.filter?;
        let own = &self.explainer.facts.own;
        let backends = self.backends();
        let elsewhere = backends
            .iter()
            .filter(|(endpoint, _)| !own.contains(&endpoint.address));
        let protocol = self.protocol();
        let mut blocked = elsewhere.filter_map(|(endpoint, place)| {
            let packet = forward::Packet {
                protocol: protocol.as_deref(),
                to: *endpoint,
                passes_by: &|_| false,
            };
            forward::blocks(filter, &packet).map(|by| (endpoint, place, by))
        });
        let (endpoint, place, by) = blocked.next()?;
        let others = match blocked.count() {
            0 => String::new(),
            1 => ", and those to another one,".to_owned(),
            others => format!(", and those to {others} others,"),
        };
        let message =
            format!("connections to `{endpoint}`{others} are stopped in filter's FORWARD by {by}");
        Some(self.finding(
            Code::ForwardBlocks,
            *place,
            message,
            "accept them in FORWARD; a request for this program does it with `forward: true`",
        ))
    }

    fn protocol(&self) -> Option<String> {
        let numbers = self.class.conditions.iter().chain(&self.class.context);
        numbers
            .map(|number| &self.explainer.table.conditions.get(*number).meaning)
            .find_map(|meaning| match meaning {
                Meaning::Protocol(name) => Some(name.clone()),
                _ => None,
            })
    }

    fn forwarding_off(&self) -> Option<Finding> {
        let family = self.explainer.table.family;
        let facts = self.explainer.facts;
        if facts.forwarding.get(&family) != Some(&false) {
            return None;
        }
        let backends = self.backends();
        let (endpoint, place) = backends
            .iter()
            .find(|(endpoint, _)| !facts.own.contains(&endpoint.address))?;
        let setting = forwarding_sysctl(family);
        let message = format!(
            "{} forwarding is off ({setting} = 0), so nothing reaches `{endpoint}`",
            family.title()
        );
        let advice = format!(
            "`sysctl -w {setting}=1`; a request for this program does it with `ip_forward: true`"
        );
        Some(self.finding(Code::ForwardingOff, *place, message, &advice))
    }

    /// Backends with the balanced address and port: the connection stays on this host.
    fn backend_is_host(&self) -> Option<Finding> {
        let balanced = self.balanced_addresses();
        let own = &self.explainer.facts.own;
        let backends = self.backends();
        let is_itself = |endpoint: &Endpoint| {
            let is_ours = balanced.contains(&endpoint.address) || own.contains(&endpoint.address);
            is_ours && self.is_balanced_port(endpoint.port)
        };
        let (endpoint, place) = backends.iter().find(|(endpoint, _)| is_itself(endpoint))?;
        let message =
            format!("`{endpoint}` is the balanced address itself, so its share stays on this host");
        Some(self.finding(
            Code::BackendIsHost,
            *place,
            message,
            "name a server as backend; if this host is to serve a share, let the service listen on another port",
        ))
    }

    /// The conditions of the rules that lead to the chain, of each rule.
    fn ways_in(&self) -> Vec<Vec<&Condition>> {
        let table = self.explainer.table;
        let own = self
            .class
            .conditions
            .iter()
            .map(|number| table.conditions.get(*number));
        let own: Vec<&Condition> = own.collect();
        let referrers = &self.explainer.referrers[self.root];
        if referrers.is_empty() {
            return vec![own];
        }
        let way = |(chain, at): &(usize, usize)| {
            let rule = &table.chains[*chain].rules[*at];
            table
                .conditions_of(rule)
                .chain(own.iter().copied())
                .collect()
        };
        referrers.iter().map(way).collect()
    }

    fn balanced_addresses(&self) -> Vec<IpAddr> {
        let ways = self.ways_in();
        let addresses = ways
            .iter()
            .flatten()
            .filter_map(|condition| match condition.meaning {
                Meaning::Destination(network)
                    if network.prefix_len() == network.max_prefix_len() =>
                {
                    Some(network.addr())
                }
                _ => None,
            });
        addresses.collect()
    }

    /// Returns true if connections come in on the port of the backend.
    fn is_balanced_port(&self, port: Option<u16>) -> bool {
        let Some(port) = port else {
            return true;
        };
        let has = |ports: &Ports| ports.include(port);
        self.ways_in()
            .iter()
            .flatten()
            .any(|condition| match &condition.meaning {
                Meaning::Ports(ports) => has(ports),
                _ => false,
            })
    }
}

/// Returns true if `--packet` is the same on each line, or the number of the line.
fn is_numbered(nth: &[(u32, u32)]) -> bool {
    let packets = || nth.iter().map(|(_, packet)| *packet);
    let lines = packets().zip(0..);
    let mut steps = packets().zip(packets().skip(1));
    steps.all(|(one, next)| one == next) || lines.into_iter().all(|(packet, line)| packet == line)
}

/// Returns true if two chances mean the same to a person: 0.33 and 0.34.
fn is_near(one: u32, other: u32) -> bool {
    one.abs_diff(other) <= one / 20
}

fn place(step: &Step) -> (usize, usize) {
    (step.chain, step.at)
}

fn with_request(advice: &str) -> String {
    format!("{advice}; or let `iptables_balance plan` write the rules")
}

pub(super) fn finding(
    explainer: &Explainer<'_>,
    code: Code,
    (chain, at): (usize, usize),
    message: String,
    advice: &str,
) -> Finding {
    Finding {
        code,
        rule: explainer.rule_text(chain, at),
        line: Some(explainer.table.chains[chain].rules[at].line),
        message,
        advice: advice.to_owned(),
    }
}
