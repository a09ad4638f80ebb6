//! Independent choice, by chance or by a hash: parts of the connections that give
//! the requested shares.
//!
//! A rule sees only the connections that the rules above it let pass, so its
//! part is its weight divided by the weight from here down. Each part is
//! rounded to the unit of the match, 2^-31 for a chance and 2^-32 for a hash,
//! and the errors would add up from rule to rule and from
//! chain to chain. So the share that really reaches a rule is carried along.
//! Where a share would be wrong by more than a unit of all connections, the
//! part is corrected.

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
    /// The unit of the match is 2^-bits.
    bits: u32,
}

/// A part of the connections, and the two pools that it makes.
#[derive(Clone, Copy, Debug)]
pub struct Split {
    /// The part that the rule takes, in units of the match.
    pub units: u64,
    /// The pool that the rule takes.
    pub taken: Pool,
    /// The pool that the rule lets pass.
    pub rest: Pool,
}

impl Pool {
    /// Everything, for backends of that weight together, which is not 0.
    pub fn all(sum: u64, bits: u32) -> Self {
        Self {
            weight: sum,
            reaching: ALL,
            sum,
            bits,
        }
    }

    /// The weight that is left.
    pub fn weight(self) -> u64 {
        self.weight
    }

    /// Splits a part of the weight off. If both parts were right to a unit
    /// before, both are again: an error of the whole is given to one of them,
    /// and rounding goes towards the other.
    pub fn split(self, weight: u64) -> Split {
        let one = 1_u128 << self.bits;
        let units = |units: u128| u64::try_from(units.min(one)).unwrap_or(u64::MAX);
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

    fn with(self, weight: u64, units: u64) -> Split {
        let taken = (self.reaching * u128::from(units)) >> self.bits;
        let pool = |weight, reaching| Self {
            weight,
            reaching,
            ..self
        };
        Split {
            units,
            taken: pool(weight, taken),
            rest: pool(self.weight - weight, self.reaching - taken),
        }
    }

    /// The exact share of a weight.
    fn target(self, weight: u64) -> u128 {
        u128::from(weight) * ALL / u128::from(self.sum.max(1))
    }

    fn is_right(self) -> bool {
        let tolerance = ALL >> self.bits;
        self.reaching.abs_diff(self.target(self.weight)) <= tolerance
    }
}

impl Split {
    /// Returns true if rounding leaves nothing to the rule, or to those after it.
    pub fn loses_a_part(self) -> bool {
        let everything = 1 << self.rest.bits;
        self.units == 0 || (self.units == everything && self.rest.weight > 0)
    }
}
