//! The steps of a chain as rules, and the names of chains.

use super::claim::{Block, Dimension};
use super::{Builder, Scope, Step, Style, To, Way};
use crate::netfilter::rule::{Connection, Matches, Rule, Target};
use crate::netfilter::{Ports, Protocol};

impl Builder<'_> {
    /// The rules in a chain with this scope; the protocol is `None` in the main one.
    pub(super) fn rules(
        &self,
        steps: &[Step],
        known: Scope,
        protocol: Option<Protocol>,
    ) -> Vec<Rule> {
        let rules = steps.iter().flat_map(|step| match &step.to {
            To::Claim(at) => self.claim_rules(*at, step.part, known, protocol),
            To::Chain {
                name,
                protocol: of_chain,
                returns,
            } => {
                let target = match returns {
                    true => Target::Jump(name.clone()),
                    false => Target::Goto(name.clone()),
                };
                let family = self.tree.family;
                let narrower = |part: Block, known: Block| (part != known).then_some(part);
                let network = |part: Block, known: Block| narrower(part, known)?.network(family);
                let traffic = Traffic {
                    protocol: *of_chain,
                    ports: match narrower(step.part.ports, known.ports) {
                        Some(part) => Ports::new(vec![part.ports()]),
                        None => Ports::default(),
                    },
                    destination: network(step.part.destination, known.destination),
                    source: network(step.part.source, known.source),
                };
                vec![self.rule(&traffic, &Matches::default(), target, protocol)]
            }
        });
        rules.collect()
    }

    fn claim_rules(
        &self,
        at: usize,
        part: Scope,
        known: Scope,
        protocol: Option<Protocol>,
    ) -> Vec<Rule> {
        let claim = &self.claims[at];
        let family = self.tree.family;
        let network = |dimension| {
            let claimed = claim.extent(dimension, family).next()?;
            let part = part.block(dimension);
            let block = if claimed.holds(part) { part } else { claimed };
            let narrower = (block != known.block(dimension)).then_some(block);
            narrower?.network(family)
        };
        let Some(ports) = self.ports_in(at, part) else {
            return Vec::new();
        };
        let rule = |ports: Ports| {
            let traffic = Traffic {
                protocol: claim.protocol,
                ports,
                destination: network(Dimension::Destination),
                source: network(Dimension::Source),
            };
            self.rule(&traffic, &claim.rest, claim.target.clone(), protocol)
        };
        let spelled = self.spelled(&ports, known.ports).into_iter();
        spelled.map(rule).collect()
    }

    fn rule(
        &self,
        traffic: &Traffic,
        rest: &Matches,
        target: Target,
        known: Option<Protocol>,
    ) -> Rule {
        let Traffic {
            protocol,
            ports,
            destination,
            source,
        } = traffic;
        let is_needed = known.is_none() || *ports != Ports::default();
        match self.tree.style {
            Style::Packet => Rule {
                protocol: is_needed.then_some(*protocol),
                ..Rule::to(target).matching(Matches {
                    source: *source,
                    destination: *destination,
                    destination_ports: ports.clone(),
                    ..rest.clone()
                })
            },
            Style::Connection => {
                let connection = Connection {
                    protocol: known.is_none().then_some(*protocol),
                    original_source: *source,
                    original_destination: *destination,
                    original_port: ports.ranges().first().copied(),
                    ..rest.connection.clone()
                };
                Rule::to(target).matching(Matches {
                    connection,
                    ..rest.clone()
                })
            }
        }
    }

    /// The name of the chain with a scope: `SET//pt81926` for the 4^6 ports from
    /// 8192, and a hash of the scope where it is about addresses too.
    pub(super) fn name(&mut self, scope: Scope, way: Way) -> String {
        let protocol = &way.protocol.as_str()[..1];
        let head = format!("{}//{}{protocol}", self.tree.set, self.tree.letter);
        let is_about_ports = scope
            == Scope {
                ports: scope.ports,
                ..Scope::all(self.tree.family)
            };
        if is_about_ports && way.group == 0 {
            return format!("{head}{}{}", scope.ports.first, scope.ports.depth());
        }
        let key = format!("{scope:?} {}", way.group);
        let mut salt = 0;
        loop {
            let name = head.clone() + &hashed(&format!("{key} {salt}"));
            if self.keys.get(&name).is_none_or(|known| *known == key) {
                self.keys.insert(name.clone(), key);
                return name;
            }
            salt += 1;
        }
    }
}

/// The traffic of one rule.
struct Traffic {
    protocol: Protocol,
    ports: Ports,
    destination: Option<ipnet::IpNet>,
    source: Option<ipnet::IpNet>,
}

/// Six letters that follow from the text (FNV-1a), the first of which is no digit.
fn hashed(text: &str) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.";
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
    let mut left = hash ^ hash >> 29;
    let radixes = [52, 64, 64, 64, 64, 64];
    let letter = |radix: u64| {
        let at = usize::try_from(left % radix).unwrap_or(0);
        left /= radix;
        char::from(LETTERS[at])
    };
    radixes.map(letter).iter().collect()
}
