//! The balancers of this host as they are now: shares by the rules, places in service
//! and why, connections, counters. Nothing is probed or changed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::rc::Rc;

use anyhow::{Result, anyhow, bail};
use schemars::JsonSchema;
use serde::Serialize;

use crate::effects::draining::Draining;
use crate::host::{Dumps, Host, Query, Scope, System, lookup, seconds_since_1970};
use crate::netfilter::rule::Target;
use crate::netfilter::ruleset::{Counters, OwnedTable, Ruleset};
use crate::netfilter::shares::shares_of_chain;
use crate::netfilter::statistic::Share;
use crate::netfilter::{Endpoint, Family, Name, Table};
use crate::plan::{self, Plan};
use crate::request::{Backend, Balancer, Pool, Request, Service, UncheckedRequest, Verdict};
use crate::situation::Situation;
use crate::state::{State, kept_names};

/// The balancers of this host.
#[derive(Debug, Default, Serialize, JsonSchema)]
#[schemars(title = "iptables_balance status")]
pub struct Status {
    /// In the order of their names; those of a set in the order of the request.
    pub balancers: Vec<BalancerStatus>,
    /// Things that could not be found out.
    #[serde(skip)]
    pub warnings: Vec<String>,
}

/// One balancer.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "BalancerStatus")]
pub struct BalancerStatus {
    /// The name of the balancer, or of its set.
    pub name: String,
    /// Its name in the set; null for a single balancer.
    pub balancer: Option<String>,
    /// Its backends in the order of the request, IPv4 first.
    pub backends: Vec<BackendStatus>,
}

/// One backend.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "BackendStatus")]
pub struct BackendStatus {
    /// The family of its connections.
    pub family: Family,
    /// Its address.
    pub address: IpAddr,
    /// Its port; null where connections keep the port that they were addressed to.
    pub port: Option<u16>,
    /// Its weight as requested.
    pub weight: u32,
    /// Its share of its family's new connections by the rules, 0 to 1.
    pub share: f64,
    /// True if it gets new connections.
    pub in_service: bool,
    /// The reason why it is out of service, or in service although it is down.
    pub reason: Option<String>,
    /// The verdict of a running watcher.
    pub health: Option<Verdict>,
    /// Its connections now; null where the kernel does not list them.
    pub connections: Option<usize>,
    /// Its connections since its rules were made.
    pub packets: u64,
    /// The bytes of the first packets of these.
    pub bytes: u64,
}

impl BackendStatus {
    /// Its address and port.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        Endpoint {
            address: self.address,
            port: self.port,
        }
    }
}

/// Looks at one balancer or set, or at all of which a request is kept.
///
/// # Errors
/// When nothing is known of `name`, or others may write where the requests are kept.
pub fn status(name: Option<&Name>) -> Result<Status> {
    let names = match name {
        Some(name) => vec![name.clone()],
        None => kept_names()?,
    };
    let dumps = Rc::new(Dumps::default());
    let mut status = Status::default();
    for known in &names {
        match look(known, &dumps, &mut status.warnings) {
            Ok(balancers) => status.balancers.extend(balancers),
            Err(error) if name.is_some() => return Err(error),
            Err(error) => status
                .warnings
                .push(format!("`{}`: {error:#}", known.as_str())),
        }
    }
    Ok(status)
}

fn look(name: &Name, dumps: &Rc<Dumps>, warnings: &mut Vec<String>) -> Result<Vec<BalancerStatus>> {
    let state = State::of(name)?;
    let Some(text) = state.kept_request()? else {
        bail!(
            "no request for `{}` is known on this host; a run of Ansible, CFEngine or `apply` makes it known",
            name.as_str()
        );
    };
    let unchecked = UncheckedRequest::parse(&text)?;
    let host = System::open(unchecked.variant.required(), unchecked.wait)?.in_session(dumps);
    let mut request = unchecked.resolve(&lookup)?;
    let situation = Situation::known(&state);
    request.decide(&situation.circumstances());
    let rules = read(&host, name, &request)?;
    let connections = connections(&host, &request, &rules).map_err(|error| {
        warnings.push(format!(
            "`{}`: connections cannot be counted: {error:#}",
            name.as_str()
        ));
    });
    let view = View {
        situation: &situation,
        reasons: situation.reasons(),
        rules,
        connections: connections.ok(),
    };
    Ok(request
        .balancers()
        .iter()
        .map(|one| view.balancer(name, one))
        .collect())
}

/// The rules of each family in use, with counters.
fn read(host: &System, name: &Name, request: &Request) -> Result<BTreeMap<Family, Ruleset>> {
    let families: HashSet<Family> = request.pools().map(|(_, pool)| pool.family).collect();
    let families: Vec<Family> = Family::BOTH
        .into_iter()
        .filter(|one| families.contains(one))
        .collect();
    let query = |family: &Family| Query {
        family: *family,
        scope: Scope::Only(Table::Nat),
        counters: true,
    };
    let queries = families.iter().map(query).collect();
    let rulesets = host.begin_read(name, queries).finish().into_iter();
    let rulesets = families.into_iter().zip(rulesets);
    rulesets
        .map(|(family, ruleset)| Ok((family, ruleset.map_err(|error| anyhow!("{error:#}"))?)))
        .collect()
}

/// The number of connections of each backend that has some, by balancer.
type Connections = HashMap<(Option<String>, Endpoint), usize>;

fn connections(
    host: &System,
    request: &Request,
    rules: &BTreeMap<Family, Ruleset>,
) -> Result<Connections> {
    let places = [
        Service::InService,
        Service::Drained,
        Service::Held,
        Service::Down,
        Service::Reserve,
    ];
    let rules = rules.iter().map(|(family, ruleset)| (*family, ruleset));
    let all = Draining::of(&places, request, &Plan::new(request), rules);
    let counted = all.remaining(host)?.into_iter();
    Ok(counted
        .map(|one| {
            let endpoint = Endpoint {
                address: one.address,
                port: one.port,
            };
            ((one.balancer, endpoint), one.connections)
        })
        .collect())
}

/// Everything that is known of one request's balancers.
struct View<'a> {
    situation: &'a Situation,
    reasons: HashMap<(Option<String>, Endpoint), &'a str>,
    rules: BTreeMap<Family, Ruleset>,
    connections: Option<Connections>,
}

/// The rules about one backend, in sum.
#[derive(Clone, Copy)]
struct Observed {
    share: Share,
    counters: Counters,
    is_drained: bool,
}

impl View<'_> {
    fn balancer(&self, name: &Name, balancer: &Balancer) -> BalancerStatus {
        let pools = balancer.pools.iter();
        BalancerStatus {
            name: name.as_str().to_owned(),
            balancer: balancer.name.clone(),
            backends: pools.flat_map(|pool| self.pool(balancer, pool)).collect(),
        }
    }

    fn pool(&self, balancer: &Balancer, pool: &Pool) -> Vec<BackendStatus> {
        let nothing = OwnedTable::default();
        let ruleset = self.rules.get(&pool.family);
        let nat = ruleset.map_or(&nothing, |ruleset| ruleset.owned(Table::Nat));
        let shares = shares_of_chain(nat, &balancer.chain);
        let counters = counters(nat, &balancer.chain);
        let drained = endpoints(nat, &plan::drain_chain(&balancer.chain));
        let backends = pool.backends.iter();
        let status = backends.map(|backend| {
            let observed = Observed {
                share: shares
                    .get(&backend.endpoint)
                    .copied()
                    .unwrap_or(Share::NONE),
                counters: counters.get(&backend.endpoint).copied().unwrap_or_default(),
                is_drained: drained.contains(&backend.endpoint),
            };
            self.backend(balancer, pool.family, backend, observed)
        });
        status.collect()
    }

    fn backend(
        &self,
        balancer: &Balancer,
        family: Family,
        backend: &Backend,
        observed: Observed,
    ) -> BackendStatus {
        let endpoint = backend.endpoint;
        let in_service = observed.share != Share::NONE;
        let key = (balancer.name.clone(), endpoint);
        let counted = self.connections.as_ref();
        BackendStatus {
            family,
            address: endpoint.address,
            port: endpoint.port,
            weight: backend.weight,
            share: observed.share.as_f64(),
            in_service,
            reason: match (in_service, backend.health) {
                (true, Some(Verdict::Down)) => Some(format!(
                    "{}, and health is ignored",
                    self.down(balancer, endpoint)
                )),
                (true, _) => None,
                (false, _) => Some(self.reason(balancer, backend, observed.is_drained)),
            },
            health: backend.health,
            connections: counted.map(|counted| counted.get(&key).copied().unwrap_or_default()),
            packets: observed.counters.packets,
            bytes: observed.counters.bytes,
        }
    }

    /// The reason why a backend is out of service.
    fn reason(&self, balancer: &Balancer, backend: &Backend, is_drained: bool) -> String {
        let endpoint = backend.endpoint;
        match backend.service {
            Service::Drained => "weight 0".to_owned(),
            Service::Held => match self.situation.hold(balancer, endpoint) {
                None => "held".to_owned(),
                Some(hold) => {
                    let left = hold.time_left(seconds_since_1970());
                    let reason = hold.shown_reason();
                    format!("held {left}{reason}")
                }
            },
            Service::Down => self.down(balancer, endpoint),
            Service::Reserve => "backup".to_owned(),
            Service::InService if is_drained && balancer.health.is_some() => {
                "down when a run checked it".to_owned()
            }
            Service::InService if is_drained => {
                "taken out by the last run; apply the request again".to_owned()
            }
            Service::InService => "missing from the rules; apply the request again".to_owned(),
        }
    }

    fn down(&self, balancer: &Balancer, endpoint: Endpoint) -> String {
        match self.reasons.get(&(balancer.name.clone(), endpoint)) {
            None => "down".to_owned(),
            Some(reason) => format!("down: {reason}"),
        }
    }
}

/// The counters of all rules of each backend of a balancer.
fn counters(nat: &OwnedTable, balancer: &str) -> HashMap<Endpoint, Counters> {
    let is_ours = |chain: &str| {
        let rest = chain.strip_prefix(balancer);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let chains = nat.chains.iter().filter(|(name, _)| is_ours(name));
    let mut counters = HashMap::<Endpoint, Counters>::new();
    for rule in chains.flat_map(|(_, chain)| &chain.rules) {
        if let Some(Target::Dnat(endpoint)) = rule.meaning.as_ref().map(|rule| &rule.target) {
            let sum = counters.entry(*endpoint).or_default();
            *sum = sum.and(rule.counters);
        }
    }
    counters
}

fn endpoints(nat: &OwnedTable, chain: &str) -> HashSet<Endpoint> {
    let rules = nat.chains.get(chain).map_or(&[][..], |chain| &chain.rules);
    let endpoint = |target: &Target| match target {
        Target::Dnat(endpoint) => Some(*endpoint),
        _ => None,
    };
    rules
        .iter()
        .filter_map(|rule| endpoint(&rule.meaning.as_ref()?.target))
        .collect()
}
