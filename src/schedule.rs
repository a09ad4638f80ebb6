//! Weights into what each rule takes of the connections that reach it.
//! Arithmetic alone, in whole numbers.

use crate::statistic::{Probability, Statistic};

/// A rule to be: which backend it serves, and what it takes of what reaches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The place of the backend in the list of weights.
    pub backend: usize,
    /// What it takes.
    pub takes: Statistic,
}

/// The most turns that a round may have.
pub const SLOTS_MAX: u64 = 4096;

/// The turns in a round of these weights: their sum over their greatest common
/// divisor.
#[must_use]
pub fn slots(weights: &[u32]) -> u64 {
    let sum: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
    sum / divisor(weights).max(1)
}

fn divisor(weights: &[u32]) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    weights
        .iter()
        .fold(0, |so_far, weight| gcd(so_far, u64::from(*weight)))
}

/// Exact weighted round robin, one rule for each turn of a round.
///
/// A rule sees only what the rules above it let pass: of a round of `n` turns
/// the first rule takes one in `n`, the next one in the `n - 1` that are left,
/// and the last one takes the rest. Whatever the counters of the rules stand
/// at, any `n` connections in a row serve each turn once.
///
/// The weights must not all be 0, and need at most [`SLOTS_MAX`] turns.
#[must_use]
pub fn nth(weights: &[u32]) -> Vec<Piece> {
    let turns = smooth_round(weights);
    let left = (1..=u32::try_from(turns.len()).unwrap_or(u32::MAX)).rev();
    let piece = |(backend, every)| Piece {
        backend,
        takes: Statistic::Nth { every, packet: 0 }.simplest(),
    };
    turns.into_iter().zip(left).map(piece).collect()
}

/// The backends of one round, spread so that nobody's turns come in a row if
/// it can be helped: each turn goes to whoever is owed most, and among equals
/// to the one that is listed first.
fn smooth_round(weights: &[u32]) -> Vec<usize> {
    let divisor = divisor(weights).max(1);
    let weights: Vec<i64> = weights
        .iter()
        .map(|weight| i64::try_from(u64::from(*weight) / divisor).unwrap_or(i64::MAX))
        .collect();
    let sum: i64 = weights.iter().sum();
    let mut owed = vec![0; weights.len()];
    let mut turns = Vec::new();
    for _ in 0..sum {
        for (debt, weight) in owed.iter_mut().zip(&weights) {
            *debt += weight;
        }
        let most = (0..weights.len())
            .rev()
            .max_by_key(|at| owed[*at])
            .unwrap_or_default();
        owed[most] -= sum;
        turns.push(most);
    }
    turns
}

/// Independent random choice: each backend's share is its weight over the sum,
/// within 2^-31 (less than 5e-10), however many backends there are.
///
/// A rule sees only what the rules above it let pass, so its chance is its
/// weight among the backends from here down. The last one takes the rest.
///
/// Each chance is rounded to 2^-31, and the errors would add up from rule to
/// rule. So where what is left would be off by more than 2^-32 of all
/// connections, the chance is taken that sets it right instead.
#[must_use]
pub fn random(weights: &[u32]) -> Vec<Piece> {
    let mut weight_left: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
    let sum = weight_left.max(1);
    let mut reaching = FIXED_ONE;
    let mut pieces = Vec::new();
    for (backend, weight) in weights
        .iter()
        .enumerate()
        .filter(|(_, weight)| **weight > 0)
    {
        let left_after = weight_left - u128::from(*weight);
        let units = chance(
            u128::from(*weight),
            weight_left,
            reaching,
            left_after * FIXED_ONE / sum,
        );
        reaching = after(reaching, units);
        weight_left = left_after;
        let takes = Statistic::Random(Probability::from_units(units)).simplest();
        pieces.push(Piece { backend, takes });
    }
    pieces
}

/// All connections, in units of 2^-80: 45 bits of weight fit above it.
const FIXED_ONE: u128 = 1 << 80;

/// The chance, in units of 2^-31, that leaves `target` of what is `reaching`
/// the rule, both in units of 2^-80.
fn chance(weight: u128, weight_left: u128, reaching: u128, target: u128) -> u32 {
    const TOLERANCE: u128 = FIXED_ONE >> 32;
    let one = u128::from(Probability::ONE);
    let rounded = |numerator: u128, denominator: u128| {
        let quotient = (numerator + denominator / 2) / denominator.max(1);
        u32::try_from(quotient.min(one)).unwrap_or(Probability::ONE)
    };
    let plain = rounded(weight * one, weight_left);
    match after(reaching, plain).abs_diff(target) <= TOLERANCE {
        true => plain,
        false => Probability::ONE - rounded(target * one, reaching),
    }
}

/// What is left of `reaching` after a rule with that chance.
fn after(reaching: u128, units: u32) -> u128 {
    (reaching * u128::from(Probability::ONE - units)) >> 31
}

/// The first backend whose weight is so small beside the others that the
/// kernel cannot express its chance, or that another's leaves nothing for.
#[must_use]
pub fn inexpressible(weights: &[u32]) -> Option<usize> {
    let pieces = random(weights);
    let never = Statistic::Random(Probability::from_units(0));
    let starved = |at: usize| {
        pieces[..at]
            .iter()
            .any(|piece| piece.takes == Statistic::Always)
    };
    let lost = (0..pieces.len()).find(|at| pieces[*at].takes == never || starved(*at))?;
    Some(pieces[lost].backend)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::statistic::Share;
    use proptest::prelude::*;

    /// Serves connections as the kernel does: each rule counts for itself what
    /// reaches it.
    fn serve(pieces: &[Piece], connections: usize) -> Vec<usize> {
        let mut seen = vec![0_u32; pieces.len()];
        let mut served = Vec::new();
        for _ in 0..connections {
            let taker = pieces.iter().zip(&mut seen).find_map(|(piece, seen)| {
                let takes = match piece.takes {
                    Statistic::Always => true,
                    Statistic::Nth { every, packet } => *seen % every == packet,
                    Statistic::Random(_) => unreachable!("not in turn"),
                };
                *seen += 1;
                takes.then_some(piece.backend)
            });
            served.push(taker.expect("a connection passed all rules"));
        }
        served
    }

    fn every(pieces: &[Piece]) -> Vec<u32> {
        let every = |piece: &Piece| match piece.takes {
            Statistic::Nth { every, packet: 0 } => every,
            _ => 1,
        };
        pieces.iter().map(every).collect()
    }

    #[test]
    fn four_equal_servers_are_four_three_two_and_the_rest() {
        let pieces = nth(&[1, 1, 1, 1]);
        assert_eq!(every(&pieces), [4, 3, 2, 1]);
        assert_eq!(serve(&pieces, 8), [0, 1, 2, 3, 0, 1, 2, 3]);
    }

    #[test]
    fn the_example_by_chance_is_30_of_100_30_of_70_30_of_40_and_the_rest() {
        let units: Vec<_> = random(&[30, 30, 30, 10])
            .iter()
            .map(|piece| piece.takes)
            .collect();
        let of = |text| Statistic::Random(Probability::parse(text).unwrap());
        assert_eq!(
            units,
            [
                of("0.3"),
                of("0.42857142857"),
                of("0.75"),
                Statistic::Always
            ]
        );
    }

    #[test]
    fn weight_zero_has_no_rule() {
        assert_eq!(
            nth(&[0, 5, 0]),
            [Piece {
                backend: 1,
                takes: Statistic::Always
            }]
        );
        assert_eq!(
            random(&[0, 5, 0]),
            [Piece {
                backend: 1,
                takes: Statistic::Always
            }]
        );
        assert_eq!(slots(&[0, 0]), 0);
    }

    #[test]
    fn a_chance_that_the_kernel_cannot_express_is_found() {
        assert_eq!(inexpressible(&[u32::MAX >> 1, 1]), None);
        assert_eq!(inexpressible(&[1, u32::MAX >> 1]), None);
        let mut many = vec![u32::MAX >> 1; 100];
        many.insert(0, 1);
        assert_eq!(inexpressible(&many), Some(0));
        let last: Vec<u32> = many.iter().rev().copied().collect();
        assert_eq!(inexpressible(&last), None);
    }

    fn shares(pieces: &[Piece], backends: usize) -> Vec<f64> {
        let mut shares = vec![Share::NONE; backends];
        let mut left = Share::ALL;
        for piece in pieces {
            let (taken, rest) = left.split(piece.takes);
            shares[piece.backend] = shares[piece.backend].and(taken);
            left = rest;
        }
        assert_eq!(left, Share::NONE, "connections pass all rules");
        shares.into_iter().map(Share::as_f64).collect()
    }

    fn assert_fair(weights: &[u32]) {
        let sum: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
        for (share, weight) in shares(&random(weights), weights.len()).iter().zip(weights) {
            let error = (share - f64::from(*weight) / sum).abs();
            assert!(error < 1e-9, "{error:e} for {weight}");
        }
    }

    #[test]
    fn ten_thousand_backends_get_their_shares() {
        assert_fair(&vec![1; 10_000]);
        let uneven: Vec<u32> = (0..10_000_u32)
            .map(|n| n.wrapping_mul(2_654_435_761) >> 12)
            .collect();
        assert_fair(&uneven);
    }

    proptest! {
        #[test]
        fn any_round_in_a_row_is_exact(weights in prop::collection::vec(0..12_u32, 1..9), start in 0..100_usize) {
            prop_assume!(weights.iter().any(|weight| *weight > 0));
            let round = usize::try_from(slots(&weights)).unwrap();
            let served = serve(&nth(&weights), start + round);
            for (backend, weight) in weights.iter().enumerate() {
                let turns = served[start..].iter().filter(|served| **served == backend).count();
                prop_assert_eq!(turns as u64 * divisor(&weights), u64::from(*weight));
            }
        }

        #[test]
        fn the_first_round_follows_the_turns(weights in prop::collection::vec(0..12_u32, 1..9)) {
            prop_assume!(weights.iter().any(|weight| *weight > 0));
            let turns = smooth_round(&weights);
            prop_assert_eq!(serve(&nth(&weights), turns.len()), turns);
        }

        #[test]
        fn any_share_is_within_a_billionth(weights in prop::collection::vec(0..=crate::request::WEIGHT_MAX, 1..60)) {
            prop_assume!(weights.iter().any(|weight| *weight > 0) && inexpressible(&weights).is_none());
            assert_fair(&weights);
        }
    }
}
