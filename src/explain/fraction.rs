//! Exact fractions, as long as they stay short.
//!
//! The shares of `--mode nth` and of a few chances are fractions that fit into two
//! numbers of 128 bits. Those of many chances do not: 10,000 of them would take 40 kB
//! for each share. Beside the fraction every share is known in units of 2^-127; each
//! rule loses less than one of these, so after 10,000 rules the share is still exact
//! to 2^-113, and a double has 53 bits.

use std::fmt;

use crate::netfilter::statistic::{Share, Statistic};

/// A fraction in lowest terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fraction {
    /// The numerator.
    pub part: u128,
    /// The denominator.
    pub whole: u128,
}

fn common_divisor(mut one: u128, mut other: u128) -> u128 {
    while other != 0 {
        (one, other) = (other, one % other);
    }
    one.max(1)
}

impl Fraction {
    /// Nothing.
    pub const NONE: Self = Self { part: 0, whole: 1 };
    /// Everything.
    pub const ALL: Self = Self { part: 1, whole: 1 };

    fn new(part: u128, whole: u128) -> Self {
        let divisor = common_divisor(part, whole);
        Self {
            part: part / divisor,
            whole: whole / divisor,
        }
    }

    /// The product, if it fits.
    #[must_use]
    pub fn times(self, other: Self) -> Option<Self> {
        let (one, two) = (
            Self::new(self.part, other.whole),
            Self::new(other.part, self.whole),
        );
        Some(Self {
            part: one.part.checked_mul(two.part)?,
            whole: one.whole.checked_mul(two.whole)?,
        })
    }

    /// The sum, if it fits.
    #[must_use]
    pub fn and(self, other: Self) -> Option<Self> {
        let divisor = common_divisor(self.whole, other.whole);
        let (left, right) = (other.whole / divisor, self.whole / divisor);
        let part = self
            .part
            .checked_mul(left)?
            .checked_add(other.part.checked_mul(right)?)?;
        Some(Self::new(part, self.whole.checked_mul(left)?))
    }

    /// The rest to a whole.
    #[must_use]
    pub fn rest(self) -> Self {
        Self {
            part: self.whole - self.part.min(self.whole),
            whole: self.whole,
        }
    }

    /// The part that a choice takes.
    #[must_use]
    pub fn of_choice(statistic: Statistic) -> Self {
        match statistic {
            Statistic::Always => Self::ALL,
            Statistic::Nth { every, .. } => Self::new(1, every.into()),
            Statistic::Random(chance) => Self::new(chance.units().into(), 1 << 31),
        }
    }

    /// A share that is a whole number of 2^-127.
    #[must_use]
    pub fn of_share(share: Share) -> Self {
        Self::new(share.units(), 1 << 127)
    }

    /// Returns true if a person can read it.
    #[must_use]
    pub fn is_short(self) -> bool {
        self.whole < 100_000
    }
}

/// `1/4`; `0` and `1` without a denominator.
impl fmt::Display for Fraction {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.whole {
            1 => write!(out, "{}", self.part),
            whole => write!(out, "{}/{whole}", self.part),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sums_and_products_are_those_of_rationals(a in 0u64..1000, b in 1u64..1000, c in 0u64..1000, d in 1u64..1000) {
            let (one, two) = (Fraction::new(a.into(), b.into()), Fraction::new(c.into(), d.into()));
            let sum = Fraction::new(u128::from(a * d + c * b), u128::from(b * d));
            prop_assert_eq!(one.and(two), Some(sum));
            prop_assert_eq!(one.times(two), Some(Fraction::new(u128::from(a * c), u128::from(b * d))));
        }

        #[test]
        fn shares_of_127_bits_multiply_like_fractions(a in 0u64..=1 << 31, b in 0u64..=1 << 31) {
            let share = |part| Share::ALL.split_evenly(part, 1 << 31).0;
            let product = Fraction::of_share(share(a).times(share(b)));
            prop_assert_eq!(product, Fraction::new(u128::from(a) * u128::from(b), 1 << 62));
        }
    }

    #[test]
    fn a_fraction_that_does_not_fit_is_left_out() {
        let tiny = Fraction::new(1, u128::MAX);
        assert_eq!(tiny.times(tiny), None);
        assert_eq!(Fraction::new(3, 12).to_string(), "1/4");
    }
}
