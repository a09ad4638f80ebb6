//! The situation of a run: the backends that are held, and their health.

use std::collections::HashMap;
use std::fmt;

use anyhow::Result;

use crate::health::{self, Findings, Target};
use crate::host::seconds_since_1970;
use crate::netfilter::Endpoint;
use crate::request::{Backend, Balancer, Circumstances, DesiredState, Request, Service, Verdict};
use crate::state::{Checked, Hold, State};

/// Everything that decides who is in service and is not in the request.
#[derive(Clone, Debug)]
pub struct Situation {
    state: State,
    /// The holds that have not ended.
    holds: Vec<Hold>,
    findings: Findings,
    /// The verdicts are the caller's, who is the watcher.
    is_watcher: bool,
    warnings: Vec<String>,
}

/// The situation has changed since it was found.
#[derive(Debug)]
pub struct Outdated;

impl fmt::Display for Outdated {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("gave up after 5 attempts, during each of which a hold or a verdict changed")
    }
}

impl std::error::Error for Outdated {}

impl Situation {
    /// Finds out which backends of the request are held or down. `verdicts` are those
    /// of the caller, if it is the watcher; else a watcher's file or probes tell.
    #[must_use]
    pub fn find(state: &State, request: &Request, verdicts: Option<&Vec<Checked>>) -> Self {
        let mut situation = Self {
            state: state.clone(),
            holds: Vec::new(),
            findings: Findings::default(),
            is_watcher: verdicts.is_some(),
            warnings: Vec::new(),
        };
        if request.state() == DesiredState::Absent {
            return situation;
        }
        situation.read_holds();
        situation.findings = match verdicts {
            Some(backends) => Findings {
                backends: backends.clone(),
                ..Findings::default()
            },
            None => {
                let targets = health::targets(request);
                let free: Vec<Target> = targets
                    .filter(|target| !situation.is_held(target))
                    .collect();
                health::check(request, &free, state)
            }
        };
        situation
    }

    /// The situation as it is known without a probe: holds, and a watcher's verdicts.
    #[must_use]
    pub fn known(state: &State) -> Self {
        let (backends, warning) = health::watched(state);
        let mut situation = Self {
            state: state.clone(),
            holds: Vec::new(),
            findings: Findings {
                has_watcher: !backends.is_empty(),
                backends,
                warning,
            },
            is_watcher: false,
            warnings: Vec::new(),
        };
        situation.read_holds();
        situation
    }

    /// The hold of a backend.
    #[must_use]
    pub fn hold(&self, balancer: &Balancer, endpoint: Endpoint) -> Option<&Hold> {
        let mut holds = self.holds.iter();
        holds.find(|hold| hold.balancer == balancer.name && hold.endpoint() == endpoint)
    }

    /// The reason of the last failed check of each backend that is down.
    #[must_use]
    pub fn reasons(&self) -> HashMap<(Option<String>, Endpoint), &str> {
        let backends = self.findings.backends.iter();
        let reasons = backends.filter_map(|one| Some((one.backend(), one.reason.as_deref()?)));
        reasons.collect()
    }

    /// Reads the holds and the watcher's verdicts again.
    pub fn update(&mut self) {
        self.read_holds();
        self.read_verdicts();
    }

    /// Checks that holds and a watcher's verdicts are what they were.
    ///
    /// # Errors
    /// [`Outdated`] when they are not.
    pub fn check(&self) -> Result<()> {
        let mut now = self.clone();
        now.update();
        match now.circumstances() == self.circumstances() {
            true => Ok(()),
            false => Err(Outdated.into()),
        }
    }

    /// The circumstances that decide who is in service.
    #[must_use]
    pub fn circumstances(&self) -> Circumstances {
        let mut circumstances = Circumstances::default();
        for hold in &self.holds {
            let known = circumstances.of(hold.balancer.as_deref());
            known.held.insert(hold.endpoint());
        }
        for checked in &self.findings.backends {
            let known = circumstances.of(checked.balancer.as_deref());
            known.verdicts.insert(checked.endpoint(), checked.health);
        }
        circumstances
    }

    /// Warnings about broken files, and about the backends that are held or down.
    #[must_use]
    pub fn warnings(&self, request: &Request) -> Vec<String> {
        let mut warnings = self.warnings.clone();
        warnings.extend(self.findings.warning.clone());
        let mut held: Vec<String> = self.holds.iter().map(|hold| held(request, hold)).collect();
        if let Some(more @ 1..) = held.len().checked_sub(HOLDS_TOLD) {
            held.truncate(HOLDS_TOLD);
            held.push(format!(
                "{more} more backends are held; `iptables_balance status` lists them"
            ));
        }
        warnings.extend(held);
        let balancers = request.balancers().iter();
        warnings.extend(balancers.flat_map(|balancer| self.unhealthy(balancer)));
        warnings
    }

    fn read_holds(&mut self) {
        let loaded = self.state.holds();
        let active = loaded.value.active(seconds_since_1970());
        self.holds = active.cloned().collect();
        self.warnings = loaded.warning.into_iter().collect();
    }

    fn read_verdicts(&mut self) {
        if self.is_watcher || !self.findings.has_watcher {
            return;
        }
        let (watched, _) = health::watched(&self.state);
        let watched = watched.into_iter();
        let mut watched: HashMap<_, Checked> = watched.map(|one| (one.backend(), one)).collect();
        for checked in &mut self.findings.backends {
            if let Some(newer) = watched.remove(&checked.backend()) {
                *checked = newer;
            }
        }
    }

    fn is_held(&self, target: &Target) -> bool {
        self.hold(target.balancer, target.endpoint).is_some()
    }

    /// The backends of a balancer that are down, in one warning.
    fn unhealthy(&self, balancer: &Balancer) -> Vec<String> {
        let backends = || balancer.pools.iter().flat_map(|pool| &pool.backends);
        let down: Vec<&Backend> = backends()
            .filter(|backend| backend.health == Some(Verdict::Down))
            .collect();
        if down.is_empty() {
            return Vec::new();
        }
        let all = backends().count();
        let shown = self.with_reasons(balancer, &down);
        let told = match down.len() {
            1 => format!("1 of {all} backends is down: {shown}"),
            count => format!("{count} of {all} backends are down: {shown}"),
        };
        let mut warnings = vec![balancer.worded(&told)];
        if down.iter().any(|backend| backend.is_in_service()) {
            let ignored = "too few backends are healthy, so health is ignored (`panic_threshold`)";
            warnings.push(balancer.worded(ignored));
        }
        warnings
    }

    fn with_reasons(&self, balancer: &Balancer, down: &[&Backend]) -> String {
        const MOST: usize = 5;
        let reasons = self.reasons();
        let shown = down.iter().take(MOST).map(|backend| {
            let endpoint = backend.endpoint;
            match reasons.get(&(balancer.name.clone(), endpoint)) {
                Some(reason) => format!("`{endpoint}` ({reason})"),
                None => format!("`{endpoint}`"),
            }
        });
        let mut shown: Vec<String> = shown.collect();
        if let Some(more @ 1..) = down.len().checked_sub(MOST) {
            shown.push(format!("and {more} more"));
        }
        shown.join(", ")
    }
}

/// The most holds that are told one by one.
const HOLDS_TOLD: usize = 10;

/// The warning that a backend is held, or that a hold fits no backend.
fn held(request: &Request, hold: &Hold) -> String {
    let endpoint = hold.endpoint();
    let within = hold.balancer.as_ref();
    let within = within.map_or_else(String::new, |name| format!(" --balancer {name}"));
    let name = request.name.as_str();
    let release = format!("`iptables_balance release {name} {endpoint}{within}`");
    let mut balancers = request.balancers().iter();
    let balancer = balancers.find(|one| one.name == hold.balancer);
    let backends = balancer.iter().flat_map(|one| &one.pools);
    let is_held =
        |backend: &Backend| backend.endpoint == endpoint && backend.service == Service::Held;
    match balancer {
        Some(balancer) if backends.flat_map(|pool| &pool.backends).any(is_held) => {
            let left = hold.time_left(seconds_since_1970());
            let reason = hold.shown_reason();
            balancer.worded(&format!(
                "backend `{endpoint}` is held {left}{reason}; {release} ends that"
            ))
        }
        _ => format!(
            "there is a hold of `{endpoint}`, which is no backend of the request; hold it as the request spells it, \
             and {release} ends this one"
        ),
    }
}
