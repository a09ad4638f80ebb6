//! Counters against shares.

use statrs::function::gamma::gamma_ur;

use super::{Deviation, ExplainedShare};

/// The connections that each destination got, if all are known and there are some.
fn counted(shares: &[ExplainedShare]) -> Option<(Vec<f64>, f64)> {
    #[allow(clippy::cast_precision_loss)]
    let counts: Option<Vec<f64>> = shares
        .iter()
        .map(|share| share.packets.map(|packets| packets as f64))
        .collect();
    let counts = counts?;
    let total: f64 = counts.iter().sum();
    (total > 0.0 && shares.len() > 1).then_some((counts, total))
}

/// The probability that chance alone takes the counters as far from the shares as
/// they are: Pearson's chi-square. Connections without a destination do not count.
///
/// Destinations that expect less than five connections are taken together, since
/// the test does not hold for them one by one.
#[must_use]
pub fn p_value(shares: &[ExplainedShare]) -> Option<f64> {
    const LEAST: f64 = 5.0;
    let (counts, total) = counted(shares)?;
    let whole: f64 = shares.iter().map(|share| share.share).sum();
    let expected = shares.iter().map(|share| share.share / whole * total);
    let (mut few, mut cells) = ((0.0, 0.0), Vec::new());
    for (found, expected) in counts.into_iter().zip(expected) {
        match expected < LEAST {
            true => few = (few.0 + found, few.1 + expected),
            false => cells.push((found, expected)),
        }
    }
    if few.1 >= LEAST {
        cells.push(few);
    } else if let Some(last) = cells.last_mut() {
        *last = (last.0 + few.0, last.1 + few.1);
    }
    #[allow(clippy::cast_precision_loss)]
    let freedom = cells.len().checked_sub(1).filter(|freedom| *freedom > 0)? as f64;
    let distance: f64 = cells
        .iter()
        .map(|(found, expected)| (found - expected).powi(2) / expected)
        .sum();
    Some(match distance > 0.0 {
        true => gamma_ur(freedom / 2.0, distance / 2.0),
        false => 1.0,
    })
}

/// The largest deviation from what is served in turn, and the largest possible one.
#[must_use]
pub fn deviation(shares: &[ExplainedShare], slacks: &[f64]) -> Option<Deviation> {
    let (counts, total) = counted(shares)?;
    let whole: f64 = shares.iter().map(|share| share.share).sum();
    let mut largest = Deviation {
        found: 0.0,
        bound: slacks.iter().copied().fold(0.0, f64::max),
        fits: true,
    };
    // The total is known from the counters, where it lacks at most what falls through.
    let spread: f64 = slacks.iter().sum::<f64>() * (1.0 - whole);
    for ((found, share), slack) in counts.iter().zip(shares).zip(slacks) {
        let distance = (found - share.share / whole * total).abs();
        largest.found = largest.found.max(distance);
        largest.fits &= distance <= slack + spread + 1e-6;
    }
    Some(largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(counts: &[(f64, u64)]) -> Vec<ExplainedShare> {
        let share = |(share, packets): &(f64, u64)| ExplainedShare {
            destination: String::new(),
            share: *share,
            fraction: None,
            packets: Some(*packets),
            bytes: None,
        };
        counts.iter().map(share).collect()
    }

    #[test]
    fn a_p_value_is_that_of_the_tables() {
        // By the formulas for one degree of freedom and for three.
        let found = p_value(&shares(&[(0.5, 549), (0.5, 451)])).unwrap();
        assert!((found - 0.001_943).abs() < 1e-5, "{found}");
        let found = p_value(&shares(&[
            (0.25, 262),
            (0.25, 240),
            (0.25, 251),
            (0.25, 247),
        ]))
        .unwrap();
        assert!((found - 0.797_38).abs() < 1e-4, "{found}");
        assert_eq!(p_value(&shares(&[(0.5, 10), (0.5, 10)])), Some(1.0));
        assert_eq!(p_value(&shares(&[(0.5, 0), (0.5, 0)])), None);
    }

    #[test]
    fn a_deviation_in_turn_is_held_against_its_bound() {
        let fits = deviation(&shares(&[(0.5, 11), (0.5, 10)]), &[1.0, 1.0]).unwrap();
        assert!(fits.fits && (fits.found - 0.5).abs() < 1e-9);
        let off = deviation(&shares(&[(0.5, 14), (0.5, 10)]), &[1.0, 1.0]).unwrap();
        assert!(!off.fits);
    }

    /// Rare destinations count together if five of them are expected, and else with the
    /// last one.
    #[test]
    fn rare_destinations_are_taken_together() {
        let together = p_value(&shares(&[(0.9, 54), (0.05, 6), (0.05, 0)])).unwrap();
        assert!((together - 1.0).abs() < 1e-12);
        let apart = p_value(&shares(&[(0.8, 80), (0.1, 20), (0.1, 0)])).unwrap();
        assert!(apart < 0.001);
        let with_last = p_value(&shares(&[(0.5, 50), (0.48, 40), (0.02, 10)])).unwrap();
        assert!((with_last - 1.0).abs() < 1e-12);
        assert_eq!(p_value(&shares(&[(0.99, 100), (0.01, 0)])), None);
    }

    #[test]
    fn nothing_is_compared_without_connections_or_with_one_destination() {
        assert_eq!(p_value(&shares(&[(0.5, 0), (0.5, 0)])), None);
        assert_eq!(deviation(&shares(&[(0.5, 0), (0.5, 0)]), &[1.0, 1.0]), None);
        assert_eq!(deviation(&shares(&[(1.0, 9)]), &[0.0]), None);
    }

    /// The connections that fall through are not counted, so the total is not exact.
    #[test]
    fn what_falls_through_widens_the_bound() {
        let all = |counts: [u64; 2]| {
            deviation(&shares(&[(0.5, counts[0]), (0.25, counts[1])]), &[1.0, 1.5])
        };
        assert!(all([54, 25]).unwrap().fits);
        assert!(!all([56, 25]).unwrap().fits);
        let whole = deviation(&shares(&[(0.5, 52), (0.5, 48)]), &[1.0, 1.0]);
        assert!(!whole.unwrap().fits);
    }
}
