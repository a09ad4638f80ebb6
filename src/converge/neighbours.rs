//! Warnings about what is around the balancers: routes, and foreign rules that take or
//! stop their connections.
//!
//! They take a dump of their own, and a question for each backend. So they come in check
//! mode and when a balancer is set up; later runs, and failovers, cost no more for them.
//! The dump is made before the write, beside the last look at the owned rules, so the
//! positions of new jump rules follow from the steps. They never fail a run.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::bypass;
use super::outcome::{HostState, RunMode, Steps};
use super::retry::Attempt;
use super::warnings::Context;
use crate::diff::change::{self, Change};
use crate::explain::{self, Packet, Rewriting, Traffic, WholeTable};
use crate::host::{Facts, Host, PendingSave, Questions};
use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::{Endpoint, Family, Table};
use crate::plan::loopback;
use crate::preflight::grouped;
use crate::request::{Balancer, Destination, Jump, Pool, Request, listed};

/// The host around the balancers of a request.
pub(super) struct Surroundings<'a> {
    request: &'a Request,
    facts: Facts,
    /// Rules of the other variant, or of `nft`, may rewrite sources too, and are not read.
    is_half_known: bool,
    saves: Vec<(Family, Box<dyn PendingSave + 'a>)>,
}

/// Asks for what the warnings need, in check mode and in a run that sets up what is not
/// there.
pub(super) fn begin<'a>(
    context: Context<'a, impl Host>,
    state: &HostState,
    steps: &Steps,
) -> Option<Surroundings<'a>> {
    let Context {
        host,
        request,
        mode,
        ..
    } = context;
    let is_new = state.rules.values().all(|ruleset| ruleset.is_empty());
    let is_wanted = mode == RunMode::Check || (is_new && !steps.is_empty());
    if !is_wanted || request.balancers().is_empty() {
        return None;
    }
    let backends: BTreeSet<IpAddr> = request
        .pools()
        .flat_map(|(_, pool)| with_weight(pool))
        .map(|endpoint| endpoint.address)
        .collect();
    let clients = request.balancers().iter().flat_map(bypass::clients);
    let facts = host.facts(&Questions {
        addresses: backends.iter().copied().collect(),
        routes: backends.iter().copied().chain(clients).collect(),
        ..Questions::default()
    });
    let mut surroundings = Surroundings {
        request,
        facts,
        is_half_known: false,
        saves: Vec::new(),
    };
    surroundings.is_half_known =
        surroundings.may_bypass() && (host.other_variant_in_use() || host.hides_source_nat());
    let families = Family::BOTH.into_iter();
    let families = families.filter(|family| surroundings.matter(*family, is_new));
    let begin = |family| Some((family, host.begin_save(family).ok()?));
    surroundings.saves = families.filter_map(begin).collect();
    Some(surroundings)
}

impl Surroundings<'_> {
    /// Returns true if a foreign rule can make a difference in a family.
    fn matter(&self, family: Family, is_new: bool) -> bool {
        let pools = self.request.pools();
        let mut pools = pools.filter(|(_, pool)| pool.family == family);
        pools.any(|(balancer, pool)| {
            let is_behind = !is_new || balancer.jump == Jump::Append;
            is_behind
                || forwarded(balancer, pool, &self.facts).next().is_some()
                || bypass::may_be(self.request, balancer, pool, &self.facts.routes)
        })
    }

    /// Returns true if answers may pass this host by, as far as routes tell.
    fn may_bypass(&self) -> bool {
        let routes = &self.facts.routes;
        let mut pools = self.request.pools();
        pools.any(|(balancer, pool)| bypass::may_be(self.request, balancer, pool, routes))
    }

    /// The warnings about the state that an attempt leads to.
    pub(super) fn warnings(self, attempt: &Attempt) -> Vec<String> {
        let Self {
            request,
            facts,
            is_half_known,
            saves,
        } = self;
        let mut found: Vec<_> = of_each(request, None, |_, pool| no_route(pool, &facts)).collect();
        for (family, save) in saves {
            // Of rules that cannot be read nothing is said.
            let text = save.finish().ok();
            let tables = text.and_then(|text| explain::read(&text, Some(family)).ok());
            let Some(tables) = tables else {
                continue;
            };
            let neighbourhood = Neighbourhood {
                request,
                facts: &facts,
                is_half_known,
                family,
                before_us: ["PREROUTING", "OUTPUT"].map(|chain| before_us(attempt, family, chain)),
                nat: tables.iter().find(|table| table.table == Table::Nat),
                filter: tables.iter().find(|table| table.table == Table::Filter),
            };
            found.extend(neighbourhood.warnings());
        }
        grouped(found)
    }
}

/// The warnings of each pool, of one family or of both, with the balancer.
fn of_each<'a, Warnings: IntoIterator<Item = String>>(
    request: &'a Request,
    family: Option<Family>,
    warn: impl Fn(&'a Balancer, &'a Pool) -> Warnings,
) -> impl Iterator<Item = (&'a Balancer, String)> {
    let pools = request.pools();
    let pools = pools.filter(move |(_, pool)| family.is_none_or(|family| family == pool.family));
    pools.flat_map(move |(balancer, pool)| {
        let warnings = warn(balancer, pool).into_iter();
        warnings.map(move |warning| (balancer, warning))
    })
}

pub(super) fn with_weight(pool: &Pool) -> impl Iterator<Item = Endpoint> {
    let backends = pool.backends.iter();
    let backends = backends.filter(|backend| backend.weight > 0);
    backends.map(|backend| backend.endpoint)
}

fn no_route(pool: &Pool, facts: &Facts) -> Option<String> {
    let is_lost = |endpoint: &Endpoint| facts.routes.unrouted.contains(&endpoint.address);
    let lost = with_weight(pool).filter(is_lost);
    let lost: BTreeSet<IpAddr> = lost.map(|endpoint| endpoint.address).collect();
    let lost: Vec<String> = lost.iter().map(IpAddr::to_string).collect();
    (!lost.is_empty()).then(|| {
        format!(
            "backends: no route to {}, so connections to there fail; add one (`ip route add`), or leave the backend out",
            listed(lost.iter().map(String::as_str))
        )
    })
}

/// The number of foreign rules in a chain of nat before the first jump rule of ours, which
/// may be the last of all; `None` where no rule leads to us.
fn before_us(attempt: &Attempt, family: Family, chain: &str) -> Option<usize> {
    let owned = attempt.before.rules.get(&family)?.owned(Table::Nat);
    let mut now = Ruleset::default();
    let table = now.tables.entry(Table::Nat).or_default();
    table.jumps.clone_from(&owned.jumps);
    let changes = attempt.steps.changes.iter();
    let changes = changes.filter(|change| change.table == Table::Nat && &*change.chain == chain);
    let changes: Vec<Change> = changes.cloned().collect();
    let after = change::applied(&changes, family, &now);
    let jumps = after.owned(Table::Nat).jumps.iter();
    let jumps = jumps.filter(|jump| jump.chain == chain);
    let first = jumps.map(|jump| jump.position).min()?;
    usize::try_from(first - 1).ok()
}

/// The backends on other hosts whose connections no rule of ours accepts.
fn forwarded(balancer: &Balancer, pool: &Pool, facts: &Facts) -> impl Iterator<Item = Endpoint> {
    let is_wanted = !balancer.gateway.forward;
    let is_elsewhere = |endpoint: &Endpoint| {
        !endpoint.address.is_loopback() && !facts.own.contains(&endpoint.address)
    };
    with_weight(pool).filter(move |endpoint| is_wanted && is_elsewhere(endpoint))
}

/// One family of the host.
struct Neighbourhood<'a, 'b> {
    request: &'a Request,
    facts: &'b Facts,
    is_half_known: bool,
    family: Family,
    /// The foreign rules before us in PREROUTING and in OUTPUT.
    before_us: [Option<usize>; 2],
    nat: Option<&'b WholeTable>,
    filter: Option<&'b WholeTable>,
}

impl<'a> Neighbourhood<'a, '_> {
    fn warnings(&self) -> Vec<(&'a Balancer, String)> {
        let is_ours = |chain: &str| self.request.name.owns(chain);
        let rewriting = self.nat.map(|nat| Rewriting::new(nat, is_ours));
        let shadowed = of_each(self.request, Some(self.family), |balancer, pool| {
            self.shadowed(balancer, pool)
        });
        let blocked = of_each(self.request, Some(self.family), |balancer, pool| {
            self.blocked(balancer, pool)
        });
        let bypassed = of_each(self.request, Some(self.family), |balancer, pool| {
            let routes = &self.facts.routes;
            match self.is_half_known {
                true => Vec::new(),
                false => bypass::warnings(self.request, balancer, pool, routes, rewriting.as_ref()),
            }
        });
        shadowed.chain(blocked).chain(bypassed).collect()
    }

    /// Foreign rules that take all connections of a balancer before the jump to it.
    fn shadowed(&self, balancer: &Balancer, pool: &Pool) -> Vec<String> {
        let is_ours = |chain: &str| self.request.name.owns(chain);
        let shadowed = |traffic: &Traffic, chain, before_us: Option<usize>, which| {
            let rule = explain::taken_before(self.nat?, chain, traffic, before_us?, is_ours)?;
            Some(format!(
                "`{rule}` in {} table `nat` comes before the balancer and takes all {which}; narrow or delete that rule, \
                 or put the jump rule before it (`jump: insert` does, where there is no jump rule yet)",
                self.family.title()
            ))
        };
        let [prerouting, output] = self.before_us;
        let outside = shadowed(
            &from_outside(balancer, pool.family),
            "PREROUTING",
            prerouting,
            "its connections",
        );
        let is_local = balancer.gateway.local_traffic;
        let local = is_local.then(|| from_here(balancer, pool.family));
        let local = local.and_then(|traffic| {
            shadowed(&traffic, "OUTPUT", output, "its connections of this host")
        });
        outside.into_iter().chain(local).collect()
    }

    /// Connections that filter's FORWARD stops on every way.
    fn blocked(&self, balancer: &Balancer, pool: &Pool) -> Option<String> {
        let filter = self.filter?;
        // Our own rules accept what other balancers of the set forward.
        let is_ours = |chain: &str| self.request.name.owns(chain);
        let mut stopped = forwarded(balancer, pool, self.facts).filter_map(|to| {
            let protocol = Some(balancer.protocol.as_str());
            let by = explain::blocks(
                filter,
                &Packet {
                    protocol,
                    to,
                    passes_by: &is_ours,
                },
            )?;
            Some((to, by))
        });
        let (to, by) = stopped.next()?;
        let others = match stopped.count() {
            0 => String::new(),
            others => format!(" and {others} more"),
        };
        Some(format!(
            "forward: the chain FORWARD of {} table `filter` stops connections to `{to}`{others} by {by}; \
             `forward: true` accepts what is balanced",
            self.family.title()
        ))
    }
}

/// The connections from other hosts that lead to a balancer in a family.
fn from_outside(balancer: &Balancer, family: Family) -> Traffic {
    traffic(balancer, family).with("-i", balancer.in_interface.clone())
}

/// The connections of this host that lead to a balancer in a family.
fn from_here(balancer: &Balancer, family: Family) -> Traffic {
    match &balancer.destination {
        Destination::Networks(_) => traffic(balancer, family),
        Destination::Any | Destination::Local => {
            traffic(balancer, family).without("-d", &loopback(family).to_string())
        }
    }
}

/// The connections that lead to a balancer in a family, from wherever.
fn traffic(balancer: &Balancer, family: Family) -> Traffic {
    let of_family = |networks: &[ipnet::IpNet]| {
        let networks = networks.iter();
        let networks = networks.filter(|network| Family::of(network.addr()) == family);
        networks.map(ToString::to_string).collect::<Vec<_>>()
    };
    let traffic = Traffic::new(balancer.protocol, &balancer.destination_ports)
        .with("-s", of_family(&balancer.sources));
    match &balancer.destination {
        Destination::Any => traffic,
        Destination::Local => traffic.with("--dst-type", ["LOCAL".to_owned()]),
        Destination::Networks(networks) => traffic.with("-d", of_family(networks)),
    }
}
