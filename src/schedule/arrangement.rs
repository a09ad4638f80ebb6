//! Backends into chains: one, or a tree of them.
//!
//! Through one chain a connection visits half of the rules on average. A tree
//! needs the logarithm: each chain sends a part of its connections to another
//! chain, and goes on with the rest.
//!
//! - **In turn**, backends of equal weight are dealt like cards: of an even
//!   number every second one goes to the other chain, so the first connection
//!   gets the first backend, the second the second, and so on. Of other numbers
//!   it is every third, or fifth, or only the first, which is served in the
//!   chain itself. Unequal weights are first divided among classes of equal
//!   weight, each of which is then a pool of equals.
//! - **By chance**, a backend's position follows from its own address and port:
//!   at each branching the next two bits of their hash decide. So a backend
//!   that joins, leaves or changes its weight changes the few rules of each
//!   branching on its way, and nothing else. A backend with an eighth of a
//!   chain's weight or more is served in the chain itself, so that large shares
//!   are never deep.
//! - **By a hash** it is the same tree, but without exceptions for large shares, see
//!   [`super::hashes`].

use std::collections::BTreeMap;
use std::sync::Arc;

use super::chances::{Pool, Split};
use super::digits::{by_hash, first_difference, id, last_group};
use super::turns;
use crate::netfilter::bpf::HashMatch;
use crate::netfilter::flow::Flow;
use crate::netfilter::statistic::{Probability, Share, Statistic};

/// The properties of a backend that decide about its position and share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// A number of its own, that stays the same; of it 36 bits are used for positions.
    pub hash: u64,
    /// Its weight.
    pub weight: u32,
}

/// Chains with the part that each rule takes, the main chain first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrangement {
    /// The chains. Never empty. Each but the first is reached from another.
    pub chains: Vec<Node>,
}

impl Arrangement {
    /// A main chain without branches.
    #[must_use]
    pub fn empty() -> Self {
        let main = Node {
            id: String::new(),
            branches: Vec::new(),
        };
        Self { chains: vec![main] }
    }
}

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The name after `NAME/`, at most 7 letters; empty for the main chain.
    pub id: String,
    /// Its rules. The last one takes whatever reaches it.
    pub branches: Vec<Branch>,
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Branch {
    /// The part of the connections reaching it that the rule takes, by turns or by
    /// chance.
    pub takes: Statistic,
    /// The hashes that decide, all of which must match.
    pub hashes: Vec<HashMatch>,
    /// The target of the rule.
    pub to: To,
}

/// The target of a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// To the backend at that place of the list.
    Backend(usize),
    /// On with the chain at that place.
    Chain(usize),
}

/// The result of an arrangement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arranged {
    /// An arrangement within the limits.
    Fits(Arc<Arrangement>),
    /// In turn it would take more rules than [`rules_max`], or turns than
    /// `--every` can count.
    TooManyRules,
    /// The share of the backend at that place is too small for the unit of the
    /// match.
    TooSmall(usize),
}

impl Arranged {
    /// Of two the one in which a connection visits fewer rules, the first if
    /// they are equal; if only one fits, that one.
    #[must_use]
    pub fn or_shorter(self, other: impl FnOnce() -> Self) -> Self {
        match (self, other()) {
            (Self::Fits(first), Self::Fits(other)) if other.visits() < first.visits() => {
                Self::Fits(other)
            }
            (first @ Self::Fits(_), _) => first,
            (_, other) => other,
        }
    }
}

/// The most rules that may be spent on a pool of that many backends in turn.
/// More would cost every new connection more than a round that is a little
/// less exact would cost anybody: eight for each backend, and 32 for small
/// pools with large weights.
#[must_use]
pub fn rules_max(backends: usize) -> usize {
    8 * backends + 32
}

/// One chain, in turn. Backends without weight have no rule; not all may be
/// without.
#[must_use]
pub fn flat_in_turn(backends: &[Backend]) -> Arranged {
    let weights: Vec<u64> = backends
        .iter()
        .map(|backend| u64::from(backend.weight))
        .collect();
    let Some(pieces) = turns::nth(&weights, turns::EFFORT) else {
        return Arranged::TooManyRules;
    };
    let mut builder = TreeBuilder::new();
    for piece in pieces {
        builder.add(MAIN, piece.takes, To::Backend(piece.part));
    }
    builder.in_turn(backends)
}

/// One chain, by chance.
#[must_use]
pub fn flat_by_chance(backends: &[Backend]) -> Arranged {
    let mut builder = TreeBuilder::new();
    let listed = with_weight(backends);
    let pool = Pool::all(sum(&listed, backends), Probability::BITS);
    builder.share_out(MAIN, &listed, backends, pool);
    builder.independent()
}

/// A tree of chains, in turn.
#[must_use]
pub fn tree_in_turn(backends: &[Backend]) -> Arranged {
    let mut classes: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for at in with_weight(backends) {
        classes.entry(backends[at].weight).or_default().push(at);
    }
    let classes: Vec<Class> = classes
        .into_iter()
        .rev()
        .map(|(weight, members)| Class { weight, members })
        .collect();
    let mut builder = TreeBuilder::new();
    let effort = turns::EFFORT / classes.len().max(1);
    match builder.deal_classes(MAIN, classes, effort) {
        Some(()) => builder.in_turn(backends),
        None => Arranged::TooManyRules,
    }
}

/// A tree of chains, by chance.
#[must_use]
pub fn tree_by_chance(backends: &[Backend]) -> Arranged {
    let places = by_hash(backends);
    let mut builder = TreeBuilder::new();
    let pool = Pool::all(sum(&places, backends), Probability::BITS);
    builder.branch_out(MAIN, places, backends, pool, 0);
    builder.independent()
}

pub(super) fn with_weight(backends: &[Backend]) -> Vec<usize> {
    (0..backends.len())
        .filter(|at| backends[*at].weight > 0)
        .collect()
}

pub(super) fn sum(places: &[usize], backends: &[Backend]) -> u64 {
    places
        .iter()
        .map(|at| u64::from(backends[*at].weight))
        .sum()
}

impl Arrangement {
    /// The sum over all rules of the share that visits them, in units of
    /// 2^-64: how many rules a connection visits on average.
    #[must_use]
    pub fn visits(&self) -> u128 {
        let mut visits = 0;
        self.follow(|_, reaching, _| visits += reaching.in_64_bits());
        visits
    }

    /// The share of each of so many backends.
    #[must_use]
    pub fn shares(&self, backends: usize) -> Vec<Share> {
        let mut shares = vec![Share::NONE; backends];
        self.follow(|branch, _, taken| {
            if let To::Backend(at) = branch.to {
                shares[at] = shares[at].and(taken);
            }
        });
        shares
    }

    /// Calls `see` for each branch, with the share that reaches it and the
    /// share that it takes.
    fn follow(&self, mut see: impl FnMut(&Branch, Share, Share)) {
        let mut reaching = vec![Flow::default(); self.chains.len()];
        reaching[MAIN] = Flow::all();
        // A chain is always made after the first that jumps to it.
        for at in 0..self.chains.len() {
            let mut left = std::mem::take(&mut reaching[at]);
            for branch in &self.chains[at].branches {
                let share = left.share();
                let taken = left.take(branch.takes, &branch.hashes);
                see(branch, share, taken.share());
                if let To::Chain(next) = branch.to {
                    reaching[next].join(taken);
                }
            }
        }
    }

    fn rules(&self) -> usize {
        self.chains.iter().map(|chain| chain.branches.len()).sum()
    }
}

/// Backends of equal weight, as listed.
struct Class {
    weight: u32,
    members: Vec<usize>,
}

impl Class {
    fn total(&self) -> u64 {
        u64::from(self.weight) * self.members.len() as u64
    }
}

/// The place of the main chain.
pub(super) const MAIN: usize = 0;

/// An arrangement in the making.
pub(super) struct TreeBuilder {
    chains: Vec<Node>,
    /// A backend whose share was lost to rounding.
    lost: Option<usize>,
    deals: Deals,
}

/// Divisions of equal backends among chains, with the shortest way for a
/// connection.
#[derive(Default)]
struct Deals {
    /// By the number of equals: the number that goes to another chain first,
    /// and the cost of a whole round, in visits of a rule.
    best: Vec<(usize, u64)>,
    /// By number: a prime that divides it.
    primes: Vec<usize>,
}

impl Deals {
    /// The number of `count` equals, at least 2, that go to another chain.
    ///
    /// All `count` connections of a round visit the rule that sends them on,
    /// and it can send any number that divides `count`. A single one is served
    /// in the chain itself and visits nothing more.
    fn share(&mut self, count: usize) -> usize {
        if self.primes.len() <= count {
            self.primes = primes(count);
        }
        let mut divisors = Vec::new();
        for count in self.best.len()..=count {
            divide(count, &self.primes, &mut divisors);
            self.best.push(self.least(count, &divisors));
        }
        self.best[count].0
    }

    fn least(&self, count: usize, divisors: &[usize]) -> (usize, u64) {
        // As measured: a chain that was not visited lately costs about as much
        // as three rules in the one that is being visited.
        const CHAIN: u64 = 3;
        let elsewhere = |share: usize| match share {
            1 => 0,
            more => self.best[more].1 + CHAIN * more as u64,
        };
        let cost = |share: usize| {
            (
                share,
                count as u64 + elsewhere(share) + self.best[count - share].1,
            )
        };
        // Of equals the one nearest to all, or to nothing; but a single one last.
        let rank = |share: usize| (share == 1, share.min(count / share), share * share <= count);
        let shares = divisors.iter().copied().filter(|share| *share < count);
        shares
            .map(cost)
            .min_by_key(|(share, cost)| (*cost, rank(*share)))
            .unwrap_or((count, count as u64))
    }
}

/// For each number up to `last` a prime that divides it: the largest, so that
/// it is the sieve's last word.
fn primes(last: usize) -> Vec<usize> {
    let mut primes: Vec<usize> = (0..=last).collect();
    for number in 2..=last {
        if primes[number] == number {
            let multiples = (2 * number..=last).step_by(number);
            multiples.for_each(|multiple| primes[multiple] = number);
        }
    }
    primes
}

/// All divisors of `count`, in no order.
fn divide(count: usize, primes: &[usize], divisors: &mut Vec<usize>) {
    divisors.clear();
    divisors.push(1);
    let mut rest = count;
    while rest > 1 {
        let prime = primes[rest];
        let known = divisors.len();
        let mut power = 1;
        while rest % prime == 0 {
            (rest, power) = (rest / prime, power * prime);
            divisors.extend_from_within(..known);
            let from = divisors.len() - known;
            divisors[from..].iter_mut().for_each(|one| *one *= power);
        }
    }
}

impl TreeBuilder {
    pub(super) fn new() -> Self {
        let main = Node {
            id: String::new(),
            branches: Vec::new(),
        };
        Self {
            chains: vec![main],
            lost: None,
            deals: Deals::default(),
        }
    }

    pub(super) fn chain(&mut self, id: String) -> usize {
        self.chains.push(Node {
            id,
            branches: Vec::new(),
        });
        self.chains.len() - 1
    }

    /// Numbered in the order in which they are made.
    fn next_chain(&mut self) -> usize {
        self.chain((self.chains.len() - 1).to_string())
    }

    fn add(&mut self, chain: usize, takes: Statistic, to: To) {
        self.chains[chain].branches.push(Branch {
            takes,
            hashes: Vec::new(),
            to,
        });
    }

    /// Adds a rule that takes everything with these hashes.
    pub(super) fn add_hashed(&mut self, chain: usize, hashes: Vec<HashMatch>, to: To) {
        self.chains[chain].branches.push(Branch {
            takes: Statistic::Always,
            hashes,
            to,
        });
    }

    /// Notes who has lost its share to rounding, or whose loss it would be.
    pub(super) fn check(&mut self, split: Split, witness: usize) {
        if split.loses_a_part() {
            self.lost.get_or_insert(witness);
        }
    }

    fn in_turn(self, backends: &[Backend]) -> Arranged {
        let arrangement = Arrangement {
            chains: self.chains,
        };
        // In a tree there is a rule for each branching too.
        match arrangement.rules() > rules_max(2 * backends.len()) {
            true => Arranged::TooManyRules,
            false => Arranged::Fits(arrangement.into()),
        }
    }

    pub(super) fn independent(self) -> Arranged {
        match self.lost {
            Some(backend) => Arranged::TooSmall(backend),
            None => Arranged::Fits(Arc::new(Arrangement {
                chains: self.chains,
            })),
        }
    }

    // --- in turn ------------------------------------------------------------

    /// Deals equals: every n-th goes to another chain, and the rest stays in
    /// this one.
    fn deal(&mut self, chain: usize, mut members: Vec<usize>) {
        while members.len() > 1 {
            let every = members.len() / self.deals.share(members.len());
            let (mut one, mut others) = (Vec::new(), Vec::with_capacity(members.len()));
            for round in members.chunks(every) {
                one.push(round[0]);
                others.extend_from_slice(&round[1..]);
            }
            let takes = Statistic::Nth {
                every: u32::try_from(every).unwrap_or(u32::MAX),
                packet: 0,
            };
            let to = self.dealt(one);
            self.add(chain, takes, to);
            members = others;
        }
        if let [last] = members[..] {
            self.add(chain, Statistic::Always, To::Backend(last));
        }
    }

    /// The target for these equals: the backend, or a chain of their own.
    fn dealt(&mut self, members: Vec<usize>) -> To {
        if let [only] = members[..] {
            return To::Backend(only);
        }
        let chain = self.next_chain();
        self.deal(chain, members);
        To::Chain(chain)
    }

    /// Shares out among classes, a few at a time; `None` when the turns cannot
    /// be counted.
    fn deal_classes(&mut self, chain: usize, mut classes: Vec<Class>, effort: usize) -> Option<()> {
        const AT_ONCE: usize = 6;
        if classes.len() == 1 {
            self.deal(
                chain,
                classes.pop().map(|class| class.members).unwrap_or_default(),
            );
            return Some(());
        }
        let mut groups: Vec<Vec<Class>> = if classes.len() <= AT_ONCE {
            classes.into_iter().map(|class| vec![class]).collect()
        } else {
            let half = classes.split_off(classes.len() / 2);
            vec![classes, half]
        };
        let totals: Vec<u64> = groups
            .iter()
            .map(|group| group.iter().map(Class::total).sum())
            .collect();
        let pieces = turns::nth(&totals, effort)?;
        let mut places: Vec<Option<To>> = vec![None; groups.len()];
        let last = pieces.len() - 1;
        for (at, piece) in pieces.iter().enumerate() {
            let group = std::mem::take(&mut groups[piece.part]);
            let to = match places[piece.part] {
                Some(to) => to,
                // The last group goes on in the same chain.
                None if at == last => return self.deal_classes(chain, group, effort),
                None => self.dealt_classes(group, effort)?,
            };
            places[piece.part] = Some(to);
            self.add(chain, piece.takes, to);
        }
        Some(())
    }

    fn dealt_classes(&mut self, mut classes: Vec<Class>, effort: usize) -> Option<To> {
        if classes.len() == 1 {
            return classes.pop().map(|class| self.dealt(class.members));
        }
        let chain = self.next_chain();
        self.deal_classes(chain, classes, effort)?;
        Some(To::Chain(chain))
    }

    // --- by chance ----------------------------------------------------------

    /// Shares out one after the other; returns the rest.
    fn share_out(
        &mut self,
        chain: usize,
        places: &[usize],
        backends: &[Backend],
        mut pool: Pool,
    ) -> Pool {
        for at in places {
            let split = pool.split(u64::from(backends[*at].weight));
            self.branch(chain, split, To::Backend(*at), *at);
            pool = split.rest;
        }
        pool
    }

    /// A rule by chance; `witness` is who loses if the chance is none, or if
    /// it leaves nothing to those after it.
    fn branch(&mut self, chain: usize, split: Split, to: To, witness: usize) {
        self.check(split, witness);
        let units = u32::try_from(split.units).unwrap_or(Probability::ONE);
        let chance = Probability::from_units(units);
        self.add(chain, Statistic::Random(chance).simplest(), to);
    }

    /// Branches backends that are sorted by hash and agree in the digits before
    /// `digit`.
    fn branch_out(
        &mut self,
        chain: usize,
        mut places: Vec<usize>,
        backends: &[Backend],
        mut pool: Pool,
        mut digit: u32,
    ) {
        const LARGE: u64 = 8;
        loop {
            let whole = pool.weight();
            let is_large = |at: &usize| u64::from(backends[*at].weight) * LARGE >= whole;
            let (large, mut small): (Vec<usize>, Vec<usize>) =
                places.into_iter().partition(is_large);
            pool = self.share_out(chain, &large, backends, pool);
            let Some(next) = first_difference(&small, backends, digit) else {
                self.share_out(chain, &small, backends, pool);
                return;
            };
            // The groups are in order; the first goes on right here.
            while let Some(at) = last_group(&small, backends, next) {
                let group = small.split_off(at);
                let split = pool.split(sum(&group, backends));
                let witness = group[0];
                let to = match group[..] {
                    [only] => To::Backend(only),
                    _ => {
                        let branch = self.chain(id(backends[witness].hash, next));
                        self.branch_out(branch, group, backends, split.taken, next + 1);
                        To::Chain(branch)
                    }
                };
                self.branch(chain, split, to, witness);
                pool = split.rest;
            }
            (places, digit) = (small, next + 1);
        }
    }
}
