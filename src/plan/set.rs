//! The tables of a set: the chains of its balancers, and those that lead to them.
//!
//! | table | chain | holds | reached from |
//! |---|---|---|---|
//! | nat | `SET`, `SET//p...` | the way to the balancer | PREROUTING |
//! | nat | `SET//output`, `SET//o...` | the same for connections of this host | OUTPUT |
//! | nat | `SET//masq`, `SET//balanced`, `SET//m...` | the way to `SET/BALANCER/masq` | POSTROUTING |
//! | nat | `SET//filter` | nothing: a mark that filter has chains too | nowhere |
//! | filter | `SET//forward`, `SET//f...` | the way to `SET/BALANCER/forward` | FORWARD |
//! | filter | `SET//refuse`, `SET//r...` | the way to `SET/BALANCER/refuse` | INPUT, FORWARD |
//! | filter | `SET//local`, `SET//l...` | the same for connections of this host | OUTPUT |
//! | filter | `SET//all` | both, where both are in use | FORWARD |

use std::collections::BTreeSet;

use super::dispatch::{Claim, Style, Tree};
use super::{JumpPosition, PlannedJump, TablePlan, chain_of, choice, gateway, matches};
use crate::netfilter::rule::{Connection, ConnectionState, Matches, Rule, Target};
use crate::netfilter::{Family, networks_meet};
use crate::request::{Balancer, Destination, Pool, WhenEmpty};

/// A balancer with its pool of one family.
type Member<'a> = (&'a Balancer, &'a Pool);

/// The nat and the filter table of one family.
pub(super) fn tables(name: &str, members: &[Member]) -> (TablePlan, TablePlan) {
    let family = members
        .first()
        .map_or(Family::Ipv4, |(_, pool)| pool.family);
    // The connections of an empty pool that passes may be another balancer's.
    let (passing, claiming): (Vec<Member>, Vec<Member>) =
        members.iter().copied().partition(|(balancer, pool)| {
            pool.is_empty() && balancer.gateway.when_empty == WhenEmpty::Pass
        });
    let set = Set {
        name,
        family,
        jump: members.first().map(|(balancer, _)| balancer.jump.into()),
        ordered: [claiming.as_slice(), &passing].concat(),
        claiming,
    };
    let mut nat = TablePlan::default();
    for (balancer, pool) in members {
        choice(balancer, pool, &mut nat);
    }
    set.nat(&mut nat);
    (nat, set.filter())
}

/// The balancers of one family.
struct Set<'a> {
    name: &'a str,
    family: Family,
    jump: Option<JumpPosition>,
    /// The balancers that take connections, in the order of the request.
    claiming: Vec<Member<'a>>,
    /// The same, and then those whose connections pass.
    ordered: Vec<Member<'a>>,
}

impl Set<'_> {
    fn nat(&self, part: &mut TablePlan) {
        let place = self.jump.unwrap_or(JumpPosition::End);
        let claims = self.claims(|member| from_outside(member, None));
        self.grow(self.name, 'p', &claims, part);
        let main = Target::Jump(self.name.to_owned());
        part.jump("PREROUTING", place, Rule::to(main));
        let local = |(balancer, _): &Member| balancer.gateway.local_traffic;
        if self.claiming.iter().any(local) {
            let claims = self.claims(|member| match local(&member) {
                true => from_here(member, None),
                false => Vec::new(),
            });
            let main = chain_of(self.name, "/output");
            self.grow(&main, 'o', &claims, part);
            part.jump("OUTPUT", place, Rule::to(Target::Jump(main)));
        }
        self.masquerade(part);
    }

    /// The connections of every balancer that rewrites their source, and then, for
    /// each interface, everything that leaves there.
    fn masquerade(&self, part: &mut TablePlan) {
        let mut everything = Vec::new();
        let mut interfaces = BTreeSet::new();
        for (balancer, pool) in &self.ordered {
            let Some(masquerade) = &balancer.gateway.masquerade else {
                continue;
            };
            let target = gateway::rewriting(masquerade, self.family);
            let leaving = |rule: Rule| {
                let connection = rule.matches.map(|matches| matches.connection);
                Rule::to(rule.target).matching(Matches {
                    out_interface: masquerade.out_interface.clone(),
                    connection: connection.unwrap_or_default(),
                    ..Matches::default()
                })
            };
            if !masquerade.all {
                let rules = gateway::answered_by_us(pool, &target);
                let rules = rules.into_iter().map(leaving).collect();
                part.chains.insert(chain_of(&balancer.chain, "masq"), rules);
            } else if interfaces.insert(&masquerade.out_interface) {
                everything.push(leaving(Rule::to(target)));
            }
        }
        let is_on = |balancer: &Balancer| {
            let masquerade = balancer.gateway.masquerade.as_ref();
            masquerade.is_some_and(|masquerade| !masquerade.all)
        };
        let claims = self.translated("masq", is_on, shares_backends);
        let main = chain_of(self.name, "/masq");
        let translated = translated();
        match (claims.is_empty(), everything.is_empty()) {
            (true, true) => return,
            (false, true) => {
                self.grow_by_connection(&main, 'm', &claims, part);
                let jump = Rule::to(Target::Jump(main)).matching(translated);
                return part.jump("POSTROUTING", JumpPosition::End, jump);
            }
            (true, false) => {}
            (false, false) => {
                let balanced = chain_of(self.name, "/balanced");
                self.grow_by_connection(&balanced, 'm', &claims, part);
                let jump = Rule::to(Target::Jump(balanced)).matching(translated);
                everything.insert(0, jump);
            }
        }
        part.chains.insert(main.clone(), everything);
        part.jump(
            "POSTROUTING",
            JumpPosition::End,
            Rule::to(Target::Jump(main)),
        );
    }

    fn filter(&self) -> TablePlan {
        let mut part = TablePlan::default();
        let forward = self.forward(&mut part);
        let (refuse, local) = self.refuse(&mut part);
        let untouched = || matches::untouched(Matches::default());
        let jump =
            |chain: &str, matches| Rule::to(Target::Jump(chain.to_owned())).matching(matches);
        if let Some(refuse) = &refuse {
            part.jump("INPUT", JumpPosition::Head, jump(refuse, untouched()));
        }
        if let Some(local) = &local {
            part.jump("OUTPUT", JumpPosition::Head, jump(local, untouched()));
        }
        let passes = |(balancer, _): &Member| balancer.destination != Destination::Local;
        let refuse = refuse.filter(|_| self.refusing().any(|member| passes(&member)));
        match (forward, refuse) {
            (None, None) => {}
            (None, Some(refuse)) => {
                part.jump("FORWARD", JumpPosition::Head, jump(&refuse, untouched()));
            }
            (Some(forward), None) => {
                let rule = jump(&forward, translated());
                part.jump("FORWARD", JumpPosition::BeforeRefusals, rule);
            }
            (Some(forward), Some(refuse)) => {
                let all = chain_of(self.name, "/all");
                let rules = vec![jump(&forward, translated()), jump(&refuse, untouched())];
                part.chains.insert(all.clone(), rules);
                let rule = jump(&all, Matches::default());
                part.jump("FORWARD", JumpPosition::BeforeRefusals, rule);
            }
        }
        part
    }

    /// Returns the main chain of the connections that are accepted, if any are.
    fn forward(&self, part: &mut TablePlan) -> Option<String> {
        for (balancer, pool) in &self.ordered {
            if balancer.gateway.forward {
                let chain = chain_of(&balancer.chain, "forward");
                part.chains.insert(chain, gateway::accepting(pool));
            }
        }
        let is_on = |balancer: &Balancer| balancer.gateway.forward;
        let claims = self.translated("forward", is_on, |_, _| true);
        let main = chain_of(self.name, "/forward");
        if claims.is_empty() {
            return None;
        }
        self.grow_by_connection(&main, 'f', &claims, part);
        Some(main)
    }

    /// Returns the main chains of the connections that are refused, if any are: those
    /// from elsewhere, and those of this host.
    fn refuse(&self, part: &mut TablePlan) -> (Option<String>, Option<String>) {
        for (balancer, _) in self.refusing() {
            if let Some(rule) = gateway::refusal(balancer, self.family) {
                let chain = chain_of(&balancer.chain, "refuse");
                part.protocols.insert(chain.clone(), balancer.protocol);
                part.chains.insert(chain, vec![rule]);
            }
        }
        let outside = self.refusing().flat_map(|member| {
            let mut claims = from_outside(member, Some("refuse"));
            // Connections of this host to itself arrive on `lo`, and are not balanced.
            for claim in &mut claims {
                let is_open = claim.rest.in_interface.is_none();
                claim.rest.not_in_interface = is_open.then(|| "lo".to_owned());
            }
            claims
        });
        let local = |(balancer, _): &Member| balancer.gateway.local_traffic;
        let here = self.refusing().filter(local);
        let here = here.flat_map(|member| from_here(member, Some("refuse")));
        let mut grown = |id: &str, letter, claims: Vec<Claim>| {
            let main = chain_of(self.name, id);
            if claims.is_empty() {
                return None;
            }
            self.grow(&main, letter, &claims, part);
            Some(main)
        };
        (
            grown("/refuse", 'r', outside.collect()),
            grown("/local", 'l', here.collect()),
        )
    }

    /// The empty pools whose connections are refused.
    fn refusing(&self) -> impl Iterator<Item = Member<'_>> {
        let claiming = self.claiming.iter().copied();
        claiming.filter(|(_, pool)| pool.is_empty())
    }

    fn claims<'a>(&'a self, claims: impl Fn(Member<'a>) -> Vec<Claim>) -> Vec<Claim> {
        self.claiming
            .iter()
            .flat_map(|member| claims(*member))
            .collect()
    }

    /// The claims of the balancers that use a feature of connections after DNAT. The
    /// interface that a connection came in by is not known any more, so that a
    /// connection may meet the claims of several; each one's chain takes only what
    /// its backends answer. The connections of a balancer that does not use the
    /// feature return before a later one's chain could take them.
    fn translated(
        &self,
        chain: &str,
        is_on: impl Fn(&Balancer) -> bool,
        may_take: impl Fn(&Pool, &Pool) -> bool,
    ) -> Vec<Claim> {
        let of_member = |(balancer, pool): &Member| {
            let target = Target::Jump(chain_of(&balancer.chain, chain));
            after_translation(balancer, pool.family, &target)
        };
        let claims: Vec<(Member, Vec<Claim>)> = self
            .ordered
            .iter()
            .map(|member| (*member, of_member(member)))
            .collect();
        let mut found = Vec::new();
        for (at, ((balancer, pool), own)) in claims.iter().enumerate() {
            if is_on(balancer) {
                found.extend(own.iter().cloned());
                continue;
            }
            let later = claims[at + 1..].iter();
            let mut taking =
                later
                    .filter(|((other, _), _)| is_on(other))
                    .filter(|((_, others), theirs)| {
                        let meets = |claim: &Claim| theirs.iter().any(|other| other.meets(claim));
                        may_take(pool, others) && own.iter().any(meets)
                    });
            if taking.next().is_some() {
                found.extend(own.iter().flat_map(|claim| stops(claim, pool)));
            }
        }
        found
    }

    /// Adds the tree of these claims.
    fn grow(&self, main: &str, letter: char, claims: &[Claim], part: &mut TablePlan) {
        let (chains, protocols) = self.tree(main, letter, Style::Packet).chains(claims);
        part.chains.extend(chains);
        part.protocols.extend(protocols);
    }

    /// The same by the original destination. An ICMP error about a connection comes
    /// along too, so these chains have no protocol.
    fn grow_by_connection(&self, main: &str, letter: char, claims: &[Claim], part: &mut TablePlan) {
        let (chains, _) = self.tree(main, letter, Style::Connection).chains(claims);
        part.chains.extend(chains);
    }

    fn tree<'b>(&'b self, main: &'b str, letter: char, style: Style) -> Tree<'b> {
        Tree {
            set: self.name,
            main,
            letter,
            family: self.family,
            style,
        }
    }
}

impl TablePlan {
    fn jump(&mut self, chain: &'static str, place: JumpPosition, rule: Rule) {
        self.jumps.push(PlannedJump { chain, rule, place });
    }
}

/// The claims of a balancer on connections from elsewhere.
fn from_outside((balancer, pool): Member, id: Option<&str>) -> Vec<Claim> {
    let rest = Matches {
        in_interface: balancer.in_interface.clone(),
        to_local: balancer.destination == Destination::Local,
        ..Matches::default()
    };
    let target = match id {
        Some(id) => Target::Goto(chain_of(&balancer.chain, id)),
        None => Target::Goto(balancer.chain.clone()),
    };
    claims(balancer, pool.family, &rest, &target)
}

/// The same on connections of this host, see [`matches::from_here`].
fn from_here(member: Member, id: Option<&str>) -> Vec<Claim> {
    let (_, pool) = member;
    let mut claims = from_outside(member, id);
    for claim in &mut claims {
        claim.rest.in_interface = None;
        let is_open = claim.destination.is_none();
        claim.rest.not_destination = is_open.then_some(matches::loopback(pool.family));
    }
    claims
}

/// The same on connections after DNAT.
fn after_translation(balancer: &Balancer, family: Family, target: &Target) -> Vec<Claim> {
    claims(balancer, family, &Matches::default(), target)
}

fn claims(balancer: &Balancer, family: Family, rest: &Matches, target: &Target) -> Vec<Claim> {
    let claim = |(source, destination)| Claim {
        protocol: balancer.protocol,
        ports: balancer.destination_ports.clone(),
        source,
        destination,
        rest: rest.clone(),
        target: target.clone(),
        falls_through: false,
    };
    matches::pairs(balancer, family)
        .into_iter()
        .map(claim)
        .collect()
}

/// Rules by which the connections of a pool return.
fn stops<'a>(claim: &'a Claim, pool: &Pool) -> impl Iterator<Item = Claim> + 'a {
    let networks = gateway::networks(pool).into_iter();
    networks.map(|network| Claim {
        rest: Connection {
            reply_source: Some(network),
            ..Connection::default()
        }
        .into(),
        target: Target::Jump("RETURN".to_owned()),
        falls_through: true,
        ..claim.clone()
    })
}

/// Returns true if a backend of the one pool is in the networks of the other.
fn shares_backends(one: &Pool, other: &Pool) -> bool {
    let others = gateway::networks(other);
    let meets = |network| {
        others
            .iter()
            .any(|other| networks_meet(Some(network), Some(*other)))
    };
    gateway::networks(one).into_iter().any(meets)
}

fn translated() -> Matches {
    Connection {
        state: Some(ConnectionState::Translated),
        ..Connection::default()
    }
    .into()
}
