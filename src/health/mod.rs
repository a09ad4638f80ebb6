//! The health of the backends in one run: the verdicts of a watcher, and for the
//! backends that it does not know, a few probes.

pub mod tracker;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use crate::host::{HttpProbe, Probe, ProbeFailure, ProbeMethod, Prober};
use crate::host::{seconds_since_1970, since_boot};
use crate::netfilter::Endpoint;
use crate::request::{Balancer, Check, Health, Request, Verdict};
use crate::state::{Checked, State};
use tracker::Tracker;

/// A backend whose health is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// Its balancer.
    pub balancer: &'a Balancer,
    /// Its address and port.
    pub endpoint: Endpoint,
    /// The checks.
    pub health: &'a Health,
}

/// The backends of a request whose health is asked for, except those of weight 0.
pub fn targets(request: &Request) -> impl Iterator<Item = Target<'_>> {
    let pools = request.pools();
    let checked = pools.filter_map(|(balancer, pool)| {
        let health = balancer.health.as_ref()?;
        let backends = pool.backends.iter().filter(|backend| backend.weight > 0);
        Some(backends.map(move |backend| Target {
            balancer,
            endpoint: backend.endpoint,
            health,
        }))
    });
    checked.flatten()
}

impl Target<'_> {
    /// The probe; `None` where no port is known, which a valid request excludes.
    #[must_use]
    pub fn probe(&self) -> Option<Probe> {
        let port = self.health.port.or(self.endpoint.port)?;
        let address = SocketAddr::new(self.endpoint.address, port);
        let method = match &self.health.check {
            Check::Tcp => ProbeMethod::Tcp,
            Check::Http { path, host, status } => ProbeMethod::Http(Rc::new(HttpProbe {
                path: path.clone(),
                host: host.clone().unwrap_or_else(|| address.to_string()),
                status: status.clone(),
            })),
        };
        Some(Probe {
            address,
            method,
            timeout: self.health.timeout,
        })
    }

    /// A verdict about the backend, of now.
    #[must_use]
    pub fn checked(&self, health: Verdict, reason: Option<String>) -> Checked {
        Checked {
            balancer: self.balancer.name.clone(),
            address: self.endpoint.address,
            port: self.endpoint.port,
            health,
            reason,
            since: seconds_since_1970(),
        }
    }
}

/// The health of the backends, and how it was found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Findings {
    /// The verdicts.
    pub backends: Vec<Checked>,
    /// True if a watcher gave some of them.
    pub has_watcher: bool,
    /// The reason why a backend could not be checked.
    pub warning: Option<String>,
}

/// Returns true if rules of this host may lead a probe elsewhere: those for the
/// connections that it makes itself.
#[must_use]
pub fn are_led_astray(request: &Request) -> bool {
    let balancers = request.balancers().iter();
    let mut checked = balancers.filter(|balancer| balancer.health.is_some());
    checked.any(|balancer| balancer.gateway.local_traffic)
}

/// The verdicts of a watcher that are fresh, and a warning where they cannot be read.
#[must_use]
pub fn watched(state: &State) -> (Vec<Checked>, Option<String>) {
    let loaded = state.verdicts();
    let verdicts = loaded
        .value
        .filter(|verdicts| verdicts.are_fresh(since_boot()));
    (verdicts.unwrap_or_default().backends, loaded.warning)
}

/// Finds out the health of the targets: by a watcher, else by up to `fall` probes of
/// each, all at once. That takes no longer than the longest `fall` times `timeout`.
#[must_use]
pub fn check(request: &Request, targets: &[Target], state: &State) -> Findings {
    if targets.is_empty() {
        return Findings::default();
    }
    let (watched, mut warning) = watched(state);
    let mut watched: HashMap<(Option<String>, Endpoint), Checked> = watched
        .into_iter()
        .map(|checked| (checked.backend(), checked))
        .collect();
    let mut backends = Vec::new();
    let mut unknown = Vec::new();
    let has_watcher = !watched.is_empty();
    for target in targets {
        match watched.remove(&(target.balancer.name.clone(), target.endpoint)) {
            Some(checked) => backends.push(checked),
            None => unknown.push(*target),
        }
    }
    match probe_all(&unknown, are_led_astray(request)) {
        Ok(probed) => {
            backends.extend(probed.checked);
            warning = warning.or(probed.warning);
        }
        Err(error) => {
            let problem = "the backends cannot be probed, so each counts as healthy";
            warning.get_or_insert(format!("{problem}: {error}"));
        }
    }
    Findings {
        backends,
        has_watcher,
        warning,
    }
}

/// The verdicts of a few probes.
#[derive(Default)]
struct Probed {
    checked: Vec<Checked>,
    warning: Option<String>,
}

/// Probes until there is a verdict about each target.
fn probe_all<'a>(targets: &[Target<'a>], are_led_astray: bool) -> io::Result<Probed> {
    let with_probe = |target: &Target<'a>| Some((*target, target.probe()?));
    let targets: Vec<(Target, Probe)> = targets.iter().filter_map(with_probe).collect();
    let mut prober = Prober::new()?;
    let mut found = Probed::default();
    if let Err(error) = prober.bypass_rules(are_led_astray) {
        let problem = "probes may be balanced themselves, because of `local_traffic`";
        found.warning = Some(format!("{problem}: {error}"));
    }
    let mut tracker = Tracker::new(0);
    let mut now = Instant::now();
    for (target, _) in &targets {
        tracker.add(target.health, None, now);
    }
    let mut results = Vec::new();
    while tracker.has_unknown() {
        for id in tracker.due(now) {
            if tracker.verdict(id).is_none() {
                prober.start(id, &targets[id].1);
            }
        }
        prober.wait(tracker.next_due(), &mut results)?;
        now = Instant::now();
        for (id, result) in results.drain(..) {
            found.add(&mut tracker, (id, &targets[id].0), result, now);
        }
    }
    Ok(found)
}

impl Probed {
    fn add(
        &mut self,
        tracker: &mut Tracker,
        (id, target): (usize, &Target),
        result: Result<(), ProbeFailure>,
        now: Instant,
    ) {
        match result {
            Err(failure) if !failure.blames_the_backend() => {
                let problem = "a backend that could not be probed counts as healthy";
                self.warning.get_or_insert(format!("{problem}: {failure}"));
                tracker.skip(id, now);
            }
            result => {
                if let Some(verdict) = tracker.record(id, result.is_ok(), now) {
                    let reason = result.err().map(|failure| failure.to_string());
                    self.checked.push(target.checked(verdict, reason));
                }
            }
        }
    }
}
