//! Warnings about what is around the balancers: routes, and foreign rules that take or
//! stop their connections.
//!
//! They take a dump of their own, and a question for each backend. So they come in check
//! mode and when a balancer is set up; later runs, and failovers, cost no more for them.
//! They never fail a run.

use std::net::IpAddr;

use super::outcome::{Outcome, RunMode};
use super::warnings::Context;
use crate::explain::{self, Packet, Traffic, WholeTable};
use crate::host::{Facts, Host, Questions};
use crate::netfilter::{Endpoint, Family, Table};
use crate::preflight::grouped;
use crate::request::{Balancer, Destination, Pool, Request, listed};

/// The warnings of a run in check mode, or of one that set up what was not there.
pub(super) fn warnings(context: Context<impl Host>, outcome: &Outcome) -> Vec<String> {
    let Context { request, mode, .. } = context;
    let is_new = outcome
        .before
        .rules
        .values()
        .all(|ruleset| ruleset.is_empty());
    let is_wanted = mode == RunMode::Check || (is_new && !outcome.steps.is_empty());
    if !is_wanted || outcome.failure.is_some() || request.balancers().is_empty() {
        return Vec::new();
    }
    let addresses: Vec<IpAddr> = request
        .pools()
        .flat_map(|(_, pool)| with_weight(pool))
        .map(|endpoint| endpoint.address)
        .collect();
    let facts = context.host.facts(&Questions {
        addresses: addresses.clone(),
        routes: addresses,
        ..Questions::default()
    });
    let mut found: Vec<_> = of_each(request, |_, pool| no_route(pool, &facts)).collect();
    for family in Family::BOTH {
        let neighbourhood = Neighbourhood {
            request,
            facts: &facts,
            family,
            before_us: before_us(outcome, family),
        };
        if neighbourhood.matters() {
            let text = context.host.save(family).unwrap_or_default();
            let tables = explain::read(&text, Some(family)).unwrap_or_default();
            found.extend(neighbourhood.warnings(&tables));
        }
    }
    grouped(found)
}

/// The warnings of each pool, with the balancer.
fn of_each<'a>(
    request: &'a Request,
    warn: impl Fn(&'a Balancer, &'a Pool) -> Option<String>,
) -> impl Iterator<Item = (&'a Balancer, String)> {
    let balancers = request.balancers().iter();
    let pools = balancers.flat_map(|one| one.pools.iter().map(move |pool| (one, pool)));
    pools.filter_map(move |(balancer, pool)| Some((balancer, warn(balancer, pool)?)))
}

fn with_weight(pool: &Pool) -> impl Iterator<Item = Endpoint> {
    let backends = pool.backends.iter();
    let backends = backends.filter(|backend| backend.weight > 0);
    backends.map(|backend| backend.endpoint)
}

fn no_route(pool: &Pool, facts: &Facts) -> Option<String> {
    let is_lost = |endpoint: &Endpoint| facts.unrouted.contains(&endpoint.address);
    let mut lost: Vec<String> = with_weight(pool)
        .filter(is_lost)
        .map(|endpoint| endpoint.address.to_string())
        .collect();
    lost.dedup();
    (!lost.is_empty()).then(|| {
        format!(
            "backends: no route to {}, so connections to there fail; add one (`ip route add`), or leave the backend out",
            listed(lost.iter().map(String::as_str))
        )
    })
}

/// The number of foreign rules in PREROUTING before the first jump rule of ours, which
/// may be the last of all; `None` where no rule leads to us.
fn before_us(outcome: &Outcome, family: Family) -> Option<usize> {
    let jumps = &outcome.after.rules.get(&family)?.owned(Table::Nat).jumps;
    let jumps = jumps.iter().filter(|jump| jump.chain == "PREROUTING");
    let first = jumps.map(|jump| jump.position).min()?;
    usize::try_from(first - 1).ok()
}

/// One family of the host.
struct Neighbourhood<'a> {
    request: &'a Request,
    facts: &'a Facts,
    family: Family,
    before_us: Option<usize>,
}

impl<'a> Neighbourhood<'a> {
    /// Returns true if a foreign rule can be in the way at all.
    fn matters(&self) -> bool {
        let mut pools = self.request.pools();
        self.before_us.is_some_and(|count| count > 0)
            || pools.any(|(balancer, pool)| {
                pool.family == self.family && self.forwarded(balancer, pool).next().is_some()
            })
    }

    /// The backends on other hosts whose connections no rule of ours accepts.
    fn forwarded(&self, balancer: &Balancer, pool: &'a Pool) -> impl Iterator<Item = Endpoint> {
        let is_wanted = !balancer.gateway.forward;
        let is_elsewhere = |endpoint: &Endpoint| {
            !endpoint.address.is_loopback() && !self.facts.own.contains(&endpoint.address)
        };
        with_weight(pool).filter(move |endpoint| is_wanted && is_elsewhere(endpoint))
    }

    fn warnings(&self, tables: &[WholeTable]) -> Vec<(&'a Balancer, String)> {
        let table = |wanted| tables.iter().find(|table| table.table == wanted);
        let of_family = |pool: &Pool| pool.family == self.family;
        let shadowed = table(Table::Nat).into_iter().flat_map(|nat| {
            let shadowed = |balancer, pool: &Pool| self.shadowed(nat, balancer, pool);
            of_each(self.request, move |balancer, pool| {
                of_family(pool).then(|| shadowed(balancer, pool)).flatten()
            })
        });
        let blocked = table(Table::Filter).into_iter().flat_map(|filter| {
            of_each(self.request, move |balancer, pool| {
                let blocked = || self.blocked(filter, balancer, pool);
                of_family(pool).then(blocked).flatten()
            })
        });
        shadowed.chain(blocked).collect()
    }

    /// A foreign rule that takes all connections of a balancer before the jump to it.
    fn shadowed(&self, nat: &WholeTable, balancer: &Balancer, pool: &Pool) -> Option<String> {
        let traffic = traffic(balancer, pool.family);
        let is_ours = |chain: &str| self.request.name.owns(chain);
        let rule = explain::taken_before(nat, &traffic, self.before_us?, is_ours)?;
        Some(format!(
            "`{rule}` in {} table `nat` comes before the balancer and takes all its connections; narrow or delete that rule, \
             or put the jump rule before it (`jump: insert` does, where there is no jump rule yet)",
            self.family.title()
        ))
    }

    /// Connections that filter's FORWARD stops on every way.
    fn blocked(&self, filter: &WholeTable, balancer: &Balancer, pool: &'a Pool) -> Option<String> {
        // Our own rules accept what other balancers of the set forward.
        let is_ours = |chain: &str| self.request.name.owns(chain);
        let mut stopped = self.forwarded(balancer, pool).filter_map(|to| {
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

/// The connections that lead to a balancer in a family.
fn traffic(balancer: &Balancer, family: Family) -> Traffic {
    let of_family = |networks: &[ipnet::IpNet]| {
        let networks = networks.iter();
        let networks = networks.filter(|network| Family::of(network.addr()) == family);
        networks.map(ToString::to_string).collect::<Vec<_>>()
    };
    let traffic = Traffic::new(balancer.protocol, &balancer.destination_ports)
        .with("-s", of_family(&balancer.sources))
        .with("-i", balancer.in_interface.clone());
    match &balancer.destination {
        Destination::Any => traffic,
        Destination::Local => traffic.with("--dst-type", ["LOCAL".to_owned()]),
        Destination::Networks(networks) => traffic.with("-d", of_family(networks)),
    }
}
