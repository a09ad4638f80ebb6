//! A choice by a hash of the client: the same backend each time, and for few
//! clients another one when the pool changes.
//!
//! Decisions form a tree. Backends are sorted into it by the digits of their own
//! hash, as [`super::arrangement`] does by chance. Each decision asks if a client
//! belongs to one group of backends or to the rest, by a hash with a seed that
//! follows from the group's digits alone. The threshold is the group's weight
//! divided by the weight of both.
//!
//! So a change of one backend's weight, down to 0 and up from it, moves the
//! thresholds of the groups that it is in, and of those beside them. Of the clients
//! of others only those move whose hash lies between the old threshold and the new
//! one. All other decisions stay, and so do the clients. When the backend comes
//! back, so do they.
//!
//! The layout has no influence on the choice. In one chain a rule
//! has all decisions on the way to its backend that are not yet made by the rules
//! before it, as several matches. In a tree each group has a chain of its own.

use super::arrangement::{Arranged, Backend, MAIN, To, TreeBuilder, sum};
use super::chances::Pool;
use super::digits::{by_hash, first_difference, group_number, id, last_group};
use crate::netfilter::bpf::{HashMatch, Hasher};

/// The hashes that a balancer decides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The hash of a client.
    pub hasher: Hasher,
    /// Another number gives another, independent choice.
    pub seed: u32,
}

/// A threshold is a whole number of 2^-32.
const BITS: u32 = 32;

/// One chain.
#[must_use]
pub fn flat_by_hash(backends: &[Backend], choice: Choice) -> Arranged {
    arrange(backends, choice, Chains::One)
}

/// A tree of chains.
#[must_use]
pub fn tree_by_hash(backends: &[Backend], choice: Choice) -> Arranged {
    arrange(backends, choice, Chains::OfEachGroup)
}

fn arrange(backends: &[Backend], choice: Choice, chains: Chains) -> Arranged {
    let places = by_hash(backends);
    let pool = Pool::all(sum(&places, backends), BITS);
    let mut layout = Layout {
        builder: TreeBuilder::new(),
        backends,
        choice,
        chains,
    };
    let group = Group {
        places,
        pool,
        digit: 0,
    };
    layout.lay_out(MAIN, &[], group);
    layout.builder.independent()
}

/// The groups that have a chain of their own.
///
/// In a tree it is every group: decisions that stand in several rules are programs
/// of their own, which a new flow seldom finds in the cache (`benches/hash.py flows`).
#[derive(Clone, Copy)]
enum Chains {
    One,
    OfEachGroup,
}

/// Backends that agree in the digits before `digit`, sorted by hash.
struct Group {
    places: Vec<usize>,
    pool: Pool,
    digit: u32,
}

struct Layout<'a> {
    builder: TreeBuilder,
    backends: &'a [Backend],
    choice: Choice,
    chains: Chains,
}

impl Layout<'_> {
    /// Adds the rules of a group to a chain, for clients that meet all conditions.
    fn lay_out(&mut self, chain: usize, conditions: &[HashMatch], mut group: Group) {
        while let Some(Part { group, decision }) = self.part(&mut group) {
            let mut hashes = conditions.to_vec();
            hashes.push(decision);
            match (self.chains, &group.places[..]) {
                (Chains::One, _) | (_, [_]) => self.lay_out(chain, &hashes, group),
                (Chains::OfEachGroup, _) => {
                    let hash = self.backends[group.places[0]].hash;
                    let next = self.builder.chain(id(hash, group.digit - 1));
                    self.builder.add_hashed(chain, hashes, To::Chain(next));
                    self.lay_out(next, &[], group);
                }
            }
        }
        if let [only] = group.places[..] {
            let hashes = conditions.to_vec();
            self.builder.add_hashed(chain, hashes, To::Backend(only));
        }
    }

    /// Splits off the last part of a group: of the parts that differ in a digit the one
    /// with the highest. `None` if one backend is left.
    fn part(&mut self, group: &mut Group) -> Option<Part> {
        let last = *group.places.last().filter(|_| group.places.len() > 1)?;
        let hash = self.backends[last].hash;
        let differing = first_difference(&group.places, self.backends, group.digit);
        let (at, key) = match differing {
            // Equal in all digits: one after the other.
            None => {
                let at = group.places.len() - 1;
                (at, hash.wrapping_add(at as u64) | NO_GROUP)
            }
            Some(digit) => {
                group.digit = digit;
                let at = last_group(&group.places, self.backends, digit);
                (at.unwrap_or_default(), group_number(hash, digit))
            }
        };
        let places = group.places.split_off(at);
        let split = group.pool.split(sum(&places, self.backends));
        self.builder.check(split, places[0]);
        group.pool = split.rest;
        Some(Part {
            decision: HashMatch {
                hasher: self.choice.hasher,
                seed: self.choice.seed_of(key),
                below: u32::try_from(split.units).unwrap_or(u32::MAX),
            },
            group: Group {
                places,
                pool: split.taken,
                digit: group.digit + 1,
            },
        })
    }
}

/// A group, and the decision that a client belongs to it.
struct Part {
    group: Group,
    decision: HashMatch,
}

/// A bit that the number of a group never has.
const NO_GROUP: u64 = 1 << 63;

impl Choice {
    /// The seed of a decision: the upper half of the key, mixed with the seed of the
    /// balancer as `SplitMix64` does.
    fn seed_of(self, key: u64) -> u32 {
        let mixed =
            |number: u64, shift: u32, factor: u64| (number ^ number >> shift).wrapping_mul(factor);
        let mix = |number: u64| {
            let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let number = mixed(number, 30, 0xbf58_476d_1ce4_e5b9);
            let number = mixed(number, 27, 0x94d0_49bb_1331_11eb);
            number ^ number >> 31
        };
        let mixed = mix(key ^ mix(self.seed.into()));
        u32::try_from(mixed >> 32).unwrap_or_default()
    }
}
