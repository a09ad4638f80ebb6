//! Dispatch: the chains that lead each connection to its balancer.
//!
//! The aims, and how they are reached:
//!
//! 1. **About log2(n) rules for each connection.** A chain branches into four by
//!    the port, then by the destination, then by the source: a trie with two bits
//!    to a level, in which empty levels are left out. Up to [`LIST`] rules are a
//!    list, which is shorter.
//! 2. **The first claim wins.** A claim that takes a whole block stands in the
//!    chain of that block, before or after the branches. Where an earlier and a
//!    later claim below meet it, it goes down into the branches.
//! 3. **Small changes.** The shape follows from the claims alone, and the name of a
//!    chain from its block. A claim that comes or goes changes the chains on its
//!    way only.
//! 4. **Nobody else's traffic.** Rules only narrow. A connection that no rule takes
//!    falls off the end of a chain, back into the built-in chain.
//!
//! nftables allows 16 chains on one way (`NFT_JUMP_STACK_SIZE`), the built-in one
//! included. [`DEPTH`] leaves six to the balancer; beyond it a chain is a list.

mod claim;
mod render;

use std::collections::{BTreeMap, HashMap};

pub use claim::Claim;
use claim::{Block, Dimension};

use crate::netfilter::rule::Rule;
use crate::netfilter::{Family, Ports, Protocol};

/// The most rules of a chain that does not branch.
const LIST: usize = 4;

/// The most chains on one way below the main one.
const DEPTH: usize = 8;

/// The matches that recognise traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Of the packet itself: before its destination is rewritten.
    Packet,
    /// Of the conntrack entry: the original destination, in both directions.
    Connection,
}

/// The place of a tree of chains.
#[derive(Clone, Copy, Debug)]
pub struct Tree<'a> {
    /// The name of the set.
    pub set: &'a str,
    /// The main chain.
    pub main: &'a str,
    /// The letter that the names of its other chains begin with.
    pub letter: char,
    /// The family of the claims.
    pub family: Family,
    /// The matches that recognise traffic.
    pub style: Style,
}

/// Chains by name.
pub type Chains = BTreeMap<String, Vec<Rule>>;

impl Tree<'_> {
    /// The chains that lead to the target of the first claim that takes a
    /// connection, and the protocol of the chains that have one.
    #[must_use]
    pub fn chains(&self, claims: &[Claim]) -> (Chains, BTreeMap<String, Protocol>) {
        let whole = Scope::all(self.family);
        let mut builder = Builder {
            tree: self,
            claims,
            chains: Chains::new(),
            protocols: BTreeMap::new(),
            keys: HashMap::new(),
        };
        let all: Vec<usize> = (0..claims.len()).collect();
        let rules = match builder.is_list(&all, whole) {
            true => builder.rules(&list(&all, whole), whole, None),
            false => {
                let by_protocol = Protocol::WORDS.iter().flat_map(|(_, protocol)| {
                    let of_protocol = |at: &usize| claims[*at].protocol == *protocol;
                    let members: Vec<usize> = all.iter().copied().filter(of_protocol).collect();
                    if members.is_empty() {
                        return Vec::new();
                    }
                    let way = Way {
                        protocol: *protocol,
                        depth: 0,
                        group: 0,
                    };
                    let steps = builder.child(Dimension::Port, whole, &members, way);
                    builder.rules(&steps, whole, None)
                });
                by_protocol.collect()
            }
        };
        builder.chains.insert(self.main.to_owned(), rules);
        (builder.chains, builder.protocols)
    }
}

/// The traffic that reaches a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Scope {
    ports: Block,
    destination: Block,
    source: Block,
}

impl Scope {
    fn all(family: Family) -> Self {
        Self {
            ports: Block::all(Dimension::Port, family),
            destination: Block::all(Dimension::Destination, family),
            source: Block::all(Dimension::Source, family),
        }
    }

    fn block(self, dimension: Dimension) -> Block {
        match dimension {
            Dimension::Port => self.ports,
            Dimension::Destination => self.destination,
            Dimension::Source => self.source,
        }
    }

    fn with(mut self, dimension: Dimension, block: Block) -> Self {
        match dimension {
            Dimension::Port => self.ports = block,
            Dimension::Destination => self.destination = block,
            Dimension::Source => self.source = block,
        }
        self
    }
}

/// The way to a chain, as far as its scope does not tell.
#[derive(Clone, Copy, Debug)]
struct Way {
    protocol: Protocol,
    /// The number of chains above it, below the main one.
    depth: usize,
    /// The turns into claims before and after branches, as bits.
    group: u64,
}

impl Way {
    fn into_group(self, is_after: bool) -> Self {
        Self {
            group: self.group << 2 | 2 | u64::from(is_after),
            ..self
        }
    }
}

/// A rule of a dispatch chain, for a part of the chain's traffic.
#[derive(Clone, Debug)]
struct Step {
    part: Scope,
    to: To,
}

#[derive(Clone, Debug)]
enum To {
    Claim(usize),
    Chain {
        name: String,
        protocol: Protocol,
        /// True if rules after it may take what the chain does not.
        returns: bool,
    },
}

fn list(members: &[usize], part: Scope) -> Vec<Step> {
    let step = |at: &usize| Step {
        part,
        to: To::Claim(*at),
    };
    members.iter().map(step).collect()
}

fn returning(mut steps: Vec<Step>) -> Vec<Step> {
    for step in &mut steps {
        if let To::Chain { returns, .. } = &mut step.to {
            *returns = true;
        }
    }
    steps
}

/// Claims that take a whole block, by their place in its chain.
#[derive(Default)]
struct Placed {
    before: Vec<usize>,
    after: Vec<usize>,
    /// The claims within the branches, in order.
    below: Vec<usize>,
}

struct Builder<'a> {
    tree: &'a Tree<'a>,
    claims: &'a [Claim],
    chains: Chains,
    protocols: BTreeMap<String, Protocol>,
    /// The chain that has a name, so that no two chains get the same.
    keys: HashMap<String, String>,
}

impl Builder<'_> {
    /// Returns true if these claims take few rules, one after the other.
    fn is_list(&self, members: &[usize], scope: Scope) -> bool {
        let mut left = LIST;
        members.iter().all(|at| {
            let parts = self
                .ports_in(*at, scope)
                .map_or(0, |ports| self.spelled(&ports, scope.ports).len());
            left.checked_sub(parts).map(|rest| left = rest).is_some()
        })
    }

    fn ports_in(&self, claim: usize, scope: Scope) -> Option<Ports> {
        self.claims[claim].ports.within(scope.ports.ports())
    }

    /// The ports of one rule each; every port where all of the chain's are meant.
    fn spelled(&self, ports: &Ports, known: Block) -> Vec<Ports> {
        let holds_all = ports
            .all_ranges()
            .iter()
            .any(|range| *range == known.ports());
        match self.tree.style {
            _ if holds_all => vec![Ports::default()],
            Style::Packet => ports.split_for_multiport(),
            Style::Connection => {
                let ranges = ports.all_ranges().iter();
                ranges.map(|range| Ports::new(vec![*range])).collect()
            }
        }
    }

    /// The rules of a part of the traffic in the chain above: one, or one that leads
    /// to a chain of its own.
    fn child(
        &mut self,
        dimension: Dimension,
        scope: Scope,
        members: &[usize],
        way: Way,
    ) -> Vec<Step> {
        let way = Way {
            depth: way.depth + 1,
            ..way
        };
        let (scope, steps) = self.inlined(dimension, scope, members, way);
        if let [only] = steps.as_slice() {
            let is_one_rule = match only.to {
                To::Claim(at) => self.ports_in(at, only.part).is_some_and(|ports| {
                    self.spelled(&ports, Block::all(Dimension::Port, self.tree.family))
                        .len()
                        == 1
                }),
                To::Chain { .. } => true,
            };
            if is_one_rule {
                return steps;
            }
        }
        let rules = self.rules(&steps, scope, Some(way.protocol));
        let name = self.name(scope, way);
        self.protocols.insert(name.clone(), way.protocol);
        self.chains.insert(name.clone(), rules);
        vec![Step {
            part: scope,
            to: To::Chain {
                name,
                protocol: way.protocol,
                returns: false,
            },
        }]
    }

    /// The rules of a part of the traffic, and the part that they are about.
    fn inlined(
        &mut self,
        dimension: Dimension,
        scope: Scope,
        members: &[usize],
        way: Way,
    ) -> (Scope, Vec<Step>) {
        if way.depth >= DEPTH || self.is_list(members, scope) {
            return (scope, list(members, scope));
        }
        let scope = self.narrowed(dimension, scope, members);
        (scope, self.steps(dimension, scope, members, way))
    }

    /// The smallest scope that has all claims, where none takes the whole.
    fn narrowed(&self, dimension: Dimension, scope: Scope, members: &[usize]) -> Scope {
        let block = scope.block(dimension);
        let parts = members
            .iter()
            .flat_map(|at| self.parts(*at, dimension, block));
        let hull = parts.reduce(|one, other| Block {
            first: one.first.min(other.first),
            last: one.last.max(other.last),
        });
        scope.with(dimension, hull.map_or(block, Block::hull))
    }

    fn parts(
        &self,
        claim: usize,
        dimension: Dimension,
        block: Block,
    ) -> impl Iterator<Item = Block> {
        let extent = self.claims[claim].extent(dimension, self.tree.family);
        let cut = move |part: Block| Block {
            first: part.first.max(block.first),
            last: part.last.min(block.last),
        };
        extent.filter(move |part| part.meets(block)).map(cut)
    }

    /// The rules of a chain: the claims of its whole block and its branches.
    fn steps(
        &mut self,
        dimension: Dimension,
        scope: Scope,
        members: &[usize],
        way: Way,
    ) -> Vec<Step> {
        let block = scope.block(dimension);
        let takes_all = |at: &usize| {
            let mut parts = self.parts(*at, dimension, block);
            parts.any(|part| part.holds(block))
        };
        let (covering, partial): (Vec<usize>, Vec<usize>) =
            members.iter().copied().partition(takes_all);
        if partial.is_empty() {
            return match dimension.next() {
                Some(_) if self.is_list(members, scope) => list(members, scope),
                Some(next) => self.steps(next, scope, members, way),
                None => list(members, scope),
            };
        }
        let (covering, partial) = self.with_wide(dimension, block, covering, partial);
        let placed = self.place(&covering, partial);
        if placed.below.is_empty() {
            return list(members, scope);
        }
        let mut branches: Vec<Step> = Vec::new();
        let in_quarter = |quarter: Block| {
            let meets = |at: &usize| self.parts(*at, dimension, quarter).next().is_some();
            let members = placed.below.iter().copied().filter(meets);
            (scope.with(dimension, quarter), members.collect())
        };
        let mut quarters: Vec<(Scope, Vec<usize>)> = block.quarters().map(in_quarter).into();
        quarters.retain(|(_, members)| !members.is_empty());
        // Nothing may come after the last branch; then it needs no chain.
        let last = placed.after.is_empty().then(|| quarters.len() - 1);
        for (at, (scope, members)) in quarters.iter().enumerate() {
            let steps = match Some(at) == last {
                true => self.inlined(dimension, *scope, members, way).1,
                false => self.child(dimension, *scope, members, way),
            };
            for step in steps {
                match branches.last_mut().and_then(|last| joined(last, &step)) {
                    Some(part) if dimension == Dimension::Port => {
                        if let Some(last) = branches.last_mut() {
                            last.part = part;
                        }
                    }
                    _ => branches.push(step),
                }
            }
        }
        if !placed.after.is_empty() {
            branches = returning(branches);
        }
        let before = self.group(dimension, scope, &placed.before, way.into_group(false));
        let after = self.group(dimension, scope, &placed.after, way.into_group(true));
        [returning(before), branches, after].concat()
    }

    /// Adds the claims that take a quarter of the block, or more, to those that take
    /// all of it, if these are few: one rule in this chain is less than one in each
    /// branch.
    fn with_wide(
        &self,
        dimension: Dimension,
        block: Block,
        mut covering: Vec<usize>,
        partial: Vec<usize>,
    ) -> (Vec<usize>, Vec<usize>) {
        let is_wide = |at: &usize| {
            let mut quarters = block.quarters().into_iter();
            quarters.any(|quarter| {
                let mut parts = self.parts(*at, dimension, block);
                parts.any(|part| part.holds(quarter))
            })
        };
        let (wide, narrow): (Vec<usize>, Vec<usize>) = partial.iter().copied().partition(is_wide);
        if covering.len() + wide.len() > LIST || block.depth() < 2 {
            return (covering, partial);
        }
        covering.extend(wide);
        covering.sort_unstable();
        (covering, narrow)
    }

    /// Claims that all take the whole block, in the order in which they win.
    fn group(
        &mut self,
        dimension: Dimension,
        scope: Scope,
        members: &[usize],
        way: Way,
    ) -> Vec<Step> {
        let stays = members.iter().any(|at| self.claims[*at].falls_through);
        match dimension.next() {
            Some(next) if !stays && !self.is_list(members, scope) && way.depth < DEPTH => {
                self.steps(next, scope, members, way)
            }
            _ => list(members, scope),
        }
    }

    /// Places the claims of a whole block before or after its branches, so that the
    /// first claim wins wherever two meet.
    fn place(&self, covering: &[usize], partial: Vec<usize>) -> Placed {
        let meet = |one: usize, other: usize| self.claims[one].meets(&self.claims[other]);
        let mut placed = Placed {
            below: partial,
            ..Placed::default()
        };
        'again: loop {
            placed.before.clear();
            placed.after.clear();
            for &claim in covering.iter().filter(|at| !placed.below.contains(at)) {
                let meeting = || placed.below.iter().filter(|at| meet(**at, claim));
                let is_beaten = meeting().any(|at| *at < claim)
                    || placed.after.iter().any(|at| meet(*at, claim));
                let beats = meeting().any(|at| *at > claim);
                let would_get = |at: &usize| *at < claim && self.claims[*at].falls_through;
                if !beats && !meeting().any(would_get) {
                    placed.after.push(claim);
                } else if !is_beaten {
                    placed.before.push(claim);
                } else {
                    placed.below.push(claim);
                    placed.below.sort_unstable();
                    continue 'again;
                }
            }
            return placed;
        }
    }
}

/// The scope of two rules as one, if they are of one claim and their ports touch.
fn joined(last: &Step, next: &Step) -> Option<Scope> {
    let (To::Claim(one), To::Claim(other)) = (&last.to, &next.to) else {
        return None;
    };
    let touches = last.part.ports.last + 1 == next.part.ports.first;
    let ports = Block {
        first: last.part.ports.first,
        last: next.part.ports.last,
    };
    (one == other && touches).then_some(Scope { ports, ..last.part })
}

#[cfg(test)]
mod tests;
