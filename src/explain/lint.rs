//! Known mistakes in chains that share out connections.

use std::collections::HashSet;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::Serialize;

use super::condition::{Condition, Meaning};
use super::follow::{Class, Course, Step};
use super::rule::{Rule, Way};
use super::{ExplainedChain, Explainer, Finding, forward, rewriting};
use crate::host::forwarding_sysctl;
use crate::netfilter::statistic::{Probability, Share, Statistic};
use crate::netfilter::{Endpoint, Ports};

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
pub(super) fn percent(share: f64) -> String {
    let text = format!("{:.1}", share * 100.0);
    format!("{} %", text.strip_suffix(".0").unwrap_or(&text))
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

/// A class of connections on its way from one chain on.
pub(super) struct OfClass<'a> {
    pub(super) explainer: &'a Explainer<'a>,
    pub(super) root: usize,
    class: &'a Class,
    pub(super) course: &'a Course,
}

impl OfClass<'_> {
    pub(super) fn rule(&self, step: &Step) -> &Rule {
        &self.explainer.table.chains[step.chain].rules[step.at]
    }

    pub(super) fn finding(
        &self,
        code: Code,
        (chain, at): (usize, usize),
        message: String,
        advice: &str,
    ) -> Finding {
        finding(self.explainer, code, (chain, at), message, advice)
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
            let statistic = self.rule(step).statistic;
            statistic == Statistic::Random(Probability::from_units(0))
                && step.arriving.share != Share::NONE
                && self.explainer.leads(self.rule(step))
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

    /// The destinations that are addresses, with the first rule that leads to each. Of a
    /// range its ends.
    fn backends(&self) -> Vec<(Endpoint, (usize, usize))> {
        let mut backends: Vec<(Endpoint, (usize, usize))> = Vec::new();
        let mut seen = HashSet::new();
        for arrival in &self.course.arrivals {
            let rule = &self.explainer.table.chains[arrival.chain].rules[arrival.at];
            let Way::Destination(to) = &rule.way else {
                continue;
            };
            for endpoint in rewriting::ends(to).into_iter().flatten() {
                if seen.insert(endpoint) {
                    backends.push((endpoint, (arrival.chain, arrival.at)));
                }
            }
        }
        backends.retain(|(endpoint, _)| !endpoint.address.is_loopback());
        backends
    }

    fn forward(&self) -> Option<Finding> {
        let filter = self.explainer.filter?;
        let own = &self.explainer.facts.own;
        let backends = self.backends();
        let elsewhere = || {
            let backends = backends.iter();
            backends.filter(|(endpoint, _)| !own.contains(&endpoint.address))
        };
        let protocol = self.protocol();
        let kept_port = rewriting::kept_port(self.explainer.table, self.class);
        let packet = |endpoint: &Endpoint| forward::Packet {
            protocol: protocol.as_deref(),
            to: Endpoint {
                port: endpoint.port.or(kept_port),
                ..*endpoint
            },
            passes_by: &|_| false,
        };
        let input = self.input();
        let ask = |packet: &forward::Packet<'_>, is_unlucky| {
            let question = forward::Question {
                filter,
                packet,
                input,
            };
            question.stopped(is_unlucky)
        };
        let blocked = elsewhere().filter_map(|(endpoint, place)| {
            let (_, by) = ask(&packet(endpoint), false)?;
            Some((endpoint, place, by))
        });
        let thinned = elsewhere().filter_map(|(endpoint, place)| {
            let (chosen, by) = ask(&packet(endpoint), true)?;
            let chosen = chosen?;
            let by = format!("{by}, unless the statistic of {chosen} chooses them too");
            Some((endpoint, place, by))
        });
        let mut found: Vec<_> = blocked.collect();
        if found.is_empty() && forward::has_choices(filter) {
            found.extend(thinned);
        }
        let (endpoint, place, by) = found.first()?;
        let others = match found.len() {
            1 => String::new(),
            2 => ", and those to another one,".to_owned(),
            all => format!(", and those to {} others,", all - 1),
        };
        let message =
            format!("connections to `{endpoint}`{others} are stopped in filter's FORWARD by {by}");
        Some(self.finding(
            Code::ForwardBlocks,
            **place,
            message,
            "accept them in FORWARD; a request for this program does it with `forward: true`",
        ))
    }

    /// The conditions that the connections meet.
    fn given(&self) -> impl Iterator<Item = &Condition> {
        let table = self.explainer.table;
        self.class
            .given()
            .map(|number| table.conditions.get(number))
    }

    fn protocol(&self) -> Option<String> {
        self.given().find_map(|given| match &given.meaning {
            Meaning::Protocol(name) => Some(name.clone()),
            _ => None,
        })
    }

    /// The interface that the connections come from, if there is only one.
    fn input(&self) -> Option<&str> {
        let mut names = self
            .given()
            .filter_map(|given| given.text.strip_prefix("-i "));
        names.find(|name| !name.ends_with('+'))
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

pub(super) fn place(step: &Step) -> (usize, usize) {
    (step.chain, step.at)
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
