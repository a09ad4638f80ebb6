//! The backends of a family, and how their shares become rules.

use super::backend::Backend;
use super::coerce::BadRequest;
use super::{Layout, Mode};
use crate::net::Family;
use crate::schedule::{self, Arranged, Arrangement};

/// The backends of one family. At least one has a weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Whose connections they share.
    pub family: Family,
    /// As listed, with those of weight 0.
    pub backends: Vec<Backend>,
    /// How the rules give each its share.
    pub arrangement: Arrangement,
}

/// The backends by family, each arranged into chains.
pub(super) fn pools(
    backends: &[Backend],
    mode: Mode,
    layout: Layout,
) -> Result<Vec<Pool>, BadRequest> {
    if backends.is_empty() {
        let problem = "is empty; an empty pool is not available yet in this version";
        return Err(BadRequest::new("backends", problem));
    }
    let mut pools = Vec::new();
    for family in Family::BOTH {
        let of_family = |at: &usize| Family::of(backends[*at].address) == family;
        let places: Vec<usize> = (0..backends.len()).filter(of_family).collect();
        if !places.is_empty() {
            pools.push(pool(family, &places, backends, mode, layout)?);
        }
    }
    Ok(pools)
}

fn pool(
    family: Family,
    places: &[usize],
    backends: &[Backend],
    mode: Mode,
    layout: Layout,
) -> Result<Pool, BadRequest> {
    let backends: Vec<Backend> = places.iter().map(|at| backends[*at].clone()).collect();
    if backends.iter().all(|backend| backend.weight == 0) {
        let problem = format!(
            "no {} backend has a weight; an empty pool is not available yet in this version",
            family.title()
        );
        return Err(BadRequest::new("backends", problem));
    }
    let to_arrange = |backend: &Backend| schedule::Backend {
        hash: backend.hash(),
        weight: backend.weight,
    };
    let arranged: Vec<_> = backends.iter().map(to_arrange).collect();
    match arrange(mode, layout, &arranged) {
        Arranged::Fits(arrangement) => Ok(Pool {
            family,
            backends,
            arrangement,
        }),
        Arranged::TooManyRules => Err(too_many_rules(&backends)),
        Arranged::TooSmall(at) => Err(BadRequest::new(
            format!("backends[{}].weight", places[at]),
            format!(
                "`{}` is too small beside the others: the kernel's chances are whole numbers of 2^-31; take less unequal weights",
                backends[at].weight,
            ),
        )),
    }
}

/// The arrangement that is asked for; with [`Layout::Auto`] the one in which a
/// connection visits the fewest rules, and one chain if they are equal.
fn arrange(mode: Mode, layout: Layout, backends: &[schedule::Backend]) -> Arranged {
    type Arrange = fn(&[schedule::Backend]) -> Arranged;
    let (flat, tree): (Arrange, Arrange) = match mode {
        Mode::Nth => (schedule::flat_in_turn, schedule::tree_in_turn),
        Mode::Random => (schedule::flat_by_chance, schedule::tree_by_chance),
    };
    match layout {
        Layout::Flat => flat(backends),
        Layout::Tree => tree(backends),
        Layout::Auto => flat(backends).or_shorter(|| tree(backends)),
    }
}

/// Names the nearest weights of which a round has a few turns for each backend.
fn too_many_rules(backends: &[Backend]) -> BadRequest {
    const SHOWN: usize = 12;
    let weights: Vec<u32> = backends.iter().map(|backend| backend.weight).collect();
    let mut shown: Vec<String> = smaller(&weights)
        .iter()
        .take(SHOWN)
        .map(u32::to_string)
        .collect();
    if weights.len() > SHOWN {
        shown.push("...".to_owned());
    }
    let problem = format!(
        "these weights need more than {} rules to be exact in turn; take the nearest small ones, {}, or `mode: random`",
        schedule::rules_max(backends.len()),
        shown.join(", "),
    );
    BadRequest::new("backends", problem)
}

/// Weights in nearly the same proportions of which a round has about eight
/// turns for each. Nobody loses all turns.
fn smaller(weights: &[u32]) -> Vec<u32> {
    const TURNS: u64 = 8;
    let sum: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
    let turns = TURNS * weights.len() as u64;
    let scaled = |weight: &u32| {
        let nearest = (u64::from(*weight) * turns + sum / 2) / sum.max(1);
        u32::try_from(nearest)
            .unwrap_or(u32::MAX)
            .max(u32::from(*weight > 0))
    };
    weights.iter().map(scaled).collect()
}
