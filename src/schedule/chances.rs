//! Independent random choice: chances of the kernel that come out as the
//! shares that were asked for.
//!
//! A rule sees only what the rules above it let pass, so its chance is its
//! weight among what is shared out from here down. Each chance is rounded to
//! 2^-31, and the errors would add up from rule to rule, and from chain to
//! chain. So what really reaches a rule is carried along, and where a part
//! would come out wrong by more than 2^-31 of all connections, a chance is
//! taken that sets it right instead.

use crate::netfilter::statistic::Probability;

/// All connections, in units of 2^-80: 45 bits of weight fit above it.
const ALL: u128 = 1 << 80;

/// What is shared out at some place of a chain: the weight that is left, and
/// what really reaches the place.
#[derive(Clone, Copy, Debug)]
pub struct Pool {
    weight: u64,
    /// Of all connections, in units of 2^-80.
    reaching: u128,
    /// The weight of all backends.
    sum: u64,
}

/// A chance, what it sends on, and what stays.
#[derive(Clone, Copy, Debug)]
pub struct Split {
    /// The chance of the rule.
    pub chance: Probability,
    /// What the rule takes.
    pub taken: Pool,
    /// What passes on.
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

    /// A rule for that part of the weight. If both parts were right to 2^-31
    /// before, both are again: what was wrong with the whole is then wrong
    /// with one of them, and rounding goes towards the other.
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

    /// What should reach a place with that weight.
    fn target(self, weight: u64) -> u128 {
        u128::from(weight) * ALL / u128::from(self.sum.max(1))
    }

    fn is_right(self) -> bool {
        const TOLERANCE: u128 = ALL >> 31;
        self.reaching.abs_diff(self.target(self.weight)) <= TOLERANCE
    }
}
