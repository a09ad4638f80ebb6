//! The statistic match in the kernel's own unit.
//!
//! A chance is a whole number of 2^-31 (`xt_statistic.h`), so equality of
//! chances is equality of numbers. `iptables-save` prints it as `%.11f`, which
//! parses back to the same number.

use std::fmt;

/// A chance in units of 2^-31, from never (0) to always (2^31).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Probability(u32);

impl Probability {
    /// The unit is 2^-BITS.
    pub const BITS: u32 = 31;
    /// The number of units that make certainty.
    pub const ONE: u32 = 1 << Self::BITS;

    /// A chance of so many units; more than [`Self::ONE`] is certainty.
    #[must_use]
    pub fn from_units(units: u32) -> Self {
        Self(units.min(Self::ONE))
    }

    /// The number of units.
    #[must_use]
    pub fn units(self) -> u32 {
        self.0
    }

    /// The complement, which `! --probability` matches.
    #[must_use]
    pub fn complement(self) -> Self {
        Self(Self::ONE - self.0)
    }

    /// Reads a decimal fraction from 0 to 1 and rounds it to the nearest unit,
    /// as iptables does. More than 19 decimals are cut off.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        const DECIMALS: usize = 19;
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(whole)
            || !digits(fraction)
            || whole.len() + fraction.len() == 0
            || whole.len() > 2
        {
            return None;
        }
        let fraction = fraction.get(..DECIMALS).unwrap_or(fraction);
        let scale = u128::from(10_u64.pow(u32::try_from(fraction.len()).ok()?));
        let number = |digits: &str| u128::from(digits.parse::<u64>().unwrap_or(0));
        let scaled = number(whole) * scale + number(fraction);
        let units = (scaled * u128::from(Self::ONE) + scale / 2) / scale;
        u32::try_from(units)
            .ok()
            .filter(|units| *units <= Self::ONE)
            .map(Self)
    }
}

impl fmt::Display for Probability {
    /// `%.11f` as the C library prints it: exact, halves to the even digit.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SCALE: u64 = 100_000_000_000;
        let scaled = u128::from(self.0) * u128::from(SCALE);
        let rest = scaled & u128::from(Self::ONE - 1);
        let half = u128::from(Self::ONE / 2);
        let mut digits = u64::try_from(scaled >> 31).unwrap_or(SCALE);
        if rest > half || (rest == half && digits % 2 == 1) {
            digits += 1;
        }
        write!(out, "{}.{:011}", digits / SCALE, digits % SCALE)
    }
}

/// The part of the connections reaching a rule that it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Statistic {
    /// All of them: a rule without `-m statistic`.
    Always,
    /// One connection in `every`: the first after `packet` others, and so on.
    Nth {
        /// 1 to 2^32 - 1.
        every: u32,
        /// 0 to `every - 1`.
        packet: u32,
    },
    /// Each with this chance.
    Random(Probability),
}

impl Statistic {
    /// The same choice in its simplest form: every first one is all of them.
    #[must_use]
    pub fn simplest(self) -> Self {
        match self {
            Self::Nth { every: 1, .. } | Self::Random(Probability(Probability::ONE)) => {
                Self::Always
            }
            other => other,
        }
    }
}

/// A share of all connections, in units of 2^-127: products over ten thousand
/// rules stay exact to far below the precision of a double.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share(u128);

impl Share {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Everything.
    pub const ALL: Self = Self(1 << 127);

    /// Splits the share into the part that a rule takes and the rest.
    #[must_use]
    pub fn split(self, statistic: Statistic) -> (Self, Self) {
        let taken = match statistic {
            Statistic::Always => self.0,
            Statistic::Nth { every, .. } => self.0 / u128::from(every),
            Statistic::Random(Probability(units)) => {
                let units = u128::from(units);
                (self.0 >> 31) * units + (((self.0 & ((1 << 31) - 1)) * units) >> 31)
            }
        };
        (Self(taken), Self(self.0 - taken))
    }

    /// Splits the share into `part` of `whole` equal parts, and the rest. `whole` is
    /// at most 2^32, and not 0.
    #[must_use]
    pub fn split_evenly(self, part: u64, whole: u64) -> (Self, Self) {
        let (part, whole) = (u128::from(part), u128::from(whole));
        let taken = (self.0 / whole) * part + (self.0 % whole) * part / whole;
        (Self(taken), Self(self.0 - taken))
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// The part `other` of it, rounded down to a unit.
    #[must_use]
    pub fn times(self, other: Self) -> Self {
        const LOW: u128 = (1 << 64) - 1;
        if other == Self::ALL {
            return self;
        }
        let (high, low) = (self.0 >> 64, self.0 & LOW);
        let (other_high, other_low) = (other.0 >> 64, other.0 & LOW);
        let (left, right) = (high * other_low, low * other_high);
        let middle = (left >> 1) + (right >> 1) + ((low * other_low) >> 65);
        Self(((high * other_high) << 1) + (middle >> 62))
    }

    /// Two to the power of `power` times the share, as far as there are numbers for it.
    #[must_use]
    pub fn doubled(self, power: u32) -> Self {
        let factor = 1_u128.checked_shl(power).unwrap_or(u128::MAX);
        Self(self.0.saturating_mul(factor))
    }

    /// The share divided by two to the power of `power`.
    #[must_use]
    pub fn halved(self, power: u32) -> Self {
        Self(self.0.checked_shr(power).unwrap_or(0))
    }

    /// The share without `other`.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// The whole number of 2^-127.
    #[must_use]
    pub fn units(self) -> u128 {
        self.0
    }

    /// In units of 2^-64, so that many can be added.
    #[must_use]
    pub fn in_64_bits(self) -> u128 {
        self.0 >> 63
    }

    /// As a number from 0 to 1, for people and templates to read.
    #[must_use]
    #[allow(clippy::cast_precision_loss)]
    pub fn as_f64(self) -> f64 {
        self.0 as f64 / Self::ALL.0 as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn units(text: &str) -> Option<u32> {
        Probability::parse(text).map(Probability::units)
    }

    #[test]
    fn spelled_as_iptables_save_spells_it() {
        for (typed, saved) in [
            ("0.3", "0.29999999981"),
            ("0.33", "0.33000000007"),
            ("0.4286", "0.42860000022"),
            ("0.75", "0.75000000000"),
            ("1", "1.00000000000"),
            ("0", "0.00000000000"),
            (".5", "0.50000000000"),
        ] {
            assert_eq!(Probability::parse(typed).unwrap().to_string(), saved);
        }
    }

    #[test]
    fn a_half_in_the_last_digit_goes_to_the_even_one() {
        // 2^11 units are 10^11 * 2^-20 of the last digit: .95367431640625 ends in a half at 2^-20.
        assert_eq!(
            Probability::from_units(1 << 11).to_string(),
            "0.00000095367"
        );
        assert_eq!(
            Probability::from_units(1 << 20).to_string(),
            "0.00048828125"
        );
        assert_eq!(
            Probability::from_units(1 << 19).to_string(),
            "0.00024414062"
        );
        assert_eq!(
            Probability::from_units(3 << 19).to_string(),
            "0.00073242188"
        );
    }

    #[test]
    fn only_decimal_fractions_are_parsed() {
        for bad in [
            "",
            ".",
            "-0.1",
            "+0.1",
            "1.1",
            "2",
            "0,5",
            "1e-3",
            "nan",
            "0.5x",
            " 0.5",
            "99999999999999999999",
        ] {
            assert_eq!(units(bad), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn every_chance_reads_back_as_itself(number in 0..=Probability::ONE) {
            let probability = Probability::from_units(number);
            prop_assert_eq!(Probability::parse(&probability.to_string()), Some(probability));
        }

        #[test]
        fn spelling_agrees_with_correctly_rounded_decimals(number in 0..=Probability::ONE) {
            // The quotient by a power of two is exact, and so is Rust's rounding of it.
            let exact = f64::from(number) / f64::from(Probability::ONE);
            prop_assert_eq!(Probability::from_units(number).to_string(), format!("{exact:.11}"));
        }

        #[test]
        fn nothing_is_lost_or_made_by_splitting(number in 0..=Probability::ONE, every in 1..u32::MAX) {
            for statistic in [Statistic::Random(Probability::from_units(number)), Statistic::Nth { every, packet: 0 }, Statistic::Always] {
                let (taken, rest) = Share::ALL.split(statistic);
                prop_assert_eq!(taken.and(rest), Share::ALL);
            }
        }
    }
}
