//! `hold` and `release`: an operator takes a backend out of service, and brings it
//! back, without the playbook. The request as it was last applied is applied again.

use anyhow::{Result, bail};

use crate::converge::outcome::RunMode;
use crate::host::{Host, System, lookup, seconds_since_1970};
use crate::netfilter::Endpoint;
use crate::report::Report;
use crate::request::{Backend, Balancer, DesiredState, Name, Request, UncheckedRequest};
use crate::run::{Invocation, Surroundings, run_within};
use crate::state::{Hold, Holds, State};

/// A backend, as an operator names it.
#[derive(Clone, Debug)]
pub struct Order {
    /// The balancer or set.
    pub name: Name,
    /// The balancer of the set; may be left out where only one has the backend.
    pub balancer: Option<String>,
    /// The address; the port may be left out where only one backend has the address.
    pub backend: Endpoint,
    /// The request to apply; without one it is the one that was applied last.
    pub request: Option<UncheckedRequest>,
}

/// The change of the list of holds.
#[derive(Clone, Debug)]
pub enum Action {
    /// Out of service, for a time.
    Hold {
        /// The time in seconds; without one until it is released.
        seconds: Option<u64>,
        /// The operator's reason.
        reason: Option<String>,
    },
    /// Back into service.
    Release,
}

/// The backend that was meant.
struct Meant {
    balancer: Option<String>,
    endpoint: Endpoint,
}

/// Changes the list of holds and applies the request. When that fails, the list is
/// as before.
///
/// # Errors
/// When no request is known, when it has no such backend, or when the list cannot be
/// read or written. Nothing is changed then.
pub fn carry_out(order: &Order, action: &Action) -> Result<Report> {
    let state = State::of(&order.name)?;
    let (unchecked, _) = meant(order, &state)?;
    let lock = System::open(unchecked.variant.required(), unchecked.wait)?.lock()?;
    // Others may have applied another request until now.
    let (unchecked, meant) = meant(order, &state)?;
    let before = state.holds();
    if let Some(broken) = before.warning {
        bail!("{broken}");
    }
    state.store_holds(&changed(&before.value, &meant, action))?;
    let invocation = Invocation {
        request: unchecked,
        mode: RunMode::Apply,
        diff: true,
    };
    let surroundings = Surroundings {
        lock: Some(lock),
        ..Surroundings::default()
    };
    let mut report = run_within(&invocation, &surroundings);
    if report.failed {
        let list = match state.store_holds(&before.value) {
            Ok(()) => "as before".to_owned(),
            Err(error) => format!("changed all the same: {error:#}"),
        };
        report.msg = format!("{}; the list of holds is {list}", report.msg);
    }
    Ok(report)
}

/// The request to apply, and its backend that is meant.
fn meant(order: &Order, state: &State) -> Result<(UncheckedRequest, Meant)> {
    let unchecked = request(order, state)?;
    let meant = find(order, &unchecked.resolve(&lookup)?)?;
    Ok((unchecked, meant))
}

fn changed(holds: &Holds, meant: &Meant, action: &Action) -> Holds {
    let now = seconds_since_1970();
    match action {
        Action::Release => holds.without(meant.balancer.as_deref(), meant.endpoint, now),
        Action::Hold { seconds, reason } => {
            let hold = Hold {
                balancer: meant.balancer.clone(),
                address: meant.endpoint.address,
                port: meant.endpoint.port,
                until: seconds.map(|seconds| now.saturating_add(seconds)),
                reason: reason.clone(),
            };
            holds.with(hold, now)
        }
    }
}

/// The request of the order, or the one that was applied last.
fn request(order: &Order, state: &State) -> Result<UncheckedRequest> {
    let name = order.name.as_str();
    let request = match &order.request {
        Some(request) => request.clone(),
        None => match state.kept_request()? {
            Some(text) => UncheckedRequest::parse(&text)?,
            None => bail!(
                "no request for `{name}` is known on this host; name its file with `--request FILE`"
            ),
        },
    };
    if request.name != order.name {
        let other = request.name.as_str();
        bail!("--request: it is about `{other}`, not about `{name}`");
    }
    if request.state == DesiredState::Absent {
        bail!("--request: its `state` is `absent`, so it has no backend");
    }
    Ok(request)
}

/// The backend of the request that is meant.
fn find(order: &Order, request: &Request) -> Result<Meant> {
    let balancers = request.balancers();
    let named: Vec<&Balancer> = match &order.balancer {
        None => balancers.iter().collect(),
        Some(_) if !request.is_set() => {
            let name = order.name.as_str();
            bail!("--balancer: `{name}` is a single balancer; leave it out");
        }
        Some(name) => {
            let named = balancers
                .iter()
                .filter(|one| one.name.as_ref() == Some(name));
            named.collect()
        }
    };
    if let (Some(name), true) = (&order.balancer, named.is_empty()) {
        let known = balancers.iter().filter_map(|one| one.name.as_deref());
        bail!(
            "--balancer: there is no `{name}`; there are {}",
            listed(known)
        );
    }
    let wanted = order.backend;
    let is_meant = |backend: &&Backend| {
        backend.endpoint == wanted
            || (wanted.port.is_none() && backend.endpoint.address == wanted.address)
    };
    let backends = || {
        let all = named.iter().flat_map(|balancer| {
            let backends = balancer.pools.iter().flat_map(|pool| &pool.backends);
            backends.map(|backend| (*balancer, backend))
        });
        all.map(|(balancer, backend)| (balancer.name.as_deref(), backend))
    };
    let found: Vec<_> = backends()
        .filter(|(_, backend)| is_meant(backend))
        .collect();
    match found[..] {
        [(balancer, backend)] => Ok(Meant {
            balancer: balancer.map(str::to_owned),
            endpoint: backend.endpoint,
        }),
        [] => {
            let known = endpoints(backends());
            bail!(
                "`{wanted}` is no backend of `{}`; its backends are {known}",
                order.name.as_str()
            )
        }
        [(first, _), .., (last, _)] if first != last => {
            let known: Vec<&str> = found.iter().filter_map(|(balancer, _)| *balancer).collect();
            let known = listed(known.into_iter());
            bail!("`{wanted}` is a backend of {known}; say which with `--balancer NAME`")
        }
        _ => {
            let known = endpoints(found.into_iter());
            bail!("`{wanted}` stands for {known}; name its port")
        }
    }
}

/// The backends' addresses and ports in backticks, ten at most.
fn endpoints<'a>(backends: impl Iterator<Item = (Option<&'a str>, &'a Backend)>) -> String {
    let known: Vec<String> = backends
        .map(|(_, backend)| backend.endpoint.to_string())
        .collect();
    listed(known.iter().map(String::as_str))
}

/// Names in backticks, ten at most.
fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    crate::request::listed(names.into_iter())
}
