//! Weights into the part that each rule takes, and rules into chains. Pure
//! arithmetic in whole numbers.
//!
//! [`turns`] and [`chances`] divide the connections of one chain, in turn or
//! independently of each other; [`arrangement`] makes one chain of all backends, or
//! a tree; [`hashes`] does so with decisions by a hash.

mod arrangement;
mod chances;
mod digits;
mod hashes;
mod turns;

use crate::netfilter::statistic::Statistic;
pub use arrangement::{
    Arranged, Arrangement, Backend, Branch, Node, To, flat_by_chance, flat_in_turn, rules_max,
    tree_by_chance, tree_in_turn,
};
pub use hashes::{Choice, flat_by_hash, tree_by_hash};

/// A rule that is served in turn: its part, and the connections that it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The place of the part in the list of weights.
    pub part: usize,
    /// The connections that it takes.
    pub takes: Statistic,
}

/// The greatest common divisor; 0 if all are 0.
fn divisor(weights: &[u64]) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    weights
        .iter()
        .fold(0, |so_far, weight| gcd(so_far, *weight))
}

#[cfg(test)]
#[allow(clippy::cast_precision_loss)]
mod tests;
