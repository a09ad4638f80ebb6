//! Independent random choice: chances of the kernel that give the requested
//! shares.
//!
//! A rule sees only the connections that the rules above it let pass, so its
//! chance is its weight divided by the weight from here down. Each chance is
//! rounded to 2^-31, and the errors would add up from rule to rule and from
//! chain to chain. So the share that really reaches a rule is carried along.
//! Where a share would be wrong by more than 2^-31 of all connections, the
//! chance is corrected.

use crate::netfilter::statistic::Probability;

/// All connections, in units of 2^-80: 45 bits of weight fit above it.
const ALL: u128 = 1 << 80;

/// The state at one position of a chain: the weight from here down, and the
/// share that really reaches it.
#[derive(Clone, Copy, Debug)]
pub struct Pool {
    weight: u64,
    /// Of all connections, in units of 2^-80.
    reaching: u128,
    /// The weight of all backends.
    sum: u64,
}

/// A chance, and the two pools that it makes.
#[derive(Clone, Copy, Debug)]
pub struct Split {
    /// The chance of the rule.
    pub chance: Probability,
    /// The pool that the rule takes.
    pub taken: Pool,
    /// The pool that the rule lets pass.
    pub rest: Pool,
}

impl Pool {
    /// Everything, for backends of that weight together, which is not 0.
    pub fn all(sum: u64) -> Self {
        Self {
            weight: sum,
            reaching: ALL,
            sum,
        }
    }

    /// The weight that is left.
    pub fn weight(self) -> u64 {
        self.weight
    }

    /// Splits a part of the weight off. If both parts were right to 2^-31
    /// before, both are again: an error of the whole is given to one of them,
    /// and rounding goes towards the other.
    pub fn split(self, weight: u64) -> Split {
        let one = u128::from(Probability::ONE);
        let units = |units: u128| u32::try_from(units.min(one)).unwrap_or(Probability::ONE);
        let (part, whole) = (u128::from(weight), u128::from(self.weight.max(1)));
        let plain = self.with(weight, units((part * one + whole / 2) / whole));
        if weight == self.weight || plain.taken.is_right() && plain.rest.is_right() {
            return plain;
        }
        let aim = self.target(weight) * one;
        let lower = aim / self.reaching.max(1);
        let upwards = self.reaching > self.target(self.weight);
        self.with(weight, units(lower + u128::from(upwards)))
    }

    fn with(self, weight: u64, units: u32) -> Split {
        let taken = (self.reaching * u128::from(units)) >> 31;
        let pool = |weight, reaching| Self {
            weight,
            reaching,
            sum: self.sum,
        };
        Split {
            chance: Probability::from_units(units),
            taken: pool(weight, taken),
            rest: pool(self.weight - weight, self.reaching - taken),
        }
    }

    /// The exact share of a weight.
    fn target(self, weight: u64) -> u128 {
        u128::from(weight) * ALL / u128::from(self.sum.max(1))
    }

    fn is_right(self) -> bool {
        const TOLERANCE: u128 = ALL >> 31;
        self.reaching.abs_diff(self.target(self.weight)) <= TOLERANCE
    }
}
