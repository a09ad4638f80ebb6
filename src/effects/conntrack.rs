//! The end of connections to removed backends.
//!
//! The kernel keeps a connection with its backend, whatever the rules say by
//! now: a UDP client that keeps sending would stay with a dead backend. Deleting
//! its conntrack entry makes the next packet a new connection. That cannot be
//! rolled back, so it is the last step, and it is done after the rules are
//! changed and verified: nothing can come to a removed backend any more, and the
//! table is read once.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::Effect;
use super::routes::{Routes, is_set, led};
use crate::diff::change::Change;
use crate::host::{Host, ReplyFilter};
use crate::netfilter::rule::{Rule, Target};
use crate::netfilter::ruleset::{OwnedTable, Ruleset};
use crate::netfilter::{ConntrackEntry, Endpoint, Family, Name, Protocol, Table};
use crate::plan::{self, Plan};
use crate::request::{Disconnect, Request, Service};
use anyhow::Result;

/// A backend that the rules name no longer, and the connections that it got by
/// this balancer.
#[derive(Clone, Debug, PartialEq)]
pub struct RemovedBackend {
    /// The family of its connections.
    pub family: Family,
    /// The protocol of its connections.
    pub protocol: Protocol,
    /// Its address and port.
    pub endpoint: Endpoint,
    /// The balancer of a set that it was of.
    pub balancer: Option<String>,
    /// The jump rules that led connections to the balancer.
    pub jumps: Vec<Rule>,
    /// The ways through a set; `None` where the jump rules lead to the balancer.
    pub routes: Option<Arc<Routes>>,
    /// The ports of the same address that are a backend still; `None` is all.
    pub kept: Vec<Option<u16>>,
}

impl RemovedBackend {
    /// Returns true if the connection belongs to this backend.
    #[must_use]
    pub fn owns(&self, entry: &ConntrackEntry) -> bool {
        let (address, port) = entry.reply_source;
        let is_port = |wanted: Option<u16>| wanted.is_none_or(|wanted| wanted == port);
        self.protocol.number() == entry.protocol
            && self.endpoint.address == address
            && is_port(self.endpoint.port)
            && !self.kept.iter().any(|kept| is_port(*kept))
            && self.is_of_the_balancer(entry)
    }

    fn is_of_the_balancer(&self, entry: &ConntrackEntry) -> bool {
        match (&self.routes, self.balancer.as_deref().unwrap_or_default()) {
            (None, _) => self.jumps.iter().any(|jump| led(jump, entry)),
            (Some(routes), part) => {
                routes.observed.lead(entry, part) && !routes.keep(entry, &self.endpoint)
            }
        }
    }

    /// The connections as `conntrack` spells them:
    /// `-p udp --reply-src ADDRESS --reply-port-src PORT`
    #[must_use]
    pub fn shown(&self) -> String {
        let Endpoint { address, port } = self.endpoint;
        let port = port.map_or_else(String::new, |port| format!(" --reply-port-src {port}"));
        format!("-p {} --reply-src {address}{port}", self.protocol.as_str())
    }
}

/// The backends that the plan names still, and whose connections are to be found
/// all the same.
#[derive(Debug, Default)]
pub struct Leaving {
    /// By balancer, which is empty where there is no set, and address and port.
    backends: BTreeSet<(String, Endpoint)>,
    /// Also those that have left service by the observed rules.
    had_left: bool,
}

impl Leaving {
    /// The backends of one family that have one of these places.
    #[must_use]
    pub fn new(request: &Request, family: Family, places: &[Service]) -> Self {
        let pools = request.pools().filter(|(_, pool)| pool.family == family);
        let backends = pools.flat_map(|(balancer, pool)| {
            let part = balancer.name.clone().unwrap_or_default();
            let leaving = pool.backends.iter();
            let leaving = leaving.filter(|backend| places.contains(&backend.service));
            leaving.map(move |backend| (part.clone(), backend.endpoint))
        });
        Self {
            backends: backends.collect(),
            had_left: false,
        }
    }

    /// The same, also where they had left service before.
    #[must_use]
    pub fn or_had_left(self) -> Self {
        Self {
            had_left: true,
            ..self
        }
    }

    /// Returns true for a backend that leaves.
    #[must_use]
    pub fn includes(&self, part: &str, endpoint: Endpoint) -> bool {
        !self.backends.is_empty() && self.backends.contains(&(part.to_owned(), endpoint))
    }

    /// Returns false for a backend that has left service by the observed rules
    /// already: its connections were found then.
    #[must_use]
    pub fn is_meant(
        &self,
        name: &Name,
        nat: &OwnedTable,
        (part, endpoint): (&str, Endpoint),
    ) -> bool {
        if self.had_left || !self.includes(part, endpoint) {
            return true;
        }
        let chain = match part {
            "" => name.as_str().to_owned(),
            part => format!("{}/{part}", name.as_str()),
        };
        let drained = nat.chains.get(&plan::drain_chain(&chain));
        let mut rules = drained.iter().flat_map(|chain| &chain.rules);
        let is_drained = rules.any(|rule| {
            let target = rule.meaning.as_ref().map(|rule| &rule.target);
            target == Some(&Target::Dnat(endpoint))
        });
        !is_drained
    }
}

/// The connections that are to be ended after the changes.
#[derive(Debug, Default)]
pub struct Disconnects {
    removed: BTreeMap<Family, Vec<RemovedBackend>>,
    /// The reason why some connections cannot be ended.
    pub warning: Option<String>,
}

impl Disconnects {
    /// Finds the backends that these changes remove, or take out of service because
    /// they are down.
    #[must_use]
    pub fn plan(
        request: &Request,
        plan: &Plan,
        before: &BTreeMap<Family, Arc<Ruleset>>,
        changes: &[Change],
    ) -> Self {
        let mut disconnects = Self::default();
        for (family, before) in before {
            if !changes.iter().any(|change| change.family == *family) {
                continue;
            }
            let leaving = Leaving::new(request, *family, &[Service::Down]);
            let ends = |part: Option<&str>, protocol| ends(request, part, protocol);
            let removed = removed(plan, *family, before, &leaving, &ends);
            if removed.iter().any(|backend| backend.jumps.is_empty()) {
                let problem = "backends were removed, and no rule tells any more which connections to them were the balancer's";
                disconnects.warning = Some(format!("{problem}; none was ended"));
            } else if !removed.is_empty() {
                disconnects.removed.insert(*family, removed);
            }
        }
        disconnects
    }

    /// Lists the backends that have connections now, for check mode.
    #[must_use]
    pub fn predict(&mut self, host: &impl Host) -> Vec<Effect> {
        let mut effects = Vec::new();
        for (family, removed) in &self.removed {
            match find(host, *family, removed) {
                Ok(found) => effects.extend(found.effects(removed)),
                Err(error) => self.warning = Some(cannot_end(&error)),
            }
        }
        effects
    }

    /// Ends all connections to the removed backends. Returns the effects on
    /// those that had some.
    ///
    /// # Errors
    /// When the kernel lists connections, but refuses to delete one.
    pub fn apply(&mut self, host: &impl Host) -> Result<Vec<Effect>> {
        let mut effects = Vec::new();
        for (family, removed) in &self.removed {
            match find(host, *family, removed) {
                Ok(found) => {
                    host.delete_connections(*family, &found.identifiers)?;
                    effects.extend(found.effects(removed));
                }
                Err(error) => self.warning = Some(cannot_end(&error)),
            }
        }
        Ok(effects)
    }
}

fn cannot_end(error: &anyhow::Error) -> String {
    let problem = "connections to removed backends cannot be ended here";
    let way_out = "end them with `conntrack -D`, or say `disconnect: never`";
    format!("{problem}: {error:#}; {way_out}")
}

/// The conntrack entries of removed backends.
struct Found {
    /// The backends that have entries, by their place in the list.
    places: BTreeSet<usize>,
    identifiers: Vec<Vec<u8>>,
}

impl Found {
    fn effects(&self, removed: &[RemovedBackend]) -> Vec<Effect> {
        let effect = |at: &usize| Effect::Disconnect(removed[*at].clone());
        self.places.iter().map(effect).collect()
    }
}

fn find(host: &impl Host, family: Family, removed: &[RemovedBackend]) -> Result<Found> {
    let places = RefCell::new(BTreeSet::new());
    let identifiers = each(host, family, removed, Listed::Identified, &|_, owner| {
        places.borrow_mut().insert(owner);
    })?;
    Ok(Found {
        places: places.into_inner(),
        identifiers,
    })
}

/// The use of conntrack entries.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Listed {
    /// Their identifiers are kept.
    Identified,
    /// They are seen and forgotten.
    Seen,
}

/// Calls `see` with each conntrack entry that has an owner, and the place of the owner;
/// with some of them twice. Returns the identifiers of these entries.
pub(super) fn each(
    host: &impl Host,
    family: Family,
    removed: &[RemovedBackend],
    listed: Listed,
    see: &dyn Fn(&ConntrackEntry, usize),
) -> Result<Vec<Vec<u8>>> {
    // Sorted, since a hash of each entry's address takes longer than the search.
    let mut places: Vec<(u128, usize)> = removed
        .iter()
        .enumerate()
        .map(|(at, backend)| (number(backend.endpoint.address), at))
        .collect();
    places.sort_unstable();
    let filter = |backend: &RemovedBackend| ReplyFilter {
        protocol: backend.protocol,
        backend: backend.endpoint,
    };
    let filters: Vec<ReplyFilter> = removed.iter().map(filter).collect();
    let wanted = |entry: &ConntrackEntry| {
        let address = number(entry.reply_source.0);
        let first = places.partition_point(|(other, _)| *other < address);
        let candidates = places[first..].iter();
        let candidates = candidates.take_while(|(other, _)| *other == address);
        let mut is_owned = false;
        for (_, at) in candidates.filter(|(_, at)| removed[*at].owns(entry)) {
            see(entry, *at);
            is_owned = true;
        }
        is_owned && listed == Listed::Identified
    };
    host.connections(family, &filters, &wanted)
}

/// An address of a family that is known, as a number: they are compared often.
pub(super) fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    }
}

/// Returns true for the connections that are wanted: of a balancer of a set, or of
/// the only one, and of a protocol.
pub type Wanted<'a> = &'a dyn Fn(Option<&str>, Protocol) -> bool;

/// The backends that got connections by the observed rules, are not planned or
/// leave, and whose connections are wanted.
pub(super) fn removed(
    plan: &Plan,
    family: Family,
    before: &Ruleset,
    leaving: &Leaving,
    wanted: Wanted,
) -> Vec<RemovedBackend> {
    let nat = before.owned(Table::Nat);
    let jumps = jumps_of(nat);
    if plan.is_set || is_set(&plan.name, nat) {
        return removed_of_set(plan, family, nat, leaving, wanted);
    }
    let protocols: BTreeSet<_> = jumps.iter().map(|rule| rule.protocol).collect();
    // A rule without a protocol has that of the connections that arrive.
    let arriving = match protocols.first() {
        Some(protocol) if protocols.len() == 1 => *protocol,
        _ => None,
    };
    let rules = nat.chains.values().flat_map(|chain| &chain.rules);
    let observed: BTreeSet<_> = rules
        .filter_map(|rule| backend(rule.meaning.as_ref()?, arriving))
        .filter(|(protocol, _)| wanted(None, *protocol))
        .filter(|(_, endpoint)| leaving.is_meant(&plan.name, nat, ("", *endpoint)))
        .collect();
    if observed.is_empty() {
        return Vec::new();
    }
    let planned = plan.tables.get(&(family, Table::Nat)).into_iter();
    let planned: BTreeSet<_> = planned
        .flat_map(|table| table.chains.values().flatten())
        .filter_map(|rule| backend(rule, None))
        .filter(|(_, endpoint)| !leaving.includes("", *endpoint))
        .collect();
    let kept = |protocol: Protocol, address: IpAddr| {
        let same = planned.iter();
        let same = same.filter(|(of, endpoint)| *of == protocol && endpoint.address == address);
        same.map(|(_, endpoint)| endpoint.port).collect()
    };
    let removed = observed.difference(&planned);
    removed
        .map(|(protocol, endpoint)| RemovedBackend {
            family,
            protocol: *protocol,
            endpoint: *endpoint,
            balancer: None,
            jumps: jumps.clone(),
            routes: None,
            kept: kept(*protocol, endpoint.address),
        })
        .collect()
}

/// The same where connections find their balancer through the chains of a set,
/// before or after the changes. Each balancer has backends of its own, and its own
/// `disconnect`.
fn removed_of_set(
    plan: &Plan,
    family: Family,
    before: &OwnedTable,
    leaving: &Leaving,
    wanted: Wanted,
) -> Vec<RemovedBackend> {
    let jumps = jumps_of(before);
    let routes = Routes::new(plan, family, before, leaving);
    let removed: BTreeSet<_> = routes
        .observed
        .backends
        .iter()
        .filter(|backend| !routes.planned.backends.contains(*backend))
        .filter(|(part, protocol, _)| wanted(Some(part), *protocol))
        .cloned()
        .collect();
    if removed.is_empty() {
        return Vec::new();
    }
    let routes = Arc::new(routes);
    let removed = removed.into_iter();
    removed
        .map(|(part, protocol, endpoint)| RemovedBackend {
            family,
            protocol,
            endpoint,
            balancer: (!part.is_empty()).then_some(part),
            jumps: jumps.clone(),
            routes: Some(Arc::clone(&routes)),
            kept: Vec::new(),
        })
        .collect()
}

/// The jump rules that lead new connections to the balancer.
fn jumps_of(nat: &OwnedTable) -> Vec<Rule> {
    let leads_in = |chain: &str| ["PREROUTING", "OUTPUT"].contains(&chain);
    let jumps = nat.jumps.iter().filter(|jump| leads_in(&jump.chain));
    jumps.filter_map(|jump| jump.rule.meaning.clone()).collect()
}

/// Returns true if connections to a removed backend are ended. A balancer that is
/// not listed any more has the setting of the request.
fn ends(request: &Request, part: Option<&str>, protocol: Protocol) -> bool {
    let mut balancers = request.balancers().iter();
    let listed = balancers.find(|balancer| balancer.name.as_deref() == part && part.is_some());
    match listed.map_or(request.disconnect, |balancer| balancer.disconnect) {
        Disconnect::Never => false,
        Disconnect::Udp => protocol == Protocol::Udp,
        Disconnect::Always => true,
    }
}

/// The backend of a DNAT rule, with the protocol of its connections.
pub(super) fn backend(rule: &Rule, arriving: Option<Protocol>) -> Option<(Protocol, Endpoint)> {
    match rule.target {
        Target::Dnat(endpoint) => Some((rule.protocol.or(arriving)?, endpoint)),
        _ => None,
    }
}
