//! The backends of a family, and how their shares become rules.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::slice;
use std::sync::Arc;

use super::backend::{Backend, BackendEntry, Host, unusable};
use super::coerce::BadRequest;
use super::hash::Hashing;
use super::health::PanicThreshold;
use super::service::{self, Known, Service};
use super::{Layout, Lookup, Mode, WEIGHT_MAX};
use crate::netfilter::{Endpoint, Family};
use crate::schedule::{self, Arranged, Arrangement};

/// The backends of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// The family of their connections.
    pub family: Family,
    /// As listed, with those of weight 0; a name's addresses in ascending order.
    pub backends: Vec<Backend>,
    /// The rules that give each backend its share. In an empty pool the main
    /// chain has no branches.
    pub arrangement: Arc<Arrangement>,
}

impl Pool {
    /// Returns true if no backend takes new connections.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.backends.iter().any(Backend::is_in_service)
    }

    /// Decides anew who is in service. Returns true if the weights of those do not
    /// fit any more, so that the nearest ones that do were taken: a server that dies
    /// must not stop a run.
    pub(super) fn decide(
        &mut self,
        known: &Known,
        panic_threshold: Option<PanicThreshold>,
        arranging: &mut Arranging,
    ) -> bool {
        let before: Vec<Service> = self.backends.iter().map(|one| one.service).collect();
        service::decide(&mut self.backends, known, panic_threshold);
        let now = self.backends.iter().map(|backend| backend.service);
        if now.eq(before) {
            return false;
        }
        if self.is_empty() {
            self.arrangement = Arrangement::empty().into();
            return false;
        }
        let exact = to_arrange(&self.backends, Backend::is_in_service);
        if let Arranged::Fits(arrangement) = arranging.arrange(self.family, &exact) {
            self.arrangement = arrangement;
            return false;
        }
        let weights: Vec<u32> = exact.iter().map(|backend| backend.weight).collect();
        let equal = weights
            .iter()
            .map(|weight| u32::from(*weight > 0))
            .collect();
        for nearest in [smaller(&weights), equal] {
            let mut backends = exact.clone();
            for (backend, weight) in backends.iter_mut().zip(nearest) {
                backend.weight = weight;
            }
            if let Arranged::Fits(arrangement) = arranging.arrange(self.family, &backends) {
                self.arrangement = arrangement;
                break;
            }
        }
        true
    }
}

/// The backends for the schedule. Those that are not wanted have no part.
fn to_arrange(backends: &[Backend], is_wanted: fn(&Backend) -> bool) -> Vec<schedule::Backend> {
    let to_arrange = |backend: &Backend| schedule::Backend {
        hash: backend.hash(),
        weight: match is_wanted(backend) {
            true => backend.weight,
            false => 0,
        },
    };
    backends.iter().map(to_arrange).collect()
}

/// The backends by family, each arranged into chains. An empty list is an empty
/// pool in each family that is named elsewhere, or in both.
pub(super) fn pools(
    listed: &[BackendEntry],
    named: &BTreeSet<Family>,
    lookup: Lookup,
    mut arranging: Arranging,
) -> Result<Vec<Pool>, BadRequest> {
    let found = addresses(listed, named, lookup)?;
    let mut pools = Vec::new();
    for family in Family::BOTH {
        let (places, backends) = of_family(family, listed, &found)?;
        let is_empty = listed.is_empty() && (named.is_empty() || named.contains(&family));
        if !backends.is_empty() || is_empty {
            pools.push(pool(family, &places, backends, &mut arranging)?);
        }
    }
    Ok(pools)
}

/// The addresses of each item. A name gives those of the families in use, or
/// all if no family is named elsewhere.
fn addresses<'a>(
    listed: &'a [BackendEntry],
    named: &BTreeSet<Family>,
    lookup: Lookup,
) -> Result<Vec<Cow<'a, [IpAddr]>>, BadRequest> {
    let literal = |listed: &BackendEntry| match listed.host {
        Host::Address(address) => Some(Family::of(address)),
        Host::Name(_) => None,
    };
    let mut used = named.clone();
    used.extend(listed.iter().filter_map(literal));
    let in_use = |address: &IpAddr| used.is_empty() || used.contains(&Family::of(*address));
    let of_item = |(at, item): (usize, &'a BackendEntry)| match &item.host {
        Host::Address(address) => Ok(slice::from_ref(address).into()),
        Host::Name(name) => {
            let bad = |problem: String| {
                BadRequest::new(
                    format!("backends[{at}].address"),
                    format!("`{name}` {problem}"),
                )
            };
            let found = lookup(name).map_err(|why| bad(format!("does not resolve: {why}")))?;
            let found: BTreeSet<IpAddr> = found.into_iter().filter(in_use).collect();
            if let Some((address, why)) = found
                .iter()
                .find_map(|found| Some((found, unusable(*found)?)))
            {
                return Err(bad(format!("resolves to {address}, which {why}")));
            }
            if found.is_empty() {
                let titles: Vec<_> = used.iter().map(|family| family.title()).collect();
                return Err(bad(format!(
                    "has no {} address, and no other is in use",
                    titles.join(" or ")
                )));
            }
            Ok(found.into_iter().collect::<Vec<_>>().into())
        }
    };
    listed.iter().enumerate().map(of_item).collect()
}

/// The backends of one family, with the positions of their items in the list.
///
/// The weight of an item is divided evenly among its addresses.
fn of_family(
    family: Family,
    listed: &[BackendEntry],
    addresses: &[Cow<[IpAddr]>],
) -> Result<(Vec<usize>, Vec<Backend>), BadRequest> {
    let of_family = |address: &&IpAddr| Family::of(**address) == family;
    let addresses: Vec<Vec<IpAddr>> = addresses
        .iter()
        .map(|found| found.iter().filter(of_family).copied().collect())
        .collect();
    let factor = common_factor(listed, &addresses);
    let (mut places, mut backends) = (Vec::new(), Vec::<Backend>::new());
    // Only a name can have the address of another item.
    let may_meet = listed.iter().any(|listed| listed.host.is_name());
    let mut known = HashMap::new();
    for (at, (item, addresses)) in listed.iter().zip(&addresses).enumerate() {
        let part = |factor: u128| {
            let product = factor.checked_mul(item.weight.into())?;
            u32::try_from(product / addresses.len() as u128).ok()
        };
        for address in addresses {
            let weight = factor.and_then(part).ok_or_else(|| uneven(at))?;
            let endpoint = Endpoint {
                address: *address,
                port: item.port,
            };
            match known.get(&endpoint) {
                Some(earlier) => {
                    let backend: &mut Backend = &mut backends[*earlier];
                    backend.weight = backend.weight.saturating_add(weight);
                    backend.backup &= item.backup;
                }
                None => {
                    if may_meet {
                        known.insert(endpoint, backends.len());
                    }
                    places.push(at);
                    backends.push(Backend {
                        backup: item.backup,
                        ..Backend::new(endpoint, weight)
                    });
                }
            }
        }
    }
    match backends
        .iter()
        .position(|backend| backend.weight > WEIGHT_MAX)
    {
        Some(backend) => Err(uneven(places[backend])),
        None => Ok((places, backends)),
    }
}

/// The least factor by which all weights are multiplied, so that the number of
/// addresses of each item divides its weight; `None` if it is out of range.
fn common_factor(listed: &[BackendEntry], addresses: &[Vec<IpAddr>]) -> Option<u128> {
    let mut items = listed.iter().zip(addresses);
    items.try_fold(1_u128, |factor, (item, addresses)| {
        let count = addresses.len().max(1) as u128;
        let divisor = count / gcd(count, u128::from(item.weight));
        (factor / gcd(factor, divisor)).checked_mul(divisor)
    })
}

fn uneven(at: usize) -> BadRequest {
    let problem = "cannot be shared evenly among the addresses of the names in the list; \
                   take weights that their numbers of addresses divide";
    BadRequest::new(format!("backends[{at}].weight"), problem)
}

/// The greatest common divisor.
pub(super) fn gcd(one: u128, other: u128) -> u128 {
    match other {
        0 => one,
        _ => gcd(other, one % other),
    }
}

/// A pool as it is while every backend is healthy. The backups must fit too.
fn pool(
    family: Family,
    places: &[usize],
    mut backends: Vec<Backend>,
    arranging: &mut Arranging,
) -> Result<Pool, BadRequest> {
    service::decide(&mut backends, &Known::default(), None);
    let mode = arranging.method.mode;
    let mut fitting = |is_wanted: fn(&Backend) -> bool| match backends.iter().any(is_wanted) {
        false => Ok(Arrangement::empty().into()),
        true => match arranging.arrange(family, &to_arrange(&backends, is_wanted)) {
            Arranged::Fits(arrangement) => Ok(arrangement),
            Arranged::TooManyRules => Err(too_many_rules(&backends)),
            Arranged::TooSmall(at) => Err(too_small(mode, places[at], backends[at].weight)),
        },
    };
    let arrangement = fitting(Backend::is_in_service)?;
    fitting(|backend| backend.service == Service::Reserve)?;
    Ok(Pool {
        family,
        backends,
        arrangement,
    })
}

fn too_small(mode: Mode, place: usize, weight: u32) -> BadRequest {
    let unit = match mode {
        Mode::Nth | Mode::Random => "the kernel's chances are whole numbers of 2^-31",
        Mode::Hash => "the thresholds of a hash are whole numbers of 2^-32",
    };
    BadRequest::new(
        format!("backends[{place}].weight"),
        format!("`{weight}` is too small beside the others: {unit}; take less unequal weights"),
    )
}

/// The way to arrange backends into chains.
#[derive(Clone, Copy, Debug)]
pub(super) struct Method {
    pub mode: Mode,
    pub layout: Layout,
    pub hashing: Hashing,
}

/// The arrangement of the pools of one balancer.
pub(super) struct Arranging<'a> {
    pub method: Method,
    pub arranger: &'a mut Arranger,
}

/// Arrangements that were computed before. In turn equal weights make equal chains, so that
/// for balancers with the same weights they are computed once (`benches/sets.py`).
#[derive(Default)]
pub(super) struct Arranger(HashMap<(Layout, Vec<u32>), Arranged>);

impl Arranging<'_> {
    fn arrange(&mut self, family: Family, backends: &[schedule::Backend]) -> Arranged {
        let Method {
            mode,
            layout,
            hashing,
        } = self.method;
        match mode {
            Mode::Nth => {
                let weights = backends.iter().map(|backend| backend.weight).collect();
                let known = self.arranger.0.entry((layout, weights));
                let in_turn = || {
                    let flat = || schedule::flat_in_turn(backends);
                    laid_out(layout, flat, || schedule::tree_in_turn(backends))
                };
                known.or_insert_with(in_turn).clone()
            }
            Mode::Random => {
                let flat = || schedule::flat_by_chance(backends);
                laid_out(layout, flat, || schedule::tree_by_chance(backends))
            }
            Mode::Hash => {
                let choice = hashing.choice(family);
                let flat = || schedule::flat_by_hash(backends, choice);
                laid_out(layout, flat, || schedule::tree_by_hash(backends, choice))
            }
        }
    }
}

/// The requested arrangement. With [`Layout::Auto`] it is the one in which a
/// connection visits the fewest rules, and one chain if they are equal.
fn laid_out(
    layout: Layout,
    flat: impl FnOnce() -> Arranged,
    tree: impl FnOnce() -> Arranged,
) -> Arranged {
    match layout {
        Layout::Flat => flat(),
        Layout::Tree => tree(),
        Layout::Auto => flat().or_shorter(tree),
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

/// Weights in nearly the same proportions, with about eight turns for each
/// backend in a round. No weight becomes 0.
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
