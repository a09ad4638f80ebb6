//! The health of the backends in one run: the verdicts of a watcher, and for the
//! backends that it does not know, a few probes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::host::probe::{HttpProbe, Probe, ProbeFailure, ProbeMethod, Prober};
use crate::host::{seconds_since_1970, since_boot};
use crate::netfilter::Endpoint;
use crate::request::{Balancer, Check, Health, Request, Verdict};
use crate::state::{Checked, State};

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
pub fn check(targets: &[Target], state: &State) -> Findings {
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
    match probe_all(&unknown) {
        Ok(probed) => backends.extend(probed),
        Err(error) => {
            let problem = "the backends cannot be probed, so each counts as healthy";
            warning.get_or_insert(format!("{problem}: {error:#}"));
        }
    }
    Findings {
        backends,
        has_watcher,
        warning,
    }
}

/// One backend on its way to a verdict.
struct Series {
    probe: Probe,
    fall: u32,
    /// The time between the beginnings of two probes, at most `timeout`.
    pause: Duration,
    failed: u32,
    begun: Instant,
}

fn probe_all(targets: &[Target]) -> Result<Vec<Checked>> {
    let mut prober = Prober::new()?;
    let mut running = BTreeMap::new();
    for (id, target) in targets.iter().enumerate() {
        let Some(probe) = target.probe() else {
            continue;
        };
        prober.start(id, &probe);
        running.insert(id, Series::new(probe, target.health));
    }
    let mut checked = Vec::new();
    let mut waiting = BTreeSet::new();
    let mut results = Vec::new();
    while !running.is_empty() {
        let next = waiting.first().map(|(due, _)| *due);
        prober.wait(next, &mut results)?;
        for (id, result) in results.drain(..) {
            let Some(series) = running.get_mut(&id) else {
                continue;
            };
            match series.record(&result) {
                Some(health) => {
                    let reason = result.err().map(|failure| failure.to_string());
                    checked.push(targets[id].checked(health, reason));
                    running.remove(&id);
                }
                None => drop(waiting.insert((series.begun + series.pause, id))),
            }
        }
        let now = Instant::now();
        while let Some((due, id)) = waiting.pop_first() {
            if due > now {
                waiting.insert((due, id));
                break;
            }
            if let Some(series) = running.get_mut(&id) {
                series.begun = now;
                prober.start(id, &series.probe);
            }
        }
    }
    Ok(checked)
}

impl Series {
    fn new(probe: Probe, health: &Health) -> Self {
        Self {
            probe,
            fall: health.fall,
            pause: health.interval.min(health.timeout),
            failed: 0,
            begun: Instant::now(),
        }
    }

    /// The verdict, once there is one.
    fn record(&mut self, result: &Result<(), ProbeFailure>) -> Option<Verdict> {
        if result.is_ok() {
            return Some(Verdict::Up);
        }
        self.failed += 1;
        (self.failed >= self.fall).then_some(Verdict::Down)
    }
}
