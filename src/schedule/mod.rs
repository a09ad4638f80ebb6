//! Weights into what each rule takes of the connections that reach it, and
//! rules into chains. Arithmetic alone, in whole numbers.
//!
//! [`turns`] and [`chances`] share out among the parts of one chain, in turn or
//! by chance; [`arrangement`] makes one chain of all backends, or a tree.

mod arrangement;
mod chances;
mod turns;

use crate::netfilter::statistic::Statistic;
pub use arrangement::{
    Arranged, Arrangement, Backend, Branch, Node, To, flat_by_chance, flat_in_turn, rules_max,
    tree_by_chance, tree_in_turn,
};

/// A rule to be in turn: which part it serves, and what it takes of what reaches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The place of the part in the list of weights.
    pub part: usize,
    /// What it takes.
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
